// The spectral operators for CPU tensors: arguments are checked and become plain pointers (kernels.h), blocks of
// instances are spread over threads. spectral_kernels.h says what they compute, read and write.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace pmrl {
namespace {

// Tensors that a Batch points into.
struct Held {
  std::vector<Tensor> embeddings;
  std::optional<Tensor> mask;
};

// Any positive number that float64 has.
double read_temperature_of_alignment(const std::optional<Tensor>& tensor, double fixed) {
  using limits = std::numeric_limits<double>;
  return read_temperature(tensor, fixed, limits::denorm_min(), limits::max());
}

Batch make_batch(const std::vector<Tensor>& embeddings, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& temperature, double fixed_temperature, bool normalize, bool spectrum,
                 int64_t wanted, Held& held) {
  const Embeddings all = check_embeddings(embeddings);
  Batch batch{};
  batch.B = all.B;
  batch.d = all.d;
  batch.dtype = all.dtype;
  for (const Tensor& x : embeddings) held.embeddings.push_back(with_rows(x));
  for (int64_t m = 0; m < all.k; ++m) {
    const Tensor& x = held.embeddings[all.stacked ? 0 : m];
    const Dtype dtype = all.dtype == Dtype::kMixed ? dtype_of(x) : all.dtype;
    const int64_t element = element_size(dtype);
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    batch.x[m] = {data + (all.stacked ? m * x.stride(1) * element : 0), x.stride(0) * element, dtype};
  }
  if (mask) {
    check_mask(*mask, all.B, all.k);
    held.mask = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
    batch.mask = mask_data(*held.mask);
  }
  batch.settings = {static_cast<int>(all.k),
                    static_cast<int>(std::min(all.d, all.k)),
                    read_temperature_of_alignment(temperature, fixed_temperature),
                    normalize,
                    spectrum,
                    all.float64_input,
                    (wanted & ~int64_t(kZ)) != 0,
                    (wanted & kW) != 0};
  return batch;
}

// Blocks that a thread takes at least: some 10 microseconds of work, against which waking a thread is cheap.
int64_t grain(const Batch& batch, const Kernels& run) {
  const int64_t elements = run.lanes * batch.settings.k * (batch.d + 64);
  return elements >= 32768 ? 1 : 32768 / elements;
}

int64_t blocks(const Batch& batch, const Kernels& run) { return (batch.B + run.lanes - 1) / run.lanes; }

// An incoming gradient of up to two dimensions.
Values values_of(const std::optional<Tensor>& grad) {
  if (!grad) return {nullptr, 0, 0};
  const int64_t dim = grad->dim();
  return {grad->const_data_ptr(), dim > 0 ? grad->stride(0) : 0, dim > 1 ? grad->stride(1) : 0};
}

// An incoming gradient (B, d). `held` keeps what had to be copied.
Rows rows_of(const std::optional<Tensor>& grad, bool float64_input, std::vector<Tensor>& held) {
  if (!grad) return {nullptr, 0, Dtype::kFloat32};
  held.push_back(with_rows(*grad));
  const Dtype dtype = float64_input ? Dtype::kFloat64 : Dtype::kFloat32;
  char* data = static_cast<char*>(const_cast<void*>(held.back().const_data_ptr()));
  return {data, held.back().stride(0) * element_size(dtype), dtype};
}

// What a sum over the alignment terms begins with: 0, or NaN for a bad temperature, which shows even without instances.
double empty_total(const Settings& s) { return s.spectrum ? s.tau - s.tau : 0.0; }

// How many instances a mean over the alignment terms counts: those with two modalities. At least 1, so that a mean over
// none is 0.
double number_alignable(const Batch& batch) {
  const int k = batch.settings.k;
  int64_t count = k >= 2 ? batch.B : 0;
  if (batch.mask) {
    count = 0;
    for (int64_t i = 0; i < batch.B; ++i) {
      int present = 0;
      for (int m = 0; m < k; ++m) present += is_present(batch.mask, i * k + m);
      count += present >= 2;
    }
  }
  return static_cast<double>(std::max<int64_t>(1, count));
}

// (outputs, state)
std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, int64_t wanted) {
  check_wanted(wanted);
  Held held;
  Forward f{};
  f.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted, held);
  const Settings& s = f.batch.settings;
  const int64_t B = f.batch.B, d = f.batch.d, k = s.k;
  const Kernels& run = kernels();
  const int64_t count = blocks(f.batch, run);
  const ScalarType dtype = float_dtype(s.float64_input);

  std::vector<Tensor> outputs;
  const auto add = [&](std::initializer_list<int64_t> sizes) {
    outputs.push_back(make(held.embeddings[0], sizes, dtype));
    return outputs.back().mutable_data_ptr();
  };
  std::vector<double> totals;
  void* reduced = nullptr;
  if (wanted & kAlignment) f.alignment = add({B});
  if (wanted & (kAlignmentSum | kAlignmentMean)) {
    reduced = add({});
    totals.resize(count);
    f.totals = totals.data();
  }
  f.values = spectrum ? s.count : 1;
  if (wanted & kSigma) f.sigma = add({B, f.values});
  if (wanted & kU) f.u = add({B, d});
  if (wanted & kV) f.v = add({B, k});
  for (int64_t m = 0; m < k && wanted & kZ; ++m) f.z[m] = add({B, d});
  for (int64_t m = 0; m < k && wanted & kW; ++m) f.w[m] = add({B, d});
  // Room for whole blocks. The shape is linear in B, so torch.compile need not specialise on B.
  Tensor state = make(held.embeddings[0], {B + kMostLanes - 1, state_size(s)}, ScalarType::Double);
  f.batch.state = static_cast<double*>(state.mutable_data_ptr());
  const int64_t used = count * run.lanes;  // the rest becomes zeros, so that equal inputs have equal states
  std::fill(f.batch.state + used * state_size(s), f.batch.state + (B + kMostLanes - 1) * state_size(s), 0.0);

  torch::stable::parallel_for(0, count, grain(f.batch, run),
                              [&](int64_t begin, int64_t end) { run.forward(f, begin, end); });
  if (reduced) {
    double total = empty_total(s);
    for (double x : totals) total += x;  // in the order of the blocks, whatever threads took them
    if (wanted & kAlignmentMean) total /= number_alignable(f.batch);
    if (s.float64_input)
      *static_cast<double*>(reduced) = total;
    else
      *static_cast<float*>(reduced) = static_cast<float>(total);
  }
  return {outputs, {state}};
}

