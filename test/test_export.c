/* ./quantize -x: directories that other engines read, against model.bin; and QQQ's read back. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "test.h"

// The writer and QQQ's format are in quantize.c, and static there.
#define main export_main
int export_main(int argc, char **argv);
#include "../quantize.c"
#undef main

#define SCRATCH "build/test/export"

static const char *const kinds[] = {"g128", "channel"};
static const char *const flags[] = {"-b rtn -r 0 -a 0 -m 0 -g 128", "-b rtn -a 0 -m 0 -g -1"};

static bool run_quantize(const char *args) {
    int status = shell("$QUANTIZE %s -d cpu", args);
    return check(status == 0, "quantize %s: status %d: %s", args, status, output);
}

/* The same, with SCRATCH/ before the names MODEL and OUT. */
static bool make(const char *model, const char *out, const char *options) {
    char args[1024];
    snprintf(args, sizeof args, SCRATCH "/%s " SCRATCH "/%s %s", model, out, options);
    return run_quantize(args);
}

static bool same_directories(const char *a, const char *b) {
    int status = shell("diff -r " SCRATCH "/%s " SCRATCH "/%s", a, b);
    return check(status == 0, "%s and %s differ: %.300s", a, b, output);
}

static const Tensor *find(const Checkpoint *c, const char *name, const char *suffix) {
    char full[256];
    snprintf(full, sizeof full, "%s.%s", name, suffix);
    const Tensor *t = checkpoint_find(c, full);
    return check(t != NULL, "%s: no tensor %s", c->path, full) ? t : NULL;
}

static bool is(const Tensor *t, DType dtype, int64_t rows, int64_t columns) {
    return check(t && t->dtype == dtype && t->n_dims == (columns ? 2 : 1) && t->shape[0] == rows &&
                     (!columns || t->shape[1] == columns),
                 "%s is no %s [%lld, %lld]", t ? t->name : "(none)", dtype_name(dtype),
                 (long long)rows, (long long)columns);
}

/* A float that a half of the export stands for, by the definition of a half. */
static double half(const void *data, size_t i) {
    uint16_t h;
    memcpy(&h, (const char *)data + 2 * i, 2);
    int exponent = h >> 10 & 31;
    double magnitude = exponent ? ldexp(1024 + (h & 1023), exponent - 25) : ldexp(h & 1023, -24);
    return h >> 15 ? -magnitude : magnitude;
}

/* Whether half number i is x, rounded: neither neighbour is nearer. */
static bool is_rounded(const void *data, size_t i, double x) {
    double ulp = ldexp(1, fmax(ilogb(x) - 10, -24));
    return fabs(half(data, i) - x) <= ulp / 2;
}

/* Every tensor that is no quantized linear stands in the export as halves. */
static void check_halves(const Checkpoint *from, const Checkpoint *to, bool lm_head) {
    for (int i = 0; i < from->n_tensors; i++) {
        const Tensor *t = &from->tensors[i];
        const char *suffix = strrchr(t->name, '.');
        if (strcmp(suffix, ".weight")) continue;
        const Tensor *h = checkpoint_find(to, t->name);
        if (!check(h && h->dtype == F16 && h->n_dims == t->n_dims, "%s: no halves", t->name))
            continue;
        size_t n = h->bytes / 2, wrong = 0;
        float *x = allocate(n, sizeof *x);
        floats(t->data, t->dtype, 0, n, x);
        for (size_t j = 0; j < n; j++) wrong += x[j] != 0 && !is_rounded(h->data, j, x[j]);
        check(wrong == 0, "%s: %zu of %zu halves are wrong", t->name, wrong, n);
        free(x);
    }
    check((checkpoint_find(to, "lm_head.weight") != NULL) == lm_head, "lm_head.weight: %d",
          !lm_head);
}

