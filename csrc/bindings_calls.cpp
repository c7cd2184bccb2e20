// The host's part of a call: what Python would ask of tensors one by one, in one pass over the tuple of them.
//
// `tensor_reader` finds a signature and addresses, `index_check` looks at index tensors of the CPU, and `kernel_call`
// fills a signature's Params structs with a call's addresses. Each makes a function that is kept; the GIL is held.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace slowfast {
namespace {

// ------------------------------------------------------------------------------------------------ tensor_reader

// Of DLPack 1 what is needed here, laid out as its header says (github.com/dmlc/dlpack, include/dlpack/dlpack.h:
// DLTensor, DLPackExchangeAPI). torch 2.10 and newer have the table as Tensor.__dlpack_c_exchange_api__.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;      // in elements
  uint64_t byte_offset;  // of the first element, behind data
};
static_assert(sizeof(DLTensor) == 48);

struct DLPackExchangeApi {
  uint32_t major, minor;
  void* older;
  void *allocator, *managed_from_tensor, *tensor_from_managed;
  int (*dltensor_from_tensor)(void* tensor, DLTensor* out);  // 0, or -1 with a Python error set
  void* current_stream;
};
static_assert(offsetof(DLPackExchangeApi, dltensor_from_tensor) == 40);

constexpr int32_t kCpu = 1, kCuda = 2, kRocm = 10;  // device types whose addresses are addresses

// A tensor of zeros without memory begins at its offset. Real memory may lie below this too: then it is asked.
constexpr uint64_t kFarFromZero = uint64_t{1} << 46;

struct TensorReader {
  DLPackExchangeApi api;
  py::object tensor_type, parameter_type, is_neg, is_zerotensor;

  bool asks(const py::object& question, PyObject* x) const {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(question.ptr(), &x, 1, nullptr));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }

  // Appends what tells tensors apart, and the address; false: for PyTorch, or for the checks in Python.
  bool read(PyObject* x, std::vector<int64_t>& facts, std::vector<uint64_t>& addresses) const {
    if (x == Py_None) {
      facts.push_back(-1);
      addresses.push_back(0);
      return true;
    }
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (type != tensor_type.ptr() && type != parameter_type.ptr()) return false;
    if (asks(is_neg, x)) return false;  // lets other threads run: before the tensor's arrays are looked at
    DLTensor found;
    if (api.dltensor_from_tensor(x, &found) != 0) {
      PyErr_Clear();
      return false;
    }
    if (found.device_type != kCpu && found.device_type != kCuda && found.device_type != kRocm) return false;
    const uint64_t begin = reinterpret_cast<uintptr_t>(found.data) + found.byte_offset;
    const int64_t aligned = begin == 0 ? 2 : begin % 16 == 0;
    const int64_t dtype = found.type_code | found.type_bits << 8 | int64_t{found.type_lanes} << 16;
    facts.push_back(int64_t{found.ndim} << 32 | dtype);
    facts.push_back(aligned << 48 | int64_t{found.device_type} << 32 | found.device_id);
    facts.insert(facts.end(), found.shape, found.shape + found.ndim);
    facts.insert(facts.end(), found.strides, found.strides + found.ndim);
    addresses.push_back(begin);
    return begin >= kFarFromZero || !asks(is_zerotensor, x);
  }

  py::object operator()(const py::tuple& tensors) const {
    std::vector<int64_t> facts;
    std::vector<uint64_t> addresses;
    facts.reserve(8 * tensors.size());
    addresses.reserve(tensors.size());
    for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
      if (!read(PyTuple_GET_ITEM(tensors.ptr(), i), facts, addresses)) return py::none();
    }
    const auto bytes = [](const auto& x) { return py::bytes(reinterpret_cast<const char*>(x.data()), 8 * x.size()); };
    return py::make_tuple(bytes(facts), bytes(addresses));
  }
};

py::object tensor_reader(const py::object& capsule, py::object tensor_type, py::object parameter_type) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return py::none();
  const auto& api = *static_cast<const DLPackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (api.major != 1 || api.dltensor_from_tensor == nullptr) return py::none();
  const py::object is_neg = tensor_type.attr("is_neg"), is_zerotensor = tensor_type.attr("_is_zerotensor");
  return py::cpp_function(TensorReader{api, std::move(tensor_type), std::move(parameter_type), is_neg, is_zerotensor});
}

// ----------------------------------------------------------------------------------------------- index_check

const int32_t* indices(uint64_t address) { return static_cast<const int32_t*>(pointer(address)); }

bool are_prefix_sums(const int32_t* x, int64_t count, int64_t total) {
  if (count < 1 || x[0] != 0 || x[count - 1] != total) return false;
  for (int64_t i = 1; i < count; ++i) {
    if (x[i] < x[i - 1]) return false;
  }
  return true;
}

bool are_pieces(const int32_t* x, int64_t count, int64_t total) {
  for (int64_t i = 0; i + 1 < count; i += 2) {
    if (x[i] < 0 || x[i] > x[i + 1] || x[i + 1] > total) return false;
  }
  return true;
}

// In ascending order, as rows of a text mostly are: distinct without a table of them.
bool are_ascending_rows(const int32_t* x, int64_t count, int64_t total) {
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] < 0 || x[i] >= total || (i > 0 && x[i] <= x[i - 1])) return false;
  }
  return true;
}

