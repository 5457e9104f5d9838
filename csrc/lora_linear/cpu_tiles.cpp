// The fused forward on AMX tiles, in bf16: y = gain ⊙ (x Wᵀ + h Bᵀ) + bias, summed in float32 and rounded once.
// Rows of W are the left operand, as they lie in memory, and x, packed once, the right one. h Bᵀ is more depth of the
// same product: h, and B unless it is bf16, as the sum of two bf16 numbers, less the product of the two low ones
// (2⁻¹⁸ of the term).
#include <omp.h>

#include <algorithm>

#include "../common/amx.h"
#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t PANEL = 2 * ROWS;        // rows of W at a time
constexpr int64_t DIRECT = 4 * ROWS;       // tokens up to which W goes from memory straight into tiles, read once
constexpr int64_t BLOCK = 8;               // steps of depth whose panel of W, 16 KiB, stays in the first-level cache
constexpr int64_t PACKED_BYTES = 2 << 20;  // of x: the second-level cache
constexpr int64_t SQUARE = ROWS * ROWS;    // sums of one tile

struct Depth {
  int64_t steps, r_steps, parts;  // tiles of the input, of the rank, and pairs of parts of h and B
  int64_t more() const { return parts * r_steps; }
  int64_t all() const { return steps + more(); }
};

// v as the sum of two bf16 numbers
LK_INLINE bf16 part_of(float v, bool low) {
  bf16 part;
  put(&part, v);
  const float rest = v - to_float(part);
  if (low) put(&part, std::isfinite(rest) ? rest : 0.f);
  return part;
}

// 16 rows of 32 columns from column k of m [rows, rank], zeros beyond
template <typename T>
void part_tile(const T* m, int64_t row, int64_t col, int64_t rows, int64_t rank, int64_t k, bool low, bf16* to) {
  std::fill(to, to + TILE, bf16{0});
  for (int64_t i = 0; i < std::min(ROWS, rows); i++) {
    for (int64_t c = 0; c < std::min(DEPTH, rank - k); c++) {
      to[i * DEPTH + c] = part_of(to_float(m[i * row + (k + c) * col]), low);
    }
  }
}

// the tile of 16 tokens at one step: of x, then of h's parts high, low, high
void pack_step(const ForwardTiles& p, const Depth& d, int64_t t, int64_t tokens, int64_t step, bf16* to) {
  if (step < d.steps) {
    const auto* x = static_cast<const bf16*>(p.x.data) + t * p.x.row + step * DEPTH;
    return pack_rows(x, p.x.row, tokens, p.n_in - step * DEPTH, to);
  }
  alignas(64) bf16 rows[TILE];
  const int64_t part = (step - d.steps) / d.r_steps, k = (step - d.steps) % d.r_steps * DEPTH;
  part_tile(p.h + t * p.rank, p.rank, 1, tokens, p.rank, k, part == 1, rows);
  pack_rows(rows, DEPTH, ROWS, DEPTH, to);
}

// B's rows for a panel, [more, 2] tiles: parts high, high, low
void b_tiles(const ForwardTiles& p, const Depth& d, int64_t n, int64_t rows, bf16* to) {
  with_type(p.b, [&](auto* b) {
    for (int64_t step = 0; step < d.more(); step++) {
      for (int64_t i = 0; i < 2; i++) {
        part_tile(b + (n + i * ROWS) * p.b.row, p.b.row, p.b.col, rows - i * ROWS, p.rank, step % d.r_steps * DEPTH,
                  step / d.r_steps == 2, to + (step * 2 + i) * TILE);
      }
    }
  });
}

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

