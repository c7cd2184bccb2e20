// Hopper attention with visible ranges, pieces, or K and V apart: head dimension 64, bfloat16 and float16.
#include "launch_sm90.cuh"

namespace slowfast::cuda {

void cross_attention_sm90_general_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream) {
  launch_general<64>(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace slowfast::cuda
