// The fused layer with vdpbf16ps, in bf16, both ways, for processors that have it without AMX:
//   forward   y  = gain ⊙ (x Wᵀ + h Bᵀ) + bias,        h = scale · x Aᵀ
//   backward  dx = (dy ⊙ gain) W + mask ⊙ (p A),       p = scale · (dy ⊙ gain) B
// The instruction multiplies pairs of depth: sum + odd · odd, rounded to float32, then + even · even.
// So each sum is one chain of float32, whatever the blocks and the other tokens are. Numbers below
// 2⁻¹²⁶ enter and leave as zeros.
// Forward W lies in pairs already: its rows are broadcast as they are, and x is packed once, a lane a
// token. Backward two rows of W are interleaved, a lane an output, a block in the second-level cache
// at a time, and the pairs of dy are broadcast. With 6 rows and 4 vectors, 24 products for 10 loads.
// What is not bf16 enters as the sum of two bf16 numbers (a float32 x of three), but for dy ⊙ gain
// where it meets W: that is rounded, so dx has two roundings, 1.41 times the error of one.
#include <omp.h>

#include "../common/philox.h"
#include "pairs_pack.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t TOKENS = 512;            // at a time: their sums stay in the second-level cache
constexpr int64_t OUTPUTS[] = {168, 256};  // with as many outputs: forward whole tiles of 6, 8 and 14
constexpr int64_t SUMS = 1 << 16;          // back with more outputs, where there are fewer tokens

constexpr int rows_of(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 14; }

typedef int32_t pair __attribute__((aligned(2), may_alias));

// rows · lanes
struct Term {
  const bf16* rows;
  int64_t row;
  const bf16* lanes;  // [pairs, vectors, 16, 2]
  int64_t pairs;
  int64_t ahead;  // elements; these rows are asked for so far ahead, if it is not zero
};
// sums (+)= the terms, one after another
struct Product {
  Term terms[6];
  int count;
  float* sums;
  int64_t row;
  bool add;
  Ahead* ahead = nullptr;
  void also(const Term& term) { terms[count++] = term; }
};

// O rows of sums from `first`
template <int O, int V>
void tile(const Product& p, int64_t first) {
  vec acc[O][V] = {};
  float* sums = p.sums + first * p.row;
  if (p.add) {
    LK_UNROLL for (int o = 0; o < O; o++) LK_UNROLL for (int v = 0; v < V; v++)
        acc[o][v] = load(sums + o * p.row + v * VL);
  }
  for (int i = 0; i < p.count; i++) {
    const Term t = p.terms[i];
    const bf16* rows = t.rows + first * t.row;
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      __m512bh of[V];
      LK_UNROLL for (int v = 0; v < V; v++) of[v] = (__m512bh)_mm512_load_si512(t.lanes + (k * V + v) * DEPTH);
      LK_UNROLL for (int o = 0; o < O; o++) {
        const auto with = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const pair*>(rows + o * t.row + 2 * k));
        LK_UNROLL for (int v = 0; v < V; v++) acc[o][v] = (vec)_mm512_dpbf16_ps((__m512)acc[o][v], of[v], with);
      }
    };
    constexpr int64_t LINE = DEPTH / 2;
    int64_t k = 0;
    if (t.ahead || p.ahead) {
      for (; k + LINE <= t.pairs; k += LINE) {
        if (t.ahead) {
          LK_UNROLL for (int o = 0; o < O; o++) __builtin_prefetch(rows + o * t.row + 2 * k + t.ahead);
        }
        if (p.ahead) p.ahead->step();
        for (int64_t j = 0; j < LINE; j++) step(k + j);
      }
    }
    for (; k < t.pairs; k++) step(k);
  }
  LK_UNROLL for (int o = 0; o < O; o++) LK_UNROLL for (int v = 0; v < V; v++)
      store(sums + o * p.row + v * VL, acc[o][v]);
}
template <int V, int O = rows_of(V)>
void tile_of(int64_t count, const Product& p, int64_t first) {
  if (count >= O) return tile<O, V>(p, first);
  if constexpr (O > 1) tile_of<V, O - 1>(count, p, first);
}

// rows first..last, in equal parts: of one row or two each product would wait for the one before
void multiply(int64_t vectors, int64_t first, int64_t last, const Product& p) {
  static constexpr void (*of[])(int64_t, const Product&, int64_t) = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>};
  const int64_t count = last - first, at_once = rows_of(int(vectors)), parts = (count + at_once - 1) / at_once;
  for (int64_t i = 0; i < parts; i++) {
    const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
    of[vectors - 1](end - begin, p, first + begin);
  }
}

