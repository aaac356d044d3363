/* Loops that show what a processor can do at most.
 *
 * The arithmetic loops keep every operand in registers, so that nothing but the widest
 * multiply-add or tile instruction limits them. Each has enough independent accumulators to hide
 * the latency of the instruction. Which loops exist is decided by what the compiler was told the
 * processor has (-march=native); the caller checks the processor again before it calls one.
 *
 * Every loop works in blocks and writes the time after each, so that several threads that ran at
 * once can be compared on one clock afterwards. `stamps` holds `most` + 1 doubles, in seconds.
 * The number of blocks done is returned.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Read and written through volatile, so that no loop can be computed at compile time, merged with
 * its neighbour or dropped. */
static volatile float seed_float = 0.5f;
static volatile int32_t seed_int = 0x01010101;
static volatile float sink_float;
static volatile int32_t sink_int;

#define TIMED(name, operations)                                                              \
    EXPORT double suanli_##name##_operations(void) { return (double)(operations); }          \
    EXPORT long suanli_##name(long iterations, long most, double seconds, double *stamps) {  \
        long done = 0;                                                                       \
        stamps[0] = now();                                                                   \
        double end = stamps[0] + seconds;                                                    \
        do {                                                                                 \
            name##_block(iterations);                                                        \
            stamps[++done] = now();                                                          \
        } while (done < most && stamps[done] < end);                                         \
        return done;                                                                         \
    }

/* Width of the widest vector register in bytes, and accumulators that fit beside two operands. */
#if defined(__AVX512F__)
#define WIDTH 64
#define CHAINS 16
#elif defined(__AVX__)
#define WIDTH 32
#define CHAINS 12
#elif defined(__aarch64__)
#define WIDTH 16
#define CHAINS 24
#else
#define WIDTH 16
#define CHAINS 12
#endif

/* Multiply-adds on vectors of `type`; the compiler contracts them where the processor can. */
#define MULTIPLY_ADD(name, vector, type)                                                     \
    typedef type vector __attribute__((vector_size(WIDTH)));                                 \
    static void name##_block(long iterations) {                                              \
        vector sum[CHAINS], scale, shift, total = {0};                                       \
        for (unsigned j = 0; j < WIDTH / sizeof(type); j++) {                                \
            scale[j] = (type)seed_float;                                                     \
            shift[j] = (type)seed_float;                                                     \
            for (int i = 0; i < CHAINS; i++) sum[i][j] = (type)seed_float;                   \
        }                                                                                    \
        for (long n = 0; n < iterations; n++) {                                              \
            _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; i++) sum[i] =               \
                sum[i] * scale + shift;                                                      \
        }                                                                                    \
        for (int i = 0; i < CHAINS; i++) total += sum[i];                                    \
        sink_float = (float)total[0];                                                        \
    }                                                                                        \
    TIMED(name, 2.0 * CHAINS * (WIDTH / sizeof(type)))

MULTIPLY_ADD(fp32_vector, floats, float)

#if defined(__AVX512FP16__) || defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
MULTIPLY_ADD(fp16_vector, halves, _Float16)
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#define INT_CHAIN(name, vector, set1, step, first, operations)                               \
    static void name##_block(long iterations) {                                              \
        vector sum[12], left = set1(seed_int), right = set1(seed_int);                       \
        for (int i = 0; i < 12; i++) sum[i] = set1(seed_int + i);                            \
        for (long n = 0; n < iterations; n++) {                                              \
            _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) sum[i] =                   \
                step(sum[i], left, right);                                                   \
        }                                                                                    \
        (void)right;                                                                         \
        int32_t total = 0;                                                                   \
        for (int i = 0; i < 12; i++) total += first(sum[i]);                                 \
        sink_int = total;                                                                    \
    }                                                                                        \
    TIMED(name, 12.0 * (operations))

#if defined(__AVX512F__)
#define FIRST_512(v) _mm_cvtsi128_si32(_mm512_castsi512_si128(v))
#endif
#if defined(__AVX2__)
#define FIRST_256(v) _mm_cvtsi128_si32(_mm256_castsi256_si128(v))
#endif

#if defined(__AVX512VNNI__)
INT_CHAIN(int8_vnni, __m512i, _mm512_set1_epi32, _mm512_dpbusd_epi32, FIRST_512, 128)
#endif
#if defined(__AVXVNNI__)
INT_CHAIN(int8_avx_vnni, __m256i, _mm256_set1_epi32, _mm256_dpbusd_avx_epi32, FIRST_256, 64)
#endif
#if defined(__AVX2__)
/* The shortest way without VNNI: byte products summed in pairs, then a 16-bit add. */
#define STEP_AVX2(sum, left, right) _mm256_add_epi16(sum, _mm256_maddubs_epi16(left, sum))
INT_CHAIN(int8_avx2, __m256i, _mm256_set1_epi32, STEP_AVX2, FIRST_256, 64)
#endif

#if defined(__AVX512BF16__)
static void bf16_vector_block(long iterations) {
    __m512 sum[12];
    __m512i bits = _mm512_set1_epi32(seed_int);
    __m512bh left, right;
    memcpy(&left, &bits, sizeof left);
    memcpy(&right, &bits, sizeof right);
    for (int i = 0; i < 12; i++) sum[i] = _mm512_set1_ps(seed_float + (float)i);
    for (long n = 0; n < iterations; n++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) sum[i] =
            _mm512_dpbf16_ps(sum[i], left, right);
    }
    float total = 0;
    for (int i = 0; i < 12; i++) total += _mm512_cvtss_f32(sum[i]);
    sink_float = total;
}
TIMED(bf16_vector, 12.0 * 64)
#endif

