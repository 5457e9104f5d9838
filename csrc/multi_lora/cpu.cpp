// Many adapters over one base. One parallel region: h = s v · x Aᵀ for the tokens of each adapter,
// every row of A read once; a barrier; then each thread takes a part of the columns and adds h B
// for one adapter after the other, every row of B read once. Work and bytes follow the sum of the
// ranks. What a token gets does not depend on the others.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int PAGE = 8;        // rank rows
constexpr int64_t BLOCK = 32;  // tokens of an adapter that one item of work takes

// the tokens of one adapter
struct Segment {
  int64_t slot, first, count;  // entries of `order`
  int64_t h;                   // where theirs begins, [count, rank]
  int64_t rank;
};

struct Work {
  std::vector<Segment> segments;
  std::vector<std::pair<int, int64_t>> blocks;  // of a segment, from which of its tokens on
  std::vector<int64_t> items;                   // before each block: pages so far
  int64_t h = 0;
};

Work plan(const MultiLora& p) {
  Work work;
  for (int64_t slot = 0; slot < p.slots; slot++) {
    const int64_t first = p.starts[slot], count = p.starts[slot + 1] - first, rank = p.rank[slot];
    if (count == 0) continue;
    work.segments.push_back({slot, first, count, work.h, rank});
    work.h += count * rank;
  }
  int64_t items = 0;
  for (size_t i = 0; i < work.segments.size(); i++) {
    const Segment& s = work.segments[i];
    for (int64_t t = 0; t < s.count; t += BLOCK) {
      work.blocks.push_back({int(i), t});
      work.items.push_back(items);
      items += (s.rank + PAGE - 1) / PAGE;
    }
  }
  work.items.push_back(items);
  return work;
}

// whether an entry's id is that of its slot now; if not, it counts as none, and the host is told
bool known(const MultiLora& p, int64_t entry, int64_t slot) {
  const int64_t id = p.ids[entry];
  return id >= 0 && (id & 0xffffffff) == slot && id >> 32 == p.generation[slot];
}

float weight(const MultiLora& p, int64_t entry, int64_t slot) {
  return !known(p, entry, slot) ? 0.f : p.weights ? p.weights[entry] : 1.f;
}

// acc[j][m] += rows[j] · x[m]
template <int N, int M, typename A>
LK_INLINE void dot_rows(const A* const* rows, const float* const* x, int64_t first, int64_t count, vec (&acc)[N][M]) {
  int64_t k = first;
  const int64_t last = first + count;
  for (; k + VL <= last; k += VL) {
    vec row[N];
    LK_UNROLL for (int j = 0; j < N; j++) row[j] = load(rows[j] + k);
    LK_UNROLL for (int m = 0; m < M; m++) {
      const vec v = load(x[m] + k);
      LK_UNROLL for (int j = 0; j < N; j++) acc[j][m] += row[j] * v;
    }
  }
  if (k < last) {
    LK_UNROLL for (int j = 0; j < N; j++) {
      const vec row = load_first(rows[j] + k, last - k);
      LK_UNROLL for (int m = 0; m < M; m++) acc[j][m] += row * load_first(x[m] + k, last - k);
    }
  }
}

constexpr int64_t SHRINK_K =
    1024;  // columns at a time: what several tokens or ranks read again stays in the first cache

