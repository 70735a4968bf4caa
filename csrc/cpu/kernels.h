// What the CPU kernels of each instruction set offer, in plain pointers: nothing here or below knows torch.
//
// Spectral kernels work on blocks of `lanes` instances, as many as an instruction set solves together; a call handles
// blocks [begin, end), so any number of threads may share a batch, and the result does not depend on how they do.
// Contrast kernels work on groups of a tile's columns in the same way.
#pragma once

#include <cstdint>

#include "../common/kspace.h"
#include "../common/layout.h"

namespace pmrl {

constexpr int kMostLanes = 16;  // of any instruction set

// ---- spectral -----------------------------------------------------------------------------------

struct Batch {
  int64_t B, d;
  Settings settings;
  Dtype dtype;  // of all embeddings, or kMixed
  Rows x[kMaxModalities];
  const uint8_t* mask;  // (B, k), contiguous, or null; see is_present
  double* state;        // (ceil(B / lanes), state_size, lanes) in a buffer that may be longer
};

// What a forward pass leaves for the backward pass, for each instance: eigenvalues and eigenvectors (k + k^2), or
// lambda_1 and the upper triangle of the Gram matrix; v_1 (k); 1/norms (k) if normalised; 1/||y_m|| (k) with `others`;
// exponents (k) with `float64_input`. pmrl_kernels/ops/spectral/native.py computes the same.
PMRL_INLINE constexpr int state_size(const Settings& s) {
  return (s.spectrum ? s.k + s.k * s.k : 1 + triangle_size(s.k)) + s.k + (s.normalize ? s.k : 0) +
         (s.others ? s.k : 0) + (s.float64_input ? s.k : 0);
}

// Outputs have the embeddings' output dtype, float64 with `float64_input` and else float32, and are contiguous. Null:
// not asked for.
struct Forward {
  Batch batch;
  void* alignment;          // (B,)
  double* totals;           // (ceil(B / lanes),): sum of the alignment terms of each block
  void* sigma;              // (B, values)
  int values;
  void* v;                  // (B, k)
  void* u;                  // (B, d)
  void* z[kMaxModalities];  // (B, d) each
  void* w[kMaxModalities];  // (B, d) each
};

struct Backward {
  Batch batch;
  Values alignment, sigma, v;  // incoming gradients
  double alignment_factor;     // of the first
  int values;
  Rows u;                      // data null: none
  Rows z[kMaxModalities];
  Rows w[kMaxModalities];
  Rows out[kMaxModalities];    // gradients of the embeddings; data null: not asked for
  double* slopes;              // (ceil(B / lanes),): dL/d tau of each block; null: not asked for
};

// ---- contrasts ----------------------------------------------------------------------------------

// A tile of similarities s, float32 or float64: rows of one side, columns of the other. Its rows are `stride` numbers
// apart, a multiple of kTilePadding. Surplus columns hold -inf, and so do the positives, which have a place of their
// own in a loss. Groups of columns are at most kTileColumns wide.
constexpr int kTilePadding = 32;
constexpr int kTileColumns = 256;

struct ForwardTile {
  const void* similarity;
  int64_t rows, stride;
  bool is_float64;        // what the tile, shifts and maxima are made of
  bool shared;            // powers are 2^(s factor - offset) for every entry; neither maxima nor shifts are read
  double factor;          // log2(e) / tau, rounded to the tile's numbers
  double offset;          // shared: an integer
  const void* row_shift;  // (rows,): what is subtracted from s
  double* row_parts;      // (groups, rows): what each group finds
  void* column_maxima;    // (stride,)
  void* column_shift;     // (stride,)
  double* column_sums;    // (stride,)
};

// How the probability of choosing an entry s is written:
//   kShared    weight 2^(s factor - the tile's offset)
//   kRelative  weight 2^((s - shift) factor - offset), offset an integer; vectors that choose nobody have a weight of 0
//              and an offset of +inf
//   kBounded   as kRelative, but s - shift counts up to `limit` and the power up to 2. More is rounding error.
enum class Powers { kShared, kRelative, kBounded };

struct TileSide {
  const void *positive, *shift, *weight, *offset;  // (rows,) or (stride,)
};

struct BackwardTile {
  const void* similarity;
  void* weights;
  int64_t rows, stride;
  bool is_float64;
  Powers powers;
  double factor, offset, limit, scale;
  TileSide row, column;
  double* slopes;   // (groups,); null: not asked for
  bool row_slopes;  // whether they are of the rows too
};

// ---- joint scores -------------------------------------------------------------------------------

// pmrl_kernels/ops/joint/spec.py names them.
enum class Score : int32_t { kVolume, kVolume2, kSine, kSigma, kLambda, kGain, kArea2, kDot };

// Queries t_i, candidates of n modalities, and what is made of them once for all pairs. "Element" is float, or double
// with `is_float64`. Candidates stand in column tiles of `width`, the last of them narrower and padded with zeros, w in
// all: in each (n, w, d) of U and (joint_constants(n), w) of constants follow one another.
struct JointBatch {
  int64_t Nq, Ng, d;
  int n;
  Score score;
  bool normalize, is_float64;
  bool float64_input;    // what outputs and thresholds are by
  const char* seen;      // (Nq,), or null: queries that are not count as zeros, and are not read
  Rows query, candidates[kMaxModalities];
  const uint8_t* mask;   // (Ng, n), contiguous, or null
  int64_t width;
  double* query_norms;   // (Nq, 3): row i counts as x 2^-e f; e, f, and its square then
  double* norms;         // (Ng, n, 2): e and f
  double* decomposed;    // (Ng, n + n^2): eigenvalues mu of C C^T, 0 where dropped, -1 where absent; eigenvectors
  void* T;               // (Nq, d) of Elements
  void* beta;            // (Nq,): squares of these rows' norms
  void* U;               // the rows u_m = (V^T C)_m / sqrt(mu_m)
  void* constants;       // of each candidate: mu_m, mu_1 - mu_m, and three numbers of its score
  double* scratch;       // what one thread needs for itself: joint_scratch(...) numbers
};

PMRL_INLINE constexpr int joint_constants(int n) { return 2 * n + 3; }
PMRL_INLINE constexpr int64_t joint_scratch(int n, int64_t d) { return (kMostLanes * n + 2) * d + n * d; }
PMRL_INLINE constexpr int64_t joint_pair_scratch(int n, int64_t d) { return (n + 2) * d; }  // of pairs and pair_gradients

// Pairs of a row tile and a column tile.
struct JointTile {
  Score score;
  int n;
  bool is_float64;
  int64_t rows, width;
  void* q;                // (rows, n, width): u_m . t; gradients overwrites it by S
  void* base;             // (rows, width): what a score is made of
  const void* beta;       // (rows,)
  const void* constants;
  int32_t* near;          // (rows * width,): places of near copies, which float32 cannot tell
  const void* weights;    // (rows, stride): dL/d score
  int64_t stride;
  double* own;            // (rows,): added to
  void* moments;          // (triangle_size(n) + 1, width): added to
};

// A pair by itself, in float64.
struct JointPair {
  int64_t i, j;
  double base, score;  // written by pairs
  double weight;       // dL/d score, read by pair_gradients
};

// Sums over all queries, from which the gradients of candidates are made, laid out as U and the constants are.
struct JointSums {
  void* dT;         // (Nq, d): sum_j S_ij u_j
  double* own;      // (Nq,)
  void* dC;         // as U: sum_i S_ij t_i
  double* moments;  // (triangle_size(n) + 1, w) in each tile
  Rows query, candidates[kMaxModalities];  // gradients; data null: not asked for
};

struct JointKernels {
  void (*prepare_queries)(const JointBatch&, int64_t begin, int64_t end);
  // Of blocks of `lanes` candidates [begin, end); decompose: writes `decomposed`, else it is read.
  void (*prepare_candidates)(const JointBatch&, bool decompose, int64_t begin, int64_t end);
  int64_t (*bases)(const JointTile&);  // q -> base; returns how many places it wrote to near
  void (*scores)(const JointTile&, int64_t columns, void* out, int64_t stride);  // base -> scores
  void (*gradients)(const JointTile&);
  void (*pairs)(const JointBatch&, JointPair*, int64_t count);
  void (*pair_gradients)(const JointBatch&, const JointSums&, const JointPair*, int64_t count);
  void (*finish_queries)(const JointBatch&, const JointSums&, int64_t begin, int64_t end);
  void (*finish_candidates)(const JointBatch&, const JointSums&, int64_t begin, int64_t end);
};

// ---- solvers -------------------------------------------------------------------------------------

// Of a Matrix<K, Pack> A: all eigenpairs, an Eigenpairs<K, Pack>, and A is overwritten; or the leading one, a Pack and a
// Vector<K, Pack>.
struct Solver {
  void (*eigenpairs)(void* A, void* E, int k);
  void (*leading_pair)(const void* A, void* value, void* v, int k, bool float64_input);
};

struct SolverKernels {
  Solver of[kTemplatedModalities + 1];  // by K; none for 1, which 0 does
  // For tests: n symmetric k x k matrices in row-major order, upper triangles read.
  void (*eigenpairs)(const double* A, int64_t n, int k, double* values, double* vectors);
  void (*leading_pair)(const double* A, int64_t n, int k, bool float64_input, double* values, double* vectors);
  void (*exp_nonpositive)(const double* x, int64_t n, double* y);
  void (*log1p_nonnegative)(const double* x, int64_t n, double* y);
};

// ---- of one instruction set ---------------------------------------------------------------------

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
  const JointKernels* joint;
  const SolverKernels* solvers;
};

#define PMRL_JOIN(a, b) PMRL_JOIN_(a, b)
#define PMRL_JOIN_(a, b) a##b

// One per instruction set that the library was compiled for, best first; null ends the list.
extern const Kernels* const kCompiled[];

// The best of kCompiled that this processor runs, or the one PMRL_KERNELS_ISA names. If that one is unknown or cannot
// run here, null, and `reason` says so. Decided once.
const Kernels* chosen(const char** reason);

// Whether this processor can run it.
bool runs_here(const Kernels& kernels);

}  // namespace pmrl
