// A weight that is kept as codes and scales: W[n, k] = (value(code) - zero) · scale, the product in
// float32, rounded once to `type`.
#pragma once
#include "../common/types.h"

namespace lk {

enum class Code : int64_t {
  nibbles = 0,  // half a byte, a place in `table`
  int8 = 1,
  e4m3 = 2,  // float8_e4m3fn
  e5m2 = 3,  // float8_e5m2
};

// where the first and the second of two numbers lie
enum class Order : int64_t {
  high_first = 0,  // in the high and the low half of one byte
  low_first = 1,
  halves = 2,  // number i of the first half of all in the high half of byte i; the others in the low halves
};

// Without `block_rows` numbers count row by row, across the ends of rows, and number i has the scale
// of block i / block. With it blocks are [block_rows, block], row by row of W, cut off at its edges
// and, where `expert_rows` are those of one of many matrices, at the end of each.
struct Quantised {
  Code code = Code::nibbles;
  DType type = DType::f32;
  const uint8_t* codes = nullptr;
  int64_t first = 0;   // row of the whole that is this one's first
  int64_t column = 0;  // of the whole that is this one's first
  int64_t n_in = 0, block = 1, block_rows = 0, expert_rows = 0;
  int64_t numbers = 0;  // of the whole
  Order order = Order::high_first;
  const float* scales = nullptr;  // of a block; or nested: outer_table[inner] · outer[block / outer_block] + offset
  const uint8_t* exponents = nullptr;  // or 2^(exponent - 127)
  const uint8_t* inner = nullptr;
  const float *outer_table = nullptr, *outer = nullptr, *offset = nullptr;
  int64_t outer_block = 1;
  const float* table = nullptr;  // 16 values
  const float* zeros = nullptr;  // of a block
  bool zero_rounded = false;     // the difference is rounded to `type`, too
};

// to = W [rows, in]
struct Dequantise {
  Quantised w;
  View to;  // of the type of w or float32
  int64_t rows;
  int threads;
};

}  // namespace lk
