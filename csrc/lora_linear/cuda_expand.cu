// What a GEMM of the library leaves to do: out = [out +] inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - less
// · z) + bias and z + h bᵀ, with h from cuda_thin.cu or cuda_sides.cu. z is read once, out written
// once. A block has 128 columns and walks down its rows 64 at a time: h bᵀ is made on tensor cores,
// put into shared memory in float32, and taken from there eight neighbours at a time. h, in
// float32, and b count as two of bfloat16 each.
#include "../common/kernels.h"
#include "../common/philox.cuh"
#include "../common/tiles.cuh"

namespace lk {

struct LoRALinearExpand {
  const float* h;                // [parts, m, r], whose sum counts
  Matrix b;                      // [n, r]
  const void* z;                 // [m, n], or null: zeros
  void *out, *z_out;             // [m, n]; z_out may be null. z, out and z_out may be one
  Vector gain, bias;             // [n]
  Dropout dropout;               // of the columns of out
  int64_t m, n, r, parts, rows;  // rows of a block, a multiple of 64
  int64_t adds;                  // whether out counts as it stands
  float less, inverse;           // inverse: of the share that dropout keeps
};

constexpr int ROWS = 64, COLUMNS = 128, THREADS = 256, RANKS = 32;
// so that the rows of a matrix instruction's sums lie in different banks
constexpr int PITCH = COLUMNS + 8;
using B = __nv_bfloat16;

// RANKS of b from `rank` on, of the block's columns: the numbers in a row's first four pieces, in
// the others what those leave
__device__ inline void load_b(const LoRALinearExpand& p, B* tile, int64_t column, int64_t rank) {
  for (int i = threadIdx.x; i < COLUMNS * RANKS / 8; i += THREADS) {
    const int n = i % COLUMNS, c = i / COLUMNS;
    alignas(16) B high[8], low[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t r = rank + c * 8 + j;
      split(column + n < p.n && r < p.r ? p.b(column + n, r) : 0.f, high[j], low[j]);
    }
    *reinterpret_cast<uint4*>(piece(tile, n, c)) = *reinterpret_cast<uint4*>(high);
    *reinterpret_cast<uint4*>(piece(tile, n, c + 4)) = *reinterpret_cast<uint4*>(low);
  }
}

// the same of the sum of h's parts, of 64 rows
__device__ inline void load_h(const LoRALinearExpand& p, B* tile, int64_t row, int64_t end, int64_t rank) {
  const bool aligned = p.r % 4 == 0 && reinterpret_cast<uintptr_t>(p.h) % PIECE == 0;
  // eight lanes that write 16 bytes each should do so at eight places of the banks
  const int lane = threadIdx.x % 8, group = threadIdx.x / 8, c = lane % 4, m = group / 4 * 8 + group % 4 + lane / 4 * 4;
  const int64_t count = row + m < end ? p.r - rank - c * 8 : 0;
  const float* const at = p.h + (row + m) * p.r + rank + c * 8;
  float v[8];
  load_eight(v, at, count, aligned);
  for (int64_t part = 1; part < p.parts; part++) {
    float more[8];
    load_eight(more, at + part * p.m * p.r, count, aligned);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += more[j];
  }
  alignas(16) B high[8], low[8];
#pragma unroll
  for (int j = 0; j < 8; j++) split(v[j], high[j], low[j]);
  *reinterpret_cast<uint4*>(piece(tile, m, c)) = *reinterpret_cast<uint4*>(high);
  *reinterpret_cast<uint4*>(piece(tile, m, c + 4)) = *reinterpret_cast<uint4*>(low);
}

// a warp's 32 rows and 32 columns of h bᵀ, over 16 of the ranks
__device__ inline void multiply(float (&sums)[2][4][4], B* h_tile, B* b_tile, int step, bool exact) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp / 4 * 32 + lane % 16, n = warp % 4 * 32;
  uint32_t f[2][4], f_rest[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    ldmatrix_x4(f[i], piece(h_tile, m + i * 16, 2 * step + lane / 16));
    ldmatrix_x4(f_rest[i], piece(h_tile, m + i * 16, 4 + 2 * step + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const int row = n + j * 8 + lane / 16 * 8 + lane % 8, at = 2 * step + lane / 8 % 2;
    uint32_t g[4], g_rest[4];
    ldmatrix_x4(g, piece(b_tile, row, at));
    if (!exact) ldmatrix_x4(g_rest, piece(b_tile, row, 4 + at));
#pragma unroll
    for (int l = 0; l < 2; l++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_m16n8k16<B>(sums[i][j + l], f[i], g[2 * l], g[2 * l + 1]);
        mma_m16n8k16<B>(sums[i][j + l], f_rest[i], g[2 * l], g[2 * l + 1]);
        if (!exact) mma_m16n8k16<B>(sums[i][j + l], f[i], g_rest[2 * l], g_rest[2 * l + 1]);
      }
    }
  }
}

// eight neighbours of a row from `at` on, of which `count` are there; `whole` where all are and
// they can be read together
template <typename T>
__device__ void load_values(float (&v)[8], const void* from, int64_t at, int count, bool whole) {
  load_eight(v, static_cast<const T*>(from) + at, count, whole);
}
template <typename T>
__device__ void store_values(void* to, int64_t at, const float (&v)[8], int count, bool whole) {
  alignas(16) T values[8];
#pragma unroll
  for (int j = 0; j < 8; j++) values[j] = rounded<T>(v[j]);
  T* const out = static_cast<T*>(to) + at;
  if (whole) {
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<uint4*>(values);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (j < count) out[j] = values[j];
    }
  }
}