using IndexRule = std::tuple<std::string, size_t, int64_t, int64_t>;  // what they are, which address, count, total

struct IndexCheck {
  struct Rule {
    bool (*holds)(const int32_t*, int64_t, int64_t);
    size_t place;
    int64_t count, total;
  };
  std::vector<Rule> rules;

  explicit IndexCheck(const std::vector<IndexRule>& given) {
    for (const auto& [kind, place, count, total] : given) {
      if (kind == "prefix_sums") rules.push_back({are_prefix_sums, place, count, total});
      else if (kind == "pieces") rules.push_back({are_pieces, place, count, total});
      else if (kind == "rows") rules.push_back({are_ascending_rows, place, count, total});
      else throw std::invalid_argument("index_check: a kind of indices that this build does not know: " + kind);
    }
  }

  bool operator()(const py::bytes& addresses) const {
    const auto* begins = PyBytes_AS_STRING(addresses.ptr());
    const size_t num_places = PyBytes_GET_SIZE(addresses.ptr()) / 8;
    for (const Rule& rule : rules) {
      if (rule.place >= num_places) throw std::out_of_range("index_check: fewer addresses than it looks at");
      uint64_t address;
      std::memcpy(&address, begins + 8 * rule.place, 8);
      if (address == 0 && rule.count > 0) return false;
      if (!rule.holds(indices(address), rule.count, rule.total)) return false;
    }
    return true;
  }
};

// ----------------------------------------------------------------------------------------------- kernel_call

using GivenSlot = std::tuple<size_t, size_t, size_t, uint64_t>;  // which struct, offset, which address, bytes behind

// kernel(address of each struct, last) on a copy of the structs whose pointers are the call's.
struct KernelCall {
  static constexpr size_t kMostBytes = 1024, kMostStructs = 2, kAlign = 16;

  struct Slot {
    size_t offset, source;
    uint64_t behind;
  };

  py::object kernel;
  std::string block;           // the structs, one behind the other
  std::vector<size_t> begins;  // of each
  std::vector<Slot> slots;
  size_t num_found, num_made;  // addresses that a call is given as bytes, and as numbers

  KernelCall(py::object kernel, const std::vector<py::bytes>& structs, const std::vector<GivenSlot>& given,
             size_t num_found, size_t num_made)
      : kernel(std::move(kernel)), num_found(num_found), num_made(num_made) {
    for (const std::string x : structs) {
      begins.push_back(block.size());
      block += x;
      block.resize((block.size() + kAlign - 1) / kAlign * kAlign);
    }
    if (block.size() > kMostBytes || begins.size() > kMostStructs) throw std::length_error("kernel_call: too much");
    for (const auto& [which, offset, source, behind] : given) {
      if (offset > block.size() || begins.at(which) + offset + 8 > block.size() || source >= num_found + num_made) {
        throw std::out_of_range("kernel_call: a slot outside of its struct, or of no address");
      }
      slots.push_back({begins[which] + offset, source, behind});
    }
  }

  void operator()(const py::bytes& found, const py::args& made_and_last) const {
    const bool fits = static_cast<size_t>(PyBytes_GET_SIZE(found.ptr())) == 8 * num_found;
    if (!fits || made_and_last.size() != num_made + 1) {
      throw py::type_error("kernel_call: got another number of addresses than it was made for");
    }
    alignas(kAlign) char mine[kMostBytes];
    std::memcpy(mine, block.data(), block.size());
    for (const Slot& slot : slots) {
      uint64_t address;
      if (slot.source < num_found) {
        std::memcpy(&address, PyBytes_AS_STRING(found.ptr()) + 8 * slot.source, 8);
      } else {
        address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(made_and_last.ptr(), slot.source - num_found));
        if (PyErr_Occurred()) throw py::error_already_set();
      }
      if (address != 0) address += slot.behind;
      std::memcpy(mine + slot.offset, &address, 8);
    }
    py::object structs[kMostStructs];
    PyObject* arguments[kMostStructs + 1];
    for (size_t i = 0; i < begins.size(); ++i) {
      structs[i] = py::int_(reinterpret_cast<uintptr_t>(mine + begins[i]));
      arguments[i] = structs[i].ptr();
    }
    arguments[begins.size()] = PyTuple_GET_ITEM(made_and_last.ptr(), num_made);
    const auto done =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(kernel.ptr(), arguments, begins.size() + 1, nullptr));
    if (!done) throw py::error_already_set();
  }
};

}  // namespace

void bind_calls(py::module_& m) {
  m.def("tensor_reader", &tensor_reader,
        "Of DLPack's exchange table and the two exact types: a function that gives of a tuple of tensors a signature\n"
        "and addresses, both bytes, or None: PyTorch or the checks must see them. None: a table of another DLPack.");
  m.def("index_check", [](const std::vector<IndexRule>& rules) { return py::cpp_function(IndexCheck(rules)); },
        "A function of addresses: True if index tensors of the CPU are what the rules say; False: look closer.");
  m.def("kernel_call",
        [](py::object kernel, const std::vector<py::bytes>& structs, const std::vector<GivenSlot>& slots,
           size_t num_found, size_t num_made) {
          return py::cpp_function(KernelCall(std::move(kernel), structs, slots, num_found, num_made));
        },
        "A function of found addresses (bytes), made ones and a last argument that runs the kernel on filled structs.");
}

}  // namespace slowfast
