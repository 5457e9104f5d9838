// What the kernels are told of a torch tensor, read without torch's headers: one binary serves
// every torch.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "../common/types.h"

namespace lk {

// Of DLPack 1.x (dlpack.h: DLTensor, DLPackExchangeAPI), which torch gives as
// Tensor.__dlpack_c_exchange_api__ since 2.10: the C function that fills a DLTensor in some 20 ns,
// where the Python attributes take 50 ns each.
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_of)(void* object, Tensor* out);
  void* stream;
};
constexpr int CPU = 1, FLOAT = 2, BFLOAT = 4;  // kDLCPU, kDLFloat, kDLBfloat

inline bool readable(const DataType& t) {
  return (t.code == FLOAT && (t.bits == 32 || t.bits == 16)) || (t.code == BFLOAT && t.bits == 16);
}

// a View with its shape; a vector is one row
struct Matrix : View {
  int64_t rows = 0, cols = 0;
  PyObject* tensor = nullptr;             // which it was read from, borrowed from the caller
  bool transposed = false, flat = false;  // how it was read
  bool by_rows() const { return col == 1 || cols < 2; }
  void transpose() {
    std::swap(row, col);
    std::swap(rows, cols);
    transposed = !transposed;
  }
};

class Reader {
 public:
  // `capsule` is None where torch has no such function; `describe` then gives the same as a tuple
  // of numbers: (address, device type, type code, bits, dimensions, sizes and strides of up to two
  // of them)
  void set(pybind11::object capsule, pybind11::object describe) {
    api_ = capsule.is_none() ? nullptr : capsule.cast<pybind11::capsule>().get_pointer<ExchangeApi>();
    if (api_ && (api_->major != 1 || !api_->tensor_of)) api_ = nullptr;
    describe_ = std::move(describe).release().ptr();  // for the life of the process
  }
  // torch's own classes of tensors
  void set_plain(pybind11::object tensor, pybind11::object parameter) {
    plain_[0] = std::move(tensor).release().ptr(), plain_[1] = std::move(parameter).release().ptr();
  }
  // whether this is a tensor of torch's own, and of no subclass
  bool is_plain(PyObject* object) const {
    PyObject* const cls = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return cls == plain_[0] || cls == plain_[1];
  }
  // What a plain tensor answers to a question without arguments, or has for an attribute: the name is
  // interned.
  static bool asks(PyObject* tensor, PyObject* method) { return is_true(PyObject_CallMethodNoArgs(tensor, method)); }
  static bool has(PyObject* tensor, PyObject* attribute) { return is_true(PyObject_GetAttr(tensor, attribute)); }
  // whether its memory holds the negative of its values
  static bool is_negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    return asks(tensor, name);
  }
  bool fast() const { return api_ != nullptr; }

  Tensor read(PyObject* object, int64_t (&held)[4]) const {
    Tensor tensor{};
    if (api_) {
      if (api_->tensor_of(object, &tensor) != 0) throw pybind11::error_already_set();
      tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
      return tensor;
    }
    const pybind11::tuple found = pybind11::reinterpret_borrow<pybind11::object>(describe_)(pybind11::handle(object));
    tensor.data = PyLong_AsVoidPtr(found[0].ptr());
    tensor.device.type = found[1].cast<int32_t>();
    tensor.type.code = found[2].cast<uint8_t>();
    tensor.type.bits = found[3].cast<uint8_t>();
    tensor.dimensions = found[4].cast<int32_t>();
    for (int i = 0; i < 4; i++) held[i] = found[5 + i].cast<int64_t>();
    tensor.shape = held;
    tensor.strides = held + 2;
    return tensor;
  }

  // without an error, and only where torch has the function
  bool try_read(PyObject* object, Tensor* tensor) const {
    if (api_ && api_->tensor_of(object, tensor) == 0) return in_memory(*tensor);
    PyErr_Clear();
    return false;
  }

  // from one row to the next, where all dimensions but the last count as rows
  static int64_t row_of(const Tensor& t) {
    for (int i = t.dimensions - 2; i > 0; i--) {
      if (t.shape[i] > 1) return t.strides[i];
    }
    return t.strides[0];
  }
  static bool collapses(const Tensor& t) {
    int64_t rows = 1;
    for (int i = t.dimensions - 2; i >= 0; i--) {
      if (t.shape[i] > 1 && t.strides[i] != row_of(t) * rows) return false;
      rows *= t.shape[i];
    }
    return true;
  }
  // `flat`: of more than two dimensions all but the last are rows, which must `collapse`
  Matrix matrix(PyObject* object, bool flat = false) const {
    int64_t held[4];
    const Tensor t = read(object, held);
    const int last = t.dimensions - 1;
    if (t.device.type != CPU || last < 0 || (last > 1 && !(flat && api_ && collapses(t))) || !in_memory(t)) {
      throw pybind11::value_error("the CPU kernels read matrices and vectors in the memory of the CPU");
    }
    Matrix m;
    m.tensor = object;
    m.flat = flat;
    m.data = t.data;
    m.type = type_of(t);
    m.rows = 1;
    for (int i = 0; i < last; i++) m.rows *= t.shape[i];
    m.row = last ? row_of(t) : 0;
    m.cols = t.shape[last];
    m.col = t.strides[last];
    return m;
  }

 private:
  static bool is_true(PyObject* answer) {
    if (!answer) throw pybind11::error_already_set();
    Py_DECREF(answer);  // True and False live for ever
    return answer != Py_False;
  }
  // a wrapper of other tensors, or torch's tensor of zeros, has elements and no memory
  static bool in_memory(const Tensor& t) {
    int64_t elements = 1;
    for (int i = 0; i < t.dimensions; i++) elements *= t.shape[i];
    return t.data != nullptr || elements == 0;
  }
  static DType type_of(const Tensor& t) {
    if (!readable(t.type)) throw pybind11::type_error("the CPU kernels read float32, bfloat16 and float16");
    return t.type.code == BFLOAT ? DType::bf16 : t.type.bits == 32 ? DType::f32 : DType::f16;
  }

  const ExchangeApi* api_ = nullptr;
  PyObject *describe_ = nullptr, *plain_[2] = {};
};
inline Reader reader;

}  // namespace lk

namespace pybind11::detail {

// a tensor, a tensor to be read as its transpose in a tuple of one, or None
template <>
struct type_caster<lk::Matrix> {
  PYBIND11_TYPE_CASTER(lk::Matrix, const_name("Matrix"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_CheckExact(source.ptr())) {
      value = lk::reader.matrix(source.ptr());
      return true;
    }
    if (PyTuple_GET_SIZE(source.ptr()) != 1) return false;
    value = lk::reader.matrix(PyTuple_GET_ITEM(source.ptr(), 0));
    value.transpose();
    return true;
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
