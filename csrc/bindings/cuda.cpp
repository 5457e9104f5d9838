// lora_kernels._cuda: launches the kernels of csrc/<op>/cuda.cu. CUDA's runtime is linked in; it
// looks for the driver at the first call, so that the module can be imported where there is none.
// Shapes and dtypes are the callers' to check.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/kernels.h"

namespace py = pybind11;

namespace lk {

// the tables of csrc/<op>/cuda*.cu
Kernels lora_linear_codes_kernels();
Kernels lora_linear_dx_kernels();
Kernels lora_linear_dx_small_kernels();
Kernels lora_linear_expand_kernels();
Kernels lora_linear_outer_kernels();
Kernels lora_linear_sides_kernels();
Kernels lora_linear_small_kernels();
Kernels lora_linear_specialised_kernels();
Kernels lora_linear_sums_kernels();
Kernels lora_linear_thin_kernels();
Kernels lora_linear_tiles_kernels();
Kernels merge_kernels();
Kernels merge_any_kernels();
Kernels multi_lora_any_kernels();
Kernels multi_lora_small_kernels();
Kernels weight_norm_kernels();
Kernels weight_norm_any_kernels();

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> found;
  for (Kernels each :
       {lora_linear_codes_kernels(), lora_linear_dx_kernels(), lora_linear_dx_small_kernels(),
        lora_linear_expand_kernels(), lora_linear_outer_kernels(), lora_linear_sides_kernels(),
        lora_linear_small_kernels(), lora_linear_specialised_kernels(), lora_linear_sums_kernels(),
        lora_linear_thin_kernels(), lora_linear_tiles_kernels(), merge_kernels(), merge_any_kernels(),
        multi_lora_any_kernels(), multi_lora_small_kernels(), weight_norm_kernels(), weight_norm_any_kernels()}) {
    found.insert(found.end(), each.first, each.first + each.count);
  }
  return found;
}
const std::vector<Kernel> kernels = all_kernels();

constexpr int MAX_ARGUMENT_BYTES = 1024;        // bytes of a kernel's struct
constexpr int DEFAULT_SHARED_BYTES = 48 << 10;  // bytes of shared memory that need no leave

// A map of a matrix of 16 bits by rows, from which boxes are copied into rows of 128 bytes, their
// pieces exchanged
py::bytes tensor_map(uintptr_t data, bool bf16, uint64_t rows, uint64_t columns, uint64_t row, uint32_t box_rows,
                     uint32_t box_columns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static void* found = nullptr;  // of the driver, which is not linked
  if (!found) {
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, 0, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, 0, &result);
#endif
    if (error || !found) {
      found = nullptr;
      throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + cudaGetErrorName(error));
    }
  }
  const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {row * 2};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = reinterpret_cast<Encode>(found)(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, reinterpret_cast<void*>(data),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled of [" + std::to_string(rows) + ", " + std::to_string(columns) +
                             "], " + std::to_string(row) + " apart, by [" + std::to_string(box_rows) + ", " +
                             std::to_string(box_columns) + "]: error " + std::to_string(int(result)));
  }
  return py::bytes(reinterpret_cast<const char*>(&map), sizeof map);
}

// a tensor's address as it is now
uintptr_t address(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!found) {
    PyErr_Clear();
    throw py::type_error(std::string("launch: an argument is a tensor, a map, a number or None, found ") +
                         Py_TYPE(tensor)->tp_name);
  }
  return uintptr_t(PyLong_AsUnsignedLongLong(found.ptr()));
}

// The struct that a kernel takes: a tensor is its address, None null, int 64 bits, float 32 bits,
// bytes or (tensor, the other arguments of tensor_map) a map. Addresses are read here, in one go
// with the launch: another thread that replaces a tensor's storage must hold the interpreter's
// lock, and memory freed after a launch is given out again in the order of the stream.
struct Packed {
  alignas(64) unsigned char bytes[MAX_ARGUMENT_BYTES] = {};
  int count = 0;

