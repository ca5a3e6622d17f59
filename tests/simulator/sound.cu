// What is right, and close to what is not: nothing here may be reported.
#include "device.cuh"

struct Shared {
    float values[64];
    float scratch[2];
    alignas(16) float stages[2][64];
};

/// Neighbours through barriers of both kinds; a crowd of readers; the buffer filled again.
KERNEL barriers(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    u32 t = threadIdx.x, warp = t / WARP * WARP;
    shared.values[t] = x[t];
    warp_barrier();
    float sum = shared.values[warp + (t + 1) % WARP];
    block_barrier();
    for (u32 i = 0; i < n; i++) sum += shared.values[i];
    block_barrier();
    shared.values[t] = sum;
    warp_barrier();
    sum += shared.values[warp + (t + 5) % WARP];
    sum += block_sum<2>(x[t], shared.scratch);
    y[blockIdx.x * n + t] = sum;
}

/// Two stages of asynchronous copies over `n` floats of each of four rows; rows from the third on are zeros.
KERNEL pipeline(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    u32 t = threadIdx.x;
    float sum = 0.0f;
    for (u32 row = 0; row < 2; row++) {
        if (t < n / 4) copy_async_16(&shared.stages[row][4 * t], x + 4 * t, row < 2);
        copy_async_commit();
    }
    for (u32 row = 0; row < 4; row++) {
        copy_async_wait<1>();
        block_barrier();
        sum += static_cast<float>(row + 1) * shared.stages[row % 2][(t + 7) % n];
        block_barrier();
        if (row + 2 < 4 && t < n / 4) copy_async_16(&shared.stages[row % 2][4 * t], x, false);
        copy_async_commit();
    }
    y[blockIdx.x * n + t] = sum;
}

/// Leaves every third element to others.
KERNEL holes(float* y, const float* x, u32 n) {
    u32 t = threadIdx.x;
    if (t % 3 != 0) y[blockIdx.x * n + t] = x[t];
}

/// Reads shared memory that nobody wrote.
KERNEL unwritten(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x] * shared.values[threadIdx.x];
}
