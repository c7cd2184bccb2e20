// Backward pass of the gated mix: gradients of state and context row by row, of the gate's parameters as sums of rows.
//
// Roofline: memory. 8192 text rows of 3584 bf16 read gradient, state and context, and write two gradients: 294 MB,
// 97 us at the 3018 GB/s that a copy reaches on an H100. No row may be read twice for the gate's weight, whose gradient is a
// sum over the rows: a block takes many rows and keeps its share of the sum, a few channels a thread, in registers, and
// a second kernel adds up the blocks' shares. So that few blocks keep the memory busy, cp.async brings a ring of the
// next rows to shared memory; each thread reads back only what it copied, so the one barrier is that of the two sums.
// Rows and order of every sum follow from shapes, text_rows and the number of blocks: same input, same bits.
#include <type_traits>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dtype.cuh"
#include "common/gate.cuh"
#include "common/launchers.h"
#include "common/memory.cuh"
#include "common/mix_rows.cuh"
#include "common/reduce.cuh"
#include "common/row_block.cuh"

namespace slowfast::cuda {
namespace {

__device__ __forceinline__ bool reads_context(const GatedMixBackwardParams& p) {
  const bool into_weighted = p.gate.weight != nullptr && p.grad_state != nullptr;
  return into_weighted || p.partials != nullptr || p.grad_value != nullptr;
}

// Rows without text have nothing but their gradient to copy.
__device__ __forceinline__ RowTasks tasks_of(const GatedMixBackwardParams& p, int32_t* text_of) {
  return RowTasks(p.text_rows, p.num_text, p.grad_state == nullptr ? p.num_text : p.rows, text_of);
}

// What a block adds up over its text rows beside the weight's gradient.
struct GateSums {
  float bias = 0.0f, warm_up = 0.0f;

  __device__ __forceinline__ void store(const GatedMixBackwardParams& p, float factor) const {
    if (p.partials == nullptr || threadIdx.x != 0) return;
    float* end = p.partials + (blockIdx.x + int64_t{1}) * p.partial_stride;
    // Of no rows at all 0, whatever the gate holds.
    const float slope = p.num_text == 0 ? 0.0f : p.gate.tanh_warm_up ? 1.0f - factor * factor : 1.0f;
    *reinterpret_cast<float4*>(end - 4) = make_float4(bias, warm_up * slope, 0.0f, 0.0f);
  }
};

// The rows of this block's tasks, those of the next kStages - 1 under way.
template <typename T, int kVectors, int kStages>
class RowRing {
 public:
  enum Tensor { kGrad, kState, kContext, kNumTensors };
  static constexpr int kVectorsAThread = kStages * kNumTensors * kVectors;

  // Starts the first gradients. Their rows are known before it is known which ones have text, and all are looked up at
  // once: one after the other they would cost a latency each.
  __device__ RowRing(const GatedMixBackwardParams& p, const RowTasks& tasks, bool state, bool context,
                     const uint4* ring)
      : p_(p), tasks_(tasks), state_(state), context_(context) {
    first_slot_ = shared_address(ring + threadIdx.x);
#pragma unroll
    for (int k = 0; k < kStages; ++k) rows_[k] = k < tasks.count() ? tasks.row(k) : 0;
#pragma unroll
    for (int k = 0; k < kStages - 1; ++k) {
      if (k < tasks.count()) start_grad(k, rows_[k]);
    }
  }

  // Once the texts are found.
  __device__ __forceinline__ void start_first() {
#pragma unroll
    for (int k = 0; k < kStages - 1; ++k) {
      if (k < tasks_.count()) start_others(k, rows_[k]);
      cp_async_commit();
    }
  }

  // Waits for the rows of task k and starts those of a later one in place of task k - 1's.
  __device__ __forceinline__ void next(int k) {
    const int later = k + kStages - 1;
    if (later < tasks_.count()) {
      start_grad(later, rows_[kStages - 1]);
      start_others(later, rows_[kStages - 1]);
      // The look-up of the next row runs a task ahead of the copies that need it.
      if (later + 1 < tasks_.count()) rows_[kStages - 1] = tasks_.row(later + 1);
    }
    cp_async_commit();  // even without a task: the wait counts groups
    cp_async_wait<kStages - 1>();
    slot_ = slot_of(k);
  }

  __device__ __forceinline__ void read(Tensor tensor, uint4 (&x)[kVectors]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = channel_of<T>(v) < p_.channels ? load_shared(vector(slot_, tensor, v)) : make_uint4(0, 0, 0, 0);
    }
  }

