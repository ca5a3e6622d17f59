// One warp, two shuffles.
#include "device.cuh"

KERNEL faulty(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    if (threadIdx.x % 2 == 0 && n > 0) {
        value += shuffle(value, 0);
    } else {
        value -= shuffle_xor(value, 1);  // FAULT
    }
    y[threadIdx.x] = value;
}
