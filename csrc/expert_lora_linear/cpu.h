#pragma once
#include "../bindings/levels.h"
#include "params.h"

namespace lk {

void expert_product(const Kernels& kernels, const ExpertProduct& p);
void expert_gradients(const Kernels& kernels, const ExpertGradients& g);
void expert_backward_small(const Kernels& kernels, const ExpertBackwardSmall& p);

}  // namespace lk
