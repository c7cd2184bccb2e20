// Of calls whose sequences are in pieces: what sequences have of a block of slow tokens, and what their rows see of it.
//
// A block is of tokens as they lie in memory, so that its CTA adds up dK and dV over all uses of its tokens, wherever they are
// from. What a piece has of a block is a run; the tokens of a run have numbers in the sequence that follow one another. A
// sequence may have a token again: runs are then of several laps, none of which has a token twice, and a CTA goes over the
// row tiles once a lap. In a lap, tokens have ranks: one run after the other, whatever lies between them in memory or in the
// sequence. A row's range of numbers is a range of ranks then, and both are bytes.
#pragma once
#include "backward_order.cuh"
#include "ranges.cuh"

namespace slowfast::cuda {

struct BlockRun {
  int piece, sequence;
  int begin, length;  // in the block
  int number;         // of its first token in the sequence
};

// The runs of one sequence in one lap, one a lane.
struct LapRuns {
  int count = 0;
  int begin = 0, length = 0, number = 0;

  // All of this by all lanes of a warp. A run is left to the next lap, and false returned, if the lap has a token of it.
  __device__ __forceinline__ bool take(const BlockRun& run, int lane) {
    const bool overlaps = lane < count && max(begin, run.begin) < min(begin + length, run.begin + run.length);
    if (count == 32 || __ballot_sync(0xffffffffu, overlaps) != 0) return false;
    if (lane == count) {
      begin = run.begin;
      length = run.length;
      number = run.number;
    }
    ++count;
    return true;
  }

  // Ranks of tokens 4 lane .. 4 lane + 3 of the block, in bytes; 255: the lap does not have it.
  __device__ __forceinline__ uint32_t ranks(int lane) const {
    const int sum = inclusive_sum_of_warp(lane < count ? length : 0, lane);
    uint32_t found = ~0u;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int first = __shfl_sync(0xffffffffu, begin, i), tokens = __shfl_sync(0xffffffffu, length, i);
      const int rank = __shfl_sync(0xffffffffu, sum, i) - tokens;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int within = 4 * lane + k - first;
        if (within >= 0 && within < tokens) found = (found & ~(255u << 8 * k)) | static_cast<uint32_t>(rank + within) << 8 * k;
      }
    }
    return found;
  }

  // What rows 2 lane and 2 lane + 1 of a tile see of the lap, in bytes: ranks where that begins and ends, the first row's and
  // the second's.
  __device__ __forceinline__ uint32_t sight_of_rows(const BackwardPlan& plan, int tile, int lane) const {
    const int4 ranges = __ldcg(reinterpret_cast<const int4*>(plan.row_ranges) + int64_t{tile} * (kBackwardBlockM / 2) + lane);
    uint32_t sight = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int first = __shfl_sync(0xffffffffu, number, i), tokens = __shfl_sync(0xffffffffu, length, i);
      const auto within = [&](int token) { return static_cast<uint32_t>(min(max(token - first, 0), tokens)); };
      sight += within(ranges.x) | within(ranges.y) << 8 | within(ranges.z) << 16 | within(ranges.w) << 24;
    }
    return sight;
  }
};

// Shows `visit` the runs of a block that pieces first .. last - 1 have, in their order. By all lanes of a warp.
template <typename Visit>
__device__ __forceinline__ void visit_runs(const BackwardPlan& plan, int block, int first, int last, int lane, const Visit& visit) {
  const int token = block * kBackwardBlockN;
#pragma unroll 1
  for (; first < last; first += 32) {
    int begin = 0, end = 0, number = 0, sequence = 0;
    if (first + lane < last) {
      const int4 use = __ldcg(reinterpret_cast<const int4*>(plan.uses) + first + lane);
      begin = max(use.x - token, 0);
      end = min(use.y - token, kBackwardBlockN);
      number = use.z + (token + begin - use.x);
      sequence = use.w;
    }
    unsigned found = __ballot_sync(0xffffffffu, begin < end);
#pragma unroll 1
    for (; found != 0; found &= found - 1) {
      const int i = __ffs(found) - 1;
      const auto of_lane = [&](int x) { return __shfl_sync(0xffffffffu, x, i); };
      visit(BlockRun{first + i, of_lane(sequence), of_lane(begin), of_lane(end - begin), of_lane(number)});
    }
  }
}

