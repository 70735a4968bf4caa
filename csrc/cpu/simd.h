// The vector types of one instruction set, and loads and stores of every dtype through float64.
//
// Everything here is in an unnamed namespace: each instruction set compiles its own copy, and the linker must merge
// none.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/elementary.h"
#include "kernels.h"

namespace pmrl {
namespace {

using pmrl::abs;  // the functions of double, which those of packs below would hide
using pmrl::any;
using pmrl::binade;
using pmrl::max;
using pmrl::narrow;
using pmrl::pow2;
using pmrl::select;
using pmrl::sqrt;
using pmrl::widen;

#if defined(__AVX512F__)
constexpr int kNative = 8;  // doubles in a register
#elif defined(__AVX__)
constexpr int kNative = 4;
#else
constexpr int kNative = 2;
#endif

template <class Element>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kNative * sizeof(Element))));
  typedef Element unaligned __attribute__((vector_size(kNative * sizeof(Element)), aligned(1), may_alias));
};
using F64 = VectorOf<double>::type;
using F32 = VectorOf<float>::type;
using I64 = VectorOf<int64_t>::type;
using U32 = VectorOf<uint32_t>::type;
using I32 = VectorOf<int32_t>::type;
using U16 = VectorOf<uint16_t>::type;

template <class Element>
PMRL_INLINE typename VectorOf<Element>::type load_vector(const Element* from) {
  return *reinterpret_cast<const typename VectorOf<Element>::unaligned*>(from);
}

template <class Element>
PMRL_INLINE void store_vector(Element* to, typename VectorOf<Element>::type x) {
  *reinterpret_cast<typename VectorOf<Element>::unaligned*>(to) = x;
}

// GCC 12 makes five instructions of a __builtin_convertvector of eight floats.
PMRL_INLINE F64 widen(F32 x) {
#if defined(__AVX512F__)
  return (F64)_mm512_cvtps_pd((__m256)x);
#elif defined(__AVX__)
  return (F64)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, F64);
#endif
}
PMRL_INLINE F32 narrow(F64 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtpd_ps((__m512d)x);
#elif defined(__AVX__)
  return (F32)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, F32);
#endif
}

// ---- a pack: one double for each of kLanes instances --------------------------------------------

// Two registers: while the square roots and divisions of one are under way, those of the other can run. The operations
// of a rotation depend on one another, and with one register a third to a half of the time is spent waiting (k = 3, 4).
constexpr int kParts = 2;
constexpr int kLanes = kParts * kNative;
static_assert(kLanes <= kMostLanes, "the state has no room for so many lanes");

struct PackMask {
  I64 part[kParts];
};

struct Pack {
  F64 part[kParts];

  Pack() = default;
  PMRL_MEMBER explicit Pack(double x) {
    for (int i = 0; i < kParts; ++i) part[i] = x - F64{};
  }
  PMRL_MEMBER static Pack load(const double* from) {
    Pack x;
    for (int i = 0; i < kParts; ++i) x.part[i] = load_vector(from + i * kNative);
    return x;
  }
  PMRL_MEMBER void store(double* to) const {
    for (int i = 0; i < kParts; ++i) store_vector(to + i * kNative, part[i]);
  }
};

#define PMRL_PACK_BINARY(Result, Operand, op)                            \
  PMRL_INLINE Result operator op(Operand a, Operand b) {                 \
    Result r;                                                            \
    for (int i = 0; i < kParts; ++i) r.part[i] = a.part[i] op b.part[i]; \
    return r;                                                            \
  }
PMRL_PACK_BINARY(Pack, Pack, +)
PMRL_PACK_BINARY(Pack, Pack, -)
PMRL_PACK_BINARY(Pack, Pack, *)
PMRL_PACK_BINARY(Pack, Pack, /)
PMRL_PACK_BINARY(PackMask, Pack, <)
PMRL_PACK_BINARY(PackMask, Pack, <=)
PMRL_PACK_BINARY(PackMask, Pack, >)
PMRL_PACK_BINARY(PackMask, Pack, >=)
PMRL_PACK_BINARY(PackMask, Pack, ==)
PMRL_PACK_BINARY(PackMask, Pack, !=)

