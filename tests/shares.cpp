// How the Hopper kernel shares out an uneven batch (shares.cuh), played on the host.
//
//   shares SEED CASES    random batches: all threads of all CTAs find the same length of groups, every group of every unit
//                        has one CTA, and parts lie apart and within their room
//
// Threads are fibers: one runs until it must wait for its warp or its CTA. test_shares.py lays the header beside the few
// declarations of others that it needs.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <vector>

#define __device__
#define __forceinline__ inline
using std::max;
using std::min;

#define CHECK(...) \
  if (!(__VA_ARGS__)) { \
    std::printf("seed %d, case %d, line %d: %s\n", seed, number_of_case, __LINE__, #__VA_ARGS__); \
    std::exit(1); \
  }

int seed, number_of_case;
struct Dim {
  int x, y, z;
} threadIdx, blockIdx, gridDim;

// ------------------------------------------------------------------------------------------------- a CTA

constexpr int kMostThreads = 384;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool is_done;
};
struct Warp {
  int arrived, round;
  uint64_t values[2][32];  // what lanes exchange, by the round's parity
};
std::vector<Fiber> fibers(kMostThreads);
ucontext_t scheduler;
std::function<void(int)> body;
Warp warps[kMostThreads / 32];
int current, num_threads, cta_arrived, cta_round;

void wait() {
  swapcontext(&fibers[current].context, &scheduler);
  threadIdx = {current, 0, 0};
}
void enter() {
  body(current);
  fibers[current].is_done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
void run(int threads, const std::function<void(int)>& function) {
  num_threads = threads;
  body = function;
  cta_arrived = cta_round = 0;
  for (Warp& warp : warps) warp = {};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int turn = 0, left = threads; left > 0; ++turn) {
    CHECK(turn < 1000000);
    left = 0;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].is_done) continue;
      ++left;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
}

void __syncthreads() {
  const int round = cta_round;
  if (++cta_arrived == num_threads) {
    cta_arrived = 0;
    ++cta_round;
  }
  while (cta_round == round) wait();
}

