// dx = (dy ⊙ gain) W + drop(P A): a block makes a tile of 128 tokens and 128 inputs. dy ⊙ gain is
// rounded before its product with W. The adapter's product is taken after the loop over the
// outputs, on the same float32 sums, or where there is dropout on its own, which the mask takes.
#include "../common/gemm.cuh"
#include "../common/kernels.h"
#include "../common/philox.cuh"
#include "../common/pipeline.cuh"

namespace lk {

// n and k are multiples of 8; rows of dy, w and a begin at multiples of 16 bytes
struct LoRALinearDx {
  const void *dy, *w, *a;  // [m, n] [n, k] [r, k], bfloat16
  const float* p;          // [parts, m, r], whose sum counts
  void* dx;                // [m, k]
  Vector gain;             // [n]
  Dropout dropout;
  int64_t m, n, k, r, parts, dy_row, w_row, a_row;
  int64_t group, slab;  // the order of the tiles: ops/cost.py
  float inverse;        // of the share that dropout keeps
};

using B = __nv_bfloat16;
constexpr int HALF = COLUMNS * COLUMNS;  // numbers of 64 rows of 64 columns

// 16 rows of a tile of dy or P as operands
__device__ inline void load_rows(uint32_t (&f)[4][4], B* rows, int step) {
  const int lane = threadIdx.x % 32, m = threadIdx.x / 128 * 64;
#pragma unroll
  for (int i = 0; i < 4; i++) ldmatrix_x4(f[i], piece(rows, m + i * 16 + lane % 16, 2 * step + lane / 16));
}

// 16 rows of 128 columns of W or A, which lie as two tiles of 64
__device__ inline void load_columns(uint32_t (&g)[2][4], B* tiles, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    ldmatrix_x4_trans(g[j], piece(tiles + warp / 2 * HALF, step * 16 + lane % 16, warp % 2 * 4 + j * 2 + lane / 16));
  }
}

__device__ inline uint32_t scale_pair(uint32_t pair, float first, float second) {
  B two[2];
  memcpy(two, &pair, sizeof pair);
  two[0] = __float2bfloat16_rn(to_float(two[0]) * first), two[1] = __float2bfloat16_rn(to_float(two[1]) * second);
  memcpy(&pair, two, sizeof pair);
  return pair;
}

// f ⊙ gain of the outputs from `first` on
__device__ inline void scale_rows(const LoRALinearDx& p, uint32_t (&f)[4][4], int64_t first) {
  float gain[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t n = first + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
    gain[i] = n < p.n ? p.gain[n] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) f[i][j] = scale_pair(f[i][j], gain[j / 2 * 2], gain[j / 2 * 2 + 1]);
  }
}

__device__ inline void add_adapter(const LoRALinearDx& p, B* memory, Accumulators& sums, int64_t row, int64_t column) {
  B *const p_tile = memory, *const p_rest = p_tile + TILE * RANKS, *const a_tiles = p_rest + TILE * RANKS;
  for (int64_t rank = 0; rank < p.r; rank += RANKS) {
    const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
    __syncthreads();  // the tiles have been read
    for (int half = 0; half < 2; half++) {
      copy_tile<THREADS, RANKS>(a_tiles + half * HALF, static_cast<const B*>(p.a), p.a_row, rank, p.r,
                                column + half * COLUMNS, p.k);
    }
    cp_async_commit();
    split_tile<THREADS, TILE>(p_tile, p_rest, p.p, p.r, row, p.m, rank, p.r, steps, p.parts, p.m * p.r);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
      uint32_t f[4][4], g[2][4];
      load_columns(g, a_tiles, i);
      load_rows(f, p_tile, i);
      multiply_all<B>(sums, f, g);
      load_rows(f, p_rest, i);
      multiply_all<B>(sums, f, g);
    }
  }
}

// sums += mask ⊙ term. Two lanes look at four neighbours of two rows: each draws for one row and
// passes on what is not its own.
__device__ inline void add_masked(const LoRALinearDx& p, Accumulators& sums, const Accumulators& term, int64_t row,
                                  int64_t column) {
  const uint64_t seed = uint64_t(p.dropout.at ? *p.dropout.at : p.dropout.seed);
  const uint32_t threshold = uint32_t(p.dropout.threshold);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, odd = lane % 2;
  const int64_t m = row + warp / 4 * 64 + lane / 4, n = column + warp % 4 * 32 + lane % 4 / 2 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 words = philox(seed, uint32_t((n + j * 8) / 4), uint64_t(m + i * 16 + odd * 8));
      const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? words.x : words.z, 1);
      const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? words.y : words.w, 1);
      const uint32_t mine[4] = {odd ? first : words.x, odd ? second : words.y, odd ? words.z : first,
                                odd ? words.w : second};
#pragma unroll
      for (int l = 0; l < 4; l++) sums[i][j][l] += mine[l] >= threshold ? p.inverse * term[i][j][l] : 0.f;
    }
  }
}

template <bool GAIN, bool DROPS>
__device__ void input_gradient(const LoRALinearDx& p) {
  extern __shared__ uint4 shared[];
  // [STAGES], of dy [128][64] and of W twice [64][64]
  B* const memory = reinterpret_cast<B*>(shared);
  constexpr int STAGE = TILE * COLUMNS + 2 * HALF;
  int64_t row, column;
  swizzled_tile(blockIdx.x, (p.m + TILE - 1) / TILE, (p.k + TILE - 1) / TILE, p.group, p.slab, row, column);
  row *= TILE, column *= TILE;
  const int steps = int((p.n + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step, int stage) {
    B* const tile = memory + stage * STAGE;
    const int64_t at = int64_t(step) * COLUMNS;
    copy_tile<THREADS, TILE>(tile, static_cast<const B*>(p.dy), p.dy_row, row, p.m, at, p.n);
    for (int half = 0; half < 2; half++) {
      copy_tile<THREADS, COLUMNS>(tile + TILE * COLUMNS + half * HALF, static_cast<const B*>(p.w), p.w_row, at, p.n,
                                  column + half * COLUMNS, p.k);
    }
  };
  Accumulators sums = {};
  pipelined<STAGES>(steps, load, [&](int step, int stage) {
    B* const tile = memory + stage * STAGE;
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
      uint32_t f[4][4], g[2][4];
      load_rows(f, tile, i);
      load_columns(g, tile + TILE * COLUMNS, i);
      if (GAIN) scale_rows(p, f, int64_t(step) * COLUMNS + i * 16);
      multiply_all<B>(sums, f, g);
    }
  });
  if constexpr (DROPS) {
    Accumulators term = {};
    add_adapter(p, memory, term, row, column);
    add_masked(p, sums, term, row, column);
  } else {
    add_adapter(p, memory, sums, row, column);
  }
  store(memory, p.dx, p.m, p.k, sums, row, column);
}

}  // namespace lk

#define LK_DX(name, GAIN, DROPS)                                                                                  \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 1) name(const __grid_constant__ lk::LoRALinearDx p) { \
    lk::input_gradient<GAIN, DROPS>(p);                                                                           \
  }
LK_DX(lora_linear_dx, false, false)
LK_DX(lora_linear_dx_gain, true, false)
LK_DX(lora_linear_dx_drop, false, true)
LK_DX(lora_linear_dx_gain_drop, true, true)

LK_TABLE(lora_linear_dx, LoRALinearDx, LK_KERNEL(lora_linear_dx), LK_KERNEL(lora_linear_dx_gain),
         LK_KERNEL(lora_linear_dx_drop), LK_KERNEL(lora_linear_dx_gain_drop))
