// Joint scores of all pairs of a query and a candidate: what joint_kernels.cpp makes of rows once, and loops over tiles of
// pairs. A tile is some queries and some candidates, small enough for what one thread has in cache:
//
//   q = T U^T        of a row tile T (rows, d) and a column tile U (n w, d), all n planes in one product
//   bases, scores    pass over q (joint_kernels.cpp)
//   S and sums       overwrite q; dT += S U, dC += S^T T
//
// Forward reads T and U and writes scores; backward reads these and dL/d score and adds to the sums. Tiles do not depend
// on how many threads there are, and each sum takes what tiles have for it in one order. (BLAS may still share out the
// products of a tile that is alone in its round, with other bits for other numbers of threads.)
#pragma once

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "products.h"

namespace pmrl {
namespace {

// For d = 512, n = 2 to 4, products of such tiles take a thread as long as one product of all (AVX-512, 1 MB of L2).
constexpr int64_t kJointRows = 256;
constexpr int64_t kJointColumns = 128;

// Pairs of a row tile and a column tile.
struct JointPlace {
  int64_t row, rows, column, columns, width;  // `width`: columns with padding
};

// Rows [first, Nq) in row tiles, and column tiles that hold [begin, Ng). The pairs of a row tile and a column tile come
// in rounds: of one round no two share rows or columns.
struct JointGrid {
  int64_t first, Nq, begin, Ng, all, height, width, down, across;

  JointGrid(int64_t Nq, int64_t Ng) : JointGrid(0, Nq, 0, Ng, Ng, std::min(kJointColumns, padded(Ng))) {}
  JointGrid(int64_t first, int64_t Nq, int64_t begin, int64_t Ng, int64_t all, int64_t width)
      : first(first), Nq(Nq), begin(width ? begin / width * width : 0), Ng(Ng), all(all), width(width) {
    const int64_t rows = Nq - first;
    down = (rows + kJointRows - 1) / kJointRows;
    if (down > 1) down += down % 2;  // evenly, for two threads
    height = down ? (rows + down - 1) / down : 0;
    down = height ? (rows + height - 1) / height : 0;
    across = width && Ng > begin ? (Ng - this->begin + width - 1) / width : 0;
  }
  // Of some queries and some candidates, in the same column tiles.
  JointGrid part(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    return {first, last, begin, end, all, width};
  }
  int64_t rounds() const { return std::min(down, across) ? std::max(down, across) : 0; }
  JointPlace at(int64_t i, int64_t j) const {
    const int64_t row = first + i * height, column = begin + j * width, columns = std::min(width, all - column);
    return {row, std::min(height, Nq - row), column, columns, padded(columns)};
  }
  int64_t number(const JointPlace& at) const { return (at.row - first) / height * across + (at.column - begin) / width; }
  int64_t size() const { return height * width; }

  // function(place, scratch) for all tiles in any order; `prepare` makes the scratch of one thread.
  template <class Prepare, class Function>
  void everywhere(Prepare prepare, Function function) const {
    Idle<decltype(prepare())> idle;
    share_out(down * across, idle, prepare, [&](int64_t t, auto& scratch) { function(at(t % down, t / down), scratch); });
  }
  // The same, one round after the other.
  template <class Prepare, class Function>
  void by_rounds(Prepare prepare, Function function) const {
    const int64_t each = std::min(down, across), all = rounds();
    Idle<decltype(prepare())> idle;
    for (int64_t round = 0; round < all; ++round)
      share_out(each, idle, prepare, [&](int64_t t, auto& scratch) {
        const int64_t other = (t + round) % all;
        function(down <= across ? at(t, other) : at(other, t), scratch);
      });
  }

 private:
  // Scratch that no thread is using. Making it anew for every round would cost up to 7 % of a backward pass, in pages.
  template <class Scratch>
  struct Idle {
    std::mutex mutex;
    std::vector<Scratch> all;
  };
  template <class Scratch, class Prepare, class Function>
  static void share_out(int64_t n, Idle<Scratch>& idle, Prepare& prepare, Function function) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      std::optional<Scratch> scratch;
      {
        const std::lock_guard<std::mutex> lock(idle.mutex);
        if (!idle.all.empty()) {
          scratch.emplace(std::move(idle.all.back()));
          idle.all.pop_back();
        }
      }
      if (!scratch) scratch.emplace(prepare());
      for (int64_t t = begin; t < end; ++t) function(t, *scratch);
      const std::lock_guard<std::mutex> lock(idle.mutex);
      idle.all.push_back(std::move(*scratch));
    });
  }
};

