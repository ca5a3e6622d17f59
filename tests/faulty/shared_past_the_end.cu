// The kernel's struct is larger than the launch's shared memory.
#include "device.cuh"

struct Shared {
    float values[64];
    float more[64];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    shared.more[threadIdx.x % n] = 1.0f;  // FAULT
    y[threadIdx.x] = shared.values[threadIdx.x] + shared.more[threadIdx.x];
}
