// The spectral operators, instance by instance: X (d, k), Z its columns over their norms (or X itself).
//
// Forward   reads X, mask; writes alignment, sigma, v_1, u_1 = Z v_1 / sigma_1 (d,), z_m (d,),
//           w_m = y_m/||y_m||, y_m = sum_{j != m} |v_1j| z_j (d,), and the state
//
//   G = X^T X, from one pass over the embeddings
//   singular values, v_1 and the alignment term from G, for kLanes instances at once (common/kspace.h)
//   u_1, z and w, where wanted, from a second pass, which finds the block of instances in cache
//
// Backward  reads X, mask, the state and incoming gradients; writes dX and dL/d tau
//
//   X^T h, h = dL/du_1, x_m . dL/dz_m, and what passes.h calls other_dots with g_m = dL/dw_m, where such gradients come
//   in, from one pass
//   coefficients from these and the state, for kLanes instances at once
//   dX = h c^T + X C (+ dL/dz, + g), from one pass: each embedding is read and each gradient written once
#pragma once

#include "passes.h"
#include "solvers.h"

namespace pmrl {
namespace {

// ---- a block of kLanes instances ----------------------------------------------------------------

// What the passes over d and the algebra hand to each other; an instance in each lane.
struct Block {
  static constexpr int n = kMaxModalities;
  alignas(64) double gram[triangle_size(n)][kLanes];  // forward: Gram entries; backward: coefficients C
  double present[n][kLanes];   // 1 or 0
  double exponent[n][kLanes];  // e: column m is scaled by 2^-e; with `float64_input`
  double sigma[n][kLanes];     // forward: singular values; backward: incoming gradients, then exponents of dX
  double v[n][kLanes];         // forward: v_1; backward: the incoming gradient
  double w[n][kLanes];         // forward: coefficients of u_1; backward: X^T h, then coefficients of h
  double direct[n][kLanes];    // backward: x_m . dL/dz_m
  double inverse[n][kLanes];   // with `others`: 1/||y_m||
  double weights[n][kLanes];   // with `others`: b_j of y_m = sum_{j != m} b_j x_j
  double others[n][kLanes];    // backward: x_j . sum_{m != j} g_m/||y_m||, then coefficients of sum_m g_m/||y_m||
  double along[n][kLanes];     // backward: w_m . g_m, then coefficients of the g_m
  double alignment[kLanes];    // forward: the alignment term; backward: its incoming gradient, then dL/d tau
};

// Where the parts of a block's state lie (see state_size). In each, the kLanes numbers of one entry are side by side.
struct State {
  double *values, *matrix, *v, *inverse_norms, *others, *exponents;
  PMRL_MEMBER State(const Batch& b, int64_t block) {
    const Settings& s = b.settings;
    const int k = s.k;
    values = b.state + block * state_size(s) * kLanes;
    matrix = values + (s.spectrum ? k : 1) * kLanes;
    v = matrix + (s.spectrum ? k * k : triangle_size(k)) * kLanes;
    inverse_norms = v + k * kLanes;
    others = inverse_norms + (s.normalize ? k * kLanes : 0);
    exponents = others + (s.others ? k * kLanes : 0);
  }
};

PMRL_INLINE void read_mask(const Batch& b, int64_t start, Block& block) {
  const int k = b.settings.k;
  for (int m = 0; m < k; ++m)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = start + lane;
      block.present[m][lane] = i < b.B && is_present(b.mask, i * k + m) ? 1.0 : 0.0;
    }
}

// The k x k work on a block, for one k.
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

// Exponents that scale a float64 instance to order 1, if its Gram matrix is out of range without: one for each
// embedding if these are normalised anyway, else the same for all. False if none is needed.
PMRL_NOINLINE bool find_exponents(const Batch& b, int64_t i, int lane, Block& block) {
  const int k = b.settings.k;
  const auto in_range = [](double square) { return square > kLeastSquare && square < kLargestSquare; };
  bool fine = b.settings.normalize;
  for (int m = 0; m < k; ++m) {
    if (block.present[m][lane] == 0.0) continue;
    const bool good = in_range(block.gram[triangle(m, m)][lane]);
    fine = b.settings.normalize ? fine && good : fine || good;
  }
  // Not normalised, one column in range is enough, as long as no other is too large: one far smaller does not matter.
  for (int m = 0; m < k && !b.settings.normalize; ++m)
    if (block.present[m][lane] != 0.0 && !(block.gram[triangle(m, m)][lane] < kLargestSquare)) fine = false;
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
    // A row that is not finite gives NaN at any scale.
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
  if (!b.settings.float64_input) return false;
  bool any_scaled = false;
  for (int m = 0; m < b.settings.k; ++m) any_scaled = any_scaled || block.exponent[m][lane] != 0.0;
  return any_scaled;
}

// Zeros for what only a decomposition finds.
PMRL_INLINE void leave_undecomposed(const State& state) {
  const int64_t numbers = state.inverse_norms - state.values;
  for (int64_t i = 0; i < numbers; ++i) state.values[i] = 0.0;
}

// b_m of y_j = sum_{m != j} b_m x_m.
template <int K>
PMRL_INLINE Pack weight_of_others(const Vector<K, Pack>& v, const Columns<K, Pack>& columns, int m, const Settings& s) {
  const Pack a = abs(v.at[m]);
  return s.normalize ? a * columns.inverse_norms.at[m] : a;
}

// From the block's Gram matrices to its state and outputs. `aligned`: the alignment term is wanted.
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
    if (s.float64_input) {
      columns.exponents.at[m] = Pack::load(block.exponent[m]);
      columns.exponents.at[m].store(state.exponents + m * kLanes);
    }
    for (int i = 0; i <= m; ++i) G.at[i][m] = Pack::load(block.gram[triangle(i, m)]);
  }
  if (s.normalize) {
    normalise_gram(G, columns, k);
    for (int m = 0; m < k; ++m) columns.inverse_norms.at[m].store(state.inverse_norms + m * kLanes);
  }
  if (!s.decompose) return leave_undecomposed(state);
  Pack trace(0.0);
  for (int m = 0; m < k; ++m) trace = trace + G.at[m][m];
  Matrix<K, Pack> kept;  // eigenpairs overwrites G
  if (s.others) kept = G;

  Eigenpairs<K, Pack> E;
  Vector<K, Pack> v;
  if (s.spectrum) {
    const Pack broken = zero_or_nan(G, k);
    solvers::eigenpairs(G, E, k);
    drop_surplus(E.values, columns, s, broken);
    oriented(E, v, k, s.float64_input);
    for (int i = 0; i < k; ++i) {
      E.values.at[i].store(state.values + i * kLanes);
      for (int j = 0; j < k; ++j) E.V.at[i][j].store(state.matrix + (i * k + j) * kLanes);
    }
  } else {
    solvers::leading_pair(G, E.values.at[0], v, k, s.float64_input);
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
      if (s.float64_input && !s.normalize) sigma = scaled(sigma, columns.exponents.at[0]);
      sigma.store(block.sigma[m]);
    }
    Pack coefficient = v.at[m] * reciprocal(sqrt(E.values.at[0]));
    if (s.normalize) coefficient = coefficient * columns.inverse_norms.at[m];
    coefficient.store(block.w[m]);  // u_1 = sum_m coefficient_m x_m
  }
  if (!s.others) return;
  inverse_norms_of_others(kept, v, k, columns.others);
  for (int m = 0; m < k; ++m) {
    columns.others.at[m].store(state.others + m * kLanes);
    columns.others.at[m].store(block.inverse[m]);
    weight_of_others(v, columns, m, s).store(block.weights[m]);
  }
}

