/* The forward pass on the GPU against the one in C. Run by `make test-gpu`. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

static const struct {
    const char *name, *path;
} models[] = {{"tiny", "data/tiny"},
              {"small", "../shared/models/small"},
              {"tiny-outliers", "../shared/models/tiny-outliers"}};
static const struct {
    const char *name, *options; // of ./quantize; NULL: as it is
} formats[] = {{"16 bits", NULL}, {"W4A8 per channel", "-g -1"}, {"W4A8 g128", "-g 128"}};
enum { N_MODELS = 3, N_FORMATS = 3 };

/* A model in memory and on the GPU, with the evaluation text. */
typedef struct {
    Checkpoint *checkpoint;
    Model *model;
    Engine *gpu;
    int *tokens, n_tokens;
} Loaded;

static bool available(int m) {
    if (exists(models[m].path)) return true;
    test_skip("the model is not there");
    return false;
}

static Loaded load(int m, int f) {
    const char *path = models[m].path;
    if (formats[f].options) {
        char command[500], out[5000];
        path = "build/test/gpu.bin";
        snprintf(command, sizeof command, "./quantize %s %s %s -n 4 -l 512", models[m].path, path,
                 formats[f].options);
        if (run_command(command, out, sizeof out)) die("%s: %s", command, out);
    }
    Loaded x;
    x.checkpoint = checkpoint_open(path);
    x.model = model_load(x.checkpoint);
    x.gpu = engine_new(x.model, true, 16);
    x.tokens = text_tokens(x.checkpoint, x.model->config.bos, "data/eval.txt", &x.n_tokens);
    return x;
}

static void unload(Loaded x) {
    x.gpu->free(x.gpu);
    model_free(x.model);
    checkpoint_close(x.checkpoint);
    free(x.tokens);
}

/* The largest difference of two rows of logits. */
static float difference(const float *a, const float *b, int n) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fabsf(a[i] - b[i]) <= most ? most : fabsf(a[i] - b[i]);
    return most;
}

/* Perplexity of the whole text, and the logits of its first window's first 512 tokens' last. */
static void test_perplexity(int m, int f) {
    char name[100];
    snprintf(name, sizeof name, "GPU: perplexity of %s, %s", models[m].name, formats[f].name);
    test_begin(name);
    if (!available(m)) return;
    Loaded x = load(m, f);
    int windows;
    double c = model_perplexity(x.model, x.tokens, x.n_tokens, 2048, 0, &windows, NULL);
    Perplexity p = perplexity(x.gpu, x.tokens, x.n_tokens, 2048, 0, NULL);
    double g = p.mean;
    printf("     CPU %.4f, GPU %.4f: %+.4f %%\n", c, g, 100 * (g / c - 1));
    check(windows == 37 && p.windows == 37, "%d and %d windows", windows, p.windows);
    check(fabs(g / c - 1) < 1e-3, "more than 0.1 %% apart");
    unload(x);
}

/* Logits after contexts of several lengths, all of it a prompt or the last token decoded. The
 * bounds are some times what rounding to halves gives; that can make other int8, and 1 in 254 of
 * some activations is a lot more. */
static void test_contexts(int m, int f, int longest, float bound) {
    static const int lengths[] = {1, 17, 2048, 8192, 32768};
    char name[100];
    snprintf(name, sizeof name, "GPU: logits after 1 to %d tokens, %s, %s", longest, models[m].name,
             formats[f].name);
    test_begin(name);
    if (!available(m)) return;
    Loaded x = load(m, f);
    int vocab = x.model->config.vocab_size;
    Engine *gpu = x.gpu;
    gpu->start(gpu, 1, longest);
    State *s = state_new(&x.model->config, longest, 512, 16);
    for (int pos = 0, i = 0; i < 5 && lengths[i] <= longest; i++) {
        int length = lengths[i], T = 0;
        for (; pos < length; pos += T) {
            T = length - pos < 512 ? length - pos : 512;
            forward(x.model, s, x.tokens + pos, T, pos);
        }
        const float *expected = logits(x.model, s, T - 1, 1);
        gpu->feed(gpu, 0, x.tokens, length, 0);
        float prompt = difference(gpu->logits(gpu), expected, vocab), decoded = 0;
        if (length > 1) {
            int last = length - 1;
            gpu->feed(gpu, 0, x.tokens, last, 0);
            gpu->step(gpu, x.tokens + last, &last);
            decoded = difference(gpu->logits(gpu), expected, vocab);
        }
        printf("     %5d tokens: off by %.4f as a prompt, %.4f decoded\n", length, prompt, decoded);
        check(prompt < bound && decoded < bound, "more than %g", bound);
    }
    state_free(s);
    unload(x);
}

