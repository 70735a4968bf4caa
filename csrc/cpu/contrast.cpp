// The contrasts for CPU tensors: leading vectors with one another (instance), and embeddings with leading vectors
// (modality). contrast.h has the formulas; here arguments become its sides, and its losses and gradients outputs.
//
//   instance_forward   reads u, everyone's u; writes the mean loss, losses (n,), similarities
//   instance_backward  reads these and everyone's losses (N,); writes dL/du (n, d), dL/d tau
//   modality_forward   reads k z, u, mask, everyone's; writes the mean loss, losses (2, k, n), the similarities of
//                      positives, bounds of all similarities, and similarities
//   modality_backward  reads these and everyone's losses (2, k, N); writes dL/dz, dL/du (n, d), dL/d tau
#include "contrast.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace pmrl {
namespace {

// ---- arguments ----------------------------------------------------------------------------------

// One of float32's normal numbers, whatever the embeddings are: what inputs.py asks of a Python number.
double read_temperature_of_contrast(const std::optional<Tensor>& tensor, double fixed) {
  using limits = std::numeric_limits<float>;
  return read_temperature(tensor, fixed, limits::min(), limits::max());
}

// What a mean divides by: how many count, and at least 1, so that a mean over none is 0. NaN stays: callers make
// `number` NaN where a vector that counts is not finite, as that need not show in any similarity.
double divisor(double number) { return number < 1 ? 1 : number; }

// The incoming gradient over (number tau), as a product: `now` is part of G, `afterwards` multiplies the gradients. A
// loss scaler's gradient, or one over a small tau, may be out of float32's range where its product with the rest is
// not.
struct Scale {
  double now, afterwards;
  Scale(const Tensor& grad, double number, double temperature) {
    check_scalar_gradient(grad);
    const Tensor x = grad.scalar_type() == ScalarType::Double ? grad : torch::stable::to(grad, ScalarType::Double);
    const double scale = *static_cast<const double*>(x.const_data_ptr()) / number / temperature;
    const bool fits = std::abs(scale) > 1e-15 && std::abs(scale) < 1e15;
    now = fits ? scale : 1.0;
    afterwards = fits ? 1.0 : scale;
  }
  // n numbers of the gradients, from where they were computed to where they belong.
  template <class Element>
  void apply(const Element* from, int64_t n, Element* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = afterwards == 1.0 ? from[i] : static_cast<Element>(from[i] * afterwards);
  }
};

// Gradients of a side's vectors into their rows of `out`, whose first row is vector `first`; other rows stay. `add`: to
// what is there.
template <class Element>
void scatter(const Side<Element>& side, const Element* from, int64_t first, int64_t d, const Scale& scale, bool add,
             Element* out) {
  torch::stable::parallel_for(0, side.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Element* x = from + i * d;
      Element* y = out + (side.at.empty() ? i : side.at[i] - first) * d;
      if (!add) {
        scale.apply(x, d, y);
        continue;
      }
      for (int64_t c = 0; c < d; ++c)
        y[c] += scale.afterwards == 1.0 ? x[c] : static_cast<Element>(x[c] * scale.afterwards);
    }
  });
}

template <class Element>
Tensor scalar(const Tensor& like, double x) {
  Tensor out = make(like, {}, scalar_type<Element>());
  *static_cast<Element*>(out.mutable_data_ptr()) = static_cast<Element>(x);
  return out;
}

template <class Element>
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor out = make(like, sizes, scalar_type<Element>());
  Element* data = static_cast<Element*>(out.mutable_data_ptr());
  std::fill(data, data + out.numel(), Element(0));
  return out;
}

template <class Element>
std::vector<char> nonzero_rows(const Tensor& x) {
  std::vector<char> found(x.size(0), 0);
  const Element* data = static_cast<const Element*>(x.const_data_ptr());
  for (int64_t i = 0; i < x.size(0); ++i) {
    const Element* row = data + i * x.stride(0);
    for (int64_t c = 0; c < x.size(1) && !found[i]; ++c) found[i] = row[c] != 0;
  }
  return found;
}

// The losses of a side's vectors, vector `first` and the following ones, from those of all.
template <class Element>
void read_losses(Side<Element>& side, int64_t first, const Flags& flags, const double* from) {
  side.losses.resize(side.n);
  for (int64_t i = 0; i < side.n; ++i) {
    const int64_t at = side.origin(i, first);
    side.losses[i] = flags.counted[at] ? from[at] : std::numeric_limits<double>::infinity();
  }
}

