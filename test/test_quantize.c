/* Rotation, smoothing, the choice of scales and GPTQ against their definitions, computed naively in
 * double; then the program ./quantize as a user meets it. test_quantize_slow() measures quality. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

// In variant.c, whose header has other functions by names that are used here.
Layer layer_float_copy(const Config *c, const Layer *layer, int index);
Inverse hessian_inverse(const double *H, int K, bool act_order);
void inverse_free(Inverse *inverse);

#define SCRATCH "build/test/quantize"
#define OUT SCRATCH "/out/model.bin" // alone in its directory

/* test_begin() with a name made of parts, which stays until the next one is made. */
static void begin(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void begin(const char *format, ...) {
    static char names[2][160];
    static int i;
    va_list args;
    va_start(args, format);
    vsnprintf(names[i ^= 1], sizeof names[i], format, args);
    va_end(args);
    test_begin(names[i]);
}

/* ---- numbers ------------------------------------------------------------------------------- */

/* About normal, variance 1. */
static float normal(uint64_t *seed) {
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += random_float(seed);
    return sum / sqrtf(2);
}

static float *normals(size_t n, uint64_t *seed) {
    float *x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = normal(seed);
    return x;
}

static float max_of(const float *w, int n) {
    float max = 0;
    for (int k = 0; k < n; k++) max = fmaxf(max, fabsf(w[k]));
    return max;
}

static float *copy_floats(const float *x, size_t n) {
    return memcpy(allocate(n, sizeof *x), x, n * sizeof *x);
}

/* x [T][K] whose channels depend on each other and differ in size. */
static float *correlated_inputs(int T, int K, uint64_t *seed) {
    float *x = allocate((size_t)T * K, sizeof *x);
    for (int t = 0; t < T; t++) {
        float common = normal(seed), last = 0;
        for (int k = 0; k < K; k++) {
            last = 0.8f * last + normal(seed);
            x[t * K + k] = (last + common) * (1 + k % 7) / 4;
        }
    }
    return x;
}

/* X^T Y in double, [N][K] of x [T][N], y [T][K]. */
static double *moments(const float *x, int N, const float *y, int K, int T) {
    double *M = allocate((size_t)N * K, sizeof *M);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K; k++) M[n * K + k] += (double)x[t * N + n] * y[t * K + k];
    return M;
}

/* A^-1 [n][n] by Gauss and Jordan, with pivots. */
static double *inverse_of(const double *A, int n) {
    double *a = allocate((size_t)n * n, sizeof *a), *b = allocate((size_t)n * n, sizeof *b);
    memcpy(a, A, sizeof *a * n * n);
    for (int i = 0; i < n; i++) b[i * n + i] = 1;
    for (int c = 0; c < n; c++) {
        int pivot = c;
        for (int i = c; i < n; i++)
            if (fabs(a[i * n + c]) > fabs(a[pivot * n + c])) pivot = i;
        for (int j = 0; j < n; j++) {
            double from_a = a[pivot * n + j], from_b = b[pivot * n + j];
            a[pivot * n + j] = a[c * n + j], b[pivot * n + j] = b[c * n + j];
            a[c * n + j] = from_a, b[c * n + j] = from_b;
        }
        double scale = 1 / a[c * n + c];
        for (int j = 0; j < n; j++) a[c * n + j] *= scale, b[c * n + j] *= scale;
        for (int i = 0; i < n; i++) {
            double f = a[i * n + c];
            if (i == c || f == 0) continue;
            for (int j = 0; j < n; j++)
                a[i * n + j] -= f * a[c * n + j], b[i * n + j] -= f * b[c * n + j];
        }
    }
    free(a);
    return b;
}

/* H with dead columns fixed and damping added, as GPTQ asks. */
static double *damped(const double *H, int K) {
    double mean = 0, *D = allocate((size_t)K * K, sizeof *D);
    for (int k = 0; k < K; k++) mean += H[k * K + k] / K;
    memcpy(D, H, sizeof *D * K * K);
    for (int k = 0; k < K; k++) {
        if (H[k * K + k] == 0) D[k * K + k] = mean > 0 ? mean : 1;
        D[k * K + k] += 0.01 * mean;
    }
    return D;
}

/* tr(E H E^T), E = a - b [N][K]. */
static double output_error(const float *a, const float *b, const double *H, int N, int K) {
    double sum = 0;
    for (int n = 0; n < N; n++)
        for (int i = 0; i < K; i++) {
            double ei = (double)a[n * K + i] - (b ? b[n * K + i] : 0), row = 0;
            for (int j = 0; j < K; j++)
                row += H[i * K + j] * ((double)a[n * K + j] - (b ? b[n * K + j] : 0));
            sum += ei * row;
        }
    return sum;
}

static int code_of(const Linear *l, size_t n, size_t k) {
    return (l->qweight[n * (l->K / 2) + k / 2] >> (k % 2 * 4) & 15) - 8;
}

static int group_of(const Linear *l, size_t n, size_t k) {
    return l->s_group ? l->s_group[n * (l->K / 128) + k / 128] : 1;
}

/* The weights of a quantized linear, from its tensors by hand. */
static float *rebuild(const Linear *l) {
    float *w = allocate((size_t)l->N * l->K, sizeof *w);
    for (int n = 0; n < l->N; n++)
        for (int k = 0; k < l->K; k++)
            w[(size_t)n * l->K + k] =
                (float)(code_of(l, n, k) * group_of(l, n, k)) * l->s_channel[n];
    return w;
}

/* Codes, s_group and w8 in their ranges, scales finite and above 0. */
static bool valid(const Linear *l, const char *name) {
    bool ok = true;
    for (int n = 0; n < l->N && ok; n++) {
        ok = check(isfinite(l->s_channel[n]) && l->s_channel[n] > 0, "%s, row %d: s_channel is %g",
                   name, n, l->s_channel[n]);
        for (int k = 0; k < l->K && ok; k++) {
            int q = code_of(l, n, k), s = group_of(l, n, k);
            ok = check(s >= 1 && s <= 15 && (int8_t)(q * s) == q * s && (l->s_group || q >= -7),
                       "%s, row %d, column %d: q %d, s_group %d", name, n, k, q, s);
        }
    }
    return ok;
}

static bool same_linear(const Linear *a, const Linear *b) {
    size_t n = (size_t)a->N * a->K;
    return a->N == b->N && a->K == b->K && !a->s_group == !b->s_group &&
           !memcmp(a->qweight, b->qweight, n / 2) &&
           !memcmp(a->s_channel, b->s_channel, a->N * sizeof(float)) &&
           (!a->s_group || !memcmp(a->s_group, b->s_group, n / 128));
}

/* ---- the operations on the CPU, by themselves ---------------------------------------------- */

static const Operations *const cpu = &cpu_operations;

static Linear round_to_nearest(const float *w, const float *importance, int N, int K,
                               int group_size) {
    Linear l = quantized_new(N, K, group_size);
    cpu->round_to_nearest(NULL, w, importance, &l);
    return l;
}

static Linear gptq(const float *w, int N, const Inverse *inverse, const float *importance,
                   int group_size) {
    Linear l = quantized_new(N, inverse->K, group_size);
    cpu->gptq(NULL, w, inverse, importance, &l);
    return l;
}

static double relative_error(const float *w, const Linear *l, const double *H) {
    return cpu->relative_error(NULL, w, l, (const Sums *)H);
}

static void scale_inputs(float *w, int N, int K, const float *s) {
    cpu->scale(NULL, N, K, s, NULL, w);
}

/* Of w [n], on a CPU that is started for this group size. */
static float search(const Linear *w, int n, const float *x, int T, const float *max, int group_size,
                    float *s) {
    const Workload work = {.group_size = group_size};
    Machine *m = cpu->start(&work);
    size_t N = 0;
    for (int i = 0; i < n; i++) N += w[i].N;
    float *y = allocate(T * N, sizeof *y);
    float t = search_smoothing(cpu, m, w, n, x, T, max, y, s);
    free(y);
    cpu->stop(m);
    return t;
}

/* ---- models -------------------------------------------------------------------------------- */

typedef struct {
    Checkpoint *c;
    Model *m;
} Opened;

static Opened open_model(const char *path) {
    Checkpoint *c = checkpoint_open(path);
    return (Opened){c, model_load(c)};
}

static void close_model(Opened o) {
    model_free(o.m);
    checkpoint_close(o.c);
}

/* A model whose weights are all F32 copies, to be changed. */
static Model *float_model(const Model *m) {
    Model *copy = allocate(1, sizeof *copy);
    *copy = *m;
    copy->layers = allocate(m->config.n_layers, sizeof *copy->layers);
    for (int l = 0; l < m->config.n_layers; l++)
        copy->layers[l] = layer_float_copy(&m->config, &m->layers[l], l);
    copy->embedding = float_copy(&m->embedding, "embedding");
    copy->lm_head = float_copy(&m->lm_head, "lm_head");
    copy->config.tied = false;
    copy->norm = copy_floats(m->norm, m->config.dim);
    return copy;
}

static double perplexity_on(const Opened *o, const Model *m, const char *text, int length,
                            int max_windows) {
    int n, windows, *tokens = text_tokens(o->c, m->config.bos, text, &n);
    double ppl = model_perplexity(m, tokens, n, length, max_windows, &windows, NULL);
    free(tokens);
    return ppl;
}

static double perplexity_of(const char *path, const char *text, int length, int max_windows) {
    Opened o = open_model(path);
    double ppl = perplexity_on(&o, o.m, text, length, max_windows);
    close_model(o);
    return ppl;
}

static float *weights_of(Linear *l) {
    return l->w;
}

static void rotate_model(Model *m, uint64_t seed) {
    int8_t *signs = allocate(m->config.dim, 1);
    random_signs(seed, m->config.dim, signs);
    for (int l = 0; l < m->config.n_layers; l++)
        rotate_layer(cpu, NULL, &m->config, signs, &m->layers[l]);
    rotate_ends(&m->embedding, &m->lm_head, m->norm, signs, NULL);
    free(signs);
}

/* Smooths every layer by made-up scales: a third of the channels, up to 33. */
static void smooth_model(Model *m, uint64_t seed) {
    int dim = m->config.dim, hidden = m->config.hidden_dim;
    float *s = allocate(2 * dim + hidden, sizeof *s);
    for (int l = 0; l < m->config.n_layers; l++) {
        for (int i = 0; i < 2 * dim + hidden; i++)
            s[i] = i % 3 ? 1 : 1 + 32 * fabsf(random_float(&seed));
        smooth_layer(cpu, NULL, (float *[]){s, s + dim, s + 2 * dim}, &m->layers[l]);
    }
    free(s);
}

static void round_to_f16(Linear *l) {
    for (size_t i = 0; i < (size_t)l->N * l->K; i++) {
        uint16_t half = float_to_f16(weights_of(l)[i]);
        floats(&half, F16, 0, 1, weights_of(l) + i);
    }
}

/* Rotation and smoothing leave the float model's output alone (max_windows 0: on the whole text),
 * F16 ends nearly. */
static void check_function_preserved(const char *path, const char *text, int length,
                                     int max_windows) {
    Opened o = open_model(path);
    double before = perplexity_on(&o, o.m, text, length, max_windows);
    Model *m = float_model(o.m);
    rotate_model(m, 3);
    double rotated = perplexity_on(&o, m, text, length, max_windows);
    check(fabs(rotated - before) < 1e-3, "%s, rotated: perplexity %.5f became %.5f", path, before,
          rotated);
    smooth_model(m, 4);
    double both = perplexity_on(&o, m, text, length, max_windows);
    check(fabs(both - before) < 1e-3, "%s, rotated and smoothed: perplexity %.5f became %.5f", path,
          before, both);
    round_to_f16(&m->embedding);
    round_to_f16(&m->lm_head);
    double half = perplexity_on(&o, m, text, length, max_windows);
    printf("     %s: perplexity %.5f, rotated %+.5f, smoothed too %+.5f, ends in F16 %+.5f\n", path,
           before, rotated - before, both - rotated, half - both);
    check(fabs(half - both) < 0.02, "%s, ends in F16: perplexity %.5f became %.5f", path, both,
          half);
    model_free(m);

    m = float_model(o.m);
    smooth_model(m, 5);
    double smoothed = perplexity_on(&o, m, text, length, max_windows);
    check(fabs(smoothed - before) < 1e-3, "%s, smoothed: perplexity %.5f became %.5f", path, before,
          smoothed);
    model_free(m);
    close_model(o);
}

/* A small layer of random weights: dim 16, 4 query heads and 2 KV heads of 4, hidden_dim 24. */
static const Config small = {
    .dim = 16, .hidden_dim = 24, .n_heads = 4, .n_kv_heads = 2, .head_dim = 4};

static Layer random_layer(uint64_t *seed) {
    Layer layer;
    float *norms = normals(2 * small.dim, seed);
    layer.attention_norm = norms;
    layer.ffn_norm = norms + small.dim;
    for (int k = 0; k < N_LINEARS; k++) {
        int N, K;
        linear_shape(&small, k, &N, &K);
        layer.linears[k] = (Linear){.N = N, .K = K, .w = normals((size_t)N * K, seed)};
    }
    return layer;
}

/* ---- rotation ------------------------------------------------------------------------------ */

/* R_ij of diag(signs) H_n / sqrt(n), by Sylvester's rule: H_ij = (-1)^(bits that i and j share);
 * odd factors of n by Hartley's matrix. */
static double hadamard_element(int n, const int8_t *signs, int i, int j) {
    int m = n;
    while (m % 2 == 0) m /= 2;
    double angle = 2 * M_PI * (i % m) * (j % m) / m;
    double h = (__builtin_popcount(i / m & j / m) % 2 ? -1 : 1) * (cos(angle) + sin(angle));
    return (signs ? signs[i] : 1) * h / sqrt(n);
}

/* w R, R block-diagonal of blocks of n, in double. */
static double *times_rotation(const double *w, int N, int K, int n, const int8_t *signs) {
    double *y = allocate((size_t)N * K, sizeof *y);
    for (int r = 0; r < N; r++)
        for (int k = 0; k < K; k++)
            for (int i = 0; i < n; i++)
                y[r * K + k] += w[r * K + k / n * n + i] * hadamard_element(n, signs, i, k % n);
    return y;
}

static double *transposed(const double *w, int N, int K) {
    double *y = allocate((size_t)N * K, sizeof *y);
    for (int r = 0; r < N; r++)
        for (int k = 0; k < K; k++) y[k * N + r] = w[r * K + k];
    return y;
}

/* R^T w = (w^T R)^T. */
static double *rotation_times(const double *w, int N, int K, int n, const int8_t *signs) {
    double *t = transposed(w, N, K), *y = times_rotation(t, K, N, n, signs);
    free(t);
    t = transposed(y, K, N);
    free(y);
    return t;
}

/* w diag(s), s NULL for ones. */
static double *doubles(const float *w, int N, int K, const float *s) {
    double *y = allocate((size_t)N * K, sizeof *y);
    for (int i = 0; i < N * K; i++) y[i] = (double)w[i] * (s ? s[i % K] : 1);
    return y;
}

