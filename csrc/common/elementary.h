// What the k-space algebra asks of a number. Real is `double`, one instance (a GPU lane, or a test), or a pack
// of doubles, one instance per SIMD lane; a pack type overloads the functions of this file's first part.
#pragma once

#include <cmath>
#include <cstring>

#include "constants.h"

namespace pmrl {

PMRL_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }
PMRL_INLINE bool any(bool condition) { return condition; }
PMRL_INLINE double sqrt(double x) { return ::sqrt(x); }
PMRL_INLINE double abs(double x) { return ::fabs(x); }

// 2^n for an integral n in [-1022, 1023], from the bits of n + 1023 + 1.5 * 2^52: no integer conversion needed.
PMRL_INLINE double pow2(double n) {
  double shifted = n + (6755399441055744.0 + 1023.0);
  unsigned long long bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  memcpy(&shifted, &bits, sizeof bits);
  return shifted;
}

// 2^floor(log2 x) for a positive normal x: its exponent bits alone.
PMRL_INLINE double binade(double x) {
  unsigned long long bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7ff0000000000000ull;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

// Single precision, for what need not be exact.
PMRL_INLINE float narrow(double x) { return static_cast<float>(x); }
PMRL_INLINE double widen(float x) { return x; }
PMRL_INLINE float sqrt(float x) { return ::sqrtf(x); }

template <class Real>
PMRL_INLINE Real max(Real a, Real b) {
  return select(a < b, b, a);
}

// Nearest integer, for |x| < 2^51.
template <class Real>
PMRL_INLINE Real round(Real x) {
  const Real magic(6755399441055744.0);
  return (x + magic) - magic;
}

// x * 2^e, exactly, for |e| <= 2044. In two steps: 2^1074, which lifts the least subnormal, is no float64.
template <class Real>
PMRL_INLINE Real scaled(Real x, Real e) {
  Real half = round(e * Real(0.5));
  return x * pow2(half) * pow2(e - half);
}

template <class Real>
PMRL_INLINE Real reciprocal(Real x) {  // 1/x, and 0 where x = 0: a zero vector has no direction
  return select(x == Real(0.0), Real(0.0), Real(1.0) / x);
}

// exp(x) for x <= 0: 2^n times a Taylor polynomial on |r| <= ln(2)/2. Below -708, where the result would be
// subnormal, 0. Error below 1 ulp.
template <class Real>
PMRL_INLINE Real exp_nonpositive(Real x) {
  const Real y = max(x, Real(-708.0));  // a NaN stays: it is not below
  const Real n = round(y * Real(1.4426950408889634074));
  Real r = y - n * Real(6.93147180369123816490e-01);
  r = r - n * Real(1.90821492927058770002e-10);
  constexpr double inverse_factorials[] = {
      1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
      1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5,
      1.0,                1.0};
  Real p(inverse_factorials[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 14; ++i) p = p * r + Real(inverse_factorials[i]);
  return select(x < Real(-708.0), Real(0.0), p * pow2(n));
}

// log(1 + x) for 0 <= x < 31.9: e ln 2 + 2 atanh(f / (2 + f)) with 1 + f = (1 + x) / 2^e in [sqrt(1/2), sqrt(2)].
// Small x is its own f, so nothing cancels. Error below 2 ulp.
template <class Real>
PMRL_INLINE Real log1p_nonnegative(Real x) {
  const Real u = Real(1.0) + x;
  // what rounding 1 + x lost
  const Real lost = select(x < Real(1.0), x - (u - Real(1.0)), Real(1.0) - (u - x));
  Real scale(1.0), e(0.0);
#pragma GCC unroll 8
  for (int i = 0; i < 5; ++i) {
    const auto above = u >= Real(1.41421356237309504880 * (1 << i));
    scale = select(above, Real(1.0 / (2 << i)), scale);
    e = select(above, Real(i + 1.0), e);
  }
  const auto small = u < Real(1.41421356237309504880);
  const Real f = select(small, x, u * scale - Real(1.0));
  const Real s = f / (Real(2.0) + f);
  const Real s2 = s * s;
  Real p(1.0 / 23.0);
#pragma GCC unroll 16
  for (int i = 21; i >= 1; i -= 2) p = p * s2 + Real(1.0 / i);
  const Real mantissa = Real(2.0) * s * p;
  const Real rest = mantissa + select(small, Real(0.0), lost / u);
  return e * Real(6.93147180369123816490e-01) + (e * Real(1.90821492927058770002e-10) + rest);
}

}  // namespace pmrl
