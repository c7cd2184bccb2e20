// Two contexts over disjoint tokens become the one over all of them, weighed by their log-sum-exps.
//
// Roofline: memory, 3 * Nt * Hq * D elements. A warp takes one head of one text row: its lanes load both sides 16 bytes at
// a time where addresses allow, and the weights come from two floats that every lane reads.
#include <algorithm>

#include "common/check.h"
#include "common/dtype.cuh"
#include "common/launchers.h"

namespace slowfast::cuda {
namespace {

constexpr int kThreads = 256;

struct Shares {
  float a, b;   // of the probability; 0 on a side without tokens
};

// Where one side has no share, the other's bits: also the sign of a zero, and nothing of what the empty side holds.
__device__ __forceinline__ float mixed(float a, float b, const Shares& share) {
  if (share.b == 0.f) return share.a == 0.f ? 0.f : a;
  if (share.a == 0.f) return b;
  return share.a * a + share.b * b;
}

__device__ __forceinline__ float log_add_exp(float x, float y) {
  if (x == y && isinf(x)) return x;
  const float low = x < y ? x : y, high = x < y ? y : x;   // a NaN is in one of them
  return high + log1pf(expf(low - high));
}

// Of the difference alone: the sum of both is rounded by more the larger they are.
__device__ __forceinline__ float share_of(float lse, float other) {
  return lse == -INFINITY ? 0.f : 1.f / (1.f + expf(other - lse));
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams p) {
  constexpr int kWidth = kVectors ? kVectorSize<T> : 1;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32; i < p.num_text * p.num_heads; i += warps) {
    const int64_t row = i / p.num_heads, head = i % p.num_heads;
    const float lse_a = p.lse_a[row * p.lse_a_row_stride + head], lse_b = p.lse_b[row * p.lse_b_row_stride + head];
    const float total = log_add_exp(lse_a, lse_b);
    const Shares share = {share_of(lse_a, lse_b), share_of(lse_b, lse_a)};
    const T* a = static_cast<const T*>(p.context_a) + row * p.a_row_stride + head * p.a_head_stride;
    const T* b = static_cast<const T*>(p.context_b) + row * p.b_row_stride + head * p.b_head_stride;
    T* out = static_cast<T*>(p.context) + i * p.head_dim;
    for (int d = threadIdx.x % 32 * kWidth; d < p.head_dim; d += 32 * kWidth) {
      if constexpr (kVectors) {
        float x[kWidth], y[kWidth];
        unpack<T>(*reinterpret_cast<const uint4*>(a + d), x);
        unpack<T>(*reinterpret_cast<const uint4*>(b + d), y);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[j] = mixed(x[j], y[j], share);
        *reinterpret_cast<uint4*>(out + d) = pack<T>(x);
      } else {
        out[d] = from_float<T>(mixed(to_float(a[d]), to_float(b[d]), share));
      }
    }
    if (threadIdx.x % 32 == 0) p.lse[i] = total;
  }
}

template <typename T>
bool takes_vectors(const MergeParams& p) {
  const auto whole = [](int64_t x) { return x % kVectorSize<T> == 0; };
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0; };
  return whole(p.head_dim) && whole(p.a_row_stride) && whole(p.a_head_stride) && whole(p.b_row_stride) &&
         whole(p.b_head_stride) && aligned(p.context_a) && aligned(p.context_b) && aligned(p.context);
}

}  // namespace

void merge(const MergeParams& p, void* stream) {
  const int64_t heads = p.num_text * p.num_heads;
  if (heads == 0) return;
  const int64_t blocks = std::min<int64_t>((heads * 32 + kThreads - 1) / kThreads, 65535);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* kernel = takes_vectors<T>(p) ? merge_kernel<T, true> : merge_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("merge");
}

}  // namespace slowfast::cuda
