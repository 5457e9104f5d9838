// AMX tiles of bf16: their configuration, and operands brought into their layout.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace lk::LK_LEVEL {

constexpr int64_t ROWS = 16, DEPTH = 32;  // a tile: 16 rows of 32 bf16, or of 16 floats
constexpr int64_t TILE = ROWS * DEPTH;    // elements of a packed tile

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

// One tile of the right operand, [16 pairs of depth, 16 columns, 2]; beyond the matrix it holds zeros.
// With w [columns, depth], each row of w gives one column:
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

}  // namespace lk::LK_LEVEL
