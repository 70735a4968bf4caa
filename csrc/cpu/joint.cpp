// The operators of joint scores for CPU tensors: arguments are checked and become plain pointers, joint.h makes scores
// and gradients of these.
//
//   joint_forward    reads queries (Nq, d), candidates' modalities, mask; writes scores (Nq, Ng) and the state, which is
//                    eigenvalues and eigenvectors of each candidate's Gram matrix, (Ng, n + n^2) float64
//   joint_backward   reads these and dL/d score; writes the gradients of queries and candidates, in their dtypes
#include "joint.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace pmrl {
namespace {

// (scores, state)
std::tuple<Tensor, std::vector<Tensor>> joint_forward(Tensor query, std::vector<Tensor> candidates,
                                                      std::optional<Tensor> mask, int64_t score, bool normalize) {
  HeldJoint held;
  const JointBatch batch = make_joint(query, candidates, mask, score, normalize, false, held);
  Tensor scores = make(query, {batch.Nq, batch.Ng}, float_dtype(batch.is_float64));
  Tensor state = make(query, {batch.Ng, batch.n + batch.n * batch.n}, ScalarType::Double);
  prepared(query, batch, static_cast<double*>(state.mutable_data_ptr()), true, [&](auto& joint) {
    using Element = std::remove_pointer_t<decltype(joint.rows(JointPlace{}))>;
    const bool wider = joint.is_float64 && !batch.is_float64;
    Tensor found = wider ? make(query, {batch.Nq, batch.Ng}, ScalarType::Double) : scores;
    joint.forward(static_cast<Element*>(found.mutable_data_ptr()));
    if (wider) scores = torch::stable::to(found, ScalarType::Float);
  });
  return {scores, {state}};
}

// Gradients of the query and of the candidates, (0,) for those that need none.
std::vector<Tensor> joint_backward(Tensor query, std::vector<Tensor> candidates, std::optional<Tensor> mask,
                                   int64_t score, bool normalize, std::vector<Tensor> state, Tensor grad,
                                   std::vector<bool> needed) {
  HeldJoint held;
  const JointBatch batch = make_joint(query, candidates, mask, score, normalize, false, held);
  STD_TORCH_CHECK(state.size() == 1, "pmrl_kernels: state is not that of this batch");
  check_state(state[0], joint_state_size(batch), ScalarType::Double);
  STD_TORCH_CHECK(needed.size() == 1 + candidates.size(), "pmrl_kernels: needed must name each embedding");
  STD_TORCH_CHECK(grad.scalar_type() == float_dtype(batch.is_float64) && has_sizes(grad, {batch.Nq, batch.Ng}),
                  "pmrl_kernels: an incoming gradient must have its output's shape and dtype");
  const std::vector<bool> of_candidates(needed.begin() + 1, needed.end());
  std::vector<Tensor> found;
  Rows to_query[1] = {}, to_candidates[kMaxModalities] = {};
  const bool any_query = make_gradients({query}, {needed[0]}, to_query, found);
  const bool any_candidate = make_gradients(candidates, of_candidates, to_candidates, found);
  if (!any_query && !any_candidate) return found;
  double* decomposed = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));
  prepared(query, batch, decomposed, false, [&](auto& joint) {
    const bool wider = joint.is_float64 && !batch.is_float64;
    const Tensor rows = with_rows(wider ? torch::stable::to(grad, ScalarType::Double) : grad);
    JointSums sums = joint.sums(any_query, any_candidate);
    sums.query = to_query[0];
    std::copy_n(to_candidates, kMaxModalities, sums.candidates);
    joint.backward(rows, sums);
  });
  return found;
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("joint_forward", TORCH_BOX(&pmrl::joint_forward));
  m.impl("joint_backward", TORCH_BOX(&pmrl::joint_backward));
}
