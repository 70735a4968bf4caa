// Passes over d: everything that reads or writes whole rows. For one instance of k rows x_m (d,) of any dtype,
//
//   gram        G_ij = x_i . x_j                                       reads k d elements, writes k (k + 1) / 2 numbers
//   dots        w_m = x_m . h                                          reads (k + 1) d, writes k numbers
//   combine     y = sum_m c_m x_m                                      reads k d, writes d elements (a row of u or z)
//   leave_out   w_m = r_m sum_{j != m} b_j x_j                         reads k d, writes k d elements
//   other_dots  x_j . sum_{m != j} r_m g_m, and w_m . g_m              reads 2 k d, writes 2 k numbers
//   apply       dx_m = sum_j C_mj x_j                                  reads k d, writes k d elements
//   apply_any   dx_m = (h c_m + R s_m + g_m o_m + sum_j C_mj x_j       reads up to (3 k + 1) d, writes up to k d
//                       + f_m H_m) 2^e_m, R = sum_j r_j g_j
//
// Sums run in float64, where the product of two float32 numbers is exact. Numbers of neighbouring instances lie side by
// side: those of one instance are kLanes apart (see spectral_kernels.h).
#pragma once

#include "kernels.h"
#include "simd.h"

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

// A row of any dtype, multiplied by a power of two: for batches of mixed dtypes, and for float64 instances whose
// squares leave float64's range.
struct AnyRow {
  const char* data;
  Dtype dtype;
  PowerOfTwo<double> factor;

  PMRL_MEMBER F64 load(int64_t i) const {
    return read([i](auto* from) { return load_native(from + i); });
  }
  PMRL_MEMBER F64 load(int64_t i, int64_t n) const {
    return read([i, n](auto* from) { return load_native(from + i, n); });
  }
  template <class Function>
  PMRL_MEMBER F64 read(Function function) const {
    const auto scale = [this](F64 x) { return x * factor.first * factor.second; };
    switch (dtype) {
      case Dtype::kFloat64: return scale(function(reinterpret_cast<const double*>(data)));
      case Dtype::kBFloat16: return scale(function(reinterpret_cast<const BFloat16*>(data)));
      case Dtype::kFloat16: return scale(function(reinterpret_cast<const Float16*>(data)));
      default: return scale(function(reinterpret_cast<const float*>(data)));
    }
  }
};

// Where a row of gradients is written.
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

// The target for gradients of a row: they have the row's dtype.
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

// Row i of x, times 2^-exponent if that is possible (with an AnyRow).
template <class Element>
PMRL_INLINE void make_row(Row<Element>& row, const Rows& x, int64_t i, double) {
  row.data = reinterpret_cast<const Element*>(x.data + i * x.stride);
}
PMRL_INLINE void make_row(AnyRow& row, const Rows& x, int64_t i, double exponent) {
  row = {x.data + i * x.stride, x.dtype, power_of_two(-exponent)};
}

// The k rows of instance i. In the place of an absent modality, whose memory may hold anything, stands the first
// present one's row; its Gram entries and coefficients become zeros. False if no modality is present.
template <class RowType>
PMRL_INLINE bool make_rows(const Batch& b, int64_t i, const double* exponents, RowType* rows) {
  const int k = b.settings.k;
  int first = 0;
  while (first < k && !is_present(b.mask, i * k + first)) ++first;
  if (first == k) return false;
  for (int m = 0; m < k; ++m) {
    const int source = is_present(b.mask, i * k + m) ? m : first;
    make_row(rows[m], b.x[source], i, exponents ? exponents[source * kLanes] : 0.0);
  }
  return true;
}

// ---- Gram matrices ------------------------------------------------------------------------------

// The Gram matrix of k > 8 rows is computed in tiles of this side, so that their sums and rows stay in registers. For
// k <= 8 the whole triangle at once is faster (12 % at k = 8 with AVX-512, 4 % with AVX2), although some sums then live
// in memory.
constexpr int kTile = kNative == 8 ? 4 : 3;

