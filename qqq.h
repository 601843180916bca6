/* QQQ in C: LLaMA 3.1, W4A8 quantization and its kernels.
 *
 * This header is the table of contents: the structs with shapes and units, then every public
 * function, grouped by the file and section that defines it. Read it first.
 *
 *   qqq.c        1 the model · 2 W4A8 numbers · 3 the method · 4 arithmetic beneath · 5 the engine
 *   tokenizer.c  byte-level BPE
 *   files.c      plumbing, declared in files.h: errors, options, JSON, model files
 *   kernels.cu   on the GPU: 1 forward pass · 2 W4A8 GEMM · 3 small kernels · 4 attention ·
 *                5 quantization
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

/* config.json, what of it a LLaMA needs. */
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
} Config;

/* A file may hold others, which dtype_name() knows; no model needs them. */
typedef enum { F32, F16, BF16, U8, I8, I32, I64 } DType;

/* The weights of y = x W^T, W [N][K]: 16 or 32-bit floats in w; or W4A8 in the other three; or, of
 * lm_head, int8 in w with s_channel. It owns its arrays, and linear_free() releases them; if
 * `mapped`, all but s_channel are the model file's instead, and read-only. */
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

/* One layer of forward(): s->x [T][dim] is replaced by the layer's output; `l` is its index in the
 * KV cache. Its parts: attention_block() takes s->xb to s->att, the input of o; ffn_block() s->xb
 * to s->gate, the input of down; add_linear() is x [T][N] += in [T][K] W^T by way of buffer [T][N].
 */
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

/* What a token costs after those before it: -log p, p its softmax among logits [n]; and whether no
 * other's logit is larger. */
typedef struct {
    double nll;
    bool likeliest;
} Score;

Score score(const float *logits, int n, int token);

/* ---- the engine: a model at work, on the CPU (qqq.c) or the GPU (kernels.cu) ----------------- */

/* A model that runs. After start() it holds n_sequences sequences side by side, each a KV cache of
 * `context` positions; the engine owns them, and the arrays that it returns until its next call.
 * A sequence that goes on at an earlier position forgets what came after that position. */
typedef struct Engine Engine;
struct Engine {
    const Model *model;
    bool on_gpu;
    int kv_bits;                     // of the KV cache
    size_t weight_bytes, step_bytes; // memory of the weights; what a step reads of them
    size_t position_bytes;           // KV cache of one position of one sequence
    int n_sequences, context;        // as start() had them
    size_t state_bytes;              // memory beside the weights: all on the GPU, else the cache

    // The first call, and again to begin anew in other sizes; too little memory ends the program.
    // fits() tells beforehand whether there is enough, sets state_bytes and ends what was started.
    // The CPU takes one sequence.
    void (*start)(Engine *e, int n_sequences, int context);
    bool (*fits)(Engine *e, int n_sequences, int context);

    // Runs tokens [n], n >= 1, of one sequence at positions pos .. pos + n - 1.
    void (*feed)(Engine *e, int sequence, const int *tokens, int n, int pos);

    // One token more for each sequence: tokens [n_sequences] at positions [n_sequences]; or, both
    // NULL, the token chosen by the call before, at the position after its. On the GPU it returns
    // before the work is done.
    void (*step)(Engine *e, const int *tokens, const int *positions);

    // After feed() or step(): the likeliest next token of each sequence [n_sequences], as argmax();
    // and the logits, [vocab_size] after feed(), [n_sequences][vocab_size] after step().
    const int *(*chosen)(Engine *e);
    const float *(*logits)(Engine *e);

    // feed() that also sets scores [n]: those of targets[i] as the token after tokens[i]. chosen()
    // and logits() are lost.
    void (*score)(Engine *e, int sequence, const int *tokens, const int *targets, int n, int pos,
                  Score *scores);

    double (*bandwidth)(void); // bytes a second of the memory that it reads from, measured
    void (*free)(Engine *e);
};

/* Where a model will run, as -d asks. ANY: on the GPU, if there is one that can run it, W4A8 or in
 * 16 bits; else, and with CPU, on the CPU. where [size] says it: "the CPU: found no GPU". CUDA that
 * cannot be had ends the program. */
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

/* ---- qqq.c 2: W4A8 numbers ------------------------------------------------------------------ */

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

