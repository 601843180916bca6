/* QQQ in plain C, no CUDA. From top to bottom:
 *
 *   1  the model: the forward pass, float and W4A8
 *   2  the numbers of W4A8, and the linear layer that they make
 *   3  the method: what quantizes a layer, step by step
 *   4  the same, faster: attention, products, Cholesky, 16-bit floats
 *
 * qqq.h has the contracts of the public functions. A first reader may stop after section 3. */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "files.h"

bool textbook = false, use_amx = true;

/* ---- what is defined further down ---- */

/* A float matrix seen as W [n][k]: element (n, k) is w[n * row + k * column]. */
typedef struct {
    const void *w;
    DType dtype;
    size_t row, column;
} View;

static int smaller(int a, int b);
static float max_magnitude(const float *x, size_t n);
static float clamp(float x, float low, float high);
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
    for (int j = 0; j < K / 2; j++) {
        q[2 * j] = (qweight[j] & 0x0f) - 8;
        q[2 * j + 1] = (qweight[j] >> 4) - 8;
    }
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
 * Two models run side by side over the calibration windows, a layer at a time: the float model, and
 * the one whose layers so far are quantized. F are the inputs of a linear in the one, X in the
 * other. QQQ, arXiv 2406.09904; what goes beyond it is said where it stands.
 * ============================================================================================ */

struct Quantizer {
    Method method;
    Config config; // of one layer, as the buffers are
    int n_layers;
    int n, length;            // windows, tokens of each; n = 0: nothing needs calibration
    float *x_float, *x_quant; // [n][length][dim] the residual streams
    State *s_float, *s_quant; // buffers for one window
};

static void smooth(const Quantizer *q, int l, Layer *layer, Smoothing found[3]);
static void quantize_half(const Quantizer *q, int l, const Layer *f, Layer *out, bool ffn,
                          Errors *errors);

void quantize_layer(Quantizer *q, const Layer *layer, int l, Layer *out, Smoothing *found,
                    Errors *errors) {
    Layer f = layer_float_copy(&q->config, layer, l);
    if (q->method.signs) rotate_layer(&q->config, &f, q->method.signs); // step 1
    if (q->method.smooth) smooth(q, l, &f, found);                      // step 2
    *out = f; // with f's norms; its linears turn W4A8 one after the other, steps 3 to 5:
    quantize_half(q, l, &f, out, false, errors); // q, k, v, then o
    quantize_half(q, l, &f, out, true, errors);  // gate, up, then down
    for (int k = 0; k < N_LINEARS; k++) linear_free(&f.linears[k]);
}

static float *window(const Quantizer *q, float *x, int w) {
    return x + (size_t)w * q->length * q->config.dim;
}

/* Step 6: c times the final norm's weight w brings the quantized model's output nearest to the
 * float model's, by least squares: c = sum w^2 x f / sum w^2 x^2, x and f normed. Noise in x makes
 * c < 1: the logits of a noisy model are too sure of themselves. An extension. */
void final_scale(const Quantizer *q, const float *norm, double *xf, double *xx) {
    int dim = q->config.dim, T = q->length;
    *xf = *xx = 0;
    for (int w = 0; w < q->n; w++) {
        float *f = q->s_float->xb, *x = q->s_quant->xb;
        rmsnorm(window(q, q->x_float, w), norm, T, dim, q->config.norm_eps, f);
        rmsnorm(window(q, q->x_quant, w), norm, T, dim, q->config.norm_eps, x);
        for (size_t i = 0; i < (size_t)T * dim; i++) {
            *xf += (double)x[i] * f[i];
            *xx += (double)x[i] * x[i];
        }
    }
}

Quantizer *quantizer_new(const Config *c, const Method *method, const Linear *embedding,
                         const int *tokens, int n_windows, int length) {
    Quantizer *q = allocate(1, sizeof *q);
    size_t dim = c->dim, total = (size_t)n_windows * length;
    *q = (Quantizer){
        .method = *method, .config = *c, .n_layers = c->n_layers, .n = n_windows, .length = length};
    q->config.n_layers = 1;
    if (!n_windows) return q;
    q->x_float = allocate(total * dim, sizeof(float));
    q->x_quant = allocate(total * dim, sizeof(float));
    for (size_t i = 0; i < total; i++)
        floats(embedding->w, embedding->dtype, tokens[i] * dim, dim, q->x_float + i * dim);
    memcpy(q->x_quant, q->x_float, total * dim * sizeof(float));
    q->s_float = state_new(&q->config, length, length, 16);
    q->s_quant = state_new(&q->config, length, length, 16);
    return q;
}

void quantizer_free(Quantizer *q) {
    free(q->x_float);
    free(q->x_quant);
    state_free(q->s_float);
    state_free(q->s_quant);
    free(q);
}

Linear float_copy(const Linear *l, const char *name) {
    size_t n = (size_t)l->N * l->K;
    float *w = allocate(n, sizeof *w);
    floats(l->w, l->dtype, 0, n, w);
    if (!all_finite(w, n)) die("tensor %s.weight holds NaN or infinity", name);
    return (Linear){.N = l->N, .K = l->K, .dtype = F32, .w = w};
}

