// The schemas of the operators, by PyTorch's stable ABI: one binary for every Python and every torch >= 2.10.
//
// A file that implements some of them for a device registers those itself, by a STABLE_TORCH_LIBRARY_IMPL at its end:
// cpu/*.cpp for CPU tensors, build_info.cpp what needs no device. checks.h has the checks that devices share.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pmrl_kernels, m) {
  // Signatures and meanings are those of pmrl_kernels/ops/*/spec.py; what a state holds is each implementation's
  // own. An operator whose outputs or state change shape in a release needs another name: torch.compile keeps compiled
  // graphs on disk by the operators' names, and would run those of the release before.
  m.def(
      "spectral_forward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted) -> (Tensor[], Tensor[])");
  m.def(
      "spectral_backward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]");
  m.def(
      "paired_forward(Tensor[] vectors, int[] pairs, bool[] directions, Tensor? mask, Tensor[] everyone, "
      "Tensor? everyone_mask, int start, Tensor? temperature, float fixed_temperature) -> (Tensor, Tensor, Tensor)");
  m.def(
      "paired_backward(Tensor[] vectors, int[] pairs, bool[] directions, Tensor? mask, Tensor[] everyone, "
      "Tensor? everyone_mask, int start, Tensor? temperature, float fixed_temperature, Tensor losses, Tensor state, "
      "Tensor grad) -> (Tensor[], Tensor)");
  m.def(
      "joint_forward(Tensor query, Tensor[] candidates, Tensor? mask, int score, bool normalize) -> (Tensor, Tensor[])");
  m.def(
      "joint_backward(Tensor query, Tensor[] candidates, Tensor? mask, int score, bool normalize, Tensor[] state, "
      "Tensor grad, bool[] needed) -> Tensor[]");
  m.def(
      "joint_contrast_forward(Tensor query, Tensor[] candidates, Tensor? mask, Tensor? positives, int[] own, int score, "
      "bool normalize, float smoothing, Tensor? temperature, float fixed_temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "joint_contrast_backward(Tensor query, Tensor[] candidates, Tensor? mask, Tensor? positives, int[] own, int score, "
      "bool normalize, float smoothing, Tensor? temperature, float fixed_temperature, Tensor row_losses, "
      "Tensor column_losses, Tensor[] state, Tensor grad, bool half, bool[] needed) -> Tensor[]");
  // What was built, one "name: value" a line, and which instruction set runs (or why none does).
  m.def("build_info() -> str");
  // Why no kernel for CUDA runs on that device, or "". This starts CUDA, where there is any.
  m.def("cuda_unavailable(int device) -> str");
}
