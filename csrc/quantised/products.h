// Rows of W for products with few rows of x. Of codes, by vdpbf16ps: numbers of W are in registers
// only, or in the first-level cache for as long as all tokens meet them.
#pragma once
#include "../common/dot.h"
#include "steps.h"

namespace lk::LK_LEVEL {

// Rows of numbers, `row` from one to the next.
template <typename W>
struct Rows {
  static constexpr bool CODES = false;
  static constexpr int TOKENS = MR;  // at most, at a time
  const W* at;
  int64_t row;
};
template <int N, typename W>
LK_INLINE Rows<W> columns(const Rows<W>& w, int64_t k, int64_t) {
  return {w.at + k, w.row};
}
template <typename W, typename X, int N, int M>
LK_INLINE void dot(const Rows<W>& w, const X* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  dot(w.at, w.row, x, x_row, count, acc);
}

#if defined(LK_PAIRS)
// 4-bit codes in the order of quads: 16 bits are the codes of four numbers, and 32 numbers are the
// first ones of eight such words, then the second, third and fourth ones. So a shift makes places
// of codes, and a dot product does not care, once x is in that order.
struct Quads {
  static constexpr int64_t BYTES = STEP / 2;
  using Scale = __m512i;  // the values of a block, twice
  __m512 table;
  __m512i shifts;
  LK_INLINE explicit Quads(const Quantised& q) : table(_mm512_loadu_ps(q.table)) {
    constexpr int64_t ONES = 0x0001000100010001;
    const __m512i low_first = _mm512_setr_epi64(0, 0, 4 * ONES, 4 * ONES, 8 * ONES, 8 * ONES, 12 * ONES, 12 * ONES);
    shifts = _mm512_xor_si512(low_first, _mm512_set1_epi16(q.order == Order::low_first ? 0 : 4));
  }
  LK_INLINE Scale scale(float of) const {
    const __m512 values = table * _mm512_set1_ps(of);
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }
  LK_INLINE __m512i step(const uint8_t* codes, Scale values) const {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_broadcast_i32x4(words), shifts), values);
  }
  // 32 numbers of x
  static LK_INLINE __m512i ordered(__m512i x) {
    const __m128i words = _mm_setr_epi16(0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(_mm512_broadcast_i32x4(words), places), x);
  }
};

// 8-bit codes as they lie
struct Bytes8 : Int8 {
  LK_INLINE explicit Bytes8(const Quantised& q) : Int8(q) {}
  LK_INLINE Scale scale(float of) const { return _mm512_set1_ps(of); }
};

// whether W's codes are decoded where they meet x: each row begins with a block
LK_INLINE bool meets_x(const Quantised& q) { return in_steps(q) && q.n_in % q.block == 0; }

// Rows of codes, C how they are decoded.
template <typename C, int MOST_TOKENS>
struct Coded {
  static constexpr bool CODES = true;
  static constexpr int TOKENS = MOST_TOKENS;
  const Quantised& q;
  C decoder;
  const uint8_t* codes;
  int64_t row;
  const float* scales;  // [rows, blocks]
  int64_t blocks, k;    // k: the first column
};
// the same, with a place [rows, columns] for numbers
template <typename C>
struct Panel {
  static constexpr bool CODES = true;
  static constexpr int TOKENS = MR;
  Coded<C, MR> of;
  bf16* numbers;
};

// calls step(numbers [N], i) for each 32 numbers i of `count` columns of N rows
template <int N, typename C, int T, typename Step>
LK_INLINE void each_step(const Coded<C, T>& w, int64_t count, Step step) {
  const C decoder = w.decoder;
  const int64_t size = w.q.block, row = w.row, end = w.k + count;
  const uint8_t* codes = w.codes + w.k * C::BYTES / STEP;
  const float* scales = w.scales;
  int64_t i = 0;
  // `steps` of a block, if they are known
  const auto block = [&](int64_t at, auto steps, int64_t left) __attribute__((always_inline)) {
    typename C::Scale by[N];
    LK_UNROLL for (int j = 0; j < N; j++) by[j] = decoder.scale(scales[j * w.blocks + at]);
    for (int64_t s = 0; s < (steps.value ? steps.value : left); s++) {
      __m512i numbers[N];
      LK_UNROLL for (int j = 0; j < N; j++) numbers[j] = decoder.step(codes + j * row, by[j]);
      step(numbers, i);
      codes += C::BYTES, i += STEP;
    }
  };
  if (size == 2 * STEP) {
    for (int64_t at = w.k / size; at < end / size; at++) {
      if (C::BYTES == STEP || at % 2 == 0) {
        LK_UNROLL for (int j = 0; j < N; j++) __builtin_prefetch(codes + (N + j) * row);
      }
      block(at, std::integral_constant<int, 2>{}, 0);
    }
    return;
  }
  for (int64_t k = w.k, at = k / size; k < end; at++) {
    const int64_t until = std::min((at + 1) * size, end);
    for (int64_t b = 0; b < (until - k) * C::BYTES / STEP; b += 64) {
      LK_UNROLL for (int j = 0; j < N; j++) __builtin_prefetch(codes + (N + j) * row + b);
    }
    block(at, std::integral_constant<int, 0>{}, (until - k) / STEP);
    k = until;
  }
}

// acc[j][m] += w[j] · x[m][0:count]
template <typename C, int T, int N, int M>
LK_INLINE void dot(const Coded<C, T>& w, const bf16* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  each_step<N>(w, count, [&](const __m512i(&numbers)[N], int64_t i) __attribute__((always_inline)) {
    LK_UNROLL for (int m = 0; m < M; m++) {
      const auto v = (__m512bh)_mm512_loadu_si512(x + m * x_row + i);
      LK_UNROLL for (int j = 0; j < N; j++)
          acc[j][m] = (vec)_mm512_dpbf16_ps((__m512)acc[j][m], (__m512bh)numbers[j], v);
    }
  });
}

// numbers of codes, which are in the first-level cache
struct Held {
  const bf16* at;
  int64_t row;
};
template <int N, int M>
LK_INLINE void dot(const Held& w, const bf16* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  dot<N, M, false>(w.at, w.row, x, x_row, count, acc);
}

// what `count` columns from k of N rows are multiplied from
template <int N, typename C, int T>
LK_INLINE Coded<C, T> columns(const Coded<C, T>& w, int64_t k, int64_t) {
  return {w.q, w.decoder, w.codes, w.row, w.scales, w.blocks, k};
}
template <int N, typename C>
LK_INLINE Held columns(const Panel<C>& w, int64_t k, int64_t count) {
  bf16* to = w.numbers;
  each_step<N>(columns<N>(w.of, k, count), count,
               [&](const __m512i(&numbers)[N], int64_t i) __attribute__((always_inline)) {
                 LK_UNROLL for (int j = 0; j < N; j++) _mm512_storeu_si512(to + j * count + i, numbers[j]);
               });
  return {to, count};
}

#else
LK_INLINE bool meets_x(const Quantised&) { return false; }
#endif

}  // namespace lk::LK_LEVEL
