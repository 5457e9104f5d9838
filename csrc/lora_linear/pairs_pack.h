// The operands of cpu_pairs.cpp. Of each product one side has its pairs of depth side by side for 16
// to 64 tokens or outputs, a lane each ("lanes"); those of the other side are broadcast ("rows").
#pragma once
#include <algorithm>

#include "../common/amx.h"
#include "../common/dot.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

constexpr int64_t BLOCK = 256;     // of depth: of 64 lanes 32 KiB
constexpr int64_t MAX_LANES = 64;  // four vectors of sums

LK_INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The depth, and the bf16 numbers that stand for one element. The adapter's depth is `more`: h, as
// the parts high, low, high, meets B's high, high, low.
struct Depth {
  int64_t padded;            // features
  int64_t ranks, more;       // whole pairs
  int64_t x_parts, w_parts;  // of x where it meets A, and where it meets W
  int64_t a_parts, h_parts;
  explicit Depth(const Tiles& p) {
    const bool scaled = p.back && p.gain.data;
    padded = up(p.n_in, DEPTH), ranks = up(p.rank, 2);
    x_parts = p.x.type == DType::f32 ? 3 : scaled ? 2 : 1;
    // x ⊙ gain is rounded once before it meets W, as y is after it, since a second product costs half
    // of the call; but not where the rank suffices for the adapter to cancel W
    w_parts = p.x.type == DType::bf16 && 2 * p.rank < std::min(p.n_in, p.n_out) ? 1 : x_parts;
    a_parts = p.a.type == DType::bf16 ? 1 : 2;
    // so is h where it is a good part of the call
    const bool rounds_h = p.rank >= MANY_RANKS && 2 * p.rank < std::min(p.n_in, p.n_out);
    h_parts = p.b.type != DType::bf16 ? 3 : rounds_h ? 1 : 2;
    more = h_parts * ranks;
  }
};

// Groups of one to four vectors of tokens, as equal as can be.
struct Groups {
  int64_t vectors, count;
  explicit Groups(int64_t tokens) : vectors((tokens + VL - 1) / VL), count((vectors + 3) / 4) {}
  int64_t first(int64_t g) const { return vectors * g / count; }
  int64_t size(int64_t g) const { return first(g + 1) - first(g); }
};

// Part i of row t begins at data + i · part + t · row. Whole pairs, zeros beyond the depth.
struct Rows {
  bf16* data;
  int64_t row, part;
};

// the same of bf16 by rows: 32 numbers of one token, `count` of which are there
LK_INLINE void scaled_row(const bf16* x, const float* gain, int64_t count, bf16* high, bf16* low) {
  const __m512i pairs = row_of(x, count);
  vec v[2] = {(vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pairs)), 16),
              (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pairs, 1)), 16)};
  for (int i = 0; i < 2; i++) v[i] *= load(gain + i * VL);
  const auto both = [&] { return (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]); };
  const __m512i rounded = both();
  _mm512_store_si512(high, rounded);
  for (int i = 0; i < 2; i++) {
    const __m256i half = i ? _mm512_extracti64x4_epi64(rounded, 1) : _mm512_castsi512_si256(rounded);
    v[i] -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    v[i] = (vec)((uvec)v[i] & (uvec)(v[i] - v[i] == 0));  // 0 where it is not finite
  }
  _mm512_store_si512(low, both());
}

// 16 tokens and one step of the features, from k, of x ⊙ gain
inline void x_rows(const Tiles& p, const Depth& d, const float* gain, int64_t t, int64_t k, const Rows& to,
                   int64_t at) {
  alignas(64) bf16 parts[3][TILE];
  if (gain && p.x.type == DType::bf16 && p.x.col == 1) {
    for (int64_t j = 0; j < std::min(ROWS, p.tokens - t); j++) {
      bf16* row = to.data + (at + j) * to.row + k;
      scaled_row(static_cast<const bf16*>(p.x.data) + (t + j) * p.x.row + k, gain + k, p.n_in - k, row, row + to.part);
    }
    return;
  }
  with_type(p.x, [&](auto* x) {
    split(x + t * p.x.row + k * p.x.col, p.x.row, p.x.col, p.tokens - t, p.n_in - k, gain ? gain + k : nullptr,
          d.x_parts, parts);
  });
  for (int64_t i = 0; i < d.x_parts; i++) {
    for (int64_t j = 0; j < std::min(ROWS, p.tokens - t); j++) {
      bf16* row = to.data + i * to.part + (at + j) * to.row + k;
      _mm512_store_si512(row, _mm512_load_si512(parts[i] + j * DEPTH));
    }
  }
}

LK_INLINE __mmask32 words(int64_t n) { return n >= DEPTH ? ~0u : n > 0 ? (1u << n) - 1 : 0u; }

