// What each thread of the CPU backend does and where its scratch lies; plan.cpp cuts attention into units of work.
// OpenMP is the libgomp that torch has loaded; units are handed out dynamically, for the cores are shared with whatever
// else the machine runs.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "plan.h"

namespace slowfast::cpu {
namespace {

// Uninitialised floats, 64-byte aligned so that no vector straddles a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

constexpr int64_t padded(int64_t floats) { return (floats + 31) / 32 * 32; }   // threads share no pair of cache lines

// body(index, this thread's scratch) for index in [0, count).
template <class Body>
void for_each(int64_t count, int num_threads, int64_t scratch_floats, const Body& body) {
  const int threads = int(std::min<int64_t>(std::max(num_threads, 1), std::max<int64_t>(count, 1)));
  const int64_t each = padded(scratch_floats);
  const Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) body(i, scratch.data() + omp_get_thread_num() * each);
}

// f(row) in blocks: a row is too short to be handed out alone, and few rows are not worth waking threads for.
template <class F>
void for_each_row(int64_t rows, int64_t channels, int num_threads, const F& f) {
  const int64_t block = std::max<int64_t>(1, 32768 / std::max<int64_t>(channels, 1));
  for_each((rows + block - 1) / block, num_threads, 0, [&](int64_t b, float*) {
    for (int64_t row = b * block; row < std::min((b + 1) * block, rows); ++row) f(row);
  });
}

}  // namespace

void cross_attention(const CrossAttentionParams& p, int num_threads) {
  const Kernels& k = kernels();
  const AttentionPlan plan = plan_attention(p, k.max_attention_rows, k.flat_rows, num_threads);
  const int64_t count = plan.first_partial.back() * p.num_q_heads;
  const Scratch context(count * p.head_dim), lse2(count);
  std::fill_n(lse2.data(), count, -std::numeric_limits<float>::infinity());
  const Partials partials{plan.first_partial.data(), context.data(), lse2.data()};
  for_each(plan.units.size(), num_threads, k.attention_scratch(p),
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