double total_of(const std::vector<double>& losses) {
  double total = 0;
  for (double x : losses) total += x;
  return total;
}

// ---- leading vectors with one another -----------------------------------------------------------

template <class Element>
struct Instances {
  Tensor u, everyone;  // everyone's u; without other processes u itself
  int64_t n, N, d, start;
  double temperature;
  Flags flags;
  double number = 0;
  Side<Element> a, b;
  Mode mode;

  Instances(const Tensor& rows, const std::optional<Tensor>& all, int64_t first, double tau)
      : u(with_rows(rows)), everyone(all ? with_rows(*all) : u), n(u.size(0)), N(everyone.size(0)), d(u.size(1)),
        start(first), temperature(tau), flags(N), mode(all ? Mode::kRows : Mode::kTriangle) {
    check_vectors(everyone, u, N);
    check_place(start, n, N);
    flags.counted = flags.seen = nonzero_rows<Element>(everyone);
    flags.settle();
    for (char x : flags.counted) number += x;
    b = make_side<Element>(everyone, flags, 0, N, start, start + n);
    b.positive.assign(b.n, Element(1));
    a = mode == Mode::kTriangle ? b : make_side<Element>(everyone, flags, start, start + n, start, start + n);
    a.positive.resize(a.n, Element(1));
    // A vector that is not finite shows by its similarities, which are NaN. Where rows have none with another vector,
    // `number` becomes NaN.
    for (int64_t j = 0; j < b.n && (a.n == 0 || b.n == 1); ++j)
      for (int64_t c = 0; c < d; ++c) number += b.data[j * b.stride + c] * Element(0);
    number = divisor(number);
  }

  Contrast<Element> contrast() const {
    // Of unit vectors no s is larger than 1, the similarity with the positive, and what underflows beside 1 does not
    // matter.
    return {u, mode, d, flags.all ? start : 0, a.n, temperature, 1.0, 1 / (temperature * kLog2)};
  }
  int64_t saved() const { return n * N <= kSavedSize ? saved_size(mode, n, N) : 0; }
};

template <class Element>
std::tuple<Tensor, Tensor, Tensor> forward_of_instances(const Instances<Element>& in) {
  Tensor state = make(in.u, {in.saved()}, scalar_type<Element>());
  Tensor losses = zeros<double>(in.u, {in.n});
  std::vector<double> found, none;
  Element* saved = static_cast<Element*>(state.mutable_data_ptr());
  in.contrast().forward(in.a, in.b, found, none, in.saved() ? saved : nullptr, in.saved());
  for (int64_t i = 0; i < in.a.n; ++i)
    static_cast<double*>(losses.mutable_data_ptr())[in.a.origin(i, in.start) - in.start] = found[i];
  const double mean = total_of(found) / in.number * (in.temperature / in.temperature);
  return {scalar<Element>(in.u, mean), losses, state};
}

template <class Element>
std::tuple<Tensor, Tensor> backward_of_instances(Instances<Element>& in, bool slope, const Tensor& losses,
                                                 const Tensor& state, const Tensor& grad) {
  check_losses(losses, {in.N});
  check_state(state, in.saved(), scalar_type<Element>());
  const Tensor contiguous = torch::stable::contiguous(losses);
  const double* values = static_cast<const double*>(contiguous.const_data_ptr());
  read_losses(in.a, in.start, in.flags, values);
  read_losses(in.b, 0, in.flags, values);
  const Scale scale(grad, in.number, in.temperature);
  const Element* saved = in.saved() ? static_cast<const Element*>(state.const_data_ptr()) : nullptr;
  const bool direct = in.flags.all && scale.afterwards == 1.0;
  Tensor out = direct ? make(in.u, {in.n, in.d}, scalar_type<Element>()) : zeros<Element>(in.u, {in.n, in.d});
  Element* h = static_cast<Element*>(out.mutable_data_ptr());
  double total = 0;
  if (direct) {
    total = in.contrast().backward(in.a, in.b, scale.now, slope, saved, h, false, nullptr, false);
  } else {
    const Tensor scratch = make(in.u, {in.a.n, in.d}, scalar_type<Element>());
    Element* found = static_cast<Element*>(scratch.mutable_data_ptr());
    total = in.contrast().backward(in.a, in.b, scale.now, slope, saved, found, false, nullptr, false);
    scatter(in.a, found, in.start, in.d, scale, false, h);
  }
  return {out, scalar<double>(in.u, -total * scale.now * scale.afterwards)};
}

// ---- embeddings with leading vectors ------------------------------------------------------------

