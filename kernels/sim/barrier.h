// Barriers in shared memory: phases, and what threads tell each other through them.

static u32 number(const Worker* worker, const SimBarrier& barrier) { return static_cast<u32>(&barrier - worker->barriers.data()); }

/// Every thread knows what the block's barrier told it, and no more.
static void forget_clocks(Worker* worker) {
    for (u32 t = 0; t < worker->launch->fibers; t++) hold(worker->fibers[t].clock, nullptr);
    for (SimBarrier& barrier : worker->barriers) {
        for (Clock** clock : {&barrier.joining, &barrier.told, &barrier.from, &barrier.to}) hold(*clock, nullptr);
    }
    for (Block& block : worker->blocks) {
        for (NamedBarrier& barrier : block.named) hold(barrier.told, nullptr);
    }
}

/// Time begins anew: what was told is over, and what was made or read was so at its beginning.
static void forget_times(Worker* worker) {
    forget_clocks(worker);
    for (SimBarrier& barrier : worker->barriers) barrier.made = 0;
    for (u32 t = 0; t < worker->launch->fibers; t++) memset(worker->fibers[t].fences, 0, sizeof worker->fibers[t].fences);
    for (auto& readers : worker->reading) {
        for (u32& time : readers) time = time == LAST_TIME ? LAST_TIME : 0;
    }
}

/// At a barrier of the warp each lane learns what the others know.
static void share_clocks(Worker* worker, Warp& warp) {
    Fiber* lanes = worker->self - worker->self->lane;
    Clock* all = lanes[0].clock;
    bool same = true;
    for (u32 i = 1; i < WARP; i++) same &= lanes[i].clock == all;
    if (same) return;
    all = new Clock;
    for (u32 i = 0; i < WARP; i++) {
        if (lanes[i].clock) all->learn(*lanes[i].clock);
    }
    for (u32 i = 0; i < WARP; i++) hold(lanes[i].clock, all);
}

/// At a barrier of the block, too. What it did itself before all of it know without a clock; of a cluster's others it must be told.
static void share_block_clocks(Worker* worker, Block& block) {
    if (worker->launch->spec.cluster == 1) return forget_clocks(worker);
    Clock* all = new Clock;
    Fiber* fibers = worker->fibers + block.first;
    for (u32 t = 0; t < worker->launch->threads; t++) {
        if (fibers[t].clock && (t == 0 || fibers[t].clock != fibers[t - 1].clock)) all->learn(*fibers[t].clock);
        all->learn(block.first + t, block.since);
    }
    for (const SimBarrier& barrier : worker->barriers) {
        if (barrier.offset / SHARED_SPACE == block.rank) all->learn(FIRST_BARRIER + number(worker, barrier), block.since);
    }
    for (u32 t = 0; t < worker->launch->threads; t++) hold(fibers[t].clock, all);
}

static void begin_asynchronous(Worker* worker) {
    for (u32 t = 0; t < worker->launch->fibers; t++) memset(worker->fibers[t].fences, 0, sizeof worker->fibers[t].fences);
    worker->asynchronous = false;
}

EXPORT void sim_registers(u32 count) noexcept {
    current->asynchronous = true;
    current->self->registers = count;
}

/// Who asks for more than others have left waits for ever.
static void check_registers(Worker* worker, const Block& block) {
    constexpr u32 ALL = 65536;
    u32 threads = worker->launch->threads, begun = minimum(ALL / threads / 8 * 8, 248u), sum = 0;
    for (u32 t = block.first; t < block.first + threads; t++) {
        const Fiber &fiber = worker->fibers[t], &lead = worker->fibers[block.first + (t - block.first) / WARPGROUP * WARPGROUP];
        sum += fiber.registers ? fiber.registers : begun;
        if (fiber.registers == lead.registers) continue;
        worker->self = &worker->fibers[t];
        return note(worker, thread_name(fiber) + text(" asks for %u registers and ", fiber.registers) + thread_name(lead) +
                                text(" of its warpgroup for %u", lead.registers));
    }
    worker->self = &worker->fibers[block.first];
    if (sum > ALL) note(worker, text("waits for registers: %u are asked for by all threads together, of %u", sum, ALL));
}

