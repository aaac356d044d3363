// The functions that the kernel's part, the compiler's hooks and the process outside call.
#pragma once

using namespace suanli;

#define SITE __builtin_return_address(0)

extern "C" {

int suanli_barrier(int vote, int predicate, void *site) {
    Fibre *f = run->fibres.current;
    f->vote = vote, f->predicate = predicate, f->site = site, f->state = AT_BARRIER;
    run->fibres.leave();
    return f->result;
}

const uint64_t *suanli_meet(int operation, unsigned mask, uint64_t value, void *site) {
    Fibre *f = run->fibres.current;
    if (!(mask >> f->lane & 1)) {
        Finding &entry = complain("lane-outside-mask", site, nullptr, "");
        if (entry.count == 1) entry.element = f->lane;
        mask |= 1u << f->lane;
    }
    f->operation = operation, f->mask = mask, f->value = value, f->site = site;
    f->state = AT_MEETING;
    try_meeting(*f);
    if (f->state == AT_MEETING) run->fibres.leave();
    return f->inbox;
}

unsigned suanli_present(void) { return run->fibres.current->present; }
int suanli_lane(void) { return run->fibres.current->lane; }

unsigned suanli_active(void *site) {
    Fibre *f = run->fibres.current;
    f->site = site, f->state = AT_ACTIVE;
    run->fibres.leave();
    return f->present;
}

void suanli_fence(int of_block) {
    run->fenced |= !of_block;
    run->fibres.current->fenced = true;
}

// Whoever loaded this place before by a plain load made sure by this operation.
static void made_good(const unsigned char *p) {
    Fibre *f = run->fibres.current;
    auto note = [f](const Cell &cell) {
        for (const Stamp *s : {&cell.reader, &cell.other_reader})
            if (s->block == run->block && s->thread == f->number && !s->atomic)
                run->optimistic.insert(s->site);
    };
    size_t offset = (size_t)(p - run->static_shared);
    if (p >= run->static_shared && offset < run->static_bytes) note(run->shared[offset]);
    offset = (size_t)(p - suanli_dynamic_shared);
    if (p >= suanli_dynamic_shared && offset < run->dynamic_bytes)
        note(run->shared[run->static_bytes + offset]);
    for (Buffer &buffer : run->buffers) {
        offset = (size_t)(p - buffer.data());
        if (p >= buffer.data() && offset < buffer.bytes && !buffer.cells.empty())
            note(buffer.cells[offset / buffer.element]);
    }
}

void suanli_atomic(void *address, int bytes, int kind, void *site) {
    if (kind == SUANLI_SETTLES) made_good((unsigned char *)address);
    bool reads = kind != SUANLI_REPLACES;
    access({(unsigned char *)address, (size_t)bytes, true, ATOMIC, site, reads});
}

void suanli_touch(const void *address, int bytes, int is_write, void *site) {
    access({(unsigned char *)address, (size_t)bytes, is_write != 0, PLAIN, site, is_write == 0});
}

void suanli_complain(const char *text, void *site) {
    Finding &entry = complain("intrinsic", site, nullptr, text);
    entry.text = text;
}

void suanli_trapped(const char *text, void *site) {
    Finding &entry = complain("trap", site, nullptr, "");
    entry.text = text;
    stop_all();
}

void suanli_refuse(const char *text, void *site) {
    Finding &entry = complain("refused", site, nullptr, text);
    entry.text = text;
    stop_all();
}

int suanli_print(const char *format, ...) {
    char text[1024];
    va_list given;
    va_start(given, format);
    int length = vsnprintf(text, sizeof text, format, given);
    va_end(given);
    size_t room = PRINTED - std::min(PRINTED, run->printed.size());
    if (length > 0) run->printed.append(text, std::min(room, strlen(text)));
    return length;
}

long long suanli_ticks(void) { return (long long)run->step; }

// -- hooks of -fsanitize=thread ------------------------------------------------------------------

static void touched(const void *p, size_t bytes, bool write, Kind kind, void *site) {
    if (!bytes || !run || !run->fibres.current) return;
    const std::vector<Call> &calls = run->fibres.current->calls;
    for (size_t k = calls.size(); k && calls[k - 1].function != PERSONS; k--) {
        if (calls[k - 1].function == OWN) return;
        site = calls[k - 1].from;
    }
    access({(unsigned char *)p, bytes, write, kind, site, !write});
}

static Function function_at(void *code) {
    auto known = run->known_functions.find(code);
    if (known != run->known_functions.end()) return known->second;
    Function found = PERSONS;
    for (const Extent &e : run->functions)
        if (code >= e.begin && code < e.end) found = e.function;
    return run->known_functions[code] = found;
}

#define HOOKS(n)                                                                                  \
    void __tsan_read##n(void *p) { touched(p, n, false, PLAIN, SITE); }                           \
    void __tsan_write##n(void *p) { touched(p, n, true, PLAIN, SITE); }                           \
    void __tsan_unaligned_read##n(void *p) { touched(p, n, false, PIECES, SITE); }                \
    void __tsan_unaligned_write##n(void *p) { touched(p, n, true, PIECES, SITE); }                \
    void __tsan_volatile_read##n(void *p) { touched(p, n, false, VOLATILE, SITE); }               \
    void __tsan_volatile_write##n(void *p) { touched(p, n, true, VOLATILE, SITE); }               \
    void __tsan_unaligned_volatile_read##n(void *p) { touched(p, n, false, VOLATILE, SITE); }     \
    void __tsan_unaligned_volatile_write##n(void *p) { touched(p, n, true, VOLATILE, SITE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void *p, unsigned long n) { touched(p, n, false, PIECES, SITE); }
void __tsan_write_range(void *p, unsigned long n) { touched(p, n, true, PIECES, SITE); }
void __tsan_func_entry(void *from) {
    if (!run || !run->fibres.current) return;
    Function function = function_at(SITE);
    if (function == COPIES && function_at(from) == OWN) function = OWN;
    run->fibres.current->calls.push_back({from, function});
}
void __tsan_func_exit(void) {
    if (!run || !run->fibres.current) return;
    std::vector<Call> &calls = run->fibres.current->calls;
    if (!calls.empty()) calls.pop_back();
}
void __tsan_init(void) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

void *__tsan_memcpy(void *to, const void *from, unsigned long n) {
    touched(from, n, false, PIECES, SITE);
    touched(to, n, true, PIECES, SITE);
    return memcpy(to, from, n);
}
void *__tsan_memset(void *to, int value, unsigned long n) {
    touched(to, n, true, PIECES, SITE);
    return memset(to, value, n);
}
void *__tsan_memmove(void *to, const void *from, unsigned long n) {
    touched(from, n, false, PIECES, SITE);
    touched(to, n, true, PIECES, SITE);
    return memmove(to, from, n);
}

// -- hook of -fsanitize=bounds: an index beyond an array whose extent the compiler knows ----------

struct suanli_type_name {
    uint16_t kind, info;  // of a whole number: bit 0 signed, the others the logarithm of its bits
    char name[1];
};
struct suanli_index {
    const char *file;
    uint32_t line, column;
    const suanli_type_name *array, *index;
};

void __ubsan_handle_out_of_bounds(const suanli_index *at, uintptr_t index) {
    if (!run || !run->fibres.current) return;
    Finding &entry = complain("array-index", SITE, nullptr, "");
    if (entry.count > 1) return;
    int bits = 1 << (at->index->info >> 1), spare = 64 - std::min(bits, 64);
    bool negative = at->index->info & 1;
    entry.element = negative ? (long long)(index << spare) >> spare : (long long)index;
    entry.text = at->array->name;
    entry.other_thread = (int)at->column;
}

// -- what the process outside calls --------------------------------------------------------------

void suanli_begin(void) {
    delete run;
    run = new Launch();
}

// Memory for an argument, between guard bands that it may not touch; all of it poisoned. Without
// `watched` nobody is told who touched what, which saves 144 bytes an element.
void *suanli_buffer(const char *name, unsigned long bytes, unsigned long element, int writable,
                    int output, unsigned long guard, int watched) {
    Buffer buffer;
    buffer.name = name, buffer.bytes = bytes, buffer.element = element, buffer.guard = guard;
    buffer.writable = writable, buffer.output = output;
    size_t own = (bytes + 2 * guard + PAGE - 1) / PAGE * PAGE;
    void *memory = MAP_FAILED;
    for (size_t reserved : {RESERVED, PAGE}) {
        if (memory != MAP_FAILED) break;
        buffer.reserved = reserved;
        memory = mmap(nullptr, own + 2 * reserved, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (memory == MAP_FAILED) return nullptr;
    buffer.base = (unsigned char *)memory + buffer.reserved;
    if (mprotect(buffer.base, own, PROT_READ | PROT_WRITE)) return nullptr;
    memset(buffer.base, 0xFF, own);
    if (watched) buffer.cells.resize(bytes / element + 1);
    run->buffers.push_back(std::move(buffer));
    return run->buffers.back().data();
}

// Elements of an output that no thread wrote; `first` gets the first of them.
long long suanli_unwritten(int index, long long *first) {
    Buffer &buffer = run->buffers[index];
    long long count = 0;
    *first = -1;
    for (size_t e = 0; e < buffer.bytes / buffer.element; e++)
        if (buffer.cells[e].writer.block < 0) {
            if (count++ == 0) *first = (long long)e;
        }
    return count;
}

// A variable in static shared memory; tell of all before suanli_module.
void suanli_variable(const char *name, unsigned long begin, unsigned long bytes) {
    run->variables.push_back({name, begin, bytes});
    run->static_bytes = std::max(run->static_bytes, (size_t)(begin + bytes));
}

// A function that copies a structure (1) or a part of the runtime (2).
void suanli_function(void *begin, unsigned long bytes, int kind) {
    run->functions.push_back({(unsigned char *)begin, (unsigned char *)begin + bytes, (Function)kind});
}

void suanli_module(void *begin, void *end, void *shared, unsigned long dynamic_bytes) {
    run->module_begin = (unsigned char *)begin, run->module_end = (unsigned char *)end;
    run->static_shared = (unsigned char *)shared, run->dynamic_bytes = dynamic_bytes;
    size_t shared_bytes = run->static_bytes;
    run->shared.resize(shared_bytes + dynamic_bytes);
}

// Runs the grid, or only the blocks that are traced; `limit` is the most accesses it may make.
void suanli_launch(Entry entry, const suanli_slot *slots, const unsigned *grid,
                   const unsigned *block, int reversed, int traced_blocks,
                   int only_traced, unsigned long long limit) {
    gridDim = dim3(grid[0], grid[1], grid[2]);
    blockDim = dim3(block[0], block[1], block[2]);
    run->threads = (int)(block[0] * block[1] * block[2]);
    run->blocks = (int)(grid[0] * grid[1] * grid[2]);
    run->released.assign((size_t)run->blocks, 0);
    run->reversed = reversed, run->limit = limit;
    run->fibres.body = [=] { entry(slots); };
    for (int k = 0; k < run->blocks && !run->stopped; k++) {
        run->block = reversed ? run->blocks - 1 - k : k;
        unsigned b = (unsigned)run->block;
        blockIdx = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
        // an even spread of blocks, first and last among them
        int parts = traced_blocks > 1 ? traced_blocks - 1 : 1;
        int before = (int)((long long)(run->block - 1) * parts / std::max(1, run->blocks - 1));
        int here = (int)((long long)run->block * parts / std::max(1, run->blocks - 1));
        run->tracing = traced_blocks > 0 && (run->block == 0 || before != here);
        if (only_traced && !run->tracing) continue;
        run->executed++;
        run_block();
    }
    run->fibres.current = nullptr;
}

static void quoted(std::string &out, const std::string &text) {
    out += '"';
    for (char c : text)
        if (c == '"' || c == '\\')
            out += '\\', out += c;
        else if (c == '\n')
            out += "\\n";
        else
            out += (unsigned char)c < 32 ? ' ' : c;
    out += '"';
}

static void field(std::string &out, const char *name, long long value) {
    out += ",\"" + std::string(name) + "\":" + std::to_string(value);
}

// What happened, as JSON. The text lives until the next launch.
const char *suanli_report(void) {
    std::string &out = run->report;
    out = "{\"findings\":[";
    bool first = true;
    for (auto &pair : run->findings.found) {
        const Finding &f = pair.second;
        if (f.soft && run->optimistic.count(f.soft)) continue;
        out += first ? "{\"kind\":" : ",{\"kind\":";
        first = false;
        quoted(out, f.kind);
        out += ",\"text\":";
        quoted(out, f.text);
        out += ",\"buffer\":";
        quoted(out, f.buffer);
        field(out, "site", (long long)(uintptr_t)f.site);
        field(out, "other_site", (long long)(uintptr_t)f.other);
        field(out, "caller", (long long)(uintptr_t)f.caller);
        field(out, "other_caller", (long long)(uintptr_t)f.other_caller);
        field(out, "count", f.count);
        field(out, "element", f.element);
        field(out, "block", f.block);
        field(out, "thread", f.thread);
        field(out, "other_block", f.other_block);
        field(out, "other_thread", f.other_thread);
        field(out, "differs", f.differs);
        out += "}";
    }
    out += "],\"places\":[";
    first = true;
    for (const Place &p : run->trace.places) {
        out += first ? "{\"space\":" : ",{\"space\":";
        first = false;
        quoted(out, p.space == GLOBAL ? "global" : "shared");
        field(out, "site", (long long)(uintptr_t)p.site);
        field(out, "write", p.write);
        field(out, "atomic", p.atomic);
        field(out, "bytes", p.bytes);
        field(out, "buffer", p.buffer);
        field(out, "requests", p.requests);
        field(out, "lanes", p.lanes);
        field(out, "distinct_bytes", p.distinct_bytes);
        field(out, "sectors", p.sectors);
        field(out, "ideal_sectors", p.ideal_sectors);
        field(out, "touched_lines", p.lines);
        field(out, "wavefronts", p.wavefronts);
        field(out, "ideal_wavefronts", p.ideal_wavefronts);
        field(out, "same_address", p.same_address);
        field(out, "stride", p.strided ? p.stride : 0);
        out += "}";
    }
    out += "],\"printed\":";
    quoted(out, run->printed);
    field(out, "blocks", run->executed);
    field(out, "barriers", run->barriers);
    field(out, "meetings", run->meetings);
    field(out, "accesses", (long long)run->step);
    field(out, "stopped", run->stopped);
    return (out += "}").c_str();
}
}
