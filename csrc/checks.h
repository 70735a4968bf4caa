// Checks of operators' arguments, for every device. Users' arguments were checked in Python (pmrl_kernels/inputs.py),
// which can name them. Checked here is what reading and writing memory depends on, for callers that use the operators
// directly. Only sizes, strides and dtypes of tensors are read, no elements.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/layout.h"

namespace pmrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  bool equal = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) equal = equal && x.size(i) == sizes.begin()[i];
  return equal;
}

inline constexpr ScalarType float_dtype(bool is_float64) { return is_float64 ? ScalarType::Double : ScalarType::Float; }

// ---- of several operators -----------------------------------------------------------------------

// (B, k). Contiguous it need not be.
inline void check_mask(const Tensor& mask, int64_t B, int64_t k) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && has_sizes(mask, {B, k}),
                  "pmrl_kernels: mask must be a bool tensor (B, k)");
}

inline void check_temperature(const Tensor& temperature) {
  STD_TORCH_CHECK(temperature.dim() == 0, "pmrl_kernels: temperature must be 0-d");
}

// What a forward operator saved: `size` numbers.
inline void check_state(const Tensor& state, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(state.numel() == size && state.scalar_type() == dtype && state.is_contiguous(),
                  "pmrl_kernels: state is not that of this batch");
}

// ---- spectral operators -------------------------------------------------------------------------

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "pmrl_kernels: embeddings must be float32, float64, bfloat16 or float16");
  }
}

// What k embeddings (B, d), or one tensor (B, k, d) that holds them all, have in common.
struct Embeddings {
  int64_t B, k, d;
  bool stacked;  // one tensor
  Dtype dtype;   // of all, or kMixed
  bool float64_input;  // one is float64
};

inline Embeddings check_embeddings(const std::vector<Tensor>& xs) {
  STD_TORCH_CHECK(!xs.empty(), "pmrl_kernels: embeddings must be k tensors (B, d) or one (B, k, d)");
  const int64_t dim = xs[0].dim();
  const bool stacked = dim == 3;
  STD_TORCH_CHECK(dim == 2 || stacked, "pmrl_kernels: embeddings must have equal shapes (B, d)");
  STD_TORCH_CHECK(!stacked || xs.size() == 1, "pmrl_kernels: a (B, k, d) tensor must come alone");
  const Dtype first = dtype_of(xs[0]);
  const int64_t k = stacked ? xs[0].size(1) : static_cast<int64_t>(xs.size());
  Embeddings found{xs[0].size(0), k, xs[0].size(dim - 1), stacked, first, first == Dtype::kFloat64};
  STD_TORCH_CHECK(k >= 1 && k <= kMaxModalities, "pmrl_kernels: k must be in 1..", kMaxModalities, ", got ", k);
  for (size_t m = 1; m < xs.size(); ++m) {
    STD_TORCH_CHECK(has_sizes(xs[m], {found.B, found.d}), "pmrl_kernels: embeddings must have equal shapes (B, d)");
    const Dtype dtype = dtype_of(xs[m]);
    if (dtype != first) found.dtype = Dtype::kMixed;
    found.float64_input = found.float64_input || dtype == Dtype::kFloat64;
  }
  return found;
}

// A sum of flags (see Wanted) with one form of the alignment term at most.
inline void check_wanted(int64_t wanted) {
  const int64_t alignment = wanted & kAnyAlignment;
  STD_TORCH_CHECK(wanted >= 0 && wanted < 2 * kW && (alignment & (alignment - 1)) == 0,
                  "pmrl_kernels: wanted must be a sum of flags with one reduction at most, got ", wanted);
}

// Which embeddings, or whether the one tensor of them, need a gradient.
inline void check_needed(const std::vector<bool>& needed, const std::vector<Tensor>& embeddings) {
  STD_TORCH_CHECK(needed.size() == embeddings.size(), "pmrl_kernels: needed must name each embedding");
}

// The incoming gradients of the wanted outputs, one after the other in the order of the outputs.
class IncomingGradients {
 public:
  IncomingGradients(const std::vector<std::optional<Tensor>>& grads, ScalarType dtype) : grads_(grads), dtype_(dtype) {}

