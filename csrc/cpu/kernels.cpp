// The CPU kernels, compiled once per instruction set (PMRL_ISA names it).
//
// Forward:  G = X X^T from one read of the embeddings; the spectrum, leading vector and alignment of kLanes
//           instances at once in SIMD lanes (common/); u = X^T c and z, where asked for, from a second read that
//           still finds the block in cache.
// Backward: coefficients of kLanes instances at once, then dX = h c^T + X C (+ direct columns), each embedding
//           read and each gradient written once; w = X h, where a gradient comes through u, reads the block before.
// Sums run in float64, where a product of two float32 is exact.
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

#if defined(__GNUC__)
#define PMRL_NOINLINE __attribute__((noinline))
#else
#define PMRL_NOINLINE
#endif

namespace pmrl {
namespace {

// ---- rows of embeddings -------------------------------------------------------------------------

template <class Element>
struct Row {
  const Element* data;
  PMRL_MEMBER F64 load(int64_t i) const { return load_native(data + i); }
  PMRL_MEMBER F64 load(int64_t i, int64_t n) const { return load_native(data + i, n); }
};

// A row of any dtype, times two powers of two: batches of mixed dtypes, and float64 instances whose squares
// leave float64's range.
struct AnyRow {
  const char* data;
  Dtype dtype;
  double factor, factor2;

  PMRL_MEMBER F64 load(int64_t i) const {
    switch (dtype) {
      case Dtype::kFloat64: return load_native(reinterpret_cast<const double*>(data) + i) * factor * factor2;
      case Dtype::kBFloat16: return load_native(reinterpret_cast<const BFloat16*>(data) + i) * factor * factor2;
      case Dtype::kFloat16: return load_native(reinterpret_cast<const Float16*>(data) + i) * factor * factor2;
      default: return load_native(reinterpret_cast<const float*>(data) + i) * factor * factor2;
    }
  }
  PMRL_MEMBER F64 load(int64_t i, int64_t n) const {
    switch (dtype) {
      case Dtype::kFloat64: return load_native(reinterpret_cast<const double*>(data) + i, n) * factor * factor2;
      case Dtype::kBFloat16: return load_native(reinterpret_cast<const BFloat16*>(data) + i, n) * factor * factor2;
      case Dtype::kFloat16: return load_native(reinterpret_cast<const Float16*>(data) + i, n) * factor * factor2;
      default: return load_native(reinterpret_cast<const float*>(data) + i, n) * factor * factor2;
    }
  }
};

PMRL_INLINE int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

template <class Element>
struct Target {
  Element* data;
  PMRL_MEMBER void store(int64_t i, F64 x) const { store_native(data + i, x); }
  PMRL_MEMBER void store(int64_t i, F64 x, int64_t n) const { store_native(data + i, x, n); }
};

struct AnyTarget {
  char* data;
  Dtype dtype;

