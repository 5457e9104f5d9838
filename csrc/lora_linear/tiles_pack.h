// The operands of cpu_tiles.cpp, packed into tiles: x, h and A once, W and B panel by panel.
#pragma once
#include <algorithm>

#include "../common/amx.h"
#include "params.h"

namespace lk::LK_LEVEL {

// Steps of depth, a tile each: first of the rank, then of the features.
struct Depth {
  int64_t features, ranks;  // steps
  // bf16 numbers for an element of x and of A, pairs of them for h and B
  int64_t x_parts, a_parts, h_parts;
  int64_t more() const { return h_parts * ranks; }
  int64_t all() const { return more() + features; }
  int64_t column() const { return (more() + features * x_parts) * TILE; }  // of packed x: 16 tokens
};

// x's tiles of 16 tokens at one step of the features
template <bool BACK>
void x_tiles(const Tiles& p, const Depth& d, const float* gain, int64_t t, int64_t step, bf16* to) {
  const int64_t k = step * DEPTH, tokens = p.tokens - t;
  if (d.x_parts == 1 && p.x.col == 1) {
    const auto* x = static_cast<const bf16*>(p.x.data) + t * p.x.row + k;
    BACK ? left_tile(x, p.x.row, tokens, p.n_in - k, to) : pack_rows(x, p.x.row, tokens, p.n_in - k, to);
    return;
  }
  alignas(64) bf16 parts[3][TILE];
  with_type(p.x, [&](auto* x) {
    split(x + t * p.x.row + k * p.x.col, p.x.row, p.x.col, tokens, p.n_in - k, gain ? gain + k : nullptr, d.x_parts,
          parts);
  });
  for (int64_t i = 0; i < d.x_parts; i++) pack_tile<BACK>(parts[i], to + i * TILE);
}

// h's tiles of 16 tokens: parts high, low, high
template <bool BACK>
void h_tiles(const Tiles& p, const Depth& d, int64_t t, bf16* to) {
  const View h{p.h, p.rank, 1, DType::f32};
  alignas(64) bf16 parts[2][TILE];
  for (int64_t k = 0; k < d.ranks; k++) {
    split(h, t, p.tokens, k * DEPTH, p.rank, 2, parts);
    for (int64_t i = 0; i < d.h_parts; i++) pack_tile<BACK>(parts[i == 1], to + (i * d.ranks + k) * TILE);
  }
}

// A's tiles at one step of the features: [rank / 16] apart by `column`
template <bool BACK>
void a_tiles(const Tiles& p, const Depth& d, int64_t step, int64_t column, bf16* to) {
  alignas(64) bf16 parts[2][TILE];
  for (int64_t j = 0; j < p.rank; j += ROWS, to += column) {
    split(p.a, j, p.rank, step * DEPTH, p.n_in, d.a_parts, parts);
    for (int64_t i = 0; i < d.a_parts; i++) pack_tile<!BACK>(parts[i], to + (step * d.a_parts + i) * TILE);
  }
}

// W, or a piece of it, from output n and depth k
struct Piece {
  const bf16* at;
  int64_t row, n, k;
};

// the two tiles of outputs n..n+32 at one step: of B, parts high, high, low, or of W
template <bool BACK>
LK_INLINE void w_tiles(const Tiles& p, const Depth& d, const Piece& w, int64_t n, int64_t step, bf16* to) {
  if (step < d.more()) {
    alignas(64) bf16 parts[2][TILE];
    const int64_t k = step % d.ranks * DEPTH, low = step / d.ranks == 2;
    for (int64_t i = 0; i < 2; i++, to += TILE) {
      const int64_t rows = p.n_out - n - i * ROWS;
      if (rows > 0) {
        split(p.b, n + i * ROWS, p.n_out, k, p.rank, 1 + low, parts);
        pack_tile<!BACK>(parts[low], to);
      } else {
        std::fill_n(to, TILE, bf16{0});
      }
    }
    return;
  }
  const int64_t k = (step - d.more()) * DEPTH, depth = p.n_in - k;
  for (int64_t i = 0; i < 2; i++, n += ROWS, to += TILE) {
    if (BACK) pack_pairs(w.at + (k - w.k) * w.row + n - w.n, w.row, p.n_out - n, depth, to);
    else left_tile(w.at + (n - w.n) * w.row + k - w.k, w.row, p.n_out - n, depth, to);
  }
}

}  // namespace lk::LK_LEVEL
