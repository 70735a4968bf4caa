// The k x k solvers of common/eigen.h for one instruction set, which PMRL_ISA names: this file is compiled once for each.
//
//   of                 eigenpairs, leading_pair of a pack of matrices that solvers.h hands over by their addresses
//   the others         the solvers and elementary functions alone, for tests: of n matrices in row-major order, or n
//                      numbers; they read these and write eigenpairs, or values
#include "passes.h"
#include "solvers.h"

namespace pmrl {
namespace {

// k is a constant where K is: otherwise code for other k is compiled too, and the compiler may fuse multiplications and
// additions of a pack's two registers differently, which then differ in their last bits.
template <int K>
void eigenpairs_of(void* A, void* E, int k) {
  eigenpairs(*static_cast<Matrix<K, Pack>*>(A), *static_cast<Eigenpairs<K, Pack>*>(E), K ? K : k);
}

template <int K>
void leading_pair_of(const void* A, void* value, void* v, int k, bool float64_input) {
  leading_pair(*static_cast<const Matrix<K, Pack>*>(A), *static_cast<Pack*>(value), *static_cast<Vector<K, Pack>*>(v),
               K ? K : k, float64_input);
}

template <int K>
constexpr Solver solver_of() {
  return {eigenpairs_of<K>, leading_pair_of<K>};
}

// The solvers on n matrices in row-major order: all eigenpairs, or the leading ones.
template <int K>
void solve_matrices(const double* A, int64_t n, int k, bool all, bool float64_input, double* values, double* vectors) {
  if (K) k = K;
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
      solvers::eigenpairs(G, E, k);
    else
      solvers::leading_pair(G, E.values.at[0], v, k, float64_input);
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

void all_leading_pairs(const double* A, int64_t n, int k, bool float64_input, double* values, double* vectors) {
  for_k<SolveMatrices>(k)(A, n, k, false, float64_input, values, vectors);
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

const SolverKernels PMRL_JOIN(solver_kernels_, PMRL_ISA) = {
    {solver_of<0>(), {}, solver_of<2>(), solver_of<3>(), solver_of<4>(), solver_of<5>(), solver_of<6>(), solver_of<7>(),
     solver_of<8>()},
    all_eigenpairs,
    all_leading_pairs,
    map_exp,
    map_log1p,
};
static_assert(kTemplatedModalities == 8, "name them all");

}  // namespace pmrl
