// The simulator: runs a kernel's threads as fibers on the CPU and carries out what they do together. Compiled once into a
// shared library; kernels, compiled with sim.h, find these functions in it.
//
// A block, or cluster of them, runs on one operating system thread from its first fiber to its last; they are taken from a counter by as many
// workers as the caller has threads. A fiber runs until it waits: for its warp at a collective, for its block at a barrier.
// The last to arrive does the work for all and wakes them.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#define SIM_RUNTIME
#define ARCH 0  // the machine itself is compiled for none
#include "device.cuh"
#include "sim/fiber.h"
#include "sim/memory.h"
#include "sim/clock.h"
#include "sim/block.h"
#include "sim/fault.h"
#include "sim/schedule.h"
#include "sim/check.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define PLACE __builtin_return_address(0)
#include "sim/hooks.h"
#include "sim/barrier.h"
#include "sim/box.h"
#include "sim/tensor_core.h"
#include "sim/warpgroup.h"

// ------------------------------------------------------------------------------------------------------ what a kernel asks

EXPORT u32 sim_special(u32 which) noexcept {
    const Worker& worker = *current;
    const SimLaunch& spec = worker.launch->spec;
    const u32* groups[] = {&worker.self->index.x, &worker.self->block->index.x, spec.block, spec.grid};
    return groups[which / 3][which % 3];
}

EXPORT unsigned char* sim_shared() noexcept { return current->shared + current->self->block->window; }

EXPORT void sim_after_previous() noexcept { current->self->early = false; }

EXPORT void sim_block_barrier(u32 line) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    Block& block = *self->block;
    if (block.left) {
        fail(worker, "calls block_barrier at " + where(PLACE) + ", expected all threads of its block, found that " +
                         text("%u have left the kernel", block.left));
    }
    if (block.at_barrier && block.barrier_line != line) {
        fail(worker, "calls block_barrier at " + where(PLACE) + ", expected its whole block at one call, found others at " +
                         where(block.barrier_place));
    }
    block.barrier_line = line, block.barrier_place = PLACE;
    if (++block.at_barrier < worker->launch->threads) return park(worker, self, BLOCK_BARRIER, line, PLACE);
    block.at_barrier = 0;
    block.since = tick(worker);
    if (worker->asynchronous) share_block_clocks(worker, block);
    wake(worker, block.first, worker->launch->threads);
}

EXPORT void sim_warp_barrier(u32 line) noexcept {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    if (gather(worker, warp, WARP_BARRIER, line, PLACE)) {
        warp.since = tick(worker);
        if (worker->asynchronous) share_clocks(worker, warp);
        disperse(worker, warp);
    }
}

/// Each lane's value goes to the lanes that name it.
static u32 permute(Call call, u32 value, u32 from, u32 line, const void* place) {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    u32 own = worker->self->lane;
    warp.in[0][own] = value, warp.in[1][own] = from % WARP;
    if (gather(worker, warp, call, line, place)) {
        for (u32 i = 0; i < WARP; i++) warp.out[0][i] = warp.in[0][warp.in[1][i]];
        disperse(worker, warp);
    }
    return warp.out[0][own];
}

EXPORT u32 sim_shuffle(u32 value, u32 lane, u32 line) noexcept { return permute(SHUFFLE, value, lane, line, PLACE); }

EXPORT u32 sim_shuffle_xor(u32 value, u32 mask, u32 line) noexcept {
    return permute(SHUFFLE_XOR, value, current->self->lane ^ mask, line, PLACE);
}

EXPORT u32 sim_ballot(u32 predicate, u32 line) noexcept {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    u32 own = worker->self->lane;
    warp.in[0][own] = predicate;
    if (gather(worker, warp, BALLOT, line, PLACE)) {
        u32 bits = 0;
        for (u32 i = 0; i < WARP; i++) bits |= static_cast<u32>(warp.in[0][i] != 0) << i;
        for (u32 i = 0; i < WARP; i++) warp.out[0][i] = bits;
        disperse(worker, warp);
    }
    return warp.out[0][own];
}

/// One fiber of a block runs at a time.
EXPORT void sim_shared_add(u32* to, u32 value) noexcept {
    touch_added(current, to, PLACE);
    *to += value;
}

// ---------------------------------------------------------------------------------------------------------- tensor cores

