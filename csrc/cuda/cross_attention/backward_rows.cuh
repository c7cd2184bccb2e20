// What comes before and after the products: rows are packed into tiles, and the sums of dQ go to the rows of grad_q.
#pragma once
#include "../common/dtype.cuh"
#include "../common/reduce.cuh"
#include "backward_order.cuh"
#include "ptx.cuh"
#include "ranges.cuh"

namespace slowfast::cuda {

// A row tile as shared memory holds it: column blocks of 64, 128-byte swizzle. Rows that are none, or see nothing, are 0.
template <typename T, int kHeadDim>
struct RowTile {
  T query[kBackwardBlockM * kHeadDim];
  T grad[kBackwardBlockM * kHeadDim];  // of the context
  float lse[kBackwardBlockM];          // base 2, less kShift; inf in rows that see nothing
  float delta[kBackwardBlockM];        // rowsum(grad * context) - grad_lse, times 2^-kShift

  // The probabilities of a long video are among float16's subnormal numbers: times 2^kShift they are not.
  static constexpr int kShift = std::is_same_v<T, __half> ? 15 : 0;
  static constexpr float kUnit = 1.0f / (1 << kShift);
};

// 16-byte vector `vector` of a row of a tile of kRows rows, in elements.
template <int kRows>
__device__ __forceinline__ int swizzled(int row, int vector) {
  return (vector / 8 * kRows + row) * 64 + ((vector ^ row) % 8) * 8;
}

// A CTA takes 16 rows.
template <typename T, int kHeadDim, bool kRanges, bool kPieces>
__global__ void __launch_bounds__(16 * kHeadDim / 8)
    pack_rows_kernel(const __grid_constant__ CrossAttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  using Record = RowTile<T, kHeadDim>;
  constexpr int kVectors = kHeadDim / 8, kRows = 16, kParts = kBackwardBlockM / kRows;
  ptx::let_next_kernel_start();
  const int kv_head = blockIdx.y;
  const int64_t thread = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * gridDim.y * blockDim.x;
  const int64_t num_turns = plan.pair_turns - plan.turns + plan.num_ctas / 2 * 4;
  for (int64_t i = thread; i < num_turns; i += threads) plan.turns[i] = 0;

  const int tile = blockIdx.x / kParts, row = blockIdx.x % kParts * kRows + threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  BackwardSequence sequence(p, plan);
  do {
    if (!sequence.next()) return;
  } while (tile >= sequence.first_tile + sequence.num_tiles);
  const int heads_per_kv = p.forward.num_q_heads / p.forward.num_kv_heads, packed = (tile - sequence.first_tile) * kBackwardBlockM + row;
  uint4 query = make_uint4(0, 0, 0, 0), grad = query, context = query;
  float lse = -INFINITY, delta = 0.0f;
  Range range = {0, 0};
  if (packed < sequence.num_rows) {
    const int64_t text = sequence.text_begin + packed / heads_per_kv, head = kv_head * heads_per_kv + packed % heads_per_kv;
    if (kRanges) range = range_of(p.forward, text, kPieces ? kNoToken : sequence.num_slow);
    lse = p.forward.lse[text * plan.heads_a_row + head];
    if (lse != -INFINITY) {
      const auto load = [&](const void* base, int64_t at) {
        return *reinterpret_cast<const uint4*>(static_cast<const T*>(base) + at + vector * 8);
      };
      query = load(p.forward.q, p.forward.text_rows[text] * p.forward.q_row_stride + head * p.forward.q_head_stride);
      if (p.grad_context != nullptr) {
        grad = load(p.grad_context, text * p.grad_context_row_stride + head * p.grad_context_head_stride);
        context = load(p.forward.context, (text * plan.heads_a_row + head) * kHeadDim);
      }
      if (p.grad_lse != nullptr) delta = -p.grad_lse[text * p.grad_lse_row_stride + head * p.grad_lse_head_stride];
    }
  }
  float x[8], y[8];
  unpack<T>(grad, x);
  unpack<T>(context, y);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) dot = fmaf(x[i], y[i], dot);
  delta += warp_sum<kVectors>(dot);

