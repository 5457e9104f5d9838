// W of a call: a matrix, or codes and scales.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../quantised/params.h"
#include "tensor.h"

namespace lk {

// In Python a tensor or a tuple (codes, parts, layout, first, rows) of ops/cpu_quantised.py:
// `parts` and `layout` as QuantisedWeight.fields() gives them, and which rows.
struct Weight : Matrix {
  static constexpr int MOST = 7;
  static constexpr size_t LAYOUT = 12;
  Quantised codes;
  PyObject* sources[MOST] = {};  // the tensors of codes, borrowed from the caller
  int count = 0;
  PyObject* tuple = nullptr;

  bool quantised() const { return tuple != nullptr; }
  const Quantised* packed() const { return quantised() ? &codes : nullptr; }

  void read(PyObject* from) {
    namespace py = pybind11;
    const py::handle given(from);
    const auto parts = py::reinterpret_borrow<py::sequence>(given[py::int_(1)]);
    const auto layout = py::reinterpret_borrow<py::sequence>(given[py::int_(2)]);
    const size_t given_numbers = layout.size();
    if (given_numbers != 6 && given_numbers != LAYOUT)
      throw py::value_error("a quantised w: 6 or 12 numbers say how it lies");
    int64_t numbers[LAYOUT] = {};
    for (size_t i = 0; i < given_numbers; i++) numbers[i] = layout[i].cast<int64_t>();
    tuple = from, count = 0;
    const auto small = [](int64_t n) { return n >= 0 && n >> 62 == 0; };  // no sum of two overflows
    int64_t elements = 0;
    if (!std::all_of(numbers, numbers + LAYOUT, small) || __builtin_mul_overflow(numbers[1], numbers[2], &elements) ||
        !small(elements)) {
      throw py::value_error("a quantised w: its layout has a number below 0 or beyond any memory");
    }
    codes.code = Code(numbers[0]), codes.n_in = numbers[2], codes.type = DType(numbers[3]);
    codes.block = numbers[4], codes.outer_block = numbers[5];
    codes.block_rows = numbers[6], codes.order = Order(numbers[7]), codes.numbers = elements;
    codes.zero_rounded = numbers[10], codes.expert_rows = numbers[11];
    codes.first = given[py::int_(3)].cast<int64_t>(), rows = given[py::int_(4)].cast<int64_t>();
    if (numbers[0] < 0 || numbers[0] > 3 || numbers[3] < 0 || numbers[3] > 2 || codes.block < 1 ||
        codes.outer_block < 1 || codes.block_rows < 0 || numbers[7] < 0 || numbers[7] > 2 ||
        (codes.order == Order::halves && elements % 2) || codes.first < 0 || rows < 0 ||
        rows > numbers[1] - codes.first ||
        (codes.expert_rows && (numbers[1] % codes.expert_rows || !codes.block_rows))) {
      throw py::value_error("a quantised w: its layout is not one that the kernels read");
    }
    const bool nibbles = codes.code == Code::nibbles, zeros = numbers[9], exponents = numbers[8];
    const size_t others = size_t(nibbles) + size_t(zeros);
    const bool nested = parts.size() == 4 + others;
    if ((!nested && parts.size() != 1 + others) || (nested && exponents)) {
      throw py::value_error("a quantised w: parts are missing");
    }
    const auto over = [](int64_t some, int64_t by) { return (some + by - 1) / by; };
    // each expert's last tiles may be smaller
    const int64_t tall = codes.expert_rows ? codes.expert_rows : std::max<int64_t>(numbers[1], 1);
    const int64_t blocks = codes.block_rows
                               ? numbers[1] / tall * over(tall, codes.block_rows) * over(numbers[2], codes.block)
                               : over(elements, codes.block);
    codes.codes = static_cast<const uint8_t*>(part(given[py::int_(0)], nibbles ? (elements + 1) / 2 : elements, 8));
    int next = 0;
    codes.table = nibbles ? floats(parts[next++], 16) : nullptr;
    codes.exponents = exponents ? static_cast<const uint8_t*>(part(parts[next++], blocks, 8)) : nullptr;
    codes.scales = nested || exponents ? nullptr : floats(parts[next++], blocks);
    if (nested) {
      codes.inner = static_cast<const uint8_t*>(part(parts[next++], blocks, 8));
      codes.outer_table = floats(parts[next++], 256);
      codes.outer = floats(parts[next++], (blocks + codes.outer_block - 1) / codes.outer_block);
      codes.offset = floats(parts[next++], 1);
    }
    codes.zeros = zeros ? floats(parts[next++], blocks) : nullptr;
    cols = codes.n_in, row = 0, col = 1, type = codes.type;
    data = const_cast<uint8_t*>(codes.codes);
  }

  // the addresses now; whether they are what was read
  bool same() {
    Weight now;
    now.read(tuple);
    const auto addresses = [](const Weight& w) {
      const Quantised& q = w.codes;
      return std::make_tuple(q.codes, q.table, q.scales, q.exponents, q.inner, q.outer_table, q.outer, q.offset,
                             q.zeros);
    };
    const bool alike = addresses(now) == addresses(*this);
    *this = now;
    return alike;
  }

 private:
  const float* floats(pybind11::handle tensor, int64_t least) {
    return static_cast<const float*>(part(tensor, least, 32));
  }
  // the memory of at least so many elements of so many bits, without gaps
  void* part(pybind11::handle tensor, int64_t least, int bits) {
    int64_t held[4], elements = 1;
    const Tensor t = reader.read(tensor.ptr(), held);
    bool gaps = false;
    for (int d = t.dimensions - 1; d >= 0; d--) {
      gaps |= t.shape[d] > 1 && t.strides[d] != elements;
      elements *= t.shape[d];
    }
    const bool float32 = t.type.code == FLOAT && t.type.bits == 32;
    if (gaps || elements < least || t.device.type != CPU || t.type.bits != bits || (bits == 32 && !float32) ||
        (elements && !t.data)) {
      throw pybind11::value_error("a quantised w: a part with gaps, of another dtype or size, or not on the CPU");
    }
    sources[count++] = tensor.ptr();
    return t.data;
  }
};

}  // namespace lk

namespace pybind11::detail {

template <>
struct type_caster<lk::Weight> {
  PYBIND11_TYPE_CASTER(lk::Weight, const_name("Weight"));

  bool load(handle source, bool) {
    if (PyTuple_Check(source.ptr()) && PyTuple_GET_SIZE(source.ptr()) == 5) {
      value.read(source.ptr());
    } else {
      static_cast<lk::Matrix&>(value) = lk::reader.matrix(source.ptr());
    }
    return true;
  }
};

}  // namespace pybind11::detail
