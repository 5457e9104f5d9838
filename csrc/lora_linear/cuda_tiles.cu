// y = gain ⊙ z + bias with z = x Wᵀ + h Bᵀ, h from cuda_thin.cu. A block makes a tile of 128 tokens
// and 128 outputs, a warp 64 by 32 of it; tiles of 64 columns of x and W come by cp.async. The
// adapter's product is taken after the loop over the columns, on the same float32 sums, so y is
// rounded once.
#include "../common/gemm.cuh"
#include "../common/kernels.h"
#include "../common/pipeline.cuh"

namespace lk {

// k is a multiple of 8; rows of x and w begin at multiples of 16 bytes
struct LoRALinearTiles {
  const void *x, *w, *b;  // [m, k] [n, k] [n, r]
  const float* h;         // [parts, m, r]
  void *y, *z;            // [m, n]; z may be null
  float* whole;           // [m, r]: the sum of h's parts; or null
  Vector bias, gain;      // [n]
  int64_t m, n, k, r, parts, x_row, w_row, b_row;
  int64_t group, slab;  // the order of the tiles: ops/cost.py
};

// sums += 16 columns of the tokens' tile times those of the outputs'
template <typename T>
__device__ void multiply(Accumulators& sums, T* tokens, T* outputs, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp / 4 * 64, n = warp % 4 * 32;
  uint32_t f[4][4], g[2][4];
#pragma unroll
  for (int i = 0; i < 4; i++) ldmatrix_x4(f[i], piece(tokens, m + i * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < 2; j++) {
    ldmatrix_x4(g[j], piece(outputs, n + j * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  }
  multiply_all<T>(sums, f, g);
}

template <typename T>
__device__ void add_adapter(const LoRALinearTiles& p, char* memory, Accumulators& sums, int64_t row, int64_t column) {
  // float16 has too few exponents for what a number leaves: both sides become two of bfloat16
  constexpr bool HALF = std::is_same<T, __half>::value;
  using B = __nv_bfloat16;
  B *const h_tile = reinterpret_cast<B*>(memory), *const h_rest = h_tile + TILE * RANKS;
  B *const b_tile = h_rest + TILE * RANKS, *const b_rest = HALF ? b_tile + TILE * RANKS : nullptr;
  for (int64_t rank = 0; rank < p.r; rank += RANKS) {
    const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
    __syncthreads();  // the tiles have been read
    split_tile<THREADS, TILE>(b_tile, b_rest, static_cast<const T*>(p.b), p.b_row, column, p.n, rank, p.r, steps);
    split_tile<THREADS, TILE>(h_tile, h_rest, p.h, p.r, row, p.m, rank, p.r, steps, p.parts, p.m * p.r);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
      multiply(sums, h_tile, b_tile, i);
      multiply(sums, h_rest, b_tile, i);
      if (HALF) multiply(sums, h_tile, b_rest, i);
    }
  }
}

template <typename T>
__device__ void lora_linear_tiles(const LoRALinearTiles& p) {
  extern __shared__ uint4 shared[];
  T* const memory = reinterpret_cast<T*>(shared);  // [STAGES][TILE + TILE][COLUMNS]
  const int64_t tile_rows = (p.m + TILE - 1) / TILE, tile_columns = (p.n + TILE - 1) / TILE;
  int64_t row, column;
  swizzled_tile(blockIdx.x, tile_rows, tile_columns, p.group, p.slab, row, column);
  row *= TILE, column *= TILE;
  const int steps = int((p.k + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step, int stage) {
    T *const x_tile = memory + stage * (TILE + TILE) * COLUMNS, *const w_tile = x_tile + TILE * COLUMNS;
    const int64_t at = int64_t(step) * COLUMNS;
    copy_tile<THREADS, TILE>(x_tile, static_cast<const T*>(p.x), p.x_row, row, p.m, at, p.k);
    copy_tile<THREADS, TILE>(w_tile, static_cast<const T*>(p.w), p.w_row, column, p.n, at, p.k);
  };
  Accumulators sums = {};
  pipelined<STAGES>(steps, load, [&](int, int stage) {
    T *const x_tile = memory + stage * (TILE + TILE) * COLUMNS, *const w_tile = x_tile + TILE * COLUMNS;
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) multiply(sums, x_tile, w_tile, i);
  });
  griddepcontrol_wait();  // h is there
  add_adapter<T>(p, reinterpret_cast<char*>(memory), sums, row, column);
  if (p.whole && column == 0) {
    for (int64_t i = threadIdx.x; i < min(int64_t(TILE), p.m - row) * p.r; i += THREADS) {
      float sum = p.h[row * p.r + i];
      for (int64_t part = 1; part < p.parts; part++) sum += p.h[(part * p.m + row) * p.r + i];
      p.whole[row * p.r + i] = sum;
    }
  }
  if (p.z) store(memory, p.z, p.m, p.n, sums, row, column);
  const int64_t mine = column + threadIdx.x / 32 % 4 * 32 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int l = 0; l < 2; l++) {
      const int64_t at = mine + j * 8 + l;
      const float gain = p.gain.data && at < p.n ? p.gain[at] : 1.f, bias = p.bias.data && at < p.n ? p.bias[at] : 0.f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sums[i][j][l] = gain * sums[i][j][l] + bias;
        sums[i][j][l + 2] = gain * sums[i][j][l + 2] + bias;
      }
    }
  }
  store(memory, p.y, p.m, p.n, sums, row, column);
}

}  // namespace lk

#define LK_TILES(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 1) name(const __grid_constant__ lk::LoRALinearTiles p) { \
    lk::lora_linear_tiles<T>(p);                                                                                     \
  }
LK_TILES(lora_linear_tiles_bf16, __nv_bfloat16)
LK_TILES(lora_linear_tiles_f16, __half)

LK_TABLE(lora_linear_tiles, LoRALinearTiles, LK_KERNEL(lora_linear_tiles_bf16), LK_KERNEL(lora_linear_tiles_f16))