// G_ij = x_i . x_j for i <= j < R, entry (i, j) at out[triangle(first + i, first + j) * kLanes].
template <int R, class RowType>
PMRL_INLINE void gram_triangle(const RowType* rows, int first, int64_t d, double* out) {
  F64 sums[triangle_size(R)] = {};
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

// ---- vectors ------------------------------------------------------------------------------------

// sum_m coefficient_m x_m, into a row of float32 or float64.
template <class RowType>
PMRL_NOINLINE void combine(const RowType* rows, const double* coefficients, int k, int64_t d, void* out,
                           bool is_float64) {
  for (int64_t c = 0; c < d; c += kNative) {
    const int64_t n = d - c < kNative ? d - c : kNative;
    F64 total{};
    for (int m = 0; m < k; ++m)
      total += coefficients[m * kLanes] * (n == kNative ? rows[m].load(c) : rows[m].load(c, n));
    const auto store = [&](auto* to) { n == kNative ? store_native(to, total) : store_native(to, total, n); };
    if (is_float64)
      store(static_cast<double*>(out) + c);
    else
      store(static_cast<float*>(out) + c);
  }
}

// A row of float32 or float64: incoming gradients, or unit vectors.
struct FloatRow {
  const char* data;
  bool is_float64;
  PMRL_MEMBER F64 load(int64_t i) const {
    return is_float64 ? load_native(reinterpret_cast<const double*>(data) + i)
                : load_native(reinterpret_cast<const float*>(data) + i);
  }
  PMRL_MEMBER F64 load(int64_t i, int64_t n) const {
    return is_float64 ? load_native(reinterpret_cast<const double*>(data) + i, n)
                : load_native(reinterpret_cast<const float*>(data) + i, n);
  }
};

template <class RowType>
PMRL_INLINE double dot(const RowType& x, const FloatRow& y, int64_t d) {
  F64 total{};
  int64_t c = 0;
  for (; c + kNative <= d; c += kNative) total += x.load(c) * y.load(c);
  if (c < d) total += x.load(c, d - c) * y.load(c, d - c);
  return sum(total);
}

// x_m . h for all m, in one pass for K > 0.
template <int K, class RowType>
PMRL_NOINLINE void dots(const RowType* rows, const FloatRow& h, int k, int64_t d, double* out) {
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

// w_m = r_m (Y - b_m x_m), Y = sum_j b_j x_j, into k rows of float32 or float64. What Y has of x_m besides costs no
// digits that count: w_m is zeros, r_m = 0, where the others are nothing beside it.
template <class RowType>
PMRL_NOINLINE void leave_out(const RowType* rows, const double* b, const double* r, int k, int64_t d,
                             char* const* out, bool is_float64) {
  for (int64_t c = 0; c < d; c += kNative) {
    const int64_t n = d - c < kNative ? d - c : kNative;
    F64 parts[kMaxModalities], total{};
    for (int m = 0; m < k; ++m) {
      parts[m] = b[m * kLanes] * (n == kNative ? rows[m].load(c) : rows[m].load(c, n));
      total += parts[m];
    }
    for (int m = 0; m < k; ++m) {
      const F64 w = (total - parts[m]) * r[m * kLanes];
      const auto store = [&](auto* to) { n == kNative ? store_native(to, w) : store_native(to, w, n); };
      if (is_float64)
        store(reinterpret_cast<double*>(out[m]) + c);
      else
        store(reinterpret_cast<float*>(out[m]) + c);
    }
  }
}

// From gradients g_m of the w, some of which may be null: x_j . (R - r_j g_j) with R = sum_m r_m g_m, and
// r_m g_m . (Y - b_m x_m). In 3 k products, not k^2.
template <int K, class RowType>
PMRL_NOINLINE void other_dots(const RowType* rows, const FloatRow* g, const double* b, const double* r, int k,
                              int64_t d, double* others, double* along) {
  constexpr int n = K > 0 ? K : kMaxModalities;
  if (K > 0) k = K;
  F64 with_shared[n] = {}, with_own[n] = {}, with_sum[n] = {}, x[n], y[n];
  for (int64_t c = 0; c < d; c += kNative) {
    const int64_t size = d - c < kNative ? d - c : kNative;
    const bool whole = size == kNative;
    F64 R{}, Y{};
    PMRL_UNROLL(8)
    for (int m = 0; m < k; ++m) {
      x[m] = whole ? rows[m].load(c) : rows[m].load(c, size);
      y[m] = F64{};
      if (g[m].data) y[m] = whole ? g[m].load(c) : g[m].load(c, size);
      R += r[m * kLanes] * y[m];
      Y += b[m * kLanes] * x[m];
    }
    PMRL_UNROLL(8)
    for (int m = 0; m < k; ++m) {
      with_shared[m] += x[m] * R;
      with_own[m] += x[m] * y[m];
      with_sum[m] += y[m] * Y;
    }
  }
  for (int m = 0; m < k; ++m) {
    const double own = sum(with_own[m]);
    others[m * kLanes] = sum(with_shared[m]) - r[m * kLanes] * own;
    along[m * kLanes] = r[m * kLanes] * (sum(with_sum[m]) - b[m * kLanes] * own);
  }
}

// ---- gradients ----------------------------------------------------------------------------------

// dx_m = sum_j C_mj x_j for all m, for an instance of which only this is asked.
template <int K, class RowType>
PMRL_NOINLINE void apply(const RowType* rows, const double* C, int64_t d,
                         const typename TargetOf<RowType>::type* targets) {
  // Copies, which stay in registers: what is stored to a target might be any of the originals, to a compiler.
  F64 c[triangle_size(K)];
  RowType from[K];
  typename TargetOf<RowType>::type to[K];
  PMRL_UNROLL(8)
  for (int m = 0; m < K; ++m) {
    from[m] = rows[m], to[m] = targets[m];
    PMRL_UNROLL(8)
    for (int j = 0; j <= m; ++j) c[triangle(j, m)] = broadcast(C[triangle(j, m) * kLanes]);
  }
  int64_t i = 0;
  for (; i + kNative <= d; i += kNative) {
    F64 x[K];
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) x[m] = from[m].load(i);
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) {
      F64 total = c[triangle(0, m)] * x[0];
      PMRL_UNROLL(8)
      for (int j = 1; j < K; ++j) total += c[triangle_any(j, m)] * x[j];
      to[m].store(i, total);
    }
  }
  if (i < d) {
    F64 x[K];
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) x[m] = from[m].load(i, d - i);
    PMRL_UNROLL(8)
    for (int m = 0; m < K; ++m) {
      F64 total{};
      PMRL_UNROLL(8)
      for (int j = 0; j < K; ++j) total += c[triangle_any(j, m)] * x[j];
      to[m].store(i, total, d - i);
    }
  }
}

