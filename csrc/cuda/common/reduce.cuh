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

// One barrier a sum: two sets of partial sums take turns, so that a warp which is ahead writes the other set, and it
// cannot come back to the first before the barrier that every reader of the first has passed.
class BlockSum {
 public:
  static constexpr int kMaxWarps = 16;
  using Partials = float4[2][kMaxWarps / 4];

  __device__ explicit BlockSum(Partials& partials) : partials_(&partials[0][0]) {
    // Slots of warps that this block lacks stay 0; the barrier of the first sum publishes them.
    const int warps = blockDim.x / 32;
    if (threadIdx.x < 2 * kMaxWarps && threadIdx.x % kMaxWarps >= warps) {
      reinterpret_cast<float*>(partials_)[threadIdx.x] = 0.0f;
    }
  }

  __device__ __forceinline__ float operator()(float x) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) reinterpret_cast<float*>(partials_ + set_)[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxWarps / 4; ++i) {
      const float4 part = partials_[set_ + i];
      total += (part.x + part.y) + (part.z + part.w);
    }
    set_ ^= kMaxWarps / 4;
    return total;
  }

 private:
  float4* partials_;
  int set_ = 0;
};

}  // namespace slowfast::cuda
