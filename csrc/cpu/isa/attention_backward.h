// One unit of attention's backward pass: the slow tokens of a KV head's group against all rows that see some of them.
//
// Roofline: five products of rows x tokens x D, each a GEMM that must keep the FMA units full, where the forward pass
// has two; K, V and their gradients pass the memory once. A unit owns its tokens: their dK and dV stay in L2, in
// float32, until the last row has been added. For dQ, a sum over all tokens, it has partial sums of its own, so that
// no product is computed twice and no sum depends on which thread came first.
// Products by the micro-kernel of attention.h. S and dP have rows in their lanes, as there; dV, dK and dQ have D.
//   P = exp(scale * Q K^T - lse)   dP = dO V^T   dS = P (dP - delta)   dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K
#pragma once
#include "attention.h"
#include "mix.h"
#include "pool.h"

namespace slowfast::cpu {
namespace {

template <class Ops>
struct BackwardLayout {
  static constexpr int64_t kRows = 3 * kLanes;   // of a block
  int64_t block, dense, lanes, in_use;           // lanes: kPack elements of D each, `in_use` of which are not padding
  explicit BackwardLayout(const CrossAttentionParams& p)
      : block(block_of(p)),
        dense(round_up(p.head_dim, kLanes * Ops::kPack)),
        lanes(dense / Ops::kPack),
        in_use(div_up(p.head_dim, Ops::kPack)) {}
  // Not more than there is: memory that each call gets from the system anew takes longer than a small call's products.
  static int64_t block_of(const CrossAttentionParams& p) {
    const int64_t most = backward_block(p.head_dim), tokens = round_up(p.num_slow, kBackwardTile);
    return tokens < most ? tokens : most;
  }
  int64_t floats() const {
    const int64_t tokens = 2 * block * (lanes + dense) + (Ops::kPack > 1 ? block / Ops::kPack * dense : 0);
    const int64_t rows = kRows * (3 * lanes + 2 * dense / Ops::kPack + 2);
    return tokens + rows + 4 * kBackwardTile * kRows + 16 * kLanes;   // the last: what begins at whole vectors
  }
};

// The first of those, in an order in which `before` holds up to some place, for which it does not hold.
template <class X, class Before>
const X* skip(const X* first, const X* last, const Before& before) {
  for (int64_t count = last - first; count > 0;) {
    const int64_t half = count / 2;
    if (before(first[half])) first += half + 1, count -= half + 1;
    else count = half;
  }
  return first;
}

template <class Ops, class T>
class BackwardTile {
 public:
  BackwardTile(const CrossAttentionBackwardParams& params, const BackwardUnit& u, const float* delta, float* scratch)
      : b_(params), p_(params.forward), unit_(u), delta_(delta), layout_(p_),
        group_(p_.num_q_heads / p_.num_kv_heads) {
    const auto take = [&](int64_t floats) {
      float* mine = scratch;
      scratch += round_up(floats, kLanes);
      return mine;
    };
    const int64_t block = layout_.block, lanes = layout_.lanes, dense = layout_.dense;
    keys_ = take(block * lanes);
    values_ = take(block * lanes);
    key_rows_ = Ops::kPack == 1 ? keys_ : take(block / Ops::kPack * dense);
    grad_k_ = take(block * dense);
    grad_v_ = take(block * dense);
    query_ = take(lanes * kRows);
    upstream_ = take(lanes * kRows);
    query_rows_ = take(kRows / Ops::kPack * dense);
    upstream_rows_ = take(kRows / Ops::kPack * dense);
    raw_ = take(kRows * lanes);
    lse_ = take(kRows);
    row_delta_ = take(kRows);
    scores_ = take(kTile * kRows);
    grad_scores_ = take(kTile * kRows);
    if constexpr (Ops::kPack == 1) {
      probs_ = scores_;
      by_row_ = by_token_ = grad_scores_;
    } else {
      probs_ = take(kTile * kRows / 2);
      by_row_ = take(kTile * kRows / 2);
      by_token_ = take(kTile * kRows / 2);
    }
  }

