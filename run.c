/* run: a LLaMA 3.1 model at work, 16-bit or W4A8. Top to bottom:
 *
 *   1 options · 2 sampling · 3 the model and its tokens · 4 generate · 5 chat · 6 zero-shot ·
 *   7 token ids · 8 benchmark · main
 *
 * Text goes to stdout, everything else to stderr. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <signal.h>
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
    "  -i TEXT            prompt, or the first message of a chat; @FILE: what is in FILE, -: "
    "stdin,\n"
    "                     both without the newline at the end\n"
    "  -n TOKENS          to generate after the prompt (256; in a chat 0);\n"
    "                     0: until an end token or the end of the context\n"
    "  -t TEMPERATURE     0: always the likeliest token (the model's, else 1.0)\n"
    "  -p P               sample among the likeliest tokens that add up to P; 1: all (the "
    "model's,\n"
    "                     else 0.9)\n"
    "  -s SEED            the same seed gives the same text (from the clock)\n"
    "  -m generate|chat   chat reads one message a line from stdin, more lines after a \\ at the "
    "end;\n"
    "                     Ctrl-C ends an answer, a second one the chat; rlwrap ./run .. edits "
    "lines\n"
    "  -y TEXT            system prompt of a chat, as -i reads it (none)\n"
    "\n"
    "instead of them\n"
    "  -e FILE            perplexity of a text; -: of stdin\n"
    "  -z FILE            zero-shot accuracy on the items of FILE, one a line:\n"
    "                     {\"context\": TEXT, \"choices\": [TEXT, ..], \"gold\": 0}\n"
    "  -o FILE            what -z found for each item, as JSON lines\n"
    "  -x FILE            token ids of a text; MODEL may be a directory with only tokenizer.json\n"
    "  -b                 benchmark: speed, and its share of the memory's bandwidth\n"
    "\n"
    "  -l TOKENS          context (8192 or the model's, if less); with -e the window (2048)\n"
    "  -d cpu|cuda        device (cuda if there is a GPU)\n"
    "  -k 16|8            bits of the KV cache (16)\n"
    "  -h, --help         this help; --version\n";

typedef enum { GENERATE, CHAT, PERPLEXITY, ZERO_SHOT, TOKEN_IDS, BENCHMARK } Task;

typedef struct {
    char *model;
    Task task;
    Device device;
    float temperature, top_p; // -1: not given
    uint64_t seed;
    int n_tokens;      // to generate; 0: no limit
    int length;        // -l; 0: not given
    int kv_bits;       // of the KV cache
    char *prompt;      // NULL: none
    char *system;      // NULL: none
    const char *file;  // of -e, -x or -z
    const char *items; // -o; NULL: not given
} Options;

/* What -i or -y says: the text itself, @FILE or - for stdin, without the newline at the end.
 * malloc'ed. */
static char *read_prompt(char flag, const char *value) {
    char *text, name[] = {'-', flag, 0};
    size_t bytes = strlen(value);
    if (strcmp(value, "-") && *value != '@') {
        require_utf8(name, value, bytes);
        return format_text("%s", value);
    }
    text = read_text(*value == '@' ? value + 1 : value, &bytes);
    if (text[bytes - 1] == '\n') text[--bytes] = 0;
    if (bytes && text[bytes - 1] == '\r') text[--bytes] = 0;
    return text;
}