  explicit Packed(const py::tuple& fields) {
    int widest = 8;
    for (py::handle field : fields) {
      if (PyBytes_Check(field.ptr())) {
        widest = put_map(field);
      } else if (PyFloat_Check(field.ptr())) {
        put(float(PyFloat_AS_DOUBLE(field.ptr())));
      } else if (field.is_none()) {
        put(int64_t(0));
      } else if (PyLong_Check(field.ptr())) {
        put(int64_t(PyLong_AsLongLong(field.ptr())));
        if (PyErr_Occurred()) throw py::error_already_set();
      } else if (PyTuple_CheckExact(field.ptr())) {
        const auto map = py::reinterpret_borrow<py::tuple>(field);
        if (map.size() != 7) throw py::type_error("launch: a map is a tuple of 7");
        widest = put_map(tensor_map(address(map[0].ptr()), map[1].cast<bool>(), map[2].cast<uint64_t>(),
                                    map[3].cast<uint64_t>(), map[4].cast<uint64_t>(), map[5].cast<uint32_t>(),
                                    map[6].cast<uint32_t>()));
      } else {
        put(int64_t(address(field.ptr())));
      }
    }
    count = (count + widest - 1) / widest * widest;
  }

 private:
  static constexpr int ALIGNMENT = 64;  // of a map

  // gives the alignment of the struct then
  int put_map(py::handle encoded) {
    put(PyBytes_AS_STRING(encoded.ptr()), int(PyBytes_GET_SIZE(encoded.ptr())), ALIGNMENT);
    return ALIGNMENT;
  }
  template <typename T>
  void put(T value) {
    put(&value, int(sizeof value), int(sizeof value));
  }
  void put(const void* value, int size, int alignment) {
    count = (count + alignment - 1) / alignment * alignment;
    if (count + size > MAX_ARGUMENT_BYTES) {
      throw std::invalid_argument("at most " + std::to_string(MAX_ARGUMENT_BYTES) + " bytes of arguments");
    }
    std::memcpy(bytes + count, value, size_t(size));
    count += size;
  }
};

void launch(int kernel, int x, int y, int z, int threads, int shared, bool early, int device, uintptr_t stream,
            const py::tuple& args) {
  if (kernel < 0 || kernel >= int(kernels.size())) {
    throw std::invalid_argument("there is no kernel " + std::to_string(kernel));
  }
  const Kernel& k = kernels[kernel];
  Packed packed(args);
  const auto described = [&] {
    return std::string(k.name) + " on cuda:" + std::to_string(device) + ", grid " + std::to_string(x) + "x" +
           std::to_string(y) + "x" + std::to_string(z) + ", " + std::to_string(threads) + " threads, " +
           std::to_string(shared) + " bytes of shared memory";
  };
  if (packed.count != k.bytes) {
    throw std::invalid_argument(described() + ": its struct has " + std::to_string(k.bytes) + " bytes, found " +
                                std::to_string(packed.count));
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(x, y, z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = early;
  void* places[] = {packed.bytes};
  int before = device;
  cudaError_t error = cudaGetDevice(&before);
  if (!error && before != device) error = cudaSetDevice(device);
  if (!error && shared > DEFAULT_SHARED_BYTES) {
    error = cudaFuncSetAttribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (!error) error = cudaLaunchKernelExC(&config, k.function, places);
  if (before != device) cudaSetDevice(before);
  if (error) {
    cudaGetLastError();  // or the next call would report it again
    throw std::runtime_error(described() + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace lk

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA C++ kernels; see lora_kernels.ops.launch.";
  py::dict names;
  for (size_t i = 0; i < lk::kernels.size(); i++) names[lk::kernels[i].name] = i;
  m.attr("kernels") = names;
  m.attr("ARCHITECTURES") = LK_ARCHITECTURES;  // as "80 86"
  m.attr("PTX") = LK_PTX;
  m.def("launch", &lk::launch, py::arg("kernel"), py::arg("x"), py::arg("y"), py::arg("z"), py::arg("threads"),
        py::arg("shared"), py::arg("early"), py::arg("device"), py::arg("stream"), py::arg("args"),
        "Launches kernels[name] with a struct of args: tensors or None for pointers, int for 64-bit numbers, float for "
        "32-bit ones, (tensor, and the other arguments of tensor_map) for maps. early: it may start before the launch "
        "before it has ended, and waits for that itself.");
  m.def("tensor_map", &lk::tensor_map, py::arg("data"), py::arg("bf16"), py::arg("rows"), py::arg("columns"),
        py::arg("row"), py::arg("box_rows"), py::arg("box_columns"),
        "A CUtensorMap of a matrix of 16 bits whose rows begin `row` numbers apart. Raises RuntimeError: the driver is "
        "not there or refuses it.");
  // the work of launch() before the driver is asked, to time it where there is none
  m.def("pack", [](const py::tuple& args) { return lk::Packed(args).count; });
}
