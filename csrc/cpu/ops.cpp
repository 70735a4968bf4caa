// From tensors to plain pointers, and blocks of instances to threads. Arguments were checked in Python
// (pmrl_kernels/inputs.py); what is checked here guards memory against callers that come another way.
#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "kernels.h"

namespace pmrl {
namespace {

using torch::headeronly::ScalarType;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "pmrl_kernels: embeddings must be float32, float64, bfloat16 or float16");
  }
}

// Through the dispatcher, so that torch.use_deterministic_algorithms can fill what is not yet written.
Tensor make(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

// A number in a 0-d tensor, NaN if it is not finite and positive. Nothing waits for it: this is a CPU.
double read_temperature(const std::optional<Tensor>& tensor, double fixed) {
  if (!tensor) return fixed;
  double tau = std::numeric_limits<double>::quiet_NaN();
  const void* data = tensor->const_data_ptr();
  switch (tensor->scalar_type()) {
    case ScalarType::Double: tau = *static_cast<const double*>(data); break;
    case ScalarType::Float: tau = *static_cast<const float*>(data); break;
    default:
      tau = *static_cast<const double*>(torch::stable::to(*tensor, ScalarType::Double).const_data_ptr());
  }
  return std::isfinite(tau) && tau > 0 ? tau : std::numeric_limits<double>::quiet_NaN();
}

// Rows need their last dimension contiguous; anything else is copied, that one tensor alone.
Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// Tensors that a Batch points into.
struct Held {
  std::vector<Tensor> embeddings;
  std::optional<Tensor> mask;
};

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
    batch.mask = static_cast<const bool*>(held.mask->const_data_ptr());
  }
  batch.settings = {static_cast<int>(k),
                    static_cast<int>(batch.d < k ? batch.d : k),
                    read_temperature(temperature, fixed_temperature),
                    normalize,
                    spectrum,
                    wide};
  return batch;
}

int64_t blocks(const Batch& batch) { return (batch.B + kLanes - 1) / kLanes; }

// Blocks a thread takes at least: some 10 microseconds of work, beside which waking another one is cheap.
int64_t grain(const Batch& batch) {
  const int64_t elements = kLanes * batch.settings.k * (batch.d + 64);
  return elements >= 32768 ? 1 : 32768 / elements;
}

const Kernels& kernels() {
  const char* reason = nullptr;
  const Kernels* found = chosen(&reason);
  STD_TORCH_CHECK(found, reason);
  return *found;
}

// An incoming gradient (B,), (B, n): any strides, the outputs' dtype.
Values values_of(const std::optional<Tensor>& grad, bool wide) {
  if (!grad) return {nullptr, 0, 0};
  STD_TORCH_CHECK(grad->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "pmrl_kernels: an incoming gradient must have its output's dtype");
  return {grad->const_data_ptr(), grad->stride(0), grad->dim() > 1 ? grad->stride(1) : 0};
}

// An incoming gradient (B, d).
Rows rows_of(const std::optional<Tensor>& grad, bool wide, std::vector<Tensor>& held) {
  if (!grad) return {nullptr, 0, Dtype::kFloat32};
  held.push_back(with_rows(*grad));
  const Values values = values_of(held.back(), wide);
  return {static_cast<char*>(const_cast<void*>(values.data)), values.stride0 * (wide ? 8 : 4),
          wide ? Dtype::kFloat64 : Dtype::kFloat32};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, bool align, bool want_u, bool want_z) {
  Held held;
  Forward f{};
  f.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, held);
  const Settings& s = f.batch.settings;
  const int64_t B = f.batch.B, d = f.batch.d, k = s.k;
  const ScalarType out = s.wide ? ScalarType::Double : ScalarType::Float;
  f.values = spectrum ? s.count : 1;

  Tensor alignment = make({align ? B : 0}, out), sigma = make({B, f.values}, out), v = make({B, k}, out);
  Tensor u = make({want_u ? B : 0, d}, out);
  // Room for ceil(B / kLanes) whole blocks, in a shape that torch.compile need not specialise on.
  Tensor state = make({B + kLanes - 1, state_size(s)}, ScalarType::Double);
  std::vector<Tensor> z;
  for (int64_t m = 0; m < k && want_z; ++m) {
    z.push_back(make({B, d}, out));
    f.z[m] = z.back().mutable_data_ptr();
  }
  f.alignment = align ? alignment.mutable_data_ptr() : nullptr;
  f.sigma = sigma.mutable_data_ptr();
  f.v = v.mutable_data_ptr();
  f.u = want_u ? u.mutable_data_ptr() : nullptr;
  f.batch.state = static_cast<double*>(state.mutable_data_ptr());

  const Kernels& run = kernels();
  torch::stable::parallel_for(0, blocks(f.batch), grain(f.batch),
                              [&](int64_t begin, int64_t end) { run.forward(f, begin, end); });
  return {alignment, sigma, u, v, z, {state}};
}

std::tuple<std::vector<Tensor>, Tensor> spectral_backward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, bool align, std::vector<Tensor> state,
    std::optional<Tensor> grad_alignment, std::optional<Tensor> grad_sigma, std::optional<Tensor> grad_u,
    std::optional<Tensor> grad_v, std::vector<std::optional<Tensor>> grad_z, std::vector<bool> needed) {
  Held held;
  Backward g{};
  g.batch = make_batch(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, held);
  const Settings& s = g.batch.settings;
  const int64_t B = g.batch.B, d = g.batch.d, k = s.k, count = blocks(g.batch);
  STD_TORCH_CHECK(state.size() == 1 && state[0].numel() == (B + kLanes - 1) * state_size(s),
                  "pmrl_kernels: state is not that of this batch");
  STD_TORCH_CHECK(needed.size() == embeddings.size(), "pmrl_kernels: needed must name each embedding");
  g.batch.state = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));

  std::vector<Tensor> rows;
  if (align) g.alignment = values_of(grad_alignment, s.wide);
  g.sigma = values_of(grad_sigma, s.wide);
  g.v = values_of(grad_v, s.wide);
  g.values = spectrum ? s.count : 1;
  g.u = rows_of(grad_u, s.wide, rows);
  for (size_t m = 0; m < grad_z.size() && m < static_cast<size_t>(k); ++m) g.z[m] = rows_of(grad_z[m], s.wide, rows);

  std::vector<Tensor> grads;
  bool wanted = false;
  for (size_t j = 0; j < embeddings.size(); ++j) {
    const Tensor& x = held.embeddings[j];
    const ScalarType dtype = x.scalar_type();
    const int64_t element = x.element_size();
    if (!needed[j]) {
      grads.push_back(make({0}, dtype));
      continue;
    }
    wanted = true;
    grads.push_back(x.dim() == 3 ? make({B, k, d}, dtype) : make({B, d}, dtype));
    char* data = static_cast<char*>(grads.back().mutable_data_ptr());
    if (x.dim() == 3)
      for (int64_t m = 0; m < k; ++m) g.out[m] = {data + m * d * element, k * d * element, dtype_of(x)};
    else
      g.out[j] = {data, d * element, dtype_of(x)};
  }

  Tensor slope = make({}, ScalarType::Double);
  double total = 0;
  if (wanted || temperature) {
    std::vector<double> slopes(count);
    g.slopes = slopes.data();
    const Kernels& run = kernels();
    torch::stable::parallel_for(0, count, grain(g.batch),
                                [&](int64_t begin, int64_t end) { run.backward(g, begin, end); });
    for (double x : slopes) total += x;  // block by block, whatever thread took it
  }
  *static_cast<double*>(slope.mutable_data_ptr()) = total;
  return {grads, slope};
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
