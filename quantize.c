/* quantize: a 16-bit LLaMA 3.1 becomes a W4A8 model.bin. Top to bottom:
 *
 *   1 options · 2 calibration · 3 smoothing a layer · 4 quantizing a layer · 5 the whole model ·
 *   6 files · main
 *
 * The report goes to stdout, progress and errors to stderr. */
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
    "  -m 0|1         ranges searched for the least squared output error, or max|w| (1)\n"
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
    int group_size, smooth;
    bool gptq, rotate, search_ranges, act_order, convert;
    char *calibration;
    int n_windows, length; // n_windows 0: not given
    uint64_t seed;
    const char *eval; // NULL: none
    enum { ANY, CPU, CUDA } device;
    size_t most_memory;   // bytes on the GPU, 0: not given
    const char *gpu;      // its name; NULL: on the CPU
    const char *gpu_note; // why not, for want of a GPU
} Options;

static char *copy_text(const char *text) {
    return strcpy(allocate(strlen(text) + 1, 1), text);
}

/* MODEL without a trailing slash or .bin, and -w4a8.bin, or .bin if it is only converted. */
static char *default_out(const char *model, bool convert) {
    size_t n = strlen(model);
    while (n > 1 && model[n - 1] == '/') n--;
    if (n > 4 && !strncmp(model + n - 4, ".bin", 4)) n -= 4;
    const char *suffix = convert ? ".bin" : "-w4a8.bin";
    char *out = allocate(n + strlen(suffix) + 1, 1);
    memcpy(out, model, n);
    strcpy(out + n, suffix);
    return out;
}

/* The device that -d asks for: by default the GPU, if there is one that can do what is asked. */
static void find_gpu(Options *o) {
    if (o->device == CUDA && !gpu_quantizer_new)
        die_usage("-d cuda: this program was built without CUDA, only -d cpu works");
    if (o->device == CUDA && o->smooth == 2)
        die_usage("-a 2: the exhaustive search runs on the CPU only (-d cpu)");
    if (o->device == CPU || !gpu_quantizer_new || o->convert) return;
    o->gpu = gpu_name();
    if (!o->gpu && o->device == CUDA)
        die("-d cuda: found no GPU of compute capability 8.0 or newer");
    if (!o->gpu) o->gpu_note = "the CPU: no GPU found";
    if (o->smooth < 2) return;
    o->gpu = NULL;
    o->gpu_note = "the CPU: -a 2 has no GPU version";
}

static Options parse_options(int argc, char **argv) {
    Options o = {.group_size = GROUP,
                 .smooth = 1,
                 .gptq = true,
                 .search_ranges = true,
                 .act_order = true,
                 .length = 2048};
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.out) die_usage("%s: MODEL and OUT are given already", arg);
            *(o.model ? &o.out : &o.model) = copy_text(arg);
            continue;
        }
        char flag = arg[1];
        if (!flag || arg[2] || !strchr("gbarmocnlsefdMh", flag))
            die_usage("unknown option %s; ./quantize -h lists them all", arg);
        const char *value = strchr("fh", flag) ? "" : argv[++i];
        if (!value) die_usage("-%c: its value is missing; ./quantize -h says which", flag);
        if (flag == 'g') o.group_size = parse_choice(flag, value, "-1", "128") ? GROUP : -1;
        if (flag == 'b') o.gptq = parse_choice(flag, value, "rtn", "gptq");
        if (flag == 'a') o.smooth = parse_integer(flag, value, 0, 2);
        if (flag == 'r') o.rotate = parse_integer(flag, value, 0, 1);
        if (flag == 'm') o.search_ranges = parse_integer(flag, value, 0, 1);
        if (flag == 'o') o.act_order = parse_integer(flag, value, 0, 1);
        if (flag == 'c') o.calibration = copy_text(value);
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
    if (!o.out) o.out = default_out(o.model, o.convert);
    if (!o.calibration) o.calibration = beside_program("data/calib.txt");
    find_gpu(&o);
    return o;
}

/* ---- 2: calibration ------------------------------------------------------------------------ */

