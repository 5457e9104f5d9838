#pragma once
#include "../common/types.h"
#include "../quantised/params.h"

namespace lk {

// norm[n] = ‖W[n] + scale · B[n] A‖. w_squared is ‖W[n]‖² and products A Wᵀ, floats, where known,
// else no data.
struct WeightNorm {
  View w, a, b, w_squared, products;  // [out, in] [rank, in] [out, rank] [out] [rank, out]
  float* norm;                        // [out]
  float scale;
  float max_condition;  // rows whose terms cancel by more are summed directly
  int64_t n_in, n_out, rank;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

// squared[n] = ‖W[n]‖²
struct RowNormSquared {
  View w;
  float* squared;
  int64_t n_in, n_out;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

// a range of memory to take into a checksum
struct Bytes {
  const void* data;
  int64_t size;
};

}  // namespace lk
