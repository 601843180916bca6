/* QQQ in plain C, no CUDA. From top to bottom:
 *
 *   1  the model: the forward pass, float and W4A8
 *   2  the numbers of W4A8, and the linear layer that they make
 *   3  the method: what quantizes a layer, step by step
 *   4  the same, faster: attention, products, Cholesky, 16-bit floats
 *   5  a model from its files: JSON, safetensors, config.json
 *   6  small things: errors, options, progress, files that are written
 *
 * qqq.h has the contracts of the public functions. A first reader may stop after section 3. */
#define _GNU_SOURCE
#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS // without them jsmn needs quadratic time for long arrays
#include <jsmn.h>
#include <utf8proc.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "qqq.h"

bool textbook = false, use_amx = true;

/* ---- what is defined further down ---- */

/* A float matrix seen as W [n][k]: element (n, k) is w[n * row + k * column]. */
typedef struct {
    const void *w;
    DType dtype;
    size_t row, column;
} View;

static void make_printable(char *text);
static void show_windows(int done, int total);
static int smaller(int a, int b);
static float max_magnitude(const float *x, size_t n);
static float clamp(float x, float low, float high);
static void round_to_nearest(Machine *m, const float *w, const float *importance, Linear *l);
static Sampling sample_of(int n_windows, int length);
static inline float exponential(float x);
static float dot(const float *x, const float *y, int n);
static double dot_double(const double *x, const double *y, int n);
static void attend_prompt(const Config *c, State *s, int l, int T, int pos);
static void attend_token(const Config *c, State *s, int l, int pos);
static void fast_linears(const Linear *w, int n, const float *x, int T, float *const *y);
static bool factor(double *V, size_t K);
static void invert(const double *V, size_t K, double *U);

/* ============================================================================================
 * 1  The model
 *
 *   x <- x + o(attention(rope(q(h)), rope(k(h)), v(h))),   h = rmsnorm(x)
 *   x <- x + down(silu(gate(h)) * up(h)),                  h = rmsnorm(x)
 *
 * LLaMA, arXiv 2302.13971; grouped-query attention, arXiv 2305.13245; LLaMA 3, arXiv 2407.21783.
 *
 * One thread computes each output number, in one order: results do not depend on the number of
 * threads.
 * ============================================================================================ */

void forward(const Model *m, State *s, const int *tokens, int T, int pos) {
    const Config *c = &m->config;
    if (T < 1 || T > s->max_T || pos < 0 || pos > s->context - T)
        die("%d tokens at position %d do not fit a context of %d", T, pos, s->context);
    // 1. each token is a row of the embedding
    for (int t = 0; t < T; t++) {
        if (tokens[t] < 0 || tokens[t] >= c->vocab_size)
            die("token %d is outside the vocabulary of %d", tokens[t], c->vocab_size);
        floats(m->embedding.w, m->embedding.dtype, (size_t)tokens[t] * c->dim, c->dim,
               s->x + (size_t)t * c->dim);
    }
    // 2. the layers
    for (int l = 0; l < c->n_layers; l++) layer_forward(c, &m->layers[l], s, l, T, pos);
    // 3. the final norm; logits() multiplies its output by lm_head
    rmsnorm(s->x, m->norm, T, c->dim, c->norm_eps, s->x);
}

void layer_forward(const Config *c, const Layer *layer, State *s, int l, int T, int pos) {
    rmsnorm(s->x, layer->attention_norm, T, c->dim, c->norm_eps, s->xb);
    attention_block(c, layer, s, l, T, pos);
    add_linear(&layer->o, s->att, T, s->xb, s->x);

    rmsnorm(s->x, layer->ffn_norm, T, c->dim, c->norm_eps, s->xb);
    ffn_block(c, layer, s, T);
    add_linear(&layer->down, s->gate, T, s->xb, s->x);
}

const float *logits(const Model *m, State *s, int first, int n) {
    linear(&m->lm_head, s->x + (size_t)first * m->config.dim, n, s->logits);
    return s->logits;
}

/* y_i = x_i / sqrt(mean(x^2) + eps) * weight_i.   RMSNorm, arXiv 1910.07467 */
void rmsnorm(const float *x, const float *weight, int T, int dim, float eps, float *y) {
#pragma omp parallel for if (T > 1)
    for (int t = 0; t < T; t++) {
        const float *in = x + (size_t)t * dim;
        float *out = y + (size_t)t * dim;
        float scale = 1.0f / sqrtf(dot(in, in, dim) / dim + eps);
        for (int i = 0; i < dim; i++) out[i] = in[i] * scale * weight[i];
    }
}

/* gate <- silu(gate) * up,   silu(z) = z / (1 + exp(-z)).   SwiGLU, arXiv 2002.05202 */
static void swiglu(float *gate, const float *up, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void ffn_block(const Config *c, const Layer *layer, State *s, int T) {
    linears(&layer->gate, 2, s->xb, T, (float *[]){s->gate, s->up});
    swiglu(s->gate, s->up, (size_t)T * c->hidden_dim);
}

void add_linear(const Linear *w, const float *in, int T, float *buffer, float *x) {
    linear(w, in, T, buffer);
    for (size_t i = 0; i < (size_t)T * w->N; i++) x[i] += buffer[i];
}

/* RoPE rotates the pair (x_i, x_(i + d/2)) of each head by the angle pos * f_i,
 * f_i = theta^(-2i/d) (arXiv 2104.09864, in Hugging Face's order). LLaMA 3.1 divides the low
 * frequencies, those with a wavelength 2 pi / f above original_context / low_freq_factor, by
 * `factor`, keeps those below original_context / high_freq_factor, and interpolates in between. */
void rope_angles(const Config *c, int pos, float *cos_sin) {
    for (int i = 0; i < c->head_dim / 2; i++) {
        double f = pow(c->rope_theta, -2.0 * i / c->head_dim);
        if (c->rope_factor) {
            double turns = c->rope_original_context * f / (2 * M_PI); // in the original context
            double mix = (turns - c->rope_low_freq_factor) /
                         (c->rope_high_freq_factor - c->rope_low_freq_factor);
            mix = mix < 0 ? 0 : mix > 1 ? 1 : mix;
            f *= mix + (1 - mix) / c->rope_factor;
        }
        cos_sin[2 * i] = cos(pos * f);
        cos_sin[2 * i + 1] = sin(pos * f);
    }
}

/* Rotates x [T][n_heads][head_dim], the queries or keys of positions pos .. pos + T - 1. */
static void rope(const State *s, float *x, int T, int n_heads, int head_dim, int pos) {
    int half = head_dim / 2;
#pragma omp parallel for if (T > 1)
    for (int t = 0; t < T; t++) {
        const float *angle = s->rope + (size_t)(pos + t) * head_dim;
        for (int h = 0; h < n_heads; h++) {
            float *v = x + ((size_t)t * n_heads + h) * head_dim;
            for (int i = 0; i < half; i++) {
                float a = v[i], b = v[i + half], c = angle[2 * i], s_ = angle[2 * i + 1];
                v[i] = a * c - b * s_;
                v[i + half] = b * c + a * s_;
            }
        }
    }
}

/* ---- the KV cache
 *
 * A row is the key (after RoPE) or the value of one KV head at one position: head_dim floats, or
 * with -k 8 the scale s and head_dim int8 codes q of quantize_row(), x = q s. ---- */

size_t kv_row_bytes(const Config *c, int kv_bits) {
    size_t d = c->head_dim;
    return kv_bits == 16 ? d * sizeof(float) : sizeof(float) + d;
}

/* The row of position p. A layer's heads 0 .. n_kv_heads - 1 are keys, as many more are values. */
static uint8_t *cache_row(const Config *c, const State *s, int l, int head, int p) {
    size_t row = ((size_t)l * 2 * c->n_kv_heads + head) * s->context + p;
    return s->cache + row * kv_row_bytes(c, s->kv_bits);
}

static void write_row(const float *x, int d, int bits, uint8_t *row) {
    float scale;
    if (bits == 16) {
        memcpy(row, x, d * sizeof *x);
        return;
    }
    scale = quantize_row(x, d, (int8_t *)row + sizeof scale);
    memcpy(row, &scale, sizeof scale);
}

static void read_row(const uint8_t *row, int d, int bits, float *x) {
    float scale;
    if (bits == 16) {
        memcpy(x, row, d * sizeof *x);
        return;
    }
    memcpy(&scale, row, sizeof scale);
    const int8_t *q = (const int8_t *)row + sizeof scale;
    for (int i = 0; i < d; i++) x[i] = q[i] * scale;
}

/* Keys and values of T tokens, from s->keys and s->values into the cache. */
static void write_cache(const Config *c, State *s, int l, int T, int pos) {
    int d = c->head_dim, n = c->n_kv_heads;
#pragma omp parallel for if (T > 1)
    for (int t = 0; t < T; t++)
        for (int h = 0; h < n; h++) {
            size_t at = ((size_t)t * n + h) * d;
            write_row(s->keys + at, d, s->kv_bits, cache_row(c, s, l, h, pos + t));
            write_row(s->values + at, d, s->kv_bits, cache_row(c, s, l, n + h, pos + t));
        }
}

/* ---- attention ---- */

/* p [n] <- softmax(p) */
static void softmax(float *p, int n) {
    float max = p[0];
    double sum = 0; // in float, 8000 terms of one size would lose four digits
    for (int i = 1; i < n; i++) max = p[i] > max ? p[i] : max;
    for (int i = 0; i < n; i++) p[i] = exponential(p[i] - max);
    for (int i = 0; i < n; i++) sum += p[i];
    for (int i = 0; i < n; i++) p[i] /= (float)sum;
}

/* s->att [T][n_heads][head_dim] = softmax(q K^T / sqrt(head_dim)) V. A token attends to the
 * positions up to its own. n_heads / n_kv_heads query heads share a KV head. */
void attention(const Config *c, State *s, int l, int T, int pos) {
    int d = c->head_dim, n_kv = c->n_kv_heads, group = c->n_heads / n_kv;
#pragma omp parallel for
    for (int i = 0; i < T * c->n_heads; i++) {
        int h = i % c->n_heads / group, n = pos + i / c->n_heads + 1; // KV head, positions
        const float *q = s->q + (size_t)i * d;
        float *att = s->att + (size_t)i * d, *p = allocate(n, sizeof *p), row[d];
        // 1. how well the query matches the key of each position
        for (int j = 0; j < n; j++) {
            read_row(cache_row(c, s, l, h, j), d, s->kv_bits, row);
            for (int k = 0; k < d; k++) p[j] += q[k] * row[k];
            p[j] /= sqrtf(d);
        }
        // 2. the same as probabilities
        softmax(p, n);
        // 3. the mean of the values under these probabilities
        memset(att, 0, d * sizeof *att);
        for (int j = 0; j < n; j++) {
            read_row(cache_row(c, s, l, n_kv + h, j), d, s->kv_bits, row);
            for (int k = 0; k < d; k++) att[k] += p[j] * row[k];
        }
        free(p);
    }
}

void attention_block(const Config *c, const Layer *layer, State *s, int l, int T, int pos) {
    linears(&layer->q, 3, s->xb, T, (float *[]){s->q, s->keys, s->values});
    rope(s, s->q, T, c->n_heads, c->head_dim, pos);
    rope(s, s->keys, T, c->n_kv_heads, c->head_dim, pos);
    write_cache(c, s, l, T, pos);
    if (textbook) attention(c, s, l, T, pos);
    else if (T == 1) attend_token(c, s, l, pos);
    else attend_prompt(c, s, l, T, pos);
}

/* ---- tokens from logits, and perplexity ---- */

int argmax(const float *logits, int n) {
    int best = 0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(logits[i])) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

Score score(const float *logits, int n, int token) {
    float max = logits[0];
    for (int i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
    double sum = 0;
    for (int i = 0; i < n; i++) sum += expf(logits[i] - max);
    return (Score){log(sum) + max - logits[token], logits[token] == max};
}

Perplexity perplexity(Engine *e, const int *tokens, int n, int length, int max_windows,
                      void (*progress)(int done, int total)) {
    int total = n / length;
    if (max_windows > 0 && total > max_windows) total = max_windows;
    e->start(e, 1, length);
    Score *scores = allocate(length, sizeof *scores);
    double sum = 0, squares = 0;
    // 1. the mean loss of each window
    for (int w = 0; w < total; w++) {
        double loss = 0;
        const int *window = tokens + (size_t)w * length;
        e->score(e, 0, window, window + 1, length - 1, 0, scores);
        for (int t = 0; t < length - 1; t++) loss += scores[t].nll;
        loss /= length - 1;
        sum += loss;
        squares += loss * loss;
        if (progress) progress(w + 1, total);
    }
    free(scores);
    // 2. their mean and its standard error, which exp() turns into those of the perplexity
    double mean = sum / total, variance = (squares / total - mean * mean) * total / (total - 1);
    return (Perplexity){exp(mean), exp(mean) * sqrt(variance / total), total};
}

/* ---- shapes, sizes and buffers ---- */

const char *const linear_names[N_LINEARS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

void linear_shape(const Config *c, int k, int *N, int *K) {
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    int rows[] = {q, kv, kv, c->dim, c->hidden_dim, c->hidden_dim, c->dim};
    int columns[] = {c->dim, c->dim, c->dim, q, c->dim, c->dim, c->hidden_dim};
    *N = rows[k];
    *K = columns[k];
}

void layer_free(Layer *layer) {
    for (int k = 0; k < N_LINEARS; k++) linear_free(&layer->linears[k]);
    free(layer->attention_norm);
    *layer = (Layer){0};
}

void model_free(Model *m) {
    for (int l = 0; l < m->config.n_layers; l++) layer_free(&m->layers[l]);
    if (!m->config.tied) linear_free(&m->lm_head);
    linear_free(&m->embedding);
    free(m->layers);
    free(m->norm);
    free(m);
}

static size_t linear_bytes(const Linear *l) {
    size_t N = l->N, K = l->K;
    if (!l->qweight) return N * K * dtype_size(l->dtype) + (l->s_channel ? N * sizeof(float) : 0);
    return N * K / 2 + N * sizeof(float) + (l->s_group ? N * K / GROUP : 0);
}

size_t model_bytes(const Model *m) {
    const Config *c = &m->config;
    size_t norms = (2 * c->n_layers + 1) * (size_t)c->dim * sizeof(float);
    size_t bytes = norms + linear_bytes(&m->lm_head) + c->dim * dtype_size(m->embedding.dtype);
    for (int i = 0; i < c->n_layers; i++)
        for (int k = 0; k < N_LINEARS; k++) bytes += linear_bytes(&m->layers[i].linears[k]);
    return bytes;
}

State *state_new(const Config *c, int context, int max_T, int kv_bits) {
    State *s = allocate(1, sizeof *s);
    size_t T = max_T, q_dim = (size_t)c->n_heads * c->head_dim;
    size_t kv_dim = (size_t)c->n_kv_heads * c->head_dim;
    size_t rows = (size_t)c->n_layers * 2 * c->n_kv_heads * context;
    *s = (State){.context = context, .max_T = max_T, .kv_bits = kv_bits};
    // 1. the tokens at work
    s->x = allocate(T * c->dim, sizeof(float));
    s->xb = allocate(T * c->dim, sizeof(float));
    s->q = allocate(T * q_dim, sizeof(float));
    s->keys = allocate(T * kv_dim, sizeof(float));
    s->values = allocate(T * kv_dim, sizeof(float));
    s->att = allocate(T * q_dim, sizeof(float));
    s->gate = allocate(T * c->hidden_dim, sizeof(float));
    s->up = allocate(T * c->hidden_dim, sizeof(float));
    s->logits = allocate((size_t)LOGIT_ROWS * c->vocab_size, sizeof(float));
    // 2. the whole context
    s->cache = allocate(rows, kv_row_bytes(c, kv_bits));
    s->rope = allocate((size_t)context * c->head_dim, sizeof(float));
#pragma omp parallel for
    for (int pos = 0; pos < context; pos++)
        rope_angles(c, pos, s->rope + (size_t)pos * c->head_dim);
    return s;
}

void state_free(State *s) {
    if (!s) return;
    float *buffers[] = {s->x,   s->xb,   s->q,  s->keys, s->values,
                        s->att, s->gate, s->up, s->rope, s->logits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(s->cache);
    free(s);
}

/* ---- the engine on the CPU ---- */

enum { PROMPT_CHUNK = 512 }; // tokens per forward(), at most

typedef struct {
    Engine engine;
    State *state;        // NULL before start()
    const float *logits; // [vocab_size] after the last token fed
    int pos, chosen;     // the position that follows it
} CpuEngine;

static bool engine_fits(Engine *engine, int n_sequences, int context) {
    engine->state_bytes = engine->position_bytes * context;
    return n_sequences == 1;
}

static void engine_start(Engine *engine, int n_sequences, int context) {
    CpuEngine *e = (CpuEngine *)engine;
    state_free(e->state);
    e->state =
        state_new(&engine->model->config, context, smaller(context, PROMPT_CHUNK), engine->kv_bits);
    engine->n_sequences = n_sequences;
    engine->context = context;
    engine->state_bytes = engine->position_bytes * context;
}

static void engine_feed(Engine *engine, int sequence, const int *tokens, int n, int pos) {
    CpuEngine *e = (CpuEngine *)engine;
    (void)sequence; // there is one
    int T = 0;
    for (int i = 0; i < n; i += T) {
        T = smaller(n - i, e->state->max_T);
        forward(engine->model, e->state, tokens + i, T, pos + i);
    }
    e->logits = logits(engine->model, e->state, T - 1, 1);
    e->pos = pos + n;
}

static const int *engine_chosen(Engine *engine) {
    CpuEngine *e = (CpuEngine *)engine;
    e->chosen = argmax(e->logits, engine->model->config.vocab_size);
    return &e->chosen;
}

static const float *engine_logits(Engine *engine) {
    return ((CpuEngine *)engine)->logits;
}

static void engine_step(Engine *engine, const int *tokens, const int *positions) {
    int token = tokens ? *tokens : *engine_chosen(engine);
    engine_feed(engine, 0, &token, 1, positions ? *positions : ((CpuEngine *)engine)->pos);
}

static void engine_score(Engine *engine, int sequence, const int *tokens, const int *targets, int n,
                         int pos, Score *scores) {
    const Model *m = engine->model;
    State *s = ((CpuEngine *)engine)->state;
    size_t vocab = m->config.vocab_size;
    (void)sequence;
    for (int i = 0, T; i < n; i += T) {
        T = smaller(n - i, s->max_T);
        forward(m, s, tokens + i, T, pos + i);
        for (int t = 0, rows; t < T; t += rows) {
            rows = smaller(T - t, LOGIT_ROWS);
            const float *l = logits(m, s, t, rows);
#pragma omp parallel for
            for (int r = 0; r < rows; r++)
                scores[i + t + r] = score(l + r * vocab, vocab, targets[i + t + r]);
        }
    }
}

/* Bytes per second that all threads together read: the best of eight passes over 512 MB, more than
 * a cache holds. */
static double memory_bandwidth(void) {
    const size_t n = (size_t)64 << 20;
    uint64_t *buffer = allocate(n, sizeof *buffer), total = 0;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) buffer[i] = i; // every page now exists, near its reader
    double best = INFINITY;
    for (int pass = 0; pass < 8; pass++) {
        double start = seconds();
#pragma omp parallel for schedule(static) reduction(+ : total)
        for (size_t i = 0; i < n; i++) total += buffer[i];
        best = fmin(best, seconds() - start);
    }
    if (total != 8 * (n / 2 * (n - 1))) die("the memory does not hold what was written to it");
    free(buffer);
    return n * sizeof *buffer / best;
}

static void engine_free(Engine *engine) {
    state_free(((CpuEngine *)engine)->state);
    free(engine);
}

Engine *engine_new(const Model *m, bool on_gpu, int kv_bits) {
    if (kv_bits != 16 && kv_bits != 8) die("-k %d: the KV cache has 16 or 8 bits", kv_bits);
    if (on_gpu) return gpu_engine(m, kv_bits);
    const Config *c = &m->config;
    CpuEngine *e = allocate(1, sizeof *e);
    size_t rows = (size_t)2 * c->n_layers * c->n_kv_heads; // per position
    e->engine = (Engine){.model = m,
                         .kv_bits = kv_bits,
                         .position_bytes = rows * kv_row_bytes(c, kv_bits),
                         .weight_bytes = model_bytes(m),
                         .step_bytes = model_bytes(m),
                         .start = engine_start,
                         .fits = engine_fits,
                         .feed = engine_feed,
                         .step = engine_step,
                         .chosen = engine_chosen,
                         .logits = engine_logits,
                         .score = engine_score,
                         .bandwidth = memory_bandwidth,
                         .free = engine_free};
    return &e->engine;
}

bool choose_gpu(Device device, const Config *c, bool w4a8, char *where, size_t size) {
    char what[300] = "";
    bool gpu = device != CPU && gpu_can_run && gpu_can_run(c, w4a8, what, sizeof what);
    if (device == CUDA && !gpu_can_run)
        die_usage("-d cuda: this program was built without CUDA, only -d cpu works");
    if (device == CUDA && !gpu) die("-d cuda: %s", what);
    snprintf(where, size, gpu ? "%s%s" : *what ? "%s: %s" : "%s", gpu ? "" : "the CPU", what);
    return gpu;
}

/* ============================================================================================
 * 2  The numbers of W4A8
 *
 *   activations, per token:   s_a = max|x| / 127,   a = clamp(rint(x / s_a), -128, 127)
 *   weights, per channel:     w = w8 s_channel,     w8 = q,           q in -7..7
 *   weights, per group:       w = w8 s_channel,     w8 = q s_group,   q in -8..7, s_group in 1..15
 *   lm_head in 8 bits:        w = w8 s_channel,     w8 = q,           q in -127..127
 *
 *   y = x W^T:   acc[t][n] = sum_k a[t][k] w8[n][k],   y[t][n] = (acc s_a[t]) s_channel[n]
 *
 * QQQ, arXiv 2406.09904, section 3.3; integer group scales: QoQ, arXiv 2405.04532.
 * ============================================================================================ */

float quantize_row(const float *x, int K, int8_t *a) {
    float max = max_magnitude(x, K), s_a = max < INFINITY ? max / 127.0f : NAN;
    for (int k = 0; k < K; k++) {
        if (!(s_a > 0.0f)) {
            a[k] = 0;
            continue;
        }
        float r = rintf(x[k] / s_a); // a subnormal s_a is inexact: clamp
        a[k] = r < -128.0f ? -128 : r > 127.0f ? 127 : (int8_t)r;
    }
    return s_a;
}

void pack_row(const int8_t *q, int K, uint8_t *qweight) {
    for (int j = 0; j < K / 2; j++) qweight[j] = (q[2 * j] + 8) | (q[2 * j + 1] + 8) << 4;
}

void unpack_row(const uint8_t *qweight, int K, int8_t *q) {
    for (int k = 0; k < K; k++) q[k] = (qweight[k / 2] >> k % 2 * 4 & 0x0f) - 8;
}

/* Row n of a quantized linear: its codes [K/2], and its group scales [K/128] or NULL. */
static uint8_t *codes_of(const Linear *l, size_t n) {
    return l->qweight + n * l->K / 2;
}

static uint8_t *groups_of(const Linear *l, size_t n) {
    return l->s_group ? l->s_group + n * (l->K / GROUP) : NULL;
}

static float lowest_code(const Linear *l) {
    return l->s_group ? -8.0f : -7.0f;
}

static int smaller(int a, int b) {
    return a < b ? a : b;
}

/* w8 [K] of row n. */
static void integer_row(const Linear *l, int n, int8_t *w8) {
    const uint8_t *s_group = groups_of(l, n);
    if (l->dtype == I8) {
        memcpy(w8, (const int8_t *)l->w + (size_t)n * l->K, l->K);
        return;
    }
    unpack_row(codes_of(l, n), l->K, w8);
    for (int k = 0; s_group && k < l->K; k++) w8[k] *= s_group[k / GROUP];
}

void dequantize_row(const Linear *l, int n, float *w) {
    int8_t w8[l->K];
    integer_row(l, n, w8);
    for (int k = 0; k < l->K; k++) w[k] = w8[k] * l->s_channel[n];
}

/* ---- the linear layer, y [T][N] = x [T][K] W^T, as the equations have it ---- */

static void integer_linear(const Linear *w, const float *x, int T, float *y) {
    int8_t a[w->K], w8[w->K];
    for (int t = 0; t < T; t++, x += w->K, y += w->N) {
        float s_a = quantize_row(x, w->K, a);
        for (int n = 0; n < w->N; n++) {
            int32_t acc = 0;
            integer_row(w, n, w8);
            for (int k = 0; k < w->K; k++) acc += a[k] * w8[k];
            y[n] = ((float)acc * s_a) * w->s_channel[n];
        }
    }
}

static void float_linear(const Linear *w, const float *x, int T, float *y) {
    float row[w->K];
    for (int t = 0; t < T; t++, x += w->K, y += w->N)
        for (int n = 0; n < w->N; n++) {
            floats(w->w, w->dtype, (size_t)n * w->K, w->K, row);
            y[n] = 0;
            for (int k = 0; k < w->K; k++) y[n] += x[k] * row[k];
        }
}

/* With `textbook` these two run; otherwise section 4, which does the same faster. */
void linears(const Linear *w, int n, const float *x, int T, float *const *y) {
    if (!textbook) {
        fast_linears(w, n, x, T, y);
        return;
    }
    for (int i = 0; i < n; i++)
        if (w[i].s_channel) integer_linear(&w[i], x, T, y[i]);
        else float_linear(&w[i], x, T, y[i]);
}

void linear(const Linear *w, const float *x, int T, float *y) {
    linears(w, 1, x, T, &y);
}

Linear quantized_new(int N, int K, int group_size) {
    Linear l = {.N = N, .K = K, .dtype = U8};
    l.qweight = allocate((size_t)N * K / 2, 1);
    l.s_channel = allocate(N, sizeof *l.s_channel);
    if (group_size > 0) l.s_group = allocate((size_t)N * K / group_size, 1);
    return l;
}

void linear_free(Linear *l) {
    free(l->s_channel);
    if (!l->mapped) free(l->w), free(l->qweight), free(l->s_group);
    *l = (Linear){0};
}

Linear quantize_bytes(const Linear *w) {
    size_t N = w->N, K = w->K;
    Linear l = {.N = N, .K = K, .dtype = I8};
    int8_t *q = l.w = allocate(N, K);
    l.s_channel = allocate(N, sizeof *l.s_channel);
#pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        float row[K];
        floats(w->w, w->dtype, n * K, K, row);
        l.s_channel[n] = quantize_row(row, K, q + n * K);
    }
    return l;
}

/* ============================================================================================
 * 3  The method
 *
 *   W   float weights of a linear [N][K], after steps 1 and 2
 *   F   the linear's inputs in the float model [T][K], T all calibration tokens
 *   X   the inputs that it will get, from the layers quantized so far, in int8 [T][K]
 *   D   the float model's residual stream minus that of the quantized one [T][N]; for o and down,
 *       which write to it. For the others it does not count: D = 0
 *
 *   steps 1 and 2    W and F become easier to round: rotation, smoothing
 *   step  3          the range in which each row is rounded
 *   step  4          GPTQ rounds W' to Q so that  |X W'^T - X Q^T|  is small: one column after the
 *                    other, and the columns still free make up for the error of each
 *   step  5          W' = W + 1/2 M H^-1,   H = X^T X (damped),   M = (D + (F - X) W^T)^T X
 *
 * Step 5 makes the target of step 4, so it runs first; then step 3 chooses the ranges of W'. Q here
 * are weights again, codes times scales.
 *
 * Two models run side by side over the calibration windows, a layer at a time: the float model, and
 * the one whose layers so far are quantized. QQQ, arXiv 2406.09904; a comment says what goes beyond
 * it.
 *
 * First comes the driver, which reads like the list above. It works on the CPU or on a GPU, by way
 * of the table of Operations: o->add_moments(m, ...) is a loop below or a kernel in kernels.cu.
 * Each step's equation, its part of the driver and its loops follow.
 * ============================================================================================ */

struct Quantizer {
    const Operations *o;
    Machine *m;
    Method method;
    Config config;
    int n, length, chunk; // windows, tokens of each, windows that go through a layer together
    bool calibrate;       // H is wanted: by GPTQ, or by the search of ranges
    bool outside;         // the residual streams are in host memory
    bool planning;        // array() only counts
    size_t bytes;         // of all arrays

    // The residual streams of both models, and a chunk of each if they are in host memory.
    float *x_float, *x_quant; // [n][length][dim]
    float *staged[2];         // [T][dim]

    // The layer at work: its norms are in float_layer, which quantized shares.
    Layer float_layer, quantized;
    Linear codes;  // one linear as a file has it, of any shape up to the largest
    int8_t *signs; // [dim] of the rotation
    float *max, *scales[N_SMOOTHED], *sample[N_SMOOTHED]; // [K], [K], [SEARCH_TOKENS][K]
    float *y;                                             // [SEARCH_TOKENS][N] float outputs

    // A chunk of T tokens.
    float *f, *x; // [T][K] F, later F - X; and X
    float *d;     // [T][dim] D

    // Linears that share their input.
    Sums *H;           // [K][K] X^T X
    Sums *C, *M;       // [dim][dim] (F - X)^T X inside; [dim][K] outside
    Inverse inverse;   // of H
    float *importance; // [K]
    float *target;     // [N][K] W'
};

static void load_layer(Quantizer *q, const Layer *layer, int l);
static void smooth(Quantizer *q, int l, Smoothing found[N_SMOOTHED]);
static void quantize_half(Quantizer *q, int l, bool ffn, Layer *out, Errors *errors);

void quantize_layer(Quantizer *q, const Layer *layer, int l, Layer *out, Smoothing *found,
                    Errors *errors) {
    const Config *c = &q->config;
    Layer *f = &q->float_layer;
    // The float layer, in a form that is easier to round.
    load_layer(q, layer, l);
    if (q->method.signs) rotate_layer(q->o, q->m, c, q->signs, f); // step 1
    if (q->method.smooth) smooth(q, l, found);                     // step 2

    // Norms stay float; steps 1 and 2 may have changed them.
    *out = (Layer){.attention_norm = allocate(2 * (size_t)c->dim, sizeof(float))};
    out->ffn_norm = out->attention_norm + c->dim;
    q->o->copy(q->m, out->attention_norm, f->attention_norm, c->dim * sizeof(float));
    q->o->copy(q->m, out->ffn_norm, f->ffn_norm, c->dim * sizeof(float));

    // Steps 3 to 5 for q, k, v, then o; for gate, up, then down.
    quantize_half(q, l, false, out, errors);
    quantize_half(q, l, true, out, errors);
}

/* ---- the windows, chunk by chunk ---- */

typedef struct {
    int first, T; // tokens
} Chunk;

/* The next chunk of the first `windows`, or after the last one false; it starts with zeros. */
static bool next_chunk_of(const Quantizer *q, int windows, Chunk *c) {
    c->first += c->T;
    c->T = smaller(q->chunk * q->length, windows * q->length - c->first);
    return c->T > 0;
}

static size_t stream_bytes(const Quantizer *q, Chunk c) {
    return (size_t)c.T * q->config.dim * sizeof(float);
}

/* A chunk of a residual stream [T][dim], in the memory of the machine; put_back() after it was
 * changed. */
static float *chunk_of(Quantizer *q, float *stream, Chunk c) {
    float *x = stream + (size_t)c.first * q->config.dim;
    if (!q->outside) return x;
    float *to = q->staged[stream == q->x_quant];
    q->o->copy(q->m, to, x, stream_bytes(q, c));
    return to;
}

static void put_back(Quantizer *q, float *stream, Chunk c, const float *x) {
    if (!q->outside) return;
    q->o->copy(q->m, stream + (size_t)c.first * q->config.dim, x, stream_bytes(q, c));
}

static void show(const Quantizer *q, int l, int linear) {
    if (q->method.progress) q->method.progress(l, linear, q->config.n_layers);
}

/* ---- steps 3 to 5: half a layer, attention (q, k, v inside, o outside) or FFN (gate and up, down)
 *
 * Each linear is calibrated on the int8 inputs X that reach it through the linears quantized before
 * it, and aims back towards the float model. An extension: the published code collects all Hessians
 * in one pass over the float layer. ---- */

/* What follows from H for the linears that share an input: q->importance [K], the weight of the
 * columns in the search of ranges, and for GPTQ q->inverse. */
static void digest_hessian(Quantizer *q, int l, int linear) {
    const int K = q->float_layer.linears[linear].K;
    double *diagonal = allocate(K, sizeof *diagonal), mean = 0;
    float *importance = allocate(K, sizeof *importance);
    // 1. the sum of the squares of each input, over all windows
    q->o->complete(q->m, K, q->H, diagonal);
    for (int k = 0; k < K; k++) mean += diagonal[k] / K;
    if (!(mean < INFINITY))
        die("layer %d: the input of %s holds NaN or infinity", l, linear_names[linear]);
    // 2. importance; dead columns get the mean
    for (int k = 0; k < K; k++) importance[k] = diagonal[k] > 0 ? diagonal[k] : mean > 0 ? mean : 1;
    // 3. the inverse, which makes importance that of GPTQ
    q->inverse.K = K;
    if (q->method.gptq)
        invert_hessian(q->o, q->m, q->H, diagonal, q->method.act_order, &q->inverse, importance);
    q->o->copy(q->m, q->importance, importance, K * sizeof *importance);
    free(diagonal);
    free(importance);
}

/* A W4A8 linear of the machine as one of the host. */
static Linear download_linear(const Quantizer *q, const Linear *l) {
    Linear host = quantized_new(l->N, l->K, q->method.group_size);
    size_t n = (size_t)l->N * l->K;
    q->o->copy(q->m, host.qweight, l->qweight, n / 2);
    q->o->copy(q->m, host.s_channel, l->s_channel, l->N * sizeof(float));
    if (l->s_group) q->o->copy(q->m, host.s_group, l->s_group, n / GROUP);
    return host;
}

/* Quantizes the linears first .. first + count - 1 of layer l, which share their input: from
 * q->float_layer to q->quantized, and to `out` for the file. With calibration H holds X^T X, and C
 * (of several linears) or M (of a single one) their part of step 5. */
static void quantize_linears(Quantizer *q, int l, int first, int count, Layer *out,
                             Errors *errors) {
    const Operations *o = q->o;
    const bool gptq = q->method.gptq && q->calibrate;
    const float *weighting = q->calibrate && q->method.mse ? q->importance : NULL;
    for (int i = first; i < first + count; i++) {
        const Linear *linear = &q->float_layer.linears[i];
        const float *w = linear->w;
        show(q, l, i);

        // Step 3: ranges, and rounding to nearest. GPTQ has this error to beat.
        Linear *codes = &q->codes;
        codes->N = linear->N;
        codes->K = linear->K;
        o->round_to_nearest(q->m, w, weighting, codes);
        errors[i].before = q->calibrate ? o->relative_error(q->m, w, codes, q->H) : NAN;
        errors[i].after = errors[i].before;
        if (gptq) {
            // Step 5: move the target. Inside D is 0, so M = W (F - X)^T X = W C.
            const Sums *C = count > 1 ? q->C : NULL, *M = C ? NULL : q->M;
            o->correct(q->m, w, codes->N, C, M, &q->inverse, q->target);

            // Step 4: round the target.
            o->gptq(q->m, q->target, &q->inverse, weighting, codes);
            errors[i].after = o->relative_error(q->m, w, codes, q->H);
        }

        // The quantized layer and the file get the codes.
        o->arrange(q->m, codes, &q->quantized.linears[i]);
        out->linears[i] = download_linear(q, codes);
    }
}

/* Sums over all windows for q, k, v or gate, up, whose inputs are the normed residual streams. */
static void collect_inside(Quantizer *q, int l, bool ffn) {
    const Operations *o = q->o;
    const int dim = q->config.dim;
    const float *norm = ffn ? q->float_layer.ffn_norm : q->float_layer.attention_norm;
    const size_t bytes = (size_t)dim * dim * o->sum_bytes;
    // 1. H = C = 0
    o->zero(q->m, q->H, bytes);
    if (q->method.gptq) o->zero(q->m, q->C, bytes);
    // 2. H += X^T X, C += (F - X)^T X
    for (Chunk c = {0}; next_chunk_of(q, q->n, &c);) {
        show(q, l, ffn ? 4 : 0);
        o->norm(q->m, chunk_of(q, q->x_float, c), norm, c.T, false, q->f);
        o->norm(q->m, chunk_of(q, q->x_quant, c), norm, c.T, true, q->x);
        o->subtract(q->m, q->f, q->x, (size_t)c.T * dim, q->f); // F - X
        o->add_moments(q->m, q->x, dim, q->f, dim, c.T, q->H, q->method.gptq ? q->C : NULL);
    }
}

/* The same for o or down, whose inputs have passed the linears just quantized. The float model's
 * residual stream leaves the half layer; the quantized model's is as it was before. */
static void collect_outside(Quantizer *q, int l, bool ffn) {
    const Operations *o = q->o;
    const int dim = q->config.dim, number = ffn ? 6 : 3;
    const Linear *outside = &q->float_layer.linears[number];
    const size_t K = outside->K;
    o->zero(q->m, q->max, dim * sizeof *q->max);
    if (q->calibrate) o->zero(q->m, q->H, K * K * o->sum_bytes);
    if (q->calibrate && q->method.gptq) o->zero(q->m, q->M, dim * K * o->sum_bytes);
    for (Chunk c = {0}; next_chunk_of(q, q->n, &c);) {
        show(q, l, number);
        // 1. F, and D while both streams are at the same point
        float *x_float = chunk_of(q, q->x_float, c), *x_quant = NULL;
        o->inside(q->m, &q->float_layer, ffn, x_float, c.T, q->f);
        if (q->calibrate) {
            x_quant = chunk_of(q, q->x_quant, c);
            o->subtract(q->m, x_float, x_quant, (size_t)c.T * dim, q->d);
        }

        // 2. the float model goes on
        o->add_linear(q->m, outside, q->f, c.T, x_float);
        put_back(q, q->x_float, c, x_float);
        const Sampling none = {.length = c.T + 1, .stride = 1}; // no first token from 1 on
        o->observe(q->m, x_float, c.T, dim, 1, none, q->max, NULL);
        if (!q->calibrate) continue;

        // 3. X, F - X and D + (F - X) W^T: all that the output lacks, if W stays as it is
        o->inside(q->m, &q->quantized, ffn, x_quant, c.T, q->x);
        o->subtract(q->m, q->f, q->x, c.T * K, q->f);
        if (q->method.gptq) o->add_linear(q->m, outside, q->f, c.T, q->d);

        // 4. H and M
        o->add_moments(q->m, q->x, K, q->d, dim, c.T, q->H, q->method.gptq ? q->M : NULL);
    }
}

/* Of the float model's stream behind this linear, by q->max. */
static void require_finite_stream(const Quantizer *q, int l, int linear) {
    int dim = q->config.dim;
    float max[dim];
    q->o->copy(q->m, max, q->max, sizeof max);
    if (!all_finite(max, dim))
        die("layer %d: the output of %s holds NaN or infinity", l, linear_names[linear]);
}

/* Quantizes half of layer l. */
static void quantize_half(Quantizer *q, int l, bool ffn, Layer *out, Errors *errors) {
    int first = ffn ? 4 : 0, n_inside = ffn ? 2 : 3, outside = first + n_inside;
    // 1. q, k, v or gate, up
    if (q->calibrate) {
        collect_inside(q, l, ffn);
        digest_hessian(q, l, first);
    }
    quantize_linears(q, l, first, n_inside, out, errors);

    // 2. o or down
    collect_outside(q, l, ffn);
    if (q->calibrate) digest_hessian(q, l, outside);
    require_finite_stream(q, l, outside);
    quantize_linears(q, l, outside, 1, out, errors);
    if (!q->calibrate) return;

    // 3. the quantized model's residual stream leaves the half layer too
    for (Chunk c = {0}; next_chunk_of(q, q->n, &c);) {
        show(q, l, outside);
        float *x_quant = chunk_of(q, q->x_quant, c);
        q->o->inside(q->m, &q->quantized, ffn, x_quant, c.T, q->x);
        q->o->add_linear(q->m, &q->quantized.linears[outside], q->x, c.T, x_quant);
        put_back(q, q->x_quant, c, x_quant);
    }
}

/* The same forward steps on the CPU, window by window, with section 1's functions. */

struct Machine {
    Workload work;
    State *state;     // buffers of one window
    void *arrays[64]; // [n_arrays], some 40
    int n_arrays;
};

/* Each row of x [T][K] becomes a s_a, the int8 values that a W4A8 linear makes of it. That linear
 * will find the same a and s_a in them. */
static void round_activations(float *x, int T, int K) {
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)T; t++) {
        int8_t a[K];
        float s_a = quantize_row(x + t * K, K, a);
        for (int k = 0; k < K; k++) x[t * K + k] = a[k] * s_a;
    }
}

