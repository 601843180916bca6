/* The neighbours: the methods beside QQQ, each as one short function, under the same forward pass,
 * in one table. `make compare` prints it; -h lists the options.
 *
 *   0 the bench and common quantizers · 1 RTN · 2 SmoothQuant · 3 ZeroQuant · 4 LUT-GEMM · 5 GPTQ ·
 *   6 SpQR · 7 KIVI · 8 Fisher information · 9 KVQuant · 10 ZeroQuant's distillation · 11 QQQ ·
 *   12 the table
 *
 * All but QQQ are fake quantization: weights, activations or the KV cache are rounded to values
 * that fit the bits and then multiplied in float32, so they show a method's quality and not its
 * speed. QQQ's rows are files that ./quantize writes, run in integers. Embedding, norms and lm_head
 * stay as they are in every method. The methods are those of github.com/aiha-lab/qllm-infer, with
 * its settings; calibrated ones see the first 32 windows of 2048 tokens. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "variant.h"

/* ---- 0: the bench and common quantizers ------------------------------------------------------ */

enum { LENGTH = 2048, WINDOWS = 32, FISHER_WINDOWS = 16 }; // of the calibration

/* What KVQuant's calibration sees of one layer's keys, or values: they and their Fisher
 * information. */
typedef struct {
    float *x, *fisher; // [FISHER_WINDOWS * LENGTH][kv_dim]
} Sample;

/* The float model, the texts, and what several rows share. */
typedef struct {
    const char *path, *calibration, *eval_path;
    const Model *m;
    State *s;                 // one layer of LENGTH tokens
    int *calib, *eval;        // [WINDOWS][LENGTH], [windows][LENGTH]
    int windows;              // of the evaluation text
    uint64_t perturb;         // a seed; 0: weights as they are
    float *input_max;         // [n_layers][2][dim] SmoothQuant's; NULL until asked for
    Sample *kv;               // [n_layers][2] KVQuant's, the same
    FILE *linears, *channels; // of the analysis
} Bench;

typedef struct Row Row;

/* A row of the table: the method's function and its arguments. */
struct Row {
    const char *method, *setting;
    void (*apply)(Bench *b, const Row *row, Variant *v);
    int w, ffn_w;                         // bits of weights; of gate, up and down, 0: the same
    int x;                                // bits of activations, 0: float
    int group;                            // of weights, 0: a row; of the KV cache
    bool attention;                       // its products are quantized too
    double alpha, threshold, rate;        // SmoothQuant, SpQR, LKD
    int rounds, steps;                    // LUT-GEMM, LKD
    bool offset, all_layers;              // LUT-GEMM, LKD
    bool no_order, fixed_groups;          // GPTQ
    bool stream;                          // KIVI
    bool no_fisher, no_outliers, uniform; // KVQuant
    const char *options;                  // of ./quantize
    bool more;                            // only with -a
};

/* Mean bits of a weight: `attention` for q, k, v and o, `ffn` for the rest, and `extra` bits for
 * each group of `group` weights (0: a row; -1: one of dim equal pieces of the matrix). */
static double mean_bits(const Config *c, double attention, double ffn, double extra, int group) {
    double bits = 0, count = 0;
    for (int k = 0; k < N_LINEARS; k++) {
        int N, K;
        linear_shape(c, k, &N, &K);
        double n = (double)N * K, size = group > 0 ? group : group ? n / c->dim : K;
        bits += n * ((k < 4 ? attention : ffn) + extra / size);
        count += n;
    }
    return bits / count;
}

static float max_magnitude(const float *x, int n) {
    float max = 0;
    for (int i = 0; i < n; i++) max = fmaxf(max, fabsf(x[i]));
    return max;
}

/* s = max|x| / (2^(b-1) - 1), x^ = s clamp(rint(x / s), -2^(b-1), 2^(b-1) - 1): this program's. */
static void round_symmetric(float *x, int n, int bits) {
    int top = (1 << (bits - 1)) - 1;
    float scale = fmaxf(max_magnitude(x, n) / top, 1e-10f);
    for (int i = 0; i < n; i++) x[i] = clamp(rintf(x[i] / scale), -top - 1, top) * scale;
}

static float to_half(float x) {
    uint16_t half = float_to_f16(x);
    floats(&half, F16, 0, 1, &x);
    return x;
}

/* ---- 1: RTN ---------------------------------------------------------------------------------- */

/* Round to nearest, of which all others are refinements: the asymmetric quantizer
 *     s = (max(0, max x) - min(0, min x)) / (2^b - 1),  z = rint(-min(0, min x) / s),
 *     x^ = s (clamp(rint(x / s) + z, 0, 2^b - 1) - z)
 * on each row of W or group of its columns, and on each token of x. */

/* Both attention products with rounded operands, each along the axis that is summed over: rows of q
 * and k, of the probabilities, and channels of v over the whole window (which so looks ahead). */
static void rounded_attention(Variant *v, State *s, int l, int T) {
    const Config *c = &v->m.config;
    int d = c->head_dim, kv_dim = c->n_kv_heads * d, bits = v->x_bits;
    project(v, s, l, T);
    turn_all(c, s, T);
    round_rows(round_asymmetric, s->q, (size_t)T * c->n_heads, d, bits);
    round_rows(round_asymmetric, s->keys, (size_t)T * c->n_kv_heads, d, bits);
    float *channels = new_floats((size_t)kv_dim * T);
    transpose(s->values, T, kv_dim, kv_dim, channels);
    round_rows(round_asymmetric, channels, kv_dim, T, bits);
    transpose(channels, kv_dim, T, T, s->values);
    free(channels);
    attend(c, s, T, round_asymmetric, bits, NULL);
}

/* The linears' weights, each group of `group` (0: a row) by itself; activations per token. */
static void round_model(Variant *v, const Row *row, RoundRow *round) {
    for (int l = 0; l < v->m.config.n_layers; l++)
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *w = &v->m.layers[l].linears[k];
            int group = row->group > 0 ? row->group : w->K;
            round_rows(round, weights_of(w), (size_t)w->N * w->K / group, group, row->w);
        }
    if (row->x) v->round_x = round, v->x_bits = row->x;
    if (row->attention) v->attention = rounded_attention;
    v->row = row;
}

static void rtn(Bench *b, const Row *row, Variant *v) {
    round_model(v, row, round_asymmetric);
    v->bits = mean_bits(&b->m->config, row->w, row->w, row->w + 16, row->group);
}

/* ---- 2: SmoothQuant -------------------------------------------------------------------------- */

/* SmoothQuant, arXiv 2211.10438: channel j of the input of q, k, v or of gate, up is divided by
 *     s_j = max|x_j|^alpha / max_n|W_nj|^(1 - alpha)
 * in the norm before it, and column j of the weights multiplied; then RTN. */

/* max[k] = max|x_k|, what a tap sees of the inputs of q and gate. */
static void see_max(void *arg, int l, int linear, const float *x, int T, int K) {
    if (linear != 0 && linear != 4) return;
    float *max = (float *)arg + (size_t)(2 * l + linear / 4) * K;
    for (int t = 0; t < T; t++, x += K)
        for (int k = 0; k < K; k++) max[k] = fmaxf(max[k], fabsf(x[k]));
}

