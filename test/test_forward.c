/* The forward pass and the number formats against independent computations: naive loops in double
 * and in 64-bit integers, and the logits of Hugging Face transformers in test/data. From top to
 * bottom: number formats, integer products, float products, a naive LLaMA in double, the embedded
 * model. */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "test.h"

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static int max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A reproducible integer in [0, n). */
static int random_below(int n, uint64_t *seed) {
    return (int)((random_float(seed) + 1.0) / 2.0 * n);
}

static float *random_floats(size_t n, float scale, uint64_t *seed) {
    float *x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = scale * random_float(seed);
    return x;
}

static int *random_tokens(int n, int vocab_size, uint64_t *seed) {
    int *tokens = allocate(n, sizeof *tokens);
    for (int i = 0; i < n; i++) tokens[i] = random_below(vocab_size, seed);
    return tokens;
}

/* max |a - b|, infinite where either is NaN. */
static double max_difference(const float *a, const float *b, size_t n) {
    double max = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        max = d > max ? d : max;
        if (isnan(d)) return INFINITY;
    }
    return max;
}

/* ---- number formats ------------------------------------------------------------------------ */

/* What a half's bits stand for, from the definition of the format. */
static double half_value(int code) {
    int exponent = code >> 10 & 31, fraction = code & 1023;
    double sign = code & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
}

/* The half nearest to x, ties to the even code, found by bisection over all positive halves. */
static int nearest_half(double x) {
    int sign = signbit(x) ? 0x8000 : 0, low = 0, high = 0x7c00;
    x = fabs(x);
    if (x >= 65520) return sign | 0x7c00; // half way to 65536, which would be the next one
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (half_value(middle) <= x) low = middle;
        else high = middle;
    }
    double above = high == 0x7c00 ? 65536 : half_value(high);
    double to_low = x - half_value(low), to_high = above - x; // exact: few bits apart
    return sign | (to_low < to_high || (to_low == to_high && low % 2 == 0) ? low : high);
}

static bool rounds_like_nearest(float x) {
    int got = float_to_f16(x), want = nearest_half(x);
    return check(got == want, "%a (%g) became %04x, nearest is %04x", x, x, got, want);
}

static void test_f16(void) {
    test_begin("floats reads all 65536 halves");
    for (int code = 0; code < 65536; code++) {
        uint16_t h = code;
        float got;
        floats(&h, F16, 0, 1, &got);
        double want = half_value(code);
        bool same = isnan(want) ? isnan(got) : got == want && !signbit(got) == !(code & 0x8000);
        if (!check(same, "%04x became %g, stands for %g", code, got, want)) break;
    }

    test_begin("floats reads all 65536 bfloat16");
    for (int code = 0; code < 65536; code++) {
        uint16_t h = code;
        float got;
        floats(&h, BF16, 0, 1, &got);
        if (!check(bits_of(got) == (uint32_t)code << 16, "%04x became %a", code, got)) break;
    }

    test_begin("floats reads any range at any alignment");
    char bytes[1 + 4 * 9];
    for (DType dtype = F32; dtype <= BF16; dtype++)
        for (int at = 0; at < 2; at++)
            for (int first = 0; first < 4; first++) {
                for (int i = 0; i < 8; i++) {
                    float x = i - 3.5f;
                    uint16_t h = dtype == F16 ? float_to_f16(x) : bits_of(x) >> 16;
                    size_t size = dtype_size(dtype);
                    memcpy(bytes + at + i * size, dtype == F32 ? (void *)&x : &h, size);
                }
                float got[5] = {0, 0, 0, 0, 99};
                floats(bytes + at, dtype, first, 4, got);
                for (int i = 0; i < 4; i++)
                    check(got[i] == first + i - 3.5f, "%s %d: %g", dtype_name(dtype), i, got[i]);
                check(got[4] == 99, "%s: wrote behind the range", dtype_name(dtype));
            }

    test_begin("float_to_f16 is inverse to floats");
    for (int code = 0; code < 65536; code++) {
        double value = half_value(code);
        int got = float_to_f16(value);
        bool same = isnan(value) ? (got & 0x7c00) == 0x7c00 && (got & 0x3ff) : got == code;
        if (!check(same, "%04x became %04x", code, got)) break;
    }

    test_begin("float_to_f16 rounds to nearest, ties to even");
    for (int code = 0; code < 0x7c00; code++) {
        double above = code + 1 == 0x7c00 ? 65536 : half_value(code + 1);
        float tie = (half_value(code) + above) / 2; // exact: one bit more than a half has
        float near[] = {tie, nextafterf(tie, 0), nextafterf(tie, INFINITY)};
        bool ok = true;
        for (int i = 0; i < 3; i++)
            ok = rounds_like_nearest(near[i]) && rounds_like_nearest(-near[i]) && ok;
        if (!ok) break;
    }
    uint64_t seed = 1;
    for (int i = 0; i < 200000; i++) { // exponents from below the subnormals to infinity
        float x = ldexpf(random_float(&seed), random_below(46, &seed) - 28);
        if (!rounds_like_nearest(x)) break;
    }
    float special[] = {0,        -0.0f,           65504,    65519.996f, 65520,     1e30f,
                       FLT_MAX,  -FLT_MAX,        INFINITY, -INFINITY,  1e-8f,     FLT_MIN,
                       0x1p-25f, 0x1.000002p-25f, 0x1p-24f, 0x1.8p-24f, 0x1p-149f, -0x1p-149f};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++) rounds_like_nearest(special[i]);
}

/* Nearest integer, ties to even, without rint. */
static double half_even(double x) {
    double down = floor(x), rest = x - down;
    bool up = rest > 0.5 || (rest == 0.5 && fmod(down, 2) != 0);
    return up ? down + 1 : down;
}

/* quantize_row() of x [K] against the formula of qqq.h, in float, step by step. */
static bool quantizes_right(const float *x, int K, const char *what) {
    int8_t *a = allocate(K, 1);
    memset(a, 77, K);
    float s_a = quantize_row(x, K, a), max = 0;
    for (int k = 0; k < K; k++) max = fmaxf(max, fabsf(x[k]));
    volatile float want = max / 127.0f;
    bool ok = check(bits_of(s_a) == bits_of(want), "%s: s_a %a, expected %a", what, s_a, want);
    for (int k = 0; k < K && ok; k++) {
        volatile float ratio = x[k] / want;
        double r = want == 0 ? 0 : half_even(ratio);
        r = fmin(fmax(r, -128), 127);
        ok = check(a[k] == r, "%s: x %a became %d, expected %g", what, x[k], a[k], r);
    }
    free(a);
    return ok;
}

static void test_quantize_row(void) {
    uint64_t seed = 2;
    test_begin("quantize_row: random rows");
    int sizes[] = {1, 2, 7, 64, 255, 896, 14336};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int exponent = -150; exponent < 128; exponent += 3) {
            float *x = random_floats(sizes[i], 1, &seed);
            for (int k = 0; k < sizes[i]; k++) x[k] = ldexpf(x[k], exponent);
            bool ok = quantizes_right(x, sizes[i], "random");
            free(x);
            if (!ok) return;
        }

    test_begin("quantize_row: ties go to the even integer");
    float ties[256];
    for (int i = 0; i < 254; i++) ties[i] = i - 126.5f;
    ties[254] = 127; // s_a = 1
    ties[255] = -127;
    quantizes_right(ties, 256, "ties");
    int8_t a[256];
    quantize_row(ties, 256, a);
    check(a[126] == 0 && a[127] == 0 && a[128] == 2 && a[129] == 2, "-0.5 0.5 1.5 2.5: %d %d %d %d",
          a[126], a[127], a[128], a[129]);

    test_begin("quantize_row: zeros, subnormals, extremes");
    float zeros[5] = {0, -0.0f, 0, 0, 0};
    quantizes_right(zeros, 5, "zeros");
    for (uint32_t max = 1; max < 1u << 23; max = max < 3000 ? max + 1 : max * 3) {
        float x[6] = {float_of(max), -float_of(max), float_of(max / 2), float_of(max / 3), 0, 0};
        if (!quantizes_right(x, 6, "subnormal")) break;
    }
    float extremes[6] = {FLT_MAX, -FLT_MAX, FLT_MAX / 2, FLT_MIN, -0x1p-149f, 1};
    quantizes_right(extremes, 6, "FLT_MAX");
    float negative[3] = {-3, 1, 2.9f}; // the largest magnitude is a negative one
    quantizes_right(negative, 3, "negative");

    test_begin("quantize_row: NaN and infinity show in the scale");
    float bad[] = {NAN, -NAN, INFINITY, -INFINITY, float_of(0x7f800001)};
    for (int i = 0; i < 5; i++)
        for (int at = 0; at < 40; at++) {
            float x[40];
            for (int k = 0; k < 40; k++) x[k] = k - 20;
            x[at] = bad[i];
            check(isnan(quantize_row(x, 40, a)), "%g at %d", bad[i], at);
        }
}

