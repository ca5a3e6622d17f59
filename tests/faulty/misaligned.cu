// Sixteen bytes at a time, from an element that is no multiple of four.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    const float4x* from = reinterpret_cast<const float4x*>(x + n % 63);
    float4x part = *from;  // FAULT
    y[threadIdx.x] = part.v[threadIdx.x % 4];
}
