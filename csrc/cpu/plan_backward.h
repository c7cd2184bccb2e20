// Cuts the backward pass of text cross-attention into units of work, by what there is and not by who works on it: the
// same sums in the same order with any number of threads.
#pragma once
#include <vector>

#include "kernels.h"

namespace slowfast::cpu {

// Some text rows and all that they see. Places of rows of partial sums of dQ are those of one KV head.
struct BackwardWindow {
  std::vector<BackwardUse> uses;
  std::vector<int64_t> first_use, first_partial;   // [groups + 1]: of each group of tokens, one after another
  struct Row { int32_t text, sequence; int64_t offset; };
  std::vector<Row> rows;                           // a text row's partial sums begin `offset` behind
  std::vector<std::vector<int64_t>> partials;      // each of its sequence's, which are in the order of the groups
};

class BackwardPlan {
 public:
  explicit BackwardPlan(const CrossAttentionParams& p);

  // Groups of tokens, which one unit a KV head works on; together they are the cache.
  const std::vector<Interval>& groups() const { return groups_; }
  // Of all five products, with what reading a token costs.
  double multiply_adds() const { return multiply_adds_; }
  const std::vector<int32_t>& texts() const { return texts_; }   // that see something, by sequences
  // The slow tokens that each of texts() sees, if they are few and the dtype is a half; else none.
  std::vector<FewTokens> few_tokens(const CrossAttentionParams& p) const;
  // Rows of partial sums of dQ, of one KV head, that a window of texts() [begin, end) has.
  int64_t partial_rows(int64_t begin, int64_t end) const;
  BackwardWindow window(int64_t begin, int64_t end) const;

 private:
  struct Sequence {
    int64_t text_begin, text_end;       // of texts_
    std::vector<TokenRun> runs;         // see AttentionUnit
    std::vector<std::vector<TokenSpan>> sets;
    std::vector<Interval> seen;
    std::vector<int32_t> groups;        // that hold tokens of it

    int64_t length() const { return runs.back().place; }
  };

  void add_sequence(const CrossAttentionParams& p, int b);
  void add_groups(const CrossAttentionParams& p);
  int64_t rows_of(const Sequence& sequence, int64_t begin, int64_t end) const;

  int64_t group_;
  double multiply_adds_ = 0;
  std::vector<int32_t> texts_;
  std::vector<Sequence> sequences_;
  std::vector<Interval> groups_;
};

}  // namespace slowfast::cpu