/* config.json, but for MODEL's own lines, is the golden text. */
static void check_config(const char *directory, const char *tied, const char *how) {
    char path[256], want[2048];
    size_t bytes, golden_bytes;
    snprintf(path, sizeof path, SCRATCH "/%s/config.json", directory);
    char *text = read_file(path, &bytes);
    char *golden = read_file("data/tiny/config.json", &golden_bytes);
    if (!check(text && golden, "%s: cannot be read", path)) return;
    char *end = strstr(golden, "  \"tie_word_embeddings\""),
         *rest = strstr(golden, "  \"use_cache");
    snprintf(want, sizeof want,
             "%.*s%.*s,\n  \"dtype\": \"float16\",\n  \"torch_dtype\": \"float16\",\n"
             "  \"tie_word_embeddings\": %s,\n  \"quantization_config\": %s\n}\n",
             (int)(end - golden), golden, (int)strlen(rest) - 2, rest, tied, how);
    check(!strcmp(text, want), "%s is\n%s, expected\n%s", path, text, want);
    free(text);
    free(golden);
}

/* SCRATCH/chat: data/tiny as an instruct model has it; tied.bin: with the embedding for a head. */
static void make_models(void) {
    shell("rm -rf " SCRATCH " && mkdir -p " SCRATCH "/chat && cd " SCRATCH "/chat && "
          "for f in config.json tokenizer.json model.safetensors; do "
          "ln -s ../../../../data/tiny/$f $f; done && "
          "echo '{\"eos_token_id\": [3841, 3842]}' >generation_config.json && "
          "echo '{\"chat_template\": null}' >tokenizer_config.json && "
          "echo '{{ bos_token }}{%%- endfor %%}' >chat_template.jinja && "
          "echo '{\"bos_token\": \"<|begin_of_text|>\"}' >special_tokens_map.json");
    Checkpoint *c = checkpoint_open(SCRATCH "/chat");
    Tensor *list = allocate(c->n_tensors, sizeof *list);
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++)
        if (strcmp(c->tensors[i].name, "lm_head.weight")) list[n++] = c->tensors[i];
    memcpy(strstr(c->config, "\"tie_word_embeddings\": false"), "\"tie_word_embeddings\": true ",
           28);
    write_model(SCRATCH "/tied.bin", c, NULL, list, n);
    free(list);
    checkpoint_close(c);
}

static void test_chat_files(void) {
    test_begin("model.bin carries what chat needs, an export has it as it was");
    static const char *const files[] = {"tokenizer.json", "generation_config.json",
                                        "tokenizer_config.json", "chat_template.jinja",
                                        "special_tokens_map.json"};
    make("chat", "float.bin", "-f");
    make("float.bin", "g128.bin", flags[0]);
    make("chat", "channel.bin", flags[1]);
    make("g128.bin", "g128-vllm", "-x vllm");
    make("channel.bin", "channel-qqq", "-x qqq");
    for (int i = 0; i < 5; i++)
        check(shell("cmp " SCRATCH "/chat/%s " SCRATCH "/g128-vllm/%s && "
                    "cmp " SCRATCH "/chat/%s " SCRATCH "/channel-qqq/%s",
                    files[i], files[i], files[i], files[i]) == 0,
              "%s: %s", files[i], output);
    check(shell("ls " SCRATCH "/g128-vllm") == 0 &&
              !strcmp(output, "chat_template.jinja\nconfig.json\ngeneration_config.json\n"
                              "model.safetensors\nspecial_tokens_map.json\ntokenizer.json\n"
                              "tokenizer_config.json\n"),
          "other files: %s", output);
}

