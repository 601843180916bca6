/* The program ./run, as a user meets it: command lines in, text, messages and exit status out. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "test.h"

static char expected[1 << 16];

/* `command` ends with this status and `text` in its output. */
static void expect(const char *command, int status, const char *text) {
    int got = shell("%s", command);
    check(got == status, "%s: status %d, expected %d: %s", command, got, status, output);
    check(strstr(output, text) != NULL, "%s: expected \"%s\", got: %s", command, text, output);
}

/* The same, and it says nothing but this error, in one line. */
static void expect_error(const char *command, int status, const char *text) {
    count_bad_input(status == 2 ? "command lines" : "files and texts given to ./run");
    expect(command, status, text);
    const char *newline = strchr(output, '\n');
    check(!strncmp(output, "error: ", 7) && newline && !newline[1],
          "%s: expected one line that starts with \"error: \", got: %s", command, output);
}

/* Both commands succeed with the same output. */
static void expect_same(const char *a, const char *b) {
    int status = shell("%s", a);
    check(status == 0, "%s: status %d: %s", a, status, output);
    strcpy(expected, output);
    expect(b, 0, "");
    check(!strcmp(expected, output), "%s: %s\n%s: %s", a, expected, b, output);
}

/* A copy of data/tiny in build/test/NAME: its weights are links, its tokenizer is `tokenizer`. */
static void make_tiny_with(const char *name, const char *tokenizer, size_t bytes) {
    const char *links[] = {"config.json", "model.safetensors"};
    char path[256], target[256];
    snprintf(path, sizeof path, "build/test/%s", name);
    mkdir(path, 0777);
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "build/test/%s/%s", name, links[i]);
        snprintf(target, sizeof target, "../../../data/tiny/%s", links[i]);
        if (!exists(path)) check(symlink(target, path) == 0, "%s: no link", path);
    }
    snprintf(path, sizeof path, "build/test/%s/tokenizer.json", name);
    write_file(path, tokenizer, bytes);
}

/* ---- the same answers through the library -------------------------------------------------- */

typedef struct {
    Checkpoint *checkpoint;
    Model *model;
    Tokenizer *tokenizer;
} Tiny;

static Tiny open_tiny(void) {
    Checkpoint *c = checkpoint_open("data/tiny");
    return (Tiny){c, model_load(c), tokenizer_load("tiny", c->tokenizer, c->tokenizer_bytes)};
}

static void close_tiny(Tiny *t) {
    tokenizer_free(t->tokenizer);
    model_free(t->model);
    checkpoint_close(t->checkpoint);
}

typedef struct {
    int ids[1024], n;
} Ids;

static void add_special(Ids *ids, const Tiny *t, const char *name) {
    ids->ids[ids->n++] = tokenizer_id(t->tokenizer, name);
}

static void add_text(Ids *ids, const Tiny *t, const char *text) {
    int n, *encoded = tokenizer_encode(t->tokenizer, text, strlen(text), false, &n);
    memcpy(ids->ids + ids->n, encoded, n * sizeof *encoded);
    ids->n += n;
    free(encoded);
}

static void add_header(Ids *ids, const Tiny *t, const char *role) {
    add_special(ids, t, "<|start_header_id|>");
    add_text(ids, t, role);
    add_special(ids, t, "<|end_header_id|>");
}

/* Appends up to `limit` greedy tokens, each from the whole sequence anew, and their text. */
static void answer(Ids *ids, const Tiny *t, int limit, char *text) {
    int vocab = t->model->config.vocab_size, eot = tokenizer_id(t->tokenizer, "<|eot_id|>");
    State *s = state_new(&t->model->config, 1024, 1024, 16);
    for (text += strlen(text); limit > 0; limit--) {
        forward(t->model, s, ids->ids, ids->n, 0);
        const float *l = logits(t->model, s, ids->n - 1, 1);
        int best = 0;
        for (int i = 0; i < vocab; i++)
            if (l[i] > l[best]) best = i;
        if (best == eot || best == t->model->config.eos[0]) break;
        ids->ids[ids->n++] = best;
        size_t bytes;
        const char *token = tokenizer_decode(t->tokenizer, best, &bytes);
        memcpy(text, token, bytes);
        *(text += bytes) = 0;
    }
    state_free(s);
}

