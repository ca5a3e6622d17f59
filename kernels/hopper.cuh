// What sm_90a has beyond device.cuh: barriers in shared memory that count arrivals and bytes (mbarrier), boxes of matrices moved by
// the copy engine (TMA), products of a warpgroup of 128 threads (wgmma). Its twins for the CPU are in sim/hopper.h.
//
// Ordinary accesses and those of copy engine and tensor cores go different ways to shared memory (proxies): what a thread wrote
// is seen by them only after its fence_async(); what they wrote is seen by whoever waited at the barrier that counted it.
#pragma once
#include "device.cuh"

/// A tile as TMA writes and wgmma reads it: rows of 128 bytes, whose chunks of 16 are permuted within each eight rows (1024 bytes,
/// at a multiple of which it begins).
constexpr u32 BOX_COLS = 64;
constexpr u32 ATOM = 1024;

/// Where element (row, col) of such a tile lies, in elements from its beginning; `col` < BOX_COLS.
DEVICE u32 box_offset(u32 row, u32 col) { return row * BOX_COLS + ((col / 8 ^ row % 8) * 8 + col % 8); }

/// Counts arrivals and expected bytes. A phase ends once all of both have come; a phase is named by its parity, 0 for the first.
struct alignas(8) Barrier {
    u64 state;
};

/// How wgmma finds its operand: `start` in shared memory; `leading` and `stride` bytes as the layout has it (below).
DEVICE u64 operand(u32 start, u32 leading, u32 stride) {
    constexpr u64 PERMUTED = 1ull << 62;  // in rows of 128 bytes
    return PERMUTED | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 | (start & 0x3ffff) >> 4;
}

#ifdef ARES_SIM
#include "sim/hopper.h"
#else

/// A matrix in global memory and the box that one copy of it moves; made by the host, and handed over as
/// `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    u64 words[16];
};

/// This block's number in its cluster: blocks that run at the same time and reach each other's shared memory.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// All threads of the cluster; orders their accesses to shared memory.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// `threads` of the block, whole warps that meet under a name of 1 to 15; orders their accesses to shared memory.
DEVICE void named_barrier(u32 name, u32 threads) { asm volatile("barrier.sync.aligned %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

/// Of this multiprocessor, modulo 2^32.
DEVICE u32 clock_cycles() {
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}

/// By one thread, before barrier_ready and a barrier of the block.
DEVICE void barrier_init(Barrier& barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

/// By the thread that made barriers: the copy engine knows them from here on.
DEVICE void barrier_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// What this thread did before is done for those who wait for the phase.
DEVICE void barrier_arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

/// Arrives, and says how many bytes the copy engine will bring in this phase.
DEVICE void barrier_expect(Barrier& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}

/// The same at this barrier's counterpart in block `rank` of the cluster.
DEVICE void barrier_arrive_at(Barrier& barrier, u32 rank) {
    asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [at];}" ::"r"(
                     shared_address(&barrier)),
                 "r"(rank)
                 : "memory");
}

/// Until the phase of this parity is over.
DEVICE void barrier_wait(Barrier& barrier, u32 parity) {
    u32 over;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(over)
                     : "r"(shared_address(&barrier)), "r"(parity)
                     : "memory");
    } while (over == 0);
}

/// What this thread wrote to shared memory may be read by copy engine and tensor cores.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Starts copying the map's box that begins at (row, col), zeros outside of the matrix, to shared memory, where `barrier` counts all
/// of its bytes. By one thread.
DEVICE void load_box(void* shared, const TensorMap& map, int row, int col, Barrier& barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                     shared_address(shared)),
                 "l"(&map), "r"(shared_address(&barrier)), "r"(col), "r"(row)
                 : "memory");
}

/// The same to this place of every block of the cluster, each of whose barriers counts the bytes.
template <u32 Blocks>
DEVICE void load_box_for_all(void* shared, const TensorMap& map, int row, int col, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(col), "r"(row), "h"(static_cast<u16>((1u << Blocks) - 1))
        : "memory");
}

