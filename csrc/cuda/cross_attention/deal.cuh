// Work dealt out on the device: which unit a CTA has, and which share of its blocks, where tiles differ in what their
// rows see, or several sequences are in pieces, which the host does not know. A unit is cut into groups of `length`
// blocks, one length for all units: the one of a few dozen that a model of the time likes best. What is left of a unit
// is a short group: these come last, longer ones first, and take the multiprocessors that the long ones leave, one after
// another. Units with much to do come first, as later rows mostly see more.
//
// All CTAs find the same answer from the same lengths and ranges, each thread looking at a tile. The number of blocks
// is a guess where rows see ranges; it decides how work is shared and nothing else.
#pragma once
#include "slow_tokens.cuh"

namespace slowfast::cuda {

template <typename Traits>
class Deal {
 public:
  // By all threads; `scratch` has room for 2 words a sequence, one a tile and 3 a thread, and is free again when this
  // returns. Sets `unit` and `tile_index`; false: no work.
  static __device__ __forceinline__ bool find(const CrossAttentionParams& p, const SplitPlan& plan, int* scratch,
                                              int lane, Unit& unit, int& tile_index) {
    int* weights = scratch + 2 * p.batch;
    if (p.slow_pieces != nullptr) {
      measure(p, scratch, lane);
      __syncthreads();
    }
    for (int i = threadIdx.x; i < plan.max_tiles; i += Traits::kThreads) weights[i] = weigh(p, plan, scratch, i);
    __syncthreads();
    const int length = choose_length(p, plan, weights, weights + plan.max_tiles, lane);

    const int cta = blockIdx.x;
    int passed = 0;
    bool found = false;
#pragma unroll 1
    for (int turn = 0; turn < kTurns && !found; ++turn) {
      int parts = 0;  // of the units before
#pragma unroll 1
      for (int first = plan.max_tiles - 1; first >= 0; first -= 32) {
        const int tile = first - lane;
        const Cut cut(tile >= 0 ? weights[tile] : kNoTile, length);
        const int units = units_of(p, cut.weight), count = cut.groups_of(turn, length) * units;
        const int all = __reduce_add_sync(0xffffffffu, count), own_parts = cut.groups() * units;
        found = passed + all > cta;
        if (found) {
          const int end = passed + inclusive_sum_of_warp(count, lane);
          const int source = __ffs(__ballot_sync(0xffffffffu, end > cta)) - 1;
          const int parts_before = parts + inclusive_sum_of_warp(own_parts, lane) - own_parts;
          const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
          const int place = cta - of_source(end - count), num_units = of_source(units);
          const int round = quotient(place, num_units);
          const int number = place - round * num_units;  // KV heads side by side: their CTAs take equally long
          tile_index = of_source(tile);
          unit.num_groups = of_source(cut.groups());
          unit.long_blocks = of_source(cut.rest) > 0 ? length : 0;
          unit.group = turn == 0 ? round : unit.num_groups - 1;
          unit.kv_head = is_half(of_source(cut.weight)) ? 2 * number : number;
          unit.first_part = of_source(parts_before) + number * unit.num_groups;
          break;
        }
        passed += all;
        parts += __reduce_add_sync(0xffffffffu, own_parts);
      }
    }
    ptx::fence_proxy_async();  // the scratch is TMA's
    __syncthreads();
    unit.index = static_cast<int64_t>(unit.kv_head) * plan.max_tiles + tile_index;
    return found;
  }

 private:
  // Long groups; short ones of more than half their length, and units of one, whose gates take longer; others.
  static constexpr int kTurns = 3;
  // A tile's blocks, times two, plus one if its rows are half a tile or less, so that two KV heads share a unit.
  static constexpr int kNoTile = -1;