// Arguments, and what is made of them once.
template <class Element>
struct Joint {
  static constexpr bool is_float64 = sizeof(Element) == 8;
  const JointKernels& run;
  int lanes;
  const Tensor& like;
  JointBatch batch;
  JointGrid grid;
  int64_t columns;  // candidates, with padding
  std::vector<Tensor> held;

  Joint(const Kernels& kernels, const Tensor& like, JointBatch given)
      : run(*kernels.joint), lanes(kernels.lanes), like(like), batch(given), grid(given.Nq, given.Ng),
        columns(padded(given.Ng)) {
    batch.width = grid.width;
    batch.is_float64 = is_float64;
    batch.T = memory<Element>(batch.Nq * batch.d);
    batch.beta = memory<Element>(batch.Nq);
    batch.query_norms = memory<double>(batch.Nq * 3);
    batch.U = memory<Element>(batch.n * columns * batch.d);
    batch.constants = memory<Element>(joint_constants(batch.n) * columns);
    batch.norms = memory<double>(batch.Ng * batch.n * 2);
  }

  template <class Number>
  Number* memory(int64_t n) {
    held.push_back(make(like, {n}, scalar_type<Number>()));
    return static_cast<Number*>(held.back().mutable_data_ptr());
  }
  template <class Number>
  Number* zeros(int64_t n) {
    Number* data = memory<Number>(n);
    std::fill(data, data + n, Number(0));
    return data;
  }

