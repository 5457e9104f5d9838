// DoRA's norm from its factored form, W read once:
//   n² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ⊙ B) + scale²·rowsum((B A Aᵀ) ⊙ B)
// A row whose terms cancel loses digits in that form, and is summed again as ‖W + scale·B A‖.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../common/dot.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t ROWS = 2 * NR;  // rows of W that share one pass over A
constexpr int CHAINS = 4;

// acc += the squares of a row, four chains; a row may come in pieces of a multiple of CHAINS * VL
template <typename W>
LK_INLINE void add_squares(const W* row, int64_t count, vec (&acc)[CHAINS]) {
  int64_t k = 0;
  for (; k + CHAINS * VL <= count; k += CHAINS * VL) {
    LK_UNROLL for (int i = 0; i < CHAINS; i++) {
      const vec v = load(row + k + i * VL);
      acc[i] += v * v;
    }
  }
  for (; k < count; k += VL) {
    const vec v = load_some(row + k, count - k);
    acc[0] += v * v;
  }
}
// the same of a row that row(k, count) gives `block` columns of
template <typename Row>
LK_INLINE void add_squares_of(Row row, int64_t count, int64_t block, vec (&acc)[CHAINS]) {
  for (int64_t k = 0; k < count; k += block)
    add_squares(row(k, std::min(block, count - k)), std::min(block, count - k), acc);
}
LK_INLINE float sum_squares(const vec (&acc)[CHAINS]) { return sum((acc[0] + acc[1]) + (acc[2] + acc[3])); }

// A as floats in blocks of columns, [blocks, rank, block], padded with zeros: rows a power of two
// apart would share the sets of the first-level cache. gram is A Aᵀ, [rank, r_row].
struct Factors {
  float *a, *gram;
  int64_t rank, block, r_row;
  // k a multiple of block
  float* at(int64_t j, int64_t k) const { return a + (k * rank + j * block); }
};

// ‖row + Σ b[i] · a[i]‖², for a row whose factored form cancels; row(k, count): some of its columns
template <typename Row>
float squared_directly(Row row, const float* b, const Factors& f, int64_t n_in) {
  vec acc = {};
  for (int64_t first = 0; first < n_in; first += f.block) {
    const int64_t count = std::min(f.block, n_in - first);
    const auto* some = row(first, count);
    for (int64_t k = 0; k < count; k += VL) {
      vec v = load_some(some + k, count - k);
      for (int64_t i = 0; i < f.rank; i++) v += splat(b[i]) * load(f.at(i, first) + k);
      acc += v * v;
    }
  }
  return sum(acc);
}

// columns of W a pass: A's block, which every row reads again, stays in the first-level cache while
// it is not too narrow
LK_INLINE int64_t block_k(int64_t rank) {
  constexpr int64_t BLOCK_BYTES = 24 << 10, LEAST = 256;
  return std::max(LEAST, BLOCK_BYTES / 4 / rank / 64 * 64);
}

// partial[j, i] (+)= w[i] · a[j] over `count` columns, as vectors; `rows` <= NR rows of W
__attribute__((noinline)) void products(const float* w, int64_t w_row, int rows, const float* a, int64_t a_row,
                                        int64_t rank, int64_t count, bool add, vec* partial) {
  for (int64_t j = 0; j < rank;) {
    const int64_t groups = (rank - j + MR - 1) / MR;
    // 16 as 6 + 5 + 5, for 4 alone would be slower
    const int ranks = int((rank - j + groups - 1) / groups);
    with_count(rows, [&](auto n) {
      with_count(ranks, [&](auto m) {
        if constexpr (n.value <= NR && m.value <= MR) {
          vec acc[n.value][m.value] = {};
          vec* kept = partial + j * NR;
          if (add) {
            LK_UNROLL for (int l = 0; l < m.value; l++) LK_UNROLL for (int i = 0; i < n.value; i++)
                acc[i][l] = kept[l * NR + i];
          }
          dot(w, w_row, a + j * a_row, a_row, count, acc);
          LK_UNROLL for (int l = 0; l < m.value; l++) LK_UNROLL for (int i = 0; i < n.value; i++)
              kept[l * NR + i] = acc[i][l];
        }
      });
    });
    j += ranks;
  }
}

struct Scratch {
  vec *products, *squares;  // [ROWS / NR, rank, NR] [ROWS, CHAINS]
  // [ROWS, block] [ROWS, r_row] twice: W Aᵀ and scale · B, padded with zeros
  float *tile, *u, *b;
};