void require_finite(const Linear *l, const char *name) {
    float row[l->K];
    for (size_t n = 0; n < (size_t)l->N; n++) {
        floats(l->w, l->dtype, n * l->K, l->K, row);
        if (!all_finite(row, l->K)) die("tensor %s.weight holds NaN or infinity", name);
    }
}

Layer layer_float_copy(const Config *c, const Layer *layer, int index) {
    Layer copy;
    size_t bytes = c->dim * sizeof(float);
    copy.attention_norm = allocate(2, bytes);
    copy.ffn_norm = copy.attention_norm + c->dim;
    memcpy(copy.attention_norm, layer->attention_norm, bytes);
    memcpy(copy.ffn_norm, layer->ffn_norm, bytes);
    for (int k = 0; k < N_LINEARS; k++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", index, linear_names[k]);
        copy.linears[k] = float_copy(&layer->linears[k], name);
    }
    return copy;
}

/* ---- step 1: rotation
 *
 *   R = diag(signs) H_D / sqrt(D),  H_D the Hadamard matrix of dim D,  H_d of head_dim
 *   E <- E R,   W <- W diag(norm) R for q, k, v, gate, up and lm_head,  norm <- 1,
 *   W <- R^T W for o and down,   W_v,h <- H_d^T W_v,h,   W_o,h <- W_o,h H_d
 *
 * For n = m 2^k, m odd, H_n is the Hadamard matrix of 2^k times (Kronecker) the Hartley matrix of
 * m, cos(2 pi ij / m) + sin(2 pi ij / m): so n may be 576 or 3072. Both are symmetric and, over
 * their roots, orthogonal. The residual stream is x R instead of x. R is orthogonal, so RMSNorm
 * without its weights commutes with it, and the model computes the same; but an outlying channel is
 * now spread over all. QuaRot, arXiv 2404.00456. ---- */