/* Scores of two continuations of one context, which is fed once, against the CPU's. */
static void test_scores(int m, int f, float bound) {
    enum { CONTEXT = 1150, N = 100 };
    char name[100];
    snprintf(name, sizeof name, "GPU: scores of two continuations, %s, %s", models[m].name,
             formats[f].name);
    test_begin(name);
    if (!available(m)) return;
    Loaded x = load(m, f);
    Engine *cpu = engine_new(x.model, false, 16);
    float most = 0;
    Engine *engines[] = {cpu, x.gpu};
    Score scores[2][2][N]; // [engine][continuation]
    for (int e = 0; e < 2; e++) {
        engines[e]->start(engines[e], 1, CONTEXT + N);
        engines[e]->feed(engines[e], 0, x.tokens, CONTEXT, 0);
        for (int k = 0; k < 2; k++) {
            const int *tokens = x.tokens + CONTEXT + 3000 * k;
            engines[e]->score(engines[e], 0, tokens, tokens + 1, N, CONTEXT, scores[e][k]);
        }
    }
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < N; i++) {
            float off = fabsf((float)(scores[0][k][i].nll - scores[1][k][i].nll));
            most = off <= most ? most : off;
        }
    }
    printf("     off by at most %.4f\n", most);
    check(most < bound, "more than %g", bound);
    cpu->free(cpu);
    unload(x);
}

static int *integers(const Json *j, const char *key, int *n) {
    int *values = NULL;
    *n = 0;
    int node = json_get(j, 0, key);
    for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i)) {
        double value = -1;
        json_number(j, i, &value);
        values = realloc(values, (*n + 1) * sizeof *values);
        values[(*n)++] = (int)value;
    }
    return values;
}

/* 100 greedy tokens, fed back on the GPU itself. */
static void test_oracle(int m, const char *oracle) {
    char name[100];
    snprintf(name, sizeof name, "GPU: 100 greedy tokens of Hugging Face transformers, %s",
             models[m].name);
    test_begin(name);
    if (!available(m)) return;
    size_t bytes;
    char *text = read_text(oracle, &bytes);
    Json *j = json_parse(oracle, text, bytes);
    int T, n;
    int *prompt = integers(j, "prompt_ids", &T), *greedy = integers(j, "greedy_ids", &n);
    Loaded x = load(m, 0);
    Engine *s = x.gpu;
    s->start(s, 1, n);
    check(n == T + 100, "%d greedy tokens after %d", n, T);
    s->feed(s, 0, prompt, T, 0);
    for (int t = T; t < n; t++) {
        int token = s->chosen(s)[0];
        if (token != greedy[t]) {
            const float *l = s->logits(s);
            float gap = token < 0 ? NAN : l[token] - l[greedy[t]];
            printf("     token %d is %d, not %d: its logit is larger by %g\n", t - T, token,
                   greedy[t], gap);
            check(gap < 0.02f, "that is no tie");
            break;
        }
        if (t + 1 < n) s->step(s, NULL, NULL);
    }
    unload(x);
    free(prompt);
    free(greedy);
    json_free(j);
    free(text);
}

/* Seven sequences of different lengths side by side, and each alone: same logits, same tokens. */
static void test_batch(int m, int f, float bound) {
    enum { BATCH = 7, STEPS = 40 };
    static const int lengths[BATCH] = {1, 5, 64, 130, 700, 1025, 33};
    char name[100];
    snprintf(name, sizeof name, "GPU: seven sequences as one by one, %s, %s", models[m].name,
             formats[f].name);
    test_begin(name);
    if (!available(m)) return;
    Loaded x = load(m, f);
    int vocab = x.model->config.vocab_size, at[BATCH], tokens[BATCH];
    float most = 0;
    Engine *all = x.gpu, *one = engine_new(x.model, true, 16);
    all->start(all, BATCH, 2048);
    one->start(one, 1, 2048);
    float *alone = allocate((size_t)BATCH * STEPS * vocab, sizeof *alone);
    for (int b = 0; b < BATCH; b++) { // fed with the text's own tokens
        one->feed(one, 0, x.tokens + 3000 * b, lengths[b], 0);
        for (int i = 0; i < STEPS; i++) {
            int pos = lengths[b] + i;
            one->step(one, x.tokens + 3000 * b + pos, &pos);
            memcpy(alone + ((size_t)b * STEPS + i) * vocab, one->logits(one),
                   vocab * sizeof(float));
        }
        all->feed(all, b, x.tokens + 3000 * b, lengths[b], 0);
    }
    for (int i = 0; i < STEPS; i++) {
        for (int b = 0; b < BATCH; b++) {
            at[b] = lengths[b] + i;
            tokens[b] = x.tokens[3000 * b + at[b]];
        }
        all->step(all, tokens, at);
        const float *l = all->logits(all);
        for (int b = 0; b < BATCH; b++)
            most = fmaxf(most, difference(l + (size_t)b * vocab,
                                          alone + ((size_t)b * STEPS + i) * vocab, vocab));
    }
    printf("     off by at most %.4f\n", most);
    check(most < bound, "more than %g", bound);
    free(alone);
    one->free(one);
    unload(x);
}

