// Backward pass of the pooling: every feature's gradient from those of its slow token and of the fast tokens it is in.
//
// Roofline: memory. For 128 frames of 18x18x3584 bf16 with pool_stride 2 and windows of 4 frames, 74 + 19 MB are read
// and 297 MB written, 130 us at the 3018 GB/s that a copy reaches on an H100; behind a norm 297 MB of features are read
// as well, 228 us. The features that one slow token averages share a gradient, so a block takes such a square of a frame:
// it reads the token's gradient, those of the fast tokens (from L2, mostly: neighbours and frames of a window share
// them) and, for the norm, pools the token again, all at once, and writes what it got pool_stride^2 times. Squares are
// small and many, and several blocks on a multiprocessor keep the memory busy; nothing is summed across blocks.
#include "common/check.h"
#include "common/dtype.cuh"
#include "common/launchers.h"
#include "common/memory.cuh"
#include "common/reduce.cuh"
#include "common/row_block.cuh"

namespace slowfast::cuda {
namespace {

// One unit of work: height x width features of a frame, which share a gradient.
struct Square {
  int frame, first_token;         // the corner, among the frame's tokens
  int height, width;
  int area;                       // features that a slow token averages
  int64_t slow_row;               // -1: these features are in no token
  int first_window, num_windows;  // of the fast tokens that the slow token is averaged into; maybe none
  int fast_cell;                  // which one it is of a window's

  // Squares are counted for the largest grid of the batch, which larger strides don't fill.
  __device__ bool empty() const { return height <= 0 || width <= 0; }
};

__device__ __forceinline__ Square load_square(const PoolBackwardParams& p, unsigned index) {
  const unsigned cells = p.max_cells_h * p.max_cells_w;
  const unsigned cell = index % cells;
  const int y = cell / p.max_cells_w, x = cell % p.max_cells_w;
  Square s;
  s.frame = index / cells;
  const int4* columns = reinterpret_cast<const int4*>(p.frame_table) + 2 * static_cast<int64_t>(s.frame);
  const int4 token = __ldg(columns);      // first_window, num_windows, slow_base, pool_stride
  const int4 grids = __ldg(columns + 1);  // slow_h, slow_w, fast_h, fast_w
  const int stride = token.w;
  s.first_token = y * stride * p.grid_w + x * stride;
  s.height = min(stride, p.grid_h - y * stride);
  s.width = min(stride, p.grid_w - x * stride);
  s.area = stride * stride;
  s.slow_row = y < grids.x && x < grids.y ? token.z + static_cast<int64_t>(y) * grids.y + x : -1;
  const int fast_y = y / p.spatial_stride, fast_x = x / p.spatial_stride;
  const bool has_fast = p.grad_fast != nullptr && s.slow_row >= 0 && fast_y < grids.z && fast_x < grids.w;
  s.first_window = token.x;
  s.num_windows = has_fast ? token.y : 0;
  s.fast_cell = fast_y * grids.w + fast_x;
  return s;
}

template <typename T>
__device__ __forceinline__ const T* feature(const PoolBackwardParams& p, const Square& s, int i) {
  const int token = s.first_token + i / s.width * p.grid_w + i % s.width;
  return static_cast<const T*>(p.frames) + s.frame * p.frame_stride + token * p.token_stride;
}

template <typename T>
__device__ __forceinline__ T* first_gradient(const PoolBackwardParams& p, const Square& s) {
  const int64_t token = static_cast<int64_t>(s.frame) * p.grid_h * p.grid_w + s.first_token;
  return static_cast<T*>(p.grad_frames) + token * p.channels;
}

// Where the gradients of the fast tokens of window i of the square lie, and their share in one slow token's.
struct FastToken {
  int64_t row;
  float scale;
};

__device__ __forceinline__ FastToken load_fast_token(const PoolBackwardParams& p, const Square& s, int i) {
  const int2 window = __ldg(reinterpret_cast<const int2*>(p.windows) + s.first_window + i);  // fast_base, num_frames
  const float averaged = static_cast<float>(window.y) * (p.spatial_stride * p.spatial_stride);
  return {static_cast<int64_t>(window.x) + s.fast_cell, 1.0f / averaged};
}

// Rows on their way to shared memory by cp.async, a slot each; a thread reads back only what it copied itself.
template <typename T, int kVectors>
class RowSlots {
 public:
  __device__ RowSlots(int64_t channels, const uint4* slots)
      : channels_(channels), first_(shared_address(slots + threadIdx.x)) {}

  // Zeros, if it is not read.
  __device__ __forceinline__ void start(int slot, const T* row, bool is_read) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = static_cast<int64_t>(v * blockDim.x + threadIdx.x) * kVectorSize<T>;
      cp_async_16_or_zeros(vector(slot, v), row + channel, is_read && channel < channels_);
    }
  }

  __device__ __forceinline__ void wait() const {
    cp_async_commit();
    cp_async_wait<0>();
  }