static void test_vllm(int kind) {
    test_begin(kind ? "-x vllm, per channel and rotated" : "-x vllm, per group of 128");
    bool groups = kind == 0;
    char path[256], out[64];
    snprintf(out, sizeof out, "%s-vllm", kinds[kind]);
    snprintf(path, sizeof path, "%s.bin", kinds[kind]);
    if (kind && !make(path, out, "-x vllm")) return;
    snprintf(path, sizeof path, SCRATCH "/%s.bin", kinds[kind]);
    Checkpoint *bin = checkpoint_open(path);
    snprintf(path, sizeof path, SCRATCH "/%s", out);
    Checkpoint *dir = checkpoint_open(path);
    Model *m = model_load(bin);
    for (int i = 0; i < m->config.n_layers * N_LINEARS; i++) {
        const Linear *l = &m->layers[i / N_LINEARS].linears[i % N_LINEARS];
        size_t N = l->N, K = l->K, G = groups ? K / GROUP : 1, wrong = 0;
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / N_LINEARS,
                 linear_names[i % N_LINEARS]);
        const Tensor *packed = find(dir, name, "weight_packed");
        const Tensor *scale = find(dir, name, "weight_scale");
        const Tensor *shape = find(dir, name, "weight_shape");
        if (!is(packed, I32, N, K / 8) || !is(scale, F16, N, G) || !is(shape, I64, 2, 0)) continue;
        check(!memcmp(packed->data, l->qweight, N * K / 2), "%s: other codes", name);
        for (size_t j = 0; j < N * G; j++)
            wrong += !is_rounded(scale->data, j,
                                 (double)l->s_channel[j / G] * (groups ? l->s_group[j] : 1));
        check(wrong == 0, "%s: %zu of %zu scales are wrong", name, wrong, N * G);
        int64_t stated[2];
        memcpy(stated, shape->data, sizeof stated);
        check(stated[0] == l->N && stated[1] == l->K, "%s: weight_shape", name);
        check((uintptr_t)shape->data % 8 == 0 && (uintptr_t)packed->data % 256 == 0,
              "%s: not aligned", name);
    }
    check_halves(bin, dir, true);
    char how[1024];
    snprintf(how, sizeof how,
             "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
             "\"quantization_status\":\"compressed\",\"ignore\":[\"lm_head\"],\"config_groups\":"
             "{\"group_0\":{\"targets\":[\"Linear\"],\"format\":\"pack-quantized\",\"weights\":"
             "{\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,%s,\"dynamic\":false},"
             "\"input_activations\":{\"num_bits\":8,\"type\":\"int\",\"symmetric\":true,"
             "\"strategy\":\"token\",\"group_size\":0,\"dynamic\":true}}}}",
             groups ? "\"strategy\":\"group\",\"group_size\":128" : "\"strategy\":\"channel\"");
    check_config(out, "false", how);
    model_free(m);
    checkpoint_close(bin);
    checkpoint_close(dir);
}

/* Code number p of B, and which weight it is, by the format's description: position p % 1024 of
 * a run holds what stands at perm[p % 1024] in four 16 x 16 tiles, row by row. */
static void check_B(const Tensor *B, const Linear *l, const char *name) {
    static int perm[1024], ordered[1024];
    static const int order[2][8] = {{4, 0, 5, 1, 6, 2, 7, 3}, {0, 2, 4, 6, 1, 3, 5, 7}};
    int n = 0;
    bool groups = l->s_group != NULL;
    for (int t = 0; t < 32; t++)
        for (int j = 0; j < 4; j++)
            for (int block = 0; block < 2; block++)
                for (int r = 0; r < 4; r++)
                    perm[n++] = 16 * (4 * (t % 4) + r) + t / 4 + 8 * block + 256 * j;
    for (int i = 0; i < 1024; i++) ordered[i] = perm[i / 8 * 8 + order[groups][i % 8]];
    size_t N = l->N, K = l->K, wrong = 0;
    int8_t *q = allocate(N, K);
    for (size_t i = 0; i < N; i++) unpack_row(l->qweight + i * K / 2, K, q + i * K);
    for (size_t kt = 0; kt < K / 16; kt++)
        for (size_t i = 0; i < 16 * N; i++) {
            size_t from = i / 1024 * 1024 + ordered[i % 1024]; // in [N / 16][16][16]
            size_t row = kt * 16 + from / 16 % 16, column = from / 256 * 16 + from % 16;
            uint32_t word;
            memcpy(&word, (const char *)B->data + 4 * (kt * 2 * N + i / 8), 4);
            int code = word >> 4 * (i % 8) & 15;
            wrong += code != (groups ? q[column * K + row] + 8 : q[column * K + row] & 15);
        }
    check(wrong == 0, "%s: %zu of %zu codes are wrong", name, wrong, N * K);
    free(q);
}

