// Calls of what runs the experts of a layer: experts without tokens, tokens of no expert, factors
// whose experts lie side by side. Nothing of an expert without tokens may be read or written.
#include "../../csrc/expert_lora_linear/cpu.h"
#include "../../csrc/expert_lora_linear/segments.h"
#include "../../csrc/expert_weight_norm/cpu.h"
#include "cases.h"

namespace lk::sanitize {

namespace {

constexpr int64_t EXPERTS = 5;
constexpr double NONE = std::numeric_limits<double>::quiet_NaN();  // where nothing is written

// The segments as they are, and as the call gets them. Planted: an end beyond the tokens, and the
// weights of the neighbour, which has no tokens.
struct Routing {
  std::vector<Segment> used, given;
};
Routing routing(Case& c) {
  std::vector<int64_t> sizes(EXPERTS, 0);
  int64_t left = c.shape.tokens;
  if (c.fixed) {
    sizes = {0, 3, 0, 1, left - 4};
  } else {
    if (left > 3 && c.coin()) left -= left / 4;  // the others are of no expert
    const uint64_t has = c.numbers.next() % 31 + 1;
    for (int64_t e = 0; left > 0; e = (e + 1) % EXPERTS) {
      const int64_t some = has >> e & 1 ? std::min(left, 1 + int64_t(c.numbers.next() % uint64_t(c.shape.tokens))) : 0;
      sizes[size_t(e)] += some, left -= some;
    }
  }
  std::vector<Segment> found;
  int64_t first = 0;
  for (int64_t e = 0; e < EXPERTS; first += sizes[size_t(e++)]) {
    if (sizes[size_t(e)]) found.push_back({e, first, first + sizes[size_t(e)]});
  }
  Routing both{found, found};
  if (plant.next()) both.given.back().last++;
  if (plant.next()) both.given.front().expert--;
  return both;
}

// the segment of each token, or -1
std::vector<int> owners(const std::vector<Segment>& all, int64_t tokens) {
  std::vector<int> found(size_t(tokens), -1);
  for (size_t s = 0; s < all.size(); s++) {
    for (int64_t t = all[s].first; t < all[s].last; t++) found[size_t(t)] = int(s);
  }
  return found;
}

// [rows, cols] of each expert: one after another, or the experts side by side, by rows or by columns
class Stacked {
 public:
  enum Lies { APART, BESIDE, BESIDE_TURNED };
  // drawn numbers, or an output
  Stacked(Case& c, bool drawn, DType type, int64_t rows, int64_t cols, Lies lies, Layout layout,
          const std::vector<Segment>& used)
      : rows_(rows), cols_(cols), lies_(lies) {
    const int64_t m = lies ? rows * cols : EXPERTS * rows, n = lies ? EXPERTS : cols;
    if (drawn) of_.emplace(c.numbers, type, m, n, lies ? Layout::ROWS : layout);
    else of_.emplace(type, m, n, lies ? Layout::ROWS : layout);
    for (const Segment& s : used) has_[size_t(s.expert)] = true;
    if (!lies && layout != Layout::COLUMNS) hide(true);
  }
  ~Stacked() { hide(false); }
  operator Stack() const {
    View v = *of_;
    if (lies_ == APART) return {v, rows_ * v.row};
    v.row = lies_ == BESIDE ? cols_ * EXPERTS : EXPERTS;
    v.col = lies_ == BESIDE ? EXPERTS : rows_ * EXPERTS;
    return {v, 1};
  }
  // after the call; the memory of experts without tokens may be looked at again
  void show() { hide(false); }
  DType type() const { return of_->type(); }
  double at(int64_t e, int64_t i, int64_t j) const {
    if (lies_ == APART) return of_->at(e * rows_ + i, j);
    return of_->at(lies_ == BESIDE ? i * cols_ + j : j * rows_ + i, e);
  }
  std::vector<double> values(int64_t e) const {
    std::vector<double> all;
    for (int64_t i = 0; i < rows_; i++) {
      for (int64_t j = 0; j < cols_; j++) all.push_back(at(e, i, j));
    }
    return all;
  }
  // fails unless that of every expert is want(e, i, j), of one without tokens NONE
  template <typename F>
  void expect(Case& c, const char* name, F&& want) {
    show();
    const auto expert_of = [&](int64_t i, int64_t j) { return lies_ ? j : i / rows_; };
    c.expect(*of_, name, [&](int64_t i, int64_t j) {
      const int64_t e = expert_of(i, j);
      if (!has_[size_t(e)]) return NONE;
      if (lies_ == APART) return want(e, i % rows_, j);
      return lies_ == BESIDE ? want(e, i / cols_, i % cols_) : want(e, i % rows_, i / rows_);
    });
  }