void hadamard(double *x, int n) {
    int m = n / (n & -n); // n = m 2^k, m odd
    for (int half = m; half < n; half *= 2)
        for (int i = 0; i < n; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                double a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
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

/* Each vector of n elements, `stride` floats apart, times diag(signs) H / sqrt(n). */
static void rotate_vector(float *x, size_t stride, int n, const int8_t *signs, double *buffer) {
    for (int i = 0; i < n; i++)
        buffer[i] = signs ? signs[i] * (double)x[i * stride] : x[i * stride];
    hadamard(buffer, n);
    for (int i = 0; i < n; i++) x[i * stride] = buffer[i];
}

void rotate_inputs(float *w, int N, int K, int n, const int8_t *signs) {
#pragma omp parallel
    {
        double *buffer = allocate(n, sizeof *buffer);
#pragma omp for
        for (size_t row = 0; row < (size_t)N; row++)
            for (int k = 0; k < K; k += n) rotate_vector(w + row * K + k, 1, n, signs, buffer);
        free(buffer);
    }
}

void rotate_outputs(float *w, int N, int K, int n, const int8_t *signs) {
#pragma omp parallel
    {
        double *buffer = allocate(n, sizeof *buffer);
#pragma omp for
        for (int k = 0; k < K; k++)
            for (size_t row = 0; row < (size_t)N; row += n)
                rotate_vector(w + row * K + k, K, n, signs, buffer);
        free(buffer);
    }
}

void scale_inputs(float *w, int N, int K, const float *s) {
#pragma omp parallel for
    for (size_t n = 0; n < (size_t)N; n++)
        for (size_t k = 0; k < (size_t)K; k++) w[n * K + k] *= s[k];
}

static void rotate_input(Linear *w, const float *norm, const int8_t *signs) {
    if (norm) scale_inputs(w->w, w->N, w->K, norm);
    rotate_inputs(w->w, w->N, w->K, w->K, signs);
}

void rotate_layer(const Config *c, Layer *l, const int8_t *signs) {
    for (int i = 0; i < 3; i++) rotate_input(&l->linears[i], l->attention_norm, signs);
    rotate_input(&l->gate, l->ffn_norm, signs);
    rotate_input(&l->up, l->ffn_norm, signs);
    for (int i = 0; i < c->dim; i++) l->attention_norm[i] = l->ffn_norm[i] = 1.0f;
    rotate_outputs(l->v.w, l->v.N, l->v.K, c->head_dim, NULL);
    rotate_inputs(l->o.w, l->o.N, l->o.K, c->head_dim, NULL);
    rotate_outputs(l->o.w, l->o.N, l->o.K, c->dim, signs);
    rotate_outputs(l->down.w, l->down.N, l->down.K, c->dim, signs);
}

void rotate_ends(Linear *embedding, Linear *lm_head, float *norm, const int8_t *signs,
                 void (*progress)(int done, int total)) {
    enum { ROWS = 1024 }; // between two reports
    int N = embedding->N, K = embedding->K;
    for (int n = 0; n < N; n += ROWS) {
        Linear part = {
            .N = smaller(ROWS, N - n), .K = K, .w = (float *)embedding->w + (size_t)n * K};
        rotate_input(&part, NULL, signs);
        part.w = (float *)lm_head->w + (size_t)n * K;
        rotate_input(&part, norm, signs);
        if (progress) progress(n + part.N, N);
    }
    for (int i = 0; i < K; i++) norm[i] = 1.0f;
}

/* ---- step 2: adaptive smoothing
 *
 *   s_j = max(1, max|X_j| / t),   X <- X diag(s)^-1,   W <- W diag(s)
 *
 * X W^T stays the same, but the channels of X that stand out above the threshold t no longer
 * coarsen the int8 steps of a whole token. t is searched: the one with which the quantized output
 * is nearest to the float output. QQQ, arXiv 2406.09904, section 3.1. ---- */

void smoothing_scales(const float *max, int K, float t, float *s) {
    for (int k = 0; k < K; k++) s[k] = max[k] > t ? max[k] / t : 1.0f;
}

void smooth_layer(Layer *l, const float *s_qkv, const float *s_gate_up, const float *s_down) {
    int dim = l->q.K, hidden_dim = l->down.K;
    for (int i = 0; i < dim; i++) {
        l->attention_norm[i] /= s_qkv[i];
        l->ffn_norm[i] /= s_gate_up[i];
    }
    for (int i = 0; i < 3; i++) scale_inputs(l->linears[i].w, l->linears[i].N, dim, s_qkv);
    scale_inputs(l->gate.w, hidden_dim, dim, s_gate_up);
    scale_inputs(l->up.w, hidden_dim, dim, s_gate_up);
    for (size_t n = 0; n < (size_t)hidden_dim; n++)
        for (int k = 0; k < dim; k++) ((float *)l->up.w)[n * dim + k] /= s_down[n];
    scale_inputs(l->down.w, l->down.N, hidden_dim, s_down);
}

/* W diag(s), rounded to nearest. */
static Linear quantize_smoothed(const Linear *w, const float *s, const float *importance,
                                int group_size) {
    float *smoothed = allocate((size_t)w->N * w->K, sizeof *smoothed);
    floats(w->w, w->dtype, 0, (size_t)w->N * w->K, smoothed);
    scale_inputs(smoothed, w->N, w->K, s);
    Linear l = round_to_nearest(smoothed, importance, w->N, w->K, group_size);
    free(smoothed);
    return l;
}

static double squared_distance(const float *x, const float *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    return sum;
}

static void divide(const float *x, const float *s, size_t T, size_t K, float *y) {
    for (size_t i = 0; i < T * K; i++) y[i] = x[i] / s[i % K];
}

float search_smoothing(const Linear *w, int n_linears, const float *x, int T, const float *max,
                       int group_size, float *s) {
    size_t K = w->K, N = 0;
    for (int i = 0; i < n_linears; i++) N += w[i].N;
    float *mean_square = allocate(K, sizeof *s), *importance = allocate(K, sizeof *s);
    for (size_t i = 0; i < T * K; i++) mean_square[i % K] += x[i] * x[i] / T;
    float *target = allocate(T * N, sizeof *target), *output = allocate(T * N, sizeof *output);
    float *smoothed = allocate(T * K, sizeof *smoothed), *end = target;
    for (int i = 0; i < n_linears; end += (size_t)T * w[i++].N) linear(&w[i], x, T, end);

    float best_t = max_magnitude(max, K);
    double least = INFINITY;
    for (float t = best_t; t > 0.1f; t *= 0.8f) {
        smoothing_scales(max, K, t, s);
        divide(x, s, T, K, smoothed);
        for (size_t k = 0; k < K; k++) importance[k] = mean_square[k] / (s[k] * s[k]);
        end = output;
        for (int i = 0; i < n_linears; end += (size_t)T * w[i++].N) {
            Linear candidate = quantize_smoothed(&w[i], s, importance, group_size);
            linear(&candidate, smoothed, T, end);
            linear_free(&candidate);
        }
        double distance = squared_distance(output, target, T * N);
        if (distance < least) least = distance, best_t = t;
    }
    smoothing_scales(max, K, best_t, s);
    free(mean_square);
    free(importance);
    free(target);
    free(output);
    free(smoothed);
    return best_t;
}

/* Which of a layer's linears read each SmoothedInput. */
static const struct { int first, count; } smoothed[] = {{0, 3}, {4, 2}, {6, 1}};

/* The output that the published search compares; from s->xb, or s->gate for down. */
static const float *block_output(const Config *c, const Layer *layer, State *s, SmoothedInput which,
                                 int T) {
    switch (which) {
    case SMOOTH_QKV:
        attention_block(c, layer, s, 0, T, 0);
        return s->att;
    case SMOOTH_GATE_UP:
        ffn_block(c, layer, s, T);
        return s->gate;
    default:
        linear(&layer->down, s->gate, T, s->x);
        return s->x;
    }
}

float search_smoothing_published(const Config *c, const Layer *layer, State *state,
                                 SmoothedInput which, const float *x, int windows, int length,
                                 const float *max, int group_size, float *s) {
    const int outputs[] = {layer->o.K, layer->down.K, c->dim};
    const int first = smoothed[which].first, count = smoothed[which].count;
    const Linear *w = &layer->linears[first];
    int K = w->K;
    size_t n_in = (size_t)length * K, n_out = (size_t)length * outputs[which];
    float *in = which == SMOOTH_DOWN ? state->gate : state->xb;
    float *target = allocate(windows * n_out, sizeof *target);
    for (int i = 0; i < windows; i++) {
        memcpy(in, x + i * n_in, n_in * sizeof *x);
        memcpy(target + i * n_out, block_output(c, layer, state, which, length),
               n_out * sizeof *target);
    }
    float highest = max_magnitude(max, K), lowest = 0.1f, best_t = highest;
    int steps = fminf(fmaxf(100, highest / 0.5f), 4096); // one absurd activation is not worth days
    double least = INFINITY;
    for (int i = 0; i < steps; i++) {
        float t = highest - (highest - lowest) * i / (steps - 1);
        Layer candidate = *layer;
        smoothing_scales(max, K, t, s);
        for (int j = 0; j < count; j++)
            candidate.linears[first + j] = quantize_smoothed(w + j, s, NULL, group_size);
        double distance = 0;
        for (int j = 0; j < windows; j++) {
            divide(x + j * n_in, s, length, K, in);
            distance += squared_distance(block_output(c, &candidate, state, which, length),
                                         target + j * n_out, n_out);
        }
        for (int j = 0; j < count; j++) linear_free(&candidate.linears[first + j]);
        if (distance < least) least = distance, best_t = t;
    }
    smoothing_scales(max, K, best_t, s);
    free(target);
    return best_t;
}

static void show(const Quantizer *q, int l, int linear) {
    if (q->method.progress) q->method.progress(l, linear, q->n_layers);
}

/* The float model's inputs of qkv, gate+up and down in the first windows. */
static void record_inputs(const Quantizer *q, int l, const Layer *layer, int windows,
                          float *inputs[3]) {
    const Config *c = &q->config;
    State *s = q->s_float;
    size_t dim = c->dim, hidden = c->hidden_dim, T = q->length;
    for (size_t w = 0; w < (size_t)windows; w++) {
        show(q, l, 0);
        memcpy(s->x, window(q, q->x_float, w), T * dim * sizeof(float));
        rmsnorm(s->x, layer->attention_norm, T, dim, c->norm_eps, s->xb);
        memcpy(inputs[SMOOTH_QKV] + w * T * dim, s->xb, T * dim * sizeof(float));
        attention_block(c, layer, s, 0, T, 0);
        add_linear(&layer->o, s->att, T, s->xb, s->x);
        rmsnorm(s->x, layer->ffn_norm, T, dim, c->norm_eps, s->xb);
        memcpy(inputs[SMOOTH_GATE_UP] + w * T * dim, s->xb, T * dim * sizeof(float));
        ffn_block(c, layer, s, T);
        memcpy(inputs[SMOOTH_DOWN] + w * T * hidden, s->gate, T * hidden * sizeof(float));
    }
}

/* Finds the thresholds and folds their scales into the layer. The search leaves out the first token
 * of each window: attention sinks there, on massive activations in channels that no other token
 * drives (arXiv 2402.17762), and s would serve that one token at the cost of all weights. */
static void smooth(const Quantizer *q, int l, Layer *layer, Smoothing found[3]) {
    int windows = q->n < SEARCH_WINDOWS ? q->n : SEARCH_WINDOWS, total = windows * q->length;
    bool published = q->method.smooth == 2;
    float *inputs[3], *scales[3];
    for (int i = 0; i < 3; i++)
        inputs[i] = allocate((size_t)total * layer->linears[smoothed[i].first].K, sizeof(float));
    record_inputs(q, l, layer, windows, inputs);
    for (int i = 0; i < 3; i++) {
        int first = smoothed[i].first, group_size = q->method.group_size;
        show(q, l, 0);
        const Linear *w = &layer->linears[first];
        size_t K = w->K;
        float *max = allocate(K, sizeof *max);
        scales[i] = allocate(K, sizeof(float));
        for (size_t j = 0; j < total * K; j++) {
            float magnitude = fabsf(inputs[i][j]);
            if (!(magnitude < INFINITY))
                die("layer %d: the input of %s holds NaN or infinity", l, linear_names[first]);
            bool is_sink = j / K % q->length == 0 && !published;
            max[j % K] = magnitude > max[j % K] && !is_sink ? magnitude : max[j % K];
        }
        if (published) {
            found[i].t = search_smoothing_published(&q->config, layer, q->s_float, i, inputs[i],
                                                    windows, q->length, max, group_size, scales[i]);
        } else { // a sample spread evenly over the windows
            int rest = q->length - 1, T = windows * rest, stride = (T - 1) / SEARCH_TOKENS + 1;
            T /= stride;
            for (size_t t = 0; t < (size_t)T; t++) {
                size_t token = t * stride + t * stride / rest + 1;
                memmove(inputs[i] + t * K, inputs[i] + token * K, K * sizeof(float));
            }
            found[i].t =
                search_smoothing(w, smoothed[i].count, inputs[i], T, max, group_size, scales[i]);
        }
        found[i].n = 0;
        for (size_t k = 0; k < K; k++) found[i].n += max[k] > found[i].t;
        free(max);
    }
    smooth_layer(layer, scales[0], scales[1], scales[2]);
    for (int i = 0; i < 3; i++) free(inputs[i]), free(scales[i]);
}

/* ---- steps 3 to 5: half a layer at a time, attention (q, k, v inside, o outside) or FFN (gate and
 * up, down). Each linear is calibrated on the int8 inputs X that reach it through the linears
 * quantized before it, and aims back towards the float model. An extension: the published code
 * takes all Hessians from one pass over the float layer. ---- */

/* What GPTQ needs to know of the inputs of one linear, or of several that share them: sums over the
 * calibration tokens; D is the quantized model's residual's distance to the float model's. */
typedef struct {
    double *H; // [K][K] X^T X
    double *C; // [K][K] (F - X)^T X
    double *R; // [dim][K] D^T X, NULL if the linear does not write to the residual stream
    int K;
} Moments;

static Moments moments_new(int K, int dim) {
    size_t k = K;
    return (Moments){allocate(k * k, sizeof(double)), allocate(k * k, sizeof(double)),
                     dim ? allocate(k * dim, sizeof(double)) : NULL, K};
}

static void moments_free(Moments *m) {
    free(m->H);
    free(m->C);
    free(m->R);
}

/* Adds one window: f, x [T][K]; with R also the residual streams [T][dim]. x is replaced by its
 * int8 values and f by the difference to them. */
static void moments_add(Moments *m, float *f, float *x, const float *residual_f,
                        const float *residual_x, int T, int dim) {
    size_t K = m->K;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)T; t++) {
        int8_t a[K];
        float s_a = quantize_row(x + t * K, K, a);
        for (size_t k = 0; k < K; k++) {
            x[t * K + k] = a[k] * s_a;
            f[t * K + k] -= x[t * K + k];
        }
    }
    add_moments(m->H, x, K, x, K, T);
    add_moments(m->C, f, K, x, K, T);
    if (!m->R) return;
    float *distance = allocate((size_t)T * dim, sizeof *distance);
    for (size_t i = 0; i < (size_t)T * dim; i++) distance[i] = residual_f[i] - residual_x[i];
    add_moments(m->R, distance, dim, x, K, T);
    free(distance);
}

