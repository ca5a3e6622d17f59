// What attention.cu and decode.cu are made of: tiles in shared memory, products of a warp's 16 rows with them, softmax.
// HEAD_DIM columns are padded with zeros to WIDE.
#pragma once
#include "device.cuh"

constexpr u32 PITCH = WIDE + 8;  // an odd number of 16-byte chunks: eight rows lie in eight different banks

/// THREADS threads (a block, or each of its warps) start copying rows first..first + ROWS of one head; rows from `end` on and
/// columns from HEAD_DIM on become zeros.
template <u32 ROWS, u32 THREADS>
DEVICE void load_rows(bf16* to, const bf16* from, u32 stride, u32 first, u32 end) {
    constexpr u32 CHUNKS = WIDE / 8;
#pragma unroll 2
    for (u32 i = threadIdx.x % THREADS; i < ROWS * CHUNKS; i += THREADS) {
        u32 row = i / CHUNKS, column = i % CHUNKS * 8;
        bool valid = first + row < end && column < HEAD_DIM;
        const bf16* source = valid ? from + static_cast<u64>(first + row) * stride + column : from;
        copy_async_16(to + row * PITCH + column, source, valid);
    }
}

/// s[h] += a[h]·bᵀ along all columns: 16 rows of each a (`a_step` apart) and ROWS rows of b.
template <u32 H, u32 ROWS>
DEVICE void multiply_rows(float (&s)[H][ROWS / 8][4], const bf16* a, u32 a_step, const bf16* b) {
    u32 lane = threadIdx.x % WARP;
    a += lane % 16 * PITCH + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (u32 k = 0; k < WIDE; k += 16) {
        u32 x[H][4];
#pragma unroll
        for (u32 h = 0; h < H; h++) load_matrix_x4(x[h], a + h * a_step + k);
#pragma unroll
        for (u32 n = 0; n < ROWS; n += 16) {
            u32 y[4];
            load_matrix_x4(y, b + n * PITCH + k);
#pragma unroll
            for (u32 h = 0; h < H; h++) {
                mma_16x8x16(s[h][n / 8], x[h], {y[0], y[1]});
                mma_16x8x16(s[h][n / 8 + 1], x[h], {y[2], y[3]});
            }
        }
    }
}

/// y[h] += p[h]·m: p (16, ROWS) as it came out of `multiply_rows`, rounded to bf16; ROWS rows and COLUMNS columns of m.
template <u32 H, u32 ROWS, u32 COLUMNS>
DEVICE void multiply(float (&y)[H][COLUMNS / 8][4], const float (&p)[H][ROWS / 8][4], const bf16* m) {
    u32 lane = threadIdx.x % WARP;
    m += lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
    for (u32 k = 0; k < ROWS; k += 16) {
        u32 x[H][4];
#pragma unroll
        for (u32 h = 0; h < H; h++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float(&pair)[4] = p[h][k / 8 + i / 2];
                x[h][i] = to_bf16x2(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (u32 n = 0; n < COLUMNS; n += 16) {
            u32 z[4];
            load_matrix_x4_transposed(z, m + k * PITCH + n);
#pragma unroll
            for (u32 h = 0; h < H; h++) {
                mma_16x8x16(y[h][n / 8], x[h], {z[0], z[1]});
                mma_16x8x16(y[h][n / 8 + 1], x[h], {z[2], z[3]});
            }
        }
    }
}

/// Stores this lane's share of 16 × COLUMNS sums: `to` is column 0 of row 0, rows from `rows` on are left out.
template <u32 COLUMNS>
DEVICE void store_rows(bf16* to, u32 stride, u32 rows, u32 columns, const float (&y)[COLUMNS / 8][4], const float (&factor)[2]) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 row = lane / 4 + r * 8;
        if (row >= rows) continue;
        bf16* at = to + static_cast<u64>(row) * stride + lane % 4 * 2;
#pragma unroll
        for (u32 n = 0; n < COLUMNS; n += 8) {
            u32 pair = to_bf16x2(y[n / 8][2 * r] * factor[r], y[n / 8][2 * r + 1] * factor[r]);
            if (n < columns) *reinterpret_cast<u32*>(at + n) = pair;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ scores

/// A raw product in units of log2: scaled, capped.
DEVICE float score(float product, float scale, float softcap) {
    if (!SOFTCAP) return product * (scale * LOG2_E);
    // tanh x = 1 − 2/(e^2x + 1), right to some 1e-7 everywhere.
    return softcap * LOG2_E * (1.0f - 2.0f / (exp2_fast(product * (scale * 2.0f * LOG2_E / softcap)) + 1.0f));
}

/// d score / d (scale·product).
DEVICE float slope(float score, float softcap) {
    if (!SOFTCAP) return 1.0f;
    float tanh = maximum(-1.0f, score / (softcap * LOG2_E));  // of a hidden score: −1, so that 0 times it is 0
    return 1.0f - tanh * tanh;
}

/// The same in each of the four lanes that share a row.
DEVICE float row_maximum(float value) {
    value = maximum(value, shuffle_xor(value, 1));
    return maximum(value, shuffle_xor(value, 2));
}

DEVICE float row_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

/// Scores become probabilities relative to the running maximum `top`; `sum` and `y` are brought down to it.
template <u32 ROWS>
DEVICE void soften(float (&s)[ROWS / 8][4], float (&y)[WIDE / 8][4], float (&top)[2], float (&sum)[2]) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float highest = top[r];
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++) highest = maximum(highest, maximum(s[n][2 * r], s[n][2 * r + 1]));
        highest = row_maximum(highest);
        float shift = highest == -INFINITE ? 0.0f : highest;  // nothing seen yet
        float shrink = exp2_fast(top[r] - shift);
        top[r] = highest;
        sum[r] *= shrink;
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++) {
#pragma unroll
            for (u32 i = 2 * r; i < 2 * r + 2; i++) sum[r] += s[n][i] = exp2_fast(s[n][i] - shift);
        }
#pragma unroll
        for (u32 n = 0; n < WIDE / 8; n++) {
            y[n][2 * r] *= shrink;
            y[n][2 * r + 1] *= shrink;
        }
    }
}
