// The fused layer on AMX tiles, in bf16, both ways, summed in float32 and rounded once:
//   forward   y  = gain ⊙ (x Wᵀ + h Bᵀ) + bias,        h = scale · x Aᵀ
//   backward  dx = (dy ⊙ gain) W + mask ⊙ (p A),       p = scale · (dy ⊙ gain) B
// Both are `tokens` times `outputs` over a depth: first the rank, then the features of x. What is not bf16 enters as the
// sum of two bf16 numbers (a float32 x of three), each more depth of the same product, less that of two low ones (2⁻¹⁸ of
// the term). So an infinite factor, or one beyond bf16, gives NaN where its partner's low part is zero.
// x is packed once. Of W, whose tiles are the left operand forward (rows as they lie in memory) and the right one
// backward, a few panels are packed at a time, so that x's tiles come from the second-level cache and W's from the first.
// The tile instructions take and give numbers below 2⁻¹²⁶ as zeros, and so does this file.
#include <omp.h>

#include <algorithm>

#include "../common/dot.h"
#include "../common/philox.h"
#include "../quantised/rows.h"
#include "params.h"
#include "tiles_pack.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t PANEL = 2 * ROWS;  // outputs at a time
// tokens up to which W goes from memory straight into tiles, read once
constexpr int64_t DIRECT_TOKENS = 4 * ROWS;
// steps of depth whose panel of W, 16 KiB, stays in the first-level cache
constexpr int64_t CHUNK = 8;
constexpr int64_t PACKED_BYTES = 5 << 18;  // of x: some half of the second-level cache
constexpr int64_t TOKENS = 512;            // at a time, where x is larger than that,
constexpr int64_t BLOCK_OUTPUTS = 256;     // with as many outputs: their sums are half of that

template <int COUNT>
LK_INLINE void zero() {
  _tile_zero(0);
  if constexpr (COUNT > 1) _tile_zero(1);
  if constexpr (COUNT > 2) _tile_zero(2);
  if constexpr (COUNT > 3) _tile_zero(3);
}
template <int COUNT>
LK_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  if constexpr (COUNT > 1) _tile_loadd(1, sums + SQUARE, 64);
  if constexpr (COUNT > 2) _tile_loadd(2, sums + 2 * SQUARE, 64);
  if constexpr (COUNT > 3) _tile_loadd(3, sums + 3 * SQUARE, 64);
}
template <int COUNT>
LK_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (COUNT > 1) _tile_stored(1, sums + SQUARE, 64);
  if constexpr (COUNT > 2) _tile_stored(2, sums + 2 * SQUARE, 64);
  if constexpr (COUNT > 3) _tile_stored(3, sums + 3 * SQUARE, 64);
}

// tile `sum` += the product of one of W and one of x: [outputs, tokens] forward, [tokens, outputs]
// backward. A macro, since the intrinsic wants its tiles as literals.
#define LK_MULTIPLY(sum, w, x)                     \
  do {                                             \
    if constexpr (BACK) _tile_dpbf16ps(sum, x, w); \
    else _tile_dpbf16ps(sum, w, x);                \
  } while (false)

// one step of depth: TM tiles of W, `bytes` a row, times TN tiles of x, `column` apart; sums of
// tile (j, i) in j·TM + i
template <bool BACK, int TM, int TN>
LK_INLINE void step(const bf16* first, const bf16* second, int64_t bytes, const bf16* x, int64_t column) {
  static_assert(TM * TN <= 4 && TM <= 2, "four sums, two tiles of W, two of x");
  _tile_loadd(4, first, bytes);
  _tile_loadd(6, x, 64);
  LK_MULTIPLY(0, 4, 6);
  if constexpr (TM == 2) {
    _tile_loadd(5, second, bytes);
    LK_MULTIPLY(1, 5, 6);
  }
  if constexpr (TN > 1) {
    _tile_loadd(7, x + column, 64);
    if constexpr (TM == 2) {
      LK_MULTIPLY(2, 4, 7);
      LK_MULTIPLY(3, 5, 7);
    } else {
      LK_MULTIPLY(1, 4, 7);
    }
  }
  if constexpr (TN > 2) {
    _tile_loadd(6, x + 2 * column, 64);
    LK_MULTIPLY(2, 4, 6);
  }
  if constexpr (TN > 3) {
    _tile_loadd(7, x + 3 * column, 64);
    LK_MULTIPLY(3, 4, 7);
  }
}