static void norm_rows(Machine *m, const float *x, const float *weight, int T, bool int8, float *y) {
    const Config *c = &m->work.config;
    rmsnorm(x, weight, T, c->dim, c->norm_eps, y);
    if (int8) round_activations(y, T, c->dim);
}

static void run_inside(Machine *m, const Layer *layer, bool ffn, const float *x, int T, float *y) {
    const Config *c = &m->work.config;
    const int length = m->work.length;
    const size_t dim = c->dim, K = ffn ? layer->down.K : layer->o.K;
    const float *norm = ffn ? layer->ffn_norm : layer->attention_norm;
    State *s = m->state;
    // 1. each window by itself: tokens do not see other windows
    for (size_t t = 0; t < (size_t)T; t += length) {
        rmsnorm(x + t * dim, norm, length, dim, c->norm_eps, s->xb);
        if (ffn) ffn_block(c, layer, s, length);
        else attention_block(c, layer, s, 0, length, 0);
        memcpy(y + t * K, ffn ? s->gate : s->att, length * K * sizeof *y);
    }
    // 2. what a W4A8 o or down makes of it
    if (layer->q.dtype == U8) round_activations(y, T, K);
}

static void run_outside(Machine *m, const Linear *w, const float *in, int T, float *x) {
    (void)m;
    float *y = allocate((size_t)T * w->N, sizeof *y);
    add_linear(w, in, T, y, x);
    free(y);
}

static void subtract(Machine *m, const float *a, const float *b, size_t n, float *difference) {
    (void)m;
    for (size_t i = 0; i < n; i++) difference[i] = a[i] - b[i];
}

static void sum_moments(Machine *m, const float *x, int K, const float *d, int N, int T, Sums *H,
                        Sums *M) {
    (void)m;
    add_moments((double *)H, x, K, x, K, T);
    if (M) add_moments((double *)M, d, N, x, K, T);
}

static void copy_diagonal(Machine *m, int K, Sums *H, double *diagonal) {
    (void)m;
    for (size_t k = 0; k < (size_t)K; k++) diagonal[k] = ((const double *)H)[k * (K + 1)];
}

/* The weights of a layer and its norms from the mapped file. */
static void load_layer(Quantizer *q, const Layer *layer, int l) {
    const size_t bytes = q->config.dim * sizeof(float);
    q->o->copy(q->m, q->float_layer.attention_norm, layer->attention_norm, bytes);
    q->o->copy(q->m, q->float_layer.ffn_norm, layer->ffn_norm, bytes);
    for (int k = 0; k < N_LINEARS; k++)
        if (!q->o->read(q->m, &layer->linears[k], q->float_layer.linears[k].w))
            die("tensor model.layers.%d.%s.weight holds NaN or infinity", l, linear_names[k]);
}

static bool read_floats(Machine *m, const Linear *from, float *w) {
    (void)m;
    size_t n = (size_t)from->N * from->K;
    floats(from->w, from->dtype, 0, n, w);
    return all_finite(w, n);
}

Linear float_copy(const Linear *l, const char *name) {
    Linear copy = {.N = l->N, .K = l->K, .dtype = F32};
    copy.w = allocate((size_t)l->N * l->K, sizeof(float));
    if (!read_floats(NULL, l, copy.w)) die("tensor %s.weight holds NaN or infinity", name);
    return copy;
}

void require_finite(const Linear *l, const char *name) {
    float row[l->K];
    for (size_t n = 0; n < (size_t)l->N; n++) {
        floats(l->w, l->dtype, n * l->K, l->K, row);
        if (!all_finite(row, l->K)) die("tensor %s.weight holds NaN or infinity", name);
    }
}

/* ---- step 1: rotation
 *
 *   R = diag(signs) H_D / sqrt(D),  H_D the Hadamard matrix of dim D,  H_d of head_dim
 *   E <- E R,   W <- W diag(norm) R for q, k, v, gate, up and lm_head,  norm <- 1,
 *   W <- R^T W for o and down,   W_v,h <- H_d^T W_v,h / sqrt(d),   W_o,h <- W_o,h H_d / sqrt(d)
 *
 * For n = m 2^k, m odd, H_n is the Hadamard matrix of 2^k times (Kronecker) the Hartley matrix of
 * m, cos(2 pi ij / m) + sin(2 pi ij / m): so n may be 576 or 3072. Both are symmetric and,
 * divided by the root of their size, orthogonal. H_n is not the Hessian H of the later steps. The
 * residual stream is x R instead of x. R is orthogonal, so RMSNorm without weights commutes with R,
 * and the model computes the same; but an outlying channel is now spread over all. QuaRot, arXiv
 * 2404.00456. ---- */

void rotate_layer(const Operations *o, Machine *m, const Config *c, const int8_t *signs, Layer *l) {
    float ones[c->dim];
    for (int i = 0; i < c->dim; i++) ones[i] = 1.0f;

    // 1. q, k, v, gate and up read the residual stream: their norm moves in, then R.
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *w = &l->linears[k];
        if (k == 3 || k == 6) continue; // o, down
        o->scale(m, w->N, w->K, k < 3 ? l->attention_norm : l->ffn_norm, NULL, w->w);
        o->rotate(m, w->N, w->K, w->K, false, signs, w->w);
    }
    o->copy(m, l->attention_norm, ones, sizeof ones);
    o->copy(m, l->ffn_norm, ones, sizeof ones);

    // 2. Each head's values turn by H_d, and o turns them back.
    o->rotate(m, l->v.N, l->v.K, c->head_dim, true, NULL, l->v.w);
    o->rotate(m, l->o.N, l->o.K, c->head_dim, false, NULL, l->o.w);

    // 3. o and down write to the residual stream.
    o->rotate(m, l->o.N, l->o.K, c->dim, true, signs, l->o.w);
    o->rotate(m, l->down.N, l->down.K, c->dim, true, signs, l->down.w);
}

