// Gradients of LoRA's masters: sums over the batch's rows t of a narrow operand (as wide as the rank) times a wide one.
//   dA[j,c] += Σ_t dxa[t,j]·x[t,c]                          (P·r, K)
//   dB[c,j] += s·Σ_t xa[t, p·r + j]·dy[t,c], c in part p    (N, r)
// lora_partial: a block owns a tile of columns of one part in one slice of t and overwrites its partial sums; both operands lie
// across k (tile.cuh). lora_sum: a thread owns one element and adds the slices to the gradient, the first slice first.
// The split is a function of shapes and device, so the bits are the same every time.
#include "tile.cuh"

struct Shared {
    Stage stages[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda.rs counts the same bytes");

/// A slice of rows t, as the k of the product.
struct Slice {
    Operand narrow, wide;
    u32 row, col, first;
};

DEVICE u32 block_steps(const Slice&, u32) { return STEPS; }

DEVICE void copy_block(Stage& stage, const Slice& from, u32 block) {
    u32 k = from.first + block * BLOCK_K;
    copy_operand<true, BLOCK_M>(stage.a, from.narrow, from.row, k);
    copy_operand<true, BLOCK_N>(stage.b, from.wide, from.col, k);
}

struct LoraParams {
    float* partial;
    const bf16* narrow;
    const bf16* wide;
    u32 rows, width, cols;
    u32 narrow_stride, wide_stride;
    u32 end_0, end_1;         // where parts of the columns end
    u32 slice;                // rows of a block
    u32 row_step, col_step;  // how the sums lie
};

DEVICE u32 tiles(u32 cols) { return (cols + BLOCK_N - 1) / BLOCK_N; }

KERNEL __launch_bounds__(THREADS, BLOCKS_PER_SM) lora_partial(const LoraParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    u32 part = 0, begin = 0, end = p.end_0, tile = blockIdx.x;
    if (tile >= tiles(p.end_0)) {
        tile -= tiles(p.end_0);
        part = 1, begin = p.end_0, end = p.end_1;
        if (tile >= tiles(p.end_1 - p.end_0)) {
            tile -= tiles(p.end_1 - p.end_0);
            part = 2, begin = p.end_1, end = p.cols;
        }
    }
    u32 first = blockIdx.z * p.slice, count = minimum(p.slice, p.rows - first), width = p.width;
    u32 row = blockIdx.y * BLOCK_M, col = begin + tile * BLOCK_N;
    Slice from = {{p.narrow + part * width, p.narrow_stride, first, count, width},
                  {p.wide, p.wide_stride, first, count, end},
                  row,
                  col,
                  first};
    Sums sums;
    multiply<true, true>(sums, shared.stages, from, (count + BLOCK_K - 1) / BLOCK_K);
    float* mine = p.partial + static_cast<u64>(blockIdx.z) * width * p.cols;
#pragma unroll
    for (u32 m = 0; m < WARP_M / 16; m++)
#pragma unroll
        for (u32 n = 0; n < WARP_N / 8; n++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                u32 j = row + warp_row() + m * 16 + e / 2 * 8 + lane_row();
                u32 c = col + warp_col() + n * 8 + lane_col() + e % 2;
                if (j < width && c < end) mine[static_cast<u64>(j) * p.row_step + static_cast<u64>(c) * p.col_step] = sums[m][n][e];
            }
}

KERNEL __launch_bounds__(THREADS) lora_sum(float* grad, const float* partial, u32 count, u32 slices, float scale) {
    after_previous();
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
    for (u32 s = 0; s < slices; s++) sum += partial[static_cast<u64>(s) * count + i];
    grad[i] += scale * sum;
}
