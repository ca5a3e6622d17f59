// The copy engine: boxes of matrices on their way into shared memory and out of it.
//
// A map is what SimDriver::tensor_map wrote: address, columns, rows, bytes from row to row, columns and rows of the box. In shared
// memory a box's rows are 128 bytes, whose chunks of 16 are permuted by the address: chunk c of the 128 bytes at a lies at
// c ^ (a / 128 % 8).

constexpr u64 ROW_BYTES = 128, CHUNK_BYTES = 16;

/// Where the chunk at `offset` of shared memory is put.
static u64 permuted(u64 offset) { return offset ^ (offset / ROW_BYTES % 8 * CHUNK_BYTES); }

/// Of chunk (row, chunk) of a box: where in the tensor it lies, and how many of its bytes; none outside of the matrix.
struct Piece {
    u64 from, bytes;
};

static Piece piece(const u64* map, long long row, long long col) {
    long long cols = static_cast<long long>(map[1]), rows = static_cast<long long>(map[2]), left = cols - col;
    if (row < 0 || row >= rows || col < 0 || left <= 0) return Piece{0, 0};
    u64 from = map[0] + static_cast<u64>(row) * map[3] + static_cast<u64>(col) * 2;
    return Piece{from, static_cast<u64>(left < 8 ? left : 8) * 2};
}

template <bool WRITES>
static void touch_box(Worker* worker, const u64* map, int row, int col, const void* place) {
    for (u64 i = 0; i < map[5]; i++) {
        for (u64 c = 0; c < map[4] / 8; c++) {
            Piece at = piece(map, row + static_cast<long long>(i), col + static_cast<long long>(c * 8));
            u64 offset = at.from - reinterpret_cast<u64>(arena.base);
            bool whole = at.bytes == 16 && offset % 16 == 0;  // a box may begin at any column
            if (whole) touch_global<16, WRITES>(worker, offset, place);
            for (u64 b = 0; !whole && b < at.bytes; b += 2) touch_global<2, WRITES>(worker, offset + b, place);
        }
    }
}

/// Where a box lies in shared memory, looked at.
static u32 box_at(Worker* worker, const void* shared, const u64* map, const char* call, const void* place) {
    u64 window = worker->self->block->window, bytes = map[5] * ROW_BYTES;
    u64 offset = reinterpret_cast<u64>(shared) - reinterpret_cast<u64>(worker->shared) - window;
    if (map[4] * 2 != ROW_BYTES) fail(worker, text("calls %s at ", call) + where(place) + ", expected a map of Driver::tensor_map");
    if (offset % ROW_BYTES || offset + bytes > worker->launch->spec.shared) {
        fail(worker, text("calls %s at ", call) + where(place) + text(", expected %llu bytes of shared memory from a multiple of 128 on, found offset %llu", bytes, offset));
    }
    return static_cast<u32>(offset + window);
}

/// A write to this KiB of shared memory: nobody's products and stores may be reading it without an order.
static void check_readers(Worker* worker, u64 offset, const void* place) {
    const Fiber* self = worker->self;
    const u32* readers = worker->reading[offset / 1024];
    for (u32 w = 0; w < (worker->launch->fibers + WARP - 1) / WARP; w++) {
        u32 time = readers[w];
        if (time == 0 || time < floor_of(worker, w * WARP)) continue;
        if (time < LAST_TIME) {
            if (w == self->thread / WARP) continue;
            // Each lane saw the products' end: whichever told of it will do.
            bool told = false;
            for (u32 i = 0; self->clock && i < WARP; i++) told |= time < self->clock->seen[w * WARP + i];
            if (told) continue;
        }
        fail(worker, "writes at " + where(place) + text(", offset %llu of shared memory, which products or stores of ", offset % SHARED_SPACE) +
                         thread_name(worker->fibers[w * WARP]) + "'s warp " +
                         (time < LAST_TIME ? "read: expected a barrier after its warpgroup_wait in between" : "still read: expected warpgroup_wait or store_wait, and a barrier, in between"));
    }
}

/// To the same place of block `rank` and its barrier there.
static void load_to(Worker* worker, void* shared, const u64* map, int row, int col, void* barrier_at, u32 rank, const char* call, const void* place) {
    SimBarrier& barrier = find_barrier(worker, barrier_at, rank, true, call, place);
    u32 own = static_cast<u32>(worker->self->block->window), bytes = static_cast<u32>(map[5] * ROW_BYTES);
    u32 offset = box_at(worker, shared, map, call, place) - own + static_cast<u32>(worker->blocks[rank].window);
    u32 written = 0, read = 0;
    for (u32 cell = offset / 2; cell < (offset + bytes) / 2; cell++) {
        if (cell % 512 == 0 || cell == offset / 2) check_readers(worker, cell * 2, place);
        if (worker->written[cell] == written && worker->read[cell] == read) continue;  // as the cell before
        written = worker->written[cell], read = worker->read[cell];
        if (!ordered(worker, written) || !ordered(worker, read)) shared_race(worker, cell * 2, 2, true, place);
    }
    for (u32 cell = offset / 2; cell < (offset + bytes) / 2; cell++) worker->written[cell] = LAST_TIME * TIME | IN_FLIGHT | worker->self->thread;
    Box box = {{}, row, col, offset, bytes, number(worker, barrier), worker->self->thread};
    memcpy(box.map, map, sizeof box.map);
    worker->boxes.push_back(box);
    if (worker->launch->spec.seed && draw(worker->random) % 4 == 0) land_box(worker, worker->boxes.size() - 1);  // at once
}

