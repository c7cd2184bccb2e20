// The plain-data contract between Python and every kernel, CPU and CUDA alike.
// Python validates and allocates; a kernel trusts what it is given. Strides are in elements, int64;
// the last dimension of every tensor is contiguous. Prefix sums (cu_*) are int32, [B + 1].
// slowfast_kernels/params.py mirrors every struct field by field; tests/test_params.py compares the two.
#pragma once
#include <cstdint>

namespace slowfast {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int kNumDTypes = 3;

// The codes of slowfast_kernels/gate.py. kNone: 1; kGiven: value[i]; the others: act(state . weight + bias).
enum class GateKind : int32_t { kTanh = 0, kLinear = 1, kNone = 2, kGiven = 3, kSigmoid = 4 };
constexpr int kNumGateKinds = 5;

// The gate of text row i is what its kind says, times factor(warm_up).
struct GateParams {
  const void* weight;     // [C], dtype `dtype`; nullptr in kinds that have none
  const void* bias;       // [1], likewise
  const void* warm_up;    // [1], or nullptr: no warm-up factor
  const float* value;     // [Nt], of kGiven alone
  DType dtype;            // of the first three; may be kFloat32 while the state is half precision
  GateKind kind;
  bool tanh_warm_up;      // factor = tanh(warm_up), else warm_up itself
};

// context[i] = softmax(scale * q[text_rows[i]] K_b^T) V_b for text row i of sequence b, grouped-query heads.
// Sequence b's slow tokens are cu_slow[b] .. cu_slow[b + 1] - 1 or, with slow_pieces, the tokens of the pieces of these
// numbers, one piece after the other. Row i sees slow_begin[i] <= j < slow_end[i] of them, clamped to what there is; if that
// is nothing, context is 0, lse -inf, and out[r] is state[r] bit for bit. A sequence has fewer than 2^31 - 256 slow tokens,
// and tokens that no row sees may hold anything.
// With `state` set, the kernel goes on to  out[r] = state[r] + g * context  on r = text_rows[i].
// What every call needs comes first: a kernel reads its arguments from a cold cache, a line at a time.
struct CrossAttentionParams {
  const void* q;          // [rows, Hq, D]
  const int32_t* cu_slow; // [B + 1]
  const int32_t* text_rows;  // [Nt], distinct rows of q (and of state)
  const int32_t* cu_text; // [B + 1]
  void* context;          // [Nt, Hq, D], contiguous; may be nullptr when state is set
  float* lse;             // [Nt, Hq] natural log, -inf where a sequence has no slow token; or nullptr
  const void* state;      // [rows, C = Hq * D], or nullptr: attention alone
  void* out;              // [rows, C] contiguous; rows outside text_rows are not touched by the kernel
  GateParams gate;
  int64_t q_row_stride, q_head_stride;
  int64_t state_row_stride;
  int64_t num_text, num_slow;   // Nt, Ns
  int32_t batch, num_q_heads, num_kv_heads, head_dim;
  int32_t num_splits;           // >= 1, over each sequence's slow tokens; on a CPU also 0: by what there is to do
  float softmax_scale;
  DType dtype;                  // of q, slow_kv, context, state, out
  const void* keys;       // [Ns, Hkv, D], and
  const void* values;     // the same: two tensors, or one [Ns, Hkv, 2, D] in which V lies D elements behind K
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const int32_t* slow_begin;   // [Nt], or nullptr: 0
  const int32_t* slow_end;     // [Nt], or nullptr: the number of the sequence's slow tokens
  const int32_t* slow_pieces;  // [P, 2], begin and end of each among the Ns tokens; or nullptr
  int64_t num_pieces;          // P; 0 without slow_pieces
};

// Gradients of context and lse to those of q, keys and values. `forward`: the call with its context and lse (both
// contiguous) as it wrote them; state and what belongs to it are not looked at. A gradient that is nullptr is not
// computed. grad_q is written on text_rows alone; keys and values get the sum over all uses of a token, rounded once,
// 0 where there is none.
struct CrossAttentionBackwardParams {
  CrossAttentionParams forward;
  const void* grad_context;    // [Nt, Hq, D]; any content in rows that see nothing
  const float* grad_lse;       // [Nt, Hq], or nullptr: 0
  void* grad_q;                // [rows, Hq, D], contiguous
  void* grad_keys;             // [Ns, Hkv, D], as
  void* grad_values;           // with the same strides
  int64_t grad_context_row_stride, grad_context_head_stride, grad_lse_row_stride, grad_lse_head_stride;
  int64_t grad_kv_token_stride, grad_kv_head_stride;
  int64_t workspace_bytes;     // that partial sums of grad_q may take, at least one KV head's of one text row
};

// out[r] = state[r] + g * context[i] for r = text_rows[i]; every other row of out is a copy of state.
struct GatedMixParams {
  const void* state;      // [rows, C]
  const void* context;    // [Nt, C]
  const int32_t* text_rows;  // [Nt], distinct
  void* out;              // [rows, C], contiguous
  GateParams gate;
  int64_t rows, num_text, channels;
  int64_t state_row_stride, context_row_stride;
  DType dtype;
};

// Gradients of that for the gradient of `out`; nullptr: not asked for, as for an argument that the call did not have.
// Those of weight, bias and warm_up are sums over the text rows: each of num_blocks CTAs (on a CPU, runs of text rows)
// writes its share into a row of `partials`, C floats (none if grad_weight is not asked for) and, 4 and 3 before the row's
// end, those of bias and warm_up; a second kernel adds up the rows in a fixed order.
struct GatedMixBackwardParams {
  const void* grad;       // [rows, C]
  const void* state;      // [rows, C]
  const void* context;    // [Nt, C]
  const int32_t* text_rows;  // [Nt], distinct
  void* grad_state;       // [rows, C], contiguous
  void* grad_context;     // [Nt, C], contiguous
  void* grad_weight;      // [C], dtype gate.dtype
  void* grad_bias;        // [1], likewise
  void* grad_warm_up;     // [1], likewise
  void* grad_value;       // [Nt], dtype `value_dtype`
  float* partials;        // [num_blocks, partial_stride], 16-byte aligned; nullptr if no sum is asked for
  GateParams gate;
  int64_t rows, num_text, channels;
  int64_t grad_row_stride, state_row_stride, context_row_stride;
  int64_t partial_stride; // a multiple of 4
  int32_t num_blocks;
  DType value_dtype, dtype;
};

// Attention over the tokens of a and of b from attention over each. lse -inf: no token, and a context of any content.
struct MergeParams {
  const void* context_a;  // [Nt, Hq, D]
  const float* lse_a;     // [Nt, Hq], natural log
  const void* context_b;
  const float* lse_b;
  void* context;          // [Nt, Hq, D], contiguous
  float* lse;             // [Nt, Hq], contiguous
  int64_t num_text;
  int64_t a_row_stride, a_head_stride, b_row_stride, b_head_stride;
  int64_t lse_a_row_stride, lse_b_row_stride;
  int32_t num_heads, head_dim;
  DType dtype;            // of the contexts
};

// One pass over the vision features. Work is the table of slowfast_kernels/pool_plan.py:
//   items   [num_items, 8]   entry_begin, entry_count, fast_base (-1: no fast token), pool_stride,
//                            slow_h, slow_w, fast_h, fast_w
//   entries [num_entries, 2] frame, slow_base (-1: another item writes this frame's slow tokens)
// An item owns the slow cells of its frames: cell (i, j) covers spatial_stride^2 slow tokens of each frame,
// writes them (normalised if norm_eps >= 0), and, where i < fast_h and j < fast_w, their mean as one fast token.
struct PoolParams {
  const void* frames;     // [F, H * W, C]
  const int32_t* items;
  const int32_t* entries;
  void* slow;             // [Ns, C], contiguous
  void* fast;             // [Nf, C], contiguous
  int64_t frame_stride, token_stride;
  int64_t channels;
  int32_t grid_w;         // W of the input grid: token (y, x) of a frame is row y * grid_w + x
  int32_t spatial_stride;
  int32_t num_items;
  int32_t max_cells_h, max_cells_w;   // over items: ceil(slow_h / spatial_stride), likewise w
  float norm_eps;         // < 0: slow tokens are not normalised
  DType dtype;
};

// Gradient of the slow and fast tokens' gradients with respect to the frames. Work is by frames, and so is the table:
//   frame_table [F, 8] first_window, num_windows, slow_base, pool_stride, slow_h, slow_w, fast_h, fast_w
//   windows     [m, 2] fast_base, num_frames: of the windows that a frame is in, one after the other
// Every feature is written once: a slow token's gradient and the fast ones' that it is averaged into, or 0.
struct PoolBackwardParams {
  const void* frames;     // [F, H * W, C], read if norm_eps >= 0
  const int32_t* frame_table;
  const int32_t* windows;
  const void* grad_slow;  // [Ns, C], or nullptr: 0
  const void* grad_fast;  // [Nf, C], or nullptr: 0
  void* grad_frames;      // [F, H * W, C], contiguous
  int64_t frame_stride, token_stride;
  int64_t slow_row_stride, fast_row_stride;
  int64_t num_frames, channels;
  int32_t grid_h, grid_w;
  int32_t spatial_stride;
  int32_t max_cells_h, max_cells_w;   // over frames: ceil(grid_h / pool_stride), likewise w
  float norm_eps;         // < 0: slow tokens were not normalised
  DType dtype;
};

}  // namespace slowfast