static Options parse_options(int argc, char **argv) {
    Options o = {.task = GENERATE, .temperature = -1, .top_p = -1, .n_tokens = -1, .kv_bits = 16};
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
        if (!strcmp(arg, "-h") || !strcmp(arg, "--help")) print_and_exit(usage);
        if (!strcmp(arg, "--version")) print_and_exit("run, QQQ in C 1.0\n");
        if (!flag || arg[2] || !strchr("tpsnimyelxzobdk", flag))
            die_usage("unknown option %s; ./run -h lists them all", arg);
        const char *value = flag == 'b' ? "" : argv[++i];
        if (!value) die_usage("-%c: its value is missing; ./run -h says which", flag);
        if (strchr("ezxb", flag)) {
            if (o.task != GENERATE) die_usage("-%c: one of -e, -z, -x and -b at a time", flag);
            o.task = flag == 'e'   ? PERPLEXITY
                     : flag == 'z' ? ZERO_SHOT
                     : flag == 'x' ? TOKEN_IDS
                                   : BENCHMARK;
            o.file = value;
        }
        if (flag == 't') o.temperature = parse_number(flag, value, 0, 100);
        if (flag == 'p') o.top_p = parse_number(flag, value, 0, 1);
        if (flag == 's') o.seed = parse_integer(flag, value, 0, LLONG_MAX);
        if (flag == 'n') o.n_tokens = parse_integer(flag, value, 0, INT_MAX);
        if (flag == 'l') o.length = parse_integer(flag, value, 2, INT_MAX);
        if (flag == 'k') o.kv_bits = parse_choice(flag, value, "16", "8") ? 8 : 16;
        if (flag == 'o') o.items = value;
        if (flag == 'i') {
            free(o.prompt);
            o.prompt = read_prompt(flag, value);
        }
        if (flag == 'y') {
            free(o.system);
            o.system = read_prompt(flag, value);
        }
        if (flag == 'm') chat = parse_choice(flag, value, "generate", "chat");
        if (flag == 'd') o.device = parse_choice(flag, value, "cpu", "cuda") ? CUDA : CPU;
    }
    if (chat && o.task != GENERATE) die_usage("-m chat: not together with -e, -z, -x or -b");
    if (o.items && o.task != ZERO_SHOT) die_usage("-o: only with -z");
    if (o.items && !*o.items) die_usage("-o: the name of the file is empty");
    if (o.system && !chat) die_usage("-y: a system prompt needs -m chat");
    if (o.file && o.task != BENCHMARK && strcmp(o.file, "-") && access(o.file, R_OK))
        die("%s: %s", o.file, strerror(errno));
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
static Sampler new_sampler(const Options *o, const Config *c) {
    uint64_t z = o->seed + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    Sampler s = {.random = z ? z : 1, .candidates = allocate(c->vocab_size, sizeof(Candidate))};
    s.temperature = o->temperature >= 0 ? o->temperature : c->temperature >= 0 ? c->temperature : 1;
    s.top_p = o->top_p >= 0 ? o->top_p : c->top_p >= 0 ? c->top_p : 0.9f;
    bool models = (o->temperature < 0 && c->temperature >= 0) || (o->top_p < 0 && c->top_p >= 0);
    if (models || s.temperature > 0)
        fprintf(stderr, "seed %" PRIu64 ", temperature %g, top_p %g%s\n", o->seed, s.temperature,
                s.top_p,
                models ? ", of generation_config.json where no option says otherwise" : "");
    return s;
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

/* Bytes of the white space at the beginning or the end of text [n], one character of what Python's
 * strip() takes for such; 0: there is none. */
static size_t space_bytes(const char *text, size_t n, bool at_end) {
    static const char *const spaces[] = {
        "\x1c",   "\x1d",   "\x1e",     "\x1f",   " ",      "\t",     "\n",     "\v",
        "\f",     "\r",     "\xc2\x85", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002",
        "\u2003", "\u2004", "\u2005",   "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
        "\u2028", "\u2029", "\u202f",   "\u205f", "\u3000"};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
        size_t bytes = strlen(spaces[i]);
        if (n >= bytes && !memcmp(at_end ? text + n - bytes : text, spaces[i], bytes)) return bytes;
    }
    return 0;
}

