// The spectral operators on a device: X (d, k) of each instance, Z its columns over their norms (or X itself). For one
// k = K, and those that read rows for one dtype T of the embeddings:
//
//   forward_K_T    reads X, mask, tau; writes alignment terms, sigma, v_1, sums of each block, and the state (State)
//                    G = X^T X, `lanes` lanes an instance; then decompositions and C, an instance in each lane
//   stream_K_T     the same, for many instances: warps that read, and one that decomposes
//   vectors_K_T    reads X, mask, the state; writes u_1 = Z v_1 / sigma_1, z_m, w_m = y_m/||y_m||
//   backward_K_T   reads X, mask, C of the state, the alignment term's incoming gradient; writes dX = X C, and dL/d tau
//                  of each instance
// and where other gradients come in,
//   decompose_K    reads the state's Gram matrices; writes all eigenpairs, if the state has none
//   dots_K_T       reads X, mask, the state, h = dL/du_1, dL/dz_m, g_m = dL/dw_m; writes their inner products (Places)
//   coefficients_K reads these, the state and all other incoming gradients; writes coefficients in their places, and
//                  dL/d tau of each instance
//   apply_K_T      reads X, mask, coefficients, h, dL/dz_m, g_m; writes dX = h c^T + R shared^T + g diag(own) + X C + ...
// and
//   total, slope   add up, in a fixed order
//
// The algebra is common/kspace.h, for one number a lane, in float64; sums.cuh says what sums over rows are in. Most of
// forward_K_T and stream_K_T is that algebra, the same for each T, and yet one kernel that reads T from its parameters, at
// twice the length, takes 5 us more, of 14 (docs/gpu-notes.md).
#include "streams.cuh"

namespace pmrl {
namespace cuda {
namespace {

constexpr int kWarps = warps_of_block(PMRL_K), kMostInstances = most_instances(PMRL_K);

// Elements of a row that a lane takes at once: 16 bytes, or 8 where k rows of them would take more registers than there
// are.
template <int K, class T>
constexpr int kPack = kIsMixed<T> ? 1 : (sizeof(T) == 2 && K > 5 ? 8 : 16) / static_cast<int>(sizeof(T));

// The same where a row of incoming gradients comes with each row.
template <int K, class T>
constexpr int kSmallPack =
    kIsMixed<T> ? 1 : (sizeof(T) == 2 && K > 6 ? 4 : K > 4 || sizeof(T) == 2 ? 8 : 16) / static_cast<int>(sizeof(T));

// Whether registers hold two packs of each row.
template <int K>
constexpr bool kTwoPacks = K < 7;

PMRL_ON_DEVICE double temperature(const Batch& b) {
  if (!b.temperature) return b.settings.tau;
  const double tau = number(b.temperature, 0, b.temperature_is_float64);
  return tau > 0.0 && tau < HUGE_VAL ? tau : tau * HUGE_VAL * 0.0;
}

// With what the compiler is to know: k, and that there are no float64 rows unless `Float64` says that there may be.
template <int K, bool Float64 = true>
PMRL_ON_DEVICE Settings settings_of(const Batch& b) {
  Settings s = b.settings;
  s.k = K;
  s.float64_input = Float64 && s.float64_input;
  return s;
}

// The instance of this lane where a warp reads as many at once as it has lanes for.
PMRL_ON_DEVICE int64_t instance_of(const Lane& lane) {
  return (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * lane.at_once + lane.mine;
}

// Numbers of a warp's instances in shared memory, one more apart than there are, so that lanes of different instances
// and of different numbers use different banks.
constexpr int kApart = kMostInstances + 1;

// What a lane keeps there while it decomposes: the Gram matrix, in the end that of Z; 1/norms; and eigenvectors, where k
// is so large that registers do not hold them beside all else.
template <int K>
struct Kept {
  static constexpr bool kVectors = K > 5;
  static constexpr int G = 0, inverse_norms = triangle_size(K), V = inverse_norms + K, size = V + (kVectors ? K * K : 0);
};

// Whether so much is needed at once that registers do not hold the places in memory of it all, too, as compilers like them
// to: places are then hidden from these where they are used, and computed again.
template <int K>
constexpr bool kForgets = K > 6;

// Compilers do not carry what was read before this in registers to what is read after it.
PMRL_ON_DEVICE void forget() { asm volatile("" ::: "memory"); }
// Nor do they keep what follows from this in registers, where it is cheaper to compute that once more.
PMRL_ON_DEVICE int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- forward ------------------------------------------------------------------------------------

template <int K, class T>
using AlongGram = Along<K, T, kPack<K, T>, (K < 6)>;

// x x^T of one place in all rows.
template <int K, class S, class Number>
PMRL_ON_DEVICE void add_products(const Number (&x)[K], S (&sum)[triangle_size(K)]) {
  PMRL_EVERY for (int j = 0; j < K; ++j)
    PMRL_EVERY for (int i = 0; i <= j; ++i) add_product(sum[triangle(i, j)], x[i], x[j]);
}

template <int K, class T, class S>
PMRL_ON_DEVICE void gram(AlongGram<K, T>& along, const Instance<K, T>& rows, int part, bool exists,
                         S (&sum)[triangle_size(K)]) {
  PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) sum[t] = S{};
  if (exists)
    along.template go<Entry<S>>(rows, part, [&](int, const auto& x) {
      PMRL_EVERY for (int e = 0; e < kOfEach<decltype(x)>; ++e) {
        Entry<S> place[K];
        PMRL_EVERY for (int m = 0; m < K; ++m) place[m] = x[m][e];
        add_products(place, sum);
      }
      PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) settle(sum[t]);
    });
}

// Whether the squares of an instance's norms leave the range in which solvers may square them once more. Normalised, all
// have to be in range; not normalised, one, as long as no other is too large.
template <int K>
PMRL_ON_DEVICE bool out_of_range(const double (&sum)[triangle_size(K)], const bool (&here)[K], bool normalize) {
  bool all = true, one = false, small = true;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    const double square = sum[triangle(m, m)];
    const bool fine = square > kLeastSquare && square < kLargestSquare;
    all = all && (fine || !here[m]);
    one = one || (fine && here[m]);
    small = small && (square < kLargestSquare || !here[m]);
  }
  return normalize ? !all : !(one && small);
}

// For sums in pairs, whether all that they are made of is in float32's range. A 0 may be what is too small for it.
template <int K>
PMRL_ON_DEVICE bool norms_in_reach(const Pair (&sum)[triangle_size(K)], const bool (&here)[K]) {
  bool all = true;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    const float square = sum[triangle(m, m)].high;
    all = all && ((square > kLeastSquareOfPairs && square < kLargestSquareOfPairs) || !here[m]);
  }
  return all;
}

// e with 2^-e x in [1/2, 1), or 0 for 0; but such that pow2 has 2^-e, whereby x beyond 2^1022 comes to less than 4, and
// below 2^-1022 to less than 1/2.
PMRL_ON_DEVICE double exponent_of(double x) {
  int e = 0;
  if (x > 0.0) ::frexp(x, &e);
  return e > 1022 ? 1022 : e < -1022 ? -1022 : e;
}

