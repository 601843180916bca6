/* QQQ in plain C, no CUDA. From top to bottom:
 *
 *   1  the model: the forward pass, float and W4A8
 *   2  the W4A8 numbers and the integer dot product
 *   3  the method: what quantizes a layer, step by step
 *   4  arithmetic beneath: products in tiles and in vectors, Cholesky, 16-bit floats
 *   5  the engine: the model at work on the CPU
 *
 * The contracts of the public functions stand in qqq.h. A first reader may stop after section 3. */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "files.h"

/* ---- what stands further down ---- */

/* A float matrix seen as W [n][k]: element (n, k) is w[n * row + k * column]. */
typedef struct {
    const void *w;
    DType dtype;
    size_t row, column;
} View;

static float f16_to_float(uint16_t h);
static float max_magnitude(const float *x, size_t n);
static float clamp(float x, float low, float high);
static void round_to_nearest(Machine *m, const float *w, const float *importance, Linear *l);
static Sampling sample_of(int n_windows, int length);
static inline float exponential(float x);
static float dot(const float *x, const float *y, int n);
static double dot_double(const double *x, const double *y, int n);
static void weighted_sum(const float *p, const float *v, int n, int d, float *o);
static void matmul(int M, int N, int K, const float *x, size_t ldx, View w, float *y, size_t ldy);
static void float_linears(const Linear *w, int n, const float *x, int T, float *const *y);
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
 * Each output number is computed by one thread in one order, so results do not depend on the
 * number of threads.
 * ============================================================================================ */