// one step of depth: TM tiles of W, `bytes` a row, times TN tiles of x, `column` apart; sums of tile (j, i) in j·TM + i
template <int TM, int TN>
LK_INLINE void step(const bf16* first, const bf16* second, int64_t bytes, const bf16* x, int64_t column) {
  static_assert(TM * TN <= 4 && TM <= 2, "four sums, two left tiles, two right tiles");
  _tile_loadd(4, first, bytes);
  if constexpr (TM > 1) _tile_loadd(5, second, bytes);
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

// the sums of TM · 16 rows of W from memory, then of B's tiles
template <int TM, int TN>
void direct(const ForwardTiles& p, const Depth& d, const bf16* w, int64_t rows, const bf16* b, const bf16* x,
            float* sums) {
  alignas(64) bf16 padded[2 * TILE];
  const int64_t column = d.all() * TILE;
  zero<TM * TN>();
  for (int64_t k = 0; k < p.n_in; k += DEPTH, x += TILE) {
    if (rows >= TM * ROWS && p.n_in - k >= DEPTH) {
      step<TM, TN>(w + k, w + ROWS * p.w.row + k, p.w.row * 2, x, column);
    } else {
      for (int i = 0; i < TM; i++) {
        left_tile(w + i * ROWS * p.w.row + k, p.w.row, rows - i * ROWS, p.n_in - k, padded + i * TILE);
      }
      step<TM, TN>(padded, padded + TILE, 64, x, column);
    }
  }
  for (int64_t s = 0; s < d.more(); s++, x += TILE) {
    step<TM, TN>(b + s * 2 * TILE, b + (s * 2 + 1) * TILE, 64, x, column);
  }
  store_sums<TM * TN>(sums);
}

// sums (+)= a packed panel [count, 2] times TN columns of x
template <int TN>
void blocked(const bf16* panel, int64_t count, const bf16* x, int64_t column, bool add, float* sums) {
  add ? load_sums<2 * TN>(sums) : zero<2 * TN>();
  for (int64_t s = 0; s < count; s++) {
    step<2, TN>(panel + s * 2 * TILE, panel + (s * 2 + 1) * TILE, 64, x + s * TILE, column);
  }
  store_sums<2 * TN>(sums);
}

// y and z from a tile of sums [16 outputs, 16 tokens]
template <typename Y>
LK_INLINE void finish(const ForwardTiles& p, const float* sums, int64_t t, int64_t tokens, int64_t n, int64_t outputs,
                      const float* gain, const float* bias) {
  __m512i r[16];
  LK_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + i * ROWS);
  transpose(r);
  const vec g = load(gain), c = load(bias);
  for (int64_t i = 0; i < std::min(ROWS, tokens); i++) {
    const vec z = (vec)r[i], y = g * z + c;
    const auto put_row = [&](const View& to, vec v) {
      Y* row = static_cast<Y*>(to.data) + (t + i) * to.row + n;
      outputs >= ROWS ? store(row, v) : store_first(row, v, outputs);
    };
    put_row(p.y, y);
    if (p.z.data) put_row(p.z, z);
  }
}

struct Scratch {
  bf16 *b, *panel;            // [more, 2] tiles [BLOCK, 2] tiles
  float *sums, *gain, *bias;  // [columns, 2] squares [PANEL] [PANEL]
};