  __device__ __forceinline__ void read(int slot, int v, float (&x)[kVectorSize<T>]) const {
    unpack<T>(load_shared(vector(slot, v)), x);
  }

  __device__ __forceinline__ void add(int slot, float scale, float (&sum)[kVectors][kVectorSize<T>]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float value[kVectorSize<T>];
      read(slot, v, value);
#pragma unroll
      for (int k = 0; k < kVectorSize<T>; ++k) sum[v][k] += value[k] * scale;
    }
  }

 private:
  __device__ __forceinline__ uint32_t vector(int slot, int v) const {
    return first_ + (slot * kVectors + v) * blockDim.x * kVectorBytes;
  }

  const int64_t channels_;
  const uint32_t first_;  // shared-memory address of this thread's vector 0
};

// Small blocks, of which as many share a multiprocessor as their registers let: they take turns in waiting, adding and
// storing. 16 channels a thread where a row has at most 4096, else 32.
constexpr int kMaxThreads = 256;
constexpr int num_blocks(int vectors, int channels) {
  if (channels > 16) return 2;
  return vectors == 2 ? 5 : 4;
}

enum Slot { kSlow, kFast, kFeatures };
// Features under way at once, 128 bytes a thread.
constexpr int num_features(bool norm, int vectors) { return norm ? 8 / vectors : 0; }

// From the gradient of a normalised token, in its slot, to that of the token itself, which is pooled again: with x the
// token, r its inverse root mean square and g the gradient, r (g - x r^2 mean(g x)). `sum` is 0 before.
template <typename T, int kVectors, int kBatch>
__device__ __forceinline__ void through_norm(const PoolBackwardParams& p, const Square& square,
                                             const RowSlots<T, kVectors>& rows,
                                             float (&sum)[kVectors][kVectorSize<T>]) {
  __shared__ BlockSums<2>::Partials partials;
  BlockSums<2> block_sums(partials);
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) rows.add(kFeatures + i, 1.0f, sum);
    first += kBatch;
    if (first >= square.area) break;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      rows.start(kFeatures + i, feature<T>(p, square, first + i), first + i < square.area);
    }
    rows.wait();
  }
  const float inv_area = 1.0f / square.area;
  float sums[2] = {0.0f, 0.0f};  // of squares; of token * gradient
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float grad[kVectorSize<T>];
    rows.read(kSlow, v, grad);
#pragma unroll
    for (int k = 0; k < kVectorSize<T>; ++k) {
      sum[v][k] *= inv_area;
      sums[0] += sum[v][k] * sum[v][k];
      sums[1] += sum[v][k] * grad[k];
    }
  }
  block_sums(sums);
  const float inv_channels = 1.0f / p.channels;
  const float inv_rms = rsqrtf(sums[0] * inv_channels + p.norm_eps);
  const float along = inv_rms * inv_rms * (sums[1] * inv_channels);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float grad[kVectorSize<T>];
    rows.read(kSlow, v, grad);
#pragma unroll
    for (int k = 0; k < kVectorSize<T>; ++k) sum[v][k] = inv_rms * (grad[k] - sum[v][k] * along);
  }
}

template <typename T, int kVectors, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads, num_blocks(kVectors, kVectors * kVectorSize<T>))
    pool_backward_rows(const __grid_constant__ PoolBackwardParams p) {
  constexpr int kSize = kVectorSize<T>;
  constexpr int kBatch = num_features(kNorm, kVectors);
  extern __shared__ uint4 slots[];
  const Square square = load_square(p, blockIdx.x);
  if (square.empty()) return;
  float grad[kVectors][kSize] = {};
  if (square.slow_row >= 0) {
    const RowSlots<T, kVectors> rows(p.channels, slots);
    const bool has_slow = p.grad_slow != nullptr, normed = kNorm && has_slow;
    rows.start(kSlow, static_cast<const T*>(p.grad_slow) + square.slow_row * p.slow_row_stride, has_slow);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) rows.start(kFeatures + i, feature<T>(p, square, i), normed && i < square.area);
    FastToken token = {0, 0.0f};
    if (square.num_windows > 0) token = load_fast_token(p, square, 0);
    const T* fast = static_cast<const T*>(p.grad_fast);
    rows.start(kFast, fast + token.row * p.fast_row_stride, square.num_windows > 0);
    rows.wait();
    if (kNorm && normed) {
      through_norm<T, kVectors, kBatch>(p, square, rows, grad);
    } else {
      rows.add(kSlow, 1.0f, grad);
    }
    rows.add(kFast, token.scale, grad);
#pragma unroll 1
    for (int i = 1; i < square.num_windows; ++i) {
      token = load_fast_token(p, square, i);
      rows.start(kFast, fast + token.row * p.fast_row_stride, true);
      rows.wait();
      rows.add(kFast, token.scale, grad);
    }
  }
  const float inv_area = 1.0f / square.area;
  uint4 bits[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) grad[v][k] *= inv_area;
    bits[v] = pack<T>(grad[v]);
  }
  T* grad_frames = first_gradient<T>(p, square);
