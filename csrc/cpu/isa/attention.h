// One unit of text cross-attention: a tile of query rows against a run of slow tokens, online softmax.
//
// Roofline: at decode (7 rows a KV head) a K or V element is used 7 times, so the kernel must stream near memory speed
// and still issue one FMA a cycle; with many rows it is a GEMM and must keep the FMA units full. Both come from one
// micro-kernel in which lanes are query rows: a vector holds kLanes / W rows x W neighbouring elements of D, and K (or
// V) enters as a broadcast of W elements, straight from a row. Softmax is then vertical, nothing is transposed, and W
// is what fills the vector when rows are few: 7 rows take W = 2, one row takes W = kLanes, many take W = 1.
// With AVX512-BF16 a lane holds a bf16 pair, which doubles the rate: pairs along D for Q K^T, along tokens for P V.
#pragma once
#include "../kernels.h"
#include "../tokens.h"
#include "simd.h"

#include <type_traits>

namespace slowfast::cpu {
namespace {

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Broadcast operands a micro-kernel call; a divisor of kTokenTile.
constexpr int kBlock = 8;

struct FloatOps {
  static constexpr int kPack = 1;   // elements a lane
  static SLOWFAST_INLINE Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct PairOps {
  static constexpr int kPack = 2;
  static SLOWFAST_INLINE Vec dot(Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }
};
#endif

// acc[i][j] += sum over k of a[k][j] * broadcast_W(b + i * stride_i + k * stride_k);  a is [count] rows of R vectors,
// stride_a apart.
template <class Ops, int N, int R, int W>
SLOWFAST_INLINE void multiply(const float* a, int64_t stride_a, const float* b, int64_t stride_i, int64_t stride_k,
                              int64_t count, Vec (&acc)[N][R]) {
  for (int64_t k = 0; k < count; ++k) {
    Vec rows[R];
    for (int j = 0; j < R; ++j) rows[j] = load(a + k * stride_a + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec element = repeat<W>(b + i * stride_i + k * stride_k);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) acc[i][j] = Ops::dot(rows[j], element, acc[i][j]);
    }
  }
}

// Sizes in floats of what one tile of R vectors of rows needs. kPack elements of D or two tokens share a lane.
template <class Ops, int R, int W>
struct Layout {
  int64_t head_dim, qk_chunks, pv_chunks, k_stride, v_stride;
  explicit Layout(int64_t d)
      : head_dim(d),
        qk_chunks(div_up(d, Ops::kPack * W)),
        pv_chunks(round_up(div_up(d, W), kBlock)),
        k_stride(qk_chunks * W),
        v_stride(pv_chunks * W) {}
  int64_t state() const { return (qk_chunks + pv_chunks + 3) * R * kLanes; }   // of a KV head: Q, O, 3 running values
  int64_t tiles() const { return kTokenTile * (k_stride + v_stride / Ops::kPack + R * kLanes * 2); }
};

template <class T>
SLOWFAST_INLINE void widen_row(const T* from, int64_t count, float* to, int64_t padded) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d));
  for (; d < count; ++d) to[d] = to_float(from[d]);
  for (; d < padded; ++d) to[d] = 0.f;
}

template <class Ops, class T>
SLOWFAST_INLINE void pack_key(const T* from, int64_t head_dim, float* to, int64_t stride) {
  if constexpr (Ops::kPack == 1) {
    widen_row(from, head_dim, to, stride);
  } else {
    std::memcpy(to, from, head_dim * sizeof(T));
    std::memset(reinterpret_cast<T*>(to) + head_dim, 0, (2 * stride - head_dim) * sizeof(T));
  }
}

#if defined(__AVX512BF16__)
// The values of two tokens, the two of an element in one lane; a token that is not there is nullptr.
template <class T>
SLOWFAST_INLINE void pack_pair(const T* low, const T* high, int64_t head_dim, float* to, int64_t stride) {
  int64_t d = 0;
  if (low != nullptr && high != nullptr) {
    for (; d + kLanes <= head_dim; d += kLanes) zip_pairs(low + d, high + d, to + d);
  }
  for (; d < stride; ++d) {
    const uint32_t a = d < head_dim && low != nullptr ? low[d].bits : 0;
    const uint32_t b = d < head_dim && high != nullptr ? high[d].bits : 0;
    to[d] = from_bits(a | b << 16);
  }
}
#endif

