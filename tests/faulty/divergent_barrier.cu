// Two barriers where one was meant.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    if (threadIdx.x < n / 2) {
        y[threadIdx.x] = x[threadIdx.x];
        block_barrier();
    } else {
        block_barrier();  // FAULT
    }
    y[threadIdx.x] += 1.0f;
}
