/* QQQ in C: LLaMA 3.1, W4A8 quantization and its kernels.
 *
 * This header is the table of contents: the structs with shapes and units, then every public
 * function, grouped by the file and section that defines it. Read it first.
 *
 *   qqq.c        0 errors and JSON · 1 files · 2 number formats · 3 forward pass · 4 rotation ·
 *                5 adaptive smoothing · 6 GPTQ
 *   tokenizer.c  byte-level BPE
 *   kernels.cu   the same on the GPU
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

#ifdef __cplusplus
extern "C" {
#endif

/* ---- qqq.c 0: errors, memory and JSON ------------------------------------------------------- */

/* Prints "error: " and the message as one line on stderr, removes the file that is being written,
 * and exits with status 1. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* The same with status 2, for a command line that makes no sense. */
void die_usage(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* count * size bytes, zeroed, aligned to 64 bytes; free() releases them. */
void *allocate(size_t count, size_t size);

/* Seconds of a monotonic clock. */
double seconds(void);

/* A JSON text, parsed by jsmn. A node is a number: 0 is the root, -1 stands for "none" and may be
 * passed wherever a node may: it is of no type and has no children. */
typedef struct Json Json;

/* Parses text [bytes], which must outlive the result. Text that is no JSON ends the program with
 * `name`, what the text is, in the message. json_free() releases the result. */
Json *json_parse(const char *name, const char *text, size_t bytes);
void json_free(Json *json);

/* '{' object, '[' array, '"' string, 'p' primitive (number, true, false, null), 0 none. */
char json_type(const Json *json, int node);

/* The value of `key` in the object `node`, or -1. */
int json_get(const Json *json, int node, const char *key);

/* Loops over the children of an array (its elements) or an object (its keys; each value is the
 * node after its key, key + 1): for (int i = json_first(j, n); i >= 0; i = json_next(j, n, i)). */
int json_first(const Json *json, int node);
int json_next(const Json *json, int node, int child);

/* Whether the node is the string `s`, or the number, true, false or null that is spelled so. */
bool json_is(const Json *json, int node, const char *s);

/* A string node's text with escapes resolved: malloc'ed UTF-8, *bytes long and a NUL behind. */
char *json_string(const Json *json, int node, size_t *bytes);

/* A number node's value; false if the node is none or out of double's range. */
bool json_number(const Json *json, int node, double *value);

/* ---- qqq.c 1: files ------------------------------------------------------------------------ */

typedef enum { F32, F16, BF16, U8 } DType;

/* Bytes of one element; the dtype's name in a safetensors header. */
size_t dtype_size(DType dtype);
const char *dtype_name(DType dtype);

/* out[i] = element first + i, i < n, of an array of dtype F32, F16 or BF16 at any alignment; exact.
 */
void floats(const void *data, DType dtype, size_t first, size_t n, float *out);

/* float to F16 bits, rounded to nearest even; beyond 65504 becomes infinity. */
uint16_t float_to_f16(float x);

typedef struct {
    char *name; // "model.layers.0.self_attn.q_proj.weight"
    DType dtype;
    int n_dims;
    int64_t shape[4]; // outermost first
    const void *data; // into the mapped file, at any alignment
    size_t bytes;
    const char *path; // the file it is in, for messages
} Tensor;

/* A model on disk: a Hugging Face directory or a model.bin, mapped read-only, nothing copied.
 * Format: https://huggingface.co/docs/safetensors. */
typedef struct {
    char *path;
    Tensor *tensors; // [n_tensors], sorted by name
    int n_tensors;
    char *config;            // config.json
    char *generation_config; // generation_config.json, NULL if there is none
    char *quantization;      // how a model.bin was made, JSON; NULL for an unquantized model
    const char *tokenizer;   // tokenizer.json [tokenizer_bytes], NULL if there is none
    size_t tokenizer_bytes;
    struct Mapping *maps; // [n_maps] the mapped files
    int n_maps;
} Checkpoint;

/* Opens a Hugging Face directory (config.json, tokenizer.json and model.safetensors, or
 * model.safetensors.index.json and its shards) or a model.bin, and checks the headers: offsets
 * inside the file and without overlap, sizes that agree with shapes. */
Checkpoint *checkpoint_open(const char *path);
void checkpoint_close(Checkpoint *c);

/* The tensor of that name, or NULL. */
const Tensor *checkpoint_find(const Checkpoint *c, const char *name);

/* A model.bin being written, tensor by tensor, in a temporary file beside its target. */
typedef struct Writer Writer;

/* Starts `path` with the header for tensors [n] (data is not read; their order in the file is
 * DESIGN's: multiples of 256 bytes first, then the small rest, in the order given). The strings of
 * `c` go to __metadata__ and its tokenizer to the U8 tensor "tokenizer.json"; `quantization` may be
 * NULL. If the program ends before writer_close(), also by a signal, the temporary file is removed
 * and what stood at `path` stays. */
Writer *writer_open(const char *path, const Checkpoint *c, const char *quantization,
                    const Tensor *tensors, int n);

/* Writes the data [bytes] of one of the tensors; in any order, each exactly once. */
void writer_put(Writer *w, const char *name, const void *data, size_t bytes);

/* Syncs the file, renames it to its target and frees the writer. Returns its size in bytes. */
size_t writer_close(Writer *w);

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
    int eos[16];                  // generation stops at any of them
    int n_eos;
} Config;