/* The length of text [n] without white space at its end. */
static size_t stripped_length(const char *text, size_t n) {
    for (size_t bytes; (bytes = space_bytes(text, n, true));) n -= bytes;
    return n;
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
    int stop[18];         // [n_stop] token ids that end a text
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

static Session open_session(const Options *o) {
    Session s = {.path = o->model, .checkpoint = checkpoint_open(o->model)};
    s.model = model_load(s.checkpoint);
    const Config *c = &s.model->config;
    if (o->length > c->max_context)
        die_usage("-l %d: the context of %s is %d", o->length, o->model, c->max_context);
    memcpy(s.stop, c->eos, sizeof c->eos);
    s.n_stop = c->n_eos;
    if (o->task != BENCHMARK) s.tokenizer = checkpoint_tokenizer(s.checkpoint);
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
    for (int i = 0, rows = s->model->config.vocab_size; i < s->queue.n; i++)
        if (s->queue.ids[i] >= rows)
            die("%s: token %d is beyond the %d rows of the embedding", s->path, s->queue.ids[i],
                rows);
    e->feed(e, 0, s->queue.ids, s->queue.n, s->pos);
    s->pos += s->queue.n;
    s->queue.n = 0;
    int token = s->sampler.temperature == 0 // the likeliest is known on the GPU
                    ? e->chosen(e)[0]
                    : sample(&s->sampler, e->logits(e), s->model->config.vocab_size);
    if (token < 0) die("%s: a logit is NaN or infinite: the weights are damaged", s->path);
    return token;
}

/* Set by Ctrl-C in a chat: the answer ends. */
static volatile sig_atomic_t interrupted;

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
    for (int n = 0; (limit == 0 || n < limit) && !interrupted; n++) {
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
    const char *text = o->prompt ? o->prompt : "";
    int n,
        *ids = encode_text(s->tokenizer, &s->model->config, "the prompt", text, strlen(text), &n);
    push(prompt, ids, n);
    free(ids);
    if (n == 0) die("%s has no bos_token_id: without -i there is no prompt", o->model);
    if (prompt->n > s->engine->context)
        die("the prompt has %d tokens, the context only %d (-l sets it)", prompt->n,
            s->engine->context);
    print_model(s);
    s->sampler = new_sampler(o, &s->model->config);
    for (int i = 0; i < prompt->n; i++) print_token(s, prompt->ids[i]);
    generate_text(s, o->n_tokens);
    print_speed(&s->speed);
}

/* ---- 5: chat ------------------------------------------------------------------------------- */

/* The format of LLaMA 3 Instruct (https://llama.meta.com/docs/model-cards-and-prompt-formats):
 *   <|begin_of_text|>
 *   <|start_header_id|>system<|end_header_id|>\n\n ... <|eot_id|>
 *   <|start_header_id|>user<|end_header_id|>\n\n ... <|eot_id|>
 *   <|start_header_id|>assistant<|end_header_id|>\n\n ... <|eot_id|>   and so on.
 * Llama 3 has the system block only with -y; 3.1 always, and it starts with two dates, as the
 * model's template says or, where there is none, the token <|eom_id|>. 3.2's second date is
 * today's. */
static const char dates[] = "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n";

static int special_token(const Session *s, const char *name) {
    int id = tokenizer_id(s->tokenizer, name);
    if (id < 0) die("%s: a chat needs the token %s, which its tokenizer lacks", s->path, name);
    return id;
}

/* The chat template of a file beside tokenizer.json: the file itself, or in JSON "chat_template", a
 * text or a list of {"name", "template"} with one called default. malloc'ed, NULL: none. */
static char *template_in(const Tensor *file) {
    const char *end = strrchr(file->name, '.');
    if (strcmp(end, ".json"))
        return format_text("%.*s", (int)file->bytes, (const char *)file->data);
    Json *json = json_parse(file->name, file->data, file->bytes);
    int node = json_get(json, 0, "chat_template"), named = -1;
    for (int i = json_first(json, node); i >= 0; i = json_next(json, node, i)) {
        bool chosen = json_is(json, json_get(json, i, "name"), "default");
        if (named < 0 || chosen) named = json_get(json, i, "template");
    }
    if (json_type(json, node) == '[') node = named;
    size_t bytes;
    char *text = json_type(json, node) == '"' ? json_string(json, node, &bytes) : NULL;
    json_free(json);
    return text;
}

/* The model's chat template: chat_template.jinja's, else tokenizer_config.json's. One that is not
 * LLaMA 3's ends the program. malloc'ed, NULL: none. */
static char *chat_template(const Session *s) {
    for (int i = 1; s->checkpoint && i >= 0; i--) { // the two come first, in the other order
        const Tensor *file = &s->checkpoint->chat_files[i];
        char *text = file->data ? template_in(file) : NULL;
        if (text && !strstr(text, "<|start_header_id|>"))
            die("%s: the chat template of %s is not LLaMA 3's: it has no <|start_header_id|>",
                s->path, file->name);
        if (text) return text;
    }
    return NULL;
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
    *bytes = stripped_length(text, *bytes);
    for (size_t n; (n = space_bytes(text, *bytes, false)); *bytes -= n) text += n;
    return text;
}

/* Queues what stands before the first message. */
static void push_chat_start(Session *s, const char *system) {
    int bos = special_token(s, "<|begin_of_text|>"), eot = special_token(s, "<|eot_id|>");
    int eom = tokenizer_id(s->tokenizer, "<|eom_id|>");
    char *template = chat_template(s), today[32] = "26 Jul 2024", head[128] = "";
    bool dated = template ? strstr(template, "Cutting Knowledge Date") != NULL : eom >= 0;
    time_t now = time(NULL);
    if (template && strstr(template, "strftime_now")) // 3.2's
        strftime(today, sizeof today, "%d %b %Y", localtime(&now));
    free(template);
    if (dated) snprintf(head, sizeof head, dates, today);
    s->stop[s->n_stop++] = eot;
    if (eom >= 0) s->stop[s->n_stop++] = eom;
    push(&s->queue, &bos, 1);
    if (!system && !dated) return;
    size_t bytes = system ? strlen(system) : 0;
    const char *text = trim(system ? system : "", &bytes);
    char *block = format_text("%s%.*s", head, (int)bytes, text);
    push_message(s, "system", block, strlen(block));
    push(&s->queue, &eot, 1);
    free(block);
}

/* Queues a message, and the header of its answer. */
static void push_turn(Session *s, const char *text, size_t bytes) {
    int eot = special_token(s, "<|eot_id|>");
    push_message(s, "user", text, bytes);
    push(&s->queue, &eot, 1);
    push_message(s, "assistant", "", 0);
}

/* Ctrl-C ends an answer; a second time, or when there is none, the program. */
static void on_interrupt(int number) {
    if (interrupted) signal(number, SIG_DFL), raise(number);
    interrupted = 1;
}

/* One message and its answer; a message that does not fit is not sent. Returns false when the
 * context is full. Counts in *unanswered what got no whole answer. */
static bool chat_turn(Session *s, const char *text, size_t bytes, int limit, int *unanswered) {
    int eot = special_token(s, "<|eot_id|>"), queued = s->queue.n;
    require_utf8("a message", text, bytes);
    text = trim(text, &bytes);
    if (bytes == 0) return true;
    int shown = bytes < 60 ? bytes : 60;
    push_turn(s, text, bytes);
    if (s->pos + s->queue.n > s->engine->context) {
        fprintf(stderr,
                "not sent: \"%.*s\" makes the chat %d tokens long, the context is only %d (-l)\n",
                shown, text, s->pos + s->queue.n, s->engine->context);
        s->queue.n = queued;
        ++*unanswered;
        return true;
    }
    interrupted = 0;
    bool room = generate_text(s, limit);
    interrupted = 1;
    push(&s->queue, &eot, 1);
    if (!room)
        fprintf(stderr, "not answered to its end: \"%.*s\"; nor what follows it\n", shown, text);
    *unanswered += !room;
    return room;
}

/* A message [*bytes] from stdin: a line, and the next one after a \ at its end; CR LF is a newline.
 * malloc'ed; NULL: no more. */
static char *read_message(bool terminal, size_t *bytes) {
    char *message = NULL, *line = NULL;
    size_t size = 0, total = 0;
    for (bool more = true; more;) {
        if (terminal) fputs(message ? "| " : "> ", stderr);
        ssize_t n = getline(&line, &size, stdin);
        if (n < 0) break;
        if (n > 1 && !strcmp(line + n - 2, "\r\n")) strcpy(line + --n - 1, "\n");
        message = realloc(message, total + n + 1);
        if (!message) die("out of memory");
        memcpy(message + total, line, n + 1);
        total += n;
        more = n > 1 && !strcmp(line + n - 2, "\\\n");
        if (more) strcpy(message + --total - 1, "\n");
    }
    free(line);
    *bytes = total;
    return message;
}

static void chat(Session *s, const Options *o) {
    start(s, o->length);
    push_chat_start(s, o->system);
    if (s->queue.n > s->engine->context)
        die("the system prompt makes the chat %d tokens long, the context is only %d (-l sets it)",
            s->queue.n, s->engine->context);
    print_model(s);
    s->sampler = new_sampler(o, &s->model->config);
    interrupted = 1; // no answer is being made
    struct sigaction before, action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, &before); // signal() would do so only once
    if (before.sa_handler == SIG_IGN) sigaction(SIGINT, &before, NULL);
    int unanswered = 0;
    bool terminal = isatty(STDIN_FILENO), room = true;
    size_t bytes;
    if (o->prompt) room = chat_turn(s, o->prompt, strlen(o->prompt), o->n_tokens, &unanswered);
    for (char *text; room && (text = read_message(terminal, &bytes)); free(text))
        room = chat_turn(s, text, bytes, o->n_tokens, &unanswered);
    if (terminal && room) fputc('\n', stderr);
    print_speed(&s->speed);
    if (unanswered)
        die("the context of %d tokens is too short: %d messages without a whole answer",
            s->engine->context, unanswered);
}