// Of all threads: x or dy as rows, forward as lanes too; h as lanes, back as rows; A as lanes.
struct Packed {
  Rows rows;
  bf16 *x, *h, *a;
};
struct Scratch {
  float *sums, *gain, *bias;  // forward [vectors][OUTPUTS, 16] grouped, back [tokens, OUTPUTS]
  bf16* w;                    // forward [OUTPUTS, BLOCK], back [OUTPUTS / 64][BLOCK / 2][64, 2]
  bf16* b;                    // the same with `more` for BLOCK
};

// forward: a block of the features of x, [group][part][pair][lane, 2]
void x_lanes(const Tiles& p, const Depth& d, const Rows& x, const Groups& of, int64_t tokens, int64_t k0, bf16* to) {
  alignas(64) bf16 lanes[TILE];
  const int64_t depth = std::min(BLOCK, d.padded - k0);
  to += k0 * d.w_parts * of.vectors * VL;
  for (int64_t g = 0; g < of.count; g++) {
    for (int64_t part = 0; part < d.w_parts; part++) {
      for (int64_t v = of.first(g); v < of.first(g + 1); v++) {
        const bf16* from = x.data + part * x.part + v * VL * x.row + k0;
        bf16* group = to + (of.first(g) * d.w_parts + part * of.size(g)) * depth * VL + (v - of.first(g)) * DEPTH;
        for (int64_t k = 0; k < depth; k += DEPTH) {
          pack_rows(from + k, x.row, tokens - v * VL, p.n_in - k0 - k, lanes);
          for (int64_t i = 0; i < VL; i++) {
            _mm512_store_si512(group + (k / 2 + i) * of.size(g) * DEPTH, _mm512_load_si512(lanes + i * DEPTH));
          }
        }
      }
    }
  }
}

// h of `count` tokens from t, whose rows begin at `at`
void h_of(const Tiles& p, const Depth& d, const Packed& packed, int64_t t, int64_t at, int64_t count) {
  alignas(64) float sums[16 * MAX_LANES];
  const int64_t pairs = (p.n_in + 1) / 2;
  for (int64_t j = 0; j < p.rank; j += MAX_LANES) {
    const int64_t ranks = std::min(MAX_LANES, p.rank - j), vectors = (ranks + VL - 1) / VL;
    const int64_t at_once = rows_of(int(vectors)), parts = (count + at_once - 1) / at_once;
    for (int64_t i = 0; i < parts; i++) {
      const int64_t first = count * i / parts, last = count * (i + 1) / parts;
      Product product{{}, 0, sums, vectors * VL, false};
      for (int64_t c = 0; c < d.x_parts * d.a_parts; c++) {
        const bf16* rows = packed.rows.data + c % d.x_parts * packed.rows.part + (at + first) * packed.rows.row;
        const bf16* lanes = packed.a + (j * d.a_parts + c / d.x_parts * vectors * VL) * d.padded;
        product.also({rows, packed.rows.row, lanes, pairs, 0});
      }
      multiply(vectors, 0, last - first, product);
      for (int64_t r = first; r < last; r++) {
        for (int64_t l = 0; l < ranks; l += VL) {
          const vec h = p.scale * load(sums + (r - first) * vectors * VL + l);
          store_some(p.h + (t + r) * p.rank + j + l, h, ranks - l);
        }
      }
    }
  }
}

// gain and bias of `count` outputs from n
void vectors_of(const Tiles& p, int64_t n, int64_t count, const Scratch& s) {
  std::fill(s.gain, s.gain + up(count, VL), 1.f);
  std::fill(s.bias, s.bias + up(count, VL), 0.f);
  if (p.gain.data) {
    with_type(p.gain, [&](auto* v) { widen(v + n * p.gain.col, p.gain.col, count, s.gain); });
  }
  if (p.bias.data) {
    with_type(p.bias, [&](auto* v) { widen(v + n * p.bias.col, p.bias.col, count, s.bias); });
  }
}