  PMRL_MEMBER void store(int64_t i, F64 x) const { store(i, x, kNative); }
  PMRL_MEMBER void store(int64_t i, F64 x, int64_t n) const {
    switch (dtype) {
      case Dtype::kFloat64: return store_native(reinterpret_cast<double*>(data) + i, x, n);
      case Dtype::kBFloat16: return store_native(reinterpret_cast<BFloat16*>(data) + i, x, n);
      case Dtype::kFloat16: return store_native(reinterpret_cast<Float16*>(data) + i, x, n);
      default: return store_native(reinterpret_cast<float*>(data) + i, x, n);
    }
  }
};

// Where gradients of a row's dtype are written.
template <class RowType>
struct TargetOf;
template <class Element>
struct TargetOf<Row<Element>> {
  using type = Target<Element>;
  PMRL_MEMBER static type make(char* data, Dtype) { return {reinterpret_cast<Element*>(data)}; }
};
template <>
struct TargetOf<AnyRow> {
  using type = AnyTarget;
  PMRL_MEMBER static type make(char* data, Dtype dtype) { return {data, dtype}; }
};

template <class Element>
PMRL_INLINE void make_row(Row<Element>& row, const Rows& x, int64_t i, double) {
  row.data = reinterpret_cast<const Element*>(x.data + i * x.stride);
}
PMRL_INLINE void make_row(AnyRow& row, const Rows& x, int64_t i, double exponent) {
  const double half = round(exponent * 0.5);
  row = {x.data + i * x.stride, x.dtype, pow2(-half), pow2(half - exponent)};
}

// The rows of instance i. An absent modality shows a present one's row, which is as finite as the instance is; its
// Gram entries and coefficients are zeros. False if no modality is present.
template <class RowType>
PMRL_INLINE bool make_rows(const Batch& b, int64_t i, const double* exponents, RowType* rows) {
  const int k = b.settings.k;
  const uint8_t* mask = b.mask ? b.mask + i * k : nullptr;
  int first = 0;
  if (mask) {
    while (first < k && !mask[first]) ++first;
    if (first == k) return false;
  }
  for (int m = 0; m < k; ++m) {
    const int source = mask && !mask[m] ? first : m;
    make_row(rows[m], b.x[source], i, exponents ? exponents[source * kLanes] : 0.0);
  }
  return true;
}

PMRL_INLINE int triangle(int i, int j) { return j * (j + 1) / 2 + i; }  // of (i, j), i <= j, whatever k is

// ---- streaming: what touches d numbers ----------------------------------------------------------

// The side of the tiles that the Gram matrix of any k is cut into; their accumulators and rows stay in registers. For
// k <= 8 one triangle is faster (12 % at k = 8 with AVX-512, 4 % with AVX2), although some accumulators live in memory.
constexpr int kTile = kNative == 8 ? 4 : 3;

// G_ij = x_i . x_j for i <= j < R, entry (i, j) at out[triangle(first + i, first + j) * kLanes].
template <int R, class RowType>
PMRL_INLINE void gram_triangle(const RowType* rows, int first, int64_t d, double* out) {
  F64 sums[R * (R + 1) / 2] = {};
  F64 x[R];
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) {
    PMRL_UNROLL(8)
    for (int m = 0; m < R; ++m) x[m] = rows[m].load(c);
    PMRL_UNROLL(8)
    for (int j = 0; j < R; ++j)
      PMRL_UNROLL(8)
      for (int i = 0; i <= j; ++i) sums[triangle(i, j)] += x[i] * x[j];
  }
  if (c < d) {
    PMRL_UNROLL(8)
    for (int m = 0; m < R; ++m) x[m] = rows[m].load(c, d - c);
    PMRL_UNROLL(8)
    for (int j = 0; j < R; ++j)
      PMRL_UNROLL(8)
      for (int i = 0; i <= j; ++i) sums[triangle(i, j)] += x[i] * x[j];
  }
  PMRL_UNROLL(8)
  for (int j = 0; j < R; ++j)
    PMRL_UNROLL(8)
    for (int i = 0; i <= j; ++i) out[triangle(first + i, first + j) * kLanes] = sum(sums[triangle(i, j)]);
}

// G_ij = x_i . y_j for kTile rows x from row i0 on and R rows y from row j0 on.
template <int R, class RowType>
PMRL_INLINE void gram_rectangle(const RowType* left, const RowType* right, int i0, int j0, int64_t d, double* out) {
  F64 sums[kTile][R] = {};
  F64 x[kTile], y[R];
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) {
    PMRL_UNROLL(4)
    for (int s = 0; s < kTile; ++s) x[s] = left[s].load(c);
    PMRL_UNROLL(4)
    for (int t = 0; t < R; ++t) {
      y[t] = right[t].load(c);
      PMRL_UNROLL(4)
      for (int s = 0; s < kTile; ++s) sums[s][t] += x[s] * y[t];
    }
  }
  if (c < d) {
    PMRL_UNROLL(4)
    for (int s = 0; s < kTile; ++s) x[s] = left[s].load(c, d - c);
    PMRL_UNROLL(4)
    for (int t = 0; t < R; ++t) {
      y[t] = right[t].load(c, d - c);
      PMRL_UNROLL(4)
      for (int s = 0; s < kTile; ++s) sums[s][t] += x[s] * y[t];
    }
  }
  PMRL_UNROLL(4)
  for (int t = 0; t < R; ++t)
    PMRL_UNROLL(4)
    for (int s = 0; s < kTile; ++s) out[triangle(i0 + s, j0 + t) * kLanes] = sum(sums[s][t]);
}

// Columns j0 .. j0 + R - 1 of G.
template <int R, class RowType>
PMRL_NOINLINE void gram_columns(const RowType* rows, int j0, int64_t d, double* out) {
  for (int i0 = 0; i0 < j0; i0 += kTile) gram_rectangle<R>(rows + i0, rows + j0, i0, j0, d, out);
  gram_triangle<R>(rows + j0, j0, d, out);
}

template <int K, class RowType>
PMRL_NOINLINE void gram(const RowType* rows, int k, int64_t d, double* out) {
  if constexpr (K > 0) {
    gram_triangle<K>(rows, 0, d, out);
  } else {
    for (int j0 = 0; j0 < k; j0 += kTile) {
      const int size = k - j0 < kTile ? k - j0 : kTile;
      if (size == 1) gram_columns<1>(rows, j0, d, out);
      if (size == 2) gram_columns<2>(rows, j0, d, out);
      if (size == 3) gram_columns<3>(rows, j0, d, out);
      if (size == 4) gram_columns<kTile>(rows, j0, d, out);
    }
  }
}

// sum_m coefficient_m x_m, into float32 or (wide) float64.
template <class RowType>
PMRL_NOINLINE void combine(const RowType* rows, const double* coefficients, int k, int64_t d, void* out, bool wide) {
  for (int64_t c = 0; c < d; c += kNative) {
    const int64_t n = d - c < kNative ? d - c : kNative;
    F64 total{};
    for (int m = 0; m < k; ++m)
      total += coefficients[m * kLanes] * (n == kNative ? rows[m].load(c) : rows[m].load(c, n));
    if (wide)
      n == kNative ? store_native(static_cast<double*>(out) + c, total) : store_native(static_cast<double*>(out) + c, total, n);
    else
      n == kNative ? store_native(static_cast<float*>(out) + c, total) : store_native(static_cast<float*>(out) + c, total, n);
  }
}

