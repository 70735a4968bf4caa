// The contrast of joint scores for CPU tensors: cross-entropy over s_ij = sign score_ij / tau in both directions, without
// the matrix. With p(i) the positive of query i, s_i+ its score, s_j+ = log sum exp s_ij over the queries whose positive
// is j,
//
//   l_i = log(1 + sum_{j != p(i)} exp(s_ij - s_i+))          l_j = log(1 + sum_{i: p(i) != j} exp(s_ij - s_j+))
//   loss = half the mean of l_i + eps (s_i+ - mean_j s_ij), and half that of the columns
//
//   joint_contrast_forward    reads rows and positives; writes the loss, l_i and l_j, and the state of joint_forward
//   joint_contrast_backward   reads these; writes gradients of rows and dL/d tau
//
// Both pass over tiles of scores (joint.h) as the other contrasts do (contrast_kernels.h: maxima, sums, weights), the
// entries of positives being -inf there: they are pairs by themselves, in float64.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "choices.h"
#include "joint.h"

namespace pmrl {
namespace {

constexpr double kSigns[] = {-1, -1, -1, 1, 1, 1, -1, 1};  // of scores: 1 where the largest is best

// Of one direction: numbers of each of its rows, or columns.
template <class Element>
struct Direction {
  std::vector<char> seen, counted;  // may be chosen, has a loss
  std::vector<double> positive;     // sign score, not yet over tau
  std::vector<double> losses;
  std::vector<Element> shift;       // forward: the largest sign score so far. backward: see TileSide
  std::vector<double> sums, totals;  // of powers relative to it; of sign score
  std::vector<Element> wide_positive, weight, offset;
  int64_t number = 0, choices = 0;  // how many have a loss, and how many the other direction may choose

  void begin(int64_t n) {
    shift.assign(n, -std::numeric_limits<Element>::infinity());
    sums.assign(n, 0.0);
  }
  double mean_over() const { return std::max<int64_t>(1, number); }
};

struct ContrastArguments {
  std::optional<Tensor> positives;
  int64_t first, last, begin, end;
  double smoothing, temperature;
};

// Of each query its candidate, -1 if it has none or that one has no modalities; and which queries take part: those of
// candidates without modalities do not.
struct Roles {
  std::vector<int64_t> positive;
  std::vector<char> there, seen;

  Roles(const JointBatch& b, const std::optional<Tensor>& positives) : positive(b.Nq, -1), there(b.Ng, 0), seen(b.Nq, 1) {
    for (int64_t j = 0; j < b.Ng; ++j)
      for (int m = 0; m < b.n && !there[j]; ++m) there[j] = is_present(b.mask, j * b.n + m);
    std::optional<Tensor> contiguous;
    if (positives) contiguous = torch::stable::contiguous(*positives);
    for (int64_t i = 0; i < b.Nq; ++i) {
      const int64_t at = contiguous ? static_cast<const int64_t*>(contiguous->const_data_ptr())[i] : i;
      if (at < 0 || at >= b.Ng) continue;
      seen[i] = there[at];
      if (seen[i]) positive[i] = at;
    }
  }
};

template <class Element>
struct JointContrast {
  static constexpr Element infinity = std::numeric_limits<Element>::infinity();

  Joint<Element>& joint;
  const Kernels& passes;
  const JointBatch& batch;
  const ContrastArguments& x;
  double sign;
  Sharpness<Element> sharp;
  bool whole;  // this process has everyone's losses
  std::vector<int64_t> positive;  // of each query, -1: none
  std::vector<JointPair> pairs;   // queries with their positives
  Direction<Element> rows, columns;

