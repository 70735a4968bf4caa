// Rows of embeddings and gradients as entries of sums (sums.cuh), on a device: packs of up to 16 bytes, one for each lane,
// and single elements for rows that are not made of whole packs. And sums over the lanes of an instance.
#pragma once

#include <type_traits>

#include "sums.cuh"

namespace pmrl {
namespace cuda {

// ---- single elements ----------------------------------------------------------------------------

PMRL_ON_DEVICE float widen(float x) { return x; }
PMRL_ON_DEVICE double widen(double x) { return x; }
PMRL_ON_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
PMRL_ON_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// From float64 by way of float32, as hardware does it. The second rounding of a number half way between two matters once
// in 65536.
template <class T>
PMRL_ON_DEVICE T narrowed(std::conditional_t<std::is_same<T, double>::value, double, float> x);
template <>
__device__ __forceinline__ float narrowed<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrowed<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ Float16 narrowed<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ BFloat16 narrowed<BFloat16>(float x) {
  BFloat16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = static_cast<uint16_t>(is_nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
  return y;
}

template <class T>
PMRL_ON_DEVICE auto element(const Rows& x, const char* row, int c) {
  if constexpr (!kIsMixed<T>) {
    return widen(reinterpret_cast<const T*>(row)[c]);
  } else {
    switch (x.dtype) {
      case Dtype::kFloat64: return reinterpret_cast<const double*>(row)[c];
      case Dtype::kBFloat16: return static_cast<double>(widen(reinterpret_cast<const BFloat16*>(row)[c]));
      case Dtype::kFloat16: return static_cast<double>(widen(reinterpret_cast<const Float16*>(row)[c]));
      default: return static_cast<double>(reinterpret_cast<const float*>(row)[c]);
    }
  }
}

template <class T, class Number>
PMRL_ON_DEVICE void put_element(const Rows& x, char* row, int c, Number y) {
  if constexpr (!kIsMixed<T>) {
    reinterpret_cast<T*>(row)[c] = narrowed<T>(y);
  } else {
    switch (x.dtype) {
      case Dtype::kFloat64: reinterpret_cast<double*>(row)[c] = y; break;
      case Dtype::kBFloat16: reinterpret_cast<BFloat16*>(row)[c] = narrowed<BFloat16>(y); break;
      case Dtype::kFloat16: reinterpret_cast<Float16*>(row)[c] = narrowed<Float16>(y); break;
      default: reinterpret_cast<float*>(row)[c] = narrowed<float>(y);
    }
  }
}

// A number of a tensor that is float64 or else float32.
PMRL_ON_DEVICE double number(const void* data, int64_t at, bool is_float64) {
  return is_float64 ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
}
template <class Number>
PMRL_ON_DEVICE void put_number(void* data, int64_t at, Number x, bool is_float64) {
  if (is_float64)
    static_cast<double*>(data)[at] = x;
  else
    static_cast<float*>(data)[at] = static_cast<float>(x);
}
PMRL_ON_DEVICE double value_of(const Values& x, int64_t i, int64_t j, bool is_float64) {
  return number(x.data, i * x.stride0 + j * x.stride1, is_float64);
}

// ---- packs --------------------------------------------------------------------------------------

// N elements, N sizeof(T) = 4, 8 or 16 bytes.
template <class T, int N>
struct Pack {
  static constexpr int kWords = N * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kOfWord = 4 / static_cast<int>(sizeof(T));
  unsigned words[kWords];

  __device__ __forceinline__ void load(const char* at) {
    if constexpr (kWords == 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kWords == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(at));
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = __ldg(reinterpret_cast<const unsigned*>(at));
    }
  }
  __device__ __forceinline__ void load_shared(const char* at) {
    static_assert(kWords == 4);
    const uint4 v = *reinterpret_cast<const uint4*>(at);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  // Nobody reads gradients again soon: they need not stay in cache.
  __device__ __forceinline__ void store(char* at) const {
    if constexpr (kWords == 4)
      __stcs(reinterpret_cast<uint4*>(at), make_uint4(words[0], words[1], words[2], words[3]));
    else if constexpr (kWords == 2)
      __stcs(reinterpret_cast<uint2*>(at), make_uint2(words[0], words[1]));
    else
      __stcs(reinterpret_cast<unsigned*>(at), words[0]);
  }
  __device__ __forceinline__ void clear() {
    PMRL_EVERY for (int w = 0; w < kWords; ++w) words[w] = 0;
  }
  __device__ __forceinline__ auto get(int e) const {
    if constexpr (sizeof(T) == 8) {
      return __hiloint2double(static_cast<int>(words[2 * e + 1]), static_cast<int>(words[2 * e]));
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[e]);
    } else {
      return widen(T{static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2))});
    }
  }
  template <class Number>
  __device__ __forceinline__ void set(const Number* x) {
    PMRL_EVERY for (int e = 0; e < N; ++e) {
      if constexpr (sizeof(T) == 8) {
        words[2 * e] = static_cast<unsigned>(__double2loint(x[e]));
        words[2 * e + 1] = static_cast<unsigned>(__double2hiint(x[e]));
      } else if constexpr (sizeof(T) == 4) {
        words[e] = __float_as_uint(static_cast<float>(x[e]));
      } else {
        const unsigned bits = narrowed<T>(x[e]).bits;
        words[e / 2] = e % 2 ? words[e / 2] | bits << 16 : bits;
      }
    }
  }
};
template <>
struct Pack<Mixed, 1> {};

