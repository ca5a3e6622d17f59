#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x + n / 2];  // FAULT
}