/* What ./run prints is the same on both devices. */
static void test_program(void) {
    char cpu[20000], gpu[20000];
    test_begin("GPU: ./run prints the same greedy text as on the CPU");
    const char *command = "./run data/tiny -t 0 -n 60 -i 'Once upon a time' -d %s 2>/dev/null";
    char line[300];
    snprintf(line, sizeof line, command, "cpu");
    check(run_command(line, cpu, sizeof cpu) == 0, "-d cpu: %s", cpu);
    snprintf(line, sizeof line, command, "cuda");
    check(run_command(line, gpu, sizeof gpu) == 0, "-d cuda: %s", gpu);
    check(strlen(gpu) > 100 && !strcmp(cpu, gpu), "other text:\n%s%s", cpu, gpu);

    test_begin("GPU: ./run samples, chats, measures");
    check(run_command("./run data/tiny -s 1 -n 40 -i 'A king' -d cuda", gpu, sizeof gpu) == 0 &&
              strstr(gpu, "on NVIDIA") && strstr(gpu, "generation 40 tokens"),
          "%s", gpu);
    check(run_command("echo Hello | ./run data/tiny -m chat -t 0 -n 20 -d cuda", gpu, sizeof gpu) ==
              0,
          "%s", gpu);
    check(run_command("./run data/tiny -b -d cuda", gpu, sizeof gpu) == 0 &&
              strstr(gpu, "decode_tokens_per_s"),
          "%s", gpu);
}

/* Shapes that the kernels cannot take. */
static void test_unfit(void) {
    static const char *const shapes[][2] = {
        {"--dim 96 --hidden 128 --heads 3", "heads of 32, on the GPU 64 or 128"},
        {"--dim 128 --hidden 100 --heads 2", "ffn 100, on the GPU multiples of 8"}};
    test_begin("GPU: a model that it cannot take runs on the CPU and says so, unless -d cuda asks");
    for (int i = 0; i < 2; i++) {
        shell(
            "build/synthetic build/test/unfit %s --layers 1 --kv-heads 1 --vocab 4096 --tokenizer "
            "data/tiny/tokenizer.json",
            shapes[i][0]);
        const char *commands[] = {
            "./run build/test/unfit -n 1 -s 1",
            "./quantize build/test/unfit build/test/unfit.bin -g -1 -n 1 -l 64"};
        for (int k = 0; k < 2; k++) {
            check(shell("%s", commands[k]) == 0 && strstr(output, ", on the CPU: ") &&
                      strstr(output, shapes[i][1]),
                  "%s: %s", commands[k], output);
            check(shell("%s -d cuda", commands[k]) == 1 && strstr(output, "error: -d cuda: ") &&
                      strstr(output, shapes[i][1]),
                  "%s -d cuda: %s", commands[k], output);
        }
    }
}

void test_gpu(void) {
    char why[300] = "built without CUDA";
    Config any = {.head_dim = 64, .n_heads = 1, .n_kv_heads = 1};
    if (!gpu_can_run || !gpu_can_run(&any, false, why, sizeof why)) {
        test_begin("GPU");
        test_skip(why);
        return;
    }
    test_program();
    test_unfit();
    test_oracle(0, "test/data/tiny_oracle.json");
    test_oracle(1, "test/data/small_oracle.json");
    for (int f = 0; f < N_FORMATS; f++) test_batch(0, f, 0.05f);
    test_batch(1, 2, 0.05f);
    test_scores(0, 0, 0.05f);
    test_scores(0, 2, 1);
    test_contexts(0, 0, 32768, 0.05f);
    test_contexts(0, 1, 8192, 1);
    test_contexts(1, 0, 8192, 0.05f);
    test_contexts(1, 2, 8192, 1);
    for (int m = 0; m < N_MODELS; m++)
        for (int f = 0; f < N_FORMATS; f++) test_perplexity(m, f);
}
