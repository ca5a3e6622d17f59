// Products with frozen weights; LoRA rides along as more of the same sum.
//   W_ACROSS = 0   y[m,n] = Σ_k x[m,k]·w[n,k] + Σ_j xa[m, p·rank + j]·b[n,j], p the part that row n of w belongs to
//   W_ACROSS = 1   y[m,n] = Σ_k x[m,k]·w[k,n] + Σ_j xa[m,j]·b[j,n]
//   then         + bias[n] + residual[m,n] in f32, rounded once; y is overwritten (`wide`: the same in f32, stride n)
// The first is a layer's forward (w (N, K), b = s·B), the second its dx from the same w as it lies (b = A). A block owns a tile
// of y (tile.cuh). Where k is exhausted the loop goes on with the second pair of operands: nothing is concatenated in memory,
// and of such a block only ⌈columns/16⌉ steps are multiplied. Parts end at end_0, end_1 and n.
#include "tile.cuh"

union Shared {
    Stage stages[STAGES];
    bf16 out[BLOCK_M * BLOCK_N];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda.rs counts the same bytes");

/// Blocks along k: `own` of (x, w), then `more` of (xa, b) for each part that the tile meets.
struct Blocks {
    Operand x, w, xa, b;
    u32 row, col;  // where the tile begins
    u32 own, more, part, rank;
    u32 end_0, end_1, end_2;
};

/// Where part p ends; part -1 ends at 0.
DEVICE u32 part_end(const Blocks& from, u32 p) {
    return p == 0 ? from.end_0 : p == 1 ? from.end_1 : p == 2 ? from.end_2 : 0;
}

DEVICE u32 part_of(const Blocks& from, u32 n) { return (n >= from.end_0) + (n >= from.end_1); }

DEVICE u32 block_steps(const Blocks& from, u32 block) {
    return block < from.own ? STEPS : (from.rank - (block - from.own) % from.more * BLOCK_K + 15) / 16;
}

DEVICE void copy_block(Stage& stage, const Blocks& from, u32 block) {
    if (block < from.own) {
        copy_operand<false, BLOCK_M>(stage.a, from.x, from.row, block * BLOCK_K);
        copy_operand<W_ACROSS, BLOCK_N>(stage.b, from.w, from.col, block * BLOCK_K);
        return;
    }
    u32 p = from.part + (block - from.own) / from.more, k = (block - from.own) % from.more * BLOCK_K;
    Operand left = from.xa, right = from.b;
    left.data += p * from.rank;
    if (!W_ACROSS) {
        right.first = part_end(from, p - 1);
        right.rows = part_end(from, p) - right.first;
    }
    copy_operand<false, BLOCK_M>(stage.a, left, from.row, k);
    copy_operand<W_ACROSS, BLOCK_N>(stage.b, right, from.col, k);
}

struct ProductParams {
    bf16* /*or null*/ y;  // from y_first on; or
    float* /*or null*/ wide;
    const bf16* x;  // from x_first on
    const bf16* w;  // from w_first on
    const bf16* /*or null*/ xa;
    const bf16* /*or null*/ b;
    const bf16* /*or null*/ bias;
    const bf16* /*or null*/ residual;  // rows y_stride apart
    u64 y_first, x_first, w_first;
    u32 m, n, k, rank;
    u32 y_stride, x_stride, w_stride, xa_stride, b_stride;
    u32 end_0, end_1;  // where parts end
    u32 raster;        // tiles walked downwards before the next to the right
};

/// + bias + residual, where there are such.
DEVICE void add_terms(Sums& sums, const ProductParams& p, u32 row, u32 col) {
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j++) {
            u32 c = col + warp_col() + j * 8 + lane_col();
            if (c >= p.n) continue;
            u32 pair = p.bias != nullptr ? *reinterpret_cast<const u32*>(p.bias + c) : 0;
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 r = row + warp_row() + i * 16 + half * 8 + lane_row();
                float& low = sums[i][j][2 * half];
                float& high = sums[i][j][2 * half + 1];
                low += low_float(pair), high += high_float(pair);
                if (p.residual == nullptr || r >= p.m) continue;
                u32 old = *reinterpret_cast<const u32*>(p.residual + static_cast<u64>(r) * p.y_stride + c);
                low += low_float(old), high += high_float(old);
            }
        }
}

/// The tile in f32, rows n apart.
DEVICE void store_wide(const Sums& sums, const ProductParams& p, u32 row, u32 col) {
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                u32 r = row + warp_row() + i * 16 + e / 2 * 8 + lane_row(), c = col + warp_col() + j * 8 + lane_col() + e % 2;
                if (r < p.m && c < p.n) p.wide[static_cast<u64>(r) * p.n + c] = sums[i][j][e];
            }
}

KERNEL __launch_bounds__(THREADS, BLOCKS_PER_SM) product(const ProductParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    // Neighbours in time share rows of x and of w: `raster` tiles down, then one to the right.
    u32 tiles_m = (p.m + BLOCK_M - 1) / BLOCK_M, tiles_n = (p.n + BLOCK_N - 1) / BLOCK_N;
    u32 top = blockIdx.x / (p.raster * tiles_n) * p.raster, height = minimum(p.raster, tiles_m - top);
    u32 inside = blockIdx.x % (p.raster * tiles_n);
    u32 row = (top + inside % height) * BLOCK_M, col = inside / height * BLOCK_N;

    Blocks from = {{p.x + p.x_first, p.x_stride, 0, p.m, p.k},
                   {p.w + p.w_first, p.w_stride, 0, W_ACROSS ? p.k : p.n, W_ACROSS ? p.n : p.k},
                   {p.xa, p.xa_stride, 0, p.m, p.rank},
                   {p.b, p.b_stride, 0, p.rank, W_ACROSS ? p.n : p.rank}};
    from.row = row, from.col = col, from.rank = p.rank;
    from.own = (p.k + BLOCK_K - 1) / BLOCK_K, from.more = (p.rank + BLOCK_K - 1) / BLOCK_K;
    from.end_0 = p.end_0, from.end_1 = p.end_1, from.end_2 = p.n;
    from.part = W_ACROSS ? 0 : part_of(from, col);
    u32 parts = W_ACROSS ? 1 : part_of(from, minimum(col + BLOCK_N, p.n) - 1) - from.part + 1;

    Sums sums;
    multiply<false, W_ACROSS>(sums, shared.stages, from, from.own + parts * from.more);
    add_terms(sums, p, row, col);
    if (p.wide != nullptr) return store_wide(sums, p, row, col);
    store_tile(sums, shared.out, col, p.n, [&](u32 r) -> bf16* {
        return row + r < p.m ? p.y + p.y_first + static_cast<u64>(row + r) * p.y_stride : nullptr;
    });
}