/* The integer dot product under it: acc[t] += sum_k s_group[k / 128] u_k a_tk for T tokens, 1 or 8;
 * w [K/2] is a row of qweight, s_group [K/128] or NULL for ones, a [K/128][T][2][64] holds of each
 * group a token's even columns, then its odd ones; the last group may be smaller. */
typedef void DotU4(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
                   int32_t *acc);

/* The i-th of its versions (0 is plain C) and its name; NULL if there is none or the processor
 * lacks it. linear() uses the last one that is there. */
DotU4 *dot_u4_kernel(int i, const char **name);

/* acc [T][N] = a [T][K] w8^T, the integer sums of a W4A8 linear, by one of those versions. */
void accumulators(const Linear *w, const int8_t *a, int T, DotU4 *dot_u4, int32_t *acc);

/* ---- qqq.c 3: the method -------------------------------------------------------------------- */

/* What is done to a layer. */
typedef struct {
    int group_size;                                        // 128, or -1: per channel
    int smooth;                                            // 1 search_smoothing(), 2 .._published()
    bool mse;                                              // ranges of least error, not max|w|
    bool gptq, act_order;                                  // or round_to_nearest()
    const int8_t *signs;                                   // [dim] of the rotation, NULL: none
    void (*progress)(int layer, int linear, int n_layers); // at work on it; NULL: none
} Method;

/* What quantizing a layer reports. */
typedef struct {
    float t; // threshold
    int n;   // channels above it
} Smoothing;

typedef struct {
    double before, after; // relative output error, rounded to nearest and in the end
} Errors;

/* The calibration: the residual streams of the float model and of the one that is quantized so far,
 * and buffers for one layer. */
typedef struct Quantizer Quantizer;

/* Embeds tokens [n_windows][length], n_windows 0 if nothing needs calibration. The arguments but
 * method->signs are not needed afterwards. */
Quantizer *quantizer_new(const Config *c, const Method *method, const Linear *embedding,
                         const int *tokens, int n_windows, int length);
void quantizer_free(Quantizer *q);

/* Rotates, smooths and quantizes layer number l from its float weights in the mapped file, and runs
 * the windows through it; layers come in order. `out` is for layer_free(). Sets found [3] if it
 * smooths, and errors [N_LINEARS], NaN without calibration. */
void quantize_layer(Quantizer *q, const Layer *layer, int l, Layer *out, Smoothing *found,
                    Errors *errors);

/* After the last layer: sums over all tokens and channels of x f and x x, the normed streams of
 * the quantized and of the float model, whose quotient the final norm is multiplied with. */
void final_scale(const Quantizer *q, const float *norm, double *xf, double *xx);

/* Ends the program if float weights hold NaN or infinity. */
void require_finite(const Linear *l, const char *name);

/* A copy of float weights as F32, to be changed. NaN or infinity ends the program with `name`. The
 * same for a whole layer (number `index`), norms included. */
Linear float_copy(const Linear *l, const char *name);
Layer layer_float_copy(const Config *c, const Layer *layer, int index);
void layer_free(Layer *layer);

/* x [n] <- x H_n / sqrt(n), the Hadamard transform (for any n: what n has of odd factors is a
 * Hartley transform); signs [n], +1 and -1. */
void hadamard(double *x, int n);
void random_signs(uint64_t seed, int n, int8_t *signs);

/* w [N][K]: each block of n input channels (output channels) becomes w_block diag(signs) H_n /
 * sqrt(n) (its transpose times w_block), signs NULL: all +1; or column k is multiplied by s[k]. */
void rotate_inputs(float *w, int N, int K, int n, const int8_t *signs);
void rotate_outputs(float *w, int N, int K, int n, const int8_t *signs);
void scale_inputs(float *w, int N, int K, const float *s);

/* Rotates a layer_float_copy(), or the F32 embedding and lm_head with the final norm between them:
 * norms move into the weights and become 1. signs [dim]. The model's output stays the same once all
 * its parts are rotated. */
void rotate_layer(const Config *c, Layer *l, const int8_t *signs);
void rotate_ends(Linear *embedding, Linear *lm_head, float *norm, const int8_t *signs,
                 void (*progress)(int done, int total)); // rows; NULL: none

/* s_k = max(1, max_k / t), all [K]; smooth_layer() folds such scales into a layer_float_copy(),
 * which computes the same: norms and rows of up are divided, columns multiplied. */
