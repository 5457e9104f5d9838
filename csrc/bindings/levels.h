// Every kernel of one instruction set, and the choice among the sets at run time.
#pragma once
#include "../gated_activation/params.h"
#include "../lora_linear/params.h"
#include "../multi_lora/params.h"
#include "../quantised/params.h"
#include "../weight_norm/params.h"
#if defined(LK_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lk {

struct Kernels {
  const char* level;
  void (*forward_small)(const ForwardSmall&);
  void (*shrink)(const Shrink&);
  void (*expand)(const Expand&);
  void (*outer)(const Outer&);
  void (*column_sums)(const ColumnSums&);
  void (*weight_norm)(const WeightNorm&);
  void (*row_norm_squared)(const RowNormSquared&);
  uint64_t (*checksum)(const Bytes*, int);
  void (*multi_lora)(const MultiLora&);
  void (*base_product)(const BaseProduct&);
  void (*dequantise)(const Dequantise&);
  void (*backward_small)(const BackwardSmall&);
  void (*gated_activation)(const GatedActivation&);
  void (*tiles)(const Tiles&) = nullptr;  // only with AVX512-BF16 or AMX
};

#define LK_DECLARE(level)                                                                               \
  namespace level {                                                                                     \
  void forward_small(const ForwardSmall&);                                                              \
  void backward_small(const BackwardSmall&);                                                            \
  void shrink(const Shrink&);                                                                           \
  void expand(const Expand&);                                                                           \
  void outer(const Outer&);                                                                             \
  void column_sums(const ColumnSums&);                                                                  \
  void weight_norm(const WeightNorm&);                                                                  \
  void row_norm_squared(const RowNormSquared&);                                                         \
  uint64_t checksum(const Bytes*, int);                                                                 \
  void multi_lora(const MultiLora&);                                                                    \
  void base_product(const BaseProduct&);                                                                \
  void dequantise(const Dequantise&);                                                                   \
  void gated_activation(const GatedActivation&);                                                        \
  constexpr Kernels kernels{#level,       forward_small, shrink,           expand,          outer,      \
                            column_sums,  weight_norm,   row_norm_squared, checksum,        multi_lora, \
                            base_product, dequantise,    backward_small,   gated_activation};           \
  }

LK_DECLARE(portable)
#if defined(LK_X86)
LK_DECLARE(avx2)
LK_DECLARE(avx512)
#endif
#if defined(LK_AVX512BF16)
namespace avx512bf16 {
void forward_small(const ForwardSmall&);
void tiles(const Tiles&);
inline const Kernels kernels = [] {
  Kernels all = avx512::kernels;
  all.level = "avx512bf16";
  all.forward_small = [](const ForwardSmall& p) {
    (p.w.type == DType::bf16 ? forward_small : avx512::forward_small)(p);
  };
  all.tiles = tiles;
  return all;
}();
}  // namespace avx512bf16
#endif
#if defined(LK_AMX)
namespace amx {
void tiles(const Tiles&);
inline const Kernels kernels = [] {
  Kernels all = avx512::kernels;
  all.level = "amx";
  all.tiles = tiles;
  return all;
}();
}  // namespace amx

// Linux hands the tiles' state only to a process that asks for it
inline bool tiles_allowed() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// the sets that this processor runs, the fastest last
constexpr int LEVELS = 5;
inline int supported(const Kernels* (&found)[LEVELS]) {
  int count = 0;
  found[count++] = &portable::kernels;
#if defined(LK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return count;
  }
  found[count++] = &avx2::kernels;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return count;
  }
  found[count++] = &avx512::kernels;
#if defined(LK_AVX512BF16)
  if (__builtin_cpu_supports("avx512bf16")) found[count++] = &avx512bf16::kernels;
#endif
#if defined(LK_AMX)
  if (__builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") && tiles_allowed())
    found[count++] = &amx::kernels;
#endif
#endif
  return count;
}

}  // namespace lk