  // function(batch with scratch, begin, end) for ranges of [0, n).
  template <class Function>
  void over(int64_t n, int64_t grain, Function function) const {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      const Tensor scratch = make(like, {joint_scratch(batch.n, batch.d)}, ScalarType::Double);
      JointBatch own = batch;
      own.scratch = static_cast<double*>(scratch.mutable_data_ptr());
      function(own, begin, end);
    });
  }
  int64_t grain() const { return std::max<int64_t>(1, 16384 / (batch.d * batch.n)); }

  // `decomposed` is written, or read.
  void prepare(double* decomposed, bool decompose) {
    batch.decomposed = decomposed;
    if (batch.Ng % kTilePadding) {  // the padding of the last tile
      const JointPlace last = grid.at(0, grid.across - 1);
      Element* u = basis(last);
      std::fill(u, u + batch.n * last.width * batch.d, Element(0));
      Element* c = constants(last);
      std::fill(c, c + joint_constants(batch.n) * last.width, Element(0));
    }
    over(batch.Nq, grain() * batch.n,
         [&](const JointBatch& b, int64_t begin, int64_t end) { run.prepare_queries(b, begin, end); });
    over((batch.Ng + lanes - 1) / lanes, 1, [&](const JointBatch& b, int64_t begin, int64_t end) {
      run.prepare_candidates(b, decompose, begin, end);
    });
  }

  // Whether all numbers that scores are made of are such that their products are within float32's range.
  bool moderate() const {
    const auto within = [](double x, double most) { return !(x > most) && !(x > 0 && x < 1 / most); };
    constexpr double square = 0x1p50, volume = 0x1p76;
    bool found = true;
    for (int64_t i = 0; i < batch.Nq; ++i) found = found && within(batch.query_norms[3 * i + 2], square);
    for (int64_t j = 0; j < batch.Ng; ++j) {
      const double* mu = batch.decomposed + j * (batch.n + batch.n * batch.n);
      if (batch.score == Score::kArea2) {  // the squares of the direction and of the middle
        const JointPlace at = grid.at(0, j / grid.width);
        const double middle = constants(at)[(2 * batch.n + 1) * at.width + j - at.column];
        found = found && within(mu[1], square) && within(middle, square);
      } else if (batch.score != Score::kDot) {
        double det = 1.0;
        for (int m = 0; m < batch.n; ++m) det *= mu[m] < 0 ? 1.0 : mu[m];
        found = found && within(mu[0], square);
        if (batch.score == Score::kVolume) found = found && within(std::sqrt(det), volume);
        if (batch.score == Score::kVolume2) found = found && within(det, volume);
      }
    }
    return found;
  }

  Element* rows(const JointPlace& at) const { return static_cast<Element*>(batch.T) + at.row * batch.d; }
  Element* basis(const JointPlace& at) const {
    return static_cast<Element*>(batch.U) + at.column * batch.n * batch.d;
  }
  Element* constants(const JointPlace& at) const {
    return static_cast<Element*>(batch.constants) + at.column * joint_constants(batch.n);
  }

  // What a thread needs for a tile of a grid.
  struct Room {
    Tensor numbers, places, doubles;
    Element *q, *base, *weights, *moments;
    int32_t* near;
    std::vector<JointPair> pairs;
  };
  Room room(const JointGrid& grid) const {
    const int64_t size = grid.size(), planes = triangle_size(batch.n) + 1;
    Room found;
    found.numbers = make(like, {(batch.n + 2) * size + planes * grid.width}, scalar_type<Element>());
    found.places = make(like, {is_float64 ? 0 : size}, ScalarType::Float);  // as wide as int32
    found.doubles = make(like, {joint_pair_scratch(batch.n, batch.d)}, ScalarType::Double);
    found.q = static_cast<Element*>(found.numbers.mutable_data_ptr());
    found.base = found.q + batch.n * size;
    found.weights = found.base + size;
    found.moments = found.weights + size;
    found.near = static_cast<int32_t*>(found.places.mutable_data_ptr());
    return found;
  }
  JointBatch with_scratch(const Room& room) const {
    JointBatch own = batch;
    own.scratch = static_cast<double*>(room.doubles.mutable_data_ptr());
    return own;
  }

  // q and bases of a tile; near copies' anew, in float64, which `room.pairs` then has.
  JointTile bases(const JointPlace& at, Room& room) const {
    JointTile t{batch.score, batch.n, is_float64, at.rows, at.width, room.q, room.base,
                static_cast<const Element*>(batch.beta) + at.row, constants(at), room.near, nullptr, 0, nullptr,
                room.moments};
    const int64_t wide = batch.n * at.width, d = batch.d;
    multiply(view(room.q, at.rows, wide, wide, 1), view(rows(at), at.rows, d, d, 1), view(basis(at), d, wide, 1, d),
             false);
    room.pairs.clear();
    if (batch.score == Score::kDot) {
      t.base = room.q;
      return t;
    }
    const int64_t count = run.bases(t);
    for (int64_t p = 0; p < count; ++p)
      room.pairs.push_back({at.row + room.near[p] / at.width, at.column + room.near[p] % at.width, 0, 0, 0});
    if (count) run.pairs(with_scratch(room), room.pairs.data(), count);
    for (int64_t p = 0; p < count; ++p) room.base[room.near[p]] = static_cast<Element>(room.pairs[p].base);
    return t;
  }

  void forward(Element* out) const {
    grid.everywhere([&] { return room(grid); }, [&](const JointPlace& at, Room& room) {
      run.scores(bases(at, room), at.columns, out + at.row * batch.Ng + at.column, batch.Ng);
    });
  }

  // Sums of gradients, zeros.
  JointSums sums(bool queries, bool candidates) {
    JointSums found{};
    found.own = zeros<double>(batch.Nq);
    found.moments = zeros<double>((triangle_size(batch.n) + 1) * columns);
    if (queries) found.dT = zeros<Element>(batch.Nq * batch.d);
    if (candidates) found.dC = zeros<Element>(batch.n * columns * batch.d);
    return found;
  }

  // Adds to the sums what a tile has for them, dL/d score being in t.weights.
  void add(const JointTile& tile, const JointPlace& at, const JointSums& sums, Room& room) const {
    JointTile t = tile;
    const int64_t planes = triangle_size(batch.n) + 1, wide = batch.n * at.width, d = batch.d;
    if (batch.score == Score::kDot) {
      for (int64_t i = 0; i < at.rows; ++i)
        std::copy_n(static_cast<const Element*>(t.weights) + i * t.stride, at.width, room.q + i * at.width);
    } else {
      std::fill(room.moments, room.moments + planes * at.width, Element(0));
      t.own = sums.own + at.row;
      run.gradients(t);
      double* total = sums.moments + at.column * planes;
      for (int64_t p = 0; p < planes * at.width; ++p) total[p] += room.moments[p];
      add_near(t, at, sums, room);
    }
    const Tensor S = view(room.q, at.rows, wide, wide, 1), St = view(room.q, wide, at.rows, 1, wide);
    if (sums.dT)
      multiply(view(static_cast<Element*>(sums.dT) + at.row * d, at.rows, d, d, 1), S, view(basis(at), wide, d, d, 1),
               true);
    if (sums.dC)
      multiply(view(static_cast<Element*>(sums.dC) + at.column * batch.n * d, wide, d, d, 1), St,
               view(rows(at), at.rows, d, d, 1), true);
  }

  // Near copies that run.gradients left out.
  void add_near(const JointTile& t, const JointPlace& at, const JointSums& sums, Room& room) const {
    if (batch.score != Score::kVolume && batch.score != Score::kSine) return;
    int64_t count = 0;
    const Element* beta = static_cast<const Element*>(t.beta);
    for (JointPair pair : room.pairs) {
      const int64_t i = pair.i - at.row, j = pair.j - at.column;
      if (!(room.base[i * at.width + j] < beta[i] * Element(0x1p-10))) continue;
      pair.weight = static_cast<const Element*>(t.weights)[i * t.stride + j];
      room.pairs[count++] = pair;
    }
    if (count) run.pair_gradients(with_scratch(room), sums, room.pairs.data(), count);
  }

  // Gradients of queries [first, last) and candidates [begin, end), from row 0 of the outputs on.
  void finish(JointSums sums, int64_t first, int64_t last, int64_t begin, int64_t end) const {
    sums.query.data -= sums.query.data ? first * sums.query.stride : 0;
    for (Rows& x : sums.candidates) x.data -= x.data ? begin * x.stride : 0;
    if (sums.query.data)
      over(last - first, grain() * batch.n, [&](const JointBatch& b, int64_t from, int64_t to) {
        run.finish_queries(b, sums, first + from, first + to);
      });
    if (sums.dC)
      over(end - begin, grain(), [&](const JointBatch& b, int64_t from, int64_t to) {
        run.finish_candidates(b, sums, begin + from, begin + to);
      });
  }

  void backward(const Tensor& grad, JointSums& sums) const {
    const Element* from = static_cast<const Element*>(grad.const_data_ptr());
    const int64_t stride = batch.Nq > 1 ? grad.stride(0) : batch.Ng;
    grid.by_rounds([&] { return room(grid); }, [&](const JointPlace& at, Room& room) {
      JointTile t = bases(at, room);
      const Element* weights = from + at.row * stride + at.column;
      t.weights = weights;
      t.stride = stride;
      if (at.columns < at.width) {  // the padding has none
        for (int64_t i = 0; i < at.rows; ++i) {
          Element* row = std::copy_n(weights + i * stride, at.columns, room.weights + i * at.width);
          std::fill(row, row + at.width - at.columns, Element(0));
        }
        t.weights = room.weights;
        t.stride = at.width;
      }
      add(t, at, sums, room);
    });
    finish(sums, 0, batch.Nq, 0, batch.Ng);
  }
};