/// Forgets what is under way, which none may be.
static void end_asynchronous(Worker* worker) {
    if (!worker->asynchronous) return;
    for (u32 rank = 0; rank < worker->launch->spec.cluster; rank++) check_registers(worker, worker->blocks[rank]);
    for (const SimBarrier& barrier : worker->barriers) {
        if (barrier.pending == barrier.arrivals && barrier.bytes == 0) continue;
        worker->self = &worker->fibers[worker->blocks[barrier.offset / SHARED_SPACE].first];
        note(worker, "ends while a phase waits for " + missing(barrier));
    }
    for (const Box& box : worker->boxes) {
        note(worker, "ends while a box that " + thread_name(worker->fibers[box.thread]) + " loads is under way");
        memset(worker->written + box.offset / 2, 0, box.bytes / 2 * sizeof(u32));
    }
    for (u32 t = 0; t < worker->launch->fibers; t++) {
        Fiber& fiber = worker->fibers[t];
        worker->self = &fiber;
        if (!fiber.stores.empty()) note(worker, "ends while a box that " + thread_name(fiber) + " stores is being read: expected store_wait");
        fiber.stores.clear();
        if (fiber.lane) continue;
        Warp& warp = *fiber.warp;
        if (!warp.products.empty()) note(worker, "ends while products of " + thread_name(fiber) + "'s warp are under way");
        if (warp.issued != worker->issues[t / WARPGROUP].size()) {
            note(worker, text("ends after %u products of ", warp.issued) + thread_name(fiber) +
                             text("'s warp, expected the %zu of its warpgroup", worker->issues[t / WARPGROUP].size()));
        }
        warp.products.clear();
        warp.computed = warp.issued = 0;
    }
    forget_clocks(worker);
    worker->barriers.clear();
    worker->boxes.clear();
    for (auto& issues : worker->issues) issues.clear();
    memset(worker->reading, 0, sizeof worker->reading);
}

static void fence(Worker* worker) {
    Fiber* self = worker->self;
    memmove(self->fences + 1, self->fences, sizeof self->fences - sizeof(u32));
    self->fences[0] = tick(worker);
}

/// Whether copy engine and tensor cores see what `record` wrote: by a fence of its writer, after it and ordered before now.
static bool fenced(const Worker* worker, u32 record) {
    u32 time = record / TIME, who = record & 1023;
    if (time < worker->born || is_barrier(worker, who)) return true;
    for (u32 fence : worker->fibers[who].fences) {
        if (time < fence && ordered(worker, (fence - 1) * TIME | who)) return true;
    }
    return false;
}

/// Through the cluster.
static u32 shared_offset(Worker* worker, const void* pointer) {
    return static_cast<u32>(static_cast<const unsigned char*>(pointer) - worker->shared);
}

/// The barrier at this address of block `rank`, made before.
static SimBarrier& find_barrier(Worker* worker, const void* pointer, u32 rank, bool engine, const char* call, const void* place) {
    if (rank >= worker->launch->spec.cluster) fail(worker, text("calls %s at ", call) + where(place) + text(", expected one of %u blocks, found %u", worker->launch->spec.cluster, rank));
    Block& owner = worker->blocks[rank];
    if (owner.left == worker->launch->threads) fail(worker, text("calls %s at ", call) + where(place) + ", expected a block that is there, found that " + name("block", owner.index) + " has left the kernel");
    for (SimBarrier& barrier : worker->barriers) {
        if (barrier.offset != shared_offset(worker, pointer) - worker->self->block->window + owner.window) continue;
        u32 record = barrier.made * TIME | barrier.maker;
        if (!ordered(worker, record)) fail(worker, text("calls %s at ", call) + where(place) + ", expected a barrier of the block after barrier_init");
        if (engine && !fenced(worker, record)) fail(worker, text("calls %s at ", call) + where(place) + ", expected barrier_ready after barrier_init");
        return barrier;
    }
    fail(worker, text("calls %s at ", call) + where(place) + ", expected a barrier of the block after barrier_init");
}

