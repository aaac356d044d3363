// The 16-bit floating-point types: stored as bits, computed in float and rounded once, to nearest
// with ties to even, as the GPU's own conversion does. Values over the largest become infinite.
#pragma once

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

#define SUANLI_COMPARE(name, pair, word, sign)                                                    \
    SUANLI_FUNCTION bool __h##word(name a, name b) { return a sign b; }                           \
    SUANLI_FUNCTION pair __h##word##2(pair a, pair b) {                                           \
        return {name(a.x sign b.x ? 1.0f : 0.0f), name(a.y sign b.y ? 1.0f : 0.0f)};              \
    }                                                                                             \
    SUANLI_FUNCTION bool __hb##word##2(pair a, pair b) { return a.x sign b.x && a.y sign b.y; }
#define SUANLI_UNARY(name, pair, word, expression)                                                \
    SUANLI_FUNCTION name h##word(name a) {                                                        \
        float x = (float)a;                                                                       \
        return name(expression);                                                                  \
    }                                                                                             \
    SUANLI_FUNCTION pair h2##word(pair a) { return {h##word(a.x), h##word(a.y)}; }

#define SUANLI_SMALL_FLOAT(name, pair, from, to)                                                  \
    struct __attribute__((aligned(2))) name {                                                     \
        uint16_t bits;                                                                            \
        name() = default;                                                                         \
        SUANLI_METHOD name(float v) : bits(from(v)) {}                                             \
        SUANLI_METHOD name(double v) : bits(from((float)v)) {}                                     \
        SUANLI_METHOD name(int v) : bits(from((float)v)) {}                                        \
        SUANLI_METHOD name(unsigned v) : bits(from((float)v)) {}                                   \
        SUANLI_METHOD name(short v) : bits(from((float)v)) {}                                      \
        SUANLI_METHOD name(unsigned short v) : bits(from((float)v)) {}                             \
        SUANLI_METHOD name(long v) : bits(from((float)v)) {}                                       \
        SUANLI_METHOD name(unsigned long v) : bits(from((float)v)) {}                              \
        SUANLI_METHOD name(long long v) : bits(from((float)v)) {}                                  \
        SUANLI_METHOD name(unsigned long long v) : bits(from((float)v)) {}                         \
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
    SUANLI_FUNCTION bool __hisnan(name a) { return (float)a != (float)a; }                        \
    SUANLI_FUNCTION int __hisinf(name a) {                                                        \
        return isinf((float)a) ? ((float)a < 0 ? -1 : 1) : 0;                                     \
    }                                                                                             \
    SUANLI_FUNCTION name __hadd_sat(name a, name b) { return name(__saturatef((float)a + (float)b)); } \
    SUANLI_FUNCTION name __hmul_sat(name a, name b) { return name(__saturatef((float)a * (float)b)); } \
    SUANLI_COMPARE(name, pair, lt, <) SUANLI_COMPARE(name, pair, gt, >)                           \
    SUANLI_COMPARE(name, pair, le, <=) SUANLI_COMPARE(name, pair, ge, >=)                         \
    SUANLI_COMPARE(name, pair, eq, ==) SUANLI_COMPARE(name, pair, ne, !=)                         \
    SUANLI_UNARY(name, pair, exp, expf(x)) SUANLI_UNARY(name, pair, log, logf(x))                 \
    SUANLI_UNARY(name, pair, exp2, exp2f(x)) SUANLI_UNARY(name, pair, log2, log2f(x))             \
    SUANLI_UNARY(name, pair, exp10, powf(10.0f, x)) SUANLI_UNARY(name, pair, log10, log10f(x))    \
    SUANLI_UNARY(name, pair, sqrt, sqrtf(x)) SUANLI_UNARY(name, pair, rsqrt, 1.0f / sqrtf(x))     \
    SUANLI_UNARY(name, pair, rcp, 1.0f / x) SUANLI_UNARY(name, pair, tanh, tanhf(x))              \
    SUANLI_UNARY(name, pair, sin, sinf(x)) SUANLI_UNARY(name, pair, cos, cosf(x))                 \
    SUANLI_UNARY(name, pair, floor, floorf(x)) SUANLI_UNARY(name, pair, ceil, ceilf(x))           \
    SUANLI_UNARY(name, pair, trunc, truncf(x)) SUANLI_UNARY(name, pair, rint, rintf(x))           \
    SUANLI_FUNCTION pair operator+(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }             \
    SUANLI_FUNCTION pair operator-(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }             \
    SUANLI_FUNCTION pair operator*(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }             \
    SUANLI_FUNCTION pair operator/(pair a, pair b) { return {a.x / b.x, a.y / b.y}; }             \
    SUANLI_FUNCTION pair operator-(pair a) { return {-a.x, -a.y}; }                               \
    SUANLI_FUNCTION pair &operator+=(pair &a, pair b) { return a = a + b; }                       \
    SUANLI_FUNCTION pair &operator-=(pair &a, pair b) { return a = a - b; }                       \
    SUANLI_FUNCTION pair &operator*=(pair &a, pair b) { return a = a * b; }                       \
    SUANLI_FUNCTION bool operator==(pair a, pair b) { return a.x == b.x && a.y == b.y; }          \
    SUANLI_FUNCTION bool operator!=(pair a, pair b) { return !(a == b); }                         \
    SUANLI_FUNCTION pair __hadd2(pair a, pair b) { return a + b; }                                \
    SUANLI_FUNCTION pair __hsub2(pair a, pair b) { return a - b; }                                \
    SUANLI_FUNCTION pair __hmul2(pair a, pair b) { return a * b; }                                \
    SUANLI_FUNCTION pair __h2div(pair a, pair b) { return a / b; }                                \
    SUANLI_FUNCTION pair __hneg2(pair a) { return -a; }                                           \
    SUANLI_FUNCTION pair __habs2(pair a) { return {__habs(a.x), __habs(a.y)}; }                   \
    SUANLI_FUNCTION pair __hmax2(pair a, pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; } \
    SUANLI_FUNCTION pair __hmin2(pair a, pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; } \
    SUANLI_FUNCTION pair __hfma2(pair a, pair b, pair c) {                                        \
        return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                    \
    }
