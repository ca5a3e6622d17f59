// product.cu's products on Hopper, where every operand begins at a 16-byte border: the same sums in the same order.
//
// One warpgroup's first thread (the producer) lets the copy engine bring blocks of BLOCK_K along k into STAGES stages; each of the
// others (the consumers) multiplies its 64 rows of the tile by all BLOCK_N columns. `full` says that a stage has come, `empty` that
// every consumer's warp has read it. The blocks of a cluster have tiles below each other, of the same columns: each brings its part
// of the right operand for all of them, and may do so when all have read what was there. A block of threads takes one tile after the other, so that the next one's operands are on
// their way while results are stored. LoRA's blocks follow those of k: one for each part that the tile meets, of which the
// RANK_STEPS steps that hold anything are multiplied.
#include "hopper.cuh"

constexpr u32 BLOCK_M = 64 * CONSUMERS, BLOCK_K = BOX_COLS, STEPS = BLOCK_K / 16;
constexpr u32 THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr u32 WARP_ROWS = 16;
/// Consumers' warps of a block, and of its cluster: each of them empties a stage.
constexpr u32 WARPS = CONSUMERS * WARPGROUP / WARP, READERS = WARPS * CLUSTER;

struct Stage {
    bf16 a[BLOCK_M * BLOCK_K];
    bf16 b[BLOCK_N * BLOCK_K];  // along k one box, across BLOCK_N / BOX_COLS of them
};

struct Shared {
    Stage stages[STAGES];
    bf16 out[WARPS][WARP_ROWS * BLOCK_N];  // each warp's rows, in boxes
    Barrier full[STAGES], empty[STAGES], added[WARPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda.rs counts the same bytes");

struct Product90Params {
    float* /*or null*/ wide;  // in place of y: f32, rows n apart
    const bf16* /*or null*/ bias;
    u32 residual;  // 1 where such is added, never to `wide`
    u32 m, n, k;
    u32 rank;          // 0 without LoRA
    u32 end_0, end_1;  // where parts end
    u32 raster;        // tiles walked downwards before the next to the right
};

/// Where a tile begins, and the parts that it meets.
struct Place {
    u32 row, col, part, parts;
};

DEVICE u32 rank_of_block() { return CLUSTER == 1 ? 0 : cluster_rank(); }

DEVICE u32 part_of(const Product90Params& p, u32 n) { return (n >= p.end_0) + (n >= p.end_1); }
DEVICE u32 part_begin(const Product90Params& p, u32 part) { return part == 0 ? 0 : part == 1 ? p.end_0 : p.end_1; }

/// In tiles of a whole cluster.
DEVICE u32 tiles_down(const Product90Params& p) { return (p.m + CLUSTER * BLOCK_M - 1) / (CLUSTER * BLOCK_M); }
DEVICE u32 tiles_right(const Product90Params& p) { return (p.n + BLOCK_N - 1) / BLOCK_N; }

DEVICE Place place_of(const Product90Params& p, u32 tile) {
    u32 stripe = p.raster * tiles_right(p), top = tile / stripe * p.raster, height = minimum(p.raster, tiles_down(p) - top);
    u32 row = ((top + tile % stripe % height) * CLUSTER + rank_of_block()) * BLOCK_M, col = tile % stripe / height * BLOCK_N;
    u32 part = W_ACROSS ? 0 : part_of(p, col);
    u32 parts = p.rank == 0 ? 0 : W_ACROSS ? 1 : part_of(p, minimum(col + BLOCK_N, p.n) - 1) - part + 1;
    return Place{row, col, part, parts};
}

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

/// This warp reads the stage no more: whoever fills it is told.
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
DEVICE void multiply_block(float (&sums)[BLOCK_N / 2], Shared& shared, Turn& turn, u32 consumer, bool first) {
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

/// `col` is this thread's first.
DEVICE void add_bias(float (&sums)[BLOCK_N / 2], const Product90Params& p, u32 col) {
    if (p.bias == nullptr) return;
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i += 4) {
        u32 c = col + i * 2;
        u32 pair = c < p.n ? *reinterpret_cast<const u32*>(p.bias + c) : 0;
        sums[i] += low_float(pair), sums[i + 1] += high_float(pair);
        sums[i + 2] += low_float(pair), sums[i + 3] += high_float(pair);
    }
}

/// Lets this warp's rows of what is added to the results come to where these will be put: while they are summed.
DEVICE void load_residual(bf16 (&out)[WARP_ROWS * BLOCK_N], const TensorMap& residual, u32 row, u32 col, Barrier& come) {
    if (threadIdx.x % WARP != 0) return;
    store_wait();
    barrier_expect(come, sizeof(out));
#pragma unroll
    for (u32 box = 0; box < BLOCK_N / BOX_COLS; box++) {
        load_box(out + box * WARP_ROWS * BOX_COLS, residual, static_cast<int>(row), static_cast<int>(col + box * BOX_COLS), come);
    }
}

DEVICE void store_wide(const float (&sums)[BLOCK_N / 2], const Product90Params& p, u32 row, u32 col) {
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i++) {
        u32 r = row + i % 4 / 2 * 8, c = col + i / 4 * 8 + i % 2;
        if (r < p.m && c < p.n) p.wide[static_cast<u64>(r) * p.n + c] = sums[i];
    }
}

/// Rounds a warp's rows and lets the copy engine write them, by way of `out`. It may still be reading the last tile's there; or what is to
/// be added lies there, each number where its sum goes.
DEVICE void store_rounded(const float (&sums)[BLOCK_N / 2], bf16 (&out)[WARP_ROWS * BLOCK_N], const TensorMap& y, const Product90Params& p,
                          u32 row, u32 col) {
    u32 lane = threadIdx.x % WARP;
    if (p.residual == 0) {
        if (lane == 0) store_wait();
        warp_barrier();
    }
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i += 2) {
        u32 r = lane / 4 + i % 4 / 2 * 8, c = i / 4 * 8 % BOX_COLS + lane % 4 * 2, box = i / 4 * 8 / BOX_COLS;
        u32* at = reinterpret_cast<u32*>(out + box * WARP_ROWS * BOX_COLS + box_offset(r, c));
        u32 old = p.residual != 0 ? *at : 0;
        *at = to_bf16x2(sums[i] + low_float(old), sums[i + 1] + high_float(old));
    }
    fence_async();
    warp_barrier();
    if (lane != 0 || row >= p.m) return;
#pragma unroll
    for (u32 box = 0; box < BLOCK_N / BOX_COLS; box++) {
        u32 c = col + box * BOX_COLS;
        if (c < p.n) store_box(y, static_cast<int>(row), static_cast<int>(c), out + box * WARP_ROWS * BOX_COLS);
    }
}

