// Tiles of a product on Hopper, shared by product90.cu and lm_head90.cu: operands by the copy engine, sums by warpgroups.
//
// One warpgroup's first thread (the producer) lets the copy engine bring blocks of BLOCK_K along k into STAGES stages; each of the
// others (the consumers) multiplies its 64 rows of the tile by all BLOCK_N columns. `full` says that a stage has come, `empty` that
// every consumer's warp has read it. The blocks of a cluster have tiles below each other, of the same columns: each brings its part
// of the right operand for all of them, and may do so when all have read what was there. A block of threads takes one tile after
// the other, so that the next one's operands are on their way while results are stored. Every result is one chain of steps of 16
// along k, upwards. W_ACROSS says how the right operand lies in memory, which it keeps in shared memory. The constants come from
// src/ops/product/cuda/hopper.rs.
#pragma once
#include "hopper.cuh"

constexpr u32 BLOCK_M = 64 * CONSUMERS, BLOCK_K = BOX_COLS, STEPS = BLOCK_K / 16;
constexpr u32 THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr u32 WARP_ROWS = 16;
/// Consumers' warps of a block, and of its cluster: each of them empties a stage.
constexpr u32 WARPS = CONSUMERS * WARPGROUP / WARP, READERS = WARPS * CLUSTER;

/// This thread's results, as warpgroup_multiply spreads them: d[4j + e] is row lane/4 + e/2·8 of its warp's, column 8j + lane%4·2 + e%2.
typedef float Results[BLOCK_N / 2];

struct Stage {
    bf16 a[BLOCK_M * BLOCK_K];
    bf16 b[BLOCK_N * BLOCK_K];  // along k one box, across BLOCK_N / BOX_COLS of them
};

struct Shared {
    Stage stages[STAGES];
    bf16 out[WARPS][WARP_ROWS * BLOCK_N];  // each warp's rows, in boxes
    Barrier full[STAGES], empty[STAGES], added[WARPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "hopper.rs counts the same bytes");

DEVICE u32 rank_of_block() { return CLUSTER == 1 ? 0 : cluster_rank(); }

/// A stage and the parity of its phase, in which all threads go round together.
struct Turn {
    u32 stage, parity;
};

DEVICE void advance(Turn& turn) {
    turn.stage++;
    if (turn.stage == STAGES) turn.stage = 0, turn.parity ^= 1;
}

/// For all blocks of the cluster.
DEVICE void load_shared(bf16* to, const TensorMap& map, int row, int col, Barrier& full) {
    if constexpr (CLUSTER == 1) {
        load_box(to, map, row, col, full);
    } else {
        load_box_for_all<CLUSTER>(to, map, row, col, full);
    }
}

/// This block's part of a block of the right operand, from n = `first` and k on. Along: of its rows; across: of each box's.
DEVICE void load_right(Stage& stage, const TensorMap& map, int first, int k, Barrier& full) {
    constexpr u32 ROWS = (W_ACROSS ? BLOCK_K : BLOCK_N) / CLUSTER, BOXES = W_ACROSS ? BLOCK_N / BOX_COLS : 1;
    u32 skip = rank_of_block() * ROWS;
#pragma unroll
    for (u32 i = 0; i < BOXES; i++) {
        bf16* to = stage.b + (i * BLOCK_K + skip) * BOX_COLS;
        int n = first + static_cast<int>(W_ACROSS ? i * BOX_COLS : skip), at = k + static_cast<int>(W_ACROSS ? skip : 0);
        load_shared(to, map, W_ACROSS ? at : n, W_ACROSS ? n : at, full);
    }
}

/// The stage whose turn it is, emptied, and told what will come.
DEVICE Stage& next_stage(Shared& shared, const Turn& turn) {
    barrier_wait(shared.empty[turn.stage], turn.parity ^ 1);
    barrier_expect(shared.full[turn.stage], sizeof(Stage));
    return shared.stages[turn.stage];
}

/// Tells whoever fills the stage that this warp has finished reading it.
DEVICE void release(Shared& shared, u32 stage) {
    u32 lane = threadIdx.x % WARP;
    if (lane >= CLUSTER) return;
    if constexpr (CLUSTER == 1) {
        barrier_arrive(shared.empty[stage]);
    } else {
        barrier_arrive_at(shared.empty[stage], lane);
    }
}

/// All threads that reach this block's shared memory.
DEVICE void all_barrier() {
    if constexpr (CLUSTER == 1) {
        block_barrier();
    } else {
        cluster_barrier();
    }
}

/// Starts the products of one block, and waits for those of the one before it, whose stage is then free.
template <u32 COUNT>
DEVICE void multiply_block(Results& sums, Shared& shared, Turn& turn, u32 consumer, bool first) {
    const Stage& stage = shared.stages[turn.stage];
    u32 a = shared_address(stage.a + consumer * 64 * BLOCK_K), b = shared_address(stage.b);
    barrier_wait(shared.full[turn.stage], turn.parity);
    warpgroup_fence();
#pragma unroll
    for (u32 step = 0; step < COUNT; step++) {
        u64 left = operand(a + step * 32, 0, ATOM);
        u64 right = W_ACROSS ? operand(b + step * 2 * ATOM, BLOCK_K * 128, ATOM) : operand(b + step * 32, 0, ATOM);
        warpgroup_multiply<W_ACROSS>(sums, left, right, !first || step > 0);
    }
    warpgroup_commit();
    warpgroup_wait<1>();
    if (!first) release(shared, turn.stage == 0 ? STAGES - 1 : turn.stage - 1);
    advance(turn);
}

/// Ends a tile's sums: all of them are there, and the last stage is free.
DEVICE void finish_sums(Shared& shared, const Turn& turn) {
    warpgroup_wait<0>();
    release(shared, turn.stage == 0 ? STAGES - 1 : turn.stage - 1);
}

/// Rounds `value(sums[i], i)` of a warp's rows and lets the copy engine write them, from (row, col) of y (rows, cols) on, by way of `out`.
/// With `added`, what is to be added lies there, each number where its sum goes; else the last tile's results may still be read.
template <typename Value>
DEVICE void store_rounded(const Results& sums, bf16 (&out)[WARP_ROWS * BLOCK_N], const TensorMap& y, bool added, u32 row, u32 col, u32 rows,
                          u32 cols, Value value) {
    u32 lane = threadIdx.x % WARP;
    if (!added) {
        if (lane == 0) store_wait();
        warp_barrier();
    }
    // Of each sixteen columns as four matrices: the lane names a row of one.
    u32 r = lane % WARP_ROWS, right = lane / WARP_ROWS * 8;
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i += 8) {
        u32 c = i * 2 % BOX_COLS + right, box = i * 2 / BOX_COLS;
        bf16* at = out + box * WARP_ROWS * BOX_COLS + box_offset(r, c);
        u32 pairs[4] = {0, 0, 0, 0};
        if (added) load_matrix_x4(pairs, at);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 first = i + 2 * j;
            pairs[j] = to_bf16x2(value(sums[first], first) + low_float(pairs[j]), value(sums[first + 1], first + 1) + high_float(pairs[j]));
        }
        store_matrix_x4(at, pairs);
    }
    fence_async();
    warp_barrier();
    if (lane != 0 || row >= rows) return;
