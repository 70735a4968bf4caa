// The operators for CPU tensors: library.cpp says what they are called, kernels.h what they call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pmrl {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, bool align, bool want_u, bool want_z);

std::tuple<std::vector<Tensor>, Tensor> spectral_backward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, bool align, std::vector<Tensor> state,
    std::optional<Tensor> grad_alignment, std::optional<Tensor> grad_sigma, std::optional<Tensor> grad_u,
    std::optional<Tensor> grad_v, std::vector<std::optional<Tensor>> grad_z, std::vector<bool> needed);

std::string build_info();

}  // namespace pmrl
