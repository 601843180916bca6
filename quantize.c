/* quantize: a 16-bit LLaMA 3.1 becomes a W4A8 model.bin. Top to bottom:
 *
 *   1 options · 2 what is read: calibration, evaluation · 3 what is written · 4 the loop over the
 *   layers and its report · main
 *
 * What is done to a layer stands in qqq.c, section 3. The report goes to stdout, progress and
 * errors to stderr. */
#define _GNU_SOURCE
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
    "MODEL is a Hugging Face directory or a 16-bit model.bin; OUT is MODEL's name with -w4a8.bin "
    "if\n"
    "not given.\n"
    "\n"
    "  -g 128|-1      group size; -1: per channel (128)\n"
    "  -b rtn|gptq    how weights are rounded: to nearest, or with compensation (gptq)\n"
    "  -a 0|1|2       adaptive smoothing; 2: with the published, exhaustive search (1)\n"
    "  -r 0|1         rotation (0)\n"
    "  -m 0|1         mse: ranges searched for the least squared output error, or max|w| (1)\n"
    "  -o 0|1         columns in the order of their activations, in GPTQ (1)\n"
    "  -c FILE        calibration text (the embedded data/calib.txt)\n"
    "  -n WINDOWS     of it to use (as many as it gives, at most 128)\n"
    "  -l TOKENS      of each window (2048)\n"
    "  -s SEED        of the rotation (0)\n"
    "  -e FILE        print the perplexity on a text, before and after, in windows of 2048\n"
    "  -f             convert only: write an unquantized model.bin\n"
    "  -d cpu|cuda    device (cuda, if there is a GPU)\n"
    "  -M GB          GPU memory to use at most (all that is free)\n"
    "  -h             this help\n";

typedef struct {
    char *model, *out;
    Method method;
    bool rotate, convert;
    char *calibration;
    int n_windows, length; // n_windows 0: not given
    uint64_t seed;
    const char *eval; // NULL: none
    Device device;
    size_t most_memory; // bytes on the GPU, 0: not given
    bool gpu;           // it runs there
    char where[300];    // on the GPU or the CPU, and why
} Options;

/* MODEL without a trailing slash or .bin, and -w4a8.bin, or .bin if it is only converted. */
static char *default_out(const char *model, bool convert) {
    size_t n = strlen(model);
    while (n > 1 && model[n - 1] == '/') n--;
    if (n > 4 && !strncmp(model + n - 4, ".bin", 4)) n -= 4;
    return format_text("%.*s%s", (int)n, model, convert ? ".bin" : "-w4a8.bin");
}

/* Before a linear is quantized: which one, and when all will be. */
static void show_linear(int l, int linear, int n_layers) {
    static double start;
    int done = l * N_LINEARS + linear, total = n_layers * N_LINEARS;
    char what[64];
    snprintf(what, sizeof what, "linears: layer %d, %s", l, linear_names[linear]);
    if (!done) start = seconds();
    show_progress(what, done, total, done ? (seconds() - start) * (total - done) / done : -1);
}

static Options parse_options(int argc, char **argv) {
    Options o = {.method = {.group_size = GROUP,
                            .smooth = 1,
                            .mse = true,
                            .gptq = true,
                            .act_order = true,
                            .progress = show_linear},
                 .length = 2048};
    Method *m = &o.method;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.out) die_usage("%s: MODEL and OUT are given already", arg);
            *(o.model ? &o.out : &o.model) = format_text("%s", arg);
            continue;
        }
        char flag = arg[1];
        if (!flag || arg[2] || !strchr("gbarmocnlsefdMh", flag))
            die_usage("unknown option %s; ./quantize -h lists them all", arg);
        const char *value = strchr("fh", flag) ? "" : argv[++i];
        if (!value) die_usage("-%c: its value is missing; ./quantize -h says which", flag);
        if (flag == 'g') m->group_size = parse_choice(flag, value, "-1", "128") ? GROUP : -1;
        if (flag == 'b') m->gptq = parse_choice(flag, value, "rtn", "gptq");
        if (flag == 'a') m->smooth = parse_integer(flag, value, 0, 2);
        if (flag == 'r') o.rotate = parse_integer(flag, value, 0, 1);
        if (flag == 'm') m->mse = parse_integer(flag, value, 0, 1);
        if (flag == 'o') m->act_order = parse_integer(flag, value, 0, 1);
        if (flag == 'c') o.calibration = format_text("%s", value);
        if (flag == 'n') o.n_windows = parse_integer(flag, value, 1, 1 << 20);
        if (flag == 'l') o.length = parse_integer(flag, value, 2, 1 << 20);
        if (flag == 's') o.seed = parse_integer(flag, value, 0, LLONG_MAX);
        if (flag == 'e') o.eval = value;
        if (flag == 'f') o.convert = true;
        if (flag == 'd') o.device = parse_choice(flag, value, "cpu", "cuda") ? CUDA : CPU;
        if (flag == 'M') o.most_memory = parse_number(flag, value, 0.1, 1e6) * 1e9;
        if (flag == 'h') {
            fputs(usage, stdout);
            exit(0);
        }
    }
    if (!o.model) die_usage("no MODEL; ./quantize -h shows how");
    if (o.device == CUDA && o.method.smooth == 2)
        die_usage("-a 2: the exhaustive search runs on the CPU only (-d cpu)");
    if (!o.out) o.out = default_out(o.model, o.convert);
    if (!o.calibration) o.calibration = beside_program("data/calib.txt");
    return o;
}

