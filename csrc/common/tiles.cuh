// Tiles in shared memory whose rows are 128 bytes: eight pieces of 16 bytes, exchanged so that the
// same piece of eight rows lies in eight different places of the banks.
#pragma once
#include <cstring>
#include <type_traits>

#include "ptx.cuh"

namespace lk {

constexpr int WIDTH = 128, PIECE = 16;  // bytes

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using type = __half2;
};

__device__ inline float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ inline float2 widen(__half2 v) { return __half22float2(v); }

// four int8 numbers as two pairs of T, exactly
__device__ inline void widen(uint32_t four, uint32_t& low, uint32_t& high, __half) {
  const uint32_t biased = four ^ 0x80808080u;  // 0 to 255
  // 1024 + what it was + 128
  asm("prmt.b32 %0, %1, %2, 0x5150;" : "=r"(low) : "r"(biased), "r"(0x64646464u));
  asm("prmt.b32 %0, %1, %2, 0x5352;" : "=r"(high) : "r"(biased), "r"(0x64646464u));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
}
__device__ inline void widen(uint32_t four, uint32_t& low, uint32_t& high, __nv_bfloat16) {
  const uint32_t biased = four ^ 0x80808080u;
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t bits;  // 2^23 + what it was + 128
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bits) : "r"(biased), "r"(0x4b000000u), "r"(0x7440u + uint32_t(i)));
    f[i] = __uint_as_float(bits) - 8388736.f;
  }
  low = __byte_perm(__float_as_uint(f[0]), __float_as_uint(f[1]), 0x7632);
  high = __byte_perm(__float_as_uint(f[2]), __float_as_uint(f[3]), 0x7632);
}

// for eight lanes that read 16 bytes each, of eight rows; for sixteen that read 8, of four rows and
// their neighbours
enum class Swizzle { EIGHT, PAIRS };

template <Swizzle SWIZZLE = Swizzle::EIGHT, typename T>
__device__ T* piece(T* tile, int row, int at) {
  const int swizzle = SWIZZLE == Swizzle::EIGHT ? row % 8 : row % 4 * 2;
  return tile + (row * WIDTH + (at ^ swizzle) * PIECE) / int(sizeof(T));
}

// put(row, column, sum) of each of a lane's sums of 16 rows and 8 COUNT columns
template <typename Sum, int COUNT, typename Put>
__device__ void for_each_accumulator(Sum (&sums)[COUNT][4], Put&& put) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) put(lane / 4 + i / 2 * 8, j * 8 + lane % 4 * 2 + i % 2, sums[j][i]);
  }
}

// COUNT rows of m [rows, columns] from `row` on, 128 bytes of each from `column` on, by THREADS
// threads; zeros beyond its edges. The columns are whole pieces.
template <int THREADS, int COUNT, Swizzle SWIZZLE = Swizzle::EIGHT, typename T>
__device__ void copy_tile(T* tile, const T* m, int64_t stride, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) {
  constexpr int EACH = PIECE / int(sizeof(T)), PIECES = COUNT * WIDTH / PIECE;
#pragma unroll
  for (int first = 0; first < PIECES; first += THREADS) {
    const int i = first + int(threadIdx.x), r = i / 8, c = i % 8;
    if (PIECES % THREADS != 0 && i >= PIECES) break;
    const bool inside = row + r < rows && column + c * EACH < columns;
    cp_async(piece<SWIZZLE>(tile, r, c), inside ? m + (row + r) * stride + column + c * EACH : m, inside ? PIECE : 0);
  }
}

// The same of a matrix whose rows cannot be read 16 bytes at a time, or whose columns are `step`
// numbers apart.
template <int THREADS, int COUNT, Swizzle SWIZZLE = Swizzle::EIGHT, typename T>
__device__ void copy_numbers(T* tile, const T* m, int64_t stride, int64_t step, int64_t row, int64_t rows,
                             int64_t column, int64_t columns) {
  static_assert(sizeof(T) == 2, "a piece has eight numbers");
  for (int i = threadIdx.x; i < COUNT * WIDTH / PIECE; i += THREADS) {
    const int r = i / 8, c = i % 8;
    alignas(16) T values[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t at = column + c * 8 + j;
      values[j] = row + r < rows && at < columns ? m[(row + r) * stride + at * step] : T(0.f);
    }
    *reinterpret_cast<uint4*>(piece<SWIZZLE>(tile, r, c)) = *reinterpret_cast<uint4*>(values);
  }
}

// 16 rows of b [rows, rank] from `row` on as the left operand of a product, RANK / 16 steps of it;
// zeros beyond its edges
template <int RANK, typename T>
__device__ void load_rows(uint32_t (&operand)[RANK / 16][4], const T* b, int64_t stride, int64_t row, int64_t rows,
                          int64_t rank) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < RANK / 16; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t r = row + lane / 4 + i % 2 * 8, j = t * 16 + i / 2 * 8 + lane % 4 * 2;
      const bool inside = r < rows;
      const T pair[2] = {inside && j < rank ? b[r * stride + j] : T(0.f),
                         inside && j + 1 < rank ? b[r * stride + j + 1] : T(0.f)};
      memcpy(&operand[t][i], pair, sizeof pair);
    }
  }
}

