// Calls a kernel with the arguments that the process outside gave, whatever their types are.
#pragma once

template <typename T>
struct suanli_argument {
    SUANLI_INLINE T of(const suanli_slot &s) {
        if (s.kind == 3 && s.whole == (long long)sizeof(T)) {
            alignas(T) unsigned char bytes[sizeof(T)];
            __builtin_memcpy(bytes, s.pointer, sizeof(T));
            return *(T *)bytes;
        }
        if constexpr (__is_enum(T) ||
                      (__is_constructible(T, double) && __is_constructible(T, long long))) {
            if (s.kind != 3) return s.kind == 2 ? (T)s.real : (T)s.whole;
        }
        suanli_trapped("an argument has another size or kind than its type in the kernel", nullptr);
        __builtin_unreachable();
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
