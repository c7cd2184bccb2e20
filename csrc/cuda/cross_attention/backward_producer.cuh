// The producer warpgroup of the Hopper backward: warp 0 asks for tiles and blocks, warp 1 waits for the CTA's turn at a row
// tile, warp 2 adds to the tile's sum and passes the turn on. So no consumer waits for L2.
#pragma once
#include "backward_sights.cuh"
#include "ptx.cuh"

namespace slowfast::cuda {

// Which slot of a ring of kSize comes next, and in which phase.
template <int kSize>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSize) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// What a call's blocks and row tiles are counted along, and the place of a block among those that add to the same sums.
template <typename Traits>
using BackwardSpan = std::conditional_t<Traits::kPieces, BackwardWhole, BackwardSequence>;
template <typename Traits>
using BackwardPlace = std::conditional_t<Traits::kPieces, BackwardLapOrder, BackwardOrder>;

struct BackwardMaps {
  CUtensorMap keys, values;
};

// By one thread or, if kRanges, by a warp, whose lanes look at what rows see. The thread has not waited for the kernel before,
// which packs the rows.
template <typename Traits>
__device__ __forceinline__ void produce(const BackwardMaps& maps, const CrossAttentionBackwardParams& p, const BackwardPlan& plan,
                                        typename Traits::SharedStorage& shared) {
  using T = typename Traits::Element;
  using Record = typename Traits::Record;
  constexpr uint32_t kTileBytes = Traits::kBlockM * Traits::kHeadDim * sizeof(T);
  constexpr uint32_t kBlockBytes = Traits::kBlockN * Traits::kHeadDim * sizeof(T);
  uint32_t values_phase = 0;
  BackwardSpan<Traits> sequence(p, plan);
  RingPlace<2> place;
  RingPlace<Traits::kStages> stage;
  const int total = Traits::kPieces ? count_blocks_in_memory(p) : count_blocks(p), last_round = total / plan.num_ctas, rest = total - last_round * plan.num_ctas;
  const bool splits = plan.splits_last_round && 2 * rest <= plan.num_ctas;
  const int cta = blockIdx.x;
  const int lane = Traits::kRanges ? threadIdx.x % 32 : 0;
  // Lanes pass a barrier's phase together: one that stayed behind could find the phase after it, and wait for the next.
  const auto wait = [](uint64_t* barrier, uint32_t phase) {
    ptx::mbarrier_wait(barrier, phase);
    if constexpr (Traits::kRanges) __syncwarp();
  };
  bool more = sequence.next();
  int lap = 0;  // of the block, where sequences are in pieces
  for (int round = 0;; ++round) {
    int number = round * plan.num_ctas + cta, half = -1;
    if (splits && round == last_round) {
      half = cta >= rest;
      number = cta < 2 * rest ? number - half * rest : total;
    }
    if constexpr (Traits::kRanges) more = sequence.number < p.forward.batch;  // found anew: a register all along is too much
    while (more && number >= (sequence.first_block + sequence.num_blocks) * p.forward.num_kv_heads) more = sequence.next();
    wait(&shared.keys_empty[place.slot], place.phase ^ 1);
    auto& block = shared.blocks[place.slot];
    uint64_t* full = &shared.keys_full[place.slot];
    if (!more) {
      if (lane == 0) {
        block.num_tiles = -1;
        ptx::mbarrier_arrive(full);
      }
      return;
    }
    const int within = number - sequence.first_block * p.forward.num_kv_heads, n = within / p.forward.num_kv_heads, kv_head = within % p.forward.num_kv_heads;
    const int begin = sequence.first_of_round(round, kv_head), end = sequence.first_of_round(round + 1, kv_head);
    const int group = (n - begin) / sequence.group_size, rank = (n - begin) % sequence.group_size;
    const int half_tiles = (sequence.num_tiles + 1) / 2, tile_begin = half == 1 ? half_tiles : 0;
    const int num_tiles = half < 0 ? sequence.num_tiles : half == 0 ? half_tiles : sequence.num_tiles - half_tiles;
    const int token = sequence.slow_begin + n * Traits::kBlockN;
    if (lane == 0) {
      block.num_tiles = num_tiles;
      block.pair = half < 0 ? -1 : cta - half * rest;
      block.num_tokens = min(Traits::kBlockN, sequence.num_slow - n * Traits::kBlockN);
      block.token = token;
      block.kv_head = kv_head;
    }
    int steps = num_tiles;
    const BlockSight sight{plan, sequence.first_block + n};
    if constexpr (Traits::kRanges) {
      steps = SeenTiles(sight, tile_begin, num_tiles).count();
      if (lane == 0) block.num_tiles = steps;
    }
    [[maybe_unused]] bool is_last_lap = true;
    if constexpr (Traits::kPieces) {
      is_last_lap = steps == 0 || lap + 1 == sight.laps();
      if (lane == 0) {
        shared.sight.is_first_lap[place.slot] = lap == 0;
        shared.sight.is_last_lap[place.slot] = is_last_lap;
      }
    }
    if (steps == 0) {
      if (lane == 0) ptx::mbarrier_arrive(full);
      place.advance();
      continue;
    }
    int first_tile;
    if constexpr (Traits::kRanges) {
      BackwardPlace<Traits> order;
      static_cast<BackwardOrder&>(order) = {round, kv_head, sequence.first_block + n, group, rank, tile_begin, num_tiles};
      if constexpr (Traits::kPieces) {
        order.lap = lap;
        order.num_blocks = sequence.num_blocks;
      }
      first_tile = order.start(sequence) - tile_begin;
      if (Traits::kPieces && lane == 0) block.first_tile = first_tile;
      if (lane == 0) {
        shared.sight.orders[place.slot] = order;
        shared.sight.tokens[place.slot] = *reinterpret_cast<const uint4*>(sight.tokens());
        block.first_sum = int64_t{kv_head} * plan.max_sums + sequence.first_sum + group * sequence.num_tiles;
      }
    } else {
      block.first_sum = int64_t{kv_head} * plan.max_sums + sequence.first_sum + group * sequence.num_tiles + tile_begin;
      const int earlier = sequence.added_before(round, kv_head, group);
      const BackwardTurns turns = {earlier, rank, min(sequence.group_size, end - begin - group * sequence.group_size), num_tiles};
      first_tile = turns.start();
      block.turns = turns;
      block.first_tile = first_tile;
    }
    if (lane == 0) {
      ptx::mbarrier_expect_tx(full, kBlockBytes);
      ptx::tma_load_4d(&maps.keys, full, shared.keys[place.slot], 0, token, 0, kv_head, ptx::kEvictNormal);
      if (round == 0) ptx::tma_prefetch_4d(&maps.values, 0, token, 0, kv_head);
    }
    ptx::wait_for_previous_kernel();  // K and V need not wait
    const Record* records = static_cast<const Record*>(plan.tiles) + int64_t{kv_head} * plan.max_tiles + sequence.first_tile + tile_begin;
    SeenTiles seen(sight, tile_begin, num_tiles, first_tile);
    // All CTAs come to their next block at about the same time, and would wait for memory together.
    const auto prefetch_next = [&] {
      const int next = within + plan.num_ctas;
      if (Traits::kRanges || next >= sequence.num_blocks * p.forward.num_kv_heads) return;
      const int next_token = sequence.slow_begin + next / p.forward.num_kv_heads * Traits::kBlockN, next_head = next % p.forward.num_kv_heads;
      ptx::tma_prefetch_4d(&maps.keys, 0, next_token, 0, next_head);
      ptx::tma_prefetch_4d(&maps.values, 0, next_token, 0, next_head);
    };
    int tile = first_tile;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      bool is_masked = false;
      uint32_t rows = 0;
      if constexpr (Traits::kPieces) {
        tile = seen.next() - tile_begin;
      } else if constexpr (Traits::kRanges) {
        tile = seen.next() - tile_begin;
        is_masked = sight.is_masked_for(tile_begin + tile);
        if (is_masked) rows = sight_of_rows(plan, sequence.first_tile + tile_begin + tile, n * Traits::kBlockN, lane);
      }
      const Record& record = records[tile];
      wait(&shared.rows_empty[stage.slot], stage.phase ^ 1);
      if constexpr (Traits::kRanges && !Traits::kPieces) {
        if (is_masked) shared.sight.rows[stage.slot][lane] = rows;
        if (lane == 0) shared.sight.is_masked[stage.slot] = is_masked;
        __syncwarp();
      }
      if (lane == 0) {
        ptx::mbarrier_expect_tx(&shared.query_full[stage.slot], kTileBytes + sizeof(shared.stats[0]));
        ptx::bulk_load(&shared.query_full[stage.slot], shared.rows[stage.slot][0], record.query, kTileBytes);
        ptx::bulk_load(&shared.query_full[stage.slot], shared.stats[stage.slot], record.lse, sizeof(shared.stats[0]));
        ptx::mbarrier_expect_tx(&shared.grad_full[stage.slot], kTileBytes);
        ptx::bulk_load(&shared.grad_full[stage.slot], shared.rows[stage.slot][1], record.grad, kTileBytes);
      }
      stage.advance();
      if (!Traits::kRanges && ++tile == num_tiles) tile = 0;
      if (i == 0) {
        wait(&shared.values_empty, values_phase ^ 1);
        if (lane == 0) {
          ptx::mbarrier_expect_tx(&shared.values_full, kBlockBytes);
          ptx::tma_load_4d(&maps.values, &shared.values_full, shared.values, 0, token, 0, kv_head, ptx::kEvictNormal);
        }
        values_phase ^= 1;
        prefetch_next();
      }
    }
    place.advance();
    if constexpr (Traits::kPieces) {
      lap = is_last_lap ? 0 : lap + 1;
      round -= !is_last_lap;
    }
  }
}

