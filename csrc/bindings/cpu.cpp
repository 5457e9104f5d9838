// lora_kernels._cpu: the CPU kernels on tensors. Values and options are the caller's to check
// (op.py); shapes and dtypes are looked at again, since another thread may have replaced a tensor.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "call.h"
#include "experts.h"
#include "forward.h"
#include "function.h"
#include "plain_layer.h"

namespace py = pybind11;

namespace {

using lk::Call;
using lk::chosen;
using lk::Dropout;
using lk::floats;
using lk::Matrix;
using lk::Weight;

py::list levels() {
  const lk::Kernels* found[lk::LEVELS];
  const int count = lk::supported(found);
  py::list names;
  for (int i = 0; i < count; i++) names.append(found[i]->level);
  return names;
}

PyObject* level(PyObject* const*, Py_ssize_t) {
  static const lk::Kernels* last = nullptr;
  static PyObject* name = nullptr;
  if (last != chosen) last = chosen, name = PyUnicode_InternFromString(chosen->level);
  Py_XINCREF(name);
  return name;
}

void set_level(const std::string& name) {
  const lk::Kernels* found[lk::LEVELS];
  const int count = lk::supported(found);
  for (int i = 0; i < count; i++) {
    if (name == found[i]->level) {
      chosen = found[i];
      return;
    }
  }
  throw std::invalid_argument("set_level: this processor has no level " + name);
}

lk::PlainLayer plain_layer;

uint64_t mix(uint64_t sum, uint64_t value) {
  sum = (sum ^ value) * 0x9E3779B97F4A7C15u;
  return sum ^ sum >> 29;
}

// A number that says whether a matrix and some tensors are still what they were: address, shape,
// strides and dtype of each, every bit of the tensors, and of the matrix one element of each of 64
// rows, its column walking across. None where there is no such number: not on the CPU, a tensor
// that is not contiguous, one of a subclass or negated, or a matrix made in inference mode, which
// has no version.
PyObject* fingerprint(PyObject* const* given, Py_ssize_t count) {
  static PyObject* const is_inference = PyUnicode_InternFromString("is_inference");
  constexpr int MOST = 9, SAMPLE = 64;
  if (count < 1 || count > MOST) throw std::invalid_argument("fingerprint: a matrix and at most 8 tensors");
  for (int i = 0; i < count; i++) {
    if (!lk::reader.is_plain(given[i]) || lk::reader.is_negated(given[i])) return nullptr;
  }
  if (lk::reader.asks(given[0], is_inference)) return nullptr;
  lk::Bytes bytes[MOST];
  const char* sampled[SAMPLE];
  int64_t size_of_w = 0;
  uint64_t sum = 0;
  for (int i = 0; i < count; i++) {
    int64_t held[4];
    lk::Tensor t{};
    try {
      t = lk::reader.read(given[i], held);
    } catch (py::error_already_set&) {
      return nullptr;
    }
    const int64_t size = t.type.bits / 8;
    if (size > 8 || t.device.type != lk::CPU || t.dimensions > 2 || (i == 0 && t.dimensions != 2)) return nullptr;
    sum = mix(sum, reinterpret_cast<uint64_t>(t.data));
    sum = mix(sum, uint64_t(t.type.code) << 8 | t.type.bits);
    int64_t elements = 1;
    for (int d = t.dimensions - 1; d >= 0; d--) {
      if (i > 0 && t.shape[d] > 1 && t.strides[d] != elements) return nullptr;
      sum = mix(mix(sum, uint64_t(t.shape[d])), uint64_t(t.strides[d]));
      elements *= t.shape[d];
    }
    if (elements && !t.data) return nullptr;
    if (i > 0) {
      bytes[i - 1] = {t.data, elements * size};
      continue;
    }
    if (elements == 0) return nullptr;
    const int64_t rows = t.shape[0], columns = t.shape[1];
    size_of_w = size;
    for (int64_t j = 0; j < SAMPLE; j++) {
      const int64_t row = rows * j / SAMPLE, column = (columns * (2 * j + 1) / (2 * SAMPLE) + j) % columns;
      sampled[j] = static_cast<const char*>(t.data) + (row * t.strides[0] + column * t.strides[1]) * size;
      __builtin_prefetch(sampled[j]);  // they come while the others are read
    }
  }
  if (count > 1) sum = mix(sum, chosen->checksum(bytes, int(count) - 1));
  for (const char* each : sampled) {
    uint64_t bits = 0;
    std::memcpy(&bits, each, size_t(size_of_w));
    sum = mix(sum, bits);
  }
  return PyLong_FromUnsignedLongLong(sum);
}

void multi_lora(Matrix x, Matrix a, Matrix b, Matrix from, Matrix to, Matrix bias, bool holds_bias, int64_t first,
                const py::tuple& tables, int threads) {
  constexpr int COUNT = 12;
  Call call("multi_lora", double(x.rows) * double(x.cols + b.cols) * 16, threads, {&x, &a, &b, &from, &to, &bias});
  if (tables.size() != COUNT) throw std::invalid_argument("multi_lora: 12 tables");
  void* at[COUNT] = {};
  int64_t rows[COUNT] = {}, columns[COUNT] = {};
  for (py::handle table : tables) {
    if (!table.is_none()) call.hold(table.ptr());
  }
  for (int i = 0; i < COUNT; i++) {
    if (tables[i].is_none()) continue;
    int64_t held[4];
    const lk::Tensor t = lk::reader.read(tables[i].ptr(), held);
    int64_t elements = 1;
    for (int d = t.dimensions - 1; d >= 0; d--) {
      if (t.shape[d] > 1 && t.strides[d] != elements) throw std::invalid_argument("multi_lora: a table with gaps");
      elements *= t.shape[d];
    }
    if (t.device.type != lk::CPU) throw std::invalid_argument("multi_lora: a table that is not on the CPU");
    at[i] = t.data, rows[i] = t.shape[0], columns[i] = t.dimensions > 1 ? t.shape[1] : 1;
  }
  const auto ints = [&](int i) { return static_cast<int32_t*>(at[i]); };
  const auto reals = [&](int i) { return static_cast<float*>(at[i]); };
  const auto longs = [&](int i) { return static_cast<int64_t*>(at[i]); };
  const auto part = [&](const Matrix& m, int64_t columns) {
    lk::View v = m;
    const int64_t size = m.type == lk::DType::f32 ? 4 : 2;
    if (v.data) v.data = static_cast<char*>(v.data) + columns * m.col * size;
    return v;
  };
  const lk::MultiLora p{x,          a,        b,          part(from, first), part(to, first), part(bias, first),
                        holds_bias, ints(0),  ints(1),    ints(3),           ints(6),         reals(2),
                        reals(4),   reals(5), longs(7),   reals(8),          longs(9),        longs(10),
                        ints(11),   x.rows,   columns[7], rows[1],           columns[0],      x.cols,
                        b.cols,     threads};
  call.run([&] { chosen->multi_lora(p); });
}

PyObject* forward_plain_of(PyObject* const* given, Py_ssize_t) {
  const auto number = [&](int i) { return PyLong_AsLongLong(given[i]); };
  if (!PyFloat_CheckExact(given[4])) return nullptr;
  return lk::forward_plain(given[0], given[1], given[2], given[3], PyFloat_AS_DOUBLE(given[4]), given[5], given[6],
                           number(7), int(number(8)), given[9] == Py_True);
}

PyObject* plain_call_of(PyObject* const* given, Py_ssize_t) { return plain_layer.read(given[0], given[1]); }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("levels", &levels, "The instruction sets that this processor runs, the fastest last.");
  lk::add_function<level, 0>(m, "level", "The instruction set in use.");
  m.def("set_level", &set_level, "Uses another instruction set, for tests and benchmarks.");
  m.def(
      "read_tensors", [](py::object capsule, py::object describe) { lk::reader.set(capsule, describe); },
      "How tensors are read: torch's DLPack exchange functions, or where there are none a Python function.");
  m.def(
      "plain_tensors", [](py::object tensor, py::object parameter) { lk::reader.set_plain(tensor, parameter); },
      "The classes of tensors that are no subclass's.");
  m.def("reads_fast", [] { return lk::reader.fast(); }, "Whether tensors are read by torch's own C function.");
  py::class_<lk::Team>(m, "Team", "How many threads a call takes; times in ns.")
      .def(py::init())
      .def("size", &lk::Team::size, py::arg("kind"), py::arg("work"), py::arg("threads"), py::arg("time"))
      .def("took", &lk::Team::took, py::arg("kind"), py::arg("work"), py::arg("threads"), py::arg("nanoseconds"),
           py::arg("time"));
  m.def("valid_lora_linear", &lk::valid_lora_linear,
        "Whether x, w, a, b, bias and gain are valid for lora_linear; where it is False they may be so, too.");

