// Whose turn it is: fibers that wait and are woken, and a cluster's run from its first fiber to its last.

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
        worker->blocks[rank] = Block{index_of(which, spec.grid), rank, rank * launch.threads, stamp, worker->now, rank * SHARED_SPACE, 0, 0, 0, nullptr, {}};
        memset(worker->shared + rank * SHARED_SPACE, 0xff, spec.shared);  // NaN in bf16 and in f32
    }
    for (u32 t = 0; t < launch.fibers; t++) {
        Fiber& fiber = worker->fibers[t];
        fiber.block = &worker->blocks[t / launch.threads];
        fiber.warp = &worker->warps[t / WARP];
        fiber.thread = t, fiber.lane = t % WARP;
        fiber.index = index_of(t % launch.threads, spec.block);
        fiber.early = worker->launch->spec.dependent != 0, fiber.registers = 0;
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
