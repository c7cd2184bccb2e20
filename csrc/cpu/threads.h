// How work is dealt out to threads, and where their scratch lies. For the drivers alone, compiled for the baseline.
// OpenMP is the libgomp that torch has loaded; units are handed out dynamically, for the cores are shared with whatever
// else the machine runs.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace slowfast::cpu {

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

// Multiply-adds that take one thread longer (some 20 us) than it takes to wake another.
constexpr double kWorkOfThread = 1 << 19;

// So many of `num_threads` as that much work is worth.
inline int threads_for(double multiply_adds, int num_threads) {
  return int(std::clamp(multiply_adds / kWorkOfThread, 1.0, double(std::max(num_threads, 1))));
}

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

}  // namespace slowfast::cpu