#pragma unroll
    for (u32 box = 0; box < BLOCK_N / BOX_COLS; box++) {
        u32 c = col + box * BOX_COLS;
        if (c < cols) store_box(y, static_cast<int>(row), static_cast<int>(c), out + box * WARP_ROWS * BOX_COLS);
    }
}

/// A cluster's tiles: `height` of them are walked downwards before the next to the right.
struct Raster {
    u32 down, right, height;
};

DEVICE Raster raster_of(u32 rows, u32 cols, u32 height) {
    return {(rows + CLUSTER * BLOCK_M - 1) / (CLUSTER * BLOCK_M), (cols + BLOCK_N - 1) / BLOCK_N, height};
}

/// Where a block's tile begins.
struct Place {
    u32 row, col;
};

DEVICE Place place_of(const Raster& raster, u32 tile) {
    u32 stripe = raster.height * raster.right, top = tile / stripe * raster.height, height = minimum(raster.height, raster.down - top);
    return {((top + tile % stripe % height) * CLUSTER + rank_of_block()) * BLOCK_M, tile % stripe / height * BLOCK_N};
}

/// All of a block's work. `load(place, turn)` brings a tile's blocks, stage by stage, in one thread; `consume(place, turn, warp)` multiplies
/// them, all of its warpgroup together, and puts the results of the tile's 16 rows from 16·warp on away.
template <typename Load, typename Consume>
DEVICE void every_tile(Shared& shared, const Raster& raster, Load load, Consume consume) {
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(shared.full[s], 1);
            barrier_init(shared.empty[s], READERS);
        }
        for (u32 warp = 0; warp < WARPS; warp++) barrier_init(shared.added[warp], 1);
        barrier_ready();
    }
    all_barrier();
    u32 first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, tiles = raster.down * raster.right;
    Turn turn = {0, 0};
    if (threadIdx.x < WARPGROUP) {
        if constexpr (CONSUMERS == 2) registers_down_to<40>();
        if (threadIdx.x == 0) {
            for (u32 tile = first; tile < tiles; tile += step) load(place_of(raster, tile), turn);
        }
        warp_barrier();
    } else {
        if constexpr (CONSUMERS == 2) registers_up_to<232>();
        u32 warp = (threadIdx.x - WARPGROUP) / WARP;
        for (u32 tile = first; tile < tiles; tile += step) consume(place_of(raster, tile), turn, warp);
        if (threadIdx.x % WARP == 0) store_wait();
        warp_barrier();
    }
    // Nobody's shared memory goes before the last of the cluster has told it of its last stage.
    if constexpr (CLUSTER > 1) cluster_barrier();
}
