// Joint scores for one instruction set, which PMRL_ISA names: this file is compiled once for each. With queries t (d,)
// and candidates' modalities C (n, d), K = C C^T = V diag(mu) V^T, u_m = (V^T C)_m / sqrt(mu_m), q_m = u_m . t,
//
//   prepare_queries      t in Elements and its square beta                          reads the queries' rows
//   prepare_candidates   K and its eigenpairs; u_m and constants of scores          reads the modalities' rows
//   bases                r = beta - sum q_m^2, clamped at 0, of volumes; the        reads q, writes one number a pair
//                        largest root x of x + mu_1 - beta =
//                        sum mu_m q_m^2 / (x + mu_1 - mu_m), of eigenvalues
//   scores               sqrt(mu_1 + x) and the like                                reads bases, writes scores
//   gradients            S_m = own y_m, sum own, and M_ml = sum own y_m y_l         reads q, bases and dL/d score
//   pairs                q and all of the above of single pairs, in float64         reads rows
//   pair_gradients       what such a pair adds to gradients                         reads rows
//   finish_queries       dt = sum own t + sum S_m u_m, before it was normalised     writes rows of gradients
//   finish_candidates    dC = V diag(1 / sqrt(mu)) (S^T t + M u), likewise          writes rows of gradients
//
// All scores have gradients of one form, own e for t, with e = t + sum y_l u_l, and own y_m e / sqrt(mu_m) for row m of
// V^T C: with y = -q for volumes, mu_m q_m / (x + mu_1 - mu_m) for eigenvalues. V is frozen, which is exact: scores do
// not depend on the basis. Of the triangle (area2) the "basis" is its middle and its direction, and y = (-1, -q).
//
// Near copies, of which r is mostly rounding in float32, are told by `bases` and done by pairs and pair_gradients.
#include <cmath>
#include <type_traits>

#include "passes.h"
#include "solvers.h"

namespace pmrl {
namespace {

// r below this, relative to beta, is not left to float32.
constexpr double kNear = 0x1p-10;

bool has_eigenvalues(Score s) { return s == Score::kSigma || s == Score::kLambda || s == Score::kGain; }

// ---- rows ---------------------------------------------------------------------------------------

template <class RowType>
PMRL_INLINE void copy_row(const RowType& row, int64_t d, double* out) {
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) store_native(out + c, row.load(c));
  if (c < d) store_native(out + c, row.load(c, d - c), d - c);
}

// Row i of x times 2^-exponent.
PMRL_NOINLINE void read_row(const Rows& x, int64_t i, int64_t d, double exponent, double* out) {
  if (exponent != 0.0) {
    AnyRow row;
    make_row(row, x, i, exponent);
    return copy_row(row, d, out);
  }
  const char* data = x.data + i * x.stride;
  switch (x.dtype) {
    case Dtype::kFloat64: return copy_row(Row<double>{reinterpret_cast<const double*>(data)}, d, out);
    case Dtype::kBFloat16: return copy_row(Row<BFloat16>{reinterpret_cast<const BFloat16*>(data)}, d, out);
    case Dtype::kFloat16: return copy_row(Row<Float16>{reinterpret_cast<const Float16*>(data)}, d, out);
    default: return copy_row(Row<float>{reinterpret_cast<const float*>(data)}, d, out);
  }
}

PMRL_INLINE double dot(const double* x, const double* y, int64_t d) {
  return dot(Row<double>{x}, FloatRow{reinterpret_cast<const char*>(y), true}, d);
}

// out += factor x
PMRL_INLINE void add_row(const double* x, double factor, int64_t d, double* out) {
  const F64 f = broadcast(factor);
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) store_native(out + c, load_native(out + c) + f * load_native(x + c));
  for (; c < d; ++c) out[c] += factor * x[c];
}

PMRL_INLINE void scale_row(double* x, double factor, int64_t d) {
  const F64 f = broadcast(factor);
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) store_native(x + c, load_native(x + c) * f);
  for (; c < d; ++c) x[c] *= factor;
}

// What a row is multiplied by, 2^-exponent first, then `factor`: to norm 1 if it is to be normalised, but a row of
// zeros; to NaN if it is not finite.
struct Norm {
  double exponent, factor;
};

// Row i of x, multiplied, into out. Squares that leave float64's range are those of a row scaled by a power of two.
PMRL_NOINLINE Norm read_scaled(const Rows& x, int64_t i, int64_t d, bool normalize, double* out) {
  read_row(x, i, d, 0.0, out);
  Norm norm{0.0, 1.0};
  double square = dot(out, out, d);
  if (normalize && x.dtype == Dtype::kFloat64 && !(square > kLeastSquare && square < kLargestSquare)) {
    double peak = 0.0;
    for (int64_t c = 0; c < d; ++c) peak = abs(out[c]) > peak ? abs(out[c]) : peak;
    if (peak > 0.0 && peak < HUGE_VAL) {
      int exponent;
      frexp(peak, &exponent);
      norm.exponent = exponent;
      read_row(x, i, d, norm.exponent, out);
      square = dot(out, out, d);
    }
  }
  if (!(square < HUGE_VAL))
    norm.factor = __builtin_nan("");
  else if (normalize)
    norm.factor = square == 0.0 ? 0.0 : 1.0 / sqrt(square);
  if (norm.factor != 1.0) scale_row(out, norm.factor, d);
  return norm;
}

