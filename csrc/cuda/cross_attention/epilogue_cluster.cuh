// From the parts of a cluster to the result. Every CTA of a unit owns a share of the tile's rows. Once all are past their last
// block but one, whose slots are then free, each part sends its rows to their owners (st.async, which nobody waits for), and
// the owner, whose mbarrier counts the bytes, adds them up, always in the same order. Groups go on through global
// memory, where the last to arrive adds. Then gate, mix and store.
#pragma once
#include "epilogue.cuh"

namespace slowfast::cuda {

// Two pairs of neighbouring columns of a row, 8 apart, as a thread's accumulators hold them: vector v of a row has the
// columns from columns_of(v) and from columns_of(v) + 8 on.
__device__ __forceinline__ int columns_of(int vector) { return vector / 4 * 16 + vector % 4 * 2; }

// A vector of a row, summed over parts of the slow tokens that each have a maximum of their own.
struct Sum {
  float4 total = {0.0f, 0.0f, 0.0f, 0.0f};  // unnormalised
  float2 merged = {-INFINITY, 0.0f};        // maximum (log2 units) and sum

  template <int kParts>  // a maximum of all first, so that their weights do not wait for each other
  __device__ __forceinline__ void add(const float2 (&stats)[kParts], const float4 (&x)[kParts]) {
    float peak = merged.x;
#pragma unroll
    for (int i = 0; i < kParts; ++i) peak = fmaxf(peak, stats[i].x);
    const float old = weight_of(merged.x, peak);
    merged = make_float2(peak, merged.y * old);
    total = make_float4(total.x * old, total.y * old, total.z * old, total.w * old);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float w = weight_of(stats[i].x, peak);
      merged.y = fmaf(stats[i].y, w, merged.y);
      total = make_float4(fmaf(x[i].x, w, total.x), fmaf(x[i].y, w, total.y), fmaf(x[i].z, w, total.z),
                          fmaf(x[i].w, w, total.w));
    }
  }
};

// The result of a vector of a row; `cells` hold the state of this CTA's rows, if the call has one.
template <typename Traits>
__device__ __forceinline__ void store_result(const CrossAttentionParams& p, const typename Traits::RowPlace& place, int row,
                                             int vector, const Sum& sum, typename Traits::Element* cells, float gate) {
  using T = typename Traits::Element;
  const float inverse = sum.merged.x == -INFINITY ? 0.0f : 1.0f / sum.merged.y;
  const float values[4] = {sum.total.x * inverse, sum.total.y * inverse, sum.total.z * inverse, sum.total.w * inverse};
  if (vector == 0) store_lse<Traits>(p, place.lse, sum.merged);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const int column = columns_of(vector) + 8 * pair;
    const float x = values[2 * pair], y = values[2 * pair + 1];
    const auto store = [&](void* target, int64_t offset, uint32_t bits) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(target) + offset + column) = bits;
    };
    if (p.context != nullptr) store(p.context, place.context, pack2<T>(x, y));
    if (p.state != nullptr) {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(state_cell<Traits>(cells, row, column));
      const float2 state = unpack2<T>(bits);
      const uint32_t mixed = pack2<T>(fmaf(gate, x, state.x), fmaf(gate, y, state.y));
      store(p.out, place.out, sum.merged.x == -INFINITY ? bits : mixed);  // nothing seen: the state, bit for bit
    }
  }
}

template <typename Traits>
struct ClusterEpilogue {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  using Received = typename Traits::Received;
  static constexpr int kConsumerThreads = 128 * Traits::kConsumers;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVectors = kHeadDim / 4;  // of a row; a thread's unit of work
  // Rows that a CTA keeps need not go through the network between SMs, which many rows keep busy for a microsecond. With few
  // rows the branch costs more.
  static constexpr bool kKeepsOwn = Traits::kConsumers == 2;

  const Gates<Traits>& gates;
  const int warpgroup, thread;

  __device__ __forceinline__ int consumer() const { return warpgroup * 128 + thread; }
  __device__ __forceinline__ void sync_consumers() const {
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  }
  __device__ __forceinline__ void finish_gates(int thread) const {
    gates.finish(gates.text_begin(), gates.text_end(), gates.shared.gate, thread, kConsumerThreads);
  }

  // Bytes of the parts that come from other CTAs.
  static __device__ __forceinline__ int received_bytes(const Gates<Traits>& gates) {
    return (gates.unit.size - kKeepsOwn) * gates.num_rows * (kHeadDim + 2) * 4;
  }

  // By all consumer threads. While the last product runs, which reads the last slot: the first ones may now receive.
  __device__ __forceinline__ void prepare() const {
    __syncwarp();
    if (thread % 32 < gates.unit.size) ptx::mbarrier_arrive_at(&gates.shared.peers_ready, thread % 32);
    ptx::mbarrier_wait(&gates.shared.places_full, 0);
    if (gates.p.state != nullptr) gates.fetch_state(gates.shared.state, 0, gates.num_rows, consumer(), kConsumerThreads);
  }

