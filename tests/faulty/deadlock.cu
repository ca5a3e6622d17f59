// Half a warp waits for the block, the other half for its warp.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    if (threadIdx.x % WARP < n / 4) {
        block_barrier();
    } else {
        warp_barrier();  // FAULT
    }
    y[threadIdx.x] = x[threadIdx.x];
}
