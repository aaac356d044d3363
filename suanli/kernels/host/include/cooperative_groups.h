// Cooperative groups on the CPU: a block, its tiles of up to 32 lanes, and lanes that are together.
#pragma once

namespace cooperative_groups {

class thread_block {
public:
    SUANLI_METHOD void sync() const { (void)suanli_barrier(SUANLI_NONE, 0, SUANLI_HERE); }
    SUANLI_METHOD unsigned thread_rank() const {
        return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    }
    SUANLI_METHOD unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
    SUANLI_METHOD unsigned num_threads() const { return size(); }
    SUANLI_METHOD dim3 group_index() const { return blockIdx; }
    SUANLI_METHOD dim3 thread_index() const { return threadIdx; }
    SUANLI_METHOD dim3 group_dim() const { return blockDim; }
    SUANLI_METHOD dim3 dim_threads() const { return blockDim; }
};
SUANLI_FUNCTION thread_block this_thread_block() { return thread_block(); }

class grid_group {
public:
    SUANLI_METHOD void sync() const {
        suanli_refuse("a barrier of the whole grid cannot be executed on the CPU", SUANLI_HERE);
    }
    SUANLI_METHOD bool is_valid() const { return true; }
    SUANLI_METHOD unsigned long long size() const {
        return (unsigned long long)gridDim.x * gridDim.y * gridDim.z * blockDim.x * blockDim.y * blockDim.z;
    }
    SUANLI_METHOD unsigned long long num_threads() const { return size(); }
    SUANLI_METHOD unsigned long long block_rank() const {
        return blockIdx.x + gridDim.x * (blockIdx.y + (unsigned long long)gridDim.y * blockIdx.z);
    }
    SUANLI_METHOD unsigned long long num_blocks() const {
        return (unsigned long long)gridDim.x * gridDim.y * gridDim.z;
    }
    SUANLI_METHOD unsigned long long thread_rank() const {
        return block_rank() * this_thread_block().size() + this_thread_block().thread_rank();
    }
};
SUANLI_FUNCTION grid_group this_grid() { return grid_group(); }

// Lanes of one warp; rank k is the k-th bit of the mask.
class suanli_lanes {
public:
    unsigned mask;
    SUANLI_METHOD explicit suanli_lanes(unsigned lanes) : mask(lanes) {}
    SUANLI_METHOD void sync() const { suanli_meet(SUANLI_SYNC, mask, 0, SUANLI_HERE); }
    SUANLI_METHOD unsigned size() const { return (unsigned)__builtin_popcount(mask); }
    SUANLI_METHOD unsigned num_threads() const { return size(); }
    SUANLI_METHOD unsigned thread_rank() const {
        return (unsigned)__builtin_popcount(mask & ((1u << suanli_lane()) - 1u));
    }
    SUANLI_METHOD int lane_of(unsigned rank) const {
        unsigned left = mask;
        for (unsigned k = 0; k < rank && left; k++) left &= left - 1;
        return left ? __builtin_ctz(left) : suanli_lane();
    }
    template <typename T>
    SUANLI_METHOD T shfl(T value, unsigned rank) const {
        return suanli_shuffle(mask, value, lane_of(rank % size()), SUANLI_HERE);
    }
    template <typename T>
    SUANLI_METHOD T shfl_up(T value, unsigned delta) const {
        unsigned rank = thread_rank();
        return suanli_shuffle(mask, value, lane_of(rank >= delta ? rank - delta : rank), SUANLI_HERE);
    }
    template <typename T>
    SUANLI_METHOD T shfl_down(T value, unsigned delta) const {
        unsigned rank = thread_rank(), other = rank + delta;
        return suanli_shuffle(mask, value, lane_of(other < size() ? other : rank), SUANLI_HERE);
    }
    template <typename T>
    SUANLI_METHOD T shfl_xor(T value, unsigned bits) const {
        unsigned rank = thread_rank(), other = rank ^ bits;
        return suanli_shuffle(mask, value, lane_of(other < size() ? other : rank), SUANLI_HERE);
    }
    SUANLI_METHOD unsigned ballot(int predicate) const {
        return by_rank(suanli_ballot(SUANLI_HERE, mask, predicate != 0));
    }
    // The lanes of a warp operation's answer, by rank.
    SUANLI_METHOD unsigned by_rank(unsigned lanes) const {
        unsigned made = 0;
        for (unsigned rank = 0; rank < size(); rank++) made |= (lanes >> lane_of(rank) & 1u) << rank;
        return made;
    }
    template <typename T>
    SUANLI_METHOD unsigned match_any(T value) const {
        return by_rank(suanli_match(SUANLI_HERE, mask, value));
    }
    template <typename T>
    SUANLI_METHOD unsigned match_all(T value, int &same) const {
        return by_rank(suanli_match_all(SUANLI_HERE, mask, value, &same));
    }
    SUANLI_METHOD int any(int predicate) const { return ballot(predicate) != 0; }
    SUANLI_METHOD int all(int predicate) const { return ballot(!predicate) == 0; }
};

template <unsigned N, typename Parent = void>
class thread_block_tile : public suanli_lanes {
    static_assert(N <= 32 && (N & (N - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 lanes");

public:
    SUANLI_METHOD thread_block_tile()
        : suanli_lanes((unsigned)((1ull << N) - 1) << (suanli_lane() & ~(int)(N - 1))) {}
    template <typename Other>
    SUANLI_METHOD thread_block_tile(const thread_block_tile<N, Other> &same) : suanli_lanes(same.mask) {}
    SUANLI_METHOD unsigned size() const { return N; }
    SUANLI_METHOD unsigned num_threads() const { return N; }
    SUANLI_METHOD unsigned meta_group_rank() const { return this_thread_block().thread_rank() / N; }
    SUANLI_METHOD unsigned meta_group_size() const {
        return (this_thread_block().size() + N - 1) / N;
    }
};
template <unsigned N, typename Parent>
SUANLI_FUNCTION thread_block_tile<N, Parent> tiled_partition(const Parent &) {
    return thread_block_tile<N, Parent>();
}

class coalesced_group : public suanli_lanes {
public:
    SUANLI_METHOD explicit coalesced_group(unsigned lanes) : suanli_lanes(lanes) {}
};
#define coalesced_threads() coalesced_group(suanli_active(suanli_site()))

template <typename G>
SUANLI_FUNCTION void sync(const G &group) { group.sync(); }
template <typename G>
SUANLI_FUNCTION unsigned thread_rank(const G &group) { return (unsigned)group.thread_rank(); }
template <typename G>
SUANLI_FUNCTION unsigned group_size(const G &group) { return (unsigned)group.size(); }

template <typename T> struct plus { SUANLI_METHOD T operator()(T a, T b) const { return a + b; } };
template <typename T> struct less { SUANLI_METHOD T operator()(T a, T b) const { return b < a ? b : a; } };
template <typename T> struct greater { SUANLI_METHOD T operator()(T a, T b) const { return a < b ? b : a; } };
template <typename T> struct bit_and { SUANLI_METHOD T operator()(T a, T b) const { return a & b; } };
template <typename T> struct bit_or { SUANLI_METHOD T operator()(T a, T b) const { return a | b; } };
template <typename T> struct bit_xor { SUANLI_METHOD T operator()(T a, T b) const { return a ^ b; } };

// Every lane gets the values of the first `ranks` of the group, put together.
template <typename G, typename T, typename F>
SUANLI_FUNCTION T suanli_fold(const G &group, T value, F join, unsigned ranks) {
    T made = value;
    for (unsigned rank = 0; rank < group.num_threads(); rank++) {
        T other = group.shfl(value, rank);
        if (rank < ranks) made = rank ? join(made, other) : other;
    }
    return made;
}
template <typename G, typename T, typename F>
SUANLI_FUNCTION T reduce(const G &group, T value, F join) {
    return suanli_fold(group, value, join, group.num_threads());
}
template <typename G, typename T, typename F>
SUANLI_FUNCTION T inclusive_scan(const G &group, T value, F join) {
    return suanli_fold(group, value, join, group.thread_rank() + 1);
}
template <typename G, typename T>
SUANLI_FUNCTION T inclusive_scan(const G &group, T value) {
    return inclusive_scan(group, value, plus<T>());
}
template <typename G, typename T>
SUANLI_FUNCTION T exclusive_scan(const G &group, T value) {
    T made = group.shfl_up(inclusive_scan(group, value), 1);
    return group.thread_rank() ? made : T(0);
}

}  // namespace cooperative_groups
