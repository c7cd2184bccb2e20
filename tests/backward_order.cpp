// The order in which the Hopper backward adds up dQ (backward_schedule.cuh; backward_order.cuh where rows see ranges or sequences
// are in pieces), on the host.
//
//   backward_order SEED CASES    plays random calls: all CTAs come to an end whoever goes first, and each sum gets what it is
//                                to get, once, in one order
//
// A CTA is played without buffers: it does nothing until its turn has come.
#include <map>
#include <random>

#include "host_warp.h"

#include "cuda/cross_attention/backward_order.cuh"

using namespace slowfast;
using namespace slowfast::cuda;

struct Addition {
  int64_t sum;
  int before, after;  // of the sum's turns
  int mark;           // unlike for each addition to the sum
};

std::map<int64_t, int> tokens_written;  // of each (KV head, first token), of the call; where a block is halved twice

// What CTA `cta` adds, in its order, as `produce` and the warp of the turns go about it; without `ranges` all rows see all.
template <bool kPieces>
std::vector<Addition> additions_of(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, int cta, bool ranges) {
  std::vector<Addition> found;
  const int heads = p.forward.num_kv_heads, total = kPieces ? count_blocks_in_memory(p) : count_blocks(p), last_round = total / plan.num_ctas;
  const int rest = total - last_round * plan.num_ctas;
  const bool splits = plan.splits_last_round && 2 * rest <= plan.num_ctas;
  std::conditional_t<kPieces, BackwardWhole, BackwardSequence> sequence(p, plan);
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
    tokens_written[int64_t{kv_head} << 32 | (sequence.slow_begin + n * kBackwardBlockN)] += min(kBackwardBlockN, sequence.num_slow - n * kBackwardBlockN) * (half < 0 ? 2 : 1);
    const int group = (n - begin) / sequence.group_size, rank = (n - begin) % sequence.group_size;
    CHECK(group < sequence.num_groups || num_tiles == 0);
    const int64_t first_sum = int64_t{kv_head} * plan.max_sums + sequence.first_sum + group * sequence.num_tiles;
    if (!ranges) {
      const int end = sequence.first_of_round(round + 1, kv_head);
      const int earlier = sequence.added_before(round, kv_head, group);
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
    const int laps = kPieces ? sight.laps() : 1;
    for (int lap = 0; lap < laps; ++lap) {
      std::conditional_t<kPieces, BackwardLapOrder, BackwardOrder> order;
      static_cast<BackwardOrder&>(order) = {round, kv_head, sequence.first_block + n, group, rank, tile_begin, num_tiles};
      if constexpr (kPieces) {
        order.lap = lap;
        order.num_blocks = sequence.num_blocks;
      }
      const int start = order.start(sequence) - tile_begin;
      CHECK(0 <= start && start < num_tiles);
      if constexpr (kPieces) {  // among the tiles of those that have tokens of the block
        const BlockUses& uses = plan.block_uses[order.block];
        const int first = max(0, uses.first_tile - tile_begin), last = min(num_tiles, uses.first_tile + uses.num_tiles - tile_begin) - 1;
        if (first <= last) CHECK(first <= start && start <= last);
        if (half < 0) CHECK(start == min(num_tiles - 1, uses.first_tile + rank * uses.num_tiles / order.size(sequence, round)));
      }
      SeenTiles seen(sight, tile_begin, num_tiles, start);
      std::vector<bool> visited(sequence.num_tiles);
      for (int i = 0; i < steps; ++i) {
        const int tile = seen.next();
        CHECK(tile_begin <= tile && tile < tile_begin + num_tiles && sight.is_seen_by(tile) && !visited[tile]);
        visited[tile] = true;
        const auto before = by_warp([&](int lane) { return order.previous(sequence, tile, lane); });
        for (int x : before) CHECK(x == before[0]);
        CHECK(first_sum + tile < int64_t{kv_head + 1} * plan.max_sums);
        found.push_back({first_sum + tile, before[0] + 1, order.mark() + 1, order.mark()});
      }
    }
  }
}

// Lets CTAs go on in a random order until none can; returns the marks of what was added to each sum.
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
        sums[x.sum].push_back(x.mark);
        ++at[cta];
        moved = true;
      }
      moved |= at[cta] < ctas[cta].size() && turns[ctas[cta][at[cta]].sum] == ctas[cta][at[cta]].before;
    }
  }
  for (size_t cta = 0; cta < ctas.size(); ++cta) CHECK(at[cta] == ctas[cta].size());  // else some wait for ever
  return sums;
}

