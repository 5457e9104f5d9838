// One call of a CPU kernel: its shapes agree, and the memory that it reads and writes outlives it,
// whatever other threads do to the tensors meanwhile.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "team.h"
#include "weight.h"

namespace lk {

// `tensor.data = other`, module.to() and merging replace the storage of a tensor in place: a
// reference to the tensor does not keep its memory. So a call holds the storages, and looks at the
// tensors again once it does; or, where its work is so little that nobody would gain by running
// beside it, it holds the interpreter's lock, without which no thread replaces a storage.
class Call {
 public:
  static constexpr double LEAST = 1 << 20;  // multiplications that are worth 150 ns a tensor

  // `work`: multiplications. `threads` becomes what the call is to take. `matrices`: one at least.
  Call(const char* kernel, double work, int& threads, std::initializer_list<Matrix*> matrices)
      : kernel_(kernel), work_(work) {
    if (threads > 1) {
      kind_ = reinterpret_cast<uintptr_t>(kernel) * 16 + uint64_t((*matrices.begin())->type);
      is_timed_ = !Team::is_little(work);
      threads = team().size(kind_, work, threads, Team::now());
    }
    threads_ = threads;
    if (work < LEAST && reader.fast()) return;
    unlocks_ = true;
    for (Matrix* m : matrices) hold(*m);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // W, after the other matrices.
  void hold_weight(Weight& w) {
    if (!unlocks_) return;
    if (!w.quantised()) return hold(w);
    for (;;) {
      const int before = count_;
      for (int i = 0; i < w.count; i++) keep(storage_of(w.sources[i]));
      if (w.same()) return;
      while (count_ > before) held_[--count_] = pybind11::object();
    }
  }

  // A further tensor, to be read after this.
  void hold(PyObject* tensor) {
    if (unlocks_) keep(storage_of(tensor));
  }

  // Raises ValueError unless m is [rows, cols], or None. A vector is one row.
  void check(const Matrix& m, int64_t rows, int64_t cols, const char* name) const {
    if (!m.data && !m.tensor) return;
    if (m.rows == rows && m.cols == cols) return;
    throw pybind11::value_error(std::string(kernel_) + ": " + name + " must be [" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "], found [" + std::to_string(m.rows) + ", " +
                                std::to_string(m.cols) + "]");
  }

  // Raises TypeError unless both have one dtype.
  void check_alike(const Matrix& one, const Matrix& other, const char* names) const {
    if (one.type != other.type) throw pybind11::type_error(std::string(kernel_) + ": " + names + " must share a dtype");
  }

  template <typename Kernel>
  void run(Kernel&& kernel) const {
    double begin = 0, end = 0;  // of the kernel alone: the wait for the lock after it is no stall
    const auto timed = [&] {
      if (!is_timed_) return kernel();
      begin = Team::now();
      kernel();
      end = Team::now();
    };
    if (unlocks_) {
      pybind11::gil_scoped_release release;
      timed();
    } else {
      timed();
    }
    if (is_timed_) team().took(kind_, work_, threads_, end - begin, end);
  }

 private:
  // of the process; the interpreter's lock is held where it is read and written
  static Team& team() {
    static Team one;
    return one;
  }
  void hold(Matrix& m) {
    if (!m.tensor) return;
    for (;;) {
      pybind11::object storage = storage_of(m.tensor);
      // a new Python object may have run the collector, and that another thread
      Matrix now = reader.matrix(m.tensor, m.flat);
      if (m.transposed) now.transpose();
      const bool same = now.data == m.data;
      m = now;
      if (same) return keep(std::move(storage));
    }
  }
  static pybind11::object storage_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("untyped_storage");
    PyObject* const found = PyObject_CallMethodNoArgs(tensor, name);
    if (!found) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }
  void keep(pybind11::object storage) {
    if (count_ == MOST) throw std::logic_error("Call: too many tensors");
    held_[count_++] = std::move(storage);
  }

  static constexpr int MOST = 24;
  const char* kernel_;
  double work_;
  uint64_t kind_ = 0;
  int threads_;
  bool is_timed_ = false, unlocks_ = false;
  pybind11::object held_[MOST];
  int count_ = 0;
};

}  // namespace lk
