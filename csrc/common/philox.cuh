// The dropout mask of lora_kernels/ops/dropout.py: Philox4x32-10 with key = seed and counter =
// (column / 4, row, row >> 32, 0).
#pragma once
#include <cstdint>

namespace lk {

struct Dropout {
  const int64_t* at;  // where the seed is, or null: then it is `seed`
  int64_t seed;
  int64_t threshold;  // a number is kept if its word is at least that; 0 for all
};

// the words of four columns of a row, 4 · group and on
__device__ inline uint4 philox(uint64_t seed, uint32_t group, uint64_t row) {
  uint32_t c0 = group, c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

}  // namespace lk
