// Arithmetic that CUDA has and C++ has not. The fast forms (__expf and so on) are computed
// accurately here: their larger error belongs to the GPU and is not what the check looks for.
#pragma once

template <typename A, typename B>
SUANLI_FUNCTION auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <typename A, typename B>
SUANLI_FUNCTION auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }

SUANLI_FUNCTION float suanli_rsqrtf(float x) { return 1.0f / sqrtf(x); }
SUANLI_FUNCTION double suanli_rsqrt(double x) { return 1.0 / sqrt(x); }
SUANLI_FUNCTION void suanli_sincosf(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
SUANLI_FUNCTION void suanli_sincos(double x, double *s, double *c) { *s = sin(x), *c = cos(x); }
#define SUANLI_BOTH(name, expression)                                                             \
    SUANLI_FUNCTION float name##f(float v) {                                                       \
        double x = v;                                                                             \
        return (float)(expression);                                                               \
    }                                                                                             \
    SUANLI_FUNCTION double name(double x) { return expression; }
SUANLI_BOTH(rcbrt, 1.0 / cbrt(x))
SUANLI_BOTH(sinpi, sin(M_PI * fmod(x, 2.0)))
SUANLI_BOTH(cospi, cos(M_PI * fmod(x, 2.0)))
SUANLI_BOTH(normcdf, 0.5 * erfc(-x * M_SQRT1_2))
SUANLI_BOTH(erfcx, exp(x * x) * erfc(x))
SUANLI_FUNCTION float rhypotf(float x, float y) { return 1.0f / hypotf(x, y); }
SUANLI_FUNCTION float norm3df(float x, float y, float z) { return sqrtf(x * x + y * y + z * z); }
SUANLI_FUNCTION float rnorm3df(float x, float y, float z) { return 1.0f / norm3df(x, y, z); }
SUANLI_FUNCTION float fdividef(float x, float y) { return x / y; }
#ifndef __USE_GNU
SUANLI_FUNCTION float exp10f(float x) { return powf(10.0f, x); }
#endif
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
#define __dadd_rn(x, y) ((double)(x) + (double)(y))
#define __dsub_rn(x, y) ((double)(x) - (double)(y))
#define __dmul_rn(x, y) ((double)(x) * (double)(y))
#define __ddiv_rn(x, y) ((double)(x) / (double)(y))
#define __dsqrt_rn(x) sqrt((double)(x))
#define __fma_rn(x, y, z) fma((double)(x), (double)(y), (double)(z))
#define __sincosf(x, s, c) suanli_sincosf(x, s, c)
#define sincosf(x, s, c) suanli_sincosf(x, s, c)
#define sincos(x, s, c) suanli_sincos(x, s, c)
#define __saturatef(x) fminf(fmaxf(x, 0.0f), 1.0f)
#define __int2float_rn(x) ((float)(int)(x))
#define __uint2float_rn(x) ((float)(unsigned)(x))
#define __float2int_rn(x) ((int)rintf(x))
#define __float2int_rz(x) ((int)(float)(x))
#define __float2int_rd(x) ((int)floorf(x))
#define __float2int_ru(x) ((int)ceilf(x))
#define __float2uint_rn(x) ((unsigned)rintf(x))
#define __float2uint_rz(x) ((unsigned)(float)(x))
#define __float2uint_rd(x) ((unsigned)floorf(x))
#define __float2uint_ru(x) ((unsigned)ceilf(x))
#define __float2ll_rn(x) ((long long)rintf(x))
#define __float2ull_rn(x) ((unsigned long long)rintf(x))
#define __double2int_rn(x) ((int)rint(x))
#define __double2int_rz(x) ((int)(double)(x))
#define __double2float_rn(x) ((float)(double)(x))
#define __int2double_rn(x) ((double)(int)(x))
#define __ll2float_rn(x) ((float)(long long)(x))
#define __ull2float_rn(x) ((float)(unsigned long long)(x))

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
SUANLI_FUNCTION double __hiloint2double(int high, int low) {
    return __longlong_as_double((long long)((uint64_t)(unsigned)high << 32 | (unsigned)low));
}
SUANLI_FUNCTION int __double2hiint(double x) { return (int)(__double_as_longlong(x) >> 32); }
SUANLI_FUNCTION int __double2loint(double x) { return (int)__double_as_longlong(x); }

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
