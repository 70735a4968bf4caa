// csrc/common as device code, one instance per thread, as a GPU would run it. A test compiles it; nothing launches it.
#include "common/kspace.h"
#include "common/layout.h"

namespace {

template <int K>
__global__ void solve(const double* gram, const double* incoming, int n, pmrl::Settings s, double* results) {
  using namespace pmrl;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  Matrix<K, double> G, copy;
  Columns<K, double> columns;
  Incoming<K, double> in;
  for (int m = 0; m < K; ++m) {
    columns.present.at[m] = 1.0;
    columns.exponents.at[m] = 0.0;
    in.sigma.at[m] = incoming[i * (4 * K + 1) + m];
    in.w.at[m] = incoming[i * (4 * K + 1) + K + m];
    in.q.at[m] = incoming[i * (4 * K + 1) + 2 * K + m];
    in.direct.at[m] = incoming[i * (4 * K + 1) + 3 * K + m];
    for (int j = m; j < K; ++j) G.at[m][j] = gram[(i * K + m) * K + j];
  }
  in.alignment = incoming[i * (4 * K + 1) + 4 * K];
  if (s.normalize) normalise_gram(G, columns, K);
  double trace = 0.0;
  for (int m = 0; m < K; ++m) trace += G.at[m][m];
  copy = G;

  Eigenpairs<K, double> E;
  Vector<K, double> v;
  if (s.spectrum) {
    const double broken = zero_or_nan(G, K);
    eigenpairs(copy, E, K);
    drop_surplus(E.values, columns, s, broken);
    oriented(E, v, K, s.float64_input);
  } else {
    leading_pair(G, E.values.at[0], v, K, s.float64_input);
  }
  double* out = results + i * (K * K + 2 * K + 2);
  out[0] = alignment(E.values, trace, columns, s);

  inverse_norms_of_others(G, v, K, columns.others);
  for (int m = 0; m < K; ++m) in.others.at[m] = in.along.at[m] = in.direct.at[m];

  Coefficients<K, double> found;
  coefficients(in, Through{true, true, true}, E, G, v, columns, s, found);
  out[1] = found.slope;
  for (int m = 0; m < K; ++m) {
    out[2 + m] = v.at[m];
    out[2 + K + m] = found.c.at[m] + found.shared.at[m] + found.own.at[m];
    for (int j = m; j < K; ++j) out[2 + 2 * K + m * K + j] = found.C.at[m][j];
  }
}

template __global__ void solve<4>(const double*, const double*, int, pmrl::Settings, double*);
template __global__ void solve<8>(const double*, const double*, int, pmrl::Settings, double*);

}  // namespace
