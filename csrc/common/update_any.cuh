// W + scale · B A of any rank and layout, 64 rows of it. B A is made on tensor cores from factors
// that were packed before: their numbers as bfloat16, and what those leave of them. W is read a
// number at a time, when its part of B A is complete.
#pragma once
#include "tiles.cuh"

namespace lk {

constexpr int ROWS = 64, COLUMNS = 128, RANKS = 32, THREADS = 128;
constexpr int HALF = RANKS * 64, B_TILE = ROWS * 64,
              STAGE = 4 * HALF + B_TILE;  // numbers of 64 columns of A, of B, of both

struct Factors {
  // [2, rank, a_row] [2, rows, b_row], in whole pieces with zeros beyond the matrix
  const __nv_bfloat16 *a, *b;
  int64_t a_row, b_row, rank;
  float scale;
};

// Walks over columns `begin` to `end` of the rows from `row` on: each(row, column, x) for each
// number x of it.
template <typename T, typename Each>
__device__ void update_mainloop_any(const Factors& p, const T* w, int64_t w_row, int64_t w_column, int64_t row,
                                    int64_t rows, int64_t begin, int64_t end, Each&& each) {
  using B = __nv_bfloat16;
  extern __shared__ uint4 memory[];
  // [2], of A twice [2][RANKS][64] and of B [ROWS][RANKS and RANKS]
  B* const stages = reinterpret_cast<B*>(memory);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  const int blocks = int((p.rank + RANKS - 1) / RANKS), turns = int((end - begin + COLUMNS - 1) / COLUMNS) * blocks;
  const auto load = [&](int turn) {
    if (turn < turns) {
      B* const stage = stages + turn % 2 * STAGE;
      const int64_t column = begin + int64_t(turn / blocks) * COLUMNS, rank = int64_t(turn % blocks) * RANKS;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        copy_tile<THREADS, RANKS>(stage + i * HALF, p.a + i / 2 * p.rank * p.a_row, p.a_row, rank, p.rank,
                                  column + i % 2 * 64, p.a_row);
      }
#pragma unroll
      for (int i = threadIdx.x; i < ROWS * 8; i += THREADS) {
        const int r = i / 8, c = i % 8;
        const bool inside = row + r < rows && rank + c % 4 * 8 < p.b_row;
        const B* const from = p.b + ((c / 4) * rows + row + r) * p.b_row + rank + c % 4 * 8;
        cp_async(piece(stage + 4 * HALF, r, c), inside ? from : p.b, inside ? PIECE : 0);
      }
    }
    cp_async_commit();
  };
  load(0);
  float sums[COLUMNS / 8][4] = {};
  // not `pipelined`: copies are issued before the wait, so that two turns are in flight in two
  // stages; the price is a second barrier
  int turn = 0;
  for (int64_t column = begin; column < end; column += COLUMNS) {
    for (int block = 0; block < blocks; block++, turn++) {
      load(turn + 1);
      cp_async_wait<1>();
      __syncthreads();  // all copies of this stage are there
      B *const a_tile = stages + turn % 2 * STAGE, *const b_tile = a_tile + 4 * HALF;
#pragma unroll
      for (int i = 0; i < RANKS / 16; i++) {
        uint32_t f[4], f_rest[4];
        ldmatrix_x4(f, piece(b_tile, first + lane % 16, 2 * i + lane / 16));
        ldmatrix_x4(f_rest, piece(b_tile, first + lane % 16, 4 + 2 * i + lane / 16));
#pragma unroll
        for (int c = 0; c < COLUMNS / 8; c += 2) {
          uint32_t g[4], g_rest[4];
          ldmatrix_x4_trans(g, piece(a_tile + c / 8 * HALF, i * 16 + lane % 16, c % 8 + lane / 16));
          ldmatrix_x4_trans(g_rest, piece(a_tile + (2 + c / 8) * HALF, i * 16 + lane % 16, c % 8 + lane / 16));
#pragma unroll
          for (int l = 0; l < 2; l++) {
            mma_m16n8k16<B>(sums[c + l], f, g[2 * l], g[2 * l + 1]);
            mma_m16n8k16<B>(sums[c + l], f_rest, g[2 * l], g[2 * l + 1]);
            mma_m16n8k16<B>(sums[c + l], f, g_rest[2 * l], g_rest[2 * l + 1]);
          }
        }
      }
      __syncthreads();  // this stage has been read
    }
    for_each_accumulator(sums, [&](int r, int c, float& sum) {
      const int64_t m = row + first + r, n = column + c;
      if (m < rows && n < end) each(m, n, to_float(w[m * w_row + n * w_column]) + p.scale * sum);
      sum = 0;
    });
  }
  cp_async_wait<0>();
}

}  // namespace lk
