// part[z] = pᵀ drop(u), the sum over the rows of part z: dA of p = P and u = x, without dropout's
// factor. u is read once. A block has 256 columns, a warp 64 of them; it walks down its rows 64 at
// a time. p, in float32, counts as two of bfloat16, and so does u of float16, which has registers
// for 32 ranks.
#include "../common/kernels.h"
#include "../common/philox.cuh"
#include "../common/tiles.cuh"

namespace lk {

// n is a multiple of 8 and rows of u begin at multiples of 16 bytes, but that the kernels `any`
// take every u
struct LoRALinearOuter {
  const void* u;   // [m, n]
  const float* p;  // [parts, m, r], whose sum counts
  float* part;     // [m / rows, r, n]
  float* whole;    // [m, r]: the sum of p's parts; or null
  Dropout dropout;
  int64_t m, n, r, parts, u_row, u_column, rows;  // rows of a part, a multiple of 64
};

constexpr int STEP = 64, COLUMNS = 64, WARPS = 4, THREADS = 32 * WARPS, TILE = STEP * COLUMNS;
using B = __nv_bfloat16;

// sums [RANK / 16][8] of 16 ranks and 8 columns += p_tileᵀ · the warp's tile of u, over 16 rows
template <typename T, int RANK, typename Load>
__device__ void multiply(float (&sums)[RANK / 16][8][4], B* p_tile, B* p_rest, int step, Load&& load) {
  const int lane = threadIdx.x % 32, row = step * 16 + lane % 8 + lane / 16 * 8;
  uint32_t f[RANK / 16][4], rest[RANK / 16][4];
#pragma unroll
  for (int t = 0; t < RANK / 16; t++) {
    ldmatrix_x4_trans(f[t], piece(p_tile, row, 2 * t + lane / 8 % 2));
    ldmatrix_x4_trans(rest[t], piece(p_rest, row, 2 * t + lane / 8 % 2));
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t g[4][2];  // of four tiles of 8 columns
    load(g, half);
#pragma unroll
    for (int t = 0; t < RANK / 16; t++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t u[2], low[2];
        split(g[j][0], u[0], low[0], T());
        split(g[j][1], u[1], low[1], T());
        mma_m16n8k16<B>(sums[t][half * 4 + j], f[t], u[0], u[1]);
        mma_m16n8k16<B>(sums[t][half * 4 + j], rest[t], u[0], u[1]);
        if (std::is_same<T, __half>::value) mma_m16n8k16<B>(sums[t][half * 4 + j], f[t], low[0], low[1]);
      }
    }
  }
}

// 16 rows and 32 columns of u as they lie
template <typename T>
__device__ void load_plain(uint32_t (&g)[4][2], T* tile, int step, int half) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    uint32_t four[4];
    ldmatrix_x4_trans(four, piece(tile, step * 16 + lane % 16, half * 4 + j + lane / 16));
    g[j][0] = four[0], g[j][1] = four[1], g[j + 1][0] = four[2], g[j + 1][1] = four[3];
  }
}

// The same of drop(u): a lane takes four neighbours of a row, which one call of Philox is for, and
// they go to four tiles. `row` and `column` are those of the tile in u.
template <typename T>
__device__ void load_masked(uint32_t (&g)[4][2], T* tile, int step, int half, uint64_t seed, uint32_t threshold,
                            int64_t row, int64_t column) {
  const int lane = threadIdx.x % 32, at = lane / 4;
  uint2 masked[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = step * 16 + lane % 4 * 2 + i % 2 + i / 2 * 8;
    const uint2 four = *reinterpret_cast<const uint2*>(piece(tile, r, half * 4 + at / 2) + at % 2 * 4);
    const uint4 words = philox(seed, uint32_t((column + half * 32) / 4 + at), uint64_t(row + r));
    masked[i].x = four.x & ((words.x >= threshold ? 0xffffu : 0) | (words.y >= threshold ? 0xffff0000u : 0));
    masked[i].y = four.y & ((words.z >= threshold ? 0xffffu : 0) | (words.w >= threshold ? 0xffff0000u : 0));
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    g[0][i] = __byte_perm(masked[2 * i].x, masked[2 * i + 1].x, 0x5410);
    g[1][i] = __byte_perm(masked[2 * i].x, masked[2 * i + 1].x, 0x7632);
    g[2][i] = __byte_perm(masked[2 * i].y, masked[2 * i + 1].y, 0x5410);
    g[3][i] = __byte_perm(masked[2 * i].y, masked[2 * i + 1].y, 0x7632);
  }
}

