// bf16 matrix products with float32 sums and results on AMX tiles: y = x Wᵀ and y = x W.
// The vendor's bf16 product rounds its result, before the adapter's term is added; this one does not.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>

#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t ROWS = 16, DEPTH = 32;        // a tile: 16 rows of 32 bf16, or of 16 floats
constexpr int64_t COLUMNS = 256, CHUNK = 1024;  // packed at a time: 512 KiB, a quarter of the second-level cache
constexpr int64_t TILE = ROWS * DEPTH;          // elements of a packed tile

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

// With w [depth, columns], two rows of w are interleaved:
LK_INLINE void pack_pairs(const bf16* w, int64_t w_row, int64_t columns, int64_t depth, bf16* to) {
  const __mmask16 mask = columns >= 16 ? 0xffff : __mmask16((1u << columns) - 1);
  for (int i = 0; i < 16; i++) {
    const auto row = [&](int64_t d) {
      return d < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w + d * w_row)) : _mm512_setzero_si512();
    };
    _mm512_store_si512(to + i * DEPTH, _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16)));
  }
}

// y [16·TM, 16·TN] (+)= x [16·TM, 32·steps] times TN columns of packed tiles, `column` elements apart
template <int TM, int TN>
LK_INLINE void tiles(const bf16* x, int64_t x_row, const bf16* w, int64_t column, int64_t steps, float* y,
                     int64_t y_row, bool add) {
  const auto x_bytes = x_row * 2, y_bytes = y_row * 4;
  if (add) {
    _tile_loadd(0, y, y_bytes);
    if constexpr (TN > 1) _tile_loadd(1, y + ROWS, y_bytes);
    if constexpr (TM > 1) _tile_loadd(2, y + ROWS * y_row, y_bytes);
    if constexpr (TM > 1 && TN > 1) _tile_loadd(3, y + ROWS * y_row + ROWS, y_bytes);
  } else {
    _tile_zero(0);
    if constexpr (TN > 1) _tile_zero(1);
    if constexpr (TM > 1) _tile_zero(2);
    if constexpr (TM > 1 && TN > 1) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, x + s * DEPTH, x_bytes);
    if constexpr (TM > 1) _tile_loadd(5, x + ROWS * x_row + s * DEPTH, x_bytes);
    _tile_loadd(6, w + s * TILE, 64);
    if constexpr (TN > 1) _tile_loadd(7, w + column + s * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TN > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (TM > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (TM > 1 && TN > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, y, y_bytes);
  if constexpr (TN > 1) _tile_stored(1, y + ROWS, y_bytes);
  if constexpr (TM > 1) _tile_stored(2, y + ROWS * y_row, y_bytes);
  if constexpr (TM > 1 && TN > 1) _tile_stored(3, y + ROWS * y_row + ROWS, y_bytes);
}

// all tokens times the packed columns
void block(const bf16* x, int64_t x_row, const bf16* w, int64_t column, int64_t steps, float* y, int64_t y_row,
           bool add, int64_t tokens, int64_t columns) {
  for (int64_t t = 0; t < tokens; t += 2 * ROWS) {
    for (int64_t j = 0; j < columns; j += 2 * ROWS) {
      const bf16 *from = x + t * x_row, *right = w + j / ROWS * column;
      float* to = y + t * y_row + j;
      const bool two_rows = tokens - t > ROWS, two_columns = columns - j > ROWS;
      if (two_rows && two_columns) tiles<2, 2>(from, x_row, right, column, steps, to, y_row, add);
      else if (two_rows) tiles<2, 1>(from, x_row, right, column, steps, to, y_row, add);
      else if (two_columns) tiles<1, 2>(from, x_row, right, column, steps, to, y_row, add);
      else tiles<1, 1>(from, x_row, right, column, steps, to, y_row, add);
    }
  }
}

}  // namespace

void matmul(const Matmul& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    const Buffer buffer(COLUMNS * CHUNK / 2);
    auto* packed = reinterpret_cast<bf16*>(buffer.get());
    const auto *x = static_cast<const bf16*>(p.x.data), *w = static_cast<const bf16*>(p.w.data);
    const Range mine = share(p.n_out, 2 * ROWS, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t j = mine.first; j < mine.last; j += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, mine.last - j);
      for (int64_t k = 0; k < p.n_in; k += CHUNK) {
        const int64_t depth = std::min(CHUNK, p.n_in - k), steps = (depth + DEPTH - 1) / DEPTH;
        // along the rows of w, as they lie in memory
        const int64_t outer = p.transposed ? (columns + ROWS - 1) / ROWS : steps;
        const int64_t inner = p.transposed ? steps : (columns + ROWS - 1) / ROWS;
        for (int64_t o = 0; o < outer; o++) {
          for (int64_t i = 0; i < inner; i++) {
            const int64_t c = (p.transposed ? o : i) * ROWS, s = p.transposed ? i : o;
            bf16* to = packed + (c / ROWS * steps + s) * TILE;
            const int64_t row = p.transposed ? j + c : k + s * DEPTH, col = p.transposed ? k + s * DEPTH : j + c;
            const bf16* from = w + row * p.w.row + col;
            if (p.transposed) pack_rows(from, p.w.row, columns - c, depth - s * DEPTH, to);
            else pack_pairs(from, p.w.row, columns - c, depth - s * DEPTH, to);
          }
        }
        block(x + k, p.x.row, packed, steps * TILE, steps, p.y + j, p.y_row, k > 0, p.tokens, columns);
      }
    }
    _tile_release();
  }
}

