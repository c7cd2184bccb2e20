// The range of slow tokens that a text row sees, and what lanes of a warp know together.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../../params.h"

namespace slowfast::cuda {

constexpr int kNoToken = INT32_MAX;

__device__ __forceinline__ int min_of_warp(int x) { return __reduce_min_sync(0xffffffffu, x); }
__device__ __forceinline__ int max_of_warp(int x) { return __reduce_max_sync(0xffffffffu, x); }

__device__ __forceinline__ int inclusive_sum_of_warp(int x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// The tokens that text row `text` of the call sees, of the `length` that there are; begin >= end: none.
struct Range {
  int begin, end;

  __device__ __forceinline__ int length() const { return max(0, end - begin); }
};
__device__ __forceinline__ Range range_of(const CrossAttentionParams& p, int64_t text, int length) {
  return {p.slow_begin == nullptr ? 0 : max(0, __ldg(p.slow_begin + text)),
          p.slow_end == nullptr ? length : min(length, __ldg(p.slow_end + text))};
}

}  // namespace slowfast::cuda
