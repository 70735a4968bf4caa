// The contrasts for CPU tensors: pairs of matrices whose rows are each other's positives. contrast.h has the formulas;
// here arguments become its sides, and its losses and gradients outputs.
//
//   paired_forward   reads the vectors, mask, everyone's; writes the mean loss, losses (directions, pairs, n), and the
//                    state: similarities of positives and bounds of all similarities, unless vectors are paired with
//                    themselves and of unit norm, and the first similarities
//   paired_backward  reads these and everyone's losses (directions, pairs, N); writes the vectors' gradients (n, d) and
//                    dL/d tau
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

// ---- pairs --------------------------------------------------------------------------------------

// Arguments of the operators.
struct Arguments {
  std::vector<Tensor> vectors;
  std::vector<int64_t> pairs;
  std::vector<bool> directions;
  std::optional<Tensor> mask;
  std::vector<Tensor> everyone;
  std::optional<Tensor> everyone_mask;
  int64_t start;
  double temperature;
};

// Two of the vectors, and which of their rows take part.
struct Pair {
  int64_t a, b;
  Flags of_a, of_b;
};

template <class Element>
struct Paired {
  std::vector<Tensor> vectors;  // everyone's
  bool alone;                   // there are no other processes
  bool symmetric;               // pairs are of vectors with themselves
  bool unit;                    // and each is 1 with itself, by definition
  int64_t n, N, d, start;
  double temperature;
  std::vector<std::vector<char>> there;  // of each vector, which rows there are
  std::vector<Pair> pairs;
  const Element* positives = nullptr;  // (pairs, N)
  const Element* bounds = nullptr;     // (pairs,): no similarity is larger; Inf if that is not known

  explicit Paired(const Arguments& x)
      : alone(x.everyone.empty()), symmetric(check_pairs(x.pairs, x.directions, x.vectors)), unit(symmetric),
        n(x.vectors[0].size(0)), d(x.vectors[0].size(1)), start(x.start), temperature(x.temperature) {
    check_everyone(x.everyone, x.vectors.size());
    N = alone ? n : x.everyone[0].size(0);
    check_place(start, n, N);
    for (size_t v = 0; v < x.vectors.size(); ++v) {
      check_vectors(x.vectors[v], x.vectors[0], n);
      vectors.push_back(with_rows(alone ? x.vectors[v] : x.everyone[v]));
      check_vectors(vectors[v], x.vectors[0], N);
      there.push_back(x.directions[v] ? nonzero_rows<Element>(vectors[v]) : std::vector<char>(N, 1));
      unit = unit && x.directions[v];
    }
    read_mask(alone ? x.mask : x.everyone_mask);
    for (size_t p = 0; p < x.pairs.size(); p += 2) {
      Pair pair{x.pairs[p], x.pairs[p + 1], Flags(N), Flags(N)};
      const bool a_follows = x.directions[pair.b] && !x.directions[pair.a];
      const bool b_follows = x.directions[pair.a] && !x.directions[pair.b];
      for (int64_t i = 0; i < N; ++i) {
        const char in_a = there[pair.a][i], in_b = there[pair.b][i], both = in_a && in_b;
        pair.of_a.counted[i] = pair.of_b.counted[i] = both;
        pair.of_a.seen[i] = a_follows ? both : in_a;
        pair.of_b.seen[i] = b_follows ? both : in_b;
      }
      pair.of_a.settle();
      pair.of_b.settle();
      pairs.push_back(std::move(pair));
    }
  }

  // The mask is of the last vectors.
  void read_mask(const std::optional<Tensor>& given) {
    if (!given) return;
    const int64_t columns = given->dim() == 2 ? given->size(1) : -1, all = static_cast<int64_t>(vectors.size());
    check_mask(*given, N, std::min(columns, all));
    const Tensor mask = torch::stable::contiguous(*given);
    const uint8_t* present = mask_data(mask);
    for (int64_t v = all - columns; v < all; ++v)
      for (int64_t i = 0; i < N; ++i)
        there[v][i] = there[v][i] && is_present(present, i * columns + v - (all - columns));
  }

  int64_t count() const { return static_cast<int64_t>(pairs.size()); }