/* The diagonal of H, which weighs the columns in the search of ranges; dead columns get the mean.
 */
static float *column_importance(const Moments *m, int l, const char *name) {
    size_t K = m->K;
    float *importance = allocate(K, sizeof *importance);
    double mean = 0;
    for (size_t k = 0; k < K; k++) mean += m->H[k * (K + 1)] / K;
    if (!(mean < INFINITY)) die("layer %d: the input of %s holds NaN or infinity", l, name);
    for (size_t k = 0; k < K; k++) {
        double h = m->H[k * (K + 1)];
        importance[k] = h > 0 ? h : mean > 0 ? mean : 1;
    }
    return importance;
}

/* Quantizes the linears first .. first + count - 1 of layer l, which share their input, from the
 * float layer f to W4A8 in out. */
static void quantize_linears(const Quantizer *q, const Moments *m, int l, int first, int count,
                             const Layer *f, Layer *out, Errors *errors) {
    const Method *method = &q->method;
    float *importance = m->H ? column_importance(m, l, linear_names[first]) : NULL;
    const float *weighting = method->mse ? importance : NULL;
    Inverse inverse;
    bool compensate = method->gptq && m->H;
    if (compensate) {
        inverse = hessian_inverse(m->H, m->K, method->act_order);
        compensated_importance(&inverse, importance);
    }
    for (int i = first; i < first + count; i++) {
        const float *w = f->linears[i].w;
        int N = f->linears[i].N, K = f->linears[i].K;
        show(q, l, i);
        Linear nearest = round_to_nearest(w, weighting, N, K, method->group_size); // step 3
        errors[i].before = errors[i].after = m->H ? relative_error(w, &nearest, m->H) : NAN;
        out->linears[i] = nearest;
        if (!compensate) continue;
        float *target = allocate((size_t)N * K, sizeof *target);
        corrected_target(w, N, &inverse, m->C, m->R, target);                       // step 5
        out->linears[i] = gptq(target, N, &inverse, weighting, method->group_size); // step 4
        errors[i].after = relative_error(w, &out->linears[i], m->H);
        linear_free(&nearest);
        free(target);
    }
    if (compensate) inverse_free(&inverse);
    free(importance);
}