static void test_qqq(int kind) {
    test_begin(kind ? "-x qqq, per channel and rotated" : "-x qqq, per group of 128");
    bool groups = kind == 0;
    char path[256], out[64];
    snprintf(out, sizeof out, "%s-qqq", kinds[kind]);
    snprintf(path, sizeof path, "%s.bin", kinds[kind]);
    if (!kind && !make(path, out, "-x qqq")) return;
    snprintf(path, sizeof path, SCRATCH "/%s.bin", kinds[kind]);
    Checkpoint *bin = checkpoint_open(path);
    // Beside another config.json its tensors are read as they are.
    shell("mkdir -p " SCRATCH "/raw-%s && cp data/tiny/config.json " SCRATCH "/raw-%s/ && "
          "ln " SCRATCH "/%s/model.safetensors " SCRATCH "/raw-%s/",
          kinds[kind], kinds[kind], out, kinds[kind]);
    snprintf(path, sizeof path, SCRATCH "/raw-%s", kinds[kind]);
    Checkpoint *dir = checkpoint_open(path);
    Model *m = model_load(bin);
    static const int pairs[8] = {0, 1, 8, 9, 16, 17, 24, 25};
    for (int i = 0; i < m->config.n_layers * N_LINEARS; i++) {
        const Linear *l = &m->layers[i / N_LINEARS].linears[i % N_LINEARS];
        size_t N = l->N, K = l->K, wrong = 0;
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / N_LINEARS,
                 linear_names[i % N_LINEARS]);
        const Tensor *B = find(dir, name, "B"), *channel = find(dir, name, "s_channel");
        const Tensor *group = find(dir, name, "s_group");
        if (!is(B, I32, K / 16, 2 * N) || !is(channel, F32, 1, N) ||
            !is(group, F16, groups ? K / GROUP : 0, groups ? N : 0))
            continue;
        check_B(B, l, name);
        for (size_t j = 0; j < N; j++) {
            float found;
            memcpy(&found, (const char *)channel->data + 4 * j, 4);
            float want = l->s_channel[j / 32 * 32 + 2 * (j % 32 / 8) + pairs[j % 8]];
            wrong += found != (groups ? want : want / 16);
        }
        for (size_t j = 0; groups && j < N * K / GROUP; j++) {
            size_t column = j % N / 64 * 64 + j % 64 / 8 + 8 * (j % 8);
            wrong += half(group->data, j) != l->s_group[column * (K / GROUP) + j / N];
        }
        check(wrong == 0, "%s: %zu scales are wrong", name, wrong);
    }
    check_halves(bin, dir, true);
    char how[512];
    snprintf(how, sizeof how,
             "{\"quant_method\":\"qqq\",\"checkpoint_format\":\"qqq\",\"method\":\"qqq\","
             "\"format\":\"qqq\",\"bits\":4,\"group_size\":%d,\"sym\":true,\"desc_act\":false,"
             "\"lm_head\":false,\"pack_dtype\":\"int32\"}",
             groups ? 128 : -1);
    check_config(out, "false", how);
    size_t bytes;
    snprintf(path, sizeof path, SCRATCH "/%s/quantize_config.json", out);
    char *text = read_file(path, &bytes);
    check(text && !strcmp(text, how), "quantize_config.json is %s", text);
    free(text);
    model_free(m);
    checkpoint_close(bin);
    checkpoint_close(dir);
}

/* The golden file was packed by NumPy as the QQQ repository's qlinear_marlin.py does it: for NAME
 * in groups, channel it has our tensors of a linear [64][256] and NAME.qqq.B and so on. */
