/* The plumbing of files.c: errors, options, JSON, model files. A first reader of QQQ may skip it.
 *
 * Unless its comment says otherwise, a function that cannot do its work ends the program through
 * die(). */
#ifndef FILES_H
#define FILES_H

#include "qqq.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- files.c 1: errors, options, progress, files that are written --------------------------- */

/* Prints "error: " and the message as one line on stderr, removes the file that is being written,
 * and exits with status 1; with status 2 for a command line that makes no sense. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void die_usage(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

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
 * Work ends with done == total; seconds_left < 0: not known. show_windows() is the progress of
 * perplexity(). */
void show_progress(const char *what, int done, int total, double seconds_left);
void show_windows(int done, int total);

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

/* ---- files.c 2: JSON ------------------------------------------------------------------------ */

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

/* The root object without these keys [n] and with the text `more` before its closing brace: text,
 * malloc'ed. */
char *json_without(const Json *json, const char *const *keys, int n, const char *more);

/* Writes `text` as a JSON string, quotes and escapes included. */
void put_json_string(FILE *out, const char *text);

/* ---- files.c 3: model files ------------------------------------------------------------------ */

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

/* What chat needs elsewhere: tokenizer_config.json, chat_template.jinja, special_tokens_map.json.
 */
enum { N_CHAT_FILES = 3 };
extern const char *const chat_file_names[N_CHAT_FILES];

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
 * model.bin, and checks the headers as strictly as the safetensors library does. A directory in the
 * QQQ repository's format is unpacked into memory and then looks like a model.bin. */
Checkpoint *checkpoint_open(const char *path);
void checkpoint_close(Checkpoint *c);

/* Where a model is: `path`, or if that is a Hugging Face cache's models--ORGANIZATION--NAME, the
 * directory in its snapshots/ that refs/main names, else the only one there. malloc'ed. */
char *model_path(const char *path);

/* Whether two paths lead to one file or directory; whether `path` is one of the files that the
 * checkpoint has mapped; whether it is the model itself, or a file that belongs to its directory.
 * All under any name. */
bool same_file(const char *a, const char *b);
bool checkpoint_has_file(const Checkpoint *c, const char *path);
bool checkpoint_owns(const Checkpoint *c, const char *path);

/* The tensor of that name, or NULL. */
const Tensor *checkpoint_find(const Checkpoint *c, const char *name);

/* Reads a whole text file, malloc'ed with a NUL behind. */
char *read_text(const char *path, size_t *bytes);

/* ---- files.c 4: the model in a file ---------------------------------------------------------- */

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

/* The checkpoint's tokenizer, or the end if it has none, or one of more than vocab_size tokens. */
Tokenizer *checkpoint_tokenizer(const Checkpoint *c, int vocab_size);

/* Token ids [*n] of a text file by the checkpoint's tokenizer, special tokens parsed; `bos` stands
 * in front unless it is -1. malloc'ed. */
int *text_tokens(const Checkpoint *c, int bos, const char *path, int *n);

/* perplexity() of a text file, with its BOS, printed as one line after `label`; length 0: 2048 or
 * the model's context, if less. Unless `where` is NULL the model is described before. */
void print_perplexity(const Checkpoint *c, Engine *e, const char *where, const char *label,
                      const char *path, int length);

/* ---- files.c 5: the QQQ repository's checkpoints --------------------------------------------- */

/* A quantized linear as the QQQ repository's kernel reads it: B [K/16][2 N] 32-bit words, s_channel
 * [N], s_group [K/128][N] halves (untouched per channel). N is a multiple of 64, K of 64 (128). */
void qqq_pack(const Linear *l, uint8_t *B, float *s_channel, uint16_t *s_group);

/* ---- files.c 6: the writer ------------------------------------------------------------------- */

/* The files that a model carries along, tokenizer.json first, as U8 tensors; returns how many. */
int checkpoint_texts(const Checkpoint *c, Tensor texts[1 + N_CHAT_FILES]);

/* A model being written, tensor by tensor: a model.bin, or a directory for other engines. It
 * appears whole or not at all, as an Output. */
typedef struct Writer Writer;

/* Starts the model.bin `path` with the header for tensors [n], whose data is not read. In the file
 * those of a multiple of 256 bytes come first, which aligns them, then the small rest by size of
 * element, each in the order given. The strings of `c` go to __metadata__ and its texts to U8
 * tensors of their names; `quantization` may be NULL. A link as `path` is followed. */
Writer *writer_open(const char *path, const Checkpoint *c, const char *quantization,
                    const Tensor *tensors, int n);

/* Starts the directory `path`, which must not exist or be empty, with tensors [n] in
 * model.safetensors; if they have more than shard_bytes, in shards of at most as many with an
 * index. writer_text() adds a file to it. */
Writer *writer_open_directory(const char *path, size_t shard_bytes, const Tensor *tensors, int n);
void writer_text(Writer *w, const char *name, const char *text, size_t bytes);

/* Writes the data [bytes] of one of the tensors; in any order, each exactly once. */
void writer_put(Writer *w, const char *name, const void *data, size_t bytes);

/* Puts the model in its place and frees the writer. Returns its bytes. */
size_t writer_close(Writer *w);

#ifdef __cplusplus
}
#endif
#endif