/* Half a layer with its linears as they are so far, float or quantized. */
typedef struct {
    bool ffn;
    const Layer *layer;
    const float *norm;     // [dim]
    const Linear *outside; // the linear that writes to the residual stream
} Half;

static Half half_of(const Layer *layer, bool ffn) {
    return ffn ? (Half){true, layer, layer->ffn_norm, &layer->down}
               : (Half){false, layer, layer->attention_norm, &layer->o};
}

/* Runs half a layer on x [T][dim] up to the input of the outside linear, which is returned. */
static float *run_inside(const Quantizer *q, const Half *h, const float *x, State *s) {
    rmsnorm(x, h->norm, q->length, q->config.dim, q->config.norm_eps, s->xb);
    if (h->ffn) ffn_block(&q->config, h->layer, s, q->length);
    else attention_block(&q->config, h->layer, s, 0, q->length, 0);
    return h->ffn ? s->gate : s->att;
}

/* Quantizes half of layer l: out's linears, float at first, become W4A8; f stays float. */
static void quantize_half(const Quantizer *q, int l, const Layer *f, Layer *out, bool ffn,
                          Errors *errors) {
    int dim = q->config.dim, T = q->length, first = ffn ? 4 : 0, n_inside = ffn ? 2 : 3;
    Half half_f = half_of(f, ffn), half_q = half_of(out, ffn);
    State *s_f = q->s_float, *s_q = q->s_quant;
    bool calibrate = q->method.gptq || q->method.mse;

    // q, k, v or gate, up: their inputs are the normed residual streams.
    Moments m = calibrate ? moments_new(dim, 0) : (Moments){0};
    for (int w = 0; calibrate && w < q->n; w++) {
        show(q, l, first);
        rmsnorm(window(q, q->x_float, w), half_f.norm, T, dim, q->config.norm_eps, s_f->xb);
        rmsnorm(window(q, q->x_quant, w), half_q.norm, T, dim, q->config.norm_eps, s_q->xb);
        moments_add(&m, s_f->xb, s_q->xb, NULL, NULL, T, 0);
    }
    quantize_linears(q, &m, l, first, n_inside, f, out, errors);
    moments_free(&m);

    // o or down: its input has passed the linears just quantized.
    m = calibrate ? moments_new(half_f.outside->K, dim) : (Moments){0};
    for (int w = 0; w < q->n; w++) {
        show(q, l, first + n_inside);
        float *x_f = window(q, q->x_float, w), *x_q = window(q, q->x_quant, w);
        float *in_f = run_inside(q, &half_f, x_f, s_f);
        memcpy(s_f->x, x_f, (size_t)T * dim * sizeof *x_f);
        add_linear(half_f.outside, in_f, T, s_f->xb, x_f); // the float model is done with this half
        if (!calibrate) continue;
        float *in_q = run_inside(q, &half_q, x_q, s_q);
        moments_add(&m, in_f, in_q, s_f->x, x_q, T, dim);
    }
    quantize_linears(q, &m, l, first + n_inside, 1, f, out, errors);
    moments_free(&m);

    // The quantized model's residual stream.
    for (int w = 0; w < q->n; w++) {
        show(q, l, first + n_inside);
        float *x_q = window(q, q->x_quant, w);
        float *in_q = run_inside(q, &half_q, x_q, s_q);
        add_linear(half_q.outside, in_q, T, s_q->xb, x_q);
    }
}