/* ---- 2: what is read ----------------------------------------------------------------------- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Tokens [*n_windows][o->length] of the calibration text, with one BOS in front of the first; NULL
 * and no windows if nothing needs them. */
static int *calibration_tokens(const Options *o, const Checkpoint *checkpoint, const Config *c,
                               int *n_windows) {
    *n_windows = 0;
    if (!o->method.gptq && !o->method.mse && !o->method.smooth) return NULL;
    if (o->length > c->max_context)
        die_usage("-l %d: the context of %s is %d", o->length, o->model, c->max_context);
    int n, *tokens = text_tokens(checkpoint, c->bos, o->calibration, &n);
    int available = n / o->length;
    *n_windows = o->n_windows ? o->n_windows : available < 128 ? available : 128;
    if (*n_windows > available || available == 0)
        die("%s: its %d tokens give %d windows of %d, %d are needed", o->calibration, n, available,
            o->length, *n_windows ? *n_windows : 1);
    for (int i = 0; i < *n_windows * o->length; i++)
        if (tokens[i] >= c->vocab_size)
            die("%s: token %d is outside the embedding", o->calibration, tokens[i]);
    fprintf(stderr, "calibration: %s, %d windows of %d, on %s\n", base_name(o->calibration),
            *n_windows, o->length, o->where);
    return tokens;
}

static void evaluate(const Options *o, const Checkpoint *c, const Model *m, const char *label) {
    Engine *e = engine_new(m, o->gpu, 16);
    print_perplexity(c, e, NULL, label, o->eval, 0);
    e->free(e);
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
            "\"seed\":%llu,\"mse\":%d,\"act_order\":%d,\"windows\":%d,\"length\":%d,"
            "\"calibration\":",
            m->group_size, m->gptq ? "gptq" : "rtn", m->smooth, o->rotate,
            (unsigned long long)o->seed, m->mse, m->act_order, windows, o->length);
    if (windows) put_json_string(out, base_name(o->calibration));
    else fprintf(out, "null");
    fprintf(out, "}");
    if (ferror(out) || fclose(out) || !text) die("out of memory");
    return text;
}

static void check_out(const Options *o, const Checkpoint *c) {
    struct stat out;
    if (stat(o->out, &out)) return; // a new file
    if (checkpoint_has_file(c, o->out)) die("%s: OUT is MODEL or a file of it", o->out);
    if (!S_ISREG(out.st_mode)) die("%s: not a regular file", o->out);
}

/* What of a model the method changes, beside the linears of the layers. */
static bool changes(const Options *o, const Parameter *p) {
    if (p->role == NORM && !strcmp(p->name, "model.norm.weight"))
        return o->method.gptq || o->rotate;
    return p->role == NORM ? o->rotate || o->method.smooth : p->role != WEIGHT || o->rotate;
}

/* The tensors of the file, and where they come from. */
typedef struct {
    const Options *o;
    const Checkpoint *checkpoint; // MODEL, which has those that do not change
    Tensor *list;                 // [n], without data
    int n;
    Writer *writer;
} Out;

