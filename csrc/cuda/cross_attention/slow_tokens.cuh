// Which KV blocks a tile of rows attends to, where slow tokens lie in pieces and rows see ranges of them.
//
// Tokens of a sequence are counted along its pieces. A stretch is a run of tokens that some row of the tile sees each, holes
// shorter than a block among them; a run is what a stretch and a piece share, and is cut into blocks from its first token on,
// the last of them short. Blocks are numbered over all runs in order: splits share out these numbers, so that work is even
// whatever the rows see, and a function of the sequence alone. All of it is done by whole warps, with no memory but
// registers: a lane holds some of the tile's text rows and one of 32 pieces.
#pragma once
#include "epilogue.cuh"
#include "ranges.cuh"

namespace slowfast::cuda {

// 32 pieces of a sequence, one a lane.
struct PieceWindow {
  int first;       // number of lane 0's piece in the sequence
  int base, next;  // tokens of the sequence before the window, and before the one behind it
  int begin, end;  // the lane's piece: tokens of the sequence,
  int source;      // and its first token among all slow tokens
};

// The pieces of a sequence; without any, the sequence is one.
struct Pieces {
  const CrossAttentionParams& p;
  const int first, num;  // pieces of the sequence, or its slow tokens

  __device__ __forceinline__ Pieces(const CrossAttentionParams& p, int first, int num) : p(p), first(first), num(num) {}

  __device__ __forceinline__ int count() const { return p.slow_pieces == nullptr ? 1 : num; }
  // Among all slow tokens; nothing from count() on, which is not waited for: `num` may come with the pieces.
  __device__ __forceinline__ Range load(int i) const {
    Range piece = {first, first + num};
    if (p.slow_pieces != nullptr && first + i < p.num_pieces) {
      const int2 found = __ldg(reinterpret_cast<const int2*>(p.slow_pieces) + first + i);
      piece = {found.x, found.y};
    }
    return i < count() ? piece : Range{0, 0};
  }
  __device__ __forceinline__ PieceWindow window(int first, int base, int lane) const {
    const Range piece = load(first + lane);
    const int length = piece.length(), end = base + inclusive_sum_of_warp(length, lane);
    return {first, base, __shfl_sync(0xffffffffu, end, 31), end - length, end, piece.begin};
  }
  using Size = TokensAndBlocks;  // of the sequence: its tokens, and the blocks that they make where all are seen
  __device__ __forceinline__ Size size(int block, int lane) const {
    constexpr int kLoads = 4;  // in flight together
    Size sum = {0, 0};
#pragma unroll 1
    for (int first = lane; first < count(); first += 32 * kLoads) {
      int lengths[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) lengths[i] = load(first + 32 * i).length();
#pragma unroll
      for (int length : lengths) {
        sum.tokens += length;
        sum.blocks += (length + block - 1) / block;
      }
    }
    return total_of_warp(sum);
  }
  // The same by all threads of a CTA, where there are many pieces; leaves that of each window in `windows`.
  template <typename Traits>
  __device__ __forceinline__ Size sum_windows(Size* windows, int lane) const {
    constexpr int kLoads = 4, kWarps = Traits::kThreads / 32;
    const int num_windows = (count() + 31) / 32;
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < num_windows; first += kWarps * kLoads) {
      int lengths[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) lengths[i] = load(32 * (first + i * kWarps) + lane).length();
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int window = first + i * kWarps;
        const Size sum = total_of_warp({lengths[i], (lengths[i] + Traits::kBlockN - 1) / Traits::kBlockN});
        if (lane == 0 && window < num_windows) windows[window] = sum;
      }
    }
    __syncthreads();
    Size sum = {0, 0};
    for (int window = lane; window < num_windows; window += 32) {
      sum.tokens += windows[window].tokens;
      sum.blocks += windows[window].blocks;
    }
    return total_of_warp(sum);
  }

 private:
  static __device__ __forceinline__ Size total_of_warp(Size x) {
    return {__reduce_add_sync(0xffffffffu, x.tokens), __reduce_add_sync(0xffffffffu, x.blocks)};
  }
};

