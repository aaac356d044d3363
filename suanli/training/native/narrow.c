/* Convolutions of few channels in fp32, stride 1, [N, C, H, W] in memory as it is written: forward,
   gradient of the images, gradient of the weights.

   Libraries block over 16 channels and more; a network with 3 or 6 of them fills a part of each
   vector, and at small batches the library's setting up takes longer than the sums. Here a vector is
   16 neighbours of one line, whatever the number of channels. Images are copied into frames with
   their borders of zeros, so that no load looks where a line ends; what is computed beyond the
   end of a line is not stored. The gradient of the images is the forward pass over the gradient of
   the result, with the kernel turned round. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "loop.h"
#include "vectors.h"

#define OUT 8   /* output channels that are summed at a time in the forward pass */
#define SOME 4  /* and for the weights, beside all columns of the kernel */
#define MOST 7  /* columns of a kernel */

typedef struct {
    long images, inputs, height, width, outputs; /* of what is convolved */
    long kernel, padding;
    int threads;
    const float *x, *w, *bias; /* [N, I, H, W]; [O, I, K, K]; [O] or null */
    float *y;                  /* [N, O, H', W'] */
    const float *g;            /* gradient of y */
    float *by_x, *by_w, *by_bias;
    float *frames;  /* of x, see suanli_narrow_sizes */
    float *g_frames;
    float *packed;
} narrow;

static long rounded(long count, long to) { return (count + to - 1) / to * to; }
static long out_of(const narrow *a, long side) { return side + 2 * a->padding - a->kernel + 1; }

/* A frame: all channels of an image with borders of zeros; lines begin anywhere, and 32 + MOST floats
   behind the last one may be read. */
static long line_of(long width, long border) { return width + 2 * border; }
static long frame_of(long channels, long height, long width, long border) {
    return channels * (height + 2 * border) * line_of(width, border) + 2 * LANES + MOST;
}
/* Lines of g for the weights: whole vectors, zeros behind the end. */
static long g_frame_of(const narrow *a) {
    return rounded(a->outputs, SOME) * out_of(a, a->height) * rounded(out_of(a, a->width), LANES);
}

/* Floats of: frames, g_frames, packed. */
void suanli_narrow_sizes(const narrow *a, long sizes[3]) {
    long turned = a->kernel - 1 - a->padding;
    long of_x = frame_of(a->inputs, a->height, a->width, a->padding) + LANES;
    long of_g = frame_of(a->outputs, out_of(a, a->height), out_of(a, a->width), turned);
    sizes[0] = a->images * (of_x > of_g ? of_x : of_g);
    sizes[1] = a->images * g_frame_of(a);
    long taps = a->kernel * a->kernel;
    long forward = rounded(a->outputs, OUT) * a->inputs, back = rounded(a->inputs, OUT) * a->outputs;
    sizes[2] = (forward > back ? forward : back) * taps;
}

static void put_in_frame(
    const float *from, float *to, long channels, long height, long width, long border) {
    long line = line_of(width, border);
    memset(to, 0, frame_of(channels, height, width, border) * sizeof(float));
    for (long c = 0; c < channels; c++)
        for (long y = 0; y < height; y++)
            memcpy(to + (c * (height + 2 * border) + y + border) * line + border,
                   from + (c * height + y) * width, width * sizeof(float));
}

/* ---- forward, and the gradient of the images ---------------------------------------------------- */

typedef struct {
    long images, inputs, height, width, outputs, kernel, padding; /* of this pass */
    const float *x, *packed, *bias;
    float *y, *frames;
} pass;

/* OUT outputs at up to `vectors` * 16 neighbours of one line. */
INLINE void neighbours(
    const pass *p, const float *x, const float *w, const float *bias, float *y, long y_plane,
    long outputs, long count, int vectors) {
    long line = line_of(p->width, p->padding), plane = (p->height + 2 * p->padding) * line;
    vec sum[OUT][2];
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < vectors; v++) sum[o][v] = all_of(bias && o < outputs ? bias[o] : 0.0f);
    for (long i = 0; i < p->inputs; i++)
        for (long dy = 0; dy < p->kernel; dy++) {
            const float *from = x + i * plane + dy * line;
            for (long dx = 0; dx < p->kernel; dx++, w += OUT)
                for (int v = 0; v < vectors; v++) {
                    vec some = load_float(from + dx + v * LANES);
                    for (int o = 0; o < OUT; o++) sum[o][v] += some * w[o];
                }
        }
    for (int o = 0; o < outputs; o++)
        for (int v = 0; v < vectors; v++) {
            long left = count - v * LANES;
            size_t size = (left < LANES ? left : LANES) * sizeof(float);
            memcpy(y + o * y_plane + v * LANES, &sum[o][v], size);
        }
}

static void one_image(void *context, long image) {
    const pass *p = context;
    long height = p->height + 2 * p->padding - p->kernel + 1;
    long width = p->width + 2 * p->padding - p->kernel + 1;
    long line = line_of(p->width, p->padding), taps = p->inputs * p->kernel * p->kernel;
    float *frame = p->frames + image * frame_of(p->inputs, p->height, p->width, p->padding);
    put_in_frame(p->x + image * p->inputs * p->height * p->width, frame, p->inputs, p->height,
                 p->width, p->padding);
    for (long o = 0; o < p->outputs; o += OUT) {
        const float *w = p->packed + o * taps, *bias = p->bias ? p->bias + o : NULL;
        long outputs = p->outputs - o < OUT ? p->outputs - o : OUT;
        float *plane = p->y + (image * p->outputs + o) * height * width;
        for (long y = 0; y < height; y++)
            for (long x = 0; x < width; x += 2 * LANES) {
                const float *from = frame + y * line + x;
                float *to = plane + y * width + x;
                long left = width - x;
                if (left > LANES)
                    neighbours(p, from, w, bias, to, height * width, outputs, left, 2);
                else
                    neighbours(p, from, w, bias, to, height * width, outputs, left, 1);
            }
    }
}

