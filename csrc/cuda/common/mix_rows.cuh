// What the mix and its backward pass share: which rows a block takes, and the gate's weight in registers.
// Which rows are text rows is device data: each block looks for its own rows in text_rows (a few KB from L2) and keeps
// what it finds in shared memory, so every row is written once, by one block, with no order among blocks.
#pragma once
#include "dtype.cuh"
#include "row_block.cuh"

namespace slowfast::cuda {

constexpr int kMaxTasks = 2048;  // rows of a block, bounded by their shared memory

// The rows of this block, numbered by k, of `num_tasks` over all blocks. If these are the text rows, be it that there
// are no others, the block takes text rows blockIdx.x, blockIdx.x + gridDim.x, ...; otherwise they are the rows of the
// state, taken with that step, so that text and copied rows, whose costs differ, are spread over all blocks.
class RowTasks {
 public:
  __device__ RowTasks(const int32_t* text_rows, int64_t num_text, int64_t num_tasks, int32_t* text_of)
      : text_rows_(text_rows), text_of_(text_of), num_text_(num_text), only_text_(num_tasks == num_text) {
    count_ = (static_cast<unsigned>(num_tasks) - blockIdx.x + gridDim.x - 1) / gridDim.x;
  }

  // Before text(); by all threads.
  __device__ void find_texts() {
    if (only_text_) return;
    for (int k = threadIdx.x; k < count_; k += blockDim.x) text_of_[k] = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < num_text_; i += blockDim.x) {
      const unsigned row = __ldg(text_rows_ + i);
      if (row % gridDim.x == blockIdx.x) text_of_[row / gridDim.x] = i;
    }
    __syncthreads();
  }

  __device__ int count() const { return count_; }
  // Index into text_rows and context; -1: the row is copied.
  __device__ int text(int k) const { return only_text_ ? index(k) : text_of_[k]; }
  __device__ int row(int k) const { return only_text_ ? __ldg(text_rows_ + index(k)) : index(k); }

 private:
  __device__ int index(int k) const { return blockIdx.x + k * gridDim.x; }

  const int32_t* text_rows_;
  int32_t* text_of_;
  const int64_t num_text_;
  const bool only_text_;
  int count_;
};

template <typename T>
__device__ __forceinline__ int64_t channel_of(int v) {
  return static_cast<int64_t>(v * blockDim.x + threadIdx.x) * kVectorSize<T>;
}

// The gate's weight for this thread's channels, of type W = T or float, kept as it lies in memory.
template <typename T, typename W, int kVectors>
class Weight {
 public:
  __device__ __forceinline__ Weight(const GateParams& gate, int64_t channels) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = channel_of<T>(v);
      const uint4* bits = reinterpret_cast<const uint4*>(static_cast<const W*>(gate.weight) + channel);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        bits_[v][part] = channel < channels ? __ldg(bits + part) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ __forceinline__ float dot(const uint4 (&x)[kVectors]) const {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float value[kVectorSize<T>], weight[kVectorSize<T>];
      unpack<T>(x[v], value);
      vector(v, weight);
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) sum += value[i] * weight[i];
    }
    return sum;
  }

  __device__ __forceinline__ void vector(int v, float (&weight)[kVectorSize<T>]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float some[kVectorSize<W>];
      unpack<W>(bits_[v][part], some);
#pragma unroll
      for (int i = 0; i < kVectorSize<W>; ++i) weight[part * kVectorSize<W> + i] = some[i];
    }
  }

 private:
  static constexpr int kParts = sizeof(W) / sizeof(T);
  uint4 bits_[kVectors][kParts];
};

struct NoWeight {
  __device__ __forceinline__ NoWeight(const GateParams&, int64_t) {}
};

}  // namespace slowfast::cuda