// h of up to BLOCK tokens and the ranks of one page
template <typename A>
void shrink_page(const MultiLora& p, const Segment& s, int64_t token, int64_t page, const A* a, const float* x,
                 int64_t x_row, float* h) {
  const int64_t tokens = std::min(BLOCK, s.count - token), ranks = std::min<int64_t>(PAGE, s.rank - page * PAGE);
  const A* first = a + int64_t(p.table[s.slot * p.pages + page]) * PAGE * p.a.row;
  float factor[BLOCK];
  for (int64_t t = 0; t < tokens; t++) factor[t] = p.scale[s.slot] * weight(p, p.order[s.first + token + t], s.slot);
  for (int64_t k = 0; k < p.n_in || k == 0; k += SHRINK_K) {
    const int64_t width = std::min(SHRINK_K, p.n_in - k);
    const bool last = k + width >= p.n_in;
    const auto put = [&](int64_t t, int64_t j, float value) {
      float& to = h[s.h + (token + t) * s.rank + page * PAGE + j];
      value += k > 0 ? to : 0.f;
      to = !last ? value : factor[t] == 0.f ? 0.f : factor[t] * value;
    };
    const auto x_of = [&](int64_t t) { return x + p.order[s.first + token + t] / p.k * x_row; };
    // bound by how many lines are on their way: eight rows at once
    if (tokens == 1 && ranks == PAGE) {
      const A* rows[PAGE];
      for (int j = 0; j < PAGE; j++) rows[j] = first + j * p.a.row;
      const float* xs[1] = {x_of(0)};
      vec acc[PAGE][1] = {};
      dot_rows(rows, xs, k, width, acc);
      for (int j = 0; j < PAGE; j++) put(0, j, sum(acc[j][0]));
      continue;
    }
    for (int64_t t = 0; t < tokens; t += MR) {
      with_count(int(std::min<int64_t>(MR, tokens - t)), [&](auto of_x) {
        if constexpr (of_x.value <= MR) {
          const float* xs[of_x.value];
          for (int m = 0; m < of_x.value; m++) xs[m] = x_of(t + m);
          for (int64_t j = 0; j < ranks; j += NR) {
            with_count(int(std::min<int64_t>(NR, ranks - j)), [&](auto of_a) {
              if constexpr (of_a.value <= NR) {
                const A* rows[of_a.value];
                for (int i = 0; i < of_a.value; i++) rows[i] = first + (j + i) * p.a.row;
                vec acc[of_a.value][of_x.value] = {};
                dot_rows(rows, xs, k, width, acc);
                LK_UNROLL for (int m = 0; m < of_x.value; m++) {
                  LK_UNROLL for (int i = 0; i < of_a.value; i++) put(t + m, j + i, sum(acc[i][m]));
                }
              }
            });
          }
        }
      });
    }
  }
}

// VL numbers of a row, of which `left` are there; a branch for the type costs less than a kernel
// for each
LK_INLINE vec read(const View& m, int64_t row, int64_t n, int64_t left) {
  vec v = {};
  with_type(m, [&](auto* q) {
    q += row * m.row + n;
    v = load_some(q, left);
  });
  return v;
}
LK_INLINE void write(const View& m, int64_t row, int64_t n, int64_t left, vec v) {
  with_type(m, [&](auto* q) {
    q += row * m.row + n;
    left >= VL ? store(q, v) : store_first(q, v, left);
  });
}

// where a token's result goes
struct Epilogue {
  // `to` of the question, or what several adapters of a token add, [tokens, out]
  View to;
  const float *gain, *more, *bias;  // [out] each, or null
  bool adds;                        // several adapters: `to` gets what this one adds
};

// what becomes of the products of a token in columns n to last; not a part of each kernel, which
// would be 40 of it
__attribute__((noinline)) void epilogue(const MultiLora& p, const Epilogue& e, int64_t token, float v,
                                        const vec* products, int64_t n, int64_t last) {
  for (; n < last; n += VL, products++) {
    const int64_t left = last - n;
    const auto of = [&](const float* q) { return load_some(q + n, left); };
    const vec bias = e.bias ? of(e.bias) : vec{};
    vec product = *products, z = read(p.from, token, n, left), gain = splat(1.f);
    if (p.holds_bias && e.gain) z -= bias;
    if (v == 0.f) {  // an unknown id adds nothing, whatever the slot holds
      product = vec{};
    } else {
      if (e.gain) product *= gain = of(e.gain);
      if (e.more) product += v * of(e.more);
    }
    if (e.adds) {
      if (e.gain) product += v * (gain - 1.f) * z;
      write(e.to, token, n, left, read(e.to, token, n, left) + product);
      continue;
    }
    if (e.gain) z *= v == 1.f ? gain : 1.f + v * (gain - 1.f);
    z += product;
    if (e.bias && (!p.holds_bias || e.gain)) z += bias;
    write(e.to, token, n, left, z);
  }
}

