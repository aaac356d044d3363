/* Images moved by a few pixels and mirrored, each on its own: a whole epoch in one pass over memory.
   What comes in at an edge is the image's own reflection. Channels lie innermost. */

#include <stdint.h>
#include <string.h>

#include "loop.h"

#define CHUNKS 64
#define MOST_WIDTH 4096

typedef struct {
    const uint8_t *images;
    uint8_t *result;
    const int32_t *down, *right; /* source minus target, in pixels; or null */
    const uint8_t *mirror;       /* 1: mirrored first, then moved */
    long count, height, width, pixel_bytes;
    int threads;
} moves;

static long reflected(long i, long size) {
    if (i < 0) i = -i;
    return i < size ? i : 2 * (size - 1) - i;
}

static inline __attribute__((always_inline)) void move_line(
    uint8_t *to, const uint8_t *from, const uint16_t *place, long width, long bytes) {
    for (long x = 0; x < width; x++) memcpy(to + x * bytes, from + place[x] * bytes, bytes);
}

static void move_chunk(void *context, long chunk) {
    const moves *a = context;
    long line = a->width * a->pixel_bytes;
    uint16_t place[MOST_WIDTH];
    for (long n = a->count * chunk / CHUNKS; n < a->count * (chunk + 1) / CHUNKS; n++) {
        for (long x = 0; x < a->width; x++) {
            long source = reflected(x + a->right[n], a->width);
            place[x] = (uint16_t)(a->mirror[n] ? a->width - 1 - source : source);
        }
        const uint8_t *image = a->images + n * a->height * line;
        uint8_t *result = a->result + n * a->height * line;
        for (long y = 0; y < a->height; y++) {
            const uint8_t *from = image + reflected(y + a->down[n], a->height) * line;
            uint8_t *to = result + y * line;
            switch (a->pixel_bytes) { /* a constant size is one or two moves, not a call */
            case 2: move_line(to, from, place, a->width, 2); break;
            case 4: move_line(to, from, place, a->width, 4); break;
            case 6: move_line(to, from, place, a->width, 6); break;
            case 12: move_line(to, from, place, a->width, 12); break;
            default: move_line(to, from, place, a->width, a->pixel_bytes);
            }
        }
    }
}

void suanli_move(const moves *a) { for_all(CHUNKS, a->threads, move_chunk, (void *)a); }
