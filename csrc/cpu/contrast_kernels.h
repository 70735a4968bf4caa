// The contrasts, between the matrix products that make similarities s_ij = x_i . y_j and gradients: passes over tiles
// of s (kernels.h describes a tile). With delta_ij = (s_ij - positive_i) / tau,
//
//   tile_maxima   max_j s_ij of each row and max_i s_ij of each column             reads s
//   tile_sums     sum_j exp((s_ij - shift_i) / tau), of columns likewise; or       reads s, shifts and maxima
//                 sum exp(s_ij / tau) where no such power leaves the number range
//   tile_weights  G_ij = scale (P_ij + R_ij), P and R the probabilities with       reads s, writes G, maybe into the
//                 which rows choose columns and columns choose rows; and           memory of s
//                 sum P delta, of columns R delta
//   row_dots      x_i . y_i                                                        reads rows of x and y
//
// A tile is cut into groups of columns, each of them one thread's. Its rows are padded with -inf to whole packs. V is a
// pack of the tile's numbers: Floats or Pack (of doubles). Exponentials are powers of two; `factor` is log2(e) / tau.
#pragma once

#include "passes.h"

namespace pmrl {
namespace {

// A sum of floats has at most this many terms; the sum of those sums is a double.
constexpr int64_t kShortSum = 32;

template <class V>
PMRL_INLINE double max_of(V x) {
  constexpr int width = Lanes<V>::width;
  typename Lanes<V>::Element entry[width];
  x.store(entry);
  double found = entry[0];
  for (int i = 1; i < width; ++i) found = entry[i] > found ? entry[i] : found;
  return found;
}

// The largest entry of every row into row_parts and, if `columns` are wanted, of every column into column_maxima. A NaN
// may be lost here; the sums find it.
template <class V>
void tile_maxima(const ForwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  using Element = typename Lanes<V>::Element;
  constexpr int width = Lanes<V>::width;
  const Element* s = static_cast<const Element*>(t.similarity);
  Element* column_maxima = static_cast<Element*>(t.column_maxima);
  const V least(-__builtin_inf());
  for (int64_t j = begin; j < end && columns; j += width) least.store(column_maxima + j);
  for (int64_t i = 0; i < t.rows; ++i) {
    const Element* row = s + i * t.stride;
    V largest = least;
    for (int64_t j = begin; j < end; j += width) {
      const V x = V::load(row + j);
      largest = max(largest, x);
      if (columns) max(V::load(column_maxima + j), x).store(column_maxima + j);
    }
    t.row_parts[group * t.rows + i] = max_of(largest);
  }
}

// Sums of 2^((s - row_shift) factor) of every row into row_parts. Those of columns, if wanted, are added to
// column_sums, which are relative to column_shift: where column_maxima has a larger number, both are brought up to it
// first. Shared: sums of 2^(s factor - offset), where one exponential of an entry serves its row and its column.
template <class V, bool Shared>
void tile_sums(const ForwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  using Element = typename Lanes<V>::Element;
  constexpr int width = Lanes<V>::width;
  const Element* s = static_cast<const Element*>(t.similarity);
  const Element* row_shift = static_cast<const Element*>(t.row_shift);
  const V factor(t.factor), offset(Shared ? t.offset : 0.0);
  alignas(64) Element shift[kTileColumns], partial[kTileColumns];
  for (int64_t j = begin; j < end && columns && !Shared; ++j) {
    Element& old = static_cast<Element*>(t.column_shift)[j];
    const Element found = static_cast<const Element*>(t.column_maxima)[j];
    if (found > old) {
      t.column_sums[j] *= exp_nonpositive((static_cast<double>(old) - found) * t.factor * kLog2);
      old = found;
    }
    shift[j - begin] = old == -__builtin_inf() ? Element(0) : old;
  }
  for (int64_t first = 0; first < t.rows; first += kShortSum) {
    const int64_t last = first + kShortSum < t.rows ? first + kShortSum : t.rows;
    for (int64_t j = 0; j < end - begin && columns; j += width) V(0.0).store(partial + j);
    for (int64_t i = first; i < last; ++i) {
      const Element* row = s + i * t.stride + begin;
      const V own(Shared ? 0.0 : row_shift[i]);
      V total(0.0);
      for (int64_t j = 0; j < end - begin; j += width) {
        const V x = V::load(row + j);
        const V e = exp2_of_product(Shared ? x : x - own, factor, offset);
        total = total + e;
        if (!columns) continue;
        const V theirs = Shared ? e : exp2_of_product(x - V::load(shift + j), factor, offset);
        (V::load(partial + j) + theirs).store(partial + j);
      }
      t.row_parts[group * t.rows + i] = sum(total);
    }
    for (int64_t j = 0; j < end - begin && columns; ++j) t.column_sums[begin + j] += partial[j];
  }
}

// G into weights, which may be the similarities' own memory. If slopes are wanted, the sum of P (s - positive) into
// them if they are of rows, and of R (s - positive) if `columns` are.
template <class V, Powers kPowers>
void tile_weights(const BackwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  using Element = typename Lanes<V>::Element;
  constexpr int width = Lanes<V>::width;
  const Element* s = static_cast<const Element*>(t.similarity);
  Element* weights = static_cast<Element*>(t.weights);
  const auto row = [](const void* from, int64_t i) { return V(static_cast<const Element*>(from)[i]); };
  const auto load = [](const void* from, int64_t j) { return V::load(static_cast<const Element*>(from) + j); };
  constexpr bool Shared = kPowers == Powers::kShared, Bounded = kPowers == Powers::kBounded;
  const V factor(t.factor), common(t.offset), scale(t.scale), zero(0.0), limit(t.limit);
  const auto power = [&](V difference, V offset) {
    if (Bounded) difference = select(limit < difference, limit, difference);  // a NaN stays one
    return exp2_of_product<Bounded>(difference, factor, offset);
  };
  double slope = 0.0;  // halved, as differences of two Elements need not be any
  const V half(0.5);
  for (int64_t i = 0; i < t.rows; ++i) {
    const V positive = half * row(t.row.positive, i), shift = row(t.row.shift, i), weight = row(t.row.weight, i);
    const V offset = Shared ? common : row(t.row.offset, i);
    V total(0.0);
    for (int64_t j = begin; j < end; j += width) {
      const V x = V::load(s + i * t.stride + j), theirs = load(t.column.weight, j);
      V P, R;
      if (Shared) {
        const V e = exp2_of_product(x, factor, offset);
        P = e * weight;
        R = e * theirs;
      } else {
        P = power(x - shift, offset) * weight;
        R = power(x - load(t.column.shift, j), load(t.column.offset, j)) * theirs;
      }
      ((P + R) * scale).store(weights + i * t.stride + j);
      if (t.slopes) {  // 0 beside an infinite delta counts as 0
        const V y = half * x;
        if (t.row_slopes) total = total + select(P == zero, zero, P * (y - positive));
        if (columns) total = total + select(R == zero, zero, R * (y - half * load(t.column.positive, j)));
      }
    }
    if (t.slopes) slope += sum(total);
  }
  if (t.slopes) t.slopes[group] = 2.0 * slope;
}

void maxima(const ForwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  (t.is_float64 ? tile_maxima<Pack> : tile_maxima<Floats>)(t, group, begin, end, columns);
}

void sums(const ForwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  const auto pass = t.shared ? (t.is_float64 ? tile_sums<Pack, true> : tile_sums<Floats, true>)
                             : (t.is_float64 ? tile_sums<Pack, false> : tile_sums<Floats, false>);
  pass(t, group, begin, end, columns);
}

void weights(const BackwardTile& t, int64_t group, int64_t begin, int64_t end, bool columns) {
  const auto of = [&](auto shared, auto relative, auto bounded) {
    const auto pass = t.powers == Powers::kShared ? shared : t.powers == Powers::kRelative ? relative : bounded;
    pass(t, group, begin, end, columns);
  };
  if (t.is_float64)
    of(&tile_weights<Pack, Powers::kShared>, &tile_weights<Pack, Powers::kRelative>,
       &tile_weights<Pack, Powers::kBounded>);
  else
    of(&tile_weights<Floats, Powers::kShared>, &tile_weights<Floats, Powers::kRelative>,
       &tile_weights<Floats, Powers::kBounded>);
}

void row_dots(const Rows& x, const Rows& y, int64_t d, int64_t begin, int64_t end, double* out) {
  const bool is_float64 = x.dtype == Dtype::kFloat64;  // y's too
  for (int64_t i = begin; i < end; ++i)
    out[i] = dot(FloatRow{x.data + i * x.stride, is_float64}, {y.data + i * y.stride, is_float64}, d);
}

}  // namespace
}  // namespace pmrl