void smoothing_scales(const float *max, int K, float t, float *s);
void smooth_layer(Layer *l, const float *s_qkv, const float *s_gate_up, const float *s_down);

enum { SEARCH_WINDOWS = 8, SEARCH_TOKENS = 2048 }; // what the search looks at, at most

/* Searches t for linears w [n_linears] (float weights) that share their input x [T][K]; max [K] is
 * max|x| per channel, over more tokens than the sample x if need be. t falls from the largest max
 * to 0.1 by a factor of 0.8; the score is the squared distance between the linears' float output
 * and their W4A8 output, weights to nearest under searched ranges. Sets s [K] and returns t. */
float search_smoothing(const Linear *w, int n_linears, const float *x, int T, const float *max,
                       int group_size, float *s);

/* The search of the published code, 30 to 40 times the work: x [windows][length][K] whole windows;
 * max(100, max|x| / 0.5) equal steps, at most 4096; plain ranges; the score is taken at the output
 * of the block: attention for qkv, silu(gate) up for gate and up, the linear itself for down.
 * `state` needs one layer and `length` positions. o's input cannot be smoothed: one v serves
 * several query heads. */
typedef enum { SMOOTH_QKV, SMOOTH_GATE_UP, SMOOTH_DOWN } SmoothedInput;
float search_smoothing_published(const Config *c, const Layer *layer, State *state,
                                 SmoothedInput which, const float *x, int windows, int length,
                                 const float *max, int group_size, float *s);

/* Scales of one row of weights w [K]: returns s_channel and sets s_group [K/128] (NULL: per
 * channel). importance [K] weighs the squared errors of the range search; NULL: the plain range
 * max|w|. A row of zeros has scales of 1. */
float choose_scales(const float *w, const float *importance, int K, uint8_t *s_group);

/* w [N][K] with each weight rounded to the nearest code under the scales of choose_scales(). */
Linear round_to_nearest(const float *w, const float *importance, int N, int K, int group_size);

static const double DAMPING = 0.01;   // of the mean of diag H
static const double CORRECTION = 0.5; // how far to go towards the float model's output

/* M [N][K] += a^T b for a [T][N], b [T][K]: with a = b the Hessian X^T X. */
void add_moments(double *M, const float *a, int N, const float *b, int K, int T);

/* The order of the columns, malloc'ed [K]: by falling diagonal [K] of H, equal ones as they stand;
 * or, without act_order, all as they stand. */
int *column_order(const double *diagonal, int K, bool act_order);

/* (H + 0.01 mean(diag H) I)^-1 = U^T U, U upper triangular, rows and columns in the order of
 * column_order(). Dead columns (H_kk = 0) of H [K][K] get the mean of the diagonal. */
typedef struct {
    int K;
    int *order; // [K]
    double *U;  // [K][K]
} Inverse;

Inverse hessian_inverse(const double *H, int K, bool act_order);
void inverse_free(Inverse *inverse);

/* The importance of the columns for the ranges that GPTQ will round in: importance [K], H_kk at
 * first, becomes sqrt(H_kk) / U_kk. H_kk is what rounding column k costs in the output if all
 * others stay as they are, 1 / U_kk^2 what is left of that when the columns behind it make up for
 * it; this is their geometric mean. */
void compensated_importance(const Inverse *inverse, float *importance);

/* GPTQ: w [N][K] quantized column by column in the order of `inverse`; scales as choose_scales().
 */
Linear gptq(const float *w, int N, const Inverse *inverse, const float *importance, int group_size);

/* What GPTQ should aim at when its inputs X are no longer the float model's inputs F:
 *     target = w + 1/2 (w C + R) (X^T X + damping)^-1,   C = (F - X)^T X [K][K],  R [N][K] = D^T X,
 * D [T][N] the residual stream's distance to the float model's, which o and down can make up for;
 * R may be NULL. The whole step (1 instead of 1/2) would be least squares, as in GPTAQ
 * (arXiv 2504.02692); half of it generalizes better. */
void corrected_target(const float *w, int N, const Inverse *inverse, const double *C,
                      const double *R, float *target);

/* sqrt(tr(E H E^T) / tr(W H W^T)), E the quantized minus the float weights w [N][K]: the relative
 * error of the output on the inputs that H [K][K] sums up. */
double relative_error(const float *w, const Linear *quantized, const double *H);