// sums (+)= a panel [count, TM] of W times TN columns of x, which has `parts` tiles a step
template <bool BACK, int TM, int TN>
void blocked(const bf16* panel, int64_t count, const bf16* x, int64_t column, int64_t parts, bool add, float* sums) {
  add ? load_sums<TM * TN>(sums) : zero<TM * TN>();
  for (int64_t s = 0; s < count; s++, panel += TM * TILE) {
    for (int64_t i = 0; i < parts; i++, x += TILE) step<BACK, TM, TN>(panel, panel + TILE, 64, x, column);
  }
  store_sums<TM * TN>(sums);
}

// rows of 16 outputs, one a token, from a tile of sums
template <bool BACK>
LK_INLINE void by_token(const float* sums, __m512i (&r)[16]) {
  LK_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + i * ROWS);
  if (!BACK) transpose(r);
}

// h of 16 or 32 tokens, from packed x and A
template <bool BACK, int TN>
void h_of(const Tiles& p, const Depth& d, const bf16* a, int64_t a_column, const bf16* x, int64_t t) {
  alignas(64) float sums[TN * SQUARE];
  for (int64_t j = 0; j < p.rank; j += ROWS, a += a_column) {
    zero<TN>();
    for (int64_t s = 0; s < d.features; s++) {
      for (int64_t i = 0; i < d.a_parts; i++) {
        for (int64_t c = 0; c < d.x_parts; c++) {
          step<BACK, 1, TN>(a + (s * d.a_parts + i) * TILE, nullptr, 64, x + (s * d.x_parts + c) * TILE, d.column());
        }
      }
    }
    store_sums<TN>(sums);
    for (int64_t c = 0; c < TN; c++) {
      __m512i r[16];
      by_token<BACK>(sums + c * SQUARE, r);
      const int64_t tokens = std::min(ROWS, p.tokens - t - c * ROWS), ranks = std::min(ROWS, p.rank - j);
      for (int64_t i = 0; i < tokens; i++) {
        float* to = p.h + (t + c * ROWS + i) * p.rank + j;
        const vec value = p.scale * (vec)r[i];
        ranks == ROWS ? store(to, value) : store_first(to, value, ranks);
      }
    }
  }
}

// two vectors as 32 outputs of which `count` are written
LK_INLINE void store_pair(float* to, vec low, vec high, int64_t count) {
  _mm512_mask_storeu_ps(to, lanes(count), (__m512)low);
  _mm512_mask_storeu_ps(to + ROWS, lanes(count - ROWS), (__m512)high);
}
LK_INLINE void store_pair(bf16* to, vec low, vec high, int64_t count) {
  const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_mask_storeu_epi16(to, count >= DEPTH ? ~0u : (1u << count) - 1, pair);
}

// y and z of 16 tokens and 32 outputs
template <bool BACK, typename Y>
LK_INLINE void epilogue(const Tiles& p, const float* left, const float* right, int64_t t, int64_t n, const float* gain,
                        const float* bias) {
  __m512i low[16], high[16];
  by_token<BACK>(left, low);
  by_token<BACK>(right, high);
  const int64_t outputs = p.n_out - n;
  for (int64_t i = 0; i < std::min(ROWS, p.tokens - t); i++) {
    vec first = (vec)low[i], second = (vec)high[i];
    if (p.z.data) store_pair(static_cast<Y*>(p.z.data) + (t + i) * p.z.row + n, first, second, outputs);
    if (!BACK) {
      first = load(gain) * first + load(bias);
      second = load(gain + ROWS) * second + load(bias + ROWS);
    }
    store_pair(static_cast<Y*>(p.y.data) + (t + i) * p.y.row + n, first, second, outputs);
  }
}