/* Frees `want`. */
static void check_near(const char *name, const float *got, double *want, int n, double tolerance) {
    for (int i = 0; i < n; i++)
        if (!check(fabs(got[i] - want[i]) <= tolerance, "%s[%d] is %.9g, expected %.9g", name, i,
                   got[i], want[i]))
            break;
    free(want);
}

static void test_hadamard(void) {
    test_begin("hadamard: the explicit matrix, orthogonal, its own inverse");
    uint64_t seed = 1;
    const int sizes[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 3, 9, 12, 96, 144, 225};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int n = sizes[s];
        double x[256], y[256], before = 0, after = 0;
        for (int i = 0; i < n; i++) {
            x[i] = y[i] = normal(&seed);
            before += x[i] * x[i];
        }
        hadamard(y, n);
        for (int j = 0; j < n; j++) {
            double want = 0;
            for (int i = 0; i < n; i++) want += x[i] * hadamard_element(n, NULL, i, j);
            check(fabs(y[j] - want) < 1e-12, "n %d: y[%d] is %g, expected %g", n, j, y[j], want);
            after += y[j] * y[j];
        }
        check(fabs(after - before) < 1e-12 * before, "n %d: not orthogonal", n);
        hadamard(y, n);
        for (int i = 0; i < n; i++)
            check(fabs(y[i] - x[i]) < 1e-13, "n %d: twice is not the identity", n);
    }

    test_begin("random_signs: splitmix64's, of both kinds, another seed gives others");
    int8_t signs[4096], others[4096];
    random_signs(0, 4096, signs); // first outputs: e220.., 6e78.., 06c4.., f88b.., 1b39..
    const int8_t first[] = {-1, 1, 1, -1, 1};
    check(!memcmp(signs, first, 5), "signs of seed 0 are %d %d %d %d %d", signs[0], signs[1],
          signs[2], signs[3], signs[4]);
    random_signs(1, 4096, others);
    int sum = 0, product = 0;
    for (int i = 0; i < 4096; i++) {
        check(abs(signs[i]) == 1 && abs(others[i]) == 1, "no sign");
        sum += signs[i];
        product += signs[i] * others[i];
    }
    check(abs(sum) < 256 && abs(product) < 256, "sums %d, %d", sum, product);
}

static void test_rotate_matrices(void) {
    test_begin("rotate_inputs, rotate_outputs: dense products in double");
    uint64_t seed = 2;
    int8_t signs[48];
    const int sizes[] = {2, 4, 8, 16, 32, 3, 6, 48};
    for (int i = 0; i < 8; i++)
        for (int with_signs = 0; with_signs < 2; with_signs++) {
            int n = sizes[i], N = 192, K = 96;
            const int8_t *s = with_signs ? signs : NULL;
            random_signs(n, n, signs);
            float *w = normals(N * K, &seed), *inputs = copy_floats(w, N * K);
            double *exact = doubles(w, N, K, NULL);
            cpu->rotate(NULL, N, K, n, false, s, inputs);
            check_near("inputs", inputs, times_rotation(exact, N, K, n, s), N * K, 2e-6);
            cpu->rotate(NULL, N, K, n, true, s, w);
            check_near("outputs", w, rotation_times(exact, N, K, n, s), N * K, 2e-6);
            free(exact);
            free(inputs);
            free(w);
        }
}

static void test_rotate_layer(void) {
    test_begin("rotate_layer, rotate_ends: W diag(norm) R, R^T W, heads, norms of 1");
    uint64_t seed = 3;
    int8_t signs[16];
    random_signs(9, 16, signs);
    Layer layer = random_layer(&seed), before = layer;
    float norms[32];
    memcpy(norms, layer.attention_norm, sizeof norms);
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *l = &before.linears[k];
        layer.linears[k].w = copy_floats(l->w, (size_t)l->N * l->K);
    }
    rotate_layer(cpu, NULL, &small, signs, &layer);
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *l = &before.linears[k];
        bool writes = k == 3 || k == 6; // to the residual stream: o, down
        double *want = doubles(l->w, l->N, l->K, writes ? NULL : k < 3 ? norms : norms + 16), *next;
        next = writes ? rotation_times(want, l->N, l->K, 16, signs)
                      : times_rotation(want, l->N, l->K, 16, signs);
        free(want);
        want = next;
        if (k == 2 || k == 3) {
            next = k == 2 ? rotation_times(want, l->N, l->K, 4, NULL)
                          : times_rotation(want, l->N, l->K, 4, NULL);
            free(want);
            want = next;
        }
        check_near(linear_names[k], layer.linears[k].w, want, l->N * l->K, 1e-5);
        free(l->w);
        free(layer.linears[k].w);
    }
    for (int i = 0; i < 32; i++) check(layer.attention_norm[i] == 1, "norm %d is not 1", i);
    free(layer.attention_norm);

    float *e = normals(40 * 16, &seed), *h = normals(40 * 16, &seed), norm[16];
    memcpy(norm, norms, sizeof norm);
    Linear embedding = {.N = 40, .K = 16, .w = copy_floats(e, 40 * 16)};
    Linear lm_head = {.N = 40, .K = 16, .w = copy_floats(h, 40 * 16)};
    rotate_ends(&embedding, &lm_head, norm, signs, NULL);
    double *exact = doubles(e, 40, 16, NULL), *scaled = doubles(h, 40, 16, norms);
    check_near("embedding", embedding.w, times_rotation(exact, 40, 16, 16, signs), 40 * 16, 1e-5);
    check_near("lm_head", lm_head.w, times_rotation(scaled, 40, 16, 16, signs), 40 * 16, 1e-5);
    for (int i = 0; i < 16; i++) check(norm[i] == 1, "the final norm is not 1");
    free(exact);
    free(scaled);
    free(embedding.w);
    free(lm_head.w);
    free(e);
    free(h);
}

/* ---- smoothing ----------------------------------------------------------------------------- */

static void test_smooth_layer(void) {
    test_begin("smoothing_scales: max(1, max|x| / t)");
    const float max[] = {0, 0.5f, 1, 3, 3.0000002f, 4.5f, 96};
    float s[24], s_all[16 + 16 + 24];
    smoothing_scales(max, 7, 3, s);
    for (int k = 0; k < 7; k++)
        check(s[k] == (max[k] / 3 > 1 ? max[k] / 3 : 1), "s[%d] is %g", k, s[k]);

    test_begin("smooth_layer: columns times s, norms and rows of up divided");
    uint64_t seed = 4;
    Layer layer = random_layer(&seed), before = layer;
    float norms[32];
    memcpy(norms, layer.attention_norm, sizeof norms);
    for (int i = 0; i < 56; i++) s_all[i] = 1 + 9 * fabsf(random_float(&seed));
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *l = &before.linears[k];
        layer.linears[k].w = copy_floats(l->w, (size_t)l->N * l->K);
    }
    smooth_layer(cpu, NULL, (float *[]){s_all, s_all + 16, s_all + 32}, &layer);
    for (int i = 0; i < 32; i++)
        check(fabs(layer.attention_norm[i] * (double)s_all[i] - norms[i]) < 1e-6, "norm %d is %g",
              i, layer.attention_norm[i]);
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *l = &before.linears[k];
        const float *by = k < 3 ? s_all : k == 3 ? NULL : k < 6 ? s_all + 16 : s_all + 32;
        double *want = doubles(l->w, l->N, l->K, by);
        for (int i = 0; i < l->N * l->K && k == 5; i++) want[i] /= s_all[32 + i / l->K];
        check_near(linear_names[k], layer.linears[k].w, want, l->N * l->K, 5e-6);
        free(l->w);
        free(layer.linears[k].w);
    }
    free(layer.attention_norm);
}

/* Squared output error of W4A8 under smoothing by s, over linears that share x [T][K]. */
static double smoothed_error(const Linear *w, int count, const float *x, int T, const float *s,
                             int group_size) {
    int K = w->K;
    float *smoothed = allocate((size_t)T * K, sizeof *smoothed);
    float *importance = allocate(K, sizeof *importance);
    for (int i = 0; i < T * K; i++) {
        smoothed[i] = x[i] / s[i % K];
        importance[i % K] += x[i] * x[i] / T / (s[i % K] * s[i % K]);
    }
    double sum = 0;
    for (int i = 0; i < count; i++) {
        int N = w[i].N;
        float *scaled = copy_floats(w[i].w, (size_t)N * K);
        scale_inputs(scaled, N, K, s);
        Linear q = round_to_nearest(scaled, importance, N, K, group_size);
        float *y = allocate((size_t)T * N, sizeof *y), *want = allocate((size_t)T * N, sizeof *y);
        linear(&q, smoothed, T, y);
        linear(&w[i], x, T, want);
        for (int j = 0; j < T * N; j++) sum += pow((double)y[j] - want[j], 2);
        linear_free(&q);
        free(scaled);
        free(y);
        free(want);
    }
    free(smoothed);
    free(importance);
    return sum;
}

static void test_search_smoothing(void) {
    enum { T = 256, K = 256, N = 96, PLANTED = 5 };
    const int planted[PLANTED] = {0, 17, 127, 128, 255};
    for (int outliers = 1; outliers >= 0; outliers--) {
        test_begin(outliers ? "search_smoothing scales exactly the planted outliers"
                            : "search_smoothing without outliers is no worse than none");
        for (int g = -1; g <= 128; g += 129) {
            uint64_t seed = 6;
            float *x = allocate(T * K, sizeof *x), *w0 = normals(N * K, &seed);
            float *w1 = normals(N * K, &seed), max[K] = {0}, s[K], none[K];
            bool is_planted[K] = {false};
            for (int i = 0; i < T * K; i++) x[i] = random_float(&seed);
            for (int p = 0; p < PLANTED && outliers; p++) {
                is_planted[planted[p]] = true;
                for (int t = 0; t < T; t++) x[t * K + planted[p]] *= 60;
                for (int n = 0; n < N; n++) w0[n * K + planted[p]] /= 16;
                for (int n = 0; n < N; n++) w1[n * K + planted[p]] /= 16;
            }
            for (int i = 0; i < T * K; i++)
                max[i % K] = fabsf(x[i]) > max[i % K] ? fabsf(x[i]) : max[i % K];
            for (int k = 0; k < K; k++) none[k] = 1;
            Linear w[2] = {{.N = N, .K = K, .dtype = F32, .w = w0},
                           {.N = N, .K = K, .dtype = F32, .w = w1}};
            float t = search(w, 2, x, T, max, g, s);
            for (int k = 0; k < K; k++) {
                check(s[k] == (max[k] > t ? max[k] / t : 1), "g %d: s[%d] is %g, t %g", g, k, s[k],
                      t);
                if (outliers)
                    check((s[k] > 1) == is_planted[k], "g %d: t %g, s[%d] = %g", g, t, k, s[k]);
            }
            double before = smoothed_error(w, 2, x, T, none, g);
            double after = smoothed_error(w, 2, x, T, s, g);
            for (float other = max_of(max, K); other > 0.1f; other *= 0.8f) {
                float s_other[K];
                smoothing_scales(max, K, other, s_other);
                double error = smoothed_error(w, 2, x, T, s_other, g);
                check(after <= error * (1 + 1e-5), "g %d: t %g has the squared error %g, %g has %g",
                      g, t, after, other, error);
            }
            check(outliers ? after < before / 4 : after <= before * (1 + 1e-6),
                  "g %d: squared error %g, smoothed %g (t %g)", g, before, after, t);
            free(x);
            free(w0);
            free(w1);
        }
    }

    test_begin("search_smoothing: inputs of zeros and of tiny size");
    float w[2 * 128] = {1, 2, 3}, x[3 * 128] = {0}, max[128] = {0}, s[128];
    Linear l = {.N = 2, .K = 128, .dtype = F32, .w = w};
    for (int tiny = 0; tiny < 2; tiny++) {
        if (tiny) x[1] = max[1] = 1e-30f;
        search(&l, 1, x, 3, max, 128, s);
        for (int k = 0; k < 128; k++) check(s[k] == 1, "s[%d] is %g", k, s[k]);
    }
}

/* quantize_layer() searches qkv's threshold on every stride-th of the tokens that are not the first
 * of their window, by their maxima. Two windows; the first token's channel 3 is a massive one. */
static void test_smoothing_sample(void) {
    test_begin("smoothing: the first token of each window is left out");
    const Method method = {.group_size = -1, .smooth = true};
    Config c = small;
    c.n_layers = 1;
    c.norm_eps = 1e-5f;
    c.rope_theta = 10000;
    for (int length = 17; length <= 1701; length += 1684) { // all other tokens; every second one
        uint64_t seed = 20;
        int D = c.dim, n = 2 * length, stride = length > 1025 ? 2 : 1, T = (n - 2) / stride;
        float *embedding = normals(n * D, &seed), max[16] = {0}, s[16], expected[16];
        float *x = allocate((size_t)n * D, sizeof *x), *sample = allocate((size_t)T * D, sizeof *x);
        int *tokens = allocate(n, sizeof *tokens);
        Layer layer = random_layer(&seed), out;
        for (int i = 0; i < n; i++) tokens[i] = i;
        for (int i = 0; i < n; i++) embedding[i * D + 3] = i % length ? 0.01f : 1000;
        for (int i = 0; i < n; i++) embedding[i * D + 5] *= 30; // worth smoothing
        rmsnorm(embedding, layer.attention_norm, n, D, c.norm_eps, x);
        for (int i = 0, row = 0; i < n; i++) {
            if (i % length == 0) continue;
            for (int k = 0; k < D; k++) max[k] = fmaxf(max[k], fabsf(x[i * D + k]));
            if (row % stride == 0 && row / stride < T)
                memcpy(sample + row / stride * D, x + i * D, D * sizeof *x);
            row++;
        }
        float t = search(layer.linears, 3, sample, T, max, -1, s);
        for (int k = 0; k < D; k++) expected[k] = layer.attention_norm[k] / s[k];
        Linear table = {.N = n, .K = D, .dtype = F32, .w = embedding};
        Quantizer *q = quantizer_new(&c, &method, cpu, &table, tokens, 2, length, 0);
        Smoothing found[N_SMOOTHED];
        Errors errors[N_LINEARS];
        quantize_layer(q, &layer, 0, &out, found, errors);
        check(found[0].t == t && t < max_of(max, D), "length %d: t %g, expected %g", length,
              found[0].t, t);
        check(!memcmp(out.attention_norm, expected, sizeof expected), "length %d: the scales",
              length);
        quantizer_free(q);
        layer_free(&out);
        for (int k = 0; k < N_LINEARS; k++) free(layer.linears[k].w);
        free(layer.attention_norm);
        free(embedding);
        free(x);
        free(sample);
        free(tokens);
    }
}

/* ---- the choice of scales ------------------------------------------------------------------ */

/* sum importance (w - q scale)^2 in double. */
static double error_under(const float *w, const float *importance, int n, double scale, int low) {
    double sum = 0;
    for (int k = 0; k < n; k++) {
        double q = fmin(7, fmax(low, rint(w[k] / scale)));
        sum += importance[k] * (w[k] - q * scale) * (w[k] - q * scale);
    }
    return sum;
}