 private:
  void hide(bool hidden) {
#if defined(LK_ADDRESS)
    if (lies_ || hidden == hidden_) return;
    const View v = *of_;
    for (int64_t e = 0; e < EXPERTS; e++) {
      for (int64_t i = e * rows_; !has_[size_t(e)] && i < (e + 1) * rows_; i++) {
        const View row = part(v, i, 0);
        // the last row may lack its last element
        const size_t bytes = size_t((cols_ - 1) * size_of(v.type));
        hidden ? __asan_poison_memory_region(row.data, bytes) : __asan_unpoison_memory_region(row.data, bytes);
      }
    }
#endif
    hidden_ = hidden;
  }

  int64_t rows_, cols_;
  Lies lies_;
  bool has_[EXPERTS] = {}, hidden_ = false;
  std::optional<Tensor> of_;
};

using Lies = Stacked::Lies;
// for planted bugs side by side, so that threads copy for each other
Lies lies(Case& c) {
  if (c.fixed) return *c.fixed ? Lies::BESIDE_TURNED : Lies::BESIDE;
  return Lies(c.numbers.next() % 3);
}
Stack stack_of(const std::optional<Stacked>& of) { return of ? Stack(*of) : Stack{}; }
std::optional<Stacked> vector(Case& c, int64_t n, const std::vector<Segment>& used) {
  if (!c.coin()) return {};
  return std::optional<Stacked>(std::in_place, c, true, c.any_type(), 1, n, Lies::APART, Layout::ROWS, used);
}
double value_of(const std::optional<Stacked>& of, int64_t e, int64_t i, double otherwise) {
  return of ? of->at(e, 0, i) : otherwise;
}
std::vector<double> rows_of(const Tensor& of, const Segment& s) {
  std::vector<double> all;
  for (int64_t t = s.first; t < s.last; t++) {
    for (int64_t j = 0; j < of.cols(); j++) all.push_back(of.at(t, j));
  }
  return all;
}

}  // namespace

void expert_product_case(Case& c) {
  const auto [tokens, n_in, n_out, drawn] = c.shape;
  const auto [used, given] = routing(c);
  const bool back = c.coin(), has_rank = c.fixed || c.numbers.next() % 4, has_y = c.fixed || c.numbers.next() % 8;
  const int64_t rank = has_rank ? drawn : 0;
  const DType small = c.any_type();
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows());
  Stacked w(c, true, c.type, back ? n_in : n_out, back ? n_out : n_in, Lies::APART, c.by_rows(), used);
  std::optional<Stacked> a, b;
  if (has_rank) {
    a.emplace(c, true, small, rank, n_in, c.fixed ? Lies::APART : lies(c), c.fixed ? Layout::ROWS : c.any_layout(),
              used);
    b.emplace(c, true, small, n_out, rank, lies(c), c.any_layout(), used);
  }
  std::optional<Tensor> y, z, h;
  if (has_y) y.emplace(c.type, tokens, n_out, c.by_rows());
  if (has_y && c.coin()) z.emplace(c.type, tokens, n_out, c.by_rows());
  if (has_rank && (!has_y || c.coin())) h.emplace(DType::f32, tokens, rank);
  const std::optional<Stacked> bias = vector(c, n_out, used), gain = vector(c, n_out, used),
                               scaled = vector(c, n_in, used);
  const float scale = c.scale();
  ExpertProduct p{x,
                  w,
                  stack_of(a),
                  stack_of(b),
                  view_of(y),
                  view_of(z),
                  stack_of(bias),
                  stack_of(gain),
                  stack_of(scaled),
                  h ? h->floats() : nullptr,
                  scale,
                  back,
                  n_in,
                  n_out,
                  rank,
                  EXPERTS,
                  c.among({4, 0, 64}),
                  given,
                  c.threads};
  if (!has_rank) p.a.first.type = p.b.first.type = c.type;
  if (!has_rank && !has_y) return;
  c.run([&] { expert_product(*c.level, p); });
  std::vector<std::vector<double>> sums, hidden;
  for (const Segment& s : used) {
    std::vector<double> left = rows_of(x, s);
    for (size_t i = 0; i < left.size(); i++) left[i] *= value_of(scaled, s.expert, int64_t(i) % n_in, 1);
    const std::vector<double> of_w = w.values(s.expert);
    sums.push_back(product(left, back ? transposed(of_w, n_out) : of_w, n_in));
    hidden.emplace_back();
    if (!has_rank) continue;
    hidden.back() = product(left, a->values(s.expert), n_in);
    for (double& v : hidden.back()) v *= scale;
    const std::vector<double> more = product(hidden.back(), b->values(s.expert), rank);
    for (size_t i = 0; i < more.size(); i++) sums.back()[i] += more[i];
  }
  const std::vector<int> owner = owners(used, tokens);
  const auto of = [&](const std::vector<std::vector<double>>& all, int64_t t, int64_t n, int64_t columns) {
    const int s = owner[size_t(t)];
    return s < 0 ? NONE : all[size_t(s)][size_t((t - used[size_t(s)].first) * columns + n)];
  };
  if (h) c.expect(*h, "h", [&](int64_t t, int64_t j) { return of(hidden, t, j, rank); });
  if (z) c.expect(*z, "z", [&](int64_t t, int64_t n) { return of(sums, t, n, n_out); });
  if (y) {
    c.expect(*y, "y", [&](int64_t t, int64_t n) {
      const int s = owner[size_t(t)];
      if (s < 0) return NONE;
      const int64_t e = used[size_t(s)].expert;
      return value_of(gain, e, n, 1) * of(sums, t, n, n_out) + value_of(bias, e, n, 0);
    });
  }
}

