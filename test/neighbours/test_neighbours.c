/* The neighbours against golden values of the methods' own published classes in PyTorch
 * (test/data/neighbours.safetensors): elementwise where float32 decides the same, by their sums of
 * squared errors where roundings flip with the precision of a factorization; and the backward pass
 * against differences. */
#define _GNU_SOURCE
#include <omp.h>

#include "../test.h"

int neighbours_main(int argc, char **argv);
#define main neighbours_main
#include "neighbours.c"
#undef main

static Checkpoint *golden;

static const float *golden_values(const char *name, size_t *n) {
    const Tensor *t = checkpoint_find(golden, name);
    if (!t) die("no golden %s", name);
    if (n) *n = t->bytes / sizeof(float);
    return t->data;
}

static float *golden_copy(const char *name) {
    size_t n;
    const float *x = golden_values(name, &n);
    return memcpy(new_floats(n), x, n * sizeof *x);
}

/* Whether x is the golden array but for rounding; values are of size 1. */
static void expect_golden(const char *name, const float *x, float tolerance) {
    size_t n, off = 0, worst = 0;
    const float *want = golden_values(name, &n);
    for (size_t i = 0; i < n; i++) {
        if (!(fabsf(x[i] - want[i]) <= tolerance)) off++;
        if (!(fabsf(x[i] - want[i]) <= fabsf(x[worst] - want[worst]))) worst = i;
    }
    check(off == 0, "%s: %zu of %zu differ, [%zu] %g, expected %g", name, off, n, worst, x[worst],
          want[worst]);
}

enum { N = 32, K = 256 }; // of the golden weights

/* sum |W - Q|^2 and tr((W - Q) H (W - Q)^T) within a share of the golden ones. */
static void expect_errors(const char *name, const float *w, float share) {
    const float *original = golden_values("W", NULL), *H = golden_values("H", NULL);
    const float *want = golden_values(name, NULL);
    double square = 0, weighted = 0;
    for (int n = 0; n < N; n++)
        for (int i = 0; i < K; i++) {
            double e = (double)w[n * K + i] - original[n * K + i];
            square += e * e;
            for (int j = 0; j < K; j++)
                weighted += e * H[i * K + j] * ((double)w[n * K + j] - original[n * K + j]);
        }
    check(fabs(square / want[0] - 1) < share, "%s: |W - Q|^2 %g, expected %g", name, square,
          want[0]);
    check(fabs(weighted / want[1] - 1) < share, "%s: tr(E H E^T) %g, expected %g", name, weighted,
          want[1]);
}

static void test_rounding(void) {
    static const struct {
        const char *name, *input;
        RoundRow *round;
        int rows, n, bits;
    } cases[] = {{"asym.w4.g-1", "W", round_asymmetric, N, K, 4},
                 {"asym.w4.g128", "W", round_asymmetric, 2 * N, K / 2, 4},
                 {"asym.w3.g128", "W", round_asymmetric, 2 * N, K / 2, 3},
                 {"asym.w8.g-1", "W", round_asymmetric, N, K, 8},
                 {"asym.token8", "x", round_asymmetric, 8, K, 8},
                 {"ds.w4.groups64", "W", round_zeroquant, 64, N * K / 64, 4},
                 {"ds.token8", "x", round_zeroquant, 8, K, 8}};
    test_begin("neighbours: RTN and ZeroQuant round as the originals");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float *x = golden_copy(cases[i].input);
        round_rows(cases[i].round, x, cases[i].rows, cases[i].n, cases[i].bits);
        expect_golden(cases[i].name, x, 1e-5f);
        free(x);
    }
}

