// From the parts' unnormalised rows to the result. Every CTA of a unit owns an equal share of the tile's rows: each part
// sends its rows to their owners (stores to distributed shared memory, which nobody waits for), and after one cluster
// barrier the owner adds them up, always in the same order. Groups of clusters go on through global memory, where the
// last to arrive adds. Then gate, mix and store. All of it runs once a CTA, from a cold instruction cache: loops are kept
// rolled, and latency is hidden by asking early rather than by unrolling.
#pragma once
#include "../common/memory.cuh"
#include "launch.h"
#include "mainloop.cuh"

namespace slowfast::cuda {

struct Tile {
  int text_begin;  // of the sequence, in text_rows
  int row_begin;   // of the tile, in packed rows of the sequence
  int num_rows;    // packed rows in the tile
  int slow_begin, num_slow;
};

// The CTAs that work on one tile of one KV head: `size` neighbours of a cluster, in each of `num_groups` clusters.
struct Unit {
  int64_t index;  // (tile, KV head)
  int kv_head, group, num_groups;
  int first_rank, size, rank;  // in the cluster; rank is relative to first_rank
  int parts_per_cta;           // 2 where both warpgroups hold the same rows and share out the KV blocks
};

// The text row of a packed row, without a division.
__device__ __forceinline__ int text_of(const SplitPlan& plan, int packed) {
  return plan.heads == 1 ? packed : __umulhi(packed, plan.heads_reciprocal);
}

__device__ __forceinline__ float weight_of(float max_log2, float merged_log2) {
  return max_log2 == -INFINITY ? 0.0f : exp2_approx(max_log2 - merged_log2);
}

template <typename Traits>
struct Epilogue {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kConsumerThreads = 128 * Traits::kConsumers;
  static constexpr int kConsumerBarrier = 3;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVectors = kHeadDim / 4;  // a thread's unit of work is four neighbouring columns of a row

  const CrossAttentionParams& p;
  const SplitPlan& plan;
  Shared& shared;
  const Tile& tile;
  const Unit& unit;
  const int share;              // rows of the tile that a CTA of the unit owns; this one's are:
  const int first_row, num_rows;

  static __device__ __forceinline__ Epilogue make(const CrossAttentionParams& p, const SplitPlan& plan, Shared& shared,
                                                  const Tile& tile, const Unit& unit) {
    const int share = (tile.num_rows + unit.size - 1) / unit.size;
    const int first_row = min(tile.num_rows, unit.rank * share);
    return {p, plan, shared, tile, unit, share, first_row, min(share, tile.num_rows - first_row)};
  }