static void test_pack(void) {
    test_begin("pack_row and unpack_row are inverse for all bytes");
    uint8_t all[256], packed[256];
    int8_t q[512], again[512];
    for (int i = 0; i < 256; i++) all[i] = i;
    unpack_row(all, 512, q);
    pack_row(q, 512, packed);
    check(!memcmp(all, packed, 256), "bytes changed");
    for (int i = 0; i < 256; i++) // the even column in the low nibble
        check(q[2 * i] == i % 16 - 8 && q[2 * i + 1] == i / 16 - 8, "byte %d: %d, %d", i, q[2 * i],
              q[2 * i + 1]);
    unpack_row(packed, 512, again);
    check(!memcmp(q, again, 512), "codes changed");
}

/* ---- integer products ---------------------------------------------------------------------- */

typedef enum { RANDOM, ALL_LOW, ALL_HIGH, MIXED_EXTREMES, N_FILLS } Fill;

/* A quantized linear and what its bytes mean, w8 [N][K]. */
typedef struct {
    Linear linear;
    int8_t *w8;
} W4A8;

static W4A8 random_w4a8(int N, int K, bool groups, Fill fill, uint64_t *seed) {
    uint8_t *qweight = allocate((size_t)N * K / 2, 1);
    uint8_t *s_group = groups ? allocate((size_t)N * K / GROUP, 1) : NULL;
    float *s_channel = allocate(N, sizeof *s_channel);
    W4A8 x = {{.N = N, .K = K, .dtype = U8}, allocate((size_t)N * K, 1)};
    for (int i = 0; groups && i < N * (K / GROUP); i++)
        s_group[i] = fill == RANDOM ? 1 + random_below(15, seed) : 15;
    for (size_t i = 0; i < (size_t)N * K; i++) {
        int u = fill == RANDOM     ? random_below(16, seed)
                : fill == ALL_LOW  ? 0
                : fill == ALL_HIGH ? 15
                                   : 15 * random_below(2, seed);
        qweight[i / 2] |= u << (i % 2 ? 4 : 0);
        x.w8[i] = (u - 8) * (groups ? s_group[i / K * (K / GROUP) + i % K / GROUP] : 1);
    }
    for (int n = 0; n < N; n++) s_channel[n] = 0.01f * (1.5f + random_float(seed));
    x.linear.qweight = qweight;
    x.linear.s_group = s_group;
    x.linear.s_channel = s_channel;
    return x;
}

static void free_w4a8(W4A8 x) {
    linear_free(&x.linear);
    free(x.w8);
}

static int32_t naive_accumulator(const W4A8 *w, const int8_t *a, int n) {
    int64_t sum = 0;
    for (int k = 0; k < w->linear.K; k++) sum += (int64_t)a[k] * w->w8[(size_t)n * w->linear.K + k];
    return (int32_t)sum;
}

static void test_accumulators(void) {
    static const int sizes[] = {2, 6, 62, 64, 66, 126, 128, 130, 256, 384, 448, 896, 14336, 21760};
    const char *kernel_name;
    for (int i = 0; i < 8; i++) {
        kernel_name = NULL;
        DotU4 *kernel = dot_u4_kernel(i, &kernel_name);
        if (!kernel && !kernel_name) break;
        static char names[8][80];
        snprintf(names[i], sizeof names[i], "accumulators, %s: equal to 64-bit sums", kernel_name);
        test_begin(names[i]);
        if (!kernel) {
            test_skip("the processor lacks it");
            continue;
        }
        uint64_t seed = 3;
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            for (int groups = 0; groups < 2; groups++)
                for (Fill fill = RANDOM; fill < N_FILLS; fill++) {
                    int K = sizes[k], N = 3, T = 100;
                    if (groups && K % GROUP) continue;
                    W4A8 w = random_w4a8(N, K, groups, fill, &seed);
                    int8_t *a = allocate(T, K);
                    for (int j = 0; j < T * K; j++)
                        a[j] = fill == RANDOM     ? random_below(256, &seed) - 128
                               : fill == ALL_LOW  ? -128
                               : fill == ALL_HIGH ? 127
                                                  : (random_below(2, &seed) ? 127 : -128);
                    int32_t want[100 * 3], got[100 * 3];
                    for (int j = 0; j < T * N; j++)
                        want[j] = naive_accumulator(&w, a + (size_t)(j / N) * K, j % N);
                    for (int t = 1; t <= T; t = t < 17   ? t + 1
                                                : t < 31 ? 31
                                                : t < 33 ? t + 1
                                                         : t + 67) {
                        memset(got, 0x55, sizeof got);
                        accumulators(&w.linear, a, t, kernel, got);
                        for (int j = 0; j < t * N; j++)
                            if (!check(got[j] == want[j], "K %d, %d tokens, %s, fill %d: %d not %d",
                                       K, t, groups ? "groups" : "channel", fill, got[j], want[j]))
                                break;
                    }
                    free(a);
                    free_w4a8(w);
                }
    }
}

static void test_quantized_linear(void) {
    test_begin("linear, W4A8: exactly (acc s_a) s_channel");
    uint64_t seed = 4;
    static const int shapes[][2] = {{1, 2}, {5, 66}, {33, 128}, {70, 256}, {64, 448}, {7, 1024}};
    for (int i = 0; i < 6; i++)
        for (int groups = 0; groups < 2; groups++)
            for (int T = 1; T < 75; T = T < 10 ? T + 1 : T + 13) {
                int N = shapes[i][0], K = shapes[i][1];
                if (groups && K % GROUP) continue;
                W4A8 w = random_w4a8(N, K, groups, RANDOM, &seed);
                float *x = random_floats((size_t)T * K, 3, &seed);
                float *y = allocate((size_t)T * N, sizeof *y);
                int8_t *a = allocate(K, 1);
                linear(&w.linear, x, T, y);
                bool ok = true;
                for (int t = 0; t < T && ok; t++) {
                    float s_a = quantize_row(x + (size_t)t * K, K, a);
                    for (int n = 0; n < N && ok; n++) {
                        volatile float scaled = (float)naive_accumulator(&w, a, n) * s_a;
                        volatile float want = scaled * w.linear.s_channel[n];
                        float got = y[(size_t)t * N + n];
                        ok = check(bits_of(got) == bits_of(want), "N %d K %d T %d: %a not %a", N, K,
                                   T, got, want);
                    }
                }
                free(a);
                free(x);
                free(y);
                free_w4a8(w);
            }

    test_begin("linear, W4A8: NaN in a row shows in that row only");
    W4A8 w = random_w4a8(9, 128, true, RANDOM, &seed);
    float *x = random_floats(3 * 128, 1, &seed), y[27];
    x[128 + 5] = NAN;
    linear(&w.linear, x, 3, y);
    for (int i = 0; i < 27; i++) check(isnan(y[i]) == (i / 9 == 1), "y %d is %g", i, y[i]);

    test_begin("dequantize_row: (q s_group) s_channel");
    for (int groups = 0; groups < 2; groups++) {
        W4A8 d = random_w4a8(9, 384, groups, RANDOM, &seed);
        float row[384];
        for (int n = 0; n < 9; n++) {
            dequantize_row(&d.linear, n, row);
            for (int k = 0; k < 384; k++) {
                volatile float want = (float)d.w8[n * 384 + k] * d.linear.s_channel[n];
                check(row[k] == want, "row %d, column %d: %a not %a", n, k, row[k], want);
            }
        }
        free_w4a8(d);
    }
    free(x);
    free_w4a8(w);
}

/* lm_head in 8 bits: each row by the definition, each product exact, in any company. */
static void test_bytes(void) {
    static const int shapes[][2] = {{37, 256}, {5, 33}, {1, 1}, {70, 1040}};
    uint64_t seed = 21;
    test_begin("int8 rows: scales, codes, exact sums");
    for (int i = 0; i < 4; i++) {
        enum { T = 70 };
        int N = shapes[i][0], K = shapes[i][1];
        Linear w = {.N = N, .K = K, .dtype = F32, .w = random_floats((size_t)N * K, 1, &seed)};
        float *rows = w.w, *x = random_floats((size_t)T * K, 3, &seed), scale[T];
        memset(rows, 0, (N > 1 ? K : 0) * sizeof *rows); // a row of zeros
        Linear bytes = quantize_bytes(&w);
        const int8_t *q = bytes.w;
        int8_t *a = allocate(T, K);
        for (int n = 0; n < N; n++) {
            float max = 0;
            for (int k = 0; k < K; k++) max = fmaxf(max, fabsf(rows[n * K + k]));
            check(bytes.s_channel[n] == max / 127, "row %d: scale %g", n, bytes.s_channel[n]);
            for (int k = 0; k < K; k++)
                check(q[n * K + k] == (max > 0 ? half_even(rows[n * K + k] / (max / 127)) : 0),
                      "row %d, column %d: %d", n, k, q[n * K + k]);
        }
        float *y = allocate((size_t)T * N, sizeof *y), *alone = allocate(N, sizeof *alone);
        for (int t = 0; t < T; t++) scale[t] = quantize_row(x + t * K, K, a + t * K);
        linear(&bytes, x, T, y);
        for (int t = 0; t < T; t++) {
            linear(&bytes, x + t * K, 1, alone);
            check(!memcmp(alone, y + t * N, N * sizeof *y), "token %d alone", t);
            for (int n = 0; n < N; n++) {
                int64_t sum = 0;
                for (int k = 0; k < K; k++) sum += a[t * K + k] * q[n * K + k];
                check(y[t * N + n] == ((float)sum * scale[t]) * bytes.s_channel[n],
                      "token %d, row %d: %g, its sum %lld", t, n, y[t * N + n], (long long)sum);
            }
        }
        linear_free(&w);
        linear_free(&bytes);
        free(x), free(a), free(y), free(alone);
    }
}

