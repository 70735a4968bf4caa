// Contrasts: cross-entropy over similarities of vectors, row i's positive at column start + i.
//
//   delta_ij = (s_ij - s_i+) / tau,   loss_i = log(1 + sum_{j != positive} exp delta_ij),   P_ij = exp(delta_ij - loss_i)
//
// and with R, the probabilities with which columns choose rows, tau dL/da = G b and tau dL/db = G^T a for G = P + R, minus
// the sum of all others' at the positives. Similarities are made tile by tile, by BLAS; a tile is some rows times all
// columns. Between the products tiles.h passes over a tile, which is still in cache, with all threads.
//
//   triangle  both sides are the same vectors: a tile begins at its own diagonal, and what is right of it counts for its
//             columns as rows too. Half the products.
//   rows      one process's rows against everyone's columns.
//   both      every row has a loss and every column, from one product.
//
// Vectors that do not take part are not there: the others are copied side by side, those that have a loss first.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "tensors.h"

namespace pmrl {
namespace {

// Few rows waste less of a triangle and are still in cache after a product, more rows let BLAS copy less: 128 is best
// or close to it from B = 1024 to 4096, d = 128 and 512.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileSize = int64_t(1) << 22;   // numbers in a tile at most, as long as it has 32 rows
constexpr int64_t kSavedSize = int64_t(1) << 22;  // similarities kept for the backward pass at most

int64_t padded(int64_t n) { return (n + kTilePadding - 1) / kTilePadding * kTilePadding; }

int64_t tile_rows(int64_t columns) {
  return std::clamp(kTileSize / padded(std::max<int64_t>(1, columns)) / kTilePadding * kTilePadding,
                    int64_t(kTilePadding), kTileRows);
}

constexpr double kLog2 = 0.69314718055994530942;

enum class Mode { kTriangle, kRows, kBoth };

// What the similarities of n rows take, in whole tiles. pmrl_kernels/ops/native.py computes the same.
int64_t saved_size(Mode mode, int64_t n, int64_t columns) {
  return mode == Mode::kTriangle ? n * (n + kTileRows + 2 * kTilePadding) / 2 : n * (columns + kTilePadding);
}

// ---- matrix products ----------------------------------------------------------------------------

template <class Element>
constexpr ScalarType scalar_type() {
  return sizeof(Element) == 8 ? ScalarType::Double : ScalarType::Float;
}

// Numbers in memory that someone else holds.
template <class Element>
Tensor view(const Element* data, int64_t n, int64_t m, int64_t stride0, int64_t stride1) {
  const int64_t sizes[] = {n, m}, strides[] = {stride0, stride1};
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_create_tensor_from_blob(const_cast<Element*>(data), 2, sizes, strides, 0,
                                                     code_of(scalar_type<Element>()), aoti_torch_device_type_cpu(), 0,
                                                     &handle) == AOTI_TORCH_SUCCESS,
                  "pmrl_kernels: no view of a tile");
  return Tensor(handle);
}

// out = x y, or out += x y.
void multiply(const Tensor& out, const Tensor& x, const Tensor& y, bool add) {
  const auto status = add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), y.get(), 1.0, 1.0)
                          : aoti_torch_cpu_mm_out(out.get(), x.get(), y.get());
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "pmrl_kernels: a matrix product failed");
}

// ---- one side of the similarities ---------------------------------------------------------------

template <class Element>
struct Side {
  const Element* data = nullptr;
  int64_t n = 0, stride = 0;
  std::vector<int64_t> at;  // where each vector came from, if they were copied
  std::vector<Element> positive;
  std::vector<double> losses;  // +inf for vectors that have none
  std::optional<Tensor> held;

  int64_t origin(int64_t i, int64_t first) const { return at.empty() ? first + i : at[i]; }
};

// Which vectors have a loss, and which the other side may choose.
struct Flags {
  std::vector<char> counted, seen;
  bool all = true;  // and nothing has to be copied

  explicit Flags(int64_t n) : counted(n, 1), seen(n, 1) {}
  void settle() {
    all = true;
    for (size_t i = 0; i < seen.size(); ++i) all = all && counted[i] && seen[i];
  }
};

