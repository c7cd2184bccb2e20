// What a compilation of csrc/cpu/isa offers to the drivers. The drivers own threads, work division and scratch; a
// kernel does one unit of work on one thread, so that this table is all that the instruction-set levels share.
#pragma once
#include "../params.h"

namespace slowfast::cpu {

// Slow tokens that a step of the online softmax takes at most; splits begin at multiples of it.
constexpr int64_t kTokenTile = 48;

// Rows [row_begin, row_end) of a sequence against its tokens [token_begin, token_end) for KV heads
// [kv_head_begin, kv_head_end). Row = text row of the sequence * group + query head within the group.
struct AttentionUnit {
  int64_t text_begin;              // the sequence's first entry of text_rows
  int64_t row_begin, row_end;      // at most Kernels::max_attention_rows of them
  int64_t token_begin, token_end;
  int32_t kv_head_begin, kv_head_end;
  float* context;                  // [Nt, Hq, D] of this split, normalised
  float* lse2;                     // [Nt, Hq] of this split, base 2; -inf without a token
};

struct Kernels {
  const char* name;
  int max_attention_rows;   // of a unit
  int flat_rows;            // up to here a unit may take several KV heads
  int64_t (*attention_scratch)(const CrossAttentionParams&);   // floats a thread
  void (*attention)(const CrossAttentionParams&, const AttentionUnit&, float* scratch);
  // Combines the splits of text row `i`; writes its context, lse and, with `state` set, row of `out`. scratch: C.
  void (*finish_row)(const CrossAttentionParams&, const float* context, const float* lse2, int64_t i, float* scratch);
  void (*mix_row)(const GatedMixParams&, int64_t row, int64_t i);   // i: index of the text row, -1 copies the state
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