  void run() {
    if (unit_.grad_q != nullptr) std::memset(unit_.grad_q, 0, unit_.partial_rows * layout_.dense * sizeof(float));
    for (first_ = unit_.tokens.begin; first_ < unit_.tokens.end; first_ += layout_.block) {
      const int64_t left = unit_.tokens.end - first_;
      count_ = left < layout_.block ? left : layout_.block;
      if (unit_.keys) std::memset(grad_k_, 0, count_ * layout_.dense * sizeof(float));
      if (unit_.values) std::memset(grad_v_, 0, count_ * layout_.dense * sizeof(float));
      packed_whole_ = false;
      for (const BackwardUse* use = unit_.uses; use < unit_.uses_end; ++use) add(*use);
      if (unit_.keys) write(grad_k_, p_.softmax_scale, b_.grad_keys);
      if (unit_.values) write(grad_v_, 1.f, b_.grad_values);
    }
  }

 private:
  static constexpr int64_t kTile = kBackwardTile, kRows = BackwardLayout<Ops>::kRows;
  static constexpr int64_t kMaxBlock = backward_block(0);
  static constexpr int kWide = 2;   // vectors of D in a block of accumulators
  static constexpr int kHigh = kManyRegisters ? kBlock : kBlock / 2;   // by so many tokens or rows

  // ---- what a use sees of the block

  // Places of `kBlock` tokens that some row sees; -1 stands for a token that none does.
  struct Places { int32_t low, high; bool all; };

  void add(const BackwardUse& use) {
    if (!find_places(use.tokens)) return;
    pack_tokens();
    const int64_t rows = (use.texts_end - use.texts) * group_;
    for (int64_t row = 0; row < rows; row += kRows) {
      rows_ = rows - row < kRows ? rows - row : kRows;
      width_ = round_up(rows_, kLanes);
      if (!find_ranges(use, row)) continue;
      pack_rows(use, row);
      float* grad_q = unit_.grad_q == nullptr ? nullptr : unit_.grad_q + (use.partial_row + row) * layout_.dense;
      for (int64_t t = 0; t < count_; t += kTile) add_tile(t, grad_q);
    }
  }

  bool find_places(const TokenSet& set) {
    for (int64_t t = 0; t < round_up(count_, kBlock); ++t) place_[t] = -1;
    bool any = false;
    const auto ends_before = [&](const TokenSpan& x) { return x.token + x.count <= first_; };
    const TokenSpan* span = skip(set.spans, set.spans_end, ends_before);
    for (; span < set.spans_end && span->token < first_ + count_; ++span) {
      const int64_t shift = span->place - span->token, last = span->token + span->count;
      const int64_t begin = (span->token > first_ ? span->token : first_) + shift;
      const int64_t end = (last < first_ + count_ ? last : first_ + count_) + shift;
      const Interval* seen = skip(set.seen, set.seen_end, [&](const Interval& x) { return x.end <= begin; });
      for (; seen < set.seen_end && seen->begin < end; ++seen) {
        const int64_t from = seen->begin > begin ? seen->begin : begin, to = seen->end < end ? seen->end : end;
        for (int64_t place = from; place < to; ++place) place_[place - shift - first_] = int32_t(place);
        any = true;
      }
    }
    for (int64_t t = 0; t < count_; t += kBlock) {
      Places found = {INT32_MAX, -1, true};
      for (int64_t i = t; i < t + kBlock; ++i) {
        if (place_[i] < 0) { found.all = false; continue; }
        found.low = place_[i] < found.low ? place_[i] : found.low;
        found.high = place_[i] > found.high ? place_[i] : found.high;
      }
      places_[t / kBlock] = found;
    }
    return any;
  }

  // What each lane's row sees; false: no row any of the block's tokens.
  bool find_ranges(const BackwardUse& use, int64_t row) {
    hull_ = {0, INT32_MAX};
    common_ = hull_;
    if (!has_ranges(p_)) {
      for (int64_t lane = 0; lane < width_; ++lane) begin_[lane] = 0, end_[lane] = INT32_MAX;
      return true;
    }
    hull_ = {INT32_MAX, 0};
    for (int64_t lane = 0; lane < width_; ++lane) {
      begin_[lane] = end_[lane] = 0;
      if (lane >= rows_) continue;
      const Interval sees = seen_by(p_, use.texts[(row + lane) / group_], use.length);
      begin_[lane] = int32_t(sees.begin);
      end_[lane] = int32_t(sees.end);
      hull_ = {sees.begin < hull_.begin ? sees.begin : hull_.begin, sees.end > hull_.end ? sees.end : hull_.end};
      common_ = {sees.begin > common_.begin ? sees.begin : common_.begin,
                 sees.end < common_.end ? sees.end : common_.end};
    }
    for (int64_t t = 0; t < count_; t += kBlock) if (touches(t)) return true;
    return false;
  }

