// What the kernels of csrc/cuda take: the same structs where tensors become pointers (spectral.cpp) and where these are
// read (spectral.cu). Pointers are the device's.
#pragma once

#include "../common/kspace.h"
#include "../common/layout.h"

namespace pmrl {
namespace cuda {

constexpr int kMostK = kTemplatedModalities;
constexpr int kWarp = 32;
constexpr int kMostColumns = 1 << 30;  // places in a row, and some steps beyond, are ints

// Warps of a block: what they keep in shared memory fits into 48 KB.
PMRL_INLINE constexpr int warps_of_block(int k) { return k > 5 ? 2 : 4; }
// Instances of a warp that are decomposed together, one in each lane: as many as there is shared memory for.
PMRL_INLINE constexpr int most_instances(int k) { return k > 7 ? 24 : kWarp; }
// Blocks of the forward pass that a multiprocessor has registers for.
PMRL_INLINE constexpr int resident_blocks(int k) { return k == 5 ? 2 : k == 4 ? 3 : 4; }
// Of a large batch one warp of each block decomposes what the others read, in rounds, where that takes less time than
// that every warp does both: not where k is small, and it is soon done, nor where one warp does not keep up. Blocks that
// a multiprocessor has registers for; of each row, how many packs of a lane are in shared memory or on their way to it;
// and the bytes of that memory a warp takes.
PMRL_INLINE constexpr bool has_rounds(int k, int element_size) {
  return k == 4 ? element_size <= 4 : k == 5 && element_size == 4;
}
PMRL_INLINE constexpr int resident_streams(int k) { return k > 4 ? 2 : 4; }
constexpr int kStreamWarps = 4, kStreamLanes = 8, kPacksAhead = 8;
PMRL_INLINE constexpr unsigned bytes_ahead(int k) { return kPacksAhead * k * kWarp * 16; }
// Of a block: dynamic; and in all, with two shares' numbers and what the driver takes.
PMRL_INLINE constexpr unsigned dynamic_of_stream(int k) { return (kStreamWarps - 1) * bytes_ahead(k); }
PMRL_INLINE constexpr unsigned shared_of_stream(int k) {
  return dynamic_of_stream(k) + 2 * (triangle_size(k) + k) * (kWarp + 1) * 8 + 1024 + 128;
}

constexpr int kReducers = 256;       // threads that add up what blocks have found

// Where the numbers of a state begin: row `at` of (size, B) float64 numbers, an instance in each column, so that lanes
// with neighbouring instances read neighbouring numbers. -1: not kept.
//
//   C, slope        coefficients of the alignment term's gradient, and dL/d tau, for an incoming gradient of 1
//   values, matrix  eigenvalues (k) and eigenvectors (k^2, entry m of vector j at m k + j), or without `spectrum`
//                   lambda_1 and the upper triangle of the Gram matrix
//   v               v_1
//   inverse_norms, others, exponents   as in Columns
struct State {
  int C, slope, values, matrix, v, inverse_norms, others, exponents, size;
};

// `aligned`: the alignment term is wanted. `vectors`: anything else is.
PMRL_INLINE State state_of(const Settings& s, bool aligned, bool vectors) {
  State at{};
  const auto take = [&](bool wanted, int numbers) {
    const int first = wanted ? at.size : -1;
    at.size += wanted ? numbers : 0;
    return first;
  };
  at.C = take(aligned, triangle_size(s.k));
  at.slope = take(aligned, 1);
  at.values = take(vectors && s.decompose, s.spectrum ? s.k : 1);
  at.matrix = take(vectors && s.decompose, s.spectrum ? s.k * s.k : triangle_size(s.k));
  at.v = take(vectors && s.decompose, s.k);
  at.inverse_norms = take(vectors && s.normalize, s.k);
  at.others = take(s.others, s.k);
  at.exponents = take(s.float64_input, s.k);
  return at;
}

// A batch of instances. `lanes` lanes of a warp share an instance while rows are read: 8, 16 or 32. In the forward pass a
// warp has a `share` of neighbouring instances, at most most_instances(k), which it reads one after the other and then
// decomposes together, one in each lane. Or else a block has `rounds` of such shares: all its warps but the last one read
// the next while that one decomposes the one before.
struct Batch {
  int64_t B;
  Dtype dtype;                     // of all embeddings, or kMixed
  int d, lanes, share, rounds;
  Settings settings;               // tau where `temperature` is null
  const void* temperature;         // 0-d, float32, or float64 if the next says so
  bool temperature_is_float64;
  bool whole;                      // all rows are made of whole packs of 16 bytes, and begin where one may
  Rows x[kMostK];
  const uint8_t* mask;             // (B, k), contiguous, or null
  double* state;
  State at;
};

// What a launch of all instances leaves: alignment terms, dL/d tau of their sum, and how many have two modalities.
struct Sums {
  double alignment, slope, number;
};

struct Forward {
  Batch batch;
  void* alignment;   // (B,); null: not asked for, and so on
  void* sigma;       // (B, values)
  int values;
  void* v;           // (B, k)
  void* total;       // 0-d: the sum of the alignment terms, or their mean
  bool mean;
  Sums* parts;       // (blocks,), where there are several
  Sums* sums;        // (1,)
};

struct Vectors {
  Batch batch;
  void* u;           // (B, d)
  void* z[kMostK];   // (B, d) each
  void* w[kMostK];   // (B, d) each
};

// Which rows of (size, B) numbers the kernels of a backward pass hand to one another: inner products, in whose places
// come the coefficients of what they were products with.
//
//   C       coefficients of X            w        X^T h, then c      direct  x_m . dL/dz_m
//   others  x_j . (R - r_j g_j) with R = sum_m r_m g_m, then shared  along   w_m . g_m, then own
//   exponent  of dX; with float64 embeddings
template <int K>
struct Places {
  static constexpr int C = 0, w = triangle_size(K), direct = w + K, others = direct + K, along = others + K,
                       exponent = along + K, size = exponent + K;
};

// Incoming gradients; data null: nothing comes in.
struct Backward {
  Batch batch;
  Values alignment, sigma, v;
  const Sums* sums;   // of the forward pass, if what comes in is for a mean
  int values;
  Rows u, z[kMostK], w[kMostK];
  Rows out[kMostK];   // gradients of the embeddings; data null: not asked for
  const double* pairs;  // (k + k^2, B): eigenvalues and eigenvectors, where the state has none
  double* scratch;    // (Places<k>::size, B)
  bool dotted;        // it holds inner products
  double* slopes;     // (B,): dL/d tau of each instance; null: not asked for
};

// dL/d tau, 0-d, from those of all instances, or of their sum from its own.
struct Slope {
  int64_t B;
  const double* slopes;   // (B,), or null
  const Sums* sums;
  Values alignment;       // what comes in for the sum or mean
  bool mean, is_float64;
  double* out;
};

}  // namespace cuda
}  // namespace pmrl