/* For the weights w [count], which share their input. */
static void smooth_inputs(float *norm, Linear *w, int count, const float *x_max, float alpha) {
    size_t dim = w->K;
    for (size_t j = 0; j < dim; j++) {
        float w_max = 1e-5f;
        for (int k = 0; k < count; k++)
            for (int n = 0; n < w[k].N; n++)
                w_max = fmaxf(w_max, fabsf(weights_of(&w[k])[n * dim + j]));
        float s = fmaxf(1e-5f, powf(x_max[j], alpha) / powf(w_max, 1 - alpha));
        norm[j] /= s;
        for (int k = 0; k < count; k++)
            for (int n = 0; n < w[k].N; n++) weights_of(&w[k])[n * dim + j] *= s;
    }
}

static void smoothquant(Bench *b, const Row *row, Variant *v) {
    const Config *c = &v->m.config;
    size_t dim = c->dim;
    if (!b->input_max) {
        b->input_max = new_floats(c->n_layers * 2 * dim);
        for (int w = 0; w < WINDOWS; w++) {
            embed(&v->m, b->calib + w * LENGTH, LENGTH, b->s->x);
            for (int l = 0; l < c->n_layers; l++)
                variant_layer(v, b->s, l, LENGTH, see_max, b->input_max);
        }
    }
    for (int l = 0; l < c->n_layers; l++)
        for (int ffn = 0; ffn < 2; ffn++) {
            Layer *layer = &v->m.layers[l];
            smooth_inputs(ffn ? layer->ffn_norm : layer->attention_norm, layer->linears + 4 * ffn,
                          ffn ? 2 : 3, b->input_max + (2 * l + ffn) * dim, row->alpha);
        }
    bool symmetric = !row->attention && row->alpha == 0.5; // as this program's W8A8 would be
    round_model(v, row, symmetric ? round_symmetric : round_asymmetric);
    v->bits = symmetric ? row->w : mean_bits(c, row->w, row->w, row->w + 16, 0);
}

/* ---- 3: ZeroQuant ---------------------------------------------------------------------------- */

/* ZeroQuant, arXiv 2206.01861, as DeepSpeed does it: s = 2 max|x| / 2^b,
 * x^ = s clamp(rint(x / s), -2^(b-1), 2^(b-1) - 1), so the largest positive number saturates. A
 * matrix is cut into dim equal pieces, whatever its shape: one may span several rows. */
static void round_zeroquant(float *x, int n, int bits) {
    float scale = 2 * max_magnitude(x, n) / (1 << bits), top = 1 << (bits - 1);
    for (int i = 0; i < n && scale > 0; i++)
        x[i] = clamp(rintf(x[i] / scale), -top, top - 1) * scale;
}

/* Layer l's linear k, w [N][K]. */
static void zeroquant_linear(const Config *c, const Row *row, int k, const Linear *w, float *out) {
    size_t n = (size_t)w->N * w->K, size = row->group > 0 ? (size_t)row->group : n / c->dim;
    memmove(out, w->w, n * sizeof *out);
    round_rows(round_zeroquant, out, n / size, size, k >= 4 && row->ffn_w ? row->ffn_w : row->w);
}

static void zeroquant(Bench *b, const Row *row, Variant *v) {
    const Config *c = &b->m->config;
    for (int l = 0; l < c->n_layers; l++)
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *w = &v->m.layers[l].linears[k];
            zeroquant_linear(c, row, k, w, weights_of(w));
        }
    if (row->x) v->round_x = round_zeroquant, v->x_bits = row->x;
    v->bits =
        mean_bits(c, row->w, row->ffn_w ? row->ffn_w : row->w, 16, row->group ? row->group : -1);
}

/* ---- 4: LUT-GEMM ----------------------------------------------------------------------------- */

/* LUT-GEMM, arXiv 2206.09557; its binary coding is that of arXiv 1802.00150: a group of weights
 *     w ~ sum_i alpha_i b_i,  b_i in {-1, +1}
 *     greedy: r = w; for each i: b_i = sign(r), alpha_i = mean|r|, r -= alpha_i b_i
 *     a round: alpha = argmin |w - sum_i alpha_i b_i|^2, then each b to the nearest sum
 * 0 rounds are greedy, 1 refined, 2 and more alternating. An extension adds an offset: one alpha
 * more, after the others, whose b is all +1. */
enum { MAX_BITS = 4 };

/* alpha [planes] by least squares for given b [planes][n], the first `bits` of them |alpha|,
 * falling: (B^T B) alpha = B^T w, by elimination; the original takes as many steps of conjugate
 * gradients as there are bits. */
static void fit_alpha(const float *w, int n, int bits, int planes, float (*b)[n], float *alpha) {
    double A[MAX_BITS + 1][MAX_BITS + 2] = {0}; // [unknown][unknown], then the right side
    for (int i = 0; i < planes; i++) {
        for (int j = 0; j < planes; j++) {
            int dot = 0;
            for (int k = 0; k < n; k++) dot += (int)(b[i][k] * b[j][k]);
            A[i][j] = dot;
        }
        for (int k = 0; k < n; k++) A[i][planes] += b[i][k] * w[k];
        A[i][i] += planes > bits ? 1e-4 : 1e-6; // two planes may be the same
    }
    for (int i = 0; i < planes; i++)
        for (int r = 0; r < planes; r++)
            for (int j = planes; j >= i && r != i; j--) A[r][j] -= A[r][i] / A[i][i] * A[i][j];
    for (int i = 0; i < planes; i++) {
        float a = A[i][planes] / A[i][i];
        int j = i;
        for (; i < bits && j > 0 && alpha[j - 1] < fabsf(a); j--) alpha[j] = alpha[j - 1];
        alpha[j] = i < bits ? fabsf(a) : a;
    }
}

/* b = the nearest of the 2^bits sums for each weight; of two the larger one. */
static void nearest_signs(const float *w, int n, int bits, const float *alpha, float (*b)[n]) {
    int count = 1 << bits, pattern[1 << MAX_BITS] = {0}, at[n];
    float sums[1 << MAX_BITS]; // ascending
    for (int p = 0; p < count; p++) {
        float sum = 0;
        for (int i = 0; i < bits; i++) sum += p >> i & 1 ? -alpha[i] : alpha[i];
        int j = p;
        for (; j > 0 && sums[j - 1] > sum; j--) sums[j] = sums[j - 1], pattern[j] = pattern[j - 1];
        sums[j] = sum, pattern[j] = p;
    }
    memset(at, 0, sizeof at);
    for (int j = 0; j + 1 < count; j++)
        for (int k = 0; k < n; k++) at[k] += w[k] - alpha[bits] >= (sums[j + 1] + sums[j]) / 2;
    for (int i = 0; i < bits; i++)
        for (int k = 0; k < n; k++) b[i][k] = pattern[at[k]] >> i & 1 ? -1 : 1;
}

