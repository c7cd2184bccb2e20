// Without a cluster a warpgroup goes its own way, with no barrier between the two, and its rows stay in registers until
// the result is formed. Where groups share the slow tokens of a tile, their parts meet in a binary tree: of two
// neighbours, the first to arrive leaves its rows in global memory and is done, the second adds them to its own and goes
// on to the next level. A last arrival thus reads log2(groups) parts and not all of them; the sums are the same whoever
// comes last. A part that is there before the main loop ends is read under its last product.
#pragma once
#include "epilogue.cuh"

namespace slowfast::cuda {

template <typename Traits>
struct DirectEpilogue {
  using T = typename Traits::Element;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVectors = kHeadDim / 16;  // float4 of a row that a thread holds

  // What a neighbour left of one of a thread's rows.
  struct Part {
    float2 stats;  // maximum (log2 units) and sum
    float4 out[kVectors];
  };
  // What it left of both rows, if it has been read already.
  struct Neighbour {
    bool is_there = false;
    Part parts[2];
  };
  // Two warpgroups have registers to spare for it while the last product runs.
  static constexpr bool kLooksEarly = Traits::kConsumers == 2;

  const Gates<Traits>& gates;
  const int warpgroup, thread, num_blocks;

  // The warpgroup's rows in the unit, 64 or fewer; a thread holds row(0) and row(1).
  __device__ __forceinline__ int first_row() const { return gates.first_row_of(warpgroup); }
  __device__ __forceinline__ int num_rows() const { return gates.num_rows_of(warpgroup); }
  __device__ __forceinline__ int row(int r) const { return thread / 32 * 16 + thread % 32 / 4 + 8 * r; }
  __device__ __forceinline__ bool mixes() const { return gates.p.state != nullptr; }
  // In the place of Q, or, where that belongs to a ring, in the slot of the warpgroup's ring that it would take next.
  __device__ __forceinline__ T* cells() const {
    constexpr int kSlots = Traits::kHalfRingSlots;
    if (gates.unit.paired) return gates.shared.slots[warpgroup == 0 ? 0 : kSlots + 2 * num_blocks % kSlots];
    return gates.shared.query(warpgroup);
  }
  // By text row of the tile. Formed by the gate warps, or, where groups share them out, by each warpgroup for itself.
  __device__ __forceinline__ float* gate() const {
    return gates.shared.gate + (gates.forms_all_gates() ? 0 : warpgroup * 64 - text(0));
  }
  __device__ __forceinline__ int text(int row) const {  // of a row of this warpgroup, from the tile's first
    return gates.text(first_row() + row);
  }
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup, 128); }
  __device__ __forceinline__ void fetch_state() const {
    gates.fetch_state(cells(), first_row(), num_rows(), thread, 128);
  }

  // By the producer's thread, once it has nothing else to do: has the neighbour left its part already?
  static __device__ __forceinline__ void look(const Gates<Traits>& gates) {
    if constexpr (kLooksEarly) {
      if (gates.unit.num_groups == 1) return;
#pragma unroll
      for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
        const DirectEpilogue of = {gates, warpgroup, 0, 0};
        const bool looks = of.has_neighbour(1) && !of.is_short() && of.num_rows() > 0;
        gates.shared.is_neighbour_there[warpgroup] = looks && ptx::load_acquire(of.counter(1)) != 0;
      }
      ptx::mbarrier_arrive(&gates.shared.looked);
    }
  }

  // While the last product runs: what a neighbour has left comes into the registers of the scores, and, of a group that is
  // likely the last to arrive, the state into the place of Q.
  __device__ __forceinline__ void prepare(Neighbour& neighbour) const {
    if (kLooksEarly && gates.unit.num_groups > 1) {
      ptx::mbarrier_wait(&gates.shared.looked, 0);
      neighbour.is_there = gates.shared.is_neighbour_there[warpgroup];
      if (neighbour.is_there) {
#pragma unroll
        for (int r = 0; r < 2; ++r) load(neighbour.parts[r], gates.unit.group ^ 1, r);
      }
    }
    if (!gates.forms_all_gates()) return;
    sync();  // all four warps are done with Q
    ptx::mbarrier_wait(&gates.shared.places_full, 0);
    fetch_state();
  }

  // Maxima of `rows` are in log2 units.
  __device__ __forceinline__ void run(RowState<Traits>& rows, Neighbour& neighbour) const {
    if (gates.shares_items()) gates.template take_items<Gates<Traits>::kHelperLoads>(thread % 32);
    ptx::mbarrier_wait(&gates.shared.gate_full, 0);
    if (num_rows() == 0) return;
    if (gates.unit.num_groups > 1) {
      if (!climb(rows, neighbour)) return cp_async_wait<0>();
      if (mixes() && !gates.forms_all_gates()) {
        fetch_state();
        gates.finish(text(0), text(num_rows() - 1) + 1, gate(), thread, 128);
      }
    }
    if (mixes()) {
      cp_async_wait<0>();
      sync();
      emit<true>(rows);
    }
    if (gates.p.context != nullptr) emit<false>(rows);
  }

  // From registers through the rows' cells in shared memory, so that global memory sees whole 16-byte chunks in order.
  template <bool kMixed>
  __device__ __forceinline__ void emit(const RowState<Traits>& rows) const {
    const CrossAttentionParams& p = gates.p;
    const auto* place = gates.shared.place + first_row();
    const int lane = thread % 32, count = num_rows();
    sync();  // the cells are free: of Q, or of the mixed rows
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= count) continue;
      const float2 merged = make_float2(rows.max[r], rows.sum[r]);
      const float inverse = merged.x == -INFINITY ? 0.0f : 1.0f / merged.y;
      const float g = kMixed ? gate()[place[row(r)].gate] : 0.0f;
      if (lane % 4 == 0 && (kMixed || !mixes())) store_lse<Traits>(p, place[row(r)].lse, merged);
      if (kMixed && merged.x == -INFINITY) continue;  // the cells have the result: the state, bit for bit
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        uint32_t* cell = reinterpret_cast<uint32_t*>(state_cell<Traits>(cells(), row(r), 8 * i + 2 * (lane % 4)));
        float x = rows.out[4 * i + 2 * r] * inverse, y = rows.out[4 * i + 2 * r + 1] * inverse;
        if (kMixed) {
          const float2 state = unpack2<T>(*cell);
          x = fmaf(g, x, state.x);
          y = fmaf(g, y, state.y);
        }
        *cell = pack2<T>(x, y);
      }
    }
    sync();
    constexpr int kChunks = kHeadDim / 8;
    T* target = static_cast<T*>(kMixed ? p.out : p.context);
