// What a plain call of PEFT's linear layer computes with, read from the modules' dictionaries: some
// 20 ns a look-up. integrations/peft/state.py is the truth; what is not plain here, it decides.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace lk {

class PlainLayer {
 public:
  // the classes that a plain layer is of and consists of, for the life of the process
  void set(const pybind11::dict& classes) {
    const auto of = [&](const char* name) { return pybind11::object(classes[name]).release().ptr(); };
    fused_ = of("FusedLinear"), linear_ = of("Linear"), identity_ = of("Identity"), dropout_ = of("Dropout");
    variant_ = of("DoraLinearVariant"), dora_ = of("DoraLinearLayer");
  }

  // (w, bias, a, b, scale, dropout, magnitude) as `read_state` gives it, of a call with x that
  // `input_refusal` takes; null, and no error, where anything is not plain. A new reference.
  PyObject* read(PyObject* layer, PyObject* x) const {
    const NoCollector none;
    if (!fused_ || !is(layer, fused_) || !is_tensor(x)) return nullptr;
    PyObject *const held = attributes(layer), *const merged = item(held, names_.merged_adapters);
    if (item(held, names_.disabled) != Py_False || item(held, names_.fan_in_fan_out) != Py_False) return nullptr;
    if (!merged || !PyList_CheckExact(merged) || PyList_GET_SIZE(merged)) return nullptr;
    PyObject* name = item(held, names_.active);
    if (name && PyList_CheckExact(name) && PyList_GET_SIZE(name) == 1) name = PyList_GET_ITEM(name, 0);
    if (!name || !PyUnicode_CheckExact(name)) return nullptr;

    PyObject *const children = item(held, names_.modules), *const base = item(children, names_.base_layer);
    PyObject *const lora_a = child(children, names_.lora_a, name), *const lora_b = child(children, names_.lora_b, name);
    if (!is_bare(base, linear_) || !is_bare(lora_a, linear_) || !is_bare(lora_b, linear_)) return nullptr;
    PyObject *const w = parameter(base, names_.weight), *const bias = parameter(base, names_.bias);
    PyObject *const a = parameter(lora_a, names_.weight), *const b = parameter(lora_b, names_.weight);
    if (parameter(lora_a, names_.bias) != Py_None || parameter(lora_b, names_.bias) != Py_None) return nullptr;
    if (!bias || (bias != Py_None && !is_tensor(bias))) return nullptr;
    if (!is_tensor(w) || !is_tensor(a) || !is_tensor(b)) return nullptr;

    PyObject *magnitude = Py_None, *const variants = item(held, names_.variants);
    if (!variants) return nullptr;
    if (PyObject* const variant = item(variants, name); variant && variant != Py_None) {
      PyObject* const dora = child(children, names_.magnitudes, name);
      if (!is(variant, variant_) || !is_bare(dora, dora_)) return nullptr;
      magnitude = parameter(dora, names_.weight);
      if (!is_tensor(magnitude)) return nullptr;
    }
    PyObject* const scale = item(item(held, names_.scaling), name);
    PyObject* const dropout = probability(child(children, names_.lora_dropout, name), held, magnitude != Py_None);
    if (!scale || !dropout || !fit(x, w, a, b, item(held, names_.casts) == Py_True)) return nullptr;

    PyObject* const state = PyTuple_Pack(7, w, bias, a, b, scale, dropout, magnitude);
    // last, since a mode of torch's may run Python there: the tuple holds what is borrowed
    if (state && is_frozen(w)) return state;
    Py_XDECREF(state);
    PyErr_Clear();
    return nullptr;
  }

