// Host entry points of the CPU backend. Python has validated and allocated the tensors; scratch is allocated here.
#pragma once
#include "../params.h"

namespace slowfast::cpu {

const char* isa_name();   // "avx512_bf16", "avx512", "avx2" or "plain": what the kernels run with

// `num_threads` is torch's. Results do not depend on it.
void cross_attention(const CrossAttentionParams& params, int num_threads);
void gated_mix(const GatedMixParams& params, int num_threads);
void pool(const PoolParams& params, int num_threads);

}  // namespace slowfast::cpu
