// Attention over packed sequences (FlashAttention, arXiv:2205.14135, with two intervals of keys per tile of rows).
//   forward   s = scale·q·kᵀ (capped: c·tanh(s/c)), p = softmax(s), o = p·v, lse = log Σ exp s
//   backward  p = exp(s − lse), δ = do·o, ds = p·(do·vᵀ − δ)·(1 − tanh²), dq = scale·ds·k, dk = scale·dsᵀ·q, dv = pᵀ·do
// o, lse and dqkv are overwritten. The batch's tables (src/ops/attention/tiles.rs) cut every segment into tiles of TILE rows,
// longest work first; constants come from src/ops/attention/cuda.rs.
//
// A warp owns 16 rows of what stays in shared memory and keeps its sums in f32 registers; what it walks along arrives by
// asynchronous copies, one strip ahead. Probabilities are rounded to bf16 as operands only. A strip begins at the first key
// of the prompt or of the own segment: a row's bits do not depend on where its sequence lies. No atomics; dk and dv of a
// tile are summed by one block, or, for tiles that many rows see, by several whose sums are added in order.
#include "attention.cuh"

constexpr u32 WARPS = TILE / 16;

struct QueryTile {
    u32 first, end, own_start, own_end, prompt_start, prompt_end;
};

struct KeyTile {
    u32 first, end, row_start, row_end, own_start, slot;
};

struct ForwardShared {
    bf16 q[FORWARD_HEADS][TILE * PITCH];
    bf16 kv[2][2][FORWARD_STRIP * PITCH];  // stage; keys, values
};
static_assert(sizeof(ForwardShared) == FORWARD_SHARED, "src/ops/attention/cuda.rs asks for it");

struct BackwardShared {
    bf16 still[2][TILE * PITCH];            // q, do of the block's rows; or k, v of the block's keys
    bf16 moving[2][2][BACKWARD_STRIP * PITCH];  // stage; the other two
};
static_assert(sizeof(BackwardShared) == BACKWARD_SHARED, "src/ops/attention/cuda.rs asks for it");

// -------------------------------------------------------------------------------------------------------------- keys

/// Rows first..end of the pack, the first at `position` of its sequence.
struct Strip {
    u32 first, end;
    int position;
};

/// Position of a packed row of the tile's segment.
DEVICE int position_of(const QueryTile& tile, u32 row) {
    return static_cast<int>(tile.prompt_end - tile.prompt_start + row - tile.own_start);
}

/// Strips of the tile's prompt.
template <u32 ROWS>
DEVICE u32 prompt_strips(const QueryTile& tile) {
    return (tile.prompt_end - tile.prompt_start + ROWS - 1) / ROWS;
}

/// All strips of keys that the tile meets: its prompt's, then its own up to the diagonal, or up to the window's end.
template <u32 ROWS>
DEVICE u32 strips(const QueryTile& tile, u32 window) {
    u32 end = CAUSAL ? tile.end : minimum(tile.own_end, tile.end + window - 1);
    return prompt_strips<ROWS>(tile) + (end - tile.own_start + ROWS - 1) / ROWS;
}

/// The first of them that any row of the tile sees.
template <u32 ROWS>
DEVICE u32 first_strip(const QueryTile& tile, u32 window) {
    u32 prompt = tile.prompt_end - tile.prompt_start, sees = prompt + tile.first - tile.own_start + 1;
    u32 lowest = sees > window ? sees - window : 0;
    return lowest < prompt ? lowest / ROWS : prompt_strips<ROWS>(tile) + (lowest - prompt) / ROWS;
}

template <u32 ROWS>
DEVICE Strip strip_at(const QueryTile& tile, u32 index) {
    u32 prompt = prompt_strips<ROWS>(tile);
    if (index < prompt) return {tile.prompt_start + index * ROWS, tile.prompt_end, static_cast<int>(index * ROWS)};
    u32 first = tile.own_start + (index - prompt) * ROWS;
    return {first, CAUSAL ? tile.end : tile.own_end, position_of(tile, first)};
}

