// The fused forward for few tokens. One parallel region: h = scale · drop(x) Aᵀ, a barrier, then
// every thread streams its rows of W once. The LoRA term is rank more steps of the same dot
// product, so it costs no second pass.
#include <omp.h>

#include <algorithm>
#include <memory>

#include "../common/dot.h"
#include "../common/philox.h"
#include "../quantised/products.h"
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
constexpr int MOST = PAIRS ? 2 * NR : NR;  // rows of W at a time

// columns of W a pass: the tile of x, which every group of rows reads again, stays in the
// first-level cache
template <typename X>
LK_INLINE int64_t block_k(int64_t tokens) {
  constexpr int64_t TILE = (32 << 10) / sizeof(X), LEAST = 256;
  return tokens * LEAST > TILE ? LEAST : TILE / tokens / 64 * 64;
}

struct Scratch {
  int64_t x_row, h_row;  // padded to whole vectors, the padding zero
  // [tokens, x_row] twice (may be one) [tokens, h_row] [threads, MOST * max(x_row, h_row)]
  float *x, *x_dropped, *h, *a;
  // [tokens, pairs_row], or null; for codes, in their order, blocks of columns: [tokens, block] each,
  // since rows so far apart would share the sets of the first-level cache
  bf16 *pairs, *blocks;
  int64_t pairs_row, block;
};

