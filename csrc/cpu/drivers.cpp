// What each thread of the CPU backend does; plan.cpp cuts attention into units of work.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "plan.h"
#include "threads.h"

namespace slowfast::cpu {
void cross_attention(const CrossAttentionParams& p, int num_threads) {
  const Kernels& k = kernels();
  const AttentionPlan plan = plan_attention(p, k.max_attention_rows, k.flat_rows, num_threads);
  const int64_t count = plan.first_partial.back() * p.num_q_heads;
  const Scratch context(count * p.head_dim), lse2(count);
  std::fill_n(lse2.data(), count, -std::numeric_limits<float>::infinity());
  const Partials partials{plan.first_partial.data(), context.data(), lse2.data()};
  for_each(plan.units.size(), threads_for(plan.multiply_adds, num_threads), k.attention_scratch(p),
           [&](int64_t i, float* scratch) { k.attention(p, plan.units[i], partials, scratch); });
  const int finishing_threads = p.num_text < 4 ? 1 : num_threads;   // few rows are not worth waking threads for
  for_each(p.num_text, finishing_threads, int64_t(p.num_q_heads) * p.head_dim,
           [&](int64_t i, float* scratch) { k.finish_row(p, partials, i, scratch); });
}

std::vector<std::array<int64_t, 6>> attention_units(const CrossAttentionParams& p, int num_threads) {
  const Kernels& k = kernels();
  const AttentionPlan plan = plan_attention(p, k.max_attention_rows, k.flat_rows, num_threads);
  std::vector<std::array<int64_t, 6>> found;
  for (const AttentionUnit& u : plan.units) {
    found.push_back({u.row_begin, u.row_end, u.kv_head_begin, u.kv_head_end, u.tokens.begin, u.tokens.end});
  }
  return found;
}

void gated_mix(const GatedMixParams& p, int num_threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> text_of(p.rows, -1);
  for (int64_t i = 0; i < p.num_text; ++i) text_of[p.text_rows[i]] = i;
  for_each_row(p.rows, p.channels, num_threads, [&](int64_t row) { k.mix_row(p, row, text_of[row]); });
}

void merge(const MergeParams& p, int num_threads) {
  const Kernels& k = kernels();
  for_each_row(p.num_text, int64_t(p.num_heads) * p.head_dim, num_threads, [&](int64_t row) { k.merge_row(p, row); });
}

void pool(const PoolParams& p, int num_threads) {
  const Kernels& k = kernels();
  for_each(int64_t(p.num_items) * p.max_cells_h, num_threads, 2 * p.channels, [&](int64_t unit, float* scratch) {
    k.pool_cells(p, int32_t(unit / p.max_cells_h), int32_t(unit % p.max_cells_h), scratch);
  });
}

}  // namespace slowfast::cpu
