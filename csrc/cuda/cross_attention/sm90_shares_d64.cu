// Hopper attention of sequences whose lengths may be uneven: head dimension 64, bfloat16 and float16.
#include "launch_sm90.cuh"

namespace slowfast::cuda {

void cross_attention_sm90_shares_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream) {
  launch_head_dim<64, false, true>(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace slowfast::cuda
