// Hopper attention with visible ranges, pieces, or K and V apart: head dimension 128, bfloat16 and float16.
#include "launch_sm90.cuh"

namespace slowfast::cuda {

void cross_attention_sm90_general_d128(const CrossAttentionParams& params, const SplitPlan& plan, void* stream) {
  launch_general<128>(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace slowfast::cuda
