// Pooling of one row of cells of one work item: slow tokens, normalised, and their mean as fast tokens.
//
// Roofline: memory. Every input token is read once, in one sweep that averages, sums squares and keeps the fp32 row in
// L1 (4 C bytes); the second sweep over that row scales and writes it, and adds it to the fast token in progress.
#pragma once
#include "../kernels.h"
#include "simd.h"

namespace slowfast::cpu {
namespace {

// row = mean of the stride x stride tokens at `from`; returns the sum of its squares.
template <class T, class Params>
float average_tokens(const Params& p, const T* from, int stride, float* row) {
  const float scale = 1.f / float(stride * stride);
  Vec squares = zero();
  int64_t c = 0;
  for (; c + kLanes <= p.channels; c += kLanes) {
    Vec total = zero();
    for (int y = 0; y < stride; ++y) {
      const T* token = from + y * p.grid_w * p.token_stride + c;
      for (int x = 0; x < stride; ++x) total = total + load(token + x * p.token_stride);
    }
    total = total * scale;
    squares = fma(total, total, squares);
    store(row + c, total);
  }
  float sum_squares = sum(squares);
  for (; c < p.channels; ++c) {
    float total = 0.f;
    for (int y = 0; y < stride; ++y) {
      for (int x = 0; x < stride; ++x) total += to_float(from[(y * p.grid_w + x) * p.token_stride + c]);
    }
    row[c] = total * scale;
    sum_squares += row[c] * row[c];
  }
  return sum_squares;
}

template <class S, class T>
void write_scaled(const S* row, float scale, T* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(row + c) * scale);
  for (; c < count; ++c) from_float(to_float(row[c]) * scale, to + c);
}

// write_scaled, and total += row in the same sweep.
template <class T>
void write_and_add(const float* row, float scale, T* to, float* total, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vec x = load(row + c);
    store(to + c, x * scale);
    store(total + c, load(total + c) + x);
  }
  for (; c < count; ++c) {
    from_float(row[c] * scale, to + c);
    total[c] += row[c];
  }
}

template <class T>
void pool_cells_of(const PoolParams& p, int32_t item, int32_t cell_row, float* scratch) {
  const int32_t* it = p.items + item * 8;
  const int32_t entry_begin = it[0], entry_count = it[1], fast_base = it[2], pool_stride = it[3];
  const int32_t slow_h = it[4], slow_w = it[5], fast_h = it[6], fast_w = it[7], cell = p.spatial_stride;
  float* row = scratch;
  float* mean = scratch + p.channels;
  for (int32_t x0 = 0; x0 < slow_w; x0 += cell) {
    const int32_t y0 = cell_row * cell;
    const bool has_fast = fast_base >= 0 && cell_row < fast_h && x0 / cell < fast_w;
    if (has_fast) std::memset(mean, 0, p.channels * sizeof(float));
    for (int32_t e = entry_begin; e < entry_begin + entry_count; ++e) {
      const int64_t frame = p.entries[2 * e], slow_base = p.entries[2 * e + 1];
      if (slow_base < 0 && !has_fast) continue;
      for (int32_t y = y0; y < slow_h && y < y0 + cell; ++y) {
        for (int32_t x = x0; x < slow_w && x < x0 + cell; ++x) {
          const int64_t token = int64_t(y) * pool_stride * p.grid_w + x * pool_stride;
          const T* from = static_cast<const T*>(p.frames) + frame * p.frame_stride + token * p.token_stride;
          const float mean_square = average_tokens(p, from, pool_stride, row) / float(p.channels);
          if (slow_base < 0) {
            for (int64_t c = 0; c < p.channels; ++c) mean[c] += row[c];
            continue;
          }
          const float scale = p.norm_eps < 0 ? 1.f : 1.f / __builtin_sqrtf(mean_square + p.norm_eps);
          T* to = static_cast<T*>(p.slow) + (slow_base + int64_t(y) * slow_w + x) * p.channels;
          if (has_fast) write_and_add(row, scale, to, mean, p.channels);
          else write_scaled(row, scale, to, p.channels);
        }
      }
    }
    if (has_fast) {
      T* to = static_cast<T*>(p.fast) + (fast_base + int64_t(cell_row) * fast_w + x0 / cell) * p.channels;
      write_scaled(mean, 1.f / float(entry_count * cell * cell), to, p.channels);
    }
  }
}

}  // namespace
}  // namespace slowfast::cpu
