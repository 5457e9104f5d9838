// norm[n] = ‖W[n] + scale · B[n] A‖ for 16-bit W, A, B: W is read once, B A is made on tensor cores a tile at a time and
// the squares are summed in float32. A block has 64 rows, a warp 16 of them; tiles of 64 columns come by cp.async.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

namespace lk {

// columns are a multiple of 8; rows of w and a begin at multiples of 16 bytes
struct WeightNorm {
  const void *w, *a, *b;  // [rows, columns] [rank, columns] [rows, rank]
  float* norm;            // [rows]
  int64_t rows, columns, rank, w_row, a_row, b_row;
  float scale;
};

constexpr int ROWS = 64, COLUMNS = 64, STAGES = 3, THREADS = 128;

template <typename T, int RANK>
__device__ void weight_norm(const WeightNorm& p) {
  const T *const w = static_cast<const T*>(p.w), *const a = static_cast<const T*>(p.a);
  const T* const b = static_cast<const T*>(p.b);
  extern __shared__ uint4 memory[];
  T* const ws = reinterpret_cast<T*>(memory);                                  // [STAGES][ROWS][COLUMNS]
  T* const as = ws + STAGES * ROWS * COLUMNS;                                  // [STAGES][RANK][COLUMNS]
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;  // this lane's first row of the tile
  const int64_t row0 = int64_t(blockIdx.x) * ROWS;
  const int steps = int((p.columns + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step) {
    if (step < steps) {
      const int stage = step % STAGES;
      copy_tile<THREADS, ROWS>(ws + stage * ROWS * COLUMNS, w, p.w_row, row0, p.rows, int64_t(step) * COLUMNS,
                               p.columns);
      copy_tile<THREADS, RANK>(as + stage * RANK * COLUMNS, a, p.a_row, 0, p.rank, int64_t(step) * COLUMNS, p.columns);
    }
    cp_async_commit();
  };
  for (int step = 0; step < STAGES - 1; step++) load(step);
  uint32_t bs[RANK / 16][4];  // they stay
  load_rows<RANK>(bs, b, p.b_row, row0 + threadIdx.x / 32 * 16, p.rows, p.rank);
  float squares[2] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this stage are there, and the stage before it has been read
    load(step + STAGES - 1);
    T *const w_tile = ws + step % STAGES * ROWS * COLUMNS, *const a_tile = as + step % STAGES * RANK * COLUMNS;
#pragma unroll
    for (int c = 0; c < COLUMNS / 8; c += 2) {
      float update[2][4] = {};
      multiply_rows<RANK>(update, bs, a_tile, c);
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 2; i++) {
          const T* at = piece(w_tile, mine + i * 8, c + half) + lane % 4 * 2;
          const float2 v = widen(*reinterpret_cast<const typename Pair<T>::type*>(at));
          const float x = v.x + p.scale * update[half][2 * i], y = v.y + p.scale * update[half][2 * i + 1];
          squares[i] += x * x + y * y;
        }
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    for (int step = 1; step < 4; step *= 2) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], step);
    const int64_t row = row0 + mine + i * 8;
    if (lane % 4 == 0 && row < p.rows) p.norm[row] = sqrtf(squares[i]);
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
