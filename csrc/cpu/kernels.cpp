// The CPU kernels of one instruction set, which PMRL_ISA names: this file is compiled once for each. What it includes
// has internal linkage, so that the linker cannot take one set's copy of a function for another's.
//
//   spectral_kernels.h   forward, backward
//   contrast_kernels.h   maxima, sums, weights, row_dots
//   joint_kernels.cpp    joint: a file of its own, and
//   solver_kernels.cpp   solvers: another, since each takes a compiler a while
#include "kernels.h"

#include "contrast_kernels.h"
#include "spectral_kernels.h"

namespace pmrl {

#define PMRL_STRING(a) PMRL_STRING_(a)
#define PMRL_STRING_(a) #a

extern const JointKernels PMRL_JOIN(joint_kernels_, PMRL_ISA);
extern const Kernels PMRL_JOIN(kernels_, PMRL_ISA);
const Kernels PMRL_JOIN(kernels_, PMRL_ISA) = {
    PMRL_STRING(PMRL_ISA), kLanes, forward, backward, maxima, sums, weights, row_dots,
    &PMRL_JOIN(joint_kernels_, PMRL_ISA), &PMRL_JOIN(solver_kernels_, PMRL_ISA),
};

}  // namespace pmrl
