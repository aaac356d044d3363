// Atomic operations. Threads run one at a time here, so plain arithmetic is atomic; the runtime is
// told of each, because two atomic operations on one address are no race.
#pragma once

template <typename T>
struct suanli_plain {
    typedef T type;
};

#define SUANLI_ATOMIC(name, kind, expression)                                                     \
    template <typename T>                                                                         \
    SUANLI_INLINE T suanli_##name(void *site, T *address, typename suanli_plain<T>::type value) { \
        suanli_atomic((void *)address, sizeof(T), kind, site);                                    \
        T old = *address;                                                                         \
        *address = (T)(expression);                                                               \
        return old;                                                                               \
    }
SUANLI_ATOMIC(add, SUANLI_ADDS, old + value)
SUANLI_ATOMIC(sub, SUANLI_ADDS, old - value)
SUANLI_ATOMIC(min, SUANLI_SETTLES, value < old ? value : old)
SUANLI_ATOMIC(max, SUANLI_SETTLES, old < value ? value : old)
SUANLI_ATOMIC(exch, SUANLI_REPLACES, value)
SUANLI_ATOMIC(and, SUANLI_ADDS, old &value)
SUANLI_ATOMIC(or, SUANLI_ADDS, old | value)
SUANLI_ATOMIC(xor, SUANLI_ADDS, old ^ value)
SUANLI_ATOMIC(inc, SUANLI_ADDS, old >= value ? 0 : old + 1)
SUANLI_ATOMIC(dec, SUANLI_ADDS, old == 0 || old > value ? value : old - 1)

template <typename T>
SUANLI_INLINE T suanli_cas(void *site, T *address, typename suanli_plain<T>::type compare,
                           typename suanli_plain<T>::type value) {
    suanli_atomic((void *)address, sizeof(T), SUANLI_SETTLES, site);
    T old = *address;
    if (old == compare) *address = value;
    return old;
}

#define atomicAdd(...) suanli_add(SUANLI_HERE, __VA_ARGS__)
#define atomicSub(...) suanli_sub(SUANLI_HERE, __VA_ARGS__)
#define atomicMin(...) suanli_min(SUANLI_HERE, __VA_ARGS__)
#define atomicMax(...) suanli_max(SUANLI_HERE, __VA_ARGS__)
#define atomicExch(...) suanli_exch(SUANLI_HERE, __VA_ARGS__)
#define atomicAnd(...) suanli_and(SUANLI_HERE, __VA_ARGS__)
#define atomicOr(...) suanli_or(SUANLI_HERE, __VA_ARGS__)
#define atomicXor(...) suanli_xor(SUANLI_HERE, __VA_ARGS__)
#define atomicInc(...) suanli_inc(SUANLI_HERE, __VA_ARGS__)
#define atomicDec(...) suanli_dec(SUANLI_HERE, __VA_ARGS__)
#define atomicCAS(...) suanli_cas(SUANLI_HERE, __VA_ARGS__)
#define atomicAdd_block atomicAdd
#define atomicSub_block atomicSub
#define atomicMin_block atomicMin
#define atomicMax_block atomicMax
#define atomicExch_block atomicExch
#define atomicAnd_block atomicAnd
#define atomicOr_block atomicOr
#define atomicXor_block atomicXor
#define atomicInc_block atomicInc
#define atomicDec_block atomicDec
#define atomicCAS_block atomicCAS
#define atomicAdd_system atomicAdd
#define atomicSub_system atomicSub
#define atomicMin_system atomicMin
#define atomicMax_system atomicMax
#define atomicExch_system atomicExch
#define atomicAnd_system atomicAnd
#define atomicOr_system atomicOr
#define atomicXor_system atomicXor
#define atomicInc_system atomicInc
#define atomicDec_system atomicDec
#define atomicCAS_system atomicCAS
