// The threads of a block as fibres: each runs until it waits at a barrier or a warp operation.
//
// First entry goes through ucontext, every later switch through _setjmp and _longjmp, which leave
// the signal mask alone and are therefore quick.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#include "interface.h"

namespace suanli {

enum State { READY, AT_BARRIER, AT_MEETING, AT_ACTIVE, DONE };

const size_t STACK = 256 * 1024, PAGE = 4096;

// Functions that copy a structure: what they access counts for whoever called them, and not at all
// where that was a part of the runtime.
enum Function { PERSONS, COPIES, OWN };

struct Call {
    void *from;
    Function function;
};

struct Fibre {
    ucontext_t context;
    jmp_buf place;
    unsigned char *stack = nullptr;
    bool begun = false;
    State state = READY;
    uint3 index{};
    int number = 0, lane = 0, warp = 0;
    // what it waits for
    void *site = nullptr;
    int vote = 0, predicate = 0, result = 0;
    int operation = 0;
    unsigned mask = 0, present = 0;
    uint64_t value = 0, inbox[32];
    // how often it and the other lanes of its warp had synchronised when they last met
    uint32_t known[32], clock = 0;
    // a fence, the last atomic operation behind one, and the last atomic operation at all
    bool fenced = false;
    uint64_t released = 0, acquired = 0;
    // where it looks at one place again and again
    const void *watched = nullptr;
    void *watching = nullptr;
    uint64_t watched_value = 0;
    int looks = 0;
    bool spun = false;
    std::vector<Call> calls;  // the functions that it is in

    bool owns(const void *p) const {
        auto address = (const unsigned char *)p;
        return address >= stack && address < stack + STACK;
    }
};

class Fibres {
public:
    std::vector<Fibre> all;
    Fibre *current = nullptr;
    std::function<void()> body;

    void prepare(int threads) {
        while ((int)all.size() < threads) {
            Fibre fibre;
            // below the stack lies a page that nobody may touch, which ends a recursion
            void *memory = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE)) abort();
            fibre.stack = (unsigned char *)memory + PAGE;
            all.push_back(fibre);
        }
        all.resize(threads);
        for (int i = 0; i < threads; i++) {
            Fibre &f = all[i];
            f.begun = false, f.state = READY, f.number = i, f.lane = i % 32, f.warp = i / 32;
            f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
            f.clock = 0, f.site = nullptr, f.present = 0;
            f.fenced = f.spun = false, f.released = f.acquired = 0;
            f.watched = nullptr, f.looks = 0, f.calls.clear();
            for (auto &k : f.known) k = 0;
        }
    }

    // Let a fibre run until it waits or is done.
    void enter(Fibre &fibre) {
        current = &fibre;
        threadIdx = fibre.index;
        if (_setjmp(home_) == 0) {
            if (fibre.begun) _longjmp(fibre.place, 1);
            fibre.begun = true;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack;
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = nullptr;
            active_ = this;
            makecontext(&fibre.context, start, 0);
            setcontext(&fibre.context);
        }
        current = nullptr;
    }

    // Called by the fibre itself: back to the scheduler.
    void leave() {
        if (_setjmp(current->place) == 0) _longjmp(home_, 1);
    }

    // Called by the fibre itself: it never comes back.
    [[noreturn]] void stop() {
        current->state = DONE;
        _longjmp(home_, 1);
    }

private:
    jmp_buf home_;
    static Fibres *active_;

    static void start() {
        active_->body();
        active_->stop();
    }
};

inline Fibres *Fibres::active_ = nullptr;

}  // namespace suanli