  m.def("forward_small", &lk::forward_small, "False, and nothing done, unless the rows of x, w and a are contiguous.");
  m.def(
      "plain_classes", [](const py::dict& classes) { plain_layer.set(classes); },
      "What a plain layer of PEFT's is of.");
  lk::add_function<forward_plain_of, 10>(
      m, "forward_plain",
      "lora_linear of few tokens without gradients; None where the arguments are not such a call's.");
  lk::add_function<plain_call_of, 2>(
      m, "plain_call", "The state of a plain layer of PEFT's for a plain input; None where either is not plain.");
  m.def(
      "base_product",
      [](Matrix x, Weight w, Matrix y, int threads) {
        Call call("base_product", double(x.rows) * double(x.cols) * double(w.rows), threads, {&x, &y});
        call.hold_weight(w);
        if (!x.by_rows() || !w.by_rows() || !y.by_rows()) return false;
        floats(y, "base_product");
        call.check_alike(x, w, "x and w");
        call.check(w, w.rows, x.cols, "w");
        call.check(y, x.rows, w.rows, "y");
        const lk::BaseProduct p{x, w, y, x.rows, x.cols, w.rows, threads, w.packed()};
        call.run([&] { chosen->base_product(p); });
        return true;
      },
      "False, and nothing done, unless the rows of x, w and y are contiguous.");
  m.def(
      "backward_small",
      [](Matrix dy, Matrix x, Weight w, Matrix a, Matrix b, Matrix gain, Matrix h, Matrix dx, Matrix da, Matrix db,
         float scale, Dropout dropout, int threads) {
        const int64_t tokens = x.rows, n_in = x.cols, n_out = dy.cols, rank = a.rows;
        Call call("backward_small", double(tokens) * double(n_out) * double(n_in), threads,
                  {&dy, &x, &a, &b, &gain, &h, &dx, &da, &db});
        call.hold_weight(w);
        if (!dy.by_rows() || !x.by_rows() || !w.by_rows() || (dx.data && !dx.by_rows())) return false;
        call.check_alike(x, w, "x and w");
        call.check_alike(x, dy, "x and dy");
        call.check(dy, tokens, n_out, "dy");
        call.check(w, n_out, n_in, "w");
        call.check(a, rank, n_in, "a");
        call.check(b, n_out, rank, "b");
        call.check(gain, 1, n_out, "gain");
        call.check(h, tokens, rank, "h");
        call.check(dx, tokens, n_in, "dx");
        call.check(da, rank, n_in, "da");
        call.check(db, n_out, rank, "db");
        const lk::BackwardSmall p{
            dy,    x,       w,      a,    b,     gain, dx,      da,        db, floats(h, "backward_small"),
            scale, dropout, tokens, n_in, n_out, rank, threads, w.packed()};
        call.run([&] { chosen->backward_small(p); });
        return true;
      },
      "False, and nothing done, unless the rows of dy, x, w and dx are contiguous.");
  m.def("shrink", [](Matrix x, Matrix a, Matrix gain, Matrix h, float scale, Dropout dropout, int threads) {
    const Call call("shrink", double(x.rows) * double(x.cols) * double(a.rows), threads, {&x, &a, &gain, &h});
    call.check(a, a.rows, x.cols, "a");
    call.check(gain, 1, x.cols, "gain");
    call.check(h, x.rows, a.rows, "h");
    const lk::Shrink p{x, a, gain, floats(h, "shrink"), scale, dropout, x.rows, x.cols, a.rows, threads};
    call.run([&] { chosen->shrink(p); });
  });
  m.def("expand", [](Matrix from, Matrix to, Matrix b, Matrix gain, Matrix bias, Matrix h, Dropout dropout,
                     bool mask_from, int threads) {
    const Call call("expand", double(to.rows) * double(to.cols) * double(b.rows + 1), threads,
                    {&from, &to, &b, &gain, &bias, &h});
    const int64_t tokens = to.rows, n_out = to.cols;
    if (from.data && from.type != to.type) floats(from, "expand");
    call.check(from, tokens, n_out, "from");
    call.check(b, b.rows, n_out, "b");
    call.check(gain, 1, n_out, "gain");
    call.check(bias, 1, n_out, "bias");
    if (b.data) call.check(h, tokens, b.rows, "h");
    const lk::Expand p{from,    to,        b,      gain,  bias,   floats(h, "expand"),
                       dropout, mask_from, tokens, n_out, b.rows, threads};
    call.run([&] { chosen->expand(p); });
  });
  m.def("outer", [](Weight x, Matrix d, Matrix gain, Matrix p, Dropout dropout, int threads) {
    Call call("outer", double(x.rows) * double(x.cols) * double(p.cols), threads, {&d, &gain, &p});
    call.hold_weight(x);
    if (x.quantised() && dropout.active()) throw py::value_error("outer: codes are not dropped");
    call.check(d, p.cols, x.cols, "d");
    call.check(gain, 1, x.cols, "gain");
    call.check(p, x.rows, p.cols, "p");
    const lk::Outer params{x, d, gain, floats(p, "outer"), dropout, x.rows, x.cols, p.cols, threads, x.packed()};
    call.run([&] { chosen->outer(params); });
  });
  m.def("column_sums", [](Matrix u, Matrix v, Matrix sums, int threads) {
    const Call call("column_sums", double(u.rows) * double(u.cols), threads, {&u, &v, &sums});
    call.check(v, u.rows, u.cols, "v");
    if (v.data) call.check_alike(u, v, "u and v");
    call.check(sums, 1, u.cols, "sums");
    const lk::ColumnSums p{u, v, floats(sums, "column_sums"), u.rows, u.cols, threads};
    call.run([&] { chosen->column_sums(p); });
  });

