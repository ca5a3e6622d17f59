// The language-model head over a chunk of rows r: logits l = h·Wᵀ (capped: c·tanh(h·Wᵀ/c), of slope s = 1 − (l/c)²),
// log-probabilities, and the rows that W is multiplied with.
//   lm_head_logits    chunk[r,v] = exp(l − m)·s, stats[r, tile] = (m, Σ_{v ≠ target} exp(l − m)), and l[r, target]; m is the
//                     largest logit of a row's tile, all from the f32 sums
//   lm_head_combine   lse = log Σ exp l, logprob = l[target] − lse, log_rest = log((Σ_{v ≠ target} exp l) / Σ exp l)
//   lm_head_gradient  chunk[r,v] = (1[v = target] − p(v))·s, in place
// and for KL(π_0 ‖ π_θ) = (lse − lse_0) − Σ p_0·(l − l_0), both models in one product (its own section below).
// A block owns BLOCK_M × BLOCK_N logits (tile.cuh), then a warp a row, then a block a row. BLOCK_N is the same for any number
// of rows, and sums run over tiles in a fixed order: a row's bits depend on itself alone. Everything is overwritten.
#include "tile.cuh"

union Shared {
    Stage stages[STAGES];
    struct {
        bf16 tile[BLOCK_M * BLOCK_N];
        float maxima[WARPS_N][BLOCK_M], sums[WARPS_N][BLOCK_M], cross[WARPS_N][BLOCK_M];
    } out;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda.rs counts the same bytes");

/// One number for each of this thread's rows: row lane/4 (+ 8) of each fragment.
typedef float Rows[WARP_M / 16][2];

/// exp(x) − 1 to about 2e-6 of itself, also where x is small.
DEVICE float exp_minus_one(float x) {
    float series = x * (1.0f + x * (1.0f / 2 + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120)))));
    return x * x < 1.0f / 16 ? series : exp_fast(x) - 1.0f;
}

/// Joins what the row's threads hold, over the whole tile: the largest, or the sum.
template <bool LARGEST>
DEVICE void join_rows(Rows& rows, float (&shared)[WARPS_N][BLOCK_M]) {
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float& value = rows[i][half];
#pragma unroll
            for (u32 mask = 1; mask < 4; mask *= 2) {
                float other = shuffle_xor(value, mask);
                value = LARGEST ? maximum(value, other) : value + other;
            }
            u32 row = warp_row() + i * 16 + half * 8 + lane_row();
            if (lane_col() == 0) shared[warp_col() / WARP_N][row] = value;
        }
    block_barrier();
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 row = warp_row() + i * 16 + half * 8 + lane_row();
            float value = shared[0][row];
#pragma unroll
            for (u32 w = 1; w < WARPS_N; w++) value = LARGEST ? maximum(value, shared[w][row]) : value + shared[w][row];
            rows[i][half] = value;
        }
}

/// The largest logit of each row; what lies past the vocabulary's end becomes −∞.
DEVICE void largest(Rows& rows, Sums& logits, Shared& shared, u32 col, u32 vocab) {
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++) {
        rows[i][0] = rows[i][1] = -INFINITE;
#pragma unroll
        for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                float& logit = logits[i][j][e];
                if (col + warp_col() + j * 8 + lane_col() + e % 2 >= vocab) logit = -INFINITE;
                rows[i][e / 2] = maximum(rows[i][e / 2], logit);
            }
    }
    join_rows<true>(rows, shared.out.maxima);
}

/// h (rows, cols) and w (vocab, cols), both along k; with a second h every other 16 rows of the tile are its rows.
struct Heads {
    Operand h, w;
    const bf16* second;  // h0, null without
    u32 row, col;
};

/// The row of h that row r of a tile of pairs stands for, and whether it is the second h's.
DEVICE u32 pair_row(u32 r) { return r / 32 * 16 + r % 16; }
DEVICE bool is_second(u32 r) { return r / 16 % 2 == 1; }

DEVICE u32 block_steps(const Heads&, u32) { return STEPS; }

