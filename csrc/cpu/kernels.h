// What a compilation of csrc/cpu/isa offers to the drivers. The drivers own threads, work division and scratch; a
// kernel does one unit of work on one thread, so that this table is all that the instruction-set levels share.
#pragma once
#include "../params.h"

namespace slowfast::cpu {

// Slow tokens that a step of the online softmax takes at most; splits begin at multiples of it.
constexpr int64_t kTokenTile = 48;

// Rows of a unit at most, whatever the level.
constexpr int kMaxRows = 48;

struct Interval { int64_t begin, end; };   // of a sequence's slow tokens, by their places along its pieces

// From place `place` of a sequence on, up to the next run's, its slow tokens are token, token + 1, ... of the cache.
struct TokenRun { int64_t place, token; };

// Rows [row_begin, row_end) of a sequence against its tokens [tokens.begin, tokens.end) for KV heads
// [kv_head_begin, kv_head_end). Row = number in `texts` * group + query head within the group.
struct AttentionUnit {
  const int32_t* texts;            // the sequence's text rows that see a token, as indices into text_rows
  const TokenRun* runs;            // the sequence's, the last one empty and at its end,
  const TokenRun* runs_end;        // behind that
  int64_t row_begin, row_end;      // at most Kernels::max_attention_rows of them
  Interval tokens;
  int32_t kv_head_begin, kv_head_end;
  int64_t split;                   // the partial result of its text rows that it writes
};

// Text row i has the partial results first[i] .. first[i + 1] - 1, none if it sees nothing.
struct Partials {
  const int64_t* first;   // [Nt + 1]
  float* context;         // [partials, Hq, D], normalised
  float* lse2;            // [partials, Hq], base 2; -inf without a token
};

// ---- attention, backward

constexpr int64_t kBackwardTile = 64;   // slow tokens of a product, and
// of a block, whose K, V and gradients lie in a thread's scratch: half a MiB of L2.
constexpr int64_t backward_block(int64_t head_dim) {
  const int64_t tokens = 32768 / (head_dim < 64 ? 64 : head_dim) / kBackwardTile * kBackwardTile;
  return tokens < kBackwardTile ? kBackwardTile : tokens;
}

// A few slow tokens of the cache.
struct FewTokens {
  static constexpr int64_t kMost = 16;
  int64_t count, token[kMost];
};

// Tokens token, token + 1, ... of the cache, `count` of them, are at places place, place + 1, ... of a sequence.
struct TokenSpan { int64_t token, count, place; };

// Tokens of a sequence, none twice: a sequence that holds a token twice has several of these.
struct TokenSet {
  const TokenSpan* spans;          // by their tokens
  const TokenSpan* spans_end;
  const Interval* seen;            // places that some text row sees, in order, with gaps between
  const Interval* seen_end;
};

// Text rows against a sequence's tokens. Row = number in [texts, texts_end) * group + query head within the group.
struct BackwardUse {
  TokenSet tokens;
  const int32_t* texts;            // that see something, as indices into text_rows
  const int32_t* texts_end;
  int64_t length;                  // the sequence's slow tokens
  int64_t partial_row;             // where BackwardUnit::grad_q has the first row
};

// Tokens [tokens.begin, tokens.end) of the cache for one KV head, with all rows that see any.
struct BackwardUnit {
  Interval tokens;
  const BackwardUse* uses;
  const BackwardUse* uses_end;
  int32_t kv_head;
  bool keys, values;               // which gradients are wanted: both write all tokens,
  float* grad_q;                   // [partial_rows][BackwardKernels::row_floats], not scaled, or nullptr
  int64_t partial_rows;
};

struct BackwardKernels {
  int64_t (*row_floats)(const CrossAttentionParams&);          // of a row of BackwardUnit::grad_q
  int64_t (*attention_scratch)(const CrossAttentionParams&);   // floats a thread
  // delta [Nt, Hq]: what delta_row has made of each text row that sees something.
  void (*attention)(const CrossAttentionBackwardParams&, const BackwardUnit&, const float* delta, float* scratch);
  // tokens: see BackwardPlan::few_tokens.
  void (*delta_row)(const CrossAttentionBackwardParams&, int64_t i, const FewTokens& tokens, float* delta);
  // Adds up the partial sums of one head of a row, in their order, and scales them.
  void (*add_partials)(const CrossAttentionBackwardParams&, const float* const* partials, int64_t count, void* grad_q);
  // Text rows [begin, end), and their sums into a row of `partials`, or nullptr.
  void (*mix_rows)(const GatedMixBackwardParams&, int64_t begin, int64_t end, float* partial);
  // Adds up the partial rows, in their order: channels [begin, end) and, from begin 0, what is no channel's.
  void (*mix_sums)(const GatedMixBackwardParams&, int64_t begin, int64_t end);
  void (*pool_cells)(const PoolBackwardParams&, int64_t frame, int32_t cell_row, float* scratch);   // scratch: C floats
};

struct Kernels {
  const char* name;
  int max_attention_rows;   // of a unit
  int flat_rows;            // up to here a unit may take several KV heads
  int64_t (*attention_scratch)(const CrossAttentionParams&);   // floats a thread
  void (*attention)(const CrossAttentionParams&, const AttentionUnit&, const Partials&, float* scratch);
  // Combines the partials of text row `i`; writes its context, lse and, with `state` set, row of `out`. scratch: C.
  void (*finish_row)(const CrossAttentionParams&, const Partials&, int64_t i, float* scratch);
  void (*mix_row)(const GatedMixParams&, int64_t row, int64_t i);   // i: index of the text row, -1 copies the state
  void (*merge_row)(const MergeParams&, int64_t row);
  void (*pool_cells)(const PoolParams&, int32_t item, int32_t cell_row, float* scratch);   // scratch: 2 C floats
  const BackwardKernels* backward;
};

// The level in use.
const Kernels& kernels();

#define SLOWFAST_LEVEL(isa) \
  namespace isa { extern const Kernels kKernels; extern const BackwardKernels kBackwardKernels; }
SLOWFAST_LEVEL(plain)
SLOWFAST_LEVEL(avx2)
SLOWFAST_LEVEL(avx512)
SLOWFAST_LEVEL(avx512_bf16)
#undef SLOWFAST_LEVEL

}  // namespace slowfast::cpu