  static __device__ __forceinline__ bool is_half(int weight) { return weight % 2 == 1; }
  static __device__ __forceinline__ int units_of(const CrossAttentionParams& p, int weight) {
    return weight == kNoTile ? 0 : is_half(weight) ? (p.num_kv_heads + 1) / 2 : p.num_kv_heads;
  }
  // A division of integers would take longer than all the rest. x < 2^20.
  static __device__ __forceinline__ int quotient(int x, int y) { return __float2int_rz(__fdividef(x + 0.5f, y)); }
  static __device__ __forceinline__ int blocks_of(int tokens) {
    return (tokens + Traits::kBlockN - 1) / Traits::kBlockN;
  }

  // A unit in groups of `length` blocks.
  struct Cut {
    int weight;
    int full, rest;  // groups of that length, and blocks of a short one; with nothing to do neither, but a CTA

    __device__ __forceinline__ Cut(int weight, int length) : weight(weight) {
      const int blocks = max(weight, 0) / 2;
      full = quotient(blocks, length);
      rest = blocks - full * length;
    }
    __device__ __forceinline__ bool has_short() const { return rest > 0 || full == 0; }
    __device__ __forceinline__ int groups() const { return full + has_short(); }
    __device__ __forceinline__ int groups_of(int turn, int length) const {
      return turn == 0 ? full : has_short() && (full == 0 || 2 * rest > length) == (turn == 1);
    }
  };

  // Tokens of each sequence in pieces, and how many blocks more than of one run these make. A warp has a sequence.
  static __device__ __forceinline__ void measure(const CrossAttentionParams& p, int* sizes, int lane) {
    for (int b = threadIdx.x / 32; b < p.batch; b += Traits::kThreads / 32) {
      const int begin = __ldg(p.cu_slow + b);
      const auto size = Pieces(p, begin, __ldg(p.cu_slow + b + 1) - begin).size(Traits::kBlockN, lane);
      if (lane == 0) {
        sizes[2 * b] = size.tokens;
        sizes[2 * b + 1] = size.blocks - blocks_of(size.tokens);
      }
    }
  }

  // By one thread.
  static __device__ __forceinline__ int weigh(const CrossAttentionParams& p, const SplitPlan& plan, const int* sizes,
                                              int index) {
    const bool is_alone = p.batch == 1, in_pieces = p.slow_pieces != nullptr;
    int text_begin = 0, row_begin = 0, num_rows = 0, length = 0, more = 0;
#pragma unroll 1
    for (int b = 0; b < p.batch; ++b) {
      const int begin = is_alone ? 0 : __ldg(p.cu_text + b), end = is_alone ? p.num_text : __ldg(p.cu_text + b + 1);
      const int rows = (end - begin) * plan.heads_per_kv;
      const int tiles = (rows + Traits::kBlockM - 1) / Traits::kBlockM;
      if (index < tiles) {
        text_begin = begin;
        row_begin = index * Traits::kBlockM;
        num_rows = min(Traits::kBlockM, rows - row_begin);
        if (in_pieces) {
          length = sizes[2 * b];
          more = sizes[2 * b + 1];
        } else {
          length = is_alone ? p.num_slow : __ldg(p.cu_slow + b + 1) - __ldg(p.cu_slow + b);
        }
        break;
      }
      index -= tiles;
    }
    if (num_rows == 0) return kNoTile;
    int begin = 0, end = length;
    if (p.slow_begin != nullptr || p.slow_end != nullptr) {
      const int first = text_of(plan, row_begin), last = text_of(plan, row_begin + num_rows - 1);
      begin = kNoToken;
      end = 0;
      constexpr int kLoads = 10;  // in flight together
#pragma unroll 1
      for (int text = first; text <= last; text += kLoads) {
        Range ranges[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) ranges[i] = range_of(p, text_begin + min(text + i, last), length);
#pragma unroll
        for (const Range& range : ranges) {
          if (range.begin >= range.end) continue;
          begin = min(begin, range.begin);
          end = max(end, range.end);
        }
      }
    }
    int blocks = 0;
    if (begin < end) {
      blocks = blocks_of(end - begin) + __float2int_rn(__fdividef(static_cast<float>(more) * (end - begin), length));
    }
    return 2 * blocks + (num_rows <= 64);
  }