/* Which candidate i, scale = (1 - i step) largest, the chosen scale is; -1: none. */
static int candidate_of(double scale, double largest, double step, int n) {
    for (int i = 0; i < n; i++)
        if (fabs(scale / largest - (1 - i * step)) < 1e-5) return i;
    return -1;
}

/* The searched scales of a row against all candidates. Returns the index of the chosen p. */
static int check_search(const float *w, const float *importance, int K, bool groups) {
    uint8_t s_group[16];
    float max = max_of(w, K), scale = choose_scales(w, importance, K, groups ? s_group : NULL);
    double least = INFINITY, chosen = NAN, step = groups ? 1 / 40. : 1 / 100.;
    double largest = groups ? max * 2. / 225 : max / 7.;
    int n = groups ? 24 : 80, index = candidate_of(scale, largest, step, n);
    if (!check(index >= 0, "s_channel %g is no candidate of max %g", scale, max)) return -1;
    for (int i = 0; i < n; i++) {
        double p = (1 - i * step) * largest, total = 0;
        for (int g = 0; groups && g < K / 128; g++) {
            double group_least = INFINITY, of_chosen = 0;
            for (int s = 1; s <= 15; s++) {
                double e = error_under(w + g * 128, importance + g * 128, 128, s * p, -8);
                group_least = fmin(e, group_least);
                if (s == s_group[g]) of_chosen = e;
            }
            if (i == index)
                check(of_chosen <= group_least * (1 + 1e-4), "group %d: s_group %d has %g, not %g",
                      g, s_group[g], of_chosen, group_least);
            total += group_least;
        }
        if (!groups) total = error_under(w, importance, K, p, -7);
        if (i == index) chosen = total;
        least = fmin(least, total);
    }
    check(chosen <= least * (1 + 1e-4), "p %g has the error %g, the least is %g", 1 - index * step,
          chosen, least);
    return index;
}

static void test_choose_scales(void) {
    enum { K = 512, ROWS = 24 };
    uint64_t seed = 10;
    float w[K], importance[K];
    uint8_t s_group[K / 128];

    test_begin("choose_scales, plain: max|w|/7; max|w| 2/225 and the nearest integers");
    for (int row = 0; row < ROWS; row++) {
        for (int k = 0; k < K; k++) w[k] = normal(&seed) * (1 + k / 128 * row % 13);
        float max = max_of(w, K);
        check(choose_scales(w, NULL, K, NULL) == max / 7, "per channel");
        float scale = choose_scales(w, NULL, K, s_group);
        check(fabs(scale / (max * 2. / 225) - 1) < 1e-6, "s_channel %g, max %g", scale, max);
        for (int g = 0; g < K / 128; g++) {
            double s = max_of(w + g * 128, 128) * 2. / 15 / scale;
            double want = fmin(15, fmax(1, rint(s)));
            if (fabs(s - floor(s) - 0.5) > 1e-4)
                check(s_group[g] == want, "s_group %d, expected %g", s_group[g], want);
        }
    }
    memset(w, 0, sizeof w);
    w[0] = 112.5f, w[128] = 0.01f, w[256] = 18.75f, w[384] = 26.25f; // 15; 0; ties 2.5 and 3.5
    check(choose_scales(w, NULL, K, s_group) == 1 && s_group[0] == 15 && s_group[1] == 1 &&
              s_group[2] == 2 && s_group[3] == 4,
          "s_group %d %d %d %d", s_group[0], s_group[1], s_group[2], s_group[3]);

    for (int groups = 0; groups < 2; groups++) {
        test_begin(groups ? "choose_scales, searched per group: the best of all candidates"
                          : "choose_scales, searched per channel: the best of all candidates");
        int seen[80] = {0}, different = 0;
        for (int row = 0; row < ROWS; row++) {
            for (int k = 0; k < K; k++) {
                w[k] = normal(&seed) * (1 + k / 128 * row % 13) * (k % 97 ? 1 : 1 + row % 5);
                importance[k] = row % 2 ? 1 : expf(2 * normal(&seed));
            }
            int K_used = !groups && row % 3 == 0 ? 300 : K; // a part of 128 at the end
            int index = check_search(w, importance, K_used, groups);
            if (index >= 0) different += !seen[index]++;
        }
        check(different >= 3, "only %d different ranges are chosen", different);
        // One large weight of no importance: the smallest range is the best.
        for (int k = 0; k < K; k++) {
            w[k] = random_float(&seed) * (groups ? 0.02f : 0.15f);
            importance[k] = 1;
        }
        w[5] = 1, importance[5] = 0;
        int index = check_search(w, importance, K, groups);
        check(index == (groups ? 23 : 79), "the smallest range is not tried: p number %d", index);

        // Ties: the larger p, the smaller integer.
        memset(importance, 0, sizeof importance);
        float scale = choose_scales(w, importance, K, groups ? s_group : NULL);
        check(candidate_of(scale, groups ? 2. / 225 : 1. / 7, 1e-4, 2) == 0,
              "no importance: s_channel %g", scale);
        for (int g = 0; g < K / 128 && groups; g++)
            check(s_group[g] == 1, "no importance: s_group %d", s_group[g]);
        if (!groups) continue;
        memset(w, 0, sizeof w);
        for (int k = 0; k < K; k++) importance[k] = 1;
        w[0] = 112.5f, importance[0] = 0;    // s_channel = 1
        w[128] = 6, w[256] = -8, w[384] = 9; // 6 = 6 x 1, -8 = -8 x 1, 9 = 3 x 3
        check(choose_scales(w, importance, K, s_group) == 1 && s_group[0] == 1 && s_group[1] == 1 &&
                  s_group[2] == 1 && s_group[3] == 3,
              "s_group %d %d %d %d", s_group[0], s_group[1], s_group[2], s_group[3]);
    }
}

static void test_extreme_rows(void) {
    enum { K = 256 };
    const float sizes[] = {0,      1e-45f, 4e-45f, 1e-43f, 1e-40f, 2e-38f, 1e-30f,
                           1e-20f, 1e10f,  1e18f,  1e20f,  1e30f,  1e38f,  3e38f};
    uint64_t seed = 12;
    float w[K], importance[K], w8[K];
    for (int groups = 0; groups < 2; groups++)
        for (int searched = 0; searched < 2; searched++) {
            begin("round_to_nearest: zeros, tiny and huge rows, %s, %s",
                  groups ? "per group" : "per channel", searched ? "searched" : "plain");
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
                for (int k = 0; k < K; k++) {
                    w[k] = random_float(&seed) * sizes[i];
                    importance[k] = fabsf(normal(&seed));
                }
                w[7] = sizes[i];
                Linear l =
                    round_to_nearest(w, searched ? importance : NULL, 1, K, groups ? 128 : -1);
                char name[40];
                snprintf(name, sizeof name, "weights of %g", sizes[i]);
                valid(&l, name);
                dequantize_row(&l, 0, w8);
                double error = 0, total = 0;
                for (int k = 0; k < K; k++) {
                    error += pow((double)w8[k] - w[k], 2);
                    total += pow(w[k], 2);
                }
                if (sizes[i] >= 2e-38f)
                    check(error < 0.03 * total, "%s: relative error %g", name, sqrt(error / total));
                if (sizes[i] == 0) {
                    check(l.s_channel[0] == 1, "zeros: s_channel %g", l.s_channel[0]);
                    for (int k = 0; k < K; k++)
                        check(code_of(&l, 0, k) == 0 && group_of(&l, 0, k) == 1,
                              "zeros: q %d, s_group %d", code_of(&l, 0, k), group_of(&l, 0, k));
                }
                linear_free(&l);
            }
        }

    test_begin("round_to_nearest: every code is the nearest, rows do not mix");
    for (int groups = 0; groups < 2; groups++) {
        enum { N = 33 };
        float *many = normals(N * K, &seed);
        for (int k = 0; k < K; k++) many[5 * K + k] = 0; // a row of zeros among others
        Linear l = round_to_nearest(many, groups ? importance : NULL, N, K, groups ? 128 : -1);
        valid(&l, "random");
        for (int n = 0; n < N; n++) {
            uint8_t s_group[2] = {1, 1};
            float scale =
                choose_scales(many + n * K, groups ? importance : NULL, K, groups ? s_group : NULL);
            check(l.s_channel[n] == scale, "row %d: s_channel %g, not %g", n, l.s_channel[n],
                  scale);
            for (int k = 0; k < K; k++) {
                double code = many[n * K + k] / ((double)scale * s_group[k / 128]);
                double low = groups ? -8 : -7, want = fmin(7, fmax(low, rint(code)));
                check(group_of(&l, n, k) == s_group[k / 128], "row %d: s_group", n);
                if (fabs(code - floor(code) - 0.5) > 1e-4)
                    check(code_of(&l, n, k) == want, "row %d, column %d: %d, not %g", n, k,
                          code_of(&l, n, k), want);
            }
        }
        linear_free(&l);
        free(many);
    }
}

/* ---- GPTQ ---------------------------------------------------------------------------------- */

static void test_add_moments(void) {
    test_begin("add_moments: M + a^T b of a naive double loop");
    uint64_t seed = 14;
    const int shapes[][3] = {{1, 1, 1}, {5, 3, 7}, {16, 16, 1}, {33, 70, 300}, {130, 65, 513}};
    for (int i = 0; i < 5; i++) {
        int N = shapes[i][0], K = shapes[i][1], T = shapes[i][2];
        float *a = normals((size_t)T * N, &seed), *b = normals((size_t)T * K, &seed);
        double *want = moments(a, N, b, K, T), *M = allocate((size_t)N * K, sizeof *M);
        for (int j = 0; j < N * K; j++) want[j] += M[j] = j % 11;
        add_moments(M, a, N, b, K, T);
        for (int j = 0; j < N * K; j++)
            check(fabs(M[j] - want[j]) < 1e-6 * (10 + T), "%d x %d, T %d: [%d] is %g, not %g", N, K,
                  T, j, M[j], want[j]);
        free(a);
        free(b);
        free(M);
        free(want);
    }
}

static void test_hessian_inverse(void) {
    test_begin("hessian_inverse: U^T U (H + damping) = I, by falling diagonal");
    uint64_t seed = 15;
    for (int K = 1; K <= 300; K = K * 3 + 1)
        for (int act_order = 0; act_order < 2; act_order++)
            for (int dead = 0; dead < 2; dead++) {
                int T = 2 * K;
                float *x = correlated_inputs(T, K, &seed);
                for (int i = 0; i < T * K && dead; i++)
                    if (i % K % 5 == 1) x[i] = 0;
                double *H = moments(x, K, x, K, T), *D = damped(H, K);
                Inverse inverse = hessian_inverse(H, K, act_order);
                int *order = inverse.order;
                double *P = allocate((size_t)K * K, sizeof *P); // U (H + damping)
                char *seen = allocate(K, 1);
                for (int i = 0; i < K; i++) {
                    seen[order[i]] = 1;
                    if (!act_order) check(order[i] == i, "K %d: columns are reordered", K);
                    double above = i ? H[order[i - 1] * (K + 1)] : INFINITY;
                    double here = H[order[i] * (K + 1)];
                    check(!act_order || above > here || (above == here && order[i - 1] < order[i]),
                          "K %d: column %d after %d", K, order[i], i ? order[i - 1] : -1);
                    for (int j = 0; j < i; j++)
                        check(inverse.U[i * K + j] == 0, "U is not upper triangular");
                    for (int l = i; l < K; l++)
                        for (int j = 0; j < K; j++)
                            P[i * K + j] += inverse.U[i * K + l] * D[order[l] * K + order[j]];
                }
                check(!memchr(seen, 0, K), "K %d: a column is missing", K);
                for (int i = 0; i < K; i++) // by columns of U: U^T P
                    for (int j = 0; j < K; j++) {
                        double sum = 0;
                        for (int l = 0; l <= i; l++) sum += inverse.U[l * K + i] * P[l * K + j];
                        check(fabs(sum - (i == j)) < 1e-9, "K %d: (%d, %d) is %g", K, i, j, sum);
                    }
                check(inverse.K == K, "K is %d", inverse.K);
                inverse_free(&inverse);
                free(seen);
                free(P);
                free(D);
                free(H);
                free(x);
            }
}

/* GPTQ by definition: the remaining block of H is inverted anew after each column. Codes
 * [N][K], of rows w [N][K] under the scales of `like`. */
static int8_t *naive_gptq(const float *weights, const double *H, const int *order,
                          const Linear *like) {
    int N = like->N, K = like->K;
    double *D = damped(H, K), *w = doubles(weights, N, K, NULL);
    int8_t *q = allocate((size_t)N * K, 1);
    for (int i = 0; i < K; i++) {
        int left = K - i;
        double *block = allocate((size_t)left * left, sizeof *block);
        for (int a = 0; a < left; a++)
            for (int b = 0; b < left; b++) block[a * left + b] = D[order[i + a] * K + order[i + b]];
        double *inverse = inverse_of(block, left);
        for (int n = 0; n < N; n++) {
            double scale = (double)like->s_channel[n] * group_of(like, n, order[i]);
            double w_i = w[n * K + order[i]], low = like->s_group ? -8 : -7;
            double code = fmin(7, fmax(low, rint(w_i / scale)));
            q[n * K + order[i]] = code;
            for (int b = 0; b < left; b++)
                w[n * K + order[i + b]] -= (w_i - code * scale) / inverse[0] * inverse[b];
        }
        free(inverse);
        free(block);
    }
    free(D);
    free(w);
    return q;
}

static void check_gptq(int N, int K, int T, int group_size, bool act_order, const char *what) {
    uint64_t seed = 17 + K + T;
    float *x = correlated_inputs(T, K, &seed), *w = normals((size_t)N * K, &seed);
    for (int i = 0; i < T * K; i++)
        if (i % K % 7 == 3) x[i] = 0; // dead columns
    double *H = moments(x, K, x, K, T);
    Inverse inverse = hessian_inverse(H, K, act_order);
    Linear l = gptq(w, N, &inverse, NULL, group_size);
    Linear nearest = round_to_nearest(w, NULL, N, K, group_size);
    check(!memcmp(l.s_channel, nearest.s_channel, N * sizeof(float)), "%s: s_channel", what);
    if (group_size > 0)
        check(!memcmp(l.s_group, nearest.s_group, (size_t)N * K / 128), "%s: s_group", what);
    int8_t *want = naive_gptq(w, H, inverse.order, &l);
    int wrong = 0;
    for (int n = 0; n < N; n++)
        for (int k = 0; k < K; k++) {
            wrong += code_of(&l, n, k) != want[n * K + k];
            if (k % 7 == 3)
                check(code_of(&l, n, k) == code_of(&nearest, n, k), "%s: dead column %d", what, k);
        }
    check(!wrong, "%s: %d of %d codes differ", what, wrong, N * K);
    valid(&l, what);
    linear_free(&l);
    linear_free(&nearest);
    inverse_free(&inverse);
    free(want);
    free(H);
    free(x);
    free(w);
}

