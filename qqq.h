/* QQQ in C: LLaMA 3.1, W4A8 quantization and its kernels.
 *
 * This header is the table of contents: the structs with shapes and units, then every public
 * function, grouped by the file and section that defines it. Read it first.
 *
 *   qqq.c        1 the model · 2 the numbers · 3 the method · 4 the same, faster · 5 a model from
 *                its files · 6 small things
 *   tokenizer.c  byte-level BPE
 *   kernels.cu   on the GPU: 1 forward pass · 2 W4A8 GEMM · 3 small kernels · 4 attention ·
 *                5 quantization · 6 weights, buffers, the engine · 7 the GEMM on Hopper
 *
 * Conventions. Matrices are row-major and a shape stands beside each: w [N][K] has N rows of K.
 * A linear layer is y = x W^T with x [T][K], W [N][K], y [T][N]; T counts tokens, N output
 * channels, K input channels. Unless its comment says otherwise, a function that cannot do its
 * work (bad file, no memory) ends the program through die(): one line, status 1, no half file. */
#ifndef QQQ_H
#define QQQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- qqq.c 1: the model --------------------------------------------------------------------- */

/* The keys of config.json that a LLaMA needs. */
typedef struct {
    int dim;         // hidden_size, D
    int hidden_dim;  // intermediate_size
    int n_layers;    // num_hidden_layers
    int n_heads;     // num_attention_heads
    int n_kv_heads;  // num_key_value_heads
    int head_dim;    // hidden_size / num_attention_heads if not given
    int vocab_size;  // rows of embedding and lm_head
    int max_context; // max_position_embeddings
    float norm_eps;  // rms_norm_eps
    double rope_theta;
    double rope_factor; // rope_scaling of type llama3; 0: no scaling
    double rope_low_freq_factor;
    double rope_high_freq_factor;
    double rope_original_context; // original_max_position_embeddings
    bool tied;                    // lm_head is the embedding
    int bos;                      // -1: none
    int eos[16];                  // [n_eos] generation stops at any of them
    int n_eos;
    float temperature, top_p; // generation_config.json's, -1: none
} Config;

/* Element types that a model may need. */
typedef enum { F32, F16, BF16, U8, I8, I32, I64 } DType;

/* The weights of y = x W^T, W [N][K]. There are three kinds: floats of 16 or 32 bits in w; W4A8 in
 * qweight, s_channel and s_group; for lm_head also int8 in w with s_channel. linear_free() releases
 * the arrays; but if `mapped`, all except s_channel belong to the model file and are read-only. */
typedef struct {
    int N, K;
    DType dtype;      // F32, F16, BF16 or I8: of w; U8: W4A8
    bool mapped;      // the arrays lie in a Checkpoint
    void *w;          // [N][K], at any alignment; NULL if W4A8
    uint8_t *qweight; // [N][K/2] codes u = q + 8, even column in the low nibble
    float *s_channel; // [N]
    uint8_t *s_group; // [N][K/128] in 1..15, NULL per channel
} Linear;

enum { GROUP = 128, N_LINEARS = 7 };

typedef struct {
    float *attention_norm; // [dim] input_layernorm; owns both norms: they are one piece
    float *ffn_norm;       // [dim] post_attention_layernorm, behind it
    union {
        Linear linears[N_LINEARS]; // in this order:
        struct {
            Linear q, k, v;  // [n_heads * head_dim][dim], [n_kv_heads * head_dim][dim] twice
            Linear o;        // [dim][n_heads * head_dim]
            Linear gate, up; // [hidden_dim][dim]
            Linear down;     // [dim][hidden_dim]
        };
    };
} Layer;

/* "self_attn.q_proj" and so on, in the order of Layer.linears; their shapes. */
extern const char *const linear_names[N_LINEARS];
void linear_shape(const Config *c, int k, int *N, int *K);

typedef struct {
    Config config;
    Linear embedding; // [vocab_size][dim], rows are looked up
    Layer *layers;    // [n_layers]
    float *norm;      // [dim] final norm
    Linear lm_head;   // [vocab_size][dim], maybe int8; the same as the embedding if config.tied
    int group_size;   // 0 unquantized, -1 W4A8 per channel, 128 W4A8 per group
} Model;

void model_free(Model *m);

/* Bytes of all weights that one token reads (an embedding row counts as one). */
size_t model_bytes(const Model *m);

/* Buffers of one sequence, float32, and its KV cache. */
typedef struct {
    int context;    // positions that the KV cache holds
    int max_T;      // most tokens that one call accepts
    int kv_bits;    // per number in the KV cache: 8, or 16, which are floats here
    float *x;       // [max_T][dim] residual stream; after forward(): normed, ready for lm_head
    float *xb;      // [max_T][dim] normed, or a linear's output to be added to x
    float *q;       // [max_T][n_heads * head_dim]
    float *keys;    // [max_T][n_kv_heads * head_dim] of the tokens at work
    float *values;  // [max_T][n_kv_heads * head_dim]
    float *att;     // [max_T][n_heads * head_dim] output of attention
    float *gate;    // [max_T][hidden_dim]
    float *up;      // [max_T][hidden_dim]
    uint8_t *cache; // [n_layers][2][n_kv_heads][context][kv_row_bytes()] keys, values
    float *rope;    // [context][head_dim / 2][2] cos and sin
    float *logits;  // [LOGIT_ROWS][vocab_size]
} State;