/* Replaces w [n] by what its coding stands for, alpha [bits + 1] and b [bits + 1][n]. */
static void binary_coding(float *w, int n, const Row *row, float (*b)[n], float *alpha) {
    int bits = row->w;
    float low = w[0], high = w[0], r[n];
    for (int k = 0; k < n; k++) low = fminf(low, w[k]), high = fmaxf(high, w[k]), b[bits][k] = 1;
    alpha[bits] = row->offset ? (high + low) * 0.5f : 0;
    for (int k = 0; k < n; k++) r[k] = w[k] - alpha[bits];
    for (int i = 0; i < bits; i++) {
        float sum = 0;
        for (int k = 0; k < n; k++) sum += fabsf(r[k]);
        alpha[i] = sum / n;
        for (int k = 0; k < n; k++) {
            b[i][k] = (r[k] > 0) - (r[k] < 0);
            r[k] -= alpha[i] * b[i][k];
        }
    }
    for (int round = 0; round < row->rounds; round++) {
        fit_alpha(w, n, bits, bits + row->offset, b, alpha);
        nearest_signs(w, n, bits, alpha, b);
    }
    for (int k = 0; k < n; k++) {
        w[k] = alpha[bits];
        for (int i = 0; i < bits; i++) w[k] += alpha[i] * b[i][k];
    }
}

static void lut_gemm(Bench *b, const Row *row, Variant *v) {
    for (int i = 0; i < b->m->config.n_layers * N_LINEARS; i++) {
        const Linear *w = &v->m.layers[i / N_LINEARS].linears[i % N_LINEARS];
        int n = row->group > 0 ? row->group : w->K;
#pragma omp parallel for schedule(dynamic)
        for (size_t j = 0; j < (size_t)w->N * w->K / n; j++) {
            float signs[MAX_BITS + 1][n], alpha[MAX_BITS + 1];
            binary_coding(weights_of(w) + j * n, n, row, signs, alpha);
        }
    }
    double alphas = row->w + row->offset;
    v->bits = mean_bits(&b->m->config, row->w, row->w, 16 * alphas, row->group);
}

/* The multiplication without multiplications: y_n = sum over planes i and groups of
 *     alpha_(n,i,group) sum_(t in the group) T_t[byte t of plane i of row n],
 * T_t [256] the sums of 8 inputs with all signs. b [N][planes][K/8], bit j of a byte set for +1 of
 * column 8 t + j; alpha [N][planes][K/n]. x [K], y [N], n a multiple of 8. */
void lut_multiply(const float *x, const uint8_t *b, const float *alpha, int N, int K, int n,
                  int planes, float *y);

void lut_multiply(const float *x, const uint8_t *b, const float *alpha, int N, int K, int n,
                  int planes, float *y) {
    float(*table)[256] = allocate(K / 8, sizeof *table);
    for (int t = 0; t < K / 8; t++) {
        for (int j = 0; j < 8; j++) table[t][0] -= x[8 * t + j];
        for (int j = 0; j < 8; j++)
            for (int m = 0; m < 1 << j; m++) table[t][m | 1 << j] = table[t][m] + 2 * x[8 * t + j];
    }
    memset(y, 0, N * sizeof *y);
    for (int i = 0; i < N * planes; i++, b += K / 8)
        for (int group = 0; group < K / n; group++) {
            float sum = 0;
            for (int t = group * n / 8; t < (group + 1) * n / 8; t++) sum += table[t][b[t]];
            y[i / planes] += *alpha++ * sum;
        }
    free(table);
}

/* ---- 5: GPTQ --------------------------------------------------------------------------------- */

/* GPTQ, arXiv 2210.17323: columns one by one, in the order of falling H_ii, H = X^T X,
 *     q_i = round(w_i),  e = (w_i - q_i) / U_ii,  w_j -= e U_ij for j > i,   H^-1 = U^T U.
 * The range of a row is that of the untouched weights. That of a group is taken when its first
 * column is reached, of columns in the new order, or before all, of columns as they stand. */

/* Hessians H of the inputs of q, o, gate and down; NULL for the linears that share them. */
static void see_hessian(void *arg, int l, int linear, const float *x, int T, int K) {
    double **H = arg;
    (void)l;
    if (H[linear]) add_moments(H[linear], x, K, x, K, T);
}

/* Replaces w [N][K]; returns how many weights are kept as outliers. */
typedef long QuantizeByHessian(const Row *row, float *w, int N, const double *H, int K);

/* The protocol of GPTQ: for each layer all Hessians from one pass of the windows over the layer as
 * it was; its linears are quantized; the next one is fed by what the quantized layer puts out.
 * Returns the share of outliers. */
static double layer_by_layer(Bench *b, const Row *row, Variant *v, QuantizeByHessian *quantize) {
    const Config *c = &v->m.config;
    const int shared[N_LINEARS] = {0, 0, 0, 3, 4, 4, 6}; // whose input a linear reads
    size_t window = (size_t)LENGTH * c->dim;
    float *x = new_floats(WINDOWS * window);
    embed(&v->m, b->calib, WINDOWS * LENGTH, x);
    double outliers = 0, weights = 0;
    for (int l = 0; l < c->n_layers; l++) {
        Layer *layer = &v->m.layers[l];
        double *H[N_LINEARS] = {0};
        for (int k = 0; k < N_LINEARS; k++)
            if (shared[k] == k)
                H[k] = allocate((size_t)layer->linears[k].K * layer->linears[k].K, sizeof(double));
        int passes = l + 1 < c->n_layers ? 2 : 1; // of the layer as it was, of the quantized one
        for (int pass = 0; pass < passes; pass++) {
            for (int w = 0; w < WINDOWS; w++) {
                memcpy(b->s->x, x + w * window, window * sizeof *x);
                variant_layer(v, b->s, l, LENGTH, pass ? NULL : see_hessian, H);
                if (pass) memcpy(x + w * window, b->s->x, window * sizeof *x);
            }
            for (int k = 0; k < N_LINEARS && !pass; k++) {
                const Linear *w = &layer->linears[k];
                outliers += quantize(row, weights_of(w), w->N, H[shared[k]], w->K);
                weights += (double)w->N * w->K;
            }
        }
        for (int k = 0; k < N_LINEARS; k++) free(H[k]);
    }
    free(x);
    return outliers / weights;
}

