// The next token of each sequence from its row of f32 logits (V of them). One block owns a row; sums go in an order that depends
// on V alone. THREADS comes from src/ops/sample/cuda.rs. Where a logit is not finite there is no token, and V is written.
//   greedy  the largest logit, the lowest id on a tie; as everywhere, of capped logits where there is a cap
//   draw    weights exp((l - max)/temperature); top-k and top-p keep the largest (the lowest ids on a tie); the token at which
//           the running sum of kept weights, by id, passes u of their total, u = Philox4x32-10(seed, id, position)
#include "device.cuh"

constexpr u32 WARPS = THREADS / WARP;
// A weight is at most 1: three digits of ten bits, and a thread for each value of a digit.
constexpr u32 DIGIT = 10, BINS = 1u << DIGIT;
static_assert(BINS == THREADS, "a thread owns a bin");

/// Weights that begin with the same digits: how many, and the sum of the bits that follow, in two parts that cannot overflow.
struct Bin {
    u32 count, low, high;
};

/// What is kept of the weights in descending order: those above `bits`, and the first `ties` of the `equal` that have them.
struct Border {
    u32 bits, ties, equal;
};

struct Shared {
    double sums[THREADS], warp_sums[WARPS];
    double above;
    Bin bins[BINS];
    Border border;
    float floats[WARPS];
    u32 firsts[THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as src/ops/sample/cuda.rs says");

/// A number in [0, 1) from (seed, id, position): 24 bits of Philox's first word.
DEVICE float uniform(u64 seed, u32 id_low, u32 id_high, u32 position) {
    u32 c[4] = {id_low, id_high, position, 0}, k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        u64 a = static_cast<u64>(c[0]) * 0xD2511F53u, b = static_cast<u64>(c[2]) * 0xCD9E8D57u;
        u32 c0 = static_cast<u32>(b >> 32) ^ c[1] ^ k0, c2 = static_cast<u32>(a >> 32) ^ c[3] ^ k1;
        c[0] = c0, c[1] = static_cast<u32>(b), c[2] = c2, c[3] = static_cast<u32>(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return static_cast<float>(c[0] >> 8) * (1.0f / 16777216.0f);
}

/// So that a maximum shows whether all were finite: +∞ for what is not.
DEVICE float finite_or_infinite(float x) { return (float_bits(x) & 0x7f800000u) == 0x7f800000u ? INFINITE : x; }

/// Sum over the block in order of threads, the same in all; also what stands before this thread.
DEVICE double ordered_sum(Shared& shared, double own, double& before) {
    u32 warp = threadIdx.x / WARP;
    double inside = 0.0, sum = 0.0;
    block_barrier();
    shared.sums[threadIdx.x] = own;
    warp_barrier();
#pragma unroll 4
    for (u32 t = warp * WARP; t < threadIdx.x; t++) inside += shared.sums[t];
    if (threadIdx.x % WARP == WARP - 1) shared.warp_sums[warp] = inside + own;
    block_barrier();
#pragma unroll 4
    for (u32 w = 0; w < WARPS; w++) {
        if (w == warp) before = sum + inside;
        sum += shared.warp_sums[w];
    }
    return sum;
}

/// Where the largest weights are `goal` many, or with `mass` sum up to `goal` of all: digit by digit, from the first on. Sums are
/// exact within a bin, whose weights are its start and so many units of its last place.
DEVICE Border border_of(Shared& shared, const float* weights, u32 vocab, bool mass, double goal) {
    u32 bits = 0;
    double above = 0.0;
    for (u32 shift = 2 * DIGIT;; shift -= DIGIT) {
        block_barrier();
        shared.bins[threadIdx.x] = {0, 0, 0};
        block_barrier();
#pragma unroll 4
        for (u32 i = threadIdx.x; i < vocab; i += THREADS) {
            u32 weight = float_bits(weights[i]), rest = weight & ((1u << shift) - 1);
            if (weight >> shift >> DIGIT != bits) continue;
            Bin& bin = shared.bins[BINS - 1 - (weight >> shift) % BINS];
            shared_add(bin.count, 1);
            if (mass) {
                shared_add(bin.low, rest % BINS);
                shared_add(bin.high, rest / BINS);
            }
        }
        block_barrier();
        // The first thread has the largest weights.
        Bin bin = shared.bins[threadIdx.x];
        u32 start = (bits << DIGIT | (BINS - 1 - threadIdx.x)) << shift;
        double unit = static_cast<double>(bits_float(start + 1)) - bits_float(start), before;
        double sum = bin.count * static_cast<double>(bits_float(start)) + unit * (bin.low + static_cast<double>(BINS) * bin.high);
        double all = ordered_sum(shared, mass ? sum : bin.count, before);
        // Of no share at all the first is kept.
        if (mass && shift == 2 * DIGIT) goal = goal > 0.0 ? goal * all : 1e-300;
        bool reached = bin.count > 0 && above + before < goal;
        u32 last = static_cast<u32>(block_maximum<WARPS>(reached ? threadIdx.x + 1.0f : 0.0f, shared.floats));
        // Where nothing has weight, all of it is zero and kept.
        if (threadIdx.x + 1 == maximum(last, 1)) {
            shared.border = {start >> shift, 0, bin.count};
            shared.above = above + before;
        }
        block_barrier();
        bits = shared.border.bits, above = shared.above;
        if (shift == 0) break;
    }
    u32 equal = shared.border.equal, ties = equal;
    double value = mass ? bits_float(bits) : 1.0, missing = goal - above;
    if (missing < ties * value) {
        ties = static_cast<u32>(missing / value);
        ties += ties * value < missing;
    }
    return {bits, ties, equal};
}

/// Neighbouring ids: a warp's, over which its lanes go side by side; or a lane's share of them.
struct Run {
    u32 first, last;
};

DEVICE Run share_of(Run all, u32 index, u32 count) {
    u32 each = (all.last - all.first + count - 1) / count, first = minimum(all.first + index * each, all.last);
    return {first, minimum(first + each, all.last)};
}

/// Weights behind the border become zero.
DEVICE void keep(Shared& shared, float* weights, Run run, Border border) {
    u32 lane = threadIdx.x % WARP, rank = 0;
    if (border.ties < border.equal) {
        u32 own = 0;
        double before;
        for (u32 i = run.first + lane; i < run.last; i += WARP) own += float_bits(weights[i]) == border.bits;
        ordered_sum(shared, own, before);
        rank = shuffle(static_cast<u32>(before), 0);
    }
    for (u32 i = run.first + lane; i - lane < run.last; i += WARP) {
        u32 weight = i < run.last ? float_bits(weights[i]) : ~0u, equal = ballot(weight == border.bits);
        bool behind = rank + count_ones(equal & ((1u << lane) - 1)) >= border.ties;
        if (weight < border.bits || (weight == border.bits && behind)) weights[i] = 0.0f;
        rank += count_ones(equal);
    }
    block_barrier();
}

/// The last of the parts that holds something and begins at or before `left`, which then counts from its beginning; ~0 where there
/// is none.
template <typename T>
DEVICE u32 locate(const T* parts, u32 count, double& left) {
    u32 found = ~0u;
    double sum = 0.0, start = 0.0;
#pragma unroll 4
    for (u32 i = 0; i < count; i++) {
        if (parts[i] > 0 && sum <= left) found = i, start = sum;
        sum += parts[i];
    }
    left -= start;
    return found;
}

KERNEL __launch_bounds__(THREADS) sample_greedy(u32* tokens, const float* logits, u32 vocab, float softcap) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    const float* row = logits + static_cast<u64>(blockIdx.x) * vocab;
    float best = -INFINITE;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) best = maximum(best, finite_or_infinite(row[i]));
    best = block_maximum<THREADS / WARP>(best, shared.floats);
    if (best == INFINITE) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = vocab;
        return;
    }
    best = capped(best, softcap);
    u32 first = vocab;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) {
        if (capped(row[i], softcap) == best) {
            first = i;
            break;
        }
    }
    shared.firsts[threadIdx.x] = first;
    block_barrier();
    if (threadIdx.x == 0) {
        for (u32 t = 0; t < THREADS; t++) first = minimum(first, shared.firsts[t]);
        tokens[blockIdx.x] = first;
    }
}