static void test_golden(void) {
    test_begin("qqq_pack() against the QQQ repository's packing");
    Checkpoint *c = checkpoint_open("test/data/qqq_golden.safetensors");
    enum { N = 64, K = 256 };
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "channel" : "groups";
        const Tensor *q = find(c, name, "qweight"), *s = find(c, name, "s_channel");
        const Tensor *g = i ? NULL : find(c, name, "s_group"), *B = find(c, name, "qqq.B");
        const Tensor *channel = find(c, name, "qqq.s_channel"),
                     *group = find(c, name, "qqq.s_group");
        float s_channel[N], got_channel[N];
        memcpy(s_channel, s->data, sizeof s_channel);
        Linear l = {.N = N, .K = K, .dtype = U8, .qweight = (uint8_t *)q->data};
        l.s_channel = s_channel;
        l.s_group = g ? (uint8_t *)g->data : NULL;
        uint8_t got[N * K / 2];
        uint16_t got_group[N * K / GROUP];
        qqq_pack(&l, got, got_channel, got_group);
        check(B->bytes == sizeof got && !memcmp(got, B->data, sizeof got), "%s: B", name);
        check(!memcmp(got_channel, channel->data, sizeof got_channel), "%s: s_channel", name);
        check(!memcmp(got_group, group->data, group->bytes), "%s: s_group", name);
        check_B(B, &l, name);
    }
    checkpoint_close(c);
}

static void test_round_trip(void) {
    test_begin("a QQQ directory read back gives the same linears, and itself again");
    for (int kind = 0; kind < 2; kind++) {
        char from[64], back[64], again[64], options[128];
        snprintf(from, sizeof from, "%s-qqq", kinds[kind]);
        snprintf(back, sizeof back, "%s-back.bin", kinds[kind]);
        snprintf(again, sizeof again, "%s-again", kinds[kind]);
        snprintf(options, sizeof options, SCRATCH "/%s.bin", kinds[kind]);
        if (!make(from, back, "") || !make(back, again, "-x qqq")) continue;
        same_directories(from, again);
        Checkpoint *a = checkpoint_open(options);
        snprintf(options, sizeof options, SCRATCH "/%s", back);
        Checkpoint *b = checkpoint_open(options);
        for (int i = 0; i < a->n_tensors; i++) {
            const Tensor *x = &a->tensors[i], *y = checkpoint_find(b, x->name);
            const char *suffix = strrchr(x->name, '.');
            if (strcmp(suffix, ".weight"))
                check(y && x->bytes == y->bytes && !memcmp(x->data, y->data, x->bytes),
                      "%s changed", x->name);
        }
        model_free(model_load(b));
        checkpoint_close(a);
        checkpoint_close(b);
    }
    test_begin("the QQQ repository's own quantization_config, which says wbits, is read");
    shell("cp -r " SCRATCH "/g128-qqq " SCRATCH "/wbits && sed -i 's/\"quantization_config.*/"
          "\"quantization_config\": {\"group_size\": 128, \"quant_method\": \"qqq\", \"wbits\": "
          "4}/' " SCRATCH "/wbits/config.json");
    make("wbits", "wbits.bin", "");
    check(shell("cmp " SCRATCH "/wbits.bin " SCRATCH "/g128-back.bin") == 0, "%s", output);
}

static void test_float_model(void) {
    test_begin("-x from a float MODEL is what -x from its model.bin is");
    char options[128];
    snprintf(options, sizeof options, "-x vllm %s", flags[0]);
    make("chat", "direct-vllm", options);
    same_directories("direct-vllm", "g128-vllm");
    snprintf(options, sizeof options, "-x qqq %s", flags[1]);
    make("chat", "direct-qqq/", options); // the slash goes
    same_directories("direct-qqq", "channel-qqq");
    test_begin("-x into an empty directory, and from a QQQ directory");
    mkdir(SCRATCH "/empty", 0777);
    mkdir(SCRATCH "/dot", 0777);
    make("g128-back.bin", "empty", "-x vllm");
    make("g128-back.bin", "dot/.", "-x vllm");
    make("g128-qqq", "from-qqq", "-x vllm");
    same_directories("empty", "from-qqq");
    same_directories("dot", "from-qqq");
}

