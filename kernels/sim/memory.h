// Device memory: one reserved range of addresses, so that what is known of an address lies at a computed place.

constexpr u64 ARENA = 64ull << 30;
constexpr u64 PAGE = 4096;
constexpr u64 GRANULE = 256;  // what alloc aligns to
/// Behind each allocation lies nobody's memory, as much again, within these bounds.
constexpr u64 RED_LEAST = PAGE, RED_MOST = 1 << 20;

struct Region {
    u64 bytes;  // as asked
    u64 span;   // with what follows it
};

static struct Arena {
    unsigned char* base = nullptr;
    std::mutex lock;
    std::map<u64, u64> free;        // offset → bytes
    std::map<u64, Region> regions;  // by offset
} arena;

static unsigned char* map_memory(u64 bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
}

static u64 round_up(u64 value, u64 to) { return (value + to - 1) / to * to; }

/// Zeroed bytes, aligned to a page; 0 when there is no room.
static u64 allocate(u64 bytes) {
    std::lock_guard<std::mutex> guard(arena.lock);
    if (!arena.base) {
        arena.base = map_memory(ARENA);
        if (!arena.base) return 0;
        arena.free[0] = ARENA;
    }
    if (bytes > ARENA) return 0;
    u64 red = bytes < RED_LEAST ? RED_LEAST : bytes > RED_MOST ? RED_MOST : bytes;
    u64 span = round_up(bytes + red, PAGE);
    for (auto hole = arena.free.begin(); hole != arena.free.end(); ++hole) {
        if (hole->second < span) continue;
        u64 offset = hole->first, rest = hole->second - span;
        arena.free.erase(hole);
        if (rest) arena.free[offset + span] = rest;
        arena.regions[offset] = Region{bytes, span};
        return reinterpret_cast<u64>(arena.base) + offset;
    }
    return 0;
}

/// Gives the memory back to the system where that pays, and leaves zeros.
static void clear(u64 offset, u64 bytes) {
    unsigned char* start = arena.base + offset;
    if (bytes >= 64 * PAGE) {
        void* fresh = mmap(start, round_up(bytes, PAGE), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (fresh != MAP_FAILED) return;
    }
    memset(start, 0, bytes);
}

static void release(u64 address) {
    std::lock_guard<std::mutex> guard(arena.lock);
    u64 offset = address - reinterpret_cast<u64>(arena.base);
    auto found = arena.regions.find(offset);
    if (found == arena.regions.end()) return;
    u64 span = found->second.span;
    clear(offset, found->second.bytes);
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
