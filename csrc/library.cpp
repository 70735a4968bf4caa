// The operators of the native library, by PyTorch's stable ABI: one binary for every Python and every torch >= 2.10.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(pmrl_kernels, m) {
  // Signatures and meanings are those of pmrl_kernels/backends/reference.py; the state is this library's own.
  // An operator whose outputs or state change shape in a release needs another name: torch.compile keeps compiled
  // graphs on disk by the operators' names, and would run those of the release before.
  m.def(
      "spectral_forward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted) -> (Tensor[], Tensor[])");
  m.def(
      "spectral_backward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]");
  // What was built, one "name: value" a line, and which instruction set runs (or why none does).
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("spectral_forward", TORCH_BOX(&pmrl::spectral_forward));
  m.impl("spectral_backward", TORCH_BOX(&pmrl::spectral_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&pmrl::build_info));
}
