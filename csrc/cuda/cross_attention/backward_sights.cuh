// What text rows see of the blocks of slow tokens, of calls whose rows see ranges or whose sequences are in pieces.
#pragma once
#include "backward_pieces.cuh"

namespace slowfast::cuda {

// Which tokens of a block somebody sees, from what the CTA's threads have found; `seen` is shared, and 0. By all threads.
__device__ __forceinline__ void store_seen_tokens(const BlockSight& sight, const uint32_t (&tokens)[BlockSight::kTokenWords], uint32_t* seen, int lane) {
#pragma unroll
  for (int i = 0; i < BlockSight::kTokenWords; ++i) {
    const uint32_t word = __reduce_or_sync(0xffffffffu, tokens[i]);
    if (lane == 0) atomicOr(&seen[i], word);
  }
  __syncthreads();
  if (threadIdx.x < BlockSight::kTokenWords) sight.tokens()[threadIdx.x] = seen[threadIdx.x];
}

// A CTA takes a block, a warp 32 row tiles at a time, a thread a tile.
static __global__ void __launch_bounds__(128)
    find_sights_kernel(const __grid_constant__ CrossAttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  __shared__ uint32_t seen[BlockSight::kTokenWords];
  if (threadIdx.x < BlockSight::kTokenWords) seen[threadIdx.x] = 0;
  __syncthreads();
  const int number = blockIdx.x, lane = threadIdx.x % 32;
  BackwardSequence sequence(p, plan);
  do {
    if (!sequence.next()) return;
  } while (number >= sequence.first_block + sequence.num_blocks);
  const int block_begin = (number - sequence.first_block) * kBackwardBlockN;
  const int heads_per_kv = p.forward.num_q_heads / p.forward.num_kv_heads;
  const BlockSight sight{plan, number};
  uint32_t tokens[BlockSight::kTokenWords] = {};
  for (int word = threadIdx.x / 32; word * 32 < sequence.num_tiles; word += 4) {
    const int row = (word * 32 + lane) * kBackwardBlockM, last_row = min(row + kBackwardBlockM, sequence.num_rows) - 1;
    bool sees = false, is_masked = false;
#pragma unroll 4
    for (int text = row / heads_per_kv; text <= last_row / heads_per_kv; ++text) {
      if (row > last_row) break;
      const Range range = range_of(p.forward, sequence.text_begin + text, sequence.num_slow);
      if (range.begin >= range.end) continue;
      const int begin = max(range.begin - block_begin, 0), end = min(range.end - block_begin, kBackwardBlockN);
      is_masked |= begin > 0 || end < kBackwardBlockN;
      if (begin >= end) continue;
      sees = true;
      const auto bits_below = [](int count) { return count >= 32 ? ~0u : (1u << max(count, 0)) - 1; };
#pragma unroll
      for (int i = 0; i < BlockSight::kTokenWords; ++i) tokens[i] |= bits_below(end - 32 * i) & ~bits_below(begin - 32 * i);
    }
    const uint32_t tiles = __ballot_sync(0xffffffffu, sees), masked = __ballot_sync(0xffffffffu, is_masked);
    if (lane == 0) {
      *sight.seeing(32 * word) = tiles;
      *sight.masked(32 * word) = masked;
    }
  }
  store_seen_tokens(sight, tokens, seen, lane);
}

// What rows 2 lane and 2 lane + 1 of a tile of all sequences see of a block, in bytes: where that begins and ends, the first
// row's and the second's.
__device__ __forceinline__ uint32_t sight_of_rows(const BackwardPlan& plan, int tile, int block_begin, int lane) {
  const int4 ranges = __ldcg(reinterpret_cast<const int4*>(plan.row_ranges) + int64_t{tile} * (kBackwardBlockM / 2) + lane);
  const auto within = [&](int token) { return static_cast<uint32_t>(min(max(token - block_begin, 0), kBackwardBlockN)); };
  return within(ranges.x) | within(ranges.y) << 8 | within(ranges.z) << 16 | within(ranges.w) << 24;
}

// A warp takes a sequence.
static __global__ void __launch_bounds__(128)
    number_pieces_kernel(const __grid_constant__ CrossAttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  const int sequence = blockIdx.x * 4 + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x < 2) plan.reach[threadIdx.x] = 0;
  if (sequence < p.forward.batch) number_pieces(p, plan, sequence, threadIdx.x % 32);
}

// A CTA takes a block.
static __global__ void __launch_bounds__(128)
    find_piece_sights_kernel(const __grid_constant__ CrossAttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  __shared__ uint32_t seen[BlockSight::kTokenWords];
  const int block = blockIdx.x, lane = threadIdx.x % 32;
  const BlockSight sight{plan, block};
  if (threadIdx.x < BlockSight::kTokenWords) seen[threadIdx.x] = 0;
  for (int word = threadIdx.x; word < plan.tile_words; word += 128) *sight.seeing(32 * word) = *sight.masked(32 * word) = 0;
  __syncthreads();
  uint32_t tokens[BlockSight::kTokenWords] = {};
  const BlockReach reach = find_sights_of_block(p, plan, block, threadIdx.x / 32, lane, tokens);
  store_seen_tokens(sight, tokens, seen, lane);
  if (threadIdx.x == 0) {
    plan.block_uses[block] = reach.uses;
    if (reach.tiles > 0) {
      auto* sums = reinterpret_cast<unsigned long long*>(plan.reach);
      atomicAdd(sums, static_cast<unsigned long long>(reach.tiles));
      atomicAdd(sums + 1, 1ull);
    }
  }
}

}  // namespace slowfast::cuda
