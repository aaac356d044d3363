/* The optimiser's update of all parameters in one pass: SGD with momentum, Adam and AdamW by torch's
   formulas. What torch calls several operators for, and walks through memory for each tensor on its own, is
   one loop over all elements, in equal shares for the threads. */

#include "loop.h"
#include "vectors.h"

typedef struct {
    /* By tensor; `average` is the momentum or the first moment, or null; `square` the second one. */
    float *const *weights;
    const float *const *gradients;
    float *const *averages, *const *squares;
    const long *counts;
    long tensors, total; /* elements of all of them */
    int nesterov, first, threads; /* first: there is no momentum yet */
    float rate, momentum, decay; /* decay: added to the gradient */
    float kept; /* what a weight is multiplied with before its update */
    float beta1, beta2, eps, root; /* root: 1 / sqrt(1 - beta2^step); the rate has 1 - beta1^step */
} update;

INLINE vec square_roots(vec x) {
#ifdef WIDE
    return (vec)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

INLINE void adam(const update *a, float *w, const float *g, float *m, float *v) {
    vec weight = load_float(w), gradient = load_float(g) + a->decay * weight;
    vec average = load_float(m), square = load_float(v);
    average += (gradient - average) * (1.0f - a->beta1);
    square = square * a->beta2 + (gradient * gradient) * (1.0f - a->beta2);
    store_float(m, average);
    store_float(v, square);
    vec size = square_roots(square) * a->root + a->eps;
    store_float(w, weight * a->kept - a->rate * (average / size));
}

INLINE void sgd(const update *a, float *w, const float *g, float *m) {
    vec weight = load_float(w), way = load_float(g) + a->decay * weight;
    if (m) {
        vec average = a->first ? way : load_float(m) * a->momentum + way;
        store_float(m, average);
        way = a->nesterov ? way + average * a->momentum : average;
    }
    store_float(w, weight - a->rate * way);
}

INLINE void one(const update *a, float *w, const float *g, float *m, float *v) {
    if (v)
        adam(a, w, g, m, v);
    else
        sgd(a, w, g, m);
}

/* Elements [from, to) of a tensor. */
static void update_part(const update *a, long tensor, long from, long to) {
    float *w = a->weights[tensor], *m = a->averages ? a->averages[tensor] : NULL;
    float *v = a->squares ? a->squares[tensor] : NULL;
    const float *g = a->gradients[tensor];
    long i = from;
    for (; i + LANES <= to; i += LANES) one(a, w + i, g + i, m ? m + i : NULL, v ? v + i : NULL);
    if (i == to) return;
    float last[4][LANES] = {{0}}; /* the rest, filled up with zeros */
    size_t bytes = (size_t)(to - i) * sizeof(float);
    memcpy(last[0], w + i, bytes);
    memcpy(last[1], g + i, bytes);
    if (m) memcpy(last[2], m + i, bytes);
    if (v) memcpy(last[3], v + i, bytes);
    one(a, last[0], last[1], m ? last[2] : NULL, v ? last[3] : NULL);
    memcpy(w + i, last[0], bytes);
    if (m) memcpy(m + i, last[2], bytes);
    if (v) memcpy(v + i, last[3], bytes);
}

static void update_share(void *context, long share) {
    const update *a = context;
    long from = a->total / LANES * share / a->threads * LANES;
    long to = share + 1 == a->threads ? a->total
                                      : a->total / LANES * (share + 1) / a->threads * LANES;
    long start = 0; /* of the tensor among all elements */
    for (long tensor = 0; tensor < a->tensors && start < to; tensor++) {
        long end = start + a->counts[tensor];
        if (end > from)
            update_part(a, tensor, from > start ? from - start : 0,
                        (to < end ? to : end) - start);
        start = end;
    }
}

void suanli_update(const update *a) { for_all(a->threads, a->threads, update_share, (void *)a); }
