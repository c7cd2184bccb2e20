// The gate of a text row, shared by the mix kernel and the attention's epilogue:
//   g = (act(state . weight + bias), 1 or the given value) * factor(warm_up)
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
      : bias(load(p.bias, p.dtype)), warm_up(load(p.warm_up, p.dtype)) {}

 private:
  static __device__ uint32_t load(const void* scalar, DType dtype) {
    return scalar == nullptr ? 0 : load_bits(scalar, dtype, 0);
  }
};

class Gate {
 public:
  __device__ Gate(const GateParams& p, const GateScalars& scalars)
      : bias_(decode(scalars.bias, p.dtype)), factor_(1.0f), value_(p.value), kind_(p.kind) {
    if (p.warm_up == nullptr) return;
    factor_ = decode(scalars.warm_up, p.dtype);
    if (p.tanh_warm_up) factor_ = tanhf(factor_);
  }

  // Of text row `text`; `dot` is state . weight of its row, where the kind has a weight.
  __device__ __forceinline__ float operator()(float dot, int64_t text) const { return activate(dot, text) * factor_; }

 private:
  __device__ __forceinline__ float activate(float dot, int64_t text) const {
    switch (kind_) {
      case GateKind::kTanh: return tanhf(dot + bias_);
      case GateKind::kLinear: return dot + bias_;
      case GateKind::kNone: return 1.0f;
      case GateKind::kGiven: return __ldg(value_ + text);
    }
    __trap();  // a kind that nobody taught this class
  }

  float bias_, factor_;
  const float* value_;
  GateKind kind_;
};

}  // namespace slowfast::cuda