enum { LOGIT_ROWS = 64 };

/* Buffers for `context` positions, at most max_T tokens per call, a KV cache of 16 or 8 bits. Its
 * rows, a key or value of one head and position each, have kv_row_bytes(). */
State *state_new(const Config *c, int context, int max_T, int kv_bits);
void state_free(State *s);
size_t kv_row_bytes(const Config *c, int kv_bits);

/* Runs T tokens at positions pos .. pos + T - 1 through the model: T <= max_T, pos + T <= context;
 * earlier positions are in the KV cache. Leaves the final norm's output in s->x [T][dim]. */
void forward(const Model *m, State *s, const int *tokens, int T, int pos);

/* Logits [n][vocab_size] of tokens first .. first + n - 1 of the last forward(), n <= LOGIT_ROWS;
 * in s->logits until the next call. */
const float *logits(const Model *m, State *s, int first, int n);

/* One layer of forward(): the layer's output replaces s->x [T][dim]; `l` is its index in the KV
 * cache. The parts of a layer: attention_block() turns s->xb into s->att, the input of o.
 * ffn_block() turns s->xb into s->gate, the input of down. add_linear() is x [T][N] += in [T][K]
 * W^T by way of buffer [T][N]. */
void layer_forward(const Config *c, const Layer *layer, State *s, int l, int T, int pos);
void attention_block(const Config *c, const Layer *layer, State *s, int l, int T, int pos);
void ffn_block(const Config *c, const Layer *layer, State *s, int T);
void add_linear(const Linear *w, const float *in, int T, float *buffer, float *x);

/* s->att [T][n_heads][head_dim] = softmax(q K^T / sqrt(head_dim)) V of layer l, over the cache. */
void attention(const Config *c, State *s, int l, int T, int pos);

/* True: attention() and the linear layers run as sections 1 and 2 of qqq.c write them. False, which
 * is the default: section 4 computes the same, faster; if use_amx is true (default), by AMX too. */
extern bool textbook, use_amx;

/* y_i = x_i / sqrt(mean(x^2) + eps) * weight_i for each row; x, y [T][dim], may be the same. */
void rmsnorm(const float *x, const float *weight, int T, int dim, float eps, float *y);

/* Angles of LLaMA 3's rotary embedding in double: cos and sin of position pos, [head_dim/2][2]. */
void rope_angles(const Config *c, int pos, float *cos_sin);

/* The first of the largest of logits [n]; -1 if one of them is NaN or infinite. */
int argmax(const float *logits, int n);

/* The loss of a token, given the logits [n] after the tokens before it. */
typedef struct {
    double nll;     // -log p, p the token's softmax
    bool likeliest; // no logit is larger
} Score;

Score score(const float *logits, int n, int token);

/* ---- the engine: a model at work, on the CPU (qqq.c) or the GPU (kernels.cu) ----------------- */

/* A model that runs. After start() it holds n_sequences sequences side by side, each with a KV
 * cache of `context` positions. The arrays that it returns are valid until its next call. A
 * sequence that goes on at an earlier position forgets what came after that position. */
typedef struct Engine Engine;
struct Engine {
    const Model *model;
    bool on_gpu;
    int kv_bits;                     // of the KV cache
    size_t weight_bytes, step_bytes; // memory of the weights; bytes of them that a step reads
    size_t position_bytes;           // KV cache of one position of one sequence
    int n_sequences, context;        // of the last start()
    size_t state_bytes;              // memory beside the weights: all on the GPU, else the cache

    // The first call; later calls begin anew in other sizes. Too little memory ends the program.
    // fits() tells beforehand whether there is enough; it sets state_bytes and undoes start().
    // The CPU runs one sequence.
    void (*start)(Engine *e, int n_sequences, int context);
    bool (*fits)(Engine *e, int n_sequences, int context);

    // Runs tokens [n], n >= 1, of one sequence at positions pos .. pos + n - 1.
    void (*feed)(Engine *e, int sequence, const int *tokens, int n, int pos);

    // Runs one more token of each sequence: tokens [n_sequences] at positions [n_sequences]. If
    // both are NULL, it runs the token that the call before chose, at the next position. On the GPU
    // it returns before the work is done.
    void (*step)(Engine *e, const int *tokens, const int *positions);

    // After feed() or step(): the likeliest next token of each sequence [n_sequences], by argmax();
    // the logits, [vocab_size] after feed(), [n_sequences][vocab_size] after step().
    const int *(*chosen)(Engine *e);
    const float *(*logits)(Engine *e);

    // Does the same as feed() and sets scores [n]: score i is that of targets[i] as the token after
    // tokens[i]. chosen() and logits() have no meaning afterwards.
    void (*score)(Engine *e, int sequence, const int *tokens, const int *targets, int n, int pos,
                  Score *scores);

    double (*bandwidth)(void); // bytes per second of the memory that it reads, measured
    void (*free)(Engine *e);
};

