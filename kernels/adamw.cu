// AdamW over all parameters of a model at once. A table holds one entry per parameter (struct Entry, written by
// src/ops/adamw/cuda.rs); a block owns CHUNK neighbouring values of one parameter.
//   g <- g * min(1, clip / |g|);  m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*g^2
//   x <- x - lr * (m*c1 / (sqrt(v*c2) + eps) + decay*x);  operand <- x * factor
// The norm comes from one partial sum per block, added in order by one block; when it is not finite nothing is updated.
#include "device.cuh"

struct Entry {
    u64 master, m, v, grad, operand;  // addresses; operand 0: none
    u32 first_block, len, cols, operand_stride;
    float factor;
    u32 unused;
};

struct Shared {
    float sums[THREADS / WARP];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as src/ops/adamw/cuda.rs says");

/// The parameter that this block works on: the last whose first block is not past it.
DEVICE const Entry& own_entry(const u32* table, u32 entries) {
    const Entry* all = reinterpret_cast<const Entry*>(table);
    u32 low = 0, high = entries;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (all[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    return all[low];
}

KERNEL __launch_bounds__(THREADS) gradient_squares(float* partial, const u32* table, u32 entries) {
    after_previous();
    const Entry& entry = own_entry(table, entries);
    const float* grad = reinterpret_cast<const float*>(entry.grad);
    u32 first = (blockIdx.x - entry.first_block) * CHUNK, last = minimum(first + CHUNK, entry.len);
    float sum = 0.0f;
    for (u32 i = first + threadIdx.x; i < last; i += THREADS) sum += grad[i] * grad[i];
    sum = block_sum<THREADS / WARP>(sum, shared_memory<Shared>().sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL __launch_bounds__(WARP) gradient_norm(float* norm, const float* partial, u32 blocks) {
    after_previous();
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < blocks; i += WARP) sum += partial[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrtf(sum);
}

struct AdamWParams {
    float lr, beta1, beta2, eps, decay, clip;
    float correct1, correct2;  // 1 / (1 - beta^step)
};

KERNEL __launch_bounds__(THREADS)
adamw(const u32* table, const float* norm, u32 entries, const AdamWParams p) {
    after_previous();
    float total = norm[0];
    if (!(total < INFINITE)) return;  // NaN too
    float factor = total > p.clip ? p.clip / total : 1.0f;
    const Entry& entry = own_entry(table, entries);
    float* master = reinterpret_cast<float*>(entry.master);
    float* m = reinterpret_cast<float*>(entry.m);
    float* v = reinterpret_cast<float*>(entry.v);
    const float* grad = reinterpret_cast<const float*>(entry.grad);
    bf16* operand = reinterpret_cast<bf16*>(entry.operand);
    u32 first = (blockIdx.x - entry.first_block) * CHUNK, last = minimum(first + CHUNK, entry.len);
    for (u32 i = first + threadIdx.x; i < last; i += THREADS) {
        float g = grad[i] * factor;
        float mean = p.beta1 * m[i] + (1.0f - p.beta1) * g;
        float square = p.beta2 * v[i] + (1.0f - p.beta2) * g * g;
        float value = master[i];
        float step = mean * p.correct1 / (sqrtf(square * p.correct2) + p.eps);
        value -= p.lr * (step + p.decay * value);
        m[i] = mean;
        v[i] = square;
        master[i] = value;
        if (operand) operand[static_cast<u64>(i / entry.cols) * entry.operand_stride + i % entry.cols] = to_bf16(value * entry.factor);
    }
}

KERNEL __launch_bounds__(THREADS) write_operand(bf16* operand, const float* master, u32 len, u32 cols, u32 stride, float factor) {
    after_previous();
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < len) operand[static_cast<u64>(i / cols) * stride + i % cols] = to_bf16(master[i] * factor);
}
