// Calls of the kernels of lora_linear and weight_norm that every level has.
#include "weights.h"

namespace lk::sanitize {

namespace {

// of x ⊙ mask, by rows
std::vector<double> dropped(const Tensor& x, const Dropout& d) {
  std::vector<double> all = x.values();
  for (int64_t i = 0; i < x.rows(); i++) {
    for (int64_t j = 0; j < x.cols(); j++) all[size_t(i * x.cols() + j)] *= mask_of(d, i, j);
  }
  return all;
}

void forward_small(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const DType small = c.any_type(), result = c.coin() ? c.type : DType::f32;
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows());
  const Weight w(c, c.type, n_out, n_in);
  Tensor a(c.numbers, small, rank, n_in, c.by_rows()), b(c.numbers, small, n_out, rank, c.any_layout());
  Tensor y(result, tokens, n_out, c.by_rows());
  std::optional<Tensor> z, h, bias = c.vector(n_out), gain = c.vector(n_out);
  if (c.coin()) z.emplace(result, tokens, n_out, c.by_rows());
  if (c.coin()) h.emplace(DType::f32, tokens, rank);
  const float scale = c.scale();
  const Dropout dropout = c.dropout();
  const ForwardSmall p{
      x,     w,       a,      b,    y,     view_of(z), view_of(bias), view_of(gain), h ? h->floats() : nullptr,
      scale, dropout, tokens, n_in, n_out, rank,       c.threads,     w.packed()};
  c.run([&] { c.level->forward_small(p); });
  std::vector<double> hidden = product(dropped(x, dropout), a.values(), n_in);
  for (double& v : hidden) v *= scale;
  const std::vector<double> base = product(x.values(), w.values(), n_in), more = product(hidden, b.values(), rank);
  const auto sum = [&](int64_t t, int64_t n) { return base[size_t(t * n_out + n)] + more[size_t(t * n_out + n)]; };
  if (h) c.expect(*h, "h", [&](int64_t t, int64_t j) { return hidden[size_t(t * rank + j)]; });
  if (z) c.expect(*z, "z", sum);
  c.expect(y, "y", [&](int64_t t, int64_t n) { return value_of(gain, n, 1) * sum(t, n) + value_of(bias, n, 0); });
}

void backward_small(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const DType small = c.any_type();
  Tensor dy(c.numbers, c.type, tokens, n_out, c.by_rows()), x(c.numbers, c.type, tokens, n_in, c.by_rows());
  const Weight w(c, c.type, n_out, n_in);
  Tensor a(c.numbers, small, rank, n_in, c.any_layout()), b(c.numbers, small, n_out, rank, c.any_layout());
  Tensor h(c.numbers, DType::f32, tokens, rank);
  const std::optional<Tensor> gain = c.vector(n_out);
  std::optional<Tensor> dx, da, db;
  if (c.fixed || c.coin()) dx.emplace(c.coin() ? c.type : DType::f32, tokens, n_in, c.by_rows());
  if (c.fixed || c.coin()) da.emplace(small, rank, n_in, c.any_layout());
  if (c.fixed || c.coin() || !(dx || da)) db.emplace(small, n_out, rank, c.any_layout());
  const float scale = c.scale();
  const Dropout dropout = c.dropout();
  const BackwardSmall p{dy,         x,     w,       a,      b,    view_of(gain), view_of(dx), view_of(da), view_of(db),
                        h.floats(), scale, dropout, tokens, n_in, n_out,         rank,        c.threads,   w.packed()};
  c.run([&] { c.level->backward_small(p); });
  std::vector<double> dz = dy.values();
  for (size_t i = 0; i < dz.size(); i++) dz[i] *= value_of(gain, int64_t(i) % n_out, 1);
  const std::vector<double> across = transposed(b.values(), rank);
  std::vector<double> hidden = product(dz, across, n_out);
  for (double& v : hidden) v *= scale;
  if (dx) {
    const std::vector<double> base = product(dz, transposed(w.values(), n_in), n_out),
                              more = product(hidden, transposed(a.values(), n_in), rank);
    c.expect(*dx, "dx", [&](int64_t t, int64_t k) {
      return base[size_t(t * n_in + k)] + mask_of(dropout, t, k) * more[size_t(t * n_in + k)];
    });
  }
  if (da) {
    const std::vector<double> want = product(transposed(hidden, rank), transposed(dropped(x, dropout), n_in), tokens);
    c.expect(*da, "da", [&](int64_t j, int64_t k) { return want[size_t(j * n_in + k)]; });
  }
  if (db) {
    const std::vector<double> want = product(transposed(dz, n_out), transposed(h.values(), rank), tokens);
    c.expect(*db, "db", [&](int64_t n, int64_t j) { return want[size_t(n * rank + j)]; });
  }
}

void base_product(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows());
  const Weight w(c, c.type, n_out, n_in);
  Tensor y(DType::f32, tokens, n_out, c.by_rows());
  const BaseProduct p{x, w, y, tokens, n_in, n_out, c.threads, w.packed()};
  c.run([&] { c.level->base_product(p); });
  const std::vector<double> want = product(x.values(), w.values(), n_in);
  c.expect(y, "y", [&](int64_t t, int64_t n) { return want[size_t(t * n_out + n)]; });
}

