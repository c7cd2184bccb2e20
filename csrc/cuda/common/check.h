// CUDA status codes become exceptions: a library must never exit, and Python turns these into RuntimeError.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace slowfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

// Right after <<<...>>>. cudaGetLastError also clears the error, so that one bad launch does not fail the next call.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Read on every call and never cached: the current device may differ from one call to the next.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Blocks of `kernel` that the whole current device holds at once: the size of a persistent grid.
template <typename Kernel>
int resident_blocks(Kernel* kernel, int threads, size_t dynamic_shared) {
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, dynamic_shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (per_multiprocessor == 0) throw std::runtime_error("a CUDA kernel's block does not fit this GPU");
  return per_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
}

}  // namespace slowfast::cuda
