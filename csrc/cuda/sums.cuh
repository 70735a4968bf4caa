// Sums over the entries of rows: in float64, or, of embeddings of up to 32 bits on cards whose float64 is slow, in pairs
// of float32 that carry 48 bits.
//
//   add_product(s, a, b)    s += a b, for entries a and b, or an entry and a sum
//   add_multiple(s, c, x)   s += c x, for a coefficient c and an entry or a sum x
//   settle(s)               after some of these: a pair's lower part becomes small again
//
// The product of two float32 and its rounding error are two instructions, a sum and its error six. Each addition loses up
// to 2^-49 of the sum, where all terms are equal always in the same direction. float32 has powers of two from -126 to 127
// alone, so what may leave these (see in_reach) is for float64 on any card.
#pragma once

#include <type_traits>

#include "arguments.h"

namespace pmrl {
namespace cuda {

#define PMRL_ON_DEVICE static __device__ __forceinline__

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Mixed {};  // each embedding has its own dtype
template <class T>
constexpr bool kIsMixed = std::is_same<T, Mixed>::value;

struct Pair {
  float high, low;
};

// Whether embeddings of dtype T are summed in pairs. Mixed ones are not: there may be float64 among them.
template <class T>
constexpr bool kInPairs = !kFastFloat64 && !std::is_same<T, double>::value && !kIsMixed<T>;

// What embeddings of dtype T are summed in; and entries of rows in such sums.
template <class T>
using Sum = std::conditional_t<kInPairs<T>, Pair, double>;
template <class S>
using Entry = std::conditional_t<std::is_same<S, Pair>::value, float, double>;

// a + b, and what rounding that has lost. Additions alone, so that nothing is fused.
PMRL_ON_DEVICE float two_sum(float a, float b, float& lost) {
  const float s = a + b, t = s - a;
  lost = (a - (s - t)) + (b - t);
  return s;
}

PMRL_ON_DEVICE double value(double s) { return s; }
PMRL_ON_DEVICE double value(Pair s) { return static_cast<double>(s.high) + static_cast<double>(s.low); }
// As an entry. A sum beyond float32 is infinite, though its lower part is a NaN.
PMRL_ON_DEVICE double rounded(double s) { return s; }
PMRL_ON_DEVICE float rounded(Pair s) {
  const float y = s.high + s.low;
  return y == y ? y : s.high;
}

template <class S>
PMRL_ON_DEVICE S as_sum(double x);
template <>
__device__ __forceinline__ double as_sum<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ Pair as_sum<Pair>(double x) {
  float high = static_cast<float>(x), low = static_cast<float>(x - static_cast<double>(high));
  asm volatile("" : "+f"(high), "+f"(low));  // or else compilers move all that into the loops that take these
  return {high, low};
}

PMRL_ON_DEVICE void add_product(double& s, double a, double b) { s = ::fma(a, b, s); }
PMRL_ON_DEVICE void add_product(Pair& s, float a, float b) {
  const float product = __fmul_rn(a, b);  // or else compilers fuse it with the sum, and add another number
  float lost;
  s.high = two_sum(s.high, product, lost);
  s.low += __fmaf_rn(a, b, -product) + lost;
}
PMRL_ON_DEVICE void add_product(Pair& s, float a, Pair b) {
  add_product(s, a, b.high);
  s.low = __fmaf_rn(a, b.low, s.low);
}

PMRL_ON_DEVICE void add_multiple(double& s, double c, double x) { s = ::fma(c, x, s); }
PMRL_ON_DEVICE void add_multiple(Pair& s, Pair c, float x) { add_product(s, x, c); }
PMRL_ON_DEVICE void add_multiple(Pair& s, Pair c, Pair x) {
  add_product(s, c.high, x);
  s.low = __fmaf_rn(c.low, x.high, s.low);
}

PMRL_ON_DEVICE void add_entry(double& s, double x) { s += x; }
PMRL_ON_DEVICE void add_entry(Pair& s, float x) {
  float lost;
  s.high = two_sum(s.high, x, lost);
  s.low += lost;
}

template <class S, class X>
PMRL_ON_DEVICE S multiple(S c, X x) {
  S s{};
  add_multiple(s, c, x);
  return s;
}
PMRL_ON_DEVICE double multiple(double c, double x) { return c * x; }

PMRL_ON_DEVICE void settle(double&) {}
PMRL_ON_DEVICE void settle(Pair& s) {
  const float high = s.high + s.low;
  s.low -= high - s.high;
  s.high = high;
}

PMRL_ON_DEVICE double opposite(double s) { return -s; }
PMRL_ON_DEVICE Pair opposite(Pair s) { return {-s.high, -s.low}; }

PMRL_ON_DEVICE void add(double& s, double x) { s += x; }
PMRL_ON_DEVICE void add(Pair& s, Pair x) {
  float lost;
  s.high = two_sum(s.high, x.high, lost);
  s.low = (s.low + x.low) + lost;  // the same for both lanes of two that add up what each other has
  settle(s);
}

PMRL_ON_DEVICE double from_lane(double x, int by) { return __shfl_xor_sync(~0u, x, by); }
PMRL_ON_DEVICE Pair from_lane(Pair x, int by) {
  return {__shfl_xor_sync(~0u, x.high, by), __shfl_xor_sync(~0u, x.low, by)};
}

PMRL_ON_DEVICE bool is_finite(Pair s) { return s.high * 0.0f == 0.0f; }

// Whether pairs have all bits of multiples of a coefficient c, or all that a float32 in the end shows: c is 0, or its
// power of two is between -100 and 60, so that its lower part is a float32, and no product with an entry below 2^67 is
// infinite. What is not finite is out of reach.
PMRL_ON_DEVICE bool in_reach(double c) {
  const unsigned exponent = static_cast<unsigned>(__double2hiint(c)) >> 20 & 0x7ff;
  return exponent - (1023 - 100) <= 160 || c == 0.0;
}
// And of a sum of squares: those of entries that matter have lower parts, too, and a product of two such sums is finite.
constexpr float kLeastSquareOfPairs = 0x1p-60f, kLargestSquareOfPairs = 0x1p100f;
// Inner products of rows of norm n with others are in reach if the largest entry of these is this over n.
constexpr double kLeastProductOfPairs = 0x1p-90;

}  // namespace cuda
}  // namespace pmrl
