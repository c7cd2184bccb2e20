// Gates of all text rows, once each, by a launch before the attention.
//
// Roofline: memory, the text rows of the state once: 2048 rows of 3584 bf16 are 14.7 MB, 5 us, and leave them in L2 for
// the mix. Inside the attention each KV head's units form the gates of their rows anew, by warps that share an SM with the
// main loop, which costs 15 to 20 us for 1024 rows.
#include <algorithm>

#include "../common/check.h"
#include "../common/dependent_launch.cuh"
#include "../common/dtype.cuh"
#include "../common/gate.cuh"
#include "../common/memory.cuh"
#include "../common/reduce.cuh"
#include "launch.h"

namespace slowfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // of 16 bytes that a lane has in flight: with one warp a row, half of 4096 channels

// The dot of 8 channels of the state with those of the gate's weight, of type T or float.
template <typename T>
__device__ __forceinline__ float dot_of(const uint4& state, const GateParams& gate, int vector) {
  float x[8], w[8];
  unpack<T>(state, x);
  if (gate.dtype == DType::kFloat32) {
    load_floats(gate.weight, vector, w);
  } else {
    unpack<T>(__ldg(static_cast<const uint4*>(gate.weight) + vector), w);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], w[i], sum);
  return sum;
}

// A warp takes a text row, and the next one as many rows on as there are warps.
template <typename T>
__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ CrossAttentionParams p, float* gates) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32, num_vectors = p.num_q_heads * p.head_dim / 8;
  const int first = (blockIdx.x * kThreads + threadIdx.x) / 32, step = gridDim.x * (kThreads / 32);
  const Gate gate(p.gate, GateScalars(p.gate, true));
  for (int text = first; text < p.num_text; text += step) {
    const T* row = static_cast<const T*>(p.state) + __ldg(p.text_rows + text) * p.state_row_stride;
    float dot = 0.0f;
    for (int begin = lane; begin < num_vectors; begin += 32 * kLoads) {
      uint4 state[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (begin + 32 * i < num_vectors) state[i] = load_once(row + 8 * (begin + 32 * i));
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (begin + 32 * i < num_vectors) dot += dot_of<T>(state[i], p.gate, begin + 32 * i);
      }
    }
    dot = warp_sum(dot);
    if (lane == 0) gates[text] = gate.weighted(dot);
  }
}

}  // namespace

CrossAttentionParams form_gates(const CrossAttentionParams& p, const SplitPlan& plan, void* stream) {
  const int64_t blocks = (p.num_text * 32 + kThreads - 1) / kThreads;
  const auto launch = [&](auto* kernel) {
    const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, resident_blocks(kernel, kThreads, 0)));
    launch_dependent(kernel, grid, kThreads, static_cast<cudaStream_t>(stream), "cross_attention_gates", p, plan.partial_gates);
  };
  p.dtype == DType::kBFloat16 ? launch(gates_kernel<__nv_bfloat16>) : launch(gates_kernel<__half>);
  CrossAttentionParams given = p;
  given.gate = {nullptr, nullptr, nullptr, plan.partial_gates, DType::kFloat32, GateKind::kGiven, false};
  return given;
}

}  // namespace slowfast::cuda
