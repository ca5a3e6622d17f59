#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    y[threadIdx.x + n / 64] = value;  // FAULT
}
