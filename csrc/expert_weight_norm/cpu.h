#pragma once
#include "../bindings/levels.h"
#include "params.h"

namespace lk {

void expert_norm(const Kernels& kernels, const ExpertNorm& p);

}  // namespace lk
