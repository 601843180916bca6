/* Files: every layout of a good model gives the same numbers, the writer leaves a whole file or
 * none, and bad input ends in one line that names the thing. From top to bottom: models to write,
 * good files, the writer, bad safetensors, bad directories, config.json, bad W4A8, damaged bytes.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "test.h"

#define SCRATCH "build/test/files"

/* Small models run faster in one thread, and a forked child has none of OpenMP's others. Returns
 * how many there were. */
static int set_threads(int n) {
    int before = 1;
#ifdef _OPENMP
    before = omp_get_max_threads();
    omp_set_num_threads(n);
#else
    (void)n;
#endif
    return before;
}

static char *text_of(const char *format, ...) __attribute__((format(printf, 1, 2)));

static char *text_of(const char *format, ...) {
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

/* test_begin() with a name made of parts. */
static void begin(const char *what, const char *which) {
    static char *names[2]; // the harness prints a name when the next test begins
    static int i;
    i = !i;
    free(names[i]);
    names[i] = text_of("%s%s", what, which);
    test_begin(names[i]);
}

static void make_directory(const char *path) {
    if (mkdir(path, 0777) && access(path, F_OK)) die("%s: cannot be made", path);
}

static const char *bad_input; // the class of what is refused
static char message[8192];    // of the last refusal

static void says(const char *fragment) {
    check(strstr(message, fragment) != NULL, "\"%s\" is not in: %s", fragment, message);
}

/* Checks that f(arg) ends with status 1, one line on stderr, and this in it. */
static void refused(void (*f)(void *), void *arg, const char *fragment) {
    count_bad_input(bad_input);
    bool clean = dies(f, arg, message, sizeof message);
    check(clean, "no clean end with one line, but: %s", *message ? message : "(nothing said)");
    says(fragment);
}

/* ---- models to write ----------------------------------------------------------------------- */

/* A config.json with these keys replaced, added or, with the value "", left out; NULL ends them. */
static char *config_text(const char *key, ...) {
    static const char *const usual[][2] = {{"model_type", "\"llama\""},
                                           {"hidden_act", "\"silu\""},
                                           {"attention_bias", "false"},
                                           {"mlp_bias", "false"},
                                           {"hidden_size", "8"},
                                           {"intermediate_size", "12"},
                                           {"num_hidden_layers", "2"},
                                           {"num_attention_heads", "4"},
                                           {"num_key_value_heads", "2"},
                                           {"vocab_size", "16"},
                                           {"max_position_embeddings", "131072"},
                                           {"rms_norm_eps", "1e-05"},
                                           {"rope_theta", "500000.0"},
                                           {"tie_word_embeddings", "false"},
                                           {"bos_token_id", "1"},
                                           {"eos_token_id", "2"}};
    enum { N = sizeof usual / sizeof *usual };
    const char *keys[N + 16], *values[N + 16];
    int n = N;
    for (int i = 0; i < N; i++) keys[i] = usual[i][0], values[i] = usual[i][1];
    va_list args;
    va_start(args, key);
    for (const char *k = key; k; k = va_arg(args, const char *)) {
        int i = 0;
        while (i < n && strcmp(keys[i], k)) i++;
        keys[i] = k;
        values[i] = va_arg(args, const char *);
        n += i == n;
    }
    va_end(args);
    char *text = text_of("{");
    for (int i = 0; i < n; i++)
        if (*values[i]) {
            const char *comma = text[1] ? "," : "";
            char *longer = text_of("%s%s\n  \"%s\": %s", text, comma, keys[i], values[i]);
            free(text);
            text = longer;
        }
    char *closed = text_of("%s\n}\n", text);
    free(text);
    return closed;
}

/* A config whose linears fit groups of 128. */
static char *config_for_groups(void) {
    return config_text("hidden_size", "128", "intermediate_size", "256", "head_dim", "32",
                       "num_hidden_layers", "1", NULL);
}

/* Tensors of a model, in memory. */
typedef struct {
    Tensor tensors[64];
    int n;
} Weights;

static Tensor *weight(Weights *w, const char *name) {
    for (int i = 0; i < w->n; i++)
        if (!strcmp(w->tensors[i].name, name)) return &w->tensors[i];
    die("the test has no tensor %s", name);
}

static void *bytes_of(Weights *w, const char *name) {
    return (void *)weight(w, name)->data;
}

/* Adds a tensor with data [rows][columns], columns 0: a vector. */
static void add_tensor(Weights *w, char *name, DType dtype, int rows, int columns, void *data) {
    size_t bytes = (size_t)rows * (columns ? columns : 1) * dtype_size(dtype);
    w->tensors[w->n++] = (Tensor){.name = name,
                                  .dtype = dtype,
                                  .n_dims = columns ? 2 : 1,
                                  .shape = {rows, columns},
                                  .data = data,
                                  .bytes = bytes};
}

/* Random numbers; in 16 bits of little precision, so that F16 and BF16 hold the same ones. */
static void *random_data(DType dtype, size_t n, uint64_t *seed) {
    char *data = allocate(n, dtype_size(dtype));
    for (size_t i = 0; i < n; i++) {
        float x = rintf(64 * random_float(seed)) / 64;
        uint16_t half = float_to_f16(x);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (dtype == BF16) half = bits >> 16;
        memcpy(data + i * dtype_size(dtype), dtype == F32 ? (void *)&x : &half, dtype_size(dtype));
    }
    return data;
}

static void add_random(Weights *w, char *name, DType dtype, int rows, int columns, uint64_t *seed) {
    size_t n = (size_t)rows * (columns ? columns : 1);
    add_tensor(w, name, dtype, rows, columns, random_data(dtype, n, seed));
}

/* The layers' linears as W4A8: 128 or -1 for group_size. */
static void add_quantized(Weights *w, const char *name, int N, int K, int group_size,
                          uint64_t *seed) {
    uint8_t *codes = allocate((size_t)N * K / 2, 1);
    float *s_channel = allocate(N, sizeof *s_channel);
    for (int i = 0; i < N * K / 2; i++) codes[i] = 0x88 + 17 * (int)(7 * random_float(seed));
    for (int i = 0; i < N; i++) s_channel[i] = 0.01f + 0.005f * random_float(seed);
    add_tensor(w, text_of("%s.qweight", name), U8, N, K / 2, codes);
    add_tensor(w, text_of("%s.s_channel", name), F32, N, 0, s_channel);
    if (group_size < 0) return;
    uint8_t *s_group = allocate((size_t)N * (K / GROUP), 1);
    for (int i = 0; i < N * (K / GROUP); i++) s_group[i] = 8 + (int)(7.9f * random_float(seed));
    add_tensor(w, text_of("%s.s_group", name), U8, N, K / GROUP, s_group);
}

/* Text without control characters as a JSON string. */
static char *json_text(const char *text) {
    char *out = allocate(2 * strlen(text) + 3, 1), *o = out;
    *o++ = '"';
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') *o++ = '\\';
        *o++ = *text;
    }
    *o = '"';
    return out;
}

/* Every tensor that a model of this config needs. group_size 0: floats of `dtype`. */
static Weights make_weights(const char *config, DType dtype, int group_size) {
    Config c = config_parse("test", config, NULL);
    Weights w = {.n = 0};
    uint64_t seed = 1;
    add_random(&w, text_of("model.embed_tokens.weight"), dtype, c.vocab_size, c.dim, &seed);
    for (int l = 0; l < c.n_layers; l++) {
        const char *norms[] = {"input_layernorm", "post_attention_layernorm"};
        for (int i = 0; i < 2; i++)
            add_random(&w, text_of("model.layers.%d.%s.weight", l, norms[i]), dtype, c.dim, 0,
                       &seed);
        for (int k = 0; k < N_LINEARS; k++) {
            int N, K;
            linear_shape(&c, k, &N, &K);
            char *name = text_of("model.layers.%d.%s", l, linear_names[k]);
            if (group_size) add_quantized(&w, name, N, K, group_size, &seed);
            else add_random(&w, text_of("%s.weight", name), dtype, N, K, &seed);
            free(name);
        }
    }
    add_random(&w, text_of("model.norm.weight"), dtype, c.dim, 0, &seed);
    if (!c.tied) add_random(&w, text_of("lm_head.weight"), dtype, c.vocab_size, c.dim, &seed);
    return w;
}

static void remove_tensor(Weights *w, const char *name) {
    Tensor *t = weight(w, name);
    free(t->name);
    free((void *)t->data);
    *t = w->tensors[--w->n];
}

static void free_weights(Weights *w) {
    while (w->n) remove_tensor(w, w->tensors[0].name);
}

/* A safetensors file of this header, whatever it says, and data [bytes]. */
static void write_raw(const char *path, const char *header, size_t header_bytes, const void *data,
                      size_t bytes) {
    char *file = allocate(8 + header_bytes + bytes, 1);
    for (int i = 0; i < 8; i++) file[i] = (uint64_t)header_bytes >> 8 * i;
    memcpy(file + 8, header, header_bytes);
    if (bytes) memcpy(file + 8 + header_bytes, data, bytes);
    write_file(path, file, 8 + header_bytes + bytes);
    free(file);
}

/* A safetensors file of tensors first .. first + n - 1, as others write them: no alignment; `lead`
 * is what the header has before the first tensor, `{` at least. */
