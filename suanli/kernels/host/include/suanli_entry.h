// Calls a kernel with the arguments that the process outside gave, whatever their types are.
#pragma once

template <typename T>
struct suanli_argument {
    SUANLI_INLINE T of(const suanli_slot &s) {
        return s.kind == 2 ? (T)s.real : (T)s.whole;
    }
};

template <typename T>
struct suanli_argument<T *> {
    SUANLI_INLINE T *of(const suanli_slot &s) { return (T *)s.pointer; }
};

template <int... I>
struct suanli_indices {};
template <int N, int... I>
struct suanli_count : suanli_count<N - 1, N - 1, I...> {};
template <int... I>
struct suanli_count<0, I...> {
    typedef suanli_indices<I...> type;
};

template <typename... A, int... I>
__attribute__((no_sanitize_thread)) static void suanli_call(void (*kernel)(A...),
                                                            const suanli_slot *slots,
                                                            suanli_indices<I...>) {
    kernel(suanli_argument<A>::of(slots[I])...);
}

template <typename... A>
__attribute__((no_sanitize_thread)) static void suanli_start(void (*kernel)(A...),
                                                             const suanli_slot *slots) {
    suanli_call(kernel, slots, typename suanli_count<sizeof...(A)>::type());
}

template <typename... A>
constexpr int suanli_arity(void (*)(A...)) {
    return (int)sizeof...(A);
}

static thread_local suanli_band suanli_band_last __attribute__((used));
