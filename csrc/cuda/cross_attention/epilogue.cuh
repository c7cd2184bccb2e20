// What both epilogues share: which rows a CTA has, their gates and their state.
// Epilogues run once a CTA, from a cold instruction cache: loops are kept rolled, and latency is hidden by asking early
// rather than by unrolling.
#pragma once
#include "../common/memory.cuh"
#include "../common/reduce.cuh"
#include "launch.h"
#include "mainloop.cuh"

namespace slowfast::cuda {

struct Tile {
  int text_begin;  // of the sequence, in text_rows
  int row_begin;   // of the tile, in packed rows of the sequence
  int num_rows;    // packed rows in the tile
  int slow_begin;  // the sequence's first slow token
  int num_slow;    // slow tokens of the sequence
};

// One tile of one KV head, and the CTA's place among those that work on it: a group is a cluster, be it of one CTA.
struct Unit {
  int64_t index;   // in the workspace: counts the units that groups share
  int64_t first_part;  // of its groups in the workspace
  int kv_head;     // the first of two if paired
  int group;       // of this CTA
  int num_groups;  // that work on the unit
  int long_blocks; // if kGeneral: as in the plan, of this unit
  int size;        // CTAs of a group: the cluster
  int rank;        // of this CTA in its cluster
  bool is_cut_alike;  // as all units are, by the plan; else the device has cut it
  bool paired;     // the rows of the tile, 64 or fewer, of this KV head and then of the next: a warpgroup for each
};

// The text row of a packed row, without a division.
__device__ __forceinline__ int text_of(const SplitPlan& plan, int packed) {
  return plan.heads_per_kv == 1 ? packed : __umulhi(packed, plan.heads_per_kv_reciprocal);
}

// What a part with its own maximum counts for in a sum with a common one.
__device__ __forceinline__ float weight_of(float max_log2, float merged_log2) {
  return max_log2 == -INFINITY ? 0.0f : exp2_approx(max_log2 - merged_log2);
}

// 16-byte chunks of a row of state in shared memory; rows that lie 8 apart share a bank group.
template <typename Traits>
__device__ __forceinline__ typename Traits::Element* state_cell(typename Traits::Element* base, int row, int column) {
  static_assert(Traits::kHeadDim % 64 == 0, "the exchange of chunks would reach into the next row");
  return base + row * Traits::kHeadDim + (((column / 8) ^ (row % 8)) * 8) + column % 8;
}

// Where packed row `packed` of a sequence goes, for one of the query heads of `kv_head`.
template <typename Traits>
__device__ __forceinline__ typename Traits::RowPlace place_of(const CrossAttentionParams& p, const SplitPlan& plan,
                                                              const Tile& tile, int kv_head, int packed) {
  const int text = text_of(plan, packed);
  const int64_t text_index = tile.text_begin + text, head = kv_head * plan.heads_per_kv + packed - text * plan.heads_per_kv;
  const int64_t row = p.text_rows[text_index], channels = static_cast<int64_t>(p.num_q_heads) * Traits::kHeadDim;
  return {row * p.state_row_stride + head * Traits::kHeadDim, row * channels + head * Traits::kHeadDim,
          text_index * channels + head * Traits::kHeadDim, text_index * p.num_q_heads + head,
          text - text_of(plan, tile.row_begin)};
}

template <typename Traits>
__device__ __forceinline__ void store_lse(const CrossAttentionParams& p, int64_t place, float2 merged) {
  constexpr float kLn2 = 0.6931471805599453f;
  if (p.lse != nullptr) p.lse[place] = merged.x == -INFINITY ? -INFINITY : (merged.x + log2f(merged.y)) * kLn2;
}

// Places and gates of a CTA's rows, by three warps that have nothing else to do.
template <typename Traits>
struct Gates {
  using T = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kHeadDim = Traits::kHeadDim;

  static constexpr int kGateLoads = Traits::kConsumers == 1 ? 5 : 3;  // in flight together, by what registers allow
  static constexpr int kHelperLoads = 3;