// Of sums that are too few for all groups a sequence has those that its slow tokens are worth: with groups of half the size it
// would have more.
void check_share(const BackwardSequence& sequence) {
  const BackwardPlan& plan = sequence.plan;
  const auto& forward = sequence.p.forward;
  const auto divide = [](int x, int y) { return (x + y - 1) / y; };
  const int at_once = divide(plan.num_ctas, forward.num_kv_heads);
  const int wanted = max(divide(sequence.num_tiles, plan.spread), divide(at_once, plan.max_groups));
  CHECK(sequence.group_size >= wanted);
  if (sequence.group_size == wanted || sequence.num_blocks == 0) return;
  const int64_t smaller = max(wanted, sequence.group_size / 2), groups = divide(min(at_once, sequence.num_blocks), smaller);
  const double share = static_cast<double>(plan.max_sums - plan.max_tiles) * sequence.num_slow / forward.cu_slow[forward.batch];
  CHECK((groups - 1) * sequence.num_tiles > share - 1);
}

template <bool kPieces>
void play_plan(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, std::mt19937& random) {
  using Span = std::conditional_t<kPieces, BackwardWhole, BackwardSequence>;
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  const int kv_heads = p.forward.num_kv_heads, kind = pick(0, kPieces ? 3 : 4);
  const bool ranges = kind != 4;
  std::map<int64_t, std::vector<int>> expected;  // marks for each (KV head, tile), in any order
  Span sequence(p, plan);
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
        const BlockSight sight{plan, sequence.first_block + n};
        *sight.seeing(tile) |= 1u << tile % 32;
        for (int h = 0; h < kv_heads; ++h) {
          auto& marks = expected[int64_t{h} * plan.max_tiles + sequence.first_tile + tile];
          for (int lap = 0; lap < (kPieces ? sight.laps() : 1); ++lap) marks.push_back(lap * sequence.num_blocks * kPieces + sight.block);
        }
      }
    }
  }

  std::vector<std::vector<Addition>> ctas;
  tokens_written.clear();
  for (int cta = 0; cta < plan.num_ctas; ++cta) ctas.push_back(additions_of<kPieces>(p, plan, cta, ranges));
  for (int h = 0; h < kv_heads; ++h) {
    int64_t end = int64_t{h} << 32;
    for (auto x = tokens_written.lower_bound(end); x != tokens_written.end() && x->first >> 32 == h; ++x) {
      CHECK(x->first == end && x->second > 0 && x->second <= 2 * kBackwardBlockN && x->second % 2 == 0);
      end += x->second / 2;
    }
    CHECK(end == (int64_t{h} << 32 | p.forward.num_slow));
  }
  const auto sums = play(ctas, random);
  CHECK(sums == play(ctas, random));

  Span again(p, plan);
  size_t num_sums = 0;
  while (again.next()) {
    CHECK(again.first_sum + again.num_tiles * again.num_groups <= plan.max_sums);
    if constexpr (!kPieces) check_share(again);
    for (int h = 0; h < kv_heads; ++h) {
      for (int tile = 0; tile < again.num_tiles; ++tile) {
        std::vector<int> marks;  // that write_dq_kernel finds
        for (int group = 0; group < again.num_groups; ++group) {
          const auto found = sums.find(int64_t{h} * plan.max_sums + again.first_sum + group * again.num_tiles + tile);
          if (found == sums.end()) continue;
          ++num_sums;
          marks.insert(marks.end(), found->second.begin(), found->second.end());
        }
        auto& wanted = expected[int64_t{h} * plan.max_tiles + again.first_tile + tile];
        std::sort(marks.begin(), marks.end());
        std::sort(wanted.begin(), wanted.end());
        CHECK(marks == wanted);
      }
    }
  }
  CHECK(num_sums == sums.size());
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

  const bool in_pieces = pick(0, 1);
  p.forward.num_slow = cu_slow.back();
  const int num_blocks = count_blocks_in_memory(p) / kv_heads;
  std::vector<BlockUses> uses(num_blocks);
  for (BlockUses& x : uses) {
    x.laps = pick(0, 2) == 0 ? pick(1, 4) : 1;
    x.first_tile = pick(0, plan.max_tiles - 1);
    x.num_tiles = pick(0, plan.max_tiles - x.first_tile);
  }
  plan.block_uses = uses.data();
  uint64_t reach[2] = {static_cast<uint64_t>(pick(0, 400)), static_cast<uint64_t>(pick(0, 4))};
  plan.reach = reach;
  in_pieces ? play_plan<true>(p, plan, random) : play_plan<false>(p, plan, random);
}

int main(int, char** arguments) {
  seed = std::atoi(arguments[1]);
  std::mt19937 random(seed);
  for (number_of_case = 0; number_of_case < std::atoi(arguments[2]); ++number_of_case) play_case(random);
  return 0;
}
