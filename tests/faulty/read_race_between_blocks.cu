// Each block writes its row and reads the first, which another writes.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x] + y[threadIdx.x];  // FAULT
}