/* ---- tests --------------------------------------------------------------------------------- */

static void test_options(void) {
    test_begin("run: options");
    expect("./run -h", 0, "usage: ./run [MODEL] [options]");
    const char *flags[] = {"-t", "-p", "-s", "-n", "-i", "-m", "-y",
                           "-e", "-l", "-x", "-b", "-d", "-k"};
    strcpy(expected, output);
    for (int i = 0; i < 13; i++) {
        char line[16];
        snprintf(line, sizeof line, "\n  %s ", flags[i]);
        check(strstr(expected, line) != NULL, "-h does not list %s", flags[i]);
        if (flags[i][1] == 'b') continue;
        snprintf(line, sizeof line, "./run %s", flags[i]);
        expect_error(line, 2, "its value is missing");
    }
    const struct {
        const char *options, *message;
    } bad[] = {
        {"-t abc", "-t abc: expected a number from 0 to 100"},
        {"-t 1x", "-t 1x: expected a number from 0 to 100"},
        {"-t ''", "-t : expected a number"},
        {"-t -1", "-t -1: expected a number from 0 to 100"},
        {"-t nan", "-t nan: expected a number from 0 to 100"},
        {"-t inf", "-t inf: expected a number from 0 to 100"},
        {"-p 2", "-p 2: expected a number from 0 to 1"},
        {"-p -0.1", "-p -0.1: expected a number from 0 to 1"},
        {"-s -1", "-s -1: expected a whole number"},
        {"-s 99999999999999999999", "-s 99999999999999999999: expected a whole number"},
        {"-n x", "-n x: expected a whole number from 0 to"},
        {"-n -1", "-n -1: expected a whole number from 0 to"},
        {"-n 1.5", "-n 1.5: expected a whole number from 0 to"},
        {"-n 2147483648", "expected a whole number from 0 to 2147483647"},
        {"-l 1", "-l 1: expected a whole number from 2 to"},
        {"-l 131073", "-l 131073: the context of data/tiny is 131072"},
        {"-m talk", "-m talk: expected generate or chat"},
        {"-d tpu", "-d tpu: expected cpu or cuda"},
        {"-y hello", "-y: a system prompt needs -m chat"},
        {"-k 4", "-k 4: expected 16 or 8"},
        {"-k x", "-k x: expected 16 or 8"},
        {"-m chat -b", "-m chat: not together with"},
        {"-e data/eval.txt -b", "-b: one of -e, -z, -x and -b"},
        {"-q", "unknown option -q"},
        {"-", "unknown option -;"},
        {"--halp", "unknown option --halp"},
        {"-n5", "unknown option -n5"},
        {"data/small", "two models: data/tiny and data/small"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char command[256];
        snprintf(command, sizeof command, "./run data/tiny %s", bad[i].options);
        expect_error(command, 2, bad[i].message);
    }
}

static void test_bad_files(void) {
    test_begin("run: missing and unfit files");
    expect_error("./run build/test/nothing", 1, "build/test/nothing: No such file");
    expect_error("./run ''", 1, "No such file");
    expect_error("./run data/tiny -e build/test/nothing", 1, "build/test/nothing: No such file");
    expect_error("./run data/tiny -x build/test/nothing", 1, "build/test/nothing: No such file");
    expect_error("./run data/eval.txt", 1, "data/eval.txt: ");
    expect("./run data/tiny -n 1 >/dev/full", 1, "error: stdout: No space left on device");

    size_t bytes;
    char *json = read_file("data/tiny/tokenizer.json", &bytes);
    if (!check(json != NULL, "data/tiny/tokenizer.json cannot be read")) return;
    for (char *p; (p = strstr(json, "<|eot_id|>"));) memcpy(p, "<|not_id|>", 10);
    make_tiny_with("no_eot", json, bytes);
    expect_error("./run build/test/no_eot -m chat </dev/null", 1,
                 "build/test/no_eot: a chat needs the token <|eot_id|>");
    free(json);

    // One token more than the embedding has rows.
    json = read_file("data/tiny/tokenizer.json", &bytes);
    const char *more =
        "{\"id\": 4096, \"content\": \"<|more|>\", \"single_word\": false, \"lstrip\": "
        "false, \"rstrip\": false, \"normalized\": false, \"special\": true},";
    char *larger = malloc(bytes + strlen(more) + 1), *list = strstr(json, "\"added_tokens\": [");
    if (check(larger && list, "data/tiny/tokenizer.json has no added_tokens")) {
        size_t head = strchr(list, '[') + 1 - json;
        memcpy(larger, json, head);
        strcpy(larger + head, more);
        strcpy(larger + head + strlen(more), json + head);
        make_tiny_with("larger", larger, bytes + strlen(more));
        expect_error("./run build/test/larger -n 1", 1,
                     "its tokenizer has 4097 tokens, its embedding only 4096 rows");
    }
    free(larger);
    free(json);
}

static void test_damaged_weights(void) {
    test_begin("run: weights that give NaN");
    size_t bytes;
    char *file = read_file("data/tiny/model.safetensors", &bytes);
    char *entry = file ? strstr(file + 8, "\"model.norm.weight\"") : NULL;
    size_t begin, end, header = 0;
    if (!check(entry && (entry = strstr(entry, "\"data_offsets\"")) &&
                   sscanf(entry, "\"data_offsets\":[%zu,%zu]", &begin, &end) == 2,
               "no model.norm.weight in data/tiny/model.safetensors"))
        return;
    for (int i = 7; i >= 0; i--) header = header << 8 | (uint8_t)file[i];
    for (size_t i = begin; i < end; i++) file[8 + header + i] = 0x7f; // BF16 7F7F: 3.4e38
    size_t config_bytes, tokenizer_bytes;
    char *config = read_file("data/tiny/config.json", &config_bytes);
    char *tokenizer = read_file("data/tiny/tokenizer.json", &tokenizer_bytes);
    mkdir("build/test/damaged", 0777);
    write_file("build/test/damaged/config.json", config, config_bytes);
    write_file("build/test/damaged/tokenizer.json", tokenizer, tokenizer_bytes);
    write_file("build/test/damaged/model.safetensors", file, bytes);
    expect("./run build/test/damaged -i Once -t 0 -n 5", 1, "the weights are damaged");
    expect("./run build/test/damaged -e build/test/short.txt -l 256", 1, "the weights are damaged");
    expect("./run build/test/damaged -b -l 20 -d cpu", 1, "build/test/damaged: a logit is NaN");
    free(config);
    free(tokenizer);
    free(file);
}

static void test_generate(void) {
    test_begin("run: generation is reproducible");
    const char *sampled = "./run data/tiny -i 'Once upon a time' -s 5 -n 60 2>/dev/null";
    expect_same(sampled, sampled);
    expect_same("OMP_NUM_THREADS=1 ./run data/tiny -i 'Once upon a time' -s 5 -n 60 2>/dev/null",
                "OMP_NUM_THREADS=2 ./run data/tiny -i 'Once upon a time' -s 5 -n 60 2>/dev/null");
    expect_same("OMP_NUM_THREADS=3 ./run data/tiny -i 'Once upon a time' -s 5 -n 60 2>/dev/null",
                "./run -n 60 -s 5 -i 'Once upon a time' data/tiny 2>/dev/null");
    check(!strncmp(output, "Once upon a time", 16), "the prompt is not printed: %s", output);
    expect("./run data/tiny -i 'Once upon a time' -s 6 -n 60 2>/dev/null", 0, "Once upon a time");
    check(strcmp(expected, output), "seeds 5 and 6 give the same text");

    // The printed seed of a run without -s repeats it.
    shell("./run data/tiny -n 20 >build/test/first.txt 2>build/test/messages.txt");
    size_t bytes;
    char *first = read_file("build/test/first.txt", &bytes);
    char *messages = read_file("build/test/messages.txt", &bytes), *seed = NULL;
    if (first && messages) seed = strstr(messages, "seed ");
    if (check(seed != NULL, "no seed is printed")) {
        check(shell("./run data/tiny -n 20 -s %llu 2>/dev/null", strtoull(seed + 5, NULL, 10)) ==
                      0 &&
                  !strcmp(output, first),
              "the printed seed gives another text: %s\n%s", first, output);
    }
    free(first);
    free(messages);

    test_begin("run: temperature 0, top-p 0 and the embedded default");
    const char *greedy = "./run data/tiny -i 'Once upon a time' -t 0 -n 40 2>/dev/null";
    expect_same(greedy, "./run data/tiny -i 'Once upon a time' -p 0 -s 9 -n 40 2>/dev/null");
    expect_same(greedy, "cd build && ../run -i 'Once upon a time' -t 0 -n 40 2>/dev/null");
    expect("./run data/tiny -i 'Once upon a time' -t 0 -n 40", 0, "; generation 40 tokens, ");
    check(!strstr(output, "seed"), "-t 0 prints a seed it does not use");
    check(strstr(output, "weights BF16"), "the model is not described: %s", output);

    test_begin("run: special tokens of a prompt are parsed and not shown");
    expect_same(
        "./run data/tiny -i 'a<|begin_of_text|>b' -t 0 -n 9 2>/dev/null | cut -c 1-2 | head -1",
        "echo ab");
}

static void test_prompt_files(void) {
    test_begin("run: a prompt from a file and from stdin");
    const char *direct = "./run data/tiny -d cpu -i 'Once upon\na time' -t 0 -n 9 2>/dev/null";
    write_file("build/test/prompt.txt", "Once upon\na time\n", 17);
    expect_same(direct, "./run data/tiny -d cpu -i @build/test/prompt.txt -t 0 -n 9 2>/dev/null");
    expect_same(direct, "./run data/tiny -d cpu -i - -t 0 -n 9 <build/test/prompt.txt 2>/dev/null");
    expect_error("./run data/tiny -i @build/test/nothing", 1, "build/test/nothing: No such file");
    expect_error("./run data/tiny -i @build/test", 1, "build/test: not a regular file");
    expect_error("./run data/tiny -i - </dev/null", 1, "-i -: stdin is empty");
    write_file("build/test/prompt.txt", "Once\0upon", 9);
    expect_error("./run data/tiny -i @build/test/prompt.txt", 1, "a NUL in the text");
    expect_error("./run data/tiny -i - <build/test/prompt.txt", 1, "-i -: a NUL in the text");
}

static void test_context(void) {
    test_begin("run: the prompt against the context");
    // "Once upon a time" and BOS fill the context exactly: one token can still follow.
    write_file("build/test/prompt.txt", "Once upon a time", 16);
    shell("./run data/tiny -x build/test/prompt.txt | wc -w");
    int n = atoi(output) + 1;
    check(shell("./run data/tiny -i 'Once upon a time' -l %d -t 0 -n 0", n) == 0 &&
              strstr(output, "generation 1 tokens"),
          "a prompt as long as the context: %s", output);
    char message[128];
    snprintf(message, sizeof message, "the context of %d tokens is full", n);
    check(strstr(output, message) != NULL, "expected \"%s\", got %s", message, output);
    char command[128];
    snprintf(command, sizeof command, "./run data/tiny -i 'Once upon a time' -l %d", n - 1);
    snprintf(message, sizeof message, "the prompt has %d tokens, the context only %d", n, n - 1);
    expect_error(command, 1, message);

    // A prompt of several chunks gives what the whole sequence at once gives.
    size_t bytes;
    char *text = read_file("data/eval.txt", &bytes);
    if (!check(text && bytes > 3000, "data/eval.txt cannot be read")) return;
    for (bytes = 3000; text[bytes - 1] == '\n';) bytes--; // the shell would cut it
    text[bytes] = 0;
    write_file("build/test/prompt.txt", text, bytes);
    Tiny t = open_tiny();
    Ids ids = {.ids = {t.model->config.bos}, .n = 1};
    add_text(&ids, &t, text);
    check(ids.n > 600, "the prompt has only %d tokens", ids.n);
    strcpy(expected, text);
    answer(&ids, &t, 12, expected);
    strcat(expected, "\n");
    close_tiny(&t);
    free(text);
    expect("./run data/tiny -i \"$(cat build/test/prompt.txt)\" -t 0 -n 12 2>/dev/null", 0, "");
    check(!strcmp(output, expected), "expected: %s\ngot: %s", expected, output);
}

static void test_oracle(void) {
    test_begin("run: greedy text equals the oracle's");
    size_t bytes;
    char *text = read_file("test/data/tiny_oracle.json", &bytes);
    if (!check(text != NULL, "test/data/tiny_oracle.json cannot be read")) return;
    Json *json = json_parse("test/data/tiny_oracle.json", text, bytes);
    char *greedy = json_string(json, json_get(json, 0, "greedy_text"), &bytes);
    check(shell("./run data/tiny -t 0 -n 100 -i 'Once upon a time there was a king who had three "
                "sons' 2>/dev/null") == 0 &&
              strlen(output) == bytes + 1 && !memcmp(output, greedy, bytes),
          "expected: %s\ngot: %s", greedy, output);
    free(greedy);
    json_free(json);
    free(text);
}

static void test_chat(void) {
    test_begin("run: a chat of two turns");
    Tiny t = open_tiny();
    Ids ids = {.n = 0};
    add_special(&ids, &t, "<|begin_of_text|>");
    add_header(&ids, &t, "system");
    add_text(&ids, &t,
             "\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.");
    add_special(&ids, &t, "<|eot_id|>");
    const char *messages[] = {"\n\nWho are you?", "\n\nEnd with <|eot_id|>, please."};
    expected[0] = 0;
    for (int i = 0; i < 2; i++) {
        add_header(&ids, &t, "user");
        add_text(&ids, &t, messages[i]);
        add_special(&ids, &t, "<|eot_id|>");
        add_header(&ids, &t, "assistant");
        add_text(&ids, &t, "\n\n");
        answer(&ids, &t, 24, expected);
        strcat(expected, "\n");
        add_special(&ids, &t, "<|eot_id|>");
    }
    close_tiny(&t);
    expect("printf ' Who are you? \\n\\n  \\nEnd with <|eot_id|>, please.' | "
           "./run data/tiny -m chat -y 'Be kind.' -t 0 -n 24 2>/dev/null",
           0, "");
    check(!strcmp(output, expected), "expected: %s\ngot: %s", expected, output);
    expect("printf 'End with <|eot_id|>, please.\\n' | "
           "./run data/tiny -m chat -i 'Who are you?' -y 'Be kind.' -t 0 -n 24 2>/dev/null",
           0, "");
    check(!strcmp(output, expected), "expected: %s\ngot: %s", expected, output);

    test_begin("run: a chat's ends");
    expect("./run data/tiny -m chat </dev/null 2>/dev/null", 0, "");
    check(!output[0], "no message, but an answer: %s", output);
    expect("./run data/tiny -m chat </dev/null", 0, "prompt 0 tokens");
    expect("printf 'Hello' | ./run data/tiny -m chat -t 0 -n 0 -l 80", 0,
           "the context of 80 tokens is full");
    expect("printf 'Hello' | ./run data/tiny -m chat -l 8", 1, "the context is only 8");
}

static void test_perplexity(void) {
    test_begin("run: the perplexity line");
    size_t bytes;
    char *text = read_file("data/eval.txt", &bytes);
    if (!check(text && bytes > 6000, "data/eval.txt cannot be read")) return;
    Tiny t = open_tiny();
    int n, windows, *ids = tokenizer_encode(t.tokenizer, text, 6000, true, &n);
    ids = realloc(ids, (n + 1) * sizeof *ids);
    memmove(ids + 1, ids, n * sizeof *ids);
    ids[0] = t.model->config.bos;
    double ppl = model_perplexity(t.model, ids, n + 1, 256, 0, &windows, NULL);
    check(windows >= 4, "only %d windows", windows);
    free(ids);
    close_tiny(&t);
    free(text);
    expect("./run data/tiny -e build/test/short.txt -l 256 2>/dev/null", 0, "");
    snprintf(expected, sizeof expected, "perplexity %.4f (%d windows of 256), standard error ", ppl,
             windows);
    char *error = output + strlen(expected), *end = error;
    check(!strncmp(output, expected, strlen(expected)) && strtod(error, &end) > 0 &&
              !strcmp(end, "\n"),
          "expected %s, got %s", expected, output);
    expect_same("OMP_NUM_THREADS=1 ./run data/tiny -e build/test/short.txt -l 256 2>/dev/null",
                "OMP_NUM_THREADS=2 ./run data/tiny -e build/test/short.txt -l 256 2>/dev/null");
    expect("./run data/tiny -e build/test/short.txt -l 256 2>&1 >/dev/null", 0, " windows\n");
    snprintf(expected, sizeof expected,
             "build/test/short.txt: it has %d tokens, a window needs 2048", n + 1);
    expect_error("./run data/tiny -e build/test/short.txt", 1, expected);
}

static void test_token_ids(void) {
    test_begin("run: token ids");
    const char *text = "Caf\xc3\xa9 <|eot_id|>\n\n  the  king\xff, 1234 \xf0\x9f\x90\xb8";
    write_file("build/test/ids.txt", text, strlen(text));
    Tiny t = open_tiny();
    int n, *ids = tokenizer_encode(t.tokenizer, text, strlen(text), true, &n);
    char *p = expected;
    for (int i = 0; i < n; i++) p += sprintf(p, i ? " %d" : "%d", ids[i]);
    strcpy(p, "\n");
    free(ids);
    expect("./run data/tiny -x build/test/ids.txt", 0, "");
    check(!strcmp(output, expected), "expected %s, got %s", expected, output);

    mkdir("build/test/only_tokenizer", 0777);
    write_file("build/test/only_tokenizer/tokenizer.json", t.checkpoint->tokenizer,
               t.checkpoint->tokenizer_bytes);
    expect_same("./run data/tiny -x build/test/ids.txt",
                "./run -x build/test/ids.txt build/test/only_tokenizer");
    write_file("build/test/empty.txt", "", 0);
    expect_error("./run data/tiny -x build/test/empty.txt", 1, "build/test/empty.txt");
    expect_error("./run data -x build/test/ids.txt", 1, "data/tokenizer.json: No such file");

    close_tiny(&t);
}

/* build/test/codes.bin: data/tiny with every linear of a layer replaced by made-up codes. */
static void write_codes(const Checkpoint *c) {
    Tensor *tensors = allocate(2 * c->n_tensors, sizeof *tensors);
    char(*names)[96] = allocate(2 * c->n_tensors, sizeof *names);
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++) {
        Tensor t = c->tensors[i];
        const char *end = strstr(t.name, "_proj.weight");
        if (end) {
            int stem = end + strlen("_proj.") - t.name;
            int64_t N = t.shape[0], K = t.shape[1];
            uint8_t *codes = allocate(N * K / 2, 1);
            for (int64_t k = 0; k < N * K / 2; k++) codes[k] = 0x11 * (1 + k * k % 15);
            float *scales = allocate(N, sizeof *scales);
            for (int64_t k = 0; k < N; k++) scales[k] = 0.01f;
            snprintf(names[n], sizeof *names, "%.*sqweight", stem, t.name);
            tensors[n] = (Tensor){names[n], U8, 2, {N, K / 2}, codes, N * K / 2, NULL};
            n++;
            snprintf(names[n], sizeof *names, "%.*ss_channel", stem, t.name);
            tensors[n] = (Tensor){names[n], F32, 1, {N}, scales, N * sizeof *scales, NULL};
        } else {
            tensors[n] = t;
        }
        n++;
    }
    Writer *w = writer_open("build/test/codes.bin", c,
                            "{\"bits\": 4, \"group_size\": -1, \"method\": \"none\"}", tensors, n);
    for (int i = 0; i < n; i++) {
        writer_put(w, tensors[i].name, tensors[i].data, tensors[i].bytes);
        if (tensors[i].name == names[i]) free((void *)tensors[i].data);
    }
    writer_close(w);
    free(names);
    free(tensors);
}

