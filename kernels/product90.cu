// product.cu's products on Hopper, where every operand begins at a 16-byte border: the same sums in the same order (tile90.cuh).
//
// LoRA's blocks follow those of k, along one for each part that the tile meets, across as many as its rank fills; of each the steps that
// hold anything are multiplied.
#include "tile90.cuh"

struct Product90Params {
    float* /*or null*/ wide;  // in place of y: f32, rows n apart
    const bf16* /*or null*/ bias;
    u32 residual;  // 1 where such is added, never to `wide`
    u32 m, n, k;
    u32 rank;          // 0 without LoRA
    u32 end_0, end_1;  // where parts end
    u32 raster;        // tiles walked downwards before the next to the right
};

DEVICE u32 part_of(const Product90Params& p, u32 n) { return (n >= p.end_0) + (n >= p.end_1); }
DEVICE u32 part_begin(const Product90Params& p, u32 part) { return part == 0 ? 0 : part == 1 ? p.end_0 : p.end_1; }

/// The blocks of LoRA that a tile meets, along of its parts, across of its one: the first, and the one after the last.
struct Parts {
    u32 first, end;
};

DEVICE Parts parts_of(const Product90Params& p, u32 col) {
    if (p.rank == 0) return {0, 0};
    if (W_ACROSS) return {0, (p.rank + BLOCK_K - 1) / BLOCK_K};
    return {part_of(p, col), part_of(p, minimum(col + BLOCK_N, p.n) - 1) + 1};
}

/// `col` is this thread's first.
DEVICE void add_bias(Results& sums, const Product90Params& p, u32 col) {
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

DEVICE void store_wide(const Results& sums, const Product90Params& p, u32 row, u32 col) {
#pragma unroll
    for (u32 i = 0; i < BLOCK_N / 2; i++) {
        u32 r = row + i % 4 / 2 * 8, c = col + i / 4 * 8 + i % 2;
        if (r < p.m && c < p.n) p.wide[static_cast<u64>(r) * p.n + c] = sums[i];
    }
}

/// A block of LoRA: of its four steps those that hold anything. Each count has a sequence of its own: between products of one that is
/// known only when it runs the compiler would wait.
DEVICE void multiply_rank(Results& sums, Shared& shared, Turn& turn, u32 consumer, u32 rank) {
    if (rank <= 16) {
        multiply_block<1>(sums, shared, turn, consumer, false);
    } else if (rank <= 32) {
        multiply_block<2>(sums, shared, turn, consumer, false);
    } else if (rank <= 48) {
        multiply_block<3>(sums, shared, turn, consumer, false);
    } else {
        multiply_block<4>(sums, shared, turn, consumer, false);
    }
}

KERNEL __launch_bounds__(THREADS, 1)
    product90(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
              const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap xa, const __grid_constant__ TensorMap b_0, const __grid_constant__ TensorMap b_1,
              const __grid_constant__ TensorMap b_2, const Product90Params p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    u32 blocks = (p.k + BLOCK_K - 1) / BLOCK_K, parity = 0;
    auto load = [&](Place at, Turn& turn) {
        int row = static_cast<int>(at.row), col = static_cast<int>(at.col);
        for (u32 block = 0; block < blocks; block++, advance(turn)) {
            Stage& stage = next_stage(shared, turn);
            load_box(stage.a, x, row, static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
            load_right(stage, w, col, static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
        }
        Parts parts = parts_of(p, at.col);
        for (u32 part = parts.first; part < parts.end; part++, advance(turn)) {
            Stage& stage = next_stage(shared, turn);
            const TensorMap& b = W_ACROSS || part == 0 ? b_0 : part == 1 ? b_1 : b_2;
            u32 first = W_ACROSS ? 0 : part_begin(p, part), from = W_ACROSS ? part * BLOCK_K : 0;
            load_box(stage.a, xa, row, static_cast<int>(W_ACROSS ? from : part * p.rank), shared.full[turn.stage]);
            load_right(stage, b, col - static_cast<int>(first), static_cast<int>(from), shared.full[turn.stage]);
        }
    };
    auto consume = [&](Place at, Turn& turn, u32 warp) {
        u32 row = at.row + warp * WARP_ROWS, col = at.col + threadIdx.x % 4 * 2;
        if (p.residual != 0) load_residual(shared.out[warp], residual, row, at.col, shared.added[warp]);
        Results sums;
        for (u32 block = 0; block < blocks; block++) multiply_block<STEPS>(sums, shared, turn, warp / 4, block == 0);
        Parts parts = parts_of(p, at.col);
        for (u32 part = parts.first; part < parts.end; part++) {
            multiply_rank(sums, shared, turn, warp / 4, W_ACROSS ? p.rank - part * BLOCK_K : p.rank);
        }
        finish_sums(shared, turn);
        add_bias(sums, p, col);
        if (p.residual != 0) barrier_wait(shared.added[warp], parity), parity ^= 1;
        if (p.wide != nullptr) return store_wide(sums, p, row + threadIdx.x % WARP / 4, col);
        store_rounded(sums, shared.out[warp], y, p.residual != 0, row, at.col, p.m, p.n, [](float sum, u32) { return sum; });
    };
    every_tile(shared, raster_of(p.m, p.n, p.raster), load, consume);
}
