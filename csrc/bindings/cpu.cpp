// lora_kernels._cpu: the CPU kernels on raw pointers. Shapes, dtypes and strides are the caller's to check (op.py).
// A matrix arrives as (address, row stride, column stride, dtype), a vector likewise with row stride 0; None is no data.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "levels.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<lk::View> {
  PYBIND11_TYPE_CASTER(lk::View, const_name("View"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    PyObject* tuple = source.ptr();
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 4) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
    value.row = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 1));
    value.col = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 2));
    value.type = static_cast<lk::DType>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 3)));
    return !PyErr_Occurred();
  }
};

// (seed, threshold, keep), or None
template <>
struct type_caster<lk::Dropout> {
  PYBIND11_TYPE_CASTER(lk::Dropout, const_name("Dropout"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    PyObject* tuple = source.ptr();
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 3) return false;
    value.seed = uint64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 0)));
    value.threshold = uint32_t(PyLong_AsUnsignedLong(PyTuple_GET_ITEM(tuple, 1)));
    value.keep = float(PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, 2)));
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail

namespace {

using lk::Dropout;
using lk::View;

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

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("levels", &levels, "The instruction sets that this processor runs, the fastest last.");
  m.def("level", [] { return chosen->level; }, "The instruction set in use.");
  m.def("set_level", &set_level, "Uses another instruction set, for tests and benchmarks.");

  m.def(
      "forward_small",
      [](View x, View w, View a, View b, View y, View z, View bias, View gain, uintptr_t h, float scale,
         Dropout dropout, int64_t tokens, int64_t n_in, int64_t n_out, int64_t rank, int threads) {
        chosen->forward_small(
            {x, w, a, b, y, z, bias, gain, at<float>(h), scale, dropout, tokens, n_in, n_out, rank, threads});
      },
      release());
  m.def(
      "shrink",
      [](View x, View a, View gain, uintptr_t h, float scale, Dropout dropout, int64_t tokens, int64_t n_in,
         int64_t rank,
         int threads) { chosen->shrink({x, a, gain, at<float>(h), scale, dropout, tokens, n_in, rank, threads}); },
      release());
  m.def(
      "expand",
      [](View from, View to, View b, View gain, View bias, uintptr_t h, Dropout dropout, bool mask_from, int64_t tokens,
         int64_t n_out, int64_t rank, int threads) {
        if (from.type != lk::DType::f32) {
          throw std::invalid_argument("expand: from must be float32");
        }
        chosen->expand({from, to, b, gain, bias, at<const float>(h), dropout, mask_from, tokens, n_out, rank, threads});
      },
      release());
  m.def(
      "outer",
      [](View x, View d, View gain, uintptr_t p, Dropout dropout, int64_t tokens, int64_t n_in, int64_t rank,
         int threads) { chosen->outer({x, d, gain, at<const float>(p), dropout, tokens, n_in, rank, threads}); },
      release());
  m.def(
      "column_sums",
      [](View u, View v, uintptr_t sums, int64_t tokens, int64_t n_out, int threads) {
        chosen->column_sums({u, v, at<float>(sums), tokens, n_out, threads});
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
      [](View x, View w, View a, View b, View y, View z, View bias, View gain, uintptr_t h, float scale,
         Dropout dropout, bool back, int64_t tokens, int64_t n_in, int64_t n_out, int64_t rank, int threads) {
        if (chosen->tiles == nullptr) throw std::runtime_error("tiles: this level has no bf16 products");
        chosen->tiles(
            {x, w, a, b, y, z, bias, gain, at<float>(h), scale, dropout, back, tokens, n_in, n_out, rank, threads});
      },
      release());

  m.def(
      "weight_norm",
      [](View w, View a, View b, View w_squared, View products, uintptr_t norm, float scale, float max_condition,
         int64_t n_in, int64_t n_out, int64_t rank, int threads) {
        chosen->weight_norm(
            {w, a, b, w_squared, products, at<float>(norm), scale, max_condition, n_in, n_out, rank, threads});
      },
      release());
  m.def(
      "row_norm_squared",
      [](View w, uintptr_t squared, int64_t n_in, int64_t n_out, int threads) {
        chosen->row_norm_squared({w, at<float>(squared), n_in, n_out, threads});
      },
      release());
  m.def(
      "checksum",
      [](py::args ranges) {
        lk::Bytes bytes[8];
        const int count = int(ranges.size() / 2);
        if (count > 8) throw std::invalid_argument("checksum: at most 8 ranges");
        for (int i = 0; i < count; i++) {
          bytes[i] = {PyLong_AsVoidPtr(ranges[2 * i].ptr()), PyLong_AsLongLong(ranges[2 * i + 1].ptr())};
        }
        if (PyErr_Occurred()) throw py::error_already_set();
        return chosen->checksum(bytes, count);
      },
      "A 64-bit checksum of (address, bytes, address, bytes, …).");
  m.def(
      "sample",
      [](const View& w, int64_t rows, int64_t columns, int64_t size) {
        // one element of each of 64 rows, its column walking across the matrix
        uint64_t sum = 0;
        for (int64_t i = 0; i < 64; i++) {
          const int64_t row = rows * i / 64, column = (columns * (2 * i + 1) / 128 + i) % columns;
          uint64_t bits = 0;
          std::memcpy(&bits, static_cast<const char*>(w.data) + (row * w.row + column * w.col) * size, size);
          sum = (sum ^ bits) * 0x9E3779B97F4A7C15u;
          sum ^= sum >> 29;
        }
        return sum;
      },
      "A checksum of 64 elements of a matrix; `size` is that of an element, in bytes.");
}
