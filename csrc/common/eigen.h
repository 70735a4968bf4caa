// Eigenpairs of symmetric positive semidefinite k x k matrices:
//
//   eigenpairs    A = V diag(values) V^T, by cyclic Jacobi rotations
//   leading_pair  A v = value v for the largest value, by repeated squaring of A / tr A
//   oriented      v1, the eigenvector that the orientation rule picks in the top eigenspace
//
// K is k, or 0 for a k known at run time; where it is k, matrices live in registers. Of symmetric matrices the upper
// triangle alone, at[i][j] with i <= j, is read and written. Nothing else in memory is touched.
#pragma once

#include "elementary.h"

namespace pmrl {

template <int K>
constexpr int kSize = K ? K : kMaxModalities;

template <int K, class Real>
struct Matrix {
  Real at[kSize<K>][kSize<K>];
  PMRL_MEMBER Real& entry(int i, int j) { return at[i][j]; }
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
  PMRL_MEMBER Real value(int j) const { return values.at[j]; }
  PMRL_MEMBER Real entry(int m, int j) const { return V.at[m][j]; }
};

template <int K, class Real>
PMRL_INLINE Real& upper(Matrix<K, Real>& A, int i, int j) {
  return i < j ? A.at[i][j] : A.at[j][i];
}

template <int K, class Real>
PMRL_INLINE const Real& upper(const Matrix<K, Real>& A, int i, int j) {
  return i < j ? A.at[i][j] : A.at[j][i];
}

// 0 if all entries are finite, NaN if one is not. (x - x would not do: of an x that is a product compilers make one fused
// multiply-add of it, which is the rounding error of x.)
template <int K, class Real>
PMRL_INLINE Real zero_or_nan(const Matrix<K, Real>& A, int k) {
  Real sum(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i)
    PMRL_EVERY for (int j = i; j < k; ++j) sum = sum + A.at[i][j] * Real(0.0);
  return sum;
}

// One rotation in the plane (p, q): tan(angle) = 2 a_pq sign(d) / (|d| + sqrt(d^2 + 4 a_pq^2)), d = a_qq - a_pp.
//
// The angle is computed in single precision, where square roots and divisions cost a quarter; cosine and sine are then
// corrected in double precision, so that c^2 + s^2 = 1 to the last bit. An angle that is off by 1e-7 leaves a little of
// a_pq, which stays in the matrix and is removed by the next sweep.
//
// Where a_pq^2 is not above `least` the angle is 0. Between equal eigenvalues such an a_pq is rounding noise, and the
// angle it gives would be random and undo what other rotations have achieved. A rotation by 0 changes no bit, so lanes
// that have converged (`least` is infinite there) do not depend on their neighbours in the pack.
template <class Real>
PMRL_INLINE void rotation(Real app, Real apq, Real aqq, Real least, Real& c, Real& s) {
  const Real d = aqq - app, e = apq + apq;
  const auto x = narrow(select(d < Real(0.0), -e, e)), y = narrow(abs(d));
  using Single = decltype(narrow(d));
  const Single t = x / (y + sqrt(y * y + x * x) + Single(1e-37f));  // 0 / 0 is to be 0
  const Single cosine = Single(1.0f) / sqrt(Single(1.0f) + t * t);
  c = widen(cosine);
  s = widen(t * cosine);
  const Real error = Real(1.0) - (c * c + s * s);
  const Real f = Real(1.0) + error * (Real(0.5) + Real(0.375) * error);
  const auto turns = apq * apq > least;
  c = select(turns, c * f, Real(1.0));
  s = select(turns, s * f, Real(0.0));
}

// A <- R^T A R for the rotation R in the plane (p, q). With c^2 + s^2 = 1 the new diagonal is the old one plus and
// minus `gain`, which is proportional to the sine. Written like this its rounding error is, too, and the many small
// rotations of the last sweeps add none.
template <int K, class Real>
PMRL_INLINE void rotate(Matrix<K, Real>& A, Real c, Real s, int p, int q, int k) {
  const Real app = A.at[p][p], apq = A.at[p][q], aqq = A.at[q][q];
  const Real sd = s * (aqq - app), gain = s * (sd - c * (apq + apq));
  A.at[p][p] = app + gain;
  A.at[p][q] = (c * c - s * s) * apq - c * sd;
  A.at[q][q] = aqq - gain;
  PMRL_UNROLL(8)
  for (int r = 0; r < k; ++r) {
    if (r == p || r == q) continue;
    Real &a = upper(A, r, p), &b = upper(A, r, q);
    const Real old = a;
    a = c * old - s * b;
    b = s * old + c * b;
  }
}

// One row of V <- V R.
template <class Real>
PMRL_INLINE void rotate_row(Real* row, Real c, Real s, int p, int q) {
  const Real a = row[p], b = row[q];
  row[p] = c * a - s * b;
  row[q] = s * a + c * b;
}

// The pairs (p, q) of a sweep, in the order of a round-robin tournament. The pairs of one round share no index, so
// their angles can be computed side by side, and the processor overlaps their long chains of square roots and
// divisions. In game 0 one of the two is the last player, who keeps the seat while the others move round the circle.
struct Game {
  int p, q;
};

PMRL_INLINE constexpr Game game_of(int players, int round, int game) {
  const int circle = players - 1;
  const int a = game ? (round + game) % circle : circle;
  const int b = game ? (round + circle - game) % circle : round;
  return a < b ? Game{a, b} : Game{b, a};
}

// The rotations of a sweep: (cosine, sine) of game `index` of round `round` at [round * games + index].
template <int K, class Real>
struct Turns {
  static constexpr int players = kSize<K> + kSize<K> % 2;
  Real c[(players - 1) * players / 2], s[(players - 1) * players / 2];
};

template <int K, int Round, int Index, class Real>
PMRL_INLINE void find_angles(const Matrix<K, Real>& A, Real least, Turns<K, Real>& t) {
  constexpr int games = (K + 1) / 2;
  if constexpr (Index < games) {
    constexpr Game game = game_of(2 * games, Round, Index);
    constexpr int at = Round * games + Index;
    if constexpr (game.q < K)
      rotation(A.at[game.p][game.p], A.at[game.p][game.q], A.at[game.q][game.q], least, t.c[at], t.s[at]);
    find_angles<K, Round, Index + 1>(A, least, t);
  }
}

template <int K, int Round, int Index, class Real>
PMRL_INLINE void turn(Matrix<K, Real>& A, Matrix<K, Real>& V, const Turns<K, Real>& t) {
  constexpr int games = (K + 1) / 2;
  if constexpr (Index < games) {
    constexpr Game game = game_of(2 * games, Round, Index);
    constexpr int at = Round * games + Index;
    if constexpr (game.q < K) {
      rotate<K>(A, t.c[at], t.s[at], game.p, game.q, K);
#ifdef PMRL_DEVICE
      PMRL_EVERY for (int r = 0; r < K; ++r) rotate_row(V.at[r], t.c[at], t.s[at], game.p, game.q);
#endif
    }
    turn<K, Round, Index + 1>(A, V, t);
  }
}

template <int K, int Round, class Real>
PMRL_INLINE void play(Matrix<K, Real>& A, Matrix<K, Real>& V, Real least, Turns<K, Real>& t) {
  if constexpr (Round < K + K % 2 - 1) {
    find_angles<K, Round, 0>(A, least, t);
    turn<K, Round, 0>(A, V, t);
    play<K, Round + 1>(A, V, least, t);
  }
}

template <int K, int At, class Real>
PMRL_INLINE void turn_row(Real* row, const Turns<K, Real>& t) {
  constexpr int games = (K + 1) / 2;
  if constexpr (At < (2 * games - 1) * games) {
    constexpr Game game = game_of(2 * games, At / games, At % games);
    if constexpr (game.q < K) rotate_row(row, t.c[At], t.s[At], game.p, game.q);
    turn_row<K, At + 1>(row, t);
  }
}

// One sweep: a rotation for every pair, applied to A and to V. On a CPU V takes all rotations of the sweep row by row, so
// that the row stays in registers. On a device all of V is there, and each rotation is applied at once, since keeping
// those of a sweep would take more registers than V does. The same operations either way.
template <int K, class Real>
PMRL_INLINE void sweep(Matrix<K, Real>& A, Matrix<K, Real>& V, Real least, int k) {
  Turns<K, Real> t;
  if constexpr (K > 0) {
    play<K, 0>(A, V, least, t);
#ifndef PMRL_DEVICE
    for (int r = 0; r < K; ++r) {
      Real row[K];
      PMRL_UNROLL(8)
      for (int j = 0; j < K; ++j) row[j] = V.at[r][j];
      turn_row<K, 0>(row, t);
      PMRL_UNROLL(8)
      for (int j = 0; j < K; ++j) V.at[r][j] = row[j];
    }
#endif
  } else {
    const int games = (k + 1) / 2, count = (2 * games - 1) * games;
    for (int at = 0; at < count; ++at) {
      const Game game = game_of(2 * games, at / games, at % games);
      if (game.q >= k) continue;
      rotation(A.at[game.p][game.p], A.at[game.p][game.q], A.at[game.q][game.q], least, t.c[at], t.s[at]);
      rotate<K>(A, t.c[at], t.s[at], game.p, game.q, k);
    }
    PMRL_EVERY for (int r = 0; r < k; ++r)
      for (int at = 0; at < count; ++at) {
        const Game game = game_of(2 * games, at / games, at % games);
        if (game.q < k) rotate_row(V.at[r], t.c[at], t.s[at], game.p, game.q);
      }
  }
}

// Swaps eigenpairs i < j where they are in the wrong order.
template <int K, class Real>
PMRL_INLINE void order(Eigenpairs<K, Real>& E, int i, int j, int k) {
  const Real a = E.values.at[i], b = E.values.at[j];
  const auto swap = a < b;
  if (!any(swap)) return;
  E.values.at[i] = select(swap, b, a);
  E.values.at[j] = select(swap, a, b);
  PMRL_UNROLL(8)
  for (int r = 0; r < k; ++r) {
    const Real x = E.V.at[r][i], y = E.V.at[r][j];
    E.V.at[r][i] = select(swap, y, x);
    E.V.at[r][j] = select(swap, x, y);
  }
}

// All eigenpairs of A, which is overwritten. Negative eigenvalues become 0; a matrix that is not finite gives NaN.
template <int K, class Real>
PMRL_FUNCTION void eigenpairs(Matrix<K, Real>& A, Eigenpairs<K, Real>& E, int k) {
  const Real broken = zero_or_nan(A, k);
  Real trace(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i) trace = trace + A.at[i][i];
  const auto fine = (broken == Real(0.0)) & (trace > Real(0.0));
  const Real scale = select(fine, binade(trace), Real(1.0)), inverse_scale = quotient(Real(1.0), scale);
  PMRL_EVERY for (int i = 0; i < k; ++i)
    PMRL_EVERY for (int j = 0; j < k; ++j) {
      E.V.at[i][j] = Real(i == j ? 1.0 : 0.0);
      if (i <= j) A.at[i][j] = select(fine, A.at[i][j] * inverse_scale, Real(0.0));
    }
  for (int sweeps = 0; sweeps < kMaxSweeps; ++sweeps) {
    Real off(0.0), diagonal(0.0);
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      diagonal = diagonal + A.at[i][i] * A.at[i][i];
      PMRL_EVERY for (int j = i + 1; j < k; ++j) off = off + A.at[i][j] * A.at[i][j];
    }
    const Real tolerance = Real(kJacobiTolerance) * diagonal;
    const auto active = off + off > tolerance;
    if (!any(active)) break;
    // Entries below this are left alone: all of them together do not exceed the tolerance.
    sweep<K>(A, E.V, select(active, tolerance * Real(1.0 / (k * k)), Real(HUGE_VAL)), k);
  }
  PMRL_EVERY for (int i = 0; i < k; ++i) E.values.at[i] = A.at[i][i];
  PMRL_EVERY for (int i = 0; i < k; ++i)  // an insertion sort that makes the same comparisons whatever a lane holds
    PMRL_EVERY for (int j = i; j > 0; --j) order(E, j - 1, j, k);
  PMRL_EVERY for (int i = 0; i < k; ++i) {
    E.values.at[i] = max(E.values.at[i], Real(0.0)) * scale + broken;
    PMRL_EVERY for (int j = 0; j < k; ++j) E.V.at[i][j] = E.V.at[i][j] + broken;
  }
}

