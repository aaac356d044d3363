// The 16-bit floating-point types: stored as bits, computed in float and rounded once, to nearest
// with ties to even, as the GPU's own conversion does. Values over the largest become infinite.
#pragma once

#define SUANLI_METHOD __attribute__((always_inline)) inline

SUANLI_FUNCTION float suanli_half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        float small = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -small : small;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

SUANLI_FUNCTION uint16_t suanli_float_to_half(float value) {
    uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7fffu);
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and more
    if (size < 0x38800000u) {                                    // below 2^-14: subnormal
        float scaled = __uint_as_float(size) * 16777216.0f;      // 2^24
        return (uint16_t)(sign | (uint32_t)rintf(scaled));
    }
    uint32_t rounded = size + 0xfffu + (size >> 13 & 1u);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

SUANLI_FUNCTION float suanli_bfloat_to_float(uint16_t b) {
    return __uint_as_float((uint32_t)b << 16);
}

SUANLI_FUNCTION uint16_t suanli_float_to_bfloat(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#define SUANLI_SMALL_FLOAT(name, pair, from, to)                                                  \
    struct __attribute__((aligned(2))) name {                                                     \
        uint16_t bits;                                                                            \
        name() = default;                                                                         \
        SUANLI_METHOD name(float v) : bits(from(v)) {}                                             \
        SUANLI_METHOD name(double v) : bits(from((float)v)) {}                                     \
        SUANLI_METHOD name(int v) : bits(from((float)v)) {}                                        \
        SUANLI_METHOD name(unsigned v) : bits(from((float)v)) {}                                   \
        SUANLI_METHOD operator float() const { return to(bits); }                                  \
    };                                                                                            \
    struct __attribute__((aligned(4))) pair {                                                     \
        name x, y;                                                                                \
    };                                                                                            \
    SUANLI_FUNCTION name &operator+=(name &a, name b) { return a = name((float)a + (float)b); }   \
    SUANLI_FUNCTION name &operator-=(name &a, name b) { return a = name((float)a - (float)b); }   \
    SUANLI_FUNCTION name &operator*=(name &a, name b) { return a = name((float)a * (float)b); }   \
    SUANLI_FUNCTION name &operator/=(name &a, name b) { return a = name((float)a / (float)b); }   \
    SUANLI_FUNCTION name operator+(name a, name b) { return name((float)a + (float)b); }          \
    SUANLI_FUNCTION name operator-(name a, name b) { return name((float)a - (float)b); }          \
    SUANLI_FUNCTION name operator*(name a, name b) { return name((float)a * (float)b); }          \
    SUANLI_FUNCTION name operator/(name a, name b) { return name((float)a / (float)b); }          \
    SUANLI_FUNCTION name operator-(name a) { return name(-(float)a); }                            \
    SUANLI_FUNCTION bool operator<(name a, name b) { return (float)a < (float)b; }                \
    SUANLI_FUNCTION bool operator>(name a, name b) { return (float)a > (float)b; }                \
    SUANLI_FUNCTION bool operator<=(name a, name b) { return (float)a <= (float)b; }              \
    SUANLI_FUNCTION bool operator>=(name a, name b) { return (float)a >= (float)b; }              \
    SUANLI_FUNCTION bool operator==(name a, name b) { return (float)a == (float)b; }              \
    SUANLI_FUNCTION bool operator!=(name a, name b) { return (float)a != (float)b; }              \
    SUANLI_FUNCTION name __hadd(name a, name b) { return a + b; }                                 \
    SUANLI_FUNCTION name __hsub(name a, name b) { return a - b; }                                 \
    SUANLI_FUNCTION name __hmul(name a, name b) { return a * b; }                                 \
    SUANLI_FUNCTION name __hdiv(name a, name b) { return a / b; }                                 \
    SUANLI_FUNCTION name __hneg(name a) { return -a; }                                            \
    SUANLI_FUNCTION name __habs(name a) { return name(fabsf((float)a)); }                         \
    SUANLI_FUNCTION name __hfma(name a, name b, name c) {                                         \
        return name(fmaf((float)a, (float)b, (float)c));                                          \
    }                                                                                             \
    SUANLI_FUNCTION name __hmax(name a, name b) { return name(fmaxf((float)a, (float)b)); }       \
    SUANLI_FUNCTION name __hmin(name a, name b) { return name(fminf((float)a, (float)b)); }       \
    SUANLI_FUNCTION bool __hlt(name a, name b) { return a < b; }                                  \
    SUANLI_FUNCTION bool __hgt(name a, name b) { return a > b; }                                  \
    SUANLI_FUNCTION bool __heq(name a, name b) { return a == b; }                                 \
    SUANLI_FUNCTION bool __hisnan(name a) { return (float)a != (float)a; }                        \
    SUANLI_FUNCTION name hexp(name a) { return name(expf((float)a)); }                            \
    SUANLI_FUNCTION name hlog(name a) { return name(logf((float)a)); }                            \
    SUANLI_FUNCTION name hsqrt(name a) { return name(sqrtf((float)a)); }                          \
    SUANLI_FUNCTION name hrsqrt(name a) { return name(1.0f / sqrtf((float)a)); }                  \
    SUANLI_FUNCTION pair operator+(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }             \
    SUANLI_FUNCTION pair operator-(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }             \
    SUANLI_FUNCTION pair operator*(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }             \
    SUANLI_FUNCTION pair __hadd2(pair a, pair b) { return a + b; }                                \
    SUANLI_FUNCTION pair __hsub2(pair a, pair b) { return a - b; }                                \
    SUANLI_FUNCTION pair __hmul2(pair a, pair b) { return a * b; }                                \
    SUANLI_FUNCTION pair __hfma2(pair a, pair b, pair c) {                                        \
        return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                    \
    }
