// DoRA's norm of the experts of a layer, by weight_norm's kernel.
#pragma once
#include "../expert_lora_linear/params.h"

namespace lk {

// norm[e, n] = ‖W[e] + scale · B[e] A[e]‖ of row n
struct ExpertNorm {
  Stack w, a, b;           // [out, in] by rows, [rank, in] [out, rank], any strides
  const float* w_squared;  // [experts, out], or null
  float* norm;             // [experts, out]
  float scale, max_condition;
  int64_t n_in, n_out, rank, experts;
  int threads;
  const Quantised* packed = nullptr;  // W of all experts, in the place of the numbers of w
};

}  // namespace lk