/* Chooses where a model runs, W4A8 or in 16 bits, as -d asks. ANY: on the GPU if there is one that
 * can run the model, else on the CPU. CUDA ends the program if there is none. where [size] becomes
 * the answer in words: "the CPU: found no GPU". */
typedef enum { ANY, CPU, CUDA } Device;
bool choose_gpu(Device device, const Config *c, bool w4a8, char *where, size_t size);

/* An engine for a model, which must outlive it. kv_bits: 16 (on the CPU floats) or 8; others end
 * the program. e->free(e) releases it. */
Engine *engine_new(const Model *m, bool on_gpu, int kv_bits);

/* Perplexity of tokens [n] in consecutive windows of `length` (the last, shorter one is left out):
 * exp of the mean over windows of the mean negative log-likelihood of the length - 1 tokens after
 * the first. `error` is its standard error, from the spread over windows (NaN with one). */
typedef struct {
    double mean, error; // NaN if there is no window
    int windows;
} Perplexity;

/* At most max_windows are run (0: all). progress(done, total), if not NULL, is called after each.
 * It starts the engine. */
Perplexity perplexity(Engine *e, const int *tokens, int n, int length, int max_windows,
                      void (*progress)(int done, int total));

/* ---- qqq.c 2: the numbers of W4A8 ------------------------------------------------------------ */

/* Quantizes one token's activations x [K] to a [K] and returns s_a: x = a s_a. A row of zeros gives
 * s_a = 0; one with NaN or infinity s_a = NaN, so that it shows in the output. */
float quantize_row(const float *x, int K, int8_t *a);

/* q [K] in -8..7 to qweight [K/2] and back. */
void pack_row(const int8_t *q, int K, uint8_t *qweight);
void unpack_row(const uint8_t *qweight, int K, int8_t *q);

/* The float weights w [K] that row n of a quantized linear stands for. */
void dequantize_row(const Linear *l, int n, float *w);

/* Float weights w [N][K] as int8 rows, q and s_channel as quantize_row() makes them of a token. */
Linear quantize_bytes(const Linear *w);

/* An empty quantized linear; and the end of any linear. */
Linear quantized_new(int N, int K, int group_size);
void linear_free(Linear *l);

/* y [T][N] = x [T][K] W^T; a quantized linear quantizes x per token first. linears(): the same for
 * w [n] of one kind, which share their input; y[i] [T][N_i]. */
void linear(const Linear *w, const float *x, int T, float *y);
void linears(const Linear *w, int n, const float *x, int T, float *const *y);

/* ---- qqq.c 3: the method -------------------------------------------------------------------- */

/* What is done to a layer. */
typedef struct {
    int group_size;                                        // 128, or -1: per channel
    bool smooth;                                           // step 2
    bool mse;                                              // ranges of least error, not max|w|
    bool gptq, act_order;                                  // steps 4 and 5, or only rounding
    const int8_t *signs;                                   // [dim] of the rotation, NULL: none
    void (*progress)(int layer, int linear, int n_layers); // at work on it; NULL: none
} Method;

/* The inputs that smoothing scales: of q, k, v; of gate and up; of down. The input of o is not
 * smoothed: one v serves several query heads, so its channels could not have scales of their own.
 */
typedef enum { SMOOTH_QKV, SMOOTH_GATE_UP, SMOOTH_DOWN, N_SMOOTHED } SmoothedInput;

/* What quantizing a layer reports. */
typedef struct {
    float t; // threshold
    int n;   // channels above it
} Smoothing;

typedef struct {
    double before, after; // relative output error, rounded to nearest and in the end
} Errors;

/* A machine computes and has memory: the CPU, or a GPU. */
typedef struct Machine Machine;

/* A matrix of sums over tokens: double on the CPU, float on a GPU. */
typedef struct Sums Sums;

/* What a machine is started for. */
typedef struct {
    Config config;
    int group_size; // as in Method
    int length;     // tokens per window; 0: nothing needs calibration
    int T;          // tokens of a chunk: whole windows that go through a layer together
    int searched;   // tokens of the sample for smoothing
} Workload;

/* The tokens that the search for smoothing looks at: n of those that are not the first token of
 * their window, every stride-th. */
typedef struct {
    int length, stride, n;
} Sampling;

/* (H + damping)^-1 = U^T U, its rows and columns in the order of `order`. */
typedef struct {
    int K;
    int *order; // [K] columns of H
    double *U;  // [K][K] upper triangular
} Inverse;

/* The operations of the method. Its driver, quantize_layer() and everything below it, is written
 * once over this table; the CPU has the operations as loops in qqq.c, a GPU as kernels in
 * kernels.cu. All arrays lie in the machine's memory, where only operations read them, unless a
 * comment says "host". What an operation sets is its last argument. */