/// Starts copying the strip at `index` of one head's keys and values to its stage.
template <u32 ROWS>
DEVICE void load_strip(bf16 (&stages)[2][2][ROWS * PITCH], const QueryTile& tile, const bf16* k, const bf16* v, u32 stride, u32 index) {
    constexpr u32 THREADS = WARPS * WARP;
    Strip strip = strip_at<ROWS>(tile, index);
    load_rows<ROWS, THREADS>(stages[index % 2][0], k, stride, strip.first, strip.end);
    load_rows<ROWS, THREADS>(stages[index % 2][1], v, stride, strip.first, strip.end);
    copy_async_commit();
}

/// Raw products of this lane's two rows (at `position` and 8 further) become scores, −∞ where a row does not see a key.
template <u32 ROWS, typename Params>
DEVICE void scores(float (&s)[ROWS / 8][4], const Strip& strip, int position, const Params& p) {
    int window = static_cast<int>(p.window);
    u32 lane = threadIdx.x % WARP;
    int count = static_cast<int>(strip.end - strip.first);
#pragma unroll
    for (u32 n = 0; n < ROWS / 8; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            int key = static_cast<int>(n * 8 + lane % 4 * 2 + i % 2), ahead = position + static_cast<int>(i / 2 * 8) - strip.position;
            bool seen = key < count && (!CAUSAL || key <= ahead) && ahead - key < window;
            if (WINDOWED && !CAUSAL) seen = seen && key - ahead < window;
            s[n][i] = seen ? score(s[n][i], p.scale, p.softcap) : -INFINITE;
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- forward

struct AttentionParams {
    bf16* o;
    float* lse;
    const bf16* qkv;
    const u32* tiles;  // QueryTile
    u32 heads, kv_heads, window;
    float scale, softcap;
};

// A block: one query tile, FORWARD_HEADS query heads of one key/value head (a last one may lack a partner), four warps.
KERNEL __launch_bounds__(WARPS* WARP, FORWARD_BLOCKS) attention_forward(const AttentionParams p) {
    after_previous();
    constexpr u32 H = FORWARD_HEADS, ROWS = FORWARD_STRIP, THREADS = WARPS * WARP;
    ForwardShared& shared = shared_memory<ForwardShared>();
    u32 heads = p.heads, kv_heads = p.kv_heads, group = heads / kv_heads, parts = (group + H - 1) / H, stride = (heads + 2 * kv_heads) * HEAD_DIM;
    QueryTile tile = reinterpret_cast<const QueryTile*>(p.tiles)[blockIdx.x / (kv_heads * parts)];
    u32 kv = blockIdx.x / parts % kv_heads, head = kv * group + blockIdx.x % parts * H;
    const bf16* k = p.qkv + (heads + kv) * HEAD_DIM;
    auto fetch = [&](u32 index) { load_strip<ROWS>(shared.kv, tile, k, k + kv_heads * HEAD_DIM, stride, index); };
    u32 have = minimum(H, (kv + 1) * group - head);
    for (u32 h = 0; h < H; h++) {
        load_rows<TILE, THREADS>(shared.q[h], p.qkv + (head + minimum(h, have - 1)) * HEAD_DIM, stride, tile.first, tile.end);
    }
    u32 begin = first_strip<ROWS>(tile, p.window), end = strips<ROWS>(tile, p.window);
    fetch(begin);

    u32 lane = threadIdx.x % WARP, upper = threadIdx.x / WARP * 16, first = tile.first + upper;
    int position = position_of(tile, first);
    float y[H][WIDE / 8][4] = {}, top[H][2], sum[H][2] = {};
    for (u32 h = 0; h < H; h++) top[h][0] = top[h][1] = -INFINITE;
    for (u32 index = begin; index < end; index++) {
        copy_async_wait<0>();
        block_barrier();  // this strip has come, and all are done with the one before it
        if (index + 1 < end) fetch(index + 1);
        Strip strip = strip_at<ROWS>(tile, index);
        if (first >= tile.end || (CAUSAL && strip.position > position)) continue;  // whole warps: no row sees a key
        float s[H][ROWS / 8][4] = {};
        multiply_rows<H, ROWS>(s, shared.q[0] + upper * PITCH, TILE * PITCH, shared.kv[index % 2][0]);
#pragma unroll
        for (u32 h = 0; h < H; h++) {
            scores<ROWS>(s[h], strip, position + lane / 4, p);
            soften<ROWS>(s[h], y[h], top[h], sum[h]);
        }
        multiply<H, ROWS, WIDE>(y, s, shared.kv[index % 2][1]);
    }
    if (first >= tile.end) return;
#pragma unroll
    for (u32 h = 0; h < H; h++) {
        float total[2] = {row_sum(sum[h][0]), row_sum(sum[h][1])}, factor[2] = {reciprocal(total[0]), reciprocal(total[1])};
        if (h >= have) continue;
        u64 row = static_cast<u64>(first) * heads + head + h;
        store_rows<WIDE>(p.o + row * HEAD_DIM, heads * HEAD_DIM, tile.end - first, HEAD_DIM, y[h], factor);
        for (u32 r = 0; r < 2; r++) {
            u32 below = lane / 4 + r * 8;
            if (lane % 4 == 0 && first + below < tile.end) p.lse[row + below * heads] = (top[h][r] + log2f(total[r])) * LN_2;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- backward

/// do·o of one row of one head, summed by the four lanes that share it; 0 for a row that is none.
DEVICE float row_delta(const bf16* d_o, const bf16* o, bool valid) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 4 * 8; valid && c < HEAD_DIM; c += 32) {
        bf16x8 x = *reinterpret_cast<const bf16x8*>(d_o + c), y = *reinterpret_cast<const bf16x8*>(o + c);
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum += to_float(x.v[i]) * to_float(y.v[i]);
    }
    return row_sum(sum);
}

struct AttentionBackwardParams {
    bf16* dqkv;
    float* planes;  // lse (in units of log2) and δ, (h, T) each; from `sums` on those of shared tiles
    const bf16* d_o;
    const bf16* o;
    const float* lse;
    const bf16* qkv;
    const u32* query_tiles;
    const u32* key_tiles;
    const u32* split_tiles;
    const u32* positions;
    u64 sums;
    u32 rows, heads, kv_heads, window;
    float scale, softcap;
};

// A block: one query tile, one query head; dq. It leaves lse and δ of its rows in `planes` for the blocks of dk and dv.
KERNEL __launch_bounds__(WARPS* WARP, QUERY_BLOCKS) attention_backward_queries(const AttentionBackwardParams p) {
    after_previous();
    constexpr u32 ROWS = BACKWARD_STRIP, THREADS = WARPS * WARP;
    BackwardShared& shared = shared_memory<BackwardShared>();
    u32 heads = p.heads, kv_heads = p.kv_heads;
    QueryTile tile = reinterpret_cast<const QueryTile*>(p.query_tiles)[blockIdx.x / heads];
    u32 head = blockIdx.x % heads, kv = head / (heads / kv_heads), stride = (heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* k = p.qkv + (heads + kv) * HEAD_DIM;
    auto fetch = [&](u32 index) { load_strip<ROWS>(shared.moving, tile, k, k + kv_heads * HEAD_DIM, stride, index); };
    load_rows<TILE, THREADS>(shared.still[0], p.qkv + head * HEAD_DIM, stride, tile.first, tile.end);
    load_rows<TILE, THREADS>(shared.still[1], p.d_o + head * HEAD_DIM, heads * HEAD_DIM, tile.first, tile.end);
    u32 begin = first_strip<ROWS>(tile, p.window), end = strips<ROWS>(tile, p.window);
    fetch(begin);

    u32 lane = threadIdx.x % WARP, upper = threadIdx.x / WARP * 16, first = tile.first + upper;
    int position = position_of(tile, first);
    float lse[2], delta[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 row = first + lane / 4 + r * 8;
        u64 at = static_cast<u64>(row) * heads + head;
        delta[r] = row_delta(p.d_o + at * HEAD_DIM, p.o + at * HEAD_DIM, row < tile.end);
        lse[r] = row < tile.end ? p.lse[at] * LOG2_E : 0.0f;
        if (lane % 4 != 0 || row >= tile.end) continue;
        p.planes[static_cast<u64>(head) * p.rows + row] = lse[r];
        p.planes[static_cast<u64>(heads + head) * p.rows + row] = delta[r];
    }
    float dq[1][WIDE / 8][4] = {};
    for (u32 index = begin; index < end; index++) {
        copy_async_wait<0>();
        block_barrier();
        if (index + 1 < end) fetch(index + 1);
        Strip strip = strip_at<ROWS>(tile, index);
        if (first >= tile.end || (CAUSAL && strip.position > position)) continue;
        float s[1][ROWS / 8][4] = {}, dp[1][ROWS / 8][4] = {};
        multiply_rows<1, ROWS>(s, shared.still[0] + upper * PITCH, 0, shared.moving[index % 2][0]);
        multiply_rows<1, ROWS>(dp, shared.still[1] + upper * PITCH, 0, shared.moving[index % 2][1]);
        scores<ROWS>(s[0], strip, position + lane / 4, p);
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                dp[0][n][i] = exp2_fast(s[0][n][i] - lse[i / 2]) * (dp[0][n][i] - delta[i / 2]) * slope(s[0][n][i], p.softcap);
            }
        }
        multiply<1, ROWS, WIDE>(dq, dp, shared.moving[index % 2][0]);
    }
    if (first >= tile.end) return;
    store_rows<WIDE>(p.dqkv + static_cast<u64>(first) * stride + head * HEAD_DIM, stride, tile.end - first, HEAD_DIM, dq[0],
                     {p.scale, p.scale});
}

constexpr u32 HALVES = WIDE > 128 ? 2 : 1;  // warps that share 16 keys, each with half of the columns of dk and dv
constexpr u32 PART = WIDE / HALVES;

/// Transposed scores and do·v (rows of keys, columns of rows) become p and ds; hidden ones 0. `key` is this lane's first, `last` the tile's last.
template <u32 ROWS>
DEVICE void gradients(float (&s)[ROWS / 8][4], float (&dp)[ROWS / 8][4], const AttentionBackwardParams& p, u32 head, u32 key,
                      u32 last, u32 first, u32 end) {
    u32 lane = threadIdx.x % WARP;
    const float* lse = p.planes + static_cast<u64>(head) * p.rows;
    const float* delta = p.planes + static_cast<u64>(p.heads + head) * p.rows;
#pragma unroll
    for (u32 n = 0; n < ROWS / 8; n++) {
#pragma unroll
        for (u32 c = 0; c < 2; c++) {
            u32 row = first + n * 8 + lane % 4 * 2 + c, inside = minimum(row, end - 1);
            float row_lse = lse[inside], row_delta = delta[inside];
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                bool seen = row < end && (!CAUSAL || key + r * 8 <= row);
                if (WINDOWED) {
                    u32 distance = p.positions[inside] - p.positions[minimum(key + r * 8, last)];
                    seen = seen && (CAUSAL ? distance < p.window : distance + p.window - 1 < 2 * p.window - 1);
                }
                float& x = s[n][2 * r + c];
                x = seen ? score(x, p.scale, p.softcap) : -INFINITE;
                float probability = exp2_fast(x - row_lse);
                dp[n][2 * r + c] = probability * (dp[n][2 * r + c] - row_delta) * slope(x, p.softcap);
                x = probability;
            }
        }
    }
}

/// A block's dk or dv in f32, rows HEAD_DIM apart.
DEVICE void store_sums(float* to, u32 rows, u32 columns, const float (&y)[PART / 8][4], float factor) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < PART / 2; i++) {
        u32 row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && column < columns) to[row * HEAD_DIM + column] = y[i / 4][i % 4] * factor;
    }
}

