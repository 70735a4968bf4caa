// The spectral operators for CUDA tensors: arguments are checked and become the structs of arguments.h, outputs and
// states are allocated, kernels launched on PyTorch's stream. spectral.cu says what they compute, read and write. Nothing
// here waits for the device.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "arguments.h"
#include "driver.h"

namespace pmrl {
namespace cuda {
namespace {

#ifdef PMRL_DOOR
int device_of(const Tensor&) { return 0; }  // for tests: tensors are the CPU's
#else
int device_of(const Tensor& x) { return x.get_device_index(); }
#endif

// ---- tensors ------------------------------------------------------------------------------------

// What kernels read has to be where they run.
void check_device(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(),
                  "pmrl_kernels: all tensors must be on one device");
}

// An incoming gradient of up to two dimensions.
Values values_of(const std::optional<Tensor>& grad) {
  if (!grad) return {nullptr, 0, 0};
  const int64_t dim = grad->dim();
  return {grad->const_data_ptr(), dim > 0 ? grad->stride(0) : 0, dim > 1 ? grad->stride(1) : 0};
}

// Whether every row begins where a pack of 16 bytes may, and is made of such.
bool is_whole(const Rows& x, int64_t d) {
  return !x.data || (reinterpret_cast<uintptr_t>(x.data) | x.stride | d * element_size(x.dtype)) % 16 == 0;
}

// ---- a call -------------------------------------------------------------------------------------

struct Call {
  Batch batch{};
  int device;
  Stream stream;
  int64_t element;             // bytes of one of theirs
  std::vector<Tensor> held;    // what the batch points into
  std::vector<Tensor> embeddings;

  int k() const { return batch.settings.k; }
  unsigned warps() const { return static_cast<unsigned>(warps_of_block(k())); }