// Into outputs of float32 or float64.
PMRL_INLINE void put(void* out, int64_t i, double x, bool is_float64) {
  if (is_float64)
    static_cast<double*>(out)[i] = x;
  else
    static_cast<float*>(out)[i] = static_cast<float>(x);
}

PMRL_INLINE char* output_row(void* out, int64_t i, int64_t d, bool is_float64) {
  return static_cast<char*>(out) + i * d * (is_float64 ? 8 : 4);
}

// u_1 and the w of one instance, from rows that are scaled as the block says.
template <class RowType>
PMRL_INLINE void write_directions(const Forward& f, const RowType* rows, int64_t i, int lane, const Block& block) {
  const Settings& s = f.batch.settings;
  const int64_t d = f.batch.d;
  if (f.u) combine(rows, &block.w[0][lane], s.k, d, output_row(f.u, i, d, s.float64_input), s.float64_input);
  if (!f.w[0]) return;
  char* out[kMaxModalities];
  for (int m = 0; m < s.k; ++m) out[m] = output_row(f.w[m], i, d, s.float64_input);
  leave_out(rows, &block.weights[0][lane], &block.inverse[0][lane], s.k, d, out, s.float64_input);
}

// The z of one instance, from rows that are scaled as the block says if they are normalised, else from unscaled ones.
template <class RowType>
PMRL_INLINE void write_units(const Forward& f, const RowType* rows, int64_t i, int lane, const Block& block,
                             const State& state) {
  const Settings& s = f.batch.settings;
  const int64_t d = f.batch.d;
  for (int m = 0; m < s.k; ++m) {
    if (!f.z[m]) continue;
    const double one = block.present[m][lane];
    const double factor = s.normalize ? state.inverse_norms[m * kLanes + lane] * one : one;
    char* out = output_row(f.z[m], i, d, s.float64_input);
    if (one == 0.0)
      memset(out, 0, d * (s.float64_input ? 8 : 4));
    else
      combine(rows + m, &factor, 1, d, out, s.float64_input);
  }
}

