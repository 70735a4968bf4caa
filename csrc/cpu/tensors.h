// Temperatures and masks on the CPU, and the kernels of this processor.
#pragma once

#include <limits>
#include <optional>

#include "../tensors.h"
#include "kernels.h"

namespace pmrl {

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
