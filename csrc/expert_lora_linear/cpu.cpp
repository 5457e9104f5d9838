// The experts of a layer in one parallel region. Each thread takes segments, or columns of them, of
// an equal share of the work, and calls lora_linear's kernels for them on itself alone: so a hundred
// experts of a few tokens cost no hundred teams.
#include "cpu.h"

#include <omp.h>

#include <cstring>

#include "../common/vec.h"
#include "segments.h"

namespace lk {

namespace {

using LK_LEVEL::Buffer;
using LK_LEVEL::to_float;
using LK_LEVEL::widen;
using LK_LEVEL::with_type;

constexpr int64_t CHUNK = 512;      // tokens whose packed rows stay in the caches
constexpr int64_t PIECE = 1 << 22;  // float32 sums that are there at a time
constexpr int64_t UNIT = 96;        // columns: whole tiles of the kernels
constexpr int64_t OF_CODES = 192;   // the same and whole blocks of codes

// Floats of one thread, kept from segment to segment.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > size_) held_ = std::make_unique<Buffer>(size_ = count);
    return held_->get();
  }

 private:
  std::unique_ptr<Buffer> held_ = std::make_unique<Buffer>(1);
  int64_t size_ = 1;
};

// Tokens first..last of x, columns from `column` on. Where an index names the rows, they come together
// in the thread's own memory: so few stay in its caches.
View rows_of(const View& x, const std::vector<int64_t>& index, int64_t first, int64_t last, int64_t column,
             int64_t columns, Scratch& own) {
  if (index.empty()) return part(x, first, column);
  const int64_t size = size_of(x.type), row = (columns * size + 63) / 64 * 64;
  char* const to = reinterpret_cast<char*>(own.floats((last - first) * row / 4));
  for (int64_t t = first; t < last; t++) {
    std::memcpy(to + (t - first) * row, part(x, index[size_t(t)], column).data, size_t(columns * size));
  }
  return {to, row / size, 1, x.type};
}

// to[t, k], or turned to[k, t], = x[t, k] · gain[k]
void scale_rows(const View& x, const View& gain, int64_t tokens, int64_t columns, bool turn, float* to) {
  constexpr int64_t BLOCK = 16;
  const int64_t row = turn ? 1 : columns, col = turn ? tokens : 1;
  float by[BLOCK];
  std::fill(by, by + BLOCK, 1.f);
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const int64_t count = std::min(BLOCK, columns - first);
    if (gain.data) {
      with_type(gain, [&](auto* g) { widen(g + first * gain.col, gain.col, count, by); });
    }
    with_type(x, [&](auto* from) {
      for (int64_t t = 0; t < tokens; t++) {
        const auto* of = from + t * x.row + first * x.col;
        float* out = to + t * row + first * col;
        for (int64_t k = 0; k < count; k++) out[k * col] = to_float(of[k * x.col]) * by[k];
      }
    });
  }
}

// The product of one segment's columns `first` to `last`.
class Product {
 public:
  Product(const Kernels& kernels, const ExpertProduct& p, Scratch (&own)[4]) : k_(kernels), p_(p), own_(own) {}

  void run(const Segment& s, const View& a, const View& b, int64_t first, int64_t last) {
    const int64_t tokens = s.last - s.first, columns = last - first;
    const View x = rows_of(p_.x, p_.index, s.first, s.last, 0, p_.n_in, own_[3]), scaled = at(p_.scaled, s.expert);
    const View y = part(p_.y, s.first, first), z = part(p_.z, s.first, first);
    const Base w = Base(p_.w, p_.packed, s.expert, p_.back ? p_.n_in : p_.n_out, p_.back).from(first);
    const View of_b = part(b, first, 0);
    const View gain = part(at(p_.gain, s.expert), 0, first), bias = part(at(p_.bias, s.expert), 0, first);
    const bool keeps = p_.h && first == 0;
    float* const kept = keeps ? p_.h + s.first * p_.rank : nullptr;
    const bool by_rows = a.col == 1 || !a.data;
    if (!p_.back && tokens <= p_.small && !scaled.data && by_rows && y.data) {
      return k_.forward_small(
          {x, w.w(), a, of_b, y, z, bias, gain, kept, p_.scale, {}, tokens, p_.n_in, columns, p_.rank, 1, w.packed()});
    }
    float* const h = kept ? kept : own_[0].floats(tokens * p_.rank);
    if (k_.tiles && w.w().type == DType::bf16 && x.type == DType::bf16) {
      return by_tiles(s, x, scaled, w, a, of_b, y, z, bias, gain, h, columns);
    }
    if (p_.rank) k_.shrink({x, a, scaled, h, p_.scale, {}, tokens, p_.n_in, p_.rank, 1});
    const int64_t most = y.type == DType::f32 ? columns : std::max(UNIT, PIECE / tokens / UNIT * UNIT);
    for (int64_t n = 0; n < columns && y.data; n += most) {
      const int64_t some = std::min(most, columns - n);
      const View to = part(y, 0, n);
      const View sums = y.type == DType::f32 ? to : View{own_[2].floats(tokens * some), some, 1, DType::f32};
      for (int64_t t = 0; t < tokens; t += CHUNK) {
        const int64_t count = std::min(CHUNK, tokens - t);
        base(part(x, t, 0), scaled, w.from(n), part(sums, t, 0), count, some);
      }
      finish(sums, part(of_b, n, 0), p_.rank, to, part(z, 0, n), part(gain, 0, n), part(bias, 0, n), h, tokens, some);
    }
  }