namespace {

// 16 rows and 32 columns of w, beyond which there are zeros
LK_INLINE void left_tile(const bf16* w, int64_t w_row, int64_t rows, int64_t depth, bf16* to) {
  for (int i = 0; i < ROWS; i++) {
    _mm512_store_si512(to + i * DEPTH, i < rows ? row_of(w + i * w_row, depth) : _mm512_setzero_si512());
  }
}

// sums [16·TM rows of w, 16·TN tokens]; x is packed, TN columns of tiles `column` elements apart
template <int TM, int TN>
LK_INLINE void few_tiles(const bf16* w, int64_t w_row, int64_t rows, const bf16* x, int64_t column, int64_t n_in,
                         float* sums) {
  static_assert(TM * TN <= 4 && TM <= 2, "four sums, two left tiles, two right tiles");
  alignas(64) bf16 padded[2 * TILE];
  _tile_zero(0);
  if constexpr (TM * TN > 1) _tile_zero(1);
  if constexpr (TM * TN > 2) _tile_zero(2);
  if constexpr (TM * TN > 3) _tile_zero(3);
  for (int64_t k = 0; k < n_in; k += DEPTH, x += TILE) {
    if (rows >= TM * ROWS && n_in - k >= DEPTH) {
      _tile_loadd(4, w + k, w_row * 2);
      if constexpr (TM > 1) _tile_loadd(5, w + ROWS * w_row + k, w_row * 2);
    } else {
      left_tile(w + k, w_row, rows, n_in - k, padded);
      _tile_loadd(4, padded, 64);
      if constexpr (TM > 1) {
        left_tile(w + ROWS * w_row + k, w_row, rows - ROWS, n_in - k, padded + TILE);
        _tile_loadd(5, padded + TILE, 64);
      }
    }
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TM == 2) _tile_dpbf16ps(1, 5, 6);
    if constexpr (TN > 1) {
      _tile_loadd(7, x + column, 64);
      if constexpr (TM == 2) {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    if constexpr (TN > 2) {
      _tile_loadd(6, x + 2 * column, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (TN > 3) {
      _tile_loadd(7, x + 3 * column, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (TM * TN > 1) _tile_stored(1, sums + ROWS * ROWS, 64);
  if constexpr (TM * TN > 2) _tile_stored(2, sums + 2 * ROWS * ROWS, 64);
  if constexpr (TM * TN > 3) _tile_stored(3, sums + 3 * ROWS * ROWS, 64);
}

// y[0:16, 0:16] = the transpose of a tile of sums, as far as there are tokens and columns
LK_INLINE void store_transposed(const float* sums, float* y, int64_t y_row, int64_t tokens, int64_t columns) {
  __m512i r[16];
  LK_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + i * ROWS);
  transpose(r);
  const __mmask16 mask = columns >= ROWS ? 0xffff : __mmask16((1u << columns) - 1);
  for (int i = 0; i < std::min(ROWS, tokens); i++) _mm512_mask_storeu_ps(y + i * y_row, mask, (__m512)r[i]);
}

template <int TM, int TN>
void few_rows(const Matmul& p, const bf16* x, int64_t column, Range mine) {
  alignas(64) float sums[4 * ROWS * ROWS];
  const auto* w = static_cast<const bf16*>(p.w.data);
  for (int64_t n = mine.first; n < mine.last; n += TM * ROWS) {
    few_tiles<TM, TN>(w + n * p.w.row, p.w.row, mine.last - n, x, column, p.n_in, sums);
    for (int64_t j = 0; j < TN; j++) {
      for (int64_t i = 0; i < TM && n + i * ROWS < mine.last; i++) {
        store_transposed(sums + (j * TM + i) * ROWS * ROWS, p.y + j * ROWS * p.y_row + n + i * ROWS, p.y_row,
                         p.tokens - j * ROWS, mine.last - n - i * ROWS);
      }
    }
  }
}

}  // namespace

void matmul_few(const Matmul& p) {
  const int64_t steps = (p.n_in + DEPTH - 1) / DEPTH, columns = (p.tokens + ROWS - 1) / ROWS, column = steps * TILE;
  const Buffer buffer(columns * column / 2);
  auto* packed = reinterpret_cast<bf16*>(buffer.get());
#pragma omp parallel num_threads(p.threads)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const auto* x = static_cast<const bf16*>(p.x.data);
    const Range mine = share(p.n_out, 2 * ROWS, thread, threads), packs = share(steps, 1, thread, threads);
    for (int64_t c = 0; c < columns; c++) {
      for (int64_t s = packs.first; s < packs.last; s++) {
        pack_rows(x + c * ROWS * p.x.row + s * DEPTH, p.x.row, p.tokens - c * ROWS, p.n_in - s * DEPTH,
                  packed + c * column + s * TILE);
      }
    }
#pragma omp barrier
    switch (columns) {
      case 1: few_rows<2, 1>(p, packed, column, mine); break;
      case 2: few_rows<2, 2>(p, packed, column, mine); break;
      case 3: few_rows<1, 3>(p, packed, column, mine); break;
      case 4: few_rows<1, 4>(p, packed, column, mine); break;
    }
    _tile_release();
  }
}

}  // namespace lk::LK_LEVEL
