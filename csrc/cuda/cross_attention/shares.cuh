// Uneven batches. A plan cuts all units alike, as is best for sequences of equal lengths, which is all that the host can
// assume. Every CTA looks at the lengths that there are, and where they are not equal, all find the same other way to cut
// units: into groups of at most `length` blocks, one length for all, the longest of them first. A batch that is even pays
// for no more than the look.
#pragma once
#include "slow_tokens.cuh"

namespace slowfast::cuda {

// A lane's sequence of 32 from `first` on; nothing behind the last. Slow tokens are pieces where there are any.
struct Sequence {
  int text_begin, num_text, slow_begin, num_slow;
};
__device__ __forceinline__ Sequence load_sequence(const CrossAttentionParams& p, int first, int lane) {
  const int b = min(first + lane, p.batch - 1);
  const int text_begin = p.cu_text[b], text_end = p.cu_text[b + 1];
  const int slow_begin = p.cu_slow[b], slow_end = p.cu_slow[b + 1];
  return {text_begin, first + lane < p.batch ? text_end - text_begin : 0, slow_begin, slow_end - slow_begin};
}
// The first look: the longest sequence is little longer than all are on average, in slow tokens and in text rows. False where
// another look is needed.
template <typename Traits>
__device__ __forceinline__ bool look_even(const CrossAttentionParams& p, const SplitPlan& plan, const Sequence& sequence, int lane) {
  int longest = sequence.num_slow, most = sequence.num_text, last = sequence.slow_begin + sequence.num_slow;
  for (int first = 32; first < p.batch; first += 32) {
    const Sequence next = load_sequence(p, first, lane);
    longest = max(longest, next.num_slow);
    most = max(most, next.num_text);
    last = next.slow_begin + next.num_slow;
  }
  longest = max_of_warp(longest);
  most = max_of_warp(most);
  const int all = __shfl_sync(0xffffffffu, last, 31);  // cu_slow begins with 0, and lanes behind its end repeat it
  const float batch = p.batch;
  return 8.0f * batch * longest <= 9.0f * all && 8.0f * batch * (most - 1) <= 9.0f * p.num_text &&
         9.0f * longest >= 8.0f * Traits::kBlockN * plan.even_blocks && (!Traits::kGeneral || p.slow_pieces == nullptr);
}

template <typename Traits>
class Shares {
 public:
  // By all lanes of a warp; `sequence` is load_sequence(p, 0, lane).
  __device__ __forceinline__ Shares(const CrossAttentionParams& p, const SplitPlan& plan, const Sequence& sequence, int lane)
      : p_(p), plan_(plan), sequence_(sequence), lane_(lane) {
    for (int first = 0; first < p.batch; first += 32) {
      const Work work = load(first);
      longest_ = max(longest_, work.units > 0 ? work.blocks : 0);
      units_ += work.units;
      total_ += static_cast<unsigned>(work.units) * work.blocks;
    }
    longest_ = max_of_warp(longest_);
    if (kIsBytes) units_ = __reduce_add_sync(0xffffffffu, units_);
    total_ = __reduce_add_sync(0xffffffffu, total_);
  }

  // So nearly that the plan's way is as good as any.
  __device__ __forceinline__ bool are_even() const {
    if (longest_ <= shortest_length()) return true;
    if (kIsBytes && static_cast<float>(longest_) * units_ > 4e9f) return true;  // more than is counted here
    const auto are_near = [](float x, float y) { return 9.0f * x >= 8.0f * y && 9.0f * y >= 8.0f * x; };
    const float longest = static_cast<float>(longest_), planned = static_cast<float>(plan_.even_blocks);
    return are_near(longest * plan_.even_units, total_) && (planned == 0.0f || are_near(longest, planned));
  }

  // By all threads: blocks of the longest group; 0: there is no room to cut units otherwise. `scratch` has room for kScratch
  // words, and is free again when this returns.
  static constexpr int kScratch = 4 * Traits::kThreads;
  __device__ __forceinline__ int choose_length(int* scratch) const {
    if (!kIsBytes) return choose_best_length(scratch);
    // Groups that saturate the memory are enough. A unit has a group more than its blocks fill, or none.
    const int slots = min(plan_.share_slots, room() - static_cast<int>(units_));
    return slots <= 0 ? 0 : max(shortest_length(), static_cast<int>(__fdividef(total_, slots) * 1.00001f) + 1);
  }

