// What HIPRTC puts before a source, as far as backends/cupy needs it, for a clang without ROCm: the compiler of the same
// code, whose registers and scratch memory can then be read off. Never run, so that functions which ROCm's libraries have
// (log1pf) may be others of their size.
#pragma once
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))

struct uint4 { unsigned x, y, z, w; };
struct ThreadIndex { struct { __device__ operator unsigned() const { return __builtin_amdgcn_workitem_id_x(); } } x; };
struct BlockIndex { struct { __device__ operator unsigned() const { return __builtin_amdgcn_workgroup_id_x(); } } x; };
struct BlockSize { struct { __device__ operator unsigned() const { return __builtin_amdgcn_workgroup_size_x(); } } x; };
static const __device__ ThreadIndex threadIdx{};
static const __device__ BlockIndex blockIdx{};
static const __device__ BlockSize blockDim{};

static inline __device__ void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
static inline __device__ int lane() { return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); }
static inline __device__ int __shfl(int value, int from, int width) {
    return __builtin_amdgcn_ds_bpermute(((from & (width - 1)) + (lane() & ~(width - 1))) << 2, value);
}
static inline __device__ int __shfl_xor(int value, int mask, int width) {
    int self = lane(), from = self ^ mask;
    return __builtin_amdgcn_ds_bpermute((from >= ((self + width) & ~(width - 1)) ? self : from) << 2, value);
}
static inline __device__ float __shfl(float value, int from, int width) {
    return __builtin_bit_cast(float, __shfl(__builtin_bit_cast(int, value), from, width));
}
static inline __device__ float __shfl_xor(float value, int mask, int width) {
    return __builtin_bit_cast(float, __shfl_xor(__builtin_bit_cast(int, value), mask, width));
}
static inline __device__ float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
static inline __device__ unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
static inline __device__ int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline __device__ float __fadd_rn(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
template <class T> static inline __device__ T atomicAdd(T* at, T value) {
    return __hip_atomic_fetch_add(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
static inline __device__ float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static inline __device__ float fminf(float a, float b) { return __builtin_fminf(a, b); }
static inline __device__ float expf(float x) { return __builtin_expf(x); }
static inline __device__ float logf(float x) { return __builtin_logf(x); }
static inline __device__ float log1pf(float x) { return __builtin_logf(1.f + x); }
static inline __device__ long long min(long long a, long long b) { return a < b ? a : b; }
static inline __device__ long long max(long long a, long long b) { return a > b ? a : b; }