static long gptq_asymmetric(const Row *row, float *w, int N, const double *H, int n_columns) {
    size_t K = n_columns;
    Inverse inverse = hessian_inverse(H, K, !row->no_order);
    const int *order = inverse.order;
    int group = row->group > 0 ? row->group : n_columns;
#pragma omp parallel for schedule(dynamic)
    for (int n = 0; n < N; n++) {
        float *out = w + n * K, *v = new_floats(K);
        Range *ranges = allocate(K / group, sizeof *ranges), r = {0};
        for (size_t g = 0; g < K / group; g++) ranges[g] = range_of(out + g * group, group, row->w);
        for (size_t i = 0; i < K; i++)
            v[i] = H[order[i] * (K + 1)] == 0 ? 0 : out[order[i]]; // a dead column is zeroed
        for (size_t i = 0; i < K; i++) {
            const double *U = inverse.U + i * K;
            if (!row->group || row->fixed_groups) r = ranges[order[i] / group];
            else if (i % group == 0) r = range_of(v + i, group, row->w);
            float q = round_in(r, v[i], row->w), e = (v[i] - q) / U[i];
            out[order[i]] = q;
            for (size_t j = i + 1; j < K; j++) v[j] -= e * U[j];
        }
        free(v), free(ranges);
    }
    inverse_free(&inverse);
    return 0;
}

static void gptq_row(Bench *b, const Row *row, Variant *v) {
    layer_by_layer(b, row, v, gptq_asymmetric);
    v->bits = mean_bits(&b->m->config, row->w, row->w, row->w + 16, row->group);
}

/* ---- 6: SpQR --------------------------------------------------------------------------------- */

/* SpQR, arXiv 2306.03078: GPTQ with groups so small that their scales and zeros are quantized too;
 * a weight stays in 16 bits where ((w_i - q_i) / U_ii)^2 > t,
 *     t = threshold mean_j( var_n(W_nj) / U_jj^2 ),  what it costs against an average weight. */
enum { SET = 16 }; // rows whose scales, and zeros, are quantized together, to 3 bits

/* Its quantizer: 0 need not be in the range and z is not rounded. Skips element `without`. */
static Range plain_range(const float *x, size_t stride, int n, int bits, int without) {
    float low = INFINITY, high = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (i == without) continue;
        low = fminf(low, x[i * stride]);
        high = fmaxf(high, x[i * stride]);
    }
    if (low == high) low = -1, high = 1;
    float scale = (high - low) / ((1 << bits) - 1);
    return (Range){scale, -low / scale};
}

static float round_plainly(Range r, float x, int bits) {
    return r.scale *
           (clamp(rintf(x / fmaxf(r.scale, 1e-9f) + r.zero), 0, (1 << bits) - 1) - r.zero);
}

/* sum_j ((x^_j - x_j) / u_j)^2 of a group in which one weight is left out. */
static float group_error(const float *x, const double *u, int n, int bits, int without) {
    Range r = plain_range(x, 1, n, bits, without);
    float sum = 0;
    for (int j = 0; j < n; j++) {
        float e = j == without ? 0 : (round_plainly(r, x[j], bits) - x[j]) / (float)u[j];
        sum += e * e;
    }
    return sum;
}

/* Ranges of one group of columns x [SET][n], in two levels. Weights whose absence lowers the
 * group's error by more than t are likely outliers: the mean of the others stands for them. */
static void bilevel_ranges(const float *x, const double *u, int n, int bits, double t,
                           Range ranges[SET]) {
    for (int r = 0; r < SET; r++) {
        float kept[n], sum = 0, mean = 0;
        bool out[n];
        int count = 0;
        float base = t < INFINITY ? group_error(x + r * n, u, n, bits, -1) : 0;
        for (int j = 0; j < n; j++) {
            out[j] = t < INFINITY && base - group_error(x + r * n, u, n, bits, j) > t;
            if (!out[j]) sum += x[r * n + j], count++;
        }
        if (count) mean = sum / count;
        for (int j = 0; j < n; j++) kept[j] = out[j] ? mean : x[r * n + j];
        ranges[r] = plain_range(kept, 1, n, bits, -1);
    }
    const size_t stride = sizeof *ranges / sizeof(float);
    Range scales = plain_range(&ranges[0].scale, stride, SET, 3, -1);
    Range zeros = plain_range(&ranges[0].zero, stride, SET, 3, -1);
    for (int r = 0; r < SET; r++) {
        ranges[r].scale = round_plainly(scales, ranges[r].scale, 3);
        ranges[r].zero = round_plainly(zeros, ranges[r].zero, 3);
    }
}

/* t, from W's columns in order and u, the diagonal of U. */
static double outlier_cost(const float *w, int N, const int *order, const double *u, int n_columns,
                           double threshold) {
    size_t K = n_columns;
    double total = 0;
    for (size_t j = 0; j < K; j++) {
        double mean = 0, variance = 0;
        for (int n = 0; n < N; n++) mean += w[n * K + order[j]] / N;
        for (int n = 0; n < N; n++) variance += pow(w[n * K + order[j]] - mean, 2) / (N - 1);
        total += variance / (u[j] * u[j]) / K;
    }
    return threshold * total;
}

static long spqr(const Row *row, float *w, int N, const double *H, int n_columns) {
    size_t K = n_columns, group = row->group;
    if (N % SET || K % group) die("SpQR needs rows in sets of %d, columns in groups", SET);
    Inverse inverse = hessian_inverse(H, K, true);
    const int *order = inverse.order;
    double *u = allocate(K, sizeof *u); // the diagonal of U
    for (size_t i = 0; i < K; i++) {
        bool dead = H[order[i] * (K + 1)] == 0;
        u[i] = dead ? 1 : inverse.U[i * (K + 1)];
        for (int n = 0; n < N && dead; n++) w[n * K + order[i]] = 0;
    }
    double t = outlier_cost(w, N, order, u, K, row->threshold);
    long outliers = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : outliers)
    for (int n0 = 0; n0 < N; n0 += SET) {
        float *v = new_floats(SET * K), *x = new_floats(SET * group);
        Range ranges[SET];
        for (size_t i = 0; i < SET * K; i++) v[i] = w[n0 * K + i / K * K + order[i % K]];
        for (size_t i = 0; i < K; i++) {
            if (i % group == 0) {
                gather(v + i, SET, group, K, x);
                bilevel_ranges(x, u + i, group, row->w, t, ranges);
            }
            for (int r = 0; r < SET; r++) {
                float *v_r = v + r * K, q = round_plainly(ranges[r], v_r[i], row->w);
                float e = (v_r[i] - q) / u[i];
                if (e * e > t) q = v_r[i], e = 0, outliers++;
                w[(n0 + r) * K + order[i]] = q;
                for (size_t j = i + 1; j < K; j++) v_r[j] -= e * inverse.U[i * K + j];
            }
        }
        free(v), free(x);
    }
    free(u);
    inverse_free(&inverse);
    return outliers;
}

static void spqr_row(Bench *b, const Row *row, Variant *v) {
    double outliers = layer_by_layer(b, row, v, spqr);
    v->bits = row->w + 6.0 / row->group + 64.0 / (row->group * SET) + 32 * outliers;
}

/* ---- 7: KIVI --------------------------------------------------------------------------------- */

/* KIVI, arXiv 2402.02750: s = (max - min) / (2^b - 1),  x^ = rint((x - min) / s) s + min,  s and
 * min in 16 bits. Keys in groups of g tokens of one channel, values in groups of g channels of one
 * token; the newest tokens stay float until RESIDUAL keys are there to be rounded at once,
 * values one by one. "stream" is what decoding token by token sees; else the whole window is
 * rounded first, which is harsher, and looks ahead. */
