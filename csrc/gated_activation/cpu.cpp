// One pass: gate and up, and dy, are read once and what they give is written once.
#include <omp.h>

#include <algorithm>

#include "../common/dot.h"
#include "params.h"

namespace lk::LK_LEVEL {

namespace {

// eˣ for |x| ≤ 87, to two units in the last place: 2ⁿ · eʳ with |r| ≤ ln 2 / 2
LK_INLINE vec exponential(vec x) {
  constexpr float LOG2E = 1.44269504f, HIGH = 0.693359375f, LOW = -2.12194440e-4f;
  // so large that a number added to it is rounded to a whole one, in its last bits
  const vec large = splat(12582912.f), sum = x * splat(LOG2E) + large, n = sum - large;
  const vec r = (x - n * splat(HIGH)) - n * splat(LOW);
  vec p = splat(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = p * r + splat(c);
  return (vec)((uvec)p + (((uvec)sum - (uvec)large) << 23));
}

struct Curve {
  vec value, slope;
};
LK_INLINE vec within(vec v, float most) { return v < splat(-most) ? splat(-most) : v > splat(most) ? splat(most) : v; }
// f(g) and f'(g)
LK_INLINE Curve curve_of(vec g, bool tanh) {
  constexpr float MOST = 87.f, FAR = 16.f, ROOT = 1.59576912f, CUBE = 0.044715f;
  const vec one = splat(1.f), v = tanh ? splat(ROOT) * (g + splat(CUBE) * (g * g) * g) : g;
  const vec held = within(v, MOST), below = exponential(-held);
  // 0 below, where a large g would show what is left, and for a NaN, which g then is itself
  const vec s = (vec)((uvec)(one / (one + below)) & (uvec)(v > splat(-MOST)));
  // so does f' above: v(FAR) is beyond MOST
  const vec near = tanh ? within(g, FAR) : held;
  const vec dv = tanh ? splat(ROOT) * (one + splat(3 * CUBE) * (near * near)) : one;
  return {g * s, s + near * s * (below * s) * dv};
}

template <typename T>
void rows(const GatedActivation& p, Range tokens) {
  for (int64_t t = tokens.first; t < tokens.last; t++) {
    const T *gate = static_cast<const T*>(p.x.data) + t * p.x.row, *up = gate + p.n;
    for (int64_t i = 0; i < p.n; i += VL) {
      const int64_t left = p.n - i;
      const auto put = [&](T* to, vec v) { left >= VL ? store(to + i, v) : store_first(to + i, v, left); };
      const Curve f = curve_of(load_some(gate + i, left), p.tanh);
      const vec u = load_some(up + i, left);
      if (p.y.data) {
        put(static_cast<T*>(p.y.data) + t * p.y.row, f.value * u);
        continue;
      }
      const vec dy = load_some(static_cast<const T*>(p.dy.data) + t * p.dy.row + i, left);
      T* const to = static_cast<T*>(p.dx.data) + t * p.dx.row;
      put(to, dy * u * f.slope);
      put(to + p.n, dy * f.value);
    }
  }
}

}  // namespace

void gated_activation(const GatedActivation& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range tokens = share(p.tokens, 1, omp_get_thread_num(), omp_get_num_threads());
    with_type(p.x, [&](auto* x) { rows<std::remove_pointer_t<decltype(x)>>(p, tokens); });
  }
}

}  // namespace lk::LK_LEVEL
