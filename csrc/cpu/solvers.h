// The solvers of common/eigen.h for packs of matrices. They take a compiler longer than all that calls them, so
// solver_kernels.cpp compiles them for everyone. No type of one file is another's here, packs being in an unnamed
// namespace; that they lie in memory alike is enough.
#pragma once

#include "simd.h"

namespace pmrl {

extern const SolverKernels PMRL_JOIN(solver_kernels_, PMRL_ISA);

namespace {
namespace solvers {

template <int K>
PMRL_INLINE void eigenpairs(Matrix<K, Pack>& A, Eigenpairs<K, Pack>& E, int k) {
  PMRL_JOIN(solver_kernels_, PMRL_ISA).of[K].eigenpairs(&A, &E, k);
}

template <int K>
PMRL_INLINE void leading_pair(const Matrix<K, Pack>& A, Pack& value, Vector<K, Pack>& v, int k, bool float64_input) {
  PMRL_JOIN(solver_kernels_, PMRL_ISA).of[K].leading_pair(&A, &value, &v, k, float64_input);
}

}  // namespace solvers
}  // namespace
}  // namespace pmrl
