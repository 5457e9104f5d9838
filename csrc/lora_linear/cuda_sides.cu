// From one read of u, dy of a layer: p = scale · u (gain ⊙ v), in parts by blocks of columns (P,
// with v = B); part[z] = uᵀ h (dB without gain) and the sums over rows of u and of u ⊙ times (of
// bias and gain), in parts by blocks of rows; and u ⊙ (gain - less). What is null is left out. A
// block has 512 columns, or 256 with more ranks, and walks down its rows 64 at a time; u comes in
// tiles of 64 by 64 by cp.async. v with its gain, and h, in float32, count as two of bfloat16, and
// so does u of float16.
#include "../common/kernels.h"
#include "../common/pipeline.cuh"
#include "../common/tiles.cuh"

namespace lk {

// n is a multiple of 8 and rows of u and times begin at multiples of 16 bytes, but that the kernels
// `any` take every u and times
struct LoRALinearSides {
  const void *u, *times;           // [m, n] twice
  const float* h;                  // [m, r]
  float *p, *part, *of_u, *of_uv;  // [blocks of columns, m, r] [m / rows, n, r] [m / rows, n] twice
  void* scaled;                    // [m, n], zeros beyond it
  Matrix v;                        // [n, r]
  Vector gain;                     // [n]
  // rows of a part, a multiple of 64
  int64_t m, n, r, u_row, u_column, times_row, times_column, scaled_row, rows;
  float scale, less;
};

constexpr int STEP = 64, COLUMNS = 64, WARPS = 4, THREADS = 32 * WARPS, TILE = STEP * COLUMNS;
using B = __nv_bfloat16;

// vᵀ with its gain, [chunks][RANK][64], and what bfloat16 leaves of it
template <int RANK, int CHUNKS>
__device__ void load_v(const LoRALinearSides& p, B* tile, B* rest, int64_t column, int64_t rank) {
  for (int i = threadIdx.x; i < CHUNKS * COLUMNS * RANK / 8; i += THREADS) {
    const int n = i % (CHUNKS * COLUMNS), ranks = i / (CHUNKS * COLUMNS) * 8;
    const int64_t at = column + n, count = at < p.n ? p.r - rank - ranks : 0;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = j < count ? p.v(at, rank + ranks + j) : 0.f;
    const float gain = p.gain.data && at < p.n ? p.gain[at] : 1.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int where = n / COLUMNS * RANK + ranks + j;
      split(gain * v[j], piece(tile, where, n % COLUMNS / 8)[n % 8], piece(rest, where, n % COLUMNS / 8)[n % 8]);
    }
  }
}

template <typename T>
__device__ float2 unpack_pair(uint32_t pair) {
  T two[2];
  memcpy(two, &pair, sizeof pair);
  return make_float2(to_float(two[0]), to_float(two[1]));
}

// what a block sums while it walks down its rows, of each of its chunks of columns: a lane's part
// of it
template <int RANK, int CHUNKS>
struct Accumulators {
  float part[CHUNKS][RANK / 8][4] = {};
  float of_u[CHUNKS][2] = {}, of_uv[CHUNKS][2] = {};
};

// the warp's 16 rows of a tile of u times a chunk of v, and with `split` what bfloat16 leaves of
// that
template <int RANK, typename T>
__device__ void multiply_v(float (&sums)[RANK / 8][4], T* tile, B* v_tile, B* v_rest, bool splits) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int c = 0; c < COLUMNS / 16; c++) {
    uint32_t f[4], low[4], g[4], rest[4];
    ldmatrix_x4(f, piece(tile, row, 2 * c + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; i++) split(f[i], f[i], low[i], T());
#pragma unroll
    for (int t = 0; t < RANK / 16; t++) {
      const int at = t * 16 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(g, piece(v_tile, at, 2 * c + lane / 8 % 2));
      if (splits) {
        ldmatrix_x4(rest, piece(v_rest, at, 2 * c + lane / 8 % 2));
        mma_split<T>(sums[2 * t], f, low, g[0], g[1], rest[0], rest[1]);
        mma_split<T>(sums[2 * t + 1], f, low, g[2], g[3], rest[2], rest[3]);
      } else {
        mma_m16n8k16<B>(sums[2 * t], f, g[0], g[1]);
        mma_m16n8k16<B>(sums[2 * t + 1], f, g[2], g[3]);
      }
    }
  }
}

