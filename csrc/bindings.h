// Integers from Python into the Params structs, once for the CPU and the CUDA functions of slowfast_kernels._C.
// Tensors arrive as addresses and strides in elements. Each `*_binding<Rest...>(run)` is the function that Python calls:
// the op's own arguments, then those of one backend, which `run(params, rest...)` gets.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "params.h"

namespace slowfast {

using Address = uintptr_t;  // 0 is nullptr

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline GateParams gate_params(Address weight, Address bias, Address warm_up, Address value, int dtype, int kind,
                              bool tanh_warm_up) {
  if (kind < 0 || kind >= kNumGateKinds) throw std::invalid_argument("gate: a kind that this build does not know");
  return {pointer(weight),           pointer(bias),
          pointer(warm_up),          pointer<float>(value),
          static_cast<DType>(dtype), static_cast<GateKind>(kind),
          tanh_warm_up};
}

template <class... Rest, class Run>
auto attention_binding(Run run) {
  return [run](Address q, Address slow_kv, Address cu_slow, Address text_rows, Address cu_text, Address context,
               Address lse, Address state, Address out, Address weight, Address bias, Address warm_up, Address value,
               int gate_dtype, int gate_kind, bool tanh_warm_up, int64_t q_row_stride, int64_t q_head_stride,
               int64_t kv_token_stride, int64_t kv_head_stride, int64_t kv_pair_stride, int64_t state_row_stride,
               int64_t num_text, int64_t num_slow, int32_t batch, int32_t num_q_heads, int32_t num_kv_heads,
               int32_t head_dim, float softmax_scale, int dtype, Rest... rest) {
    CrossAttentionParams p;
    p.q = pointer(q);
    p.slow_kv = pointer(slow_kv);
    p.cu_slow = pointer<int32_t>(cu_slow);
    p.text_rows = pointer<int32_t>(text_rows);
    p.cu_text = pointer<int32_t>(cu_text);
    p.context = pointer(context);
    p.lse = pointer<float>(lse);
    p.state = pointer(state);
    p.out = pointer(out);
    p.gate = gate_params(weight, bias, warm_up, value, gate_dtype, gate_kind, tanh_warm_up);
    p.q_row_stride = q_row_stride;
    p.q_head_stride = q_head_stride;
    p.kv_token_stride = kv_token_stride;
    p.kv_head_stride = kv_head_stride;
    p.kv_pair_stride = kv_pair_stride;
    p.state_row_stride = state_row_stride;
    p.num_text = num_text;
    p.num_slow = num_slow;
    p.batch = batch;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = num_kv_heads;
    p.head_dim = head_dim;
    p.num_splits = 1;  // `run` knows better
    p.softmax_scale = softmax_scale;
    p.dtype = static_cast<DType>(dtype);
    run(p, rest...);
  };
}

template <class... Rest, class Run>
auto gated_mix_binding(Run run) {
  return [run](Address state, Address context, Address text_rows, Address out, Address weight, Address bias,
               Address warm_up, Address value, int gate_dtype, int gate_kind, bool tanh_warm_up, int64_t rows,
               int64_t num_text, int64_t channels, int64_t state_row_stride, int64_t context_row_stride, int dtype,
               Rest... rest) {
    GatedMixParams p;
    p.state = pointer(state);
    p.context = pointer(context);
    p.text_rows = pointer<int32_t>(text_rows);
    p.out = pointer(out);
    p.gate = gate_params(weight, bias, warm_up, value, gate_dtype, gate_kind, tanh_warm_up);
    p.rows = rows;
    p.num_text = num_text;
    p.channels = channels;
    p.state_row_stride = state_row_stride;
    p.context_row_stride = context_row_stride;
    p.dtype = static_cast<DType>(dtype);
    run(p, rest...);
  };
}

template <class... Rest, class Run>
auto pool_binding(Run run) {
  return [run](Address frames, Address items, Address entries, Address slow, Address fast, int64_t frame_stride,
               int64_t token_stride, int64_t channels, int32_t grid_w, int32_t spatial_stride, int32_t num_items,
               int32_t max_cells_h, int32_t max_cells_w, float norm_eps, int dtype, Rest... rest) {
    PoolParams p;
    p.frames = pointer(frames);
    p.items = pointer<int32_t>(items);
    p.entries = pointer<int32_t>(entries);
    p.slow = pointer(slow);
    p.fast = pointer(fast);
    p.frame_stride = frame_stride;
    p.token_stride = token_stride;
    p.channels = channels;
    p.grid_w = grid_w;
    p.spatial_stride = spatial_stride;
    p.num_items = num_items;
    p.max_cells_h = max_cells_h;
    p.max_cells_w = max_cells_w;
    p.norm_eps = norm_eps;
    p.dtype = static_cast<DType>(dtype);
    run(p, rest...);
  };
}

}  // namespace slowfast
