// From one read of u, dy of a layer: p = scale · u (gain ⊙ v), in parts by blocks of columns (P, with v = B); part[z] = uᵀ h (dB
// without gain) and the sums over rows of u and of u ⊙ times (of bias and gain), in parts by blocks of rows. What is null is
// left out. A block has 512 columns, or 256 with more ranks, and walks down its rows 64 at a time; u comes in tiles of 64 by
// 64 by cp.async. v with its gain, and h, in float32, count as two of bfloat16.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

namespace lk {

// n is a multiple of 8; rows of u and times begin at multiples of 16 bytes
struct LoRALinearSides {
  const void *u, *v, *times;                       // [m, n] [n, r] [m, n], bfloat16
  const float* h;                                  // [m, r]
  float *p, *part, *of_u, *of_uv;                  // [blocks of columns, m, r] [m / rows, n, r] [m / rows, n] twice
  Vector gain;                                     // [n]
  int64_t m, n, r, u_row, v_row, times_row, rows;  // rows of a part, a multiple of 64
  float scale;
};

constexpr int STEP = 64, COLUMNS = 64, WARPS = 4, THREADS = 32 * WARPS, TILE = STEP * COLUMNS;
using B = __nv_bfloat16;

// vᵀ with its gain, [chunks][RANK][64], and what bfloat16 leaves of it
template <int RANK, int CHUNKS>
__device__ void load_v(const LoRALinearSides& p, B* tile, B* rest, int64_t column, int64_t rank) {
  const bool aligned = (reinterpret_cast<uintptr_t>(p.v) | uintptr_t(p.v_row) * sizeof(B)) % PIECE == 0;
  for (int i = threadIdx.x; i < CHUNKS * COLUMNS * RANK / 8; i += THREADS) {
    const int n = i % (CHUNKS * COLUMNS), ranks = i / (CHUNKS * COLUMNS) * 8;
    const int64_t at = column + n, count = at < p.n ? p.r - rank - ranks : 0;
    float v[8];
    load_eight(v, static_cast<const B*>(p.v) + at * p.v_row + rank + ranks, count, aligned);
    const float gain = p.gain.data && at < p.n ? p.gain[at] : 1.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int where = n / COLUMNS * RANK + ranks + j;
      split(gain * v[j], piece(tile, where, n % COLUMNS / 8)[n % 8], piece(rest, where, n % COLUMNS / 8)[n % 8]);
    }
  }
}

__device__ inline float2 both(uint32_t pair) {
  B two[2];
  memcpy(two, &pair, sizeof pair);
  return make_float2(wide(two[0]), wide(two[1]));
}

// what a block sums while it walks down its rows, of each of its chunks of columns: a lane's part of it
template <int RANK, int CHUNKS>
struct Sums {
  float part[CHUNKS][RANK / 8][4] = {};
  float of_u[CHUNKS][2] = {}, of_uv[CHUNKS][2] = {};
};

// the warp's 16 rows of a tile of u times a chunk of v
template <int RANK>
__device__ void multiply_v(float (&sums)[RANK / 8][4], B* tile, B* v_tile) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int c = 0; c < COLUMNS / 16; c++) {
    uint32_t f[4], g[4];
    ldmatrix_x4(f, piece(tile, row, 2 * c + lane / 16));
#pragma unroll
    for (int t = 0; t < RANK / 16; t++) {
      ldmatrix_x4(g, piece(v_tile, t * 16 + lane / 16 * 8 + lane % 8, 2 * c + lane / 8 % 2));
      mma_m16n8k16<B>(sums[2 * t], f, g[0], g[1]);
      mma_m16n8k16<B>(sums[2 * t + 1], f, g[2], g[3]);
    }
  }
}

// the warp's 16 columns of a tile of u, transposed, times h; and their sums
template <int RANK, bool TIMES>
__device__ void multiply_h(float (&sums)[RANK / 8][4], float (&of_u)[2], float (&of_uv)[2], B* tile, B* times,
                           B* h_tile, B* h_rest, bool with_h) {
  const int lane = threadIdx.x % 32, at = threadIdx.x / 32 * 2 + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < STEP / 16; i++) {
    const int row = i * 16 + lane % 8 + lane / 16 * 8;
    uint32_t f[4], g[4];
    ldmatrix_x4_trans(f, piece(tile, row, at));
    if (with_h) {
#pragma unroll
      for (int t = 0; t < RANK / 16; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          ldmatrix_x4_trans(g, piece(half ? h_rest : h_tile, i * 16 + lane % 16, 2 * t + lane / 16));
          mma_m16n8k16<B>(sums[2 * t], f, g[0], g[1]);
          mma_m16n8k16<B>(sums[2 * t + 1], f, g[2], g[3]);
        }
      }
    }
    if (TIMES) ldmatrix_x4_trans(g, piece(times, row, at));
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 u = both(f[j]);
      of_u[j % 2] += u.x + u.y;
      if (TIMES) of_uv[j % 2] += u.x * both(g[j]).x + u.y * both(g[j]).y;
    }
  }
}

