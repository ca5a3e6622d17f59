// One block's tile of a product on tensor cores, shared by product.cu, lora.cu and lm_head.cu: sums[m,n] += Σ_k a[m,k]·b[k,n].
//
// A block owns BLOCK_M × BLOCK_N results, each of its WARPS_M × WARPS_N warps a rectangle of them. Operands pass through
// shared memory in blocks of BLOCK_K, STAGES - 1 of them under way while one is multiplied. Every result is one chain of
// steps of 16 along k, upwards: its bits depend on its row of a and its column of b alone, whatever the tile.
// An operand may lie either way in memory, and keeps its way in shared memory: `along k` ([row][k]) or `across` ([k][row]).
// Chunks of 16 bytes are permuted within a shared row, so that the eight rows which a load_matrix reads lie in eight banks.
// RAGGED is 1 where a chunk may begin off a 16-byte border or end inside: such chunks are copied element by element, zeros
// past the end. The constants come from src/ops/<op>/cuda.rs.
#pragma once
#include "device.cuh"

constexpr u32 THREADS = WARPS_M * WARPS_N * WARP;
constexpr u32 WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
constexpr u32 STEPS = BLOCK_K / 16;
constexpr u32 CHUNK = 8;  // elements of one 16-byte access
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp multiplies 16 x 16 at a time");
static_assert(STEPS % 2 == 0 && STAGES >= 2, "fragments are loaded one step ahead, into two sets in turn");

/// A warp's results as mma_16x8x16 spreads them: row lane/4 (+ 8), columns 2·(lane%4) and the next of each 16 × 8.
typedef float Sums[WARP_M / 16][WARP_N / 8][4];

struct Stage {
    bf16 a[BLOCK_M * BLOCK_K];
    bf16 b[BLOCK_N * BLOCK_K];
};

struct Fragments {
    u32 a[WARP_M / 16][4];
    u32 b[WARP_N / 16][4];  // two of 16 × 8 each
};

/// Rows first .. first + rows and columns 0 .. cols of a matrix in global memory; everywhere else it is zero.
struct Operand {
    const bf16* data;
    u32 stride, first, rows, cols;
};

/// This warp's first row and column in the block's tile.
DEVICE u32 warp_row() { return threadIdx.x / WARP / WARPS_N * WARP_M; }
DEVICE u32 warp_col() { return threadIdx.x / WARP % WARPS_N * WARP_N; }
/// This lane's first row of a 16-row fragment and first column of an 8-column one.
DEVICE u32 lane_row() { return threadIdx.x % WARP / 4; }
DEVICE u32 lane_col() { return threadIdx.x % 4 * 2; }

/// Where a chunk lies in a shared tile whose rows are CHUNKS (a power of two) long.
template <u32 CHUNKS>
DEVICE u32 chunk_offset(u32 row, u32 chunk) {
    constexpr u32 ROWS = CHUNKS < 8 ? 8 / CHUNKS : 1;  // that share the 128 bytes of all banks
    constexpr u32 MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    static_assert((CHUNKS & (CHUNKS - 1)) == 0, "a row is a power of two long");
    return (row * CHUNKS + (chunk ^ (row / ROWS & MASK))) * CHUNK;
}

/// Starts copying a chunk to shared memory: `count` of its elements lie inside, zeros past them.
DEVICE void copy_chunk(bf16* to, const bf16* from, u32 count) {
#if RAGGED
    if (count < CHUNK || reinterpret_cast<u64>(from) % 16 != 0) {
#pragma unroll 1
        for (u32 j = 0; j < CHUNK; j++) to[j] = j < count ? from[j] : bf16{0};
        return;
    }
#endif
    copy_async_16(to, from, count > 0);
}

/// Starts copying ROWS × COLS elements from (row, col) on. A thread copies the same chunk of every PASS-th row.
template <u32 ROWS, u32 COLS>
DEVICE void copy_tile(bf16* tile, const Operand& from, u32 row, u32 col) {
    constexpr u32 CHUNKS = COLS / CHUNK, PASS = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && PASS % 8 == 0, "chunks are permuted alike in every eight rows");
    u32 r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS, at = row + r - from.first, begin = col + c * CHUNK;
    u32 count = begin < from.cols ? minimum(from.cols - begin, CHUNK) : 0;
    const bf16* source = from.data + static_cast<u64>(row + r) * from.stride + begin;
    bf16* to = tile + chunk_offset<CHUNKS>(r, c);
#pragma unroll
    for (u32 i = 0; i < ROWS; i += PASS) {
        if (ROWS % PASS != 0 && i + r >= ROWS) break;
        copy_chunk(to + i * COLS, source + static_cast<u64>(i) * from.stride, at + i < from.rows ? count : 0);
    }
}

/// Block `k` of a or b, whose tile begins at row `row`.
template <bool ACROSS, u32 ROWS>
DEVICE void copy_operand(bf16* tile, const Operand& from, u32 row, u32 k) {
    if constexpr (ACROSS) {
        copy_tile<BLOCK_K, ROWS>(tile, from, k, row);
    } else {
        copy_tile<ROWS, BLOCK_K>(tile, from, row, k);
    }
}

