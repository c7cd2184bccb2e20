// The KV blocks of a CTA, and the thread or warp that asks TMA for them. `Producer` knows one run of tokens, all of which all
// rows see; `GeneralProducer` asks slow_tokens.cuh. The kernel uses either in the same way.
#pragma once
#include "slow_tokens.cuh"

namespace slowfast::cuda {

// The KV blocks of a CTA.
struct BlockRange {
  int begin, end;
};

template <typename Traits>
__device__ __forceinline__ BlockRange find_blocks(const SplitPlan& plan, const Unit& unit, int total) {
  const int splits = unit.size * unit.num_groups, split = unit.group * unit.size + unit.rank;
  if (splits == 1) return {0, total};
  const auto in_long_groups = [&](int each) -> BlockRange {
    const int begin = min(total, unit.group * each);
    return {begin, unit.group + 1 == unit.num_groups ? total : min(total, begin + each)};
  };
  if (Traits::kGeneral && unit.long_blocks > 0) {
    int each = unit.long_blocks;
    if (unit.is_cut_alike && plan.even_blocks > 0) {  // the plan's share of what there is
      each = __float2int_ru(__fdividef(static_cast<float>(each) * total, plan.even_blocks) - 1e-3f);
    }
    return in_long_groups(each);
  }
  if (Traits::kCutsOnDevice && !unit.is_cut_alike) {
    const int each = total / splits, rest = total - each * splits;  // the first ones get one more: the last may need a mask
    const auto begin_of = [&](int i) { return each * i + min(i, rest); };
    return {begin_of(split), begin_of(split + 1)};
  }
  if (!Traits::kGeneral && plan.long_blocks > 0) return in_long_groups(plan.long_blocks);
  int each = __umulhi(total, plan.splits_reciprocal);  // of each split's blocks, or one too many
  if (each * splits > total) --each;
  const int rest = total - each * splits;
  // Counted from the end, so that the last split, whose last block may need a mask, has none of the longer ones.
  const auto begin_of = [&](int i) {
    return total - each * (splits - i) - static_cast<int>(__umulhi(rest * (splits - i), plan.splits_reciprocal));
  };
  return {begin_of(split), begin_of(split + 1)};
}

// Where K and V lie: one map of both, or, if kGeneral, one of each.
template <typename Traits>
struct SlowMaps {
  CUtensorMap maps[Traits::kGeneral ? 2 : 1];
};

// Issues the KV blocks of a CTA, from the last to the first, so that the one block with a mask is peeled off the consumers'
// loop.
template <typename Traits>
struct Producer {
  using T = typename Traits::Element;
  static constexpr bool kLoadsTogether = Traits::kLoadsTogether;
  const CUtensorMap& kv_map;
  typename Traits::SharedStorage& shared;
  const Unit& unit;
  const BlockRange blocks;
  const int first_token;  // of the first block
  const int num_blocks;
  const int last_valid;   // tokens of the sequence in the last block
  const uint64_t policy;
  Ring rings[2] = {make_ring<Traits>(unit.paired, 0, num_blocks),
                   make_ring<Traits>(unit.paired, 1, num_blocks)};  // the second for paired units

  __device__ __forceinline__ Producer(const SlowMaps<Traits>& maps, const CrossAttentionParams& p, const SplitPlan& plan,
                                      typename Traits::SharedStorage& shared, const Tile& tile, const Unit& unit, int)
      : kv_map(maps.maps[0]), shared(shared), unit(unit),
        blocks(find_blocks<Traits>(plan, unit, (tile.num_slow + Traits::kBlockN - 1) / Traits::kBlockN)),
        first_token(tile.slow_begin + blocks.begin * Traits::kBlockN), num_blocks(blocks.end - blocks.begin),
        last_valid(min(Traits::kBlockN, tile.num_slow - (blocks.end - 1) * Traits::kBlockN)),
        policy(plan.kv_evict_first ? ptx::kEvictFirst : ptx::kEvictNormal) {}

  static constexpr bool is_idle = false;  // a sequence without slow tokens goes through the epilogue
  struct NoSight {};
  __device__ __forceinline__ NoSight row_sight(int, int) const { return {}; }

  __device__ __forceinline__ void load(int pair, int i, int which) {  // with kLoadsTogether, K and V
    const Ring::Turn turn = rings[which].next();
    ptx::mbarrier_wait(&shared.empty[turn.slot], turn.phase ^ 1);
    if (unit.paired && turn.slot == Traits::kRingSlots) ptx::mbarrier_wait(&shared.query_read, 0);
    uint64_t* full = &shared.full[turn.slot];
    ptx::mbarrier_expect_tx(full, Traits::kSlotSize * sizeof(T));
    ptx::tma_load_5d(&kv_map, full, shared.slots[turn.slot], 0, first_token + (num_blocks - 1 - i) * Traits::kBlockN, 0, pair,
                     unit.kv_head + which, policy);
  }
  __device__ __forceinline__ void load_k(int i) {
    load(0, i, 0);
    if (unit.paired) load(0, i, 1);
  }
  __device__ __forceinline__ void load_v(int i) {
    if (kLoadsTogether) return;
    load(1, i, 0);
    if (unit.paired) load(1, i, 1);
  }

