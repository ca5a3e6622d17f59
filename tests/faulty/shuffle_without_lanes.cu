// The ragged tail leaves, and the rest of its warp shuffles.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    if (threadIdx.x >= n - 3) return;
    y[threadIdx.x] = warp_sum(x[threadIdx.x]);  // FAULT
}