/// Starts copying a box from shared memory; what lies outside of the matrix is left out. By one thread.
DEVICE void store_box(const TensorMap& map, int row, int col, const void* shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(shared_address(shared)),
                 "r"(col), "r"(row)
                 : "memory");
}

/// Until all boxes that this thread stores have been read: their shared memory is free.
DEVICE void store_wait() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// Writes four 8×8 matrices of bf16 to shared memory, from where and as load_matrix_x4 would read them.
DEVICE void store_matrix_x4(bf16* row, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

/// Accumulators that this warp wrote may be a product's from here on.
DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes the group of products started since the last one.
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until at most `Pending` groups are under way: the others' accumulators hold their results, and this warp reads their operands
/// no more.
template <u32 Pending>
DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Of this warp's registers: of all four warps of a warpgroup, at once.
template <u32 Count>
DEVICE void registers_up_to() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <u32 Count>
DEVICE void registers_down_to() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

#define R8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32(i) R8(i), R8(i + 8), R8(i + 16), R8(i + 24)
#define NAMES_0 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_96                                                                                                                         \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
    "%122,%123,%124,%125,%126,%127"
#define WGMMA(N, NAMES, A, B, ADD, ACROSS, ...)                                                                                  \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, " A \
                 ", " B ", p, 1, 1, " ACROSS ";}"                                                                             \
                 : __VA_ARGS__                                                                                                   \
                 : LEFT, "l"(b), "r"(static_cast<u32>(add)), "n"(static_cast<u32>(B_ACROSS)))

/// Starts d (64 × N) += a (64 × 16) · b (16 × N), or d = a·b without `add`, of one warpgroup; both operands in shared memory.
///   lane l of warp w: d[4j + e] is row 16·(w % 4) + l/4 + e/2·8, column 8j + l%4·2 + e%2
///   along k (a; b as (N, 16)): a box of 64 columns along k; every eight rows `stride` bytes on; the next 16 along k 32 bytes on
///   across (b as (16, N)): boxes of 64 columns along N, `leading` bytes apart; every eight rows along k `stride` bytes on
template <bool B_ACROSS, u32 HALF>
DEVICE void warpgroup_multiply(float (&d)[HALF], u64 a, u64 b, bool add) {
    static_assert(HALF == 64 || HALF == 96 || HALF == 128, "N is 128, 192 or 256");
#define LEFT "l"(a)
    if constexpr (HALF == 64) {
        WGMMA(128, NAMES_0 NAMES_32, "%64", "%65", "%66", "0, %67", R32(0), R32(32));
    } else if constexpr (HALF == 96) {
        WGMMA(192, NAMES_0 NAMES_32 NAMES_64, "%96", "%97", "%98", "0, %99", R32(0), R32(32), R32(64));
    } else {
        WGMMA(256, NAMES_0 NAMES_32 NAMES_64 NAMES_96, "%128", "%129", "%130", "0, %131", R32(0), R32(32), R32(64), R32(96));
    }
#undef LEFT
}

/// The same with a in registers, each warp's 16 rows as mma_16x8x16 has them. They are read until warpgroup_wait.
template <bool B_ACROSS, u32 HALF>
DEVICE void warpgroup_multiply(float (&d)[HALF], const u32 (&a)[4], u64 b, bool add) {
    static_assert(HALF == 64 || HALF == 96 || HALF == 128, "N is 128, 192 or 256");
#define LEFT "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
    if constexpr (HALF == 64) {
        WGMMA(128, NAMES_0 NAMES_32, "{%64,%65,%66,%67}", "%68", "%69", "%70", R32(0), R32(32));
    } else if constexpr (HALF == 96) {
        WGMMA(192, NAMES_0 NAMES_32 NAMES_64, "{%96,%97,%98,%99}", "%100", "%101", "%102", R32(0), R32(32), R32(64));
    } else {
        WGMMA(256, NAMES_0 NAMES_32 NAMES_64 NAMES_96, "{%128,%129,%130,%131}", "%132", "%133", "%134", R32(0), R32(32), R32(64), R32(96));
    }
#undef LEFT
}

#endif
