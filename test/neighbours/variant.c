/* Variants of a model: 1 copies, the common quantizer, sorted numbers · 2 the forward pass ·
 * 3 attention · 4 the backward pass · 5 analysis. The contracts stand in variant.h. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/times.h>
#include <unistd.h>

#include "variant.h"

/* ---- 1: copies, the common quantizer, sorted numbers --------------------------------------- */

double cpu_seconds(void) {
    struct tms t;
    times(&t);
    return (double)(t.tms_utime + t.tms_stime + t.tms_cutime + t.tms_cstime) / sysconf(_SC_CLK_TCK);
}

float *new_floats(size_t n) {
    return allocate(n, sizeof(float));
}

void copy_floats(float *to, const float *from, size_t n) {
    memcpy(to, from, n * sizeof *to);
}

float *weights_of(const Linear *l) {
    return l->w;
}

static float random_sign(uint64_t *seed) { // in [-1, 1)
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (int32_t)(*seed >> 32) * 0x1p-31f;
}

Layer layer_float_copy(const Config *c, const Layer *layer, int index) {
    Layer copy;
    copy.attention_norm = new_floats(2 * c->dim);
    copy.ffn_norm = copy.attention_norm + c->dim;
    copy_floats(copy.attention_norm, layer->attention_norm, c->dim);
    copy_floats(copy.ffn_norm, layer->ffn_norm, c->dim);
    for (int k = 0; k < N_LINEARS; k++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", index, linear_names[k]);
        copy.linears[k] = float_copy(&layer->linears[k], name);
    }
    return copy;
}

Inverse hessian_inverse(const double *H, int K, bool act_order) {
    Inverse inverse = {K, allocate(K, sizeof(int)), allocate((size_t)K * K, sizeof(double))};
    double *diagonal = allocate(K, sizeof *diagonal);
    for (size_t k = 0; k < (size_t)K; k++) diagonal[k] = H[k * (K + 1)];
    invert_hessian(&cpu_operations, NULL, (const Sums *)H, diagonal, act_order, &inverse, NULL);
    free(diagonal);
    return inverse;
}

void inverse_free(Inverse *inverse) {
    free(inverse->order);
    free(inverse->U);
}

Variant variant_new(const Model *m, uint64_t seed) {
    Variant v = {.m = *m, .bits = 32};
    const Config *c = &v.m.config;
    uint64_t random = seed;
    v.m.layers = allocate(c->n_layers, sizeof *v.m.layers);
    for (int l = 0; l < c->n_layers; l++) {
        v.m.layers[l] = layer_float_copy(c, &m->layers[l], l);
        for (int k = 0; k < N_LINEARS && seed; k++) {
            const Linear *w = &v.m.layers[l].linears[k];
            for (size_t i = 0; i < (size_t)w->N * w->K; i++)
                weights_of(w)[i] *= 1 + 1e-6f * random_sign(&random);
        }
    }
    return v;
}

void variant_free(Variant *v) {
    if (v->loaded) {
        model_free(v->loaded);
        checkpoint_close(v->file);
        return;
    }
    for (int l = 0; l < v->m.config.n_layers; l++) layer_free(&v->m.layers[l]);
    free(v->m.layers);
}

float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

Range range_of(const float *x, int n, int bits) {
    float low = 0, high = 0;
    for (int i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    if (low == 0 && high == 0) low = -1, high = 1;
    float scale = (high - low) / ((1 << bits) - 1);
    return (Range){scale, rintf(-low / scale)};
}

float round_in(Range r, float x, int bits) {
    return r.scale * (clamp(rintf(x / r.scale) + r.zero, 0, (1 << bits) - 1) - r.zero);
}

void round_asymmetric(float *x, int n, int bits) {
    Range r = range_of(x, n, bits);
    for (int i = 0; i < n; i++) x[i] = round_in(r, x[i], bits);
}

void round_rows(RoundRow *round, float *x, size_t n_rows, int n, int bits) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n_rows; i++) round(x + i * n, n, bits);
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