static Linear random_linear(int N, int K, uint64_t *seed) {
    return (Linear){
        .N = N, .K = K, .dtype = F32, .w = random_floats((size_t)N * K, sqrtf(3.0f / K), seed)};
}

/* linear() as section 2 of qqq.c writes it and as section 4 computes it: equal integer products,
 * close float ones. */
static void test_textbook_linear(void) {
    static const int shapes[][2] = {{5, 66}, {33, 128}, {70, 384}, {1, 2}, {37, 1024}};
    static const int tokens[] = {1, 8, 31, 32, 33, 100};
    uint64_t seed = 22;
    for (int kind = 0; kind < 4; kind++) {
        static const char *const names[] = {"W4A8 per channel", "W4A8 per group", "int8", "float"};
        char name[80];
        snprintf(name, sizeof name, "linear, %s: the textbook's and the fast one", names[kind]);
        test_begin(name);
        for (int i = 0; i < 5 * 6; i++) {
            int N = shapes[i / 6][0], K = shapes[i / 6][1], T = tokens[i % 6];
            if (kind == 1 && K % GROUP) continue;
            W4A8 w = random_w4a8(N, K, kind == 1, RANDOM, &seed);
            Linear f = random_linear(N, K, &seed), bytes = quantize_bytes(&f);
            const Linear *l = kind < 2 ? &w.linear : kind == 2 ? &bytes : &f;
            float *x = random_floats((size_t)T * K, 3, &seed);
            float *book = allocate((size_t)T * N, sizeof *book);
            float *fast = allocate((size_t)T * N, sizeof *fast);
            textbook = true;
            linear(l, x, T, book);
            textbook = false;
            linear(l, x, T, fast);
            double off = max_difference(book, fast, (size_t)T * N);
            check(off <= (kind < 3 ? 0 : 1e-5), "N %d K %d T %d: off by %g", N, K, T, off);
            use_amx = false; // what a processor without AMX runs
            linear(l, x, T, fast);
            use_amx = true;
            off = max_difference(book, fast, (size_t)T * N);
            check(off <= (kind < 3 ? 0 : 1e-5), "N %d K %d T %d: off by %g", N, K, T, off);
            linear_free(&f), linear_free(&bytes), free_w4a8(w);
            free(x), free(book), free(fast);
        }
    }
}

/* ---- float products and the small parts ---------------------------------------------------- */

static void test_float_linear(void) {
    test_begin("linear, float: any size against double");
    uint64_t seed = 5;
    static const int sizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 65, 255, 256, 257, 515};
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    for (int i = 0; i < N_SIZES; i++)
        for (int j = 0; j < N_SIZES; j++)
            for (int T = 1; T < 15; T = T < 8 ? T + 1 : T + 5) {
                int N = sizes[i], K = sizes[j];
                float *x = random_floats((size_t)T * K, 1, &seed);
                float *w = random_floats((size_t)N * K, 1, &seed);
                float *y = allocate((size_t)T * N + 1, sizeof *y);
                y[T * N] = 99;
                linear(&(Linear){.N = N, .K = K, .dtype = F32, .w = w}, x, T, y);
                bool ok = check(y[T * N] == 99, "N %d K %d T %d: wrote behind y", N, K, T);
                for (int t = 0; t < T && ok; t++)
                    for (int n = 0; n < N && ok; n++) {
                        double sum = 0, size = 0;
                        for (int k = 0; k < K; k++) {
                            double product = (double)x[t * K + k] * w[n * K + k];
                            sum += product;
                            size += fabs(product);
                        }
                        double off = fabs(y[t * N + n] - sum);
                        ok = check(off <= 1e-6 * size, "N %d K %d T %d: off by %g", N, K, T, off);
                    }
                free(x);
                free(w);
                free(y);
            }

    test_begin("linear, float: equal weights in F32, F16 and BF16 give equal results");
    int N = 45, K = 300;
    float *w = allocate((size_t)N * K, sizeof *w);
    uint16_t *half = allocate((size_t)N * K, 2), *brain = allocate((size_t)N * K, 2);
    char *odd = allocate((size_t)N * K + 1, 2); // the same at an odd address
    for (int i = 0; i < N * K; i++) {
        w[i] = (random_below(256, &seed) - 128) / 64.0f;
        half[i] = float_to_f16(w[i]);
        brain[i] = bits_of(w[i]) >> 16;
    }
    memcpy(odd + 1, brain, (size_t)N * K * 2);
    const Linear same[] = {{.N = N, .K = K, .dtype = F32, .w = w},
                           {.N = N, .K = K, .dtype = F16, .w = half},
                           {.N = N, .K = K, .dtype = BF16, .w = brain},
                           {.N = N, .K = K, .dtype = BF16, .w = odd + 1}};
    for (int T = 1; T < 20; T += 6) {
        float *x = random_floats((size_t)T * K, 1, &seed);
        float *y = allocate((size_t)T * N, sizeof *y), *z = allocate((size_t)T * N, sizeof *z);
        linear(&same[0], x, T, y);
        for (int i = 1; i < 4; i++) {
            linear(&same[i], x, T, z);
            check(!memcmp(y, z, sizeof *y * T * N), "%s differs, T %d", dtype_name(same[i].dtype),
                  T);
        }
        free(x);
        free(y);
        free(z);
    }
    free(w);
    free(half);
    free(brain);
    free(odd);
}

static void test_rmsnorm(void) {
    test_begin("rmsnorm against double, also in place");
    uint64_t seed = 6;
    for (int dim = 1; dim < 600; dim = dim < 70 ? dim + 1 : dim + 111) {
        int T = dim % 5 + 1;
        float *x = random_floats((size_t)T * dim, 20, &seed), *w = random_floats(dim, 2, &seed);
        float *y = allocate((size_t)T * dim, sizeof *y);
        rmsnorm(x, w, T, dim, 1e-5f, y);
        for (int t = 0; t < T; t++) {
            double sum = 0;
            for (int i = 0; i < dim; i++) sum += (double)x[t * dim + i] * x[t * dim + i];
            for (int i = 0; i < dim; i++) {
                double want = x[t * dim + i] / sqrt(sum / dim + 1e-5) * w[i];
                double off = fabs(y[t * dim + i] - want);
                check(off <= 1e-5, "dim %d: %g, expected %g", dim, y[t * dim + i], want);
            }
        }
        rmsnorm(x, w, T, dim, 1e-5f, x);
        check(!memcmp(x, y, sizeof *x * T * dim), "dim %d: in place differs", dim);
        free(x);
        free(w);
        free(y);
    }
    float zeros[3] = {0}, ones[3] = {1, 1, 1}, y[3];
    rmsnorm(zeros, ones, 1, 3, 1e-5f, y);
    check(y[0] == 0 && y[2] == 0, "zeros became %g", y[0]);
}

/* The frequency of pair i as the paper and transformers' modeling_rope_utils.py give it, by
 * wavelengths. */
static double naive_frequency(const Config *c, int i) {
    double f = 1 / pow(c->rope_theta, 2.0 * i / c->head_dim);
    if (c->rope_factor == 0) return f;
    double wavelength = 2 * acos(-1) / f;
    if (wavelength < c->rope_original_context / c->rope_high_freq_factor) return f;
    if (wavelength > c->rope_original_context / c->rope_low_freq_factor) return f / c->rope_factor;
    double smooth = (c->rope_original_context / wavelength - c->rope_low_freq_factor) /
                    (c->rope_high_freq_factor - c->rope_low_freq_factor);
    return (1 - smooth) * f / c->rope_factor + smooth * f;
}

static Config shape_of(int dim, int hidden_dim, int n_layers, int n_heads, int n_kv_heads,
                       int head_dim, int vocab_size, double rope_factor) {
    return (Config){.dim = dim,
                    .hidden_dim = hidden_dim,
                    .n_layers = n_layers,
                    .n_heads = n_heads,
                    .n_kv_heads = n_kv_heads,
                    .head_dim = head_dim,
                    .vocab_size = vocab_size,
                    .max_context = 131072,
                    .norm_eps = 1e-5f,
                    .rope_theta = 500000,
                    .rope_factor = rope_factor,
                    .rope_low_freq_factor = 1,
                    .rope_high_freq_factor = 4,
                    .rope_original_context = 8192};
}