// Vectors [begin, end) of x: those that are counted, first of them [own_begin, own_end); then the seen ones.
template <class Element>
Side<Element> make_side(const Tensor& x, const Flags& flags, int64_t begin, int64_t end, int64_t own_begin,
                        int64_t own_end) {
  Side<Element> side;
  const Element* data = static_cast<const Element*>(x.const_data_ptr());
  const int64_t d = x.size(1);
  side.stride = x.size(0) > 1 ? x.stride(0) : d;
  if (flags.all) {
    side.data = data + begin * side.stride;
    side.n = end - begin;
    return side;
  }
  const auto own = [&](int64_t i) { return own_begin <= i && i < own_end; };
  for (int64_t i = begin; i < end; ++i)
    if (flags.counted[i] && own(i)) side.at.push_back(i);
  for (int64_t i = begin; i < end; ++i)
    if (flags.counted[i] && !own(i)) side.at.push_back(i);
  for (int64_t i = begin; i < end; ++i)
    if (flags.seen[i] && !flags.counted[i]) side.at.push_back(i);
  side.n = static_cast<int64_t>(side.at.size());
  if (side.n == 0) return side;
  side.held = make(x, {side.n, d}, x.scalar_type());
  Element* copy = static_cast<Element*>(side.held->mutable_data_ptr());
  torch::stable::parallel_for(0, side.n, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::copy_n(data + side.at[i] * side.stride, d, copy + i * d);
  });
  side.data = copy;
  side.stride = d;
  return side;
}

// ---- passes over all tiles ----------------------------------------------------------------------

struct Group {
  int64_t begin, end;
  bool columns;  // whether its columns have a loss from this tile
};

struct Tile {
  int64_t first, rows, column, width, stride;
  std::vector<Group> groups;
};

std::vector<Tile> tiles(Mode mode, int64_t n, int64_t columns) {
  std::vector<Tile> found;
  const int64_t height = tile_rows(columns);
  for (int64_t first = 0; first < n; first += height) {
    Tile t;
    t.first = first;
    t.rows = std::min(height, n - first);
    t.column = mode == Mode::kTriangle ? first : 0;
    t.width = columns - t.column;
    t.stride = padded(t.width);
    const int64_t wide = t.stride < 8 * kTileColumns ? kTileColumns / 2 : kTileColumns;  // enough for several threads
    const int64_t square = mode == Mode::kTriangle ? std::min(padded(t.rows), t.stride) : 0;
    for (int64_t j = 0; j < square; j += wide) t.groups.push_back({j, std::min(j + wide, square), false});
    for (int64_t j = square; j < t.stride; j += wide)
      t.groups.push_back({j, std::min(j + wide, t.stride), mode != Mode::kRows});
    found.push_back(t);
  }
  return found;
}

template <class Function>
void over_groups(const Tile& t, Function function) {
  const int64_t count = static_cast<int64_t>(t.groups.size());
  torch::stable::parallel_for(0, count, t.rows * t.stride < 16384 ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) function(g, t.groups[g]);
  });
}

