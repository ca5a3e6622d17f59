// One thread block, or the few of a cluster: their fibers, their warps, whose turn it is.

constexpr u32 MAX_THREADS = 1024;
constexpr u64 STACK = 64 * 1024;
// Not a power of two: the tops of stacks would all fall into the same cache sets.
constexpr u64 STACK_STRIDE = STACK + 4096 + 576;
/// Of a block; those of a cluster lie one after the other.
constexpr u64 SHARED_SPACE = 256 * 1024;
constexpr u32 MAX_CLUSTER = 4;
constexpr u64 SHARED_ALL = SHARED_SPACE * MAX_CLUSTER;
constexpr u64 CANARY = 0x5ca1ab1e0ddba11eull;

/// Eight columns of one row.
typedef float Row __attribute__((vector_size(32)));

/// What a thread or a warp stands at.
enum Call : u32 {
    RUNNING,
    BLOCK_BARRIER,
    CLUSTER_BARRIER,
    WARP_BARRIER,
    SHUFFLE,
    SHUFFLE_XOR,
    BALLOT,
    MMA,
    LOAD_MATRIX,
    LOAD_MATRIX_TRANSPOSED,
    PHASE,
    PRODUCT,
    PRODUCTS_WAIT,
};
static const char* const CALL_NAMES[] = {
    "running",     "block_barrier",  "cluster_barrier",           "warp_barrier", "shuffle",            "shuffle_xor",    "ballot",
    "mma_16x8x16", "load_matrix_x4", "load_matrix_x4_transposed", "barrier_wait", "warpgroup_multiply", "warpgroup_wait"};

/// A product of a warpgroup, of which this is a warp's part (warpgroup.h).
struct Product {
    u64 a, b;  // descriptors
    u32 half;  // accumulators of a lane
    bool add, across;
    u32 group;           // committed groups before its own
    float* d[WARP];      // each lane's accumulators
    bool reads[256];     // which KiB of shared memory
};

struct Warp {
    u32 arrived;  // lanes that stand at the collective
    u32 gone;     // lanes that have left the kernel, or never were
    u32 since;    // time of its last barrier
    Call call;
    u32 line;
    const void* place;
    alignas(64) u32 in[6][WARP];
    alignas(64) u32 out[4][WARP];
    alignas(64) float sum[4][WARP];
    const void* rows[WARP];
    float* sums[WARP];
    std::vector<Product> products;  // under way, of which the first `computed` have their results
    size_t computed;
    u32 issued;  // products in all
};

/// 16 bytes on their way into shared memory.
struct Copy {
    void* shared;
    const void* global;
    u32 group;  // committed groups before its own
    bool valid;
};

/// A box on its way from shared memory into a tensor.
struct Store {
    const u64* map;
    int row, col;
    u32 offset;
    bool done;
};

struct Block {
    SimIndex index;
    u32 rank;          // in its cluster
    u32 first;         // thread
    u32 stamp;         // for global memory (check.h)
    u32 since;         // time of its last barrier
    u64 window;        // where its shared memory begins
    u32 at_barrier, left;
    u32 barrier_line;
    const void* barrier_place;
};

struct Fiber {
    Context context;
    Warp* warp;
    Block* block;
    u32 thread, lane;  // counted through the cluster
    SimIndex index;
    Call call;  // what it waits at
    u32 line;
    const void* place;
    u32 groups;  // groups of asynchronous copies closed
    std::vector<Copy> copies;
    Clock* clock;         // null: knows of others what the block's and the warp's barriers tell
    u32 waits_for;        // the barrier, at PHASE
    u32 fences[8];        // times of its last fences between the proxies
    u32 product_groups;   // groups of products closed
    u64 dirty_low, dirty_high;  // what of its stack was written since its last warpgroup_fence
    std::vector<Store> stores;
};

/// A launch as the caller describes it.
struct SimLaunch {
    void (*entry)(u64* args);
    u64* args;
    const char* kernel;
    u64 seed;
    u32 grid[3], block[3];
    u32 words;    // of args
    u32 shared;   // bytes
    u32 cluster;  // blocks
};

struct Launch {
    SimLaunch spec;
    u32 threads, fibers;  // of a block, and of a cluster
    u32 stamp, limit;  // of its blocks: stamp + 1 + number, up to stamp + limit; the stamp itself stands for several
    u64 blocks;
    std::atomic<u64> next{0};
    std::atomic<bool> failed{false};
    std::mutex lock;
    std::string message;  // of the first fault
};

