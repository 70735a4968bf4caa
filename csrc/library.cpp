// The operators of the native library, by PyTorch's stable ABI: one binary for every Python and every torch >= 2.10.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(pmrl_kernels, m) {
  // Signatures and meanings are those of pmrl_kernels/ops/reference.py; the state is this library's own.
  // An operator whose outputs or state change shape in a release needs another name: torch.compile keeps compiled
  // graphs on disk by the operators' names, and would run those of the release before.
  m.def(
      "spectral_forward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted) -> (Tensor[], Tensor[])");
  m.def(
      "spectral_backward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]");
  m.def(
      "instance_forward(Tensor u, Tensor? columns, int start, Tensor? temperature, float fixed_temperature) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_backward(Tensor u, Tensor? columns, int start, Tensor? temperature, float fixed_temperature, "
      "Tensor losses, Tensor state, Tensor grad) -> (Tensor, Tensor)");
  m.def(
      "modality_forward(Tensor[] z, Tensor u, Tensor? mask, Tensor[] columns, Tensor? columns_mask, int start, "
      "bool raw, Tensor? temperature, float fixed_temperature) -> (Tensor, Tensor, Tensor)");
  m.def(
      "modality_backward(Tensor[] z, Tensor u, Tensor? mask, Tensor[] columns, Tensor? columns_mask, int start, "
      "bool raw, Tensor? temperature, float fixed_temperature, Tensor losses, Tensor state, Tensor grad) "
      "-> (Tensor[], Tensor, Tensor)");
  // What was built, one "name: value" a line, and which instruction set runs (or why none does).
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("spectral_forward", TORCH_BOX(&pmrl::spectral_forward));
  m.impl("spectral_backward", TORCH_BOX(&pmrl::spectral_backward));
  m.impl("instance_forward", TORCH_BOX(&pmrl::instance_forward));
  m.impl("instance_backward", TORCH_BOX(&pmrl::instance_backward));
  m.impl("modality_forward", TORCH_BOX(&pmrl::modality_forward));
  m.impl("modality_backward", TORCH_BOX(&pmrl::modality_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&pmrl::build_info));
}