void hadamard(double *x, int n) {
    // 1. 2^k blocks of m by sums and differences, in k passes over x
    int m = n / (n & -n); // n = m 2^k, m odd
    for (int half = m; half < n; half *= 2)
        for (int i = 0; i < n; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                double a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }

    // 2. the Hartley matrix within each block
    double *cas = allocate(2 * (size_t)m, sizeof *cas), *y = cas + m, scale = 1 / sqrt(n);
    for (int i = 0; i < m; i++) cas[i] = cos(2 * M_PI * i / m) + sin(2 * M_PI * i / m);
    for (; n > 0; n -= m, x += m) {
        memset(y, 0, m * sizeof *y);
        for (int i = 0; i < m; i++)
            for (int j = 0, ij = 0; j < m; j++, ij = (ij + i) % m) y[i] += x[j] * cas[ij];
        for (int i = 0; i < m; i++) x[i] = y[i] * scale;
    }
    free(cas);
}

void random_signs(uint64_t seed, int n, int8_t *signs) {
    for (int i = 0; i < n; i++) { // splitmix64
        uint64_t z = seed += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        signs[i] = z >> 63 ? -1 : 1;
    }
}

/* A vector of n elements, `stride` floats apart, times diag(signs) H / sqrt(n). */
static void rotate_vector(float *x, size_t stride, int n, const int8_t *signs, double *buffer) {
    for (int i = 0; i < n; i++)
        buffer[i] = signs ? signs[i] * (double)x[i * stride] : x[i * stride];
    hadamard(buffer, n);
    for (int i = 0; i < n; i++) x[i * stride] = buffer[i];
}

static void rotate(Machine *m, int N, int K, int n, bool outputs, const int8_t *signs, float *w) {
    (void)m;
    const size_t stride = outputs ? K : 1, vectors = (size_t)N * K / n;
#pragma omp parallel
    {
        double *buffer = allocate(n, sizeof *buffer);
#pragma omp for
        for (size_t i = 0; i < vectors; i++) // with a stride: the columns of [n][K] matrices
            rotate_vector(w + i / stride * n * stride + i % stride, stride, n, signs, buffer);
        free(buffer);
    }
}

static void scale_weights(Machine *m, int N, int K, const float *columns, const float *rows,
                          float *w) {
    (void)m;
#pragma omp parallel for
    for (size_t n = 0; n < (size_t)N; n++)
        for (size_t k = 0; k < (size_t)K; k++)
            w[n * K + k] = w[n * K + k] * (columns ? columns[k] : 1) / (rows ? rows[n] : 1);
}

/* Embedding and lm_head turn on the CPU, some rows at a time. */
void rotate_ends(Linear *embedding, Linear *lm_head, float *norm, const int8_t *signs,
                 void (*progress)(int done, int total)) {
    enum { ROWS = 1024 }; // between two reports
    int N = embedding->N, K = embedding->K;
    for (int n = 0; n < N; n += ROWS) {
        int rows = smaller(ROWS, N - n);
        float *head = (float *)lm_head->w + (size_t)n * K;
        scale_weights(NULL, rows, K, norm, NULL, head);
        rotate(NULL, rows, K, K, false, signs, head);
        rotate(NULL, rows, K, K, false, signs, (float *)embedding->w + (size_t)n * K);
        if (progress) progress(n + rows, N);
    }
    for (int i = 0; i < K; i++) norm[i] = 1.0f;
}

/* ---- step 2: adaptive smoothing
 *
 *   s_j = max(1, max|F_j| / t),   F <- F diag(s)^-1,   W <- W diag(s)
 *
 * F W^T stays the same, but the channels of F that stand out above the threshold t no longer
 * coarsen the int8 steps of a whole token. Of some t the search takes the one with which the
 * quantized output is nearest to the float output. The maxima leave out the first token of each
 * window. QQQ, arXiv 2406.09904, section 3.1. ---- */

void smoothing_scales(const float *max, int K, float t, float *s) {
    for (int k = 0; k < K; k++) s[k] = max[k] > t ? max[k] / t : 1.0f;
}

void smooth_layer(const Operations *o, Machine *m, float *const s[N_SMOOTHED], Layer *l) {
    const float *qkv = s[SMOOTH_QKV], *gate_up = s[SMOOTH_GATE_UP], *down = s[SMOOTH_DOWN];
    int dim = l->q.K, hidden_dim = l->down.K;
    // q, k, v
    o->scale(m, dim, 1, NULL, qkv, l->attention_norm);
    for (int i = 0; i < 3; i++) o->scale(m, l->linears[i].N, dim, qkv, NULL, l->linears[i].w);
    // gate, up and down: down's input is silu(gate) up
    o->scale(m, dim, 1, NULL, gate_up, l->ffn_norm);
    o->scale(m, hidden_dim, dim, gate_up, NULL, l->gate.w);
    o->scale(m, hidden_dim, dim, gate_up, down, l->up.w);
    o->scale(m, dim, hidden_dim, down, NULL, l->down.w);
}

/* The linears that read each SmoothedInput. */
static const struct { int first, count; } readers[N_SMOOTHED] = {{0, 3}, {4, 2}, {6, 1}};

float search_smoothing(const Operations *o, Machine *m, const Linear *w, int n, const float *x,
                       int T, const float *max, float *y, float *s) {
    const int K = w->K;
    float *candidate = allocate(K, sizeof *candidate), *outputs[N_LINEARS];

    // 1. the float outputs, each linear's [T][N] behind the one before
    size_t N = 0;
    for (int i = 0; i < n; N += w[i++].N) outputs[i] = y + T * N;
    o->zero(m, y, T * N * sizeof *y);
    for (int i = 0; i < n; i++) o->add_linear(m, &w[i], x, T, outputs[i]);

    // 2. all thresholds, from one that smooths nothing downwards
    float best_t = 0;
    for (int k = 0; k < K; k++) best_t = max[k] > best_t ? max[k] : best_t;
    double least = INFINITY;
    for (float t = best_t; t > 0.1f; t *= 0.8f) {
        smoothing_scales(max, K, t, candidate);
        o->copy(m, s, candidate, K * sizeof *s);
        double distance = 0;
        for (int i = 0; i < n; i++) distance += o->smoothed_distance(m, &w[i], x, T, s, outputs[i]);
        if (distance < least) least = distance, best_t = t;
    }

    // 3. the scales of the best one
    smoothing_scales(max, K, best_t, candidate);
    o->copy(m, s, candidate, K * sizeof *s);
    free(candidate);
    return best_t;
}

/* A sample spread evenly over the first windows. It leaves out the first token of each window:
 * attention sinks there, on massive activations in channels that no other token drives (arXiv
 * 2402.17762), and s would serve that one token at the cost of all weights. */
static Sampling sample_of(int n_windows, int length) {
    int tokens = smaller(n_windows, SEARCH_WINDOWS) * (length - 1);
    int stride = (tokens - 1) / SEARCH_TOKENS + 1;
    return (Sampling){length, stride, tokens > 0 ? tokens / stride : 0};
}

/* Runs the first windows through the float layer. Sets the maxima, max[i] [K], and the samples of
 * the inputs of q, k, v, of gate and up, and of down. */
static void observe_inputs(Quantizer *q, int l, float *max[N_SMOOTHED]) {
    const Operations *o = q->o;
    const Layer *f = &q->float_layer;
    const int dim = q->config.dim, hidden = q->config.hidden_dim;
    const Sampling sample = sample_of(q->n, q->length);
    o->zero(q->m, q->max, (2 * (size_t)dim + hidden) * sizeof *q->max);
    for (Chunk c = {0}; next_chunk_of(q, smaller(q->n, SEARCH_WINDOWS), &c);) {
        show(q, l, 0);
        float *x = q->d; // a copy: the stream stays before this layer
        o->copy(q->m, x, chunk_of(q, q->x_float, c), stream_bytes(q, c));

        // 1. q, k, v
        o->norm(q->m, x, f->attention_norm, c.T, false, q->f);
        o->observe(q->m, q->f, c.T, dim, c.first, sample, max[0], q->sample[0]);

        // 2. gate and up, after attention
        o->inside(q->m, f, false, x, c.T, q->f);
        o->add_linear(q->m, &f->o, q->f, c.T, x);
        o->norm(q->m, x, f->ffn_norm, c.T, false, q->f);
        o->observe(q->m, q->f, c.T, dim, c.first, sample, max[1], q->sample[1]);

        // 3. down
        o->inside(q->m, f, true, x, c.T, q->f);
        o->observe(q->m, q->f, c.T, hidden, c.first, sample, max[2], q->sample[2]);
    }
}

/* Finds the thresholds of layer l and folds their scales into it. */
static void smooth(Quantizer *q, int l, Smoothing found[N_SMOOTHED]) {
    const int dim = q->config.dim;
    float *maxima[N_SMOOTHED] = {q->max, q->max + dim, q->max + 2 * dim};
    observe_inputs(q, l, maxima);
    for (int i = 0; i < N_SMOOTHED; i++) {
        show(q, l, 0);
        // 1. the maxima, on the host
        const Linear *w = &q->float_layer.linears[readers[i].first];
        const int K = w->K, T = sample_of(q->n, q->length).n;
        float *max = allocate(K, sizeof *max);
        q->o->copy(q->m, max, maxima[i], K * sizeof *max);
        if (!all_finite(max, K))
            die("layer %d: the input of %s holds NaN or infinity", l,
                linear_names[readers[i].first]);

        // 2. the search
        found[i].t = search_smoothing(q->o, q->m, w, readers[i].count, q->sample[i], T, max, q->y,
                                      q->scales[i]);
        found[i].n = 0;
        for (int k = 0; k < K; k++) found[i].n += max[k] > found[i].t;
        free(max);
    }
    smooth_layer(q->o, q->m, q->scales, &q->float_layer);
}

static void observe(Machine *m, const float *x, int T, int K, int first, Sampling sample,
                    float *max, float *rows) {
    (void)m;
    for (int t = 0; t < T; t++, x += K) {
        // 1. i counts tokens without the first ones of windows
        int token = first + t, i = token - token / sample.length - 1;
        if (token % sample.length == 0) continue;
        // 2. maxima
        for (int k = 0; k < K; k++) {
            float magnitude = fabsf(x[k]); // NaN stays in the maximum
            if (max[k] < magnitude || isnan(magnitude)) max[k] = magnitude;
        }
        // 3. one of every `stride` tokens
        if (i % sample.stride == 0 && i / sample.stride < sample.n)
            memcpy(rows + (size_t)(i / sample.stride) * K, x, K * sizeof *x);
    }
}

static double smoothed_distance(Machine *m, const Linear *w, const float *x, int T, const float *s,
                                const float *y) {
    const size_t N = w->N, K = w->K;
    float *smoothed = allocate(T * K, sizeof *smoothed), *output = allocate(T * N, sizeof *output);
    float *weights = allocate(N * K, sizeof *weights), *mean = allocate(K, sizeof *mean);

    // 1. X diag(s)^-1, whose mean squares weigh the columns; W diag(s)
    for (size_t i = 0; i < T * K; i++) {
        smoothed[i] = x[i] / s[i % K];
        mean[i % K] += smoothed[i] * smoothed[i] / T;
    }
    memcpy(weights, w->w, N * K * sizeof *weights);
    scale_weights(m, N, K, s, NULL, weights);

    // 2. their product in W4A8
    Linear candidate = quantized_new(N, K, m->work.group_size);
    round_to_nearest(m, weights, mean, &candidate);
    linear(&candidate, smoothed, T, output);

    // 3. the squared distance to the float output
    double sum = 0;
    for (size_t i = 0; i < T * N; i++)
        sum += ((double)output[i] - y[i]) * ((double)output[i] - y[i]);
    linear_free(&candidate);
    free(smoothed);
    free(output);
    free(weights);
    free(mean);
    return sum;
}

/* ---- step 3: the scales of a weight row
 *
 *   range = max|w|,  or the range p max|w| that minimizes  sum_k h_k (w_k - q_k scale)^2,
 *
 * h_k = H_kk, the sum of the squares of input k over the calibration tokens: what the rounding of
 * w_k alone adds to the squared error of the output. If GPTQ follows, h_k = sqrt(H_kk) / U_kk, see
 * compensated_importance(). The range of a row gives s_channel; each group has a range of its own,
 * which gives s_group. ---- */

static float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

/* The code of w under a scale, in low..7; groups have -8, channels do not. */
static float nearest_code(float w, float scale, float low) {
    return clamp(rintf(w / scale), low, 7.0f);
}

/* sum_k importance_k ((w_k - q_k scale) unit)^2 over n <= GROUP weights. */
static float rounding_error(const float *w, const float *importance, int n, float scale, float low,
                            float unit) {
    float squares[GROUP];
    for (int k = 0; k < n; k++) {
        float e = (w[k] - nearest_code(w[k], scale, low) * scale) * unit;
        squares[k] = e * e;
    }
    return dot(squares, importance, n);
}

/* A power of two that brings max near 1, so that squares of errors neither over- nor underflow. */
static float unit_of(float max) {
    return ldexpf(1.0f, -ilogbf(max));
}

/* The plain choice with groups: s_channel = max|w| 2/225, s_group = rint(max|w_g| 2/15 /
 * s_channel). So the group of the largest weight has 15 steps of s_channel per code, and 7.5 codes
 * reach the weight. */
static float plain_group_scales(const float *w, int K, uint8_t *s_group) {
    float scale = max_magnitude(w, K) / 225 * 2; // in this order nothing overflows
    for (int g = 0; g < K / GROUP; g++)
        s_group[g] = clamp(rintf(max_magnitude(w + g * GROUP, GROUP) / 15 * 2 / scale), 1, 15);
    return scale;
}

/* s_channel of a row: without groups p max|w| / 7, p = 1, .99 .. .21; with groups p max|w| 2/225,
 * p = 1, 39/40 .. 17/40, each with the best s_group [K/128]. Of equals the larger p and the smaller
 * s_group. */
static float search_scales(const float *w, const float *importance, int K, uint8_t *s_group) {
    const int candidates = s_group ? 24 : 80, integers = s_group ? 15 : 1;
    const float steps = s_group ? 40 : 100, low = s_group ? -8 : -7;
    float max = max_magnitude(w, K), unit = unit_of(max), least = INFINITY;
    float best_scale = s_group ? plain_group_scales(w, K, s_group) : max / 7;
    uint8_t candidate[K / GROUP + 1];
    for (int i = 0; i < candidates; i++) {
        float scale = (1.0f - i / steps) * max / (s_group ? 225 : 7) * (s_group ? 2 : 1);
        float total = 0.0f;

        // Under this s_channel each group has a best s_group of its own.
        for (int k = 0; k < K; k += GROUP) {
            float group_least = INFINITY;
            for (int s = 1; s <= integers; s++) {
                float error = rounding_error(w + k, importance + k, smaller(GROUP, K - k),
                                             s * scale, low, unit);
                if (error < group_least) group_least = error, candidate[k / GROUP] = s;
            }
            total += group_least;
        }

        // The s_channel of least total error wins, with its groups.
        if (total < least) {
            least = total;
            best_scale = scale;
            if (s_group) memcpy(s_group, candidate, K / GROUP);
        }
    }
    return best_scale;
}

float choose_scales(const float *w, const float *importance, int K, uint8_t *s_group) {
    float max = max_magnitude(w, K);
    if (max < FLT_MIN) { // zeros, or so near to it that a scale would underflow
        if (s_group) memset(s_group, 1, K / GROUP);
        return 1.0f;
    }
    if (importance) return search_scales(w, importance, K, s_group);
    return s_group ? plain_group_scales(w, K, s_group) : max / 7;
}

static void round_to_nearest(Machine *m, const float *w, const float *importance, Linear *l) {
    (void)m;
    const size_t N = l->N, K = l->K;
#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < N; n++) {
        int8_t q[K];
        uint8_t *s_group = groups_of(l, n);
        float s_channel = choose_scales(w + n * K, importance, K, s_group);
        for (size_t k = 0; k < K; k++)
            q[k] = nearest_code(w[n * K + k], s_channel * (s_group ? s_group[k / GROUP] : 1),
                                lowest_code(l));
        pack_row(q, K, codes_of(l, n));
        l->s_channel[n] = s_channel;
    }
}

/* ---- step 4: GPTQ
 *
 *   H = X^T X over the calibration tokens, H <- H + 0.01 mean(diag H) I,
 *   H^-1 = U^T U, U upper triangular;   for column i:  e = (w_i - q_i) / U_ii,
 *   w_j <- w_j - e U_ij for j > i;   q_i is the rounded weight, code times scale
 *
 * If the weights of a row change by d, the output changes by X d^T, squared and summed d H d^T.
 * Rounding column i fixes d_i. The columns behind it are free to make up for that: d H d^T is least
 * if they move by d_j = d_i B_ij / B_ii, B the inverse of H without the columns before i. Nobody
 * has to invert that many matrices: B = U'^T U', U' being U without the rows and columns before i.
 * So B_ij = U_ii U_ij, and B_ij / B_ii = U_ij / U_ii. With act-order the columns of large inputs
 * are rounded first, while many others are free. Damping keeps H invertible if tokens are few.
 * GPTQ, arXiv 2210.17323, where H is 2 X X^T; no factor changes the result. ---- */

/* Indices of diagonal [n] by falling value, equal ones from left to right; or all from left to
 * right. */
static void column_order(const double *diagonal, int n, bool act_order, int *order) {
    for (int i = 0; i < n; i++) { // insertion at the right index, found by bisection
        int low = act_order ? 0 : i, high = i;
        while (low < high) {
            int middle = (low + high) / 2;
            if (diagonal[order[middle]] >= diagonal[i]) low = middle + 1;
            else high = middle;
        }
        memmove(order + low + 1, order + low, (i - low) * sizeof *order);
        order[low] = i;
    }
}

/* H_kk is what rounding column k costs in the output if all others stay as they are; 1 / U_kk^2 is
 * what is left of the cost when the columns behind it make up for it. This is their geometric
 * mean. */
void compensated_importance(const int *order, const double *diagonal, int K, float *importance) {
    for (int i = 0; i < K; i++) {
        float *h = &importance[order[i]];
        *h = sqrt(*h) / diagonal[i];
    }
}

void invert_hessian(const Operations *o, Machine *m, const Sums *H, const double *diagonal,
                    bool act_order, Inverse *inverse, float *importance) {
    const int K = inverse->K;
    int *order = allocate(K, sizeof *order);
    double mean = 0, *u = allocate(K, sizeof *u);
    // 1. the order of the columns
    for (int k = 0; k < K; k++) mean += diagonal[k] / K;
    column_order(diagonal, K, act_order, order);
    o->copy(m, inverse->order, order, K * sizeof *order);
    // 2. U
    if (!o->invert(m, H, mean > 0 ? mean : 1, DAMPING * mean, inverse, u))
        die("a Hessian is not positive definite: are the activations finite?");
    if (importance) compensated_importance(order, u, K, importance);
    free(order);
    free(u);
}

static bool invert_damped(Machine *m, const Sums *sums, double dead, double damping,
                          Inverse *inverse, double *diagonal) {
    (void)m;
    const double *H = (const double *)sums;
    const size_t K = inverse->K;
    // 1. V = the damped H above its diagonal, columns in order
    double *V = allocate(K * K, sizeof *V);
    for (size_t i = 0; i < K; i++) {
        const double *row = H + inverse->order[i] * K;
        for (size_t j = i; j < K; j++) V[i * K + j] = row[inverse->order[j]];
        if (V[i * (K + 1)] == 0) V[i * (K + 1)] = dead;
        V[i * (K + 1)] += damping;
    }
    // 2. H = V V^T, so H^-1 = U^T U with U = V^-1
    bool positive = factor(V, K);
    if (positive) invert(V, K, inverse->U);
    for (size_t i = 0; i < K && positive; i++) diagonal[i] = inverse->U[i * (K + 1)];
    free(V);
    return positive;
}

enum { SIDE = 16 }; // rows that go through GPTQ side by side, each in a lane of its own

/* The column loop for rows n0 .. n0 + rows - 1 of l, whose scales are set. w [K][SIDE], columns in
 * the order of U, is used up; codes [SIDE][K] in the order of the file. */
static void gptq_columns(double *w, const Inverse *inverse, const Linear *l, size_t n0, int rows,
                         int8_t *codes) {
    const size_t K = l->K;
    double e[SIDE] = {0};
    for (size_t i = 0; i < K; i++) {
        // 1. round column i; e is its error over U_ii
        const double *U = inverse->U + i * K;
        const int k = inverse->order[i];
        for (int r = 0; r < rows; r++) {
            const uint8_t *s_group = groups_of(l, n0 + r);
            float scale = l->s_channel[n0 + r] * (s_group ? s_group[k / GROUP] : 1);
            float code = nearest_code(w[i * SIDE + r], scale, lowest_code(l));
            codes[r * K + k] = code;
            e[r] = (w[i * SIDE + r] - (double)code * scale) / U[i];
        }

        // 2. the columns behind it make up for the error
        for (size_t j = i + 1; j < K; j++)
            for (int r = 0; r < SIDE; r++) w[j * SIDE + r] -= e[r] * U[j];
    }
}

static void gptq(Machine *m, const float *w, const Inverse *inverse, const float *importance,
                 Linear *l) {
    (void)m;
    const size_t N = l->N, K = l->K;
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += SIDE) {
        int rows = smaller(N - n0, SIDE);
        double *lanes = allocate(K * SIDE, sizeof *lanes);
        int8_t *codes = allocate(K * SIDE, sizeof *codes);

        // 1. scales of the rows as they are before rounding; a row becomes a lane, columns in order
        for (int r = 0; r < rows; r++) {
            const float *row = w + (n0 + r) * K;
            l->s_channel[n0 + r] = choose_scales(row, importance, K, groups_of(l, n0 + r));
            for (size_t i = 0; i < K; i++) lanes[i * SIDE + r] = row[inverse->order[i]];
        }

        // 2. the columns, one by one
        gptq_columns(lanes, inverse, l, n0, rows, codes);
        for (int r = 0; r < rows; r++) pack_row(codes + r * K, K, codes_of(l, n0 + r));
        free(lanes);
        free(codes);
    }
}

static double relative_error(Machine *m, const float *w, const Linear *l, const Sums *H) {
    (void)m;
    const size_t N = l->N, K = l->K;
    // 1. H in float32; it is symmetric, so x H = x H^T is a linear
    float *h = allocate(K * K, sizeof *h);
    float *e = allocate(N * K, sizeof *e), *product = allocate(N * K, sizeof *product);
    for (size_t i = 0; i < K * K; i++) h[i] = ((const double *)H)[i];

    // 2. E
    for (size_t n = 0; n < N; n++) dequantize_row(l, n, e + n * K);
    for (size_t i = 0; i < N * K; i++) e[i] -= w[i];

    // 3. tr(A H A^T) is the sum over all elements of A times A H; for E, and for W
    double squares[2] = {0};
    for (int i = 0; i < 2; i++) {
        const float *a = i ? w : e;
        linear(&(Linear){.N = K, .K = K, .dtype = F32, .w = h}, a, N, product);
        for (size_t j = 0; j < N * K; j++) squares[i] += (double)a[j] * product[j];
    }
    free(h);
    free(e);
    free(product);
    bool zero = !(squares[0] > 0 && squares[1] > 0); // rounding may leave less than 0
    return zero ? 0 : sqrt(squares[0] / squares[1]);
}

