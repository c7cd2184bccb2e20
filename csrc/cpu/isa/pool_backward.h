// Backward pass of pooling for one row of squares of a frame: the gradient of a slow token, with its share of those of
// the fast tokens that it is averaged into, spread over the features that it is the mean of.
//
// Roofline: memory. Features (where there is a norm) and gradients are read once, and a token's row stays in L1.
#pragma once
#include "mix.h"
#include "pool.h"

namespace slowfast::cpu {
namespace {

// row = scale * (grad - along * row)
template <class T>
void subtract_along(const T* grad, float along, float scale, float* row, int64_t count) {
  const Vec minus = splat(-along), all = splat(scale);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(row + c, all * fma(minus, load(row + c), load(grad + c)));
  for (; c < count; ++c) row[c] = scale * (to_float(grad[c]) - along * row[c]);
}

// to = scale * row + factor * more
template <class S, class T>
void write_sum(const S* row, float scale, const T* more, float factor, T* to, int64_t count) {
  const Vec all = splat(scale), all_more = splat(factor);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, fma(all_more, load(more + c), all * load(row + c)));
  for (; c < count; ++c) from_float(scale * to_float(row[c]) + factor * to_float(more[c]), to + c);
}

// row = the gradient of a slow token that is the mean of the stride x stride features at `from`, times `share`.
template <class T>
void slow_gradient(const PoolBackwardParams& p, const T* from, int stride, const T* grad, float share, float* row) {
  if (grad == nullptr) {
    std::memset(row, 0, p.channels * sizeof(float));
  } else if (p.norm_eps < 0) {
    write_scaled(grad, share, row, p.channels);
  } else {
    const float mean_square = average_tokens(p, from, stride, row) / float(p.channels);
    const float scale = 1.f / (mean_square + p.norm_eps);   // squared
    const float along = dot(grad, row, p.channels) / float(p.channels);
    subtract_along(grad, along * scale, share * __builtin_sqrtf(scale), row, p.channels);
  }
}

template <class T>
void pool_backward_cells_of(const PoolBackwardParams& p, int64_t frame, int32_t cell_row, float* row) {
  const int32_t* it = p.frame_table + frame * 8;
  const int32_t num_windows = it[1], slow_base = it[2], stride = it[3];
  const int32_t* windows = p.windows + 2 * it[0];
  const int32_t slow_h = it[4], slow_w = it[5], fast_h = it[6], fast_w = it[7], cell = p.spatial_stride;
  const auto feature = [&](int32_t y, int32_t x) { return int64_t(y) * p.grid_w + x; };
  T* to = static_cast<T*>(p.grad_frames) + frame * p.grid_h * p.grid_w * p.channels;
  const int32_t y0 = cell_row * stride, y1 = y0 + stride < p.grid_h ? y0 + stride : p.grid_h;
  const int64_t bytes = p.channels * sizeof(T);
  const int32_t used = cell_row < slow_h ? slow_w : 0;
  for (int32_t x = 0; x < used; ++x) {
    const int64_t slow = slow_base + int64_t(cell_row) * slow_w + x, at = feature(y0, x * stride);
    const T* from = static_cast<const T*>(p.frames) + frame * p.frame_stride + at * p.token_stride;
    const T* grad = p.grad_slow == nullptr ? nullptr : static_cast<const T*>(p.grad_slow) + slow * p.slow_row_stride;
    const float share = 1.f / float(stride * stride);
    const bool is_fast = p.grad_fast != nullptr && cell_row / cell < fast_h && x / cell < fast_w;
    const int32_t last = is_fast ? num_windows - 1 : -1;
    const auto mean = [&](int32_t i) {
      const int64_t fast = windows[2 * i] + int64_t(cell_row / cell) * fast_w + x / cell;
      return static_cast<const T*>(p.grad_fast) + fast * p.fast_row_stride;
    };
    const auto factor = [&](int32_t i) { return share / float(windows[2 * i + 1] * cell * cell); };
    T* first = to + at * p.channels;
    if (grad != nullptr && p.norm_eps < 0 && last == 0) {   // what needs no float32 row on the way
      write_sum(grad, share, mean(0), factor(0), first, p.channels);
    } else {
      slow_gradient(p, from, stride, grad, share, row);
      for (int32_t i = 0; i < last; ++i) add_scaled(mean(i), factor(i), row, p.channels);
      if (last >= 0) write_sum(row, 1.f, mean(last), factor(last), first, p.channels);
      else write_scaled(row, 1.f, first, p.channels);
    }
    for (int32_t y = y0; y < y1; ++y) {
      for (int32_t i = x * stride; i < (x + 1) * stride; ++i) {
        if (y > y0 || i > x * stride) std::memcpy(to + feature(y, i) * p.channels, first, bytes);
      }
    }
  }
  for (int32_t y = y0; y < y1; ++y) {   // features that pooling drops
    std::memset(to + feature(y, used * stride) * p.channels, 0, (p.grid_w - used * stride) * bytes);
  }
}

}  // namespace
}  // namespace slowfast::cpu
