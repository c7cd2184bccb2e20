// One level's table of backward kernels, compiled as kernels.cpp is.
#include "attention_backward.h"
#include "mix_backward.h"
#include "pool_backward.h"

namespace slowfast::cpu {
namespace {

// f(ops, tag): the products' kind and, as with_type, the element type.
template <class F>
void with_ops(DType dtype, F f) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return f(PairOps(), static_cast<const BF16*>(nullptr));
#endif
  with_type(dtype, [&](auto tag) { f(FloatOps(), tag); });
}

int64_t row_floats(const CrossAttentionParams& p) {
  int64_t floats = 0;
  with_ops(p.dtype, [&](auto ops, auto) { floats = BackwardLayout<decltype(ops)>(p).dense; });
  return floats;
}

int64_t attention_scratch(const CrossAttentionParams& p) {
  int64_t floats = 0;
  with_ops(p.dtype, [&](auto ops, auto) { floats = BackwardLayout<decltype(ops)>(p).floats(); });
  return floats;
}

void attention(const CrossAttentionBackwardParams& b, const BackwardUnit& unit, const float* delta, float* scratch) {
  with_ops(b.forward.dtype, [&](auto ops, auto tag) {
    BackwardTile<decltype(ops), element_type<decltype(tag)>>(b, unit, delta, scratch).run();
  });
}

// What dS subtracts from dP: rowsum(P dP), which is dO . O. The context has been rounded to its dtype, which counts where
// a row sees few tokens: the sum over these is formed again. The gradient of lse counts like one of all scores, negated.
void delta_row(const CrossAttentionBackwardParams& b, int64_t i, const FewTokens& tokens, float* delta) {
  const CrossAttentionParams& p = b.forward;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  with_type(p.dtype, [&](auto tag) {
    using T = element_type<decltype(tag)>;
    for (int64_t h = 0; h < p.num_q_heads; ++h) {
      const int64_t at = i * p.num_q_heads + h;
      const T* grad = static_cast<const T*>(b.grad_context) + i * b.grad_context_row_stride +
                      h * b.grad_context_head_stride;
      const T* query = static_cast<const T*>(p.q) + p.text_rows[i] * p.q_row_stride + h * p.q_head_stride;
      float sum = 0.0f, total = 0.0f;
      for (int64_t t = 0; t < tokens.count; ++t) {
        const T* key = static_cast<const T*>(p.keys) + tokens.token[t] * p.k_token_stride + h / group * p.k_head_stride;
        const T* value =
            static_cast<const T*>(p.values) + tokens.token[t] * p.v_token_stride + h / group * p.v_head_stride;
        const float prob = __builtin_expf(dot(query, key, p.head_dim) * p.softmax_scale - p.lse[at]);
        sum += prob * dot(grad, value, p.head_dim);
        total += prob;   // 1, but for the rounding of lse
      }
      if (tokens.count > 0) sum /= total;
      else sum = dot(grad, static_cast<const T*>(p.context) + at * p.head_dim, p.head_dim);
      if (b.grad_lse != nullptr) sum -= b.grad_lse[i * b.grad_lse_row_stride + h * b.grad_lse_head_stride];
      delta[at] = sum;
    }
  });
}

void add_partials(const CrossAttentionBackwardParams& b, const float* const* partials, int64_t count, void* grad_q) {
  const CrossAttentionParams& p = b.forward;
  const float scale = p.softmax_scale;
  with_type(p.dtype, [&](auto tag) {
    auto* to = static_cast<element_type<decltype(tag)>*>(grad_q);
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) {
      Vec sum = load(partials[0] + d);
      for (int64_t i = 1; i < count; ++i) sum = sum + load(partials[i] + d);
      store(to + d, sum * scale);
    }
    for (; d < p.head_dim; ++d) {
      float sum = partials[0][d];
      for (int64_t i = 1; i < count; ++i) sum += partials[i][d];
      from_float(sum * scale, to + d);
    }
  });
}

// f(state tag, gate tag): the gate's parameters have the state's type or float32.
template <class F>
void with_types(const GatedMixBackwardParams& p, F f) {
  with_type(p.dtype, [&](auto state) {
    if (p.gate.dtype == DType::kFloat32) f(state, static_cast<const float*>(nullptr));
    else f(state, state);
  });
}

void mix_rows(const GatedMixBackwardParams& p, int64_t begin, int64_t end, float* partial) {
  with_types(p, [&](auto state, auto gate) {
    mix_backward_rows<element_type<decltype(state)>, element_type<decltype(gate)>>(p, begin, end, partial);
  });
}

void mix_sums(const GatedMixBackwardParams& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto, auto gate) {
    using W = element_type<decltype(gate)>;
    if (p.grad_weight != nullptr) add_mix_partials(p, begin, end - begin, static_cast<W*>(p.grad_weight) + begin);
    if (begin > 0) return;
    if (p.grad_bias != nullptr) add_mix_partials(p, p.partial_stride - 4, 1, static_cast<W*>(p.grad_bias));
    if (p.grad_warm_up != nullptr) add_mix_partials(p, p.partial_stride - 3, 1, static_cast<W*>(p.grad_warm_up));
  });
}

void pool_cells(const PoolBackwardParams& p, int64_t frame, int32_t cell_row, float* scratch) {
  with_type(p.dtype, [&](auto tag) {
    pool_backward_cells_of<element_type<decltype(tag)>>(p, frame, cell_row, scratch);
  });
}

}  // namespace

namespace SLOWFAST_ISA {
extern const BackwardKernels kBackwardKernels;
const BackwardKernels kBackwardKernels = {row_floats, attention_scratch, attention, delta_row, add_partials,
                                          mix_rows,   mix_sums,          pool_cells};
}  // namespace SLOWFAST_ISA

}  // namespace slowfast::cpu