static void write_safetensors(const char *path, const char *lead, const Weights *w, int first,
                              int n) {
    size_t bytes = 0;
    char *header = text_of("%s", lead), *data = allocate(1, 1);
    for (int i = first; i < first + n; i++) {
        const Tensor *t = &w->tensors[i];
        char shape[64];
        if (t->n_dims == 2)
            snprintf(shape, sizeof shape, "%d,%d", (int)t->shape[0], (int)t->shape[1]);
        else snprintf(shape, sizeof shape, "%d", (int)t->shape[0]);
        const char *comma = header[strlen(header) - 1] == '{' ? "" : ",";
        char *longer =
            text_of("%s%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                    header, comma, t->name, dtype_name(t->dtype), shape, bytes, bytes + t->bytes);
        free(header);
        header = longer;
        data = realloc(data, bytes + t->bytes + 1);
        if (!data) die("out of memory");
        memcpy(data + bytes, t->data, t->bytes);
        bytes += t->bytes;
    }
    char *closed = text_of("%s}", header);
    write_raw(path, closed, strlen(closed), data, bytes);
    free(header);
    free(closed);
    free(data);
}

/* A Hugging Face directory; returns its path, SCRATCH/name. */
static const char *write_directory(const char *name, const char *config, const Weights *w) {
    static char path[256];
    char *file = text_of(SCRATCH "/%s/model.safetensors", name);
    snprintf(path, sizeof path, SCRATCH "/%s", name);
    make_directory(path);
    write_safetensors(file, "{", w, 0, w->n);
    free(file);
    file = text_of("%s/config.json", path);
    write_file(file, config, strlen(config));
    free(file);
    return path;
}

/* Writes a model.bin by the Writer. */
static size_t write_model_bin(const char *path, const char *config, const char *quantization,
                              const Weights *w) {
    Checkpoint c = {.config = (char *)config, .tokenizer = "{}\n", .tokenizer_bytes = 3};
    Writer *writer = writer_open(path, &c, quantization, w->tensors, w->n);
    for (int i = w->n - 1; i >= 0; i--) // any order will do
        writer_put(writer, w->tensors[i].name, w->tensors[i].data, w->tensors[i].bytes);
    return writer_close(writer);
}

/* Logits [T][vocab_size] of a fixed run of T tokens of the model at `path`. */
static float *logits_at(const char *path, int T, size_t *n) {
    int threads = set_threads(1);
    Checkpoint *c = checkpoint_open(path);
    Model *m = model_load(c);
    State *s = state_new(&m->config, T, T, 16);
    int *tokens = allocate(T, sizeof *tokens);
    for (int t = 0; t < T; t++) tokens[t] = (7 * t + 3) % m->config.vocab_size;
    forward(m, s, tokens, T, 0);
    *n = (size_t)T * m->config.vocab_size;
    float *out = allocate(*n, sizeof *out);
    memcpy(out, logits(m, s, 0, T), *n * sizeof *out);
    free(tokens);
    state_free(s);
    model_free(m);
    checkpoint_close(c);
    set_threads(threads);
    return out;
}

/* Checks that the models at two paths give the same bits. */
static void same_logits(const char *path, const char *other) {
    size_t n, n_other;
    float *y = logits_at(path, 20, &n), *z = logits_at(other, 20, &n_other);
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite = finite && isfinite(y[i]);
    check(finite, "%s: logits are not finite", path);
    check(n == n_other && !memcmp(y, z, n * sizeof *y), "%s and %s differ", path, other);
    free(y);
    free(z);
}

/* Every step of reading a model, for dies(). */
static void open_model(void *path) {
    size_t n;
    free(logits_at(path, 3, &n));
}

static void open_only(void *path) {
    checkpoint_close(checkpoint_open(path));
}

/* ---- good files ---------------------------------------------------------------------------- */

static void write_index(const char *path, const Weights *w, int first, const char *more) {
    char *text = text_of("{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
    for (int i = 0; i < w->n; i++) {
        char *longer = text_of("%s%s\"%s\": \"shard-%d.safetensors\"", text, i ? "," : "",
                               w->tensors[i].name, i < first ? 1 : 2);
        free(text);
        text = longer;
    }
    char *all = text_of("%s%s}}", text, more);
    write_file(path, all, strlen(all));
    free(all);
    free(text);
}

/* A directory of two shards, the first of `first` tensors. */
static const char *write_shards(const char *name, const char *config, const Weights *w, int first,
                                const char *more) {
    const char *path = write_directory(name, config, w);
    char *file[4] = {text_of("%s/model.safetensors", path), text_of("%s/shard-1.safetensors", path),
                     text_of("%s/shard-2.safetensors", path),
                     text_of("%s/model.safetensors.index.json", path)};
    unlink(file[0]);
    write_safetensors(file[1], "{\"__metadata__\":{\"format\":\"pt\"}", w, 0, first);
    write_safetensors(file[2], "{", w, first, w->n - first);
    write_index(file[3], w, first, more);
    for (int i = 0; i < 4; i++) free(file[i]);
    return path;
}

static void test_layouts(void) {
    char *config = config_text("head_dim", "", NULL);
    Weights w = make_weights(config, BF16, 0);
    write_directory("single", config, &w);
    write_model_bin(SCRATCH "/model.bin", config, NULL, &w);

    test_begin("shards with an index give the logits of a single file");
    write_shards("shards", config, &w, 9, "");
    same_logits(SCRATCH "/single", SCRATCH "/shards");
    write_shards("shards", config, &w, 1, "");
    same_logits(SCRATCH "/single", SCRATCH "/shards");

    test_begin("model.bin gives the logits of the directory it was made of");
    same_logits(SCRATCH "/single", SCRATCH "/model.bin");

    test_begin("tensors at odd offsets give the same logits");
    for (int pad = 0; pad < 4; pad++) {
        char *lead = text_of("{\"__metadata__\":{}%*s", pad, ""),
             *config_path = SCRATCH "/odd/config.json";
        make_directory(SCRATCH "/odd");
        write_file(config_path, config, strlen(config));
        write_safetensors(SCRATCH "/odd/model.safetensors", lead, &w, 0, w.n);
        same_logits(SCRATCH "/single", SCRATCH "/odd");
        free(lead);
    }

    test_begin("a file may hold more tensors than needed, also empty and scalar ones");
    Weights more = w;
    add_tensor(&more, "empty", F32, 0, 5, "");
    add_tensor(&more, "model.layers.0.self_attn.rotary_emb.inv_freq", F32, 1, 0, "1234");
    write_directory("more", config, &more);
    same_logits(SCRATCH "/single", SCRATCH "/more");

    test_begin("F32, F16 and BF16 files of equal weights give equal logits");
    for (DType dtype = F32; dtype <= F16; dtype++) {
        Weights other = make_weights(config, dtype, 0);
        write_directory("other", config, &other);
        same_logits(SCRATCH "/single", SCRATCH "/other");
        free_weights(&other);
    }

    test_begin("tie_word_embeddings gives the logits of an explicit copy");
    char *tied = config_text("tie_word_embeddings", "true", NULL);
    Weights t = make_weights(tied, BF16, 0);
    write_directory("tied", tied, &t);
    Tensor copy = *weight(&t, "model.embed_tokens.weight");
    copy.name = "lm_head.weight";
    t.tensors[t.n++] = copy;
    write_directory("untied", config, &t);
    t.n--;
    same_logits(SCRATCH "/tied", SCRATCH "/untied");
    free_weights(&t);
    free(tied);

    test_begin("names with escapes are resolved");
    char *lead = text_of("{\"__metadata__\":{\"format\":\"pt\",\"a\\u00e9\\n\":\"\\\"\"}");
    write_safetensors(SCRATCH "/single/model.safetensors", lead, &w, 0, w.n);
    same_logits(SCRATCH "/single", SCRATCH "/model.bin");
    const char *escaped = "{\"a\\u0062\\ud83d\\ude00\\/\":{\"data_offsets\":[0,2],\"shape\":[2],"
                          "\"dt\\u0079pe\":\"U8\"}}";
    make_directory(SCRATCH "/escaped");
    write_file(SCRATCH "/escaped/config.json", config, strlen(config));
    write_raw(SCRATCH "/escaped/model.safetensors", escaped, strlen(escaped), "xy", 2);
    Checkpoint *c = checkpoint_open(SCRATCH "/escaped");
    check(c->n_tensors == 1 && checkpoint_find(c, "ab\xf0\x9f\x98\x80/") != NULL, "found %s",
          c->tensors[0].name);
    checkpoint_close(c);
    free(lead);
    free_weights(&w);
    free(config);
}

/* ---- the writer ---------------------------------------------------------------------------- */

static const char *const quantizations[2] = {
    "{\"bits\":4,\"group_size\":128,\"method\":\"rtn\"}",
    "{\"bits\":4,\"group_size\":-1,\"method\":\"a \\\"b\\\"\\n\\\\ \xc3\xa9\"}"};

/* Whether the tensors of the checkpoint are those of w, bit for bit. */
static void check_tensors(const Checkpoint *c, const Weights *w) {
    check(c->n_tensors == w->n + 1, "%d tensors, expected %d", c->n_tensors, w->n + 1);
    for (int i = 0; i < w->n; i++) {
        const Tensor *a = &w->tensors[i], *b = checkpoint_find(c, a->name);
        check(b && a->dtype == b->dtype && a->n_dims == b->n_dims &&
                  !memcmp(a->shape, b->shape, sizeof a->shape[0] * a->n_dims) &&
                  a->bytes == b->bytes && !memcmp(a->data, b->data, a->bytes),
              "%s differs", a->name);
    }
}

/* Checks the layout of a model.bin: data at a multiple of 4096, no gaps, whole multiples of
 * 256 first, the tokenizer last. */
static void check_layout(const char *path) {
    size_t bytes, length = 0;
    char *file = read_file(path, &bytes);
    for (int i = 0; i < 8; i++) length |= (size_t)(uint8_t)file[i] << 8 * i;
    check((8 + length) % 4096 == 0, "the data starts at %zu", 8 + length);
    Json *j = json_parse(path, file + 8, length);
    size_t end = 0;
    bool small = false, last_is_tokenizer = false;
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        if (json_is(j, key, "__metadata__")) continue;
        double from, to;
        int offsets = json_get(j, key + 1, "data_offsets"), first = json_first(j, offsets);
        json_number(j, first, &from);
        json_number(j, json_next(j, offsets, first), &to);
        check(from == end, "a gap: %g after %zu", from, end);
        last_is_tokenizer = json_is(j, key, "tokenizer.json");
        bool is_small = (size_t)(to - from) % 256;
        check(is_small || !small || last_is_tokenizer, "a large tensor after a small one, at %g",
              from);
        small = small || is_small;
        end = to;
    }
    check(last_is_tokenizer, "tokenizer.json is not the last");
    check(8 + length + end == bytes, "%zu bytes, expected %zu", bytes, 8 + length + end);
    json_free(j);
    free(file);
}

static void test_round_trip(void) {
    char *config = config_for_groups();
    for (int i = 0; i < 2; i++) {
        begin("W4A8 round trip, ", i ? "per channel" : "per group");
        Weights w = make_weights(config, BF16, i ? -1 : 128);
        size_t bytes = write_model_bin(SCRATCH "/w4a8.bin", config, quantizations[i], &w);
        struct stat st;
        stat(SCRATCH "/w4a8.bin", &st);
        check((size_t)st.st_size == bytes, "%zu bytes returned, %zu written", bytes,
              (size_t)st.st_size);
        check_layout(SCRATCH "/w4a8.bin");
        Checkpoint *c = checkpoint_open(SCRATCH "/w4a8.bin");
        check_tensors(c, &w);
        check(!strcmp(c->config, config), "the config changed: %s", c->config);
        check(c->quantization && !strcmp(c->quantization, quantizations[i]),
              "quantization changed: %s", c->quantization);
        check(c->tokenizer_bytes == 3 && !memcmp(c->tokenizer, "{}\n", 3), "tokenizer changed");
        check(!c->generation_config, "a generation_config from nowhere");
        Model *m = model_load(c);
        check(m->group_size == (i ? -1 : 128), "group_size %d", m->group_size);
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *l = &m->layers[0].linears[k];
            check((uintptr_t)l->qweight % 256 == 0, "%s is not aligned", linear_names[k]);
            check(l->dtype == U8 && !l->w && (l->s_group == NULL) == (i == 1), "%s is not W4A8",
                  linear_names[k]);
            char name[128];
            snprintf(name, sizeof name, "model.layers.0.%s.s_channel", linear_names[k]);
            check(!memcmp(l->s_channel, bytes_of(&w, name), l->N * 4), "%s differs", name);
        }
        model_free(m);
        checkpoint_close(c);

        begin("W4A8 at odd offsets, ", i ? "per channel" : "per group");
        char *flat = text_of("%s", config), *at_odd;
        for (char *c = flat; *c; c++)
            if (*c == '\n') *c = ' ';
        at_odd = text_of("{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"1\","
                         "\"quantization\":\"{\\\"bits\\\":4,\\\"group_size\\\":%d}\","
                         "\"config\":",
                         i ? -1 : 128);
        char *string = json_text(flat);
        for (int pad = 0; pad < 2; pad++) {
            char *lead = text_of("%s%s%*s}", at_odd, string, pad, "");
            write_safetensors(SCRATCH "/odd.bin", lead, &w, 0, w.n);
            same_logits(SCRATCH "/w4a8.bin", SCRATCH "/odd.bin");
            free(lead);
        }
        free(string);
        free(flat);
        free(at_odd);
        free_weights(&w);
    }
    free(config);

    test_begin("data/tiny as model.bin: tensors, metadata and logits are the same");
    Checkpoint *tiny = checkpoint_open("data/tiny");
    Writer *writer = writer_open(SCRATCH "/tiny.bin", tiny, NULL, tiny->tensors, tiny->n_tensors);
    for (int i = 0; i < tiny->n_tensors; i++)
        writer_put(writer, tiny->tensors[i].name, tiny->tensors[i].data, tiny->tensors[i].bytes);
    writer_close(writer);
    check_layout(SCRATCH "/tiny.bin");
    Checkpoint *bin = checkpoint_open(SCRATCH "/tiny.bin");
    Weights all = {.n = tiny->n_tensors};
    memcpy(all.tensors, tiny->tensors, sizeof *tiny->tensors * tiny->n_tensors);
    check_tensors(bin, &all);
    check(!strcmp(bin->config, tiny->config), "the config changed");
    check(!bin->quantization, "quantization from nowhere");
    check(bin->tokenizer_bytes == tiny->tokenizer_bytes &&
              !memcmp(bin->tokenizer, tiny->tokenizer, tiny->tokenizer_bytes),
          "the tokenizer changed");
    checkpoint_close(bin);
    checkpoint_close(tiny);
    same_logits("data/tiny", SCRATCH "/tiny.bin");
    unlink(SCRATCH "/tiny.bin");
}