// Waits for the CTA's turn at the row tiles, ahead of what is added.
template <typename Traits>
__device__ __forceinline__ void wait_for_turns(const BackwardPlan& plan, typename Traits::SharedStorage& shared) {
  RingPlace<2> place;
  RingPlace<Traits::kTurnSlots> slot;
  while (true) {
    ptx::mbarrier_wait(&shared.keys_full[place.slot], place.phase);
    const auto& block = shared.blocks[place.slot];
    const int num_tiles = block.num_tiles;
    if (num_tiles < 0) return;
    int tile = block.first_tile;
    for (int i = 0; i < num_tiles; ++i) {
      const int before = block.turns.before(tile);
      const int64_t sum = block.first_sum + tile;
      ptx::mbarrier_wait(&shared.passed[slot.slot], slot.phase ^ 1);
      shared.turns[slot.slot] = {sum, before};
      while (ptx::load_acquire(plan.turns + sum) != before) {
      }
      ptx::mbarrier_arrive(&shared.may_add[slot.slot]);
      slot.advance();
      if (++tile == num_tiles) tile = 0;
    }
    ptx::mbarrier_arrive(&shared.keys_empty[place.slot]);
    place.advance();
  }
}

// The same where rows see ranges or sequences are in pieces; by a warp.
template <typename Traits>
__device__ __forceinline__ void wait_for_turns_in_order(const CrossAttentionBackwardParams& p, const BackwardPlan& plan,
                                                        typename Traits::SharedStorage& shared) {
  RingPlace<2> place;
  RingPlace<Traits::kTurnSlots> slot;
  BackwardSpan<Traits> sequence(p, plan);
  sequence.next();
  const int lane = threadIdx.x % 32;
  while (true) {
    ptx::mbarrier_wait(&shared.keys_full[place.slot], place.phase);
    const int steps = shared.blocks[place.slot].num_tiles;
    if (steps < 0) return;
    if (steps > 0) {
      const BackwardPlace<Traits>& order = shared.sight.orders[place.slot];
      const int64_t first_sum = shared.blocks[place.slot].first_sum;
      while (order.block >= sequence.first_block + sequence.num_blocks) sequence.next();
      SeenTiles seen(BlockSight{plan, order.block}, order.tile_begin, order.num_tiles, order.start(sequence) - order.tile_begin);
      for (int i = 0; i < steps; ++i) {
        const int tile = seen.next(), before = order.previous(sequence, tile, lane) + 1;
        if (lane == 0) {
          const int64_t sum = first_sum + tile;
          ptx::mbarrier_wait(&shared.passed[slot.slot], slot.phase ^ 1);
          shared.turns[slot.slot] = {sum, before};
          while (ptx::load_acquire(plan.turns + sum) != before) {
          }
          ptx::mbarrier_arrive(&shared.may_add[slot.slot]);
        }
        slot.advance();
      }
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.keys_empty[place.slot]);
    place.advance();
  }
}