struct DrawParams {
    const u32* ids;  // low and high half
    const u32* positions;
    u64 seed;
    u32 vocab, top_k;
    float temperature, top_p, softcap;
};

KERNEL __launch_bounds__(THREADS, 1) sample_draw(u32* tokens, float* logits, const DrawParams p) {
    after_previous();
    Shared& shared = shared_memory<Shared>();
    u32 vocab = p.vocab, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* row = logits + static_cast<u64>(blockIdx.x) * vocab;
    float best = -INFINITE;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) best = maximum(best, finite_or_infinite(row[i]));
    best = block_maximum<WARPS>(best, shared.floats);
    if (threadIdx.x == 0) tokens[blockIdx.x] = vocab;
    if (best == INFINITE) return;
    best = capped(best, p.softcap);
    float inverse = 1.0f / p.temperature;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) row[i] = exp2_fast((capped(row[i], p.softcap) - best) * inverse * LOG2_E);
    block_barrier();
    Run run = share_of({0, vocab}, warp, WARPS);
    // One body for both: top-k first, then top-p.
#pragma unroll 1
    for (u32 mass = 0; mass < 2; mass++) {
        bool limits = mass ? p.top_p < 1.0f : p.top_k > 0 && p.top_k < vocab;
        if (limits) keep(shared, row, run, border_of(shared, row, vocab, mass, mass ? p.top_p : p.top_k));
    }
    double own = 0.0, before;
    for (u32 i = run.first + lane; i < run.last; i += WARP) own += row[i];
    u32 low = p.ids[2 * blockIdx.x], high = p.ids[2 * blockIdx.x + 1];
    double left = uniform(p.seed, low, high, p.positions[blockIdx.x]) * ordered_sum(shared, own, before);
    if (locate(shared.warp_sums, WARPS, left) != warp) return;
    // This warp's, now by lanes of neighbouring ids.
    Run part = share_of(run, lane, WARP);
    own = 0.0;
    for (u32 i = part.first; i < part.last; i++) own += row[i];
    warp_barrier();
    shared.sums[threadIdx.x] = own;
    warp_barrier();
    if (locate(shared.sums + warp * WARP, WARP, left) != lane) return;
    tokens[blockIdx.x] = part.first + locate(row + part.first, part.last - part.first, left);
}

struct AdvanceParams {
    u32* history;
    u32* step;
    u32* tokens;
    u32* positions;
    u32* drawn;
    const u32* next;
    u32 rows, columns, vocab, bound;
};

/// What follows a drawn token, without the host: it is noted in column step[0] of `history`, becomes the row's next input (0 where it
/// is no token), and
/// all positions grow by one, those that index memory up to the last below `bound`. One block.
KERNEL __launch_bounds__(THREADS) advance(const AdvanceParams p) {
    after_previous();
    u32 column = p.step[0];
    block_barrier();
    for (u32 i = threadIdx.x; i < p.rows; i += THREADS) {
        u32 token = p.next[i];
        if (column < p.columns) p.history[i * p.columns + column] = token;
        p.tokens[i] = token < p.vocab ? token : 0;
        p.positions[i] = minimum(p.positions[i] + 1, p.bound - 1);
        p.drawn[i] += 1;
    }
    if (threadIdx.x == 0) p.step[0] = column + 1;
}