// A row of incoming gradients: float32, or float64 if wide.
struct GradientRow {
  const char* data;
  bool wide;
  PMRL_MEMBER F64 load(int64_t i) const {
    return wide ? load_native(reinterpret_cast<const double*>(data) + i)
                : load_native(reinterpret_cast<const float*>(data) + i);
  }
  PMRL_MEMBER F64 load(int64_t i, int64_t n) const {
    return wide ? load_native(reinterpret_cast<const double*>(data) + i, n)
                : load_native(reinterpret_cast<const float*>(data) + i, n);
  }
};

template <class RowType>
PMRL_INLINE double dot(const RowType& x, const GradientRow& y, int64_t d) {
  F64 total{};
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) total += x.load(c) * y.load(c);
  if (c < d) total += x.load(c, d - c) * y.load(c, d - c);
  return sum(total);
}

// x_m . h for all m in one pass.
template <int K, class RowType>
PMRL_NOINLINE void dots(const RowType* rows, const GradientRow& h, int k, int64_t d, double* out) {
  if constexpr (K > 0) {
    F64 totals[K] = {};
    int64_t c = 0;
    for (; c + kNative <= d; c += kNative) {
      const F64 y = h.load(c);
      PMRL_UNROLL(8)
      for (int m = 0; m < K; ++m) totals[m] += rows[m].load(c) * y;
    }
    if (c < d) {
      const F64 y = h.load(c, d - c);
      PMRL_UNROLL(8)
      for (int m = 0; m < K; ++m) totals[m] += rows[m].load(c, d - c) * y;
    }
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) out[m * kLanes] = sum(totals[m]);
  } else {
    for (int m = 0; m < k; ++m) out[m * kLanes] = dot(rows[m], h, d);
  }
}

// dx_m = sum_j C_mj x_j for all m of an instance that asks for nothing else.
template <int K, class RowType>
PMRL_NOINLINE void apply(const RowType* rows, const double* C, int64_t d,
                         const typename TargetOf<RowType>::type* targets) {
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) {
    F64 x[K];
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) x[m] = rows[m].load(c);
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) {
      F64 total = C[triangle(0, m) * kLanes] * x[0];
      PMRL_UNROLL(8)
      for (int j = 1; j < K; ++j) total += C[(j < m ? triangle(j, m) : triangle(m, j)) * kLanes] * x[j];
      targets[m].store(c, total);
    }
  }
  if (c < d) {
    F64 x[K];
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) x[m] = rows[m].load(c, d - c);
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) {
      F64 total{};
      PMRL_UNROLL(8)
      for (int j = 0; j < K; ++j) total += C[(j < m ? triangle(j, m) : triangle(m, j)) * kLanes] * x[j];
      targets[m].store(c, total, d - c);
    }
  }
}

// What else may enter one instance's gradients.
struct Extras {
  GradientRow h;                       // dL/du_1; data null: none
  const double* c;                     // its coefficients, kLanes apart
  GradientRow direct[kMaxModalities];  // dL/dz_m; data null: none
  double direct_factor[kMaxModalities];
  double factor[kMaxModalities], factor2[kMaxModalities];  // of the result, but for a direct column added after
  bool direct_after;
};

// dx_m = (h c_m + sum_j C_mj x_j + H_m f) 2^e for those targets that are there, tile by tile.
template <class RowType>
PMRL_NOINLINE void apply_any(const RowType* rows, const double* C, int k, int64_t d,
                             const typename TargetOf<RowType>::type* targets, const Extras& e) {
  for (int first = 0; first < k; first += kTile)
    for (int64_t c = 0; c < d; c += kNative) {
      const int64_t n = d - c < kNative ? d - c : kNative;
      const bool whole = n == kNative;
      F64 totals[kTile] = {};
      for (int j = 0; j < k; ++j) {
        const F64 x = whole ? rows[j].load(c) : rows[j].load(c, n);
        PMRL_UNROLL(4)
        for (int t = 0; t < kTile; ++t) {
          const int m = first + t < k ? first + t : k - 1;
          totals[t] += C[(j < m ? triangle(j, m) : triangle(m, j)) * kLanes] * x;
        }
      }
      F64 h{};
      if (e.h.data) h = whole ? e.h.load(c) : e.h.load(c, n);
      PMRL_UNROLL(4)
      for (int t = 0; t < kTile; ++t) {
        const int m = first + t;
        if (m >= k || !targets[m].data) continue;
        F64 total = totals[t];
        if (e.h.data) total += e.c[m * kLanes] * h;
        F64 H{};
        if (e.direct[m].data) H = whole ? e.direct[m].load(c) : e.direct[m].load(c, n);
        if (e.direct[m].data && !e.direct_after) total += e.direct_factor[m] * H;
        total = total * e.factor[m] * e.factor2[m];
        if (e.direct[m].data && e.direct_after) total += H;
        whole ? targets[m].store(c, total) : targets[m].store(c, total, n);
      }
    }
}