// The same where the norm is known.
PMRL_INLINE void read_known(const Rows& x, int64_t i, int64_t d, const Norm& norm, double* out) {
  read_row(x, i, d, norm.exponent, out);
  if (norm.factor != 1.0) scale_row(out, norm.factor, d);
}

// A gradient of the row z that norm made of another, pulled back to that one, which is added to `target`'s row.
PMRL_NOINLINE void write_pulled(double* gradient, const double* z, const Norm& norm, bool normalize, int64_t d,
                                const Rows& target, int64_t i) {
  const AnyTarget to{target.data + i * target.stride, target.dtype};
  double along = 0.0;
  if (normalize) along = dot(gradient, z, d);
  const PowerOfTwo<double> power = power_of_two(-norm.exponent);
  const double factor = normalize ? norm.factor : 1.0;
  for (int64_t c = 0; c < d; c += kNative) {
    const int64_t n = d - c < kNative ? d - c : kNative;
    const bool whole = n == kNative;
    F64 g = whole ? load_native(gradient + c) : load_native(gradient + c, n);
    if (normalize) {
      const F64 x = whole ? load_native(z + c) : load_native(z + c, n);
      g = (g - along * x) * factor * power.first * power.second;
      if (factor == 0.0) g = F64{};
    }
    whole ? to.store(c, g) : to.store(c, g, n);
  }
}

PMRL_INLINE void write_zeros(const Rows& target, int64_t i, int64_t d) {
  memset(target.data + i * target.stride, 0, d * element_size(target.dtype));
}

template <class Element>
PMRL_INLINE void narrow_row(const double* x, int64_t d, Element* out) {
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) store_native(out + c, load_native(x + c));
  for (; c < d; ++c) out[c] = static_cast<Element>(x[c]);
}

PMRL_INLINE void store_number(void* to, int64_t at, double x, bool is_float64) {
  if (is_float64)
    static_cast<double*>(to)[at] = x;
  else
    static_cast<float*>(to)[at] = static_cast<float>(x);
}

// Those of a plain product come as they are to be.
PMRL_INLINE bool normalizes_candidates(const JointBatch& b) { return b.normalize && b.score != Score::kDot; }

// ---- preparation --------------------------------------------------------------------------------

void prepare_queries(const JointBatch& b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double* row = b.scratch;
    Norm norm{0.0, 0.0};
    if (!b.seen || b.seen[i])
      norm = read_scaled(b.query, i, b.d, b.normalize, row);
    else
      memset(row, 0, b.d * sizeof *row);
    double* kept = b.query_norms + 3 * i;
    kept[0] = norm.exponent;
    kept[1] = norm.factor;
    kept[2] = dot(row, row, b.d);
    store_number(b.beta, i, kept[2], b.is_float64);
    if (b.is_float64)
      narrow_row(row, b.d, static_cast<double*>(b.T) + i * b.d);
    else
      narrow_row(row, b.d, static_cast<float*>(b.T) + i * b.d);
  }
}

// Where a candidate stands.
struct Place {
  int64_t first, width, column;  // of its tile, and in it
  PMRL_MEMBER Place(const JointBatch& b, int64_t j) {
    const int64_t all = (b.Ng + kTilePadding - 1) / kTilePadding * kTilePadding;
    first = j / b.width * b.width;
    width = all - first < b.width ? all - first : b.width;
    column = j - first;
  }
  PMRL_MEMBER int64_t row(const JointBatch& b, int m) const { return first * b.n + m * width + column; }
};

// 1 / sqrt(mu), and 0 where that was dropped or is absent.
PMRL_INLINE double inverse_root(double mu) { return mu <= 0.0 ? 0.0 : 1.0 / sqrt(mu); }

template <int K>
PMRL_NOINLINE void solve_block(const double* gram, int n, double* mu, double* V) {
  if (K) n = K;
  Matrix<K, Pack> A;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i <= j; ++i) A.at[i][j] = Pack::load(gram + triangle(i, j) * kLanes);
  Eigenpairs<K, Pack> E;
  solvers::eigenpairs(A, E, n);
  for (int j = 0; j < n; ++j) {
    E.values.at[j].store(mu + j * kLanes);
    for (int m = 0; m < n; ++m) E.V.at[m][j].store(V + (m * n + j) * kLanes);
  }
}

struct BlockSolver {
  void (*gram)(const Row<double>*, int, int64_t, double*);
  void (*solve)(const double*, int, double*, double*);
  template <int K>
  static BlockSolver make() {
    return {gram_of<K>, solve_block<K>};
  }
  static BlockSolver make_any() { return make<0>(); }
  template <int K>
  static void gram_of(const Row<double>* rows, int n, int64_t d, double* out) {
    pmrl::gram<K>(rows, n, d, out);
  }
};

