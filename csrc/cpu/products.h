// Matrix products of memory that kernels share, by PyTorch's BLAS.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "tensors.h"

namespace pmrl {
namespace {

int64_t padded(int64_t n) { return (n + kTilePadding - 1) / kTilePadding * kTilePadding; }

template <class Element>
constexpr ScalarType scalar_type() {
  return float_dtype(sizeof(Element) == 8);
}

// A tensor over memory that must outlive it.
template <class Element>
Tensor view(const Element* data, int64_t n, int64_t m, int64_t stride0, int64_t stride1) {
  const int64_t sizes[] = {n, m}, strides[] = {stride0, stride1};
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_create_tensor_from_blob(const_cast<Element*>(data), 2, sizes, strides, 0,
                                                     code_of(scalar_type<Element>()), aoti_torch_device_type_cpu(), 0,
                                                     &handle) == AOTI_TORCH_SUCCESS,
                  "pmrl_kernels: no view of a tile");
  return Tensor(handle);
}

// out = x y, or out += x y.
void multiply(const Tensor& out, const Tensor& x, const Tensor& y, bool add) {
  const auto status = add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), y.get(), 1.0, 1.0)
                          : aoti_torch_cpu_mm_out(out.get(), x.get(), y.get());
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "pmrl_kernels: a matrix product failed");
}

// Whether products of float32 are at present those of rounded factors. PyTorch may have been told that they may be
// (torch.set_float32_matmul_precision and its kin), but whether they are depends on the processor too, and on shapes. So
// numbers that have all of float32's bits are multiplied by an identity matrix, large enough for whatever is faster.
inline bool rounds_factors() {
  constexpr int64_t n = 64;
  struct Factors {
    std::vector<float> x, one;
    Factors() : x(n * n, 1 + 0x1p-12f + 0x1p-23f), one(n * n, 0.0f) {
      for (int64_t i = 0; i < n; ++i) one[i * n + i] = 1.0f;
    }
  };
  static const Factors factors;
  std::vector<float> product(n * n, 0.0f);
  multiply(view(product.data(), n, n, n, 1), view(factors.x.data(), n, n, n, 1), view(factors.one.data(), n, n, n, 1),
           false);
  return product != factors.x;
}

}  // namespace
}  // namespace pmrl