// Whether an eigenvalue counts as equal to the largest.
template <class Real>
PMRL_INLINE auto is_tied(Real top, Real value, double gap) {
  return top - value <= Real(gap) * top;
}

// The row of the symmetric P with the largest diagonal entry, or the first whose entry is within a relative `tie` of
// it.
template <int K, class Real>
PMRL_FUNCTION void peak_row(const Matrix<K, Real>& P, Real tie, Vector<K, Real>& row, int k) {
  Real largest(0.0);
  PMRL_EVERY for (int m = 0; m < k; ++m) largest = max(largest, P.at[m][m]);
  largest = largest * (Real(1.0) - tie);
  PMRL_EVERY for (int i = 0; i < k; ++i) row.at[i] = Real(0.0);
  PMRL_EVERY for (int m = k - 1; m >= 0; --m) {
    const auto here = P.at[m][m] >= largest;
    PMRL_EVERY for (int i = 0; i < k; ++i) row.at[i] = select(here, upper(P, m, i), row.at[i]);
  }
}

// v1: the all-ones vector projected on the top eigenspace and normalised. For a simple eigenvalue this is the
// eigenvector whose entries have a positive sum. Where the projection is zero, a unit vector e_m is projected instead,
// m being the modality nearest to the eigenspace. What counts as zero grows as the next eigenvalue comes near, because
// the rounding error of the sum does. v1 = 0 where the largest eigenvalue is 0.
template <int K, class Real>
PMRL_FUNCTION void oriented(const Eigenpairs<K, Real>& E, Vector<K, Real>& v, int k, bool float64_input) {
  const Real top = E.values.at[0];
  Vector<K, Real> along;  // coefficients of the projection
  Real length(0.0), next(0.0);
  PMRL_EVERY for (int j = 0; j < k; ++j) {
    Real sum(0.0);
    PMRL_EVERY for (int m = 0; m < k; ++m) sum = sum + E.V.at[m][j];
    const auto tied = is_tied(top, E.values.at[j], eigenvalue_gap(k, float64_input));
    along.at[j] = select(tied, sum, Real(0.0));
    length = length + along.at[j] * along.at[j];
    next = max(next, select(tied, Real(0.0), E.values.at[j]));
  }
  const Real gap = top - next, noise = Real(zero_sum(k)) * top;
  const auto nowhere = sqrt(length) * gap <= noise;
  PMRL_EVERY for (int m = 0; m < k; ++m) {
    Real sum(0.0);
    PMRL_EVERY for (int j = 0; j < k; ++j) sum = sum + E.V.at[m][j] * along.at[j];
    v.at[m] = sum;
  }
  if (any(nowhere)) {
    Matrix<K, Real> P;
    Vector<K, Real> row;
    PMRL_EVERY for (int i = 0; i < k; ++i) {
      PMRL_EVERY for (int j = 0; j < k; ++j)
        row.at[j] = select(is_tied(top, E.values.at[j], eigenvalue_gap(k, float64_input)), E.V.at[i][j], Real(0.0));
      PMRL_EVERY for (int m = i; m < k; ++m) {
        P.at[i][m] = Real(0.0);
        PMRL_EVERY for (int j = 0; j < k; ++j) P.at[i][m] = P.at[i][m] + row.at[j] * E.V.at[m][j];
      }
    }
    const Real share = quotient(noise, gap);
    peak_row(P, max(Real(kPeakTie), select(share < Real(0.5), share, Real(0.5))), row, k);
    PMRL_EVERY for (int m = 0; m < k; ++m) v.at[m] = select(nowhere, row.at[m], v.at[m]);
  }
  Real squares(0.0);
  PMRL_EVERY for (int m = 0; m < k; ++m) squares = squares + v.at[m] * v.at[m];
  const Real inverse = quotient(Real(1.0), sqrt(squares));
  PMRL_EVERY for (int m = 0; m < k; ++m) v.at[m] = select(top == Real(0.0), Real(0.0), v.at[m] * inverse);
}