#if defined(__AMX_TILE__)
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* All eight tiles at 16 rows of 64 bytes: 0 to 3 accumulate, 4 and 5 are left, 6 and 7 right. */
static void open_tiles(void) {
    struct tile_config config;
    int32_t data[256];
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    for (int i = 0; i < 256; i++) data[i] = seed_int;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data, 64);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
}

static void close_tiles(void) {
    int32_t data[256];
    _tile_stored(0, data, 64);
    sink_int = data[0];
    _tile_release();
}

#define TILES(name, product, operations)                                                     \
    static void name##_block(long iterations) {                                              \
        open_tiles();                                                                        \
        for (long n = 0; n < iterations; n++) {                                              \
            product(0, 4, 6);                                                                \
            product(1, 4, 7);                                                                \
            product(2, 5, 6);                                                                \
            product(3, 5, 7);                                                                \
        }                                                                                    \
        close_tiles();                                                                       \
    }                                                                                        \
    TIMED(name, 4.0 * (operations))

#if defined(__AMX_BF16__)
TILES(bf16_tiles, _tile_dpbf16ps, 2.0 * 16 * 16 * 32)
#endif
#if defined(__AMX_FP16__)
TILES(fp16_tiles, _tile_dpfp16ps, 2.0 * 16 * 16 * 32)
#endif
#if defined(__AMX_INT8__)
TILES(int8_tiles, _tile_dpbssd, 2.0 * 16 * 16 * 64)
#endif
#endif /* __AMX_TILE__ */
#endif /* x86 */

#if defined(__aarch64__)
#include <arm_neon.h>

#define ARM_CHAIN(name, vector, operand, dup_sum, dup, step, first, sink, operations)        \
    static void name##_block(long iterations) {                                              \
        vector sum[16];                                                                      \
        operand left = dup, right = dup;                                                     \
        for (int i = 0; i < 16; i++) sum[i] = dup_sum(seed_int + i);                         \
        for (long n = 0; n < iterations; n++) {                                              \
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) sum[i] =                   \
                step(sum[i], left, right);                                                   \
        }                                                                                    \
        for (int i = 1; i < 16; i++) sum[0] += sum[i];                                       \
        sink = first(sum[0], 0);                                                             \
    }                                                                                        \
    TIMED(name, 16.0 * (operations))

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BF16_SEED vreinterpretq_bf16_s32(vdupq_n_s32(seed_int))
ARM_CHAIN(bf16_vector, float32x4_t, bfloat16x8_t, vdupq_n_f32, BF16_SEED, vbfmmlaq_f32,
          vgetq_lane_f32, sink_float, 32)
#endif
#define INT8_SEED vreinterpretq_s8_s32(vdupq_n_s32(seed_int))
#if defined(__ARM_FEATURE_MATMUL_INT8)
ARM_CHAIN(int8_mmla, int32x4_t, int8x16_t, vdupq_n_s32, INT8_SEED, vmmlaq_s32, vgetq_lane_s32,
          sink_int, 64)
#endif
#if defined(__ARM_FEATURE_DOTPROD)
ARM_CHAIN(int8_dot, int32x4_t, int8x16_t, vdupq_n_s32, INT8_SEED, vdotq_s32, vgetq_lane_s32,
          sink_int, 32)
#endif
#endif /* aarch64 */

typedef int64_t words __attribute__((vector_size(WIDTH)));

/* A block is `chunk` bytes: several passes over all data where it is larger than `bytes`, else the
 * next part of it, from the start again behind the last whole part. `chunk` and `bytes` are
 * multiples of 1024 and the data is aligned to 64 bytes. */
#define WALK(body)                                                                           \
    long done = 0, at = 0;                                                                   \
    const long part = chunk < bytes ? chunk : bytes;                                         \
    stamps[0] = now();                                                                       \
    double end = stamps[0] + seconds;                                                        \
    do {                                                                                     \
        for (long left = chunk; left >= part; left -= part) {                                \
            body;                                                                            \
            __asm__ volatile("" ::: "memory");                                               \
            at = at + 2 * part <= bytes ? at + part : 0;                                     \
        }                                                                                    \
        stamps[++done] = now();                                                              \
    } while (done < most && stamps[done] < end)

EXPORT long suanli_read(const char *data, long bytes, long chunk, long most, double seconds,
                        double *stamps) {
    words sum[8] = {{0}};
    WALK({
        const words *from = (const words *)(data + at);
        for (long n = 0; n < part / (8 * WIDTH); n++, from += 8) {
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) sum[i] += from[i];
        }
    });
    for (int i = 1; i < 8; i++) sum[0] += sum[i];
    sink_int = (int32_t)sum[0][0];
    return done;
}

/* The same for a copy of `bytes` from the start of `data` to behind them. */
EXPORT long suanli_copy(char *data, long bytes, long chunk, long most, double seconds,
                        double *stamps) {
    WALK(memcpy(data + bytes + at, data + at, (size_t)part));
    return done;
}
