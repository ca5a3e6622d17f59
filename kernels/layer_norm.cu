// LayerNorm. One warp owns one row; ROWS_PER_BLOCK comes from src/ops/layer_norm/cuda.rs.
//   forward   y[t,c] = n[t,c] * w[c] + bias[c],  n = (x - mean[t]) * rstd[t],  rstd[t] = (mean_c (x - mean)^2 + eps)^-1/2
//   backward  dx[t,c] += rstd * (g[t,c] - mean_k g - n[t,c] * mean_k(g*n)),  g = w * dy
// dx is accumulated: x is the residual stream, which other branches also feed. The variance is summed from what is left after
// the mean is taken off, in a pass of its own over a row that by then lies in cache: mean x^2 - mean^2 would be the small
// difference of two large numbers where a row lies far from zero. Rows lie `stride` apart, a multiple of 8, zeros past `cols`:
// those are no part of a row's sums, and stay.
#include "device.cuh"

/// v = x - mean for the eight columns from `first` on; 0 past `cols`, where the padding would be taken for a value.
DEVICE void centre(float (&v)[8], const bf16x8& x, float mean, u32 first, u32 cols) {
#pragma unroll
    for (u32 j = 0; j < 8; j++) v[j] = first + j < cols ? to_float(x.v[j]) - mean : 0.0f;
}

struct LayerNormParams {
    u32 rows, cols, stride;
    float eps;
};

KERNEL __launch_bounds__(ROWS_PER_BLOCK* WARP)
layer_norm_forward(bf16* y, float* mean, float* rstd, const bf16* x, const bf16* w, const bf16* /*or null*/ bias,
                   const LayerNormParams p) {
    after_previous();
    u32 cols = p.cols, stride = p.stride;
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // whole warps leave: the shuffles below stay legal
    const bf16x8* from = reinterpret_cast<const bf16x8*>(x + static_cast<u64>(row) * stride);
    float sum = 0.0f, square = 0.0f;
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 part = from[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) sum += to_float(part.v[j]);
    }
    float middle = warp_sum(sum) / cols;
    for (u32 i = lane; i < stride / 8; i += WARP) {
        float v[8];
        centre(v, from[i], middle, i * 8, cols);
#pragma unroll
        for (u32 j = 0; j < 8; j++) square += v[j] * v[j];
    }
    float scale = rstd_of(warp_sum(square) / cols + p.eps);
    if (lane == 0) mean[row] = middle, rstd[row] = scale;
    bf16x8* to = reinterpret_cast<bf16x8*>(y + static_cast<u64>(row) * stride);
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 gain = reinterpret_cast<const bf16x8*>(w)[i], shift = {}, out;
        if (bias != nullptr) shift = reinterpret_cast<const bf16x8*>(bias)[i];
        float v[8];
        centre(v, from[i], middle, i * 8, cols);
#pragma unroll
        for (u32 j = 0; j < 8; j++) out.v[j] = to_bf16(v[j] * scale * to_float(gain.v[j]) + to_float(shift.v[j]));
        to[i] = out;
    }
}

KERNEL __launch_bounds__(ROWS_PER_BLOCK* WARP)
layer_norm_backward(bf16* dx, const bf16* dy, const bf16* x, const float* mean, const float* rstd, const bf16* w,
                    const LayerNormParams p) {
    after_previous();
    u32 cols = p.cols, stride = p.stride;
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= p.rows) return;
    u64 first = static_cast<u64>(row) * stride;
    const bf16x8* upper = reinterpret_cast<const bf16x8*>(dy + first);
    const bf16x8* input = reinterpret_cast<const bf16x8*>(x + first);
    const bf16x8* gains = reinterpret_cast<const bf16x8*>(w);
    float middle = mean[row], scale = rstd[row], plain = 0.0f, along = 0.0f, v[8];
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 dys = upper[i], gain = gains[i];
        centre(v, input[i], middle, i * 8, cols);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            float g = to_float(gain.v[j]) * to_float(dys.v[j]);
            plain += g;
            along += g * v[j];
        }
    }
    float mean_g = warp_sum(plain) / cols;
    float projection = scale * scale * warp_sum(along) / cols;
    bf16x8* to = reinterpret_cast<bf16x8*>(dx + first);
    for (u32 i = lane; i < stride / 8; i += WARP) {
        bf16x8 dys = upper[i], gain = gains[i], old = to[i];
        centre(v, input[i], middle, i * 8, cols);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            float own = to_float(gain.v[j]) * to_float(dys.v[j]) - mean_g - v[j] * projection;
            if (i * 8 + j < cols) old.v[j] = to_bf16(to_float(old.v[j]) + scale * own);
        }
        to[i] = old;
    }
}