// Says what rows of the tiles see of a block, where sequences are in pieces, beside the producer that asks for the tiles; by
// a warp.
template <typename Traits>
__device__ __forceinline__ void find_masks(const CrossAttentionBackwardParams& p, const BackwardPlan& plan,
                                           typename Traits::SharedStorage& shared) {
  RingPlace<2> place;
  RingPlace<Traits::kStages> stage;
  const int lane = threadIdx.x % 32;
  while (true) {
    ptx::mbarrier_wait(&shared.keys_full[place.slot], place.phase);
    const int steps = shared.blocks[place.slot].num_tiles;
    if (steps < 0) return;
    const int block = shared.sight.orders[place.slot].block, lap = shared.sight.orders[place.slot].lap;
    const BlockSight sight{plan, block};
    SeenTiles seen(sight, shared.sight.orders[place.slot].tile_begin, shared.sight.orders[place.slot].num_tiles, shared.blocks[place.slot].first_tile);
    LapRuns runs;
    uint32_t ranks = 0;
    int sequence = -1;  // whose runs these are
    for (int i = 0; i < steps; ++i) {
      const int tile = seen.next();
      const bool is_masked = lap > 0 || sight.is_masked_for(tile);
      uint32_t rows = 0;
      if (is_masked) {
        const int owner = plan.tile_sequences[tile];
        if (owner != sequence) {
          sequence = owner;
          runs = runs_of_lap(plan, block, __ldg(p.forward.cu_slow + owner), __ldg(p.forward.cu_slow + owner + 1), lap, lane);
          ranks = runs.ranks(lane);
        }
        rows = runs.sight_of_rows(plan, tile, lane);
      }
      ptx::mbarrier_wait(&shared.rows_empty[stage.slot], stage.phase ^ 1);
      if (is_masked) {
        shared.sight.rows[stage.slot][lane] = rows;
        shared.sight.ranks[stage.slot][lane] = ranks;
      }
      if (lane == 0) shared.sight.is_masked[stage.slot] = is_masked;
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&shared.query_full[stage.slot]);
      stage.advance();
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.keys_empty[place.slot]);
    place.advance();
  }
}

