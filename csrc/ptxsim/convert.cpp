// Conversions of numbers of 16 and 8 bits, and integers that saturate. PTX ISA 9.7.9 cvt.
#include "lanes.h"

namespace lk::ptx {

namespace {

uint16_t narrow_f16(long double v, Round round = Round::nearest) { return narrow<5, 10>(v, round); }
uint16_t narrow_bf16(long double v, Round round = Round::nearest) { return narrow<8, 7>(v, round); }
u16 narrow_e4m3(f32 v) { return narrow<4, 3, true>(v); }
u16 narrow_e5m2(f32 v) { return narrow<5, 2, true>(v); }
f32 positive(f32 v) { return v < 0 ? 0.f : v != v ? v : std::fabs(v); }
f32 same(f32 v) { return v; }

template <typename T, typename X>
T clamp(X x) {
  using Limits = std::numeric_limits<T>;
  return T(std::min<s128>(std::max<s128>(x, Limits::min()), Limits::max()));
}

// clang-format off: a line an instruction
#define MODES(X, ...) X("rni", std::nearbyint, __VA_ARGS__), X("rzi", std::trunc, __VA_ARGS__), X("rmi", std::floor, __VA_ARGS__), X("rpi", std::ceil, __VA_ARGS__)
#define ROUNDS(X, ...) X("rn", Round::nearest, __VA_ARGS__), X("rz", Round::zero, __VA_ARGS__), X("rm", Round::down, __VA_ARGS__), X("rp", Round::up, __VA_ARGS__)
// a float of each width as the integer T, called `name`, in a register D
#define WHOLE(mode, f, name, T, D, B) \
  CONVERT(mode "." name, "f16", D, u16, B, "16", to_integer<T>(f(from_f16(x)))), CONVERT(mode "." name, "bf16", D, u16, B, "16", to_integer<T>(f(from_bf16(x)))), \
  CONVERT(mode ".ftz." name, "f32", D, f32, B, "32", to_integer<T>(f(flush(x))))
#define WHOLE_BYTE(mode, f, name, T) WHOLE(mode, f, name, T, u32, "32"), \
  CONVERT(mode "." name, "f32", u32, f32, "32", "32", to_integer<T>(f(x))), CONVERT(mode "." name, "f64", u32, f64, "32", "64", to_integer<T>(f(x)))
#define FLOORS(T, B) CONVERT("rmi." #T, "f64", T, f64, B, "64", to_integer<T>(std::floor(x))), CONVERT("rpi." #T, "f64", T, f64, B, "64", to_integer<T>(std::ceil(x)))
#define IN_DOUBLE(mode, f, to) CONVERT(mode "." #to, #to, to, to, "64", "64", f(x))
#define IN_HALF(mode, f, to) CONVERT(mode "." #to, #to, u16, u16, "16", "16", narrow_##to(f(from_##to(x))))
#define HALF(mode, round, to, from, X, B, value) CONVERT(mode "." #to, from, u16, X, "16", B, narrow_##to(value, round))
#define HALF_OF(T, B) \
  CONVERT("f16", #T, u16, T, "16", B, narrow_f16(x)), CONVERT("rz.f16", #T, u16, T, "16", B, narrow_f16(x, Round::zero)), \
  CONVERT("rm.f16", #T, u16, T, "16", B, narrow_f16(x, Round::down)), CONVERT("rp.f16", #T, u16, T, "16", B, narrow_f16(x, Round::up)), \
  CONVERT("bf16", #T, u16, T, "16", B, narrow_bf16(x)), CONVERT("rz.bf16", #T, u16, T, "16", B, narrow_bf16(x, Round::zero)), \
  CONVERT("rm.bf16", #T, u16, T, "16", B, narrow_bf16(x, Round::down)), CONVERT("rp.bf16", #T, u16, T, "16", B, narrow_bf16(x, Round::up))
// the first source is the upper half
#define PAIR(how, to, to_half, f) TWO("cvt." how "." to "x2.f32", "32=32,32", u32, f32, f32, u32(to_half(f(x))) << 16 | to_half(f(y)))
#define POSITIVE(to) \
  CONVERT("rn.relu." #to, "f32", u16, f32, "16", "32", to_##to(positive(x))), CONVERT("rz.relu." #to, "f32", u16, f32, "16", "32", to_##to##_zero(positive(x))), \
  PAIR("rn.relu", #to, to_##to, positive), PAIR("rz", #to, to_##to##_zero, same), PAIR("rz.relu", #to, to_##to##_zero, positive)
#define EIGHT(how, to, f) \
  TWO("cvt.rn.satfinite" how "." #to "x2.f32", "16=32,32", u16, f32, f32, narrow_##to(f(x)) << 8 | narrow_##to(f(y))), \
  CONVERT("rn.satfinite" how "." #to "x2", "f16x2", u16, u32, "16", "32", narrow_##to(f(from_f16(u16(x >> 16)))) << 8 | narrow_##to(f(from_f16(u16(x))))), \
  CONVERT("rn" how ".f16x2", #to "x2", u32, u16, "32", "16", u32(to_f16(f(from_##to(uint8_t(x >> 8))))) << 16 | to_f16(f(from_##to(uint8_t(x)))))
#define SATURATED(name, T, D, B) \
  CONVERT("sat." name, "u16", D, u16, B, "16", clamp<T>(x)), CONVERT("sat." name, "s16", D, s16, B, "16", clamp<T>(x)), \
  CONVERT("sat." name, "u32", D, u32, B, "32", clamp<T>(x)), CONVERT("sat." name, "s32", D, s32, B, "32", clamp<T>(x)), \
  CONVERT("sat." name, "u64", D, u64, B, "64", clamp<T>(x)), CONVERT("sat." name, "s64", D, s64, B, "64", clamp<T>(x))

const Table entries{
    MODES(WHOLE_BYTE, "u8", uint8_t), MODES(WHOLE_BYTE, "s8", int8_t), MODES(WHOLE, "u16", u16, u16, "16"), MODES(WHOLE, "s16", s16, s16, "16"),
    MODES(WHOLE, "u32", u32, u32, "32"), MODES(WHOLE, "s32", s32, s32, "32"), MODES(WHOLE, "u64", u64, u64, "64"), MODES(WHOLE, "s64", s64, s64, "64"),
    FLOORS(u16, "16"), FLOORS(s16, "16"), FLOORS(u32, "32"), FLOORS(s32, "32"), FLOORS(u64, "64"), FLOORS(s64, "64"),
    HALF_OF(u16, "16"), HALF_OF(s16, "16"), HALF_OF(u32, "32"), HALF_OF(s32, "32"), HALF_OF(u64, "64"), HALF_OF(s64, "64"),
    MODES(IN_HALF, f16), MODES(IN_HALF, bf16), MODES(IN_DOUBLE, f64),
    ROUNDS(HALF, f16, "f64", f64, "64", x), ROUNDS(HALF, bf16, "f64", f64, "64", x),
    ROUNDS(HALF, f16, "bf16", u16, "16", from_bf16(x)), ROUNDS(HALF, bf16, "f16", u16, "16", from_f16(x)),
    HALF("rm", Round::down, f16, "f32", f32, "32", x), HALF("rp", Round::up, f16, "f32", f32, "32", x),
    HALF("rm", Round::down, bf16, "f32", f32, "32", x), HALF("rp", Round::up, bf16, "f32", f32, "32", x),
    CONVERT("f64", "f16", f64, u16, "64", "16", from_f16(x)), CONVERT("f64", "bf16", f64, u16, "64", "16", from_bf16(x)),
    CONVERT("ftz.f32", "f16", f32, u16, "32", "16", from_f16(x)), CONVERT("rn.ftz.f16", "f32", u16, f32, "16", "32", to_f16(flush(x))),
    POSITIVE(f16), POSITIVE(bf16), EIGHT("", e4m3, same), EIGHT("", e5m2, same), EIGHT(".relu", e4m3, positive), EIGHT(".relu", e5m2, positive),
    SATURATED("u8", uint8_t, u32, "32"), SATURATED("s8", int8_t, u32, "32"), SATURATED("u16", u16, u16, "16"), SATURATED("s16", s16, s16, "16"),
    SATURATED("u32", u32, u32, "32"), SATURATED("s32", s32, s32, "32"), SATURATED("u64", u64, u64, "64"), SATURATED("s64", s64, s64, "64"),
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