  static Rows rows_of(const Tensor& x) {
    const int64_t stride = x.size(0) > 1 ? x.stride(0) : x.size(1), element = sizeof(Element);
    return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), stride * element,
            element == 8 ? Dtype::kFloat64 : Dtype::kFloat32};
  }
  void row_dots(const Tensor& x, const Tensor& y, std::vector<double>& out) const {
    torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
      kernels().row_dots(rows_of(x), rows_of(y), d, begin, end, out.data());
    });
  }

  // The similarities of positives, and bounds of all similarities, into the state.
  void measure(Element* into) const {
    if (unit) {
      std::fill(into, into + kSpare, Element(0));
      return;
    }
    std::vector<double> dots(N), norms;
    for (size_t v = 0; v < vectors.size(); ++v) {  // what is in the places of absent rows may be anything
      row_dots(vectors[v], vectors[v], dots);
      double largest = 0;
      for (int64_t i = 0; i < N; ++i) {
        const double y = there[v][i] ? dots[i] : 0;
        largest = y <= largest || !(largest < HUGE_VAL) ? largest : y == y ? y : HUGE_VAL;
      }
      norms.push_back(std::sqrt(largest));
    }
    for (int64_t p = 0; p < count(); ++p) {
      const Pair& pair = pairs[p];
      into[count() * N + p] = static_cast<Element>(norms[pair.a] * norms[pair.b]);
      row_dots(vectors[pair.a], vectors[pair.b], dots);
      for (int64_t i = 0; i < N; ++i) {
        const Element x = static_cast<Element>(dots[i]);
        into[p * N + i] = std::isfinite(x) ? x : std::numeric_limits<Element>::quiet_NaN();
      }
    }
  }
  void remember(const Element* from) {
    if (unit) return;
    positives = from;
    bounds = from + count() * N;
  }
  int64_t measured() const { return unit ? kSpare : count() * (N + 1); }

  // Of one pair, a as rows and b as columns, or the other way round.
  struct Sides {
    Side<Element> a, b;
    int64_t paired;
  };
  Sides sides(int64_t p, bool transposed) const {
    const Pair& pair = pairs[p];
    const Tensor &rows = vectors[transposed ? pair.b : pair.a], &columns = vectors[transposed ? pair.a : pair.b];
    const Flags &of_rows = transposed ? pair.of_b : pair.of_a, &of_columns = transposed ? pair.of_a : pair.of_b;
    const auto side = [&](const Tensor& x, const Flags& flags, int64_t begin, int64_t end) {
      Side<Element> found = make_side<Element>(x, flags, begin, end, start, start + n);
      for (int64_t i = 0; i < found.n; ++i)
        found.positive.push_back(unit ? Element(1) : positives[p * N + found.origin(i, begin)]);
      return found;
    };
    Sides both;
    both.b = side(columns, of_columns, 0, N);
    both.a = mode() == Mode::kTriangle ? both.b : side(rows, of_rows, start, start + n);
    both.paired = std::count(of_rows.counted.begin() + start, of_rows.counted.begin() + start + n, 1);
    return both;
  }
  Mode mode() const { return !alone ? Mode::kRows : symmetric ? Mode::kTriangle : Mode::kBoth; }
  Contrast<Element> contrast(int64_t p, const Sides& sides) const {
    // Of unit vectors no s is larger than 1, the similarity with the positive, and what underflows beside 1 does not
    // matter.
    const double bound = unit ? 1.0 : bounds[p], offset = unit ? 1 / (temperature * kLog2) : 0.0;
    return {vectors[0], mode(), d, pairs[p].of_a.all ? start : 0, sides.paired, temperature, bound, offset};
  }
  // In how many directions there are losses, and how many products a pair takes: alone, one gives those of both sides.
  int64_t directions() const { return symmetric ? 1 : 2; }
  int64_t products() const { return alone ? 1 : directions(); }
  // Of how many products the similarities are kept, and what each of them takes.
  int64_t kept() const { return std::min(products() * count(), kSavedSize / std::max<int64_t>(1, n * N)); }
  int64_t room() const { return saved_size(mode(), n, N); }
  int64_t state_size() const { return measured() + kept() * room(); }

  // What the mean divides by: how many losses everyone has.
  double number() const {
    double found = 0;
    for (int64_t p = 0; p < count(); ++p)
      for (int64_t i = 0; i < N; ++i)
        if (pairs[p].of_a.counted[i]) found += unit ? 1 : 1 + 0 * positives[p * N + i];
    // A unit vector that is not finite shows by its similarities with others, where there are any.
    for (int64_t p = 0; p < count() && unit; ++p) {
      const Pair& pair = pairs[p];
      const auto own = pair.of_a.counted.begin() + start;
      const bool compared = std::count(own, own + n, 1) > 0 &&
                            std::count(pair.of_a.counted.begin(), pair.of_a.counted.end(), 1) > 1;
      const Tensor& x = vectors[pair.a];
      const int64_t stride = N > 1 ? x.stride(0) : d;
      for (int64_t i = 0; i < N && !compared; ++i)
        for (int64_t c = 0; c < d && pair.of_a.counted[i]; ++c)
          found += static_cast<const Element*>(x.const_data_ptr())[i * stride + c] * Element(0);
    }
    return directions() * divisor(found);
  }
};

