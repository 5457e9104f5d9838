// The experts of a layer, as Python gives them.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "../expert_lora_linear/cpu.h"
#include "../expert_weight_norm/cpu.h"
#include "call.h"
#include "forward.h"

namespace lk {

// A tuple (matrix or vector of the first expert, elements to the next, experts), or None. The tensor
// is a view of the caller's own, so no other thread replaces its memory.
struct Experts : Stack {
  Matrix matrix;
  int64_t count = 0;
  explicit Experts(pybind11::handle given) {
    if (given.is_none()) return;
    const auto tuple = pybind11::reinterpret_borrow<pybind11::tuple>(given);
    matrix = reader.matrix(tuple[0].ptr());
    first = matrix;
    step = tuple[1].cast<int64_t>();
    count = tuple[2].cast<int64_t>();
  }
  // Raises ValueError unless there are `experts` of [rows, cols], or none.
  void check(const char* name, int64_t experts, int64_t rows, int64_t cols) const {
    if (!count) return;
    if (count == experts && matrix.rows == rows && matrix.cols == cols) return;
    throw pybind11::value_error(std::string("experts: ") + name + " must be " + std::to_string(experts) + " of [" +
                                std::to_string(rows) + ", " + std::to_string(cols) + "], found " +
                                std::to_string(count) + " of [" + std::to_string(matrix.rows) + ", " +
                                std::to_string(matrix.cols) + "]");
  }
};

// Their weights: such a tuple, or (codes and scales of all experts, experts), whose tensors are the
// caller's own, too.
struct ExpertWeights : Experts {
  Weight coded;
  explicit ExpertWeights(pybind11::handle given) : Experts(is_coded(given) ? pybind11::none() : given) {
    if (!is_coded(given)) return;
    coded.read(PyTuple_GET_ITEM(given.ptr(), 0));
    count = PyLong_AsLongLong(PyTuple_GET_ITEM(given.ptr(), 1));
    if (count < 1 || coded.codes.first || coded.rows % count) {
      throw pybind11::value_error("experts: the rows of a quantised w are not those of so many experts");
    }
    matrix = coded, matrix.rows /= count;
    first = matrix;
  }
  const Quantised* packed() const { return coded.packed(); }

 private:
  static bool is_coded(pybind11::handle given) {
    return PyTuple_Check(given.ptr()) && PyTuple_GET_SIZE(given.ptr()) == 2;
  }
};

// (expert, first token, end), one after another in one list
inline std::vector<Segment> segments_of(const pybind11::list& numbers, int64_t experts, int64_t tokens) {
  std::vector<Segment> found;
  found.reserve(numbers.size() / 3);
  for (size_t i = 0; i + 2 < numbers.size(); i += 3) {
    const auto number = [&](size_t j) { return PyLong_AsLongLong(PyList_GET_ITEM(numbers.ptr(), Py_ssize_t(i + j))); };
    found.push_back({number(0), number(1), number(2)});
    const Segment& s = found.back();
    if (s.expert < 0 || s.expert >= experts || s.first < 0 || s.first >= s.last || s.last > tokens) {
      throw pybind11::value_error("experts: a segment of no expert, or beyond the tokens");
    }
  }
  return found;
}
// The tokens that x is, or whose rows of x an index names. It is copied, so that no thread changes
// what was checked.
struct Tokens {
  std::vector<int64_t> index;
  int64_t count, rows;  // rows of x
  Tokens(pybind11::handle given, const Matrix& x) : count(x.rows), rows(x.rows) {
    if (given.is_none()) return;
    int64_t held[4];
    const Tensor t = reader.read(given.ptr(), held);
    if (t.device.type != CPU || t.dimensions != 1 || t.type.code != 0 || t.type.bits != 64) {
      throw pybind11::value_error("experts: index must be int64 in the memory of the CPU");
    }
    count = t.shape[0];
    index.reserve(size_t(count));
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = static_cast<const int64_t*>(t.data)[i * t.strides[0]];
      if (row < 0 || row >= rows) {
        throw pybind11::value_error("expert_lora_linear: index must name the " + std::to_string(rows) +
                                    " rows of x, found " + std::to_string(row) + " at token " + std::to_string(i));
      }
      index.push_back(row);
    }
  }
};
inline double work_of(const std::vector<Segment>& segments, int64_t columns, int64_t depth) {
  double tokens = 0;
  for (const Segment& s : segments) tokens += double(s.last - s.first);
  return tokens * double(columns) * double(depth);
}