// What the text rows of a tile see; a lane holds every 32nd of them.
template <typename Traits>
struct Sight {
  static constexpr int kRows = Traits::kBlockM / 32, kBlockN = Traits::kBlockN;
  Range rows[kRows];
  const bool has_ranges;  // otherwise all rows see all tokens
  int length = kNoToken;  // of the sequence

  // Rows may end behind the sequence before `clamp`: their ranges are read beside its length.
  __device__ __forceinline__ Sight(const CrossAttentionParams& p, const SplitPlan& plan, const Tile& tile, int lane)
      : has_ranges(p.slow_begin != nullptr || p.slow_end != nullptr) {
    const int first = text_of(plan, tile.row_begin), last = text_of(plan, tile.row_begin + tile.num_rows - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int text = first + lane + 32 * i;
      rows[i] = {0, 0};
      if (text <= last) rows[i] = range_of(p, tile.text_begin + text, kNoToken);
    }
  }
  __device__ __forceinline__ void clamp(int num_tokens) {
    length = num_tokens;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i].end = min(rows[i].end, length);
      if (rows[i].begin >= rows[i].end) rows[i] = {kNoToken, 0};
    }
  }

  // The first token from `token` on that some row sees, or kNoToken.
  __device__ __forceinline__ int next(int token) const {
    if (!has_ranges) return token < length ? token : kNoToken;
    int first = kNoToken;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (rows[i].end > token) first = min(first, max(rows[i].begin, token));
    }
    return min_of_warp(first);
  }
  // Where the stretch that begins with `token` ends.
  __device__ __forceinline__ int stretch_end(int token) const {
    if (!has_ranges) return length;
    int end = token;
    while (true) {
      int reach = end;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (rows[i].begin < end + kBlockN) reach = max(reach, rows[i].end);
      }
      reach = max_of_warp(reach);
      if (reach == end) return end;
      end = reach;
    }
  }
  // A row that sees `token` sees all from there to this end; `token` itself if there is none.
  __device__ __forceinline__ int end_of_one(int token) const {
    if (!has_ranges) return length;
    int end = token;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (rows[i].begin <= token) end = max(end, rows[i].end);
    }
    return max_of_warp(end);
  }
  // What rows see of a block of these tokens, if it may not be all. Lane 0 writes, as it is the one that announces the block.
  __device__ __forceinline__ void describe(Range tokens, bool is_seen, int lane, typename Traits::Block& block) const {
    uint32_t missing = 0;
    if (!is_seen) {
      const auto bits_below = [](int count) { return count >= 32 ? ~0u : (1u << max(count, 0)) - 1; };
#pragma unroll 1
      for (int word = 0; word < kBlockN / 32; ++word) {
        const int start = tokens.begin + 32 * word, limit = tokens.end - start;
        uint32_t seen = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int begin = min(rows[i].begin, tokens.end) - start;
          seen |= bits_below(min(limit, rows[i].end - start)) & ~bits_below(begin);
        }
        seen = __reduce_or_sync(0xffffffffu, seen);
        if (lane == 0) block.seen[word] = seen;
        missing |= ~seen;
      }
    }
    if (lane == 0) {
      block.begin = tokens.begin;
      block.end = tokens.end;
      block.is_seen = missing == 0;
    }
  }
};

// The blocks of a tile, from one of them on.
template <typename Traits>
class BlockWalk {
 public:
  static constexpr int kBlockN = Traits::kBlockN;