PMRL_INLINE Pack operator-(Pack a) {
  for (int i = 0; i < kParts; ++i) a.part[i] = -a.part[i];
  return a;
}
PMRL_INLINE PackMask operator&(PackMask a, PackMask b) {
  for (int i = 0; i < kParts; ++i) a.part[i] &= b.part[i];
  return a;
}
PMRL_INLINE PackMask operator|(PackMask a, PackMask b) {
  for (int i = 0; i < kParts; ++i) a.part[i] |= b.part[i];
  return a;
}
PMRL_INLINE Pack select(PackMask condition, Pack yes, Pack no) {
  Pack r;
  for (int i = 0; i < kParts; ++i) r.part[i] = condition.part[i] ? yes.part[i] : no.part[i];
  return r;
}
PMRL_INLINE Pack sqrt(Pack x) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    x.part[i] = _mm512_sqrt_pd(x.part[i]);
#elif defined(__AVX__)
    x.part[i] = _mm256_sqrt_pd(x.part[i]);
#elif defined(__SSE2__)
    x.part[i] = _mm_sqrt_pd(x.part[i]);
#else
    for (int j = 0; j < kNative; ++j) x.part[i][j] = __builtin_sqrt(x.part[i][j]);
#endif
  }
  return x;
}
PMRL_INLINE Pack abs(Pack x) {
  for (int i = 0; i < kParts; ++i)
    x.part[i] = (F64)((I64)x.part[i] & (I64{} + INT64_MAX));
  return x;
}
PMRL_INLINE bool any(PackMask condition) {
  I64 all = condition.part[0];
  for (int i = 1; i < kParts; ++i) all |= condition.part[i];
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_pd((__m256d)all) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_pd((__m128d)all) != 0;
#else
  int64_t found = 0;
  for (int j = 0; j < kNative; ++j) found |= all[j];
  return found != 0;
#endif
}
PMRL_INLINE Pack pow2(Pack n) {
  for (int i = 0; i < kParts; ++i) n.part[i] = (F64)((I64)(n.part[i] + (kRounder + 1023.0)) << 52);
  return n;
}

PMRL_INLINE Pack binade(Pack x) {
  for (int i = 0; i < kParts; ++i) x.part[i] = (F64)((I64)x.part[i] & (I64{} + 0x7ff0000000000000));
  return x;
}

// A pack in single precision, for the solvers' rotation angles.
struct PackSingle {
  F32 part[kParts];
  PackSingle() = default;
  PMRL_MEMBER explicit PackSingle(float x) {
    for (int i = 0; i < kParts; ++i) part[i] = x - F32{};
  }
};
PMRL_PACK_BINARY(PackSingle, PackSingle, +)
PMRL_PACK_BINARY(PackSingle, PackSingle, *)
PMRL_PACK_BINARY(PackSingle, PackSingle, /)

PMRL_INLINE PackSingle narrow(Pack x) {
  PackSingle r;
  for (int i = 0; i < kParts; ++i) r.part[i] = narrow(x.part[i]);
  return r;
}
PMRL_INLINE Pack widen(PackSingle x) {
  Pack r;
  for (int i = 0; i < kParts; ++i) r.part[i] = widen(x.part[i]);
  return r;
}
PMRL_INLINE PackSingle sqrt(PackSingle x) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    x.part[i] = (F32)_mm256_sqrt_ps((__m256)x.part[i]);
#elif defined(__AVX__)
    x.part[i] = (F32)_mm_sqrt_ps((__m128)x.part[i]);
#else
    for (int j = 0; j < kNative; ++j) x.part[i][j] = __builtin_sqrtf(x.part[i][j]);
#endif
  }
  return x;
}

PMRL_INLINE double sum(F64 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(x);
#else
  double total = x[0];
  for (int i = 1; i < kNative; ++i) total += x[i];
  return total;
#endif
}