// tokens, vectors of columns in a register tile
constexpr int CR = LK_VL == 16 ? 6 : 4, CV = LK_VL == 16 ? 4 : 2;
// vectors of columns for one token
constexpr int TOKEN_VECTORS = 8;
// columns that all tokens of an adapter pass over
constexpr int64_t COLUMN_BLOCK = TOKEN_VECTORS * VL * 4;

// ROWS tokens from `t` on and C vectors of columns: the product h B, then each token's result
template <int ROWS, int C, typename B>
LK_INLINE void expand_tile(const MultiLora& p, const Segment& s, const B* b, const float* h, int64_t t, const float* v,
                           const Epilogue& e, int64_t n, int64_t columns) {
  vec acc[ROWS][C] = {};
  h += s.h + t * s.rank;
  for (int64_t j = 0; j < s.rank; j += PAGE) {
    const B* page = b + int64_t(p.table[s.slot * p.pages + j / PAGE]) * PAGE * p.b.row + n;
    const int64_t ranks = std::min<int64_t>(PAGE, s.rank - j);
    for (int64_t i = 0; i < ranks; i++) {
      vec row[C];
      LK_UNROLL for (int c = 0; c < C; c++) {
        const int64_t left = columns - c * VL;
        const B* at = page + i * p.b.row + c * VL;
        row[c] = load_some(at, std::max<int64_t>(left, 0));
      }
      LK_UNROLL for (int m = 0; m < ROWS; m++) {
        const vec hs = splat(h[m * s.rank + j + i]);
        LK_UNROLL for (int c = 0; c < C; c++) acc[m][c] += hs * row[c];
      }
    }
  }
  vec products[ROWS][C];  // whose address is taken: the sums stay in registers
  LK_UNROLL for (int m = 0; m < ROWS; m++) LK_UNROLL for (int c = 0; c < C; c++) products[m][c] = acc[m][c];
  for (int m = 0; m < ROWS; m++) epilogue(p, e, p.order[s.first + t + m] / p.k, v[m], products[m], n, n + columns);
}

// The same for a token that has its adapter for itself: a page of B at a time along all of the
// columns, whose rows are read in long runs; the sums, [columns], stay in the first cache.
template <typename B>
void expand_token(const MultiLora& p, const Segment& s, const B* b, const float* h, const Epilogue& e, float* sums,
                  Range columns) {
  const int64_t entry = p.order[s.first], width = columns.last - columns.first;
  h += s.h;
  for (int64_t j = 0; j < s.rank || j == 0; j += PAGE) {
    const int64_t ranks = std::min<int64_t>(PAGE, s.rank - j);
    const B* page = s.rank ? b + int64_t(p.table[s.slot * p.pages + j / PAGE]) * PAGE * p.b.row + columns.first : b;
    for (int64_t n = 0; n < width; n += VL) {
      const int64_t left = width - n;
      vec acc = j > 0 ? load(sums + n) : vec{};
      if (ranks == PAGE && left >= VL) {
        LK_UNROLL for (int i = 0; i < PAGE; i++) acc += splat(h[j + i]) * load(page + i * p.b.row + n);
      } else {
        for (int64_t i = 0; i < ranks; i++) {
          const B* at = page + i * p.b.row + n;
          acc += splat(h[j + i]) * load_some(at, left);
        }
      }
      store(sums + n, acc);
    }
  }
  epilogue(p, e, entry / p.k, weight(p, entry, s.slot), reinterpret_cast<const vec*>(sums), columns.first,
           columns.last);
}

