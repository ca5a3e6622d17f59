// What Hopper's own units can do at best, as ceilings.cu has it for all. Constants come from src/ops/ceilings/cuda/hopper.rs.
//   wgmma_rate  two warpgroups multiply 64 × 64 each by the same BLOCK_N × 64 (W_ACROSS: 64 × BLOCK_N) in shared memory, `steps` times;
//               y takes the sum of each thread's results
//   wgmma_held_rate  the same of 64 × 16 in registers, four times along
//   box_rate    a block lets boxes of 64 columns × 128 rows of x come, STAGES under way, `boxes` of them; in a cluster each block brings its
//               part of every box for all. x is small enough for L2.
//   exp2_rate   every thread takes 2^-x of CHAINS numbers, `steps` times
// `cycles` takes how many clock cycles each block took. Operands are random: a device draws less current on zeros.
#include "hopper.cuh"

constexpr u32 THREADS = 2 * WARPGROUP, STAGES = 4, BOX_ROWS = 128, CHAINS = 8;
constexpr u32 OPERANDS = (128 + BLOCK_N) * BOX_COLS / 2;  // words: pairs

struct Products {
    u32 words[OPERANDS];
};

struct Boxes {
    bf16 stages[STAGES][BOX_ROWS * BOX_COLS];
    Barrier full[STAGES], empty[STAGES];
};

/// Two bf16 of random sign within [1, 2).
DEVICE u32 noise(u32 seed) {
    seed = (seed ^ 0x9e3779b9u) * 0x85ebca6bu;
    seed = (seed ^ (seed >> 13)) * 0xc2b2ae35u;
    return ((seed ^ (seed >> 16)) & 0x807f807fu) | 0x3f803f80u;
}

/// The sum of what is in each thread's registers, and how long the block took.
template <u32 COUNT>
DEVICE void store_sums(float* y, u32* cycles, const float (&values)[COUNT], u32 begin) {
    u32 took = clock_cycles() - begin;
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) sum += values[i];
    y[blockIdx.x * THREADS + threadIdx.x] = sum;
    if (threadIdx.x == 0) cycles[blockIdx.x] = took;
}

template <bool HELD>
DEVICE void multiply_often(float* y, u32* cycles, u32 steps) {
    Products& shared = shared_memory<Products>();
    for (u32 i = threadIdx.x; i < OPERANDS; i += THREADS) shared.words[i] = noise(i);
    fence_async();
    block_barrier();
    u32 a = shared_address(shared.words) + threadIdx.x / WARPGROUP * 64 * 128, b = shared_address(shared.words) + 128 * 128;
    u32 held[4];
#pragma unroll
    for (u32 i = 0; HELD && i < 4; i++) held[i] = noise(threadIdx.x * 4 + i);
    float sums[BLOCK_N / 2];
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i++) sums[i] = 0.0f;
    u32 begin = clock_cycles();
    for (u32 step = 0; step < steps; step++) {
        warpgroup_fence();
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            u64 right = W_ACROSS ? operand(b + k * 2 * ATOM, 64 * 128, ATOM) : operand(b + k * 32, 0, ATOM);
            if constexpr (HELD) {
                warpgroup_multiply<W_ACROSS>(sums, held, right, true);
            } else {
                warpgroup_multiply<W_ACROSS>(sums, operand(a + k * 32, 0, ATOM), right, true);
            }
        }
        warpgroup_commit();
        warpgroup_wait<1>();
    }
    warpgroup_wait<0>();
    store_sums(y, cycles, sums, begin);
}

KERNEL __launch_bounds__(THREADS, 1) wgmma_rate(float* y, u32* cycles, u32 steps) {
    after_previous();
    multiply_often<false>(y, cycles, steps);
}

KERNEL __launch_bounds__(THREADS, 1) wgmma_held_rate(float* y, u32* cycles, u32 steps) {
    after_previous();
    multiply_often<true>(y, cycles, steps);
}

KERNEL __launch_bounds__(THREADS, 1) exp2_rate(float* y, u32* cycles, u32 steps) {
    after_previous();
    float x[CHAINS];
#pragma unroll
    for (u32 i = 0; i < CHAINS; i++) x[i] = to_float(bf16{static_cast<u16>(noise(threadIdx.x * CHAINS + i))});
    u32 begin = clock_cycles();
    for (u32 step = 0; step < steps; step++) {
#pragma unroll
        for (u32 i = 0; i < CHAINS; i++) x[i] = exp2_fast(-x[i]);
    }
    store_sums(y, cycles, x, begin);
}

KERNEL __launch_bounds__(THREADS, 1) box_rate(u32* cycles, const __grid_constant__ TensorMap x, u32 rows, u32 boxes) {
    after_previous();
    Boxes& shared = shared_memory<Boxes>();
    u32 rank = CLUSTER == 1 ? 0 : cluster_rank(), part = rank * (BOX_ROWS / CLUSTER), first = blockIdx.x / CLUSTER * boxes;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(shared.full[s], 1);
            barrier_init(shared.empty[s], CLUSTER);
        }
        barrier_ready();
    }
    cluster_barrier();
    if (threadIdx.x == 0) {
        u32 begin = clock_cycles();
        for (u32 i = 0; i < boxes + STAGES; i++) {
            u32 s = i % STAGES, turn = i / STAGES;
            if (i >= STAGES) {
                barrier_wait(shared.full[s], (turn - 1) % 2);
                for (u32 block = 0; block < CLUSTER; block++) barrier_arrive_at(shared.empty[s], block);
            }
            if (i >= boxes) continue;
            barrier_wait(shared.empty[s], turn % 2 ^ 1);
            barrier_expect(shared.full[s], sizeof(shared.stages[s]));
            int row = static_cast<int>((first + i) * BOX_ROWS % rows + part);
            bf16* to = shared.stages[s] + part * BOX_COLS;
            if constexpr (CLUSTER == 1) {
                load_box(to, x, row, 0, shared.full[s]);
            } else {
                load_box_for_all<CLUSTER>(to, x, row, 0, shared.full[s]);
            }
        }
        cycles[blockIdx.x] = clock_cycles() - begin;
    }
    if (threadIdx.x < WARP) warp_barrier();
    cluster_barrier();
}