/// COUNT pieces of 16 × 16 (rows × k) from a shared tile of ROWS rows, four 8 × 8 matrices each. Which of them is the next
/// along the rows and which along k differs between a and b.
template <bool ACROSS, bool IS_A, u32 ROWS, u32 COUNT>
DEVICE void load_pieces(u32 (&pieces)[COUNT][4], const bf16* tile, u32 row, u32 k) {
    u32 inner = threadIdx.x % 8, low = threadIdx.x / 8 % 2 * 8, high = threadIdx.x % WARP / 16 * 8;
    row += (IS_A ? low : high) + (ACROSS ? 0 : inner);
    k += (IS_A ? high : low) + (ACROSS ? inner : 0);
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if constexpr (ACROSS) {
            load_matrix_x4_transposed(pieces[i], tile + chunk_offset<ROWS / CHUNK>(k, row / CHUNK + 2 * i));
        } else {
            load_matrix_x4(pieces[i], tile + chunk_offset<BLOCK_K / CHUNK>(row, k / CHUNK) + i * 16 * BLOCK_K);
        }
    }
}

template <bool A_ACROSS, bool B_ACROSS>
DEVICE void load_fragments(Fragments& to, const Stage& stage, u32 step) {
    load_pieces<A_ACROSS, true, BLOCK_M>(to.a, stage.a, warp_row(), step * 16);
    load_pieces<B_ACROSS, false, BLOCK_N>(to.b, stage.b, warp_col(), step * 16);
}

DEVICE void multiply_fragments(Sums& sums, const Fragments& f) {
#pragma unroll
    for (u32 m = 0; m < WARP_M / 16; m++)
#pragma unroll
        for (u32 n = 0; n < WARP_N / 8; n++) {
            u32 b[2] = {f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]};
            mma_16x8x16(sums[m][n], f.a[m], b);
        }
}

/// sums = Σ over `blocks` blocks along k. A kernel's own `copy_block(stage, source, block)` starts copying one of them, its
/// `block_steps(source, block)` says how many steps of it to multiply (at least 1). Shared memory is free again afterwards.
template <bool A_ACROSS, bool B_ACROSS, typename Source>
DEVICE void multiply(Sums& sums, Stage (&stages)[STAGES], const Source& source, u32 blocks) {
#pragma unroll
    for (u32 m = 0; m < WARP_M / 16; m++)
#pragma unroll
        for (u32 n = 0; n < WARP_N / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++) {
        if (s < blocks) copy_block(stages[s], source, s);
        copy_async_commit();
    }
    copy_async_wait<STAGES - 2>();
    block_barrier();
    Fragments f[2];
    load_fragments<A_ACROSS, B_ACROSS>(f[0], stages[0], 0);
    u32 read = 0, write = STAGES - 1;
    for (u32 block = 0; block < blocks; block++) {
        u32 steps = block_steps(source, block), next = read + 1 < STAGES ? read + 1 : 0;
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            if (step + 1 < STEPS) {
                load_fragments<A_ACROSS, B_ACROSS>(f[(step + 1) % 2], stages[read], step + 1);
            } else {
                // The next block has arrived, and nobody reads this one's stage any more.
                copy_async_wait<STAGES - 2>();
                block_barrier();
                if (block + 1 < blocks) load_fragments<A_ACROSS, B_ACROSS>(f[0], stages[next], 0);
            }
            if (step == 0) {
                if (block + STAGES - 1 < blocks) copy_block(stages[write], source, block + STAGES - 1);
                copy_async_commit();
            }
            if (step == 0 || step < steps) multiply_fragments(sums, f[step % 2]);
        }
        write = read, read = next;
    }
}

/// Up to eight elements of one row; `count` of them lie inside.
DEVICE void store_chunk(bf16* to, const bf16x8& part, u32 count) {
#if RAGGED
    if (count < CHUNK || reinterpret_cast<u64>(to) % 16 != 0) {
        for (u32 j = 0; j < minimum(count, CHUNK); j++) to[j] = part.v[j];
        return;
    }
#endif
    *reinterpret_cast<bf16x8*>(to) = part;
}

/// Rounds the block's tile to bf16 and writes columns `col` .. `cols` of it in whole chunks, by way of shared memory.
/// `row_at` gives the first element of a row of the tile, null for one that is not to be written.
template <typename RowAt>
DEVICE void store_tile(const Sums& sums, bf16 (&tile)[BLOCK_M * BLOCK_N], u32 col, u32 cols, RowAt row_at) {
    constexpr u32 CHUNKS = WARP_N / CHUNK;
    bf16* mine = tile + threadIdx.x / WARP * WARP_M * WARP_N;
#pragma unroll
    for (u32 m = 0; m < WARP_M / 16; m++)
#pragma unroll
        for (u32 n = 0; n < WARP_N / 8; n++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 at = chunk_offset<CHUNKS>(m * 16 + half * 8 + lane_row(), n) + lane_col();
                *reinterpret_cast<u32*>(mine + at) = to_bf16x2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
            }
    warp_barrier();
#pragma unroll
    for (u32 i = threadIdx.x % WARP; i < WARP_M * CHUNKS; i += WARP) {
        u32 row = i / CHUNKS, c = col + warp_col() + i % CHUNKS * CHUNK;
        bf16* to = row_at(warp_row() + row);
        bf16x8 part = *reinterpret_cast<const bf16x8*>(mine + chunk_offset<CHUNKS>(row, i % CHUNKS));
        if (to != nullptr && c < cols) store_chunk(to + c, part, cols - c);
    }
}