/* ---- step 3: the scales of a weight row
 *
 *   range = max|w|,  or the range p max|w| that minimizes  sum_k h_k (w_k - q_k scale)^2,
 *
 * h_k = H_kk, the mean square of input channel k on the calibration tokens: the error that the
 * rounding of w_k alone adds to the output; with GPTQ see compensated_importance(). ---- */

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

/* s_channel of a row without groups: range / 7, range = p max|w|, p = 1, .99 .. .21. */
static float search_channel_scale(const float *w, const float *importance, int K) {
    float max = max_magnitude(w, K), unit = unit_of(max), best_scale = max / 7;
    float least = INFINITY;
    for (int i = 0; i < 80; i++) {
        float scale = (1.0f - i / 100.0f) * max / 7, error = 0.0f;
        for (int k = 0; k < K; k += GROUP)
            error += rounding_error(w + k, importance + k, K - k < GROUP ? K - k : GROUP, scale, -7,
                                    unit);
        if (error < least) least = error, best_scale = scale;
    }
    return best_scale;
}

/* The plain choice with groups: s_channel = max|w| 2/225, s_group = rint(max|w_g| 2/15 /
 * s_channel).
 */
static float plain_group_scales(const float *w, int K, uint8_t *s_group) {
    float scale = max_magnitude(w, K) / 225 * 2; // in this order nothing overflows
    for (int g = 0; g < K / GROUP; g++)
        s_group[g] = clamp(rintf(max_magnitude(w + g * GROUP, GROUP) / 15 * 2 / scale), 1, 15);
    return scale;
}

/* s_channel of a row with groups: p max|w| 2/225, p = 1, 39/40 .. 17/40, each with the best s_group
 * [K/128]; of equals the larger p and the smaller s_group. */