const float *sort(const float *x, size_t stride, int n, float *sorted) {
    for (int i = 0; i < n; i++) sorted[i] = x[i * stride];
    qsort(sorted, n, sizeof *sorted, by_value);
    return sorted;
}

float quantile(const float *sorted, int n, double q) {
    double at = q * (n - 1);
    int i = at;
    return sorted[i] + (sorted[i + 1 < n ? i + 1 : i] - sorted[i]) * (at - i);
}

void k_means(float (*points)[2], size_t n, int k, float *centers) {
    qsort(points, n, sizeof *points, by_value);
    double *weight = allocate(n + 1, sizeof *weight), *moment = allocate(n + 1, sizeof *moment);
    for (size_t i = 0; i < n; i++) { // of all points before one
        weight[i + 1] = weight[i] + points[i][1];
        moment[i + 1] = moment[i] + (double)points[i][0] * points[i][1];
    }
    double center[16];
    for (size_t i = 0, at = 0; i < (size_t)k; i++) {
        while (at + 1 < n && weight[at + 1] < weight[n] * (i + .5) / k) at++;
        center[i] = points[at][0];
    }
    size_t end[16] = {0}; // of the points that are nearest to a center
    for (int round = 0; round < 50; round++)
        for (int i = 0; i < k; i++) {
            float edge = i + 1 < k ? (center[i + 1] + center[i]) / 2 : INFINITY;
            size_t begin = i ? end[i - 1] : 0;
            while (end[i] < n && points[end[i]][0] < edge) end[i]++;
            while (end[i] > 0 && points[end[i] - 1][0] >= edge) end[i]--;
            double w = weight[end[i]] - weight[begin];
            if (w > 0) center[i] = (moment[end[i]] - moment[begin]) / w;
        }
    for (int i = 0; i < k; i++) centers[i] = center[i];
    free(weight), free(moment);
}

/* ---- 2: the forward pass ------------------------------------------------------------------- */

/* The input of linears first .. last: shown to the tap, then rounded. */
static void linear_input(const Variant *v, float *x, int l, int first, int last, int T, Tap *tap,
                         void *arg) {
    int K = v->m.layers[l].linears[first].K;
    for (int k = first; k <= last && tap; k++) tap(arg, l, k, x, T, K);
    if (v->round_x) round_rows(v->round_x, x, T, K, v->x_bits);
}

/* layer_forward() with what the variant does at run time. */
void variant_layer(Variant *v, State *s, int l, int T, Tap *tap, void *arg) {
    const Config *c = &v->m.config;
    const Layer *layer = &v->m.layers[l];
    rmsnorm(s->x, layer->attention_norm, T, c->dim, c->norm_eps, s->xb);
    linear_input(v, s->xb, l, 0, 2, T, tap, arg);
    if (v->attention) v->attention(v, s, l, T);
    else attention_block(c, layer, s, 0, T, 0);
    linear_input(v, s->att, l, 3, 3, T, tap, arg);
    add_linear(&layer->o, s->att, T, s->xb, s->x);

    rmsnorm(s->x, layer->ffn_norm, T, c->dim, c->norm_eps, s->xb);
    linear_input(v, s->xb, l, 4, 5, T, tap, arg);
    ffn_block(c, layer, s, T);
    linear_input(v, s->gate, l, 6, 6, T, tap, arg);
    add_linear(&layer->down, s->gate, T, s->xb, s->x);
}

void embed(const Model *m, const int *tokens, int T, float *x) {
    size_t dim = m->config.dim;
    for (int t = 0; t < T; t++)
        floats(m->embedding.w, m->embedding.dtype, tokens[t] * dim, dim, x + t * dim);
}