  // A lane for each candidate, some around an even share, some fractions of the longest unit. Warps share out the sequences.
  __device__ __forceinline__ int choose_best_length(int* scratch) const {
    constexpr int kShares = 26, kWarps = Traits::kThreads / 32;
    const int share = max(shortest_length(), static_cast<int>(__fdividef(total_, plan_.share_slots)));
    const int length = lane_ < kShares ? static_cast<int>(share * (12 + 2 * lane_) * (1.0f / 24)) + 1
                                       : groups_of(longest_, lane_ - kShares + 1);
    int groups = 0, parts = 0, single = 0;
    unsigned part_blocks = 0;  // of the units that have several groups
    for (int first = 0; first < p_.batch; first += 32) {
      const Work mine = load(first);
      for (int source = threadIdx.x / 32; source < min(32, p_.batch - first); source += kWarps) {
        const int units = __shfl_sync(0xffffffffu, mine.units, source), blocks = __shfl_sync(0xffffffffu, mine.blocks, source);
        const int each = groups_of(blocks, length);
        groups += units * each;
        if (each > 1) {
          parts += units * each;
          part_blocks += static_cast<unsigned>(units) * blocks;
        } else if (units > 0) {
          single = max(single, blocks);
        }
      }
    }
    scratch[threadIdx.x] = groups;
    scratch[Traits::kThreads + threadIdx.x] = parts;
    scratch[2 * Traits::kThreads + threadIdx.x] = single;
    scratch[3 * Traits::kThreads + threadIdx.x] = part_blocks;
    __syncthreads();
    groups = parts = single = 0;
    part_blocks = 0;
#pragma unroll 1
    for (int i = lane_; i < Traits::kThreads; i += 32) {
      groups += scratch[i];
      parts += scratch[Traits::kThreads + i];
      single = max(single, scratch[2 * Traits::kThreads + i]);
      part_blocks += scratch[3 * Traits::kThreads + i];
    }
    __syncthreads();  // the scratch is free
    const bool fits = length >= shortest_length() && groups <= room() && parts <= 2 * plan_.share_slots;
    const unsigned time = fits ? static_cast<unsigned>(fminf(time_of(length, groups, parts, part_blocks, single), 6e7f)) : kNoTime;
    const unsigned best = __reduce_min_sync(0xffffffffu, time * 32 + lane_);
    return best / 32 == kNoTime ? 0 : __shfl_sync(0xffffffffu, length, best % 32);
  }

  // What this CTA has to do, if anything. Units of several groups come first, whose parts need room, then others, longer ones
  // before shorter ones.
  __device__ __forceinline__ bool find(int length, Unit& unit, Tile& tile) const {
    const int group = (blockIdx.z * gridDim.y + blockIdx.y) * plan_.max_tiles + ptx::cluster_index();
    int passed = 0;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll 1
      for (int first = 0; first < p_.batch; first += 32) {
        const Work work = load(first);
        const int groups = groups_of(work.blocks, length);
        const int count = turn_of(work.blocks, groups, length) == turn ? groups * work.units : 0;
        const int end = passed + inclusive_sum_of_warp(count, lane_);
        const unsigned past = __ballot_sync(0xffffffffu, end > group);
        if (past != 0) {
          take(first == 0 ? sequence_ : load_sequence(p_, first, lane_), groups, work.units, end - count, group,
               __ffs(past) - 1, unit, tile);
          return true;
        }
        passed = __shfl_sync(0xffffffffu, end, 31);
      }
    }
    return false;
  }

 private:
  static constexpr bool kIsBytes = Traits::kConsumers == 1;
  static constexpr int kTurns = kIsBytes ? 2 : 4;
  static constexpr unsigned kNoTime = 1u << 26;
  // Of a sequence.
  struct Work {
    int units, blocks;  // blocks of each unit
  };

  __device__ __forceinline__ Work load(int first) const {
    const Sequence sequence = first == 0 ? sequence_ : load_sequence(p_, first, lane_);
    const int rows = sequence.num_text * plan_.heads_per_kv;
    int units = rows / Traits::kBlockM * p_.num_kv_heads;
    if (const int rest = rows % Traits::kBlockM; rest > 0) {
      units += Traits::kConsumers == 2 && rest <= 64 ? (p_.num_kv_heads + 1) / 2 : p_.num_kv_heads;
    }
    const auto blocks_of = [](int tokens) { return (tokens + Traits::kBlockN - 1) / Traits::kBlockN; };
    int blocks = blocks_of(sequence.num_slow);
    if (Traits::kGeneral && p_.slow_pieces != nullptr) {
      blocks = 0;
#pragma unroll 4
      for (int i = 0; i < sequence.num_slow && units > 0; ++i) {
        const int2 piece = __ldg(reinterpret_cast<const int2*>(p_.slow_pieces) + sequence.slow_begin + i);
        blocks += blocks_of(max(0, piece.y - piece.x));
      }
    }
    return {units, blocks};
  }

  __device__ __forceinline__ int room() const { return gridDim.z * gridDim.y * plan_.max_tiles; }  // groups of the grid
  // Below, a group's own time is all that is left.
  __device__ __forceinline__ int shortest_length() const { return (kIsBytes ? 8 : 2) * plan_.cluster_size; }