struct Scratch {
  bf16* panels;               // [outputs / 32] [CHUNK, 2] tiles
  bf16* w;                    // of codes, forward [outputs, CHUNK · 32], back [CHUNK · 32, outputs]
  float *sums, *gain, *bias;  // [outputs / 32] [columns, 2] squares; [outputs] [outputs]
};

// gain and bias of outputs from n
void vectors(const Tiles& p, int64_t n, int64_t outputs, const Scratch& s) {
  std::fill(s.gain, s.gain + outputs, 1.f);
  std::fill(s.bias, s.bias + outputs, 0.f);
  for (int64_t i = 0; i < std::min(outputs, p.n_out - n); i++) {
    if (p.gain.data) with_type(p.gain, [&](auto* v) { s.gain[i] = to_float(v[(n + i) * p.gain.col]); });
    if (p.bias.data) with_type(p.bias, [&](auto* v) { s.bias[i] = to_float(v[(n + i) * p.bias.col]); });
  }
}

// TM · 16 outputs of up to 64 tokens, W from memory; to sums
template <int TM, int TN>
void direct(const Tiles& p, const Depth& d, const bf16* b, int64_t n, const bf16* x, float* sums) {
  alignas(64) bf16 padded[2 * TILE];
  const auto* w = static_cast<const bf16*>(p.w.data) + n * p.w.row;
  const int64_t column = d.column();
  zero<TM * TN>();
  for (int64_t s = 0; s < d.more(); s++, b += 2 * TILE, x += TILE) step<false, TM, TN>(b, b + TILE, 64, x, column);
  for (int64_t k = 0; k < p.n_in; k += DEPTH, x += TILE) {
    if (p.n_out - n >= TM * ROWS && p.n_in - k >= DEPTH) {
      step<false, TM, TN>(w + k, w + ROWS * p.w.row + k, p.w.row * 2, x, column);
    } else {
      for (int i = 0; i < TM; i++) {
        left_tile(w + i * ROWS * p.w.row + k, p.w.row, p.n_out - n - i * ROWS, p.n_in - k, padded + i * TILE);
      }
      step<false, TM, TN>(padded, padded + TILE, 64, x, column);
    }
  }
  store_sums<TM * TN>(sums);
}

template <typename Y>
void direct_panel(const Tiles& p, const Depth& d, const bf16* x, int64_t n, const Scratch& s) {
  const int64_t columns = (p.tokens + ROWS - 1) / ROWS;
  vectors(p, n, PANEL, s);
  for (int64_t k = 0; k < d.more(); k++) w_tiles<false>(p, d, {}, n, k, s.panels + k * 2 * TILE);
  if (columns <= 2) {
    (columns == 1 ? direct<2, 1> : direct<2, 2>)(p, d, s.panels, n, x, s.sums);
  } else {
    const auto run = columns == 3 ? direct<1, 3> : direct<1, 4>;
    run(p, d, s.panels, n, x, s.sums);
    if (n + ROWS < p.n_out) run(p, d, s.panels + TILE, n + ROWS, x, s.sums + columns * SQUARE);
  }
  for (int64_t j = 0; j < columns; j++) {
    const float* left = s.sums + (columns <= 2 ? 2 * j : j) * SQUARE;
    epilogue<false, Y>(p, left, left + (columns <= 2 ? 1 : columns) * SQUARE, j * ROWS, n, s.gain, s.bias);
  }
}

// sums of 32 outputs ⊙ mask
void mask_sums(const Tiles& p, int64_t t, int64_t columns, int64_t n, float* sums) {
  float mask[PANEL];
  for (int64_t j = 0; j < columns; j++) {
    for (int64_t i = 0; i < std::min(ROWS, p.tokens - t - j * ROWS); i++) {
      dropout_mask(p.dropout, t + j * ROWS + i, n, PANEL, mask);
      for (int64_t c = 0; c < 2; c++) {
        float* row = sums + (2 * j + c) * SQUARE + i * ROWS;
        store(row, load(row) * load(mask + c * ROWS));
      }
    }
  }
}