  // Blocks of the forward pass.
  unsigned forward_blocks() const {
    const int64_t instances = int64_t(batch.share) * (batch.rounds ? batch.rounds : warps());
    return static_cast<unsigned>((batch.B + instances - 1) / instances);
  }
  // Blocks of warps that have so many instances each.
  unsigned blocks(int64_t instances) const {
    return static_cast<unsigned>((batch.B + warps() * instances - 1) / (warps() * instances));
  }
  std::string name(const char* kernel) const { return std::string(kernel) + "_" + std::to_string(k()); }
  // Of a kernel for this dtype alone.
  std::string name_of_dtype(const char* kernel) const {
    const char* dtypes[] = {"_float32", "_float64", "_bfloat16", "_float16", "_mixed"};
    return name(kernel) + dtypes[static_cast<int>(batch.dtype)];
  }
  // Whether some batches' forward pass is in rounds: on cards that hold as many blocks as it was measured with, 4 x 57 KB,
  // by code that has it.
  bool may_stream() const {
    const Device& card = properties(device);
    return batch.whole && has_rounds(k(), static_cast<int>(element)) && has_fast_float64(card.code) &&
           card.shared >= resident_streams(k()) * static_cast<int>(shared_of_stream(k()));
  }
  template <class... Arguments>
  void run(const std::string& kernel, unsigned blocks, unsigned threads, const Arguments&... arguments) const {
    run_with(0, kernel, blocks, threads, arguments...);
  }
  template <class... Arguments>
  void run_with(unsigned shared, const std::string& kernel, unsigned blocks, unsigned threads,
                const Arguments&... arguments) const {
    launch(device, cuda::kernel(k(), kernel.c_str(), stream), {blocks, threads, shared}, stream, arguments...);
  }
};

#ifdef PMRL_TUNING
void set_from_environment(const char* name, int& number) {
  if (const char* value = std::getenv(name)) number = std::atoi(value);
}
#else
void set_from_environment(const char*, int&) {}
#endif

// As many lanes for a row as take two packs of it each, so that these are on their way at once.
int lanes_for(int64_t bytes_of_row) { return bytes_of_row >= 2 * 16 * 32 ? 32 : bytes_of_row >= 2 * 16 * 16 ? 16 : 8; }

// All blocks have equal shares, as many as the device holds at once. Where these are not small and rows are made of whole
// packs, in rounds. Else a warp decomposes what it has read itself; and where it has few instances, fewer blocks for each
// multiprocessor take less time, as warps of several would wait for one another.
void choose_layout(Call& call) {
  constexpr int kFew = 4, kManyOfStream = 24;
  Batch& b = call.batch;
  const int k = b.settings.k, most = most_instances(k), multiprocessors = properties(call.device).multiprocessors;
  const auto shared_by = [&](int64_t several) { return (b.B + several - 1) / std::max(several, int64_t(1)); };
  const int64_t of_block = shared_by(int64_t(multiprocessors) * resident_streams(k));
  const int64_t rounds = std::max((of_block + most - 1) / most, int64_t(2));
  b.rounds = call.may_stream() && of_block > kManyOfStream ? static_cast<int>(rounds) : 0;
  if (b.rounds) {
    b.share = static_cast<int>((of_block + b.rounds - 1) / b.rounds);
    b.lanes = kStreamLanes;
  } else {
    int blocks = 1;  // for each multiprocessor
    while (blocks < resident_blocks(k) && b.B > int64_t(multiprocessors) * blocks * warps_of_block(k) * kFew) ++blocks;
    int64_t warps = std::max(int64_t(multiprocessors) * blocks * warps_of_block(k), int64_t(1));
    warps *= std::max(shared_by(warps * most), int64_t(1));
    b.share = static_cast<int>(std::max(shared_by(warps), int64_t(1)));
    b.lanes = b.share == 1 ? kWarp : lanes_for(b.d * call.element);
  }
  set_from_environment("PMRL_LANES", b.lanes);
  const int at_once = kWarp / b.lanes;
  if (!b.rounds) b.share = (b.share + at_once - 1) / at_once * at_once;
  set_from_environment("PMRL_SHARE", b.share);
  set_from_environment("PMRL_ROUNDS", b.rounds);
  b.share = std::min(b.share, most);
  if (!call.may_stream()) b.rounds = 0;
}

// Where rows are read with an instance for each group of lanes at once.
void choose_readers(Batch& b, int64_t element) {
  b.lanes = lanes_for(b.d * element);
  set_from_environment("PMRL_READERS", b.lanes);
}

Call read(const std::vector<Tensor>& embeddings, const std::optional<Tensor>& mask,
          const std::optional<Tensor>& temperature, double fixed_temperature, bool normalize, bool spectrum,
          int64_t wanted) {
  check_wanted(wanted);
  const Embeddings all = check_embeddings(embeddings);
  STD_TORCH_CHECK(all.k >= 2 && all.k <= kMostK, "pmrl_kernels: kernels for CUDA are for k in 2..", kMostK, ", got ",
                  all.k);
  STD_TORCH_CHECK(all.d < kMostColumns, "pmrl_kernels: kernels for CUDA are for d < ", kMostColumns, ", got ", all.d);
  Call call;
  Batch& b = call.batch;
  call.device = device_of(embeddings[0]);
  call.stream = current_stream(call.device);
  b.dtype = all.dtype;
  b.B = all.B;
  b.d = static_cast<int>(all.d);
  b.whole = all.dtype != Dtype::kMixed;
  for (const Tensor& x : embeddings) {
    check_device(x, embeddings[0]);
    call.embeddings.push_back(with_rows(x));
  }
  for (int64_t m = 0; m < all.k; ++m) {
    const Tensor& x = call.embeddings[all.stacked ? 0 : m];
    const Dtype dtype = dtype_of(x);
    const int64_t element = element_size(dtype);
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    b.x[m] = {data + (all.stacked ? m * x.stride(1) * element : 0), x.stride(0) * element, dtype};
    b.whole = b.whole && is_whole(b.x[m], all.d);
  }
  if (mask) {
    check_mask(*mask, all.B, all.k);
    check_device(*mask, embeddings[0]);
    call.held.push_back(made_contiguous(*mask));
    b.mask = static_cast<const uint8_t*>(call.held.back().const_data_ptr());
  }
  if (temperature) {
    check_temperature(*temperature);
    check_device(*temperature, embeddings[0]);
    const ScalarType dtype = temperature->scalar_type();
    const bool readable = dtype == ScalarType::Float || dtype == ScalarType::Double;
    call.held.push_back(readable ? *temperature : torch::stable::to(*temperature, ScalarType::Double));
    if (!readable) note(call.held.back());
    b.temperature = call.held.back().const_data_ptr();
    b.temperature_is_float64 = call.held.back().scalar_type() == ScalarType::Double;
  }
  b.settings = {static_cast<int>(all.k),
                static_cast<int>(std::min(all.d, all.k)),
                fixed_temperature,
                normalize,
                spectrum,
                all.float64_input,
                (wanted & ~int64_t(kZ)) != 0,
                (wanted & kW) != 0};
  b.at = state_of(b.settings, (wanted & kAnyAlignment) != 0, (wanted & ~int64_t(kAnyAlignment)) != 0);
  call.element = element_size(b.dtype == Dtype::kMixed ? Dtype::kFloat32 : b.dtype);
  return call;
}

// ---- operators ----------------------------------------------------------------------------------

// (outputs, state): the state is (numbers, B), and the sums (3,) of the alignment terms
std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_forward(
    std::vector<Tensor> embeddings, std::optional<Tensor> mask, std::optional<Tensor> temperature,
    double fixed_temperature, bool normalize, bool spectrum, int64_t wanted) {
  Call call = read(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted);
  Batch& b = call.batch;
  const Settings& s = b.settings;
  const int64_t B = b.B, d = b.d, k = s.k;
  const Tensor& like = call.embeddings[0];
  const ScalarType dtype = float_dtype(s.float64_input);
  std::vector<Tensor> outputs;
  const auto add = [&](std::initializer_list<int64_t> sizes) {
    outputs.push_back(make(like, sizes, dtype));
    return outputs.back().mutable_data_ptr();
  };
  Tensor state = make(like, {b.at.size, B}, ScalarType::Double), sums = make(like, {3}, ScalarType::Double);
  b.state = static_cast<double*>(state.mutable_data_ptr());

  Forward f{};
  Vectors v{};
  f.sums = static_cast<Sums*>(sums.mutable_data_ptr());
  f.values = spectrum ? s.count : 1;
  f.mean = (wanted & kAlignmentMean) != 0;
  if (wanted & kAlignment) f.alignment = add({B});
  if (wanted & (kAlignmentSum | kAlignmentMean)) f.total = add({});
  if (wanted & kSigma) f.sigma = add({B, f.values});
  if (wanted & kU) v.u = add({B, d});
  if (wanted & kV) f.v = add({B, k});
  for (int64_t m = 0; m < k && wanted & kZ; ++m) v.z[m] = add({B, d});
  for (int64_t m = 0; m < k && wanted & kW; ++m) v.w[m] = add({B, d});

  choose_layout(call);
  const unsigned blocks = call.forward_blocks(), threads = kWarp * call.warps();
  std::optional<Tensor> parts;
  if (f.total && blocks != 1) {
    parts = make(like, {3 * int64_t(blocks)}, ScalarType::Double);
    f.parts = static_cast<Sums*>(parts->mutable_data_ptr());
  }
  f.batch = b;
  // All are loaded by the first call, of whatever size: another may come while a graph is captured.
  if (f.total) load(call.device, kernel(call.k(), "total", call.stream), 0, call.stream);
  if (call.may_stream()) {
    const std::string other = call.name_of_dtype(b.rounds ? "forward" : "stream");
    load(call.device, kernel(call.k(), other.c_str(), call.stream), b.rounds ? 0 : dynamic_of_stream(call.k()),
         call.stream);
  }
  if (b.rounds)
    call.run_with(dynamic_of_stream(call.k()), call.name_of_dtype("stream"), blocks, kWarp * kStreamWarps, f);
  else
    call.run(call.name_of_dtype("forward"), blocks, threads, f);
  if (f.total && blocks != 1) call.run("total", 1, kReducers, f, static_cast<int>(blocks));
  if (v.u || v.z[0] || v.w[0]) {
    choose_readers(b, call.element);
    v.batch = b;
    call.run(call.name_of_dtype("vectors"), call.blocks(kWarp / b.lanes), threads, v);
  }
  return {outputs, {state, sums}};
}

// Gradients of the embeddings, (0,) for those that need none, and of the temperature where that is a tensor.
std::vector<Tensor> spectral_backward(std::vector<Tensor> embeddings, std::optional<Tensor> mask,
                                      std::optional<Tensor> temperature, double fixed_temperature, bool normalize,
                                      bool spectrum, int64_t wanted, std::vector<Tensor> state,
                                      std::vector<std::optional<Tensor>> grads, std::vector<bool> needed) {
  Call call = read(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted);
  Batch& b = call.batch;
  const Settings& s = b.settings;
  const int64_t B = b.B, d = b.d, k = s.k;
  const Tensor& like = call.embeddings[0];
  STD_TORCH_CHECK(state.size() == 2, "pmrl_kernels: state is not that of this batch");
  check_state(state[0], b.at.size * B, ScalarType::Double);
  check_state(state[1], 3, ScalarType::Double);
  check_needed(needed, embeddings);
  for (const Tensor& x : state) check_device(x, like);
  for (const std::optional<Tensor>& x : grads) {
    if (x) check_device(*x, like);
  }
  b.state = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));