static void test_model_bin(void) {
    test_begin("run: a W4A8 model.bin, and how it was made");
    Tiny t = open_tiny();
    write_codes(t.checkpoint);
    close_tiny(&t);
    expect("./run build/test/codes.bin -n 1", 0, "weights W4A8 per channel");
    check(strstr(output, "\"group_size\": -1, \"method\": \"none\"}\n") != NULL,
          "the options that made the file are not shown: %s", output);
    expect_same("./run data/tiny -x build/test/ids.txt",
                "./run build/test/codes.bin -x build/test/ids.txt");
    expect_same("OMP_NUM_THREADS=1 ./run build/test/codes.bin -i Once -s 1 -n 30 2>/dev/null",
                "OMP_NUM_THREADS=2 ./run build/test/codes.bin -i Once -s 1 -n 30 2>/dev/null");
}

/* ./run -b with a context of `length`: the columns of its CSV, and whether its table shows the rate
 * at the context's end. */
static void check_benchmark(int length, int prompt, int decoded, int end) {
    char command[100];
    snprintf(command, sizeof command, "./run data/tiny -b -l %d -d cpu 2>/dev/null", length);
    expect(command, 0,
           "\nmodel,weights,device,batch,memory_GB,prefill_tokens,prefill_tokens_per_s,decode_"
           "tokens,decode_tokens_per_s,decode_GB_per_s,memory_GB_per_s,empty_decode_tokens_per_s,"
           "last_position,last_decode_tokens_per_s\n");
    const char *row = strstr(output, "\ndata/tiny,BF16,");
    int found[4];
    double rate[7];
    check(row &&
              sscanf(row, "\ndata/tiny,BF16,%*[^,],%d,%lf,%d,%lf,%d,%lf,%lf,%lf,%lf,%d,%lf",
                     &found[0], &rate[0], &found[1], &rate[1], &found[2], &rate[2], &rate[3],
                     &rate[4], &rate[5], &found[3], &rate[6]) == 11 &&
              found[0] == 1 && found[1] == prompt && found[2] == decoded && found[3] == end,
          "%s", output);
    for (int i = 0; i < 7; i++) check(rate[i] > 0 && rate[i] < INFINITY, "%s", output);
    check((rate[6] == rate[2]) == (length <= 1154), "the rate at the end: %s", output);
    char column[40];
    snprintf(column, sizeof column, "  decode from %d on\n", end);
    check(!strstr(output, column) == (length <= 1154), "the table: %s", output);
}

static void test_benchmark(void) {
    test_begin("run: benchmark, with short and long contexts");
    check_benchmark(40, 34, 4, 34);
    check_benchmark(1154, 1024, 128, 1024);
    check_benchmark(1300, 1024, 128, 1170);
    expect_error("./run data/tiny -b -l 2", 2, "a benchmark needs a context of 9 or more");
}

void test_run(void) {
    size_t bytes;
    char *text = read_file("data/eval.txt", &bytes);
    write_file("build/test/short.txt", text, text && bytes > 6000 ? 6000 : 0);
    free(text);
    test_options();
    test_bad_files();
    test_damaged_weights();
    test_generate();
    test_prompt_files();
    test_context();
    test_oracle();
    test_chat();
    test_perplexity();
    test_token_ids();
    test_model_bin();
    test_benchmark();
}
