// From the parts of a cluster to the result. Every CTA of a unit owns an equal share of the tile's rows: each part
// sends its rows to their owners (stores to distributed shared memory, which nobody waits for), and after one cluster
// barrier the owner adds them up, always in the same order. Groups of clusters go on through global memory, where the
// last to arrive adds. Then gate, mix and store.
#pragma once
#include "epilogue.cuh"

namespace slowfast::cuda {

// Four columns of a row, summed over parts of the slow tokens that each have a maximum of their own.
struct Sum {
  float4 total = {0.0f, 0.0f, 0.0f, 0.0f};  // unnormalised
  float2 merged = {-INFINITY, 0.0f};        // maximum (log2 units) and sum

  __device__ __forceinline__ void add(float2 stats, float4 x) {
    const float peak = fmaxf(merged.x, stats.x);
    const float old = weight_of(merged.x, peak), w = weight_of(stats.x, peak);
    merged = make_float2(peak, fmaf(stats.y, w, merged.y * old));
    total = make_float4(fmaf(x.x, w, total.x * old), fmaf(x.y, w, total.y * old), fmaf(x.z, w, total.z * old),
                        fmaf(x.w, w, total.w * old));
  }
};

// The result of four columns of a row; `state` is their cell, used if the call has one.
template <typename Traits>
__device__ __forceinline__ void store_result(const CrossAttentionParams& p, const typename Traits::RowPlace& place,
                                             int column, const Sum& sum, const typename Traits::Element* state,
                                             float gate) {
  using T = typename Traits::Element;
  const float inverse = sum.merged.x == -INFINITY ? 0.0f : 1.0f / sum.merged.y;
  const float x = sum.total.x * inverse, y = sum.total.y * inverse;
  const float z = sum.total.z * inverse, w = sum.total.w * inverse;
  if (p.context != nullptr) {
    *reinterpret_cast<uint2*>(static_cast<T*>(p.context) + place.context + column) =
        make_uint2(pack2<T>(x, y), pack2<T>(z, w));
  }
  if (column == 0) store_lse<Traits>(p, place.lse, sum.merged);
  if (p.state != nullptr) {
    const uint2 bits = *reinterpret_cast<const uint2*>(state);
    const float2 low = unpack2<T>(bits.x), high = unpack2<T>(bits.y);
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + place.out + column) = make_uint2(
        pack2<T>(fmaf(gate, x, low.x), fmaf(gate, y, low.y)), pack2<T>(fmaf(gate, z, high.x), fmaf(gate, w, high.y)));
  }
}

template <typename Traits>
struct ClusterEpilogue {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kConsumerThreads = 128 * Traits::kConsumers;
  static constexpr int kConsumerBarrier = 3;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVectors = kHeadDim / 4;  // a thread's unit of work is four neighbouring columns of a row

  const Gates<Traits>& gates;