typedef struct {
    const char *memory; // "GPU memory"; NULL: memory is not planned
    size_t sum_bytes;   // of an element of Sums
    int chunk_tokens;   // of a chunk of several windows, at most

    // The machine: bytes that are free, that start() needs (both NULL if memory is not planned),
    // and start() itself; arrays of zeros, in the machine's memory or the host's, which stop()
    // releases; copies in any direction.
    size_t (*free_bytes)(void);
    size_t (*start_bytes)(const Workload *w);
    Machine *(*start)(const Workload *w);
    void (*stop)(Machine *m);
    void *(*array)(Machine *m, size_t bytes, bool on_host);
    void (*copy)(Machine *m, void *to, const void *from, size_t bytes);
    void (*zero)(Machine *m, void *array, size_t bytes);

    // w [N][K] = the float weights of a linear in the mapped file; false: NaN or infinity
    bool (*read)(Machine *m, const Linear *from, float *w);

    // Each block of n input channels of w [N][K] becomes w_block R, R = diag(signs) H_n / sqrt(n);
    // of n output channels R^T w_block. signs [n]; NULL: all +1
    void (*rotate)(Machine *m, int N, int K, int n, bool outputs, const int8_t *signs, float *w);
    // w [N][K] <- diag(rows)^-1 w diag(columns); NULL: ones
    void (*scale)(Machine *m, int N, int K, const float *columns, const float *rows, float *w);

    // y [T][dim] = rmsnorm(x); with `int8` each row is rounded to 127 steps, as quantize_row() does
    void (*norm)(Machine *m, const float *x, const float *weight, int T, bool int8, float *y);
    // y [T][K] = the input of o (of down, if ffn), from the residual stream x [T][dim]; of a W4A8
    // layer rounded to int8 as above
    void (*inside)(Machine *m, const Layer *layer, bool ffn, const float *x, int T, float *y);
    // x [T][N] += in [T][K] W^T, float or W4A8
    void (*add_linear)(Machine *m, const Linear *w, const float *in, int T, float *x);
    // difference [n] = a - b
    void (*subtract)(Machine *m, const float *a, const float *b, size_t n, float *difference);

    // Maxima and sample of x [T][K], which are tokens first .. first + T - 1: max [K] of the
    // magnitudes so far, and the rows [n][K] of the sample
    void (*observe)(Machine *m, const float *x, int T, int K, int first, Sampling sample,
                    float *max, float *rows);
    // |Y' - Y|^2 for Y [T][N] = X W^T in float and Y' = (X diag(s)^-1) (W diag(s))^T in W4A8,
    // rounded to nearest under searched ranges; x [T][K], s [K]
    double (*smoothed_distance)(Machine *m, const Linear *w, const float *x, int T, const float *s,
                                const float *y);

    // H [K][K] += x^T x, M [N][K] += d^T x for x [T][K], d [T][N]; M may be NULL. Of H the part
    // above the diagonal is enough: complete() sets the rest, and diagonal [K] on the host
    void (*add_moments)(Machine *m, const float *x, int K, const float *d, int N, int T, Sums *H,
                        Sums *M);
    void (*complete)(Machine *m, int K, Sums *H, double *diagonal);
    // U of inverse, in its order, for H + damping I, where zeros on the diagonal become `dead`;
    // and the diagonal [K] of U on the host. False: H is not positive definite
    bool (*invert)(Machine *m, const Sums *H, double dead, double damping, Inverse *inverse,
                   double *diagonal);

    // l = w rounded to nearest, codes as in a file, under ranges that importance [K] weighs
    // (NULL: max|w|)
    void (*round_to_nearest)(Machine *m, const float *w, const float *importance, Linear *l);
    // target [N][K] = w + 1/2 M (H + damping)^-1 for M [N][K]; or for M = w C, C [K][K]
    void (*correct)(Machine *m, const float *w, int N, const Sums *C, const Sums *M,
                    const Inverse *inverse, float *target);
    // l = w rounded column by column in the order of `inverse`, errors compensated
    void (*gptq)(Machine *m, const float *w, const Inverse *inverse, const float *importance,
                 Linear *l);
    // sqrt(tr(E H E^T) / tr(W H W^T)), E the quantized minus the float weights
    double (*relative_error)(Machine *m, const float *w, const Linear *l, const Sums *H);
    // l, as in a file, into a W4A8 layer's linear, as the machine multiplies it
    void (*arrange)(Machine *m, const Linear *l, Linear *to);
} Operations;

/* The CPU's; and those of the GPU, in programs that are linked with kernels.cu, or else NULL. */
extern const Operations cpu_operations;
#pragma weak gpu_operations
const Operations *gpu_operations(void);

/* The calibration: the residual streams of the float model and of the one that is quantized so far,
 * and arrays for one layer. */
typedef struct Quantizer Quantizer;

/* Embeds tokens [n_windows][length], n_windows 0 if nothing needs calibration. The streams stay in
 * host memory if `limit` bytes of the machine's memory (0: all that is free) do not hold them; too
 * little for a layer ends the program with how much is needed. CUDA's own 0.6 GB or so are not
 * counted. `embedding` and `tokens` are not needed afterwards. */
Quantizer *quantizer_new(const Config *c, const Method *method, const Operations *o,
                         const Linear *embedding, const int *tokens, int n_windows, int length,
                         size_t limit);
void quantizer_free(Quantizer *q);

/* One line about the memory, if it is planned. */
void quantizer_report(const Quantizer *q, FILE *out);

/* Rotates, smooths and quantizes layer number l from its float weights in the mapped file, and runs
 * the windows through it; layers come in order. `out` is for layer_free(). Sets found [N_SMOOTHED]
 * if it smooths, and errors [N_LINEARS], NaN without calibration. */
