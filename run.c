/* run: a LLaMA 3.1 model at work, 16-bit or W4A8. Top to bottom:
 *
 *   1 options · 2 sampling · 3 the model and its tokens · 4 generate · 5 chat · 6 perplexity and
 *   token ids · 7 benchmark · main
 *
 * Text goes to stdout, everything else to stderr. */
#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "qqq.h"

enum { PROMPT_CHUNK = 512 }; // tokens of a prompt that one forward() takes

/* ---- 1: options ---------------------------------------------------------------------------- */

static const char usage[] =
    "usage: ./run [MODEL] [options]\n"
    "\n"
    "MODEL is a Hugging Face directory or a model.bin; without it, the embedded data/tiny runs.\n"
    "\n"
    "generate and chat\n"
    "  -i TEXT            prompt, or the first message of a chat\n"
    "  -n TOKENS          to generate after the prompt (256; in a chat 0);\n"
    "                     0: until an end token or the end of the context\n"
    "  -t TEMPERATURE     0: always the likeliest token (1.0)\n"
    "  -p P               sample among the likeliest tokens that add up to P; 1: all (0.9)\n"
    "  -s SEED            the same seed gives the same text (from the clock)\n"
    "  -m generate|chat   chat reads one message a line from stdin\n"
    "  -y TEXT            system prompt of a chat (none)\n"
    "\n"
    "instead of them\n"
    "  -e FILE            perplexity of a text\n"
    "  -x FILE            token ids of a text; MODEL may be a directory with only tokenizer.json\n"
    "  -b                 benchmark: speed, and its share of the memory's bandwidth\n"
    "\n"
    "  -l TOKENS          context (8192 or the model's, if less); with -e the window (2048)\n"
    "  -d cpu|cuda        device (cuda if there is a GPU)\n"
    "  -h                 this help\n";

typedef enum { GENERATE, CHAT, PERPLEXITY, TOKEN_IDS, BENCHMARK } Task;
typedef enum { ANY, CPU, CUDA } Device;

typedef struct {
    char *model;
    Task task;
    Device device;
    float temperature, top_p;
    uint64_t seed;
    int n_tokens;       // to generate; 0: no limit
    int length;         // -l; 0: not given
    const char *prompt; // NULL: none
    const char *system; // NULL: none
    const char *file;   // of -e or -x
} Options;

static Options parse_options(int argc, char **argv) {
    Options o = {.task = GENERATE, .temperature = 1.0f, .top_p = 0.9f, .n_tokens = -1};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    o.seed = (uint64_t)now.tv_sec ^ (uint64_t)now.tv_nsec;
    bool chat = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.model) die_usage("two models: %s and %s", o.model, arg);
            o.model = strcpy(allocate(strlen(arg) + 1, 1), arg);
            continue;
        }
        char flag = arg[1];
        if (!flag || arg[2] || !strchr("tpsnimyelxbdh", flag))
            die_usage("unknown option %s; ./run -h lists them all", arg);
        const char *value = strchr("bh", flag) ? "" : argv[++i];
        if (!value) die_usage("-%c: its value is missing; ./run -h says which", flag);
        if (strchr("exb", flag)) {
            if (o.task != GENERATE) die_usage("-%c: one of -e, -x and -b at a time", flag);
            o.task = flag == 'e' ? PERPLEXITY : flag == 'x' ? TOKEN_IDS : BENCHMARK;
            o.file = value;
        }
        if (flag == 't') o.temperature = parse_number(flag, value, 0, 100);
        if (flag == 'p') o.top_p = parse_number(flag, value, 0, 1);
        if (flag == 's') o.seed = parse_integer(flag, value, 0, LLONG_MAX);
        if (flag == 'n') o.n_tokens = parse_integer(flag, value, 0, INT_MAX);
        if (flag == 'l') o.length = parse_integer(flag, value, 2, INT_MAX);
        if (flag == 'i') o.prompt = value;
        if (flag == 'y') o.system = value;
        if (flag == 'm') chat = parse_choice(flag, value, "generate", "chat");
        if (flag == 'd') o.device = parse_choice(flag, value, "cpu", "cuda") ? CUDA : CPU;
        if (flag == 'h') {
            fputs(usage, stdout);
            exit(0);
        }
    }
    if (chat && o.task != GENERATE) die_usage("-m chat: not together with -e, -x or -b");
    if (o.system && !chat) die_usage("-y: a system prompt needs -m chat");
    if (chat) o.task = CHAT;
    if (o.n_tokens < 0) o.n_tokens = chat ? 0 : 256;
    if (!o.model) o.model = beside_program("data/tiny");
    return o;
}