#pragma unroll 1
  for (int y = 0; y < square.height; ++y) {
#pragma unroll 1
    for (int x = 0; x < square.width; ++x) {
      T* out = grad_frames + (static_cast<int64_t>(y) * p.grid_w + x) * p.channels;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t channel = static_cast<int64_t>(v * blockDim.x + threadIdx.x) * kSize;
        if (channel < p.channels) *reinterpret_cast<uint4*>(out + channel) = bits[v];
      }
    }
  }
}

// Any channel count and alignment, one channel at a time. Behind a norm features are read again, from the caches.
template <typename T>
__global__ void __launch_bounds__(256) pool_backward_scalar(const __grid_constant__ PoolBackwardParams p) {
  __shared__ BlockSums<2>::Partials partials;
  BlockSums<2> block_sums(partials);
  const Square square = load_square(p, blockIdx.x);
  if (square.empty()) return;
  const bool has_slow = p.grad_slow != nullptr && square.slow_row >= 0, normed = has_slow && p.norm_eps >= 0.0f;
  const T* slow = static_cast<const T*>(p.grad_slow) + square.slow_row * p.slow_row_stride;
  const auto pooled = [&](int64_t c) {
    float sum = 0.0f;
    for (int i = 0; i < square.area; ++i) sum += to_float(feature<T>(p, square, i)[c]);
    return sum / square.area;
  };
  float inv_rms = 1.0f, along = 0.0f;
  if (normed) {
    float sums[2] = {0.0f, 0.0f};  // of squares; of pooled * grad
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
      const float x = pooled(c);
      sums[0] += x * x;
      sums[1] += x * to_float(slow[c]);
    }
    block_sums(sums);
    inv_rms = rsqrtf(sums[0] / p.channels + p.norm_eps);
    along = inv_rms * inv_rms * (sums[1] / p.channels);
  }
  T* grad_frames = first_gradient<T>(p, square);
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    float grad = has_slow ? to_float(slow[c]) : 0.0f;
    if (normed) grad = inv_rms * (grad - pooled(c) * along);
    for (int i = 0; i < square.num_windows; ++i) {
      const FastToken token = load_fast_token(p, square, i);
      grad += to_float(static_cast<const T*>(p.grad_fast)[token.row * p.fast_row_stride + c]) * token.scale;
    }
    const T value = from_float<T>(grad / square.area);
    for (int y = 0; y < square.height; ++y) {
      for (int x = 0; x < square.width; ++x) {
        grad_frames[(static_cast<int64_t>(y) * p.grid_w + x) * p.channels + c] = value;
      }
    }
  }
}

template <typename T, int kVectors, bool kNorm>
void launch_rows(const PoolBackwardParams& p, unsigned num_squares, cudaStream_t stream) {
  const int threads = row_threads<T, kVectors>(p.channels);
  const int shared = (kFeatures + num_features(kNorm, kVectors)) * kVectors * threads * kVectorBytes;
  auto* kernel = pool_backward_rows<T, kVectors, kNorm>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "pool_backward: shared memory");
  kernel<<<num_squares, threads, shared, stream>>>(p);
  check_launch("pool_backward");
}

template <typename T, int kVectors>
void launch_rows(const PoolBackwardParams& p, unsigned num_squares, cudaStream_t stream) {
  if (p.norm_eps >= 0.0f) {
    launch_rows<T, kVectors, true>(p, num_squares, stream);
  } else {
    launch_rows<T, kVectors, false>(p, num_squares, stream);
  }
}

template <typename T>
void launch(const PoolBackwardParams& p, unsigned num_squares, cudaStream_t stream) {
  constexpr int kSize = kVectorSize<T>;
  const bool vectors = is_aligned(p.frames) && is_aligned(p.grad_slow) && is_aligned(p.grad_fast) &&
                       is_aligned(p.grad_frames) && p.channels % kSize == 0 && p.frame_stride % kSize == 0 &&
                       p.token_stride % kSize == 0 && p.slow_row_stride % kSize == 0 && p.fast_row_stride % kSize == 0;
  if (vectors && p.channels <= 16 * kMaxThreads) {
    launch_rows<T, 16 / kSize>(p, num_squares, stream);
  } else if (vectors && p.channels <= 32 * kMaxThreads) {
    launch_rows<T, 32 / kSize>(p, num_squares, stream);
  } else {
    pool_backward_scalar<T><<<num_squares, 256, 0, stream>>>(p);
    check_launch("pool_backward (scalar)");
  }
}

}  // namespace

void pool_backward(const PoolBackwardParams& p, void* stream) {
  const int64_t num_squares = p.num_frames * p.max_cells_h * p.max_cells_w;
  if (num_squares == 0 || p.channels == 0) return;
  if (num_squares > INT32_MAX) throw std::runtime_error("pool_backward: more than 2^31 squares; split the batch");
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch<typename decltype(tag)::type>(p, static_cast<unsigned>(num_squares), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace slowfast::cuda
