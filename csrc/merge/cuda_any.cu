// out[n] = gain[n] (W[n] + scale · B[n] A) for 16-bit W, and A and B of any rank, type and layout.
// Whoever reads a number of W writes that of out: out may be W.
#include "../common/kernels.h"
#include "../common/update_any.cuh"

namespace lk {

struct MergeAny {
  const void* w;  // [rows, columns]
  Factors factors;
  void* out;    // [rows, columns]
  Vector gain;  // [rows]
  int64_t rows, columns, w_row, w_column, out_row, out_column;
  int64_t part;  // columns of a block, a multiple of 128
};

template <typename T>
__device__ void merge_any(const MergeAny& p) {
  const int64_t row0 = int64_t(blockIdx.y) * ROWS, begin = int64_t(blockIdx.x) * p.part;
  update_mainloop_any(p.factors, static_cast<const T*>(p.w), p.w_row, p.w_column, row0, p.rows, begin,
                      min(p.columns, begin + p.part), [&](int64_t row, int64_t column, float x) {
                        const float gain = p.gain.data ? p.gain[row] : 1.f;
                        static_cast<T*>(p.out)[row * p.out_row + column * p.out_column] = rounded<T>(gain * x);
                      });
}

}  // namespace lk

#define LK_MERGE(name, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::MergeAny p) { \
    lk::merge_any<T>(p);                                                                                      \
  }
LK_MERGE(merge_any_bf16, __nv_bfloat16)
LK_MERGE(merge_any_f16, __half)

LK_TABLE(merge_any, MergeAny, LK_KERNEL(merge_any_bf16), LK_KERNEL(merge_any_f16))
