// dx = (dy ⊙ gain ⊙ w_scale) W + P A for at most 64 tokens and W of int8, which is read once: so dx
// is the gradient of the numbers that forward multiplies with. Bound by the bytes of W, so tokens
// are the narrow side of each product.
//
// A block makes 128 columns of dx over a part of the outputs; whoever comes last to a tile adds the
// parts up. dy with its factors, and P, in float32, count as two of bfloat16, which has the
// exponents that float16 lacks; int8 is exact in it. A lane of a transposed matrix of 16 bits gets
// two neighbours of int8: the first of them is a row of the product, the second the row eight
// further down. The tile of A lies so, too.
#include "../common/kernels.h"
#include "../common/pipeline.cuh"
#include "../common/split_k.cuh"
#include "../common/tiles.cuh"

namespace lk {

// n is a multiple of 8, k of 16; rows of dy, w and a begin at multiples of 16 bytes
struct LoRALinearDxSmall {
  const void *dy, *w, *a;  // [m, n] bfloat16, [n, k] int8, [r, k] bfloat16
  const float* p;          // [parts, m, r], whose sum counts
  void* dx;                // [m, k]
  float* scratch;          // [blocks, 128, tokens]
  int* tickets;            // [tiles], zero before and after
  Vector gain, w_scale;    // [n]
  int64_t m, n, k, r, parts, dy_row, w_row, a_row;
  int64_t part;  // outputs of a block, a multiple of 64
};

using B = __nv_bfloat16;
constexpr int STEP = 64, COLUMNS = 128, HALF = 64, THREADS = 128, RANKS = 64;

// gain · w_scale of the eight outputs that this thread makes of each token
__device__ inline void load_factors(const LoRALinearDxSmall& p, float (&factors)[8], int64_t first, int64_t end) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t n = first + threadIdx.x % 8 * 8 + i;
    factors[i] = n < end ? (p.gain.data ? p.gain[n] : 1.f) * p.w_scale[n] : 0.f;
  }
}

// dy ⊙ factors as two tiles
template <int TOKENS>
__device__ void scale_tile(B* dy, B* tile, B* rest, const float (&factors)[8]) {
#pragma unroll
  for (int first = 0; first < TOKENS * 8; first += THREADS) {
    const int token = (first + int(threadIdx.x)) / 8, c = threadIdx.x % 8;
    alignas(16) B values[8], high[8], low[8];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<uint4*>(piece(dy, token, c));
#pragma unroll
    for (int i = 0; i < 8; i++) split(factors[i] * to_float(values[i]), high[i], low[i]);
    *reinterpret_cast<uint4*>(piece(tile, token, c)) = *reinterpret_cast<uint4*>(high);
    *reinterpret_cast<uint4*>(piece(rest, token, c)) = *reinterpret_cast<uint4*>(low);
  }
}

// RANKS rows of A and 128 columns as two tiles of 64: of 16 columns, those of even number first
__device__ inline void load_a(const LoRALinearDxSmall& p, B* tiles, int64_t rank, int64_t column) {
#pragma unroll 4
  for (int i = threadIdx.x; i < RANKS * COLUMNS / 8; i += THREADS) {
    const int half = i / (RANKS * 8), r = i / 8 % RANKS, c = i % 8;
    const int64_t at = column + half * HALF + c * 8;
    uint4 v = {};
    if (rank + r < p.r && at < p.k) {
      v = *reinterpret_cast<const uint4*>(static_cast<const B*>(p.a) + (rank + r) * p.a_row + at);
    }
    B* const tile = tiles + half * RANKS * HALF;
    const auto half_piece = [&](int odd) { return reinterpret_cast<uint2*>(piece(tile, r, c / 2 * 2 + odd)) + c % 2; };
    *half_piece(0) = make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410));
    *half_piece(1) = make_uint2(__byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632));
  }
}

template <int TOKENS>
using Accumulators = float[2][TOKENS / 8][4];  // of a warp: 16 columns of dx, 8 tokens

// sums += columns of W or A (16 times 16 each) · the tokens' numbers, 16 of them from `step` on, in
// two tiles
template <int TOKENS>
__device__ void multiply(Accumulators<TOKENS>& sums, const uint32_t (&f)[2][4], B* tile, B* rest, int step,
                         int tokens) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j += 2) {
    if (j * 8 >= tokens) break;
#pragma unroll
    for (int low = 0; low < 2; low++) {
      uint32_t g[4];
      ldmatrix_x4(g, piece(low ? rest : tile, j * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_m16n8k16<B>(sums[i][j], f[i], g[0], g[1]);
        mma_m16n8k16<B>(sums[i][j + 1], f[i], g[2], g[3]);
      }
    }
  }
}

