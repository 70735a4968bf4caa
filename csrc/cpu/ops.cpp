// From tensors to plain pointers, and blocks of instances to threads. Arguments were checked in Python
// (pmrl_kernels/inputs.py); what is checked here guards memory against callers that come another way.
#include "ops.h"

#include <algorithm>

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
                 Held& held) {
  STD_TORCH_CHECK(!embeddings.empty(), "pmrl_kernels: embeddings must be k tensors (B, d) or one (B, k, d)");
  for (const Tensor& x : embeddings) held.embeddings.push_back(with_rows(x));
  const std::vector<Tensor>& xs = held.embeddings;
  const bool stacked = xs[0].dim() == 3;
  const int64_t k = stacked ? xs[0].size(1) : static_cast<int64_t>(xs.size());
  STD_TORCH_CHECK(k >= 1 && k <= kMaxModalities, "pmrl_kernels: k must be in 1..", kMaxModalities, ", got ", k);
  STD_TORCH_CHECK(!stacked || xs.size() == 1, "pmrl_kernels: a (B, k, d) tensor must come alone");

  Batch batch{};
  batch.B = xs[0].size(0);
  batch.d = xs[0].size(xs[0].dim() - 1);
  batch.dtype = dtype_of(xs[0]);
  bool wide = false;
  for (int64_t m = 0; m < k; ++m) {
    const Tensor& x = xs[stacked ? 0 : m];
    STD_TORCH_CHECK(x.dim() == (stacked ? 3 : 2) && x.size(0) == batch.B && x.size(x.dim() - 1) == batch.d,
                    "pmrl_kernels: embeddings must have equal shapes (B, d)");
    const Dtype dtype = dtype_of(x);
    const int64_t element = x.element_size();
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    batch.x[m] = {data + (stacked ? m * x.stride(1) * element : 0), x.stride(0) * element, dtype};
    if (dtype != batch.dtype) batch.dtype = Dtype::kMixed;
    wide = wide || dtype == Dtype::kFloat64;
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch.B &&
                        mask->size(1) == k,
                    "pmrl_kernels: mask must be a bool tensor (B, k)");
    held.mask = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
    batch.mask = static_cast<const uint8_t*>(held.mask->const_data_ptr());
  }
  batch.settings = {static_cast<int>(k),
                    static_cast<int>(batch.d < k ? batch.d : k),
                    read_temperature_of_alignment(temperature, fixed_temperature),
                    normalize,
                    spectrum,
                    wide};
  return batch;
}

// Blocks a thread takes at least: some 10 microseconds of work, beside which waking another one is cheap.
int64_t grain(const Batch& batch, const Kernels& run) {
  const int64_t elements = run.lanes * batch.settings.k * (batch.d + 64);
  return elements >= 32768 ? 1 : 32768 / elements;
}

int64_t blocks(const Batch& batch, const Kernels& run) { return (batch.B + run.lanes - 1) / run.lanes; }

// An incoming gradient, of its output's sizes: 0-d, (B,) or (B, n). Any strides, the outputs' dtype.
Values values_of(const std::optional<Tensor>& grad, std::initializer_list<int64_t> sizes, bool wide) {
  if (!grad) return {nullptr, 0, 0};
  const int64_t dim = static_cast<int64_t>(sizes.size());
  bool fits = grad->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) && grad->dim() == dim;
  for (int64_t i = 0; i < dim; ++i) fits = fits && grad->size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, "pmrl_kernels: an incoming gradient must have its output's shape and dtype");
  return {grad->const_data_ptr(), dim > 0 ? grad->stride(0) : 0, dim > 1 ? grad->stride(1) : 0};
}

// An incoming gradient (B, d).
Rows rows_of(const std::optional<Tensor>& grad, int64_t B, int64_t d, bool wide, std::vector<Tensor>& held) {
  if (!grad) return {nullptr, 0, Dtype::kFloat32};
  held.push_back(with_rows(*grad));
  const Values values = values_of(held.back(), {B, d}, wide);
  return {static_cast<char*>(const_cast<void*>(values.data)), values.stride0 * (wide ? 8 : 4),
          wide ? Dtype::kFloat64 : Dtype::kFloat32};
}

// What is asked for: at most one form of the alignment term, and no flag that is none.
void check_wanted(int64_t wanted) {
  const int64_t alignment = wanted & kAnyAlignment;
  STD_TORCH_CHECK(wanted >= 0 && wanted < 2 * kZ && (alignment & (alignment - 1)) == 0,
                  "pmrl_kernels: wanted must be a sum of flags with one reduction at most, got ", wanted);
}

// What a sum over the alignment terms begins with: a bad temperature shows even where there is no instance.
double nothing(const Settings& s) { return s.spectrum ? s.tau - s.tau : 0.0; }