/* ---- 6: zero-shot -------------------------------------------------------------------------- */

/* Multiple choice without examples, as lm_eval counts it (https://github.com/EleutherAI/
 * lm-evaluation-harness): of an item's choices the model takes the one of largest
 *
 *     ll = sum over the choice's tokens of log p(token | context, tokens before it),
 *
 * for acc_norm ll / characters of the choice. An item is a line of JSON, of one of these kinds: */
typedef enum {
    CHOICE,   // {"context": S, "choices": [S, ..], "gold": N}: acc and acc_norm
    CONTEXT,  // {"context": [S, ..], "choices": [S], "gold": N}: which context fits, acc
    LAST,     // {"context": S, "choices": [S]}: LAMBADA's last word: was it the likeliest?
    WEIGHTED, // gold [0 or 1, ..], one for each choice: the probability of the right ones, MC2
} Kind;

typedef struct {
    char **text; // [n]
    int n;
} Texts;

typedef struct {
    const char *where; // "FILE, line 3", for messages
    Kind kind;
    Texts contexts, choices; // of one of them a single text may serve all of the other
    bool *right;             // [n] by gold
    int n;                   // contexts or choices, the larger
} Item;

/* The model with one sequence. */
typedef struct {
    Session *s;
    int max_length; // tokens that it can look at
    Tokens fed;     // in the KV cache
} Scorer;

/* A context and a choice. */
typedef struct {
    int *ids;      // [n]
    int n, length; // the last `length` are the choice's
} Request;