LK_INLINE vec magnitude(vec v) { return v > 0.f ? v : -v; }

// The two sums over the rank of NR rows, added: 2 · u[i] · b[i] + b[i] · (A Aᵀ) b[i]; and the same
// of magnitudes.
LK_INLINE void rank_sums(const Factors& f, const float* u, const float* b, int64_t rank, float* sums, float* sizes) {
  vec sum_of[NR] = {}, size_of[NR] = {};
  for (int64_t j = 0; j < f.r_row; j += VL) {
    vec product[NR] = {};
    for (int64_t l = 0; l < rank; l++) {
      const vec row = load(f.gram + l * f.r_row + j);  // column l too: A Aᵀ is symmetric
      LK_UNROLL for (int i = 0; i < NR; i++) product[i] += splat(b[i * f.r_row + l]) * row;
    }
    LK_UNROLL for (int i = 0; i < NR; i++) {
      const vec now = load(b + i * f.r_row + j);
      const vec cross = 2.f * now * load(u + i * f.r_row + j), update = now * product[i];
      sum_of[i] += cross + update;
      size_of[i] += magnitude(cross) + magnitude(update);
    }
  }
  for (int i = 0; i < NR; i++) sums[i] = sum(sum_of[i]), sizes[i] = sum(size_of[i]);
}

// norms of rows n..n+rows of W, which begin at w, or are codes
template <typename W>
void norms(const WeightNorm& p, const W* w, int rows, const Factors& f, const Scratch& s, int64_t n) {
  const int64_t block = f.block;
  // use(row), where row(k, count) is `count` columns of a row
  const auto with_row = [&](int i, auto&& use) {
    if (!p.packed) return use([&](int64_t k, int64_t) { return w + i * p.w.row + k; });
    return use([&](int64_t k, int64_t count) {
      dequantise_rows(*p.packed, n + i, 1, k, count, s.tile, block);
      return const_cast<const float*>(s.tile);
    });
  };
  for (int64_t k = 0; k < p.n_in && !p.products.data; k += block) {
    const int64_t count = std::min(block, p.n_in - k);
    const float* from = s.tile;
    int64_t from_row = block;
    if (p.packed) {
      dequantise_rows(*p.packed, n, rows, k, count, s.tile, block);
    } else if constexpr (std::is_same_v<W, float>) {
      from = w + k;
      from_row = p.w.row;
    } else {
      for (int i = 0; i < rows; i++) {
        const W* row = w + i * p.w.row + k;
        widen(row, 1, count, s.tile + i * block);
      }
    }
    for (int i = 0; i < rows; i += NR) {
      products(from + i * from_row, from_row, std::min(NR, rows - i), f.at(0, k), block, p.rank, count, k > 0,
               s.products + i * p.rank);
    }
    if (p.w_squared.data) continue;
    for (int i = 0; i < rows; i++) {
      vec acc[CHAINS] = {};
      if (k > 0) std::copy_n(s.squares + i * CHAINS, CHAINS, acc);
      add_squares(from + i * from_row, count, acc);
      std::copy_n(acc, CHAINS, s.squares + i * CHAINS);
    }
  }
  float sums[ROWS], sizes[ROWS];
  for (int i = 0; i < rows; i++) {
    const vec* partial = s.products + i / NR * NR * p.rank + i % NR;
    float *u = s.u + i * f.r_row, *b = s.b + i * f.r_row;
    for (int64_t j = 0; j < p.rank && p.products.data; j++) {
      u[j] = static_cast<const float*>(p.products.data)[j * p.products.row + (n + i) * p.products.col];
    }
    for (int64_t j = 0; j < p.rank && !p.products.data; j += 4) {
      const auto at = [&](int64_t l) { return j + l < p.rank ? partial[(j + l) * NR] : vec{}; };
      std::copy_n(sum4(at(0), at(1), at(2), at(3)).v, 4, u + j);  // r_row is a multiple of 4
    }
    with_type(p.b, [&](auto* from) {
      const auto* row = from + (n + i) * p.b.row;
      int64_t j = 0;
      for (; p.b.col == 1 && j + VL <= p.rank; j += VL) store(b + j, p.scale * load(row + j));
      for (; j < p.rank; j++) b[j] = p.scale * to_float(row[j * p.b.col]);
    });
  }
  for (int i = 0; i < rows; i += NR) {
    rank_sums(f, s.u + i * f.r_row, s.b + i * f.r_row, p.rank, sums + i, sizes + i);
  }
  for (int i = 0; i < rows; i++) {
    float base;
    if (p.w_squared.data) {
      base = static_cast<const float*>(p.w_squared.data)[n + i];
    } else {
      vec acc[CHAINS] = {};
      if (!p.products.data) std::copy_n(s.squares + i * CHAINS, CHAINS, acc);
      else with_row(i, [&](auto row) { add_squares_of(row, p.n_in, block, acc); });
      base = sum_squares(acc);
    }
    float total = base + sums[i];
    const float terms = base + sizes[i];
    // written so that a total of zero or below is summed again, and a NaN stays
    if (terms > 0.f && !(total * p.max_condition >= terms) && std::isfinite(terms)) {
      with_row(i, [&](auto row) { total = squared_directly(row, s.b + i * f.r_row, f, p.n_in); });
    }
    p.norm[n + i] = std::sqrt(total);
  }
}

}  // namespace

