// Gate and mix of one row, shared by the fused attention and the mix alone.
#pragma once
#include "../kernels.h"
#include "simd.h"

#include <type_traits>

namespace slowfast::cpu {
namespace {

// Dot product in a fixed order: four running sums hide the latency of the addition.
template <class S, class W>
float dot(const S* state, const W* weight, int64_t count) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t c = 0;
  for (; c + 4 * kLanes <= count; c += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] = fma(load(state + c + i * kLanes), load(weight + c + i * kLanes), sums[i]);
  }
  for (; c + kLanes <= count; c += kLanes) sums[0] = fma(load(state + c), load(weight + c), sums[0]);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < count; ++c) total += to_float(state[c]) * to_float(weight[c]);
  return total;
}

static_assert(kNumGateKinds == 5, "a new kind of gate must be taught to activated_with and slope_of");

// Before the warm-up factor.
template <class S, class W>
float activated_with(const S* state, const GateParams& gate, int64_t text, int64_t count) {
  const auto weighted = [&] {
    return dot(state, static_cast<const W*>(gate.weight), count) + to_float(*static_cast<const W*>(gate.bias));
  };
  switch (gate.kind) {
    case GateKind::kTanh: return __builtin_tanhf(weighted());
    case GateKind::kLinear: return weighted();
    case GateKind::kSigmoid: return 1.0f / (1.0f + __builtin_expf(-weighted()));
    case GateKind::kNone: break;
    case GateKind::kGiven: return gate.value[text];
  }
  return 1.0f;
}

template <class W>
float warm_up_factor(const GateParams& gate) {
  if (gate.warm_up == nullptr) return 1.0f;
  const float warm_up = to_float(*static_cast<const W*>(gate.warm_up));
  return gate.tanh_warm_up ? __builtin_tanhf(warm_up) : warm_up;
}

template <class S, class W>
float gate_with(const S* state, const GateParams& gate, int64_t text, int64_t count) {
  return activated_with<S, W>(state, gate, text, count) * warm_up_factor<W>(gate);
}

// The gate of text row `text`, whose state is given. The gate's parameters have the state's dtype or float32.
template <class S>
float gate_of(const S* state, const GateParams& gate, int64_t text, int64_t count) {
  return gate.dtype == DType::kFloat32 ? gate_with<S, float>(state, gate, text, count)
                                       : gate_with<S, S>(state, gate, text, count);
}

// out = state + g * context
template <class S, class C>
void mix(const S* state, const C* context, float g, S* out, int64_t count) {
  const Vec factor = splat(g);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(out + c, fma(factor, load(context + c), load(state + c)));
  for (; c < count; ++c) from_float(to_float(state[c]) + g * to_float(context[c]), out + c);
}

template <class S>
void convert_row(const float* from, S* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(from + c));
  for (; c < count; ++c) from_float(from[c], to + c);
}

template <class Tag> using element_type = std::remove_const_t<std::remove_pointer_t<Tag>>;

// f(tag), whose tag is a null pointer to the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<const BF16*>(nullptr));
    case DType::kFloat16: return f(static_cast<const F16*>(nullptr));
  }
}

}  // namespace
}  // namespace slowfast::cpu