// mu and V of one candidate from a lane of its block: what is absent has an eigenvector of its own, e_m, and mu 0.
PMRL_NOINLINE void settle(const JointBatch& b, int64_t j, const double* mu, const double* V, double* out) {
  const int n = b.n;
  double least = eigenvalue_floor(n, b.float64_input) * mu[0];
  for (int m = 0; m < n; ++m) {
    bool absent = false;
    for (int l = 0; l < n; ++l) {
      const double v = V[(l * n + m) * kLanes];
      out[n + l * n + m] = v;
      absent = absent || (!is_present(b.mask, j * n + l) && v * v > 0.5);
    }
    const double value = mu[m * kLanes];
    out[m] = absent ? -1.0 : value <= least ? 0.0 : value;
  }
}

// The numbers of a candidate's score that a tile reads, from its rows z and what `settle` found.
PMRL_NOINLINE void write_constants(const JointBatch& b, int64_t j, const double* z, const double* mu) {
  const int n = b.n;
  const double* V = mu + n;
  const Place at(b, j);
  const int64_t first = at.first * joint_constants(n) + at.column;
  const auto put = [&](int which, double x) { store_number(b.constants, first + which * at.width, x, b.is_float64); };
  const double largest = mu[0] < 0.0 ? 0.0 : mu[0];
  double volume = 1.0, middle = 0.0, along = 0.0;
  for (int m = 0; m < n; ++m) {
    const double value = mu[m] < 0.0 ? 0.0 : mu[m];
    put(m, value);
    put(n + m, largest - value);
    if (!(mu[m] < 0.0)) volume *= sqrt(value);
  }
  if (b.score == Score::kSine) volume = 1.0;
  if (b.score == Score::kArea2) {
    const double inverse = inverse_root(mu[1]);
    for (int64_t c = 0; c < b.d; ++c) {
      const double m = V[0] * z[c] + V[2] * z[b.d + c];
      middle += m * m;
      along += m * ((z[b.d + c] - z[c]) * inverse);
    }
    volume = mu[1];
  }
  put(2 * n, volume);
  put(2 * n + 1, middle);
  put(2 * n + 2, along);
}

void prepare_candidates(const JointBatch& b, bool decompose, int64_t begin, int64_t end) {
  const int n = b.n;
  const BlockSolver solver = for_k<BlockSolver>(n);
  const bool solved = decompose && b.score != Score::kArea2 && b.score != Score::kDot;
  alignas(64) double gram[triangle_size(kMaxModalities) * kLanes], mu[kMaxModalities * kLanes];
  alignas(64) double V[kMaxModalities * kMaxModalities * kLanes];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kLanes;
    const int lanes = b.Ng - start < kLanes ? static_cast<int>(b.Ng - start) : kLanes;
    for (int at = 0; solved && at < triangle_size(n) * kLanes; ++at) gram[at] = 0.0;
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t j = start + lane;
      Row<double> rows[kMaxModalities];
      for (int m = 0; m < n; ++m) {
        double* z = b.scratch + (lane * n + m) * b.d;
        Norm norm{0.0, 0.0};
        if (is_present(b.mask, j * n + m))
          norm = read_scaled(b.candidates[m], j, b.d, normalizes_candidates(b), z);
        else
          memset(z, 0, b.d * sizeof *z);
        b.norms[(j * n + m) * 2] = norm.exponent;
        b.norms[(j * n + m) * 2 + 1] = norm.factor;
        rows[m] = {z};
      }
      if (solved) solver.gram(rows, n, b.d, gram + lane);
    }
    if (solved) solver.solve(gram, n, mu, V);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t j = start + lane;
      const double* z = b.scratch + lane * n * b.d;
      double* found = b.decomposed + j * (n + n * n);
      if (solved) settle(b, j, mu + lane, V + lane, found);
      if (decompose && b.score == Score::kDot) found[0] = found[1] = 1.0;
      if (decompose && b.score == Score::kArea2) {  // the middle, and the direction from one to the other
        double square = 0.0;
        for (int64_t c = 0; c < b.d; ++c) square += (z[b.d + c] - z[c]) * (z[b.d + c] - z[c]);
        const double triangle[] = {1.0, square, 0.5, -1.0, 0.5, 1.0};
        memcpy(found, triangle, sizeof triangle);
      }
      write_constants(b, j, z, found);
      const Place at(b, j);
      Row<double> rows[kMaxModalities];
      double coefficients[kMaxModalities * kLanes];
      for (int m = 0; m < n; ++m) rows[m] = {z + m * b.d};
      for (int m = 0; m < n; ++m) {
        const double inverse = inverse_root(found[m]);
        for (int l = 0; l < n; ++l) coefficients[l * kLanes] = found[n + l * n + m] * inverse;
        char* out = static_cast<char*>(b.U) + at.row(b, m) * b.d * (b.is_float64 ? 8 : 4);
        combine(rows, coefficients, n, b.d, out, b.is_float64);
      }
    }
  }
}

// ---- the largest eigenvalue ---------------------------------------------------------------------

template <class Real>
struct Tiny {
  static constexpr double value = 2.2250738585072014e-308;
};
template <>
struct Tiny<Floats> {
  static constexpr double value = 1.17549435082228751e-38;
};

template <class Real>
struct Huge {
  static constexpr double value = 1.7976931348623157e308;
};
template <>
struct Huge<Floats> {
  static constexpr double value = 3.40282346638528860e38;
};

