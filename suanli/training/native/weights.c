/* The gradient of a convolution's weights on tile registers (AMX): stride 1, odd kernel, padded by half
   of it or less; bf16 in channels-last layout, sums in fp32.

     dW[o][dy][dx][i] = sum over pixels p of g[p][o] * x[p + (dy, dx)][i]

   Images are laid out flat with `pad` zero pixels behind each line and `pad` zero lines behind each
   image, so that a step of the kernel is one fixed distance for every pixel of every image, and the
   sum over pixels is one long dimension K. A tile product takes 16 output channels x 32 pixels and 32
   pixels x 16 input channels, the latter as pairs of pixels. Distances are odd or even, so the pairs
   are kept in both phases. What is packed once serves all kernel positions and all blocks of the other
   operand; that is where a library that packs per kernel position loses its time. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "loop.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

#define TILE 16
#define PIXELS 32 /* of one tile product */
#define MOST_TAPS 49

typedef struct {
    long images, height, width, inputs, outputs; /* channels */
    int kernel, threads;
    /* Pixels that the output lacks on each side: kernel / 2 less the padding. They count as zeros of
       its gradient. */
    long inset;
    const bf16 *x, *g; /* [images, height, width, inputs], [.., less by 2 * inset, outputs] */
    float *result;     /* [outputs, kernel, kernel, inputs] */
    /* Work space, see suanli_weights_sizes. */
    bf16 *pairs;       /* [inputs / 16][phase][pairs][16][2] */
    bf16 *turned;      /* [outputs / 16][K / 32][16][32] */
    float *sums;       /* [split][outputs / 16][inputs / 16][taps][16][16] */
    const bf16 **places; /* of each pixel of the chunk: its data in x; and in g behind */
    const bf16 *zeros; /* as many as channels */
    long chunk_images, splits; /* images packed at a time; shares of the images, one per thread */
} weights;

/* Tile registers are granted per process: ARCH_REQ_XCOMP_PERM of XTILEDATA. */
int suanli_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static long blocks_of(long channels) { return (channels + TILE - 1) / TILE; }
static long pad_of(const weights *a) { return a->kernel / 2; }
static long line_of(const weights *a) { return a->width + pad_of(a); }
static long image_of(const weights *a) { return (a->height + pad_of(a)) * line_of(a); }

/* Zero pixels before the first and behind the last one: an even number that no tap reaches over. */
static long margin_of(const weights *a) {
    return (pad_of(a) * (line_of(a) + 1) + 1) / 2 * 2;
}

static long depth_of(const weights *a) { /* K of a chunk */
    return (a->chunk_images * image_of(a) + PIXELS - 1) / PIXELS * PIXELS;
}

static long pairs_of(const weights *a) { return (depth_of(a) + 2 * margin_of(a)) / 2 + 1; }

/* Elements of: pairs, turned, sums, places. */
void suanli_weights_sizes(const weights *a, long sizes[4]) {
    long ins = blocks_of(a->inputs), outs = blocks_of(a->outputs);
    sizes[0] = a->splits * ins * 2 * pairs_of(a) * TILE * 2;
    sizes[1] = a->splits * outs * depth_of(a) * TILE;
    sizes[2] = a->splits * outs * ins * a->kernel * a->kernel * TILE * TILE;
    sizes[3] = a->splits * 2 * (depth_of(a) + 2 * margin_of(a) + 2);
}

/* ---- packing --------------------------------------------------------------------------------- */

typedef struct {
    const weights *a;
    long split;       /* which share of the images */
    long first, last; /* images of the present chunk: from, and up to */
} turn;

static const bf16 **places_of(const weights *a, long split) {
    return a->places + split * 2 * (depth_of(a) + 2 * margin_of(a) + 2);
}

