// Launches of the Hopper backward, by what a call asks for.
#pragma once
#include "backward_sights.cuh"
#include "backward_sm90.cuh"
#include "tensor_map.cuh"

namespace slowfast::cuda {

template <typename Traits>
void launch_backward(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  using T = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  const unsigned heads = p.forward.num_kv_heads;
  auto* kernel = cross_attention_backward_kernel<Traits>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes), "cudaFuncSetAttribute");
  if constexpr (Traits::kPieces) {
    number_pieces_kernel<<<(p.forward.batch + 3) / 4, 128, 0, stream>>>(p, plan);
    check_launch("number_pieces");
    find_piece_sights_kernel<<<count_blocks_in_memory(p) / heads, 128, 0, stream>>>(p, plan);
    check_launch("find_piece_sights");
  } else if constexpr (Traits::kRanges) {
    find_sights_kernel<<<p.forward.num_slow / Traits::kBlockN + p.forward.batch, 128, 0, stream>>>(p, plan);
    check_launch("find_sights");
  }
  pack_rows_kernel<T, kHeadDim, Traits::kRanges, Traits::kPieces><<<dim3(plan.max_tiles * 4, heads), 16 * kHeadDim / 8, 0, stream>>>(p, plan);
  check_launch("pack_rows");
  cudaLaunchAttribute attributes[2];  // the second: CTAs wait for one another, so all of them must be there
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.num_ctas);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = stream;
  const auto encode = [&](const void* base, int64_t token_stride, int64_t head_stride) {
    return encode_tokens<T, kHeadDim, Traits::kBlockN>(base, p.forward.num_slow, p.forward.num_kv_heads, token_stride, head_stride);
  };
  const BackwardMaps maps = {encode(p.forward.keys, p.forward.k_token_stride, p.forward.k_head_stride), encode(p.forward.values, p.forward.v_token_stride, p.forward.v_head_stride)};
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, maps, p, plan), "cross_attention_backward_sm90");
  config.numAttrs = 1;
  if constexpr (Traits::kWithQ) {
    constexpr int kShares = 4;
    const bool shares = plan.max_tiles * heads <= plan.num_ctas / 2u;  // else tiles alone are CTAs enough
    config.gridDim = dim3(plan.max_tiles, heads, shares ? kShares : 1);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = 0;
    auto* write = shares ? write_dq_kernel<T, kHeadDim, kShares, Traits::kRanges, Traits::kPieces>
                         : write_dq_kernel<T, kHeadDim, 1, Traits::kRanges, Traits::kPieces>;
    check(cudaLaunchKernelEx(&config, write, p, plan), "write_dq");
  }
}

template <typename T, int kHeadDim, bool kRanges, bool kPieces>
void launch_backward_needs(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  const bool with_kv = p.grad_keys != nullptr || p.grad_values != nullptr;
  if (p.grad_q == nullptr) return launch_backward<BackwardTraits<T, kHeadDim, false, true, kRanges, kPieces>>(p, plan, stream);
  if (!with_kv) return launch_backward<BackwardTraits<T, kHeadDim, true, false, kRanges, kPieces>>(p, plan, stream);
  launch_backward<BackwardTraits<T, kHeadDim, true, true, kRanges, kPieces>>(p, plan, stream);
}

template <typename T, int kHeadDim>
void launch_backward_sights(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  const bool has_ranges = p.forward.slow_begin != nullptr || p.forward.slow_end != nullptr;
  if (p.forward.slow_pieces != nullptr) return launch_backward_needs<T, kHeadDim, true, true>(p, plan, stream);
  has_ranges ? launch_backward_needs<T, kHeadDim, true, false>(p, plan, stream) : launch_backward_needs<T, kHeadDim, false, false>(p, plan, stream);
}

template <int kHeadDim>
void launch_backward_dtype(const CrossAttentionBackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  switch (p.forward.dtype) {
    case DType::kBFloat16: return launch_backward_sights<__nv_bfloat16, kHeadDim>(p, plan, stream);
    case DType::kFloat16: return launch_backward_sights<__half, kHeadDim>(p, plan, stream);
    case DType::kFloat32: break;
  }
  throw std::invalid_argument("cross_attention_backward: a dtype that has no kernel");
}

}  // namespace slowfast::cuda