// e with 2^-e x of order 1 for the largest entry x of each row, or of all rows if they are not normalised. A row that is
// not finite gives NaN at any scale.
template <int K, class T>
PMRL_ON_DEVICE void find_exponents(const Instance<K, T>& rows, int part, bool exists, double (&exponent)[K]) {
  double shared = 0.0;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    double peak = 0.0;
    bool finite = true;
    if (exists && rows.here[m]) {
#pragma unroll 1
      for (int c = part; c < rows.b.d; c += rows.b.lanes) {
        const double x = ::fabs(element<T>(rows.b.x[m], rows.row[m], c));
        finite = finite && x * 0.0 == 0.0;
        peak = x > peak ? x : peak;
      }
    }
#pragma unroll 1
    for (int by = rows.b.lanes / 2; by; by /= 2) {
      const double other = __shfl_xor_sync(~0u, peak, by);
      peak = other > peak ? other : peak;
      finite = (__shfl_xor_sync(~0u, static_cast<int>(finite), by) != 0) && finite;
    }
    exponent[m] = finite ? exponent_of(peak) : 0.0;
    if (finite && peak > shared) shared = peak;
  }
  if (rows.b.settings.normalize) return;
  PMRL_EVERY for (int m = 0; m < K; ++m) exponent[m] = exponent_of(shared);
}

// The sums over all lanes of a warp, to column r.
template <int K>
PMRL_ON_DEVICE void keep_spread(const double (&sum)[triangle_size(K)], int lane, double (*to)[kApart], int r) {
  using Sums = Spread<triangle_size(K)>;
  double spread[Sums::kPadded];
  PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) spread[t] = sum[t];
  Sums::add_up(spread, lane);
  PMRL_EVERY for (int t = 0; t < Sums::kOfLane; ++t)
    if (Sums::place(lane) + t < triangle_size(K)) to[Sums::place(lane) + t][r] = spread[t];
}

// Gram matrices of a warp's `count` instances from `first` on into shared memory, and exponents into the state; of those
// that have a bit in `wanted`. Returns the bits of those that were out of pairs' reach.
template <int K, class T>
PMRL_ON_DEVICE unsigned read_grams(const Batch& b, int64_t first, int count, double (*to)[kApart],
                                   unsigned wanted = ~0u) {
  constexpr bool scales = Instance<K, T>::kScales;
  const Lane lane = lane_of(b.lanes);
  unsigned out = 0;
  Instance<K, T> rows(b, first + (lane.mine < count ? lane.mine : 0));
  AlongGram<K, T> along;
  if (lane.mine < count) along.begin(rows, lane.part);
#pragma unroll 1
  for (int r = lane.mine; r - lane.mine < count; r += lane.at_once) {
    const bool exists = r < count && wanted >> r & 1;
    const auto begin_next = [&] {
      if (r + lane.at_once >= count) return;
      rows.move_to(first + r + lane.at_once);
      along.begin(rows, lane.part);
    };
    Sum<T> sum[triangle_size(K)];
    gram<K, T>(along, rows, lane.part, exists, sum);
    bool here[K];
    PMRL_EVERY for (int m = 0; m < K; ++m) here[m] = rows.here[m];
    if constexpr (!scales) {
      begin_next();
      if constexpr (!kInPairs<T>) {
        if (b.lanes == kWarp) {
          keep_spread<K>(sum, lane.part, to, r);
          continue;
        }
      }
    }
    add_up(sum, b.lanes);
    if constexpr (kInPairs<T>) out |= exists && !norms_in_reach<K>(sum, here) ? 1u << r : 0u;
    if constexpr (scales) {
      double exponent[K];
      PMRL_EVERY for (int m = 0; m < K; ++m) exponent[m] = 0.0;
      if (b.settings.float64_input) {
        const bool scaled = exists && out_of_range<K>(sum, here, b.settings.normalize);
        if (__any_sync(~0u, scaled)) {
          double found[K];
          find_exponents(rows, lane.part, exists, found);
          PMRL_EVERY for (int m = 0; m < K; ++m) exponent[m] = scaled ? found[m] : 0.0;
          rows.scale(exponent, 1);
          if (exists) along.begin(rows, lane.part);
          gram<K, T>(along, rows, lane.part, exists, sum);
          add_up(sum, b.lanes);
        }
        if (exists && lane.part == 0) {
          PMRL_EVERY for (int m = 0; m < K; ++m) b.state[(b.at.exponents + m) * b.B + first + r] = exponent[m];
        }
      }
    }
    PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t)
      if (lane.part == (t & (b.lanes - 1)) && exists) to[t][r] = value(sum[t]);
    if constexpr (scales) begin_next();
  }
  if constexpr (kInPairs<T>) {
#pragma unroll 1
    for (int by = kWarp / 2; by; by /= 2) out |= __shfl_xor_sync(~0u, out, by);
  }
  return out;
}

template <int K, class Numbers>
PMRL_ON_DEVICE void read_columns(const Batch& b, const Settings& s, int64_t i, bool vectors,
                                 Columns<K, double, Numbers>& columns) {
  const auto get = [&](int at, int m) { return b.state[(at + m) * b.B + i]; };
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    columns.present.at[m] = is_present(b.mask, i * K + m) ? 1.0 : 0.0;
    if (s.float64_input) columns.exponents.at[m] = get(b.at.exponents, m);
    if (vectors && s.normalize) columns.inverse_norms.at[m] = get(b.at.inverse_norms, m);
    if (vectors && s.others) columns.others.at[m] = get(b.at.others, m);
  }
}

// Eigenpairs whose vectors are in shared memory.
template <int K>
struct Parked {
  const Vector<K, double>& values;
  const double* vectors;
  __device__ __forceinline__ double value(int j) const { return values.at[j]; }
  __device__ __forceinline__ double entry(int m, int j) const { return vectors[(m * K + j) * kApart]; }
};

