// Tensors on the CPU, as its operators need them: new ones, rows, temperatures; and the kernels of this processor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace pmrl {

inline int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// A contiguous tensor on the CPU, not yet written. (torch::stable::empty boxes its arguments and takes four times as
// long. aoti_torch_empty_strided is quicker still, but memory from there does not get PyTorch's debugging fill, which
// makes elements that nobody wrote visible.)
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t code = code_of(dtype), layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()), &code,
                                            &layout, &device, 0, nullptr, &handle) == AOTI_TORCH_SUCCESS,
                  "pmrl_kernels: out of memory");
  return Tensor(handle);
}

// A number in a 0-d tensor, NaN if it is not within these bounds.
inline double read_temperature(const std::optional<Tensor>& tensor, double fixed, double least, double largest) {
  if (!tensor) return fixed;
  check_temperature(*tensor);
  double tau = std::numeric_limits<double>::quiet_NaN();
  const void* data = tensor->const_data_ptr();
  switch (tensor->scalar_type()) {
    case ScalarType::Double: tau = *static_cast<const double*>(data); break;
    case ScalarType::Float: tau = *static_cast<const float*>(data); break;
    default:
      tau = *static_cast<const double*>(torch::stable::to(*tensor, ScalarType::Double).const_data_ptr());
  }
  return least <= tau && tau <= largest ? tau : std::numeric_limits<double>::quiet_NaN();
}

// Kernels need rows that are contiguous. A tensor whose rows are not is copied, the others are not.
inline Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// Kernels read a mask by one pointer.
inline const uint8_t* mask_data(const Tensor& contiguous) {
  return static_cast<const uint8_t*>(contiguous.const_data_ptr());
}

inline const Kernels& kernels() {
  const char* reason = nullptr;
  const Kernels* found = chosen(&reason);
  STD_TORCH_CHECK(found, reason);
  return *found;
}

}  // namespace pmrl
