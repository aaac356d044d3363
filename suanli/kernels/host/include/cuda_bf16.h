// bf16 on the CPU.
#pragma once
#include "suanli_small_float.h"

SUANLI_SMALL_FLOAT(__nv_bfloat16, __nv_bfloat162, suanli_float_to_bfloat, suanli_bfloat_to_float)

SUANLI_FUNCTION __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
SUANLI_FUNCTION __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
SUANLI_FUNCTION float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
SUANLI_FUNCTION __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return {x, y};
}
SUANLI_FUNCTION __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
SUANLI_FUNCTION float2 __bfloat1622float2(__nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
SUANLI_FUNCTION __nv_bfloat16 __double2bfloat16(double x) { return __nv_bfloat16((float)x); }
SUANLI_FUNCTION __nv_bfloat16 __int2bfloat16_rn(int x) { return __nv_bfloat16((float)x); }
SUANLI_FUNCTION int __bfloat162int_rn(__nv_bfloat16 x) { return (int)rintf((float)x); }
SUANLI_FUNCTION __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
SUANLI_FUNCTION __nv_bfloat162 __float2bfloat162_rn(float x) {
    return {__nv_bfloat16(x), __nv_bfloat16(x)};
}
SUANLI_FUNCTION __nv_bfloat162 __float22bfloat162_rn(float2 v) {
    return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)};
}
SUANLI_FUNCTION __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
SUANLI_FUNCTION __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
SUANLI_FUNCTION __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
SUANLI_FUNCTION float __low2float(__nv_bfloat162 v) { return (float)v.x; }
SUANLI_FUNCTION float __high2float(__nv_bfloat162 v) { return (float)v.y; }
SUANLI_FUNCTION unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
SUANLI_FUNCTION __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
    __nv_bfloat16 made;
    made.bits = x;
    return made;
}
