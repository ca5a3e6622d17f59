#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    float* row = y + threadIdx.x;
    row[-static_cast<int>(n)] = value;  // FAULT
}