 private:
  static PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }
  struct Names {
    PyObject *disabled = intern("_disable_adapters"), *merged_adapters = intern("merged_adapters");
    PyObject *active = intern("_active_adapter"), *fan_in_fan_out = intern("fan_in_fan_out");
    PyObject *casts = intern("cast_input_dtype_enabled"), *scaling = intern("scaling");
    PyObject *variants = intern("lora_variant"), *base_layer = intern("base_layer"), *lora_a = intern("lora_A");
    PyObject *lora_b = intern("lora_B"), *lora_dropout = intern("lora_dropout");
    PyObject *magnitudes = intern("lora_magnitude_vector"), *modules = intern("_modules");
    PyObject *parameters = intern("_parameters"), *weight = intern("weight"), *bias = intern("bias");
    PyObject *training = intern("training"), *p = intern("p"), *inplace = intern("inplace");
    PyObject *forward = intern("forward"), *requires_grad = intern("requires_grad");
    PyObject* hooks[4] = {intern("_forward_hooks"), intern("_forward_pre_hooks"), intern("_backward_hooks"),
                          intern("_backward_pre_hooks")};
  };

  // without the collector, which may run Python whenever something is allocated
  struct NoCollector {
    const int before = PyGC_Disable();
    ~NoCollector() {
      if (before) PyGC_Enable();
    }
  };

  // These give borrowed references, null where there is nothing. Keys are strings, so that no
  // look-up runs Python, which could drop what is borrowed.
  static PyObject* item(PyObject* dict, PyObject* key) {
    if (!dict || !PyDict_Check(dict)) return nullptr;
    PyObject* const found = PyDict_GetItemWithError(dict, key);
    if (!found) PyErr_Clear();
    return found;
  }
  static PyObject* attributes(PyObject* module) {
    PyObject* const held = PyObject_GenericGetDict(module, nullptr);
    if (!held) PyErr_Clear();
    Py_XDECREF(held);  // the module has it
    return held;
  }
  PyObject* child(PyObject* children, PyObject* group, PyObject* name) const {
    PyObject* const modules = item(children, group);
    return modules ? item(item(attributes(modules), names_.modules), name) : nullptr;
  }
  PyObject* parameter(PyObject* module, PyObject* name) const {
    return item(item(attributes(module), names_.parameters), name);
  }

  static bool is(PyObject* object, PyObject* cls) {
    return object && reinterpret_cast<PyObject*>(Py_TYPE(object)) == cls;
  }
  static bool is_tensor(PyObject* t) { return t && reader.is_plain(t); }

  // a module of this class whose call runs the class's forward alone
  bool is_bare(PyObject* module, PyObject* cls) const {
    if (!is(module, cls)) return false;
    PyObject* const held = attributes(module);
    for (PyObject* name : names_.hooks) {
      PyObject* const hooks = item(held, name);
      if (!hooks || PyDict_GET_SIZE(hooks)) return false;
    }
    return !item(held, names_.forward);
  }

  // what lora_dropout drops with; only where both train, if the adapter is DoRA's
  PyObject* probability(PyObject* module, PyObject* layer, bool dora) const {
    static PyObject* const none = PyFloat_FromDouble(0);
    if (is_bare(module, identity_)) return none;
    if (!is_bare(module, dropout_)) return nullptr;
    PyObject *const held = attributes(module), *const p = item(held, names_.p);
    PyObject *const trains = item(held, names_.training), *const layer_trains = item(layer, names_.training);
    if (item(held, names_.inplace) != Py_False || !p || !PyFloat_CheckExact(p)) return nullptr;
    for (PyObject* flag : {trains, layer_trains}) {
      if (flag != Py_True && flag != Py_False) return nullptr;
    }
    if (trains == Py_False || (dora && layer_trains == Py_False)) return none;
    return PyFloat_AS_DOUBLE(p) < 1 ? p : nullptr;
  }

  // whether all are in memory, x on the CPU, and of dtypes that the ops take together
  static bool fit(PyObject* x, PyObject* w, PyObject* a, PyObject* b, bool casts) {
    Tensor t[4];
    PyObject* const given[4] = {x, w, a, b};
    for (int i = 0; i < 4; i++) {
      if (!reader.try_read(given[i], &t[i])) return false;
      const DataType& type = t[i].type;
      if (!readable(type) && !(type.code == FLOAT && type.bits == 64)) return false;
    }
    const auto alike = [&](int i, int j) {
      return t[i].type.code == t[j].type.code && t[i].type.bits == t[j].type.bits;
    };
    return t[0].device.type == CPU && alike(0, 1) && alike(2, 3) && (casts || alike(0, 2));
  }
  bool is_frozen(PyObject* w) const {
    PyObject* const learns = PyObject_GetAttr(w, names_.requires_grad);
    Py_XDECREF(learns);  // True and False live for ever
    return learns == Py_False;
  }

  Names names_;
  PyObject *fused_ = nullptr, *linear_ = nullptr, *identity_ = nullptr, *dropout_ = nullptr;
  PyObject *variant_ = nullptr, *dora_ = nullptr;
};

}  // namespace lk