  // One block goes ahead of the loads of Q, which would wait for microseconds behind a full stream.
  __device__ __forceinline__ void start() {
    if (num_blocks > 0) load_k(0);
  }
  __device__ __forceinline__ void finish() {
    for (int i = 1; i < num_blocks; ++i) {
      load_k(i);
      load_v(i - 1);
    }
    if (num_blocks > 0) load_v(num_blocks - 1);
  }
};

// The same if kGeneral, by a whole warp: blocks in the order in which rows see them, for most begin together and end apart.
template <typename Traits>
struct GeneralProducer {
  using T = typename Traits::Element;
  static constexpr bool kLoadsTogether = Traits::kLoadsTogether;
  static constexpr int kTensorSize = Traits::kBlockN * Traits::kHeadDim;  // of K or V of a block
  const SlowMaps<Traits>& maps;
  const CrossAttentionParams& p;
  const SplitPlan& plan;
  typename Traits::SharedStorage& shared;
  const Tile& tile;
  const Unit& unit;
  const int lane;
  const uint64_t policy;
  BlockWalk<Traits> walk;  // all warps count blocks, the producer's goes on
  const int total;  // blocks that some row of the tile sees
  const BlockRange blocks;
  const int num_blocks;
  static constexpr int last_valid = Traits::kBlockN;  // nobody asks
  const bool is_idle;   // no row of the tile sees a token
  int source = 0;  // where the last block asked for begins among all slow tokens
  Ring rings[2] = {make_ring<Traits>(unit.paired, 0, num_blocks), make_ring<Traits>(unit.paired, 1, num_blocks)};

  __device__ __forceinline__ GeneralProducer(const SlowMaps<Traits>& maps, const CrossAttentionParams& p,
                                             const SplitPlan& plan, typename Traits::SharedStorage& shared,
                                             const Tile& tile, const Unit& unit, int lane)
      : maps(maps), p(p), plan(plan), shared(shared), tile(tile), unit(unit), lane(lane),
        policy(plan.kv_evict_first ? ptx::kEvictFirst : ptx::kEvictNormal), walk(p, plan, shared, tile, lane), total(walk.count()),
        blocks(find_blocks<Traits>(plan, unit, total)), num_blocks(blocks.end - blocks.begin), is_idle(total == 0) {}

  __device__ __forceinline__ RowSight<Traits> row_sight(int first_row, int thread) const {
    return {p, plan, tile, walk.length(), first_row, thread};
  }

  // By lane 0.
  __device__ __forceinline__ Ring::Turn wait(int which) {
    const Ring::Turn turn = rings[which].next();
    ptx::mbarrier_wait(&shared.empty[turn.slot], turn.phase ^ 1);
    if (unit.paired && turn.slot == Traits::kRingSlots) ptx::mbarrier_wait(&shared.query_read, 0);
    return turn;
  }
  __device__ __forceinline__ void load(int which, int tensor, int token, Ring::Turn turn) {
    uint64_t* full = &shared.full[turn.slot];
    T* slot = shared.slots[turn.slot];
    ptx::mbarrier_expect_tx(full, Traits::kSlotSize * sizeof(T));
    ptx::tma_load_4d(&maps.maps[tensor], full, slot, 0, token, 0, unit.kv_head + which, policy);
    if (kLoadsTogether) {
      ptx::tma_load_4d(&maps.maps[1], full, slot + kTensorSize, 0, token, 0, unit.kv_head + which, policy);
    }
  }

  __device__ __forceinline__ void load_k(int i) {
    Range tokens;
    source = walk.next(tokens);
    walk.describe(tokens, shared.blocks[i % Traits::kBlockEntries]);  // while the slot is not free yet
    if (lane == 0) {
      load(0, 0, source, wait(0));
      if (unit.paired) load(1, 0, source, wait(1));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_v(int token) {
    if (kLoadsTogether) return;
    if (lane == 0) {
      load(0, 1, token, wait(0));
      if (unit.paired) load(1, 1, token, wait(1));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void start() {
    if (num_blocks == 0) return;
    walk.seek(blocks.begin);
    load_k(0);
  }
  __device__ __forceinline__ void finish() {
    for (int i = 1; i < num_blocks; ++i) {
      const int before = source;
      load_k(i);
      load_v(before);
    }
    if (num_blocks > 0) load_v(source);
  }
};

}  // namespace slowfast::cuda
