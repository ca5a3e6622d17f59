// A GPU gives 0, a CPU shifts by 0: neither was meant.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x] * static_cast<float>(1u << (n / 2));  // FAULT
}