static void test_smoothquant(void) {
    test_begin("neighbours: SmoothQuant's scales as the original's, and the product stays");
    float *w = golden_copy("W"), norm[K], x[K], y[N], smoothed[N];
    const float *max = golden_values("sq.max", NULL);
    uint64_t seed = 1;
    for (int i = 0; i < K; i++) norm[i] = 1, x[i] = random_float(&seed);
    product(x, 1, w, N, K, y);
    Linear linears[3] = {{.N = 16, .K = K, .w = w},
                         {.N = 8, .K = K, .w = w + 16 * K},
                         {.N = 8, .K = K, .w = w + 24 * K}};
    smooth_inputs(norm, linears, 3, max, 0.55f);
    expect_golden("sq.norm", norm, 1e-5f);
    for (int i = 0; i < K; i++) x[i] *= norm[i];
    product(x, 1, w, N, K, smoothed);
    for (int n = 0; n < N; n++)
        check(fabsf(y[n] - smoothed[n]) < 1e-4f, "output %d: %g, then %g", n, y[n], smoothed[n]);
    free(w);
}

/* W in binary coding; y = W x by look-up tables too, unless NULL. */
static float *coded(Row row, const float *x, float *y) {
    int n = row.group, groups = K / n, planes = row.w + 1;
    float *w = golden_copy("W"), *alphas = new_floats((size_t)N * planes * groups);
    uint8_t *bytes = allocate(N * planes, K / 8);
    for (int i = 0; i < N * groups; i++) {
        float b[MAX_BITS + 1][n], alpha[MAX_BITS + 1];
        binary_coding(w + i * n, n, &row, b, alpha);
        for (int j = 0; j < planes; j++) {
            int plane = i / groups * planes + j, first = i % groups * n;
            alphas[plane * groups + i % groups] = alpha[j];
            for (int k = 0; k < n; k++)
                if (b[j][k] > 0) bytes[(plane * K + first + k) / 8] |= 1 << k % 8;
        }
    }
    if (y) lut_multiply(x, bytes, alphas, N, K, n, planes, y);
    free(alphas), free(bytes);
    return w;
}

static void test_lut_gemm(void) {
    static const struct {
        const char *name;
        Row row;
        bool same;
    } cases[] = {{"bcq.q4.g128.r0", {.w = 4, .group = 128}, true},
                 {"bcq.q4.g128.r1", {.w = 4, .group = 128, .rounds = 1}, true},
                 {"bcq.q4.g128.r30.errors", {.w = 4, .group = 128, .rounds = 30}, false},
                 {"bcq.q3.g128.r30.errors", {.w = 3, .group = 128, .rounds = 30}, false},
                 {"bcq.q3.g-1.r30.errors", {.w = 3, .group = K, .rounds = 30}, false},
                 {"bcq.q4.g128.r30.offset.errors",
                  {.w = 4, .group = 128, .rounds = 30, .offset = true},
                  false}};
    test_begin("neighbours: LUT-GEMM's binary coding as the original's");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float *w = coded(cases[i].row, NULL, NULL);
        if (cases[i].same) expect_golden(cases[i].name, w, 1e-5f);
        else expect_errors(cases[i].name, w, 1e-3f);
        free(w);
    }
    test_begin("neighbours: LUT-GEMM's multiplication is the dequantized product");
    for (int i = 0; i < 4; i++) {
        float y[N], want[N];
        const float *x = golden_values("x", NULL) + i * K;
        const Row row = {.w = 3 + i / 2, .group = i % 2 ? 128 : K, .rounds = 2, .offset = i > 1};
        float *w = coded(row, x, y);
        product(x, 1, w, N, K, want);
        for (int n = 0; n < N; n++)
            check(fabsf(y[n] - want[n]) < 1e-3f, "output %d: %g, expected %g", n, y[n], want[n]);
        free(w);
    }
}

/* A method on W with the golden Hessian; *outliers may be NULL. */
static float *by_hessian(QuantizeByHessian *quantize, Row row, long *outliers) {
    float *w = golden_copy("W");
    const float *h = golden_values("H", NULL);
    double *H = allocate(K * K, sizeof *H);
    for (int i = 0; i < K * K; i++) H[i] = h[i];
    long n = quantize(&row, w, N, H, K);
    if (outliers) *outliers = n;
    free(H);
    return w;
}

