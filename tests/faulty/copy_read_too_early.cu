// The copy is closed but not waited for.
#include "device.cuh"

struct Shared {
    float values[256];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    copy_async_16(&shared.values[4 * threadIdx.x], x + 4 * (threadIdx.x % (n / 4)), true);
    copy_async_commit();
    y[threadIdx.x] = shared.values[4 * threadIdx.x];  // FAULT
}
