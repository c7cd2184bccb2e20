// The second kernel of a call is launched while its first one runs, and waits on the device for what that one wrote:
// programmatic dependent launch. Where there is none (before Hopper, or code built for no Hopper) streams keep order.
#pragma once
#include "check.h"

namespace slowfast::cuda {

// In the first kernel: the second one's blocks may take what room there is. They wait all the same.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the second kernel, before it reads what the first one wrote.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... Params>
void launch_dependent(void (*kernel)(Params...), unsigned blocks, unsigned threads, cudaStream_t stream, const char* name,
                      const Params&... params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
#ifdef SLOWFAST_WITH_SM90  // else what runs on Hopper has been compiled without the wait
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 ? 1 : 0;
#endif
  check(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace slowfast::cuda