// Gram matrices of the block that begins with instance `start`, and exponents. Those of absent embeddings, and of lanes
// without an instance, are zeros.
template <class RowType>
PMRL_INLINE void read_grams(const Batch& b, const Passes<RowType>& passes, int64_t start, Block& block) {
  const Settings& s = b.settings;
  const int k = s.k;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = start + lane;
    RowType rows[kMaxModalities];
    for (int m = 0; m < k && s.float64_input; ++m) block.exponent[m][lane] = 0.0;
    if (i < b.B && make_rows(b, i, nullptr, rows)) {
      passes.gram(rows, k, b.d, &block.gram[0][lane]);
      if (s.float64_input && find_exponents(b, i, lane, block)) {
        AnyRow scaled_rows[kMaxModalities];
        make_rows(b, i, &block.exponent[0][lane], scaled_rows);
        gram<0>(scaled_rows, k, b.d, &block.gram[0][lane]);
      }
    } else {
      for (int t = 0; t < triangle_size(k); ++t) block.gram[t][lane] = 0.0;
    }
    for (int j = 0; j < k && b.mask; ++j)
      for (int m = 0; m <= j; ++m)
        if (block.present[m][lane] * block.present[j][lane] == 0.0) block.gram[triangle(m, j)][lane] = 0.0;
  }
}

// Outputs with d numbers, of one instance.
template <class RowType>
PMRL_INLINE void write_rows(const Forward& f, int64_t i, int lane, const Block& block, const State& state) {
  const Batch& b = f.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  const int64_t bytes = b.d * (s.float64_input ? 8 : 4);
  RowType rows[kMaxModalities];
  if (!make_rows(b, i, nullptr, rows)) {
    if (f.u) memset(output_row(f.u, i, b.d, s.float64_input), 0, bytes);
    for (int m = 0; m < k && f.z[0]; ++m) memset(output_row(f.z[m], i, b.d, s.float64_input), 0, bytes);
    for (int m = 0; m < k && f.w[0]; ++m) memset(output_row(f.w[m], i, b.d, s.float64_input), 0, bytes);
  } else if (is_scaled(b, block, lane)) {
    AnyRow scaled_rows[kMaxModalities];
    make_rows(b, i, &block.exponent[0][lane], scaled_rows);
    write_directions(f, scaled_rows, i, lane, block);
    if (s.normalize)
      write_units(f, scaled_rows, i, lane, block, state);
    else
      write_units(f, rows, i, lane, block, state);
  } else {
    write_directions(f, rows, i, lane, block);
    write_units(f, rows, i, lane, block, state);
  }
}

template <class RowType>
void forward_blocks(const Forward& f, int64_t begin, int64_t end) {
  const Batch& b = f.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  const Passes<RowType> passes = passes_for<RowType>(k);
  const Solvers solver = for_k<Solvers>(k);
  Block block;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * kLanes;
    read_mask(b, start, block);
    read_grams(b, passes, start, block);
    solver.forward(b, index, f.alignment || f.totals, block);
    double total = 0.0;
    const State state(b, index);
    for (int lane = 0; lane < kLanes && start + lane < b.B; ++lane) {
      const int64_t i = start + lane;
      if (f.alignment) put(f.alignment, i, block.alignment[lane], s.float64_input);
      if (f.totals) total += block.alignment[lane];
      for (int j = 0; j < f.values && f.sigma; ++j)
        put(f.sigma, i * f.values + j, block.sigma[j][lane], s.float64_input);
      for (int m = 0; m < k && f.v; ++m) put(f.v, i * k + m, block.v[m][lane], s.float64_input);
      if (f.u || f.z[0] || f.w[0]) write_rows<RowType>(f, i, lane, block, state);
    }
    if (f.totals) f.totals[index] = total;
  }
}

