/* quantize: a 16-bit LLaMA 3.1 becomes a W4A8 model.bin. Top to bottom:
 *
 *   1 options · 2 what is read: calibration, evaluation, QQQ's format · the writer · 3 what is
 *   written: a model.bin, or a directory for other engines · 4 the loop over the layers and its
 *   report · main
 *
 * What is done to a layer stands in qqq.c, section 3. The report goes to stdout, progress and
 * errors to stderr. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qqq.h"

/* ---- 1: options ---------------------------------------------------------------------------- */

static const char usage[] =
    "usage: ./quantize MODEL [OUT] [options]\n"
    "\n"
    "MODEL is a Hugging Face directory or a 16-bit model.bin; a W4A8 model.bin with -x. OUT is\n"
    "MODEL's name with -w4a8.bin, -vllm or -qqq if not given.\n"
    "\n"
    "  -g 128|-1      group size; -1: per channel (128)\n"
    "  -b rtn|gptq    how weights are rounded: to nearest, or with compensation (gptq)\n"
    "  -a 0|1         adaptive smoothing (1)\n"
    "  -r 0|1         rotation (1); it unties a tied head\n"
    "  -m 0|1         mse: ranges searched for the least squared output error, or max|w| (1)\n"
    "  -o 0|1         columns in the order of their activations, in GPTQ (1)\n"
    "  -q 8|16        bits of lm_head (16)\n"
    "  -c FILE        calibration text (the embedded data/calib.txt); -: stdin\n"
    "  -n WINDOWS     of it to use (as many as it gives, at most 128)\n"
    "  -l TOKENS      of each window (2048)\n"
    "  -s SEED        of the rotation (0)\n"
    "  -e FILE        print the perplexity on a text, before and after, in windows of 2048\n"
    "  -f             convert only: write an unquantized model.bin\n"
    "  -x vllm|qqq    write a directory for other engines: compressed-tensors, which vLLM, SGLang\n"
    "                 and transformers read, or the QQQ repository's format, for GPTQModel\n"
    "  -d cpu|cuda    device (cuda, if there is a GPU)\n"
    "  -M GB          GPU memory to use at most (all that is free)\n"
    "  -h, --help     this help; --version\n";

typedef enum { MODEL_BIN, VLLM, QQQ } Format;

typedef struct {
    char *model, *out;
    Format format;
    char quantizes; // an option that says how to quantize, 0: none was given
    Method method;
    bool rotate, convert;
    int head_bits; // of lm_head
    char *calibration;
    int n_windows, length; // n_windows 0: not given
    uint64_t seed;
    const char *eval; // NULL: none
    Device device;
    size_t most_memory; // bytes on the GPU, 0: not given
    bool gpu;           // it runs there
    char where[300];    // on the GPU or the CPU, and why
} Options;

static int without_slashes(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    return n;
}

/* While a linear is calibrated and before it is quantized: which one, and when all will be. */
static void show_linear(int l, int linear, int n_layers) {
    static double start;
    int done = l * N_LINEARS + linear, total = n_layers * N_LINEARS;
    char what[64];
    snprintf(what, sizeof what, "linears: layer %d, %s", l, linear_names[linear]);
    if (!start) start = seconds();
    show_progress(what, done, total, done ? (seconds() - start) * (total - done) / done : -1);
}

static Options parse_options(int argc, char **argv) {
    Options o = {.method = {.group_size = GROUP,
                            .smooth = true,
                            .mse = true,
                            .gptq = true,
                            .act_order = true,
                            .progress = show_linear},
                 .rotate = true,
                 .head_bits = 16,
                 .length = 2048};
    Method *m = &o.method;
    for (int i = 1; i < argc; i++) {
        // 1. MODEL, OUT, or an option and its value.
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.out) die_usage("%s: MODEL and OUT are given already", arg);
            *(o.model ? &o.out : &o.model) = format_text("%s", arg);
            continue;
        }
        char flag = arg[1];
        if (!strcmp(arg, "-h") || !strcmp(arg, "--help")) print_and_exit(usage);
        if (!strcmp(arg, "--version")) print_and_exit("quantize, QQQ in C 1.0\n");
        if (!flag || arg[2] || !strchr("gbarmoqcnlsefxdM", flag))
            die_usage("unknown option %s; ./quantize -h lists them all", arg);
        const char *value = flag == 'f' ? "" : argv[++i];
        if (!value) die_usage("-%c: its value is missing; ./quantize -h says which", flag);
        // 2. How to quantize.
        if (flag == 'g') m->group_size = parse_choice(flag, value, "-1", "128") ? GROUP : -1;
        if (flag == 'b') m->gptq = parse_choice(flag, value, "rtn", "gptq");
        if (flag == 'a') m->smooth = parse_integer(flag, value, 0, 1);
        if (flag == 'r') o.rotate = parse_integer(flag, value, 0, 1);
        if (flag == 'm') m->mse = parse_integer(flag, value, 0, 1);
        if (flag == 'o') m->act_order = parse_integer(flag, value, 0, 1);
        if (flag == 'q') o.head_bits = parse_choice(flag, value, "8", "16") ? 16 : 8;
        if (flag == 'c') o.calibration = format_text("%s", value);
        if (flag == 'n') o.n_windows = parse_integer(flag, value, 1, 1 << 20);
        if (flag == 'l') o.length = parse_integer(flag, value, 2, 1 << 20);
        if (flag == 's') o.seed = parse_integer(flag, value, 0, LLONG_MAX);
        // 3. What else to do, and where.
        if (flag == 'e') o.eval = value;
        if (flag == 'f') o.convert = true;
        if (strchr("gbarmoqcnls", flag)) o.quantizes = flag;
        if (flag == 'x') o.format = parse_choice(flag, value, "vllm", "qqq") ? QQQ : VLLM;
        if (flag == 'd') o.device = parse_choice(flag, value, "cpu", "cuda") ? CUDA : CPU;
        if (flag == 'M') o.most_memory = parse_number(flag, value, 0.1, 1e6) * 1e9;
    }
    // 4. What must be there, and what does not go together.
    if (!o.model) die_usage("no MODEL; ./quantize -h shows how");
    if (o.format && (o.convert || o.eval))
        die_usage("-x writes a W4A8 directory: -f and -e are for a model.bin");
    if (o.out && !*o.out) die_usage("OUT is empty, expected the name of a file");
    if (o.out && o.format) o.out[without_slashes(o.out)] = 0;
    const char *texts[] = {o.calibration, o.eval};
    for (int i = 0; i < 2; i++)
        if (texts[i] && strcmp(texts[i], "-") && access(texts[i], R_OK))
            die("%s: %s", texts[i], strerror(errno));
    if (!o.calibration) o.calibration = beside_program("data/calib.txt");
    return o;
}