enum { RESIDUAL = 128 };

/* A group: n numbers, `stride` apart. */
static void round_kivi(float *x, size_t stride, int n, int bits) {
    float low = x[0], high = x[0];
    for (int i = 1; i < n; i++) {
        low = fminf(low, x[i * stride]);
        high = fmaxf(high, x[i * stride]);
    }
    float scale = to_half((high - low) / ((1 << bits) - 1));
    low = to_half(low);
    for (int i = 0; i < n; i++) {
        float u = scale > 0 ? clamp((x[i * stride] - low) / scale, 0, (1 << bits) - 1) : 0;
        x[i * stride] = rintf(u) * scale + low;
    }
}

static void kivi_cache(const Config *c, State *s, const Row *row, int T) {
    int d = c->head_dim, kv_dim = c->n_kv_heads * d, bits = row->w, g = row->group,
        g_v = g < d ? g : d;
    size_t size = (size_t)T * kv_dim;
    float *keys = memcpy(new_floats(size), s->keys, size * sizeof *keys);
    float *values = memcpy(new_floats(size), s->values, size * sizeof *values);
    int n_keys = T / RESIDUAL * RESIDUAL, n_values = T < RESIDUAL || row->stream ? T : T - RESIDUAL;
#pragma omp parallel for
    for (int t = 0; t < n_keys; t += g)
        for (int i = 0; i < kv_dim; i++) round_kivi(keys + (size_t)t * kv_dim + i, kv_dim, g, bits);
#pragma omp parallel for
    for (int t = 0; t < n_values; t++)
        for (int i = 0; i < kv_dim; i += g_v)
            round_kivi(values + (size_t)t * kv_dim + i, 1, g_v, bits);
    if (!row->stream) {
        memcpy(s->keys, keys, size * sizeof *keys);
        memcpy(s->values, values, size * sizeof *values);
    }
    attend(c, s, T, NULL, 0, row->stream ? &(OldCache){keys, values, RESIDUAL} : NULL);
    free(keys), free(values);
}

static void kivi_attention(Variant *v, State *s, int l, int T) {
    project(v, s, l, T);
    turn_all(&v->m.config, s, T);
    kivi_cache(&v->m.config, s, v->row, T);
}

static void kivi(Bench *b, const Row *row, Variant *v) {
    int d = b->m->config.head_dim;
    v->attention = kivi_attention;
    v->row = row;
    v->bits = row->w + 16.0 / row->group + 16.0 / (row->group < d ? row->group : d);
}

/* ---- 8: Fisher information ------------------------------------------------------------------- */

/* F = (d loss / d x)^2, loss the mean of -log p in a window, x the keys before RoPE, and the
 * values: x and F of the first calibration windows, [n_layers][2]. arXiv 2401.18079, as KVQuant
 * needs it. */
static Sample *fisher_samples(Bench *b, const Variant *v) {
    const Config *c = &v->m.config;
    size_t n = (size_t)LENGTH * c->n_kv_heads * c->head_dim;
    Sample *samples = allocate(2 * c->n_layers, sizeof *samples);
    Trace *traces = allocate(c->n_layers, sizeof *traces);
    for (int i = 0; i < 2 * c->n_layers; i++)
        samples[i] = (Sample){new_floats(FISHER_WINDOWS * n), new_floats(FISHER_WINDOWS * n)};
    for (int l = 0; l < c->n_layers; l++) traces[l] = trace_new(c, LENGTH);
    for (int w = 0; w < FISHER_WINDOWS; w++) {
        model_backward(&v->m, b->s, b->calib + w * LENGTH, LENGTH, traces);
        for (int i = 0; i < 2 * c->n_layers; i++) {
            const Trace *t = &traces[i / 2];
            const float *gradient = i % 2 ? t->dv : t->dk;
            float *x = samples[i].x + w * n, *fisher = samples[i].fisher + w * n;
            linear(&v->m.layers[i / 2].linears[1 + i % 2], t->h1, LENGTH, x);
            for (size_t j = 0; j < n; j++) fisher[j] = gradient[j] * gradient[j];
        }
    }
    for (int l = 0; l < c->n_layers; l++) trace_free(&traces[l]);
    free(traces);
    return samples;
}

/* ---- 9: KVQuant ------------------------------------------------------------------------------ */

/* KVQuant, arXiv 2401.18079: numbers within limits [low, high], normalized to -1 .. 1, become the
 * nearest entry of a look-up table, x^ = lut_i (high - low) / 2 + (high + low) / 2, found by
 *     min over lut of sum F (y - lut(y))^2,   F = (d loss / d x)^2, the Fisher information.
 * Keys, before RoPE, have limits of each channel from calibration, values of each token, found at
 * run time; one table a layer for its keys, one for its values. The 1 % of numbers beyond the
 * limits and the first token stay as they are. */
typedef struct {
    float low, high;
} Limits;

typedef struct KvTables {
    Limits *channels; // [kv_dim] of the keys
    float lut[2][16]; // [keys, values][2^bits], ascending
} KvTables;

static const double KEPT = 0.995; // half of the outliers are at each end

static Limits limits_of(const float *sorted, int n, double kept) {
    return (Limits){quantile(sorted, n, 1 - kept), quantile(sorted, n, kept)};
}

static float normalized(Limits l, float x) {
    return (x - (l.high + l.low) / 2) / ((l.high - l.low) / 2);
}

/* The look-up table of keys, with the limits of channels, which are found first, or of values: from
 * all normalized numbers but outliers and each window's first token. */
static void fit_table(const Sample *sample, int kv_dim, int window, int windows, const Row *row,
                      Limits *channels, float *lut) {
    size_t tokens = (size_t)window * windows, n = 0;
    float(*points)[2] = allocate(tokens * kv_dim, sizeof *points), *sorted = new_floats(tokens);
    double kept = row->no_outliers ? 1 : KEPT;
    for (int i = 0; i < kv_dim && channels; i++)
        channels[i] = limits_of(sort(sample->x + i, kv_dim, tokens, sorted), tokens, kept);
    for (size_t t = 0; t < tokens; t++) {
        const float *x = sample->x + t * kv_dim;
        Limits token = {0};
        if (!channels) token = limits_of(sort(x, 1, kv_dim, sorted), kv_dim, kept);
        for (int i = 0; i < kv_dim && t % window; i++) {
            float y = normalized(channels ? channels[i] : token, x[i]);
            float weight = row->no_fisher ? 1 : sample->fisher[t * kv_dim + i];
            if (y >= -1 && y <= 1) points[n][0] = y, points[n++][1] = weight;
        }
    }
    int k = 1 << row->w;
    if (!row->uniform) k_means(points, n, k, lut);
    for (int i = 0; i < k && row->uniform; i++) lut[i] = -1 + 2.0f * i / (k - 1);
    for (int i = 0; i < kv_dim && channels; i++)
        channels[i] = (Limits){to_half(channels[i].low), to_half(channels[i].high)};
    free(points), free(sorted);
}

