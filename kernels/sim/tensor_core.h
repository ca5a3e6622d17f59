// How tensor cores add. Not one product after the other: a block of products and what was there before are shifted to the largest
// exponent among them, what lies below FRACTION binary places of it is cut off, the rest is added without a loss, and the sum's
// bits past the 24th are cut off. Blocks of 8 and 24 places on sm_80 to sm_89, of 16 and 25 from sm_90 on, as P. Xie et al. (MMA-Sim,
// arXiv 2511.10909) and F. Khattak and M. Mikaitis (arXiv 2512.07004) found by experiment on the devices.

typedef int Whole __attribute__((vector_size(32)));
typedef double Wide __attribute__((vector_size(64)));

static Whole bits_of(Row x) {
    Whole bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static Row row_of(Whole bits) {
    Row x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static Whole larger(Whole a, Whole b) { return a > b ? a : b; }

template <u32 BLOCK, int FRACTION>
static Row add_block(Row d, const float* a, const Row* b) {
    constexpr int EXPONENT = 0x7f800000, ONE = 1 << 23;
    Row products[BLOCK];
    Whole most = bits_of(d) & EXPONENT, largest = most;
    for (u32 k = 0; k < BLOCK; k++) {
        products[k] = a[k] * b[k];  // exact: 8 bits by 8
        largest = larger(largest, bits_of(products[k]) & EXPONENT);
        most = larger(most, (bits_of(b[k]) & EXPONENT) + static_cast<int>((float_bits(a[k]) & EXPONENT) - 127u * ONE));
    }
    // The last place that is kept, and how often it goes into what is added.
    Whole place = most - FRACTION * ONE, often = 254 * ONE - place;
    Whole good = (place > 0) & (most < 254 * ONE) & (largest < EXPONENT);
    Wide sum = __builtin_convertvector(__builtin_convertvector(d * row_of(often), Whole), Wide);
    for (u32 half = 0; half < BLOCK; half += 8) {
        Whole whole = {};
        for (u32 k = 0; k < 8; k++) whole += __builtin_convertvector(products[half + k] * row_of(often), Whole);
        sum += __builtin_convertvector(whole, Wide);
    }
    Row near = __builtin_convertvector(sum, Row);
    Wide over = __builtin_convertvector(near, Wide);
    auto past = sum < 0.0 ? over < sum : over > sum;
    Row result = row_of(bits_of(near) + __builtin_convertvector(past, Whole)) * row_of(place);
    bool all = true;
    for (u32 i = 0; i < 8; i++) all &= good[i] != 0;
    if (__builtin_expect(all, 1)) return result;
    // Not finite, or so near to zero that there is nothing to cut off.
    for (u32 k = 0; k < BLOCK; k++) d += products[k];
    return row_of((good & bits_of(result)) | (~good & bits_of(d)));
}

/// d + Σ a[k]·b[k] of eight columns and sixteen k.
static Row add_products(Row d, const float* a, const Row* b, bool hopper) {
    if (hopper) return add_block<16, 25>(d, a, b);
    return add_block<8, 24>(add_block<8, 24>(d, a, b), a + 8, b + 8);
}