/* ---- 2: sampling --------------------------------------------------------------------------- */

typedef struct {
    float weight; // its probability times a constant
    int id;
} Candidate;

typedef struct {
    float temperature, top_p;
    uint64_t random;
    Candidate *candidates; // [vocab_size] scratch
} Sampler;

/* xorshift64*, https://en.wikipedia.org/wiki/Xorshift; in [0, 1), 24 bits. */
static float random_uniform(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Dull) >> 40) / 16777216.0f;
}

/* The seed is spread over all bits by splitmix64's finish: neighbouring seeds give unrelated texts,
 * and no seed the state 0, where xorshift would stay. */
static Sampler new_sampler(const Options *o, int vocab_size) {
    uint64_t z = o->seed + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    if (o->temperature > 0) fprintf(stderr, "seed %" PRIu64 "\n", o->seed);
    return (Sampler){.temperature = o->temperature,
                     .top_p = o->top_p,
                     .random = z ? z : 1,
                     .candidates = allocate(vocab_size, sizeof(Candidate))};
}

/* The largest of the logits, the first of equals. They must be numbers. */
static int argmax(const float *logits, int n) {
    int best = 0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(logits[i]))
            die("the logit of token %d is %f: the weights are damaged", i, logits[i]);
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

/* By falling weight; equal ones by id, so that the order never depends on the sort. */
static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->id < y->id ? -1 : 1;
}

/* A token from softmax(logits / temperature), cut to its nucleus: the fewest likeliest tokens whose
 * probabilities reach top_p (https://arxiv.org/abs/1904.09751). */
static int sample(Sampler *s, const float *logits, int n) {
    int best = argmax(logits, n);
    if (s->temperature == 0) return best;
    Candidate *c = s->candidates;
    double sum = 0;
    for (int i = 0; i < n; i++) {
        c[i] = (Candidate){expf((logits[i] - logits[best]) / s->temperature), i};
        sum += c[i].weight;
    }
    if (s->top_p < 1) {
        // Tokens below (1 - top_p) / n hold less than 1 - top_p together: the nucleus is among the
        // others, which are few and quickly sorted. The best, of weight 1, is always one of them.
        double cut = (1 - (double)s->top_p) * sum / n, nucleus = s->top_p * sum;
        int m = 0;
        for (int i = 0; i < n; i++)
            if (c[i].weight >= cut) c[m++] = c[i];
        qsort(c, m, sizeof *c, compare_candidates);
        sum = c[0].weight;
        for (n = 1; n < m && sum < nucleus; n++) sum += c[n].weight;
    }
    double target = random_uniform(&s->random) * sum;
    int i = 0;
    for (double below = c[0].weight; below <= target && i < n - 1;) below += c[++i].weight;
    return c[i].id;
}

/* ---- 3: the model and its tokens ----------------------------------------------------------- */

typedef struct {
    int *ids; // [n]
    int n;
} Tokens;

static void push(Tokens *t, const int *ids, int n) {
    t->ids = realloc(t->ids, (t->n + n + 1) * sizeof *ids); // + 1: never of size 0
    if (!t->ids) die("no memory for %d tokens", t->n + n);
    if (n) memcpy(t->ids + t->n, ids, n * sizeof *ids);
    t->n += n;
}

static void push_text(Tokens *t, const Tokenizer *tokenizer, const char *text, size_t bytes,
                      bool special) {
    int n, *ids = tokenizer_encode(tokenizer, text, bytes, special, &n);
    push(t, ids, n);
    free(ids);
}

/* How long the tokens took. */
typedef struct {
    int prompt_tokens;
    double prompt_seconds;
    int generated; // tokens printed
    int steps;     // tokens fed one by one: the first is sampled from the prompt's pass
    double step_seconds;
} Speed;