/* The nearest entry of lut [k], of two the lower. */
static float look_up(const float *lut, int k, Limits l, float x) {
    float y = normalized(l, x);
    int i = 0;
    while (i + 1 < k && (lut[i + 1] + lut[i]) / 2 < y) i++;
    return lut[i] * ((l.high - l.low) / 2) + (l.high + l.low) / 2;
}

/* keys, values [T][kv_dim]; returns the number of outliers. */
static long kvquant_cache(const KvTables *tables, int kv_dim, const Row *row, float *keys,
                          float *values, int T) {
    long outliers = 0;
#pragma omp parallel for reduction(+ : outliers)
    for (int t = 1; t < T; t++) {
        float *k = keys + (size_t)t * kv_dim, *v = values + (size_t)t * kv_dim, sorted[kv_dim];
        for (int i = 0; i < kv_dim; i++) {
            Limits channel = tables->channels[i];
            bool out = !row->no_outliers && (k[i] < channel.low || k[i] > channel.high);
            if (!out) k[i] = look_up(tables->lut[0], 1 << row->w, channel, k[i]);
            outliers += out;
        }
        Limits kept = limits_of(sort(v, 1, kv_dim, sorted), kv_dim, KEPT);
        Limits rest = {INFINITY, -INFINITY};
        float median = sorted[(kv_dim - 1) / 2]; // stands for outliers
        bool out[kv_dim];
        for (int i = 0; i < kv_dim; i++) {
            out[i] = !row->no_outliers && (v[i] <= kept.low || v[i] >= kept.high);
            rest.low = fminf(rest.low, out[i] ? median : v[i]);
            rest.high = fmaxf(rest.high, out[i] ? median : v[i]);
            outliers += out[i];
        }
        for (int i = 0; i < kv_dim; i++)
            if (!out[i]) v[i] = look_up(tables->lut[1], 1 << row->w, rest, v[i]);
    }
    return outliers;
}

/* Bits: 16 and 16 for an outlier's value and index, of a value 16 and 16 a token for its limits. */
static void kvquant_attention(Variant *v, State *s, int l, int T) {
    const Config *c = &v->m.config;
    int kv_dim = c->n_kv_heads * c->head_dim;
    project(v, s, l, T);
    v->outliers += kvquant_cache(&v->tables[l], kv_dim, v->row, s->keys, s->values, T);
    v->cached += 2.0 * (T - 1) * kv_dim;
    v->bits = v->row->w + 32 * v->outliers / v->cached + 16.0 / kv_dim;
    turn_all(c, s, T);
    attend(c, s, T, NULL, 0, NULL);
}

static void kvquant(Bench *b, const Row *row, Variant *v) {
    const Config *c = &v->m.config;
    int kv_dim = c->n_kv_heads * c->head_dim;
    if (!b->kv) b->kv = fisher_samples(b, v);
    v->attention = kvquant_attention;
    v->row = row;
    v->tables = allocate(c->n_layers, sizeof *v->tables);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < 2 * c->n_layers; i++) {
        KvTables *t = &v->tables[i / 2];
        if (i % 2 == 0) t->channels = allocate(kv_dim, sizeof *t->channels);
        fit_table(&b->kv[i], kv_dim, LENGTH, FISHER_WINDOWS, row, i % 2 ? NULL : t->channels,
                  t->lut[i % 2]);
    }
}

/* ---- 10: ZeroQuant's distillation ------------------------------------------------------------ */

/* ZeroQuant's layer-by-layer knowledge distillation (LKD):
 *     min over W and the norms of mean (layer(X; round(W)) - Y)^2,  dW = d round(W)
 * with X and Y of the float model; of the last layer, as its authors' followers do, or of all. */

/* Trains layer l of the float weights in v behind the quantizer: x, y [WINDOWS][LENGTH][dim] are
 * its inputs and outputs in the float model; a step sees four windows. */
static void distill(Bench *b, const Row *row, Variant *v, int l, const float *x, const float *y) {
    const Config *c = &v->m.config;
    Layer *layer = &v->m.layers[l], student = layer_float_copy(c, layer, l);
    size_t n = (size_t)LENGTH * c->dim, sizes[N_LINEARS + 2];
    Gradient g;
    float *weights[N_LINEARS + 2], (*moments[N_LINEARS + 2])[2];
    double *gradients[N_LINEARS + 2];
    for (int k = 0; k < N_LINEARS + 2; k++) {
        const Linear *w = &layer->linears[k < N_LINEARS ? k : 0];
        sizes[k] = k < N_LINEARS ? (size_t)w->N * w->K : (size_t)c->dim;
        moments[k] = allocate(sizes[k], sizeof *moments[k]);
        gradients[k] = allocate(sizes[k], sizeof(double));
        if (k < N_LINEARS) g.linears[k] = gradients[k], weights[k] = weights_of(w);
        else g.norms[k - N_LINEARS] = gradients[k];
    }
    weights[N_LINEARS] = layer->attention_norm;
    weights[N_LINEARS + 1] = layer->ffn_norm;
    Trace trace = trace_new(c, LENGTH);
    float *dx = new_floats(n);
    for (int step = 0; step < row->steps; step++) {
        for (int k = 0; k < N_LINEARS; k++)
            zeroquant_linear(c, row, k, &layer->linears[k], weights_of(&student.linears[k]));
        copy_floats(student.attention_norm, layer->attention_norm, c->dim);
        copy_floats(student.ffn_norm, layer->ffn_norm, c->dim);
        for (int k = 0; k < N_LINEARS + 2; k++) memset(gradients[k], 0, sizes[k] * sizeof(double));
        for (int i = 0; i < 4; i++) {
            size_t at = (size_t)(4 * step + i) % WINDOWS * n;
            copy_floats(trace.x, x + at, n);
            trace_layer(c, &student, b->s, LENGTH, &trace);
            for (size_t j = 0; j < n; j++) dx[j] = 2 * (b->s->x[j] - y[at + j]) / (4 * n);
            layer_backward(c, &student, b->s, &trace, LENGTH, dx, &g);
        }
        for (int k = 0; k < N_LINEARS + 2; k++)
            adamw(weights[k], gradients[k], moments[k], sizes[k], row->rate, step + 1);
    }
    for (int k = 0; k < N_LINEARS + 2; k++) free(moments[k]), free(gradients[k]);
    trace_free(&trace);
    layer_free(&student);
    free(dx);
}

static void lkd(Bench *b, const Row *row, Variant *v) {
    const Config *c = &v->m.config;
    size_t n = (size_t)LENGTH * c->dim;
    float *x = new_floats(WINDOWS * n), *y = new_floats(WINDOWS * n);
    embed(&v->m, b->calib, WINDOWS * LENGTH, x);
    for (int l = 0; l < c->n_layers; l++) {
        for (int w = 0; w < WINDOWS; w++) {
            copy_floats(b->s->x, x + w * n, n);
            variant_layer(v, b->s, l, LENGTH, NULL, NULL);
            copy_floats(y + w * n, b->s->x, n);
        }
        if (row->all_layers || l == c->n_layers - 1) distill(b, row, v, l, x, y);
        float *next = x;
        x = y, y = next;
    }
    free(x), free(y);
    zeroquant(b, row, v);
}