static void test_gptq_definition(void) {
    test_begin("gptq: as inverting the remaining block of H anew after each column");
    for (int act_order = 0; act_order < 2; act_order++) {
        const char *order = act_order ? "act-order" : "as they stand";
        for (int K = 8; K <= 24; K += 8) check_gptq(37, K, 3 * K, -1, act_order, order);
        check_gptq(16, 2, 9, -1, act_order, "K 2");
        check_gptq(17, 24, 5, -1, act_order, "5 samples");
        check_gptq(17, 24, 1, -1, act_order, "1 sample");
        check_gptq(3, 256, 300, 128, act_order, "groups");
    }
}

static void test_gptq_diagonal(void) {
    test_begin("gptq: with a diagonal Hessian it is round-to-nearest");
    enum { N = 40, K = 256 };
    uint64_t seed = 18;
    float *w = normals(N * K, &seed), importance[K];
    double *H = allocate(K * K, sizeof *H);
    for (int k = 0; k < K; k++) H[k * (K + 1)] = importance[k] = fabsf(normal(&seed));
    H[9 * (K + 1)] = 0;
    for (int i = 0; i < 8; i++) {
        int group_size = i & 1 ? 128 : -1;
        const float *by = i & 2 ? importance : NULL;
        Inverse inverse = hessian_inverse(H, K, i & 4);
        Linear l = gptq(w, N, &inverse, by, group_size);
        Linear nearest = round_to_nearest(w, by, N, K, group_size);
        check(same_linear(&l, &nearest), "group size %d, %s, act-order %d", group_size,
              by ? "searched" : "plain", i / 4);
        linear_free(&l);
        linear_free(&nearest);
        inverse_free(&inverse);
    }
    free(H);
    free(w);
}

static void test_gptq_error(void) {
    test_begin("gptq: a smaller output error than round-to-nearest's");
    enum { N = 72, K = 256, T = 1024 };
    uint64_t seed = 19;
    float *x = correlated_inputs(T, K, &seed), *w = normals(N * K, &seed), importance[K];
    double *H = moments(x, K, x, K, T);
    for (int k = 0; k < K; k++) importance[k] = H[k * (K + 1)];
    for (int i = 0; i < 8; i++) {
        int group_size = i & 1 ? 128 : -1;
        const float *by = i & 2 ? importance : NULL;
        Inverse inverse = hessian_inverse(H, K, i & 4);
        Linear l = gptq(w, N, &inverse, by, group_size);
        Linear nearest = round_to_nearest(w, by, N, K, group_size);
        float *compensated = rebuild(&l), *rounded = rebuild(&nearest);
        double before = output_error(rounded, w, H, N, K);
        double after = output_error(compensated, w, H, N, K);
        check(after < 0.7 * before, "group size %d, %s, act-order %d: %g, nearest %g", group_size,
              by ? "searched" : "plain", i / 4, after, before);
        double total = output_error(w, NULL, H, N, K), relative = relative_error(w, &l, H);
        check(fabs(relative - sqrt(after / total)) < 1e-3 * relative,
              "relative_error %g, naively %g", relative, sqrt(after / total));
        valid(&l, "gptq");
        linear_free(&l);
        linear_free(&nearest);
        inverse_free(&inverse);
        free(compensated);
        free(rounded);
    }
    free(H);
    free(x);
    free(w);
}

static void invert_nan(void *arg) {
    double H[4] = {1, 0, 0, 1};
    H[*(int *)arg] = H[*(int *)arg ? 2 : 0] = NAN; // on the diagonal, beside it
    omp_set_num_threads(1);                        // OpenMP's threads do not survive a fork
    Inverse inverse = hessian_inverse(H, 2, true);
    inverse_free(&inverse);
}

static void test_gptq_degenerate(void) {
    test_begin("gptq: no, one and few samples, dead columns, rows of zeros");
    enum { N = 20, K = 256 };
    uint64_t seed = 20;
    float *w = normals(N * K, &seed);
    memset(w + 3 * K, 0, K * sizeof *w);
    for (int i = 0; i < 16; i++) {
        int T = (const int[]){0, 1, 2, 100}[i / 4], group_size = i & 1 ? 128 : -1;
        float *x = correlated_inputs(T ? T : 1, K, &seed), importance[K];
        for (int j = 0; j < T * K; j++) x[j] *= j % K % 3 ? 1 : 1e-12; // nearly dead
        for (int j = 0; j < T * K; j++) x[j] *= j % K % 4 != 0;
        double *H = allocate(K * K, sizeof *H);
        if (T) add_moments(H, x, K, x, K, T);
        for (int k = 0; k < K; k++) importance[k] = H[k * (K + 1)];
        Inverse inverse = hessian_inverse(H, K, i & 2);
        Linear l = gptq(w, N, &inverse, i & 2 ? importance : NULL, group_size);
        valid(&l, "degenerate");
        double error = relative_error(w, &l, H);
        check(error >= 0 && error < 0.2, "%d samples: relative error %g", T, error);
        for (int k = 0; k < K; k++)
            check(code_of(&l, 3, k) == 0, "a row of zeros has the code %d", code_of(&l, 3, k));
        linear_free(&l);
        inverse_free(&inverse);
        free(H);
        free(x);
    }
    free(w);

    test_begin("hessian_inverse: NaN ends the program");
    char message[256];
    for (int i = 0; i < 2; i++)
        check(dies(invert_nan, &i, message, sizeof message), "NaN at %d: %s", i, message);
}

static void test_compensated_importance(void) {
    test_begin("compensated_importance: with the inverse of what is left of H after each column");
    enum { K = 24 };
    uint64_t seed = 23;
    float *x = correlated_inputs(3 * K, K, &seed), importance[K];
    double *H = moments(x, K, x, K, 3 * K), *D = damped(H, K);
    for (int act_order = 0; act_order < 2; act_order++) {
        Inverse inverse = hessian_inverse(H, K, act_order);
        for (int k = 0; k < K; k++) importance[k] = H[k * (K + 1)];
        double diagonal[K];
        for (int i = 0; i < K; i++) diagonal[i] = inverse.U[i * (K + 1)];
        compensated_importance(inverse.order, diagonal, K, importance);
        for (int i = 0; i < K; i++) {
            int n = K - i, k = inverse.order[i];
            double *left = allocate((size_t)n * n, sizeof *left);
            for (int a = 0; a < n * n; a++)
                left[a] = D[inverse.order[i + a / n] * K + inverse.order[i + a % n]];
            double *dense = inverse_of(left, n), want = sqrt(H[k * (K + 1)] / dense[0]);
            check(fabs(importance[k] / want - 1) < 1e-5, "column %d: %g, not %g", k, importance[k],
                  want);
            free(left), free(dense);
        }
        inverse_free(&inverse);
    }
    free(x), free(H), free(D);
}

static void test_corrected_target(void) {
    test_begin("the corrected target: w + 1/2 (D + F W^T)^T X (H + damping)^-1 by a dense solve");
    uint64_t seed = 21;
    for (int K = 8; K <= 96; K *= 12)
        for (int i = 0; i < 4; i++) {
            enum { N = 11 };
            int T = 2 * K;
            float *x = correlated_inputs(T, K, &seed), *f = copy_floats(x, (size_t)T * K);
            float *w = normals((size_t)N * K, &seed), *d = normals((size_t)T * N, &seed);
            for (int j = 0; j < T * K; j++) f[j] = 0.3f * normal(&seed); // F - X
            for (int j = 0; j < T * N && !(i & 1); j++) d[j] = 0;
            double *H = moments(x, K, x, K, T), *C = moments(f, K, x, K, T);
            double *R = moments(d, N, x, K, T), *M = allocate((size_t)N * K, sizeof *M);
            double *again = allocate((size_t)K * K, sizeof *again);
            const Linear linear = {.N = N, .K = K, .dtype = F32, .w = w};

            // As the driver does it, with D or without.
            float *target = allocate((size_t)N * K, sizeof *target);
            Inverse inverse = hessian_inverse(H, K, i & 2);
            if (i & 1) {
                cpu->add_linear(NULL, &linear, f, T, d);
                cpu->add_moments(NULL, x, K, d, N, T, (Sums *)again, (Sums *)M);
            }
            cpu->correct(NULL, w, N, i & 1 ? NULL : (const Sums *)C, i & 1 ? (const Sums *)M : NULL,
                         &inverse, target);

            // W C + R, by definition.
            double *D = damped(H, K), *dense = inverse_of(D, K), *want = doubles(w, N, K, NULL);
            for (int n = 0; n < N; n++)
                for (int j = 0; j < K; j++) {
                    double m = R[n * K + j];
                    for (int k = 0; k < K; k++) m += (double)w[n * K + k] * C[k * K + j];
                    for (int k = 0; k < K; k++) want[n * K + k] += m * dense[j * K + k] / 2;
                }
            check_near("target", target, want, N * K, 2e-5);
            memset(M, 0, sizeof *M * N * K);
            cpu->correct(NULL, w, N, NULL, (const Sums *)M, &inverse, target);
            check(!memcmp(w, target, sizeof *w * N * K), "nothing to correct, but w changed");
            inverse_free(&inverse);
            free(D), free(dense), free(C), free(H), free(R), free(M), free(again);
            free(target), free(d), free(w), free(f), free(x);
        }
}

/* What the driver relies on: the int8 values of a row are quantized to themselves. */
static void test_rounded_activations(void) {
    test_begin("activations: the int8 values of a row quantize to the same a and s_a");
    enum { K = 64, ROWS = 20000 };
    uint64_t seed = 22;
    for (int row = 0; row < ROWS; row++) {
        float x[K];
        int8_t a[2][K];
        for (int k = 0; k < K; k++) x[k] = normal(&seed) * (1 + row);
        float s_a = quantize_row(x, K, a[0]);
        for (int k = 0; k < K; k++) x[k] = a[0][k] * s_a;
        check(quantize_row(x, K, a[1]) == s_a && !memcmp(a[0], a[1], K), "row %d", row);
    }
}

/* ---- the program --------------------------------------------------------------------------- */

/* `quantize` with these arguments succeeds; its stdout is in `output`. */
static bool quantize(const char *format, ...) __attribute__((format(printf, 1, 2)));

static bool quantize(const char *format, ...) {
    char *args;
    va_list list;
    va_start(list, format);
    if (vasprintf(&args, format, list) < 0) die("out of memory");
    va_end(list);
    int status = shell("$QUANTIZE %s -d cpu 2>" SCRATCH "/stderr.txt || "
                       "{ s=$?; cat " SCRATCH "/stderr.txt; exit $s; }",
                       args);
    bool ok = check(status == 0, "quantize %s: status %d: %s", args, status, output);
    free(args);
    return ok;
}

static bool same_files(const char *a, const char *b) {
    size_t n_a, n_b;
    char *in_a = read_file(a, &n_a), *in_b = read_file(b, &n_b);
    bool same = in_a && in_b && n_a == n_b && !memcmp(in_a, in_b, n_a);
    free(in_a);
    free(in_b);
    return same;
}

static int count_files(const char *directory) {
    DIR *d = opendir(directory);
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
    if (d) closedir(d);
    return n;
}

/* OUT holds the old text, or nothing, and no other file is beside it. */
static void check_untouched(bool old, const char *what) {
    size_t bytes;
    char *text = read_file(OUT, &bytes);
    check(old ? text && bytes == 3 && !memcmp(text, "old", 3) : !text, "%s: OUT was touched", what);
    check(count_files(SCRATCH "/out") == old, "%s: %d files are left", what,
          count_files(SCRATCH "/out"));
    free(text);
}

/* The command ends with this status, one line of error with `message` in it, and leaves OUT alone.
 * Lines of progress may stand before the error if it comes late. */
static void expect_error(const char *command, int status, const char *message, bool late) {
    count_bad_input(status == 2 ? "command lines" : "models, texts and OUT given to ./quantize");
    for (int old = 0; old < 2; old++) {
        unlink(OUT);
        if (old) write_file(OUT, "old", 3);
        int got = shell("{ %s\n} 2>&1 >/dev/null", command);
        check(got == status, "%s: status %d, expected %d: %s", command, got, status, output);
        const char *error = strstr(output, "error: ");
        const char *end = error ? strchr(error, '\n') : NULL;
        check(end && !end[1] && (late ? error == output || error[-1] == '\n' : error == output),
              "%s: expected one line that starts with \"error: \", got: %s", command, output);
        check(strstr(output, message) != NULL, "%s: expected \"%s\", got: %s", command, message,
              output);
        check_untouched(old, command);
    }
    unlink(OUT);
}

/* Quantizes to another file in SCRATCH. */
#define MADE_TO(out) "$QUANTIZE " SCRATCH "/made.bin " SCRATCH "/" out

/* A model.bin of random F32 weights with data/tiny's tokenizer. */
typedef struct {
    int dim, hidden, head_dim, heads, kv_heads, layers;
    bool tied, copied_head;      // lm_head absent, or the embedding's copy
    const char *scaled, *broken; // a tensor times `factor`; one with an element that is `value`
    float factor, value;
} Made;

static void make_model(const char *path, Made s) {
    size_t tokenizer_bytes, n = 0;
    char *tokenizer = read_file("data/tiny/tokenizer.json", &tokenizer_bytes);
    char config[1024];
    snprintf(config, sizeof config,
             "{\"model_type\": \"llama\", \"hidden_act\": \"silu\", \"hidden_size\": %d, "
             "\"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d, "
             "\"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": 4096, "
             "\"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0, "
             "\"bos_token_id\": 3840, \"tie_word_embeddings\": %s, \"unknown\": [true, {}]}",
             s.dim, s.hidden, s.layers, s.heads, s.kv_heads, s.head_dim, s.tied ? "true" : "false");
    Checkpoint c = {.config = config, .tokenizer = tokenizer, .tokenizer_bytes = tokenizer_bytes};
    Config shape = {.dim = s.dim, .hidden_dim = s.hidden, .n_heads = s.heads};
    shape.n_kv_heads = s.kv_heads, shape.head_dim = s.head_dim;
    Tensor *t = allocate(s.layers * 9 + 3, sizeof *t);
    char(*names)[80] = allocate(s.layers * 9 + 3, sizeof *names);
    for (int i = 0; i < s.layers * 9 + 3; i++) {
        int layer = i / 9, k = i % 9, N = s.dim, K = 0;
        if (i >= s.layers * 9) { // the ends
            const char *ends[] = {"model.norm", "model.embed_tokens", "lm_head"};
            snprintf(names[n], sizeof *names, "%s.weight", ends[k]);
            if (k) N = 4096, K = s.dim;
            if (k == 2 && s.tied) continue;
        } else if (k < N_LINEARS) {
            linear_shape(&shape, k, &N, &K);
            snprintf(names[n], sizeof *names, "model.layers.%d.%s.weight", layer, linear_names[k]);
        } else {
            snprintf(names[n], sizeof *names, "model.layers.%d.%s_layernorm.weight", layer,
                     k == 7 ? "input" : "post_attention");
        }
        size_t size = (size_t)N * (K ? K : 1);
        uint64_t seed = 1 + (s.copied_head && !strcmp(names[n], "lm_head.weight") ? n - 1 : n);
        float *w = normals(size, &seed);
        for (size_t j = 0; j < size; j++) {
            w[j] = K ? w[j] / sqrtf(K) : 1 + w[j] / 20;
            if (s.scaled && !strcmp(names[n], s.scaled)) w[j] *= s.factor;
        }
        if (s.broken && !strcmp(names[n], s.broken)) w[size / 2] = s.value;
        t[n] = (Tensor){names[n], F32, K ? 2 : 1, {N, K}, w, size * sizeof *w, NULL};
        n++;
    }
    write_model(path, &c, NULL, t, n);
    for (size_t i = 0; i < n; i++) free((void *)t[i].data);
    free(names);
    free(t);
    free(tokenizer);
}

