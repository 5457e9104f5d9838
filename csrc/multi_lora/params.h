// What multi_lora's CPU kernel is asked. Shapes in brackets; every View may have any row stride.
#pragma once
#include "../common/types.h"

namespace lk {

// to = z + Σ v ((g - 1) ⊙ z + g ⊙ s B A x + c) + bias over the adapters of a token, z = from, or
// from - bias: see ops/multi_lora/op.py. A slot's rank rows are those of its pages in a and b.
struct MultiLora {
  View x, a, b;                                      // [tokens, in] [rows, in] [rows, out]
  View from, to;                                     // [tokens, out] twice; may be one
  View bias;                                         // [out], or no data
  bool holds_bias;                                   // whether `from` has the bias in it
  const int32_t *table, *rank, *flags, *generation;  // [slots, pages] [slots] three times
  // [slots] [rows, out] twice: g and c if flags have bit 0, bit 1, in row flags >> 2
  const float *scale, *gain, *more;
  const int64_t* ids;             // [tokens, k]: generation << 32 | slot, or -1
  const float* weights;           // [tokens, k], or null
  const int64_t *order, *starts;  // [tokens · k] entries by slot, [slots + 1]
  int32_t* error;
  int64_t tokens, k, slots, pages, n_in, n_out;
  int threads;
};

}  // namespace lk