// ---- arguments of operators --------------------------------------------------------------------

// Tensors that a batch points into.
struct HeldJoint {
  Tensor query;
  std::vector<Tensor> candidates;
  std::optional<Tensor> mask;
};

// Everything but what Joint makes.
JointBatch make_joint(const Tensor& query, const std::vector<Tensor>& candidates, const std::optional<Tensor>& mask,
                      int64_t score, bool normalize, bool contrast, HeldJoint& held) {
  const Embeddings all = check_embeddings(candidates);
  const Dtype dtype = dtype_of(query);
  STD_TORCH_CHECK(query.dim() == 2 && query.size(1) == all.d, "pmrl_kernels: query must be (Nq, d), as candidates are");
  STD_TORCH_CHECK(all.d > 0, "pmrl_kernels: embeddings must have a dimension");
  STD_TORCH_CHECK(all.k < kMaxModalities, "pmrl_kernels: candidates must be of at most ", kMaxModalities - 1,
                  " modalities");
  check_joint_score(score, all.k, mask.has_value(), contrast);
  JointBatch batch{};
  batch.Nq = query.size(0);
  batch.Ng = all.B;
  batch.d = all.d;
  batch.n = static_cast<int>(all.k);
  batch.score = static_cast<Score>(score);
  batch.normalize = normalize;
  batch.is_float64 = batch.float64_input = all.float64_input || dtype == Dtype::kFloat64;
  const auto rows = [](const Tensor& x, int64_t m) {
    const int64_t element = x.element_size();
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    return Rows{data + (x.dim() == 3 ? m * x.stride(1) * element : 0), x.stride(0) * element, dtype_of(x)};
  };
  held.query = with_rows(query);
  batch.query = rows(held.query, 0);
  for (const Tensor& x : candidates) held.candidates.push_back(with_rows(x));
  for (int64_t m = 0; m < all.k; ++m) batch.candidates[m] = rows(held.candidates[all.stacked ? 0 : m], m);
  if (mask) {
    check_mask(*mask, all.B, all.k);
    held.mask = torch::stable::contiguous(*mask);
    batch.mask = mask_data(*held.mask);
  }
  return batch;
}

int64_t joint_state_size(const JointBatch& b) { return b.Ng * (b.n + b.n * b.n); }

// function(Joint of the batch, prepared), in the dtype of its outputs; in float64 where squares of norms have products
// that float32 does not hold, and where factors are rounded: volumes are what is left of sums of products.
template <class Function>
void prepared(const Tensor& like, const JointBatch& batch, double* decomposed, bool decompose, Function function) {
  if (!batch.is_float64 && !rounds_factors()) {
    Joint<float> joint(kernels(), like, batch);
    joint.prepare(decomposed, decompose);
    if (batch.normalize || joint.moderate()) return function(joint);
  }
  Joint<double> joint(kernels(), like, batch);
  joint.prepare(decomposed, decompose);
  function(joint);
}

}  // namespace
}  // namespace pmrl
