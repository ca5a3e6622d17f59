// The twins of device.cuh's GPU half in plain C++17 (g++ or clang++): the same names, the same results, carried out by the
// simulator (sim.cpp). A kernel's thread is a fiber; what a whole warp or block does together is one call into the simulator,
// which also learns from the source line whether all of them stand at the same call.
//
// `__builtin_LINE()` as a default argument is the line of the caller.

// What the simulator gives a kernel. Plain numbers in and out, so that no local array has an address (an address that
// leaves the function makes the compiler's access checks watch the array).
struct SimFloats {
    float v[4];
};
struct SimWords {
    u32 v[4];
};
extern "C" {
/// 0–2 threadIdx, 3–5 blockIdx, 6–8 blockDim, 9–11 gridDim.
u32 sim_special(u32 which) noexcept __attribute__((const));
unsigned char* sim_shared() noexcept __attribute__((const));
void sim_after_previous() noexcept;
void sim_block_barrier(u32 line) noexcept;
void sim_warp_barrier(u32 line) noexcept;
u32 sim_shuffle(u32 value, u32 lane, u32 line) noexcept;
u32 sim_shuffle_xor(u32 value, u32 mask, u32 line) noexcept;
u32 sim_ballot(u32 predicate, u32 line) noexcept;
void sim_shared_add(u32* to, u32 value) noexcept;
SimFloats sim_mma(float d0, float d1, float d2, float d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 hopper, u32 line) noexcept;
SimWords sim_load_matrix(const void* row, u32 line) noexcept;
SimWords sim_load_matrix_transposed(const void* row, u32 line) noexcept;
void sim_copy_async(void* shared, const void* global, u32 valid) noexcept;
void sim_copy_commit() noexcept;
void sim_copy_wait(u32 pending) noexcept;
}

// Hidden: a kernel named as a function of the C library is must not be taken for it.
#define KERNEL extern "C" __attribute__((visibility("hidden"))) void
#define DEVICE static inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

struct SimIndex {
    u32 x, y, z;
};
#define threadIdx (SimIndex{sim_special(0), sim_special(1), sim_special(2)})
#define blockIdx (SimIndex{sim_special(3), sim_special(4), sim_special(5)})
#define blockDim (SimIndex{sim_special(6), sim_special(7), sim_special(8)})
#define gridDim (SimIndex{sim_special(9), sim_special(10), sim_special(11)})

// ------------------------------------------------------------------------------------------- what NVRTC knows by itself
// Of it, what a kernel calls.

#ifndef SIM_RUNTIME // which has them from the standard library
extern "C" {
float sqrtf(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float erff(float) noexcept;
}
#endif

DEVICE float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }

// -------------------------------------------------------------------------------------------------- the twins themselves

DEVICE u32 float_bits(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

DEVICE float bits_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

DEVICE void after_previous() { sim_after_previous(); }

template <typename Shared>
DEVICE Shared& shared_memory() {
    return *reinterpret_cast<Shared*>(sim_shared());
}

DEVICE void block_barrier(u32 line = __builtin_LINE()) { sim_block_barrier(line); }
DEVICE void warp_barrier(u32 line = __builtin_LINE()) { sim_warp_barrier(line); }

DEVICE u32 shuffle(u32 value, u32 lane, u32 line = __builtin_LINE()) { return sim_shuffle(value, lane, line); }
DEVICE float shuffle(float value, u32 lane, u32 line = __builtin_LINE()) {
    return bits_float(sim_shuffle(float_bits(value), lane, line));
}
DEVICE u32 shuffle_xor(u32 value, u32 mask, u32 line = __builtin_LINE()) { return sim_shuffle_xor(value, mask, line); }
DEVICE float shuffle_xor(float value, u32 mask, u32 line = __builtin_LINE()) {
    return bits_float(sim_shuffle_xor(float_bits(value), mask, line));
}
DEVICE u32 ballot(bool predicate, u32 line = __builtin_LINE()) { return sim_ballot(predicate, line); }
DEVICE u32 count_ones(u32 bits) { return static_cast<u32>(__builtin_popcount(bits)); }
DEVICE void shared_add(u32& to, u32 value) { sim_shared_add(&to, value); }

/// ex2.approx.ftz: subnormal results become zero.
DEVICE float exp2_fast(float x) {
    float y = __builtin_exp2f(x);
    return y < bits_float(0x00800000u) ? 0.0f : y;  // NaN is not less
}

/// rcp.approx.ftz: subnormal numbers count as zero, on either side.
DEVICE float reciprocal(float x) {
    u32 sign = float_bits(x) & 0x80000000u;
    if ((float_bits(x) & 0x7f800000u) == 0) return bits_float(sign | 0x7f800000u);
    float y = 1.0f / x;
    return (float_bits(y) & 0x7f800000u) == 0 ? bits_float(sign) : y;
}

/// cvt.rn.bf16.f32: to nearest, ties to even; any NaN becomes 0x7fff.
DEVICE u32 sim_bf16_bits(float value) {
    u32 bits = float_bits(value);
    u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return value == value ? rounded : 0x7fffu;
}
DEVICE bf16 to_bf16(float value) { return bf16{static_cast<u16>(sim_bf16_bits(value))}; }
DEVICE u32 to_bf16x2(float low, float high) { return sim_bf16_bits(low) | sim_bf16_bits(high) << 16; }

DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 line = __builtin_LINE()) {
    SimFloats sum = sim_mma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], ARCH >= 90, line);
    d[0] = sum.v[0], d[1] = sum.v[1], d[2] = sum.v[2], d[3] = sum.v[3];
}

DEVICE void load_matrix_x4(u32 (&r)[4], const bf16* row, u32 line = __builtin_LINE()) {
    SimWords words = sim_load_matrix(row, line);
    r[0] = words.v[0], r[1] = words.v[1], r[2] = words.v[2], r[3] = words.v[3];
}

DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const bf16* row, u32 line = __builtin_LINE()) {
    SimWords words = sim_load_matrix_transposed(row, line);
    r[0] = words.v[0], r[1] = words.v[1], r[2] = words.v[2], r[3] = words.v[3];
}

DEVICE void copy_async_16(void* shared, const void* global, bool valid) { sim_copy_async(shared, global, valid); }
DEVICE void copy_async_commit() { sim_copy_commit(); }
template <u32 Pending>
DEVICE void copy_async_wait() {
    sim_copy_wait(Pending);
}