  m.def(
      "has_tiles", [] { return chosen->tiles != nullptr; }, "Whether this level has bf16 products with float32 sums.");
  py::list with_tiles;
#if defined(LK_AVX512BF16)
  with_tiles.append("avx512bf16");
#endif
#if defined(LK_AMX)
  with_tiles.append("amx");
#endif
  m.attr("many_ranks") = lk::MANY_RANKS;
  m.attr("built_with_tiles") = with_tiles;  // levels, whatever this processor runs
  m.def("tiles", [](Matrix x, Weight w, Matrix a, Matrix b, Matrix y, Matrix z, Matrix bias, Matrix gain, Matrix h,
                    float scale, Dropout dropout, bool back, int threads) {
    if (chosen->tiles == nullptr) throw std::runtime_error("tiles: this level has no bf16 products");
    Call call("tiles", double(x.rows) * double(w.rows) * double(w.cols), threads,
              {&x, &a, &b, &y, &z, &bias, &gain, &h});
    call.hold_weight(w);
    const int64_t tokens = x.rows, n_in = x.cols, n_out = y.cols, rank = h.cols;
    call.check(w, back ? n_in : n_out, back ? n_out : n_in, "w");
    call.check(a, rank, n_in, "a");
    call.check(b, n_out, rank, "b");
    call.check(y, tokens, n_out, "y");
    call.check(z, tokens, n_out, "z");
    call.check(bias, 1, n_out, "bias");
    call.check(gain, 1, back ? n_in : n_out, "gain");
    call.check(h, tokens, rank, "h");
    const lk::Tiles p{x,     w,       a,    b,      y,    z,     bias, gain,    floats(h, "tiles"),
                      scale, dropout, back, tokens, n_in, n_out, rank, threads, w.packed()};
    call.run([&] { chosen->tiles(p); });
  });