/* Two models run side by side over the calibration windows, layer by layer: the float model and the
 * one whose layers so far are quantized. */
typedef struct {
    const Options *o;
    const Config *config; // of one layer, for buffers
    int n_layers;
    int n, length;            // windows, tokens of each; n = 0: nothing needs calibration
    float *x_float, *x_quant; // [n][length][dim] the residual streams
    State *s_float, *s_quant; // buffers for one window
    GpuQuantizer *gpu;        // has all of that instead, on the GPU
} Calibration;

static float *window(const Calibration *c, float *x, int w) {
    return x + (size_t)w * c->length * c->config->dim;
}

/* The first windows of the text, with one BOS in front of the first: *used has their tokens, and
 * unless the GPU does that they are embedded. */
static Calibration calibration_new(const Options *o, const Model *m, const Linear *embedding,
                                   const Checkpoint *checkpoint, const Config *one_layer,
                                   int **used) {
    Calibration c = {
        .o = o, .config = one_layer, .n_layers = m->config.n_layers, .length = o->length};
    if (!o->gptq && !o->search_ranges && !o->smooth) return c;
    if (o->length > m->config.max_context)
        die_usage("-l %d: the context of %s is %d", o->length, o->model, m->config.max_context);
    int n_tokens, *tokens = text_tokens(checkpoint, m->config.bos, o->calibration, &n_tokens);
    int available = n_tokens / o->length;
    c.n = o->n_windows ? o->n_windows : available < 128 ? available : 128;
    if (c.n > available || available == 0)
        die("%s: its %d tokens give %d windows of %d, %d are needed", o->calibration, n_tokens,
            available, o->length, c.n ? c.n : 1);
    size_t dim = one_layer->dim, total = (size_t)c.n * c.length;
    for (size_t i = 0; i < total; i++)
        if (tokens[i] >= m->config.vocab_size)
            die("%s: token %d is outside the embedding", o->calibration, tokens[i]);
    *used = tokens;
    if (o->gpu) return c;
    c.x_float = allocate(total * dim, sizeof(float));
    c.x_quant = allocate(total * dim, sizeof(float));
    for (size_t i = 0; i < total; i++)
        floats(embedding->w, embedding->dtype, tokens[i] * dim, dim, c.x_float + i * dim);
    memcpy(c.x_quant, c.x_float, total * dim * sizeof(float));
    c.s_float = state_new(one_layer, c.length, c.length);
    c.s_quant = state_new(one_layer, c.length, c.length);
    return c;
}

static void calibration_free(Calibration *c) {
    if (c->gpu) gpu_quantizer_free(c->gpu);
    if (!c->n || c->gpu) return;
    free(c->x_float);
    free(c->x_quant);
    state_free(c->s_float);
    state_free(c->s_quant);
}

/* ---- 3: smoothing a layer ------------------------------------------------------------------ */

/* The float model's inputs of qkv, gate+up and down in the first windows. */
static void record_inputs(const Calibration *c, const Layer *layer, int windows, float *inputs[3]) {
    State *s = c->s_float;
    size_t dim = c->config->dim, hidden = c->config->hidden_dim, T = c->length;
    for (size_t w = 0; w < (size_t)windows; w++) {
        memcpy(s->x, window(c, c->x_float, w), T * dim * sizeof(float));
        rmsnorm(s->x, layer->attention_norm, T, dim, c->config->norm_eps, s->xb);
        memcpy(inputs[SMOOTH_QKV] + w * T * dim, s->xb, T * dim * sizeof(float));
        attention_block(c->config, layer, s, 0, T, 0);
        add_linear(&layer->o, s->att, T, s->xb, s->x);
        rmsnorm(s->x, layer->ffn_norm, T, dim, c->config->norm_eps, s->xb);
        memcpy(inputs[SMOOTH_GATE_UP] + w * T * dim, s->xb, T * dim * sizeof(float));
        ffn_block(c->config, layer, s, T);
        memcpy(inputs[SMOOTH_DOWN] + w * T * hidden, s->gate, T * hidden * sizeof(float));
    }
}

/* Finds the thresholds and folds their scales into the layer. s_down [hidden_dim] is what the
 * inputs of down are divided by. */