  JointContrast(Joint<Element>& joint, const ContrastArguments& x, const Roles& roles)
      : joint(joint), passes(kernels()), batch(joint.batch), x(x), sign(kSigns[static_cast<int>(batch.score)]),
        sharp(x.temperature),
        whole(x.first == 0 && x.last == batch.Nq && x.begin == 0 && x.end == batch.Ng) {
    const int64_t Nq = batch.Nq, Ng = batch.Ng;
    columns.seen = roles.there;
    columns.counted.assign(Ng, 0);
    columns.positive.assign(Ng, 0.0);
    rows.seen = roles.seen;
    rows.counted.assign(Nq, 0);
    rows.positive.assign(Nq, 0.0);
    positive = roles.positive;
    for (int64_t i = 0; i < Nq; ++i) {
      if (positive[i] < 0) continue;
      rows.counted[i] = columns.counted[positive[i]] = 1;
      pairs.push_back({i, positive[i], 0, 0, 0});
    }
    const auto count = [](const std::vector<char>& flags) { return std::count(flags.begin(), flags.end(), 1); };
    rows.number = count(rows.counted);
    columns.number = count(columns.counted);
    rows.choices = count(columns.seen);
    columns.choices = count(rows.seen);
  }

  // The scores of positives, in float64.
  void score_positives() {
    joint.over(static_cast<int64_t>(pairs.size()), joint.grain(), [&](const JointBatch& b, int64_t begin, int64_t end) {
      joint.run.pairs(b, pairs.data() + begin, end - begin);
    });
    std::vector<double> largest(batch.Ng, -HUGE_VAL), sum(batch.Ng, 0.0);
    for (const JointPair& p : pairs) {
      rows.positive[p.i] = sign * p.score;
      largest[p.j] = std::max(largest[p.j], sign * p.score);
    }
    for (const JointPair& p : pairs) sum[p.j] += std::exp((sign * p.score - largest[p.j]) / x.temperature);
    for (int64_t j = 0; j < batch.Ng; ++j)
      if (columns.counted[j]) columns.positive[j] = largest[j] + x.temperature * std::log(sum[j]);
  }

  // sign score of a tile into room.weights, -inf for positives, padding and whoever may not be chosen. With smoothing the
  // sums of the others are added to totals.
  JointTile similarities(const JointPlace& at, typename Joint<Element>::Room& room, bool totals) {
    JointTile t = joint.bases(at, room);
    Element* s = room.weights;
    if (batch.score == Score::kDot)
      std::copy_n(room.q, at.rows * at.width, s);
    else
      joint.run.scores(t, at.width, s, at.width);
    alignas(64) Element hidden[kJointColumns];  // 0, or -inf
    for (int64_t j = 0; j < at.width; ++j)
      hidden[j] = j < at.columns && columns.seen[at.column + j] ? Element(0) : -infinity;
    const Element factor = static_cast<Element>(sign);
    for (int64_t i = 0; i < at.rows; ++i) {
      Element* row = s + i * at.width;
      const int64_t own = positive[at.row + i] - at.column;
      if (!rows.seen[at.row + i]) {
        std::fill(row, row + at.width, -infinity);
        continue;
      }
      for (int64_t j = 0; j < at.width; ++j) row[j] = hidden[j] == 0 ? factor * row[j] : -infinity;
      if (positive[at.row + i] >= 0 && own >= 0 && own < at.width) row[own] = -infinity;
      if (!totals) continue;
      Element part[kTilePadding] = {};
      for (int64_t j = 0; j < at.width; j += kTilePadding)
        for (int64_t lane = 0; lane < kTilePadding; ++lane) {
          const Element y = row[j + lane] == -infinity ? Element(0) : row[j + lane];
          part[lane] += y;
          columns.totals[at.column + j + lane] += y;
        }
      double total = 0;
      for (Element y : part) total += y;
      rows.totals[at.row + i] += total;
    }
    return t;
  }

  // Rows [first, last) and the columns of whole tiles that hold [begin, end), as a grid of its own.
  JointGrid rectangle(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    return joint.grid.part(first, last, begin, end);
  }

  void begin_totals() {
    rows.totals.assign(batch.Nq, 0.0);
    columns.totals.assign(padded(batch.Ng), 0.0);
  }