void quantize_layer(Quantizer *q, const Layer *layer, int l, Layer *out, Smoothing *found,
                    Errors *errors);

/* Ends the program if float weights hold NaN or infinity. */
void require_finite(const Linear *l, const char *name);

/* A copy of float weights as F32, to be changed. NaN or infinity ends the program with `name`. */
Linear float_copy(const Linear *l, const char *name);
void layer_free(Layer *layer);

/* x [n] <- x H_n / sqrt(n), the Hadamard transform (for any n: odd factors of n are a Hartley
 * transform); signs [n], +1 and -1. */
void hadamard(double *x, int n);
void random_signs(uint64_t seed, int n, int8_t *signs);

/* Rotates a layer's float weights, or the F32 embedding and lm_head with the final norm between
 * them: norms move into the weights and become 1. signs [dim]. The model's output stays the same
 * once all its parts are rotated. */
void rotate_layer(const Operations *o, Machine *m, const Config *c, const int8_t *signs, Layer *l);
void rotate_ends(Linear *embedding, Linear *lm_head, float *norm, const int8_t *signs,
                 void (*progress)(int done, int total)); // rows; NULL: none

/* s_k = max(1, max_k / t), all [K] on the host; smooth_layer() folds such scales of q, k, v, of
 * gate and up, and of down into a layer, which computes the same: norms and rows of up are divided,
 * columns multiplied. */
void smoothing_scales(const float *max, int K, float t, float *s);
void smooth_layer(const Operations *o, Machine *m, float *const s[N_SMOOTHED], Layer *l);

enum { SEARCH_WINDOWS = 8, SEARCH_TOKENS = 2048 }; // that the search looks at, at most

/* Searches t for float linears w [n] that share their input x [T][K]; max [K], on the host, is
 * max|x| per channel, over more tokens than the sample x if need be. t falls from the largest max
 * to 0.1 by a factor of 0.8; the one of least smoothed_distance() is returned. Sets s [K]; y [T][N]
 * of all n is used up. */
float search_smoothing(const Operations *o, Machine *m, const Linear *w, int n, const float *x,
                       int T, const float *max, float *y, float *s);

/* Scales of one row of weights w [K]: returns s_channel and sets s_group [K/128] (NULL: per
 * channel). importance [K] weighs the squared errors of the range search; NULL: the plain range
 * max|w|. A row of zeros has scales of 1. */
float choose_scales(const float *w, const float *importance, int K, uint8_t *s_group);

static const double DAMPING = 0.01;   // of the mean of diag H
static const double CORRECTION = 0.5; // how far to go towards the float model's output

/* M [N][K] += a^T b for a [T][N], b [T][K]: with a = b the Hessian X^T X. */
void add_moments(double *M, const float *a, int N, const float *b, int K, int T);

/* Damps and inverts H, whose diagonal [K] is on the host. Sets inverse->order: columns by falling
 * diagonal, equal ones from left to right; or, without act_order, all from left to right. Dead
 * columns (H_kk = 0) get the mean of the diagonal. If importance [K], on the host, is not NULL,
 * compensated_importance() of U follows. */
void invert_hessian(const Operations *o, Machine *m, const Sums *H, const double *diagonal,
                    bool act_order, Inverse *inverse, float *importance);

/* The importance of the columns for the ranges that GPTQ will round in, all on the host:
 * importance [K], H_kk at first, becomes sqrt(H_kk) / U_kk; order [K], diagonal [K] of U. */
void compensated_importance(const int *order, const double *diagonal, int K, float *importance);

/* ---- qqq.c 4: the same, faster --------------------------------------------------------------- */

/* The integer dot product under linear(): acc[t] += sum_k s_group[k / 128] u_k a_tk for T tokens, 1
 * or 8. w [K/2] is a row of qweight, s_group [K/128] or NULL for ones. a [K/128][T][2][64] has the
 * even columns of a token's group, then the odd ones; the last group may be smaller. */
typedef void DotU4(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
                   int32_t *acc);

/* The i-th of its versions (0 is plain C) and its name; NULL if there is none or the processor
 * lacks it. linear() uses the last one that is there. */
DotU4 *dot_u4_kernel(int i, const char **name);

/* acc [T][N] = a [T][K] w8^T, the integer sums of a W4A8 linear, by one of those versions. */
void accumulators(const Linear *w, const int8_t *a, int T, DotU4 *dot_u4, int32_t *acc);

/* out[i] = element first + i, i < n, of an array of dtype F32, F16 or BF16 at any alignment; exact.
 */
void floats(const void *data, DType dtype, size_t first, size_t n, float *out);

bool all_finite(const float *x, size_t n);

/* float to F16 bits, rounded to nearest even; beyond 65504 becomes infinity. */
uint16_t float_to_f16(float x);

/* ---- tokenizer.c: LLaMA 3's byte-level BPE ------------------------------------------------- */

typedef struct Tokenizer Tokenizer;

/* Loads a Hugging Face tokenizer.json, text [bytes]; `name` is the file it came from, for messages.
 * The text may be released afterwards. The caller owns the result. */
Tokenizer *tokenizer_load(const char *name, const char *text, size_t bytes);
void tokenizer_free(Tokenizer *t);