static void test_rope_angles(void) {
    static const int positions[] = {0,    1,     2,     100,   2047,  8191,   8192,
                                    8193, 10000, 16384, 32767, 65536, 100003, 131071};
    for (int scaled = 0; scaled < 2; scaled++) {
        test_begin(scaled ? "rope_angles with LLaMA 3.1's scaling, to position 131071"
                          : "rope_angles without scaling, to position 131071");
        for (int head_dim = 2; head_dim <= 128; head_dim *= 2) {
            Config c = shape_of(8, 8, 1, 1, 1, head_dim, 8, scaled ? 8 : 0);
            for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
                float angles[128];
                rope_angles(&c, positions[p], angles);
                for (int i = 0; i < head_dim / 2; i++) {
                    double angle = positions[p] * naive_frequency(&c, i);
                    double off = fmax(fabs(angles[2 * i] - cos(angle)),
                                      fabs(angles[2 * i + 1] - sin(angle)));
                    check(off < 1e-7, "head_dim %d, position %d, pair %d: off by %g", head_dim,
                          positions[p], i, off);
                }
            }
        }
    }

    test_begin("rope_angles: LLaMA 3.1-8B's frequencies"); // computed with 50 digits
    Config c = shape_of(4096, 14336, 32, 32, 8, 128, 128256, 8);
    static const struct {
        int i;
        double frequency;
    } golden[] = {{0, 1.0},
                  {16, 0.037606030930863933},
                  {28, 0.0032114459947525909},
                  {29, 0.0021665707635033587},
                  {30, 0.0013718935677611381},
                  {33, 0.00031269375038406512},
                  {35, 9.5562123539646833e-05},
                  {48, 6.6478698711812354e-06},
                  {63, 3.0689259889145111e-07}};
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        float angles[128];
        rope_angles(&c, 8200, angles);
        double angle = 8200 * golden[i].frequency;
        check(fabs(angles[2 * golden[i].i] - cos(angle)) < 1e-7 &&
                  fabs(angles[2 * golden[i].i + 1] - sin(angle)) < 1e-7,
              "pair %d", golden[i].i);
    }
}

/* ---- a naive LLaMA in double --------------------------------------------------------------- */

/* A model in memory with random weights in F32. */
static Model *random_model(Config c, uint64_t seed) {
    Model *m = allocate(1, sizeof *m);
    m->config = c;
    m->embedding = random_linear(c.vocab_size, c.dim, &seed);
    m->lm_head = random_linear(c.vocab_size, c.dim, &seed);
    m->norm = random_floats(c.dim, 2, &seed);
    m->layers = allocate(c.n_layers, sizeof *m->layers);
    for (int l = 0; l < c.n_layers; l++) {
        m->layers[l].attention_norm = random_floats(2 * c.dim, 2, &seed);
        m->layers[l].ffn_norm = m->layers[l].attention_norm + c.dim;
        for (int k = 0; k < N_LINEARS; k++) {
            int N, K;
            linear_shape(&c, k, &N, &K);
            m->layers[l].linears[k] = random_linear(N, K, &seed);
        }
    }
    return m;
}

/* Replaces the weights of the layers by random W4A8 ones. */
static void make_quantized(Model *m, bool groups) {
    uint64_t seed = 77;
    for (int l = 0; l < m->config.n_layers; l++)
        for (int k = 0; k < N_LINEARS; k++) {
            Linear *w = &m->layers[l].linears[k];
            W4A8 q = random_w4a8(w->N, w->K, groups, RANDOM, &seed);
            linear_free(w);
            free(q.w8);
            *w = q.linear;
        }
    m->group_size = groups ? GROUP : -1;
}

static void naive_linear(const Linear *l, const double *x, double *y) {
    float *row = allocate(l->K, sizeof *row);
    for (int n = 0; n < l->N; n++) {
        floats(l->w, l->dtype, (size_t)n * l->K, l->K, row);
        y[n] = 0;
        for (int k = 0; k < l->K; k++) y[n] += row[k] * x[k];
    }
    free(row);
}

static void naive_rmsnorm(const double *x, const float *weight, const Config *c, double *y) {
    double sum = 0;
    for (int i = 0; i < c->dim; i++) sum += x[i] * x[i];
    for (int i = 0; i < c->dim; i++) y[i] = x[i] / sqrt(sum / c->dim + c->norm_eps) * weight[i];
}

static void naive_rope(double *head, const Config *c, int pos) {
    for (int i = 0, half = c->head_dim / 2; i < half; i++) {
        double angle = pos * naive_frequency(c, i), a = head[i], b = head[i + half];
        head[i] = a * cos(angle) - b * sin(angle);
        head[i + half] = b * cos(angle) + a * sin(angle);
    }
}

/* att [n_heads * head_dim] of token t, which stands at pos + t: positions before pos have keys and
 * values of zero, as in a fresh cache. q, keys and values: [T][...]. */
static void naive_attention(const Config *c, const double *q, const double *keys,
                            const double *values, int t, int pos, double *att) {
    int d = c->head_dim, q_dim = c->n_heads * d, kv_dim = c->n_kv_heads * d;
    double *weights = allocate(t + 1, sizeof *weights);
    for (int h = 0; h < c->n_heads; h++) {
        int kv = h / (c->n_heads / c->n_kv_heads);
        double sum = pos; // exp(0) each
        for (int j = 0; j <= t; j++) {
            double score = 0;
            for (int i = 0; i < d; i++)
                score += q[(size_t)t * q_dim + h * d + i] * keys[(size_t)j * kv_dim + kv * d + i];
            weights[j] = exp(score / sqrt(d));
            sum += weights[j];
        }
        for (int i = 0; i < d; i++) {
            att[h * d + i] = 0;
            for (int j = 0; j <= t; j++)
                att[h * d + i] += weights[j] / sum * values[(size_t)j * kv_dim + kv * d + i];
        }
    }
    free(weights);
}

/* Logits [T][vocab_size] of tokens at pos .. pos + T - 1, earlier positions empty. */
static float *naive_logits(const Model *m, const int *tokens, int T, int pos) {
    const Config *c = &m->config;
    size_t dim = c->dim, d = c->head_dim, q_dim = c->n_heads * d, kv_dim = c->n_kv_heads * d;
    double *x = allocate(T * dim, sizeof *x), *h = allocate(dim, sizeof *h);
    double *q = allocate(T * q_dim, sizeof *q), *k = allocate(T * kv_dim, sizeof *k);
    double *v = allocate(T * kv_dim, sizeof *v), *att = allocate(q_dim, sizeof *att);
    double *gate = allocate(c->hidden_dim, sizeof *gate), *up = allocate(c->hidden_dim, sizeof *up);
    double *y = allocate(c->vocab_size, sizeof *y);
    float *row = allocate(dim, sizeof *row), *out = allocate((size_t)T * c->vocab_size, 4);
    for (int t = 0; t < T; t++) {
        floats(m->embedding.w, m->embedding.dtype, tokens[t] * dim, dim, row);
        for (size_t i = 0; i < dim; i++) x[t * dim + i] = row[i];
    }
    for (int l = 0; l < c->n_layers; l++) {
        const Layer *w = &m->layers[l];
        for (int t = 0; t < T; t++) {
            naive_rmsnorm(x + t * dim, w->attention_norm, c, h);
            naive_linear(&w->q, h, q + t * q_dim);
            naive_linear(&w->k, h, k + t * kv_dim);
            naive_linear(&w->v, h, v + t * kv_dim);
            for (int i = 0; i < c->n_heads; i++) naive_rope(q + t * q_dim + i * d, c, pos + t);
            for (int i = 0; i < c->n_kv_heads; i++) naive_rope(k + t * kv_dim + i * d, c, pos + t);
        }
        for (int t = 0; t < T; t++) {
            naive_attention(c, q, k, v, t, pos, att);
            naive_linear(&w->o, att, h);
            for (size_t i = 0; i < dim; i++) x[t * dim + i] += h[i];
            naive_rmsnorm(x + t * dim, w->ffn_norm, c, h);
            naive_linear(&w->gate, h, gate);
            naive_linear(&w->up, h, up);
            for (int i = 0; i < c->hidden_dim; i++) gate[i] *= up[i] / (1 + exp(-gate[i]));
            naive_linear(&w->down, gate, h);
            for (size_t i = 0; i < dim; i++) x[t * dim + i] += h[i];
        }
    }
    for (int t = 0; t < T; t++) {
        naive_rmsnorm(x + t * dim, m->norm, c, h);
        naive_linear(&m->lm_head, h, y);
        for (int i = 0; i < c->vocab_size; i++) out[(size_t)t * c->vocab_size + i] = y[i];
    }
    void *buffers[] = {x, h, q, k, v, att, gate, up, y, row};
    for (int i = 0; i < 10; i++) free(buffers[i]);
    return out;
}

/* Runs tokens [T] from `pos` on in chunks of these sizes, over and over, and copies all logits to
 * out [T][vocab_size]. */
static void chunked_logits(const Model *m, State *s, const int *tokens, int T, int pos,
                           const int *chunks, int n_chunks, float *out) {
    size_t vocab = m->config.vocab_size;
    for (int t = 0, i = 0; t < T; t += chunks[i++ % n_chunks]) {
        int n = chunks[i % n_chunks] < T - t ? chunks[i % n_chunks] : T - t;
        forward(m, s, tokens + t, n, pos + t);
        for (int first = 0; first < n; first += LOGIT_ROWS) {
            int rows = n - first < LOGIT_ROWS ? n - first : LOGIT_ROWS;
            memcpy(out + (t + first) * vocab, logits(m, s, first, rows),
                   rows * vocab * sizeof *out);
        }
    }
}

