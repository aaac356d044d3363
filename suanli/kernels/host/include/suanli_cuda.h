// CUDA's language on the CPU: what a kernel may use without including anything.
//
// Everything a thread does to memory is seen by the runtime: plain loads and stores through the
// compiler's instrumentation, atomic operations and warp operations through the calls below.
#pragma once
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cstdio>

#include "../interface.h"

// Parts of the runtime: what they do to memory is not the kernel's and is not seen.
#define SUANLI_INLINE __attribute__((noinline, no_sanitize_thread)) static
// Arithmetic: becomes a part of the kernel, so that what it loads and stores is seen.
#define SUANLI_FUNCTION __attribute__((always_inline)) static inline
#define SUANLI_METHOD __attribute__((always_inline)) inline
#define SUANLI_HERE suanli_site()

#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 9
#define CUDART_VERSION 12090
#define __builtin_assume(condition) ((void)0)
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __cluster_dims__(...)
// All of it lies in one place, that of templates too, with a band between two variables.
#define SUANLI_JOIN_(a, b) a##b
#define SUANLI_JOIN(a, b) SUANLI_JOIN_(a, b)
#define __shared__                                                                                 \
    static thread_local suanli_band SUANLI_JOIN(suanli_band_, __COUNTER__) __attribute__((used));  \
    static thread_local
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#define __restrict__ __restrict
#endif

static const int warpSize = 32;
using uint = unsigned int;
using ushort = unsigned short;
using ulong = unsigned long;
using uchar = unsigned char;

struct suanli_band {
    char bytes[128];
} __attribute__((aligned(128)));
// Where thread-local storage lies; behind it a last band.
static thread_local char suanli_anchor;
extern "C" __attribute__((no_sanitize_thread)) void *suanli_anchor_address(void) {
    return &suanli_anchor;
}

// A code address inside the caller: reports resolve it to the line of the kernel.
__attribute__((noinline, no_sanitize_thread)) static void *suanli_site() {
    return __builtin_return_address(0);
}

// -- vectors -------------------------------------------------------------------------------------

#define SUANLI_VECTORS(T, name, a2, a4)                                                           \
    struct name##3 { T x, y, z; };                                                                \
    SUANLI_OTHER_VECTORS(T, name, a2, a4)
#define SUANLI_OTHER_VECTORS(T, name, a2, a4)                                                     \
    struct name##1 { T x; };                                                                      \
    struct __attribute__((aligned(a2))) name##2 { T x, y; };                                      \
    struct __attribute__((aligned(a4))) name##4 { T x, y, z, w; };                                \
    SUANLI_INLINE name##1 make_##name##1(T x) { return {x}; }                                     \
    SUANLI_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                             \
    SUANLI_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                     \
    SUANLI_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SUANLI_VECTORS(signed char, char, 2, 4)
SUANLI_VECTORS(unsigned char, uchar, 2, 4)
SUANLI_VECTORS(short, short, 4, 8)
SUANLI_VECTORS(unsigned short, ushort, 4, 8)
SUANLI_VECTORS(int, int, 8, 16)
SUANLI_OTHER_VECTORS(unsigned, uint, 8, 16)  // uint3 is the type of threadIdx
SUANLI_VECTORS(float, float, 8, 16)
SUANLI_VECTORS(long, long, 16, 16)
SUANLI_VECTORS(unsigned long, ulong, 16, 16)
SUANLI_VECTORS(long long, longlong, 16, 16)
SUANLI_VECTORS(unsigned long long, ulonglong, 16, 16)
SUANLI_VECTORS(double, double, 16, 16)

// -- barriers, fences, time ----------------------------------------------------------------------

#define __syncthreads() ((void)suanli_barrier(SUANLI_NONE, 0, SUANLI_HERE))
#define __syncthreads_count(p) suanli_barrier(SUANLI_COUNT, (p) != 0, SUANLI_HERE)
#define __syncthreads_and(p) suanli_barrier(SUANLI_AND, (p) != 0, SUANLI_HERE)
#define __syncthreads_or(p) suanli_barrier(SUANLI_OR, (p) != 0, SUANLI_HERE)
#define __threadfence() suanli_fence(0)
#define __threadfence_block() suanli_fence(1)
#define __threadfence_system() suanli_fence(0)
#define __nanosleep(ns) ((void)(ns))
#define printf suanli_print
#define __trap() suanli_trapped("__trap() was reached", SUANLI_HERE)
#define clock64() suanli_ticks()
#define clock() suanli_ticks()

// -- warp operations -----------------------------------------------------------------------------

#define __syncwarp(...) suanli_syncwarp(SUANLI_HERE, ##__VA_ARGS__)
SUANLI_INLINE void suanli_syncwarp(void *site, unsigned mask = 0xffffffffu) {
    suanli_meet(SUANLI_SYNC, mask, 0, site);
}

