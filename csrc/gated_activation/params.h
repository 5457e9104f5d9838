// The question that the activation between the two products of experts answers.
#pragma once
#include "../common/types.h"

namespace lk {

// y = f(gate) ⊙ up of x = [gate | up], f(g) = g σ(v(g)): v(g) = g is SiLU, and GELU by tanh has
// v(g) = √(8/π) (g + 0.044715 g³). With dy instead dx, the gradient of x.
struct GatedActivation {
  View x, y;    // [tokens, 2n] [tokens, n], by rows, of one type as the others; y has no data with dy
  View dy, dx;  // [tokens, n] [tokens, 2n]; or no data
  bool tanh;
  int64_t tokens, n;
  int threads;
};

}  // namespace lk
