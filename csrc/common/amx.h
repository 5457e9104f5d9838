// Operands of bf16 brought into the layout of AMX tiles and of vdpbf16ps, and the tiles' configuration.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace lk::LK_LEVEL {

constexpr int64_t ROWS = 16, DEPTH = 32;  // a tile: 16 rows of 32 bf16, or of 16 floats
constexpr int64_t TILE = ROWS * DEPTH;    // elements of a packed tile
constexpr int64_t SQUARE = ROWS * ROWS;   // sums of one tile

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

LK_INLINE __m512i row_of(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= DEPTH ? ~0u : n > 0 ? (1u << n) - 1 : 0u, p);
}

// transposes 16 rows of 16 32-bit words
LK_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  LK_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  LK_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  LK_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  LK_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// One tile of the right operand, [16 pairs of depth, 16 columns, 2]; beyond the matrix it holds
// zeros. With w [columns, depth], each row of w gives one column:
LK_INLINE void pack_rows(const bf16* w, int64_t w_row, int64_t columns, int64_t depth, bf16* to) {
  __m512i r[16];
  LK_UNROLL for (int i = 0; i < 16; i++) r[i] = i < columns ? row_of(w + i * w_row, depth) : _mm512_setzero_si512();
  transpose(r);
  LK_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * DEPTH, r[i]);
}

// 16 rows and 32 columns of w, beyond which there are zeros
LK_INLINE void left_tile(const bf16* w, int64_t w_row, int64_t rows, int64_t depth, bf16* to) {
  for (int i = 0; i < ROWS; i++) {
    _mm512_store_si512(to + i * DEPTH, i < rows ? row_of(w + i * w_row, depth) : _mm512_setzero_si512());
  }
}

LK_INLINE __mmask16 lanes(int64_t n) { return n >= ROWS ? 0xffff : n > 0 ? __mmask16((1u << n) - 1) : 0; }

// the first n of 16, zeros beyond
LK_INLINE vec first_of(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps(lanes(n), p); }
LK_INLINE vec first_of(const bf16* p, int64_t n) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16);
}
LK_INLINE vec first_of(const f16* p, int64_t n) { return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }

// m[0:rows, 0:columns] as 16 rows of 32 floats, zeros beyond
template <typename T>
LK_INLINE void widen(const T* m, int64_t row, int64_t col, int64_t rows, int64_t columns, float* to) {
  for (int64_t half = 0; half < DEPTH; half += ROWS) {
    __m512i r[16];
    if (row == 1) {
      for (int64_t c = 0; c < ROWS; c++) {
        r[c] = half + c < columns ? (__m512i)first_of(m + (half + c) * col, rows) : _mm512_setzero_si512();
      }
      transpose(r);
    } else if (col == 1) {
      for (int64_t i = 0; i < ROWS; i++) {
        r[i] = i < rows ? (__m512i)first_of(m + i * row + half, columns - half) : _mm512_setzero_si512();
      }
    } else {
      alignas(64) float v[SQUARE] = {};
      for (int64_t i = 0; i < std::min(ROWS, rows); i++) {
        for (int64_t c = 0; c < std::min(ROWS, columns - half); c++) {
          v[i * ROWS + c] = to_float(m[i * row + (half + c) * col]);
        }
      }
      for (int64_t i = 0; i < ROWS; i++) r[i] = _mm512_load_si512(v + i * ROWS);
    }
    for (int64_t i = 0; i < ROWS; i++) _mm512_store_si512(to + i * DEPTH + half, r[i]);
  }
}

// gain ⊙ m[0:rows, 0:columns], 16 rows of 32 with zeros beyond, as the sum of `parts` bf16 numbers
template <typename T>
void split(const T* m, int64_t row, int64_t col, int64_t rows, int64_t columns, const float* gain, int64_t parts,
           bf16 (*to)[TILE]) {
  alignas(64) float v[TILE];
  widen(m, row, col, rows, columns, v);
  for (int64_t i = 0; i < TILE; i += VL) {
    vec rest = gain ? load(v + i) * load(gain + i % DEPTH) : load(v + i);
    for (int64_t j = 0; j < parts; j++) {
      const auto part = (__m256i)_mm512_cvtneps_pbh((__m512)rest);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to[j] + i), part);
      rest -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
      rest = (vec)((uvec)rest & (uvec)(rest - rest == 0));  // 0 where it is not finite
    }
  }
}
// the same of a View, rows from `first` and columns from k
inline void split(const View& m, int64_t first, int64_t rows, int64_t k, int64_t columns, int64_t parts,
                  bf16 (*to)[TILE]) {
  with_type(m, [&](auto* p) {
    split(p + first * m.row + k * m.col, m.row, m.col, rows - first, columns - k, nullptr, parts, to);
  });
}

// One tile of an operand from 16 rows of 32: a left one as it is, a right one with pairs of columns
// side by side.
template <bool LEFT>
LK_INLINE void pack_tile(const bf16* rows, bf16* to) {
  if (!LEFT) return pack_rows(rows, DEPTH, ROWS, DEPTH, to);
  LK_UNROLL for (int64_t i = 0; i < TILE; i += DEPTH) _mm512_store_si512(to + i, _mm512_load_si512(rows + i));
}

// with w [depth, outputs], two rows of w are interleaved
LK_INLINE void pack_pairs(const bf16* w, int64_t w_row, int64_t outputs, int64_t depth, bf16* to) {
  const __mmask16 mask = lanes(outputs);
  for (int i = 0; i < ROWS; i++) {
    const auto row = [&](int64_t d) {
      return d < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w + d * w_row)) : _mm512_setzero_si512();
    };
    _mm512_store_si512(to + i * DEPTH, _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16)));
  }
}

}  // namespace lk::LK_LEVEL
