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

// (loss, losses, state)
std::tuple<Tensor, Tensor, Tensor> instance_forward(Tensor u, std::optional<Tensor> columns, int64_t start,
                                                    std::optional<Tensor> temperature, double fixed_temperature);

// (gradient of u, of the temperature)
std::tuple<Tensor, Tensor> instance_backward(Tensor u, std::optional<Tensor> columns, int64_t start,
                                             std::optional<Tensor> temperature, double fixed_temperature,
                                             Tensor losses, Tensor state, Tensor grad);

std::tuple<Tensor, Tensor, Tensor> modality_forward(std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask,
                                                    std::vector<Tensor> columns, std::optional<Tensor> columns_mask,
                                                    int64_t start, bool raw, std::optional<Tensor> temperature,
                                                    double fixed_temperature);

// (gradients of z, of u, of the temperature)
std::tuple<std::vector<Tensor>, Tensor, Tensor> modality_backward(
    std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask, std::vector<Tensor> columns,
    std::optional<Tensor> columns_mask, int64_t start, bool raw, std::optional<Tensor> temperature,
    double fixed_temperature, Tensor losses, Tensor state, Tensor grad);

std::string build_info();

}  // namespace pmrl
