// W of a call: a matrix, or codes and scales.
#pragma once
#include <memory>

#include "cases.h"

namespace lk::sanitize {

// Rows of a larger W; each part in heap memory of its own.
class Codes {
 public:
  Codes(Case& c, DType type, int64_t rows, int64_t cols)
      : first_(c.among({3, 0, 1, 8})),
        rows_(first_ + rows + (c.fixed ? 0 : int64_t(c.numbers.next() % 2))),
        total_(rows_ * cols) {
    q_.type = type, q_.first = first_, q_.n_in = cols, q_.numbers = total_;
    c.fixed ? choose(c) : draw(c);
    q_.block = c.among({64, 7, 32, 100, cols, total_, 4096}), q_.outer_block = c.among({2, 1, 3, 256});
    const bool nibbles = q_.code == Code::nibbles;
    const double largest[] = {1, 128, 448, 57344}, size = 1 / largest[int(q_.code)];
    fill(c, bytes_, nibbles ? (total_ + 1) / 2 : total_);
    const int beyond = q_.code == Code::e4m3 ? 0x7f : q_.code == Code::e5m2 ? 0x7c : 128;  // NaN and infinity
    for (uint8_t& byte : bytes_) byte &= (byte & 127) >= beyond ? 0x80 : 0xff;
    if (nibbles) fill(c, table_, 16, 1);
    const int64_t blocks = q_.block_rows ? over(rows_, q_.block_rows) * over(cols, q_.block) : over(total_, q_.block);
    if (nested_) {
      fill(c, inner_, blocks), fill(c, outer_table_, 256, 1);
      inner_.back() = 255;
      fill(c, outer_, over(blocks, q_.outer_block), size), fill(c, offset_, 1, size);
    } else if (powers_) {
      fill(c, exponents_, blocks);
      for (uint8_t& e : exponents_) e = uint8_t(127 + std::ilogb(size) - e % 16);
    } else {
      fill(c, scales_, blocks, size);
    }
    if (zeros_wanted_) fill(c, zeros_, blocks, 0.1 / size);  // no difference overflows float16
    q_.codes = put(byte_parts_, bytes_), q_.table = put(parts_, table_), q_.scales = put(parts_, scales_);
    q_.exponents = put(byte_parts_, exponents_), q_.zeros = put(parts_, zeros_);
    q_.inner = put(byte_parts_, inner_), q_.outer_table = put(parts_, outer_table_);
    q_.outer = put(parts_, outer_), q_.offset = put(parts_, offset_);
  }

  const Quantised& quantised() const { return q_; }
  double at(int64_t n, int64_t k) const {
    const int64_t row = first_ + n, i = row * q_.n_in + k;
    const int64_t tile = q_.block_rows ? row / q_.block_rows * over(q_.n_in, q_.block) + k / q_.block : i / q_.block;
    const size_t block = size_t(tile);
    float number = value(i);
    if (zeros_wanted_) number -= zeros_[block];
    if (q_.zero_rounded) number = rounded(number);
    return rounded(number * scale(block));
  }

 private:
  void draw(Case& c) {
    q_.code = Code(c.numbers.next() % 4);
    nested_ = c.coin(), powers_ = !nested_ && c.coin(), zeros_wanted_ = c.coin();
    q_.zero_rounded = zeros_wanted_ && c.coin();
    q_.block_rows = c.coin() ? c.among({1, 3, 128}) : 0;
    if (q_.code == Code::nibbles) q_.order = Order(c.numbers.next() % (total_ % 2 ? 2 : 3));
  }
  // for planted bugs: each part and each order once
  void choose(Case& c) {
    nested_ = c.coin(), powers_ = !nested_ && c.type == DType::f16, zeros_wanted_ = !nested_ && c.type == DType::bf16;
    q_.block_rows = zeros_wanted_ ? 3 : 0;
    if (!nested_ && c.type != DType::f32) q_.code = zeros_wanted_ ? Code::int8 : Code::e4m3;
    else q_.order = !nested_ ? Order::high_first : c.type == DType::f32 ? Order::low_first : Order::halves;
  }
  static int64_t over(int64_t some, int64_t by) { return (some + by - 1) / by; }
  float scale(size_t block) const {
    if (powers_) return float(std::ldexp(1, exponents_[block] - 127));
    if (!nested_) return scales_[block];
    const volatile float product = outer_table_[inner_[block]] * outer_[block / size_t(q_.outer_block)];
    return product + offset_[0];
  }
  float rounded(float number) const {
    bf16 b;
    f16 h;
    switch (q_.type) {
      case DType::bf16: return driver::store_scalar(&b, number), driver::to_float(b);
      case DType::f16: return driver::store_scalar(&h, number), driver::to_float(h);
      default: return number;
    }
  }
  float value(int64_t i) const {
    if (q_.code == Code::nibbles) {
      const bool halves = q_.order == Order::halves, second = halves ? i >= total_ / 2 : i % 2;
      const uint8_t pair = bytes_[size_t(halves ? i % (total_ / 2) : i / 2)];
      return table_[second != (q_.order == Order::low_first) ? pair % 16 : pair / 16];
    }
    const uint8_t byte = bytes_[size_t(i)];
    if (q_.code == Code::int8) return float(int8_t(byte));
    const int bits = q_.code == Code::e4m3 ? 3 : 2, bias = q_.code == Code::e4m3 ? 7 : 15;
    const int exponent = (byte & 127) >> bits, mantissa = byte & ((1 << bits) - 1);
    const int significand = exponent ? (1 << bits) + mantissa : mantissa;
    const float size = std::ldexp(float(significand), std::max(exponent, 1) - bias - bits);
    return byte & 128 ? -size : size;
  }
  static void fill(Case& c, std::vector<uint8_t>& to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to.push_back(uint8_t(c.numbers.next()));
  }
  static void fill(Case& c, std::vector<float>& to, int64_t count, double size) {
    for (int64_t i = 0; i < count; i++) to.push_back(float(size * c.numbers.real()));
  }
  // nothing for a part that is not there
  template <typename T>
  static const T* put(std::vector<std::unique_ptr<Table<T>>>& to, const std::vector<T>& part) {
    if (part.empty()) return nullptr;
    to.push_back(std::make_unique<Table<T>>(part));
    return to.back()->data();
  }

  int64_t first_, rows_, total_;  // row; rows and numbers of the whole
  bool nested_ = false, powers_ = false, zeros_wanted_ = false;
  Quantised q_;
  std::vector<uint8_t> bytes_, exponents_, inner_;
  std::vector<float> table_, scales_, zeros_, outer_table_, outer_, offset_;
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
