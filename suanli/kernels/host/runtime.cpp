// Executes a CUDA kernel on the CPU: blocks one after another, their threads as fibres, every load
// and store of the kernel seen through the hooks that the compiler's thread sanitizer calls (its
// own library is not linked). See interface.h for what the kernel's part calls.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <unordered_map>

#include "fibres.h"
#include "shadow.h"
#include "trace.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
alignas(1024) unsigned char suanli_dynamic_shared[1 << 18];
}

namespace suanli {

typedef void (*Entry)(const suanli_slot *);

// From so many looks at an unchanged place on, others get a turn; and so many turns without
// anything else happening mean that nothing else will.
const int LOOKS = 64, IDLE_TURNS = 200;
// How far beside a shared variable an access still counts as one that misses it.
const long BESIDE = 65536;
// So much beside an argument belongs to nobody else, so that what misses it by far has its name.
const size_t RESERVED = 256u << 20;
// What is kept of that which the threads print.
const size_t PRINTED = 16384;

struct Extent {
    unsigned char *begin, *end;
    Function function;
};

struct Launch {
    Fibres fibres;
    std::vector<Buffer> buffers;
    std::vector<Variable> variables;  // in static shared memory, by place
    std::vector<Cell> shared;         // one cell a byte: static shared memory, then dynamic
    std::set<void *> optimistic;      // plain loads that a compare-and-swap makes good
    unsigned char *static_shared = nullptr, *module_begin = nullptr, *module_end = nullptr;
    size_t static_bytes = 0, dynamic_bytes = 0;
    Findings findings;
    PendingStore pending;
    Trace trace;
    std::vector<Extent> functions;  // other than PERSONS
    std::unordered_map<void *, Function> known_functions;
    bool tracing = false, stopped = false, reversed = false;
    int block = 0, blocks = 0, threads = 0;
    uint32_t epoch = 0;
    uint64_t step = 0, limit = 0;
    std::vector<uint64_t> released;  // step of a block's last atomic operation behind a fence
    bool acquired = false, fenced = false;
    long long barriers = 0, meetings = 0, executed = 0;
    std::string printed, report;
};

static Launch *run = nullptr;

// PLAIN is aligned as its type asks, PIECES is not and goes as several instructions.
enum Kind { PLAIN, PIECES, VOLATILE, ATOMIC };

struct Access {
    unsigned char *p;
    size_t bytes;
    bool write;
    Kind kind;
    void *site;
    bool reads;  // what was there before matters

