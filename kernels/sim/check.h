// Every access of a kernel, watched. The compiler calls the hooks below (-fsanitize=thread, linked without its library)
// before each load and store; collectives and asynchronous copies call `touch` themselves.
//
// Global memory: the address must lie in a live allocation, each with nobody's memory around it. Per two bytes a stamp
// tells which block of which launch wrote last and which read last: blocks of one launch have no order, so that any other
// block's access beside a write is a race.
//
// Shared memory: per two bytes one record of the last writer and one of the last reader,
//   time (20 bits) | kind (2 bits) | thread (10 bits).
// Time is a counter of the block's barriers, whether of a warp or of all. A record older than the last block barrier is
// ordered before everything that follows; one of the own warp, if it is older than the warp's last barrier. Two accesses
// without order, one of them writing, are a race. `now` never falls back between blocks, so nothing need be cleared.
// Where those two are not enough, what threads told each other at barriers of shared memory decides (clock.h).

#define INLINE static inline __attribute__((always_inline))

// Kinds: one thread; several lanes of a warp; several warps; a copy under way.
constexpr u32 ONE = 0, LANES = 1u << 10, WARPS = 2u << 10, IN_FLIGHT = 3u << 10;
constexpr u32 TIME = 1u << 12, WHO = TIME - 1, LAST_TIME = (1u << 20) - 1;
constexpr u32 SAME_WARP = 0xbe0;  // the kind's upper bit, and the thread without its lane

// The records of one access are looked at together: the same formulas over masks of all bits or none.
template <u32 BYTES>
struct Cells {
    typedef u32 Type __attribute__((vector_size(2 * BYTES)));
};
template <>
struct Cells<2> {
    typedef u32 Type;
};
template <>
struct Cells<1> {
    typedef u32 Type;
};

INLINE u32 at_least(u32 a, u32 b) { return 0u - static_cast<u32>(a >= b); }
INLINE u32 nonzero(u32 a) { return 0u - static_cast<u32>(a != 0); }
INLINE bool any(u32 a) { return a != 0; }
template <class T>
INLINE T at_least(T a, u32 b) {
    return reinterpret_cast<T>(a >= (T{} | b));
}
template <class T>
INLINE T nonzero(T a) {
    return reinterpret_cast<T>(a != T{});
}
template <class T>
INLINE bool any(T a) {
    u64 parts[sizeof(T) / 8], sum = 0;
    memcpy(parts, &a, sizeof a);
    for (u64 part : parts) sum |= part;
    return sum != 0;
}