/* A sequence that runs: the model, its KV cache and what comes next. */
typedef struct {
    const char *path;
    Checkpoint *checkpoint;
    Model *model;
    Tokenizer *tokenizer; // NULL for -b
    const char *gpu;      // its name; NULL: on the CPU
    bool fallback;        // for want of a GPU
    GpuModel *gpu_model;
    State *state; // NULL on the GPU; -e has its own
    GpuState *gpu_state;
    int context;  // positions that either has
    int pos;      // tokens in the KV cache
    Tokens queue; // tokens that follow them, not yet fed
    int stop[17]; // [n_stop] token ids that end a text
    int n_stop;
    Utf8Stream out; // stdout, cut at characters
    Sampler sampler;
    Speed speed;
} Session;

/* Says which model it is, where it runs and, if it is quantized, how it was made. */
static void print_model(const Session *s) {
    char where[300];
    snprintf(where, sizeof where, "%s",
             s->gpu        ? s->gpu
             : s->fallback ? "the CPU: no GPU found"
                           : "the CPU");
    if (s->gpu_state)
        snprintf(
            where, sizeof where, "%s, %.2f GB of its memory with a context of %d tokens", s->gpu,
            (gpu_model_bytes(s->gpu_model) + gpu_state_bytes(s->gpu_model, 1, s->context)) / 1e9,
            s->context);
    describe_model(s->checkpoint, s->model, where);
}

static Tokenizer *load_tokenizer(const Checkpoint *c) {
    if (!c->tokenizer) die("%s: it has no tokenizer.json", c->path);
    return tokenizer_load(c->path, c->tokenizer, c->tokenizer_bytes);
}

/* The name of the GPU that -d asks for; NULL: the CPU it is. */
static const char *find_gpu(Device device) {
    if (device == CPU) return NULL;
    if (!gpu_name && device == CUDA)
        die_usage("-d cuda: this program was built without CUDA, only -d cpu works");
    const char *name = gpu_name ? gpu_name() : NULL;
    if (!name && device == CUDA) die("-d cuda: found no GPU of compute capability 8.0 or newer");
    return name;
}

static Session open_session(const Options *o) {
    Session s = {.path = o->model, .gpu = find_gpu(o->device)};
    s.fallback = !s.gpu && gpu_name && o->device != CPU;
    s.checkpoint = checkpoint_open(o->model);
    s.model = model_load(s.checkpoint);
    const Config *c = &s.model->config;
    if (c->max_context < 2)
        die("%s: max_position_embeddings is %d, expected 2 or more", o->model, c->max_context);
    if (o->length > c->max_context)
        die_usage("-l %d: the context of %s is %d", o->length, o->model, c->max_context);
    memcpy(s.stop, c->eos, sizeof c->eos);
    s.n_stop = c->n_eos;
    if (o->task != BENCHMARK) {
        s.tokenizer = load_tokenizer(s.checkpoint);
        if (tokenizer_size(s.tokenizer) > c->vocab_size)
            die("%s: its tokenizer has %d tokens, its embedding only %d rows", o->model,
                tokenizer_size(s.tokenizer), c->vocab_size);
    }
    if (s.gpu) s.gpu_model = gpu_model_load(s.model);
    return s;
}

static void close_session(Session *s) {
    if (s->state) state_free(s->state);
    if (s->gpu_state) gpu_state_free(s->gpu_state);
    if (s->gpu_model) gpu_model_free(s->gpu_model);
    if (s->tokenizer) tokenizer_free(s->tokenizer);
    free(s->sampler.candidates);
    free(s->queue.ids);
    model_free(s->model);
    checkpoint_close(s->checkpoint);
}

static void new_state(Session *s, int length) {
    int most = s->model->config.max_context;
    int context = length ? length : most < 8192 ? most : 8192;
    s->context = context;
    if (s->gpu) s->gpu_state = gpu_state_new(s->gpu_model, 1, context);
    else
        s->state =
            state_new(&s->model->config, context, context < PROMPT_CHUNK ? context : PROMPT_CHUNK);
}

/* Runs the queued tokens through the model and empties the queue. On the CPU it returns the logits
 * [vocab_size] after the last of them; on the GPU they are left there. */
static const float *feed(Session *s) {
    const int *ids = s->queue.ids, n = s->queue.n;
    const float *last = NULL;
    if (s->gpu && n == 1) gpu_decode(s->gpu_state, ids, &s->pos);
    else if (s->gpu) gpu_prefill(s->gpu_state, 0, ids, n, s->pos);
    else
        for (int i = 0, T; i < n; i += T) {
            T = n - i < s->state->max_T ? n - i : s->state->max_T;
            forward(s->model, s->state, ids + i, T, s->pos + i);
            if (i + T == n) last = logits(s->model, s->state, T - 1, 1);
        }
    s->pos += n;
    s->queue.n = 0;
    return last;
}

