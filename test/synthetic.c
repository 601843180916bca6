/* synthetic: writes a LLaMA 3.1 of any shape with random weights, a Hugging Face directory in BF16
 * or a W4A8 model.bin, for measurements and tests. The same options give the same bytes, whatever
 * the number of threads.
 *
 *   build/synthetic OUT [--shape 1b|8b] [--dim D] [--hidden H] [--layers L] [--heads N]
 *                       [--kv-heads N] [--head-dim D] [--vocab V] [--seed S] [--w4a8 -1|128]
 *                       [--head 16|8] [--shards N] [--tokenizer FILE]
 *
 * Weights are normal, of a scale that keeps activations near 1 at any depth: linears 1/sqrt(K),
 * those that add to the residual stream 1/sqrt(2 n_layers) of that. */

// The writer is in quantize.c, and static there.
#define main quantize_main
int quantize_main(int argc, char **argv);
#include "../quantize.c"
#undef main

/* ---- options ------------------------------------------------------------------------------- */

typedef struct {
    const char *out, *tokenizer;
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, seed, w4a8, head, shards;
} Settings;

static Settings parse_settings(int argc, char **argv) {
    Settings o = {.tokenizer = "data/tiny/tokenizer.json", .dim = 256, .hidden = 896};
    o.layers = 4, o.heads = 4, o.kv_heads = 1, o.vocab = 4096, o.head = 16, o.shards = 1;
    const struct {
        const char *name;
        int *value;
    } numbers[] = {
        {"--dim", &o.dim},           {"--hidden", &o.hidden},     {"--layers", &o.layers},
        {"--heads", &o.heads},       {"--kv-heads", &o.kv_heads}, {"--vocab", &o.vocab},
        {"--head-dim", &o.head_dim}, {"--seed", &o.seed},         {"--w4a8", &o.w4a8},
        {"--head", &o.head},         {"--shards", &o.shards},
    };
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-') {
            if (o.out) die_usage("two outputs: %s and %s", o.out, argv[i]);
            o.out = argv[i];
            continue;
        }
        const char *name = argv[i], *value = argv[++i];
        if (!value) die_usage("%s: its value is missing", name);
        int *number = NULL;
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            if (!strcmp(name, numbers[k].name)) number = numbers[k].value;
        if (number) {
            char *end;
            long x = strtol(value, &end, 10);
            if (end == value || *end || x < -1 || x > INT_MAX)
                die_usage("%s %s: expected a whole number", name, value);
            *number = (int)x;
        } else if (!strcmp(name, "--tokenizer")) {
            o.tokenizer = value;
        } else if (!strcmp(name, "--shape") && !strcmp(value, "1b")) {
            o.dim = 2048, o.hidden = 8192, o.layers = 16, o.heads = 32, o.kv_heads = 8;
            o.vocab = 32000;
        } else if (!strcmp(name, "--shape") && !strcmp(value, "8b")) {
            o.dim = 4096, o.hidden = 14336, o.layers = 32, o.heads = 32, o.kv_heads = 8;
            o.vocab = 128256;
        } else {
            die_usage("unknown option %s %s", name, value);
        }
    }
    if (!o.out) die_usage("expected the path to write");
    if (o.dim < 1 || o.hidden < 1 || o.layers < 1 || o.heads < 1 || o.kv_heads < 1 || o.vocab < 1)
        die_usage("sizes must be at least 1");
    if (!o.head_dim) o.head_dim = o.dim / o.heads;
    if (o.w4a8 && o.w4a8 != -1 && o.w4a8 != 128) die_usage("--w4a8 %d: expected -1 or 128", o.w4a8);
    if (o.w4a8 == 128 && (o.dim % 128 || o.hidden % 128 || o.heads * o.head_dim % 128))
        die_usage("--w4a8 128: sizes must be multiples of 128");
    if (o.head != 16 && (o.head != 8 || !o.w4a8))
        die_usage("--head %d: expected 16 or, of a W4A8 model, 8", o.head);
    if (o.shards < 1 || (o.shards > 1 && o.w4a8))
        die_usage("--shards %d: a directory has at least 1, a model.bin no shards", o.shards);
    return o;
}

/* ---- what to write ------------------------------------------------------------------------- */

typedef enum { NORMAL, CODES, BYTES, SCALES, GROUPS } Kind;

typedef struct {
    Kind kind;
    float mean, deviation; // of NORMAL values; of SCALES the mean
} Fill;

typedef struct {
    Tensor *tensors; // [n]
    Fill *fills;     // [n] what each holds
    int n;
} Plan;

