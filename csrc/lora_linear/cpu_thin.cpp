// The four thin passes around a vendor GEMM: shrink, expand, outer and column sums. Each reads its
// tall operand once, converts and drops it on the way, and splits the work so that no sum depends
// on the number of threads.
#include <omp.h>

#include <algorithm>

#include "../common/dot.h"
#include "../common/philox.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

// to[j, k] = scale · gain[k] · m[j, k] as floats, rows padded with zeros to to_row
void pack(const View& m, const View& gain, float scale, int64_t row_first, int64_t row_last, int64_t count, float* to,
          int64_t to_row) {
  with_type(m, [&](auto* from) {
    if (m.row == 1) {
      // m is the transpose of what lies in memory: squares of it, so that both are read and written
      // along their rows
      constexpr int64_t SIDE = 16;
      float square[SIDE][SIDE];
      for (int64_t j = row_first; j < row_last; j += SIDE) {
        const int64_t rows = std::min(SIDE, row_last - j);
        for (int64_t k = 0; k < count; k += SIDE) {
          const int64_t columns = std::min(SIDE, count - k);
          for (int64_t c = 0; c < columns; c++) {
            for (int64_t r = 0; r < rows; r += VL)
              store(square[c] + r, scale * load_some(from + j + r + (k + c) * m.col, rows - r));
          }
          for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; c < columns; c++) to[(j + r) * to_row + k + c] = square[c][r];
          }
        }
      }
    } else {
      for (int64_t j = row_first; j < row_last; j++) {
        int64_t k = 0;
        if (m.col == 1) {
          for (; k + VL <= count; k += VL) store(to + j * to_row + k, scale * load(from + j * m.row + k));
        }
        for (; k < count; k++) to[j * to_row + k] = scale * to_float(from[j * m.row + k * m.col]);
      }
    }
    for (int64_t j = row_first; j < row_last; j++) {
      std::fill(to + j * to_row + count, to + (j + 1) * to_row, 0.f);
      if (gain.data) {
        with_type(gain, [&](auto* g) {
          for (int64_t k = 0; k < count; k++) to[j * to_row + k] *= to_float(g[k * gain.col]);
        });
      }
    }
  });
}

// rows of x, columns first..first+count, as dropped floats
template <typename T>
LK_INLINE void tile(const T* x, int64_t x_row, const Dropout& drop, int64_t t, int64_t tokens, int64_t first,
                    int64_t count, float* to, int64_t to_row) {
  for (int64_t i = 0; i < tokens; i++) {
    float* out = to + i * to_row;
    const T* from = x + (t + i) * x_row + first;
    int64_t k = 0;
    if (drop.active()) {
      dropout_mask(drop, t + i, first, count, out);
      for (; k + VL <= count; k += VL) store(out + k, load(out + k) * load(from + k));
      for (; k < count; k++) out[k] *= to_float(from[k]);
    } else {
      widen(from, 1, count, out);
    }
  }
}

// h[0:tokens, 0:rank] (+)= x · a over `width` columns
__attribute__((noinline)) void shrink_tile(const float* a, int64_t a_row, const float* x, int64_t x_row, int tokens,
                                           int64_t width, int64_t rank, float* h, bool add) {
  for (int64_t j = 0; j < rank; j += NR) {
    with_count(int(std::min<int64_t>(NR, rank - j)), [&](auto rows_a) {
      with_count(tokens, [&](auto rows_x) {
        if constexpr (rows_a.value <= NR && rows_x.value <= MR) {
          vec acc[rows_a.value][rows_x.value] = {};
          dot(a + j * a_row, a_row, x, x_row, width, acc);
          LK_UNROLL for (int m = 0; m < rows_x.value; m++) {
            LK_UNROLL for (int i = 0; i < rows_a.value; i++) {
              float& to = h[m * rank + j + i];
              to = (add ? to : 0.f) + sum(acc[i][m]);
            }
          }
        }
      });
    });
  }
}

