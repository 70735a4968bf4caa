// The numbers every kernel shares: where a value counts as zero, tied, or too flat to differentiate.
// They are those of pmrl_kernels/ops/constants.py, which says why each is what it is; a test compares the two.
#pragma once

#define PMRL_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__) || defined(__HIPCC__)
#define PMRL_UNROLL(n) PMRL_PRAGMA(unroll)
#define PMRL_INLINE static __host__ __device__ __forceinline__
#define PMRL_FUNCTION static __host__ __device__ __forceinline__
#else
#define PMRL_UNROLL(n) PMRL_PRAGMA(GCC unroll n)
// Always inlined and of internal linkage: the CPU kernels are compiled once per instruction set, and the
// linker must never fold an AVX-512 copy of a function into the baseline.
#define PMRL_INLINE static inline __attribute__((always_inline))
#define PMRL_FUNCTION static __attribute__((noinline))  // once per k: what is large and called from several places
#endif

namespace pmrl {

constexpr int kMaxModalities = 32;
constexpr int kTemplatedModalities = 8;  // up to here k is a template argument, beyond it an ordinary one

constexpr double kEps32 = 1.0 / (1 << 23);
constexpr double kEps64 = kEps32 * kEps32 / 64;  // 2^-52
constexpr double kPeakTie = 4 * kEps32;
constexpr double kRankOne = 1e-12;

// Jacobi stops at 2 off^2 <= this * diag^2. Eigenvalues would do with less up to 32-bit inputs, but the sum of v1's
// entries must come out below zero_sum over the gap where it is zero; off / diag = 1e-15 leaves up to 1e-15 k over it.
constexpr double kJacobiTolerance = 1e-30;
// Quadratic convergence needs 4 to 6 sweeps for k <= 8 and up to 10 for 32. The cap only ever ends a solve
// that rounding keeps from meeting the tolerance.
constexpr int kMaxSweeps = 20;

PMRL_INLINE constexpr double eigenvalue_gap(int k, bool wide) { return wide ? 16 * k * kEps64 : 4 * kEps32; }

PMRL_INLINE constexpr double zero_sum(int k) { return 16 * k * kEps64; }

// The square of the relative floor below which a singular value has weight 0.
PMRL_INLINE constexpr double eigenvalue_floor(int k, bool wide) { return wide ? k * kEps64 : kEps32 * kEps32; }

PMRL_INLINE constexpr int squarings(int k, bool wide) {
  int steps = 0;
  for (double share = eigenvalue_gap(k, wide); share < 10.0; share *= 2) ++steps;
  return steps;
}

// What a spectral operator is asked for, added up; outputs come in this order.
enum Wanted {
  kAlignment = 1,
  kAlignmentSum = 2,
  kAlignmentMean = 4,
  kAnyAlignment = 7,
  kSigma = 8,
  kU = 16,
  kV = 32,
  kZ = 64,
};

}  // namespace pmrl
