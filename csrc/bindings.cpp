// The Python module slowfast_kernels._C. There is no torch here: tensors arrive as addresses and int64 strides, so one
// build serves every torch. Python has validated and allocated; a call costs a microsecond or two.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "cpu/cpu.h"
#include "params.h"

namespace py = pybind11;

namespace slowfast {

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
  info["cuda_runtime"] = SLOWFAST_CUDA_RUNTIME;
  std::istringstream codes(SLOWFAST_CUDA_CODE);
  for (std::string code; std::getline(codes, code, ',');) archs.append(code);
#else
  info["has_cuda"] = false;
  info["nvcc"] = "";
  info["cuda_runtime"] = 0;
#endif
  info["cuda_archs"] = archs;
  return info;
}

using Address = uintptr_t;   // 0 is nullptr

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

GateParams gate_params(Address weight, Address bias, Address warm_up, int dtype, bool tanh_gate, bool tanh_warm_up) {
  return {pointer(weight), pointer(bias), pointer(warm_up), static_cast<DType>(dtype), tanh_gate, tanh_warm_up};
}

void cpu_cross_attention(Address q, Address slow_kv, Address cu_slow, Address text_rows, Address cu_text,
                         Address context, Address lse, Address state, Address out, Address weight, Address bias,
                         Address warm_up, int gate_dtype, bool tanh_gate, bool tanh_warm_up,
                         int64_t q_row_stride, int64_t q_head_stride,
                         int64_t kv_token_stride, int64_t kv_head_stride, int64_t kv_pair_stride,
                         int64_t state_row_stride, int64_t num_text, int64_t num_slow, int32_t batch,
                         int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim, int32_t num_splits,
                         float softmax_scale, int dtype, int num_threads) {
  CrossAttentionParams p;
  p.q = pointer(q);
  p.slow_kv = pointer(slow_kv);
  p.cu_slow = pointer<int32_t>(cu_slow);
  p.text_rows = pointer<int32_t>(text_rows);
  p.cu_text = pointer<int32_t>(cu_text);
  p.context = pointer(context);
  p.lse = pointer<float>(lse);
  p.state = pointer(state);
  p.out = pointer(out);
  p.gate = gate_params(weight, bias, warm_up, gate_dtype, tanh_gate, tanh_warm_up);
  p.q_row_stride = q_row_stride;
  p.q_head_stride = q_head_stride;
  p.kv_token_stride = kv_token_stride;
  p.kv_head_stride = kv_head_stride;
  p.kv_pair_stride = kv_pair_stride;
  p.state_row_stride = state_row_stride;
  p.num_text = num_text;
  p.num_slow = num_slow;
  p.batch = batch;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.num_splits = num_splits;
  p.softmax_scale = softmax_scale;
  p.dtype = static_cast<DType>(dtype);
  cpu::cross_attention(p, num_threads);
}

void cpu_gated_mix(Address state, Address context, Address text_rows, Address out, Address weight, Address bias,
                   Address warm_up, int gate_dtype, bool tanh_gate, bool tanh_warm_up, int64_t rows, int64_t num_text,
                   int64_t channels, int64_t state_row_stride, int64_t context_row_stride, int dtype, int num_threads) {
  GatedMixParams p;
  p.state = pointer(state);
  p.context = pointer(context);
  p.text_rows = pointer<int32_t>(text_rows);
  p.out = pointer(out);
  p.gate = gate_params(weight, bias, warm_up, gate_dtype, tanh_gate, tanh_warm_up);
  p.rows = rows;
  p.num_text = num_text;
  p.channels = channels;
  p.state_row_stride = state_row_stride;
  p.context_row_stride = context_row_stride;
  p.dtype = static_cast<DType>(dtype);
  cpu::gated_mix(p, num_threads);
}

void cpu_pool(Address frames, Address items, Address entries, Address slow, Address fast, int64_t frame_stride,
              int64_t token_stride, int64_t channels, int32_t grid_w, int32_t spatial_stride, int32_t num_items,
              int32_t max_cells_h, int32_t max_cells_w, float norm_eps, int dtype, int num_threads) {
  PoolParams p;
  p.frames = pointer(frames);
  p.items = pointer<int32_t>(items);
  p.entries = pointer<int32_t>(entries);
  p.slow = pointer(slow);
  p.fast = pointer(fast);
  p.frame_stride = frame_stride;
  p.token_stride = token_stride;
  p.channels = channels;
  p.grid_w = grid_w;
  p.spatial_stride = spatial_stride;
  p.num_items = num_items;
  p.max_cells_h = max_cells_h;
  p.max_cells_w = max_cells_w;
  p.norm_eps = norm_eps;
  p.dtype = static_cast<DType>(dtype);
  cpu::pool(p, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of slowfast-kernels.";
  m.attr("build_info") = build_info();
  m.def("cpu_isa", &cpu::isa_name, "Instruction set that the CPU kernels run with.");
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_cross_attention", &cpu_cross_attention, no_gil);
  m.def("cpu_gated_mix", &cpu_gated_mix, no_gil);
  m.def("cpu_pool", &cpu_pool, no_gil);
#ifdef SLOWFAST_WITH_CUDA
  bind_cuda(m);
#endif
}

}  // namespace slowfast