// W's outputs from n at `steps` steps of depth: where it lies, or from its codes
template <bool BACK>
Piece piece_of(const Tiles& p, int64_t n, int64_t outputs, int64_t first, int64_t steps, bf16* to) {
  if (!p.packed) return {static_cast<const bf16*>(p.w.data), p.w.row, 0, 0};
  const int64_t k = first * DEPTH, depth = std::min(steps * DEPTH, p.n_in - k), row = BACK ? outputs : CHUNK * DEPTH;
  const int64_t some = std::min(outputs, p.n_out - n);
  if (BACK) dequantise_rows(*p.packed, k, depth, n, some, to, row);
  else dequantise_rows(*p.packed, n, some, k, depth, to, row);
  return {to, row, n, k};
}

// outputs n..n+outputs of the tokens from t, whose `columns` of packed tiles begin at x
template <bool BACK, typename Y>
void block(const Tiles& p, const Depth& d, const bf16* x, int64_t t, int64_t columns, int64_t n, int64_t outputs,
           const Scratch& s) {
  const int64_t panels = (outputs + PANEL - 1) / PANEL, more = d.more(), all = d.all(), column = d.column();
  // the rank's steps have sums, or tiles, of their own
  const bool apart = p.dropout.active() || d.x_parts > 1;
  for (int64_t first = 0, next; first < all; first = next) {
    next = std::min(first + CHUNK, apart && first < more ? more : all);
    const int64_t count = next - first, parts = first < more ? 1 : d.x_parts;
    const bf16* from = x + (first < more ? first : more + (first - more) * parts) * TILE;
    const int64_t features = std::max(first, more);  // the first step of W
    const Piece w = piece_of<BACK>(p, n, panels * PANEL, features - more, std::max<int64_t>(0, next - features), s.w);
    for (int64_t i = 0; i < count; i++) {
      for (int64_t j = 0; j < panels; j++) {
        w_tiles<BACK>(p, d, w, n + j * PANEL, first + i, s.panels + (j * CHUNK + i) * 2 * TILE);
      }
    }
    for (int64_t i = 0; i < panels; i++) {
      float* sums = s.sums + i * columns * 2 * SQUARE;
      for (int64_t j = 0; j < columns; j += 2) {
        const auto run = columns - j == 1 ? blocked<BACK, 2, 1> : blocked<BACK, 2, 2>;
        run(s.panels + i * CHUNK * 2 * TILE, count, from + j * column, column, parts, first > 0, sums + 2 * j * SQUARE);
      }
      if (p.dropout.active() && next == more) mask_sums(p, t, columns, n + i * PANEL, sums);
    }
  }
  if (!BACK) vectors(p, n, outputs, s);
  for (int64_t j = 0; j < columns; j++) {
    for (int64_t i = 0; i < panels; i++) {
      const float* sums = s.sums + (i * columns + j) * 2 * SQUARE;
      epilogue<BACK, Y>(p, sums, sums + SQUARE, t + j * ROWS, n + i * PANEL, s.gain + i * PANEL, s.bias + i * PANEL);
    }
  }
}