void expert_gradients_case(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const auto [used, given] = routing(c);
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows()), dy(c.numbers, c.type, tokens, n_out, c.by_rows());
  const bool has_a = c.fixed || c.coin(), has_b = c.fixed || c.coin(), has_gain = c.fixed || c.coin();
  std::optional<Tensor> v, p, h;
  std::optional<Stacked> da, db, dbias, dgain;
  const auto sums = [&](std::optional<Stacked>& to) {
    to.emplace(c, false, DType::f32, 1, n_out, Lies::APART, Layout::ROWS, used);
  };
  if (has_gain) v.emplace(c.numbers, c.type, tokens, n_out, c.by_rows()), sums(dgain);
  if (c.fixed || c.coin()) sums(dbias);
  if (has_a) {
    p.emplace(c.numbers, DType::f32, tokens, rank);
    da.emplace(c, false, c.any_type(), rank, n_in, c.fixed ? Lies::APART : lies(c),
               c.fixed ? Layout::ROWS : c.any_layout(), used);
  }
  if (has_b) {
    h.emplace(c.numbers, DType::f32, tokens, rank);
    db.emplace(c, false, c.any_type(), n_out, rank, lies(c), c.any_layout(), used);
  }
  const std::optional<Stacked> gain = vector(c, n_out, used);
  const auto floats = [](const std::optional<Stacked>& of) {
    return of ? static_cast<float*>(Stack(*of).first.data) : nullptr;
  };
  const ExpertGradients g{x,
                          dy,
                          view_of(v),
                          p ? p->floats() : nullptr,
                          h ? h->floats() : nullptr,
                          stack_of(gain),
                          stack_of(da),
                          stack_of(db),
                          floats(dbias),
                          floats(dgain),
                          n_in,
                          n_out,
                          rank,
                          EXPERTS,
                          c.coin(),
                          given,
                          c.threads};
  c.run([&] { expert_gradients(*c.level, g); });
  const auto sum = [&](int64_t e, auto&& of) {
    double total = 0;
    for (const Segment& s : used) {
      for (int64_t t = s.first; s.expert == e && t < s.last; t++) total += of(t);
    }
    return total;
  };
  if (da) {
    da->expect(c, "da", [&](int64_t e, int64_t j, int64_t k) {
      return sum(e, [&](int64_t t) { return p->at(t, j) * x.at(t, k); });
    });
  }
  if (db) {
    db->expect(c, "db", [&](int64_t e, int64_t n, int64_t j) {
      return value_of(gain, e, n, 1) * sum(e, [&](int64_t t) { return dy.at(t, n) * h->at(t, j); });
    });
  }
  if (dbias) {
    dbias->expect(c, "dbias",
                  [&](int64_t e, int64_t, int64_t n) { return sum(e, [&](int64_t t) { return dy.at(t, n); }); });
  }
  if (dgain) {
    dgain->expect(c, "dgain", [&](int64_t e, int64_t, int64_t n) {
      return sum(e, [&](int64_t t) { return dy.at(t, n) * v->at(t, n); });
    });
  }
}