/* ---- 2: what is read ----------------------------------------------------------------------- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Tokens [*n_windows][o->length] of the calibration text, with one BOS in front of the first; NULL
 * and no windows if nothing needs them. Fewer than 4 tokens for each input of the widest linear
 * make GPTQ no better than rounding to nearest: README has the figures of data/tiny. */
static int *calibration_tokens(const Options *o, const Tokenizer *tokenizer, const Config *c,
                               int *n_windows) {
    *n_windows = 0;
    if (!o->method.gptq && !o->method.mse && !o->method.smooth) return NULL;
    if (o->length > c->max_context)
        die_usage("-l %d: the context of %s is %d", o->length, o->model, c->max_context);
    int n, length = o->length, *tokens = read_tokens(tokenizer, c, o->calibration, &length, &n);
    int available = n / o->length;
    *n_windows = o->n_windows ? o->n_windows : available < 128 ? available : 128;
    if (*n_windows > available || available == 0)
        die("%s: its %d tokens give %d windows of %d, %d are needed", o->calibration, n, available,
            o->length, *n_windows ? *n_windows : 1);
    int needed = 4 * (c->hidden_dim > c->dim ? c->hidden_dim : c->dim);
    if (o->method.gptq && *n_windows * o->length < needed)
        note("%d tokens of calibration are few: with less than %d the model can be worse than "
             "rounded to nearest (-b rtn)",
             *n_windows * o->length, needed);
    return tokens;
}

/* The text of -e. */
typedef struct {
    int *tokens; // [n], NULL without -e
    int n, length;
} Evaluation;

static void evaluate(const Options *o, const Checkpoint *c, const Model *m, const char *label,
                     const Evaluation *text) {
    Engine *e = engine_new(m, o->gpu, 16);
    print_perplexity(c, e, label, text->tokens, text->n, text->length);
    e->free(e);
}

/* ---- checkpoints of the QQQ repository and of GPTQModel (format "qqq") ----
 *
 *   NAME.B         I32 [K/16][2 N]  4-bit codes in the order in which QQQ's kernel reads them
 *   NAME.s_channel F32 [1][N]       permuted, and divided by 16 per channel
 *   NAME.s_group   F16 [K/128][N]   permuted; per channel, and where K is 128, [0]
 *
 * The codes as [K][N] are cut into tiles of 16 x 16, those of the same 16 input channels side by
 * side, each row by row; every 1024 codes (4 tiles) are permuted; eight are a word, the first in
 * its lowest bits. A code is q + 8 with groups; per channel it is q mod 16, from which the kernel
 * makes 16 q: hence the 16. Source: https://github.com/HandH1998/QQQ, whose kernel descends from
 * Marlin (arXiv 2408.11743). */

// Where the i-th of a run comes from.
typedef struct {
    int n[1024], k[1024]; // within 64 output and 16 input channels
    int s_channel[32], s_group[64];
} QqqOrder;

static QqqOrder qqq_order(bool groups) {
    static const int nibbles[2][8] = {{4, 0, 5, 1, 6, 2, 7, 3}, {0, 2, 4, 6, 1, 3, 5, 7}};
    static const int pairs[8] = {0, 1, 8, 9, 16, 17, 24, 25};
    QqqOrder order;
    for (int i = 0; i < 1024; i++) { // a thread of a warp has 4 x 2 codes of each tile
        int from = i / 8 * 8 + nibbles[groups][i % 8];
        int thread = from / 32, tile = from / 8 % 4, half = from / 4 % 2, r = from % 4;
        order.n[i] = 16 * tile + 8 * half + thread / 4;
        order.k[i] = 4 * (thread % 4) + r;
    }
    for (int i = 0; i < 32; i++) order.s_channel[i] = 2 * (i / 8) + pairs[i % 8];
    for (int i = 0; i < 64; i++) order.s_group[i] = i / 8 + 8 * (i % 8);
    return order;
}

/* A quantized linear as the QQQ repository's kernel reads it: B [K/16][2 N] 32-bit words, s_channel
 * [N], s_group [K/128][N] halves (untouched per channel). N is a multiple of 64, K of 64 (128). */
static void qqq_pack(const Linear *l, uint8_t *B, float *s_channel, uint16_t *s_group) {
    size_t N = l->N, K = l->K;
    bool groups = l->s_group && K > GROUP;
    QqqOrder order = qqq_order(groups);
    memset(B, 0, N * K / 2);
#pragma omp parallel for
    for (size_t run = 0; run < N * K / 1024; run++)
        for (size_t i = 0; i < 1024; i++) {
            size_t n = run % (N / 64) * 64 + order.n[i], k = run / (N / 64) * 16 + order.k[i];
            int u = l->qweight[n * (K / 2) + k / 2] >> 4 * (k % 2) & 15;
            B[run * 512 + i / 2] |= (groups ? u : u ^ 8) << 4 * (i % 2); // (q + 8) ^ 8 = q mod 16
        }
    for (size_t i = 0; i < N; i++) {
        size_t n = i / 32 * 32 + order.s_channel[i % 32];
        float scale = l->s_group && !groups ? l->s_channel[n] * l->s_group[n] : l->s_channel[n];
        s_channel[i] = groups ? scale : scale / 16;
    }
    for (size_t i = 0; groups && i < N * K / GROUP; i++) {
        size_t n = i % N / 64 * 64 + order.s_group[i % 64];
        size_t from = n * (K / GROUP) + i / N;
        s_group[i] = float_to_f16(l->s_group[from]);
    }
}

/* The tensor NAME.suffix, which must be of this dtype and shape. */
static Tensor *find_part(const Checkpoint *c, const char *name, const char *suffix, DType dtype,
                         int rows, int columns) {
    char *full = format_text("%s%s", name, suffix);
    const Tensor *t = checkpoint_find(c, full);
    if (!t) die("%s: tensor %s is missing", c->path, full);
    bool ok = t->dtype == dtype && t->n_dims == (columns ? 2 : 1);
    if (!ok || t->shape[0] != rows || t->shape[1] != columns)
        die("%s: tensor %s is no %s [%d][%d]", t->path, full, dtype_name(dtype), rows, columns);
    free(full);
    return (Tensor *)t;
}