/* Standard deviations of the codes q = u - 8 and of int8, and the mean of s_group, that fill()
 * draws. */
static const float code_deviation = 2.5f, byte_deviation = 32, mean_group = 11.5f;

static void plan_tensor(Plan *p, const char *name, DType dtype, int64_t N, int64_t K, Fill fill) {
    p->tensors = realloc(p->tensors, (size_t)(p->n + 1) * sizeof *p->tensors);
    p->fills = realloc(p->fills, (size_t)(p->n + 1) * sizeof *p->fills);
    if (!p->tensors || !p->fills) die("no memory");
    p->fills[p->n] = fill;
    p->tensors[p->n++] = (Tensor){.name = strdup(name),
                                  .dtype = dtype,
                                  .n_dims = K ? 2 : 1,
                                  .shape = {N, K},
                                  .bytes = (size_t)(N * (K ? K : 1)) * dtype_size(dtype)};
}

static void plan_linear(Plan *p, const Settings *o, const char *name, int N, int K,
                        float deviation) {
    char full[128];
    if (!o->w4a8) {
        snprintf(full, sizeof full, "%s.weight", name);
        plan_tensor(p, full, BF16, N, K, (Fill){NORMAL, 0, deviation});
        return;
    }
    snprintf(full, sizeof full, "%s.qweight", name);
    plan_tensor(p, full, U8, N, K / 2, (Fill){.kind = CODES});
    float scale = deviation / code_deviation / (o->w4a8 > 0 ? mean_group : 1);
    snprintf(full, sizeof full, "%s.s_channel", name);
    plan_tensor(p, full, F32, N, 0, (Fill){SCALES, scale, 0});
    snprintf(full, sizeof full, "%s.s_group", name);
    if (o->w4a8 > 0) plan_tensor(p, full, U8, N, K / 128, (Fill){.kind = GROUPS});
}

static Plan make_plan(const Settings *o) {
    Plan p = {0};
    const Fill norm = {NORMAL, 1, 0.05f};
    int q = o->heads * o->head_dim, kv = o->kv_heads * o->head_dim;
    float add_up = 1 / sqrtf(2.0f * (float)o->layers); // for o and down
    plan_tensor(&p, "model.embed_tokens.weight", BF16, o->vocab, o->dim, (Fill){NORMAL, 0, 1});
    for (int l = 0; l < o->layers; l++) {
        const struct {
            const char *name;
            int N, K;
            float scale;
        } linears[] = {
            {"self_attn.q_proj", q, o->dim, 1},          {"self_attn.k_proj", kv, o->dim, 1},
            {"self_attn.v_proj", kv, o->dim, 1},         {"self_attn.o_proj", o->dim, q, add_up},
            {"mlp.gate_proj", o->hidden, o->dim, 1},     {"mlp.up_proj", o->hidden, o->dim, 1},
            {"mlp.down_proj", o->dim, o->hidden, add_up}};
        char name[96];
        for (int i = 0; i < 7; i++) {
            snprintf(name, sizeof name, "model.layers.%d.%s", l, linears[i].name);
            plan_linear(&p, o, name, linears[i].N, linears[i].K,
                        linears[i].scale / sqrtf((float)linears[i].K));
        }
        snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", l);
        plan_tensor(&p, name, BF16, o->dim, 0, norm);
        snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", l);
        plan_tensor(&p, name, BF16, o->dim, 0, norm);
    }
    plan_tensor(&p, "model.norm.weight", BF16, o->dim, 0, norm);
    const float deviation = 2 / sqrtf((float)o->dim);
    if (o->head == 8) {
        plan_tensor(&p, "lm_head.weight", I8, o->vocab, o->dim, (Fill){.kind = BYTES});
        plan_tensor(&p, "lm_head.s_channel", F32, o->vocab, 0,
                    (Fill){SCALES, deviation / byte_deviation, 0});
    } else {
        plan_tensor(&p, "lm_head.weight", BF16, o->vocab, o->dim, (Fill){NORMAL, 0, deviation});
    }
    return p;
}

static char *make_config(const Settings *o, int bos, int eos) {
    char *config = allocate(1, 2048);
    snprintf(config, 2048,
             "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", "
             "\"hidden_act\": \"silu\", \"hidden_size\": %d, \"intermediate_size\": %d, "
             "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, "
             "\"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d, "
             "\"bos_token_id\": %d, \"eos_token_id\": %d, \"max_position_embeddings\": 131072, "
             "\"rms_norm_eps\": 1e-05, \"rope_theta\": 500000.0, \"rope_scaling\": "
             "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, "
             "\"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}, "
             "\"attention_bias\": false, \"mlp_bias\": false, \"tie_word_embeddings\": false, "
             "\"torch_dtype\": \"bfloat16\"}\n",
             o->dim, o->hidden, o->layers, o->heads, o->kv_heads, o->head_dim, o->vocab, bos, eos);
    return config;
}