DEVICE void copy_block(Stage& stage, const Heads& from, u32 block) {
    if (from.second == nullptr) {
        copy_operand<false, BLOCK_M>(stage.a, from.h, from.row, block * BLOCK_K);
    } else {
        constexpr u32 CHUNKS = BLOCK_K / CHUNK;
        u32 col = block * BLOCK_K + threadIdx.x % CHUNKS * CHUNK;
        u32 count = col < from.h.cols ? minimum(from.h.cols - col, CHUNK) : 0;
#pragma unroll
        for (u32 r = threadIdx.x / CHUNKS; r < BLOCK_M; r += THREADS / CHUNKS) {
            u32 row = from.row + pair_row(r);
            const bf16* source = (is_second(r) ? from.second : from.h.data) + static_cast<u64>(row) * from.h.stride + col;
            copy_chunk(stage.a + chunk_offset<CHUNKS>(r, threadIdx.x % CHUNKS), source, row < from.h.rows ? count : 0);
        }
    }
    copy_operand<false, BLOCK_N>(stage.b, from.w, from.col, block * BLOCK_K);
}

struct HeadParams {
    bf16* chunk;
    float* stats;
    const bf16* h;
    const bf16* w;
    // Of one model's log-probabilities:
    const u32* /*or null*/ targets;
    float* /*or null*/ logprob;
    float* /*or null*/ lse;
    float* /*or null*/ log_rest;
    // Of two models' divergence:
    const bf16* /*or null*/ h0;
    bf16* /*or null*/ chunk0;
    float* /*or null*/ kl;
    u32 first, rows;  // the chunk's among all
    u32 vocab, cols, tiles;
    u32 tile_shift;  // a tile of `stats` is 2^this columns wide
    u32 chunk_stride, h_stride, w_stride;
    float softcap;  // 0: none
};

/// The block's first row and column, and its tile of columns. All rows of the chunk meet one tile of W before the next: W is
/// read once.
struct Place {
    u32 row, col, tile;
};

/// This block's logits and the largest of each row; with PAIRS of h and h0 alternately.
template <bool PAIRS>
DEVICE Place tile_logits(Sums& sums, Rows& most, Shared& shared, const HeadParams& p) {
    constexpr u32 HEIGHT = PAIRS ? BLOCK_M / 2 : BLOCK_M;
    u32 down = (p.rows + HEIGHT - 1) / HEIGHT, tile = blockIdx.x / down;
    u32 row = blockIdx.x % down * HEIGHT, col = tile * BLOCK_N;
    u64 at = static_cast<u64>(p.first) * p.h_stride;
    Heads from = {{p.h + at, p.h_stride, 0, p.rows, p.cols}, {p.w, p.w_stride, 0, p.vocab, p.cols}, PAIRS ? p.h0 + at : nullptr, row, col};
    multiply<false, false>(sums, shared.stages, from, (p.cols + BLOCK_K - 1) / BLOCK_K);
    if (p.softcap > 0.0f) {
#pragma unroll
        for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
            for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) sums[i][j][e] = capped(sums[i][j][e], p.softcap);
    }
    largest(most, sums, shared, col, p.vocab);
    return {row, col, tile};
}

KERNEL __launch_bounds__(THREADS, BLOCKS_PER_SM) lm_head_logits(const HeadParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    Sums sums;
    Rows most, rest;
    auto [row, col, tile] = tile_logits<false>(sums, most, shared, p);
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 r = row + warp_row() + i * 16 + half * 8 + lane_row();
            u32 target = r < p.rows ? p.targets[p.first + r] : p.vocab;
            rest[i][half] = 0.0f;
#pragma unroll
            for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
                for (u32 e = 2 * half; e < 2 * half + 2; e++) {
                    u32 v = col + warp_col() + j * 8 + lane_col() + e % 2;
                    float logit = sums[i][j][e];
                    if (v == target && r < p.rows) p.stats[static_cast<u64>(2) * p.rows * p.tiles + r] = logit;
                    sums[i][j][e] = exp_fast(logit - most[i][half]);
                    rest[i][half] += v == target ? 0.0f : sums[i][j][e];
                    if (p.softcap > 0.0f) sums[i][j][e] *= cap_slope(logit, p.softcap);
                }
        }
    join_rows<false>(rest, shared.out.sums);
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 r = row + warp_row() + i * 16 + half * 8 + lane_row();
            if (r >= p.rows || warp_col() + lane_col() > 0) continue;
            float* mine = p.stats + (static_cast<u64>(r) * p.tiles + tile) * 2;
            mine[0] = most[i][half], mine[1] = rest[i][half];
        }
    store_tile(sums, shared.out.tile, col, p.vocab, [&, row = row](u32 r) -> bf16* {
        return row + r < p.rows ? p.chunk + static_cast<u64>(row + r) * p.chunk_stride : nullptr;
    });
}