  const CrossAttentionParams& p;
  const SplitPlan& plan;
  Shared& shared;
  const Tile& tile;
  const Unit& unit;
  const int total_rows;  // of the unit
  const int share_bits;  // each CTA owns 2^share_bits of the unit's rows
  const int first_row;   // of this CTA's rows, in the unit's
  const int num_rows;    // that this CTA owns

  static __device__ __forceinline__ Gates make(const CrossAttentionParams& p, const SplitPlan& plan, Shared& shared,
                                               const Tile& tile, const Unit& unit) {
    const int total = tile.num_rows * (unit.paired ? 2 : 1);
    const auto log2_of = [](int x) { return 32 - __clz(x - 1); };  // rounded up
    const int share_bits = max(0, log2_of(total) - log2_of(unit.size)), first_row = min(total, unit.rank << share_bits);
    return {p, plan, shared, tile, unit, total, share_bits, first_row, min(1 << share_bits, total - first_row)};
  }

  // Rows of the unit that a warpgroup holds.
  __device__ __forceinline__ int first_row_of(int warpgroup) const {
    return min(total_rows, warpgroup * (unit.paired ? tile.num_rows : 64));
  }
  __device__ __forceinline__ int num_rows_of(int warpgroup) const {
    return min(unit.paired ? tile.num_rows : 64, total_rows - first_row_of(warpgroup));
  }
  __device__ __forceinline__ bool is_next_kv_head(int row) const { return unit.paired && row >= tile.num_rows; }
  __device__ __forceinline__ int packed(int row) const {  // packed row of the sequence
    return tile.row_begin + row - (is_next_kv_head(row) ? tile.num_rows : 0);
  }

  // Text rows are counted from the tile's first; those of this CTA's rows are text_begin() .. text_end().
  __device__ __forceinline__ int tile_text() const { return text_of(plan, tile.row_begin); }
  __device__ __forceinline__ int text(int row) const { return text_of(plan, packed(row)) - tile_text(); }
  __device__ __forceinline__ bool spans_kv_heads() const {
    return !is_next_kv_head(first_row) && is_next_kv_head(first_row + num_rows - 1);
  }
  __device__ __forceinline__ int text_begin() const { return num_rows == 0 || spans_kv_heads() ? 0 : text(first_row); }
  __device__ __forceinline__ int text_end() const {
    return num_rows == 0 ? 0 : text(spans_kv_heads() ? tile.num_rows - 1 : first_row + num_rows - 1) + 1;
  }
  __device__ __forceinline__ const T* state_row(int text) const {
    const int64_t row = p.text_rows[tile.text_begin + tile_text() + text];
    return static_cast<const T*>(p.state) + row * p.state_row_stride;
  }
  __device__ __forceinline__ float* workspace() const {
    return plan.partial_gates + (unit.index * plan.cluster_size + unit.rank) * Traits::kBlockM * Traits::kGateWarps;
  }
  // Where the dots of this unit's text rows are: groups share out the rows and leave their dots to the last of them.
  __device__ __forceinline__ float* dots() const {
    return unit.num_groups == 1 ? shared.gate_parts[0] : workspace();
  }

  // The groups among which the rows are shared out. A short group has no time for them: its CTAs are the many that run one
  // after another, and gates take longer than their few KV blocks.
  __device__ __forceinline__ bool has_short_group() const {
    if constexpr (Traits::kGeneral) return unit.num_groups > 1 && unit.long_blocks > 0;
    return unit.num_groups > 1 && plan.long_blocks > 0 && (!Traits::kCutsOnDevice || unit.is_cut_alike);
  }
  __device__ __forceinline__ int gate_groups() const { return unit.num_groups - has_short_group(); }
  __device__ __forceinline__ bool forms_gates() const { return p.state != nullptr && unit.group < gate_groups(); }
  __device__ __forceinline__ bool forms_all_gates() const { return forms_gates() && gate_groups() == 1; }