// the warp's 16 columns of a tile of u, transposed, times h; and their sums
template <int RANK, bool TIMES, typename T>
__device__ void multiply_h(float (&sums)[RANK / 8][4], float (&of_u)[2], float (&of_uv)[2], T* tile, T* times,
                           B* h_tile, B* h_rest, bool with_h) {
  const int lane = threadIdx.x % 32, at = threadIdx.x / 32 * 2 + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < STEP / 16; i++) {
    const int row = i * 16 + lane % 8 + lane / 16 * 8;
    uint32_t u[4], f[4], low[4], g[4], rest[4];
    ldmatrix_x4_trans(u, piece(tile, row, at));
    if (with_h) {
#pragma unroll
      for (int j = 0; j < 4; j++) split(u[j], f[j], low[j], T());
#pragma unroll
      for (int t = 0; t < RANK / 16; t++) {
        ldmatrix_x4_trans(g, piece(h_tile, i * 16 + lane % 16, 2 * t + lane / 16));
        ldmatrix_x4_trans(rest, piece(h_rest, i * 16 + lane % 16, 2 * t + lane / 16));
        mma_split<T>(sums[2 * t], f, low, g[0], g[1], rest[0], rest[1]);
        mma_split<T>(sums[2 * t + 1], f, low, g[2], g[3], rest[2], rest[3]);
      }
    }
    if (TIMES) ldmatrix_x4_trans(g, piece(times, row, at));
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 v = unpack_pair<T>(u[j]);
      of_u[j % 2] += v.x + v.y;
      if (TIMES) of_uv[j % 2] += v.x * unpack_pair<T>(g[j]).x + v.y * unpack_pair<T>(g[j]).y;
    }
  }
}

// a tile of u ⊙ (gain - less), eight columns of which the thread has
template <typename T>
__device__ void write_scaled(const LoRALinearSides& p, T* tile, int64_t row, int64_t end, int64_t column) {
  const int c = threadIdx.x % 8;
  float gain[8];
#pragma unroll
  for (int j = 0; j < 8; j++) gain[j] = column + c * 8 + j < p.n ? p.gain[column + c * 8 + j] - p.less : 0.f;
  if (column + c * 8 >= p.scaled_row) return;
#pragma unroll
  for (int i = 0; i < STEP * 8 / THREADS; i++) {
    const int r = i * (THREADS / 8) + int(threadIdx.x) / 8;
    alignas(16) T values[8];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<uint4*>(piece(tile, r, c));
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = rounded<T>(gain[j] * to_float(values[j]));
    T* const out = static_cast<T*>(p.scaled) + (row + r) * p.scaled_row + column + c * 8;
    if (row + r < end) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<uint4*>(values);
  }
}