template <int RANK, int CHUNKS, bool TIMES>
__device__ void sides(const LoRALinearSides& p) {
  constexpr int STAGES = TIMES ? 2 : 4, STAGE = (TIMES ? 2 : 1) * TILE, V = CHUNKS * RANK * COLUMNS;
  extern __shared__ uint4 shared[];
  B* const stages = reinterpret_cast<B*>(shared);
  B *const v_tile = stages + STAGES * STAGE, *const v_rest = v_tile + V;
  B *const h_tile = v_rest + V, *const h_rest = h_tile + TILE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.x) * CHUNKS * COLUMNS, rank = int64_t(blockIdx.y) * RANK;
  const int64_t begin = int64_t(blockIdx.z) * p.rows, end = min(p.m, begin + p.rows);
  const int turns = int((end - begin + STEP - 1) / STEP) * CHUNKS;
  const auto load = [&](int turn) {
    if (turn < turns) {
      B* const stage = stages + turn % STAGES * STAGE;
      const int64_t row = begin + int64_t(turn / CHUNKS) * STEP, at = column + turn % CHUNKS * COLUMNS;
      copy_tile<THREADS, STEP>(stage, static_cast<const B*>(p.u), p.u_row, row, end, at, p.n);
      if (TIMES) copy_tile<THREADS, STEP>(stage + TILE, static_cast<const B*>(p.times), p.times_row, row, end, at, p.n);
    }
    cp_async_commit();
  };
  for (int turn = 0; turn < STAGES - 1; turn++) load(turn);
  if (p.p) load_v<RANK, CHUNKS>(p, v_tile, v_rest, column, rank);
  Sums<RANK, CHUNKS> sums;
  for (int64_t row = begin; row < end; row += STEP) {
    float of_v[RANK / 8][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int turn = int((row - begin) / STEP) * CHUNKS + chunk;
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // all copies of this stage are there, and the stage before it has been read
      load(turn + STAGES - 1);
      if (chunk == 0 && p.part) {
        split_tile<THREADS, STEP>(h_tile, h_rest, p.h, p.r, row, end, rank, min(p.r, rank + RANK), RANK / 16);
        __syncthreads();
      }
      B* const tile = stages + turn % STAGES * STAGE;
      if (p.p) {
        multiply_v<RANK>(of_v, tile, v_tile + chunk * RANK * COLUMNS);
        if (p.gain.data) multiply_v<RANK>(of_v, tile, v_rest + chunk * RANK * COLUMNS);
      }
      multiply_h<RANK, TIMES>(sums.part[chunk], sums.of_u[chunk], sums.of_uv[chunk], tile, tile + TILE, h_tile, h_rest,
                              p.part != nullptr);
    }
    if (!p.p) continue;
    each_sum(of_v, [&](int at, int column, float sum) {
      const int64_t m = row + warp * 16 + at, r = rank + column;
      if (m < end && r < p.r) p.p[(blockIdx.x * p.m + m) * p.r + r] = p.scale * sum;
    });
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int64_t first = column + chunk * COLUMNS + warp * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t n = first + half * 8, at = blockIdx.z * p.n + n;
      float of_u = sums.of_u[chunk][half], of_uv = sums.of_uv[chunk][half];
      for (int step = 1; step < 4; step *= 2) {
        of_u += __shfl_xor_sync(0xffffffffu, of_u, step);
        of_uv += __shfl_xor_sync(0xffffffffu, of_uv, step);
      }
      if (n < p.n && lane % 4 == 0 && blockIdx.y == 0) {
        if (p.of_u) p.of_u[at] = of_u;
        if (TIMES) p.of_uv[at] = of_uv;
      }
      if (!p.part || n >= p.n) continue;
#pragma unroll
      for (int j = 0; j < RANK / 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int64_t r = rank + j * 8 + lane % 4 * 2 + i;
          if (r < p.r) p.part[at * p.r + r] = sums.part[chunk][j][half * 2 + i];
        }
      }
    }
  }
}

}  // namespace lk

#define LK_SIDES(name, RANK, CHUNKS, TIMES)                                                                          \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 1) name(const __grid_constant__ lk::LoRALinearSides p) { \
    lk::sides<RANK, CHUNKS, TIMES>(p);                                                                               \
  }
LK_SIDES(lora_linear_sides_16, 16, 8, false)
LK_SIDES(lora_linear_sides_32, 32, 4, false)
LK_SIDES(lora_linear_sides_times_16, 16, 8, true)
LK_SIDES(lora_linear_sides_times_32, 32, 4, true)

LK_TABLE(lora_linear_sides, LoRALinearSides, LK_KERNEL(lora_linear_sides_16), LK_KERNEL(lora_linear_sides_32),
         LK_KERNEL(lora_linear_sides_times_16), LK_KERNEL(lora_linear_sides_times_32))
