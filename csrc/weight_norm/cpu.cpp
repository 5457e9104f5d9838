// DoRA's norm from its factored form, W read once:
//   n² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ⊙ B) + scale²·rowsum((B A Aᵀ) ⊙ B)
// A row whose terms cancel loses digits in that form, and is summed again as ‖W + scale·B A‖.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

// ‖row‖², the one sum that both kernels use, so that a cached value has the same bits
template <typename W>
LK_INLINE float squared(const W* row, int64_t count) {
  vec acc[4] = {};
  int64_t k = 0;
  for (; k + 4 * VL <= count; k += 4 * VL) {
  LK_UNROLL for (int i = 0; i < 4; i++) {
      const vec v = load(row + k + i * VL);
      acc[i] += v * v;
    }
  }
  for (; k < count; k += VL) {
    const vec v = count - k >= VL ? load(row + k) : load_first(row + k, count - k);
    acc[0] += v * v;
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// ‖row + Σ b[i] · a[i]‖², for a row whose factored form cancels
template <typename W>
float squared_directly(const W* row, const float* b, const float* a, int64_t a_row, int64_t rank, int64_t count) {
  vec acc = {};
  for (int64_t k = 0; k < count; k += VL) {
    vec v = count - k >= VL ? load(row + k) : load_first(row + k, count - k);
    for (int64_t i = 0; i < rank; i++) v += splat(b[i]) * load(a + i * a_row + k);
    acc += v * v;
  }
  return sum(acc);
}

struct Factors {
  const float *a, *gram;  // [rank, a_row] [rank, rank], both as floats
  int64_t a_row;
};

// norms of ROWS rows; u [ROWS, rank] = W Aᵀ and b [ROWS, rank] = scale · B are scratch
template <int ROWS, typename W>
LK_INLINE void norms(const WeightNorm& p, const W* w, const Factors& f, float* u, float* b, int64_t n) {
  for (int64_t j = 0; j < p.rank; j += MR) {
    with_count(int(std::min<int64_t>(MR, p.rank - j)), [&](auto ranks) {
      if constexpr (ranks.value <= MR) {
        vec acc[ROWS][ranks.value] = {};
        dot(w, p.w.row, f.a + j * f.a_row, f.a_row, p.n_in, acc);
        LK_UNROLL for (int i = 0; i < ROWS; i++) LK_UNROLL for (int m = 0; m < ranks.value; m++)
            u[i * p.rank + j + m] = sum(acc[i][m]);
      }
    });
  }
  with_type(p.b, [&](auto* from) {
    for (int i = 0; i < ROWS; i++) {
      for (int64_t j = 0; j < p.rank; j++) b[i * p.rank + j] = p.scale * to_float(from[(n + i) * p.b.row + j * p.b.col]);
    }
  });
  for (int i = 0; i < ROWS; i++) {
    const float *ui = u + i * p.rank, *bi = b + i * p.rank;
    const float base = p.w_squared.data ? static_cast<const float*>(p.w_squared.data)[n + i]
                                        : squared(w + i * p.w.row, p.n_in);
    float cross = 0.f, update = 0.f;
    for (int64_t j = 0; j < p.rank; j++) {
      float gb = 0.f;
      for (int64_t l = 0; l < p.rank; l++) gb += f.gram[j * p.rank + l] * bi[l];
      cross += bi[j] * ui[j];
      update += bi[j] * gb;
    }
    float total = base + 2.f * cross + update;
    const float terms = base + std::fabs(2.f * cross) + update;
    // written so that a total of zero or below is summed again, and a NaN stays
    if (terms > 0.f && !(total * p.max_condition >= terms) && std::isfinite(terms)) {
      total = squared_directly(w + i * p.w.row, bi, f.a, f.a_row, p.rank, p.n_in);
    }
    p.norm[n + i] = std::sqrt(total);
  }
}

}  // namespace

void weight_norm(const WeightNorm& p) {
  const int64_t a_row = lines(p.n_in);
  const Buffer shared(p.rank * a_row + p.rank * p.rank);
  float *a = shared.get(), *gram = a + p.rank * a_row;
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range ranks = share(p.rank, 1, thread, threads), rows = share(p.n_out, NR, thread, threads);
    with_type(p.a, [&](auto* from) {
      for (int64_t j = ranks.first; j < ranks.last; j++) {
        for (int64_t k = 0; k < p.n_in; k++) a[j * a_row + k] = to_float(from[j * p.a.row + k * p.a.col]);
        std::fill(a + j * a_row + p.n_in, a + (j + 1) * a_row, 0.f);
      }
    });
#pragma omp barrier
    for (int64_t j = ranks.first; j < ranks.last; j++) {
      for (int64_t l = 0; l < p.rank; l++) {
        vec acc[1][1] = {};
        dot(a + j * a_row, a_row, a + l * a_row, a_row, a_row, acc);
        gram[j * p.rank + l] = sum(acc[0][0]);
      }
    }
#pragma omp barrier
    const Buffer own(2 * NR * p.rank);
    const Factors f{a, gram, a_row};
    with_type(p.w, [&](auto* w) {
      for (int64_t n = rows.first; n < rows.last; n += NR) {
        with_count(int(std::min<int64_t>(NR, rows.last - n)), [&](auto count) {
          if constexpr (count.value <= NR) {
            norms<count.value>(p, w + n * p.w.row, f, own.get(), own.get() + NR * p.rank, n);
          }
        });
      }
    });
  }
}

void row_norm_squared(const RowNormSquared& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range rows = share(p.n_out, NR, omp_get_thread_num(), omp_get_num_threads());
    with_type(p.w, [&](auto* w) {
      for (int64_t n = rows.first; n < rows.last; n++) p.squared[n] = squared(w + n * p.w.row, p.n_in);
    });
  }
}

}  // namespace lk::LK_LEVEL