/* Strings of an array, or of one string. */
static Texts item_texts(const Json *json, const char *key, const char *where) {
    Texts t = {0};
    int node = json_get(json, 0, key);
    bool array = json_type(json, node) == '[';
    for (int i = array ? json_first(json, node) : node; i >= 0 || !array;
         i = json_next(json, node, i)) {
        size_t bytes;
        if (json_type(json, i) != '"')
            die("%s: \"%s\" is no string or array of strings", where, key);
        t.text = realloc(t.text, (t.n + 1) * sizeof *t.text);
        if (!t.text) die("out of memory");
        char *text = t.text[t.n++] = json_string(json, i, &bytes);
        if (strlen(text) < bytes) die("%s: a NUL in \"%s\"", where, key);
        if (!array) break;
    }
    return t;
}

static const char *text_of(const Texts *t, int k) {
    return t->text[t->n > 1 ? k : 0];
}

static void free_texts(Texts *t) {
    for (int i = 0; i < t->n; i++) free(t->text[i]);
    free(t->text);
}

/* Sets item->right by gold: the index of the right one, or 0 or 1 for each. */
static void item_gold(const Json *json, int gold, Item *item) {
    double value;
    int i = 0, n_right = 0;
    // 1. an array of 0 and 1
    for (int node = json_first(json, gold); node >= 0; node = json_next(json, gold, node), i++) {
        bool good = json_number(json, node, &value) && (value == 0 || value == 1);
        if (!good || i >= item->n)
            die("%s: \"gold\" is not %d times 0 or 1, one for each choice", item->where, item->n);
        item->right[i] = value == 1;
        n_right += value == 1;
    }
    if (json_type(json, gold) == '[') {
        if (i != item->n || n_right == 0)
            die("%s: \"gold\" has %d entries, %d of them 1, for %d choices", item->where, i,
                n_right, item->n);
        return;
    }
    // 2. an index
    if (!json_number(json, gold, &value) || !(value >= 0 && value < item->n) || value != (int)value)
        die("%s: \"gold\" is no integer in 0..%d", item->where, item->n - 1);
    item->right[(int)value] = true;
}

static Item parse_item(const char *line, size_t bytes, const char *where) {
    Json *json = json_parse(where, line, bytes);
    if (json_type(json, 0) != '{') die("%s: not a JSON object", where);
    // 1. the texts
    Texts contexts = item_texts(json, "context", where);
    Texts choices = item_texts(json, "choices", where);
    if (choices.n == 0 || contexts.n == 0) die("%s: there is nothing to choose from", where);
    if (contexts.n > 1 && choices.n > 1)
        die("%s: several contexts with several choices, expected one of either", where);
    for (int i = 0; i < choices.n; i++)
        if (!*choices.text[i]) die("%s: choice %d is empty", where, i);
    // 2. which of them are right, and so the kind
    int gold = json_get(json, 0, "gold"), n = contexts.n > choices.n ? contexts.n : choices.n;
    Item item = {where, CHOICE, contexts, choices, allocate(n, sizeof(bool)), n};
    if (contexts.n > 1) item.kind = CONTEXT;
    if (json_type(json, gold) == '[') item.kind = WEIGHTED;
    if (gold < 0) item.kind = LAST;
    if (gold >= 0) item_gold(json, gold, &item);
    else if (n > 1) die("%s: %d choices and no \"gold\"", where, n);
    json_free(json);
    return item;
}

static void free_item(Item *item) {
    free_texts(&item->contexts);
    free_texts(&item->choices);
    free(item->right);
    free((void *)item->where);
}

static int characters(const char *text) {
    int n = 0;
    for (; *text; text++) n += ((uint8_t)*text & 0xc0) != 0x80;
    return n;
}

/* A context and " choice" as tokens. */
static Request new_request(const Scorer *z, const Item *item, int k) {
    // White space at the context's end belongs to the choice: its tokens start with spaces.
    const char *context = text_of(&item->contexts, k);
    char *text = format_text("%s %s", context, text_of(&item->choices, k));
    const Config *c = &z->s->model->config;
    Tokens whole, head;
    whole.ids = encode_text(z->s->tokenizer, c, item->where, text, strlen(text), &whole.n);
    head.ids = encode_text(z->s->tokenizer, c, item->where, context,
                           stripped_length(context, strlen(context)), &head.n);
    free(text);
    free(head.ids);
    Request r = {whole.ids, whole.n, whole.n - head.n};
    if (head.n == 0) die("%s: no context, and the model has no BOS", item->where);
    if (r.length < 1 || r.length > z->max_length)
        die("%s: a choice of %d tokens, expected 1 to %d", item->where, r.length, z->max_length);
    int excess = r.n - (z->max_length + 1); // the last token is only a target
    if (excess > 0) memmove(r.ids, r.ids + excess, (r.n -= excess) * sizeof *r.ids);
    return r;
}

/* How many of the first n tokens of a and b are the same. */
static int same_tokens(const int *a, const int *b, int n) {
    int same = 0;
    while (same < n && a[same] == b[same]) same++;
    return same;
}