/* ---- step 5: what GPTQ aims at
 *
 *   W' = W + 1/2 M (H + damping)^-1,   M = (D + (F - X) W^T)^T X
 *
 * With its own inputs X the linear gives X W^T, and o or down add it to a residual stream that is
 * off by D already. D + (F - X) W^T is all that is missing to the float model's; least squares from
 * X to it is M H^-1. Linears inside have no residual stream to mend: D is 0, M = W C, and one C
 * serves all that share their input. Half of the step generalizes better than the whole one, which
 * is GPTAQ's (arXiv 2504.02692). ---- */

static void correct(Machine *m, const float *w, int n_rows, const Sums *C, const Sums *M,
                    const Inverse *inverse, float *target) {
    (void)m;
    const size_t N = n_rows, K = inverse->K;
    const int *order = inverse->order;
    const double *U = inverse->U, *c = (const double *)C;
#pragma omp parallel
    {
        double *p = allocate(K, sizeof *p), *t = allocate(K, sizeof *t);
#pragma omp for
        for (size_t n = 0; n < N; n++) {
            // 1. row n of M, or of W C, in the order of U
            for (size_t j = 0; j < K; j++) t[j] = M ? ((const double *)M)[n * K + j] : 0;
            for (size_t k = 0; k < K && C; k++)
                for (size_t j = 0; j < K; j++) t[j] += w[n * K + k] * c[k * K + j];
            for (size_t j = 0; j < K; j++) p[j] = t[order[j]];

            // 2. t = p U^T, p = t U
            for (size_t i = 0; i < K; i++) t[i] = dot_double(U + i * K + i, p + i, K - i);
            memset(p, 0, K * sizeof *p);
            for (size_t i = 0; i < K; i++)
                for (size_t j = i; j < K; j++) p[j] += t[i] * U[i * K + j];

            // 3. half the step
            for (size_t j = 0; j < K; j++)
                target[n * K + order[j]] = w[n * K + order[j]] + CORRECTION * p[j];
        }
        free(p);
        free(t);
    }
}

/* ---- the quantizer's memory: one layer at a time, and the residual streams ---- */

/* An array that is to live until quantizer_free(). */
static void *array(Quantizer *q, size_t count, size_t size) {
    size_t bytes = (count * size + 255) / 256 * 256;
    q->bytes += bytes;
    return q->planning || !bytes ? NULL : q->o->array(q->m, bytes, false);
}

/* A layer, float and W4A8. The W4A8 linears lie one behind the other: so q, k, v can be multiplied
 * as one matrix. */
static void layer_arrays(Quantizer *q) {
    Layer *f = &q->float_layer, *quantized = &q->quantized;
    size_t total = 0, rows = 0;
    // 1. float weights, and the norms of both
    for (int k = 0; k < N_LINEARS; k++) {
        Linear w = {.dtype = F32};
        linear_shape(&q->config, k, &w.N, &w.K);
        w.w = array(q, (size_t)w.N * w.K, sizeof(float));
        f->linears[k] = w;
        total += (size_t)w.N * w.K;
        rows += w.N;
    }
    f->attention_norm = quantized->attention_norm = array(q, q->config.dim, sizeof(float));
    f->ffn_norm = quantized->ffn_norm = array(q, q->config.dim, sizeof(float));
    // 2. W4A8
    uint8_t *codes = array(q, total / 2, 1), *s_group = NULL;
    float *s_channel = array(q, rows, sizeof *s_channel);
    if (q->method.group_size > 0) s_group = array(q, total / GROUP, 1);
    for (int k = 0; k < N_LINEARS && !q->planning; k++) {
        int N = f->linears[k].N, K = f->linears[k].K;
        quantized->linears[k] = (Linear){N, K, U8, false, NULL, codes, s_channel, s_group};
        codes += (size_t)N * K / 2;
        s_channel += N;
        if (s_group) s_group += (size_t)N * K / GROUP;
    }
}

/* Makes all arrays, or counts their bytes. */
static void make_arrays(Quantizer *q, const Workload *work) {
    const Layer *f = &q->float_layer;
    const size_t dim = q->config.dim, hidden = q->config.hidden_dim, T = work->T;
    const size_t stream = (size_t)q->n * q->length * dim;
    const bool gptq = q->calibrate && q->method.gptq;
    size_t K = 0, N = 0, weights = 0; // the largest of all linears

    // 1. what the machine needs for itself; a layer
    q->bytes = q->o->start_bytes ? q->o->start_bytes(work) : 0;
    layer_arrays(q);
    for (int k = 0; k < N_LINEARS; k++) {
        const size_t n = f->linears[k].N, inputs = f->linears[k].K;
        N = n > N ? n : N;
        K = inputs > K ? inputs : K;
        weights = n * inputs > weights ? n * inputs : weights;
    }

    // 2. the residual streams, or what is staged of those on the host
    float **streams[] = {&q->x_float, &q->x_quant};
    for (int i = 0; i < 2; i++) {
        if (q->outside) q->staged[i] = array(q, T * dim, sizeof(float));
        if (!q->outside) *streams[i] = array(q, stream, sizeof(float));
        else if (!q->planning) *streams[i] = q->o->array(q->m, stream * sizeof(float), true);
    }

    // 3. one linear; a chunk
    q->codes = (Linear){.dtype = U8, .qweight = array(q, weights / 2, 1)};
    q->codes.s_channel = array(q, N, sizeof(float));
    if (q->method.group_size > 0) q->codes.s_group = array(q, weights / GROUP, 1);
    q->target = array(q, gptq ? weights : 0, sizeof(float));
    q->f = array(q, T * K, sizeof(float));
    q->x = array(q, T * K, sizeof(float));
    q->d = array(q, T * dim, sizeof(float));

    // 4. moments
    q->H = array(q, q->calibrate ? K * K : 0, q->o->sum_bytes);
    q->C = array(q, gptq ? dim * dim : 0, q->o->sum_bytes);
    q->M = array(q, gptq ? dim * K : 0, q->o->sum_bytes);
    q->inverse.U = array(q, gptq ? K * K : 0, sizeof(double));
    q->inverse.order = array(q, K, sizeof(int));
    q->importance = array(q, K, sizeof(float));

    // 5. rotation and smoothing
    const size_t qkv = f->q.N + f->k.N + f->v.N, searched = work->searched;
    q->signs = array(q, dim, 1);
    q->max = array(q, 2 * dim + hidden, sizeof(float));
    for (int i = 0; i < N_SMOOTHED; i++) {
        size_t inputs = i == SMOOTH_DOWN ? hidden : dim;
        q->scales[i] = array(q, inputs, sizeof(float));
        q->sample[i] = array(q, searched * inputs, sizeof(float));
    }
    q->y = array(q, searched * (qkv > 2 * hidden ? qkv : 2 * hidden), sizeof(float));
}

/* The streams are in the machine's memory if all fits there, or else on the host; then, if need be,
 * fewer windows make a chunk. */
static Workload plan(Quantizer *q, size_t limit) {
    const Operations *o = q->o;
    const size_t available = o->free_bytes ? o->free_bytes() : SIZE_MAX;
    const bool limited = limit && limit < available;
    Workload work = {q->config, q->method.group_size, q->length, 0, 0};
    if (q->method.smooth) work.searched = sample_of(q->n, q->length).n;
    if (!limited) limit = available;
    // Count, and make do with less until it fits.
    q->chunk = smaller(q->n, q->length < o->chunk_tokens ? o->chunk_tokens / q->length : 1);
    for (q->planning = true; q->planning;) {
        work.T = q->chunk * q->length;
        make_arrays(q, &work);
        if (q->bytes <= limit) q->planning = false;
        else if (!q->outside) q->outside = true;
        else if (q->chunk > 1) q->chunk /= 2;
        else
            die("a layer with windows of %d tokens needs %.2f GB of %s, %s %.2f GB", q->length,
                q->bytes / 1e9, o->memory, limited ? "-M allows" : "free are", limit / 1e9);
    }
    return work;
}

/* Both residual streams begin with the embedding's rows of the tokens. */
static void embed_windows(Quantizer *q, const Linear *embedding, const int *tokens) {
    const size_t dim = q->config.dim;
    float *rows = allocate((size_t)q->chunk * q->length * dim, sizeof *rows);
    for (Chunk c = {0}; next_chunk_of(q, q->n, &c);) {
#pragma omp parallel for
        for (int t = 0; t < c.T; t++)
            floats(embedding->w, embedding->dtype, tokens[c.first + t] * dim, dim, rows + t * dim);
        q->o->copy(q->m, q->x_float + c.first * dim, rows, stream_bytes(q, c));
        q->o->copy(q->m, q->x_quant + c.first * dim, rows, stream_bytes(q, c));
    }
    free(rows);
}

Quantizer *quantizer_new(const Config *c, const Method *method, const Operations *o,
                         const Linear *embedding, const int *tokens, int n_windows, int length,
                         size_t limit) {
    Quantizer *q = allocate(1, sizeof *q);
    *q = (Quantizer){.o = o, .method = *method, .config = *c, .n = n_windows, .length = length};
    q->calibrate = n_windows && (method->gptq || method->mse);
    Workload work = plan(q, limit);
    q->m = o->start(&work);
    make_arrays(q, &work);
    if (method->signs) o->copy(q->m, q->signs, method->signs, c->dim);
    if (n_windows) embed_windows(q, embedding, tokens);
    return q;
}

void quantizer_free(Quantizer *q) {
    q->o->stop(q->m);
    free(q);
}

void quantizer_report(const Quantizer *q, FILE *out) {
    if (q->o->memory)
        fprintf(out, "%.2f GB of %s%s\n", q->bytes / 1e9, q->o->memory,
                q->outside ? ", calibration in host memory" : "");
}

static Machine *start_cpu(const Workload *work) {
    Machine *m = allocate(1, sizeof *m);
    m->work = *work;
    Config one_layer = work->config;
    one_layer.n_layers = 1;
    if (work->T) m->state = state_new(&one_layer, work->length, work->length, 16);
    return m;
}

static void stop_cpu(Machine *m) {
    for (int i = 0; i < m->n_arrays; i++) free(m->arrays[i]);
    state_free(m->state);
    free(m);
}

static void *cpu_array(Machine *m, size_t bytes, bool on_host) {
    (void)on_host;
    return m->arrays[m->n_arrays++] = allocate(bytes, 1);
}

static void copy_bytes(Machine *m, void *to, const void *from, size_t bytes) {
    (void)m;
    memcpy(to, from, bytes);
}

static void zero_bytes(Machine *m, void *to, size_t bytes) {
    (void)m;
    memset(to, 0, bytes);
}

/* linear() reads a quantized linear as a file has it. */
static void copy_linear(Machine *m, const Linear *l, Linear *to) {
    (void)m;
    size_t n = (size_t)l->N * l->K;
    memcpy(to->qweight, l->qweight, n / 2);
    memcpy(to->s_channel, l->s_channel, l->N * sizeof(float));
    if (l->s_group) memcpy(to->s_group, l->s_group, n / GROUP);
}

const Operations cpu_operations = {.sum_bytes = sizeof(double),
                                   .chunk_tokens = 2048,
                                   .start = start_cpu,
                                   .stop = stop_cpu,
                                   .array = cpu_array,
                                   .copy = copy_bytes,
                                   .zero = zero_bytes,
                                   .read = read_floats,
                                   .rotate = rotate,
                                   .scale = scale_weights,
                                   .norm = norm_rows,
                                   .inside = run_inside,
                                   .add_linear = run_outside,
                                   .subtract = subtract,
                                   .observe = observe,
                                   .smoothed_distance = smoothed_distance,
                                   .add_moments = sum_moments,
                                   .complete = copy_diagonal,
                                   .invert = invert_damped,
                                   .round_to_nearest = round_to_nearest,
                                   .correct = correct,
                                   .gptq = gptq,
                                   .relative_error = relative_error,
                                   .arrange = copy_linear};

/* ============================================================================================
 * 4  The same, faster
 *
 * attend_prompt() and attend_token() compute attention(), fast_linears() integer_linear() and
 * float_linear(). Tests hold each to the other. The rest is what the method needs beneath.
 * ============================================================================================ */

static float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* ---- vectors ---- */

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

/* sum_i x_i y_i, in a fixed order: four vectors of partial sums, then these lane by lane. */
static float dot(const float *x, const float *y, int n) {
    Vector sum[4] = {0};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int v = 0; v < 4; v++)
            sum[v] += *(const Vector *)(x + i + v * LANES) * *(const Vector *)(y + i + v * LANES);
    Vector total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float rest = 0.0f, lane[LANES];
    for (; i < n; i++) rest += x[i] * y[i];
    memcpy(lane, &total, sizeof lane);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int v = 0; v < half; v++) lane[v] += lane[v + half];
    return rest + lane[0];
}

static double dot_double(const double *x, const double *y, int n) {
    enum { L = LANES / 2 };
    double sum[L] = {0}, total = 0;
    int i = 0;
    for (; i + L <= n; i += L)
        for (int v = 0; v < L; v++) sum[v] += x[i + v] * y[i + v];
    for (; i < n; i++) total += x[i] * y[i];
    for (int v = 0; v < L; v++) total += sum[v];
    return total;
}

/* o [d] = sum_i p_i v_i over v [n][d]. */
static void weighted_sum(const float *p, const float *v, int n, int d, float *o) {
    int k = 0;
    for (; k + 4 * LANES <= d; k += 4 * LANES) {
        Vector sum[4] = {0};
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 4; j++)
                sum[j] += p[i] * *(const Vector *)(v + i * d + k + j * LANES);
        memcpy(o + k, sum, sizeof sum);
    }
    for (; k < d; k++) {
        o[k] = 0.0f;
        for (int i = 0; i < n; i++) o[k] += p[i] * v[i * d + k];
    }
}

/* e^x to 2 units in the last place, in steps that the compiler vectorizes, as expf() is not:
 * e^x = 2^n e^r with n = rint(x / ln 2), r = x - n ln 2 (in two steps), and the series of e^r. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;        // from 88.4 on infinity
    float magic = 0x1.8p23f, n = x * 0x1.715476p0f + magic; // n in the lowest bits
    float scale = bits_to_float((float_to_bits(n) + 127) << 23);
    n -= magic;
    float r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    float y =
        1.0f +
        r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    return y * scale;
}

/* Asks the memory for the n bytes that come 4 KB after p. The processor's own prefetching pauses
 * at the end of each page. */
static inline void prefetch(const void *p, size_t n) {
    for (size_t i = 0; i < n; i += 64) __builtin_prefetch((const char *)p + 4096 + i);
}

/* ---- y = x W^T in float32
 *
 * Registers hold a tile of y, TILE_ROWS x TILE_COLUMNS sums. The part of W that a tile needs is
 * copied to a panel of TILE_DEPTH x TILE_COLUMNS floats, which stays in the cache for all tiles. */

enum { TILE_ROWS = 6, TILE_COLUMNS = 2 * LANES, TILE_DEPTH = 256 };

/* panel[k][n] = W[n0 + n][k0 + k], zero where n >= n_columns. */
static void fill_panel(View w, int n0, int n_columns, int k0, int depth, float *panel) {
    if (n_columns < TILE_COLUMNS) memset(panel, 0, sizeof(float) * TILE_COLUMNS * depth);
    if (w.row == 1) {
        for (int k = 0; k < depth; k++)
            floats(w.w, w.dtype, (size_t)(k0 + k) * w.column + n0, n_columns,
                   panel + k * TILE_COLUMNS);
        return;
    }
    float line[TILE_DEPTH];
    for (int n = 0; n < n_columns; n++) {
        floats(w.w, w.dtype, (n0 + n) * w.row + k0, depth, line);
        for (int k = 0; k < depth; k++) panel[k * TILE_COLUMNS + n] = line[k];
    }
}

/* y [TILE_ROWS][TILE_COLUMNS] = x [rows][depth] times the panel; rows of x are ldx floats apart. */
static void matmul_tile(const float *x, size_t ldx, int rows, const float *panel, int depth,
                        Vector y[TILE_ROWS][2]) {
    const float *row[TILE_ROWS];
    Vector sum[TILE_ROWS][2] = {0};
    for (int i = 0; i < TILE_ROWS; i++) row[i] = x + (i < rows ? i : 0) * ldx;
    for (int k = 0; k < depth; k++) {
        const Vector *w = (const Vector *)(panel + (size_t)k * TILE_COLUMNS);
        Vector w0 = w[0], w1 = w[1];
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            sum[i][0] += row[i][k] * w0;
            sum[i][1] += row[i][k] * w1;
        }
    }
    memcpy(y, sum, sizeof sum);
}

/* y [M][n_columns] = x [M][K] W^T for up to TILE_COLUMNS rows of W from n0 on; by one thread. */
static void matmul_panel(int M, int K, const float *x, size_t ldx, View w, int n0, int n_columns,
                         float *y, size_t ldy) {
    float panel[TILE_DEPTH * TILE_COLUMNS] __attribute__((aligned(64)));
    for (int k0 = 0; k0 < K; k0 += TILE_DEPTH) {
        int depth = smaller(TILE_DEPTH, K - k0);
        fill_panel(w, n0, n_columns, k0, depth, panel);
        for (int m = 0; m < M; m += TILE_ROWS) {
            Vector tile[TILE_ROWS][2];
            int rows = smaller(TILE_ROWS, M - m);
            matmul_tile(x + m * ldx + k0, ldx, rows, panel, depth, tile);
            for (int i = 0; i < rows; i++) {
                const float *t = (const float *)tile[i];
                float *out = y + (m + i) * ldy;
                for (int n = 0; n < n_columns; n++) out[n] = k0 ? out[n] + t[n] : t[n];
            }
        }
    }
}

/* y [M][N] = x [M][K] W^T, by one thread. */
static void matmul(int M, int N, int K, const float *x, size_t ldx, View w, float *y, size_t ldy) {
    for (int n = 0; n < N; n += TILE_COLUMNS)
        matmul_panel(M, K, x, ldx, w, n, smaller(TILE_COLUMNS, N - n), y + n, ldy);
}

/* M += a^T b, the float products of one call summed up in double. */
void add_moments(double *M, const float *a, int N, const float *b, int K, int T) {
    float *a_t = allocate((size_t)N * T, sizeof *a_t); // [N][T]
#pragma omp parallel for
    for (size_t n = 0; n < (size_t)N; n++)
        for (size_t t = 0; t < (size_t)T; t++) a_t[n * T + t] = a[t * N + n];
#pragma omp parallel
    {
        float *product = allocate((size_t)N * TILE_COLUMNS, sizeof *product);
#pragma omp for schedule(dynamic)
        for (int k0 = 0; k0 < K; k0 += TILE_COLUMNS) {
            int columns = smaller(TILE_COLUMNS, K - k0);
            matmul_panel(N, T, a_t, T, (View){b, F32, 1, K}, k0, columns, product, TILE_COLUMNS);
            for (size_t n = 0; n < (size_t)N; n++)
                for (int k = 0; k < columns; k++)
                    M[n * K + k0 + k] += product[n * TILE_COLUMNS + k];
        }
        free(product);
    }
    free(a_t);
}

/* Row n of w times the one token x [K]; reading w is what this costs. */
static float float_row(const Linear *w, size_t n, const float *x) {
    float sum = 0.0f, line[TILE_DEPTH];
    size_t K = w->K, element = dtype_size(w->dtype);
    for (size_t k = 0; k < K; k += TILE_DEPTH) {
        int depth = smaller(TILE_DEPTH, K - k);
        prefetch((const char *)w->w + (n * K + k) * element, depth * element);
        floats(w->w, w->dtype, n * K + k, depth, line);
        sum += dot(x + k, line, depth);
    }
    return sum;
}

static void float_linears(const Linear *w, int n_linears, const float *x, int T, float *const *y) {
#pragma omp parallel
    for (int i = 0; i < n_linears; i++) {
        int N = w[i].N, K = w[i].K;
        View view = {w[i].w, w[i].dtype, K, 1};
        if (T == 1) {
#pragma omp for nowait
            for (int n = 0; n < N; n++) y[i][n] = float_row(&w[i], n, x);
        } else {
#pragma omp for schedule(dynamic) nowait
            for (int n = 0; n < N; n += TILE_COLUMNS)
                matmul_panel(T, K, x, K, view, n, smaller(TILE_COLUMNS, N - n), y[i] + n, N);
        }
    }
}

/* ---- attention of a prompt
 *
 * A prompt is bound by arithmetic, which two matrix products do fastest. A task is one KV head and
 * BLOCK tokens: the queries of all heads that share this KV head are the rows of the products. ----
 */

enum { BLOCK = 32 };

/* Positions first .. first + n - 1 of a head as floats [n][head_dim]: in the cache itself, or read
 * into `buffer`. */
static const float *cache_floats(const Config *c, const State *s, int l, int head, int first, int n,
                                 float *buffer) {
    int d = c->head_dim;
    if (s->kv_bits == 16) return (const float *)(const void *)cache_row(c, s, l, head, first);
    for (int i = 0; i < n; i++)
        read_row(cache_row(c, s, l, head, first + i), d, s->kv_bits, buffer + (size_t)i * d);
    return buffer;
}

/* attention() of KV head h and tokens t0 .. t0 + n - 1. Buffers: rows [n * group][head_dim], scores
 * [n * group][n_keys], keys and values [n_keys][head_dim]. */
static void attend_block(const Config *c, State *s, int l, int pos, int h, int t0, int n,
                         float *rows, float *scores, float *keys, float *values) {
    int d = c->head_dim, group = c->n_heads / c->n_kv_heads, n_keys = pos + t0 + n;
    size_t q_dim = (size_t)c->n_heads * d, width = (size_t)group * d;
    size_t first = t0 * q_dim + h * width;
    // 1. the queries, divided by sqrt(head_dim)
    for (int t = 0; t < n; t++)
        for (size_t i = 0; i < width; i++)
            rows[t * width + i] = s->q[first + t * q_dim + i] / sqrtf(d);
    // 2. scores of all keys, also of those that come after a token
    View k = {cache_floats(c, s, l, h, 0, n_keys, keys), F32, d, 1};
    matmul(n * group, n_keys, d, rows, d, k, scores, n_keys);
    // 3. probabilities, 0 of the keys after a token
    for (int r = 0; r < n * group; r++) {
        int seen = pos + t0 + r / group + 1;
        float *row = scores + (size_t)r * n_keys;
        softmax(row, seen);
        memset(row + seen, 0, (n_keys - seen) * sizeof *row);
    }
    // 4. the means of the values, which replace the queries
    View v = {cache_floats(c, s, l, c->n_kv_heads + h, 0, n_keys, values), F32, 1, d};
    matmul(n * group, d, n_keys, scores, n_keys, v, rows, d);
    for (int t = 0; t < n; t++)
        memcpy(s->att + first + t * q_dim, rows + t * width, width * sizeof *rows);
}

