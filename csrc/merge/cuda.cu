// out[n] = gain[n] (W[n] + scale · B[n] A) for 16-bit W, A, B: W is read once, B A is made on
// tensor cores a tile at a time, and the result is rounded once. A block has 64 rows, a warp 16 of
// them, and a part of the columns; tiles of 64 columns come by cp.async, and the result takes their
// place on its way out. Nobody else reads what a block writes: out may be W.
#include "../common/kernels.h"
#include "../common/update.cuh"

namespace lk {

// columns are a multiple of 8; rows of w, a and out begin at multiples of 16 bytes
struct Merge {
  const void *w, *a, *b;  // [rows, columns] [rank, columns] [rows, rank]
  void* out;              // [rows, columns]
  Vector gain;            // [rows]
  int64_t rows, columns, rank, w_row, a_row, b_row, out_row;
  int64_t part;  // columns of a block, a multiple of 64
  float scale;
};

template <typename T, int RANK>
__device__ void merge(const Merge& p) {
  T* const out = static_cast<T*>(p.out);
  const int lane = threadIdx.x % 32;
  const int64_t row0 = int64_t(blockIdx.y) * ROWS, begin = int64_t(blockIdx.x) * p.part;
  const int64_t end = min(p.columns, begin + p.part);
  float gain[2];
  for (int half = 0; half < 2; half++) {
    const int64_t row = row0 + first_row() + lane / 4 + half * 8;
    gain[half] = p.gain.data && row < p.rows ? p.gain[row] : 1.f;
  }
  using Two = typename Pair<T>::type;
  const auto put = [&](Two* pair, float x, float y, int half) {
    *pair = Two(rounded<T>(gain[half] * x), rounded<T>(gain[half] * y));
  };
  update_mainloop<RANK, T>(p, row0, begin, end, put, [&](T* tile, int64_t at) {
    __syncwarp();  // the warp's 16 rows are there
#pragma unroll
    for (int i = 0; i < 16 * 8 / 32; i++) {
      const int r = first_row() + i * 4 + lane / 8, c = lane % 8;
      const int64_t column = at + c * 8;
      if (row0 + r < p.rows && column < end) {
        *reinterpret_cast<uint4*>(out + (row0 + r) * p.out_row + column) = *reinterpret_cast<uint4*>(piece(tile, r, c));
      }
    }
  });
}

}  // namespace lk

#define LK_MERGE(name, T, RANK)                                                                         \
  extern "C" __global__ void __launch_bounds__(lk::THREADS) name(const __grid_constant__ lk::Merge p) { \
    lk::merge<T, RANK>(p);                                                                              \
  }
LK_MERGE(merge_bf16_16, __nv_bfloat16, 16)
LK_MERGE(merge_bf16_32, __nv_bfloat16, 32)
LK_MERGE(merge_bf16_64, __nv_bfloat16, 64)
LK_MERGE(merge_bf16_128, __nv_bfloat16, 128)
LK_MERGE(merge_f16_16, __half, 16)
LK_MERGE(merge_f16_32, __half, 32)
LK_MERGE(merge_f16_64, __half, 64)
LK_MERGE(merge_f16_128, __half, 128)

LK_TABLE(merge, Merge, LK_KERNEL(merge_bf16_16), LK_KERNEL(merge_bf16_32), LK_KERNEL(merge_bf16_64),
         LK_KERNEL(merge_bf16_128), LK_KERNEL(merge_f16_16), LK_KERNEL(merge_f16_32), LK_KERNEL(merge_f16_64),
         LK_KERNEL(merge_f16_128))