// The above for one k, unrolled up to kTemplatedModalities; rows of any dtype use the loops of any k.
template <class RowType>
struct Streams {
  void (*gram)(const RowType*, int k, int64_t d, double* out);
  void (*dots)(const RowType*, const GradientRow&, int k, int64_t d, double* out);
  void (*apply)(const RowType*, const double* C, int64_t d, const typename TargetOf<RowType>::type*);  // null: none
};

template <class RowType>
struct StreamsOf {
  template <int K>
  static Streams<RowType> make() {
    return {gram<K, RowType>, dots<K, RowType>, apply<K, RowType>};
  }
  static Streams<RowType> make_any() { return {gram<0, RowType>, dots<0, RowType>, nullptr}; }
};

// Maker's make<K>() for that k, or its make_any().
template <class Maker>
auto for_k(int k) {
  static_assert(kTemplatedModalities == 8, "name them all");
  switch (k) {
    case 2: return Maker::template make<2>();
    case 3: return Maker::template make<3>();
    case 4: return Maker::template make<4>();
    case 5: return Maker::template make<5>();
    case 6: return Maker::template make<6>();
    case 7: return Maker::template make<7>();
    case 8: return Maker::template make<8>();
    default: return Maker::make_any();
  }
}

template <class RowType>
Streams<RowType> streams(int k) {
  return for_k<StreamsOf<RowType>>(k);
}
template <>
Streams<AnyRow> streams<AnyRow>(int) {
  return StreamsOf<AnyRow>::make_any();
}

// ---- a block of kLanes instances ----------------------------------------------------------------

struct Block {
  static constexpr int n = kMaxModalities;
  alignas(64) double gram[n * (n + 1) / 2][kLanes];  // forward: Gram entries; backward: coefficients C
  double present[n][kLanes];
  double exponent[n][kLanes];
  double sigma[n][kLanes];  // backward: incoming gradients
  double v[n][kLanes];
  double w[n][kLanes];
  double direct[n][kLanes];
  double alignment[kLanes];
};

// Where the parts of a block's state lie; each is a run of packs.
struct State {
  double *values, *matrix, *v, *inverse_norms, *exponents;
  PMRL_MEMBER State(const Batch& b, int64_t block) {
    const Settings& s = b.settings;
    const int k = s.k;
    values = b.state + block * state_size(s) * kLanes;
    matrix = values + (s.spectrum ? k : 1) * kLanes;
    v = matrix + (s.spectrum ? k * k : k * (k + 1) / 2) * kLanes;
    inverse_norms = v + k * kLanes;
    exponents = inverse_norms + (s.normalize ? k * kLanes : 0);
  }
};

PMRL_INLINE void read_mask(const Batch& b, int64_t start, Block& block) {
  const int k = b.settings.k;
  for (int m = 0; m < k; ++m)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = start + lane;
      block.present[m][lane] = i < b.B && (!b.mask || b.mask[i * k + m] != 0) ? 1.0 : 0.0;
    }
}

// What happens to a block in k-space, for one k.
template <int K>
PMRL_NOINLINE void solve(const Batch& b, int64_t index, bool aligned, Block& block);
template <int K>
PMRL_NOINLINE void solve_backward(const Backward& g, int64_t index, Block& block);

struct Solvers {
  void (*forward)(const Batch&, int64_t index, bool aligned, Block&);
  void (*backward)(const Backward&, int64_t index, Block&);

  template <int K>
  static Solvers make() {
    return {solve<K>, solve_backward<K>};
  }
  static Solvers make_any() { return make<0>(); }
};

// ---- forward ------------------------------------------------------------------------------------

// Exponents that bring one float64 instance to order 1, where its Gram matrix is out of range without them: one
// for each embedding if it will be normalised anyway, else one for all. False if none is needed.
PMRL_NOINLINE bool find_exponents(const Batch& b, int64_t i, int lane, Block& block) {
  const int k = b.settings.k;
  // the solvers square Gram entries once more
  constexpr double least = 0x1p-300, largest = 0x1p300;
  const auto in_range = [](double square) { return square > least && square < largest; };
  bool fine = b.settings.normalize;
  for (int m = 0; m < k; ++m) {
    if (block.present[m][lane] == 0.0) continue;
    const bool good = in_range(block.gram[triangle(m, m)][lane]);
    fine = b.settings.normalize ? fine && good : fine || good;
  }
  for (int m = 0; m < k && !b.settings.normalize; ++m)  // one column in range vouches for the rest but for overflow
    if (block.present[m][lane] != 0.0 && !(block.gram[triangle(m, m)][lane] < largest)) fine = false;
  if (fine) return false;
  double shared = 0.0;
  for (int m = 0; m < k; ++m) {
    AnyRow row;
    make_row(row, b.x[m], i, 0.0);
    double peak = 0.0;
    bool finite = true;
    if (block.present[m][lane] != 0.0)
      for (int64_t c = 0; c < b.d; c += kNative) {
        const F64 x = b.d - c < kNative ? row.load(c, b.d - c) : row.load(c);
        for (int t = 0; t < kNative; ++t) {
          const double magnitude = abs(x[t]);
          finite = finite && magnitude - magnitude == 0.0;
          peak = magnitude > peak ? magnitude : peak;
        }
      }
    // such a row is NaN in the end, whatever its scale
    int e = 0;
    if (finite && peak > 0.0) ::frexp(peak, &e);
    block.exponent[m][lane] = e;
    if (finite && peak > shared) shared = peak;
  }
  if (!b.settings.normalize) {
    int e = 0;
    if (shared > 0.0) ::frexp(shared, &e);
    for (int m = 0; m < k; ++m) block.exponent[m][lane] = e;
  }
  return true;
}

