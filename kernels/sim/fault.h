// What a fault says: who, where, and which others.

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
