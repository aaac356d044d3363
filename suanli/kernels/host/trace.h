// What the lanes of a warp ask of memory together: sectors of global, wavefronts of shared memory.
//
// Lanes are matched by place in the code and by how often they have been there, which is what a
// warp without divergence does. A global request costs the 32-byte sectors it touches; a shared
// one as many wavefronts as its busiest bank has different 4-byte words, 8- and 16-byte accesses
// being served by half and quarter warps (CUDA C++ Programming Guide, chapter 16, "Shared Memory").
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace suanli {

enum Space { GLOBAL, SHARED };

struct Request {
    uint32_t lanes = 0;
    uint64_t address[32];
    int bytes = 0;
};

struct Place {
    void *site = nullptr;
    Space space = GLOBAL;
    bool write = false, atomic = false;
    int bytes = 0;
    int buffer = -1;
    long long requests = 0, lanes = 0, distinct_bytes = 0;
    long long sectors = 0, ideal_sectors = 0, lines = 0;  // global; a line has 128 bytes
    long long wavefronts = 0, ideal_wavefronts = 0;  // shared
    long long same_address = 0;                    // atomics: busiest address, summed
    long long stride = 0;
    bool strided = true;
};

class Trace {
public:
    std::vector<Place> places;

    void add(int warp, int lane, int thread, void *site, uint64_t address, int bytes, Space space,
             bool write, bool atomic, int buffer) {
        auto key = std::make_pair(site, (int)write);
        auto known = ids_.find(key);
        int id;
        if (known == ids_.end()) {
            id = (int)places.size();
            ids_[key] = id;
            Place place;
            place.site = site, place.space = space, place.write = write, place.atomic = atomic;
            place.bytes = bytes, place.buffer = buffer;
            places.push_back(place);
        } else {
            id = known->second;
        }
        auto &visits = visits_[((uint64_t)thread << 32) | (uint32_t)id];
        Request &request = open_[{warp, id, visits++}];
        request.lanes |= 1u << lane;
        request.address[lane] = address;
        request.bytes = bytes;
        places[id].atomic |= atomic;
    }

    // The block is done: what its warps asked for is complete.
    void flush() {
        for (auto &entry : open_) count(places[std::get<1>(entry.first)], entry.second);
        open_.clear();
        visits_.clear();
    }

private:
    std::map<std::pair<void *, int>, int> ids_;
    std::unordered_map<uint64_t, int> visits_;
    std::map<std::tuple<int, int, int>, Request> open_;

    static void count(Place &place, const Request &request) {
        std::vector<uint64_t> addresses;
        for (int lane = 0; lane < 32; lane++)
            if (request.lanes >> lane & 1) addresses.push_back(request.address[lane]);
        note_stride(place, request);
        place.requests++;
        place.lanes += (long long)addresses.size();
        std::vector<uint64_t> sorted(addresses);
        std::sort(sorted.begin(), sorted.end());
        long long busiest = 0, run = 0, distinct = 0;
        for (size_t i = 0; i < sorted.size(); i++) {
            run = i && sorted[i] == sorted[i - 1] ? run + 1 : 1;
            distinct += run == 1;
            busiest = std::max(busiest, run);
        }
        place.same_address += busiest;
        place.distinct_bytes += distinct * request.bytes;
        if (place.space == GLOBAL)
            count_sectors(place, sorted, request.bytes, distinct);
        else
            count_wavefronts(place, addresses, request.bytes);
    }

    static void note_stride(Place &place, const Request &request) {
        for (int lane = 0; lane < 31; lane++) {
            if ((request.lanes >> lane & 3) != 3) continue;
            long long step = (long long)(request.address[lane + 1] - request.address[lane]);
            if (place.requests == 0 && lane == 0) place.stride = step;
            if (step != place.stride) place.strided = false;
        }
    }

    static void count_sectors(Place &place, const std::vector<uint64_t> &sorted, int bytes,
                              long long distinct) {
        std::vector<uint64_t> sectors;
        for (uint64_t address : sorted)
            for (uint64_t s = address / 32; s <= (address + bytes - 1) / 32; s++)
                sectors.push_back(s);
        std::sort(sectors.begin(), sectors.end());
        sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
        place.sectors += (long long)sectors.size();
        for (size_t i = 0; i < sectors.size(); i++)
            place.lines += i == 0 || sectors[i] / 4 != sectors[i - 1] / 4;
        place.ideal_sectors += (distinct * bytes + 31) / 32;
    }

    static void count_wavefronts(Place &place, const std::vector<uint64_t> &addresses, int bytes) {
        size_t together = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
        for (size_t begin = 0; begin < addresses.size(); begin += together) {
            std::vector<uint64_t> words;
            for (size_t i = begin; i < std::min(begin + together, addresses.size()); i++)
                for (uint64_t w = addresses[i] / 4; w <= (addresses[i] + bytes - 1) / 4; w++)
                    words.push_back(w);
            std::sort(words.begin(), words.end());
            words.erase(std::unique(words.begin(), words.end()), words.end());
            int banks[32] = {0}, busiest = 0;
            for (uint64_t word : words) busiest = std::max(busiest, ++banks[word % 32]);
            place.wavefronts += busiest;
            place.ideal_wavefronts += 1;
        }
    }
};

}  // namespace suanli
