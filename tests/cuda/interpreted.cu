// What nvcc makes of these is run by tests/tools/ptx.py: a kernel for each thing that it takes, and for each mistake that
// it is to find, with the mistake as a template argument. A GPU never sees them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Rows {
  const double* x[4];
  long long stride[4];
  float factor;
};

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// --- Parameters

KERNEL(64) rows_from_a_struct(Rows rows, double shift, float scale, unsigned char which, int n, double* y) {
  const int i = threadIdx.x;
  if (i < n) y[i] = rows.x[which][i * rows.stride[which]] * rows.factor + shift * scale;
}

// As many structs as threads ask for: through a copy in local memory, or the address of the parameter.
KERNEL(64) rows_by_thread(Rows rows, double* y) {
  const int i = threadIdx.x;
  y[i] = rows.x[i & 3][i * rows.stride[i & 3]];
}

KERNEL(64) rows_in_place(const __grid_constant__ Rows rows, double* y) {
  const int i = threadIdx.x;
  y[i] = rows.x[i & 3][i * rows.stride[i & 3]];
}

KERNEL(64) numbered(int* y) { y[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * gridDim.x + blockDim.x; }

extern "C" __global__ void unbounded(int* y) { y[threadIdx.x] = threadIdx.x; }

// --- Memory

extern __shared__ double dynamic[];

// Three declared arrays, one that the launch adds, and a pointer of which only the run tells where it points.
KERNEL(64) spaces(const double* x, const int* where, double* y) {
  __shared__ signed char odd[5];
  __shared__ double first[64];
  __shared__ float second[65];
  const int i = threadIdx.x;
  double own[4] = {x[i], 2 * x[i], 3 * x[i], 4 * x[i]};
  first[i] = 10 * x[i], second[i] = 20 * static_cast<float>(x[i]), dynamic[i] = 30 * x[i];
  if (i < 5) odd[i] = i;
  __syncthreads();
  const double* places[4] = {x, first, dynamic, own};
  const int w = where[i];
  y[i] = places[w][w == 3 ? i % 4 : 63 - i];
  y[64 + i] = second[63 - i];
  y[128 + i] = odd[i % 5];
}

__constant__ double table[3] = {0.5, -2, 1e300};
__device__ unsigned launches = 40;

KERNEL(32) of_the_module(double* y) {
  y[threadIdx.x] = table[threadIdx.x % 3];
  if (threadIdx.x == 0) y[32] = ++launches;
}

KERNEL(64) local_array(const int* at, double* y) {
  double own[8];
  for (int i = 0; i < 8; ++i) own[i] = y[i] + threadIdx.x;
  for (int i = 0; i < 8; ++i) own[at[i] % 8] += own[i];  // nvcc keeps no array in registers whose indices it does not know
  y[8 + threadIdx.x] = own[at[8]];
}

KERNEL(64) unwritten(const int* at, double* y) {
  __shared__ double held[64];
  double own[8];
  if (threadIdx.x < 32) held[threadIdx.x] = 1;
  own[at[0]] = 1, own[at[1]] = 2;
  __syncthreads();
  y[threadIdx.x] = held[threadIdx.x];
  y[64 + threadIdx.x] = own[at[2 + threadIdx.x % 2]];
}

KERNEL(64) atomics(const int* x, int* y, unsigned* wrapped) {
  __shared__ int histogram[8];
  const int i = threadIdx.x;
  if (i < 8) histogram[i] = 0;
  __syncthreads();
  atomicAdd(histogram + x[i], 1);
  __syncthreads();
  if (i < 8) atomicAdd(y + i, histogram[i]);
  atomicMax(y + 8, x[i]);
  atomicMin(y + 9, x[i]);
  atomicOr(y + 10, 1 << x[i]);
  if (i == 5) atomicCAS(y + 11, 7, 70);
  if (i == 6) y[12 + blockIdx.x] = atomicExch(y + 14, 9);
  atomicInc(wrapped, 9);
}

// --- Lanes

KERNEL(64) segments(const double* x, int width, int by, double* y) {
  const int i = threadIdx.x;
  y[i] = __shfl_xor_sync(~0u, x[i], by, width);
  y[64 + i] = __shfl_up_sync(~0u, x[i], by, width);
  y[128 + i] = __shfl_down_sync(~0u, x[i], by, width);
  y[192 + i] = __shfl_sync(~0u, x[i], by, width);
}

// Half of the lanes are elsewhere; those that exchange must name themselves.
template <unsigned LANES>
__device__ void half_a_warp(const int* x, int* y) {
  const int i = threadIdx.x;
  if (i % 32 < 16) y[i] = __shfl_xor_sync(LANES, x[i], 1);
}
KERNEL(64) exchange_of_half(const int* x, int* y) { half_a_warp<0x0000ffffu>(x, y); }
KERNEL(64) exchange_with_nobody(const int* x, int* y) { half_a_warp<0xffffffffu>(x, y); }

KERNEL(64) votes(const int* x, int* y) {
  const int i = threadIdx.x;
  y[i] = __ballot_sync(~0u, x[i] > 4);
  y[64 + i] = __any_sync(~0u, x[i] > 6) + 2 * __all_sync(~0u, x[i] > 0);
  y[128 + i] = __reduce_add_sync(~0u, x[i]);
}

// --- Numbers

KERNEL(64) conversions(const float* f, const double* q, const __half* h, const __nv_bfloat16* b, __half* to_half,
                       __nv_bfloat16* to_bfloat16, float* to_float) {
  const int i = threadIdx.x;
  to_half[i] = __float2half_rn(f[i]);
  to_half[64 + i] = __double2half(q[i]);
  reinterpret_cast<__half2*>(to_half + 128)[i] = __floats2half2_rn(f[i], f[63 - i]);
  to_bfloat16[i] = __float2bfloat16_rn(f[i]);
  to_bfloat16[64 + i] = __double2bfloat16(q[i]);
  reinterpret_cast<__nv_bfloat162*>(to_bfloat16 + 128)[i] = __floats2bfloat162_rn(f[i], f[63 - i]);
  to_float[i] = __half2float(h[i]);
  to_float[64 + i] = __bfloat162float(b[i]);
  const float2 pair = __half22float2(reinterpret_cast<const __half2*>(h)[i % 32]);
  to_float[128 + i] = pair.x - pair.y;
  to_float[192 + i] = __double2float_rz(q[i]);
  to_float[256 + i] = __double2float_ru(q[i]);
  to_float[320 + i] = __double2float_rd(q[i]);
}

KERNEL(64) integers(const int* x, const unsigned long long* u, int n, unsigned m, int* y, unsigned long long* v) {
  const int i = threadIdx.x;
  y[i] = x[i] / n;
  y[64 + i] = x[i] % n;
  y[128 + i] = __mulhi(x[i], 123456789);
  y[192 + i] = __popc(x[i]) + 100 * __clz(x[i]);
  y[256 + i] = __brev(x[i]);
  y[320 + i] = __ffs(x[i]);
  y[384 + i] = __funnelshift_l(x[i], x[63 - i], i);
  unsigned inserted, field;
  asm("bfi.b32 %0, %1, %2, 3, 7;" : "=r"(inserted) : "r"(x[i]), "r"(n));
  asm("bfe.u32 %0, %1, %2, 9;" : "=r"(field) : "r"(x[i]), "r"(i % 32));
  unsigned parity;
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(parity) : "r"(x[i]), "r"(x[63 - i]), "r"(n));
  y[576 + i] = parity;
  y[448 + i] = inserted;
  y[512 + i] = field;
  v[i] = u[i] / m;
  v[64 + i] = u[i] % 1000003;
  v[128 + i] = __umul64hi(u[i], u[63 - i]);
}

