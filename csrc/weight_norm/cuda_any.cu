// norm[n] = ‖W[n] + scale · B[n] A‖, or its square, for 16-bit W, and A and B of any rank, type and
// layout.
#include "../common/kernels.h"
#include "../common/update_any.cuh"

namespace lk {

struct WeightNormAny {
  const void* w;  // [rows, columns]
  Factors factors;
  float* norm;  // [rows]
  int64_t rows, columns, w_row, w_column, squared;
};

template <typename T>
__device__ void weight_norm_any(const WeightNormAny& p) {
  const int64_t row0 = int64_t(blockIdx.x) * ROWS;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
  float squares[2] = {};
  update_mainloop_any(p.factors, static_cast<const T*>(p.w), p.w_row, p.w_column, row0, p.rows, 0, p.columns,
                      [&](int64_t row, int64_t, float x) {
                        const bool second = (row - row0) / 8 % 2;  // an index would put the two into memory
                        squares[0] += second ? 0.f : x * x;
                        squares[1] += second ? x * x : 0.f;
                      });
  for (int half = 0; half < 2; half++) {
    for (int step = 1; step < 4; step *= 2) squares[half] += __shfl_xor_sync(0xffffffffu, squares[half], step);
    const int64_t row = row0 + first + half * 8;
    if (lane % 4 == 0 && row < p.rows) p.norm[row] = p.squared ? squares[half] : sqrtf(squares[half]);
  }
}

}  // namespace lk

#define LK_NORM(name, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::WeightNormAny p) { \
    lk::weight_norm_any<T>(p);                                                                                     \
  }
LK_NORM(weight_norm_any_bf16, __nv_bfloat16)
LK_NORM(weight_norm_any_f16, __half)

LK_TABLE(weight_norm_any, WeightNormAny, LK_KERNEL(weight_norm_any_bf16), LK_KERNEL(weight_norm_any_f16))
