// Work division of the CPU backend: what each thread does and where its scratch lies. OpenMP is the libgomp that torch
// has loaded; units are handed out dynamically, for the cores are shared with whatever else the machine runs.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu.h"
#include "kernels.h"

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

// Units in the order in which neighbours read the same slow tokens.
std::vector<AttentionUnit> attention_units(const CrossAttentionParams& p, float* context, float* lse2) {
  const Kernels& k = kernels();
  const int64_t group = p.num_q_heads / p.num_kv_heads, plane = p.num_text * p.num_q_heads;
  std::vector<AttentionUnit> units;
  for (int b = 0; b < p.batch; ++b) {
    const int64_t rows = (p.cu_text[b + 1] - p.cu_text[b]) * group, tokens = p.cu_slow[b + 1] - p.cu_slow[b];
    const int64_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
    const int64_t run = (tiles + p.num_splits - 1) / p.num_splits * kTokenTile;
    // A few rows read whole tokens, all heads at once, as they lie in memory.
    const int head_step = rows <= k.flat_rows ? p.num_kv_heads : 1;
    for (int head = 0; head < p.num_kv_heads; head += head_step) {
      for (int s = 0; s < p.num_splits && s * run < tokens; ++s) {
        for (int64_t row = 0; row < rows; row += k.max_attention_rows) {
          const int64_t begin = p.cu_slow[b] + s * run;
          units.push_back({p.cu_text[b], row, std::min(row + k.max_attention_rows, rows), begin,
                           std::min<int64_t>(begin + run, p.cu_slow[b + 1]), head, head + head_step,
                           context + s * plane * p.head_dim, lse2 + s * plane});
        }
      }
    }
  }
  return units;
}

}  // namespace

void cross_attention(const CrossAttentionParams& p, int num_threads) {
  const Kernels& k = kernels();
  const int64_t plane = p.num_text * p.num_q_heads;
  const Scratch context(p.num_splits * plane * p.head_dim), lse2(p.num_splits * plane);
  std::fill_n(lse2.data(), p.num_splits * plane, -std::numeric_limits<float>::infinity());
  const std::vector<AttentionUnit> units = attention_units(p, context.data(), lse2.data());
  for_each(units.size(), num_threads, k.attention_scratch(p),
           [&](int64_t i, float* scratch) { k.attention(p, units[i], scratch); });
  const int finishing_threads = p.num_text < 4 ? 1 : num_threads;   // few rows are not worth waking threads for
  for_each(p.num_text, finishing_threads, int64_t(p.num_q_heads) * p.head_dim, [&](int64_t i, float* scratch) {
    k.finish_row(p, context.data(), lse2.data(), i, scratch);
  });
}

void gated_mix(const GatedMixParams& p, int num_threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> text_of(p.rows, -1);
  for (int64_t i = 0; i < p.num_text; ++i) text_of[p.text_rows[i]] = i;
  // Blocks of rows: a row is too short to be handed out alone, and few rows are not worth waking threads for.
  const int64_t block = std::max<int64_t>(1, 32768 / std::max<int64_t>(p.channels, 1));
  for_each((p.rows + block - 1) / block, num_threads, 0, [&](int64_t b, float*) {
    for (int64_t row = b * block; row < std::min((b + 1) * block, p.rows); ++row) k.mix_row(p, row, text_of[row]);
  });
}

void pool(const PoolParams& p, int num_threads) {
  const Kernels& k = kernels();
  for_each(int64_t(p.num_items) * p.max_cells_h, num_threads, 2 * p.channels, [&](int64_t unit, float* scratch) {
    k.pool_cells(p, int32_t(unit / p.max_cells_h), int32_t(unit % p.max_cells_h), scratch);
  });
}

}  // namespace slowfast::cpu
