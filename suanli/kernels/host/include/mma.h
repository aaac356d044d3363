// Warp matrix operations (nvcuda::wmma) on the CPU.
//
// Which element of a fragment a lane holds is not specified by CUDA; here lane l holds elements
// l*n .. l*n+n-1 of the matrix in row-major order. Products of 16-bit values are exact in float;
// sums are kept in float (double for double, int for int8) and rounded once to the accumulator.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}

template <typename T>
struct suanli_element {
    typedef T storage;
    typedef float sum;
};
template <>
struct suanli_element<precision::tf32> {
    typedef float storage;
    typedef float sum;
};
template <>
struct suanli_element<double> {
    typedef double storage;
    typedef double sum;
};
template <>
struct suanli_element<signed char> {
    typedef signed char storage;
    typedef int sum;
};
template <>
struct suanli_element<unsigned char> {
    typedef unsigned char storage;
    typedef int sum;
};

template <typename Use, int M, int N, int K>
struct suanli_extent;
template <int M, int N, int K>
struct suanli_extent<matrix_a, M, N, K> { static const int rows = M, columns = K; };
template <int M, int N, int K>
struct suanli_extent<matrix_b, M, N, K> { static const int rows = K, columns = N; };
template <int M, int N, int K>
struct suanli_extent<accumulator, M, N, K> { static const int rows = M, columns = N; };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static const int rows = suanli_extent<Use, M, N, K>::rows;
    static const int columns = suanli_extent<Use, M, N, K>::columns;
    static const int num_elements = rows * columns / 32;
    typedef typename suanli_element<T>::storage storage;
    storage x[num_elements];
};

SUANLI_INLINE float __float_to_tf32(float v) {
    uint32_t bits = __float_as_uint(v);
    return __uint_as_float((bits + 0x1000u) & 0xffffe000u);  // to nearest, ties away
}

template <typename F, typename V>
SUANLI_INLINE void fill_fragment(F &fragment, V value) {
    for (int i = 0; i < F::num_elements; i++) fragment.x[i] = (typename F::storage)value;
}

// Tells of a tile as the hardware moves it: every lane a run of neighbours, 16 bytes at a time.
template <typename F, typename T>
SUANLI_INLINE void suanli_touch_tile(const T *memory, unsigned leading, bool by_rows, int is_write,
                                     void *site) {
    const int minor = by_rows ? F::columns : F::rows, chunk = 16 / sizeof(T);
    const int run = F::num_elements < chunk ? F::num_elements : chunk;
    for (int i = 0; i < F::num_elements; i += run) {
        int e = i * 32 + suanli_lane() * run;
        suanli_touch(memory + e / minor * leading + e % minor, run * (int)sizeof(T), is_write, site);
    }
}

template <typename F, typename T>
SUANLI_INLINE void suanli_load(F &fragment, const T *memory, unsigned leading, bool by_rows,
                               void *site) {
    suanli_meet(SUANLI_MATRIX, 0xffffffffu, 0, site);
    suanli_touch_tile<F>(memory, leading, by_rows, 0, site);
    for (int i = 0; i < F::num_elements; i++) {
        int e = suanli_lane() * F::num_elements + i, r = e / F::columns, c = e % F::columns;
        const T *p = memory + (by_rows ? r * leading + c : c * leading + r);
        fragment.x[i] = *p;
    }
}

template <typename U, int M, int N, int K, typename T, typename V>
SUANLI_INLINE void suanli_load_matrix(void *site, fragment<U, M, N, K, T, row_major> &f, const V *p,
                                      unsigned leading) {
    suanli_load(f, p, leading, true, site);
}
template <typename U, int M, int N, int K, typename T, typename V>
SUANLI_INLINE void suanli_load_matrix(void *site, fragment<U, M, N, K, T, col_major> &f, const V *p,
                                      unsigned leading) {
    suanli_load(f, p, leading, false, site);
}
template <int M, int N, int K, typename T, typename V>
SUANLI_INLINE void suanli_load_matrix(void *site, fragment<accumulator, M, N, K, T> &f, const V *p,
                                      unsigned leading, layout_t layout) {
    suanli_load(f, p, leading, layout == mem_row_major, site);
}
#define load_matrix_sync(...) suanli_load_matrix(SUANLI_HERE, __VA_ARGS__)

template <typename F, typename T>
SUANLI_INLINE void suanli_store_matrix(void *site, T *memory, const F &fragment, unsigned leading,
                                       layout_t layout) {
    suanli_meet(SUANLI_MATRIX, 0xffffffffu, 0, site);
    suanli_touch_tile<F>(memory, leading, layout == mem_row_major, 1, site);
    for (int i = 0; i < F::num_elements; i++) {
        int e = suanli_lane() * F::num_elements + i, r = e / F::columns, c = e % F::columns;
        T *p = memory + (layout == mem_row_major ? r * leading + c : c * leading + r);
        *p = (T)fragment.x[i];
    }
}
#define store_matrix_sync(...) suanli_store_matrix(SUANLI_HERE, __VA_ARGS__)

// One lane's fragments as the others find them.
template <typename A, typename B>
struct suanli_operands {
    const A *a;
    const B *b;
};

template <typename D, typename A, typename B, typename C>
__attribute__((no_sanitize_thread)) static void suanli_multiply(void *site, D &d, const A &a,
                                                                const B &b, const C &c) {
    typedef typename suanli_element<typename A::storage>::sum sum;
    suanli_operands<A, B> mine = {&a, &b};
    const uint64_t *all = suanli_meet(SUANLI_MATRIX, 0xffffffffu, (uint64_t)&mine, site);
    if (suanli_present() != 0xffffffffu) {
        suanli_refuse("a matrix operation needs all 32 lanes of its warp", site);
    }
    typename D::storage made[D::num_elements];
    for (int i = 0; i < D::num_elements; i++) {
        int e = suanli_lane() * D::num_elements + i, row = e / D::columns, column = e % D::columns;
        sum total = (sum)c.x[i];
        for (int k = 0; k < A::columns; k++) {
            int ea = row * A::columns + k, eb = k * B::columns + column;
            auto la = (const suanli_operands<A, B> *)all[ea / A::num_elements];
            auto lb = (const suanli_operands<A, B> *)all[eb / B::num_elements];
            total += (sum)la->a->x[ea % A::num_elements] * (sum)lb->b->x[eb % B::num_elements];
        }
        made[i] = (typename D::storage)total;
    }
    suanli_meet(SUANLI_MATRIX, 0xffffffffu, 0, site);  // nobody changes what others still read
    for (int i = 0; i < D::num_elements; i++) d.x[i] = made[i];
}
#define mma_sync(...) suanli_multiply(SUANLI_HERE, __VA_ARGS__)

}  // namespace wmma
}  // namespace nvcuda
