/* Variants of a model, for methods to compare: the forward pass with what a method does at run
 * time, and the backward pass of a layer, for methods that train or weigh by gradients. */
#ifndef VARIANT_H
#define VARIANT_H

#include "../../qqq.h"

/* Rounds x [n] in place to what `bits` hold, all with one scale. */
typedef void RoundRow(float *x, int n, int bits);

/* A model with other weights and, at run time, rounded activations or another attention. */
typedef struct Variant Variant;
struct Variant {
    Model m;           // its layers are the variant's own, all else the original's
    RoundRow *round_x; // each linear's input, a row a token; NULL: float
    int x_bits;
    // What attention_block() does otherwise, for layer l and s->xb [T][dim]; NULL: nothing else.
    void (*attention)(Variant *v, State *s, int l, int T);
    const struct Row *row;   // what the methods in neighbours.c keep there
    struct KvTables *tables; // [n_layers]
    Model *loaded;           // QQQ's: m is a copy of it, and its layers are its own
    Checkpoint *file;
    double bits;             // of a weight of the linears, or of an element of the KV cache
    double outliers, cached; // elements of the KV cache, met so far
};

/* Of all threads, and of the programs that ended: what a row costs on a machine that does other
 * things too. */
double cpu_seconds(void);

float *new_floats(size_t n);
void copy_floats(float *to, const float *from, size_t n);

/* The weights of a variant's linear [N][K], to be changed. */
float *weights_of(const Linear *l);

/* A layer's weights as F32 and its norms, to be changed; `index` is its number. */
Layer layer_float_copy(const Config *c, const Layer *layer, int index);

/* invert_hessian() of H [K][K] on the CPU; inverse_free() releases the result. */
Inverse hessian_inverse(const double *H, int K, bool act_order);
void inverse_free(Inverse *inverse);

/* F32 copies of all layers; with a seed each weight is multiplied by 1 +- 1e-6 at most. */
Variant variant_new(const Model *m, uint64_t seed);
void variant_free(Variant *v);

float clamp(float x, float low, float high);

/* The asymmetric quantizer of all methods that name no other one:
 *     lo = min(0, min x), hi = max(0, max x), s = (hi - lo) / (2^b - 1), z = rint(-lo / s),
 *     u = clamp(rint(x / s) + z, 0, 2^b - 1),  x^ = s (u - z) */
typedef struct {
    float scale, zero;
} Range;

Range range_of(const float *x, int n, int bits);
float round_in(Range r, float x, int bits);
void round_asymmetric(float *x, int n, int bits);

/* Each of the rows [n_rows][n] by itself. */
void round_rows(RoundRow *round, float *x, size_t n_rows, int n, int bits);

/* x [n], `stride` floats apart, ascending in sorted [n], which is returned; and the quantile of
 * such numbers, interpolated. */
const float *sort(const float *x, size_t stride, int n, float *sorted);
float quantile(const float *sorted, int n, double q);

/* Weighted k-means on a line, for at most 16 centers, ascending [k]: points [n][2], value and
 * weight, are sorted. It starts from the (i + 1/2) / k quantiles and ends after 50 rounds. */
void k_means(float (*points)[2], size_t n, int k, float *centers);

/* x [T][dim] of tokens [T]. */
void embed(const Model *m, const int *tokens, int T, float *x);

/* Sees the unquantized input x [T][K] of a linear of layer l. */
typedef void Tap(void *arg, int l, int linear, const float *x, int T, int K);

/* layer_forward() of a variant, for T tokens from position 0; the state needs one layer. The tap
 * may be NULL. */
void variant_layer(Variant *v, State *s, int l, int T, Tap *tap, void *arg);

/* The mean of -log p of tokens 1 .. T - 1, from the last layer's output in s->x, which is replaced
 * by the final norm's. dx [T][dim] gets the gradient with respect to that, unless it is NULL. */
double output_loss(const Model *m, State *s, const int *tokens, int T, float *dx);

/* The same of a whole forward pass. */
double variant_loss(Variant *v, State *s, const int *tokens, int T);

/* y [M][N] = x [M][K] w [N][K]^T */
void product(const float *x, int M, const float *w, int N, int K, float *y);

/* y [columns][rows] = x^T, rows of x `stride` floats apart. */
void transpose(const float *x, int rows, int columns, size_t stride, float *y);

/* y [rows][columns] = part of x, whose rows are `stride` floats apart. */
void gather(const float *x, int rows, int columns, size_t stride, float *y);

/* The start of attention_block(): q, k and v [T][...] of s->xb; then RoPE of q and k. */
void project(const Variant *v, State *s, int l, int T);
void turn_all(const Config *c, State *s, int T);

/* The older part of a KV cache, which may be rounded: [T][kv_dim] each. Query t sees these keys
 * i < residual floor(t / residual) and these values i < t - residual. */
typedef struct {
    const float *keys, *values;
    int residual;
} OldCache;

/* s->att = attention of s->q over s->keys and s->values, as attention_block() does it, with rows of
 * probabilities rounded to p_bits unless round_p is NULL; old may be NULL. */
void attend(const Config *c, State *s, int T, RoundRow *round_p, int p_bits, const OldCache *old);

/* What the backward pass needs of the forward pass of one layer, [T][...]. */
typedef struct {
    float *x, *h1, *q, *k, *v, *att;  // input, normed, q and k after RoPE, attention's output
    float *x2, *h2, *gate, *up, *act; // after attention, normed, silu(gate) up
    float *dk, *dv;                   // [T][kv_dim] the gradient of k before RoPE, and of v
} Trace;

/* The gradient of a layer's weights, summed over calls. */
typedef struct {
    double *linears[N_LINEARS]; // [N][K]
    double *norms[2];           // [dim]
} Gradient;

Trace trace_new(const Config *c, size_t T);
void trace_free(Trace *t);

/* layer_forward() on t->x [T][dim]; the output is in s->x. */
void trace_layer(const Config *c, const Layer *layer, State *s, int T, Trace *t);

/* dx [T][dim], the gradient of the layer's output, becomes that of its input; g may be NULL. */
void layer_backward(const Config *c, const Layer *layer, const State *s, Trace *t, int T, float *dx,
                    Gradient *g);

/* A model's forward pass and that of the gradient of its loss: a trace for each layer. */
void model_backward(const Model *m, State *s, const int *tokens, int T, Trace *traces);

/* The same of rmsnorm(), added to dx [T][dim] and dw [dim], which may be NULL. */
void norm_backward(const float *x, const float *w, const float *dy, int T, int dim, float eps,
                   float *dx, double *dw);

/* A step of AdamW, arXiv 1711.05101, on w [n] with its moments [n][2]; steps count from 1. */
void adamw(float *w, const double *gradient, float (*moments)[2], size_t n, double rate, int step);

/* Compares the variant with the original on a window of T tokens, as CSV: a line for each linear,
 * of its input x, its weights w and its output y; and one for each input channel of q, gate and
 * down, without the first token, which smoothing leaves out too. Smoothing and rotation change x
 * and w by design: there only y tells the error. */
void analyze(Variant *original, Variant *v, State *s, const int *tokens, int T, const char *name,
             FILE *linears, FILE *channels);

#endif
