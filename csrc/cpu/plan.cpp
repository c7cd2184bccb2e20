// On a CPU lengths, pieces and ranges are there to be read, so work is dealt out by what is really to be done: a strip
// (a block of a sequence's rows) is cut by the tokens that its rows see, and rows that see nothing are in none.
// A fixed num_splits cuts each sequence at places of its own instead, so that its bits do not depend on the batch.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "tokens.h"

namespace slowfast::cpu {
namespace {

constexpr int64_t kUnitsPerThread = 4;   // cores are shared with other work: spare units even out what each gets done
constexpr int64_t kMinTokens = 192;      // of a split; below, packing queries and combining cost more than it gains
constexpr int64_t kFixedRows = 10;       // a token costs as much as these and the unit's rows (measured: 7 to 13)

struct Strip {
  const int32_t* texts;
  const TokenRun* runs;
  const TokenRun* runs_end;
  int64_t row_begin, row_end;
  int32_t head_step;
  std::vector<Interval> seen;   // tiles of which some row sees a token, in order
  int64_t tokens;               // of `seen`
  int64_t cost;                 // of a token of the sequence's highest strip, so that all its strips are cut alike
};

struct SizedUnit {
  int size;   // logarithm of its work
  AttentionUnit unit;
};

class Planner {
 public:
  Planner(const CrossAttentionParams& p, int max_rows, int flat_rows)
      : p_(p), group_(p.num_q_heads / p.num_kv_heads), max_rows_(max_rows), flat_rows_(flat_rows) {
    plan_.texts.reserve(p.num_text);   // the units' pointers stay valid
    plan_.runs.reserve(p.num_pieces + 2 * int64_t(p.batch));
    plan_.first_partial.assign(p.num_text + 1, 0);
    for (int b = 0; b < p.batch; ++b) add_sequence(b);
  }

  AttentionPlan finish(int num_threads) {
    double work = 0;
    for (const Strip& strip : strips_) work += double(strip.cost) * strip.tokens * (p_.num_kv_heads / strip.head_step);
    plan_.multiply_adds = 2 * work * p_.head_dim;
    const double unit_work = work / (kUnitsPerThread * num_threads);
    for (const Strip& strip : strips_) add_units(strip, p_.num_splits > 0 ? fixed(strip) : dealt(strip, unit_work));
    order_units();
    int64_t total = 0;
    for (int64_t& first : plan_.first_partial) total += std::exchange(first, total);
    return std::move(plan_);
  }

 private:
  void add_sequence(int b) {
    const TokenRun* runs = plan_.runs.data() + plan_.runs.size();
    append_runs(p_, b, &plan_.runs);
    const int64_t length = plan_.runs.back().place, num_texts = append_texts(p_, b, length, &plan_.texts);
    if (num_texts == 0) return;
    const int32_t* texts = plan_.texts.data() + plan_.texts.size() - num_texts;
    const int64_t rows = num_texts * group_;
    // A few rows read whole tokens, all heads at once, as they lie in memory.
    const int32_t head_step = rows <= flat_rows_ ? p_.num_kv_heads : 1;
    const int64_t cost = (kFixedRows + std::min(rows, max_rows_)) * head_step;
    for (int64_t row = 0; row < rows; row += max_rows_) {
      const int64_t row_end = std::min(row + max_rows_, rows);
      std::vector<Interval> seen = tiles_seen(texts + row / group_, texts + (row_end - 1) / group_ + 1, length);
      int64_t tokens = 0;
      for (const Interval& tiles : seen) tokens += tiles.end - tiles.begin;
      const TokenRun* runs_end = plan_.runs.data() + plan_.runs.size();
      strips_.push_back({texts, runs, runs_end, row, row_end, head_step, std::move(seen), tokens, cost});
    }
  }

