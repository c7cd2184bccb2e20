// One level's table of kernels. setup.py compiles this file once a level, with SLOWFAST_ISA naming it; picking the
// tile shape for a unit and the element type for a call happens here, at run time.
#include "attention.h"
#include "merge.h"
#include "mix.h"
#include "pool.h"

namespace slowfast::cpu {
namespace {

// f(tile) with the smallest tile that holds the rows: R vectors of rows, or one vector shared W ways.
template <class Ops, class T>
void run_attention(const CrossAttentionParams& p, const AttentionUnit& unit, const Partials& partials, float* scratch) {
  const int64_t rows = unit.row_end - unit.row_begin;
  if (rows > 2 * kLanes) return AttentionTile<Ops, T, 3, 1>(p, unit, partials).run(scratch);
  if (rows > kLanes) return AttentionTile<Ops, T, 2, 1>(p, unit, partials).run(scratch);
  if (rows > kLanes / 2) return AttentionTile<Ops, T, 1, 1>(p, unit, partials).run(scratch);
  if (rows > kLanes / 4) return AttentionTile<Ops, T, 1, 2>(p, unit, partials).run(scratch);
  if constexpr (kLanes >= 8) {
    if (rows > kLanes / 8) return AttentionTile<Ops, T, 1, 4>(p, unit, partials).run(scratch);
  }
  if constexpr (kLanes >= 16) {
    if (rows > kLanes / 16) return AttentionTile<Ops, T, 1, 8>(p, unit, partials).run(scratch);
  }
  AttentionTile<Ops, T, 1, kLanes>(p, unit, partials).run(scratch);
}

void attention(const CrossAttentionParams& p, const AttentionUnit& unit, const Partials& partials, float* scratch) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16) return run_attention<PairOps, BF16>(p, unit, partials, scratch);
#endif
  with_type(p.dtype, [&](auto tag) {
    run_attention<FloatOps, element_type<decltype(tag)>>(p, unit, partials, scratch);
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
void combine_splits(const CrossAttentionParams& p, const Partials& partials, int64_t i, float* row) {
  const int64_t dim = p.head_dim, begin = partials.first[i], end = partials.first[i + 1];
  std::memset(row, 0, p.num_q_heads * dim * sizeof(float));
  for (int64_t h = 0; h < p.num_q_heads; ++h, row += dim) {
    const float* lse2 = partials.lse2 + h;
    float top = -__builtin_inff(), total = 0.f;
    for (int64_t s = begin; s < end; ++s) top = lse2[s * p.num_q_heads] > top ? lse2[s * p.num_q_heads] : top;
    for (int64_t s = begin; s < end; ++s) {
      const float lse = lse2[s * p.num_q_heads];
      if (lse == -__builtin_inff()) continue;   // a split of which the row sees no token
      const float weight = __builtin_exp2f(lse - top);
      const float* from = partials.context + (s * p.num_q_heads + h) * dim;
      total += weight;
      for (int64_t d = 0; d < dim; ++d) row[d] += weight * from[d];
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    for (int64_t d = 0; d < dim; ++d) row[d] *= inverse;
    if (p.lse != nullptr) p.lse[i * p.num_q_heads + h] = (top + __builtin_log2f(total)) * 0.693147180559945f;
  }
}

// Context 0, lse -inf, and the state as it is.
template <class T>
void finish_blind_row(const CrossAttentionParams& p, int64_t i) {
  const int64_t channels = int64_t(p.num_q_heads) * p.head_dim;
  if (p.context != nullptr) std::memset(static_cast<T*>(p.context) + i * channels, 0, channels * sizeof(T));
  for (int64_t h = 0; p.lse != nullptr && h < p.num_q_heads; ++h) p.lse[i * p.num_q_heads + h] = -__builtin_inff();
  if (p.state == nullptr) return;
  const int64_t row = p.text_rows[i];
  std::memcpy(static_cast<T*>(p.out) + row * channels, static_cast<const T*>(p.state) + row * p.state_row_stride,
              channels * sizeof(T));
}

void finish_row(const CrossAttentionParams& p, const Partials& partials, int64_t i, float* scratch) {
  const int64_t channels = int64_t(p.num_q_heads) * p.head_dim;
  const bool blind = partials.first[i] == partials.first[i + 1];
  if (!blind) combine_splits(p, partials, i, scratch);
  with_type(p.dtype, [&](auto tag) {
    using T = element_type<decltype(tag)>;
    if (blind) return finish_blind_row<T>(p, i);
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

void merge_row(const MergeParams& p, int64_t row) {
  with_type(p.dtype, [&](auto tag) { merge_row_of<element_type<decltype(tag)>>(p, row); });
}

void pool_cells(const PoolParams& p, int32_t item, int32_t cell_row, float* scratch) {
  with_type(p.dtype, [&](auto tag) { pool_cells_of<element_type<decltype(tag)>>(p, item, cell_row, scratch); });
}

}  // namespace

#define SLOWFAST_STRING(x) #x
#define SLOWFAST_NAME(x) SLOWFAST_STRING(x)

static_assert(3 * kLanes <= kMaxRows);

namespace SLOWFAST_ISA {
extern const Kernels kKernels;
const Kernels kKernels = {SLOWFAST_NAME(SLOWFAST_ISA),
                          3 * kLanes,
                          kLanes,
                          attention_scratch,
                          attention,
                          finish_row,
                          mix_row,
                          merge_row,
                          pool_cells,
                          &kBackwardKernels};
}  // namespace SLOWFAST_ISA

}  // namespace slowfast::cpu