static void test_hessian_methods(void) {
    static const struct {
        const char *name;
        QuantizeByHessian *quantize;
        Row row;
    } cases[] = {{"gptq.w4.g-1.act1.static0.errors", gptq_asymmetric, {.w = 4}},
                 {"gptq.w4.g128.act1.static0.errors", gptq_asymmetric, {.w = 4, .group = 128}},
                 {"gptq.w4.g128.act1.static1.errors",
                  gptq_asymmetric,
                  {.w = 4, .group = 128, .fixed_groups = true}},
                 {"gptq.w3.g-1.act0.static0.errors", gptq_asymmetric, {.w = 3, .no_order = true}},
                 {"spqr.w3.g16.t0.25.errors", spqr, {.w = 3, .group = 16, .threshold = .25}},
                 {"spqr.w2.g32.t0.5.errors", spqr, {.w = 2, .group = 32, .threshold = .5}},
                 {"spqr.w3.g16.tinf.errors", spqr, {.w = 3, .group = 16, .threshold = INFINITY}}};
    test_begin("neighbours: GPTQ and SpQR have the originals' errors and outliers");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        long outliers;
        float *w = by_hessian(cases[i].quantize, cases[i].row, &outliers);
        float want = golden_values(cases[i].name, NULL)[2];
        expect_errors(cases[i].name, w, 1e-3f);
        if (want >= 0)
            check(fabs(outliers - want) <= 0.02 * want, "%s: %ld outliers, expected %g",
                  cases[i].name, outliers, want);
        free(w);
    }
}

static void test_kivi(void) {
    test_begin("neighbours: KIVI's attention as the original's, prefilled and decoded");
    const Config c = {.dim = 64,
                      .hidden_dim = 64,
                      .n_layers = 1,
                      .n_heads = 2,
                      .n_kv_heads = 1,
                      .head_dim = 32,
                      .vocab_size = 1,
                      .rope_theta = 1e4};
    enum { T = 290 };
    State *s = state_new(&c, T, T, 16);
    for (int i = 0; i < 4; i++) {
        const Row row = {.w = i < 2 ? 2 : 4, .group = 32, .stream = i % 2};
        const float *q = golden_values("kv.q", NULL); // [head][T][32]
        for (int t = 0; t < T; t++)
            for (int h = 0; h < 2; h++)
                copy_floats(s->q + (t * 2 + h) * 32, q + (h * T + t) * 32, 32);
        copy_floats(s->keys, golden_values("kv.k", NULL), T * 32);
        copy_floats(s->values, golden_values("kv.v", NULL), T * 32);
        kivi_cache(&c, s, &row, T);
        float *by_head = new_floats(2 * T * 32);
        for (int t = 0; t < T; t++)
            for (int h = 0; h < 2; h++)
                copy_floats(by_head + (h * T + t) * 32, s->att + (t * 2 + h) * 32, 32);
        char name[32];
        snprintf(name, sizeof name, "kivi.%d.%s", row.w, row.stream ? "stream" : "prefill");
        expect_golden(name, by_head, 1e-4f);
        free(by_head);
    }
    state_free(s);
}

static void test_kvquant(void) {
    enum { D = 32, WINDOW = 256 };
    const Sample samples[2] = {
        {(float *)golden_values("kvq.k", NULL), (float *)golden_values("kvq.fisher", NULL)},
        {(float *)golden_values("kvq.v", NULL), (float *)golden_values("kvq.fisher", NULL)}};
    KvTables tables = {.channels = allocate(D, sizeof *tables.channels)};
    char name[32];
    test_begin("neighbours: KVQuant's thresholds, tables and cache as the original's");
    for (int bits = 2; bits <= 4; bits++) {
        const Row row = {.w = bits};
        for (int i = 0; i < 2; i++) {
            fit_table(&samples[i], D, WINDOW, 2, &row, i ? NULL : tables.channels, tables.lut[i]);
            snprintf(name, sizeof name, "kvq.%d.lut_%c", bits, "kv"[i]);
            expect_golden(name, tables.lut[i], 1e-5f);
        }
        float low[D], high[D];
        for (int i = 0; i < D; i++)
            low[i] = tables.channels[i].low, high[i] = tables.channels[i].high;
        expect_golden("kvq.k_lo", low, 1e-6f);
        expect_golden("kvq.k_hi", high, 1e-6f);
        float *keys = golden_copy("kvq.k"), *values = golden_copy("kvq.v");
        kvquant_cache(&tables, D, &row, keys, values, WINDOW);
        snprintf(name, sizeof name, "kvq.%d.k", bits);
        expect_golden(name, keys, 1e-5f);
        snprintf(name, sizeof name, "kvq.%d.v", bits);
        expect_golden(name, values, 1e-5f);
        free(keys), free(values);
    }
    free(tables.channels);
}

