// Rows by index. A block owns one row at a time of `cols` columns; rows lie `stride` apart, a multiple of 8, zeros behind
// `cols`; THREADS comes from src/ops/rows/cuda.rs.
//   embed, gather  y[i,c] = scale * x[rows[i],c]
//   embed_add      y[i,c] += x[rows[i],c]
//   scatter        dx[rows[i],c] = dy[i,c]; the caller has cleared dx, and no row is named twice
//   scale_rows     y[i,c] *= weights[i]
#include "device.cuh"

KERNEL __launch_bounds__(THREADS) gather(bf16* y, const bf16* x, const u32* rows, u32 stride, float scale) {
    after_previous();
    const bf16x8* from = reinterpret_cast<const bf16x8*>(x + static_cast<u64>(rows[blockIdx.x]) * stride);
    bf16x8* to = reinterpret_cast<bf16x8*>(y + static_cast<u64>(blockIdx.x) * stride);
    for (u32 i = threadIdx.x; i < stride / 8; i += THREADS) {
        bf16x8 part = from[i];
        if (scale != 1.0f) {
#pragma unroll
            for (u32 j = 0; j < 8; j++) part.v[j] = to_bf16(to_float(part.v[j]) * scale);
        }
        to[i] = part;
    }
}

KERNEL __launch_bounds__(THREADS) gather_add(bf16* y, const bf16* x, const u32* rows, u32 stride) {
    after_previous();
    const bf16x8* from = reinterpret_cast<const bf16x8*>(x + static_cast<u64>(rows[blockIdx.x]) * stride);
    bf16x8* to = reinterpret_cast<bf16x8*>(y + static_cast<u64>(blockIdx.x) * stride);
    for (u32 i = threadIdx.x; i < stride / 8; i += THREADS) {
        bf16x8 part = to[i], more = from[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) part.v[j] = to_bf16(to_float(part.v[j]) + to_float(more.v[j]));
        to[i] = part;
    }
}

KERNEL __launch_bounds__(THREADS) scatter(bf16* dx, const bf16* dy, const u32* rows, u32 stride) {
    after_previous();
    const bf16x8* from = reinterpret_cast<const bf16x8*>(dy + static_cast<u64>(blockIdx.x) * stride);
    bf16x8* to = reinterpret_cast<bf16x8*>(dx + static_cast<u64>(rows[blockIdx.x]) * stride);
    for (u32 i = threadIdx.x; i < stride / 8; i += THREADS) to[i] = from[i];
}

KERNEL __launch_bounds__(THREADS) scale_rows(bf16* y, const float* weights, u32 stride) {
    after_previous();
    bf16x8* row = reinterpret_cast<bf16x8*>(y + static_cast<u64>(blockIdx.x) * stride);
    float weight = weights[blockIdx.x];
    for (u32 i = threadIdx.x; i < stride / 8; i += THREADS) {
        bf16x8 part = row[i];
#pragma unroll
        for (u32 j = 0; j < 8; j++) part.v[j] = to_bf16(to_float(part.v[j]) * weight);
        row[i] = part;
    }
}