// [16, 16] of those rows times a tile of RANK rows, its pieces `at` and `at + 1`
template <int RANK, typename T>
__device__ void multiply_rows(float (&product)[2][4], const uint32_t (&operand)[RANK / 16][4], T* tile, int at) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < RANK / 16; t++) {
    uint32_t f[4];
    ldmatrix_x4_trans(f, piece(tile, t * 16 + lane % 16, at + lane / 16));
    mma_m16n8k16<T>(product[0], operand[t], f[0], f[1]);
    mma_m16n8k16<T>(product[1], operand[t], f[2], f[3]);
  }
}

// a vector of any of the floating types
struct Vector {
  const void* data;  // or null
  int64_t dtype;     // 0 float, 1 bfloat16, 2 float16
  __device__ float operator[](int64_t i) const {
    if (dtype == 1) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    if (dtype == 2) return __half2float(static_cast<const __half*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

// a matrix of any of the floating types, with any strides
struct Matrix {
  const void* data;
  int64_t dtype, row, column;  // dtype as of a Vector
  __device__ float operator()(int64_t r, int64_t c) const { return Vector{data, dtype}[r * row + c * column]; }
};

__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(float v) { return v; }
template <typename T>
__device__ T rounded(float v);
template <>
__device__ inline __nv_bfloat16 rounded(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half rounded(float v) {
  return __float2half_rn(v);
}

// v as a number of bfloat16 and what that leaves of it
__device__ inline void split(float v, __nv_bfloat16& high, __nv_bfloat16& low) {
  high = __float2bfloat16_rn(v);
  low = __float2bfloat16_rn(isinf(to_float(high)) ? 0.f : v - to_float(high));
}

// two numbers of T as two of bfloat16, and what those leave: of float16 nothing is lost
__device__ inline void split(uint32_t pair, uint32_t& high, uint32_t& low, __half) {
  const float2 v = widen(*reinterpret_cast<const __half2*>(&pair));
  alignas(4) __nv_bfloat16 h[2], l[2];
  split(v.x, h[0], l[0]);
  split(v.y, h[1], l[1]);
  memcpy(&high, h, sizeof high);
  memcpy(&low, l, sizeof low);
}
__device__ inline void split(uint32_t pair, uint32_t& high, uint32_t& low, __nv_bfloat16) { high = pair, low = 0; }

// sums += f g, with f of T, and g as numbers of bfloat16 and what those leave
template <typename T>
__device__ void mma_split(float (&sums)[4], const uint32_t (&f)[4], const uint32_t (&f_rest)[4], uint32_t g0,
                          uint32_t g1, uint32_t rest0, uint32_t rest1) {
  mma_m16n8k16<__nv_bfloat16>(sums, f, g0, g1);
  mma_m16n8k16<__nv_bfloat16>(sums, f, rest0, rest1);
  if (std::is_same<T, __half>::value) mma_m16n8k16<__nv_bfloat16>(sums, f_rest, g0, g1);
}

// eight numbers of a row of m, of which `count` are there, as floats
template <typename T>
__device__ void load_eight(float (&v)[8], const T* m, int64_t count, bool aligned) {
  if (count >= 8 && aligned) {
    alignas(16) T values[8];
#pragma unroll
    for (int i = 0; i < int(sizeof values) / PIECE; i++) {
      reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(m)[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < count ? to_float(m[i]) : 0.f;
  }
}

// COUNT rows of the sum of m's parts [rows, ranks], which lie `part` numbers apart, from `row` on,
// ranks `first` to `first + 16 steps`, as a tile of bfloat16; what that leaves of the numbers goes
// to a second one
template <int THREADS, int COUNT, typename T>
__device__ void split_tile(__nv_bfloat16* tile, __nv_bfloat16* rest, const T* m, int64_t stride, int64_t row,
                           int64_t rows, int64_t first, int64_t ranks, int steps, int64_t parts = 1, int64_t part = 0) {
  const bool aligned = (reinterpret_cast<uintptr_t>(m) | uintptr_t(stride | part) * sizeof(T)) % PIECE == 0;
  for (int i = threadIdx.x; i < COUNT * 2 * steps; i += THREADS) {
    // eight lanes that write 16 bytes each should do so at eight places of the banks
    const int apart = steps == 1 ? 2 : steps == 2 ? 4 : 1, at8 = i / (2 * steps) % 8 * apart;
    const int r = i / (2 * steps) / 8 * 8 + at8 % 8 + at8 / 8, c = i % (2 * steps);
    float v[8];
    const T* const at = m + (row + r) * stride + first + c * 8;
    const int64_t count = row + r < rows ? ranks - first - c * 8 : 0;
    load_eight(v, at, count, aligned);
    for (int64_t i = 1; i < parts; i++) {
      float more[8];
      load_eight(more, at + i * part, count, aligned);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] += more[j];
    }
    alignas(16) __nv_bfloat16 high[8], low[8];
#pragma unroll
    for (int j = 0; j < 8; j++) split(v[j], high[j], low[j]);
    *reinterpret_cast<uint4*>(piece(tile, r, c)) = *reinterpret_cast<uint4*>(high);
    if (rest) *reinterpret_cast<uint4*>(piece(rest, r, c)) = *reinterpret_cast<uint4*>(low);
  }
}

}  // namespace lk
