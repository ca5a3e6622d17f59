// One thread block, or the few of a cluster: their fibers and warps, and what is under way.

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
    NAMED_BARRIER,
    WARP_BARRIER,
    SHUFFLE,
    SHUFFLE_XOR,
    BALLOT,
    MMA,
    LOAD_MATRIX,
    LOAD_MATRIX_TRANSPOSED,
    STORE_MATRIX,
    PHASE,
    PRODUCT,
    PRODUCTS_WAIT,
};
static const char* const CALL_NAMES[] = {
    "running",         "block_barrier",     "cluster_barrier", "named_barrier",  "warp_barrier",
    "shuffle",         "shuffle_xor",       "ballot",          "mma_16x8x16",    "load_matrix_x4",
    "load_matrix_x4_transposed", "store_matrix_x4", "barrier_wait", "warpgroup_multiply", "warpgroup_wait"};

/// A product of a warpgroup, of which this is a warp's part (warpgroup.h).
struct Product {
    u64 a, b;  // descriptors
    u32 half;  // accumulators of a lane
    bool add, across;
    u32 group;              // committed groups before its own
    const u32* left[WARP];  // each lane's part of a, unless it lies in shared memory
    float* d[WARP];         // each lane's accumulators
    bool reads[256];        // which KiB of shared memory
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
    void* rows[WARP];
    float* sums[WARP];
    const u32* left[WARP];
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

/// Some of a block's warps meet at it.
struct NamedBarrier {
    u32 threads, warps;  // expected; bit w: the block's warp w has come
    Clock* told;
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
    NamedBarrier named[16];
};

struct Fiber {
    Context context;
    Warp* warp;
    Block* block;
    u32 thread, lane;  // counted through the cluster
    bool early;        // the launch before this one may still be running
    u32 registers;     // that it asked for last; 0: those that it began with
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
    u32 dependent;  // 1: begins before the launch before it has ended
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
