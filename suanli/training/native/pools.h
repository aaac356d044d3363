/* 2x2 max-pools of bf16 in channels-last layout, forward and backward, one line of the result at a time.

   Which of the four pixels was the largest is kept in two bits per value: two words per pixel and
   BLOCK of channels. */

#ifndef SUANLI_POOLS
#define SUANLI_POOLS

#include "vectors.h"

#define BLOCK 32 /* channels that one pair of mask words covers: one cache line of bf16 */

typedef struct {
    long height, width, channels; /* before the pool */
} picture;

/* The largest of four bf16 in each of 32 channels, and its place (0..3) as two words of bits. */
INLINE void pool_block(const bf16 *const from[4], bf16 *to, uint32_t *masks) {
#ifdef WIDE
    __m512i key[4];
    const __m512i low = _mm512_set1_epi16(0x7fff);
    for (int i = 0; i < 4; i++) {
        __m512i value = _mm512_loadu_si512(from[i]);
        /* signed integers in the order of the numbers: the bits below the sign turn with it */
        __m512i sign = _mm512_srai_epi16(value, 15);
        key[i] = _mm512_xor_si512(value, _mm512_and_si512(sign, low));
        /* not a number, whatever its sign, is larger than all */
        __m512i size = _mm512_and_si512(value, low);
        __mmask32 nan = _mm512_cmpgt_epi16_mask(size, _mm512_set1_epi16(0x7f80));
        key[i] = _mm512_mask_mov_epi16(key[i], nan, low);
    }
    __mmask32 right_above = _mm512_cmpgt_epi16_mask(key[1], key[0]);
    __mmask32 right_below = _mm512_cmpgt_epi16_mask(key[3], key[2]);
    __m512i above = _mm512_mask_mov_epi16(key[0], right_above, key[1]);
    __m512i below = _mm512_mask_mov_epi16(key[2], right_below, key[3]);
    __mmask32 is_below = _mm512_cmpgt_epi16_mask(below, above);
    __m512i best = _mm512_mask_mov_epi16(above, is_below, below);
    __m512i sign = _mm512_srai_epi16(best, 15);
    _mm512_storeu_si512(to, _mm512_xor_si512(best, _mm512_and_si512(sign, low)));
    masks[0] = (right_above & ~is_below) | (right_below & is_below);
    masks[1] = is_below;
#else
    uint32_t first = 0, second = 0;
    for (int c = 0; c < BLOCK; c++) {
        int place = 0;
        int32_t best = 0;
        for (int i = 0; i < 4; i++) {
            int16_t bits = (int16_t)from[i][c];
            int32_t key = bits < 0 ? bits ^ 0x7fff : bits;
            if ((bits & 0x7fff) > 0x7f80) key = 0x7fff; /* not a number, whatever its sign */
            if (i == 0 || key > best) {
                best = key;
                place = i;
            }
        }
        to[c] = from[place][c];
        first |= (uint32_t)(place & 1) << c;
        second |= (uint32_t)(place >> 1) << c;
    }
    masks[0] = first;
    masks[1] = second;
#endif
}

/* Line `unit` of the result, counted through all images, from `input` to `to`. */
INLINE void pool_line(
    const picture *p, const bf16 *input, long unit, bf16 *to, uint32_t *masks) {
    long channels = p->channels, width = p->width / 2, lines = p->height / 2;
    long image = unit / lines, y = unit % lines;
    const bf16 *above = input + ((image * p->height + 2 * y) * p->width) * channels;
    const bf16 *below = above + p->width * channels;
    masks += unit * width * (channels / BLOCK) * 2;
    for (long x = 0; x < width; x++)
        for (long c = 0; c < channels; c += BLOCK) {
            const bf16 *const from[4] = {
                above + 2 * x * channels + c, above + (2 * x + 1) * channels + c,
                below + 2 * x * channels + c, below + (2 * x + 1) * channels + c};
            pool_block(from, to + x * channels + c, masks);
            masks += 2;
        }
}

/* Put a block of gradients where the largest pixel was, and zero on the other three. */
INLINE void scatter_block(const bf16 *from, const uint32_t *masks, bf16 *const to[4]) {
#ifdef WIDE
    __m512i value = _mm512_loadu_si512(from);
    uint32_t first = masks[0], second = masks[1];
    const uint32_t here[4] = {~first & ~second, first & ~second, ~first & second, first & second};
    for (int i = 0; i < 4; i++)
        /* past the caches: four times what was read is written, and nobody reads it soon */
        _mm512_stream_si512((__m512i *)to[i], _mm512_maskz_mov_epi16(here[i], value));
#else
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < BLOCK; c++) {
            uint32_t place = ((masks[0] >> c) & 1) | (((masks[1] >> c) & 1) << 1);
            to[i][c] = place == (uint32_t)i ? from[c] : 0;
        }
#endif
}

/* A line of the result's gradient, into the two lines of `result` that it came from. */
INLINE void scatter_line(
    const picture *p, const bf16 *line, const uint32_t *masks, long unit, bf16 *result) {
    long channels = p->channels, width = p->width / 2, lines = p->height / 2;
    long image = unit / lines, y = unit % lines;
    bf16 *above = result + ((image * p->height + 2 * y) * p->width) * channels;
    bf16 *below = above + p->width * channels;
    masks += unit * width * (channels / BLOCK) * 2;
    for (long x = 0; x < width; x++)
        for (long c = 0; c < channels; c += BLOCK) {
            bf16 *const to[4] = {
                above + 2 * x * channels + c, above + (2 * x + 1) * channels + c,
                below + 2 * x * channels + c, below + (2 * x + 1) * channels + c};
            scatter_block(line + x * channels + c, masks, to);
            masks += 2;
        }
    /* What an odd size leaves out of every window. */
    if (p->width % 2) {
        memset(above + (p->width - 1) * channels, 0, channels * sizeof(bf16));
        memset(below + (p->width - 1) * channels, 0, channels * sizeof(bf16));
    }
    if (p->height % 2 && y == lines - 1)
        memset(below + p->width * channels, 0, p->width * channels * sizeof(bf16));
}

#endif
