// A wait covers the own copies only; another thread's need a barrier behind it.
#include "device.cuh"

struct Shared {
    float values[256];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x < n / 4) copy_async_16(&shared.values[4 * threadIdx.x], x + 4 * threadIdx.x, true);
    copy_async_commit();
    copy_async_wait<0>();
    y[threadIdx.x] = shared.values[threadIdx.x];  // FAULT
}
