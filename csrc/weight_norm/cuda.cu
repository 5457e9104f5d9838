// norm[n] = ‖W[n] + scale · B[n] A‖ for 16-bit W, A, B: W is read once, B A is made on tensor cores a tile at a time and
// the squares are summed in float32. A block has 64 rows, a warp 16 of them; tiles of 64 columns come by cp.async.
#include "../common/ptx.cuh"

namespace lk {

constexpr int ROWS = 64, COLUMNS = 64, STAGES = 3, THREADS = 128;

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using type = __half2;
};

// 8 numbers of a tile; exchanged so that 8 rows of one column lie in different banks
template <typename T>
__device__ T* piece(T* tile, int row, int column) {
  return tile + row * COLUMNS + (column ^ row % 8) * 8;
}

// `count` rows of m [rows, columns] from `row` on, 64 columns from `column` on; zeros beyond its edges
template <typename T, int COUNT>
__device__ void copy_tile(T* tile, const T* m, int64_t stride, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) {
  for (int part = 0; part < COUNT * COLUMNS / 8 / THREADS; part++) {
    const int i = part * THREADS + threadIdx.x, r = i / 8, c = i % 8;
    const bool inside = row + r < rows && column + c * 8 < columns;
    cp_async(piece(tile, r, c), inside ? m + (row + r) * stride + column + c * 8 : m, inside ? 16 : 0);
  }
}

template <typename T>
__device__ uint32_t pair_of(const T* m, bool first, bool second) {
  T values[2] = {first ? m[0] : T(0.f), second ? m[1] : T(0.f)};
  uint32_t bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}

// columns a multiple of 8; rows of w and a at multiples of 16 bytes
template <typename T, int RANK>
__device__ void weight_norm(const T* w, const T* a, const T* b, float* norm, int64_t rows, int64_t columns,
                            int64_t rank, int64_t w_row, int64_t a_row, int64_t b_row, float scale) {
  extern __shared__ uint4 memory[];
  T* const ws = reinterpret_cast<T*>(memory);                                  // [STAGES][ROWS][COLUMNS]
  T* const as = ws + STAGES * ROWS * COLUMNS;                                  // [STAGES][RANK][COLUMNS]
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;  // this lane's first row of the tile
  const int64_t row0 = int64_t(blockIdx.x) * ROWS;
  const int steps = int((columns + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step) {
    if (step < steps) {
      const int stage = step % STAGES;
      copy_tile<T, ROWS>(ws + stage * ROWS * COLUMNS, w, w_row, row0, rows, int64_t(step) * COLUMNS, columns);
      copy_tile<T, RANK>(as + stage * RANK * COLUMNS, a, a_row, 0, rank, int64_t(step) * COLUMNS, columns);
    }
    cp_async_commit();
  };
  for (int step = 0; step < STAGES - 1; step++) load(step);
  uint32_t bs[RANK / 16][4];  // rows of B as operands: they stay
  for (int t = 0; t < RANK / 16; t++) {
    for (int i = 0; i < 4; i++) {
      const int64_t row = row0 + mine + i % 2 * 8, j = t * 16 + i / 2 * 8 + lane % 4 * 2;
      bs[t][i] = pair_of(b + row * b_row + j, row < rows && j < rank, row < rows && j + 1 < rank);
    }
  }
  float squares[2] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this stage are there, and the stage before it has been read
    load(step + STAGES - 1);
    T *const w_tile = ws + step % STAGES * ROWS * COLUMNS, *const a_tile = as + step % STAGES * RANK * COLUMNS;
    for (int c = 0; c < COLUMNS / 8; c += 2) {
      float update[2][4] = {};
      for (int t = 0; t < RANK / 16; t++) {
        uint32_t f[4];
        ldmatrix_x4_trans(f, piece(a_tile, t * 16 + lane % 16, c + lane / 16));
        mma_m16n8k16<T>(update[0], bs[t], f[0], f[1]);
        mma_m16n8k16<T>(update[1], bs[t], f[2], f[3]);
      }
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 2; i++) {
          const T* at = piece(w_tile, mine + i * 8, c + half) + lane % 4 * 2;
          const float2 v = widen(*reinterpret_cast<const typename Pair<T>::type*>(at));
          const float x = v.x + scale * update[half][2 * i], y = v.y + scale * update[half][2 * i + 1];
          squares[i] += x * x + y * y;
        }
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    for (int step = 1; step < 4; step *= 2) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], step);
    const int64_t row = row0 + mine + i * 8;
    if (lane % 4 == 0 && row < rows) norm[row] = sqrtf(squares[i]);
  }
}

}  // namespace lk

#define LK_WEIGHT_NORM(name, T, RANK)                                                                    \
  extern "C" __global__ void __launch_bounds__(lk::THREADS)                                              \
      name(const T* w, const T* a, const T* b, float* norm, int64_t rows, int64_t columns, int64_t rank, \
           int64_t w_row, int64_t a_row, int64_t b_row, float scale) {                                   \
    lk::weight_norm<T, RANK>(w, a, b, norm, rows, columns, rank, w_row, a_row, b_row, scale);            \
  }
LK_WEIGHT_NORM(weight_norm_bf16_16, __nv_bfloat16, 16)
LK_WEIGHT_NORM(weight_norm_bf16_32, __nv_bfloat16, 32)
LK_WEIGHT_NORM(weight_norm_bf16_64, __nv_bfloat16, 64)
LK_WEIGHT_NORM(weight_norm_bf16_128, __nv_bfloat16, 128)
LK_WEIGHT_NORM(weight_norm_f16_16, __half, 16)
LK_WEIGHT_NORM(weight_norm_f16_32, __half, 32)
LK_WEIGHT_NORM(weight_norm_f16_64, __half, 64)
LK_WEIGHT_NORM(weight_norm_f16_128, __half, 128)