PMRL_INLINE bool is_scaled(const Batch& b, const Block& block, int lane) {
  if (!b.settings.wide) return false;
  bool any_scaled = false;
  for (int m = 0; m < b.settings.k; ++m) any_scaled = any_scaled || block.exponent[m][lane] != 0.0;
  return any_scaled;
}

// From the block's Gram matrices to its state and outputs.
template <int K>
PMRL_NOINLINE void solve(const Batch& b, int64_t index, bool aligned, Block& block) {
  Settings s = b.settings;
  if (K) s.k = K;
  const int k = s.k;
  const State state(b, index);
  Matrix<K, Pack> G;
  Columns<K, Pack> columns;
  for (int m = 0; m < k; ++m) {
    columns.present.at[m] = Pack::load(block.present[m]);
    if (s.wide) {
      columns.exponents.at[m] = Pack::load(block.exponent[m]);
      columns.exponents.at[m].store(state.exponents + m * kLanes);
    }
    for (int i = 0; i <= m; ++i) G.at[i][m] = Pack::load(block.gram[triangle(i, m)]);
  }
  if (s.normalize) {
    normalise_gram(G, columns, k);
    for (int m = 0; m < k; ++m) columns.inverse_norms.at[m].store(state.inverse_norms + m * kLanes);
  }
  Pack trace(0.0);
  for (int m = 0; m < k; ++m) trace = trace + G.at[m][m];

  Eigenpairs<K, Pack> E;
  Vector<K, Pack> v;
  if (s.spectrum) {
    const Pack broken = zero_or_nan(G, k);
    eigenpairs(G, E, k);
    drop_surplus(E.values, columns, s, broken);
    oriented(E, v, k, s.wide);
    for (int i = 0; i < k; ++i) {
      E.values.at[i].store(state.values + i * kLanes);
      for (int j = 0; j < k; ++j) E.V.at[i][j].store(state.matrix + (i * k + j) * kLanes);
    }
  } else {
    leading_pair(G, E.values.at[0], v, k, s.wide);
    E.values.at[0].store(state.values);
    for (int j = 0; j < k; ++j)
      for (int i = 0; i <= j; ++i) G.at[i][j].store(state.matrix + triangle(i, j) * kLanes);
  }
  if (aligned) alignment(E.values, trace, columns, s).store(block.alignment);
  for (int m = 0; m < k; ++m) {
    v.at[m].store(state.v + m * kLanes);
    v.at[m].store(block.v[m]);
    if (m == 0 || s.spectrum) {
      Pack sigma = sqrt(E.values.at[m]);
      if (s.wide && !s.normalize) sigma = scaled(sigma, columns.exponents.at[0]);
      sigma.store(block.sigma[m]);
    }
    Pack coefficient = v.at[m] * reciprocal(sqrt(E.values.at[0]));
    if (s.normalize) coefficient = coefficient * columns.inverse_norms.at[m];
    coefficient.store(block.w[m]);  // of u
  }
}

PMRL_INLINE void put(void* out, int64_t i, double x, bool wide) {
  if (wide)
    static_cast<double*>(out)[i] = x;
  else
    static_cast<float*>(out)[i] = static_cast<float>(x);
}

PMRL_INLINE char* output_row(void* out, int64_t i, int64_t d, bool wide) {
  return static_cast<char*>(out) + i * d * (wide ? 8 : 4);
}

template <class RowType>
PMRL_INLINE void write_vectors(const Forward& f, const RowType* rows, int64_t i, int lane, const Block& block,
                               const State& state) {
  const Settings& s = f.batch.settings;
  const int64_t d = f.batch.d;
  if (f.u) combine(rows, &block.w[0][lane], s.k, d, output_row(f.u, i, d, s.wide), s.wide);
  for (int m = 0; m < s.k; ++m) {
    if (!f.z[m]) continue;
    const double one = block.present[m][lane];  // absent rows are other rows, times 0
    const double factor = s.normalize ? state.inverse_norms[m * kLanes + lane] * one : one;
    char* out = output_row(f.z[m], i, d, s.wide);
    if (one == 0.0)
      memset(out, 0, d * (s.wide ? 8 : 4));
    else
      combine(rows + m, &factor, 1, d, out, s.wide);
  }
}

