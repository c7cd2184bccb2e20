// The Python module slowfast_kernels._C. There is no torch here: a call's tensors and sizes arrive in one struct of
// params.h, so one build serves every torch. Python has validated and allocated; a call costs a microsecond.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "bindings.h"
#include "cpu/cpu.h"

namespace py = pybind11;

namespace slowfast {

void bind_calls(py::module_& m);  // csrc/bindings_calls.cpp
#ifdef SLOWFAST_WITH_CUDA
void bind_cuda(py::module_& m);   // csrc/bindings_cuda.cpp
#endif

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = SLOWFAST_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  py::list archs;
#ifdef SLOWFAST_WITH_CUDA
  info["has_cuda"] = true;
  info["nvcc"] = SLOWFAST_NVCC;
  info["cuda_left_out"] = "";
  info["cuda_runtime"] = SLOWFAST_CUDA_RUNTIME;
  std::istringstream codes(SLOWFAST_CUDA_CODE);
  for (std::string code; std::getline(codes, code, ',');) archs.append(code);
#else
  info["has_cuda"] = false;
  info["nvcc"] = "";
  info["cuda_left_out"] = SLOWFAST_CUDA_LEFT_OUT;
  info["cuda_runtime"] = 0;
#endif
  info["cuda_archs"] = archs;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of slowfast-kernels.";
  m.attr("build_info") = build_info();
  m.def("cpu_isa", &cpu::isa_name, "Instruction set that the CPU kernels run with.");
  py::dict sizes;  // that the mirrors in slowfast_kernels/params.py must have
  sizes["GateParams"] = sizeof(GateParams);
  sizes["CrossAttentionParams"] = sizeof(CrossAttentionParams);
  sizes["CrossAttentionBackwardParams"] = sizeof(CrossAttentionBackwardParams);
  sizes["GatedMixParams"] = sizeof(GatedMixParams);
  sizes["GatedMixBackwardParams"] = sizeof(GatedMixBackwardParams);
  sizes["MergeParams"] = sizeof(MergeParams);
  sizes["PoolParams"] = sizeof(PoolParams);
  sizes["PoolBackwardParams"] = sizeof(PoolBackwardParams);
  m.attr("struct_sizes") = sizes;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_cross_attention",
        [](Address params, int num_threads) { cpu::cross_attention(read_attention(params), num_threads); }, no_gil);
  m.def("cpu_attention_units", [](Address params, int num_threads) {
    return cpu::attention_units(read_attention(params), num_threads);
  });
  m.def("cpu_gated_mix", [](Address params, int num_threads) { cpu::gated_mix(read_gated_mix(params), num_threads); },
        no_gil);
  m.def("cpu_merge", [](Address params, int num_threads) { cpu::merge(read_merge(params), num_threads); }, no_gil);
  m.def("cpu_pool", [](Address params, int num_threads) { cpu::pool(read_pool(params), num_threads); }, no_gil);
  m.def("cpu_cross_attention_backward", [](Address params, int num_threads) {
    cpu::cross_attention_backward(read_attention_backward(params), num_threads);
  }, no_gil);
  m.def("cpu_gated_mix_backward", [](Address params, int num_threads) {
    cpu::gated_mix_backward(read_gated_mix_backward(params), num_threads);
  }, no_gil);
  m.def("cpu_pool_backward",
        [](Address params, int num_threads) { cpu::pool_backward(read_pool_backward(params), num_threads); }, no_gil);
  bind_calls(m);
#ifdef SLOWFAST_WITH_CUDA
  bind_cuda(m);
#endif
}

}  // namespace slowfast
