// What follows the product of q, k and v: the norm of each head of q and k where the family has it (Qwen3), then the rotation,
// both in place. One warp owns one head of one row; a lane owns pairs (i, i + half). Where the norm is of all of q and of all of k (OLMo 2),
// one block owns a row, its warps the heads in turn. HEADS_PER_BLOCK comes from src/ops/qkv/cuda.rs.
//   forward   n = w * x * rstd, rstd = (mean x^2 + eps)^-1/2  (n = x without a norm; raw keeps x)
//             (x_i, x_i+half) <- (n_i cos - n_i+half sin, n_i+half cos + n_i sin)
//   backward  d = the rotation by the negative angle of dy;  dx = rstd * (w*d - x * rstd^2 * mean(w*d*x))
#include "device.cuh"

struct Pair {
    float a[2], b[2];  // two neighbours of each half
};

DEVICE Pair load_pair(const bf16* head, u32 i, u32 half) {
    u32 a = *reinterpret_cast<const u32*>(head + i), b = *reinterpret_cast<const u32*>(head + half + i);
    return {{low_float(a), high_float(a)}, {low_float(b), high_float(b)}};
}

DEVICE void store_pair(bf16* head, u32 i, u32 half, const Pair& p) {
    *reinterpret_cast<u32*>(head + i) = to_bf16x2(p.a[0], p.a[1]);
    *reinterpret_cast<u32*>(head + half + i) = to_bf16x2(p.b[0], p.b[1]);
}

DEVICE Pair rotated(const Pair& p, const float* cosine, const float* sine, float sign) {
    Pair r;
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        float c = cosine[j], s = sine[j] * sign;
        r.a[j] = p.a[j] * c - p.b[j] * s;
        r.b[j] = p.b[j] * c + p.a[j] * s;
    }
    return r;
}

DEVICE Pair gained(const Pair& p, const bf16* w, u32 i, u32 half, float offset) {
    Pair g = load_pair(w, i, half);
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        g.a[j] = (g.a[j] + offset) * p.a[j];
        g.b[j] = (g.b[j] + offset) * p.b[j];
    }
    return g;
}

DEVICE Pair scaled(const Pair& p, float scale) {
    return {{p.a[0] * scale, p.a[1] * scale}, {p.b[0] * scale, p.b[1] * scale}};
}

/// The gradient of a norm's input x, from g = w * dy.
DEVICE Pair unnormed(const Pair& g, const Pair& x, float scale, float projection) {
    Pair d;
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        d.a[j] = scale * (g.a[j] - x.a[j] * projection);
        d.b[j] = scale * (g.b[j] - x.b[j] * projection);
    }
    return d;
}

DEVICE float dot(const Pair& p, const Pair& q) {
    return p.a[0] * q.a[0] + p.a[1] * q.a[1] + p.b[0] * q.b[0] + p.b[1] * q.b[1];
}

DEVICE float head_rstd(const bf16* x, u32 lane, u32 half, float eps) {
    float square = 0.0f;
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair p = load_pair(x, i, half);
        square += dot(p, p);
    }
    return rstd_of(warp_sum(square) / (2 * half) + eps);
}

struct RotationParams {
    const u32* positions;
    const float* cosine;
    const float* sine;
    const bf16* /*or null*/ q_norm;
    const bf16* /*or null*/ k_norm;
    u32 rows, heads, kv_heads, half, stride, raw_stride;
    float eps, offset;
};

/// What a warp works on.
struct Head {
    u32 row, column;
    const bf16* w;  // null without a norm
    const float *cosine, *sine;
};

/// This warp's head; row `rows` or beyond for one that has none.
DEVICE Head own_head(const RotationParams& p) {
    u32 warp = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / WARP;
    u32 row = warp / (p.heads + p.kv_heads), head = warp % (p.heads + p.kv_heads);
    u64 angle = row < p.rows ? static_cast<u64>(p.positions[row]) * p.half : 0;
    return {row, head * 2 * p.half, head < p.heads ? p.q_norm : p.k_norm, p.cosine + angle, p.sine + angle};
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_forward(bf16* qkv, bf16* /*or null*/ raw, const RotationParams p) {
    after_previous();
    u32 lane = threadIdx.x % WARP, half = p.half;
    Head own = own_head(p);
    if (own.row >= p.rows) return;  // whole warps leave: the sums stay legal
    bf16* x = qkv + static_cast<u64>(own.row) * p.stride + own.column;
    float scale = own.w ? head_rstd(x, lane, half, p.eps) : 1.0f;
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair pair = load_pair(x, i, half);
        if (own.w) {
            store_pair(raw + static_cast<u64>(own.row) * p.raw_stride + own.column, i, half, pair);
            pair = scaled(gained(pair, own.w, i, half, p.offset), scale);
        }
        store_pair(x, i, half, rotated(pair, own.cosine + i, own.sine + i, 1.0f));
    }
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_backward(bf16* dqkv, const bf16* /*or null*/ raw, const RotationParams p) {
    after_previous();
    u32 lane = threadIdx.x % WARP, half = p.half;
    Head own = own_head(p);
    if (own.row >= p.rows) return;
    bf16* dy = dqkv + static_cast<u64>(own.row) * p.stride + own.column;
    const bf16* x = own.w ? raw + static_cast<u64>(own.row) * p.raw_stride + own.column : dy;
    float scale = 1.0f, projection = 0.0f;
    if (own.w) {
        scale = head_rstd(x, lane, half, p.eps);
        float sum = 0.0f;
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair d = rotated(load_pair(dy, i, half), own.cosine + i, own.sine + i, -1.0f);
            sum += dot(gained(d, own.w, i, half, p.offset), load_pair(x, i, half));
        }
        projection = scale * scale * warp_sum(sum) / (2 * half);
    }
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair d = rotated(load_pair(dy, i, half), own.cosine + i, own.sine + i, -1.0f);
        if (own.w) {
            d = unnormed(gained(d, own.w, i, half, p.offset), load_pair(x, i, half), scale, projection);
        }
        store_pair(dy, i, half, d);
    }
}