/// A barrier in shared memory (barrier.h).
struct SimBarrier {
    u32 offset, arrivals;
    u32 maker, made;  // who made it, and when
    u32 phase;        // phases that are over
    u32 pending;      // arrivals that this one still waits for
    long long bytes;  // expected and not yet there
    Clock* joining;   // what those that arrived knew
    Clock* told;      // what the last phase's end tells
    Clock *from, *to; // the last thread's clock that was told, and what it became
};

/// A box on its way into shared memory (box.h).
struct Box {
    u64 map[6];
    int row, col;
    u32 offset, bytes, barrier, thread;
};

/// What one call of warpgroup_multiply was, for the warps that come to it later.
struct Issue {
    u64 a, b;
    u32 half, line;
    bool add, across;
};

/// What runs blocks, one at a time, on one operating system thread.
struct Worker {
    Fiber* self;
    unsigned char* shared;
    u32 *written, *read;  // records of shared memory (check.h)
    Launch* launch;
    u32 now = 1;
    u32 since = 1, born = 1;  // times of the cluster's last barrier, and of its beginning
    unsigned char* stacks;
    Context home;
    u64 random;
    u32 ready_count;
    u32 at_barrier, left;  // of the cluster
    Block blocks[MAX_CLUSTER];
    u32 ready[MAX_THREADS];
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    std::vector<SimBarrier> barriers;
    std::vector<Box> boxes;
    std::vector<Issue> issues[MAX_THREADS / WARP / 4];
    bool asynchronous;  // whether anything below was ever not 0 in this block
    u32 reading[SHARED_ALL / 1024][MAX_THREADS / WARP];  // when a warp's products or stores last read this KiB
};

#ifdef __ELF__
static __thread Worker* current __attribute__((tls_model("initial-exec")));
#else
static __thread Worker* current;
#endif

// Workers are kept: their stacks are mapped, and warm.
static std::mutex idle_lock;
static std::vector<Worker*> idle;

static Worker* take_worker() {
    {
        std::lock_guard<std::mutex> guard(idle_lock);
        if (!idle.empty()) {
            Worker* worker = idle.back();
            idle.pop_back();
            return worker;
        }
    }
    Worker* worker = new (std::nothrow) Worker();
    if (!worker) return nullptr;
    worker->stacks = map_memory(MAX_THREADS * STACK_STRIDE);
    worker->shared = map_memory(SHARED_ALL);
    worker->written = reinterpret_cast<u32*>(map_memory(SHARED_ALL / 2 * sizeof(u32)));
    worker->read = reinterpret_cast<u32*>(map_memory(SHARED_ALL / 2 * sizeof(u32)));
    return worker->stacks && worker->shared && worker->written && worker->read ? worker : nullptr;
}

static void give_worker(Worker* worker) {
    std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(worker);
}

