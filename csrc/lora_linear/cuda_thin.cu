// h = scale · drop(x) Aᵀ for any number of tokens, in parts: each is the sum over a part of the
// columns, which whoever reads them adds up in their order. A block has 64 tokens, a warp 16 of
// them; tiles of 64 columns of x and A come by cp.async, and the mask of dropout is made in
// registers, from where drop(x) without its factor can be written, too. A in float32 is packed
// before: its numbers as bfloat16, and what those leave of them.
#include "../common/kernels.h"
#include "../common/philox.cuh"
#include "../common/pipeline.cuh"
#include "../common/tiles.cuh"

namespace lk {

using B = __nv_bfloat16;

// Rows of x and a begin at multiples of 16 bytes and k is a multiple of 8, but that the kernels
// `any` take every x.
struct LoRALinearShrink {
  const void *x, *a;  // [m, k] [r, k], the latter packed where it was float32 and for `any`
  float* h;           // [parts, m, r]
  void* kept;         // [m, k]: x where the mask keeps it, else zeros; or null
  Dropout dropout;
  int64_t m, k, r, x_row, x_column, a_row, kept_row, part;  // columns of a part, a multiple of 64
  float scale;
};

// out [2, r, out_row] = a, and what bfloat16 leaves of it; zeros beyond k
struct LoRALinearPack {
  Matrix a;  // [r, k]
  B* out;
  int64_t r, k, out_row;
};

constexpr int TOKENS = 64, COLUMNS = 64, THREADS = 128;

// of one number, or of a number and what it leaves
template <typename T, int SPLIT>
using Factor = typename std::conditional<SPLIT == 2, B, T>::type;

// sums [16 tokens][RANK] += 16 columns of x times those of A
template <int RANK, int SPLIT, typename T>
__device__ void multiply(float (&sums)[RANK / 8][4], T* x_tile, Factor<T, SPLIT>* a_tile, int step) {
  const int lane = threadIdx.x % 32;
  uint32_t f[4], g[4], low[4], rest[4];
  ldmatrix_x4(f, piece(x_tile, threadIdx.x / 32 * 16 + lane % 16, 2 * step + lane / 16));
  if constexpr (SPLIT == 2) {
#pragma unroll
    for (auto& pair : f) split(pair, pair, low[&pair - f], T());
  }
#pragma unroll
  for (int j = 0; j < RANK / 8; j += 2) {
    const int row = j * 8 + lane / 16 * 8 + lane % 8, at = 2 * step + lane / 8 % 2;
    ldmatrix_x4(g, piece(a_tile, row, at));
    if constexpr (SPLIT == 2) {
      ldmatrix_x4(rest, piece(a_tile + RANK * COLUMNS, row, at));
      mma_split<T>(sums[j], f, low, g[0], g[1], rest[0], rest[1]);
      mma_split<T>(sums[j + 1], f, low, g[2], g[3], rest[2], rest[3]);
    } else {
      mma_m16n8k16<T>(sums[j], f, g[0], g[1]);
      mma_m16n8k16<T>(sums[j + 1], f, g[2], g[3]);
    }
  }
}

// four neighbours of a row; the two of them that a matrix instruction counts far apart are the same
// on both sides
template <typename T>
__device__ uint2 load_four(T* tile, int row, int step) {
  const int at = threadIdx.x % 4;
  return *reinterpret_cast<const uint2*>(piece<Swizzle::PAIRS>(tile, row, 2 * step + at / 2) + at % 2 * 4);
}

// the same for drop(x): a lane takes four neighbours of a row, which one call of Philox is for
template <int RANK, int SPLIT, typename T>
__device__ void multiply_masked(float (&sums)[RANK / 8][4], const LoRALinearShrink& p, T* x_tile,
                                Factor<T, SPLIT>* a_tile, int step, uint64_t seed, int64_t token, int64_t column) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const int64_t at = column + step * 16 + lane % 4 * 4;
  const uint32_t threshold = uint32_t(p.dropout.threshold);
  uint32_t f[4], low[4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t t = token + row + i * 8;
    const uint2 four = load_four(x_tile, row + i * 8, step);
    const uint4 words = philox(seed, uint32_t(at / 4), uint64_t(t));
    f[i] = four.x & ((words.x >= threshold ? 0xffffu : 0) | (words.y >= threshold ? 0xffff0000u : 0));
    f[i + 2] = four.y & ((words.z >= threshold ? 0xffffu : 0) | (words.w >= threshold ? 0xffff0000u : 0));
    if (p.kept && blockIdx.y == 0 && t < p.m && at < p.kept_row) {
      *reinterpret_cast<uint2*>(static_cast<T*>(p.kept) + t * p.kept_row + at) = make_uint2(f[i], f[i + 2]);
    }
  }
  if constexpr (SPLIT == 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(f[i], f[i], low[i], T());
  }
#pragma unroll
  for (int j = 0; j < RANK / 8; j++) {
    const uint2 g = load_four(a_tile, j * 8 + lane / 4, step);
    if constexpr (SPLIT == 2) {
      const uint2 rest = load_four(a_tile + RANK * COLUMNS, j * 8 + lane / 4, step);
      mma_split<T>(sums[j], f, low, g.x, g.y, rest.x, rest.y);
    } else {
      mma_m16n8k16<T>(sums[j], f, g.x, g.y);
    }
  }
}