  __device__ __forceinline__ void sync_consumers() const {
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
  }
  __device__ __forceinline__ void sync_cluster() const {
    if (plan.cluster_size == 1) {
      sync_consumers();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

  // ---- places and gates of this CTA's rows, by three warps that have nothing else to do

  // Text rows are counted from the tile's first; those of this CTA's rows are text_begin() .. text_end().
  __device__ __forceinline__ int tile_text() const { return text_of(plan, tile.row_begin); }
  __device__ __forceinline__ int text_begin() const { return text_of(plan, tile.row_begin + first_row) - tile_text(); }
  __device__ __forceinline__ int text_end() const {
    return num_rows > 0 ? text_of(plan, tile.row_begin + first_row + num_rows - 1) + 1 - tile_text() : text_begin();
  }
  __device__ __forceinline__ const T* state_row(int text) const {
    const int64_t row = p.text_rows[tile.text_begin + tile_text() + text];
    return static_cast<const T*>(p.state) + row * p.state_row_stride;
  }
  __device__ __forceinline__ float* gate_workspace() const {
    return plan.partial_gates + (unit.index * plan.cluster_size + unit.rank) * Traits::kBlockM * Traits::kGateWarps;
  }

  // Into L2 before the KV stream takes all of the memory's queue.
  __device__ __forceinline__ void prefetch_gate_inputs(int warp, int lane) const {
    const int bytes = p.num_q_heads * kHeadDim * static_cast<int>(sizeof(T));
    const int end = text_end(), start = (warp * 32 + lane) * 128;
    constexpr int kStep = 32 * Traits::kGateWarps * 128;
    for (int text = text_begin() + unit.group; text < end; text += unit.num_groups) {
      const char* row = reinterpret_cast<const char*>(state_row(text));
      for (int i = start; i < bytes; i += kStep) ptx::prefetch_l2(row + i);
    }
    const int weight_bytes = p.gate.dtype == DType::kFloat32 ? 2 * bytes : bytes;
    for (int i = start; i < weight_bytes; i += kStep) ptx::prefetch_l2(static_cast<const char*>(p.gate.weight) + i);
  }

  __device__ void prepare_rows(int warp, int lane) const {
    if (warp == 0 && lane == 0 && p.state != nullptr) shared.gate_function = Gate(p.gate, GateScalars(p.gate));
    for (int i = warp * 32 + lane; i < num_rows; i += 32 * Traits::kGateWarps) {
      const int packed = tile.row_begin + first_row + i, text = text_of(plan, packed);
      const int64_t text_index = tile.text_begin + text, head = unit.kv_head * plan.heads + packed - text * plan.heads;
      const int64_t row = p.text_rows[text_index], channels = static_cast<int64_t>(p.num_q_heads) * kHeadDim;
      shared.place[i] = {row * p.state_row_stride + head * kHeadDim, row * channels + head * kHeadDim,
                         text_index * channels + head * kHeadDim, text_index * p.num_q_heads + head,
                         text - tile_text()};
    }
    if (p.state != nullptr) gate_dots(warp, lane);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.gate_full);
  }

  // Dots of the state rows with the gate's weight, a third of C a warp. Groups share out the rows and leave their dots
  // in global memory, for the last of them to use.
  __device__ __forceinline__ void gate_dots(int warp, int lane) const {
    const int vectors = p.num_q_heads * kHeadDim / 8, end = text_end();
    float* parts = unit.num_groups == 1 ? shared.gate_parts[0] : gate_workspace();
    for (int text = text_begin() + unit.group; text < end; text += unit.num_groups) {
      const uint4* state = reinterpret_cast<const uint4*>(state_row(text));
      float dot = 0.0f;
      constexpr int kLoads = 5, kStep = 32 * Traits::kGateWarps;  // a row of 3584 is one round of loads
      for (int first = warp * 32 + lane; first < vectors; first += kStep * kLoads) {
        uint4 bits[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int vector = first + i * kStep;
          bits[i] = vector < vectors ? __ldg(state + vector) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          float x[8], w[8];
          unpack<T>(bits[i], x);
          load_weights(min(first + i * kStep, vectors - 1), w);
#pragma unroll
          for (int j = 0; j < 8; ++j) dot = fmaf(x[j], w[j], dot);
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
      if (lane == 0) parts[text * Traits::kGateWarps + warp] = dot;
    }
  }

  __device__ __forceinline__ void load_weights(int vector, float (&w)[8]) const {
    if (p.gate.dtype == DType::kFloat32) {
      const float4* weights = static_cast<const float4*>(p.gate.weight) + 2 * vector;
      const float4 low = __ldg(weights), high = __ldg(weights + 1);
      w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
      w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
    } else {
      unpack<T>(__ldg(static_cast<const uint4*>(p.gate.weight) + vector), w);
    }
  }

  // The caller's next barrier publishes the gates.
  __device__ __forceinline__ void finish_gates(const float* parts, int consumer) const {
    const Gate gate = shared.gate_function;
    for (int i = text_begin() + consumer; i < text_end(); i += kConsumerThreads) {
      const float* dot = parts + i * Traits::kGateWarps;
      shared.gate[i] = gate((dot[0] + dot[1]) + dot[2]);
    }
  }

  // ---- parts

  // Called by all consumer threads; thread is the index in the warpgroup.
  __device__ __forceinline__ void run(RowState<Traits>& rows, int warpgroup, int thread, float scale_log2) const {
    const int consumer = warpgroup * 128 + thread;
    ptx::mbarrier_wait(&shared.gate_full, 0);
    if (unit.num_groups == 1 && p.state != nullptr) finish_gates(shared.gate_parts[0], consumer);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 1);
      rows.sum[r] += __shfl_xor_sync(0xffffffffu, rows.sum[r], 2);
    }
    sync_cluster();  // nobody reads the KV stages and Q any more
    if (p.state != nullptr) fetch_state(consumer);
    send(rows, warpgroup, thread, scale_log2);
    cp_async_wait<0>();
    sync_cluster();

    if (unit.num_groups == 1) {
      add<false>(consumer, unit.size * unit.parts_per_cta);
    } else {
      leave_partial(consumer);
      if (!arrive_last(consumer)) return;
      if (p.state != nullptr) finish_gates(gate_workspace(), consumer);
      sync_consumers();
      add<true>(consumer, unit.num_groups);
    }
  }

  // The columns of state that the mix needs, into the memory of Q.
  __device__ __forceinline__ void fetch_state(int consumer) const {
    constexpr int kChunks = kHeadDim / 8;
    const uint64_t policy = evict_first_policy();
    const uint32_t target = ptx::smem_address(shared.q);
#pragma unroll 1
    for (int i = consumer; i < num_rows * kChunks; i += kConsumerThreads) {
      const T* source = static_cast<const T*>(p.state) + shared.place[i / kChunks].state + i % kChunks * 8;
      cp_async_16(target + i * 16, source, policy);
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void send(const RowState<Traits>& rows, int warpgroup, int thread, float scale_log2) const {
    const int lane = thread % 32, warpgroup_row = thread / 32 * 16 + lane / 4;
    const int part = unit.parts_per_cta == 1 ? unit.rank : 2 * unit.rank + warpgroup;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warpgroup_row + 8 * r + (unit.parts_per_cta == 1 ? warpgroup * 64 : 0);
      if (row >= tile.num_rows) continue;
      const int owner = row / share, slot = part * share + row - owner * share;
      const uint32_t out = ptx::peer_address(&shared.received.out[slot][2 * (lane % 4)], unit.first_rank + owner);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        ptx::store_peer2(out + i * 8 * sizeof(float), rows.out[4 * i + 2 * r], rows.out[4 * i + 2 * r + 1]);
      }
      if (lane % 4 == 0) {
        const uint32_t stats = ptx::peer_address(&shared.received.stats[slot], unit.first_rank + owner);
        ptx::store_peer2(stats, rows.max[r] * scale_log2, rows.sum[r]);
      }
    }
  }

  struct Sum {
    float4 total;   // unnormalised
    float2 merged;  // maximum (log2 units) and sum
  };

  // Four columns of an own row over the unit's parts (shared memory) or over its groups (global memory), in order.
  template <bool kOverGroups>
  __device__ __forceinline__ Sum sum_over(int row, int column, int count) const {
    const auto stats = [&](int i) {
      return kOverGroups ? __ldcg(partial_stats(i) + row) : shared.received.stats[i * share + row];
    };
    const auto values = [&](int i) {
      return kOverGroups ? __ldcg(partial_out(i) + row * kVectors + column / 4)
                         : *reinterpret_cast<const float4*>(&shared.received.out[i * share + row][column]);
    };
    Sum sum = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float2(-INFINITY, 0.0f)};
    constexpr int kLoads = kOverGroups ? 8 : 1;  // in flight together
#pragma unroll 1
    for (int first = 0; first < count; first += kLoads) {
      float2 s[kLoads];
      float4 x[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = min(first + j, count - 1);
        s[j] = stats(i);
        x[j] = values(i);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (first + j >= count) s[j].x = -INFINITY;
        const float peak = fmaxf(sum.merged.x, s[j].x);
        const float old = weight_of(sum.merged.x, peak), w = weight_of(s[j].x, peak);
        sum.merged = make_float2(peak, fmaf(s[j].y, w, sum.merged.y * old));
        sum.total = make_float4(fmaf(x[j].x, w, sum.total.x * old), fmaf(x[j].y, w, sum.total.y * old),
                                fmaf(x[j].z, w, sum.total.z * old), fmaf(x[j].w, w, sum.total.w * old));
      }
    }
    return sum;
  }

