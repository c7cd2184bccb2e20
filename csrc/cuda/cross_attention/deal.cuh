// Work dealt out on the device: which unit a CTA has, and which share of its blocks, where tiles differ in what their rows
// see, which the host does not know. A unit is cut into equal groups of at most `length` blocks, one length for all units:
// the one of a few dozen that a model of the time likes best. Units with much to do come first, as later rows mostly see more.
//
// All CTAs find the same answer from the same lengths and ranges, each thread looking at a tile. The number of blocks is a
// guess where a tile's rows leave holes; it decides how work is shared and nothing else.
#pragma once
#include "slow_tokens.cuh"

namespace slowfast::cuda {

template <typename Traits>
class Deal {
 public:
  // By all threads; `scratch` has room for a word a tile and a thread, and is free again when this returns. Sets `unit` and
  // `tile_index`; false: no work.
  static __device__ __forceinline__ bool find(const CrossAttentionParams& p, const SplitPlan& plan, int* scratch, int lane,
                                              Unit& unit, int& tile_index) {
    for (int i = threadIdx.x; i < plan.max_tiles; i += Traits::kThreads) scratch[i] = weigh(p, plan, i);
    __syncthreads();
    const int length = choose_length(p, plan, scratch, scratch + plan.max_tiles, lane);

    int passed = 0;
    const int cta = blockIdx.x;
    bool found = false;
    for (int first = plan.max_tiles - 1; first >= 0 && !found; first -= 32) {
      const int tile = first - lane, weight = tile >= 0 ? scratch[tile] : kNoTile;
      const int groups = groups_of(weight, length), units = units_of(p, weight);
      const int end = passed + inclusive_sum_of_warp(groups * units, lane), begin = end - groups * units;
      const unsigned past = __ballot_sync(0xffffffffu, end > cta);
      found = past != 0;
      if (found) {
        const int source = __ffs(past) - 1;
        const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
        tile_index = of_source(tile);
        unit.num_groups = of_source(groups);
        const int place = cta - of_source(begin), count = of_source(units);
        const int number = place % count;  // KV heads side by side: their CTAs take equally long
        unit.kv_head = count < p.num_kv_heads ? 2 * number : number;
        unit.group = place / count;
        unit.first_part = of_source(begin) + number * unit.num_groups;
      }
      passed = __shfl_sync(0xffffffffu, end, 31);
    }
    ptx::fence_proxy_async();  // the scratch is TMA's
    __syncthreads();
    unit.index = static_cast<int64_t>(unit.kv_head) * plan.max_tiles + tile_index;
    return found;
  }

 private:
  // A tile's blocks, times two, plus one if its rows are half a tile or less, so that two KV heads share a unit.
  static constexpr int kNoTile = -1;

  // A division would take longer than all the rest; of too many groups by one, each gets a little less.
  static __device__ __forceinline__ int groups_of(int weight, int length) {
    return weight == kNoTile ? 0 : max(1, __float2int_ru(weight / 2 * __frcp_rn(length) - 1e-3f));
  }
  static __device__ __forceinline__ int units_of(const CrossAttentionParams& p, int weight) {
    return weight % 2 == 1 ? (p.num_kv_heads + 1) / 2 : p.num_kv_heads;
  }

  // By one thread.
  static __device__ __forceinline__ int weigh(const CrossAttentionParams& p, const SplitPlan& plan, int index) {
    Tile tile = {0, 0, 0, 0, 0};
#pragma unroll 4
    for (int b = 0; b < p.batch; ++b) {
      const int text_begin = __ldg(p.cu_text + b), rows = (__ldg(p.cu_text + b + 1) - text_begin) * plan.heads_per_kv;
      const int tiles = (rows + Traits::kBlockM - 1) / Traits::kBlockM;
      if (index < tiles) {
        const int row_begin = index * Traits::kBlockM, slow_begin = __ldg(p.cu_slow + b);
        const int num_slow = __ldg(p.cu_slow + b + 1) - slow_begin;
        tile = {text_begin, row_begin, min(Traits::kBlockM, rows - row_begin), slow_begin, num_slow};
        break;
      }
      index -= tiles;
    }
    if (tile.num_rows == 0) return kNoTile;
    const Pieces pieces(p, tile);
    int length = 0;
#pragma unroll 4
    for (int i = 0; i < pieces.count(); ++i) {
      const Range piece = pieces.load(i);
      length += max(0, piece.end - piece.begin);
    }
    const int first = text_of(plan, tile.row_begin), last = text_of(plan, tile.row_begin + tile.num_rows - 1);
    int begin = kNoToken, end = 0;
#pragma unroll 16
    for (int text = first; text <= last; ++text) {
      const Range range = range_of(p, tile.text_begin + text, length);
      if (range.begin < range.end) {
        begin = min(begin, range.begin);
        end = max(end, range.end);
      }
    }
    const int blocks = begin < end ? (end - begin + Traits::kBlockN - 1) / Traits::kBlockN : 0;
    return 2 * blocks + (tile.num_rows <= 64);
  }

  // A lane for each candidate: some from an even share of a multiprocessor upwards, some fractions of the longest unit.
  // Warps share out the tiles; `counts` has a word a thread.
  static __device__ __forceinline__ int choose_length(const CrossAttentionParams& p, const SplitPlan& plan, const int* weights,
                                                      int* counts, int lane) {
    // In sixteenths of a block: start and end of a CTA, and a level of the tree in which groups add up.
    constexpr int kCta = Traits::kHeadDim == 128 ? 110 : 180, kLevel = Traits::kHeadDim == 128 ? 32 : 53;
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
    const int share = max(2, static_cast<int>(total / plan.num_sms));
    const int length = lane < kShares ? share + lane * share / kShares + 1 : (longest + lane - kShares) / (lane - kShares + 1);
    int part = 0;
    for (int i = threadIdx.x / 32; i < plan.max_tiles; i += Traits::kThreads / 32) {
      part += groups_of(weights[i], length) * units_of(p, weights[i]);
    }
    counts[threadIdx.x] = part;
    __syncthreads();
    int ctas = 0;
#pragma unroll
    for (int warp = 0; warp < Traits::kThreads / 32; ++warp) ctas += counts[32 * warp + lane];
    const int groups = (longest + length - 1) / length, levels = 32 - __clz(groups - 1);
    float time = 16.0f * min(length, longest) + kCta + kLevel * levels;
    if (ctas > plan.num_sms) {
      time = fmaxf(time, (16.0f * total + static_cast<float>(ctas) * kCta) / plan.num_sms + 8.0f * min(length, longest));
    }
    if (ctas > plan.dealt_ctas) time = 2e9f;
    const unsigned best = __reduce_min_sync(0xffffffffu, static_cast<unsigned>(fminf(time, 6e7f)) * 32 + lane) % 32;
    return __shfl_sync(0xffffffffu, length, best);
  }
};

}  // namespace slowfast::cuda
