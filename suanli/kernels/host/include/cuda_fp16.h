// fp16 on the CPU.
#pragma once
#include "suanli_small_float.h"

SUANLI_SMALL_FLOAT(__half, __half2, suanli_float_to_half, suanli_half_to_float)
typedef __half half;
typedef __half2 half2;

SUANLI_FUNCTION __half __float2half(float x) { return __half(x); }
SUANLI_FUNCTION __half __float2half_rn(float x) { return __half(x); }
SUANLI_FUNCTION float __half2float(__half x) { return (float)x; }
SUANLI_FUNCTION __half __double2half(double x) { return __half((float)x); }
SUANLI_FUNCTION __half __int2half_rn(int x) { return __half((float)x); }
SUANLI_FUNCTION __half __uint2half_rn(unsigned x) { return __half((float)x); }
SUANLI_FUNCTION __half __short2half_rn(short x) { return __half((float)x); }
SUANLI_FUNCTION __half __ushort2half_rn(unsigned short x) { return __half((float)x); }
SUANLI_FUNCTION int __half2int_rn(__half x) { return (int)rintf((float)x); }
SUANLI_FUNCTION int __half2int_rz(__half x) { return (int)(float)x; }
SUANLI_FUNCTION unsigned __half2uint_rn(__half x) { return (unsigned)rintf((float)x); }
SUANLI_FUNCTION short __half_as_short(__half x) { return (short)x.bits; }
SUANLI_FUNCTION __half2 __halves2half2(__half x, __half y) { return {x, y}; }
SUANLI_FUNCTION __half2 make_half2(__half x, __half y) { return {x, y}; }
SUANLI_FUNCTION __half2 __half2half2(__half x) { return {x, x}; }
SUANLI_FUNCTION __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
SUANLI_FUNCTION __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
SUANLI_FUNCTION __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
SUANLI_FUNCTION float2 __half22float2(__half2 v) { return {(float)v.x, (float)v.y}; }
SUANLI_FUNCTION __half __low2half(__half2 v) { return v.x; }
SUANLI_FUNCTION __half __high2half(__half2 v) { return v.y; }
SUANLI_FUNCTION float __low2float(__half2 v) { return (float)v.x; }
SUANLI_FUNCTION float __high2float(__half2 v) { return (float)v.y; }
SUANLI_FUNCTION unsigned short __half_as_ushort(__half x) { return x.bits; }
SUANLI_FUNCTION __half __ushort_as_half(unsigned short x) {
    __half made;
    made.bits = x;
    return made;
}
SUANLI_FUNCTION __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
SUANLI_FUNCTION __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
SUANLI_FUNCTION __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
SUANLI_FUNCTION __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
SUANLI_FUNCTION __half2 __lowhigh2highlow(__half2 v) { return {v.y, v.x}; }