  bool touches(int64_t t) const {
    const Places& places = places_[t / kBlock];
    return places.high >= hull_.begin && places.low < hull_.end;
  }
  bool is_whole(int64_t t) const {
    const Places& places = places_[t / kBlock];
    return places.all && places.low >= common_.begin && places.high < common_.end;
  }

  // ---- packing

  // Tokens that no row of the sequence sees are zero: what they hold is not its business, and zero times that could be
  // NaN.
  void pack_tokens() {
    bool whole = true;
    for (int64_t t = 0; t < count_; t += kBlock) whole &= places_[t / kBlock].all;
    if (whole && packed_whole_) return;
    packed_whole_ = whole;
    const T* keys = static_cast<const T*>(p_.keys) + first_ * p_.k_token_stride + unit_.kv_head * p_.k_head_stride;
    const T* values = static_cast<const T*>(p_.values) + first_ * p_.v_token_stride + unit_.kv_head * p_.v_head_stride;
    const int64_t padded = round_up(count_, kBlock), dim = p_.head_dim;
    for (int64_t t = 0; t < padded; ++t) {
      if (place_[t] < 0) {
        std::memset(keys_ + t * layout_.lanes, 0, layout_.lanes * sizeof(float));
        std::memset(values_ + t * layout_.lanes, 0, layout_.lanes * sizeof(float));
        continue;
      }
      pack_key<Ops>(keys + t * p_.k_token_stride, dim, keys_ + t * layout_.lanes, layout_.lanes);
      pack_key<Ops>(values + t * p_.v_token_stride, dim, values_ + t * layout_.lanes, layout_.lanes);
    }
    if (Ops::kPack == 1 || unit_.grad_q == nullptr) return;
    const auto key = [&](int64_t t) { return place_[t] < 0 ? nullptr : keys + t * p_.k_token_stride; };
    pack_values<Ops>(key, padded, dim, key_rows_, layout_.dense);
  }

  void pack_rows(const BackwardUse& use, int64_t row) {
    for (int64_t lane = 0; lane < width_; ++lane) {
      float* query = raw_of(query_rows_) + lane * layout_.lanes;
      if (lane >= rows_) {
        std::memset(query, 0, layout_.lanes * sizeof(float));
        lse_[lane] = row_delta_[lane] = 0.f;
        continue;
      }
      const int64_t text = use.texts[(row + lane) / group_], head = head_of(row + lane);
      const T* from = static_cast<const T*>(p_.q) + p_.text_rows[text] * p_.q_row_stride + head * p_.q_head_stride;
      pack_key<Ops>(from, p_.head_dim, query, layout_.lanes);
      lse_[lane] = p_.lse[text * p_.num_q_heads + head];
      row_delta_[lane] = delta_[text * p_.num_q_heads + head];
    }
    spread(query_rows_, query_);
    for (int64_t lane = 0; lane < width_; ++lane) {
      float* upstream = raw_of(upstream_rows_) + lane * layout_.lanes;
      if (lane >= rows_) {
        std::memset(upstream, 0, layout_.lanes * sizeof(float));
        continue;
      }
      const int64_t text = use.texts[(row + lane) / group_];
      const T* from = static_cast<const T*>(b_.grad_context) + text * b_.grad_context_row_stride +
                      head_of(row + lane) * b_.grad_context_head_stride;
      pack_key<Ops>(from, p_.head_dim, upstream, layout_.lanes);
    }
    spread(upstream_rows_, upstream_);
  }

  int64_t head_of(int64_t row) const { return unit_.kv_head * group_ + row % group_; }
  float* raw_of(float* rows) const { return Ops::kPack == 1 ? rows : raw_; }

  void spread(float* rows, float* columns) const {
    to_columns(raw_of(rows), columns);
#if defined(__AVX512BF16__)
    if constexpr (Ops::kPack > 1) to_pairs_of_rows(raw_, rows);
#endif
  }