// y = A x for a symmetric A.
template <int K, class Real>
PMRL_INLINE void multiply(const Matrix<K, Real>& A, const Vector<K, Real>& x, Vector<K, Real>& y, int k) {
  PMRL_EVERY for (int i = 0; i < k; ++i) {
    Real sum(0.0);
    PMRL_EVERY for (int j = 0; j < k; ++j) sum = sum + upper(A, i, j) * x.at[j];
    y.at[i] = sum;
  }
}

template <int K, class Real>
PMRL_INLINE void normalise(Vector<K, Real>& x, int k) {
  Real squares(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i) squares = squares + x.at[i] * x.at[i];
  const Real inverse = quotient(Real(1.0), sqrt(squares));
  PMRL_EVERY for (int i = 0; i < k; ++i) x.at[i] = x.at[i] * inverse;
}

// The leading eigenvalue and its oriented eigenvector (see `oriented`), by repeated squaring: for any gap that is no
// tie, P = (A / tr A)^(2^n) comes down to v1 v1^T within a bounded number n of squarings. The row of P with the largest
// diagonal entry is then v1, with the sign of the orientation's second rule (e_m projected); where the sum of its
// entries is not zero, the first rule decides about the sign. One multiplication by A itself and a Rayleigh quotient
// follow.
//
// Returns which lanes have no answer. There are two kinds. One where P is not of rank 1 in the end: the top is tied, or
// so nearly that squaring would amplify the rounding error. The other where the sum of v1's entries is close to what
// counts as zero. That depends on the gap, of which squaring gives an estimate: if n squarings are needed for rank 1,
// the relative gap is between 28 and 64 times 2^-n.
template <int K, class Real>
PMRL_INLINE auto by_squaring(const Matrix<K, Real>& A, Real& value, Vector<K, Real>& v, int k, bool float64_input) {
  const Real broken = zero_or_nan(A, k);
  Real trace(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i) trace = trace + A.at[i][i];
  const auto fine = (broken == Real(0.0)) & (trace > Real(0.0));
  Matrix<K, Real> P;
  const Real inverse_trace = quotient(Real(1.0), trace);
  // Lanes without an answer hold e_1 e_1^T, which is of rank 1, and need no squaring.
  PMRL_EVERY for (int i = 0; i < k; ++i)
    PMRL_EVERY for (int j = i; j < k; ++j)
      P.at[i][j] = select(fine, A.at[i][j] * inverse_trace, Real(i + j == 0 ? 1.0 : 0.0));

  auto moving = fine;
  Real reach(zero_sum(k) / 64);  // times 2^n this is between a third of zero_sum over the gap and all of it
  for (int step = 0; step < squarings(k, float64_input) && any(moving); ++step) {
    Matrix<K, Real> Q;
    Real sum(0.0), change(0.0);
    PMRL_EVERY for (int i = 0; i < k; ++i)
      PMRL_EVERY for (int j = i; j < k; ++j) {
        Real dot(0.0);
        PMRL_EVERY for (int m = 0; m < k; ++m) dot = dot + upper(P, i, m) * upper(P, m, j);
        Q.at[i][j] = dot;
        if (i == j) sum = sum + dot;
      }
    const Real inverse = quotient(Real(1.0), sum);
    reach = select(moving & (sum < Real(1 - kRankOne)), reach + reach, reach);  // sum is the square of P's norm
    PMRL_EVERY for (int i = 0; i < k; ++i)
      PMRL_EVERY for (int j = i; j < k; ++j) {
        const Real next = Q.at[i][j] * inverse;
        change = max(change, abs(next - P.at[i][j]));
        P.at[i][j] = select(moving, next, P.at[i][j]);
      }
    moving = moving & (change > Real(4 * kEps64));
  }

  Vector<K, Real> x;
  Real frobenius(0.0), sum(0.0), squares(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i)
    PMRL_EVERY for (int j = 0; j < k; ++j) frobenius = frobenius + upper(P, i, j) * upper(P, i, j);
  peak_row(P, Real(kPeakTie), x, k);
  multiply(P, x, v, k);  // squares the share of other eigenvectors once more
  PMRL_EVERY for (int i = 0; i < k; ++i) {
    sum = sum + v.at[i];
    squares = squares + v.at[i] * v.at[i];
  }
  reach = max(reach, Real(zero_sum(k)));
  const Real length = sqrt(squares), size = abs(sum);
  const auto against = sum < -(reach * length);
  PMRL_EVERY for (int i = 0; i < k; ++i) v.at[i] = select(against, -v.at[i], v.at[i]);
  multiply(A, v, x, k);
  normalise(x, k);
  multiply(A, x, v, k);
  value = Real(0.0);
  PMRL_EVERY for (int i = 0; i < k; ++i) value = value + x.at[i] * v.at[i];

  const auto unclear = (size < Real(8.0) * (reach * length)) &
                       ((size > Real(0.5) * (reach * length)) | (reach > Real(kPeakTie / 2)));
  value = select(fine, value, Real(0.0)) + broken;
  PMRL_EVERY for (int i = 0; i < k; ++i) v.at[i] = select(fine, x.at[i], Real(0.0)) + broken;
  return fine & ((Real(1.0) - frobenius > Real(kRankOne)) | unclear);
}

// The leading eigenvalue and v1: by squaring, and where that has no answer by all eigenpairs.
template <int K, class Real>
PMRL_FUNCTION void leading_pair(const Matrix<K, Real>& A, Real& value, Vector<K, Real>& v, int k,
                                bool float64_input) {
  const auto undecided = by_squaring(A, value, v, k, float64_input);
  if (!any(undecided)) return;
  Matrix<K, Real> copy = A;
  Eigenpairs<K, Real> E;
  Vector<K, Real> w;
  eigenpairs(copy, E, k);
  oriented(E, w, k, float64_input);
  value = select(undecided, E.values.at[0], value);
  PMRL_EVERY for (int i = 0; i < k; ++i) v.at[i] = select(undecided, w.at[i] + Real(0.0), v.at[i]);  // 0 for a -0
}

}  // namespace pmrl
