// Rows of 24 bytes: every second one is misaligned for ldmatrix.
#include "device.cuh"

struct Shared {
    bf16 tile[64][12];
};

KERNEL faulty(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    for (u32 i = 0; i < 12; i++) shared.tile[threadIdx.x % n][i] = to_bf16(x[threadIdx.x]);
    block_barrier();
    u32 r[4];
    load_matrix_x4(r, shared.tile[threadIdx.x % WARP]);  // FAULT
    y[threadIdx.x] = low_float(r[0] ^ r[1] ^ r[2] ^ r[3]);
}
