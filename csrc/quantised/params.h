// A weight that is kept as codes and scales: W[n, k] = value(code) · scale, the product in float32,
// rounded once to `type`.
#pragma once
#include "../common/types.h"

namespace lk {

enum class Code : int64_t {
  nibbles = 0,  // two numbers in a byte, that in the high half first; each a place in `table`
  int8 = 1,
  e4m3 = 2,  // float8_e4m3fn
};

// Numbers count row by row, across the ends of rows: number i has the scale of block i / block.
struct Quantised {
  Code code = Code::nibbles;
  DType type = DType::f32;
  const uint8_t* codes = nullptr;
  int64_t first = 0;  // row of the whole that is this one's first
  int64_t n_in = 0, block = 1;
  const float* scales = nullptr;  // of a block; or nested: outer_table[inner] · outer[block / outer_block] + offset
  const uint8_t* inner = nullptr;
  const float *outer_table = nullptr, *outer = nullptr, *offset = nullptr;
  int64_t outer_block = 1;
  const float* table = nullptr;  // 16 values
};

// to = W [rows, in]
struct Dequantise {
  Quantised w;
  View to;  // of the type of w or float32
  int64_t rows;
  int threads;
};

}  // namespace lk
