// Device memory: one reserved range of addresses, so that what is known of an address lies at a computed place.

constexpr u64 ARENA = 64ull << 30;
constexpr u64 PAGE = 4096;
constexpr u64 GRANULE = 256;  // what alloc aligns to
/// After each allocation lies nobody's memory, as much again, within these bounds.
constexpr u64 RED_LEAST = PAGE, RED_MOST = 1 << 20;

struct Region {
    u64 bytes;  // as asked
    u64 span;   // with what follows it
};

constexpr u32 NO_STAMP = ~0u;

static struct Arena {
    unsigned char* base = nullptr;
    u16* alive = nullptr;    // per granule: how many of its bytes are somebody's
    u32* written = nullptr;  // per two bytes: the stamp of the block that wrote last (check.h)
    u32* read = nullptr;     // … that read last
    u32 next_stamp = 1;
    u32 running = 0;  // launches
    std::mutex lock;
    std::map<u64, u64> free;        // offset → bytes
    std::map<u64, Region> regions;  // by offset
} arena;

static unsigned char* map_memory(u64 bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
}

static u64 round_up(u64 value, u64 to) { return (value + to - 1) / to * to; }

/// Reserves addresses; nothing is occupied before it is touched.
static bool open_arena() {
    if (arena.base) return true;
    arena.alive = reinterpret_cast<u16*>(map_memory(ARENA / GRANULE * sizeof(u16)));
    arena.written = reinterpret_cast<u32*>(map_memory(ARENA / 2 * sizeof(u32)));
    arena.read = reinterpret_cast<u32*>(map_memory(ARENA / 2 * sizeof(u32)));
    unsigned char* base = map_memory(ARENA);
    if (!arena.alive || !arena.written || !arena.read || !base) return false;
    arena.free[0] = ARENA;
    arena.base = base;
    return true;
}

/// Enters that these bytes are somebody's, or nobody's.
static void mark(u64 offset, u64 bytes, bool alive) {
    for (u64 at = 0; at < bytes; at += GRANULE) {
        u64 count = bytes - at < GRANULE ? bytes - at : GRANULE;
        arena.alive[(offset + at) / GRANULE] = static_cast<u16>(alive ? count : 0);
    }
}

/// Zeroed bytes, aligned to a page; 0 when there is no room.
static u64 allocate(u64 bytes) {
    std::lock_guard<std::mutex> guard(arena.lock);
    if (!open_arena()) return 0;
    if (bytes > ARENA) return 0;
    u64 red = bytes < RED_LEAST ? RED_LEAST : bytes > RED_MOST ? RED_MOST : bytes;
    u64 span = round_up(bytes + red, PAGE);
    for (auto hole = arena.free.begin(); hole != arena.free.end(); ++hole) {
        if (hole->second < span) continue;
        u64 offset = hole->first, rest = hole->second - span;
        arena.free.erase(hole);
        if (rest) arena.free[offset + span] = rest;
        arena.regions[offset] = Region{bytes, span};
        mark(offset, bytes, true);
        return reinterpret_cast<u64>(arena.base) + offset;
    }
    return 0;
}

/// Fresh zeros in place of whole pages, which go back to the system.
static bool renew(unsigned char* start, u64 bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap(start, round_up(bytes, PAGE), PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}

static void release(u64 address) {
    std::lock_guard<std::mutex> guard(arena.lock);
    u64 offset = address - reinterpret_cast<u64>(arena.base);
    auto found = arena.regions.find(offset);
    if (found == arena.regions.end()) return;
    u64 span = found->second.span;
    u64 bytes = found->second.bytes;
    if (bytes < 64 * PAGE || !renew(arena.base + offset, bytes)) memset(arena.base + offset, 0, bytes);
    mark(offset, bytes, false);
    arena.regions.erase(found);
    auto next = arena.free.lower_bound(offset);
    if (next != arena.free.end() && next->first == offset + span) {
        span += next->second;
        next = arena.free.erase(next);
    }
    if (next != arena.free.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
        std::prev(next)->second += span;
    } else {
        arena.free[offset] = span;
    }
}

/// The allocation around or before an offset; the end of the map when there is none.
static std::map<u64, Region>::iterator region_at(u64 offset) {
    auto next = arena.regions.upper_bound(offset);
    return next == arena.regions.begin() ? arena.regions.end() : std::prev(next);
}

/// Stamps for a launch's blocks, from numbers that no cell holds. When they are used up the cells are cleared, which waits
/// for a moment without launches; until then races between blocks go unseen.
static u32 take_stamps(u64 blocks) {
    if (arena.next_stamp + blocks + 1 > NO_STAMP) {
        if (arena.running || blocks + 2 > NO_STAMP) return NO_STAMP;
        renew(reinterpret_cast<unsigned char*>(arena.written), ARENA / 2 * sizeof(u32));
        renew(reinterpret_cast<unsigned char*>(arena.read), ARENA / 2 * sizeof(u32));
        arena.next_stamp = 1;
    }
    u32 first = arena.next_stamp;
    arena.next_stamp += static_cast<u32>(blocks) + 1;
    return first;
}