static void test_random_models(void) {
    static const struct {
        const char *name;
        int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, T, pos;
        double rope_factor;
    } cases[] = {
        {"forward against double: GQA group 4", 40, 52, 2, 4, 1, 10, 37, 70, 0, 8},
        {"forward against double: GQA group 1", 48, 100, 2, 3, 3, 16, 65, 40, 0, 8},
        {"forward against double: GQA group 2, several KV heads", 64, 96, 3, 8, 4, 8, 50, 35, 0, 0},
        {"forward against double: GQA group 8", 64, 30, 1, 8, 1, 64, 33, 67, 0, 8},
        {"forward against double: odd sizes", 33, 71, 2, 3, 1, 6, 101, 37, 0, 8},
        {"forward against double: smallest sizes", 1, 1, 1, 1, 1, 2, 2, 5, 0, 0},
        {"forward against double: longer than a panel", 300, 523, 1, 2, 1, 128, 70, 9, 0, 8},
        {"forward against double: position 8192 and on", 40, 52, 2, 4, 2, 64, 37, 40, 8192, 8},
        {"forward against double: position 20001, odd", 40, 52, 2, 4, 2, 32, 37, 33, 20001, 8},
        {"forward against double: one token", 40, 52, 2, 4, 2, 32, 37, 1, 3, 8},
    };
    static const int whole[] = {1000}, single[] = {1}, odd[] = {1, 7, 2, 33, 3};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_begin(cases[i].name);
        uint64_t seed = 100 + i;
        int T = cases[i].T, pos = cases[i].pos, vocab = cases[i].vocab_size;
        Config c = shape_of(cases[i].dim, cases[i].hidden_dim, cases[i].n_layers, cases[i].n_heads,
                            cases[i].n_kv_heads, cases[i].head_dim, vocab, cases[i].rope_factor);
        Model *m = random_model(c, seed);
        int *tokens = random_tokens(T, vocab, &seed);
        float *want = naive_logits(m, tokens, T, pos);
        float *got = allocate((size_t)T * vocab, sizeof *got);
        State *s = state_new(&c, pos + T, T, 16);
        chunked_logits(m, s, tokens, T, pos, whole, 1, got);
        double off = max_difference(got, want, (size_t)T * vocab);
        check(off < 1e-4, "whole window: logits are off by %g", off);
        int threads = max_threads();
        set_threads(1); // so little work is done faster by one
        chunked_logits(m, s, tokens, T, pos, single, 1, got);
        off = max_difference(got, want, (size_t)T * vocab);
        check(off < 1e-4, "token by token: logits are off by %g", off);
        chunked_logits(m, s, tokens, T, pos, odd, 5, got);
        off = max_difference(got, want, (size_t)T * vocab);
        check(off < 1e-4, "odd chunks: logits are off by %g", off);
        set_threads(threads);
        state_free(s);
        free(got);
        free(want);
        free(tokens);
        model_free(m);
    }
}

/* Perplexity as the header describes it, from naive logits. */
static double naive_perplexity(const Model *m, const int *tokens, int length, int windows) {
    double sum = 0;
    int vocab = m->config.vocab_size;
    for (int w = 0; w < windows; w++) {
        const int *window = tokens + w * length;
        float *y = naive_logits(m, window, length, 0);
        for (int t = 0; t + 1 < length; t++) {
            double total = 0;
            for (int i = 0; i < vocab; i++) total += exp(y[t * vocab + i]);
            sum += (log(total) - y[t * vocab + window[t + 1]]) / (length - 1);
        }
        free(y);
    }
    return exp(sum / windows);
}

static int n_calls, last_done, last_total;

static void count_progress(int done, int total) {
    n_calls++;
    last_done = done;
    last_total = total;
}

static void test_perplexity_function(void) {
    uint64_t seed = 8;
    Config c = shape_of(24, 40, 2, 4, 2, 6, 37, 8);
    Model *m = random_model(c, seed);
    int *tokens = random_tokens(300, 37, &seed), windows;

    test_begin("perplexity: whole windows only, mean over windows");
    for (int length = 2; length < 200; length = length * 3 + 1) {
        int n = 2 * length + length / 2;
        double got = model_perplexity(m, tokens, n < 300 ? n : 300, length, 0, &windows, NULL);
        int total = (n < 300 ? n : 300) / length;
        double want = naive_perplexity(m, tokens, length, total);
        check(windows == total, "length %d: %d windows, expected %d", length, windows, total);
        check(fabs(got / want - 1) < 1e-5, "length %d: %.8g, expected %.8g", length, got, want);
    }

    test_begin("perplexity: at most max_windows, progress after each");
    double got = model_perplexity(m, tokens, 300, 30, 4, &windows, count_progress);
    double want = naive_perplexity(m, tokens, 30, 4);
    check(windows == 4 && fabs(got / want - 1) < 1e-5, "%d windows: %g not %g", windows, got, want);
    check(n_calls == 4 && last_done == 4 && last_total == 4, "progress: %d calls, last %d of %d",
          n_calls, last_done, last_total);
    model_perplexity(m, tokens, 60, 30, 4, &windows, NULL);
    check(windows == 2, "%d windows of 2", windows);

    test_begin("perplexity: NaN without a window");
    got = model_perplexity(m, tokens, 29, 30, 0, &windows, NULL);
    check(isnan(got) && windows == 0, "%g, %d windows", got, windows);

    test_begin("perplexity: NaN in the weights shows");
    ((float *)m->lm_head.w)[5] = NAN;
    got = model_perplexity(m, tokens, 60, 30, 0, &windows, NULL);
    check(isnan(got), "%g", got);
    free(tokens);
    model_free(m);
}

/* What quantize.c does with a layer: its parts one by one, where their inputs can be seen. */
static void test_layer_parts(void) {
    test_begin("layer_forward consists of its parts");
    enum { T = 7, DIM = 24, HIDDEN = 40 };
    uint64_t seed = 9;
    Config c = shape_of(DIM, HIDDEN, 2, 4, 2, 6, 37, 8);
    Model *m = random_model(c, seed);
    const Layer *layer = &m->layers[1];
    State *s = state_new(&c, T + 3, T, 16);
    float x[T * DIM], want[T * DIM], y[T * DIM];
    for (int i = 0; i < T * DIM; i++) x[i] = random_float(&seed);
    memcpy(s->x, x, sizeof x);
    layer_forward(&c, layer, s, 1, T, 3);
    memcpy(want, s->x, sizeof x);

    memcpy(s->x, x, sizeof x);
    rmsnorm(s->x, layer->attention_norm, T, DIM, c.norm_eps, s->xb);
    attention_block(&c, layer, s, 1, T, 3);
    check(!memcmp(s->x, x, sizeof x), "attention_block changed x");
    linear(&layer->o, s->att, T, y);
    add_linear(&layer->o, s->att, T, s->xb, s->x);
    for (int i = 0; i < T * DIM; i++) check(s->x[i] == x[i] + y[i], "add_linear, number %d", i);
    rmsnorm(s->x, layer->ffn_norm, T, DIM, c.norm_eps, s->xb);
    float gate[T * HIDDEN], up[T * HIDDEN];
    linear(&layer->gate, s->xb, T, gate);
    linear(&layer->up, s->xb, T, up);
    ffn_block(&c, layer, s, T);
    for (int i = 0; i < T * HIDDEN; i++) {
        double silu_up = gate[i] / (1 + exp(-gate[i])) * up[i];
        check(fabs(s->gate[i] - silu_up) < 1e-5, "ffn_block, number %d", i);
    }
    add_linear(&layer->down, s->gate, T, s->xb, s->x);
    check(!memcmp(s->x, want, sizeof want), "the parts give another x");
    state_free(s);
    model_free(m);
}

static const Model *refused_model;
static const int bad_forward[][3] = { // token, T, pos in a state of 8 positions, 4 a call
    {37, 1, 0}, {-1, 1, 0}, {1, 5, 0}, {1, 0, 0}, {1, 1, 8}, {1, 4, 5}, {1, 1, -1}};

static void run_bad_forward(void *arg) {
    const int *bad = arg;
    int tokens[5] = {bad[0], 1, 1, 1, 1};
    set_threads(1);
    State *s = state_new(&refused_model->config, 8, 4, 16);
    forward(refused_model, s, tokens, bad[1], bad[2]);
}

static void test_forward_refuses(void) {
    test_begin("forward: refuses tokens outside the vocabulary and positions outside the context");
    Model *m = random_model(shape_of(24, 40, 1, 4, 2, 6, 37, 8), 10);
    refused_model = m;
    for (size_t i = 0; i < sizeof bad_forward / sizeof *bad_forward; i++) {
        char message[256];
        bool clean = dies(run_bad_forward, (void *)bad_forward[i], message, sizeof message);
        check(clean && strstr(message, i < 2 ? "vocabulary of 37" : "context of 8"), "case %zu: %s",
              i, message);
    }
    model_free(m);
}