/// log Σ exp over the tiles of one row, (m, s) of each `step` apart; the same bits in every lane. `rest` becomes Σ s·exp(m − M)
/// without `extra`, one more logit (−∞: none).
DEVICE float log_sum(const float* stats, u32 count, u32 step, float extra, float& rest) {
    u32 lane = threadIdx.x % WARP;
    float most = extra;
    for (u32 t = lane; t < count; t += WARP) most = maximum(most, stats[t * step]);
    most = warp_maximum(most);
    float sum = 0.0f;
    for (u32 t = lane; t < count; t += WARP) sum += stats[t * step + 1] * exp_fast(stats[t * step] - most);
    sum = warp_sum(sum);
    float whole = sum + exp_fast(extra - most);
    rest = sum / whole;
    return most + logf(whole);
}

KERNEL __launch_bounds__(THREADS) lm_head_combine(const HeadParams p) {
    after_previous();
    u32 row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= p.rows) return;  // whole warps leave
    float logit = p.stats[static_cast<u64>(2) * p.rows * p.tiles + row], rest;
    float log = log_sum(p.stats + static_cast<u64>(row) * p.tiles * 2, p.tiles, 2, logit, rest);
    if (threadIdx.x % WARP > 0) return;
    p.logprob[p.first + row] = logit - log;
    p.lse[p.first + row] = log;
    p.log_rest[p.first + row] = logf(rest);
}

KERNEL __launch_bounds__(THREADS) lm_head_gradient(const HeadParams p) {
    after_previous();
    u32 row = p.first + blockIdx.x, target = p.targets[row];
    bf16x8* mine = reinterpret_cast<bf16x8*>(p.chunk + static_cast<u64>(blockIdx.x) * p.chunk_stride);
    const float* maxima = p.stats + static_cast<u64>(blockIdx.x) * p.tiles * 2;
    float slope = cap_slope(p.stats[static_cast<u64>(2) * p.rows * p.tiles + blockIdx.x], p.softcap);
    for (u32 i = threadIdx.x; i < p.chunk_stride / CHUNK; i += THREADS) {
        float scale = -exp_fast(maxima[(i * CHUNK >> p.tile_shift) * 2] - p.lse[row]);
        bf16x8 part = mine[i];
#pragma unroll
        for (u32 j = 0; j < CHUNK; j++) {
            float value = to_float(part.v[j]) * scale;
            // 1 − p from the other tokens' sum: nothing is lost where p is nearly 1.
            if (i * CHUNK + j == target) value = exp_fast(p.log_rest[row]) * slope;
            part.v[j] = i * CHUNK + j < p.vocab ? to_bf16(value) : bf16{0};
        }
        mine[i] = part;
    }
}

// ------------------------------------------------------------------------------------------------------ KL(π_0 ‖ π_θ)
// Rows of h (π_θ) and h0 (π_0) alternate by 16 in the tile, so a thread holds both logits of the same (row, token). With
// m, m0 the tile's maxima, e0 = exp(l0 − m0) and y = exp((l − m) − (l0 − m0)) − 1:
//   p_0 = e0·exp(m0 − lse_0),  p − p_0 = p_0·(y·k + (k − 1)),  k = exp((m − m0) − (lse − lse_0))
// and where logits are capped both sides of the last are times π_θ's s.
// Both are small where the models agree, so rounding y to bf16 costs the difference an ulp, not the probabilities.
// chunk = y, chunk0 = e0·s, then chunk = (p − p_0)·s; stats[r, tile] = (m, s, m0, s0, Σ e0·(l − l0)), after them (lse, lse_0).

constexpr u32 KL_STATS = 5;

/// y's exponent at most; beyond it e0 has become zero.
constexpr float LARGEST_EXPONENT = 80.0f;

// __grid_constant__: at 255 registers the copies of the struct's fields that the compiler otherwise keeps would be spilled.
KERNEL __launch_bounds__(THREADS, BLOCKS_PER_SM) lm_head_kl_logits(const __grid_constant__ HeadParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    Sums sums;
    Rows most, total, cross;
    auto [row, col, tile] = tile_logits<true>(sums, most, shared, p);
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i += 2)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            total[i][half] = total[i + 1][half] = cross[i][half] = cross[i + 1][half] = 0.0f;
#pragma unroll
            for (u32 j = 0; j < WARP_N / 8; j++)
