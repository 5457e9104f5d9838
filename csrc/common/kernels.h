// The kernels of the CUDA module, by name: each csrc/<op>/cuda*.cu ends with the table of its own.
#pragma once

namespace lk {

struct Kernel {
  const char* name;
  const void* function;
  int bytes;  // of its one parameter, a struct of pointers, 64-bit numbers and floats
};
struct Kernels {
  const Kernel* first;
  int count;
};

Kernels lora_linear_dx_kernels();
Kernels lora_linear_outer_kernels();
Kernels lora_linear_sides_kernels();
Kernels lora_linear_small_kernels();
Kernels lora_linear_sums_kernels();
Kernels lora_linear_thin_kernels();
Kernels lora_linear_tiles_kernels();
Kernels merge_kernels();
Kernels weight_norm_kernels();

}  // namespace lk

#define LK_KERNEL(name) {#name, reinterpret_cast<const void*>(name), int(sizeof(Parameter))}
#define LK_TABLE(file, Struct, ...)                                                                      \
  namespace lk {                                                                                         \
  using Parameter = Struct;                                                                              \
  static const Kernel file##_table[] = {__VA_ARGS__};                                                    \
  Kernels file##_kernels() { return {file##_table, int(sizeof file##_table / sizeof file##_table[0])}; } \
  }