  void sum_over(const JointGrid& grid) {
    grid.by_rounds([&] { return joint.room(grid); }, [&](const JointPlace& at, auto& room) {
      similarities(at, room, x.smoothing != 0);
      std::vector<Element> maxima(at.width);
      std::vector<double> parts(at.rows);
      ForwardTile pass{room.weights, at.rows, at.width, joint.is_float64, false, sharp.factor, 0.0,
                       rows.shift.data() + at.row, parts.data(), maxima.data(), columns.shift.data() + at.column,
                       columns.sums.data() + at.column};
      passes.maxima(pass, 0, 0, at.width, true);
      std::vector<Element> shifts(at.rows);
      for (int64_t i = 0; i < at.rows; ++i) {
        Element& before = rows.shift[at.row + i];
        const Element now = std::max(before, static_cast<Element>(parts[i]));
        if (before < now) rows.sums[at.row + i] *= std::exp2((double(before) - now) * sharp.factor);
        before = now;
        shifts[i] = now == -infinity ? Element(0) : now;
      }
      pass.row_shift = shifts.data();
      passes.sums(pass, 0, 0, at.width, true);
      for (int64_t i = 0; i < at.rows; ++i) rows.sums[at.row + i] += parts[i];
    });
  }

  // l, and what smoothing adds, of [begin, end): the sum of both.
  double lose(Direction<Element>& side, int64_t begin, int64_t end, double* out) const {
    double total = 0;
    for (int64_t i = begin; i < end; ++i) {
      out[i - begin] = 0;
      if (!side.counted[i]) continue;
      const double p = side.positive[i], shift = side.shift[i] == -infinity ? 0.0 : double(side.shift[i]);
      out[i - begin] = side.sums[i] == 0 ? p - p : loss_of((shift - p) * sharp.steepness, side.sums[i]);
      total += out[i - begin];
      if (x.smoothing != 0) total += x.smoothing * (p - side.totals[i] / side.choices) / x.temperature;
    }
    return total / side.mean_over() / 2;
  }

  double forward(double* row_losses, double* column_losses) {
    score_positives();
    begin_totals();
    rows.begin(batch.Nq);
    columns.begin(padded(batch.Ng));
    double total = 0;
    const auto add_positives = [&] {
      for (const JointPair& p : pairs) {
        rows.totals[p.i] += sign * p.score;
        columns.totals[p.j] += sign * p.score;
      }
    };
    sum_over(rectangle(x.first, x.last, 0, batch.Ng));
    add_positives();
    total += lose(rows, x.first, x.last, row_losses);
    if (!whole) {
      begin_totals();
      rows.begin(batch.Nq);
      columns.begin(padded(batch.Ng));
      sum_over(rectangle(0, batch.Nq, x.begin, x.end));
      add_positives();
    }
    total += lose(columns, x.begin, x.end, column_losses);
    return total * (x.temperature / x.temperature);
  }

  // What contrast_kernels.h's weights reads of one direction, [begin, end) of it; the others, and whoever has no loss,
  // choose nobody.
  void choose(Direction<Element>& side, int64_t n, int64_t begin, int64_t end, double scale) const {
    side.shift.assign(n, 0);
    side.weight.assign(n, 0);
    side.wide_positive.assign(n, 0);
    side.offset.assign(n, infinity);
    for (int64_t i = begin; i < end; ++i) {
      if (!side.counted[i]) continue;
      const auto choice = sharp.choice(side.positive[i], side.losses[i], true);
      side.wide_positive[i] = static_cast<Element>(side.positive[i]);
      side.shift[i] = static_cast<Element>(choice.shift);
      side.offset[i] = static_cast<Element>(choice.offset);
      side.weight[i] = static_cast<Element>(scale * choice.weight);
    }
  }
  static TileSide side_of(const Direction<Element>& side, int64_t at) {
    return {side.wide_positive.data() + at, side.shift.data() + at, side.weight.data() + at, side.offset.data() + at};
  }

  // What a pass over tiles is to find of sum (s - s+) dL/ds: that of own rows' losses, that of own columns'.
  struct Slope {
    bool rows, columns;
    double found = 0;
  };