inline void expert_product_of(Matrix x, pybind11::handle index, pybind11::handle w, pybind11::handle a,
                              pybind11::handle b, Matrix y, Matrix z, pybind11::handle bias, pybind11::handle gain,
                              pybind11::handle scaled, Matrix h, float scale, bool back, int64_t small,
                              const pybind11::list& segments, int threads) {
  const ExpertWeights of_w(w);
  const Experts of_a(a), of_b(b), of_bias(bias), of_gain(gain), of_scaled(scaled);
  Tokens of_x(index, x);
  const int64_t tokens = of_x.count, n_in = x.cols, experts = of_w.count, rank = of_a.matrix.rows;
  const int64_t n_out = back ? of_w.matrix.cols : of_w.matrix.rows;
  std::vector<Segment> all = segments_of(segments, experts, tokens);
  Call call("expert_product", work_of(all, n_out, n_in), threads, {&x, &y, &z, &h});
  of_w.check("w", experts, back ? n_in : n_out, back ? n_out : n_in);
  of_a.check("a", experts, rank, n_in);
  of_b.check("b", experts, n_out, rank);
  of_bias.check("bias", experts, 1, n_out);
  of_gain.check("gain", experts, 1, n_out);
  of_scaled.check("scaled", experts, 1, n_in);
  call.check(x, of_x.rows, n_in, "x");
  call.check(y, tokens, n_out, "y");
  call.check(z, tokens, n_out, "z");
  call.check(h, tokens, rank, "h");
  const auto all_by_rows = [](std::initializer_list<const Matrix*> all) {
    return std::all_of(all.begin(), all.end(), [](const Matrix* m) { return !m->data || m->by_rows(); });
  };
  if (!all_by_rows({&x, &of_w.matrix, &y, &z}) || of_a.count != of_b.count) {
    throw pybind11::value_error("expert_product: x, w, y and z are by rows, and a and b both there or both not");
  }
  ExpertProduct p{
      x,     of_w, of_a, of_b,  y,    z,       of_bias, of_gain,        of_scaled, floats(h, "expert_product"),
      scale, back, n_in, n_out, rank, experts, small,   std::move(all), threads};
  p.index = std::move(of_x.index);
  p.packed = of_w.packed();
  // of an adapter that is not there the kernels see the type alone
  if (!of_a.count) p.a.first.type = p.b.first.type = p.w.first.type;
  call.run([&] { expert_product(*chosen, p); });
}

inline void expert_gradients_of(Matrix x, pybind11::handle index, Matrix dy, Matrix v, Matrix p, Matrix h,
                                pybind11::handle gain, pybind11::handle da, pybind11::handle db, Matrix dbias,
                                Matrix dgain, bool tiles, const pybind11::list& segments, int threads) {
  const Experts of_gain(gain), of_a(da), of_b(db);
  Tokens of_x(index, x);
  const int64_t tokens = of_x.count, n_in = x.cols, n_out = dy.cols;
  const int64_t experts = std::max({of_a.count, of_b.count, dbias.rows, dgain.rows});
  const int64_t rank = of_a.count ? of_a.matrix.rows : of_b.matrix.cols;
  std::vector<Segment> all = segments_of(segments, experts, tokens);
  Call call("expert_gradients", work_of(all, n_in + n_out, rank + 1), threads, {&x, &dy, &v, &p, &h, &dbias, &dgain});
  of_gain.check("gain", experts, 1, n_out);
  of_a.check("da", experts, rank, n_in);
  of_b.check("db", experts, n_out, rank);
  call.check(x, of_x.rows, n_in, "x");
  call.check(dy, tokens, n_out, "dy");
  call.check(v, tokens, n_out, "v");
  call.check(p, tokens, rank, "p");
  call.check(h, tokens, rank, "h");
  call.check(dbias, experts, n_out, "dbias");
  call.check(dgain, experts, n_out, "dgain");
  if (v.data) call.check_alike(dy, v, "dy and v");
  const bool rows = x.by_rows() && dy.by_rows() && (!v.data || v.by_rows());
  if (!rows || (of_a.count && !p.data) || (of_b.count && !h.data) || (dgain.data && !v.data)) {
    throw pybind11::value_error("expert_gradients: x, dy and v are by rows, and p, h and v there where they are read");
  }
  const auto numbers = [](const Matrix& m) { return floats(m, "expert_gradients"); };
  ExpertGradients g{
      x,    dy,    v,    numbers(p), numbers(h), of_gain,        of_a,   of_b, numbers(dbias), numbers(dgain),
      n_in, n_out, rank, experts,    tiles,      std::move(all), threads};
  g.index = std::move(of_x.index);
  call.run([&] { expert_gradients(*chosen, g); });
}

