// Hopper attention, head dimension 64, bfloat16 and float16.
#include "launch_sm90.cuh"

namespace slowfast::cuda {

void cross_attention_sm90_d64(const CrossAttentionParams& params, const SplitPlan& plan, void* stream) {
  if (is_general(params, plan)) return cross_attention_sm90_general_d64(params, plan, stream);
  if (plan.share_slots > 0) return cross_attention_sm90_shares_d64(params, plan, stream);
  launch_head_dim<64, false, false>(params, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace slowfast::cuda