  // Rows of state that the gates need, into L2 before the KV stream takes all of the memory's queue.
  __device__ __forceinline__ void prefetch(int thread) const {
    const int bytes = p.num_q_heads * kHeadDim * static_cast<int>(sizeof(T)), lane = thread % 32, end = text_end();
    const int step = gate_groups();
    for (int first = text_begin() + unit.group; first < end; first += 32 * step) {
      const int mine = first + lane * step;  // a lane reads the index of a row: they arrive together
      const T* row = mine < end ? state_row(mine) : nullptr;
      for (int i = 0; i < 32 && first + i * step < end; ++i) {
        const char* start = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(row), i));
        for (int offset = thread * 128; offset < bytes; offset += 32 * Traits::kGateWarps * 128) {
          ptx::prefetch_l2(start + offset);
        }
      }
    }
  }

  __device__ void prepare(int warp, int lane) const {
    // Few rows go ahead of Q; many would hold it up.
    const bool are_few = text_end() - text_begin() <= 8, fetches = forms_gates() && !plan.gates_first;
    if (fetches && are_few) prefetch(warp * 32 + lane);
    if (warp == 0 && lane == 0 && p.state != nullptr) shared.gate_function = Gate(p.gate, GateScalars(p.gate, p.gate.weight != nullptr));
    for (int i = warp * 32 + lane; i < num_rows; i += 32 * Traits::kGateWarps) {
      const int kv_head = unit.kv_head + is_next_kv_head(first_row + i);
      shared.place[i] = place_of<Traits>(p, plan, tile, kv_head, packed(first_row + i));
    }
    ptx::mbarrier_arrive(&shared.places_full);
    if (forms_gates()) {
      if (fetches && !are_few) prefetch(warp * 32 + lane);
      if (shares_items()) {
        take_items<kGateLoads>(lane);
        while (*static_cast<volatile int*>(&shared.gate_items_done) < num_items()) {
        }
        __threadfence_block();
      } else if (p.gate.weight != nullptr) {
        form_dots(warp, lane);
      }
    }
    if (forms_all_gates()) {
      ptx::named_barrier_sync(kGatesBarrier, 32 * Traits::kGateWarps);
      finish(text_begin(), text_end(), shared.gate, warp * 32 + lane, 32 * Traits::kGateWarps);
    }
    ptx::mbarrier_arrive(&shared.gate_full);
  }

  // Dots of the state rows with the gate's weight, a third of C a warp.
  __device__ __forceinline__ void form_dots(int warp, int lane) const {
    const int end = text_end(), step = gate_groups();
    for (int text = text_begin() + unit.group; text < end; text += 2 * step) form_pair<kGateLoads>(text, step, warp, lane);
  }

  // Of a tile that one CTA has to itself, warps take what is next: of two text rows, a third of C. Over a short sequence the
  // consumers are done long before three warps have formed the gates of a full tile, and then help.
  __device__ __forceinline__ bool shares_items() const {
    return Traits::kConsumers == 2 && !Traits::kGeneral && unit.size == 1 && p.gate.weight != nullptr && forms_all_gates();
  }
  __device__ __forceinline__ int num_items() const { return (text_end() - text_begin() + 1) / 2 * Traits::kGateWarps; }
  template <int kLoads>
  __device__ __forceinline__ void take_items(int lane) const {
    while (true) {
      int item = 0;
      if (lane == 0) item = atomicAdd(&shared.gate_items, 1);
      item = __shfl_sync(0xffffffffu, item, 0);
      if (item >= num_items()) return;
      const int pair = item / Traits::kGateWarps;
      form_pair<kLoads>(text_begin() + 2 * pair, 1, item - pair * Traits::kGateWarps, lane);
      if (lane == 0) {  // who wrote the dots
        __threadfence_block();
        atomicAdd(&shared.gate_items_done, 1);
      }
    }
  }

  // Of text rows `text` and text + step, the third of C that is number `part`, with so many loads in flight.
  template <int kLoads>
  __device__ __forceinline__ void form_pair(int text, int step, int part, int lane) const {
    const int next = text + step;
    const T* states[2] = {state_row(text), next < text_end() ? state_row(next) : nullptr};
    float dots[2] = {0.0f, 0.0f};  // what this lane has of them
    if (p.gate.dtype == DType::kFloat32) {
      multiply_by_floats(dots, states, part * 32 + lane);
    } else {
      multiply_by_halves<kLoads>(dots, states, part * 32 + lane);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float dot = warp_sum(dots[j]);
      if (lane == 0 && states[j] != nullptr) this->dots()[(j == 0 ? text : next) * Traits::kGateWarps + part] = dot;
    }
  }

  __device__ __forceinline__ int num_vectors() const { return p.num_q_heads * kHeadDim / 8; }  // of 8 channels
  __device__ __forceinline__ uint4 state_vector(const T* row, int vector) const {
    return row != nullptr && vector < num_vectors() ? __ldg(reinterpret_cast<const uint4*>(row) + vector)
                                                    : make_uint4(0, 0, 0, 0);
  }
  // By tensor cores: a fifth of the instructions, which compete with those of the main loop. Of A (16 x 16), row s takes slice
  // s of one text row's channels and row 8 + s the same slice of the next one's, and column s of B (16 x 8) that slice of the
  // weight; the dots are the two diagonals' sums. `vector` is a lane's first. All lanes of a warp go round equally often.
  template <int kLoads>
  __device__ __forceinline__ void multiply_by_halves(float (&dots)[2], const T* const (&states)[2], int vector) const {
    constexpr int kStep = 32 * Traits::kGateWarps;
    float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int end = num_vectors();
    for (int lane = vector % 32; vector - lane < end; vector += kStep * kLoads) {
      uint4 a[kLoads], b[kLoads], weight[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int mine = vector + i * kStep;
        a[i] = state_vector(states[0], mine);
        b[i] = state_vector(states[1], mine);
        weight[i] = __ldg(static_cast<const uint4*>(p.gate.weight) + min(mine, end - 1));
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        ptx::mma_16x8x16<T>(products, {a[i].x, b[i].x, a[i].y, b[i].y}, {weight[i].x, weight[i].y});
        ptx::mma_16x8x16<T>(products, {a[i].z, b[i].z, a[i].w, b[i].w}, {weight[i].z, weight[i].w});
      }
    }
    const int lane = vector % 32;  // a lane has columns 2 (lane % 4) and the one after it of rows lane / 4 and 8 + lane / 4
    if (lane % 4 != lane / 8) return;
    dots[0] = lane % 8 < 4 ? products[0] : products[1];
    dots[1] = lane % 8 < 4 ? products[2] : products[3];
  }

  __device__ __forceinline__ void multiply_by_floats(float (&dots)[2], const T* const (&states)[2], int vector) const {
#pragma unroll 1
    for (const int end = num_vectors(); vector < end; vector += 32 * Traits::kGateWarps) {
      float w[8];
      load_floats(p.gate.weight, vector, w);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x[8];
        unpack<T>(state_vector(states[j], vector), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) dots[j] = fmaf(x[i], w[i], dots[j]);
      }
    }
  }

  // Gates of text rows first .. end into target[first ..]; the caller's next barrier publishes them.
  __device__ __forceinline__ void finish(int first, int end, float* target, int thread, int threads) const {
    const Gate gate = shared.gate_function;
    for (int i = first + thread; i < end; i += threads) {
      const float* dot = dots() + i * Traits::kGateWarps;
      target[i] = p.gate.weight != nullptr ? gate.weighted((dot[0] + dot[1]) + dot[2])
                                           : gate.unweighted(tile.text_begin + tile_text() + i);
    }
  }

  // The columns of state that the mix needs, of rows first .. first + count of this CTA's, into `cells`.
  __device__ __forceinline__ void fetch_state(T* cells, int first, int count, int thread, int threads) const {
    constexpr int kChunks = kHeadDim / 8;
    const uint64_t policy = evict_first_policy();
#pragma unroll 1
    for (int i = thread; i < count * kChunks; i += threads) {
      const int row = i / kChunks, column = i % kChunks * 8;
      const T* source = static_cast<const T*>(p.state) + shared.place[first + row].state + column;
      cp_async_16(shared_address(state_cell<Traits>(cells, row, column)), source, policy);
    }
    cp_async_commit();
  }
};

}  // namespace slowfast::cuda
