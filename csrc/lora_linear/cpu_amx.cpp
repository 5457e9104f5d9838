// The bf16 product of the backward pass, y = x W, with float32 sums and results on AMX tiles.
// The vendor's bf16 product rounds its result, before the adapter's term is added; this one does not.
#include <omp.h>

#include <algorithm>

#include "../common/amx.h"
#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t COLUMNS = 256, CHUNK = 1024;  // packed at a time: 512 KiB, a quarter of the second-level cache

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
        for (int64_t s = 0; s < steps; s++) {
          for (int64_t c = 0; c < columns; c += ROWS) {
            pack_pairs(w + (k + s * DEPTH) * p.w.row + j + c, p.w.row, columns - c, depth - s * DEPTH,
                       packed + (c / ROWS * steps + s) * TILE);
          }
        }
        block(x + k, p.x.row, packed, steps * TILE, steps, p.y + j, p.y_row, k > 0, p.tokens, columns);
      }
    }
    _tile_release();
  }
}

}  // namespace lk::LK_LEVEL