// columns of x at a time: the tile and A's block stay in the nearer caches
constexpr int64_t SHRINK_K = 1024;

}  // namespace

void shrink(const Shrink& p) {
  const int64_t row = lines(p.n_in);
  const Buffer a(p.rank * row);
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range ranks = share(p.rank, 1, thread, threads), tokens = share(p.tokens, MR, thread, threads);
    pack(p.a, p.gain, p.scale, ranks.first, ranks.last, p.n_in, a.get(), row);
    const Buffer x_tile(MR * SHRINK_K);
#pragma omp barrier
    with_type(p.x, [&](auto* x) {
      using T = std::remove_pointer_t<decltype(x)>;
      for (int64_t t = tokens.first; t < tokens.last; t += MR) {
        const int count = int(std::min<int64_t>(MR, tokens.last - t));
        for (int64_t k = 0; k < p.n_in; k += SHRINK_K) {
          const int64_t width = std::min(SHRINK_K, p.n_in - k);
          const float* rows = x_tile.get();
          int64_t rows_row = SHRINK_K;
          if (std::is_same_v<T, float> && !p.dropout.active()) {
            rows = reinterpret_cast<const float*>(x) + t * p.x.row + k;
            rows_row = p.x.row;
          } else {
            tile(x, p.x.row, p.dropout, t, count, k, width, x_tile.get(), SHRINK_K);
          }
          shrink_tile(a.get() + k, row, rows, rows_row, count, width, p.rank, p.h + t * p.rank, k > 0);
        }
      }
    });
  }
}

namespace {

constexpr int CV = LK_VL == 16 ? 4 : 2;  // vectors of columns in a register tile
constexpr int CR = LK_VL == 16 ? 6 : 4;  // rows in a register tile
constexpr int64_t COLUMNS = CV * VL;

// ROWS × COLUMNS of `to`; b and mask cover these columns
template <int ROWS, typename From, typename To>
LK_INLINE void expand_tile(const Expand& p, const From* from, To* to, const float* b, int64_t b_row, const float* h,
                           const float* gain, const float* bias, const float* mask, int64_t columns) {
  vec acc[ROWS][CV] = {};
  for (int64_t i = 0; i < p.rank; i++) {
    vec row[CV];
    LK_UNROLL for (int c = 0; c < CV; c++) row[c] = load(b + i * b_row + c * VL);
    LK_UNROLL for (int m = 0; m < ROWS; m++) {
      const vec v = splat(h[m * p.rank + i]);
      LK_UNROLL for (int c = 0; c < CV; c++) acc[m][c] += v * row[c];
    }
  }
  LK_UNROLL for (int m = 0; m < ROWS; m++) {
    LK_UNROLL for (int c = 0; c < CV; c++) {
      const int64_t left = columns - c * VL;
      if (left <= 0) continue;
      vec base = {};
      if (from) {
        const From* source = from + m * p.from.row + c * VL;
        base = load_some(source, left);
      }
      vec value = acc[m][c];
      if (mask) {
        const vec keep = load(mask + m * COLUMNS + c * VL);
        value *= keep;
        if (p.mask_from) base *= keep;
      }
      value += base;
      if (gain) value *= load(gain + c * VL);
      if (bias) value += load(bias + c * VL);
      To* target = to + m * p.to.row + c * VL;
      left >= VL ? store(target, value) : store_first(target, value, left);
    }
  }
}

template <typename From, typename To>
void expand_rows(const Expand& p, const From* from, To* to, const float* b, int64_t b_row, const float* gain,
                 const float* bias, Range tokens) {
  float mask[CR * COLUMNS];
  for (int64_t t = tokens.first; t < tokens.last; t += CR) {
    const int count = int(std::min<int64_t>(CR, tokens.last - t));
    for (int64_t n = 0; n < p.n_out; n += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, p.n_out - n);
      if (p.dropout.active()) {
        for (int m = 0; m < count; m++) dropout_mask(p.dropout, t + m, n, COLUMNS, mask + m * COLUMNS);
      }
      with_count(count, [&](auto rows) {
        if constexpr (rows.value <= CR) {
          expand_tile<rows.value>(p, from ? from + t * p.from.row + n : nullptr, to + t * p.to.row + n, b + n, b_row,
                                  p.h + t * p.rank, p.gain.data ? gain + n : nullptr, p.bias.data ? bias + n : nullptr,
                                  p.dropout.active() ? mask : nullptr, columns);
        }
      });
    }
  }
}

}  // namespace