/* Files in SCRATCH/writer. */
static int count_files(void) {
    DIR *d = opendir(SCRATCH "/writer");
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
    if (d) closedir(d);
    return n;
}

static char *writer_config;
static Weights *writer_weights;

/* What the child does in the middle of writing. */
typedef enum { DIES, MISSES_A_TENSOR, PUTS_TWICE, PUTS_UNKNOWN, PUTS_SHORT, DISK_FULL } Trouble;

static Writer *half_written(void) {
    static const Checkpoint c = {.config = "{}", .tokenizer = "{}\n", .tokenizer_bytes = 3};
    const Weights *w = writer_weights;
    Writer *writer = writer_open(SCRATCH "/writer/model.bin", &c, NULL, w->tensors, w->n);
    for (int i = 0; i < w->n / 2; i++)
        writer_put(writer, w->tensors[i].name, w->tensors[i].data, w->tensors[i].bytes);
    return writer;
}

static void write_with_trouble(void *arg) {
    const Trouble trouble = *(Trouble *)arg;
    const Tensor *t = writer_weights->tensors;
    if (trouble == DISK_FULL)
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){5000, 5000}); // header and not much more
    Writer *writer = half_written();
    if (trouble == DIES) die("trouble in the middle of model.bin");
    if (trouble == PUTS_TWICE) writer_put(writer, t->name, t->data, t->bytes);
    if (trouble == PUTS_UNKNOWN) writer_put(writer, "model.unknown", t->data, t->bytes);
    t += writer_weights->n - 1;
    if (trouble == PUTS_SHORT) writer_put(writer, t->name, t->data, t->bytes - 1);
    writer_close(writer);
}

static void write_and_raise(int signal_number) {
    half_written();
    raise(signal_number);
}

/* Runs f(arg) in a child with stderr in /dev/null. Returns its wait status. */
static int status_of(void (*f)(int), int arg) {
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("no fork");
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDERR_FILENO);
        f(arg);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return status;
}

static void write_to(void *path) {
    Weights none = {.n = 0};
    write_model_bin(path, writer_config, NULL, &none);
}

static void check_untouched(bool old) {
    size_t bytes;
    char *text = read_file(SCRATCH "/writer/model.bin", &bytes);
    check(old ? text && !strcmp(text, "old") : !text, "model.bin was touched");
    check(count_files() == old, "%d files are left", count_files());
    free(text);
}

static void test_writer(void) {
    bad_input = "files being written";
    static const struct {
        const char *name, *message;
    } troubles[] = {[DIES] = {"die()", "model.bin"},
                    [MISSES_A_TENSOR] = {"a tensor that was not written", "is missing"},
                    [PUTS_TWICE] = {"a tensor written twice", "model.embed_tokens.weight"},
                    [PUTS_UNKNOWN] = {"a tensor not announced", "model.unknown"},
                    [PUTS_SHORT] = {"a tensor of another size", "lm_head.weight"},
                    [DISK_FULL] = {"a full disk", "model.bin: cannot be written: File too large"}};
    char *config = config_text(NULL);
    Weights w = make_weights(config, F32, 0);
    writer_config = config;
    writer_weights = &w;
    make_directory(SCRATCH "/writer");
    const char *target = SCRATCH "/writer/model.bin";
    for (int old = 0; old < 2; old++) {
        const char *left = old ? " leaves the old file" : " leaves nothing";
        unlink(target);
        if (old) write_file(target, "old", 3);
        for (Trouble i = DIES; i <= DISK_FULL; i++) {
            begin(troubles[i].name, left);
            refused(write_with_trouble, &i, troubles[i].message);
            check_untouched(old);
        }
        const int signals[] = {SIGINT, SIGTERM, SIGSEGV, SIGKILL};
        for (int i = 0; i < 4; i++) {
            char *name = text_of("signal %d", signals[i]);
            begin(name, left);
            free(name);
            int status = status_of(write_and_raise, signals[i]);
            check(WIFSIGNALED(status) && WTERMSIG(status) == signals[i],
                  "not ended by the signal: status %x", status);
            check_untouched(old);
        }
    }

    test_begin("a finished file replaces the old one");
    write_file(target, "old", 3);
    write_model_bin(target, config, NULL, &w);
    write_directory("same", config, &w);
    same_logits(target, SCRATCH "/same");
    check(count_files() == 1, "%d files", count_files());

    test_begin("a target that cannot be written");
    refused(write_to, SCRATCH "/nowhere/model.bin", "nowhere/model.bin");
    refused(write_to, SCRATCH "/writer/model.bin/model.bin", "model.bin/model.bin");
    refused(write_to, "", "cannot be written");
    refused(write_to, SCRATCH "/writer", SCRATCH "/writer");
    char name[6000];
    memset(name, 'x', sizeof name);
    name[sizeof name - 1] = 0;
    refused(write_to, name, "xxx");
    check(count_files() == 1, "%d files", count_files());

    test_begin("a target in a directory without permission");
    if (geteuid() == 0) {
        test_skip("root may write anywhere");
    } else {
        chmod(SCRATCH "/writer", 0555);
        refused(write_to, SCRATCH "/writer/other.bin", "other.bin: cannot be written");
        chmod(SCRATCH "/writer", 0777);
    }
    unlink(target);
    free_weights(&w);
    free(config);
}

/* ---- bad safetensors ----------------------------------------------------------------------- */

#define ENTRY(dtype, shape, offsets)                                                               \
    "{\"weight_a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static const struct {
    const char *name, *header, *message; // 64 bytes of data follow
} headers[] = {
    {"text that is no JSON", "hello", "not valid JSON"},
    {"nothing", "", "not valid JSON"},
    {"spaces only", "    ", "not valid JSON"},
    {"truncated JSON", "{\"weight_a\":{\"dtype\":\"F32\",\"sha", "not valid JSON"},
    {"an unclosed object", "{\"weight_a\":{}", "not valid JSON"},
    {"an array", "[1,2]", "no JSON object"},
    {"a string", "\"abc\"", "no JSON object"},
    {"a number", "7 ", "no JSON object"},
    {"an entry that is a number", "{\"weight_a\":1}", "weight_a"},
    {"an entry that is an array", "{\"weight_a\":[\"dtype\"]}", "weight_a"},
    {"an empty entry", "{\"weight_a\":{}}", "weight_a"},
    {"a key without a value", "{\"weight_a\"}", "not valid JSON"},
    {"two values of a key", "{\"weight_a\":1 2}", "not valid JSON"},
    {"two roots", "{}{}", "not valid JSON"},
    {"brackets that do not match", "{\"weight_a\":[}]", "not valid JSON"},
    {"a number for a key", "{1:2}", "not valid JSON"},
    {"a colon in an array", "[\"a\":1]", "not valid JSON"},
    {"a bad escape", "{\"a\\q\":1}", "not valid JSON"},
    {"dtype I65", ENTRY("\"I65\"", "[8]", "[0,64]"), "weight_a has an unknown dtype: I65"},
    {"dtype of a long name", ENTRY("\"F32F32\"", "[8]", "[0,64]"), "tensor weight_a"},
    {"dtype that is a number", ENTRY("4", "[16]", "[0,64]"), "tensor weight_a"},
    {"no dtype", "{\"weight_a\":{\"shape\":[16],\"data_offsets\":[0,64]}}", "tensor weight_a"},
    {"no shape", "{\"weight_a\":{\"dtype\":\"F32\",\"data_offsets\":[0,64]}}", "tensor weight_a"},
    {"no data_offsets", "{\"weight_a\":{\"dtype\":\"F32\",\"shape\":[16]}}", "tensor weight_a"},
    {"a shape that is a number", ENTRY("\"F32\"", "16", "[0,64]"), "tensor weight_a"},
    {"a shape that is an object", ENTRY("\"F32\"", "{\"a\":16}", "[0,64]"), "tensor weight_a"},
    {"a shape of strings", ENTRY("\"F32\"", "[\"16\"]", "[0,64]"), "tensor weight_a"},
    {"a negative shape", ENTRY("\"F32\"", "[-4,-4]", "[0,64]"), "tensor weight_a"},
    {"a fractional shape", ENTRY("\"F32\"", "[15.5]", "[0,64]"), "tensor weight_a"},
    {"a shape of nine dimensions", ENTRY("\"F32\"", "[1,1,1,1,1,1,1,1,16]", "[0,64]"),
     "tensor weight_a"},
    {"four-bit numbers that end within a byte", ENTRY("\"F4\"", "[127]", "[0,64]"),
     "weight_a has a shape that fills no whole bytes"},
    {"a shape that overflows", ENTRY("\"F32\"", "[4294967296,4294967296,1]", "[0,64]"),
     "tensor weight_a"},
    {"a shape that overflows to the right size",
     ENTRY("\"F32\"", "[16,536838145,536903681]", "[0,64]"), "tensor weight_a"},
    {"a shape beyond all integers", ENTRY("\"F32\"", "[1e300]", "[0,64]"), "tensor weight_a"},
    {"a shape that is no number", ENTRY("\"F32\"", "[nan]", "[0,64]"), "not valid JSON"},
    {"a shape that wants more bytes", ENTRY("\"F32\"", "[17]", "[0,64]"), "tensor weight_a"},
    {"a shape that wants fewer bytes", ENTRY("\"F16\"", "[16]", "[0,64]"), "tensor weight_a"},
    {"an end before the begin", ENTRY("\"F32\"", "[16]", "[64,0]"), "tensor weight_a"},
    {"a negative offset", ENTRY("\"F32\"", "[16]", "[-64,0]"), "tensor weight_a"},
    {"a fractional offset", ENTRY("\"U8\"", "[1]", "[0.5,1.5]"), "tensor weight_a"},
    {"one offset", ENTRY("\"U8\"", "[0]", "[0]"), "tensor weight_a"},
    {"no offsets", ENTRY("\"U8\"", "[0]", "[]"), "tensor weight_a"},
    {"three offsets", ENTRY("\"U8\"", "[1]", "[0,1,2]"), "tensor weight_a"},
    {"offsets that are strings", ENTRY("\"U8\"", "[1]", "[\"0\",\"1\"]"), "tensor weight_a"},
    {"offsets that are an object", ENTRY("\"U8\"", "[1]", "{\"0\":1}"), "tensor weight_a"},
    {"an end outside the file", ENTRY("\"F32\"", "[17]", "[0,68]"), "tensor weight_a"},
    {"offsets outside the file", ENTRY("\"F32\"", "[1]", "[1000,1004]"), "tensor weight_a"},
    {"offsets far outside", ENTRY("\"U8\"", "[1]", "[9007199254740991,9007199254740992]"),
     "tensor weight_a"},
    {"an end of 2^63", ENTRY("\"U8\"", "[1]", "[0,9223372036854775808]"), "tensor weight_a"},
    {"offsets of 2^63", ENTRY("\"U8\"", "[1]", "[9223372036854775808,9223372036854775809]"),
     "tensor weight_a"},
    {"offsets of 2^64 - 1", ENTRY("\"U8\"", "[0]", "[18446744073709551615,18446744073709551615]"),
     "tensor weight_a"},
    {"a shape of 2^63", ENTRY("\"U8\"", "[9223372036854775808]", "[0,64]"), "tensor weight_a"},
    {"offsets beyond 64 bits", ENTRY("\"U8\"", "[1]", "[0,18446744073709551617]"),
     "tensor weight_a"},
    {"overlapping tensors",
     "{\"weight_a\":{\"dtype\":\"U8\",\"shape\":[33],\"data_offsets\":[0,33]},"
     "\"weight_b\":{\"dtype\":\"U8\",\"shape\":[32],\"data_offsets\":[32,64]}}",
     "weight_a and weight_b overlap"},
    {"tensors that overlap in the other order",
     "{\"weight_b\":{\"dtype\":\"U8\",\"shape\":[32],\"data_offsets\":[32,64]},"
     "\"weight_a\":{\"dtype\":\"U8\",\"shape\":[64],\"data_offsets\":[0,64]}}",
     "weight_a and weight_b overlap"},
    {"a tensor twice",
     "{\"weight_a\":{\"dtype\":\"U8\",\"shape\":[32],\"data_offsets\":[0,32]},"
     "\"weight_a\":{\"dtype\":\"U8\",\"shape\":[32],\"data_offsets\":[32,64]}}",
     "weight_a"},
    {"a name with a NUL",
     "{\"weight\\u0000a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", "NUL"},
    {"a bad tensor whose name has line breaks", "{\"weight_a\\n\\u001b[31m\\r\":{}}", "weight_a"},
    {"no tensors", "{}", "64 bytes behind the last tensor belong to none"},
    {"metadata only", "{\"__metadata__\":{}}", "64 bytes behind the last tensor"},
    {"a hole", ENTRY("\"U8\"", "[60]", "[4,64]"), "4 bytes before tensor weight_a belong to none"},
    {"metadata that is a number", "{\"__metadata__\":1}", "__metadata__ is no object"},
};