/// The PTX ISA's m16n8k16: with g = lane / 4 and t = lane % 4,
///   a0 = A[g][2t, 2t+1]  a1 = A[g+8][2t, 2t+1]  a2 = A[g][2t+8, 2t+9]  a3 = A[g+8][2t+8, 2t+9]
///   b0 = B[2t, 2t+1][g]  b1 = B[2t+8, 2t+9][g]   d0, d1 = D[g][2t, 2t+1]   d2, d3 = D[g+8][2t, 2t+1]
/// so that each register, read over the lanes, is an 8×8 matrix by rows (A), by columns (B).
static void multiply(Warp& warp, bool hopper) {
    float a[16][16];
    Row b[16], d[16];
    for (u32 g = 0; g < 8; g++) {
        for (u32 t = 0; t < 4; t++) {
            u32 lane = 4 * g + t;
            for (u32 r = 0; r < 4; r++) put_left(a, lane, r, warp.in[r][lane]);
            for (u32 r = 0; r < 2; r++) {
                u32 pair = warp.in[4 + r][lane], row = 2 * t + r * 8;
                b[row][g] = low_float(pair), b[row + 1][g] = high_float(pair);
            }
            for (u32 r = 0; r < 4; r++) d[g + r / 2 * 8][2 * t + r % 2] = warp.sum[r][lane];
        }
    }
    for (u32 i = 0; i < 16; i++) d[i] = add_products(d[i], a[i], b, hopper);
    for (u32 lane = 0; lane < WARP; lane++) {
        for (u32 r = 0; r < 4; r++) warp.sum[r][lane] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
}

EXPORT SimFloats sim_mma(float d0, float d1, float d2, float d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                         u32 hopper, u32 line) noexcept {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    u32 own = worker->self->lane;
    warp.sum[0][own] = d0, warp.sum[1][own] = d1, warp.sum[2][own] = d2, warp.sum[3][own] = d3;
    warp.in[0][own] = a0, warp.in[1][own] = a1, warp.in[2][own] = a2, warp.in[3][own] = a3;
    warp.in[4][own] = b0, warp.in[5][own] = b1;
    if (gather(worker, warp, MMA, line, PLACE)) {
        multiply(warp, hopper != 0);
        disperse(worker, warp);
    }
    return SimFloats{{warp.sum[0][own], warp.sum[1][own], warp.sum[2][own], warp.sum[3][own]}};
}

/// Each lane's 16 bytes of shared memory, looked at in its name.
template <bool WRITES>
static void touch_rows(Worker* worker, const Warp& warp, const void* place) {
    Fiber* self = worker->self;
    for (u32 i = 0; i < WARP; i++) {
        worker->self = self - self->lane + i;
        u64 offset = reinterpret_cast<u64>(warp.rows[i]) - reinterpret_cast<u64>(worker->shared);
        if (offset >= SHARED_ALL || offset % 16) {
            fail(worker, text("%s a matrix at ", WRITES ? "stores" : "loads") + where(place) + ", expected 16 aligned bytes of shared memory, " +
                             (offset < SHARED_ALL ? text("found offset %llu", offset % SHARED_SPACE) : "found another address"));
        }
        touch_shared<16, WRITES>(worker, offset, place);
    }
    worker->self = self;
}

/// Matrix m's row i is 16 bytes at lane 8m + i's address; lane l gets elements 2·(l%4), +1 of row l/4, or of column l/4.
static SimWords load_matrix(Call call, const void* row, u32 line, const void* place) {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    u32 own = worker->self->lane;
    warp.rows[own] = const_cast<void*>(row);
    if (gather(worker, warp, call, line, place)) {
        u16 rows[WARP][8], columns[WARP][8];
        touch_rows<false>(worker, warp, place);
        for (u32 i = 0; i < WARP; i++) memcpy(rows[i], warp.rows[i], sizeof rows[i]);
        bool transposed = call == LOAD_MATRIX_TRANSPOSED;
        for (u32 i = 0; transposed && i < WARP; i++) {
            for (u32 j = 0; j < 8; j++) columns[i / 8 * 8 + j][i % 8] = rows[i][j];
        }
        memcpy(warp.out, transposed ? columns : rows, sizeof rows);
        disperse(worker, warp);
    }
    return SimWords{{warp.out[0][own], warp.out[1][own], warp.out[2][own], warp.out[3][own]}};
}

EXPORT SimWords sim_load_matrix(const void* row, u32 line) noexcept { return load_matrix(LOAD_MATRIX, row, line, PLACE); }

EXPORT SimWords sim_load_matrix_transposed(const void* row, u32 line) noexcept {
    return load_matrix(LOAD_MATRIX_TRANSPOSED, row, line, PLACE);
}

EXPORT void sim_store_matrix(void* row, u32 r0, u32 r1, u32 r2, u32 r3, u32 line) noexcept {
    Worker* worker = current;
    Warp& warp = *worker->self->warp;
    u32 own = worker->self->lane;
    warp.rows[own] = row;
    warp.in[0][own] = r0, warp.in[1][own] = r1, warp.in[2][own] = r2, warp.in[3][own] = r3;
    if (!gather(worker, warp, STORE_MATRIX, line, PLACE)) return;
    touch_rows<true>(worker, warp, PLACE);
    for (u32 i = 0; i < WARP; i++) memcpy(warp.rows[i], &warp.in[i / 8][i % 8 * 4], 16);
    disperse(worker, warp);
}

// ---------------------------------------------------------------------------------------------------- asynchronous copies

static void land(const Copy& copy) {
    if (copy.valid) {
        memcpy(copy.shared, copy.global, 16);
    } else {
        memset(copy.shared, 0, 16);
    }
}

EXPORT void sim_copy_async(void* shared, const void* global, u32 valid) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    u64 offset = static_cast<u64>(static_cast<unsigned char*>(shared) - worker->shared);
    u64 from = static_cast<u64>(static_cast<const unsigned char*>(global) - arena.base);
    if (offset >= SHARED_ALL || offset % 16 || from >= ARENA || from % 16) {
        fail(worker, "starts a copy at " + where(PLACE) + ", expected 16 aligned bytes of a tensor and of shared memory, found " +
                         text("addresses %p and %p", global, shared));
    }
    if (valid) touch_global<16, false>(worker, from, PLACE);
    touch_shared<16, true>(worker, offset, PLACE);
    mark_copy(worker, offset, false);
    self->copies.push_back(Copy{shared, global, self->groups, valid != 0});
    if (worker->launch->spec.seed && draw(worker->random) % 2) land(self->copies.back());  // as early as is legal
}