KERNEL(64) functions(const float* x, const float* z, float* y) {  // by -prec-div=false -prec-sqrt=false
  const int i = threadIdx.x;
  y[i] = x[i] / z[i];
  y[64 + i] = sqrtf(x[i]);
  y[128 + i] = rsqrtf(x[i]);
  y[192 + i] = 1 / z[i];
  y[256 + i] = expf(z[i]);
}

KERNEL(64) directions(const double* x, const float* f, double* y) {
  const int i = threadIdx.x;
  y[i] = __dadd_rd(1, x[i]);
  y[64 + i] = __dadd_ru(1, x[i]);
  y[128 + i] = __dadd_rz(-1, x[i]);
  y[192 + i] = __fmaf_ru(f[i], f[i], 1);
  y[256 + i] = __fmaf_rd(f[i], f[i], 1);
}

// --- Order

// The last block to finish adds up what each of them has left in partial, which FENCE makes the others' to read.
template <bool FENCE, bool BARRIER, bool VOLATILE>
__device__ void sum_of(const double* x, double* partial, unsigned* counter, double* total) {
  __shared__ double of_warps[2];
  __shared__ bool last;
  double sum = x[blockIdx.x * 64 + threadIdx.x];
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  if (BARRIER) __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = of_warps[0] + of_warps[1];
    if (FENCE) __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x) return;
  double all = 0;
  for (int b = 0; b < gridDim.x; ++b)
    if constexpr (VOLATILE)
      all += static_cast<volatile const double*>(partial)[b];
    else
      all += partial[b];
  *total = all;
}
#define SUM(name, ...)                                                                       \
  KERNEL(64) name(const double* x, double* partial, unsigned* counter, double* total) { \
    sum_of<__VA_ARGS__>(x, partial, counter, total);                                         \
  }
