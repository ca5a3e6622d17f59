// A buffer is filled again while others still read its first contents.
#include "device.cuh"

struct Shared {
    float values[64];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    block_barrier();
    float sum = shared.values[(threadIdx.x + 1) % n];  // FAULT
    shared.values[threadIdx.x] = 2.0f * sum;  // FAULT
    block_barrier();
    y[threadIdx.x] = sum + shared.values[threadIdx.x];
}
