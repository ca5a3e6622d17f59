// The score head in f32. h rows lie `stride` apart, w and dw rows `cols`; THREADS comes from src/ops/score_head/cuda.rs.
//   forward   r[s,l] = sum_c h[s,c] * w[l,c]; one warp owns one (s, l)
//   backward  dh[s,c] = sum_l dr[s,l] * w[l,c]; one block owns one row
//             dw[l,c] += sum_s dr[s,l] * h[s,c]; one thread owns one (l, c) and goes through the rows in order
#include "device.cuh"

KERNEL __launch_bounds__(THREADS)
score_forward(float* r, const bf16* h, const float* w, u32 rows, u32 labels, u32 cols, u32 stride) {
    after_previous();
    u32 warp = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (warp >= rows * labels) return;  // whole warps leave: the sum stays legal
    const bf16* x = h + static_cast<u64>(warp / labels) * stride;
    const float* weights = w + static_cast<u64>(warp % labels) * cols;
    float sum = 0.0f;
    for (u32 c = lane; c < cols; c += WARP) sum += to_float(x[c]) * weights[c];
    sum = warp_sum(sum);
    if (lane == 0) r[warp] = sum;
}

KERNEL __launch_bounds__(THREADS)
score_backward(bf16* dh, const float* dr, const float* w, u32 labels, u32 cols, u32 stride) {
    after_previous();
    for (u32 c = threadIdx.x; c < cols; c += THREADS) {
        float sum = 0.0f;
        for (u32 l = 0; l < labels; l++) sum += w[static_cast<u64>(l) * cols + c] * dr[blockIdx.x * labels + l];
        dh[static_cast<u64>(blockIdx.x) * stride + c] = to_bf16(sum);
    }
}

KERNEL __launch_bounds__(THREADS)
score_weights(float* dw, const float* dr, const bf16* h, u32 rows, u32 labels, u32 cols, u32 stride) {
    after_previous();
    u32 index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= labels * cols) return;
    u32 l = index / cols, c = index % cols;
    float sum = 0.0f;
    for (u32 s = 0; s < rows; s++) sum += dr[s * labels + l] * to_float(h[static_cast<u64>(s) * stride + c]);
    dw[index] += sum;
}