void expert_backward_small_case(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const auto [used, given] = routing(c);
  const DType small = c.any_type();
  Tensor dy(c.numbers, c.type, tokens, n_out, c.by_rows()), x(c.numbers, c.type, tokens, n_in, c.by_rows());
  const Stacked w(c, true, c.type, n_out, n_in, Lies::APART, c.by_rows(), used);
  const Stacked a(c, true, small, rank, n_in, c.fixed ? Lies::APART : lies(c), c.fixed ? Layout::ROWS : c.any_layout(),
                  used);
  const Stacked b(c, true, small, n_out, rank, lies(c), c.any_layout(), used);
  const std::optional<Stacked> gain = vector(c, n_out, used);
  Tensor h(c.numbers, DType::f32, tokens, rank);
  std::optional<Tensor> dx;
  std::optional<Stacked> da, db;
  if (c.fixed || c.coin()) dx.emplace(c.type, tokens, n_in, c.by_rows());
  if (c.fixed || c.coin()) {
    da.emplace(c, false, small, rank, n_in, c.fixed ? Lies::APART : lies(c), c.fixed ? Layout::ROWS : c.any_layout(),
               used);
  }
  if (c.fixed || c.coin() || !(dx || da)) db.emplace(c, false, small, n_out, rank, lies(c), c.any_layout(), used);
  const float scale = c.scale();
  const ExpertBackwardSmall p{dy,           x,          view_of(dx), w,    a,     b,    stack_of(gain), stack_of(da),
                              stack_of(db), h.floats(), scale,       n_in, n_out, rank, EXPERTS,        given,
                              c.threads};
  c.run([&] { expert_backward_small(*c.level, p); });
  std::vector<std::vector<double>> dxs, das, dbs;
  int of_expert[EXPERTS];
  for (const Segment& s : used) {
    std::vector<double> dz = rows_of(dy, s);
    for (size_t i = 0; i < dz.size(); i++) dz[i] *= value_of(gain, s.expert, int64_t(i) % n_out, 1);
    std::vector<double> hidden = product(dz, transposed(b.values(s.expert), rank), n_out);
    for (double& v : hidden) v *= scale;
    dxs.push_back(product(dz, transposed(w.values(s.expert), n_in), n_out));
    const std::vector<double> more = product(hidden, transposed(a.values(s.expert), n_in), rank);
    for (size_t i = 0; i < more.size(); i++) dxs.back()[i] += more[i];
    const int64_t count = s.last - s.first;
    das.push_back(product(transposed(hidden, rank), transposed(rows_of(x, s), n_in), count));
    dbs.push_back(product(transposed(dz, n_out), transposed(rows_of(h, s), rank), count));
    of_expert[s.expert] = int(das.size()) - 1;
  }
  const std::vector<int> owner = owners(used, tokens);
  if (dx) {
    c.expect(*dx, "dx", [&](int64_t t, int64_t k) {
      const int s = owner[size_t(t)];
      return s < 0 ? NONE : dxs[size_t(s)][size_t((t - used[size_t(s)].first) * n_in + k)];
    });
  }
  const auto of = [&](const std::vector<std::vector<double>>& all, int64_t columns) {
    return [&, columns](int64_t e, int64_t i, int64_t j) { return all[size_t(of_expert[e])][size_t(i * columns + j)]; };
  };
  if (da) da->expect(c, "da", of(das, n_in));
  if (db) db->expect(c, "db", of(dbs, rank));
}

void expert_norm_case(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const std::vector<Segment> all{{0, 0, 1}, {1, 0, 1}, {2, 0, 1}, {3, 0, 1}, {4, 0, 1}};
  const Stacked w(c, true, c.type, n_out, n_in, Lies::APART, c.by_rows(), all);
  const Stacked a(c, true, c.any_type(), rank, n_in, c.fixed ? Lies::APART : lies(c),
                  c.fixed ? Layout::ROWS : c.any_layout(), all);
  const Stacked b(c, true, c.any_type(), n_out, rank, lies(c), c.any_layout(), all);
  std::optional<Tensor> squared;
  if (c.coin()) {
    std::vector<double> squares;
    for (int64_t i = 0; i < EXPERTS * n_out; i++) {
      double sum = 0;
      for (int64_t k = 0; k < n_in; k++) sum += std::pow(w.at(i / n_out, i % n_out, k), 2);
      squares.push_back(sum);
    }
    squared.emplace(squares, EXPERTS, n_out);
  }
  Tensor norm(DType::f32, EXPERTS, n_out);
  const float scale = c.scale(), max_condition = c.coin() ? 0.01f : 64.f;  // the first sums every row directly
  const ExpertNorm p{
      w,    a,       b,        squared ? squared->floats() : nullptr, norm.floats(), scale, max_condition, n_in, n_out,
      rank, EXPERTS, c.threads};
  c.run([&] { expert_norm(*c.level, p); });
  c.expect(norm, "norm", [&](int64_t e, int64_t n) {
    double total = 0;
    for (int64_t k = 0; k < n_in; k++) {
      double sum = w.at(e, n, k);
      for (int64_t j = 0; j < rank; j++) sum += scale * b.at(e, n, j) * a.at(e, j, k);
      total += sum * sum;
    }
    return std::sqrt(total);
  });
}

}  // namespace lk::sanitize