// From the Gram matrix of instance i to its outputs and its state. Returns its part of the sums.
template <int K, bool Float64>
PMRL_ON_DEVICE Sums solve(const Forward& f, int64_t i, double (*at)[kApart], int r) {
  using At = Kept<K>;
  const Batch& b = f.batch;
  Settings s = settings_of<K, Float64>(b);
  s.tau = temperature(b);
  const auto keep = [&](int row, int m, double x) { b.state[(row + m) * b.B + i] = x; };
  Columns<K, double> columns;
  Eigenpairs<K, double> E;
  Vector<K, double> v;
  read_columns<K>(b, s, i, false, columns);
  Sums found{0.0, 0.0, 0.0};
  {
    Matrix<K, double> G;
    PMRL_EVERY for (int j = 0; j < K; ++j)
      PMRL_EVERY for (int m = 0; m <= j; ++m) G.at[m][j] = at[At::G + triangle(m, j)][r];
    if (s.normalize) {
      normalise_gram(G, columns, K);
      PMRL_EVERY for (int j = 0; j < K; ++j) {
        at[At::inverse_norms + j][r] = columns.inverse_norms.at[j];
        if (b.at.inverse_norms >= 0) keep(b.at.inverse_norms, j, columns.inverse_norms.at[j]);
        PMRL_EVERY for (int m = 0; m <= j; ++m) at[At::G + triangle(m, j)][r] = G.at[m][j];
      }
    }
    if (!s.decompose) return found;
    if (b.at.matrix >= 0 && !s.spectrum) {
      PMRL_EVERY for (int j = 0; j < K; ++j)
        PMRL_EVERY for (int m = 0; m <= j; ++m) keep(b.at.matrix, triangle(m, j), G.at[m][j]);
    }
    const double broken = zero_or_nan(G, K);
    if (s.spectrum || by_squaring(G, E.values.at[0], v, K, s.float64_input)) {
      eigenpairs(G, E, K);
      forget();
      read_columns<K>(b, s, i, false, columns);
      if (s.spectrum) drop_surplus(E.values, columns, s, broken);
      oriented(E, v, K, s.float64_input);
    }
  }
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    PMRL_EVERY for (int j = 0; j < K; ++j) {
      if (At::kVectors) at[At::V + m * K + j][r] = E.V.at[m][j];
      if (b.at.matrix >= 0 && s.spectrum) keep(b.at.matrix, m * K + j, E.V.at[m][j]);
    }
    if (b.at.v >= 0) {
      keep(b.at.v, m, v.at[m]);
      if (m == 0 || s.spectrum) keep(b.at.values, m, E.values.at[m]);
    }
    if (f.v) put_number(f.v, i * K + m, v.at[m], s.float64_input);
    if (f.sigma && m < f.values) {
      double sigma = sqrt(E.values.at[m]);
      if (s.float64_input && !s.normalize) sigma = scaled(sigma, columns.exponents.at[0]);
      put_number(f.sigma, i * f.values + m, sigma, s.float64_input);
    }
  }
  if (s.others) {
    Matrix<K, double> G;
    PMRL_EVERY for (int j = 0; j < K; ++j)
      PMRL_EVERY for (int m = 0; m <= j; ++m) G.at[m][j] = at[At::G + triangle(m, j)][r];
    inverse_norms_of_others(G, v, K, columns.others);
    PMRL_EVERY for (int m = 0; m < K; ++m) keep(b.at.others, m, columns.others.at[m]);
  }
  if (b.at.C < 0) return found;

  forget();
  read_columns<K>(b, s, i, false, columns);
  Vector<K, double> diagonal;
  double trace = 0.0;
  Incoming<K, double> in;
  Coefficients<K, double> out;
  in.alignment = 1.0;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    columns.inverse_norms.at[m] = s.normalize ? at[At::inverse_norms + m][r] : 1.0;
    diagonal.at[m] = at[At::G + triangle(m, m)][r];
    trace = trace + diagonal.at[m];
    in.sigma.at[m] = in.w.at[m] = in.q.at[m] = in.direct.at[m] = in.others.at[m] = in.along.at[m] = 0.0;
  }
  found.alignment = alignment(E.values, trace, columns, s);
  if (f.alignment) put_number(f.alignment, i, found.alignment, s.float64_input);
  const double top = E.values.at[0];
  if constexpr (At::kVectors)
    coefficients(in, Through{true, false, false}, top, Parked<K>{E.values, &at[At::V][r]}, diagonal, v, columns, s, out);
  else
    coefficients(in, Through{true, false, false}, top, E, diagonal, v, columns, s, out);
  found.slope = out.slope;
  found.number = number_present(columns, K) >= 2.0 ? 1.0 : 0.0;
  keep(b.at.slope, 0, out.slope);
  PMRL_EVERY for (int j = 0; j < K; ++j)
    PMRL_EVERY for (int m = 0; m <= j; ++m) keep(b.at.C, triangle(m, j), out.C.at[m][j]);
  return found;
}

PMRL_ON_DEVICE void add(Sums& to, const Sums& x) {
  to.alignment += x.alignment;
  to.slope += x.slope;
  to.number += x.number;
}

PMRL_ON_DEVICE Sums from_lane(const Sums& x, int by) {
  return {__shfl_xor_sync(~0u, x.alignment, by), __shfl_xor_sync(~0u, x.slope, by),
          __shfl_xor_sync(~0u, x.number, by)};
}

PMRL_ON_DEVICE Sums sum_of_warp(Sums x) {
#pragma unroll 1
  for (int by = kWarp / 2; by; by /= 2) add(x, from_lane(x, by));
  return x;
}

// The sum over all threads of a block, for its first one.
template <int Warps>
PMRL_ON_DEVICE Sums sum_of_warps(const Sums* shared) {
  Sums total{0.0, 0.0, 0.0};
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int w = 0; w < Warps; ++w) add(total, shared[w]);
  }
  return total;
}
template <int Warps>
PMRL_ON_DEVICE Sums sum_of_block(Sums x, Sums* shared) {
  x = sum_of_warp(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  return sum_of_warps<Warps>(shared);
}

// At least one instance counts, so that a mean over none is 0. A bad temperature shows even then.
PMRL_ON_DEVICE void finish(const Forward& f, Sums total) {
  total.number = total.number > 1.0 ? total.number : 1.0;
  const double start = f.batch.settings.spectrum ? temperature(f.batch) * 0.0 : 0.0;
  put_number(f.total, 0, start + (f.mean ? total.alignment / total.number : total.alignment),
             f.batch.settings.float64_input);
  *f.sums = total;
}

// Instances that are out of pairs' reach, and no others, whose bits must not depend on them, are read again as if dtypes
// were mixed, in float64.
template <int K, class T>
PMRL_ON_DEVICE void read_all_grams(const Batch& b, int64_t first, int count, double (*to)[kApart]) {
  [[maybe_unused]] const unsigned left = read_grams<K, T>(b, first, count, to);
  if constexpr (kInPairs<T>) {
    if (left) read_grams<K, Mixed>(b, first, count, to, left);
  }
}

template <int K, class T>
PMRL_ON_DEVICE void forward(const Forward& f) {
  const Batch& b = f.batch;
  __shared__ double kept[kWarps][Kept<K>::size][kApart];
  __shared__ Sums sums[kWarps];
  const int thread = this_thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * b.share;
  int here = b.share;
  if (here > b.B - i) here = b.B > i ? static_cast<int>(b.B - i) : 0;
  if (here) read_all_grams<K, T>(b, i, here, kept[warp]);
  __syncwarp();
  Sums found{0.0, 0.0, 0.0};
  if (lane < here) found = solve<K, Instance<K, T>::kScales>(f, i + lane, kept[warp], lane);
  __syncwarp();
  if (!f.total) return;
  found = sum_of_block<kWarps>(found, sums);
  if (threadIdx.x) return;
  if (f.parts)
    f.parts[blockIdx.x] = found;
  else
    finish(f, found);
}

// ---- forward, in rounds -------------------------------------------------------------------------

// Threads of a block wait for one another. They may come from different places of the program.
[[maybe_unused]] PMRL_ON_DEVICE void meet() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kStreamWarps * kWarp) : "memory");
}

// What a block reads in rounds: `count` neighbouring instances from `first` on, in each round a share of them.
struct Rounds {
  int64_t first;
  int count, share;
};
// How many there are in the round after `before` of them.
[[maybe_unused]] PMRL_ON_DEVICE int in_round(const Rounds& all, int before) {
  return all.share < all.count - before ? all.share : all.count - before;
}