/* The weights of y = x W^T, W [N][K]: 16 or 32-bit floats in w, or W4A8 in qweight. */
typedef struct {
    int N, K;
    DType dtype;            // F32, F16 or BF16: of w; U8: quantized
    const void *w;          // [N][K], at any alignment; NULL if quantized
    const uint8_t *qweight; // [N][K/2] codes u = q + 8, even column in the low nibble
    const float *s_channel; // [N]
    const uint8_t *s_group; // [N][K/128] in 1..15, NULL per channel
} Linear;

enum { GROUP = 128, N_LINEARS = 7 };

typedef struct {
    float *attention_norm; // [dim] input_layernorm
    float *ffn_norm;       // [dim] post_attention_layernorm
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
    Linear lm_head;   // [vocab_size][dim]
    int group_size;   // 0 unquantized, -1 W4A8 per channel, 128 W4A8 per group
} Model;

/* Reads a config.json (and generation_config.json, or NULL, for its eos_token_id). Refuses by name
 * what is not LLaMA 3.1: another model_type, hidden_act, rope_type, biases, absurd sizes. */
Config config_parse(const char *path, const char *config, const char *generation_config);

/* Finds every tensor of the model in the checkpoint and checks dtypes, shapes and scales. Weights
 * stay in the mapped file, which must outlive the model; norms and s_channel are copied. */
Model *model_load(const Checkpoint *c);
void model_free(Model *m);

/* Bytes of all weights that one token reads (an embedding row counts as one). */
size_t model_bytes(const Model *m);

/* ---- qqq.c 2: the W4A8 number formats ------------------------------------------------------ */

/* Quantizes one token's activations x [K] to a [K] and returns s_a: x = a s_a. A row of zeros gives
 * s_a = 0; one with NaN or infinity s_a = NaN, so that it shows in the output. */
float quantize_row(const float *x, int K, int8_t *a);

/* q [K] in -8..7 to qweight [K/2] and back. */
void pack_row(const int8_t *q, int K, uint8_t *qweight);
void unpack_row(const uint8_t *qweight, int K, int8_t *q);

/* The float weights w [K] that row n of a quantized linear stands for. */
void dequantize_row(const Linear *l, int n, float *w);

/* ---- qqq.c 3: the forward pass ------------------------------------------------------------- */

/* What the forward pass hands to a Tap: the input of these linears. */
typedef enum { QKV_INPUT, O_INPUT, GATE_UP_INPUT, DOWN_INPUT } TapPoint;