template <int TOKENS>
__device__ void add_adapter(const LoRALinearDxSmall& p, B* memory, Accumulators<TOKENS>& sums, int64_t column) {
  B *const a_tiles = memory, *const p_tile = a_tiles + RANKS * COLUMNS, *const p_rest = p_tile + TOKENS * RANKS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t rank = 0; rank < p.r; rank += RANKS) {
    const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
    __syncthreads();  // the tiles have been read
    load_a(p, a_tiles, rank, column);
    split_tile<THREADS, TOKENS>(p_tile, p_rest, p.p, p.r, 0, p.m, rank, p.r, steps, p.parts, p.m * p.r);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      uint32_t f[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        B* const half = a_tiles + warp / 2 * RANKS * HALF;
        ldmatrix_x4_trans(f[i], piece(half, step * 16 + lane % 8 + lane / 16 * 8, warp % 2 * 4 + i * 2 + lane / 8 % 2));
      }
      multiply<TOKENS>(sums, f, p_tile, p_rest, step, int(p.m));
    }
  }
}

template <int TOKENS>
__device__ void store(const LoRALinearDxSmall& p, B* memory, const Accumulators<TOKENS>& sums, int64_t column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      for (int odd = 0; odd < 2; odd++) {
        B* const at = piece(memory + warp / 2 * TOKENS * HALF, j * 8 + lane % 4 * 2 + odd,
                            warp % 2 * 4 + i * 2 + lane / 16);
        reinterpret_cast<__nv_bfloat162*>(at)[lane / 4 % 4] = {rounded<B>(sums[i][j][odd]),
                                                               rounded<B>(sums[i][j][odd + 2])};
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * COLUMNS / 8; i += THREADS) {
    const int token = i / 16, half = i / 8 % 2, c = i % 8;
    const int64_t at = column + half * HALF + c * 8;
    if (token < p.m && at < p.k) {
      *reinterpret_cast<uint4*>(static_cast<B*>(p.dx) + token * p.k +
                                at) = *reinterpret_cast<uint4*>(piece(memory + half * TOKENS * HALF, token, c));
    }
  }
}

template <int TOKENS, int STAGES>
__device__ void input_gradient(const LoRALinearDxSmall& p) {
  constexpr int STAGE = (STEP + TOKENS) * WIDTH;
  // [STAGES], of W [64][128] and of dy [TOKENS][64]; dy with its factors, twice
  extern __shared__ uint4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  B *const u_tile = reinterpret_cast<B*>(memory + STAGES * STAGE), *const u_rest = u_tile + TOKENS * STEP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * COLUMNS, begin = int64_t(blockIdx.y) * p.part;
  const int64_t end = min(p.n, begin + p.part);
  const int steps = int((end - begin + STEP - 1) / STEP);
  const auto w_tile = [&](int stage) { return reinterpret_cast<int8_t*>(memory + stage * STAGE); };
  const auto dy_tile = [&](int stage) { return reinterpret_cast<B*>(memory + stage * STAGE + STEP * WIDTH); };
  const auto load = [&](int step, int stage) {
    const int64_t at = begin + int64_t(step) * STEP;
    copy_tile<THREADS, STEP>(w_tile(stage), static_cast<const int8_t*>(p.w), p.w_row, at, end, column, p.k);
    copy_tile<THREADS, TOKENS>(dy_tile(stage), static_cast<const B*>(p.dy), p.dy_row, 0, p.m, at, end);
  };
  float factors[8];
  Accumulators<TOKENS> sums = {};
  const auto load_first_factors = [&] { load_factors(p, factors, begin, end); };
  pipelined<STAGES>(steps, load, load_first_factors, [&](int step, int stage) {
    scale_tile<TOKENS>(dy_tile(stage), u_tile, u_rest, factors);
    // while the tiles are multiplied
    load_factors(p, factors, begin + int64_t(step + 1) * STEP, end);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) {
      uint32_t bytes[4], f[2][4];
      ldmatrix_x4_trans(bytes, piece(w_tile(stage), i * 16 + lane % 16, warp * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        widen(__byte_perm(bytes[j], 0, 0x3120), f[j / 2][j % 2 * 2], f[j / 2][j % 2 * 2 + 1], B());
      }
      multiply<TOKENS>(sums, f, u_tile, u_rest, i, int(p.m));
    }
  });
  const int parts = gridDim.y;
  constexpr int COUNT = TOKENS / 8 * 2;
  if (blockIdx.y == 0) add_adapter<TOKENS>(p, reinterpret_cast<B*>(memory), sums, column);
  float (&flat)[COUNT][4] = reinterpret_cast<float (&)[COUNT][4]>(sums);
  store_partials<THREADS>(flat, p.scratch, int64_t(blockIdx.x) * parts + blockIdx.y);
  if (!is_last_block(p.tickets + blockIdx.x, parts)) return;
  reduce_split_k<THREADS>(flat, p.scratch, int64_t(blockIdx.x) * parts, parts);
  store<TOKENS>(p, reinterpret_cast<B*>(memory), sums, column);
}

}  // namespace lk

#define LK_DX_SMALL(name, TOKENS, STAGES)                                                                              \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearDxSmall p) { \
    lk::input_gradient<TOKENS, STAGES>(p);                                                                             \
  }
LK_DX_SMALL(lora_linear_dx_small_16, 16, 5)
LK_DX_SMALL(lora_linear_dx_small_64, 64, 3)

LK_TABLE(lora_linear_dx_small, LoRALinearDxSmall, LK_KERNEL(lora_linear_dx_small_16),
         LK_KERNEL(lora_linear_dx_small_64))
