// Pieces of rows of a quantised W, as numbers of its type or as float32.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../common/vec.h"
#include "nibbles.h"
#include "params.h"
#include "steps.h"

namespace lk::LK_LEVEL {

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

// what all numbers of a block share
struct Block {
  float scale, zero;
  bool zeros;
};
LK_INLINE Block block_of(const Quantised& q, int64_t block) {
  return {scale_of(q, block), q.zeros ? q.zeros[block] : 0.f, q.zeros != nullptr};
}

// of a number of T, W's type or float; a store to W's own type rounds by itself
template <typename T>
LK_INLINE vec product(const Quantised& q, const Block& b, vec v) {
  if (b.zeros) {
    v -= splat(b.zero);
    if (q.zero_rounded) v = rounded(q.type, v);
  }
  v *= splat(b.scale);
  return std::is_same_v<T, float> ? rounded(q.type, v) : v;
}

template <typename T>
LK_INLINE void values_of(const Quantised& q, const Block& b, Values<T>& values) {
  for (int i = 0; i < 16; i += VL) store(values.of + i, product<T>(q, b, load(q.table + i)));
}

typedef int8_t signed_bytes __attribute__((vector_size(VL)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint8_t bytes __attribute__((vector_size(VL)));

LK_INLINE vec load_int8(const uint8_t* codes) {
#if LK_VL == 16  // the compiler makes single conversions of a vector's
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif LK_VL == 8
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  signed_bytes c;
  std::memcpy(&c, codes, sizeof c);
  return __builtin_convertvector(c, vec);
#endif
}

// No step has a subnormal float32 as its operand: processors may be slow at them, or take them for zero.
template <bool E5M2>
LK_INLINE vec load_float8(const uint8_t* codes) {
#if LK_VL == 16
  // float16 has the exponents of e5m2, and those of e4m3 with another bias
  __m256i c = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), 8);
  if constexpr (E5M2) return (vec)_mm512_cvtph_ps(c);
  c = _mm256_and_si256(_mm256_srai_epi16(c, 1), _mm256_set1_epi16(int16_t(0xbfff)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(c, _mm256_set1_epi16(0x7fff)),
                                                _mm256_set1_epi16(0x3f80));
  return (vec)_mm512_cvtph_ps(_mm256_mask_mov_epi16(c, nan, _mm256_set1_epi16(0x7fff))) * splat(256.f);
#elif LK_VL == 8
  __m128i c = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))), 8);
  if constexpr (E5M2) return (vec)_mm256_cvtph_ps(c);
  c = _mm_and_si128(_mm_srai_epi16(c, 1), _mm_set1_epi16(int16_t(0xbfff)));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(c, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x3f80));
  return (vec)_mm256_cvtph_ps(_mm_or_si128(c, _mm_and_si128(nan, _mm_set1_epi16(0x7fff)))) * splat(256.f);
#else
  constexpr int BITS = E5M2 ? 2 : 3, BIAS = E5M2 ? 15 : 7;
  constexpr uint32_t ONE = 1u << BITS;
  bytes loaded;
  std::memcpy(&loaded, codes, sizeof loaded);
  const uvec c = __builtin_convertvector(loaded, uvec), size = c & 0x7f, plain = (uvec)(size >= ONE);
  const ivec significand = (ivec)((size & (ONE - 1)) | (plain & ONE));
  const uvec exponent = size >> BITS, power = (exponent + (~plain & 1u)) + (127 - BIAS - BITS);
  uvec v = (uvec)(__builtin_convertvector(significand, vec) * (vec)(power << 23));
  const uvec nan = (uvec)(size > (E5M2 ? 0x7cu : 0x7eu)), infinite = (uvec)(size == (E5M2 ? 0x7cu : 0xffu));
  v = (v & ~(nan | infinite)) | (nan & 0x7fc00000u) | (infinite & 0x7f800000u);
  return (vec)(v | (c & 0x80) << 24);
#endif
}

// `count` numbers of one byte each, all of one block
template <typename T, typename Load>
LK_INLINE void convert(const Quantised& q, const Block& b, const uint8_t* codes, int64_t count, T* to,
                       Load load_codes) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(to + i, product<T>(q, b, load_codes(codes + i)));
  if (i < count) {
    uint8_t last[VL] = {};
    std::copy(codes + i, codes + count, last);
    store_first(to + i, product<T>(q, b, load_codes(last)), count - i);
  }
}