static u32 own_rank(const Worker* worker) { return worker->self->block->rank; }

static Clock& begun(Clock*& clock) {
    if (!clock) hold(clock, new Clock);
    return *clock;
}

/// Ends the phase if all has come; those that wait for it can go on.
static void end_phase(Worker* worker, SimBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    barrier.phase++;
    hold(barrier.told, barrier.joining);
    hold(barrier.joining, nullptr);
    hold(barrier.from, nullptr), hold(barrier.to, nullptr);
    u32 begin = worker->ready_count;
    for (u32 t = worker->launch->fibers; t-- > 0;) {
        Fiber& fiber = worker->fibers[t];
        if (fiber.call != PHASE || fiber.waits_for != number(worker, barrier)) continue;
        fiber.call = RUNNING;  // once, should another phase end before its turn comes
        worker->ready[worker->ready_count++] = t;
    }
    if (worker->launch->spec.seed == 0) return;
    for (u32 i = worker->ready_count; i-- > begin + 1;) {
        std::swap(worker->ready[i], worker->ready[begin + draw(worker->random) % (i - begin + 1)]);
    }
}

EXPORT void sim_barrier_init(void* at, u32 arrivals) noexcept {
    Worker* worker = current;
    touch<8, true>(at, PLACE);
    u32 offset = shared_offset(worker, at);
    if (offset >= SHARED_ALL || arrivals == 0 || worker->launch->fibers > FIRST_BARRIER || worker->barriers.size() == MAX_BARRIERS) {
        fail(worker, "makes a barrier at " + where(PLACE) + text(", expected one of at most %u in shared memory, and arrivals", MAX_BARRIERS));
    }
    worker->asynchronous = true;
    for (const SimBarrier& known : worker->barriers) {
        if (known.offset == offset) fail(worker, "makes a barrier at " + where(PLACE) + " where one is");
    }
    worker->barriers.push_back(SimBarrier{offset, arrivals, worker->self->thread, worker->now, 0, arrivals, 0, nullptr, nullptr, nullptr, nullptr});
}

EXPORT void sim_fence_async() noexcept { fence(current); }

static void arrive(Worker* worker, SimBarrier& barrier, const char* call, const void* place) {
    Fiber* self = worker->self;
    if (barrier.pending == 0) {
        fail(worker, text("calls %s at ", call) + where(place) + text(", expected %u arrivals in a phase, found one more", barrier.arrivals));
    }
    // What it did until now, and what it knows; of its warp's others what the warp's barrier told.
    u32 now = tick(worker);
    Clock& told = begun(barrier.joining);
    if (self->clock) told.learn(*self->clock);
    for (u32 i = 0; i < WARP; i++) told.learn(self->thread - self->lane + i, self->warp->since);
    told.learn(self->thread, now);
    barrier.pending--;
    end_phase(worker, barrier);
}

EXPORT void sim_barrier_arrive(void* at) noexcept {
    Worker* worker = current;
    arrive(worker, find_barrier(worker, at, own_rank(worker), false, "barrier_arrive", PLACE), "barrier_arrive", PLACE);
}

EXPORT void sim_barrier_arrive_at(void* at, u32 rank) noexcept {
    Worker* worker = current;
    arrive(worker, find_barrier(worker, at, rank, false, "barrier_arrive_at", PLACE), "barrier_arrive_at", PLACE);
}

EXPORT u32 sim_cluster_rank() noexcept { return own_rank(current); }