/* Sum of log p over the choice's tokens. *greedy: each of them is the likeliest. The KV cache keeps
 * the context for the item's next choice, which goes back to its end. */
static double log_likelihood(Scorer *z, const Request *r, bool *greedy) {
    Engine *e = z->s->engine;
    int last = r->n - r->length - 1; // of the context: its logits score the choice's first token
    if (r->n - 1 > e->context) {     // none yet, or too short
        e->start(e, 1, 2 * r->n < z->max_length ? 2 * r->n : z->max_length);
        z->fed.n = 0;
    }
    // 1. what the KV cache lacks of the context
    int known = same_tokens(r->ids, z->fed.ids, last < z->fed.n ? last : z->fed.n);
    if (known < last) e->feed(e, 0, r->ids + known, last - known, known);
    // 2. the choice
    Score *scores = allocate(r->length, sizeof *scores);
    e->score(e, 0, r->ids + last, r->ids + last + 1, r->length, last, scores);
    z->fed.n = 0;
    push(&z->fed, r->ids, r->n - 1);
    // 3. its sum
    double ll = 0;
    *greedy = true;
    for (int i = 0; i < r->length; i++) {
        ll -= scores[i].nll;
        *greedy = *greedy && scores[i].likeliest;
    }
    if (!isfinite(ll)) die("%s: a logit is NaN or infinite: the weights are damaged", z->s->path);
    free(scores);
    return ll;
}

/* The sum of some numbers, and of their squares. */
typedef struct {
    double sum, squares;
} Total;

static void add(Total *s, double x) {
    s->sum += x;
    s->squares += x * x;
}

/* The standard error of the mean of n numbers. */
static double standard_error(Total s, int n) {
    double mean = s.sum / n;
    return sqrt(fmax(0, s.squares / n - mean * mean) / (n - 1));
}

static void print_result(const char *name, double value, double error, int n) {
    printf("%s %.4f (%d items)", name, value, n);
    if (n > 1) printf(", standard error %.4f", error);
    putchar('\n');
}

static void print_mean(const char *name, Total s, int n) {
    print_result(name, s.sum / n, standard_error(s, n), n);
}

/* Which of x [n] is largest, the first of equals, is right. */
static bool picks_right(const Item *item, const double *x) {
    int best = 0;
    for (int i = 1; i < item->n; i++)
        if (x[i] > x[best]) best = i;
    return item->right[best];
}

/* The share of the right ones in sum e^x. */
static double right_mass(const Item *item, const double *x) {
    double max = x[0], all = 0, right = 0;
    for (int k = 1; k < item->n; k++) max = fmax(max, x[k]);
    for (int k = 0; k < item->n; k++) {
        all += exp(x[k] - max);
        right += item->right[k] ? exp(x[k] - max) : 0;
    }
    return right / all;
}

/* The items of a file [*n], each a line; all of a kind. */
static Item *read_items(const char *path, int *n) {
    size_t bytes;
    char *text = read_text(path, &bytes), *end = text + bytes;
    Item *items = NULL;
    int number = 1;
    *n = 0;
    for (char *line = text, *next; line < end; line = next + 1, number++) {
        next = memchr(line, '\n', end - line);
        if (!next) next = end;
        if (stripped_length(line, next - line) == 0) continue;
        items = realloc(items, (*n + 1) * sizeof *items);
        if (!items) die("out of memory");
        Item *item = &items[(*n)++];
        *item = parse_item(line, next - line, format_text("%s, line %d", path, number));
        if (item->kind != items[0].kind)
            die("%s: \"context\" and \"gold\" are of another kind than in the first item",
                item->where);
    }
    free(text);
    if (*n == 0) die("%s: it holds no items", path);
    return items;
}

