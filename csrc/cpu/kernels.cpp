// The CPU kernels of one instruction set, which PMRL_ISA names: this file is compiled once for each. What it includes
// has internal linkage, so that the linker cannot take one set's copy of a function for another's.
//
//   spectral_kernels.h   forward, backward
//   contrast_kernels.h   maxima, sums, weights, row_dots
//   joint_kernels.cpp    joint; a file of its own, since either takes a compiler a while
//   here                 the solvers of common/ alone, for tests: they read matrices and write eigenpairs
#include "kernels.h"

#include "contrast_kernels.h"
#include "spectral_kernels.h"

namespace pmrl {
namespace {

// The solvers on n matrices in row-major order: all eigenpairs, or the leading ones.
template <int K>
void solve_matrices(const double* A, int64_t n, int k, bool all, bool float64_input, double* values, double* vectors) {
  // A constant: otherwise code for other k is compiled too, and the compiler may fuse multiplications and additions of
  // a pack's two registers differently, which then differ in their last bits.
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
      eigenpairs(G, E, k);
    else
      leading_pair(G, E.values.at[0], v, k, float64_input);
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

#define PMRL_STRING(a) PMRL_STRING_(a)
#define PMRL_STRING_(a) #a

extern const JointKernels PMRL_JOIN(joint_kernels_, PMRL_ISA);
extern const Kernels PMRL_JOIN(kernels_, PMRL_ISA);
const Kernels PMRL_JOIN(kernels_, PMRL_ISA) = {
    PMRL_STRING(PMRL_ISA), kLanes,         forward,           backward, maxima,    sums, weights,
    row_dots, &PMRL_JOIN(joint_kernels_, PMRL_ISA), all_eigenpairs, all_leading_pairs, map_exp,  map_log1p,
};

}  // namespace pmrl
