// Tensor maps of the slow KV cache, by the driver's own encoder.
#pragma once
#include <cuda_bf16.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/check.h"

namespace slowfast::cuda {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

template <typename T, int kRank>
CUtensorMap encode_map(const void* base, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                       const cuuint32_t (&box)[kRank]) {
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank, const_cast<void*>(base),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refused the slow KV cache: CUDA error " + std::to_string(result));
  }
  return map;
}

// [Ns, Hkv, D] as dimensions (64 columns, token, column block, head): a box is kBlockN tokens of one head, and lands in
// shared memory column block after column block.
template <typename T, int kHeadDim, int kBlockN>
CUtensorMap encode_tokens(const void* base, int64_t num_tokens, int num_heads, int64_t token_stride, int64_t head_stride) {
  constexpr int kSpan = 64;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride) * sizeof(T); };
  const cuuint64_t tokens = std::max<int64_t>(num_tokens, 1), heads = num_heads;
  return encode_map<T, 4>(base, {kSpan, tokens, kHeadDim / kSpan, heads}, {bytes(token_stride), bytes(kSpan), bytes(head_stride)},
                          {kSpan, kBlockN, kHeadDim / kSpan, 1});
}

}  // namespace slowfast::cuda