static void test_tied(void) {
    test_begin("a tied model stays tied, unless it was rotated");
    for (int rotate = 0; rotate < 2; rotate++) {
        char options[128];
        snprintf(options, sizeof options, "-b rtn -a 0 -m 0 -r %d", rotate);
        if (!make("tied.bin", rotate ? "tied1.bin" : "tied0.bin", options)) continue;
        for (int x = 0; x < 2; x++) {
            char out[64];
            snprintf(out, sizeof out, "tied%d-%s", rotate, x ? "qqq" : "vllm");
            if (!make(rotate ? "tied1.bin" : "tied0.bin", out, x ? "-x qqq" : "-x vllm")) continue;
            int found = shell("grep -q '\"tie_word_embeddings\": %s' " SCRATCH "/%s/config.json",
                              rotate ? "false" : "true", out);
            check(found == 0, "%s: tie_word_embeddings", out);
        }
        Checkpoint *bin = checkpoint_open(rotate ? SCRATCH "/tied1.bin" : SCRATCH "/tied0.bin");
        Checkpoint *dir = checkpoint_open(rotate ? SCRATCH "/tied1-vllm" : SCRATCH "/tied0-vllm");
        check_halves(bin, dir, rotate);
        checkpoint_close(bin);
        checkpoint_close(dir);
    }
}

/* `quantize` with these arguments ends with this status and one line that holds `says`, and leaves
 * nothing new behind. */
static void refuse(const char *class, int status, const char *args, const char *says) {
    shell("ls -R " SCRATCH " >" SCRATCH "/../before.txt");
    int found = shell("cd " SCRATCH " && ../../../$QUANTIZE %s -d cpu >/dev/null", args);
    const char *newline = strchr(output, '\n');
    check(found == status && newline && !newline[1] && strstr(output, says),
          "quantize %s: status %d, %s instead of %s", args, found, output, says);
    check(shell("ls -R " SCRATCH " | diff - " SCRATCH "/../before.txt") == 0, "quantize %s left %s",
          args, output);
    count_bad_input(class);
}

static void test_refusals(void) {
    static const char *const command = "command lines", *const out = "models, texts and OUT given "
                                                                     "to ./quantize";
    test_begin("exports that are refused");
    refuse(command, 2, "g128.bin d -x onnx", "-x onnx");
    refuse(command, 2, "chat d -x vllm -f", "-f");
    refuse(command, 2, "chat d -x vllm -e ../../../data/eval.txt", "-e");
    refuse(command, 2, "g128.bin d -x vllm -g -1", "-g: g128.bin is quantized already");
    refuse(out, 1, "g128.bin d.bin", "quantized already");
    refuse(out, 1, "g128.bin g128-vllm -x vllm", "g128-vllm: the directory is not empty");
    refuse(out, 1, "g128.bin chat/config.json -x vllm", "chat/config.json: Not a directory");
    refuse(out, 1, "g128.bin g128.bin -x qqq", "OUT is MODEL");
    refuse(out, 1, "g128.bin no/where -x qqq", "no/where: cannot be written");
    count_bad_input(out);
    check(shell("mkdir " SCRATCH "/here && cd " SCRATCH
                "/here && ../../../../$QUANTIZE ../g128.bin . "
                "-x qqq; status=$?; rmdir ../here && exit $status") == 1 &&
              strstr(output, "the current directory; -x makes a new one"),
          "%s", output);
    refuse(out, 1, "g128-vllm d.bin", "quantization_config");

    test_begin("shapes that a format has no place for");
    static const struct {
        int dim, hidden, group;
        const char *format, *says;
    } shapes[] = {
        {36, 72, -1, "vllm", "self_attn.q_proj has 36 input channels"},
        {64, 64, -1, "qqq", "self_attn.q_proj has 64 input and 64 output channels"},
        {128, 96, -1, "qqq", "mlp.gate_proj has 128 input and 96 output channels"},
        {128, 256, -1, "qqq", NULL},
        {64, 128, -1, "qqq", "self_attn.q_proj has 64 input"},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        char args[512];
        shell("rm -rf " SCRATCH "/shape && build/synthetic " SCRATCH "/shape --dim %d --hidden %d "
              "--layers 1 --heads 1 --kv-heads 1 --vocab 266 --tokenizer "
              "test/corpus/tokenizer/chat",
              shapes[i].dim, shapes[i].hidden);
        snprintf(args, sizeof args, "shape d -b rtn -a 0 -m 0 -g %d -x %s", shapes[i].group,
                 shapes[i].format);
        if (shapes[i].says) refuse(out, 1, args, shapes[i].says);
        else make("shape", "fits", "-b rtn -a 0 -m 0 -g -1 -x qqq");
    }
}

