// norm[n] = ‖W[n] + scale · B[n] A‖ for 16-bit W, A, B: W is read once, B A is made on tensor cores
// a tile at a time and the squares are summed in float32. A block has 64 rows, a warp 16 of them;
// tiles of 64 columns come by cp.async.
#include "../common/kernels.h"
#include "../common/update.cuh"

namespace lk {

// columns are a multiple of 8; rows of w and a begin at multiples of 16 bytes
struct WeightNorm {
  const void *w, *a, *b;  // [rows, columns] [rank, columns] [rows, rank]
  float* norm;            // [rows]
  int64_t rows, columns, rank, w_row, a_row, b_row;
  float scale;
};

template <typename T, int RANK>
__device__ void weight_norm(const WeightNorm& p) {
  const int64_t row0 = int64_t(blockIdx.x) * ROWS;
  float squares[2] = {};
  const auto add = [&](const void*, float x, float y, int half) { squares[half] += x * x + y * y; };
  update_mainloop<RANK, T>(p, row0, 0, p.columns, add, [](T*, int64_t) {});
  const int lane = threadIdx.x % 32;
  for (int half = 0; half < 2; half++) {
    for (int step = 1; step < 4; step *= 2) squares[half] += __shfl_xor_sync(0xffffffffu, squares[half], step);
    const int64_t row = row0 + first_row() + lane / 4 + half * 8;
    if (lane % 4 == 0 && row < p.rows) p.norm[row] = sqrtf(squares[half]);
  }
}

}  // namespace lk

#define LK_WEIGHT_NORM(name, T, RANK)                                                                        \
  extern "C" __global__ void __launch_bounds__(lk::THREADS) name(const __grid_constant__ lk::WeightNorm p) { \
    lk::weight_norm<T, RANK>(p);                                                                             \
  }
LK_WEIGHT_NORM(weight_norm_bf16_16, __nv_bfloat16, 16)
LK_WEIGHT_NORM(weight_norm_bf16_32, __nv_bfloat16, 32)
LK_WEIGHT_NORM(weight_norm_bf16_64, __nv_bfloat16, 64)
LK_WEIGHT_NORM(weight_norm_bf16_128, __nv_bfloat16, 128)
LK_WEIGHT_NORM(weight_norm_f16_16, __half, 16)
LK_WEIGHT_NORM(weight_norm_f16_32, __half, 32)
LK_WEIGHT_NORM(weight_norm_f16_64, __half, 64)
LK_WEIGHT_NORM(weight_norm_f16_128, __half, 128)

LK_TABLE(weight_norm, WeightNorm, LK_KERNEL(weight_norm_bf16_16), LK_KERNEL(weight_norm_bf16_32),
         LK_KERNEL(weight_norm_bf16_64), LK_KERNEL(weight_norm_bf16_128), LK_KERNEL(weight_norm_f16_16),
         LK_KERNEL(weight_norm_f16_32), LK_KERNEL(weight_norm_f16_64), LK_KERNEL(weight_norm_f16_128))
