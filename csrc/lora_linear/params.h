// The questions that lora_linear's CPU kernels answer. Shapes in brackets; every View may have any
// row stride.
#pragma once
#include "../common/types.h"
#include "../quantised/params.h"

namespace lk {

// y = gain ⊙ z + bias with z = x Wᵀ + scale · drop(x) Aᵀ Bᵀ, W read once; h = scale · drop(x) Aᵀ.
// For few tokens: bound by the bytes of W.
struct ForwardSmall {
  View x, w, a, b;  // [tokens, in] [out, in] [rank, in] [out, rank]
  View y;           // [tokens, out], of the type of w or float32
  View z;           // as y, or no data
  View bias, gain;  // [out], or no data
  float* h;         // [tokens, rank], or null
  float scale;
  Dropout dropout;
  int64_t tokens, n_in, n_out, rank;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

// The gradients of ForwardSmall, W read once: with dz = dy ⊙ gain and p = scale · dz B,
// dx = dz W + mask ⊙ (p A), dA = pᵀ drop(x), dB = dzᵀ h. For few tokens.
struct BackwardSmall {
  View dy, x, w, a, b, gain;  // [tokens, out] [tokens, in] [out, in] by rows, of one type; A, B any strides
  View dx, da, db;            // those with data are wanted; dx by rows, A's and B's with any strides
  const float* h;             // [tokens, rank]
  float scale;
  Dropout dropout;
  int64_t tokens, n_in, n_out, rank;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

// y = x Wᵀ, by rows all, y in float32. For some dozens of tokens, which a vendor's GEMM takes
// longer for.
struct BaseProduct {
  View x, w, y;  // [tokens, in] [out, in] [tokens, out]
  int64_t tokens, n_in, n_out;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

// h = scale · drop(x) (a ⊙ gain)ᵀ: [tokens, rank]
struct Shrink {
  View x, a, gain;  // [tokens, in] [rank, in] (any strides) [in] or no data
  float* h;
  float scale;
  Dropout dropout;
  int64_t tokens, n_in, rank;
  int threads;
};

// to = gain ⊙ (from + mask ⊙ (h b)) + bias, or with mask_from gain ⊙ mask ⊙ (from + h b) + bias
struct Expand {
  View from, to;    // [tokens, out], may be one; from is float32, or of the type of to, or has no data
  View b;           // [rank, out], any strides
  View gain, bias;  // [out], or no data
  const float* h;   // [tokens, rank]
  Dropout dropout;
  bool mask_from;
  int64_t tokens, n_out, rank;
  int threads;
};

// d = (pᵀ drop(x)) ⊙ gain: [rank, in]
struct Outer {
  View x, d, gain;  // [tokens, in] [rank, in] (any strides) [in] or no data
  const float* p;   // [tokens, rank]
  Dropout dropout;
  int64_t tokens, n_in, rank;
  int threads;
  const Quantised* packed = nullptr;  // x, in the place of its numbers; without dropout
};

// sums[n] = Σ over tokens of u[t, n] · v[t, n], or of u[t, n] where v has no data; v has the type
// of u
struct ColumnSums {
  View u, v;
  float* sums;
  int64_t tokens, n_out;
  int threads;
};

// From so many ranks on, bf16 products by pairs take h and p rounded to bf16, as y and the gradients
// are after them: two roundings, 1.41 times the error of one where the adapter dominates.
constexpr int64_t MANY_RANKS = 48;

// y = gain ⊙ z + bias with z = x Wᵀ + h Bᵀ; or back, y = (x ⊙ gain) W + mask ⊙ (h Bᵀ). W is bf16,
// by rows; x is too, or float32 with any strides; y and z are bf16 or float32, both alike. With a,
// h = scale · x Aᵀ is computed first, back scale · (x ⊙ gain) Aᵀ; else it is read.
struct Tiles {
  // [tokens, in] [out, in], back [in, out]; [rank, in] or no data [out, rank] (any strides)
  View x, w, a, b;
  View y, z;        // [tokens, out] twice; z may have no data
  View bias, gain;  // [out], back [in]; or no data
  float* h;         // [tokens, rank]
  float scale;
  Dropout dropout;
  bool back;
  int64_t tokens, n_in, n_out, rank;
  int threads;
  const Quantised* packed = nullptr;  // W, in the place of the numbers of w
};

}  // namespace lk