// log(1 + sum 2^power)
double loss_of(double power, double sum) {
  const double x = power * kLog2 + std::log(sum);
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class Element>
struct Contrast {
  const Kernels& run;
  const Tensor& like;
  Mode mode;
  int64_t d, start, paired;  // row i < paired has its positive at column start + i
  double factor;  // log2(e) / tau, rounded once for all: a slightly different temperature does no harm, two would
  double steepness;  // the same, also where it is no Element
  bool shared;    // 2^(s factor - offset) is in range for every s
  bool bounded;   // rounding a similarity or a loss may change a power of two a lot
  double offset;

  static constexpr Element infinity = std::numeric_limits<Element>::infinity();
  static constexpr bool wide = sizeof(Element) == 8;
  static constexpr double kRounding = std::numeric_limits<Element>::epsilon();
  static constexpr double kDigits = 1 / (8 * kRounding);  // powers up to here have digits after the point
  static constexpr double kTold = 0x1p42;                 // losses up to here are known to 2^-10

  Contrast(const Tensor& like, Mode mode, int64_t d, int64_t start, int64_t paired, double temperature, double bound,
           double offset)
      : run(kernels()), like(like), mode(mode), d(d), start(start), paired(paired),
        factor(static_cast<Element>(std::min<double>(1 / (temperature * kLog2), std::numeric_limits<Element>::max()))),
        steepness(factor < std::numeric_limits<Element>::max() ? factor : 1 / (temperature * kLog2)),
        shared(bound * factor - offset <= (wide ? 400 : 60) && bound * factor <= kDigits),
        bounded(!(bound * factor <= kDigits / 4)),
        offset(shared ? std::floor(offset) : 0) {}

  Tensor buffer(int64_t n) const { return make(like, {n}, scalar_type<Element>()); }

  void similarities(const Side<Element>& a, const Side<Element>& b, const Tile& t, Element* s) const {
    multiply(view(s, t.rows, t.width, t.stride, 1), view(a.data + t.first * a.stride, t.rows, d, a.stride, 1),
             view(b.data + t.column * b.stride, d, t.width, 1, b.stride), false);
    for (int64_t i = 0; i < t.rows; ++i) {
      std::fill(s + i * t.stride + t.width, s + (i + 1) * t.stride, -infinity);
      if (t.first + i < paired) s[i * t.stride + start + t.first + i - t.column] = -infinity;
    }
  }

  int64_t largest(const std::vector<Tile>& all) const {
    int64_t size = 0;
    for (const Tile& t : all) size = std::max(size, t.rows * t.stride);
    return size;
  }

  // Losses of the rows, and in mode kBoth of the columns. `saved` (or null) takes the similarities; what is left of its
  // `room` becomes zeros, so that equal inputs have equal states.
  void forward(const Side<Element>& a, const Side<Element>& b, std::vector<double>& row_losses,
               std::vector<double>& column_losses, Element* saved, int64_t room) const {
    const int64_t columns = mode == Mode::kRows ? 0 : padded(b.n);
    std::vector<Element> column_shift(columns, -infinity), maxima(shared ? 0 : padded(b.n)), row_shift;
    std::vector<double> column_sums(columns, 0.0), sums, parts;
    const std::vector<Tile> all = tiles(mode, a.n, b.n);
    std::optional<Tensor> scratch;
    if (!saved) scratch = buffer(largest(all));
    row_losses.assign(a.n, 0.0);
    Element* const end = saved ? saved + room : nullptr;
    if (saved) {
      int64_t size = 0;
      for (const Tile& t : all) size += t.rows * t.stride;
      STD_TORCH_CHECK(size <= room, "pmrl_kernels: no room for ", size, " similarities");
    }
    for (const Tile& t : all) {
      Element* s = saved ? saved : static_cast<Element*>(scratch->mutable_data_ptr());
      if (saved) saved += t.rows * t.stride;
      similarities(a, b, t, s);
      parts.assign(t.groups.size() * t.rows, 0.0);
      row_shift.assign(t.rows, Element(0));
      sums.assign(t.rows, 0.0);
      ForwardTile pass{s, t.rows, t.stride, wide, shared, factor, offset, row_shift.data(), parts.data(), maxima.data(),
                       nullptr, nullptr};
      if (columns) pass.column_shift = column_shift.data() + t.column, pass.column_sums = column_sums.data() + t.column;
      if (!shared)
        over_groups(t, [&](int64_t g, const Group& x) { run.maxima(pass, g, x.begin, x.end, x.columns); });
      for (int64_t i = 0; i < t.rows; ++i) {
        // in a triangle, with what the tiles above have found of this row as a column
        if (mode == Mode::kTriangle) sums[i] = column_sums[t.first + i];
        if (shared) continue;
        const Element before = mode == Mode::kTriangle ? column_shift[t.first + i] : -infinity;
        double now = before;
        for (size_t g = 0; g < t.groups.size(); ++g) now = std::max(now, parts[g * t.rows + i]);
        if (before < now) sums[i] *= std::exp2((before - now) * factor);
        row_shift[i] = now == -infinity ? Element(0) : static_cast<Element>(now);
      }
      over_groups(t, [&](int64_t g, const Group& x) { run.sums(pass, g, x.begin, x.end, x.columns); });
      for (int64_t i = 0; i < t.rows; ++i) {
        for (size_t g = 0; g < t.groups.size(); ++g) sums[i] += parts[g * t.rows + i];
        row_losses[t.first + i] = loss(row_shift[i], sums[i], a.positive[t.first + i]);
      }
    }
    std::fill(saved, end, Element(0));
    if (mode != Mode::kBoth) return;
    column_losses.resize(b.n);
    for (int64_t j = 0; j < b.n; ++j) column_losses[j] = loss(column_shift[j], column_sums[j], b.positive[j]);
  }

  double loss(double shift, double sum, double positive) const {
    if (sum == 0) return positive - positive;  // nobody else, or a NaN
    return loss_of(shared ? offset - positive * factor : (shift - positive) * steepness, sum);
  }

  // What makes a side's probabilities, see TileSide; what fills the last pack chooses nobody.
  struct Choices {
    std::vector<Element> positive, shift, weight, offset;
    TileSide from(int64_t i) const {
      return {positive.data() + i, shift.data() + i, weight.data() + i, offset.data() + i};
    }
  };
  Choices choices(const Side<Element>& side) const {
    const int64_t size = padded(side.n);
    const std::vector<Element> zeros(size, 0);
    Choices found{zeros, zeros, zeros, std::vector<Element>(size, infinity)};
    for (int64_t i = 0; i < side.n; ++i) {
      if (side.losses[i] == infinity) continue;
      const double positive = side.positive[i], loss = side.losses[i] / kLog2;
      double shift = 0, offset = 0, weight = 0;
      if (shared) {
        weight = std::exp2(this->offset - positive * factor - loss);
      } else {
        // Relative to the log sum exp, or what Element makes of it: from a positive far away, what rounding takes from
        // the difference of two similarities would be an error of the exponent.
        shift = static_cast<Element>(positive + loss / steepness);
        const double rest = loss - (shift - positive) * steepness;
        if (bounded && (loss > kTold || std::abs(rest) > kDigits)) {
          // The loss does not tell how many share in the largest. Half of 2, where powers are cut off, to each of them
          // and to what is as good as level, should similarities be made in another order.
          shift -= 8 * kRounding * (std::abs(loss / steepness) + std::abs(shift)) + 1 / steepness;
          weight = 0.5;
        } else {
          offset = std::floor(rest);
          weight = std::exp2(offset - rest);
        }
      }
      found.positive[i] = side.positive[i];
      found.shift[i] = static_cast<Element>(shift);
      found.offset[i] = static_cast<Element>(offset);
      found.weight[i] = static_cast<Element>(weight);
    }
    return found;
  }

  // scale G b into grad_a, in mode kBoth scale G^T a into grad_b, where `scale` has 1/tau in it already; added to what is
  // there if `add_a`, `add_b`. Gradients are contiguous. Returns the sum of P delta, and R delta where columns count.
  double backward(const Side<Element>& a, const Side<Element>& b, double scale, bool slope, const Element* saved,
                  Element* grad_a, bool add_a, Element* grad_b, bool add_b) const {
    const std::vector<Tile> all = tiles(mode, a.n, b.n);
    const Choices of_rows = choices(a), of_columns = choices(b);
    std::vector<double> slopes;
    Tensor scratch = buffer(largest(all));
    Element* w = static_cast<Element*>(scratch.mutable_data_ptr());
    double total = 0;
    for (const Tile& t : all) {
      const Element* s = saved ? saved : w;
      if (saved)
        saved += t.rows * t.stride;
      else
        similarities(a, b, t, w);
      slopes.assign(t.groups.size(), 0.0);
      const Powers powers = shared ? Powers::kShared : bounded ? Powers::kBounded : Powers::kRelative;
      const BackwardTile pass{s, w, t.rows, t.stride, wide, powers, factor, offset, 2 * kDigits / factor, scale,
                              of_rows.from(t.first), of_columns.from(t.column), slope ? slopes.data() : nullptr};
      over_groups(t, [&](int64_t g, const Group& x) { run.weights(pass, g, x.begin, x.end, x.columns); });
      for (double x : slopes) total += x;
      for (int64_t i = 0; i < t.rows && t.first + i < paired; ++i) {
        const int64_t j = start + t.first + i;
        const double own = std::expm1(-double(a.losses[t.first + i])) + std::expm1(-double(b.losses[j]));
        w[i * t.stride + j - t.column] = static_cast<Element>(scale * own);
      }
      const bool later = t.first > 0, triangle = mode == Mode::kTriangle;
      const Tensor rows = view(a.data + t.first * a.stride, t.rows, d, a.stride, 1);
      multiply(view(grad_a + t.first * d, t.rows, d, d, 1), view(w, t.rows, t.width, t.stride, 1),
               view(b.data + t.column * b.stride, t.width, d, b.stride, 1), add_a || (later && triangle));
      if (mode == Mode::kBoth)
        multiply(view(grad_b, t.width, d, d, 1), view(w, t.width, t.rows, 1, t.stride), rows, add_b || later);
      if (triangle && t.width > t.rows)
        multiply(view(grad_a + (t.first + t.rows) * d, t.width - t.rows, d, d, 1),
                 view(w + t.rows, t.width - t.rows, t.rows, 1, t.stride), rows, later);
    }
    if (all.empty() && grad_b && !add_b) std::fill(grad_b, grad_b + b.n * d, Element(0));
    return total * factor * kLog2;
  }
};

// ---- arguments ----------------------------------------------------------------------------------

void check_vectors(const Tensor& x, const Tensor& like, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == like.scalar_type() && x.size(1) == like.size(1) && x.size(0) == n,
                  "pmrl_kernels: vectors must be (B, d) and of one dtype, float32 or float64");
}

