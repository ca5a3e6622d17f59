// The twins of hopper.cuh's GPU half. What they look at and when things happen: barrier.h, box.h, warpgroup.h.

/// As SimDriver::tensor_map writes it. The trampoline finds it between other arguments, at a word.
struct TensorMap {
    u64 words[16];
};

extern "C" {
void sim_barrier_init(void* barrier, u32 arrivals) noexcept;
void sim_barrier_arrive(void* barrier) noexcept;
void sim_barrier_arrive_at(void* barrier, u32 rank) noexcept;
void sim_registers(u32 count) noexcept;
u32 sim_cluster_rank() noexcept __attribute__((const));
void sim_cluster_barrier(u32 line) noexcept;
void sim_named_barrier(u32 name, u32 threads, u32 line) noexcept;
void sim_barrier_expect(void* barrier, u32 bytes) noexcept;
void sim_barrier_wait(void* barrier, u32 parity) noexcept;
void sim_fence_async() noexcept;
void sim_load_box(void* shared, const u64* map, int row, int col, void* barrier) noexcept;
void sim_load_box_for_all(void* shared, const u64* map, int row, int col, void* barrier, u32 blocks) noexcept;
void sim_store_box(const u64* map, int row, int col, const void* shared) noexcept;
void sim_store_wait() noexcept;
void sim_store_matrix(void* row, u32 r0, u32 r1, u32 r2, u32 r3, u32 line) noexcept;
void sim_multiply(float* d, u32 half, u64 a, const u32* left, u64 b, u32 add, u32 across, u32 line) noexcept;
void sim_products_fence() noexcept;
void sim_products_commit() noexcept;
void sim_products_wait(u32 pending, u32 line) noexcept;
}

DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(sim_shared()));
}

/// There is no clock here.
DEVICE u32 clock_cycles() { return 0; }
DEVICE void barrier_init(Barrier& barrier, u32 arrivals) { sim_barrier_init(&barrier, arrivals); }
DEVICE void barrier_ready() { sim_fence_async(); }
DEVICE void barrier_arrive(Barrier& barrier) { sim_barrier_arrive(&barrier); }
DEVICE void barrier_arrive_at(Barrier& barrier, u32 rank) { sim_barrier_arrive_at(&barrier, rank); }
DEVICE u32 cluster_rank() { return sim_cluster_rank(); }
DEVICE void cluster_barrier(u32 line = __builtin_LINE()) { sim_cluster_barrier(line); }
DEVICE void named_barrier(u32 name, u32 threads, u32 line = __builtin_LINE()) { sim_named_barrier(name, threads, line); }
DEVICE void barrier_expect(Barrier& barrier, u32 bytes) { sim_barrier_expect(&barrier, bytes); }
DEVICE void barrier_wait(Barrier& barrier, u32 parity) { sim_barrier_wait(&barrier, parity); }
DEVICE void fence_async() { sim_fence_async(); }

DEVICE void load_box(void* shared, const TensorMap& map, int row, int col, Barrier& barrier) {
    sim_load_box(shared, map.words, row, col, &barrier);
}
template <u32 Blocks>
DEVICE void load_box_for_all(void* shared, const TensorMap& map, int row, int col, Barrier& barrier) {
    sim_load_box_for_all(shared, map.words, row, col, &barrier, Blocks);
}
DEVICE void store_box(const TensorMap& map, int row, int col, const void* shared) { sim_store_box(map.words, row, col, shared); }
DEVICE void store_wait() { sim_store_wait(); }

DEVICE void store_matrix_x4(bf16* row, const u32 (&r)[4], u32 line = __builtin_LINE()) {
    sim_store_matrix(row, r[0], r[1], r[2], r[3], line);
}

DEVICE void warpgroup_fence() { sim_products_fence(); }
DEVICE void warpgroup_commit() { sim_products_commit(); }
template <u32 Pending>
DEVICE void warpgroup_wait(u32 line = __builtin_LINE()) {
    sim_products_wait(Pending, line);
}
template <bool B_ACROSS, u32 HALF>
DEVICE void warpgroup_multiply(float (&d)[HALF], u64 a, u64 b, bool add, u32 line = __builtin_LINE()) {
    static_assert(HALF == 64 || HALF == 96 || HALF == 128, "N is 128, 192 or 256");
    sim_multiply(d, HALF, a, nullptr, b, add, B_ACROSS, line);
}
template <bool B_ACROSS, u32 HALF>
DEVICE void warpgroup_multiply(float (&d)[HALF], const u32 (&a)[4], u64 b, bool add, u32 line = __builtin_LINE()) {
    static_assert(HALF == 64 || HALF == 96 || HALF == 128, "N is 128, 192 or 256");
    sim_multiply(d, HALF, 0, a, b, add, B_ACROSS, line);
}

/// Registers are as many as the compiler needs here; what is asked for is added up.
template <u32 Count>
DEVICE void registers_up_to() {
    static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "registers come in eights");
    sim_registers(Count);
}
template <u32 Count>
DEVICE void registers_down_to() {
    registers_up_to<Count>();
}