/* ---- 11: QQQ --------------------------------------------------------------------------------- */

/* QQQ, arXiv 2406.09904: the program itself, W4A8 in integers; bits as the file has them. */
static void qqq(Bench *b, const Row *row, Variant *v) {
    char *command;
    if (asprintf(&command,
                 "./quantize '%s' build/compare.bin -d cpu -c '%s' -n %d %s >build/compare.txt",
                 b->path, b->calibration, WINDOWS, row->options) < 0)
        die("out of memory");
    if (system(command)) die("it failed: %s", command);
    free(command);
    variant_free(v);
    v->file = checkpoint_open("build/compare.bin");
    v->loaded = model_load(v->file);
    v->m = *v->loaded;
    int group = v->m.group_size;
    double per_row = mean_bits(&v->m.config, 4, 4, 32, 0);
    v->bits = group > 0 ? per_row + mean_bits(&v->m.config, 0, 0, 8, group) : per_row;
}

/* ---- 12: the table --------------------------------------------------------------------------- */

// clang-format off
static const Row rows[] = {
    {"fp32", "-", NULL, .w = 32},
    {"rtn", "W8A8 asym linears+attention", rtn, .w = 8, .x = 8, .attention = true},
    {"rtn", "W6A6 asym linears+attention", rtn, .w = 6, .x = 6, .attention = true, .more = true},
    {"rtn", "W4A16 asym channel", rtn, .w = 4, .more = true},
    {"rtn", "W4A16 asym g128", rtn, .w = 4, .group = 128},
    {"rtn", "W3A16 asym channel", rtn, .w = 3, .more = true},
    {"rtn", "W3A16 asym g128", rtn, .w = 3, .group = 128},
    {"smoothquant", "W8A8 alpha 0.55 asym linears+attention", smoothquant, .w = 8, .x = 8, .attention = true, .alpha = .55},
    {"smoothquant", "W8A8 alpha 0.55 asym linears", smoothquant, .w = 8, .x = 8, .alpha = .55, .more = true},
    {"smoothquant", "W6A6 alpha 0.55 asym linears+attention", smoothquant, .w = 6, .x = 6, .attention = true, .alpha = .55, .more = true},
    {"smoothquant", "W8A8 alpha 0.5 sym linears (quality.csv)", smoothquant, .w = 8, .x = 8, .alpha = .5, .more = true},
    {"zeroquant", "W8A8 groups=dim", zeroquant, .w = 8, .x = 8, .more = true},
    {"zeroquant", "W4/8A16 groups=dim", zeroquant, .w = 8, .ffn_w = 4},
    {"zeroquant", "W4/8A8 groups=dim", zeroquant, .w = 8, .ffn_w = 4, .x = 8},
    {"zeroquant", "W4A4 groups=dim", zeroquant, .w = 4, .x = 4},
    {"zeroquant", "W4/8A8 g128", zeroquant, .w = 8, .ffn_w = 4, .x = 8, .group = 128, .more = true},
    {"kivi", "KV4 g32 R128 prefill", kivi, .w = 4, .group = 32, .more = true},
    {"kivi", "KV4 g32 R128 stream", kivi, .w = 4, .group = 32, .stream = true},
    {"kivi", "KV4 g128 R128 prefill", kivi, .w = 4, .group = 128, .more = true},
    {"kivi", "KV4 g128 R128 stream", kivi, .w = 4, .group = 128, .stream = true, .more = true},
    {"kivi", "KV2 g32 R128 prefill", kivi, .w = 2, .group = 32},
    {"kivi", "KV2 g32 R128 stream", kivi, .w = 2, .group = 32, .stream = true},
    {"kivi", "KV2 g128 R128 prefill", kivi, .w = 2, .group = 128, .more = true},
    {"kivi", "KV2 g128 R128 stream", kivi, .w = 2, .group = 128, .stream = true, .more = true},
    {"kvquant", "nuq4-1% sink1", kvquant, .w = 4},
    {"kvquant", "nuq3-1% sink1", kvquant, .w = 3, .more = true},
    {"kvquant", "nuq2-1% sink1", kvquant, .w = 2},
    {"kvquant", "nuq2-1% sink1 no Fisher", kvquant, .w = 2, .no_fisher = true, .more = true},
    {"kvquant", "nuq2-0% sink1", kvquant, .w = 2, .no_outliers = true, .more = true},
    {"kvquant", "int2-1% sink1 (uniform)", kvquant, .w = 2, .uniform = true, .more = true},
    {"lut-gemm", "BCQ4 channel alternating 30", lut_gemm, .w = 4, .rounds = 30, .more = true},
    {"lut-gemm", "BCQ4 g128 alternating 30", lut_gemm, .w = 4, .group = 128, .rounds = 30},
    {"lut-gemm", "BCQ4 g128 greedy", lut_gemm, .w = 4, .group = 128, .more = true},
    {"lut-gemm", "BCQ4 g128 refined greedy", lut_gemm, .w = 4, .group = 128, .rounds = 1, .more = true},
    {"lut-gemm", "BCQ4 g128 alternating 30 +offset (extension)", lut_gemm, .w = 4, .group = 128, .rounds = 30, .offset = true, .more = true},
    {"lut-gemm", "BCQ3 channel alternating 30", lut_gemm, .w = 3, .rounds = 30, .more = true},
    {"lut-gemm", "BCQ3 g128 alternating 30", lut_gemm, .w = 3, .group = 128, .rounds = 30},
    {"lut-gemm", "BCQ3 g128 greedy", lut_gemm, .w = 3, .group = 128, .more = true},
    {"lut-gemm", "BCQ3 g128 refined greedy", lut_gemm, .w = 3, .group = 128, .rounds = 1, .more = true},
    {"lut-gemm", "BCQ3 g128 alternating 30 +offset (extension)", lut_gemm, .w = 3, .group = 128, .rounds = 30, .offset = true, .more = true},
    {"gptq", "W4A16 channel act-order", gptq_row, .w = 4, .more = true},
    {"gptq", "W4A16 g128 act-order", gptq_row, .w = 4, .group = 128},
    {"gptq", "W4A16 g128 act-order static", gptq_row, .w = 4, .group = 128, .fixed_groups = true, .more = true},
    {"gptq", "W3A16 channel act-order", gptq_row, .w = 3, .more = true},
    {"gptq", "W3A16 g128 act-order", gptq_row, .w = 3, .group = 128},
    {"gptq", "W3A16 channel no act-order", gptq_row, .w = 3, .no_order = true, .more = true},
    {"spqr", "w3 g16 qq3/16 threshold 0.25", spqr_row, .w = 3, .group = 16, .threshold = .25},
    {"spqr", "w2 g32 qq3/16 threshold 0.5", spqr_row, .w = 2, .group = 32, .threshold = .5},
    {"spqr", "w3 g16 qq3/16 no outliers", spqr_row, .w = 3, .group = 16, .threshold = INFINITY, .more = true},
    {"zeroquant", "W4/8A16 LKD last layer 600 steps lr 5e-6", lkd, .w = 8, .ffn_w = 4, .steps = 600, .rate = 5e-6, .more = true},
    {"zeroquant", "W4/8A16 LKD every layer 100 steps lr 1e-4", lkd, .w = 8, .ffn_w = 4, .steps = 100, .rate = 1e-4, .all_layers = true, .more = true},
    {"qqq", "W4A8 channel to nearest", qqq, .options = "-g -1 -b rtn -r 0 -a 0 -m 0", .more = true},
    {"qqq", "W4A8 channel +GPTQ", qqq, .options = "-g -1 -r 0 -a 0 -m 0", .more = true},
    {"qqq", "W4A8 channel +GPTQ +ranges", qqq, .options = "-g -1 -r 0 -a 0", .more = true},
    {"qqq", "W4A8 channel +GPTQ +ranges +smoothing", qqq, .options = "-g -1 -r 0", .more = true},
    {"qqq", "W4A8 channel +GPTQ +ranges +rotation +smoothing", qqq, .options = "-g -1"},
    {"qqq", "W4A8 g128 to nearest", qqq, .options = "-b rtn -r 0 -a 0 -m 0", .more = true},
    {"qqq", "W4A8 g128 +GPTQ", qqq, .options = "-r 0 -a 0 -m 0", .more = true},
    {"qqq", "W4A8 g128 +GPTQ +ranges", qqq, .options = "-r 0 -a 0", .more = true},
    {"qqq", "W4A8 g128 +GPTQ +ranges +smoothing", qqq, .options = "-r 0", .more = true},
    {"qqq", "W4A8 g128 +GPTQ +ranges +rotation +smoothing", qqq, .options = ""}};