  Backward g{};
  IncomingGradients incoming(grads, float_dtype(s.float64_input));
  const Dtype wide = s.float64_input ? Dtype::kFloat64 : Dtype::kFloat32;
  bool rows = false, whole = b.whole;
  const auto rows_of = [&](const std::optional<Tensor>& grad) -> Rows {
    if (!grad) return {nullptr, 0, wide};
    call.held.push_back(with_rows(*grad));
    const Tensor& x = call.held.back();
    const Rows found{static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.stride(0) * element_size(wide), wide};
    rows = true;
    whole = whole && is_whole(found, d);
    return found;
  };
  g.values = spectrum ? s.count : 1;
  if (wanted & kAlignment) g.alignment = values_of(incoming.next({B}));
  if (wanted & (kAlignmentSum | kAlignmentMean)) g.alignment = values_of(incoming.next({}));
  if (wanted & kAlignmentMean) g.sums = static_cast<const Sums*>(state[1].const_data_ptr());
  if (wanted & kSigma) g.sigma = values_of(incoming.next({B, g.values}));
  if (wanted & kU) g.u = rows_of(incoming.next({B, d}));
  if (wanted & kV) g.v = values_of(incoming.next({B, k}));
  bool others = false;
  for (int64_t m = 0; m < k && wanted & kZ; ++m) g.z[m] = rows_of(incoming.next({B, d}));
  for (int64_t m = 0; m < k && wanted & kW; ++m) {
    g.w[m] = rows_of(incoming.next({B, d}));
    others = others || g.w[m].data;
  }
  incoming.finish();

