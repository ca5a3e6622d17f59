// What a device can do at best: the denominators of every share. No operation of a model. THREADS comes from
// src/ops/ceilings/cuda.rs.
//   copy_rate  y[i] = x[i], 16 bytes per access
//   mma_rate   each warp keeps 4 x 4 accumulators of 16 x 8 in registers and adds a[i]·b[j] to each, `steps` times; y takes the
//              sum of each thread's, so that nothing is left out. Operands are random signs and magnitudes: a device draws
//              less current, and runs faster, on zeros.
//   nothing    a launch
#include "device.cuh"

KERNEL __launch_bounds__(THREADS) copy_rate(float* y, const float* x, u64 n) {
    after_previous();
    float4x* to = reinterpret_cast<float4x*>(y);
    const float4x* from = reinterpret_cast<const float4x*>(x);
    u64 step = static_cast<u64>(gridDim.x) * THREADS;
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < n / 4; i += step) to[i] = from[i];
}

/// Two bf16 of random sign within [1, 2).
DEVICE u32 noise(u32 seed) {
    seed = (seed ^ 0x9e3779b9u) * 0x85ebca6bu;
    seed = (seed ^ (seed >> 13)) * 0xc2b2ae35u;
    return ((seed ^ (seed >> 16)) & 0x807f807fu) | 0x3f803f80u;
}

KERNEL __launch_bounds__(THREADS) mma_rate(float* y, u32 steps) {
    after_previous();
    u32 thread = blockIdx.x * THREADS + threadIdx.x;
    u32 a[4][4], b[4][2];
    float d[4][4][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 k = 0; k < 4; k++) a[i][k] = noise(thread * 32 + i * 4 + k);
#pragma unroll
        for (u32 k = 0; k < 2; k++) b[i][k] = noise(thread * 32 + 16 + i * 2 + k);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 k = 0; k < 4; k++) d[i][j][k] = 0.0f;
        }
    }
    for (u32 step = 0; step < steps; step++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) mma_16x8x16(d[i][j], a[i], b[j]);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 k = 0; k < 4; k++) sum += d[i][j][k];
        }
    }
    y[thread] = sum;
}

KERNEL __launch_bounds__(WARP) nothing(u32 n) { after_previous(); }