/* One more than the largest token id. */
int tokenizer_size(const Tokenizer *t);

/* The id of a token by its text as it stands in the file ("<|eot_id|>"), or -1. */
int tokenizer_id(const Tokenizer *t, const char *token);

/* Token ids of text [bytes], any bytes, no BOS added. With `special` the text of a special token is
 * parsed as that token, as Hugging Face does; without it is plain text. Returns malloc'ed ids
 * [*count]. */
int *tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, bool special, int *count);

/* The bytes of one token, *bytes of them, owned by the tokenizer; 0 bytes for a special token or
 * an id that is none. A token may end in the middle of a UTF-8 sequence. */
const char *tokenizer_decode(const Tokenizer *t, int id, size_t *bytes);

/* Text that arrives token by token, cut at UTF-8 boundaries: bytes of an unfinished sequence wait
 * in `pending` for the next call. */
typedef struct {
    char pending[4];
    int n_pending;
} Utf8Stream;

/* Writes to `out` the pending bytes and text [bytes], up to the last complete UTF-8 character; with
 * `flush` everything. Invalid bytes pass as they are. */
void utf8_write(Utf8Stream *s, const char *text, size_t bytes, bool flush, FILE *out);

/* ---- kernels.cu 2: the W4A8 GEMM on the GPU ------------------------------------------------ */

#ifdef __CUDACC__

/* A quantized linear on the GPU, y = x W^T; or several with the same input, rows one below the
 * other. Device memory, in the order in which the kernels read it: see fragment_word(). */
typedef struct {
    int N, K;
    uint32_t *w;      // [N/32][K/64][2][32][4] eight 4-bit codes each
    uint8_t *s_group; // [N/32][K/128][8][4], NULL per channel
    float *s_channel; // [N], divided by 16 if per channel
} GpuLinear;

/* Uploads n_parts quantized linears of one K and one kind of scales, stacked: q, k, v become one
 * GEMM. N must be a multiple of 64, K of 64 (of 128 with groups). The parts may lie in a mapped
 * file at any alignment and are not needed afterwards. gpu_linear_free() releases the result. */
GpuLinear gpu_linear_create(const Linear *parts, int n_parts);
void gpu_linear_free(GpuLinear *l);

/* y [M][N] = (a [M][K] . w8 [N][K]) * s_a [M] * s_channel [N], any M >= 1; or, if residual is not
 * NULL, residual [M][N] += the same in float32. All device memory, a, y and residual 16-byte
 * aligned. Launches one kernel on `stream` and nothing else, so it may be captured into a graph.
 * The kernel starts to read its weights before the kernel ahead of it on the stream has finished
 * (programmatic dependent launch); everything else it reads and writes afterwards. */
void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y,
                   float *residual, cudaStream_t stream);

/* The kernels that it chooses from, each right for every shape. With mma.sync: for up to 8 tokens;
 * then by the tokens of a tile and the teams of warps that share K. With wgmma, by the channels and
 * the tokens of a tile; where the program was not built for sm_90a, GEMM_128X1 replaces them.
 * GEMM_64X4 needs 176 KB of shared memory, as Hopper has; elsewhere GEMM_16X8 replaces it. */
typedef enum {
    GEMM_FEW,
    GEMM_16X8,
    GEMM_64X4,
    GEMM_64X2,
    GEMM_128X1,
    GEMM_HOPPER_64X64,
    GEMM_HOPPER_128X64,
    GEMM_HOPPER_128X96,
    GEMM_HOPPER_128X128,
    GEMM_HOPPER_256X96,
    GEMM_HOPPER_256X128,
    N_GEMM_KERNELS
} GemmKernel;

/* The choice of gpu_gemm_w4a8(), with `portable` among the kernels with mma.sync only. */
GemmKernel gpu_gemm_choose(const GpuLinear *l, int M, bool portable);

/* For tests and benchmarks: gpu_gemm_w4a8() with a given kernel. */
void gpu_gemm_run(GemmKernel kernel, const GpuLinear *l, const int8_t *a, const float *s_a, int M,
                  half *y, float *residual, cudaStream_t stream);

/* quantize_row() for each row of x [M][K]: a [M][K], s_a [M]. K is a multiple of 8, x and a are
 * 16-byte aligned. */
void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream);

/* ---- kernels.cu 3: the small kernels --------------------------------------------------------- */

/* The input of a linear, [T][K]: int8 a with s_a in `scale` as quantize_row() makes them; or, if a
 * is NULL, halves h, to be multiplied with `scale` (NULL: with 1). */
typedef struct {
    int8_t *a;
    half *h;
    float *scale; // [T]
} LinearInput;

/* rmsnorm() of x [T][dim] and swiglu of gate_up [T][2][hidden_dim], each as a linear's input, in
 * one pass. Rows are multiples of 8 long and 16-byte aligned. */
void gpu_rmsnorm(const float *x, const float *weight, int T, int dim, float eps, LinearInput out,
                 cudaStream_t stream);
void gpu_swiglu(const half *gate_up, int T, int hidden_dim, LinearInput out, cudaStream_t stream);

#endif