  std::vector<Tensor> found;  // gradients
  const bool any_needed = make_gradients(call.embeddings, needed, g.out, found);
  choose_readers(b, call.element);
  const unsigned threads = kWarp * call.warps(), readers = call.blocks(kWarp / b.lanes);
  const bool all = g.sigma.data || g.v.data || rows;
  // Of a sum, dL/d tau is what comes in times that of the forward pass; else each instance's is added up here.
  const bool sum = wanted & (kAlignmentSum | kAlignmentMean), summed = sum && !all;
  std::optional<Tensor> slopes, scratch, pairs;
  if (temperature && !summed) {
    slopes = make(like, {B}, ScalarType::Double);
    g.slopes = static_cast<double*>(slopes->mutable_data_ptr());
  }

  if ((any_needed || g.slopes) && (all || g.alignment.data)) {
    b.whole = whole;
    g.dotted = rows;
    if (all) {
      scratch = make(like, {triangle_size(s.k) + 5 * k, B}, ScalarType::Double);
      g.scratch = static_cast<double*>(scratch->mutable_data_ptr());
      if (takes_eigenpairs({true, g.u.data || g.v.data, others}, s)) {
        pairs = make(like, {k + k * k, B}, ScalarType::Double);
        g.pairs = static_cast<const double*>(pairs->const_data_ptr());
        call.run(call.name("decompose"), call.blocks(kWarp), threads, b, g.pairs);
      }
      g.batch = b;
      if (rows) call.run(call.name_of_dtype("dots"), readers, threads, g);
      call.run(call.name("coefficients"), call.blocks(kWarp), threads, g);
      if (any_needed) call.run(call.name_of_dtype("apply"), readers, threads, g);
    } else {
      g.batch = b;
      call.run(call.name_of_dtype("backward"), readers, threads, g);
    }
  } else {
    for (Tensor& x : found) torch::stable::zero_(x);
  }
  if (temperature) {
    found.push_back(make(like, {}, ScalarType::Double));
    double* const out = static_cast<double*>(found.back().mutable_data_ptr());
    if (g.alignment.data && B) {
      const Slope slope{B, g.slopes, static_cast<const Sums*>(state[1].const_data_ptr()), g.alignment,
                        (wanted & kAlignmentMean) != 0, s.float64_input, out};
      call.run("slope", 1, kReducers, slope);
    } else if (g.alignment.data && sum) {  // of no instances: as the sum itself, 0, or NaN for a bad temperature
      const Tensor sums = make(like, {3}, ScalarType::Double);
      Forward f{};
      f.batch = b;
      f.batch.settings.float64_input = true;
      f.total = out;
      f.sums = static_cast<Sums*>(sums.mutable_data_ptr());
      call.run("total", 1, kReducers, f, 0);
    } else {
      torch::stable::zero_(found.back());
    }
  }
  return found;
}

}  // namespace
}  // namespace cuda
}  // namespace pmrl

#ifndef PMRL_DOOR
STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CUDA, m) {
  m.impl("spectral_forward", TORCH_BOX(&pmrl::cuda::spectral_forward));
  m.impl("spectral_backward", TORCH_BOX(&pmrl::cuda::spectral_backward));
}
#endif
