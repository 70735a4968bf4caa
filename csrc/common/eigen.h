// Eigenpairs of symmetric positive semidefinite k x k matrices, in registers where k is a template argument:
// cyclic Jacobi for all of them, power iteration by repeated squaring for the leading pair.
//
// K is k, or 0 for a k known at run time. Only upper triangles, at[i][j] with i <= j, are read and written.
#pragma once

#include "elementary.h"

namespace pmrl {

template <int K>
constexpr int kSize = K ? K : kMaxModalities;

template <int K, class Real>
struct Matrix {
  Real at[kSize<K>][kSize<K>];
};

template <int K, class Real>
struct Vector {
  Real at[kSize<K>];
};

// Eigenvalues in descending order, eigenvectors in columns: V.at[m][j] is entry m of eigenvector j.
template <int K, class Real>
struct Eigenpairs {
  Vector<K, Real> values;
  Matrix<K, Real> V;
};

template <int K, class Real>
PMRL_INLINE Real& upper(Matrix<K, Real>& A, int i, int j) {
  return i < j ? A.at[i][j] : A.at[j][i];
}

template <int K, class Real>
PMRL_INLINE const Real& upper(const Matrix<K, Real>& A, int i, int j) {
  return i < j ? A.at[i][j] : A.at[j][i];
}

// 0 where all entries are finite, NaN where one is not.
template <int K, class Real>
PMRL_INLINE Real zero_or_nan(const Matrix<K, Real>& A, int k) {
  Real sum(0.0);
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) sum = sum + (A.at[i][j] - A.at[i][j]);
  return sum;
}

// One rotation in the plane (p, q): t = tan(angle) = 2 a_pq sign(d) / (|d| + sqrt(d^2 + 4 a_pq^2)), d = a_qq - a_pp.
// Lanes that are not `active` get t = 0, which leaves every bit of theirs alone: an instance's result does
// not depend on its neighbours in the pack.
template <int K, class Real, class Mask>
PMRL_INLINE void rotate(Matrix<K, Real>& A, Matrix<K, Real>& V, Mask active, int p, int q, int k) {
  const Real apq = A.at[p][q];
  const Real d = A.at[q][q] - A.at[p][p], e = apq + apq;
  const Real reach = abs(d) + sqrt(d * d + e * e);
  const Real t = select(active & (reach > Real(0.0)), select(d < Real(0.0), -e, e) / reach, Real(0.0));
  const Real c = Real(1.0) / sqrt(Real(1.0) + t * t), s = t * c, tau = s / (Real(1.0) + c);
  A.at[p][p] = A.at[p][p] - t * apq;
  A.at[q][q] = A.at[q][q] + t * apq;
  A.at[p][q] = select(active, Real(0.0), apq);
#pragma GCC unroll 8
  for (int r = 0; r < k; ++r) {
    if (r == p || r == q) continue;
    Real &x = upper(A, r, p), &y = upper(A, r, q);
    const Real a = x, b = y;
    x = a - s * (b + tau * a);
    y = b + s * (a - tau * b);
  }
#pragma GCC unroll 8
  for (int r = 0; r < k; ++r) {
    const Real a = V.at[r][p], b = V.at[r][q];
    V.at[r][p] = a - s * (b + tau * a);
    V.at[r][q] = b + s * (a - tau * b);
  }
}

// The pairs of a sweep in the order of a round-robin tournament: those of one round share no index, so their
// long chains of division and square root overlap. Player `last` is the one who sits still.
PMRL_INLINE void tournament_pair(int players, int round, int game, int& p, int& q) {
  const int circle = players - 1;
  const int a = game ? (round + game) % circle : circle;
  const int b = game ? (round + circle - game) % circle : round;
  p = a < b ? a : b;
  q = a < b ? b : a;
}

template <int K, int Index, class Real, class Mask>
PMRL_INLINE void unrolled_sweep(Matrix<K, Real>& A, Matrix<K, Real>& V, Mask active) {
  constexpr int players = K + K % 2, games = players / 2;
  if constexpr (Index < (players - 1) * games) {
    constexpr int round = Index / games, game = Index % games, circle = players - 1;
    constexpr int a = game ? (round + game) % circle : circle;
    constexpr int b = game ? (round + circle - game) % circle : round;
    constexpr int p = a < b ? a : b, q = a < b ? b : a;
    if constexpr (q < K) rotate<K>(A, V, active, p, q, K);
    unrolled_sweep<K, Index + 1>(A, V, active);
  }
}

template <int K, class Real, class Mask>
PMRL_INLINE void sweep(Matrix<K, Real>& A, Matrix<K, Real>& V, Mask active, int k) {
  if constexpr (K > 0) {
    unrolled_sweep<K, 0>(A, V, active);
  } else {
    const int players = k + k % 2;
    for (int round = 0; round < players - 1; ++round)
      for (int game = 0; game < players / 2; ++game) {
        int p, q;
        tournament_pair(players, round, game, p, q);
        if (q < k) rotate<K>(A, V, active, p, q, k);
      }
  }
}

