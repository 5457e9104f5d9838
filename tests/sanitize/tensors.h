// Operands of the kernels under a sanitizer, each in heap memory of exactly its own size.
#pragma once
#define LK_LEVEL driver

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/common/vec.h"
#if defined(LK_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

namespace lk::sanitize {

// SplitMix64
struct Numbers {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  double real() { return double(next() >> 11) * 0x1p-52 - 1; }  // -1 to 1
};

// The bug that operands have on purpose: the one with this number, counted from 0 in the order in
// which they are made, lacks its last element. None if negative.
struct Plant {
  int operand = -1;
  int made = 0;
  bool next() { return made++ == operand; }
};
inline Plant plant;

// the heap's own guards lie right behind the last byte
class Heap {
 public:
  explicit Heap(int64_t bytes) : at_(static_cast<char*>(std::malloc(size_t(bytes)))) {}
  ~Heap() { std::free(at_); }
  Heap(const Heap&) = delete;
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(at_);
  }

 private:
  char* at_;
};

// An array without gaps. `read`: whether the kernel reads its last element, else it is never planted.
template <typename T>
class Table {
 public:
  explicit Table(const std::vector<T>& of, bool read = true) : short_(read && plant.next()), heap_(bytes(of)) {
    std::memcpy(heap_.template as<char>(), of.data(), bytes(of));
  }
  T* data() const { return heap_.template as<T>(); }

 private:
  int64_t bytes(const std::vector<T>& of) const { return (int64_t(of.size()) - short_) * int64_t(sizeof(T)); }
  bool short_;
  Heap heap_;
};

// by rows without gaps, by rows with gaps, by columns with gaps
enum class Layout { ROWS, GAPS, COLUMNS };

// [rows, cols] of a storage type; gaps are poisoned
class Tensor {
 public:
  // random numbers between ± size
  Tensor(Numbers& numbers, DType type, int64_t rows, int64_t cols, Layout layout = Layout::ROWS, double size = 1)
      : Tensor(type, rows, cols, layout, [&] { return size * numbers.real(); }) {}
  // an output: NaN everywhere
  Tensor(DType type, int64_t rows, int64_t cols, Layout layout = Layout::ROWS)
      : Tensor(type, rows, cols, layout, [] { return std::numeric_limits<double>::quiet_NaN(); }) {}
  // of numbers that are known
  Tensor(const std::vector<double>& of, int64_t rows, int64_t cols, Layout layout = Layout::ROWS)
      : Tensor(DType::f32, rows, cols, layout, [&, i = size_t(0)]() mutable { return of[i++]; }) {}

  operator View() const { return {heap_.as<char>(), row_, col_, type_}; }
  float* floats() const { return heap_.as<float>(); }
  DType type() const { return type_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  double at(int64_t i, int64_t j) const {
    const int64_t place = i * row_ + j * col_;
    switch (type_) {
      case DType::f32: return heap_.as<float>()[place];
      case DType::bf16: return driver::to_float(heap_.as<bf16>()[place]);
      case DType::f16: return driver::to_float(heap_.as<f16>()[place]);
    }
    return 0;
  }
  // every element, by rows
  std::vector<double> values() const {
    std::vector<double> all;
    all.reserve(size_t(rows_ * cols_));
    for (int64_t i = 0; i < rows_; i++) {
      for (int64_t j = 0; j < cols_; j++) all.push_back(at(i, j));
    }
    return all;
  }

 private:
  template <typename F>
  Tensor(DType type, int64_t rows, int64_t cols, Layout layout, F&& number)
      : type_(type),
        rows_(rows),
        cols_(cols),
        size_(type == DType::f32 ? 4 : 2),
        stride_((layout == Layout::COLUMNS ? rows : cols) + (layout == Layout::ROWS ? 0 : 11)),
        row_(layout == Layout::COLUMNS ? 1 : stride_),
        col_(layout == Layout::COLUMNS ? stride_ : 1),
        lines_(layout == Layout::COLUMNS ? cols : rows),
        line_(layout == Layout::COLUMNS ? rows : cols),
        elements_((lines_ - 1) * stride_ + line_ - plant.next()),
        heap_(elements_ * size_) {
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < cols; j++) set(i * row_ + j * col_, float(number()));
    }
#if defined(LK_ADDRESS)
    for (int64_t i = 0; i + 1 < lines_; i++) {
      __asan_poison_memory_region(heap_.as<char>() + (i * stride_ + line_) * size_, size_t(stride_ - line_) * size_);
    }
#endif
  }
  void set(int64_t place, float value) {
    if (place >= elements_) return;
    switch (type_) {
      case DType::f32: return driver::store_scalar(heap_.as<float>() + place, value);
      case DType::bf16: return driver::store_scalar(heap_.as<bf16>() + place, value);
      case DType::f16: return driver::store_scalar(heap_.as<f16>() + place, value);
    }
  }

  DType type_;
  int64_t rows_, cols_, size_, stride_, row_, col_;
  int64_t lines_, line_;  // runs of memory and their length
  int64_t elements_;
  Heap heap_;
};

// the dropout mask of lora_kernels/ops/dropout.py for one element
inline double mask_of(const Dropout& d, int64_t row, int64_t column) {
  if (!d.active()) return 1;
  uint32_t c[4] = {uint32_t(column / 4), uint32_t(row), uint32_t(row >> 32), 0};
  uint32_t k[2] = {uint32_t(d.seed), uint32_t(d.seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k[1],
                              uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return c[column % 4] >= d.threshold ? d.keep : 0;
}

}  // namespace lk::sanitize
