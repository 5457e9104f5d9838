// Register-tiled dot products: NR rows of one matrix times MR rows of another, both contiguous
// along K.
#pragma once
#include <type_traits>

#include "vec.h"

namespace lk::LK_LEVEL {

// as many accumulators as the register file holds beside the operands
#if LK_VL == 16
constexpr int NR = 4, MR = 6;
#else
constexpr int NR = 3, MR = 4;
#endif

// acc[j][m] += w[j][0:count] · x[m][0:count]
template <int N, int M, typename W>
LK_INLINE void dot(const W* w, int64_t w_row, const float* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  int64_t k = 0;
  for (; k + VL <= count; k += VL) {
    vec row[N];
    LK_UNROLL for (int j = 0; j < N; j++) row[j] = load(w + j * w_row + k);
    LK_UNROLL for (int m = 0; m < M; m++) {
      const vec v = load(x + m * x_row + k);
      LK_UNROLL for (int j = 0; j < N; j++) acc[j][m] += row[j] * v;
    }
  }
  if (k < count) {
    LK_UNROLL for (int j = 0; j < N; j++) {
      const vec row = load_first(w + j * w_row + k, count - k);
      LK_UNROLL for (int m = 0; m < M; m++) acc[j][m] += row * load_first(x + m * x_row + k, count - k);
    }
  }
}

#if defined(LK_PAIRS)
// The same of pairs of bf16; one chain of float32 for each 2 of 32 columns. W is asked for ahead
// where it comes from memory.
template <int N, int M, bool ASKS = true>
LK_INLINE void dot(const bf16* w, int64_t w_row, const bf16* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  constexpr int64_t STEP = 2 * VL, AHEAD = 16 * STEP;
  const auto step = [&](int64_t k, auto of) __attribute__((always_inline)) {
    __m512bh row[N];
    LK_UNROLL for (int j = 0; j < N; j++) row[j] = (__m512bh)of(w + j * w_row + k);
    LK_UNROLL for (int m = 0; m < M; m++) {
      const auto v = (__m512bh)of(x + m * x_row + k);
      LK_UNROLL for (int j = 0; j < N; j++) acc[j][m] = (vec)_mm512_dpbf16_ps((__m512)acc[j][m], row[j], v);
    }
  };
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    LK_UNROLL for (int j = 0; j < N && ASKS; j++) __builtin_prefetch(w + j * w_row + k + AHEAD);
    step(k, [](const bf16* p) { return _mm512_loadu_si512(p); });
  }
  const __mmask32 rest = (1u << (count - k)) - 1;
  if (rest) step(k, [&](const bf16* p) { return _mm512_maskz_loadu_epi16(rest, p); });
}
#endif

// f(std::integral_constant<int, n>) for the run-time 1 <= n <= 6
template <typename F>
LK_INLINE void with_count(int n, F&& f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
  }
}

// rows first..last of a loop of n cut among threads at multiples of `unit`
struct Range {
  int64_t first, last;
};
LK_INLINE Range share(int64_t n, int64_t unit, int thread, int threads) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t first = units * thread / threads * unit, last = units * (thread + 1) / threads * unit;
  return {first < n ? first : n, last < n ? last : n};
}

}  // namespace lk::LK_LEVEL