// What share of x a step may move it without another being needed: the root of epsilon.
template <class Real>
struct Settled {
  static constexpr double value = 0x1p-27;
};
template <>
struct Settled<Floats> {
  static constexpr double value = 0x1p-12;
};

// The largest x >= 0 with x + excess = sum_m w_m / (x + poles_m), or 0 if there is none; poles_0 = 0 and the others are
// not negative. It begins with the largest root of one w_m alone. A step replaces the terms with near poles, at most x,
// by one fraction with the same value and slope, and the others by their tangent: 1 / sum is concave and the others are
// convex, so that x grows and never passes the root, and converges quadratically: after a step by a share s of x what is
// missing is below s^2 of it, whatever n is. So a lane stops once s is below the root of its epsilon (and a lane alone,
// so that its bits do not depend on its neighbours). No pair that was searched for takes more than seven steps.
template <class V>
PMRL_INLINE V largest_root(const V* w, const V* poles, V excess, int n) {
  constexpr int kMostSteps = 12;
  const V tiny(Tiny<V>::value), zero(0.0), half(0.5), one(1.0), two(2.0), four(4.0);
  const V settled(Settled<V>::value);
  V x = zero;
  PMRL_UNROLL(8)
  for (int m = 0; m < n; ++m) {
    const V h = (excess + poles[m]) * half, g = (excess - poles[m]) * half, s = sqrt(g * g + w[m]);
    const V alone = select(zero < h, (w[m] - excess * poles[m]) / max(s + h, tiny), s - h);
    x = m == 0 ? alone : max(x, alone);
  }
  x = max(x, zero);
  if (n == 1) return x;
  auto going = zero < one;
  for (int step = 0; step < kMostSteps; ++step) {
    // The near terms' sum is first / x and its slope -second / x^2, and first^2 / (second (x' + y - x)) their fraction.
    V first = w[0], second = w[0], far = zero, far_slope = zero;
    PMRL_UNROLL(8)
    for (int m = 1; m < n; ++m) {
      const auto near = poles[m] <= x;
      const V inverse = one / max(x + poles[m], tiny), term = w[m] * inverse;
      const V ratio = select(near, x * inverse, zero), share = w[m] * ratio, other = select(near, zero, term);
      first = first + share;
      second = second + share * ratio;
      far = far + other;
      far_slope = far_slope + other * inverse;
    }
    const auto none = second == zero;
    const V quotient = select(none, one, first / select(none, one, second));
    const V y = x * quotient, S = first * quotient, a = one + far_slope;
    const V b = excess - far - far_slope * x + a * (x - y), s = sqrt(b * b + four * a * S);
    const auto positive = zero < b;
    const V top = select(positive, two * S, s - b), bottom = select(positive, max(b + s, tiny), two * a);
    const V next = max(x, x + (top / bottom - y)), moved = select(going, next - x, zero);
    x = select(going, next, x);
    going = settled * x < moved;
    if (!any(going)) break;
  }
  return x;
}

// lambda_1 - mu_1 of a pair: `q` becomes w_m = mu_m q_m^2. In doubles it is made in units of a power of two near
// sqrt(mu_1 beta): w and its like are of fourth degree, and so stay in range where squares are in it, however far t and C
// are apart (from 2^480 on in units that keep squares of mu_1 and beta there). Floats come here only where they are.
template <class V>
PMRL_INLINE V gain_of(V* q, const V* mu, V* poles, V beta, int n) {
  const V excess = mu[0] - beta;
  if constexpr (std::is_same<V, Floats>::value) {
    PMRL_UNROLL(8)
    for (int m = 0; m < n; ++m) q[m] = mu[m] * q[m] * q[m];
    return largest_root(q, poles, excess, n);
  } else {
    const V tiny(Tiny<V>::value), largest = max(mu[0], tiny), other = max(beta, tiny);
    const V size = max(sqrt(largest) * sqrt(other), max(largest, other) * V(0x1p-480));
    const V unit = binade(max(size, tiny)), inverse = V(1.0) / unit;
    for (int m = 0; m < n; ++m) {
      q[m] = (mu[m] * inverse) * (q[m] * (q[m] * inverse));
      poles[m] = poles[m] * inverse;
    }
    return unit * largest_root(q, poles, excess * inverse, n);
  }
}

// ---- tiles --------------------------------------------------------------------------------------

// What pairs of a kind of score have in common.
struct Distance {
  static constexpr bool eigenvalue = false, area = false;
};
struct Area {
  static constexpr bool eigenvalue = false, area = true;
};
struct Eigenvalue {
  static constexpr bool eigenvalue = true, area = false;
};

// Notes the places of a row's pack where x < limit.
template <class V>
PMRL_NOINLINE int64_t note_near(V x, V limit, int64_t at, int32_t* near, int64_t count) {
  typename Lanes<V>::Element entry[Lanes<V>::width], bound[Lanes<V>::width];
  x.store(entry);
  limit.store(bound);
  for (int lane = 0; lane < Lanes<V>::width; ++lane)
    if (entry[lane] < bound[lane]) near[count++] = static_cast<int32_t>(at + lane);
  return count;
}

template <int N>
struct Planes {
  static constexpr int value = N;
};

