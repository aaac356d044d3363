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