// Swap columns i < j where their eigenvalues are in the wrong order.
template <int K, class Real>
PMRL_INLINE void order(Eigenpairs<K, Real>& E, int i, int j, int k) {
  const Real a = E.values.at[i], b = E.values.at[j];
  const auto swap = a < b;
  if (!any(swap)) return;
  E.values.at[i] = select(swap, b, a);
  E.values.at[j] = select(swap, a, b);
#pragma GCC unroll 8
  for (int r = 0; r < k; ++r) {
    const Real x = E.V.at[r][i], y = E.V.at[r][j];
    E.V.at[r][i] = select(swap, y, x);
    E.V.at[r][j] = select(swap, x, y);
  }
}

// All eigenpairs of A, destroying it. Eigenvalues are clamped at 0; a matrix that is not finite gives NaN.
template <int K, class Real>
PMRL_FUNCTION void eigenpairs(Matrix<K, Real>& A, Eigenpairs<K, Real>& E, int k, bool wide) {
  const Real broken = zero_or_nan(A, k);
  const auto fine = broken == Real(0.0);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      E.V.at[i][j] = Real(i == j ? 1.0 : 0.0);
      if (i <= j) A.at[i][j] = select(fine, A.at[i][j], Real(0.0));
    }
  for (int sweeps = 0; sweeps < kMaxSweeps; ++sweeps) {
    Real off(0.0), diagonal(0.0);
    for (int i = 0; i < k; ++i) {
      diagonal = diagonal + A.at[i][i] * A.at[i][i];
      for (int j = i + 1; j < k; ++j) off = off + A.at[i][j] * A.at[i][j];
    }
    const auto active = off + off > Real(jacobi_tolerance(wide)) * diagonal;
    if (!any(active)) break;
    sweep<K>(A, E.V, active, k);
  }
  for (int i = 0; i < k; ++i) E.values.at[i] = A.at[i][i];
  for (int i = 0; i < k; ++i)  // an insertion sort that no lane's data can steer
    for (int j = i; j > 0; --j) order(E, j - 1, j, k);
  for (int i = 0; i < k; ++i) {
    E.values.at[i] = max(E.values.at[i], Real(0.0)) + broken;
    for (int j = 0; j < k; ++j) E.V.at[i][j] = E.V.at[i][j] + broken;
  }
}

// Where an eigenvalue cannot be told from the largest.
template <class Real>
PMRL_INLINE auto is_tied(Real top, Real value, double gap) {
  return top - value <= Real(gap) * top;
}

// Lowest index among the largest entries of `diagonal`, as that index's row of P (symmetric, upper).
template <int K, class Real>
PMRL_FUNCTION void peak_row(const Matrix<K, Real>& P, Vector<K, Real>& row, int k) {
  Real largest(0.0);
  for (int m = 0; m < k; ++m) largest = max(largest, P.at[m][m]);
  largest = largest * Real(1 - kPeakTie);
  for (int i = 0; i < k; ++i) row.at[i] = Real(0.0);
  for (int m = k - 1; m >= 0; --m) {
    const auto here = P.at[m][m] >= largest;
    for (int i = 0; i < k; ++i) row.at[i] = select(here, upper(P, m, i), row.at[i]);
  }
}

// v1: the all-ones vector projected on the top eigenspace and normalised. For a simple eigenvalue this is the
// eigenvector whose entries have a positive sum. Where the projection is zero, a unit vector e_m is
// projected instead, m the modality nearest the eigenspace. 0 where the largest eigenvalue is 0.
template <int K, class Real>
PMRL_FUNCTION void oriented(const Eigenpairs<K, Real>& E, Vector<K, Real>& v, int k, bool wide) {
  const Real top = E.values.at[0];
  Vector<K, Real> along;  // coefficients of the projection
  Real length(0.0);
  for (int j = 0; j < k; ++j) {
    Real sum(0.0);
    for (int m = 0; m < k; ++m) sum = sum + E.V.at[m][j];
    along.at[j] = select(is_tied(top, E.values.at[j], eigenvalue_gap(k, wide)), sum, Real(0.0));
    length = length + along.at[j] * along.at[j];
  }
  const auto nowhere = sqrt(length) <= Real(zero_sum(k));
  for (int m = 0; m < k; ++m) {
    Real sum(0.0);
    for (int j = 0; j < k; ++j) sum = sum + E.V.at[m][j] * along.at[j];
    v.at[m] = sum;
  }
  if (any(nowhere)) {
    Matrix<K, Real> P;
    for (int i = 0; i < k; ++i)
      for (int m = i; m < k; ++m) {
        Real sum(0.0);
        for (int j = 0; j < k; ++j)
          sum = sum + select(is_tied(top, E.values.at[j], eigenvalue_gap(k, wide)), E.V.at[i][j] * E.V.at[m][j],
                             Real(0.0));
        P.at[i][m] = sum;
      }
    Vector<K, Real> row;
    peak_row(P, row, k);
    for (int m = 0; m < k; ++m) v.at[m] = select(nowhere, row.at[m], v.at[m]);
  }
  Real squares(0.0);
  for (int m = 0; m < k; ++m) squares = squares + v.at[m] * v.at[m];
  const Real inverse = Real(1.0) / sqrt(squares);
  for (int m = 0; m < k; ++m) v.at[m] = select(top == Real(0.0), Real(0.0), v.at[m] * inverse);
}

