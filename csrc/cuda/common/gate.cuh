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

__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t index, float x) {
  if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[index] = from_float<__half>(x);
  } else {
    static_cast<float*>(data)[index] = x;
  }
}

// Channels 8 * vector .. 8 * vector + 7 of a float32 weight.
__device__ __forceinline__ void load_floats(const void* weight, int vector, float (&w)[8]) {
  const float4* place = static_cast<const float4*>(weight) + 2 * vector;
  const float4 low = __ldg(place), high = __ldg(place + 1);
  w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
}

// Loaded apart from their use: a kernel issues these loads first and waits for them behind those of its first row.
struct GateScalars {
  uint32_t bias, warm_up;

  __device__ GateScalars(const GateParams& p, bool weighted)
      : bias(weighted ? load_bits(p.bias, p.dtype, 0) : 0),
        warm_up(p.warm_up == nullptr ? 0 : load_bits(p.warm_up, p.dtype, 0)) {}
};

static_assert(kNumGateKinds == 5, "a new kind of gate must be taught to activated() and slope(), or to plain()");

class Gate {
 public:
  __device__ Gate(const GateParams& p, const GateScalars& scalars)
      : bias_(decode(scalars.bias, p.dtype)), factor_(1.0f), value_(p.value), kind_(p.kind) {
    if (p.warm_up == nullptr) return;
    factor_ = decode(scalars.warm_up, p.dtype);
    if (p.tanh_warm_up) factor_ = tanhf(factor_);
  }

  // Of the kinds with a weight; `dot` is state . weight of the row. kTanh: it is known to be that kind, the released models'.
  template <bool kTanh = false>
  __device__ __forceinline__ float weighted(float dot) const {
    const float x = dot + bias_;
    return (kTanh ? tanhf(x) : activated(x)) * factor_;
  }
  // Of the others, for text row `text`.
  __device__ __forceinline__ float unweighted(int64_t text) const { return plain(text) * factor_; }

  // What the backward pass takes apart: a gate is its activation times the factor.
  __device__ __forceinline__ float activation(float dot) const { return activated(dot + bias_); }
  __device__ __forceinline__ float plain(int64_t text) const {
    return kind_ == GateKind::kGiven ? __ldg(value_ + text) : 1.0f;
  }
  __device__ __forceinline__ float factor() const { return factor_; }
  // Of the activation, by what it gave.
  __device__ __forceinline__ float slope(float act) const {
    if (kind_ == GateKind::kTanh) return 1.0f - act * act;
    if (kind_ == GateKind::kLinear) return 1.0f;
    return act * (1.0f - act);  // kSigmoid
  }

 private:
  __device__ __forceinline__ float activated(float x) const {
    if (kind_ == GateKind::kTanh) return tanhf(x);
    if (kind_ == GateKind::kLinear) return x;
    return __fdividef(1.0f, 1.0f + __expf(-x));  // kSigmoid; 0 where exp overflows
  }

  float bias_, factor_;
  const float* value_;
  GateKind kind_;
};

}  // namespace slowfast::cuda