 private:
  // sums = (x ⊙ scaled) Wᵀ, or back W
  void base(const View& x, const View& scaled, const Base& w, const View& sums, int64_t tokens, int64_t columns) {
    if (p_.back) {
      float* const left = own_[1].floats(tokens * p_.n_in);
      scale_rows(x, scaled, tokens, p_.n_in, true, left);
      return k_.outer({w.w(), sums, {}, left, {}, p_.n_in, columns, tokens, 1, w.packed()});
    }
    k_.base_product({multiplied(x, scaled, tokens), w.w(), sums, tokens, p_.n_in, columns, 1, w.packed()});
  }

  // x ⊙ scaled in float32, or x
  View multiplied(const View& x, const View& scaled, int64_t tokens) {
    if (!scaled.data) return x;
    float* const to = own_[1].floats(tokens * p_.n_in);
    scale_rows(x, scaled, tokens, p_.n_in, false, to);
    return {to, p_.n_in, 1, DType::f32};
  }

  void by_tiles(const Segment& s, View x, const View& scaled, const Base& w, const View& a, const View& b,
                const View& y, const View& z, const View& bias, const View& gain, float* h, int64_t columns) {
    const int64_t tokens = s.last - s.first, rank = p_.rank;
    if (!y.data) columns = 0;
    const View before = p_.back ? scaled : View{};
    if (!p_.back) x = multiplied(x, scaled, tokens);
    if (!p_.back || !(bias.data || gain.data || z.data)) {
      const View after = p_.back ? View{} : gain;
      return k_.tiles({x,
                       w.w(),
                       a,
                       b,
                       y,
                       z,
                       bias,
                       p_.back ? before : after,
                       h,
                       p_.scale,
                       {},
                       p_.back,
                       tokens,
                       p_.n_in,
                       columns,
                       rank,
                       1,
                       w.packed()});
    }
    const int64_t most = std::max(UNIT, PIECE / tokens / UNIT * UNIT);
    for (int64_t n = 0; n < columns; n += most) {
      const int64_t some = std::min(most, columns - n);
      const View sums{own_[2].floats(tokens * some), some, 1, DType::f32};
      const Base rest = w.from(n);
      k_.tiles({x,
                rest.w(),
                n ? View{} : a,
                part(b, n, 0),
                sums,
                {},
                {},
                before,
                h,
                p_.scale,
                {},
                true,
                tokens,
                p_.n_in,
                some,
                rank,
                1,
                rest.packed()});
      finish(sums, {}, 0, part(y, 0, n), part(z, 0, n), part(gain, 0, n), part(bias, 0, n), h, tokens, some);
    }
  }

  // z = sums + h bᵀ and y = gain ⊙ z + bias; y may be sums
  void finish(const View& sums, const View& b, int64_t rank, const View& y, const View& z, const View& gain,
              const View& bias, const float* h, int64_t tokens, int64_t columns) {
    View rows = turned(b);
    if (z.data) {
      if (rank) k_.expand({sums, sums, rows, {}, {}, h, {}, false, tokens, columns, rank, 1});
      rows = {}, rank = 0;
      k_.expand({sums, z, rows, {}, {}, h, {}, false, tokens, columns, rank, 1});
    }
    if (!rank && !gain.data && !bias.data && y.data == sums.data) return;
    k_.expand({sums, y, rank ? rows : View{}, gain, bias, h, {}, false, tokens, columns, rank, 1});
  }