template <typename T, int RANK, int CHUNKS, bool TIMES, bool ANY>
__device__ void sides(const LoRALinearSides& p) {
  constexpr int STAGES = TIMES ? 2 : 4, STAGE = (TIMES ? 2 : 1) * TILE, V = CHUNKS * RANK * COLUMNS;
  extern __shared__ uint4 shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  B *const v_tile = reinterpret_cast<B*>(stages + STAGES * STAGE), *const v_rest = v_tile + V;
  B *const h_tile = v_rest + V, *const h_rest = h_tile + TILE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.x) * CHUNKS * COLUMNS, rank = int64_t(blockIdx.y) * RANK;
  const int64_t begin = int64_t(blockIdx.z) * p.rows, end = min(p.m, begin + p.rows);
  const int steps = int((end - begin + STEP - 1) / STEP) * CHUNKS;
  const auto load = [&](int step, int stage) {
    T* const tile = stages + stage * STAGE;
    const T *const u = static_cast<const T*>(p.u), *const times = static_cast<const T*>(p.times);
    const int64_t row = begin + int64_t(step / CHUNKS) * STEP, at = column + step % CHUNKS * COLUMNS;
    if (ANY) {
      copy_numbers<THREADS, STEP>(tile, u, p.u_row, p.u_column, row, end, at, p.n);
      copy_numbers<THREADS, STEP>(tile + TILE, times, p.times_row, p.times_column, row, end, at, p.n);
    } else {
      copy_tile<THREADS, STEP>(tile, u, p.u_row, row, end, at, p.n);
      if (TIMES) copy_tile<THREADS, STEP>(tile + TILE, times, p.times_row, row, end, at, p.n);
    }
  };
  pipeline_prologue<STAGES>(steps, load);
  // bfloat16 leaves nothing of its own numbers
  const bool splits = p.gain.data || p.v.dtype != 1;
  if (p.p) load_v<RANK, CHUNKS>(p, v_tile, v_rest, column, rank);
  Accumulators<RANK, CHUNKS> sums;
  // not `pipelined`: a chunk's sums are registers, so the compiler has to know which chunk it is
  for (int64_t row = begin; row < end; row += STEP) {
    float of_v[RANK / 8][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int stage = pipeline_step<STAGES>(int((row - begin) / STEP) * CHUNKS + chunk, steps, load);
      if (chunk == 0 && p.part) {
        split_tile<THREADS, STEP>(h_tile, h_rest, p.h, p.r, row, end, rank, min(p.r, rank + RANK), RANK / 16);
        __syncthreads();
      }
      T* const tile = stages + stage * STAGE;
      if (p.p) {
        const int at = chunk * RANK * COLUMNS;
        multiply_v<RANK>(of_v, tile, v_tile + at, v_rest + at, splits);
      }
      multiply_h<RANK, TIMES>(sums.part[chunk], sums.of_u[chunk], sums.of_uv[chunk], tile, tile + TILE, h_tile, h_rest,
                              p.part != nullptr);
      if (p.scaled && blockIdx.y == 0) write_scaled(p, tile, row, end, column + chunk * COLUMNS);
    }
    if (!p.p) continue;
    for_each_accumulator(of_v, [&](int at, int column, float sum) {
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
        if (TIMES && p.of_uv) p.of_uv[at] = of_uv;
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

#define LK_SIDES(name, T, RANK, CHUNKS, TIMES, ANY)                                                                  \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 1) name(const __grid_constant__ lk::LoRALinearSides p) { \
    lk::sides<T, RANK, CHUNKS, TIMES, ANY>(p);                                                                       \
  }
LK_SIDES(lora_linear_sides_bf16_16, __nv_bfloat16, 16, 8, false, false)
LK_SIDES(lora_linear_sides_bf16_32, __nv_bfloat16, 32, 4, false, false)
LK_SIDES(lora_linear_sides_times_bf16_16, __nv_bfloat16, 16, 8, true, false)
LK_SIDES(lora_linear_sides_times_bf16_32, __nv_bfloat16, 32, 4, true, false)
LK_SIDES(lora_linear_sides_any_bf16, __nv_bfloat16, 16, 8, true, true)
LK_SIDES(lora_linear_sides_f16_16, __half, 16, 8, false, false)
LK_SIDES(lora_linear_sides_f16_32, __half, 32, 4, false, false)
LK_SIDES(lora_linear_sides_times_f16_16, __half, 16, 8, true, false)
LK_SIDES(lora_linear_sides_times_f16_32, __half, 32, 4, true, false)
LK_SIDES(lora_linear_sides_any_f16, __half, 16, 8, true, true)

LK_TABLE(lora_linear_sides, LoRALinearSides, LK_KERNEL(lora_linear_sides_bf16_16), LK_KERNEL(lora_linear_sides_bf16_32),
         LK_KERNEL(lora_linear_sides_times_bf16_16), LK_KERNEL(lora_linear_sides_times_bf16_32),
         LK_KERNEL(lora_linear_sides_any_bf16), LK_KERNEL(lora_linear_sides_f16_16),
         LK_KERNEL(lora_linear_sides_f16_32), LK_KERNEL(lora_linear_sides_times_f16_16),
         LK_KERNEL(lora_linear_sides_times_f16_32), LK_KERNEL(lora_linear_sides_any_f16))