static void attend_prompt(const Config *c, State *s, int l, int T, int pos) {
    int d = c->head_dim, n_blocks = (T + BLOCK - 1) / BLOCK;
    size_t most_rows = (size_t)smaller(T, BLOCK) * (c->n_heads / c->n_kv_heads), context = pos + T;
#pragma omp parallel
    {
        float *rows = allocate(most_rows * d, sizeof *rows);
        float *scores = allocate(most_rows * context, sizeof *scores);
        float *keys = allocate(s->kv_bits == 16 ? 1 : 2 * context * d, sizeof *keys);
        float *values = keys + (s->kv_bits == 16 ? 0 : context * d);
#pragma omp for schedule(dynamic)
        for (int task = c->n_kv_heads * n_blocks - 1; task >= 0; task--) { // the long ones first
            int h = task % c->n_kv_heads, t0 = task / c->n_kv_heads * BLOCK;
            attend_block(c, s, l, pos, h, t0, smaller(BLOCK, T - t0), rows, scores, keys, values);
        }
        free(rows);
        free(scores);
        free(keys);
    }
}

/* ---- attention of one token
 *
 * One token is bound by reading the cache. A task is one KV head and PART positions, which it reads
 * once for all query heads. Each head gets a part of the softmax, over these positions alone:
 *
 *   m = max score,   l = sum e^(score - m),   o = sum e^(score - m) v
 *
 * and the parts are joined, in the order of the positions, with M = max m_i:
 *
 *   att = sum e^(m_i - M) o_i / sum e^(m_i - M) l_i          Flash-Decoding, arXiv 2311.01282 ----
 */

enum { PART = 64 };

typedef struct {
    float m, l;
    float *o; // [head_dim]
} Part;

/* Parts [group] of keys and values [n][d], n <= PART. */
static void attend_part(const float *q, int group, int d, const float *keys, const float *values,
                        int n, Part *parts) {
    float s[group][PART];
    // the group inside: each key is read once
    for (int i = 0; i < n; i++)
        for (int g = 0; g < group; g++) s[g][i] = dot(q + g * d, keys + i * d, d) / sqrtf(d);
    for (int g = 0; g < group; g++) {
        float m = -INFINITY, l = 0.0f;
        for (int i = 0; i < n; i++) m = s[g][i] > m ? s[g][i] : m;
        for (int i = 0; i < n; i++) s[g][i] = exponential(s[g][i] - m);
        for (int i = 0; i < n; i++) l += s[g][i];
        weighted_sum(s[g], values, n, d, parts[g].o);
        parts[g].m = m;
        parts[g].l = l;
    }
}

/* att [d] of one head from its n parts, which lie `stride` apart. */
static void join_parts(const Part *parts, int n, int stride, int d, float *att) {
    float m = -INFINITY, sum = 0.0f;
    for (int i = 0; i < n; i++) m = fmaxf(m, parts[i * stride].m);
    memset(att, 0, d * sizeof *att);
    for (int i = 0; i < n; i++) {
        const Part *part = &parts[i * stride];
        float factor = expf(part->m - m);
        sum += factor * part->l;
        for (int k = 0; k < d; k++) att[k] += factor * part->o[k];
    }
    for (int k = 0; k < d; k++) att[k] /= sum;
}

static void attend_token(const Config *c, State *s, int l, int pos) {
    int d = c->head_dim, n_kv = c->n_kv_heads, group = c->n_heads / n_kv, n_parts = pos / PART + 1;
    Part *parts = allocate((size_t)c->n_heads * n_parts, sizeof *parts); // [n_parts][n_heads]
    float *o = allocate((size_t)c->n_heads * n_parts * d, sizeof *o);
    for (int i = 0; i < c->n_heads * n_parts; i++) parts[i].o = o + (size_t)i * d;
#pragma omp parallel
    {
        // 1. all parts
        float *buffer = allocate(2 * PART, d * sizeof *buffer);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < n_parts * n_kv; task++) {
            int first = task / n_kv * PART, h = task % n_kv, n = smaller(PART, pos + 1 - first);
            const float *k = cache_floats(c, s, l, h, first, n, buffer);
            const float *v = cache_floats(c, s, l, n_kv + h, first, n, buffer + PART * d);
            attend_part(s->q + (size_t)h * group * d, group, d, k, v, n, parts + task * group);
        }
        free(buffer);
        // 2. each head from its parts
#pragma omp for
        for (int h = 0; h < c->n_heads; h++)
            join_parts(parts + h, n_parts, c->n_heads, d, s->att + (size_t)h * d);
    }
    free(parts);
    free(o);
}

/* ---- y = x W^T in W4A8
 *
 * With unsigned codes u = q + 8, the operands of vpdpbusd and vpmaddubsw are u and a:
 *
 *   acc = sum_k a_k w8_k = sum_g s_group[g] (sum_(k in g) a_k u_k - 8 sum_(k in g) a_k)
 *
 * The last sum is made once for all rows of W. The low nibbles of a row are its even columns, the
 * high nibbles its odd columns. So each group of the activations has its even columns first. ----
 */

enum { TILE_T = 8 }; // tokens that share one unpacking of the weights

/* T quantized tokens as dot_u4 reads them, in tiles of TILE_T, the last one filled up with zeros. A
 * single token is a tile of its own. */
typedef struct {
    float *s_a;       // [T]
    int8_t *a;        // [tiles][K/128][tile][2][64] even columns, odd columns; 64-byte aligned
    int32_t *sums;    // [tiles][groups][TILE_T] of the activations of each group
    int tile, groups; // tokens per tile; K/128, or per channel 1
} Activations;

/* Zeroed bytes [n] at an address that is a multiple of 64. At any other address each load of 64
 * bytes would touch two cache lines. */
static int8_t *aligned_bytes(size_t n) {
    n = (n + 63) / 64 * 64;
    int8_t *p = aligned_alloc(64, n);
    if (!p) die("no memory for %zu bytes", n);
    memset(p, 0, n);
    return p;
}

static Activations activations_new(const Linear *w, int T) {
    int tiles = (T + TILE_T - 1) / TILE_T, groups = w->s_group ? w->K / GROUP : 1;
    Activations x = {.tile = T == 1 ? 1 : TILE_T, .groups = groups};
    x.s_a = allocate(T, sizeof *x.s_a);
    x.sums = allocate((size_t)tiles * groups * TILE_T, sizeof *x.sums);
    x.a = aligned_bytes((size_t)tiles * x.tile * w->K);
    return x;
}

static void activations_free(Activations *x) {
    free(x->s_a);
    free(x->a);
    free(x->sums);
}

/* Token t of x becomes a [K]. */
static void set_token(Activations *x, int t, const int8_t *a, int K) {
    int i = t % x->tile, first = t - i; // number i of the tile from token `first` on
    // 1. even columns before odd ones
    for (int k = 0; k < K; k += GROUP) {
        int n = smaller(GROUP, K - k);
        int8_t *even = x->a + (size_t)first * K + k * x->tile + i * n, *odd = even + n / 2;
        for (int j = 0; j < n / 2; j++) {
            even[j] = a[k + 2 * j];
            odd[j] = a[k + 2 * j + 1];
        }
    }
    // 2. the sum of each group
    int32_t *sums = x->sums + (size_t)first * x->groups + i;
    for (int g = 0, n = K / x->groups; g < x->groups; g++)
        for (int k = g * n; k < (g + 1) * n; k++) sums[g * TILE_T] += a[k];
}

/* Plain C. The compiler vectorizes the loop over j, if u has 16 bits and s comes after it. */
static void dot_u4_c(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
                     int32_t *acc) {
    for (int k = 0; k < K; k += GROUP) {
        int n = smaller(GROUP, K - k), s = s_group ? s_group[k / GROUP] : 1;
        int16_t u[GROUP] = {0}; // even columns, odd columns
        for (int j = 0; j < n / 2; j++) {
            u[j] = w[k / 2 + j] & 0x0f;
            u[n / 2 + j] = w[k / 2 + j] >> 4;
        }
        for (int t = 0; t < T; t++, a += n) {
            int32_t sum = 0;
            for (int j = 0; j < n; j++) sum += u[j] * a[j];
            acc[t] += s * sum;
        }
    }
}

#ifdef __x86_64__

/* sum[t] += of n = 128 or 64 columns. A sum of two products is at most 2 * 15 * 128, so eight such
 * sums fit 16 bits. The step to 32 bits multiplies by s_group on its way. */
__attribute__((target("avx2"), always_inline)) static inline void
add_columns_avx2(const uint8_t *w, int s_group, const int8_t *a, int n, int T, __m256i *sum) {
    const __m256i low = _mm256_set1_epi8(0x0f), s = _mm256_set1_epi16(s_group);
    __m256i even[2], odd[2];
    prefetch(w, n / 2);
    // 1. unpack the codes, once for all tokens
    for (int i = 0; i < n / 64; i++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)w + i);
        even[i] = _mm256_and_si256(bytes, low);
        odd[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    }
    // 2. multiply and add: bytes to 16 bits, 16 to 32 bits
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const __m256i *a_even = (const __m256i *)(a + t * n);
        const __m256i *a_odd = (const __m256i *)(a + t * n + n / 2);
        __m256i products = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int i = 0; i < n / 64; i++) {
            __m256i e = _mm256_maddubs_epi16(even[i], _mm256_loadu_si256(a_even + i));
            __m256i o = _mm256_maddubs_epi16(odd[i], _mm256_loadu_si256(a_odd + i));
            products = _mm256_add_epi16(products, _mm256_add_epi16(e, o));
        }
        sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(products, s));
    }
}

__attribute__((target("avx2"), always_inline)) static inline void
dot_u4_avx2_T(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
              int32_t *acc) {
    __m256i sum[TILE_T];
    for (int t = 0; t < TILE_T; t++) sum[t] = _mm256_setzero_si256();
    // 1. eight partial sums per token
    int k = 0;
    for (; k + GROUP <= K; k += GROUP)
        add_columns_avx2(w + k / 2, s_group ? s_group[k / GROUP] : 1, a + k * T, GROUP, T, sum);
    int rest = K - k; // only without groups
    if (rest == 64) add_columns_avx2(w + k / 2, 1, a + k * T, 64, T, sum);
    // 2. their sums, four tokens at once
    for (int t = 0; t < T; t += 4) {
        __m256i pairs = _mm256_hadd_epi32(sum[t], sum[t + 1]);
        __m256i fours = _mm256_hadd_epi32(pairs, _mm256_hadd_epi32(sum[t + 2], sum[t + 3]));
        __m128i total =
            _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        __m128i *to = (__m128i *)(acc + t);
        if (T == 1) acc[0] += _mm_cvtsi128_si32(total);
        else _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), total));
    }
    if (rest != 64) dot_u4_c(w + k / 2, NULL, a + k * T, rest, T, acc);
}

__attribute__((target("avx2"))) static void
dot_u4_avx2(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T, int32_t *acc) {
    if (T == 1) dot_u4_avx2_T(w, s_group, a, K, 1, acc);
    else dot_u4_avx2_T(w, s_group, a, K, TILE_T, acc);
}

/* sum[.][t] += of up to 128 columns. u s_group is at most 225 and fits a byte, so one 16-bit
 * multiplication scales two codes, once for all tokens. */
__attribute__((target("avx512f,avx512bw,avx512vnni"), always_inline)) static inline void
add_columns_vnni(const uint8_t *w, int s_group, const int8_t *a, int n, int T, __m512i (*sum)[2]) {
    const __m512i low = _mm512_set1_epi8(0x0f), s = _mm512_set1_epi16(s_group);
    __mmask64 valid = n == GROUP ? ~0ull : (1ull << n / 2) - 1;
    prefetch(w, 64);
    __m512i bytes = _mm512_maskz_loadu_epi8(valid, w);
    __m512i even = _mm512_mullo_epi16(_mm512_and_si512(bytes, low), s);
    __m512i odd = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), s);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        __m512i a_even = _mm512_maskz_loadu_epi8(valid, a + t * n);
        __m512i a_odd = _mm512_maskz_loadu_epi8(valid, a + t * n + n / 2);
        sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], even, a_even);
        sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], odd, a_odd);
    }
}

__attribute__((target("avx512f,avx512bw,avx512vnni"), always_inline)) static inline void
dot_u4_vnni_T(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
              int32_t *acc) {
    __m512i sum[TILE_T][2]; // of even and odd columns apart: two chains of additions, half the wait
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = _mm512_setzero_si512();
    int k = 0;
    for (; k + GROUP <= K; k += GROUP)
        add_columns_vnni(w + k / 2, s_group ? s_group[k / GROUP] : 1, a + k * T, GROUP, T, sum);
    if (k < K) add_columns_vnni(w + k / 2, 1, a + k * T, K - k, T, sum);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
        acc[t] += _mm512_reduce_add_epi32(_mm512_add_epi32(sum[t][0], sum[t][1]));
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static void
dot_u4_vnni(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T, int32_t *acc) {
    if (T == 1) dot_u4_vnni_T(w, s_group, a, K, 1, acc);
    else dot_u4_vnni_T(w, s_group, a, K, TILE_T, acc);
}

#endif

DotU4 *dot_u4_kernel(int i, const char **name) {
    const char *names[] = {"C", "AVX2", "AVX-512 VNNI"};
    DotU4 *kernels[] = {dot_u4_c, NULL, NULL};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) kernels[1] = dot_u4_avx2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        kernels[2] = dot_u4_vnni;
#endif
    if (i >= 3) return NULL;
    *name = names[i];
    return kernels[i];
}

static DotU4 *dot_u4_best(void) {
    const char *name;
    int i = 2;
    while (!dot_u4_kernel(i, &name)) i--;
    return dot_u4_kernel(i, &name);
}

/* sums [N][TILE_T], zeros before: acc of output channels n0 .. n0 + N - 1 and of the tile that
 * begins with token t. */
static void product_block(const Linear *w, DotU4 *dot_u4, const Activations *x, int n0, int N,
                          int t, int32_t (*sums)[TILE_T]) {
    const int32_t *group_sums = x->sums + (size_t)t * x->groups;
    for (int n = 0; n < N; n++) {
        const uint8_t *s_group = groups_of(w, n0 + n);
        int32_t offset[TILE_T] = {0};
        for (int g = 0; g < x->groups; g++) {
            int s = s_group ? s_group[g] : 1;
            for (int i = 0; i < TILE_T; i++) offset[i] += s * group_sums[g * TILE_T + i];
        }
        for (int i = 0; i < TILE_T; i++) sums[n][i] = -8 * offset[i];
        dot_u4(codes_of(w, n0 + n), s_group, x->a + (size_t)t * w->K, w->K, x->tile, sums[n]);
    }
}

void accumulators(const Linear *w, const int8_t *a, int T, DotU4 *dot_u4, int32_t *acc) {
    Activations x = activations_new(w, T);
    for (int t = 0; t < T; t++) set_token(&x, t, a + (size_t)t * w->K, w->K);
    for (int n = 0; n < w->N; n++)
        for (int t = 0; t < T; t += TILE_T) {
            int32_t sums[1][TILE_T] = {0};
            product_block(w, dot_u4, &x, n, 1, t, sums);
            for (int i = 0; i < smaller(TILE_T, T - t); i++)
                acc[(size_t)(t + i) * w->N + n] = sums[0][i];
        }
    activations_free(&x);
}

/* y[i] [T][N_i] of the W4A8 linears w [n_linears]. */
static void w4a8_linears(const Linear *w, int n_linears, const float *x, int T, float *const *y) {
    enum { N_BLOCK = 32 }; // rows that pass by a tile while it stays in the nearest cache
    int K = w->K;
    DotU4 *dot_u4 = dot_u4_best();
    Activations a = activations_new(w, T);
    // 1. quantize x
#pragma omp parallel for if (T > 1)
    for (int t = 0; t < T; t++) {
        int8_t row[K];
        a.s_a[t] = quantize_row(x + (size_t)t * K, K, row);
        set_token(&a, t, row, K);
    }
    // 2. multiply in integers, scale the sums
#pragma omp parallel
    for (int i = 0; i < n_linears; i++) {
        const Linear *l = &w[i];
// guided: first long stretches of rows, in which prefetch() runs ahead
#pragma omp for schedule(guided) nowait
        for (int n0 = 0; n0 < l->N; n0 += N_BLOCK)
            for (int t = 0; t < T; t += TILE_T) {
                int32_t sums[N_BLOCK][TILE_T] = {0};
                int N = smaller(N_BLOCK, l->N - n0), n_tokens = smaller(TILE_T, T - t);
                product_block(l, dot_u4, &a, n0, N, t, sums);
                for (int k = 0; k < n_tokens; k++) {
                    float *out = y[i] + (size_t)(t + k) * l->N + n0, s_a = a.s_a[t + k];
                    for (int n = 0; n < N; n++)
                        out[n] = ((float)sums[n][k] * s_a) * l->s_channel[n0 + n];
                }
            }
    }
    activations_free(&a);
}

/* ---- y = x W^T in W4A8 by AMX, the matrix unit of Xeons since 2023
 *
 * A tile is a register of 16 rows of 64 bytes. One instruction multiplies two tiles of int8 and
 * adds the products to a tile of 16 x 16 int32:
 *
 *   sum[n][t] += sum_k w8[n][k] a[k][t]     w8: 16 channels x 64 columns, a row per channel
 *                                           a:  16 rows, each 4 columns of 16 tokens
 *
 * The weights are the left side, as their rows lie in the file as a tile wants them. The
 * activations are the right side. A thread unpacks 64 channels once, for all tokens. It then
 * multiplies 32 channels with 32 tokens at a time: two tiles of each side give four tiles of sums.
 * ---- */

#ifdef __x86_64__

#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw")))
enum { TILE_BYTES = 1024, AMX_CHANNELS = 64, AMX_TOKENS = 32 };

/* Whether the processor has AMX and Linux lends this process the registers of the tiles. */
static bool amx_usable(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d = 0;
    return use_amx && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_INT8 &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Row n of W as w8 = q s_group: a row of each of the tiles [K/64][16][64]. A word holds four codes,
 * one per byte: ((u s) + (128 - 8 s)) ^ 128 never carries into the next byte. */
AMX static void unpack_to_tiles(const Linear *w, size_t n, int8_t *tiles) {
    const uint8_t *codes = codes_of(w, n), *s_group = groups_of(w, n);
    for (int k = 0; k < w->K; k += 64, codes += 32, tiles += TILE_BYTES) {
        uint32_t s = s_group ? s_group[k / GROUP] : 1, words[16];
        for (int i = 0; i < 16; i++) {
            uint32_t u = codes[2 * i] | codes[2 * i + 1] << 16;
            u = (u | u << 4) & 0x0f0f0f0f;
            words[i] = (u * s + (0x80808080 - s * 0x08080808)) ^ 0x80808080;
        }
        memcpy(tiles, words, sizeof words);
    }
}

/* sums [32 channels][32 tokens] of tiles w8 [2][K/64] and a [2][K/64]. */
AMX static void multiply_tiles(const int8_t *w8, const int8_t *a, size_t K, int32_t (*sums)[32]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t at = 0; at < 16 * K; at += TILE_BYTES) {
        _tile_loadd(4, w8 + at, 64);
        _tile_loadd(5, w8 + 16 * K + at, 64);
        _tile_loadd(6, a + at, 64);
        _tile_loadd(7, a + 16 * K + at, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums[0], sizeof *sums);
    _tile_stored(1, sums[0] + 16, sizeof *sums);
    _tile_stored(2, sums[16], sizeof *sums);
    _tile_stored(3, sums[16] + 16, sizeof *sums);
}

/* y [T][N] for channels n0 .. n0 + 63 of w and all tokens; w8 is a buffer of 64 K bytes. */
AMX static void amx_channels(const Linear *w, int n0, const int8_t *a, const float *s_a, int T,
                             int8_t *w8, float *y) {
    size_t N = w->N, K = w->K;
    for (int n = 0; n < AMX_CHANNELS && n0 + n < w->N; n++)
        unpack_to_tiles(w, n0 + n, w8 + n / 16 * 16 * K + n % 16 * 64);
    for (int t0 = 0; t0 < T; t0 += AMX_TOKENS)
        for (int n1 = n0; n1 < n0 + AMX_CHANNELS && n1 < w->N; n1 += 32) {
            int32_t sums[32][32] __attribute__((aligned(64)));
            int n_tokens = smaller(AMX_TOKENS, T - t0), n_channels = smaller(32, w->N - n1);
            multiply_tiles(w8 + (n1 - n0) * K, a + t0 * K, K, sums);
            for (int t = 0; t < n_tokens; t++)
                for (int n = 0; n < n_channels; n++)
                    y[(t0 + t) * N + n1 + n] =
                        ((float)sums[n][t] * s_a[t0 + t]) * w->s_channel[n1 + n];
        }
}

/* w4a8_linears() for K % 64 = 0. */
AMX static void amx_linears(const Linear *w, int n_linears, const float *x, int T,
                            float *const *y) {
    uint8_t config[64] = {1}; // byte 16 + 2 i: bytes of a row of tile i; byte 48 + i: rows
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    size_t K = w->K, padded = (T + AMX_TOKENS - 1) / AMX_TOKENS * AMX_TOKENS;
    int8_t *a = aligned_bytes(padded * K); // tiles [padded/16][K/64], zeros after token T - 1
    float *s_a = allocate(T, sizeof *s_a);
    // 1. quantize x; a tile has four columns of a token side by side
#pragma omp parallel for
    for (int t = 0; t < T; t++) {
        int8_t row[K];
        s_a[t] = quantize_row(x + t * K, K, row);
        for (size_t k = 0; k < K; k += 4)
            memcpy(a + t / 16 * 16 * K + 16 * k + t % 16 * 4, row + k, 4);
    }
    // 2. multiply, each thread with tiles of its own
#pragma omp parallel
    {
        int8_t *w8 = aligned_bytes(AMX_CHANNELS * K);
        __asm__ volatile("ldtilecfg %0" ::"m"(config));
        for (int i = 0; i < n_linears; i++) {
#pragma omp for schedule(guided) nowait
            for (int n = 0; n < w[i].N; n += AMX_CHANNELS)
                amx_channels(&w[i], n, a, s_a, T, w8, y[i]);
        }
        __asm__ volatile("tilerelease");
        free(w8);
    }
    free(a);
    free(s_a);
}

#endif

/* lm_head in 8 bits. With activations of 16 bits compilers find vpmaddwd, 4 times as fast as what
 * they make of 8 bits. */
static void byte_linear(const Linear *w, const float *x, int T, float *y) {
    size_t N = w->N, K = w->K;
    int16_t *a = allocate(T, K * sizeof *a); // [T][K]
    float *s_a = allocate(T, sizeof *s_a);
    for (int t = 0; t < T; t++) {
        int8_t row[K];
        s_a[t] = quantize_row(x + t * K, K, row);
        for (size_t k = 0; k < K; k++) a[t * K + k] = (int16_t)row[k];
    }
#pragma omp parallel for schedule(guided, 32)
    for (size_t n = 0; n < N; n++) {
        const int8_t *q = (const int8_t *)w->w + n * K;
        for (int t = 0; t < T; t++) {
            int32_t acc = 0;
            for (size_t k = 0; k < K; k++) acc += q[k] * a[t * K + k];
            y[t * N + n] = ((float)acc * s_a[t]) * w->s_channel[n];
        }
    }
    free(a);
    free(s_a);
}

static void fast_linears(const Linear *w, int n, const float *x, int T, float *const *y) {
#ifdef __x86_64__
    if (w->dtype == U8 && w->K % 64 == 0 && T >= AMX_TOKENS && amx_usable()) {
        amx_linears(w, n, x, T, y);
        return;
    }
#endif
    if (w->dtype == U8) w4a8_linears(w, n, x, T, y);
    else if (w->dtype != I8) float_linears(w, n, x, T, y);
    else
        for (int i = 0; i < n; i++) byte_linear(&w[i], x, T, y[i]);
}

/* ---- Cholesky ---- */

/* H = V V^T, V upper triangular, from the last row up: V_ii = sqrt(H_ii - sum_(k>i) V_ik^2),
 * V_ji = (H_ji - sum_(k>i) V_jk V_ik) / V_ii. V [K][K] holds H before; below the diagonal nothing
 * is read or written. False if H is not positive definite. */
static bool factor(double *V, size_t K) {
    for (size_t i = K; i-- > 0;) {
        double *Vi = V + i * K;
        double pivot = Vi[i] - dot_double(Vi + i + 1, Vi + i + 1, K - 1 - i);
        if (!(pivot > 0 && pivot < INFINITY)) return false;
        Vi[i] = sqrt(pivot);
#pragma omp parallel for if (K > 512)
        for (size_t j = 0; j < i; j++) {
            double *Vj = V + j * K;
            Vj[i] = (Vj[i] - dot_double(Vj + i + 1, Vi + i + 1, K - 1 - i)) / Vi[i];
        }
    }
    return true;
}

/* U = V^-1 [K][K], upper triangular: U_i = (1_i - sum_(k>i) V_ik U_k) / V_ii. As H = V V^T, it is
 * the U of H^-1 = U^T U. */
static void invert(const double *V, size_t K, double *U) {
    enum { BLOCK = 64 }; // columns that one thread computes
#pragma omp parallel for schedule(dynamic)
    for (size_t j0 = 0; j0 < K; j0 += BLOCK) {
        size_t end = j0 + BLOCK < K ? j0 + BLOCK : K;
        for (size_t i = end; i-- > 0;) {
            double row[BLOCK] = {0};
            if (i >= j0) row[i - j0] = 1;
            for (size_t k = i + 1; k < end; k++)
                for (size_t j = j0; j < end; j++) row[j - j0] -= V[i * K + k] * U[k * K + j];
            for (size_t j = j0; j < end; j++) U[i * K + j] = row[j - j0] / V[i * K + i];
        }
    }
}

/* ---- floats of 16 bits ---- */

static float f16_to_float(uint16_t h) {
    // Moved into place the exponent is 112 too small; the product is exact, also for subnormals.
    float magnitude = bits_to_float((h & 0x7fffu) << 13) * 0x1p112f;
    uint32_t inf_or_nan = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return bits_to_float(float_to_bits(magnitude) | inf_or_nan | (h & 0x8000u) << 16);
}

uint16_t float_to_f16(float x) {
    uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;  // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and more round to infinity
    // Below 2^-14 a half counts in steps of 2^-24: adding 0.5, whose ulp that is, rounds to them.
    if (magnitude < 0x38800000) return sign | (float_to_bits(fabsf(x) + 0.5f) - 0x3f000000);
    uint32_t half_ulp = 0xfff + (magnitude >> 13 & 1); // ties to even
    return sign | ((magnitude - (112u << 23) + half_ulp) >> 13);
}

void floats(const void *data, DType dtype, size_t first, size_t n, float *out) {
    const char *p = (const char *)data + first * dtype_size(dtype);
    uint16_t h;
    switch (dtype) {
    case F32:
        memcpy(out, p, n * sizeof *out);
        break;
    case F16:
#ifdef __F16C__ // equal to the bit, at the speed of the memory
        for (; n >= 8; n -= 8, p += 16, out += 8)
            _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
#endif
        for (size_t i = 0; i < n; i++) out[i] = f16_to_float((memcpy(&h, p + 2 * i, 2), h));
        break;
    case BF16: // the upper half of a float
        for (size_t i = 0; i < n; i++)
            out[i] = bits_to_float((uint32_t)(memcpy(&h, p + 2 * i, 2), h) << 16);
        break;
    default:
        die("a %s tensor was read as floats", dtype_name(dtype));
    }
}

/* max|x|; NaN if there is one: without its sign bit a float orders as an integer, and infinity and
 * NaN are above all others. */
static float max_magnitude(const float *x, size_t n) {
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffff;
        max = magnitude > max ? magnitude : max;
    }
    return bits_to_float(max);
}