EXPORT void sim_cluster_barrier(u32 line) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    if (worker->left) {
        fail(worker, "calls cluster_barrier at " + where(PLACE) + text(", expected all threads of its cluster, found that %u have left the kernel", worker->left));
    }
    if (++worker->at_barrier < worker->launch->fibers) return park(worker, self, CLUSTER_BARRIER, line, PLACE);
    worker->at_barrier = 0;
    worker->since = tick(worker);
    for (Block& block : worker->blocks) block.since = worker->since;
    forget_clocks(worker);
    wake(worker, 0, worker->launch->fibers);
}

EXPORT void sim_named_barrier(u32 which, u32 threads, u32 line) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    Block& block = *self->block;
    if (which == 0 || which > 15 || threads == 0 || threads % WARP || threads > worker->launch->threads) {
        fail(worker, "calls named_barrier at " + where(PLACE) + text(", expected a name of 1 to 15 and whole warps of the block, found %u and %u threads", which, threads));
    }
    NamedBarrier& barrier = block.named[which];
    if (barrier.warps && barrier.threads != threads) {
        fail(worker, "calls named_barrier at " + where(PLACE) + text(", expected as many threads as others that are there, %u, found %u", barrier.threads, threads));
    }
    worker->asynchronous = true;
    Warp& warp = *self->warp;
    warp.in[0][self->lane] = which;
    if (!gather(worker, warp, NAMED_BARRIER, line, PLACE)) return;
    for (u32 name : warp.in[0]) {
        if (name != which) fail(worker, "calls named_barrier at " + where(PLACE) + text(", expected one name in all lanes of a warp, found %u and %u", name, which));
    }
    warp.arrived = 0;
    warp.since = tick(worker);
    Clock& told = begun(barrier.told);
    const Fiber* lanes = self - self->lane;
    for (u32 i = 0; i < WARP; i++) {
        if (lanes[i].clock) told.learn(*lanes[i].clock);
        told.learn(lanes[i].thread, warp.since);
    }
    barrier.threads = threads, barrier.warps |= 1u << (self->thread - block.first) / WARP;
    if (static_cast<u32>(__builtin_popcount(barrier.warps)) * WARP < threads) return park(worker, self, NAMED_BARRIER, line, PLACE);
    for (u32 warps = barrier.warps; warps; warps &= warps - 1) {
        u32 first = block.first + static_cast<u32>(__builtin_ctz(warps)) * WARP;
        for (u32 t = first; t < first + WARP; t++) hold(worker->fibers[t].clock, barrier.told);
        wake(worker, first, WARP);
    }
    barrier.warps = 0;
    hold(barrier.told, nullptr);
}

EXPORT void sim_barrier_expect(void* at, u32 bytes) noexcept {
    Worker* worker = current;
    SimBarrier& barrier = find_barrier(worker, at, own_rank(worker), false, "barrier_expect", PLACE);
    barrier.bytes += bytes;
    arrive(worker, barrier, "barrier_expect", PLACE);
}

EXPORT void sim_barrier_wait(void* at, u32 parity) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    SimBarrier& barrier = find_barrier(worker, at, own_rank(worker), false, "barrier_wait", PLACE);
    if (worker->launch->spec.seed && !worker->boxes.empty() && draw(worker->random) % 4 == 0) {
        land_box(worker, draw(worker->random) % worker->boxes.size());  // out of order, too
    }
    self->waits_for = number(worker, barrier);
    while (barrier.phase % 2 == parity % 2) park(worker, self, PHASE, 0, PLACE);
    if (!barrier.told || barrier.told == self->clock) return;
    // Threads that knew the same, of which there are many, know the same again.
    if (!barrier.to || barrier.from != self->clock) {
        Clock* both = barrier.told;
        if (self->clock) {
            both = new Clock(*self->clock);
            both->holders = 0;
            both->learn(*barrier.told);
        }
        hold(barrier.from, self->clock), hold(barrier.to, both);
    }
    hold(self->clock, barrier.to);
}
