// One level's table of kernels. setup.py compiles this file once a level, with SLOWFAST_ISA naming it; picking the
// tile shape for a unit and the element type for a call happens here, at run time.
#include "attention.h"
#include "mix.h"
#include "pool.h"

namespace slowfast::cpu {
namespace {

// f(tile) with the smallest tile that holds the rows: R vectors of rows, or one vector shared W ways.
template <class Ops, class T>
void run_attention(const CrossAttentionParams& p, const AttentionUnit& unit, float* scratch) {
  const int64_t rows = unit.row_end - unit.row_begin;
  if (rows > 2 * kLanes) return AttentionTile<Ops, T, 3, 1>(p, unit).run(scratch);
  if (rows > kLanes) return AttentionTile<Ops, T, 2, 1>(p, unit).run(scratch);
  if (rows > kLanes / 2) return AttentionTile<Ops, T, 1, 1>(p, unit).run(scratch);
  if (rows > kLanes / 4) return AttentionTile<Ops, T, 1, 2>(p, unit).run(scratch);
  if constexpr (kLanes >= 8) {
    if (rows > kLanes / 8) return AttentionTile<Ops, T, 1, 4>(p, unit).run(scratch);
  }
  if constexpr (kLanes >= 16) {
    if (rows > kLanes / 16) return AttentionTile<Ops, T, 1, 8>(p, unit).run(scratch);
  }
  AttentionTile<Ops, T, 1, kLanes>(p, unit).run(scratch);
}

void attention(const CrossAttentionParams& p, const AttentionUnit& unit, float* scratch) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16) return run_attention<PairOps, BF16>(p, unit, scratch);
#endif
  with_type(p.dtype, [&](auto tag) {
    run_attention<FloatOps, element_type<decltype(tag)>>(p, unit, scratch);
  });
}

// Enough for every tile shape: several KV heads share a unit only where one vector of rows is enough.
int64_t attention_scratch(const CrossAttentionParams& p) {
  const Layout<FloatOps, 3, 1> tall(p.head_dim);
  const Layout<FloatOps, 1, 1> flat(p.head_dim);
  const Layout<FloatOps, 1, kLanes> wide(p.head_dim);
  const int64_t heads = p.num_kv_heads, tiles = tall.tiles() + wide.tiles();
  const int64_t one = flat.state() > wide.state() ? flat.state() : wide.state();
  return tiles + (tall.state() > heads * one ? tall.state() : heads * one);
}

// Splits are added in their order, so the same input gives the same bits whatever thread did which split.
void combine_splits(const CrossAttentionParams& p, const float* context, const float* lse2, int64_t i, float* row) {
  const int64_t dim = p.head_dim, plane = p.num_text * p.num_q_heads;
  std::memset(row, 0, p.num_q_heads * dim * sizeof(float));
  for (int64_t h = 0; h < p.num_q_heads; ++h, row += dim) {
    const int64_t at = i * p.num_q_heads + h;
    float top = lse2[at], total = 0.f;
    for (int s = 1; s < p.num_splits; ++s) top = lse2[s * plane + at] > top ? lse2[s * plane + at] : top;
    for (int s = 0; s < p.num_splits; ++s) {
      const float lse = lse2[s * plane + at];
      if (lse == -__builtin_inff()) continue;   // a split without a token: its context was never written
      const float weight = __builtin_exp2f(lse - top);
      const float* from = context + (s * plane + at) * dim;
      total += weight;
      for (int64_t d = 0; d < dim; ++d) row[d] += weight * from[d];
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    for (int64_t d = 0; d < dim; ++d) row[d] *= inverse;
    if (p.lse != nullptr) p.lse[at] = (top + __builtin_log2f(total)) * 0.693147180559945f;
  }
}

void finish_row(const CrossAttentionParams& p, const float* context, const float* lse2, int64_t i, float* scratch) {
  const int64_t channels = int64_t(p.num_q_heads) * p.head_dim;
  combine_splits(p, context, lse2, i, scratch);
  with_type(p.dtype, [&](auto tag) {
    using T = element_type<decltype(tag)>;
    if (p.context != nullptr) convert_row(scratch, static_cast<T*>(p.context) + i * channels, channels);
    if (p.state != nullptr) {
      const int64_t row = p.text_rows[i];
      const T* state = static_cast<const T*>(p.state) + row * p.state_row_stride;
      mix(state, scratch, gate_of(state, p.gate, i, channels), static_cast<T*>(p.out) + row * channels, channels);
    }
  });
}

void mix_row(const GatedMixParams& p, int64_t row, int64_t i) {
  with_type(p.dtype, [&](auto tag) {
    using T = element_type<decltype(tag)>;
    const T* state = static_cast<const T*>(p.state) + row * p.state_row_stride;
    T* out = static_cast<T*>(p.out) + row * p.channels;
    if (i < 0) {
      std::memcpy(out, state, p.channels * sizeof(T));
      return;
    }
    const T* context = static_cast<const T*>(p.context) + i * p.context_row_stride;
    mix(state, context, gate_of(state, p.gate, i, p.channels), out, p.channels);
  });
}

void pool_cells(const PoolParams& p, int32_t item, int32_t cell_row, float* scratch) {
  with_type(p.dtype, [&](auto tag) { pool_cells_of<element_type<decltype(tag)>>(p, item, cell_row, scratch); });
}

}  // namespace

#define SLOWFAST_STRING(x) #x
#define SLOWFAST_NAME(x) SLOWFAST_STRING(x)

namespace SLOWFAST_ISA {
extern const Kernels kKernels;
const Kernels kKernels = {SLOWFAST_NAME(SLOWFAST_ISA), 3 * kLanes, kLanes,    attention_scratch, attention,
                          finish_row,                  mix_row,    pool_cells};
}  // namespace SLOWFAST_ISA

}  // namespace slowfast::cpu
