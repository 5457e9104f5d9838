// y = gain ⊙ (w_scale ⊙ (x Wᵀ) + scale · x Aᵀ Bᵀ) + bias for at most 64 tokens in one launch
// (small.cuh), with W in 16 bits, or int8 with a scale for each row.
#include "../common/kernels.h"
#include "small.cuh"

namespace lk {

template <typename W, typename T, int TOKENS, int STAGES>
__device__ void lora_linear_small_of(const LoRALinearSmall& p) {
  const auto sum_part = [&](float (&sums)[TOKENS / 8][4], char* memory, bool is_a, int64_t row, int64_t begin,
                            int64_t end) {
    if constexpr (std::is_same<W, T>::value) {
      const T* const rows = static_cast<const T*>(is_a ? p.a : p.w);
      mainloop<T, T, TOKENS, STAGES>(sums, memory, rows, is_a ? p.a_row : p.w_row, row, is_a ? p.r : p.n, p, begin,
                                     end);
    } else if (is_a) {
      mainloop<T, T, TOKENS, STAGES>(sums, memory, static_cast<const T*>(p.a), p.a_row, row, p.r, p, begin, end);
    } else {
      mainloop<W, T, TOKENS, STAGES>(sums, memory, static_cast<const W*>(p.w), p.w_row, row, p.n, p, begin, end);
    }
  };
  lora_linear_small<sizeof(W) == 1, T, TOKENS>(p, sum_part);
}

}  // namespace lk

// what a stage holds is 8 KiB of W and the same columns of x
#define LK_SMALL(name, W, T, TOKENS, STAGES)                                                                         \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearSmall p) { \
    lk::lora_linear_small_of<W, T, TOKENS, STAGES>(p);                                                               \
  }
LK_SMALL(lora_linear_small_bf16_16, __nv_bfloat16, __nv_bfloat16, 16, 6)
LK_SMALL(lora_linear_small_bf16_64, __nv_bfloat16, __nv_bfloat16, 64, 4)
LK_SMALL(lora_linear_small_f16_16, __half, __half, 16, 6)
LK_SMALL(lora_linear_small_f16_64, __half, __half, 64, 4)
LK_SMALL(lora_linear_small_i8_bf16_16, int8_t, __nv_bfloat16, 16, 5)
LK_SMALL(lora_linear_small_i8_bf16_64, int8_t, __nv_bfloat16, 64, 3)
LK_SMALL(lora_linear_small_i8_f16_16, int8_t, __half, 16, 5)
LK_SMALL(lora_linear_small_i8_f16_64, int8_t, __half, 64, 3)

LK_TABLE(lora_linear_small, LoRALinearSmall, LK_KERNEL(lora_linear_small_bf16_16), LK_KERNEL(lora_linear_small_bf16_64),
         LK_KERNEL(lora_linear_small_f16_16), LK_KERNEL(lora_linear_small_f16_64),
         LK_KERNEL(lora_linear_small_i8_bf16_16), LK_KERNEL(lora_linear_small_i8_bf16_64),
         LK_KERNEL(lora_linear_small_i8_f16_16), LK_KERNEL(lora_linear_small_i8_f16_64))