// Gram matrices of a round's instances into shared memory, kept[0] and kept[1] in turns, by all warps of a block but the
// last one. Of each row that a lane reads, kPacksAhead - 1 packs are always on their way to `ring`, past the ends of
// instances and rounds: a lane reads there what it has copied itself.
template <int K, class T>
PMRL_ON_DEVICE void read_rounds(const Batch& b, const Rounds& all, double (*kept)[Kept<K>::size][kApart], char* ring) {
  constexpr int N = 16 / static_cast<int>(sizeof(T)), kPacks = kPacksAhead;
  const Lane lane = lane_of(b.lanes);
  const int begin = this_thread() / kWarp * lane.at_once, by = (kStreamWarps - 1) * lane.at_once, step = b.lanes * N;
  const auto at = [&](int slot, int m) { return ring + ((slot * K + m) * kWarp + this_thread() % kWarp) * 16; };
  // Where the next copies are from. The same for all lanes, whether they have an instance there or not.
  int before = 0, r = begin, c = 0;
  Instance<K, T> rows(b, all.first);
  bool exists = false;
  const auto move = [&] {
    exists = before < all.count && r + lane.mine < in_round(all, before);
    if (exists) rows.move_to(all.first + before + r + lane.mine);
  };
  const auto copy_next = [&](int slot) {
    if (before < all.count) {
      const int mine = c + lane.part * N;
      PMRL_EVERY for (int m = 0; m < K; ++m)
        copy_ahead(at(slot, m), rows.row[m] + static_cast<int64_t>(mine) * static_cast<int>(sizeof(T)),
                   exists && rows.here[m] && mine < b.d);
      c += step;
      if (c >= b.d) {
        c = 0;
        r += by;
        if (r >= in_round(all, before)) {
          before += all.share;
          r = begin;
          if (before < all.count && begin >= in_round(all, before)) before = all.count;
        }
        move();
      }
    }
    commit_copies();
  };
  if (begin >= in_round(all, 0)) before = all.count;
  move();
  PMRL_EVERY for (int slot = 0; slot < kPacks - 1; ++slot) copy_next(slot);
  int slot = 0;
#pragma unroll 1
  for (int round = 0, done = 0; done < all.count; ++round, done += all.share) {
    double(*const to)[kApart] = kept[round & 1];
#pragma unroll 1
    for (int i = begin; i < in_round(all, done); i += by) {
      double sum[triangle_size(K)];
      PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) sum[t] = 0.0;
#pragma unroll 1
      for (int at_c = 0; at_c < b.d; at_c += step) {
        wait_for_copies<kPacks - 2>();
        Pack<T, N> packs[K];
        PMRL_EVERY for (int m = 0; m < K; ++m) packs[m].load_shared(at(slot, m));
        copy_next((slot + kPacks - 1) % kPacks);  // where the packs before these were
        slot = (slot + 1) % kPacks;
        PMRL_EVERY for (int e = 0; e < N; ++e) {
          double x[K];
          PMRL_EVERY for (int m = 0; m < K; ++m) x[m] = packs[m].get(e);
          add_products(x, sum);
        }
      }
      if (b.lanes == kWarp) {
        keep_spread<K>(sum, lane.part, to, i);
      } else {
        add_up(sum, b.lanes);
        PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t)
          if (lane.part == (t & (b.lanes - 1)) && i + lane.mine < in_round(all, done)) to[t][i + lane.mine] = sum[t];
      }
    }
    meet();
  }
}

// The last warp of a block decomposes a round's instances, one in each lane, while the others read the next ones.
template <int K, class T>
PMRL_ON_DEVICE void stream(const Forward& f) {
  if constexpr (!kFastFloat64) return;  // cards that never run it
  const Batch& b = f.batch;
  __shared__ double kept[2][Kept<K>::size][kApart];
  __shared__ Sums total;
  extern __shared__ __align__(16) char ring[];
  const auto all = [&] {
    const int64_t instances = static_cast<int64_t>(b.rounds) * b.share, first = blockIdx.x * instances;
    return Rounds{first, static_cast<int>(b.B - first < instances ? b.B - first : instances), b.share};
  };
  const int warp = this_thread() / kWarp;
  if (warp < kStreamWarps - 1) return read_rounds<K, T>(b, all(), kept, ring + warp * bytes_ahead(K));
  if (this_thread() % kWarp == 0) total = {0.0, 0.0, 0.0};
#pragma unroll 1
  for (int round = 0; round * b.share < all().count; ++round) {
    meet();
    const Forward* again = &f;  // what follows from its parameters is not to be in registers all the while
    asm volatile("" : "+l"(again));
    const int lane = this_thread() % kWarp, before = round * again->batch.share;
    Sums found{0.0, 0.0, 0.0};
    if (lane < in_round(all(), before))
      found = solve<K, false>(*again, all().first + before + lane, kept[round & 1], lane);
    __syncwarp();
    found = sum_of_warp(found);
    if (this_thread() % kWarp == 0) add(total, found);
  }
  if (!f.total || this_thread() % kWarp) return;
  if (f.parts)
    f.parts[blockIdx.x] = total;
  else
    finish(f, total);
}

// ---- vectors ------------------------------------------------------------------------------------

// Whether all of some numbers are in reach of such sums.
template <class S, class... Numbers>
PMRL_ON_DEVICE bool all_in_reach(const Numbers&... numbers) {
  if constexpr (std::is_same<S, double>::value) {
    return true;
  } else {
    bool all = true;
    const auto look = [&](const auto& some) {
      for (const double x : some) all = all && in_reach(x);
    };
    (look(numbers), ...);
    return all;
  }
}

template <class S, int N>
PMRL_ON_DEVICE void as_sums(const double (&from)[N], S (&to)[N]) {
  PMRL_EVERY for (int m = 0; m < N; ++m) to[m] = as_sum<S>(from[m]);
}

// What u_1, z_m and w_m are multiples of rows by.
template <int K, class Number>
struct Multiples {
  Number of_u[K], of_z[K], of_w[K], r[K];
};

template <int K, class T, class S>
PMRL_ON_DEVICE void vectors_in(const Vectors& f, const Settings& s, const Lane& lane, int64_t i,
                               const Instance<K, T>& rows, const Multiples<K, double>& by_number) {
  constexpr int N = kPack<K, T>;
  const Batch& b = f.batch;
  Multiples<K, S> by;
  as_sums(by_number.of_u, by.of_u);
  as_sums(by_number.of_z, by.of_z);
  as_sums(by_number.of_w, by.of_w);
  as_sums(by_number.r, by.r);
  const int64_t bytes = static_cast<int64_t>(b.d) * (s.float64_input ? 8 : 4);
  along_rows<Entry<S>, N, false>(rows, lane.part, [] {}, [&](int c, const auto& x) {
    constexpr int M = kOfEach<decltype(x)>;
    Entry<S> y[M] = {};
    const auto put = [&](void* out) {
      char* row = static_cast<char*>(out) + i * bytes;
      if constexpr (M > 1)
        store_wide<T>(row, c, y);
      else
        put_number(row, c, y[0], s.float64_input);
    };
    if (f.u) {
      PMRL_EVERY for (int e = 0; e < M; ++e) {
        S sum{};
        PMRL_EVERY for (int m = 0; m < K; ++m) add_multiple(sum, by.of_u[m], x[m][e]);
        y[e] = rounded(sum);
      }
      put(f.u);
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      if (!f.z[m]) continue;
      PMRL_EVERY for (int e = 0; e < M; ++e) {
        y[e] = rounded(multiple(by.of_z[m], x[m][e]));
        if constexpr (Instance<K, T>::kScales) {
          if (s.float64_input && !s.normalize) y[e] = scaled(y[e], b.state[(b.at.exponents + m) * b.B + i]);
        }
      }
      put(f.z[m]);
    }
    if (!f.w[0]) return;
    S sum[M];
    PMRL_EVERY for (int e = 0; e < M; ++e) {
      sum[e] = S{};
      PMRL_EVERY for (int m = 0; m < K; ++m) add_multiple(sum[e], by.of_w[m], x[m][e]);
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      PMRL_EVERY for (int e = 0; e < M; ++e) {
        S others = sum[e];
        add_multiple(others, opposite(by.of_w[m]), x[m][e]);
        y[e] = rounded(multiple(by.r[m], others));
      }
      put(f.w[m]);
    }
  });
}

