// Products in which at most 64 tokens are the narrow side: tiles of 64 rows of a matrix times x, by
// four warps of 16 rows each.
#pragma once
#include "tiles.cuh"

namespace lk {

constexpr int ROWS = 64, THREADS = 128;  // of a tile

// sums [16 rows of a tile][tokens] += tile · tokensᵀ over 16 of the tile's columns
template <typename T, int TOKENS, Swizzle SWIZZLE = Swizzle::EIGHT>
__device__ void multiply(float (&sums)[TOKENS / 8][4], T* tile, T* x_tile, int step, int tokens) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  uint32_t f[4];
  ldmatrix_x4(f, piece(tile, row, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j += 2) {
    if (j * 8 >= tokens) break;
    uint32_t g[4];
    ldmatrix_x4(g, piece<SWIZZLE>(x_tile, j * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    mma_m16n8k16<T>(sums[j], f, g[0], g[1]);
    mma_m16n8k16<T>(sums[j + 1], f, g[2], g[3]);
  }
}

}  // namespace lk
