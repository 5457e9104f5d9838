// lora_linear of few tokens, and whether its tensors are valid.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "call.h"
#include "levels.h"

namespace lk {

// the instruction set in use
inline const Kernels* chosen = [] {
  const Kernels* found[LEVELS];
  const int count = supported(found);
  return found[count - 1];
}();

inline float* floats(const Matrix& m, const char* kernel) {
  if (m.data && m.type != DType::f32) throw pybind11::type_error(std::string(kernel) + ": a float32 result is wanted");
  return static_cast<float*>(m.data);
}

// x [..., in], w [out, in], a [r, in], b [out, r], bias [out] and gain [out] of lora_linear
constexpr int GIVEN = 6;

// W of codes as `are_valid` asks for it: the shape and dtype of its numbers.
struct Codes {
  Weight weight;
  int64_t shape[2] = {};
  bool read(PyObject* tuple, Tensor& t) {
    try {
      weight.read(tuple);
    } catch (const pybind11::builtin_exception&) {
      return false;
    } catch (const pybind11::error_already_set&) {
      return false;
    }
    shape[0] = weight.rows, shape[1] = weight.cols;
    const uint8_t code = weight.type == DType::bf16 ? BFLOAT : FLOAT, bits = weight.type == DType::f32 ? 32 : 16;
    t = {weight.data, {CPU, 0}, 2, {code, bits, 1}, shape, nullptr, 0};
    return true;
  }
};

// Whether these are on the CPU, x as w and a as b in dtype, all of them ones that the kernels read.
// Then _check_arguments of ops/lora_linear/op.py, which is slower, raises nothing. w may be a tuple
// of codes.
inline bool are_valid(const pybind11::handle (&given)[GIVEN], Tensor (&t)[GIVEN], Codes& codes) {
  for (int i = 0; i < GIVEN; i++) {
    if (i > 3 && given[i].is_none()) continue;
    const bool of_codes = i == 1 && PyTuple_Check(given[i].ptr());
    if (!(of_codes ? codes.read(given[i].ptr(), t[i]) : reader.try_read(given[i].ptr(), &t[i]))) return false;
    if (t[i].device.type != CPU || !readable(t[i].type)) return false;
    if (i == 0 ? t[i].dimensions < 1 : t[i].dimensions != (i < 4 ? 2 : 1)) return false;
    if (i > 3 && t[i].shape[0] != t[1].shape[0]) return false;
  }
  const auto alike = [](const DataType& one, const DataType& other) {
    return one.code == other.code && one.bits == other.bits;
  };
  const int64_t n_out = t[1].shape[0], n_in = t[1].shape[1], rank = t[2].shape[0];
  return alike(t[0].type, t[1].type) && alike(t[2].type, t[3].type) && rank > 0 && t[2].shape[1] == n_in &&
         t[0].shape[t[0].dimensions - 1] == n_in && t[3].shape[0] == n_out && t[3].shape[1] == rank;
}

inline bool valid_lora_linear(pybind11::handle x, pybind11::handle w, pybind11::handle a, pybind11::handle b,
                              pybind11::handle bias, pybind11::handle gain) {
  const pybind11::handle given[GIVEN] = {x, w, a, b, bias, gain};
  Tensor read[GIVEN];
  Codes codes;
  return are_valid(given, read, codes);
}

// False, and nothing done, unless the rows of x, w and a are contiguous.
inline bool forward_small(Matrix x, Weight w, Matrix a, Matrix b, Matrix y, Matrix z, Matrix bias, Matrix gain,
                          Matrix h, float scale, Dropout dropout, int threads) {
  Call call("forward_small", double(x.rows) * double(x.cols + a.rows) * double(w.rows), threads,
            {&x, &a, &b, &y, &z, &bias, &gain, &h});
  call.hold_weight(w);
  if (!x.by_rows() || !w.by_rows() || !a.by_rows()) return false;
  const int64_t tokens = x.rows, n_in = x.cols, n_out = w.rows, rank = a.rows;
  call.check_alike(x, w, "x and w");
  call.check(w, n_out, n_in, "w");
  call.check(a, rank, n_in, "a");
  call.check(b, n_out, rank, "b");
  call.check(y, tokens, n_out, "y");
  call.check(z, tokens, n_out, "z");
  call.check(bias, 1, n_out, "bias");
  call.check(gain, 1, n_out, "gain");
  call.check(h, tokens, rank, "h");
  const ForwardSmall p{x,     w,       a,      b,    y,     z,    bias,    gain,      floats(h, "forward_small"),
                       scale, dropout, tokens, n_in, n_out, rank, threads, w.packed()};
  call.run([&] { chosen->forward_small(p); });
  return true;
}

inline int64_t tokens_of(pybind11::handle x) {
  Tensor t;
  if (!reader.try_read(x.ptr(), &t)) return 0;
  int64_t tokens = 1;
  for (int i = 0; i < t.dimensions - 1; i++) tokens *= t.shape[i];
  return tokens;
}

// What lora_linear gives of few tokens where nothing gets a gradient, in the shape of x; null, and
// nothing done, where any tensor is not torch's own, plain and valid, or there are more than `most`
// tokens. With `grad`, where one of those that may learn does, too. w may be a tuple of codes.
inline PyObject* forward_plain(pybind11::handle x, pybind11::handle w, pybind11::handle a, pybind11::handle b,
                               double scale, pybind11::handle bias, pybind11::handle gain, int64_t most, int threads,
                               bool grad) {
  static PyObject* const learns = PyUnicode_InternFromString("requires_grad");
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  constexpr int DIMENSIONS = 8;
  const pybind11::handle given[GIVEN] = {x, w, a, b, bias, gain};
  // most calls that are not such have more tokens
  if (!std::isfinite(scale) || !reader.is_plain(x.ptr()) || tokens_of(x) > most) return nullptr;
  const bool of_codes = PyTuple_Check(w.ptr());
  for (int i = 0; i < GIVEN; i++) {
    PyObject* const t = given[i].ptr();
    if ((i > 3 && given[i].is_none()) || (i == 1 && of_codes)) continue;
    if (!reader.is_plain(t)) return nullptr;
    if (reader.is_negated(t) || ((grad || i == 1) && reader.has(t, learns))) return nullptr;
  }
  Tensor read[GIVEN];
  Codes codes;
  if (!are_valid(given, read, codes)) return nullptr;
  Weight& base = codes.weight;
  for (int i = 0; i < base.count; i++) {
    if (!reader.is_plain(base.sources[i]) || reader.is_negated(base.sources[i])) return nullptr;
  }
  const int last = read[0].dimensions - 1;
  const int64_t n_out = read[1].shape[0], tokens = tokens_of(x);
  if (last > DIMENSIONS - 1 || tokens < 1 || tokens > most || n_out < 1 || read[1].shape[1] < 1) return nullptr;

  PyObject* arguments[1 + DIMENSIONS] = {x.ptr()};
  pybind11::object sizes[DIMENSIONS];
  for (int i = 0; i <= last; i++) {
    sizes[i] = pybind11::int_(i < last ? read[0].shape[i] : n_out);
    arguments[1 + i] = sizes[i].ptr();
  }
  auto y = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_VectorcallMethod(new_empty, arguments, size_t(2 + last), nullptr));
  if (!y) throw pybind11::error_already_set();
  // anew: what was allocated meanwhile may have run the collector, and that Python
  if (!are_valid(given, read, codes) || (last > 1 && !reader.collapses(read[0]))) return nullptr;
  const auto matrix = [](pybind11::handle t) { return t.is_none() ? Matrix() : reader.matrix(t.ptr()); };
  if (!of_codes) static_cast<Matrix&>(base) = matrix(w);
  const bool done = forward_small(reader.matrix(x.ptr(), true), base, matrix(a), matrix(b),
                                  reader.matrix(y.ptr(), true), Matrix(), matrix(bias), matrix(gain), Matrix(),
                                  float(scale), Dropout(), threads);
  return done ? y.release().ptr() : nullptr;
}

}  // namespace lk