// ---- a pack of floats, two whole registers: similarities and what is made of them ----------------

struct FloatsMask {
  typedef int32_t Part __attribute__((vector_size(kNative * sizeof(double))));
  Part part[kParts];
};

struct Floats {
  typedef float Part __attribute__((vector_size(kNative * sizeof(double))));
  typedef float Unaligned __attribute__((vector_size(kNative * sizeof(double)), aligned(1), may_alias));
  Part part[kParts];

  Floats() = default;
  PMRL_MEMBER explicit Floats(double x) {
    for (int i = 0; i < kParts; ++i) part[i] = static_cast<float>(x) - Part{};
  }
  PMRL_MEMBER static Floats load(const float* from) {
    Floats x;
    for (int i = 0; i < kParts; ++i) x.part[i] = *reinterpret_cast<const Unaligned*>(from + i * 2 * kNative);
    return x;
  }
  PMRL_MEMBER void store(float* to) const {
    for (int i = 0; i < kParts; ++i) *reinterpret_cast<Unaligned*>(to + i * 2 * kNative) = part[i];
  }
};
PMRL_PACK_BINARY(Floats, Floats, +)
PMRL_PACK_BINARY(Floats, Floats, -)
PMRL_PACK_BINARY(Floats, Floats, *)
PMRL_PACK_BINARY(Floats, Floats, /)
PMRL_PACK_BINARY(FloatsMask, Floats, <)
PMRL_PACK_BINARY(FloatsMask, Floats, <=)
PMRL_PACK_BINARY(FloatsMask, Floats, ==)
#undef PMRL_PACK_BINARY

PMRL_INLINE Floats select(FloatsMask condition, Floats yes, Floats no) {
  Floats r;
  for (int i = 0; i < kParts; ++i) r.part[i] = condition.part[i] ? yes.part[i] : no.part[i];
  return r;
}
PMRL_INLINE Floats max(Floats a, Floats b) {  // a if either is NaN
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    a.part[i] = (Floats::Part)_mm512_max_ps((__m512)b.part[i], (__m512)a.part[i]);
#elif defined(__AVX__)
    a.part[i] = (Floats::Part)_mm256_max_ps((__m256)b.part[i], (__m256)a.part[i]);
#elif defined(__SSE2__)
    a.part[i] = (Floats::Part)_mm_max_ps((__m128)b.part[i], (__m128)a.part[i]);
#else
    a.part[i] = a.part[i] < b.part[i] ? b.part[i] : a.part[i];
#endif
  }
  return a;
}
PMRL_INLINE Floats operator-(Floats a) {
  for (int i = 0; i < kParts; ++i) a.part[i] = -a.part[i];
  return a;
}
PMRL_INLINE Floats sqrt(Floats x) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    x.part[i] = (Floats::Part)_mm512_sqrt_ps((__m512)x.part[i]);
#elif defined(__AVX__)
    x.part[i] = (Floats::Part)_mm256_sqrt_ps((__m256)x.part[i]);
#elif defined(__SSE2__)
    x.part[i] = (Floats::Part)_mm_sqrt_ps((__m128)x.part[i]);
#else
    for (int j = 0; j < 2 * kNative; ++j) x.part[i][j] = __builtin_sqrtf(x.part[i][j]);
#endif
  }
  return x;
}
PMRL_INLINE bool any(FloatsMask condition) {
  const FloatsMask::Part all = condition.part[0] | condition.part[1];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)all) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)all) != 0;
#else
  int32_t found = 0;
  for (int j = 0; j < 2 * kNative; ++j) found |= all[j];
  return found != 0;
#endif
}
PMRL_INLINE double sum(Floats x) {
  const Floats::Part both = x.part[0] + x.part[1];
  F32 half[2];
  memcpy(half, &both, sizeof both);
  return sum(widen(half[0]) + widen(half[1]));
}
PMRL_INLINE double sum(Pack x) { return sum(x.part[0] + x.part[1]); }
static_assert(kParts == 2, "sums add two registers");