template <class RowType>
void forward_blocks(const Forward& f, int64_t begin, int64_t end) {
  const Batch& b = f.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  const Streams<RowType> stream = streams<RowType>(k);
  const Solvers solver = for_k<Solvers>(k);
  Block block;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * kLanes;
    read_mask(b, start, block);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = start + lane;
      RowType rows[kMaxModalities];
      for (int m = 0; m < k && s.wide; ++m) block.exponent[m][lane] = 0.0;
      if (i < b.B && make_rows(b, i, nullptr, rows)) {
        stream.gram(rows, k, b.d, &block.gram[0][lane]);
        if (s.wide && find_exponents(b, i, lane, block)) {
          AnyRow scaled_rows[kMaxModalities];
          make_rows(b, i, &block.exponent[0][lane], scaled_rows);
          gram<0>(scaled_rows, k, b.d, &block.gram[0][lane]);
        }
      } else {
        for (int t = 0; t < k * (k + 1) / 2; ++t) block.gram[t][lane] = 0.0;
      }
      for (int j = 0; j < k && b.mask; ++j)
        for (int m = 0; m <= j; ++m)
          if (block.present[m][lane] * block.present[j][lane] == 0.0) block.gram[triangle(m, j)][lane] = 0.0;
    }
    solver.forward(b, index, f.alignment || f.totals, block);
    double total = 0.0;
    const State state(b, index);
    for (int lane = 0; lane < kLanes && start + lane < b.B; ++lane) {
      const int64_t i = start + lane;
      if (f.alignment) put(f.alignment, i, block.alignment[lane], s.wide);
      if (f.totals) total += block.alignment[lane];
      for (int j = 0; j < f.values && f.sigma; ++j) put(f.sigma, i * f.values + j, block.sigma[j][lane], s.wide);
      for (int m = 0; m < k && f.v; ++m) put(f.v, i * k + m, block.v[m][lane], s.wide);
      if (!f.u && !f.z[0]) continue;
      RowType rows[kMaxModalities];
      if (!make_rows(b, i, nullptr, rows)) {
        if (f.u) memset(output_row(f.u, i, b.d, s.wide), 0, b.d * (s.wide ? 8 : 4));
        for (int m = 0; m < k && f.z[0]; ++m) memset(output_row(f.z[m], i, b.d, s.wide), 0, b.d * (s.wide ? 8 : 4));
      } else if (is_scaled(b, block, lane) && (s.normalize || f.u)) {
        AnyRow scaled_rows[kMaxModalities];
        make_rows(b, i, &block.exponent[0][lane], scaled_rows);
        if (s.normalize) {
          write_vectors(f, scaled_rows, i, lane, block, state);
        } else {  // u from scaled rows, z as they are
          combine(scaled_rows, &block.w[0][lane], k, b.d, output_row(f.u, i, b.d, s.wide), s.wide);
          Forward rest = f;
          rest.u = nullptr;
          write_vectors(rest, rows, i, lane, block, state);
        }
      } else {
        write_vectors(f, rows, i, lane, block, state);
      }
    }
    if (f.totals) f.totals[index] = total;
  }
}

// ---- backward -----------------------------------------------------------------------------------

PMRL_INLINE double get(const Values& values, int64_t i, int64_t j, bool wide) {
  const int64_t at = i * values.stride0 + j * values.stride1;
  return wide ? static_cast<const double*>(values.data)[at] : static_cast<const float*>(values.data)[at];
}

template <int K>
PMRL_NOINLINE void solve_backward(const Backward& g, int64_t index, Block& block) {
  const Batch& b = g.batch;
  Settings s = b.settings;
  if (K) s.k = K;
  const int k = s.k;
  const State state(b, index);
  Matrix<K, Pack> G;
  Eigenpairs<K, Pack> E;
  Vector<K, Pack> v;
  Columns<K, Pack> columns;
  Incoming<K, Pack> in;
  for (int m = 0; m < k; ++m) {
    columns.present.at[m] = Pack::load(block.present[m]);
    if (s.normalize) columns.inverse_norms.at[m] = Pack::load(state.inverse_norms + m * kLanes);
    if (s.wide) columns.exponents.at[m] = Pack::load(state.exponents + m * kLanes);
    v.at[m] = Pack::load(state.v + m * kLanes);
    if (s.spectrum) {
      E.values.at[m] = Pack::load(state.values + m * kLanes);
      for (int j = 0; j < k; ++j) E.V.at[m][j] = Pack::load(state.matrix + (m * k + j) * kLanes);
    } else {
      if (m == 0) E.values.at[0] = Pack::load(state.values);
      for (int i = 0; i <= m; ++i) G.at[i][m] = Pack::load(state.matrix + triangle(i, m) * kLanes);
    }
    in.sigma.at[m] = Pack::load(block.sigma[m]);
    in.w.at[m] = Pack::load(block.w[m]);
    in.q.at[m] = Pack::load(block.v[m]);
    in.direct.at[m] = Pack::load(block.direct[m]);
  }
  in.alignment = Pack::load(block.alignment);
  Coefficients<K, Pack> out;
  coefficients(in, g.alignment.data || g.sigma.data, g.u.data || g.v.data, E, G, v, columns, s, out);
  for (int m = 0; m < k; ++m) {
    for (int i = 0; i <= m; ++i) out.C.at[i][m].store(block.gram[triangle(i, m)]);
    out.c.at[m].store(block.w[m]);
    if (s.wide) out.exponent.at[m].store(block.sigma[m]);
  }
  out.slope.store(block.alignment);
}