/* ---- the forward and the backward pass ------------------------------------------------------ */

static float rough(uint64_t *seed, float size) {
    return size * random_float(seed);
}

static void fill_random(float *x, size_t n, float size, uint64_t *seed) {
    for (size_t i = 0; i < n; i++) x[i] = rough(seed, size);
}

/* sum_i layer(x)_i r_i */
static double projected_output(const Config *c, const Layer *layer, State *s, int T, Trace *t,
                               const float *x, const float *r) {
    copy_floats(t->x, x, (size_t)T * c->dim);
    trace_layer(c, layer, s, T, t);
    double sum = 0;
    for (int i = 0; i < T * c->dim; i++) sum += (double)s->x[i] * r[i];
    return sum;
}

/* Moves x [n] by +-h along a random direction; the slope of f must be the gradient's. */
static void test_backward(void) {
    test_begin("neighbours: a layer's gradient is the slope of its output");
    const Config c = {.dim = 16,
                      .hidden_dim = 24,
                      .n_layers = 1,
                      .n_heads = 4,
                      .n_kv_heads = 2,
                      .head_dim = 4,
                      .vocab_size = 1,
                      .rope_theta = 1e4,
                      .norm_eps = 1e-5f};
    enum { T = 300 }; // more than one block of queries
    uint64_t seed = 5;
    Layer layer;
    Gradient g;
    float norms[2][16] = {{0}}, *weights[9], h = 1e-2f;
    double *gradients[9];
    size_t sizes[9];
    for (int k = 0; k < 9; k++) {
        int rows = 1, columns = c.dim;
        if (k < N_LINEARS) linear_shape(&c, k, &rows, &columns);
        sizes[k] = (size_t)rows * columns;
        weights[k] = k < N_LINEARS ? new_floats(sizes[k]) : norms[k - N_LINEARS];
        gradients[k] = allocate(sizes[k], sizeof(double));
        fill_random(weights[k], sizes[k], 0.5f, &seed);
        if (k < N_LINEARS) {
            layer.linears[k] = (Linear){.N = rows, .K = columns, .dtype = F32, .w = weights[k]};
            g.linears[k] = gradients[k];
        } else {
            for (int i = 0; i < c.dim; i++) norms[k - N_LINEARS][i] += 1;
            g.norms[k - N_LINEARS] = gradients[k];
        }
    }
    layer.attention_norm = norms[0];
    layer.ffn_norm = norms[1];
    State *s = state_new(&c, T, T, 16);
    Trace trace = trace_new(&c, T);
    size_t n = (size_t)T * c.dim;
    float *x = new_floats(n), *r = new_floats(n), *dx = new_floats(n);
    fill_random(x, n, 1, &seed);
    fill_random(r, n, 1, &seed);
    projected_output(&c, &layer, s, T, &trace, x, r);
    copy_floats(dx, r, n);
    layer_backward(&c, &layer, s, &trace, T, dx, &g);
    for (int k = 0; k < 10; k++) {
        size_t size = k < 9 ? sizes[k] : n;
        float *at = k < 9 ? weights[k] : x, *direction = new_floats(size), *old = new_floats(size);
        double want = 0, f[2];
        copy_floats(old, at, size);
        fill_random(direction, size, 1, &seed);
        for (size_t i = 0; i < size; i++) want += direction[i] * (k < 9 ? gradients[k][i] : dx[i]);
        for (int sign = 0; sign < 2; sign++) {
            for (size_t i = 0; i < size; i++) at[i] = old[i] + (sign ? h : -h) * direction[i];
            f[sign] = projected_output(&c, &layer, s, T, &trace, x, r);
        }
        copy_floats(at, old, size);
        double slope = (f[1] - f[0]) / (2 * h);
        check(fabs(slope - want) < 0.02 * fabs(want) + 0.02, "%s: slope %g, gradient %g",
              k < N_LINEARS ? linear_names[k]
              : k < 9       ? "norm"
                            : "input",
              slope, want);
        free(direction), free(old);
    }
    for (int k = 0; k < 9; k++) {
        if (k < N_LINEARS) free(weights[k]);
        free(gradients[k]);
    }
    free(x), free(r), free(dx);
    trace_free(&trace);
    state_free(s);
}