/* Called with the input x [T][K] of a linear (or of several that share it), before it is used. */
typedef void Tap(void *user, int layer, TapPoint point, const float *x, int T);

/* Buffers of one sequence. All float32. */
typedef struct {
    int context;   // positions that the KV cache holds
    int max_T;     // most tokens that one call takes
    float *x;      // [max_T][dim] residual stream; after forward(): normed, ready for lm_head
    float *xb;     // [max_T][dim] normed, or a linear's output to be added to x
    float *q;      // [max_T][n_heads * head_dim]
    float *att;    // [max_T][n_heads * head_dim] output of attention
    float *gate;   // [max_T][hidden_dim]
    float *up;     // [max_T][hidden_dim]
    float *keys;   // [n_layers][context][n_kv_heads * head_dim]
    float *values; // the same
    float *rope;   // [context][head_dim / 2][2] cos and sin
    float *logits; // [LOGIT_ROWS][vocab_size]
    Tap *tap;      // NULL, or called for each linear's input
    void *user;
} State;

enum { LOGIT_ROWS = 64 };

/* Buffers for `context` positions, at most max_T tokens a call. */
State *state_new(const Config *c, int context, int max_T);
void state_free(State *s);

/* Runs T tokens, which stand at positions pos .. pos + T - 1, through the model: T <= max_T,
 * pos + T <= context; earlier positions are in the KV cache. Leaves the final norm's output in
 * s->x [T][dim]. */
void forward(const Model *m, State *s, const int *tokens, int T, int pos);

/* Logits [n][vocab_size] of tokens first .. first + n - 1 of the last forward(), n <= LOGIT_ROWS;
 * in s->logits until the next call. */
const float *logits(const Model *m, State *s, int first, int n);

/* One layer of forward(): x [T][dim] in s->x is replaced by the layer's output. `l` is the layer's
 * index in the KV cache. */
void layer_forward(const Config *c, const Layer *layer, State *s, int l, int T, int pos);

/* y [T][N] = x [T][K] W^T; a quantized layer quantizes x per token first (section 2). */
void linear(const Linear *w, const float *x, int T, float *y);

/* The integer dot product under it: acc[t] = sum_k s_group[k / 128] u_k a_tk for T tokens, T <= 8;
 * w [K/2] is a row of qweight, s_group [K/128] or NULL for ones, a [T][2][K/2] holds the even
 * columns of a token, then the odd ones. */
typedef void DotU4(const uint8_t *w, const uint8_t *s_group, const int8_t *a, int K, int T,
                   int32_t *acc);

/* The i-th of its versions (0 is plain C) and its name; NULL if there is none or the processor
 * lacks it. dot_u4_best() is what linear() uses. */
DotU4 *dot_u4_kernel(int i, const char **name);
DotU4 *dot_u4_best(const char **name);

/* acc [T][N] = a [T][K] w8^T, the accumulators of a quantized layer, by one of those versions. */
void accumulators(const Linear *w, const int8_t *a, int T, DotU4 *dot_u4, int32_t *acc);

/* y_i = x_i / sqrt(mean(x^2) + eps) * weight_i for each row; x, y [T][dim], may be the same. */
void rmsnorm(const float *x, const float *weight, int T, int dim, float eps, float *y);

/* Angles of LLaMA 3's rotary embedding in double: cos and sin of position pos, [head_dim/2][2]. */
void rope_angles(const Config *c, int pos, float *cos_sin);

/* Perplexity of tokens [n] in consecutive windows of `length` (the last, shorter one is left out):
 * exp of the mean over windows of the mean negative log-likelihood of the length - 1 tokens after
 * the first. Sets *windows; at most max_windows are run (0: all). NaN if there is no window.
 * progress(done, total), if not NULL, is called after each window. */
double perplexity(const Model *m, const int *tokens, int n, int length, int max_windows,
                  int *windows, void (*progress)(int done, int total));

/* Reads a whole text file, malloc'ed with a NUL behind. */
char *read_text(const char *path, size_t *bytes);

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

#ifdef __cplusplus
}
#endif
#endif