  __device__ __forceinline__ void sync_consumers() const {
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
  }
  __device__ __forceinline__ void sync_cluster() const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    sync_consumers();  // says the same again, in a way that compute-sanitizer's racecheck understands
  }
  __device__ __forceinline__ void finish_gates(int consumer) const {
    gates.finish(gates.text_begin(), gates.text_end(), gates.shared.gate + gates.text_begin(), consumer,
                 kConsumerThreads);
  }

  // Called by all consumer threads; thread is the index in the warpgroup. Maxima of `rows` are in log2 units.
  __device__ __forceinline__ void run(const RowState<Traits>& rows, int warpgroup, int thread) const {
    const Unit& unit = gates.unit;
    const bool mixes = gates.p.state != nullptr;
    const int consumer = warpgroup * 128 + thread;
    ptx::mbarrier_wait(&gates.shared.gate_full, 0);
    if (unit.num_groups == 1 && mixes) finish_gates(consumer);
    sync_cluster();  // nobody reads the KV stages and Q any more
    if (mixes) gates.fetch_state(gates.shared.q, 0, gates.num_rows, consumer, kConsumerThreads);
    send(rows, warpgroup, thread);
    cp_async_wait<0>();
    sync_cluster();

    if (unit.num_groups == 1) {
      add<false>(consumer, unit.size * unit.parts_per_cta);
    } else {
      leave_partial(consumer);
      if (!arrive_last(consumer)) return;
      if (mixes) finish_gates(consumer);
      sync_consumers();
      add<true>(consumer, unit.num_groups);
    }
  }

  __device__ __forceinline__ void send(const RowState<Traits>& rows, int warpgroup, int thread) const {
    Shared& shared = gates.shared;
    const Unit& unit = gates.unit;
    const int lane = thread % 32, warpgroup_row = thread / 32 * 16 + lane / 4;
    const int part = unit.parts_per_cta == 1 ? unit.rank : 2 * unit.rank + warpgroup;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warpgroup_row + 8 * r + (unit.parts_per_cta == 1 ? warpgroup * 64 : 0);
      if (row >= gates.tile.num_rows) continue;
      const int owner = row / gates.share, slot = part * gates.share + row - owner * gates.share;
      const uint32_t out = ptx::peer_address(&shared.received.out[slot][2 * (lane % 4)], unit.first_rank + owner);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        ptx::store_peer2(out + i * 8 * sizeof(float), rows.out[4 * i + 2 * r], rows.out[4 * i + 2 * r + 1]);
      }
      if (lane % 4 == 0) {
        const uint32_t stats = ptx::peer_address(&shared.received.stats[slot], unit.first_rank + owner);
        ptx::store_peer2(stats, rows.max[r], rows.sum[r]);
      }
    }
  }

  // Four columns of an own row over the unit's parts (shared memory) or over its groups (global memory), in order.
  template <bool kOverGroups>
  __device__ __forceinline__ Sum sum_over(int row, int column, int count) const {
    const Shared& shared = gates.shared;
    const auto stats = [&](int i) {
      return kOverGroups ? __ldcg(partial_stats(i) + row) : shared.received.stats[i * gates.share + row];
    };
    const auto values = [&](int i) {
      return kOverGroups ? __ldcg(partial_out(i) + row * kVectors + column / 4)
                         : *reinterpret_cast<const float4*>(&shared.received.out[i * gates.share + row][column]);
    };
    Sum sum;
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
        sum.add(s[j], x[j]);
      }
    }
    return sum;
  }

  template <bool kOverGroups>
  __device__ __forceinline__ void add(int consumer, int count) const {
    Shared& shared = gates.shared;
#pragma unroll 1
    for (int index = consumer; index < gates.num_rows * kVectors; index += kConsumerThreads) {
      const int row = index / kVectors, column = index % kVectors * 4;
      const auto& place = shared.place[row];
      store_result<Traits>(gates.p, place, column, sum_over<kOverGroups>(row, column, count),
                           state_cell<Traits>(shared.q, row, column), shared.gate[place.gate]);
    }
  }

  // ---- groups, through global memory

  __device__ __forceinline__ void leave_partial(int consumer) const {
    const Unit& unit = gates.unit;
#pragma unroll 1
    for (int index = consumer; index < gates.num_rows * kVectors; index += kConsumerThreads) {
      const int row = index / kVectors, column = index % kVectors * 4;
      const Sum sum = sum_over<false>(row, column, unit.size * unit.parts_per_cta);
      __stcg(partial_out(unit.group) + index, sum.total);
      if (column == 0) __stcg(partial_stats(unit.group) + row, sum.merged);
    }
  }
  __device__ __forceinline__ int64_t partial_row(int group) const {
    return (gates.unit.index * gates.plan.num_groups + group) * Traits::kBlockM + gates.first_row;
  }
  __device__ __forceinline__ float4* partial_out(int group) const {
    return reinterpret_cast<float4*>(gates.plan.partial_out) + partial_row(group) * kVectors;
  }
  __device__ __forceinline__ float2* partial_stats(int group) const {
    return reinterpret_cast<float2*>(gates.plan.partial_stats) + partial_row(group);
  }

  __device__ __forceinline__ bool arrive_last(int consumer) const {
    sync_consumers();
    if (consumer == 0) {
      // One thread arrives for all that synchronised with it: releases what they wrote, acquires what others wrote.
      int32_t* counter = gates.plan.counters + gates.unit.index * gates.plan.cluster_size + gates.unit.rank;
      gates.shared.is_last[0] = ptx::add_acquire_release(counter, 1) == gates.unit.num_groups - 1;
      if (gates.shared.is_last[0]) *counter = 0;  // ready for the next launch, so that a CUDA graph can replay
    }
    sync_consumers();
    return gates.shared.is_last[0];
  }
};

}  // namespace slowfast::cuda
