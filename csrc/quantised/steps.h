// W's codes with AVX-512 in whole steps of 32 numbers: of 4 bits a block's 16 values lie in one
// register, codes are places there. 64 numbers are 32 bytes and, as bf16, 16 instructions; the
// scales of a piece are read first, all at once.
#pragma once
#include <algorithm>

#include "../common/vec.h"
#include "params.h"

namespace lk::LK_LEVEL {

// 2^(exponent - 127); 255 is no number
LK_INLINE float power(uint32_t exponent) {
  const uint32_t bits = exponent == 255 ? 0x7fc00000 : exponent ? exponent << 23 : 0x00400000;
  float p;
  std::memcpy(&p, &bits, 4);
  return p;
}

// not fused with the addition that follows
LK_INLINE float apart(float v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
  return v;
#else
  volatile float kept = v;
  return kept;
#endif
}

// `shift`: that of a division by outer_block, or -1
LK_INLINE float scale_of(const Quantised& q, int64_t block, int shift = -1) {
  if (q.scales) return q.scales[block];
  if (q.exponents) return power(q.exponents[block]);
  const int64_t outer = shift < 0 ? block / q.outer_block : block >> shift;
  return apart(q.outer_table[q.inner[block]] * q.outer[outer]) + *q.offset;
}

#if LK_VL == 16
constexpr int64_t STEP = 32, MOST_SCALES = 64;
constexpr int64_t AHEAD = 4096;  // numbers of a piece of rows after which its codes are asked for

// whether rows are whole steps, each of one scale, without zeros
LK_INLINE bool in_steps(const Quantised& q) {
  const bool codes = q.code == Code::int8 || (q.code == Code::nibbles && q.order != Order::halves);
  return codes && !q.zeros && !q.block_rows && q.block % STEP == 0 && q.n_in % STEP == 0;
}

// the scales of `count` blocks, or where they lie; `shift` is that of a division by outer_block, or -1
LK_INLINE const float* scales_of(const Quantised& q, int shift, int64_t first, int64_t count, float* to) {
  if (q.scales) return q.scales + first;
  if (q.exponents) {
    for (int64_t i = 0; i < count; i++) to[i] = power(q.exponents[first + i]);
    return to;
  }
  for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(q.inner + first + count + i);
  for (int64_t i = 0; i < count;) {
    const int64_t outer = shift < 0 ? (first + i) / q.outer_block : (first + i) >> shift;
    const int64_t last = std::min(count, (outer + 1) * q.outer_block - first);
    const float by = q.outer[outer];
    const uint8_t* inner = q.inner + first;
    LK_UNROLL for (; i < last; i++) to[i] = q.outer_table[inner[i]] * by;
  }
  asm volatile("" ::: "memory");  // not fused with the multiplication
  for (int64_t i = 0; i < count; i++) to[i] += *q.offset;
  return to;
}
LK_INLINE int shift_of(int64_t by) { return by & (by - 1) ? -1 : __builtin_ctzll(uint64_t(by)); }

#if defined(__AVX512BF16__)
// what enters a product as zero there, below 2⁻¹²⁶, is zero here
LK_INLINE __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
LK_INLINE __m256i narrow(__m512 v) {
  alignas(32) bf16 kept[VL];
  store(kept, (vec)v);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(kept));
}
#endif

// v as W's type has it, in 16 bits or in float32; 16 bits twice
template <typename T>
LK_INLINE __m512i rounded_once(DType type, __m512 v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) return (__m512i)_mm512_cvtne2ps_pbh(v, v);
#endif
  if constexpr (sizeof(T) == 2) {
    const bool brain = std::is_same_v<T, bf16>;
    return _mm512_broadcast_i64x4(brain ? narrow(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    if (type == DType::bf16) v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v)), 16));
    if (type == DType::f16) v = _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_castps_si512(v);
  }
}

// 4-bit codes, two in a byte
struct Nibbles {
  __m512 table;
  __m512i bytes, shifts, pairs;
  LK_INLINE explicit Nibbles(const Quantised& q) : table(_mm512_loadu_ps(q.table)) {
    // each byte twice, side by side; that of the number in the high half is shifted
    const __m128i twice = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i lane = _mm512_inserti64x4(_mm512_set1_epi8(0), _mm256_set1_epi8(8), 1);
    const __m512i half = _mm512_mask_blend_epi64(0xcc, _mm512_setzero_si512(), _mm512_set1_epi8(4));
    bytes = _mm512_add_epi8(_mm512_broadcast_i32x4(twice), _mm512_add_epi8(lane, half));
    const bool low_first = q.order == Order::low_first;
    shifts = _mm512_set1_epi32(low_first ? 4 << 16 : 4);
    const __m512i high_first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    pairs = _mm512_xor_si512(high_first, _mm512_set1_epi32(low_first ? 16 : 0));
  }
  static constexpr int64_t BYTES = STEP / 2;
  using Scale = __m512i;  // the values of a block
  template <typename T>
  LK_INLINE Scale scale(const Quantised& q, float of) const {
    return rounded_once<T>(q.type, table * _mm512_set1_ps(of));
  }
  // 32 numbers of 16 bits; bit 4 of a place does not matter, there are the same values above
  LK_INLINE __m512i step(const uint8_t* codes, Scale values) const {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(loaded), bytes);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(spread, shifts), values);
  }
  template <typename T>
  LK_INLINE void step(const Quantised&, const uint8_t* codes, Scale values, T* to) const {
    if constexpr (sizeof(T) == 2) {
      _mm512_storeu_si512(to, step(codes, values));
      return;
    } else {
      const __m512 of = _mm512_castsi512_ps(values);
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), of), low = _mm512_permutexvar_ps(wide, of);
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(high, pairs, low));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(high, _mm512_add_epi32(pairs, _mm512_set1_epi32(8)), low));
    }
  }
};

