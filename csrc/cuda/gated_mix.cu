// out[r] = state[r] + g * context[i] on the text rows r = text_rows[i], a copy of state on the others: one launch.
//
// Roofline: memory. 8192 text rows of 3584 bf16 move 176 MB, 58 us at the 3018 GB/s that a copy reaches on an H100;
// 64 rows move 1.4 MB, less than a launch takes, so there only the chain of latencies counts. A block holds a row in
// registers between the dot product and the mix, so state is read once, and loads its next row before it reduces the
// current one. The gate's weight stays in registers for all rows of the block.
#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/dtype.cuh"
#include "common/gate.cuh"
#include "common/launchers.h"
#include "common/memory.cuh"
#include "common/mix_rows.cuh"
#include "common/reduce.cuh"
#include "common/row_block.cuh"

namespace slowfast::cuda {
namespace {

template <typename T, int kVectors>
struct Row {
  int row, text;
  uint4 state[kVectors], context[kVectors];
};

// `row` comes in, not from `tasks`, so that its own load can run a row ahead of those that need it.
template <typename T, int kVectors>
__device__ __forceinline__ Row<T, kVectors> load_row(const GatedMixParams& p, int row, int text) {
  Row<T, kVectors> r{row, text, {}, {}};
  const T* state = static_cast<const T*>(p.state) + row * p.state_row_stride;
  const T* context = static_cast<const T*>(p.context) + text * p.context_row_stride;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = channel_of<T>(v);
    if (channel < p.channels && text >= 0) r.context[v] = load_once(context + channel);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = channel_of<T>(v);
    if (channel < p.channels) r.state[v] = load_once(state + channel);
  }
  return r;
}

template <typename T, int kVectors>
__device__ __forceinline__ void mix(Row<T, kVectors>& r, float g) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float state[kVectorSize<T>], context[kVectorSize<T>];
    unpack<T>(r.state[v], state);
    unpack<T>(r.context[v], context);
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) state[i] += g * context[i];
    r.state[v] = pack<T>(state);
  }
}

// W = void: a gate without a weight. kTanh: the gate's kind is tanh; a choice among the kinds at every row costs 2 to 6%.
template <typename T, typename W, int kVectors, bool kTanh>
__global__ void __launch_bounds__(kMaxRowThreads, min_blocks(kVectors * kVectorSize<T>))
    gated_mix_rows(const __grid_constant__ GatedMixParams p) {
  __shared__ int32_t text_of[kMaxTasks];
  __shared__ BlockSum::Partials partials;
  BlockSum block_sum(partials);
  constexpr bool kWeighted = !std::is_void_v<W>;
  const GateScalars scalars(p.gate, kWeighted);
  const std::conditional_t<kWeighted, Weight<T, W, kVectors>, NoWeight> weight(p.gate, p.channels);
  RowTasks tasks(p.text_rows, p.num_text, p.rows, text_of);
  tasks.find_texts();

  // Two buffers, named by the unrolled step: moving a row from one to the other would wait for its loads.
  Row<T, kVectors> buffers[2];
  buffers[0] = load_row<T, kVectors>(p, tasks.row(0), tasks.text(0));
  int row_after = tasks.count() > 1 ? tasks.row(1) : 0;
  const Gate gate(p.gate, scalars);

  for (int base = 0; base < tasks.count(); base += 2) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int k = base + step;
      if (k >= tasks.count()) break;
      if (k + 1 < tasks.count()) buffers[step ^ 1] = load_row<T, kVectors>(p, row_after, tasks.text(k + 1));
      if (k + 2 < tasks.count()) row_after = tasks.row(k + 2);
      Row<T, kVectors>& r = buffers[step];
      if (r.text >= 0) {
        if constexpr (kWeighted) {
          mix<T, kVectors>(r, gate.weighted<kTanh>(block_sum(weight.dot(r.state))));
        } else {
          mix<T, kVectors>(r, gate.unweighted(r.text));
        }
      }
      T* out = static_cast<T*>(p.out) + r.row * p.channels;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t channel = channel_of<T>(v);
        if (channel < p.channels) *reinterpret_cast<uint4*>(out + channel) = r.state[v];
      }
    }
  }
}