// rows first..first+16 of `m`, [count, rank], as rows of `more` bf16 numbers; `low` is the part that
// is the low one
inline void rank_rows(const View& m, const Depth& d, int64_t first, int64_t count, int64_t rank, int64_t low, bf16* to,
                      int64_t row) {
  alignas(64) bf16 parts[2][TILE];
  for (int64_t k = 0; k < d.ranks; k += DEPTH) {
    split(m, first, count, k, rank, 2, parts);
    for (int64_t i = 0; i < d.h_parts; i++) {
      for (int64_t j = 0; j < std::min(ROWS, count - first); j++) {
        const __m512i from = _mm512_load_si512(parts[i == low] + j * DEPTH);
        _mm512_mask_storeu_epi16(to + j * row + i * d.ranks + k, words(d.ranks - k), from);
      }
    }
  }
}

// 16 rows of m, [count, columns], from `first` and 32 columns from k, as lanes: [pair][lane, 2] of
// each part
inline void lanes_of(const View& m, int64_t first, int64_t count, int64_t k, int64_t columns, int64_t parts,
                     bf16 (*to)[TILE]) {
  const auto* from = static_cast<const bf16*>(m.data) + first * m.row + k * m.col;
  if (m.type == DType::bf16 && m.col == 1) return pack_rows(from, m.row, count - first, columns - k, to[0]);
  if (m.type == DType::bf16 && m.row == 1) return pack_pairs(from, m.col, count - first, columns - k, to[0]);
  alignas(64) bf16 rows[2][TILE];
  split(m, first, count, k, columns, parts, rows);
  for (int64_t i = 0; i < parts; i++) pack_rows(rows[i], DEPTH, ROWS, DEPTH, to[i]);
}

// rank_rows, as 16 lanes, `row` from pair to pair
inline void rank_lanes(const View& m, const Depth& d, int64_t first, int64_t count, int64_t rank, int64_t low, bf16* to,
                       int64_t row) {
  alignas(64) bf16 lanes[2][TILE];
  for (int64_t k = 0; k < d.ranks; k += DEPTH) {
    lanes_of(m, first, count, k, rank, m.type == DType::bf16 ? 1 : 2, lanes);
    for (int64_t i = 0; i < d.h_parts; i++) {
      for (int64_t j = 0; j < std::min(DEPTH, d.ranks - k) / 2; j++) {
        const __m512i v = _mm512_load_si512(lanes[i == low] + j * DEPTH);
        _mm512_store_si512(to + ((i * d.ranks + k) / 2 + j) * row, v);
      }
    }
  }
}

// One step of depth of A as lanes: for each 64 ranks [part][pair][lane, 2]
inline void a_lanes(const Tiles& p, const Depth& d, int64_t k, bf16* to) {
  alignas(64) bf16 lanes[2][TILE];
  for (int64_t j = 0; j < p.rank; j += ROWS) {
    const int64_t first = j / MAX_LANES * MAX_LANES, width = std::min(MAX_LANES, up(p.rank - first, ROWS));
    bf16* group = to + first * d.padded * d.a_parts + (j - first) * 2;
    lanes_of(p.a, j, p.rank, k, p.n_in, d.a_parts, lanes);
    for (int64_t i = 0; i < d.a_parts; i++) {
      for (int64_t pair = 0; pair < DEPTH / 2; pair++) {
        const __m512i v = _mm512_load_si512(lanes[i] + pair * DEPTH);
        _mm512_store_si512(group + ((i * d.padded + k) / 2 + pair) * width * 2, v);
      }
    }
  }
}

LK_INLINE void store_some(float* to, vec v, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), (__m512)v); }
LK_INLINE void store_some(bf16* to, vec v, int64_t count) {
  _mm256_mask_storeu_epi16(to, lanes(count), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

// A part of W that is asked for while another is multiplied, some of it at each step: what is asked
// for at once must wait for its lines.
class Ahead {
 public:
  Ahead(const Tiles& p, Range rows, int64_t column, int64_t columns, int64_t steps)
      : p_(p),
        row_(rows.first),
        last_(rows.last),
        first_(column),
        columns_(columns),
        rate_(double((last_ - row_) * (up(columns, DEPTH) / DEPTH)) / double(steps)) {}
  void step() {
    for (due_ += rate_; due_ > 0 && row_ < last_; due_ -= 1) {
      if (!p_.packed) {
        __builtin_prefetch(static_cast<const bf16*>(p_.w.data) + row_ * p_.w.row + first_ + column_, 0, 2);
      } else if (!column_) {
        ask_for(*p_.packed, row_, first_, columns_);
      }
      if ((column_ += DEPTH) >= columns_) column_ = 0, row_++;
    }
  }

 private:
  const Tiles& p_;
  int64_t row_, last_, first_, columns_, column_ = 0;
  double rate_, due_ = 0;
};

// two rows of w, [2, columns], as 64 lanes; zeros for a row or columns that are not there
LK_INLINE void interleave(const bf16* w, int64_t row, int64_t columns, bool both, bf16* to) {
  // lane j: number j of the first row, then of the second, which counts on from 32
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                       _mm512_set1_epi32(32 << 16));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x100010));
  LK_UNROLL for (int half = 0; half < 2; half++, w += DEPTH, columns -= DEPTH, to += 2 * DEPTH) {
    const __m512i first = row_of(w, columns), second = both ? row_of(w + row, columns) : _mm512_setzero_si512();
    _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
    _mm512_store_si512(to + DEPTH, _mm512_permutex2var_epi16(first, high, second));
  }
}

}  // namespace lk::LK_LEVEL
