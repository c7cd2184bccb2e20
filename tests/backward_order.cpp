// The order in which the Hopper backward adds up dQ (backward_schedule.cuh; backward_order.cuh where rows see ranges), on the
// host.
//
//   backward_order SEED CASES    plays random calls: all CTAs come to an end whoever goes first, and each sum gets what it is
//                                to get, once, in one order
//
// A CTA is played without buffers: it does nothing until its turn has come. Lanes of a warp are run one after another, over
// again from the start for each value that they exchange.
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
template <typename T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }

#define CHECK(condition) \
  if (!(condition)) { \
    std::printf("seed %d, case %d, line %d: %s\n", seed, number_of_case, __LINE__, #condition); \
    std::exit(1); \
  }

int seed, number_of_case;

struct Warp {
  std::vector<int> exchanged;  // so far
  size_t next;                 // of these, for the lane that runs
  int lane, waiting;           // of 32 lanes that run
  int value;                   // exchanged by those that wait
  int result;
  std::jmp_buf back;
} warp;

inline int __reduce_max_sync(unsigned, int x) {
  if (warp.next < warp.exchanged.size()) return warp.exchanged[warp.next++];
  warp.value = std::max(warp.value, x);
  ++warp.waiting;
  std::longjmp(warp.back, 1);
}

template <typename Function>
int by_warp(const Function& function) {
  warp.exchanged.clear();
  while (true) {
    warp.value = INT32_MIN;
    warp.waiting = 0;
    for (warp.lane = 0; warp.lane < 32; ++warp.lane) {
      warp.next = 0;
      if (setjmp(warp.back) != 0) continue;
      const int result = function(warp.lane);
      CHECK(warp.lane == 0 || result == warp.result);
      warp.result = result;
    }
    if (warp.waiting == 0) return warp.result;
    CHECK(warp.waiting == 32);
    warp.exchanged.push_back(warp.value);
  }
}

#include "cuda/cross_attention/backward_order.cuh"

using namespace slowfast;
using namespace slowfast::cuda;

struct Addition {
  int64_t sum;
  int before, after;  // of the sum's turns
  int block;
};

// What CTA `cta` adds, in its order, as `produce` and the warp of the turns go about it; without `ranges` all rows see all.
std::vector<Addition> additions_of(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, int cta, bool ranges) {
  std::vector<Addition> found;
  const int heads = p.forward.num_kv_heads, total = count_blocks(p), last_round = total / plan.num_ctas;
  const int rest = total - last_round * plan.num_ctas;
  const bool splits = plan.splits_last_round && 2 * rest <= plan.num_ctas;
  BackwardSequence sequence(p, plan);
  bool more = sequence.next();
  for (int round = 0;; ++round) {
    int number = round * plan.num_ctas + cta, half = -1;
    if (splits && round == last_round) {
      half = cta >= rest;
      number = cta < 2 * rest ? number - half * rest : total;
    }
    while (more && number >= (sequence.first_block + sequence.num_blocks) * heads) more = sequence.next();
    if (!more) return found;
    const int within = number - sequence.first_block * heads, n = within / heads, kv_head = within % heads;
    const int begin = sequence.first_of_round(round, kv_head);
    const int half_tiles = (sequence.num_tiles + 1) / 2, tile_begin = half == 1 ? half_tiles : 0;
    const int num_tiles = half < 0 ? sequence.num_tiles : half == 0 ? half_tiles : sequence.num_tiles - half_tiles;
    const int group = (n - begin) / sequence.group_size, rank = (n - begin) % sequence.group_size;
    CHECK(group < sequence.num_groups || num_tiles == 0);
    const int64_t first_sum = int64_t{kv_head} * plan.max_sums + sequence.first_sum + group * sequence.num_tiles;
    if (!ranges) {
      const int end = sequence.first_of_round(round + 1, kv_head);
      int earlier = 0;
      for (int r = sequence.first_block * heads / plan.num_ctas; r < round; ++r) {
        const int count = sequence.first_of_round(r + 1, kv_head) - sequence.first_of_round(r, kv_head);
        earlier += max(0, min(sequence.group_size, count - group * sequence.group_size));
      }
      const BackwardTurns turns = {earlier, rank, min(sequence.group_size, end - begin - group * sequence.group_size), num_tiles};
      for (int i = 0; i < num_tiles; ++i) {
        const int tile = (turns.start() + i) % num_tiles, before = turns.before(tile);
        found.push_back({first_sum + tile_begin + tile, before, before + 1, sequence.first_block + n});
      }
      continue;
    }
    const BlockSight sight{plan, sequence.first_block + n};
    const int steps = SeenTiles(sight, tile_begin, num_tiles).count();
    int expected = 0;
    for (int tile = tile_begin; tile < tile_begin + num_tiles; ++tile) expected += sight.is_seen_by(tile);
    CHECK(steps == expected);
    if (steps == 0) continue;
    const BackwardOrder order = {round, kv_head, sequence.first_block + n, group, rank, tile_begin, num_tiles};
    SeenTiles seen(sight, tile_begin, num_tiles, order.start(sequence) - tile_begin);
    std::vector<bool> visited(sequence.num_tiles);
    for (int i = 0; i < steps; ++i) {
      const int tile = seen.next();
      CHECK(tile_begin <= tile && tile < tile_begin + num_tiles && sight.is_seen_by(tile) && !visited[tile]);
      visited[tile] = true;
      const int before = by_warp([&](int lane) { return order.previous(sequence, tile, lane); });
      CHECK(first_sum + tile < int64_t{kv_head + 1} * plan.max_sums);
      found.push_back({first_sum + tile, before + 1, order.block + 1, order.block});
    }
  }
}

// Lets CTAs go on in a random order until none can; returns the blocks that were added to each sum.
std::map<int64_t, std::vector<int>> play(const std::vector<std::vector<Addition>>& ctas, std::mt19937& random) {
  std::map<int64_t, std::vector<int>> sums;
  std::map<int64_t, int> turns;
  std::vector<size_t> at(ctas.size());
  std::vector<int> who(ctas.size());
  for (size_t i = 0; i < who.size(); ++i) who[i] = i;
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(who.begin(), who.end(), random);
    for (int cta : who) {
      for (int burst = random() % 4; at[cta] < ctas[cta].size() && burst >= 0; --burst) {
        const Addition& x = ctas[cta][at[cta]];
        if (turns[x.sum] != x.before) break;
        CHECK((x.before == 0) == sums[x.sum].empty());
        turns[x.sum] = x.after;
        sums[x.sum].push_back(x.block);
        ++at[cta];
        moved = true;
      }
      moved |= at[cta] < ctas[cta].size() && turns[ctas[cta][at[cta]].sum] == ctas[cta][at[cta]].before;
    }
  }
  for (size_t cta = 0; cta < ctas.size(); ++cta) CHECK(at[cta] == ctas[cta].size());  // else some wait for ever
  return sums;
}