void shrink(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows());
  Tensor a(c.numbers, c.any_type(), rank, n_in, c.any_layout()), h(DType::f32, tokens, rank);
  const std::optional<Tensor> gain = c.vector(n_in);
  const float scale = c.scale();
  const Dropout dropout = c.dropout();
  const Shrink p{x, a, view_of(gain), h.floats(), scale, dropout, tokens, n_in, rank, c.threads};
  c.run([&] { c.level->shrink(p); });
  std::vector<double> right = a.values();
  for (size_t i = 0; i < right.size(); i++) right[i] *= scale * value_of(gain, int64_t(i) % n_in, 1);
  const std::vector<double> want = product(dropped(x, dropout), right, n_in);
  c.expect(h, "h", [&](int64_t t, int64_t j) { return want[size_t(t * rank + j)]; });
}

void expand(Case& c) {
  const auto [tokens, n_in, n_out, drawn] = c.shape;
  const bool in_place = !c.fixed && c.type == DType::f32 && c.coin(), has_b = c.fixed || c.coin(), mask_from = c.coin();
  const int64_t rank = has_b ? drawn : 0;
  const bool of_type = !c.fixed && c.coin(), absent = !c.fixed && !in_place && c.coin();
  Tensor from(c.numbers, of_type ? c.type : DType::f32, tokens, n_out, c.by_rows());
  const std::vector<double> before = absent ? std::vector<double>(size_t(tokens * n_out)) : from.values();
  std::optional<Tensor> to, b, h;
  if (!in_place) to.emplace(c.type, tokens, n_out, c.by_rows());
  if (has_b)
    b.emplace(c.numbers, c.any_type(), rank, n_out, c.any_layout()), h.emplace(c.numbers, DType::f32, tokens, rank);
  const std::optional<Tensor> gain = c.vector(n_out), bias = c.vector(n_out);
  const Dropout dropout = c.dropout();
  const Expand p{absent ? View{} : View(from),
                 to ? *to : from,
                 view_of(b),
                 view_of(gain),
                 view_of(bias),
                 h ? h->floats() : nullptr,
                 dropout,
                 mask_from,
                 tokens,
                 n_out,
                 rank,
                 c.threads};
  c.run([&] { c.level->expand(p); });
  c.expect(to ? *to : from, "to", [&](int64_t t, int64_t n) {
    double sum = 0;
    for (int64_t j = 0; j < rank; j++) sum += h->at(t, j) * b->at(j, n);
    const double mask = mask_of(dropout, t, n), base = before[size_t(t * n_out + n)];
    return value_of(gain, n, 1) * ((mask_from ? mask : 1) * base + mask * sum) + value_of(bias, n, 0);
  });
}

void outer(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows()), d(c.any_type(), rank, n_in, c.any_layout());
  Tensor left(c.numbers, DType::f32, tokens, rank);
  const std::optional<Tensor> gain = c.vector(n_in);
  const Dropout dropout = c.dropout();
  const Outer p{x, d, view_of(gain), left.floats(), dropout, tokens, n_in, rank, c.threads};
  c.run([&] { c.level->outer(p); });
  const std::vector<double> right = dropped(x, dropout);
  c.expect(d, "d", [&](int64_t j, int64_t k) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; t++) sum += left.at(t, j) * right[size_t(t * n_in + k)];
    return sum * value_of(gain, k, 1);
  });
}

void column_sums(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  Tensor u(c.numbers, c.type, tokens, n_out, c.by_rows()), sums(DType::f32, 1, n_out);
  std::optional<Tensor> v;
  if (c.coin()) v.emplace(c.numbers, c.type, tokens, n_out, c.by_rows());
  const ColumnSums p{u, view_of(v), sums.floats(), tokens, n_out, c.threads};
  c.run([&] { c.level->column_sums(p); });
  c.expect(sums, "sums", [&](int64_t, int64_t n) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; t++) sum += u.at(t, n) * (v ? v->at(t, n) : 1);
    return sum;
  });
}

void weight_norm(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const Weight w(c, c.type, n_out, n_in);
  Tensor norm(DType::f32, 1, n_out);
  Tensor a(c.numbers, c.any_type(), rank, n_in, c.any_layout()),
      b(c.numbers, c.any_type(), n_out, rank, c.any_layout());
  const float scale = c.scale(), max_condition = c.coin() ? 0.01f : 64.f;  // the first sums every row directly
  const std::vector<double> all = w.values();
  std::optional<Tensor> w_squared, products;
  if (c.coin()) {
    std::vector<double> squares(size_t(n_out), 0);
    for (size_t i = 0; i < all.size(); i++) squares[i / size_t(n_in)] += all[i] * all[i];
    w_squared.emplace(squares, 1, n_out);
  }
  if (c.coin()) products.emplace(product(a.values(), all, n_in), rank, n_out, c.any_layout());
  const WeightNorm p{w,    a,     b,    view_of(w_squared), view_of(products), norm.floats(), scale, max_condition,
                     n_in, n_out, rank, c.threads,          w.packed()};
  c.run([&] { c.level->weight_norm(p); });
  c.expect(norm, "norm", [&](int64_t, int64_t n) {
    double squared = 0;
    for (int64_t k = 0; k < n_in; k++) {
      double sum = w.at(n, k);
      for (int64_t j = 0; j < rank; j++) sum += scale * b.at(n, j) * a.at(j, k);
      squared += sum * sum;
    }
    return std::sqrt(squared);
  });
}