 private:
  __device__ __forceinline__ uint32_t slot_of(int k) const {
    return first_slot_ + k % kStages * (kNumTensors * kVectors * blockDim.x * kVectorBytes);
  }
  __device__ static __forceinline__ uint32_t vector(uint32_t slot, int tensor, int v) {
    return slot + (tensor * kVectors + v) * blockDim.x * kVectorBytes;
  }

  __device__ __forceinline__ void start_grad(int k, int row) const {
    copy(vector(slot_of(k), kGrad, 0), static_cast<const T*>(p_.grad) + row * p_.grad_row_stride);
  }

  __device__ __forceinline__ void start_others(int k, int row) const {
    const int text = tasks_.text(k);
    if (text < 0) return;
    const uint32_t slot = slot_of(k);
    if (state_) copy(vector(slot, kState, 0), static_cast<const T*>(p_.state) + row * p_.state_row_stride);
    if (context_) copy(vector(slot, kContext, 0), static_cast<const T*>(p_.context) + text * p_.context_row_stride);
  }

  __device__ __forceinline__ void copy(uint32_t shared, const T* row) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = channel_of<T>(v);
      if (channel < p_.channels) cp_async_16(vector(shared, 0, v), row + channel);
    }
  }

  const GatedMixBackwardParams& p_;
  const RowTasks& tasks_;
  const bool state_, context_;
  uint32_t first_slot_, slot_ = 0;  // shared-memory addresses of this thread's vector 0
  int rows_[kStages];               // of the first tasks; then the last one is that of the task to be started next
};

template <typename T, int kVectors>
__device__ __forceinline__ float dot(const uint4 (&a)[kVectors], const uint4 (&b)[kVectors]) {
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float x[kVectorSize<T>], y[kVectorSize<T>];
    unpack<T>(a[v], x);
    unpack<T>(b[v], y);
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) sum += x[i] * y[i];
  }
  return sum;
}

template <typename T, int kVectors>
__device__ __forceinline__ void store_row(void* base, int64_t row, int64_t channels, const uint4 (&x)[kVectors]) {
  T* out = static_cast<T*>(base) + row * channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = channel_of<T>(v);
    if (channel < channels) *reinterpret_cast<uint4*>(out + channel) = x[v];
  }
}

// W = void: a gate without a weight.
template <typename T, typename W, int kVectors, int kStages>
__global__ void __launch_bounds__(kMaxRowThreads, min_blocks(kVectors * kVectorSize<T>))
    gated_mix_backward_rows(const __grid_constant__ GatedMixBackwardParams p) {
  constexpr int kSize = kVectorSize<T>;
  constexpr bool kWeighted = !std::is_void_v<W>;
  using Ring = RowRing<T, kVectors, kStages>;
  extern __shared__ uint4 ring[];
  __shared__ int32_t text_of[kMaxTasks];
  __shared__ BlockSums<2>::Partials partials;
  let_next_kernel_start();
  BlockSums<2> block_sums(partials);
  const GateScalars scalars(p.gate, kWeighted);
  const std::conditional_t<kWeighted, Weight<T, W, kVectors>, NoWeight> weight(p.gate, p.channels);
  RowTasks tasks = tasks_of(p, text_of);
  const bool has_context = reads_context(p);
  Ring rows(p, tasks, kWeighted, has_context, ring);
  tasks.find_texts();
  rows.start_first();
  const Gate gate(p.gate, scalars);

  GateSums gate_sums;
  float weight_sums[kVectors][kSize] = {};
  for (int k = 0; k < tasks.count(); ++k) {
    const int row = tasks.row(k), text = tasks.text(k);
    rows.next(k);
    uint4 grad[kVectors];
    rows.read(Ring::kGrad, grad);
    if (text >= 0) {
      uint4 state[kVectors];
      float sums[2] = {0.0f, 0.0f};  // state . weight, grad . context
      if constexpr (kWeighted) {
        rows.read(Ring::kState, state);
        sums[0] = weight.dot(state);
      }
      if (has_context) {
        uint4 context[kVectors];
        rows.read(Ring::kContext, context);
        sums[1] = dot<T, kVectors>(grad, context);
      }
      if (kWeighted || has_context) block_sums(sums);

      float act;
      if constexpr (kWeighted) {
        act = gate.activation(sums[0]);
      } else {
        act = gate.plain(text);
      }
      const float grad_act = sums[1] * gate.factor();
      gate_sums.warm_up += sums[1] * act;
      if (p.grad_value != nullptr && threadIdx.x == 0) store_as(p.grad_value, p.value_dtype, text, grad_act);
      if (p.grad_context != nullptr) {
        const float g = act * gate.factor();
        uint4 scaled[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float x[kSize];
          unpack<T>(grad[v], x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[i] *= g;
          scaled[v] = pack<T>(x);
        }
        store_row<T, kVectors>(p.grad_context, text, p.channels, scaled);
      }
      if constexpr (kWeighted) {
        const float grad_pre = grad_act * gate.slope(act);
        gate_sums.bias += grad_pre;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float x[kSize], w[kSize];
          unpack<T>(state[v], x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) weight_sums[v][i] += grad_pre * x[i];
          unpack<T>(grad[v], x);
          weight.vector(v, w);
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[i] += grad_pre * w[i];
          grad[v] = pack<T>(x);
        }
      }
    }
    if (p.grad_state != nullptr) store_row<T, kVectors>(p.grad_state, row, p.channels, grad);
  }

  gate_sums.store(p, gate.factor());
  if (p.grad_weight == nullptr) return;
  float* mine = p.partials + blockIdx.x * p.partial_stride;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = channel_of<T>(v);
    if (channel >= p.channels) continue;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float(&sum)[kSize] = weight_sums[v];
      *reinterpret_cast<float4*>(mine + channel + i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    }
  }
}

