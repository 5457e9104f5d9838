// Arithmetic and conversions that round toward zero, down or up (.rz .rm .rp), and sums and
// products that saturate. PTX ISA 9.7.3 floating point, 9.7.9 cvt.
#include <cfenv>

#include "lanes.h"

namespace lk::ptx {

namespace {

// The host rounds as asked while `f` runs; what it computes is in memory, so the compiler moves
// nothing past the calls.
template <typename F>
void rounding(int mode, F&& f) {
  std::fesetround(mode);
  f();
  std::fesetround(FE_TONEAREST);
}
template <typename T>
T same(T v) {
  return v;
}

// clang-format off: a line an instruction
#define ONE_AS(mode, name, type, T, B, fl, value) {name "." type, B "=" B, RUN { rounding(mode, [&] { one<T, T>(w, in, mask, [](T x) { x = fl(x); return fl(T(value)); }); }); }, Flow::none}
#define TWO_AS(mode, name, type, T, B, fl, value) {name "." type, B "=" B "," B, RUN { rounding(mode, [&] { two<T, T, T>(w, in, mask, [](T x, T y) { x = fl(x), y = fl(y); return fl(T(value)); }); }); }, Flow::none}
#define THREE_AS(mode, name, type, T, B, fl, value) {name "." type, B "=" B "," B "," B, RUN { rounding(mode, [&] { three<T, T, T, T>(w, in, mask, [](T x, T y, T z) { x = fl(x), y = fl(y), z = fl(z); return fl(T(value)); }); }); }, Flow::none}
#define ROUNDED(mode, type, T, B, fl) \
  TWO_AS(mode, "add", type, T, B, fl, x + y), TWO_AS(mode, "sub", type, T, B, fl, x - y), TWO_AS(mode, "mul", type, T, B, fl, x * y), \
  TWO_AS(mode, "div", type, T, B, fl, x / y), THREE_AS(mode, "fma", type, T, B, fl, std::fma(x, y, z)), \
  ONE_AS(mode, "sqrt", type, T, B, fl, std::sqrt(x)), ONE_AS(mode, "rcp", type, T, B, fl, 1 / x)
#define CONVERTED(mode, name, to, D, BD, from, X, BX, value) {"cvt." name "." to "." from, BD "=" BX, RUN { rounding(mode, [&] { one<D, X>(w, in, mask, [](X x) { return D(value); }); }); }, Flow::none}
#define FROM_INTEGER(mode, name, T, B) CONVERTED(mode, name, "f32", f32, "32", #T, T, B, x), CONVERTED(mode, name, "f64", f64, "64", #T, T, B, x)
#define ALL(mode, name) \
  ROUNDED(mode, name ".f32", f32, "32", same), ROUNDED(mode, name ".ftz.f32", f32, "32", flush), ROUNDED(mode, name ".f64", f64, "64", same), \
  CONVERTED(mode, name, "f32", f32, "32", "f64", f64, "64", x), CONVERTED(mode, name ".ftz", "f32", f32, "32", "f64", f64, "64", flush(f32(x))), \
  FROM_INTEGER(mode, name, u16, "16"), FROM_INTEGER(mode, name, s16, "16"), FROM_INTEGER(mode, name, u32, "32"), \
  FROM_INTEGER(mode, name, s32, "32"), FROM_INTEGER(mode, name, u64, "64"), FROM_INTEGER(mode, name, s64, "64")
#define SATURATED(type, fl) \
  TWO("add." type, "32=32,32", f32, f32, f32, saturated(fl(x) + fl(y))), TWO("sub." type, "32=32,32", f32, f32, f32, saturated(fl(x) - fl(y))), \
  TWO("mul." type, "32=32,32", f32, f32, f32, saturated(fl(x) * fl(y))), THREE("fma." type, "32=32,32,32", f32, f32, f32, f32, saturated(std::fma(fl(x), fl(y), fl(z))))

const Table entries{
    ALL(FE_TOWARDZERO, "rz"), ALL(FE_DOWNWARD, "rm"), ALL(FE_UPWARD, "rp"),
    SATURATED("sat.f32", same), SATURATED("ftz.sat.f32", flush),
    CONVERT("rn.ftz.f32", "f64", f32, f64, "32", "64", flush(f32(x))), CONVERT("ftz.f64", "f32", f64, f32, "64", "32", f64(flush(x))),
    CONVERT("ftz.f32", "f32", f32, f32, "32", "32", flush(x)),
    // 9.7.3.14 and 9.7.3.17: only the upper 32 bits are looked at, and made
    ONE("rcp.ftz.f64", "64=64", u64, u64, bits<u64>(1 / bits<f64>(x >> 32 << 32)) >> 32 << 32),
    ONE("rsqrt.ftz.f64", "64=64", u64, u64, bits<u64>(1 / std::sqrt(bits<f64>(x >> 32 << 32))) >> 32 << 32),
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