static const Made made = {
    .dim = 128, .hidden = 256, .head_dim = 32, .heads = 4, .kv_heads = 2, .layers = 2};

/* SCRATCH/cut: data/tiny with its first layer only. */
static void make_cut(void) {
    size_t bytes;
    char *config = read_file("data/tiny/config.json", &bytes);
    char *layers = config ? strstr(config, "\"num_hidden_layers\": 6") : NULL;
    if (!check(layers != NULL, "data/tiny/config.json has not 6 layers")) return;
    layers[strlen("\"num_hidden_layers\": ")] = '1';
    mkdir(SCRATCH "/cut", 0777);
    write_file(SCRATCH "/cut/config.json", config, bytes);
    free(config);
    shell("for f in model.safetensors tokenizer.json; do "
          "ln -sf ../../../../data/tiny/$f " SCRATCH "/cut/$f; done");
}

static void copy_text(const char *from, size_t bytes, const char *to) {
    size_t n;
    char *text = read_file(from, &n);
    if (check(text && n >= bytes, "%s has not %zu bytes", from, bytes)) write_file(to, text, bytes);
    free(text);
}

/* The linears of a written file against the originals' round_to_nearest(); all tensors that are
 * not quantized against MODEL's. Norms by the way. */
static void check_file(const char *out, const char *model, bool rounded) {
    Opened q = open_model(out), f = open_model(model);
    for (int l = 0; l < f.m->config.n_layers; l++)
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *file = &q.m->layers[l].linears[k];
            char name[128];
            snprintf(name, sizeof name, "%s: model.layers.%d.%s", out, l, linear_names[k]);
            if (!valid(file, name)) continue;
            float *by_hand = rebuild(file), *row = allocate(file->K, sizeof *row);
            for (int n = 0; n < file->N; n++) {
                dequantize_row(file, n, row);
                check(!memcmp(row, by_hand + (size_t)n * file->K, file->K * sizeof *row),
                      "%s, row %d: dequantize_row differs", name, n);
            }
            if (rounded) {
                Linear w = float_copy(&f.m->layers[l].linears[k], name);
                Linear nearest = round_to_nearest(w.w, NULL, w.N, w.K, q.m->group_size);
                check(same_linear(file, &nearest), "%s is not round_to_nearest()'s", name);
                float *weights = rebuild(&nearest);
                check(!memcmp(weights, by_hand, sizeof *row * w.N * w.K), "%s: weights", name);
                free(weights);
                free(w.w);
                linear_free(&nearest);
            }
            free(by_hand);
            free(row);
        }
    for (int i = 0; i < f.c->n_tensors; i++) {
        const Tensor *a = &f.c->tensors[i], *b = checkpoint_find(q.c, a->name);
        bool end = !strcmp(a->name, "lm_head.weight") || strstr(a->name, "embed_tokens");
        if (!b && strstr(a->name, "model.layers.")) continue; // quantized, or not in `cut`
        if (end || (rounded && strstr(a->name, "norm")))
            check(b && a->dtype == b->dtype && a->bytes == b->bytes &&
                      !memcmp(a->data, b->data, a->bytes),
                  "%s: %s is not as it was", out, a->name);
    }
    close_model(q);
    close_model(f);
}

/* A number of the quantization record. */
static double recorded(const Json *j, const char *key) {
    double value = NAN;
    json_number(j, json_get(j, 0, key), &value);
    return value;
}

static void test_options(void) {
    test_begin("quantize: every option works, is recorded and shown");
    const struct {
        const char *flags, *method;
        int group_size, smooth, rotate, seed, mse, act_order;
    } cases[] = {
        {"-b rtn -r 0 -a 0 -m 0 -g -1", "rtn", -1, 0, 0, 0, 0, 1},
        {"-b rtn -r 0 -a 0 -m 0 -g 128", "rtn", 128, 0, 0, 0, 0, 1},
        {"-b rtn -r 0 -a 0 -m 1", "rtn", 128, 0, 0, 0, 1, 1},
        {"-b gptq -r 0 -a 0 -m 0 -o 0 -g -1", "gptq", -1, 0, 0, 0, 0, 0},
        {"-m 0", "gptq", 128, 1, 1, 0, 0, 1},
        {"-r 0 -a 1 -g -1 -b rtn -m 0", "rtn", -1, 1, 0, 0, 0, 1},
        {"-r 1 -s 7 -a 0 -g -1", "gptq", -1, 0, 1, 7, 1, 1},
        {"-r 1 -d cpu -o 0 -m 0 -s 9223372036854775807", "gptq", 128, 1, 1, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *flags = cases[i].flags;
        if (!quantize(SCRATCH "/cut " OUT " -c data/calib.txt -n 2 -l 64 %s", flags)) continue;
        check(!strstr(output, "nan") && !strstr(output, "inf"), "%s: %s", flags, output);
        Opened o = open_model(OUT);
        bool gptq = !strcmp(cases[i].method, "gptq"), rotate = cases[i].rotate;
        Json *j = json_parse(flags, o.c->quantization, strlen(o.c->quantization));
        check(recorded(j, "bits") == 4 && recorded(j, "group_size") == cases[i].group_size &&
                  json_is(j, json_get(j, 0, "method"), cases[i].method) &&
                  recorded(j, "smooth") == cases[i].smooth && recorded(j, "rotate") == rotate &&
                  recorded(j, "mse") == cases[i].mse &&
                  recorded(j, "act_order") == cases[i].act_order,
              "%s: recorded as %s", flags, o.c->quantization);
        if (i != 7) check(recorded(j, "seed") == cases[i].seed, "%s: the seed", flags);
        if (i == 7)
            check(json_is(j, json_get(j, 0, "seed"), "9223372036854775807"), "%s: the seed", flags);
        if (gptq || cases[i].smooth || cases[i].mse)
            check(recorded(j, "windows") == 2 && recorded(j, "length") == 64 &&
                      json_is(j, json_get(j, 0, "calibration"), "calib.txt"),
                  "%s: recorded as %s", flags, o.c->quantization);
        json_free(j);
        char *quantization = strdup(o.c->quantization);
        const Tensor *norm = checkpoint_find(o.c, "model.layers.0.input_layernorm.weight");
        const Tensor *last = checkpoint_find(o.c, "model.norm.weight");
        const Tensor *head = checkpoint_find(o.c, "lm_head.weight");
        const Tensor *embedding = checkpoint_find(o.c, "model.embed_tokens.weight");
        check(norm->dtype == (rotate || cases[i].smooth ? F32 : BF16) &&
                  last->dtype == (rotate ? F32 : BF16) && head->dtype == (rotate ? F16 : BF16) &&
                  embedding->dtype == (rotate ? F16 : BF16),
              "%s: dtypes of norms and ends", flags);
        for (int k = 0; k < o.c->n_tensors; k++) {
            const Tensor *t = &o.c->tensors[k];
            check(!strstr(t->name, ".qweight") || (uintptr_t)t->data % 256 == 0,
                  "%s: %s is not aligned", flags, t->name);
        }
        close_model(o);
        check_file(OUT, rotate ? OUT : SCRATCH "/cut", i < 2);
        shell("$RUN " OUT " -n 1");
        check(strstr(output, quantization) != NULL, "%s: ./run does not show %s: %s", flags,
              quantization, output);
        check(count_files(SCRATCH "/out") == 1, "%s: files are left", flags);
        free(quantization);
    }
    unlink(OUT);
}

/* Input of q, k, v (stage 0), o (1), gate and up (2), down (3) of a layer, T tokens; their residual
 * stream is in s->x. */
static float *stage_input(const Config *c, const Layer *layer, State *s, int stage, int T) {
    const float *norm = stage < 2 ? layer->attention_norm : layer->ffn_norm;
    rmsnorm(s->x, norm, T, c->dim, c->norm_eps, s->xb);
    if (stage == 1) attention_block(c, layer, s, 0, T, 0);
    if (stage == 3) ffn_block(c, layer, s, T);
    return stage == 1 ? s->att : stage == 3 ? s->gate : s->xb;
}

/* What ./quantize should do, from the parts that are tested above: qkv, o, gate and up, down one
 * after the other, each on what reaches it through those already quantized, in int8. */
static void test_pipeline(bool mse) {
    begin("quantize: each linear is calibrated on quantized inputs, towards the float model, %s",
          mse ? "ranges searched" : "max|w|");
    enum { T = 120, WINDOWS = 18, DIM = 128, ALL = T * WINDOWS };
    const int chunk = cpu->chunk_tokens / T * T; // 17 windows; one is left
    make_model(SCRATCH "/made.bin", made);
    if (!quantize(SCRATCH "/made.bin " OUT " -r 0 -a 0 -m %d -g -1 -c data/calib.txt -n %d -l %d",
                  mse, WINDOWS, T))
        return;
    Opened f = open_model(SCRATCH "/made.bin"), file = open_model(OUT);
    Config c = f.m->config;
    int n_tokens, *tokens = text_tokens(f.c, c.bos, "data/calib.txt", &n_tokens);
    float *x[2]; // residual streams of the float and the quantized model
    for (int i = 0; i < 2; i++) {
        x[i] = allocate(ALL * DIM, sizeof(float));
        for (int t = 0; t < ALL; t++)
            floats(f.m->embedding.w, F32, (size_t)tokens[t] * DIM, DIM, x[i] + t * DIM);
    }
    c.n_layers = 1;
    State *s = state_new(&c, T, T, 16);
    for (int l = 0; l < 2; l++) {
        Layer layers[2] = {f.m->layers[l], f.m->layers[l]};
        const int first[] = {0, 3, 4, 6}, count[] = {3, 1, 2, 1};
        for (int stage = 0; stage < 4; stage++) {
            int K = layers[0].linears[first[stage]].K;
            float *in[2], *distance = allocate(ALL * DIM, sizeof *distance);
            for (int i = 0; i < 2; i++) {
                in[i] = allocate((size_t)ALL * K, sizeof(float));
                for (int w = 0; w < WINDOWS; w++) {
                    memcpy(s->x, x[i] + w * T * DIM, T * DIM * sizeof(float));
                    memcpy(in[i] + w * T * K, stage_input(&c, &layers[i], s, stage, T),
                           (size_t)T * K * sizeof(float));
                }
            }
            for (int t = 0; t < ALL; t++) { // X, in int8, and F - X
                int8_t a[256];
                float s_a = quantize_row(in[1] + t * K, K, a);
                for (int k = 0; k < K; k++) {
                    in[1][t * K + k] = a[k] * s_a;
                    in[0][t * K + k] -= in[1][t * K + k];
                }
            }
            for (int i = 0; i < ALL * DIM; i++) distance[i] = x[0][i] - x[1][i];
            // GPTQ is chaotic, so the sums are made as the program makes them, chunk by chunk. Of o
            // and down M is D + (F - X) W^T, times X.
            double *H = allocate((size_t)K * K, sizeof *H), *C = allocate((size_t)K * K, sizeof *C);
            double *M = stage % 2 ? allocate((size_t)DIM * K, sizeof *M) : NULL;
            const Linear *outside = &f.m->layers[l].linears[first[stage]];
            if (M) cpu->add_linear(NULL, outside, in[0], ALL, distance);
            for (int t = 0; t < ALL; t += chunk) {
                int n = ALL - t < chunk ? ALL - t : chunk;
                add_moments(H, in[1] + t * K, K, in[1] + t * K, K, n);
                if (!M) add_moments(C, in[0] + t * K, K, in[1] + t * K, K, n);
                else add_moments(M, distance + t * DIM, DIM, in[1] + t * K, K, n);
            }
            Inverse inverse = hessian_inverse(H, K, true);
            float importance[256];
            double diagonal[256];
            for (int k = 0; k < K; k++) importance[k] = H[k * (K + 1)];
            for (int k = 0; k < K; k++) diagonal[k] = inverse.U[k * (K + 1)];
            compensated_importance(inverse.order, diagonal, K, importance);
            for (int i = first[stage]; i < first[stage] + count[stage]; i++) {
                const Linear *w = &f.m->layers[l].linears[i], *got = &file.m->layers[l].linears[i];
                float *target = allocate((size_t)w->N * K, sizeof *target);
                cpu->correct(NULL, w->w, w->N, M ? NULL : (const Sums *)C, (const Sums *)M,
                             &inverse, target);
                Linear expected = gptq(target, w->N, &inverse, mse ? importance : NULL, -1);
                int wrong = 0;
                for (int n = 0; n < w->N; n++)
                    for (int k = 0; k < K; k++)
                        wrong += code_of(got, n, k) != code_of(&expected, n, k);
                check(wrong <= w->N * K / 100, "layer %d, %s: %d of %d codes differ", l,
                      linear_names[i], wrong, w->N * K);
                layers[1].linears[i] = *got; // a code that differs must not spoil what follows
                linear_free(&expected);
                free(target);
            }
            for (int i = 0; i < 2 && stage % 2; i++) // the half is done
                for (int w = 0; w < WINDOWS; w++) {
                    float *stream = x[i] + w * T * DIM;
                    memcpy(s->x, stream, T * DIM * sizeof(float));
                    const float *input = stage_input(&c, &layers[i], s, stage, T);
                    add_linear(&layers[i].linears[first[stage]], input, T, s->xb, stream);
                }
            inverse_free(&inverse);
            free(H), free(C), free(M), free(distance), free(in[0]), free(in[1]);
        }
    }
    state_free(s);
    free(x[0]), free(x[1]), free(tokens);
    close_model(f);
    close_model(file);
    unlink(OUT);
}

static void test_quality(void) {
    test_begin("quantize: data/tiny keeps its perplexity");
    const struct {
        const char *flags;
        double bound; // of the ratio to the float model's
    } cases[] = {
        {"-b rtn -r 0 -a 0 -m 0 -g -1", 1.15},
        {"-b rtn -r 0 -a 0 -m 0 -g 128", 1.10},
        {"-r 0 -a 0 -m 0 -g 128 -n 4 -l 256", 1.10},
        {"-a 0 -m 0 -g -1 -n 4 -l 256", 1.15},
        {"-g -1 -n 4 -l 256", 1.10},
    };
    double before = perplexity_of("data/tiny", SCRATCH "/eval.txt", 256, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!quantize("data/tiny " OUT " -c data/calib.txt -n 2 -l 128 %s", cases[i].flags))
            continue;
        double after = perplexity_of(OUT, SCRATCH "/eval.txt", 256, 0);
        check(after < before * cases[i].bound, "%s: perplexity %.3f became %.3f", cases[i].flags,
              before, after);
        if (i < 2) check_file(OUT, "data/tiny", true);
        char line[64];
        snprintf(line, sizeof line, "perplexity %.4f (", after);
        if (i == 2) shell("$RUN " OUT " -e " SCRATCH "/eval.txt -l 256 2>/dev/null");
        if (i == 2) check(!strncmp(output, line, strlen(line)), "./run: %s, not %s", output, line);
    }

    test_begin("quantize: the report");
    if (quantize(SCRATCH "/cut " OUT " -c data/calib.txt -n 4 -l 256 -e " SCRATCH "/eval.txt")) {
        char line[64];
        const char *paths[] = {SCRATCH "/cut", OUT}, *when[] = {"before", "after"};
        for (int i = 0; i < 2; i++) {
            snprintf(line, sizeof line, "%s: perplexity %.4f (", when[i],
                     perplexity_of(paths[i], SCRATCH "/eval.txt", 2048, 0));
            check(strstr(output, line) != NULL, "expected \"%s\" in: %s", line, output);
        }
        struct stat info;
        check(stat(OUT, &info) == 0, "no OUT");
        snprintf(line, sizeof line, OUT ": %.1f MB, 4.163 bits", info.st_size / 1e6);
        check(strstr(output, line) != NULL, "expected \"%s\" in: %s", line, output);
        double nearest = 0, final = 0;
        int lines = 0;
        for (char *at = output; at && *at; at = strchr(at, '\n'), at = at ? at + 1 : NULL) {
            int layer;
            char name[32], channels[16], threshold[16];
            double a, b;
            if (sscanf(at, "%d %31s %15s %15s %lf %lf", &layer, name, channels, threshold, &a,
                       &b) != 6)
                continue;
            check(layer == 0 && lines < 7 && !strcmp(name, linear_names[lines % 7]), "line %d",
                  lines);
            check((channels[0] == '-') == (lines % 7 == 3), "%s: smoothed %s", name, channels);
            nearest += a, final += b, lines++;
        }
        check(lines == 7 && final < nearest && nearest < 7 * 0.2,
              "%d lines, errors %g, with compensation %g: %s", lines, nearest, final, output);
    }
    unlink(OUT);
}

