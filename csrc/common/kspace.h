// The loss and its gradient in k-space, where an instance is a few k x k numbers (docs/mathematics.md has the proofs):
//
//   forward   from the Gram matrix G = X^T X of an instance X (d, k) to its singular values sigma_j = sqrt(lambda_j),
//             its leading vector v1, and its alignment term, log(sum_j exp((sigma_j - sigma_1) / tau)) or
//             ||X|| - sigma_1
//             and 1/||y_m||, y_m = sum_{j != m} a_j z_j with a = |v1|, of the directions w_m = y_m/||y_m||
//   backward  from incoming gradients to the coefficients C (k, k), c, shared and own (k,) of
//             dX = h c^T + R shared^T + g diag(own) + X C + direct gradients, h = dL/du1 (d,), g_m = dL/dw_m (d,),
//             R = sum_m g_m/||y_m||
//
// Reads and writes nothing but its arguments. `Columns` are those of X: modalities.
#pragma once

#include "eigen.h"

namespace pmrl {

// What is the same for all instances of a batch.
struct Settings {
  int k;               // modalities
  int count;           // min(d, k), the number of singular values
  double tau;          // temperature; NaN if it was not a positive number
  bool normalize;      // columns are divided by their norms
  bool spectrum;       // all eigenpairs and the softmax objective; else the leading pair and ||X|| - sigma_1
  bool float64_input;  // an embedding is float64: other thresholds, and columns are scaled by powers of two
  bool decompose;      // anything but z is asked for
  bool others;         // the w are asked for
};

// One instance's (or pack's) normalisation and mask. Numbers may be a vector that is elsewhere than in registers.
template <int K, class Real, class Numbers = Vector<K, Real>>
struct Columns {
  Numbers inverse_norms;  // 1/n, 0 for zero vectors; with `normalize`
  Numbers exponents;      // e: column m was scaled by 2^-e before G was formed; with `float64_input`
  Numbers present;        // 1 or 0
  Numbers others;         // 1/||y_m||, see inverse_norms_of_others; with `others`
};

template <int K, class Real, class Numbers>
PMRL_INLINE Real number_present(const Columns<K, Real, Numbers>& c, int k) {
  Real sum(0.0);
  PMRL_EVERY for (int m = 0; m < k; ++m) sum = sum + c.present.at[m];
  return sum;
}

// G_ij <- G_ij / (n_i n_j), dividing by one norm after the other, as the product of two may underflow.
template <int K, class Real>
PMRL_INLINE void normalise_gram(Matrix<K, Real>& G, Columns<K, Real>& c, int k) {
  PMRL_EVERY for (int m = 0; m < k; ++m) {
    const Real norm = sqrt(G.at[m][m]);
    c.inverse_norms.at[m] = reciprocal(norm);
    G.at[m][m] = select(norm == Real(0.0), Real(0.0), Real(1.0) + norm * Real(0.0));
  }
  PMRL_EVERY for (int i = 0; i < k; ++i)
    PMRL_EVERY for (int j = i + 1; j < k; ++j) G.at[i][j] = G.at[i][j] * c.inverse_norms.at[i] * c.inverse_norms.at[j];
}

// The Gram matrix has k eigenvalues, an instance of k' present modalities min(d, k') singular values. The other
// eigenvalues are rounding errors and become 0; they are no logits of the softmax. `broken` is 0 or NaN.
template <int K, class Real>
PMRL_INLINE void drop_surplus(Vector<K, Real>& values, const Columns<K, Real>& c, const Settings& s, Real broken) {
  const Real present = number_present(c, s.k);
  PMRL_EVERY for (int j = 0; j < s.k; ++j) {
    const auto is_value = (Real(j) < present) & (Real(j) < Real(s.count));
    values.at[j] = select(is_value, values.at[j], Real(0.0)) + broken;
  }
}

// Gaps (sigma_1 - sigma_j) / tau and weights exp(-gap), which are 0 at j = 0 and where there is no logit. Returns the
// sum of the weights.
template <int K, class Real, class Numbers>
PMRL_INLINE Real softmax_weights(const Vector<K, Real>& sigma, const Columns<K, Real, Numbers>& c, const Settings& s,
                                 Vector<K, Real>& gaps, Vector<K, Real>& weights) {
  const Real present = number_present(c, s.k);
  const bool rescale = s.float64_input && !s.normalize;
  Real sum(0.0);
  gaps.at[0] = weights.at[0] = Real(0.0);
  PMRL_EVERY for (int j = 1; j < s.k; ++j) {
    Real gap = sigma.at[0] - sigma.at[j];
    if (rescale) gap = scaled(gap, c.exponents.at[0]);
    gap = gap / Real(s.tau);
    const auto is_logit = (Real(j) < present) & (Real(j) < Real(s.count));
    gaps.at[j] = gap;
    weights.at[j] = select(is_logit, exp_nonpositive(-gap), Real(0.0));
    sum = sum + weights.at[j];
  }
  return sum;
}

// The alignment term: log1p(sum of weights), or ||X|| - sigma_1 as (tr G - lambda_1) / (||X|| + sigma_1), which does
// not cancel. With fewer than two modalities 0, unless one holds a NaN: that must show.
template <int K, class Real>
PMRL_INLINE Real alignment(const Vector<K, Real>& values, Real trace, const Columns<K, Real>& c, const Settings& s) {
  Real result;
  if (s.spectrum) {
    Vector<K, Real> sigma, gaps, weights;
    PMRL_EVERY for (int j = 0; j < s.k; ++j) sigma.at[j] = sqrt(values.at[j]);
    result = log1p_nonnegative(softmax_weights(sigma, c, s, gaps, weights));
    result = result + Real(s.tau * 0.0);  // a bad temperature shows even where there is no logit
  } else {
    const Real rest = max(trace - values.at[0], Real(0.0));
    result = rest * reciprocal(sqrt(trace) + sqrt(values.at[0]));
    if (s.float64_input && !s.normalize) result = scaled(result, c.exponents.at[0]);
  }
  const auto alignable = number_present(c, s.k) >= Real(2.0);
  result = select(alignable | (result != result), result, Real(0.0));
  return result + values.at[0] * Real(0.0);  // NaN where an eigenvalue is
}

// 1/||y_m||, y_m = sum_{j != m} a_j z_j with a = |v|, from b = G a and the diagonal of G:
//   ||y_m||^2 = a.b - 2 a_m b_m + a_m^2 G_mm
// 0 where that norm counts as zero: the others are nothing beside m, or cancel.
template <int K, class Real>
PMRL_FUNCTION void inverse_norms_of_others(const Matrix<K, Real>& G, const Vector<K, Real>& v, int k,
                                         Vector<K, Real>& out) {
  Vector<K, Real> a, b;
  Real square(0.0), size(0.0);
  PMRL_EVERY for (int m = 0; m < k; ++m) a.at[m] = abs(v.at[m]);
  multiply(G, a, b, k);
  PMRL_EVERY for (int m = 0; m < k; ++m) {
    square = square + a.at[m] * b.at[m];
    size = size + a.at[m] * sqrt(G.at[m][m]);
  }
  const Real zero = Real(kCancelled * kCancelled) * size * size;
  PMRL_EVERY for (int m = 0; m < k; ++m) {
    const Real y = square - Real(2.0) * a.at[m] * b.at[m] + a.at[m] * a.at[m] * G.at[m][m];
    out.at[m] = select(y <= zero, Real(0.0), reciprocal(sqrt(y)));
  }
}

// Incoming gradients of one instance (or pack), and what they become.
template <int K, class Real, class Numbers = Vector<K, Real>>
struct Incoming {
  Real alignment;  // dL/d alignment
  Numbers sigma;   // dL/d sigma_j
  Numbers w;       // Z^T dL/du_1, Z having normalised columns where X is normalised (X^T dL/du_1 on entry)
  Numbers q;       // dL/dv_1
  Numbers direct;  // z_m . dL/dz_m (x_m . dL/dz_m on entry)
  Numbers others;  // z_j . sum_{m != j} g_m/||y_m|| (x_j instead on entry)
  Numbers along;   // w_m . g_m
};

template <int K, class Real, class Entries = Matrix<K, Real>, class Numbers = Vector<K, Real>>
struct Coefficients {
  Entries C;         // symmetric, upper triangle; Entries may keep them elsewhere
  Numbers c;         // of dL/du_1
  Numbers shared;    // of R
  Numbers own;       // of g_m
  Numbers exponent;  // e: dX's column m is 2^e times what C and c give; with `float64_input`
  Real slope;        // dL/d tau
};

// Gradient of a function of the singular values, from g_j = dL/d sigma_j: M = V diag(g_j / sigma_j) V^T, and the
// diagonal of G M into `radial`. Below the floor, where sigma_j is rounding error, the weight is 0 (the minimum-norm
// subgradient). In a tied top eigenspace the orientation rule determines v1, and all other vectors there get the mean
// of their weights, so that M does not depend on the basis that the solver found.
template <int K, class Real, class Pairs, class Entries>
PMRL_FUNCTION void through_spectrum(const Vector<K, Real>& g, const Pairs& E, const Vector<K, Real>& v,
                                  const Settings& s, Entries& M, Vector<K, Real>& radial) {
  const Real top = E.value(0);
  Vector<K, Real> weight;
  Real shared(0.0), others(0.0);
  PMRL_EVERY for (int j = 0; j < s.k; ++j) {
    const Real value = E.value(j);
    const auto resolved = value > Real(eigenvalue_floor(s.k, s.float64_input)) * top;
    weight.at[j] = select(resolved | (value != value), quotient(g.at[j], sqrt(value)), Real(0.0));
    if (j > 0) {
      const auto tied = is_tied(top, value, eigenvalue_gap(s.k, s.float64_input));
      shared = shared + select(tied, weight.at[j], Real(0.0));
      others = others + select(tied, Real(1.0), Real(0.0));
    }
  }
  shared = quotient(shared, max(others, Real(1.0)));
  const Real first = weight.at[0] - shared;
  PMRL_EVERY for (int j = 0; j < s.k; ++j)
    weight.at[j] = select(is_tied(top, E.value(j), eigenvalue_gap(s.k, s.float64_input)), shared, weight.at[j]);
  PMRL_EVERY for (int i = 0; i < s.k; ++i) {
    Vector<K, Real> row;
    Real along(0.0);
    PMRL_EVERY for (int j = 0; j < s.k; ++j) {
      row.at[j] = E.entry(i, j) * weight.at[j];
      along = along + row.at[j] * E.entry(i, j) * E.value(j);
    }
    radial.at[i] = along + first * top * v.at[i] * v.at[i];
    PMRL_EVERY for (int m = i; m < s.k; ++m) {
      Real sum = first * v.at[i] * v.at[m];
      PMRL_EVERY for (int j = 0; j < s.k; ++j) sum = sum + row.at[j] * E.entry(m, j);
      M.entry(i, m) = sum;
    }
  }
}

// Gradient through u_1 and v_1, from w = Z^T dL/du_1 and q = dL/dv_1:
//   N = y v^T + v y^T - (v.w) / sigma_1^3 v v^T,  y = sum_j v_j v_j^T (w / sigma_1 + q) / (lambda_1 - lambda_j)
// over the eigenvectors that are not tied with the first. Finds y and (v.w) / sigma_1^3, and adds diag(G N) to `radial`.
template <int K, class Real, class Pairs, class Numbers>
PMRL_FUNCTION void through_vectors(const Incoming<K, Real, Numbers>& in, const Pairs& E, const Vector<K, Real>& v,
                                 Real inverse_sigma, const Settings& s, Vector<K, Real>& y, Real& along,
                                 Vector<K, Real>& radial) {
  const Real top = E.value(0);
  Vector<K, Real> Gy;
  along = Real(0.0);
  PMRL_EVERY for (int m = 0; m < s.k; ++m) {
    y.at[m] = Gy.at[m] = Real(0.0);
    along = along + v.at[m] * in.w.at[m];
  }
  along = along * inverse_sigma * inverse_sigma * inverse_sigma;
  PMRL_EVERY for (int j = 0; j < s.k; ++j) {
    Real dot(0.0);
    PMRL_EVERY for (int m = 0; m < s.k; ++m) dot = dot + E.entry(m, j) * (in.w.at[m] * inverse_sigma + in.q.at[m]);
    const Real gap = top - E.value(j);
    const auto tied = is_tied(top, E.value(j), eigenvalue_gap(s.k, s.float64_input));
    const Real share = select(tied, dot * Real(0.0), quotient(dot, gap));
    PMRL_EVERY for (int m = 0; m < s.k; ++m) {
      y.at[m] = y.at[m] + share * E.entry(m, j);
      Gy.at[m] = Gy.at[m] + share * E.value(j) * E.entry(m, j);
    }
  }
  PMRL_EVERY for (int i = 0; i < s.k; ++i)
    radial.at[i] = radial.at[i] + v.at[i] * (Gy.at[i] + top * (y.at[i] - along * v.at[i]));
}

// Gradient through the w, from what the gradients g_m of these are along the z and the w. With r_m = 1/||y_m||,
// t_m = (w_m . g_m) r_m^2, T their sum, and h_m = r_m (g_m - w_m w_m . g_m),
//   dL/da_j = z_j . sum_{m != j} h_m = others_j - b_j (T - t_j) + (G (t a))_j - G_jj t_j a_j,  b = G a
//   dL/dz_j = a_j sum_{m != j} h_m = a_j (R - r_j g_j) + [Z A]_j,  A_jl = -a_j a_l (T - t_j - t_l), A_jj = -a_j^2 (T - t_j)
// Finds t and T, adds sign(v) dL/da to q and z_j . dL/dz_j to `radial`. At v_j = 0, as far as that can be told, |v_j| has slope 0.
template <int K, class Real, class Pairs, class Numbers>
PMRL_FUNCTION void through_others(Incoming<K, Real, Numbers>& in, const Pairs& E, const Vector<K, Real>& v,
                                const Columns<K, Real, Numbers>& c, const Settings& s, Vector<K, Real>& t, Real& T,
                                Vector<K, Real>& radial) {
  const Real top = E.value(0);
  Vector<K, Real> b, p, diagonal;
  T = Real(0.0);
  PMRL_EVERY for (int m = 0; m < s.k; ++m) {
    t.at[m] = in.along.at[m] * c.others.at[m] * c.others.at[m];
    T = T + t.at[m];
    b.at[m] = p.at[m] = diagonal.at[m] = Real(0.0);
  }
  Real next(0.0);  // the largest eigenvalue that is not tied
  PMRL_EVERY for (int n = 0; n < s.k; ++n) {
    Real of_a(0.0), of_ta(0.0);
    PMRL_EVERY for (int m = 0; m < s.k; ++m) {
      const Real share = E.entry(m, n) * abs(v.at[m]);
      of_a = of_a + share;
      of_ta = of_ta + share * t.at[m];
    }
    const Real value = E.value(n);
    PMRL_EVERY for (int m = 0; m < s.k; ++m) {
      const Real scaled_entry = E.entry(m, n) * value;
      b.at[m] = b.at[m] + scaled_entry * of_a;
      p.at[m] = p.at[m] + scaled_entry * of_ta;
      diagonal.at[m] = diagonal.at[m] + scaled_entry * E.entry(m, n);
    }
    const auto tied = is_tied(top, value, eigenvalue_gap(s.k, s.float64_input));
    next = max(next, select(tied, Real(0.0), value));
  }
  const Real zero = Real(zero_sum(s.k)) * top, gap = top - next;
  PMRL_EVERY for (int j = 0; j < s.k; ++j) {
    const Real a = abs(v.at[j]);
    const Real slope = in.others.at[j] - b.at[j] * (T - t.at[j]) + p.at[j] - diagonal.at[j] * t.at[j] * a;
    radial.at[j] = radial.at[j] + a * slope;
    const Real signed_slope = select(v.at[j] < Real(0.0), -slope, slope);
    in.q.at[j] = in.q.at[j] + select(a * gap <= zero, Real(0.0), signed_slope);
  }
}

// What gradients come through.
struct Through {
  bool values;   // the alignment term and singular values
  bool leading;  // u_1 and v_1
  bool others;   // the w
};

// Whether gradients take more than the forward pass has decomposed: all eigenpairs, of which without `spectrum` the
// leading one alone is known.
PMRL_INLINE bool takes_eigenpairs(Through through, const Settings& s) {
  return !s.spectrum && (through.leading || through.others);
}

// From all incoming gradients to the coefficients. `top` is lambda_1. E, Eigenpairs or what reads them from elsewhere,
// holds all eigenpairs with `spectrum` and where takes_eigenpairs says so, else nothing. `diagonal` is that of the Gram
// matrix; not read with `spectrum`.
template <int K, class Real, class Pairs, class Numbers, class Entries, class Found>
PMRL_INLINE void coefficients(Incoming<K, Real, Numbers>& in, Through through, Real top, const Pairs& E,
                              const Vector<K, Real>& diagonal, const Vector<K, Real>& v,
                              const Columns<K, Real, Numbers>& c,
                              const Settings& s, Coefficients<K, Real, Entries, Found>& out) {
  const int k = s.k;
  const bool rescale = s.float64_input && !s.normalize, vectors = through.leading || through.others;
  const Real inverse_sigma = reciprocal(sqrt(top));
  // The alignment term of an instance with fewer than two modalities is a constant.
  const auto alignable = number_present(c, k) >= Real(2.0);
  in.alignment = select(alignable, in.alignment, Real(0.0));
  Entries& A = out.C;
  Vector<K, Real> radial;
  out.slope = Real(0.0);

  if (!s.spectrum) {
    Real trace(0.0);
    PMRL_EVERY for (int m = 0; m < k; ++m) trace = trace + diagonal.at[m];
    const Real even = in.alignment * reciprocal(sqrt(trace));
    const Real along = (in.sigma.at[0] - in.alignment) * inverse_sigma;
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      radial.at[i] = even * diagonal.at[i] + along * top * v.at[i] * v.at[i];
      PMRL_EVERY for (int m = i; m < k; ++m) A.entry(i, m) = along * v.at[i] * v.at[m] + (i == m ? even : Real(0.0));
    }
  } else if (through.values) {
    Vector<K, Real> sigma, gaps, p, g;
    PMRL_EVERY for (int j = 0; j < k; ++j) sigma.at[j] = sqrt(E.value(j));
    const Real total = Real(1.0) + softmax_weights(sigma, c, s, gaps, p);
    g.at[0] = in.sigma.at[0] + Real(s.tau * 0.0);  // as in `alignment`
    PMRL_EVERY for (int j = 1; j < k; ++j) {
      p.at[j] = quotient(p.at[j], total);
      const Real pull = in.alignment * p.at[j] / Real(s.tau);
      g.at[j] = in.sigma.at[j] + pull;
      g.at[0] = g.at[0] - pull;  // and not (p_1 - 1) / tau, which would cancel
      // p gap tends to 0 where the gap is infinite and p underflows
      out.slope = out.slope + select(p.at[j] == Real(0.0), p.at[j], p.at[j] * gaps.at[j]);
    }
    // Divided once, at the end: 1 / tau may be infinite where all gaps are 0. NaN wherever the alignment term is, also
    // in an instance without a logit.
    out.slope = in.alignment * out.slope / Real(s.tau) + top * Real(0.0);
    through_spectrum(g, E, v, s, A, radial);
  } else {
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      radial.at[i] = Real(0.0);
      PMRL_EVERY for (int m = i; m < k; ++m) A.entry(i, m) = Real(0.0);
    }
  }

  PMRL_EVERY for (int m = 0; m < k; ++m) {
    if (s.normalize) {
      in.w.at[m] = in.w.at[m] * c.inverse_norms.at[m];
      in.direct.at[m] = in.direct.at[m] * c.inverse_norms.at[m];
    }
    out.c.at[m] = v.at[m] * inverse_sigma;
    if (through.others) {
      if (s.normalize) in.others.at[m] = in.others.at[m] * c.inverse_norms.at[m];
      out.shared.at[m] = abs(v.at[m]);
      out.own.at[m] = -(out.shared.at[m] * c.others.at[m]);
    }
    if (s.float64_input) out.exponent.at[m] = s.normalize ? -c.exponents.at[m] : Real(0.0);
  }
  if (vectors) {
    Vector<K, Real> t, y;
    Real T(0.0), along, up(0.0), down(0.0);
    if (through.others) through_others(in, E, v, c, s, t, T, radial);
    through_vectors(in, E, v, inverse_sigma, s, y, along, radial);
    if (rescale) {
      // As computed, N and c lack a factor 2^-e, and M (in A) does not. For e > 0 they are multiplied by it here. For
      // e < 0 that could overflow, so M is multiplied by 2^e, and the whole gradient by 2^-e at the end.
      const Real e = c.exponents.at[0];
      up = max(e, Real(0.0));
      down = e - up;
      PMRL_EVERY for (int i = 0; i < k; ++i) {
        out.exponent.at[i] = -down;
        out.c.at[i] = scaled(out.c.at[i], -up);
        if (through.others) {
          out.shared.at[i] = scaled(out.shared.at[i], -up);
          out.own.at[i] = scaled(out.own.at[i], -up);
        }
      }
    }
    PMRL_EVERY for (int i = 0; i < k; ++i)
      PMRL_EVERY for (int m = i; m < k; ++m) {
        Real N = y.at[i] * v.at[m] + v.at[i] * y.at[m] - along * v.at[i] * v.at[m];
        if (through.others)
          N = N - abs(v.at[i]) * abs(v.at[m]) * (i == m ? T - t.at[i] : T - t.at[i] - t.at[m]);
        if (rescale) {
          A.entry(i, m) = scaled(A.entry(i, m), down);
          N = scaled(N, -up);
        }
        A.entry(i, m) = A.entry(i, m) + N;
      }
  }

  if (s.normalize) {  // dx_m = (dz_m - (z_m . dz_m) z_m) / n_m
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      if (through.leading) radial.at[i] = radial.at[i] + out.c.at[i] * in.w.at[i];
      A.entry(i, i) = A.entry(i, i) - (radial.at[i] + in.direct.at[i]);
    }
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      out.c.at[i] = out.c.at[i] * c.inverse_norms.at[i];
      if (through.others) {
        out.shared.at[i] = out.shared.at[i] * c.inverse_norms.at[i];
        out.own.at[i] = out.own.at[i] * c.inverse_norms.at[i];
      }
      PMRL_EVERY for (int m = i; m < k; ++m) A.entry(i, m) = A.entry(i, m) * c.inverse_norms.at[i] * c.inverse_norms.at[m];
    }
  }
  PMRL_EVERY for (int i = 0; i < k; ++i)  // absent modalities contribute nothing, and nobody contributes to them
    PMRL_EVERY for (int m = i; m < k; ++m)
      A.entry(i, m) = select(c.present.at[i] * c.present.at[m] > Real(0.0), A.entry(i, m), Real(0.0));
}

}  // namespace pmrl