// outputs n..n+rows of tokens t..t+tokens, whose columns of packed tiles begin at x
template <typename Y>
void panel(const ForwardTiles& p, const Depth& d, const bf16* x, int64_t t, int64_t tokens, int64_t n, int64_t rows,
           const Scratch& s) {
  const auto* w = static_cast<const bf16*>(p.w.data) + n * p.w.row;
  const int64_t columns = (tokens + ROWS - 1) / ROWS, column = d.all() * TILE;
  b_tiles(p, d, n, rows, s.b);
  std::fill(s.gain, s.gain + PANEL, p.scale);
  std::fill(s.bias, s.bias + PANEL, 0.f);
  for (int64_t i = 0; i < std::min(PANEL, rows); i++) {
    if (p.gain.data) with_type(p.gain, [&](auto* v) { s.gain[i] *= to_float(v[(n + i) * p.gain.col]); });
    if (p.bias.data) with_type(p.bias, [&](auto* v) { s.bias[i] = to_float(v[(n + i) * p.bias.col]); });
  }
  const auto finish_tile = [&](const float* sums, int64_t j, int64_t i) {
    if (rows <= i * ROWS) return;
    finish<Y>(p, sums, t + j * ROWS, tokens - j * ROWS, n + i * ROWS, rows - i * ROWS, s.gain + i * ROWS,
              s.bias + i * ROWS);
  };
  if (p.tokens <= DIRECT) {
    if (columns <= 2) {
      columns == 1 ? direct<2, 1>(p, d, w, rows, s.b, x, s.sums) : direct<2, 2>(p, d, w, rows, s.b, x, s.sums);
      for (int64_t j = 0; j < columns; j++)
        finish_tile(s.sums + 2 * j * SQUARE, j, 0), finish_tile(s.sums + (2 * j + 1) * SQUARE, j, 1);
      return;
    }
    for (int64_t i = 0; i < 2; i++) {
      const bf16* half = w + i * ROWS * p.w.row;
      const auto run = columns == 3 ? direct<1, 3> : direct<1, 4>;
      run(p, d, half, rows - i * ROWS, s.b + i * TILE, x, s.sums);
      for (int64_t j = 0; j < columns; j++) finish_tile(s.sums + j * SQUARE, j, i);
    }
    return;
  }
  for (int64_t first = 0; first < d.all(); first += BLOCK) {
    const int64_t count = std::min(BLOCK, d.all() - first);
    for (int64_t k = 0; k < count; k++) {
      for (int64_t i = 0; i < 2; i++) {
        const int64_t at = first + k;
        bf16* to = s.panel + (k * 2 + i) * TILE;
        if (at < d.steps)
          left_tile(w + i * ROWS * p.w.row + at * DEPTH, p.w.row, rows - i * ROWS, p.n_in - at * DEPTH, to);
        else std::copy_n(s.b + ((at - d.steps) * 2 + i) * TILE, TILE, to);
      }
    }
    for (int64_t j = 0; j < columns; j += 2) {
      const auto run = columns - j == 1 ? blocked<1> : blocked<2>;
      run(s.panel, count, x + j * column + first * TILE, column, first > 0, s.sums + 2 * j * SQUARE);
    }
  }
  for (int64_t j = 0; j < columns; j++) {
    for (int64_t i = 0; i < 2; i++) finish_tile(s.sums + (2 * j + i) * SQUARE, j, i);
  }
}

}  // namespace

void forward_tiles(const ForwardTiles& p) {
  Depth d;
  d.steps = (p.n_in + DEPTH - 1) / DEPTH;
  d.r_steps = (p.rank + DEPTH - 1) / DEPTH;
  d.parts = p.b.type == DType::bf16 ? 2 : 3;
  const int64_t column = d.all() * TILE, fit = PACKED_BYTES / (column * 2) / 2 * PANEL;
  const int64_t most = std::min((p.tokens + ROWS - 1) / ROWS * ROWS, std::max(DIRECT, fit));  // tokens at a time
  const Buffer packed(most / ROWS * column / 2);
  auto* x = reinterpret_cast<bf16*>(packed.get());
#pragma omp parallel num_threads(p.threads)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Buffer own((d.more() + BLOCK) * TILE + most / ROWS * 2 * SQUARE + 2 * PANEL);
    Scratch s;
    s.b = reinterpret_cast<bf16*>(own.get());
    s.panel = s.b + d.more() * 2 * TILE;
    s.sums = reinterpret_cast<float*>(s.panel + BLOCK * 2 * TILE);
    s.gain = s.sums + most / ROWS * 2 * SQUARE;
    s.bias = s.gain + PANEL;
    // few outputs, as of A: the threads share the tokens instead
    const bool by_tokens = p.n_out <= PANEL * (threads - 1);
    const Range outputs = by_tokens ? Range{0, p.n_out} : share(p.n_out, PANEL, thread, threads);
    const Range depths = share(d.all(), 1, thread, threads);
    for (int64_t t = 0; t < p.tokens; t += most) {
      const int64_t tokens = std::min(most, p.tokens - t), columns = (tokens + ROWS - 1) / ROWS;
      for (int64_t j = 0; j < columns; j++) {
        for (int64_t k = depths.first; k < depths.last; k++) {
          pack_step(p, d, t + j * ROWS, tokens - j * ROWS, k, x + j * column + k * TILE);
        }
      }
#pragma omp barrier
      const Range mine = by_tokens ? share(tokens, PANEL, thread, threads) : Range{0, tokens};
      for (int64_t n = outputs.first; n < outputs.last && mine.first < mine.last; n += PANEL) {
        const auto run = p.y.type == DType::f32 ? panel<float> : panel<bf16>;
        run(p, d, x + mine.first / ROWS * column, t + mine.first, mine.last - mine.first, n, outputs.last - n, s);
      }
#pragma omp barrier
    }
    _tile_release();
  }
}

}  // namespace lk::LK_LEVEL