/* data/tiny with outliers: channels of both norms and rows of up times 64, the columns that they
 * reach divided by 64. */
static void test_outliers(void) {
    test_begin("quantize: smoothing saves a model with planted outliers");
    const char *path = SCRATCH "/outliers.bin";
    Opened o = open_model("data/tiny");
    Model *m = float_model(o.m);
    int dim = m->config.dim, n = 0;
    Tensor *t = allocate(o.c->n_tensors, sizeof *t);
    float *s = allocate(dim, sizeof *s);
    for (int l = 0; l < m->config.n_layers; l++) {
        Layer *layer = &m->layers[l];
        for (int i = 0; i < dim; i++) s[i] = i % 61 == 7 + l ? 1.f / 64 : 1;
        for (int i = 0; i < dim; i++) layer->attention_norm[i] /= s[i], layer->ffn_norm[i] /= s[i];
        for (int k = 0; k < 6; k++)
            if (k != 3) scale_inputs(weights_of(&layer->linears[k]), layer->linears[k].N, dim, s);
        for (int i = 100 + l; i < layer->down.K; i += 300) {
            for (int j = 0; j < dim; j++) weights_of(&layer->up)[i * dim + j] *= 64;
            for (int j = 0; j < dim; j++) weights_of(&layer->down)[j * layer->down.K + i] /= 64;
        }
    }
    for (int i = 0; i < o.c->n_tensors; i++) {
        Tensor *new = &t[n++];
        *new = o.c->tensors[i];
        new->dtype = F32;
        new->bytes *= 2;
        int l, end = 0;
        new->data = strstr(new->name, "lm_head")        ? m->lm_head.w
                    : strstr(new->name, "embed_tokens") ? m->embedding.w
                                                        : m->norm;
        if (sscanf(new->name, "model.layers.%d.%n", &l, &end) != 1) continue;
        const char *part = new->name + end;
        if (strstr(part, "norm"))
            new->data = part[0] == 'i' ? m->layers[l].attention_norm : m->layers[l].ffn_norm;
        for (int k = 0; k < N_LINEARS; k++)
            if (!strncmp(part, linear_names[k], strlen(linear_names[k])))
                new->data = m->layers[l].linears[k].w;
    }
    write_model(path, o.c, NULL, t, n);
    free(t);
    free(s);
    model_free(m);
    double before = perplexity_on(&o, o.m, SCRATCH "/eval.txt", 256, 0);
    close_model(o);

    double planted = perplexity_of(path, SCRATCH "/eval.txt", 256, 0);
    check(fabs(planted - before) < 1e-6, "outliers: perplexity %.6f became %.6f", before, planted);
    double after[2] = {0};
    for (int smooth = 0; smooth < 2; smooth++)
        if (quantize("%s " OUT " -c data/calib.txt -n 2 -l 128 -b rtn -r 0 -m 0 -g -1 -a %d", path,
                     smooth))
            after[smooth] = perplexity_of(OUT, SCRATCH "/eval.txt", 256, 0);
    check(after[0] > 1.3 * before && after[1] < 1.12 * before,
          "perplexity %.2f, to nearest %.2f, smoothed %.2f", before, after[0], after[1]);
    unlink(path);
    unlink(OUT);
}

static void test_same_bytes(void) {
    test_begin("quantize: the same bytes whatever the number of threads");
    const char *options[] = {"-r 0", "-g -1", "-b rtn -m 0"};
    for (int i = 0; i < 3; i++) {
        make_model(SCRATCH "/made.bin", made);
        for (int threads = 1; threads <= 3; threads++) {
            char path[64];
            snprintf(path, sizeof path, SCRATCH "/threads%d.bin", threads);
            int status = shell("OMP_NUM_THREADS=%d $QUANTIZE " SCRATCH
                               "/made.bin %s -c data/calib.txt -n 3 -l 60 %s",
                               threads, path, options[i]);
            check(status == 0 && same_files(SCRATCH "/threads1.bin", path),
                  "%s, %d threads: other bytes: %s", options[i], threads, output);
        }
    }
    shell("rm -f " SCRATCH "/threads*.bin");

    test_begin("quantize -f: a model.bin that gives the same file as the directory");
    const char *flags = "-c data/calib.txt -n 2 -l 64 -m 0";
    if (quantize("-f " SCRATCH "/cut " SCRATCH "/converted.bin") &&
        quantize(SCRATCH "/cut " SCRATCH "/a.bin %s", flags) &&
        quantize(SCRATCH "/converted.bin " SCRATCH "/b.bin %s", flags)) {
        check(same_files(SCRATCH "/a.bin", SCRATCH "/b.bin"), "the files differ");
        Checkpoint *from = checkpoint_open(SCRATCH "/cut");
        Checkpoint *to = checkpoint_open(SCRATCH "/converted.bin");
        check(!to->quantization && !strcmp(from->config, to->config), "the metadata");
        for (int i = 0; i < from->n_tensors; i++) {
            const Tensor *a = &from->tensors[i], *b = checkpoint_find(to, a->name);
            check(b && b->dtype == a->dtype && b->bytes == a->bytes &&
                      !memcmp(a->data, b->data, a->bytes),
                  "%s is not as it was", a->name);
        }
        checkpoint_close(from);
        checkpoint_close(to);
    }
    if (quantize("-f " SCRATCH "/converted.bin " SCRATCH "/b.bin"))
        check(same_files(SCRATCH "/converted.bin", SCRATCH "/b.bin"), "-f of a model.bin");
    expect_error("$QUANTIZE -f " SCRATCH "/a.bin " OUT, 1,
                 SCRATCH "/a.bin: it is quantized already", false);
    expect_error("$QUANTIZE " SCRATCH "/a.bin " OUT " -c data/calib.txt -n 1 -l 64", 1,
                 SCRATCH "/a.bin: it is quantized already", false);
    shell("rm -f " SCRATCH "/?.bin " SCRATCH "/converted.bin");

    test_begin("quantize: where OUT is not given");
    make_model(SCRATCH "/made.bin", made);
    shell("rm -rf " SCRATCH "/here && mkdir -p " SCRATCH "/here && cp -rL " SCRATCH "/cut " SCRATCH
          "/here/model && rm -rf " SCRATCH "/models--org--some-model && mkdir -p " SCRATCH
          "/models--org--some-model/snapshots " SCRATCH
          "/models--org--some-model/refs && cp -rL " SCRATCH "/cut " SCRATCH
          "/models--org--some-model/snapshots/0a1b && printf 0a1b >" SCRATCH
          "/models--org--some-model/refs/main");
    const char *unnamed[][2] = {{"../made.bin", "made-w4a8.bin"},
                                {"../cut//", "cut-w4a8.bin"},
                                {"../cut -f", "cut.bin"},
                                {"../models--org--some-model", "some-model-w4a8.bin"},
                                {"../models--org--some-model/snapshots/0a1b -f", "some-model.bin"},
                                {"model", "model-w4a8.bin"}};
    for (size_t i = 0; i < sizeof unnamed / sizeof *unnamed; i++) {
        int status = shell("cd " SCRATCH "/here && $OLDPWD/quantize %s -b rtn -a 0 -m 0 >/dev/null",
                           unnamed[i][0]);
        char path[128];
        snprintf(path, sizeof path, SCRATCH "/here/%s", unnamed[i][1]);
        check(status == 0 && exists(path), "%s: no %s: %s", unnamed[i][0], path, output);
        unlink(path);
    }
    check(shell("cd " SCRATCH "/here/model && $OLDPWD/quantize . -b rtn -a 0 -m 0 >/dev/null") ==
                  0 &&
              exists(SCRATCH "/here/model/model-w4a8.bin"),
          "of the current directory: %s", output);
    shell("rm -rf " SCRATCH "/here " SCRATCH "/models--org--some-model");
    // The text is looked for beside the program.
    if (quantize(SCRATCH "/made.bin " OUT " -b rtn -a 0 -n 1 -l 64")) {
        Checkpoint *c = checkpoint_open(OUT);
        check(strstr(c->quantization, "\"calib.txt\"") != NULL, "%s", c->quantization);
        checkpoint_close(c);
    }
    unlink(OUT);
}

/* Logits after a few tokens. */
static float *some_logits(const char *path) {
    Opened o = open_model(path);
    const int tokens[] = {3840, 72, 101, 500, 1000};
    State *s = state_new(&o.m->config, 5, 5, 16);
    forward(o.m, s, tokens, 5, 0);
    float *copy = copy_floats(logits(o.m, s, 0, 5), (size_t)5 * 4096);
    state_free(s);
    close_model(o);
    return copy;
}

static void test_tied(void) {
    const char *flags[] = {"-b rtn -r 0 -m 0 -a 0", "-b rtn -m 0 -a 0"};
    for (int i = 0; i < 2; i++) {
        test_begin(i ? "quantize: a tied lm_head is untied by rotation"
                     : "quantize: a tied lm_head stays tied");
        float *logits[2];
        for (int tied = 0; tied < 2; tied++) {
            Made s = made;
            s.tied = tied, s.copied_head = true;
            make_model(SCRATCH "/made.bin", s);
            quantize(SCRATCH "/made.bin " OUT " %s", flags[i]);
            logits[tied] = some_logits(OUT);
            Checkpoint *c = checkpoint_open(OUT);
            check(!checkpoint_find(c, "lm_head.weight") == (tied && !i), "lm_head.weight");
            checkpoint_close(c);
        }
        check(!memcmp(logits[0], logits[1], 5 * 4096 * sizeof(float)),
              "other logits than of a model whose lm_head is a copy: %g, not %g", logits[1][0],
              logits[0][0]);
        free(logits[0]);
        free(logits[1]);
    }
    unlink(OUT);
}

/* -q 8: rows as quantize_bytes() makes them, of a tied model's embedding too, which stays. */
static void test_head_bytes(void) {
    const char *flags[] = {"-b rtn -r 0 -m 0 -a 0 -q 8", "-b rtn -m 0 -a 0 -q 8"};
    for (int tied = 0; tied < 2; tied++)
        for (int i = 0; i < 2; i++) {
            begin("quantize: lm_head in 8 bits, %s%s", tied ? "tied" : "of its own",
                  i ? ", rotated" : "");
            Made s = made;
            s.tied = tied, s.copied_head = true;
            make_model(SCRATCH "/made.bin", s);
            if (!quantize(SCRATCH "/made.bin " OUT " %s", flags[i])) continue;
            Opened o = open_model(OUT), f = open_model(SCRATCH "/made.bin");
            const Tensor *head = checkpoint_find(o.c, "lm_head.weight");
            const Tensor *embedding = checkpoint_find(o.c, "model.embed_tokens.weight");
            check(strstr(o.c->quantization, "\"lm_head_bits\":8") != NULL, "%s", o.c->quantization);
            check(head && head->dtype == I8 && o.m->lm_head.dtype == I8 && !o.m->config.tied &&
                      embedding->dtype != I8,
                  "dtypes");
            Linear want = quantize_bytes(&f.m->lm_head), *got = &o.m->lm_head;
            size_t n = (size_t)want.N * want.K;
            check(i || (!memcmp(want.w, got->w, n) &&
                        !memcmp(want.s_channel, got->s_channel, want.N * sizeof(float))),
                  "other rows");
            check(head->bytes == n && model_bytes(o.m) < model_bytes(f.m), "sizes");
            linear_free(&want);
            check(shell("$RUN " OUT " -d cpu -n 3 -s 1") == 0, "%s", output);

            shell("rm -rf " SCRATCH "/head-vllm");
            if (quantize(OUT " " SCRATCH "/head-vllm -x vllm")) {
                Checkpoint *x = checkpoint_open(SCRATCH "/head-vllm");
                const Tensor *t = checkpoint_find(x, "lm_head.weight");
                const uint16_t *half = t ? t->data : NULL;
                bool same = t && t->dtype == F16 && t->bytes == 2 * n;
                for (size_t k = 0; same && k < n; k++)
                    same = half[k] ==
                           float_to_f16(((const int8_t *)got->w)[k] * got->s_channel[k / got->K]);
                check(same && !checkpoint_find(x, "lm_head.s_channel"), "lm_head of the export");
                checkpoint_close(x);
            }
            shell("rm -rf " SCRATCH "/head-vllm");
            close_model(o);
            close_model(f);
            shell("mv " OUT " " SCRATCH "/head.bin");
            expect_error("$QUANTIZE " SCRATCH "/head.bin " OUT, 1, "quantized already", false);
            unlink(SCRATCH "/head.bin");
        }
    unlink(OUT);
}