void check_kind(const Tensor& u) {
  STD_TORCH_CHECK(u.dim() == 2 && u.size(1) >= 1 &&
                      (u.scalar_type() == ScalarType::Float || u.scalar_type() == ScalarType::Double),
                  "pmrl_kernels: u must be (B, d), float32 or float64");
}

// One of float32's normal numbers, whatever the embeddings are: what inputs.py asks of a Python number.
double read_temperature_of_contrast(const std::optional<Tensor>& tensor, double fixed) {
  using limits = std::numeric_limits<float>;
  return read_temperature(tensor, fixed, limits::min(), limits::max());
}

void check_place(int64_t start, int64_t n, int64_t N) {
  STD_TORCH_CHECK(start >= 0 && start + n <= N, "pmrl_kernels: u must lie within the columns");
}

// What a mean divides by: how many count, at least 1, so that nothing gives 0. NaN where one of those is not finite,
// which no similarity may show.
double divisor(double number) { return number < 1 ? 1 : number; }

// The incoming gradient times 1/(number tau), and what of it is left for afterwards: a scaler's gradient, or one over a
// small tau, need not fit into float32 where its product with G does.
struct Scale {
  double now, afterwards;
  Scale(const Tensor& grad, double number, double temperature) {
    STD_TORCH_CHECK(grad.dim() == 0, "pmrl_kernels: an incoming gradient must be 0-d");
    const Tensor x = grad.scalar_type() == ScalarType::Double ? grad : torch::stable::to(grad, ScalarType::Double);
    const double scale = *static_cast<const double*>(x.const_data_ptr()) / number / temperature;
    const bool fits = std::abs(scale) > 1e-15 && std::abs(scale) < 1e15;
    now = fits ? scale : 1.0;
    afterwards = fits ? 1.0 : scale;
  }
  // Some of the gradients, to where they belong.
  template <class Element>
  void apply(const Element* from, int64_t n, Element* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = afterwards == 1.0 ? from[i] : static_cast<Element>(from[i] * afterwards);
  }
};

