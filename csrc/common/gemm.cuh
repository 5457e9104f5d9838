// What the kernels share that make tiles of 128 rows and 128 columns by 256 threads, a warp 64 by
// 32 of it.
#pragma once
#include "tiles.cuh"

namespace lk {

constexpr int TILE = 128, COLUMNS = 64, STAGES = 3, THREADS = 256, RANKS = 64;

using Accumulators = float[4][4][4];  // of a warp: 16 rows, 8 columns, a lane's four

// the row and the column of a tile: `group` rows take their turns side by side, in slabs of `slab`
// columns, 0 for all
__device__ inline void swizzled_tile(int64_t tile, int64_t tile_rows, int64_t tile_columns, int64_t group, int64_t slab,
                                     int64_t& row, int64_t& column) {
  int64_t first = 0;
  if (slab > 0) {
    first = tile / (slab * tile_rows) * slab;
    tile %= slab * tile_rows;
    tile_columns = min(tile_columns - first, slab);
  }
  const int64_t at = tile / (group * tile_columns), inside = tile % (group * tile_columns),
                height = min(tile_rows - at * group, group);
  row = at * group + inside % height;
  column = first + inside / height;
}

// sums += 16 rows at a time times 8 columns
template <typename T>
__device__ void multiply_all(Accumulators& sums, const uint32_t (&f)[4][4], const uint32_t (&g)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) mma_m16n8k16<T>(sums[i][j], f[i], g[j / 2][j % 2 * 2], g[j / 2][j % 2 * 2 + 1]);
  }
}

// a tile of to [m, n], by way of shared memory
template <typename T>
__device__ void store(T* memory, void* to, int64_t m, int64_t n, const Accumulators& sums, int64_t row,
                      int64_t column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r0 = warp / 4 * 64 + lane / 4, c0 = warp % 4 * 32;
  __syncthreads();  // what was there has been read
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      T* const half = memory + (c0 + j * 8) / 64 * TILE * COLUMNS;
#pragma unroll
      for (int l = 0; l < 2; l++) {
        using Two = typename Pair<T>::type;
        const Two two(rounded<T>(sums[i][j][2 * l]), rounded<T>(sums[i][j][2 * l + 1]));
        reinterpret_cast<Two*>(piece(half, r0 + i * 16 + l * 8, c0 % 64 / 8 + j))[lane % 4] = two;
      }
    }
  }
  __syncthreads();
  T* const out = static_cast<T*>(to);
  const auto from = [&](int r, int c) { return piece(memory + c / 8 * TILE * COLUMNS, r, c % 8); };
  if (n % 8 == 0) {
    for (int i = threadIdx.x; i < TILE * TILE / 8; i += THREADS) {
      const int r = i / 16, c = i % 16;
      if (row + r < m && column + c * 8 < n) {
        *reinterpret_cast<uint4*>(out + (row + r) * n + column + c * 8) = *reinterpret_cast<uint4*>(from(r, c));
      }
    }
  } else {
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
      const int r = i / TILE, c = i % TILE;
      if (row + r < m && column + c < n) out[(row + r) * n + column + c] = from(r, c / 8)[c % 8];
    }
  }
}

}  // namespace lk