  // By all threads of the CTA.
  __device__ __forceinline__ BlockWalk(const CrossAttentionParams& p, const SplitPlan& plan,
                                       typename Traits::SharedStorage& shared, const Tile& tile, int lane)
      : pieces_(p, tile.slow_begin, tile.num_slow), sight_(p, plan, tile, lane), lane_(lane),
        window_(pieces_.window(0, 0, lane)), sums_(are_many() ? shared.windows : nullptr) {
    if (pieces_.count() == 1) {
      size_ = {window_.next, (window_.next + kBlockN - 1) / kBlockN};
    } else if (sums_ != nullptr) {
      size_ = pieces_.template sum_windows<Traits>(sums_, lane);
    } else {
      size_ = pieces_.size(kBlockN, lane);
    }
    sight_.clamp(size_.tokens);
  }

  __device__ __forceinline__ int length() const { return size_.tokens; }

  // Blocks of the tile. The walk stands at the first.
  __device__ __forceinline__ int count() {
    if (!sight_.has_ranges) {
      stretch_end_ = size_.tokens;
      first_blocks_ = size_.blocks;
      return size_.blocks;
    }
    int total = 0;
    for (int begin = sight_.next(0); begin != kNoToken;) {
      const int end = sight_.stretch_end(begin), blocks = count_of(begin, end);
      if (total == 0) {
        token_ = begin;
        stretch_end_ = end;
        first_blocks_ = blocks;
      }
      total += blocks;
      begin = sight_.next(end);
    }
    return total;
  }

  // From the first block to block `number`, which there is.
  __device__ __forceinline__ void seek(int number) {
    for (int blocks = first_blocks_; number >= blocks; blocks = count_of(token_, stretch_end_)) {
      number -= blocks;
      token_ = sight_.next(stretch_end_);
      stretch_end_ = sight_.stretch_end(token_);
    }
    if (pieces_.count() == 1) {
      token_ += number * kBlockN;
      return;
    }
    if (sums_ != nullptr && !sight_.has_ranges) {
      number -= skip_windows(number);
    } else {
      rewind();
    }
    while (true) {
      const int blocks = blocks_of_lane(token_, stretch_end_), past = inclusive_sum_of_warp(blocks, lane_);
      const unsigned found = __ballot_sync(0xffffffffu, past > number);
      if (found != 0) {
        const int token = max(window_.begin, token_) + (number - (past - blocks)) * kBlockN;
        token_ = __shfl_sync(0xffffffffu, token, __ffs(found) - 1);
        return;
      }
      number -= __shfl_sync(0xffffffffu, past, 31);
      advance();
    }
  }

  // The tokens of the next block; returns where they begin among all slow tokens.
  __device__ __forceinline__ int next(Range& tokens) {
    if (token_ >= run_end_) open_run();
    tokens = {token_, min(token_ + kBlockN, run_end_)};
    token_ = tokens.end;
    return tokens.begin + to_source_;
  }
  __device__ __forceinline__ void describe(Range tokens, typename Traits::Block& block) {
    const bool is_whole = tokens.end - tokens.begin == kBlockN;
    if (is_whole && tokens.end > seen_end_) seen_end_ = sight_.end_of_one(tokens.begin);
    sight_.describe(tokens, is_whole && tokens.end <= seen_end_, lane_, block);
  }