  // Adds to the sums, if they are of anything, what a pass has for them, and to the slope. Over own rows and all columns,
  // or over all rows and own columns; a, b: of the rows' and columns' losses, 0 where they do not count.
  void weigh(bool of_rows, double a, double b, const JointSums& sums, Slope& slope) {
    const JointGrid grid = of_rows ? rectangle(x.first, x.last, 0, batch.Ng) : rectangle(0, batch.Nq, x.begin, x.end);
    choose(rows, batch.Nq, 0, batch.Nq, a);
    choose(columns, padded(batch.Ng), of_rows ? 0 : x.begin, of_rows ? batch.Ng : x.end, b);
    const double row_rest = a * x.smoothing / std::max<int64_t>(1, rows.choices);
    const double column_rest = b * x.smoothing / std::max<int64_t>(1, columns.choices);
    const bool smooth = row_rest != 0 || column_rest != 0, sloping = slope.rows || slope.columns;
    std::vector<double> parts(sloping ? grid.down * grid.across : 0, 0.0);
    begin_totals();
    grid.by_rounds([&] { return joint.room(grid); }, [&](const JointPlace& at, auto& room) {
      JointTile t = similarities(at, room, sloping && x.smoothing != 0);
      Element* w = room.weights;
      std::vector<char> hidden;
      if (smooth) {
        hidden.resize(at.rows * at.width);
        for (int64_t e = 0; e < at.rows * at.width; ++e) hidden[e] = w[e] == -infinity;
      }
      const BackwardTile pass{w, w, at.rows, at.width, joint.is_float64, Powers::kBounded, sharp.factor, 0.0,
                              sharp.limit(), sign, side_of(rows, at.row), side_of(columns, at.column),
                              sloping ? &parts[grid.number(at)] : nullptr, slope.rows};
      passes.weights(pass, 0, 0, at.width, slope.columns);
      if (!sums.dT && !sums.dC) return;
      for (int64_t i = 0; smooth && i < at.rows; ++i) {
        const double own = rows.counted[at.row + i] ? row_rest : 0.0;
        for (int64_t j = 0; j < at.columns; ++j) {
          const double rest = own + (columns.counted[at.column + j] ? column_rest : 0.0);
          if (!hidden[i * at.width + j]) w[i * at.width + j] -= static_cast<Element>(sign * rest);
        }
      }
      t.weights = w;
      t.stride = at.width;
      joint.add(t, at, sums, room);
    });
    std::vector<JointPair> list;
    for (JointPair p : pairs) {
      const double s = sign * p.score, share = std::exp((s - columns.positive[p.j]) / x.temperature);
      const double of_row = a * (std::expm1(-rows.losses[p.i]) + x.smoothing);
      const double of_column = b * share * (std::expm1(-columns.losses[p.j]) + x.smoothing);
      rows.totals[p.i] += s;
      columns.totals[p.j] += s;
      // A row's positive is its s+ itself.
      if (slope.columns && p.j >= x.begin && p.j < x.end && s != columns.positive[p.j])
        slope.found += of_column * (s - columns.positive[p.j]);
      if (p.i < grid.first || p.i >= grid.Nq || p.j < grid.begin || p.j >= grid.Ng) continue;
      p.weight = sign * (of_row - row_rest + of_column - column_rest);
      list.push_back(p);
    }
    for (double part : parts) slope.found += part;
    if (slope.rows) slope.found -= rest_of(rows, x.first, x.last, a);
    if (slope.columns) slope.found -= rest_of(columns, x.begin, x.end, b);
    if (!sums.dT && !sums.dC) return;
    // One after the other, since several may be of one candidate.
    joint.over(1, 1, [&](const JointBatch& own, int64_t, int64_t) {
      joint.run.pair_gradients(own, sums, list.data(), static_cast<int64_t>(list.size()));
    });
  }