/* Weights in the order of the loops above: [outputs / OUT][inputs][K][K][OUT]. */
static void pack(const narrow *a, float *packed, int turned) {
    long k = a->kernel, taps = k * k;
    long outputs = turned ? a->inputs : a->outputs, inputs = turned ? a->outputs : a->inputs;
    for (long o = 0; o < rounded(outputs, OUT); o++)
        for (long i = 0; i < inputs; i++)
            for (long tap = 0; tap < taps; tap++) {
                long from = turned ? (i * outputs + o) * taps + taps - 1 - tap
                                   : (o * inputs + i) * taps + tap;
                long to = ((o / OUT * inputs + i) * taps + tap) * OUT + o % OUT;
                packed[to] = o < outputs ? a->w[from] : 0.0f;
            }
}

void suanli_narrow_forward(const narrow *a) {
    pack(a, a->packed, 0);
    pass p = {a->images, a->inputs, a->height, a->width, a->outputs, a->kernel, a->padding,
              a->x, a->packed, a->bias, a->y, a->frames};
    for_all(a->images, a->threads, one_image, &p);
}

void suanli_narrow_by_images(const narrow *a) {
    pack(a, a->packed, 1);
    pass p = {a->images, a->outputs, out_of(a, a->height), out_of(a, a->width), a->inputs,
              a->kernel, a->kernel - 1 - a->padding, a->g, a->packed, NULL, a->by_x, a->frames};
    for_all(a->images, a->threads, one_image, &p);
}

/* ---- the gradient of the weights ------------------------------------------------------------------ */

static void frame_both(void *context, long image) {
    const narrow *a = context;
    long height = out_of(a, a->height), width = out_of(a, a->width), wide = rounded(width, LANES);
    long size = frame_of(a->inputs, a->height, a->width, a->padding) + LANES;
    float *frame = a->frames + image * size, *to = a->g_frames + image * g_frame_of(a);
    put_in_frame(a->x + image * a->inputs * a->height * a->width, frame, a->inputs, a->height,
                 a->width, a->padding);
    memset(frame + size - LANES, 0, LANES * sizeof(float));
    memset(to, 0, g_frame_of(a) * sizeof(float));
    const float *from = a->g + image * a->outputs * height * width;
    for (long row = 0; row < a->outputs * height; row++)
        memcpy(to + row * wide, from + row * width, width * sizeof(float));
}

static float total(vec values) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += values[i];
    return sum;
}

/* SOME outputs, one input channel, one line of the kernel, all its columns, all images. */
INLINE void one_line(const narrow *a, long first, long i, long dy, const long columns) {
    long height = out_of(a, a->height), wide = rounded(out_of(a, a->width), LANES);
    long line = line_of(a->width, a->padding), plane = (a->height + 2 * a->padding) * line;
    long size = frame_of(a->inputs, a->height, a->width, a->padding) + LANES;
    vec sum[SOME][MOST];
    for (int o = 0; o < SOME; o++)
        for (int dx = 0; dx < columns; dx++) sum[o][dx] = all_of(0.0f);
    for (long n = 0; n < a->images; n++)
        for (long y = 0; y < height; y++)
            for (long x = 0; x < wide; x += LANES) {
                const float *from = a->frames + n * size + i * plane + (y + dy) * line + x;
                const float *g = a->g_frames + n * g_frame_of(a) + (first * height + y) * wide + x;
                vec by[SOME];
                for (int o = 0; o < SOME; o++) by[o] = load_float(g + o * height * wide);
                for (int dx = 0; dx < columns; dx++) {
                    vec some = load_float(from + dx);
                    for (int o = 0; o < SOME; o++) sum[o][dx] += some * by[o];
                }
            }
    for (long o = 0; o < SOME && first + o < a->outputs; o++)
        for (int dx = 0; dx < columns; dx++)
            a->by_w[(((first + o) * a->inputs + i) * a->kernel + dy) * a->kernel + dx] =
                total(sum[o][dx]);
}

static void one_block(void *context, long item) {
    const narrow *a = context;
    long first = item / a->inputs * SOME, i = item % a->inputs;
    for (long dy = 0; dy < a->kernel; dy++) switch (a->kernel) {
        case 1: one_line(a, first, i, dy, 1); break;
        case 2: one_line(a, first, i, dy, 2); break;
        case 3: one_line(a, first, i, dy, 3); break;
        case 4: one_line(a, first, i, dy, 4); break;
        case 5: one_line(a, first, i, dy, 5); break;
        case 6: one_line(a, first, i, dy, 6); break;
        default: one_line(a, first, i, dy, 7); break;
        }
}

void suanli_narrow_by_weights(const narrow *a) {
    long height = out_of(a, a->height), width = out_of(a, a->width);
    for_all(a->images, a->threads, frame_both, (void *)a);
    for_all(rounded(a->outputs, SOME) / SOME * a->inputs, a->threads, one_block, (void *)a);
    for (long o = 0; a->by_bias && o < a->outputs; o++) {
        double sum = 0;
        for (long n = 0; n < a->images; n++) {
            const float *from = a->g + (n * a->outputs + o) * height * width;
            float part = 0;
            for (long i = 0; i < height * width; i++) part += from[i];
            sum += part;
        }
        a->by_bias[o] = (float)sum;
    }
}