bool all_finite(const float *x, size_t n) {
    return max_magnitude(x, n) < INFINITY;
}

/* ============================================================================================
 * 5  A model from its files
 * ============================================================================================ */

/* ---- JSON ---- */

struct Json {
    const char *name, *text;
    jsmntok_t *tokens; // [n] in the order of the text; a key is the parent of its value
    int n;
};

enum { MAX_JSON = 100000000, MAX_DEPTH = 127 }; // the safetensors library's limits

/* jsmn is lenient, so each text is checked before jsmn splits it: it must be JSON as RFC 8259 and
 * the safetensors library define it. Strings are UTF-8 without half surrogate pairs. */
typedef struct {
    const char *at, *end; // `at` moves on, and stops where the text is wrong
} Cursor;

/* Passes over white space. Returns the byte after it, 0 at the end. */
static char next_char(Cursor *c) {
    while (c->at < c->end && *c->at && strchr(" \t\n\r", *c->at)) c->at++;
    return c->at < c->end ? *c->at : 0;
}

/* Passes over the word, if the text goes on with it. */
static bool skip(Cursor *c, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, word, n)) return false;
    return c->at += n;
}

/* The bytes of the UTF-8 character at s, 0 if it is none. */
static int utf8_bytes(const char *s, const char *end) {
    utf8proc_int32_t code;
    utf8proc_ssize_t bytes = utf8proc_iterate((const uint8_t *)s, end - s, &code);
    return bytes > 0 ? (int)bytes : 0;
}

/* The code unit of the escape \uXXXX at s, -1 if there is none. */
static int unicode_escape(const char *s, const char *end) {
    char digits[5] = {0};
    if (end - s < 6 || s[0] != '\\' || s[1] != 'u') return -1;
    memcpy(digits, s + 2, 4);
    bool hexadecimal = strspn(digits, "0123456789abcdefABCDEF") == 4;
    return hexadecimal ? (int)strtol(digits, NULL, 16) : -1;
}

/* The bytes of the escape at s: 2 of \n, 6 of \u0041, 12 of a surrogate pair; 0 if it is none. */
static int escape_bytes(const char *s, const char *end) {
    if (end - s > 1 && s[1] && strchr("\"\\/bfnrt", s[1])) return 2;
    int unit = unicode_escape(s, end);
    if (unit < 0xd800 || unit > 0xdfff) return unit < 0 ? 0 : 6;
    int second = unicode_escape(s + 6, end);
    return unit < 0xdc00 && second >= 0xdc00 && second <= 0xdfff ? 12 : 0;
}

static bool valid_string(Cursor *c) {
    if (next_char(c) != '"') return false;
    for (c->at++; c->at < c->end && *c->at != '"';) {
        bool escape = *c->at == '\\', control = (unsigned char)*c->at < ' ';
        int bytes = escape ? escape_bytes(c->at, c->end) : utf8_bytes(c->at, c->end);
        if (!bytes || control) return false;
        c->at += bytes;
    }
    return skip(c, "\"");
}

static bool valid_digits(Cursor *c) {
    const char *first = c->at;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9') c->at++;
    return c->at > first;
}

static bool valid_number(Cursor *c) {
    skip(c, "-");
    const char *first = c->at;
    if (!valid_digits(c) || (*first == '0' && c->at - first > 1)) return false;
    if (skip(c, ".") && !valid_digits(c)) return false;
    if (!skip(c, "e") && !skip(c, "E")) return true;
    if (!skip(c, "+")) skip(c, "-");
    return valid_digits(c);
}

static bool valid_value(Cursor *c, int depth) {
    char open = next_char(c), close = open == '{' ? '}' : ']';
    if (open == '"') return valid_string(c);
    if (skip(c, "true") || skip(c, "false") || skip(c, "null")) return true;
    if (open != '{' && open != '[') return valid_number(c);
    if (depth == MAX_DEPTH) return false;
    c->at++;
    if (next_char(c) == close) return c->at++;
    for (;; c->at++) {
        if (open == '{' && (!valid_string(c) || next_char(c) != ':' || !c->at++)) return false;
        if (!valid_value(c, depth + 1)) return false;
        if (next_char(c) == close) return c->at++;
        if (next_char(c) != ',') return false;
    }
}

/* What a file that is no JSON, or no safetensors, is instead; NULL: not known. */
static const char *known_format(const char *data, size_t bytes) {
    static const struct {
        const char *start, *name;
    } formats[] = {{"version https://git-lfs", "a Git LFS pointer: the real file was not fetched"},
                   {"GGUF", "a GGUF file; a Hugging Face model is needed"},
                   {"PK\3\4", "a PyTorch file (.pth, .bin); a safetensors file is needed"},
                   {"\x80\2", "a Python pickle (.pth, .bin); a safetensors file is needed"},
                   {"\x80\4", "a Python pickle (.pth, .bin); a safetensors file is needed"}};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        size_t n = strlen(formats[i].start);
        if (bytes >= n && !memcmp(data, formats[i].start, n)) return formats[i].name;
    }
    return NULL;
}

Json *json_parse(const char *name, const char *text, size_t bytes) {
    if (bytes > MAX_JSON) die("%s: %zu bytes of JSON, expected at most %d", name, bytes, MAX_JSON);
    Cursor c = {text, text + bytes};
    if (!valid_value(&c, 0) || next_char(&c) || c.at < c.end) {
        const char *format = known_format(text, bytes);
        if (format) die("%s: it is %s", name, format);
        die("%s: not valid JSON, or nested more than %d deep (near byte %td)", name, MAX_DEPTH,
            c.at - text);
    }
    jsmn_parser parser;
    jsmn_init(&parser);
    int n = jsmn_parse(&parser, text, bytes, NULL, 0);
    if (n <= 0) die("%s: not valid JSON (near byte %u)", name, parser.pos);
    Json *j = allocate(1, sizeof *j);
    *j = (Json){name, text, allocate(n, sizeof *j->tokens), n};
    jsmn_init(&parser);
    jsmn_parse(&parser, text, bytes, j->tokens, n);
    return j;
}

void json_free(Json *j) {
    if (j) free(j->tokens);
    free(j);
}

char json_type(const Json *j, int node) {
    static const char types[] = {
        [JSMN_OBJECT] = '{', [JSMN_ARRAY] = '[', [JSMN_STRING] = '"', [JSMN_PRIMITIVE] = 'p'};
    return node < 0 ? 0 : types[j->tokens[node].type];
}

int json_first(const Json *j, int node) {
    char type = json_type(j, node);
    return (type == '{' || type == '[') && j->tokens[node].size > 0 ? node + 1 : -1;
}

int json_next(const Json *j, int node, int child) {
    int last = json_type(j, node) == '{' ? child + 1 : child; // a key: its value
    int i = last + 1;
    while (i < j->n && j->tokens[i].start < j->tokens[last].end) i++; // over what it holds
    return i < j->n && j->tokens[i].start < j->tokens[node].end ? i : -1;
}

int json_get(const Json *j, int node, const char *key) {
    int found = -1; // of a key that is there twice the last counts
    if (json_type(j, node) != '{') return found;
    for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i))
        if (json_is(j, i, key)) found = i + 1;
    return found;
}

bool json_absent(const Json *j, int node) {
    return node < 0 || (json_type(j, node) == 'p' && json_is(j, node, "null"));
}

bool json_is(const Json *j, int node, const char *s) {
    char type = json_type(j, node);
    if (type != '"' && type != 'p') return false;
    const jsmntok_t *t = &j->tokens[node];
    size_t bytes = t->end - t->start;
    if (!memchr(j->text + t->start, '\\', bytes))
        return bytes == strlen(s) && !memcmp(j->text + t->start, s, bytes);
    char *resolved = json_string(j, node, &bytes);
    bool same = bytes == strlen(s) && !memcmp(resolved, s, bytes);
    free(resolved);
    return same;
}

static int put_utf8(uint32_t c, char *out) {
    if (c < 0x80) return out[0] = c, 1;
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = 0x80 | (c & 0x3f);
    out[0] = (0xf00 >> n & 0xff) | c;
    return n;
}

char *json_string(const Json *j, int node, size_t *bytes) {
    if (json_type(j, node) != '"') die("%s: a string was expected", j->name);
    const char *s = j->text + j->tokens[node].start, *end = j->text + j->tokens[node].end;
    char *out = malloc(end - s + 1), *o = out; // resolving an escape never makes it longer
    if (!out) die("out of memory");
    while (s < end) {
        if (*s != '\\') {
            // A byte that means itself.
            *o++ = *s++;
        } else if (s[1] != 'u') {
            // A short escape.
            const char *from = "bfnrt", *to = "\b\f\n\r\t", *found = strchr(from, s[1]);
            *o++ = found ? to[found - from] : s[1];
            s += 2;
        } else {
            // \uXXXX, or two that are one character: json_parse() has checked that.
            uint32_t c = unicode_escape(s, end);
            s += 6;
            if (c >= 0xd800 && c < 0xdc00) {
                c = 0x10000 + ((c - 0xd800) << 10) + (unicode_escape(s, end) - 0xdc00);
                s += 6;
            }
            o += put_utf8(c, o);
        }
    }
    *o = 0;
    *bytes = o - out;
    return out;
}

const char *json_source(const Json *j, int node, size_t *bytes) {
    const jsmntok_t *t = &j->tokens[node];
    int quotes = t->type == JSMN_STRING;
    *bytes = t->end - t->start + 2 * quotes;
    return j->text + t->start - quotes;
}

bool json_number(const Json *j, int node, double *value) {
    if (json_type(j, node) != 'p') return false;
    const jsmntok_t *t = &j->tokens[node];
    char digits[64] = {0}, *end;
    size_t bytes = t->end - t->start;
    if (bytes >= sizeof digits) return false;
    memcpy(digits, j->text + t->start, bytes);
    if (strspn(digits, "+-.0123456789eE") != bytes) return false;
    *value = strtod(digits, &end);
    return !*end && isfinite(*value);
}

void put_json_string(FILE *out, const char *text) {
    fputc('"', out);
    const char *end = text + strlen(text);
    for (const char *s = text; s < end;) {
        int bytes = utf8_bytes(s, end);
        if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else if (!bytes) fputs("\\ufffd", out); // not UTF-8
        else if ((unsigned char)*s < ' ') fprintf(out, "\\u%04x", *s);
        else fwrite(s, 1, bytes, out);
        s += bytes ? bytes : 1;
    }
    fputc('"', out);
}

/* ---- model files
 *
 * A safetensors file is: 8 bytes, little-endian, the header's length; a JSON header
 * {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}; the data,
 * to which the offsets refer. https://huggingface.co/docs/safetensors ---- */

static const struct {
    const char *name;
    size_t bits;
} dtypes[] = {[F32] = {"F32", 32},   [F16] = {"F16", 16},
              [BF16] = {"BF16", 16}, [U8] = {"U8", 8},
              [I8] = {"I8", 8},      [I32] = {"I32", 32},
              [I64] = {"I64", 64},   {"I16", 16},
              {"U16", 16},           {"U32", 32},
              {"U64", 64},           {"F64", 64},
              {"BOOL", 8},           {"C64", 64},
              {"F8_E4M3", 8},        {"F8_E5M2", 8},
              {"F8_E8M0", 8},        {"F8_E4M3FNUZ", 8},
              {"F8_E5M2FNUZ", 8},    {"F6_E2M3", 6},
              {"F6_E3M2", 6},        {"F4", 4}};

enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

size_t dtype_size(DType dtype) {
    return dtypes[dtype].bits / 8;
}

const char *dtype_name(DType dtype) {
    return dtypes[dtype].name;
}

typedef struct Mapping {
    char *path;
    const char *data; // [bytes]
    size_t bytes;
} Mapping;

static bool is_directory(const char *path) {
    struct stat st;
    if (stat(path, &st)) die("%s: %s", path, strerror(errno));
    return S_ISDIR(st.st_mode);
}

/* Maps a regular file of at least one byte read-only; takes over `path`. An absent file is an
 * error, or {0} if it is optional. O_NONBLOCK: a FIFO is refused, not waited for. */
static Mapping map_file(char *path, bool optional) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && optional && errno == ENOENT) return free(path), (Mapping){0};
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: not a regular file", path);
    if (st.st_size == 0) die("%s: the file is empty", path);
    void *data = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    return (Mapping){path, data, st.st_size};
}

/* A small optional file of MODEL, malloc'ed with a NUL behind; NULL if it is absent. */
static char *read_file(const char *directory, const char *name) {
    Mapping m = map_file(format_text("%s/%s", directory, name), true);
    if (!m.data) return NULL;
    char *text = memcpy(allocate(m.bytes + 1, 1), m.data, m.bytes);
    munmap((void *)m.data, m.bytes);
    free(m.path);
    return text;
}

void require_utf8(const char *name, const char *text, size_t bytes) {
    for (size_t i = 0, length; i < bytes; i += length) {
        length = text[i] ? utf8_bytes(text + i, text + bytes) : 0;
        if (!length)
            die("%s: not a text: its byte %zu, 0x%02x, is no UTF-8", name, i, (uint8_t)text[i]);
    }
}

char *read_text(const char *path, size_t *bytes) {
    bool piped = !strcmp(path, "-"), fits = true;
    FILE *in = piped ? stdin : fopen(path, "re");
    if (!in) die("%s: %s", path, strerror(errno));
    if (piped) path = "stdin";
    // 1. all bytes, in a buffer that doubles
    char *text = NULL;
    size_t size = 0, n = 1;
    for (*bytes = 0; fits && n; *bytes += n) {
        if (*bytes == size) text = realloc(text, (size = 2 * size + (1 << 16)) + 1);
        fits = text && *bytes <= INT_MAX;
        n = fits ? fread(text + *bytes, 1, size - *bytes, in) : 0;
    }
    int error = ferror(in) ? errno : 0;
    if (!piped) fclose(in);
    // 2. are they a text?
    if (!fits || !text) die("%s: more text than fits in memory", path);
    if (error) die("%s: %s", path, strerror(error));
    if (!*bytes) die("%s: it is empty", path);
    text[*bytes] = 0;
    require_utf8(path, text, *bytes);
    return text;
}

/* A whole number in [0, max] or -1. */
static int64_t json_integer(const Json *j, int node, double max) {
    double x;
    if (!json_number(j, node, &x) || x < 0 || x > max) return -1;
    const jsmntok_t *t = &j->tokens[node];
    for (int i = t->start; i < t->end; i++)
        if (j->text[i] < '0' || j->text[i] > '9') return -1; // 1.0, 1e3, -0
    return (int64_t)x;
}

/* The node as it stands in the file, at most 40 bytes of it, for messages. */
static const char *shown(const Json *j, int node) {
    static char text[41];
    if (node < 0) return "missing";
    int bytes = j->tokens[node].end - j->tokens[node].start;
    snprintf(text, sizeof text, "%.*s", bytes < 40 ? bytes : 40, j->text + j->tokens[node].start);
    return text;
}

/* One entry of a safetensors header; data [bytes] is all that stands behind the header. */
static Tensor parse_tensor(const Json *j, int key, const char *path, const char *data,
                           size_t bytes) {
    Tensor t = {.path = path};
    size_t length;
    t.name = json_string(j, key, &length);
    if (strlen(t.name) != length) die("%s: a tensor's name holds a NUL", path);

    // 1. The dtype.
    int dtype = json_get(j, key + 1, "dtype"), d = 0;
    while (d < N_DTYPES && !json_is(j, dtype, dtypes[d].name)) d++;
    if (d == N_DTYPES) die("%s: tensor %s has an unknown dtype: %s", path, t.name, shown(j, dtype));
    t.dtype = d;

    // 2. The shape, and the bytes that it asks for.
    int shape = json_get(j, key + 1, "shape");
    size_t size = dtypes[d].bits; // in bits, until all extents are known
    if (json_type(j, shape) != '[') die("%s: tensor %s has no shape", path, t.name);
    for (int i = json_first(j, shape); i >= 0; i = json_next(j, shape, i)) {
        int64_t extent = json_integer(j, i, 0x1p53);
        if (extent < 0 || t.n_dims == MAX_DIMS || __builtin_mul_overflow(size, extent, &size))
            die("%s: tensor %s has a shape that cannot be", path, t.name);
        t.shape[t.n_dims++] = extent;
    }
    if (size % 8) die("%s: tensor %s has a shape that fills no whole bytes", path, t.name);
    size /= 8;

    // 3. The offsets: two whole numbers, within the file, as many bytes apart.
    int offsets = json_get(j, key + 1, "data_offsets"), first = json_first(j, offsets);
    int second = first < 0 ? -1 : json_next(j, offsets, first);
    int64_t begin = json_integer(j, first, 0x1p53), end = json_integer(j, second, 0x1p53);
    if (json_type(j, offsets) != '[' || j->tokens[offsets].size != 2 || begin < 0 || end < begin)
        die("%s: tensor %s has no valid data_offsets", path, t.name);
    if ((size_t)end > bytes)
        die("%s: tensor %s ends at byte %lld of the data, but the file has only %zu (truncated?)",
            path, t.name, (long long)end, bytes);
    if ((size_t)(end - begin) != size)
        die("%s: tensor %s has %lld bytes, its dtype and shape ask for %zu", path, t.name,
            (long long)(end - begin), size);
    t.data = data + begin;
    t.bytes = size;
    return t;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

static int by_address(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); // empty ones first
}

static const Mapping *add_mapping(Checkpoint *c, Mapping m) {
    Mapping *maps = realloc(c->maps, (c->n_maps + 1) * sizeof *maps);
    if (!maps) die("out of memory");
    c->maps = maps;
    c->maps[c->n_maps] = m;
    return &c->maps[c->n_maps++];
}

void *checkpoint_memory(Checkpoint *c, size_t bytes) {
    void *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) die("out of memory: %zu bytes were asked for", bytes);
    add_mapping(c, (Mapping){format_text("memory"), data, bytes});
    return data;
}

/* No object of the header has a key twice, and no number is beyond double's range. */
static void check_header(const Json *j) {
    for (int node = 0; node < j->n; node++) {
        const char *text = j->text + j->tokens[node].start; // behind a number is more
        if (json_type(j, node) == 'p' && !isfinite(strtod(text, NULL)))
            die("%s: a number out of range: %s", j->name, shown(j, node));
        int n = 0, size = json_type(j, node) == '{' ? j->tokens[node].size : 0;
        if (size < 2) continue;
        char **keys = allocate(size, sizeof *keys);
        for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i)) {
            size_t bytes;
            keys[n++] = json_string(j, i, &bytes);
            if (strlen(keys[n - 1]) != bytes) die("%s: a name holds a NUL", j->name);
        }
        qsort(keys, n, sizeof *keys, by_text);
        for (int i = 1; i < n; i++)
            if (!strcmp(keys[i - 1], keys[i])) die("%s: %s stands there twice", j->name, keys[i]);
        for (int i = 0; i < n; i++) free(keys[i]);
        free(keys);
    }
}