/// splitmix64.
static u64 draw(u64& state) {
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// -------------------------------------------------------------------------------------------------------------- faults

static std::string text(const char* format, ...) {
    char buffer[512];
    va_list list;
    va_start(list, format);
    vsnprintf(buffer, sizeof buffer, format, list);
    va_end(list);
    return buffer;
}

/// `[+0x12ab]`: an offset in the kernel's object, which the caller turns into file and line.
static std::string where(const void* place) {
    Dl_info info;
    if (!place || !dladdr(place, &info)) return "an unknown line";
    return text("[+0x%llx]", static_cast<u64>(static_cast<const char*>(place) - static_cast<const char*>(info.dli_fbase)));
}

/// Where thread or block `number` stands, of as many as `size` says along each axis.
static SimIndex index_of(u64 number, const u32 (&size)[3]) {
    return {static_cast<u32>(number % size[0]), static_cast<u32>(number / size[0] % size[1]),
            static_cast<u32>(number / size[0] / size[1])};
}

static std::string name(const char* kind, const SimIndex& index) {
    return text("%s (%u,%u,%u)", kind, index.x, index.y, index.z);
}

/// With its block where that is not the running thread's.
static std::string thread_name(const Fiber& fiber) {
    std::string own = name("thread", fiber.index);
    return fiber.block == current->self->block ? own : own + " of " + name("block", fiber.block->index);
}

/// The launch has failed; the first fault is kept.
static void note(Worker* worker, const std::string& what) {
    Launch& launch = *worker->launch;
    {
        std::lock_guard<std::mutex> guard(launch.lock);
        if (launch.message.empty()) launch.message = name("block", worker->self->block->index) + ", " + what;
    }
    launch.failed = true;
}

/// Notes a fault and leaves the block for good: its fibers are never resumed.
[[noreturn, gnu::cold, gnu::noinline]] static void fail(Worker* worker, const std::string& what) {
    note(worker, thread_name(*worker->self) + " " + what);
    Context nobody;
    context_switch(nobody, worker->home);
    __builtin_unreachable();
}

/// What a barrier's phase still waits for.
static std::string missing(const SimBarrier& barrier) {
    return text("%u more arrivals and %lld more bytes at the barrier at offset %u", barrier.pending, barrier.bytes, barrier.offset);
}

/// Nobody can go on: says where one of each kind waits.
[[noreturn, gnu::cold, gnu::noinline]] static void deadlock(Worker* worker) {
    std::string found;
    const Fiber* first = nullptr;
    for (u32 i = 0; i < worker->launch->fibers; i++) {
        const Fiber& fiber = worker->fibers[i];
        if (fiber.call == RUNNING) continue;  // it has left
        if (first && fiber.call == first->call && fiber.place == first->place) continue;
        if (!found.empty()) found += ", ";
        found += thread_name(fiber) + " waits at " + CALL_NAMES[fiber.call] + ", " + where(fiber.place);
        if (fiber.call == PHASE) found += " for " + missing(worker->barriers[fiber.waits_for]);
        if (first) break;
        first = &fiber;
    }
    fail(worker, "is the last to stop in a deadlock: " + found);
}

// ------------------------------------------------------------------------------------------------------------ scheduling

static u32 tick(Worker* worker);
static void forget_copy(Worker* worker, const Copy& copy);
static void land_box(Worker* worker, size_t which);
static void begin_asynchronous(Worker* worker);
static void end_asynchronous(Worker* worker);

static void resume(Worker* worker, Fiber* from) {
    // Boxes land as late as is legal: when nobody can go on without them.
    while (worker->ready_count == 0) {
        if (worker->boxes.empty()) deadlock(worker);
        land_box(worker, 0);
    }
    Fiber* next = &worker->fibers[worker->ready[--worker->ready_count]];
    worker->self = next;
    if (next == from) return;
    context_switch(from->context, next->context);
}

/// The running thread waits until somebody makes it ready.
static void park(Worker* worker, Fiber* self, Call call, u32 line, const void* place) {
    self->call = call, self->line = line, self->place = place;
    resume(worker, self);
    self->call = RUNNING;
}

/// Makes threads [first, first + count) ready but the running one: lower threads run first, or any order by the seed.
static void wake(Worker* worker, u32 first, u32 count) {
    u32 begin = worker->ready_count, own = worker->self->thread;
    for (u32 i = first + count; i-- > first;) {
        worker->ready[worker->ready_count] = i;
        worker->ready_count += i != own;
    }
    if (worker->launch->spec.seed == 0) return;
    for (u32 i = worker->ready_count; i-- > begin + 1;) {
        std::swap(worker->ready[i], worker->ready[begin + draw(worker->random) % (i - begin + 1)]);
    }
}

/// True in the last lane to arrive, which carries the collective out and calls `disperse`; the others wait for that.
static inline bool gather(Worker* worker, Warp& warp, Call call, u32 line, const void* place) {
    Fiber* self = worker->self;
    if (__builtin_expect(warp.gone != 0, 0)) {
        u32 lane = static_cast<u32>(__builtin_ctz(warp.gone));
        fail(worker, text("calls %s at ", CALL_NAMES[call]) + where(place) +
                         text(", expected all 32 lanes of its warp, found that lane %u has left the kernel", lane));
    }
    if (warp.arrived == 0) {
        warp.call = call, warp.line = line, warp.place = place;
    } else if (__builtin_expect(warp.call != call || warp.line != line, 0)) {
        fail(worker, text("calls %s at ", CALL_NAMES[call]) + where(place) + ", expected its whole warp at one call, found others at " +
                         CALL_NAMES[warp.call] + ", " + where(warp.place));
    }
    warp.arrived |= 1u << self->lane;
    if (warp.arrived == ~0u) return true;
    park(worker, self, call, line, place);
    return false;
}

static inline void disperse(Worker* worker, Warp& warp) {
    warp.arrived = 0;
    wake(worker, worker->self->thread - worker->self->lane, WARP);
}

static void fiber_entry() {
    Worker* worker = current;
    worker->launch->spec.entry(worker->launch->spec.args);
    Fiber* self = worker->self;
    Warp& warp = *self->warp;
    if (warp.arrived) {
        fail(worker, text("leaves the kernel while others of its warp wait at %s, ", CALL_NAMES[warp.call]) + where(warp.place));
    }
    if (self->block->at_barrier || worker->at_barrier) {
        for (u32 i = 0; i < worker->launch->fibers; i++) {
            const Fiber& other = worker->fibers[i];
            if ((other.call == BLOCK_BARRIER && other.block == self->block) || other.call == CLUSTER_BARRIER) {
                fail(worker, "leaves the kernel while " + thread_name(other) + text(" waits at %s, ", CALL_NAMES[other.call]) + where(other.place));
            }
        }
    }
    warp.gone |= 1u << self->lane;
    self->block->left++;
    worker->left++;
    if (worker->left == worker->launch->fibers) context_switch(self->context, worker->home);
    resume(worker, self);
}

/// With a seed clusters run backwards or forwards, beginning anywhere.
static u64 cluster_order(const Launch& launch, u64 turn) {
    u64 seed = launch.spec.seed, clusters = launch.blocks / launch.spec.cluster;
    if (seed == 0) return turn;
    u64 start = draw(seed) % clusters, direction = draw(seed) % 2;
    u64 number = (turn + start) % clusters;
    return direction ? clusters - 1 - number : number;
}

static void run_cluster(Worker* worker, u64 number) {
    Launch& launch = *worker->launch;
    const SimLaunch& spec = launch.spec;
    worker->born = worker->since = tick(worker);
    worker->random = spec.seed * 0x2545f4914f6cdd1dull + number;
    worker->ready_count = worker->at_barrier = worker->left = 0;
    for (u32 rank = 0; rank < spec.cluster; rank++) {
        u64 which = number * spec.cluster + rank;
        u32 stamp = launch.limit ? launch.stamp + 1 + static_cast<u32>(which) : 0;
        worker->blocks[rank] = Block{index_of(which, spec.grid), rank, rank * launch.threads, stamp, worker->now, rank * SHARED_SPACE, 0, 0, 0, nullptr};
        memset(worker->shared + rank * SHARED_SPACE, 0xff, spec.shared);  // NaN in bf16 and in f32
    }
    for (u32 t = 0; t < launch.fibers; t++) {
        Fiber& fiber = worker->fibers[t];
        fiber.block = &worker->blocks[t / launch.threads];
        fiber.warp = &worker->warps[t / WARP];
        fiber.thread = t, fiber.lane = t % WARP;
        fiber.index = index_of(t % launch.threads, spec.block);
        fiber.call = RUNNING, fiber.groups = fiber.product_groups = 0;
        fiber.copies.clear();
        fiber.dirty_low = ~0ull, fiber.dirty_high = 0;
        unsigned char* low = worker->stacks + t * STACK_STRIDE;
        memcpy(low, &CANARY, sizeof CANARY);
        context_make(fiber.context, low + 64, low + STACK, fiber_entry);
        if (fiber.lane == 0) fiber.warp->arrived = fiber.warp->gone = 0, fiber.warp->since = worker->now;
    }
    begin_asynchronous(worker);
    if (launch.threads % WARP) worker->warps[launch.threads / WARP].gone = ~0u << launch.threads % WARP;
    worker->self = &worker->fibers[0];
    wake(worker, 0, launch.fibers);
    context_switch(worker->home, worker->self->context);
    end_asynchronous(worker);
    for (u32 t = 0; t < launch.fibers; t++) {
        for (const Copy& copy : worker->fibers[t].copies) forget_copy(worker, copy);
        if (memcmp(worker->stacks + t * STACK_STRIDE, &CANARY, sizeof CANARY) != 0) {
            note(worker, thread_name(worker->fibers[t]) + text(" needs more than %llu bytes of stack", STACK));
        }
    }
}