/* The token that follows the queue. The likeliest is known on the GPU; logits need not leave it. */
static int next_token(Session *s) {
    const float *l = feed(s);
    if (s->gpu && s->sampler.temperature == 0) {
        int token = gpu_chosen(s->gpu_state)[0];
        if (token < 0) die("%s: a logit is NaN or infinite: the weights are damaged", s->path);
        return token;
    }
    return sample(&s->sampler, s->gpu ? gpu_logits(s->gpu_state) : l, s->model->config.vocab_size);
}

static void print_token(Session *s, int id) {
    size_t bytes;
    const char *text = tokenizer_decode(s->tokenizer, id, &bytes);
    utf8_write(&s->out, text, bytes, false, stdout);
    fflush(stdout);
}

/* ---- 4: generate --------------------------------------------------------------------------- */

static bool is_stop(const Session *s, int id) {
    for (int i = 0; i < s->n_stop; i++)
        if (s->stop[i] == id) return true;
    return false;
}

/* Feeds the queue and then token by token what is sampled and printed, until a stop token, `limit`
 * tokens (0: no limit) or the end of the context, when it says so and returns false. The last token
 * printed stays in the queue. */
static bool generate_text(Session *s, int limit) {
    bool room = true;
    for (int n = 0; limit == 0 || n < limit; n++) {
        int queued = s->queue.n;
        room = s->pos + queued <= s->context;
        if (!room) break;
        double start = seconds();
        int token = next_token(s);
        if (n == 0) {
            s->speed.prompt_tokens += queued;
            s->speed.prompt_seconds += seconds() - start;
        } else {
            s->speed.steps++;
            s->speed.step_seconds += seconds() - start;
        }
        if (is_stop(s, token)) break;
        push(&s->queue, &token, 1);
        print_token(s, token);
        s->speed.generated++;
    }
    utf8_write(&s->out, "", 0, true, stdout);
    putchar('\n');
    fflush(stdout);
    if (!room) fprintf(stderr, "the context of %d tokens is full\n", s->context);
    return room;
}

static double per_second(double tokens, double time) {
    return time > 0 ? tokens / time : 0;
}

static void print_speed(const Speed *s) {
    fprintf(stderr, "prompt %d tokens, %.1f tokens/s; generation %d tokens, %.1f tokens/s\n",
            s->prompt_tokens, per_second(s->prompt_tokens, s->prompt_seconds), s->generated,
            per_second(s->steps, s->step_seconds));
}

static void generate(Session *s, const Options *o) {
    new_state(s, o->length);
    Tokens *prompt = &s->queue;
    if (s->model->config.bos >= 0) push(prompt, &s->model->config.bos, 1);
    if (o->prompt) push_text(prompt, s->tokenizer, o->prompt, strlen(o->prompt), true);
    if (prompt->n == 0) die("%s has no bos_token_id: without -i there is no prompt", o->model);
    if (prompt->n > s->context)
        die("the prompt has %d tokens, the context only %d (-l sets it)", prompt->n, s->context);
    print_model(s);
    s->sampler = new_sampler(o, s->model->config.vocab_size);
    for (int i = 0; i < prompt->n; i++) print_token(s, prompt->ids[i]);
    generate_text(s, o->n_tokens);
    print_speed(&s->speed);
}

/* ---- 5: chat ------------------------------------------------------------------------------- */

/* The format of LLaMA 3.1 Instruct (https://llama.meta.com/docs/model-cards-and-prompt-formats):
 *   <|begin_of_text|>
 *   <|start_header_id|>system<|end_header_id|>\n\n ... <|eot_id|>      (only with -y)
 *   <|start_header_id|>user<|end_header_id|>\n\n ... <|eot_id|>
 *   <|start_header_id|>assistant<|end_header_id|>\n\n ... <|eot_id|>   and so on. */

static int special_token(const Session *s, const char *name) {
    int id = tokenizer_id(s->tokenizer, name);
    if (id < 0) die("%s: a chat needs the token %s, which its tokenizer lacks", s->path, name);
    return id;
}

