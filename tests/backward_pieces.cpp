// What the Hopper backward knows of sequences in pieces (backward_pieces.cuh), on the host.
//
//   backward_pieces SEED CASES    plays random calls: over all laps, each row meets each token as often as it sees it, and
//                                 a block that is not masked is seen whole
#include <random>

#include "host_warp.h"

#include "cuda/cross_attention/backward_pieces.cuh"

using namespace slowfast;
using namespace slowfast::cuda;

struct Call {
  int num_slow;
  std::vector<int> cu_text = {0}, cu_slow = {0}, pieces, begins, ends;
  CrossAttentionBackwardParams p = {};
  BackwardPlan plan = {};
  std::vector<PieceUse> uses;
  std::vector<BlockUses> block_uses;
  std::vector<int32_t> tile_sequences, row_ranges;
  std::vector<uint32_t> seen, seeing, masked;
};

void make_call(Call& call, std::mt19937& random) {
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  const int batch = pick(1, 4), heads_per_kv = pick(1, 8), way = pick(0, 4);
  call.num_slow = pick(1, way == 4 ? 70 : 700);
  std::vector<int> tokens(call.num_slow);
  for (int i = 0; i < call.num_slow; ++i) tokens[i] = i;
  for (int b = 0; b < batch; ++b) {
    const int rows = pick(0, 4) == 0 ? 0 : pick(1, 60), num = way == 4 ? call.num_slow : pick(0, 4) == 0 ? 0 : pick(1, way == 1 ? 70 : 6);
    std::shuffle(tokens.begin(), tokens.end(), random);
    int length = 0;
    for (int i = 0; i < num; ++i) {
      int begin = pick(0, call.num_slow), end = pick(begin, call.num_slow);
      if (way == 1) end = min(call.num_slow, begin + pick(0, 3));
      if (way == 2) begin = begin / 128 * 128, end = min(call.num_slow, begin + 128 * pick(0, 2));
      if (way == 3) begin = 0, end = call.num_slow;
      if (way == 4) begin = tokens[i], end = begin + 1;  // more runs of a block than a warp has lanes
      call.pieces.insert(call.pieces.end(), {begin, end});
      length += end - begin;
    }
    call.cu_text.push_back(call.cu_text.back() + rows);
    call.cu_slow.push_back(call.cu_slow.back() + num);
    for (int i = 0; i < rows; ++i) {
      call.begins.push_back(pick(0, 2) == 0 ? 0 : pick(-5, length + 5));
      call.ends.push_back(pick(0, 2) == 0 ? INT32_MAX : pick(-5, length + 5));
    }
  }
  auto& p = call.p.forward;
  p.cu_text = call.cu_text.data(), p.cu_slow = call.cu_slow.data(), p.slow_pieces = call.pieces.data();
  p.batch = batch, p.num_kv_heads = 2, p.num_q_heads = 2 * heads_per_kv;
  p.num_slow = call.num_slow, p.num_pieces = call.pieces.size() / 2;
  if (pick(0, 2) != 0) p.slow_begin = call.begins.data();
  if (pick(0, 2) != 0) p.slow_end = call.ends.data();
  auto& plan = call.plan;
  plan.num_ctas = plan.max_groups = plan.spread = 1;
  plan.max_tiles = plan.max_sums = (call.cu_text.back() * heads_per_kv + 63 * batch) / 64;
  plan.tile_words = (plan.max_tiles + 31) / 32;
  const int num_blocks = count_blocks_in_memory(call.p) / 2;
  call.uses.resize(p.num_pieces), plan.uses = call.uses.data();
  call.block_uses.resize(num_blocks), plan.block_uses = call.block_uses.data();
  call.seen.resize(num_blocks * BlockSight::kTokenWords), plan.seen_tokens = call.seen.data();
  call.seeing.resize(num_blocks * plan.tile_words + 1), plan.seeing_tiles = call.seeing.data();
  call.masked.resize(num_blocks * plan.tile_words + 1), plan.masked_tiles = call.masked.data();
  call.row_ranges.resize(plan.max_tiles * kBackwardBlockM * 2), plan.row_ranges = call.row_ranges.data();
}

// As the kernels before the products do it.
void prepare(Call& call) {
  const CrossAttentionBackwardParams& p = call.p;
  const BackwardPlan& plan = call.plan;
  for (int b = 0; b < p.forward.batch; ++b) {
    by_warp([&](int lane) { number_pieces(p, plan, b, lane); return 0; });
  }
  for (size_t block = 0; block < call.block_uses.size(); ++block) {
    const BlockSight sight{plan, static_cast<int>(block)};
    struct Found {
      BlockReach reach;
      uint32_t tokens[BlockSight::kTokenWords];
    };
    for (int w = 0; w < 4; ++w) {
      const auto found = by_warp([&](int lane) {
        Found x = {};
        x.reach = find_sights_of_block(p, plan, block, w, lane, x.tokens);
        return x;
      });
      call.block_uses[block] = found[0].reach.uses;
      for (const Found& x : found) {
        for (int i = 0; i < BlockSight::kTokenWords; ++i) sight.tokens()[i] |= x.tokens[i];
      }
    }
  }
  BackwardSequence sequence(p, plan);
  while (sequence.next()) {
    for (int tile = 0; tile < sequence.num_tiles; ++tile) call.tile_sequences.push_back(sequence.number);
    for (int row = 0; row < sequence.num_rows; ++row) {
      const Range range = range_of(p.forward, sequence.text_begin + row / (p.forward.num_q_heads / 2), kNoToken);
      int32_t* at = plan.row_ranges + 2 * (sequence.first_tile * kBackwardBlockM + row);
      at[0] = range.begin, at[1] = max(range.end, 0);
    }
  }
}