/* The header that a line of the table stands for: malloc'ed, *bytes long. */
static char *unescape(const char *s, size_t length, size_t *bytes) {
    char *out = allocate(length + 1, 1);
    for (*bytes = 0; length > 0; s++, length--) {
        unsigned value = (unsigned char)*s;
        if (*s == '%' && sscanf(s + 1, "%2x", &value) == 1) s += 2, length -= 2;
        out[(*bytes)++] = (char)value;
    }
    return out;
}

static void open_directory(void *path) {
    checkpoint_close(checkpoint_open(path));
}

/* Headers that the safetensors library refuses are refused, those that it accepts are accepted. */
static void test_verdicts(void) {
    test_begin("safetensors headers: the verdicts of the safetensors library");
    size_t bytes;
    char *table = read_file("test/data/safetensors_verdicts.txt", &bytes), message[512],
         data[64] = {0};
    int n = 0, n_refused = 0;
    char *config = config_text(NULL);
    make_directory(SCRATCH "/verdict");
    write_file(SCRATCH "/verdict/config.json", config, strlen(config));
    for (char *line = table, *end; line && *line; line = end + 1) {
        char verdict[16];
        int n_data, at;
        end = strchr(line, '\n');
        if (*line == '#') continue;
        if (sscanf(line, "%15s %d%n", verdict, &n_data, &at) != 2) die("%s", line);
        char *header = unescape(line + at + 1, end - line - at - 1, &bytes);
        write_raw(SCRATCH "/verdict/model.safetensors", header, bytes, data, n_data);
        bool clean = dies(open_directory, SCRATCH "/verdict", message, sizeof message);
        bool accepts = !strcmp(verdict, "accepts");
        check(accepts ? !*message : clean, "%.*s: %s", (int)(end - line), line, message);
        if (!accepts) count_bad_input("safetensors headers");
        n++, n_refused += clean;
        free(header);
    }
    printf("     %d headers, %d refused\n", n, n_refused);
    check(n > 200 && n_refused > 100 && n_refused < n, "%d of %d refused", n_refused, n);
    free(config);
    free(table);
}

/* What people have beside safetensors is named. */
static void test_other_formats(void) {
    static const struct {
        const char *file, *content, *message;
    } cases[] = {
        {"model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0",
         "Git LFS"},
        {"tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"},
        {"config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"},
        {"model.safetensors", "GGUF\3...................", "a GGUF file"},
        {"model.safetensors", "PK\3\4.....................", "a PyTorch file"},
        {"model.safetensors", "\x80\x02\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.....", "a Python pickle"},
        {"model.safetensors", "\x80\x04\x95\nl\xfc\x9c\x46\xf9 j\xa8P\x19.....",
         "a Python pickle"}};
    char *config = config_text(NULL);
    Weights w = make_weights(config, BF16, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin("another format: ", cases[i].message);
        write_directory("format", config, &w);
        char *path = text_of(SCRATCH "/format/%s", cases[i].file);
        write_file(path, cases[i].content, strlen(cases[i].content));
        bool tokenizer = !strcmp(cases[i].file, "tokenizer.json");
        if (tokenizer) { // read when a text is
            char *command = text_of("$RUN " SCRATCH "/format -i a");
            check(shell("%s", command) == 1 &&
                      strstr(output, "format: tokenizer.json: it is a Git LFS"),
                  "%s", output);
            free(command);
        } else {
            refused(open_model, SCRATCH "/format", cases[i].message);
            write_file(SCRATCH "/format.bin", cases[i].content, strlen(cases[i].content));
            if (i != 2) refused(open_model, SCRATCH "/format.bin", cases[i].message);
        }
        free(path);
    }

    test_begin("a directory whose weights are of another format names one of its files");
    static const struct {
        const char *file, *message;
    } beside[] = {
        {"pytorch_model-00001-of-00002.bin", ", a PyTorch file"},
        {"consolidated.00.pth", ", a PyTorch file"},
        {"model-Q4_K_M.gguf", ", a GGUF file"},
        {"model-00001-of-00004.safetensors", ", a shard without model.safetensors.index"}};
    for (size_t i = 0; i < sizeof beside / sizeof *beside; i++) {
        shell("rm -rf " SCRATCH "/beside && mkdir " SCRATCH "/beside && echo >" SCRATCH
              "/beside/%s",
              beside[i].file);
        refused(open_model, SCRATCH "/beside", "beside/config.json: No such file; there is");
        says(beside[i].file);
        says(beside[i].message);
        write_file(SCRATCH "/beside/config.json", config, strlen(config));
        refused(open_model, SCRATCH "/beside", "beside/model.safetensors: No such file; there is");
        says(beside[i].message);
    }

    test_begin("another architecture is named before its dtypes");
    make_directory(SCRATCH "/format");
    const char *header =
        "{\"h.0.attn.bias\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}";
    char data[8] = {0}, *other = config_text("model_type", "\"gpt2\"", NULL);
    write_raw(SCRATCH "/format/model.safetensors", header, strlen(header), data, 8);
    write_file(SCRATCH "/format/config.json", other, strlen(other));
    refused(open_model, SCRATCH "/format", "model_type is gpt2");
    free(other);
    other = config_text("quantization_config", "{\"quant_method\":\"awq\"}", NULL);
    write_file(SCRATCH "/format/config.json", other, strlen(other));
    refused(open_model, SCRATCH "/format", "quant_method awq");
    free(other);

    test_begin("a tensor that is not needed may have any dtype");
    write_directory("single", config, &w);
    write_directory("buffer", config, &w);
    static const char *const buffers[][2] = {
        {"I64", "[0]"}, {"F4", "[0,2]"}, {"BOOL", "[1,1,0,2,2]"}};
    for (int i = 0; i < 3; i++) {
        char *lead =
            text_of("{\"x.inv_freq\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[0,0]}",
                    buffers[i][0], buffers[i][1]);
        write_safetensors(SCRATCH "/buffer/model.safetensors", lead, &w, 0, w.n);
        same_logits(SCRATCH "/single", SCRATCH "/buffer");
        free(lead);
    }
    check(shell("$QUANTIZE " SCRATCH "/buffer " SCRATCH "/buffer.bin -f") == 0, "%s", output);
    Checkpoint *buffer = checkpoint_open(SCRATCH "/buffer.bin");
    const Tensor *t = checkpoint_find(buffer, "x.inv_freq");
    check(t && t->n_dims == 5 && t->shape[2] == 0 && t->shape[4] == 2, "not carried along");
    checkpoint_close(buffer);
    free_weights(&w);
    free(config);

    test_begin("a Hugging Face cache: the folder of a model leads to its snapshot");
    shell("rm -rf " SCRATCH "/models--a--b && mkdir -p " SCRATCH "/models--a--b/refs " SCRATCH
          "/models--a--b/snapshots && cp -r " SCRATCH "/single " SCRATCH
          "/models--a--b/snapshots/0123 && printf 0123 >" SCRATCH "/models--a--b/refs/main");
    same_logits(SCRATCH "/single", SCRATCH "/models--a--b");
    check(shell("cp data/tiny/tokenizer.json " SCRATCH
                "/models--a--b/snapshots/0123 && $RUN " SCRATCH
                "/models--a--b -x data/README.md") == 0,
          "-x: %s", output);
    unlink(SCRATCH "/models--a--b/refs/main"); // of another revision it has none
    same_logits(SCRATCH "/single", SCRATCH "/models--a--b");
    make_directory(SCRATCH "/models--a--b/snapshots/4567");
    refused(open_model, SCRATCH "/models--a--b", "a Hugging Face cache; give one of the");
    says("models--a--b/snapshots");
    write_file(SCRATCH "/models--a--b/refs/main", "89ab", 4);
    refused(open_model, SCRATCH "/models--a--b", "/snapshots/89ab: No such file");
}