/* Queues a message's header and text, in which special tokens are plain text. */
static void push_message(Session *s, const char *role, const char *text, size_t bytes) {
    int start = special_token(s, "<|start_header_id|>");
    int end = special_token(s, "<|end_header_id|>");
    push(&s->queue, &start, 1);
    push_text(&s->queue, s->tokenizer, role, strlen(role), false);
    push(&s->queue, &end, 1);
    char *body = allocate(bytes + 2, 1); // blank lines and text are one piece to the tokenizer
    memcpy(body, "\n\n", 2);
    memcpy(body + 2, text, bytes);
    push_text(&s->queue, s->tokenizer, body, bytes + 2, false);
    free(body);
}

/* Cuts white space at both ends, as the published template does. */
static const char *trim(const char *text, size_t *bytes) {
    while (*bytes > 0 && isspace((unsigned char)text[*bytes - 1])) --*bytes;
    while (*bytes > 0 && isspace((unsigned char)*text)) text++, --*bytes;
    return text;
}

/* One message and its answer. Returns false when the context is full. */
static bool chat_turn(Session *s, int eot, const char *text, size_t bytes, int limit) {
    text = trim(text, &bytes);
    if (bytes == 0) return true;
    push_message(s, "user", text, bytes);
    push(&s->queue, &eot, 1);
    push_message(s, "assistant", "", 0);
    if (s->pos + s->queue.n > s->context)
        die("the message makes the chat %d tokens long, the context is only %d (-l sets it)",
            s->pos + s->queue.n, s->context);
    bool room = generate_text(s, limit);
    push(&s->queue, &eot, 1);
    return room;
}

static void chat(Session *s, const Options *o) {
    int bos = special_token(s, "<|begin_of_text|>"), eot = special_token(s, "<|eot_id|>");
    s->stop[s->n_stop++] = eot;
    new_state(s, o->length);
    push(&s->queue, &bos, 1);
    if (o->system) {
        size_t bytes = strlen(o->system);
        const char *text = trim(o->system, &bytes);
        push_message(s, "system", text, bytes);
        push(&s->queue, &eot, 1);
    }
    print_model(s);
    s->sampler = new_sampler(o, s->model->config.vocab_size);
    bool room = !o->prompt || chat_turn(s, eot, o->prompt, strlen(o->prompt), o->n_tokens);
    bool terminal = isatty(STDIN_FILENO);
    char *line = NULL;
    size_t size = 0;
    while (room) {
        if (terminal) fputs("> ", stderr);
        ssize_t bytes = getline(&line, &size, stdin);
        if (bytes < 0) break;
        room = chat_turn(s, eot, line, bytes, o->n_tokens);
    }
    free(line);
    if (terminal && room) fputc('\n', stderr);
    print_speed(&s->speed);
}

/* ---- 6: perplexity and token ids ----------------------------------------------------------- */

static void print_perplexity(Session *s, const Options *o) {
    const Config *c = &s->model->config;
    int length = o->length ? o->length : c->max_context < 2048 ? c->max_context : 2048, windows;
    size_t bytes;
    char *text = read_text(o->file, &bytes);
    if (c->bos >= 0) push(&s->queue, &c->bos, 1);
    push_text(&s->queue, s->tokenizer, text, bytes, true);
    free(text);
    if (s->queue.n < length)
        die("%s: it has %d tokens, a window needs %d (-l sets it)", o->file, s->queue.n, length);
    print_model(s);
    double ppl =
        s->gpu ? gpu_perplexity(s->gpu_model, s->queue.ids, s->queue.n, length, 0, &windows,
                                show_windows)
               : perplexity(s->model, s->queue.ids, s->queue.n, length, 0, &windows, show_windows);
    if (!isfinite(ppl)) die("%s: the perplexity is %f: the weights are damaged", o->model, ppl);
    printf("perplexity %.4f (%d windows of %d)\n", ppl, windows, length);
}

static void print_token_ids(const Options *o) {
    Tokenizer *tokenizer;
    struct stat st;
    if (stat(o->model, &st) == 0 && S_ISDIR(st.st_mode)) { // its tokenizer.json is enough
        char *path = allocate(strlen(o->model) + sizeof "/tokenizer.json", 1);
        sprintf(path, "%s/tokenizer.json", o->model);
        size_t bytes;
        char *json = read_text(path, &bytes);
        tokenizer = tokenizer_load(path, json, bytes);
        free(json);
        free(path);
    } else {
        Checkpoint *c = checkpoint_open(o->model);
        tokenizer = load_tokenizer(c);
        checkpoint_close(c);
    }
    size_t bytes;
    char *text = read_text(o->file, &bytes);
    Tokens t = {0};
    push_text(&t, tokenizer, text, bytes, true);
    for (int i = 0; i < t.n; i++) printf(i ? " %d" : "%d", t.ids[i]);
    putchar('\n');
    free(t.ids);
    free(text);
    tokenizer_free(tokenizer);
}

