// The CUDA functions of slowfast_kernels._C; bindings.h fills the Params structs.
// Pointers, strides and the stream arrive as Python ints; slowfast_kernels/cuda.py has made the device current. The
// GIL is released because a launch blocks when the stream's queue is full.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "cuda/common/check.h"
#include "cuda/common/launchers.h"
#include "cuda/cross_attention/launch.h"

namespace py = pybind11;

namespace slowfast {
namespace {

#ifdef SLOWFAST_WITH_SM90
void cross_attention(CrossAttentionParams& p, int32_t consumers, int32_t cluster_size, int32_t num_groups,
                     int32_t max_tiles, int32_t whole_units, int32_t long_blocks, bool kv_evict_first, Address partial_out,
                     Address partial_stats, Address partial_gates, Address counters, Address stream) {
  p.num_splits = cluster_size * num_groups;
  const cuda::SplitPlan plan = {consumers,
                                cluster_size,
                                num_groups,
                                max_tiles,
                                whole_units,
                                long_blocks,
                                kv_evict_first,
                                pointer<float>(partial_out),
                                pointer<float>(partial_stats),
                                pointer<float>(partial_gates),
                                pointer<int32_t>(counters),
                                0,
                                0,
                                0};
  switch (p.head_dim) {
    case 64: return cuda::cross_attention_sm90_d64(p, plan, pointer(stream));
    case 128: return cuda::cross_attention_sm90_d128(p, plan, pointer(stream));
  }
  throw std::invalid_argument("cross_attention: a head dimension that has no kernel");
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
  m.def("cuda_pool",
        pool_binding<Address>([](const PoolParams& p, Address stream) { cuda::pool(p, pointer(stream)); }), no_gil);
  m.def("cuda_gated_mix",
        gated_mix_binding<Address>([](const GatedMixParams& p, Address stream) { cuda::gated_mix(p, pointer(stream)); }),
        no_gil);
#ifdef SLOWFAST_WITH_SM90
  m.def("cuda_cross_attention",
        attention_binding<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, bool, Address, Address, Address, Address, Address>(
            &cross_attention),
        no_gil);
#endif
}

}  // namespace slowfast
