// Backward pass of gate and mix for a block of text rows.
//
// Roofline: memory. A row of state, context and grad is read once and stays in L1 for what is made of it; the weight's
// gradient, a sum over rows, grows in a row of `partials` that the block keeps in L1 too.
#pragma once
#include "mix.h"
#include "pool.h"

namespace slowfast::cpu {
namespace {

// Of the activated value, not of its argument.
inline float slope_of(GateKind kind, float act) {
  switch (kind) {
    case GateKind::kTanh: return 1.0f - act * act;
    case GateKind::kSigmoid: return act * (1.0f - act);
    case GateKind::kLinear: return 1.0f;
    case GateKind::kNone: case GateKind::kGiven: break;   // their activation has no argument
  }
  return 0.0f;
}

// total += factor * row
template <class T>
void add_scaled(const T* row, float factor, float* total, int64_t count) {
  const Vec all = splat(factor);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(total + c, fma(all, load(row + c), load(total + c)));
  for (; c < count; ++c) total[c] += factor * to_float(row[c]);
}

// S: of state, context and grad; W: of the gate's parameters.
template <class S, class W>
void mix_backward_rows(const GatedMixBackwardParams& p, int64_t begin, int64_t end, float* partial) {
  const GateParams& gate = p.gate;
  const float factor = warm_up_factor<W>(gate);
  const bool is_weighted = gate.weight != nullptr;
  const bool wants_state = p.grad_state != nullptr;
  const bool wants_pre = is_weighted && (wants_state || p.grad_weight != nullptr || p.grad_bias != nullptr);
  const bool wants_gate = wants_pre || p.grad_warm_up != nullptr || p.grad_value != nullptr;
  const bool wants_act = wants_pre || p.grad_warm_up != nullptr || p.grad_context != nullptr;
  double bias = 0.0, warm_up = 0.0;   // terms of either sign: what is left of them may be small
  if (p.grad_weight != nullptr) std::memset(partial, 0, p.channels * sizeof(float));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.text_rows[i];
    const S* state = static_cast<const S*>(p.state) + row * p.state_row_stride;
    const S* grad = static_cast<const S*>(p.grad) + row * p.grad_row_stride;
    const S* context = static_cast<const S*>(p.context) + i * p.context_row_stride;
    const float act = wants_act ? activated_with<S, W>(state, gate, i, p.channels) : 0.0f;
    const float grad_gate = wants_gate ? dot(grad, context, p.channels) : 0.0f;
    const float grad_act = grad_gate * factor, grad_pre = grad_act * slope_of(gate.kind, act);
    bias += grad_pre;
    warm_up += grad_gate * act;
    if (wants_state) {
      S* to = static_cast<S*>(p.grad_state) + row * p.channels;
      if (is_weighted) mix(grad, static_cast<const W*>(gate.weight), grad_pre, to, p.channels);
      else std::memcpy(to, grad, p.channels * sizeof(S));
    }
    if (p.grad_context != nullptr) {
      write_scaled(grad, act * factor, static_cast<S*>(p.grad_context) + i * p.channels, p.channels);
    }
    if (p.grad_weight != nullptr) add_scaled(state, grad_pre, partial, p.channels);
    if (p.grad_value == nullptr) continue;
    if (p.value_dtype == DType::kFloat32) static_cast<float*>(p.grad_value)[i] = grad_act;
    else from_float(grad_act, static_cast<S*>(p.grad_value) + i);
  }
  if (partial == nullptr) return;
  partial[p.partial_stride - 4] = float(bias);
  partial[p.partial_stride - 3] = float(warm_up) * (gate.tanh_warm_up ? 1.0f - factor * factor : 1.0f);
}

// Sums over the partial rows, in their order, of `count` columns from `column` on.
template <class W>
void add_mix_partials(const GatedMixBackwardParams& p, int64_t column, int64_t count, W* to) {
  for (int64_t c = 0; c < count; ++c) {
    double sum = 0.0;
    for (int64_t block = 0; block < p.num_blocks; ++block) sum += p.partials[block * p.partial_stride + column + c];
    from_float(float(sum), to + c);
  }
}

}  // namespace
}  // namespace slowfast::cpu