static void test_bad_safetensors(void) {
    bad_input = "safetensors headers";
    char *config = config_text(NULL), data[64] = {0};
    const char *file = SCRATCH "/bad/model.safetensors";
    make_directory(SCRATCH "/bad");
    write_file(SCRATCH "/bad/config.json", config, strlen(config));
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        begin("a safetensors header with ", headers[i].name);
        write_raw(file, headers[i].header, strlen(headers[i].header), data, sizeof data);
        refused(open_model, SCRATCH "/bad", headers[i].message);
        says(SCRATCH "/bad");
    }

    test_begin("a file with NUL bytes in its header");
    write_raw(file, "{\"weight_a\":\0{}}", 16, data, sizeof data);
    refused(open_model, SCRATCH "/bad", file);

    test_begin("a header longer than the file");
    char lengths[][16] = {
        "\xff\x00\x00\x00\x00\x00\x00\x00{}     ",  "\x09\x00\x00\x00\x00\x00\x00\x00{}      ",
        "\xff\xff\xff\xff\xff\xff\xff\xff{}      ", "\xff\xff\xff\xff\xff\xff\xff\x7f{}      ",
        "\x02\x00\x00\x00\x00\x00\x00\x80{}      ", "\xf8\xff\xff\xff\xff\xff\xff\xff{}      "};
    for (int i = 0; i < 6; i++) {
        write_file(file, lengths[i], sizeof lengths[i]);
        refused(open_model, SCRATCH "/bad", file);
    }

    test_begin("a file shorter than a header's length");
    for (int bytes = 1; bytes <= 8; bytes++) {
        write_file(file, "\0\0\0\0\0\0\0\0", bytes);
        refused(open_model, SCRATCH "/bad", file);
    }

    test_begin("an empty file");
    write_file(file, "", 0);
    refused(open_model, SCRATCH "/bad", "model.safetensors: the file is empty");

    for (int closed = 0; closed < 2; closed++) {
        begin("JSON nested 200000 deep, ", closed ? "closed" : "not closed");
        enum { DEPTH = 200000 };
        char *deep = allocate(2 * DEPTH, 1);
        memset(deep, '[', DEPTH);
        memset(deep + DEPTH, closed ? ']' : ' ', DEPTH);
        write_raw(file, deep, 2 * DEPTH, NULL, 0);
        refused(open_model, SCRATCH "/bad", file);
        free(deep);
    }

    test_begin("a header of 1000000 tensors"); // in linear time
    enum { MANY = 1000000 };
    char *many = allocate(MANY, 80), *end = many;
    for (int i = 0; i < MANY; i++)
        end += sprintf(end, "%c\"t%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}",
                       i ? ',' : '{', i);
    *end++ = '}';
    write_raw(file, many, end - many, NULL, 0);
    refused(open_model, SCRATCH "/bad", "tensor model.embed_tokens.weight is missing");
    free(many);

    test_begin("a header of more than 100 MB");
    const char wanted[] = "bytes of JSON, expected at most 100000000";
    const long long limit = 100000000, sizes[] = {limit + 1, 1000000000};
    for (int i = 0; i < 2; i++) { // sparse files
        char prefix[8];
        for (int k = 0; k < 8; k++) prefix[k] = (char)(sizes[i] >> 8 * k);
        write_file(file, prefix, 8);
        check(truncate(file, 8 + sizes[i]) == 0, "not truncated");
        refused(open_model, SCRATCH "/bad", wanted);
    }
    write_file(file, "GGUF\0\0\0", 8); // which the file is long enough for, taken for a length
    check(truncate(file, 1200000000) == 0, "not truncated");
    refused(open_model, SCRATCH "/bad", "it is a GGUF file");
    write_file(file, "", 0);
    free(config);

    test_begin("a file that ends early");
    config = config_text(NULL);
    Weights w = make_weights(config, BF16, 0);
    write_directory("bad", config, &w);
    size_t bytes;
    char *whole = read_file(file, &bytes);
    write_file(file, whole, bytes - 1);
    refused(open_model, SCRATCH "/bad", "tensor lm_head.weight ends at byte");
    free(whole);
    free_weights(&w);
    free(config);
}

/* ---- bad directories ----------------------------------------------------------------------- */

static void test_bad_tensors(void) {
    bad_input = "tensors missing, of a wrong dtype or shape";
    char *config = config_text(NULL);
    static const char *const needed[] = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    };
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        Weights w = make_weights(config, BF16, 0);
        Tensor *t = weight(&w, needed[i]);
        begin("wrong dtype: ", needed[i]);
        Tensor right = *t;
        t->dtype = U8;
        t->shape[t->n_dims - 1] *= 2;
        write_directory("bad", config, &w);
        refused(open_model, SCRATCH "/bad", needed[i]);

        begin("wrong shape: ", needed[i]);
        *t = right;
        t->shape[0]--;
        t->bytes = t->shape[0] * (t->n_dims == 2 ? t->shape[1] : 1) * 2;
        write_directory("bad", config, &w);
        refused(open_model, SCRATCH "/bad", needed[i]);
        says("shape");

        begin("wrong number of dimensions: ", needed[i]);
        *t = right;
        if (t->n_dims == 1) t->n_dims = 2, t->shape[1] = 1;
        else t->n_dims = 1, t->shape[0] *= t->shape[1];
        write_directory("bad", config, &w);
        refused(open_model, SCRATCH "/bad", needed[i]);

        begin("missing: ", needed[i]);
        *t = right;
        remove_tensor(&w, needed[i]);
        write_directory("bad", config, &w);
        char *message = text_of("tensor %s is missing", needed[i]);
        refused(open_model, SCRATCH "/bad", message);
        free(message);
        free_weights(&w);
    }
    free(config);
}

static void test_bad_directories(void) {
    bad_input = "directories, indices, shards";
    test_begin("a missing model");
    refused(open_model, SCRATCH "/nowhere", SCRATCH "/nowhere: No such file");
    refused(open_model, SCRATCH "/nowhere.bin", SCRATCH "/nowhere.bin: No such file");
    refused(open_model, "", "No such file");

    test_begin("an empty model.bin");
    write_file(SCRATCH "/empty.bin", "", 0);
    refused(open_model, SCRATCH "/empty.bin", "empty.bin: the file is empty");

    test_begin("a device for a model.bin");
    refused(open_model, "/dev/null", "/dev/null: not a regular file");

    test_begin("a directory without config.json");
    make_directory(SCRATCH "/bare");
    refused(open_model, SCRATCH "/bare", "bare/config.json");

    test_begin("a directory without weights");
    char *config = config_text(NULL);
    write_file(SCRATCH "/bare/config.json", config, strlen(config));
    refused(open_model, SCRATCH "/bare", "bare/model.safetensors: No such file");
    unlink(SCRATCH "/bare/config.json");

    test_begin("an empty or broken config.json");
    Weights w = make_weights(config, BF16, 0);
    write_directory("bad", config, &w);
    write_file(SCRATCH "/bad/config.json", "", 0);
    refused(open_model, SCRATCH "/bad", "config.json: the file is empty");
    write_file(SCRATCH "/bad/config.json", config, strlen(config) / 2);
    refused(open_model, SCRATCH "/bad", "config.json: not valid JSON");
    write_file(SCRATCH "/bad/config.json", "[]", 2);
    refused(open_model, SCRATCH "/bad", "config.json");

    test_begin("a missing shard");
    write_shards("bad_shards", config, &w, 9, "");
    unlink(SCRATCH "/bad_shards/shard-2.safetensors");
    refused(open_model, SCRATCH "/bad_shards", "bad_shards/shard-2.safetensors: No such file");

    test_begin("an index that names a tensor that is in no shard");
    write_shards("bad_shards", config, &w, 9, ",\"lost.weight\": \"shard-2.safetensors\"");
    refused(open_only, SCRATCH "/bad_shards", "lost.weight");

    test_begin("an index that leaves its directory");
    char *outside[] = {"../single/model.safetensors", "/etc/passwd", "a/b", "..", ".", ""};
    for (int i = 0; i < 6; i++) {
        char *more = text_of(",\"out.weight\": \"%s\"", outside[i]);
        write_shards("bad_shards", config, &w, 9, more);
        refused(open_only, SCRATCH "/bad_shards", "bad_shards/");
        says(outside[i]);
        free(more);
    }

    test_begin("a shard's name with a NUL, and with escaped slashes");
    write_shards("bad_shards", config, &w, 9, ",\"a\": \"shard-1.safetensors\\u0000x\"");
    refused(open_only, SCRATCH "/bad_shards", "no name of a file beside it");
    write_shards("bad_shards", config, &w, 9, ",\"a\": \"\\u002e.\\/single\\/model.safetensors\"");
    refused(open_only, SCRATCH "/bad_shards", "shard ../single/model.safetensors is no name");

    test_begin("a tensor in two shards");
    write_shards("bad_shards", config, &w, 9, "");
    write_safetensors(SCRATCH "/bad_shards/shard-2.safetensors", "{", &w, 8, w.n - 8);
    refused(open_only, SCRATCH "/bad_shards", w.tensors[8].name);

    static const char *const indices[] = {
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": 1}",
        "{\"weight_map\": {}}",
        "{\"weight_map\": []}",
        "{\"weight_map\": [\"a\"]}",
        "{\"weight_map\": {\"a\": 1}}",
        "{\"weight_map\": {\"a\": [\"shard-1.safetensors\"]}}",
        "{\"1\":1,\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":1,\"weight_map\": [\"a\"]}",
        "{\"1\":[],\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":[1],\"weight_map\": [\"a\"]}",
    };
    test_begin("an index without a map of names");
    write_shards("bad_shards", config, &w, 9, "");
    const char *index = SCRATCH "/bad_shards/model.safetensors.index.json";
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++) {
        write_file(index, indices[i], strlen(indices[i]));
        refused(open_only, SCRATCH "/bad_shards", index);
    }
    free_weights(&w);
    free(config);
}

