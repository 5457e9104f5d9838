// out[n] = gain[n] (W[n] + scale · B[n] A) for 16-bit W, A, B: W is read once, B A is made on tensor cores a tile at a time,
// and the result is rounded once. A block has 64 rows, a warp 16 of them, and a part of the columns; tiles of 64 columns come
// by cp.async, and the result takes their place on its way out. Nobody else reads what a block writes: out may be W.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

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

constexpr int ROWS = 64, COLUMNS = 64, STAGES = 3, THREADS = 128;

template <typename T, int RANK>
__device__ void merge(const Merge& p) {
  const T *const w = static_cast<const T*>(p.w), *const a = static_cast<const T*>(p.a);
  T* const out = static_cast<T*>(p.out);
  extern __shared__ uint4 memory[];
  T* const ws = reinterpret_cast<T*>(memory);  // [STAGES][ROWS][COLUMNS]
  T* const as = ws + STAGES * ROWS * COLUMNS;  // [STAGES][RANK][COLUMNS]
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, mine = first + lane / 4;
  const int64_t row0 = int64_t(blockIdx.y) * ROWS, begin = int64_t(blockIdx.x) * p.part;
  const int64_t end = min(p.columns, begin + p.part);
  const int steps = int((end - begin + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step) {
    if (step < steps) {
      const int stage = step % STAGES;
      const int64_t column = begin + int64_t(step) * COLUMNS;
      copy_tile<THREADS, ROWS>(ws + stage * ROWS * COLUMNS, w, p.w_row, row0, p.rows, column, end);
      copy_tile<THREADS, RANK>(as + stage * RANK * COLUMNS, a, p.a_row, 0, p.rank, column, end);
    }
    cp_async_commit();
  };
  for (int step = 0; step < STAGES - 1; step++) load(step);
  uint32_t bs[RANK / 16][4];  // they stay
  load_rows<RANK>(bs, static_cast<const T*>(p.b), p.b_row, row0 + first, p.rows, p.rank);
  float gain[2];
  for (int i = 0; i < 2; i++) gain[i] = p.gain.data && row0 + mine + i * 8 < p.rows ? p.gain[row0 + mine + i * 8] : 1.f;
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
          using Two = typename Pair<T>::type;
          Two* const at = reinterpret_cast<Two*>(piece(w_tile, mine + i * 8, c + half)) + lane % 4;
          const float2 v = widen(*at);
          *at = Two(rounded<T>(gain[i] * (v.x + p.scale * update[half][2 * i])),
                    rounded<T>(gain[i] * (v.y + p.scale * update[half][2 * i + 1])));
        }
      }
    }
    __syncwarp();  // the warp's 16 rows are there
#pragma unroll
    for (int i = 0; i < 16 * 8 / 32; i++) {
      const int r = first + i * 4 + lane / 8, c = lane % 8;
      const int64_t column = begin + int64_t(step) * COLUMNS + c * 8;
      if (row0 + r < p.rows && column < end) {
        *reinterpret_cast<uint4*>(out + (row0 + r) * p.out_row +
                                  column) = *reinterpret_cast<uint4*>(piece(w_tile, r, c));
      }
    }
  }
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
