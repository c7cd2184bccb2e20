// A block of threads over rows of channels: thread t has vectors t, t + blockDim.x, ... of every row.
#pragma once
#include "dtype.cuh"

namespace slowfast::cuda {

constexpr int kMaxRowThreads = 512;

// Two blocks a multiprocessor where a thread's channels leave it the registers.
constexpr int min_blocks(int channels_per_thread) { return channels_per_thread <= 8 ? 2 : 1; }

// Whole warps, of which each thread has kVectors vectors of a row of `channels`.
template <typename T, int kVectors>
int row_threads(int64_t channels) {
  constexpr int kChannels = kVectors * kVectorSize<T> * 32;  // of a warp
  return static_cast<int>((channels + kChannels - 1) / kChannels) * 32;
}

}  // namespace slowfast::cuda