/* Where each flat pixel of a chunk comes from; zeros for those between lines and images. */
static void find_places(const turn *t) {
    const weights *a = t->a;
    long split = t->split;
    long count = depth_of(a) + 2 * margin_of(a) + 2, line = line_of(a);
    const bf16 **x = places_of(a, split), **g = x + count;
    for (long i = 0; i < 2 * count; i++) x[i] = a->zeros;
    for (long n = 0; n < t->last - t->first; n++) {
        long image = t->first + n;
        for (long y = 0; y < a->height; y++) {
            long flat = margin_of(a) + n * image_of(a) + y * line;
            const bf16 *from_x = a->x + (image * a->height + y) * a->width * a->inputs;
            for (long i = 0; i < a->width; i++) x[flat + i] = from_x + i * a->inputs;
            if (y < a->inset || y >= a->height - a->inset) continue;
            long line_g = image * (a->height - 2 * a->inset) + y - a->inset;
            const bf16 *from_g = a->g + line_g * (a->width - 2 * a->inset) * a->outputs;
            for (long i = a->inset; i < a->width - a->inset; i++, from_g += a->outputs)
                g[flat + i] = from_g;
        }
    }
}

static __m512i channels(const bf16 *pixel, long block, long count) {
    long left = count - block * TILE;
    __mmask16 some = left >= TILE ? 0xffff : (__mmask16)((1u << left) - 1);
    return _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(some, pixel + block * TILE));
}

/* Two pixels of 16 channels as 16 pairs. */
static __m512i paired(const bf16 *one, const bf16 *two, long block, long count) {
    const __m512i order = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
        3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(
        channels(one, block, count), order, channels(two, block, count));
}

static void pack_pairs(const turn *t, long block) {
    const weights *a = t->a;
    long ins = blocks_of(a->inputs), pairs = pairs_of(a), split = t->split;
    const bf16 **x = places_of(a, split);
    bf16 *even = a->pairs + (split * ins + block) * 2 * pairs * TILE * 2;
    bf16 *odd = even + pairs * TILE * 2;
    for (long j = 0; j < pairs - 1; j++) {
        _mm512_storeu_si512(even + j * 32, paired(x[2 * j], x[2 * j + 1], block, a->inputs));
        _mm512_storeu_si512(odd + j * 32, paired(x[2 * j + 1], x[2 * j + 2], block, a->inputs));
    }
}

/* 16 x 16 four-byte values, rows to columns. */
static void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

static void pack_turned(const turn *t, long block) {
    const weights *a = t->a;
    long outs = blocks_of(a->outputs), depth = depth_of(a), split = t->split;
    const bf16 **g = places_of(a, split) + depth + 2 * margin_of(a) + 2 + margin_of(a);
    bf16 *to = a->turned + (split * outs + block) * depth * TILE;
    for (long k = 0; k < depth; k += PIXELS, to += PIXELS * TILE) {
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = paired(g[k + 2 * i], g[k + 2 * i + 1], block, a->outputs);
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * PIXELS, r[i]);
    }
}

/* ---- products ---------------------------------------------------------------------------------- */

typedef struct {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t width[16];
    uint8_t rows[16];
} tile_shape;

static void all_tiles(tile_shape *shape) {
    memset(shape, 0, sizeof *shape);
    shape->palette = 1;
    for (int i = 0; i < 8; i++) {
        shape->width[i] = 64;
        shape->rows[i] = TILE;
    }
}

/* Two blocks of output channels by two of input channels, one kernel position, all of K. The second
   of a pair may be absent; it then repeats the first, and its result is not kept. */
