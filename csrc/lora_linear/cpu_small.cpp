// The fused forward for few tokens. One parallel region: h = scale · drop(x) Aᵀ, a barrier, then
// every thread streams its rows of W once. The LoRA term is rank more steps of the same dot
// product, so it costs no second pass.
#include <omp.h>

#include <algorithm>
#include <memory>

#include "../common/dot.h"
#include "../common/philox.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

#if defined(LK_PAIRS)
constexpr bool PAIRS = true;  // bf16 alone, x and W, and without widening
#else
constexpr bool PAIRS = false;
#endif
template <typename T>
constexpr bool taken = !PAIRS || std::is_same_v<T, bf16>;

// columns of W a pass: the tile of x, which every group of rows reads again, stays in the
// first-level cache
template <typename X>
LK_INLINE int64_t block_k(int64_t tokens) {
  constexpr int64_t TILE = (32 << 10) / sizeof(X), LEAST = 256;
  return tokens * LEAST > TILE ? LEAST : TILE / tokens / 64 * 64;
}

struct Scratch {
  int64_t x_row, h_row;  // padded to whole vectors, the padding zero
  // [tokens, x_row] twice (may be one) [tokens, h_row] [threads, NR * max(x_row, h_row)]
  float *x, *x_dropped, *h, *a;
  bf16* pairs;  // [tokens, pairs_row], or null
  int64_t pairs_row;
};

// Rows of W one after another, `row` elements from one to the next.
template <typename W>
struct Rows {
  const W* at;
  int64_t row;
};

template <typename W, typename X, int N, int M>
LK_INLINE void multiply(const Rows<W>& w, int64_t k, const X* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  dot(w.at + k, w.row, x, x_row, count, acc);
}

#if defined(LK_PAIRS)
constexpr int64_t DECODED = 4;  // tokens up to which codes are not worth a place in memory as numbers

// Rows of codes, C how they are decoded; each row begins with a block.
template <typename C>
struct Coded {
  const Quantised& q;
  C decoder;
  const uint8_t* codes;
  int64_t row;
  const float* scales;  // [rows, blocks]
  int64_t blocks;
};

// numbers of W are in registers only, for a product with each token
template <typename C, int N, int M>
LK_INLINE void multiply(const Coded<C>& w, int64_t k, const bf16* x, int64_t x_row, int64_t count, vec (&acc)[N][M]) {
  const int64_t end = k + count;
  const uint8_t* codes = w.codes + k * C::BYTES / STEP;
  for (int64_t block = k / w.q.block; k < end; block++) {
    typename C::Scale by[N];
    LK_UNROLL for (int j = 0; j < N; j++) {
      by[j] = w.decoder.template scale<bf16>(w.q, w.scales[j * w.blocks + block]);
      __builtin_prefetch(codes + (N + j) * w.row);
    }
    for (const int64_t until = std::min((block + 1) * w.q.block, end); k < until; k += STEP) {
      __m512bh row[N];
      LK_UNROLL for (int j = 0; j < N; j++) row[j] = (__m512bh)w.decoder.step(codes + j * w.row, by[j]);
      LK_UNROLL for (int m = 0; m < M; m++) {
        const auto v = (__m512bh)_mm512_loadu_si512(x + m * x_row);
        LK_UNROLL for (int j = 0; j < N; j++) acc[j][m] = (vec)_mm512_dpbf16_ps((__m512)acc[j][m], row[j], v);
      }
      codes += C::BYTES, x += STEP;
    }
  }
}
#endif

// x as bf16
void copy_rows(const ForwardSmall& p, const bf16* x, const Scratch& s, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    bf16* row = s.pairs + t * s.pairs_row;
    std::copy(x + t * p.x.row, x + t * p.x.row + p.n_in, row);
    std::fill(row + p.n_in, row + s.pairs_row, bf16{0});
    std::fill(s.h + t * s.h_row + p.rank, s.h + (t + 1) * s.h_row, 0.f);
  }
}

// rows of x as floats; dropped rows beside them
template <typename T>
void widen_rows(const ForwardSmall& p, const T* x, const Scratch& s, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    float* row = s.x + t * s.x_row;
    widen(x + t * p.x.row, 1, p.n_in, row);
    std::fill(row + p.n_in, row + s.x_row, 0.f);
    std::fill(s.h + t * s.h_row + p.rank, s.h + (t + 1) * s.h_row, 0.f);
    if (!p.dropout.active()) continue;
    float* dropped = s.x_dropped + t * s.x_row;
    dropout_mask(p.dropout, t, 0, p.n_in, dropped);
    for (int64_t k = 0; k < p.n_in; k++) dropped[k] *= row[k];
    std::fill(dropped + p.n_in, dropped + s.x_row, 0.f);
  }
}

