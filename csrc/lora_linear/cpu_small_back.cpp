// The gradients of a layer for few tokens, W read once. One parallel region: h and dz = dy ⊙ gain
// give dB, and with B's rows p = scale · dz B; a barrier; then each thread has columns of W and A:
// dx = dz W + mask ⊙ (p A) and dA = pᵀ drop(x). W's numbers are widened in registers. No sum depends
// on the number of threads.
#include <omp.h>

#include <algorithm>

#include "../common/dot.h"
#include "../common/philox.h"
#include "../quantised/rows.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int64_t OUTPUTS = 64;  // dz and B's rows are summed so many at a time
constexpr int AT_ONCE = 8;       // rows of W

// Each part begins on a cache line.
struct Scratch {
  int64_t rank_row;  // whole vectors
  float* dz;         // [out, tokens]
  float* sums;       // [parts, tokens, rank_row]: dz B of some outputs
  float* p;          // [rank, tokens]
};

// dz of outputs first..last
template <typename T>
void scale_rows(const BackwardSmall& q, const T* dy, int64_t first, int64_t last, float* dz) {
  float some[VL];
  for (int64_t t = 0; t < q.tokens; t++) {
    for (int64_t n = first; n < last; n += VL) {
      const int64_t count = std::min<int64_t>(VL, last - n);
      const T* from = dy + t * q.dy.row + n;
      store(some, load_some(from, count));
      for (int64_t i = 0; i < count; i++) dz[(n + i) * q.tokens + t] = some[i];
    }
  }
  if (!q.gain.data) return;
  with_type(q.gain, [&](auto* gain) {
    for (int64_t n = first; n < last; n++) {
      const float by = to_float(gain[n * q.gain.col]);
      for (int64_t t = 0; t < q.tokens; t++) dz[n * q.tokens + t] *= by;
    }
  });
}

// sums[t] += dz[n, t] · row n of B
template <typename T>
void add_row_of_b(const BackwardSmall& q, const T* b, const float* dz, float* sums, int64_t rank_row) {
  for (int64_t j = 0; j < q.rank; j += VL) {
    const int64_t count = std::min<int64_t>(VL, q.rank - j);
    vec row;
    if (q.b.col == 1) {
      row = load_some(b + j, count);
    } else {
      row = vec{};
      for (int64_t i = 0; i < count; i++) row[i] = to_float(b[(j + i) * q.b.col]);
    }
    for (int64_t t = 0; t < q.tokens; t++) {
      float* to = sums + t * rank_row + j;
      store(to, load(to) + splat(dz[t]) * row);
    }
  }
}

// row n of dB: Σ over tokens of dz[n, t] · h[t]
template <typename T>
void row_of_db(const BackwardSmall& q, const float* dz, T* db) {
  for (int64_t j = 0; j < q.rank; j += VL) {
    const int64_t count = std::min<int64_t>(VL, q.rank - j);
    vec sum = {};
    for (int64_t t = 0; t < q.tokens; t++) {
      const float* h = q.h + t * q.rank + j;
      sum += splat(dz[t]) * load_some(h, count);
    }
    if (q.db.col == 1) {
      count == VL ? store(db + j, sum) : store_first(db + j, sum, count);
    } else {
      for (int64_t i = 0; i < count; i++) store_scalar(db + (j + i) * q.db.col, sum[i]);
    }
  }
}

// acc[t] += Σ over ROWS of factor[i, t] · w[i], `width` columns; the rows after them are asked for
template <int ROWS, typename W>
LK_INLINE void add_rows(const W* w, int64_t row, const float* factor, int64_t tokens, float* acc, int64_t acc_row,
                        int64_t width) {
  const auto step = [&](int64_t c, auto of) __attribute__((always_inline)) {
    vec r[ROWS];
    LK_UNROLL for (int i = 0; i < ROWS; i++) r[i] = of(w + i * row + c);
    for (int64_t t = 0; t < tokens; t++) {
      // apart from what is there, so that one chain of roundings is short
      vec sum = splat(factor[t]) * r[0];
      LK_UNROLL for (int i = 1; i < ROWS; i++) sum += splat(factor[i * tokens + t]) * r[i];
      float* to = acc + t * acc_row + c;
      store(to, load(to) + sum);
    }
  };
  int64_t c = 0;
  for (; c + VL <= width; c += VL) {
    if (ROWS == AT_ONCE) {
      LK_UNROLL for (int i = 0; i < ROWS; i++) __builtin_prefetch(w + (ROWS + i) * row + c);
    }
    step(c, [](const W* p) { return load(p); });
  }
  if (c < width) step(c, [&](const W* p) { return load_first(p, width - c); });
}

