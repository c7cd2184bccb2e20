// The Params structs that Python has filled (slowfast_kernels/params.py mirrors their fields) arrive as one address.
// Read once, for the CPU and the CUDA functions of slowfast_kernels._C alike; what a kernel could not tell is refused here.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "params.h"

namespace slowfast {

using Address = uintptr_t;  // 0 is nullptr

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline void check(DType dtype) {
  const auto code = static_cast<int32_t>(dtype);
  if (code < 0 || code >= kNumDTypes) throw std::invalid_argument("dtype: a code that this build does not know");
}

inline void check(const GateParams& gate) {
  const auto code = static_cast<int32_t>(gate.kind);
  if (code < 0 || code >= kNumGateKinds) throw std::invalid_argument("gate: a kind that this build does not know");
  check(gate.dtype);
}

inline const CrossAttentionParams& read_attention(Address address) {
  const auto& params = *static_cast<const CrossAttentionParams*>(pointer(address));
  check(params.dtype);
  check(params.gate);
  return params;
}

inline const CrossAttentionBackwardParams& read_attention_backward(Address address) {
  const auto& params = *static_cast<const CrossAttentionBackwardParams*>(pointer(address));
  check(params.forward.dtype);
  return params;
}

inline const GatedMixParams& read_gated_mix(Address address) {
  const auto& params = *static_cast<const GatedMixParams*>(pointer(address));
  check(params.dtype);
  check(params.gate);
  return params;
}

inline const GatedMixBackwardParams& read_gated_mix_backward(Address address) {
  const auto& params = *static_cast<const GatedMixBackwardParams*>(pointer(address));
  check(params.dtype);
  check(params.value_dtype);
  check(params.gate);
  return params;
}

inline const MergeParams& read_merge(Address address) {
  const auto& params = *static_cast<const MergeParams*>(pointer(address));
  check(params.dtype);
  return params;
}

inline const PoolParams& read_pool(Address address) {
  const auto& params = *static_cast<const PoolParams*>(pointer(address));
  check(params.dtype);
  return params;
}

inline const PoolBackwardParams& read_pool_backward(Address address) {
  const auto& params = *static_cast<const PoolBackwardParams*>(pointer(address));
  check(params.dtype);
  return params;
}

}  // namespace slowfast
