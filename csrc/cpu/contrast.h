// A contrast: cross-entropy over similarities s_ij = a_i . b_j of two sides' vectors a_i and b_j (d,), the positive of
// row i in column start + i. With delta_ij = (s_ij - s_i+) / tau,
//
//   loss_i = log(1 + sum_{j != positive} exp delta_ij)      P_ij = exp(delta_ij - loss_i)
//
// and R, the probabilities with which columns choose rows, in the same way,
//
//   tau dL/da = G b,  tau dL/db = G^T a                     G = P + R, at positives minus the sum of all others' in its
//                                                           row of P and in its column of R
//
// Forward reads a and b and writes losses and, if there is room, the similarities. Backward reads a, b, the losses and,
// if they were kept, the similarities, and writes gradients.
//
// Similarities are made tile by tile, by BLAS; a tile is some rows times all columns. Between the products all threads
// pass over a tile (contrast_kernels.h), while it is in cache.
//
//   kTriangle  both sides are the same vectors. A tile begins at its own diagonal, and what lies right of its square
//              counts for its columns as rows too: half the products.
//   kRows      one process's rows, everyone's columns.
//   kBoth      every row has a loss and every column, from one product.
//
// Vectors that do not take part are left out: the others are copied side by side, those that have a loss first.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "choices.h"
#include "products.h"

namespace pmrl {
namespace {

// With few rows less of a triangle is wasted, and a tile is still in cache after its product; with more rows BLAS
// copies less. 128 is best or close to it for B = 1024 to 4096, d = 128 and 512. Outside of triangles each thread brings
// as many, up to a point, for of 128 rows BLAS leaves two threads a tenth of their time idle.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTallestTile = 512;
constexpr int64_t kTileSize = int64_t(1) << 22;   // numbers in a tile at most, unless it has only 32 rows
constexpr int64_t kLeastApart = int64_t(1) << 14;  // similarities of a product that a thread takes alone, at least
constexpr int64_t kMostApart = int64_t(1) << 22;   // and at most
constexpr int64_t kSavedSize = int64_t(1) << 23;  // similarities kept for the backward pass at most
constexpr int64_t kSpare = 16;  // zeros at the start of a state that may have nothing else, see ops/contrast/native.py

enum class Mode { kTriangle, kRows, kBoth };

// What is kept for the backward pass, which may run in another thread and with another number of them, lies the same way
// whatever comes out here: outside of triangles all tiles are of the same width.
int64_t tile_rows(Mode mode, int64_t columns) {
  const int64_t threads = mode == Mode::kTriangle ? 1 : torch::stable::get_num_threads();
  return std::clamp(kTileSize / padded(std::max<int64_t>(1, columns)) / kTilePadding * kTilePadding,
                    int64_t(kTilePadding), std::min(kTileRows * threads, kTallestTile));
}

// What the similarities of n rows take, in whole tiles. pmrl_kernels/ops/contrast/native.py computes the same.
int64_t saved_size(Mode mode, int64_t n, int64_t columns) {
  return mode == Mode::kTriangle ? n * (n + kTileRows + 2 * kTilePadding) / 2 : n * (columns + kTilePadding);
}

// ---- one side of the similarities ---------------------------------------------------------------

template <class Element>
struct Side {
  const Element* data = nullptr;
  int64_t n = 0, stride = 0;
  std::vector<int64_t> at;        // which vector each is, if they were copied
  std::vector<Element> positive;  // the similarity with its positive
  std::vector<double> losses;     // +inf for vectors that have none
  std::optional<Tensor> held;     // the copy

  int64_t origin(int64_t i, int64_t first) const { return at.empty() ? first + i : at[i]; }
};

// Which vectors have a loss, and which the other side may choose.
struct Flags {
  std::vector<char> counted, seen;
  bool all = true;  // every one has and may, so that nothing has to be copied

  explicit Flags(int64_t n) : counted(n, 1), seen(n, 1) {}
  void settle() {
    all = true;
    for (size_t i = 0; i < seen.size(); ++i) all = all && counted[i] && seen[i];
  }
};

// Vectors [begin, end) of x that take part: those that are counted, of them first [own_begin, own_end); then those that
// are only seen.
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

// Columns of a tile, [begin, end).
struct Group {
  int64_t begin, end;
  bool columns;  // whether its columns have a loss from this tile
};

// Rows [first, first + rows) and columns [column, column + width) of the similarities; `stride`: width with padding.
struct Tile {
  int64_t first, rows, column, width, stride;
  std::vector<Group> groups;
};

std::vector<Tile> tiles(Mode mode, int64_t n, int64_t columns) {
  std::vector<Tile> found;
  const int64_t height = tile_rows(mode, columns);
  for (int64_t first = 0; first < n; first += height) {
    Tile t;
    t.first = first;
    t.rows = std::min(height, n - first);
    t.column = mode == Mode::kTriangle ? first : 0;
    t.width = columns - t.column;
    t.stride = padded(t.width);
    // Narrower in a small tile, so that there are groups for several threads.
    const int64_t group = t.stride < 8 * kTileColumns ? kTileColumns / 2 : kTileColumns;
    const int64_t square = mode == Mode::kTriangle ? std::min(padded(t.rows), t.stride) : 0;
    for (int64_t j = 0; j < square; j += group) t.groups.push_back({j, std::min(j + group, square), false});
    for (int64_t j = square; j < t.stride; j += group)
      t.groups.push_back({j, std::min(j + group, t.stride), mode != Mode::kRows});
    found.push_back(t);
  }
  return found;
}

// function(index, group) for all groups of a tile, by several threads unless it is small.
template <class Function>
void over_groups(const Tile& t, Function function) {
  const int64_t count = static_cast<int64_t>(t.groups.size());
  torch::stable::parallel_for(0, count, t.rows * t.stride < 16384 ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) function(g, t.groups[g]);
  });
}