template <int K, class T>
PMRL_ON_DEVICE void vectors(const Vectors& f) {
  const Batch& b = f.batch;
  const Settings s = settings_of<K, Instance<K, T>::kScales>(b);
  const Lane lane = lane_of(b.lanes);
  const int64_t i = instance_of(lane);
  if (i >= b.B) return;
  const auto kept = [&](int at, int m) { return b.state[(at + m) * b.B + i]; };
  Instance<K, T> rows(b, i);
  if (s.float64_input) rows.scale(b.state + b.at.exponents * b.B + i, b.B);
  Multiples<K, double> by;
  const double inverse_sigma = s.decompose ? reciprocal(sqrt(kept(b.at.values, 0))) : 0.0;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    const double v = s.decompose ? kept(b.at.v, m) : 0.0, one = s.normalize ? kept(b.at.inverse_norms, m) : 1.0;
    by.of_u[m] = v * inverse_sigma * one;
    by.of_z[m] = one;
    by.of_w[m] = s.others ? ::fabs(v) * one : 0.0;
    by.r[m] = s.others ? kept(b.at.others, m) : 0.0;
  }
  if (all_in_reach<Sum<T>>(by.of_u, by.of_z, by.of_w, by.r))
    vectors_in<K, T, Sum<T>>(f, s, lane, i, rows, by);
  else
    vectors_in<K, T, double>(f, s, lane, i, rows, by);
}

// ---- backward -----------------------------------------------------------------------------------

// The incoming gradient of an instance's alignment term.
PMRL_ON_DEVICE double incoming_alignment(const Backward& g, int64_t i) {
  if (!g.alignment.data) return 0.0;
  const double x = value_of(g.alignment, i, 0, g.batch.settings.float64_input);
  return g.sums ? x / g.sums->number : x;
}

PMRL_ON_DEVICE Through through_of(const Backward& g, int k) {
  bool others = false;
  for (int m = 0; m < k; ++m) others = others || g.w[m].data;
  return {g.alignment.data || g.sigma.data, g.u.data || g.v.data, others};
}

// N numbers of an incoming gradient's row from c on.
template <class T, class Number, int N>
PMRL_ON_DEVICE void load_incoming(const Rows& from, int64_t i, int c, bool is_float64, Number (&x)[N]) {
  const char* row = from.data + i * from.stride;
  if constexpr (N > 1)
    load_wide<T>(row, c, x);
  else
    x[0] = number(row, c, is_float64);
}

// What comes in for the w_m: r_m = 1/||y_m|| and |v_m|, over the norm of x_m where embeddings are normalised.
template <int K, class Number>
struct Others {
  Number r[K], weight[K];
};

// Inner products of rows and what comes in for them, of one lane or, in the end, of all.
template <int K, class S>
struct Dots {
  S w[K], direct[K], with_shared[K], with_own[K], with_sum[K];
};

// Of what comes in, row by row, a bit each: whether anything is not 0, and whether anything is at least `least`. Pairs
// have to know.
struct Seen {
  float least;
  unsigned some, enough;

  template <class Number, int N>
  __device__ __forceinline__ void look(int row, const Number (&x)[N]) {
    if constexpr (std::is_same<Number, float>::value) {
      PMRL_EVERY for (int e = 0; e < N; ++e) {
        some |= x[e] != 0.0f ? 1u << row : 0u;
        enough |= fabsf(x[e]) >= least ? 1u << row : 0u;
      }
    }
  }
  // Whether all that is not 0 of some row is less, over all lanes of an instance.
  __device__ __forceinline__ bool too_little(int lanes) {
#pragma unroll 1
    for (int by = lanes / 2; by; by /= 2) {
      some |= __shfl_xor_sync(~0u, some, by);
      enough |= __shfl_xor_sync(~0u, enough, by);
    }
    return some & ~enough;
  }
};

template <int K, class T, class S>
PMRL_ON_DEVICE void dots_in(const Backward& g, const Settings& s, const Lane& lane, int64_t i,
                            const Instance<K, T>& rows, bool others, const Others<K, double>& by_number, Dots<K, S>& of,
                            Seen& seen) {
  constexpr int N = kSmallPack<K, T>;
  Others<K, S> by;
  as_sums(by_number.r, by.r);
  as_sums(by_number.weight, by.weight);
  along_rows<Entry<S>, N, false>(rows, lane.part, [] {}, [&](int c, const auto& x) {
    constexpr int M = kOfEach<decltype(x)>;
    Entry<S> y[M];
    if (g.u.data) {
      load_incoming<T>(g.u, i, c, s.float64_input, y);
      seen.look(0, y);
      PMRL_EVERY for (int m = 0; m < K; ++m)
        PMRL_EVERY for (int e = 0; e < M; ++e) add_product(of.w[m], x[m][e], y[e]);
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      if (!g.z[m].data || !rows.here[m]) continue;
      load_incoming<T>(g.z[m], i, c, s.float64_input, y);
      seen.look(1 + m, y);
      PMRL_EVERY for (int e = 0; e < M; ++e) add_product(of.direct[m], x[m][e], y[e]);
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) settle(of.w[m]), settle(of.direct[m]);
    if (!others) return;
    S R[M], Y[M];
    PMRL_EVERY for (int e = 0; e < M; ++e) R[e] = Y[e] = S{};
    PMRL_EVERY for (int m = 0; m < K; ++m)
      PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(Y[e], by.weight[m], x[m][e]);
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      if (!g.w[m].data) continue;
      load_incoming<T>(g.w[m], i, c, s.float64_input, y);
      seen.look(1 + K + m, y);
      PMRL_EVERY for (int e = 0; e < M; ++e) {
        add_multiple(R[e], by.r[m], y[e]);
        add_product(of.with_own[m], x[m][e], y[e]);
        add_product(of.with_sum[m], y[e], Y[e]);
      }
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      PMRL_EVERY for (int e = 0; e < M; ++e) add_product(of.with_shared[m], x[m][e], R[e]);
      settle(of.with_own[m]), settle(of.with_sum[m]), settle(of.with_shared[m]);
    }
  });
}

template <int K, class S>
PMRL_ON_DEVICE void add_up_dots(Dots<K, S>& of, bool others, int lanes) {
  add_up(of.w, lanes);
  add_up(of.direct, lanes);
  if (!others) return;
  add_up(of.with_shared, lanes);
  add_up(of.with_own, lanes);
  add_up(of.with_sum, lanes);
}