// numbers `at` to `at` + `count` of one block
template <bool LOW_FIRST, typename T>
LK_INLINE void pairs(const Quantised& q, const Values<T>& values, int64_t at, int64_t count, T* to) {
  if (at % 2) *to++ = values.of[LOW_FIRST ? q.codes[at / 2] >> 4 : q.codes[at / 2] & 15], at++, count--;
  if (count) look_up<LOW_FIRST>(values, q.codes + at / 2, count, to);
}
template <typename T>
LK_INLINE void halves(const Quantised& q, const Values<T>& values, int64_t at, int64_t count, T* to) {
  const int64_t half = q.numbers / 2, high = std::clamp<int64_t>(half - at, 0, count);
  if (high) look_up_half(values, 4, q.codes + at, high, to);
  if (high < count) look_up_half(values, 0, q.codes + (at + high - half), count - high, to + high);
}

// asks for the codes of W[n, k : k + count]
LK_INLINE void ask_for(const Quantised& q, int64_t n, int64_t k, int64_t count) {
  const bool bytes = q.code != Code::nibbles || q.order == Order::halves;
  int64_t at = (q.first + n) * q.n_in + q.column + k;
  if (q.order == Order::halves && at >= q.numbers / 2) at -= q.numbers / 2;
  const int64_t in_byte = bytes ? 1 : 2;
  for (int64_t i = at / in_byte; i < (at + count) / in_byte; i += 64) __builtin_prefetch(q.codes + i, 0, 2);
}

// how many rows of tiles are before that of a row of W
LK_INLINE int64_t tile_row(const Quantised& q, int64_t row) {
  if (!q.expert_rows) return row / q.block_rows;
  const int64_t tiles = (q.expert_rows + q.block_rows - 1) / q.block_rows;
  return row / q.expert_rows * tiles + row % q.expert_rows / q.block_rows;
}

// calls piece(block, at, count, to) for the numbers of each block in W[n, k : k + count]
template <typename T, typename Piece>
LK_INLINE void by_block(const Quantised& q, int64_t n, int64_t k, int64_t count, T* to, Piece piece) {
  const int64_t row = q.first + n, first = row * q.n_in + k, along = q.block_rows ? k : first;
  const int64_t before = q.block_rows ? tile_row(q, row) * ((q.n_in + q.block - 1) / q.block) : 0;
  int64_t block = before + along / q.block, some = q.block - along % q.block;
  for (int64_t i = 0; i < count; i += some, some = q.block, block++) {
    some = std::min(some, count - i);
    piece(block_of(q, block), first + i, some, to + i);
  }
}

// W[n, k : k + count]; T is the type of W or float
template <typename T>
void dequantise_row(const Quantised& q, int64_t n, int64_t k, int64_t count, T* to) {
  const auto bytes = [&](auto load_codes) {
    by_block(q, n, k, count, to, [&](const Block& b, int64_t at, int64_t some, T* piece) {
      convert(q, b, q.codes + at, some, piece, load_codes);
    });
  };
  const auto nibbles = [&](auto look) {
    by_block(q, n, k, count, to, [&](const Block& b, int64_t at, int64_t some, T* piece) {
      Values<T> values;
      values_of(q, b, values);
      look(values, at, some, piece);
    });
  };
  switch (q.code) {
    case Code::int8: return bytes([](const uint8_t* c) { return load_int8(c); });
    case Code::e4m3: return bytes([](const uint8_t* c) { return load_float8<false>(c); });
    case Code::e5m2: return bytes([](const uint8_t* c) { return load_float8<true>(c); });
    case Code::nibbles: break;
  }
  using Of = const Values<T>&;
  switch (q.order) {
    case Order::high_first:
      return nibbles([&](Of v, int64_t at, int64_t some, T* piece) { pairs<false>(q, v, at, some, piece); });
    case Order::low_first:
      return nibbles([&](Of v, int64_t at, int64_t some, T* piece) { pairs<true>(q, v, at, some, piece); });
    case Order::halves:
      return nibbles([&](Of v, int64_t at, int64_t some, T* piece) { halves(q, v, at, some, piece); });
  }
}

// to [rows, count] = W[n : n + rows, k : k + count]
template <typename T>
void dequantise_rows(const Quantised& q, int64_t n, int64_t rows, int64_t k, int64_t count, T* to, int64_t row) {
  if (!count) return;
  k += q.column;
#if LK_VL == 16
  if (in_steps(q) && k % STEP == 0 && count % STEP == 0) {
    if (q.code == Code::nibbles) return rows_in_steps<Nibbles>(q, n, rows, k, count, to, row);
    return rows_in_steps<Int8>(q, n, rows, k, count, to, row);
  }
#endif
  for (int64_t i = 0; i < rows; i++) dequantise_row(q, n + i, k, count, to + i * row);
}

}  // namespace lk::LK_LEVEL