/* p [n] <- softmax(p); returns -log p[target]. */
static double softmax_loss(float *p, int n, int target) {
    float max = p[0], at_target = p[target];
    for (int i = 1; i < n; i++) max = p[i] > max ? p[i] : max;
    double sum = 0;
    for (int i = 0; i < n; i++) sum += p[i] = expf(p[i] - max);
    for (int i = 0; i < n; i++) p[i] /= (float)sum;
    return log(sum) + max - at_target;
}

/* The mean of -log p of tokens 1 .. T - 1, from the last layer's output in s->x, which is replaced
 * by the final norm's. dx [T][dim] gets the gradient with respect to that, unless it is NULL. */
double output_loss(const Model *m, State *s, const int *tokens, int T, float *dx) {
    int vocab = m->config.vocab_size, dim = m->config.dim;
    double sum = 0;
    float *head = NULL; // [dim][vocab]
    if (dx) {
        memset(dx, 0, sizeof *dx * T * dim);
        head = new_floats((size_t)dim * vocab);
        float *row = new_floats(dim);
        for (size_t i = 0; i < (size_t)vocab; i++) {
            floats(m->lm_head.w, m->lm_head.dtype, i * dim, dim, row);
            for (int j = 0; j < dim; j++) head[(size_t)j * vocab + i] = row[j];
        }
        free(row);
    }
    rmsnorm(s->x, m->norm, T, dim, m->config.norm_eps, s->x);
    for (int t = 0; t < T - 1; t += LOGIT_ROWS) {
        int rows = T - 1 - t < LOGIT_ROWS ? T - 1 - t : LOGIT_ROWS;
        float *p = (float *)logits(m, s, t, rows);
        double loss[LOGIT_ROWS];
#pragma omp parallel for
        for (int i = 0; i < rows; i++) {
            int target = tokens[t + i + 1];
            float *row = p + (size_t)i * vocab;
            loss[i] = softmax_loss(row, vocab, target);
            row[target] -= 1;
            for (int j = 0; j < vocab && dx; j++) row[j] /= T - 1;
        }
        for (int i = 0; i < rows; i++) sum += loss[i];
        Linear back = {.N = dim, .K = vocab, .dtype = F32, .w = head};
        if (dx) linear(&back, p, rows, dx + (size_t)t * dim);
    }
    free(head);
    return sum / (T - 1);
}

double variant_loss(Variant *v, State *s, const int *tokens, int T) {
    embed(&v->m, tokens, T, s->x);
    for (int l = 0; l < v->m.config.n_layers; l++) variant_layer(v, s, l, T, NULL, NULL);
    return output_loss(&v->m, s, tokens, T, NULL);
}

/* y [M][N] = x [M][K] w [N][K]^T */
void product(const float *x, int M, const float *w, int N, int K, float *y) {
    linear(&(Linear){.N = N, .K = K, .dtype = F32, .w = (float *)w}, x, M, y);
}

enum { BLOCK = 16 }; // floats of a cache line

/* y [columns][rows] = x^T, rows of x `stride` floats apart. */
void transpose(const float *x, int rows, int columns, size_t stride, float *y) {
#pragma omp parallel for
    for (int j0 = 0; j0 < columns; j0 += BLOCK)
        for (int i = 0; i < rows; i++)
            for (int j = j0; j < j0 + BLOCK && j < columns; j++)
                y[(size_t)j * rows + i] = x[i * stride + j];
}

/* y [rows][columns] = part of x, whose rows are `stride` floats apart. */
void gather(const float *x, int rows, int columns, size_t stride, float *y) {
    for (int i = 0; i < rows; i++)
        memcpy(y + (size_t)i * columns, x + i * stride, columns * sizeof *y);
}

