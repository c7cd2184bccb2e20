#include "plan_backward.h"

#include <algorithm>

#include "tokens.h"

namespace slowfast::cpu {
namespace {

constexpr int64_t kUnits = 40;           // at least, if there are so many blocks of tokens
constexpr int64_t kBlocksPerGroup = 4;   // at most, while there are few groups: each one more writes all of dQ once more
constexpr int64_t kMaxGroups = 128;
constexpr int64_t kFixedRows = 10;       // a token costs as much as these and the rows that see it
constexpr int64_t kRowBlock = 8;         // rows of partial sums are written in blocks of so many

// Runs of tokens, as sets in which no token is twice.
std::vector<std::vector<TokenSpan>> disjoint(std::vector<TokenSpan> spans) {
  std::stable_sort(spans.begin(), spans.end(),
                   [](const TokenSpan& a, const TokenSpan& b) { return a.token < b.token; });
  std::vector<std::vector<TokenSpan>> sets;
  for (const TokenSpan& span : spans) {
    auto set = sets.begin();
    while (set != sets.end() && set->back().token + set->back().count > span.token) ++set;
    if (set == sets.end()) set = sets.insert(set, std::vector<TokenSpan>());
    set->push_back(span);
  }
  return sets;
}

}  // namespace

BackwardPlan::BackwardPlan(const CrossAttentionParams& p) : group_(p.num_q_heads / p.num_kv_heads) {
  texts_.reserve(p.num_text);
  for (int b = 0; b < p.batch; ++b) add_sequence(p, b);
  add_groups(p);
}

void BackwardPlan::add_sequence(const CrossAttentionParams& p, int b) {
  Sequence made;
  append_runs(p, b, &made.runs);
  made.text_begin = texts_.size();
  if (append_texts(p, b, made.length(), &texts_) == 0) return;
  made.text_end = texts_.size();
  std::vector<TokenSpan> spans;
  for (auto run = made.runs.begin(); run + 1 != made.runs.end(); ++run) {
    spans.push_back({run->token, run[1].place - run->place, run->place});
  }
  made.sets = disjoint(std::move(spans));
  for (int64_t i = made.text_begin; i < made.text_end; ++i) {
    const Interval range = seen_by(p, texts_[i], made.length());
    if (made.seen.empty() || range.begin > made.seen.back().end) made.seen.push_back(range);
    else made.seen.back().end = std::max(made.seen.back().end, range.end);
  }
  sequences_.push_back(std::move(made));
}

// Of about equal cost, whole blocks each.
void BackwardPlan::add_groups(const CrossAttentionParams& p) {
  const int64_t size = backward_block(p.head_dim), blocks = (p.num_slow + size - 1) / size;
  if (blocks == 0) return;
  const int64_t wanted = std::max((kUnits + p.num_kv_heads - 1) / p.num_kv_heads, blocks / kBlocksPerGroup);
  const int64_t count = std::min({wanted, blocks, kMaxGroups});
  std::vector<double> cost(blocks, double(kFixedRows * size));
  const auto each_block = [&](const TokenSpan& span, const auto& f) {
    for (int64_t token = span.token, end = span.token + span.count; token < end;) {
      const int64_t block = token / size, next = std::min((block + 1) * size, end);
      f(block, next - token);
      token = next;
    }
  };
  for (const Sequence& sequence : sequences_) {
    const double rows = double(sequence.text_end - sequence.text_begin) * group_;
    for (const auto& set : sequence.sets) {
      for (const TokenSpan& span : set) each_block(span, [&](int64_t b, int64_t n) { cost[b] += rows * n; });
    }
  }
  double total = 0, before = 0;
  for (double x : cost) total += x;
  multiply_adds_ = 5 * total * p.head_dim * p.num_kv_heads;
  std::vector<int32_t> group_of(blocks);
  for (int64_t block = 0, last = -1; block < blocks; before += cost[block++]) {
    const int64_t group = std::min(int64_t((before + cost[block] / 2) / total * count), count - 1);
    if (group != last) groups_.push_back({block * size, 0});
    last = group;
    group_of[block] = groups_.size() - 1;
    groups_.back().end = std::min((block + 1) * size, p.num_slow);
  }
  for (Sequence& sequence : sequences_) {
    for (const auto& set : sequence.sets) {
      for (const TokenSpan& span : set) {
        each_block(span, [&](int64_t b, int64_t) {
          if (sequence.groups.empty() || sequence.groups.back() != group_of[b]) sequence.groups.push_back(group_of[b]);
        });
      }
    }
    std::sort(sequence.groups.begin(), sequence.groups.end());
    sequence.groups.erase(std::unique(sequence.groups.begin(), sequence.groups.end()), sequence.groups.end());
  }
}

std::vector<FewTokens> BackwardPlan::few_tokens(const CrossAttentionParams& p) const {
  std::vector<FewTokens> found(texts_.size(), FewTokens{});
  if (p.dtype == DType::kFloat32) return found;
  for (const Sequence& sequence : sequences_) {
    for (int64_t i = sequence.text_begin; i < sequence.text_end; ++i) {
      const Interval sees = seen_by(p, texts_[i], sequence.length());
      if (sees.end - sees.begin > FewTokens::kMost) continue;
      const auto behind = [](int64_t place, const TokenRun& run) { return place < run.place; };
      auto run = std::upper_bound(sequence.runs.begin(), sequence.runs.end(), sees.begin, behind) - 1;
      for (int64_t place = sees.begin; place < sees.end; ++place) {
        if (run[1].place == place) ++run;
        found[i].token[found[i].count++] = run->token + place - run->place;
      }
    }
  }
  return found;
}

int64_t BackwardPlan::rows_of(const Sequence& sequence, int64_t begin, int64_t end) const {
  const int64_t texts = std::min(end, sequence.text_end) - std::max(begin, sequence.text_begin);
  return texts <= 0 ? 0 : (texts * group_ + kRowBlock - 1) / kRowBlock * kRowBlock;
}

int64_t BackwardPlan::partial_rows(int64_t begin, int64_t end) const {
  int64_t rows = 0;
  for (const Sequence& sequence : sequences_) rows += rows_of(sequence, begin, end) * int64_t(sequence.groups.size());
  return rows;
}

BackwardWindow BackwardPlan::window(int64_t begin, int64_t end) const {
  BackwardWindow made;
  made.partials.resize(sequences_.size());
  std::vector<std::vector<int32_t>> sequences_of(groups_.size());
  for (size_t s = 0; s < sequences_.size(); ++s) {
    if (rows_of(sequences_[s], begin, end) == 0) continue;
    for (int32_t group : sequences_[s].groups) sequences_of[group].push_back(int32_t(s));
  }
  int64_t row = 0;
  for (const auto& members : sequences_of) {
    const int64_t first = row;
    made.first_use.push_back(made.uses.size());
    made.first_partial.push_back(first);
    for (int32_t s : members) {
      const Sequence& sequence = sequences_[s];
      const int32_t* texts = texts_.data();
      for (const auto& set : sequence.sets) {
        const TokenSet tokens = {set.data(), set.data() + set.size(), sequence.seen.data(),
                                 sequence.seen.data() + sequence.seen.size()};
        made.uses.push_back({tokens, texts + std::max(begin, sequence.text_begin),
                             texts + std::min(end, sequence.text_end), sequence.length(), row - first});
      }
      made.partials[s].push_back(row);
      row += rows_of(sequence, begin, end);
    }
  }
  made.first_use.push_back(made.uses.size());
  made.first_partial.push_back(row);
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const int64_t first = std::max(begin, sequences_[s].text_begin);
    for (int64_t i = first; i < std::min(end, sequences_[s].text_end); ++i) {
      made.rows.push_back({texts_[i], int32_t(s), (i - first) * group_});
    }
  }
  return made;
}

}  // namespace slowfast::cpu
