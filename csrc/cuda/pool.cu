// Slow and fast tokens in one pass over the vision features: average pooling, RMS statistics and the temporal mean.
//
// Roofline: memory. 128 frames of 18x18x3584 bf16 with pool_stride 2 and windows of 4 frames read 297 MB and write
// 74 + 19 MB: 129 us at the 3018 GB/s that a copy reaches on an H100. A multiprocessor must then keep some 40 KB of
// loads under way, always. So a block owns a cell (the slow tokens that make one fast token), walks the cell's feature
// rows as one stream, and cp.async keeps a ring of the next rows coming while it sums the oldest, across tokens,
// frames and cells: neither the reduction of a slow token nor the look-up of the next cell drains the memory system.
// Each thread reads back only the channels that it copied, so the one barrier is that of the sum of squares.
#include <algorithm>

#include "common/check.h"
#include "common/dtype.cuh"
#include "common/launchers.h"
#include "common/memory.cuh"
#include "common/reduce.cuh"
#include "common/row_block.cuh"

namespace slowfast::cuda {
namespace {

// One unit of work: the slow tokens [y_begin, y_end) x [x_begin, x_end) of the frames of one window.
struct Cell {
  int entry_begin, entry_end;
  int y_begin, y_end, x_begin, x_end;
  int pool_stride, slow_w;
  int fast_row;  // -1: these tokens make no fast token

  // Cells are counted for the largest grid of the batch, which smaller ones don't fill.
  __device__ bool empty() const { return y_begin >= y_end || x_begin >= x_end || entry_begin >= entry_end; }
};

__device__ __forceinline__ Cell load_cell(const PoolParams& p, unsigned index) {
  const unsigned cells = p.max_cells_h * p.max_cells_w;
  const unsigned item = index / cells, cell = index % cells;
  const int i = cell / p.max_cells_w, j = cell % p.max_cells_w;
  const int4* columns = reinterpret_cast<const int4*>(p.items) + 2 * static_cast<int64_t>(item);
  const int4 window = __ldg(columns);     // entry_begin, entry_count, fast_base, pool_stride
  const int4 grids = __ldg(columns + 1);  // slow_h, slow_w, fast_h, fast_w
  const int stride = p.spatial_stride;
  Cell c;
  c.entry_begin = window.x;
  c.entry_end = window.x + window.y;
  c.y_begin = i * stride;
  c.y_end = min(c.y_begin + stride, grids.x);
  c.x_begin = j * stride;
  c.x_end = min(c.x_begin + stride, grids.y);
  c.pool_stride = window.w;
  c.slow_w = grids.y;
  c.fast_row = window.z >= 0 && i < grids.z && j < grids.w ? window.z + i * grids.w + j : -1;
  return c;
}

__device__ __forceinline__ int2 load_entry(const PoolParams& p, int entry) {
  return __ldg(reinterpret_cast<const int2*>(p.entries) + entry);  // frame, slow_base
}

// The stream of feature rows of this block's cells, kStages - 1 of them under way at any time. The order is that of
// the loops in pool_rows: cells, frames of the window, slow tokens, rows of a slow token.
template <typename T, int kVectors, int kStages>
class RowStream {
 public:
  __device__ RowStream(const PoolParams& p, unsigned num_cells, const uint4* ring)
      : p_(p), num_cells_(num_cells), index_(blockIdx.x), policy_(evict_first_policy()) {
    num_vectors_ = static_cast<int>(p.channels) / kVectorSize<T>;
    first_slot_ = slot_ = shared_address(ring + threadIdx.x);
    open_cell();
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) start_row();
  }

  // Waits for the oldest row and starts another one in place of the row that was read before it.
  __device__ __forceinline__ void next() {
    cp_async_wait<kStages - 2>();
    start_row();
  }

  // This thread's vector v of the row that next() waited for; none if the row ends before it.
  __device__ __forceinline__ uint4 vector(int v) const { return load_shared(slot_ + v * slot_stride()); }
  __device__ __forceinline__ bool has_vector(int v) const { return column(v) < num_vectors_; }

 private:
  __device__ static __forceinline__ int column(int v) { return v * blockDim.x + threadIdx.x; }
  __device__ static __forceinline__ uint32_t slot_stride() { return blockDim.x * kVectorBytes; }

  __device__ __forceinline__ void start_row() {
    if (index_ < num_cells_) {
      const int stride = cell_.pool_stride;
      const int token = (y_ * stride + dy_) * p_.grid_w + x_ * stride + dx_;
      const T* row = frame_ + token * p_.token_stride;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (has_vector(v)) cp_async_16(slot_ + v * slot_stride(), row + column(v) * kVectorSize<T>, policy_);
      }
      advance();
    }
    cp_async_commit();  // even without a row: the wait counts groups
    slot_ += kVectors * slot_stride();
    if (slot_ == first_slot_ + kStages * kVectors * slot_stride()) slot_ = first_slot_;
  }