void forward(const Model *m, State *s, const int *tokens, int T, int pos) {
    const Config *c = &m->config;
    if (T < 1 || T > s->max_T || pos < 0 || pos > s->context - T)
        die("%d tokens at position %d do not fit a context of %d", T, pos, s->context);
    for (int t = 0; t < T; t++) {
        if (tokens[t] < 0 || tokens[t] >= c->vocab_size)
            die("token %d is outside the vocabulary of %d", tokens[t], c->vocab_size);
        floats(m->embedding.w, m->embedding.dtype, (size_t)tokens[t] * c->dim, c->dim,
               s->x + (size_t)t * c->dim);
    }
    for (int l = 0; l < c->n_layers; l++) layer_forward(c, &m->layers[l], s, l, T, pos);
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

/* Turns x [T][n_heads][head_dim] of tokens at pos .. pos + T - 1 of the cache. */
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

/* p [n] <- softmax(p) */
static void softmax(float *p, int n) {
    float max = p[0];
    double sum = 0; // in float, 8000 terms of one size would lose four digits
    for (int i = 1; i < n; i++) max = p[i] > max ? p[i] : max;
    for (int i = 0; i < n; i++) p[i] = exponential(p[i] - max);
    for (int i = 0; i < n; i++) sum += p[i];
    for (int i = 0; i < n; i++) p[i] /= (float)sum;
}

/* ---- the KV cache
 *
 * A row is the key (after RoPE) or the value of one KV head at one position: head_dim floats, or
 * with -k 8 the scale s and head_dim int8 codes q of quantize_row(), x = q s. ---- */

size_t kv_row_bytes(const Config *c, int kv_bits) {
    size_t d = c->head_dim;
    return kv_bits == 16 ? d * sizeof(float) : sizeof(float) + d;
}

/* The row of position p; layer l has n_kv_heads heads of keys, then as many of values. */
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

/* att = softmax(q k^T / sqrt(head_dim)) v, causal. Query head h reads KV head h / group. A prompt
 * is bound by arithmetic. A task is one KV head and a block of queries: their query heads are the
 * rows of two matrix products. */
static void attend_prompt(const Config *c, State *s, int l, int T, int pos) {
    enum { BLOCK = 32 };
    int d = c->head_dim, group = c->n_heads / c->n_kv_heads;
    size_t q_dim = (size_t)c->n_heads * d, width = (size_t)group * d;
    int n_blocks = (T + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        size_t most_rows = (size_t)(T < BLOCK ? T : BLOCK) * group;
        float *scores = allocate(most_rows * (pos + T), sizeof *scores);
        float *in = allocate(most_rows * d, sizeof *in); // queries, later the output
        float *read = s->kv_bits == 16 ? NULL : allocate(2 * (size_t)(pos + T) * d, sizeof *read);
#pragma omp for schedule(dynamic)
        for (int task = c->n_kv_heads * n_blocks - 1; task >= 0; task--) { // the long ones first
            int h = task % c->n_kv_heads, t0 = task / c->n_kv_heads * BLOCK;
            int n = T - t0 < BLOCK ? T - t0 : BLOCK, n_keys = pos + t0 + n, rows = n * group;
            size_t at = t0 * q_dim + h * width;
            for (int t = 0; t < n; t++)
                for (size_t i = 0; i < width; i++)
                    in[t * width + i] = s->q[at + t * q_dim + i] / sqrtf(d);
            const float *keys = cache_floats(c, s, l, h, 0, n_keys, read);
            const float *values = cache_floats(c, s, l, c->n_kv_heads + h, 0, n_keys,
                                               read ? read + (size_t)n_keys * d : NULL);
            matmul(rows, n_keys, d, in, d, (View){keys, F32, d, 1}, scores, n_keys);
            for (int r = 0; r < rows; r++) {
                int seen = pos + t0 + r / group + 1;
                softmax(scores + (size_t)r * n_keys, seen);
                memset(scores + (size_t)r * n_keys + seen, 0, (n_keys - seen) * sizeof *scores);
            }
            matmul(rows, d, n_keys, scores, n_keys, (View){values, F32, 1, d}, in, d);
            for (int t = 0; t < n; t++)
                memcpy(s->att + at + t * q_dim, in + t * width, width * sizeof *in);
        }
        free(scores);
        free(in);
        free(read);
    }
}

/* What a query head makes of some positions: m = max s, l = sum e^(s - m), o = sum e^(s - m) v. */
typedef struct {
    float m, l;
    float *o; // [head_dim]
} Part;

enum { PART = 64 }; // positions

/* Parts [group] of keys and values [n][d] of n <= PART positions. */
static void attend_part(const float *q, int group, int d, const float *keys, const float *values,
                        int n, Part *parts) {
    float s[group][PART];
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

/* One token is bound by reading the cache, which is streamed once. A task is one KV head and PART
 * positions; what its query heads make of them is joined in the order of the positions, with
 * m = max m_i:   att = sum e^(m_i - m) o_i / sum e^(m_i - m) l_i.   arXiv 2311.01282 */
static void attend_token(const Config *c, State *s, int l, int pos) {
    int d = c->head_dim, group = c->n_heads / c->n_kv_heads, n_parts = pos / PART + 1;
    Part *parts = allocate((size_t)c->n_heads * n_parts, sizeof *parts); // [n_parts][n_heads]
    float *o = allocate((size_t)c->n_heads * n_parts * d, sizeof *o);
    for (int i = 0; i < c->n_heads * n_parts; i++) parts[i].o = o + (size_t)i * d;
#pragma omp parallel
    {
        float *read = allocate(2 * PART, d * sizeof *read); // keys, values
#pragma omp for schedule(dynamic)
        for (int task = 0; task < n_parts * c->n_kv_heads; task++) {
            int first = task / c->n_kv_heads * PART, h = task % c->n_kv_heads;
            int n = pos + 1 - first < PART ? pos + 1 - first : PART;
            const float *keys = cache_floats(c, s, l, h, first, n, read);
            const float *values =
                cache_floats(c, s, l, c->n_kv_heads + h, first, n, read + PART * d);
            attend_part(s->q + (size_t)h * group * d, group, d, keys, values, n,
                        parts + (size_t)task * group);
        }
        free(read);
#pragma omp for
        for (int h = 0; h < c->n_heads; h++) {
            float m = -INFINITY, sum = 0.0f, *att = s->att + (size_t)h * d;
            for (int i = 0; i < n_parts; i++) m = fmaxf(m, parts[i * c->n_heads + h].m);
            memset(att, 0, d * sizeof *att);
            for (int i = 0; i < n_parts; i++) {
                const Part *part = &parts[i * c->n_heads + h];
                float factor = expf(part->m - m);
                sum += factor * part->l;
                for (int k = 0; k < d; k++) att[k] += factor * part->o[k];
            }
            for (int k = 0; k < d; k++) att[k] /= sum;
        }
    }
    free(parts);
    free(o);
}

void attention_block(const Config *c, const Layer *layer, State *s, int l, int T, int pos) {
    linears(&layer->q, 3, s->xb, T, (float *[]){s->q, s->keys, s->values});
    rope(s, s->q, T, c->n_heads, c->head_dim, pos);
    rope(s, s->keys, T, c->n_kv_heads, c->head_dim, pos);
    write_cache(c, s, l, T, pos);
    if (T == 1) attend_token(c, s, l, pos);
    else attend_prompt(c, s, l, T, pos);
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

/* RoPE turns the pair (x_i, x_(i + d/2)) of each head by pos * f_i, f_i = theta^(-2i/d)
 * (arXiv 2104.09864, in Hugging Face's order). LLaMA 3.1 stretches slow turns, those with a
 * wavelength 2 pi / f above original_context / low_freq_factor, by `factor`, leaves those below
 * original_context / high_freq_factor alone, and mixes in between. */
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

const float *logits(const Model *m, State *s, int first, int n) {
    linear(&m->lm_head, s->x + (size_t)first * m->config.dim, n, s->logits);
    return s->logits;
}

/* ---- shapes and sizes ---- */

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

/* ---- buffers ---- */

State *state_new(const Config *c, int context, int max_T, int kv_bits) {
    State *s = allocate(1, sizeof *s);
    size_t T = max_T, q_dim = (size_t)c->n_heads * c->head_dim;
    size_t kv_dim = (size_t)c->n_kv_heads * c->head_dim;
    s->context = context;
    s->max_T = max_T;
    s->kv_bits = kv_bits;
    s->x = allocate(T * c->dim, sizeof(float));
    s->xb = allocate(T * c->dim, sizeof(float));
    s->q = allocate(T * q_dim, sizeof(float));
    s->keys = allocate(T * kv_dim, sizeof(float));
    s->values = allocate(T * kv_dim, sizeof(float));
    s->att = allocate(T * q_dim, sizeof(float));
    s->gate = allocate(T * c->hidden_dim, sizeof(float));
    s->up = allocate(T * c->hidden_dim, sizeof(float));
    s->cache =
        allocate((size_t)c->n_layers * 2 * c->n_kv_heads * context, kv_row_bytes(c, kv_bits));
    s->rope = allocate((size_t)context * c->head_dim, sizeof(float));
    s->logits = allocate((size_t)LOGIT_ROWS * c->vocab_size, sizeof(float));
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
    double mean = sum / total, variance = (squares / total - mean * mean) * total / (total - 1);
    return (Perplexity){exp(mean), exp(mean) * sqrt(variance / total), total};
}

/* ============================================================================================
 * 2  The W4A8 numbers
 *
 *   activations, per token:   s_a = max|x| / 127,   a = clamp(rint(x / s_a), -128, 127)
 *   weights, per channel:     w = q s_channel,                q in -7..7
 *   weights, per group:       w = (q s_group) s_channel,      q in -8..7, s_group in 1..15
 *   lm_head, in 8 bits:       w = q s_channel,                q in -127..127, as activations
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

void dequantize_row(const Linear *l, int n, float *w) {
    size_t K = l->K;
    for (size_t k = 0; k < K; k++) {
        int u = l->qweight[n * (K / 2) + k / 2] >> (k % 2 * 4) & 0x0f;
        int s_group = l->s_group ? l->s_group[n * (K / GROUP) + k / GROUP] : 1;
        w[k] = (float)((u - 8) * s_group) * l->s_channel[n];
    }
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

/* Where row n of the codes and group scales stands. */
static uint8_t *codes_of(const Linear *l, size_t n) {
    return l->qweight + n * l->K / 2;
}

static uint8_t *groups_of(const Linear *l, size_t n) {
    return l->s_group ? l->s_group + n * (l->K / GROUP) : NULL;
}

static int smaller(int a, int b) {
    return a < b ? a : b;
}

static float lowest_code(const Linear *l) {
    return l->s_group ? -8.0f : -7.0f;
}

/* ---- y = x W^T in W4A8
 *
 *   acc[m][n] = sum_k a[m][k] w8[n][k],   w8 = q s_group = (u - 8) s_group
 *             = sum_g s_group[g] (sum_(k in g) a_k u_k  -  8 sum_(k in g) a_k)
 *   y[m][n] = (acc s_a[m]) s_channel[n]
 *
 * The codes u are unsigned and the activations signed: what vpdpbusd and vpmaddubsw multiply. The
 * low nibbles of a row of qweight are its even columns, the high ones its odd columns, so of each
 * group the activations are kept in that order too: 64 even ones, then 64 odd ones. ---- */

/* Plain C, the one to read. */
static void dot_u4_c(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
                     int32_t *acc) {
    for (int k = 0; k < K; k += GROUP) {
        int n = smaller(GROUP, K - k), s = s_group ? s_group[k / GROUP] : 1;
        for (int t = 0; t < T; t++) {
            const int8_t *even = a + (size_t)k * T + t * n, *odd = even + n / 2;
            for (int j = 0; j < n / 2; j++) {
                uint8_t codes = w[k / 2 + j];
                acc[t] += s * ((codes & 0x0f) * even[j] + (codes >> 4) * odd[j]);
            }
        }
    }
}

/* For lm_head in 8 bits. With a of 16 bits compilers find vpmaddwd: 4 times as fast as with 8. */
static int32_t dot_bytes(const int8_t *q, const int16_t *a, int K) {
    int32_t sum = 0;
    for (int k = 0; k < K; k++) sum += (int16_t)q[k] * a[k];
    return sum;
}

enum { TILE_T = 8 }; // tokens that share one unpacking of the weights
typedef int32_t Tile
    __attribute__((vector_size(TILE_T * sizeof(int32_t)), aligned(4), may_alias)); // one of each

/* Activations as the dot product wants them, in tiles of TILE_T tokens; the last is filled up with
 * zeros. One token is a tile of its own. */
typedef struct {
    int8_t *a;     // [tiles][K/128][tile][2][64] even columns, odd columns; or
    int16_t *wide; // [T][K] for weights in 8 bits
    int32_t *sums; // [tiles][groups][TILE_T] sums over each group; one group per channel
    int tile, groups;
} Activations;

static Activations split_activations(const Linear *w, int T) {
    int tiles = (T + TILE_T - 1) / TILE_T, groups = w->s_group ? w->K / GROUP : 1;
    Activations x = {.tile = T == 1 ? 1 : TILE_T, .groups = groups};
    if (w->qweight) {
        x.a = allocate((size_t)tiles * x.tile, w->K);
        x.sums = allocate((size_t)tiles * groups * TILE_T, sizeof(int32_t));
    } else x.wide = allocate(T, w->K * sizeof(int16_t));
    return x;
}

static void free_activations(Activations *x) {
    free(x->a);
    free(x->wide);
    free(x->sums);
}

static void split_row(const Linear *w, const int8_t *a, int t, Activations *to) {
    int K = w->K;
    for (int k = 0; !w->qweight && k < K; k++) to->wide[(size_t)t * K + k] = (int16_t)a[k];
    if (!w->qweight) return;
    int i = t % to->tile, first = t - i; // number i of the tile from token `first` on
    for (int k = 0; k < K; k += GROUP) {
        int n = smaller(GROUP, K - k);
        int8_t *even = to->a + (size_t)first * K + k * to->tile + i * n, *odd = even + n / 2;
        for (int j = 0; j < n / 2; j++) {
            even[j] = a[k + 2 * j];
            odd[j] = a[k + 2 * j + 1];
        }
    }
    int32_t *sums = to->sums + (size_t)first * to->groups + i;
    for (int g = 0, n = K / to->groups; g < to->groups; g++)
        for (int k = g * n; k < (g + 1) * n; k++) sums[g * TILE_T] += a[k];
}

/* acc [TILE_T] of output channel n for the tile from token t on, which has T of them. */
static void accumulate(const Linear *w, DotU4 *dot_u4, const Activations *x, int n, int t, int T,
                       int32_t *acc) {
    size_t K = w->K;
    if (!w->qweight) {
        for (int i = 0; i < T; i++)
            acc[i] = dot_bytes((const int8_t *)w->w + n * K, x->wide + (t + i) * K, K);
        return;
    }
    const uint8_t *s_group = groups_of(w, n);
    const Tile *sums = (const Tile *)(x->sums + (size_t)t * x->groups);
    Tile offset = {0};
    for (int g = 0; g < x->groups; g++) offset += (s_group ? s_group[g] : 1) * sums[g];
    *(Tile *)acc = -8 * offset;
    dot_u4(codes_of(w, n), s_group, x->a + t * K, K, x->tile, acc);
}

/* Of the linears w [n]: y[i] [T][N_i], or the sums themselves in acc [T][N] if y is NULL. */
static void integer_products(const Linear *w, int n_linears, DotU4 *dot_u4, const Activations *x,
                             const float *s_a, int T, float *const *y, int32_t *acc) {
    enum { N_BLOCK = 32 }; // rows that pass by a tile while it stays in the nearest cache
#pragma omp parallel
    for (int i = 0; i < n_linears; i++) {
        const Linear *l = &w[i];
// guided: first long stretches of rows, in which prefetch() runs ahead
#pragma omp for schedule(guided) nowait
        for (int n0 = 0; n0 < l->N; n0 += N_BLOCK)
            for (int t = 0; t < T; t += TILE_T) {
                int32_t sums[N_BLOCK][TILE_T];
                int N = smaller(N_BLOCK, l->N - n0), n_tokens = smaller(TILE_T, T - t);
                for (int n = 0; n < N; n++) accumulate(l, dot_u4, x, n0 + n, t, n_tokens, sums[n]);
                for (int k = 0; k < n_tokens; k++) {
                    size_t at = (size_t)(t + k) * l->N + n0;
                    for (int n = 0; n < N && y; n++)
                        y[i][at + n] = ((float)sums[n][k] * s_a[t + k]) * l->s_channel[n0 + n];
                    for (int n = 0; n < N && acc; n++) acc[at + n] = sums[n][k];
                }
            }
    }
}

static void integer_linears(const Linear *w, int n, const float *x, int T, float *const *y) {
    int K = w->K;
    const char *name;
    Activations split = split_activations(w, T);
    float *s_a = allocate(T, sizeof *s_a);
    int8_t *a = allocate(T, K);
#pragma omp parallel for if (T > 1)
    for (int t = 0; t < T; t++) {
        s_a[t] = quantize_row(x + (size_t)t * K, K, a + (size_t)t * K);
        split_row(w, a + (size_t)t * K, t, &split);
    }
    integer_products(w, n, dot_u4_best(&name), &split, s_a, T, y, NULL);
    free(a);
    free(s_a);
    free_activations(&split);
}

void accumulators(const Linear *w, const int8_t *a, int T, DotU4 *dot_u4, int32_t *acc) {
    Activations split = split_activations(w, T);
    for (int t = 0; t < T; t++) split_row(w, a + (size_t)t * w->K, t, &split);
    integer_products(w, 1, dot_u4, &split, NULL, T, NULL, acc);
    free_activations(&split);
}

void linears(const Linear *w, int n, const float *x, int T, float *const *y) {
    if (w->dtype == U8 || w->dtype == I8) integer_linears(w, n, x, T, y);
    else float_linears(w, n, x, T, y);
}

void linear(const Linear *w, const float *x, int T, float *y) {
    linears(w, 1, x, T, &y);
}

/* ============================================================================================
 * 3  The method
 *
 *   W   float weights of a linear [N][K], after steps 1 and 2
 *   F   the linear's inputs in the float model [T][K], T all calibration tokens
 *   X   the inputs that it will get, from the layers quantized so far, in int8 [T][K]
 *   D   what the residual stream lacks of the float model's [T][N]; only for o and down, else 0
 *
 *   steps 1 and 2    W and F become easier to round: rotation, smoothing
 *   step  3          the range in which each row of W is rounded
 *   step  4          GPTQ rounds W' to Q so that  |X W'^T - X Q^T|  is small
 *   step  5          W' = W + 1/2 M H^-1,   H = X^T X,   M = (D + (F - X) W^T)^T X
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
    // 1. the mean square of each input, over all windows
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
 *   W <- R^T W for o and down,   W_v,h <- H_d^T W_v,h,   W_o,h <- W_o,h H_d
 *
 * For n = m 2^k, m odd, H_n is the Hadamard matrix of 2^k times (Kronecker) the Hartley matrix of
 * m, cos(2 pi ij / m) + sin(2 pi ij / m): so n may be 576 or 3072. Both are symmetric and, over
 * their roots, orthogonal. The residual stream is x R instead of x. R is orthogonal, so RMSNorm
 * without weights commutes with R, and the model computes the same; but an outlying channel is now
 * spread over all. QuaRot, arXiv 2404.00456. ---- */

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
 *   s_j = max(1, max|X_j| / t),   X <- X diag(s)^-1,   W <- W diag(s)
 *
 * X W^T stays the same, but the channels of X that stand out above the threshold t no longer
 * coarsen the int8 steps of a whole token. The search finds the t with which the quantized output
 * is nearest to the float output. QQQ, arXiv 2406.09904, section 3.1. ---- */

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
 * h_k = H_kk, the mean square of input channel k on the calibration tokens: the error that the
 * rounding of w_k alone adds to the output. If GPTQ follows, h_k = sqrt(H_kk) / U_kk, see
 * compensated_importance(). The range of a row gives s_channel, in groups also s_group. ---- */

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
 *   w_j <- w_j - e U_ij for j > i
 *
 * If the weights of a row are off by d, the output is off by X d^T, squared and summed d H d^T.
 * Rounding column i fixes d_i. The columns behind it are free to make up for that: d H d^T is least
 * if they move by d_j = d_i B_ij / B_ii, B the inverse of H without the columns before i. Nobody
 * has to invert that many matrices: B_ij / B_ii = U_ij / U_ii for all i at once. Columns of large
 * inputs are rounded first, while many others are free (act-order). Damping keeps H invertible if
 * tokens are few. GPTQ, arXiv 2210.17323, where H is 2 X X^T; no factor changes the result. ---- */

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
 * 4  Arithmetic beneath
 * ============================================================================================ */

/* ---- sums of products ---- */

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

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

/* sum_i x_i y_i, in a fixed order. */
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

/* Asks the memory for the n bytes that come 4 KB after p: without, it pauses at each page's end. */
static inline void prefetch(const void *p, size_t n) {
    for (size_t i = 0; i < n; i += 64) __builtin_prefetch((const char *)p + 4096 + i);
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

/* e^x to 2 units in the last place, in steps that the compiler vectorizes, as expf() is not:
 * 2^n e^r, n = rint(x / ln 2), r = x - n ln 2 in two steps; the series of e^r. */
static inline float exponential(float x) {
    x = clamp(x, -87.0f, 89.0f);                            // from 88.4 on infinity
    float magic = 0x1.8p23f, n = x * 0x1.715476p0f + magic; // n in the lowest bits
    float scale = bits_to_float((float_to_bits(n) + 127) << 23);
    n -= magic;
    float r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    float y =
        1.0f +
        r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    return y * scale;
}

/* ---- y = x W^T in float32
 *
 * A tile of y is TILE_ROWS x TILE_COLUMNS accumulators in registers; its part of W goes through the
 * cache as a panel of TILE_DEPTH x TILE_COLUMNS floats. ---- */

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
        int depth = K - k0 < TILE_DEPTH ? K - k0 : TILE_DEPTH;
        fill_panel(w, n0, n_columns, k0, depth, panel);
        for (int m = 0; m < M; m += TILE_ROWS) {
            Vector tile[TILE_ROWS][2];
            int rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;
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
        matmul_panel(M, K, x, ldx, w, n, N - n < TILE_COLUMNS ? N - n : TILE_COLUMNS, y + n, ldy);
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
            int columns = K - k0 < TILE_COLUMNS ? K - k0 : TILE_COLUMNS;
            matmul_panel(N, T, a_t, T, (View){b, F32, 1, K}, k0, columns, product, TILE_COLUMNS);
            for (size_t n = 0; n < (size_t)N; n++)
                for (int k = 0; k < columns; k++)
                    M[n * K + k0 + k] += product[n * TILE_COLUMNS + k];
        }
        free(product);
    }
    free(a_t);
}

static void float_linears(const Linear *w, int n_linears, const float *x, int T, float *const *y) {
    size_t K = w->K;
#pragma omp parallel
    for (int i = 0; i < n_linears; i++) {
        const Linear *l = &w[i];
        size_t N = l->N;
        if (T == 1) { // bound by reading W: row by row
#pragma omp for nowait
            for (size_t n = 0; n < N; n++) {
                float sum = 0.0f, line[TILE_DEPTH];
                for (size_t k = 0; k < K; k += TILE_DEPTH) {
                    int depth = K - k < TILE_DEPTH ? K - k : TILE_DEPTH;
                    size_t element = dtype_size(l->dtype);
                    prefetch((const char *)l->w + (n * K + k) * element, depth * element);
                    floats(l->w, l->dtype, n * K + k, depth, line);
                    sum += dot(x + k, line, depth);
                }
                y[i][n] = sum;
            }
            continue;
        }
#pragma omp for schedule(dynamic) nowait
        for (size_t n = 0; n < N; n += TILE_COLUMNS)
            matmul_panel(T, K, x, K, (View){l->w, l->dtype, K, 1}, n,
                         N - n < TILE_COLUMNS ? N - n : TILE_COLUMNS, y[i] + n, N);
    }
}

/* ---- the versions of dot_u4_c() for processors that can do more ---- */

#ifdef __x86_64__

/* sum[t] += of n = 128 or 64 columns. Sums of two products, at most 2 * 15 * 128, fit 16 bits, so
 * do eight; the step to 32 bits multiplies by s_group on its way. */
__attribute__((target("avx2"), always_inline)) static inline void
add_columns_avx2(const uint8_t *w, int s_group, const int8_t *a, int n, int T, __m256i *sum) {
    const __m256i low = _mm256_set1_epi8(0x0f), s = _mm256_set1_epi16(s_group);
    __m256i even[2], odd[2];
    prefetch(w, n / 2);
    for (int i = 0; i < n / 64; i++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)w + i);
        even[i] = _mm256_and_si256(bytes, low);
        odd[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    }
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
    int k = 0;
    for (; k + GROUP <= K; k += GROUP)
        add_columns_avx2(w + k / 2, s_group ? s_group[k / GROUP] : 1, a + k * T, GROUP, T, sum);
    int rest = K - k; // only without groups
    if (rest == 64) add_columns_avx2(w + k / 2, 1, a + k * T, 64, T, sum);
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

/* sum[.][t] += of up to 128 columns. u * s_group is at most 225 and fits a byte, so one 16-bit
 * multiplication scales two codes at once, once for all tokens. */
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

DotU4 *dot_u4_best(const char **name) {
    int i = 2;
    while (!dot_u4_kernel(i, name)) i--;
    return dot_u4_kernel(i, name);
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
 * 5  The engine on the CPU
 * ============================================================================================ */

enum { PROMPT_CHUNK = 512 }; // tokens that one forward() takes

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
    if (e->state) state_free(e->state);
    e->state = state_new(&engine->model->config, context,
                         context < PROMPT_CHUNK ? context : PROMPT_CHUNK, engine->kv_bits);
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

/* Bytes a second that all threads together read: the best of some passes over 512 MB, which fit in
 * no cache. */
static double memory_bandwidth(void) {
    const size_t n = (size_t)64 << 20;
    uint64_t *buffer = allocate(n, sizeof *buffer), total = 0;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) buffer[i] = i; // so that every page is there, near its reader
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
    CpuEngine *e = (CpuEngine *)engine;
    if (e->state) state_free(e->state);
    free(e);
}

Engine *engine_new(const Model *m, bool on_gpu, int kv_bits) {
    if (kv_bits != 16 && kv_bits != 8) die("-k %d: the KV cache has 16 or 8 bits", kv_bits);
    if (on_gpu) return gpu_engine(m, kv_bits);
    const Config *c = &m->config;
    CpuEngine *e = allocate(1, sizeof *e);
    e->engine =
        (Engine){.model = m,
                 .kv_bits = kv_bits,
                 .position_bytes = kv_row_bytes(c, kv_bits) * 2 * c->n_layers * c->n_kv_heads,
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