// ---- backward -----------------------------------------------------------------------------------

// Entry (i, j) of an incoming gradient.
PMRL_INLINE double get(const Values& values, int64_t i, int64_t j, bool is_float64) {
  const int64_t at = i * values.stride0 + j * values.stride1;
  return is_float64 ? static_cast<const double*>(values.data)[at] : static_cast<const float*>(values.data)[at];
}

PMRL_INLINE Through through_of(const Backward& g) {
  bool others = false;
  for (int m = 0; m < g.batch.settings.k; ++m) others = others || g.w[m].data;
  return {g.alignment.data || g.sigma.data, g.u.data || g.v.data, others};
}

// From the block's incoming gradients and its state to the coefficients of its gradients.
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
  const Through through = through_of(g);
  for (int m = 0; m < k; ++m) {
    columns.present.at[m] = Pack::load(block.present[m]);
    if (s.normalize) columns.inverse_norms.at[m] = Pack::load(state.inverse_norms + m * kLanes);
    if (s.others) columns.others.at[m] = Pack::load(state.others + m * kLanes);
    if (s.float64_input) columns.exponents.at[m] = Pack::load(state.exponents + m * kLanes);
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
    if (through.others) {
      in.others.at[m] = Pack::load(block.others[m]);
      in.along.at[m] = Pack::load(block.along[m]);
    }
  }
  in.alignment = Pack::load(block.alignment);
  const Pack top = E.values.at[0];
  Vector<K, Pack> diagonal;
  for (int m = 0; m < k && !s.spectrum; ++m) diagonal.at[m] = G.at[m][m];
  if (takes_eigenpairs(through, s)) solvers::eigenpairs(G, E, k);
  Coefficients<K, Pack> out;
  coefficients(in, through, top, E, diagonal, v, columns, s, out);
  for (int m = 0; m < k; ++m) {
    for (int i = 0; i <= m; ++i) out.C.at[i][m].store(block.gram[triangle(i, m)]);
    out.c.at[m].store(block.w[m]);
    if (through.others) {
      out.shared.at[m].store(block.others[m]);
      out.own.at[m].store(block.along[m]);
    }
    if (s.float64_input) out.exponent.at[m].store(block.sigma[m]);
  }
  out.slope.store(block.alignment);
}

// Row i of an incoming gradient.
PMRL_INLINE FloatRow row_of(const Rows& grad, int64_t i, bool is_float64) {
  return {grad.data ? grad.data + i * grad.stride : nullptr, is_float64};
}

// X^T h, x_m . dL/dz_m where these gradients pass through a norm, and what the gradients of the w are along x and w, of
// one instance.
template <class RowType>
PMRL_INLINE void incoming_dots(const Backward& g, const Passes<RowType>& passes, const RowType* rows, int64_t i,
                               int lane, bool others, Block& block) {
  const Settings& s = g.batch.settings;
  if (others) {
    FloatRow of_w[kMaxModalities];
    for (int m = 0; m < s.k; ++m) of_w[m] = row_of(g.w[m], i, s.float64_input);
    passes.other_dots(rows, of_w, &block.weights[0][lane], &block.inverse[0][lane], s.k, g.batch.d,
                      &block.others[0][lane], &block.along[0][lane]);
    for (int m = 0; m < s.k; ++m)
      if (block.present[m][lane] == 0.0) block.others[m][lane] = 0.0;
  }
  if (g.u.data) passes.dots(rows, {g.u.data + i * g.u.stride, s.float64_input}, s.k, g.batch.d, &block.w[0][lane]);
  for (int m = 0; m < s.k; ++m) {
    if (block.present[m][lane] == 0.0) block.w[m][lane] = 0.0;
    if (g.z[m].data && s.normalize && block.present[m][lane] != 0.0)
      block.direct[m][lane] = dot(rows[m], {g.z[m].data + i * g.z[m].stride, s.float64_input}, g.batch.d);
  }
}

