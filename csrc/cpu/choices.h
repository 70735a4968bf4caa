// What every contrast makes of similarities, whatever they are: losses from sums of powers, and of losses the numbers
// from which probabilities come, see TileSide and Powers. Powers are of two; with s+ the similarity of the positive,
//
//   loss = log(1 + sum exp((s - s+) / tau))        P = exp((s - s+) / tau - loss) = weight 2^((s - shift) factor - offset)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace pmrl {
namespace {

// log(1 + sum 2^power)
inline double loss_of(double power, double sum) {
  const double x = power * kLog2 + std::log(sum);
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

// Of similarities that are Elements.
template <class Element>
struct Sharpness {
  double factor;     // log2(e) / tau as an Element, in forward and backward: two roundings of it would not fit together
  double steepness;  // the same, also where log2(e) / tau is larger than any Element

  static constexpr double kRounding = std::numeric_limits<Element>::epsilon();
  static constexpr double kDigits = 1 / (8 * kRounding);  // exponents up to here have digits after the point
  static constexpr double kTold = 0x1p42;                 // losses up to here are exact to 2^-10

  explicit Sharpness(double temperature)
      : factor(static_cast<Element>(std::min<double>(1 / (temperature * kLog2), std::numeric_limits<Element>::max()))),
        steepness(factor < std::numeric_limits<Element>::max() ? factor : 1 / (temperature * kLog2)) {}

  // Differences of similarities beyond this are cut off, with Powers::kBounded.
  double limit() const { return 2 * kDigits / factor; }

  // What one vector's probabilities are made of.
  struct Choice {
    double shift, offset, weight;
  };

  // Relative to log sum exp, rounded to an Element. Relative to a positive far away, the rounding error of a difference of
  // similarities would be one of the exponent. `bounded`: rounding a similarity or a loss may change a power of two a lot.
  Choice choice(double positive, double loss, bool bounded) const {
    constexpr double kLargest = std::numeric_limits<Element>::max();  // by a large tau the loss is more
    const double powers = loss / kLog2;
    const double shift = static_cast<Element>(std::clamp(positive + powers / steepness, -kLargest, kLargest));
    const double rest = powers - (shift - positive) * steepness;
    if (!(bounded && (powers > kTold || std::abs(rest) > kDigits)))  // NaN stays NaN
      return {shift, std::floor(rest), std::exp2(std::floor(rest) - rest)};
    // The loss is too inexact to tell how many similarities share the largest value. Each of them, and each that comes
    // near enough to be the largest if products are summed in another order, gets half of the 2 at which powers are cut
    // off.
    return {shift - (8 * kRounding * (std::abs(powers / steepness) + std::abs(shift)) + 1 / steepness), 0.0, 0.5};
  }
};

}  // namespace
}  // namespace pmrl
