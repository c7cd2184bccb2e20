// Lanes of a warp on the host: they are run one after another, over again from the start for each value that they exchange.
// So what a function of a warp does beside that must not matter if it is done again.
#pragma once
#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline void atomicOr(uint32_t* at, uint32_t x) { *at |= x; }
struct int4 {
  int x, y, z, w;
};

#define CHECK(condition) \
  if (!(condition)) { \
    std::printf("seed %d, case %d, line %d: %s\n", seed, number_of_case, __LINE__, #condition); \
    std::exit(1); \
  }

inline int seed, number_of_case;

struct Warp {
  struct Values {
    int of_lane[32];
  };
  std::vector<Values> exchanged;  // so far
  size_t next;                    // of these, for the lane that runs
  int lane, waiting;              // of 32 lanes that run
  Values values;                  // of those that wait
  std::jmp_buf back;
};
inline Warp warp;

inline const int (&exchange(int x))[32] {
  if (warp.next < warp.exchanged.size()) return warp.exchanged[warp.next++].of_lane;
  warp.values.of_lane[warp.lane] = x;
  ++warp.waiting;
  std::longjmp(warp.back, 1);
}
inline int __reduce_max_sync(unsigned, int x) {
  const auto& values = exchange(x);
  return *std::max_element(values, values + 32);
}
inline int __reduce_min_sync(unsigned, int x) {
  const auto& values = exchange(x);
  return *std::min_element(values, values + 32);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& values = exchange(x);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= static_cast<unsigned>(values[i]) << i;
  return found;
}
inline int __shfl_sync(unsigned, int x, int source) { return exchange(x)[source % 32]; }
inline int __shfl_up_sync(unsigned, int x, int offset) {
  const int lane = warp.lane;
  return exchange(x)[lane < offset ? lane : lane - offset];
}

// What the function returns in each lane.
template <typename Function>
auto by_warp(const Function& function) {
  std::vector<decltype(function(0))> results(32);
  warp.exchanged.clear();
  while (true) {
    warp.waiting = 0;
    for (warp.lane = 0; warp.lane < 32; ++warp.lane) {
      warp.next = 0;
      if (setjmp(warp.back) != 0) continue;
      results[warp.lane] = function(warp.lane);
    }
    if (warp.waiting == 0) return results;
    CHECK(warp.waiting == 32);
    warp.exchanged.push_back(warp.values);
  }
}