struct Int8 {
  LK_INLINE explicit Int8(const Quantised&) {}
  static constexpr int64_t BYTES = STEP;
  using Scale = __m512;
  template <typename T>
  LK_INLINE Scale scale(const Quantised&, float of) const {
    return _mm512_set1_ps(of);
  }
  static LK_INLINE __m512 half(const uint8_t* codes, Scale scale) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))) * scale;
  }
  // 32 bf16 numbers
  LK_INLINE __m512i step(const uint8_t* codes, Scale scale) const {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(half(codes + 16, scale), half(codes, scale));
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(half(codes, scale))), narrow(half(codes + 16, scale)), 1);
#endif
  }
  template <typename T>
  LK_INLINE void step(const Quantised& q, const uint8_t* codes, Scale scale, T* to) const {
    if constexpr (std::is_same_v<T, bf16>) {
      _mm512_storeu_si512(to, step(codes, scale));
      return;
    } else {
      for (int i = 0; i < 2; i++) {
        const __m512 v = half(codes + i * VL, scale);
        if constexpr (std::is_same_v<T, float>) store(to + i * VL, (vec)rounded_once<float>(q.type, v));
        else store(to + i * VL, (vec)v);
      }
    }
  }
};

// the same of pieces of whole blocks of 64 numbers, as most weights have them
template <typename C, typename T>
LK_INLINE void rows_of_blocks(const Quantised& q, int64_t n, int64_t rows, int64_t k, int64_t count, T* to,
                              int64_t row) {
  constexpr int64_t SIZE = 2 * STEP;
  const Quantised here = q;  // which no store to `to` can change
  const C of(here);
  const int shift = shift_of(q.outer_block);
  const int64_t bytes = count * C::BYTES / STEP, ahead = std::max<int64_t>(1, AHEAD / count) * q.n_in * C::BYTES / STEP;
  const int64_t first = (q.first + n) * q.n_in + k;
  for (int64_t j = 0; j < rows; j++) {
    const int64_t block = (first + j * q.n_in) / SIZE;
    const uint8_t* codes = q.codes + block * 2 * C::BYTES;
    T* next = to + j * row;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + ahead + i);
    for (int64_t b = block; b < block + count / SIZE; b++, codes += 2 * C::BYTES, next += SIZE) {
      const auto by = of.template scale<T>(here, scale_of(here, b, shift));
      of.step(here, codes, by, next);
      of.step(here, codes + C::BYTES, by, next + STEP);
    }
  }
}

template <typename C, typename T>
LK_INLINE void rows_in_steps(const Quantised& q, int64_t n, int64_t rows, int64_t k, int64_t count, T* to,
                             int64_t row) {
  if (q.block == 2 * STEP && (q.n_in | k | count) % q.block == 0) {
    return rows_of_blocks<C>(q, n, rows, k, count, to, row);
  }
  const C of(q);
  float kept[MOST_SCALES];
  const int shift = shift_of(q.outer_block);
  const int64_t bytes = count * C::BYTES / STEP, ahead = std::max<int64_t>(1, AHEAD / count) * q.n_in * C::BYTES / STEP;
  // a division takes as long as a block: rows that begin with one need no more than the first
  const int64_t per_row = q.n_in % q.block ? 0 : q.n_in / q.block;
  int64_t at = (q.first + n) * q.n_in + k, block = at / q.block, blocks = (at + count - 1) / q.block - block + 1;
  for (int64_t j = 0; j < rows; j++, at += q.n_in - count, block += per_row) {
    const int64_t end = at + count;
    if (j && !per_row) block = at / q.block, blocks = (end - 1) / q.block - block + 1;
    T* next = to + j * row;
    const uint8_t* codes = q.codes + at * C::BYTES / STEP;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + ahead + i);
    int64_t stop = (block + 1) * q.block;
    for (int64_t i = 0; i < blocks; i += MOST_SCALES) {
      const int64_t some = std::min(MOST_SCALES, blocks - i);
      const float* scales = scales_of(q, shift, block + i, some, kept);
      for (int64_t b = 0; b < some; b++, stop += q.block) {
        const auto by = of.template scale<T>(q, scales[b]);
        for (const int64_t until = std::min(stop, end); at < until; at += STEP, codes += C::BYTES, next += STEP)
          of.step(q, codes, by, next);
      }
    }
  }
}

#endif

}  // namespace lk::LK_LEVEL