/* Turns each head of x [T][n_heads][head_dim] by its position, or back (direction -1). */
static void turn(const Config *c, const State *s, float *x, int T, int n_heads, int direction) {
    int half = c->head_dim / 2;
#pragma omp parallel for
    for (int i = 0; i < T * n_heads; i++) {
        const float *angle = s->rope + (size_t)(i / n_heads) * c->head_dim;
        float *a = x + (size_t)i * c->head_dim, *b = a + half;
        for (int j = 0; j < half; j++) {
            float cosine = angle[2 * j], sine = direction * angle[2 * j + 1], a_j = a[j];
            a[j] = a_j * cosine - b[j] * sine;
            b[j] = b[j] * cosine + a_j * sine;
        }
    }
}

/* ---- 3: attention -------------------------------------------------------------------------- */

void project(const Variant *v, State *s, int l, int T) {
    linear(&v->m.layers[l].q, s->xb, T, s->q);
    linear(&v->m.layers[l].k, s->xb, T, s->keys);
    linear(&v->m.layers[l].v, s->xb, T, s->values);
}

void turn_all(const Config *c, State *s, int T) {
    turn(c, s, s->q, T, c->n_heads, 1);
    turn(c, s, s->keys, T, c->n_kv_heads, 1);
}

enum { QUERIES = 256 }; // of one head at a time

/* p [n][n_keys], scores of queries t0 .. t0 + n - 1: softmax(p / sqrt(d)) over the keys up to each
 * query, 0 beyond. */
static void causal_softmax(float *p, int n, int n_keys, int t0, int d) {
    float scale = 1.0f / sqrtf(d);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < n; i++) {
        float *row = p + (size_t)i * n_keys;
        int seen = t0 + i + 1;
        for (int j = 0; j < seen; j++) row[j] *= scale;
        softmax_loss(row, seen, 0);
        memset(row + seen, 0, (n_keys - seen) * sizeof *row);
    }
}

void attend(const Config *c, State *s, int T, RoundRow *round_p, int p_bits, const OldCache *old) {
    int d = c->head_dim, q_dim = c->n_heads * d, kv_dim = c->n_kv_heads * d;
    float *q = new_floats(QUERIES * d), *k = new_floats((size_t)T * d),
          *out = new_floats(QUERIES * d);
    float *p = new_floats((size_t)QUERIES * T), *p_old = new_floats((size_t)QUERIES * T);
    for (int h = 0; h < c->n_heads; h++) {
        int at = h / (c->n_heads / c->n_kv_heads) * d; // of the KV head
        for (int t0 = 0; t0 < T; t0 += QUERIES) {
            int n = T - t0 < QUERIES ? T - t0 : QUERIES, n_keys = t0 + n;
            gather(s->q + (size_t)t0 * q_dim + h * d, n, d, q_dim, q);
            gather(s->keys + at, n_keys, d, kv_dim, k);
            product(q, n, k, n_keys, d, p);
            if (old) {
                gather(old->keys + at, n_keys, d, kv_dim, k);
                product(q, n, k, n_keys, d, p_old);
#pragma omp parallel for
                for (int i = 0; i < n; i++)
                    memcpy(p + (size_t)i * n_keys, p_old + (size_t)i * n_keys,
                           (t0 + i) / old->residual * old->residual * sizeof *p);
            }
            causal_softmax(p, n, n_keys, t0, d);
            if (round_p) round_rows(round_p, p, n, n_keys, p_bits);
            float *attention = s->att + (size_t)t0 * q_dim + h * d;
            int parts = old ? 2 : 1;
#pragma omp parallel for
            for (int i = 0; i < n * (parts - 1); i++) { // probabilities of old values move to p_old
                float *p_i = p + (size_t)i * n_keys, *p_old_i = p_old + (size_t)i * n_keys;
                size_t n_old = t0 + i > old->residual ? t0 + i - old->residual : 0;
                copy_floats(p_old_i, p_i, n_old);
                memset(p_i, 0, n_old * sizeof *p_i);
                memset(p_old_i + n_old, 0, (n_keys - n_old) * sizeof *p_i);
            }
            for (int part = 0; part < parts; part++) {
                transpose((part ? old->values : s->values) + at, n_keys, d, kv_dim, k);
                product(part ? p_old : p, n, k, d, n_keys, out);
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < d; j++)
                        attention[(size_t)i * q_dim + j] =
                            out[i * d + j] + (part ? attention[(size_t)i * q_dim + j] : 0);
            }
        }
    }
    free(q), free(k), free(out), free(p), free(p_old);
}

