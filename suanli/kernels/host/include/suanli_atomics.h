// Atomic operations. Threads run one at a time here, so plain arithmetic is atomic; the runtime is
// told of each, because two atomic operations on one address are no race.
#pragma once

template <typename T>
struct suanli_plain {
    typedef T type;
};

#define SUANLI_ATOMIC(name, expression)                                                           \
    template <typename T>                                                                         \
    SUANLI_INLINE T suanli_##name(void *site, T *address, typename suanli_plain<T>::type value) { \
        suanli_atomic((void *)address, sizeof(T), site);                                          \
        T old = *address;                                                                         \
        *address = (T)(expression);                                                               \
        return old;                                                                               \
    }
SUANLI_ATOMIC(add, old + value)
SUANLI_ATOMIC(sub, old - value)
SUANLI_ATOMIC(min, value < old ? value : old)
SUANLI_ATOMIC(max, old < value ? value : old)
SUANLI_ATOMIC(exch, value)
SUANLI_ATOMIC(and, old &value)
SUANLI_ATOMIC(or, old | value)
SUANLI_ATOMIC(xor, old ^ value)
SUANLI_ATOMIC(inc, old >= value ? 0 : old + 1)
SUANLI_ATOMIC(dec, old == 0 || old > value ? value : old - 1)

template <typename T>
SUANLI_INLINE T suanli_cas(void *site, T *address, typename suanli_plain<T>::type compare,
                           typename suanli_plain<T>::type value) {
    suanli_atomic((void *)address, sizeof(T), site);
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
#define atomicAdd_system atomicAdd