/* The weight of a W4A8 linear. */
static float weight_of(const Linear *l, size_t i) {
    int u = l->qweight[i / 2] >> 4 * (i % 2) & 15;
    return (u - 8) * (l->s_channel[i / l->K] * l->s_group[i / GROUP]);
}

/* QQQ reads a linear of one group as one without: its s_group is empty, and it reads back alike. */
static void test_one_group(void) {
    test_begin("-x qqq, per group of 128: a linear with 128 inputs is laid out per channel");
    shell("rm -rf " SCRATCH "/one* && build/synthetic " SCRATCH "/one --dim 128 --hidden 256 "
          "--layers 1 --heads 1 --kv-heads 1 --vocab 266 --tokenizer test/corpus/tokenizer/chat");
    make("one", "one.bin", "-b rtn -a 0 -m 0 -g 128");
    make("one.bin", "one-qqq", "-x qqq");
    size_t bytes;
    char *header = read_file(SCRATCH "/one-qqq/model.safetensors", &bytes);
    const char *empty = "%s.s_group\":{\"dtype\":\"F16\",\"shape\":%s,";
    Checkpoint *a = checkpoint_open(SCRATCH "/one.bin"), *b = checkpoint_open(SCRATCH "/one-qqq");
    qqq_import(b);
    Model *m = model_load(a), *back = model_load(b);
    for (int k = 0; k < N_LINEARS; k++) {
        const Linear *x = &m->layers[0].linears[k], *y = &back->layers[0].linears[k];
        char *shape = format_text(empty, linear_names[k], x->K == 128 ? "[0]" : "[2,128]");
        check(strstr(header + 8, shape) != NULL, "no %s", shape);
        free(shape);
        for (size_t i = 0; i < (size_t)x->N * x->K; i++)
            if (!check(weight_of(x, i) == weight_of(y, i), "%s: weight %zu", linear_names[k], i))
                break;
    }
    free(header);
    model_free(m);
    model_free(back);
    checkpoint_close(a);
    checkpoint_close(b);
}

/* SCRATCH/broken: a QQQ directory of one kind with bytes of one tensor changed. */
static void break_qqq(const char *kind, const char *suffix, const void *value, size_t bytes) {
    shell("rm -rf " SCRATCH "/broken && cp -r " SCRATCH "/%s-qqq " SCRATCH "/broken && "
          "cp data/tiny/config.json " SCRATCH "/raw-%s/",
          kind, kind);
    char path[128], name[128];
    snprintf(path, sizeof path, SCRATCH "/raw-%s", kind);
    snprintf(name, sizeof name, "model.layers.3.mlp.up_proj.%s", suffix);
    Checkpoint *c = checkpoint_open(path);
    const Tensor *t = checkpoint_find(c, name);
    size_t size;
    char *file = read_file(SCRATCH "/broken/model.safetensors", &size), *data = NULL;
    for (size_t i = 0; t && i + t->bytes <= size && !data; i += 2)
        if (!memcmp(file + i, t->data, t->bytes)) data = file + i;
    if (check(data != NULL, "%s not found", name)) {
        memcpy(data + t->bytes / 4 * 2, value, bytes);
        write_file(SCRATCH "/broken/model.safetensors", file, size);
    }
    free(file);
    checkpoint_close(c);
}

/* SCRATCH/broken, a g128 directory of which one group scale is `value`, holds the 16-bit weights of
 * g128.bin, but for those of that group: s_channel q value, q value rounded. */