template <typename T, int RANK, bool DROPS, bool ANY>
__device__ void outer(const LoRALinearOuter& p) {
  extern __shared__ uint4 shared[];
  T* const stages = reinterpret_cast<T*>(shared);  // [2][WARPS] tiles of u
  B *const p_tile = reinterpret_cast<B*>(stages + 2 * WARPS * TILE), *const p_rest = p_tile + STEP * COLUMNS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.x) * WARPS * COLUMNS, rank = int64_t(blockIdx.y) * RANK;
  const int64_t begin = int64_t(blockIdx.z) * p.rows, end = min(p.m, begin + p.rows);
  const int steps = int((end - begin + STEP - 1) / STEP), ranks = int(min(p.r - rank + 15, int64_t(RANK)) / 16);
  const auto load = [&](int step) {
    if (step < steps) {
      for (int i = 0; i < WARPS; i++) {
        T* const tile = stages + (step % 2 * WARPS + i) * TILE;
        const T* const u = static_cast<const T*>(p.u);
        const int64_t row = begin + int64_t(step) * STEP, at = column + i * COLUMNS;
        if (ANY) copy_numbers<THREADS, STEP>(tile, u, p.u_row, p.u_column, row, end, at, p.n);
        else copy_tile<THREADS, STEP>(tile, u, p.u_row, row, end, at, p.n);
      }
    }
    cp_async_commit();
  };
  load(0);
  const uint64_t seed = DROPS ? uint64_t(p.dropout.at ? *p.dropout.at : p.dropout.seed) : 0;
  float sums[RANK / 16][8][4] = {};
  // not `pipelined`: copies are issued before the wait, and p is split between both, so that two
  // steps are in flight in two stages; the price is a second barrier
  for (int step = 0; step < steps; step++) {
    const int64_t row = begin + int64_t(step) * STEP;
    __syncthreads();  // the tiles of the step before have been read
    load(step + 1);
    split_tile<THREADS, STEP>(p_tile, p_rest, p.p, p.r, row, end, rank, p.r, RANK / 16, p.parts, p.m * p.r);
    cp_async_wait<1>();
    __syncthreads();  // this step's are there
    T* const tile = stages + (step % 2 * WARPS + warp) * TILE;
#pragma unroll(DROPS ? 1 : STEP / 16)  // a mask takes registers
    for (int i = 0; i < STEP / 16; i++) {
      multiply<T, RANK>(sums, p_tile, p_rest, i, [&](uint32_t (&g)[4][2], int half) {
        if constexpr (DROPS) {
          load_masked(g, tile, i, half, seed, uint32_t(p.dropout.threshold), row, column + warp * COLUMNS);
        } else {
          load_plain(g, tile, i, half);
        }
      });
    }
  }
#pragma unroll
  for (int t = 0; t < RANK / 16; t++) {
    if (t >= ranks) break;
    const auto put = [&](int i, int c, auto numbers) {
      const int64_t r = rank + t * 16 + lane / 4 + i / 2 * 8, n = column + warp * COLUMNS + c;
      if (r >= p.r || n >= p.n) return;
      float* const out = p.part + (blockIdx.z * p.r + r) * p.n + n;
      if (!ANY) {
        *reinterpret_cast<decltype(numbers)*>(out) = numbers;
      } else {
        for (int j = 0; j < int(sizeof numbers / 4) && n + j < p.n; j++) out[j] = (&numbers.x)[j];
      }
    };
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 8; j += DROPS ? 4 : 1) {
        const auto of = [&](int tile) { return sums[t][j + tile][i]; };
        if (DROPS) {  // the columns of four tiles are neighbours
          put(i, j * 8 + lane % 4 * 8 + i % 2 * 4, make_float4(of(0), of(1), of(2), of(3)));
        } else if (i % 2 == 0) {
          put(i, j * 8 + lane % 4 * 2, make_float2(sums[t][j][i], sums[t][j][i + 1]));
        }
      }
    }
  }
  if (p.whole && blockIdx.x == 0 && blockIdx.y == 0) {
    for (int64_t i = begin * p.r + threadIdx.x; i < end * p.r; i += THREADS) {
      float sum = p.p[i];
      for (int64_t part = 1; part < p.parts; part++) sum += p.p[part * p.m * p.r + i];
      p.whole[i] = sum;
    }
  }
}

}  // namespace lk

#define LK_OUTER(name, T, RANK, DROPS, ANY)                                                                          \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearOuter p) { \
    lk::outer<T, RANK, DROPS, ANY>(p);                                                                               \
  }
LK_OUTER(lora_linear_outer_bf16_16, __nv_bfloat16, 16, false, false)
LK_OUTER(lora_linear_outer_bf16_64, __nv_bfloat16, 64, false, false)
LK_OUTER(lora_linear_outer_drop_bf16_16, __nv_bfloat16, 16, true, false)
LK_OUTER(lora_linear_outer_drop_bf16_64, __nv_bfloat16, 64, true, false)
LK_OUTER(lora_linear_outer_any_bf16, __nv_bfloat16, 16, true, true)
LK_OUTER(lora_linear_outer_f16_16, __half, 16, false, false)
LK_OUTER(lora_linear_outer_f16_32, __half, 32, false, false)
LK_OUTER(lora_linear_outer_drop_f16_16, __half, 16, true, false)
LK_OUTER(lora_linear_outer_drop_f16_32, __half, 32, true, false)
LK_OUTER(lora_linear_outer_any_f16, __half, 16, true, true)

LK_TABLE(lora_linear_outer, LoRALinearOuter, LK_KERNEL(lora_linear_outer_bf16_16), LK_KERNEL(lora_linear_outer_bf16_64),
         LK_KERNEL(lora_linear_outer_drop_bf16_16), LK_KERNEL(lora_linear_outer_drop_bf16_64),
         LK_KERNEL(lora_linear_outer_any_bf16), LK_KERNEL(lora_linear_outer_f16_16),
         LK_KERNEL(lora_linear_outer_f16_32), LK_KERNEL(lora_linear_outer_drop_f16_16),
         LK_KERNEL(lora_linear_outer_drop_f16_32), LK_KERNEL(lora_linear_outer_any_f16))