// y = A x for a symmetric A.
template <int K, class Real>
PMRL_INLINE void multiply(const Matrix<K, Real>& A, const Vector<K, Real>& x, Vector<K, Real>& y, int k) {
  for (int i = 0; i < k; ++i) {
    Real sum(0.0);
    for (int j = 0; j < k; ++j) sum = sum + upper(A, i, j) * x.at[j];
    y.at[i] = sum;
  }
}

template <int K, class Real>
PMRL_INLINE void normalise(Vector<K, Real>& x, int k) {
  Real squares(0.0);
  for (int i = 0; i < k; ++i) squares = squares + x.at[i] * x.at[i];
  const Real inverse = Real(1.0) / sqrt(squares);
  for (int i = 0; i < k; ++i) x.at[i] = x.at[i] * inverse;
}

// The leading eigenvalue and its oriented eigenvector, by repeated squaring: P = (A / tr A)^(2^s) tends to
// v1 v1^T in a bounded number of squarings s for any gap that counts. One step on A itself and a Rayleigh
// quotient finish. Where P has not come down to rank 1 the top is tied, or within rounding of it, and squaring
// would only amplify what rounding left of the tie: those lanes take the answer of `eigenpairs`.
template <int K, class Real>
PMRL_FUNCTION void leading_pair(const Matrix<K, Real>& A, Real& value, Vector<K, Real>& v, int k, bool wide) {
  const Real broken = zero_or_nan(A, k);
  Real trace(0.0);
  for (int i = 0; i < k; ++i) trace = trace + A.at[i][i];
  const auto fine = (broken == Real(0.0)) & (trace > Real(0.0));
  Matrix<K, Real> P;
  const Real inverse_trace = Real(1.0) / trace;
  for (int i = 0; i < k; ++i)  // lanes without an answer hold e_1 e_1^T, which is rank 1 at once
    for (int j = i; j < k; ++j)
      P.at[i][j] = select(fine, A.at[i][j] * inverse_trace, Real(i + j == 0 ? 1.0 : 0.0));

  auto moving = fine;
  for (int step = 0; step < squarings(k, wide) && any(moving); ++step) {
    Matrix<K, Real> Q;
    Real sum(0.0), change(0.0);
    for (int i = 0; i < k; ++i)
      for (int j = i; j < k; ++j) {
        Real dot(0.0);
        for (int m = 0; m < k; ++m) dot = dot + upper(P, i, m) * upper(P, m, j);
        Q.at[i][j] = dot;
        if (i == j) sum = sum + dot;
      }
    const Real inverse = Real(1.0) / sum;
    for (int i = 0; i < k; ++i)
      for (int j = i; j < k; ++j) {
        const Real next = Q.at[i][j] * inverse;
        change = max(change, abs(next - P.at[i][j]));
        P.at[i][j] = select(moving, next, P.at[i][j]);
      }
    moving = moving & (change > Real(4 * kEps64));
  }

  Vector<K, Real> x;
  Real length(0.0), frobenius(0.0);
  for (int i = 0; i < k; ++i) {
    Real sum(0.0);
    for (int j = 0; j < k; ++j) {
      sum = sum + upper(P, i, j);
      frobenius = frobenius + upper(P, i, j) * upper(P, i, j);
    }
    x.at[i] = sum;
    length = length + sum * sum;
  }
  const auto nowhere = sqrt(length) <= Real(zero_sum(k));
  if (any(nowhere)) {
    Vector<K, Real> row;
    peak_row(P, row, k);
    for (int i = 0; i < k; ++i) x.at[i] = select(nowhere, row.at[i], x.at[i]);
  }
  normalise(x, k);
  multiply(P, x, v, k);  // squares the share of other eigenvectors once more, and mends a short projection
  normalise(v, k);
  multiply(A, v, x, k);
  normalise(x, k);
  multiply(A, x, v, k);
  value = Real(0.0);
  for (int i = 0; i < k; ++i) value = value + x.at[i] * v.at[i];

  const auto undecided = fine & (Real(1.0) - frobenius > Real(kRankOne));
  if (any(undecided)) {
    Matrix<K, Real> copy = A;
    Eigenpairs<K, Real> E;
    Vector<K, Real> w;
    eigenpairs(copy, E, k, wide);
    oriented(E, w, k, wide);
    value = select(undecided, E.values.at[0], value);
    for (int i = 0; i < k; ++i) x.at[i] = select(undecided, w.at[i], x.at[i]);
  }
  value = select(fine, value, Real(0.0)) + broken;
  for (int i = 0; i < k; ++i) v.at[i] = select(fine, x.at[i], Real(0.0)) + broken;
}

}  // namespace pmrl
