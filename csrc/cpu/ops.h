// The operators for CPU tensors: library.cpp says what they are called, kernels.h what they call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pmrl {

using torch::stable::Tensor;

// (outputs, state)
std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, int64_t wanted);

std::vector<Tensor> spectral_backward(std::vector<Tensor> embeddings, std::optional<Tensor> mask,
                                      std::optional<Tensor> temperature, double fixed_temperature, bool normalize,
                                      bool spectrum, int64_t wanted, std::vector<Tensor> state,
                                      std::vector<std::optional<Tensor>> grads, std::vector<bool> needed);

std::string build_info();

}  // namespace pmrl