SUM(last_adds_up, true, true, true)
SUM(last_adds_up_without_fence, false, true, true)
SUM(last_adds_up_without_barrier, true, false, true)
SUM(last_adds_up_not_volatile, true, true, false)

// Everyone leaves something, and one thread counts the block when it is ready. What is between the two:
enum Order { NOTHING, BARRIER_FENCE, LANES_FENCE, FENCES_BARRIER, FENCES };

template <Order ORDER>
__device__ void left_by_all(double* partial, unsigned* counter, double* y) {
  __shared__ bool last;
  const int n = blockDim.x, i = threadIdx.x;
  partial[blockIdx.x * n + i] = i;
  if (ORDER >= FENCES_BARRIER) __threadfence();
  if (ORDER == LANES_FENCE) __syncwarp();
  if (ORDER == BARRIER_FENCE || ORDER == FENCES_BARRIER) __syncthreads();
  if (i == 0) {
    if (ORDER < FENCES_BARRIER) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  for (int b = 0; b < gridDim.x; ++b) y[b * n + i] = static_cast<volatile const double*>(partial)[b * n + n - 1 - i];
}
#define LEFT(name, ORDER) \
  KERNEL(64) name(double* partial, unsigned* counter, double* y) { left_by_all<ORDER>(partial, counter, y); }
LEFT(left_before_nothing, NOTHING)
LEFT(left_before_barrier_and_fence, BARRIER_FENCE)
LEFT(left_before_barrier_of_lanes_and_fence, LANES_FENCE)
LEFT(left_before_fences_and_barrier, FENCES_BARRIER)
LEFT(left_before_fences, FENCES)

template <bool BARRIER>
__device__ void reverse(const double* x, double* y) {
  __shared__ double held[64];
  held[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) __syncthreads();
  y[threadIdx.x] = held[63 - threadIdx.x];
}
KERNEL(64) reversed(const double* x, double* y) { reverse<true>(x, y); }
KERNEL(64) reversed_without_barrier(const double* x, double* y) { reverse<false>(x, y); }

template <bool BARRIER, bool VOLATILE>
__device__ void reverse_lanes(const double* x, double* y) {
  __shared__ double held[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  held[warp][lane] = x[threadIdx.x];
  if (BARRIER) __syncwarp();
  if constexpr (VOLATILE)
    y[threadIdx.x] = static_cast<volatile const double*>(held[warp])[31 - lane];
  else
    y[threadIdx.x] = held[warp][31 - lane];
}
KERNEL(64) reversed_lanes(const double* x, double* y) { reverse_lanes<true, false>(x, y); }
KERNEL(64) reversed_lanes_without_barrier(const double* x, double* y) { reverse_lanes<false, false>(x, y); }
KERNEL(64) reversed_lanes_by_volatile(const double* x, double* y) { reverse_lanes<false, true>(x, y); }

template <bool BARRIER>
__device__ void reuse(const double* x, double* y) {
  __shared__ double held[64];
  for (int round = 0; round < 2; ++round) {
    held[threadIdx.x] = x[64 * round + threadIdx.x];
    __syncthreads();
    y[64 * round + threadIdx.x] = held[63 - threadIdx.x];
    if (BARRIER) __syncthreads();
  }
}
KERNEL(64) reused(const double* x, double* y) { reuse<true>(x, y); }
KERNEL(64) reused_too_soon(const double* x, double* y) { reuse<false>(x, y); }

template <bool CHECK>
__device__ void twice(const double* x, int n, double* y) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (!CHECK || i < n) y[i] = 2 * x[i];
}
KERNEL(64) doubled(const double* x, int n, double* y) { twice<true>(x, n, y); }
KERNEL(64) doubled_beyond(const double* x, int n, double* y) { twice<false>(x, n, y); }

// --- What is counted, and what is refused

KERNEL(128) counted(const double* x, int n, double* y) {
  double sum = static_cast<volatile const double*>(x)[threadIdx.x];  // by all, not only by those who need it
  if (threadIdx.x >= 96) return;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum = fma(sum, sum, 1.0);
  y[threadIdx.x] = sqrt(sum);
  if (threadIdx.x < 8) y[128 + threadIdx.x] = sum;
}

KERNEL(32) trapped(int* x) {
  if (x[threadIdx.x] < 0) __trap();
}

KERNEL(32) floating_atomic(double* x) { atomicAdd(x, 1.0); }

__device__ __noinline__ double not_inlined(double x, int n) {
  for (int i = 0; i < n; ++i) x = sqrt(x + i);
  return x;
}
KERNEL(32) calling(double* x, int n) { x[threadIdx.x] = not_inlined(x[threadIdx.x], n); }

// --- Barriers by number, from different places of the program

template <int Second, int Threads>
__device__ void meet_and_reverse(double* x) {
  __shared__ double kept[32];
  if (threadIdx.x < 32) {
    kept[threadIdx.x] = x[threadIdx.x];
    asm volatile("barrier.sync 1, %0;" ::"n"(Threads) : "memory");
  } else {
    asm volatile("barrier.sync %0, %1;" ::"n"(Second), "n"(Threads) : "memory");
    x[threadIdx.x] = kept[63 - threadIdx.x];
  }
}
KERNEL(64) meeting(double* x) { meet_and_reverse<1, 64>(x); }
KERNEL(64) meeting_elsewhere(double* x) { meet_and_reverse<2, 64>(x); }
KERNEL(64) barrier_of_half(double* x) { meet_and_reverse<1, 32>(x); }

// --- Copies on their way

template <int Left>
__device__ void copy_ahead(const double* x, double* y) {
  __shared__ double2 kept[2][32];
  for (int i = 0; i < 2; ++i) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&kept[i][threadIdx.x]));
    const int bytes = i == 1 && threadIdx.x == 5 ? 0 : 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(x + 64 * i + 2 * threadIdx.x), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  for (int i = 0; i < 2; ++i) {
    if (i == 0)
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
      asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
    y[64 * i + 2 * threadIdx.x] = kept[i][threadIdx.x].x;
    y[64 * i + 2 * threadIdx.x + 1] = kept[i][threadIdx.x].y;
  }
}
KERNEL(32) copied_ahead(const double* x, double* y) { copy_ahead<0>(x, y); }
KERNEL(32) copied_too_late(const double* x, double* y) { copy_ahead<1>(x, y); }

KERNEL(32) barrier_of_some(double* x) {
  if (threadIdx.x < 16) __syncwarp(0xffff);
  x[threadIdx.x] = 1;
}
