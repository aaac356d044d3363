// Whole numbers: bits, products, and several small numbers in one word.
#pragma once

SUANLI_FUNCTION int __popc(unsigned x) { return __builtin_popcount(x); }
SUANLI_FUNCTION int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
SUANLI_FUNCTION int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
SUANLI_FUNCTION int __clzll(long long x) {
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
SUANLI_FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
SUANLI_FUNCTION int __ffsll(long long x) { return __builtin_ffsll(x); }
SUANLI_FUNCTION unsigned __brev(unsigned x) {
    unsigned made = 0;
    for (int i = 0; i < 32; i++) made |= (x >> i & 1u) << (31 - i);
    return made;
}
SUANLI_FUNCTION int __mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
SUANLI_FUNCTION unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
SUANLI_FUNCTION int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
SUANLI_FUNCTION unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned made = 0;
    for (int i = 0; i < 4; i++) {
        unsigned byte = (unsigned)(both >> (8 * (s >> 4 * i & 7)) & 255);
        if (s >> 4 * i & 8) byte = byte & 128 ? 255 : 0;
        made |= byte << 8 * i;
    }
    return made;
}
SUANLI_FUNCTION int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
SUANLI_FUNCTION unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255u) * (b >> 8 * i & 255u);
    return c;
}
SUANLI_FUNCTION int __dp2a_lo(int a, int b, int c) {
    return c + (short)a * (signed char)b + (short)(a >> 16) * (signed char)(b >> 8);
}
SUANLI_FUNCTION int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
SUANLI_FUNCTION unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffffu) * (b & 0xffffffu); }
SUANLI_FUNCTION unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
SUANLI_FUNCTION long long __mul64hi(long long a, long long b) {
    return (long long)((__int128)a * b >> 64);
}
SUANLI_FUNCTION unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev((unsigned)x) << 32 | __brev((unsigned)(x >> 32));
}
SUANLI_FUNCTION unsigned __sad(int a, int b, unsigned c) { return c + (unsigned)(a > b ? a - b : b - a); }
SUANLI_FUNCTION unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }
SUANLI_FUNCTION int __hadd(int a, int b) { return (int)(((long long)a + b) >> 1); }
SUANLI_FUNCTION int __rhadd(int a, int b) { return (int)(((long long)a + b + 1) >> 1); }
SUANLI_FUNCTION unsigned __uhadd(unsigned a, unsigned b) {
    return (unsigned)(((unsigned long long)a + b) >> 1);
}
SUANLI_FUNCTION unsigned __urhadd(unsigned a, unsigned b) {
    return (unsigned)(((unsigned long long)a + b + 1) >> 1);
}
SUANLI_FUNCTION unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((uint64_t)high << 32 | low) << (shift & 31)) >> 32);
}
SUANLI_FUNCTION unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
SUANLI_FUNCTION unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((uint64_t)high << 32 | low) << (shift < 32 ? shift : 32)) >> 32);
}
SUANLI_FUNCTION unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift < 32 ? shift : 32));
}

// Four bytes or two 16-bit halves of a word at once.
#define SUANLI_LANES(name, T, bits, expression)                                                   \
    SUANLI_FUNCTION unsigned name(unsigned x, unsigned y) {                                        \
        unsigned made = 0;                                                                        \
        for (int i = 0; i < 32; i += bits) {                                                      \
            T a = (T)(x >> i), b = (T)(y >> i);                                                   \
            made |= ((unsigned)(expression) & ((1u << bits) - 1)) << i;                           \
        }                                                                                         \
        return made;                                                                              \
    }
#define SUANLI_WORDS(count, bits, S, U)                                                           \
    SUANLI_LANES(__vadd##count, U, bits, a + b)                                                   \
    SUANLI_LANES(__vsub##count, U, bits, a - b)                                                   \
    SUANLI_LANES(__vavgu##count, U, bits, (a + b + 1) >> 1)                                       \
    SUANLI_LANES(__vhaddu##count, U, bits, (a + b) >> 1)                                          \
    SUANLI_LANES(__vmaxs##count, S, bits, a > b ? a : b)                                          \
    SUANLI_LANES(__vmaxu##count, U, bits, a > b ? a : b)                                          \
    SUANLI_LANES(__vmins##count, S, bits, a < b ? a : b)                                          \
    SUANLI_LANES(__vminu##count, U, bits, a < b ? a : b)                                          \
    SUANLI_LANES(__vabsdiffs##count, S, bits, a > b ? a - b : b - a)                              \
    SUANLI_LANES(__vabsdiffu##count, U, bits, a > b ? a - b : b - a)                              \
    SUANLI_LANES(__vcmpeq##count, U, bits, a == b ? ~0u : 0u)                                     \
    SUANLI_LANES(__vcmpgts##count, S, bits, a > b ? ~0u : 0u)                                     \
    SUANLI_LANES(__vcmpgtu##count, U, bits, a > b ? ~0u : 0u)
SUANLI_WORDS(4, 8, signed char, unsigned char)
SUANLI_WORDS(2, 16, short, unsigned short)