  __device__ __forceinline__ void advance() {
    if (++dx_ < cell_.pool_stride) return;
    dx_ = 0;
    if (++dy_ < cell_.pool_stride) return;
    dy_ = 0;
    if (++x_ < cell_.x_end) return;
    x_ = cell_.x_begin;
    if (++y_ < cell_.y_end) return;
    y_ = cell_.y_begin;
    if (++entry_ < cell_.entry_end) {
      open_frame();
    } else {
      index_ += gridDim.x;
      open_cell();
    }
  }

  __device__ __forceinline__ void open_cell() {
    for (; index_ < num_cells_; index_ += gridDim.x) {
      cell_ = load_cell(p_, index_);
      if (cell_.empty()) continue;
      entry_ = cell_.entry_begin;
      y_ = cell_.y_begin;
      x_ = cell_.x_begin;
      open_frame();
      return;
    }
  }

  __device__ __forceinline__ void open_frame() {
    frame_ = static_cast<const T*>(p_.frames) + load_entry(p_, entry_).x * p_.frame_stride;
  }

  const PoolParams& p_;
  const unsigned num_cells_;
  unsigned index_;
  const uint64_t policy_;
  uint32_t first_slot_, slot_;  // shared-memory addresses of this thread's vector 0
  int num_vectors_;
  Cell cell_;
  const T* frame_ = nullptr;
  int entry_ = 0, y_ = 0, x_ = 0, dy_ = 0, dx_ = 0;
};

template <typename T, int kVectors>
__device__ __forceinline__ void store_row(void* base, int64_t row, int64_t channels,
                                          const float (&x)[kVectors][kVectorSize<T>], float scale) {
  T* out = static_cast<T*>(base) + row * channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = static_cast<int64_t>(v * blockDim.x + threadIdx.x) * kVectorSize<T>;
    if (channel >= channels) continue;
    float scaled[kVectorSize<T>];
#pragma unroll
    for (int k = 0; k < kVectorSize<T>; ++k) scaled[k] = x[v][k] * scale;
    *reinterpret_cast<uint4*>(out + channel) = pack<T>(scaled);
  }
}

template <typename T, int kVectors, int kStages>
__global__ void __launch_bounds__(kMaxRowThreads, min_blocks(kVectors * kVectorSize<T>))
    pool_rows(const __grid_constant__ PoolParams p, unsigned num_cells) {
  constexpr int kSize = kVectorSize<T>;
  extern __shared__ uint4 ring[];
  __shared__ BlockSum::Partials partials;
  BlockSum block_sum(partials);
  RowStream<T, kVectors, kStages> rows(p, num_cells, ring);
  const float inv_channels = 1.0f / p.channels;

  for (unsigned index = blockIdx.x; index < num_cells; index += gridDim.x) {
    const Cell cell = load_cell(p, index);
    if (cell.empty()) continue;
    const int area = cell.pool_stride * cell.pool_stride;
    const float inv_area = 1.0f / area;
    float fast[kVectors][kSize] = {};
    for (int entry = cell.entry_begin; entry < cell.entry_end; ++entry) {
      const int slow_base = load_entry(p, entry).y;
      for (int y = cell.y_begin; y < cell.y_end; ++y) {
        for (int x = cell.x_begin; x < cell.x_end; ++x) {
          float slow[kVectors][kSize] = {};
          for (int i = 0; i < area; ++i) {
            rows.next();
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              if (!rows.has_vector(v)) continue;
              float feature[kSize];
              unpack<T>(rows.vector(v), feature);
#pragma unroll
              for (int k = 0; k < kSize; ++k) slow[v][k] += feature[k];
            }
          }
          float squares = 0.0f;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
              slow[v][k] *= inv_area;
              fast[v][k] += slow[v][k];
              squares += slow[v][k] * slow[v][k];
            }
          }
          if (slow_base < 0) continue;  // the window that saw this frame first has written its slow tokens
          const float scale = p.norm_eps < 0.0f ? 1.0f : rsqrtf(block_sum(squares) * inv_channels + p.norm_eps);
          store_row<T, kVectors>(p.slow, slow_base + static_cast<int64_t>(y) * cell.slow_w + x, p.channels, slow, scale);
        }
      }
    }
    if (cell.fast_row >= 0) {
      const int tokens = (cell.y_end - cell.y_begin) * (cell.x_end - cell.x_begin);
      const float scale = 1.0f / (static_cast<float>(cell.entry_end - cell.entry_begin) * tokens);
      store_row<T, kVectors>(p.fast, cell.fast_row, p.channels, fast, scale);
    }
  }
}

