// Arithmetic that flushes to zero (.ftz) or saturates, on two floats at once, with three sources,
// and on bytes. PTX ISA 9.7.1 integer, 9.7.3 floating point, 9.7.6 comparison, 9.7.9 cvt.
#include "lanes.h"

namespace lk::ptx {

namespace {

// clang-format off: a line a few instructions
#define FTZ1(name, value) {name ".ftz.f32", "32=32", RUN { one<f32, f32>(w, in, mask, [](f32 x) { x = flush(x); return flush(value); }); }, Flow::none}
#define FTZ2(name, value) {name ".ftz.f32", "32=32,32", RUN { two<f32, f32, f32>(w, in, mask, [](f32 x, f32 y) { x = flush(x), y = flush(y); return flush(value); }); }, Flow::none}
#define FTZ_COMPARE(op, test) COMPARE(op ".ftz", f32, 32, [](f32 x, f32 y) { return test; }(flush(x), flush(y)))
#define FTZ_ROUND(mode, f) CONVERT(mode ".ftz.f32", "f32", f32, f32, "32", "32", flush(f(flush(x))))

// two float32 in 64 bits
template <typename F>
u64 pair_of(u64 x, u64 y, u64 z, F&& f) {
  const auto half = [&](int by) { return u64(bits<u32>(f(bits<f32>(u32(x >> by)), bits<f32>(u32(y >> by)), bits<f32>(u32(z >> by))))) << by; };
  return half(0) | half(32);
}
#define PAIRS2(name, value) TWO(name ".f32x2", "64=64,64", u64, u64, u64, pair_of(x, y, 0, [](f32 x, f32 y, f32) { return value; }))
#define THREE_F32(name, value) THREE(name ".f32", "32=32,32,32", f32, f32, f32, f32, value)
// four products of bytes and a sum
template <typename X, typename Y>
u32 dot4(u32 x, u32 y, u32 z) {
  for (int i = 0; i < 32; i += 8) z += u32(s32(X(x >> i)) * s32(Y(y >> i)));
  return z;
}
#define DOT4(a, b, X, Y) THREE("dp4a." a "." b, "32=32,32,32", u32, u32, u32, u32, (dot4<X, Y>(x, y, z)))

// ones from a place on: .clamp has them end with the word
u32 ones_from(u32 first, u32 count) { return first >= 32 ? 0 : (count >= 32 ? ~0u : (1u << count) - 1) << first; }
// the place of the nth one from `from` on, upwards or, for n < 0, downwards; 0 asks for `from`
// itself
u32 nth_one(u32 x, u32 from, s32 n) {
  const int step = n < 0 ? -1 : 1;
  int left = n < 0 ? -n : n == 0 ? 1 : n;
  for (int i = int(from); i >= 0 && i < 32; i += step) {
    if (x >> i & 1 && --left == 0) return u32(i);
    if (n == 0) break;
  }
  return ~0u;
}
template <typename T>
T distance(T x, T y, T z) { return T(u64(x > y ? x - y : y - x) + u64(z)); }
#define SAD(T, B) THREE("sad." #T, #B "=" #B "," #B "," #B, T, T, T, T, distance(x, y, z))

const Table entries{
    TWO("bmsk.clamp.b32", "32=32,32", u32, u32, u32, ones_from(x, y)), TWO("bmsk.wrap.b32", "32=32,32", u32, u32, u32, ones_from(x & 31, y & 31)),
    THREE("fns.b32", "32=32,32,32", u32, u32, u32, s32, nth_one(x, y, z)), SAD(u16, 16), SAD(s16, 16), SAD(u32, 32), SAD(s32, 32), SAD(u64, 64), SAD(s64, 64),
    TWO("mul24.lo.u32", "32=32,32", u32, u32, u32, (x & 0xffffff) * (y & 0xffffff)), TWO("mul24.lo.s32", "32=32,32", u32, u32, u32, u32(s32(x << 8) >> 8) * u32(s32(y << 8) >> 8)),
    TWO("add.sat.s32", "32=32,32", s32, s32, s32, s32(std::min<s64>(std::max<s64>(s64(x) + y, INT32_MIN), INT32_MAX))),
    TWO("sub.sat.s32", "32=32,32", s32, s32, s32, s32(std::min<s64>(std::max<s64>(s64(x) - y, INT32_MIN), INT32_MAX))),
    FTZ2("add", x + y), FTZ2("sub", x - y), FTZ2("mul", x * y), FTZ2("div", x / y), FTZ2("min", least(x, y)), FTZ2("max", most(x, y)),
    {"fma.ftz.f32", "32=32,32,32", RUN { three<f32, f32, f32, f32>(w, in, mask, [](f32 x, f32 y, f32 z) { return flush(std::fma(flush(x), flush(y), flush(z))); }); }, Flow::none},
    FTZ1("abs", std::fabs(x)), FTZ1("neg", -x), FTZ1("sqrt", std::sqrt(x)), FTZ1("rcp", 1 / x), FTZ1("rsqrt", 1 / std::sqrt(x)),
    FTZ1("ex2", std::exp2(x)), FTZ1("lg2", std::log2(x)), FTZ1("sin", std::sin(x)), FTZ1("cos", std::cos(x)),
    FTZ_COMPARE("eq", x == y), FTZ_COMPARE("ne", x < y || x > y), FTZ_COMPARE("lt", x < y), FTZ_COMPARE("le", x <= y),
    FTZ_COMPARE("gt", x > y), FTZ_COMPARE("ge", x >= y), FTZ_COMPARE("equ", !(x < y || x > y)), FTZ_COMPARE("neu", x != y),
    FTZ_COMPARE("ltu", !(x >= y)), FTZ_COMPARE("leu", !(x > y)), FTZ_COMPARE("gtu", !(x <= y)), FTZ_COMPARE("geu", !(x < y)),
    FTZ_COMPARE("num", x == x && y == y), FTZ_COMPARE("nan", x != x || y != y),
    FTZ_ROUND("rni", std::nearbyint), FTZ_ROUND("rzi", std::trunc), FTZ_ROUND("rmi", std::floor), FTZ_ROUND("rpi", std::ceil),
    CONVERT("sat.f32", "f32", f32, f32, "32", "32", saturated(x)), CONVERT("ftz.sat.f32", "f32", f32, f32, "32", "32", saturated(flush(x))),
    PAIRS2("add", x + y), PAIRS2("sub", x - y), PAIRS2("mul", x * y),
    THREE("fma.f32x2", "64=64,64,64", u64, u64, u64, u64, pair_of(x, y, z, [](f32 x, f32 y, f32 z) { return std::fma(x, y, z); })),
    THREE_F32("min3", least(least(x, y), z)), THREE_F32("max3", most(most(x, y), z)),
    THREE_F32("min3.NaN", least_or_nan(least_or_nan(x, y), z)), THREE_F32("max3.NaN", most_or_nan(most_or_nan(x, y), z)),
    DOT4("s32", "s32", int8_t, int8_t), DOT4("s32", "u32", int8_t, uint8_t), DOT4("u32", "s32", uint8_t, int8_t), DOT4("u32", "u32", uint8_t, uint8_t),
    ONE("bfind.shiftamt.u32", "32=32", u32, u32, x ? __builtin_clz(x) : ~0u),
    ONE("brev.b64", "64=64", u64, u64, ([](u64 v) { u64 r = 0; for (int i = 0; i < 64; i++) r |= (v >> i & 1) << (63 - i); return r; }(x))),
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
