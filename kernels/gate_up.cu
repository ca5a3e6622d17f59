// The activation after the product (gate | up): act[t,c] = f(g) * u; with GATED 0 a row is the gate alone and act = f(g).
//   silu       f = g * sigmoid(g)
//   GELU       f = g * Phi(g), Phi = (1 + erf(g / sqrt 2)) / 2, Phi' = exp(-g^2/2) / sqrt(2 pi)
//   GELU_TANH  f = g * sigmoid(v), v = 2 sqrt(2/pi) (g + 0.044715 g^3): the same as g/2 * (1 + tanh(v/2))
//   backward, in place: dg = dact * u * f'(g), du = dact * f(g), and act where dact was
// One thread owns VECTOR neighbours of one row; VECTOR is 8 where f is a multiple of it, else 1. Constants come from
// src/ops/gate_up/cuda.rs. gate_up rows lie 2f (ungated: f) apart, padded.
#include "device.cuh"

struct alignas(2 * VECTOR) Values {
    bf16 v[VECTOR];
};

/// f and f' at one g.
struct Curve {
    float value, slope;
};

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }

DEVICE Curve activation(float g) {
    if (GELU) {
        float below = 0.5f + 0.5f * erff(g * 0.70710678f), density = 0.39894228f * exp2_fast(-0.5f * LOG2_E * g * g);
        return {g * below, below + g * density};
    }
    constexpr float LINEAR = 1.5957691f, CUBIC = LINEAR * 0.044715f;  // 2 sqrt(2/pi)
    float v = GELU_TANH ? g * (LINEAR + CUBIC * g * g) : g, dv = GELU_TANH ? LINEAR + 3.0f * CUBIC * g * g : 1.0f;
    float s = sigmoid(v), value = g * s;
    return {value, s + value * (1.0f - s) * dv};
}

KERNEL __launch_bounds__(THREADS)
activate_forward(bf16* act, const bf16* gate_up, u32 rows, u32 f, u32 act_stride, u32 stride) {
    after_previous();
    u32 index = blockIdx.x * THREADS + threadIdx.x, width = f / VECTOR, row = index / width, at = index % width * VECTOR;
    if (row >= rows) return;
    const bf16* from = gate_up + static_cast<u64>(row) * stride + at;
    Values gate = *reinterpret_cast<const Values*>(from), up = {}, out;
    if (GATED) up = *reinterpret_cast<const Values*>(from + f);
#pragma unroll
    for (u32 j = 0; j < VECTOR; j++) {
        float value = activation(to_float(gate.v[j])).value;
        out.v[j] = to_bf16(GATED ? value * to_float(up.v[j]) : value);
    }
    *reinterpret_cast<Values*>(act + static_cast<u64>(row) * act_stride + at) = out;
}

KERNEL __launch_bounds__(THREADS)
activate_backward(bf16* gate_up, bf16* act, u32 rows, u32 f, u32 act_stride, u32 stride) {
    after_previous();
    u32 index = blockIdx.x * THREADS + threadIdx.x, width = f / VECTOR, row = index / width, at = index % width * VECTOR;
    if (row >= rows) return;
    bf16* both = gate_up + static_cast<u64>(row) * stride + at;
    Values gate = *reinterpret_cast<const Values*>(both), up = {};
    if (GATED) up = *reinterpret_cast<const Values*>(both + f);
    Values* const upper = reinterpret_cast<Values*>(act + static_cast<u64>(row) * act_stride + at);
    Values out = *upper;
#pragma unroll
    for (u32 j = 0; j < VECTOR; j++) {
        Curve curve = activation(to_float(gate.v[j]));
        float d = to_float(out.v[j]), u = GATED ? to_float(up.v[j]) : 1.0f;
        gate.v[j] = to_bf16(d * u * curve.slope);
        up.v[j] = to_bf16(d * curve.value);
        out.v[j] = to_bf16(curve.value * u);
    }
    *upper = out;
    *reinterpret_cast<Values*>(both) = gate;
    if (GATED) *reinterpret_cast<Values*>(both + f) = up;
}
