// RMSNorm. One warp owns one row; ROWS_PER_BLOCK comes from src/ops/norm/cuda.rs.
//   forward   y[t,c] = (w[c] + offset) * x[t,c] * rstd[t] (+ residual[t,c]),  rstd[t] = (mean_c x^2 + eps)^-1/2
//   backward  dx[t,c] += rstd * (g[c]*dy[t,c] - x[t,c] * rstd^2 * mean_k(g*dy*x)),  g = w + offset
// dx is accumulated: x is the residual stream, which other branches also feed. Rows lie `stride` apart, a multiple of 8,
// zeros past `cols`.
#include "device.cuh"

struct NormParams {
    const bf16* /*or null*/ residual;
    u32 rows, cols, stride;
    float eps, offset;
};

KERNEL __launch_bounds__(ROWS_PER_BLOCK* WARP)
norm_forward(bf16* y, float* rstd, const bf16* x, const bf16* w, const NormParams p) {
    after_previous();
    u32 stride = p.stride;
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // whole warps leave: the shuffles below stay legal
    const bf16x8* from = reinterpret_cast<const bf16x8*>(x + static_cast<u64>(row) * stride);
    float square = 0.0f;
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 part = from[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) square += to_float(part.v[j]) * to_float(part.v[j]);
    }
    float scale = rstd_of(warp_sum(square) / p.cols + p.eps);
    if (lane == 0) rstd[row] = scale;
    bf16x8* to = reinterpret_cast<bf16x8*>(y + static_cast<u64>(row) * stride);
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 part = from[i], gain = reinterpret_cast<const bf16x8*>(w)[i], more = {};
        if (p.residual) more = reinterpret_cast<const bf16x8*>(p.residual + static_cast<u64>(row) * stride)[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) part.v[j] = to_bf16((to_float(gain.v[j]) + p.offset) * to_float(part.v[j]) * scale + to_float(more.v[j]));
        to[i] = part;
    }
}

KERNEL __launch_bounds__(ROWS_PER_BLOCK* WARP)
norm_backward(bf16* dx, const bf16* dy, const bf16* x, const float* rstd, const bf16* w, const NormParams p) {
    after_previous();
    u32 stride = p.stride;
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= p.rows) return;
    u64 first = static_cast<u64>(row) * stride;
    const bf16x8* upper = reinterpret_cast<const bf16x8*>(dy + first);
    const bf16x8* input = reinterpret_cast<const bf16x8*>(x + first);
    const bf16x8* gains = reinterpret_cast<const bf16x8*>(w);
    float sum = 0.0f;
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 dys = upper[i], xs = input[i], gain = gains[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) sum += (to_float(gain.v[j]) + p.offset) * to_float(dys.v[j]) * to_float(xs.v[j]);
    }
    float scale = rstd[row];
    float projection = scale * scale * warp_sum(sum) / p.cols;
    bf16x8* to = reinterpret_cast<bf16x8*>(dx + first);
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 dys = upper[i], xs = input[i], gain = gains[i], old = to[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            float own = (to_float(gain.v[j]) + p.offset) * to_float(dys.v[j]) - to_float(xs.v[j]) * projection;
            old.v[j] = to_bf16(to_float(old.v[j]) + scale * own);
        }
        to[i] = old;
    }
}