/* ---- qqq.c 4: arithmetic beneath ------------------------------------------------------------ */

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
 * other. Device memory, in the order in which the kernel reads it: see fragment_word(). */
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

/* Device memory through which blocks that share an output tile add up their sums. One for each
 * stream that runs GEMMs; cudaFree() releases it. */
int *gpu_gemm_workspace(void);

/* y [M][N] = (a [M][K] . w8 [N][K]) * s_a [M] * s_channel [N], any M >= 1. All device memory, a and
 * y 16-byte aligned. Launches one kernel on `stream` and nothing else, so it may be captured into a
 * graph. The kernel starts to read its weights before the kernel ahead of it on the stream has
 * finished (programmatic dependent launch); everything else it reads and writes afterwards. */
void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y,
                   float *residual, int *workspace, cudaStream_t stream);

/* The kernels that it chooses from, each right for every shape: of mma.sync, for up to 8 tokens,
 * then by the tokens of a tile and how many teams of warps share K; of wgmma (where the program was
 * built for sm_90a; elsewhere GEMM_128 stands in), by the channels and the tokens of a tile. */
typedef enum {
    GEMM_FEW,
    GEMM_16X8,
    GEMM_32X4,
    GEMM_64X4,
    GEMM_64X2,
    GEMM_128,
    GEMM_HOPPER_64X64,
    GEMM_HOPPER_128X64,
    GEMM_HOPPER_128X96,
    GEMM_HOPPER_128X128,
    GEMM_HOPPER_256X96,
    GEMM_HOPPER_256X128,
    N_GEMM_KERNELS
} GemmKernel;

/* Its choice, with `portable` among those of mma.sync only. */
GemmKernel gpu_gemm_choose(const GpuLinear *l, int M, bool portable);

/* For tests and benchmarks: gpu_gemm_w4a8() with a given kernel. acc, unless NULL, receives the
 * integer sums [M][N]. */
void gpu_gemm_run(GemmKernel kernel, const GpuLinear *l, const int8_t *a, const float *s_a, int M,
                  half *y, float *residual, int *acc, int *workspace, cudaStream_t stream);

/* quantize_row() for each row of x [M][K]: a [M][K], s_a [M]. K is a multiple of 8, x and a are
 * 16-byte aligned. */
void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream);

/* ---- kernels.cu 3: the small kernels --------------------------------------------------------- */

/* What a linear reads, [T][K]: int8 a with s_a in `scale` as quantize_row() makes them; or, if a is
 * NULL, halves h, to be multiplied with `scale` (NULL: with 1). */
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

/* Whether there is a GPU of sm_80 or newer and its kernels can run such a model, W4A8 or 16-bit.
 * what [size] gets the GPU's name, or else why not. */
bool gpu_can_run(const Config *c, bool w4a8, char *what, size_t size);

/* The engine on the GPU. The weights are uploaded straight from the mapped file; too little GPU
 * memory for them ends the program with how much is needed. */
Engine *gpu_engine(const Model *m, int kv_bits);

/* ---- kernels.cu 5: quantization on the GPU --------------------------------------------------- */

#pragma weak gpu_quantizer_new
#pragma weak gpu_quantizer_free
#pragma weak gpu_quantize_layer
#pragma weak gpu_final_scale
#pragma weak gpu_quantizer_report

/* The calibration, all on the GPU: the residual streams of the float and of the quantized model,
 * and memory for one layer. The streams stay in host memory if `most_memory` bytes of GPU memory
 * (0: all that is free) do not hold them; too little for a layer ends the program with how much is
 * needed. CUDA's own 0.6 GB or so are not counted. */
typedef struct GpuQuantizer GpuQuantizer;

/* Embeds tokens [n_windows][length], n_windows 0 if nothing needs calibration. The arguments but
 * method->signs are not needed afterwards. */
GpuQuantizer *gpu_quantizer_new(const Config *c, const Method *method, const Linear *embedding,
                                const int *tokens, int n_windows, int length, size_t most_memory);
void gpu_quantizer_free(GpuQuantizer *q);

/* quantize_layer() and final_scale(). */
void gpu_quantize_layer(GpuQuantizer *q, const Layer *layer, int l, Layer *out, Smoothing *found,
                        Errors *errors);
void gpu_final_scale(GpuQuantizer *q, const float *norm, double *xf, double *xx);

/* One line: where the time went, and the GPU memory. */
void gpu_quantizer_report(GpuQuantizer *q, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