/* build/synthetic --head 8: the model of --head 16, but for a head of as large weights in int8. */
static void test_synthetic_head(void) {
    test_begin("synthetic: lm_head in 8 bits");
    Opened o[2];
    double size[2] = {0};
    for (int i = 0; i < 2; i++) {
        const char *path = i ? SCRATCH "/head8.bin" : SCRATCH "/head16.bin";
        check(shell("build/synthetic %s --layers 1 --w4a8 128 --head %d && $RUN %s -d cpu -n 3",
                    path, i ? 8 : 16, path) == 0,
              "%s", output);
        o[i] = open_model(path);
        const Linear *head = &o[i].m->lm_head;
        for (int k = 0; k < head->N * head->K; k++) {
            float w;
            if (i) w = ((int8_t *)head->w)[k] * head->s_channel[k / head->K];
            else floats(head->w, head->dtype, k, 1, &w);
            size[i] += w * w;
        }
        unlink(path);
    }
    check(o[1].m->lm_head.dtype == I8, "dtype");
    check(fabs(size[1] / size[0] - 1) < 0.05, "squares add up to %g, not %g", size[1], size[0]);
    for (int i = 0; i < o[0].c->n_tensors; i++) {
        const Tensor *t = &o[0].c->tensors[i], *u = checkpoint_find(o[1].c, t->name);
        bool head = !strcmp(t->name, "lm_head.weight");
        check(head || (u && u->bytes == t->bytes && !memcmp(t->data, u->data, t->bytes)),
              "another %s", t->name);
    }
    for (int i = 0; i < 2; i++) close_model(o[i]);
}

static void test_names(void) {
    test_begin("quantize: a calibration text with an odd name");
    copy_text("data/calib.txt", 8000, SCRATCH "/a \"b\\c\td.txt");
    make_model(SCRATCH "/made.bin", made);
    if (quantize(SCRATCH "/made.bin " OUT " -b rtn -a 0 -n 1 -l 64 "
                         "-c \"$(printf '" SCRATCH "/a \"b\\\\c\\td.txt')\"") &&
        check(shell("$RUN " OUT " -n 1") == 0, "./run: %s", output)) {
        Checkpoint *c = checkpoint_open(OUT);
        Json *j = json_parse("quantization", c->quantization, strlen(c->quantization));
        check(json_is(j, json_get(j, 0, "calibration"), "a \"b\\c\td.txt"), "recorded as %s",
              c->quantization);
        json_free(j);
        checkpoint_close(c);
    }
    unlink(OUT);
}

/* ---- bad input ----------------------------------------------------------------------------- */

#define MADE "$QUANTIZE " SCRATCH "/made.bin " OUT
#define BROKEN "$QUANTIZE " SCRATCH "/broken.bin " OUT " -c data/calib.txt -n 1 -l 64 "

