// What the host execution of a CUDA kernel and its runtime share. Both are compiled with the same
// compiler; the kernel's part with its loads and stores instrumented, the runtime's part without.
#pragma once
#include <stdint.h>

struct uint3 {
    unsigned x, y, z;
};

extern uint3 threadIdx, blockIdx;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

extern dim3 blockDim, gridDim;

// An argument of the kernel: `kind` is 0 for a pointer, 1 for a whole number, 2 for a real one, 3
// for a structure of `whole` bytes at `pointer`.
struct suanli_slot {
    int kind;
    long long whole;
    double real;
    void *pointer;
};

// Lanes meet where they do the same of these; __shfl_up_sync and __shfl_xor_sync never meet.
enum suanli_warp_operation {
    SUANLI_SHUFFLE,
    SUANLI_SHUFFLE_UP,
    SUANLI_SHUFFLE_DOWN,
    SUANLI_SHUFFLE_XOR,
    SUANLI_VOTE,
    SUANLI_MATCH,
    SUANLI_REDUCTION,
    SUANLI_SYNC,
    SUANLI_MATRIX,
};

// What an atomic operation makes of what was there. After SETTLES_ it comes out right whatever a
// plain load saw before, as a compare-and-swap, a minimum or a maximum does.
enum suanli_atomic_kind { SUANLI_ADDS, SUANLI_SETTLES, SUANLI_REPLACES };

enum suanli_block_vote { SUANLI_NONE, SUANLI_COUNT, SUANLI_AND, SUANLI_OR };

extern "C" {
extern unsigned char suanli_dynamic_shared[];

// Barrier of the block; gives the vote over all threads.
int suanli_barrier(int vote, int predicate, void *site);
// Meets the lanes of `mask` and gives their values: 32 of them, valid until the next meeting.
const uint64_t *suanli_meet(int operation, unsigned mask, uint64_t value, void *site);
// Lanes of the mask that were at the last meeting.
unsigned suanli_present(void);
int suanli_lane(void);
// Lanes of the warp that are at the same place; waits until no other lane can run.
unsigned suanli_active(void *site);
// Of the block only, or of all.
void suanli_fence(int of_block);
// Says that an atomic operation of so many bytes is about to happen.
void suanli_atomic(void *address, int bytes, int kind, void *site);
// Says of a load or store that instrumentation does not see.
void suanli_touch(const void *address, int bytes, int is_write, void *site);
// Notes a mistake that only the intrinsic itself can see, and goes on.
void suanli_complain(const char *text, void *site);
// Ends the launch: the kernel said so itself, by assert() or __trap().
void suanli_trapped(const char *text, void *site);
// Ends the launch: the kernel did what cannot be executed here.
void suanli_refuse(const char *text, void *site);
// What the kernel prints; the first of it is kept.
int suanli_print(const char *format, ...) __attribute__((format(printf, 1, 2)));
long long suanli_ticks(void);
}