static void test_adamw(void) {
    test_begin("neighbours: two steps of AdamW");
    float w = 2, moments[1][2] = {{0}};
    adamw(&w, (double[]){0.5}, moments, 1, 0.1,
          1); // the first step is the rate, whatever the slope
    double want = 2 * (1 - 0.1 * 1e-5) - 0.1 * 0.5 / (0.5 + 1e-6);
    check(fabs(w - want) < 1e-6, "%.8f, expected %.8f", w, want);
    adamw(&w, (double[]){-1}, moments, 1, 0.1, 2);
    double m = (.9 * .05 - .1) / (1 - .81), v = (.999 * .00025 + .001) / (1 - .999 * .999);
    want = want * (1 - 0.1 * 1e-5) - 0.1 * m / (sqrt(v) + 1e-6);
    check(fabs(w - want) < 1e-5, "%.8f, expected %.8f", w, want);
}

/* What a line of the analysis says of numbers a and of what they became. */
static void expect_line(const char *what, const double found[3], const float *a, const float *b,
                        size_t n) {
    double sums[5] = {0}; // of powers of a
    double noise = 0;
    for (size_t i = 0; i < n; i++) {
        for (int k = 1; k < 5; k++) sums[k] += pow(a[i], k) / n;
        noise += pow((double)a[i] - b[i], 2) / n;
    }
    double m = sums[1], variance = sums[2] - m * m;
    double fourth = sums[4] - 4 * m * sums[3] + 6 * m * m * sums[2] - 3 * m * m * m * m;
    double want[3] = {10 * log10(sums[2] / noise), noise, fourth / (variance * variance) - 3};
    for (int i = 0; i < 3 && !isnan(found[i]); i++) {
        double tolerance = 1e-3 * fabs(want[i]) + (i == 1 ? 0 : 1e-3);
        check(found[i] == want[i] || fabs(found[i] - want[i]) < tolerance, "%s: %g, expected %g",
              what, found[i], want[i]);
    }
}

static void test_analysis(const Model *m, State *s, const int *tokens) {
    test_begin("neighbours: the analysis has SQNR, MSE and kurtosis of every linear");
    enum { T = 64 };
    const Config *c = &m->config;
    Variant original = variant_new(m, 0), v = variant_new(m, 0);
    round_model(&v, &(Row){.w = 4}, round_asymmetric);
    char *text[2], name[32];
    size_t bytes[2], n = (size_t)T * c->dim;
    FILE *linears = open_memstream(&text[0], &bytes[0]);
    FILE *channels = open_memstream(&text[1], &bytes[1]);
    analyze(&original, &v, s, tokens, T, "method,setting", linears, channels);
    fclose(linears), fclose(channels);
    int lines[2] = {0},
        want[2] = {c->n_layers * N_LINEARS, c->n_layers * (2 * c->dim + c->hidden_dim)};
    for (int i = 0; i < 2; i++) {
        for (const char *at = text[i]; (at = strchr(at, '\n')); at++) lines[i]++;
        check(lines[i] == want[i], "%d lines, expected %d", lines[i], want[i]);
    }
    double x[3], w[3], y[3];
    int read = sscanf(text[0], "method,setting,0,%31[^,],%lf,%lf,%lf,%lf,%lf,%lf,%lf,%lf", name,
                      &x[0], &x[1], &w[0], &w[1], &y[0], &y[1], &x[2], &w[2]);
    check(read == 9 && !strcmp(name, linear_names[0]), "line %.200s", text[0]);
    const Linear *q = &original.m.layers[0].q, *rounded = &v.m.layers[0].q;
    float *in = new_floats(n), *out = new_floats(2 * (size_t)T * q->N);
    embed(m, tokens, T, in);
    rmsnorm(in, m->layers[0].attention_norm, T, c->dim, c->norm_eps, in);
    linear(q, in, T, out);
    linear(rounded, in, T, out + (size_t)T * q->N);
    y[2] = NAN; // its kurtosis is not there
    expect_line("x", x, in, in, n);
    expect_line("w", w, weights_of(q), weights_of(rounded), (size_t)q->N * q->K);
    expect_line("y", y, out, out + (size_t)T * q->N, (size_t)T * q->N);
    free(in), free(out), free(text[0]), free(text[1]);
    variant_free(&original), variant_free(&v);
}