template <int K, class T>
PMRL_ON_DEVICE void dots(const Backward& g) {
  using At = Places<K>;
  const Batch& b = g.batch;
  const Settings s = settings_of<K, Instance<K, T>::kScales>(b);
  const bool others = through_of(g, K).others;
  const Lane lane = lane_of(b.lanes);
  const int64_t at = instance_of(lane);
  const bool exists = at < b.B;  // all lanes stay for the sums
  const int64_t i = exists ? at : 0;
  const auto kept = [&](int row, int m) { return b.state[(row + m) * b.B + i]; };
  Instance<K, T> rows(b, i);
  if (s.float64_input && exists) rows.scale(b.state + b.at.exponents * b.B + i, b.B);
  Others<K, double> by;
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    by.r[m] = others && exists ? kept(b.at.others, m) : 0.0;
    by.weight[m] = others && exists ? ::fabs(kept(b.at.v, m)) * (s.normalize ? kept(b.at.inverse_norms, m) : 1.0) : 0.0;
  }
  const auto put = [&](const auto& of) {
    if (!exists || lane.part != 0) return;
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      const auto put = [&](int row, double x) { g.scratch[(row + m) * b.B + i] = x; };
      put(At::w, rows.here[m] ? value(of.w[m]) : 0.0);
      put(At::direct, value(of.direct[m]));
      put(At::others, rows.here[m] ? value(of.with_shared[m]) - by.r[m] * value(of.with_own[m]) : 0.0);
      put(At::along, by.r[m] * (value(of.with_sum[m]) - by.weight[m] * value(of.with_own[m])));
    }
  };
  Dots<K, Sum<T>> of{};
  Seen seen{};
  [[maybe_unused]] bool out = false;
  if constexpr (kInPairs<T>) {
    // Of rows of norm n, products with entries below kLeastProductOfPairs / n may become 0. Where rows are not divided by
    // norms, sigma_1 takes their place.
    double inverse_norm = 0.0;
    if (exists) {
      if (!s.normalize && s.decompose) inverse_norm = reciprocal(sqrt(kept(b.at.values, 0)));
      PMRL_EVERY for (int m = 0; m < K; ++m) {
        if (s.normalize) inverse_norm = max(inverse_norm, kept(b.at.inverse_norms, m));
        out = out || !in_reach(s.normalize ? kept(b.at.inverse_norms, m) : inverse_norm);
      }
    }
    out = out || !all_in_reach<Sum<T>>(by.r, by.weight);
    seen.least = static_cast<float>(inverse_norm * kLeastProductOfPairs);
  }
  if (exists) dots_in(g, s, lane, i, rows, others, by, of, seen);
  add_up_dots(of, others, b.lanes);
  put(of);
  if constexpr (kInPairs<T>) {
    out = seen.too_little(b.lanes) || out;
    PMRL_EVERY for (int m = 0; m < K; ++m) {  // what was too large has become infinite
      out = out || !is_finite(of.w[m]) || !is_finite(of.direct[m]) || !is_finite(of.with_shared[m]) ||
            !is_finite(of.with_own[m]) || !is_finite(of.with_sum[m]);
    }
    if (!__any_sync(~0u, out)) return;
    Dots<K, double> exact{};
    if (exists) dots_in(g, s, lane, i, rows, others, by, exact, seen);
    add_up_dots(exact, others, b.lanes);
    if (out) put(exact);
  }
}

// Eigenpairs in memory, those of one instance. Read anew for each use: registers do not hold them beside all else.
template <int K>
struct Saved {
  const volatile double *values, *vectors;
  int64_t B;
  __device__ __forceinline__ double value(int j) const { return values[j * B]; }
  __device__ __forceinline__ double entry(int m, int j) const {
    int64_t apart = B;
    if constexpr (kForgets<K>) asm volatile("" : "+l"(apart));
    return vectors[(m * K + j) * apart];
  }
};

// A vector, or the triangle of a symmetric matrix, that is in memory, its numbers so far apart.
template <int K>
struct InMemory {
  struct Numbers {
    double* first;
    int64_t apart;
    __device__ __forceinline__ double& operator[](int m) const { return first[m * apart]; }
  } at;
  __device__ __forceinline__ double& entry(int i, int j) { return at[triangle(i, j)]; }
};

template <int K>
PMRL_ON_DEVICE void coefficients(const Backward& g) {
  using At = Places<K>;
  const Batch& b = g.batch;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + threadIdx.x;
  if (i >= b.B) return;
  const Through through = through_of(g, K);
  Settings s = settings_of<K>(b);
  s.tau = temperature(b);
  const auto kept = [&](int row, int m) { return b.state[(row + m) * b.B + i]; };
  const auto got = [&](int row, int m) { return g.scratch[(row + m) * b.B + i]; };
  const auto put = [&](int row, int m, double x) { g.scratch[(row + m) * b.B + i] = x; };
  // Where k is so large that registers do not hold everything, what comes in is in shared memory, and what is found where
  // it goes to.
  constexpr bool large = K > 5;
  using Numbers = std::conditional_t<large, InMemory<K>, Vector<K, double>>;
  Columns<K, double, Numbers> columns;
  Incoming<K, double, Numbers> in;
  Coefficients<K, double, std::conditional_t<large, InMemory<K>, Matrix<K, double>>, Numbers> out;
  if constexpr (large) {
    constexpr int threads = kWarps * kWarp;
    __shared__ double held[10][K][threads];
    static_assert(sizeof held <= 48 << 10);
    int next = 0;
    for (Numbers* x : {&columns.inverse_norms, &columns.exponents, &columns.present, &columns.others, &in.sigma, &in.w,
                       &in.q, &in.direct, &in.others, &in.along})
      *x = {{&held[next++][0][threadIdx.x], threads}};
    const auto place = [&](int row) { return Numbers{{g.scratch + row * b.B + i, b.B}}; };
    out = {place(At::C), place(At::w), place(At::others), place(At::along), place(At::exponent), 0.0};
  }
  Vector<K, double> v, diagonal;
  read_columns<K>(b, s, i, true, columns);
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    v.at[m] = s.decompose ? kept(b.at.v, m) : 0.0;
    diagonal.at[m] = s.decompose && !s.spectrum ? kept(b.at.matrix, triangle(m, m)) : 0.0;
    in.sigma.at[m] = g.sigma.data && m < g.values ? value_of(g.sigma, i, m, s.float64_input) : 0.0;
    in.q.at[m] = g.v.data && columns.present.at[m] != 0.0 ? value_of(g.v, i, m, s.float64_input) : 0.0;
    in.w.at[m] = g.dotted ? got(At::w, m) : 0.0;
    in.direct.at[m] = g.dotted ? got(At::direct, m) : 0.0;
    in.others.at[m] = through.others ? got(At::others, m) : 0.0;
    in.along.at[m] = through.others ? got(At::along, m) : 0.0;
  }
  in.alignment = incoming_alignment(g, i);
  const double* pairs = g.pairs ? g.pairs : b.state + b.at.values * b.B;
  const Saved<K> E{pairs + i, pairs + K * b.B + i, b.B};
  pmrl::coefficients(in, through, s.decompose ? kept(b.at.values, 0) : 0.0, E, diagonal, v, columns, s, out);
  if constexpr (!large) {
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      PMRL_EVERY for (int j = 0; j <= m; ++j) put(At::C, triangle(j, m), out.C.at[j][m]);
      put(At::w, m, out.c.at[m]);
      if (through.others) {
        put(At::others, m, out.shared.at[m]);
        put(At::along, m, out.own.at[m]);
      }
      if (s.float64_input) put(At::exponent, m, out.exponent.at[m]);
    }
  }
  if (g.slopes) g.slopes[i] = out.slope;
}