/* ---- random contents ----------------------------------------------------------------------- */

enum { TABLE = 4096 };

/* The normal distribution as TABLE equally likely values, its quantiles: one lookup by 12 random
 * bits draws a number. */
static float quantiles[TABLE];

static void make_quantiles(void) {
    for (int i = 0; i < TABLE; i++) { // Phi(z) = (i + 1/2) / TABLE, by bisection
        double low = -6, high = 6;
        for (int step = 0; step < 50; step++) {
            double z = (low + high) / 2;
            *(0.5 * erfc(-z / sqrt(2)) < (i + 0.5) / TABLE ? &low : &high) = z;
        }
        quantiles[i] = (float)low;
    }
}

/* splitmix64 of a counter: any number of threads gives the same numbers. */
static uint64_t random_bits(uint64_t i) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Fills a tensor's data; `key` numbers the stream of random bits, 2^40 each. */
static void fill(const Tensor *t, Fill f, uint64_t key, void *data) {
    int64_t n = (int64_t)(t->bytes / dtype_size(t->dtype));
    key <<= 40;
    if (f.kind == NORMAL) {
        uint16_t table[TABLE], *w = data;
        for (int i = 0; i < TABLE; i++) table[i] = to_bf16(f.mean + f.deviation * quantiles[i]);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i += 4) {
            uint64_t bits = random_bits(key + (uint64_t)i);
            for (int64_t j = i; j < n && j < i + 4; j++, bits >>= 16) w[j] = table[bits % TABLE];
        }
    } else if (f.kind == CODES) { // u in 1..15: allowed in both variants
        uint8_t table[TABLE], *codes = data;
        for (int i = 0; i < TABLE; i++) {
            float q = rintf(code_deviation * quantiles[i]);
            table[i] = (uint8_t)(8 + fmaxf(-7, fminf(7, q)));
        }
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i += 2) {
            uint64_t bits = random_bits(key + (uint64_t)i);
            for (int64_t j = i; j < n && j < i + 2; j++, bits >>= 32)
                codes[j] = (uint8_t)(table[bits % TABLE] | table[(bits >> 16) % TABLE] << 4);
        }
    } else if (f.kind == BYTES) { // at most 119: the quantiles end at 3.7 deviations
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i++)
            ((int8_t *)data)[i] =
                (int8_t)rintf(byte_deviation * quantiles[random_bits(key + (uint64_t)i) % TABLE]);
    } else if (f.kind == GROUPS) { // 8..15
        for (int64_t i = 0; i < n; i++)
            ((uint8_t *)data)[i] = (uint8_t)(8 + random_bits(key + (uint64_t)i) % 8);
    } else { // within a factor of 2 of each other
        for (int64_t i = 0; i < n; i++)
            ((float *)data)[i] =
                f.mean *
                (0.667f + (float)(random_bits(key + (uint64_t)i) % TABLE) / TABLE * 0.667f);
    }
}

/* ---- writers ------------------------------------------------------------------------------- */

static FILE *create(const char *path) {
    FILE *f = fopen(path, "wb");
    if (!f) die("%s: %s", path, strerror(errno));
    return f;
}

static void finish(FILE *f, const char *path) {
    if (fclose(f)) die("%s: %s", path, strerror(errno));
}

static void write_file(const char *directory, const char *name, const char *data, size_t bytes) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *f = create(path);
    if (fwrite(data, 1, bytes, f) != bytes) die("%s: %s", path, strerror(errno));
    finish(f, path);
}