// N numbers of a row of float32, or of float64 if that is what T comes with.
template <class T>
using Wide = typename std::conditional<std::is_same<T, double>::value, double, float>::type;

template <class T, class Number, int N>
PMRL_ON_DEVICE void load_wide(const char* row, int c, Number (&x)[N]) {
  constexpr int M = N < 16 / static_cast<int>(sizeof(Wide<T>)) ? N : 16 / static_cast<int>(sizeof(Wide<T>));
  PMRL_EVERY for (int first = 0; first < N; first += M) {
    Pack<Wide<T>, M> pack;
    pack.load(row + static_cast<int64_t>(c + first) * static_cast<int>(sizeof(Wide<T>)));
    PMRL_EVERY for (int e = 0; e < M; ++e) x[first + e] = pack.get(e);
  }
}
template <class T, class Number, int N>
PMRL_ON_DEVICE void store_wide(char* row, int c, const Number (&x)[N]) {
  constexpr int M = N < 16 / static_cast<int>(sizeof(Wide<T>)) ? N : 16 / static_cast<int>(sizeof(Wide<T>));
  PMRL_EVERY for (int first = 0; first < N; first += M) {
    Pack<Wide<T>, M> pack;
    pack.set(x + first);
    pack.store(row + static_cast<int64_t>(c + first) * static_cast<int>(sizeof(Wide<T>)));
  }
}

// ---- the lanes of an instance -------------------------------------------------------------------

// Which part of its instance a lane reads, and which of the warp's instances that is, of those read at once.
struct Lane {
  int part, mine, at_once;
};

PMRL_ON_DEVICE Lane lane_of(int lanes) {
  const int lane = threadIdx.x % kWarp;
  return {lane & (lanes - 1), lane / lanes, kWarp / lanes};
}

// Everybody's sum over the lanes of an instance, in the same order for each.
template <class S, int N>
PMRL_ON_DEVICE void add_up(S (&sums)[N], int lanes) {
#pragma unroll 1
  for (int by = lanes / 2; by; by /= 2)
    PMRL_EVERY for (int t = 0; t < N; ++t) add(sums[t], from_lane(sums[t], by));
}

// The k rows of an instance. Absent ones are zeros whatever is in their place, which is not read. Times 2^-exponent
// where there are float64 rows; that is a float64, too (see exponent_of).
template <int K, class T>
struct Instance {
  static constexpr bool kScales = std::is_same<T, double>::value || std::is_same<T, Mixed>::value;
  const Batch& b;
  const char* row[K];
  bool here[K];
  double factor[kScales ? K : 1];

  __device__ __forceinline__ Instance(const Batch& b, int64_t i) : b(b) { move_to(i); }
  __device__ __forceinline__ void move_to(int64_t i) {
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      row[m] = b.x[m].data + i * b.x[m].stride;
      here[m] = is_present(b.mask, i * K + m);
      if constexpr (kScales) factor[m] = 1.0;
    }
  }
  __device__ __forceinline__ void scale(const double* exponents, int64_t stride) {
    if constexpr (kScales) {
      PMRL_EVERY for (int m = 0; m < K; ++m) factor[m] = pow2(-exponents[m * stride]);
    }
  }
  template <class Number>
  __device__ __forceinline__ Number scaled_by(int m, Number x) const {
    if constexpr (kScales) return x * factor[m];
    return x;
  }
  // A pack of each row from c on.
  template <int N>
  __device__ __forceinline__ void fetch(int c, Pack<T, N> (&packs)[K]) const {
    PMRL_EVERY for (int m = 0; m < K; ++m) {
      packs[m].clear();
      if (here[m]) packs[m].load(row[m] + static_cast<int64_t>(c) * static_cast<int>(sizeof(T)));
    }
  }
  template <class Number, int N>
  __device__ __forceinline__ void widen(const Pack<T, N> (&packs)[K], Number (&x)[K][N]) const {
    PMRL_EVERY for (int m = 0; m < K; ++m)
      PMRL_EVERY for (int e = 0; e < N; ++e) x[m][e] = scaled_by<Number>(m, packs[m].get(e));
  }
  // An element of row m.
  template <class Number>
  __device__ __forceinline__ void load(int m, int c, Number (&x)[1]) const {
    x[0] = here[m] ? scaled_by<Number>(m, element<T>(b.x[m], row[m], c)) : Number(0.0);
  }
};

