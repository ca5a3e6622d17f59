// lm_head_logits of lm_head.cu on Hopper, where every operand begins at a 16-byte border and logits have no cap: the same numbers, the
// same `stats`, of tiles of BLOCK_N columns (tile90.cuh). A warp owns whole rows of its tile, so that four lanes join what a row holds.
#include "tile90.cuh"

struct Head90Params {
    float* stats;
    const u32* targets;
    u32 first, rows;  // the chunk's among all
    u32 vocab, cols, tiles;
    u32 raster;
};

/// Over the four lanes that hold a row.
template <bool LARGEST>
DEVICE float join_row(float value) {
#pragma unroll
    for (u32 mask = 1; mask < 4; mask *= 2) {
        float other = shuffle_xor(value, mask);
        value = LARGEST ? maximum(value, other) : value + other;
    }
    return value;
}

/// One of this thread's two rows in a tile. Columns are counted from its first, so that a column's number is a constant and takes no
/// register.
struct Row {
    u32 row;
    int target, end;  // the target, and where the vocabulary ends
    float most, rest, own;
};

DEVICE Row row_of(const Head90Params& p, u32 row, u32 col) {
    u32 target = row < p.rows ? p.targets[p.first + row] : p.vocab;
    return {row, static_cast<int>(target - col), static_cast<int>(p.vocab - col), -INFINITE, 0.0f, 0.0f};
}

/// The column of result i.
DEVICE int column(u32 i) { return static_cast<int>(i / 4 * 8 + i % 2); }

/// Writes what a tile says of a row: its largest logit, the others' share of it, and the target's logit, if it is here.
DEVICE void store_stats(Row& r, const Head90Params& p, u32 tile) {
    float rest = join_row<false>(r.rest);
    if (r.row >= p.rows) return;
    bool holds = r.target >= 0 && r.target < static_cast<int>(BLOCK_N) && r.target % 8 < 2;
    if (holds) p.stats[static_cast<u64>(2) * p.rows * p.tiles + r.row] = r.own;
    if (threadIdx.x % 4 > 0) return;
    float* mine = p.stats + (static_cast<u64>(r.row) * p.tiles + tile) * 2;
    mine[0] = r.most, mine[1] = rest;
}

KERNEL __launch_bounds__(THREADS, 1) lm_head90_logits(const __grid_constant__ TensorMap chunk, const __grid_constant__ TensorMap h,
                                                      const __grid_constant__ TensorMap w, const Head90Params p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    u32 blocks = (p.cols + BLOCK_K - 1) / BLOCK_K;
    auto load = [&](Place at, Turn& turn) {
        for (u32 block = 0; block < blocks; block++, advance(turn)) {
            Stage& stage = next_stage(shared, turn);
            load_box(stage.a, h, static_cast<int>(at.row), static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
            load_right(stage, w, static_cast<int>(at.col), static_cast<int>(block * BLOCK_K), shared.full[turn.stage]);
        }
    };
    auto consume = [&](Place at, Turn& turn, u32 warp) {
        Results sums;
        for (u32 block = 0; block < blocks; block++) multiply_block<STEPS>(sums, shared, turn, warp / 4, block == 0);
        finish_sums(shared, turn);
        u32 row = at.row + warp * WARP_ROWS, own = row + threadIdx.x % WARP / 4, col = at.col + threadIdx.x % 4 * 2;
        Row rows[2] = {row_of(p, own, col), row_of(p, own + 8, col)};
#pragma unroll
        for (u32 i = 0; i < BLOCK_N / 2; i++) {
            Row& r = rows[i / 2 % 2];
            if (column(i) < r.end) r.most = maximum(r.most, sums[i]);
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) rows[half].most = join_row<true>(rows[half].most);
        // A share goes to shared memory as soon as it is known: all of them would not fit beside the sums.
        auto share = [&](float logit, u32 i) {
            Row& r = rows[i / 2 % 2];
            bool is_target = column(i) == r.target;
            float e = column(i) < r.end ? exp_fast(logit - r.most) : 0.0f;
            if (is_target) r.own = logit;
            if (!is_target) r.rest += e;
            return e;
        };
        store_rounded(sums, shared.out[warp], chunk, false, row, at.col, p.rows, p.vocab, share);
        store_stats(rows[0], p, at.col / BLOCK_N);
        store_stats(rows[1], p, at.col / BLOCK_N);
    };
    every_tile(shared, raster_of(p.rows, p.vocab, p.raster), load, consume);
}
