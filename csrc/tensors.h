// Tensors as operators need them, on every device: new ones, rows, and gradients of embeddings.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <vector>

#include "checks.h"

namespace pmrl {

#ifdef PMRL_DOOR
void note(const Tensor& made);  // for tests: memory that is allocated here is told of
#else
inline void note(const Tensor&) {}
#endif

inline int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// A contiguous tensor where `like` is, not yet written. (torch::stable::empty boxes its arguments and takes four times as
// long. aoti_torch_empty_strided is quicker still, but memory from there does not get PyTorch's debugging fill, which
// makes elements that nobody wrote visible.)
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t code = code_of(dtype), layout = aoti_torch_layout_strided();
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()), &code,
                                            &layout, nullptr, 0, nullptr, &handle) == AOTI_TORCH_SUCCESS,
                  "pmrl_kernels: out of memory");
  Tensor made(handle);
  note(made);
  return made;
}

inline Tensor made_contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor made = torch::stable::contiguous(x);
  note(made);
  return made;
}

// Kernels need rows that are contiguous. A tensor whose rows are not is copied, the others are not.
inline Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : made_contiguous(x);
}

// Gradients of embeddings (B, d), or of one tensor (B, k, d) of them, (0,) for those that need none. out[m]: where modality
// m's rows are; not touched where it needs none. Returns whether any does.
inline bool make_gradients(const std::vector<Tensor>& embeddings, const std::vector<bool>& needed, Rows* out,
                           std::vector<Tensor>& made) {
  bool any = false;
  for (size_t j = 0; j < embeddings.size(); ++j) {
    const Tensor& x = embeddings[j];
    const ScalarType dtype = x.scalar_type();
    const bool stacked = x.dim() == 3;
    if (!needed[j]) {
      made.push_back(make(x, {0}, dtype));
      continue;
    }
    any = true;
    const int64_t k = stacked ? x.size(1) : 1, row = x.size(x.dim() - 1) * static_cast<int64_t>(x.element_size());
    made.push_back(stacked ? make(x, {x.size(0), k, x.size(2)}, dtype) : make(x, {x.size(0), x.size(1)}, dtype));
    char* data = static_cast<char*>(made.back().mutable_data_ptr());
    for (int64_t m = 0; m < k; ++m) out[stacked ? m : j] = {data + m * row, k * row, dtype_of(x)};
  }
  return any;
}

}  // namespace pmrl