  // sum eps (mean s - s+) of [begin, end), times scale.
  double rest_of(const Direction<Element>& side, int64_t begin, int64_t end, double scale) const {
    double found = 0;
    for (int64_t i = begin; i < end && x.smoothing != 0; ++i)
      if (side.counted[i]) found += scale * x.smoothing * (side.totals[i] / side.choices - side.positive[i]);
    return found;
  }
};

// The arguments that contrasts have beyond scores'.
ContrastArguments read_contrast(const JointBatch& batch, const std::optional<Tensor>& positives,
                                std::vector<int64_t> own, double smoothing,
                                const std::optional<Tensor>& temperature, double fixed) {
  using limits = std::numeric_limits<float>;
  if (own.empty()) own = {0, batch.Nq, 0, batch.Ng};
  STD_TORCH_CHECK(own.size() == 4 && 0 <= own[0] && own[0] <= own[1] && own[1] <= batch.Nq && 0 <= own[2] &&
                      own[2] <= own[3] && own[3] <= batch.Ng,
                  "pmrl_kernels: own must be queries [first, last) and candidates [begin, end), or nothing");
  STD_TORCH_CHECK(positives ? positives->scalar_type() == ScalarType::Long && has_sizes(*positives, {batch.Nq})
                            : batch.Nq == batch.Ng,
                  "pmrl_kernels: positives must be an int64 tensor (Nq,), or Nq be Ng");
  return {positives, own[0], own[1], own[2], own[3], smoothing,
          read_temperature(temperature, fixed, limits::min(), limits::max())};
}

// (loss, row losses, column losses, state)
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> joint_contrast_forward(
    Tensor query, std::vector<Tensor> candidates, std::optional<Tensor> mask, std::optional<Tensor> positives,
    std::vector<int64_t> own, int64_t score, bool normalize, double smoothing, std::optional<Tensor> temperature,
    double fixed_temperature) {
  HeldJoint held;
  JointBatch batch = make_joint(query, candidates, mask, score, normalize, true, held);
  const ContrastArguments x = read_contrast(batch, positives, own, smoothing, temperature, fixed_temperature);
  const Roles roles(batch, positives);
  batch.seen = roles.seen.data();
  Tensor loss = make(query, {}, float_dtype(batch.is_float64));
  Tensor of_rows = make(query, {x.last - x.first}, ScalarType::Double);
  Tensor of_columns = make(query, {x.end - x.begin}, ScalarType::Double);
  Tensor state = make(query, {batch.Ng, batch.n + batch.n * batch.n}, ScalarType::Double);
  prepared(query, batch, static_cast<double*>(state.mutable_data_ptr()), true, [&](auto& joint) {
    using Element = std::remove_pointer_t<decltype(joint.rows(JointPlace{}))>;
    JointContrast<Element> contrast(joint, x, roles);
    const double found = contrast.forward(static_cast<double*>(of_rows.mutable_data_ptr()),
                                          static_cast<double*>(of_columns.mutable_data_ptr()));
    if (batch.is_float64)
      *static_cast<double*>(loss.mutable_data_ptr()) = found;
    else
      *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(found);
  });
  return {loss, of_rows, of_columns, {state}};
}

// Gradients of own queries and own candidates, (0,) for those that need none, and of the temperature.
std::vector<Tensor> joint_contrast_backward(
    Tensor query, std::vector<Tensor> candidates, std::optional<Tensor> mask, std::optional<Tensor> positives,
    std::vector<int64_t> own, int64_t score, bool normalize, double smoothing, std::optional<Tensor> temperature,
    double fixed_temperature, Tensor row_losses, Tensor column_losses, std::vector<Tensor> state, Tensor grad,
    bool half, std::vector<bool> needed) {
  HeldJoint held;
  JointBatch batch = make_joint(query, candidates, mask, score, normalize, true, held);
  const ContrastArguments x = read_contrast(batch, positives, own, smoothing, temperature, fixed_temperature);
  const Roles roles(batch, positives);
  batch.seen = roles.seen.data();
  STD_TORCH_CHECK(state.size() == 1, "pmrl_kernels: state is not that of this batch");
  check_state(state[0], joint_state_size(batch), ScalarType::Double);
  STD_TORCH_CHECK(needed.size() == 1 + candidates.size(), "pmrl_kernels: needed must name each embedding");
  check_losses(row_losses, {batch.Nq});
  check_losses(column_losses, {batch.Ng});
  check_scalar_gradient(grad);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(grad, ScalarType::Double));
  const double scale = *static_cast<const double*>(wide.const_data_ptr());
  const Tensor of_rows = torch::stable::contiguous(row_losses), of_columns = torch::stable::contiguous(column_losses);