template <typename T>
SUANLI_INLINE uint64_t suanli_bits(T value) {
    static_assert(sizeof(T) <= 8, "a warp operation moves at most 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
SUANLI_INLINE T suanli_value(uint64_t bits) {
    T value;
    __builtin_memcpy((void *)&value, &bits, sizeof(T));
    return value;
}

// The value of lane `from` of this lane's segment; a lane that did not come has none.
template <typename T>
SUANLI_INLINE T suanli_shuffle(unsigned mask, T value, int from, void *site,
                               int operation = SUANLI_SHUFFLE) {
    const uint64_t *all = suanli_meet(operation, mask, suanli_bits(value), site);
    if (!(suanli_present() >> from & 1)) {
        suanli_complain("a shuffle reads from a lane that does not take part", site);
        return value;
    }
    return suanli_value<T>(all[from]);
}

SUANLI_INLINE int suanli_from_index(int index, int width) {
    int lane = suanli_lane();
    return (lane & ~(width - 1)) | (index & (width - 1));
}
SUANLI_INLINE int suanli_from_up(unsigned delta, int width) {
    int lane = suanli_lane();
    return (lane & (width - 1)) >= (int)delta ? lane - (int)delta : lane;
}
SUANLI_INLINE int suanli_from_down(unsigned delta, int width) {
    int lane = suanli_lane();
    return (lane & (width - 1)) + (int)delta < width ? lane + (int)delta : lane;
}
SUANLI_INLINE int suanli_from_xor(int bits, int width) {
    int lane = suanli_lane(), other = lane ^ bits;
    return (other & ~(width - 1)) <= (lane | (width - 1)) ? other : lane;
}

#define SUANLI_SHUFFLES(name, kind, A, word)                                                       \
    template <typename T>                                                                         \
    SUANLI_INLINE T suanli_##name(void *site, unsigned mask, T value, A a, int width = 32) {      \
        return suanli_shuffle(mask, value, suanli_from_##kind(a, width), site, word);             \
    }
SUANLI_SHUFFLES(shfl, index, int, SUANLI_SHUFFLE)
SUANLI_SHUFFLES(shfl_up, up, unsigned, SUANLI_SHUFFLE_UP)
SUANLI_SHUFFLES(shfl_down, down, unsigned, SUANLI_SHUFFLE_DOWN)
SUANLI_SHUFFLES(shfl_xor, xor, int, SUANLI_SHUFFLE_XOR)
#define __shfl_sync(...) suanli_shfl(SUANLI_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) suanli_shfl_up(SUANLI_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) suanli_shfl_down(SUANLI_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) suanli_shfl_xor(SUANLI_HERE, __VA_ARGS__)

SUANLI_INLINE unsigned suanli_ballot(void *site, unsigned mask, uint64_t predicate) {
    const uint64_t *all = suanli_meet(SUANLI_VOTE, mask, predicate, site);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++)
        if (all[lane] && (suanli_present() >> lane & 1)) votes |= 1u << lane;
    return votes;
}
#define __ballot_sync(mask, p) suanli_ballot(SUANLI_HERE, mask, (p) != 0)
#define __any_sync(mask, p) ((int)(suanli_ballot(SUANLI_HERE, mask, (p) != 0) != 0))
#define __all_sync(mask, p) ((int)(suanli_ballot(SUANLI_HERE, mask, (p) == 0) == 0))
#define __activemask() suanli_active(SUANLI_HERE)

template <typename T>
SUANLI_INLINE unsigned suanli_match(void *site, unsigned mask, T value) {
    const uint64_t *all = suanli_meet(SUANLI_MATCH, mask, suanli_bits(value), site);
    unsigned same = 0;
    for (int lane = 0; lane < 32; lane++)
        if ((suanli_present() >> lane & 1) && all[lane] == suanli_bits(value)) same |= 1u << lane;
    return same;
}
#define __match_any_sync(mask, v) suanli_match(SUANLI_HERE, mask, v)
template <typename T>
SUANLI_INLINE unsigned suanli_match_all(void *site, unsigned mask, T value, int *all_same) {
    unsigned same = suanli_match(site, mask, value);
    *all_same = same == suanli_present();
    return *all_same ? same : 0;
}
#define __match_all_sync(mask, v, p) suanli_match_all(SUANLI_HERE, mask, v, p)

#define SUANLI_REDUCE(name, expression)                                                           \
    template <typename T>                                                                         \
    SUANLI_INLINE T suanli_##name(void *site, unsigned mask, T value) {                           \
        const uint64_t *all = suanli_meet(SUANLI_REDUCTION, mask, suanli_bits(value), site);      \
        bool begun = false;                                                                       \
        T a = value;                                                                              \
        for (int lane = 0; lane < 32; lane++) {                                                   \
            if (!(suanli_present() >> lane & 1)) continue;                                        \
            T b = suanli_value<T>(all[lane]);                                                     \
            a = begun ? (T)(expression) : b;                                                      \
            begun = true;                                                                         \
        }                                                                                         \
        return a;                                                                                 \
    }
SUANLI_REDUCE(reduce_add, a + b)
SUANLI_REDUCE(reduce_min, a < b ? a : b)
SUANLI_REDUCE(reduce_max, a > b ? a : b)
SUANLI_REDUCE(reduce_and, a & b)
SUANLI_REDUCE(reduce_or, a | b)
SUANLI_REDUCE(reduce_xor, a ^ b)
#define __reduce_add_sync(mask, v) suanli_reduce_add(SUANLI_HERE, mask, v)
#define __reduce_min_sync(mask, v) suanli_reduce_min(SUANLI_HERE, mask, v)
#define __reduce_max_sync(mask, v) suanli_reduce_max(SUANLI_HERE, mask, v)
#define __reduce_and_sync(mask, v) suanli_reduce_and(SUANLI_HERE, mask, v)
#define __reduce_or_sync(mask, v) suanli_reduce_or(SUANLI_HERE, mask, v)
#define __reduce_xor_sync(mask, v) suanli_reduce_xor(SUANLI_HERE, mask, v)

#include "suanli_atomics.h"
#include "suanli_math.h"
#include "suanli_integers.h"

#include <assert.h>