// What a pack is of, and how many.
template <class V>
struct Lanes;
template <>
struct Lanes<Floats> {
  using Element = float;
  static constexpr int width = 2 * kParts * kNative;
};
template <>
struct Lanes<Pack> {
  using Element = double;
  static constexpr int width = kParts * kNative;
};
static_assert(kTilePadding % Lanes<Floats>::width == 0 && kTileColumns % kTilePadding == 0, "groups are whole packs");

// What exp2_of_product has to know of a number format. n + magic has the integer n in its low bits; those of n + magic
// + bias, moved up by `shift`, are the number 2^n. Below n = least that would be subnormal. `terms`: of the polynomial.
template <class V>
struct Exponential;
template <>
struct Exponential<Floats> {
  using Element = float;
  using Integers = FloatsMask::Part;
  static constexpr float magic = 12582912.0f, bias = 127.0f, least = -126.0f;
  static constexpr int shift = 23, terms = 8;
};
template <>
struct Exponential<Pack> {
  using Element = double;
  using Integers = I64;
  static constexpr double magic = kRounder, bias = 1023.0, least = -1022.0;
  static constexpr int shift = 52, terms = 14;
};

// Taylor's coefficients of 2^r.
template <class Format>
struct PowersOfLog2 {
  typename Format::Element at[Format::terms];
  constexpr PowersOfLog2() : at() {
    double x = 1.0;
    for (int i = 0; i < Format::terms; ++i, x *= kLog2 / i)
      at[i] = static_cast<typename Format::Element>(x);
  }
};

// 2^(x factor - offset) for an integral offset: 0 where that would be subnormal, NaN for a NaN. It must not be far
// above 1, unless kCutOff, which makes it 2 at most. Where the processor fuses multiplications and additions, r is the
// fraction of the exact product, and the error is about a unit in the last place however large the product is.
template <bool kCutOff = false, class V>
PMRL_INLINE V exp2_of_product(V x, V factor, V offset) {
  using Format = Exponential<V>;
  constexpr PowersOfLog2<Format> coefficients;
  V y;
  PMRL_UNROLL(2)
  for (int i = 0; i < kParts; ++i) {
    const auto n = (x.part[i] * factor.part[i] + Format::magic) - Format::magic;
    const auto r = x.part[i] * factor.part[i] - n;
    auto p = r * coefficients.at[Format::terms - 1] + coefficients.at[Format::terms - 2];
    PMRL_UNROLL(16)
    for (int k = Format::terms - 3; k >= 0; --k) p = p * r + coefficients.at[k];
    auto e = n - offset.part[i];
    const decltype(e) two = decltype(e){} + 2;
    if (kCutOff) e = e > two ? two : e;  // p > 1/2
#if defined(__AVX512F__)
    if constexpr (sizeof p[0] == 4)
      y.part[i] = (decltype(p))_mm512_maskz_scalef_ps(
          _mm512_cmp_ps_mask((__m512)e, _mm512_set1_ps(Format::least), _CMP_NLT_UQ), (__m512)p, (__m512)e);
    else
      y.part[i] = (decltype(p))_mm512_maskz_scalef_pd(
          _mm512_cmp_pd_mask((__m512d)e, _mm512_set1_pd(Format::least), _CMP_NLT_UQ), (__m512d)p, (__m512d)e);
#else
    const auto power = (decltype(p))((typename Format::Integers)(e + (Format::magic + Format::bias)) << Format::shift);
    y.part[i] = e < Format::least ? decltype(p){} : p * power;
#endif
    if (kCutOff) y.part[i] = y.part[i] > two ? two : y.part[i];
  }
  return y;
}

