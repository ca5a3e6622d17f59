// SwiGLU behind the product (gate | up): act[t,f] = g * sigmoid(g) * u. One thread owns VECTOR neighbours of one row; VECTOR is
// 8 where f is a multiple of it, else 1; THREADS and VECTOR come from src/ops/gate_up/cuda.rs. gate_up rows lie 2f apart (padded).
//   backward, in place: dg = dact * u * (s + g*s*(1 - s)), du = dact * g*s, s = sigmoid(g)
#include "device.cuh"

struct alignas(2 * VECTOR) Values {
    bf16 v[VECTOR];
};

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-x * LOG2_E)); }

KERNEL __launch_bounds__(THREADS)
silu_forward(bf16* act, const bf16* gate_up, u32 rows, u32 f, u32 act_stride, u32 stride) {
    u64 index = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x;
    u32 width = f / VECTOR, row = index / width, at = index % width * VECTOR;
    if (row >= rows) return;
    const bf16* from = gate_up + static_cast<u64>(row) * stride + at;
    Values gate = *reinterpret_cast<const Values*>(from), up = *reinterpret_cast<const Values*>(from + f), out;
#pragma unroll
    for (u32 j = 0; j < VECTOR; j++) {
        float g = to_float(gate.v[j]);
        out.v[j] = to_bf16(g * sigmoid(g) * to_float(up.v[j]));
    }
    *reinterpret_cast<Values*>(act + static_cast<u64>(row) * act_stride + at) = out;
}

KERNEL __launch_bounds__(THREADS)
silu_backward(bf16* gate_up, const bf16* dact, u32 rows, u32 f, u32 act_stride, u32 stride) {
    u64 index = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x;
    u32 width = f / VECTOR, row = index / width, at = index % width * VECTOR;
    if (row >= rows) return;
    bf16* both = gate_up + static_cast<u64>(row) * stride + at;
    Values gate = *reinterpret_cast<const Values*>(both), up = *reinterpret_cast<const Values*>(both + f);
    Values upper = *reinterpret_cast<const Values*>(dact + static_cast<u64>(row) * act_stride + at);
#pragma unroll
    for (u32 j = 0; j < VECTOR; j++) {
        float g = to_float(gate.v[j]), s = sigmoid(g), silu = g * s, d = to_float(upper.v[j]);
        gate.v[j] = to_bf16(d * to_float(up.v[j]) * (s + silu * (1.0f - s)));
        up.v[j] = to_bf16(d * silu);
    }
    *reinterpret_cast<Values*>(both) = gate;
    *reinterpret_cast<Values*>(both + f) = up;
}
