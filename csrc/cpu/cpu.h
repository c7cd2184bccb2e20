// Host entry points of the CPU backend. Python has validated and allocated the tensors; scratch is allocated here.
#pragma once
#include <array>
#include <vector>

#include "../params.h"

namespace slowfast::cpu {

const char* isa_name();   // "avx512_bf16", "avx512", "avx2" or "plain": what the kernels run with

// `num_threads` is torch's. Results do not depend on it, but for attention's with num_splits 0: it is then cut into so
// many parts that every thread has work.
void cross_attention(const CrossAttentionParams& params, int num_threads);
// What cross_attention would do, for tests of the work division: a unit's rows, KV heads and tokens, begin and end of
// each, in the order in which units are started.
std::vector<std::array<int64_t, 6>> attention_units(const CrossAttentionParams& params, int num_threads);
void gated_mix(const GatedMixParams& params, int num_threads);
void merge(const MergeParams& params, int num_threads);
void pool(const PoolParams& params, int num_threads);

// Backward passes do the same sums in the same order with any number of threads.
void cross_attention_backward(const CrossAttentionBackwardParams& params, int num_threads);
void gated_mix_backward(const GatedMixBackwardParams& params, int num_threads);
void pool_backward(const PoolBackwardParams& params, int num_threads);

}  // namespace slowfast::cpu