template <int N, class V, class Kind>
PMRL_NOINLINE int64_t tile_bases(const JointTile& t) {
  using Element = typename Lanes<V>::Element;
  const int n = N ? N : t.n;
  const int64_t w = t.width;
  const Element *beta = static_cast<const Element*>(t.beta), *constants = static_cast<const Element*>(t.constants);
  const V zero(0.0);
  int64_t found = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    const Element* q = static_cast<const Element*>(t.q) + i * n * w;
    Element* out = static_cast<Element*>(t.base) + i * w;
    const V own(beta[i]);
    for (int64_t j = 0; j < w; j += Lanes<V>::width) {
      if constexpr (Kind::eigenvalue) {
        constexpr int kRoom = N ? N : kMaxModalities;
        V found_q[kRoom], mu[kRoom], poles[kRoom];
        PMRL_UNROLL(8)
        for (int m = 0; m < n; ++m) {
          found_q[m] = V::load(q + m * w + j);
          mu[m] = V::load(constants + m * w + j);
          poles[m] = V::load(constants + (n + m) * w + j);
        }
        gain_of(found_q, mu, poles, own, n).store(out + j);
      } else {
        V r = own, all = own;
        if constexpr (Kind::area) {
          all = own + V::load(constants + 5 * w + j);
          const V height = V::load(q + w + j) - V::load(constants + 6 * w + j), along = V::load(q + j);
          r = all - along - along - height * height;
        } else {
          PMRL_UNROLL(8)
          for (int m = 0; m < n; ++m) {
            const V x = V::load(q + m * w + j);
            r = r - x * x;
          }
        }
        r = max(r, zero);
        r.store(out + j);
        if (sizeof(Element) == 4) {
          const V limit = all * V(kNear);
          if (any(r < limit)) found = note_near(r, limit, i * w + j, t.near, found);
        }
      }
    }
  }
  return found;
}

// function(N) for the number of planes, N being 0 for one known at run time: of float64 every one is, and compilers take
// half the time.
template <class V, class Function>
PMRL_INLINE auto by_planes(int n, Function function) {
  if constexpr (sizeof(typename Lanes<V>::Element) == 4) {
    switch (n) {
      case 1: return function(Planes<1>{});
      case 2: return function(Planes<2>{});
      case 3: return function(Planes<3>{});
      case 4: return function(Planes<4>{});
      case 5: return function(Planes<5>{});
      case 6: return function(Planes<6>{});
      case 7: return function(Planes<7>{});
    }
  }
  return function(Planes<0>{});
}

template <class V>
int64_t bases_in(const JointTile& t) {
  if (t.score == Score::kArea2) return tile_bases<2, V, Area>(t);
  return by_planes<V>(t.n, [&](auto N) {
    return has_eigenvalues(t.score) ? tile_bases<N.value, V, Eigenvalue>(t) : tile_bases<N.value, V, Distance>(t);
  });
}

int64_t bases(const JointTile& t) { return t.is_float64 ? bases_in<Pack>(t) : bases_in<Floats>(t); }

// A score, from its base and the candidate's constants. Real is a pack or a double.
template <class Real>
PMRL_INLINE Real score_of(Score score, Real base, Real largest, Real volume) {
  switch (score) {
    case Score::kVolume:
    case Score::kSine: return volume * sqrt(base);
    case Score::kVolume2: return volume * (volume * base);  // det K alone need not be in range
    case Score::kSigma: return sqrt(largest + base);
    case Score::kLambda: return largest + base;
    case Score::kArea2: return Real(0.5) * volume * base;
    default: return base;
  }
}

template <class V>
void scores_in(const JointTile& t, int64_t columns, void* to, int64_t stride) {
  using Element = typename Lanes<V>::Element;
  constexpr int width = Lanes<V>::width;
  const Element* constants = static_cast<const Element*>(t.constants);
  const Element* volume = constants + 2 * t.n * t.width;
  for (int64_t i = 0; i < t.rows; ++i) {
    const Element* base = static_cast<const Element*>(t.base) + i * t.width;
    Element* out = static_cast<Element*>(to) + i * stride;
    for (int64_t j = 0; j < columns; j += width) {
      const V x = score_of(t.score, V::load(base + j), V::load(constants + j), V::load(volume + j));
      if (columns - j >= width) {
        x.store(out + j);
      } else {
        Element last[width];
        x.store(last);
        for (int64_t lane = 0; lane < columns - j; ++lane) out[j + lane] = last[lane];
      }
    }
  }
}

void scores(const JointTile& t, int64_t columns, void* out, int64_t stride) {
  (t.is_float64 ? scores_in<Pack> : scores_in<Floats>)(t, columns, out, stride);
}

// ---- gradients of tiles -------------------------------------------------------------------------

// 1 / sqrt(r). Its product with t - sum q u has norm 1, and no more where r is mostly rounding; 0, the subgradient of
// least norm, where it is nothing else.
template <class Real>
PMRL_INLINE Real inverse_distance(Real r, Real beta) {
  const auto lost = r <= Real(16 * kEps64) * beta;
  return select(lost, r * Real(0.0), Real(1.0) / sqrt(max(r, Real(kEps32 * kEps32) * beta)));
}