static void test_usage(void) {
    test_begin("progress: the model before it is read, its ends, a first line before the linears");
    shell("$QUANTIZE data/tiny " OUT " -d cpu -n 1 -l 64 2>&1 >/dev/null");
    const char *steps[] = {"data/tiny: LLaMA 3.1, ",
                           "\n1024 of 4096 rows of the embedding and lm_head\n",
                           "\n4096 of 4096 rows", "\n0 of 42 linears: layer 0, self_attn.q_proj\n",
                           "\n42 of 42 linears"};
    const char *at = output;
    for (size_t i = 0; i < sizeof steps / sizeof *steps && at; i++) at = strstr(at, steps[i]);
    check(at && !strncmp(output, steps[0], strlen(steps[0])), "%s", output);
    unlink(OUT);
    test_begin("progress: steps that follow each other within 5 s are not all said");
    int ends[2];
    pid_t child = pipe(ends) ? -1 : fork();
    if (!child) {
        dup2(ends[1], STDERR_FILENO);
        for (int work = 0; work < 2; work++) // the second begins anew
            for (int done = 0; done <= 9; done++) show_progress("steps", done, 9, -1);
        _exit(0);
    }
    close(ends[1]);
    char said[300] = "", expected[] = "0 of 9 steps\n9 of 9 steps\n0 of 9 steps\n9 of 9 steps\n";
    for (ssize_t n = 0, got; (got = read(ends[0], said + n, sizeof said - 1 - n)) > 0;) n += got;
    check(!strcmp(said, expected), "%s", said);
    close(ends[0]);
    if (child > 0) waitpid(child, NULL, 0);
    test_begin("quantize: options");
    check(shell("$QUANTIZE -h 2>/dev/null") == 0 && !strncmp(output, "usage: ./quantize MODEL", 23),
          "-h: %s", output);
    const char flags[] = "gbarmoqscnlefxdM";
    for (int i = 0; flags[i]; i++) {
        char line[80];
        snprintf(line, sizeof line, "\n  -%c ", flags[i]);
        check(strstr(output, line) != NULL, "-h does not list -%c", flags[i]);
    }
    for (int i = 0; flags[i]; i++) {
        char line[80];
        snprintf(line, sizeof line, MADE " -%c", flags[i]);
        if (flags[i] != 'f') expect_error(line, 2, "its value is missing", false);
    }
    const char *bad[][2] = {
        {"-z", "unknown option -z"},
        {"-gg 1", "unknown option -gg"},
        {"--hel", "unknown option --hel"},
        {"-", "unknown option -"},
        {"-g 64", "-g 64: expected"},
        {"-g 0", "-g 0: expected"},
        {"-b awq", "-b awq: expected rtn or gptq"},
        {"-n 0", "-n 0: expected a whole number from 1"},
        {"-n 2x", "-n 2x: expected"},
        {"-n -1", "-n -1: expected"},
        {"-l 1", "-l 1: expected"},
        {"-a 2", "-a 2: expected a whole number from 0 to 1"},
        {"-r 2", "-r 2: expected"},
        {"-m x", "-m x: expected"},
        {"-o ''", "-o : expected"},
        {"-q 4", "-q 4: expected 8 or 16"},
        {"-s -1", "-s -1: expected"},
        {"-d gpu", "-d gpu: expected"},
        {"-M 0", "-M 0: expected a number from 0.1"},
        {"third", "third: MODEL and OUT are given already"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char line[120];
        snprintf(line, sizeof line, MADE " %s", bad[i][0]);
        expect_error(line, 2, bad[i][1], false);
    }
    check(shell("$QUANTIZE --help") == 0 && strstr(output, "--version"), "--help: %s", output);
    check(shell("$QUANTIZE --version") == 0 && strstr(output, "QQQ"), "--version: %s", output);
    expect_error("$QUANTIZE", 2, "no MODEL", false);
    expect_error("$QUANTIZE -g 128", 2, "no MODEL", false);
    expect_error(MADE " -c data/calib.txt -n 1 -l 4097", 2, "-l 4097: the context of", false);
}

static void test_bad_texts(void) {
    test_begin("quantize: calibration and evaluation texts that are missing or too short");
    make_model(SCRATCH "/made.bin", made);
    copy_text("data/calib.txt", 3000, SCRATCH "/short.txt");
    shell("$RUN data/tiny -x " SCRATCH "/short.txt | wc -w");
    int tokens = atoi(output) + 1;
    char message[160];
    snprintf(message, sizeof message,
             "short.txt: its %d tokens give %d windows of 100, %d are "
             "needed",
             tokens, tokens / 100, tokens / 100 + 1);
    char command[256];
    snprintf(command, sizeof command, MADE " -c " SCRATCH "/short.txt -l 100 -n %d",
             tokens / 100 + 1);
    expect_error(command, 1, message, false);
    snprintf(message, sizeof message, "it has %d tokens, a window needs 2048", tokens);
    expect_error(MADE " -c " SCRATCH "/short.txt", 1, message, false);
    write_file(SCRATCH "/empty.txt", "", 0);
    expect_error(MADE " -c " SCRATCH "/empty.txt", 1, SCRATCH "/empty.txt", false);
    expect_error(MADE " -c " SCRATCH "/nowhere.txt", 1, SCRATCH "/nowhere.txt", false);
    expect_error(MADE " -c " SCRATCH, 1, SCRATCH, false);
    expect_error(MADE " -c data/calib.txt -e " SCRATCH "/nowhere.txt", 1, SCRATCH "/nowhere.txt",
                 true);
    expect_error(MADE " -c data/calib.txt -e " SCRATCH "/short.txt", 1, "a window needs 2048",
                 true);
    // Exactly as many windows as asked, and all there are if none are asked.
    if (quantize(SCRATCH "/made.bin " OUT " -b rtn -a 0 -c " SCRATCH "/short.txt -l %d -n 1",
                 tokens) &&
        quantize(SCRATCH "/made.bin " OUT " -b rtn -a 0 -c " SCRATCH "/short.txt -l 100")) {
        Checkpoint *c = checkpoint_open(OUT);
        Json *j = json_parse("quantization", c->quantization, strlen(c->quantization));
        check(recorded(j, "windows") == tokens / 100, "%s", c->quantization);
        json_free(j);
        checkpoint_close(c);
    }
    unlink(OUT);
}

static void test_bad_weights(void) {
    const struct {
        const char *tensor, *named; // what the message names
    } broken[] = {
        {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"},
        {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"},
        {"model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"},
        {"model.norm.weight", "model.norm.weight"},
        {"model.embed_tokens.weight", "model.embed_tokens.weight"},
        {"lm_head.weight", "lm_head.weight"},
    };
    const char *ways[] = {"-r 0", "-b rtn -r 0 -a 0 -m 0", "-a 0 -m 0"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        begin("quantize: NaN or infinity in %s", broken[i].tensor);
        for (int j = 0; j < 6; j++) {
            Made s = made;
            s.broken = broken[i].tensor;
            s.value = j % 2 ? NAN : -INFINITY;
            make_model(SCRATCH "/broken.bin", s);
            char command[256];
            snprintf(command, sizeof command, BROKEN "%s", ways[j / 2]);
            expect_error(command, 1, broken[i].named, true);
        }
    }

    test_begin("quantize: activations that are not finite");
    const struct {
        const char *tensor, *named, *unsmoothed; // what the message names with smoothing, without
        float factor;
    } large[] = {
        {"model.layers.1.mlp.up_proj.weight", "layer 1: the input of mlp.down_proj", NULL, 3e38f},
        {"model.layers.0.mlp.down_proj.weight", "layer 0: the output of mlp.down_proj", NULL,
         3e38f},
        {"model.layers.0.self_attn.o_proj.weight", "layer 0: the input of mlp.gate_proj",
         "layer 0: the output of self_attn.o_proj", 3e38f},
        {"model.layers.1.mlp.down_proj.weight", "layer 1: the output of mlp.down_proj", NULL,
         3e38f},
    };
    const char *calibrated[] = {"", "-a 0", "-b rtn -a 0 -m 1 -g -1", "-b rtn -a 0 -m 1"};
    for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
        Made s = made;
        s.scaled = large[i].tensor;
        s.factor = large[i].factor;
        make_model(SCRATCH "/broken.bin", s);
        for (int j = 0; j < (i ? 2 : 4); j++) {
            char command[256];
            snprintf(command, sizeof command, BROKEN "%s", calibrated[j]);
            bool smoothed = !j || !large[i].unsmoothed;
            expect_error(command, 1, smoothed ? large[i].named : large[i].unsmoothed, true);
        }
    }
    unlink(SCRATCH "/broken.bin");

    test_begin("quantize: a rotated end beyond the range of F16");
    const char *ends[] = {"model.embed_tokens.weight", "lm_head.weight"};
    for (int i = 0; i < 2; i++) {
        Made s = made;
        s.broken = ends[i];
        s.value = 1e6f;
        make_model(SCRATCH "/broken.bin", s);
        expect_error(BROKEN "-a 0 -m 0 -b rtn", 1, "beyond F16's 65504", true);
        check(strstr(output, ends[i]) != NULL, "%s", output);
    }

    test_begin("quantize -f refuses what ./run would");
    {
        Made s = made;
        s.broken = "model.norm.weight";
        s.value = NAN;
        make_model(SCRATCH "/broken.bin", s);
        expect_error(BROKEN "-f", 1, "model.norm.weight holds NaN", false);
    }
    shell("cp -rL " SCRATCH "/cut " SCRATCH "/broken && cd " SCRATCH
          "/broken && chmod u+w * && echo {} >tokenizer.json");
    expect_error("$QUANTIZE " SCRATCH "/broken " OUT " -f", 1, "broken: tokenizer.json", false);
    expect_error("$QUANTIZE " SCRATCH "/broken " OUT " -b rtn -a 0 -m 0", 1,
                 "broken: tokenizer.json", false);
    check(shell("cd " SCRATCH "/broken && cp ../../../../data/tiny/tokenizer.json . && sed -i "
                "'s/\"added_tokens\": \\[/&{\"id\":4096,\"content\":\"<more>\"},/' "
                "tokenizer.json") == 0,
          "%s", output);
    expect_error("$QUANTIZE " SCRATCH "/broken " OUT " -f", 1,
                 "added token <more> has the id 4096, transformers gives it 3840", false);
    shell("rm -r " SCRATCH "/broken");

    test_begin("quantize: shapes that do not fit");
    Made s = made;
    s.dim = 192, s.head_dim = 48;
    make_model(SCRATCH "/broken.bin", s);
    expect_error(BROKEN "-g 128", 1, "self_attn.q_proj has 192 input channels, no multiple of 128",
                 false);
    quantize(SCRATCH "/broken.bin " OUT " -g -1 -r 1 -c data/calib.txt -n 1 -l 64");
    s = made, s.hidden = 200;
    make_model(SCRATCH "/broken.bin", s);
    expect_error(BROKEN, 1, "mlp.down_proj has 200 input channels", false);
    s = made, s.head_dim = 24; // 96 = 4 x 24 inputs of o
    make_model(SCRATCH "/broken.bin", s);
    expect_error(BROKEN, 1, "self_attn.o_proj has 96 input channels", false);
    unlink(SCRATCH "/broken.bin");
}

static void test_bad_files(void) {
    test_begin("quantize: MODEL that is missing or no model");
    expect_error("$QUANTIZE " SCRATCH "/nowhere " OUT, 1, SCRATCH "/nowhere", false);
    expect_error("$QUANTIZE " SCRATCH "/nowhere.bin " OUT " -f", 1, SCRATCH "/nowhere.bin", false);
    expect_error("$QUANTIZE data/eval.txt " OUT, 1, "data/eval.txt", false);

    test_begin("quantize: OUT is MODEL, in any spelling");
    make_model(SCRATCH "/made.bin", made);
    shell("cd " SCRATCH " && cp made.bin kept.bin && ln -sf made.bin symbolic.bin && "
          "ln -f made.bin hard.bin");
    const char *spellings[][2] = {
        {"made.bin", "made.bin"},     {"made.bin", "./made.bin"},   {"made.bin", "out/../made.bin"},
        {"made.bin", "symbolic.bin"}, {"symbolic.bin", "made.bin"}, {"made.bin", "hard.bin"},
        {"symbolic.bin", "hard.bin"},
    };
    for (size_t i = 0; i < sizeof spellings / sizeof *spellings; i++)
        for (int convert = 0; convert < 2; convert++) {
            char command[256];
            snprintf(command, sizeof command, "$QUANTIZE " SCRATCH "/%s " SCRATCH "/%s %s",
                     spellings[i][0], spellings[i][1], convert ? "-f" : "-b rtn -a 0 -m 0");
            expect_error(command, 1, "OUT is MODEL", false);
        }
    expect_error("cd " SCRATCH " && $OLDPWD/quantize made.bin -f", 1, "OUT is MODEL", false);
    check(same_files(SCRATCH "/made.bin", SCRATCH "/kept.bin"), "MODEL was touched");
    shell("cd " SCRATCH " && mkdir -p copy && cp -Lf cut/* copy/ && chmod u+w copy/*");
    expect_error("$QUANTIZE " SCRATCH "/copy " SCRATCH "/copy", 1, SCRATCH "/copy", false);
    expect_error("$QUANTIZE " SCRATCH "/copy " SCRATCH "/copy/model.safetensors -b rtn -a 0 -m 0",
                 1, "OUT is", false);
    check(same_files(SCRATCH "/copy/model.safetensors", "data/tiny/model.safetensors"),
          "MODEL's weights were overwritten");
    shell("cd " SCRATCH
          "/copy && echo {} >generation_config.json && echo {} >tokenizer_config.json "
          "&& cp ../../../../data/calib.txt . && ln -sf copy/config.json ../symbolic.bin && ln -f "
          "config.json ../hard.bin && cat * >../before");
    const char *own[] = {"config.json",    "generation_config.json", "tokenizer_config.json",
                         "tokenizer.json", "../symbolic.bin",        "../hard.bin"};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        for (int convert = 0; convert < 2; convert++) {
            char command[256];
            snprintf(command, sizeof command, "$QUANTIZE " SCRATCH "/copy " SCRATCH "/copy/%s %s",
                     own[i], convert ? "-f" : "-b rtn -a 0 -m 0");
            expect_error(command, 1, "OUT is a file of MODEL", false);
        }
    check(shell("cat " SCRATCH "/copy/* | cmp - " SCRATCH "/before") == 0, "MODEL was changed");

    for (int i = 0; i < 2; i++) // but what it does not read may be replaced
        quantize("-f " SCRATCH "/copy " SCRATCH "/copy/model.bin");
    shell("cp " SCRATCH "/copy/model.bin " SCRATCH "/copy/model.safetensors");
    expect_error("$QUANTIZE " SCRATCH "/copy " SCRATCH "/copy/model.safetensors -f", 1,
                 "OUT is a file of MODEL", false); // unless it is the weights that are read

    test_begin("quantize: OUT is a text that is read");
    copy_text("data/calib.txt", 12000, SCRATCH "/text");
    expect_error(MADE_TO("text") " -c " SCRATCH "/text -n 1 -l 64", 1, "OUT is the calibration",
                 false);
    expect_error(MADE_TO("./text") " -b rtn -a 0 -m 0 -e " SCRATCH "/text", 1, "OUT is the text of",
                 false);
    size_t bytes;
    char *text = read_file(SCRATCH "/text", &bytes);
    check(text && bytes == 12000, "the text was touched");
    free(text);

    test_begin("quantize: a link as OUT is followed, to a file that is there");
    shell("cd " SCRATCH " && echo old >target.bin && ln -sf target.bin link.bin && "
          "ln -sf nowhere.bin dangling.bin");
    check(shell(MADE_TO("link.bin") " -b rtn -a 0 -m 0") == 0 &&
              shell("test -L " SCRATCH "/link.bin && test $(stat -c %%s " SCRATCH
                    "/target.bin) -gt 1000") == 0,
          "%s", output);
    expect_error(MADE_TO("dangling.bin") " -b rtn -a 0 -m 0", 1, "a link to no file", false);
    check(shell("test -L " SCRATCH "/dangling.bin && test ! -e " SCRATCH "/nowhere.bin") == 0,
          "the link was touched");

    test_begin("quantize: OUT is where the report goes");
    for (int fd = 1; fd <= 2; fd++)
        check(shell("$QUANTIZE " SCRATCH "/made.bin " SCRATCH "/own -f %d>" SCRATCH "/own", fd) ==
                      1 &&
                  shell("test $(wc -c <" SCRATCH "/own) -lt 200") == 0,
              "descriptor %d: %s", fd, output);

    test_begin("quantize: stale temporary files do not block, and stay");
    check(shell("sh -c 'for i in $(seq 0 110); do ln -s nowhere " SCRATCH
                "/stale.bin.$(($$ + i)).tmp; done; exec ./quantize " SCRATCH "/made.bin " SCRATCH
                "/stale.bin -b rtn -a 0 -m 0' && test -s " SCRATCH
                "/stale.bin && test $(ls " SCRATCH "/stale.bin.*.tmp | wc -l) = 111") == 0,
          "%s", output);

    test_begin("closed descriptors are no files");
    for (int closed = 0; closed < 8; closed++) {
        const char *how[] = {"<&-", ">&-", "2>&-"};
        char redirections[32] = "";
        for (int fd = 0; fd < 3; fd++)
            if (closed >> fd & 1) strcat(strcat(redirections, " "), how[fd]);
        shell("{ $QUANTIZE " SCRATCH "/made.bin " SCRATCH
              "/closed%d.bin -b rtn -a 0 -m 0; } >" SCRATCH "/stdout %s",
              closed, redirections);
        char path[64];
        snprintf(path, sizeof path, SCRATCH "/closed%d.bin", closed);
        check(same_files(SCRATCH "/closed0.bin", path), "with%s: another file", redirections);
    }
    shell("rm -f " SCRATCH "/closed*.bin " SCRATCH "/stale* " SCRATCH "/link.bin " SCRATCH
          "/target.bin " SCRATCH "/dangling.bin " SCRATCH "/text " SCRATCH "/before");

    test_begin("quantize: a text whose name is no UTF-8");
    check(shell("cp data/calib.txt " SCRATCH "/$(printf '\\377').txt && $QUANTIZE " SCRATCH
                "/made.bin " SCRATCH "/named.bin -a 0 -b rtn -n 1 -l 64 -c " SCRATCH
                "/$(printf '\\377').txt") == 0,
          "%s", output);
    Checkpoint *named = checkpoint_open(SCRATCH "/named.bin");
    check(strstr(named->quantization, "\\ufffd.txt") != NULL, "%s", named->quantization);
    checkpoint_close(named);
    shell("rm -f " SCRATCH "/named.bin " SCRATCH "/*.txt");

    test_begin("quantize -h into a full disk");
    check(shell("$QUANTIZE -h >/dev/full") == 1 && strstr(output, "error: stdout"), "%s", output);
    shell("rm -rf " SCRATCH "/copy " SCRATCH "/kept.bin " SCRATCH "/symbolic.bin " SCRATCH
          "/hard.bin");

    test_begin("quantize: OUT that cannot be written");
    const char *places[] = {SCRATCH "/nowhere/out.bin", SCRATCH "/made.bin/out.bin",
                            "/proc/out.bin", SCRATCH "/cut", "/dev/null"};
    for (int i = 0; i < 5; i++)
        for (int convert = 0; convert < 2; convert++) {
            char command[256];
            snprintf(command, sizeof command, "$QUANTIZE " SCRATCH "/made.bin %s %s", places[i],
                     convert ? "-f" : "-b rtn -a 0 -m 0");
            expect_error(command, 1, places[i], false);
        }
    expect_error("$QUANTIZE " SCRATCH "/made.bin '' -b rtn -a 0 -m 0", 2, "OUT is empty", false);
    expect_error("$QUANTIZE " SCRATCH "/made.bin '' -x vllm", 2, "OUT is empty", false);
    if (geteuid()) { // root may write anywhere
        chmod(SCRATCH "/locked", 0555);
        expect_error("$QUANTIZE " SCRATCH "/made.bin " SCRATCH "/locked/out.bin -f", 1,
                     "Permission denied", false);
        chmod(SCRATCH "/locked", 0777);
    }

    test_begin("quantize: a full disk");
    const int blocks[] = {0, 1, 100, 700, 3000}; // of 512 bytes; the file has 2.9 MB
    for (int i = 0; i < 5; i++)
        for (int convert = 0; convert < 2; convert++) {
            char command[256];
            snprintf(command, sizeof command, "ulimit -f %d\n" MADE " %s", blocks[i],
                     convert ? "-f" : "-b rtn -a 0 -m 0");
            expect_error(command, 1, "cannot be written: File too large", true);
        }
}

/* A signal while layers are being quantized. The program's stdout is a pipe that is full already:
 * it waits at the first line of its report, so it cannot be done before the signal comes. */
static void interrupt(int number, bool old) {
    unlink(OUT);
    if (old) write_file(OUT, "old", 3);
    int ends[2];
    if (pipe2(ends, O_NONBLOCK)) die("no pipe");
    char page[4096] = {0};
    while (write(ends[1], page, sizeof page) > 0) {
    }
    while (write(ends[1], page, 1) > 0) {
    }
    fcntl(ends[1], F_SETFL, 0); // whoever writes now waits
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("no fork");
    if (child == 0) {
        int errors = open(SCRATCH "/stderr.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dup2(ends[1], STDOUT_FILENO);
        dup2(errors, STDERR_FILENO);
        signal(number, SIG_DFL); // also under nohup
        execl("./quantize", "./quantize", SCRATCH "/made.bin", OUT, "-b", "rtn", "-a", "0", "-m",
              "0", (char *)NULL);
        _exit(127);
    }
    // Once it has said that it is at the first layer, it has begun to write.
    int status = 0;
    pid_t ended = 0;
    bool writes = false;
    double start = seconds();
    while (!writes && seconds() - start < 60 && !(ended = waitpid(child, &status, WNOHANG))) {
        size_t bytes;
        char *text = read_file(SCRATCH "/stderr.txt", &bytes);
        writes = text && strstr(text, " linears: layer 0");
        free(text);
        sched_yield();
    }
    check(writes && !ended, "the first layer was not reached");
    check_untouched(old, "while it is at work");
    kill(child, number);
    if (!ended) waitpid(child, &status, 0);
    close(ends[0]);
    close(ends[1]);
    check(WIFSIGNALED(status) && WTERMSIG(status) == number, "not ended by the signal: status %x",
          status);
    check_untouched(old, strsignal(number));
    unlink(OUT);
}

static void test_interrupts(void) {
    test_begin("quantize: an interrupt in the middle");
    make_model(SCRATCH "/made.bin", made);
    const int signals[] = {SIGINT, SIGTERM, SIGKILL};
    for (int i = 0; i < 6; i++) interrupt(signals[i / 2], i % 2);
}

/* ---- all ----------------------------------------------------------------------------------- */

void test_quantize(void) {
    shell("mkdir -p " SCRATCH "/out " SCRATCH "/locked && rm -f " SCRATCH "/out/*");
    copy_text("data/eval.txt", 12000, SCRATCH "/eval.txt");
    make_cut();
    test_hadamard();
    test_rotate_matrices();
    test_rotate_layer();
    test_begin("rotation and smoothing leave data/tiny's output alone");
    check_function_preserved("data/tiny", SCRATCH "/eval.txt", 512, 2);
    test_smooth_layer();
    test_search_smoothing();
    test_smoothing_sample();
    test_choose_scales();
    test_extreme_rows();
    test_add_moments();
    test_hessian_inverse();
    test_gptq_definition();
    test_gptq_diagonal();
    test_gptq_error();
    test_gptq_degenerate();
    test_compensated_importance();
    test_corrected_target();
    test_rounded_activations();
    test_options();
    test_pipeline(false);
    test_pipeline(true);
    test_quality();
    test_outliers();
    test_same_bytes();
    test_tied();
    test_head_bytes();
    test_synthetic_head();
    test_names();
    test_usage();
    test_bad_texts();
    test_bad_weights();
    test_bad_files();
    test_interrupts();
}

/* Quantizes with 32 windows and returns the perplexity on all of data/eval.txt; NaN on failure. */
static double measure(const char *model, const char *flags) {
    if (!quantize("%s " OUT " -c data/calib.txt -n 32 %s", model, flags)) return NAN;
    double ppl = perplexity_of(OUT, "data/eval.txt", 2048, 0);
    unlink(OUT);
    return ppl;
}

/* Each step of the method against the published algorithm's figure. */
static void test_steps(void) {
    const struct {
        const char *name, *flags;
        double reference[2]; // per channel, per group of 128
        int seeds;
    } steps[] = {
        {"rtn", "-b rtn -r 0 -a 0 -m 0", {31.8461, 31.3823}, 1},
        {"gptq", "-r 0 -a 0 -m 0", {31.7114, 31.1895}, 1},
        {"gptq+mse", "-r 0 -a 0", {31.0782, 30.8322}, 1},
        {"smooth+gptq", "-r 0 -m 0", {31.5648, 31.2018}, 1},
        {"rotate+gptq+mse", "-a 0", {31.1086, 31.0361}, 3},
    };
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        for (int g = 0; g < 2; g++) {
            char flags[128];
            begin("tiny, %s, %s: at most 0.15 above the published algorithm", steps[i].name,
                  g ? "g128" : "per channel");
            double mean = 0;
            for (int seed = 0; seed < steps[i].seeds; seed++) {
                snprintf(flags, sizeof flags, "%s -s %d -g %s", steps[i].flags, seed,
                         g ? "128" : "-1");
                mean += measure("data/tiny", flags) / steps[i].seeds;
            }
            printf("     perplexity %.4f, published %.4f\n", mean, steps[i].reference[g]);
            check(mean <= steps[i].reference[g] + 0.15, "perplexity %.4f", mean);
        }
}

/* The defaults against the best published figure of each model. */
static void test_defaults(void) {
    const struct {
        const char *model;
        double bound[2];
    } models[] = {{"data/tiny", {31.08, 30.84}},
                  {"../shared/models/small", {28.53, 28.53}},
                  {"../shared/models/tiny-outliers", {31.14, 30.88}}};
    for (int i = 0; i < 3; i++)
        for (int g = 0; g < 2; g++) {
            begin("%s with the defaults, %s: at most %.2f", models[i].model,
                  g ? "g128" : "per channel", models[i].bound[g]);
            if (!exists(models[i].model)) {
                test_skip("the model is not there");
                continue;
            }
            double ppl = measure(models[i].model, g ? "-g 128" : "-g -1");
            printf("     perplexity %.4f\n", ppl);
            check(ppl <= models[i].bound[g], "perplexity %.4f", ppl);
        }
}

void test_quantize_slow(void) {
    shell("mkdir -p " SCRATCH "/out && rm -f " SCRATCH "/out/*");
    const char *models[] = {"data/tiny", "../shared/models/small",
                            "../shared/models/tiny-outliers"};
    for (int i = 0; i < 3; i++) {
        begin("rotation and smoothing leave %s's output alone", models[i]);
        if (!exists(models[i])) {
            test_skip("the model is not there");
            continue;
        }
        check_function_preserved(models[i], "data/eval.txt", 2048, 0);
        begin("%s: the file rebuilds every row of the quantizer's weights", models[i]);
        for (int g = 0; g < 2; g++)
            if (quantize("%s " OUT " -b rtn -r 0 -a 0 -m 0 -g %s", models[i], g ? "128" : "-1"))
                check_file(OUT, models[i], true);
        unlink(OUT);
    }
    test_steps();
    test_defaults();
}