EXPORT void sim_load_box(void* shared, const u64* map, int row, int col, void* barrier) noexcept {
    Worker* worker = current;
    touch_box<false>(worker, map, row, col, PLACE);
    load_to(worker, shared, map, row, col, barrier, own_rank(worker), "load_box", PLACE);
}

EXPORT void sim_load_box_for_all(void* shared, const u64* map, int row, int col, void* barrier, u32 blocks) noexcept {
    Worker* worker = current;
    touch_box<false>(worker, map, row, col, PLACE);
    for (u32 rank = 0; rank < blocks; rank++) load_to(worker, shared, map, row, col, barrier, rank, "load_box_for_all", PLACE);
}

/// A box arrives: its bytes, and the news of them at its barrier.
static void land_box(Worker* worker, size_t which) {
    Box box = worker->boxes[which];
    worker->boxes.erase(worker->boxes.begin() + static_cast<long>(which));
    for (u64 at = 0; at < box.bytes; at += CHUNK_BYTES) {
        unsigned char* to = worker->shared + permuted(box.offset + at);
        Piece from = piece(box.map, box.row + static_cast<long long>(at / ROW_BYTES), box.col + static_cast<long long>(at % ROW_BYTES / 2));
        memset(to, 0, CHUNK_BYTES);
        memcpy(to, reinterpret_cast<const void*>(from.from), from.bytes);
    }
    SimBarrier& barrier = worker->barriers[box.barrier];
    u32 author = FIRST_BARRIER + box.barrier;
    for (u32 cell = box.offset / 2; cell < (box.offset + box.bytes) / 2; cell++) worker->written[cell] = worker->now * TIME | author;
    u32 now = tick(worker);
    begun(barrier.joining).learn(author, now);
    barrier.bytes -= box.bytes;
    end_phase(worker, barrier);
}

/// Reads shared memory in the copy engine's name, 16 bytes.
static void engine_reads(Worker* worker, u64 offset, const char* what, const void* place) {
    const u32* written = worker->written + offset / 2;
    u32 last = 0;
    for (u32 i = 0; i < 8; i++) {
        if (written[i] == last) continue;  // as the cell before
        last = written[i];
        if (!ordered(worker, last)) shared_race(worker, offset, 16, false, place);
        if (fenced(worker, last)) continue;
        fail(worker, text("%s at ", what) + where(place) + text(", offset %llu of shared memory, which ", (offset + 2 * i) % SHARED_SPACE) + thread_name(worker->fibers[last & 1023]) +
                         " wrote: expected its fence_async, and then a barrier, in between");
    }
}

static void deliver(Worker* worker, Store& store) {
    for (u64 at = 0; at < store.map[5] * ROW_BYTES; at += CHUNK_BYTES) {
        Piece to = piece(store.map, store.row + static_cast<long long>(at / ROW_BYTES), store.col + static_cast<long long>(at % ROW_BYTES / 2));
        memcpy(reinterpret_cast<void*>(to.from), worker->shared + permuted(store.offset + at), to.bytes);
    }
    store.done = true;
}

EXPORT void sim_store_box(const u64* map, int row, int col, const void* shared) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    u32 offset = box_at(worker, shared, map, "store_box", PLACE);
    touch_box<true>(worker, map, row, col, PLACE);
    for (u64 at = offset; at < offset + map[5] * ROW_BYTES; at += 16) {
        engine_reads(worker, at, "stores a box", PLACE);
        worker->reading[at / 1024][self->thread / WARP] = LAST_TIME;
    }
    worker->asynchronous = true;
    self->stores.push_back(Store{map, row, col, offset, false});
    if (worker->launch->spec.seed && draw(worker->random) % 2) deliver(worker, self->stores.back());  // as early as is legal
}

/// Stores read here: as late as is legal.
EXPORT void sim_store_wait() noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    for (Store& store : self->stores) {
        if (!store.done) deliver(worker, store);
        for (u64 at = store.offset; at < store.offset + store.map[5] * ROW_BYTES; at += 16) {
            worker->reading[at / 1024][self->thread / WARP] = 0;
            touch_shared<16, false>(worker, at, PLACE);
        }
    }
    self->stores.clear();
}
