// Types shared by the bindings and every kernel. No torch headers here or below.
#pragma once
#include <cstdint>

namespace lk {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A matrix or, with rows ignored, a vector. Strides are in elements; offsets are computed in 64
// bits.
struct View {
  void* data = nullptr;
  int64_t row = 0;
  int64_t col = 1;
  DType type = DType::f32;
};

// The mask of lora_kernels/ops/dropout.py. keep = 1 / (1 - p); active only if threshold > 0.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float keep = 1.f;
  bool active() const { return threshold > 0; }
};

}  // namespace lk