// Gradients of a side's vectors into out (rows from `first` on), which other rows have as 0. `add`: to what is there.
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
      for (int64_t c = 0; c < d; ++c) y[c] += scale.afterwards == 1.0 ? x[c] : static_cast<Element>(x[c] * scale.afterwards);
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

// The losses (n,) of a side's vectors, as they lie in `from`.
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
  Tensor u, columns;
  int64_t n, N, d, start;
  double temperature;
  Flags flags;
  double number = 0;
  Side<Element> a, b;
  Mode mode;

  Instances(const Tensor& rows, const std::optional<Tensor>& all, int64_t first, double tau)
      : u(with_rows(rows)), columns(all ? with_rows(*all) : u), n(u.size(0)), N(columns.size(0)), d(u.size(1)),
        start(first), temperature(tau), flags(N), mode(all ? Mode::kRows : Mode::kTriangle) {
    check_vectors(columns, u, N);
    check_place(start, n, N);
    flags.counted = flags.seen = nonzero_rows<Element>(columns);
    flags.settle();
    for (char x : flags.counted) number += x;
    b = make_side<Element>(columns, flags, 0, N, start, start + n);
    b.positive.assign(b.n, Element(1));
    a = mode == Mode::kTriangle ? b : make_side<Element>(columns, flags, start, start + n, start, start + n);
    a.positive.resize(a.n, Element(1));
    // What is not finite makes all similarities with it NaN. Here there is none of a row with another one.
    for (int64_t j = 0; j < b.n && (a.n == 0 || b.n == 1); ++j)
      for (int64_t c = 0; c < d; ++c) number += b.data[j * b.stride + c] * Element(0);
    number = divisor(number);
  }

  Contrast<Element> contrast() const {
    // Unit vectors: no s exceeds 1, and what underflows beside 1 does not matter.
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
  STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) == in.N && losses.scalar_type() == ScalarType::Double,
                  "pmrl_kernels: losses must be (N,), float64, those of all columns");
  STD_TORCH_CHECK(state.numel() == in.saved() && state.scalar_type() == in.u.scalar_type() && state.is_contiguous(),
                  "pmrl_kernels: state is not that of this batch");
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
  std::vector<Tensor> z;  // of all processes, if there are others
  Tensor u;
  bool everyone;  // no other processes
  int64_t n, N, d, k, start;
  double temperature;
  std::vector<Flags> of_z, of_u;
  const Element* positives = nullptr;  // (k, N)
  const Element* bounds = nullptr;     // (k,): no similarity is larger; Inf where there is no bound

  Modalities(const std::vector<Tensor>& rows_z, const Tensor& rows_u, const std::optional<Tensor>& rows_mask,
             const std::vector<Tensor>& columns, const std::optional<Tensor>& columns_mask, int64_t first, bool raw,
             double tau)
      : u(with_rows(columns.empty() ? rows_u : columns[0])), everyone(columns.empty()), n(rows_u.size(0)), N(u.size(0)),
        d(u.size(1)), k(static_cast<int64_t>(rows_z.size())), start(first), temperature(tau) {
    STD_TORCH_CHECK(columns.empty() || static_cast<int64_t>(columns.size()) == k + 1,
                    "pmrl_kernels: columns must be u and the k embeddings");
    check_vectors(u, rows_u, N);
    check_place(start, n, N);
    for (int64_t m = 0; m < k; ++m) {
      z.push_back(with_rows(everyone ? rows_z[m] : columns[m + 1]));
      check_vectors(z[m], rows_u, N);
    }
    const std::optional<Tensor>& given = everyone ? rows_mask : columns_mask;
    std::optional<Tensor> mask;
    if (given) {
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Bool && given->dim() == 2 && given->size(0) == N &&
                          given->size(1) == k,
                      "pmrl_kernels: mask must be a bool tensor (B, k)");
      mask = torch::stable::contiguous(*given);
    }
    const uint8_t* present = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;  // not 0
    std::vector<char> valid(N, 1);
    if (!raw) valid = nonzero_rows<Element>(u);
    for (int64_t i = 0; i < N && raw && present; ++i)
      valid[i] = std::any_of(present + i * k, present + (i + 1) * k, [](uint8_t x) { return x != 0; });
    for (int64_t m = 0; m < k; ++m) {
      Flags of_z_m(N), of_u_m(N);
      for (int64_t i = 0; i < N; ++i) {
        of_z_m.counted[i] = of_z_m.seen[i] = of_u_m.counted[i] = valid[i] && (!present || present[i * k + m] != 0);
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

  // Similarities with one's own partner and bounds of all of them, into the state: k N + k numbers.
  void measure(Element* into) {
    std::vector<double> dots(N);
    const auto row_dots = [&](const Tensor& x, const Tensor& y) {
      torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
        kernels().row_dots(rows_of(x), rows_of(y), d, begin, end, dots.data());
      });
    };
    const auto norm_bound = [&](const Tensor& x, const Flags& flags) {  // whatever is in the places of missing ones
      row_dots(x, x);
      double largest = 0;
      for (int64_t i = 0; i < N; ++i) {
        const double y = flags.counted[i] || flags.seen[i] ? dots[i] : 0;
        largest = y <= largest || !(largest < HUGE_VAL) ? largest : y == y ? y : HUGE_VAL;
      }
      return std::sqrt(largest);
    };
    const double of_u_norm = k > 0 ? norm_bound(u, of_u[0]) : 0;  // seen with every modality
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
    return {u, everyone ? Mode::kBoth : Mode::kRows, d, of_z[m].all ? start : 0, pair.paired, temperature, bounds[m], 0.0};
  }
  int64_t directions() const { return everyone ? 1 : 2; }
  // For each modality and direction.
  int64_t saved() const { return directions() * k * n * N <= kSavedSize ? saved_size(Mode::kBoth, n, N) : 0; }
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
      if (in.everyone) put(1, pair.b, of_columns);
    }
  return {scalar<Element>(in.u, total / in.pairs() * (in.temperature / in.temperature)), losses, state};
}