template <typename W>
void add_all_rows(const W* w, int64_t row, int64_t rows, const float* factor, int64_t tokens, float* acc,
                  int64_t acc_row, int64_t width) {
  int64_t n = 0;
  for (; n + AT_ONCE <= rows; n += AT_ONCE) {
    add_rows<AT_ONCE>(w + n * row, row, factor + n * tokens, tokens, acc, acc_row, width);
  }
  for (; n < rows; n++) add_rows<1>(w + n * row, row, factor + n * tokens, tokens, acc, acc_row, width);
}

// columns of A, whatever its strides
template <typename T>
void add_a(const BackwardSmall& q, const T* a, const Scratch& s, int64_t k, float* acc, int64_t acc_row, int64_t width,
           float* row) {
  if (q.a.col == 1) return add_all_rows(a + k, q.a.row, q.rank, s.p, q.tokens, acc, acc_row, width);
  for (int64_t j = 0; j < q.rank; j++) {
    widen(a + j * q.a.row + k * q.a.col, q.a.col, width, row);
    add_rows<1>(row, 0, s.p + j * q.tokens, q.tokens, acc, acc_row, width);
  }
}

// dA of columns k..k+width
template <typename T>
void columns_of_da(const BackwardSmall& q, const Scratch& s, const float* x, int64_t x_row, int64_t k, int64_t width,
                   T* da) {
  for (int64_t j = 0; j < q.rank; j++) {
    for (int64_t c = 0; c < width; c += VL) {
      vec sum = {};
      for (int64_t t = 0; t < q.tokens; t++) sum += splat(s.p[j * q.tokens + t]) * load(x + t * x_row + c);
      T* to = da + j * q.da.row + (k + c) * q.da.col;
      if (q.da.col == 1 && c + VL <= width) {
        store(to, sum);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(VL, width - c); i++) store_scalar(to + i * q.da.col, sum[i]);
      }
    }
  }
}

struct Own {
  float *acc, *x, *mask, *row;  // [tokens, columns] three times; [columns]
  float* w;                     // [AT_ONCE, columns], of codes
};

template <typename T>
void columns(const BackwardSmall& q, const Scratch& s, const Own& own, int64_t most, int64_t k, int64_t width) {
  const bool dropped = q.dropout.active();
  for (int64_t t = 0; t < q.tokens && dropped; t++) dropout_mask(q.dropout, t, k, width, own.mask + t * most);
  if (q.da.data) {
    const T* x = static_cast<const T*>(q.x.data);
    for (int64_t t = 0; t < q.tokens; t++) {
      float* row = own.x + t * most;
      widen(x + t * q.x.row + k, 1, width, row);
      std::fill(row + width, row + (width + VL - 1) / VL * VL, 0.f);
      for (int64_t c = 0; c < width && dropped; c++) row[c] *= own.mask[t * most + c];
    }
    with_type(q.da, [&](auto* da) { columns_of_da(q, s, own.x, most, k, width, da); });
  }
  if (!q.dx.data) return;
  for (int64_t t = 0; t < q.tokens; t++) std::fill(own.acc + t * most, own.acc + (t + 1) * most, 0.f);
  with_type(q.a, [&](auto* a) { add_a(q, a, s, k, own.acc, most, width, own.row); });
  for (int64_t t = 0; t < q.tokens && dropped; t++) {
    for (int64_t c = 0; c < width; c++) own.acc[t * most + c] *= own.mask[t * most + c];
  }
  if (q.packed) {
    for (int64_t n = 0; n < q.n_out; n += AT_ONCE) {
      const int64_t rows = std::min<int64_t>(AT_ONCE, q.n_out - n);
      dequantise_rows(*q.packed, n, rows, k, width, own.w, most);
      add_all_rows(own.w, most, rows, s.dz + n * q.tokens, q.tokens, own.acc, most, width);
    }
  } else {
    add_all_rows(static_cast<const T*>(q.w.data) + k, q.w.row, q.n_out, s.dz, q.tokens, own.acc, most, width);
  }
  with_type(q.dx, [&](auto* dx) {
    for (int64_t t = 0; t < q.tokens; t++) {
      auto* to = dx + t * q.dx.row + k;
      const float* from = own.acc + t * most;
      int64_t c = 0;
      for (; c + VL <= width; c += VL) store(to + c, load(from + c));
      for (; c < width; c++) store_scalar(to + c, from[c]);
    }
  });
}

