// A library for tests: the operators of csrc/cuda/spectral.cpp for tensors of the CPU, in a namespace of their own, with
// images that are named by their k and hold nothing. `allocations` tells where all memory begins that the call that
// runs was given or has allocated, and how much it is.
//
// With driver.cpp, which is compiled with dlopen by another name: what it looks for is found in PMRL_DOOR_FOLDER, under
// names that nothing else in the process goes by, such as the project's own library.
#include <dlfcn.h>

#include <cstdlib>
#include <string>

extern "C" void* door_dlopen(const char* name, int) {
  const std::string asked = name, folder = std::string(std::getenv("PMRL_DOOR_FOLDER")) + "/";
  if (asked == "libtorch_cuda.so") return dlopen((folder + "pytorch_of_door.so").c_str(), RTLD_LAZY);
  if (asked == "libcuda.so.1") return dlopen((folder + "cuda_of_door.so").c_str(), RTLD_LAZY);
  return nullptr;
}

#define PMRL_DOOR
#include "cuda/spectral.cpp"

static const unsigned char codes[7] = {2, 3, 4, 5, 6, 7, 8};
extern const pmrl::cuda::Built pmrl::cuda::kBuilt{
    "sm_80 sm_86 sm_90 compute_90", "nvcc 13.0.88", "", {80, 86, 90}, 90, 12000, 12080};
extern const pmrl::cuda::Image pmrl::cuda::kImages[] = {{2, &codes[0]}, {3, &codes[1]}, {4, &codes[2]}, {5, &codes[3]},
                                                        {6, &codes[4]}, {7, &codes[5]}, {8, &codes[6]}, {0, nullptr}};

namespace pmrl {

static std::vector<int64_t> known;  // by a single thread

void note(const Tensor& x) {
  int64_t elements = x.numel() > 0;
  for (int64_t i = 0; i < x.dim() && elements; ++i) elements += (x.size(i) - 1) * x.stride(i);
  known.push_back(reinterpret_cast<int64_t>(x.const_data_ptr()));
  known.push_back(elements * x.element_size());
}

namespace cuda {
namespace {

// Arguments, which no object of Python's need hold.
void begin(const std::vector<Tensor>& embeddings, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& temperature) {
  known.clear();
  for (const Tensor& x : embeddings) note(x);
  if (mask) note(*mask);
  if (temperature) note(*temperature);
}

std::vector<int64_t> allocations() { return known; }

std::tuple<std::vector<Tensor>, std::vector<Tensor>> door_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, int64_t wanted) {
  begin(embeddings, mask, temperature);
  return spectral_forward(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted);
}

std::vector<Tensor> door_backward(std::vector<Tensor> embeddings, std::optional<Tensor> mask,
                                  std::optional<Tensor> temperature, double fixed_temperature, bool normalize,
                                  bool spectrum, int64_t wanted, std::vector<Tensor> state,
                                  std::vector<std::optional<Tensor>> grads, std::vector<bool> needed) {
  begin(embeddings, mask, temperature);
  for (const Tensor& x : state) note(x);
  for (const std::optional<Tensor>& x : grads) {
    if (x) note(*x);
  }
  return spectral_backward(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted, state, grads,
                           needed);
}

}  // namespace
}  // namespace cuda
}  // namespace pmrl

STABLE_TORCH_LIBRARY(pmrl_door, m) {
  m.def(
      "spectral_forward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted) -> (Tensor[], Tensor[])");
  m.def(
      "spectral_backward(Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, "
      "bool normalize, bool spectrum, int wanted, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]");
  m.def("allocations() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(pmrl_door, CPU, m) {
  m.impl("spectral_forward", TORCH_BOX(&pmrl::cuda::door_forward));
  m.impl("spectral_backward", TORCH_BOX(&pmrl::cuda::door_backward));
}
STABLE_TORCH_LIBRARY_IMPL(pmrl_door, CompositeExplicitAutograd, m) {
  m.impl("allocations", TORCH_BOX(&pmrl::cuda::allocations));
}
