// lora_kernels._cpu: the CPU kernels on tensors. That shapes fit one another is the caller's to
// check (op.py).
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "levels.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

using lk::Dropout;
using lk::Matrix;

const lk::Kernels* chosen = [] {
  const lk::Kernels* found[lk::LEVELS];
  const int count = lk::supported(found);
  return found[count - 1];
}();

py::list levels() {
  const lk::Kernels* found[lk::LEVELS];
  const int count = lk::supported(found);
  py::list names;
  for (int i = 0; i < count; i++) names.append(found[i]->level);
  return names;
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

float* floats(const Matrix& m, const char* kernel) {
  if (m.data && m.type != lk::DType::f32) throw py::type_error(std::string(kernel) + ": a float32 result is wanted");
  return static_cast<float*>(m.data);
}

// Whether these are x [..., in], w [out, in], a [r, in], b [out, r] and vectors [out] on the CPU, x
// as w and a as b in dtype, all of them ones that the kernels read. Then _check of
// ops/lora_linear/op.py, which is slower, raises nothing.
bool valid_lora_linear(py::handle x, py::handle w, py::handle a, py::handle b, py::handle bias, py::handle gain) {
  lk::Tensor t[6];
  const py::handle given[6] = {x, w, a, b, bias, gain};
  for (int i = 0; i < 6; i++) {
    if (i > 3 && given[i].is_none()) continue;
    if (!lk::reader.try_read(given[i].ptr(), &t[i]) || t[i].device.type != lk::CPU || !lk::readable(t[i].type))
      return false;
    if (i == 0 ? t[i].dimensions < 1 : t[i].dimensions != (i < 4 ? 2 : 1)) return false;
    if (i > 3 && t[i].shape[0] != t[1].shape[0]) return false;
  }
  const auto alike = [](const lk::DataType& one, const lk::DataType& other) {
    return one.code == other.code && one.bits == other.bits;
  };
  const int64_t n_out = t[1].shape[0], n_in = t[1].shape[1], rank = t[2].shape[0];
  return alike(t[0].type, t[1].type) && alike(t[2].type, t[3].type) && rank > 0 && t[2].shape[1] == n_in &&
         t[0].shape[t[0].dimensions - 1] == n_in && t[3].shape[0] == n_out && t[3].shape[1] == rank;
}

uint64_t mix(uint64_t sum, uint64_t value) {
  sum = (sum ^ value) * 0x9E3779B97F4A7C15u;
  return sum ^ sum >> 29;
}

// A number that says whether a matrix and some tensors are still what they were: address, shape,
// strides and dtype of each, every bit of the tensors, and of the matrix one element of each of 64
// rows, its column walking across. None where there is no such number: not on the CPU, or a tensor
// that is not contiguous.
py::object fingerprint(py::handle w, const py::args& tensors) {
  lk::Bytes bytes[8];
  const int count = int(tensors.size());
  if (count > 8) throw std::invalid_argument("fingerprint: at most 8 tensors");
  uint64_t sum = 0;
  for (int i = -1; i < count; i++) {
    int64_t held[4];
    lk::Tensor t{};
    try {
      t = lk::reader.read(i < 0 ? w.ptr() : tensors[i].ptr(), held);
    } catch (py::error_already_set&) {
      return py::none();
    }
    const int64_t size = t.type.bits / 8;
    if (size > 8 || t.device.type != lk::CPU || t.dimensions > 2 || (i < 0 && t.dimensions != 2)) return py::none();
    sum = mix(sum, reinterpret_cast<uint64_t>(t.data));
    sum = mix(sum, uint64_t(t.type.code) << 8 | t.type.bits);
    int64_t elements = 1;
    for (int d = t.dimensions - 1; d >= 0; d--) {
      if (i >= 0 && t.shape[d] > 1 && t.strides[d] != elements) return py::none();
      sum = mix(mix(sum, uint64_t(t.shape[d])), uint64_t(t.strides[d]));
      elements *= t.shape[d];
    }
    if (i >= 0) {
      bytes[i] = {t.data, elements * size};
      continue;
    }
    if (elements == 0) return py::none();
    const int64_t rows = t.shape[0], columns = t.shape[1];
    for (int64_t j = 0; j < 64; j++) {
      const int64_t row = rows * j / 64, column = (columns * (2 * j + 1) / 128 + j) % columns;
      uint64_t bits = 0;
      std::memcpy(&bits, static_cast<const char*>(t.data) + (row * t.strides[0] + column * t.strides[1]) * size, size);
      sum = mix(sum, bits);
    }
  }
  return py::int_(count ? mix(sum, chosen->checksum(bytes, count)) : sum);
}

void multi_lora(const Matrix& x, const Matrix& a, const Matrix& b, const Matrix& from, const Matrix& to,
                const Matrix& bias, bool holds_bias, int64_t first, const py::tuple& tables, int threads) {
  constexpr int COUNT = 12;
  if (tables.size() != COUNT) throw std::invalid_argument("multi_lora: 12 tables");
  void* at[COUNT] = {};
  int64_t rows[COUNT] = {}, columns[COUNT] = {};
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
  py::gil_scoped_release release;
  chosen->multi_lora(p);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("levels", &levels, "The instruction sets that this processor runs, the fastest last.");
  m.def("level", [] { return chosen->level; }, "The instruction set in use.");
  m.def("set_level", &set_level, "Uses another instruction set, for tests and benchmarks.");
  m.def(
      "read_tensors", [](py::object capsule, py::object describe) { lk::reader.set(capsule, describe); },
      "How tensors are read: torch's DLPack exchange functions, or where there are none a Python function.");
  m.def("reads_fast", [] { return lk::reader.fast(); }, "Whether tensors are read by torch's own C function.");
  m.def("valid_lora_linear", &valid_lora_linear,
        "Whether x, w, a, b, bias and gain are valid for lora_linear; where it is False they may be so, too.");

  m.def(
      "forward_small",
      [](const Matrix& x, const Matrix& w, const Matrix& a, const Matrix& b, const Matrix& y, const Matrix& z,
         const Matrix& bias, const Matrix& gain, const Matrix& h, float scale, Dropout dropout, int threads) {
        if (!x.by_rows() || !w.by_rows() || !a.by_rows()) return false;
        chosen->forward_small({x, w, a, b, y, z, bias, gain, floats(h, "forward_small"), scale, dropout, x.rows, x.cols,
                               w.rows, a.rows, threads});
        return true;
      },
      release(), "False, and nothing done, unless the rows of x, w and a are contiguous.");
  m.def(
      "base_product",
      [](const Matrix& x, const Matrix& w, const Matrix& y, int threads) {
        floats(y, "base_product");
        if (!x.by_rows() || !w.by_rows() || !y.by_rows()) return false;
        chosen->base_product({x, w, y, x.rows, x.cols, w.rows, threads});
        return true;
      },
      release(), "False, and nothing done, unless the rows of x, w and y are contiguous.");
  m.def(
      "shrink",
      [](const Matrix& x, const Matrix& a, const Matrix& gain, const Matrix& h, float scale, Dropout dropout,
         int threads) {
        chosen->shrink({x, a, gain, floats(h, "shrink"), scale, dropout, x.rows, x.cols, a.rows, threads});
      },
      release());
  m.def(
      "expand",
      [](const Matrix& from, const Matrix& to, const Matrix& b, const Matrix& gain, const Matrix& bias, const Matrix& h,
         Dropout dropout, bool mask_from, int threads) {
        floats(from, "expand");
        chosen->expand(
            {from, to, b, gain, bias, floats(h, "expand"), dropout, mask_from, from.rows, from.cols, b.rows, threads});
      },
      release());
  m.def(
      "outer",
      [](const Matrix& x, const Matrix& d, const Matrix& gain, const Matrix& p, Dropout dropout, int threads) {
        chosen->outer({x, d, gain, floats(p, "outer"), dropout, x.rows, x.cols, p.cols, threads});
      },
      release());
  m.def(
      "column_sums",
      [](const Matrix& u, const Matrix& v, const Matrix& sums, int threads) {
        chosen->column_sums({u, v, floats(sums, "column_sums"), u.rows, u.cols, threads});
      },
      release());

  m.def(
      "has_tiles", [] { return chosen->tiles != nullptr; }, "Whether this level has bf16 products with float32 sums.");
  m.attr("built_with_tiles") =
#if defined(LK_AMX)
      true;
#else
      false;
#endif
  m.def(
      "tiles",
      [](const Matrix& x, const Matrix& w, const Matrix& a, const Matrix& b, const Matrix& y, const Matrix& z,
         const Matrix& bias, const Matrix& gain, const Matrix& h, float scale, Dropout dropout, bool back,
         int threads) {
        if (chosen->tiles == nullptr) throw std::runtime_error("tiles: this level has no bf16 products");
        chosen->tiles({x, w, a, b, y, z, bias, gain, floats(h, "tiles"), scale, dropout, back, x.rows, x.cols, y.cols,
                       h.cols, threads});
      },
      release());

  m.def(
      "weight_norm",
      [](const Matrix& w, const Matrix& a, const Matrix& b, const Matrix& w_squared, const Matrix& products,
         const Matrix& norm, float scale, float max_condition, int threads) {
        chosen->weight_norm({w, a, b, w_squared, products, floats(norm, "weight_norm"), scale, max_condition, w.cols,
                             w.rows, a.rows, threads});
      },
      release());
  m.def(
      "row_norm_squared",
      [](const Matrix& w, const Matrix& squared, int threads) {
        chosen->row_norm_squared({w, floats(squared, "row_norm_squared"), w.cols, w.rows, threads});
      },
      release());
  m.def("multi_lora", &multi_lora,
        "tables: table, rank, scale, flags, gain, bias, generation of the slots; ids, weights, order, starts, error of "
        "the plan. Columns `first` to `first` + those of b of `from` and `to`.");
  m.def("fingerprint", &fingerprint, "A 64-bit number of (W, tensors…) as they are; None where there is none.");
}
