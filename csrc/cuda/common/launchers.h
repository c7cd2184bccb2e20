// The host entry points of every .cu file, free of CUDA headers so that the bindings need only a C++ compiler.
// `stream` is a cudaStream_t. The caller has made the tensors' device current. A failed launch throws.
#pragma once
#include "../../params.h"

namespace slowfast::cuda {

void pool(const PoolParams& params, void* stream);
void pool_backward(const PoolBackwardParams& params, void* stream);
void merge(const MergeParams& params, void* stream);
void gated_mix(const GatedMixParams& params, void* stream);
void gated_mix_backward(const GatedMixBackwardParams& params, void* stream);

}  // namespace slowfast::cuda