// own, y and what is added to the moments' diagonal. Of triangles q has the middle's share subtracted. Of gains it stands
// in the place of own y_0^2 - 2 mu_0 dL/d score, which would cancel.
template <class Real, class Kind>
PMRL_INLINE void slopes(Score score, const Real* q, const Real* mu, const Real* poles, Real base, Real beta,
                        Real volume, Real weight, int n, Real& own, Real* y, Real& extra, Kind) {
  const Real zero(0.0), one(1.0), two(2.0);
  if constexpr (Kind::area) {
    own = weight * volume;
    y[0] = -one;
    y[1] = -q[1];
    extra = own * base;
  } else if constexpr (Kind::eigenvalue) {
    const Real tiny(Tiny<Real>::value);
    if (score == Score::kSigma) {
      const Real sigma = sqrt(mu[0] + base);
      weight = select(sigma == zero, weight * zero, weight / (two * select(sigma == zero, one, sigma)));
    }
    Real first = zero, others = one;
    PMRL_UNROLL(8)
    for (int m = 0; m < n; ++m) {
      const Real a = q[m] / max(base + poles[m], tiny);
      y[m] = mu[m] * a;
      if (m == 0)
        first = y[m] * a;
      else
        others = others + y[m] * a;
    }
    const Real squares = first + others;
    // The query adds nothing, or less than has a square: lambda_1 is mu_1.
    const auto still = Real(Huge<Real>::value) < select(base <= tiny, Real(HUGE_VAL), squares);
    PMRL_UNROLL(8)
    for (int m = 0; m < n; ++m) y[m] = select(still, zero, y[m]);
    own = select(still, weight * zero, two * weight / squares);
    if (score == Score::kGain)
      extra = -own * select(still, zero, others);
    else
      extra = select(still, two * weight, weight * zero);
    extra = extra * mu[0];
  } else {
    own = weight * volume;
    own = score == Score::kVolume2 ? two * own * volume : own * inverse_distance(base, beta);
    PMRL_UNROLL(8)
    for (int m = 0; m < n; ++m) y[m] = -q[m];
    extra = score == Score::kSine ? zero : own * base;
  }
}

template <int N, class V, class Kind>
PMRL_NOINLINE void tile_gradients(const JointTile& t) {
  using Element = typename Lanes<V>::Element;
  constexpr int size = N ? N : kMaxModalities;
  const int n = N ? N : t.n;
  const int64_t w = t.width;
  const Element *beta = static_cast<const Element*>(t.beta), *constants = static_cast<const Element*>(t.constants);
  Element* moments = static_cast<Element*>(t.moments);
  const bool gain = t.score == Score::kGain;
  const bool skips = sizeof(Element) == 4 && (t.score == Score::kVolume || t.score == Score::kSine);
  for (int64_t i = 0; i < t.rows; ++i) {
    Element* rows = static_cast<Element*>(t.q) + i * n * w;
    const Element* base = static_cast<const Element*>(t.base) + i * w;
    const Element* weights = static_cast<const Element*>(t.weights) + i * t.stride;
    const V own_beta(beta[i]), limit = own_beta * V(kNear);
    V total(0.0);
    for (int64_t j = 0; j < w; j += Lanes<V>::width) {
      V q[size], mu[size], poles[size], y[size], own, extra;
      PMRL_UNROLL(8)
      for (int m = 0; m < n; ++m) {
        q[m] = V::load(rows + m * w + j);
        if (!Kind::eigenvalue) continue;
        mu[m] = V::load(constants + m * w + j);
        poles[m] = V::load(constants + (n + m) * w + j);
      }
      if (Kind::area) q[1] = q[1] - V::load(constants + 6 * w + j);
      const V x = V::load(base + j);
      slopes(t.score, q, mu, poles, x, own_beta, V::load(constants + 2 * n * w + j), V::load(weights + j), n, own, y,
             extra, Kind{});
      if (skips) {  // near copies are added in float64
        const auto near = x < limit;
        own = select(near, V(0.0), own);
        extra = select(near, V(0.0), extra);
      }
      total = total + own;
      PMRL_UNROLL(8)
      for (int m = 0; m < n; ++m) {
        const V s = own * y[m];
        s.store(rows + m * w + j);
        if (Kind::eigenvalue && m == 0 && gain) continue;
        PMRL_UNROLL(8)
        for (int l = 0; l <= m; ++l) {
          Element* sum = moments + triangle(l, m) * w + j;
          (V::load(sum) + s * y[l]).store(sum);
        }
      }
      Element* sum = moments + triangle_size(n) * w + j;
      (V::load(sum) + extra).store(sum);
    }
    t.own[i] += sum(total);
  }
}

template <class V>
void gradients_in(const JointTile& t) {
  if (t.score == Score::kArea2) return tile_gradients<2, V, Area>(t);
  by_planes<V>(t.n, [&](auto N) {
    has_eigenvalues(t.score) ? tile_gradients<N.value, V, Eigenvalue>(t) : tile_gradients<N.value, V, Distance>(t);
  });
}

void gradients(const JointTile& t) { (t.is_float64 ? gradients_in<Pack> : gradients_in<Floats>)(t); }

// ---- single pairs in float64 --------------------------------------------------------------------

