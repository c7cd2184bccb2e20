// Sums over a warp and over a block, in a fixed order: the same input gives the same bits, and every thread gets them.
#pragma once
#include <cuda_runtime.h>

namespace slowfast::cuda {

// Over groups of kWidth neighbouring lanes.
template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// kCount sums at a time. One barrier each: two sets of partial sums take turns, so that a warp which is ahead writes the
// other set, and it cannot come back to the first before the barrier that every reader of the first has passed.
template <int kCount>
class BlockSums {
 public:
  static constexpr int kMaxWarps = 16;
  using Partials = float4[2][kCount][kMaxWarps / 4];

  __device__ explicit BlockSums(Partials& partials) : partials_(&partials[0][0][0]) {
    // Slots of warps that this block lacks stay 0; the barrier of the first sum publishes them.
    const int warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < 2 * kCount * kMaxWarps; i += blockDim.x) {
      if (i % kMaxWarps >= warps) reinterpret_cast<float*>(partials_)[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void operator()(float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = warp_sum(x[i]);
      if (threadIdx.x % 32 == 0) reinterpret_cast<float*>(partials_ + set_ + i * kParts)[threadIdx.x / 32] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const float4 part = partials_[set_ + i * kParts + j];
        total += (part.x + part.y) + (part.z + part.w);
      }
      x[i] = total;
    }
    set_ ^= kCount * kParts;
  }

 private:
  static constexpr int kParts = kMaxWarps / 4;
  float4* partials_;
  int set_ = 0;
};

class BlockSum {
 public:
  using Partials = BlockSums<1>::Partials;

  __device__ explicit BlockSum(Partials& partials) : sums_(partials) {}

  __device__ __forceinline__ float operator()(float x) {
    float sum[1] = {x};
    sums_(sum);
    return sum[0];
  }

 private:
  BlockSums<1> sums_;
};

}  // namespace slowfast::cuda
