// One new token per sequence: its key and value join the cache, its query reads the cache up to its position.
//   append   k[slot, kv, position] = the row's key, v likewise
//   attend   o = softmax(scale·q·kᵀ)·v over the positions max(0, p − window + 1)..=p
// o is overwritten. Keys and values lie (slot, key/value head, position, channel). The cache is cut every SPLIT positions and
// by nothing else, so a row's bits do not depend on how many rows there are: a block owns (row, key/value head, up to 16 of
// its query heads, SPLIT positions), its warps take strips of 16 keys in turn; their sums are added in order, then those of
// the splits by a second kernel. Grids cover the whole cache, blocks past a row's position leave at once: a captured launch
// serves every position. Rows that continue one prompt hold the same keys and values: all read the first row's, so that
// these come from memory once, and of a split that lies within the prompt a block reads them for as many rows as their query
// heads fill a product.
#include "attention.cuh"

constexpr u32 WARPS = DECODE_WARPS;
constexpr u32 STRIP = 16;  // keys of a strip, and rows of a product: query heads

struct Shared {
    bf16 q[STRIP * PITCH];
    union {
        bf16 kv[WARPS][2][2][STRIP * PITCH];  // stage; keys, values
        float y[WARPS][STRIP][WIDE];          // each warp's sums, when all strips are done
    };
    float top[WARPS][STRIP], sum[WARPS][STRIP];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "src/ops/decode/cuda.rs asks for it");

/// Positions first..end that a row at `position` sees.
struct Sight {
    u32 first, end;
};

DEVICE Sight sight(u32 position, u32 length, u32 window) {
    u32 end = minimum(position + 1, length);  // a position past the end of the cache was not appended either
    return {end > window ? end - window : 0, end};
}

struct DecodeParams {
    const u32* slots;
    const u32* positions;
    const u32* leads;   // of each row the first one that continues the same prompt
    const u32* common;  // and how many positions they have in common
    u32 rows, heads, kv_heads, length, window;
    float scale, softcap;
};

// A thread: 16 bytes of a key or value.
KERNEL __launch_bounds__(WARPS* WARP)
cache_append(bf16* k, bf16* v, const bf16* qkv, const DecodeParams p) {
    after_previous();
    u32 heads = p.heads, kv_heads = p.kv_heads, length = p.length;
    u32 chunks = kv_heads * HEAD_DIM / 8, chunk = blockIdx.x * WARPS * WARP + threadIdx.x, row = chunk / (2 * chunks);
    if (row >= p.rows || p.positions[row] >= length) return;
    bool value = chunk / chunks % 2 == 1;
    u32 at = chunk % chunks * 8, kv = at / HEAD_DIM;
    const bf16* from = qkv + static_cast<u64>(row) * (heads + 2 * kv_heads) * HEAD_DIM + (heads + (value ? kv_heads : 0)) * HEAD_DIM + at;
    u64 place = static_cast<u64>(p.slots[row] * kv_heads + kv) * length + p.positions[row];
    bf16* to = (value ? v : k) + place * HEAD_DIM + at % HEAD_DIM;
    *reinterpret_cast<bf16x8*>(to) = *reinterpret_cast<const bf16x8*>(from);
}

/// The queries of a block: heads first..first + group of one row after the other, `have` in all.
struct Queries {
    u32 row, first, group, have;
};

/// Where the i-th of them lies in rows of so many heads.
DEVICE u64 place(const Queries queries, u32 i, u32 heads) {
    return static_cast<u64>(queries.row + i / queries.group) * heads + queries.first + i % queries.group;
}

/// Leaves the block's sums, brought to one maximum, in `partial`: columns, then maximum and sum after all columns.
DEVICE void store_partial(float* partial, const Shared& shared, const Queries queries, u32 heads, u32 split, u32 splits, u64 total) {
    for (u32 i = threadIdx.x; i < queries.have * HEAD_DIM; i += WARPS * WARP) {
        u32 query = i / HEAD_DIM, column = i % HEAD_DIM;
        float top = shared.top[0][query], sum = 0.0f, y = 0.0f;
#pragma unroll
        for (u32 w = 1; w < WARPS; w++) top = maximum(top, shared.top[w][query]);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            float factor = exp2_fast(shared.top[w][query] - top);
            sum += shared.sum[w][query] * factor;
            y += shared.y[w][query][column] * factor;
        }
        u64 at = place(queries, query, heads) * splits + split;
        partial[at * HEAD_DIM + column] = y;
        if (column == 0) {
            partial[total * HEAD_DIM + 2 * at] = top;
            partial[total * HEAD_DIM + 2 * at + 1] = sum;
        }
    }
}