/* ---- 7: benchmark -------------------------------------------------------------------------- */

/* Bytes a second that all threads together read from memory: the best of some passes over 512 MB,
 * which fit in no cache. */
static double memory_bandwidth(void) {
    const size_t n = (size_t)64 << 20;
    uint64_t *buffer = allocate(n, sizeof *buffer), total = 0;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) buffer[i] = i; // so that every page is there, near its reader
    double best = DBL_MAX;
    for (int pass = 0; pass < 8; pass++) {
        double start = seconds();
#pragma omp parallel for schedule(static) reduction(+ : total)
        for (size_t i = 0; i < n; i++) total += buffer[i];
        best = fmin(best, seconds() - start);
    }
    if (total != 8 * (n / 2 * (n - 1))) die("the memory does not hold what was written to it");
    free(buffer);
    return n * sizeof *buffer / best;
}

/* Prefill: 1024 tokens at once, fewer where they would take longer than 15 s. Decode: the next
 * 256, one by one, or as many as 10 s allow. A decoded token must read all weights and the KV
 * cache up to it; that, a second, against the memory's bandwidth is how good the decoder is. */
static void benchmark_cpu(Session *s, const Options *o) {
    const Config *c = &s->model->config;
    int limit = o->length ? o->length : c->max_context, context = limit < 1280 ? limit : 1280;
    int prefill = context - context / 5, probe = prefill < 32 ? prefill : 32;
    new_state(s, context);
    print_model(s);
    for (int i = 0; i < prefill; i++) {
        int id = (int)(i * 7919ll % c->vocab_size);
        push(&s->queue, &id, 1);
    }
    s->queue.n = 1;
    feed(s); // the weights come from the disk
    s->pos = 0, s->queue.n = probe;
    double start = seconds();
    feed(s);
    double affordable = 15 * probe / (seconds() - start);
    if (affordable < prefill) prefill = affordable < probe ? probe : (int)affordable;
    s->pos = 0, s->queue.n = prefill;
    start = seconds();
    const float *l = feed(s);
    double prefill_time = seconds() - start;

    double kv = 2.0 * c->n_layers * c->n_kv_heads * c->head_dim * sizeof(float);
    double bytes = 0, time = 0;
    int decoded = 0;
    for (start = seconds(); s->pos < context && time < 10; time = seconds() - start) {
        int likeliest = argmax(l, c->vocab_size);
        push(&s->queue, &likeliest, 1);
        l = feed(s);
        bytes += model_bytes(s->model) + kv * s->pos;
        decoded++;
    }
    double memory = memory_bandwidth(), rate = decoded / time, GBs = bytes / time / 1e9;
    printf("%s, %s, %d threads, %.1f MB of weights and KV cache read per token\n\n", o->model,
           weights_kind(s->model), omp_get_max_threads(), bytes / decoded / 1e6);
    printf("phase    tokens  seconds  tokens/s    GB/s  of memory's %.1f GB/s\n", memory / 1e9);
    printf("prefill  %6d  %7.3f  %8.1f\n", prefill, prefill_time, prefill / prefill_time);
    printf("decode   %6d  %7.3f  %8.1f  %6.2f  %.0f %%\n\n", decoded, time, rate, GBs,
           1e11 * GBs / memory);
    printf("model,weights,threads,prefill_tokens,prefill_tokens_per_s,decode_tokens,"
           "decode_tokens_per_s,decode_GB_per_s,memory_GB_per_s\n");
    printf("%s,%s,%d,%d,%.1f,%d,%.2f,%.2f,%.2f\n", o->model, weights_kind(s->model),
           omp_get_max_threads(), prefill, prefill / prefill_time, decoded, rate, GBs,
           memory / 1e9);
}

/* Prefill: 1024 tokens of each sequence. Decode: the 128 after them, of all sequences together. A
 * step reads all weights and the KV cache; that, a second, against what a copy reads and writes. */
