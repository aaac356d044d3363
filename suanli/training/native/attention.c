/* The weights of attention in bf16: softmax of scaled scores along the keys, and its gradient.

   Scores, weights and gradients are [matrices, queries, keys], keys a multiple of 16. With `causal` a
   query sees the keys up to its own place; what it does not see has the weight zero and is neither
   read nor exponentiated. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "loop.h"
#include "vectors.h"

#define MOST_KEYS 8192

typedef struct {
    long matrices, queries, keys;
    int causal, threads;
    float scale;
    const bf16 *scores;   /* forward */
    const bf16 *gradient; /* backward: of the weights */
    bf16 *weights;        /* written in the forward pass, read in the backward pass */
    bf16 *by_scores;
} attention;

static float largest(vec values) {
    float most = values[0];
    for (int i = 1; i < LANES; i++) most = values[i] > most ? values[i] : most;
    return most;
}

static float total(vec values) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += values[i];
    return sum;
}

/* Where the lanes of a block are among the keys that are seen. */
INLINE ivec seen_lanes(long start, long seen) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < (int32_t)(seen - start);
}

static long seen_by(const attention *a, long query) {
    return a->causal && query + 1 < a->keys ? query + 1 : a->keys;
}

static void weigh(const attention *a, const bf16 *scores, bf16 *weights, long seen) {
    float line[MOST_KEYS] __attribute__((aligned(64)));
    long blocks = (seen + LANES - 1) / LANES * LANES;
    vec most = all_of(-3.0e38f);
    for (long k = 0; k < blocks; k += LANES) {
        vec s = choose(seen_lanes(k, seen), load(scores + k) * a->scale, all_of(-3.0e38f));
        store_float(line + k, s);
        most = choose(s > most, s, most);
    }
    float top = largest(most);
    vec sum = all_of(0.0f);
    for (long k = 0; k < blocks; k += LANES) {
        vec s = load_float(line + k);
        /* what is not a number stays so: it is on neither side of a comparison */
        vec e = choose(seen_lanes(k, seen), exponential(s - top) + (s - s), all_of(0.0f));
        store_float(line + k, e);
        sum += e;
    }
    float factor = 1.0f / total(sum);
    for (long k = 0; k < blocks; k += LANES) store(weights + k, load_float(line + k) * factor);
    memset(weights + blocks, 0, (a->keys - blocks) * sizeof(bf16));
}

static void weigh_matrix(void *context, long matrix) {
    const attention *a = context;
    for (long q = 0; q < a->queries; q++) {
        long row = (matrix * a->queries + q) * a->keys;
        weigh(a, a->scores + row, a->weights + row, seen_by(a, q));
    }
}

/* ds = scale * w * (dw - sum(w * dw)) */
static void slope_matrix(void *context, long matrix) {
    const attention *a = context;
    for (long q = 0; q < a->queries; q++) {
        long row = (matrix * a->queries + q) * a->keys, seen = seen_by(a, q);
        long blocks = (seen + LANES - 1) / LANES * LANES;
        const bf16 *weights = a->weights + row, *gradient = a->gradient + row;
        bf16 *result = a->by_scores + row;
        vec dot = all_of(0.0f);
        for (long k = 0; k < blocks; k += LANES) dot += load(weights + k) * load(gradient + k);
        float sum = total(dot);
        for (long k = 0; k < blocks; k += LANES)
            store(result + k, load(weights + k) * (load(gradient + k) - sum) * a->scale);
        memset(result + blocks, 0, (a->keys - blocks) * sizeof(bf16));
    }
}

void suanli_weigh(const attention *a) {
    for_all(a->matrices, a->threads, weigh_matrix, (void *)a);
}

void suanli_weigh_backward(const attention *a) {
    for_all(a->matrices, a->threads, slope_matrix, (void *)a);
}