// outputs n..n+count of the groups of tokens in `mine`; the tokens begin at t
template <typename Y>
void forward(const Tiles& p, const Depth& d, const Packed& x, const Groups& of, Range mine, int64_t t, int64_t tokens,
             int64_t n, int64_t count, const Scratch& s) {
  const auto* w = static_cast<const bf16*>(p.w.data) + n * p.w.row;
  // B's high parts are B itself, if that is bf16 by rows
  const auto* b = static_cast<const bf16*>(p.b.data) + n * p.b.row;
  const bool b_in_place = p.b.type == DType::bf16 && p.b.col == 1 && p.rank % 2 == 0;
  for (int64_t i = 0; i < count && p.rank > 0 && !b_in_place; i += ROWS) {
    rank_rows(p.b, d, n + i, n + count, p.rank, 2, s.b + i * d.more, d.more);
  }
  for (int64_t k = 0; k < p.n_in || k == 0; k += BLOCK) {
    const int64_t depth = std::min(BLOCK, p.n_in - k), padded = std::min(BLOCK, d.padded - k);
    const bf16* rows = w + k;
    int64_t row = p.w.row;
    if (p.packed || depth % 2) {
      // the last pair would reach beyond the row
      for (int64_t i = 0; i < count && depth % 2; i++) {
        if (!p.packed) std::copy(rows + i * row, rows + i * row + depth, s.w + i * BLOCK);
        s.w[i * BLOCK + depth] = bf16{0};
      }
      rows = s.w, row = BLOCK;
    }
    for (int64_t g = mine.first; g < mine.last; g++) {
      const int64_t vectors = of.size(g), lane = vectors * VL;
      Product product{{}, 0, s.sums + of.first(g) * OUTPUTS[0] * VL, lane, k > 0};
      const bf16* h = x.h + of.first(g) * d.more * VL;
      if (k == 0 && b_in_place) {
        for (int64_t i = 0; i < d.h_parts; i++) product.also({b, p.b.row, h + i * d.ranks * lane, d.ranks / 2, 0});
      } else if (k == 0) {
        product.also({s.b, d.more, h, d.more / 2, 0});
      }
      // the next block comes from memory while the last group is at this one
      const int64_t next = k + BLOCK < p.n_in ? BLOCK : count * row - k;
      const int64_t ahead = g + 1 == mine.last && rows != s.w ? next : 0;
      const bf16* lanes = x.x + (k * of.vectors + of.first(g) * padded) * d.w_parts * VL;
      for (int64_t part = 0; part < d.w_parts; part++) {
        product.also({rows, row, lanes + part * lane * padded, up(depth, 2) / 2, ahead});
      }
      // codes become numbers just before their first product, which hides how long they take to come
      const bool widens = p.packed && g == mine.first;
      const int64_t at_once = widens ? rows_of(int(vectors)) : count;
      for (int64_t i = 0; i < count; i += at_once) {
        const int64_t some = std::min(at_once, count - i);
        if (widens) dequantise_rows(*p.packed, n + i, some, k, depth, s.w + i * BLOCK, BLOCK);
        multiply(vectors, i, i + some, product);
      }
    }
  }
  vectors_of(p, n, count, s);
  for (int64_t g = mine.first; g < mine.last; g++) {
    for (int64_t v = of.first(g); v < of.first(g + 1); v++) {
      const float* from = s.sums + of.first(g) * OUTPUTS[0] * VL + (v - of.first(g)) * VL;
      for (int64_t i = 0; i < count; i += VL) {
        __m512i r[16];
        LK_UNROLL for (int j = 0; j < 16; j++) {
          r[j] = i + j < count ? _mm512_load_si512(from + (i + j) * of.size(g) * VL) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int64_t j = 0; j < std::min<int64_t>(VL, tokens - v * VL); j++) {
          const int64_t row = t + v * VL + j;
          if (p.z.data) store_some(static_cast<Y*>(p.z.data) + row * p.z.row + n + i, (vec)r[j], count - i);
          const vec y = load(s.gain + i) * (vec)r[j] + load(s.bias + i);
          store_some(static_cast<Y*>(p.y.data) + row * p.y.row + n + i, y, count - i);
        }
      }
    }
  }
}