static void test_rounded_attention(Variant *v, State *s, const int *tokens, int T) {
    test_begin("neighbours: attention with operands of 4 bits, against the definition");
    const Config *c = &v->m.config;
    int d = c->head_dim, q_dim = c->n_heads * d, kv_dim = c->n_kv_heads * d, bits = v->x_bits = 4;
    embed(&v->m, tokens, T, s->x);
    rmsnorm(s->x, v->m.layers[0].attention_norm, T, c->dim, c->norm_eps, s->xb);
    rounded_attention(v, s, 0, T);
    float *found = new_floats((size_t)T * q_dim), *row = new_floats(T);
    copy_floats(found, s->att, (size_t)T * q_dim);
    project(v, s, 0, T);
    turn_all(c, s, T);
    for (int i = 0; i < T * c->n_heads; i++) round_asymmetric(s->q + i * d, d, bits);
    for (int i = 0; i < T * c->n_kv_heads; i++) round_asymmetric(s->keys + i * d, d, bits);
    for (int i = 0; i < kv_dim; i++) {
        for (int t = 0; t < T; t++) row[t] = s->values[t * kv_dim + i];
        round_asymmetric(row, T, bits);
        for (int t = 0; t < T; t++) s->values[t * kv_dim + i] = row[t];
    }
    double off = 0, size = 0;
    for (int i = 0; i < T * c->n_heads; i++) {
        int t = i / c->n_heads, at = i % c->n_heads / (c->n_heads / c->n_kv_heads) * d;
        double sum = 0;
        for (int j = 0; j <= t; j++) {
            double score = 0;
            for (int k = 0; k < d; k++) score += s->q[i * d + k] * s->keys[j * kv_dim + at + k];
            sum += row[j] = exp(score / sqrt(d));
        }
        for (int j = 0; j <= t; j++) row[j] /= sum;
        round_asymmetric(row, t + 1, bits);
        for (int k = 0; k < d; k++) {
            double out = 0;
            for (int j = 0; j <= t; j++) out += row[j] * s->values[j * kv_dim + at + k];
            off += pow(out - found[i * d + k], 2);
            size += out * out;
        }
    }
    check(off < 1e-4 * size, "off by %g of its size", sqrt(off / size));
    free(found), free(row);
}