  std::vector<Tensor> found;
  Rows to_query[1] = {}, to_candidates[kMaxModalities] = {};
  const auto own_of = [](Tensor like, int64_t n) { return torch::stable::narrow(like, 0, 0, n); };  // as many rows
  std::vector<Tensor> own_candidates;
  for (const Tensor& y : candidates) own_candidates.push_back(own_of(y, x.end - x.begin));
  const bool any_query = make_gradients({own_of(query, x.last - x.first)}, {needed[0]}, to_query, found);
  const bool any_candidate =
      make_gradients(own_candidates, std::vector<bool>(needed.begin() + 1, needed.end()), to_candidates, found);
  Tensor slope = make(query, {}, ScalarType::Double);
  double& tau_gradient = *static_cast<double*>(slope.mutable_data_ptr());
  tau_gradient = 0;
  double* decomposed = static_cast<double*>(const_cast<void*>(state[0].const_data_ptr()));
  prepared(query, batch, decomposed, false, [&](auto& joint) {
    using Element = std::remove_pointer_t<decltype(joint.rows(JointPlace{}))>;
    JointContrast<Element> contrast(joint, x, roles);
    contrast.score_positives();
    const double *l_rows = static_cast<const double*>(of_rows.const_data_ptr()),
                 *l_columns = static_cast<const double*>(of_columns.const_data_ptr());
    contrast.rows.losses.assign(l_rows, l_rows + batch.Nq);
    contrast.columns.losses.assign(l_columns, l_columns + batch.Ng);
    const double a = scale / 2 / contrast.rows.mean_over(), b = scale / 2 / contrast.columns.mean_over();
    const double tau = x.temperature;
    typename JointContrast<Element>::Slope rest{temperature.has_value(), temperature.has_value()};  // not found yet
    double total = 0;
    // One pass has everything where both losses are of everyone, with the same weights.
    const bool once = contrast.whole && !half;
    const auto pass = [&](bool of_rows, const JointSums& sums) {
      typename JointContrast<Element>::Slope slope{rest.rows && (of_rows || once), rest.columns && (!of_rows || once)};
      contrast.weigh(of_rows, half && !of_rows ? 0.0 : a / tau, half && of_rows ? 0.0 : b / tau, sums, slope);
      rest.rows = rest.rows && !slope.rows;
      rest.columns = rest.columns && !slope.columns;
      total += slope.found;
    };
    const bool together = once && any_query && any_candidate;
    if (any_query) {
      JointSums sums = joint.sums(true, together);
      pass(true, sums);
      sums.query = to_query[0];
      if (together) std::copy_n(to_candidates, kMaxModalities, sums.candidates);
      joint.finish(sums, x.first, x.last, 0, batch.Ng);
    }
    if (any_candidate && !together) {
      JointSums sums = joint.sums(false, true);
      pass(false, sums);
      std::copy_n(to_candidates, kMaxModalities, sums.candidates);
      joint.finish(sums, 0, batch.Nq, x.begin, x.end);
    }
    if (rest.rows) pass(true, {});
    if (rest.columns) pass(false, {});
    if (temperature) tau_gradient = -total / tau;
  });
  found.push_back(slope);
  return found;
}

}  // namespace
}  // namespace pmrl

STABLE_TORCH_LIBRARY_IMPL(pmrl_kernels, CPU, m) {
  m.impl("joint_contrast_forward", TORCH_BOX(&pmrl::joint_contrast_forward));
  m.impl("joint_contrast_backward", TORCH_BOX(&pmrl::joint_contrast_backward));
}
