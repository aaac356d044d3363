/* Batch norm with what stands around it, for training: [2x2 max-pool] - statistics - normalise -
   [+ shortcut] - [activation], forward and backward, on bf16 in channels-last layout.

   A tensor [N, C, H, W] lies in memory as rows of C channels, one row per pixel; C is a multiple of
   32. The conv output is read once and the pooled values are written once; which of the four pixels
   was the largest is kept in two bits. What the activation needs is computed anew in the backward
   pass from the pooled values, so nothing else is stored.

   Sums are made per chunk of rows in fp32 and added up over the chunks, in order, in double: the
   result does not depend on the number of threads. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pools.h"
#include "vectors.h"

#define CHUNKS 64
#define MOST_THREADS 64

/* ---- threads ------------------------------------------------------------------------------- */

typedef void (*parallel_region)(void (*)(void *), void *, unsigned, unsigned);
static parallel_region region; /* GOMP_parallel of the OpenMP that torch runs on, or none */

void suanli_use_region(parallel_region given) { region = given; }

typedef struct {
    void (*work)(void *, long);
    void *context;
    long count;
    long next;
} loop;

static void take_turns(void *data) {
    loop *all = data;
    for (;;) {
        long item = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (item >= all->count) return;
        all->work(all->context, item);
    }
}

static void *thread_main(void *data) {
    take_turns(data);
    return NULL;
}

void suanli_for_all(long count, int threads, void (*work)(void *, long), void *context) {
    loop all = {work, context, count, 0};
    if (threads <= 1) {
        take_turns(&all);
    } else if (region) {
        region(take_turns, &all, (unsigned)threads, 0);
    } else {
        pthread_t others[MOST_THREADS];
        int started = 0;
        while (started < threads - 1 && started < MOST_THREADS &&
               pthread_create(&others[started], NULL, thread_main, &all) == 0)
            started++;
        take_turns(&all);
        while (started) pthread_join(others[--started], NULL);
    }
}

/* ---- the shapes ------------------------------------------------------------------------------ */

typedef struct {
    /* Shape: images, height and width before the pool, channels; pooled is 0 or 1. */
    long images, height, width, channels;
    int pooled, kind, threads;
    float eps;
    /* Forward. `input` is the convolution's output; `values` what is normalised (the pooled
       values, or `input` itself); `masks` two words per pixel and BLOCK. */
    const bf16 *input;
    bf16 *values, *output;
    uint32_t *masks;
    const float *weight, *bias; /* [C], or null: 1 and 0 */
    float *mean, *variance, *inverse; /* [C]; 1/sqrt(variance + eps) */
    float *partial; /* [CHUNKS, 2, C] */
    /* Backward. */
    const bf16 *output_gradient;
    bf16 *input_gradient; /* begins at a cache line, as torch's allocations do */
    float *weight_gradient, *bias_gradient;
    float *means; /* [2, C]: mean of dz and of dz * x_hat */
    bf16 *lines;  /* [CHUNKS, width, C]: a pooled line before it is spread */
    /* What is added before the activation (a shortcut), or null; and the gradient of it, which the
       first backward pass writes and the second reads. Never together with a pool. */
    const bf16 *added;
    bf16 *added_gradient;
} norm;

static long out_height(const norm *a) { return a->pooled ? a->height / 2 : a->height; }
static long out_width(const norm *a) { return a->pooled ? a->width / 2 : a->width; }

/* A unit is one line of pixels of the output. */
static long units(const norm *a) { return a->images * out_height(a); }
static long first_unit(const norm *a, long chunk) { return units(a) * chunk / CHUNKS; }

/* ---- forward ------------------------------------------------------------------------------- */

/* Sums of x - k and (x - k)^2 over a chunk; k, the first row of all, keeps the squares from
   cancelling where the mean is large. */