// Any channel count and alignment, one channel at a time; rows are read twice, and the weight's sums lie in memory.
template <typename T>
__global__ void __launch_bounds__(256) gated_mix_backward_scalar(const __grid_constant__ GatedMixBackwardParams p) {
  __shared__ int32_t text_of[kMaxTasks];
  __shared__ BlockSums<2>::Partials partials;
  let_next_kernel_start();
  BlockSums<2> block_sums(partials);
  RowTasks tasks = tasks_of(p, text_of);
  tasks.find_texts();
  const bool weighted = p.gate.weight != nullptr, has_context = reads_context(p);
  const Gate gate(p.gate, GateScalars(p.gate, weighted));
  const auto weight = [&](int64_t c) { return decode(load_bits(p.gate.weight, p.gate.dtype, c), p.gate.dtype); };

  GateSums gate_sums;
  float* weight_sums = p.partials + blockIdx.x * p.partial_stride;
  if (p.grad_weight != nullptr) {
    for (int64_t c = threadIdx.x; c < p.partial_stride - 4; c += blockDim.x) weight_sums[c] = 0.0f;
  }
  for (int k = 0; k < tasks.count(); ++k) {
    const int row = tasks.row(k), text = tasks.text(k);
    const T* grad = static_cast<const T*>(p.grad) + row * p.grad_row_stride;
    T* grad_state = static_cast<T*>(p.grad_state) + row * p.channels;
    if (text < 0) {
      for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) grad_state[c] = grad[c];
      continue;
    }
    const T* state = static_cast<const T*>(p.state) + row * p.state_row_stride;
    const T* context = static_cast<const T*>(p.context) + text * p.context_row_stride;
    float sums[2] = {0.0f, 0.0f};
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
      if (weighted) sums[0] += to_float(state[c]) * weight(c);
      if (has_context) sums[1] += to_float(grad[c]) * to_float(context[c]);
    }
    block_sums(sums);
    const float act = weighted ? gate.activation(sums[0]) : gate.plain(text);
    const float g = act * gate.factor(), grad_act = sums[1] * gate.factor();
    const float grad_pre = weighted ? grad_act * gate.slope(act) : 0.0f;
    gate_sums.bias += grad_pre;
    gate_sums.warm_up += sums[1] * act;
    if (p.grad_value != nullptr && threadIdx.x == 0) store_as(p.grad_value, p.value_dtype, text, grad_act);
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
      const float x = to_float(grad[c]);
      if (p.grad_context != nullptr) static_cast<T*>(p.grad_context)[text * p.channels + c] = from_float<T>(g * x);
      if (p.grad_weight != nullptr) weight_sums[c] += grad_pre * to_float(state[c]);
      if (p.grad_state != nullptr) grad_state[c] = weighted ? from_float<T>(x + grad_pre * weight(c)) : grad[c];
    }
  }
  gate_sums.store(p, gate.factor());
}

constexpr int kSumColumns = 32, kSumGroups = 32;
constexpr int kSumThreads = kSumColumns / 4 * kSumGroups;