  std::vector<Interval> tiles_seen(const int32_t* text, const int32_t* text_end, int64_t length) const {
    if (!has_ranges(p_)) return {{0, length}};
    std::vector<Interval> seen;
    for (; text < text_end; ++text) {
      const Interval range = seen_by(p_, *text, length);
      const int64_t begin = range.begin / kTokenTile * kTokenTile;
      const int64_t end = std::min((range.end + kTokenTile - 1) / kTokenTile * kTokenTile, length);
      if (seen.empty() || begin > seen.back().end) seen.push_back({begin, end});
      else seen.back().end = std::max(seen.back().end, end);
    }
    return seen;
  }

  // The strip's part of each of the sequence's num_splits.
  std::vector<Interval> fixed(const Strip& strip) const {
    const int64_t length = strip.runs_end[-1].place, tiles = (length + kTokenTile - 1) / kTokenTile;
    const int64_t each = (tiles + p_.num_splits - 1) / p_.num_splits * kTokenTile;
    std::vector<Interval> parts;
    for (const Interval& seen : strip.seen) {
      for (int64_t begin = seen.begin / each * each; begin < seen.end; begin += each) {
        if (parts.empty() || parts.back().begin < begin) parts.push_back({begin, std::min(begin + each, length)});
      }
    }
    return parts;
  }

  // Parts in which about as many tokens are seen, each of `unit_work` at most.
  static std::vector<Interval> dealt(const Strip& strip, double unit_work) {
    const double wanted = std::ceil(double(strip.cost) * strip.tokens / unit_work);
    const int64_t count = int64_t(std::clamp(wanted, 1.0, std::max(1.0, double(strip.tokens / kMinTokens))));
    const int64_t each = (strip.tokens + count * kTokenTile - 1) / (count * kTokenTile) * kTokenTile;
    std::vector<Interval> parts;
    int64_t room = 0;   // for tokens in the last part
    for (const Interval& seen : strip.seen) {
      for (int64_t begin = seen.begin, end; begin < seen.end; begin = end) {
        if (room == 0) {
          parts.push_back({begin, begin});
          room = each;
        }
        end = std::min(begin + room, seen.end);
        parts.back().end = end;
        room -= end - begin;
      }
    }
    return parts;
  }

  void add_units(const Strip& strip, const std::vector<Interval>& parts) {
    const int size = std::ilogb(double(strip.cost) * strip.tokens / parts.size());
    for (int32_t head = 0; head < p_.num_kv_heads; head += strip.head_step) {
      for (size_t i = 0; i < parts.size(); ++i) {
        const AttentionUnit unit = {strip.texts,   strip.runs, strip.runs_end, strip.row_begin,
                                    strip.row_end, parts[i],   head,           head + strip.head_step,
                                    int64_t(i)};
        units_.push_back({size, unit});
      }
    }
    for (int64_t text = strip.row_begin / group_; text <= (strip.row_end - 1) / group_; ++text) {
      int64_t& count = plan_.first_partial[strip.texts[text]];   // not summed up yet
      count = std::max<int64_t>(count, parts.size());
    }
  }

  // Large units first, for small ones even out the end; among units alike, neighbours read the same slow tokens.
  void order_units() {
    const auto key = [](const SizedUnit& x) {
      return std::tuple(-x.size, x.unit.runs, x.unit.kv_head_begin, x.unit.tokens.begin, x.unit.row_begin);
    };
    std::sort(units_.begin(), units_.end(),
              [&](const SizedUnit& a, const SizedUnit& b) { return key(a) < key(b); });
    for (const SizedUnit& x : units_) plan_.units.push_back(x.unit);
  }

  const CrossAttentionParams& p_;
  const int64_t group_, max_rows_, flat_rows_;
  std::vector<Strip> strips_;
  std::vector<SizedUnit> units_;
  AttentionPlan plan_;
};

}  // namespace

AttentionPlan plan_attention(const CrossAttentionParams& p, int max_rows, int flat_rows, int num_threads) {
  return Planner(p, max_rows, flat_rows).finish(std::max(num_threads, 1));
}

}  // namespace slowfast::cpu