/* Files of a model that are no files. Links to files are fine: caches of downloads have them. */
static void test_not_files(void) {
    bad_input = "FIFOs, devices, directories and broken links for files";
    static const char *const names[] = {"config.json", "generation_config.json", "tokenizer.json",
                                        "model.safetensors.index.json", "model.safetensors"};
    char *config = config_text(NULL);
    Weights w = make_weights(config, BF16, 0);
    for (int i = 0; i < 5; i++) {
        char *file = text_of(SCRATCH "/odd_files/%s", names[i]);
        char *message = text_of("%s: not a regular file", names[i]);
        write_directory("odd_files", config, &w);
        begin("a FIFO for ", names[i]);
        unlink(file);
        check(mkfifo(file, 0666) == 0, "no FIFO");
        refused(open_model, SCRATCH "/odd_files", message);

        static const char *const devices[] = {"/dev/null", "/dev/zero", "/dev/tty"};
        for (int k = 0; k < 3; k++) {
            begin("a link to a device for ", names[i]);
            unlink(file);
            check(symlink(devices[k], file) == 0, "no link");
            // without a terminal there is no /dev/tty
            refused(open_model, SCRATCH "/odd_files", k < 2 ? message : names[i]);
        }

        begin("a directory for ", names[i]);
        unlink(file);
        make_directory(file);
        refused(open_model, SCRATCH "/odd_files", message);
        rmdir(file);

        begin("a link that leads nowhere, or to itself, for ", names[i]);
        check(symlink(names[i], file) == 0, "no link");
        refused(open_model, SCRATCH "/odd_files", names[i]);
        unlink(file);
        free(file);
        free(message);
    }
    test_begin("a FIFO for a model.bin, and one behind a link");
    check(mkfifo(SCRATCH "/fifo.bin", 0666) == 0 && symlink("fifo.bin", SCRATCH "/link.bin") == 0,
          "no FIFO");
    refused(open_model, SCRATCH "/fifo.bin", "fifo.bin: not a regular file");
    refused(open_model, SCRATCH "/link.bin", "link.bin: not a regular file");

    test_begin("shards that are links to files");
    write_shards("linked", config, &w, 9, "");
    check(rename(SCRATCH "/linked/shard-2.safetensors", SCRATCH "/blob") == 0 &&
              symlink("../blob", SCRATCH "/linked/shard-2.safetensors") == 0,
          "no link");
    write_directory("single", config, &w);
    same_logits(SCRATCH "/linked", SCRATCH "/single");
    free_weights(&w);
    free(config);
}

/* Makes a model.bin of a model whose file is cut meanwhile. */
static void cut_while_written(int unused) {
    (void)unused;
    Checkpoint *c = checkpoint_open(SCRATCH "/cut");
    Writer *out = writer_open(SCRATCH "/cut_out/model.bin", c, NULL, c->tensors, c->n_tensors);
    if (truncate(SCRATCH "/cut/model.safetensors", 100)) _exit(9);
    for (int i = 0; i < c->n_tensors; i++) {
        char *copy = allocate(c->tensors[i].bytes, 1); // write() itself would say EFAULT
        memcpy(copy, c->tensors[i].data, c->tensors[i].bytes);
        writer_put(out, c->tensors[i].name, copy, c->tensors[i].bytes);
    }
}

static void test_cut_files(void) {
    // Large enough that what is cut off does not share a page with what is left.
    char *config = config_for_groups();
    Weights w = make_weights(config, BF16, 0);
    test_begin("a file that is cut while a model.bin is made of it: a bus error, no model.bin");
    if (system("mkdir -p " SCRATCH "/cut_out")) die("no directory");
    write_directory("cut", config, &w);
    int status = status_of(cut_while_written, 0);
    check(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS, "status %x", status);
    check(system("test -z \"$(ls " SCRATCH "/cut_out)\"") == 0, "half a file is left");
    free_weights(&w);
    free(config);
}

/* ---- config.json --------------------------------------------------------------------------- */

static char *config_arg, *generation_arg;

static void parse_config(void *path) {
    config_parse(path, config_arg, generation_arg);
}

#define LLAMA3                                                                                     \
    "\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"    \
    "\"original_max_position_embeddings\":8192"

static void test_bad_configs(void) {
    bad_input = "config.json and generation_config.json";
    static const struct {
        const char *key, *value, *message;
    } cases[] = {
        {"model_type", "", "model_type is missing; only LLaMA 3.1"},
        {"model_type", "\"mistral\"", "mistral"},
        {"model_type", "\"qwen2\"", "only LLaMA 3.1 is supported"},
        {"model_type", "\"llama4\"", "llama4"},
        {"model_type", "[\n\"llama\"\n]", "model_type"},
        {"hidden_act", "\"gelu\"", "gelu"},
        {"hidden_act", "\"gelu\"", "only LLaMA 3.1 is supported"},
        {"hidden_act", "", "hidden_act"},
        {"attention_bias", "true", "attention_bias"},
        {"attention_bias", "true", "only LLaMA 3.1 is supported"},
        {"mlp_bias", "true", "mlp_bias"},
        {"mlp_bias", "true", "only LLaMA 3.1 is supported"},
        {"quantization_config", "{\"quant_method\":\"gptq\"}", "quantization_config"},
        {"rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":8.0}", "yarn"},
        {"rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":8.0}", "only LLaMA 3.1 is supported"},
        {"rope_scaling", "{\"rope_type\":\"linear\",\"factor\":8.0}", "linear"},
        {"rope_scaling", "{\"type\":\"dynamic\",\"factor\":8.0}", "dynamic"},
        {"rope_scaling", "{\"factor\":8.0}", "type is missing"},
        {"rope_scaling", "{\"rope_type\":{\n\"a\":\n1}}", "rope_type"},
        {"rope_scaling", "\"linear\"", "rope_scaling"},
        {"rope_scaling", "{\"rope_type\":\"llama3\"}", "factor is missing"},
        {"rope_scaling", "{" LLAMA3 ",\"factor\":0}", NULL}, // the first one counts
        {"rope_scaling", "{\"factor\":0," LLAMA3 "}", "factor"},
        {"rope_scaling", "{\"factor\":\"8\"," LLAMA3 "}", "factor"},
        {"rope_scaling", "{\"factor\":-8," LLAMA3 "}", "factor"},
        {"rope_scaling", "{\"low_freq_factor\":4," LLAMA3 "}", "low_freq_factor"},
        {"rope_scaling", "{\"high_freq_factor\":null," LLAMA3 "}", "high_freq_factor"},
        {"rope_scaling", "{\"original_max_position_embeddings\":0," LLAMA3 "}",
         "original_max_position_embeddings"},
        {"rope_theta", "", "rope_theta is missing"},
        {"rope_theta", "0", "rope_theta"},
        {"rope_theta", "-1", "rope_theta"},
        {"rope_theta", "null", "rope_theta"},
        {"rms_norm_eps", "", "rms_norm_eps is missing"},
        {"rms_norm_eps", "0", "rms_norm_eps"},
        {"rms_norm_eps", "\"1e-5\"", "rms_norm_eps"},
        {"rms_norm_eps", "1e400", "rms_norm_eps"},
        {"rms_norm_eps", "1e-300", "rms_norm_eps"}, // 0 as a float
        {"rms_norm_eps", "1e300", "rms_norm_eps"},  // infinity
        {"num_key_value_heads", "3", "num_key_value_heads"},
        {"num_key_value_heads", "8", "num_key_value_heads"},
        {"num_attention_heads", "3", "num_attention_heads"}, // no multiple of 2 KV heads
        {"head_dim", "3", "head_dim"},
        {"head_dim", "0", "head_dim"},
        {"head_dim", "-2", "head_dim"},
        {"head_dim", "2.5", "head_dim"},
        {"head_dim", "1000000", "head_dim"},
        {"head_dim", "\"2\"", "head_dim"},
        {"hidden_size", "4", "head_dim"},     // 4 heads of one channel
        {"hidden_size", "10", "hidden_size"}, // no multiple of 4 heads
        {"eos_token_id", "-1", "eos_token_id"},
        {"eos_token_id", "1.5", "eos_token_id"},
        {"eos_token_id", "[1, -1]", "eos_token_id"},
        {"eos_token_id", "[1, \"a\"]", "eos_token_id"},
        {"eos_token_id", "[1, [2]]", "eos_token_id"},
        {"eos_token_id", "1e12", "eos_token_id"},
        {"eos_token_id", "\"2\"", "eos_token_id is 2, expected token ids"},
        {"eos_token_id", "{\"a\":2}", "eos_token_id"},
        {"bos_token_id", "\"1\"", "bos_token_id is 1, expected a token id"},
        {"bos_token_id", "[1]", "bos_token_id"},
        {"bos_token_id", "-1", "bos_token_id"},
        {"bos_token_id", "\"null\"", "bos_token_id is null, expected a token id"},
        {"eos_token_id", "\"null\"", "eos_token_id"},
        {"head_dim", "\"null\"", "head_dim"},
        {"num_key_value_heads", "\"null\"", "num_key_value_heads"},
        {"max_position_embeddings", "1", "max_position_embeddings"},
        {"rope_scaling", "\"null\"", "rope_scaling is null, expected an object"},
        {"attention_bias", "1", "attention_bias is 1, expected true or false"},
        {"attention_bias", "\"false\"", "attention_bias is false, expected true or false"},
        {"mlp_bias", "\"true\"", "mlp_bias"},
        {"tie_word_embeddings", "0", "tie_word_embeddings"},
        {"rope_parameters", "{\"rope_theta\":10000.0}", NULL},
        {"rope_parameters", "{\"rope_theta\":10000.0,\"type\":\"default\"}", NULL},
        {"rope_scaling", "{\"type\":\"default\"}", NULL},
        {"rope_scaling", "{\"factor\":8.0}", "type is missing"},
        {"rope_parameters", "{\"rope_theta\":1e4,\"rope_type\":\"yarn\"}", "rope_type is yarn"},
        {"rope_parameters", "5", "rope_parameters is 5, expected an object"},
        {"rope_parameters", "null", NULL},
        {"quantization_config", "{\"quant_method\":\"awq\",\"bits\":4}", "quant_method awq"},
        {"quantization_config", "\"awq\"", "quantization_config"},
        {"eos_token_id", "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]", "eos_token_id"},
    };
    generation_arg = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *what = text_of("config.json with %s %s", cases[i].key,
                             *cases[i].value ? cases[i].value : "left out");
        for (char *s = what; *s; s++)
            if (*s == '\n') *s = ' ';
        begin(what, "");
        free(what);
        config_arg = config_text(cases[i].key, cases[i].value, NULL);
        if (cases[i].message) {
            refused(parse_config, "the/path", cases[i].message);
            says("the/path: config.json");
        } else {
            config_parse("the/path", config_arg, NULL);
        }
        free(config_arg);
    }

    static const char *const sizes[] = {
        "hidden_size",         "intermediate_size", "num_hidden_layers",      "num_attention_heads",
        "num_key_value_heads", "vocab_size",        "max_position_embeddings"};
    static const char *const values[] = {"",     "0",     "-1",    "1.5", "1e300",
                                         "1e10", "\"8\"", "null",  "[8]", "{\"8\":8}",
                                         "true", "8.0",   "1e-30", "-0",  "99999999999999999999"};
    for (int i = 0; i < 7; i++) {
        begin("config.json with bad ", sizes[i]);
        for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
            // left out or null: as many KV heads as heads
            bool fine = !strcmp(sizes[i], "num_key_value_heads") &&
                        (!*values[k] || !strcmp(values[k], "null"));
            if (fine) continue;
            config_arg = config_text(sizes[i], values[k], NULL);
            refused(parse_config, "the/path", sizes[i]);
            free(config_arg);
        }
    }

    test_begin("config.json that is no JSON");
    char *broken[] = {"",
                      " ",
                      "{",
                      "{]",
                      "[]",
                      "null",
                      "\"a\"",
                      "{\"model_type\":\"llama\"",
                      "NaN",
                      "{\"hidden_size\": NaN}",
                      "{\"a\": 0x10}",
                      "{\"a\": 8-8}",
                      "{\"a\": 08}",
                      "{\"a\": \"\xff\"}"};
    for (int i = 0; i < 14; i++) {
        config_arg = broken[i];
        refused(parse_config, "the/path", "the/path: config.json");
    }

    test_begin("generation_config.json that is no JSON, or has bad ids");
    config_arg = config_text(NULL);
    char *bad_generation[] = {"", "{", "{\"eos_token_id\": -5}", "{\"eos_token_id\": [\"x\"]}",
                              "[]"};
    for (int i = 0; i < 5; i++) {
        generation_arg = bad_generation[i];
        refused(parse_config, "the/path", "the/path: generation_config.json");
    }
    free(config_arg);
}