// What rows and incoming gradients are multiplied by, to be added up to dX: x_j; h; R; g_m; and dL/dz_m. And r_m, by which
// g_m is multiplied in R.
template <int K, class S>
struct Shares {
  S C[triangle_size(K)], of_h[K], of_R[K], of_own[K], of_z[K], r[K];
};

// The same where the kernels before have left them, each read when it is asked for.
template <int K, bool All>
struct SharesOf {
  using At = Places<K>;
  const Backward& g;
  int64_t i;
  const bool others;
  double come = 0.0;  // for the alignment term

  // Before C. In float64 this comes after the first loads of rows; pairs have to know beforehand whether C is in reach.
  __device__ __forceinline__ void read_alignment(const bool (&here)[K]) {
    if constexpr (!All) {
      int present = 0;
      PMRL_EVERY for (int m = 0; m < K; ++m) present += here[m];
      // Where there is nothing to align all of C is 0, which no infinity that comes in for it must turn into NaN.
      come = present >= 2 ? incoming_alignment(g, i) : 0.0;
    }
  }
  __device__ __forceinline__ void put_slope() const {
    if (!All && g.slopes) g.slopes[i] = come * kept(g.batch.at.slope, 0);
  }

  // Places are not to be in registers from here on, of which there are too few.
  __device__ __forceinline__ void forget_places() { asm volatile("" : "+l"(i)); }
  __device__ __forceinline__ double kept(int row, int m) const { return g.batch.state[(row + m) * g.batch.B + i]; }
  __device__ __forceinline__ double got(int row, int m) const { return g.scratch[(row + m) * g.batch.B + i]; }
  __device__ __forceinline__ double C(int t) const { return All ? got(At::C, t) : kept(g.batch.at.C, t) * come; }
  __device__ __forceinline__ double of_h(int m) const { return g.u.data ? got(At::w, m) : 0.0; }
  __device__ __forceinline__ double of_R(int m) const { return others ? got(At::others, m) : 0.0; }
  __device__ __forceinline__ double of_own(int m) const { return others ? got(At::along, m) : 0.0; }
  __device__ __forceinline__ double of_z(int m) const {
    return g.batch.settings.normalize ? kept(g.batch.at.inverse_norms, m) : 0.0;
  }
  __device__ __forceinline__ double r(int m) const { return others ? kept(g.batch.at.others, m) : 0.0; }

  __device__ __forceinline__ bool in_reach() const {
    bool all = true;
    PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) all = all && cuda::in_reach(C(t));
    if constexpr (All) {
      PMRL_EVERY for (int m = 0; m < K; ++m) {
        all = all && cuda::in_reach(of_h(m)) && cuda::in_reach(of_R(m)) && cuda::in_reach(of_own(m));
        all = all && cuda::in_reach(of_z(m)) && cuda::in_reach(r(m));
      }
    }
    return all;
  }
};

template <int K, class T, bool All, class S>
PMRL_ON_DEVICE void apply_in(const Backward& g, const Settings& s, const Lane& lane, const Instance<K, T>& rows,
                             SharesOf<K, All>& from) {
  constexpr int N = All ? kSmallPack<K, T> : kPack<K, T>;
  constexpr bool in_pairs = std::is_same<S, Pair>::value;
  const int64_t i = from.i;
  Shares<K, S> by;
  const auto read = [&] {
    if constexpr (!kInPairs<T>) from.read_alignment(rows.here);
    if (lane.part == 0) from.put_slope();
    PMRL_EVERY for (int t = 0; t < triangle_size(K); ++t) by.C[t] = as_sum<S>(from.C(t));
    // In float64 registers do not hold the others: they are read again where they are used.
    if constexpr (All && in_pairs) {
      PMRL_EVERY for (int m = 0; m < K; ++m) {
        by.of_h[m] = as_sum<S>(from.of_h(m));
        by.of_R[m] = as_sum<S>(from.of_R(m));
        by.of_own[m] = as_sum<S>(from.of_own(m));
        by.of_z[m] = as_sum<S>(from.of_z(m));
        by.r[m] = as_sum<S>(from.r(m));
      }
    }
  };
// One of them, from registers or from where they are.
#define PMRL_SHARE(what, m) ([&] { if constexpr (in_pairs) return by.what[m]; else return from.what(m); }())
  along_rows<Entry<S>, N, !All && kTwoPacks<K>>(rows, lane.part, read, [&](int c, const auto& x) {
    constexpr int M = kOfEach<decltype(x)>;
    if constexpr (All && !in_pairs && kForgets<K>) from.forget_places();
    [[maybe_unused]] Entry<S> h[M], own[M];
    [[maybe_unused]] S R[M];
    if constexpr (All) {
      PMRL_EVERY for (int e = 0; e < M; ++e) h[e] = 0, R[e] = S{};
      if (g.u.data) load_incoming<T>(g.u, i, c, s.float64_input, h);
      if (from.others) {
        PMRL_EVERY for (int m = 0; m < K; ++m) {
          if (!g.w[m].data) continue;
          load_incoming<T>(g.w[m], i, c, s.float64_input, own);
          const S r = PMRL_SHARE(r, m);
          PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(R[e], r, own[e]);
        }
      }
    }
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      if (!g.out[m].data) continue;
      S sum[M];
      PMRL_EVERY for (int e = 0; e < M; ++e) {
        sum[e] = S{};
        PMRL_EVERY for (int j = 0; j < K; ++j) add_multiple(sum[e], by.C[triangle_any(j, m)], x[j][e]);
      }
      if constexpr (All) {
        if (g.u.data) {
          const S of_h = PMRL_SHARE(of_h, m);
          PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(sum[e], of_h, h[e]);
        }
        if (from.others) {
          const S of_R = PMRL_SHARE(of_R, m);
          PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(sum[e], of_R, R[e]);
          if (g.w[m].data) {
            load_incoming<T>(g.w[m], i, c, s.float64_input, own);
            const S of_own = PMRL_SHARE(of_own, m);
            PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(sum[e], of_own, own[e]);
          }
        }
        if (g.z[m].data) {
          load_incoming<T>(g.z[m], i, c, s.float64_input, own);
          const S of_z = PMRL_SHARE(of_z, m);
          if (s.normalize) {
            PMRL_EVERY for (int e = 0; e < M; ++e) add_multiple(sum[e], of_z, own[e]);
          }
        }
      }
      if constexpr (Instance<K, T>::kScales) {
        if (s.float64_input && (All || s.normalize)) {
          const double exponent = All ? from.got(Places<K>::exponent, m) : -from.kept(g.batch.at.exponents, m);
          PMRL_EVERY for (int e = 0; e < M; ++e) sum[e] = scaled(sum[e], exponent);
        }
      }
      if constexpr (All) {
        if (g.z[m].data && !s.normalize) {
          PMRL_EVERY for (int e = 0; e < M; ++e) add_entry(sum[e], own[e]);
        }
      }
      Entry<S> y[M];
      PMRL_EVERY for (int e = 0; e < M; ++e) y[e] = rows.here[m] ? rounded(sum[e]) : Entry<S>(0);
      char* row = g.out[m].data + i * g.out[m].stride;
      if constexpr (M > 1) {
        Pack<T, M> pack;
        pack.set(y);
        pack.store(row + static_cast<int64_t>(c) * static_cast<int>(sizeof(T)));
      } else {
        put_element<T>(g.out[m], row, c, y[0]);
      }
    }
  });