// outputs n..n+count of the tokens in `mine`, whose rows begin at 0; the tokens begin at t. `row` is
// that of the sums. A block of depth meets all outputs before the next one does, so that a row of W
// is read to its end while its page is known.
template <typename Y>
void backward(const Tiles& p, const Depth& d, const Packed& x, Range mine, int64_t t, int64_t n, int64_t count,
              int64_t row, const Scratch& s) {
  constexpr int64_t SOME = OUTPUTS[1];
  const int64_t tokens = mine.last - mine.first, tiles = (tokens + rows_of(4) - 1) / rows_of(4);
  float mask[MAX_LANES];
  alignas(64) bf16 wide[ROWS * SOME];  // rows of W
  for (int64_t j = 0; j < count && p.rank > 0; j += MAX_LANES) {
    bf16* panel = s.b + j * d.more;
    for (int64_t i = 0; i < MAX_LANES; i += ROWS) {
      rank_lanes(p.b, d, std::min(n + j + i, p.n_out), p.n_out, p.rank, 2, panel + i * 2, MAX_LANES * 2);
    }
    if (!p.dropout.active()) continue;
    Product product{{}, 0, s.sums + j, row, false};
    product.also({x.h + mine.first * d.more, d.more, panel, d.more / 2, 0});
    multiply(4, 0, tokens, product);
    for (int64_t i = 0; i < tokens; i++) {
      dropout_mask(p.dropout, t + mine.first + i, n + j, MAX_LANES, mask);
      float* sums = s.sums + i * row + j;
      LK_UNROLL for (int v = 0; v < MAX_LANES; v += VL) store(sums + v, load(sums + v) * load(mask + v));
    }
  }
  const bool masked = p.rank > 0 && p.dropout.active();
  for (int64_t k = 0; k < p.n_in || k == 0; k += BLOCK) {
    const int64_t depth = std::min(BLOCK, p.n_in - k);
    for (int64_t first = 0; first < count; first += SOME) {
      const int64_t columns = std::min(SOME, count - first);
      const auto* w = static_cast<const bf16*>(p.w.data) + n + first;
      for (int64_t i = 0; i < depth; i += 2) {
        const bf16* rows = w + (k + i) * p.w.row;
        int64_t w_row = p.w.row;
        if (p.packed) {
          const int64_t many = std::min(ROWS, depth - i);
          if (i % ROWS == 0) dequantise_rows(*p.packed, k + i, many, n + first, columns, wide, SOME);
          rows = wide + i % ROWS * SOME, w_row = SOME;
        }
        for (int64_t j = 0; j < columns; j += MAX_LANES) {
          interleave(rows + j, w_row, columns - j, i + 1 < depth, s.w + j * BLOCK + i * MAX_LANES);
        }
      }
      // what comes next: columns of these rows, or the next rows, or the next outputs
      const bool along = first + SOME < count;
      const int64_t next = along ? k : k + BLOCK < p.n_in ? k + BLOCK : 0;
      const int64_t column = along ? n + first + SOME : next ? n : n + count;
      const int64_t some = std::min(SOME, (next || along ? n + count : p.n_out) - column);
      const int64_t steps = up(columns, MAX_LANES) / MAX_LANES * tiles * std::max<int64_t>(1, depth / DEPTH);
      Ahead ahead(p, {next, std::min(next + BLOCK, p.n_in)}, column, some, steps * d.w_parts);
      for (int64_t j = 0; j < columns; j += MAX_LANES) {
        Product product{{}, 0, s.sums + first + j, row, k > 0 || masked, some > 0 ? &ahead : nullptr};
        if (k == 0 && !masked) {
          product.also({x.h + mine.first * d.more, d.more, s.b + (first + j) * d.more, d.more / 2, 0});
        }
        for (int64_t part = 0; part < d.w_parts; part++) {
          const bf16* rows = x.rows.data + part * x.rows.part + mine.first * x.rows.row + k;
          product.also({rows, x.rows.row, s.w + j * BLOCK, up(depth, 2) / 2, 0});
        }
        multiply(4, 0, tokens, product);
      }
    }
  }
  for (int64_t i = 0; i < tokens; i++) {
    auto* y = static_cast<Y*>(p.y.data) + (t + mine.first + i) * p.y.row + n;
    for (int64_t j = 0; j < count; j += VL) store_some(y + j, load(s.sums + i * row + j), count - j);
  }
}

