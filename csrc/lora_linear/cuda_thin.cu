// h = scale · drop(x) Aᵀ for any number of tokens, in parts: each is the sum over a part of the columns, which whoever reads
// them adds up in their order. A block has 64 tokens, a warp 16 of them; tiles of 64 columns of x and A come by cp.async, and
// the mask of dropout is made in registers.
#include "../common/kernels.h"
#include "../common/philox.cuh"
#include "../common/tiles.cuh"

namespace lk {

// k is a multiple of 8; rows of x and a begin at multiples of 16 bytes
struct LoRALinearShrink {
  const void *x, *a;  // [m, k] [r, k]
  float* h;           // [parts, m, r]
  Dropout dropout;
  int64_t m, k, r, x_row, a_row, part;  // columns of a part, a multiple of 64
  float scale;
};

constexpr int TOKENS = 64, COLUMNS = 64, STAGES = 4, THREADS = 128;

// sums [16 tokens][RANK] += 16 columns of x times those of A
template <int RANK, typename T>
__device__ void multiply(float (&sums)[RANK / 8][4], T* x_tile, T* a_tile, int step) {
  const int lane = threadIdx.x % 32;
  uint32_t f[4], g[4];
  ldmatrix_x4(f, piece(x_tile, threadIdx.x / 32 * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < RANK / 8; j += 2) {
    ldmatrix_x4(g, piece(a_tile, j * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    mma_m16n8k16<T>(sums[j], f, g[0], g[1]);
    mma_m16n8k16<T>(sums[j + 1], f, g[2], g[3]);
  }
}

// four neighbours of a row; the two of them that a matrix instruction counts far apart are the same on both sides
template <typename T>
__device__ uint2 four_of(T* tile, int row, int step) {
  const int at = threadIdx.x % 4;
  return *reinterpret_cast<const uint2*>(piece<Swap::PAIRS>(tile, row, 2 * step + at / 2) + at % 2 * 4);
}

// the same for drop(x): a lane takes four neighbours of a row, which one call of Philox is for
template <int RANK, typename T>
__device__ void multiply_kept(float (&sums)[RANK / 8][4], T* x_tile, T* a_tile, int step, uint64_t seed,
                              uint32_t threshold, int64_t token, int64_t column) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const uint32_t group = uint32_t(column / 4 + step * 4 + lane % 4);
  uint32_t f[4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint2 four = four_of(x_tile, row + i * 8, step);
    const uint4 words = philox(seed, group, uint64_t(token + row + i * 8));
    f[i] = four.x & ((words.x >= threshold ? 0xffffu : 0) | (words.y >= threshold ? 0xffff0000u : 0));
    f[i + 2] = four.y & ((words.z >= threshold ? 0xffffu : 0) | (words.w >= threshold ? 0xffff0000u : 0));
  }
#pragma unroll
  for (int j = 0; j < RANK / 8; j++) {
    const uint2 g = four_of(a_tile, j * 8 + lane / 4, step);
    mma_m16n8k16<T>(sums[j], f, g.x, g.y);
  }
}

template <typename T, int RANK, bool DROPS>
__device__ void shrink(const LoRALinearShrink& p) {
  griddepcontrol_launch_dependents();  // which wait for h themselves
  constexpr Swap SWAP = DROPS ? Swap::PAIRS : Swap::EIGHT;
  extern __shared__ uint4 shared[];
  T* const memory = reinterpret_cast<T*>(shared);  // [STAGES][TOKENS + RANK][COLUMNS]
  const int64_t token = int64_t(blockIdx.x) * TOKENS, rank = int64_t(blockIdx.y) * RANK;
  const int64_t begin = int64_t(blockIdx.z) * p.part, end = min(p.k, begin + p.part);
  const int steps = int((end - begin + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step) {
    if (step < steps) {
      T* const stage = memory + step % STAGES * (TOKENS + RANK) * COLUMNS;
      const int64_t at = begin + int64_t(step) * COLUMNS;
      copy_tile<THREADS, TOKENS, SWAP>(stage, static_cast<const T*>(p.x), p.x_row, token, p.m, at, end);
      copy_tile<THREADS, RANK, SWAP>(stage + TOKENS * COLUMNS, static_cast<const T*>(p.a), p.a_row, rank, p.r, at, end);
    }
    cp_async_commit();
  };
  for (int step = 0; step < STAGES - 1; step++) load(step);
  const uint64_t seed = DROPS ? uint64_t(p.dropout.at ? *p.dropout.at : p.dropout.seed) : 0;
  float sums[RANK / 8][4] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this stage are there, and the stage before it has been read
    load(step + STAGES - 1);
    T *const x_tile = memory + step % STAGES * (TOKENS + RANK) * COLUMNS, *const a_tile = x_tile + TOKENS * COLUMNS;
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
      if constexpr (DROPS) {
        const int64_t column = begin + int64_t(step) * COLUMNS;
        multiply_kept<RANK>(sums, x_tile, a_tile, i, seed, uint32_t(p.dropout.threshold), token, column);
      } else {
        multiply<RANK>(sums, x_tile, a_tile, i);
      }
    }
  }
  each_sum(sums, [&](int row, int column, float sum) {
    const int64_t t = token + threadIdx.x / 32 * 16 + row, r = rank + column;
    if (t < p.m && r < p.r) p.h[(blockIdx.z * p.m + t) * p.r + r] = p.scale * sum;
  });
}

}  // namespace lk

#define LK_SHRINK(name, T, RANK, DROPS)                                                                               \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearShrink p) { \
    lk::shrink<T, RANK, DROPS>(p);                                                                                    \
  }
LK_SHRINK(lora_linear_shrink_bf16_16, __nv_bfloat16, 16, false)
LK_SHRINK(lora_linear_shrink_bf16_64, __nv_bfloat16, 64, false)
LK_SHRINK(lora_linear_shrink_f16_16, __half, 16, false)
LK_SHRINK(lora_linear_shrink_f16_64, __half, 64, false)
LK_SHRINK(lora_linear_shrink_drop_bf16_16, __nv_bfloat16, 16, true)
LK_SHRINK(lora_linear_shrink_drop_bf16_64, __nv_bfloat16, 64, true)
LK_SHRINK(lora_linear_shrink_drop_f16_16, __half, 16, true)
LK_SHRINK(lora_linear_shrink_drop_f16_64, __half, 64, true)

LK_TABLE(lora_linear_thin, LoRALinearShrink, LK_KERNEL(lora_linear_shrink_bf16_16),
         LK_KERNEL(lora_linear_shrink_bf16_64), LK_KERNEL(lora_linear_shrink_f16_16),
         LK_KERNEL(lora_linear_shrink_f16_64), LK_KERNEL(lora_linear_shrink_drop_bf16_16),
         LK_KERNEL(lora_linear_shrink_drop_bf16_64), LK_KERNEL(lora_linear_shrink_drop_f16_16),
         LK_KERNEL(lora_linear_shrink_drop_f16_64))