/* Whether a model.bin can hold all group scales: whole numbers, 1 to 15. QQQ's own are halves. */
static bool whole_scales(const Checkpoint *c) {
    bool whole = true;
    for (int t = 0; t < c->n_tensors; t++) {
        const Tensor *group = &c->tensors[t];
        const char *suffix = strrchr(group->name, '.');
        if (!suffix || strcmp(suffix, ".s_group") || group->dtype != F16) continue;
        for (size_t i = 0; i < group->bytes / 2; i++) {
            float scale;
            floats(group->data, F16, i, 1, &scale);
            if (!isfinite(scale)) die("%s: tensor %s holds %g", group->path, group->name, scale);
            whole = whole && scale >= 1 && scale <= 15 && scale == rintf(scale);
        }
    }
    return whole;
}

/* The inverse: B [K/16][2 N] and the scales beside it become, in memory of their own and but for
 * their names, the tensors of a model.bin; or, unless `whole`, F16 weights as QQQ's kernel has
 * them: an int8, q s_group rounded, times s_channel. */
static void qqq_unpack(Checkpoint *c, Tensor *B, bool group_size, bool whole) {
    // 1. Its parts, and memory for what they become.
    char *name = format_text("%.*s", (int)strlen(B->name) - 2, B->name);
    size_t K = 16 * B->shape[0], N = B->shape[1] / 2, n_groups = group_size ? K / GROUP : 0;
    if (B->dtype != I32 || B->n_dims != 2 || N % 64 || K % (group_size ? GROUP : 64) ||
        N > 1 << 24 || K > 1 << 24)
        die("%s: tensor %s is no I32 [K / 16][2 N] with N a multiple of 64, K of %d", B->path,
            B->name, group_size ? GROUP : 64);
    bool groups = n_groups > 1; // one group has the layout of none
    Tensor *channel = find_part(c, name, ".s_channel", F32, 1, N), *group = NULL;
    if (group_size)
        group = find_part(c, name, ".s_group", F16, groups ? n_groups : 0, groups ? N : 0);
    free(name);
    size_t weight_bytes = whole ? N * K / 2 : N * K * 2;
    uint8_t *memory = checkpoint_memory(c, weight_bytes + N * sizeof(float) + N * n_groups);
    uint8_t *qweight = memory, *s_group = memory + weight_bytes + N * sizeof(float);
    float *s_channel = (void *)(memory + weight_bytes); // aligned: N is a multiple of 64
    float *scales = allocate(N * n_groups, sizeof *scales);

    // 2. The scales, in the order of the channels
    QqqOrder order = qqq_order(groups);
    for (size_t i = 0; i < N; i++) {
        float scale;
        floats(channel->data, F32, i, 1, &scale);
        s_channel[i / 32 * 32 + order.s_channel[i % 32]] = groups ? scale : scale * 16;
    }
    for (size_t i = 0; i < N * n_groups; i++) {
        size_t n = groups ? i % N / 64 * 64 + order.s_group[i % 64] : i;
        float *scale = &scales[n * n_groups + i / N];
        if (groups) floats(group->data, F16, i, 1, scale);
        else *scale = 1;
        s_group[n * n_groups + i / N] = whole ? *scale : 1;
    }

    // 3. The codes, or the weights that they are codes of.
    const uint8_t *codes = B->data;
    int lowest = 15;
#pragma omp parallel for reduction(min : lowest)
    for (size_t run = 0; run < N * K / 1024; run++) // no two share a byte of qweight
        for (size_t i = 0; i < 1024; i++) {
            size_t n = run % (N / 64) * 64 + order.n[i], k = run / (N / 64) * 16 + order.k[i];
            int code = codes[run * 512 + i / 2] >> 4 * (i % 2) & 15, u = groups ? code : code ^ 8;
            lowest = u < lowest ? u : lowest;
            if (whole) {
                qweight[n * (K / 2) + k / 2] |= u << 4 * (k % 2);
            } else {
                float w8 = rintf((u - 8) * scales[n * n_groups + k / GROUP]);
                ((uint16_t *)memory)[n * K + k] = float_to_f16(w8 * s_channel[n]);
            }
        }
    free(scales);
    if (!group_size && lowest == 0)
        die("%s: tensor %s holds the code -8, per channel -7 to 7 are expected", B->path, B->name);
    // 4. What takes the place of the parts.
    if (whole) {
        *B = (Tensor){B->name, U8, 2, {N, K / 2}, qweight, N * K / 2, B->path};
        *channel =
            (Tensor){channel->name, F32, 1, {N}, s_channel, N * sizeof(float), channel->path};
        if (group)
            *group = (Tensor){group->name, U8, 2, {N, n_groups}, s_group, N * n_groups, B->path};
    } else {
        *B = (Tensor){B->name, F16, 2, {N, K}, memory, weight_bytes, B->path};
        channel->n_dims = group->n_dims = 1,
        channel->dtype = group->dtype = U8; // no one reads them
    }
}

/* The root object without these keys [n] and with the text `more` before its closing brace: text,
 * malloc'ed. */
static char *json_without(const Json *j, const char *const *keys, int n, const char *more) {
    char *text;
    size_t text_bytes;
    FILE *out = open_memstream(&text, &text_bytes);
    if (!out) die("out of memory");
    const char *separator = "{\n  ";
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        int i = 0;
        while (i < n && !json_is(j, key, keys[i])) i++;
        if (i < n) continue;
        size_t name_bytes, bytes;
        const char *name = json_source(j, key, &name_bytes),
                   *value = json_source(j, key + 1, &bytes);
        fprintf(out, "%s%.*s: %.*s", separator, (int)name_bytes, name, (int)bytes, value);
        separator = ",\n  ";
    }
    fprintf(out, "%s\n}\n", more);
    if (ferror(out) || fclose(out) || !text) die("out of memory");
    return text;
}

/* Unpacks an opened directory in the QQQ repository's format into memory: it then looks like a
 * model.bin. Other checkpoints stay as they are. */
