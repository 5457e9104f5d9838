// Numbers of 16 bits: comparisons, results that are cut at 0 or 1, two integers at once; and
// integers of many words. PTX ISA 9.7.1 integer, 9.7.2 extended precision, 9.7.4 half precision,
// 9.7.7 half precision comparison.
#include "lanes.h"

namespace lk::ptx {

namespace {

u16 relu(u16 v) { return v & 0x8000 ? 0 : v; }  // NaN has no sign here
f32 flushed_f16(u16 v) { return from_f16(v & 0x7c00 ? v : v & 0x8000); }
u16 cut_f16(f32 v) { return to_f16(saturated(v)); }
u16 cut_f16_fma(f32 x, f32 y, f32 z) { return to_f16(saturated(from_f16(to_f16_fma(x, y, z)))); }

// the result and its carry from x, y{, z} and a carry, each in `f` as a number that is wider;
// operands in this order
template <typename T, bool THIRD, typename F>
void carried(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const T *x = w.at<T>(in.at[2]), *y = w.at<T>(in.at[3]), *z = w.at<T>(in.at[THIRD ? 4 : 3]);
  const Mask given = *w.at<Mask>(in.at[THIRD ? 5 : 4]);
  Mask carry = 0;
  each(w.at<T>(in.at[0]), mask, [&](int i) {
    const u128 sum = f(u128(x[i]), u128(y[i]), u128(z[i]), u128(given >> i & 1));
    carry |= Mask(sum >> (sizeof(T) * 8) & 1) << i;
    return T(sum);
  });
  set(w, in.at[1], mask, carry);
}

// clang-format off: a line an instruction
#define COMPARE_AS(op, type, from, test) {"setp." op "." type, "p=16,16", RUN { set(w, in.at[0], mask, compare<u16>(w, in, 1, [](u16 a, u16 b) { const f32 x = from(a), y = from(b); return test; })); }, Flow::none}
#define COMPARED(type, from) \
  COMPARE_AS("eq", type, from, x == y), COMPARE_AS("ne", type, from, x < y || x > y), COMPARE_AS("lt", type, from, x < y), COMPARE_AS("le", type, from, x <= y), \
  COMPARE_AS("gt", type, from, x > y), COMPARE_AS("ge", type, from, x >= y), COMPARE_AS("equ", type, from, !(x < y || x > y)), COMPARE_AS("neu", type, from, x != y), \
  COMPARE_AS("ltu", type, from, !(x >= y)), COMPARE_AS("leu", type, from, !(x > y)), COMPARE_AS("gtu", type, from, !(x <= y)), COMPARE_AS("geu", type, from, !(x < y)), \
  COMPARE_AS("num", type, from, x == x && y == y), COMPARE_AS("nan", type, from, x != x || y != y)
// of 16 bits, and of two at once
#define HALF1(name, type, value) ONE(name "." type, "16=16", u16, u16, value), ONE(name "." type "x2", "32=32", u32, u32, halves(x, 0, 0, [](u16 x, u16, u16) { return value; }))
#define HALF2(name, type, value) TWO(name "." type, "16=16,16", u16, u16, u16, value), TWO(name "." type "x2", "32=32,32", u32, u32, u32, halves(x, y, 0, [](u16 x, u16 y, u16) { return value; }))
#define HALF3(name, type, value) THREE(name "." type, "16=16,16,16", u16, u16, u16, u16, value), THREE(name "." type "x2", "32=32,32,32", u32, u32, u32, u32, halves(x, y, z, [](u16 x, u16 y, u16 z) { return value; }))
#define FUNCTIONS(type, from, to) HALF1("tanh", type, to(std::tanh(from(x)))), HALF3("fma.relu", type, relu(to##_fma(from(x), from(y), from(z)))), \
  TWO("min.NaN." type "x2", "32=32,32", u32, u32, u32, halves(x, y, 0, [](u16 x, u16 y, u16) { return to(least_or_nan(from(x), from(y))); })), \
  TWO("max.NaN." type "x2", "32=32,32", u32, u32, u32, halves(x, y, 0, [](u16 x, u16 y, u16) { return to(most_or_nan(from(x), from(y))); }))
// one or two operands of 16 bits among those of 32; one rounding
#define MIXED(type, from) \
  THREE("fma.f32." type, "32=16,16,32", f32, u16, u16, f32, std::fma(from(x), from(y), z)), \
  TWO("add.f32." type, "32=16,32", f32, u16, f32, from(x) + y), TWO("sub.f32." type, "32=16,32", f32, u16, f32, from(x) - y)
#define SHORTS(name, type, T, value) TWO(name "." type "x2", "32=32,32", u32, u32, u32, halves(x, y, 0, [](u16 p, u16 q, u16) { const T x = T(p), y = T(q); return u16(value); }))
#define CARRY2(name, T, B, value) {name "." #T, #B ",p=" #B "," #B ",p", RUN { carried<T, false>(w, in, mask, [](u128 x, u128 y, u128, u128 carry) { return value; }); }, Flow::none}
#define CARRY3(name, T, B, value) {name "." #T, #B ",p=" #B "," #B "," #B ",p", RUN { carried<T, true>(w, in, mask, [](u128 x, u128 y, u128 z, u128 carry) { return value; }); }, Flow::none}
// of a difference the carry is that of x + ~y + 1, none where it borrows: what nvcc's own division
// of 128 bits relies on
#define CARRIES(T, B) CARRY2("add.carry", T, B, x + y + carry), CARRY2("sub.carry", T, B, x + T(~y) + carry), \
  CARRY3("mad.lo.carry", T, B, T(x * y) + z + carry), CARRY3("mad.hi.carry", T, B, (x * y >> B) + z + carry)

const Table entries{
    COMPARED("f16", from_f16), COMPARED("ftz.f16", flushed_f16), COMPARED("bf16", from_bf16),
    FUNCTIONS("f16", from_f16, to_f16), FUNCTIONS("bf16", from_bf16, to_bf16),
    HALF1("ex2", "f16", to_f16(std::exp2(from_f16(x)))), HALF1("ex2.ftz", "bf16", to_bf16(flush(std::exp2(flush(from_bf16(x)))))),
    HALF2("add.sat", "f16", cut_f16(from_f16(x) + from_f16(y))), HALF2("sub.sat", "f16", cut_f16(from_f16(x) - from_f16(y))),
    HALF2("mul.sat", "f16", cut_f16(from_f16(x) * from_f16(y))), HALF3("fma.sat", "f16", cut_f16_fma(from_f16(x), from_f16(y), from_f16(z))),
    SHORTS("add", "u16", u16, x + y), SHORTS("add", "s16", u16, x + y), SHORTS("min", "u16", u16, std::min(x, y)), SHORTS("max", "u16", u16, std::max(x, y)),
    SHORTS("min", "s16", s16, std::min(x, y)), SHORTS("max", "s16", s16, std::max(x, y)),
    SHORTS("min.relu", "s16", s16, std::max<s16>(std::min(x, y), 0)), SHORTS("max.relu", "s16", s16, std::max<s16>(std::max(x, y), 0)),
    TWO("pack.b16.b8", "16=16,16", u16, u16, u16, (x & 255) | y << 8),
    {"part.b8.b16", "16=16,i", RUN { const int by = 8 * int(in.with[0]); one<u16, u16>(w, in, mask, [&](u16 x) { return x >> by & 255; }); }, Flow::none},
    MIXED("f16", from_f16), MIXED("bf16", from_bf16), CARRIES(u32, 32), CARRIES(u64, 64),
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