/* A safetensors file with tensors first .. last - 1. */
static void write_shard(const char *path, const Settings *o, const Plan *p, int first, int last,
                        void *buffer) {
    char *header = allocate((size_t)(last - first) + 1, 256);
    size_t n = 1, offset = 0;
    header[0] = '{';
    for (int i = first; i < last; i++) {
        const Tensor *t = &p->tensors[i];
        n += (size_t)sprintf(header + n, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld",
                             i > first ? "," : "", t->name, dtype_name(t->dtype),
                             (long long)t->shape[0]);
        if (t->n_dims > 1) n += (size_t)sprintf(header + n, ",%lld", (long long)t->shape[1]);
        n +=
            (size_t)sprintf(header + n, "],\"data_offsets\":[%zu,%zu]}", offset, offset + t->bytes);
        offset += t->bytes;
    }
    header[n++] = '}';
    while (n % 8) header[n++] = ' ';
    FILE *f = create(path);
    uint8_t length[8];
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(n >> 8 * i);
    if (fwrite(length, 1, 8, f) != 8 || fwrite(header, 1, n, f) != n)
        die("%s: %s", path, strerror(errno));
    for (int i = first; i < last; i++) {
        fill(&p->tensors[i], p->fills[i], ((uint64_t)o->seed << 10) + (uint64_t)i, buffer);
        if (fwrite(buffer, 1, p->tensors[i].bytes, f) != p->tensors[i].bytes)
            die("%s: %s", path, strerror(errno));
    }
    finish(f, path);
    free(header);
}

/* A Hugging Face directory: one file, or shards of about equal size and their index. */
static void write_directory(const Settings *o, const Plan *p, const char *config,
                            const char *tokenizer, size_t tokenizer_bytes, void *buffer) {
    if (mkdir(o->out, 0777) && errno != EEXIST) die("%s: %s", o->out, strerror(errno));
    write_file(o->out, "config.json", config, strlen(config));
    write_file(o->out, "tokenizer.json", tokenizer, tokenizer_bytes);
    size_t total = 0, done = 0, n = 0;
    for (int i = 0; i < p->n; i++) total += p->tensors[i].bytes;
    char *index = allocate((size_t)p->n + 1, 256);
    n += (size_t)sprintf(index, "{\"metadata\":{\"total_size\":%zu},\"weight_map\":{", total);
    for (int shard = 0, first = 0, last = 0; shard < o->shards; shard++, first = last) {
        char name[64] = "model.safetensors", path[PATH_MAX];
        if (o->shards > 1)
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", shard + 1, o->shards);
        while (last < p->n && (last == first || shard == o->shards - 1 ||
                               done * (size_t)o->shards < total * (size_t)(shard + 1))) {
            done += p->tensors[last].bytes;
            n += (size_t)sprintf(index + n, "%s\"%s\":\"%s\"", last ? "," : "",
                                 p->tensors[last].name, name);
            last++;
        }
        snprintf(path, sizeof path, "%s/%s", o->out, name);
        write_shard(path, o, p, first, last, buffer);
    }
    n += (size_t)sprintf(index + n, "}}\n");
    if (o->shards > 1) write_file(o->out, "model.safetensors.index.json", index, n);
    free(index);
}

static void write_model_bin(const Settings *o, const Plan *p, Checkpoint *c, void *buffer) {
    char quantization[128];
    snprintf(quantization, sizeof quantization,
             "{\"bits\":4,\"group_size\":%d,\"method\":\"synthetic\",\"seed\":%d}", o->w4a8,
             o->seed);
    Writer *w = writer_open(o->out, c, quantization, p->tensors, p->n);
    for (int i = 0; i < p->n; i++) {
        fill(&p->tensors[i], p->fills[i], ((uint64_t)o->seed << 10) + (uint64_t)i, buffer);
        writer_put(w, p->tensors[i].name, buffer, p->tensors[i].bytes);
    }
    writer_close(w);
}

int main(int argc, char **argv) {
    Settings o = parse_settings(argc, argv);
    Checkpoint c = {.path = (char *)o.tokenizer};
    char *tokenizer = read_text(o.tokenizer, &c.tokenizer_bytes);
    Tokenizer *t = tokenizer_load(o.tokenizer, tokenizer, c.tokenizer_bytes);
    int bos = tokenizer_id(t, "<|begin_of_text|>"), eos = tokenizer_id(t, "<|end_of_text|>");
    int size = tokenizer_size(t);
    tokenizer_free(t);
    if (size > o.vocab) die_usage("--vocab %d: the tokenizer has %d tokens", o.vocab, size);
    c.tokenizer = tokenizer;
    c.config = make_config(&o, bos, eos);
    make_quantiles();

    Plan p = make_plan(&o);
    size_t largest = 0;
    for (int i = 0; i < p.n; i++)
        if (p.tensors[i].bytes > largest) largest = p.tensors[i].bytes;
    void *buffer = allocate(largest, 1);
    if (o.w4a8) write_model_bin(&o, &p, &c, buffer);
    else write_directory(&o, &p, c.config, tokenizer, c.tokenizer_bytes, buffer);

    for (int i = 0; i < p.n; i++) free(p.tensors[i].name);
    free(p.tensors);
    free(p.fills);
    free(buffer);
    free(c.config);
    free(tokenizer);
    return 0;
}
