// Picks one compilation of csrc/cpu/isa, once a process: the best that the CPU has, or a lower one that
// SLOWFAST_CPU_ISA names. This file and the drivers are compiled for the baseline, so they run anywhere.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "kernels.h"

namespace slowfast::cpu {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const Level levels[] = {{&avx512_bf16::kKernels, bf16}, {&avx512::kKernels, avx512}, {&avx2::kKernels, avx2},
                          {&plain::kKernels, true}};
#else
  const Level levels[] = {{&plain::kKernels, true}};
#endif
  const char* wish = std::getenv("SLOWFAST_CPU_ISA");
  std::string names;
  for (const Level& level : levels) {
    const bool wished = wish == nullptr || *wish == '\0' || std::strcmp(wish, level.kernels->name) == 0;
    if (wished && level.supported) return *level.kernels;
    if (level.supported) names += std::string(names.empty() ? "" : ", ") + level.kernels->name;
  }
  const std::string got = wish;
  throw std::invalid_argument("SLOWFAST_CPU_ISA: got '" + got + "', want one that this CPU has: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa_name() { return kernels().name; }

}  // namespace slowfast::cpu