template <class Element>
std::tuple<std::vector<Tensor>, Tensor, Tensor> backward_of_modalities(Modalities<Element> in, bool slope,
                                                                       const Tensor& losses, const Tensor& state,
                                                                       const Tensor& grad) {
  STD_TORCH_CHECK(losses.dim() == 3 && losses.size(0) == 2 && losses.size(1) == in.k && losses.size(2) == in.N &&
                      losses.scalar_type() == ScalarType::Double,
                  "pmrl_kernels: losses must be (2, k, N), float64, those of all columns");
  STD_TORCH_CHECK(state.numel() == in.measured() + in.saved() * in.directions() * in.k && state.is_contiguous() &&
                      state.scalar_type() == in.u.scalar_type(),
                  "pmrl_kernels: state is not that of this batch");
  const Tensor contiguous = torch::stable::contiguous(losses);
  const double* values = static_cast<const double*>(contiguous.const_data_ptr());
  const Element* memory = static_cast<const Element*>(state.const_data_ptr());
  in.remember(memory);
  const Element* saved = in.saved() ? memory + in.measured() : nullptr;
  const Scale scale(grad, in.pairs(), in.temperature);
  Tensor grad_u = zeros<Element>(in.u, {in.n, in.d});
  Element* of_u = static_cast<Element*>(grad_u.mutable_data_ptr());
  // Gradients of vectors that had to be copied, or that wait for the rest of the scale.
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
      Element* from_columns = !in.everyone ? nullptr : direct ? of_u : scratch(columns);
      total += in.contrast(m, pair).backward(pair.a, pair.b, scale.now, slope, saved, from_rows, direct && direction == 1,
                                             from_columns, direct);
      if (saved) saved += in.saved();
      if (direct) continue;
      scatter(pair.a, from_rows, in.start, in.d, scale, direction == 1, of_rows);
      if (in.everyone) scatter(pair.b, from_columns, 0, in.d, scale, true, of_u);
    }
  }
  return {grad_z, grad_u, scalar<double>(in.u, -total * scale.now * scale.afterwards)};
}

}  // namespace