static void zero_shot(Session *s, const Options *o) {
    int n;
    // 1. the items, and where -o writes
    Item *items = read_items(o->file, &n);
    if (o->items && same_file(o->items, o->file)) die("-o %s: it is the file of -z", o->items);
    if (o->items && checkpoint_has_file(s->checkpoint, o->items))
        die("-o %s: it is a file of MODEL", o->items);
    Output *file = o->items ? output_open(o->items, false) : NULL;
    char *lines;
    size_t bytes;
    FILE *out = open_memstream(&lines, &bytes);
    if (!out) die("out of memory");
    print_model(s);
    Scorer z = {.s = s, .max_length = o->length ? o->length : s->model->config.max_context};
    Total acc = {0}, norm = {0}, mass = {0}, first = {0};
    double start = seconds();
    // 2. the log-likelihoods of each item, and what follows from them
    for (int i = 0; i < n; i++) {
        Item *item = &items[i];
        double *ll = allocate(item->n, sizeof *ll), *ll_norm = allocate(item->n, sizeof *ll);
        bool greedy = false;
        for (int k = 0; k < item->n; k++) {
            Request r = new_request(&z, item, k);
            ll[k] = log_likelihood(&z, &r, &greedy);
            ll_norm[k] = ll[k] / characters(text_of(&item->choices, k));
            fprintf(out, k ? ", %.5f" : "{\"loglikelihoods\": [%.5f", ll[k]);
            free(r.ids);
        }
        bool last = item->kind == LAST;
        fprintf(out, last ? "], \"greedy\": %s}\n" : "]}\n", greedy ? "true" : "false");
        add(&acc, last ? greedy : picks_right(item, ll));
        add(&norm, picks_right(item, ll_norm));
        add(&mass, right_mass(item, ll));
        add(&first, ll[0]);
        show_progress("items", i + 1, n, (seconds() - start) * (n - i - 1) / (i + 1));
        free(ll);
        free(ll_norm);
    }
    // 3. the results
    if (ferror(out) || fclose(out) || !lines) die("out of memory");
    if (file) output_write(file, 0, lines, bytes, 0), output_close(file);
    free(lines);
    Kind kind = items[0].kind;
    if (kind == WEIGHTED) print_mean("mc2", mass, n);
    else print_mean("acc", acc, n);
    if (kind == CHOICE) print_mean("acc_norm", norm, n);
    double perplexity = exp(-first.sum / n);
    if (kind == LAST)
        print_result("perplexity", perplexity, perplexity * standard_error(first, n), n);
    for (int i = 0; i < n; i++) free_item(&items[i]);
    free(items);
    free(z.fed.ids);
}

/* ---- 7: token ids -------------------------------------------------------------------------- */

static void print_token_ids(const Options *o) {
    Checkpoint *c = checkpoint_open_texts(o->model);
    Tokenizer *tokenizer = checkpoint_tokenizer(c);
    checkpoint_close(c);
    size_t bytes;
    char *text = read_text(o->file, &bytes);
    Tokens t = {0};
    push_text(&t, tokenizer, text, bytes, true);
    print_notes();
    for (int i = 0; i < t.n; i++) printf(i ? " %d" : "%d", t.ids[i]);
    putchar('\n');
    free(t.ids);
    free(text);
    tokenizer_free(tokenizer);
}

/* ---- 8: benchmark -------------------------------------------------------------------------- */

/* One row of the benchmark. Rates are tokens per second of all sequences together. */
typedef struct {
    int batch, prompt, end;    // sequences; tokens of each prompt; position of the last measurement
    int decoded;               // tokens of each sequence decoded after the prompt
    double GB, prefill;        // memory in GB
    double empty, after, last; // decoding from an empty context, after the prompt, from `end` on
    double read;               // bytes per second that decoding after the prompt reads
} Rates;

/* Waits for the GPU, and ends the program if a sequence has no next token. */
static void require_chosen(Session *s) {
    for (int b = 0; b < s->engine->n_sequences; b++)
        if (s->engine->chosen(s->engine)[b] < 0)
            die("%s: a logit is NaN or infinite: the weights are damaged", s->path);
}

/* Decodes `steps` tokens of each sequence, or as many as 10 s allow, after one to warm up. Returns
 * how many per second and sequence. */
static double decode_rate(Session *s, int steps, int *done) {
    Engine *e = s->engine;
    require_chosen(s);
    e->step(e, NULL, NULL);
    require_chosen(s);
    double start = seconds(), time = 0;
    for (*done = 0; *done < steps && time < 10; ++*done) {
        e->step(e, NULL, NULL);
        if (!e->on_gpu) time = seconds() - start;
    }
    require_chosen(s);
    return *done / (seconds() - start);
}

/* Feeds made-up tokens at positions first .. end - 1 of sequence b. */
static void feed_prompt(Session *s, int b, int first, int end) {
    int *tokens = allocate(end - first, sizeof *tokens);
    for (int t = first; t < end; t++)
        tokens[t - first] = (int)((t * 7919ll + b * 104729ll) % s->model->config.vocab_size);
    s->engine->feed(s->engine, b, tokens, end - first, first);
    free(tokens);
}

/* Fills the contexts of all sequences from position `first` to `end`, and shows how far it is.
 * Returns tokens per second. */
static double fill_contexts(Session *s, int batch, int first, int end) {
    enum { PIECE = 1024 };
    double start = seconds();
    int total = batch * (end - first), done = 0;
    for (int b = 0; b < batch; b++)
        for (int t = first, next; t < end; t = next) {
            next = end - t < PIECE ? end : t + PIECE;
            feed_prompt(s, b, t, next);
            done += next - t;
            double left = (seconds() - start) / done * (total - done);
            show_progress("tokens of the contexts", done, total, left);
        }
    require_chosen(s);
    return total / (seconds() - start);
}

/* Decodes from an empty context, runs prompts of up to 1024 tokens, decodes after them, and, if the
 * context is longer than that, at its end. */