// Any channel count and alignment, one channel at a time; state is read twice.
template <typename T>
__global__ void __launch_bounds__(256) gated_mix_scalar(const __grid_constant__ GatedMixParams p) {
  __shared__ int32_t text_of[kMaxTasks];
  __shared__ BlockSum::Partials partials;
  BlockSum block_sum(partials);
  RowTasks tasks(p.text_rows, p.num_text, p.rows, text_of);
  tasks.find_texts();
  const Gate gate(p.gate, GateScalars(p.gate, p.gate.weight != nullptr));
  for (int k = 0; k < tasks.count(); ++k) {
    const int row = tasks.row(k);
    const int text = tasks.text(k);
    const T* state = static_cast<const T*>(p.state) + row * p.state_row_stride;
    const T* context = static_cast<const T*>(p.context) + text * p.context_row_stride;
    T* out = static_cast<T*>(p.out) + row * p.channels;
    if (text < 0) {
      for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) out[c] = state[c];
      continue;
    }
    float dot = 0.0f;
    for (int64_t c = threadIdx.x; p.gate.weight != nullptr && c < p.channels; c += blockDim.x) {
      dot += to_float(state[c]) * decode(load_bits(p.gate.weight, p.gate.dtype, c), p.gate.dtype);
    }
    const float g = p.gate.weight != nullptr ? gate.weighted(block_sum(dot)) : gate.unweighted(text);
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
      out[c] = from_float<T>(to_float(state[c]) + g * to_float(context[c]));
    }
  }
}

// Blocks that fill the GPU, and no more rows a block than RowTasks has room for.
template <typename Kernel>
void launch_tasks(Kernel* kernel, const GatedMixParams& p, int threads, cudaStream_t stream) {
  int64_t blocks = p.rows;
  if (p.rows > device_attribute(cudaDevAttrMultiProcessorCount)) {
    const int64_t least = (p.rows + kMaxTasks - 1) / kMaxTasks;
    blocks = std::min(p.rows, std::max<int64_t>(least, resident_blocks(kernel, threads, 0)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(p);
  check_launch("gated_mix");
}

template <typename T, int kVectors>
void launch_rows(const GatedMixParams& p, cudaStream_t stream) {
  const int threads = row_threads<T, kVectors>(p.channels);
  const bool is_tanh = p.gate.kind == GateKind::kTanh;
  if (p.gate.weight == nullptr) {
    launch_tasks(gated_mix_rows<T, void, kVectors, false>, p, threads, stream);
  } else if (p.gate.dtype == p.dtype) {
    auto* kernel = is_tanh ? gated_mix_rows<T, T, kVectors, true> : gated_mix_rows<T, T, kVectors, false>;
    launch_tasks(kernel, p, threads, stream);
  } else {
    auto* kernel = is_tanh ? gated_mix_rows<T, float, kVectors, true> : gated_mix_rows<T, float, kVectors, false>;
    launch_tasks(kernel, p, threads, stream);
  }
}

template <typename T>
void launch(const GatedMixParams& p, cudaStream_t stream) {
  constexpr int kSize = kVectorSize<T>;
  const bool vectors = is_aligned(p.state) && is_aligned(p.context) && is_aligned(p.out) && is_aligned(p.gate.weight) &&
                       p.channels % kSize == 0 && p.state_row_stride % kSize == 0 && p.context_row_stride % kSize == 0;
  if (vectors && p.channels <= 8 * kMaxRowThreads) {
    launch_rows<T, 8 / kSize>(p, stream);
  } else if (vectors && p.channels <= 16 * kMaxRowThreads) {
    launch_rows<T, 16 / kSize>(p, stream);
  } else {
    launch_tasks(gated_mix_scalar<T>, p, 256, stream);
  }
}

}  // namespace

void gated_mix(const GatedMixParams& p, void* stream) {
  if (p.rows == 0 || p.channels == 0) return;
  if (p.rows > INT32_MAX) throw std::runtime_error("gated_mix: more than 2^31 rows in one call; split the batch");
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace slowfast::cuda
