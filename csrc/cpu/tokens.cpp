#include "tokens.h"

#include <algorithm>
#include <tuple>

namespace slowfast::cpu {

Interval seen_by(const CrossAttentionParams& p, int64_t text, int64_t length) {
  const int64_t begin = p.slow_begin == nullptr ? 0 : p.slow_begin[text];
  const int64_t end = p.slow_end == nullptr ? length : p.slow_end[text];
  return {std::max<int64_t>(begin, 0), std::min(end, length)};
}

bool has_ranges(const CrossAttentionParams& p) { return p.slow_begin != nullptr || p.slow_end != nullptr; }

void append_runs(const CrossAttentionParams& p, int b, std::vector<TokenRun>* runs) {
  int64_t place = 0, behind = -1;
  const auto add = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (begin != behind) runs->push_back({place, begin});
    place += end - begin;
    behind = end;
  };
  if (p.slow_pieces == nullptr) {
    add(p.cu_slow[b], p.cu_slow[b + 1]);
  } else {
    for (int64_t i = p.cu_slow[b]; i < p.cu_slow[b + 1]; ++i) add(p.slow_pieces[2 * i], p.slow_pieces[2 * i + 1]);
  }
  runs->push_back({place, 0});
}

int64_t append_texts(const CrossAttentionParams& p, int b, int64_t length, std::vector<int32_t>* texts) {
  const auto old_size = texts->size();
  for (int32_t i = p.cu_text[b]; i < p.cu_text[b + 1]; ++i) {
    const Interval range = seen_by(p, i, length);
    if (range.begin < range.end) texts->push_back(i);
  }
  if (has_ranges(p)) {
    std::stable_sort(texts->begin() + old_size, texts->end(), [&](int32_t a, int32_t b) {
      const Interval x = seen_by(p, a, length), y = seen_by(p, b, length);
      return std::tie(x.begin, x.end) < std::tie(y.begin, y.end);
    });
  }
  return texts->size() - old_size;
}

TileWalk::TileWalk(const CrossAttentionParams& p, const AttentionUnit& unit, int64_t tile_tokens)
    : unit_(unit),
      tile_tokens_(tile_tokens),
      group_(p.num_q_heads / p.num_kv_heads),
      first_text_(unit.row_begin / group_),
      run_(unit.runs),
      place_(unit.tokens.begin) {
  if (!has_ranges(p)) return;
  const int64_t length = unit.runs_end[-1].place;
  for (int64_t text = first_text_; text <= (unit.row_end - 1) / group_; ++text) {
    ranges_[num_ranges_++] = seen_by(p, unit.texts[text], length);
  }
}

Interval TileWalk::of_row(int64_t row) const { return ranges_[row / group_ - first_text_]; }

int64_t TileWalk::nearest() const {
  int64_t nearest = unit_.tokens.end;
  for (int i = 0; i < num_ranges_; ++i) {
    const int64_t begin = std::max(ranges_[i].begin, place_);
    if (begin < ranges_[i].end) nearest = std::min(nearest, begin);
  }
  return nearest;
}

void TileWalk::next(TokenTile* tile) {
  if (num_ranges_ > 0) place_ += (nearest() - place_) / tile_tokens_ * tile_tokens_;
  tile->place = place_;
  tile->count = std::clamp<int64_t>(unit_.tokens.end - place_, 0, tile_tokens_);
  tile->breaks = 0;
  tile->seen = (uint64_t{1} << tile->count) - 1;
  tile->masked = false;
  if (tile->count == 0) return;
  const auto behind = [](int64_t place, const TokenRun& run) { return place < run.place; };
  if (run_[1].place <= place_) run_ = std::upper_bound(run_ + 1, unit_.runs_end, place_, behind) - 1;
  for (int64_t t = 0; t < tile->count;) {
    const int64_t ahead = std::min(run_[1].place - place_, tile->count);
    for (const int64_t shift = run_->token - run_->place + place_; t < ahead; ++t) tile->token[t] = shift + t;
    if (t == tile->count) break;
    ++run_;
    tile->breaks |= uint64_t{1} << t;
  }
  if (num_ranges_ > 0) mask(tile);
  place_ += tile_tokens_;
}

void TileWalk::mask(TokenTile* tile) const {
  const uint64_t all = tile->seen;
  tile->seen = 0;
  for (int i = 0; i < num_ranges_; ++i) {
    const int64_t begin = std::clamp<int64_t>(ranges_[i].begin - tile->place, 0, tile->count);
    const int64_t end = std::clamp<int64_t>(ranges_[i].end - tile->place, begin, tile->count);
    const uint64_t mine = ((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1);
    tile->seen |= mine;
    tile->masked |= mine != all;
  }
}

}  // namespace slowfast::cpu