// What else may enter one instance's gradients.
struct Extras {
  FloatRow h;                       // dL/du_1; data null: none
  const double* c;                  // its coefficients, kLanes apart
  FloatRow g[kMaxModalities];       // dL/dw_m; data null: none
  bool others;                      // whether there is one
  const double *r, *shared, *own;   // of R = sum_m r_m g_m, and the coefficients of R and of g_m, kLanes apart
  FloatRow direct[kMaxModalities];  // H_m = dL/dz_m; data null: none
  double direct_factor[kMaxModalities];       // f_m
  PowerOfTwo<double> factor[kMaxModalities];  // 2^e_m
  bool direct_after;  // H_m is added after the multiplication by 2^e_m, and as it is
};

// dx_m = (h c_m + R s_m + g_m o_m + sum_j C_mj x_j + f_m H_m) 2^e_m for those m that have a target, kTile of them at a
// time.
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
          totals[t] += C[triangle_any(j, m) * kLanes] * x;
        }
      }
      F64 h{}, R{};
      if (e.h.data) h = whole ? e.h.load(c) : e.h.load(c, n);
      const auto own = [&](int m) { return whole ? e.g[m].load(c) : e.g[m].load(c, n); };
      for (int m = 0; m < k && e.others; ++m)
        if (e.g[m].data) R += e.r[m * kLanes] * own(m);
      PMRL_UNROLL(4)
      for (int t = 0; t < kTile; ++t) {
        const int m = first + t;
        if (m >= k || !targets[m].data) continue;
        F64 total = totals[t];
        if (e.h.data) total += e.c[m * kLanes] * h;
        if (e.others) total += e.shared[m * kLanes] * R;
        if (e.g[m].data) total += e.own[m * kLanes] * own(m);
        F64 H{};
        if (e.direct[m].data) H = whole ? e.direct[m].load(c) : e.direct[m].load(c, n);
        if (e.direct[m].data && !e.direct_after) total += e.direct_factor[m] * H;
        total = total * e.factor[m].first * e.factor[m].second;
        if (e.direct[m].data && e.direct_after) total += H;
        whole ? targets[m].store(c, total) : targets[m].store(c, total, n);
      }
    }
}

// ---- by k ---------------------------------------------------------------------------------------

// The passes for one k: unrolled up to kTemplatedModalities, else loops for any k. Rows of any dtype have the loops
// only.
template <class RowType>
struct Passes {
  void (*gram)(const RowType*, int k, int64_t d, double* out);
  void (*dots)(const RowType*, const FloatRow&, int k, int64_t d, double* out);
  void (*other_dots)(const RowType*, const FloatRow* g, const double* b, const double* r, int k, int64_t d,
                     double* others, double* along);
  void (*apply)(const RowType*, const double* C, int64_t d, const typename TargetOf<RowType>::type*);  // null: none
};

template <class RowType>
struct PassesOf {
  template <int K>
  static Passes<RowType> make() {
    return {gram<K, RowType>, dots<K, RowType>, other_dots<K, RowType>, apply<K, RowType>};
  }
  static Passes<RowType> make_any() { return {gram<0, RowType>, dots<0, RowType>, other_dots<0, RowType>, nullptr}; }
};

// Maker's make<K>() for this k, or its make_any().
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
Passes<RowType> passes_for(int k) {
  return for_k<PassesOf<RowType>>(k);
}
template <>
[[maybe_unused]] Passes<AnyRow> passes_for<AnyRow>(int) {
  return PassesOf<AnyRow>::make_any();
}

}  // namespace
}  // namespace pmrl