static void qqq_import(Checkpoint *c) {
    char *name = format_text("%s: config.json", c->path);
    Json *j = json_parse(name, c->config, strlen(c->config));
    int q = json_get(j, 0, "quantization_config");
    if (!c->quantization && json_is(j, json_get(j, q, "quant_method"), "qqq")) {
        // 1. Which kind it is.
        double bits = 0, group_size = 0;
        json_number(j, json_get(j, q, json_get(j, q, "bits") < 0 ? "wbits" : "bits"), &bits);
        json_number(j, json_get(j, q, "group_size"), &group_size);
        if (bits != 4 || (group_size != -1 && group_size != GROUP))
            die("%s: bits %g, group_size %g; expected 4 bits, group_size -1 or %d", name, bits,
                group_size, GROUP);
        bool whole = group_size < 0 || whole_scales(c);
        if (!whole)
            note("%s: group scales that are no whole numbers from 1 to 15: read as 16-bit weights",
                 c->path);
        // 2. Each linear, then their names: unpacking still searches for the old ones.
        for (int renames = 0; renames < 2; renames++)
            for (int i = 0; i < c->n_tensors; i++) {
                Tensor *t = &c->tensors[i];
                char *suffix = strrchr(t->name, '.'), *old = t->name;
                if (!suffix || strcmp(suffix, ".B")) continue;
                if (!renames) {
                    qqq_unpack(c, t, group_size > 0, whole);
                    continue;
                }
                t->name =
                    format_text(whole ? "%.*s.qweight" : "%.*s.weight", (int)(suffix - old), old);
                free(old);
            }
        checkpoint_sort(c);
        // 3. How it was made, and a config without it.
        if (whole)
            c->quantization =
                format_text("{\"bits\":4,\"group_size\":%d,\"method\":\"qqq\"}", (int)group_size);
        char *config = json_without(j, (const char *[]){"quantization_config"}, 1, "");
        free(c->config);
        c->config = config;
    }
    json_free(j);
    free(name);
}

/* ---- the writer ---- */

/* A model being written, tensor by tensor: a model.bin, or a directory for other engines. It
 * appears whole or not at all, as an Output. */
typedef struct {
    Output *out;
    int file, n;
    struct {
        char *name;
        size_t offset, bytes; // in the file
        bool written;
    } * slots; // [n] the tensors, all in `file` of `out`
    size_t bytes;
} Writer;

static void put_metadata(FILE *out, const char *key, const char *value) {
    if (!value) return;
    fprintf(out, ",\"%s\":", key);
    put_json_string(out, value);
}

static void put_tensor(FILE *out, const Tensor *t, size_t *offset) {
    fprintf(out, ",");
    put_json_string(out, t->name);
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(t->dtype));
    for (int i = 0; i < t->n_dims; i++) fprintf(out, i ? ",%lld" : "%lld", (long long)t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%zu,%zu]}", *offset, *offset + t->bytes);
    *offset += t->bytes;
}

/* Writes the header of the tensors [n], and notes the place of each in the file; `metadata` is a
 * JSON object. */
static void put_header(Writer *w, int file, const char *metadata, const Tensor *tensors, int n) {
    char *header;
    size_t length, data_bytes = 0;
    FILE *out = open_memstream(&header, &length);
    if (!out) die("out of memory");
    // 1. The entries, then spaces until the data starts at a multiple of 4096 bytes.
    fprintf(out, "{\"__metadata__\":%s", metadata);
    for (int i = 0; i < n; i++) put_tensor(out, &tensors[i], &data_bytes);
    fprintf(out, "}");
    while ((8 + ftell(out)) % 4096 && fputc(' ', out) == ' ') {
    }
    if (ferror(out) || fclose(out) || !header) die("out of memory");
    // 2. The length, little-endian, and the header behind it.
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint64_t)length >> 8 * i;
    output_write(w->out, file, prefix, 8, 0);
    output_write(w->out, file, header, length, 8);
    free(header);
    // 3. The places.
    w->file = file;
    w->slots = allocate(n, sizeof *w->slots);
    size_t offset = 8 + length;
    for (int i = 0; i < n; i++, offset += tensors[i - 1].bytes) {
        w->slots[i].name = format_text("%s", tensors[i].name);
        w->slots[i].offset = offset;
        w->slots[i].bytes = tensors[i].bytes;
    }
    w->n = n;
    w->bytes += offset;
}

/* Writes the data [bytes] of one of the tensors; in any order, each exactly once. */
static void writer_put(Writer *w, const char *name, const void *data, size_t bytes) {
    int i = 0;
    while (i < w->n && strcmp(w->slots[i].name, name)) i++;
    if (i == w->n || w->slots[i].written || w->slots[i].bytes != bytes)
        die("tensor %s with %zu bytes was not announced", name, bytes);
    output_write(w->out, w->file, data, bytes, w->slots[i].offset);
    w->slots[i].written = true;
}

static void writer_text(Writer *w, const char *name, const char *text, size_t bytes) {
    output_write(w->out, output_add(w->out, name), text, bytes, 0);
    w->bytes += bytes;
}

/* The order of the tensors in their file: whole multiples of 256 bytes first, which keep each other
 * aligned; then the small rest by size of element, for the same reason; texts last. */
static int rank(const Tensor *t) {
    if (t->dtype == U8 && t->n_dims == 1) return 5;
    if (t->bytes % 256 == 0) return 0;
    size_t size = dtype_size(t->dtype);
    return size == 8 ? 1 : size == 4 ? 2 : size == 2 ? 3 : 4;
}

static Tensor *in_file_order(const Tensor *tensors, int n) {
    Tensor *ordered = allocate(n + 1, sizeof *ordered);
    for (int r = 0, m = 0; r <= 5; r++)
        for (int i = 0; i < n; i++)
            if (rank(&tensors[i]) == r) ordered[m++] = tensors[i];
    return ordered;
}

/* The files that a model carries along, tokenizer.json first, as U8 tensors; returns how many. */
static int checkpoint_texts(const Checkpoint *c, Tensor texts[1 + N_CHAT_FILES]) {
    int n = 0;
    int64_t bytes = c->tokenizer_bytes;
    if (c->tokenizer)
        texts[n++] = (Tensor){"tokenizer.json", U8, 1, {bytes}, c->tokenizer, bytes, NULL};
    for (int i = 0; i < N_CHAT_FILES; i++)
        if (c->chat_files[i].data) texts[n++] = c->chat_files[i];
    return n;
}

/* Starts the model.bin `path` with the header for tensors [n], whose data is not read. In the file
 * those of a multiple of 256 bytes come first, which aligns them, then the small rest by size of
 * element, each in the order given. The strings of `c` go to __metadata__ and its texts to U8
 * tensors of their names; `quantization` may be NULL. A link as `path` is followed. */
static Writer *writer_open(const char *path, const Checkpoint *c, const char *quantization,
                           const Tensor *tensors, int n) {
    // 1. The texts of the model come behind the tensors.
    Tensor texts[1 + N_CHAT_FILES], *all = in_file_order(tensors, n);
    int n_texts = checkpoint_texts(c, texts);
    all = realloc(all, (n + n_texts + 1) * sizeof *all);
    if (!all) die("out of memory");
    memcpy(all + n, texts, n_texts * sizeof *all);
    // 2. The metadata says what the file is.
    char *metadata;
    size_t bytes;
    FILE *out = open_memstream(&metadata, &bytes);
    if (!out) die("out of memory");
    fprintf(out, "{\"format\":\"qqq\",\"version\":\"1\"");
    put_metadata(out, "quantization", quantization);
    put_metadata(out, "config", c->config);
    put_metadata(out, "generation_config", c->generation_config);
    fprintf(out, "}");
    if (ferror(out) || fclose(out) || !metadata) die("out of memory");
    // 3. The header and the texts are written, the tensors follow by writer_put().
    Writer *w = allocate(1, sizeof *w);
    w->out = output_open(path, false);
    put_header(w, 0, metadata, all, n + n_texts);
    for (int i = 0; i < n_texts; i++) writer_put(w, texts[i].name, texts[i].data, texts[i].bytes);
    free(metadata);
    free(all);
    return w;
}