/* ---- kernels.cu 1: the forward pass on the GPU ----------------------------------------------- */

/* These are in programs that are linked with kernels.cu. In others they are NULL: hence "weak". */
#pragma weak gpu_can_run
#pragma weak gpu_engine

/* Whether there is a GPU of sm_80 or newer and the kernels can run such a model, W4A8 or 16-bit.
 * what [size] gets the GPU's name, or the reason why not. */
bool gpu_can_run(const Config *c, bool w4a8, char *what, size_t size);

/* The engine on the GPU. The weights are uploaded straight from the mapped file; too little GPU
 * memory for them ends the program with how much is needed. */
Engine *gpu_engine(const Model *m, int kv_bits);

/* ---- qqq.c 5: JSON ------------------------------------------------------------------------- */

/* A JSON text [bytes], which must outlive it; text that is none ends the program with `name` in the
 * message. A node is a number: 0 is the root, -1 stands for "none" and may be passed wherever a
 * node may: it is of no type and has no children. */
typedef struct Json Json;
Json *json_parse(const char *name, const char *text, size_t bytes);
void json_free(Json *json);

/* '{' object, '[' array, '"' string, 'p' primitive (number, true, false, null), 0 none; the value
 * of `key` in the object `node`, or -1. */
char json_type(const Json *json, int node);
int json_get(const Json *json, int node, const char *key);

/* Whether the node is none, or null: "null" in quotes is a string. */
bool json_absent(const Json *json, int node);

/* Loops over the children of an array (its elements) or an object (its keys; each value is the
 * node after its key, key + 1): for (int i = json_first(j, n); i >= 0; i = json_next(j, n, i)). */
int json_first(const Json *json, int node);
int json_next(const Json *json, int node, int child);

/* Whether the node is the string `s`, or the number, true, false or null that is spelled so; its
 * text with escapes resolved, malloc'ed UTF-8, *bytes long and a NUL behind; and its value, false
 * if it is no number or out of double's range. */
bool json_is(const Json *json, int node, const char *s);
char *json_string(const Json *json, int node, size_t *bytes);
bool json_number(const Json *json, int node, double *value);

/* A node as it is in the text, a string with its quotes: bytes in the text. */
const char *json_source(const Json *json, int node, size_t *bytes);

/* Writes `text` as a JSON string, quotes and escapes included. */
void put_json_string(FILE *out, const char *text);

/* ---- qqq.c 5: model files ------------------------------------------------------------------ */

/* Bytes of one element; its name in a safetensors header. */
size_t dtype_size(DType dtype);
const char *dtype_name(DType dtype);

enum { MAX_DIMS = 8 }; // of a tensor

typedef struct {
    char *name; // "model.layers.0.self_attn.q_proj.weight"
    DType dtype;
    int n_dims;
    int64_t shape[MAX_DIMS]; // outermost first
    const void *data;        // into the mapped file, at any alignment
    size_t bytes;
    const char *path; // the file it is in, for messages
} Tensor;

/* The files beside tokenizer.json: tokenizer_config.json, chat_template.jinja,
 * special_tokens_map.json, added_tokens.json. */
enum { N_CHAT_FILES = 4 };

/* A model on disk: a Hugging Face directory or a model.bin, mapped read-only, nothing copied.
 * Format: https://huggingface.co/docs/safetensors. */
typedef struct Checkpoint {
    char *path;
    Tensor *tensors; // [n_tensors], sorted by name
    int n_tensors;
    char *config;            // config.json
    char *generation_config; // generation_config.json, NULL if there is none
    char *quantization;      // how a model.bin was made, JSON; NULL for an unquantized model
    const char *tokenizer;   // tokenizer.json [tokenizer_bytes], NULL if there is none
    size_t tokenizer_bytes;
    Tensor chat_files[N_CHAT_FILES]; // U8 [bytes]; data is NULL if there is none
    struct Mapping *maps;            // [n_maps] the mapped files
    int n_maps;
} Checkpoint;

/* Opens a Hugging Face directory (config.json, tokenizer.json and model.safetensors, or
 * model.safetensors.index.json and its shards), a Hugging Face cache's folder of one, or a
 * model.bin, and checks the headers as strictly as the safetensors library does. */
Checkpoint *checkpoint_open(const char *path);
Checkpoint *checkpoint_open_texts(const char *path); // of a directory tokenizer.json is enough
void checkpoint_close(Checkpoint *c);

/* Memory [bytes], zeroed, that lives as long as the checkpoint, for tensors that a program makes;
 * and what must follow when it has renamed some. */
void *checkpoint_memory(Checkpoint *c, size_t bytes);
void checkpoint_sort(Checkpoint *c);

/* Whether two paths lead to one file or directory; whether `path` is one of the files that the
 * checkpoint was read from. Both under any name. */
bool same_file(const char *a, const char *b);
bool checkpoint_has_file(const Checkpoint *c, const char *path);

/* The tensor of that name, or NULL. */
const Tensor *checkpoint_find(const Checkpoint *c, const char *name);

/* Reads a whole text, a file, a pipe or, of "-", stdin: malloc'ed with a NUL behind. Ends the
 * program if it is empty or no UTF-8; require_utf8() does so for a text from elsewhere. */