// what is elementwise, of eight neighbours: s is h bᵀ there, and column those of `gain` and `bias`
template <typename T>
__device__ void epilogue(const LoRALinearExpand& p, float (&s)[8], const float (&gain)[8], const float (&bias)[8],
                         uint64_t seed, int64_t row, int64_t column) {
  const int64_t at = row * p.n + column;
  const int count = int(min(p.n - column, int64_t(8)));
  const bool whole = p.n % 8 == 0;
  float z[8] = {};
  if (p.z) {
    load_values<T>(z, p.z, at, count, whole);
#pragma unroll
    for (int j = 0; j < 8; j++) s[j] += z[j];
  }
  float before[8] = {};
  if (p.adds) load_values<T>(before, p.out, at, count, whole);
  if (p.z_out) store_values<T>(p.z_out, at, s, count, whole);
  if (p.gain.data) {
#pragma unroll
    for (int j = 0; j < 8; j++) s[j] = gain[j] * s[j] - p.less * z[j];
  }
  if (p.dropout.threshold > 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 words = philox(seed, uint32_t(column / 4 + half), uint64_t(row));
      const uint32_t four[4] = {words.x, words.y, words.z, words.w}, threshold = uint32_t(p.dropout.threshold);
#pragma unroll
      for (int j = 0; j < 4; j++) s[half * 4 + j] = four[j] >= threshold ? p.inverse * s[half * 4 + j] : 0.f;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) s[j] += bias[j] + before[j];
  store_values<T>(p.out, at, s, count, whole);
}

template <typename T>
__device__ void expand(const LoRALinearExpand& p) {
  extern __shared__ uint4 shared[];
  B *const b_tile = reinterpret_cast<B*>(shared), *const h_tile = b_tile + COLUMNS * WIDTH / 2;
  float* const product = reinterpret_cast<float*>(h_tile + ROWS * WIDTH / 2);  // [ROWS][PITCH]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = threadIdx.x % 16 * 8;
  const int64_t column = int64_t(blockIdx.x) * COLUMNS, begin = int64_t(blockIdx.y) * p.rows;
  const int64_t end = min(p.m, begin + p.rows);
  const bool exact = p.b.dtype == 1;  // bfloat16 leaves nothing of b
  const uint64_t seed = p.dropout.at ? uint64_t(*p.dropout.at) : uint64_t(p.dropout.seed);
  float gain[8], bias[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int64_t at = column + mine + j;
    gain[j] = p.gain.data && at < p.n ? p.gain[at] : 1.f, bias[j] = p.bias.data && at < p.n ? p.bias[at] : 0.f;
  }
  for (int64_t row = begin; row < end; row += ROWS) {
    float sums[2][4][4] = {};
    for (int64_t rank = 0; rank < p.r; rank += RANKS) {
      const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
      if (row > begin || rank > 0) __syncthreads();  // the tiles have been read
      if (row == begin || p.r > RANKS) load_b(p, b_tile, column, rank);
      load_h(p, h_tile, row, end, rank);
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < steps; i++) multiply(sums, h_tile, b_tile, i, exact);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int l = 0; l < 2; l++) {
          const int r = warp / 4 * 32 + i * 16 + l * 8 + lane / 4, c = warp % 4 * 32 + j * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(product + r * PITCH + c) = make_float2(sums[i][j][2 * l], sums[i][j][2 * l + 1]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS * 16 / THREADS; i++) {
      const int r = i * (THREADS / 16) + int(threadIdx.x) / 16, flip = mine / 32 % 2;
      if (row + r >= end || column + mine >= p.n) continue;
      // of eight lanes four begin with the second half: so they read eight places of the banks
      const float* const from = product + r * PITCH + mine;
      const float4 one = *reinterpret_cast<const float4*>(from + 4 * flip);
      const float4 other = *reinterpret_cast<const float4*>(from + 4 - 4 * flip);
      const float4 low = flip ? other : one, high = flip ? one : other;
      float s[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      epilogue<T>(p, s, gain, bias, seed, row + r, column + mine);
    }
  }
}

}  // namespace lk

#define LK_EXPAND(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearExpand p) { \
    lk::expand<T>(p);                                                                                                 \
  }
LK_EXPAND(lora_linear_expand_bf16, __nv_bfloat16)
LK_EXPAND(lora_linear_expand_f16, __half)

LK_TABLE(lora_linear_expand, LoRALinearExpand, LK_KERNEL(lora_linear_expand_bf16), LK_KERNEL(lora_linear_expand_f16))