void weight_norm(const WeightNorm& p) {
  const int64_t block = block_k(p.rank), blocks = (p.n_in + block - 1) / block, r_row = lines(p.rank);
  const Buffer shared(blocks * block * p.rank + p.rank * r_row);
  const Factors f{shared.get(), shared.get() + blocks * block * p.rank, p.rank, block, r_row};
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range ranks = share(p.rank, 1, thread, threads), rows = share(p.n_out, NR, thread, threads);
    const Buffer own(VL * (ROWS * p.rank + ROWS * CHAINS) + ROWS * block + 2 * ROWS * r_row);
    Scratch s;
    s.products = reinterpret_cast<vec*>(own.get());
    s.squares = s.products + ROWS * p.rank;
    s.tile = reinterpret_cast<float*>(s.squares + ROWS * CHAINS);
    s.u = s.tile + ROWS * block;
    s.b = s.u + ROWS * r_row;
    std::fill(s.u, s.b + ROWS * r_row, 0.f);
    with_type(p.a, [&](auto* from) {
      for (int64_t j = ranks.first; j < ranks.last; j++) {
        for (int64_t k = 0; k < p.n_in; k += block) {
          const int64_t count = std::min(block, p.n_in - k);
          float* to = f.at(j, k);
          widen(from + j * p.a.row + k * p.a.col, p.a.col, count, to);
          std::fill(to + count, to + block, 0.f);
        }
      }
    });
#pragma omp barrier
    for (int64_t j = ranks.first; j < ranks.last; j += NR) {
      const int count = int(std::min<int64_t>(NR, ranks.last - j));
      for (int64_t k = 0; k < p.n_in; k += block) {
        products(f.at(j, k), block, count, f.at(0, k), block, p.rank, block, k > 0, s.products);
      }
      for (int i = 0; i < count; i++) {
        float* row = f.gram + (j + i) * r_row;
        for (int64_t l = 0; l < p.rank; l++) row[l] = sum(s.products[l * NR + i]);
        std::fill(row + p.rank, row + r_row, 0.f);
      }
    }
#pragma omp barrier
    with_type(p.packed ? View{} : p.w, [&](auto* w) {
      for (int64_t n = rows.first; n < rows.last; n += ROWS) {
        norms(p, p.packed ? w : w + n * p.w.row, int(std::min<int64_t>(ROWS, rows.last - n)), f, s, n);
      }
    });
  }
}

void row_norm_squared(const RowNormSquared& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range rows = share(p.n_out, NR, omp_get_thread_num(), omp_get_num_threads());
    const auto each = [&](int64_t block, auto some) {
      for (int64_t n = rows.first; n < rows.last; n++) {
        vec acc[CHAINS] = {};
        add_squares_of([&](int64_t k, int64_t count) { return some(n, k, count); }, p.n_in, block, acc);
        p.squared[n] = sum_squares(acc);
      }
    };
    if (p.packed) {
      constexpr int64_t BLOCK = 1024;
      float numbers[BLOCK];
      each(BLOCK, [&](int64_t n, int64_t k, int64_t count) {
        dequantise_rows(*p.packed, n, 1, k, count, numbers, BLOCK);
        return const_cast<const float*>(numbers);
      });
    } else {
      with_type(p.w, [&](auto* w) { each(p.n_in, [&](int64_t n, int64_t, int64_t) { return w + n * p.w.row; }); });
    }
  }
}

}  // namespace lk::LK_LEVEL