EXPORT void sim_copy_commit() noexcept { current->self->groups++; }

/// Copies land here: as late as is legal.
EXPORT void sim_copy_wait(u32 pending) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    size_t done = 0;
    for (; done < self->copies.size() && self->copies[done].group + pending < self->groups; done++) {
        const Copy& copy = self->copies[done];
        land(copy);
        mark_copy(worker, static_cast<u64>(static_cast<unsigned char*>(copy.shared) - worker->shared), true);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<long>(done));
}

// ---------------------------------------------------------------------------------------------------------------- launches

/// Zeroed device memory, aligned to 256 bytes; 0 when there is no room.
EXPORT u64 sim_alloc(u64 bytes) noexcept { return allocate(bytes); }

EXPORT void sim_free(u64 address) noexcept { release(address); }

/// A launch that `sim_work` can join from any number of threads; null when there is no memory for it.
EXPORT void* sim_begin(const SimLaunch* spec) noexcept {
    Launch* launch = new (std::nothrow) Launch();
    if (!launch) return nullptr;
    launch->spec = *spec;
    launch->threads = spec->block[0] * spec->block[1] * spec->block[2];
    launch->fibers = launch->threads * spec->cluster;
    launch->blocks = static_cast<u64>(spec->grid[0]) * spec->grid[1] * spec->grid[2];
    std::lock_guard<std::mutex> guard(arena.lock);
    launch->stamp = take_stamps(launch->blocks);
    launch->limit = launch->stamp == NO_STAMP ? 0 : static_cast<u32>(launch->blocks);
    arena.running++;
    return launch;
}

/// Runs blocks until none is left or one has failed.
EXPORT void sim_work(void* handle) noexcept {
    Launch* launch = static_cast<Launch*>(handle);
    Worker* worker = take_worker();
    if (!worker) {
        std::lock_guard<std::mutex> guard(launch->lock);
        launch->message = "expected memory for the threads' stacks, found none";
        launch->failed = true;
        return;
    }
    Worker* outer = current;
    current = worker;
    worker->launch = launch;
    for (u64 cluster; !launch->failed && (cluster = launch->next++) < launch->blocks / launch->spec.cluster;) {
        run_cluster(worker, cluster_order(*launch, cluster));
    }
    current = outer;
    give_worker(worker);
}

/// Frees the launch. Returns 0, or 1 with its fault in `message`.
EXPORT int sim_end(void* handle, char* message, u64 room) noexcept {
    Launch* launch = static_cast<Launch*>(handle);
    int failed = launch->failed;
    {
        std::lock_guard<std::mutex> guard(arena.lock);
        arena.running--;
    }
    snprintf(message, room, "%s", launch->message.c_str());
    delete launch;
    return failed;
}