static void smooth(const Calibration *c, int l, Layer *layer, Smoothing found[3]) {
    int windows = c->n < SEARCH_WINDOWS ? c->n : SEARCH_WINDOWS, total = windows * c->length;
    int dims[3] = {c->config->dim, c->config->dim, c->config->hidden_dim};
    const Linear *linears[3] = {&layer->q, &layer->gate, &layer->down};
    int counts[3] = {3, 2, 1};
    float *inputs[3], *scales[3];
    for (int i = 0; i < 3; i++) inputs[i] = allocate((size_t)total * dims[i], sizeof(float));
    record_inputs(c, layer, windows, inputs);
    for (int i = 0; i < 3; i++) {
        size_t K = dims[i];
        float *max = allocate(K, sizeof *max);
        for (size_t j = 0; j < total * K; j++) {
            float magnitude = fabsf(inputs[i][j]);
            if (!(magnitude < INFINITY))
                die("layer %d: the input of %s holds NaN or infinity", l,
                    linear_names[linears[i] - layer->linears]);
            max[j % K] = magnitude > max[j % K] ? magnitude : max[j % K];
        }
        scales[i] = allocate(K, sizeof(float));
        if (c->o->smooth == 2) {
            found[i].t =
                search_smoothing_published(c->config, layer, c->s_float, i, inputs[i], windows,
                                           c->length, max, c->o->group_size, scales[i]);
        } else { // a sample spread evenly over the windows
            int stride = total > SEARCH_TOKENS ? total / SEARCH_TOKENS : 1, T = total / stride;
            for (int t = 0; t < T; t++)
                memmove(inputs[i] + t * K, inputs[i] + (size_t)t * stride * K, K * sizeof(float));
            found[i].t = search_smoothing(linears[i], counts[i], inputs[i], T, max,
                                          c->o->group_size, scales[i]);
        }
        found[i].n = 0;
        for (size_t k = 0; k < K; k++) found[i].n += max[k] > found[i].t;
        free(max);
    }
    smooth_layer(layer, scales[0], scales[1], scales[2]);
    for (int i = 0; i < 3; i++) free(inputs[i]), free(scales[i]);
}

/* ---- 4: quantizing a layer ----------------------------------------------------------------- */

/* What GPTQ needs to know of the inputs of one linear, or of several that share them: sums over the
 * calibration tokens, F the float model's inputs, X the quantized model's, D its residual's
 * distance to the float model's. */
typedef struct {
    double *H; // [K][K] X^T X
    double *C; // [K][K] (F - X)^T X
    double *R; // [dim][K] D^T X, NULL if the linear does not write to the residual stream
    int K;
} Moments;

static Moments moments_new(int K, int dim) {
    size_t k = K;
    return (Moments){allocate(k * k, sizeof(double)), allocate(k * k, sizeof(double)),
                     dim ? allocate(k * dim, sizeof(double)) : NULL, K};
}

static void moments_free(Moments *m) {
    free(m->H);
    free(m->C);
    free(m->R);
}

/* Adds one window: f, x [T][K]; with R also the residual streams [T][dim]. x is replaced by its
 * int8 values and f by the difference to them. */
static void moments_add(Moments *m, float *f, float *x, const float *residual_f,
                        const float *residual_x, int T, int dim) {
    size_t K = m->K;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)T; t++) {
        int8_t a[K];
        float s_a = quantize_row(x + t * K, K, a);
        for (size_t k = 0; k < K; k++) {
            x[t * K + k] = a[k] * s_a;
            f[t * K + k] -= x[t * K + k];
        }
    }
    add_moments(m->H, x, K, x, K, T);
    add_moments(m->C, f, K, x, K, T);
    if (!m->R) return;
    float *distance = allocate((size_t)T * dim, sizeof *distance);
    for (size_t i = 0; i < (size_t)T * dim; i++) distance[i] = residual_f[i] - residual_x[i];
    add_moments(m->R, distance, dim, x, K, T);
    free(distance);
}

/* The diagonal of H, which weighs the columns in the search of ranges; dead columns get the mean.
 */