#undef PMRL_SHARE
}

// dX. Where `All` is false, all that comes in is for the alignment term, whose coefficients are the state's.
template <int K, class T, bool All>
PMRL_ON_DEVICE void apply(const Backward& g) {
  const Batch& b = g.batch;
  const Settings s = settings_of<K, Instance<K, T>::kScales>(b);
  const Lane lane = lane_of(b.lanes);
  const int64_t i = instance_of(lane);
  if (i >= b.B) return;
  Instance<K, T> rows(b, i);
  SharesOf<K, All> from{g, i, All && through_of(g, K).others};
  if (s.float64_input) rows.scale(b.state + b.at.exponents * b.B + i, b.B);
  if constexpr (kInPairs<T>) from.read_alignment(rows.here);
  if (!kInPairs<T> || from.in_reach())
    apply_in<K, T, All, Sum<T>>(g, s, lane, rows, from);
  else
    apply_in<K, T, All, double>(g, s, lane, rows, from);
}

// All eigenpairs (k + k^2, B) of the state's Gram matrices.
template <int K>
PMRL_ON_DEVICE void decompose(const Batch& b, double* pairs) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + threadIdx.x;
  if (i >= b.B) return;
  Matrix<K, double> G;
  Eigenpairs<K, double> E;
  PMRL_EVERY for (int j = 0; j < K; ++j)
    PMRL_EVERY for (int m = 0; m <= j; ++m) G.at[m][j] = b.state[(b.at.matrix + triangle(m, j)) * b.B + i];
  eigenpairs(G, E, K);
  PMRL_EVERY for (int m = 0; m < K; ++m) {
    pairs[m * b.B + i] = E.values.at[m];
    PMRL_EVERY for (int j = 0; j < K; ++j) pairs[(K + m * K + j) * b.B + i] = E.V.at[m][j];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pmrl

// ---- entries ------------------------------------------------------------------------------------

using namespace pmrl::cuda;
using pmrl::kFastFloat64;

// Blocks that are to fit on a multiprocessor at once. 1 tells compilers to use all registers there are; 0 lets them do
// with fewer to have one block more, which is right for passes that wait for memory and for nothing else.
template <class T>
constexpr bool kCommon = kFastFloat64 && !std::is_same<T, double>::value && !kIsMixed<T>;
template <class T>
constexpr int kReading = kCommon<T> ? 0 : 1;  // vectors, backward
template <class T>
constexpr int kAdding = kCommon<T> && PMRL_K < 6 ? 0 : 1;  // dots, apply
constexpr int kAlgebra = PMRL_K < 6 ? 0 : 1;  // decompose, coefficients

#define PMRL_KERNEL(blocks) extern "C" __global__ void __launch_bounds__(kWarps* kWarp, blocks)
#define PMRL_FORWARD extern "C" __global__ void __launch_bounds__(kWarps* kWarp, pmrl::cuda::resident_blocks(PMRL_K))
#define PMRL_STREAM extern "C" __global__ void __launch_bounds__(kStreamWarps* kWarp, resident_streams(PMRL_K))

// What several blocks have found, added up.
extern "C" __global__ void __launch_bounds__(kReducers) total(const __grid_constant__ Forward f, int blocks) {
  __shared__ Sums sums[kReducers / kWarp];
  Sums found{0.0, 0.0, 0.0};
#pragma unroll 4  // loads that wait together
  for (int at = threadIdx.x; at < blocks; at += kReducers) add(found, f.parts[at]);
  found = sum_of_block<kReducers / kWarp>(found, sums);
  if (threadIdx.x == 0) finish(f, found);
}

extern "C" __global__ void __launch_bounds__(kReducers) slope(const __grid_constant__ Slope g) {
  __shared__ Sums sums[kReducers / kWarp];
  Sums found{0.0, 0.0, 0.0};
  if (g.slopes) {
#pragma unroll 8  // loads that wait together
    for (int64_t i = threadIdx.x; i < g.B; i += kReducers) found.slope += g.slopes[i];
  }
  found = sum_of_block<kReducers / kWarp>(found, sums);
  if (threadIdx.x) return;
  double x = found.slope;
  if (!g.slopes && g.alignment.data) {
    x = g.sums->slope * value_of(g.alignment, 0, 0, g.is_float64);
    if (g.mean) x /= g.sums->number;
  }
  *g.out = x;
}

#define PMRL_OF_DTYPE(K, T, name)                                                                 \
  PMRL_FORWARD forward_##K##_##name(const __grid_constant__ Forward f) { forward<K, T>(f); }                   \
  PMRL_KERNEL(kReading<T>) vectors_##K##_##name(const __grid_constant__ Vectors f) { vectors<K, T>(f); }       \
  PMRL_KERNEL(kReading<T>) backward_##K##_##name(const __grid_constant__ Backward g) { apply<K, T, false>(g); } \
  PMRL_KERNEL(kAdding<T>) dots_##K##_##name(const __grid_constant__ Backward g) { dots<K, T>(g); }            \
  PMRL_KERNEL(kAdding<T>) apply_##K##_##name(const __grid_constant__ Backward g) { apply<K, T, true>(g); }
#define PMRL_KERNELS_OF(K)                                                                                     \
  PMRL_OF_DTYPE(K, float, float32)                                                                               \
  PMRL_OF_DTYPE(K, double, float64)                                                                              \
  PMRL_OF_DTYPE(K, BFloat16, bfloat16)                                                                           \
  PMRL_OF_DTYPE(K, Float16, float16)                                                                             \
  PMRL_OF_DTYPE(K, Mixed, mixed)                                                                                 \
  PMRL_KERNEL(kAlgebra) decompose_##K(const __grid_constant__ Batch b, double* pairs) { decompose<K>(b, pairs); }        \
  PMRL_KERNEL(kAlgebra) coefficients_##K(const __grid_constant__ Backward g) { coefficients<K>(g); }
#define PMRL_STREAM_OF(K, T, name) \
  PMRL_STREAM stream_##K##_##name(const __grid_constant__ Forward f) { stream<K, T>(f); }
#if PMRL_K == 4  // as has_rounds
#define PMRL_STREAMS(K)                  \
  PMRL_STREAM_OF(K, float, float32)      \
  PMRL_STREAM_OF(K, BFloat16, bfloat16)  \
  PMRL_STREAM_OF(K, Float16, float16)
#elif PMRL_K == 5
#define PMRL_STREAMS(K) PMRL_STREAM_OF(K, float, float32)
#else
#define PMRL_STREAMS(K)
#endif
#define PMRL_EXPANDED(K) PMRL_KERNELS_OF(K) PMRL_STREAMS(K)
PMRL_EXPANDED(PMRL_K)
