// y = x Wᵀ with float32 sums, for up to some hundred tokens. x is packed in float32 with its tokens
// side by side, so that a number of W meets several vectors of them, and the sums of some outputs
// stay in registers along a block of depth: with AVX-512 6 outputs and 64 tokens, 24 products for
// 10 loads. The blocks of W and of 64 tokens and their sums fit in the first-level cache. W is read
// once, and asked for a block ahead; its 16-bit blocks are widened first. Each result is the sum of
// its blocks' sums, whatever its neighbours are.
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../common/dot.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

// vectors of tokens in a register tile, at most, and its outputs
#if LK_VL == 16
constexpr int MAX_VECTORS = 4;
constexpr int outputs(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int MAX_VECTORS = 2;
constexpr int outputs(int) { return LK_VL == 8 ? 6 : 4; }
#endif
constexpr int64_t DEPTH = 64;  // of a block
constexpr int64_t PANEL = 48;  // outputs
constexpr int64_t LINE = 16;   // floats

// elements J of a and b, those of b counted on
template <size_t... J>
LK_INLINE vec pick(vec a, vec b, std::index_sequence<J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, uvec{J...});
#endif
}
template <int S, size_t... J>
LK_INLINE void exchange(vec& a, vec& b, std::index_sequence<J...>) {
  const vec low = pick(a, b, std::index_sequence<(J & S ? VL + J - S : J)...>());
  b = pick(a, b, std::index_sequence<(J & S ? VL + J : J + S)...>());
  a = low;
}
// VL rows of VL numbers become columns
template <int S = 1>
LK_INLINE void transpose(vec (&r)[VL]) {
  LK_UNROLL for (int i = 0; i < VL; i++) {
    if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_index_sequence<VL>());
  }
  if constexpr (2 * S < VL) transpose<2 * S>(r);
}

// to[j, 0:VL] = from[0:rows, j] for the first `columns` j; zeros for the rows that are not there
template <typename T>
LK_INLINE void transpose_block(const T* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  vec r[VL];
  LK_UNROLL for (int i = 0; i < VL; i++) { r[i] = i >= rows ? vec{} : load_some(from + i * row, columns); }
  transpose(r);
  LK_UNROLL for (int j = 0; j < VL; j++) {
    if (j < columns) store(to + j * to_row, r[j]);
  }
}

// groups of tokens, as many vectors each
struct Tokens {
  int64_t groups, width;  // width: tokens of a group
  explicit Tokens(int64_t tokens) {
    const int64_t vectors = (tokens + VL - 1) / VL;
    groups = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
    width = (vectors + groups - 1) / groups * VL;
  }
};

// blocks of depth of x, each [group][depth, width], to their place in the packed x
template <typename X>
void pack(const BaseProduct& p, const X* x, const Tokens& of, Range blocks, float* to) {
  for (int64_t k0 = blocks.first * DEPTH; k0 < std::min(blocks.last * DEPTH, p.n_in); k0 += DEPTH) {
    const int64_t depth = std::min(DEPTH, p.n_in - k0);
    for (int64_t t = 0; t < of.groups * of.width; t += VL) {
      float* group = to + (k0 * of.groups + t / of.width * depth) * of.width + t % of.width;
      for (int64_t k = 0; k < depth; k += VL) {
        transpose_block(x + t * p.x.row + k0 + k, p.x.row, p.tokens - t, depth - k, group + k * of.width, of.width);
      }
    }
  }
}

// sums [O, V vectors] (+)= w [O, depth] · x [depth, V vectors]
template <int O, int V>
void tile(const float* w, int64_t row, const float* x, int64_t depth, float* sums, bool add) {
  vec acc[O][V] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    vec of[V];
    LK_UNROLL for (int v = 0; v < V; v++) of[v] = load(x + (k * V + v) * VL);
    LK_UNROLL for (int o = 0; o < O; o++) {
      const vec with = splat(w[o * row + k]);
      LK_UNROLL for (int v = 0; v < V; v++) acc[o][v] += with * of[v];
    }
  };
  int64_t k = 0;
  for (; k + LINE <= depth; k += LINE) {
    LK_UNROLL for (int o = 0; o < O; o++) __builtin_prefetch(w + o * row + k + DEPTH);
    for (int64_t i = 0; i < LINE; i++) step(k + i);
  }
  for (; k < depth; k++) step(k);
  LK_UNROLL for (int o = 0; o < O; o++) LK_UNROLL for (int v = 0; v < V; v++) {
    float* to = sums + (o * V + v) * VL;
    store(to, add ? load(to) + acc[o][v] : acc[o][v]);
  }
}
template <int V, int O = outputs(V)>
void tile_of(int64_t count, const float* w, int64_t row, const float* x, int64_t depth, float* sums, bool add) {
  if (count == O) return tile<O, V>(w, row, x, depth, sums, add);
  if constexpr (O > 1) tile_of<V, O - 1>(count, w, row, x, depth, sums, add);
}