static void check_weights(float value) {
    Checkpoint *c = checkpoint_open(SCRATCH "/broken"), *g = checkpoint_open(SCRATCH "/g128.bin");
    Model *m = model_load(c), *made = model_load(g);
    int other = 0, n_other = 0;
    for (int l = 0; l < m->config.n_layers; l++)
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *w = &m->layers[l].linears[k], *q = &made->layers[l].linears[k];
            for (size_t i = 0; i < (size_t)w->N * w->K; i++) {
                size_t n = i / w->K;
                int u = q->qweight[i / 2] >> 4 * (i % 2) & 15;
                float half = weight_of(q, i), got;
                floats(w->w, F16, i, 1, &got);
                if (float_to_f16(got) == float_to_f16(half)) continue;
                float changed = rintf(value * (u - 8)) * q->s_channel[n];
                n_other += float_to_f16(got) == float_to_f16(changed);
                other++;
            }
        }
    check(!m->group_size && other > 60 && other <= GROUP && n_other == other,
          "%g: %d weights differ, %d as they should", value, other, n_other);
    model_free(m);
    model_free(made);
    checkpoint_close(c);
    checkpoint_close(g);
}

static void test_bad_qqq(void) {
    static const char *const class = "checkpoints in QQQ's format";
    test_begin("QQQ directories with group scales that a model.bin cannot hold become weights");
    static const uint16_t halves[] = {0x3e00, 0x4c00, 0x0000, 0xbc00, 0x7e00}; // 1.5 16 0 -1 NaN
    static const float values[] = {1.5, 16, 0, -1};
    for (int i = 0; i < 4; i++) {
        break_qqq("g128", "s_group", &halves[i], 2);
        check_weights(values[i]);
    }
    test_begin("QQQ directories whose numbers a model.bin cannot hold");
    break_qqq("g128", "s_group", &halves[4], 2);
    refuse(class, 1, "broken d.bin", "up_proj.s_group holds nan");
    break_qqq("channel", "B", "\x80", 1);
    refuse(class, 1, "broken d.bin", "up_proj.B holds the code -8");
    break_qqq("channel", "s_channel", "\0\0\x80\x7f", 4);
    refuse(class, 1, "broken d.bin", "up_proj.s_channel is not finite");
    test_begin("QQQ directories that are none");
    static const char *const edits[][2] = {
        {"s/\"bits\":4/\"bits\":8/", "bits 8, group_size -1; expected 4 bits"},
        {"s/\"group_size\":-1/\"group_size\":64/", "bits 4, group_size 64; expected 4 bits"},
        {"s/\"group_size\":-1/\"group_size\":128/", "s_group"},
        {"s/\"intermediate_size\": 896/\"intermediate_size\": 768/", "has the shape"},
        {"s/\"quant_method\":\"qqq\"/\"quant_method\":\"gptq\"/", "quantized already, and not by"},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        shell("rm -rf " SCRATCH "/broken && cp -r " SCRATCH "/channel-qqq " SCRATCH "/broken && "
              "sed -i '%s' " SCRATCH "/broken/config.json",
              edits[i][0]);
        refuse(class, 1, "broken d.bin", edits[i][1]);
    }
}

/* `ulimit -f` counts blocks of 512 bytes; a process may not write more to one file. */
static void test_full_disk(void) {
    test_begin("a full disk stops an export with one line, and nothing is left");
    for (int blocks = 0; blocks < 16000; blocks += blocks ? 4000 : 1) {
        shell("ls " SCRATCH " >" SCRATCH "/../before.txt");
        int status =
            shell("ulimit -f %d; $QUANTIZE " SCRATCH "/g128.bin " SCRATCH "/full -x qqq -d "
                  "cpu 2>&1 >/dev/null | grep -v '^made with\\|^weights\\|LLaMA'",
                  blocks);
        const char *newline = strchr(output, '\n');
        check(status == 0 && strstr(output, "/full: cannot be written") && newline && !newline[1],
              "%d blocks: %s", blocks, output);
        check(shell("ls " SCRATCH " | diff - " SCRATCH "/../before.txt") == 0, "left: %s", output);
    }
}

void test_export(void) {
    make_models();
    test_chat_files();
    for (int kind = 0; kind < 2; kind++) test_vllm(kind);
    for (int kind = 0; kind < 2; kind++) test_qqq(kind);
    test_golden();
    test_round_trip();
    test_float_model();
    test_tied();
    test_refusals();
    test_one_group();
    test_bad_qqq();
    test_full_disk();
    shell("rm -rf " SCRATCH);
}
