// Before cpu_tiles.cpp, cpu_pairs.cpp and cpu_small.cpp: the instructions of AMX and AVX512_BF16, and
// masked accesses, in plain C++. So the products of bf16 run on any processor with AVX-512, and the
// sanitizers see each access, which they do not of an instruction in assembly or with a mask.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace lk::sanitize {

// a tile of 16 rows of 64 bytes; of a thread, as the processor's
struct alignas(64) Tile {
  uint32_t row[16][16];
};
inline thread_local Tile tile[8];

// not memcpy, which ThreadSanitizer does not see where GCC writes it out
inline void load_tile(int t, const void* from, int64_t bytes) {
  for (int i = 0; i < 16; i++) {
    _mm512_storeu_si512(tile[t].row[i], _mm512_loadu_si512(static_cast<const char*>(from) + i * bytes));
  }
}
inline void store_tile(int t, void* to, int64_t bytes) {
  for (int i = 0; i < 16; i++) {
    _mm512_storeu_si512(static_cast<char*>(to) + i * bytes, _mm512_loadu_si512(tile[t].row[i]));
  }
}
inline float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float low(uint32_t pair) { return number(pair << 16); }
inline float high(uint32_t pair) { return number(pair & 0xffff0000u); }

// sum [16, 16] += left [16, 32] · right, its pairs of rows side by side; nothing here is shared, and
// the history that ThreadSanitizer keeps of each thread is short
__attribute__((no_sanitize("thread"))) inline void multiply(int sum, int left, int right) {
  for (int i = 0; i < 16; i++) {
    float row[16];
    std::memcpy(row, tile[sum].row[i], 64);
    for (int k = 0; k < 16; k++) {
      const uint32_t with = tile[left].row[i][k];
      for (int j = 0; j < 16; j++) {
        row[j] += low(with) * low(tile[right].row[k][j]) + high(with) * high(tile[right].row[k][j]);
      }
    }
    std::memcpy(tile[sum].row[i], row, 64);
  }
}

// vdpbf16ps: sum + odd · odd, rounded, then + even · even; numbers below 2⁻¹²⁶ stay
__attribute__((no_sanitize("thread"))) inline __m512 dot_pairs(__m512 sum, __m512bh left, __m512bh right) {
  float sums[16];
  uint32_t l[16], r[16];
  std::memcpy(sums, &sum, 64), std::memcpy(l, &left, 64), std::memcpy(r, &right, 64);
  for (int i = 0; i < 16; i++) sums[i] = sums[i] + high(l[i]) * high(r[i]) + low(l[i]) * low(r[i]);
  std::memcpy(&sum, sums, 64);
  return sum;
}
inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __m256bh narrow(__m512 v) {
  uint16_t held[16];
  for (int i = 0; i < 16; i++) held[i] = rounded(v[i]);
  __m256bh out;
  std::memcpy(&out, held, 32);
  return out;
}
inline __m512bh narrow(__m512 high, __m512 low) {
  const __m256bh halves[2] = {narrow(low), narrow(high)};
  __m512bh out;
  std::memcpy(&out, halves, 64);
  return out;
}

// the elements of p whose bit is set, zeros elsewhere
template <typename V, typename T>
V masked_load(uint32_t mask, const T* p) {
  T held[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); i++) {
    if (mask >> i & 1) held[i] = p[i];
  }
  V v;
  std::memcpy(&v, held, sizeof v);
  return v;
}
template <typename V, typename T>
void masked_store(T* p, uint32_t mask, V v) {
  T held[sizeof(V) / sizeof(T)];
  std::memcpy(held, &v, sizeof v);
  for (size_t i = 0; i < sizeof(V) / sizeof(T); i++) {
    if (mask >> i & 1) p[i] = held[i];
  }
}
template <typename T>
const uint16_t* halves(const T* p) {
  return reinterpret_cast<const uint16_t*>(p);
}

}  // namespace lk::sanitize

#define _mm512_dpbf16_ps(sum, left, right) lk::sanitize::dot_pairs(sum, left, right)
#define _mm512_cvtneps_pbh(v) lk::sanitize::narrow(v)
#define _mm512_cvtne2ps_pbh(high, low) lk::sanitize::narrow(high, low)
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define _tile_zero(t) (lk::sanitize::tile[t] = {})
#define _tile_loadd(t, from, bytes) lk::sanitize::load_tile(t, from, bytes)
#define _tile_stored(t, to, bytes) lk::sanitize::store_tile(t, to, bytes)
#define _tile_dpbf16ps(sum, left, right) lk::sanitize::multiply(sum, left, right)
#define _mm512_maskz_loadu_epi16(mask, p) lk::sanitize::masked_load<__m512i>(mask, lk::sanitize::halves(p))
#define _mm256_maskz_loadu_epi16(mask, p) lk::sanitize::masked_load<__m256i>(mask, lk::sanitize::halves(p))
#define _mm512_maskz_loadu_ps(mask, p) lk::sanitize::masked_load<__m512>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) lk::sanitize::masked_store(p, mask, v)
#define _mm256_mask_storeu_epi16(p, mask, v) lk::sanitize::masked_store(reinterpret_cast<uint16_t*>(p), mask, v)
#define _mm512_mask_storeu_epi16(p, mask, v) lk::sanitize::masked_store(reinterpret_cast<uint16_t*>(p), mask, v)
