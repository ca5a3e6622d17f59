// Products of a warpgroup. Each warp computes its 16 rows when it waits for them, reading operands then: as late as is legal.

/// An operand as its descriptor has it; all of it is decoded, and what no kernel uses is refused.
struct Operand {
    u64 start, leading, stride;
    bool fits;
};

static Operand decode(u64 descriptor) {
    auto field = [&](u32 shift) { return (descriptor >> shift & 0x3fff) << 4; };
    // Base offset 0, rows of 128 bytes, nothing else set.
    bool fits = (descriptor & ~0x3fff'3fff'3fffull) == 1ull << 62;
    return Operand{field(0), field(16), field(32), fits};
}

/// Where the 16 bytes from (outer, k) on lie: along k eight elements of k, across eight of `outer` (a row of a, a column of b).
static u64 chunk_at(const Operand& operand, bool across, u64 outer, u64 k) {
    u64 along = outer / 8 * operand.stride + outer % 8 * ROW_BYTES + k * 2;
    u64 over = outer / 64 * operand.leading + outer % 64 * 2 + k / 8 * operand.stride + k % 8 * ROW_BYTES;
    return permuted(operand.start + (across ? over : along));
}

/// Calls `use` for each chunk of `count` outer elements by 16 of k.
template <typename Use>
static void chunks(u64 descriptor, bool across, u64 first, u64 count, Use use) {
    Operand operand = decode(descriptor);
    u64 outer_step = across ? 8 : 1, k_step = across ? 1 : 8;
    for (u64 outer = 0; outer < count; outer += outer_step) {
        for (u64 k = 0; k < 16; k += k_step) use(outer, k, chunk_at(operand, across, first + outer, k));
    }
}

/// Register r of a lane's part of a 16 × 16 left operand.
static void put_left(float (&a)[16][16], u32 lane, u32 r, u32 pair) {
    u32 row = lane / 4 + r % 2 * 8, col = lane % 4 * 2 + r / 2 * 8;
    a[row][col] = low_float(pair), a[row][col + 1] = high_float(pair);
}

/// d (16 rows of the warp × N) += a · b.
static void compute(Worker* worker, Product& product, u32 warp_row) {
    float a[16][16];
    Row b[32][16];  // 256 columns, eight at a time
    auto value = [&](u64 at, u64 i) {
        u16 bits;
        memcpy(&bits, worker->shared + worker->self->block->window + at + 2 * i, 2);
        return low_float(bits);
    };
    if (product.left[0]) {
        for (u32 i = 0; i < 4 * WARP; i++) put_left(a, i / 4, i % 4, product.left[i / 4][i % 4]);
    } else {
        chunks(product.a, false, warp_row, 16, [&](u64 row, u64 k, u64 at) {
            for (u64 i = 0; i < 8; i++) a[row][k + i] = value(at, i);
        });
    }
    chunks(product.b, product.across, 0, product.half * 2, [&](u64 col, u64 k, u64 at) {
        for (u64 i = 0; i < 8; i++) {
            u64 c = product.across ? col + i : col;
            b[c / 8][product.across ? k : k + i][c % 8] = value(at, i);
        }
    });
    for (u32 j = 0; j < product.half / 4; j++) {
        Row d[16];
        for (u32 lane = 0; lane < WARP; lane++) {
            for (u32 e = 0; e < 4; e++) {
                d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = product.add ? product.d[lane][4 * j + e] : 0.0f;
            }
        }
        for (u32 i = 0; i < 16; i++) d[i] = add_products(d[i], a[i], b[j], true);
        for (u32 lane = 0; lane < WARP; lane++) {
            for (u32 e = 0; e < 4; e++) product.d[lane][4 * j + e] = d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
        }
    }
}

/// Gives results to the first `count` products of the warp.
static void compute_up_to(Worker* worker, Warp& warp, size_t count) {
    u32 row = worker->self->thread / WARP % 4 * 16;
    for (; warp.computed < count; warp.computed++) compute(worker, warp.products[warp.computed], row);
}