  // A lane for each candidate: from an even share of a multiprocessor upwards, or, where units are no longer than that,
  // from half of the longest one to all of it; and fractions of the longest one. Warps share out the tiles.
  static __device__ __forceinline__ int choose_length(const CrossAttentionParams& p, const SplitPlan& plan,
                                                      const int* weights, int* counts, int lane) {
    // In sixteenths of a block: start and end of a CTA, and a level of the tree in which groups add up.
    constexpr float kCta = Traits::kHeadDim == 128 ? 140 : 230, kLevel = Traits::kHeadDim == 128 ? 32 : 53;
    constexpr int kShares = 24;
    int longest = 0;
    unsigned total = 0;
    for (int i = lane; i < plan.max_tiles; i += 32) {
      const int weight = weights[i];
      if (weight == kNoTile) continue;
      longest = max(longest, weight / 2);
      total += weight / 2 * units_of(p, weight);
    }
    longest = max(1, max_of_warp(longest));
    total = __reduce_add_sync(0xffffffffu, total);
    const float sms = plan.num_sms, share = fminf(__fdividef(total, sms), 0.5f * longest);
    const float step = fmaxf(1.0f, 2.0f * share < longest ? share * (1.0f / 64) : longest * (0.5f / (kShares - 1)));
    const int length = lane < kShares ? max(2, __float2int_ru(share + lane * step))
                                      : __float2int_ru(__fdividef(longest, lane - kShares + 1) - 1e-3f);

    int full = 0, shorts = 0, longest_short = 0;
    for (int i = threadIdx.x / 32; i < plan.max_tiles; i += Traits::kThreads / 32) {
      const Cut cut(weights[i], length);
      const int units = units_of(p, cut.weight);
      full += min(cut.full, 4096) * units;  // more than any grid has
      if (cut.has_short()) shorts += units;
      longest_short = max(longest_short, cut.rest);
    }
    counts[threadIdx.x] = full;
    counts[Traits::kThreads + threadIdx.x] = shorts;
    counts[2 * Traits::kThreads + threadIdx.x] = longest_short;
    __syncthreads();
    full = shorts = longest_short = 0;
#pragma unroll 4
    for (int i = lane; i < Traits::kThreads; i += 32) {
      full += counts[i];
      shorts += counts[Traits::kThreads + i];
      longest_short = max(longest_short, counts[2 * Traits::kThreads + i]);
    }

    const float long_time = full > 0 ? 16.0f * length + kCta : 0.0f;
    const float short_time = shorts > 0 ? 16.0f * longest_short + kCta : 0.0f;
    const float short_work = 16.0f * (static_cast<float>(total) - static_cast<float>(full) * length) + shorts * kCta;
    float time = fmaxf(long_time, short_time);
    if (full + shorts > plan.num_sms) {
      // Wave after wave, and then half a short group where nothing is left for the others; or, if one wave takes the
      // long groups, the short ones aside.
      const float waves = ceilf(__fdividef(full, sms)), all = __fdividef(full * long_time + short_work, sms);
      const float in_turn = fmaxf(waves * long_time, all + 0.5f * short_time);
      const float aside = __fdividef(short_work, sms - full) + 0.5f * __fdividef(short_work, shorts);
      time = full < plan.num_sms && shorts > 0 ? fminf(in_turn, fmaxf(time, aside)) : in_turn;
    }
    time += kLevel * (32 - __clz(quotient(longest - 1, length)));
    if (full + shorts > plan.dealt_ctas) time = 2e9f;
    const unsigned best = __reduce_min_sync(0xffffffffu, static_cast<unsigned>(fminf(time, 6e7f)) * 32 + lane) % 32;
    return __shfl_sync(0xffffffffu, length, best);
  }
};

}  // namespace slowfast::cuda
