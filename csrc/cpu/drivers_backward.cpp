// What each thread does in the backward passes. plan_backward.cpp cuts attention into units of work.
#include <cstring>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "plan_backward.h"
#include "threads.h"

namespace slowfast::cpu {
namespace {

class AttentionBackward {
 public:
  AttentionBackward(const CrossAttentionBackwardParams& b, int num_threads)
      : b_(b), p_(b.forward), k_(*kernels().backward), plan_(p_),
        num_threads_(threads_for(plan_.multiply_adds(), num_threads)),
        row_floats_(k_.row_floats(p_)), max_rows_(b.workspace_bytes / int64_t(row_floats_ * sizeof(float))),
        delta_(p_.num_text * p_.num_q_heads) {}

  void run() {
    const bool keys_or_values = b_.grad_keys != nullptr || b_.grad_values != nullptr;
    const int64_t num_texts = plan_.texts().size();
    const std::vector<FewTokens> few = plan_.few_tokens(p_);
    for_each_row(num_texts, channels(), num_threads_,
                 [&](int64_t i) { k_.delta_row(b_, plan_.texts()[i], few[i], delta_.data()); });
    if (b_.grad_q == nullptr) return pass(0, num_texts, keys_or_values, false);
    zero_blind_rows();
    if (plan_.partial_rows(0, num_texts) <= max_rows_) return pass(0, num_texts, keys_or_values, true);
    // The partial sums of all rows would take too much: dQ apart, some rows at a time. Scores are computed twice.
    if (keys_or_values) pass(0, num_texts, true, false);
    for (int64_t begin = 0, end; begin < num_texts; begin = end) {
      end = begin + 1;
      while (end < num_texts && plan_.partial_rows(begin, end + 1) * p_.num_kv_heads <= max_rows_) ++end;
      pass(begin, end, false, true);
    }
  }

 private:
  int64_t channels() const { return int64_t(p_.num_q_heads) * p_.head_dim; }

  char* grad_q_row(int64_t i) const {
    const int64_t size = p_.dtype == DType::kFloat32 ? 4 : 2;
    return static_cast<char*>(b_.grad_q) + p_.text_rows[i] * channels() * size;
  }

  void zero_blind_rows() const {
    std::vector<bool> sees(p_.num_text, false);
    for (int32_t i : plan_.texts()) sees[i] = true;
    const int64_t bytes = channels() * (p_.dtype == DType::kFloat32 ? 4 : 2);
    for (int64_t i = 0; i < p_.num_text; ++i) if (!sees[i]) std::memset(grad_q_row(i), 0, bytes);
  }

  // Text rows [begin, end) of the plan's; a few KV heads at a time, as many as there is room for.
  void pass(int64_t begin, int64_t end, bool keys_or_values, bool queries) {
    const BackwardWindow window = plan_.window(begin, end);
    const int64_t rows = window.first_partial.back(), heads = p_.num_kv_heads;
    const int64_t room = queries ? std::clamp<int64_t>(max_rows_ / std::max<int64_t>(rows, 1), 1, heads) : heads;
    const int64_t turns = (heads + room - 1) / room, each = (heads + turns - 1) / turns;
    const Scratch partials(queries ? each * rows * row_floats_ : 0);
    for (int64_t head = 0; head < heads; head += each) {
      const int64_t count = std::min(each, heads - head);
      for_each(plan_.groups().size() * count, num_threads_, k_.attention_scratch(p_), [&](int64_t i, float* scratch) {
        const int64_t group = i / count, turn = i % count;
        BackwardUnit unit{};
        unit.tokens = plan_.groups()[group];
        unit.uses = window.uses.data() + window.first_use[group];
        unit.uses_end = window.uses.data() + window.first_use[group + 1];
        unit.kv_head = int32_t(head + turn);
        unit.keys = keys_or_values && b_.grad_keys != nullptr;
        unit.values = keys_or_values && b_.grad_values != nullptr;
        if (queries) unit.grad_q = partials.data() + (turn * rows + window.first_partial[group]) * row_floats_;
        unit.partial_rows = window.first_partial[group + 1] - window.first_partial[group];
        k_.attention(b_, unit, delta_.data(), scratch);
      });
      if (queries) add_partials(window, partials.data(), head, count);
    }
  }