template <class RowType>
PMRL_INLINE void incoming_dots(const Backward& g, const Streams<RowType>& stream, const RowType* rows, int64_t i,
                               int lane, Block& block) {
  const Settings& s = g.batch.settings;
  if (g.u.data) stream.dots(rows, {g.u.data + i * g.u.stride, s.wide}, s.k, g.batch.d, &block.w[0][lane]);
  for (int m = 0; m < s.k; ++m) {
    if (block.present[m][lane] == 0.0) block.w[m][lane] = 0.0;
    if (g.z[m].data && s.normalize && block.present[m][lane] != 0.0)
      block.direct[m][lane] = dot(rows[m], {g.z[m].data + i * g.z[m].stride, s.wide}, g.batch.d);
  }
}

template <class RowType>
PMRL_INLINE void write_gradients(const Backward& g, const Streams<RowType>& stream, const RowType* rows, int64_t i,
                                 int lane, const Block& block, const State& state, bool plain) {
  const Batch& b = g.batch;
  const Settings& s = b.settings;
  typename TargetOf<RowType>::type targets[kMaxModalities];
  for (int m = 0; m < s.k; ++m) {
    const bool wanted = g.out[m].data && block.present[m][lane] != 0.0;
    char* data = wanted ? g.out[m].data + i * g.out[m].stride : nullptr;
    targets[m] = TargetOf<RowType>::make(data, g.out[m].dtype);
    if (g.out[m].data && !wanted) memset(g.out[m].data + i * g.out[m].stride, 0, b.d * element_size(g.out[m].dtype));
    plain = plain && wanted;
  }
  if (plain && stream.apply) return stream.apply(rows, &block.gram[0][lane], b.d, targets);
  Extras e;
  e.h = {g.u.data ? g.u.data + i * g.u.stride : nullptr, s.wide};
  e.c = &block.w[0][lane];
  e.direct_after = !s.normalize;
  for (int m = 0; m < s.k; ++m) {
    e.direct[m] = {g.z[m].data ? g.z[m].data + i * g.z[m].stride : nullptr, s.wide};
    e.direct_factor[m] = s.normalize ? state.inverse_norms[m * kLanes + lane] : 1.0;
    e.factor[m] = e.factor2[m] = 1.0;
    if (s.wide) {
      const double exponent = block.sigma[m][lane], half = round(exponent * 0.5);
      e.factor[m] = pow2(half);
      e.factor2[m] = pow2(exponent - half);
    }
  }
  apply_any(rows, &block.gram[0][lane], s.k, b.d, targets, e);
}

template <class RowType>
void backward_blocks(const Backward& g, int64_t begin, int64_t end) {
  const Batch& b = g.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  bool direct = false;
  for (int m = 0; m < k; ++m) direct = direct || g.z[m].data;
  const Streams<RowType> stream = streams<RowType>(k);
  const Streams<AnyRow> any_stream = streams<AnyRow>(k);
  const Solvers solver = for_k<Solvers>(k);
  Block block;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * kLanes;
    const State state(b, index);
    read_mask(b, start, block);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = start + lane;
      const bool exists = i < b.B;
      block.alignment[lane] = exists && g.alignment.data ? get(g.alignment, i, 0, s.wide) * g.alignment_factor : 0.0;
      for (int m = 0; m < k; ++m) {
        block.sigma[m][lane] = exists && g.sigma.data && m < g.values ? get(g.sigma, i, m, s.wide) : 0.0;
        block.v[m][lane] =
            exists && g.v.data && block.present[m][lane] != 0.0 ? get(g.v, i, m, s.wide) : 0.0;
        block.w[m][lane] = block.direct[m][lane] = 0.0;
        if (s.wide) block.exponent[m][lane] = state.exponents[m * kLanes + lane];
      }
      RowType rows[kMaxModalities];
      if (!exists || !(g.u.data || direct) || !make_rows(b, i, nullptr, rows)) continue;
      if (is_scaled(b, block, lane)) {
        AnyRow scaled_rows[kMaxModalities];
        make_rows(b, i, &block.exponent[0][lane], scaled_rows);
        incoming_dots(g, any_stream, scaled_rows, i, lane, block);
      } else {
        incoming_dots(g, stream, rows, i, lane, block);
      }
    }
    solver.backward(g, index, block);
    double slope = 0.0;
    for (int lane = 0; lane < kLanes && start + lane < b.B; ++lane) {
      const int64_t i = start + lane;
      slope += block.alignment[lane];
      RowType rows[kMaxModalities];
      if (!make_rows(b, i, nullptr, rows)) {
        for (int m = 0; m < k; ++m)
          if (g.out[m].data) memset(g.out[m].data + i * g.out[m].stride, 0, b.d * element_size(g.out[m].dtype));
      } else if (is_scaled(b, block, lane)) {
        AnyRow scaled_rows[kMaxModalities];
        make_rows(b, i, &block.exponent[0][lane], scaled_rows);
        write_gradients(g, any_stream, scaled_rows, i, lane, block, state, false);
      } else {
        write_gradients(g, stream, rows, i, lane, block, state, !g.u.data && !direct);
      }
    }
    if (g.slopes) g.slopes[index] = slope;
  }
}