/* Logits of a fixed run, a window and then single tokens. */
static float *logits_of_run(const Model *m, int T) {
    uint64_t seed = 11;
    const int chunks[] = {T - 5, 1};
    float *out = allocate((size_t)T * m->config.vocab_size, sizeof *out);
    int *tokens = random_tokens(T, m->config.vocab_size, &seed);
    State *s = state_new(&m->config, T, T, 16);
    chunked_logits(m, s, tokens, T - 5, 0, chunks, 1, out);
    chunked_logits(m, s, tokens + T - 5, 5, T - 5, chunks + 1, 1,
                   out + (size_t)(T - 5) * m->config.vocab_size);
    state_free(s);
    free(tokens);
    return out;
}

static void check_threads(const Model *m, int T) {
    int before = max_threads(), windows;
    size_t bytes = sizeof(float) * T * m->config.vocab_size;
    uint64_t seed = 12;
    int *tokens = random_tokens(2 * T, m->config.vocab_size, &seed);
    set_threads(1);
    float *want = logits_of_run(m, T);
    double want_ppl = model_perplexity(m, tokens, 2 * T, T, 0, &windows, NULL);
    for (int threads = 2; threads <= 3; threads++) {
        set_threads(threads);
        float *got = logits_of_run(m, T);
        check(!memcmp(got, want, bytes), "%d threads give other logits", threads);
        double ppl = model_perplexity(m, tokens, 2 * T, T, 0, &windows, NULL);
        check(ppl == want_ppl, "%d threads: perplexity %.17g not %.17g", threads, ppl, want_ppl);
        free(got);
    }
    set_threads(before);
    free(want);
    free(tokens);
}

static void test_threads(void) {
    static const char *const names[] = {"the number of threads changes no bit: float",
                                        "the number of threads changes no bit: W4A8 per channel",
                                        "the number of threads changes no bit: W4A8 per group"};
    for (int kind = 0; kind < 3; kind++) {
        test_begin(names[kind]);
        Model *m = random_model(shape_of(128, 384, 2, 4, 2, 64, 150, 8), 13);
        if (kind) make_quantized(m, kind == 2);
        check_threads(m, 77);
        model_free(m);
    }
}

/* The W4A8 forward pass is the float one over dequantized weights, but for rounded activations. */
static void test_quantized_forward(void) {
    for (int groups = 0; groups < 2; groups++) {
        test_begin(groups ? "forward, W4A8 per group, is near its dequantized float model"
                          : "forward, W4A8 per channel, is near its dequantized float model");
        Model *m = random_model(shape_of(128, 384, 2, 4, 2, 64, 150, 8), 14);
        Model *f = random_model(shape_of(128, 384, 2, 4, 2, 64, 150, 8), 14);
        make_quantized(m, groups);
        for (int l = 0; l < 2; l++)
            for (int k = 0; k < N_LINEARS; k++) {
                Linear *q = &m->layers[l].linears[k], *w = &f->layers[l].linears[k];
                for (int n = 0; n < q->N; n++) {
                    // scaled so that y = W x keeps the size of x
                    q->s_channel[n] = (groups ? 0.025f : 0.2f) / sqrtf(q->K);
                    dequantize_row(q, n, (float *)w->w + (size_t)n * w->K);
                }
            }
        float *got = logits_of_run(m, 40), *want = logits_of_run(f, 40);
        double error = 0, size = 0;
        for (int i = 0; i < 40 * 150; i++) {
            error += pow(got[i] - want[i], 2);
            size += pow(want[i], 2);
        }
        check(error < 0.1 * 0.1 * size, "relative error %g", sqrt(error / size));
        free(got);
        free(want);
        model_free(m);
        model_free(f);
    }
}

/* ---- the KV cache in 16 and 8 bits ---------------------------------------------------------- */

/* Reads row x [d] of the cache by the definition at "the KV cache" in qqq.c. Returns the scale. */
static double naive_read_row(const uint8_t *row, int d, int bits, double *x) {
    float s = 1, f;
    if (bits == 8) memcpy(&s, row, sizeof s);
    for (int i = 0; i < d; i++) {
        memcpy(&f, row + (bits == 16 ? i * sizeof f : 0), sizeof f);
        x[i] = bits == 16 ? f : (double)(int8_t)row[sizeof s + i] * s;
    }
    return bits == 16 ? 1e-5 : s;
}

/* attention_block() on a cache of `bits`, fed in chunks, against attention in double that reads the
 * rows by their definition; and the rows against the keys and values themselves. */
static void check_cache(int head_dim, int bits, const int *chunks, int n_chunks) {
    enum { T = 300, KV = 2, GROUP_OF = 3 };
    Config c = shape_of(16, 8, 2, KV * GROUP_OF, KV, head_dim, 8, 8);
    size_t d = head_dim, q_dim = c.n_heads * d, kv_dim = KV * d, bytes = kv_row_bytes(&c, bits);
    uint64_t seed = 31;
    Model *m = random_model(c, seed);
    const Layer *w = &m->layers[1];
    float *x = random_floats((size_t)T * c.dim, 3, &seed);
    double *in = allocate(c.dim, sizeof *in), *q = allocate(T * q_dim, sizeof *q);
    double *kept[2], *read[2], *want = allocate(q_dim, sizeof *want);
    for (int i = 0; i < 2; i++) { // keys, values: as they are, through the cache
        kept[i] = allocate(T * kv_dim, sizeof **kept);
        read[i] = allocate(T * kv_dim, sizeof **read);
    }
    // 1. through attention_block(), in chunks
    State *s = state_new(&c, T, T, bits);
    float *att = allocate(T * q_dim, sizeof *att);
    for (int t = 0, i = 0, n; t < T; t += n) {
        n = chunks[i++ % n_chunks];
        if (n > T - t) n = T - t;
        memcpy(s->xb, x + (size_t)t * c.dim, (size_t)n * c.dim * sizeof *x);
        attention_block(&c, w, s, 1, n, t);
        memcpy(att + t * q_dim, s->att, n * q_dim * sizeof *att);
    }
    // 2. queries, keys and values in double, and the rows of the cache
    double worst = 0, error = 0, size = 0; // of a row in steps; of the output
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < c.dim; i++) in[i] = x[(size_t)t * c.dim + i];
        naive_linear(&w->q, in, q + t * q_dim);
        naive_linear(&w->k, in, kept[0] + t * kv_dim);
        naive_linear(&w->v, in, kept[1] + t * kv_dim);
        for (int h = 0; h < c.n_heads; h++) naive_rope(q + t * q_dim + h * d, &c, t);
        for (int h = 0; h < 2 * KV; h++) {
            double *k = kept[h / KV] + t * kv_dim + h % KV * d,
                   *r = read[h / KV] + (k - kept[h / KV]);
            if (h < KV) naive_rope(k, &c, t);
            size_t row = ((size_t)1 * 2 * KV + h) * T + t;
            double step = naive_read_row(s->cache + row * bytes, d, bits, r);
            for (size_t i = 0; i < d; i++) worst = fmax(worst, fabs(r[i] - k[i]) / step);
        }
    }
    // Half a step, and the rounding of float32 keys.
    check(worst < 0.501, "a row is off by %g steps", worst);
    // 3. attention in double over those rows
    for (int t = 0; t < T; t++) {
        naive_attention(&c, q, read[0], read[1], t, 0, want);
        for (size_t i = 0; i < q_dim; i++) {
            error += pow(att[t * q_dim + i] - want[i], 2);
            size += pow(want[i], 2);
        }
    }
    check(sqrt(error / size) < 1e-5, "the output is off by %g", sqrt(error / size));
    state_free(s);
    model_free(m);
    for (int i = 0; i < 2; i++) free(kept[i]), free(read[i]);
    free(x), free(in), free(q), free(want), free(att);
}

/* attention(), and what attention_block() uses instead of it, on a cache of random rows. */
static void test_textbook_attention(void) {
    enum { CONTEXT = 420, MOST = 100 };
    static const int heads[][3] = {{64, 4, 1}, {80, 3, 3}, {6, 8, 2}}; // head_dim, heads, KV heads
    static const int at[][2] = {{0, 1}, {0, 100}, {63, 1}, {64, 1}, {300, 1}, {300, 33}, {7, 31}};
    uint64_t seed = 32;
    for (int i = 0; i < 6; i++) {
        const int *h = heads[i % 3], bits = i < 3 ? 16 : 8;
        char name[100];
        snprintf(name, sizeof name, "attention, %d heads of %d, KV %d, %d bits: the textbook's",
                 h[1], h[0], h[2], bits);
        test_begin(name);
        Config c = shape_of(16, 8, 2, h[1], h[2], h[0], 8, 8);
        Model *m = random_model(c, seed);
        size_t n = (size_t)h[1] * h[0];
        State *s = state_new(&c, CONTEXT, CONTEXT, bits);
        for (int k = 0; k < CONTEXT * c.dim; k++) s->xb[k] = 3 * random_float(&seed);
        attention_block(&c, &m->layers[1], s, 1, CONTEXT, 0); // fills the cache
        for (int k = 0; k < 7; k++) {
            int pos = at[k][0], T = at[k][1];
            float book[MOST * 256];
            for (int j = 0; j < T * c.dim; j++) s->xb[j] = 3 * random_float(&seed);
            attention_block(&c, &m->layers[1], s, 1, T, pos);
            memcpy(book, s->att, T * n * sizeof *book);
            attention(&c, s, 1, T, pos);
            double off = max_difference(book, s->att, T * n);
            check(off < 1e-5, "%d tokens at %d: off by %g", T, pos, off);
        }
        state_free(s);
        model_free(m);
    }
}