KERNEL __launch_bounds__(WARPS* WARP)
decode_attention(float* partial, const bf16* qkv, const bf16* k, const bf16* v, const DecodeParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    u32 heads = p.heads, kv_heads = p.kv_heads, length = p.length;
    u32 splits = (length + SPLIT - 1) / SPLIT, group = heads / kv_heads, parts = (group + STRIP - 1) / STRIP;
    u32 split = blockIdx.x % splits, part = blockIdx.x / splits % parts, kv = blockIdx.x / (splits * parts) % kv_heads;
    u32 row = blockIdx.x / (splits * parts * kv_heads), head = kv * group + part * STRIP;
    Sight seen = sight(p.positions[row], length, p.window);
    if (split * SPLIT >= seen.end || (split + 1) * SPLIT <= seen.first) return;  // the whole block
    Queries queries = {row, head, group, minimum(STRIP, group - part * STRIP)};
    u32 lead = p.leads[row], common = p.common[row];
    if (parts == 1 && (split + 1) * SPLIT <= common) {
        u32 most = STRIP / group, rows = 1;
        if ((row - lead) % most != 0) return;  // another block does it
        while (rows < most && row + rows < p.rows && p.leads[row + rows] == lead) rows++;
        queries.have = rows * group;
    }

    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 end = minimum((split + 1) * SPLIT, seen.end), strip = split * SPLIT + warp * STRIP;
    u32 own = p.slots[row], leads_slot = p.slots[lead];
    auto fetch = [&](u32 stage, u32 first) {
        u32 slot = first + STRIP <= common ? leads_slot : own;
        u64 cache = static_cast<u64>(slot * kv_heads + kv) * length * HEAD_DIM;
        load_rows<STRIP, WARP>(shared.kv[warp][stage][0], k + cache, HEAD_DIM, first, end);
        load_rows<STRIP, WARP>(shared.kv[warp][stage][1], v + cache, HEAD_DIM, first, end);
        copy_async_commit();
    };
    for (u32 i = threadIdx.x; i < STRIP * (WIDE / 8); i += WARPS * WARP) {
        u32 query = i / (WIDE / 8), column = i % (WIDE / 8) * 8;
        bool valid = query < queries.have && column < HEAD_DIM;
        const bf16* from = valid ? qkv + place(queries, query, heads + 2 * kv_heads) * HEAD_DIM + column : qkv;
        copy_async_16(shared.q + query * PITCH + column, from, valid);
    }
    fetch(0, strip);
    copy_async_wait<0>();
    block_barrier();

    float y[1][WIDE / 8][4] = {}, top[2] = {-INFINITE, -INFINITE}, sum[2] = {};
    for (u32 stage = 0; strip < end; stage ^= 1, strip += WARPS * STRIP) {
        copy_async_wait<0>();
        warp_barrier();  // each warp has its own strips: they have come, and its lanes are done with those before
        if (strip + WARPS * STRIP < end) fetch(stage ^ 1, strip + WARPS * STRIP);
        float s[1][STRIP / 8][4] = {};
        multiply_rows<1, STRIP>(s, shared.q, 0, shared.kv[warp][stage][0]);
#pragma unroll
        for (u32 i = 0; i < STRIP / 2; i++) {
            u32 key = strip + i / 4 * 8 + lane % 4 * 2 + i % 2;
            float& x = s[0][i / 4][i % 4];
            x = key >= seen.first && key < end ? score(x, p.scale, p.softcap) : -INFINITE;
        }
        soften<STRIP>(s[0], y[0], top, sum);
        multiply<1, STRIP, WIDE>(y, s, shared.kv[warp][stage][1]);
    }
    block_barrier();  // the strips' place is free
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 below = lane / 4 + r * 8;
        float total = row_sum(sum[r]);
        if (lane % 4 == 0) {
            shared.top[warp][below] = top[r];
            shared.sum[warp][below] = total;
        }
#pragma unroll
        for (u32 i = 0; i < WIDE / 4; i++) shared.y[warp][below][i / 2 * 8 + lane % 4 * 2 + i % 2] = y[0][i / 2][2 * r + i % 2];
    }
    block_barrier();
    store_partial(partial, shared, queries, heads, split, splits, static_cast<u64>(p.rows) * heads * splits);
}

// A warp: one row of one query head; the splits that it sees, in order.
KERNEL __launch_bounds__(WARPS* WARP)
decode_combine(bf16* o, const float* partial, const DecodeParams p) {
    after_previous();
    u32 heads = p.heads, index = blockIdx.x * WARPS + threadIdx.x / WARP, splits = (p.length + SPLIT - 1) / SPLIT;
    if (index >= p.rows * heads) return;
    Sight seen = sight(p.positions[index / heads], p.length, p.window);
    u64 first = static_cast<u64>(index) * splits;
    const float* tops = partial + (static_cast<u64>(p.rows) * heads * splits * HEAD_DIM + 2 * first);
    float top = -INFINITE, sum = 0.0f;
    u32 begin = seen.first / SPLIT, end = (seen.end + SPLIT - 1) / SPLIT;
    for (u32 s = begin; s < end; s++) top = maximum(top, tops[2 * s]);
    for (u32 s = begin; s < end; s++) sum += tops[2 * s + 1] * exp2_fast(tops[2 * s] - top);
    for (u32 column = threadIdx.x % WARP; column < HEAD_DIM; column += WARP) {
        float y = 0.0f;
        for (u32 s = begin; s < end; s++) y += partial[(first + s) * HEAD_DIM + column] * exp2_fast(tops[2 * s] - top);
        o[static_cast<u64>(index) * HEAD_DIM + column] = to_bf16(y * reciprocal(sum));
    }
}
