/* What stands behind a convolution without batch norm, for training: [2x2 max-pool] - bias - activation,
   forward and backward, on bf16 in channels-last layout (C a multiple of 32).

   The convolution's output is read once and the result is written once. Pooling comes first: it is
   the same before and behind an offset per channel, and before and behind a ReLU. The backward pass
   sums the bias' gradient on its way, over the pooled values. Sums are made per chunk of lines in
   fp32 and added up over the chunks, in order, in double: the result does not depend on the number of
   threads. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "loop.h"
#include "pools.h"
#include "vectors.h"

#define CHUNKS 64

typedef struct {
    /* Shape: images, height and width before the pool, channels; pooled is 0 or 1. */
    long images, height, width, channels;
    int pooled, kind, threads;
    const float *bias; /* [C], or null: 0 */
    /* Forward. `values` is where pooled values go; it may be `output` itself. */
    const bf16 *input;
    bf16 *values, *output;
    uint32_t *masks;
    /* Backward. `kept` tells the activation's slope: for a ReLU its result, else what came before the
       bias. */
    const bf16 *kept, *output_gradient;
    bf16 *input_gradient; /* begins at a cache line, as torch's allocations do */
    float *bias_gradient, *partial; /* [C], [CHUNKS, C] */
    bf16 *lines; /* [CHUNKS, width, C]: a pooled line before it is spread */
} biased;

static long out_width(const biased *a) { return a->pooled ? a->width / 2 : a->width; }
static long first_line(const biased *a, long chunk) {
    return a->images * (a->pooled ? a->height / 2 : a->height) * chunk / CHUNKS;
}

INLINE void forward_lines(const biased *a, long chunk, int kind) {
    long channels = a->channels, width = out_width(a);
    picture shape = {a->height, a->width, channels};
    for (long unit = first_line(a, chunk); unit < first_line(a, chunk + 1); unit++) {
        const bf16 *from = a->input + unit * width * channels;
        bf16 *to = a->output + unit * width * channels;
        if (a->pooled) {
            bf16 *pooled = a->values + unit * width * channels;
            pool_line(&shape, a->input, unit, pooled, a->masks);
            from = pooled;
        }
        for (long c = 0; c < channels; c += LANES) {
            vec bias = a->bias ? load_float(a->bias + c) : all_of(0.0f);
            for (long x = 0; x < width; x++)
                store(to + x * channels + c, activate(load(from + x * channels + c) + bias, kind));
        }
    }
}

INLINE void backward_lines(const biased *a, long chunk, int kind) {
    long channels = a->channels, width = out_width(a);
    picture shape = {a->height, a->width, channels};
    float *sums = a->partial + chunk * channels;
    memset(sums, 0, channels * sizeof(float));
    for (long unit = first_line(a, chunk); unit < first_line(a, chunk + 1); unit++) {
        const bf16 *kept = a->kept + unit * width * channels;
        const bf16 *gradient = a->output_gradient + unit * width * channels;
        bf16 *to = a->pooled ? a->lines + chunk * width * channels
                             : a->input_gradient + unit * width * channels;
        for (long c = 0; c < channels; c += LANES) {
            vec bias = a->bias && kind != RELU ? load_float(a->bias + c) : all_of(0.0f);
            vec sum = all_of(0.0f);
            for (long x = 0; x < width; x++) {
                vec z = load(kept + x * channels + c) + bias;
                vec dz = load(gradient + x * channels + c) * slope(z, kind);
                store(to + x * channels + c, dz);
                sum += dz;
            }
            store_float(sums + c, load_float(sums + c) + sum);
        }
        if (a->pooled) scatter_line(&shape, to, a->masks, unit, a->input_gradient);
    }
#ifdef WIDE
    _mm_sfence(); /* such stores are ordered by nothing else */
#endif
}

static void forward_chunk(void *context, long chunk) {
    const biased *a = context;
    FOR_KIND(forward_lines, a, chunk)
}

static void backward_chunk(void *context, long chunk) {
    const biased *a = context;
    FOR_KIND(backward_lines, a, chunk)
}

void suanli_bias_forward(const biased *a) {
    for_all(CHUNKS, a->threads, forward_chunk, (void *)a);
}

void suanli_bias_backward(const biased *a) {
    for_all(CHUNKS, a->threads, backward_chunk, (void *)a);
    for (long c = 0; c < a->channels; c++) {
        double sum = 0;
        for (long chunk = 0; chunk < CHUNKS; chunk++) sum += a->partial[chunk * a->channels + c];
        a->bias_gradient[c] = (float)sum;
    }
}