/* The whole model by sections 1 and 2 of qqq.c alone. */
static void test_textbook_model(void) {
    static const char *const names[] = {"float", "W4A8 per channel", "W4A8 per group"};
    for (int kind = 0; kind < 3; kind++) {
        char name[80];
        snprintf(name, sizeof name, "a model by the textbook, %s", names[kind]);
        test_begin(name);
        Model *m = random_model(shape_of(128, 384, 2, 4, 2, 64, 150, 8), 13);
        if (kind) make_quantized(m, kind == 2);
        float *fast = logits_of_run(m, 40);
        textbook = true;
        float *book = logits_of_run(m, 40);
        textbook = false;
        double error = 0, size = 0;
        for (int i = 0; i < 40 * 150; i++) {
            error += pow(book[i] - fast[i], 2);
            size += pow(fast[i], 2);
        }
        // a rounding of attention may change an int8
        check(sqrt(error / size) < (kind ? 1e-2 : 1e-5), "off by %g", sqrt(error / size));
        free(fast);
        free(book);
        model_free(m);
    }
}

static void test_cache(void) {
    static const int whole[] = {300}, single[] = {1}, odd[] = {100, 1, 37};
    static const int dims[] = {64, 80, 6}; // 80 and 6: no powers of two
    for (int bits = 16; bits >= 8; bits /= 2)
        for (int i = 0; i < 3; i++) {
            char name[100];
            snprintf(name, sizeof name, "KV cache in %d bits, heads of %d: attention in double",
                     bits, dims[i]);
            test_begin(name);
            check_cache(dims[i], bits, whole, 1);
            check_cache(dims[i], bits, single, 1);
            check_cache(dims[i], bits, odd, 3);
        }

    test_begin("KV cache: NaN and infinity show, zeros stay zeros");
    Config c = shape_of(4, 4, 1, 1, 1, 4, 8, 0);
    Model *m = random_model(c, 5);
    const float bad[] = {NAN, INFINITY, -INFINITY, 0};
    for (int bits = 16; bits >= 8; bits /= 2)
        for (int i = 0; i < 4; i++) {
            State *s = state_new(&c, 2, 2, bits);
            for (int k = 0; k < 8; k++) s->xb[k] = bad[i];
            attention_block(&c, &m->layers[0], s, 0, 2, 0);
            attention_block(&c, &m->layers[0], s, 0, 1, 1);
            check(i < 3 ? !isfinite(s->att[0]) : s->att[0] == 0, "%d bits, %g: %g", bits, bad[i],
                  s->att[0]);
            state_free(s);
        }
    model_free(m);
}

/* The scores of tokens [n], fed to an engine in pieces. */
static Score *cache_scores(const Model *m, int bits, const int *tokens, int n, int piece) {
    Engine *e = engine_new(m, false, bits);
    Score *scores = allocate(n, sizeof *scores);
    e->start(e, 1, n);
    for (int t = 0, T; t < n - 1; t += T) {
        T = n - 1 - t < piece ? n - 1 - t : piece;
        e->score(e, 0, tokens + t, tokens + t + 1, T, t, scores + t);
    }
    e->free(e);
    return scores;
}

static double mean_nll(const Score *scores, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += scores[i].nll;
    return sum / n;
}

/* Engine.score is feed() with scores: each is score() of the logits that feed() leaves after the
 * same tokens; also in more than one chunk of forward(), and after going back. */
static void test_engine_score(void) {
    enum { N = 600, CONTEXT = 580, CHOICE = 11 };
    uint64_t seed = 43;
    test_begin("Engine.score: as feed() token by token, also after going back");
    Model *m = random_model(shape_of(64, 128, 2, 4, 2, 16, 150, 8), 44);
    int *tokens = random_tokens(N + 1, 150, &seed), *other = random_tokens(N + 1, 150, &seed);
    for (int bits = 16; bits >= 8; bits /= 2) {
        Engine *e = engine_new(m, false, bits);
        Score all[N], again[N - CONTEXT];
        e->start(e, 1, N);
        e->score(e, 0, tokens, tokens + 1, N, 0, all);
        // another way on from CONTEXT, and back to the first
        e->score(e, 0, other, other + 1, N - CONTEXT, CONTEXT, again);
        e->score(e, 0, tokens + CONTEXT, tokens + CONTEXT + 1, CHOICE, CONTEXT, again);
        for (int i = 0; i < CHOICE; i++)
            check(fabs(again[i].nll - all[CONTEXT + i].nll) < 1e-4, "%d bits, %d: %g not %g", bits,
                  i, again[i].nll, all[CONTEXT + i].nll);
        for (int i = 0; i < N; i += i < 500 ? 37 : 1) {
            e->feed(e, 0, tokens, i + 1, 0);
            Score want = score(e->logits(e), 150, tokens[i + 1]);
            check(fabs(all[i].nll - want.nll) < 1e-4 && all[i].likeliest == want.likeliest,
                  "%d bits, token %d: %g not %g", bits, i, all[i].nll, want.nll);
        }
        e->free(e);
    }
    free(tokens);
    free(other);
    model_free(m);
}

static void test_cache_engine(void) {
    enum { N = 300 };
    uint64_t seed = 41;
    Model *m = random_model(shape_of(128, 256, 2, 4, 2, 32, 150, 8), 42);
    make_quantized(m, true);
    int *tokens = random_tokens(N, 150, &seed), before = max_threads();
    for (int bits = 16; bits >= 8; bits /= 2) {
        char name[100];
        snprintf(name, sizeof name, "KV cache in %d bits: threads and pieces change nothing", bits);
        test_begin(name);
        set_threads(1);
        Score *want = cache_scores(m, bits, tokens, N, N);
        for (int threads = 2; threads <= 3; threads++) {
            set_threads(threads);
            Score *got = cache_scores(m, bits, tokens, N, N);
            for (int i = 0; i < N - 1; i++)
                if (!check(got[i].nll == want[i].nll, "%d threads, token %d", threads, i)) break;
            free(got);
        }
        // Attention of one token sums in another order: what is rounded after it may differ.
        static const int pieces[] = {1, 7, 100, 129};
        for (int p = 0; p < 4; p++) {
            Score *got = cache_scores(m, bits, tokens, N, pieces[p]);
            double off = fabs(mean_nll(got, N - 1) - mean_nll(want, N - 1));
            check(off < 1e-3, "pieces of %d: off by %g", pieces[p], off);
            free(got);
        }
        set_threads(before);
        free(want);

        snprintf(name, sizeof name, "KV cache in %d bits: the same bytes in any chunks", bits);
        test_begin(name);
        static const int chunks[][3] = {{128, 128, 128}, {1, 1, 1}, {100, 28, 1}};
        uint8_t *first = NULL;
        for (int i = 0; i < 3; i++) {
            State *s = state_new(&m->config, N, 128, bits);
            for (int t = 0, k = 0, n; t < N; t += n) {
                n = chunks[i][k++ % 3];
                if (n > N - t) n = N - t;
                forward(m, s, tokens + t, n, t);
            }
            size_t bytes = 2 * 2 * N * kv_row_bytes(&m->config, bits); // of the first layer
            if (first) check(!memcmp(first, s->cache, bytes), "chunks of %d", chunks[i][0]);
            else first = memcpy(allocate(bytes, 1), s->cache, bytes);
            state_free(s);
        }
        free(first);
    }
    free(tokens);
    model_free(m);
}

/* ---- the embedded model and its siblings --------------------------------------------------- */

typedef struct {
    Checkpoint *checkpoint;
    Model *model;
} Loaded;

static Loaded load(const char *path) {
    Checkpoint *c = checkpoint_open(path);
    return (Loaded){c, model_load(c)};
}

static void unload(Loaded x) {
    model_free(x.model);
    checkpoint_close(x.checkpoint);
}

/* BOS and the ids of data/eval.txt. */
static int *eval_tokens(const Loaded *x, int *n) {
    size_t bytes;
    char *text = read_text("data/eval.txt", &bytes);
    const Checkpoint *c = x->checkpoint;
    Tokenizer *t = tokenizer_load("tokenizer.json", c->tokenizer, c->tokenizer_bytes);
    int *ids = tokenizer_encode(t, text, bytes, true, n);
    int *tokens = allocate(*n + 1, sizeof *tokens);
    tokens[0] = x->model->config.bos;
    memcpy(tokens + 1, ids, *n * sizeof *ids);
    ++*n;
    free(ids);
    free(text);
    tokenizer_free(t);
    return tokens;
}

static double eval_perplexity(const char *path, int *windows) {
    Loaded x = load(path);
    int n;
    int *tokens = eval_tokens(&x, &n);
    double ppl = model_perplexity(x.model, tokens, n, 2048, 0, windows, NULL);
    free(tokens);
    unload(x);
    return ppl;
}

/* Under AddressSanitizer the longest tests would take many minutes. */
static bool too_slow(void) {
#ifdef __SANITIZE_ADDRESS__
    test_skip("too slow under AddressSanitizer");
    return true;
#else
    return false;
#endif
}

