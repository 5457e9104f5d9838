// A vector of LK_VL floats, and loads and stores that convert from and to the three storage types.
#pragma once
#include <cmath>
#include <cstring>
#include <new>

#include "level.h"
#include "types.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lk::LK_LEVEL {

constexpr int VL = LK_VL;
typedef float vec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));

LK_INLINE vec splat(float v) { return v - vec{}; }  // not 0 + v, which has to be added: 0 + -0 is 0

// Uninitialised floats on a cache line: a vector load that crosses two lines costs twice.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(size_t(count) * sizeof(float), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};
// a count of floats that ends on a cache line
LK_INLINE int64_t lines(int64_t count) { return (count + 15) / 16 * 16; }

// f16 <-> f32 without hardware support
LK_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  float value;
  if (exponent == 0) {
    value = float(mantissa) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    std::memcpy(&value, &bits, 4);
  }
  return sign ? -value : value;
}
LK_INLINE uint16_t float_to_f16(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint16_t sign = uint16_t(u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  // subnormal: let the float adder round to a multiple of 2^-24
  if (u < 0x38800000) {
    float tiny;
    std::memcpy(&tiny, &u, 4);
    tiny += 0.5f;
    std::memcpy(&u, &tiny, 4);
    return sign | uint16_t(u - 0x3f000000);
  }
  return sign | uint16_t((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}

LK_INLINE float to_float(float v) { return v; }
LK_INLINE float to_float(bf16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
LK_INLINE float to_float(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  return f16_to_float(v.bits);
#endif
}

LK_INLINE void store_scalar(float* p, float v) { *p = v; }
LK_INLINE void store_scalar(bf16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  // round to nearest even; a NaN stays a NaN
  p->bits = v != v ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LK_INLINE void store_scalar(f16* p, float v) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  p->bits = float_to_f16(v);
#endif
}

LK_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LK_INLINE vec load(const bf16* p) {
#if LK_VL == 16
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif LK_VL == 8
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  hvec h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}
LK_INLINE vec load(const f16* p) {
#if LK_VL == 16
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif LK_VL == 8
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec v;
  for (int i = 0; i < VL; i++) v[i] = to_float(p[i]);
  return v;
#endif
}

LK_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
LK_INLINE void store(bf16* p, vec v) {
  const uvec u = (uvec)v;
  const uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uvec nan = (uvec)(v != v);
  const hvec h = __builtin_convertvector((rounded & ~nan) | ((u >> 16 | 0x40) & nan), hvec);
  std::memcpy(p, &h, sizeof h);
}
LK_INLINE void store(f16* p, vec v) {
#if LK_VL == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LK_VL == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; i++) store_scalar(p + i, v[i]);
#endif
}

// the first n < VL elements; the rest read as zero and are not written. A sanitizer sees no masked
// access.
#if LK_VL == 16 && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
LK_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
LK_INLINE vec load_first(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
LK_INLINE vec load_first(const bf16* p, int64_t n) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
}
LK_INLINE vec load_first(const f16* p, int64_t n) {
  return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
LK_INLINE void store_first(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
template <typename T>
LK_INLINE void store_first(T* p, vec v, int64_t n) {
  alignas(32) T narrow[VL];
  store(narrow, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_load_si256((const __m256i*)narrow));
}
#else
template <typename T>
LK_INLINE vec load_first(const T* p, int64_t n) {
  vec v = {};
  for (int64_t i = 0; i < n; i++) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
LK_INLINE void store_first(T* p, vec v, int64_t n) {
  for (int64_t i = 0; i < n; i++) store_scalar(p + i, v[i]);
}
#endif
// at most VL
template <typename T>
LK_INLINE vec load_some(const T* p, int64_t n) {
  return n >= VL ? load(p) : load_first(p, n);
}

// numbers `stride` apart as floats, one after another
template <typename T>
LK_INLINE void widen(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + VL <= count; i += VL) store(to + i, load(from + i));
  }
  for (; i < count; i++) to[i] = to_float(from[i * stride]);
}

// the sums of four vectors
struct Four {
  float v[4];
};
LK_INLINE Four sum4(vec a, vec b, vec c, vec d) {
  Four out;
#if LK_VL >= 8
#if LK_VL == 16
  const auto fold = [](vec x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
#else
  const auto fold = [](vec x) { return (__m256)x; };
#endif
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out.v, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  for (int i = 0; i < 4; i++) out.v[i] = 0.f;
  for (int i = 0; i < VL; i++) out.v[0] += a[i], out.v[1] += b[i], out.v[2] += c[i], out.v[3] += d[i];
#endif
  return out;
}
LK_INLINE float sum(vec v) { return sum4(v, vec{}, vec{}, vec{}).v[0]; }

// calls f with a pointer of the view's own type
template <typename F>
LK_INLINE void with_type(const View& view, F&& f) {
  switch (view.type) {
    case DType::f32: return f(static_cast<float*>(view.data));
    case DType::bf16: return f(static_cast<bf16*>(view.data));
    case DType::f16: return f(static_cast<f16*>(view.data));
  }
}

}  // namespace lk::LK_LEVEL