template <class Element>
struct Modalities {
  std::vector<Tensor> z;  // everyone's, and so is u
  Tensor u;
  bool alone;  // there are no other processes
  int64_t n, N, d, k, start;
  double temperature;
  std::vector<Flags> of_z, of_u;
  const Element* positives = nullptr;  // (k, N)
  const Element* bounds = nullptr;     // (k,): no similarity is larger; Inf if that is not known

  Modalities(const std::vector<Tensor>& rows_z, const Tensor& rows_u, const std::optional<Tensor>& rows_mask,
             const std::vector<Tensor>& everyone, const std::optional<Tensor>& everyone_mask, int64_t first, bool raw,
             double tau)
      : u(with_rows(everyone.empty() ? rows_u : everyone[0])), alone(everyone.empty()), n(rows_u.size(0)), N(u.size(0)),
        d(u.size(1)), k(static_cast<int64_t>(rows_z.size())), start(first), temperature(tau) {
    check_everyone(everyone, rows_z.size());
    check_vectors(u, rows_u, N);
    check_place(start, n, N);
    for (int64_t m = 0; m < k; ++m) {
      z.push_back(with_rows(alone ? rows_z[m] : everyone[m + 1]));
      check_vectors(z[m], rows_u, N);
    }
    const std::optional<Tensor>& given = alone ? rows_mask : everyone_mask;
    std::optional<Tensor> mask;
    if (given) {
      check_mask(*given, N, k);
      mask = torch::stable::contiguous(*given);
    }
    const uint8_t* present = mask ? mask_data(*mask) : nullptr;
    std::vector<char> valid(N, 1);
    if (!raw) valid = nonzero_rows<Element>(u);
    for (int64_t i = 0; i < N && raw && present; ++i) {
      valid[i] = 0;
      for (int64_t m = 0; m < k && !valid[i]; ++m) valid[i] = is_present(present, i * k + m);
    }
    for (int64_t m = 0; m < k; ++m) {
      Flags of_z_m(N), of_u_m(N);
      for (int64_t i = 0; i < N; ++i) {
        of_z_m.counted[i] = of_z_m.seen[i] = of_u_m.counted[i] = valid[i] && is_present(present, i * k + m);
        of_u_m.seen[i] = valid[i];
      }
      of_z_m.settle();
      of_u_m.settle();
      of_z.push_back(of_z_m);
      of_u.push_back(of_u_m);
    }
  }

  static Rows rows_of(const Tensor& x) {
    const int64_t stride = x.size(0) > 1 ? x.stride(0) : x.size(1), element = sizeof(Element);
    return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), stride * element,
            element == 8 ? Dtype::kFloat64 : Dtype::kFloat32};
  }

  // The similarities of positives, and bounds of all similarities, into the state: k N + k numbers.
  void measure(Element* into) {
    std::vector<double> dots(N);
    const auto row_dots = [&](const Tensor& x, const Tensor& y) {
      torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
        kernels().row_dots(rows_of(x), rows_of(y), d, begin, end, dots.data());
      });
    };
    // The largest norm of those that take part: what is in the places of others may be anything.
    const auto norm_bound = [&](const Tensor& x, const Flags& flags) {
      row_dots(x, x);
      double largest = 0;
      for (int64_t i = 0; i < N; ++i) {
        const double y = flags.counted[i] || flags.seen[i] ? dots[i] : 0;
        largest = y <= largest || !(largest < HUGE_VAL) ? largest : y == y ? y : HUGE_VAL;
      }
      return std::sqrt(largest);
    };
    const double of_u_norm = k > 0 ? norm_bound(u, of_u[0]) : 0;  // all modalities see the same u
    for (int64_t m = 0; m < k; ++m) {
      into[k * N + m] = static_cast<Element>(norm_bound(z[m], of_z[m]) * of_u_norm);
      row_dots(z[m], u);
      for (int64_t i = 0; i < N; ++i) {
        const Element x = static_cast<Element>(dots[i]);
        into[m * N + i] = std::isfinite(x) ? x : std::numeric_limits<Element>::quiet_NaN();
      }
    }
  }
  void remember(const Element* from) {
    positives = from;
    bounds = from + k * N;
  }
  int64_t measured() const { return k * N + k; }

  // Of modality m: embeddings as rows and leading vectors as columns, or the other way round.
  struct Pair {
    Side<Element> a, b;
    int64_t paired;
  };
  Pair sides(int64_t m, bool transposed) const {
    const Tensor &rows = transposed ? u : z[m], &columns = transposed ? z[m] : u;
    const Flags &of_rows = transposed ? of_u[m] : of_z[m], &of_columns = transposed ? of_z[m] : of_u[m];
    Pair pair{make_side<Element>(rows, of_rows, start, start + n, start, start + n),
              make_side<Element>(columns, of_columns, 0, N, start, start + n), 0};
    for (int64_t i = start; i < start + n; ++i) pair.paired += of_rows.counted[i];
    for (int64_t i = 0; i < pair.a.n; ++i) pair.a.positive.push_back(positives[m * N + pair.a.origin(i, start)]);
    for (int64_t j = 0; j < pair.b.n; ++j) pair.b.positive.push_back(positives[m * N + pair.b.origin(j, 0)]);
    return pair;
  }
  Contrast<Element> contrast(int64_t m, const Pair& pair) const {
    const Mode mode = alone ? Mode::kBoth : Mode::kRows;
    return {u, mode, d, of_z[m].all ? start : 0, pair.paired, temperature, bounds[m], 0.0};
  }
  // How many products a modality takes: alone, one gives the losses of both sides.
  int64_t directions() const { return alone ? 1 : 2; }
  // Similarities kept, for each modality and direction.
  int64_t saved() const { return directions() * k * n * N <= kSavedSize ? saved_size(Mode::kBoth, n, N) : 0; }
  // What the mean divides by: twice the number of pairs of an embedding and a leading vector.
  double pairs() const {
    double number = 0;
    for (int64_t m = 0; m < k; ++m)
      for (int64_t i = 0; i < N; ++i)
        if (of_z[m].counted[i]) number += 1 + 0 * positives[m * N + i];
    return 2 * divisor(number);
  }
};