// function(i) for i < count products: a thread each where they come out even, are worth waking one and have small tiles,
// since then nobody waits for anybody; else one after the other, each by all threads.
template <class Function>
void over_products(int64_t count, int64_t n, int64_t columns, Function function) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool even = count >= threads && (count % threads == 0 || count >= 4 * threads);
  const bool apart = threads > 1 && even && n * columns >= kLeastApart && n * columns <= kMostApart;
  torch::stable::parallel_for(0, count, apart ? 1 : std::max<int64_t>(1, count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

template <class Element>
std::tuple<Tensor, Tensor, Tensor> forward_of(Paired<Element> in) {
  const Tensor& like = in.vectors[0];
  Tensor state = make(like, {in.state_size()}, scalar_type<Element>());
  Element* memory = static_cast<Element*>(state.mutable_data_ptr());
  in.measure(memory);
  in.remember(memory);
  Tensor losses = zeros<double>(like, {in.directions(), in.count(), in.n});
  double* out = static_cast<double*>(losses.mutable_data_ptr());
  const int64_t products = in.products() * in.count();
  std::vector<double> totals(products, 0.0);
  over_products(products, in.n, in.N, [&](int64_t at) {
    const int64_t p = at / in.products(), product = at % in.products();
    const auto sides = in.sides(p, product == 1);
    std::vector<double> of_rows, of_columns;
    Element* saved = at < in.kept() ? memory + in.measured() + at * in.room() : nullptr;
    in.contrast(p, sides).forward(sides.a, sides.b, of_rows, of_columns, saved, in.room());
    const auto put = [&](int64_t direction, const Side<Element>& side, const std::vector<double>& found) {
      for (int64_t i = 0; i < sides.paired; ++i) {
        out[(direction * in.count() + p) * in.n + side.origin(i, in.start) - in.start] = found[i];
        totals[at] += found[i];
      }
    };
    put(product, sides.a, of_rows);
    if (in.mode() == Mode::kBoth) put(1, sides.b, of_columns);
  });
  return {scalar<Element>(like, total_of(totals) / in.number() * (in.temperature / in.temperature)), losses, state};
}

// The gradients of all vectors, to which pairs add: those without a vector in common at once, others one after the other.
template <class Element>
struct Gradients {
  const Paired<Element>& in;
  const Scale& scale;
  std::vector<Tensor> tensors;
  std::vector<char> written;

  Gradients(const Paired<Element>& in, const Scale& scale) : in(in), scale(scale), written(in.vectors.size(), false) {
    for (const Tensor& x : in.vectors) tensors.push_back(make(x, {in.n, in.d}, scalar_type<Element>()));
  }
  Element* of(int64_t v) { return static_cast<Element*>(tensors[v].mutable_data_ptr()); }

  // Memory for what a pair has for a vector: its gradient itself, or where rows were copied, or are still to be
  // multiplied by the rest of the scale, something to be added to it.
  struct Place {
    Element* data = nullptr;
    bool add = false;
    std::optional<Tensor> scratch;
  };
  Place begin(int64_t v, bool direct) {
    if (direct) {
      const bool add = written[v];
      written[v] = true;
      return {of(v), add, std::nullopt};
    }
    Tensor scratch = make(in.vectors[0], {in.n, in.d}, scalar_type<Element>());
    return {static_cast<Element*>(scratch.mutable_data_ptr()), false, scratch};
  }
  void end(int64_t v, bool direct, const Place& place, const Side<Element>& side, int64_t first) {
    if (direct) return;
    if (!written[v]) std::fill(of(v), of(v) + in.n * in.d, Element(0));
    scatter(side, place.data, first, in.d, scale, written[v], of(v));
    written[v] = true;
  }
  void finish() {
    for (size_t v = 0; v < tensors.size(); ++v)
      if (!written[v]) std::fill(of(v), of(v) + in.n * in.d, Element(0));
  }
};

// The pairs in rounds, in each of which no vector comes twice. In the order of their list, each is in the first round that
// has room for it.
std::vector<std::vector<int64_t>> rounds(const std::vector<Pair>& pairs, size_t vectors) {
  std::vector<std::vector<int64_t>> found;
  std::vector<std::vector<char>> taken;
  for (size_t p = 0; p < pairs.size(); ++p) {
    size_t round = 0;
    while (round < found.size() && (taken[round][pairs[p].a] || taken[round][pairs[p].b])) ++round;
    if (round == found.size()) {
      found.emplace_back();
      taken.emplace_back(vectors, 0);
    }
    found[round].push_back(static_cast<int64_t>(p));
    taken[round][pairs[p].a] = taken[round][pairs[p].b] = 1;
  }
  return found;
}

template <class Element>
std::tuple<std::vector<Tensor>, Tensor> backward_of(Paired<Element> in, bool slope, const Tensor& losses,
                                                    const Tensor& state, const Tensor& grad) {
  check_losses(losses, {in.directions(), in.count(), in.N});
  check_state(state, in.state_size(), scalar_type<Element>());
  const Tensor contiguous = torch::stable::contiguous(losses);
  const double* values = static_cast<const double*>(contiguous.const_data_ptr());
  const Element* memory = static_cast<const Element*>(state.const_data_ptr());
  in.remember(memory);
  const Scale scale(grad, in.number(), in.temperature);
  Gradients<Element> gradients(in, scale);
  std::vector<double> totals(in.products() * in.count(), 0.0);
  const auto add = [&](int64_t p, int64_t product) {
    const Pair& pair = in.pairs[p];
    const bool transposed = product == 1, direct = pair.of_a.all && scale.afterwards == 1.0;
    const bool columns_too = in.mode() == Mode::kBoth;
    const int64_t rows = transposed ? pair.b : pair.a, columns = transposed ? pair.a : pair.b;
    const int64_t at = p * in.products() + product;
    auto sides = in.sides(p, transposed);
    const int64_t other = in.symmetric ? 0 : 1 - product;
    read_losses(sides.a, in.start, transposed ? pair.of_b : pair.of_a, values + (product * in.count() + p) * in.N);
    read_losses(sides.b, 0, transposed ? pair.of_a : pair.of_b, values + (other * in.count() + p) * in.N);
    const auto to_rows = gradients.begin(rows, direct);
    typename Gradients<Element>::Place to_columns;
    if (columns_too) to_columns = gradients.begin(columns, direct);
    const Element* saved = at < in.kept() ? memory + in.measured() + at * in.room() : nullptr;
    totals[at] = in.contrast(p, sides).backward(sides.a, sides.b, scale.now, slope, saved, to_rows.data, to_rows.add,
                                                to_columns.data, to_columns.add);
    gradients.end(rows, direct, to_rows, sides.a, in.start);
    if (columns_too) gradients.end(columns, direct, to_columns, sides.b, 0);
  };
  for (const std::vector<int64_t>& round : rounds(in.pairs, in.vectors.size()))
    over_products(static_cast<int64_t>(round.size()), in.n, in.N, [&](int64_t i) {
      for (int64_t product = 0; product < in.products(); ++product) add(round[i], product);
    });
  const double total = total_of(totals);
  gradients.finish();
  return {gradients.tensors, scalar<double>(in.vectors[0], -total * scale.now * scale.afterwards)};
}

// ---- operators ----------------------------------------------------------------------------------

// (loss, losses, state)
std::tuple<Tensor, Tensor, Tensor> paired_forward(std::vector<Tensor> vectors, std::vector<int64_t> pairs,
                                                  std::vector<bool> directions, std::optional<Tensor> mask,
                                                  std::vector<Tensor> everyone, std::optional<Tensor> everyone_mask,
                                                  int64_t start, std::optional<Tensor> temperature,
                                                  double fixed_temperature) {
  check_first(vectors);
  const Arguments x{vectors, pairs, directions, mask, everyone, everyone_mask, start,
                    read_temperature_of_contrast(temperature, fixed_temperature)};
  if (vectors[0].scalar_type() == ScalarType::Double) return forward_of(Paired<double>(x));
  return forward_of(Paired<float>(x));
}

// (gradients of the vectors, of the temperature)
std::tuple<std::vector<Tensor>, Tensor> paired_backward(
    std::vector<Tensor> vectors, std::vector<int64_t> pairs, std::vector<bool> directions, std::optional<Tensor> mask,
    std::vector<Tensor> everyone, std::optional<Tensor> everyone_mask, int64_t start, std::optional<Tensor> temperature,
    double fixed_temperature, Tensor losses, Tensor state, Tensor grad) {
  check_first(vectors);
  const Arguments x{vectors, pairs, directions, mask, everyone, everyone_mask, start,
                    read_temperature_of_contrast(temperature, fixed_temperature)};
  const bool slope = temperature.has_value();
  if (vectors[0].scalar_type() == ScalarType::Double)
    return backward_of(Paired<double>(x), slope, losses, state, grad);
  return backward_of(Paired<float>(x), slope, losses, state, grad);
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("paired_forward", TORCH_BOX(&pmrl::paired_forward));
  m.impl("paired_backward", TORCH_BOX(&pmrl::paired_backward));
}
