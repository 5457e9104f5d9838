// Values of 4-bit codes: a block's 16 values lie in registers, codes are places there.
#pragma once
#include "../common/vec.h"
#include "params.h"

namespace lk::LK_LEVEL {

// the 16 values of a block
template <typename T>
struct Values {
  alignas(64) T of[16];
};

#if LK_VL == 16
// at every place whose low four bits are the code; stored and loaded in one size, which is quick
LK_INLINE __m512i in_register(const Values<float>& values) { return _mm512_load_si512(values.of); }
template <typename T>
LK_INLINE __m512i in_register(const Values<T>& values) {
  return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values.of)));
}
#elif LK_VL == 8
// 16 values of two bytes: their low bytes and their high ones
struct Halves {
  __m128i low, high;
};
template <typename T>
LK_INLINE Halves in_registers(const Values<T>& values) {
  const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i odd = _mm_add_epi8(even, _mm_setr_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(values.of));
  const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(values.of + 8));
  return {_mm_unpacklo_epi64(_mm_shuffle_epi8(first, even), _mm_shuffle_epi8(second, even)),
          _mm_unpacklo_epi64(_mm_shuffle_epi8(first, odd), _mm_shuffle_epi8(second, odd))};
}
template <typename T>
LK_INLINE void found(const Halves& values, __m128i places, T* to) {
  const __m128i l = _mm_shuffle_epi8(values.low, places), h = _mm_shuffle_epi8(values.high, places);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(l, h));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi8(l, h));
}
// places of 32 bits, of which the low four count
LK_INLINE void found(const Values<float>& values, __m256i places, float* to) {
  const __m256 low = _mm256_load_ps(values.of), high = _mm256_load_ps(values.of + 8);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));  // bit 3 as the sign
  _mm256_storeu_ps(
      to, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, places), _mm256_permutevar8x32_ps(high, places), upper));
}
#endif

// `count` values of bytes that hold two numbers each, from the first of them
template <bool LOW_FIRST, typename T>
LK_INLINE void look_up(const Values<T>& values, const uint8_t* codes, int64_t count, T* to) {
  int64_t i = 0;
#if LK_VL == 16
  const __m512i table = in_register(values);
  if constexpr (sizeof(T) == 2) {
    // each byte twice, side by side; that of the number in the high half is shifted
    const __m128i twice = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i lane = _mm512_inserti64x4(_mm512_set1_epi8(0), _mm256_set1_epi8(8), 1);
    const __m512i half = _mm512_mask_blend_epi64(0xcc, _mm512_setzero_si512(), _mm512_set1_epi8(4));
    const __m512i bytes = _mm512_add_epi8(_mm512_broadcast_i32x4(twice), _mm512_add_epi8(lane, half));
    const __m512i shifts = _mm512_set1_epi32(LOW_FIRST ? 4 << 16 : 4);
    for (; i + 32 <= count; i += 32) {
      const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(loaded), bytes);
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_srlv_epi16(spread, shifts), table));
    }
  } else {
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi64(loaded);
      const __m512i first = LOW_FIRST ? wide : _mm512_srli_epi64(wide, 4);
      const __m512i places = _mm512_or_si512(first, _mm512_slli_epi64(wide, LOW_FIRST ? 28 : 32));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(places, _mm512_castsi512_ps(table)));
    }
  }
#elif LK_VL == 8
  if constexpr (sizeof(T) == 2) {
    const Halves halves = in_registers(values);
    const __m128i mask = _mm_set1_epi8(15);
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(loaded, 4), mask), low = _mm_and_si128(loaded, mask);
      found(halves, LOW_FIRST ? _mm_unpacklo_epi8(low, high) : _mm_unpacklo_epi8(high, low), to + i);
    }
  } else {
    const __m256i swap = _mm256_set1_epi32(LOW_FIRST ? 4 : 0);
    const __m256i shifts = _mm256_xor_si256(_mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24), swap);
    for (; i + 8 <= count; i += 8) {
      int32_t loaded;
      std::memcpy(&loaded, codes + i / 2, 4);
      found(values, _mm256_srlv_epi32(_mm256_set1_epi32(loaded), shifts), to + i);
    }
  }
#endif
  for (; i < count; i++) to[i] = values.of[(i % 2 != 0) == LOW_FIRST ? codes[i / 2] >> 4 : codes[i / 2] & 15];
}

// `count` values of one half of a byte each, that at bit `shift`
template <typename T>
LK_INLINE void look_up_half(const Values<T>& values, int shift, const uint8_t* codes, int64_t count, T* to) {
  int64_t i = 0;
#if LK_VL == 16
  const __m512i table = in_register(values);
  const __m128i by = _mm_cvtsi32_si128(shift);
  if constexpr (sizeof(T) == 2) {
    for (; i + 32 <= count; i += 32) {
      const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      const __m512i places = _mm512_srl_epi16(_mm512_cvtepu8_epi16(loaded), by);
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(places, table));
    }
  } else {
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      const __m512i places = _mm512_srl_epi32(_mm512_cvtepu8_epi32(loaded), by);
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(places, _mm512_castsi512_ps(table)));
    }
  }
#elif LK_VL == 8
  const __m128i by = _mm_cvtsi32_si128(shift);
  if constexpr (sizeof(T) == 2) {
    const Halves halves = in_registers(values);
    for (; i + 16 <= count; i += 16) {
      const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      found(halves, _mm_and_si128(_mm_srl_epi16(loaded, by), _mm_set1_epi8(15)), to + i);
    }
  } else {
    for (; i + 8 <= count; i += 8) {
      const __m128i loaded = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
      found(values, _mm256_srl_epi32(_mm256_cvtepu8_epi32(loaded), by), to + i);
    }
  }
#endif
  for (; i < count; i++) to[i] = values.of[codes[i] >> shift & 15];
}

}  // namespace lk::LK_LEVEL