 private:
  // One window after the other would be looked for longer than it takes to sum them all up together.
  __device__ __forceinline__ bool are_many() const {
    return pieces_.count() > 4 * 32 && pieces_.count() <= 32 * Traits::kSummedWindows;
  }
  // To the window of block `number`, where all tokens are seen; returns the blocks of the windows before.
  __device__ __forceinline__ int skip_windows(int number) {
    TokensAndBlocks passed = {0, 0};
    for (int first = 0;; first += 32) {
      const bool is_one = 32 * (first + lane_) < pieces_.count();
      const TokensAndBlocks sum = is_one ? sums_[first + lane_] : TokensAndBlocks{0, 0};
      const int blocks = passed.blocks + inclusive_sum_of_warp(sum.blocks, lane_);
      const int tokens = passed.tokens + inclusive_sum_of_warp(sum.tokens, lane_);
      const unsigned found = __ballot_sync(0xffffffffu, blocks > number);
      const int source = found != 0 ? __ffs(found) - 1 : 31;
      passed = {__shfl_sync(0xffffffffu, tokens, source), __shfl_sync(0xffffffffu, blocks, source)};
      if (found != 0) {
        passed.tokens -= __shfl_sync(0xffffffffu, sum.tokens, source);
        passed.blocks -= __shfl_sync(0xffffffffu, sum.blocks, source);
        window_ = pieces_.window(32 * (first + source), passed.tokens, lane_);
        return passed.blocks;
      }
    }
  }
  __device__ __forceinline__ void open_run() {
    if (token_ >= stretch_end_) {
      token_ = sight_.next(token_);
      stretch_end_ = sight_.stretch_end(token_);
    }
    if (token_ < window_.base) rewind();
    while (token_ >= window_.next) advance();
    const int piece = __ffs(__ballot_sync(0xffffffffu, window_.begin <= token_ && token_ < window_.end)) - 1;
    to_source_ = __shfl_sync(0xffffffffu, window_.source - window_.begin, piece);
    run_end_ = min(stretch_end_, __shfl_sync(0xffffffffu, window_.end, piece));
    seen_end_ = 0;
  }
  __device__ __forceinline__ void rewind() {
    if (window_.first != 0) window_ = pieces_.window(0, 0, lane_);
  }
  __device__ __forceinline__ void advance() { window_ = pieces_.window(window_.first + 32, window_.next, lane_); }

  // Of the runs of tokens begin .. end - 1 with the lane's piece.
  __device__ __forceinline__ int blocks_of_lane(int begin, int end) const {
    return (max(0, min(end, window_.end) - max(begin, window_.begin)) + kBlockN - 1) / kBlockN;
  }
  __device__ __forceinline__ int count_of(int begin, int end) {
    rewind();
    int blocks = blocks_of_lane(begin, end);
    while (window_.next < end) {
      advance();
      blocks += blocks_of_lane(begin, end);
    }
    return __reduce_add_sync(0xffffffffu, blocks);
  }

  const Pieces pieces_;
  Sight<Traits> sight_;
  const int lane_;
  PieceWindow window_;
  TokensAndBlocks* const sums_;  // of each window; or nullptr
  Pieces::Size size_;
  int token_ = 0;        // the next block begins here,
  int stretch_end_ = 0;  // in this stretch,
  int run_end_ = 0;      // and run,
  int first_blocks_ = 0; // of the first stretch
  int to_source_ = 0;    // what to add for its place among all slow tokens
  int seen_end_ = 0;     // a row that sees the begin of an earlier block sees all from there to here
};

// The rows of a consumer's thread, and when its warp must look at what they see.
template <typename Traits>
struct RowSight {
  static constexpr int kBlockN = Traits::kBlockN;
  Range rows[2];                 // empty ones are {0, 0}
  int last_begin, first_end;     // of the warp's rows that see anything

  __device__ __forceinline__ RowSight(const CrossAttentionParams& p, const SplitPlan& plan, const Tile& tile, int length,
                                      int first_row, int thread) {
    last_begin = 0;
    first_end = kNoToken;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
      rows[r] = {0, 0};
      if (row < tile.num_rows) rows[r] = range_of(p, tile.text_begin + text_of(plan, tile.row_begin + row), length);
      if (is_empty(r)) {
        rows[r] = {0, 0};
      } else {
        last_begin = max(last_begin, rows[r].begin);
        first_end = min(first_end, rows[r].end);
      }
    }
    last_begin = max_of_warp(last_begin);
    first_end = min_of_warp(first_end);
  }
  __device__ __forceinline__ bool is_empty(int r) const { return rows[r].begin >= rows[r].end; }
  __device__ __forceinline__ bool all_see(int begin, int end) const {
    return end - begin == kBlockN && last_begin <= begin && first_end >= end;
  }
};

}  // namespace slowfast::cuda