  template <bool kOverGroups>
  __device__ __forceinline__ void add(int consumer, int count) const {
#pragma unroll 1
    for (int index = consumer; index < num_rows * kVectors; index += kConsumerThreads) {
      const int row = index / kVectors, column = index % kVectors * 4;
      store(row, column, sum_over<kOverGroups>(row, column, count));
    }
  }

  // ---- groups, through global memory

  __device__ __forceinline__ void leave_partial(int consumer) const {
#pragma unroll 1
    for (int index = consumer; index < num_rows * kVectors; index += kConsumerThreads) {
      const int row = index / kVectors, column = index % kVectors * 4;
      const Sum sum = sum_over<false>(row, column, unit.size * unit.parts_per_cta);
      __stcg(partial_out(unit.group) + index, sum.total);
      if (column == 0) __stcg(partial_stats(unit.group) + row, sum.merged);
    }
  }
  __device__ __forceinline__ float4* partial_out(int group) const {
    const int64_t slot = (unit.index * plan.num_groups + group) * Traits::kBlockM + first_row;
    return reinterpret_cast<float4*>(plan.partial_out) + slot * kVectors;
  }
  __device__ __forceinline__ float2* partial_stats(int group) const {
    const int64_t slot = (unit.index * plan.num_groups + group) * Traits::kBlockM + first_row;
    return reinterpret_cast<float2*>(plan.partial_stats) + slot;
  }