template <typename T>
T as(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
const uint64_t* exchange(T x) {
  Warp& warp = warps[current / 32];
  const int round = warp.round;
  uint64_t& mine = warp.values[round % 2][current % 32] = 0;
  std::memcpy(&mine, &x, sizeof x);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.round;
  }
  while (warp.round == round) wait();
  return warp.values[round % 2];
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return as<T>(exchange(x)[lane & 31]);
}
template <typename T, typename Function>
T reduced(T x, const Function& function) {
  const uint64_t* values = exchange(x);
  T result = as<T>(values[0]);
  for (int i = 1; i < 32; ++i) result = function(result, as<T>(values[i]));
  return result;
}
template <typename T>
T __reduce_max_sync(unsigned, T x) {
  return reduced(x, [](T a, T b) { return max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned, T x) {
  return reduced(x, [](T a, T b) { return min(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned, T x) {
  return reduced(x, [](T a, T b) { return a + b; });
}
unsigned __ballot_sync(unsigned, bool x) {
  const uint64_t* values = exchange(x);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned{as<bool>(values[i])} << i;
  return bits;
}

float __fdividef(float x, float y) { return x / y; }
int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
int __float2int_rz(float x) { return static_cast<int>(x); }
int __ffs(unsigned x) { return __builtin_ffs(x); }
int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
struct int2 {
  int x, y;
};
template <typename T>
T __ldg(const T* p) {
  return *p;
}

#include "cuda/cross_attention/launch.h"

// What shares.cuh has from slow_tokens.cuh and what that includes.
namespace slowfast::cuda {
namespace ptx {
int cluster_index() { return blockIdx.x; }
}  // namespace ptx
struct Tile {
  int text_begin, row_begin, num_rows, slow_begin, num_slow;
};
struct Unit {
  int64_t index, first_part;
  int kv_head, group, num_groups, long_blocks, size, rank;
  bool is_cut_alike, paired;
};
int max_of_warp(int x) { return __reduce_max_sync(0xffffffffu, x); }
int inclusive_sum_of_warp(int x, int lane) {
  const uint64_t* values = exchange(x);
  int sum = 0;
  for (int i = 0; i <= lane; ++i) sum += as<int>(values[i]);
  return sum;
}
}  // namespace slowfast::cuda

#include "shares.cuh"

using namespace slowfast;
using namespace slowfast::cuda;

// ------------------------------------------------------------------------------------------------- a batch

template <int kConsumers_, int kHeadDim_>
struct Traits {
  static constexpr int kConsumers = kConsumers_, kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 64 * kConsumers, kBlockN = kConsumers == 1 ? 32 : 128, kThreads = 128 * (1 + kConsumers);
  static constexpr bool kGeneral = false;
};

struct Batch {
  std::vector<int> text, slow;
  int heads_per_kv, num_kv_heads, cluster_size, share_slots;
  bool is_fused;
};

bool are_alike(const Unit& a, const Unit& b) {
  return a.index == b.index && a.first_part == b.first_part && a.kv_head == b.kv_head && a.group == b.group &&
         a.num_groups == b.num_groups && a.paired == b.paired;
}

template <typename Traits>
void play(const Batch& batch, int grid_y, int grid_z, int max_tiles) {
  const int size = batch.text.size();
  std::vector<int> cu_text(size + 1), cu_slow(size + 1);
  for (int b = 0; b < size; ++b) {
    cu_text[b + 1] = cu_text[b] + batch.text[b];
    cu_slow[b + 1] = cu_slow[b] + batch.slow[b];
  }
  CrossAttentionParams p = {};
  p.cu_text = cu_text.data();
  p.cu_slow = cu_slow.data();
  p.batch = size;
  p.num_kv_heads = batch.num_kv_heads;
  p.num_text = cu_text[size];
  p.num_slow = cu_slow[size];
  p.state = batch.is_fused ? &p : nullptr;
  SplitPlan plan = {};
  plan.heads_per_kv = batch.heads_per_kv;
  plan.cluster_size = batch.cluster_size;
  plan.share_slots = batch.share_slots;
  plan.max_tiles = max_tiles;
  gridDim = {max_tiles, grid_y, grid_z};
  blockIdx = {0, 0, 0};

  std::vector<int> scratch(Shares<Traits>::kScratch), lengths(Traits::kThreads);
  run(Traits::kThreads, [&](int thread) {
    lengths[thread] = Shares<Traits>(p, plan, load_sequence(p, 0, thread % 32), thread % 32).choose_length(scratch.data());
  });
  const int length = lengths[0];
  for (int other : lengths) CHECK(other == length);
  if (length == 0) return;  // no room: the plan's way

  std::map<std::vector<int>, int> num_groups;  // of sequence, row tile and KV head
  std::set<std::vector<int>> taken;            // of these and a group
  std::set<int64_t> parts;
  bool has_ended = false;
  for (int cta = 0; cta < max_tiles * grid_y * grid_z; ++cta) {
    blockIdx = {cta % max_tiles, cta / max_tiles % grid_y, cta / max_tiles / grid_y};
    Unit units[32] = {};
    Tile tiles[32] = {};
    bool found[32];
    run(32, [&](int lane) {
      found[lane] = Shares<Traits>(p, plan, load_sequence(p, 0, lane), lane).find(length, units[lane], tiles[lane]);
    });
    const Unit& unit = units[0];
    const Tile& tile = tiles[0];
    for (int lane = 1; lane < 32; ++lane) {
      CHECK(found[lane] == found[0] && std::memcmp(&tiles[lane], &tile, sizeof tile) == 0 && are_alike(units[lane], unit));
    }
    has_ended |= !found[0];
    CHECK(found[0] != has_ended);  // CTAs without work are the last
    if (!found[0]) continue;

    int b = 0;
    while (batch.text[b] == 0 || cu_text[b] != tile.text_begin) CHECK(++b < size);
    const int rows = batch.text[b] * batch.heads_per_kv;
    CHECK(tile.slow_begin == cu_slow[b] && tile.num_slow == batch.slow[b]);
    CHECK(tile.row_begin % Traits::kBlockM == 0 && tile.num_rows == min(Traits::kBlockM, rows - tile.row_begin) && tile.num_rows > 0);
    CHECK(0 <= unit.group && unit.group < unit.num_groups && 0 <= unit.kv_head);
    for (int kv_head = unit.kv_head; kv_head <= unit.kv_head + unit.paired; ++kv_head) {
      CHECK(kv_head < batch.num_kv_heads);
      CHECK(taken.insert({b, tile.row_begin, kv_head, unit.group}).second);
      const auto [place, is_new] = num_groups.insert({{b, tile.row_begin, kv_head}, unit.num_groups});
      CHECK(is_new || place->second == unit.num_groups);
    }
    if (unit.num_groups > 1) CHECK(parts.insert(unit.first_part + unit.group).second);
  }
  CHECK(parts.empty() || (*parts.begin() == 0 && *parts.rbegin() < 2 * batch.share_slots));
  size_t wanted = 0;
  for (int b = 0; b < size; ++b) {
    for (int row = 0; row < batch.text[b] * batch.heads_per_kv; row += Traits::kBlockM) {
      for (int kv_head = 0; kv_head < batch.num_kv_heads; ++kv_head) {
        const auto unit = num_groups.find({b, row, kv_head});
        CHECK(unit != num_groups.end());
        wanted += unit->second;
      }
    }
  }
  CHECK(taken.size() == wanted);
}

int main(int, char** arguments) {
  seed = std::atoi(arguments[1]);
  std::mt19937 random(seed);
  const auto any = [&](std::vector<int> values) { return values[random() % values.size()]; };
  const int cases = std::atoi(arguments[2]);
  for (number_of_case = 0; number_of_case < cases; ++number_of_case) {
    const int size = any({2, 3, 5, 8, 16, 31, 32, 33, 40}), most_text = any({8, 33, 70}), most_slow = any({500, 3000, 20000});
    Batch batch;
    int num_text = 0;
    for (int b = 0; b < size; ++b) {
      batch.text.push_back(any({0, 1, most_text, static_cast<int>(random() % most_text) + 1}));
      batch.slow.push_back(any({0, 300, most_slow, static_cast<int>(random() % most_slow) + 1}));
      num_text += batch.text.back();
    }
    batch.num_kv_heads = any({1, 2, 3, 4});
    batch.heads_per_kv = any({1, 7, 8});
    batch.cluster_size = any({1, 1, 1, 2, 4});
    batch.share_slots = batch.cluster_size == 1 ? 132 : 132 / batch.cluster_size - 3;
    batch.is_fused = any({0, 1});
    const int consumers = any({1, 2, 2, 2}), rows = 64 * consumers, heads = batch.num_kv_heads;
    const int max_tiles = max(1, (num_text * batch.heads_per_kv + size * (rows - 1)) / rows);
    const int room = max_tiles * heads + batch.share_slots / 2;  // see SplitPlan
    int grid_y = heads, grid_z = 1;
    if (any({0, 1})) {
      grid_y = max(heads, (room + max_tiles - 1) / max_tiles);
    } else {
      grid_z = max(any({2, 3}), (room + max_tiles * heads - 1) / (max_tiles * heads));
    }
    if (consumers == 1) {
      play<Traits<1, 128>>(batch, grid_y, grid_z, max_tiles);
    } else if (any({0, 1})) {
      play<Traits<2, 128>>(batch, grid_y, grid_z, max_tiles);
    } else {
      play<Traits<2, 64>>(batch, grid_y, grid_z, max_tiles);
    }
  }
}
