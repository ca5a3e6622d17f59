// A thread reads what its neighbour wrote, and nobody waited.
#include "device.cuh"

struct Shared {
    float values[64];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];  // FAULT
    y[threadIdx.x] = shared.values[(threadIdx.x + 1) % n];  // FAULT
}
