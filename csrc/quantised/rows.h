// Pieces of rows of a quantised W, as numbers of its type or as float32. A block's 16 values are
// multiplied and rounded once; codes are then places in a register.
#pragma once
#include <algorithm>

#include "../common/vec.h"
#include "params.h"
#include "steps.h"

namespace lk::LK_LEVEL {

// not fused with the addition that follows
LK_INLINE float apart(float v) {
  volatile float kept = v;
  return kept;
}

LK_INLINE float scale_of(const Quantised& q, int64_t block) {
  if (q.scales) return q.scales[block];
  return apart(q.outer_table[q.inner[block]] * q.outer[block / q.outer_block]) + *q.offset;
}

// as a number of `type` would be
LK_INLINE vec rounded(DType type, vec v) {
  if (type == DType::bf16) {
    bf16 narrow[VL];
    store(narrow, v);
    return load(narrow);
  }
  if (type == DType::f16) {
    f16 narrow[VL];
    store(narrow, v);
    return load(narrow);
  }
  return v;
}

// the 16 values of a block, twice
template <typename T>
struct Values {
  alignas(64) T of[32];
};
template <typename T>
LK_INLINE void values_of(const Quantised& q, float scale, Values<T>& values) {
  for (int i = 0; i < 16; i += VL) {
    const vec v = rounded(q.type, load(q.table + i) * splat(scale));
    store(values.of + i, v), store(values.of + 16 + i, v);
  }
}

// `count` values, of whole bytes from the first
template <typename T>
LK_INLINE void look_up(const Values<T>& values, const uint8_t* codes, int64_t count, T* to) {
  int64_t i = 0;
#if LK_VL == 16
  if constexpr (sizeof(T) == 2) {
    // each byte twice, side by side; the first of the two is shifted to its high half. A place has
    // five bits, the highest of which does not matter
    const __m128i twice = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i lane = _mm512_inserti64x4(_mm512_set1_epi8(0), _mm256_set1_epi8(8), 1);
    const __m512i half = _mm512_mask_blend_epi64(0xcc, _mm512_setzero_si512(), _mm512_set1_epi8(4));
    const __m512i bytes = _mm512_add_epi8(_mm512_broadcast_i32x4(twice), _mm512_add_epi8(lane, half));
    const __m512i high = _mm512_set1_epi32(4), table = _mm512_load_si512(values.of);
    for (; i + 32 <= count; i += 32) {
      const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(loaded), bytes);
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_srlv_epi16(spread, high), table));
    }
  } else {
    const __m512 table = _mm512_load_ps(values.of);
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi64(loaded);
      const __m512i places = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(places, table));
    }
  }
#elif LK_VL == 8
  if constexpr (sizeof(T) == 2) {
    const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(values.of));
    const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(values.of + 8));
    const __m128i odd = _mm_add_epi8(even, _mm_setr_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m128i low = _mm_unpacklo_epi64(_mm_shuffle_epi8(first, even), _mm_shuffle_epi8(second, even));
    const __m128i high = _mm_unpacklo_epi64(_mm_shuffle_epi8(first, odd), _mm_shuffle_epi8(second, odd));
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m128i mask = _mm_set1_epi8(15);
      const __m128i places =
          _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(loaded, 4), mask), _mm_and_si128(loaded, mask));
      const __m128i l = _mm_shuffle_epi8(low, places), h = _mm_shuffle_epi8(high, places);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_unpacklo_epi8(l, h));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + 8), _mm_unpackhi_epi8(l, h));
    }
  } else {
    const __m256 low = _mm256_load_ps(values.of), high = _mm256_load_ps(values.of + 8);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (; i + 8 <= count; i += 8) {
      int32_t loaded;
      std::memcpy(&loaded, codes + i / 2, 4);
      const __m256i places = _mm256_srlv_epi32(_mm256_set1_epi32(loaded), shifts);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));  // bit 3 as the sign
      const __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, places),
                                            _mm256_permutevar8x32_ps(high, places), upper);
      _mm256_storeu_ps(to + i, found);
    }
  }
#endif
  for (; i < count; i++) to[i] = values.of[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
}

typedef int8_t signed_bytes __attribute__((vector_size(VL)));
typedef uint8_t bytes __attribute__((vector_size(VL)));

LK_INLINE vec value_of(Code code, const uint8_t* codes) {
  if (code == Code::int8) {
    signed_bytes c;
    std::memcpy(&c, codes, sizeof c);
    return __builtin_convertvector(c, vec);
  }
  bytes c;
  std::memcpy(&c, codes, sizeof c);
  const uvec u = __builtin_convertvector(c, uvec), size = u & 0x7f;
  // the exponent's bias is 127 - 120; what is subnormal there is a plain number here
  const vec v = (vec)((u & 0x80) << 24 | size << 20) * splat(0x1p120f);
  const uvec nan = (uvec)(size == 0x7f);
  return (vec)(((uvec)v & ~nan) | (0x7fc00000u & nan));
}

// `count` numbers of one byte each, all of one scale
template <typename T>
LK_INLINE void convert(const Quantised& q, const uint8_t* codes, int64_t count, float scale, T* to) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(to + i, rounded(q.type, value_of(q.code, codes + i) * splat(scale)));
  if (i < count) {
    uint8_t last[VL] = {};
    std::copy(codes + i, codes + count, last);
    store_first(to + i, rounded(q.type, value_of(q.code, last) * splat(scale)), count - i);
  }
}

// asks for the codes of W[n, k : k + count]
LK_INLINE void ask_for(const Quantised& q, int64_t n, int64_t k, int64_t count) {
  const int64_t at = (q.first + n) * q.n_in + k, in_byte = q.code == Code::nibbles ? 2 : 1;
  for (int64_t i = at / in_byte; i < (at + count) / in_byte; i += 64) __builtin_prefetch(q.codes + i, 0, 2);
}

// W[n, k : k + count]; T is the type of W or float
template <typename T>
void dequantise_row(const Quantised& q, int64_t n, int64_t k, int64_t count, T* to) {
  int64_t at = (q.first + n) * q.n_in + k, block = at / q.block;
  for (const int64_t end = at + count; at < end; block++) {
    const int64_t next = std::min(end, (block + 1) * q.block);
    const float scale = scale_of(q, block);
    if (q.code == Code::nibbles) {
      Values<T> values;
      values_of(q, scale, values);
      if (at % 2) *to++ = values.of[q.codes[at / 2] & 15], at++;
      if (at < next) look_up(values, q.codes + at / 2, next - at, to);
    } else {
      convert(q, q.codes + at, next - at, scale, to);
    }
    to += next - at, at = next;
  }
}

// to [rows, count] = W[n : n + rows, k : k + count]
template <typename T>
void dequantise_rows(const Quantised& q, int64_t n, int64_t rows, int64_t k, int64_t count, T* to, int64_t row) {
#if LK_VL == 16
  if (in_steps(q) && k % STEP == 0 && count % STEP == 0) {
    if (q.code == Code::nibbles) return rows_in_steps<Nibbles>(q, n, rows, k, count, to, row);
    return rows_in_steps<Int8>(q, n, rows, k, count, to, row);
  }
#endif
  for (int64_t i = 0; i < rows; i++) dequantise_row(q, n + i, k, count, to + i * row);
}

}  // namespace lk::LK_LEVEL