/* Starts the directory `path`, which must not exist or be empty, with tensors [n] in its
 * model.safetensors. writer_text() adds a file to it. */
static Writer *writer_open_directory(const char *path, const Tensor *tensors, int n) {
    Writer *w = allocate(1, sizeof *w);
    w->out = output_open(path, true);
    Tensor *ordered = in_file_order(tensors, n);
    put_header(w, output_add(w->out, "model.safetensors"), "{\"format\":\"pt\"}", ordered, n);
    free(ordered);
    return w;
}

/* Puts the model in its place and frees the writer. Returns its bytes. */
static size_t writer_close(Writer *w) {
    for (int i = 0; i < w->n; i++) {
        if (!w->slots[i].written) die("tensor %s is missing", w->slots[i].name);
        free(w->slots[i].name);
    }
    output_close(w->out);
    size_t bytes = w->bytes;
    free(w->slots);
    free(w);
    return bytes;
}

/* ---- 3: what is written -------------------------------------------------------------------- */

/* How the file was made, for its metadata. */
static char *describe(const Options *o, int windows) {
    const Method *m = &o->method;
    char *text;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) die("out of memory");
    fprintf(out,
            "{\"bits\":4,\"group_size\":%d,\"method\":\"%s\",\"smooth\":%d,\"rotate\":%d,"
            "\"seed\":%llu,\"mse\":%d,\"act_order\":%d,\"lm_head_bits\":%d,\"windows\":%d,"
            "\"length\":%d,\"calibration\":",
            m->group_size, m->gptq ? "gptq" : "rtn", m->smooth, o->rotate,
            (unsigned long long)o->seed, m->mse, m->act_order, o->head_bits, windows, o->length);
    if (windows) put_json_string(out, base_name(o->calibration));
    else fprintf(out, "null");
    fprintf(out, "}");
    if (ferror(out) || fclose(out) || !text) die("out of memory");
    return text;
}

/* NAME-w4a8.bin, NAME.bin if it is only converted, or the directory NAME-vllm or NAME-qqq, in the
 * current directory. NAME is MODEL's; a directory's when links are resolved; and in a Hugging Face
 * cache, models--ORGANIZATION--NAME/snapshots/REVISION, that NAME. */
static char *default_out(const Options *o, const char *model) {
    static const char *const endings[] = {"-w4a8.bin", "-vllm", "-qqq"};
    struct stat st;
    bool directory = !stat(model, &st) && S_ISDIR(st.st_mode);
    char *path = directory ? realpath(model, NULL) : format_text("%s", model);
    if (!path) die("%s: %s", model, strerror(errno));
    char *cache = strstr(path, "/models--"), *end = cache ? strstr(cache, "/snapshots/") : NULL;
    if (end) *end = 0;
    const char *name = base_name(path);
    for (const char *next; end && (next = strstr(name, "--"));) name = next + 2;
    size_t n = strlen(name);
    if (n > 4 && !strcmp(name + n - 4, ".bin")) n -= 4;
    char *out = format_text("%.*s%s", (int)n, name, o->convert ? ".bin" : endings[o->format]);
    free(path);
    return out;
}

/* OUT may replace a file, but none that is read here, under any name; for -x it may be an empty
 * directory. */
static void check_out(const Options *o, const Checkpoint *c) {
    struct stat out;
    if (stat(o->out, &out)) return; // a new file
    if (same_file(o->out, c->path)) die("%s: OUT is MODEL", o->out);
    if (!o->format && !S_ISREG(out.st_mode)) die("%s: not a regular file", o->out);
    if (same_file(o->out, o->calibration)) die("%s: OUT is the calibration text", o->out);
    if (o->eval && same_file(o->out, o->eval)) die("%s: OUT is the text of -e", o->out);
    if (access(o->out, W_OK)) die("%s: cannot be written: %s", o->out, strerror(errno));
    if (checkpoint_has_file(c, o->out)) die("%s: OUT is a file of MODEL", o->out);
    if (!o->format) return;
    // The directory of -x is empty, and not the current one.
    DIR *directory = opendir(o->out);
    if (!directory) die("%s: %s", o->out, strerror(errno));
    if (same_file(o->out, ".")) die("%s: the current directory; -x makes a new one", o->out);
    for (const struct dirent *file; (file = readdir(directory));)
        if (strcmp(file->d_name, ".") && strcmp(file->d_name, ".."))
            die("%s: the directory is not empty; -x makes a new one", o->out);
    closedir(directory);
}

/* What of a model the method changes, beside the linears of the layers. */
static bool changes(const Options *o, const Parameter *p) {
    if (p->role == NORM && !strcmp(p->name, "model.norm.weight")) return o->rotate;
    if (p->role == NORM) return o->rotate || o->method.smooth;
    return p->role != WEIGHT || o->rotate || p->linear->dtype == I8;
}

/* The tensors of the file, and where they come from. */
typedef struct {
    const Options *o;
    const Checkpoint *checkpoint; // MODEL, which has those that do not change
    Tensor *list;                 // [n], without data
    int n;
    Writer *writer;
    size_t n_scales, n_small; // of an export; those that halves hold with fewer digits
} Out;

/* Announces the tensor NAME.suffix, or with an empty suffix NAME. */
static void add(Out *out, const char *name, const char *suffix, DType dtype, int64_t rows,
                int64_t columns) {
    out->list = realloc(out->list, (out->n + 1) * sizeof *out->list);
    if (!out->list) die("out of memory");
    out->list[out->n++] = (Tensor){.name = format_text("%s%s", name, suffix),
                                   .dtype = dtype,
                                   .n_dims = columns ? 2 : 1,
                                   .shape = {rows, columns},
                                   .bytes = dtype_size(dtype) * rows * (columns ? columns : 1)};
}

/* A half; a number beyond its range ends the program. */
static uint16_t half_of(float x, const char *name) {
    if (!(fabsf(x) < 65520)) die("%s holds %g, which no half can", name, x);
    return float_to_f16(x);
}