static void benchmark_gpu(Session *s, const Options *o) {
    static const int batches[] = {1, 4, 16, 64};
    const Config *c = &s->model->config;
    int limit = o->length ? o->length : c->max_context, context = limit < 1153 ? limit : 1153;
    int steps = context / 9, prompt = context - steps - 1; // 128, 1024
    if (prompt < 1) die_usage("-l %d: a benchmark needs a context of 11 or more", limit);
    print_model(s);
    int *tokens = allocate(prompt, sizeof *tokens);
    double copy = gpu_copy_bandwidth();
    double kv = 2.0 * c->n_layers * c->n_kv_heads * c->head_dim * 2; // of a position
    printf("%s, %s, on %s; prompts of %d tokens, %d decoded\n\n", o->model, weights_kind(s->model),
           s->gpu, prompt, steps);
    printf("batch  memory GB  prefill tokens/s  decode tokens/s  ms/step    GB/s  of copy's %.0f "
           "GB/s\n",
           copy / 1e9);
    char csv[sizeof batches / sizeof *batches][200] = {0};
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        int batch = batches[i];
        size_t memory = gpu_state_bytes(s->gpu_model, batch, context);
        if (memory > gpu_free_memory()) {
            printf("%5d  does not fit: it needs %.2f GB beside the model\n", batch, memory / 1e9);
            break;
        }
        GpuState *state = gpu_state_new(s->gpu_model, batch, context);
        double start = 0;
        for (int b = -1; b < batch; b++) { // -1: once to warm up
            for (int t = 0; t < prompt; t++)
                tokens[t] = (int)((t * 7919ll + b * 104729ll + 104729) % c->vocab_size);
            if (b == 0) start = seconds();
            gpu_prefill(state, b < 0 ? 0 : b, tokens, prompt, 0);
            if (b < 0) gpu_chosen(state); // waits
        }
        gpu_chosen(state);
        double prefill = seconds() - start;
        gpu_decode(state, NULL, NULL); // makes the graph
        gpu_chosen(state);
        start = seconds();
        for (int step = 0; step < steps; step++) gpu_decode(state, NULL, NULL);
        const int *chosen = gpu_chosen(state);
        double decode = (seconds() - start) / steps;
        for (int b = 0; b < batch; b++)
            if (chosen[b] < 0) die("%s: a logit is NaN or infinite", o->model);
        gpu_state_free(state);
        double bytes = gpu_step_bytes(s->gpu_model) + kv * batch * (prompt + 1 + (steps + 1) / 2.0);
        double all = (gpu_model_bytes(s->gpu_model) + memory) / 1e9;
        printf("%5d  %9.2f  %16.0f  %15.1f  %7.3f  %6.0f  %.0f %%\n", batch, all,
               batch * prompt / prefill, batch / decode, decode * 1e3, bytes / decode / 1e9,
               100 * bytes / decode / copy);
        snprintf(csv[i], sizeof csv[i], "%d,%.3f,%d,%.1f,%d,%.2f,%.1f,%.1f\n", batch, all, prompt,
                 batch * prompt / prefill, steps, batch / decode, bytes / decode / 1e9, copy / 1e9);
    }
    printf("\nmodel,weights,device,batch,memory_GB,prefill_tokens,prefill_tokens_per_s,"
           "decode_tokens,decode_tokens_per_s,decode_GB_per_s,copy_GB_per_s\n");
    for (size_t i = 0; i < sizeof batches / sizeof *batches && *csv[i]; i++)
        printf("%s,%s,%s,%s", o->model, weights_kind(s->model), s->gpu, csv[i]);
    free(tokens);
}

int main(int argc, char **argv) {
    Options o = parse_options(argc, argv);
    if (o.task == TOKEN_IDS) {
        print_token_ids(&o);
    } else {
        Session s = open_session(&o);
        if (o.task == GENERATE) generate(&s, &o);
        if (o.task == CHAT) chat(&s, &o);
        if (o.task == PERPLEXITY) print_perplexity(&s, &o);
        if (o.task == BENCHMARK) (s.gpu ? benchmark_gpu : benchmark_cpu)(&s, &o);
        close_session(&s);
    }
    free(o.model);
    if (fflush(stdout) || ferror(stdout)) die("stdout: %s", strerror(errno));
    return 0;
}