void expand(const Expand& p) {
  const int64_t row = (p.n_out + COLUMNS - 1) / COLUMNS * COLUMNS;
  const Buffer packed((p.rank + 2) * row);
  float *b = packed.get(), *gain = b + p.rank * row, *bias = gain + row;
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range ranks = share(p.rank, 1, thread, threads), tokens = share(p.tokens, CR, thread, threads);
    pack(p.b, View{}, 1.f, ranks.first, ranks.last, p.n_out, b, row);
    if (thread == 0 && p.gain.data) pack(p.gain, View{}, 1.f, 0, 1, p.n_out, gain, row);
    if (thread == threads - 1 && p.bias.data) pack(p.bias, View{}, 1.f, 0, 1, p.n_out, bias, row);
#pragma omp barrier
    with_type(p.to, [&](auto* to) {
      if (p.from.type == p.to.type) {
        expand_rows(p, static_cast<decltype(to)>(p.from.data), to, b, row, gain, bias, tokens);
      } else {
        expand_rows(p, static_cast<const float*>(p.from.data), to, b, row, gain, bias, tokens);
      }
    });
  }
}

namespace {

constexpr int64_t OUTER_T = 128;  // tokens at a time: the tile of x stays in the first-level cache

// d[0:ROWS, columns] += pᵀ x over `tokens` rows
template <int ROWS>
LK_INLINE void outer_tile(const float* p, int64_t p_row, const float* x, int64_t x_row, int64_t tokens, float* d,
                          int64_t d_row) {
  vec acc[ROWS][CV];
  LK_UNROLL for (int i = 0; i < ROWS; i++) LK_UNROLL for (int c = 0; c < CV; c++)
      acc[i][c] = load(d + i * d_row + c * VL);
  for (int64_t t = 0; t < tokens; t++) {
    vec row[CV];
    LK_UNROLL for (int c = 0; c < CV; c++) row[c] = load(x + t * x_row + c * VL);
    LK_UNROLL for (int i = 0; i < ROWS; i++) {
      const vec v = splat(p[t * p_row + i]);
      LK_UNROLL for (int c = 0; c < CV; c++) acc[i][c] += v * row[c];
    }
  }
  LK_UNROLL for (int i = 0; i < ROWS; i++) LK_UNROLL for (int c = 0; c < CV; c++)
      store(d + i * d_row + c * VL, acc[i][c]);
}

__attribute__((noinline)) void outer_tiles(const float* p, int64_t rank, const float* x, int64_t x_row, int64_t tokens,
                                           float* d) {
  for (int64_t i = 0; i < rank; i += CR) {
    with_count(int(std::min<int64_t>(CR, rank - i)), [&](auto ranks) {
      if constexpr (ranks.value <= CR) outer_tile<ranks.value>(p + i, rank, x, x_row, tokens, d + i * COLUMNS, COLUMNS);
    });
  }
}

}  // namespace

