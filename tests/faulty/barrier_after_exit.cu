// Some threads leave before the barrier of all.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    if (threadIdx.x >= n - 3) return;
    block_barrier();  // FAULT
    y[threadIdx.x] = x[threadIdx.x];
}