static void test_good_configs(void) {
    char *config = config_text(NULL);
    Config c = config_parse("", config, NULL);
    test_begin("config.json: every field arrives");
    check(c.dim == 8 && c.hidden_dim == 12 && c.n_layers == 2 && c.n_heads == 4 &&
              c.n_kv_heads == 2 && c.head_dim == 2 && c.vocab_size == 16 &&
              c.max_context == 131072 && c.norm_eps == 1e-5f && c.rope_theta == 500000 &&
              c.rope_factor == 0 && !c.tied && c.bos == 1 && c.n_eos == 1 && c.eos[0] == 2,
          "another value");

    test_begin("config.json: head_dim given, absent and null");
    char *other = config_text("head_dim", "6", NULL);
    check(config_parse("", other, NULL).head_dim == 6, "given");
    free(other);
    other = config_text("head_dim", "null", NULL);
    check(config_parse("", other, NULL).head_dim == 2, "null");
    free(other);

    test_begin("config.json: num_key_value_heads absent or null");
    for (int i = 0; i < 2; i++) {
        other = config_text("num_key_value_heads", i ? "null" : "", NULL);
        config_arg = other;
        generation_arg = NULL;
        char message[512];
        dies(parse_config, "x", message, sizeof message);
        if (check(!*message, "%s", message))
            check(config_parse("", other, NULL).n_kv_heads == 4, "not the number of heads");
        free(other);
    }

    test_begin("config.json: keys that may be left out");
    other = config_text("attention_bias", "", "mlp_bias", "", "tie_word_embeddings", "",
                        "bos_token_id", "", "eos_token_id", "", NULL);
    c = config_parse("", other, NULL);
    check(!c.tied && c.bos == -1 && c.n_eos == 0, "other defaults");
    free(other);
    other = config_text("bos_token_id", "null", "eos_token_id", "null", "rope_scaling", "null",
                        "quantization_config", "null", "pretraining_tp", "1", NULL);
    c = config_parse("", other, NULL);
    check(c.bos == -1 && c.n_eos == 0 && c.rope_factor == 0, "null is not as absent");
    free(other);

    test_begin("config.json: empty strings, lists and objects as values of other keys");
    other = config_text("hidden_size", "", "intermediate_size", "", "a", "[]", "b", "{}", "c",
                        "[\"\", \"\"]", NULL);
    char *whole = text_of("{\"x\": \"\", \"hidden_size\": 16, \"y\": \"\", \"z\": \"\", "
                          "\"intermediate_size\": 9, %s",
                          other + 1);
    config_arg = whole;
    generation_arg = "{\"a\": \"\", \"eos_token_id\": [5, 6]}";
    char report[512];
    dies(parse_config, "x", report, sizeof report);
    if (check(!*report, "%s", report)) {
        c = config_parse("", whole, generation_arg);
        check(c.dim == 16 && c.hidden_dim == 9 && c.vocab_size == 16 && c.n_eos == 3,
              "another value");
    }
    free(whole);
    free(other);

    test_begin("config.json: rope_scaling, rope_parameters, old `type`");
    other = config_text("rope_scaling", "{" LLAMA3 "}", NULL);
    c = config_parse("", other, NULL);
    check(c.rope_factor == 8 && c.rope_low_freq_factor == 1 && c.rope_high_freq_factor == 4 &&
              c.rope_original_context == 8192 && c.rope_theta == 500000,
          "rope_scaling");
    free(other);
    other =
        config_text("rope_theta", "", "rope_parameters", "{\"rope_theta\":1e4," LLAMA3 "}", NULL);
    c = config_parse("", other, NULL);
    check(c.rope_factor == 8 && c.rope_original_context == 8192 && c.rope_theta == 1e4,
          "rope_parameters");
    free(other);
    other = config_text("rope_theta", "", "rope_parameters",
                        "{\"rope_theta\":1e4,\"rope_type\":\"default\"}", NULL);
    c = config_parse("", other, NULL);
    check(c.rope_factor == 0 && c.rope_theta == 1e4, "rope_parameters, default");
    free(other);
    other = config_text("rope_scaling", "{\"rope_type\":\"default\"}", NULL);
    check(config_parse("", other, NULL).rope_factor == 0, "rope_scaling, default");
    free(other);
    other = config_text("rope_scaling", "{\"type\":\"llama3\"," LLAMA3 "}", NULL);
    check(config_parse("", other, NULL).rope_factor == 8, "both spellings");
    free(other);

    test_begin("eos_token_id: number, list, generation_config.json, each once");
    c = config_parse("", config, "{\"eos_token_id\": [2, 7, 9], \"temperature\": 0.6}");
    check(c.n_eos == 3 && c.eos[0] == 2 && c.eos[1] == 7 && c.eos[2] == 9, "%d of them", c.n_eos);
    other = config_text("eos_token_id", "[128001, 128008, 128009]", NULL);
    c = config_parse("", other, "{\"eos_token_id\": 5}");
    check(c.n_eos == 4 && c.eos[2] == 128009 && c.eos[3] == 5, "%d of them", c.n_eos);
    c = config_parse("", other, "{}");
    check(c.n_eos == 3, "%d of them", c.n_eos);
    free(other);

    test_begin("generation_config.json is read from a directory and travels in model.bin");
    Weights w = make_weights(config, BF16, 0);
    write_directory("generation", config, &w);
    const char *text = "{\"eos_token_id\": [11, 12]}";
    write_file(SCRATCH "/generation/generation_config.json", text, strlen(text));
    write_file(SCRATCH "/generation/tokenizer.json", "{\"t\":1}", 7);
    Checkpoint *d = checkpoint_open(SCRATCH "/generation");
    Writer *writer = writer_open(SCRATCH "/generation.bin", d, NULL, d->tensors, d->n_tensors);
    for (int i = 0; i < d->n_tensors; i++)
        writer_put(writer, d->tensors[i].name, d->tensors[i].data, d->tensors[i].bytes);
    writer_close(writer);
    Checkpoint *bin = checkpoint_open(SCRATCH "/generation.bin");
    for (int i = 0; i < 2; i++) {
        Checkpoint *x = i ? bin : d;
        Model *m = model_load(x);
        check(m->config.n_eos == 3 && m->config.eos[2] == 12, "%s: %d", x->path, m->config.n_eos);
        check(x->tokenizer_bytes == 7 && !memcmp(x->tokenizer, "{\"t\":1}", 7), "tokenizer");
        model_free(m);
    }
    checkpoint_close(bin);
    checkpoint_close(d);
    free_weights(&w);
    free(config);
}

static void test_model_bytes(void) {
    test_begin("model_bytes counts what one token reads");
    char *config = config_for_groups();
    // q 128, k and v 64, o 128 rows of 128; gate and up 256 rows of 128; down 128 rows of 256
    size_t n = 384 * 128 + 512 * 128 + 128 * 256, rows = 384 + 512 + 128;
    size_t rest = 3 * 128 * 4 + 16 * 128 * 2 + 128 * 2; // norms, lm_head, one embedding row
    size_t want[] = {2 * n + rest, n / 2 + 4 * rows + rest, n / 2 + 4 * rows + n / 128 + rest};
    int group_sizes[] = {0, -1, 128};
    for (int i = 0; i < 3; i++) {
        Weights w = make_weights(config, BF16, group_sizes[i]);
        write_model_bin(SCRATCH "/bytes.bin", config, i ? quantizations[i == 1] : NULL, &w);
        Checkpoint *c = checkpoint_open(SCRATCH "/bytes.bin");
        Model *m = model_load(c);
        check(model_bytes(m) == want[i], "%zu, expected %zu", model_bytes(m), want[i]);
        model_free(m);
        checkpoint_close(c);
        free_weights(&w);
    }
    free(config);
}

/* ---- bad W4A8 ------------------------------------------------------------------------------ */

#define Q "model.layers.0.self_attn.q_proj"
#define DOWN "model.layers.0.mlp.down_proj"

static char *bad_config;

/* Writes the weights as a model.bin and checks that it is refused with this message. */
static void refused_bin(Weights *w, const char *quantization, const char *message) {
    write_model_bin(SCRATCH "/bad.bin", bad_config, quantization, w);
    refused(open_model, SCRATCH "/bad.bin", message);
    says(SCRATCH "/bad.bin");
}

