// What one line of a table of instructions is made of: a value for each lane.
#pragma once
#include "machine.h"
#include "numbers.h"

namespace lk::ptx {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 s128;

// d = f(x), d = f(x, y), d = f(x, y, z) in every lane
template <typename D, typename X, typename F>
inline void one(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const X* x = w.at<X>(in.at[1]);
  each(w.at<D>(in.at[0]), mask, [&](int i) { return D(f(x[i])); });
}
template <typename D, typename X, typename Y, typename F>
inline void two(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const X* x = w.at<X>(in.at[1]);
  const Y* y = w.at<Y>(in.at[2]);
  each(w.at<D>(in.at[0]), mask, [&](int i) { return D(f(x[i], y[i])); });
}
template <typename D, typename X, typename Y, typename Z, typename F>
inline void three(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const X* x = w.at<X>(in.at[1]);
  const Y* y = w.at<Y>(in.at[2]);
  const Z* z = w.at<Z>(in.at[3]);
  each(w.at<D>(in.at[0]), mask, [&](int i) { return D(f(x[i], y[i], z[i])); });
}

// predicates are one bit a lane
inline void set(Warp& w, int32_t to, Mask mask, Mask value) {
  Mask& p = *w.at<Mask>(to);
  p = (p & ~mask) | (value & mask);
}
template <typename X, typename F>
inline Mask compare(Warp& w, const Instruction& in, int first, F&& f) {
  const X *x = w.at<X>(in.at[first]), *y = w.at<X>(in.at[first + 1]);
  Mask found = 0;
  for (int i = 0; i < LANES; i++) found |= Mask(bool(f(x[i], y[i]))) << i;
  return found;
}

// .ftz: what is below the smallest normal number counts, and comes out, as a zero of its sign
inline f32 flush(f32 v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.f, v) : v; }
// PTX's .sat of floats: between 0 and 1, NaN as 0
inline f32 saturated(f32 v) { return v != v || v < 0 ? 0.f : v > 1 ? 1.f : v; }

// two numbers of 16 bits in 32
template <typename F>
inline u32 halves(u32 x, u32 y, u32 z, F&& f) {
  return u32(f(u16(x), u16(y), u16(z))) | u32(f(u16(x >> 16), u16(y >> 16), u16(z >> 16))) << 16;
}

#define RUN [](Warp& w, const Instruction& in, Mask mask)
#define ONE(name, operands, D, X, value)                                  \
  {name, operands, RUN{one<D, X>(w, in, mask, [](X x) { return value; }); \
  }                                                                       \
  , Flow::none                                                            \
  }
#define TWO(name, operands, D, X, Y, value)                                       \
  {name, operands, RUN{two<D, X, Y>(w, in, mask, [](X x, Y y) { return value; }); \
  }                                                                               \
  , Flow::none                                                                    \
  }
#define THREE(name, operands, D, X, Y, Z, value)                                            \
  {name, operands, RUN{three<D, X, Y, Z>(w, in, mask, [](X x, Y y, Z z) { return value; }); \
  }                                                                                         \
  , Flow::none                                                                              \
  }
#define COMPARE(op, T, B, test)                                                                                        \
  {"setp." op "." #T, "p=" #B "," #B, RUN{set(w, in.at[0], mask, compare<T>(w, in, 1, [](T x, T y) { return test; })); \
  }                                                                                                                    \
  , Flow::none                                                                                                         \
  }
#define CONVERT(to, from, D, X, BD, BX, value) ONE("cvt." to "." from, BD "=" BX, D, X, value)

}  // namespace lk::ptx
