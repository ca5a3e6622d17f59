// What follows the product of q, k and v: the norm of each head of q and k where the family has it (Qwen3), then the rotation,
// both in place. One warp owns one head of one row; a lane owns pairs (i, i + half). HEADS_PER_BLOCK comes from src/ops/qkv/cuda.rs.
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

DEVICE float dot(const Pair& p, const Pair& q) {
    return p.a[0] * q.a[0] + p.a[1] * q.a[1] + p.b[0] * q.b[0] + p.b[1] * q.b[1];
}

DEVICE float head_rstd(const bf16* x, u32 lane, u32 half, float eps) {
    float square = 0.0f;
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair p = load_pair(x, i, half);
        square += dot(p, p);
    }
    return rsqrtf(warp_sum(square) / (2 * half) + eps);
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_forward(bf16* qkv, bf16* /*or null*/ raw, const u32* positions, const float* cosine, const float* sine,
               const bf16* /*or null*/ q_norm, const bf16* /*or null*/ k_norm, u32 rows, u32 heads, u32 kv_heads, u32 half,
               u32 stride, u32 raw_stride, float eps, float offset) {
    u32 warp = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 row = warp / (heads + kv_heads), head = warp % (heads + kv_heads);
    if (row >= rows) return;  // whole warps leave: the sums stay legal
    bf16* x = qkv + static_cast<u64>(row) * stride + head * 2 * half;
    const bf16* w = head < heads ? q_norm : k_norm;
    float scale = w ? head_rstd(x, lane, half, eps) : 1.0f;
    u64 angle = static_cast<u64>(positions[row]) * half;
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair p = load_pair(x, i, half);
        if (w) {
            store_pair(raw + static_cast<u64>(row) * raw_stride + head * 2 * half, i, half, p);
            p = gained(p, w, i, half, offset);
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                p.a[j] *= scale;
                p.b[j] *= scale;
            }
        }
        store_pair(x, i, half, rotated(p, cosine + angle + i, sine + angle + i, 1.0f));
    }
}

KERNEL __launch_bounds__(HEADS_PER_BLOCK* WARP)
rotate_backward(bf16* dqkv, const bf16* /*or null*/ raw, const u32* positions, const float* cosine, const float* sine,
                const bf16* /*or null*/ q_norm, const bf16* /*or null*/ k_norm, u32 rows, u32 heads, u32 kv_heads, u32 half,
                u32 stride, u32 raw_stride, float eps, float offset) {
    u32 warp = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 row = warp / (heads + kv_heads), head = warp % (heads + kv_heads);
    if (row >= rows) return;
    bf16* dy = dqkv + static_cast<u64>(row) * stride + head * 2 * half;
    const bf16* w = head < heads ? q_norm : k_norm;
    const bf16* x = w ? raw + static_cast<u64>(row) * raw_stride + head * 2 * half : dy;
    u64 angle = static_cast<u64>(positions[row]) * half;
    float scale = 1.0f, pull = 0.0f;
    if (w) {
        scale = head_rstd(x, lane, half, eps);
        float sum = 0.0f;
        for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
            Pair d = rotated(load_pair(dy, i, half), cosine + angle + i, sine + angle + i, -1.0f);
            sum += dot(gained(d, w, i, half, offset), load_pair(x, i, half));
        }
        pull = scale * scale * warp_sum(sum) / (2 * half);
    }
    for (u32 i = 2 * lane; i < half; i += 2 * WARP) {
        Pair d = rotated(load_pair(dy, i, half), cosine + angle + i, sine + angle + i, -1.0f);
        if (w) {
            Pair own = gained(d, w, i, half, offset), input = load_pair(x, i, half);
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                d.a[j] = scale * (own.a[j] - input.a[j] * pull);
                d.b[j] = scale * (own.b[j] - input.b[j] * pull);
            }
        }
        store_pair(dy, i, half, d);
    }
}