// x as bf16, for codes too
void copy_rows(const ForwardSmall& p, const bf16* x, const Scratch& s, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    bf16* row = s.pairs + t * s.pairs_row;
    std::copy(x + t * p.x.row, x + t * p.x.row + p.n_in, row);
    std::fill(row + p.n_in, row + s.pairs_row, bf16{0});
    std::fill(s.h + t * s.h_row + p.rank, s.h + (t + 1) * s.h_row, 0.f);
#if defined(LK_PAIRS)
    for (int64_t k = 0; k < p.n_in && s.blocks; k += s.block) {
      const int64_t count = std::min(s.block, p.n_in - k);
      bf16* block = s.blocks + k * p.tokens + t * count;
      for (int64_t i = 0; i < count; i += STEP) {
        const __m512i some = _mm512_loadu_si512(row + k + i);
        _mm512_storeu_si512(block + i, p.packed->code == Code::nibbles ? Quads::ordered(some) : some);
      }
    }
#endif
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
  for (int64_t k = 0; k < p.n_in; k += s.block) {
    const int64_t count = std::min(s.block, p.n_in - k);
    const X* columns_of_x = W::CODES ? x + k * p.tokens : x + k;
    const int64_t row = W::CODES ? count : x_row;
    const bool last = k + count == p.n_in;
    const auto now = columns<NROWS>(w, k, count);
    for (int g = 0; g < groups; g++) {
      const int64_t t = p.tokens * g / groups;
      with_count(int(p.tokens * (g + 1) / groups - t), [&](auto m) {
        if constexpr (m.value <= W::TOKENS) {
          vec acc[NROWS][m.value] = {};
          vec* kept = partial + t * NROWS;
          if (k > 0) {
            LK_UNROLL for (int i = 0; i < m.value; i++) LK_UNROLL for (int j = 0; j < NROWS; j++)
                acc[j][i] = kept[i * NROWS + j];
          }
          dot(now, columns_of_x + t * row, row, count, acc);
          if (!last) {
            LK_UNROLL for (int i = 0; i < m.value; i++) LK_UNROLL for (int j = 0; j < NROWS; j++)
                kept[i * NROWS + j] = acc[j][i];
            return;
          }
          dot(b, s.h_row, s.h + t * s.h_row, s.h_row, s.h_row, acc);
          LK_UNROLL for (int i = 0; i < m.value; i++) {
            LK_UNROLL for (int j = 0; j < NROWS; j += 4) {
              const auto of = [&](int r) { return r < NROWS ? acc[r < NROWS ? r : 0][i] : vec{}; };
              const Four four = sum4(of(j), of(j + 1), of(j + 2), of(j + 3));
              for (int r = j; r < std::min(j + 4, NROWS); r++) sums[r * p.tokens + t + i] = four.v[r - j];
            }
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

// w(n, count): rows of W, `MANY` at a time where there are as many
template <int MANY, typename W, typename Y>
LK_INLINE void stream(const ForwardSmall& p, const W& w, const Scratch& s, float* b, Y* y, Range rows) {
  const auto sums = std::make_unique<float[]>(MANY * p.tokens);
  const auto partial = std::make_unique<vec[]>(MANY * p.tokens);
  const auto some = [&](int64_t n, auto now) {
    with_type(p.b, [&](auto* from) {
      for (int j = 0; j < now.value; j++) {
        widen(from + (n + j) * p.b.row, p.b.col, p.rank, b + j * s.h_row);
        std::fill(b + j * s.h_row + p.rank, b + (j + 1) * s.h_row, 0.f);
      }
    });
    const auto rows_of_w = w(n, now.value);
    const auto run = [&](auto* x, int64_t x_row) {
      outputs<now.value>(p, rows_of_w, x, x_row, s, b, partial.get(), sums.get(), y, n);
    };
    if constexpr (PAIRS) run(rows_of_w.CODES ? s.blocks : s.pairs, s.pairs_row);
    else run(s.x, s.x_row);
  };
  int64_t n = rows.first;
  for (; n + MANY <= rows.last; n += MANY) some(n, std::integral_constant<int, MANY>{});
  for (; n < rows.last; n += NR) {
    with_count(int(std::min<int64_t>(NR, rows.last - n)), [&](auto count) {
      if constexpr (count.value < MANY && count.value <= NR) some(n, count);
    });
  }
}

#if defined(LK_PAIRS)
// run(rows, how many at a time) with W's codes, to be decoded where they meet x
template <typename C, typename Run>
LK_INLINE void stream_codes(const ForwardSmall& p, float* scales, bf16* numbers, Run run) {
  const Quantised& q = *p.packed;
  const C decoder(q);
  const int64_t blocks = p.n_in / q.block, row = p.n_in * C::BYTES / STEP;
  const auto coded = [&](int64_t n, int count, auto tokens) {
    const int64_t first = q.first + n;
    const float* of = scales_of(q, -1, first * blocks, count * blocks, scales);
    return Coded<C, tokens.value>{q, decoder, q.codes + first * row, row, of, blocks, 0};
  };
  // one or two tokens have too few sums for how long a product takes, but of many rows
  constexpr std::integral_constant<int, 2> FEW{};
  constexpr std::integral_constant<int, 4> SOME{};
  constexpr std::integral_constant<int, MOST> MANY{};
  constexpr std::integral_constant<int, NR> AT_ONCE{};
  constexpr std::integral_constant<int, MR> AT_A_TIME{};
  if (p.tokens <= FEW) return run([&](int64_t n, int count) { return coded(n, count, FEW); }, MANY);
  if (p.tokens <= SOME) return run([&](int64_t n, int count) { return coded(n, count, SOME); }, AT_ONCE);
  run([&](int64_t n, int count) { return Panel<C>{coded(n, count, AT_A_TIME), numbers}; }, AT_ONCE);
}
#endif

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
  const bool coded = p.packed && meets_x(*p.packed);
  const int64_t copies = dropped ? 2 : wide ? 1 : 0, a_row = MOST * std::max(s.x_row, s.h_row);
  const int64_t of_pairs = PAIRS ? lines(p.tokens * s.pairs_row / 2) : 0, of_x = of_pairs * (coded ? 2 : 1);
  using Wide = std::conditional_t<PAIRS, bf16, float>;  // what a row of codes becomes
  const int64_t w_row = PAIRS ? s.pairs_row : s.x_row;
  const int64_t of_numbers = p.packed ? NR * w_row * int64_t(sizeof(Wide)) / 4 : 0;
  const int64_t of_w = of_numbers + (coded ? lines(MOST * p.n_in / p.packed->block) : 0);
  const Buffer scratch(copies * p.tokens * s.x_row + p.tokens * s.h_row + p.threads * a_row + of_x + p.threads * of_w);
  s.x = scratch.get();
  s.x_dropped = s.x + (dropped ? p.tokens * s.x_row : 0);
  s.h = s.x + copies * p.tokens * s.x_row;
  s.a = s.h + p.tokens * s.h_row;
  s.pairs = reinterpret_cast<bf16*>(s.a + p.threads * a_row);
  s.blocks = coded ? s.pairs + 2 * of_pairs : nullptr;
  s.block = PAIRS ? block_k<bf16>(p.tokens) : block_k<float>(p.tokens);
  float* wide_w = s.a + p.threads * a_row + of_x;
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
    with_type(p.w, [&](auto* w) {
      using T = std::remove_pointer_t<decltype(w)>;
      if constexpr (taken<T>) {
        const auto run = [&](const auto& of, auto at_once) {
          if (p.y.type == DType::f32) stream<at_once.value>(p, of, s, own, static_cast<float*>(p.y.data), rows);
          else stream<at_once.value>(p, of, s, own, static_cast<T*>(p.y.data), rows);
        };
        const std::integral_constant<int, NR> at_once{};
        if (!p.packed) return run([&](int64_t n, int) { return Rows<T>{w + n * p.w.row, p.w.row}; }, at_once);
        float* numbers = wide_w + thread * of_w;
#if defined(LK_PAIRS)
        if (coded) {
          const auto stream_as = p.packed->code == Code::nibbles ? stream_codes<Quads, decltype(run)>
                                                                 : stream_codes<Bytes8, decltype(run)>;
          return stream_as(p, numbers + of_numbers, reinterpret_cast<bf16*>(numbers), run);
        }
#endif
        auto* to = reinterpret_cast<Wide*>(numbers);
        run(
            [&](int64_t n, int count) {
              dequantise_rows(*p.packed, n, count, 0, p.n_in, to, w_row);
              return Rows<Wide>{to, w_row};
            },
            at_once);
      }
    });
  }
}

}  // namespace lk::LK_LEVEL