void outer(const Outer& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range columns = share(p.n_in, COLUMNS, omp_get_thread_num(), omp_get_num_threads());
    const Buffer scratch(OUTER_T * COLUMNS + p.rank * COLUMNS);
    float *x_tile = scratch.get(), *d = x_tile + OUTER_T * COLUMNS;
    std::fill(x_tile, d, 0.f);
    with_type(p.x, [&](auto* x) {
      using T = std::remove_pointer_t<decltype(x)>;
      for (int64_t k = columns.first; k < columns.last; k += COLUMNS) {
        const int64_t width = std::min(COLUMNS, p.n_in - k);
        std::fill(d, d + p.rank * COLUMNS, 0.f);
        for (int64_t t = 0; t < p.tokens; t += OUTER_T) {
          const int64_t tokens = std::min(OUTER_T, p.tokens - t);
          const float* rows = x_tile;
          int64_t rows_row = COLUMNS;
          // read once, and not again for more ranks: rows a power of two apart share a cache set
          if (p.packed) {
            dequantise_rows(*p.packed, t, tokens, k, width, x_tile, COLUMNS);
          } else if (std::is_same_v<T, float> && !p.dropout.active() && width == COLUMNS && p.rank <= CR) {
            rows = reinterpret_cast<const float*>(x) + t * p.x.row + k;
            rows_row = p.x.row;
          } else {
            tile(x, p.x.row, p.dropout, t, tokens, k, width, x_tile, COLUMNS);
          }
          outer_tiles(p.p + t * p.rank, p.rank, rows, rows_row, tokens, d);
        }
        if (p.gain.data) {
          with_type(p.gain, [&](auto* g) {
            for (int64_t c = 0; c < width; c++) {
              for (int64_t i = 0; i < p.rank; i++) d[i * COLUMNS + c] *= to_float(g[(k + c) * p.gain.col]);
            }
          });
        }
        with_type(p.d, [&](auto* out) {
          if (p.d.row == 1) {
            float some[VL];
            for (int64_t i = 0; i < p.rank; i += VL) {
              const int64_t ranks = std::min<int64_t>(VL, p.rank - i);
              for (int64_t c = 0; c < width; c++) {
                for (int64_t r = 0; r < ranks; r++) some[r] = d[(i + r) * COLUMNS + c];
                auto* to = out + i + (k + c) * p.d.col;
                ranks == VL ? store(to, load(some)) : store_first(to, load(some), ranks);
              }
            }
            return;
          }
          for (int64_t i = 0; i < p.rank; i++) {
            int64_t c = 0;
            if (p.d.col == 1) {
              for (; c + VL <= width; c += VL) store(out + i * p.d.row + k + c, load(d + i * COLUMNS + c));
            }
            for (; c < width; c++) store_scalar(out + i * p.d.row + (k + c) * p.d.col, d[i * COLUMNS + c]);
          }
        });
      }
    });
  }
}

namespace {

constexpr int64_t SUMMED = 32;  // tokens: their lines of a column stay in the first-level cache

}  // namespace

void column_sums(const ColumnSums& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range columns = share(p.n_out, VL, omp_get_thread_num(), omp_get_num_threads());
    float* sums = p.sums;
    std::fill(sums + columns.first, sums + columns.last, 0.f);
    with_type(p.u, [&](auto* u) {
      const auto* v = static_cast<decltype(u)>(p.v.data);
      // sums of a few tokens, then of these: one after another, roundings would grow with the tokens
      for (int64_t first = 0; first < p.tokens; first += SUMMED) {
        const int64_t last = std::min(first + SUMMED, p.tokens);
        for (int64_t n = columns.first; n < columns.last; n += VL) {
          const int64_t left = columns.last - n;
          const auto get = [&](auto* q, int64_t t, int64_t row) { return load_some(q + t * row + n, left); };
          vec part = {};
          for (int64_t t = first; t < last; t++) {
            const vec value = get(u, t, p.u.row);
            part += p.v.data ? value * get(v, t, p.v.row) : value;
          }
          left >= VL ? store(sums + n, load(sums + n) + part)
                     : store_first(sums + n, load_first(sums + n, left) + part, left);
        }
      }
    });
  }
}

}  // namespace lk::LK_LEVEL