// Values of tokens [0, padded): [tokens][stride], or pairs of them [tokens / 2][stride]. row(t): where token t's values
// lie, or nullptr: they are zero.
template <class Ops, class Row>
SLOWFAST_INLINE void pack_values(const Row& row, int64_t padded, int64_t head_dim, float* to, int64_t stride) {
  if constexpr (Ops::kPack == 1) {
    for (int64_t t = 0; t < padded; ++t, to += stride) {
      if (const auto* from = row(t)) widen_row(from, head_dim, to, stride);
      else std::memset(to, 0, stride * sizeof(float));
    }
  } else {
#if defined(__AVX512BF16__)
    for (int64_t t = 0; t < padded; t += 2, to += stride) pack_pair(row(t), row(t + 1), head_dim, to, stride);
#endif
  }
}

template <class Ops, class T, int R, int W>
struct AttentionTile {
  static constexpr int kWidth = R * kLanes;   // rows times W
  // Tokens a step. One vector of fp32 rows is limited by loads: its K and V and the next ones must stay in L1.
  static constexpr int64_t kTile = R == 1 && Ops::kPack == 1 ? 16 : kTokenTile;
  // Additions in a row in a dot product. Short vectors sum more elements a lane, and so take more of fp32's error.
  static constexpr int64_t kRun = kManyRegisters ? 1 << 30 : 2 * kLanes;
  static constexpr int kDots = R == 1 || kManyRegisters ? kBlock : kBlock / 2;   // accumulators that registers hold

  const CrossAttentionParams& p;
  const AttentionUnit& unit;
  const Partials& partials;
  const Layout<Ops, R, W> layout;
  const int64_t group;
  const float log2_scale;   // of a score to the exponent of 2; a negative scale turns the query's sign instead

  AttentionTile(const CrossAttentionParams& params, const AttentionUnit& u, const Partials& results)
      : p(params), unit(u), partials(results), layout(params.head_dim),
        group(params.num_q_heads / params.num_kv_heads),
        log2_scale(__builtin_fabsf(params.softmax_scale) * 1.44269504088896f) {}

  struct State { float *q, *out, *row_max, *row_sum, *row_weight; };

  State state_of(float* scratch, int head) const {
    float* q = scratch + (head - unit.kv_head_begin) * layout.state();
    float* out = q + layout.qk_chunks * kWidth;
    float* row_max = out + layout.pv_chunks * kWidth;
    return {q, out, row_max, row_max + kWidth, row_max + 2 * kWidth};
  }

  // Lane of element d of row r in chunk d / (kPack * W): the W chunk elements of a row are neighbours.
  void begin(const State& s, int head) const {
    std::memset(s.q, 0, layout.qk_chunks * kWidth * sizeof(float));
    std::memset(s.out, 0, layout.pv_chunks * kWidth * sizeof(float));
    std::memset(s.row_sum, 0, 2 * kWidth * sizeof(float));
    const float sign = p.softmax_scale < 0 ? -1.f : 1.f;
    for (int lane = 0; lane < kWidth; ++lane) s.row_max[lane] = -__FLT_MAX__;   // finite: -inf minus -inf is NaN
    for (int64_t r = unit.row_begin; r < unit.row_end; ++r) {
      const int64_t text = unit.texts[r / group], q_head = head * group + r % group;
      const T* from = static_cast<const T*>(p.q) + p.text_rows[text] * p.q_row_stride + q_head * p.q_head_stride;
      float* to = s.q + (r - unit.row_begin) * W;
      for (int64_t d = 0; d < layout.head_dim; ++d) {
        const int64_t lane = d / Ops::kPack;
        float* at = to + lane / W * kWidth + lane % W;
        if constexpr (Ops::kPack == 1) *at = sign * to_float(from[d]);
        else from_float(sign * to_float(from[d]), reinterpret_cast<T*>(at) + d % 2);
      }
    }
  }

  struct Rows { const float* data; int64_t stride; };   // of K or V, packed or in place
  struct Source { const TokenTile& tile; const T* keys; const T* values; };   // a tile of one KV head in the cache

  Source source(const TokenTile& tile, int head) const {
    return {tile, static_cast<const T*>(p.keys) + head * p.k_head_stride,
            static_cast<const T*>(p.values) + head * p.v_head_stride};
  }

