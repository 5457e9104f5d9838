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

}  // namespace lk

#define LK_KERNEL_OF(name, Struct) {#name, reinterpret_cast<const void*>(name), int(sizeof(Struct))}
#define LK_KERNEL(name) LK_KERNEL_OF(name, Parameter)
#define LK_TABLE(file, Struct, ...)                                                                      \
  namespace lk {                                                                                         \
  using Parameter = Struct;                                                                              \
  static const Kernel file##_table[] = {__VA_ARGS__};                                                    \
  Kernels file##_kernels() { return {file##_table, int(sizeof file##_table / sizeof file##_table[0])}; } \
  }
