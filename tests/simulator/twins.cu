// Each function of device.cuh by itself: what goes in and what comes out lie in global memory, lane by lane, so that a test
// can hold it against the formula. The same file runs on a GPU.
#include "device.cuh"

KERNEL round_one(u32* y, const float* x, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = to_bf16(x[i]).bits;
}

KERNEL round_two(u32* y, const float* x, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = to_bf16x2(x[i], x[n - 1 - i]);
}

KERNEL powers(float* y, const float* x, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = exp2_fast(x[i]);
}

KERNEL reciprocals(float* y, const float* x, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = reciprocal(x[i]);
}

/// y: shuffle from `lanes[i]`, shuffle by xor with 5, ballot of odd values; each 32 long.
KERNEL exchanges(u32* y, const u32* x, const u32* lanes) {
    u32 i = threadIdx.x, value = x[i];
    y[i] = shuffle(value, lanes[i]);
    y[WARP + i] = shuffle_xor(value, 5);
    y[2 * WARP + i] = ballot(value % 2 == 1);
    y[3 * WARP + i] = float_bits(shuffle(bits_float(value), lanes[i])) ^ float_bits(shuffle_xor(bits_float(value), 5));
}

/// What all lanes add up in one of four numbers, and how many ones each lane's own number holds.
KERNEL additions(u32* y, const u32* x) {
    u32(&sums)[4] = shared_memory<u32[4]>();
    if (threadIdx.x < 4) sums[threadIdx.x] = 0;
    block_barrier();
    shared_add(sums[threadIdx.x % 4], x[threadIdx.x]);
    block_barrier();
    y[threadIdx.x] = sums[threadIdx.x % 4];
    y[WARP + threadIdx.x] = count_ones(x[threadIdx.x]);
}

/// Registers as they are: a (4, 32), b (2, 32), c and d (4, 32).
KERNEL product(float* d, const u32* a, const u32* b, const float* c) {
    u32 lane = threadIdx.x, ra[4], rb[2];
    float sum[4];
    for (u32 r = 0; r < 4; r++) ra[r] = a[r * WARP + lane], sum[r] = c[r * WARP + lane];
    for (u32 r = 0; r < 2; r++) rb[r] = b[r * WARP + lane];
    mma_16x8x16(sum, ra, rb);
    for (u32 r = 0; r < 4; r++) d[r * WARP + lane] = sum[r];
}

struct Shared {
    alignas(16) u32 rows[WARP][4];
};

/// Four matrices of 8 rows of 4 pairs from x (32, 4), lane i naming row `order[i]`; y: plain (4, 32), transposed (4, 32).
KERNEL matrices(u32* y, const u32* x, const u32* order) {
    Shared& shared = shared_memory<Shared>();
    u32 lane = threadIdx.x, r[4];
    for (u32 i = 0; i < 4; i++) shared.rows[lane][i] = x[4 * lane + i];
    block_barrier();
    const bf16* row = reinterpret_cast<const bf16*>(shared.rows[order[lane]]);
    load_matrix_x4(r, row);
    for (u32 i = 0; i < 4; i++) y[i * WARP + lane] = r[i];
    load_matrix_x4_transposed(r, row);
    for (u32 i = 0; i < 4; i++) y[(4 + i) * WARP + lane] = r[i];
}

/// Lane i's 16 bytes of x (32, 4), or zeros where `valid` is 0.
KERNEL copies(u32* y, const u32* x, const u32* valid) {
    Shared& shared = shared_memory<Shared>();
    u32 lane = threadIdx.x;
    copy_async_16(shared.rows[lane], x + 4 * lane, valid[lane] != 0);
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    for (u32 i = 0; i < 4; i++) y[4 * lane + i] = shared.rows[(lane + 1) % WARP][i];
}