// A block: one key tile, or some of the rows that see it; one key/value head, with the query heads of its group; dk, dv.
// Where a tile has several blocks their sums go to `planes`, from `sums` on: (slot, key/value head, dk and dv, row, column).
KERNEL __launch_bounds__(HALVES* WARPS* WARP, KEY_BLOCKS)
attention_backward_keys(const AttentionBackwardParams p) {
    after_previous();
    constexpr u32 ROWS = BACKWARD_STRIP, THREADS = HALVES * WARPS * WARP;
    BackwardShared& shared = shared_memory<BackwardShared>();
    u32 heads = p.heads, kv_heads = p.kv_heads;
    KeyTile tile = reinterpret_cast<const KeyTile*>(p.key_tiles)[blockIdx.x / kv_heads];
    u32 kv = blockIdx.x % kv_heads, group = heads / kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;
    // In both directions a key's own rows see it from the segment's first on.
    u32 start = !CAUSAL && tile.row_start == tile.first ? tile.own_start : tile.row_start;
    u32 end = (tile.row_end - start + ROWS - 1) / ROWS * group;
    auto fetch = [&](u32 index) {
        u32 head = kv * group + index % group, first = start + index / group * ROWS;
        load_rows<ROWS, THREADS>(shared.moving[index % 2][0], p.qkv + head * HEAD_DIM, stride, first, tile.row_end);
        load_rows<ROWS, THREADS>(shared.moving[index % 2][1], p.d_o + head * HEAD_DIM, heads * HEAD_DIM, first, tile.row_end);
        copy_async_commit();
    };
    u32 k_at = (heads + kv) * HEAD_DIM, v_at = k_at + kv_heads * HEAD_DIM;
    load_rows<TILE, THREADS>(shared.still[0], p.qkv + k_at, stride, tile.first, tile.end);
    load_rows<TILE, THREADS>(shared.still[1], p.qkv + v_at, stride, tile.first, tile.end);
    fetch(0);

    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, upper = warp % WARPS * 16, column = warp / WARPS * PART;
    float dk[1][PART / 8][4] = {}, dv[1][PART / 8][4] = {};
    for (u32 index = 0; index < end; index++) {
        copy_async_wait<0>();
        block_barrier();
        if (index + 1 < end) fetch(index + 1);
        u32 head = kv * group + index % group, first = start + index / group * ROWS, key = tile.first + upper;
        if (key >= tile.end || (CAUSAL && first + ROWS <= key)) continue;
        float s[1][ROWS / 8][4] = {}, dp[1][ROWS / 8][4] = {};
        multiply_rows<1, ROWS>(s, shared.still[0] + upper * PITCH, 0, shared.moving[index % 2][0]);
        multiply_rows<1, ROWS>(dp, shared.still[1] + upper * PITCH, 0, shared.moving[index % 2][1]);
        gradients<ROWS>(s[0], dp[0], p, head, key + lane / 4, tile.end - 1, first, tile.row_end);
        multiply<1, ROWS, PART>(dv, s, shared.moving[index % 2][1] + column);
        multiply<1, ROWS, PART>(dk, dp, shared.moving[index % 2][0] + column);
    }
    u32 first = tile.first + upper;
    if (first >= tile.end) return;
    if (tile.slot == WHOLE) {
        bf16* to = p.dqkv + static_cast<u64>(first) * stride + column;
        store_rows<PART>(to + k_at, stride, tile.end - first, HEAD_DIM - column, dk[0], {p.scale, p.scale});
        store_rows<PART>(to + v_at, stride, tile.end - first, HEAD_DIM - column, dv[0], {1.0f, 1.0f});
    } else {
        float* to = p.planes + p.sums + (static_cast<u64>(tile.slot * kv_heads + kv) * 2 * TILE + upper) * HEAD_DIM + column;
        store_sums(to, tile.end - first, HEAD_DIM - column, dk[0], p.scale);
        store_sums(to + TILE * HEAD_DIM, tile.end - first, HEAD_DIM - column, dv[0], 1.0f);
    }
}

struct SplitTile {
    u32 first, end, slot, parts;
};

// A block: one key tile whose rows several blocks shared, one key/value head; their sums in order.
KERNEL __launch_bounds__(WARPS* WARP) attention_backward_sum(const AttentionBackwardParams p) {
    after_previous();
    u32 heads = p.heads, kv_heads = p.kv_heads;
    SplitTile tile = reinterpret_cast<const SplitTile*>(p.split_tiles)[blockIdx.x / kv_heads];
    u32 kv = blockIdx.x % kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;
    for (u32 i = threadIdx.x; i < 2 * TILE * HEAD_DIM; i += WARPS * WARP) {
        u32 row = tile.first + i / HEAD_DIM % TILE, which = i / (TILE * HEAD_DIM);
        if (row >= tile.end) continue;
        float sum = 0.0f;
        for (u32 part = 0; part < tile.parts; part++) {
            sum += p.planes[p.sums + static_cast<u64>((tile.slot + part) * kv_heads + kv) * 2 * TILE * HEAD_DIM + i];
        }
        p.dqkv[static_cast<u64>(row) * stride + (heads + which * kv_heads + kv) * HEAD_DIM + i % HEAD_DIM] = to_bf16(sum);
    }
}
