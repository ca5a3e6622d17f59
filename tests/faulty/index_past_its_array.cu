// Inside shared memory, but in the array behind the one that is named.
#include "device.cuh"

struct Shared {
    float values[32];
    float more[32];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x % n] = x[threadIdx.x];  // FAULT
    y[threadIdx.x] = shared.values[threadIdx.x];
}