// How often a text row sees each slow token.
std::vector<int> sight_of(const Call& call, int b, int text) {
  const auto& p = call.p.forward;
  std::vector<int> seen(call.num_slow), tokens;
  for (int i = call.cu_slow[b]; i < call.cu_slow[b + 1]; ++i) {
    for (int token = call.pieces[2 * i]; token < call.pieces[2 * i + 1]; ++token) tokens.push_back(token);
  }
  const int length = tokens.size(), begin = p.slow_begin ? max(0, call.begins[text]) : 0, end = p.slow_end ? min(length, call.ends[text]) : length;
  for (int j = begin; j < end; ++j) ++seen[tokens[j]];
  return seen;
}

void play_case(std::mt19937& random) {
  Call call;
  make_call(call, random);
  prepare(call);
  const CrossAttentionBackwardParams& p = call.p;
  const BackwardPlan& plan = call.plan;
  const int heads_per_kv = p.forward.num_q_heads / 2;
  std::vector<bool> is_seen(call.num_slow), is_last_lap_used(call.block_uses.size());
  std::vector<int> first_tile(call.block_uses.size(), INT32_MAX), last_tile(call.block_uses.size());  // of who has tokens of a block
  BackwardSequence sequence(p, plan);
  while (sequence.next()) {
    for (int i = call.cu_slow[sequence.number]; i < call.cu_slow[sequence.number + 1]; ++i) {
      if (call.pieces[2 * i] == call.pieces[2 * i + 1] || sequence.num_tiles == 0) continue;
      for (int block = call.pieces[2 * i] / kBackwardBlockN; block <= (call.pieces[2 * i + 1] - 1) / kBackwardBlockN; ++block) {
        first_tile[block] = min(first_tile[block], sequence.first_tile);
        last_tile[block] = sequence.first_tile + sequence.num_tiles;
      }
    }
    std::vector<std::vector<int>> wanted;
    for (int text = sequence.text_begin; text < call.cu_text[sequence.number + 1]; ++text) {
      wanted.push_back(sight_of(call, sequence.number, text));
      for (int token = 0; token < call.num_slow; ++token) {
        if (wanted.back()[token] > 0) is_seen[token] = true;
      }
    }
    for (size_t block = 0; block < call.block_uses.size(); ++block) {
      const BlockSight sight{plan, static_cast<int>(block)};
      std::vector<std::vector<int>> met(sequence.num_rows, std::vector<int>(kBackwardBlockN));
      for (int lap = 0; lap < sight.laps(); ++lap) {
        struct Mask {
          uint32_t ranks, rows;
        };
        if (sequence.num_tiles > 0 && lap + 1 == sight.laps()) {
          const int first = call.cu_slow[sequence.number], last = call.cu_slow[sequence.number + 1];
          if (by_warp([&](int lane) { return runs_of_lap(plan, block, first, last, lap, lane).count; })[0] > 0) is_last_lap_used[block] = true;
        }
        for (int tile = 0; tile < sequence.num_tiles; ++tile) {
          const int number = sequence.first_tile + tile;
          if (!sight.is_seen_by(number)) continue;
          const bool is_masked = lap > 0 || sight.is_masked_for(number);
          const auto masks = by_warp([&](int lane) {
            const int owner = call.tile_sequences[number];
            const LapRuns runs = runs_of_lap(plan, block, call.cu_slow[owner], call.cu_slow[owner + 1], lap, lane);
            const uint32_t ranks = runs.ranks(lane);
            return Mask{ranks, runs.sight_of_rows(plan, number, lane)};
          });
          for (int row = tile * kBackwardBlockM; row < min(sequence.num_rows, (tile + 1) * kBackwardBlockM); ++row) {
            const int r = row % kBackwardBlockM;
            const int begin = masks[r / 2].rows >> 16 * (r % 2) & 255, end = masks[r / 2].rows >> (16 * (r % 2) + 8) & 255;
            const auto& seen = wanted[row / heads_per_kv];
            const bool is_blind = std::none_of(seen.begin(), seen.end(), [](int x) { return x; });
            for (int token = 0; token < kBackwardBlockN; ++token) {
              const int rank = masks[token / 4].ranks >> 8 * (token % 4) & 255;
              met[row][token] += !is_blind && (!is_masked || (begin <= rank && rank < end));
            }
          }
        }
      }
      for (int row = 0; row < sequence.num_rows; ++row) {
        for (int i = 0; i < kBackwardBlockN; ++i) {
          const int token = block * kBackwardBlockN + i;
          CHECK(met[row][i] == (token < call.num_slow ? wanted[row / heads_per_kv][token] : 0));
        }
      }
    }
  }
  for (size_t block = 0; block < call.block_uses.size(); ++block) {
    const BlockUses& uses = call.block_uses[block];
    CHECK(is_last_lap_used[block] || uses.laps == 1);
    CHECK(uses.num_tiles == max(0, last_tile[block] - min(first_tile[block], last_tile[block])));
    if (uses.num_tiles > 0) CHECK(uses.first_tile == first_tile[block]);
  }
  for (int token = 0; token < static_cast<int>(call.block_uses.size()) * kBackwardBlockN; ++token) {
    const bool found = call.seen[token / 32] >> token % 32 & 1;
    CHECK(found == (token < call.num_slow && is_seen[token]));
  }
}

int main(int, char** arguments) {
  seed = std::atoi(arguments[1]);
  std::mt19937 random(seed);
  for (number_of_case = 0; number_of_case < std::atoi(arguments[2]); ++number_of_case) play_case(random);
  return 0;
}