// ---- operators ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> instance_forward(Tensor u, std::optional<Tensor> columns, int64_t start,
                                                    std::optional<Tensor> temperature, double fixed_temperature) {
  check_kind(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  if (u.scalar_type() == ScalarType::Double) return forward_of_instances(Instances<double>(u, columns, start, tau));
  return forward_of_instances(Instances<float>(u, columns, start, tau));
}

std::tuple<Tensor, Tensor> instance_backward(Tensor u, std::optional<Tensor> columns, int64_t start,
                                             std::optional<Tensor> temperature, double fixed_temperature,
                                             Tensor losses, Tensor state, Tensor grad) {
  check_kind(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  const bool slope = temperature.has_value();
  if (u.scalar_type() == ScalarType::Double) {
    Instances<double> in(u, columns, start, tau);
    return backward_of_instances(in, slope, losses, state, grad);
  }
  Instances<float> in(u, columns, start, tau);
  return backward_of_instances(in, slope, losses, state, grad);
}

std::tuple<Tensor, Tensor, Tensor> modality_forward(std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask,
                                                    std::vector<Tensor> columns, std::optional<Tensor> columns_mask,
                                                    int64_t start, bool raw, std::optional<Tensor> temperature,
                                                    double fixed_temperature) {
  check_kind(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  if (u.scalar_type() == ScalarType::Double)
    return forward_of_modalities(Modalities<double>(z, u, mask, columns, columns_mask, start, raw, tau));
  return forward_of_modalities(Modalities<float>(z, u, mask, columns, columns_mask, start, raw, tau));
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> modality_backward(
    std::vector<Tensor> z, Tensor u, std::optional<Tensor> mask, std::vector<Tensor> columns,
    std::optional<Tensor> columns_mask, int64_t start, bool raw, std::optional<Tensor> temperature,
    double fixed_temperature, Tensor losses, Tensor state, Tensor grad) {
  check_kind(u);
  const double tau = read_temperature_of_contrast(temperature, fixed_temperature);
  const bool slope = temperature.has_value();
  if (u.scalar_type() == ScalarType::Double)
    return backward_of_modalities(Modalities<double>(z, u, mask, columns, columns_mask, start, raw, tau), slope, losses,
                                  state, grad);
  return backward_of_modalities(Modalities<float>(z, u, mask, columns, columns_mask, start, raw, tau), slope, losses,
                                state, grad);
}

}  // namespace pmrl