static void statistics_chunk(void *context, long chunk) {
    const norm *a = context;
    long channels = a->channels, width = out_width(a);
    picture shape = {a->height, a->width, channels};
    float *sums = a->partial + chunk * 2 * channels;
    memset(sums, 0, 2 * channels * sizeof(float));
    for (long unit = first_unit(a, chunk); unit < first_unit(a, chunk + 1); unit++) {
        bf16 *rows = a->values + unit * width * channels;
        if (a->pooled) pool_line(&shape, a->input, unit, rows, a->masks);
        for (long c = 0; c < channels; c += LANES) {
            vec k = load_float(a->mean + c); /* holds the shift until the statistics are there */
            vec one = all_of(0.0f), two = all_of(0.0f);
            for (long x = 0; x < width; x++) {
                vec d = load(rows + x * channels + c) - k;
                one += d;
                two += d * d;
            }
            store_float(sums + c, load_float(sums + c) + one);
            store_float(sums + channels + c, load_float(sums + channels + c) + two);
        }
    }
}

INLINE void normalise_units(const norm *a, long chunk, int kind) {
    long channels = a->channels, width = out_width(a);
    for (long unit = first_unit(a, chunk); unit < first_unit(a, chunk + 1); unit++) {
        const bf16 *from = a->values + unit * width * channels;
        const bf16 *added = a->added ? a->added + unit * width * channels : NULL;
        bf16 *to = a->output + unit * width * channels;
        for (long c = 0; c < channels; c += LANES) {
            vec scale = load_float(a->inverse + c);
            if (a->weight) scale *= load_float(a->weight + c);
            vec offset = -load_float(a->mean + c) * scale;
            if (a->bias) offset += load_float(a->bias + c);
            for (long x = 0; x < width; x++) {
                vec z = load(from + x * channels + c) * scale + offset;
                if (added) z += load(added + x * channels + c);
                store(to + x * channels + c, activate(z, kind));
            }
        }
    }
}

static void normalise_chunk(void *context, long chunk) {
    const norm *a = context;
    FOR_KIND(normalise_units, a, chunk)
}

static float square_root(float x) {
#ifdef WIDE
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
    return __builtin_sqrtf(x);
#endif
}

void suanli_norm_forward(const norm *a) {
    long channels = a->channels, rows = units(a) * out_width(a);
    for (long c = 0; c < channels; c++) {
        uint32_t bits = (uint32_t)a->input[c] << 16;
        memcpy(a->mean + c, &bits, sizeof bits);
    }
    suanli_for_all(CHUNKS, a->threads, statistics_chunk, (void *)a);
    for (long c = 0; c < channels; c++) {
        double one = 0, two = 0;
        for (long chunk = 0; chunk < CHUNKS; chunk++) {
            one += a->partial[chunk * 2 * channels + c];
            two += a->partial[(chunk * 2 + 1) * channels + c];
        }
        double mean = one / rows, variance = two / rows - mean * mean;
        if (variance < 0) variance = 0;
        a->mean[c] += (float)mean;
        a->variance[c] = (float)variance;
        a->inverse[c] = 1.0f / square_root((float)(variance + a->eps));
    }
    suanli_for_all(CHUNKS, a->threads, normalise_chunk, (void *)a);
}

/* ---- backward ------------------------------------------------------------------------------ */

INLINE void reduce_units(const norm *a, long chunk, int kind) {
    long channels = a->channels, width = out_width(a);
    float *sums = a->partial + chunk * 2 * channels;
    memset(sums, 0, 2 * channels * sizeof(float));
    for (long unit = first_unit(a, chunk); unit < first_unit(a, chunk + 1); unit++) {
        const bf16 *values = a->values + unit * width * channels;
        const bf16 *gradient = a->output_gradient + unit * width * channels;
        const bf16 *added = a->added ? a->added + unit * width * channels : NULL;
        bf16 *passed = a->added ? a->added_gradient + unit * width * channels : NULL;
        for (long c = 0; c < channels; c += LANES) {
            vec inverse = load_float(a->inverse + c), mean = load_float(a->mean + c);
            vec weight = a->weight ? load_float(a->weight + c) : all_of(1.0f);
            vec bias = a->bias ? load_float(a->bias + c) : all_of(0.0f);
            vec offset = -mean * inverse, one = all_of(0.0f), two = all_of(0.0f);
            for (long x = 0; x < width; x++) {
                vec normal = load(values + x * channels + c) * inverse + offset;
                vec z = normal * weight + bias;
                if (added) z += load(added + x * channels + c);
                vec dz = load(gradient + x * channels + c) * slope(z, kind);
                if (passed) store(passed + x * channels + c, dz);
                one += dz;
                two += dz * normal;
            }
            store_float(sums + c, load_float(sums + c) + one);
            store_float(sums + channels + c, load_float(sums + channels + c) + two);
        }
    }
}

