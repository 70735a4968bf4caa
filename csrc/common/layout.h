// How arguments and matrices lie in memory: element types, bytes of a mask, triangles of symmetric matrices. For host
// and device; reads what its arguments point to and writes nothing.
#pragma once

#include <cstdint>

#include "constants.h"

namespace pmrl {

// Of an embedding's elements; kMixed: embeddings of one batch differ.
enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kMixed };

// In bytes; of any dtype but kMixed.
PMRL_INLINE constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Whether entry `at` of a mask is set; without a mask (null) every one is. A bool tensor may be a view of other bytes,
// so anything but 0 counts and not 1 alone.
PMRL_INLINE bool is_present(const uint8_t* mask, int64_t at) { return !mask || mask[at] != 0; }

// Where entry (i, j), i <= j, of a symmetric matrix stands in its packed upper triangle. The columns follow one
// another, so this does not depend on k.
PMRL_INLINE constexpr int triangle(int i, int j) { return j * (j + 1) / 2 + i; }
// The same for i and j in any order.
PMRL_INLINE constexpr int triangle_any(int i, int j) { return i < j ? triangle(i, j) : triangle(j, i); }
// How many entries the triangle of a k x k matrix has.
PMRL_INLINE constexpr int triangle_size(int k) { return k * (k + 1) / 2; }

// (B, d) with any row stride; the last dimension is contiguous.
struct Rows {
  char* data;
  int64_t stride;  // in bytes
  Dtype dtype;     // never kMixed
};

// 0-d, (B,) or (B, n) of float32, or of float64 with `float64_input`, with any strides (in elements).
struct Values {
  const void* data;  // null: none
  int64_t stride0, stride1;
};

}  // namespace pmrl