void row_norm_squared(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const Weight w(c, c.type, n_out, n_in);
  Tensor squared(DType::f32, 1, n_out);
  const RowNormSquared p{w, squared.floats(), n_in, n_out, c.threads, w.packed()};
  c.run([&] { c.level->row_norm_squared(p); });
  c.expect(squared, "squared", [&](int64_t, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < n_in; k++) sum += w.at(n, k) * w.at(n, k);
    return sum;
  });
}

void checksum(Case& c) {
  std::vector<char> bytes(size_t(c.shape.n_in * c.shape.tokens)), few(size_t(c.shape.rank));
  for (char& byte : bytes) byte = char(c.numbers.next());
  const Table<char> first(bytes), second(few);
  const Bytes ranges[2] = {{first.data(), int64_t(bytes.size())}, {second.data(), int64_t(few.size())}};
  uint64_t found = 0;
  c.run([&] { found = c.level->checksum(ranges, 2); });
  if (found != portable::checksum(ranges, 2))
    throw std::runtime_error(c.said() + ": not the sum of the level portable");
  first.data()[c.numbers.next() % bytes.size()] ^= 1;
  if (found == c.level->checksum(ranges, 2)) throw std::runtime_error(c.said() + ": a changed bit keeps the sum");
}

// to the last bit
void dequantise(Case& c) {
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const Weight w(c, c.type, n_out, n_in);
  Tensor to(c.coin() ? c.type : DType::f32, n_out, n_in, c.by_rows());
  const Dequantise p{*w.packed(), to, n_out, c.threads};
  c.run([&] { c.level->dequantise(p); });
  for (int64_t n = 0; n < n_out; n++) {
    for (int64_t k = 0; k < n_in; k++) {
      if (to.at(n, k) != w.at(n, k)) throw std::runtime_error(c.said() + ": not the formula's number");
    }
  }
}

void gated_activation(Case& c) {
  const auto [tokens, n_in, n, rank] = c.shape;
  const bool tanh = c.among({0, 1});
  const Tensor x(c.numbers, c.type, tokens, 2 * n, c.by_rows(), 4);
  std::optional<Tensor> y, dy, dx;
  if (c.coin()) {
    dy.emplace(c.numbers, c.type, tokens, n, c.by_rows());
    dx.emplace(c.type, tokens, 2 * n, c.by_rows());
  } else {
    y.emplace(c.type, tokens, n, c.by_rows());
  }
  const GatedActivation p{x, view_of(y), view_of(dy), view_of(dx), tanh, tokens, n, c.threads};
  c.run([&] { c.level->gated_activation(p); });
  const auto sigma = [&](double g) {
    return 1 / (1 + std::exp(tanh ? -std::sqrt(8 / M_PI) * (g + 0.044715 * g * g * g) : -g));
  };
  if (y) c.expect(*y, "y", [&](int64_t t, int64_t i) { return x.at(t, i) * sigma(x.at(t, i)) * x.at(t, n + i); });
  if (!dx) return;
  c.expect(*dx, "dx", [&](int64_t t, int64_t i) {
    const double g = x.at(t, i % n), s = sigma(g), slope = tanh ? std::sqrt(8 / M_PI) * (1 + 0.134145 * g * g) : 1;
    return dy->at(t, i % n) * (i < n ? x.at(t, n + i) * (s + g * s * (1 - s) * slope) : g * s);
  });
}

}  // namespace

const std::vector<KernelCase> cases{
    {"forward_small", forward_small},
    {"backward_small", backward_small},
    {"base_product", base_product},
    {"shrink", shrink},
    {"expand", expand},
    {"outer", outer},
    {"column_sums", column_sums},
    {"weight_norm", weight_norm},
    {"row_norm_squared", row_norm_squared},
    {"checksum", checksum},
    {"multi_lora", multi_lora_case},
    {"tiles", tiles_case},
    {"gated_activation", gated_activation},
    {"dequantise", dequantise, true},
    {"forward_small", forward_small, true},
    {"backward_small", backward_small, true},
    {"base_product", base_product, true},
    {"weight_norm", weight_norm, true},
    {"row_norm_squared", row_norm_squared, true},
    {"tiles", tiles_case, true},
    {"expert_product", expert_product_case, false, true},
    {"expert_gradients", expert_gradients_case, false, true},
    {"expert_backward_small", expert_backward_small_case, false, true},
    {"expert_norm", expert_norm_case, false, true},
};

}  // namespace lk::sanitize