/* w [N][K], floats or an lm_head in 8 bits, as halves. */
static void put_f16(Writer *out, const char *name, const Linear *w) {
    size_t N = w->N, K = w->K;
    uint16_t *half = allocate(N * K, sizeof *half);
    float *row = allocate(K, sizeof *row);
    for (size_t n = 0; n < N; n++) {
        if (w->dtype != I8) floats(w->w, w->dtype, n * K, K, row);
        for (size_t k = 0; k < K; k++) {
            if (w->dtype == I8) row[k] = ((const int8_t *)w->w)[n * K + k] * w->s_channel[n];
            half[n * K + k] = half_of(row[k], name);
        }
    }
    writer_put(out, name, half, N * K * sizeof *half);
    free(half);
    free(row);
}

/* ---- export: a directory for other engines ----
 *
 * -x vllm is the format "pack-quantized" of compressed-tensors (https://github.com/vllm-project/
 * compressed-tensors), which vLLM, SGLang and transformers read. A linear NAME is
 *   NAME.weight_packed I32 [N][K/8]              the bytes of qweight
 *   NAME.weight_scale  F16 [N][K/128] or [N][1]  s_channel s_group
 *   NAME.weight_shape  I64 [2]                   N, K
 * -x qqq is that of the QQQ repository and of GPTQModel: qqq_pack() says how it looks. In both all
 * other tensors keep their names and are halves, config.json says what the linears are. ---- */

/* Ends the program if the format cannot hold linears of such shapes. */
static void check_shapes(const Options *o, const Config *c) {
    for (int k = 0; k < N_LINEARS; k++) {
        int N, K;
        linear_shape(c, k, &N, &K);
        if (o->format == VLLM && K % 8)
            die("%s: %s has %d input channels, -x vllm needs a multiple of 8", o->model,
                linear_names[k], K);
        if (o->format == QQQ && (K % 128 || N % 64) && (K % 64 || N % 128))
            die("%s: %s has %d input and %d output channels, -x qqq needs multiples of 128 and 64, "
                "or of 64 and 128",
                o->model, linear_names[k], K, N);
    }
}

/* "NAME." of the tensor "NAME.qweight", malloc'ed. */
static char *linear_name(const Parameter *p) {
    return format_text("%.*s", (int)(strrchr(p->name, '.') + 1 - p->name), p->name);
}

static void announce_export(Out *out, const Parameter *p) {
    if (p->role == NORM || p->role == WEIGHT) add(out, p->name, "", F16, p->rows, p->columns);
    if (p->role != QWEIGHT) return;
    int64_t N = p->linear->N, K = p->linear->K;
    bool groups = out->o->method.group_size > 0 && (out->o->format == VLLM || K > GROUP);
    char *name = linear_name(p);
    if (out->o->format == VLLM) {
        add(out, name, "weight_packed", I32, N, K / 8);
        add(out, name, "weight_scale", F16, N, groups ? K / GROUP : 1);
        add(out, name, "weight_shape", I64, 2, 0);
    } else {
        add(out, name, "B", I32, K / 16, 2 * N);
        add(out, name, "s_channel", F32, 1, N);
        add(out, name, "s_group", F16, groups ? K / GROUP : 0, groups ? N : 0);
    }
    free(name);
}

static void put_part(Out *out, const char *name, const char *suffix, const void *data,
                     size_t bytes) {
    char *full = format_text("%s%s", name, suffix);
    writer_put(out->writer, full, data, bytes);
    free(full);
}

static void put_vllm(Out *out, const char *name, const Linear *l) {
    size_t N = l->N, K = l->K, n = N * (l->s_group ? K / GROUP : 1);
    uint16_t *scales = allocate(n, sizeof *scales);
    char *scale_name = format_text("%sweight_scale", name);
    for (size_t i = 0; i < n; i++) {
        float scale = l->s_channel[i / (n / N)] * (l->s_group ? l->s_group[i] : 1);
        scales[i] = half_of(scale, scale_name);
        out->n_small += fabsf(scale) < 0x1p-14f;
    }
    out->n_scales += n;
    put_part(out, name, "weight_packed", l->qweight, N * K / 2);
    put_part(out, name, "weight_scale", scales, n * sizeof *scales);
    put_part(out, name, "weight_shape", (int64_t[]){N, K}, 2 * sizeof(int64_t));
    free(scale_name);
    free(scales);
}

static void put_qqq(Out *out, const char *name, const Linear *l) {
    size_t N = l->N, K = l->K, n = l->s_group && K > GROUP ? N * K / GROUP : 0;
    uint8_t *B = allocate(N, K / 2);
    float *s_channel = allocate(N, sizeof *s_channel);
    uint16_t *s_group = allocate(n, sizeof *s_group);
    qqq_pack(l, B, s_channel, s_group);
    put_part(out, name, "B", B, N * K / 2);
    put_part(out, name, "s_channel", s_channel, N * sizeof *s_channel);
    put_part(out, name, "s_group", s_group, n * sizeof *s_group);
    free(B);
    free(s_channel);
    free(s_group);
}

static void put_export(Out *out, const Parameter *p) {
    if (p->role == NORM)
        put_f16(out->writer, p->name, &(Linear){.N = 1, .K = p->rows, .w = *p->norm});
    if (p->role == WEIGHT) put_f16(out->writer, p->name, p->linear);
    if (p->role != QWEIGHT) return;
    char *name = linear_name(p);
    if (out->o->format == VLLM) put_vllm(out, name, p->linear);
    else put_qqq(out, name, p->linear);
    free(name);
}