// A block of W in float32: where it lies, or where it is widened to.
struct Block {
  const float* w;
  int64_t row;
};
Block block_of(const BaseProduct& p, int64_t n, int64_t count, int64_t k, int64_t depth, float* wide) {
  Block found{wide, DEPTH};
  if (p.packed) {
    dequantise_rows(*p.packed, n, count, k, depth, wide, DEPTH);
    return found;
  }
  with_type(p.w, [&](auto* w) {
    w += n * p.w.row + k;
    if constexpr (std::is_same_v<decltype(w), float*>) {
      found = {w, p.w.row};
    } else {
      for (int64_t i = 0; i < count; i++, w += p.w.row) {
        for (int64_t c = 0; c < depth; c += 2 * LINE) __builtin_prefetch(w + c + DEPTH);
        for (int64_t c = 0; c < depth; c += VL) {
          store(wide + i * DEPTH + c, load_some(w + c, depth - c));
        }
      }
    }
  });
  return found;
}

// `count` outputs from n on; sums: [groups, PANEL, width], wide: [PANEL, DEPTH]
template <int V>
void panel(const BaseProduct& p, const Tokens& of, const float* x, int64_t n, int64_t count, float* sums, float* wide) {
  constexpr int64_t O = outputs(V), WIDTH = V * VL;
  for (int64_t k = 0; k < p.n_in || k == 0; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, p.n_in - k);
    const Block block = block_of(p, n, count, k, depth, wide);
    for (int64_t i = 0; i < count; i += O) {
      for (int64_t g = 0; g < of.groups; g++) {
        tile_of<V>(std::min(O, count - i), block.w + i * block.row, block.row, x + (k * of.groups + g * depth) * WIDTH,
                   depth, sums + (g * PANEL + i) * WIDTH, k > 0);
      }
    }
  }
  auto* y = static_cast<float*>(p.y.data) + n;
  for (int64_t t = 0; t < p.tokens; t += VL) {
    const float* from = sums + t / WIDTH * PANEL * WIDTH + t % WIDTH;
    float turned[VL * VL];
    for (int64_t i = 0; i < count; i += VL) {
      transpose_block(from + i * WIDTH, WIDTH, count - i, VL, turned, VL);
      const int64_t left = count - i;
      for (int64_t j = 0; j < std::min<int64_t>(VL, p.tokens - t); j++) {
        float* to = y + (t + j) * p.y.row + i;
        left >= VL ? store(to, load(turned + j * VL)) : store_first(to, load(turned + j * VL), left);
      }
    }
  }
}

}  // namespace

void base_product(const BaseProduct& p) {
  if (p.tokens == 0) return;
  const Tokens of(p.tokens);
  const Buffer x(of.groups * of.width * p.n_in);
  const int64_t vectors = of.width / VL;
  const auto run = vectors == 1   ? panel<1>
                   : vectors == 2 ? panel<2>
                   : vectors == 3 ? panel<std::min(3, MAX_VECTORS)>
                                  : panel<MAX_VECTORS>;
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Buffer sums(of.groups * PANEL * of.width), wide(PANEL * DEPTH);
    const Range blocks = share((p.n_in + DEPTH - 1) / DEPTH, 1, thread, threads);
    with_type(p.x, [&](auto* from) { pack(p, from, of, blocks, x.get()); });
#pragma omp barrier
    const Range mine = share(p.n_out, outputs(int(vectors)), thread, threads);
    for (int64_t n = mine.first; n < mine.last; n += PANEL) {
      run(p, of, x.get(), n, std::min(PANEL, mine.last - n), sums.get(), wide.get());
    }
  }
}

}  // namespace lk::LK_LEVEL