  // [width][D] to [D][width]
  void to_columns(const float* rows, float* columns) const {
    for (int64_t row = 0; row < width_; row += kLanes) {
      for (int64_t c = 0; c < layout_.lanes; c += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(rows + (row + i) * layout_.lanes + c);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(columns + (c + i) * width_ + row, square[i]);
      }
    }
  }

#if defined(__AVX512BF16__)
  // [width][D] to [width / 2][D] of pairs
  void to_pairs_of_rows(const float* rows, float* pairs) const {
    const T* raw = reinterpret_cast<const T*>(rows);
    for (int64_t row = 0; row < width_; row += 2, raw += 2 * layout_.dense, pairs += layout_.dense) {
      pack_pair(raw, raw + layout_.dense, layout_.dense, pairs, layout_.dense);
    }
  }
#endif

  // ---- products

  // Tokens [t, t + kTile) of the block against the rows.
  void add_tile(int64_t t, float* grad_q) {
    int64_t begin = -1, end = 0;
    for (int64_t i = t; i < t + kTile && i < count_; i += kBlock) {
      if (!touches(i)) continue;
      if (begin < 0) begin = i;
      end = i + kBlock;
    }
    if (begin < 0) return;
    const bool wants_scores = unit_.keys || unit_.grad_q != nullptr;
    rows_by_tokens(query_, keys_ + begin * layout_.lanes, end - begin, scores_);
    if (wants_scores) rows_by_tokens(upstream_, values_ + begin * layout_.lanes, end - begin, grad_scores_);
    for (int64_t i = begin; i < end; i += kBlock) {
      if (is_whole(i)) weigh<false>(i - begin, i, wants_scores);
      else weigh<true>(i - begin, i, wants_scores);
    }
    if (unit_.values) tokens_by_d(upstream_rows_, probs_, end - begin, grad_v_ + begin * layout_.dense);
    if (unit_.keys) tokens_by_d(query_rows_, by_row_, end - begin, grad_k_ + begin * layout_.dense);
    if (unit_.grad_q != nullptr) rows_by_d(key_rows_ + begin / Ops::kPack * layout_.dense, end - begin, grad_q);
  }

  // out[t][row] = sum over D of columns[D][row] tokens[t][D]
  void rows_by_tokens(const float* columns, const float* tokens, int64_t count, float* out) const {
    if (width_ == kLanes) rows_by_tokens_of<1>(columns, tokens, count, out);
    else if (width_ == 2 * kLanes) rows_by_tokens_of<2>(columns, tokens, count, out);
    else rows_by_tokens_of<3>(columns, tokens, count, out);
  }

  template <int R>
  void rows_by_tokens_of(const float* columns, const float* tokens, int64_t count, float* out) const {
    constexpr int kDots = R == 1 || kManyRegisters ? kBlock : kBlock / 2, kStride = R * kLanes;
    for (int64_t t = 0; t < count; t += kDots) {
      Vec acc[kDots][R];
      for (auto& row : acc) for (auto& x : row) x = zero();
      multiply<Ops, kDots, R, 1>(columns, kStride, tokens + t * layout_.lanes, layout_.lanes, 1, layout_.in_use, acc);
      for (int i = 0; i < kDots; ++i) {
        for (int j = 0; j < R; ++j) store(out + (t + i) * kStride + j * kLanes, acc[i][j]);
      }
    }
  }

  // S and dP of kBlock tokens, the tile's from `at` on, to P and dS, in the forms that the products want.
  template <bool kMasked>
  void weigh(int64_t at, int64_t t, bool wants_scores) const {
    const Vec scale = splat(p_.softmax_scale);
    for (int64_t j = 0; j < width_; j += kLanes) {
      const Vec lse = load(lse_ + j), delta = load(row_delta_ + j);
      const auto seen = [&](int64_t i, Vec x) {
        if constexpr (!kMasked) return x;
        return where_between(place_[t + i], begin_ + j, end_ + j, x, zero());
      };
      const auto prob_of = [&](int64_t i) {
        const Vec log = fma(load(scores_ + (at + i) * width_ + j), scale, zero() - lse);
        return seen(i, exp2(log * splat(1.44269504088896f)));
      };
      const auto grad_of = [&](int64_t i, Vec prob) {
        return seen(i, prob * (load(grad_scores_ + (at + i) * width_ + j) - delta));
      };
      if constexpr (Ops::kPack == 1) {
        for (int64_t i = 0; i < kBlock; ++i) {
          const Vec prob = prob_of(i);
          store(probs_ + (at + i) * width_ + j, prob);
          if (wants_scores) store(by_row_ + (at + i) * width_ + j, grad_of(i, prob));
        }
      } else {
#if defined(__AVX512BF16__)
        for (int64_t i = 0; i < kBlock; i += 2) {
          const Vec low = prob_of(i), high = prob_of(i + 1);
          T* probs = reinterpret_cast<T*>(probs_) + (at + i) * width_ + j;
          store_rounded(probs, low);
          store_rounded(probs + width_, high);
          if (!wants_scores) continue;
          const Vec grad_low = grad_of(i, low), grad_high = grad_of(i + 1, high);
          T* grads = reinterpret_cast<T*>(by_row_) + (at + i) * width_ + j;
          store_rounded(grads, grad_low);
          store_rounded(grads + width_, grad_high);
          store(by_token_ + (at + i) / 2 * width_ + j, to_pairs(grad_low, grad_high));
        }
#endif
      }
    }
  }

