// What every kernel stands on: types, bf16, the warp, tensor-core products, asynchronous copies. Inline PTX stands
// here and, for what Hopper alone has, in hopper.cuh.
//
// On a GPU the functions below are compiled by NVRTC, without a toolkit header. With ARES_SIM they come from sim.h, and the
// same kernels run on the CPU under the simulator's checks. Constants reach a kernel as -D defines from src/ops/<op>/cuda.rs;
// ARCH (80, 90, …) names the architecture.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/// A bfloat16 as it lies in memory.
struct bf16 {
    u16 bits;
};

/// Eight bf16: one 16-byte access.
struct alignas(16) bf16x8 {
    bf16 v[8];
};

/// Four floats: one 16-byte access.
struct alignas(16) float4x {
    float v[4];
};

constexpr u32 WARP = 32, WARPGROUP = 128;

#ifdef ARES_SIM
#include "sim.h"
#else

#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__

/// The block's dynamic shared memory as a kernel's struct.
template <typename Shared>
DEVICE Shared& shared_memory() {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    return *reinterpret_cast<Shared*>(shared_bytes);
}

DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

/// What every kernel begins with, in all threads: waits until the launches before it have ended and what they wrote can be seen, then
/// lets the next one come and wait in its turn, so that its start costs no time of its own.
DEVICE void after_previous() {
#if ARCH >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// All threads of the block; orders their accesses to shared memory.
DEVICE void block_barrier() { __syncthreads(); }
/// All lanes of the warp; orders their accesses to shared memory.
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE float shuffle(float value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE u32 shuffle(u32 value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
/// Bit i: the predicate of lane i.
DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEVICE u32 count_ones(u32 bits) { return __popc(bits); }
/// Adds to a number in shared memory that other threads add to, too; a barrier must follow before any of them reads it.
DEVICE void shared_add(u32& to, u32 value) { atomicAdd(&to, value); }

DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }

/// 2^x, 2 ulp, subnormal results flushed.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// 1/x, 1 ulp, subnormal numbers flushed. A division rounds exactly, for ten instructions and a branch.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Round to nearest even; NaN stays NaN.
DEVICE bf16 to_bf16(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

/// Two bf16 in one register, `low` in the low half.
DEVICE u32 to_bf16x2(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

/// d += a·b on tensor cores: a 16×16 row-major, b 16×8 column-major, d 16×8 f32, spread over the warp as the PTX ISA
/// draws mma.m16n8k16.
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8×8 matrices of bf16 from shared memory; lane i names row i%8 of matrix i/8 (16 bytes, aligned).
DEVICE void load_matrix_x4(u32 (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// The same, each matrix transposed.
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Starts copying 16 aligned bytes to shared memory; with `valid` false it writes zeros and reads nothing, wherever `global`
/// points.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/// Closes the group of copies started since the last one.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until at most `Pending` groups of this thread are under way; a barrier must follow before others read them.
template <u32 Pending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#endif

// ------------------------------------------------------------------------------------------------ the same on both

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define INFINITE bits_float(0x7f800000u)

/// e^x, as near as exp2_fast.
DEVICE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

DEVICE float to_float(bf16 value) { return bits_float(static_cast<u32>(value.bits) << 16); }
DEVICE float low_float(u32 pair) { return bits_float(pair << 16); }
DEVICE float high_float(u32 pair) { return bits_float(pair & 0xffff0000u); }

DEVICE u32 minimum(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 maximum(u32 a, u32 b) { return a > b ? a : b; }
DEVICE float maximum(float a, float b) { return a > b ? a : b; }

/// Sum over the warp, the same bits in every lane.
DEVICE float warp_sum(float value) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

/// A mean square that overflows would give 0, and its row a plausible nothing: it gives NaN, which is seen.
DEVICE float rstd_of(float mean_square) { return rsqrtf(mean_square) + 0.0f * mean_square; }

/// c·tanh(x/c) to some 1e-7 of c; x itself where c is 0.
DEVICE float capped(float x, float cap) {
    return cap > 0.0f ? cap * (1.0f - 2.0f / (exp2_fast(x * (2.0f * LOG2_E / cap)) + 1.0f)) : x;
}

/// The slope of that, by what came of it; of a hidden −∞ it is 0.
DEVICE float cap_slope(float capped, float cap) {
    float tanh = cap > 0.0f ? maximum(-1.0f, capped / cap) : 0.0f;
    return 1.0f - tanh * tanh;
}

DEVICE float warp_maximum(float value) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) value = maximum(value, shuffle_xor(value, mask));
    return value;
}

/// Sum over a block of WARPS warps, the same bits in every thread; `scratch` holds WARPS floats of shared memory. Begins
/// and ends with a barrier, so the scratch can be used again at once.
template <u32 WARPS>
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    block_barrier();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    block_barrier();
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += scratch[w];
    block_barrier();
    return sum;
}

template <u32 WARPS>
DEVICE float block_maximum(float value, float* scratch) {
    value = warp_maximum(value);
    block_barrier();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    block_barrier();
    float result = scratch[0];
#pragma unroll
    for (u32 w = 1; w < WARPS; w++) result = maximum(result, scratch[w]);
    block_barrier();
    return result;
}