/* Adds the tensors of a safetensors file. Returns its parsed header. */
static Json *add_safetensors(Checkpoint *c, const Mapping m) {
    // 1. The length of the header, little-endian.
    uint64_t length = 0;
    for (size_t i = 0; i < 8 && i < m.bytes; i++) length |= (uint64_t)(uint8_t)m.data[i] << 8 * i;
    if (m.bytes < 8 || length > m.bytes - 8 || length > MAX_JSON) { // GGUF of 14 GB
        const char *format = known_format(m.data, m.bytes);
        if (format) die("%s: it is %s", m.path, format);
    }
    if (m.bytes < 8 || length > m.bytes - 8)
        die("%s: not a safetensors file: a header of %llu bytes in a file of %zu", m.path,
            (unsigned long long)length, m.bytes);
    // 2. The header: an object of tensors, and of strings in __metadata__.
    Json *j = json_parse(m.path, m.data + 8, length);
    if (json_type(j, 0) != '{') die("%s: the safetensors header is no JSON object", m.path);
    check_header(j);
    int metadata = json_get(j, 0, "__metadata__");
    if (json_type(j, metadata) != '{' && !json_absent(j, metadata))
        die("%s: __metadata__ is no object", m.path);
    for (int i = json_first(j, metadata); i >= 0; i = json_next(j, metadata, i))
        if (json_type(j, i + 1) != '"') die("%s: __metadata__ holds what is no string", m.path);

    // 3. The tensors.
    int first = c->n_tensors;
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        if (json_is(j, key, "__metadata__")) continue;
        if ((c->n_tensors & (c->n_tensors - 1)) == 0) { // full at each power of two
            size_t capacity = c->n_tensors ? 2 * c->n_tensors : 1;
            c->tensors = realloc(c->tensors, capacity * sizeof *c->tensors);
            if (!c->tensors) die("out of memory");
        }
        c->tensors[c->n_tensors++] =
            parse_tensor(j, key, m.path, m.data + 8 + length, m.bytes - 8 - length);
    }
    // 4. They follow each other without gaps to the end of the file.
    int n = c->n_tensors - first;
    Tensor *t = n ? c->tensors + first : NULL;
    if (n) qsort(t, n, sizeof *t, by_address);
    const char *at = m.data + 8 + length, *end = m.data + m.bytes;
    for (int i = 0; i < n; at = (const char *)t[i].data + t[i].bytes, i++) {
        if (at > (const char *)t[i].data)
            die("%s: tensors %s and %s overlap", m.path, t[i - 1].name, t[i].name);
        if (at < (const char *)t[i].data)
            die("%s: %td bytes before tensor %s belong to none", m.path,
                (const char *)t[i].data - at, t[i].name);
    }
    if (at < end) die("%s: %td bytes behind the last tensor belong to none", m.path, end - at);
    return j;
}

void checkpoint_sort(Checkpoint *c) {
    if (c->n_tensors) qsort(c->tensors, c->n_tensors, sizeof *c->tensors, by_name);
    for (int i = 1; i < c->n_tensors; i++)
        if (!by_name(&c->tensors[i - 1], &c->tensors[i]))
            die("%s: tensor %s stands there twice", c->path, c->tensors[i].name);
}

/* The shards that "weight_map" of the index names, each once. */
static void add_shards(Checkpoint *c, Mapping index) {
    Json *j = json_parse(index.path, index.data, index.bytes);
    int map = json_get(j, 0, "weight_map"), n = 0;
    if (json_type(j, map) != '{' || json_first(j, map) < 0) die("%s: no weight_map", index.path);
    // 1. The names of the shards.
    char **shards = allocate(j->n, sizeof *shards);
    for (int key = json_first(j, map); key >= 0; key = json_next(j, map, key)) {
        size_t bytes;
        if (json_type(j, key + 1) != '"') die("%s: weight_map is no map of names", index.path);
        shards[n++] = json_string(j, key + 1, &bytes);
        if (strchr(shards[n - 1], '/') || strlen(shards[n - 1]) != bytes)
            die("%s: shard %s is no name of a file beside it", index.path, shards[n - 1]);
    }
    // 2. Each is read once.
    qsort(shards, n, sizeof *shards, by_text);
    for (int i = 0; i < n; i++)
        if (i == 0 || strcmp(shards[i - 1], shards[i])) {
            char *path = format_text("%s/%s", c->path, shards[i]);
            json_free(add_safetensors(c, *add_mapping(c, map_file(path, false))));
        }
    for (int i = 0; i < n; i++) free(shards[i]);
    free(shards);
    // 3. All tensors of the index are in one of them.
    checkpoint_sort(c);
    for (int key = json_first(j, map); key >= 0; key = json_next(j, map, key)) {
        size_t bytes;
        char *name = json_string(j, key, &bytes);
        if (!checkpoint_find(c, name))
            die("%s: tensor %s is in none of the shards", index.path, name);
        free(name);
    }
    json_free(j);
}

/* Ends the program: a file of MODEL is missing. Names what may be there instead. */
static void die_missing(const char *directory, const char *name) {
    static const struct {
        const char *start, *end, *what;
    } others[] = {{"", ".gguf", "a GGUF file"},
                  {"", ".pth", "a PyTorch file"},
                  {"pytorch_model", ".bin", "a PyTorch file"},
                  {"model-", ".safetensors", "a shard without model.safetensors.index.json"}};
    DIR *files = opendir(directory);
    for (const struct dirent *file; files && (file = readdir(files));)
        for (int i = 0; i < 4; i++) {
            const char *end = strrchr(file->d_name, '.');
            if (!end || strcmp(end, others[i].end)) continue;
            if (strncmp(file->d_name, others[i].start, strlen(others[i].start))) continue;
            die("%s/%s: No such file; there is %s, %s", directory, name, file->d_name,
                others[i].what);
        }
    die("%s/%s: %s", directory, name, strerror(ENOENT));
}

static const char *const chat_file_names[N_CHAT_FILES] = {
    "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"};

static Tensor text_tensor(const char *name, const char *data, size_t bytes) {
    return (Tensor){(char *)name, U8, 1, {bytes}, data, bytes, NULL};
}

/* tokenizer.json and the files beside it. */
static void open_texts(Checkpoint *c) {
    Mapping tokenizer = map_file(format_text("%s/tokenizer.json", c->path), true);
    if (tokenizer.data) {
        c->tokenizer = tokenizer.data;
        c->tokenizer_bytes = tokenizer.bytes;
        add_mapping(c, tokenizer);
    }
    for (int i = 0; i < N_CHAT_FILES; i++) {
        Mapping text = map_file(format_text("%s/%s", c->path, chat_file_names[i]), true);
        if (!text.data) continue;
        c->chat_files[i] = text_tensor(chat_file_names[i], text.data, text.bytes);
        add_mapping(c, text);
    }
}

static void open_directory(Checkpoint *c) {
    if (read_file(c->path, "adapter_config.json"))
        die("%s: adapter_config.json: merge the adapter into its model first", c->path);
    c->config = read_file(c->path, "config.json");
    if (!c->config) die_missing(c->path, "config.json");
    c->generation_config = read_file(c->path, "generation_config.json");
    open_texts(c);
    Mapping single = map_file(format_text("%s/model.safetensors", c->path), true);
    Mapping index = map_file(format_text("%s/model.safetensors.index.json", c->path), true);
    if (!single.data && !index.data) die_missing(c->path, "model.safetensors");
    if (index.data) add_mapping(c, index);
    if (single.data) {
        if (index.data) note("%s: model.safetensors is read, the index beside it not", c->path);
        json_free(add_safetensors(c, *add_mapping(c, single)));
        checkpoint_sort(c);
    } else {
        add_shards(c, index);
    }
}

bool same_file(const char *a, const char *b) {
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

bool checkpoint_has_file(const Checkpoint *c, const char *path) {
    static const char *const copied[] = {"config.json", "generation_config.json"};
    bool found = false;
    for (int i = 0; i < c->n_maps; i++) found |= same_file(path, c->maps[i].path);
    for (int i = 0; i < 2; i++) {
        char *own = format_text("%s/%s", c->path, copied[i]);
        found |= same_file(path, own);
        free(own);
    }
    return found;
}

static char *metadata_text(const Json *j, const char *key) {
    int node = json_get(j, json_get(j, 0, "__metadata__"), key);
    size_t bytes;
    return json_type(j, node) == '"' ? json_string(j, node, &bytes) : NULL;
}

static void open_model_bin(Checkpoint *c) {
    Json *j = add_safetensors(c, *add_mapping(c, map_file(format_text("%s", c->path), false)));
    checkpoint_sort(c);
    // 1. It says of itself that it is a model.bin.
    char *format = metadata_text(j, "format"), *version = metadata_text(j, "version");
    if (!format || strcmp(format, "qqq"))
        die("%s: a safetensors file, but no model.bin (its format is %s, not qqq); for a Hugging "
            "Face model give the directory",
            c->path, format ? format : "not stated");
    if (!version || strcmp(version, "1"))
        die("%s: version %s of the format, expected 1%s", c->path, version ? version : "none",
            version && strtod(version, NULL) > 1 ? "; a newer program made it" : "");
    free(format);
    free(version);
    // 2. The texts of its __metadata__, and those that are tensors.
    c->config = metadata_text(j, "config");
    if (!c->config) die("%s: no config in __metadata__", c->path);
    c->generation_config = metadata_text(j, "generation_config");
    c->quantization = metadata_text(j, "quantization");
    for (int i = -1; i < N_CHAT_FILES; i++) {
        const Tensor *t = checkpoint_find(c, i < 0 ? "tokenizer.json" : chat_file_names[i]);
        if (!t) continue;
        if (t->dtype != U8) die("%s: %s is not U8", c->path, t->name);
        if (i < 0) c->tokenizer = t->data, c->tokenizer_bytes = t->bytes;
        else c->chat_files[i] = text_tensor(t->name, t->data, t->bytes);
    }
    json_free(j);
}

/* Where a model is: `path`, or if that is a Hugging Face cache's models--ORGANIZATION--NAME, the
 * directory in its snapshots/ that refs/main names, else the only one there. malloc'ed. */
static char *model_path(const char *path) {
    char *config = format_text("%s/config.json", path);
    char *folder = format_text("%s/snapshots", path), *revision = NULL;
    DIR *snapshots = access(config, F_OK) ? opendir(folder) : NULL;
    if (snapshots) revision = read_file(path, "refs/main");
    bool named = revision;
    for (const struct dirent *d; snapshots && !named && (d = readdir(snapshots));) {
        if (*d->d_name == '.') continue;
        if (revision)
            die("%s: a Hugging Face cache; give one of the directories in %s", path, folder);
        revision = format_text("%s", d->d_name);
    }
    if (snapshots) closedir(snapshots);
    if (revision) revision[strcspn(revision, "/\n")] = 0;
    char *found = format_text(revision ? "%s/%s" : "%s", revision ? folder : path, revision);
    free(revision);
    free(config);
    free(folder);
    return found;
}

static Checkpoint *open_parts(const char *path, void (*open_in)(Checkpoint *c)) {
    Checkpoint *c = allocate(1, sizeof *c);
    c->path = model_path(path);
    if (is_directory(c->path)) open_in(c);
    else open_model_bin(c);
    return c;
}

Checkpoint *checkpoint_open(const char *path) {
    return open_parts(path, open_directory);
}

Checkpoint *checkpoint_open_texts(const char *path) {
    return open_parts(path, open_texts);
}

void checkpoint_close(Checkpoint *c) {
    for (int i = 0; i < c->n_tensors; i++) free(c->tensors[i].name);
    for (int i = 0; i < c->n_maps; i++) {
        munmap((void *)c->maps[i].data, c->maps[i].bytes);
        free(c->maps[i].path);
    }
    free(c->tensors);
    free(c->maps);
    free(c->config);
    free(c->generation_config);
    free(c->quantization);
    free(c->path);
    free(c);
}

const Tensor *checkpoint_find(const Checkpoint *c, const char *name) {
    Tensor key = {.name = (char *)name};
    if (!c->n_tensors) return NULL;
    return bsearch(&key, c->tensors, c->n_tensors, sizeof key, by_name);
}

/* ---- the model in a file: config.json, weights ---- */

static int config_integer(const Json *j, const char *key, int min, int max) {
    int node = json_get(j, 0, key);
    int64_t value = json_integer(j, node, 0x1p53);
    if (value < min || value > max)
        die("%s: %s is %s, expected a whole number from %d to %d", j->name, key, shown(j, node),
            min, max);
    return value;
}

static double config_real(const Json *j, int object, const char *key) {
    double value;
    int node = json_get(j, object, key);
    if (!json_number(j, node, &value) || value <= 0)
        die("%s: %s is %s, expected a number above 0", j->name, key, shown(j, node));
    return value;
}

/* true or false; absent and null are false. */
static bool config_true(const Json *j, const char *key) {
    int node = json_get(j, 0, key);
    bool literal = json_type(j, node) == 'p', is_true = literal && json_is(j, node, "true");
    if (!is_true && !json_absent(j, node) && !(literal && json_is(j, node, "false")))
        die("%s: %s is %s, expected true or false", j->name, key, shown(j, node));
    return is_true;
}

/* LLaMA 3.1 has `want` there; anything else is another architecture. */
static void config_expect(const Json *j, int object, const char *key, const char *want) {
    int node = json_get(j, object, key);
    if (!json_is(j, node, want))
        die("%s: %s is %s; only LLaMA 3.1 is supported, where it is %s", j->name, key,
            shown(j, node), want);
}

static void add_eos(Config *c, const Json *j, int node) {
    int64_t id = json_integer(j, node, INT32_MAX);
    if (id < 0) die("%s: eos_token_id is %s, expected token ids", j->name, shown(j, node));
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] == id) return;
    if (c->n_eos == sizeof c->eos / sizeof *c->eos) die("%s: too many eos_token_id", j->name);
    c->eos[c->n_eos++] = id;
}

/* eos_token_id is a number, a list of them, or absent. */
static void add_all_eos(Config *c, const Json *j) {
    int node = json_get(j, 0, "eos_token_id");
    if (json_type(j, node) != '[' && !json_absent(j, node)) add_eos(c, j, node);
    for (int i = json_type(j, node) == '[' ? json_first(j, node) : -1; i >= 0;
         i = json_next(j, node, i))
        add_eos(c, j, i);
}

/* A number from 0 to max, -1 if it is absent. */
static double sampling_number(const Json *j, const char *key, double max) {
    int node = json_get(j, 0, key);
    double value = -1;
    if (!json_absent(j, node) && (!json_number(j, node, &value) || value < 0 || value > max))
        die("%s: %s is %s, expected a number from 0 to %g", j->name, key, shown(j, node), max);
    return value;
}

/* generation_config.json: its EOS counts instead of config.json's, its temperature and top_p where
 * no option says otherwise. */
static void generation_parse(const char *path, const char *text, Config *c) {
    char *name = format_text("%s: generation_config.json", path);
    Json *j = json_parse(name, text, strlen(text));
    if (json_type(j, 0) != '{') die("%s: no JSON object", name);
    if (!json_absent(j, json_get(j, 0, "eos_token_id"))) c->n_eos = 0;
    add_all_eos(c, j);
    c->temperature = sampling_number(j, "temperature", 100);
    c->top_p = sampling_number(j, "top_p", 1);
    int sample = json_get(j, 0, "do_sample");
    if (json_type(j, sample) == 'p' && json_is(j, sample, "false")) c->temperature = 0;
    static const char *const others[] = {
        "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        double value; // 0 and 1 turn each of them off
        if (json_number(j, json_get(j, 0, others[i]), &value) && value != 0 && value != 1)
            note("%s: %s %g is not used", name, others[i], value);
    }
    json_free(j);
    free(name);
}

Config config_parse(const char *path, const char *config, const char *generation_config) {
    char *name = format_text("%s: config.json", path);
    Json *j = json_parse(name, config, strlen(config));
    config_expect(j, 0, "model_type", "llama");
    config_expect(j, 0, "hidden_act", "silu");
    const char *absent[] = {"attention_bias", "mlp_bias"};
    for (int i = 0; i < 2; i++)
        if (config_true(j, absent[i]))
            die("%s: %s is true; only LLaMA 3.1 is supported, which has none", name, absent[i]);

    enum { MAX = 1 << 16 }; // channels: beyond it sums of int8 products could overflow int32
    Config c = {0};
    c.dim = config_integer(j, "hidden_size", 1, MAX);
    c.hidden_dim = config_integer(j, "intermediate_size", 1, MAX);
    c.n_layers = config_integer(j, "num_hidden_layers", 1, 4096);
    c.n_heads = config_integer(j, "num_attention_heads", 1, 4096);
    bool mha = json_absent(j, json_get(j, 0, "num_key_value_heads"));
    c.n_kv_heads = mha ? c.n_heads : config_integer(j, "num_key_value_heads", 1, 4096);
    if (c.n_heads % c.n_kv_heads)
        die("%s: num_attention_heads %d is no multiple of num_key_value_heads %d", name, c.n_heads,
            c.n_kv_heads);
    bool given = !json_absent(j, json_get(j, 0, "head_dim"));
    if (!given && c.dim % c.n_heads)
        die("%s: hidden_size %d is no multiple of num_attention_heads %d", name, c.dim, c.n_heads);
    c.head_dim = given ? config_integer(j, "head_dim", 2, 4096) : c.dim / c.n_heads;
    if (c.head_dim < 2 || c.head_dim % 2) die("%s: head_dim %d is not even", name, c.head_dim);
    if (c.n_heads * c.head_dim > MAX)
        die("%s: %d heads of %d, expected at most %d channels", name, c.n_heads, c.head_dim, MAX);
    c.vocab_size = config_integer(j, "vocab_size", 1, 1 << 24);
    c.max_context = config_integer(j, "max_position_embeddings", 2, 1 << 24);
    c.norm_eps = config_real(j, 0, "rms_norm_eps");
    if (!(c.norm_eps > 0 && c.norm_eps < INFINITY)) die("%s: rms_norm_eps is no float", name);
    c.tied = config_true(j, "tie_word_embeddings");

    // transformers 5 moved rope_theta and rope_scaling's content into rope_parameters; where both
    // are given, it reads rope_scaling.
    int rope = json_get(j, 0, "rope_scaling"), newer = json_get(j, 0, "rope_parameters");
    bool parameters =
        json_absent(j, rope) || (json_type(j, rope) == '{' && json_first(j, rope) < 0);
    if (parameters && !json_absent(j, newer)) rope = newer;
    else if (json_first(j, newer) >= 0) note("%s: rope_scaling counts, not rope_parameters", name);
    if (json_type(j, rope) != '{' && !json_absent(j, rope))
        die("%s: %s is %s, expected an object", name,
            parameters ? "rope_parameters" : "rope_scaling", shown(j, rope));
    bool inside = json_get(j, rope, "rope_theta") >= 0;
    c.rope_theta = config_real(j, inside ? rope : 0, "rope_theta");
    const char *key = json_get(j, rope, "rope_type") < 0 ? "type" : "rope_type";
    int type = json_get(j, rope, key);
    bool scaled = json_type(j, rope) == '{' && !json_is(j, type, "default");
    if (scaled && !(parameters && type < 0)) {
        config_expect(j, rope, key, "llama3");
        c.rope_factor = config_real(j, rope, "factor");
        c.rope_low_freq_factor = config_real(j, rope, "low_freq_factor");
        c.rope_high_freq_factor = config_real(j, rope, "high_freq_factor");
        c.rope_original_context = config_real(j, rope, "original_max_position_embeddings");
        if (c.rope_high_freq_factor <= c.rope_low_freq_factor)
            die("%s: high_freq_factor is not above low_freq_factor", name);
    }

    int bos = json_get(j, 0, "bos_token_id");
    c.bos = json_integer(j, bos, INT32_MAX);
    if (c.bos < 0 && !json_absent(j, bos))
        die("%s: bos_token_id is %s, expected a token id", name, shown(j, bos));
    add_all_eos(&c, j);
    json_free(j);
    free(name);
    c.temperature = c.top_p = -1;
    if (generation_config) generation_parse(path, generation_config, &c);
    return c;
}

static const Tensor *need(const Checkpoint *c, const Parameter *p) {
    const Tensor *t = checkpoint_find(c, p->name);
    if (!t) die("%s: tensor %s is missing", c->path, p->name);
    int n_dims = p->columns ? 2 : 1, n = 0;
    if (t->n_dims == n_dims && t->shape[0] == p->rows && t->shape[1] == p->columns) return t;
    char found[24 * MAX_DIMS] = "", expected[48];
    for (int i = 0; i < t->n_dims; i++)
        n += snprintf(found + n, sizeof found - n, i ? ", %lld" : "%lld", (long long)t->shape[i]);
    snprintf(expected, sizeof expected, p->columns ? "%d, %d" : "%d", p->rows, p->columns);
    die("%s: tensor %s has the shape [%s], expected [%s]", t->path, p->name, found, expected);
}

static void expect_dtype(const Tensor *t, bool ok, const char *expected) {
    if (!ok)
        die("%s: tensor %s has dtype %s, expected %s", t->path, t->name, dtypes[t->dtype].name,
            expected);
}

static bool has_zero_code(const uint8_t *codes, size_t n) {
    int found = 0;
#pragma omp parallel for reduction(| : found)
    for (size_t i = 0; i < n; i++) found |= (codes[i] & 0x0f) == 0 || (codes[i] & 0xf0) == 0;
    return found;
}

typedef struct {
    const Checkpoint *checkpoint;
    int group_size;
    bool *used; // [n_tensors] of the checkpoint
} Loading;

/* One tensor of a model from its file. */
static void load_tensor(void *to, const Parameter *p) {
    const Loading *loading = to;
    const Tensor *t = need(loading->checkpoint, p);
    loading->used[t - loading->checkpoint->tensors] = true;
    // 1. The dtype is one that the role can have.
    bool is_float = p->role == NORM || p->role == WEIGHT;
    bool in_bytes = p->role == WEIGHT && p->linear->dtype == I8;
    if (is_float) expect_dtype(t, t->dtype <= BF16 || in_bytes, "F32, F16 or BF16");
    else if (p->role == S_CHANNEL) expect_dtype(t, t->dtype == F32, "F32");
    else expect_dtype(t, t->dtype == U8, "U8");
    void *data = (void *)t->data; // read-only, as `mapped` says
    // 2. Weights stay in the file; small arrays are copied; numbers are checked.
    switch (p->role) {
    case NORM:
        floats(data, t->dtype, 0, p->rows, *p->norm);
        if (!all_finite(*p->norm, p->rows))
            die("%s: tensor %s holds NaN or infinity", t->path, t->name);
        break;
    case WEIGHT:
        p->linear->dtype = t->dtype;
        p->linear->w = data;
        break;
    case QWEIGHT:
        p->linear->dtype = U8;
        p->linear->qweight = data;
        if (loading->group_size < 0 && has_zero_code(data, t->bytes))
            die("%s: tensor %s holds the code 0, per channel 1 to 15 are expected", t->path,
                t->name);
        break;
    case S_CHANNEL:
        p->linear->s_channel = allocate(p->rows, sizeof(float));
        floats(data, F32, 0, p->rows, p->linear->s_channel);
        if (!all_finite(p->linear->s_channel, p->rows))
            die("%s: tensor %s is not finite", t->path, t->name);
        break;
    case S_GROUP:
        p->linear->s_group = data;
        for (size_t i = 0; i < t->bytes; i++)
            if (p->linear->s_group[i] < 1 || p->linear->s_group[i] > 15)
                die("%s: tensor %s holds %d, expected 1 to 15", t->path, t->name,
                    p->linear->s_group[i]);
        break;
    }
    if (p->linear) p->linear->mapped = true;
}

