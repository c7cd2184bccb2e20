// One text row of merge_attention. Bytes bound: three contexts pass the memory once.
#pragma once
#include "mix.h"

namespace slowfast::cpu {
namespace {

inline float log_add_exp(float a, float b) {
  if (a == b && __builtin_isinf(a)) return a;
  return (a > b ? a : b) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(a - b)));
}

// A side's share of the probability. 0 of a side without tokens, whose context may be anything. From the difference: a
// large sum of both would be rounded by more than the share may be.
inline float share_of(float lse, float other) {
  return lse == -__builtin_inff() ? 0.f : 1.f / (1.f + __builtin_expf(other - lse));
}

template <class T>
void merge_head(const T* a, float share_a, const T* b, float share_b, T* out, int64_t count) {
  const Vec weight_a = splat(share_a), weight_b = splat(share_b);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(out + d, fma(weight_a, load(a + d), weight_b * load(b + d)));
  for (; d < count; ++d) from_float(share_a * to_float(a[d]) + share_b * to_float(b[d]), out + d);
}

template <class T>
void merge_row_of(const MergeParams& p, int64_t row) {
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const T* a = static_cast<const T*>(p.context_a) + row * p.a_row_stride + head * p.a_head_stride;
    const T* b = static_cast<const T*>(p.context_b) + row * p.b_row_stride + head * p.b_head_stride;
    const int64_t at = row * p.num_heads + head;
    T* out = static_cast<T*>(p.context) + at * p.head_dim;
    const float lse_a = p.lse_a[row * p.lse_a_row_stride + head], lse_b = p.lse_b[row * p.lse_b_row_stride + head];
    const float share_a = share_of(lse_a, lse_b), share_b = share_of(lse_b, lse_a);
    p.lse[at] = log_add_exp(lse_a, lse_b);
    if (share_a == 0.f && share_b == 0.f) std::memset(out, 0, p.head_dim * sizeof(T));
    else if (share_a == 0.f || share_b == 0.f) std::memcpy(out, share_a == 0.f ? b : a, p.head_dim * sizeof(T));
    else merge_head(a, share_a, b, share_b, out, p.head_dim);
  }
}

}  // namespace
}  // namespace slowfast::cpu
