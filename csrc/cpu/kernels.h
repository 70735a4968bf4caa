// What the CPU kernels of each instruction set offer, in plain pointers: no torch beyond this line.
//
// Work is cut into blocks of `lanes` instances, as many as an instruction set solves together; a call handles blocks
// [begin, end), so any number of threads may share a batch, and the result does not depend on how they do.
#pragma once

#include <cstdint>

#include "../common/kspace.h"

#define PMRL_MEMBER inline __attribute__((always_inline))

namespace pmrl {

constexpr int kMostLanes = 16;  // of any instruction set

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kMixed };

// (B, d) with any row stride; the last dimension is contiguous.
struct Rows {
  char* data;
  int64_t stride;  // in bytes
  Dtype dtype;     // never kMixed
};

// 0-d, (B,) or (B, n) of float32, or of float64 if wide, with any strides (in elements).
struct Values {
  const void* data;  // null: none
  int64_t stride0, stride1;
};

struct Batch {
  int64_t B, d;
  Settings settings;
  Dtype dtype;  // of all embeddings, or kMixed
  Rows x[kMaxModalities];
  const uint8_t* mask;  // (B, k), contiguous, or null. Whose bytes may be any, as in a view of bytes: present is not 0
  double* state;     // (ceil(B / lanes), state_size, lanes) in a buffer that may be longer
};

// What a forward pass leaves for the backward pass, for each instance: eigenvalues and eigenvectors (k + k^2), or
// lambda_1 and the upper triangle of the Gram matrix; v_1 (k); 1/norms (k) if normalised; exponents (k) if wide.
PMRL_INLINE constexpr int state_size(const Settings& s) {
  return (s.spectrum ? s.k + s.k * s.k : 1 + s.k * (s.k + 1) / 2) + s.k + (s.normalize ? s.k : 0) + (s.wide ? s.k : 0);
}

// Outputs have the embeddings' output dtype, float32 or (wide) float64, and are contiguous. Null: not asked for.
struct Forward {
  Batch batch;
  void* alignment;          // (B,)
  double* totals;           // (ceil(B / lanes),): sum of the alignment terms of each block
  void* sigma;              // (B, values)
  int values;
  void* v;                  // (B, k)
  void* u;                  // (B, d)
  void* z[kMaxModalities];  // (B, d) each
};

struct Backward {
  Batch batch;
  Values alignment, sigma, v;  // incoming gradients
  double alignment_factor;     // of the first
  int values;
  Rows u;                      // data null: none
  Rows z[kMaxModalities];
  Rows out[kMaxModalities];    // gradients of the embeddings; data null: not asked for
  double* slopes;              // (ceil(B / lanes),): dL/d tau of each block; null: not asked for
};

// A tile of similarities s, rows of one side and columns of the other, float32 or (wide) float64. Its rows are `stride`
// numbers apart, a multiple of kTilePadding; the surplus columns hold -inf, and so do the positives, whose losses have
// another place for them. Groups of columns are at most kTileColumns wide.
constexpr int kTilePadding = 32;
constexpr int kTileColumns = 256;

struct ForwardTile {
  const void* similarity;
  int64_t rows, stride;
  bool wide, shared;
  double factor;          // log2(e) / tau, rounded to the tile's numbers
  double offset;          // shared: an integer; neither maxima nor shifts are read
  const void* row_shift;  // (rows,): what is subtracted from s
  double* row_parts;      // (groups, rows): what each group finds
  void* column_maxima;    // (stride,)
  void* column_shift;     // (stride,)
  double* column_sums;    // (stride,)
};

// kRelative: the probability of choosing an entry s is weight 2^((s - shift) factor - offset), offset an integer; what chooses
// nobody has a weight of 0 and an offset of +inf.
// kShared: weight 2^(s factor - the tile's offset).
// kBounded: as kRelative, but s - shift counts up to `limit` and a power up to 2. More is due to rounding.
enum class Powers { kShared, kRelative, kBounded };

struct TileSide {
  const void *positive, *shift, *weight, *offset;  // (rows,) or (stride,)
};

struct BackwardTile {
  const void* similarity;
  void* weights;
  int64_t rows, stride;
  bool wide;
  Powers powers;
  double factor, offset, limit, scale;
  TileSide row, column;
  double* slopes;  // (groups,); null: not asked for
};

struct Kernels {
  const char* isa;
  int lanes;  // instances solved together
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  // Of one group of a tile's columns, [begin, end); `columns`: their statistics are wanted too.
  void (*maxima)(const ForwardTile&, int64_t group, int64_t begin, int64_t end, bool columns);
  void (*sums)(const ForwardTile&, int64_t group, int64_t begin, int64_t end, bool columns);
  void (*weights)(const BackwardTile&, int64_t group, int64_t begin, int64_t end, bool columns);
  // x_i . y_i for rows [begin, end) of float32 or float64.
  void (*row_dots)(const Rows& x, const Rows& y, int64_t d, int64_t begin, int64_t end, double* out);
  // The solvers alone, for tests: n symmetric k x k matrices in row-major order, upper triangles read.
  void (*eigenpairs)(const double* A, int64_t n, int k, double* values, double* vectors);
  void (*leading_pair)(const double* A, int64_t n, int k, bool wide, double* values, double* vectors);
  void (*exp_nonpositive)(const double* x, int64_t n, double* y);
  void (*log1p_nonnegative)(const double* x, int64_t n, double* y);
};

// One per instruction set the library was compiled for, best first; null ends the list.
extern const Kernels* const kCompiled[];

// The best of kCompiled that this processor runs, or the one PMRL_KERNELS_ISA names. If that one is unknown or
// cannot run here, null, and `reason` says so. Decided once.
const Kernels* chosen(const char** reason);

// Whether this processor can run it.
bool runs_here(const Kernels& kernels);

}  // namespace pmrl