static float *column_importance(const Moments *m, int l, const char *name) {
    size_t K = m->K;
    float *importance = allocate(K, sizeof *importance);
    double mean = 0;
    for (size_t k = 0; k < K; k++) mean += m->H[k * (K + 1)] / K;
    if (!(mean < INFINITY)) die("layer %d: the input of %s holds NaN or infinity", l, name);
    for (size_t k = 0; k < K; k++) {
        double h = m->H[k * (K + 1)];
        importance[k] = h > 0 ? h : mean > 0 ? mean : 1;
    }
    return importance;
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

/* Quantizes the linears first .. first + count - 1 of layer l, which share their input, from the
 * float layer f to W4A8 in q. */
static void quantize_linears(const Options *o, const Moments *m, int l, int n_layers, int first,
                             int count, const Layer *f, Layer *q, Errors *errors) {
    float *importance = m->H ? column_importance(m, l, linear_names[first]) : NULL;
    const float *weighting = o->search_ranges ? importance : NULL;
    Inverse inverse;
    if (o->gptq) inverse = hessian_inverse(m->H, m->K, o->act_order);
    for (int i = first; i < first + count; i++) {
        const float *w = f->linears[i].w;
        int N = f->linears[i].N, K = f->linears[i].K;
        show_linear(l, i, n_layers);
        Linear nearest = round_to_nearest(w, weighting, N, K, o->group_size);
        errors[i].before = errors[i].after = m->H ? relative_error(w, &nearest, m->H) : NAN;
        q->linears[i] = nearest;
        if (!o->gptq) continue;
        float *target = allocate((size_t)N * K, sizeof *target);
        corrected_target(w, N, &inverse, m->C, m->R, target);
        q->linears[i] = gptq(target, N, &inverse, weighting, o->group_size);
        errors[i].after = relative_error(w, &q->linears[i], m->H);
        quantized_free(&nearest);
        free(target);
    }
    if (o->gptq) inverse_free(&inverse);
    free(importance);
}

/* Half a layer: attention (q, k, v inside, o outside) or FFN (gate and up, down). */
typedef struct {
    bool ffn;
    int n_inside;       // linears that read the normed residual stream; one more writes to it
    const Layer *layer; // with the linears as they are so far, float or quantized
    const float *norm;  // [dim]
    const Linear *outside;
} Half;

static Half half_of(const Layer *layer, bool ffn) {
    return ffn ? (Half){true, 2, layer, layer->ffn_norm, &layer->down}
               : (Half){false, 3, layer, layer->attention_norm, &layer->o};
}

/* Runs half a layer on x [T][dim] up to the input of the outside linear, which is returned. */
static float *run_inside(const Calibration *c, const Half *h, const float *x, State *s) {
    rmsnorm(x, h->norm, c->length, c->config->dim, c->config->norm_eps, s->xb);
    if (h->ffn) ffn_block(c->config, h->layer, s, c->length);
    else attention_block(c->config, h->layer, s, 0, c->length, 0);
    return h->ffn ? s->gate : s->att;
}

/* Quantizes half of layer l: q's linears, float at first, become W4A8; f stays float. Each linear
 * is calibrated on what reaches it through the linears quantized before it. */
static void quantize_half(const Calibration *c, int l, const Layer *f, Layer *q, bool ffn,
                          Errors *errors) {
    int dim = c->config->dim, T = c->length, first = ffn ? 4 : 0;
    Half half_f = half_of(f, ffn), half_q = half_of(q, ffn);
    int n_inside = half_f.n_inside, outside = first + n_inside;
    State *s_f = c->s_float, *s_q = c->s_quant;
    bool calibrate = c->o->gptq || c->o->search_ranges;

    // q, k, v or gate, up: their inputs are the normed residual streams.
    Moments m = calibrate ? moments_new(dim, 0) : (Moments){0};
    for (int w = 0; calibrate && w < c->n; w++) {
        rmsnorm(window(c, c->x_float, w), half_f.norm, T, dim, c->config->norm_eps, s_f->xb);
        rmsnorm(window(c, c->x_quant, w), half_q.norm, T, dim, c->config->norm_eps, s_q->xb);
        moments_add(&m, s_f->xb, s_q->xb, NULL, NULL, T, 0);
    }
    quantize_linears(c->o, &m, l, c->n_layers, first, n_inside, f, q, errors);
    moments_free(&m);

    // o or down: its input has passed the linears just quantized.
    m = calibrate ? moments_new(half_f.outside->K, dim) : (Moments){0};
    for (int w = 0; w < c->n; w++) {
        float *x_f = window(c, c->x_float, w), *x_q = window(c, c->x_quant, w);
        float *in_f = run_inside(c, &half_f, x_f, s_f);
        memcpy(s_f->x, x_f, (size_t)T * dim * sizeof *x_f);
        add_linear(half_f.outside, in_f, T, s_f->xb, x_f); // the float model is done with this half
        if (!calibrate) continue;
        float *in_q = run_inside(c, &half_q, x_q, s_q);
        moments_add(&m, in_f, in_q, s_f->x, x_q, T, dim);
    }
    quantize_linears(c->o, &m, l, c->n_layers, outside, 1, f, q, errors);
    moments_free(&m);

    // The quantized model's residual stream.
    for (int w = 0; w < c->n; w++) {
        float *x_q = window(c, c->x_quant, w);
        float *in_q = run_inside(c, &half_q, x_q, s_q);
        add_linear(half_q.outside, in_q, T, s_q->xb, x_q);
    }
}

/* The factor c on the final norm's weight w that brings the quantized model's output nearest to the
 * float model's: least squares, c = sum w^2 x f / sum w^2 x^2 over all tokens and channels, x and f
 * normed. Noise in x makes c < 1: the logits of a noisy model are too sure of themselves. */
static double final_scale(const Calibration *c, const float *norm) {
    int dim = c->config->dim, T = c->length;
    double xf = 0, xx = 0;
    if (c->gpu) gpu_final_scale(c->gpu, norm, &xf, &xx);
    for (int w = 0; !c->gpu && w < c->n; w++) {
        float *f = c->s_float->xb, *x = c->s_quant->xb;
        rmsnorm(window(c, c->x_float, w), norm, T, dim, c->config->norm_eps, f);
        rmsnorm(window(c, c->x_quant, w), norm, T, dim, c->config->norm_eps, x);
        for (size_t i = 0; i < (size_t)T * dim; i++) {
            xf += (double)x[i] * f[i];
            xx += (double)x[i] * x[i];
        }
    }
    if (!(xx < INFINITY)) die("the last layer's output holds NaN or infinity");
    return xx > 0 ? xf / xx : 1;
}

/* ---- 5: the whole model -------------------------------------------------------------------- */

static void print_errors(const Options *o, int l, const Smoothing found[3], const Errors *errors) {
    const int smoothed_by[N_LINEARS] = {SMOOTH_QKV,     SMOOTH_QKV,     SMOOTH_QKV, -1,
                                        SMOOTH_GATE_UP, SMOOTH_GATE_UP, SMOOTH_DOWN};
    for (int k = 0; k < N_LINEARS; k++) {
        int by = o->smooth ? smoothed_by[k] : -1;
        printf("%5d  %-16s", l, linear_names[k]);
        if (by < 0) printf("  %8s  %9s", "-", "-");
        else printf("  %8d  %9.4g", found[by].n, found[by].t);
        if (isnan(errors[k].before)) printf("       -       -\n");
        else printf("  %6.4f  %6.4f\n", errors[k].before, errors[k].after);
    }
    fflush(stdout);
}

static void put(Writer *out, int l, const char *name, const char *suffix, const void *data,
                size_t bytes) {
    char full[160];
    snprintf(full, sizeof full, "model.layers.%d.%s%s", l, name, suffix);
    writer_put(out, full, data, bytes);
}

static void put_linear(Writer *out, int l, const char *name, const Linear *w) {
    size_t N = w->N, K = w->K;
    put(out, l, name, ".qweight", w->qweight, N * K / 2);
    put(out, l, name, ".s_channel", w->s_channel, N * sizeof(float));
    if (w->s_group) put(out, l, name, ".s_group", w->s_group, N * K / GROUP);
}

/* A tensor that nothing has changed, as it stands in MODEL. */
static void put_untouched(Writer *out, const Checkpoint *c, const char *name) {
    const Tensor *t = checkpoint_find(c, name);
    writer_put(out, name, t->data, t->bytes);
}

static bool norms_change(const Options *o) {
    return o->rotate || o->smooth;
}

/* Rotates, smooths and quantizes layer l. The caller frees each of the result's linears, and its
 * norms, which are one piece. */
static Layer quantize_layer(const Calibration *c, const Layer *layer, int l, const int8_t *signs,
                            Smoothing found[3], Errors *errors) {
    Layer f = layer_float_copy(c->config, layer, l);
    if (signs) rotate_layer(c->config, &f, signs);
    if (c->o->smooth) smooth(c, l, &f, found);
    Layer q = f; // its linears turn W4A8 one after the other
    quantize_half(c, l, &f, &q, false, errors);
    quantize_half(c, l, &f, &q, true, errors);
    for (int k = 0; k < N_LINEARS; k++) free((void *)f.linears[k].w);
    return q;
}

/* Layer by layer: read, rotate, smooth, quantize, write. Returns the factor on the final norm. */
static double quantize_layers(const Calibration *c, const Checkpoint *checkpoint, const Model *m,
                              const int8_t *signs, Writer *out) {
    const Options *o = c->o;
    const Config *config = &m->config;
    printf("                         smoothed             relative error\n");
    printf("layer  linear            channels  threshold  to nearest  final\n");
    for (int l = 0; l < config->n_layers; l++) {
        Layer q;
        Smoothing found[3];
        Errors errors[N_LINEARS];
        if (c->gpu) gpu_quantize_layer(c->gpu, &m->layers[l], l, &q, found, errors);
        else q = quantize_layer(c, &m->layers[l], l, signs, found, errors);
        if (isatty(STDOUT_FILENO)) fprintf(stderr, "\r\033[K"); // the bar makes room
        print_errors(o, l, found, errors);
        char name[128];
        for (int k = 0; k < N_LINEARS; k++) put_linear(out, l, linear_names[k], &q.linears[k]);
        const char *norms[] = {"input_layernorm", "post_attention_layernorm"};
        for (int i = 0; i < 2; i++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, norms[i]);
            if (norms_change(o))
                writer_put(out, name, i ? q.ffn_norm : q.attention_norm,
                           config->dim * sizeof(float));
            else put_untouched(out, checkpoint, name);
        }
        for (int k = 0; k < N_LINEARS; k++) quantized_free(&q.linears[k]);
        free(q.attention_norm);
    }
    show_progress("linears", config->n_layers * N_LINEARS, config->n_layers * N_LINEARS, 0);
    return o->gptq ? final_scale(c, m->norm) : 1;
}

