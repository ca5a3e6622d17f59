// Every block writes the same element.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0) y[1] = 2.0f;  // FAULT
}