// All lanes of a warp have N sums of one instance. Afterwards sums[0], sums[1], ... of a lane are those over all lanes of
// what was in the places beginning at the one returned; other lanes may have them too. Half as many numbers are exchanged
// in each step as in the one before.
template <int N>
struct Spread {
  static constexpr int kPadded = N > 32 ? 64 : N > 16 ? 32 : N > 8 ? 16 : N > 4 ? 8 : 4;
  static constexpr int kOfLane = kPadded > kWarp ? kPadded / kWarp : 1;

  static __device__ __forceinline__ int place(int lane) { return lane * kPadded / kWarp; }
  template <int By = kWarp / 2, int Half = kPadded / 2>
  static __device__ __forceinline__ void add_up(double (&sums)[kPadded], int lane) {
    if constexpr (By > 0) {
      if constexpr (Half == 0) sums[0] += __shfl_xor_sync(~0u, sums[0], By);
      const bool upper = lane & By;
      PMRL_EVERY for (int t = 0; t < Half; ++t) {
        const double other = Half + t < N ? sums[Half + t] : 0.0;
        const double given = __shfl_xor_sync(~0u, upper ? sums[t] : other, By);
        sums[t] = (upper ? other : sums[t]) + given;
      }
      add_up<By / 2, Half / 2>(sums, lane);
    }
  }
};

template <class Number, int K, class T, class Body>
PMRL_ON_DEVICE void by_elements(const Instance<K, T>& rows, int part, Body body) {
#pragma unroll 1
  for (int c = part; c < rows.b.d; c += rows.b.lanes) {
    Number x[K][1];
    PMRL_EVERY for (int m = 0; m < K; ++m) rows.load(m, c, x[m]);
    body(c, x);
  }
}

// How a lane goes along the rows of an instance: by whole packs of N elements, the first of which are on their way from
// `begin` on, and the next ones while others are computed with, of each row two if `Two`; or by single elements.
template <int K, class T, int N, bool Two>
struct Along {
  Pack<T, N> first[K], second[Two ? K : 1];

  __device__ __forceinline__ void begin(const Instance<K, T>& rows, int part) {
    const int d = rows.b.d, step = rows.b.lanes * N, c = part * N;
    if (!rows.b.whole) return;
    if (c < d) rows.fetch(c, first);
    if constexpr (Two) {
      if (c + step < d) rows.fetch(c + step, second);
    }
  }
  template <class Number, class Body>
  __device__ __forceinline__ void use(const Instance<K, T>& rows, int c, Pack<T, N> (&packs)[K], int next, Body body) {
    Number x[K][N];
    rows.widen(packs, x);
    if (next < rows.b.d) rows.fetch(next, packs);
    body(c, x);
  }
  // body(c, x) for all places c at which this lane takes elements, x (K, M) of them as Number.
  template <class Number, class Body>
  __device__ __forceinline__ void go(const Instance<K, T>& rows, int part, Body body) {
    // What pairs have no numbers for is rare: no code for packs, too.
    constexpr bool rare = kInPairs<T> && std::is_same<Number, double>::value;
    if constexpr (!rare) {
      if (rows.b.whole) return by_packs<Number>(rows, part, body);
    }
    by_elements<Number>(rows, part, body);
  }
  template <class Number, class Body>
  __device__ __forceinline__ void by_packs(const Instance<K, T>& rows, int part, Body body) {
    const int d = rows.b.d, step = rows.b.lanes * N;
#pragma unroll 1
    for (int c = part * N; c < d; c += step) {
      use<Number>(rows, c, first, c + (Two ? 2 : 1) * step, body);
      if constexpr (Two) {
        c += step;
        if (c < d) use<Number>(rows, c, second, c + 2 * step, body);
      }
    }
  }
};
// 16 bytes from memory to shared memory, without passing through registers; zeros, and nothing is read, unless `wanted`.
PMRL_ON_DEVICE void copy_ahead(char* to, const char* from, bool wanted) {
#if __CUDA_ARCH__ >= 800  // nor is `stream` launched on what is older
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
#endif
}
PMRL_ON_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all of this thread's copies have come but those of the last `Groups` commits.
template <int Groups>
PMRL_ON_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

template <int K, int N, bool Two>
struct Along<K, Mixed, N, Two> {
  __device__ __forceinline__ void begin(const Instance<K, Mixed>&, int) {}
  template <class Number, class Body>
  __device__ __forceinline__ void go(const Instance<K, Mixed>& rows, int part, Body body) {
    by_elements<Number>(rows, part, body);
  }
};

template <class Number, int N, bool Two, int K, class T, class Begin, class Body>
PMRL_ON_DEVICE void along_rows(const Instance<K, T>& rows, int part, Begin meanwhile, Body body) {
  Along<K, T, N, Two> along;
  along.begin(rows, part);
  meanwhile();
  along.template go<Number>(rows, part, body);
}

// M of double (&x)[K][M].
template <class Array>
constexpr int kOfEach = static_cast<int>(std::extent<std::remove_reference_t<Array>, 1>::value);

}  // namespace cuda
}  // namespace pmrl