/// One warp's part of a product begins: operands are looked at in its name.
static void begin_product(Worker* worker, Warp& warp, Product& product, const void* place) {
    u32 size = worker->launch->spec.shared, w = worker->self->thread / WARP;
    u64 window = worker->self->block->window;
    auto look = [&](u64 descriptor, bool across, u64 first, u64 count, const char* side) {
        Operand operand = decode(descriptor);
        if (!operand.fits) {
            fail(worker, text("multiplies at %s, expected a descriptor of operand() for %s, found 0x%llx", where(place).c_str(), side, descriptor));
        }
        chunks(descriptor, across, first, count, [&](u64, u64, u64 at) {
            if (at + 16 > size) {
                fail(worker, text("multiplies at %s, %s at offset %llu of shared memory, expected the %u bytes of the launch", where(place).c_str(), side, at, size));
            }
            engine_reads(worker, window + at, "multiplies", place);
            product.reads[at / 1024] = true;
        });
    };
    // Lanes may know different things: each must be allowed to read.
    Fiber* self = worker->self;
    Fiber* lanes = self - self->lane;
    for (u32 i = 0; i < WARP; i++) {
        if (i > 0 && lanes[i].clock == lanes[i - 1].clock) continue;
        worker->self = lanes + i;
        if (!product.left[0]) look(product.a, false, w % 4 * 16, 16, "a");
        look(product.b, product.across, 0, product.half * 2, "b");
    }
    worker->self = self;
    for (u32 kib = 0; kib < 256; kib++) {
        if (product.reads[kib]) worker->reading[window / 1024 + kib][w] = LAST_TIME;
    }
    warp.products.push_back(product);
}

EXPORT void sim_multiply(float* d, u32 half, u64 a, const u32* left, u64 b, u32 add, u32 across, u32 line) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    Warp& warp = *self->warp;
    worker->asynchronous = true;
    warp.sums[self->lane] = d, warp.left[self->lane] = left;
    auto written = [&](const void* from, u64 bytes) {
        u64 low = reinterpret_cast<u64>(from);
        return self->dirty_low < low + bytes && low < self->dirty_high;
    };
    if (written(d, half * sizeof(float)) || (left && written(left, 16))) {
        fail(worker, "multiplies at " + where(PLACE) + ", expected warpgroup_fence after its registers were written");
    }
    if (!gather(worker, warp, PRODUCT, line, PLACE)) return;
    Issue issue = {a, b, half, line, add != 0, across != 0};
    std::vector<Issue>& issues = worker->issues[self->thread / WARPGROUP];
    if (warp.issued == issues.size()) issues.push_back(issue);
    const Issue& first = issues[warp.issued++];
    if (first.a != a || first.b != b || first.half != half || first.line != line || first.add != issue.add || first.across != issue.across) {
        fail(worker, "multiplies at " + where(PLACE) + ", expected the same operands in all four warps of the warpgroup, found others");
    }
    Product product = {a, b, half, issue.add, issue.across, self->product_groups, {}, {}, {}};
    memcpy(product.d, warp.sums, sizeof product.d);
    memcpy(product.left, warp.left, sizeof product.left);
    begin_product(worker, warp, product, PLACE);
    if (worker->launch->spec.seed && draw(worker->random) % 2) compute_up_to(worker, warp, warp.products.size());  // at once
    disperse(worker, warp);
}

EXPORT void sim_products_fence() noexcept { current->self->dirty_low = ~0ull, current->self->dirty_high = 0; }

EXPORT void sim_products_commit() noexcept { current->self->product_groups++; }

EXPORT void sim_products_wait(u32 pending, u32 line) noexcept {
    Worker* worker = current;
    Fiber* self = worker->self;
    Warp& warp = *self->warp;
    if (!gather(worker, warp, PRODUCTS_WAIT, line, PLACE)) return;
    size_t over = 0;
    while (over < warp.products.size() && warp.products[over].group + pending < self->product_groups) over++;
    if (warp.computed < over) compute_up_to(worker, warp, over);
    u32 now = worker->now, w = self->thread / WARP;
    u64 first = self->block->window / 1024;
    tick(worker);
    for (size_t i = 0; i < warp.products.size(); i++) {
        for (u32 kib = 0; kib < 256; kib++) {
            if (warp.products[i].reads[kib]) worker->reading[first + kib][w] = i < over ? now : LAST_TIME;
        }
    }
    warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<long>(over));
    warp.computed -= over;
    disperse(worker, warp);
}