// h of one row of A for every token
template <typename T>
void shrink_row(const ForwardSmall& p, const T* a, const Scratch& s, int64_t j, float* a_row) {
  widen(a, 1, p.n_in, a_row);
  std::fill(a_row + p.n_in, a_row + s.x_row, 0.f);
  for (int64_t t = 0; t < p.tokens; t += 4) {
    const int count = int(std::min<int64_t>(4, p.tokens - t));
    with_count(count, [&](auto m) {
      vec acc[1][m.value] = {};
      dot(a_row, s.x_row, s.x_dropped + t * s.x_row, s.x_row, s.x_row, acc);
      for (int i = 0; i < m.value; i++) {
        const float value = p.scale * sum(acc[0][i]);
        s.h[(t + i) * s.h_row + j] = value;
        if (p.h) p.h[(t + i) * p.rank + j] = value;
      }
    });
  }
}

#if defined(LK_PAIRS)
// h of A's rows first..last, bf16, for every token
void shrink_pairs(const ForwardSmall& p, const bf16* a, const Scratch& s, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; j += NR) {
    with_count(int(std::min<int64_t>(NR, last - j)), [&](auto rows) {
      for (int64_t t = 0; t < p.tokens; t += MR) {
        with_count(int(std::min<int64_t>(MR, p.tokens - t)), [&](auto m) {
          if constexpr (rows.value <= NR && m.value <= MR) {
            vec acc[rows.value][m.value] = {};
            dot(a + j * p.a.row, p.a.row, s.pairs + t * s.pairs_row, s.pairs_row, p.n_in, acc);
            for (int i = 0; i < m.value; i++) {
              for (int r = 0; r < rows.value; r++) {
                const float value = p.scale * sum(acc[r][i]);
                s.h[(t + i) * s.h_row + j + r] = value;
                if (p.h) p.h[(t + i) * p.rank + j + r] = value;
              }
            }
          }
        });
      }
    });
  }
}
#endif

// NROWS outputs of W for every token; b is [NROWS, h_row]. partial, [tokens, NROWS], holds sums
// between two blocks as vectors, to be added up once at the end; sums is [NROWS, tokens].
template <int NROWS, typename W, typename X, typename Y>
LK_INLINE void outputs(const ForwardSmall& p, const W& w, const X* x, int64_t x_row, const Scratch& s, const float* b,
                       vec* partial, float* sums, Y* y, int64_t n) {
  const int groups = int((p.tokens + MR - 1) / MR);
  const int64_t block = block_k<X>(p.tokens);
  for (int64_t k = 0; k < p.n_in; k += block) {
    const int64_t count = std::min(block, p.n_in - k);
    const bool last = k + count == p.n_in;
    for (int g = 0; g < groups; g++) {
      const int64_t t = p.tokens * g / groups;
      with_count(int(p.tokens * (g + 1) / groups - t), [&](auto m) {
        if constexpr (m.value <= MR) {
          vec acc[NROWS][m.value] = {};
          vec* kept = partial + t * NROWS;
          if (k > 0) {
            LK_UNROLL for (int i = 0; i < m.value; i++) LK_UNROLL for (int j = 0; j < NROWS; j++)
                acc[j][i] = kept[i * NROWS + j];
          }
          multiply(w, k, x + t * x_row + k, x_row, count, acc);
          if (!last) {
            LK_UNROLL for (int i = 0; i < m.value; i++) LK_UNROLL for (int j = 0; j < NROWS; j++)
                kept[i * NROWS + j] = acc[j][i];
            return;
          }
          dot(b, s.h_row, s.h + t * s.h_row, s.h_row, s.h_row, acc);
          LK_UNROLL for (int i = 0; i < m.value; i++) {
            const Four four = sum4(acc[0][i], NROWS > 1 ? acc[NROWS > 1][i] : vec{},
                                   NROWS > 2 ? acc[NROWS > 2 ? 2 : 0][i] : vec{},
                                   NROWS > 3 ? acc[NROWS > 3 ? 3 : 0][i] : vec{});
            for (int j = 0; j < NROWS; j++) sums[j * p.tokens + t + i] = four.v[j];
          }
        }
      });
    }
  }
  for (int j = 0; j < NROWS; j++) {
    float gain = 1.f, bias = 0.f;
    if (p.gain.data) with_type(p.gain, [&](auto* v) { gain = to_float(v[(n + j) * p.gain.col]); });
    if (p.bias.data) with_type(p.bias, [&](auto* v) { bias = to_float(v[(n + j) * p.bias.col]); });
    for (int64_t t = 0; t < p.tokens; t++) store_scalar(y + t * p.y.row + n + j, gain * sums[j * p.tokens + t] + bias);
    if (Y* z = static_cast<Y*>(p.z.data)) {
      for (int64_t t = 0; t < p.tokens; t++) store_scalar(z + t * p.z.row + n + j, sums[j * p.tokens + t]);
    }
  }
}