// columns at a time: those of dx and x of all tokens stay in the first-level cache
LK_INLINE int64_t columns_of(int64_t tokens) {
  constexpr int64_t ALL = 8192, MOST = 1024, LEAST = 64;
  return std::max(LEAST, std::min(MOST, ALL / (2 * tokens) / LEAST * LEAST));
}

}  // namespace

void backward_small(const BackwardSmall& q) {
  Scratch s;
  s.rank_row = (q.rank + VL - 1) / VL * VL;
  const int64_t parts = (q.n_out + OUTPUTS - 1) / OUTPUTS, most = columns_of(q.tokens);
  const int64_t of_dz = lines(q.n_out * q.tokens), of_sums = lines(parts * q.tokens * s.rank_row);
  const Buffer shared(of_dz + of_sums + lines(q.rank * q.tokens));
  s.dz = shared.get(), s.sums = s.dz + of_dz, s.p = s.sums + of_sums;
#pragma omp parallel num_threads(q.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const bool wants_p = q.dx.data || q.da.data;
    const Range outputs = share(q.n_out, OUTPUTS, thread, threads);
    with_type(q.dy, [&](auto* dy) { scale_rows(q, dy, outputs.first, outputs.last, s.dz); });
    for (int64_t first = outputs.first; first < outputs.last; first += OUTPUTS) {
      const int64_t last = std::min(first + OUTPUTS, outputs.last);
      float* sums = s.sums + first / OUTPUTS * q.tokens * s.rank_row;
      std::fill(sums, sums + q.tokens * s.rank_row, 0.f);
      with_type(q.b, [&](auto* b) {
        for (int64_t n = first; n < last && wants_p; n++)
          add_row_of_b(q, b + n * q.b.row, s.dz + n * q.tokens, sums, s.rank_row);
      });
      if (!q.db.data) continue;
      with_type(q.db, [&](auto* db) {
        for (int64_t n = first; n < last; n++) row_of_db(q, s.dz + n * q.tokens, db + n * q.db.row);
      });
    }
#pragma omp barrier
    const Range ranks = share(q.rank, 1, thread, threads);
    for (int64_t t = 0; t < q.tokens && wants_p; t++) {
      for (int64_t j = ranks.first; j < ranks.last; j++) {
        float sum = 0.f;
        for (int64_t i = 0; i < parts; i++) sum += s.sums[(i * q.tokens + t) * s.rank_row + j];
        s.p[j * q.tokens + t] = q.scale * sum;
      }
    }
#pragma omp barrier
    const Range mine = share(wants_p ? q.n_in : 0, 64, thread, threads);
    const Buffer buffer((3 * q.tokens + 1 + (q.packed ? AT_ONCE : 0)) * most);
    Own own;
    own.acc = buffer.get(), own.x = own.acc + q.tokens * most, own.mask = own.x + q.tokens * most;
    own.row = own.mask + q.tokens * most, own.w = own.row + most;
    for (int64_t k = mine.first; k < mine.last; k += most) {
      const int64_t width = std::min(most, mine.last - k);
      with_type(q.x, [&](auto* x) { columns<std::remove_pointer_t<decltype(x)>>(q, s, own, most, k, width); });
    }
  }
}

}  // namespace lk::LK_LEVEL
