// Arithmetic that CUDA has and C++ has not. The fast forms (__expf and so on) are computed
// accurately here: their larger error belongs to the GPU and is not what the check looks for.
#pragma once

template <typename A, typename B>
SUANLI_FUNCTION auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <typename A, typename B>
SUANLI_FUNCTION auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }

SUANLI_FUNCTION float suanli_rsqrtf(float x) { return 1.0f / sqrtf(x); }
SUANLI_FUNCTION double suanli_rsqrt(double x) { return 1.0 / sqrt(x); }
#define rsqrtf suanli_rsqrtf
#define rsqrt suanli_rsqrt
#define __frsqrt_rn suanli_rsqrtf
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __tanhf(x) tanhf(x)
#define __fdividef(x, y) ((float)(x) / (float)(y))
#define __fdiv_rn(x, y) ((float)(x) / (float)(y))
#define __frcp_rn(x) (1.0f / (float)(x))
#define __fsqrt_rn(x) sqrtf(x)
#define __fadd_rn(x, y) ((float)(x) + (float)(y))
#define __fsub_rn(x, y) ((float)(x) - (float)(y))
#define __fmul_rn(x, y) ((float)(x) * (float)(y))
#define __fmaf_rn(x, y, z) fmaf(x, y, z)
#define __saturatef(x) fminf(fmaxf(x, 0.0f), 1.0f)
#define __int2float_rn(x) ((float)(int)(x))
#define __uint2float_rn(x) ((float)(unsigned)(x))
#define __float2int_rn(x) ((int)rintf(x))
#define __float2int_rz(x) ((int)(float)(x))
#define __float2int_rd(x) ((int)floorf(x))
#define __float2int_ru(x) ((int)ceilf(x))
#define __float2uint_rn(x) ((unsigned)rintf(x))

SUANLI_FUNCTION float __int_as_float(int x) { return suanli_value<float>(suanli_bits(x)); }
SUANLI_FUNCTION int __float_as_int(float x) { return suanli_value<int>(suanli_bits(x)); }
SUANLI_FUNCTION float __uint_as_float(unsigned x) { return suanli_value<float>(suanli_bits(x)); }
SUANLI_FUNCTION unsigned __float_as_uint(float x) { return suanli_value<unsigned>(suanli_bits(x)); }
SUANLI_FUNCTION long long __double_as_longlong(double x) {
    return suanli_value<long long>(suanli_bits(x));
}
SUANLI_FUNCTION double __longlong_as_double(long long x) {
    return suanli_value<double>(suanli_bits(x));
}

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

// Loads with a cache hint are loads. Macros, so that the place of the access is the caller's.
#define __ldg(p) (*(p))
#define __ldcg(p) (*(p))
#define __ldca(p) (*(p))
#define __ldcs(p) (*(p))
#define __ldlu(p) (*(p))
#define __ldcv(p) (*(p))
#define __stwb(p, v) (void)(*(p) = (v))
#define __stcg(p, v) (void)(*(p) = (v))
#define __stcs(p, v) (void)(*(p) = (v))
#define __stwt(p, v) (void)(*(p) = (v))

SUANLI_FUNCTION unsigned __cvta_generic_to_shared(const void *p) {
    return (unsigned)((const unsigned char *)p - suanli_dynamic_shared);
}