static void test_bad_w4a8(void) {
    bad_input = "W4A8 codes, scales and options";
    bad_config = config_for_groups();
    Weights group = make_weights(bad_config, BF16, 128),
            channel = make_weights(bad_config, BF16, -1);

    static const uint8_t bad_s_group[] = {0, 16, 255};
    for (int i = 0; i < 3; i++) {
        test_begin("W4A8: s_group outside 1..15");
        uint8_t *s = (uint8_t *)bytes_of(&group, DOWN ".s_group") + 255, old = *s; // the last one
        *s = bad_s_group[i];
        refused_bin(&group, quantizations[0], DOWN ".s_group");
        *s = old;
    }

    static const float bad_s_channel[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 6; i++) {
        test_begin("W4A8: s_channel that is not finite");
        Weights *w = i % 2 ? &group : &channel;
        float *s = (float *)bytes_of(w, Q ".s_channel") + 127, old = *s;
        *s = bad_s_channel[i / 2];
        refused_bin(w, quantizations[i % 2 == 0], Q ".s_channel");
        *s = old;
    }

    for (int high = 0; high < 2; high++) {
        test_begin("W4A8 per channel: the code 0");
        uint8_t *codes = (uint8_t *)bytes_of(&channel, DOWN ".qweight") + 128 * 128 - 1;
        uint8_t old = *codes;
        *codes &= high ? 0x0f : 0xf0;
        refused_bin(&channel, quantizations[1], DOWN ".qweight");
        *codes = old;
    }

    test_begin("W4A8 per group: the code 0 is fine");
    *(uint8_t *)bytes_of(&group, Q ".qweight") = 0;
    write_model_bin(SCRATCH "/fine.bin", bad_config, quantizations[0], &group);
    size_t n;
    free(logits_at(SCRATCH "/fine.bin", 3, &n));

    static const struct {
        const char *quantization, *message;
    } metadata[] = {
        {"{\"bits\":8,\"group_size\":128}", "bits 8"},
        {"{\"bits\":4.5,\"group_size\":128}", "bits 4.5"},
        {"{\"group_size\":128}", "bits"},
        {"{\"bits\":4,\"group_size\":64}", "group_size 64"},
        {"{\"bits\":4,\"group_size\":0}", "group_size 0"},
        {"{\"bits\":4,\"group_size\":-128}", "group_size -128"},
        {"{\"bits\":4,\"group_size\":\"128\"}", "group_size"},
        {"{\"bits\":4}", "group_size"},
        {"{}", "bits"},
        {"[]", "bits"},
        {"", "quantization"},
        {"{\"bits\":4,", "quantization"},
    };
    for (size_t i = 0; i < sizeof metadata / sizeof *metadata; i++) {
        begin("W4A8: quantization ", metadata[i].quantization);
        refused_bin(&group, metadata[i].quantization, metadata[i].message);
        refused_bin(&group, metadata[i].quantization, "quantization");
    }

    test_begin("W4A8 read as what it is not");
    refused_bin(&group, NULL, Q ".weight is missing");
    refused_bin(&channel, quantizations[0], Q ".s_group is missing");

    static const char *const parts[] = {Q ".qweight", Q ".s_channel", DOWN ".s_group"};
    for (int i = 0; i < 3; i++) {
        Tensor *t = weight(&group, parts[i]), right = *t;
        begin("W4A8, wrong dtype: ", parts[i]);
        t->dtype = right.dtype == U8 ? F16 : BF16;
        t->bytes = right.bytes / dtype_size(right.dtype) * 2;
        t->data = allocate(t->bytes, 1);
        refused_bin(&group, quantizations[0], parts[i]);
        free((void *)t->data);
        *t = right;

        begin("W4A8, wrong shape: ", parts[i]);
        t->shape[0] /= 2;
        t->bytes /= 2;
        refused_bin(&group, quantizations[0], parts[i]);
        *t = right;
        if (t->n_dims == 2) {
            t->shape[0] *= 2;
            t->shape[1] /= 2;
            if (t->shape[1]) refused_bin(&group, quantizations[0], parts[i]);
            *t = right;
        }

        begin("W4A8, missing: ", parts[i]);
        char *name = t->name;
        t->name = "another";
        refused_bin(&group, quantizations[0], parts[i]);
        t->name = name;
    }

    test_begin("lm_head in 8 bits");
    remove_tensor(&group, "lm_head.weight");
    int8_t *q = allocate(16, 128);
    float *scales = allocate(16, sizeof *scales);
    for (int i = 0; i < 16 * 128; i++) q[i] = i * 37;   // -128 too
    for (int i = 0; i < 16; i++) scales[i] = 0.01f * i; // 0 too
    add_tensor(&group, text_of("lm_head.weight"), I8, 16, 128, q);
    add_tensor(&group, text_of("lm_head.s_channel"), F32, 16, 0, scales);
    write_model_bin(SCRATCH "/fine.bin", bad_config, quantizations[0], &group);
    free(logits_at(SCRATCH "/fine.bin", 3, &n));
    for (int i = 0; i < 3; i++) {
        scales[15] = bad_s_channel[i];
        refused_bin(&group, quantizations[0], "lm_head.s_channel is not finite");
    }
    scales[15] = 1;
    Tensor *t = weight(&group, "lm_head.s_channel"), right = *t;
    t->dtype = F16, t->shape[0] *= 2;
    refused_bin(&group, quantizations[0], "lm_head.s_channel has the shape [32], expected [16]");
    *t = right;
    t->dtype = I32;
    refused_bin(&group, quantizations[0], "lm_head.s_channel has dtype I32, expected F32");
    *t = right;
    t->name = "another";
    refused_bin(&group, quantizations[0], "lm_head.s_channel is missing");
    *t = right;
    t = weight(&group, "lm_head.weight"), right = *t;
    t->dtype = U8;
    refused_bin(&group, quantizations[0], "lm_head.weight has dtype U8");
    *t = right;
    t->shape[0] = 8, t->shape[1] = 256;
    refused_bin(&group, quantizations[0], "lm_head.weight has the shape [8, 256]");
    *t = right;

    test_begin("8 bits where they do not belong: the embedding, lm_head of a 16-bit model");
    t = weight(&group, "model.embed_tokens.weight"), right = *t;
    t->dtype = I8, t->bytes /= 2;
    refused_bin(&group, quantizations[0], "model.embed_tokens.weight has dtype I8");
    *t = right;
    Weights plain = make_weights(bad_config, BF16, 0);
    t = weight(&plain, "lm_head.weight");
    t->dtype = I8, t->bytes /= 2;
    refused_bin(&plain, NULL, "lm_head.weight has dtype I8, expected F32, F16 or BF16");
    free_weights(&plain);
    free_weights(&group);
    free_weights(&channel);
    free(bad_config);

    test_begin("W4A8 with groups: K that is no multiple of 128");
    bad_config =
        config_text("hidden_size", "128", "intermediate_size", "192", "head_dim", "32", NULL);
    Weights odd = make_weights(bad_config, BF16, 128);
    refused_bin(&odd, quantizations[0], "mlp.down_proj");
    free_weights(&odd);
    free(bad_config);

    test_begin("W4A8 per channel: odd K");
    bad_config =
        config_text("hidden_size", "128", "intermediate_size", "191", "head_dim", "32", NULL);
    odd = make_weights(bad_config, BF16, -1);
    refused_bin(&odd, quantizations[1], "mlp.down_proj");
    free_weights(&odd);
    free(bad_config);
}

static void test_bad_model_bin(void) {
    bad_input = "model.bin metadata and versions";
    static const struct {
        const char *name, *metadata, *message;
    } cases[] = {
        {"no metadata", "{", "its format is not stated"},
        {"format pt", "{\"__metadata__\":{\"format\":\"pt\"}", "its format is pt"},
        {"format that is a number", "{\"__metadata__\":{\"format\":1}", "no string"},
        {"no version", "{\"__metadata__\":{\"format\":\"qqq\"}", "version"},
        {"version 2", "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"2\"}",
         "version 2 of the format, expected 1; a newer program made it"},
        {"version 1.5", "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"1.5\"}",
         "version 1.5 of the format, expected 1; a newer program made it"},
        {"version 0", "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"0\"}",
         "version 0 of the format, expected 1"},
        {"version x", "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"x\"}",
         "version x of the format, expected 1"},
        {"no config", "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"1\"}", "no config"},
        {"a config that is no JSON",
         "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"1\",\"config\":\"x\"}",
         "config.json"},
        {"a config that is an object",
         "{\"__metadata__\":{\"format\":\"qqq\",\"version\":\"1\",\"config\":{}}", "no string"},
    };
    char *config = config_text(NULL);
    Weights w = make_weights(config, BF16, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin("model.bin with ", cases[i].name);
        write_safetensors(SCRATCH "/bad.bin", cases[i].metadata, &w, 0, w.n);
        refused(open_model, SCRATCH "/bad.bin", cases[i].message);
        says(SCRATCH "/bad.bin");
    }

    test_begin("model.bin whose tokenizer.json is not U8");
    Checkpoint none = {.config = config};
    Tensor t = {.name = "tokenizer.json", .dtype = F32, .n_dims = 1, .shape = {1}, .bytes = 4};
    Writer *writer = writer_open(SCRATCH "/bad.bin", &none, NULL, &t, 1);
    writer_put(writer, "tokenizer.json", "1234", 4);
    writer_close(writer);
    refused(open_model, SCRATCH "/bad.bin", "tokenizer.json");
    free_weights(&w);
    free(config);
}

/* ---- damaged bytes ------------------------------------------------------------------------- */

/* Opens, loads and runs the model; says so with the status of a clean end. */
static void survive(void *path) {
    open_model(path);
    fprintf(stderr, "survived\n");
    _exit(1);
}

/* Changes one byte of a file of `bytes` at places [0, span), or cuts it, and opens it: `count`
 * times. */
static void damage(const char *path, const char *model, size_t span, int count, uint64_t seed) {
    static const char meaningful[] = "\"\\{}[],:0129-.eEntfu \n";
    size_t bytes;
    char *file = read_file(path, &bytes);
    int survived = 0;
    if (span > bytes) span = bytes;
    for (int i = 0; i < count; i++) {
        size_t at = (random_float(&seed) + 1.0) / 2 * span;
        char old = file[at];
        int kind = (int)(3.99 * fabsf(random_float(&seed)));
        if (kind == 0) file[at] ^= 1 << (int)(7.99 * fabsf(random_float(&seed)));
        if (kind == 1) file[at] = (int)(255 * fabsf(random_float(&seed)));
        if (kind == 2)
            file[at] = meaningful[(int)((sizeof meaningful - 1) * fabsf(random_float(&seed)))];
        write_file(path, file, kind == 3 ? at : bytes);
        count_bad_input("bytes of model files changed or cut at random");
        bool clean = dies(survive, (void *)model, message, sizeof message);
        survived += !strcmp(message, "survived\n");
        if (!check(clean, "byte %zu of %s, %02x made %02x, kind %d: %s", at, path, old & 255,
                   file[at] & 255, kind, message))
            break;
        file[at] = old;
    }
    write_file(path, file, bytes);
    check(survived > 0 && survived < count, "%d of %d were fine", survived, count);
    free(file);
}

static void test_damage(void) {
    char *config = config_text(NULL), *for_groups = config_for_groups();
    Weights w = make_weights(config, BF16, 0);
    Weights group = make_weights(for_groups, F16, 128), channel = make_weights(for_groups, F16, -1);
    test_begin("damaged model.safetensors: fine or refused");
    write_directory("damaged", config, &w);
    damage(SCRATCH "/damaged/model.safetensors", SCRATCH "/damaged", SIZE_MAX, 500, 1);

    test_begin("damaged config.json: fine or refused");
    write_directory("damaged", config, &w);
    damage(SCRATCH "/damaged/config.json", SCRATCH "/damaged", SIZE_MAX, 400, 2);

    test_begin("damaged model.safetensors.index.json: fine or refused");
    write_shards("damaged_shards", config, &w, 9, "");
    damage(SCRATCH "/damaged_shards/model.safetensors.index.json", SCRATCH "/damaged_shards",
           SIZE_MAX, 400, 3);

    test_begin("damaged header of a W4A8 model.bin: fine or refused");
    write_model_bin(SCRATCH "/damaged.bin", for_groups, quantizations[0], &group);
    damage(SCRATCH "/damaged.bin", SCRATCH "/damaged.bin", 3000, 400, 4);

    test_begin("damaged data of a W4A8 model.bin: fine or refused");
    write_model_bin(SCRATCH "/damaged.bin", for_groups, quantizations[0], &group);
    damage(SCRATCH "/damaged.bin", SCRATCH "/damaged.bin", SIZE_MAX, 150, 5);
    write_model_bin(SCRATCH "/damaged.bin", for_groups, quantizations[1], &channel);
    damage(SCRATCH "/damaged.bin", SCRATCH "/damaged.bin", SIZE_MAX, 150, 6);
    free_weights(&w);
    free_weights(&group);
    free_weights(&channel);
    free(config);
    free(for_groups);
}

void test_files(void) {
    if (system("rm -rf " SCRATCH " && mkdir -p " SCRATCH)) die(SCRATCH ": cannot be made");
    test_layouts();
    test_round_trip();
    test_writer();
    test_good_configs();
    test_model_bytes();
    test_bad_safetensors();
    test_verdicts();
    test_other_formats();
    test_bad_tensors();
    test_bad_directories();
    test_not_files();
    test_cut_files();
    test_bad_configs();
    test_bad_w4a8();
    test_bad_model_bin();
    test_damage();
}
