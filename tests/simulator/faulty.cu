// One fault in each kernel. The simulator names the kernel and a line that ends in FAULT; what else it says stands after EXPECT,
// parts apart by `;`, and choices by `|` where the order of threads decides.
#include "device.cuh"

struct Shared {
    float values[256];
};

// A thread reads what its neighbour wrote, and nobody waited.
// EXPECT of shared memory, which thread; wrote: expected a barrier | read: expected a barrier
KERNEL missing_barrier(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];  // FAULT
    y[threadIdx.x] = shared.values[(threadIdx.x + 1) % n];  // FAULT
}

// A buffer is filled again while others still read its first contents.
// EXPECT of shared memory, which; wrote: expected a barrier | read: expected a barrier
KERNEL missing_barrier_before_reuse(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    block_barrier();
    float sum = shared.values[(threadIdx.x + 1) % n];  // FAULT
    shared.values[threadIdx.x] = 2.0f * sum;  // FAULT
    block_barrier();
    y[threadIdx.x] = sum + shared.values[threadIdx.x];
}

// Lanes of one warp need a barrier too: a shuffle orders no memory.
// EXPECT reads 4 bytes; of shared memory, which thread; wrote: expected a barrier in between
KERNEL missing_warp_barrier(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    u32 next = shuffle_xor(threadIdx.x, 1);
    y[threadIdx.x] = shared.values[next % n];  // FAULT
}

// Two barriers where one was meant.
// EXPECT calls block_barrier; expected its whole block at one call, found others at
KERNEL divergent_barrier(float* y, const float* x, u32 n) {
    if (threadIdx.x < n / 2) {
        y[threadIdx.x] = x[threadIdx.x];
        block_barrier();
    } else {
        block_barrier();  // FAULT
    }
    y[threadIdx.x] += 1.0f;
}

// Some threads leave before the barrier of all.
// EXPECT block_barrier; left the kernel | leaves the kernel
KERNEL barrier_after_exit(float* y, const float* x, u32 n) {
    if (threadIdx.x >= n - 3) return;
    block_barrier();  // FAULT
    y[threadIdx.x] = x[threadIdx.x];
}

// Half a warp waits for the block, the other half for its warp.
// EXPECT deadlock; waits at block_barrier; waits at warp_barrier
KERNEL deadlock(float* y, const float* x, u32 n) {
    if (threadIdx.x % WARP < n / 4) {
        block_barrier();
    } else {
        warp_barrier();  // FAULT
    }
    y[threadIdx.x] = x[threadIdx.x];
}

// One warp, two shuffles.
// EXPECT shuffle_xor; expected its whole warp at one call, found others at shuffle
KERNEL shuffle_divergence(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    if (threadIdx.x % 2 == 0 && n > 0) {
        value += shuffle(value, 0);
    } else {
        value -= shuffle_xor(value, 1);  // FAULT
    }
    y[threadIdx.x] = value;
}

// The ragged tail leaves, and the rest of its warp shuffles.
// EXPECT shuffle_xor; left the kernel | leaves the kernel
KERNEL shuffle_without_lanes(float* y, const float* x, u32 n) {
    if (threadIdx.x >= n - 3) return;
    y[threadIdx.x] = warp_sum(x[threadIdx.x]);  // FAULT
}

// EXPECT reads 4 bytes; past the end of parameter 2 (256 bytes)
KERNEL read_past_the_end(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x + n / 2];  // FAULT
}

// EXPECT writes 4 bytes; 4 bytes past the end of parameter 1 (256 bytes)
KERNEL write_past_the_end(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    y[threadIdx.x + n / 64] = value;  // FAULT
}

// EXPECT writes 4 bytes; bytes before the start of parameter 1 (256 bytes)
KERNEL write_before_the_start(float* y, const float* x, u32 n) {
    float value = x[threadIdx.x];
    float* row = y + threadIdx.x;
    row[-static_cast<int>(n)] = value;  // FAULT
}

// An optional tensor is used although it is null.
// EXPECT reads 4 bytes; neither a tensor nor shared memory
KERNEL no_tensor(float* y, const float* x, u32 n, const float* /*or null*/ bias) {
    y[threadIdx.x % n] = x[threadIdx.x] + bias[threadIdx.x];  // FAULT
}

// The launch has shared memory for 64 values only.
// EXPECT writes 4 bytes; of shared memory, expected the 256 bytes of the launch
KERNEL shared_past_the_end(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    shared.values[threadIdx.x] = x[threadIdx.x];
    shared.values[n + threadIdx.x] = 1.0f;  // FAULT
    y[threadIdx.x] = shared.values[threadIdx.x];
}

struct Arrays {
    float values[32];
    float more[32];
};

// Inside shared memory, but in the array after the one that is named.
// EXPECT uses index; 'float [32]'
KERNEL index_past_its_array(float* y, const float* x, u32 n) {
    Arrays& shared = shared_memory<Arrays>();
    shared.values[threadIdx.x % n] = x[threadIdx.x];  // FAULT
    y[threadIdx.x] = shared.values[threadIdx.x];
}