// One pair: its rows, and what tiles have of it.
struct Single {
  double *t, *rows;  // (d,) and (n, d)
  double q[kMaxModalities], mu[kMaxModalities], poles[kMaxModalities];
  double beta, volume, base;
};

PMRL_NOINLINE void read_pair(const JointBatch& b, int64_t i, int64_t j, Single& s) {
  const int n = b.n;
  const double *kept = b.query_norms + 3 * i, *mu = b.decomposed + j * (n + n * n), *V = mu + n;
  s.t = b.scratch;
  s.rows = b.scratch + 2 * b.d;  // the row between is the caller's
  s.beta = kept[2];
  read_known(b.query, i, b.d, {kept[0], kept[1]}, s.t);
  double c[kMaxModalities];
  for (int m = 0; m < n; ++m) {
    c[m] = 0.0;
    if (!is_present(b.mask, j * n + m)) {
      memset(s.rows + m * b.d, 0, b.d * sizeof(double));
      continue;
    }
    const double* norm = b.norms + (j * n + m) * 2;
    read_known(b.candidates[m], j, b.d, {norm[0], norm[1]}, s.rows + m * b.d);
    c[m] = dot(s.rows + m * b.d, s.t, b.d);
  }
  const double largest = mu[0] < 0.0 ? 0.0 : mu[0];
  s.volume = 1.0;
  s.base = s.beta;
  for (int m = 0; m < n; ++m) {
    const double inverse = inverse_root(mu[m]);
    s.q[m] = 0.0;
    for (int l = 0; l < n; ++l) s.q[m] += V[l * n + m] * c[l];
    s.q[m] *= inverse;
    s.mu[m] = mu[m] < 0.0 ? 0.0 : mu[m];
    s.poles[m] = largest - s.mu[m];
    if (!(mu[m] < 0.0)) s.volume *= sqrt(s.mu[m]);
  }
  if (b.score == Score::kDot) {
    s.base = c[0];
  } else if (b.score == Score::kArea2) {
    double middle = 0.0, along = 0.0;
    const double inverse = inverse_root(mu[1]);
    for (int64_t e = 0; e < b.d; ++e) {  // t - middle, whose square a sum of products would not tell as exactly
      const double away = s.t[e] - (V[0] * s.rows[e] + V[2] * s.rows[b.d + e]);
      middle += away * away;
      along += away * ((s.rows[b.d + e] - s.rows[e]) * inverse);
    }
    s.q[1] = along;
    s.base = max(middle - along * along, 0.0);
    s.volume = mu[1];
  } else if (has_eigenvalues(b.score)) {
    double q[kMaxModalities], poles[kMaxModalities];
    for (int m = 0; m < n; ++m) {
      q[m] = s.q[m];
      poles[m] = s.poles[m];
    }
    s.base = gain_of(q, s.mu, poles, s.beta, n);
  } else {
    for (int m = 0; m < n; ++m) s.base -= s.q[m] * s.q[m];
    s.base = max(s.base, 0.0);
    if (b.score == Score::kSine) s.volume = 1.0;
  }
}

void pairs(const JointBatch& b, JointPair* list, int64_t count) {
  Single s;
  for (int64_t at = 0; at < count; ++at) {
    read_pair(b, list[at].i, list[at].j, s);
    list[at].base = s.base;
    list[at].score = score_of(b.score, s.base, s.mu[0], s.volume);
  }
}

template <class Element>
PMRL_INLINE void add_to(Element* out, const double* x, double factor, int64_t d) {
  for (int64_t c = 0; c < d; ++c) out[c] += static_cast<Element>(factor * x[c]);
}

template <class Element>
PMRL_INLINE void add_pair(const JointBatch& b, const JointSums& sums, const JointPair& pair, Single& s) {
  const int n = b.n;
  const Place at(b, pair.j);
  const double* V = b.decomposed + pair.j * (n + n * n) + n;
  double y[kMaxModalities], own = 0.0, extra = 0.0;
  Element* dC = static_cast<Element*>(sums.dC);
  Element* dT = static_cast<Element*>(sums.dT) + pair.i * b.d;
  double* e = b.scratch + b.d;
  if (b.score == Score::kDot) {
    if (sums.dT) add_to(dT, s.rows, pair.weight, b.d);
    if (dC) add_to(dC + at.row(b, 0) * b.d, s.t, pair.weight, b.d);
    return;
  }
  if (b.score == Score::kArea2)
    slopes(b.score, s.q, s.mu, s.poles, s.base, s.beta, s.volume, pair.weight, n, own, y, extra, Area{});
  else if (has_eigenvalues(b.score))
    slopes(b.score, s.q, s.mu, s.poles, s.base, s.beta, s.volume, pair.weight, n, own, y, extra, Eigenvalue{});
  else
    slopes(b.score, s.q, s.mu, s.poles, s.base, s.beta, s.volume, pair.weight, n, own, y, extra, Distance{});
  const auto add_basis = [&](int from, int to) {  // sum y_m u_m of these
    for (int l = 0; l < n; ++l) {
      double factor = 0.0;
      for (int m = from; m < to; ++m) factor += V[l * n + m] * inverse_root(b.decomposed[pair.j * (n + n * n) + m]) * y[m];
      add_row(s.rows + l * b.d, factor, b.d, e);
    }
  };
  const bool gain = b.score == Score::kGain;
  memcpy(e, s.t, b.d * sizeof *e);
  add_basis(gain ? 1 : 0, n);
  if (gain) {  // of u_0's part `extra` has what the first row gets
    if (dC) add_to(dC + at.row(b, 0) * b.d, e, own * y[0], b.d);
    add_basis(0, 1);
  }
  if (sums.dT) add_to(dT, e, own, b.d);
  if (!dC) return;
  for (int m = gain ? 1 : 0; m < n; ++m) add_to(dC + at.row(b, m) * b.d, e, own * y[m], b.d);
  sums.moments[at.first * (triangle_size(n) + 1) + triangle_size(n) * at.width + at.column] += extra;
}

