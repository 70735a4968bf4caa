// A Python module for tests, `pmrl_kernels._numerics`: the solvers and functions of common/ as each instruction set
// runs them, and the constants. Arrays of numpy in and out, no torch. Built in development installs only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace pmrl {
namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

// "scalar" is common/ with Real = double, as one lane of a GPU computes; instruction sets compute with packs.
constexpr const char* kScalar = "scalar";

const Kernels* find(const std::string& isa) {
  if (isa == kScalar) return nullptr;
  for (const Kernels* const* candidate = kCompiled; *candidate; ++candidate)
    if (isa == (*candidate)->isa && runs_here(**candidate)) return *candidate;
  throw std::invalid_argument("isa: got '" + isa + "', wanted one of those that runs_here() lists");
}

std::vector<std::string> runnable() {
  std::vector<std::string> names{kScalar};
  for (const Kernels* const* candidate = kCompiled; *candidate; ++candidate)
    if (runs_here(**candidate)) names.push_back((*candidate)->isa);
  return names;
}

int size_of(const Array& A) {
  if (A.ndim() != 3 || A.shape(1) != A.shape(2) || A.shape(1) < 1 || A.shape(1) > kMaxModalities)
    throw std::invalid_argument("A: wanted (n, k, k) with 1 <= k <= 32");
  return static_cast<int>(A.shape(1));
}

template <int K>
void solve(const double* A, int k, bool all, bool float64_input, double* values, double* vectors) {
  Matrix<K, double> G;
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) G.at[i][j] = A[i * k + j];
  Eigenpairs<K, double> E;
  Vector<K, double> v;
  if (all) {
    eigenpairs(G, E, k);
    for (int j = 0; j < k; ++j) {
      values[j] = E.values.at[j];
      for (int m = 0; m < k; ++m) vectors[m * k + j] = E.V.at[m][j];
    }
  } else {
    leading_pair(G, values[0], v, k, float64_input);
    for (int m = 0; m < k; ++m) vectors[m] = v.at[m];
  }
}

void solve(const double* A, int k, bool all, bool float64_input, double* values, double* vectors) {
  switch (k) {
    case 2: return solve<2>(A, k, all, float64_input, values, vectors);
    case 3: return solve<3>(A, k, all, float64_input, values, vectors);
    case 4: return solve<4>(A, k, all, float64_input, values, vectors);
    case 5: return solve<5>(A, k, all, float64_input, values, vectors);
    case 6: return solve<6>(A, k, all, float64_input, values, vectors);
    case 7: return solve<7>(A, k, all, float64_input, values, vectors);
    case 8: return solve<8>(A, k, all, float64_input, values, vectors);
    default: return solve<0>(A, k, all, float64_input, values, vectors);
  }
}

std::tuple<Array, Array> eigenpairs_of(const Array& A, const std::string& isa) {
  const int k = size_of(A);
  const py::ssize_t n = A.shape(0);
  Array values({n, py::ssize_t(k)}), vectors({n, py::ssize_t(k), py::ssize_t(k)});
  if (const Kernels* kernels = find(isa))
    kernels->solvers->eigenpairs(A.data(), n, k, values.mutable_data(), vectors.mutable_data());
  else
    for (py::ssize_t i = 0; i < n; ++i)
      solve(A.data() + i * k * k, k, true, false, values.mutable_data() + i * k, vectors.mutable_data() + i * k * k);
  return {values, vectors};
}

std::tuple<Array, Array> leading_pair_of(const Array& A, bool float64_input, const std::string& isa) {
  const int k = size_of(A);
  const py::ssize_t n = A.shape(0);
  Array values(n), vectors({n, py::ssize_t(k)});
  if (const Kernels* kernels = find(isa))
    kernels->solvers->leading_pair(A.data(), n, k, float64_input, values.mutable_data(), vectors.mutable_data());
  else
    for (py::ssize_t i = 0; i < n; ++i)
      solve(A.data() + i * k * k, k, false, float64_input, values.mutable_data() + i, vectors.mutable_data() + i * k);
  return {values, vectors};
}

Array exp_of(const Array& x, const std::string& isa) {
  Array y(x.size());
  if (const Kernels* kernels = find(isa))
    kernels->solvers->exp_nonpositive(x.data(), x.size(), y.mutable_data());
  else
    for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = exp_nonpositive(x.data()[i]);
  return y;
}

Array log1p_of(const Array& x, const std::string& isa) {
  Array y(x.size());
  if (const Kernels* kernels = find(isa))
    kernels->solvers->log1p_nonnegative(x.data(), x.size(), y.mutable_data());
  else
    for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = log1p_nonnegative(x.data()[i]);
  return y;
}

}  // namespace
}  // namespace pmrl

PYBIND11_MODULE(_numerics, m) {
  using namespace pmrl;
  m.doc() = "The k x k solvers of pmrl_kernels, for tests.";
  m.attr("MAX_MODALITIES") = kMaxModalities;
  m.attr("PEAK_TIE") = kPeakTie;
  m.attr("CANCELLED") = kCancelled;
  m.attr("RANK_ONE") = kRankOne;
  m.attr("JACOBI_TOLERANCE") = kJacobiTolerance;
  m.attr("MAX_SWEEPS") = kMaxSweeps;
  m.attr("MOST_LANES") = kMostLanes;
  m.attr("WANTED") = std::vector<int>{kAlignment, kAlignmentSum, kAlignmentMean, kSigma, kU, kV, kZ};
  m.def("singular_value_floor_squared", [](int k, bool float64_input) { return eigenvalue_floor(k, float64_input); });
  m.def("eigenvalue_gap", [](int k, bool float64_input) { return eigenvalue_gap(k, float64_input); });
  m.def("zero_sum", [](int k) { return zero_sum(k); });
  m.def("squarings", [](int k, bool float64_input) { return squarings(k, float64_input); });
  m.def("runs_here", &runnable, "The instruction sets that can be asked for.");
  m.def("eigenpairs", &eigenpairs_of, py::arg("A"), py::arg("isa"),
        "A (n, k, k) -> eigenvalues (n, k), descending, and eigenvectors (n, k, k) in columns.");
  m.def("leading_pair", &leading_pair_of, py::arg("A"), py::arg("float64_input"), py::arg("isa"),
        "A (n, k, k) -> largest eigenvalues (n,) and oriented eigenvectors (n, k).");
  m.def("exp_nonpositive", &exp_of, py::arg("x"), py::arg("isa"));
  m.def("log1p_nonnegative", &log1p_of, py::arg("x"), py::arg("isa"));
}
