/* run: a LLaMA 3.1 model at work, 16-bit or W4A8. Top to bottom:
 *
 *   1 options · 2 sampling · 3 the model and its tokens · 4 generate · 5 chat · 6 token ids ·
 *   7 benchmark · main
 *
 * Text goes to stdout, everything else to stderr. */
#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
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
    "  -k 16|8|4          bits of the KV cache (16)\n"
    "  -h                 this help\n";

typedef enum { GENERATE, CHAT, PERPLEXITY, TOKEN_IDS, BENCHMARK } Task;

typedef struct {
    char *model;
    Task task;
    Device device;
    float temperature, top_p;
    uint64_t seed;
    int n_tokens;       // to generate; 0: no limit
    int length;         // -l; 0: not given
    int kv_bits;        // of the KV cache
    const char *prompt; // NULL: none
    const char *system; // NULL: none
    const char *file;   // of -e or -x
} Options;

static Options parse_options(int argc, char **argv) {
    Options o = {
        .task = GENERATE, .temperature = 1.0f, .top_p = 0.9f, .n_tokens = -1, .kv_bits = 16};
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
        if (!flag || arg[2] || !strchr("tpsnimyelxbdkh", flag))
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
        if (flag == 'k') o.kv_bits = parse_integer(flag, value, 4, 16);
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

/* By falling weight; equal ones by id, so that the order never depends on the sort. */
static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->id < y->id ? -1 : 1;
}

/* A token from softmax(logits / temperature), cut to its nucleus: the fewest likeliest tokens whose
 * probabilities reach top_p (https://arxiv.org/abs/1904.09751). -1: a logit is not finite. */
static int sample(Sampler *s, const float *logits, int n) {
    int best = argmax(logits, n);
    if (best < 0) return best;
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
    Engine *engine;
    char where[300];      // it runs
    Tokenizer *tokenizer; // NULL for -b
    int pos;              // tokens in the KV cache
    Tokens queue;         // tokens that follow them, not yet fed
    int stop[17];         // [n_stop] token ids that end a text
    int n_stop;
    Utf8Stream out; // stdout, cut at characters
    Sampler sampler;
    Speed speed;
} Session;

/* Says which model it is, where it runs and, if it is quantized, how it was made. */
static void print_model(Session *s) {
    const Engine *e = s->engine;
    size_t n = strlen(s->where);
    if (e->on_gpu && e->state_bytes)
        snprintf(s->where + n, sizeof s->where - n,
                 ", %.2f GB of its memory with a context of %d tokens",
                 (e->weight_bytes + e->state_bytes) / 1e9, e->context);
    describe_model(s->checkpoint, s->model, s->where);
}

static Tokenizer *load_tokenizer(const Checkpoint *c) {
    if (!c->tokenizer) die("%s: it has no tokenizer.json", c->path);
    return tokenizer_load(c->path, c->tokenizer, c->tokenizer_bytes);
}

static Session open_session(const Options *o) {
    Session s = {.path = o->model, .checkpoint = checkpoint_open(o->model)};
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
    bool gpu = choose_gpu(o->device, c, s.model->group_size != 0, s.where, sizeof s.where);
    s.engine = engine_new(s.model, gpu, o->kv_bits);
    return s;
}

static void close_session(Session *s) {
    s->engine->free(s->engine);
    if (s->tokenizer) tokenizer_free(s->tokenizer);
    free(s->sampler.candidates);
    free(s->queue.ids);
    model_free(s->model);
    checkpoint_close(s->checkpoint);
}

static void start(Session *s, int length) {
    int most = s->model->config.max_context;
    s->engine->start(s->engine, 1, length ? length : most < 8192 ? most : 8192);
}

/* The token that follows the queue, which it runs through the model and empties. */
static int next_token(Session *s) {
    Engine *e = s->engine;
    e->feed(e, 0, s->queue.ids, s->queue.n, s->pos);
    s->pos += s->queue.n;
    s->queue.n = 0;
    int token = s->sampler.temperature == 0 // the likeliest is known on the GPU
                    ? e->chosen(e)[0]
                    : sample(&s->sampler, e->logits(e), s->model->config.vocab_size);
    if (token < 0) die("%s: a logit is NaN or infinite: the weights are damaged", s->path);
    return token;
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
        room = s->pos + queued <= s->engine->context;
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
    if (!room) fprintf(stderr, "the context of %d tokens is full\n", s->engine->context);
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
    start(s, o->length);
    Tokens *prompt = &s->queue;
    if (s->model->config.bos >= 0) push(prompt, &s->model->config.bos, 1);
    if (o->prompt) push_text(prompt, s->tokenizer, o->prompt, strlen(o->prompt), true);
    if (prompt->n == 0) die("%s has no bos_token_id: without -i there is no prompt", o->model);
    if (prompt->n > s->engine->context)
        die("the prompt has %d tokens, the context only %d (-l sets it)", prompt->n,
            s->engine->context);
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
    if (s->pos + s->queue.n > s->engine->context)
        die("the message makes the chat %d tokens long, the context is only %d (-l sets it)",
            s->pos + s->queue.n, s->engine->context);
    bool room = generate_text(s, limit);
    push(&s->queue, &eot, 1);
    return room;
}