  // Divisions of integers would take longer than all the rest. Of fewer than some thousand groups the number is exact.
  static __device__ __forceinline__ int groups_of(int blocks, int length) {
    return max(1, __float2int_ru(__fdividef(blocks, length) - 1e-3f));
  }
  static __device__ __forceinline__ int quotient(int x, int y) { return __float2int_rz(__fdividef(x + 0.5f, y)); }  // x < 2^20
  static __device__ __forceinline__ int turn_of(int blocks, int groups, int length) {
    if (groups > 1) return 0;
    if (kIsBytes) return 1;
    return 2 * blocks > length ? 1 : 4 * blocks > length ? 2 : 3;
  }

  // In sixteenths of the time that a CTA takes for a block. Groups of units that have several are one length, and come first.
  // Where they take one wave, the others fill what it leaves, or run aside on the slots that it does not need, whichever is
  // sooner; the last of them ends alone. Else wave after wave. Against schedules played out over 800 random batches, the
  // length that this likes best takes 2% longer than the best candidate (25% in one of a hundred).
  __device__ __forceinline__ float time_of(int length, int groups, int parts, unsigned part_blocks, int single) const {
    // Start and end of a CTA, more of them in a cluster, and where gates outlast a short loop; a level of the tree in which
    // groups add up.
    constexpr bool kIsWide = Traits::kHeadDim == 128;
    constexpr float kCta = kIsWide ? 80 : 130, kCluster = kIsWide ? 43 : 70, kGates = kIsWide ? 32 : 52, kLevel = kIsWide ? 32 : 53;
    const int slots = plan_.share_slots;
    const bool are_clusters = plan_.cluster_size > 1;
    const float cta = kCta + (are_clusters ? kCluster : 0.0f) + (p_.state != nullptr ? kGates : 0.0f);
    const float block = __fdividef(16.0f, plan_.cluster_size), slot = __fdividef(1.0f, slots);
    const float long_group = parts > 0 ? block * min(length, longest_) + cta : 0.0f;
    const float other = groups > parts ? block * single + cta : 0.0f;
    const float even = (block * total_ + groups * cta) * slot;
    float time = fmaxf(long_group, other);
    if (parts > slots) {
      time = fmaxf(fmaxf(ceilf(parts * slot - 1e-3f) * long_group, other), even + 0.25f * long_group);
    } else if (groups > slots) {
      const float others = block * (total_ - part_blocks) + (groups - parts) * cta;
      const float aside = parts < slots ? __fdividef(others, slots - parts) + 0.25f * other : 1e9f;
      time = fmaxf(time, fminf(even + 0.75f * other, aside));
    }
    const int most_groups = groups_of(longest_, length);
    float sum = most_groups == 1 ? 0.0f : kLevel * (32 - __clz(most_groups - 1));
    if (most_groups > 1 && are_clusters) sum = 2 * kLevel + 2.0f * most_groups;
    return time + sum;
  }

  __device__ __forceinline__ void take(const Sequence& sequence, int groups, int units, int begin, int group, int source,
                                       Unit& unit, Tile& tile) const {
    const auto of_source = [&](int x) { return __shfl_sync(0xffffffffu, x, source); };
    const int num_units = of_source(units), place = group - of_source(begin);
    const int num_rows = of_source(sequence.num_text) * plan_.heads_per_kv;
    // Units that share K and V are neighbours, and half tiles of two KV heads, which share a unit, come last.
    const int rest = num_rows % Traits::kBlockM;
    const bool has_half = Traits::kConsumers == 2 && rest > 0 && rest <= 64;
    const int tiles = (num_rows + Traits::kBlockM - 1) / Traits::kBlockM - has_half;
    const int turn = quotient(place, num_units), number = place - turn * num_units;
    const bool is_half = number >= tiles * p_.num_kv_heads;
    unit.num_groups = of_source(groups);
    unit.group = turn;
    unit.first_part = of_source(begin) + number * unit.num_groups;
    unit.index = unit.first_part;
    unit.kv_head = is_half ? 2 * (number - tiles * p_.num_kv_heads) : quotient(number, tiles);
    unit.long_blocks = 0;
    unit.is_cut_alike = false;
    unit.paired = is_half && unit.kv_head + 1 < p_.num_kv_heads;
    tile.row_begin = (is_half ? tiles : number - unit.kv_head * tiles) * Traits::kBlockM;
    tile.num_rows = min(Traits::kBlockM, num_rows - tile.row_begin);
    tile.text_begin = of_source(sequence.text_begin);
    tile.slow_begin = of_source(sequence.slow_begin);
    tile.num_slow = of_source(sequence.num_slow);
  }

  const CrossAttentionParams& p_;
  const SplitPlan& plan_;
  const Sequence sequence_;
  const int lane_;
  int longest_ = 0;     // blocks
  unsigned units_ = 0;  // if kIsBytes
  unsigned total_ = 0;  // blocks of all units, if these are fewer than 2^32
};

}  // namespace slowfast::cuda
