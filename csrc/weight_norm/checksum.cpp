// A 64-bit checksum of a few byte ranges, at the speed of the nearer caches: the key under which a
// norm is kept.
#include <cstring>

#include "../common/level.h"
#include "../common/types.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

constexpr int LANES = 16, CHAINS = 4;
typedef uint32_t lanes __attribute__((vector_size(LANES * 4)));

// the rotation carries a flipped sign bit, which a product alone would leave on top, into the other
// bits
LK_INLINE lanes mix(lanes h, lanes v) {
  const lanes t = h ^ v;
  return ((t << 13) | (t >> 19)) * 0x9E3779B1u;
}

}  // namespace

uint64_t checksum(const Bytes* ranges, int count) {
  lanes h[CHAINS];
  for (int c = 0; c < CHAINS; c++) {
    for (int i = 0; i < LANES; i++) h[c][i] = 0x85EBCA77u * uint32_t(c * LANES + i + 1);
  }
  constexpr int64_t STEP = sizeof h;
  for (int r = 0; r < count; r++) {
    const char* data = static_cast<const char*>(ranges[r].data);
    int64_t left = ranges[r].size;
    const auto take = [&](int64_t size) {
      lanes v[CHAINS] = {};
      std::memcpy(v, data, size);
      LK_UNROLL for (int c = 0; c < CHAINS; c++) h[c] = mix(h[c], v[c]);
    };
    for (; left >= STEP; data += STEP, left -= STEP) take(STEP);
    if (left > 0) take(left);
  }
  uint64_t sum = 0;
  for (int c = 0; c < CHAINS; c++) {
    for (int i = 0; i < LANES; i++) {
      sum = (sum ^ h[c][i]) * 0x9E3779B97F4A7C15u;
      sum ^= sum >> 29;
    }
  }
  return sum;
}

}  // namespace lk::LK_LEVEL
