// Which instruction set runs: the best that this processor has, or the one that PMRL_KERNELS_ISA names.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace pmrl {

// PMRL_HAS_<set>: CMakeLists.txt has its kernels in the build.
extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;
const Kernels* const kCompiled[] = {
#ifdef PMRL_HAS_avx512
    &kernels_avx512,
#endif
#ifdef PMRL_HAS_avx2
    &kernels_avx2,
#endif
#ifdef PMRL_HAS_baseline
    &kernels_baseline,
#endif
    nullptr};

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  // These builtins also ask whether the operating system saves the registers, without which they cannot be used.
  const auto is = [&](const char* isa) { return std::strcmp(kernels.isa, isa) == 0; };
  if (is("avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (is("avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

namespace {

struct Choice {
  const Kernels* kernels = nullptr;
  std::string reason;

  Choice() {
    const char* asked = std::getenv("PMRL_KERNELS_ISA");
    if (asked && !*asked) asked = nullptr;
    std::string names;
    for (const Kernels* const* candidate = kCompiled; *candidate; ++candidate) {
      names += std::string(names.empty() ? "" : ", ") + (*candidate)->isa;
      if (asked && std::strcmp(asked, (*candidate)->isa) != 0) continue;
      if (runs_here(**candidate)) {
        kernels = *candidate;
        return;
      }
      if (asked) {
        reason = std::string("PMRL_KERNELS_ISA: got '") + asked + "', which this processor does not have";
        return;
      }
    }
    reason = std::string("PMRL_KERNELS_ISA: got '") + asked + "', wanted one of " + names;
  }
};

}  // namespace

const Kernels* chosen(const char** reason) {
  static const Choice choice;
  if (reason) *reason = choice.reason.c_str();
  return choice.kernels;
}

}  // namespace pmrl