static float search_group_scales(const float *w, const float *importance, int K, uint8_t *s_group) {
    float max = max_magnitude(w, K), best_scale = plain_group_scales(w, K, s_group);
    float least = INFINITY, unit = unit_of(max);
    uint8_t candidate[K / GROUP];
    for (int i = 0; i < 24; i++) {
        float scale = (1.0f - i / 40.0f) * max / 225 * 2, total = 0.0f;
        for (int g = 0; g < K / GROUP; g++) {
            float group_least = INFINITY;
            for (int s = 1; s <= 15; s++) {
                float error = rounding_error(w + g * GROUP, importance + g * GROUP, GROUP,
                                             s * scale, -8, unit);
                if (error < group_least) group_least = error, candidate[g] = s;
            }
            total += group_least;
        }
        if (total < least) {
            least = total;
            best_scale = scale;
            memcpy(s_group, candidate, sizeof candidate);
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
    if (importance && s_group) return search_group_scales(w, importance, K, s_group);
    if (importance) return search_channel_scale(w, importance, K);
    return s_group ? plain_group_scales(w, K, s_group) : max / 7;
}

Linear round_to_nearest(const float *w, const float *importance, int N, int K, int group_size) {
    Linear l = quantized_new(N, K, group_size);
#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < (size_t)N; n++) {
        int8_t q[K];
        uint8_t *s_group = groups_of(&l, n);
        float s_channel = choose_scales(w + n * K, importance, K, s_group);
        for (int k = 0; k < K; k++)
            q[k] = nearest_code(w[n * K + k], s_channel * (s_group ? s_group[k / GROUP] : 1),
                                lowest_code(&l));
        pack_row(q, K, codes_of(&l, n));
        l.s_channel[n] = s_channel;
    }
    return l;
}

/* ---- step 4: GPTQ
 *
 *   H = X^T X over the calibration tokens, H <- H + 0.01 mean(diag H) I,
 *   H^-1 = U^T U, U upper triangular;   for column i:  e = (w_i - q_i) / U_ii,
 *   w_j <- w_j - e U_ij for j > i
 *
 * After each rounding the columns that are still free move to make up for its effect on the
 * output. GPTQ, arXiv 2210.17323, where H is 2 X X^T; no factor changes the result. ---- */

int *column_order(const double *diagonal, int n, bool act_order) {
    size_t K = n;
    int *order = allocate(K, sizeof *order);
    for (size_t i = 0; i < K; i++) { // insertion from the right place, found by bisection
        size_t low = 0, high = act_order ? i : 0;
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (diagonal[order[middle]] >= diagonal[i]) low = middle + 1;
            else high = middle;
        }
        if (!act_order) low = i;
        memmove(order + low + 1, order + low, (i - low) * sizeof *order);
        order[low] = i;
    }
    return order;
}

enum { SIDE = 16 }; // rows that go through GPTQ side by side, each in a lane of its own

/* The column loop. w [K][SIDE], columns in the order of U, is used up; scale [groups][SIDE], group
 * [K] the group of each column; q [K][SIDE]. */
static void gptq_columns(double *w, const double *U, size_t K, const float *scale, const int *group,
                         float low, int8_t *q) {
    for (size_t i = 0; i < K; i++) {
        double e[SIDE];
        for (int r = 0; r < SIDE; r++) {
            float s = scale[group[i] * SIDE + r];
            float code = nearest_code(w[i * SIDE + r], s, low);
            q[i * SIDE + r] = code;
            e[r] = (w[i * SIDE + r] - (double)code * s) / U[i * K + i];
        }
        for (size_t j = i + 1; j < K; j++)
            for (int r = 0; r < SIDE; r++) w[j * SIDE + r] -= e[r] * U[i * K + j];
    }
}

Inverse hessian_inverse(const double *H, int K, bool act_order) {
    size_t n = K;
    double mean = 0, *V = allocate(n * n, sizeof *V), *diagonal = allocate(n, sizeof *diagonal);
    for (size_t i = 0; i < n; i++) {
        diagonal[i] = H[i * (n + 1)];
        mean += diagonal[i] / n;
    }
    Inverse inverse = {K, column_order(diagonal, n, act_order), allocate(n * n, sizeof *V)};
    free(diagonal);
    for (size_t i = 0; i < n; i++) {
        const double *row = H + inverse.order[i] * n;
        for (size_t j = i; j < n; j++) V[i * n + j] = row[inverse.order[j]];
        if (V[i * (n + 1)] == 0) V[i * (n + 1)] = mean > 0 ? mean : 1; // a dead column
        V[i * (n + 1)] += DAMPING * mean;
    }
    if (!factor(V, n)) die("a Hessian is not positive definite: are the activations finite?");
    invert(V, n, inverse.U);
    free(V);
    return inverse;
}

void inverse_free(Inverse *inverse) {
    free(inverse->order);
    free(inverse->U);
}

void compensated_importance(const Inverse *inverse, float *importance) {
    for (size_t i = 0, K = inverse->K; i < K; i++) {
        float *h = &importance[inverse->order[i]];
        *h = sqrt(*h) / inverse->U[i * (K + 1)];
    }
}