  m.def("dequantise", [](Weight w, Matrix to, int threads) {
    Call call("dequantise", double(w.rows) * double(w.cols), threads, {&to});
    call.hold_weight(w);
    if (!w.quantised()) throw py::type_error("dequantise: w has no codes");
    call.check(to, w.rows, w.cols, "to");
    if (!to.by_rows() || (to.type != w.type && to.type != lk::DType::f32)) {
      throw py::value_error("dequantise: the result is by rows, and of the type of w or float32");
    }
    const lk::Dequantise p{w.codes, to, w.rows, threads};
    call.run([&] { chosen->dequantise(p); });
  });

  m.def("weight_norm", [](Weight w, Matrix a, Matrix b, Matrix w_squared, Matrix products, Matrix norm, float scale,
                          float max_condition, int threads) {
    Call call("weight_norm", double(w.rows) * double(w.cols) * double(a.rows), threads,
              {&a, &b, &w_squared, &products, &norm});
    call.hold_weight(w);
    const int64_t n_in = w.cols, n_out = w.rows, rank = a.rows;
    call.check(a, rank, n_in, "a");
    call.check(b, n_out, rank, "b");
    call.check(w_squared, 1, n_out, "w_squared");
    call.check(products, rank, n_out, "products");
    call.check(norm, 1, n_out, "norm");
    const lk::WeightNorm p{w,    a,     b,    w_squared, products,  floats(norm, "weight_norm"), scale, max_condition,
                           n_in, n_out, rank, threads,   w.packed()};
    call.run([&] { chosen->weight_norm(p); });
  });
  m.def("row_norm_squared", [](Weight w, Matrix squared, int threads) {
    Call call("row_norm_squared", double(w.rows) * double(w.cols), threads, {&squared});
    call.hold_weight(w);
    call.check(squared, 1, w.rows, "squared");
    const lk::RowNormSquared p{w, floats(squared, "row_norm_squared"), w.cols, w.rows, threads, w.packed()};
    call.run([&] { chosen->row_norm_squared(p); });
  });
  m.def("gated_activation", [](Matrix x, Matrix y, Matrix dy, Matrix dx, bool tanh, int threads) {
    Call call("gated_activation", double(x.rows) * double(x.cols) * 16, threads, {&x, &y, &dy, &dx});
    const int64_t tokens = x.rows, n = x.cols / 2;
    call.check(x, tokens, 2 * n, "x");
    call.check(y, tokens, n, "y");
    call.check(dy, tokens, n, "dy");
    call.check(dx, tokens, 2 * n, "dx");
    for (const Matrix* m : {&y, &dy, &dx}) {
      if (m->data && (m->type != x.type || !m->by_rows())) throw py::value_error("gated_activation: rows of one dtype");
    }
    if (!x.by_rows() || !y.tensor == !dx.tensor || !dy.tensor != !dx.tensor) {
      throw py::value_error("gated_activation: x is by rows, and y there, or dy and dx");
    }
    const lk::GatedActivation p{x, y, dy, dx, tanh, tokens, n, threads};
    call.run([&] { chosen->gated_activation(p); });
  });
  m.def("expert_product", &lk::expert_product_of,
        "The product of each segment's x with its expert's W, adapter and all; see ExpertProduct.");
  m.def("expert_gradients", &lk::expert_gradients_of, "Those of A, B, bias and gain; see ExpertGradients.");
  m.def("expert_backward_small", &lk::expert_backward_small_of,
        "Those of x, A and B of experts with few tokens; see ExpertBackwardSmall.");
  m.def("expert_norm", &lk::expert_norm_of, "The norms of all experts' adapted weights; see ExpertNorm.");
  m.def("multi_lora", &multi_lora,
        "tables: table, rank, scale, flags, gain, bias, generation of the slots; ids, weights, order, starts, error of "
        "the plan. Columns `first` to `first` + those of b of `from` and `to`.");
  lk::add_function<fingerprint, 0>(m, "fingerprint",
                                   "A 64-bit number of (W, tensors...) as they are; None where there is none.");
}