// clang-format on

static const char usage[] =
    "usage: neighbours [MODEL] [options], from the repository's root; a CSV to stdout\n"
    "  -a         all rows, also those that `make compare` leaves out for time\n"
    "  -r TEXT    of them, those whose \"method setting\" contains TEXT; may be repeated\n"
    "  -n N       evaluate on N windows of 2048 only (0: all)\n"
    "  -p SEED    perturb each weight by up to one in a million, to see what a row's digits mean\n"
    "  -c FILE, -e FILE  calibration and evaluation text (data/calib.txt, data/eval.txt)\n"
    "  -v PREFIX  also PREFIX-linears.csv and PREFIX-channels.csv: every linear, what changed\n";

static FILE *analysis_file(const char *prefix, const char *name, const char *columns) {
    char *path;
    if (asprintf(&path, "%s-%s.csv", prefix, name) < 0) die("out of memory");
    FILE *file = fopen(path, "w");
    if (!file) die("%s: cannot be written", path);
    fprintf(file, "method,setting,layer,linear,%s\n", columns);
    free(path);
    return file;
}

static void run_row(Bench *b, const Row *row) {
    double start = seconds(), cpu_start = cpu_seconds();
    Variant v = variant_new(b->m, b->perturb);
    if (row->apply) row->apply(b, row, &v);
    double loss = 0;
    for (int w = 0; w < b->windows; w++)
        loss += variant_loss(&v, b->s, b->eval + (size_t)w * LENGTH, LENGTH) / b->windows;
    printf("%s,%s,%.3f,%.4f,%.1f,%.1f\n", row->method, row->setting, v.bits, exp(loss),
           seconds() - start, cpu_seconds() - cpu_start);
    fflush(stdout);
    if (b->linears) {
        char name[160];
        snprintf(name, sizeof name, "%s,%s", row->method, row->setting);
        Variant original = variant_new(b->m, b->perturb);
        analyze(&original, &v, b->s, b->eval, LENGTH, name, b->linears, b->channels);
        variant_free(&original);
    }
    for (int l = 0; l < v.m.config.n_layers && v.tables; l++) free(v.tables[l].channels);
    free(v.tables);
    variant_free(&v);
}

int main(int argc, char **argv) {
    Bench b = {.path = "data/tiny", .calibration = "data/calib.txt", .eval_path = "data/eval.txt"};
    const char *wanted[64], *prefix = NULL;
    int n_wanted = 0, max_windows = 0, n;
    bool all = false;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-') {
            b.path = argv[i];
            continue;
        }
        char flag = argv[i][1];
        const char *value = flag == 'a' ? "" : argv[++i];
        if (!flag || !strchr("arnpcev", flag) || !value || n_wanted == 64)
            return fputs(usage, stderr), 2;
        if (flag == 'a') all = true;
        if (flag == 'r') wanted[n_wanted++] = value;
        if (flag == 'n') max_windows = parse_integer(flag, value, 0, 1 << 20);
        if (flag == 'p') b.perturb = parse_integer(flag, value, 0, 1 << 30);
        if (flag == 'c') b.calibration = value;
        if (flag == 'e') b.eval_path = value;
        if (flag == 'v') prefix = value;
    }
    Checkpoint *file = checkpoint_open(b.path);
    Model *m = model_load(file);
    if (m->group_size) die("%s: it is quantized already", b.path);
    b.m = m;
    b.calib = text_tokens(file, m->config.bos, b.calibration, &n);
    if (n < WINDOWS * LENGTH) die("%s: not %d windows of %d", b.calibration, WINDOWS, LENGTH);
    b.eval = text_tokens(file, m->config.bos, b.eval_path, &n);
    if (n < LENGTH) die("%s: no window of %d", b.eval_path, LENGTH);
    b.windows = max_windows && max_windows < n / LENGTH ? max_windows : n / LENGTH;
    Config one_layer = m->config;
    one_layer.n_layers = 1;
    b.s = state_new(&one_layer, LENGTH, LENGTH, 16);
    if (prefix) {
        b.linears = analysis_file(prefix, "linears",
                                  "x_sqnr_db,x_mse,w_sqnr_db,w_mse,y_sqnr_db,y_mse,x_kurtosis,"
                                  "w_kurtosis");
        b.channels = analysis_file(prefix, "channels",
                                   "channel,x_max_before,x_max_after,w_max_before,w_max_after");
    }
    printf("method,setting,bits,ppl,seconds,cpu_seconds\n");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[160];
        snprintf(name, sizeof name, "%s %s", rows[i].method, rows[i].setting);
        bool run = all || !rows[i].more;
        for (int j = 0; j < n_wanted; j++)
            if ((run = strstr(name, wanted[j]))) break;
        if (run) run_row(&b, &rows[i]);
    }
    if (prefix && (fclose(b.linears) || fclose(b.channels))) die("%s: not written", prefix);
    for (int i = 0; i < 2 * m->config.n_layers && b.kv; i++) free(b.kv[i].x), free(b.kv[i].fisher);
    free(b.kv), free(b.input_max), free(b.calib), free(b.eval);
    state_free(b.s);
    model_free(m);
    checkpoint_close(file);
    return 0;
}