static void chat(Session *s, const Options *o) {
    int bos = special_token(s, "<|begin_of_text|>"), eot = special_token(s, "<|eot_id|>");
    s->stop[s->n_stop++] = eot;
    start(s, o->length);
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

/* ---- 6: token ids -------------------------------------------------------------------------- */

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

/* Runs `steps` tokens more of each sequence, or as many as 10 s allow. Returns how many. */
static int decode(Session *s, int steps, double *time) {
    Engine *e = s->engine;
    int done = 0;
    double start = seconds();
    for (*time = 0; done < steps && *time < 10; done++) {
        e->step(e, NULL, NULL);
        if (!e->on_gpu) *time = seconds() - start;
    }
    for (int b = 0; b < e->n_sequences; b++) // waits for the GPU
        if (e->chosen(e)[b] < 0) die("%s: a logit is NaN or infinite", s->path);
    *time = seconds() - start;
    return done;
}

/* What `steps` decoded tokens of each sequence, from position `pos` on, read a second: all weights
 * and the KV cache so far, for each. Against the memory's bandwidth it is how good the decoder is.
 */
static double bytes_per_second(const Engine *e, int pos, int steps, double time) {
    double positions = pos + (steps + 1) / 2.0;
    return steps * (e->step_bytes + (double)e->position_bytes * e->n_sequences * positions) / time;
}

/* Decode from an empty context, prefill of 1024 tokens of each sequence (fewer where they would
 * take longer than 15 s), decode after them: 128 tokens of all sequences together. */
static void benchmark(Session *s, const Options *o) {
    static const int batches[] = {1, 4, 16, 64};
    enum { N = sizeof batches / sizeof *batches };
    const Config *c = &s->model->config;
    Engine *e = s->engine;
    int limit = o->length ? o->length : c->max_context, context = limit < 1154 ? limit : 1154;
    int steps = context / 9, most = context - steps - 2; // 128, 1024
    if (steps < 1) die_usage("-l %d: a benchmark needs a context of 9 or more", limit);
    print_model(s);
    int *tokens = allocate(most, sizeof *tokens);
    char device[400], csv[N][200] = {0};
    if (e->on_gpu) snprintf(device, sizeof device, "%s", s->where);
    else snprintf(device, sizeof device, "%d threads", omp_get_max_threads());
    double memory = e->bandwidth();
    printf("%s, %s, on %s; GB/s is of weights and KV cache, memory's is %.1f\n\n", o->model,
           weights_kind(s->model), e->on_gpu ? s->where : device, memory / 1e9);
    printf("batch  memory GB  prefill tokens/s  decode tokens/s, empty  after prefill    GB/s  of "
           "memory's\n");
    for (int i = 0; i < N; i++) {
        int batch = batches[i], prompt = most;
        if (!e->fits(e, batch, context)) {
            if (e->on_gpu) printf("%5d  does not fit: %.2f GB\n", batch, e->state_bytes / 1e9);
            break;
        }
        e->start(e, batch, context);
        double time[3], start = 0;
        for (int b = 0; b < batch; b++) e->feed(e, b, &(int){b % c->vocab_size}, 1, 0);
        decode(s, 1, &time[0]); // the weights come from the disk, the GPU makes its graph
        int empty = decode(s, steps, &time[0]);
        for (int b = -1; b < batch; b++) { // -1: to warm up
            for (int t = 0; t < prompt; t++)
                tokens[t] = (int)((t * 7919ll + b * 104729ll + 104729) % c->vocab_size);
            if (b <= 0) start = seconds();
            int n = b < 0 && !e->on_gpu && prompt > 32 ? 32 : prompt;
            e->feed(e, b < 0 ? 0 : b, tokens, n, 0);
            if (b >= 0) continue;
            e->chosen(e); // waits
            double affordable = 15 * n / (seconds() - start);
            if (affordable < prompt) prompt = affordable < n ? n : (int)affordable;
        }
        e->chosen(e);
        time[1] = seconds() - start;
        decode(s, 1, &time[2]);
        int decoded = decode(s, steps, &time[2]);
        double rate = batch * prompt / time[1], GB = (e->weight_bytes + e->state_bytes) / 1e9;
        double read = bytes_per_second(e, prompt + 1, decoded, time[2]);
        printf("%5d  %9.2f  %16.1f  %22.1f  %13.1f  %6.1f  %.0f %%\n", batch, GB, rate,
               batch * empty / time[0], batch * decoded / time[2], read / 1e9, 100 * read / memory);
        fflush(stdout);
        snprintf(csv[i], sizeof csv[i], "%d,%.3f,%d,%.1f,%d,%.2f,%.2f,%.2f,%.2f\n", batch, GB,
                 prompt, rate, decoded, batch * decoded / time[2], read / 1e9, memory / 1e9,
                 batch * empty / time[0]);
    }
    printf("\nmodel,weights,device,batch,memory_GB,prefill_tokens,prefill_tokens_per_s,"
           "decode_tokens,decode_tokens_per_s,decode_GB_per_s,memory_GB_per_s,"
           "empty_decode_tokens_per_s\n");
    for (int i = 0; i < N && *csv[i]; i++)
        printf("%s,%s,%s,%s", o->model, weights_kind(s->model), device, csv[i]);
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
        if (o.task == PERPLEXITY)
            print_perplexity(s.checkpoint, s.engine, s.where, "", o.file, o.length);
        if (o.task == BENCHMARK) benchmark(&s, &o);
        close_session(&s);
    }
    free(o.model);
    if (fflush(stdout) || ferror(stdout)) die("stdout: %s", strerror(errno));
    return 0;
}