char *read_text(const char *path, size_t *bytes);
void require_utf8(const char *name, const char *text, size_t bytes);

/* ---- qqq.c 5: the model in a file ---------------------------------------------------------- */

/* Reads a config.json (and generation_config.json, or NULL, for its eos_token_id). Refuses by name
 * what is not LLaMA 3.1: another model_type, hidden_act, rope_type, biases, absurd sizes. */
Config config_parse(const char *path, const char *config, const char *generation_config);

/* One tensor of a model: its name in the file, its shape, and the place in the Model for its data.
 * Of a linear's arrays WEIGHT is w. */
typedef enum { NORM, WEIGHT, QWEIGHT, S_CHANNEL, S_GROUP } Role;

typedef struct {
    Role role;
    const char *name;
    int rows, columns; // columns 0: one dimension
    Linear *linear;    // NULL for a norm
    float **norm;      // NULL for a linear
} Parameter;

/* Calls visit() for each tensor of layers first .. last in the order of the file; layer -1 is the
 * embedding, layer n_layers the final norm and, unless it is tied, lm_head. */
void for_each_tensor(Model *m, int first, int last, void (*visit)(void *to, const Parameter *p),
                     void *to);

/* Finds every tensor of the model in the checkpoint and checks dtypes, shapes and scales. Weights
 * stay in the mapped file, which must outlive the model; norms and s_channel are copied. Of a W4A8
 * model lm_head.weight may be I8 [vocab_size][dim], with lm_head.s_channel F32 [vocab_size]. */
Model *model_load(const Checkpoint *c);

/* Ends the program unless the input channels of all linears come in whole groups. */
void check_group_size(const char *path, const Config *c, int group_size);

/* What its weights are: their dtype, or W4A8 of which kind. */
const char *weights_kind(const Model *m);

/* Says on stderr what a file claims to be: architecture, sizes, dtype and, if it is quantized, the
 * options that made it. `where` is what it runs on, or NULL. */
void describe_model(const Checkpoint *c, const Model *m, const char *where);

/* The checkpoint's tokenizer, or the end if it has none. Says which tokens of the older files
 * beside it it lacks. */
Tokenizer *checkpoint_tokenizer(const Checkpoint *c);

/* Token ids [*n] of a text, special tokens parsed, BOS in front unless the text begins with it;
 * malloc'ed. `name` is for the message if one is beyond the embedding. */
int *encode_text(const Tokenizer *t, const Config *c, const char *name, const char *text,
                 size_t bytes, int *n);

/* The same of a text file that fills at least one window of *length tokens. 0 asks for 2048, or the
 * model's context if that is less. */
int *read_tokens(const Tokenizer *t, const Config *c, const char *path, int *length, int *n);

/* perplexity() of tokens [n], printed as one line after `label`. */
void print_perplexity(const Checkpoint *c, Engine *e, const char *label, const int *tokens, int n,
                      int length);

/* ---- qqq.c 6: errors, options, progress, files that are written ---------------------------- */

/* Prints "error: " and the message as one line on stderr, removes the file that is being written,
 * and exits with status 1; with status 2 for a command line that makes no sense. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void die_usage(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* Remembers a line for stderr: what of MODEL is not used, which of two words counts.
 * describe_model() prints them, so that an error before is the only line. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
void print_notes(void);

/* count * size bytes, zeroed; free() releases them. format_text() is a printf() into such. */
void *allocate(size_t count, size_t size) __attribute__((returns_nonnull));
char *format_text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* First in main(): a descriptor 0 to 2 that is closed becomes /dev/null, so that no file gets it.
 * Last: what did not reach stdout is an error. */
void open_standard_streams(void);
void flush_output(void);

/* Seconds of a monotonic clock; the path of `name` in the directory of the executable. */
double seconds(void);
char *beside_program(const char *name);

/* Ends the program, status 0, with this text on stdout; status 1 if that cannot be written. */
void print_and_exit(const char *text) __attribute__((noreturn));

/* The value of an option -flag, checked; anything else ends the program with status 2 and a line
 * that says what was expected. parse_choice() tells whether it is the second of two words. */
double parse_number(char flag, const char *value, double min, double max);
long long parse_integer(char flag, const char *value, long long min, long long max);
bool parse_choice(char flag, const char *value, const char *first, const char *second);

/* Long work, on stderr: a bar on a terminal; in a pipe the first line, the last and one every 5 s.
 * Work ends with done == total; seconds_left < 0: not known. */
void show_progress(const char *what, int done, int total, double seconds_left);

/* A file, or a directory of files, that appears at its path whole or not at all: the files have no
 * name until output_close(), or if the file system has no such files a temporary one, which die()
 * removes. One at a time. */
typedef struct Output Output;

/* Starts the file, or the directory, which may be there if it is empty; a link is followed. Fails
 * early where it cannot be written. */
Output *output_open(const char *path, bool directory);

/* A new file of this name in the directory; its number. The number of a single file is 0. */
int output_add(Output *o, const char *name);

void output_write(const Output *o, int file, const void *data, size_t bytes, size_t offset);

/* Syncs what was written and puts it in its place. */
void output_close(Output *o);

#ifdef __cplusplus
}
#endif
#endif
