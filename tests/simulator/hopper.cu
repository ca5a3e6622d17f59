// Single instructions of hopper.cuh, for their twins' tests.
#include "hopper.cuh"

struct Shared {
    u32 words[4 * 256 * 8];
    Barrier barrier, second;
};

/// What a box looks like in shared memory; of `words` words.
KERNEL load_one(u32* y, const __grid_constant__ TensorMap x, u32 row, u32 col, u32 words) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x == 0) {
        barrier_init(shared.barrier, 1);
        barrier_ready();
        barrier_expect(shared.barrier, words * 4);
        load_box(shared.words, x, static_cast<int>(row), static_cast<int>(col), shared.barrier);
    }
    block_barrier();
    barrier_wait(shared.barrier, 0);
    for (u32 i = threadIdx.x; i < words; i += blockDim.x) y[i] = shared.words[i];
}

/// Writes a box that lies so in shared memory.
KERNEL store_one(const __grid_constant__ TensorMap y, const u32* x, u32 row, u32 col, u32 words) {
    Shared& shared = shared_memory<Shared>();
    for (u32 i = threadIdx.x; i < words; i += blockDim.x) shared.words[i] = x[i];
    fence_async();
    block_barrier();
    if (threadIdx.x != 0) return;
    store_box(y, static_cast<int>(row), static_cast<int>(col), shared.words);
    store_wait();
}

/// d = d + a·b of a warpgroup, N = 128: operands by `words` words of shared memory and two descriptors, d by thread. With `held` the left
/// one comes from there: each thread's four words.
KERNEL multiply_one(float* d, const u32* x, u64 a, u64 b, u32 across, u32 words, const u32* /*or null*/ held) {
    Shared& shared = shared_memory<Shared>();
    for (u32 i = threadIdx.x; i < words; i += blockDim.x) shared.words[i] = x[i];
    fence_async();
    block_barrier();
    float sums[64];
    for (u32 i = 0; i < 64; i++) sums[i] = d[threadIdx.x * 64 + i];
    u32 left[4] = {0, 0, 0, 0};
    for (u32 i = 0; held != nullptr && i < 4; i++) left[i] = held[threadIdx.x * 4 + i];
    warpgroup_fence();  // REGISTERS
    if (held != nullptr && across != 0) {
        warpgroup_multiply<true>(sums, left, b, true);
    } else if (held != nullptr) {
        warpgroup_multiply<false>(sums, left, b, true);
    } else if (across != 0) {
        warpgroup_multiply<true>(sums, a, b, true);
    } else {
        warpgroup_multiply<false>(sums, a, b, true);
    }
    warpgroup_commit();
    // EARLY
    warpgroup_wait<0>();
    for (u32 i = 0; i < 64; i++) d[threadIdx.x * 64 + i] = sums[i];
}

/// Four matrices of 8 rows of 4 pairs, of which x (4, 32) holds each lane's pairs; lane i names row `order[i]` of y (32, 4).
KERNEL store_matrices(u32* y, const u32* x, const u32* order) {
    Shared& shared = shared_memory<Shared>();
    u32 lane = threadIdx.x, r[4];
    for (u32 i = 0; i < 4; i++) r[i] = x[i * WARP + lane];
    store_matrix_x4(reinterpret_cast<bf16*>(shared.words + 4 * order[lane]), r);
    warp_barrier();
    for (u32 i = 0; i < 4; i++) y[i * WARP + lane] = shared.words[i * WARP + lane];
}

/// A warp tells the next one what its lanes wrote: through one lane, by all of them, and back.
KERNEL relay(u32* y, const u32* x, u32 turns) {
    Shared& shared = shared_memory<Shared>();
    Barrier* barriers = &shared.barrier;
    u32 t = threadIdx.x, lane = t % WARP;
    if (t == 0) {
        barrier_init(barriers[0], 1);
        barrier_init(barriers[1], WARP);
    }
    block_barrier();
    for (u32 turn = 0; turn < turns; turn++) {
        if (t < WARP) {
            shared.words[lane] = x[lane] + turn;
            warp_barrier();  // BEFORE
            if (lane == 0) barrier_arrive(barriers[0]);
            barrier_wait(barriers[1], turn % 2);
        } else {
            barrier_wait(barriers[0], turn % 2);  // WAIT
            y[turn % 3 * WARP + lane] = shared.words[(lane + 1) % WARP];
            barrier_arrive(barriers[1]);  // BACK
        }
    }
}

/// Each half of the block's warps tells itself what its threads wrote, under a name of its own.
KERNEL halves(u32* y, const u32* x, u32 turns) {
    Shared& shared = shared_memory<Shared>();
    u32 t = threadIdx.x, half = t / 64;
    for (u32 turn = 0; turn < turns; turn++) {
        shared.words[t] = x[t] + turn;
        named_barrier(1 + half, 64);  // WRITTEN
        y[t] = shared.words[half * 64 + (t + 33) % 64];
        named_barrier(1 + half, 64);  // READ
    }
}

/// No barrier, in a block as large as there is: threads have the numbers that barriers have in smaller ones.
KERNEL crowd(u32* y) {
    Shared& shared = shared_memory<Shared>();
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (warp == 30) shared.words[lane] = threadIdx.x;
    if (warp == 31) y[threadIdx.x] = shared.words[lane];
}