  // That of the next output, which has these sizes; or nothing comes in for it.
  const std::optional<Tensor>& next(std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(next_ < grads_.size(), "pmrl_kernels: grads must name each wanted output");
    const std::optional<Tensor>& grad = grads_[next_++];
    STD_TORCH_CHECK(!grad || (grad->scalar_type() == dtype_ && has_sizes(*grad, sizes)),
                    "pmrl_kernels: an incoming gradient must have its output's shape and dtype");
    return grad;
  }
  // To be called after the last output.
  void finish() const {
    STD_TORCH_CHECK(next_ == grads_.size(), "pmrl_kernels: grads must name each wanted output");
  }

 private:
  const std::vector<std::optional<Tensor>>& grads_;
  ScalarType dtype_;
  size_t next_ = 0;
};

// ---- joint scores -------------------------------------------------------------------------------

// An index of the scores that spec.py names. Triangles are of two modalities that are there; an eighth, dot products, is a
// contrast's alone.
inline void check_joint_score(int64_t score, int64_t n, bool masked, bool contrast) {
  STD_TORCH_CHECK(score >= 0 && score < 7 + contrast, "pmrl_kernels: score is none of those there are, got ", score);
  STD_TORCH_CHECK(score != 6 || (n == 2 && !masked), "pmrl_kernels: triangles are of two modalities, without a mask");
  STD_TORCH_CHECK(score != 7 || n == 1, "pmrl_kernels: dot products are of one vector");
}

// ---- contrasts ----------------------------------------------------------------------------------

// The first of the vectors: (B, d). The others have to be like it.
inline void check_first(const std::vector<Tensor>& vectors) {
  STD_TORCH_CHECK(!vectors.empty() && vectors[0].dim() == 2 && vectors[0].size(1) >= 1 &&
                      (vectors[0].scalar_type() == ScalarType::Float || vectors[0].scalar_type() == ScalarType::Double),
                  "pmrl_kernels: vectors must be (B, d), float32 or float64, and at least one");
}

// Two indices for each pair, and for each vector whether it is a direction. True if all pairs are of a vector with
// itself.
inline bool check_pairs(const std::vector<int64_t>& pairs, const std::vector<bool>& directions,
                        const std::vector<Tensor>& vectors) {
  STD_TORCH_CHECK(pairs.size() % 2 == 0 && directions.size() == vectors.size(),
                  "pmrl_kernels: pairs must be two indices each, and directions name each vector");
  size_t equal = 0;
  for (size_t p = 0; p < pairs.size(); ++p) {
    STD_TORCH_CHECK(pairs[p] >= 0 && pairs[p] < static_cast<int64_t>(vectors.size()),
                    "pmrl_kernels: pairs must be indices of vectors, got ", pairs[p]);
    equal += p % 2 == 1 && pairs[p] == pairs[p - 1];
  }
  STD_TORCH_CHECK(equal == 0 || 2 * equal == pairs.size(),
                  "pmrl_kernels: pairs must be of different vectors, or all of one with itself");
  return 2 * equal == pairs.size();
}

// (n, d), d and dtype as of the first one.
inline void check_vectors(const Tensor& x, const Tensor& first, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == first.scalar_type() && has_sizes(x, {n, first.size(1)}),
                  "pmrl_kernels: vectors must be (B, d) and of one dtype, float32 or float64");
}

// The vectors of all processes, or nothing where there are no others.
inline void check_everyone(const std::vector<Tensor>& everyone, size_t count) {
  STD_TORCH_CHECK(everyone.empty() || everyone.size() == count,
                  "pmrl_kernels: everyone must be the vectors of all processes");
}

// Whether rows [start, start + n) are within everyone's N.
inline void check_place(int64_t start, int64_t n, int64_t N) {
  STD_TORCH_CHECK(start >= 0 && start <= N - n, "pmrl_kernels: rows must lie within everyone's");
}

// The losses of all processes.
inline void check_losses(const Tensor& losses, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double && has_sizes(losses, sizes),
                  "pmrl_kernels: losses must be everyone's, (directions, pairs, N), in float64");
}

// What comes in for a mean.
inline void check_scalar_gradient(const Tensor& grad) {
  STD_TORCH_CHECK(grad.dim() == 0, "pmrl_kernels: an incoming gradient must be 0-d");
}

}  // namespace pmrl