Linear gptq(const float *w, int n_rows, const Inverse *inverse, const float *importance,
            int group_size) {
    size_t N = n_rows, K = inverse->K;
    const int *order = inverse->order;
    Linear l = quantized_new(N, K, group_size);
    int groups = l.s_group ? K / GROUP : 1, *group = allocate(K, sizeof *group);
    for (size_t i = 0; i < K; i++) group[i] = l.s_group ? order[i] / GROUP : 0;
#pragma omp parallel for schedule(dynamic)
    for (size_t n0 = 0; n0 < N; n0 += SIDE) {
        size_t rows = N - n0 < SIDE ? N - n0 : SIDE;
        double *lanes = allocate(K * SIDE, sizeof *lanes);
        int8_t *q = allocate(K * SIDE, sizeof *q), *row = allocate(K, sizeof *row);
        float *scale = allocate((size_t)groups * SIDE, sizeof *scale);
        for (size_t i = 0; i < (size_t)groups * SIDE; i++) scale[i] = 1.0f; // of unused lanes
        for (size_t r = 0; r < rows; r++) {
            const float *w_row = w + (n0 + r) * K;
            uint8_t *s_group = groups_of(&l, n0 + r);
            float s_channel = choose_scales(w_row, importance, K, s_group);
            l.s_channel[n0 + r] = s_channel;
            for (int g = 0; g < groups; g++)
                scale[g * SIDE + r] = s_channel * (s_group ? s_group[g] : 1);
            for (size_t i = 0; i < K; i++) lanes[i * SIDE + r] = w_row[order[i]];
        }
        gptq_columns(lanes, inverse->U, K, scale, group, lowest_code(&l), q);
        for (size_t r = 0; r < rows; r++) {
            for (size_t i = 0; i < K; i++) row[order[i]] = q[i * SIDE + r];
            pack_row(row, K, codes_of(&l, n0 + r));
        }
        free(lanes);
        free(q);
        free(row);
        free(scale);
    }
    free(group);
    return l;
}

/* ---- step 5: what GPTQ aims at,   W + 1/2 (W C + R) (H + damping)^-1 ---- */

void corrected_target(const float *w, int n_rows, const Inverse *inverse, const double *C,
                      const double *R, float *target) {
    size_t N = n_rows, K = inverse->K;
    const int *order = inverse->order;
#pragma omp parallel
    {
        double *m = allocate(K, sizeof *m), *p = allocate(K, sizeof *p);
#pragma omp for
        for (size_t n = 0; n < N; n++) {
            for (size_t j = 0; j < K; j++) m[j] = R ? R[n * K + j] : 0;
            for (size_t k = 0; k < K; k++)
                for (size_t j = 0; j < K; j++) m[j] += w[n * K + k] * C[k * K + j];
            // m (H + damping)^-1 = (m U^T) U, in the order of U
            for (size_t j = 0; j < K; j++) p[j] = m[order[j]];
            for (size_t i = 0; i < K; i++) m[i] = dot_double(inverse->U + i * K + i, p + i, K - i);
            memset(p, 0, K * sizeof *p);
            for (size_t i = 0; i < K; i++)
                for (size_t j = i; j < K; j++) p[j] += m[i] * inverse->U[i * K + j];
            for (size_t j = 0; j < K; j++)
                target[n * K + order[j]] = w[n * K + order[j]] + CORRECTION * p[j];
        }
        free(m);
        free(p);
    }
}

double relative_error(const float *w, const Linear *quantized, const double *H) {
    enum { ROWS_AT_ONCE = 64 }; // of weights, and of errors
    size_t N = quantized->N, K = quantized->K;
    float *rows = allocate(2 * ROWS_AT_ONCE * K, sizeof *rows);
    float *products = allocate(2 * ROWS_AT_ONCE * K, sizeof *products);
    float *h = allocate(K * K, sizeof *h); // symmetric: H^T = H
    for (size_t i = 0; i < K * K; i++) h[i] = H[i];
    const Linear times_h = {.N = K, .K = K, .dtype = F32, .w = h};
    double error = 0, total = 0;
    for (size_t first = 0; first < N; first += ROWS_AT_ONCE) {
        size_t n_rows = N - first < ROWS_AT_ONCE ? N - first : ROWS_AT_ONCE;
        float *errors = rows + n_rows * K;
        memcpy(rows, w + first * K, n_rows * K * sizeof *rows);
        for (size_t n = 0; n < n_rows; n++) dequantize_row(quantized, first + n, errors + n * K);
        for (size_t i = 0; i < n_rows * K; i++) errors[i] -= rows[i];
        linear(&times_h, rows, 2 * n_rows, products);
        for (size_t i = 0; i < n_rows * K; i++) {
            total += (double)rows[i] * products[i];
            error += (double)errors[i] * products[n_rows * K + i];
        }
    }
    free(rows);
    free(products);
    free(h);
    return total > 0 && error > 0 ? sqrt(error / total) : 0; // rounding may leave less than 0
}

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
        int16_t u[GROUP]; // even columns, odd columns
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
        for (int g = 0; g < x->groups; g++) {
            int s = s_group ? s_group[g] : 1;
            for (int i = 0; i < TILE_T; i++) sums[n][i] -= 8 * s * group_sums[g * TILE_T + i];
        }
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
        for (size_t k = 0; k < K; k++) a[t * K + k] = row[k];
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
