// An optional tensor is used although it is null.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, const float* /*or null*/ bias, u32 n) {
    y[threadIdx.x % n] = x[threadIdx.x] + bias[threadIdx.x];  // FAULT
}