// Adds what the consumers leave to the sums, and passes the turn on when it is there.
template <typename Traits>
__device__ __forceinline__ void add_to_sums(const BackwardPlan& plan, typename Traits::SharedStorage& shared) {
  constexpr int kTileSize = Traits::kBlockM * Traits::kHeadDim;
  RingPlace<2> place;
  RingPlace<Traits::kTurnSlots> slot;
  uint32_t phase = 0;
  while (true) {
    ptx::mbarrier_wait(&shared.keys_full[place.slot], place.phase);
    const int num_tiles = shared.blocks[place.slot].num_tiles;
    if (num_tiles < 0) return;
    int number = 0;
    if constexpr (Traits::kRanges) number = shared.sight.orders[place.slot].mark();
    ptx::mbarrier_arrive(&shared.keys_empty[place.slot]);
    for (int i = 0; i < num_tiles; ++i) {
      ptx::mbarrier_wait(&shared.may_add[slot.slot], slot.phase);
      const auto turn = shared.turns[slot.slot];
      float* sum = plan.sums + turn.sum * kTileSize;
      ptx::fence_proxy_async_global();
      ptx::mbarrier_wait(&shared.grad_query_full, phase);
      if (turn.before == 0) {
        ptx::bulk_store(sum, shared.grad_query, sizeof(shared.grad_query));
      } else {
        ptx::bulk_add(sum, shared.grad_query, sizeof(shared.grad_query));
      }
      ptx::bulk_commit();
      ptx::bulk_wait<true>();
      ptx::mbarrier_arrive(&shared.grad_query_empty);
      ptx::bulk_wait<false>();
      ptx::fence_proxy_async_global();
      ptx::store_release(plan.turns + turn.sum, (Traits::kRanges ? number : turn.before) + 1);
      ptx::mbarrier_arrive(&shared.passed[slot.slot]);
      phase ^= 1;
      slot.advance();
    }
    place.advance();
  }
}

}  // namespace slowfast::cuda