  __device__ __forceinline__ bool arrive_last(int consumer) const {
    sync_consumers();
    if (consumer == 0) {
      __threadfence();  // with the barrier before it, for every consumer's stores and the gate warps' too
      int32_t* counter = plan.counters + unit.index * plan.cluster_size + unit.rank;
      shared.is_last = atomicAdd(counter, 1) == unit.num_groups - 1;
      if (shared.is_last) *counter = 0;  // ready for the next launch, so that a CUDA graph can replay
      __threadfence();
    }
    sync_consumers();
    return shared.is_last;
  }

  // ---- results

  __device__ __forceinline__ void store(int row, int column, const Sum& sum) const {
    const typename Traits::RowPlace& place = shared.place[row];
    const bool empty = sum.merged.x == -INFINITY;
    const float inverse = empty ? 0.0f : 1.0f / sum.merged.y;
    const float x = sum.total.x * inverse, y = sum.total.y * inverse;
    const float z = sum.total.z * inverse, w = sum.total.w * inverse;
    if (p.context != nullptr) {
      *reinterpret_cast<uint2*>(static_cast<T*>(p.context) + place.context + column) =
          make_uint2(pack2<T>(x, y), pack2<T>(z, w));
    }
    if (p.lse != nullptr && column == 0) {
      constexpr float kLn2 = 0.6931471805599453f;
      p.lse[place.lse] = empty ? -INFINITY : (sum.merged.x + log2f(sum.merged.y)) * kLn2;
    }
    if (p.state != nullptr) {
      const float g = shared.gate[place.gate];
      const uint2 state = *reinterpret_cast<const uint2*>(shared.q + row * kHeadDim + column);
      const float2 low = unpack2<T>(state.x), high = unpack2<T>(state.y);
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + place.out + column) =
          make_uint2(pack2<T>(fmaf(g, x, low.x), fmaf(g, y, low.y)), pack2<T>(fmaf(g, z, high.x), fmaf(g, w, high.y)));
    }
  }
};

}  // namespace slowfast::cuda