static void products(
    const bf16 *g0, const bf16 *g1, const bf16 *x0, const bf16 *x1, long depth, float *const c[4]) {
    _tile_loadd(0, c[0], 64);
    _tile_loadd(1, c[1], 64);
    _tile_loadd(2, c[2], 64);
    _tile_loadd(3, c[3], 64);
    for (long k = 0; k < depth; k += PIXELS) {
        _tile_loadd(4, g0 + k * TILE, 64);
        _tile_loadd(6, x0 + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x1 + k * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, g1 + k * TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
}

/* Output blocks o and o + 1 against input blocks i and i + 1, at every kernel position. */
static void multiply(const turn *t, long o, long i) {
    const weights *a = t->a;
    long ins = blocks_of(a->inputs), outs = blocks_of(a->outputs);
    long depth = depth_of(a), pairs = pairs_of(a), taps = (long)a->kernel * a->kernel;
    long split = t->split;
    int lone_o = o + 1 >= outs, lone_i = i + 1 >= ins;
    const bf16 *g0 = a->turned + (split * outs + o) * depth * TILE;
    const bf16 *g1 = lone_o ? g0 : g0 + depth * TILE;
    const bf16 *x0 = a->pairs + (split * ins + i) * 2 * pairs * 32;
    const bf16 *x1 = lone_i ? x0 : x0 + 2 * pairs * 32;
    float *sums = a->sums + split * outs * ins * taps * TILE * TILE;
    float spare[TILE * TILE] __attribute__((aligned(64)));
    for (int dy = 0; dy < a->kernel; dy++)
        for (int dx = 0; dx < a->kernel; dx++) {
            long tap = dy * a->kernel + dx;
            long shift = margin_of(a) + (dy - pad_of(a)) * line_of(a) + dx - pad_of(a);
            long offset = ((shift & 1) * pairs + shift / 2) * 32;
            float *c[4];
            for (int which = 0; which < 4; which++) {
                int second_o = which / 2, second_i = which % 2;
                int absent = (second_o && lone_o) || (second_i && lone_i);
                long place = (((o + second_o) * ins + i + second_i) * taps + tap) * TILE * TILE;
                c[which] = absent ? spare : sums + place;
            }
            products(g0, g1, x0 + offset, x1 + offset, depth, c);
        }
}

/* A share of the images from beginning to end. Threads that met after each chunk would spend more
   time waking up than multiplying. */
static void one_split(void *context, long split) {
    const weights *a = context;
    long ins = blocks_of(a->inputs), outs = blocks_of(a->outputs);
    long end = a->images * (split + 1) / a->splits;
    tile_shape before, shape;
    all_tiles(&shape);
    _tile_storeconfig(&before); /* the library's own kernels expect to find theirs */
    _tile_loadconfig(&shape);
    turn t = {a, split, a->images * split / a->splits, 0};
    for (; t.first < end; t.first = t.last) {
        t.last = t.first + a->chunk_images < end ? t.first + a->chunk_images : end;
        find_places(&t);
        for (long i = 0; i < ins; i++) pack_pairs(&t, i);
        for (long o = 0; o < outs; o++) pack_turned(&t, o);
        for (long o = 0; o < outs; o += 2)
            for (long i = 0; i < ins; i += 2) multiply(&t, o, i);
    }
    if (before.palette)
        _tile_loadconfig(&before);
    else
        _tile_release();
}

static void gather(void *context, long out) {
    const weights *a = context;
    long ins = blocks_of(a->inputs), outs = blocks_of(a->outputs);
    long taps = (long)a->kernel * a->kernel;
    for (long tap = 0; tap < taps; tap++)
        for (long i = 0; i < a->inputs; i++) {
            float sum = 0;
            for (long split = 0; split < a->splits; split++) {
                long block = (split * outs + out / TILE) * ins + i / TILE;
                sum += a->sums[(block * taps + tap) * TILE * TILE + out % TILE * TILE + i % TILE];
            }
            a->result[(out * taps + tap) * a->inputs + i] = sum;
        }
}

void suanli_weights(const weights *a) {
    long sizes[4];
    suanli_weights_sizes(a, sizes);
    memset(a->sums, 0, sizes[2] * sizeof(float));
    for_all(a->splits, a->threads, one_split, (void *)a);
    for_all(a->outputs, a->threads, gather, (void *)a);
}

#else
int suanli_tiles(void) { return 0; }
#endif