/* config.json and the files beside it. */
static void put_files(Out *out, const Config *config) {
    const Checkpoint *c = out->checkpoint;
    static const char *const replaced[] = {"dtype", "torch_dtype", "tie_word_embeddings",
                                           "quantization_config"};
    bool groups = out->o->method.group_size > 0;
    char *how;
    if (out->o->format == VLLM)
        how = format_text(
            "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
            "\"quantization_status\":\"compressed\",\"ignore\":[\"lm_head\"],"
            "\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],\"format\":\"pack-"
            "quantized\","
            "\"weights\":{\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,%s,\"dynamic\":false},"
            "\"input_activations\":{\"num_bits\":8,\"type\":\"int\",\"symmetric\":true,"
            "\"strategy\":\"token\",\"group_size\":0,\"dynamic\":true}}}}",
            groups ? "\"strategy\":\"group\",\"group_size\":128" : "\"strategy\":\"channel\"");
    else
        how = format_text("{\"quant_method\":\"qqq\",\"checkpoint_format\":\"qqq\","
                          "\"method\":\"qqq\",\"format\":\"qqq\",\"bits\":4,\"group_size\":%d,"
                          "\"sym\":true,\"desc_act\":false,\"lm_head\":false,"
                          "\"pack_dtype\":\"int32\"}",
                          out->o->method.group_size);
    // float16, as the scales are: bfloat16 would round them by up to 0.4 %.
    char *more = format_text(",\n  \"dtype\": \"float16\",\n  \"torch_dtype\": \"float16\",\n"
                             "  \"tie_word_embeddings\": %s,\n  \"quantization_config\": %s",
                             config->tied ? "true" : "false", how);
    Json *j = json_parse(c->path, c->config, strlen(c->config));
    char *text = json_without(j, replaced, 4, more);
    writer_text(out->writer, "config.json", text, strlen(text));
    if (out->o->format == QQQ) writer_text(out->writer, "quantize_config.json", how, strlen(how));
    if (c->generation_config)
        writer_text(out->writer, "generation_config.json", c->generation_config,
                    strlen(c->generation_config));
    Tensor texts[1 + N_CHAT_FILES];
    int n = checkpoint_texts(c, texts);
    for (int i = 0; i < n; i++)
        writer_text(out->writer, texts[i].name, texts[i].data, texts[i].bytes);
    json_free(j);
    free(text);
    free(more);
    free(how);
}

/* ---- every tensor, in either ---- */

static void announce(void *to, const Parameter *p) {
    Out *out = to;
    if (out->o->format) {
        announce_export(out, p);
        return;
    }
    bool codes = p->role == QWEIGHT || p->role == S_GROUP;
    DType dtype = codes ? U8 : p->role == WEIGHT ? F16 : F32;
    if (p->role == WEIGHT && p->linear->dtype == I8) dtype = I8;
    if (!changes(out->o, p)) dtype = checkpoint_find(out->checkpoint, p->name)->dtype;
    add(out, p->name, "", dtype, p->rows, p->columns);
}

/* Norms and scales. */
static void put_floats(Writer *out, const char *name, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i])) die("%s would hold %g: are the weights damaged?", name, x[i]);
    writer_put(out, name, x, n * sizeof *x);
}

static void put(void *to, const Parameter *p) {
    Out *out = to;
    Writer *w = out->writer;
    size_t n = (size_t)p->rows * (p->columns ? p->columns : 1);
    const Tensor *t = checkpoint_find(out->checkpoint, p->name);
    if (out->o->format) put_export(out, p);
    else if (!changes(out->o, p)) writer_put(w, p->name, t->data, t->bytes);
    else if (p->role == NORM) put_floats(w, p->name, *p->norm, n);
    else if (p->role == WEIGHT && p->linear->dtype == I8) writer_put(w, p->name, p->linear->w, n);
    else if (p->role == WEIGHT) put_f16(w, p->name, p->linear);
    else if (p->role == QWEIGHT) writer_put(w, p->name, p->linear->qweight, n);
    else if (p->role == S_GROUP) writer_put(w, p->name, p->linear->s_group, n);
    else put_floats(w, p->name, p->linear->s_channel, n);
}

/* Starts the file or directory for the tensors of m. */
static void open_out(Out *out, Model *m, const char *quantization) {
    const Options *o = out->o;
    if (o->format) check_shapes(o, &m->config);
    for_each_tensor(m, -1, m->config.n_layers, announce, out);
    out->writer = o->format ? writer_open_directory(o->out, out->list, out->n)
                            : writer_open(o->out, out->checkpoint, quantization, out->list, out->n);
}

static size_t file_bytes(const Checkpoint *c) {
    size_t bytes = 0;
    for (int i = 0; i < c->n_tensors; i++) bytes += c->tensors[i].bytes;
    return bytes;
}

/* Finishes it, and says how much smaller the model is. */
static void close_out(Out *out, const Model *m) {
    const Options *o = out->o;
    size_t codes = 0, packed = 0;
    if (o->format) put_files(out, &m->config);
    printf("%s: %.1f MB -> %s: %.1f MB", o->model, file_bytes(out->checkpoint) / 1e6, o->out,
           writer_close(out->writer) / 1e6);
    for (int i = 0; i < out->n; i++) {
        const char *name = out->list[i].name, *suffix = strrchr(name, '.');
        bool is_code = !strcmp(suffix, ".qweight"), is_head = !strncmp(name, "lm_head.", 8);
        if (is_code) codes += 2 * out->list[i].bytes;
        if (is_code || (!is_head && !strncmp(suffix, ".s_", 3))) packed += out->list[i].bytes;
        free(out->list[i].name);
    }
    if (!o->format) printf(", %.3f bits per weight of the quantized linears", 8.0 * packed / codes);
    printf("\n");
    if (out->n_small)
        printf("%zu of %zu scales are below 6.1e-5, where halves have fewer digits\n", out->n_small,
               out->n_scales);
    free(out->list);
}

/* A model that is W4A8 already, in another format: a model.bin as a directory, or QQQ's as either.
 */
static void transcribe(Options *o, const Checkpoint *c, Model *m) {
    if (!o->format && checkpoint_has_file(c, o->model))
        die("%s: it is quantized already: %s", o->model, c->quantization);
    if (o->quantizes) die_usage("-%c: %s is quantized already", o->quantizes, o->model);
    o->method = (Method){.group_size = m->group_size}; // nothing changes
    Out out = {.o = o, .checkpoint = c};
    open_out(&out, m, c->quantization);
    describe_model(c, m, NULL);
    for_each_tensor(m, -1, m->config.n_layers, put, &out);
    close_out(&out, m);
}

/* Loads the model, and its tokenizer if it has one: what ./run would refuse is refused here. */
static Model *load(const Checkpoint *c, Tokenizer **tokenizer) {
    *tokenizer = c->tokenizer ? checkpoint_tokenizer(c) : NULL;
    return model_load(c);
}

static void convert(const Options *o, const Checkpoint *c) {
    if (c->quantization) die("%s: it is quantized already: %s", o->model, c->quantization);
    Tokenizer *tokenizer;
    model_free(load(c, &tokenizer));
    tokenizer_free(tokenizer);
    Tensor *list = allocate(c->n_tensors, sizeof *list);
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++) // but the texts, which writer_open() adds
        if (c->tensors[i].dtype != U8) list[n++] = c->tensors[i];
    Writer *out = writer_open(o->out, c, NULL, list, n);
    for (int i = 0; i < n; i++) writer_put(out, list[i].name, list[i].data, list[i].bytes);
    print_notes();
    printf("%s: %.1f MB\n", o->out, writer_close(out) / 1e6);
    free(list);
}

/* ---- 4: the loop over the layers ------------------------------------------------------------ */