/* ---- 4: the backward pass ------------------------------------------------------------------ */

Trace trace_new(const Config *c, size_t T) {
    size_t dim = T * c->dim, q = T * c->n_heads * c->head_dim, kv = T * c->n_kv_heads * c->head_dim;
    size_t ffn = T * c->hidden_dim;
    return (Trace){new_floats(dim), new_floats(dim), new_floats(q),   new_floats(kv),
                   new_floats(kv),  new_floats(q),   new_floats(dim), new_floats(dim),
                   new_floats(ffn), new_floats(ffn), new_floats(ffn), new_floats(kv),
                   new_floats(kv)};
}

void trace_free(Trace *t) {
    float *all[] = {t->x,  t->h1,   t->q,  t->k,   t->v,  t->att, t->x2,
                    t->h2, t->gate, t->up, t->act, t->dk, t->dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* layer_forward() on t->x [T][dim]; the output is in s->x. */
void trace_layer(const Config *c, const Layer *layer, State *s, int T, Trace *t) {
    size_t n = (size_t)T * c->dim, n_ffn = (size_t)T * c->hidden_dim;
    rmsnorm(t->x, layer->attention_norm, T, c->dim, c->norm_eps, t->h1);
    copy_floats(s->xb, t->h1, n);
    attention_block(c, layer, s, 0, T, 0);
    copy_floats(t->q, s->q, (size_t)T * layer->q.N);
    copy_floats(t->k, s->keys, (size_t)T * layer->k.N);
    copy_floats(t->v, s->values, (size_t)T * layer->v.N);
    copy_floats(t->att, s->att, (size_t)T * layer->o.K);
    copy_floats(s->x, t->x, n);
    add_linear(&layer->o, t->att, T, s->xb, s->x);
    copy_floats(t->x2, s->x, n);
    rmsnorm(t->x2, layer->ffn_norm, T, c->dim, c->norm_eps, t->h2);
    linear(&layer->gate, t->h2, T, t->gate);
    linear(&layer->up, t->h2, T, t->up);
#pragma omp parallel for
    for (size_t i = 0; i < n_ffn; i++) t->act[i] = t->gate[i] / (1 + expf(-t->gate[i])) * t->up[i];
    add_linear(&layer->down, t->act, T, s->xb, s->x);
}

/* y = x W^T:  dx [T][K] += dy W,  dW [N][K] += dy^T x unless NULL. */
static void linear_backward(const Linear *w, const float *x, const float *dy, int T, float *dx,
                            double *dw) {
    float *w_t = new_floats((size_t)w->N * w->K), *back = new_floats((size_t)T * w->K);
    transpose(w->w, w->N, w->K, w->K, w_t);
    product(dy, T, w_t, w->K, w->N, back);
    for (size_t i = 0; i < (size_t)T * w->K; i++) dx[i] += back[i];
    if (dw) add_moments(dw, dy, w->N, x, w->K, T);
    free(w_t), free(back);
}

/* y_i = x_i r w_i, r = 1 / sqrt(mean x^2 + eps):
 *     dx_i += r w_i dy_i - x_i r^3 / dim sum_j dy_j w_j x_j,   dw_i += dy_i x_i r */
void norm_backward(const float *x, const float *w, const float *dy, int T, int dim, float eps,
                   float *dx, double *dw) {
    for (int t = 0; t < T; t++, x += dim, dy += dim, dx += dim) {
        double square = 0, along = 0;
        for (int i = 0; i < dim; i++) square += x[i] * x[i], along += (double)dy[i] * w[i] * x[i];
        double r = 1 / sqrt(square / dim + eps), pull = r * r * r / dim * along;
        for (int i = 0; i < dim; i++) {
            dx[i] += r * w[i] * dy[i] - pull * x[i];
            if (dw) dw[i] += dy[i] * x[i] * r;
        }
    }
}

/* a = P v, P = softmax(S), S = q k^T / sqrt(d):
 *     dv = P^T da,  dP = da v^T,  dS = P (dP - sum P dP),
 *     dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)
 * dq [T][q_dim]; dk, dv into the trace; all of them before RoPE. */
static void attention_backward(const Config *c, const State *s, Trace *tr, const float *da, int T,
                               float *dq) {
    int d = c->head_dim, q_dim = c->n_heads * d, kv_dim = c->n_kv_heads * d;
    size_t block = (size_t)QUERIES * d, keys = (size_t)T * d, scores = (size_t)QUERIES * T;
    float *q = new_floats(block), *da_h = new_floats(block), *out = new_floats(keys);
    float *k = new_floats(keys), *p = new_floats(scores), *dp = new_floats(scores);
    float *p_t = new_floats(scores), *rows_t = new_floats(block);
    memset(tr->dk, 0, sizeof *tr->dk * T * kv_dim);
    memset(tr->dv, 0, sizeof *tr->dv * T * kv_dim);
    for (int h = 0; h < c->n_heads; h++) {
        int at = h / (c->n_heads / c->n_kv_heads) * d;
        for (int t0 = 0; t0 < T; t0 += QUERIES) {
            int n = T - t0 < QUERIES ? T - t0 : QUERIES, n_keys = t0 + n;
            gather(tr->q + (size_t)t0 * q_dim + h * d, n, d, q_dim, q);
            gather(da + (size_t)t0 * q_dim + h * d, n, d, q_dim, da_h);
            gather(tr->k + at, n_keys, d, kv_dim, k);
            product(q, n, k, n_keys, d, p);
            causal_softmax(p, n, n_keys, t0, d);
            gather(tr->v + at, n_keys, d, kv_dim, k);
            product(da_h, n, k, n_keys, d, dp);
            for (int part = 0; part < 2; part++) { // dv = P^T da; then dk = dS^T q
                transpose(p, n, n_keys, n_keys, p_t);
                transpose(part ? q : da_h, n, d, d, rows_t);
                product(p_t, n_keys, rows_t, d, n, out);
                float *to = part ? tr->dk : tr->dv;
                for (int i = 0; i < n_keys; i++)
                    for (int j = 0; j < d; j++) to[(size_t)i * kv_dim + at + j] += out[i * d + j];
                if (part) break;
#pragma omp parallel for
                for (int i = 0; i < n; i++) { // P becomes dS / sqrt(d)
                    float *p_i = p + (size_t)i * n_keys, *dp_i = dp + (size_t)i * n_keys;
                    double sum = 0;
                    for (int j = 0; j < n_keys; j++) sum += p_i[j] * dp_i[j];
                    for (int j = 0; j < n_keys; j++) p_i[j] *= (dp_i[j] - (float)sum) / sqrtf(d);
                }
            }
            transpose(tr->k + at, n_keys, d, kv_dim, k);
            product(p, n, k, d, n_keys, out);
            for (int i = 0; i < n; i++)
                memcpy(dq + (size_t)(t0 + i) * q_dim + h * d, out + i * d, d * sizeof *dq);
        }
    }
    turn(c, s, dq, T, c->n_heads, -1);
    turn(c, s, tr->dk, T, c->n_kv_heads, -1);
    free(q), free(da_h), free(out), free(k), free(p), free(dp), free(p_t), free(rows_t);
}

/* dx [T][dim], the gradient of the layer's output, becomes that of its input; g may be NULL. */
void layer_backward(const Config *c, const Layer *layer, const State *s, Trace *t, int T, float *dx,
                    Gradient *g) {
    size_t n = (size_t)T * c->dim, n_ffn = (size_t)T * c->hidden_dim, n_q = (size_t)T * layer->q.N;
    double *none[N_LINEARS] = {0}, **dw = g ? g->linears : none;
    float *d_act = new_floats(n_ffn), *d_up = new_floats(n_ffn), *dh = new_floats(n);
    linear_backward(&layer->down, t->act, dx, T, d_act, dw[6]);
#pragma omp parallel for
    for (size_t i = 0; i < n_ffn; i++) { // act = silu(gate) up, silu(z) = z sigmoid(z)
        float sigmoid = 1 / (1 + expf(-t->gate[i])), silu = t->gate[i] * sigmoid;
        d_up[i] = d_act[i] * silu;
        d_act[i] *= t->up[i] * (sigmoid + silu * (1 - sigmoid));
    }
    linear_backward(&layer->gate, t->h2, d_act, T, dh, dw[4]);
    linear_backward(&layer->up, t->h2, d_up, T, dh, dw[5]);
    norm_backward(t->x2, layer->ffn_norm, dh, T, c->dim, c->norm_eps, dx, g ? g->norms[1] : NULL);

    float *d_att = new_floats(n_q), *dq = new_floats(n_q);
    linear_backward(&layer->o, t->att, dx, T, d_att, dw[3]);
    attention_backward(c, s, t, d_att, T, dq);
    memset(dh, 0, n * sizeof *dh);
    linear_backward(&layer->q, t->h1, dq, T, dh, dw[0]);
    linear_backward(&layer->k, t->h1, t->dk, T, dh, dw[1]);
    linear_backward(&layer->v, t->h1, t->dv, T, dh, dw[2]);
    norm_backward(t->x, layer->attention_norm, dh, T, c->dim, c->norm_eps, dx,
                  g ? g->norms[0] : NULL);
    free(d_act), free(d_up), free(dh), free(d_att), free(dq);
}

void model_backward(const Model *m, State *s, const int *tokens, int T, Trace *traces) {
    const Config *c = &m->config;
    size_t n = (size_t)T * c->dim;
    float *dx = new_floats(n), *dy = new_floats(n), *out = new_floats(n);
    embed(m, tokens, T, s->x);
    for (int l = 0; l < c->n_layers; l++) {
        copy_floats(traces[l].x, s->x, n);
        trace_layer(c, &m->layers[l], s, T, &traces[l]);
    }
    copy_floats(out, s->x, n);
    output_loss(m, s, tokens, T, dy);
    norm_backward(out, m->norm, dy, T, c->dim, c->norm_eps, dx, NULL);
    for (int l = c->n_layers - 1; l >= 0; l--)
        layer_backward(c, &m->layers[l], s, &traces[l], T, dx, NULL);
    free(dx), free(dy), free(out);
}

void adamw(float *w, const double *gradient, float (*moments)[2], size_t n, double rate, int step) {
    const double beta1 = .9, beta2 = .999, eps = 1e-6, decay = 1e-5;
    double bias1 = 1 - pow(beta1, step), bias2 = sqrt(1 - pow(beta2, step));
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        float *m = moments[i], g = gradient[i];
        m[0] = beta1 * m[0] + (1 - beta1) * g;
        m[1] = beta2 * m[1] + (1 - beta2) * g * g;
        w[i] -= rate * decay * w[i];
        w[i] -= rate / bias1 * m[0] / (sqrt(m[1]) / bias2 + eps);
    }
}

/* ---- 5: analysis ----------------------------------------------------------------------------- */

/* The inputs of all linears in one window: [n_layers][N_LINEARS], each [T][K]. */
static void see_inputs(void *arg, int l, int linear, const float *x, int T, int K) {
    float **inputs = arg;
    inputs[l * N_LINEARS + linear] = new_floats((size_t)T * K);
    copy_floats(inputs[l * N_LINEARS + linear], x, (size_t)T * K);
}

static float **window_inputs(Variant *v, State *s, const int *tokens, int T) {
    float **inputs = allocate(v->m.config.n_layers * N_LINEARS, sizeof *inputs);
    embed(&v->m, tokens, T, s->x);
    for (int l = 0; l < v->m.config.n_layers; l++) variant_layer(v, s, l, T, see_inputs, inputs);
    return inputs;
}

/* SQNR = 10 log10(sum a^2 / sum (a - b)^2) and MSE = mean (a - b)^2. */
static void put_distance(FILE *out, const float *a, const float *b, size_t n) {
    double signal = 0, noise = 0;
    for (size_t i = 0; i < n; i++) {
        signal += (double)a[i] * a[i];
        noise += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    }
    fprintf(out, ",%.3f,%.4g", 10 * log10(signal / noise), noise / n);
}

/* E (x - m)^4 / (E (x - m)^2)^2 - 3 */
static double kurtosis(const float *x, size_t n) {
    double mean = 0, second = 0, fourth = 0;
    for (size_t i = 0; i < n; i++) mean += x[i] / n;
    for (size_t i = 0; i < n; i++) {
        double square = (x[i] - mean) * (x[i] - mean);
        second += square / n;
        fourth += square * square / n;
    }
    return fourth / (second * second) - 3;
}

static float column_max(const float *x, size_t rows, size_t columns, size_t column) {
    float max = 0;
    for (size_t i = 0; i < rows; i++) max = fmaxf(max, fabsf(x[i * columns + column]));
    return max;
}

void analyze(Variant *original, Variant *v, State *s, const int *tokens, int T, const char *name,
             FILE *linears, FILE *channels) {
    float **before = window_inputs(original, s, tokens, T);
    float **after = window_inputs(v, s, tokens, T);
    for (int i = 0; i < v->m.config.n_layers * N_LINEARS; i++) {
        int l = i / N_LINEARS, k = i % N_LINEARS;
        const Linear *w = &original->m.layers[l].linears[k], *rounded = &v->m.layers[l].linears[k];
        size_t n_x = (size_t)T * w->K, n_w = (size_t)w->N * w->K, n_y = (size_t)T * w->N;
        float *weights = new_floats(n_w), *y = new_floats(n_y), *y_after = new_floats(n_y);
        for (int n = 0; n < w->N; n++) {
            if (rounded->qweight) dequantize_row(rounded, n, weights + (size_t)n * w->K);
            else
                copy_floats(weights + (size_t)n * w->K, weights_of(rounded) + (size_t)n * w->K,
                            w->K);
        }
        fprintf(linears, "%s,%d,%s", name, l, linear_names[k]);
        put_distance(linears, before[i], after[i], n_x);
        put_distance(linears, w->w, weights, n_w);
        for (int j = 0; j < w->K && (k == 0 || k == 4 || k == 6); j++)
            fprintf(channels, "%s,%d,%s,%d,%g,%g,%g,%g\n", name, l, linear_names[k], j,
                    column_max(before[i] + w->K, T - 1, w->K, j),
                    column_max(after[i] + w->K, T - 1, w->K, j), column_max(w->w, w->N, w->K, j),
                    column_max(weights, w->N, w->K, j));
        double kurtosis_x = kurtosis(before[i], n_x), kurtosis_w = kurtosis(w->w, n_w);
        linear(w, before[i], T, y);
        if (v->round_x) round_rows(v->round_x, after[i], T, w->K, v->x_bits);
        linear(rounded, after[i], T, y_after);
        put_distance(linears, y, y_after, n_y);
        fprintf(linears, ",%.3f,%.3f\n", kurtosis_x, kurtosis_w);
        free(weights), free(y), free(y_after), free(before[i]), free(after[i]);
    }
    free(before), free(after);
}