#pragma unroll 1
    for (int i = thread; i < count * kChunks; i += 128) {
      const int row = i / kChunks, column = i % kChunks * 8;
      const int64_t offset = (kMixed ? place[row].out : place[row].context) + column;
      *reinterpret_cast<uint4*>(target + offset) =
          *reinterpret_cast<const uint4*>(state_cell<Traits>(cells(), row, column));
    }
  }

  // ---- groups: [unit][warpgroup][group] has a counter and a place for a part, which a thread fills as it holds it

  __device__ __forceinline__ int64_t slot(int group) const {
    const Unit& unit = gates.unit;
    return unit.first_part * Traits::kConsumers + warpgroup * unit.num_groups + group;
  }
  __device__ __forceinline__ float4* partial_out(int group, int r) const {
    return reinterpret_cast<float4*>(gates.plan.partial_out) + (slot(group) * 2 + r) * kVectors * 128 + thread;
  }
  __device__ __forceinline__ float2* partial_stats(int group, int r) const {
    return reinterpret_cast<float2*>(gates.plan.partial_stats) + slot(group) * 64 + row(r);
  }

  // At a level of the tree, `width` groups, this one among them, meet as many others, if there are any.
  __device__ __forceinline__ int left(int width) const { return gates.unit.group / width * width; }
  __device__ __forceinline__ bool has_neighbour(int width) const { return (left(width) ^ width) < gates.unit.num_groups; }
  __device__ __forceinline__ int32_t* counter(int width) const { return gates.plan.counters + slot(left(width) | width); }
  // A short group is done long before its neighbour, and need not look.
  __device__ __forceinline__ bool is_short() const { return gates.unit.group == gates.gate_groups(); }

  // True for the last to arrive of all groups, whose `rows` then hold the sum.
  __device__ __forceinline__ bool climb(RowState<Traits>& rows, Neighbour& neighbour) const {
#pragma unroll 1
    for (int width = 1; width < gates.unit.num_groups; width *= 2) {  // `rows` is the sum of groups left .. left + width
      if (!has_neighbour(width)) continue;
      const int mine = left(width), other = mine ^ width;
      const bool is_loaded = kLooksEarly && neighbour.is_there;
      if (!is_loaded && !meet(rows, mine, counter(width), width > 1 || !kLooksEarly)) return false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Part here;  // one row after the other, where registers are few
        Part& part = kLooksEarly ? neighbour.parts[r] : here;
        if (!is_loaded) load(part, other, r);
        add(rows, part, r, other < mine);
      }
      neighbour.is_there = false;
      if (thread == 0) *counter(width) = 0;  // ready for the next launch, so that a CUDA graph can replay
      sync();  // before `arrived` is written again
    }
    return true;
  }

  // False for the first of two, who leaves its part; true for the second. One thread arrives for the warpgroup: with the
  // barriers it releases what all its threads and the gate warps wrote, and acquires what the neighbour's wrote.
  __device__ __forceinline__ bool meet(const RowState<Traits>& rows, int mine, int32_t* counter, bool looks) const {
    volatile int& arrived = gates.shared.has_arrived[warpgroup];
    if (looks) {
      if (thread == 0) arrived = ptx::load_acquire(counter) != 0;
      sync();
      if (arrived) return true;
    }
    leave(rows, mine);
    sync();
    if (thread == 0) arrived = ptx::add_acquire_release(counter, 1) != 0;
    sync();
    return arrived;
  }

  __device__ __forceinline__ void leave(const RowState<Traits>& rows, int mine) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= num_rows()) continue;
      if (thread % 4 == 0) __stcg(partial_stats(mine, r), make_float2(rows.max[r], rows.sum[r]));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float* x = rows.out + 8 * i + 2 * r;
        __stcg(partial_out(mine, r) + i * 128, make_float4(x[0], x[1], x[4], x[5]));
      }
    }
  }

  __device__ __forceinline__ void load(Part& part, int group, int r) const {
    if (row(r) >= num_rows()) return;
    part.stats = __ldcg(partial_stats(group, r));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part.out[i] = __ldcg(partial_out(group, r) + i * 128);
  }

  // The lower groups come first in every sum, so that the bits do not depend on who does it.
  __device__ __forceinline__ void add(RowState<Traits>& rows, const Part& part, int r, bool part_first) const {
    if (row(r) >= num_rows()) return;
    const float peak = fmaxf(rows.max[r], part.stats.x);
    const float w = weight_of(rows.max[r], peak), v = weight_of(part.stats.x, peak);
    const auto merge = [&](float x, float y) { return part_first ? fmaf(y, v, x * w) : fmaf(x, w, y * v); };
    rows.max[r] = peak;
    rows.sum[r] = merge(rows.sum[r], part.stats.y);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float* x = rows.out + 8 * i + 2 * r;
      x[0] = merge(x[0], part.out[i].x);
      x[1] = merge(x[1], part.out[i].y);
      x[4] = merge(x[4], part.out[i].z);
      x[5] = merge(x[5], part.out[i].w);
    }
  }
};

}  // namespace slowfast::cuda