static Rates measure(Session *s, int batch, int context) {
    Engine *e = s->engine;
    int steps = context < 1154 ? context / 9 : 128, limit = context - steps - 2, decoded;
    Rates r = {.batch = batch, .prompt = limit < 1024 ? limit : 1024, .end = limit};
    e->start(e, batch, context);
    r.GB = (e->weight_bytes + e->state_bytes) / 1e9;
    // 1. from an empty context
    for (int b = 0; b < batch; b++) feed_prompt(s, b, 0, 1);
    r.empty = batch * decode_rate(s, steps, &decoded);
    // 2. prompts; the first on a GPU prepares it
    if (e->on_gpu) feed_prompt(s, 0, 0, r.prompt);
    require_chosen(s);
    r.prefill = fill_contexts(s, batch, 0, r.prompt);
    // 3. after them: a step reads all weights and the KV cache so far
    r.after = r.last = batch * decode_rate(s, steps, &r.decoded);
    double positions = r.prompt + 1 + (r.decoded + 1) / 2.0;
    r.read = (e->step_bytes + positions * e->position_bytes * batch) * r.after / batch;
    // 4. at the end of the context
    if (r.end > r.prompt) {
        fill_contexts(s, batch, r.prompt, r.end);
        r.last = batch * decode_rate(s, steps, &decoded);
    }
    return r;
}

static void benchmark(Session *s, const Options *o) {
    static const int batches[] = {1, 4, 16, 64};
    enum { N = sizeof batches / sizeof *batches };
    Engine *e = s->engine;
    int most = s->model->config.max_context, context = o->length ? o->length : most;
    if (!o->length && context > 1154) context = 1154; // a prompt of 1024, 128 steps
    if (context < 9) die_usage("-l %d: a benchmark needs a context of 9 or more", context);
    print_model(s);
    char device[400];
    if (e->on_gpu) snprintf(device, sizeof device, "%s", s->where);
    else snprintf(device, sizeof device, "%d threads", omp_get_max_threads());
    double memory = e->bandwidth();
    // 1. a table for people
    printf("%s, %s, on %s; GB/s is of weights and KV cache, memory's is %.1f\n\n", o->model,
           weights_kind(s->model), device, memory / 1e9);
    printf("batch  memory GB  prefill tokens/s  decode tokens/s, empty  after prefill    GB/s  of "
           "memory's");
    if (context > 1154) printf("  decode from %d on", context - 130);
    putchar('\n');
    Rates rates[N];
    int n = 0;
    for (; n < N; n++) {
        if (!e->fits(e, batches[n], context)) {
            if (e->on_gpu) printf("%5d  does not fit: %.2f GB\n", batches[n], e->state_bytes / 1e9);
            break;
        }
        Rates r = rates[n] = measure(s, batches[n], context);
        printf("%5d  %9.2f  %16.1f  %22.1f  %13.1f  %6.1f  %8.0f %%", r.batch, r.GB, r.prefill,
               r.empty, r.after, r.read / 1e9, 100 * r.read / memory);
        if (context > 1154) printf("  %*.1f", 15, r.last);
        putchar('\n');
        fflush(stdout);
    }
    // 2. the same for programs
    printf("\nmodel,weights,device,batch,memory_GB,prefill_tokens,prefill_tokens_per_s,"
           "decode_tokens,decode_tokens_per_s,decode_GB_per_s,memory_GB_per_s,"
           "empty_decode_tokens_per_s,last_position,last_decode_tokens_per_s\n");
    for (int i = 0; i < n; i++) {
        Rates r = rates[i];
        printf("%s,%s,%s,%d,%.3f,%d,%.1f,%d,%.2f,%.2f,%.2f,%.2f,%d,%.2f\n", o->model,
               weights_kind(s->model), device, r.batch, r.GB, r.prompt, r.prefill, r.decoded,
               r.after, r.read / 1e9, memory / 1e9, r.empty, r.end, r.last);
    }
}

int main(int argc, char **argv) {
    open_standard_streams();
    Options o = parse_options(argc, argv);
    if (o.task == TOKEN_IDS) {
        print_token_ids(&o);
    } else {
        Session s = open_session(&o);
        if (o.task == GENERATE) generate(&s, &o);
        if (o.task == CHAT) chat(&s, &o);
        if (o.task == PERPLEXITY) {
            int n, *tokens = read_tokens(s.tokenizer, &s.model->config, o.file, &o.length, &n);
            describe_model(s.checkpoint, s.model, s.where);
            print_perplexity(s.checkpoint, s.engine, "", tokens, n, o.length);
            free(tokens);
        }
        if (o.task == ZERO_SHOT) zero_shot(&s, &o);
        if (o.task == BENCHMARK) benchmark(&s, &o);
        close_session(&s);
    }
    free(o.model);
    free(o.prompt);
    free(o.system);
    flush_output();
    return 0;
}
