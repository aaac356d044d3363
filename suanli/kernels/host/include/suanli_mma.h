// mma.sync on the CPU. With E elements in a 32-bit register, group g = lane / 4 and t = lane % 4,
// register r of A holds row g + 8 (r % 2), columns t E + 4 E (r / 2) and on; register r of B holds
// column g, rows t E + 4 E r and on; value i of C and D is row g + 8 (i / 2), column 2 t + i % 2
// (PTX ISA, "Matrix fragments for mma.m16n8k16" and the sections around it).
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

struct suanli_f16 {
    static const int elements = 2;
    SUANLI_INLINE float at(unsigned r, int e) { return suanli_half_to_float((uint16_t)(r >> 16 * e)); }
};
struct suanli_bf16 {
    static const int elements = 2;
    SUANLI_INLINE float at(unsigned r, int e) {
        return suanli_bfloat_to_float((uint16_t)(r >> 16 * e));
    }
};
struct suanli_tf32 {
    static const int elements = 1;
    // the unit reads the upper 19 bits
    SUANLI_INLINE float at(unsigned r, int) { return __uint_as_float(r & 0xffffe000u); }
};
struct suanli_s8 {
    static const int elements = 4;
    SUANLI_INLINE int at(unsigned r, int e) { return (signed char)(r >> 8 * e); }
};

template <typename T>
SUANLI_FUNCTION unsigned suanli_register(T value) {
    static_assert(sizeof(T) == 4, "a register of mma.sync has 32 bits");
    return suanli_value<unsigned>(suanli_bits(value));
}

struct suanli_mma_operands {
    const unsigned *a, *b;
};

template <int M, int N, int K, typename T, typename Sum>
__attribute__((noinline, no_sanitize_thread)) static void suanli_mma(void *site, Sum **d,
                                                                     const unsigned *a,
                                                                     const unsigned *b,
                                                                     const unsigned *c) {
    const int E = T::elements;
    suanli_mma_operands mine = {a, b};
    const uint64_t *all = suanli_meet(SUANLI_MATRIX, 0xffffffffu, (uint64_t)&mine, site);
    if (suanli_present() != 0xffffffffu)
        suanli_refuse("a matrix operation needs all 32 lanes of its warp", site);
    int g = suanli_lane() / 4, t = suanli_lane() % 4;
    Sum made[4];
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        Sum total = suanli_value<Sum>(c[i]);
        for (int k = 0; k < K; k++) {
            int owner = k % (4 * E) / E, half = k / (4 * E), e = k % E;
            auto la = (const suanli_mma_operands *)all[row % 8 * 4 + owner];
            auto lb = (const suanli_mma_operands *)all[column * 4 + owner];
            total += (Sum)(T::at(la->a[row / 8 + 2 * half], e) * T::at(lb->b[half], e));
        }
        made[i] = total;
    }
    suanli_meet(SUANLI_MATRIX, 0xffffffffu, 0, site);
    for (int i = 0; i < 4; i++) *d[i] = made[i];
}