    const char *outside() const { return write ? "out-of-bounds-write" : "out-of-bounds-read"; }
    bool misaligned() const {
        return kind != PIECES && (bytes & (bytes - 1)) == 0 && (uintptr_t)p % bytes != 0;
    }
};

// Where the function that a thread is in was called from; null in the kernel itself.
static void *caller_of(const Fibre *f) {
    size_t depth = f->calls.size();
    while (depth && f->calls[depth - 1].function == COPIES) depth--;
    return depth > 1 ? f->calls[depth - 1].from : nullptr;
}

static Stamp now(void *site, bool atomic) {
    Fibre *f = run->fibres.current;
    Stamp s;
    s.caller = caller_of(f);
    s.block = run->block, s.thread = f->number, s.epoch = run->epoch, s.clock = f->clock;
    s.step = ++run->step, s.site = site, s.atomic = atomic;
    return s;
}

static Finding &complain(const char *kind, void *site, void *other, const std::string &buffer) {
    Finding &entry = run->findings.at(kind, site, other, buffer);
    if (entry.count == 1) {
        entry.block = run->block;
        entry.thread = run->fibres.current ? run->fibres.current->number : -1;
        if (run->fibres.current) entry.caller = caller_of(run->fibres.current);
    }
    return entry;
}

// Whether what `before` did is certain to be seen by (or done before) the access `after`.
static bool ordered(const Stamp &before, const Stamp &after) {
    if (before.block < 0) return true;
    if (before.block != after.block)
        return run->acquired && before.step < run->released[before.block];
    if (before.thread == after.thread || before.epoch != after.epoch) return true;
    const Fibre &other = run->fibres.all[before.thread];
    if (before.step < other.released && run->fibres.current->acquired > other.released) return true;
    if (before.thread / 32 != after.thread / 32) return false;
    return run->fibres.current->known[before.thread % 32] > before.clock;
}

static Finding &race(const char *kind, const Stamp &before, const Stamp &after,
                     const std::string &where, long long element) {
    Finding &entry = complain(kind, after.site, before.site, where);
    if (entry.count == 1) {
        entry.other_block = before.block, entry.other_thread = before.thread;
        entry.element = element, entry.other_caller = before.caller;
        if (before.atomic != after.atomic) entry.soft = before.atomic ? after.site : before.site;
    }
    return entry;
}

static void touch_cell(Cell &cell, const Stamp &stamp, const Access &a, const std::string &where,
                       long long element) {
    bool both_atomic = stamp.atomic && cell.writer.atomic;
    if (!both_atomic && stamp.meets(cell.writer) && !ordered(cell.writer, stamp)) {
        const char *kind = a.write ? "race-write-write" : "race-read-after-write";
        Finding &entry = race(kind, cell.writer, stamp, where, element);
        if (a.write) run->pending.begin(entry, a.p, a.bytes);
        entry.differs |= stamp.atomic;
    }
    if (a.write) {
        for (const Stamp *reader : {&cell.reader, &cell.other_reader})
            if (!(reader->atomic && stamp.atomic) && stamp.meets(*reader) &&
                !ordered(*reader, stamp))
                race("race-write-after-read", *reader, stamp, where, element);
        cell.writer = stamp;
        return;
    }
    if (cell.reader.thread != stamp.thread || cell.reader.block != stamp.block)
        cell.other_reader = cell.reader;
    cell.reader = stamp;
}

// `at` counts bytes from the first static variable; `begin` is where the array at hand starts.
static void touch_shared(const Access &a, size_t at, size_t begin, const std::string &name) {
    Stamp stamp = now(a.site, a.kind == ATOMIC);
    Fibre *f = run->fibres.current;
    if (run->tracing)
        run->trace.add(f->warp, f->lane, f->number, a.site, (uint64_t)a.p, (int)a.bytes, SHARED,
                       a.write, stamp.atomic, -1);
    if (a.misaligned()) complain("misaligned", a.site, nullptr, name);
    long long element = (long long)((at - begin) / a.bytes);
    bool unwritten = false;
    for (size_t i = at; i < at + a.bytes; i++) {
        Cell &cell = run->shared[i];
        if (cell.writer.block != stamp.block) cell.writer = Stamp();
        if (cell.reader.block != stamp.block) cell.reader = cell.other_reader = Stamp();
        unwritten |= a.reads && cell.writer.block < 0;
        touch_cell(cell, stamp, a, name, element);
    }
    if (unwritten) {
        Finding &entry = complain("uninitialised-shared", a.site, nullptr, name);
        if (entry.count == 1) entry.element = element;
    }
}

static void stop_all() {
    run->stopped = true;
    run->fibres.stop();
}

static void touch_buffer(Buffer &buffer, int index, const Access &a) {
    Stamp stamp = now(a.site, a.kind == ATOMIC || a.kind == VOLATILE);
    Fibre *f = run->fibres.current;
    if (run->tracing)
        run->trace.add(f->warp, f->lane, f->number, a.site, (uint64_t)(a.p - buffer.data()) + 4096,
                       (int)a.bytes, GLOBAL, a.write, a.kind == ATOMIC, index);
    long long offset = a.p - buffer.data();
    long long element = offset >= 0 ? offset / (long long)buffer.element
                                    : -((-offset + (long long)buffer.element - 1) /
                                        (long long)buffer.element);
    if (offset < 0 || offset + (long long)a.bytes > (long long)buffer.bytes) {
        Finding &entry = complain(a.outside(), a.site, nullptr, buffer.name);
        if (entry.count == 1) entry.element = element;
        if (buffer.ends(a.p, a.bytes)) stop_all();
        return;
    }
    if (a.misaligned()) complain("misaligned", a.site, nullptr, buffer.name);
    if (a.write && !buffer.writable) complain("input-written", a.site, nullptr, buffer.name);
    if (buffer.cells.empty()) return;  // only traced
    size_t last = (offset + a.bytes - 1) / buffer.element;
    if (buffer.output && a.reads && buffer.cells[element].writer.block < 0) {
        Finding &entry = complain("uninitialised-output", a.site, nullptr, buffer.name);
        if (entry.count == 1) entry.element = element;
    }
    size_t size = buffer.element, end = offset + a.bytes;
    for (size_t e = element; e <= last; e++) {
        stamp.begin = (uint8_t)(std::max((size_t)offset, e * size) - e * size);
        stamp.end = (uint8_t)(std::min(end, (e + 1) * size) - e * size);
        touch_cell(buffer.cells[e], stamp, a, buffer.name, (long long)e);
    }
}

// Whether an address lies in threadIdx and its kin, in __constant__ and __device__ data, or in what
// a warp operation passes from lane to lane.
static bool is_known(const unsigned char *p) {
    auto within = [p](const void *base, size_t bytes) {
        return p >= (const unsigned char *)base && p < (const unsigned char *)base + bytes;
    };
    if (within(&threadIdx, sizeof threadIdx) || within(&blockIdx, sizeof blockIdx) ||
        within(&blockDim, sizeof blockDim) || within(&gridDim, sizeof gridDim) ||
        within(run->module_begin, (size_t)(run->module_end - run->module_begin)))
        return true;
    std::vector<Fibre> &all = run->fibres.all;
    return within(all.data(), all.size() * sizeof(Fibre));
}

// A thread whose local memory an address is in, other than the one that runs.
static const Fibre *stranger(const unsigned char *p) {
    for (const Fibre &f : run->fibres.all)
        if (f.owns(p)) return &f;
    return nullptr;
}

// The shared variable nearest to an offset, inside or beside it.
static const Variable *nearest(long offset) {
    const Variable *best = nullptr;
    long least = 0;
    for (const Variable &v : run->variables) {
        long away = std::max({(long)v.begin - offset, offset - (long)v.end() + 1, 0L});
        if (!best || away < least) best = &v, least = away;
        if (away == 0) break;
    }
    return best;
}

// Static shared memory and what lies beside it; false where the address is neither.
static bool is_shared(const Access &a) {
    if (run->variables.empty()) return false;
    long offset = a.p - run->static_shared, bytes = (long)a.bytes;
    if (offset < -BESIDE || offset >= (long)run->static_bytes + BESIDE) return false;
    const Variable *v = nearest(offset);
    if (offset >= (long)v->begin && offset + bytes <= (long)v->end()) {
        if (!v->name.empty()) touch_shared(a, (size_t)offset, v->begin, v->name);
        return true;  // without a name: the compiler's own
    }
    bool inside = offset >= 0 && offset + bytes <= (long)run->static_bytes;
    Finding &entry = complain(a.outside(), a.site, nullptr, v->name);
    long from = offset - (long)v->begin;
    if (entry.count == 1) entry.element = from < 0 ? -((-from + bytes - 1) / bytes) : from / bytes;
    if (!inside) stop_all();
    return true;
}

static void dynamic_shared(const Access &a) {
    size_t offset = a.p - suanli_dynamic_shared;
    if (offset + a.bytes > run->dynamic_bytes) {
        Finding &entry = complain(a.outside(), a.site, nullptr, "dynamic shared memory");
        if (entry.count == 1) entry.element = (long long)(offset / a.bytes);
        return;
    }
    touch_shared(a, run->static_bytes + offset, run->static_bytes, "dynamic shared memory");
}

// An atomic operation or a volatile access: what stands before a fence is seen by who looks later.
static void synchronise(Fibre *f) {
    run->acquired = true;
    f->acquired = ++run->step;
    if (run->fenced) run->released[run->block] = ++run->step;
    if (f->fenced) f->released = ++run->step;
}

// Lets other threads run where one looks at the same unchanged place again and again.
static void look(Fibre *f, const Access &a) {
    uint64_t value = 0;
    memcpy(&value, a.p, std::min(a.bytes, sizeof value));
    bool same = f->watched == a.p && f->watching == a.site && f->watched_value == value;
    f->watched = a.p, f->watching = a.site, f->watched_value = value;
    f->looks = same ? f->looks + 1 : 0;
    if (f->looks < LOOKS) return;
    f->looks = 0, f->spun = true;
    run->fibres.leave();
}

static void access(const Access &a) {
    if (!run || !run->fibres.current) return;
    run->pending.settle();
    Fibre *f = run->fibres.current;
    unsigned char *p = a.p;
    if (f->owns(p)) return;
    bool own_static = p >= run->static_shared && p < run->static_shared + run->static_bytes;
    bool reached = own_static && is_shared(a);
    for (size_t i = 0; i < run->buffers.size() && !reached; i++)
        if (run->buffers[i].holds(p)) {
            touch_buffer(run->buffers[i], (int)i, a);
            reached = true;
        }
    if (!reached && p >= suanli_dynamic_shared &&
        p < suanli_dynamic_shared + sizeof suanli_dynamic_shared) {
        dynamic_shared(a);
        reached = true;
    }
    const Fibre *other = reached || is_known(p) ? nullptr : stranger(p);
    if (other) {
        Finding &entry = complain("foreign-local", a.site, nullptr, "");
        if (entry.count == 1) entry.other_thread = other->number;
    } else if (!reached && !is_known(p) && !is_shared(a)) {
        complain(a.write ? "wild-write" : "wild-read", a.site, nullptr, "");
        stop_all();
    }
    if (run->step > run->limit) {
        complain("too-long", a.site, nullptr, "");
        stop_all();
    }
    if (a.kind != ATOMIC && a.kind != VOLATILE) {
        if (reached) f->looks = 0;  // it does something else between
        return;
    }
    if (a.kind == ATOMIC || !a.write) look(f, a);
    synchronise(f);
}

// -- waiting -------------------------------------------------------------------------------------

static void release_barrier(std::vector<Fibre *> &waiting) {
    void *site = waiting[0]->site;
    for (Fibre *f : waiting)
        if (f->site != site) {
            run->fibres.current = f;
            Finding &entry = complain("divergent-barrier", f->site, site, "");
            if (entry.count == 1) entry.other_thread = waiting[0]->number;
        }
    if ((int)waiting.size() < run->threads) {
        Fibre *missing = nullptr;
        for (Fibre &f : run->fibres.all)
            if (f.state == DONE && !missing) missing = &f;
        run->fibres.current = waiting[0];
        Finding &entry = complain("barrier-after-exit", site, nullptr, "");
        if (entry.count == 1 && missing) entry.other_thread = missing->number;
    }
    run->fibres.current = nullptr;
    int count = 0;
    for (Fibre *f : waiting) count += f->predicate != 0;
    for (Fibre *f : waiting) {
        f->result = f->vote == SUANLI_COUNT ? count
                    : f->vote == SUANLI_AND ? count == (int)waiting.size()
                                            : count > 0;
        f->state = READY;
    }
    run->epoch++;
    run->barriers++;
}

// Finish a meeting if all lanes of its mask that still run have come.
static void try_meeting(Fibre &last) {
    int first = last.warp * 32;
    int end = std::min(first + 32, run->threads);
    unsigned present = 0;
    for (int i = first; i < end; i++) {
        Fibre &f = run->fibres.all[i];
        if (!(last.mask >> f.lane & 1) || f.state == DONE) continue;
        if (f.state != AT_MEETING || f.mask != last.mask || f.operation != last.operation) return;
        present |= 1u << f.lane;
    }
    uint64_t values[32] = {0};
    uint32_t clocks[32] = {0};
    for (int i = first; i < end; i++) {
        Fibre &f = run->fibres.all[i];
        if (!(present >> f.lane & 1)) continue;
        values[f.lane] = f.value;
        for (int k = 0; k < 32; k++) clocks[k] = std::max(clocks[k], f.known[k]);
    }
    // only __syncwarp (and matrix operations) order memory; shuffles and votes do not
    bool orders = last.operation == SUANLI_SYNC || last.operation == SUANLI_MATRIX;
    for (int i = first; i < end; i++) {
        Fibre &f = run->fibres.all[i];
        if (!(present >> f.lane & 1)) continue;
        memcpy(f.inbox, values, sizeof values);
        f.present = present;
        f.state = READY;
        if (!orders) continue;
        for (int k = 0; k < 32; k++) f.known[k] = clocks[k];
        for (int k = first; k < end; k++)
            if (present >> (k - first) & 1)
                f.known[k - first] = std::max(f.known[k - first], run->fibres.all[k].clock + 1);
    }
    if (orders)
        for (int i = first; i < end; i++)
            if (present >> (i - first) & 1) run->fibres.all[i].clock++;
    run->meetings++;
}

// Lanes of a warp that asked at one place who else is there: those that came are.
static bool release_active() {
    bool any = false;
    for (Fibre &f : run->fibres.all) {
        if (f.state != AT_ACTIVE) continue;
        unsigned present = 0;
        int first = f.warp * 32, end = std::min(first + 32, run->threads);
        for (int i = first; i < end; i++) {
            Fibre &g = run->fibres.all[i];
            if (g.state == AT_ACTIVE && g.site == f.site) present |= 1u << g.lane;
        }
        for (int i = first; i < end; i++) {
            Fibre &g = run->fibres.all[i];
            if (present >> g.lane & 1) g.present = present, g.state = READY;
        }
        any = true;
    }
    return any;
}

// All that still run look at places that nobody changes any more.
static void spinning() {
    bool others_wait = false;
    for (Fibre &f : run->fibres.all) others_wait |= f.state == AT_BARRIER || f.state == AT_MEETING;
    bool for_a_block = run->blocks > 1 && !others_wait;
    for (Fibre &f : run->fibres.all) {
        if (f.state != READY) continue;
        run->fibres.current = &f;
        complain(for_a_block ? "waits-for-block" : "waits-in-loop", f.watching, nullptr, "");
    }
    run->fibres.current = nullptr;
}

static void stuck() {
    for (Fibre &f : run->fibres.all) {
        if (f.state != AT_BARRIER && f.state != AT_MEETING) continue;
        run->fibres.current = &f;
        Fibre *other = nullptr;
        for (Fibre &g : run->fibres.all)
            if (g.state != DONE && g.site != f.site) {
                other = &g;
                break;
            }
        Finding &entry = complain("deadlock", f.site, other ? other->site : nullptr, "");
        if (entry.count == 1 && other) entry.other_thread = other->number;
    }
    run->fibres.current = nullptr;
}

static void run_block() {
    Fibres &fibres = run->fibres;
    fibres.prepare(run->threads);
    run->epoch = 0, run->acquired = run->fenced = false;
    memset(run->static_shared, 0xFF, run->static_bytes);
    memset(suanli_dynamic_shared, 0xFF, run->dynamic_bytes);
    int idle = 0;
    while (!run->stopped) {
        bool moved = false, progressed = false;
        for (int k = 0; k < run->threads && !run->stopped; k++) {
            Fibre &f = fibres.all[run->reversed ? run->threads - 1 - k : k];
            if (f.state != READY) continue;
            moved = true, f.spun = false;
            fibres.enter(f);
            run->pending.settle();
            progressed |= !f.spun;
            if (f.state == DONE)  // lanes that waited for this one alone may go on
                for (Fibre &g : fibres.all)
                    if (g.warp == f.warp && g.state == AT_MEETING && g.mask >> f.lane & 1)
                        try_meeting(g);
        }
        idle = progressed ? 0 : idle + 1;
        if (moved && idle > IDLE_TURNS && !run->stopped) {
            spinning();
            run->stopped = true;
        }
        if (moved || run->stopped || release_active()) continue;
        std::vector<Fibre *> waiting;
        int alive = 0;
        for (Fibre &f : fibres.all) {
            alive += f.state != DONE;
            if (f.state == AT_BARRIER) waiting.push_back(&f);
        }
        if (alive == 0) break;
        if ((int)waiting.size() == alive) {
            release_barrier(waiting);
        } else {
            stuck();
            run->stopped = true;
        }
    }
    run->trace.flush();
}

}  // namespace suanli

#include "calls.h"
