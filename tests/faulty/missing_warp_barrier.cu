// Lanes of one warp need a barrier too: a shuffle orders no memory.
#include "device.cuh"

struct Shared {
    float values[64];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    u32 next = shuffle_xor(threadIdx.x, 1);
    y[threadIdx.x] = shared.values[next % n];  // FAULT
}