// dX of one instance. `plain`: X C is all there is to it, unscaled.
template <class RowType>
PMRL_INLINE void write_gradients(const Backward& g, const Passes<RowType>& passes, const RowType* rows, int64_t i,
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
  if (plain && passes.apply) return passes.apply(rows, &block.gram[0][lane], b.d, targets);
  Extras e;
  e.h = row_of(g.u, i, s.float64_input);
  e.c = &block.w[0][lane];
  e.others = through_of(g).others;
  e.r = &block.inverse[0][lane], e.shared = &block.others[0][lane], e.own = &block.along[0][lane];
  e.direct_after = !s.normalize;
  for (int m = 0; m < s.k; ++m) {
    e.g[m] = row_of(g.w[m], i, s.float64_input);
    e.direct[m] = row_of(g.z[m], i, s.float64_input);
    e.direct_factor[m] = s.normalize ? state.inverse_norms[m * kLanes + lane] : 1.0;
    e.factor[m] = {1.0, 1.0};
    if (s.float64_input) e.factor[m] = power_of_two(block.sigma[m][lane]);
  }
  apply_any(rows, &block.gram[0][lane], s.k, b.d, targets, e);
}

// What comes in for the block that begins with instance `start`. `direct`: some of it through z or w.
template <class RowType>
PMRL_INLINE void read_incoming(const Backward& g, const Passes<RowType>& passes, const State& state, int64_t start,
                               bool direct, Block& block) {
  const Batch& b = g.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  const bool others = through_of(g).others;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = start + lane;
    const bool exists = i < b.B;
    block.alignment[lane] =
        exists && g.alignment.data ? get(g.alignment, i, 0, s.float64_input) * g.alignment_factor : 0.0;
    for (int m = 0; m < k; ++m) {
      block.sigma[m][lane] = exists && g.sigma.data && m < g.values ? get(g.sigma, i, m, s.float64_input) : 0.0;
      block.v[m][lane] = exists && g.v.data && block.present[m][lane] != 0.0 ? get(g.v, i, m, s.float64_input) : 0.0;
      block.w[m][lane] = block.direct[m][lane] = block.others[m][lane] = block.along[m][lane] = 0.0;
      if (others) {
        block.inverse[m][lane] = state.others[m * kLanes + lane];
        const double a = abs(state.v[m * kLanes + lane]);
        block.weights[m][lane] = s.normalize ? a * state.inverse_norms[m * kLanes + lane] : a;
      }
      if (s.float64_input) block.exponent[m][lane] = state.exponents[m * kLanes + lane];
    }
    RowType rows[kMaxModalities];
    if (!exists || !(g.u.data || direct) || !make_rows(b, i, nullptr, rows)) continue;
    if (is_scaled(b, block, lane)) {
      AnyRow scaled_rows[kMaxModalities];
      make_rows(b, i, &block.exponent[0][lane], scaled_rows);
      incoming_dots(g, passes_for<AnyRow>(k), scaled_rows, i, lane, others, block);
    } else {
      incoming_dots(g, passes, rows, i, lane, others, block);
    }
  }
}

// dX of instance i, zeros where nothing is present.
template <class RowType>
PMRL_INLINE void write_instance(const Backward& g, const Passes<RowType>& passes, const State& state, int64_t i,
                                int lane, bool direct, const Block& block) {
  const Batch& b = g.batch;
  const int k = b.settings.k;
  RowType rows[kMaxModalities];
  if (!make_rows(b, i, nullptr, rows)) {
    for (int m = 0; m < k; ++m)
      if (g.out[m].data) memset(g.out[m].data + i * g.out[m].stride, 0, b.d * element_size(g.out[m].dtype));
  } else if (is_scaled(b, block, lane)) {
    AnyRow scaled_rows[kMaxModalities];
    make_rows(b, i, &block.exponent[0][lane], scaled_rows);
    write_gradients(g, passes_for<AnyRow>(k), scaled_rows, i, lane, block, state, false);
  } else {
    write_gradients(g, passes, rows, i, lane, block, state, !g.u.data && !direct);
  }
}

template <class RowType>
void backward_blocks(const Backward& g, int64_t begin, int64_t end) {
  const Batch& b = g.batch;
  const Settings& s = b.settings;
  const int k = s.k;
  bool direct = false;
  for (int m = 0; m < k; ++m) direct = direct || g.z[m].data || g.w[m].data;
  const Passes<RowType> passes = passes_for<RowType>(k);
  const Solvers solver = for_k<Solvers>(k);
  Block block;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t start = index * kLanes;
    const State state(b, index);
    read_mask(b, start, block);
    read_incoming(g, passes, state, start, direct, block);
    solver.backward(g, index, block);
    double slope = 0.0;
    for (int lane = 0; lane < kLanes && start + lane < b.B; ++lane) {
      slope += block.alignment[lane];
      write_instance(g, passes, state, start + lane, lane, direct, block);
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

}  // namespace
}  // namespace pmrl
