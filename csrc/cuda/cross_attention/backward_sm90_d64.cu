// Backward pass of the Hopper attention, head dimension 64, bfloat16 and float16.
#include "backward_launch_sm90.cuh"

namespace slowfast::cuda {

void cross_attention_backward_sm90_d64(const CrossAttentionBackwardParams& params, const BackwardPlan& plan, void* stream) {
  launch_backward_dtype<64>(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace slowfast::cuda