template <class Element>
std::tuple<Tensor, Tensor, Tensor> forward_of_modalities(Modalities<Element> in) {
  Tensor state = make(in.u, {in.measured() + in.saved() * in.directions() * in.k}, scalar_type<Element>());
  Element* memory = static_cast<Element*>(state.mutable_data_ptr());
  in.measure(memory);
  in.remember(memory);
  Tensor losses = zeros<double>(in.u, {2, in.k, in.n});
  double* out = static_cast<double*>(losses.mutable_data_ptr());
  Element* saved = in.saved() ? memory + in.measured() : nullptr;
  double total = 0;
  for (int64_t m = 0; m < in.k; ++m)
    for (int64_t direction = 0; direction < in.directions(); ++direction) {
      const auto pair = in.sides(m, direction == 1);
      std::vector<double> of_rows, of_columns;
      in.contrast(m, pair).forward(pair.a, pair.b, of_rows, of_columns, saved, in.saved());
      if (saved) saved += in.saved();
      const auto put = [&](int64_t where, const Side<Element>& side, const std::vector<double>& found) {
        for (int64_t i = 0; i < pair.paired; ++i) {
          out[(where * in.k + m) * in.n + side.origin(i, in.start) - in.start] = found[i];
          total += found[i];
        }
      };
      put(direction, pair.a, of_rows);
      if (in.alone) put(1, pair.b, of_columns);
    }
  return {scalar<Element>(in.u, total / in.pairs() * (in.temperature / in.temperature)), losses, state};
}

