// Cuts a call of text cross-attention into units of work for threads.
#pragma once
#include <vector>

#include "kernels.h"

namespace slowfast::cpu {

struct AttentionPlan {
  std::vector<int32_t> texts;            // what the units point to
  std::vector<TokenRun> runs;
  std::vector<AttentionUnit> units;      // in the order in which they are to be started
  std::vector<int64_t> first_partial;    // [Nt + 1], see Partials
  double multiply_adds = 0;              // with what reading a token costs
};

// `max_rows`, `flat_rows`: of Kernels. `num_threads` counts only where num_splits is 0: there must be work for each.
AttentionPlan plan_attention(const CrossAttentionParams& p, int max_rows, int flat_rows, int num_threads);

}  // namespace slowfast::cpu