template <bool BACK>
void run(const Tiles& p) {
  Depth d;
  d.features = (p.n_in + DEPTH - 1) / DEPTH;
  d.ranks = (p.rank + DEPTH - 1) / DEPTH;
  d.x_parts = p.x.type == DType::f32 ? 3 : BACK && p.gain.data ? 2 : 1;
  d.a_parts = p.a.type == DType::bf16 ? 1 : 2;
  d.h_parts = p.b.type == DType::bf16 ? 2 : 3;
  const int64_t column = d.column(), a_column = d.features * d.a_parts * TILE;
  const int64_t rows = (p.tokens + ROWS - 1) / ROWS * ROWS;
  const bool fits = rows / ROWS * column * 2 <= PACKED_BYTES;
  const bool straight = !BACK && p.tokens <= DIRECT_TOKENS && d.x_parts == 1 && !p.packed;
  const int64_t most = fits || straight ? rows : std::min(rows, TOKENS);  // tokens at a time
  // outputs at a time: one panel where x stays in the cache, but backward W is read along its
  // outputs
  const int64_t wide = !BACK && (fits || straight) ? PANEL : BLOCK_OUTPUTS;
  const Buffer packed(most / ROWS * column / 2 + (p.a.data ? (p.rank + ROWS - 1) / ROWS * a_column / 2 : 0));
  const Buffer gains(BACK && p.gain.data ? d.features * DEPTH : 0);
  auto* x = reinterpret_cast<bf16*>(packed.get());
  bf16* a = x + most / ROWS * column;
  if (BACK && p.gain.data) {
    std::fill(gains.get(), gains.get() + d.features * DEPTH, 0.f);
    with_type(p.gain, [&](auto* v) { widen(v, p.gain.col, p.n_in, gains.get()); });
  }
#pragma omp parallel num_threads(p.threads)
  {
    // in memory: GCC's intrinsic says that it reads a pointer's worth of bytes
    static const TileConfig config;
    _tile_loadconfig(&config);
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t held = straight ? std::max(d.more(), CHUNK) : CHUNK;
    const int64_t of_codes = p.packed ? wide * CHUNK * DEPTH / 2 : 0;
    const Buffer own(wide / PANEL * (held * TILE + most / ROWS * 2 * SQUARE) + 2 * wide + of_codes);
    Scratch s;
    s.panels = reinterpret_cast<bf16*>(own.get());
    s.sums = own.get() + wide / PANEL * held * TILE;
    s.gain = s.sums + wide / PANEL * most / ROWS * 2 * SQUARE;
    s.bias = s.gain + wide;
    s.w = reinterpret_cast<bf16*>(s.bias + wide);
    // few outputs: the threads share the tokens instead
    const bool by_tokens = !straight && p.n_out <= PANEL * (threads - 1);
    const Range outputs = by_tokens ? Range{0, p.n_out} : share(p.n_out, PANEL, thread, threads);
    const Range steps = share(d.features, 1, thread, threads);
    for (int64_t k = steps.first; p.a.data && k < steps.last; k++) a_tiles<BACK>(p, d, k, a_column, a);
    for (int64_t t = 0; t < p.tokens; t += most) {
      const int64_t tokens = std::min(most, p.tokens - t), columns = (tokens + ROWS - 1) / ROWS;
      for (int64_t j = 0; j < columns; j++) {
        for (int64_t k = steps.first; k < steps.last; k++) {
          x_tiles<BACK>(p, d, BACK && p.gain.data ? gains.get() : nullptr, t + j * ROWS, k,
                        x + j * column + (d.more() + k * d.x_parts) * TILE);
        }
      }
#pragma omp barrier
      if (p.rank > 0) {
        const Range mine = share(tokens, PANEL, thread, threads);
        for (int64_t i = mine.first; i < mine.last; i += ROWS) {
          bf16* at = x + i / ROWS * column;
          const bool two = i % PANEL == 0 && mine.last - i > ROWS;
          if (p.a.data && i % PANEL == 0) {
            (two ? h_of<BACK, 2> : h_of<BACK, 1>)(p, d, a, a_column, at + d.more() * TILE, t + i);
          }
          h_tiles<BACK>(p, d, t + i, at);
        }
#pragma omp barrier
      }
      const Range mine = by_tokens ? share(tokens, PANEL, thread, threads) : Range{0, tokens};
      const int64_t own_columns = (mine.last - mine.first + ROWS - 1) / ROWS;
      const bf16* from = x + mine.first / ROWS * column;
      for (int64_t n = outputs.first; n < outputs.last && own_columns > 0; n += wide) {
        const bool narrow = p.y.type == DType::bf16;
        if constexpr (!BACK) {
          if (straight) {
            (narrow ? direct_panel<bf16> : direct_panel<float>)(p, d, x, n, s);
            continue;
          }
        }
        const auto compute = narrow ? block<BACK, bf16> : block<BACK, float>;
        compute(p, d, from, t + mine.first, own_columns, n, std::min(wide, outputs.last - n), s);
      }
#pragma omp barrier
    }
    _tile_release();
  }
}

}  // namespace

void tiles(const Tiles& p) { p.back ? run<true>(p) : run<false>(p); }

}  // namespace lk::LK_LEVEL