/* ---- 6: files ------------------------------------------------------------------------------ */

typedef struct {
    Tensor *list; // [n]
    int n;
} Tensors;

static void announce(Tensors *t, const char *name, const char *suffix, DType dtype, int rows,
                     int columns) {
    t->list = realloc(t->list, (t->n + 1) * sizeof *t->list);
    if (!t->list) die("out of memory");
    Tensor *new = &t->list[t->n++];
    *new = (Tensor){.dtype = dtype};
    if (asprintf(&new->name, "%s%s", name, suffix) < 0) die("out of memory");
    new->n_dims = columns ? 2 : 1;
    new->shape[0] = rows;
    new->shape[1] = columns;
    new->bytes = dtype_size(dtype) * rows *(columns ? columns : 1);
}

static void announce_norm(Tensors *t, const Checkpoint *c, const char *name, bool changed) {
    const Tensor *old = checkpoint_find(c, name);
    announce(t, name, "", changed ? F32 : old->dtype, old->shape[0], 0);
}

/* Every tensor of the quantized file, in the order in which the layers use them. */
static Tensors announce_all(const Options *o, const Checkpoint *c, const Model *m) {
    const Config *config = &m->config;
    Tensors t = {0};
    announce(&t, "model.embed_tokens", ".weight", o->rotate ? F16 : m->embedding.dtype,
             config->vocab_size, config->dim);
    for (int l = 0; l < config->n_layers; l++) {
        char name[128];
        for (int k = 0; k < N_LINEARS; k++) {
            int N, K;
            linear_shape(config, k, &N, &K);
            snprintf(name, sizeof name, "model.layers.%d.%s", l, linear_names[k]);
            announce(&t, name, ".qweight", U8, N, K / 2);
            announce(&t, name, ".s_channel", F32, N, 0);
            if (o->group_size > 0) announce(&t, name, ".s_group", U8, N, K / o->group_size);
        }
        snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", l);
        announce_norm(&t, c, name, norms_change(o));
        snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", l);
        announce_norm(&t, c, name, norms_change(o));
    }
    announce_norm(&t, c, "model.norm.weight", o->gptq || o->rotate);
    if (!config->tied || o->rotate)
        announce(&t, "lm_head", ".weight", o->rotate ? F16 : m->lm_head.dtype, config->vocab_size,
                 config->dim);
    return t;
}