static void reduce_chunk(void *context, long chunk) {
    const norm *a = context;
    FOR_KIND(reduce_units, a, chunk)
}

/* dx = weight / deviation * (dz - mean(dz) - x_hat * mean(dz * x_hat)) */
INLINE void gradient_units(const norm *a, long chunk, int kind) {
    long channels = a->channels, width = out_width(a);
    picture shape = {a->height, a->width, channels};
    for (long unit = first_unit(a, chunk); unit < first_unit(a, chunk + 1); unit++) {
        const bf16 *values = a->values + unit * width * channels;
        /* with a shortcut the first pass has taken the activation's slope into account */
        int passed = a->added != NULL;
        const bf16 *gradient =
            (passed ? a->added_gradient : a->output_gradient) + unit * width * channels;
        bf16 *to = a->pooled ? a->lines + chunk * width * channels
                             : a->input_gradient + unit * width * channels;
        for (long c = 0; c < channels; c += LANES) {
            vec inverse = load_float(a->inverse + c), mean = load_float(a->mean + c);
            vec weight = a->weight ? load_float(a->weight + c) : all_of(1.0f);
            vec bias = a->bias ? load_float(a->bias + c) : all_of(0.0f);
            vec one = load_float(a->means + c), two = load_float(a->means + channels + c);
            vec factor = weight * inverse, offset = -mean * inverse;
            one *= factor;
            two *= factor;
            for (long x = 0; x < width; x++) {
                vec normal = load(values + x * channels + c) * inverse + offset;
                vec dz = load(gradient + x * channels + c);
                if (!passed) dz *= slope(normal * weight + bias, kind);
                store(to + x * channels + c, dz * factor - (normal * two + one));
            }
        }
        if (a->pooled) scatter_line(&shape, to, a->masks, unit, a->input_gradient);
    }
#ifdef WIDE
    _mm_sfence(); /* such stores are ordered by nothing else */
#endif
}

static void gradient_chunk(void *context, long chunk) {
    const norm *a = context;
    FOR_KIND(gradient_units, a, chunk)
}

void suanli_norm_backward(const norm *a) {
    long channels = a->channels, rows = units(a) * out_width(a);
    suanli_for_all(CHUNKS, a->threads, reduce_chunk, (void *)a);
    for (long c = 0; c < channels; c++) {
        double one = 0, two = 0;
        for (long chunk = 0; chunk < CHUNKS; chunk++) {
            one += a->partial[chunk * 2 * channels + c];
            two += a->partial[(chunk * 2 + 1) * channels + c];
        }
        a->bias_gradient[c] = (float)one;
        a->weight_gradient[c] = (float)two;
        a->means[c] = (float)(one / rows);
        a->means[channels + c] = (float)(two / rows);
    }
    suanli_for_all(CHUNKS, a->threads, gradient_chunk, (void *)a);
}

/* ---- an activation on its own ------------------------------------------------------------------ */

typedef struct {
    const bf16 *input, *output_gradient; /* the second is null in the forward pass */
    bf16 *result;
    long count; /* a multiple of LANES */
    int kind, threads;
} activation;

INLINE void activation_units(const activation *a, long chunk, int kind) {
    long first = a->count / LANES * chunk / CHUNKS * LANES;
    long last = a->count / LANES * (chunk + 1) / CHUNKS * LANES;
    for (long i = first; i < last; i += LANES) {
        vec z = load(a->input + i);
        if (a->output_gradient)
            store(a->result + i, load(a->output_gradient + i) * slope(z, kind));
        else
            store(a->result + i, activate(z, kind));
    }
}

static void activation_chunk(void *context, long chunk) {
    const activation *a = context;
    FOR_KIND(activation_units, a, chunk)
}

void suanli_activation(const activation *a) {
    suanli_for_all(CHUNKS, a->threads, activation_chunk, (void *)a);
}
