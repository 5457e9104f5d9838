#pragma once
#include "../bindings/levels.h"
#include "params.h"

namespace lk {

void expert_product(const Kernels& kernels, const ExpertProduct& p);
void expert_gradients(const Kernels& kernels, const ExpertGradients& p);

}  // namespace lk
