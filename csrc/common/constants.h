// The numbers that all kernels share: where a value counts as zero, tied, or too flat to differentiate. They are those
// of pmrl_kernels/ops/constants.py, which says why each is what it is; a test compares the two. And how functions are
// declared that both host and device compile.
#pragma once

#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
#define PMRL_DEVICE  // the function is being compiled for a device
#endif
#define PMRL_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__) || defined(__HIPCC__)
#define PMRL_UNROLL(n) PMRL_PRAGMA(unroll)
#define PMRL_EVERY PMRL_PRAGMA(unroll)  // loops over modalities: registers have no addresses
#define PMRL_INLINE static __host__ __device__ __forceinline__
#define PMRL_FUNCTION static __host__ __device__ __forceinline__
#define PMRL_MEMBER __host__ __device__ __forceinline__
#else
#define PMRL_UNROLL(n) PMRL_PRAGMA(GCC unroll n)
#define PMRL_EVERY  // as the compiler likes it
// Always inlined and of internal linkage: the CPU kernels are compiled once per instruction set, and the linker must
// never take an AVX-512 copy of a function for the baseline one.
#define PMRL_INLINE static inline __attribute__((always_inline))
#define PMRL_MEMBER inline __attribute__((always_inline))
#define PMRL_FUNCTION static __attribute__((noinline))  // large and called from several places: one copy per k
#endif

namespace pmrl {

constexpr int kMaxModalities = 32;
constexpr int kTemplatedModalities = 8;  // up to here k is a template argument, above it an ordinary number

constexpr double kLog2 = 0.69314718055994530942;
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: x + this has the integer nearest to x in its low bits

constexpr double kEps32 = 1.0 / (1 << 23);
constexpr double kEps64 = kEps32 * kEps32 / 64;  // 2^-52
constexpr double kPeakTie = 4 * kEps32;
constexpr double kRankOne = 1e-12;
constexpr double kCancelled = 1.0 / 4096;

// Jacobi stops where 2 off^2 <= this * diag^2, off and diag the norms of the entries off and on the diagonal. For the
// eigenvalues of 32-bit inputs a larger number would do. But where the sum of v1's entries is zero, it must come out
// below zero_sum over the gap, and off / diag = 1e-15 leaves up to 1e-15 k over the gap.
constexpr double kJacobiTolerance = 1e-30;
// Convergence is quadratic and takes 4 to 6 sweeps for k <= 8, up to 10 for k = 32. The cap ends only those solves that
// rounding keeps from meeting the tolerance.
constexpr int kMaxSweeps = 20;

// Eigenvalues closer than this, relative to the largest, are tied.
PMRL_INLINE constexpr double eigenvalue_gap(int k, bool float64_input) {
  return float64_input ? 16 * k * kEps64 : 4 * kEps32;
}

// Cards for data centres, whose float64 has half the rate of float32; others' has a 32nd or 64th.
PMRL_INLINE constexpr bool has_fast_float64(int capability) {
  return capability == 80 || capability == 90 || capability == 100;
}
#ifdef __CUDA_ARCH__
constexpr bool kFastFloat64 = has_fast_float64(__CUDA_ARCH__ / 10);
#else
constexpr bool kFastFloat64 = true;
#endif

// The sum of a unit eigenvector's entries, times its relative gap, is zero up to here. Pairs of float32, in which Gram
// matrices are summed where float64 is slow, lose more: of n equal terms n / 4 times 2^-48.
PMRL_INLINE constexpr double zero_sum(int k) { return (kFastFloat64 ? 16 : 2048) * k * kEps64; }

// The square of the relative floor below which a singular value has weight 0.
PMRL_INLINE constexpr double eigenvalue_floor(int k, bool float64_input) {
  return float64_input ? k * kEps64 : kEps32 * kEps32;
}

// Between these the square of a column's norm can be squared once more, as solvers do. A float64 instance with one
// outside is scaled by powers of two first.
constexpr double kLeastSquare = 0x1p-300;
constexpr double kLargestSquare = 0x1p300;

// How often power iteration squares at most: enough for any gap that is no tie.
PMRL_INLINE constexpr int squarings(int k, bool float64_input) {
  int steps = 0;
  for (double share = eigenvalue_gap(k, float64_input); share < 10.0; share *= 2) ++steps;
  return steps;
}

// What a spectral operator is asked for: a sum of these, with one form of the alignment term at most. Its outputs come
// in this order, kZ and kW being k of them each.
enum Wanted {
  kAlignment = 1,
  kAlignmentSum = 2,
  kAlignmentMean = 4,
  kAnyAlignment = 7,
  kSigma = 8,
  kU = 16,
  kV = 32,
  kZ = 64,
  kW = 128,
};

}  // namespace pmrl