// Any channel count and alignment, one channel at a time. Features are read again for the norm and for the fast
// tokens, mostly from the caches.
template <typename T>
__device__ __forceinline__ float token_mean(const PoolParams& p, const Cell& cell, int frame, int y, int x, int64_t c) {
  const int stride = cell.pool_stride;
  const T* base = static_cast<const T*>(p.frames) + frame * p.frame_stride + c;
  float sum = 0.0f;
  for (int dy = 0; dy < stride; ++dy) {
    for (int dx = 0; dx < stride; ++dx) {
      sum += to_float(base[((y * stride + dy) * p.grid_w + x * stride + dx) * p.token_stride]);
    }
  }
  return sum / (stride * stride);
}

template <typename T>
__global__ void __launch_bounds__(256) pool_scalar(const __grid_constant__ PoolParams p, unsigned num_cells) {
  __shared__ BlockSum::Partials partials;
  BlockSum block_sum(partials);
  for (unsigned index = blockIdx.x; index < num_cells; index += gridDim.x) {
    const Cell cell = load_cell(p, index);
    if (cell.empty()) continue;
    for (int entry = cell.entry_begin; entry < cell.entry_end; ++entry) {
      const int2 source = load_entry(p, entry);
      if (source.y < 0) continue;
      for (int y = cell.y_begin; y < cell.y_end; ++y) {
        for (int x = cell.x_begin; x < cell.x_end; ++x) {
          float scale = 1.0f;
          if (p.norm_eps >= 0.0f) {
            float squares = 0.0f;
            for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
              const float mean = token_mean<T>(p, cell, source.x, y, x, c);
              squares += mean * mean;
            }
            scale = rsqrtf(block_sum(squares) / p.channels + p.norm_eps);
          }
          T* out = static_cast<T*>(p.slow) + (source.y + static_cast<int64_t>(y) * cell.slow_w + x) * p.channels;
          for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
            out[c] = from_float<T>(token_mean<T>(p, cell, source.x, y, x, c) * scale);
          }
        }
      }
    }
    if (cell.fast_row < 0) continue;
    T* out = static_cast<T*>(p.fast) + cell.fast_row * p.channels;
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
      float sum = 0.0f;
      for (int entry = cell.entry_begin; entry < cell.entry_end; ++entry) {
        const int frame = load_entry(p, entry).x;
        for (int y = cell.y_begin; y < cell.y_end; ++y) {
          for (int x = cell.x_begin; x < cell.x_end; ++x) sum += token_mean<T>(p, cell, frame, y, x, c);
        }
      }
      const int tokens = (cell.y_end - cell.y_begin) * (cell.x_end - cell.x_begin);
      out[c] = from_float<T>(sum / (static_cast<float>(cell.entry_end - cell.entry_begin) * tokens));
    }
  }
}

// 56 KB of rows under way in the largest block of one vector a thread, and at most 96 KB of shared memory in any.
constexpr int num_stages(int vectors) {
  if (vectors == 1) return 8;
  return vectors == 2 ? 4 : 3;
}

template <typename T, int kVectors>
void launch_rows(const PoolParams& p, unsigned num_cells, cudaStream_t stream) {
  constexpr int kStages = num_stages(kVectors);
  const int threads = row_threads<T, kVectors>(p.channels);
  const int shared = kStages * kVectors * threads * kVectorBytes;
  auto* kernel = pool_rows<T, kVectors, kStages>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "pool: shared memory");
  const unsigned resident = resident_blocks(kernel, threads, shared);
  kernel<<<std::min(num_cells, resident), threads, shared, stream>>>(p, num_cells);
  check_launch("pool");
}

template <typename T>
void launch(const PoolParams& p, unsigned num_cells, cudaStream_t stream) {
  constexpr int kSize = kVectorSize<T>;
  const bool vectors = is_aligned(p.frames) && is_aligned(p.slow) && is_aligned(p.fast) && p.channels % kSize == 0 &&
                       p.frame_stride % kSize == 0 && p.token_stride % kSize == 0;
  if (vectors && p.channels <= 8 * kMaxRowThreads) {
    launch_rows<T, 8 / kSize>(p, num_cells, stream);
  } else if (vectors && p.channels <= 16 * kMaxRowThreads) {
    launch_rows<T, 16 / kSize>(p, num_cells, stream);
  } else {
    pool_scalar<T><<<num_cells, 256, 0, stream>>>(p, num_cells);
    check_launch("pool (scalar)");
  }
}

}  // namespace

void pool(const PoolParams& p, void* stream) {
  const int64_t num_cells = static_cast<int64_t>(p.num_items) * p.max_cells_h * p.max_cells_w;
  if (num_cells == 0) return;
  if (num_cells > INT32_MAX) throw std::runtime_error("pool: more than 2^31 cells in one call; split the batch");
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch<typename decltype(tag)::type>(p, static_cast<unsigned>(num_cells), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace slowfast::cuda