void play_case(std::mt19937& random) {
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  const int batch = pick(1, 4), kv_heads = pick(1, 3), heads_per_kv = pick(1, 8);
  std::vector<int> cu_text = {0}, cu_slow = {0};
  for (int b = 0; b < batch; ++b) {
    cu_text.push_back(cu_text.back() + (pick(0, 5) == 0 ? 0 : pick(1, pick(1, 6000) / heads_per_kv + 1)));
    cu_slow.push_back(cu_slow.back() + (pick(0, 5) == 0 ? 0 : pick(1, 4000)));
  }
  CrossAttentionBackwardParams p = {};
  p.forward.cu_text = cu_text.data(), p.forward.cu_slow = cu_slow.data();
  p.forward.batch = batch, p.forward.num_kv_heads = kv_heads, p.forward.num_q_heads = kv_heads * heads_per_kv;
  BackwardPlan plan = {};
  plan.num_ctas = pick(1, 48);
  plan.max_groups = pick(1, 12);
  plan.spread = pick(1, 3);
  plan.splits_last_round = pick(0, 1);
  plan.max_tiles = (cu_text.back() * heads_per_kv + 63 * batch) / 64 + 1;
  plan.max_sums = plan.max_tiles + pick(0, 3) * pick(0, 40);
  plan.tile_words = (plan.max_tiles + 31) / 32;
  std::vector<uint32_t> seeing((cu_slow.back() / 128 + batch) * plan.tile_words);
  plan.seeing_tiles = seeing.data();

  const int kind = pick(0, 4);
  const bool ranges = kind != 4;
  BackwardSequence sequence(p, plan);
  std::map<int64_t, std::vector<int>> expected;  // blocks of each (KV head, tile), in any order
  while (sequence.next()) {
    for (int n = 0; n < sequence.num_blocks; ++n) {
      for (int tile = 0; tile < sequence.num_tiles; ++tile) {
        const int place = sequence.num_tiles * n / sequence.num_blocks;
        const bool sees = kind == 0   ? tile >= place
                          : kind == 1 ? abs(tile - place) < 3
                          : kind == 2 ? pick(0, 9) == 0
                          : kind == 3 ? pick(0, 9) != 0 && n % 5 != 0 && tile % 7 != 0
                                      : true;
        if (!sees) continue;
        BlockSight sight{plan, sequence.first_block + n};
        *sight.seeing(tile) |= 1u << tile % 32;
        for (int h = 0; h < kv_heads; ++h) expected[int64_t{h} * plan.max_tiles + sequence.first_tile + tile].push_back(sequence.first_block + n);
      }
    }
  }

  std::vector<std::vector<Addition>> ctas;
  for (int cta = 0; cta < plan.num_ctas; ++cta) ctas.push_back(additions_of(p, plan, cta, ranges));
  const auto sums = play(ctas, random);
  CHECK(sums == play(ctas, random));

  BackwardSequence again(p, plan);
  size_t num_sums = 0;
  while (again.next()) {
    for (int h = 0; h < kv_heads; ++h) {
      for (int tile = 0; tile < again.num_tiles; ++tile) {
        std::vector<int> blocks;  // that write_dq_kernel finds
        for (int group = 0; group < again.num_groups; ++group) {
          const auto found = sums.find(int64_t{h} * plan.max_sums + again.first_sum + group * again.num_tiles + tile);
          if (found == sums.end()) continue;
          ++num_sums;
          blocks.insert(blocks.end(), found->second.begin(), found->second.end());
        }
        std::sort(blocks.begin(), blocks.end());
        CHECK(blocks == expected[int64_t{h} * plan.max_tiles + again.first_tile + tile]);
      }
    }
  }
  CHECK(num_sums == sums.size());
}

int main(int, char** arguments) {
  seed = std::atoi(arguments[1]);
  std::mt19937 random(seed);
  for (number_of_case = 0; number_of_case < std::atoi(arguments[2]); ++number_of_case) play_case(random);
  return 0;
}
