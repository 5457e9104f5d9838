// Arithmetic, logic, comparison, selection and conversion: what each lane does by itself. PTX ISA
// 9.7.1 integer, 9.7.3 floating point, 9.7.4 half precision, 9.7.6 comparison and selection, 9.7.8
// logic and shift, 9.7.9 data movement (mov, prmt, cvt).
#include <algorithm>

#include "lanes.h"

namespace lk::ptx {

namespace {

u32 permute(u32 x, u32 y, u32 selectors) {
  const u64 bytes = u64(y) << 32 | x;
  u32 to = 0;
  for (int i = 0; i < 4; i++) {
    const u32 selector = selectors >> (4 * i) & 15;
    const auto byte = uint8_t(bytes >> (8 * (selector & 7)));
    to |= u32(selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * i);
  }
  return to;
}

u32 logic(u32 x, u32 y, u32 z, u32 truth) {
  u32 to = 0;
  for (u32 i = 0; i < 8; i++) {
    if (truth >> i & 1) to |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  }
  return to;
}

// `length` bits from `first`; beyond the number there are zeros, for a signed one copies of its
// sign
template <typename T>
T extract(T x, u32 first, u32 length) {
  constexpr u32 WIDTH = sizeof(T) * 8;
  first &= 255, length &= 255;
  if (length == 0) return 0;
  const bool is_signed = T(-1) < T(0);
  const u32 sign_at = std::min(first + length - 1, WIDTH - 1);
  const bool sign = is_signed && (u64(x) >> sign_at & 1);
  u64 to = first < WIDTH ? u64(std::make_unsigned_t<T>(x)) >> first : 0;
  const u32 kept = first < WIDTH ? std::min(length, WIDTH - first) : 0;
  const u64 ones = kept >= 64 ? ~u64{0} : (u64{1} << kept) - 1;
  to &= ones;
  return T(sign ? to | ~ones : to);
}
template <typename T>
T insert(T x, T into, u32 first, u32 length) {
  constexpr u32 WIDTH = sizeof(T) * 8;
  first &= 255, length &= 255;
  if (first >= WIDTH || length == 0) return into;
  const u32 kept = std::min(length, WIDTH - first);
  const T ones = (kept >= WIDTH ? ~T{0} : T((T{1} << kept) - 1)) << first;
  return T((into & ~ones) | ((x << first) & ones));
}

template <typename T>
T shift_left(T x, u32 by) {
  return by >= sizeof(T) * 8 ? T(0) : T(x << by);
}
template <typename T>
T shift_right(T x, u32 by) {
  constexpr u32 WIDTH = sizeof(T) * 8;
  return T(x >> std::min(by, WIDTH - 1) >> (by >= WIDTH ? 1 : 0));
}
template <typename T>
T quotient(T x, T y) {
  return y == 0 ? T(-1) : T(-1) < T(0) && y == T(-1) ? T(0 - std::make_unsigned_t<T>(x)) : T(x / y);
}
template <typename T>
T remainder_of(T x, T y) {
  return y == 0 ? x : T(-1) < T(0) && y == T(-1) ? T(0) : T(x % y);
}
template <typename T>
using wide_of = std::conditional_t<sizeof(T) == 8, std::conditional_t<(T(-1) < T(0)), s128, u128>,
                                   std::conditional_t<(T(-1) < T(0)), s64, u64>>;
template <typename T>
T high_product(T x, T y) {
  return T(wide_of<T>(x) * wide_of<T>(y) >> (sizeof(T) * 8));
}

#define INTEGER(T, B)                                                                                        \
  TWO("add." #T, #B "=" #B "," #B, T, T, T, T(std::make_unsigned_t<T>(x) + std::make_unsigned_t<T>(y))),     \
      TWO("sub." #T, #B "=" #B "," #B, T, T, T, T(std::make_unsigned_t<T>(x) - std::make_unsigned_t<T>(y))), \
      TWO("mul.lo." #T, #B "=" #B "," #B, T, T, T, T(u64(x) * u64(y))),                                      \
      TWO("mul.hi." #T, #B "=" #B "," #B, T, T, T, high_product(x, y)),                                      \
      THREE("mad.lo." #T, #B "=" #B "," #B "," #B, T, T, T, T, T(u64(x) * u64(y) + u64(z))),                 \
      THREE("mad.hi." #T, #B "=" #B "," #B "," #B, T, T, T, T, T(u64(high_product(x, y)) + u64(z))),         \
      TWO("div." #T, #B "=" #B "," #B, T, T, T, quotient(x, y)),                                             \
      TWO("rem." #T, #B "=" #B "," #B, T, T, T, remainder_of(x, y)),                                         \
      TWO("min." #T, #B "=" #B "," #B, T, T, T, std::min(x, y)),                                             \
      TWO("max." #T, #B "=" #B "," #B, T, T, T, std::max(x, y)),                                             \
      TWO("shr." #T, #B "=" #B ",32", T, T, u32, shift_right(x, y))
#define SIGNED(T, B)                                                              \
  ONE("abs." #T, #B "=" #B, T, T, x < 0 ? T(0 - std::make_unsigned_t<T>(x)) : x), \
      ONE("neg." #T, #B "=" #B, T, T, T(0 - std::make_unsigned_t<T>(x)))
#define WIDE(T, D, B, B2)                                    \
  TWO("mul.wide." #T, B2 "=" B "," B, D, T, T, D(x) * D(y)), \
      THREE("mad.wide." #T, B2 "=" B "," B "," B2, D, T, T, D, D(u64(D(x) * D(y)) + u64(z)))
#define BITS(T, B)                                                                                    \
  TWO("and.b" #B, #B "=" #B "," #B, T, T, T, x& y), TWO("or.b" #B, #B "=" #B "," #B, T, T, T, x | y), \
      TWO("xor.b" #B, #B "=" #B "," #B, T, T, T, x ^ y), ONE("not.b" #B, #B "=" #B, T, T, ~x),        \
      ONE("cnot.b" #B, #B "=" #B, T, T, x == 0 ? 1 : 0), ONE("mov.b" #B, #B "=" #B, T, T, x),         \
      TWO("shl.b" #B, #B "=" #B ",32", T, T, u32, shift_left(x, y)), {                                \
    "selp.b" #B, #B "=" #B "," #B ",p", RUN {                                                         \
      const T *x = w.at<T>(in.at[1]), *y = w.at<T>(in.at[2]);                                         \
      const Mask p = *w.at<Mask>(in.at[3]);                                                           \
      each(w.at<T>(in.at[0]), mask, [&](int i) { return p >> i & 1 ? x[i] : y[i]; });                 \
    }                                                                                                 \
    , Flow::none                                                                                      \
  }
#define FIELDS(T, B) THREE("bfe." #T, #B "=" #B ",32,32", T, T, u32, u32, extract(x, y, z))
#define FLOAT(T, B)                                                                                                  \
  TWO("add." #T, #B "=" #B "," #B, T, T, T, x + y), TWO("sub." #T, #B "=" #B "," #B, T, T, T, x - y),                \
      TWO("mul." #T, #B "=" #B "," #B, T, T, T, x* y), TWO("div." #T, #B "=" #B "," #B, T, T, T, x / y),             \
      THREE("fma." #T, #B "=" #B "," #B "," #B, T, T, T, T, std::fma(x, y, z)),                                      \
      ONE("abs." #T, #B "=" #B, T, T, std::fabs(x)), ONE("neg." #T, #B "=" #B, T, T, -x),                            \
      TWO("min." #T, #B "=" #B "," #B, T, T, T, least(x, y)), TWO("max." #T, #B "=" #B "," #B, T, T, T, most(x, y)), \
      ONE("sqrt." #T, #B "=" #B, T, T, std::sqrt(x)), ONE("rcp." #T, #B "=" #B, T, T, T(1) / x),                     \
      ONE("rsqrt." #T, #B "=" #B, T, T, T(1) / std::sqrt(x)),                                                        \
      TWO("copysign." #T, #B "=" #B "," #B, T, T, T, std::copysign(y, x))
// 16 bits computed in float32 and rounded once: exact for +, -, *; fma in float64
#define HALF(T, from, to)                                                                              \
  TWO("add." #T, "16=16,16", u16, u16, u16, to(from(x) + from(y))),                                    \
      TWO("sub." #T, "16=16,16", u16, u16, u16, to(from(x) - from(y))),                                \
      TWO("mul." #T, "16=16,16", u16, u16, u16, to(from(x) * from(y))),                                \
      THREE("fma." #T, "16=16,16,16", u16, u16, u16, u16, to##_fma(from(x), from(y), from(z))),        \
      ONE("neg." #T, "16=16", u16, u16, x ^ 0x8000), ONE("abs." #T, "16=16", u16, u16, x & 0x7fff),    \
      TWO("min." #T, "16=16,16", u16, u16, u16, to(least(from(x), from(y)))),                          \
      TWO("max." #T, "16=16,16", u16, u16, u16, to(most(from(x), from(y)))),                           \
      TWO("min.NaN." #T, "16=16,16", u16, u16, u16, to(least_or_nan(from(x), from(y)))),               \
      TWO("max.NaN." #T, "16=16,16", u16, u16, u16, to(most_or_nan(from(x), from(y)))),                \
      TWO("add." #T "x2", "32=32,32", u32, u32, u32,                                                   \
          halves(x, y, 0, [](u16 p, u16 q, u16) { return to(from(p) + from(q)); })),                   \
      TWO("sub." #T "x2", "32=32,32", u32, u32, u32,                                                   \
          halves(x, y, 0, [](u16 p, u16 q, u16) { return to(from(p) - from(q)); })),                   \
      TWO("mul." #T "x2", "32=32,32", u32, u32, u32,                                                   \
          halves(x, y, 0, [](u16 p, u16 q, u16) { return to(from(p) * from(q)); })),                   \
      TWO("min." #T "x2", "32=32,32", u32, u32, u32,                                                   \
          halves(x, y, 0, [](u16 p, u16 q, u16) { return to(least(from(p), from(q))); })),             \
      TWO("max." #T "x2", "32=32,32", u32, u32, u32,                                                   \
          halves(x, y, 0, [](u16 p, u16 q, u16) { return to(most(from(p), from(q))); })),              \
      THREE("fma." #T "x2", "32=32,32,32", u32, u32, u32, u32,                                         \
            halves(x, y, z, [](u16 p, u16 q, u16 r) { return to##_fma(from(p), from(q), from(r)); })), \
      ONE("neg." #T "x2", "32=32", u32, u32, x ^ 0x80008000u), ONE("abs." #T "x2", "32=32", u32, u32, x & 0x7fff7fffu)

#define ORDERED(T, B)                                                                                                \
  COMPARE("eq", T, B, x == y), COMPARE("ne", T, B, x != y), COMPARE("lt", T, B, x < y), COMPARE("le", T, B, x <= y), \
      COMPARE("gt", T, B, x > y), COMPARE("ge", T, B, x >= y)
// of floats ne is false with a NaN, and the forms with u are true
#define PARTLY_ORDERED(T, B)                                                                                  \
  COMPARE("eq", T, B, x == y), COMPARE("ne", T, B, x<y || x> y), COMPARE("lt", T, B, x < y),                  \
      COMPARE("le", T, B, x <= y), COMPARE("gt", T, B, x > y), COMPARE("ge", T, B, x >= y),                   \
      COMPARE("equ", T, B, !(x < y || x > y)), COMPARE("neu", T, B, x != y), COMPARE("ltu", T, B, !(x >= y)), \
      COMPARE("leu", T, B, !(x > y)), COMPARE("gtu", T, B, !(x <= y)), COMPARE("geu", T, B, !(x < y)),        \
      COMPARE("num", T, B, x == x && y == y), COMPARE("nan", T, B, x != x || y != y)
#define PREDICATES(op, value)                                                                \
  {op ".pred", "p=p,p", RUN{const Mask x = *w.at<Mask>(in.at[1]), y = *w.at<Mask>(in.at[2]); \
  set(w, in.at[0], mask, value);                                                             \
  }                                                                                          \
  , Flow::none                                                                               \
  }
#define TO_INTEGER(T, B)                                                             \
  CONVERT("rni." #T, "f32", T, f32, #B, "32", to_integer<T>(std::nearbyint(x))),     \
      CONVERT("rzi." #T, "f32", T, f32, #B, "32", to_integer<T>(std::trunc(x))),     \
      CONVERT("rmi." #T, "f32", T, f32, #B, "32", to_integer<T>(std::floor(x))),     \
      CONVERT("rpi." #T, "f32", T, f32, #B, "32", to_integer<T>(std::ceil(x))),      \
      CONVERT("rzi." #T, "f64", T, f64, #B, "64", to_integer<T>(std::trunc(x))),     \
      CONVERT("rni." #T, "f64", T, f64, #B, "64", to_integer<T>(std::nearbyint(x))), \
      CONVERT("f32", #T, f32, T, "32", #B, f32(x)), CONVERT("f64", #T, f64, T, "64", #B, f64(x))
#define BETWEEN(T, B)                                                                                        \
  CONVERT("u8", #T, u32, T, "32", #B, uint8_t(x)), CONVERT("s8", #T, u32, T, "32", #B, u32(s32(int8_t(x)))), \
      CONVERT("u16", #T, u16, T, "16", #B, u16(x)), CONVERT("s16", #T, u16, T, "16", #B, u16(x)),            \
      CONVERT("u32", #T, u32, T, "32", #B, u32(x)), CONVERT("s32", #T, u32, T, "32", #B, u32(x)),            \
      CONVERT("u64", #T, u64, T, "64", #B, u64(x)), CONVERT("s64", #T, u64, T, "64", #B, u64(s64(x)))

const Table entries{
    INTEGER(u16, 16), INTEGER(s16, 16), INTEGER(u32, 32), INTEGER(s32, 32), INTEGER(u64, 64), INTEGER(s64, 64),
    SIGNED(s16, 16), SIGNED(s32, 32), SIGNED(s64, 64), WIDE(u16, u32, "16", "32"), WIDE(s16, s32, "16", "32"),
    WIDE(u32, u64, "32", "64"), WIDE(s32, s64, "32", "64"), BITS(u16, 16), BITS(u32, 32), BITS(u64, 64),
    FIELDS(u32, 32), FIELDS(s32, 32), FIELDS(u64, 64), FIELDS(s64, 64),
    {"bfi.b32", "32=32,32,32,32", RUN{const u32* first = w.at<u32>(in.at[3]), *length = w.at<u32>(in.at[4]);
const u32 *x = w.at<u32>(in.at[1]), *y = w.at<u32>(in.at[2]);
each(w.at<u32>(in.at[0]), mask, [&](int i) { return insert(x[i], y[i], first[i], length[i]); });
}  // namespace
, Flow::none
}  // namespace lk::ptx
, {"bfi.b64", "64=64,64,32,32", RUN{const u32* first = w.at<u32>(in.at[3]), *length = w.at<u32>(in.at[4]);
const u64 *x = w.at<u64>(in.at[1]), *y = w.at<u64>(in.at[2]);
each(w.at<u64>(in.at[0]), mask, [&](int i) { return insert(x[i], y[i], first[i], length[i]); });
}
, Flow::none
}
, ONE("popc.b32", "32=32", u32, u32, __builtin_popcount(x)),
    ONE("popc.b64", "32=64", u32, u64, __builtin_popcountll(x)),
    ONE("clz.b32", "32=32", u32, u32, x ? __builtin_clz(x) : 32),
    ONE("clz.b64", "32=64", u32, u64, x ? __builtin_clzll(x) : 64),
    ONE("bfind.u32", "32=32", u32, u32, x ? 31 - __builtin_clz(x) : ~0u),
    ONE("brev.b32", "32=32", u32, u32, ([](u32 v) {
          u32 r = 0;
          for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
          return r;
        }(x))),
    THREE("prmt.b32", "32=32,32,32", u32, u32, u32, u32, permute(x, y, z)),
    {"lop3.b32", "32=32,32,32,i", RUN{const auto truth = u32(in.with[0]);
three<u32, u32, u32, u32>(w, in, mask, [&](u32 x, u32 y, u32 z) { return logic(x, y, z, truth); });
}
, Flow::none
}
, THREE("shf.l.wrap.b32", "32=32,32,32", u32, u32, u32, u32, u32((u64(y) << 32 | x) << (z & 31) >> 32)),
    THREE("shf.r.wrap.b32", "32=32,32,32", u32, u32, u32, u32, u32((u64(y) << 32 | x) >> (z & 31))),
    THREE("shf.l.clamp.b32", "32=32,32,32", u32, u32, u32, u32, u32((u64(y) << 32 | x) << std::min(z, 32u) >> 32)),
    THREE("shf.r.clamp.b32", "32=32,32,32", u32, u32, u32, u32, u32((u64(y) << 32 | x) >> std::min(z, 32u))),

    FLOAT(f32, 32), FLOAT(f64, 64), HALF(f16, from_f16, to_f16), HALF(bf16, from_bf16, to_bf16),
    TWO("min.NaN.f32", "32=32,32", f32, f32, f32, least_or_nan(x, y)),
    TWO("max.NaN.f32", "32=32,32", f32, f32, f32, most_or_nan(x, y)), ONE("ex2.f32", "32=32", f32, f32, std::exp2(x)),
    ONE("lg2.f32", "32=32", f32, f32, std::log2(x)), ONE("sin.f32", "32=32", f32, f32, std::sin(x)),
    ONE("cos.f32", "32=32", f32, f32, std::cos(x)), ONE("tanh.f32", "32=32", f32, f32, std::tanh(x)),

    ORDERED(u16, 16), ORDERED(s16, 16), ORDERED(u32, 32), ORDERED(s32, 32), ORDERED(u64, 64), ORDERED(s64, 64),
    PARTLY_ORDERED(f32, 32), PARTLY_ORDERED(f64, 64), PREDICATES("and", x& y), PREDICATES("or", x | y),
    PREDICATES("xor", x ^ y), {"not.pred", "p=p", RUN{set(w, in.at[0], mask, ~*w.at<Mask>(in.at[1]));
}
, Flow::none
}
, {"mov.pred", "p=p", RUN{set(w, in.at[0], mask, *w.at<Mask>(in.at[1]));
}
, Flow::none
}
,

    TO_INTEGER(u16, 16), TO_INTEGER(s16, 16), TO_INTEGER(u32, 32), TO_INTEGER(s32, 32), TO_INTEGER(u64, 64),
    TO_INTEGER(s64, 64), BETWEEN(u16, 16), BETWEEN(s16, 16), BETWEEN(u32, 32), BETWEEN(s32, 32), BETWEEN(u64, 64),
    BETWEEN(s64, 64), CONVERT("f32", "f16", f32, u16, "32", "16", from_f16(x)),
    CONVERT("f32", "bf16", f32, u16, "32", "16", from_bf16(x)), CONVERT("f64", "f32", f64, f32, "64", "32", f64(x)),
    CONVERT("rn.f32", "f64", f32, f64, "32", "64", f32(x)), CONVERT("rn.f16", "f32", u16, f32, "16", "32", to_f16(x)),
    CONVERT("rn.bf16", "f32", u16, f32, "16", "32", to_bf16(x)),
    CONVERT("rz.f16", "f32", u16, f32, "16", "32", to_f16_zero(x)),
    CONVERT("rz.bf16", "f32", u16, f32, "16", "32", to_bf16_zero(x)),
    CONVERT("rna.tf32", "f32", u32, f32, "32", "32", to_tf32(x)),
    TWO("cvt.rn.f16x2.f32", "32=32,32", u32, f32, f32, u32(to_f16(x)) << 16 | to_f16(y)),
    TWO("cvt.rn.bf16x2.f32", "32=32,32", u32, f32, f32, u32(to_bf16(x)) << 16 | to_bf16(y)),
    CONVERT("rni.f32", "f32", f32, f32, "32", "32", std::nearbyint(x)),
    CONVERT("rzi.f32", "f32", f32, f32, "32", "32", std::trunc(x)),
    CONVERT("rmi.f32", "f32", f32, f32, "32", "32", std::floor(x)),
    CONVERT("rpi.f32", "f32", f32, f32, "32", "32", std::ceil(x)),

    // mov between one register and two or four parts of it
    {"pack.b32.b16", "32=16,16", RUN{two<u32, u16, u16>(w, in, mask, [](u16 x, u16 y) { return u32(y) << 16 | x; });
}
, Flow::none
}
, {"pack.b64.b32", "64=32,32", RUN{two<u64, u32, u32>(w, in, mask, [](u32 x, u32 y) { return u64(y) << 32 | x; });
}
, Flow::none
}
, {"pack.b64.b16", "64=16,16,16,16",
   RUN{const u16* p = w.at<u16>(in.at[1]), *q = w.at<u16>(in.at[2]), *r = w.at<u16>(in.at[3]), *s = w.at<u16>(in.at[4]);
each(w.at<u64>(in.at[0]), mask, [&](int i) { return u64(s[i]) << 48 | u64(r[i]) << 32 | u64(q[i]) << 16 | p[i]; });
}
, Flow::none
}
,
    // part i of a register: the source, then which
    {"part.b16.b32", "16=32,i", RUN{const int by = 16 * int(in.with[0]);
one<u16, u32>(w, in, mask, [&](u32 x) { return x >> by; });
}
, Flow::none
}
, {"part.b32.b64", "32=64,i", RUN{const int by = 32 * int(in.with[0]);
one<u32, u64>(w, in, mask, [&](u64 x) { return x >> by; });
}
, Flow::none
}
, {"part.b16.b64", "16=64,i", RUN{const int by = 16 * int(in.with[0]);
one<u16, u64>(w, in, mask, [&](u64 x) { return x >> by; });
}
, Flow::none
}
,
}
;

}  // namespace

}  // namespace lk::ptx
