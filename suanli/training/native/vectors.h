/* Vectors of 16 numbers in plain C with GCC's vector extension: bf16 in and out, and the functions that
   activations are made of. With AVX-512 some steps have a single instruction. */

#ifndef SUANLI_VECTORS
#define SUANLI_VECTORS

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(SUANLI_PLAIN)
#include <immintrin.h>
#define WIDE 1
#endif

#define LANES 16

typedef float vec __attribute__((vector_size(64), aligned(64)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(64)));
typedef uint16_t bf16;

enum { IDENTITY = 0, RELU = 1, GELU = 2, SILU = 3 };

#define INLINE static inline __attribute__((always_inline))

INLINE vec all_of(float value) { return value - (vec){0}; }

INLINE vec load(const bf16 *from) {
#ifdef WIDE
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return (vec)_mm512_slli_epi32(wide, 16);
#else
    ivec wide;
    for (int i = 0; i < LANES; i++) wide[i] = (int32_t)((uint32_t)from[i] << 16);
    return (vec)wide;
#endif
}

INLINE vec load_float(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_float(float *to, vec value) { memcpy(to, &value, sizeof value); }

/* Round to nearest, ties to even; a NaN stays a NaN. */
INLINE void store(bf16 *to, vec value) {
#if defined(WIDE) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        float one = value[i];
        memcpy(&bits, &one, sizeof bits);
        int nan = (bits & 0x7fffffffu) > 0x7f800000u;
        to[i] = nan ? 0x7fc0 : (bf16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
#endif
}

INLINE vec choose(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

INLINE vec reciprocal(vec x) {
#ifdef WIDE
    vec guess = (vec)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess); /* one Newton step: 14 bits become 28 */
#else
    return 1.0f / x;
#endif
}

/* e^x for x <= 0: 2^n times a Taylor polynomial of 2^f, |f| <= 1/2, of degree 6 (error 2e-7). */
INLINE vec exponential(vec x) {
    vec scaled = x * 1.44269504088896f;
    scaled = choose(scaled < -126.0f, all_of(-126.0f), scaled);
    vec shifted = scaled + 12582912.0f; /* 1.5 * 2^23: the sum's low bits hold the integer */
    vec whole = shifted - 12582912.0f;
    vec f = scaled - whole;
    vec p = all_of(1.540353e-4f);
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + (((ivec)shifted) << 23));
}

#ifndef WIDE
/* Distribution and density of the normal law. Abramowitz and Stegun 7.1.26, error below 1.5e-7. */
INLINE void normal_law(vec z, vec *distribution, vec *density) {
    vec e = exponential(z * z * -0.5f);
    vec size = choose(z < 0.0f, -z, z);
    vec t = reciprocal(size * (0.3275911f * 0.70710678f) + 1.0f);
    vec p = all_of(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = p * t * e * 0.5f;
    *distribution = choose(z < 0.0f, tail, 1.0f - tail);
    *density = e * 0.39894228f;
}
#endif

#ifdef WIDE
/* GELU is z * D(z) and its slope D(z) + z * d(z), with the normal law's distribution and density.
   Both factors less 1/2 are odd, so one table over |z| serves: 32 cubics on [0, 6], whose
   coefficients are picked by a permutation of registers. Error below 1e-6, a thousandth of bf16's;
   half the work of an exponential and a division. */
#define PIECES 32
#define TABLE_END 6.0
static float pieces[2][4][PIECES] __attribute__((aligned(64))); /* value, slope; power of t */

static double above_half(double z, int slope_wanted) {
    double half_of_error = 0.5 * erf(z * 0.70710678118654752440);
    return slope_wanted ? half_of_error + z * 0.39894228040143267794 * exp(-0.5 * z * z)
                        : half_of_error;
}

/* Cubics through the values at the four Chebyshev nodes of each piece, by divided differences. */
static void make_table(int slope_wanted) {
    const double node[4] = {0.03806023, 0.30865828, 0.69134172, 0.96193977};
    for (int piece = 0; piece < PIECES; piece++) {
        double d[4], p[4] = {0, 0, 0, 0};
        for (int i = 0; i < 4; i++)
            d[i] = above_half((piece + node[i]) * TABLE_END / PIECES, slope_wanted);
        for (int order = 1; order < 4; order++)
            for (int i = 3; i >= order; i--) d[i] = (d[i] - d[i - 1]) / (node[i] - node[i - order]);
        for (int i = 3; i >= 0; i--) { /* p = p * (t - node) + d */
            for (int k = 3; k > 0; k--) p[k] = p[k - 1] - node[i] * p[k];
            p[0] = d[i] - node[i] * p[0];
        }
        for (int k = 0; k < 4; k++) pieces[slope_wanted][k][piece] = (float)p[k];
    }
}

__attribute__((constructor)) static void make_tables(void) {
    make_table(0);
    make_table(1);
}

INLINE vec picked(const float *table, __m512i piece) {
    return (vec)_mm512_permutex2var_ps(_mm512_load_ps(table), piece, _mm512_load_ps(table + 16));
}

INLINE vec gelu_factor(vec z, int slope_wanted) {
    const __m512i sign = _mm512_set1_epi32((int)0x80000000);
    __m512 size = _mm512_castsi512_ps(_mm512_andnot_si512(sign, (__m512i)z));
    __m512 place = _mm512_mul_ps(size, _mm512_set1_ps((float)(PIECES / TABLE_END)));
    place = _mm512_min_ps(_mm512_set1_ps(PIECES - 1e-5f), place); /* a NaN stays one */
    __m512i piece = _mm512_cvttps_epi32(place);
    vec t = (vec)place - (vec)_mm512_cvtepi32_ps(piece);
    vec p = picked(pieces[slope_wanted][3], piece);
    p = p * t + picked(pieces[slope_wanted][2], piece);
    p = p * t + picked(pieces[slope_wanted][1], piece);
    p = p * t + picked(pieces[slope_wanted][0], piece);
    __m512i turned = _mm512_xor_si512((__m512i)p, _mm512_and_si512(sign, (__m512i)z));
    return (vec)turned + 0.5f;
}
#else
INLINE vec gelu_factor(vec z, int slope_wanted) {
    vec distribution, density;
    normal_law(z, &distribution, &density);
    return slope_wanted ? distribution + z * density : distribution;
}
#endif

INLINE vec logistic(vec z) {
    vec e = exponential(choose(z < 0.0f, z, -z));
    vec r = reciprocal(e + 1.0f);
    return choose(z < 0.0f, e * r, r);
}

INLINE vec activate(vec z, int kind) {
    if (kind == RELU) return choose(z < 0.0f, all_of(0.0f), z);
    if (kind == SILU) return z * logistic(z);
    if (kind == GELU) return z * gelu_factor(z, 0);
    return z;
}

INLINE vec slope(vec z, int kind) {
    if (kind == RELU) return choose(z > 0.0f, all_of(1.0f), all_of(0.0f));
    if (kind == SILU) {
        vec s = logistic(z);
        return s * (z * (1.0f - s) + 1.0f);
    }
    if (kind == GELU) return gelu_factor(z, 1);
    return all_of(1.0f);
}

/* Calls the function with a->kind as a constant, so that no loop in it asks for the kind. */
#define FOR_KIND(call, a, chunk)              \
    switch ((a)->kind) {                      \
    case RELU: call(a, chunk, RELU); break;   \
    case GELU: call(a, chunk, GELU); break;   \
    case SILU: call(a, chunk, SILU); break;   \
    default: call(a, chunk, IDENTITY); break; \
    }

#endif