template <bool BACK>
void run(const Tiles& p) {
  const Depth d(p);
  const int64_t parts = (p.tokens + TOKENS - 1) / TOKENS, most = parts ? up((p.tokens + parts - 1) / parts, ROWS) : 0;
  const bool scaled = BACK && p.gain.data;
  const bool in_place = p.x.type == DType::bf16 && p.x.col == 1 && !scaled && p.n_in % 2 == 0;
  const Buffer rows(in_place ? 0 : d.x_parts * most * d.padded / 2), gain(scaled ? d.padded : 0);
  const Buffer a(p.a.data ? up(p.rank, ROWS) * d.padded * d.a_parts / 2 : 0), h(most * up(d.more, DEPTH) / 2);
  const Buffer x(BACK ? 0 : most * d.padded * d.w_parts / 2);
  const auto half = [](const Buffer& b) { return reinterpret_cast<bf16*>(b.get()); };
  if (scaled) {
    std::fill(gain.get(), gain.get() + d.padded, 0.f);
    with_type(p.gain, [&](auto* v) { widen(v, p.gain.col, p.n_in, gain.get()); });
  }
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t unit = BACK ? MAX_LANES : 24;
    const int64_t many = BACK ? std::min(p.n_out, SUMS / std::max<int64_t>(1, most)) : 0;
    const int64_t at_once = std::max(OUTPUTS[BACK], up(many, MAX_LANES));
    // where there are too few outputs for the threads, they share the tokens too
    const int64_t units = std::max<int64_t>(1, (p.n_out + unit - 1) / unit),
                  columns = std::min<int64_t>(threads, units);
    const int across = thread % int(columns), along = thread / int(columns), lines = threads / int(columns);
    const Range outputs = along < lines ? share(p.n_out, unit, across, int(columns)) : Range{0, 0};
    const int64_t w_size = OUTPUTS[BACK] * BLOCK, b_size = up(at_once * d.more, DEPTH);
    const Buffer own(most * at_once + (w_size + b_size) / 2 + 2 * up(at_once, VL));
    Scratch s;
    s.sums = own.get(), s.w = reinterpret_cast<bf16*>(s.sums + most * at_once), s.b = s.w + w_size;
    s.gain = reinterpret_cast<float*>(s.b + b_size), s.bias = s.gain + up(at_once, VL);
    const Range steps = share(d.padded, DEPTH, thread, threads), blocks = share(d.padded, BLOCK, thread, threads);
    for (int64_t k = steps.first; k < steps.last && p.a.data; k += DEPTH) a_lanes(p, d, k, half(a));
    for (int64_t t = 0; t < p.tokens; t += most) {
      const int64_t tokens = std::min(most, p.tokens - t);
      const Groups of(tokens);
      Packed packed{{half(rows), d.padded, most * d.padded}, half(x), half(h), half(a)};
      if (in_place) packed.rows = {static_cast<bf16*>(p.x.data) + t * p.x.row, p.x.row, 0};
      const Range mine = share(tokens, ROWS, thread, threads);
      for (int64_t i = mine.first; i < mine.last && !in_place; i += ROWS) {
        for (int64_t k = 0; k < d.padded; k += DEPTH)
          x_rows(p, d, scaled ? gain.get() : nullptr, t + i, k, packed.rows, i);
      }
      if (p.a.data || !(BACK || in_place)) {
#pragma omp barrier
      }
      for (int64_t k = blocks.first; k < blocks.last && !BACK; k += BLOCK)
        x_lanes(p, d, packed.rows, of, tokens, k, packed.x);
      if (p.a.data) {
        const Range some = share(tokens, 1, thread, threads);
        h_of(p, d, packed, t + some.first, some.first, some.last - some.first);
#pragma omp barrier
      }
      const View all{p.h, p.rank, 1, DType::f32};
      for (int64_t i = mine.first; i < mine.last && p.rank > 0; i += ROWS) {
        if (BACK) {
          rank_rows(all, d, t + i, t + tokens, p.rank, 1, packed.h + i * d.more, d.more);
        } else {
          const int64_t g = ((i / VL + 1) * of.count - 1) / of.vectors, first = of.first(g);
          rank_lanes(all, d, t + i, t + tokens, p.rank, 1, packed.h + first * d.more * VL + (i / VL - first) * DEPTH,
                     of.size(g) * DEPTH);
        }
      }
#pragma omp barrier
      const bool narrow = p.y.type == DType::bf16;
      for (int64_t n = outputs.first; n < outputs.last; n += at_once) {
        const int64_t count = std::min(at_once, outputs.last - n);
        if constexpr (BACK) {
          const Range some = share(tokens, rows_of(4), along, lines);
          if (some.last > some.first) {
            (narrow ? backward<bf16> : backward<float>)(p, d, packed, some, t, n, count, at_once, s);
          }
        } else {
          const Range some = share(of.count, 1, along, lines);
          (narrow ? forward<bf16> : forward<float>)(p, d, packed, of, some, t, tokens, n, count, s);
        }
      }
      // what is packed first of the next tokens is not read any more, or there is a barrier before it
      const bool read = BACK ? !in_place || !p.a.data : in_place && !p.a.data;
      if (read && t + most < p.tokens) {
#pragma omp barrier
      }
    }
  }
}

}  // namespace

void tiles(const Tiles& p) { p.back ? run<true>(p) : run<false>(p); }

}  // namespace lk::LK_LEVEL
