// lora_kernels._cuda: launches the kernels of csrc/<op>/cuda.cu. CUDA's runtime is linked in; it looks for the driver at
// the first call, so that the module can be imported where there is none. Shapes and dtypes are the callers' to check.
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
Kernels lora_linear_dx_kernels();
Kernels lora_linear_dx_small_kernels();
Kernels lora_linear_expand_kernels();
Kernels lora_linear_outer_kernels();
Kernels lora_linear_sides_kernels();
Kernels lora_linear_small_kernels();
Kernels lora_linear_sums_kernels();
Kernels lora_linear_thin_kernels();
Kernels lora_linear_tiles_kernels();
Kernels merge_kernels();
Kernels merge_any_kernels();
Kernels multi_lora_any_kernels();
Kernels multi_lora_small_kernels();
Kernels weight_norm_kernels();
Kernels weight_norm_any_kernels();

std::vector<Kernel> all() {
  std::vector<Kernel> found;
  for (Kernels each : {lora_linear_dx_kernels(), lora_linear_dx_small_kernels(), lora_linear_expand_kernels(),
                       lora_linear_outer_kernels(), lora_linear_sides_kernels(), lora_linear_small_kernels(),
                       lora_linear_sums_kernels(), lora_linear_thin_kernels(), lora_linear_tiles_kernels(),
                       merge_kernels(), merge_any_kernels(), multi_lora_any_kernels(), multi_lora_small_kernels(),
                       weight_norm_kernels(), weight_norm_any_kernels()}) {
    found.insert(found.end(), each.first, each.first + each.count);
  }
  return found;
}
const std::vector<Kernel> kernels = all();

constexpr int MOST = 512;       // bytes of a kernel's struct
constexpr int FREE = 48 << 10;  // bytes of shared memory that need no leave

// The struct that a kernel takes: None is null, int a pointer or a number of 64 bits, float one of 32 bits.
struct Packed {
  alignas(16) unsigned char bytes[MOST] = {};
  int count = 0;

  explicit Packed(const py::tuple& fields) {
    for (py::handle field : fields) {
      if (PyFloat_Check(field.ptr())) {
        put(float(PyFloat_AS_DOUBLE(field.ptr())));
      } else if (field.is_none()) {
        put(int64_t(0));
      } else {
        put(int64_t(PyLong_AsLongLong(field.ptr())));
        if (PyErr_Occurred()) throw py::error_already_set();
      }
    }
    count = (count + 7) / 8 * 8;
  }

 private:
  template <typename T>
  void put(T value) {
    count = (count + int(sizeof value) - 1) / int(sizeof value) * int(sizeof value);
    if (count + int(sizeof value) > MOST) throw std::invalid_argument("at most 512 bytes of arguments");
    std::memcpy(bytes + count, &value, sizeof value);
    count += int(sizeof value);
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
  if (!error && shared > FREE) {
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
        "Launches kernels[name] with a struct of args: int for pointers and 64-bit numbers, float for 32-bit ones. "
        "early: it "
        "may start before the launch before it has ended, and waits for that itself.");
  // the work of launch() before the driver is asked, to time it where there is none
  m.def("pack", [](const py::tuple& args) { return lk::Packed(args).count; });
}