inline void expert_backward_small_of(Matrix dy, Matrix x, pybind11::handle index, pybind11::handle w,
                                     pybind11::handle a, pybind11::handle b, pybind11::handle gain, Matrix h, Matrix dx,
                                     pybind11::handle da, pybind11::handle db, float scale,
                                     const pybind11::list& segments, int threads) {
  const ExpertWeights of_w(w);
  const Experts of_a(a), of_b(b), of_gain(gain), for_a(da), for_b(db);
  Tokens of_x(index, x);
  const int64_t tokens = of_x.count, n_in = x.cols, n_out = dy.cols, experts = of_w.count, rank = of_a.matrix.rows;
  std::vector<Segment> all = segments_of(segments, experts, tokens);
  Call call("expert_backward_small", work_of(all, n_out, n_in), threads, {&dy, &x, &h, &dx});
  of_w.check("w", experts, n_out, n_in);
  of_a.check("a", experts, rank, n_in), for_a.check("da", experts, rank, n_in);
  of_b.check("b", experts, n_out, rank), for_b.check("db", experts, n_out, rank);
  of_gain.check("gain", experts, 1, n_out);
  call.check(dy, tokens, n_out, "dy");
  call.check(x, of_x.rows, n_in, "x");
  call.check(dx, tokens, n_in, "dx");
  call.check(h, tokens, rank, "h");
  call.check_alike(x, dy, "x and dy");
  call.check_alike(x, of_w.matrix, "x and w");
  if (!dy.by_rows() || !x.by_rows() || !of_w.matrix.by_rows() || (dx.data && !dx.by_rows()) || !of_a.count ||
      !of_b.count || !h.data) {
    throw pybind11::value_error("expert_backward_small: dy, x, dx and w are by rows, and a, b and h there");
  }
  ExpertBackwardSmall p{
      dy,    x,    dx,    of_w, of_a,    of_b,           of_gain, for_a, for_b, floats(h, "expert_backward_small"),
      scale, n_in, n_out, rank, experts, std::move(all), threads};
  p.index = std::move(of_x.index);
  p.packed = of_w.packed();
  call.run([&] { expert_backward_small(*chosen, p); });
}

inline void expert_norm_of(pybind11::handle w, pybind11::handle a, pybind11::handle b, Matrix w_squared, Matrix norm,
                           float scale, float max_condition, int threads) {
  const ExpertWeights of_w(w);
  const Experts of_a(a), of_b(b);
  const int64_t experts = of_w.count, n_out = of_w.matrix.rows, n_in = of_w.matrix.cols, rank = of_a.matrix.rows;
  Call call("expert_norm", double(experts) * double(n_out) * double(n_in) * double(rank), threads, {&w_squared, &norm});
  of_a.check("a", experts, rank, n_in);
  of_b.check("b", experts, n_out, rank);
  call.check(w_squared, experts, n_out, "w_squared");
  call.check(norm, experts, n_out, "norm");
  if (!of_w.matrix.by_rows() || !of_a.count || !of_b.count || (w_squared.data && w_squared.row != n_out)) {
    throw pybind11::value_error("expert_norm: w and w_squared are by rows, and a and b there");
  }
  const ExpertNorm p{of_w,
                     of_a,
                     of_b,
                     floats(w_squared, "expert_norm"),
                     floats(norm, "expert_norm"),
                     scale,
                     max_condition,
                     n_in,
                     n_out,
                     rank,
                     experts,
                     threads,
                     of_w.packed()};
  call.run([&] { expert_norm(*chosen, p); });
}

}  // namespace lk