// One contrast of two sides. `bound`: no similarity is larger.
template <class Element>
struct Contrast {
  using Sharp = Sharpness<Element>;

  const Kernels& run;
  const Tensor& like;
  Mode mode;
  int64_t d, start, paired;  // row i < paired has its positive in column start + i
  Sharp sharp;
  bool shared;       // 2^(s factor - offset) is in range for every s
  bool bounded;      // rounding a similarity or a loss may change a power of two a lot
  double offset;

  static constexpr Element infinity = std::numeric_limits<Element>::infinity();
  static constexpr bool is_float64 = sizeof(Element) == 8;

  Contrast(const Tensor& like, Mode mode, int64_t d, int64_t start, int64_t paired, double temperature, double bound,
           double offset)
      : run(kernels()), like(like), mode(mode), d(d), start(start), paired(paired),
        sharp(temperature),
        shared(bound * sharp.factor - offset <= (is_float64 ? 400 : 60) && bound * sharp.factor <= Sharp::kDigits),
        bounded(!(bound * sharp.factor <= Sharp::kDigits / 4)),
        offset(shared ? std::floor(offset) : 0) {}

  Tensor buffer(int64_t n) const { return make(like, {n}, scalar_type<Element>()); }

  // Those of a tile into s, with -inf for positives and padding.
  void similarities(const Side<Element>& a, const Side<Element>& b, const Tile& t, Element* s) const {
    multiply(view(s, t.rows, t.width, t.stride, 1), view(a.data + t.first * a.stride, t.rows, d, a.stride, 1),
             view(b.data + t.column * b.stride, d, t.width, 1, b.stride), false);
    for (int64_t i = 0; i < t.rows; ++i) {
      std::fill(s + i * t.stride + t.width, s + (i + 1) * t.stride, -infinity);
      if (t.first + i < paired) s[i * t.stride + start + t.first + i - t.column] = -infinity;
    }
  }

  // Numbers in the largest tile.
  int64_t largest(const std::vector<Tile>& all) const {
    int64_t size = 0;
    for (const Tile& t : all) size = std::max(size, t.rows * t.stride);
    return size;
  }

  // Losses of the rows, and in mode kBoth of the columns. `saved` (or null) takes the similarities; the rest of its
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
      ForwardTile pass{s,      t.rows,           t.stride,     is_float64,    shared,  sharp.factor,
                       offset, row_shift.data(), parts.data(), maxima.data(), nullptr, nullptr};
      if (columns) pass.column_shift = column_shift.data() + t.column, pass.column_sums = column_sums.data() + t.column;
      if (!shared)
        over_groups(t, [&](int64_t g, const Group& x) { run.maxima(pass, g, x.begin, x.end, x.columns); });
      for (int64_t i = 0; i < t.rows; ++i) {
        // In a triangle the tiles above have met this row as a column already.
        if (mode == Mode::kTriangle) sums[i] = column_sums[t.first + i];
        if (shared) continue;
        const Element before = mode == Mode::kTriangle ? column_shift[t.first + i] : -infinity;
        double now = before;
        for (size_t g = 0; g < t.groups.size(); ++g) now = std::max(now, parts[g * t.rows + i]);
        if (before < now) sums[i] *= std::exp2((before - now) * sharp.factor);
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
    if (sum == 0) return positive - positive;  // there is nobody else: 0, or NaN
    return loss_of(shared ? offset - positive * sharp.factor : (shift - positive) * sharp.steepness, sum);
  }

  // What a side's probabilities are made of, see TileSide and Powers. Padding chooses nobody.
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
      const double positive = side.positive[i], loss = side.losses[i];
      const typename Sharp::Choice choice =
          shared ? typename Sharp::Choice{0, 0, std::exp2(offset - positive * sharp.factor - loss / kLog2)}
                 : sharp.choice(positive, loss, bounded);
      found.positive[i] = side.positive[i];
      found.shift[i] = static_cast<Element>(choice.shift);
      found.offset[i] = static_cast<Element>(choice.offset);
      found.weight[i] = static_cast<Element>(choice.weight);
    }
    return found;
  }

  // scale G b into grad_a, and in mode kBoth scale G^T a into grad_b; 1/tau is in `scale`. With `add_a`, `add_b` they
  // are added to what is there. Gradients are contiguous. Returns the sum of P delta, and of R delta where columns have
  // losses.
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
      const BackwardTile pass{s, w, t.rows, t.stride, is_float64, powers, sharp.factor, offset, sharp.limit(), scale,
                              of_rows.from(t.first), of_columns.from(t.column), slope ? slopes.data() : nullptr, true};
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
                 view(w + t.rows, t.width - t.rows, t.rows, 1, t.stride), rows, add_a || later);
    }
    if (all.empty() && grad_b && !add_b) std::fill(grad_b, grad_b + b.n * d, Element(0));
    return total * sharp.factor * kLog2;
  }
};

}  // namespace
}  // namespace pmrl