static void announce(void *to, const Parameter *p) {
    Out *out = to;
    bool codes = p->role == QWEIGHT || p->role == S_GROUP;
    DType dtype = codes ? U8 : p->role == WEIGHT ? F16 : F32;
    if (!changes(out->o, p)) dtype = checkpoint_find(out->checkpoint, p->name)->dtype;
    out->list = realloc(out->list, (out->n + 1) * sizeof *out->list);
    if (!out->list) die("out of memory");
    out->list[out->n++] =
        (Tensor){.name = format_text("%s", p->name),
                 .dtype = dtype,
                 .n_dims = p->columns ? 2 : 1,
                 .shape = {p->rows, p->columns},
                 .bytes = dtype_size(dtype) * p->rows * (p->columns ? p->columns : 1)};
}

static void put_f16(Writer *out, const char *name, const Linear *w) {
    size_t n = (size_t)w->N * w->K;
    uint16_t *half = allocate(n, sizeof *half);
    for (size_t i = 0; i < n; i++) half[i] = float_to_f16(((const float *)w->w)[i]);
    writer_put(out, name, half, n * sizeof *half);
    free(half);
}

static void put(void *to, const Parameter *p) {
    const Out *out = to;
    Writer *w = out->writer;
    size_t n = (size_t)p->rows * (p->columns ? p->columns : 1);
    const Tensor *t = checkpoint_find(out->checkpoint, p->name);
    if (!changes(out->o, p)) writer_put(w, p->name, t->data, t->bytes);
    else if (p->role == NORM) writer_put(w, p->name, *p->norm, n * sizeof(float));
    else if (p->role == WEIGHT) put_f16(w, p->name, p->linear);
    else if (p->role == QWEIGHT) writer_put(w, p->name, p->linear->qweight, n);
    else if (p->role == S_GROUP) writer_put(w, p->name, p->linear->s_group, n);
    else writer_put(w, p->name, p->linear->s_channel, n * sizeof(float));
}

static void convert(const Options *o, const Checkpoint *c) {
    if (c->quantization) die("%s: it is quantized already: %s", o->model, c->quantization);
    Tensor *list = allocate(c->n_tensors, sizeof *list);
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++)
        if (strcmp(c->tensors[i].name, "tokenizer.json")) list[n++] = c->tensors[i];
    Writer *out = writer_open(o->out, c, NULL, list, n);
    for (int i = 0; i < n; i++) writer_put(out, list[i].name, list[i].data, list[i].bytes);
    printf("%s: %.1f MB\n", o->out, writer_close(out) / 1e6);
    free(list);
}

/* ---- 4: the loop over the layers ------------------------------------------------------------ */