void pair_gradients(const JointBatch& b, const JointSums& sums, const JointPair* list, int64_t count) {
  Single s;
  for (int64_t at = 0; at < count; ++at) {
    read_pair(b, list[at].i, list[at].j, s);
    if (b.is_float64)
      add_pair<double>(b, sums, list[at], s);
    else
      add_pair<float>(b, sums, list[at], s);
  }
}

// ---- gradients of rows --------------------------------------------------------------------------

void finish_queries(const JointBatch& b, const JointSums& sums, int64_t begin, int64_t end) {
  double *z = b.scratch, *gradient = b.scratch + b.d;
  const Rows from{static_cast<char*>(sums.dT), b.d * (b.is_float64 ? 8 : 4),
                  b.is_float64 ? Dtype::kFloat64 : Dtype::kFloat32};
  for (int64_t i = begin; i < end; ++i) {
    if (b.seen && !b.seen[i]) {
      write_zeros(sums.query, i, b.d);
      continue;
    }
    const double* kept = b.query_norms + 3 * i;
    const Norm norm{kept[0], kept[1]};
    read_known(b.query, i, b.d, norm, z);
    read_row(from, i, b.d, 0.0, gradient);
    add_row(z, sums.own[i], b.d, gradient);
    write_pulled(gradient, z, norm, b.normalize, b.d, sums.query, i);
  }
}

void finish_candidates(const JointBatch& b, const JointSums& sums, int64_t begin, int64_t end) {
  const int n = b.n, size = triangle_size(n);
  const int64_t element = b.is_float64 ? 8 : 4;
  const Dtype dtype = b.is_float64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Rows from{static_cast<char*>(sums.dC), b.d * element, dtype}, basis{static_cast<char*>(b.U), b.d * element, dtype};
  for (int64_t j = begin; j < end; ++j) {
    const Place at(b, j);
    const double *mu = b.decomposed + j * (n + n * n), *V = mu + n;
    const double* moments = sums.moments + at.first * (size + 1) + at.column;
    double M[kMaxModalities][kMaxModalities], inverse[kMaxModalities];
    const double extra = moments[size * at.width];
    for (int m = 0; m < n; ++m) {
      inverse[m] = inverse_root(mu[m]);
      for (int l = 0; l <= m; ++l) M[m][l] = M[l][m] = moments[triangle(l, m) * at.width];
      const bool takes = has_eigenvalues(b.score) ? m == 0 : b.score == Score::kArea2 ? m == 1 : true;
      if (takes) M[m][m] += extra;
    }
    double *z = b.scratch, *gradient = b.scratch + b.d, *rows = b.scratch + 2 * b.d;
    for (int m = 0; m < n; ++m) {
      read_row(from, at.row(b, m), b.d, 0.0, rows + m * b.d);
      read_row(basis, at.row(b, m), b.d, 0.0, rows + (n + m) * b.d);
    }
    for (int l = 0; l < n; ++l) {
      if (!sums.candidates[l].data) continue;
      if (!is_present(b.mask, j * n + l)) {
        write_zeros(sums.candidates[l], j, b.d);
        continue;
      }
      Row<double> parts[2 * kMaxModalities];
      double coefficients[2 * kMaxModalities * kLanes];
      for (int m = 0; m < n; ++m) {
        parts[m] = {rows + m * b.d};
        parts[n + m] = {rows + (n + m) * b.d};
        coefficients[m * kLanes] = V[l * n + m] * inverse[m];
        double factor = 0.0;
        for (int p = 0; p < n; ++p) factor += V[l * n + p] * inverse[p] * M[p][m];
        coefficients[(n + m) * kLanes] = factor;
      }
      combine(parts, coefficients, 2 * n, b.d, gradient, true);
      const double* norm = b.norms + (j * n + l) * 2;
      read_known(b.candidates[l], j, b.d, {norm[0], norm[1]}, z);
      write_pulled(gradient, z, {norm[0], norm[1]}, normalizes_candidates(b), b.d, sums.candidates[l], j);
    }
  }
}

}  // namespace

extern const JointKernels PMRL_JOIN(joint_kernels_, PMRL_ISA);
const JointKernels PMRL_JOIN(joint_kernels_, PMRL_ISA) = {
    prepare_queries, prepare_candidates, bases,          scores,           gradients,
    pairs,           pair_gradients,     finish_queries, finish_candidates};

}  // namespace pmrl