// Gradients of the embeddings, (0,) for those that need none, and of the temperature where that is a tensor.
std::vector<Tensor> spectral_backward(std::vector<Tensor> embeddings, std::optional<Tensor> mask,
                                      std::optional<Tensor> temperature, double fixed_temperature, bool normalize,
                                      bool spectrum, int64_t wanted, std::vector<Tensor> state,
                                      std::vector<std::optional<Tensor>> grads, std::vector<bool> needed) {
  check_wanted(wanted);
  Held held;
  Backward g{};
  g.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted, held);
  const Settings& s = g.batch.settings;
  const int64_t B = g.batch.B, d = g.batch.d, k = s.k;
  const Kernels& run = kernels();
  const int64_t count = blocks(g.batch, run);
  STD_TORCH_CHECK(state.size() == 1, "pmrl_kernels: state is not that of this batch");
  check_state(state[0], (B + kMostLanes - 1) * state_size(s), ScalarType::Double);
  check_needed(needed, embeddings);
  g.batch.state = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));

  std::vector<Tensor> rows;
  IncomingGradients incoming(grads, float_dtype(s.float64_input));
  g.alignment_factor = wanted & kAlignmentMean ? 1 / number_alignable(g.batch) : 1.0;
  g.values = spectrum ? s.count : 1;
  if (wanted & kAlignment) g.alignment = values_of(incoming.next({B}));
  if (wanted & (kAlignmentSum | kAlignmentMean)) g.alignment = values_of(incoming.next({}));
  if (wanted & kSigma) g.sigma = values_of(incoming.next({B, g.values}));
  if (wanted & kU) g.u = rows_of(incoming.next({B, d}), s.float64_input, rows);
  if (wanted & kV) g.v = values_of(incoming.next({B, k}));
  for (int64_t m = 0; m < k && wanted & kZ; ++m) g.z[m] = rows_of(incoming.next({B, d}), s.float64_input, rows);
  for (int64_t m = 0; m < k && wanted & kW; ++m) g.w[m] = rows_of(incoming.next({B, d}), s.float64_input, rows);
  incoming.finish();

  std::vector<Tensor> found;  // gradients
  const bool any_needed = make_gradients(held.embeddings, needed, g.out, found);

  if (any_needed || temperature) {
    std::vector<double> slopes(temperature ? count : 0);
    g.slopes = temperature ? slopes.data() : nullptr;
    torch::stable::parallel_for(0, count, grain(g.batch, run),
                                [&](int64_t begin, int64_t end) { run.backward(g, begin, end); });
    if (temperature) {
      double total = g.alignment.data ? empty_total(s) : 0.0;
      for (double x : slopes) total += x;
      found.push_back(make(held.embeddings[0], {}, ScalarType::Double));
      *static_cast<double*>(found.back().mutable_data_ptr()) = total;
    }
  }
  return found;
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("spectral_forward", TORCH_BOX(&pmrl::spectral_forward));
  m.impl("spectral_backward", TORCH_BOX(&pmrl::spectral_backward));
}