template <typename T, int RANK, bool DROPS, int SPLIT, bool ANY>
__device__ void shrink(const LoRALinearShrink& p) {
  griddepcontrol_launch_dependents();  // which wait for h themselves
  constexpr Swizzle SWIZZLE = DROPS ? Swizzle::PAIRS : Swizzle::EIGHT;
  constexpr int STAGES = SPLIT == 2 ? 3 : 4, STAGE = (TOKENS + SPLIT * RANK) * COLUMNS;
  using A = Factor<T, SPLIT>;
  extern __shared__ uint4 shared[];
  // [STAGES], of x [TOKENS][COLUMNS] and of A SPLIT [RANK][COLUMNS]
  T* const memory = reinterpret_cast<T*>(shared);
  const int64_t token = int64_t(blockIdx.x) * TOKENS, rank = int64_t(blockIdx.y) * RANK;
  const int64_t begin = int64_t(blockIdx.z) * p.part, end = min(p.k, begin + p.part);
  const int steps = int((end - begin + COLUMNS - 1) / COLUMNS);
  const auto load = [&](int step, int stage) {
    T* const x_tile = memory + stage * STAGE;
    const int64_t at = begin + int64_t(step) * COLUMNS;
    const T* const x = static_cast<const T*>(p.x);
    if (ANY) copy_numbers<THREADS, TOKENS, SWIZZLE>(x_tile, x, p.x_row, p.x_column, token, p.m, at, end);
    else copy_tile<THREADS, TOKENS, SWIZZLE>(x_tile, x, p.x_row, token, p.m, at, end);
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
      copy_tile<THREADS, RANK, SWIZZLE>(reinterpret_cast<A*>(x_tile + (TOKENS + i * RANK) * COLUMNS),
                                        static_cast<const A*>(p.a) + i * p.r * p.a_row, p.a_row, rank, p.r, at,
                                        ANY ? (end + 7) / 8 * 8 : end);
    }
  };
  uint64_t seed = 0;
  const auto load_seed = [&] {
    if (DROPS) seed = uint64_t(p.dropout.at ? *p.dropout.at : p.dropout.seed);
  };
  float sums[RANK / 8][4] = {};
  pipelined<STAGES>(steps, load, load_seed, [&](int step, int stage) {
    T* const x_tile = memory + stage * STAGE;
    A* const a_tile = reinterpret_cast<A*>(x_tile + TOKENS * COLUMNS);
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
      if constexpr (DROPS) {
        multiply_masked<RANK, SPLIT>(sums, p, x_tile, a_tile, i, seed, token, begin + int64_t(step) * COLUMNS);
      } else {
        multiply<RANK, SPLIT>(sums, x_tile, a_tile, i);
      }
    }
  });
  for_each_accumulator(sums, [&](int row, int column, float sum) {
    const int64_t t = token + threadIdx.x / 32 * 16 + row, r = rank + column;
    if (t < p.m && r < p.r) p.h[(blockIdx.z * p.m + t) * p.r + r] = p.scale * sum;
  });
}

}  // namespace lk