// w(n, count): rows of W
template <typename W, typename Y>
void stream(const ForwardSmall& p, const W& w, const Scratch& s, float* b, Y* y, Range rows) {
  const auto sums = std::make_unique<float[]>(NR * p.tokens);
  const auto partial = std::make_unique<vec[]>(NR * p.tokens);
  for (int64_t n = rows.first; n < rows.last; n += NR) {
    const int count = int(std::min<int64_t>(NR, rows.last - n));
    with_type(p.b, [&](auto* from) {
      for (int j = 0; j < count; j++) {
        widen(from + (n + j) * p.b.row, p.b.col, p.rank, b + j * s.h_row);
        std::fill(b + j * s.h_row + p.rank, b + (j + 1) * s.h_row, 0.f);
      }
    });
    const auto rows_of_w = w(n, count);
    with_count(count, [&](auto rows_now) {
      if constexpr (rows_now.value <= NR) {
        const auto run = [&](auto* x, int64_t x_row) {
          outputs<rows_now.value>(p, rows_of_w, x, x_row, s, b, partial.get(), sums.get(), y, n);
        };
        if constexpr (PAIRS) run(s.pairs, s.pairs_row);
        else run(s.x, s.x_row);
      }
    });
  }
}

}  // namespace

void forward_small(const ForwardSmall& p) {
  Scratch s;
  // an odd number of cache lines a row: at a power of two the same columns of all rows would share
  // one cache set
  s.x_row = lines(p.n_in);
  if (s.x_row % 32 == 0) s.x_row += 16;
  s.h_row = lines(p.rank);
  s.pairs_row = (p.n_in + 31) / 32 * 32;
  if (s.pairs_row % 64 == 0) s.pairs_row += 32;
  const bool dropped = p.dropout.active();
  // whether x is needed in float32: by W, or by A
  const bool wide = !PAIRS || dropped || p.a.type != DType::bf16;
  const int64_t copies = dropped ? 2 : wide ? 1 : 0, a_row = NR * std::max(s.x_row, s.h_row);
  const int64_t of_pairs = PAIRS ? p.tokens * s.pairs_row / 2 : 0;
  using Wide = std::conditional_t<PAIRS, bf16, float>;  // what a row of codes becomes
  const int64_t w_row = PAIRS ? s.pairs_row : s.x_row;
  const int64_t of_w = p.packed ? NR * w_row * int64_t(sizeof(Wide)) / 4 : 0;
  const Buffer scratch(copies * p.tokens * s.x_row + p.tokens * s.h_row + p.threads * a_row + lines(of_pairs) +
                       p.threads * of_w);
  s.x = scratch.get();
  s.x_dropped = s.x + (dropped ? p.tokens * s.x_row : 0);
  s.h = s.x + copies * p.tokens * s.x_row;
  s.a = s.h + p.tokens * s.h_row;
  s.pairs = reinterpret_cast<bf16*>(s.a + p.threads * a_row);
  float* wide_w = s.a + p.threads * a_row + lines(of_pairs);
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    float* own = s.a + thread * a_row;
    const Range tokens = share(p.tokens, 1, thread, threads);
    if (PAIRS) copy_rows(p, static_cast<const bf16*>(p.x.data), s, tokens.first, tokens.last);
    with_type(p.x, [&](auto* x) {
      if constexpr (taken<std::remove_pointer_t<decltype(x)>>) {
        if (wide) widen_rows(p, x, s, tokens.first, tokens.last);
      }
    });
#pragma omp barrier
    const Range ranks = share(p.rank, 1, thread, threads);
    if (wide) {
      with_type(p.a, [&](auto* a) {
        for (int64_t j = ranks.first; j < ranks.last; j++) shrink_row(p, a + j * p.a.row, s, j, own);
      });
    } else {
#if defined(LK_PAIRS)
      shrink_pairs(p, static_cast<const bf16*>(p.a.data), s, ranks.first, ranks.last);
#endif
    }
#pragma omp barrier
    const Range rows = share(p.n_out, NR, thread, threads);
    const auto run = [&](const auto& w, auto* y) {
      if (p.y.type == DType::f32) stream(p, w, s, own, static_cast<float*>(p.y.data), rows);
      else stream(p, w, s, own, y, rows);
    };
    with_type(p.w, [&](auto* w) {
      using T = std::remove_pointer_t<decltype(w)>;
      if constexpr (taken<T>) {
        auto* y = static_cast<T*>(p.y.data);
        if (!p.packed) return run([&](int64_t n, int) { return Rows<T>{w + n * p.w.row, p.w.row}; }, y);
#if defined(LK_PAIRS)
        const Quantised& q = *p.packed;
        if (p.tokens <= DECODED && in_steps(q) && p.n_in % q.block == 0) {
          const int64_t blocks = p.n_in / q.block;
          float* scales = wide_w + thread * of_w;
          const auto coded = [&](auto decoder) {
            using C = decltype(decoder);
            run(
                [&](int64_t n, int count) {
                  const int64_t first = q.first + n, row = p.n_in * C::BYTES / STEP;
                  const float* of = scales_of(q, -1, first * blocks, count * blocks, scales);
                  return Coded<C>{q, decoder, q.codes + first * row, row, of, blocks};
                },
                y);
          };
          return q.code == Code::nibbles ? coded(Nibbles(q)) : coded(Int8(q));
        }
#endif
        auto* to = reinterpret_cast<Wide*>(wide_w + thread * of_w);
        run(
            [&](int64_t n, int count) {
              dequantise_rows(*p.packed, n, count, 0, p.n_in, to, w_row);
              return Rows<Wide>{to, w_row};
            },
            y);
      }
    });
  }
}

}  // namespace lk::LK_LEVEL
