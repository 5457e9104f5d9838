// y = gain ⊙ z + bias with z = x Wᵀ + h Bᵀ, h from cuda_thin.cu. A block makes a tile of 128 tokens and 128 outputs, a warp 64
// by 32 of it; tiles of 64 columns of x and W come by cp.async. The adapter's product is taken after the loop over the
// columns, on the same float32 sums, so y is rounded once.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

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

constexpr int TOKENS = 128, OUTPUTS = 128, COLUMNS = 64, STAGES = 3, THREADS = 256, RANKS = 64;

using Sums = float[4][4][4];  // of a warp: 16 tokens, 8 outputs, a lane's four

// the row and the column of a tile: `group` rows take their turns side by side, in slabs of `slab` columns, 0 for all
__device__ inline void place(int64_t tile, int64_t down, int64_t across, int64_t group, int64_t slab, int64_t& row,
                             int64_t& column) {
  int64_t first = 0;
  if (slab > 0) {
    first = tile / (slab * down) * slab;
    tile %= slab * down;
    across = min(across - first, slab);
  }
  const int64_t at = tile / (group * across), inside = tile % (group * across), height = min(down - at * group, group);
  row = at * group + inside % height;
  column = first + inside / height;
}

// sums += 16 columns of the tokens' tile times those of the outputs'
template <typename T>
__device__ void multiply(Sums& sums, T* tokens, T* outputs, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp / 4 * 64, n = warp % 4 * 32;
  uint32_t f[4][4], g[2][4];
#pragma unroll
  for (int i = 0; i < 4; i++) ldmatrix_x4(f[i], piece(tokens, m + i * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < 2; j++) {
    ldmatrix_x4(g[j], piece(outputs, n + j * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) mma_m16n8k16<T>(sums[i][j], f[i], g[j / 2][j % 2 * 2], g[j / 2][j % 2 * 2 + 1]);
  }
}

// the tile of y, or of z, by way of shared memory
template <typename T>
__device__ void store(const LoRALinearTiles& p, T* memory, void* to, const Sums& sums, int64_t row, int64_t column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp / 4 * 64 + lane / 4, n = warp % 4 * 32;
  __syncthreads();  // what was there has been read
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      T* const half = memory + (n + j * 8) / 64 * TOKENS * COLUMNS;
#pragma unroll
      for (int l = 0; l < 2; l++) {
        using Two = typename Pair<T>::type;
        const Two two(rounded<T>(sums[i][j][2 * l]), rounded<T>(sums[i][j][2 * l + 1]));
        reinterpret_cast<Two*>(piece(half, m + i * 16 + l * 8, n % 64 / 8 + j))[lane % 4] = two;
      }
    }
  }
  __syncthreads();
  T* const out = static_cast<T*>(to);
  const auto from = [&](int r, int c) { return piece(memory + c / 8 * TOKENS * COLUMNS, r, c % 8); };
  if (p.n % 8 == 0) {
    for (int i = threadIdx.x; i < TOKENS * OUTPUTS / 8; i += THREADS) {
      const int r = i / 16, c = i % 16;
      if (row + r < p.m && column + c * 8 < p.n) {
        *reinterpret_cast<uint4*>(out + (row + r) * p.n + column + c * 8) = *reinterpret_cast<uint4*>(from(r, c));
      }
    }
  } else {
    for (int i = threadIdx.x; i < TOKENS * OUTPUTS; i += THREADS) {
      const int r = i / OUTPUTS, c = i % OUTPUTS;
      if (row + r < p.m && column + c < p.n) out[(row + r) * p.n + column + c] = from(r, c / 8)[c % 8];
    }
  }
}

template <typename T>
__device__ void adapter(const LoRALinearTiles& p, char* memory, Sums& sums, int64_t row, int64_t column) {
  // float16 has too few exponents for what a number leaves: both sides become two of bfloat16
  constexpr bool HALF = std::is_same<T, __half>::value;
  using B = __nv_bfloat16;
  B *const h_tile = reinterpret_cast<B*>(memory), *const h_rest = h_tile + TOKENS * RANKS;
  B *const b_tile = h_rest + TOKENS * RANKS, *const b_rest = HALF ? b_tile + OUTPUTS * RANKS : nullptr;
  for (int64_t rank = 0; rank < p.r; rank += RANKS) {
    const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
    __syncthreads();  // the tiles have been read
    split_tile<THREADS, OUTPUTS>(b_tile, b_rest, static_cast<const T*>(p.b), p.b_row, column, p.n, rank, p.r, steps);
    split_tile<THREADS, TOKENS>(h_tile, h_rest, p.h, p.r, row, p.m, rank, p.r, steps, p.parts, p.m * p.r);
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
  T* const memory = reinterpret_cast<T*>(shared);  // [STAGES][TOKENS + OUTPUTS][COLUMNS]
  const int64_t down = (p.m + TOKENS - 1) / TOKENS, across = (p.n + OUTPUTS - 1) / OUTPUTS;
  int64_t row, column;
  place(blockIdx.x, down, across, p.group, p.slab, row, column);
  row *= TOKENS, column *= OUTPUTS;
  const int steps = int((p.k + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step) {
    if (step < steps) {
      T* const stage = memory + step % STAGES * (TOKENS + OUTPUTS) * COLUMNS;
      const int64_t at = int64_t(step) * COLUMNS;
      copy_tile<THREADS, TOKENS>(stage, static_cast<const T*>(p.x), p.x_row, row, p.m, at, p.k);
      copy_tile<THREADS, OUTPUTS>(stage + TOKENS * COLUMNS, static_cast<const T*>(p.w), p.w_row, column, p.n, at, p.k);
    }
    cp_async_commit();
  };
  for (int step = 0; step < STAGES - 1; step++) load(step);
  Sums sums = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this stage are there, and the stage before it has been read
    load(step + STAGES - 1);
    T* const stage = memory + step % STAGES * (TOKENS + OUTPUTS) * COLUMNS;
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) multiply(sums, stage, stage + TOKENS * COLUMNS, i);
  }
  cp_async_wait<0>();
  griddepcontrol_wait();  // h is there
  adapter<T>(p, reinterpret_cast<char*>(memory), sums, row, column);
  if (p.whole && column == 0) {
    for (int64_t i = threadIdx.x; i < min(int64_t(TOKENS), p.m - row) * p.r; i += THREADS) {
      float sum = p.h[row * p.r + i];
      for (int64_t part = 1; part < p.parts; part++) sum += p.h[(part * p.m + row) * p.r + i];
      p.whole[row * p.r + i] = sum;
    }
  }
  if (p.z) store(p, memory, p.z, sums, row, column);
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
  store(p, memory, p.y, sums, row, column);
}

}  // namespace lk

#define LK_TILES(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 1) name(const __grid_constant__ lk::LoRALinearTiles p) { \
    lk::lora_linear_tiles<T>(p);                                                                                     \
  }
LK_TILES(lora_linear_tiles_bf16, __nv_bfloat16)
LK_TILES(lora_linear_tiles_f16, __half)

LK_TABLE(lora_linear_tiles, LoRALinearTiles, LK_KERNEL(lora_linear_tiles_bf16), LK_KERNEL(lora_linear_tiles_f16))
