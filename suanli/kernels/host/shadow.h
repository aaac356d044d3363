// Who touched which element last, and whether a barrier stands between two touches.
//
// Two accesses to one element by different threads, one of them a plain write or both not atomic,
// are ordered when a barrier of the block stands between them, a warp synchronisation that both
// lanes took part in, or a fence with an atomic operation on both sides. All others are races,
// whatever the schedule of this run made of them. A volatile access of global memory counts as
// atomic, as in the memory model of PTX.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace suanli {

struct Stamp {
    int32_t block = -1;   // -1: nobody
    int32_t thread = -1;  // within the block
    uint32_t epoch = 0;   // barriers that the block had passed
    uint32_t clock = 0;   // synchronisations that the lane had passed
    uint64_t step = 0;    // accesses of the whole launch before this one
    void *site = nullptr, *caller = nullptr;
    bool atomic = false;
    uint8_t begin = 0, end = 1;  // bytes of the cell's element; those of earlier accesses are lost

    bool meets(const Stamp &other) const { return begin < other.end && other.begin < end; }
};

struct Cell {
    Stamp writer, reader, other_reader;
};

struct Buffer {
    std::string name;
    unsigned char *base = nullptr;  // first byte of the guard band below
    size_t guard = 0, bytes = 0, element = 1;
    size_t reserved = 0;  // on either side of the guards; whoever comes here ends the launch
    bool writable = false, output = false;
    std::vector<Cell> cells;

    unsigned char *data() const { return base + guard; }
    bool holds(const unsigned char *p) const {
        return p >= base - reserved && p < base + bytes + 2 * guard + reserved;
    }
    bool ends(const unsigned char *p, size_t n) const {
        return p < base || p + n > base + bytes + 2 * guard;
    }
};

// A variable in static shared memory; without a name it is the compiler's own.
struct Variable {
    std::string name;
    size_t begin = 0, bytes = 0;

    size_t end() const { return begin + bytes; }
};

// One kind of mistake at one place (or pair of places), with its first example.
struct Finding {
    std::string kind, text, buffer;
    void *site = nullptr, *other = nullptr;
    void *caller = nullptr, *other_caller = nullptr;  // where their functions were called from
    void *soft = nullptr;  // the plain load of a race with an atomic operation
    bool differs = false;  // of two stores, whether they stored different values
    long long count = 0, element = -1;
    int block = -1, thread = -1, other_block = -1, other_thread = -1;
};

// A store that races with another one: whether it changes anything shows once it is done.
class PendingStore {
public:
    void begin(Finding &finding, const unsigned char *p, size_t bytes) {
        settle();
        finding_ = &finding, place_ = p, bytes_ = std::min(bytes, sizeof before_);
        memcpy(before_, p, bytes_);
    }
    void settle() {
        if (finding_) finding_->differs |= memcmp(before_, place_, bytes_) != 0;
        finding_ = nullptr;
    }

private:
    Finding *finding_ = nullptr;
    const unsigned char *place_ = nullptr;
    size_t bytes_ = 0;
    unsigned char before_[16];
};

using FindingKey = std::tuple<std::string, void *, void *, std::string>;

struct Findings {
    std::map<FindingKey, Finding> found;
    Finding &at(const char *kind, void *site, void *other, const std::string &buffer) {
        Finding &entry = found[FindingKey(kind, site, other, buffer)];
        if (entry.count++ == 0) {
            entry.kind = kind;
            entry.site = site;
            entry.other = other;
            entry.buffer = buffer;
        }
        return entry;
    }
};

}  // namespace suanli
