// Of calls whose rows see ranges: which row tiles see something of a block, and the order in which a group adds up dQ then.
//
// A CTA leaves out the tiles that see nothing of its block, and the others keep the order of backward_schedule.cuh: by round,
// by steps from the CTA's first tile to this one (all of them counted, seen or not), by rank. So waiting ends as it does there:
// what is left of an order has no circle either. Nobody counts CTAs: a tile's turn is the number of the block that was added
// last, plus 1, and each looks for the one before it.
//
// Where sequences are in pieces a CTA goes over the tiles in laps (backward_pieces.cuh). The order is then by round, by lap, by
// steps, by rank, and still that in which each CTA goes.
#pragma once
#include "backward_schedule.cuh"

namespace slowfast::cuda {

// What rows see of a block, by number among all sequences' of a KV head.
struct BlockSight {
  static constexpr int kTokenWords = kBackwardBlockN / 32;

  const BackwardPlan& plan;
  const int block;

  __device__ __forceinline__ uint32_t* tokens() const { return plan.seen_tokens + int64_t{block} * kTokenWords; }
  // The word of a tile, whose bit is number tile % 32.
  __device__ __forceinline__ uint32_t* seeing(int tile) const { return plan.seeing_tiles + int64_t{block} * plan.tile_words + tile / 32; }
  __device__ __forceinline__ uint32_t* masked(int tile) const { return plan.masked_tiles + int64_t{block} * plan.tile_words + tile / 32; }

  __device__ __forceinline__ int laps() const { return plan.block_uses[block].laps; }

  __device__ __forceinline__ bool is_seen_by(int tile) const { return *seeing(tile) >> tile % 32 & 1; }
  __device__ __forceinline__ bool is_masked_for(int tile) const { return *masked(tile) >> tile % 32 & 1; }
};

// The tiles that see something of a block, among `count` of a sequence from `begin` on: one after another, from the tile
// `start` of these on and round.
class SeenTiles {
 public:
  __device__ __forceinline__ SeenTiles(const BlockSight& sight, int begin, int count, int start = 0)
      : sight_(sight), begin_(begin), end_(begin + count), from_(begin + start) {}

  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll 1
    for (int tile = begin_; tile < end_; tile += 32 - tile % 32) {
      uint32_t word = *sight_.seeing(tile) >> tile % 32;
      if (end_ - tile < 32) word &= (1u << (end_ - tile)) - 1;
      sum += __popc(word);
    }
    return sum;
  }
  // A tile of the sequence. To be asked for count() times.
  __device__ __forceinline__ int next() {
    int tile = first(from_);
    if (tile == end_) tile = first(begin_);
    from_ = tile + 1;
    return tile;
  }

 private:
  __device__ __forceinline__ int first(int tile) const {
#pragma unroll 1
    for (; tile < end_; tile += 32 - tile % 32) {
      const uint32_t word = *sight_.seeing(tile) >> tile % 32;
      if (word != 0) return min(end_, tile + __ffs(word) - 1);
    }
    return end_;
  }

  const BlockSight sight_;
  const int begin_, end_;
  int from_;
};

// The place of a CTA's block among those that add to the same sums.
struct BackwardOrder {
  int round, kv_head;
  int block;                  // of all sequences, of a KV head
  int group, rank;            // in the round
  int tile_begin, num_tiles;  // that the round's CTAs walk over: all of the sequence, or a half

  __device__ __forceinline__ int first_of_group(const BackwardSequence& sequence, int r) const {
    return sequence.first_of_round(r, kv_head) + group * sequence.group_size;
  }
  // CTAs of the group that have a block in a round.
  __device__ __forceinline__ int size(const BackwardSequence& sequence, int r) const {
    return min(sequence.group_size, sequence.first_of_round(r + 1, kv_head) - first_of_group(sequence, r));
  }
  // The tile that the CTA would begin with if its block were seen by all.
  __device__ __forceinline__ int start(const BackwardSequence& sequence) const {
    return tile_begin + rank * num_tiles / size(sequence, round);
  }

