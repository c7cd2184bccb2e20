// Without a cluster a warpgroup goes its own way, with no barrier between the two, and its rows stay in registers until
// the result is formed. Where groups share the slow tokens of a tile, their parts meet in a binary tree: of two
// neighbours, the first to arrive leaves its rows in global memory and is done, the second adds them to its own and goes
// on to the next level. A last arrival thus reads log2(groups) parts and not all of them; the sums are the same whoever
// comes last.
#pragma once
#include "epilogue.cuh"

namespace slowfast::cuda {

template <typename Traits>
struct DirectEpilogue {
  using T = typename Traits::Element;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVectors = kHeadDim / 16;  // float4 of a row that a thread holds

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
    if (gates.unit.paired) return gates.shared.slots[warpgroup * kSlots + 2 * num_blocks % kSlots];
    return gates.shared.query(warpgroup);
  }
  // By text row of the tile. Formed by the gate warps, or, where groups share them out, by each warpgroup for itself.
  __device__ __forceinline__ float* gate() const {
    return gates.shared.gate + (gates.forms_all_gates() ? 0 : warpgroup * 64 - text(0));
  }
  __device__ __forceinline__ int text(int row) const {  // of a row of this warpgroup, from the tile's first
    return gates.text(first_row() + row);
  }
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(1 + warpgroup, 128); }
  __device__ __forceinline__ void fetch_state() const {
    gates.fetch_state(cells(), first_row(), num_rows(), thread, 128);
  }

  // Once Q is no longer read: the state comes into its place while the last product runs.
  __device__ __forceinline__ void prepare() const {
    if (!gates.forms_all_gates()) return;  // or likely not the last of its groups
    sync();  // all four warps are done with Q
    ptx::mbarrier_wait(&gates.shared.gate_full, 0);
    fetch_state();
  }

  // Maxima of `rows` are in log2 units.
  __device__ __forceinline__ void run(RowState<Traits>& rows) const {
    ptx::mbarrier_wait(&gates.shared.gate_full, 0);
    if (num_rows() == 0) return;
    if (gates.unit.num_groups > 1) {
      if (!climb(rows)) return cp_async_wait<0>();
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
    return (gates.unit.index * Traits::kConsumers + warpgroup) * gates.plan.num_groups + group;
  }
  __device__ __forceinline__ float4* partial_out(int group, int r) const {
    return reinterpret_cast<float4*>(gates.plan.partial_out) + (slot(group) * 2 + r) * kVectors * 128 + thread;
  }
  __device__ __forceinline__ float2* partial_stats(int group, int r) const {
    return reinterpret_cast<float2*>(gates.plan.partial_stats) + slot(group) * 64 + row(r);
  }

  // True for the last to arrive of all groups, whose `rows` then hold the sum.
  __device__ __forceinline__ bool climb(RowState<Traits>& rows) const {
    const int group = gates.unit.group, num_groups = gates.unit.num_groups;
#pragma unroll 1
    for (int width = 1; width < num_groups; width *= 2) {  // `rows` is the sum of groups left .. left + width
      const int mine = group / width * width, other = mine ^ width;
      if (other >= num_groups) continue;  // no neighbour at this level
      if (!meet(rows, mine, gates.plan.counters + slot(mine | width))) return false;
      add(rows, other, other < mine);
    }
    return true;
  }

  // A short group is done long before its neighbour, and need not look.
  __device__ __forceinline__ bool is_short() const { return gates.unit.group == gates.gate_groups(); }

  // False for the first of two, who leaves its part; true for the second. One thread arrives for the warpgroup: with the
  // barriers it releases what all its threads and the gate warps wrote, and acquires what the neighbour's wrote.
  __device__ __forceinline__ bool meet(const RowState<Traits>& rows, int mine, int32_t* counter) const {
    volatile int& second = gates.shared.is_last[warpgroup];
    bool result = false;
    if (!is_short()) {
      if (thread == 0) second = ptx::load_acquire(counter) != 0;
      sync();
      result = second;
    }
    if (!result) {
      leave(rows, mine);
      sync();
      if (thread == 0) second = ptx::add_acquire_release(counter, 1) != 0;
      sync();
      result = second;
    }
    if (result && thread == 0) *counter = 0;  // ready for the next launch, so that a CUDA graph can replay
    sync();  // before `second` is written again
    return result;
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

  // The lower groups come first in every sum, so that the bits do not depend on who does it.
  __device__ __forceinline__ void add(RowState<Traits>& rows, int other, bool other_first) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= num_rows()) continue;
      float4 theirs[kVectors];
      const float2 stats = __ldcg(partial_stats(other, r));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) theirs[i] = __ldcg(partial_out(other, r) + i * 128);
      const float peak = fmaxf(rows.max[r], stats.x);
      const float w = weight_of(rows.max[r], peak), v = weight_of(stats.x, peak);
      const auto merge = [&](float x, float y) { return other_first ? fmaf(y, v, x * w) : fmaf(x, w, y * v); };
      rows.max[r] = peak;
      rows.sum[r] = merge(rows.sum[r], stats.y);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float* x = rows.out + 8 * i + 2 * r;
        x[0] = merge(x[0], theirs[i].x);
        x[1] = merge(x[1], theirs[i].y);
        x[4] = merge(x[4], theirs[i].z);
        x[5] = merge(x[5], theirs[i].w);
      }
    }
  }
};

}  // namespace slowfast::cuda