  void add_partials(const BackwardWindow& window, const float* partials, int64_t head, int64_t count) const {
    const int64_t rows = window.first_partial.back(), group = p_.num_q_heads / p_.num_kv_heads;
    const int64_t head_bytes = p_.head_dim * (p_.dtype == DType::kFloat32 ? 4 : 2);
    for_each_row(window.rows.size(), count * group * p_.head_dim, num_threads_, [&](int64_t i) {
      const BackwardWindow::Row& row = window.rows[i];
      const std::vector<int64_t>& firsts = window.partials[row.sequence];
      std::vector<const float*> parts(firsts.size());
      for (int64_t h = 0; h < count * group; ++h) {
        const int64_t mine = h / group * rows + row.offset + h % group;
        for (size_t n = 0; n < firsts.size(); ++n) parts[n] = partials + (firsts[n] + mine) * row_floats_;
        k_.add_partials(b_, parts.data(), parts.size(), grad_q_row(row.text) + (head * group + h) * head_bytes);
      }
    });
  }

  const CrossAttentionBackwardParams& b_;
  const CrossAttentionParams& p_;
  const BackwardKernels& k_;
  const BackwardPlan plan_;
  const int num_threads_;
  const int64_t row_floats_, max_rows_;
  const Scratch delta_;
};

}  // namespace

void cross_attention_backward(const CrossAttentionBackwardParams& b, int num_threads) {
  AttentionBackward(b, num_threads).run();
}

void gated_mix_backward(const GatedMixBackwardParams& p, int num_threads) {
  const BackwardKernels& k = *kernels().backward;
  const int64_t blocks = p.num_blocks, each = blocks == 0 ? 0 : (p.num_text + blocks - 1) / blocks;
  const auto text_block = [&](int64_t block) {
    const int64_t begin = std::min(block * each, p.num_text);
    float* partial = p.partials == nullptr ? nullptr : p.partials + block * p.partial_stride;
    k.mix_rows(p, begin, std::min(begin + each, p.num_text), partial);
  };
  std::vector<int64_t> others;   // rows whose gradient passes through
  if (p.grad_state != nullptr && p.num_text < p.rows) {
    std::vector<bool> is_text(p.rows, false);
    for (int64_t i = 0; i < p.num_text; ++i) is_text[p.text_rows[i]] = true;
    for (int64_t row = 0; row < p.rows; ++row) if (!is_text[row]) others.push_back(row);
  }
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2, row_bytes = p.channels * size;
  const int64_t copied = std::max<int64_t>(1, 262144 / std::max<int64_t>(row_bytes, 1));   // rows at a time
  const int64_t copies = (int64_t(others.size()) + copied - 1) / copied;
  for_each(blocks + copies, num_threads, 0, [&](int64_t i, float*) {
    if (i < blocks) return text_block(i);
    const int64_t begin = (i - blocks) * copied, end = std::min<int64_t>(begin + copied, others.size());
    for (int64_t at = begin; at < end; ++at) {
      std::memcpy(static_cast<char*>(p.grad_state) + others[at] * row_bytes,
                  static_cast<const char*>(p.grad) + others[at] * p.grad_row_stride * size, row_bytes);
    }
  });
  if (p.partials == nullptr) return;
  constexpr int64_t kChannels = 1024;   // at a time
  const int64_t parts = p.grad_weight == nullptr ? 1 : (p.channels + kChannels - 1) / kChannels;
  for_each(parts, num_threads, 0, [&](int64_t i, float*) {
    k.mix_sums(p, i * kChannels, std::min((i + 1) * kChannels, p.channels));
  });
}

void pool_backward(const PoolBackwardParams& p, int num_threads) {
  const BackwardKernels& k = *kernels().backward;
  for_each(p.num_frames * p.max_cells_h, num_threads, p.channels, [&](int64_t unit, float* scratch) {
    k.pool_cells(p, unit / p.max_cells_h, int32_t(unit % p.max_cells_h), scratch);
  });
}

}  // namespace slowfast::cpu