/* The group size that a model.bin's quantization names: 128, -1, or 0 for an unquantized model. */
static int quantization_group_size(const Checkpoint *c) {
    if (!c->quantization) return 0;
    char *name = format_text("%s: quantization", c->path);
    Json *j = json_parse(name, c->quantization, strlen(c->quantization));
    double bits = 0, group_size = 0;
    json_number(j, json_get(j, 0, "bits"), &bits);
    json_number(j, json_get(j, 0, "group_size"), &group_size);
    if (bits != 4 || (group_size != -1 && group_size != GROUP))
        die("%s: bits %g, group_size %g; expected 4 bits, group_size -1 or %d", name, bits,
            group_size, GROUP);
    json_free(j);
    free(name);
    return group_size;
}

/* The tensors of one linear, float or quantized. */
static void visit_linear(const char *name, int N, int K, int group_size, Linear *l,
                         void (*visit)(void *to, const Parameter *p), void *to) {
    static const char *const suffixes[] = {[WEIGHT] = "weight",
                                           [QWEIGHT] = "qweight",
                                           [S_CHANNEL] = "s_channel",
                                           [S_GROUP] = "s_group"};
    const int columns[] = {[WEIGHT] = K, [QWEIGHT] = K / 2, [S_CHANNEL] = 0, [S_GROUP] = K / GROUP};
    l->N = N;
    l->K = K;
    Role last = group_size > 0 ? S_GROUP : group_size < 0 ? S_CHANNEL : WEIGHT;
    for (Role role = group_size ? QWEIGHT : WEIGHT; role <= last; role++) {
        char full[160];
        snprintf(full, sizeof full, "%s.%s", name, suffixes[role]);
        visit(to, &(Parameter){role, full, N, columns[role], l, NULL});
    }
}

void for_each_tensor(Model *m, int first, int last, void (*visit)(void *to, const Parameter *p),
                     void *to) {
    const Config *c = &m->config;
    for (int l = first; l <= last; l++) {
        // The embedding, in front of the layers; the final norm and lm_head, behind them.
        if (l < 0)
            visit_linear("model.embed_tokens", c->vocab_size, c->dim, 0, &m->embedding, visit, to);
        if (l == c->n_layers) {
            visit(to, &(Parameter){NORM, "model.norm.weight", c->dim, 0, NULL, &m->norm});
            if (!c->tied) visit_linear("lm_head", c->vocab_size, c->dim, 0, &m->lm_head, visit, to);
            if (m->lm_head.dtype == I8)
                visit(to, &(Parameter){S_CHANNEL, "lm_head.s_channel", c->vocab_size, 0,
                                       &m->lm_head, NULL});
        }
        if (l < 0 || l == c->n_layers) continue;
        // The linears of a layer, then the norms.
        Layer *layer = &m->layers[l];
        char name[128];
        for (int k = 0; k < N_LINEARS; k++) {
            int N, K;
            linear_shape(c, k, &N, &K);
            snprintf(name, sizeof name, "model.layers.%d.%s", l, linear_names[k]);
            visit_linear(name, N, K, m->group_size, &layer->linears[k], visit, to);
        }
        snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", l);
        visit(to, &(Parameter){NORM, name, c->dim, 0, NULL, &layer->attention_norm});
        snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", l);
        visit(to, &(Parameter){NORM, name, c->dim, 0, NULL, &layer->ffn_norm});
    }
}

/* A model without weights, with room for its norms. */
static Model *model_new(const Config *c, int group_size) {
    Model *m = allocate(1, sizeof *m);
    *m = (Model){.config = *c, .group_size = group_size};
    m->norm = allocate(c->dim, sizeof(float));
    m->layers = allocate(c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++) {
        m->layers[l].attention_norm = allocate(2 * (size_t)c->dim, sizeof(float));
        m->layers[l].ffn_norm = m->layers[l].attention_norm + c->dim;
    }
    return m;
}

void check_group_size(const char *path, const Config *c, int group_size) {
    int unit = group_size > 0 ? group_size : 2, N, K;
    for (int k = 0; k < N_LINEARS && group_size; k++) {
        linear_shape(c, k, &N, &K);
        if (K % unit)
            die("%s: %s has %d input channels, no multiple of %d%s", path, linear_names[k], K, unit,
                unit == GROUP ? " (-g -1 quantizes per channel)" : "");
    }
}

/* Says which tensors of the file no part of the model reads, the first of them by name. */
static void note_unused(const Checkpoint *c, const bool *used) {
    char names[600] = "";
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++) {
        const Tensor *t = &c->tensors[i];
        const char *end = strrchr(t->name, '.');
        if (used[i] || (t->dtype == U8 && t->n_dims == 1)) continue; // a text that travels along
        if (end && !strcmp(end, ".inv_freq")) continue;              // RoPE's, computed
        size_t length = strlen(names);
        if (length + strlen(t->name) + 8 < sizeof names)
            sprintf(names + length, "%s%s", n ? ", " : "", t->name);
        else if (strcmp(names + length - 3, "...")) strcat(names, ", ...");
        n++;
    }
    if (n) note("%s: %d tensors are not used: %s", c->path, n, names);
}

/* Refuses weights that another program quantized. */
static void check_quantization(const Checkpoint *c) {
    char *name = format_text("%s: config.json", c->path);
    Json *j = json_parse(name, c->config, strlen(c->config));
    int how = json_get(j, 0, "quantization_config");
    const Tensor *t = checkpoint_find(c, "model.layers.0.self_attn.q_proj.weight");
    const char *method = shown(j, json_get(j, how, "quant_method"));
    if (!json_absent(j, how) && (!t || t->dtype > BF16))
        die("%s: quantization_config, quant_method %s: the weights are quantized already, and not "
            "by this program",
            name, method);
    if (!json_absent(j, how))
        note("%s: quantization_config, quant_method %s, is not used: the weights are %s", name,
             method, dtype_name(t->dtype));
    json_free(j);
    free(name);
}

/* The token that begins a text: tokenizer.json's post-processor says so, and where there is none
 * config.json. -1: none. */
static int begin_token(const Checkpoint *c, int configured) {
    if (!c->tokenizer) return configured;
    char *name = format_text("%s: tokenizer.json", c->path);
    Json *j = json_parse(name, c->tokenizer, c->tokenizer_bytes);
    int post = json_get(j, 0, "post_processor"), list = json_get(j, post, "processors");
    bool sequence = json_is(j, json_get(j, post, "type"), "Sequence");
    int bos = -1, extra = 0;
    bool text = false;
    for (int p = sequence ? json_first(j, list) : post; p >= 0;
         p = sequence ? json_next(j, list, p) : -1) {
        int template = json_get(j, p, "single"), type = json_get(j, p, "type");
        if (!json_absent(j, p) && !json_is(j, type, "ByteLevel") && template <0)
            die("%s: post_processor is %s, expected TemplateProcessing", name, shown(j, type));
        for (int i = json_first(j, template); i >= 0; i = json_next(j, template, i)) {
            int special = json_get(j, i, "SpecialToken");
            size_t bytes;
            char *id = special < 0 ? NULL : json_string(j, json_get(j, special, "id"), &bytes);
            if (!id) text = true;
            else if (text || bos >= 0) extra++;
            else {
                int token = json_get(j, json_get(j, p, "special_tokens"), id);
                bos = json_integer(j, json_first(j, json_get(j, token, "ids")), INT32_MAX);
            }
            free(id);
        }
    }
    if (extra) note("%s: post_processor adds more to a text than its first token: not used", name);
    if (json_absent(j, post)) bos = configured;
    if (json_absent(j, post) && bos >= 0)
        note("%s: no post_processor: texts begin with config.json's bos_token_id, %d", name, bos);
    else if (configured >= 0 && configured != bos)
        note("%s: texts begin with %d, not with config.json's bos_token_id %d", name, bos,
             configured);
    json_free(j);
    free(name);
    return bos;
}

Model *model_load(const Checkpoint *checkpoint) {
    Config c = config_parse(checkpoint->path, checkpoint->config, checkpoint->generation_config);
    if (!checkpoint->quantization) check_quantization(checkpoint);
    c.bos = begin_token(checkpoint, c.bos);
    // A tied lm_head that rotation or its 8 bits untied stands in the file all the same.
    const Tensor *head = checkpoint_find(checkpoint, "lm_head.weight");
    if (head) c.tied = false;
    Model *m = model_new(&c, quantization_group_size(checkpoint));
    if (head && head->dtype == I8 && m->group_size) m->lm_head.dtype = I8;
    check_group_size(checkpoint->path, &c, m->group_size);
    Loading loading = {checkpoint, m->group_size, allocate(checkpoint->n_tensors, sizeof(bool))};
    for_each_tensor(m, -1, c.n_layers, load_tensor, &loading);
    note_unused(checkpoint, loading.used);
    free(loading.used);
    if (c.tied) m->lm_head = m->embedding;
    return m;
}

const char *weights_kind(const Model *m) {
    if (m->group_size == 0) return dtype_name(m->layers[0].q.dtype);
    return m->group_size < 0 ? "W4A8 per channel" : "W4A8 g128";
}

void describe_model(const Checkpoint *checkpoint, const Model *m, const char *where) {
    const Config *c = &m->config;
    double bytes = 0;
    for (int i = 0; i < checkpoint->n_tensors; i++) bytes += checkpoint->tensors[i].bytes;
    fprintf(stderr, "%s: LLaMA 3.1, dim %d, ffn %d, %d layers, %d/%d heads of %d, vocabulary %d\n",
            checkpoint->path, c->dim, c->hidden_dim, c->n_layers, c->n_heads, c->n_kv_heads,
            c->head_dim, c->vocab_size);
    fprintf(stderr, "weights %s, %.1f MB%s%s\n", weights_kind(m), bytes / 1e6, where ? ", on " : "",
            where ? where : "");
    if (checkpoint->quantization) {
        char *made = format_text("%s", checkpoint->quantization);
        make_printable(made);
        fprintf(stderr, "made with %s\n", made);
        free(made);
    }
    print_notes();
}

/* Says which tokens of a node of the files beside tokenizer.json it lacks: strings of an array or
 * object, or their "content". `id` is the one that the file gives it, or -1. */
static void note_tokens(const Tokenizer *t, const Json *j, int node, int64_t id) {
    bool object = json_type(j, node) == '{';
    int content = object ? json_get(j, node, "content") : node;
    if (json_type(j, content) == '"') {
        size_t bytes;
        char *token = json_string(j, content, &bytes);
        int found = tokenizer_id(t, token);
        if (found < 0 || (id >= 0 && id != found))
            note("%s: token %s is not used: tokenizer.json has it not, or another id for it",
                 j->name, token);
        free(token);
    } else {
        for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i))
            note_tokens(t, j, object ? i + 1 : i, -1);
    }
}

/* The same of a whole file: added_tokens.json {TOKEN: id}, or one with {"bos_token": TOKEN,
 * "extra_special_tokens": [TOKEN, ..], "added_tokens_decoder": {id: TOKEN}}. */
static void note_outside_tokens(const Tokenizer *t, const Checkpoint *c, const Tensor *file) {
    char *name = format_text("%s: %s", c->path, file->name);
    Json *j = json_parse(name, file->data, file->bytes);
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        size_t bytes;
        char *text = json_string(j, key, &bytes), *end = strrchr(text, '_');
        if (!strcmp(file->name, "added_tokens.json"))
            note_tokens(t, j, key, json_integer(j, key + 1, INT32_MAX));
        else if (end && (!strcmp(end, "_token") || !strcmp(end, "_tokens") ||
                         !strcmp(text, "added_tokens_decoder")))
            note_tokens(t, j, key + 1, -1);
        free(text);
    }
    json_free(j);
    free(name);
}

Tokenizer *checkpoint_tokenizer(const Checkpoint *c) {
    if (!c->tokenizer) die("%s: it has no tokenizer.json", c->path);
    char *name = format_text("%s: tokenizer.json", c->path);
    Tokenizer *t = tokenizer_load(name, c->tokenizer, c->tokenizer_bytes);
    free(name);
    for (int i = 0; i < N_CHAT_FILES; i++) {
        const char *end = c->chat_files[i].data ? strrchr(c->chat_files[i].name, '.') : NULL;
        if (end && !strcmp(end, ".json")) note_outside_tokens(t, c, &c->chat_files[i]);
    }
    return t;
}

int *encode_text(const Tokenizer *t, const Config *c, const char *name, const char *text,
                 size_t bytes, int *n) {
    int *ids = tokenizer_encode(t, text, bytes, true, n);
    if (c->bos >= 0 && (*n == 0 || ids[0] != c->bos)) {
        ids = realloc(ids, (*n + 1) * sizeof *ids);
        if (!ids) die("out of memory");
        memmove(ids + 1, ids, (*n)++ * sizeof *ids);
        ids[0] = c->bos;
    }
    for (int i = 0; i < *n; i++)
        if (ids[i] >= c->vocab_size)
            die("%s: token %d is beyond the %d rows of the embedding", name, ids[i], c->vocab_size);
    return ids;
}

int *read_tokens(const Tokenizer *t, const Config *c, const char *path, int *length, int *n) {
    size_t bytes;
    char *text = read_text(path, &bytes);
    if (!t) die("%s: the model has no tokenizer.json, which it needs", path);
    int *ids = encode_text(t, c, path, text, bytes, n);
    free(text);
    if (!*length) *length = c->max_context < 2048 ? c->max_context : 2048;
    if (*n < *length)
        die("%s: it has %d tokens, a window needs %d (-l sets it)", path, *n, *length);
    return ids;
}

void print_perplexity(const Checkpoint *c, Engine *e, const char *label, const int *tokens, int n,
                      int length) {
    Perplexity p = perplexity(e, tokens, n, length, 0, show_windows);
    if (!isfinite(p.mean))
        die("%s: the perplexity is %f: the weights are damaged", c->path, p.mean);
    printf("%sperplexity %.4f (%d windows of %d)", label, p.mean, p.windows, length);
    if (p.windows > 1) printf(", standard error %.2f", p.error);
    putchar('\n');
    fflush(stdout);
}

/* ============================================================================================
 * 6  Small things: errors, options, progress, files that are written
 * ============================================================================================ */

/* A name from a file may hold anything; it stays on its line. */
static void make_printable(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f) *text = '?';
}

static void remove_unfinished(void);

static void end_with(int status, const char *format, va_list args) {
    static char text[8192]; // there may be no memory to allocate
    vsnprintf(text, sizeof text, format, args);
    make_printable(text);
    fprintf(stderr, "error: %s\n", text);
    remove_unfinished();
    fflush(NULL);
    _exit(status); // what is still allocated goes with the process
}

void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with(1, format, args);
    va_end(args);
    __builtin_unreachable();
}

void die_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with(2, format, args);
    va_end(args);
    __builtin_unreachable();
}

static char notes[1 << 14];

void note(const char *format, ...) {
    size_t length = strlen(notes), room = sizeof notes - length;
    va_list args;
    va_start(args, format);
    int bytes = vsnprintf(notes + length, room, format, args);
    va_end(args);
    make_printable(notes + length);
    if (bytes < 0 || (size_t)bytes + 2 > room) notes[length] = 0;
    else strcat(notes, "\n");
}

void print_notes(void) {
    for (char *line = notes, *end; (end = strchr(line, '\n')); line = end + 1)
        fprintf(stderr, "note: %.*s\n", (int)(end - line), line);
    *notes = 0;
}

void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) die("out of memory: %zu x %zu bytes were asked for", count, size);
    return p;
}

char *format_text(const char *format, ...) {
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

void open_standard_streams(void) {
    int fd;
    while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd <= STDERR_FILENO) {
    }
    if (fd < 0) die("/dev/null: %s", strerror(errno));
    close(fd);
}

void flush_output(void) {
    if (fflush(stdout) || ferror(stdout)) die("stdout: %s", strerror(errno));
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

char *beside_program(const char *name) {
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0) die("/proc/self/exe: %s", strerror(errno));
    program[n] = 0;
    *strrchr(program, '/') = 0;
    return format_text("%s/%s", program, name);
}

void print_and_exit(const char *text) {
    fputs(text, stdout);
    flush_output();
    exit(0);
}

double parse_number(char flag, const char *value, double min, double max) {
    char *end;
    double x = strtod(value, &end);
    if (end == value || *end || !(x >= min && x <= max))
        die_usage("-%c %s: expected a number from %g to %g", flag, value, min, max);
    return x;
}

long long parse_integer(char flag, const char *value, long long min, long long max) {
    char *end;
    errno = 0;
    long long x = strtoll(value, &end, 10);
    if (end == value || *end || errno || x < min || x > max)
        die_usage("-%c %s: expected a whole number from %lld to %lld", flag, value, min, max);
    return x;
}

bool parse_choice(char flag, const char *value, const char *first, const char *second) {
    bool is_second = !strcmp(value, second);
    if (!is_second && strcmp(value, first))
        die_usage("-%c %s: expected %s or %s", flag, value, first, second);
    return is_second;
}

void show_progress(const char *what, int done, int total, double seconds_left) {
    static double said; // when the newest line was; 0: nothing is at work
    char left[64] = "";
    if (seconds_left >= 0) snprintf(left, sizeof left, ", %.0f s left", seconds_left);
    // 1. On a terminal: a bar, drawn over the one before.
    if (isatty(STDERR_FILENO)) {
        int width = 40 * done / total;
        fprintf(stderr, "\r[%.*s%*s] %d of %d %s%s\033[K%s", width,
                "########################################", 40 - width, "", done, total, what, left,
                done == total ? "\n" : "");
        return;
    }
    // 2. In a pipe: the first line, the last, and between them one every 5 s.
    bool first = !said, last = done == total;
    if (!first && !last && seconds() - said < 5) return;
    fprintf(stderr, "%d of %d %s%s\n", done, total, what, left);
    said = last ? 0 : seconds();
}

static void show_windows(int done, int total) {
    show_progress("windows", done, total, -1);
}

/* What is being written. Its files have no name (O_TMPFILE) until they are complete, so that
 * whatever ends the program leaves nothing. Where the file system or the lack of /proc forbids
 * that, they have their temporary names from the start, and die() removes them. */
struct Output {
    char *path;      // where it will appear
    char *temporary; // beside it: the name just before
    bool directory;
    bool named; // the files have names, under `temporary`
    int n;
    struct {
        int fd;
        char *name; // under which it is complete: `temporary`, or of a directory a file in it
    } * files;      // [n]
};

static Output *unfinished;

static void remove_unfinished(void) {
    if (!unfinished || !unfinished->named) return;
    for (int i = 0; i < unfinished->n; i++) unlink(unfinished->files[i].name);
    if (unfinished->directory) rmdir(unfinished->temporary);
}

static void die_unwritten(const Output *o) {
    die("%s: cannot be written: %s", o->path, strerror(errno));
}

/* The path that is made or replaced: a link is followed, and its target must be there. Refused are
 * what is no regular file, or no directory, and a file that stdout or stderr goes to. */
static char *target_of(const char *path, bool directory) {
    struct stat st, own;
    bool there = !stat(path, &st);
    if (there && !(directory ? S_ISDIR(st.st_mode) : S_ISREG(st.st_mode)))
        die("%s: cannot be written: not a %s", path, directory ? "directory" : "regular file");
    for (int fd = STDOUT_FILENO; there && fd <= STDERR_FILENO; fd++)
        if (!fstat(fd, &own) && own.st_dev == st.st_dev && own.st_ino == st.st_ino)
            die("%s: cannot be written: stdout or stderr goes there", path);
    if (lstat(path, &st) || S_ISREG(st.st_mode)) return format_text("%s", path);
    char *target = realpath(path, NULL); // also of "name/.", beside which nothing can be made
    if (!target) die("%s: cannot be written: a link to no file", path);
    return target;
}

/* A file without a name in the directory that `path` is in, or -1. */
static int open_nameless(const char *path) {
    const char *slash = strrchr(path, '/');
    int bytes = slash ? slash - path + 1 : 0;
    char *directory = format_text("%.*s.", bytes, path); // "." is the current one
    bool can = !access("/proc/self/fd", X_OK);           // where name_file() finds it
    int fd = can ? open(directory, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666) : -1;
    free(directory);
    return fd;
}

Output *output_open(const char *path, bool directory) {
    signal(SIGXFSZ, SIG_IGN); // a file size limit then fails like a full disk
    Output *o = allocate(1, sizeof *o);
    *o = (Output){.path = target_of(path, directory), .directory = directory};
    struct stat st; // a name that no other process has left
    for (int id = getpid(); !o->temporary || !lstat(o->temporary, &st); id++) {
        free(o->temporary);
        o->temporary = format_text("%s.%d.tmp", o->path, id);
    }
    int fd = open_nameless(o->path);
    o->named = fd < 0;
    if (fd >= 0) close(fd);
    if (directory && o->named && mkdir(o->temporary, 0777)) die_unwritten(o);
    unfinished = o;
    if (!directory) output_add(o, NULL);
    return o;
}

int output_add(Output *o, const char *name) {
    o->files = realloc(o->files, (o->n + 1) * sizeof *o->files);
    if (!o->files) die("out of memory");
    char *full = format_text(name ? "%s/%s" : "%s", o->temporary, name);
    int fd = o->named ? open(full, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)
                      : open_nameless(o->path);
    if (fd < 0) die_unwritten(o);
    o->files[o->n].fd = fd;
    o->files[o->n].name = full;
    return o->n++;
}

void output_write(const Output *o, int file, const void *data, size_t bytes, size_t offset) {
    for (size_t done = 0; done < bytes;) {
        int fd = o->files[file].fd;
        ssize_t n = pwrite(fd, (const char *)data + done, bytes - done, offset + done);
        if (n == 0) errno = ENOSPC;
        if (n <= 0) die_unwritten(o);
        done += n;
    }
}

/* Gives a file without a name its name. */
static bool name_file(int fd, const char *name) {
    char nameless[32];
    snprintf(nameless, sizeof nameless, "/proc/self/fd/%d", fd);
    return !linkat(AT_FDCWD, nameless, AT_FDCWD, name, AT_SYMLINK_FOLLOW);
}

void output_close(Output *o) {
    // 1. All bytes reach the disk.
    for (int i = 0; i < o->n; i++)
        if (fsync(o->files[i].fd)) die_unwritten(o);
    // 2. What has no name gets the temporary one.
    bool nameless = !o->named;
    if (nameless && o->directory && mkdir(o->temporary, 0777)) die_unwritten(o);
    o->named = true; // from here on die() removes it
    for (int i = 0; i < o->n; i++) {
        if (nameless && !name_file(o->files[i].fd, o->files[i].name)) die_unwritten(o);
        if (close(o->files[i].fd)) die_unwritten(o);
    }
    // 3. In one step it replaces what was there before.
    if (rename(o->temporary, o->path)) die_unwritten(o);
    unfinished = NULL;
    for (int i = 0; i < o->n; i++) free(o->files[i].name);
    free(o->files);
    free(o->temporary);
    free(o->path);
    free(o);
}
