// W of a call: a matrix, or codes and scales.
#pragma once
#include <memory>

#include "cases.h"

namespace lk::sanitize {

// Rows of a larger W; each part in heap memory of its own.
class Codes {
 public:
  Codes(Case& c, DType type, int64_t rows, int64_t cols)
      : nested_(c.coin()),
        first_(c.among({3, 0, 1, 8})),
        total_((first_ + rows + (c.fixed ? 0 : int64_t(c.numbers.next() % 2))) * cols) {
    // planted bugs: nibbles at every coin and once each of the others
    const bool nibbles = nested_ || c.type == DType::f32;
    q_.code = !c.fixed                ? Code(c.numbers.next() % 3)
              : nibbles               ? Code::nibbles
              : c.type == DType::bf16 ? Code::int8
                                      : Code::e4m3;
    q_.type = type, q_.first = first_, q_.n_in = cols;
    q_.block = c.among({64, 7, 32, 100, cols, total_, 4096}), q_.outer_block = c.among({2, 1, 3, 256});
    const int64_t blocks = (total_ + q_.block - 1) / q_.block;
    const double size = q_.code == Code::nibbles ? 1 : q_.code == Code::int8 ? 1.0 / 128 : 1.0 / 448;
    draw(c, bytes_, q_.code == Code::nibbles ? (total_ + 1) / 2 : total_);
    for (uint8_t& byte : bytes_) byte ^= q_.code == Code::e4m3 && (byte & 127) == 127;  // no NaN
    if (q_.code == Code::nibbles) draw(c, table_, 16, 1);
    if (nested_) {
      draw(c, inner_, blocks), draw(c, outer_table_, 256, 1);
      inner_.back() = 255;
      draw(c, outer_, (blocks + q_.outer_block - 1) / q_.outer_block, size), draw(c, offset_, 1, size);
    } else {
      draw(c, scales_, blocks, size);
    }
    q_.codes = put(byte_parts_, bytes_), q_.table = put(parts_, table_), q_.scales = put(parts_, scales_);
    q_.inner = put(byte_parts_, inner_), q_.outer_table = put(parts_, outer_table_);
    q_.outer = put(parts_, outer_), q_.offset = put(parts_, offset_);
  }

  const Quantised& quantised() const { return q_; }
  double at(int64_t n, int64_t k) const {
    const int64_t i = (first_ + n) * q_.n_in + k, block = i / q_.block;
    float scale;
    if (nested_) {
      const volatile float product = outer_table_[inner_[size_t(block)]] * outer_[size_t(block / q_.outer_block)];
      scale = product + offset_[0];
    } else {
      scale = scales_[size_t(block)];
    }
    const float number = value(i) * scale;
    bf16 b;
    f16 h;
    switch (q_.type) {
      case DType::bf16: return driver::store_scalar(&b, number), driver::to_float(b);
      case DType::f16: return driver::store_scalar(&h, number), driver::to_float(h);
      default: return number;
    }
  }

 private:
  float value(int64_t i) const {
    if (q_.code == Code::nibbles) {
      const uint8_t pair = bytes_[size_t(i / 2)];
      return table_[i % 2 ? pair % 16 : pair / 16];
    }
    const uint8_t byte = bytes_[size_t(i)];
    if (q_.code == Code::int8) return float(int8_t(byte));
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = std::ldexp(float(exponent ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
    return byte & 128 ? -size : size;
  }
  static void draw(Case& c, std::vector<uint8_t>& to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to.push_back(uint8_t(c.numbers.next()));
  }
  static void draw(Case& c, std::vector<float>& to, int64_t count, double size) {
    for (int64_t i = 0; i < count; i++) to.push_back(float(size * c.numbers.real()));
  }
  // nothing for a part that is not there
  template <typename T>
  static const T* put(std::vector<std::unique_ptr<Table<T>>>& to, const std::vector<T>& part) {
    if (part.empty()) return nullptr;
    to.push_back(std::make_unique<Table<T>>(part));
    return to.back()->data();
  }

  bool nested_;
  int64_t first_, total_;  // row; numbers
  Quantised q_;
  std::vector<uint8_t> bytes_, inner_;
  std::vector<float> table_, scales_, outer_table_, outer_, offset_;
  std::vector<std::unique_ptr<Table<uint8_t>>> byte_parts_;
  std::vector<std::unique_ptr<Table<float>>> parts_;
};

class Weight {
 public:
  Weight(Case& c, DType type, int64_t rows, int64_t cols) : type_(type), rows_(rows), cols_(cols) {
    if (c.codes) codes_.emplace(c, type, rows, cols);
    else numbers_.emplace(c.numbers, type, rows, cols, c.by_rows());
  }
  operator View() const {
    if (numbers_) return *numbers_;
    return {const_cast<uint8_t*>(codes_->quantised().codes), 0, 1, type_};
  }
  const Quantised* packed() const { return codes_ ? &codes_->quantised() : nullptr; }
  double at(int64_t n, int64_t k) const { return numbers_ ? numbers_->at(n, k) : codes_->at(n, k); }
  // every element, by rows
  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t n = 0; n < rows_; n++) {
      for (int64_t k = 0; k < cols_; k++) all.push_back(at(n, k));
    }
    return all;
  }

 private:
  DType type_;
  int64_t rows_, cols_;
  std::optional<Tensor> numbers_;
  std::optional<Codes> codes_;
};

}  // namespace lk::sanitize