KERNEL __launch_bounds__(THREADS, 1)
    product90(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
              const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap xa, const __grid_constant__ TensorMap b_0, const __grid_constant__ TensorMap b_1,
              const __grid_constant__ TensorMap b_2, const Product90Params p) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(shared.full[s], 1);
            barrier_init(shared.empty[s], READERS);
        }
        for (u32 reader = 0; reader < WARPS; reader++) barrier_init(shared.added[reader], 1);
        barrier_ready();
    }
    all_barrier();
    u32 first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    u32 tiles = tiles_down(p) * tiles_right(p), blocks = (p.k + BLOCK_K - 1) / BLOCK_K;
    Turn turn = {0, 0};
    if (threadIdx.x < WARPGROUP) {
        if constexpr (CONSUMERS == 2) registers_down_to<40>();
        if (threadIdx.x == 0) {
            for (u32 tile = first; tile < tiles; tile += step) {
                Place at = place_of(p, tile);
                int row = static_cast<int>(at.row), col = static_cast<int>(at.col);
                for (u32 block = 0; block < blocks; block++, advance(turn)) {
                    Stage& stage = next_stage(shared, turn);
                    load_box(stage.a, x, row, static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
                    load_right(stage, w, col, static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
                }
                for (u32 part = at.part; part < at.part + at.parts; part++, advance(turn)) {
                    Stage& stage = next_stage(shared, turn);
                    const TensorMap& b = part == 0 ? b_0 : part == 1 ? b_1 : b_2;
                    load_box(stage.a, xa, row, static_cast<int>(part * p.rank), shared.full[turn.stage]);
                    load_right(stage, b, col - static_cast<int>(part_begin(p, part)), 0, shared.full[turn.stage]);
                }
            }
        }
        warp_barrier();
    } else {
        if constexpr (CONSUMERS == 2) registers_up_to<232>();
        u32 reader = threadIdx.x / WARP - WARPGROUP / WARP, lane = threadIdx.x % WARP, parity = 0;
        for (u32 tile = first; tile < tiles; tile += step) {
            Place at = place_of(p, tile);
            u32 row = at.row + reader * WARP_ROWS, col = at.col + lane % 4 * 2;
            if (p.residual != 0) load_residual(shared.out[reader], residual, row, at.col, shared.added[reader]);
            float sums[BLOCK_N / 2];
            for (u32 block = 0; block < blocks; block++) multiply_block<STEPS>(sums, shared, turn, reader / 4, block == 0);
            for (u32 part = 0; part < at.parts; part++) multiply_block<RANK_STEPS>(sums, shared, turn, reader / 4, false);
            warpgroup_wait<0>();
            release(shared, turn.stage == 0 ? STAGES - 1 : turn.stage - 1);
            add_bias(sums, p, col);
            if (p.residual != 0) barrier_wait(shared.added[reader], parity), parity ^= 1;
            if (p.wide != nullptr) {
                store_wide(sums, p, row + lane / 4, col);
            } else {
                store_rounded(sums, shared.out[reader], y, p, row, at.col);
            }
        }
        if (lane == 0) store_wait();
        warp_barrier();
    }
    // Nobody's shared memory goes before the last of the cluster has told it of its last stage.
    if constexpr (CLUSTER > 1) cluster_barrier();
}