  // What a tile's turn is, less 1, when this block has been added to its sum.
  __device__ __forceinline__ int mark() const { return block; }
  // The block, of all sequences, that is added to the sum of `tile` before this one, or -1. By all lanes of a warp.
  __device__ __forceinline__ int previous(const BackwardSequence& sequence, int tile, int lane) const {
    const int first_round = sequence.first_block * sequence.p.forward.num_kv_heads / sequence.plan.num_ctas;
#pragma unroll 1
    for (int r = round; r >= first_round; --r) {
      const int first = first_of_group(sequence, r), count = size(sequence, r);
      const int within = r == round ? tile - tile_begin : tile, tiles = r == round ? num_tiles : sequence.num_tiles;
      const auto place_of = [&](int x) {
        const int steps = within - x * tiles / count;
        return (steps < 0 ? steps + tiles : steps) * count + x;
      };
      const int limit = r == round ? place_of(rank) : INT32_MAX;
      int last = -1;
#pragma unroll 1
      for (int x = lane; x < count; x += 32) {
        const int place = place_of(x);
        if (place < limit && BlockSight{sequence.plan, sequence.first_block + first + x}.is_seen_by(tile)) last = max(last, place);
      }
      last = __reduce_max_sync(0xffffffffu, last);
      if (last >= 0) return sequence.first_block + first + last % count;
    }
    return -1;
  }
};

// All blocks and row tiles of a call whose sequences are in pieces, as if they were one sequence's.
struct BackwardWhole : BackwardSequence {
  using BackwardSequence::BackwardSequence;

  __device__ __forceinline__ bool next() {
    if (number >= 0) {
      number = p.forward.batch;
      return false;
    }
    while (BackwardSequence::next()) {
    }
    num_tiles = first_tile;
    number = slow_begin = first_tile = first_sum = first_block = 0;
    num_slow = static_cast<int>(p.forward.num_slow);
    num_blocks = count_blocks_in_memory(p) / p.forward.num_kv_heads;
    const auto divide = [](int x, int y) { return (x + y - 1) / y; };
    const int at_once = min(num_blocks, divide(plan.num_ctas, p.forward.num_kv_heads));
    // As many CTAs as tiles of the sequences that have tokens of a block, on average: others' tiles are no place to begin.
    const uint64_t tiles = __ldcg(plan.reach), blocks = __ldcg(plan.reach + 1);
    const int reached = blocks == 0 ? 1 : static_cast<int>(tiles / blocks);
    const int room = 1 + (plan.max_sums - plan.max_tiles) / max(num_tiles, 1);  // for sums of so many groups
    group_size = max(max(divide(reached, plan.spread), 1), divide(at_once, min(plan.max_groups, room)));
    num_groups = divide(at_once, group_size);
    return true;
  }
};

// The place of a lap of a CTA's block.
struct BackwardLapOrder : BackwardOrder {
  int lap;
  int num_blocks;

  // The CTAs of a group that have tokens of one sequence begin here and there in its tiles, wherever these are among all. From
  // `begin` on, of so many tiles.
  static __device__ __forceinline__ int start_within(const BlockUses& uses, int x, int count, int begin, int tiles) {
    return min(max(uses.first_tile + x * uses.num_tiles / count - begin, 0), tiles - 1);
  }
  __device__ __forceinline__ int start(const BackwardWhole& whole) const {
    return tile_begin + start_within(whole.plan.block_uses[block], rank, size(whole, round), tile_begin, num_tiles);
  }

  __device__ __forceinline__ int mark() const { return lap * num_blocks + block; }
  // The mark of what is added to the sum of `tile` before this lap, or -1. By all lanes of a warp.
  __device__ __forceinline__ int previous(const BackwardWhole& whole, int tile, int lane) const {
#pragma unroll 1
    for (int r = round; r >= 0; --r) {
      const int first = first_of_group(whole, r), count = size(whole, r);
      const int begin = r == round ? tile_begin : 0, tiles = r == round ? num_tiles : whole.num_tiles;
      const auto place_of = [&](int x) {
        const int steps = tile - begin - start_within(whole.plan.block_uses[first + x], x, count, begin, tiles);
        return (steps < 0 ? steps + tiles : steps) * count + x;
      };
      const int limit = r == round ? place_of(rank) : INT32_MAX;
      int last_lap = -1, last = -1;
#pragma unroll 1
      for (int x = lane; x < count; x += 32) {
        const BlockSight sight{whole.plan, first + x};
        if (!sight.is_seen_by(tile)) continue;
        const int place = place_of(x);
        int mine = sight.laps() - 1;  // the last one before this lap
        if (r == round) mine = min(mine, place < limit ? lap : lap - 1);
        if (mine > last_lap || (mine == last_lap && place > last)) {
          last_lap = mine;
          last = place;
        }
      }
      const int latest = __reduce_max_sync(0xffffffffu, last_lap);
      if (latest < 0) continue;
      last = __reduce_max_sync(0xffffffffu, last_lap == latest ? last : -1);
      return latest * num_blocks + first + last % count;
    }
    return -1;
  }
};

}  // namespace slowfast::cuda
