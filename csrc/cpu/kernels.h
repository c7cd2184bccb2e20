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
};

// The level in use.
const Kernels& kernels();

#define SLOWFAST_LEVEL(isa) namespace isa { extern const Kernels kKernels; }
SLOWFAST_LEVEL(plain)
SLOWFAST_LEVEL(avx2)
SLOWFAST_LEVEL(avx512)
SLOWFAST_LEVEL(avx512_bf16)
#undef SLOWFAST_LEVEL

}  // namespace slowfast::cpu