#define LK_SHRINK(name, T, RANK, DROPS, SPLIT, ANY)                                                                   \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearShrink p) { \
    lk::shrink<T, RANK, DROPS, SPLIT, ANY>(p);                                                                        \
  }
LK_SHRINK(lora_linear_shrink_bf16_16, __nv_bfloat16, 16, false, 1, false)
LK_SHRINK(lora_linear_shrink_bf16_64, __nv_bfloat16, 64, false, 1, false)
LK_SHRINK(lora_linear_shrink_split_bf16_16, __nv_bfloat16, 16, false, 2, false)
LK_SHRINK(lora_linear_shrink_split_bf16_64, __nv_bfloat16, 64, false, 2, false)
LK_SHRINK(lora_linear_shrink_f16_16, __half, 16, false, 1, false)
LK_SHRINK(lora_linear_shrink_f16_64, __half, 64, false, 1, false)
LK_SHRINK(lora_linear_shrink_split_f16_16, __half, 16, false, 2, false)
LK_SHRINK(lora_linear_shrink_split_f16_64, __half, 64, false, 2, false)
LK_SHRINK(lora_linear_shrink_drop_bf16_16, __nv_bfloat16, 16, true, 1, false)
LK_SHRINK(lora_linear_shrink_drop_bf16_64, __nv_bfloat16, 64, true, 1, false)
LK_SHRINK(lora_linear_shrink_drop_split_bf16_16, __nv_bfloat16, 16, true, 2, false)
LK_SHRINK(lora_linear_shrink_drop_split_bf16_64, __nv_bfloat16, 64, true, 2, false)
LK_SHRINK(lora_linear_shrink_drop_f16_16, __half, 16, true, 1, false)
LK_SHRINK(lora_linear_shrink_drop_f16_64, __half, 64, true, 1, false)
LK_SHRINK(lora_linear_shrink_drop_split_f16_16, __half, 16, true, 2, false)
LK_SHRINK(lora_linear_shrink_drop_split_f16_64, __half, 64, true, 2, false)
LK_SHRINK(lora_linear_shrink_any_bf16, __nv_bfloat16, 16, true, 2, true)
LK_SHRINK(lora_linear_shrink_any_f16, __half, 16, true, 2, true)

extern "C" __global__ void __launch_bounds__(256) lora_linear_pack(const __grid_constant__ lk::LoRALinearPack p) {
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x, size = p.r * p.out_row;
  const int64_t r = at / p.out_row, k = at % p.out_row;
  if (at < size) lk::split(k < p.k ? p.a(r, k) : 0.f, p.out[at], p.out[size + at]);
}

LK_TABLE(lora_linear_thin, LoRALinearShrink, LK_KERNEL(lora_linear_shrink_bf16_16),
         LK_KERNEL(lora_linear_shrink_bf16_64), LK_KERNEL(lora_linear_shrink_split_bf16_16),
         LK_KERNEL(lora_linear_shrink_split_bf16_64), LK_KERNEL(lora_linear_shrink_f16_16),
         LK_KERNEL(lora_linear_shrink_f16_64), LK_KERNEL(lora_linear_shrink_split_f16_16),
         LK_KERNEL(lora_linear_shrink_split_f16_64), LK_KERNEL(lora_linear_shrink_drop_bf16_16),
         LK_KERNEL(lora_linear_shrink_drop_bf16_64), LK_KERNEL(lora_linear_shrink_drop_split_bf16_16),
         LK_KERNEL(lora_linear_shrink_drop_split_bf16_64), LK_KERNEL(lora_linear_shrink_drop_f16_16),
         LK_KERNEL(lora_linear_shrink_drop_f16_64), LK_KERNEL(lora_linear_shrink_drop_split_f16_16),
         LK_KERNEL(lora_linear_shrink_drop_split_f16_64), LK_KERNEL(lora_linear_shrink_any_bf16),
         LK_KERNEL(lora_linear_shrink_any_f16), LK_KERNEL_OF(lora_linear_pack, LoRALinearPack))