/* What rows share, for the embedded model with windows of T tokens. */
static void test_forward_pass(void) {
    enum { T = 384 };
    Checkpoint *file = checkpoint_open("data/tiny");
    Model *m = model_load(file);
    Config one = m->config;
    one.n_layers = 1;
    int n, windows, *tokens = text_tokens(file, m->config.bos, "data/eval.txt", &n);
    State *s = state_new(&one, T, T, 16);
    test_begin("neighbours: the float variant is the model");
    Variant v = variant_new(m, 0);
    double want = model_perplexity(m, tokens, T, T, 0, &windows, NULL);
    double found = exp(variant_loss(&v, s, tokens, T));
    check(fabs(found / want - 1) < 1e-5, "perplexity %.6f, the model's is %.6f", found, want);

    test_begin("neighbours: attention with nothing rounded, and with 16 bits, is the model's");
    const Row rows_16[] = {{.w = 16, .group = 32}, {.w = 16, .group = 32, .stream = true}};
    for (int i = 0; i < 3; i++) {
        v.attention = i < 2 ? kivi_attention : rounded_attention;
        v.row = &rows_16[i % 2];
        v.x_bits = 14;
        found = exp(variant_loss(&v, s, tokens, T));
        check(fabs(found / want - 1) < 1e-3, "case %d: perplexity %.6f, expected %.6f", i, found,
              want);
    }
    v.attention = NULL;

    test_begin("neighbours: the loss's gradient is its slope");
    size_t size = (size_t)T * one.dim;
    float *x = new_floats(size), *dx = new_floats(size), *out = new_floats(size);
    uint64_t seed = 3;
    fill_random(x, size, 1, &seed);
    copy_floats(s->x, x, size);
    output_loss(m, s, tokens, T, out);
    norm_backward(x, m->norm, out, T, one.dim, one.norm_eps, dx, NULL);
    double slope = 0, f[2], h = 1e-2;
    float *direction = new_floats(size);
    for (size_t i = 0; i < size; i++) { // along the gradient, each number 1 or -1
        direction[i] = dx[i] > 0 ? 1 : -1;
        slope += dx[i] * direction[i];
    }
    for (int sign = 0; sign < 2; sign++) {
        for (size_t i = 0; i < size; i++) s->x[i] = x[i] + (sign ? h : -h) * direction[i];
        f[sign] = output_loss(m, s, tokens, T, NULL);
    }
    check(fabs((f[1] - f[0]) / (2 * h) / slope - 1) < 0.02, "slope %g, gradient %g",
          (f[1] - f[0]) / (2 * h), slope);

    test_analysis(m, s, tokens);
    test_rounded_attention(&v, s, tokens, T);

    test_begin("neighbours: one thread or three, the same bits");
    float *w[2][2], *inputs[2];
    double losses[2], *gradients[2];
    const Layer *layer = &v.m.layers[1];
    Trace trace = trace_new(&one, T);
    for (int i = 0; i < 2; i++) {
        omp_set_num_threads(i ? 3 : 1);
        w[0][i] = by_hessian(spqr, (Row){.w = 3, .group = 16, .threshold = .25}, NULL);
        w[1][i] = by_hessian(gptq_asymmetric, (Row){.w = 3, .group = 128}, NULL);
        v.attention = kivi_attention, v.row = &(Row){.w = 2, .group = 32, .stream = true};
        losses[i] = variant_loss(&v, s, tokens, T);
        v.attention = rounded_attention, v.x_bits = 6;
        losses[i] += variant_loss(&v, s, tokens, T);
        inputs[i] = memcpy(new_floats(size), dx, size * sizeof *dx);
        copy_floats(trace.x, x, size);
        trace_layer(&one, layer, s, T, &trace);
        gradients[i] = allocate((size_t)layer->q.N * layer->q.K, sizeof(double));
        Gradient g = {.linears = {gradients[i]}};
        layer_backward(&one, layer, s, &trace, T, inputs[i], &g);
    }
    omp_set_num_threads(omp_get_num_procs());
    for (int i = 0; i < 2; i++)
        check(!memcmp(w[i][0], w[i][1], N * K * sizeof(float)), "%s's weights differ",
              i ? "GPTQ" : "SpQR");
    check(losses[0] == losses[1], "losses %.17g and %.17g", losses[0], losses[1]);
    check(!memcmp(inputs[0], inputs[1], size * sizeof(float)), "gradients of the input differ");
    check(!memcmp(gradients[0], gradients[1], (size_t)layer->q.N * layer->q.K * sizeof(double)),
          "gradients of q's weights differ");
    for (int i = 0; i < 2; i++) free(w[0][i]), free(w[1][i]), free(inputs[i]), free(gradients[i]);
    trace_free(&trace);
    free(x), free(dx), free(out), free(direction), free(tokens);
    variant_free(&v);
    state_free(s);
    model_free(m);
    checkpoint_close(file);
}

void test_neighbours(void) {
    golden = checkpoint_open("test/data/neighbours.safetensors");
    test_rounding();
    test_smoothquant();
    test_lut_gemm();
    test_hessian_methods();
    test_kivi();
    test_kvquant();
    test_backward();
    test_adamw();
    test_forward_pass();
    checkpoint_close(golden);
}