struct Shared {
    float sums[HEADS_PER_BLOCK];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as src/ops/qkv/cuda.rs says");

/// Sums over this block's row: of q, of k.
struct Both {
    float q, k;
};

DEVICE Both row_sums(Both own) {
    Shared& shared = shared_memory<Shared>();
    float q = block_sum<HEADS_PER_BLOCK>(own.q, shared.sums);
    return {q, block_sum<HEADS_PER_BLOCK>(own.k, shared.sums)};
}

/// What a warp reads for one head of the block's row: its columns, its gains.
DEVICE Head wide_head(const RotationParams& p, u32 head) {
    u32 width = 2 * p.half;
    const bf16* w = head < p.heads ? p.q_norm + head * width : p.k_norm + (head - p.heads) * width;
    u64 angle = static_cast<u64>(p.positions[blockIdx.x]) * p.half;
    return {blockIdx.x, head * width, w, p.cosine + angle, p.sine + angle};
}

/// rstd of all of q, of all of k.
DEVICE Both wide_rstd(const RotationParams& p, const bf16* x) {
    u32 lane = threadIdx.x % WARP, half = p.half;
    Both square = {0.0f, 0.0f};
    for (u32 head = threadIdx.x / WARP; head < p.heads + p.kv_heads; head += HEADS_PER_BLOCK) {
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair pair = load_pair(x + head * 2 * half, i, half);
            (head < p.heads ? square.q : square.k) += dot(pair, pair);
        }
    }
    square = row_sums(square);
    return {rstd_of(square.q / (2 * half * p.heads) + p.eps), rstd_of(square.k / (2 * half * p.kv_heads) + p.eps)};
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_wide_forward(bf16* qkv, bf16* raw, const RotationParams p) {
    after_previous();
    u32 lane = threadIdx.x % WARP, half = p.half;
    bf16* row = qkv + static_cast<u64>(blockIdx.x) * p.stride;
    Both rstd = wide_rstd(p, row);  // its barriers: all has been read before anything is written
    for (u32 head = threadIdx.x / WARP; head < p.heads + p.kv_heads; head += HEADS_PER_BLOCK) {
        Head own = wide_head(p, head);
        float scale = head < p.heads ? rstd.q : rstd.k;
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair pair = load_pair(row + own.column, i, half);
            store_pair(raw + static_cast<u64>(own.row) * p.raw_stride + own.column, i, half, pair);
            pair = scaled(gained(pair, own.w, i, half, p.offset), scale);
            store_pair(row + own.column, i, half, rotated(pair, own.cosine + i, own.sine + i, 1.0f));
        }
    }
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_wide_backward(bf16* dqkv, const bf16* raw, const RotationParams p) {
    after_previous();
    u32 lane = threadIdx.x % WARP, half = p.half;
    bf16* dy = dqkv + static_cast<u64>(blockIdx.x) * p.stride;
    const bf16* x = raw + static_cast<u64>(blockIdx.x) * p.raw_stride;
    Both rstd = wide_rstd(p, x), sum = {0.0f, 0.0f};
    for (u32 head = threadIdx.x / WARP; head < p.heads + p.kv_heads; head += HEADS_PER_BLOCK) {
        Head own = wide_head(p, head);
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair d = rotated(load_pair(dy + own.column, i, half), own.cosine + i, own.sine + i, -1.0f);
            (head < p.heads ? sum.q : sum.k) += dot(gained(d, own.w, i, half, p.offset), load_pair(x + own.column, i, half));
        }
    }
    sum = row_sums(sum);
    for (u32 head = threadIdx.x / WARP; head < p.heads + p.kv_heads; head += HEADS_PER_BLOCK) {
        Head own = wide_head(p, head);
        bool q = head < p.heads;
        float scale = q ? rstd.q : rstd.k;
        float projection = scale * scale * (q ? sum.q / (2 * half * p.heads) : sum.k / (2 * half * p.kv_heads));
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair d = rotated(load_pair(dy + own.column, i, half), own.cosine + i, own.sine + i, -1.0f);
            d = unnormed(gained(d, own.w, i, half, p.offset), load_pair(x + own.column, i, half), scale, projection);
            store_pair(dy + own.column, i, half, d);
        }
    }
}