// The sum over the rows of `partials`: a block has kSumColumns columns, of which thread group g adds up rows g,
// g + kSumGroups, ...; the groups' sums are then added in their order.
__global__ void __launch_bounds__(kSumThreads) sum_partials(const __grid_constant__ GatedMixBackwardParams p) {
  __shared__ float sums[kSumGroups][kSumColumns];
  wait_for_previous_kernel();
  const int mine = threadIdx.x % (kSumColumns / 4) * 4, group = threadIdx.x / (kSumColumns / 4);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSumColumns;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (first + mine < p.partial_stride) {
#pragma unroll 8
    for (int64_t row = group; row < p.num_blocks; row += kSumGroups) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(p.partials + row * p.partial_stride + first + mine));
      sum.x += x.x;
      sum.y += x.y;
      sum.z += x.z;
      sum.w += x.w;
    }
  }
  *reinterpret_cast<float4*>(&sums[group][mine]) = sum;
  __syncthreads();
  const int64_t column = first + threadIdx.x;
  if (threadIdx.x >= kSumColumns || column >= p.partial_stride) return;
  float total = 0.0f;
#pragma unroll
  for (int g = 0; g < kSumGroups; ++g) total += sums[g][threadIdx.x];
  const int64_t from_end = p.partial_stride - column;
  if (from_end > 4) {
    if (column < p.channels) store_as(p.grad_weight, p.gate.dtype, column, total);
  } else if (from_end == 4 && p.grad_bias != nullptr) {
    store_as(p.grad_bias, p.gate.dtype, 0, total);
  } else if (from_end == 3 && p.grad_warm_up != nullptr) {
    store_as(p.grad_warm_up, p.gate.dtype, 0, total);
  }
}

// 84 KB of rows under way in the largest block of one vector a thread and tensor.
constexpr int num_stages(int vectors) {
  if (vectors == 1) return 4;
  return vectors == 2 ? 3 : 2;
}

template <typename T, typename W, int kVectors>
void launch_rows_of(const GatedMixBackwardParams& p, int threads, int shared, cudaStream_t stream) {
  auto* kernel = gated_mix_backward_rows<T, W, kVectors, num_stages(kVectors)>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "gated_mix_backward: shared memory");
  kernel<<<p.num_blocks, threads, shared, stream>>>(p);
  check_launch("gated_mix_backward");
}

// False: this GPU has too little shared memory for the ring.
template <typename T, int kVectors>
bool launch_rows(const GatedMixBackwardParams& p, cudaStream_t stream) {
  using Ring = RowRing<T, kVectors, num_stages(kVectors)>;
  constexpr int kStatic = kMaxTasks * sizeof(int32_t) + sizeof(BlockSums<2>::Partials);
  const int threads = row_threads<T, kVectors>(p.channels);
  const int shared = Ring::kVectorsAThread * threads * kVectorBytes;
  if (shared + kStatic > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return false;
  if (p.gate.weight == nullptr) {
    launch_rows_of<T, void, kVectors>(p, threads, shared, stream);
  } else if (p.gate.dtype == p.dtype) {
    launch_rows_of<T, T, kVectors>(p, threads, shared, stream);
  } else {
    launch_rows_of<T, float, kVectors>(p, threads, shared, stream);
  }
  return true;
}

template <typename T>
void launch(const GatedMixBackwardParams& p, cudaStream_t stream) {
  constexpr int kSize = kVectorSize<T>;
  const bool vectors = is_aligned(p.grad) && is_aligned(p.state) && is_aligned(p.context) && is_aligned(p.grad_state) &&
                       is_aligned(p.grad_context) && is_aligned(p.gate.weight) && p.channels % kSize == 0 &&
                       p.grad_row_stride % kSize == 0 && p.state_row_stride % kSize == 0 &&
                       p.context_row_stride % kSize == 0;
  bool launched = false;
  if (vectors && p.channels <= 8 * kMaxRowThreads) {
    launched = launch_rows<T, 8 / kSize>(p, stream);
  } else if (vectors && p.channels <= 16 * kMaxRowThreads) {
    launched = launch_rows<T, 16 / kSize>(p, stream);
  }
  if (!launched) {
    gated_mix_backward_scalar<T><<<p.num_blocks, 256, 0, stream>>>(p);
    check_launch("gated_mix_backward (scalar)");
  }
}

}  // namespace

void gated_mix_backward(const GatedMixBackwardParams& p, void* stream_address) {
  if (p.num_blocks == 0) return;
  if (p.rows > INT32_MAX) throw std::runtime_error("gated_mix_backward: more than 2^31 rows; split the batch");
  const auto stream = static_cast<cudaStream_t>(stream_address);
  dispatch_dtype(p.dtype, [&](auto tag) { launch<typename decltype(tag)::type>(p, stream); });
  if (p.partials == nullptr) return;
  const auto blocks = static_cast<unsigned>((p.partial_stride + kSumColumns - 1) / kSumColumns);
  launch_dependent(sum_partials, blocks, kSumThreads, stream, "gated_mix_backward (sums)", p);
}

}  // namespace slowfast::cuda