template <typename B>
void expand_columns(const MultiLora& p, const Segment& s, const B* b, const float* h, const Epilogue& e, float* sums,
                    Range columns) {
  for (int64_t n0 = columns.first; n0 < columns.last; n0 += COLUMN_BLOCK) {
    const int64_t n1 = std::min(n0 + COLUMN_BLOCK, columns.last);
    if (s.count == 1) {
      expand_token(p, s, b, h, e, sums, {n0, n1});
      continue;
    }
    for (int64_t t = 0; t < s.count; t += CR) {
      with_count(int(std::min<int64_t>(CR, s.count - t)), [&](auto rows) {
        if constexpr (rows.value <= CR) {
          float v[rows.value];
          for (int m = 0; m < rows.value; m++) v[m] = weight(p, p.order[s.first + t + m], s.slot);
          for (int64_t n = n0; n < n1; n += CV * VL) {
            expand_tile<rows.value, CV>(p, s, b, h, t, v, e, n, std::min<int64_t>(CV * VL, n1 - n));
          }
        }
      });
    }
  }
}

}  // namespace

void multi_lora(const MultiLora& p) {
  const Work work = plan(p);
  const bool wide = p.x.type == DType::f32;
  const int64_t x_row = wide ? p.x.row : lines(p.n_in);
  const Buffer scratch((wide ? 0 : p.tokens * x_row) + work.h + lines(p.n_out));
  // for several adapters a token: what they add, since they come one after the other and y is
  // rounded once
  const Buffer more(p.k > 1 ? p.tokens * p.n_out : 0);
  float *x = wide ? static_cast<float*>(p.x.data) : scratch.get(), *h = scratch.get() + (wide ? 0 : p.tokens * x_row);
  float* const bias = p.bias.data ? h + work.h : nullptr;
  for (int64_t entry = 0; entry < p.tokens * p.k; entry++) {
    const int64_t id = p.ids[entry], slot = id & 0xffffffff;
    if (id != -1 && (id < 0 || slot >= p.slots || id >> 32 != p.generation[slot])) *p.error = 1;
  }
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range tokens = share(p.tokens, 1, thread, threads);
    if (!wide) {
      with_type(p.x, [&](auto* from) {
        for (int64_t t = tokens.first; t < tokens.last; t++) widen(from + t * p.x.row, 1, p.n_in, x + t * x_row);
      });
    }
    if (thread == 0 && bias) {
      with_type(p.bias, [&](auto* v) { widen(v, p.bias.col, p.n_out, bias); });
    }
#pragma omp barrier
    const Range pages = share(work.items.back(), 1, thread, threads);
    size_t block = std::upper_bound(work.items.begin(), work.items.end(), pages.first) - work.items.begin() - 1;
    with_type(p.a, [&](auto* a) {
      for (int64_t item = pages.first; item < pages.last; item++) {
        while (work.items[block + 1] <= item) block++;
        const auto [segment, token] = work.blocks[block];
        shrink_page(p, work.segments[segment], token, item - work.items[block], a, x, x_row, h);
      }
    });
#pragma omp barrier
    const Range columns = share(p.n_out, 4 * VL, thread, threads);
    View sums = p.to;
    const Buffer own(COLUMN_BLOCK);
    if (p.k > 1) {
      sums = {more.get(), p.n_out, 1, DType::f32};
      for (int64_t t = 0; t < p.tokens; t++) {
        std::fill(more.get() + t * p.n_out + columns.first, more.get() + t * p.n_out + columns.last, 0.f);
      }
    }
    with_type(p.b, [&](auto* b) {
      for (const Segment& s : work.segments) {
        const int32_t flags = p.flags[s.slot];
        const int64_t at = int64_t(flags >> 2) * p.n_out;
        const Epilogue e{sums, flags & 1 ? p.gain + at : nullptr, flags & 2 ? p.more + at : nullptr, bias, p.k > 1};
        expand_columns(p, s, b, h, e, own.get(), columns);
      }
    });
    // what is left: tokens without an adapter, or the sum over those of each token
    for (int64_t i = p.k > 1 ? 0 : p.starts[p.slots]; i < p.tokens; i++) {
      const int64_t t = p.k > 1 ? i : p.order[i];
      for (int64_t n = columns.first; n < columns.last; n += VL) {
        const int64_t left = columns.last - n;
        vec value = read(p.from, t, n, left);
        if (p.k > 1) value += read(sums, t, n, left);
        if (bias && !p.holds_bias) value += load_some(bias + n, left);
        write(p.to, t, n, left, value);
      }
    }
  }
}

}  // namespace lk::LK_LEVEL