static void print_errors(const Options *o, int l, const Smoothing found[3], const Errors *errors) {
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

/* Layer by layer: read, rotate, smooth, quantize, write. Returns the factor on the final norm. */
static double quantize_layers(const Options *o, const Model *m, Model *made, const int *tokens,
                              int n_windows, Out *out) {
    const Config *c = &m->config;
    Quantizer *cpu = NULL;
    GpuQuantizer *gpu = NULL;
    if (o->gpu)
        gpu = gpu_quantizer_new(c, &o->method, &made->embedding, tokens, n_windows, o->length,
                                o->most_memory);
    else cpu = quantizer_new(c, &o->method, &made->embedding, tokens, n_windows, o->length);
    printf("                         smoothed             relative error\n");
    printf("layer  linear            channels  threshold  to nearest  final\n");
    for (int l = 0; l < c->n_layers; l++) {
        Smoothing found[3];
        Errors errors[N_LINEARS];
        if (gpu) gpu_quantize_layer(gpu, &m->layers[l], l, &made->layers[l], found, errors);
        else quantize_layer(cpu, &m->layers[l], l, &made->layers[l], found, errors);
        if (isatty(STDOUT_FILENO)) fprintf(stderr, "\r\033[K"); // the bar makes room
        print_errors(o, l, found, errors);
        for_each_tensor(made, l, l, put, out);
        layer_free(&made->layers[l]);
    }
    show_progress("linears", c->n_layers * N_LINEARS, c->n_layers * N_LINEARS, 0);
    double xf = 0, xx = 0;
    if (o->method.gptq && gpu) gpu_final_scale(gpu, made->norm, &xf, &xx);
    else if (o->method.gptq) final_scale(cpu, made->norm, &xf, &xx);
    if (!(xx < INFINITY)) die("the last layer's output holds NaN or infinity");
    if (gpu) gpu_quantizer_report(gpu, stderr), gpu_quantizer_free(gpu);
    else quantizer_free(cpu);
    return xx > 0 ? xf / xx : 1;
}

static size_t file_bytes(const Checkpoint *c) {
    size_t bytes = 0;
    for (int i = 0; i < c->n_tensors; i++) bytes += c->tensors[i].bytes;
    return bytes;
}

/* The model that is made of m, its layers still empty: rotation changes its ends. */
static Model *new_model(const Options *o, const Model *m) {
    const Config *c = &m->config;
    Model *made = allocate(1, sizeof *made);
    *made = *m;
    made->group_size = o->method.group_size;
    made->layers = allocate(c->n_layers, sizeof *made->layers);
    made->norm = memcpy(allocate(c->dim, sizeof(float)), m->norm, c->dim * sizeof(float));
    if (!o->rotate) return made;
    made->config.tied = false;
    made->embedding = float_copy(&m->embedding, "model.embed_tokens");
    made->lm_head = float_copy(&m->lm_head, "lm_head");
    rotate_ends(&made->embedding, &made->lm_head, made->norm, o->method.signs);
    return made;
}

static void report(const Options *o, const Checkpoint *c, const Out *out, size_t bytes) {
    size_t codes = 0, packed = 0;
    for (int i = 0; i < out->n; i++) {
        const char *suffix = strrchr(out->list[i].name, '.');
        bool is_code = !strcmp(suffix, ".qweight");
        if (is_code) codes += 2 * out->list[i].bytes;
        if (is_code || !strncmp(suffix, ".s_", 3)) packed += out->list[i].bytes;
    }
    printf("%s: %.1f MB -> %s: %.1f MB, %.3f bits per weight of the quantized linears\n", o->model,
           file_bytes(c) / 1e6, o->out, bytes / 1e6, 8.0 * packed / codes);
}

static void quantize(Options *o, const Checkpoint *c) {
    Model *m = model_load(c);
    const Config *config = &m->config;
    if (m->group_size) die("%s: it is quantized already: %s", o->model, c->quantization);
    if (o->rotate) check_rotation(config);
    check_group_size(o->model, config, o->method.group_size);
    // The exhaustive search has no GPU version.
    o->gpu = choose_gpu(o->method.smooth == 2 ? CPU : o->device, config, true, o->where,
                        sizeof o->where);
    require_finite(&m->embedding, "model.embed_tokens");
    require_finite(&m->lm_head, "lm_head");
    if (o->eval) evaluate(o, c, m, "before: ");

    int8_t *signs = allocate(config->dim, 1);
    random_signs(o->seed, config->dim, signs);
    if (o->rotate) o->method.signs = signs;
    Model *made = new_model(o, m);
    int n_windows, *tokens = calibration_tokens(o, c, config, &n_windows);
    char *quantization = describe(o, n_windows);
    Out out = {.o = o, .checkpoint = c};
    for_each_tensor(made, -1, config->n_layers, announce, &out);
    out.writer = writer_open(o->out, c, quantization, out.list, out.n);
    describe_model(c, m, NULL);
    double scale = quantize_layers(o, m, made, tokens, n_windows, &out);
    for (int i = 0; i < config->dim; i++) made->norm[i] *= scale; // step 6
    if (o->method.gptq) printf("final norm times %.4f\n", scale);
    for_each_tensor(made, -1, -1, put, &out);
    for_each_tensor(made, config->n_layers, config->n_layers, put, &out);
    report(o, c, &out, writer_close(out.writer));
    for (int i = 0; i < out.n; i++) free(out.list[i].name);
    free(out.list);
    free(quantization);
    free(tokens);
    free(signs);
    model_free(made);
    model_free(m);

    if (!o->eval) return;
    Checkpoint *file = checkpoint_open(o->out);
    m = model_load(file);
    evaluate(o, file, m, "after: ");
    model_free(m);
    checkpoint_close(file);
}

int main(int argc, char **argv) {
    Options o = parse_options(argc, argv);
    Checkpoint *c = checkpoint_open(o.model);
    check_out(&o, c);
    if (o.convert) convert(&o, c);
    else quantize(&o, c);
    checkpoint_close(c);
    if (fflush(stdout) || ferror(stdout)) die("stdout: %s", strerror(errno));
    free(o.model);
    free(o.out);
    free(o.calibration);
    return 0;
}