#pragma unroll
                for (u32 e = 2 * half; e < 2 * half + 2; e++) {
                    float &logit = sums[i][j][e], &logit0 = sums[i + 1][j][e];
                    bool inside = col + warp_col() + j * 8 + lane_col() + e % 2 < p.vocab;
                    float apart = inside ? logit - logit0 : 0.0f;
                    float ratio = apart - (most[i][half] - most[i + 1][half]);
                    total[i][half] += exp_fast(logit - most[i][half]);
                    logit0 = exp_fast(logit0 - most[i + 1][half]);
                    total[i + 1][half] += logit0;
                    cross[i][half] += logit0 * apart;
                    if (p.softcap > 0.0f) logit0 *= cap_slope(logit, p.softcap);
                    logit = exp_minus_one(ratio < LARGEST_EXPONENT ? ratio : LARGEST_EXPONENT);
                }
        }
    join_rows<false>(total, shared.out.sums);
    join_rows<false>(cross, shared.out.cross);
#pragma unroll
    for (u32 i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 r = warp_row() + i * 16 + half * 8 + lane_row();
            if (row + pair_row(r) >= p.rows || warp_col() + lane_col() > 0) continue;
            float* mine = p.stats + (static_cast<u64>(row + pair_row(r)) * p.tiles + tile) * KL_STATS;
            u32 side = is_second(r) ? 2 : 0;
            mine[side] = most[i][half], mine[side + 1] = total[i][half];
            if (side == 0) mine[4] = cross[i][half];
        }
    store_tile(sums, shared.out.tile, col, p.vocab, [&, row = row](u32 r) -> bf16* {
        u64 to = static_cast<u64>(row + pair_row(r)) * p.chunk_stride;
        return row + pair_row(r) < p.rows ? (is_second(r) ? p.chunk0 : p.chunk) + to : nullptr;
    });
}

KERNEL __launch_bounds__(THREADS) lm_head_kl_combine(const HeadParams p) {
    after_previous();
    u32 row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= p.rows) return;  // whole warps leave
    const float* mine = p.stats + static_cast<u64>(row) * p.tiles * KL_STATS;
    float unused, cross = 0.0f;
    float lse = log_sum(mine, p.tiles, KL_STATS, -INFINITE, unused);
    float lse0 = log_sum(mine + 2, p.tiles, KL_STATS, -INFINITE, unused);
    for (u32 t = threadIdx.x % WARP; t < p.tiles; t += WARP) {
        const float* tile = mine + t * KL_STATS;
        cross += tile[4] * exp_fast(tile[2] - lse0);
    }
    cross = warp_sum(cross);
    if (threadIdx.x % WARP > 0) return;
    p.kl[p.first + row] = (lse - lse0) - cross;
    float* logs = p.stats + static_cast<u64>(p.rows) * p.tiles * KL_STATS + row * 2;
    logs[0] = lse, logs[1] = lse0;
}

KERNEL __launch_bounds__(THREADS) lm_head_kl_gradient(const HeadParams p) {
    after_previous();
    const float* mine = p.stats + static_cast<u64>(blockIdx.x) * p.tiles * KL_STATS;
    const float* logs = p.stats + static_cast<u64>(p.rows) * p.tiles * KL_STATS + blockIdx.x * 2;
    u64 at = static_cast<u64>(blockIdx.x) * p.chunk_stride;
    bf16x8* to = reinterpret_cast<bf16x8*>(p.chunk + at);
    const bf16x8* from = reinterpret_cast<const bf16x8*>(p.chunk0 + at);
    for (u32 i = threadIdx.x; i < p.chunk_stride / CHUNK; i += THREADS) {
        const float* tile = mine + i * CHUNK / BLOCK_N * KL_STATS;
        float shift = exp_minus_one((tile[0] - tile[2]) - (logs[0] - logs[1])), scale = exp_fast(tile[2] - logs[1]);
        bf16x8 part = to[i], other = from[i];
#pragma unroll
        for (u32 j = 0; j < CHUNK; j++) {
            float y = to_float(part.v[j]), p0 = to_float(other.v[j]) * scale;
            part.v[j] = i * CHUNK + j < p.vocab ? to_bf16(p0 * (y * shift + (y + shift))) : bf16{0};
        }
        to[i] = part;
    }
}