static void test_perplexity(void) {
    test_begin("perplexity of data/tiny on data/eval.txt is 30.3747");
    if (too_slow()) return;
    int windows;
    double ppl = eval_perplexity("data/tiny", &windows);
    check(windows == 37, "%d windows, expected 37", windows);
    check(fabs(ppl - 30.3747) <= 0.003, "%.5f", ppl);
}

/* The numbers of an array of an oracle.json, *n of them. */
static double *numbers(const Json *j, const char *key, int *n) {
    int list = json_get(j, 0, key);
    *n = 0;
    for (int i = json_first(j, list); i >= 0; i = json_next(j, list, i)) ++*n;
    double *out = allocate(*n, sizeof *out);
    int k = 0;
    for (int i = json_first(j, list); i >= 0; i = json_next(j, list, i))
        if (!json_number(j, i, &out[k++])) die("%s: not a number", key);
    return out;
}

static void check_oracle(const char *model, const char *oracle) {
    size_t bytes;
    char *text = read_text(oracle, &bytes);
    Json *j = json_parse(oracle, text, bytes);
    int T, n_last, n_argmax, n_greedy;
    double *prompt = numbers(j, "prompt_ids", &T), *last = numbers(j, "last_logits", &n_last);
    double *best = numbers(j, "argmax", &n_argmax), *greedy = numbers(j, "greedy_ids", &n_greedy);
    Loaded x = load(model);
    int vocab = x.model->config.vocab_size;
    State *s = state_new(&x.model->config, n_greedy, T, 16);
    int *tokens = allocate(n_greedy, sizeof *tokens);
    if (check(n_last == vocab && n_argmax == T && n_greedy == T + 100, "%s: other sizes", oracle)) {
        for (int t = 0; t < T; t++) tokens[t] = prompt[t];
        forward(x.model, s, tokens, T, 0);
        const float *y = logits(x.model, s, 0, T);
        for (int t = 0; t < T; t++)
            check(argmax(y + (size_t)t * vocab, vocab) == best[t], "other argmax at %d", t);
        double off = 0;
        for (int i = 0; i < vocab; i++) {
            double d = fabs(y[(size_t)(T - 1) * vocab + i] - last[i]);
            off = d <= off ? off : d;
        }
        check(off <= 1e-3, "logits are off by %g", off);
        for (int t = T; t < n_greedy; t++) {
            y = logits(x.model, s, t == T ? T - 1 : 0, 1);
            tokens[t] = argmax(y, vocab);
            if (!check(tokens[t] == greedy[t], "greedy token %d is %d, expected %g", t, tokens[t],
                       greedy[t]))
                break;
            forward(x.model, s, tokens + t, 1, t);
        }
    }
    double *lists[] = {prompt, last, best, greedy};
    for (int i = 0; i < 4; i++) free(lists[i]);
    free(tokens);
    free(text);
    json_free(j);
    state_free(s);
    unload(x);
}

static void test_oracle(void) {
    test_begin("logits and 100 greedy tokens of Hugging Face transformers: tiny");
    check_oracle("data/tiny", "test/data/tiny_oracle.json");

    test_begin("logits and 100 greedy tokens of Hugging Face transformers: small");
    if (exists("../shared/models/small/config.json"))
        check_oracle("../shared/models/small", "test/data/small_oracle.json");
    else test_skip("../shared/models/small is not there");
}

static void test_chunks(const Loaded *x, const int *tokens) {
    static const int chunks[][6] = {{150, 150, 150, 150, 150, 150},
                                    {1, 1, 1, 1, 1, 1},
                                    {7, 1, 64, 3, 33, 2},
                                    {32, 32, 32, 32, 32, 22},
                                    {149, 1, 1, 1, 1, 1}};
    enum { T = 150 };
    test_begin("data/tiny: token by token, in odd chunks and whole give the same logits");
    size_t n = (size_t)T * x->model->config.vocab_size;
    float *whole = allocate(n, sizeof *whole), *got = allocate(n, sizeof *got);
    const Config *c = &x->model->config;
    State *s = state_new(c, T, T, 16);
    size_t cache = (size_t)c->n_layers * T * c->n_kv_heads * c->head_dim;
    chunked_logits(x->model, s, tokens, T, 0, chunks[0], 6, whole);
    for (int i = 1; i < 5; i++) {
        // NaN: what this run has not written must not be read
        memset(s->cache, 0xff, 2 * cache * sizeof(float));
        chunked_logits(x->model, s, tokens, T, 0, chunks[i], 6, got);
        double off = max_difference(got, whole, n);
        check(off <= 1e-4, "chunks %d, %d, ..: off by %g", chunks[i][0], chunks[i][1], off);
    }

    test_begin("data/tiny: positions can be run again");
    forward(x->model, s, tokens + 50, 20, 50); // over the old ones
    const float *again = logits(x->model, s, 0, 20);
    double off = max_difference(again, whole + (size_t)50 * x->model->config.vocab_size,
                                (size_t)20 * x->model->config.vocab_size);
    check(off <= 1e-4, "off by %g", off);
    state_free(s);

    test_begin("data/tiny: logits of a naive LLaMA in double");
    float *naive = naive_logits(x->model, tokens, 24, 0);
    off = max_difference(naive, whole, (size_t)24 * x->model->config.vocab_size);
    check(off <= 1e-4, "off by %g", off);
    free(naive);

    test_begin("data/tiny at position 8270: logits of a naive LLaMA in double");
    const int one_call[] = {24};
    naive = naive_logits(x->model, tokens, 24, 8270);
    s = state_new(&x->model->config, 8300, 24, 16);
    chunked_logits(x->model, s, tokens, 24, 8270, one_call, 1, got);
    off = max_difference(naive, got, (size_t)24 * x->model->config.vocab_size);
    check(off <= 1e-4, "off by %g", off);
    state_free(s);
    free(naive);
    free(whole);
    free(got);
}

static void test_long_context(const Loaded *x, const int *tokens) {
    test_begin("data/tiny with 8280 tokens before: token by token equals one chunk");
    if (too_slow()) return;
    enum { BEFORE = 8280, T = 20, CHUNK = 600 };
    static const int whole[] = {T}, single[] = {1};
    size_t n = (size_t)T * x->model->config.vocab_size;
    float *want = allocate(n, sizeof *want), *got = allocate(n, sizeof *got);
    State *s = state_new(&x->model->config, BEFORE + T, CHUNK, 16);
    for (int t = 0; t < BEFORE; t += CHUNK)
        forward(x->model, s, tokens + t, BEFORE - t < CHUNK ? BEFORE - t : CHUNK, t);
    chunked_logits(x->model, s, tokens + BEFORE, T, BEFORE, whole, 1, want);
    chunked_logits(x->model, s, tokens + BEFORE, T, BEFORE, single, 1, got);
    double off = max_difference(got, want, n);
    check(off <= 1e-4, "off by %g", off);
    state_free(s);
    free(want);
    free(got);
}

void test_forward(void) {
    test_f16();
    test_quantize_row();
    test_pack();
    test_accumulators();
    test_quantized_linear();
    test_bytes();
    test_textbook_linear();
    test_float_linear();
    test_rmsnorm();
    test_rope_angles();
    test_random_models();
    test_perplexity_function();
    test_layer_parts();
    test_forward_refuses();
    test_threads();
    test_quantized_forward();
    test_cache();
    test_textbook_attention();
    test_textbook_model();
    test_engine_score();
    test_cache_engine();
    test_oracle();

    Loaded tiny = load("data/tiny");
    int n;
    int *tokens = eval_tokens(&tiny, &n);
    test_chunks(&tiny, tokens);
    test_long_context(&tiny, tokens);
    test_begin("the number of threads changes no bit: data/tiny");
    check_threads(tiny.model, 100);

    test_begin("data/tiny: perplexity with a KV cache in 8 bits is that in 16");
    enum { N = 700 };
    double nll[2];
    for (int i = 0; i < 2; i++) {
        Score *scores = cache_scores(tiny.model, 16 >> i, tokens, N, N);
        nll[i] = mean_nll(scores, N - 1);
        free(scores);
    }
    check(fabs(nll[1] - nll[0]) < 3e-3, "%f, %f", nll[0], nll[1]);
    free(tokens);
    unload(tiny);

    test_perplexity();
}

/* What takes more than a minute; the models are not part of the repository. */
void test_slow(void) {
    int windows;
    test_begin("perplexity of small on data/eval.txt is 28.4317");
    if (exists("../shared/models/small/config.json")) {
        double ppl = eval_perplexity("../shared/models/small", &windows);
        check(windows == 37 && fabs(ppl - 28.4317) <= 0.003, "%.5f in %d windows", ppl, windows);
    } else {
        test_skip("../shared/models/small is not there");
    }

    test_begin("perplexity of tiny-outliers equals that of tiny");
    if (exists("../shared/models/tiny-outliers/config.json")) {
        double ppl = eval_perplexity("../shared/models/tiny-outliers", &windows);
        double tiny = eval_perplexity("data/tiny", &windows);
        check(fabs(ppl - tiny) <= 1e-4, "%.6f, tiny %.6f", ppl, tiny);
    } else {
        test_skip("../shared/models/tiny-outliers is not there");
    }
}