  // Maxima of `rows` are in log2 units.
  __device__ __forceinline__ void run(const RowState<Traits>& rows) const {
    ptx::mbarrier_wait(&gates.shared.peers_ready, 0);
    send(rows);
    cp_async_wait<0>();
    ptx::mbarrier_wait(&gates.shared.gate_full, 0);
    ptx::mbarrier_wait(&gates.shared.parts_full, 0);
    sync_consumers();

    if (gates.unit.num_groups == 1) {
      add<false>(gates.unit.size);
    } else {
      leave_partial();
      if (arrive_last()) add<true>(gates.unit.num_groups);
    }
  }

  __device__ __forceinline__ void send(const RowState<Traits>& rows) const {
    Shared& shared = gates.shared;
    const Unit& unit = gates.unit;
    const int lane = thread % 32, warpgroup_row = thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (warpgroup_row + 8 * r >= gates.num_rows_of(warpgroup)) continue;
      const int row = gates.first_row_of(warpgroup) + warpgroup_row + 8 * r, owner = row >> gates.share_bits;
      const int slot = ((unit.rank - owner) << gates.share_bits) + row;
      if (kKeepsOwn && owner == unit.rank) {
        float4* out = &shared.received.out[Received::cell(slot, lane % 4)];
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
          const float* x = rows.out + 8 * i + 2 * r;
          out[i * 32] = make_float4(x[0], x[1], x[4], x[5]);
        }
        if (lane % 4 == 0) shared.received_stats[slot] = make_float2(rows.max[r], rows.sum[r]);
        continue;
      }
      const uint32_t out = ptx::peer_address(&shared.received.out[Received::cell(slot, lane % 4)], owner);
      const uint32_t bar = ptx::peer_address(&shared.parts_full, owner);
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const float* x = rows.out + 8 * i + 2 * r;
        ptx::store_peer4(out + i * 32 * sizeof(float4), bar, make_float4(x[0], x[1], x[4], x[5]));
      }
      if (lane % 4 == 0) {
        const uint32_t stats = ptx::peer_address(&shared.received_stats[slot], owner);
        ptx::store_peer2(stats, bar, rows.max[r], rows.sum[r]);
      }
    }
  }

  // A vector of an own row over the unit's parts (shared memory) or over its groups (global memory), in order.
  template <bool kOverGroups>
  __device__ __forceinline__ Sum sum_over(int row, int vector, int count) const {
    const Shared& shared = gates.shared;
    const auto stats = [&](int i) {
      return kOverGroups ? __ldcg(partial_stats(i) + row) : shared.received_stats[(i << gates.share_bits) + row];
    };
    const auto values = [&](int i) {
      return kOverGroups ? __ldcg(partial_out(i) + row * kVectors + vector)
                         : shared.received.out[Received::cell((i << gates.share_bits) + row, vector)];
    };
    Sum sum;
    constexpr int kLoads = 8;  // in flight together
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
      }
      sum.add(s, x);
    }
    return sum;
  }

  template <bool kOverGroups>
  __device__ __forceinline__ void add(int count) const {
    Shared& shared = gates.shared;
    const int total = gates.num_rows * kVectors;
#pragma unroll 1
    for (int first = 0; first < total; first += kConsumerThreads) {
      const int index = first + consumer(), row = index / kVectors, vector = index % kVectors;
      Sum sum;
      if (index < total) sum = sum_over<kOverGroups>(row, vector, count);
      if (kOverGroups && first == 0) {  // the last threads have no rows of a decode tile: they form its gates meanwhile
        if (gates.p.state != nullptr) finish_gates(kConsumerThreads - 1 - consumer());
        sync_consumers();
      }
      if (index >= total) continue;
      const auto& place = shared.place[row];
      store_result<Traits>(gates.p, place, row, vector, sum, shared.state, shared.gate[place.gate]);
    }
  }

  // ---- groups, through global memory

  __device__ __forceinline__ void leave_partial() const {
    const Unit& unit = gates.unit;
#pragma unroll 1
    for (int index = consumer(); index < gates.num_rows * kVectors; index += kConsumerThreads) {
      const int row = index / kVectors, vector = index % kVectors;
      const Sum sum = sum_over<false>(row, vector, unit.size);
      __stcg(partial_out(unit.group) + index, sum.total);
      if (vector == 0) __stcg(partial_stats(unit.group) + row, sum.merged);
    }
  }
  __device__ __forceinline__ int64_t partial_row(int group) const {
    return (gates.unit.first_part + group) * Traits::kBlockM + gates.first_row;
  }
  __device__ __forceinline__ float4* partial_out(int group) const {
    return reinterpret_cast<float4*>(gates.plan.partial_out) + partial_row(group) * kVectors;
  }
  __device__ __forceinline__ float2* partial_stats(int group) const {
    return reinterpret_cast<float2*>(gates.plan.partial_stats) + partial_row(group);
  }

  __device__ __forceinline__ bool arrive_last() const {
    sync_consumers();
    if (consumer() == 0) {
      // One thread arrives for all that synchronised with it: releases what they wrote, acquires what others wrote.
      int32_t* counter = gates.plan.counters + gates.unit.index * gates.plan.cluster_size + gates.unit.rank;
      gates.shared.has_arrived[0] = ptx::add_acquire_release(counter, 1) == gates.unit.num_groups - 1;
      if (gates.shared.has_arrived[0]) *counter = 0;  // ready for the next launch, so that a CUDA graph can replay
    }
    sync_consumers();
    return gates.shared.has_arrived[0];
  }
};

}  // namespace slowfast::cuda
