// Which sequence a block or a row tile is of, and the order in which a group adds up dQ.
//
// A group of k CTAs works on row tiles 0 .. n - 1 of a KV head, each CTA on all of them, CTA j beginning with tile j % n and
// going round. A tile's sum is added to by the CTAs in the order in which they reach it, so nobody waits long: CTA j - 1 comes
// to a tile one step after CTA j. Waiting ends: a CTA waits for others that are in an earlier step, or are before it in the
// same step, or in an earlier round.
#pragma once
#include <cuda_runtime.h>

#include "backward.h"

namespace slowfast::cuda {

constexpr int kBackwardBlockM = 64, kBackwardBlockN = 128;

// Walks over the sequences.
struct BackwardSequence {
  const CrossAttentionBackwardParams& p;
  const BackwardPlan& plan;
  int number = -1;
  int text_begin = 0, num_rows = 0;  // packed rows of a KV head
  int slow_begin = 0, num_slow = 0;
  int num_tiles = 0, num_blocks = 0;  // of a KV head
  int group_size = 1, num_groups = 0;
  int spare;  // sums that are left for second and further groups
  int first_tile = 0, first_sum = 0, first_block = 0;  // those of the sequences before, of a KV head

  __device__ __forceinline__ BackwardSequence(const CrossAttentionBackwardParams& p, const BackwardPlan& plan) 
      : p(p), plan(plan), spare(plan.max_sums - plan.max_tiles) {}

  __device__ __forceinline__ bool next() {
    first_tile += num_tiles;
    first_sum += num_tiles * num_groups;
    first_block += num_blocks;
    if (++number >= p.forward.batch) return false;
    text_begin = __ldg(p.forward.cu_text + number);
    slow_begin = __ldg(p.forward.cu_slow + number);
    num_rows = (__ldg(p.forward.cu_text + number + 1) - text_begin) * (p.forward.num_q_heads / p.forward.num_kv_heads);
    num_slow = __ldg(p.forward.cu_slow + number + 1) - slow_begin;
    num_tiles = (num_rows + kBackwardBlockM - 1) / kBackwardBlockM;
    num_blocks = (num_slow + kBackwardBlockN - 1) / kBackwardBlockN;
    const int at_once = (plan.num_ctas + p.forward.num_kv_heads - 1) / p.forward.num_kv_heads;  // blocks of a KV head in a round
    group_size = max((num_tiles + plan.spread - 1) / plan.spread, (at_once + plan.max_groups - 1) / plan.max_groups);
    // Of the sums that are left a sequence has as large a share as of the slow tokens that are left.
    const float share = static_cast<float>(spare) * num_slow, tokens_left = __ldg(p.forward.cu_slow + p.forward.batch) - slow_begin;
    while (true) {
      num_groups = (min(at_once, num_blocks) + group_size - 1) / group_size;
      if (num_groups <= 1 || (num_groups - 1) * num_tiles * tokens_left <= share) break;
      group_size += group_size / 4 + 1;
    }
    spare -= max(0, num_groups - 1) * num_tiles;
    return true;
  }
  // The first block of a KV head that is in this round, or a later one.
  __device__ __forceinline__ int first_of_round(int round, int kv_head) const {
    const int before = round * plan.num_ctas - first_block * p.forward.num_kv_heads - kv_head;
    return min(num_blocks, max(0, (before + p.forward.num_kv_heads - 1) / p.forward.num_kv_heads));
  }
  // CTAs that add to the sums of a group in the rounds before one in which it has a block.
  __device__ __forceinline__ int added_before(int round, int kv_head, int group) const {
    const int first_round = first_block * p.forward.num_kv_heads / plan.num_ctas;
    if (round == first_round) return 0;
    const auto added = [&](int blocks) { return max(0, min(group_size, blocks - group * group_size)); };  // of a round with so many
    const int at_first = first_of_round(first_round + 1, kv_head);
    // Rounds between have `least` blocks or one more.
    const int rounds = round - first_round - 1, least = plan.num_ctas / p.forward.num_kv_heads;
    const int with_more = first_of_round(round, kv_head) - at_first - rounds * least;
    return added(at_first) + (rounds - with_more) * added(least) + with_more * added(least + 1);
  }
};

__device__ __forceinline__ int count_blocks(const CrossAttentionBackwardParams& p) {
  int count = 0;
  for (int b = 0; b < p.forward.batch; ++b) count += (__ldg(p.forward.cu_slow + b + 1) - __ldg(p.forward.cu_slow + b) + kBackwardBlockN - 1) / kBackwardBlockN;
  return count * p.forward.num_kv_heads;
}

// Where sequences are in pieces.
__host__ __device__ __forceinline__ int count_blocks_in_memory(const CrossAttentionBackwardParams& p) {
  return static_cast<int>((p.forward.num_slow + kBackwardBlockN - 1) / kBackwardBlockN) * p.forward.num_kv_heads;
}

// A CTA's place among those that add to the same sums.
struct BackwardTurns {
  int earlier;  // CTAs of rounds before
  int rank, size;
  int num_tiles;

  // The tile that CTA `rank` begins with.
  __device__ __forceinline__ int start() const { return rank * num_tiles / size; }
  // CTAs that add to the tile's sum before this one.
  __device__ __forceinline__ int before(int tile) const {
    const auto up_to = [&](int x) { return ((x + 1) * size + num_tiles - 1) / num_tiles; };  // CTAs that begin with tile x, or one before it
    const int mine = start(), abreast = rank - up_to(mine - 1);
    return earlier + abreast + up_to(tile) - up_to(mine) + (mine <= tile ? 0 : size);
  }
};

}  // namespace slowfast::cuda
