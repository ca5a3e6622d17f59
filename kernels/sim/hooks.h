// What the compiler calls: before each access (-fsanitize=thread), and where an address, an index, a shift or a divisor is
// not what its type allows (-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero).

#define HOOKS(BYTES)                                                                                       \
    EXPORT void __tsan_read##BYTES(void* p) noexcept { touch<BYTES, false>(p, PLACE); }                    \
    EXPORT void __tsan_write##BYTES(void* p) noexcept { touch<BYTES, true>(p, PLACE); }                    \
    EXPORT void __tsan_unaligned_read##BYTES(void* p) noexcept { touch_range<false>(p, BYTES, PLACE); }    \
    EXPORT void __tsan_unaligned_write##BYTES(void* p) noexcept { touch_range<true>(p, BYTES, PLACE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

EXPORT void __tsan_read_range(void* p, u64 bytes) noexcept { touch_range<false>(p, bytes, PLACE); }
EXPORT void __tsan_write_range(void* p, u64 bytes) noexcept { touch_range<true>(p, bytes, PLACE); }
EXPORT void __tsan_init() noexcept {}
EXPORT void __tsan_func_entry(void*) noexcept {}
EXPORT void __tsan_func_exit(void*) noexcept {}

EXPORT void* __tsan_memcpy(void* to, const void* from, u64 bytes) noexcept {
    touch_range<false>(from, bytes, PLACE);
    touch_range<true>(to, bytes, PLACE);
    return memcpy(to, from, bytes);
}

EXPORT void* __tsan_memmove(void* to, const void* from, u64 bytes) noexcept {
    touch_range<false>(from, bytes, PLACE);
    touch_range<true>(to, bytes, PLACE);
    return memmove(to, from, bytes);
}

EXPORT void* __tsan_memset(void* to, int value, u64 bytes) noexcept {
    touch_range<true>(to, bytes, PLACE);
    return memset(to, value, bytes);
}

/// How the compiler describes types: kind 0 is an integer, bit 0 of `info` its sign.
struct TypeDescription {
    u16 kind, info;
    char name[1];
};
struct Position {
    const char* file;
    u32 line, column;
};
struct Mismatch {
    Position position;
    const TypeDescription* type;
    unsigned char log_alignment, check;
};
struct OutOfBounds {
    Position position;
    const TypeDescription *array, *index;
};

EXPORT void __ubsan_handle_type_mismatch_v1(Mismatch* data, u64 address) noexcept {
    fail(current, text("uses address 0x%llx at ", address) + where(PLACE) +
                      text(", expected a multiple of %u for %s", 1u << data->log_alignment, data->type->name));
}

EXPORT void __ubsan_handle_out_of_bounds(OutOfBounds* data, u64 index) noexcept {
    fail(current, text("uses index %lld of %s at ", static_cast<long long>(index), data->array->name) + where(PLACE));
}

EXPORT void __ubsan_handle_shift_out_of_bounds(void*, u64, u64 by) noexcept {
    fail(current, text("shifts by %lld at ", static_cast<long long>(by)) + where(PLACE) + ", expected less than the number's bits");
}

EXPORT void __ubsan_handle_divrem_overflow(void*, u64, u64) noexcept { fail(current, "divides by zero at " + where(PLACE)); }
