// The CUDA functions of slowfast_kernels._C; bindings.h reads the Params structs.
// Structs and the stream arrive as addresses; slowfast_kernels/cuda.py has made the device current. The GIL is released
// because a launch blocks when the stream's queue is full.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "cuda/common/check.h"
#include "cuda/common/launchers.h"
#include "cuda/cross_attention/backward.h"
#include "cuda/cross_attention/launch.h"

namespace py = pybind11;

namespace slowfast {
namespace {

#ifdef SLOWFAST_WITH_SM90
void cross_attention(Address params, Address plan, Address stream) {
  const auto& split = *static_cast<const cuda::SplitPlan*>(pointer(plan));
  CrossAttentionParams p = read_attention(params);
  if (split.gates_first) p = cuda::form_gates(p, split, pointer(stream));
  switch (p.head_dim) {
    case 64: return cuda::cross_attention_sm90_d64(p, split, pointer(stream));
    case 128: return cuda::cross_attention_sm90_d128(p, split, pointer(stream));
  }
  throw std::invalid_argument("cross_attention: a head dimension that has no kernel");
}

void cross_attention_backward(Address params, Address plan, Address stream) {
  const CrossAttentionBackwardParams& p = read_attention_backward(params);
  const auto& cut = *static_cast<const cuda::BackwardPlan*>(pointer(plan));
  switch (p.forward.head_dim) {
    case 64: return cuda::cross_attention_backward_sm90_d64(p, cut, pointer(stream));
    case 128: return cuda::cross_attention_backward_sm90_d128(p, cut, pointer(stream));
  }
  throw std::invalid_argument("cross_attention_backward: a head dimension that has no kernel");
}
#endif

int driver_version() {
  int version = 0;
  cuda::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace

// One m.def a launcher.
void bind_cuda(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_driver_version", &driver_version, "Newest CUDA version of the driver as 1000 * major + 10 * minor; 0: none.");
  m.def("cuda_pool", [](Address params, Address stream) { cuda::pool(read_pool(params), pointer(stream)); }, no_gil);
  m.def("cuda_gated_mix",
        [](Address params, Address stream) { cuda::gated_mix(read_gated_mix(params), pointer(stream)); }, no_gil);
  m.def("cuda_gated_mix_backward", [](Address params, Address stream) {
    cuda::gated_mix_backward(read_gated_mix_backward(params), pointer(stream));
  }, no_gil);
  m.def("cuda_pool_backward", [](Address params, Address stream) {
    cuda::pool_backward(read_pool_backward(params), pointer(stream));
  }, no_gil);
  m.def("cuda_merge", [](Address params, Address stream) { cuda::merge(read_merge(params), pointer(stream)); }, no_gil);
#ifdef SLOWFAST_WITH_SM90
  m.attr("struct_sizes")["SplitPlan"] = sizeof(cuda::SplitPlan);
  m.attr("struct_sizes")["BackwardPlan"] = sizeof(cuda::BackwardPlan);
  m.def("cuda_cross_attention", &cross_attention, no_gil);
  m.def("cuda_cross_attention_backward", &cross_attention_backward, no_gil);
#endif
}

}  // namespace slowfast