// ---- dtypes -------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// To float32, rounded to odd: rounding that to a narrower format gives what rounding x itself to that format would.
PMRL_INLINE U32 narrow_to_odd(F64 x) {
#if defined(__AVX512F__)
  // Towards zero, where the last bit of what is inexact is to be 1.
  const __m256i toward_zero = (__m256i)_mm512_cvt_roundpd_ps((__m512d)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd((__m256)toward_zero), (__m512d)x, _CMP_NEQ_UQ);
  return (U32)_mm256_mask_or_epi32(toward_zero, inexact, toward_zero, _mm256_set1_epi32(1));
#else
  const F32 near = narrow(x);
  const F64 back = widen(near);
  const I64 magnitude = I64{} + INT64_MAX;
  const F64 a = (F64)((I64)back & magnitude), b = (F64)((I64)x & magnitude);
  const U32 inexact = (U32)__builtin_convertvector(back != x, I32), away = (U32)__builtin_convertvector(a > b, I32);
  return ((U32)near + away) | (inexact & 1);  // masks are 0 or -1
#endif
}

PMRL_INLINE F64 load_native(const double* from) { return load_vector(from); }
PMRL_INLINE F64 load_native(const float* from) { return widen(load_vector(from)); }
PMRL_INLINE F64 load_native(const BFloat16* from) {
  const U16 half = load_vector(reinterpret_cast<const uint16_t*>(from));
  return widen((F32)(__builtin_convertvector(half, U32) << 16));
}
PMRL_INLINE F64 load_native(const Float16* from) {
  const U16 half = load_vector(reinterpret_cast<const uint16_t*>(from));
#if defined(__F16C__) && defined(__AVX512F__)
  return widen((F32)_mm256_cvtph_ps((__m128i)half));
#elif defined(__F16C__)
  int64_t bits;
  memcpy(&bits, &half, sizeof bits);
  return widen((F32)_mm_cvtph_ps(_mm_cvtsi64_si128(bits)));
#else
  const U32 h = __builtin_convertvector(half, U32);
  const U32 exponent = h & 0x7c00, sign = (h & 0x8000) << 16;
  U32 normal = ((h & 0x7fff) << 13) + (112u << 23);
  normal = exponent == 0x7c00 ? normal + (112u << 23) : normal;
  const F32 subnormal = __builtin_convertvector((I32)(h & 0x3ff), F32) * 0x1p-24f;
  return widen((F32)((exponent == 0 ? (U32)subnormal : normal) | sign));
#endif
}

PMRL_INLINE void store_native(double* to, F64 x) { store_vector(to, x); }
PMRL_INLINE void store_native(float* to, F64 x) { store_vector(to, narrow(x)); }
PMRL_INLINE void store_native(BFloat16* to, F64 x) {
  const U32 b = narrow_to_odd(x);
  U32 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  rounded = (b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded;  // a NaN must not round to Inf
  store_vector(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(rounded, U16));
}
PMRL_INLINE void store_native(Float16* to, F64 x) {
  const U32 b = narrow_to_odd(x);
#if defined(__F16C__) && defined(__AVX512F__)
  const __m128i half = _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &half, sizeof(U16));
#elif defined(__F16C__)
  const __m128i half = _mm_cvtps_ph((__m128)b, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &half, sizeof(U16));
#else
  const U32 a = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  const U32 normal = (a + 0xc8000fffu + ((a >> 13) & 1)) >> 13;
  const U32 subnormal = (U32)((F32)a + 0.5f) - 0x3f000000u;  // the addition rounds
  U32 h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x47800000u ? (a > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u) : h;
  store_vector(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(h | sign, U16));
#endif
}

// The last d % kNative elements, the rest read as zeros.
template <class Element>
PMRL_INLINE F64 load_native(const Element* from, int64_t n) {
  Element buffer[kNative] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
  return load_native(static_cast<const Element*>(buffer));
}

template <class Element>
PMRL_INLINE void store_native(Element* to, F64 x, int64_t n) {
  Element buffer[kNative];
  store_native(buffer, x);
  for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
}

PMRL_INLINE F64 broadcast(double x) { return x - F64{}; }

}  // namespace
}  // namespace pmrl
