// The CUDA functions of slowfast_kernels._C: integers from Python into the Params structs, nothing more.
// Pointers, strides and the stream arrive as Python ints; slowfast_kernels/cuda.py has made the device current. The
// GIL is released because a launch blocks when the stream's queue is full.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/launchers.h"
#include "cuda/cross_attention/launch.h"
#include "params.h"

namespace py = pybind11;

namespace slowfast {
namespace {

using Address = uintptr_t;  // 0 is nullptr

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

GateParams gate_params(Address weight, Address bias, Address warm_up, int dtype, bool tanh_gate, bool tanh_warm_up) {
  return {pointer(weight), pointer(bias), pointer(warm_up), static_cast<DType>(dtype), tanh_gate, tanh_warm_up};
}

void pool(Address frames, Address items, Address entries, Address slow, Address fast, int64_t frame_stride,
          int64_t token_stride, int64_t channels, int32_t grid_w, int32_t spatial_stride, int32_t num_items,
          int32_t max_cells_h, int32_t max_cells_w, float norm_eps, int dtype, Address stream) {
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
  cuda::pool(p, pointer(stream));
}

void gated_mix(Address state, Address context, Address text_rows, Address out, Address weight, Address bias,
               Address warm_up, int gate_dtype, bool tanh_gate, bool tanh_warm_up, int64_t rows, int64_t num_text,
               int64_t channels, int64_t state_row_stride, int64_t context_row_stride, int dtype, Address stream) {
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
  cuda::gated_mix(p, pointer(stream));
}

#ifdef SLOWFAST_WITH_SM90
void cross_attention(Address q, Address slow_kv, Address cu_slow, Address text_rows, Address cu_text, Address context,
                     Address lse, Address state, Address out, Address gate_weight, Address gate_bias, Address warm_up,
                     int gate_dtype, bool tanh_gate, bool tanh_warm_up, int64_t q_row_stride, int64_t q_head_stride,
                     int64_t kv_token_stride, int64_t kv_head_stride, int64_t kv_pair_stride, int64_t state_row_stride,
                     int64_t num_text, int64_t num_slow, int32_t batch, int32_t num_q_heads, int32_t num_kv_heads,
                     int32_t head_dim, float softmax_scale, int dtype, int32_t consumers, int32_t cluster_size,
                     int32_t num_groups, int32_t max_tiles, int32_t half_groups, bool paired_halves, bool kv_evict_first,
                     Address partial_out, Address partial_stats, Address partial_gates, Address counters,
                     Address stream) {
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
  p.gate = gate_params(gate_weight, gate_bias, warm_up, gate_dtype, tanh_gate, tanh_warm_up);
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
  p.num_splits = cluster_size * num_groups;
  p.softmax_scale = softmax_scale;
  p.dtype = static_cast<DType>(dtype);
  const cuda::SplitPlan plan = {consumers,
                                cluster_size,
                                num_groups,
                                max_tiles,
                                half_groups,
                                paired_halves,
                                kv_evict_first,
                                pointer<float>(partial_out),
                                pointer<float>(partial_stats),
                                pointer<float>(partial_gates),
                                pointer<int32_t>(counters),
                                0,
                                0};
  (head_dim == 64 ? cuda::cross_attention_sm90_d64 : cuda::cross_attention_sm90_d128)(p, plan, pointer(stream));
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
  m.def("cuda_pool", &pool, no_gil);
  m.def("cuda_gated_mix", &gated_mix, no_gil);
#ifdef SLOWFAST_WITH_SM90
  m.def("cuda_cross_attention", &cross_attention, no_gil);
#endif
}

}  // namespace slowfast