static void print_errors(const Options *o, int l, const Smoothing found[N_SMOOTHED],
                         const Errors *errors) {
    const int smoothed_by[N_LINEARS] = {SMOOTH_QKV,     SMOOTH_QKV,     SMOOTH_QKV, -1,
                                        SMOOTH_GATE_UP, SMOOTH_GATE_UP, SMOOTH_DOWN};
    for (int k = 0; k < N_LINEARS; k++) {
        int by = o->method.smooth ? smoothed_by[k] : -1;
        printf("%5d  %-16s", l, linear_names[k]);
        if (by < 0) printf("  %8s  %9s", "-", "-");
        else printf("  %8d  %9.4g", found[by].n, found[by].t);
        if (isnan(errors[k].before)) printf("       -       -\n");
        else printf("  %6.4f  %6.4f\n", errors[k].before, errors[k].after);
    }
    fflush(stdout);
}

/* Layer by layer: read, rotate, smooth, quantize, write. */
static void quantize_layers(const Options *o, const Model *m, Model *made, const int *tokens,
                            int n_windows, Out *out) {
    const Config *c = &m->config;
    const Operations *operations = o->gpu ? gpu_operations() : &cpu_operations;
    show_linear(0, 0, c->n_layers);
    Quantizer *q = quantizer_new(c, &o->method, operations, &made->embedding, tokens, n_windows,
                                 o->length, o->most_memory);
    printf("                         smoothed             relative error\n");
    printf("layer  linear            channels  threshold  to nearest  final\n");
    for (int l = 0; l < c->n_layers; l++) {
        Smoothing found[N_SMOOTHED];
        Errors errors[N_LINEARS];
        quantize_layer(q, &m->layers[l], l, &made->layers[l], found, errors);
        if (isatty(STDOUT_FILENO)) fprintf(stderr, "\r\033[K"); // the bar makes room
        print_errors(o, l, found, errors);
        for_each_tensor(made, l, l, put, out);
        layer_free(&made->layers[l]);
    }
    show_progress("linears", c->n_layers * N_LINEARS, c->n_layers * N_LINEARS, 0);
    quantizer_report(q, stderr);
    quantizer_free(q);
}

/* Rotated, it is to be written as F16. */
static void require_f16(const Linear *w, const char *name) {
    const float *x = w->w;
    for (size_t i = 0; i < (size_t)w->N * w->K; i++)
        if (!(fabsf(x[i]) < 65520))
            die("tensor %s, rotated, holds %g, beyond F16's 65504 (-r 0 leaves rotation out)", name,
                x[i]);
}

static void show_rows(int done, int total) {
    show_progress("rows of the embedding and lm_head", done, total, -1);
}

/* The model that is made of m, its layers still empty and its ends, embedding and lm_head, m's. */
static Model *new_model(const Options *o, const Model *m) {
    const Config *c = &m->config;
    Model *made = allocate(1, sizeof *made);
    *made = *m;
    made->group_size = o->method.group_size;
    made->layers = allocate(c->n_layers, sizeof *made->layers);
    made->norm = memcpy(allocate(c->dim, sizeof(float)), m->norm, c->dim * sizeof(float));
    if (o->rotate || o->head_bits == 8) made->config.tied = false;
    if (o->head_bits == 8) made->lm_head.dtype = I8;
    return made;
}

/* Its ends, rotated and with -q 8 in 8 bits. */
static void make_ends(const Options *o, const Model *m, Model *made) {
    Linear head = m->lm_head;
    if (!o->rotate) {
        require_finite(&m->embedding, "model.embed_tokens");
        require_finite(&m->lm_head, "lm_head");
    } else {
        made->embedding = float_copy(&m->embedding, "model.embed_tokens");
        head = float_copy(&m->lm_head, "lm_head");
        rotate_ends(&made->embedding, &head, made->norm, o->method.signs, show_rows);
        require_f16(&made->embedding, "model.embed_tokens.weight");
        require_f16(&head, "lm_head.weight");
    }
    made->lm_head = o->head_bits == 8 ? quantize_bytes(&head) : head;
    if (o->rotate && o->head_bits == 8) linear_free(&head);
}

static void quantize(Options *o, const Checkpoint *c) {
    Tokenizer *tokenizer;
    Model *m = load(c, &tokenizer);
    const Config *config = &m->config;
    if (m->group_size) {
        transcribe(o, c, m);
        tokenizer_free(tokenizer);
        model_free(m);
        return;
    }
    // 1. What is needed besides MODEL is read or chosen before any work.
    check_group_size(o->model, config, o->method.group_size);
    o->gpu = choose_gpu(o->device, config, true, o->where, sizeof o->where);
    int8_t *signs = allocate(config->dim, 1);
    random_signs(o->seed, config->dim, signs);
    if (o->rotate) o->method.signs = signs;
    Model *made = new_model(o, m);
    int n_windows, *tokens = calibration_tokens(o, tokenizer, config, &n_windows);
    Evaluation text = {0};
    if (o->eval) text.tokens = read_tokens(tokenizer, config, o->eval, &text.length, &text.n);
    tokenizer_free(tokenizer);
    // 2. OUT is started, then the two ends of the model, its layers, its ends in the file.
    char *quantization = describe(o, n_windows);
    Out out = {.o = o, .checkpoint = c};
    open_out(&out, made, quantization);
    describe_model(c, m, o->where);
    if (n_windows)
        fprintf(stderr, "calibration: %s, %d windows of %d\n", base_name(o->calibration), n_windows,
                o->length);
    make_ends(o, m, made);
    if (o->eval) evaluate(o, c, m, "before: ", &text);
    quantize_layers(o, m, made, tokens, n_windows, &out);
    for_each_tensor(made, -1, -1, put, &out);
    for_each_tensor(made, config->n_layers, config->n_layers, put, &out);
    close_out(&out, made);
    free(quantization);
    free(tokens);
    free(signs);
    model_free(made);
    model_free(m);

    // 3. The file is read back and measured.
    if (!o->eval) return;
    Checkpoint *file = checkpoint_open(o->out);
    m = model_load(file);
    evaluate(o, file, m, "after: ", &text);
    free(text.tokens);
    model_free(m);
    checkpoint_close(file);
}

int main(int argc, char **argv) {
    open_standard_streams();
    Options o = parse_options(argc, argv);
    Checkpoint *c = checkpoint_open(o.model);
    qqq_import(c);
    if (!o.out) o.out = default_out(&o, c->path);
    check_out(&o, c);
    if (o.convert) convert(&o, c);
    else quantize(&o, c);
    checkpoint_close(c);
    flush_output();
    free(o.model);
    free(o.out);
    free(o.calibration);
    return 0;
}
