// The next token of each sequence from its row of f32 logits (V of them). One block owns a row; a thread owns a run of
// neighbouring ids, so sums over the vocabulary go by id, in an order that depends on V alone. THREADS comes from
// src/ops/sample/cuda.rs. Where a logit is not finite there is no token, and V is written.
//   greedy  the largest logit, the lowest id on a tie; as everywhere, of capped logits where there is a cap
//   draw    weights exp((l - max)/temperature); top-k and top-p keep the largest (the lowest ids on a tie); the token at which
//           the running sum of kept weights passes u of their total, u = Philox4x32-10(seed, id, position)
#include "device.cuh"

struct Shared {
    double sums[THREADS];
    u32 counts[THREADS];
    float floats[THREADS / WARP];
    u32 token;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "as src/ops/sample/cuda.rs says");

struct Run {
    u32 first, last;  // ids of this thread
};

DEVICE Run own_run(u32 vocab) {
    u32 each = (vocab + THREADS - 1) / THREADS, first = minimum(threadIdx.x * each, vocab);
    return {first, minimum(first + each, vocab)};
}

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
template <typename T>
DEVICE T ordered_sum(T (&shared)[THREADS], T own, T& before) {
    block_barrier();
    shared[threadIdx.x] = own;
    block_barrier();
    T sum = 0;
    for (u32 t = 0; t < THREADS; t++) {
        if (t == threadIdx.x) before = sum;
        sum += shared[t];
    }
    return sum;
}

/// Which weights are kept: those above `bits`, and the first `ties` that equal it (non-negative floats order as their bits do).
struct Kept {
    u32 bits, ties;
};

DEVICE bool above(float weight, u32 bits) { return float_bits(weight) > bits; }

struct Tail {
    double sum;
    u32 count;
};

/// Sum and number of the weights above `bits`, and of the first `kept.ties` that equal it when it is the border itself.
DEVICE Tail tail(Shared& shared, const float* weights, Run run, u32 bits) {
    double sum = 0.0, unused;
    u32 count = 0, none;
    for (u32 i = run.first; i < run.last; i++) {
        if (above(weights[i], bits)) {
            sum += weights[i];
            count++;
        }
    }
    return {ordered_sum(shared.sums, sum, unused), ordered_sum(shared.counts, count, none)};
}

/// The smallest border above which fewer than `limit` stand: the value of the limit-th largest weight.
DEVICE Kept keep_count(Shared& shared, const float* weights, Run run, u32 limit) {
    u32 low = 0, high = 0x7f800000u;  // the border lies in low..=high
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (tail(shared, weights, run, middle).count < limit) high = middle;
        else low = middle + 1;
    }
    return {low, limit - tail(shared, weights, run, low).count};
}

/// Within `kept`, the fewest of the largest whose sum reaches `share` of the whole.
DEVICE Kept keep_share(Shared& shared, const float* weights, Run run, Kept kept, float share) {
    double whole = tail(shared, weights, run, kept.bits).sum + static_cast<double>(kept.ties) * bits_float(kept.bits);
    double goal = whole * share;
    if (tail(shared, weights, run, kept.bits).sum >= goal) {  // the border rises
        u32 low = kept.bits, high = 0x7f800000u;
        while (low < high) {
            u32 middle = low + (high - low) / 2;
            if (tail(shared, weights, run, middle).sum < goal) high = middle;
            else low = middle + 1;
        }
        kept = {low, 0xffffffffu};
    }
    double missing = goal - tail(shared, weights, run, kept.bits).sum;
    float value = bits_float(kept.bits);
    u32 ties = 0;
    while (ties < kept.ties && ties * static_cast<double>(value) < missing) ties++;
    return {kept.bits, ties};
}

KERNEL __launch_bounds__(THREADS) sample_greedy(u32* tokens, const float* logits, u32 vocab, float softcap) {
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
    shared.counts[threadIdx.x] = first;
    block_barrier();
    if (threadIdx.x == 0) {
        for (u32 t = 0; t < THREADS; t++) first = minimum(first, shared.counts[t]);
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

KERNEL __launch_bounds__(THREADS) sample_draw(u32* tokens, float* logits, const DrawParams p) {
    Shared& shared = shared_memory<Shared>();
    u32 vocab = p.vocab;
    float* row = logits + static_cast<u64>(blockIdx.x) * vocab;
    Run run = own_run(vocab);
    float best = -INFINITE;
    // Beside an infinite maximum every weight is zero or no number, and no thread owns a token.
    if (threadIdx.x == 0) tokens[blockIdx.x] = vocab;
    for (u32 i = run.first; i < run.last; i++) best = maximum(best, finite_or_infinite(row[i]));
    best = block_maximum<THREADS / WARP>(best, shared.floats);
    if (best < INFINITE) best = capped(best, p.softcap);
    float inverse = 1.0f / p.temperature;
    for (u32 i = run.first; i < run.last; i++) row[i] = exp2_fast((capped(row[i], p.softcap) - best) * inverse * LOG2_E);
    Kept kept = {0, 0xffffffffu};
    if (p.top_k > 0 && p.top_k < vocab) kept = keep_count(shared, row, run, p.top_k);
    if (p.top_p < 1.0f) {
        if (kept.ties == 0xffffffffu) kept.ties = 0;  // all of weight zero add nothing
        kept = keep_share(shared, row, run, kept, p.top_p);
    }
    u32 ties = 0, rank;
    for (u32 i = run.first; i < run.last; i++) ties += float_bits(row[i]) == kept.bits;
    ordered_sum(shared.counts, ties, rank);
    double own = 0.0, before;
    for (u32 i = run.first; i < run.last; i++) {
        bool stays = above(row[i], kept.bits) || (float_bits(row[i]) == kept.bits && rank++ < kept.ties);
        if (stays) own += row[i];
        else row[i] = 0.0f;
    }
    double total = ordered_sum(shared.sums, own, before);
    u32 low = p.ids[2 * blockIdx.x], high = p.ids[2 * blockIdx.x + 1];
    double left = static_cast<double>(uniform(p.seed, low, high, p.positions[blockIdx.x])) * total;
    // The token lies with the last thread whose run begins at or before `left` and holds weight.
    u32 mine = own > 0.0 && before <= left ? threadIdx.x + 1 : 0;
    block_barrier();
    shared.counts[threadIdx.x] = mine;
    block_barrier();
    u32 owner = 0;
    for (u32 t = 0; t < THREADS; t++) owner = maximum(owner, shared.counts[t]);
    if (threadIdx.x + 1 != owner) return;
    left -= before;
    u32 token = 0;
    for (u32 i = run.first; i < run.last; i++) {
        if (!(row[i] > 0.0f)) continue;
        token = i;
        left -= row[i];
        if (left < 0.0) break;
    }
    tokens[blockIdx.x] = token;
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