  const Kernels& k_;
  const ExpertProduct& p_;
  Scratch (&own_)[4];  // h, x in float32, sums, rows of x
};

void gradient_of_a(const Kernels& k, const ExpertGradients& g, const Segment& s, int64_t first, int64_t columns,
                   Scratch& own) {
  const View x = rows_of(g.x, g.index, s.first, s.last, first, columns, own), d = part(at(g.da, s.expert), 0, first);
  const int64_t tokens = s.last - s.first;
  const float* p = g.p + s.first * g.rank;
  if (g.tiles && k.tiles && x.type == DType::bf16 && d.type != DType::f16 && d.col == 1) {
    const View left{const_cast<float*>(p), 1, g.rank, DType::f32};
    return k.tiles({left, x, {}, {}, d, {}, {}, {}, nullptr, 1.f, {}, true, g.rank, tokens, columns, 0, 1});
  }
  k.outer({x, d, {}, p, {}, tokens, columns, g.rank, 1});
}

void gradients_of_outputs(const Kernels& k, const ExpertGradients& g, const Segment& s, const View& db, int64_t first,
                          int64_t columns) {
  const View dy = part(g.dy, s.first, first);
  const int64_t tokens = s.last - s.first, to = s.expert * g.n_out + first;
  if (db.data) {
    k.outer({dy,
             turned(part(db, first, 0)),
             part(at(g.gain, s.expert), 0, first),
             g.h + s.first * g.rank,
             {},
             tokens,
             columns,
             g.rank,
             1});
  }
  if (g.dbias) k.column_sums({dy, {}, g.dbias + to, tokens, columns, 1});
  if (g.dgain) k.column_sums({dy, part(g.v, s.first, first), g.dgain + to, tokens, columns, 1});
}

}  // namespace

void expert_product(const Kernels& kernels, const ExpertProduct& p) {
  const Gathered a(p.a, p.rank, p.n_in, p.experts, p.segments), b(p.b, p.n_out, p.rank, p.experts, p.segments);
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    a.gather(thread, threads), b.gather(thread, threads);
#pragma omp barrier
    Scratch own[4];
    Product product(kernels, p, own);
    const int64_t columns = p.y.data ? p.n_out : 1;
    share_segments(
        p.segments, columns, p.packed ? OF_CODES : UNIT, thread, threads,
        [&](size_t i, int64_t first, int64_t last) { product.run(p.segments[i], a.of(i), b.of(i), first, last); });
  }
}

void expert_gradients(const Kernels& kernels, const ExpertGradients& g) {
  const Gathered db(g.db, g.n_out, g.rank, g.experts, g.segments);
#pragma omp parallel num_threads(g.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (g.da.first.data) {
      Scratch own;
      share_segments(g.segments, g.n_in, UNIT, thread, threads, [&](size_t i, int64_t first, int64_t last) {
        gradient_of_a(kernels, g, g.segments[i], first, last - first, own);
      });
    }
    share_segments(g.segments, g.n_out, UNIT, thread, threads, [&](size_t i, int64_t first, int64_t last) {
      gradients_of_outputs(kernels, g, g.segments[i], db.of(i), first, last - first);
    });
#pragma omp barrier
    db.scatter(thread, threads);
  }
}

void expert_backward_small(const Kernels& kernels, const ExpertBackwardSmall& p) {
  const Gathered b(p.b, p.n_out, p.rank, p.experts, p.segments), db(p.db, p.n_out, p.rank, p.experts, p.segments);
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    b.gather(thread, threads);
#pragma omp barrier
    Scratch own;
    // whole segments: the kernel makes all gradients at once
    share_segments(p.segments, 1, 1, thread, threads, [&](size_t i, int64_t, int64_t) {
      const Segment& s = p.segments[i];
      const Base w(p.w, p.packed, s.expert, p.n_out);
      kernels.backward_small({part(p.dy, s.first, 0),
                              rows_of(p.x, p.index, s.first, s.last, 0, p.n_in, own),
                              w.w(),
                              at(p.a, s.expert),
                              b.of(i),
                              at(p.gain, s.expert),
                              part(p.dx, s.first, 0),
                              at(p.da, s.expert),
                              p.db.first.data ? db.of(i) : View{},
                              p.h + s.first * p.rank,
                              p.scale,
                              {},
                              s.last - s.first,
                              p.n_in,
                              p.n_out,
                              p.rank,
                              1,
                              w.packed()});
    });
#pragma omp barrier
    db.scatter(thread, threads);
  }
}

}  // namespace lk
