// The dropout mask of lora_kernels/ops/dropout.py: Philox4x32-10 with key = seed and
// counter = (column / 4, row, row >> 32, 0).
#pragma once
#include "vec.h"

namespace lk::LK_LEVEL {

constexpr int GROUPS = 8;  // counters computed together; 4 columns each
constexpr int WORDS = 4 * GROUPS;

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

// The group of each lane, so that `store_words` has them in order by one instruction.
#if LK_VL == 16
constexpr wide LANES = {0, 4, 1, 5, 2, 6, 3, 7};
#elif LK_VL == 8
constexpr wide LANES = {0, 2, 1, 3, 4, 6, 5, 7};
#else
constexpr wide LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

// word[4 g] to word[4 g + 3] of each group: the halves of its lane in `first`, then in `second`
LK_INLINE void store_words(wide first, wide second, uint32_t* word) {
#if LK_VL == 16
  _mm512_storeu_si512(word, _mm512_unpacklo_epi64((__m512i)first, (__m512i)second));
  _mm512_storeu_si512(word + WORDS / 2, _mm512_unpackhi_epi64((__m512i)first, (__m512i)second));
#elif LK_VL == 8
  __m256i one[2], two[2];
  std::memcpy(one, &first, sizeof first);
  std::memcpy(two, &second, sizeof second);
  for (int i = 0; i < 2; i++) {
    _mm256_storeu_si256((__m256i*)(word + 16 * i), _mm256_unpacklo_epi64(one[i], two[i]));
    _mm256_storeu_si256((__m256i*)(word + 16 * i + 8), _mm256_unpackhi_epi64(one[i], two[i]));
  }
#else
  for (int i = 0; i < GROUPS; i++) {
    for (int half = 0; half < 2; half++) {
      word[4 * i + half] = uint32_t(first[i] >> 32 * half);
      word[4 * i + 2 + half] = uint32_t(second[i] >> 32 * half);
    }
  }
#endif
}

// mask[i] = keep or 0 for the CHAINS * WORDS columns from 4 `group` on; a round waits for the one
// before it, so that two chains take little longer than one
template <int CHAINS>
LK_INLINE void mask_words(const Dropout& drop, int64_t row, int64_t group, float* mask) {
  // each 64-bit lane holds one 32-bit word; the high half of what is multiplied does not count
  wide c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
  for (int i = 0; i < CHAINS; i++) {
    c0[i] = LANES + uint64_t(group + GROUPS * i), c1[i] = wide{} + uint64_t(row);
    c2[i] = wide{} + uint64_t(row) / 0x100000000u, c3[i] = wide{};
  }
  uint32_t k0 = uint32_t(drop.seed), k1 = uint32_t(drop.seed >> 32);
  LK_UNROLL for (int round = 0; round < 10; round++) {
    LK_UNROLL for (int i = 0; i < CHAINS; i++) {
      const wide p0 = multiply(c0[i], 0xD2511F53u), p1 = multiply(c2[i], 0xCD9E8D57u);
      c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = p1;
      c3[i] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const wide low = wide{} + 0xffffffffu;
  uint32_t word[CHAINS * WORDS];
  LK_UNROLL for (int i = 0; i < CHAINS; i++)
      store_words((c0[i] & low) | c1[i] << 32, (c2[i] & low) | c3[i] << 32, word + WORDS * i);
  const uint32_t threshold = drop.threshold;
  const float keep = drop.keep;  // read once: the mask is no part of `drop`
  for (int i = 0; i < CHAINS * WORDS; i++) mask[i] = word[i] >= threshold ? keep : 0.f;
}

// mask[i] = keep or 0 for columns first..first+count of one row; first is a multiple of 4
static __attribute__((noinline)) void dropout_mask(const Dropout& drop, int64_t row, int64_t first, int64_t count,
                                                   float* mask) {
  int64_t done = 0;
  for (; LK_VL == 16 && done + 2 * WORDS <= count; done += 2 * WORDS) {
    mask_words<2>(drop, row, (first + done) / 4, mask + done);
  }
  for (; done + WORDS <= count; done += WORDS) mask_words<1>(drop, row, (first + done) / 4, mask + done);
  if (done == count) return;
  float rest[WORDS];
  mask_words<1>(drop, row, (first + done) / 4, rest);
  std::memcpy(mask + done, rest, size_t(count - done) * sizeof(float));
}

}  // namespace lk::LK_LEVEL