template <class Element>
std::tuple<std::vector<Tensor>, Tensor, Tensor> backward_of_modalities(Modalities<Element> in, bool slope,
                                                                       const Tensor& losses, const Tensor& state,
                                                                       const Tensor& grad) {
  check_losses(losses, {2, in.k, in.N});
  check_state(state, in.measured() + in.saved() * in.directions() * in.k, scalar_type<Element>());
  const Tensor contiguous = torch::stable::contiguous(losses);
  const double* values = static_cast<const double*>(contiguous.const_data_ptr());
  const Element* memory = static_cast<const Element*>(state.const_data_ptr());
  in.remember(memory);
  const Element* saved = in.saved() ? memory + in.measured() : nullptr;
  const Scale scale(grad, in.pairs(), in.temperature);
  Tensor grad_u = zeros<Element>(in.u, {in.n, in.d});
  Element* of_u = static_cast<Element*>(grad_u.mutable_data_ptr());
  // For gradients of vectors that were copied, or that are still to be multiplied by the rest of the scale.
  std::optional<Tensor> rows, columns;
  const auto scratch = [&](std::optional<Tensor>& held) {
    if (!held) held = make(in.u, {in.n, in.d}, scalar_type<Element>());
    return static_cast<Element*>(held->mutable_data_ptr());
  };
  std::vector<Tensor> grad_z;
  double total = 0;
  for (int64_t m = 0; m < in.k; ++m) {
    const bool direct = in.of_z[m].all && scale.afterwards == 1.0;
    grad_z.push_back(direct ? make(in.u, {in.n, in.d}, scalar_type<Element>()) : zeros<Element>(in.u, {in.n, in.d}));
    Element* of_z = static_cast<Element*>(grad_z.back().mutable_data_ptr());
    for (int64_t direction = 0; direction < in.directions(); ++direction) {
      auto pair = in.sides(m, direction == 1);
      const double *own = values + (direction * in.k + m) * in.N, *other = values + ((1 - direction) * in.k + m) * in.N;
      read_losses(pair.a, in.start, direction ? in.of_u[m] : in.of_z[m], own);
      read_losses(pair.b, 0, direction ? in.of_z[m] : in.of_u[m], other);
      Element* of_rows = direction ? of_u : of_z;
      Element* from_rows = direct ? of_rows : scratch(rows);
      Element* from_columns = !in.alone ? nullptr : direct ? of_u : scratch(columns);
      const bool add = direct && direction == 1;
      total += in.contrast(m, pair).backward(pair.a, pair.b, scale.now, slope, saved, from_rows, add, from_columns,
                                             direct);
      if (saved) saved += in.saved();
      if (direct) continue;
      scatter(pair.a, from_rows, in.start, in.d, scale, direction == 1, of_rows);
      if (in.alone) scatter(pair.b, from_columns, 0, in.d, scale, true, of_u);
    }
  }
  return {grad_z, grad_u, scalar<double>(in.u, -total * scale.now * scale.afterwards)};
}

// ---- operators ----------------------------------------------------------------------------------

// (loss, losses, state)
std::tuple<Tensor, Tensor, Tensor> instance_forward(Tensor u, std::optional<Tensor> everyone, int64_t start,
                                                    std::optional<Tensor> temperature, double fixed_temperature) {
  check_leading(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  if (u.scalar_type() == ScalarType::Double) return forward_of_instances(Instances<double>(u, everyone, start, tau));
  return forward_of_instances(Instances<float>(u, everyone, start, tau));
}

// (gradient of u, of the temperature)
std::tuple<Tensor, Tensor> instance_backward(Tensor u, std::optional<Tensor> everyone, int64_t start,
                                             std::optional<Tensor> temperature, double fixed_temperature,
                                             Tensor losses, Tensor state, Tensor grad) {
  check_leading(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  const bool slope = temperature.has_value();
  if (u.scalar_type() == ScalarType::Double) {
    Instances<double> in(u, everyone, start, tau);
    return backward_of_instances(in, slope, losses, state, grad);
  }
  Instances<float> in(u, everyone, start, tau);
  return backward_of_instances(in, slope, losses, state, grad);
}

// (loss, losses, state)
std::tuple<Tensor, Tensor, Tensor> modality_forward(std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask,
                                                    std::vector<Tensor> everyone, std::optional<Tensor> everyone_mask,
                                                    int64_t start, bool raw, std::optional<Tensor> temperature,
                                                    double fixed_temperature) {
  check_leading(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  if (u.scalar_type() == ScalarType::Double)
    return forward_of_modalities(Modalities<double>(z, u, mask, everyone, everyone_mask, start, raw, tau));
  return forward_of_modalities(Modalities<float>(z, u, mask, everyone, everyone_mask, start, raw, tau));
}

// (gradients of z, of u, of the temperature)
std::tuple<std::vector<Tensor>, Tensor, Tensor> modality_backward(
    std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask, std::vector<Tensor> everyone,
    std::optional<Tensor> everyone_mask, int64_t start, bool raw, std::optional<Tensor> temperature,
    double fixed_temperature, Tensor losses, Tensor state, Tensor grad) {
  check_leading(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  const bool slope = temperature.has_value();
  if (u.scalar_type() == ScalarType::Double)
    return backward_of_modalities(Modalities<double>(z, u, mask, everyone, everyone_mask, start, raw, tau), slope,
                                  losses, state, grad);
  return backward_of_modalities(Modalities<float>(z, u, mask, everyone, everyone_mask, start, raw, tau), slope, losses,
                                state, grad);
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("instance_forward", TORCH_BOX(&pmrl::instance_forward));
  m.impl("instance_backward", TORCH_BOX(&pmrl::instance_backward));
  m.impl("modality_forward", TORCH_BOX(&pmrl::modality_forward));
  m.impl("modality_backward", TORCH_BOX(&pmrl::modality_backward));
}