  // The next tile's rows, while this one is worked on: rows of a head lie too far apart for the hardware to foresee.
  // It pays where rows are converted or packed (16 x 5184 tokens, bf16: 16.0 -> 11.6 ms, fp16: 23.9 -> 14.2), not where
  // fp32 is read in place, bound by the memory (18.5 -> 20.7). Always inlined: GCC takes a function that does nothing
  // but prefetch for one without effect, and drops its calls.
  SLOWFAST_INLINE void prefetch(const Source& next, int64_t from) const {
    if constexpr (kInPlace && Ops::kPack == 1) return;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t t = from; t < next.tile.count && t < from + kDots; ++t) {
      const T* key = next.keys + next.tile.token[t] * p.k_token_stride;
      const T* value = next.values + next.tile.token[t] * p.v_token_stride;
      for (int64_t d = 0; d < layout.head_dim; d += kLine) {
        __builtin_prefetch(key + d);
        __builtin_prefetch(value + d);
      }
    }
  }

  // scores[t] = q . k_t for tokens [from, to) of a tile, whose keys are given. Not scaled yet: subtracting their
  // maximum first costs large scores no precision.
  SLOWFAST_INLINE void scores_of(const float* q, Rows keys, int64_t from, int64_t to, const Source& next,
                                 float* scores) const {
    for (int64_t t = from; t < to; t += kDots) {
      prefetch(next, t);
      Vec total[kDots][R];
      for (auto& row : total) for (auto& x : row) x = zero();
      for (int64_t c = 0; c < layout.qk_chunks; c += kRun) {
        const int64_t count = layout.qk_chunks - c < kRun ? layout.qk_chunks - c : kRun;
        Vec acc[kDots][R];
        for (auto& row : acc) for (auto& x : row) x = zero();
        const float* key = keys.data + (t - from) * keys.stride + c * W;
        multiply<Ops, kDots, R, W>(q + c * kWidth, kWidth, key, keys.stride, W, count, acc);
        for (int i = 0; i < kDots; ++i) for (int j = 0; j < R; ++j) total[i][j] = total[i][j] + acc[i][j];
      }
      for (int i = 0; i < kDots; ++i) {
        for (int j = 0; j < R; ++j) store(scores + (t + i) * kWidth + j * kLanes, group_sum<W>(total[i][j]));
      }
    }
  }

  // The same for a tile that is not whole: blocks that do not span pieces can still be read in place. Apart from the
  // usual way, like masked_softmax, for GCC keeps that one's accumulators in registers only while it is alone.
  __attribute__((noinline)) void scores_by_block(const float* q, const Source& at, int64_t padded, const Source& next,
                                                 float* packed, float* scores) const {
    for (int64_t t = 0; t < padded; t += kBlock) {
      scores_of(q, keys_of(at, t, t + kBlock, packed), t, t + kBlock, next, scores);
    }
  }

  // What each lane's row sees of a tile, as numbers of its tokens.
  struct Bounds { float begin[kWidth], end[kWidth]; };

  Bounds bounds_of(const TokenTile& tile, const TileWalk& walk) const {
    Bounds bounds{};   // lanes without a row see nothing
    for (int64_t r = unit.row_begin; r < unit.row_end; ++r) {
      const Interval sees = walk.of_row(r);
      for (int64_t lane = (r - unit.row_begin) * W, last = lane + W; lane < last; ++lane) {
        bounds.begin[lane] = clamped(sees.begin - tile.place);
        bounds.end[lane] = clamped(sees.end - tile.place);
      }
    }
    return bounds;
  }
  static float clamped(int64_t t) { return float(t < 0 ? 0 : t > kTile ? kTile : t); }

  // Scores to probabilities (in `probs`, as the next product wants them); returns what to rescale the context by.
  // With kMasked, tokens beyond a row's `bounds` count for nothing in it, whatever their scores are.
  template <bool kMasked>
  SLOWFAST_INLINE void softmax(const State& s, const float* scores, int64_t count, int64_t padded,
                               const Bounds& bounds, float* probs, Vec (&rescale)[R]) const {
    const Vec scale = splat(log2_scale);
    for (int j = 0; j < R; ++j) {
      const float* at = scores + j * kLanes;
      const auto seen = [&](int64_t t, Vec x, float otherwise) {
        if constexpr (!kMasked) return x;
        const Vec begin = load(bounds.begin + j * kLanes), end = load(bounds.end + j * kLanes);
        return where_within(splat(float(t)), begin, end, x, splat(otherwise));
      };
      const Vec old_max = load(s.row_max + j * kLanes);
      Vec top = old_max;
      for (int64_t t = 0; t < count; ++t) top = max(top, seen(t, load(at + t * kWidth), -__FLT_MAX__));
      const auto prob_of = [&](int64_t t) { return seen(t, exp2((load(at + t * kWidth) - top) * scale), 0.f); };
      rescale[j] = exp2((old_max - top) * scale);
      Vec total = load(s.row_sum + j * kLanes) * rescale[j], weight = load(s.row_weight + j * kLanes) * rescale[j];
      if constexpr (Ops::kPack == 1) {
        for (int64_t t = 0; t < count; ++t) {
          const Vec prob = prob_of(t);
          total = total + prob;
          store(probs + t * kWidth + j * kLanes, prob);
        }
        for (int64_t t = count; t < padded; ++t) store(probs + t * kWidth + j * kLanes, zero());
      } else {
#if defined(__AVX512BF16__)
        for (int64_t t = 0; t < padded; t += 2) {
          const Vec low = t < count ? prob_of(t) : zero();
          const Vec high = t + 1 < count ? prob_of(t + 1) : zero();
          const Vec pairs = to_pairs(low, high);
          total = total + (low + high);
          weight = weight + (low_of(pairs) + high_of(pairs));   // as rounded: what V is multiplied by sums to one
          store(probs + t / 2 * kWidth + j * kLanes, pairs);
        }
#endif
      }
      store(s.row_max + j * kLanes, top);
      store(s.row_sum + j * kLanes, total);
      store(s.row_weight + j * kLanes, Ops::kPack == 1 ? total : weight);
    }
  }

  __attribute__((noinline)) void masked_softmax(const State& s, const float* scores, int64_t count, int64_t padded,
                                                const Bounds& bounds, float* probs, Vec (&rescale)[R]) const {
    softmax<true>(s, scores, count, padded, bounds, probs, rescale);
  }

  // out = out * rescale + probs^T values
  void accumulate(float* out, const float* probs, const Rows& values, int64_t padded, const Vec (&rescale)[R]) const {
    for (int64_t chunk = 0; chunk < layout.pv_chunks; chunk += kDots) {
      Vec acc[kDots][R];
      for (int i = 0; i < kDots; ++i) {
        for (int j = 0; j < R; ++j) acc[i][j] = load(out + (chunk + i) * kWidth + j * kLanes) * rescale[j];
      }
      multiply<Ops, kDots, R, W>(probs, kWidth, values.data + chunk * W, W, values.stride, padded / Ops::kPack, acc);
      for (int i = 0; i < kDots; ++i) {
        for (int j = 0; j < R; ++j) store(out + (chunk + i) * kWidth + j * kLanes, acc[i][j]);
      }
    }
  }

  void end(const State& s, int head) const {
    for (int64_t r = unit.row_begin; r < unit.row_end; ++r) {
      const int64_t text = unit.texts[r / group], q_head = head * group + r % group;
      const int64_t lane = (r - unit.row_begin) * W;
      const int64_t at = (partials.first[text] + unit.split) * p.num_q_heads + q_head;
      const float inverse = 1.f / s.row_weight[lane];
      float* to = partials.context + at * layout.head_dim;
      for (int64_t d = 0; d < layout.head_dim; ++d) to[d] = s.out[d / W * kWidth + lane + d % W] * inverse;
      partials.lse2[at] = s.row_max[lane] * log2_scale + __builtin_log2f(s.row_sum[lane]);
    }
  }

  // With one vector of rows each element is used once a tile, and packing it first would cost up to a third of the
  // time: rows that need no conversion and no padding are read where they lie.
  static constexpr bool kInPlace = R == 1 && (std::is_same_v<T, float> || Ops::kPack == 2);

  // Whether the tokens from `from` to `to` lie one behind another and are all there and seen.
  static bool whole(const TokenTile& tile, int64_t from, int64_t to) {
    const uint64_t tokens = (uint64_t{1} << to) - (uint64_t{1} << from);
    return (tile.seen & tokens) == tokens && (tile.breaks & tokens & (tokens - 1)) == 0;   // the first may begin a run
  }

  // Tokens [from, to); those behind the tile's last one are zero.
  Rows keys_of(const Source& at, int64_t from, int64_t to, float* packed) const {
    const TokenTile& tile = at.tile;
    const bool aligned = p.k_token_stride % Ops::kPack == 0;   // rows start at whole lanes
    if (kInPlace && aligned && layout.head_dim == layout.k_stride * Ops::kPack && whole(tile, from, to)) {
      const T* key = at.keys + tile.token[from] * p.k_token_stride;
      return {reinterpret_cast<const float*>(key), p.k_token_stride / Ops::kPack};
    }
    float* row = packed;
    for (int64_t t = from; t < to; ++t, row += layout.k_stride) {
      if (t < tile.count) {
        pack_key<Ops>(at.keys + tile.token[t] * p.k_token_stride, layout.head_dim, row, layout.k_stride);
      } else {
        std::memset(row, 0, layout.k_stride * sizeof(float));
      }
    }
    return {packed, layout.k_stride};
  }

  // Values of tokens that no row sees are zero: their P is zero, and zero times what they hold could be NaN.
  Rows values_of(const Source& at, int64_t padded, float* packed) const {
    const TokenTile& tile = at.tile;
    const T* first = at.values + tile.token[0] * p.v_token_stride;
    if (whole(tile, 0, padded)) {
      if (kInPlace && Ops::kPack == 1 && layout.head_dim == layout.v_stride) {
        return {reinterpret_cast<const float*>(first), p.v_token_stride};
      }
      const auto row = [&](int64_t t) { return first + t * p.v_token_stride; };
      pack_values<Ops>(row, padded, layout.head_dim, packed, layout.v_stride);
      return {packed, layout.v_stride};
    }
    const auto row = [&](int64_t t) {
      return (tile.seen >> t & 1) != 0 ? at.values + tile.token[t] * p.v_token_stride : nullptr;
    };
    pack_values<Ops>(row, padded, layout.head_dim, packed, layout.v_stride);
    return {packed, layout.v_stride};
  }

  void step(const State& s, const Source& at, const Source& next, const Bounds& bounds, float* tiles) const {
    float* probs = tiles;
    float* scores = probs + kTokenTile * kWidth;
    float* keys = scores + kTokenTile * kWidth;
    float* values = keys + kTokenTile * layout.k_stride;
    const int64_t count = at.tile.count, padded = round_up(count, kBlock);
    if (kInPlace && !whole(at.tile, 0, padded)) scores_by_block(s.q, at, padded, next, keys, scores);
    else scores_of(s.q, keys_of(at, 0, padded, keys), 0, padded, next, scores);
    Vec rescale[R];
    if (at.tile.masked) masked_softmax(s, scores, count, padded, bounds, probs, rescale);
    else softmax<false>(s, scores, count, padded, bounds, probs, rescale);
    accumulate(s.out, probs, values_of(at, padded, values), padded, rescale);
  }

  void run(float* scratch) const {
    float* tiles = scratch + (unit.kv_head_end - unit.kv_head_begin) * layout.state();
    for (int head = unit.kv_head_begin; head < unit.kv_head_end; ++head) begin(state_of(scratch, head), head);
    TileWalk walk(p, unit, kTile);
    TokenTile buffers[2];
    walk.next(&buffers[0]);
    Bounds bounds;
    for (int turn = 0; buffers[turn].count > 0; turn ^= 1) {
      const TokenTile& tile = buffers[turn];
      walk.next(&buffers[turn ^ 1]);
      if (tile.masked) bounds = bounds_of(tile, walk);
      for (int head = unit.kv_head_begin; head < unit.kv_head_end; ++head) {
        const bool last = head + 1 == unit.kv_head_end;
        const Source next = last ? source(buffers[turn ^ 1], unit.kv_head_begin) : source(tile, head + 1);
        step(state_of(scratch, head), source(tile, head), next, bounds, tiles);
      }
    }
    for (int head = unit.kv_head_begin; head < unit.kv_head_end; ++head) end(state_of(scratch, head), head);
  }
};

}  // namespace
}  // namespace slowfast::cpu