// ---- entry points -------------------------------------------------------------------------------

void forward(const Forward& f, int64_t begin, int64_t end) {
  switch (f.batch.dtype) {
    case Dtype::kFloat32: return forward_blocks<Row<float>>(f, begin, end);
    case Dtype::kFloat64: return forward_blocks<Row<double>>(f, begin, end);
    case Dtype::kBFloat16: return forward_blocks<Row<BFloat16>>(f, begin, end);
    case Dtype::kFloat16: return forward_blocks<Row<Float16>>(f, begin, end);
    default: return forward_blocks<AnyRow>(f, begin, end);
  }
}

void backward(const Backward& g, int64_t begin, int64_t end) {
  switch (g.batch.dtype) {
    case Dtype::kFloat32: return backward_blocks<Row<float>>(g, begin, end);
    case Dtype::kFloat64: return backward_blocks<Row<double>>(g, begin, end);
    case Dtype::kBFloat16: return backward_blocks<Row<BFloat16>>(g, begin, end);
    case Dtype::kFloat16: return backward_blocks<Row<Float16>>(g, begin, end);
    default: return backward_blocks<AnyRow>(g, begin, end);
  }
}

void row_dots(const Rows& x, const Rows& y, int64_t d, int64_t begin, int64_t end, double* out) {
  const bool wide = x.dtype == Dtype::kFloat64;
  for (int64_t i = begin; i < end; ++i)
    out[i] = dot(GradientRow{x.data + i * x.stride, wide}, {y.data + i * y.stride, wide}, d);
}

// The solvers alone, on matrices in row-major order.
template <int K>
void solve_matrices(const double* A, int64_t n, int k, bool all, bool wide, double* values, double* vectors) {
  if (K) k = K;  // or code for other k stays in, and compilers fuse sums in one register otherwise than in the next
  for (int64_t start = 0; start < n; start += kLanes) {
    const int lanes = n - start < kLanes ? static_cast<int>(n - start) : kLanes;
    double entry[kLanes] = {};
    Matrix<K, Pack> G;
    for (int i = 0; i < k; ++i)
      for (int j = i; j < k; ++j) {
        for (int lane = 0; lane < lanes; ++lane) entry[lane] = A[((start + lane) * k + i) * k + j];
        G.at[i][j] = Pack::load(entry);
      }
    Eigenpairs<K, Pack> E;
    Vector<K, Pack> v;
    if (all)
      eigenpairs(G, E, k);
    else
      leading_pair(G, E.values.at[0], v, k, wide);
    for (int j = 0; j < (all ? k : 1); ++j) {
      E.values.at[j].store(entry);
      for (int lane = 0; lane < lanes; ++lane) values[(start + lane) * (all ? k : 1) + j] = entry[lane];
      for (int m = 0; m < k; ++m) {
        (all ? E.V.at[m][j] : v.at[m]).store(entry);
        for (int lane = 0; lane < lanes; ++lane)
          vectors[((start + lane) * k + m) * (all ? k : 1) + j] = entry[lane];
      }
    }
  }
}

struct SolveMatrices {
  using Function = void (*)(const double*, int64_t, int, bool, bool, double*, double*);
  template <int K>
  static Function make() {
    return solve_matrices<K>;
  }
  static Function make_any() { return solve_matrices<0>; }
};

void all_eigenpairs(const double* A, int64_t n, int k, double* values, double* vectors) {
  for_k<SolveMatrices>(k)(A, n, k, true, false, values, vectors);
}

void all_leading_pairs(const double* A, int64_t n, int k, bool wide, double* values, double* vectors) {
  for_k<SolveMatrices>(k)(A, n, k, false, wide, values, vectors);
}

template <class Function>
PMRL_INLINE void map(const double* x, int64_t n, double* y, Function function) {
  for (int64_t start = 0; start < n; start += kLanes) {
    const int lanes = n - start < kLanes ? static_cast<int>(n - start) : kLanes;
    double entry[kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) entry[lane] = x[start + lane];
    function(Pack::load(entry)).store(entry);
    for (int lane = 0; lane < lanes; ++lane) y[start + lane] = entry[lane];
  }
}

void map_exp(const double* x, int64_t n, double* y) {
  map(x, n, y, [](Pack p) { return exp_nonpositive(p); });
}

void map_log1p(const double* x, int64_t n, double* y) {
  map(x, n, y, [](Pack p) { return log1p_nonnegative(p); });
}

}  // namespace

#define PMRL_JOIN(a, b) PMRL_JOIN_(a, b)
#define PMRL_JOIN_(a, b) a##b
#define PMRL_STRING(a) PMRL_STRING_(a)
#define PMRL_STRING_(a) #a

extern const Kernels PMRL_JOIN(kernels_, PMRL_ISA);
const Kernels PMRL_JOIN(kernels_, PMRL_ISA) = {
    PMRL_STRING(PMRL_ISA), kLanes,         forward,           backward, maxima,    sums, weights,
    row_dots,              all_eigenpairs, all_leading_pairs, map_exp,  map_log1p,
};

}  // namespace pmrl