  // out[t][D] += sum over rows of weights[t][row] rows[row][D]; not over the lanes behind the last row
  void tokens_by_d(const float* rows, const float* weights, int64_t count, float* out) const {
    const int64_t stride = width_ / Ops::kPack, pairs = div_up(rows_, Ops::kPack);
    int64_t d = 0;
    for (; d + kWide * kLanes <= layout_.dense; d += kWide * kLanes) {
      for (int64_t t = 0; t < count; t += kHigh) {
        add_product<kWide>(rows + d, weights + t * stride, stride, 1, pairs, out + t * layout_.dense + d);
      }
    }
    if (d == layout_.dense) return;
    for (int64_t t = 0; t < count; t += kHigh) {
      add_product<1>(rows + d, weights + t * stride, stride, 1, pairs, out + t * layout_.dense + d);
    }
  }

  // out[row][D] += sum over tokens of dS[token][row] tokens[token][D]
  void rows_by_d(const float* tokens, int64_t count, float* out) const {
    const int64_t pairs = count / Ops::kPack;
    int64_t d = 0;
    for (; d + kWide * kLanes <= layout_.dense; d += kWide * kLanes) {
      for (int64_t row = 0; row < rows_; row += kHigh) {
        add_product<kWide>(tokens + d, by_token_ + row, 1, width_, pairs, out + row * layout_.dense + d);
      }
    }
    if (d == layout_.dense) return;
    for (int64_t row = 0; row < rows_; row += kHigh) {
      add_product<1>(tokens + d, by_token_ + row, 1, width_, pairs, out + row * layout_.dense + d);
    }
  }

  template <int R>
  void add_product(const float* a, const float* weights, int64_t stride_i, int64_t stride_k, int64_t count,
                   float* out) const {
    Vec acc[kHigh][R];
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < R; ++j) acc[i][j] = load(out + i * layout_.dense + j * kLanes);
    }
    multiply<Ops, kHigh, R, 1>(a, layout_.dense, weights, stride_i, stride_k, count, acc);
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < R; ++j) store(out + i * layout_.dense + j * kLanes, acc[i][j]);
    }
  }

  void write(const float* from, float scale, void* grads) const {
    T* to = static_cast<T*>(grads) + first_ * b_.grad_kv_token_stride + unit_.kv_head * b_.grad_kv_head_stride;
    for (int64_t t = 0; t < count_; ++t) {
      write_scaled(from + t * layout_.dense, scale, to + t * b_.grad_kv_token_stride, p_.head_dim);
    }
  }

  const CrossAttentionBackwardParams& b_;
  const CrossAttentionParams& p_;
  const BackwardUnit& unit_;
  const float* delta_;
  const BackwardLayout<Ops> layout_;
  const int64_t group_;
  // Of the block: K and V with kPack elements of D a lane, K with D in lanes (pairs of tokens), float32 gradients.
  float *keys_, *values_, *key_rows_, *grad_k_, *grad_v_;
  // Of the rows: Q and dO with rows in lanes, and with D in lanes (pairs of rows).
  float *query_, *upstream_, *query_rows_, *upstream_rows_, *raw_, *lse_, *row_delta_;
  // Of a tile, [tokens][rows]: S, dP; P and dS in pairs of rows, dS in pairs of tokens.
  float *scores_, *grad_scores_, *probs_, *by_row_, *by_token_;
  int64_t first_ = 0, count_ = 0, rows_ = 0, width_ = 0;
  bool packed_whole_ = false;
  Interval hull_, common_;   // of what the rows see
  int32_t place_[kMaxBlock];
  Places places_[kMaxBlock / kBlock];
  int32_t begin_[kRows], end_[kRows];
};

}  // namespace
}  // namespace slowfast::cpu
