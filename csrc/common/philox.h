// The dropout mask of lora_kernels/ops/dropout.py: Philox4x32-10 with key = seed and
// counter = (column / 4, row, row >> 32, 0).
#pragma once
#include "vec.h"

namespace lk::LK_LEVEL {

constexpr int GROUPS = 8;  // counters computed together; 4 columns each

typedef uint64_t wide __attribute__((vector_size(GROUPS * 8)));

// the 64-bit products of the low halves of the lanes and a constant
LK_INLINE wide multiply(wide a, uint32_t b) {
#if LK_VL == 16
  return (wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LK_VL == 8
  __m256i half[2];
  std::memcpy(half, &a, sizeof a);
  half[0] = _mm256_mul_epu32(half[0], _mm256_set1_epi64x(b));
  half[1] = _mm256_mul_epu32(half[1], _mm256_set1_epi64x(b));
  std::memcpy(&a, half, sizeof a);
  return a;
#else
  return (a & 0xffffffffu) * b;
#endif
}

// mask[i] = keep or 0 for columns first..first+count of one row; first is a multiple of 4
static __attribute__((noinline)) void dropout_mask(const Dropout& drop, int64_t row, int64_t first, int64_t count,
                                                   float* mask) {
  const wide low = wide{} + 0xffffffffu;
  wide lane;
  for (int i = 0; i < GROUPS; i++) lane[i] = i;
  for (int64_t done = 0; done < count; done += 4 * GROUPS) {
    // each 64-bit lane holds one 32-bit word, so that a product keeps its high half
    wide c0 = lane + uint64_t((first + done) / 4), c1 = wide{} + (uint64_t(row) & 0xffffffffu);
    wide c2 = wide{} + uint64_t(row) / 0x100000000u, c3 = {};
    uint32_t k0 = uint32_t(drop.seed), k1 = uint32_t(drop.seed >> 32);
    for (int round = 0; round < 10; round++) {
      const wide p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c1 = p1 & low;
      c3 = p0 & low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t word[GROUPS][4];
    for (int i = 0; i < GROUPS; i++) {
      word[i][0] = uint32_t(c0[i]), word[i][1] = uint32_t(c1[i]), word[i][2] = uint32_t(c2[i]),
      word[i][3] = uint32_t(c3[i]);
    }
    const int64_t n = count - done < 4 * GROUPS ? count - done : 4 * GROUPS;
    for (int64_t i = 0; i < n; i++) mask[done + i] = word[i / 4][i % 4] >= drop.threshold ? drop.keep : 0.f;
  }
}

}  // namespace lk::LK_LEVEL
