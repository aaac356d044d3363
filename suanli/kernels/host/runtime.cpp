// Executes a CUDA kernel on the CPU: blocks one after another, their threads as fibres, every load
// and store of the kernel seen through the hooks that the compiler's thread sanitizer calls (its
// own library is not linked). See interface.h for what the kernel's part calls.
#include <cstdio>
#include <cstring>
#include <memory>

#include "fibres.h"
#include "shadow.h"
#include "trace.h"

suanli_uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
alignas(1024) unsigned char suanli_dynamic_shared[1 << 18];
}

namespace suanli {

typedef void (*Entry)(const suanli_slot *);
typedef void (*Settle)();

struct Launch {
    Fibres fibres;
    std::vector<Buffer> buffers;
    std::vector<Cell> shared;  // one cell a byte: static shared memory, then dynamic
    std::vector<Stamp> shared_started;
    unsigned char *static_shared = nullptr, *module_begin = nullptr, *module_end = nullptr;
    size_t static_bytes = 0, dynamic_bytes = 0;
    Findings findings;
    Trace trace;
    bool tracing = false, stopped = false, reversed = false;
    int block = 0, blocks = 0, threads = 0;
    uint32_t epoch = 0;
    uint64_t step = 0, limit = 0;
    std::vector<uint64_t> released;  // step of a block's last atomic operation behind a fence
    bool acquired = false, fenced = false;
    long long barriers = 0, meetings = 0, executed = 0;
    std::string refusal, report;
};

static Launch *run = nullptr;

static Stamp now(void *site, bool atomic) {
    Fibre *f = run->fibres.current;
    Stamp s;
    s.block = run->block, s.thread = f->number, s.epoch = run->epoch, s.clock = f->clock;
    s.step = ++run->step, s.site = site, s.atomic = atomic;
    return s;
}

static Finding &complain(const char *kind, void *site, void *other, const std::string &buffer) {
    Finding &entry = run->findings.at(kind, site, other, buffer);
    if (entry.count == 1) {
        entry.block = run->block;
        entry.thread = run->fibres.current ? run->fibres.current->number : -1;
    }
    return entry;
}

// Whether what `before` did is certain to be seen by (or done before) the access `after`.
static bool ordered(const Stamp &before, const Stamp &after) {
    if (before.block < 0) return true;
    if (before.block != after.block)
        return run->acquired && before.step < run->released[before.block];
    if (before.thread == after.thread || before.epoch != after.epoch) return true;
    if (before.thread / 32 != after.thread / 32) return false;
    return run->fibres.current->known[before.thread % 32] > before.clock;
}

static void race(const char *kind, const Stamp &before, const Stamp &after,
                 const std::string &where, long long element) {
    Finding &entry = complain(kind, after.site, before.site, where);
    if (entry.count == 1) {
        entry.other_block = before.block, entry.other_thread = before.thread;
        entry.element = element;
    }
}

static void touch_cell(Cell &cell, const Stamp &stamp, bool write, const std::string &where,
                       long long element) {
    bool both_atomic = stamp.atomic && cell.writer.atomic;
    if (!both_atomic && !ordered(cell.writer, stamp))
        race(write ? "race-write-write" : "race-read-after-write", cell.writer, stamp, where,
             element);
    if (write) {
        for (const Stamp *reader : {&cell.reader, &cell.other_reader})
            if (!(reader->atomic && stamp.atomic) && !ordered(*reader, stamp))
                race("race-write-after-read", *reader, stamp, where, element);
        cell.writer = stamp;
        return;
    }
    if (cell.reader.thread != stamp.thread || cell.reader.block != stamp.block)
        cell.other_reader = cell.reader;
    cell.reader = stamp;
}

static void touch_shared(size_t offset, size_t bytes, bool write, const Stamp &stamp,
                         uint64_t address, int lane_bytes) {
    if (run->tracing) {
        Fibre *f = run->fibres.current;
        run->trace.add(f->warp, f->lane, f->number, stamp.site, address, lane_bytes, SHARED, write,
                       stamp.atomic, -1);
    }
    bool unwritten = false;
    for (size_t i = offset; i < offset + bytes; i++) {
        Cell &cell = run->shared[i];
        if (cell.writer.block != stamp.block) cell.writer = Stamp();
        if (cell.reader.block != stamp.block) cell.reader = cell.other_reader = Stamp();
        unwritten |= !write && cell.writer.block < 0;
        touch_cell(cell, stamp, write, "shared memory", (long long)offset);
    }
    if (unwritten) {
        Finding &entry = complain("uninitialised-shared", stamp.site, nullptr, "shared memory");
        if (entry.count == 1) entry.element = (long long)offset;
    }
}

static void touch_buffer(Buffer &buffer, int index, unsigned char *p, size_t bytes, bool write,
                         const Stamp &stamp) {
    Fibre *f = run->fibres.current;
    if (run->tracing)
        run->trace.add(f->warp, f->lane, f->number, stamp.site, (uint64_t)(p - buffer.data()) + 4096,
                       (int)bytes, GLOBAL, write, stamp.atomic, index);
    long long offset = p - buffer.data();
    long long element = offset >= 0 ? offset / (long long)buffer.element
                                    : -((-offset + (long long)buffer.element - 1) /
                                        (long long)buffer.element);
    if (offset < 0 || offset + (long long)bytes > (long long)buffer.bytes) {
        Finding &entry = complain(write ? "out-of-bounds-write" : "out-of-bounds-read", stamp.site,
                                  nullptr, buffer.name);
        if (entry.count == 1) entry.element = element;
        return;
    }
    if (offset % bytes && (bytes & (bytes - 1)) == 0)
        complain("misaligned", stamp.site, nullptr, buffer.name);
    if (write && !buffer.writable) complain("input-written", stamp.site, nullptr, buffer.name);
    if (buffer.cells.empty()) return;  // only traced
    size_t last = (offset + bytes - 1) / buffer.element;
    if (buffer.output && !write && buffer.cells[element].writer.block < 0) {
        Finding &entry = complain("uninitialised-output", stamp.site, nullptr, buffer.name);
        if (entry.count == 1) entry.element = element;
    }
    for (size_t e = element; e <= last; e++)
        touch_cell(buffer.cells[e], stamp, write, buffer.name, (long long)e);
}

static void stop_all() {
    run->stopped = true;
    run->fibres.stop();
}

// Whether an address lies in threadIdx, blockIdx, blockDim or gridDim.
static bool is_index(const unsigned char *p) {
    auto within = [p](const void *base, size_t bytes) {
        return p >= (const unsigned char *)base && p < (const unsigned char *)base + bytes;
    };
    return within(&threadIdx, sizeof threadIdx) || within(&blockIdx, sizeof blockIdx) ||
           within(&blockDim, sizeof blockDim) || within(&gridDim, sizeof gridDim);
}

static void access(const void *address, size_t bytes, bool write, bool atomic, void *site) {
    if (!run || !run->fibres.current) return;
    auto p = (unsigned char *)address;
    Fibre *f = run->fibres.current;
    if (f->owns(p)) return;
    if (p >= run->static_shared && p < run->static_shared + run->static_bytes) {
        size_t offset = p - run->static_shared;
        size_t most = std::min(bytes, run->static_bytes - offset);
        touch_shared(offset, most, write, now(site, atomic), offset, (int)bytes);
        return;
    }
    if (p >= suanli_dynamic_shared && p < suanli_dynamic_shared + sizeof suanli_dynamic_shared) {
        size_t offset = p - suanli_dynamic_shared;
        if (offset + bytes > run->dynamic_bytes) {
            Finding &entry = complain(write ? "out-of-bounds-write" : "out-of-bounds-read", site,
                                      nullptr, "dynamic shared memory");
            if (entry.count == 1) entry.element = (long long)offset;
            return;
        }
        size_t at = run->static_bytes + offset;
        touch_shared(at, bytes, write, now(site, atomic), at, (int)bytes);
        return;
    }
    for (size_t i = 0; i < run->buffers.size(); i++)
        if (run->buffers[i].holds(p)) {
            touch_buffer(run->buffers[i], (int)i, p, bytes, write, now(site, atomic));
            if (run->step > run->limit) {
                complain("too-long", site, nullptr, "");
                stop_all();
            }
            return;
        }
    if (p >= run->module_begin && p < run->module_end) return;  // __constant__ and __device__ data
    if (is_index(p)) return;
    auto fibres = (unsigned char *)run->fibres.all.data();
    if (p >= fibres && p < fibres + run->fibres.all.size() * sizeof(Fibre)) return;
    for (Fibre &other : run->fibres.all)
        if (other.owns(p)) return;  // a fragment that a warp operation shares
    complain(write ? "wild-write" : "wild-read", site, nullptr, "");
    stop_all();
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
    while (!run->stopped) {
        bool moved = false;
        for (int k = 0; k < run->threads && !run->stopped; k++) {
            Fibre &f = fibres.all[run->reversed ? run->threads - 1 - k : k];
            if (f.state != READY) continue;
            moved = true;
            fibres.enter(f);
            if (f.state == DONE)  // lanes that waited for this one alone may go on
                for (Fibre &g : fibres.all)
                    if (g.warp == f.warp && g.state == AT_MEETING) {
                        try_meeting(g);
                        break;
                    }
        }
        if (moved || run->stopped) continue;
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