// What one sequence, which has pieces first .. last - 1, has of a block in a lap.
__device__ __forceinline__ LapRuns runs_of_lap(const BackwardPlan& plan, int block, int first, int last, int lap, int lane) {
  LapRuns runs;
  const BlockUses uses = plan.block_uses[block];
  int now = 0;
  visit_runs(plan, block, max(first, uses.first_piece), min(last, uses.last_piece), lane, [&](const BlockRun& run) {
    if (now > lap || runs.take(run, lane)) return;
    if (++now > lap) return;
    runs.count = 0;
    runs.take(run, lane);
  });
  if (now < lap) runs.count = 0;
  return runs;
}

// Says of each piece of a sequence whose it is, and where in it. By a warp.
__device__ __forceinline__ void number_pieces(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, int sequence, int lane) {
  const int last = min(static_cast<int>(p.forward.num_pieces), __ldg(p.forward.cu_slow + sequence + 1));
  int before = 0;
#pragma unroll 1
  for (int first = __ldg(p.forward.cu_slow + sequence); first < last; first += 32) {
    Range piece = {0, 0};
    if (first + lane < last) piece = {__ldg(p.forward.slow_pieces + 2 * (first + lane)), __ldg(p.forward.slow_pieces + 2 * (first + lane) + 1)};
    const int end = before + inclusive_sum_of_warp(piece.length(), lane);
    if (first + lane < last) plan.uses[first + lane] = {piece.begin, piece.end, end - piece.length(), sequence};
    before = __shfl_sync(0xffffffffu, end, 31);
  }
}

// Who has tokens of a block, and how many row tiles have they.
struct BlockReach {
  BlockUses uses;
  int tiles;
};

// Notes which row tiles see something of a block; their bits are 0 before. `tokens`: those that a thread has found to be seen.
// A warp of four takes 32 row tiles of a sequence at a time, a thread a tile.
__device__ __forceinline__ BlockReach find_sights_of_block(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, int block, int warp,
                                                           int lane, uint32_t (&tokens)[BlockSight::kTokenWords]) {
  const int first = __ldg(p.forward.cu_slow), last = min(static_cast<int>(p.forward.num_pieces), __ldg(p.forward.cu_slow + p.forward.batch));
  const int heads_per_kv = p.forward.num_q_heads / p.forward.num_kv_heads;
  const BlockSight sight{plan, block};
  BackwardSequence sequence(p, plan);
  LapRuns runs;
  BlockReach reach = {{1, last, first, 0, 0}, 0};
  int lap = 0;
  visit_runs(plan, block, first, last, lane, [&](const BlockRun& run) {
    reach.uses.first_piece = min(reach.uses.first_piece, run.piece);
    reach.uses.last_piece = run.piece + 1;
    if (sequence.number != run.sequence) {
      while (sequence.number < run.sequence) sequence.next();
      if (reach.tiles == 0) reach.uses.first_tile = sequence.first_tile;
      if (sequence.num_tiles > 0) reach.uses.num_tiles = sequence.first_tile + sequence.num_tiles - reach.uses.first_tile;
      reach.tiles += sequence.num_tiles;
      runs.count = lap = 0;
    }
    if (sequence.num_tiles == 0) return;
    if (!runs.take(run, lane)) {
      runs.count = 0;
      runs.take(run, lane);
      reach.uses.laps = max(reach.uses.laps, ++lap + 1);
    }
#pragma unroll 1
    for (int tile = 32 * warp + lane; tile < sequence.num_tiles; tile += 128) {
      const int row = tile * kBackwardBlockM, last_row = min(row + kBackwardBlockM, sequence.num_rows) - 1;
      bool sees = false, is_masked = run.length < kBackwardBlockN;
#pragma unroll 4
      for (int text = row / heads_per_kv; text <= last_row / heads_per_kv; ++text) {
        const Range range = range_of(p.forward, sequence.text_begin + text, kNoToken);
        if (range.begin >= range.end) continue;
        const int begin = max(range.begin - run.number, 0), end = min(range.end - run.number, run.length);
        is_masked |= begin > 0 || end < run.length;
        if (begin >= end) continue;
        sees = true;
        const auto bits_below = [](int count) { return count >= 32 ? ~0u : (1u << max(count, 0)) - 1; };
#pragma unroll
        for (int i = 0; i < BlockSight::kTokenWords; ++i) tokens[i] |= bits_below(run.begin + end - 32 * i) & ~bits_below(run.begin + begin - 32 * i);
      }
      const int number = sequence.first_tile + tile;
      if (sees) atomicOr(sight.seeing(number), 1u << number % 32);
      if (is_masked) atomicOr(sight.masked(number), 1u << number % 32);
    }
  });
  return reach;
}

}  // namespace slowfast::cuda
