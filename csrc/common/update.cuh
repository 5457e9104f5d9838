// W + scale · B A, 64 rows of it: tiles of 64 columns of W and A come by cp.async, and B A is made
// on tensor cores. A warp has 16 of the rows; their part of B stays in registers.
#pragma once
#include "pipeline.cuh"
#include "tiles.cuh"

namespace lk {

constexpr int ROWS = 64, COLUMNS = 64, STAGES = 3, THREADS = 128;

// the rows of a lane's numbers are the warp's first and lane / 4, and eight more
__device__ inline int first_row() { return threadIdx.x / 32 * 16; }

// Walks over columns `begin` to `end` of the rows from `row` on. each(pair, x, y, half): the two
// numbers x and y of the row 8 half further down, which W has at `pair` in its tile; after(tile,
// column) once the warp is through with a tile.
template <int RANK, typename T, typename P, typename Each, typename After>
__device__ void update_mainloop(const P& p, int64_t row, int64_t begin, int64_t end, Each&& each, After&& after) {
  const T *const w = static_cast<const T*>(p.w), *const a = static_cast<const T*>(p.a);
  extern __shared__ uint4 memory[];
  T* const ws = reinterpret_cast<T*>(memory);  // [STAGES][ROWS][COLUMNS]
  T* const as = ws + STAGES * ROWS * COLUMNS;  // [STAGES][RANK][COLUMNS]
  const int lane = threadIdx.x % 32, steps = int((end - begin + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step, int stage) {
    const int64_t column = begin + int64_t(step) * COLUMNS;
    copy_tile<THREADS, ROWS>(ws + stage * ROWS * COLUMNS, w, p.w_row, row, p.rows, column, end);
    copy_tile<THREADS, RANK>(as + stage * RANK * COLUMNS, a, p.a_row, 0, p.rank, column, end);
  };
  uint32_t bs[RANK / 16][4];
  const auto load_b = [&] {
    load_rows<RANK>(bs, static_cast<const T*>(p.b), p.b_row, row + first_row(), p.rows, p.rank);
  };
  pipelined<STAGES>(steps, load, load_b, [&](int step, int stage) {
    T *const w_tile = ws + stage * ROWS * COLUMNS, *const a_tile = as + stage * RANK * COLUMNS;
#pragma unroll
    for (int c = 0; c < COLUMNS / 8; c += 2) {
      float update[2][4] = {};
      multiply_rows<RANK>(update, bs, a_tile, c);
      for (int i = 0; i < 4; i++) {
        const int next = i / 2, half = i % 2;
        using Two = typename Pair<T>::type;
        Two* const pair = reinterpret_cast<Two*>(piece(w_tile, first_row() + lane / 4 + half * 8, c + next)) + lane % 4;
        const float2 v = widen(*pair);
        each(pair, v.x + p.scale * update[next][2 * half], v.y + p.scale * update[next][2 * half + 1], half);
      }
    }
    after(w_tile, begin + int64_t(step) * COLUMNS);
  });
}

}  // namespace lk
