// Numbers of 16 bits and their roundings, all to nearest even unless another is named.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace lk::ptx {

template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

constexpr uint16_t NAN16 = 0x7fff;  // what PTX makes of any NaN

inline float from_bf16(uint16_t v) { return bits<float>(uint32_t(v) << 16); }
inline uint16_t to_bf16(float v) {
  const uint32_t u = bits<uint32_t>(v);
  return v != v ? NAN16 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline uint16_t to_bf16_zero(float v) { return v != v ? NAN16 : uint16_t(bits<uint32_t>(v) >> 16); }

inline float from_f16(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000) << 16, exponent = v >> 10 & 31, mantissa = v & 0x3ff;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(mantissa) * 0x1p-24f));
  return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
// a number whose float64 is exact, rounded once
inline uint16_t to_f16(double v) {
  if (v != v) return NAN16;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const double size = std::fabs(v);
  if (size >= 65520.0) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the last bit
  const auto steps = uint32_t(std::nearbyint(std::ldexp(size, -unit)));
  // steps carry into the exponent by themselves
  return sign | uint16_t(size == 0 ? 0 : unit == -24 ? steps : steps + uint32_t(unit + 24) * 1024);
}
inline uint16_t to_f16_zero(float v) {
  const uint16_t near = to_f16(v);
  const bool past = std::fabs(from_f16(near)) > std::fabs(v) && std::isfinite(v);
  return past ? near - 1 : near;
}

enum class Round { nearest, zero, down, up };
// A number as E bits of exponent and M of mantissa, rounded once; a long double holds every integer
// of 64 bits. FINITE is PTX's .satfinite for the types of 8 bits: the largest number instead of
// infinity, and e4m3 has one more exponent for it.
template <int E, int M, bool FINITE = false>
inline uint16_t narrow(long double v, Round round = Round::nearest) {
  constexpr uint32_t SIGN = 1u << (E + M), INFINITE = SIGN - (1u << M);
  constexpr uint32_t LARGEST = FINITE && E == 4 ? SIGN - 2 : INFINITE - 1;
  constexpr int LOWEST = 2 - (1 << (E - 1)) - M;
  if (v != v) return uint16_t(SIGN - 1);
  const bool negative = std::signbit(v),
             to_infinity = round == Round::nearest ||
                           (round == Round::down ? negative : !negative && round == Round::up);
  const auto signed_as = [&](uint32_t to) { return uint16_t(negative ? to | SIGN : to); };
  if (v == 0) return signed_as(0);
  if (std::isinf(v)) return signed_as(FINITE ? LARGEST : INFINITE);
  const long double size = std::fabs(v);
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 1 - M, LOWEST);  // the last bit
  const long double steps = std::ldexp(size, -unit), whole = std::floor(steps), rest = steps - whole;
  const auto below = uint32_t(whole);
  const bool more = round == Round::nearest ? rest > 0.5L || (rest == 0.5L && below & 1) : rest > 0 && to_infinity;
  // they carry into the exponent by themselves
  const uint32_t to = below + more + (uint32_t(unit - LOWEST) << M);
  return signed_as(to <= LARGEST ? to : FINITE || !to_infinity ? LARGEST : INFINITE);
}
// of 8 bits, by way of the same number of 16
inline float from_e5m2(uint8_t v) { return from_f16(uint16_t(v << 8)); }
inline float from_e4m3(uint8_t v) {
  if ((v & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return from_f16(uint16_t((v & 0x80) << 8 | (v & 0x7f) << 7)) * 256;
}
inline uint16_t to_f16_fma(float x, float y, float z) { return to_f16(double(x) * y + z); }
// 8 bits of mantissa twice and 8 more: the float64 sum is exact enough to be rounded to odd first
inline uint16_t to_bf16_fma(float x, float y, float z) {
  const double exact = double(x) * y + z;
  float near = float(exact);
  if (double(near) != exact && std::isfinite(near) && !(bits<uint32_t>(near) & 1)) {
    near = std::nextafter(near, exact > near ? INFINITY : -INFINITY);
  }
  return to_bf16(near);
}

// to nearest, ties away from zero, as cvt.rna.tf32: 10 bits of mantissa
inline uint32_t to_tf32(float v) {
  const uint32_t u = bits<uint32_t>(v);
  return std::isfinite(v) ? (u + 0x1000) & 0xffffe000u : v != v ? 0x7fffffffu : u;
}

// a float as an integer, out of range the nearest one; NaN as 0, or where 64 bits take part as the
// highest bit alone
template <typename T, typename F>
inline T to_integer(F v) {
  if (v != v) return sizeof(F) < 8 && sizeof(T) < 8 ? T(0) : T(std::make_unsigned_t<T>(1) << (sizeof(T) * 8 - 1));
  if (v <= F(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (v >= F(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(v);
}

// PTX's min and max: the other one if one is NaN, and -0 below +0
template <typename F>
inline F least(F a, F b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <typename F>
inline F most(F a, F b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
// the same, but NaN if one is
template <typename F>
inline F least_or_nan(F a, F b) {
  return a != a || b != b ? std::numeric_limits<F>::quiet_NaN() : least(a, b);
}
template <typename F>
inline F most_or_nan(F a, F b) {
  return a != a || b != b ? std::numeric_limits<F>::quiet_NaN() : most(a, b);
}

}  // namespace lk::ptx
