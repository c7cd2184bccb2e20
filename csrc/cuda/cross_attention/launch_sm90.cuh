// Host side of the Hopper kernel: the tensor map over the slow KV cache, and a launch with cluster and programmatic
// dependence on the kernel before.
#pragma once
#include <algorithm>

#include "../common/check.h"
#include "kernel_sm90.cuh"
#include "tensor_map.cuh"

namespace slowfast::cuda {

// Bytes from K to V, where they lie so that one map holds both; else 0.
inline int64_t pair_bytes(const CrossAttentionParams& p) {
  const int64_t bytes = static_cast<const char*>(p.values) - static_cast<const char*>(p.keys);
  const bool alike = p.k_token_stride == p.v_token_stride && p.k_head_stride == p.v_head_stride;
  return alike && bytes > 0 && bytes < (int64_t{1} << 40) ? bytes : 0;
}

// [Ns, Hkv, D] twice as dimensions (64 columns, token, column block, K or V, head), or, one by one, without the fourth: a box
// is kBlockN tokens of one head, and lands in shared memory column block after column block, K before V.
template <typename Traits>
SlowMaps<Traits> make_slow_maps(const CrossAttentionParams& p) {
  const cuuint64_t tokens = std::max<cuuint64_t>(p.num_slow, 1), heads = p.num_kv_heads;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride) * 2; };
  if constexpr (Traits::kGeneral) {
    const auto encode = [&](const void* base, int64_t token_stride, int64_t head_stride) {
      return encode_tokens<typename Traits::Element, Traits::kHeadDim, Traits::kBlockN>(base, p.num_slow, p.num_kv_heads,
                                                                                        token_stride, head_stride);
    };
    return {{encode(p.keys, p.k_token_stride, p.k_head_stride), encode(p.values, p.v_token_stride, p.v_head_stride)}};
  } else {
    const cuuint64_t pair = pair_bytes(p);
    return {{encode_map<typename Traits::Element, 5>(p.keys, {Traits::kSpan, tokens, Traits::kSpans, 2, heads},
                                   {bytes(p.k_token_stride), Traits::kSpan * 2, pair, bytes(p.k_head_stride)},
                                   {Traits::kSpan, Traits::kBlockN, Traits::kSpans, Traits::kLoadsTogether ? 2 : 1, 1})}};
  }
}

// Calls that the lean kernel does not serve.
inline bool is_general(const CrossAttentionParams& p, const SplitPlan& plan) {
  const bool selects = p.slow_begin != nullptr || p.slow_end != nullptr || p.slow_pieces != nullptr;
  return selects || plan.dealt_ctas > 0 || pair_bytes(p) == 0;
}

template <typename Traits>
void launch(const CrossAttentionParams& p, SplitPlan plan, cudaStream_t stream) {
  plan.heads_per_kv = p.num_q_heads / p.num_kv_heads;
  const auto reciprocal = [](int64_t x) { return static_cast<uint32_t>(((int64_t{1} << 32) + x - 1) / x); };
  plan.heads_per_kv_reciprocal = reciprocal(plan.heads_per_kv);
  plan.splits_reciprocal = reciprocal(plan.cluster_size * plan.num_groups);
  auto* kernel = cross_attention_kernel<Traits>;
  // Per device, hence on every launch: the call is a table look-up.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes),
        "cudaFuncSetAttribute");
  // Launched as clusters, be it of one, CTAs scatter over the GPCs. Otherwise neighbours share a TPC, and where they read the
  // same K and V in step, one request to L2 serves both: 8x64x10368 650 MB instead of 960 (ncu, lts__t_bytes).
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.cluster_size * plan.max_tiles, p.num_kv_heads, plan.num_groups);
  if (Traits::kShares && plan.share_slots > 0) {
    config.gridDim.y = plan.grid_heads;
    config.gridDim.z = plan.grid_groups;
  }
  if (Traits::kDeals && plan.dealt_ctas > 0) config.gridDim = dim3(plan.dealt_ctas);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = plan.cluster_size > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, make_slow_maps<Traits>(p), plan, p), "cross_attention_sm90");
}

template <int kHeadDim, int kConsumers, bool kGeneral, bool kShares>
void launch_dtype(const CrossAttentionParams& p, const SplitPlan& plan, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kBFloat16: return launch<Traits<__nv_bfloat16, kHeadDim, kConsumers, kGeneral, kShares>>(p, plan, stream);
    case DType::kFloat16: return launch<Traits<__half, kHeadDim, kConsumers, kGeneral, kShares>>(p, plan, stream);
    case DType::kFloat32: break;
  }
  throw std::invalid_argument("cross_attention: a dtype that has no kernel");
}

template <int kHeadDim, bool kGeneral, bool kShares>
void launch_head_dim(const CrossAttentionParams& p, const SplitPlan& plan, cudaStream_t stream) {
  switch (plan.consumers) {
    case 1: return launch_dtype<kHeadDim, 1, kGeneral, kShares>(p, plan, stream);
    case 2: return launch_dtype<kHeadDim, 2, kGeneral, kShares>(p, plan, stream);
  }
  throw std::invalid_argument("cross_attention: a number of consumers that has no kernel");
}

// Of the general kernels, those of two consumers deal instead of sharing.
template <int kHeadDim>
void launch_general(const CrossAttentionParams& p, const SplitPlan& plan, cudaStream_t stream) {
  if (plan.consumers == 1 && plan.share_slots > 0) return launch_dtype<kHeadDim, 1, true, true>(p, plan, stream);
  launch_head_dim<kHeadDim, true, false>(p, plan, stream);
}

}  // namespace slowfast::cuda
