// Which instruction set runs: the best that this processor has, or the one that PMRL_KERNELS_ISA names.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace pmrl {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
const Kernels* const kCompiled[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline, nullptr};
#else
const Kernels* const kCompiled[] = {&kernels_baseline, nullptr};
#endif

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  // These builtins also ask whether the operating system saves the registers, without which they cannot be used.
  if (&kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (&kernels == &kernels_avx2)
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