// How many instances a mean over the alignment terms counts; at least 1, so that nothing gives 0.
double number_alignable(const Batch& batch) {
  const int k = batch.settings.k;
  int64_t count = k >= 2 ? batch.B : 0;
  if (batch.mask) {
    count = 0;
    for (int64_t i = 0; i < batch.B; ++i) {
      int present = 0;
      for (int m = 0; m < k; ++m) present += batch.mask[i * k + m] != 0;
      count += present >= 2;
    }
  }
  return static_cast<double>(std::max<int64_t>(1, count));
}

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, int64_t wanted) {
  check_wanted(wanted);
  Held held;
  Forward f{};
  f.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, held);
  const Settings& s = f.batch.settings;
  const int64_t B = f.batch.B, d = f.batch.d, k = s.k;
  const Kernels& run = kernels();
  const int64_t count = blocks(f.batch, run);
  const ScalarType dtype = s.wide ? ScalarType::Double : ScalarType::Float;

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
  // Room for whole blocks, in a shape that torch.compile need not specialise on.
  Tensor state = make(held.embeddings[0], {B + kMostLanes - 1, state_size(s)}, ScalarType::Double);
  f.batch.state = static_cast<double*>(state.mutable_data_ptr());
  const int64_t used = count * run.lanes;  // the rest is zeros, so that equal inputs have equal states
  std::fill(f.batch.state + used * state_size(s), f.batch.state + (B + kMostLanes - 1) * state_size(s), 0.0);

  torch::stable::parallel_for(0, count, grain(f.batch, run),
                              [&](int64_t begin, int64_t end) { run.forward(f, begin, end); });
  if (reduced) {
    double total = nothing(s);
    for (double x : totals) total += x;  // block by block, whatever thread took it
    if (wanted & kAlignmentMean) total /= number_alignable(f.batch);
    if (s.wide)
      *static_cast<double*>(reduced) = total;
    else
      *static_cast<float*>(reduced) = static_cast<float>(total);
  }
  return {outputs, {state}};
}

std::vector<Tensor> spectral_backward(std::vector<Tensor> embeddings, std::optional<Tensor> mask,
                                      std::optional<Tensor> temperature, double fixed_temperature, bool normalize,
                                      bool spectrum, int64_t wanted, std::vector<Tensor> state,
                                      std::vector<std::optional<Tensor>> grads, std::vector<bool> needed) {
  check_wanted(wanted);
  Held held;
  Backward g{};
  g.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, held);
  const Settings& s = g.batch.settings;
  const int64_t B = g.batch.B, d = g.batch.d, k = s.k;
  const Kernels& run = kernels();
  const int64_t count = blocks(g.batch, run);
  STD_TORCH_CHECK(state.size() == 1 && state[0].numel() == (B + kMostLanes - 1) * state_size(s) &&
                      state[0].scalar_type() == ScalarType::Double && state[0].is_contiguous(),
                  "pmrl_kernels: state is not that of this batch");
  STD_TORCH_CHECK(needed.size() == embeddings.size(), "pmrl_kernels: needed must name each embedding");
  g.batch.state = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));

  std::vector<Tensor> rows;
  size_t next = 0;
  const auto incoming = [&]() -> const std::optional<Tensor>& {
    STD_TORCH_CHECK(next < grads.size(), "pmrl_kernels: grads must name each wanted output");
    return grads[next++];
  };
  g.alignment_factor = wanted & kAlignmentMean ? 1 / number_alignable(g.batch) : 1.0;
  g.values = spectrum ? s.count : 1;
  if (wanted & kAlignment) g.alignment = values_of(incoming(), {B}, s.wide);
  if (wanted & (kAlignmentSum | kAlignmentMean)) g.alignment = values_of(incoming(), {}, s.wide);
  if (wanted & kSigma) g.sigma = values_of(incoming(), {B, g.values}, s.wide);
  if (wanted & kU) g.u = rows_of(incoming(), B, d, s.wide, rows);
  if (wanted & kV) g.v = values_of(incoming(), {B, k}, s.wide);
  for (int64_t m = 0; m < k && wanted & kZ; ++m) g.z[m] = rows_of(incoming(), B, d, s.wide, rows);
  STD_TORCH_CHECK(next == grads.size(), "pmrl_kernels: grads must name each wanted output");

  std::vector<Tensor> found;
  bool any_needed = false;
  for (size_t j = 0; j < embeddings.size(); ++j) {
    const Tensor& x = held.embeddings[j];
    const ScalarType dtype = x.scalar_type();
    const int64_t element = x.element_size();
    const bool stacked = x.dim() == 3;
    if (!needed[j]) {
      found.push_back(make(x, {0}, dtype));
      continue;
    }
    any_needed = true;
    found.push_back(stacked ? make(x, {B, k, d}, dtype) : make(x, {B, d}, dtype));
    char* data = static_cast<char*>(found.back().mutable_data_ptr());
    for (int64_t m = 0; m < (stacked ? k : 1); ++m)
      g.out[stacked ? m : j] = {data + m * d * element, (stacked ? k : 1) * d * element, dtype_of(x)};
  }

  if (any_needed || temperature) {
    std::vector<double> slopes(temperature ? count : 0);
    g.slopes = temperature ? slopes.data() : nullptr;
    torch::stable::parallel_for(0, count, grain(g.batch, run),
                                [&](int64_t begin, int64_t end) { run.backward(g, begin, end); });
    if (temperature) {
      double total = g.alignment.data ? nothing(s) : 0.0;
      for (double x : slopes) total += x;
      found.push_back(make(held.embeddings[0], {}, ScalarType::Double));
      *static_cast<double*>(found.back().mutable_data_ptr()) = total;
    }
  }
  return found;
}

std::string build_info() {
  const char* reason = nullptr;
  const Kernels* found = chosen(&reason);
  std::string compiled;
  for (const Kernels* const* candidate = kCompiled; *candidate; ++candidate)
    compiled += std::string(compiled.empty() ? "" : " ") + (*candidate)->isa + (runs_here(**candidate) ? "" : "(-)");
  std::string info;
  const auto line = [&](const char* name, const std::string& value) { info += std::string(name) + ": " + value + "\n"; };
  line("sources", PMRL_SOURCE_HASH);
  line("compiler", PMRL_COMPILER);
  line("torch", PMRL_TORCH_VERSION);
  line("compiled", compiled);
  line("isa", found ? found->isa : "");
  line("unusable", reason);
  return info;
}

}  // namespace pmrl
