// A function of Python's without the cost of an argument's conversion: objects in, an object out.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>

namespace lk {

// `F` takes borrowed arguments, COUNT or if that is 0 any number, and gives a new reference, or null
// for None; it may throw.
template <PyObject* (*F)(PyObject* const*, Py_ssize_t), Py_ssize_t COUNT>
PyObject* fast_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (COUNT && count != COUNT)
    return PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, found %zd", COUNT, count);
  try {
    if (PyObject* const found = F(given, count)) return found;
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*F)(PyObject* const*, Py_ssize_t), Py_ssize_t COUNT>
void add_function(pybind11::module_& module, const char* name, const char* says) {
  static PyMethodDef definition[] = {{}, {}};
  definition[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast_call<F, COUNT>)),
                   METH_FASTCALL, says};
  if (PyModule_AddFunctions(module.ptr(), definition) != 0) throw pybind11::error_already_set();
}

}  // namespace lk
