// The gate of a text row, shared by the mix kernel and the attention's epilogue:
//   g = act(state . weight + bias) * factor(warm_up)
// Its parameters may be float32 while the state is half precision; everything is float32 once decoded.
#pragma once
#include "dtype.cuh"

namespace slowfast::cuda {

__device__ __forceinline__ uint32_t load_bits(const void* data, DType dtype, int64_t index) {
  return dtype == DType::kFloat32 ? __ldg(static_cast<const uint32_t*>(data) + index)
                                  : __ldg(static_cast<const uint16_t*>(data) + index);
}

__device__ __forceinline__ float decode(uint32_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return unpack2<__nv_bfloat16>(bits).x;
  if (dtype == DType::kFloat16) return unpack2<__half>(bits).x;
  return __uint_as_float(bits);
}

// Loaded apart from their use: a kernel issues these loads first and waits for them behind those of its first row.
struct GateScalars {
  uint32_t bias, warm_up;

  __device__ explicit GateScalars(const GateParams& p)
      : bias(load_bits(p.bias, p.dtype, 0)), warm_up(p.warm_up == nullptr ? 0 : load_bits(p.warm_up, p.dtype, 0)) {}
};

class Gate {
 public:
  __device__ Gate(const GateParams& p, const GateScalars& scalars)
      : bias_(decode(scalars.bias, p.dtype)), factor_(1.0f), tanh_(p.tanh_gate) {
    if (p.warm_up == nullptr) return;
    factor_ = decode(scalars.warm_up, p.dtype);
    if (p.tanh_warm_up) factor_ = tanhf(factor_);
  }

  // `dot` is state . weight of the row.
  __device__ __forceinline__ float operator()(float dot) const {
    const float x = dot + bias_;
    return (tanh_ ? tanhf(x) : x) * factor_;
  }

 private:
  float bias_, factor_;
  bool tanh_;
};

}  // namespace slowfast::cuda