  Record& record = static_cast<Record*>(plan.tiles)[int64_t{kv_head} * plan.max_tiles + tile];
  const int at = swizzled<kBackwardBlockM>(row, vector);
  *reinterpret_cast<uint4*>(record.query + at) = query;
  *reinterpret_cast<uint4*>(record.grad + at) = grad;
  if (vector == 0) {
    record.lse[row] = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634f - Record::kShift;
    record.delta[row] = delta * Record::kUnit;
    if (kRanges && kv_head == 0) {
      reinterpret_cast<int2*>(plan.row_ranges)[tile * kBackwardBlockM + row] = make_int2(range.begin, max(range.end, 0));
      if (kPieces && row == 0) plan.tile_sequences[tile] = sequence.number;
    }
  }
}

// A CTA takes a row tile or, of few, a share of its columns: thread t of a warpgroup adds up its fragments, of half the columns
// (see add_to_sums).
template <typename T, int kHeadDim, int kShares, bool kRanges, bool kPieces>
__global__ void __launch_bounds__(256)
    write_dq_kernel(const __grid_constant__ CrossAttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  constexpr int kFragments = kHeadDim / 16 / kShares, kVectors = kHeadDim / 8;
  constexpr int kGroups = kShares == 1 ? 4 : 12;  // read together: few tiles are few CTAs, and each waits for memory
  __shared__ __align__(16) T rows[kBackwardBlockM * kHeadDim];
  const int tile = blockIdx.x, kv_head = blockIdx.y, first_fragment = blockIdx.z * kFragments;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  BackwardSequence sequence(p, plan);
  do {
    if (!sequence.next()) return;
  } while (tile >= sequence.first_tile + sequence.num_tiles);
  if constexpr (kPieces) {
    BackwardWhole whole(p, plan);
    whole.next();
    sequence.num_groups = whole.num_groups;
    sequence.num_tiles = whole.num_tiles;
    sequence.first_sum = sequence.first_tile;
  }
  ptx::wait_for_previous_kernel();
  float4 sum[kFragments] = {};
  const int64_t first = int64_t{kv_head} * plan.max_sums + sequence.first_sum + tile - sequence.first_tile;
  for (int begin = 0; begin < sequence.num_groups; begin += kGroups) {
    float4 x[kGroups][kFragments] = {};
    bool is_there[kGroups] = {};  // somebody has added to the sum: a group may have no block in any round, or none that is seen
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int group = begin + j;
      if (group >= sequence.num_groups) break;
      is_there[j] = __ldcg(plan.turns + first + group * sequence.num_tiles) != 0;
      if (kRanges && !is_there[j]) continue;  // else rare, and nothing waits for the answer
      const float4* part = reinterpret_cast<const float4*>(plan.sums + (first + group * sequence.num_tiles) * (kBackwardBlockM * kHeadDim)) +
                           (warpgroup * (kHeadDim / 16) + first_fragment) * 128 + thread;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) x[j][i] = __ldcs(part + i * 128);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!is_there[j]) continue;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        sum[i] = make_float4(sum[i].x + x[j][i].x, sum[i].y + x[j][i].y, sum[i].z + x[j][i].z, sum[i].w + x[j][i].w);
      }
    }
  }
  const int row = thread / 32 * 16 + thread % 32 / 4, column = warpgroup * (kHeadDim / 2) + 8 * first_fragment + thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    const int c = column + 8 * i;
    *reinterpret_cast<uint32_t*>(rows + swizzled<kBackwardBlockM>(row, c / 8) + c % 8) = pack2<T>(sum[i].x, sum[i].y);
    *reinterpret_cast<uint32_t*>(rows + swizzled<kBackwardBlockM>(row + 8, c / 8) + c % 8) = pack2<T>(sum[i].z, sum[i].w);
  }
  __syncthreads();
  const int heads_per_kv = p.forward.num_q_heads / p.forward.num_kv_heads, row_begin = (tile - sequence.first_tile) * kBackwardBlockM;
#pragma unroll
  for (int i = threadIdx.x; i < kBackwardBlockM * 2 * kFragments; i += 256) {
    const int r = i / (2 * kFragments), half = i / kFragments % 2, packed = row_begin + r;
    const int vector = half * (kVectors / 2) + first_fragment + i % kFragments;
    if (packed >= sequence.num_rows) break;
    const int64_t text = sequence.text_begin + packed / heads_per_kv, head = kv_head * heads_per_kv + packed % heads_per_kv;
    T* out = static_cast<T*>(p.grad_q) + (p.forward.text_rows[text] * int64_t{plan.heads_a_row} + head) * kHeadDim + vector * 8;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(rows + swizzled<kBackwardBlockM>(r, vector));
  }
}

}  // namespace slowfast::cuda