static void put_f16(Writer *out, const char *name, const Linear *w) {
    size_t n = (size_t)w->N * w->K;
    uint16_t *half = allocate(n, sizeof *half);
    for (size_t i = 0; i < n; i++) half[i] = float_to_f16(((const float *)w->w)[i]);
    writer_put(out, name, half, n * sizeof *half);
    free(half);
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* How the file was made, for its metadata. */
static char *describe(const Options *o, int windows) {
    char *text;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) die("out of memory");
    fprintf(out,
            "{\"bits\":4,\"group_size\":%d,\"method\":\"%s\",\"smooth\":%d,\"rotate\":%d,"
            "\"seed\":%llu,\"mse\":%d,\"act_order\":%d,\"windows\":%d,\"length\":%d,"
            "\"calibration\":",
            o->group_size, o->gptq ? "gptq" : "rtn", o->smooth, o->rotate,
            (unsigned long long)o->seed, o->search_ranges, o->act_order, windows, o->length);
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

static void print_perplexity(const Options *o, const Checkpoint *c, const Model *m,
                             const char *what) {
    int length = m->config.max_context < 2048 ? m->config.max_context : 2048;
    int n, windows, *tokens = text_tokens(c, m->config.bos, o->eval, &n);
    if (n < length) die("%s: its %d tokens give no window of %d", o->eval, n, length);
    double ppl;
    if (o->gpu) {
        GpuModel *gpu = gpu_model_load(m);
        ppl = gpu_perplexity(gpu, tokens, n, length, 0, &windows, show_windows);
        gpu_model_free(gpu);
    } else {
        ppl = perplexity(m, tokens, n, length, 0, &windows, show_windows);
    }
    printf("%s: perplexity %.4f (%d windows of %d)\n", what, ppl, windows, length);
    fflush(stdout);
    free(tokens);
}

static size_t file_bytes(const Checkpoint *c) {
    size_t bytes = 0;
    for (int i = 0; i < c->n_tensors; i++) bytes += c->tensors[i].bytes;
    return bytes;
}

static void convert(const Options *o, const Checkpoint *c) {
    if (c->quantization) die("%s: it is quantized already: %s", o->model, c->quantization);
    Tensors t = {0};
    for (int i = 0; i < c->n_tensors; i++)
        if (strcmp(c->tensors[i].name, "tokenizer.json")) {
            t.list = realloc(t.list, (t.n + 1) * sizeof *t.list);
            if (!t.list) die("out of memory");
            t.list[t.n++] = c->tensors[i];
        }
    Writer *out = writer_open(o->out, c, NULL, t.list, t.n);
    for (int i = 0; i < t.n; i++) writer_put(out, t.list[i].name, t.list[i].data, t.list[i].bytes);
    printf("%s: %.1f MB\n", o->out, writer_close(out) / 1e6);
    free(t.list);
}

static void quantize(Options *o, const Checkpoint *c) {
    Model *m = model_load(c);
    const Config *config = &m->config;
    if (m->group_size) die("%s: it is quantized already: %s", o->model, c->quantization);
    if (o->rotate) check_rotation(config);
    for (int k = 0; k < N_LINEARS; k++) {
        int N, K, unit = o->group_size > 0 ? o->group_size : 2;
        linear_shape(config, k, &N, &K);
        if (K % unit)
            die("%s: %s has %d input channels, no multiple of %d%s", o->model, linear_names[k], K,
                unit, unit == GROUP ? " (-g -1 quantizes per channel)" : "");
    }
    require_finite(&m->embedding, "model.embed_tokens");
    require_finite(&m->lm_head, "lm_head");
    if (o->eval) print_perplexity(o, c, m, "before");

    Linear embedding = m->embedding, lm_head = m->lm_head;
    float *norm = m->norm;
    int8_t *signs = NULL;
    if (o->rotate) {
        signs = allocate(config->dim, 1);
        random_signs(o->seed, config->dim, signs);
        embedding = float_copy(&m->embedding, "model.embed_tokens");
        lm_head = float_copy(&m->lm_head, "lm_head");
        rotate_ends(&embedding, &lm_head, norm, signs);
    }
    Config one_layer = *config;
    one_layer.n_layers = 1; // for buffers of one layer
    int *tokens = NULL;
    Calibration calibration = calibration_new(o, m, &embedding, c, &one_layer, &tokens);
    if (calibration.n)
        fprintf(stderr, "calibration: %s, %d windows of %d%s%s\n", base_name(o->calibration),
                calibration.n, calibration.length, o->gpu || o->gpu_note ? ", on " : "",
                o->gpu        ? o->gpu
                : o->gpu_note ? o->gpu_note
                              : "");
    if (o->gpu) {
        Method method = {o->group_size, o->smooth, o->search_ranges, o->gptq,
                         o->act_order,  signs,     show_linear};
        calibration.gpu = gpu_quantizer_new(config, &method, &embedding, tokens, calibration.n,
                                            o->length, o->most_memory);
    }
    free(tokens);
    char *quantization = describe(o, calibration.n);
    Tensors t = announce_all(o, c, m);
    Writer *out = writer_open(o->out, c, quantization, t.list, t.n);
    describe_model(c, m, NULL);
    double scale = quantize_layers(&calibration, c, m, signs, out);
    if (calibration.gpu) gpu_quantizer_report(calibration.gpu, stderr);
    calibration_free(&calibration);
    for (int i = 0; i < config->dim; i++) norm[i] *= scale;
    if (o->gptq) printf("final norm times %.4f\n", scale);
    if (o->gptq || o->rotate)
        writer_put(out, "model.norm.weight", norm, config->dim * sizeof *norm);
    else put_untouched(out, c, "model.norm.weight");
    if (o->rotate) {
        put_f16(out, "model.embed_tokens.weight", &embedding);
        put_f16(out, "lm_head.weight", &lm_head);
        free((void *)embedding.w);
        free((void *)lm_head.w);
    } else {
        put_untouched(out, c, "model.embed_tokens.weight");
        if (!config->tied) put_untouched(out, c, "lm_head.weight");
    }
    size_t bytes = writer_close(out), weights = 0, packed = 0;
    for (int i = 0; i < t.n; i++)
        if (strstr(t.list[i].name, ".qweight") || strstr(t.list[i].name, ".s_")) {
            packed += t.list[i].bytes;
            if (t.list[i].dtype == U8 && strstr(t.list[i].name, ".qweight"))
                weights += 2 * t.list[i].bytes;
        }
    printf("%s: %.1f MB -> %s: %.1f MB, %.3f bits per weight of the quantized linears\n", o->model,
           file_bytes(c) / 1e6, o->out, bytes / 1e6, 8.0 * packed / weights);
    for (int i = 0; i < t.n; i++) free(t.list[i].name);
    free(t.list);
    free(quantization);
    free(signs);
    model_free(m);

    if (!o->eval) return;
    Checkpoint *made = checkpoint_open(o->out);
    m = model_load(made);
    print_perplexity(o, made, m, "after");
    model_free(m);
    checkpoint_close(made);
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
