// What the library was built from and by, and what of it runs here. CMakeLists.txt defines the macros.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"
#include "cuda/driver.h"

namespace pmrl {
namespace {

// One "name: value" a line. "(-)" marks an instruction set that this processor lacks.
std::string build_info() {
  const char* reason = nullptr;
  const Kernels* found = chosen(&reason);
  std::string compiled;
  for (const Kernels* const* candidate = kCompiled; *candidate; ++candidate)
    compiled += std::string(compiled.empty() ? "" : " ") + (*candidate)->isa + (runs_here(**candidate) ? "" : "(-)");
  std::string info;
  const auto line = [&](const char* name, const std::string& value) { info += name + (": " + value) + "\n"; };
  line("sources", PMRL_SOURCE_HASH);
  line("compiler", PMRL_COMPILER);
  line("torch", PMRL_TORCH_VERSION);
  line("compiled", compiled);
  line("isa", found ? found->isa : "");
  line("unusable", reason);
  line("cuda", *cuda::kBuilt.reason ? std::string("none: ") + cuda::kBuilt.reason : cuda::kBuilt.names);
  line("nvcc", cuda::kBuilt.compiler);
  return info;
}

std::string cuda_unavailable(int64_t device) {
  const char* reason = cuda::unavailable(static_cast<int>(device));
  return reason ? reason : "";
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&pmrl::build_info));
  m.impl("cuda_unavailable", TORCH_BOX(&pmrl::cuda_unavailable));
}
