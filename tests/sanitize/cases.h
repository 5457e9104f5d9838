// One call of a kernel with drawn operands, and its results against double sums.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <optional>

#include "../../csrc/bindings/levels.h"
#include "tensors.h"

namespace lk::sanitize {

struct Shape {
  int64_t tokens, n_in, n_out, rank;
};

struct Case {
  const Kernels* level;
  std::string kernel;
  Shape shape;
  DType type;
  int threads;
  Numbers numbers;
  // what every coin shows, for planted bugs; drawn if there is none
  std::optional<bool> fixed;
  bool planted;  // ends the process after the kernel's call
  bool codes;    // W is quantised

  bool coin() { return fixed ? *fixed : numbers.next() >> 63; }
  // the first for planted bugs
  int64_t among(const std::vector<int64_t>& all) { return fixed ? all[0] : all[numbers.next() % all.size()]; }
  DType any_type() { return fixed ? type : DType(numbers.next() % 3); }
  Layout by_rows() { return coin() ? Layout::GAPS : Layout::ROWS; }
  Layout any_layout() { return coin() ? Layout::COLUMNS : by_rows(); }
  float scale() { return float(1.5 + numbers.real()); }
  Dropout dropout() {
    if (!coin()) return {};
    return {numbers.next(), uint32_t(0.25 * 0x1p32), float(1 / 0.75)};
  }
  // [1, n], or none
  std::optional<Tensor> vector(int64_t n) {
    if (!coin()) return {};
    return std::optional<Tensor>(std::in_place, numbers, any_type(), 1, n);
  }

  template <typename F>
  void run(F&& kernel_call) const {
    kernel_call();
    if (planted) _exit(0);
  }

  // fails unless out[i, j] is want(i, j) up to the rounding of its type and of float32 sums; NaN is
  // what an output has before
  template <typename F>
  void expect(const Tensor& out, const char* name, F&& want) const {
    expect(out, name, out.type(), want);
  }
  // the same up to that of another type, which an operand was rounded to
  template <typename F>
  void expect(const Tensor& out, const char* name, DType type, F&& want) const {
    std::vector<double> wanted;
    double size = 1;
    for (int64_t i = 0; i < out.rows(); i++) {
      for (int64_t j = 0; j < out.cols(); j++) {
        wanted.push_back(want(i, j));
        size = std::max(size, std::abs(wanted.back()));
      }
    }
    const double bound = size * (type == DType::f32 ? 1e-3 : type == DType::f16 ? 4e-3 : 1.6e-2);
    for (int64_t i = 0; i < out.rows(); i++) {
      for (int64_t j = 0; j < out.cols(); j++) {
        const double found = out.at(i, j), right = wanted[size_t(i * out.cols() + j)];
        if (std::abs(found - right) <= bound || (std::isnan(found) && std::isnan(right))) continue;
        throw std::runtime_error(said() + ": " + name + "[" + std::to_string(i) + ", " + std::to_string(j) +
                                 "]: wanted " + std::to_string(right) + ", found " + std::to_string(found));
      }
    }
  }
  std::string said() const {
    return kernel + (codes ? " of codes" : "") + " of " + level->level + ", tokens " + std::to_string(shape.tokens) +
           ", in " + std::to_string(shape.n_in) + ", out " + std::to_string(shape.n_out) + ", rank " +
           std::to_string(shape.rank) + ", dtype " + std::to_string(int(type)) + ", threads " + std::to_string(threads);
  }
};

inline View view_of(const std::optional<Tensor>& tensor) { return tensor ? View(*tensor) : View{}; }
inline double value_of(const std::optional<Tensor>& tensor, int64_t i, double otherwise) {
  return tensor ? tensor->at(0, i) : otherwise;
}

// left [m, k] · right [n, k]ᵀ as [m, n]
inline std::vector<double> product(const std::vector<double>& left, const std::vector<double>& right, int64_t k) {
  const int64_t m = int64_t(left.size()) / k, n = int64_t(right.size()) / k;
  std::vector<double> out(size_t(m * n));
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      double sum = 0;
      for (int64_t l = 0; l < k; l++) sum += left[size_t(i * k + l)] * right[size_t(j * k + l)];
      out[size_t(i * n + j)] = sum;
    }
  }
  return out;
}

// [rows, columns] as [columns, rows]
inline std::vector<double> transposed(const std::vector<double>& of, int64_t columns) {
  const size_t width = size_t(columns), rows = of.size() / width;
  std::vector<double> out(of.size());
  for (size_t i = 0; i < of.size(); i++) out[i % width * rows + i / width] = of[i];
  return out;
}

struct KernelCase {
  const char* name;
  void (*call)(Case&);
  bool codes = false;    // of a quantised W
  bool experts = false;  // calls kernels of the level, and is itself the same for all
};
extern const std::vector<KernelCase> cases;
void multi_lora_case(Case& c);
void tiles_case(Case& c);
void expert_product_case(Case& c);
void expert_gradients_case(Case& c);
void expert_backward_small_case(Case& c);
void expert_norm_case(Case& c);

}  // namespace lk::sanitize