template <class T>
INLINE T load(const u32* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
INLINE void store(u32* to, T value) {
    memcpy(to, &value, sizeof value);
}

static std::string access_name(bool writes, u64 bytes, const void* place) {
    return text("%s %llu bytes at ", writes ? "writes" : "reads", bytes) + where(place) + ", ";
}

// ----------------------------------------------------------------------------------------------------------- global memory

/// `parameter 3 (1024 bytes)`.
static std::string region_name(const SimLaunch& spec, u64 start, const Region& region) {
    for (u32 i = 0; i < spec.words; i++) {
        if (spec.args[i] == reinterpret_cast<u64>(arena.base) + start) {
            return text("parameter %u (%llu bytes)", i + 1, region.bytes);
        }
    }
    return text("a tensor that is no parameter (%llu bytes)", region.bytes);
}

[[noreturn, gnu::cold, gnu::noinline]] static void out_of_bounds(Worker* worker, u64 offset, u64 bytes, bool writes, const void* place) {
    std::string what = access_name(writes, bytes, place);
    {
        std::lock_guard<std::mutex> guard(arena.lock);
        auto found = region_at(offset);
        auto next = arena.regions.upper_bound(offset);
        const SimLaunch& spec = worker->launch->spec;
        bool has = found != arena.regions.end(), has_next = next != arena.regions.end();
        u64 past = has ? offset + bytes - found->first - found->second.bytes : ~0ull;
        u64 before = has_next ? next->first - offset : ~0ull;
        if (has && past <= before) {
            what += text("%llu bytes past the end of ", past) + region_name(spec, found->first, found->second);
        } else if (has_next) {
            what += text("%llu bytes before the start of ", before) + region_name(spec, next->first, next->second);
        } else {
            what += "where no tensor is";
        }
    }
    fail(worker, what);
}

[[noreturn, gnu::cold, gnu::noinline]] static void global_race(Worker* worker, u64 offset, u64 bytes, bool writes, const void* place) {
    const Launch& launch = *worker->launch;
    std::string what = access_name(writes, bytes, place);
    for (u64 cell = offset / 2; cell < (offset + bytes + 1) / 2; cell++) {
        const u32 stamps[] = {arena.written[cell], arena.read[cell]};
        for (u32 i = 0; i < (writes ? 2 : 1); i++) {
            u32 block = stamps[i] - launch.stamp;
            if (block > launch.limit || stamps[i] == worker->self->block->stamp) continue;
            what += block == 0 ? "which several blocks" : "which " + name("block", index_of(block - 1, launch.spec.grid));
            what += i == 0 ? " of this launch wrote: " : " of this launch read: ";
            std::lock_guard<std::mutex> guard(arena.lock);
            auto found = region_at(offset);
            if (found != arena.regions.end()) {
                what += text("offset %llu of ", cell * 2 - found->first) + region_name(launch.spec, found->first, found->second);
            }
            cell = (offset + bytes + 1) / 2;
            break;
        }
    }
    fail(worker, what + "; blocks of a launch have no order");
}

/// Looks at the stamps of an access, then leaves its own; whether another block's is among them.
template <class T, bool WRITES>
INLINE bool stamp(u32* written, u32* read, u32 first, u32 limit, u32 mine) {
    T w = load<T>(written), r = load<T>(read);
    T others = ~at_least(r - first, limit + 1) & nonzero(r ^ mine);
    T bad = ~at_least(w - first, limit + 1) & nonzero(w ^ mine);
    if (WRITES) bad |= others;
    if (__builtin_expect(any(bad), 0)) return true;
    if (WRITES) {
        store(written, T{} | mine);
    } else {
        store(read, (others & first) | (~others & mine));
    }
    return false;
}

[[noreturn, gnu::cold, gnu::noinline]] static void too_early(Worker* worker, u64 bytes, bool writes, const void* place) {
    fail(worker, access_name(writes, bytes, place) + "global memory that the launch before may still be at work on: expected after_previous() first");
}

template <u32 BYTES, bool WRITES>
INLINE void touch_global(Worker* worker, u64 offset, const void* place) {
    const Launch& launch = *worker->launch;
    if (__builtin_expect(worker->self->early, 0)) too_early(worker, BYTES, WRITES, place);
    if (__builtin_expect(offset % GRANULE + BYTES > arena.alive[offset / GRANULE], 0)) {
        out_of_bounds(worker, offset, BYTES, WRITES, place);
    }
    u32 *written = arena.written + offset / 2, *read = arena.read + offset / 2;
    bool bad = stamp<typename Cells<BYTES>::Type, WRITES>(written, read, launch.stamp, launch.limit, worker->self->block->stamp);
    if (__builtin_expect(bad, 0)) global_race(worker, offset, BYTES, WRITES, place);
}

// ----------------------------------------------------------------------------------------------------------- shared memory

/// Whether records and an access of `mine` have no order, as a mask.
template <class T>
INLINE T unordered(T records, u32 mine, u32 block_limit, u32 warp_limit) {
    T differs = records ^ mine;
    return at_least(records, block_limit) & nonzero(differs & WHO) & (nonzero(differs & SAME_WARP) | at_least(records, warp_limit));
}

/// Blocks without barriers may have as many threads as there are parties.
static bool is_barrier(const Worker* worker, u32 party) { return party >= FIRST_BARRIER && !worker->barriers.empty(); }

/// From when on the running thread need be told what this party did: the last barrier of the block that both are of, else of the
/// cluster.
static u32 floor_of(const Worker* worker, u32 party) {
    const Fiber* self = worker->self;
    const Block* block = is_barrier(worker, party) ? &worker->blocks[worker->barriers[party - FIRST_BARRIER].offset / SHARED_SPACE]
                                                   : worker->fibers[party].block;
    return block == self->block ? block->since : worker->since;
}

/// Whether what the record tells is ordered before what the running thread does now.
static bool ordered(const Worker* worker, u32 record) {
    const Fiber* self = worker->self;
    u32 time = record / TIME, kind = record & IN_FLIGHT, who = record & 1023;
    if (kind == IN_FLIGHT) return false;
    if (time < worker->born || (kind == ONE && who == self->thread)) return true;
    if (time < floor_of(worker, who)) return true;
    if (kind == WARPS) return false;  // whom of all: the block's barrier alone orders them
    if (who / WARP == self->thread / WARP && time < self->warp->since) return true;
    if (!self->clock) return false;
    u32 first = kind == ONE ? who : who / WARP * WARP, end = kind == ONE ? who + 1 : first + WARP;
    for (u32 party = first; party < end; party++) {
        if (party != self->thread && time >= self->clock->seen[party]) return false;
    }
    return true;
}

[[noreturn, gnu::cold, gnu::noinline]] static void shared_race(Worker* worker, u64 offset, u64 bytes, bool writes, const void* place, u32 as = ONE) {
    std::string what = access_name(writes, bytes, place);
    u32 mine = worker->now * TIME | as | worker->self->thread;
    u32 block_limit = worker->self->block->since * TIME, warp_limit = worker->self->warp->since * TIME;
    for (u64 cell = offset / 2; cell < (offset + bytes + 1) / 2; cell++) {
        auto bad = [&](u32 record) {
            return as == ONE ? !ordered(worker, record) : any(unordered(record, mine, block_limit, warp_limit));
        };
        bool written = bad(worker->written[cell]), read = writes && bad(worker->read[cell]);
        if (!written && !read) continue;
        u32 record = written ? worker->written[cell] : worker->read[cell], kind = record & IN_FLIGHT, who = record & 1023;
        what += text("offset %llu of shared memory, which ", cell * 2 % SHARED_SPACE);
        if (is_barrier(worker, who)) fail(worker, what + "a box was loaded into: expected barrier_wait at its barrier in between");
        std::string other = thread_name(worker->fibers[who]);
        for (const Box& box : worker->boxes) {
            if (cell * 2 - box.offset >= box.bytes) continue;
            fail(worker, what + "a box that " + other + " loads is still writing: expected barrier_wait at its barrier in between");
        }
        if (kind == IN_FLIGHT) {
            fail(worker, what + "an asynchronous copy of " + other + " is still writing: expected copy_async_wait and a barrier in between");
        }
        if (kind != ONE) other = "several threads, one of them " + other + ",";
        fail(worker, what + other + (written ? " wrote" : " read") + ": expected a barrier in between");
    }
    fail(worker, what + "shared memory that another thread uses");
}

[[noreturn, gnu::cold, gnu::noinline]] static void past_shared(Worker* worker, u64 offset, u64 bytes, bool writes, const void* place) {
    fail(worker, access_name(writes, bytes, place) + text("offset %llu of shared memory, expected the %u bytes of the launch", offset % SHARED_SPACE,
                                                          worker->launch->spec.shared));
}

/// Looks at the records of an access, then leaves its own; whether it has no order with one of them.
template <class T, bool WRITES>
INLINE bool record(u32* written, u32* read, u32 mine, u32 block_limit, u32 warp_limit) {
    T r = load<T>(read), bad = unordered(load<T>(written), mine, block_limit, warp_limit);
    if (WRITES) bad |= unordered(r, mine, block_limit, warp_limit);
    if (__builtin_expect(any(bad), 0)) return true;
    if (WRITES) {
        store(written, T{} | mine);
        return false;
    }
    // Readers that have no order are kept as a crowd: a later writer must have one with all of them.
    T differs = r ^ mine, others = nonzero(differs & SAME_WARP);
    T crowd = (others & WARPS) | (~others & at_least(r, warp_limit) & LANES);
    store(read, (crowd & at_least(r, block_limit) & nonzero(differs & WHO)) | mine);
    return false;
}

/// An access that has no order by the barriers of block and warp with all others: has it one by what threads told each other?
[[gnu::noinline]] static void settle_shared(Worker* worker, u64 offset, u64 bytes, bool writes, const void* place) {
    u32 mine = worker->now * TIME | worker->self->thread;
    u64 end = (offset + bytes + 1) / 2;
    for (u64 cell = offset / 2; cell < end; cell++) {
        if (!ordered(worker, worker->written[cell]) || (writes && !ordered(worker, worker->read[cell]))) {
            shared_race(worker, offset, bytes, writes, place);
        }
    }
    for (u64 cell = offset / 2; cell < end; cell++) {
        u32& read = worker->read[cell];
        if (writes) {
            worker->written[cell] = mine;
        } else {
            read = ordered(worker, read) ? mine : ((read ^ mine) & SAME_WARP ? WARPS : LANES) | mine;
        }
    }
}

static void check_readers(Worker* worker, u64 offset, const void* place);

template <u32 BYTES, bool WRITES>
INLINE void touch_shared(Worker* worker, u64 offset, const void* place) {
    const Fiber* self = worker->self;
    if (__builtin_expect(offset - self->block->window + BYTES > worker->launch->spec.shared, 0)) past_shared(worker, offset, BYTES, WRITES, place);
    u32 mine = worker->now * TIME | self->thread;
    u32 block_limit = self->block->since * TIME, warp_limit = self->warp->since * TIME;
    u32 *written = worker->written + offset / 2, *read = worker->read + offset / 2;
    bool bad = record<typename Cells<BYTES>::Type, WRITES>(written, read, mine, block_limit, warp_limit);
    if (__builtin_expect(bad, 0)) settle_shared(worker, offset, BYTES, WRITES, place);
    if (WRITES && __builtin_expect(worker->asynchronous, 0)) check_readers(worker, offset, place);
}

/// An addition that others may make at the same time: they are a crowd of writers, and anything else needs a barrier between.
static void touch_added(Worker* worker, const void* pointer, const void* place) {
    u64 offset = reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(worker->shared);
    if (offset >= SHARED_ALL) fail(worker, "adds at " + where(place) + ", expected an address in shared memory");
    if (offset - worker->self->block->window + 4 > worker->launch->spec.shared) past_shared(worker, offset, 4, true, place);
    u32 mine = worker->now * TIME | WARPS | worker->self->thread;
    u32 block_limit = worker->self->block->since * TIME, warp_limit = worker->self->warp->since * TIME;
    for (u64 cell = offset / 2; cell < offset / 2 + 2; cell++) {
        u32& written = worker->written[cell];
        bool other = (written & IN_FLIGHT) != WARPS && any(unordered(written, mine, block_limit, warp_limit));
        if (other || any(unordered(worker->read[cell], mine, block_limit, warp_limit))) shared_race(worker, offset, 4, true, place, WARPS);
        written = mine;
    }
}

/// Marks 16 bytes of shared memory as being written by a copy under way, or as written by it now.
static void mark_copy(Worker* worker, u64 offset, bool landed) {
    u32 thread = worker->self->thread;
    u32 record = landed ? worker->now * TIME | thread : LAST_TIME * TIME | IN_FLIGHT | thread;
    for (u64 i = 0; i < 8; i++) worker->written[offset / 2 + i] = record;
}

/// A copy that nobody waited for ends with its block.
static void forget_copy(Worker* worker, const Copy& copy) {
    u64 offset = static_cast<u64>(static_cast<unsigned char*>(copy.shared) - worker->shared);
    memset(worker->written + offset / 2, 0, 8 * sizeof(u32));
}

static void forget_times(Worker* worker);

/// A barrier's end: what follows it is later than what came before.
INLINE u32 tick(Worker* worker) {
    if (__builtin_expect(++worker->now < LAST_TIME - 1, 1)) return worker->now;
    // Time is used up: forget all of it. (An order that was missing across this moment goes unseen.)
    memset(worker->written, 0, SHARED_ALL / 2 * sizeof(u32));
    memset(worker->read, 0, SHARED_ALL / 2 * sizeof(u32));
    for (Warp& warp : worker->warps) warp.since = 1;
    for (Block& block : worker->blocks) block.since = 1;
    worker->born = worker->since = 1;
    forget_times(worker);
    return worker->now = 1;
}

// ------------------------------------------------------------------------------------------------------ any other address

/// The own stack, the launch's argument words, and constants of the kernel's file may be used; nothing else.
static void touch_other(Worker* worker, const void* pointer, u64 bytes, bool writes, const void* place) {
    const unsigned char* p = static_cast<const unsigned char*>(pointer);
    const unsigned char* stack = worker->stacks + worker->self->thread * STACK_STRIDE;
    if (p >= stack && p + bytes <= stack + STACK) return;
    const SimLaunch& spec = worker->launch->spec;
    const unsigned char* words = reinterpret_cast<const unsigned char*>(spec.args);
    if (!writes && p >= words && p + bytes <= words + spec.words * sizeof(u64)) return;
    Dl_info kernel, owner;
    bool known = dladdr(reinterpret_cast<void*>(spec.entry), &kernel) && dladdr(pointer, &owner);
    if (!writes && known && kernel.dli_fbase == owner.dli_fbase) return;
    for (u32 t = 0; t < worker->launch->fibers; t++) {
        stack = worker->stacks + t * STACK_STRIDE;
        if (p >= stack && p < stack + STACK) {
            fail(worker, access_name(writes, bytes, place) + "a variable of " + thread_name(worker->fibers[t]));
        }
    }
    fail(worker, access_name(writes, bytes, place) + text("address 0x%llx: neither a tensor nor shared memory", reinterpret_cast<u64>(p)));
}

/// A local array whose address is known to others: the accumulators of products under way are not to be touched.
INLINE void touch_stack(Worker* worker, u64 address, u64 bytes, bool writes, const void* place) {
    Fiber* self = worker->self;
    if (writes) {
        if (address < self->dirty_low) self->dirty_low = address;
        if (address + bytes > self->dirty_high) self->dirty_high = address + bytes;
    }
    for (const Product& product : self->warp->products) {
        auto meets = [&](const void* from, u64 size) {
            u64 low = reinterpret_cast<u64>(from);
            return address + bytes > low && address < low + size;
        };
        bool left = writes && product.left[self->lane] && meets(product.left[self->lane], 16);
        if (!left && !meets(product.d[self->lane], product.half * sizeof(float))) continue;
        fail(worker, access_name(writes, bytes, place) + (left ? "an operand" : "an accumulator") + " of a product under way: expected warpgroup_wait in between");
    }
}

template <u32 BYTES, bool WRITES>
INLINE void touch(const void* pointer, const void* place) {
    Worker* worker = current;
    u64 offset = reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(arena.base);
    if (offset < ARENA) return touch_global<BYTES, WRITES>(worker, offset, place);
    offset = reinterpret_cast<u64>(pointer) - reinterpret_cast<u64>(worker->shared);
    if (offset < SHARED_ALL) return touch_shared<BYTES, WRITES>(worker, offset, place);
    const unsigned char* stack = worker->stacks + worker->self->thread * STACK_STRIDE;
    if (static_cast<u64>(static_cast<const unsigned char*>(pointer) - stack) < STACK - BYTES) {
        return touch_stack(worker, reinterpret_cast<u64>(pointer), BYTES, WRITES, place);
    }
    touch_other(worker, pointer, BYTES, WRITES, place);
}

template <bool WRITES>
static void touch_range(const void* pointer, u64 bytes, const void* place) {
    const unsigned char* p = static_cast<const unsigned char*>(pointer);
    for (; bytes >= 2; p += 2, bytes -= 2) touch<2, WRITES>(p, place);
    if (bytes) touch<1, WRITES>(p, place);
}