// Every block writes the same element.
// EXPECT writes 4 bytes; of this launch wrote; parameter 1; blocks of a launch have no order
KERNEL write_race_between_blocks(float* y, const float* x, u32 n) {
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0) y[1] = 2.0f;  // FAULT
}

// Each block writes its row and reads the first, which another writes.
// EXPECT which block | which several blocks; of this launch; parameter 1; blocks of a launch have no order
KERNEL read_race_between_blocks(float* y, const float* x, u32 n) {
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x] + y[threadIdx.x];  // FAULT
}

// The copy is closed but not waited for.
// EXPECT reads 4 bytes; an asynchronous copy of thread; expected copy_async_wait and a barrier
KERNEL copy_read_too_early(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    copy_async_16(&shared.values[4 * threadIdx.x], x + 4 * (threadIdx.x % (n / 4)), true);
    copy_async_commit();
    y[threadIdx.x] = shared.values[4 * threadIdx.x];  // FAULT
}

// The barrier is there, the wait leaves the last group under way.
// EXPECT reads 4 bytes; an asynchronous copy of thread; expected copy_async_wait and a barrier
KERNEL copy_not_waited_for(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x < n / 4) copy_async_16(&shared.values[4 * threadIdx.x], x + 4 * threadIdx.x, true);
    copy_async_commit();
    copy_async_wait<1>();
    block_barrier();
    y[threadIdx.x] = shared.values[threadIdx.x];  // FAULT
}

// A wait covers a thread's own copies only; another thread's need a barrier after it.
// EXPECT reads 4 bytes; of shared memory, which; copy of thread | wrote: expected a barrier
KERNEL copy_without_barrier(float* y, const float* x, u32 n) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x < n / 4) copy_async_16(&shared.values[4 * threadIdx.x], x + 4 * threadIdx.x, true);
    copy_async_commit();
    copy_async_wait<0>();
    y[threadIdx.x] = shared.values[threadIdx.x];  // FAULT
}

// Sixteen bytes at a time, from an element that is no multiple of four.
// EXPECT expected a multiple of 16; float4x
KERNEL misaligned(float* y, const float* x, u32 n) {
    const float4x* from = reinterpret_cast<const float4x*>(x + n % 63);
    float4x part = *from;  // FAULT
    y[threadIdx.x] = part.v[threadIdx.x % 4];
}

struct Rows {
    bf16 tile[64][12];
};

// Rows of 24 bytes: every second one is misaligned for ldmatrix.
// EXPECT loads a matrix; expected 16 aligned bytes of shared memory; found offset
KERNEL misaligned_matrix(float* y, const float* x, u32 n) {
    Rows& shared = shared_memory<Rows>();
    for (u32 i = 0; i < 12; i++) shared.tile[threadIdx.x % n][i] = to_bf16(x[threadIdx.x]);
    block_barrier();
    u32 r[4];
    load_matrix_x4(r, shared.tile[threadIdx.x % WARP]);  // FAULT
    y[threadIdx.x] = low_float(r[0] ^ r[1] ^ r[2] ^ r[3]);
}

// A GPU gives 0, a CPU shifts by 0: neither was meant.
// EXPECT shifts by 32; expected less than the number's bits
KERNEL shift_too_far(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x] * static_cast<float>(1u << (n / 2));  // FAULT
}

// EXPECT divides by zero
KERNEL division_by_zero(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x % (n - 64)];  // FAULT
}

// Additions of several threads have no order; what reads them needs one.
// EXPECT of shared memory, which; wrote: expected a barrier | read: expected a barrier
KERNEL sum_read_too_early(float* y, const float* x, u32 n) {
    u32& sum = shared_memory<u32>();
    if (threadIdx.x == 0) sum = 0;
    block_barrier();
    shared_add(sum, static_cast<u32>(x[threadIdx.x % n]));  // FAULT
    y[threadIdx.x] = static_cast<float>(sum);  // FAULT
}

// Zeroed by one thread while another adds.
// EXPECT of shared memory, which; wrote: expected a barrier | read: expected a barrier
KERNEL sum_zeroed_too_late(float* y, const float* x, u32 n) {
    u32& sum = shared_memory<u32>();
    if (threadIdx.x == 0) sum = n;  // FAULT
    shared_add(sum, 1);  // FAULT
    block_barrier();
    y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(sum);
}

// EXPECT of shared memory, which; wrote: expected a barrier | read: expected a barrier
KERNEL sum_read_beside_additions(float* y, const float* x, u32 n) {
    u32& sum = shared_memory<u32>();
    if (threadIdx.x == 0) y[n - 1] = static_cast<float>(sum);  // FAULT
    if (threadIdx.x != 0) shared_add(sum, static_cast<u32>(x[threadIdx.x]));  // FAULT
}

// EXPECT adds at; expected an address in shared memory
KERNEL sum_in_a_tensor(float* y, const float* x, u32 n) {
    y[threadIdx.x] = x[threadIdx.x % n];
    shared_add(*reinterpret_cast<u32*>(y), 1);  // FAULT
}
