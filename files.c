/* Plumbing: what a first reader of QQQ may skip. From top to bottom:
 *
 *   1  errors, options, progress
 *   2  JSON
 *   3  model files: safetensors, Hugging Face directories, model.bin
 *   4  the model in a file: config.json, weights; texts as tokens
 *   5  checkpoints of the QQQ repository
 *   6  the writer
 *
 * The contracts stand in files.h. */
#define _GNU_SOURCE
#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS // without them jsmn needs quadratic time for long arrays
#include <jsmn.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "files.h"

/* ---- 1 errors, options, progress ---- */

// What is being written, to be removed if the program ends early: a file; or a directory and,
// behind it, the files in it.
static char *temporaries[1024];
static volatile int n_temporaries;

/* Removes them, the newest first. Signal handlers call it: nothing here may allocate or lock. */
static void remove_temporaries(void) {
    while (n_temporaries) {
        const char *path = temporaries[--n_temporaries];
        if (unlink(path)) rmdir(path);
    }
}

void end_by(int signal_number) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal_number);
    signal(signal_number, SIG_DFL);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    raise(signal_number);
    _exit(128 + signal_number);
}

/* A name from a file may hold anything; it stays on its line. */
static void make_printable(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f) *text = '?';
}

static void end_with(int status, const char *format, va_list args) {
    static char text[8192]; // there may be no memory to allocate
    vsnprintf(text, sizeof text, format, args);
    make_printable(text);
    fprintf(stderr, "error: %s\n", text);
    remove_temporaries();
    fflush(NULL);
    _exit(status); // what is still allocated goes with the process
}

void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with(1, format, args);
    va_end(args);
    __builtin_unreachable();
}

void die_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_with(2, format, args);
    va_end(args);
    __builtin_unreachable();
}

void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) die("out of memory: %zu x %zu bytes were asked for", count, size);
    return p;
}

char *format_text(const char *format, ...) {
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

void open_standard_streams(void) {
    int fd;
    while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd <= STDERR_FILENO) {
    }
    if (fd < 0) die("/dev/null: %s", strerror(errno));
    close(fd);
}

/* GOMP reads these variables before main(), so the program starts once more; where it cannot, it is
 * only slower. */
void spin_briefly(char **argv) {
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0 || getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    program[n] = 0;
    if (setenv("GOMP_SPINCOUNT", "1000", 1) == 0) execv(program, argv);
}

void flush_output(void) {
    if (fflush(stdout) || ferror(stdout)) die("stdout: %s", strerror(errno));
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

char *beside_program(const char *name) {
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0) die("/proc/self/exe: %s", strerror(errno));
    program[n] = 0;
    *strrchr(program, '/') = 0;
    return format_text("%s/%s", program, name);
}

void print_and_exit(const char *text) {
    fputs(text, stdout);
    flush_output();
    exit(0);
}

double parse_number(char flag, const char *value, double min, double max) {
    char *end;
    double x = strtod(value, &end);
    if (end == value || *end || !(x >= min && x <= max))
        die_usage("-%c %s: expected a number from %g to %g", flag, value, min, max);
    return x;
}

long long parse_integer(char flag, const char *value, long long min, long long max) {
    char *end;
    errno = 0;
    long long x = strtoll(value, &end, 10);
    if (end == value || *end || errno || x < min || x > max)
        die_usage("-%c %s: expected a whole number from %lld to %lld", flag, value, min, max);
    return x;
}

bool parse_choice(char flag, const char *value, const char *first, const char *second) {
    bool is_second = !strcmp(value, second);
    if (!is_second && strcmp(value, first))
        die_usage("-%c %s: expected %s or %s", flag, value, first, second);
    return is_second;
}

static pthread_mutex_t progress_lock = PTHREAD_MUTEX_INITIALIZER;
static char progress_line[200]; // the newest in a pipe; empty: nothing is at work

static void *repeat_progress(void *unused) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); // a signal stops the thread that writes the file
    for (;;) {
        sleep(5);
        pthread_mutex_lock(&progress_lock);
        fputs(progress_line, stderr);
        pthread_mutex_unlock(&progress_lock);
    }
    return unused;
}

void show_progress(const char *what, int done, int total, double seconds_left) {
    static pthread_t repeating;
    char left[64] = "";
    if (seconds_left >= 0) snprintf(left, sizeof left, ", %.0f s left", seconds_left);
    if (isatty(STDERR_FILENO)) {
        int width = 40 * done / total;
        fprintf(stderr, "\r[%.*s%*s] %d of %d %s%s\033[K%s", width,
                "########################################", 40 - width, "", done, total, what, left,
                done == total ? "\n" : "");
        return;
    }
    pthread_mutex_lock(&progress_lock);
    bool first = !*progress_line;
    snprintf(progress_line, sizeof progress_line, "%d of %d %s%s\n", done, total, what, left);
    if (first || done == total) fputs(progress_line, stderr);
    if (done == total) *progress_line = 0;
    if (!repeating)
        pthread_create(&repeating, NULL, repeat_progress, NULL); // or it is said less often
    pthread_mutex_unlock(&progress_lock);
}

void show_windows(int done, int total) {
    show_progress("windows", done, total, -1);
}

/* ---- 2 JSON ---- */

struct Json {
    const char *name, *text;
    jsmntok_t *tokens; // [n] in the order of the text; a key is the parent of its value
    int n;
};

enum { MAX_JSON = 100000000, MAX_DEPTH = 127 }; // the safetensors library's limits

/* jsmn is lenient; what it splits is held to RFC 8259 first, as strictly as the safetensors library
 * does: strings are UTF-8 without half surrogate pairs, nesting is limited. */
typedef struct {
    const char *at, *end; // `at` moves on to what is wrong
} Cursor;

static char next_char(Cursor *c) {
    while (c->at < c->end && *c->at && strchr(" \t\n\r", *c->at)) c->at++;
    return c->at < c->end ? *c->at : 0;
}

/* The bytes of the UTF-8 character at s, 0 if it is none. */
static int utf8_bytes(const char *s, const char *end) {
    const unsigned char *u = (const unsigned char *)s;
    int n = *u < 0x80 ? 1 : *u < 0xc2 ? 0 : *u < 0xe0 ? 2 : *u < 0xf0 ? 3 : *u < 0xf5 ? 4 : 0;
    if (n > end - s) return 0;
    for (int i = 1; i < n; i++)
        if ((u[i] & 0xc0) != 0x80) return 0;
    bool overlong = (*u == 0xe0 && u[1] < 0xa0) || (*u == 0xf0 && u[1] < 0x90);
    bool surrogate = *u == 0xed && u[1] > 0x9f, too_large = *u == 0xf4 && u[1] > 0x8f;
    return overlong || surrogate || too_large ? 0 : n;
}

/* The code unit of the escape \uXXXX at s, -1 if there is none. */
static int unicode_escape(const char *s, const char *end) {
    char digits[5] = {0};
    if (end - s < 6 || s[0] != '\\' || s[1] != 'u') return -1;
    memcpy(digits, s + 2, 4);
    bool hexadecimal = strspn(digits, "0123456789abcdefABCDEF") == 4;
    return hexadecimal ? (int)strtol(digits, NULL, 16) : -1;
}

static bool valid_string(Cursor *c) {
    if (next_char(c) != '"') return false;
    for (c->at++; c->at < c->end && *c->at != '"';) {
        const char *s = c->at;
        int bytes = utf8_bytes(s, c->end), unit = unicode_escape(s, c->end);
        bool high = unit >= 0xd800 && unit < 0xdc00, low = unit >= 0xdc00 && unit < 0xe000;
        int second = high ? unicode_escape(s + 6, c->end) : -1;
        if (!bytes || (unsigned char)*s < ' ' || low) return false;
        if (high && (second < 0xdc00 || second >= 0xe000)) return false;
        if (*s == '\\' && unit < 0 && (c->end - s < 2 || !strchr("\"\\/bfnrt", s[1]) || !s[1]))
            return false;
        c->at += *s != '\\' ? bytes : unit < 0 ? 2 : high ? 12 : 6;
    }
    return c->at < c->end && c->at++;
}

static bool valid_digits(Cursor *c) {
    const char *first = c->at;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9') c->at++;
    return c->at > first;
}

static bool valid_number(Cursor *c) {
    c->at += *c->at == '-';
    const char *first = c->at;
    if (!valid_digits(c) || (*first == '0' && c->at - first > 1)) return false;
    if (c->at < c->end && *c->at == '.' && (c->at++, !valid_digits(c))) return false;
    if (c->at == c->end || (*c->at | 32) != 'e') return true;
    c->at++;
    c->at += c->at < c->end && (*c->at == '+' || *c->at == '-');
    return valid_digits(c);
}

static bool valid_value(Cursor *c, int depth) {
    static const char *const literals[] = {"true", "false", "null"};
    char open = next_char(c), close = open == '{' ? '}' : ']';
    if (open == '"') return valid_string(c);
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(literals[i]);
        if ((size_t)(c->end - c->at) >= n && !memcmp(c->at, literals[i], n)) return c->at += n;
    }
    if (open != '{' && open != '[') return open && valid_number(c);
    if (depth == MAX_DEPTH) return false;
    c->at++;
    if (next_char(c) == close) return c->at++;
    for (;; c->at++) {
        if (open == '{' && (!valid_string(c) || next_char(c) != ':' || !c->at++)) return false;
        if (!valid_value(c, depth + 1)) return false;
        if (next_char(c) == close) return c->at++;
        if (next_char(c) != ',') return false;
    }
}

/* What a file that is no JSON, or no safetensors, is instead; NULL: not known. */
static const char *known_format(const char *data, size_t bytes) {
    static const struct {
        const char *start, *name;
    } formats[] = {{"version https://git-lfs", "a Git LFS pointer: the real file was not fetched"},
                   {"GGUF", "a GGUF file; a Hugging Face model is needed"},
                   {"PK\3\4", "a PyTorch file (.pth, .bin); a safetensors file is needed"},
                   {"\x80\2", "a Python pickle (.pth, .bin); a safetensors file is needed"},
                   {"\x80\4", "a Python pickle (.pth, .bin); a safetensors file is needed"}};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        size_t n = strlen(formats[i].start);
        if (bytes >= n && !memcmp(data, formats[i].start, n)) return formats[i].name;
    }
    return NULL;
}

Json *json_parse(const char *name, const char *text, size_t bytes) {
    if (bytes > MAX_JSON) die("%s: %zu bytes of JSON, expected at most %d", name, bytes, MAX_JSON);
    Cursor c = {text, text + bytes};
    if (!valid_value(&c, 0) || next_char(&c) || c.at < c.end) {
        const char *format = known_format(text, bytes);
        if (format) die("%s: it is %s", name, format);
        die("%s: not valid JSON, or nested more than %d deep (near byte %td)", name, MAX_DEPTH,
            c.at - text);
    }
    jsmn_parser parser;
    jsmn_init(&parser);
    int n = jsmn_parse(&parser, text, bytes, NULL, 0);
    if (n <= 0) die("%s: not valid JSON (near byte %u)", name, parser.pos);
    Json *j = allocate(1, sizeof *j);
    *j = (Json){name, text, allocate(n, sizeof *j->tokens), n};
    jsmn_init(&parser);
    jsmn_parse(&parser, text, bytes, j->tokens, n);
    return j;
}

void json_free(Json *j) {
    if (j) free(j->tokens);
    free(j);
}

char json_type(const Json *j, int node) {
    if (node < 0) return 0;
    switch (j->tokens[node].type) {
    case JSMN_OBJECT:
        return '{';
    case JSMN_ARRAY:
        return '[';
    case JSMN_STRING:
        return '"';
    default:
        return 'p';
    }
}

int json_first(const Json *j, int node) {
    char type = json_type(j, node);
    return (type == '{' || type == '[') && j->tokens[node].size > 0 ? node + 1 : -1;
}

int json_next(const Json *j, int node, int child) {
    int last = json_type(j, node) == '{' ? child + 1 : child; // a key: its value
    int i = last + 1;
    while (i < j->n && j->tokens[i].start < j->tokens[last].end) i++; // over what it holds
    return i < j->n && j->tokens[i].start < j->tokens[node].end ? i : -1;
}

int json_get(const Json *j, int node, const char *key) {
    int found = -1; // of a key that is there twice the last counts
    if (json_type(j, node) != '{') return found;
    for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i))
        if (json_is(j, i, key)) found = i + 1;
    return found;
}

bool json_absent(const Json *j, int node) {
    return node < 0 || (json_type(j, node) == 'p' && json_is(j, node, "null"));
}

bool json_is(const Json *j, int node, const char *s) {
    char type = json_type(j, node);
    if (type != '"' && type != 'p') return false;
    const jsmntok_t *t = &j->tokens[node];
    size_t bytes = t->end - t->start;
    if (!memchr(j->text + t->start, '\\', bytes))
        return bytes == strlen(s) && !memcmp(j->text + t->start, s, bytes);
    char *resolved = json_string(j, node, &bytes);
    bool same = bytes == strlen(s) && !memcmp(resolved, s, bytes);
    free(resolved);
    return same;
}

static int put_utf8(uint32_t c, char *out) {
    if (c < 0x80) return out[0] = c, 1;
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = 0x80 | (c & 0x3f);
    out[0] = (0xf00 >> n & 0xff) | c;
    return n;
}

char *json_string(const Json *j, int node, size_t *bytes) {
    if (json_type(j, node) != '"') die("%s: a string was expected", j->name);
    const char *s = j->text + j->tokens[node].start, *end = j->text + j->tokens[node].end;
    char *out = malloc(end - s + 1), *o = out; // resolving an escape never makes it longer
    if (!out) die("out of memory");
    while (s < end) {
        if (*s != '\\') {
            *o++ = *s++;
        } else if (s[1] != 'u') {
            const char *from = "bfnrt", *to = "\b\f\n\r\t", *found = strchr(from, s[1]);
            *o++ = found ? to[found - from] : s[1];
            s += 2;
        } else {
            uint32_t c = unicode_escape(s, end);
            s += 6;
            if (c >= 0xd800 && c < 0xdc00) { // a pair, as json_parse() has seen
                c = 0x10000 + ((c - 0xd800) << 10) + (unicode_escape(s, end) - 0xdc00);
                s += 6;
            }
            o += put_utf8(c, o);
        }
    }
    *o = 0;
    *bytes = o - out;
    return out;
}

bool json_number(const Json *j, int node, double *value) {
    if (json_type(j, node) != 'p') return false;
    const jsmntok_t *t = &j->tokens[node];
    char digits[64] = {0}, *end;
    size_t bytes = t->end - t->start;
    if (bytes >= sizeof digits) return false;
    memcpy(digits, j->text + t->start, bytes);
    if (strspn(digits, "+-.0123456789eE") != bytes) return false;
    *value = strtod(digits, &end);
    return !*end && isfinite(*value);
}

/* ---- 3 model files
 *
 * A safetensors file is: 8 bytes, little-endian, the header's length; a JSON header
 * {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}; the data,
 * to which the offsets refer. https://huggingface.co/docs/safetensors ---- */

static const struct {
    const char *name;
    size_t bits;
} dtypes[] = {[F32] = {"F32", 32},   [F16] = {"F16", 16},
              [BF16] = {"BF16", 16}, [U8] = {"U8", 8},
              [I8] = {"I8", 8},      [I32] = {"I32", 32},
              [I64] = {"I64", 64},   {"I16", 16},
              {"U16", 16},           {"U32", 32},
              {"U64", 64},           {"F64", 64},
              {"BOOL", 8},           {"C64", 64},
              {"F8_E4M3", 8},        {"F8_E5M2", 8},
              {"F8_E8M0", 8},        {"F8_E4M3FNUZ", 8},
              {"F8_E5M2FNUZ", 8},    {"F6_E2M3", 6},
              {"F6_E3M2", 6},        {"F4", 4}};

enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

size_t dtype_size(DType dtype) {
    return dtypes[dtype].bits / 8;
}

const char *dtype_name(DType dtype) {
    return dtypes[dtype].name;
}

typedef struct Mapping {
    char *path;
    const char *data; // [bytes]
    size_t bytes;
} Mapping;

static bool is_directory(const char *path) {
    struct stat st;
    if (stat(path, &st)) die("%s: %s", path, strerror(errno));
    return S_ISDIR(st.st_mode);
}

/* Maps a regular file of at least one byte read-only; takes over `path`. An absent file is an
 * error, or {0} if it is optional. O_NONBLOCK: a FIFO is refused, not waited for. */
static Mapping map_file(char *path, bool optional) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && optional && errno == ENOENT) return free(path), (Mapping){0};
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: not a regular file", path);
    if (st.st_size == 0) die("%s: the file is empty", path);
    void *data = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    return (Mapping){path, data, st.st_size};
}

/* A small optional file of MODEL, malloc'ed with a NUL behind; NULL if it is absent. */
static char *read_file(const char *directory, const char *name) {
    Mapping m = map_file(format_text("%s/%s", directory, name), true);
    if (!m.data) return NULL;
    char *text = memcpy(allocate(m.bytes + 1, 1), m.data, m.bytes);
    munmap((void *)m.data, m.bytes);
    free(m.path);
    return text;
}

void require_utf8(const char *name, const char *text, size_t bytes) {
    for (size_t i = 0, length; i < bytes; i += length) {
        length = text[i] ? utf8_bytes(text + i, text + bytes) : 0;
        if (!length)
            die("%s: not a text: its byte %zu, 0x%02x, is no UTF-8", name, i, (uint8_t)text[i]);
    }
}

char *read_text(const char *path, size_t *bytes) {
    FILE *in = strcmp(path, "-") ? fopen(path, "re") : stdin;
    if (in == stdin) path = "stdin";
    char *text = NULL;
    size_t size = 0, n = 1;
    *bytes = 0;
    for (; in && n; *bytes += n) {
        if (*bytes == size) text = realloc(text, (size = 2 * size + (1 << 16)) + 1);
        if (!text || *bytes > INT_MAX) die("%s: more text than fits in memory", path);
        n = fread(text + *bytes, 1, size - *bytes, in);
    }
    if (!in || ferror(in)) die("%s: %s", path, strerror(errno));
    if (in != stdin) fclose(in);
    if (!*bytes) die("%s: it is empty", path);
    text[*bytes] = 0;
    require_utf8(path, text, *bytes);
    return text;
}

static char notes[1 << 14];

void note(const char *format, ...) {
    size_t length = strlen(notes), room = sizeof notes - length;
    va_list args;
    va_start(args, format);
    int bytes = vsnprintf(notes + length, room, format, args);
    va_end(args);
    make_printable(notes + length);
    if (bytes < 0 || (size_t)bytes + 2 > room) notes[length] = 0;
    else strcat(notes, "\n");
}

void print_notes(void) {
    for (char *line = notes, *end; (end = strchr(line, '\n')); line = end + 1)
        fprintf(stderr, "note: %.*s\n", (int)(end - line), line);
    *notes = 0;
}

static Checkpoint *opened; // the newest; the others follow by `next`

/* Reading a mapping where its file has no bytes any more, or where the disk fails, raises SIGBUS.
 * Nothing here may allocate or lock. */
static void on_bus_error(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    for (const Checkpoint *c = opened; c; c = c->next)
        for (int i = 0; i < c->n_maps; i++) {
            const Mapping *m = &c->maps[i];
            if ((uintptr_t)info->si_addr - (uintptr_t)m->data >= m->bytes) continue;
            static char line[4096 + 128] = "error: ";
            strncat(line, m->path, 4096);
            make_printable(line);
            strcat(line, ": it was cut while it was in use, or the disk cannot read it\n");
            remove_temporaries();
            if (write(STDERR_FILENO, line, strlen(line)) < 0) _exit(1);
            _exit(1);
        }
    remove_temporaries(); // not ours, or sent by kill
    end_by(signal_number);
}

/* A whole number in [0, max] or -1. */
static int64_t json_integer(const Json *j, int node, double max) {
    double x;
    if (!json_number(j, node, &x) || x < 0 || x > max) return -1;
    const jsmntok_t *t = &j->tokens[node];
    for (int i = t->start; i < t->end; i++)
        if (j->text[i] < '0' || j->text[i] > '9') return -1; // 1.0, 1e3, -0
    return (int64_t)x;
}

/* The node as it stands in the file, at most 40 bytes of it, for messages. */
static const char *shown(const Json *j, int node) {
    static char text[41];
    if (node < 0) return "missing";
    int bytes = j->tokens[node].end - j->tokens[node].start;
    snprintf(text, sizeof text, "%.*s", bytes < 40 ? bytes : 40, j->text + j->tokens[node].start);
    return text;
}

/* One entry of a safetensors header; data [bytes] is all that stands behind the header. */
static Tensor parse_tensor(const Json *j, int key, const char *path, const char *data,
                           size_t bytes) {
    Tensor t = {.path = path};
    size_t length;
    t.name = json_string(j, key, &length);
    if (strlen(t.name) != length) die("%s: a tensor's name holds a NUL", path);

    int dtype = json_get(j, key + 1, "dtype"), d = 0;
    while (d < N_DTYPES && !json_is(j, dtype, dtypes[d].name)) d++;
    if (d == N_DTYPES) die("%s: tensor %s has an unknown dtype: %s", path, t.name, shown(j, dtype));
    t.dtype = d;

    int shape = json_get(j, key + 1, "shape");
    size_t size = dtypes[d].bits; // in bits, until all extents are known
    if (json_type(j, shape) != '[') die("%s: tensor %s has no shape", path, t.name);
    for (int i = json_first(j, shape); i >= 0; i = json_next(j, shape, i)) {
        int64_t extent = json_integer(j, i, 0x1p53);
        if (extent < 0 || t.n_dims == MAX_DIMS || __builtin_mul_overflow(size, extent, &size))
            die("%s: tensor %s has a shape that cannot be", path, t.name);
        t.shape[t.n_dims++] = extent;
    }
    if (size % 8) die("%s: tensor %s has a shape that fills no whole bytes", path, t.name);
    size /= 8;

    int offsets = json_get(j, key + 1, "data_offsets"), first = json_first(j, offsets);
    int second = first < 0 ? -1 : json_next(j, offsets, first);
    int64_t begin = json_integer(j, first, 0x1p53), end = json_integer(j, second, 0x1p53);
    if (json_type(j, offsets) != '[' || j->tokens[offsets].size != 2 || begin < 0 || end < begin)
        die("%s: tensor %s has no valid data_offsets", path, t.name);
    if ((size_t)end > bytes)
        die("%s: tensor %s ends at byte %lld of the data, but the file has only %zu (truncated?)",
            path, t.name, (long long)end, bytes);
    if ((size_t)(end - begin) != size)
        die("%s: tensor %s has %lld bytes, its dtype and shape ask for %zu", path, t.name,
            (long long)(end - begin), size);
    t.data = data + begin;
    t.bytes = size;
    return t;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

static int by_address(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); // empty ones first
}

static const Mapping *add_mapping(Checkpoint *c, Mapping m) {
    Mapping *maps = realloc(c->maps, (c->n_maps + 1) * sizeof *maps);
    if (!maps) die("out of memory");
    c->maps = maps;
    c->maps[c->n_maps] = m;
    return &c->maps[c->n_maps++];
}

/* No object of the header has a key twice, and no number is beyond double's range. */
static void check_header(const Json *j) {
    for (int node = 0; node < j->n; node++) {
        const char *text = j->text + j->tokens[node].start; // behind a number is more
        if (json_type(j, node) == 'p' && !isfinite(strtod(text, NULL)))
            die("%s: a number out of range: %s", j->name, shown(j, node));
        int n = 0, size = json_type(j, node) == '{' ? j->tokens[node].size : 0;
        if (size < 2) continue;
        char **keys = allocate(size, sizeof *keys);
        for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i)) {
            size_t bytes;
            keys[n++] = json_string(j, i, &bytes);
            if (strlen(keys[n - 1]) != bytes) die("%s: a name holds a NUL", j->name);
        }
        qsort(keys, n, sizeof *keys, by_text);
        for (int i = 1; i < n; i++)
            if (!strcmp(keys[i - 1], keys[i])) die("%s: %s stands there twice", j->name, keys[i]);
        for (int i = 0; i < n; i++) free(keys[i]);
        free(keys);
    }
}

/* Adds the tensors of a safetensors file. Returns its parsed header. */
static Json *add_safetensors(Checkpoint *c, const Mapping m) {
    uint64_t length = 0;
    for (size_t i = 0; i < 8 && i < m.bytes; i++) length |= (uint64_t)(uint8_t)m.data[i] << 8 * i;
    if (m.bytes < 8 || length > m.bytes - 8 || length > MAX_JSON) { // GGUF of 14 GB
        const char *format = known_format(m.data, m.bytes);
        if (format) die("%s: it is %s", m.path, format);
    }
    if (m.bytes < 8 || length > m.bytes - 8)
        die("%s: not a safetensors file: a header of %llu bytes in a file of %zu", m.path,
            (unsigned long long)length, m.bytes);
    Json *j = json_parse(m.path, m.data + 8, length);
    if (json_type(j, 0) != '{') die("%s: the safetensors header is no JSON object", m.path);
    check_header(j);
    int metadata = json_get(j, 0, "__metadata__");
    if (json_type(j, metadata) != '{' && !json_absent(j, metadata))
        die("%s: __metadata__ is no object", m.path);
    for (int i = json_first(j, metadata); i >= 0; i = json_next(j, metadata, i))
        if (json_type(j, i + 1) != '"') die("%s: __metadata__ holds what is no string", m.path);

    int first = c->n_tensors;
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        if (json_is(j, key, "__metadata__")) continue;
        if ((c->n_tensors & (c->n_tensors - 1)) == 0) { // full at each power of two
            size_t capacity = c->n_tensors ? 2 * c->n_tensors : 1;
            c->tensors = realloc(c->tensors, capacity * sizeof *c->tensors);
            if (!c->tensors) die("out of memory");
        }
        c->tensors[c->n_tensors++] =
            parse_tensor(j, key, m.path, m.data + 8 + length, m.bytes - 8 - length);
    }
    int n = c->n_tensors - first;
    Tensor *t = n ? c->tensors + first : NULL;
    if (n) qsort(t, n, sizeof *t, by_address);
    const char *at = m.data + 8 + length, *end = m.data + m.bytes;
    for (int i = 0; i < n; at = (const char *)t[i].data + t[i].bytes, i++) {
        if (at > (const char *)t[i].data)
            die("%s: tensors %s and %s overlap", m.path, t[i - 1].name, t[i].name);
        if (at < (const char *)t[i].data)
            die("%s: %td bytes before tensor %s belong to none", m.path,
                (const char *)t[i].data - at, t[i].name);
    }
    if (at < end) die("%s: %td bytes behind the last tensor belong to none", m.path, end - at);
    return j;
}

static void sort_tensors(Checkpoint *c) {
    if (c->n_tensors) qsort(c->tensors, c->n_tensors, sizeof *c->tensors, by_name);
    for (int i = 1; i < c->n_tensors; i++)
        if (!by_name(&c->tensors[i - 1], &c->tensors[i]))
            die("%s: tensor %s stands there twice", c->path, c->tensors[i].name);
}

/* The shards that "weight_map" of the index names, each once. */
static void add_shards(Checkpoint *c, Mapping index) {
    Json *j = json_parse(index.path, index.data, index.bytes);
    int map = json_get(j, 0, "weight_map"), n = 0;
    if (json_type(j, map) != '{' || json_first(j, map) < 0) die("%s: no weight_map", index.path);
    char **shards = allocate(j->n, sizeof *shards);
    for (int key = json_first(j, map); key >= 0; key = json_next(j, map, key)) {
        size_t bytes;
        if (json_type(j, key + 1) != '"') die("%s: weight_map is no map of names", index.path);
        shards[n++] = json_string(j, key + 1, &bytes);
        if (strchr(shards[n - 1], '/') || strlen(shards[n - 1]) != bytes)
            die("%s: shard %s is no name of a file beside it", index.path, shards[n - 1]);
    }
    qsort(shards, n, sizeof *shards, by_text);
    for (int i = 0; i < n; i++)
        if (i == 0 || strcmp(shards[i - 1], shards[i])) {
            char *path = format_text("%s/%s", c->path, shards[i]);
            json_free(add_safetensors(c, *add_mapping(c, map_file(path, false))));
        }
    for (int i = 0; i < n; i++) free(shards[i]);
    free(shards);
    sort_tensors(c);
    for (int key = json_first(j, map); key >= 0; key = json_next(j, map, key)) {
        size_t bytes;
        char *name = json_string(j, key, &bytes);
        if (!checkpoint_find(c, name))
            die("%s: tensor %s is in none of the shards", index.path, name);
        free(name);
    }
    json_free(j);
}

/* Ends the program: a file of MODEL is missing. Names what may be there instead. */
static void die_missing(const char *directory, const char *name) {
    static const struct {
        const char *start, *end, *what;
    } others[] = {{"", ".gguf", "a GGUF file"},
                  {"", ".pth", "a PyTorch file"},
                  {"pytorch_model", ".bin", "a PyTorch file"},
                  {"model-", ".safetensors", "a shard without model.safetensors.index.json"}};
    DIR *files = opendir(directory);
    for (const struct dirent *file; files && (file = readdir(files));)
        for (int i = 0; i < 4; i++) {
            const char *end = strrchr(file->d_name, '.');
            if (!end || strcmp(end, others[i].end)) continue;
            if (strncmp(file->d_name, others[i].start, strlen(others[i].start))) continue;
            die("%s/%s: No such file; there is %s, %s", directory, name, file->d_name,
                others[i].what);
        }
    die("%s/%s: %s", directory, name, strerror(ENOENT));
}

const char *const chat_file_names[N_CHAT_FILES] = {"tokenizer_config.json", "chat_template.jinja",
                                                   "special_tokens_map.json", "added_tokens.json"};

static Tensor text_tensor(const char *name, const char *data, size_t bytes) {
    return (Tensor){(char *)name, U8, 1, {bytes}, data, bytes, NULL};
}

static void open_qqq(Checkpoint *c);

/* tokenizer.json and the files beside it. */
static void open_texts(Checkpoint *c) {
    Mapping tokenizer = map_file(format_text("%s/tokenizer.json", c->path), true);
    if (tokenizer.data) {
        c->tokenizer = tokenizer.data;
        c->tokenizer_bytes = tokenizer.bytes;
        add_mapping(c, tokenizer);
    }
    for (int i = 0; i < N_CHAT_FILES; i++) {
        Mapping text = map_file(format_text("%s/%s", c->path, chat_file_names[i]), true);
        if (!text.data) continue;
        c->chat_files[i] = text_tensor(chat_file_names[i], text.data, text.bytes);
        add_mapping(c, text);
    }
}

static void open_directory(Checkpoint *c) {
    if (read_file(c->path, "adapter_config.json"))
        die("%s: adapter_config.json: merge the adapter into its model first", c->path);
    c->config = read_file(c->path, "config.json");
    if (!c->config) die_missing(c->path, "config.json");
    c->generation_config = read_file(c->path, "generation_config.json");
    open_texts(c);
    Mapping single = map_file(format_text("%s/model.safetensors", c->path), true);
    Mapping index = map_file(format_text("%s/model.safetensors.index.json", c->path), true);
    if (!single.data && !index.data) die_missing(c->path, "model.safetensors");
    if (index.data) add_mapping(c, index);
    if (single.data) {
        if (index.data) note("%s: model.safetensors is read, the index beside it not", c->path);
        json_free(add_safetensors(c, *add_mapping(c, single)));
        sort_tensors(c);
    } else {
        add_shards(c, index);
    }
    open_qqq(c);
}

bool same_file(const char *a, const char *b) {
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

bool checkpoint_has_file(const Checkpoint *c, const char *path) {
    for (int i = 0; i < c->n_maps; i++)
        if (same_file(path, c->maps[i].path)) return true;
    return false;
}

bool checkpoint_owns(const Checkpoint *c, const char *path) {
    bool owned = same_file(path, c->path) || checkpoint_has_file(c, path);
    DIR *files = access(path, F_OK) ? NULL : opendir(c->path);
    if (!files) return owned;
    for (const struct dirent *file; !owned && (file = readdir(files));) { // also under other names
        if (!strcmp(file->d_name, "..")) continue;
        char *own = format_text("%s/%s", c->path, file->d_name);
        owned = same_file(path, own);
        free(own);
    }
    closedir(files);
    char *inner = realpath(path, NULL), *outer = realpath(c->path, NULL);
    size_t n = outer ? strlen(outer) : 0;
    owned = owned || (inner && n && !strncmp(inner, outer, n) && inner[n] == '/');
    free(inner);
    free(outer);
    return owned;
}

static char *metadata_text(const Json *j, const char *key) {
    int node = json_get(j, json_get(j, 0, "__metadata__"), key);
    size_t bytes;
    return json_type(j, node) == '"' ? json_string(j, node, &bytes) : NULL;
}

static void open_model_bin(Checkpoint *c) {
    Json *j = add_safetensors(c, *add_mapping(c, map_file(format_text("%s", c->path), false)));
    sort_tensors(c);
    char *format = metadata_text(j, "format"), *version = metadata_text(j, "version");
    if (!format || strcmp(format, "qqq"))
        die("%s: a safetensors file, but no model.bin (its format is %s, not qqq); for a Hugging "
            "Face model give the directory",
            c->path, format ? format : "not stated");
    if (!version || strcmp(version, "1"))
        die("%s: version %s of the format, expected 1%s", c->path, version ? version : "none",
            version && strtod(version, NULL) > 1 ? "; a newer program made it" : "");
    free(format);
    free(version);
    c->config = metadata_text(j, "config");
    if (!c->config) die("%s: no config in __metadata__", c->path);
    c->generation_config = metadata_text(j, "generation_config");
    c->quantization = metadata_text(j, "quantization");
    for (int i = -1; i < N_CHAT_FILES; i++) {
        const Tensor *t = checkpoint_find(c, i < 0 ? "tokenizer.json" : chat_file_names[i]);
        if (!t) continue;
        if (t->dtype != U8) die("%s: %s is not U8", c->path, t->name);
        if (i < 0) c->tokenizer = t->data, c->tokenizer_bytes = t->bytes;
        else c->chat_files[i] = text_tensor(t->name, t->data, t->bytes);
    }
    json_free(j);
}

char *model_path(const char *path) {
    char *config = format_text("%s/config.json", path);
    char *folder = format_text("%s/snapshots", path), *revision = NULL;
    DIR *snapshots = access(config, F_OK) ? opendir(folder) : NULL;
    if (snapshots) revision = read_file(path, "refs/main");
    bool named = revision;
    for (const struct dirent *d; snapshots && !named && (d = readdir(snapshots));) {
        if (*d->d_name == '.') continue;
        if (revision)
            die("%s: a Hugging Face cache; give one of the directories in %s", path, folder);
        revision = format_text("%s", d->d_name);
    }
    if (snapshots) closedir(snapshots);
    if (revision) revision[strcspn(revision, "/\n")] = 0;
    char *found = format_text(revision ? "%s/%s" : "%s", revision ? folder : path, revision);
    free(revision);
    free(config);
    free(folder);
    return found;
}

static Checkpoint *open_parts(const char *path, void (*open_in)(Checkpoint *c)) {
    Checkpoint *c = allocate(1, sizeof *c);
    c->path = model_path(path);
    c->next = opened;
    opened = c;
    struct sigaction cut = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &cut, NULL);
    if (is_directory(c->path)) open_in(c);
    else open_model_bin(c);
    return c;
}

Checkpoint *checkpoint_open(const char *path) {
    return open_parts(path, open_directory);
}

Checkpoint *checkpoint_open_texts(const char *path) {
    return open_parts(path, open_texts);
}

void checkpoint_close(Checkpoint *c) {
    Checkpoint **link = &opened;
    while (*link != c) link = &(*link)->next;
    *link = c->next;
    for (int i = 0; i < c->n_tensors; i++) free(c->tensors[i].name);
    for (int i = 0; i < c->n_maps; i++) {
        munmap((void *)c->maps[i].data, c->maps[i].bytes);
        free(c->maps[i].path);
    }
    free(c->tensors);
    free(c->maps);
    free(c->config);
    free(c->generation_config);
    free(c->quantization);
    free(c->path);
    free(c);
}

const Tensor *checkpoint_find(const Checkpoint *c, const char *name) {
    Tensor key = {.name = (char *)name};
    if (!c->n_tensors) return NULL;
    return bsearch(&key, c->tensors, c->n_tensors, sizeof key, by_name);
}

/* ---- 4 the model in a file: config.json, weights ---- */

static int config_integer(const Json *j, const char *key, int min, int max) {
    int node = json_get(j, 0, key);
    int64_t value = json_integer(j, node, 0x1p53);
    if (value < min || value > max)
        die("%s: %s is %s, expected a whole number from %d to %d", j->name, key, shown(j, node),
            min, max);
    return value;
}

static double config_real(const Json *j, int object, const char *key) {
    double value;
    int node = json_get(j, object, key);
    if (!json_number(j, node, &value) || value <= 0)
        die("%s: %s is %s, expected a number above 0", j->name, key, shown(j, node));
    return value;
}

/* true or false; absent and null are false. */
static bool config_true(const Json *j, const char *key) {
    int node = json_get(j, 0, key);
    bool literal = json_type(j, node) == 'p', is_true = literal && json_is(j, node, "true");
    if (!is_true && !json_absent(j, node) && !(literal && json_is(j, node, "false")))
        die("%s: %s is %s, expected true or false", j->name, key, shown(j, node));
    return is_true;
}

/* LLaMA 3.1 has `want` there; anything else is another architecture. */
static void config_expect(const Json *j, int object, const char *key, const char *want) {
    int node = json_get(j, object, key);
    if (!json_is(j, node, want))
        die("%s: %s is %s; only LLaMA 3.1 is supported, where it is %s", j->name, key,
            shown(j, node), want);
}

static void add_eos(Config *c, const Json *j, int node) {
    int64_t id = json_integer(j, node, INT32_MAX);
    if (id < 0) die("%s: eos_token_id is %s, expected token ids", j->name, shown(j, node));
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos[i] == id) return;
    if (c->n_eos == sizeof c->eos / sizeof *c->eos) die("%s: too many eos_token_id", j->name);
    c->eos[c->n_eos++] = id;
}

/* eos_token_id is a number, a list of them, or absent. */
static void add_all_eos(Config *c, const Json *j) {
    int node = json_get(j, 0, "eos_token_id");
    if (json_type(j, node) != '[' && !json_absent(j, node)) add_eos(c, j, node);
    for (int i = json_type(j, node) == '[' ? json_first(j, node) : -1; i >= 0;
         i = json_next(j, node, i))
        add_eos(c, j, i);
}

/* A number from 0 to max, -1 if it is absent. */
static double sampling_number(const Json *j, const char *key, double max) {
    int node = json_get(j, 0, key);
    double value = -1;
    if (!json_absent(j, node) && (!json_number(j, node, &value) || value < 0 || value > max))
        die("%s: %s is %s, expected a number from 0 to %g", j->name, key, shown(j, node), max);
    return value;
}

/* generation_config.json: its EOS counts instead of config.json's, its temperature and top_p where
 * no option says otherwise. */
static void generation_parse(const char *path, const char *text, Config *c) {
    char *name = format_text("%s: generation_config.json", path);
    Json *j = json_parse(name, text, strlen(text));
    if (json_type(j, 0) != '{') die("%s: no JSON object", name);
    if (!json_absent(j, json_get(j, 0, "eos_token_id"))) c->n_eos = 0;
    add_all_eos(c, j);
    c->temperature = sampling_number(j, "temperature", 100);
    c->top_p = sampling_number(j, "top_p", 1);
    int sample = json_get(j, 0, "do_sample");
    if (json_type(j, sample) == 'p' && json_is(j, sample, "false")) c->temperature = 0;
    static const char *const others[] = {
        "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        double value; // 0 and 1 turn each of them off
        if (json_number(j, json_get(j, 0, others[i]), &value) && value != 0 && value != 1)
            note("%s: %s %g is not used", name, others[i], value);
    }
    json_free(j);
    free(name);
}

Config config_parse(const char *path, const char *config, const char *generation_config) {
    char *name = format_text("%s: config.json", path);
    Json *j = json_parse(name, config, strlen(config));
    config_expect(j, 0, "model_type", "llama");
    config_expect(j, 0, "hidden_act", "silu");
    const char *absent[] = {"attention_bias", "mlp_bias"};
    for (int i = 0; i < 2; i++)
        if (config_true(j, absent[i]))
            die("%s: %s is true; only LLaMA 3.1 is supported, which has none", name, absent[i]);

    enum { MAX = 1 << 16 }; // channels: beyond it sums of int8 products could overflow int32
    Config c = {0};
    c.dim = config_integer(j, "hidden_size", 1, MAX);
    c.hidden_dim = config_integer(j, "intermediate_size", 1, MAX);
    c.n_layers = config_integer(j, "num_hidden_layers", 1, 4096);
    c.n_heads = config_integer(j, "num_attention_heads", 1, 4096);
    bool mha = json_absent(j, json_get(j, 0, "num_key_value_heads"));
    c.n_kv_heads = mha ? c.n_heads : config_integer(j, "num_key_value_heads", 1, 4096);
    if (c.n_heads % c.n_kv_heads)
        die("%s: num_attention_heads %d is no multiple of num_key_value_heads %d", name, c.n_heads,
            c.n_kv_heads);
    bool given = !json_absent(j, json_get(j, 0, "head_dim"));
    if (!given && c.dim % c.n_heads)
        die("%s: hidden_size %d is no multiple of num_attention_heads %d", name, c.dim, c.n_heads);
    c.head_dim = given ? config_integer(j, "head_dim", 2, 4096) : c.dim / c.n_heads;
    if (c.head_dim < 2 || c.head_dim % 2) die("%s: head_dim %d is not even", name, c.head_dim);
    if (c.n_heads * c.head_dim > MAX)
        die("%s: %d heads of %d, expected at most %d channels", name, c.n_heads, c.head_dim, MAX);
    c.vocab_size = config_integer(j, "vocab_size", 1, 1 << 24);
    c.max_context = config_integer(j, "max_position_embeddings", 2, 1 << 24);
    c.norm_eps = config_real(j, 0, "rms_norm_eps");
    if (!(c.norm_eps > 0 && c.norm_eps < INFINITY)) die("%s: rms_norm_eps is no float", name);
    c.tied = config_true(j, "tie_word_embeddings");

    // transformers 5 moved rope_theta and rope_scaling's content into rope_parameters; where both
    // are given, it reads rope_scaling.
    int rope = json_get(j, 0, "rope_scaling"), newer = json_get(j, 0, "rope_parameters");
    bool parameters =
        json_absent(j, rope) || (json_type(j, rope) == '{' && json_first(j, rope) < 0);
    if (parameters && !json_absent(j, newer)) rope = newer;
    else if (json_first(j, newer) >= 0) note("%s: rope_scaling counts, not rope_parameters", name);
    if (json_type(j, rope) != '{' && !json_absent(j, rope))
        die("%s: %s is %s, expected an object", name,
            parameters ? "rope_parameters" : "rope_scaling", shown(j, rope));
    bool inside = json_get(j, rope, "rope_theta") >= 0;
    c.rope_theta = config_real(j, inside ? rope : 0, "rope_theta");
    const char *key = json_get(j, rope, "rope_type") < 0 ? "type" : "rope_type";
    int type = json_get(j, rope, key);
    bool scaled = json_type(j, rope) == '{' && !json_is(j, type, "default");
    if (scaled && !(parameters && type < 0)) {
        config_expect(j, rope, key, "llama3");
        c.rope_factor = config_real(j, rope, "factor");
        c.rope_low_freq_factor = config_real(j, rope, "low_freq_factor");
        c.rope_high_freq_factor = config_real(j, rope, "high_freq_factor");
        c.rope_original_context = config_real(j, rope, "original_max_position_embeddings");
        if (c.rope_high_freq_factor <= c.rope_low_freq_factor)
            die("%s: high_freq_factor is not above low_freq_factor", name);
    }

    int bos = json_get(j, 0, "bos_token_id");
    c.bos = json_integer(j, bos, INT32_MAX);
    if (c.bos < 0 && !json_absent(j, bos))
        die("%s: bos_token_id is %s, expected a token id", name, shown(j, bos));
    add_all_eos(&c, j);
    json_free(j);
    free(name);
    c.temperature = c.top_p = -1;
    if (generation_config) generation_parse(path, generation_config, &c);
    return c;
}

static const Tensor *need(const Checkpoint *c, const Parameter *p) {
    const Tensor *t = checkpoint_find(c, p->name);
    if (!t) die("%s: tensor %s is missing", c->path, p->name);
    int n_dims = p->columns ? 2 : 1, n = 0;
    if (t->n_dims == n_dims && t->shape[0] == p->rows && t->shape[1] == p->columns) return t;
    char found[24 * MAX_DIMS] = "", expected[48];
    for (int i = 0; i < t->n_dims; i++)
        n += snprintf(found + n, sizeof found - n, i ? ", %lld" : "%lld", (long long)t->shape[i]);
    snprintf(expected, sizeof expected, p->columns ? "%d, %d" : "%d", p->rows, p->columns);
    die("%s: tensor %s has the shape [%s], expected [%s]", t->path, p->name, found, expected);
}

static void expect_dtype(const Tensor *t, bool ok, const char *expected) {
    if (!ok)
        die("%s: tensor %s has dtype %s, expected %s", t->path, t->name, dtypes[t->dtype].name,
            expected);
}

static bool has_zero_code(const uint8_t *codes, size_t n) {
    int found = 0;
#pragma omp parallel for reduction(| : found)
    for (size_t i = 0; i < n; i++) found |= (codes[i] & 0x0f) == 0 || (codes[i] & 0xf0) == 0;
    return found;
}

typedef struct {
    const Checkpoint *checkpoint;
    int group_size;
    bool *used; // [n_tensors] of the checkpoint
} Loading;

/* One tensor of a model from its file. */
static void load_tensor(void *to, const Parameter *p) {
    const Loading *loading = to;
    const Tensor *t = need(loading->checkpoint, p);
    loading->used[t - loading->checkpoint->tensors] = true;
    bool is_float = p->role == NORM || p->role == WEIGHT;
    bool in_bytes = p->role == WEIGHT && p->linear->dtype == I8;
    if (is_float) expect_dtype(t, t->dtype <= BF16 || in_bytes, "F32, F16 or BF16");
    else if (p->role == S_CHANNEL) expect_dtype(t, t->dtype == F32, "F32");
    else expect_dtype(t, t->dtype == U8, "U8");
    void *data = (void *)t->data; // read-only, as `mapped` says
    switch (p->role) {
    case NORM:
        floats(data, t->dtype, 0, p->rows, *p->norm);
        if (!all_finite(*p->norm, p->rows))
            die("%s: tensor %s holds NaN or infinity", t->path, t->name);
        break;
    case WEIGHT:
        p->linear->dtype = t->dtype;
        p->linear->w = data;
        break;
    case QWEIGHT:
        p->linear->dtype = U8;
        p->linear->qweight = data;
        if (loading->group_size < 0 && has_zero_code(data, t->bytes))
            die("%s: tensor %s holds the code 0, per channel 1 to 15 are expected", t->path,
                t->name);
        break;
    case S_CHANNEL:
        p->linear->s_channel = allocate(p->rows, sizeof(float));
        floats(data, F32, 0, p->rows, p->linear->s_channel);
        if (!all_finite(p->linear->s_channel, p->rows))
            die("%s: tensor %s is not finite", t->path, t->name);
        break;
    case S_GROUP:
        p->linear->s_group = data;
        for (size_t i = 0; i < t->bytes; i++)
            if (p->linear->s_group[i] < 1 || p->linear->s_group[i] > 15)
                die("%s: tensor %s holds %d, expected 1 to 15", t->path, t->name,
                    p->linear->s_group[i]);
        break;
    }
    if (p->linear) p->linear->mapped = true;
}

/* The group size that a model.bin's quantization names: 128, -1, or 0 for an unquantized model. */
static int quantization_group_size(const Checkpoint *c) {
    if (!c->quantization) return 0;
    char *name = format_text("%s: quantization", c->path);
    Json *j = json_parse(name, c->quantization, strlen(c->quantization));
    double bits = 0, group_size = 0;
    json_number(j, json_get(j, 0, "bits"), &bits);
    json_number(j, json_get(j, 0, "group_size"), &group_size);
    if (bits != 4 || (group_size != -1 && group_size != GROUP))
        die("%s: bits %g, group_size %g; expected 4 bits, group_size -1 or %d", name, bits,
            group_size, GROUP);
    json_free(j);
    free(name);
    return group_size;
}

/* The tensors of one linear, float or quantized. */
static void visit_linear(const char *name, int N, int K, int group_size, Linear *l,
                         void (*visit)(void *to, const Parameter *p), void *to) {
    static const char *const suffixes[] = {[WEIGHT] = "weight",
                                           [QWEIGHT] = "qweight",
                                           [S_CHANNEL] = "s_channel",
                                           [S_GROUP] = "s_group"};
    const int columns[] = {[WEIGHT] = K, [QWEIGHT] = K / 2, [S_CHANNEL] = 0, [S_GROUP] = K / GROUP};
    l->N = N;
    l->K = K;
    Role last = group_size > 0 ? S_GROUP : group_size < 0 ? S_CHANNEL : WEIGHT;
    for (Role role = group_size ? QWEIGHT : WEIGHT; role <= last; role++) {
        char full[160];
        snprintf(full, sizeof full, "%s.%s", name, suffixes[role]);
        visit(to, &(Parameter){role, full, N, columns[role], l, NULL});
    }
}

void for_each_tensor(Model *m, int first, int last, void (*visit)(void *to, const Parameter *p),
                     void *to) {
    const Config *c = &m->config;
    for (int l = first; l <= last; l++) {
        if (l < 0)
            visit_linear("model.embed_tokens", c->vocab_size, c->dim, 0, &m->embedding, visit, to);
        if (l == c->n_layers) {
            visit(to, &(Parameter){NORM, "model.norm.weight", c->dim, 0, NULL, &m->norm});
            if (!c->tied) visit_linear("lm_head", c->vocab_size, c->dim, 0, &m->lm_head, visit, to);
            if (m->lm_head.dtype == I8)
                visit(to, &(Parameter){S_CHANNEL, "lm_head.s_channel", c->vocab_size, 0,
                                       &m->lm_head, NULL});
        }
        if (l < 0 || l == c->n_layers) continue;
        Layer *layer = &m->layers[l];
        char name[128];
        for (int k = 0; k < N_LINEARS; k++) {
            int N, K;
            linear_shape(c, k, &N, &K);
            snprintf(name, sizeof name, "model.layers.%d.%s", l, linear_names[k]);
            visit_linear(name, N, K, m->group_size, &layer->linears[k], visit, to);
        }
        snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", l);
        visit(to, &(Parameter){NORM, name, c->dim, 0, NULL, &layer->attention_norm});
        snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", l);
        visit(to, &(Parameter){NORM, name, c->dim, 0, NULL, &layer->ffn_norm});
    }
}

/* A model without weights, with room for its norms. */
static Model *model_new(const Config *c, int group_size) {
    Model *m = allocate(1, sizeof *m);
    *m = (Model){.config = *c, .group_size = group_size};
    m->norm = allocate(c->dim, sizeof(float));
    m->layers = allocate(c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++) {
        m->layers[l].attention_norm = allocate(2 * (size_t)c->dim, sizeof(float));
        m->layers[l].ffn_norm = m->layers[l].attention_norm + c->dim;
    }
    return m;
}

void check_group_size(const char *path, const Config *c, int group_size) {
    int unit = group_size > 0 ? group_size : 2, N, K;
    for (int k = 0; k < N_LINEARS && group_size; k++) {
        linear_shape(c, k, &N, &K);
        if (K % unit)
            die("%s: %s has %d input channels, no multiple of %d%s", path, linear_names[k], K, unit,
                unit == GROUP ? " (-g -1 quantizes per channel)" : "");
    }
}

/* Says which tensors of the file no part of the model reads, the first of them by name. */
static void note_unused(const Checkpoint *c, const bool *used) {
    char names[600] = "";
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++) {
        const Tensor *t = &c->tensors[i];
        const char *end = strrchr(t->name, '.');
        if (used[i] || (t->dtype == U8 && t->n_dims == 1)) continue; // a text that travels along
        if (end && !strcmp(end, ".inv_freq")) continue;              // RoPE's, computed
        size_t length = strlen(names);
        if (length + strlen(t->name) + 8 < sizeof names)
            sprintf(names + length, "%s%s", n ? ", " : "", t->name);
        else if (strcmp(names + length - 3, "...")) strcat(names, ", ...");
        n++;
    }
    if (n) note("%s: %d tensors are not used: %s", c->path, n, names);
}

/* Refuses weights that another program quantized. */
static void check_quantization(const Checkpoint *c) {
    char *name = format_text("%s: config.json", c->path);
    Json *j = json_parse(name, c->config, strlen(c->config));
    int how = json_get(j, 0, "quantization_config");
    const Tensor *t = checkpoint_find(c, "model.layers.0.self_attn.q_proj.weight");
    const char *method = shown(j, json_get(j, how, "quant_method"));
    if (!json_absent(j, how) && (!t || t->dtype > BF16))
        die("%s: quantization_config, quant_method %s: the weights are quantized already, and not "
            "by this program",
            name, method);
    if (!json_absent(j, how))
        note("%s: quantization_config, quant_method %s, is not used: the weights are %s", name,
             method, dtype_name(t->dtype));
    json_free(j);
    free(name);
}

/* The token that begins a text: tokenizer.json's post-processor says so, and where there is none
 * config.json. -1: none. */
static int begin_token(const Checkpoint *c, int configured) {
    if (!c->tokenizer) return configured;
    char *name = format_text("%s: tokenizer.json", c->path);
    Json *j = json_parse(name, c->tokenizer, c->tokenizer_bytes);
    int post = json_get(j, 0, "post_processor"), list = json_get(j, post, "processors");
    bool sequence = json_is(j, json_get(j, post, "type"), "Sequence");
    int bos = -1, extra = 0;
    bool text = false;
    for (int p = sequence ? json_first(j, list) : post; p >= 0;
         p = sequence ? json_next(j, list, p) : -1) {
        int template = json_get(j, p, "single"), type = json_get(j, p, "type");
        if (!json_absent(j, p) && !json_is(j, type, "ByteLevel") && template <0)
            die("%s: post_processor is %s, expected TemplateProcessing", name, shown(j, type));
        for (int i = json_first(j, template); i >= 0; i = json_next(j, template, i)) {
            int special = json_get(j, i, "SpecialToken");
            size_t bytes;
            char *id = special < 0 ? NULL : json_string(j, json_get(j, special, "id"), &bytes);
            if (!id) text = true;
            else if (text || bos >= 0) extra++;
            else {
                int token = json_get(j, json_get(j, p, "special_tokens"), id);
                bos = json_integer(j, json_first(j, json_get(j, token, "ids")), INT32_MAX);
            }
            free(id);
        }
    }
    if (extra) note("%s: post_processor adds more to a text than its first token: not used", name);
    if (json_absent(j, post)) bos = configured;
    if (json_absent(j, post) && bos >= 0)
        note("%s: no post_processor: texts begin with config.json's bos_token_id, %d", name, bos);
    else if (configured >= 0 && configured != bos)
        note("%s: texts begin with %d, not with config.json's bos_token_id %d", name, bos,
             configured);
    json_free(j);
    free(name);
    return bos;
}

Model *model_load(const Checkpoint *checkpoint) {
    Config c = config_parse(checkpoint->path, checkpoint->config, checkpoint->generation_config);
    if (!checkpoint->quantization) check_quantization(checkpoint);
    c.bos = begin_token(checkpoint, c.bos);
    // A tied lm_head that rotation or its 8 bits untied stands in the file all the same.
    const Tensor *head = checkpoint_find(checkpoint, "lm_head.weight");
    if (head) c.tied = false;
    Model *m = model_new(&c, quantization_group_size(checkpoint));
    if (head && head->dtype == I8 && m->group_size) m->lm_head.dtype = I8;
    check_group_size(checkpoint->path, &c, m->group_size);
    Loading loading = {checkpoint, m->group_size, allocate(checkpoint->n_tensors, sizeof(bool))};
    for_each_tensor(m, -1, c.n_layers, load_tensor, &loading);
    note_unused(checkpoint, loading.used);
    free(loading.used);
    if (c.tied) m->lm_head = m->embedding;
    return m;
}

const char *weights_kind(const Model *m) {
    if (m->group_size == 0) return dtype_name(m->layers[0].q.dtype);
    return m->group_size < 0 ? "W4A8 per channel" : "W4A8 g128";
}

void describe_model(const Checkpoint *checkpoint, const Model *m, const char *where) {
    const Config *c = &m->config;
    double bytes = 0;
    for (int i = 0; i < checkpoint->n_tensors; i++) bytes += checkpoint->tensors[i].bytes;
    fprintf(stderr, "%s: LLaMA 3.1, dim %d, ffn %d, %d layers, %d/%d heads of %d, vocabulary %d\n",
            checkpoint->path, c->dim, c->hidden_dim, c->n_layers, c->n_heads, c->n_kv_heads,
            c->head_dim, c->vocab_size);
    fprintf(stderr, "weights %s, %.1f MB%s%s\n", weights_kind(m), bytes / 1e6, where ? ", on " : "",
            where ? where : "");
    if (checkpoint->quantization) {
        char *made = format_text("%s", checkpoint->quantization);
        make_printable(made);
        fprintf(stderr, "made with %s\n", made);
        free(made);
    }
    print_notes();
}

/* Says which tokens of a node of the files beside tokenizer.json it lacks: strings of an array or
 * object, or their "content". `id` is the one that the file gives it, or -1. */
static void note_tokens(const Tokenizer *t, const Json *j, int node, int64_t id) {
    bool object = json_type(j, node) == '{';
    int content = object ? json_get(j, node, "content") : node;
    if (json_type(j, content) == '"') {
        size_t bytes;
        char *token = json_string(j, content, &bytes);
        int found = tokenizer_id(t, token);
        if (found < 0 || (id >= 0 && id != found))
            note("%s: token %s is not used: tokenizer.json has it not, or another id for it",
                 j->name, token);
        free(token);
    } else {
        for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i))
            note_tokens(t, j, object ? i + 1 : i, -1);
    }
}

/* The same of a whole file: added_tokens.json {TOKEN: id}, or one with {"bos_token": TOKEN,
 * "extra_special_tokens": [TOKEN, ..], "added_tokens_decoder": {id: TOKEN}}. */
static void note_outside_tokens(const Tokenizer *t, const Checkpoint *c, const Tensor *file) {
    char *name = format_text("%s: %s", c->path, file->name);
    Json *j = json_parse(name, file->data, file->bytes);
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        size_t bytes;
        char *text = json_string(j, key, &bytes), *end = strrchr(text, '_');
        if (!strcmp(file->name, "added_tokens.json"))
            note_tokens(t, j, key, json_integer(j, key + 1, INT32_MAX));
        else if (end && (!strcmp(end, "_token") || !strcmp(end, "_tokens") ||
                         !strcmp(text, "added_tokens_decoder")))
            note_tokens(t, j, key + 1, -1);
        free(text);
    }
    json_free(j);
    free(name);
}

Tokenizer *checkpoint_tokenizer(const Checkpoint *c) {
    if (!c->tokenizer) die("%s: it has no tokenizer.json", c->path);
    char *name = format_text("%s: tokenizer.json", c->path);
    Tokenizer *t = tokenizer_load(name, c->tokenizer, c->tokenizer_bytes);
    free(name);
    for (int i = 0; i < N_CHAT_FILES; i++) {
        const char *end = c->chat_files[i].data ? strrchr(c->chat_files[i].name, '.') : NULL;
        if (end && !strcmp(end, ".json")) note_outside_tokens(t, c, &c->chat_files[i]);
    }
    return t;
}

int *encode_text(const Tokenizer *t, const Config *c, const char *name, const char *text,
                 size_t bytes, int *n) {
    int *ids = tokenizer_encode(t, text, bytes, true, n);
    if (c->bos >= 0 && (*n == 0 || ids[0] != c->bos)) {
        ids = realloc(ids, (*n + 1) * sizeof *ids);
        if (!ids) die("out of memory");
        memmove(ids + 1, ids, (*n)++ * sizeof *ids);
        ids[0] = c->bos;
    }
    for (int i = 0; i < *n; i++)
        if (ids[i] >= c->vocab_size)
            die("%s: token %d is beyond the %d rows of the embedding", name, ids[i], c->vocab_size);
    return ids;
}

int *read_tokens(const Tokenizer *t, const Config *c, const char *path, int *length, int *n) {
    size_t bytes;
    char *text = read_text(path, &bytes);
    if (!t) die("%s: the model has no tokenizer.json, which it needs", path);
    int *ids = encode_text(t, c, path, text, bytes, n);
    free(text);
    if (!*length) *length = c->max_context < 2048 ? c->max_context : 2048;
    if (*n < *length)
        die("%s: it has %d tokens, a window needs %d (-l sets it)", path, *n, *length);
    return ids;
}

void print_perplexity(const Checkpoint *c, Engine *e, const char *label, const int *tokens, int n,
                      int length) {
    Perplexity p = perplexity(e, tokens, n, length, 0, show_windows);
    if (!isfinite(p.mean))
        die("%s: the perplexity is %f: the weights are damaged", c->path, p.mean);
    printf("%sperplexity %.4f (%d windows of %d)", label, p.mean, p.windows, length);
    if (p.windows > 1) printf(", standard error %.2f", p.error);
    putchar('\n');
    fflush(stdout);
}

/* ---- 5 checkpoints of the QQQ repository and of GPTQModel (format "qqq") ----
 *
 *   NAME.B         I32 [K/16][2 N]  4-bit codes in the order in which QQQ's kernel reads them
 *   NAME.s_channel F32 [1][N]       permuted, and divided by 16 per channel
 *   NAME.s_group   F16 [K/128][N]   permuted; per channel, and where K is 128, [0]
 *
 * The codes as [K][N] are cut into tiles of 16 x 16, those of the same 16 input channels side by
 * side, each row by row; every 1024 codes (4 tiles) are permuted; eight are a word, the first in
 * its lowest bits. A code is q + 8 with groups; per channel it is q mod 16, from which the kernel
 * makes 16 q: hence the 16. Source: https://github.com/HandH1998/QQQ, whose kernel descends from
 * Marlin (arXiv 2408.11743). */

// Where the i-th of a run comes from.
typedef struct {
    int n[1024], k[1024]; // within 64 output and 16 input channels
    int s_channel[32], s_group[64];
} QqqOrder;

static QqqOrder qqq_order(bool groups) {
    static const int nibbles[2][8] = {{4, 0, 5, 1, 6, 2, 7, 3}, {0, 2, 4, 6, 1, 3, 5, 7}};
    static const int pairs[8] = {0, 1, 8, 9, 16, 17, 24, 25};
    QqqOrder order;
    for (int i = 0; i < 1024; i++) { // a thread of a warp has 4 x 2 codes of each tile
        int from = i / 8 * 8 + nibbles[groups][i % 8];
        int thread = from / 32, tile = from / 8 % 4, half = from / 4 % 2, r = from % 4;
        order.n[i] = 16 * tile + 8 * half + thread / 4;
        order.k[i] = 4 * (thread % 4) + r;
    }
    for (int i = 0; i < 32; i++) order.s_channel[i] = 2 * (i / 8) + pairs[i % 8];
    for (int i = 0; i < 64; i++) order.s_group[i] = i / 8 + 8 * (i % 8);
    return order;
}

void qqq_pack(const Linear *l, uint8_t *B, float *s_channel, uint16_t *s_group) {
    size_t N = l->N, K = l->K;
    bool groups = l->s_group && K > GROUP;
    QqqOrder order = qqq_order(groups);
    memset(B, 0, N * K / 2);
#pragma omp parallel for
    for (size_t run = 0; run < N * K / 1024; run++)
        for (size_t i = 0; i < 1024; i++) {
            size_t n = run % (N / 64) * 64 + order.n[i], k = run / (N / 64) * 16 + order.k[i];
            int u = l->qweight[n * (K / 2) + k / 2] >> 4 * (k % 2) & 15;
            B[run * 512 + i / 2] |= (groups ? u : u ^ 8) << 4 * (i % 2); // (q + 8) ^ 8 = q mod 16
        }
    for (size_t i = 0; i < N; i++) {
        size_t n = i / 32 * 32 + order.s_channel[i % 32];
        float scale = l->s_group && !groups ? l->s_channel[n] * l->s_group[n] : l->s_channel[n];
        s_channel[i] = groups ? scale : scale / 16;
    }
    for (size_t i = 0; groups && i < N * K / GROUP; i++) {
        size_t n = i % N / 64 * 64 + order.s_group[i % 64];
        size_t from = n * (K / GROUP) + i / N;
        s_group[i] = float_to_f16(l->s_group[from]);
    }
}

static Tensor *find_part(const Checkpoint *c, const char *name, const char *suffix, DType dtype,
                         int rows, int columns) {
    char *full = format_text("%s%s", name, suffix);
    const Tensor *t = need(c, &(Parameter){.name = full, .rows = rows, .columns = columns});
    expect_dtype(t, t->dtype == dtype, dtypes[dtype].name);
    free(full);
    return (Tensor *)t;
}

/* Whether a model.bin can hold all group scales: whole numbers, 1 to 15. QQQ's own are halves. */
static bool whole_scales(const Checkpoint *c) {
    bool whole = true;
    for (int t = 0; t < c->n_tensors; t++) {
        const Tensor *group = &c->tensors[t];
        const char *suffix = strrchr(group->name, '.');
        if (!suffix || strcmp(suffix, ".s_group") || group->dtype != F16) continue;
        for (size_t i = 0; i < group->bytes / 2; i++) {
            float scale;
            floats(group->data, F16, i, 1, &scale);
            if (!isfinite(scale)) die("%s: tensor %s holds %g", group->path, group->name, scale);
            whole = whole && scale >= 1 && scale <= 15 && scale == rintf(scale);
        }
    }
    return whole;
}

/* The inverse: B [K/16][2 N] and the scales beside it become, in memory of their own and but for
 * their names, the tensors of a model.bin; or, unless `whole`, F16 weights as QQQ's kernel has
 * them: an int8, q s_group rounded, times s_channel. */
static void qqq_unpack(Checkpoint *c, Tensor *B, bool group_size, bool whole) {
    char *name = format_text("%.*s", (int)strlen(B->name) - 2, B->name);
    size_t K = 16 * B->shape[0], N = B->shape[1] / 2, n_groups = group_size ? K / GROUP : 0;
    if (B->dtype != I32 || B->n_dims != 2 || N % 64 || K % (group_size ? GROUP : 64) ||
        N > 1 << 24 || K > 1 << 24)
        die("%s: tensor %s is no I32 [K / 16][2 N] with N a multiple of 64, K of %d", B->path,
            B->name, group_size ? GROUP : 64);
    bool groups = n_groups > 1; // one group has the layout of none
    Tensor *channel = find_part(c, name, ".s_channel", F32, 1, N), *group = NULL;
    if (group_size)
        group = find_part(c, name, ".s_group", F16, groups ? n_groups : 0, groups ? N : 0);
    free(name);
    size_t weight_bytes = whole ? N * K / 2 : N * K * 2;
    size_t bytes = weight_bytes + N * sizeof(float) + N * n_groups;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("out of memory: %zu bytes were asked for", bytes);
    add_mapping(c, (Mapping){format_text("%s", B->path), memory, bytes});
    uint8_t *qweight = memory, *s_group = qweight + weight_bytes + N * sizeof(float);
    float *s_channel = (void *)(qweight + weight_bytes);
    float *scales = allocate(N * n_groups, sizeof *scales);

    // 1. the scales, in the order of the channels
    QqqOrder order = qqq_order(groups);
    for (size_t i = 0; i < N; i++) {
        float scale;
        floats(channel->data, F32, i, 1, &scale);
        s_channel[i / 32 * 32 + order.s_channel[i % 32]] = groups ? scale : scale * 16;
    }
    for (size_t i = 0; i < N * n_groups; i++) {
        size_t n = groups ? i % N / 64 * 64 + order.s_group[i % 64] : i;
        float *scale = &scales[n * n_groups + i / N];
        if (groups) floats(group->data, F16, i, 1, scale);
        else *scale = 1;
        s_group[n * n_groups + i / N] = whole ? *scale : 1;
    }

    // 2. the codes, or the weights that they stand for
    const uint8_t *codes = B->data;
    int lowest = 15;
#pragma omp parallel for reduction(min : lowest)
    for (size_t run = 0; run < N * K / 1024; run++) // no two share a byte of qweight
        for (size_t i = 0; i < 1024; i++) {
            size_t n = run % (N / 64) * 64 + order.n[i], k = run / (N / 64) * 16 + order.k[i];
            int code = codes[run * 512 + i / 2] >> 4 * (i % 2) & 15, u = groups ? code : code ^ 8;
            lowest = u < lowest ? u : lowest;
            if (whole) {
                qweight[n * (K / 2) + k / 2] |= u << 4 * (k % 2);
            } else {
                float w8 = rintf((u - 8) * scales[n * n_groups + k / GROUP]);
                ((uint16_t *)memory)[n * K + k] = float_to_f16(w8 * s_channel[n]);
            }
        }
    free(scales);
    if (!group_size && lowest == 0)
        die("%s: tensor %s holds the code -8, per channel -7 to 7 are expected", B->path, B->name);
    if (whole) {
        *B = (Tensor){B->name, U8, 2, {N, K / 2}, qweight, N * K / 2, B->path};
        *channel =
            (Tensor){channel->name, F32, 1, {N}, s_channel, N * sizeof(float), channel->path};
        if (group)
            *group = (Tensor){group->name, U8, 2, {N, n_groups}, s_group, N * n_groups, B->path};
    } else {
        *B = (Tensor){B->name, F16, 2, {N, K}, memory, weight_bytes, B->path};
        channel->n_dims = group->n_dims = 1,
        channel->dtype = group->dtype = U8; // no one reads them
    }
}

/* Makes of an opened directory of this kind what a model.bin would be. */
static void open_qqq(Checkpoint *c) {
    char *name = format_text("%s: config.json", c->path);
    Json *j = json_parse(name, c->config, strlen(c->config));
    int q = json_get(j, 0, "quantization_config");
    if (json_is(j, json_get(j, q, "quant_method"), "qqq")) {
        double bits = 0, group_size = 0;
        json_number(j, json_get(j, q, json_get(j, q, "bits") < 0 ? "wbits" : "bits"), &bits);
        json_number(j, json_get(j, q, "group_size"), &group_size);
        if (bits != 4 || (group_size != -1 && group_size != GROUP))
            die("%s: bits %g, group_size %g; expected 4 bits, group_size -1 or %d", name, bits,
                group_size, GROUP);
        bool whole = group_size < 0 || whole_scales(c);
        if (!whole)
            note("%s: group scales that are no whole numbers from 1 to 15: read as 16-bit weights",
                 c->path);
        for (int i = 0; i < c->n_tensors; i++) {
            char *suffix = strrchr(c->tensors[i].name, '.');
            if (suffix && !strcmp(suffix, ".B"))
                qqq_unpack(c, &c->tensors[i], group_size > 0, whole);
        }
        for (int i = 0; i < c->n_tensors; i++) { // once no name is searched for any more
            Tensor *t = &c->tensors[i];
            char *suffix = strrchr(t->name, '.');
            if (!suffix || strcmp(suffix, ".B")) continue;
            char *renamed = format_text(whole ? "%.*s.qweight" : "%.*s.weight",
                                        (int)(suffix - t->name), t->name);
            free(t->name);
            t->name = renamed;
        }
        sort_tensors(c);
        if (whole)
            c->quantization =
                format_text("{\"bits\":4,\"group_size\":%d,\"method\":\"qqq\"}", (int)group_size);
        char *config = json_without(j, (const char *[]){"quantization_config"}, 1, "");
        free(c->config);
        c->config = config;
    }
    json_free(j);
    free(name);
}

/* ---- 6 the writer ---- */

struct Writer {
    char *path; // the target; what is being written are `temporaries`
    int n_files, n;
    int *fds; // [n_files]
    struct Slot {
        char *name;
        int file;
        size_t offset, bytes; // in the file
        bool written;
    } * slots; // [n] sorted by name
    size_t bytes;
};

static int by_slot_name(const void *a, const void *b) {
    return strcmp(((const struct Slot *)a)->name, ((const struct Slot *)b)->name);
}

static void on_signal(int signal_number) {
    static const char line[] = "error: interrupted, nothing was written\n";
    remove_temporaries();
    if (write(STDERR_FILENO, line, sizeof line - 1) < 0) _exit(1);
    end_by(signal_number);
}

char *json_without(const Json *j, const char *const *keys, int n, const char *more) {
    char *text;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) die("out of memory");
    const char *separator = "{\n  ";
    for (int key = json_first(j, 0); key >= 0; key = json_next(j, 0, key)) {
        int i = 0;
        while (i < n && !json_is(j, key, keys[i])) i++;
        if (i < n) continue;
        const jsmntok_t *name = &j->tokens[key], *value = name + 1;
        int quotes = value->type == JSMN_STRING;
        fprintf(out, "%s\"%.*s\": %.*s", separator, name->end - name->start, j->text + name->start,
                value->end - value->start + 2 * quotes, j->text + value->start - quotes);
        separator = ",\n  ";
    }
    fprintf(out, "%s\n}\n", more);
    if (ferror(out) || fclose(out) || !text) die("out of memory");
    return text;
}

/* Has `handler` called for each signal that would end the program, unless nohup or a script has set
 * it aside: all that can be caught but those which by default do nothing or stop. */
static void catch_signals(void (*handler)(int)) {
    static const int harmless[] = {SIGCHLD, SIGCONT,  SIGTSTP, SIGTTIN, SIGTTOU,
                                   SIGURG,  SIGWINCH, SIGBUS,  SIGXFSZ};
    for (int i = 1; i <= SIGRTMAX; i++) {
        bool caught = i != SIGKILL && i != SIGSTOP && (i < 32 || i >= SIGRTMIN);
        for (size_t k = 0; k < sizeof harmless / sizeof *harmless; k++) caught &= i != harmless[k];
        if (caught && signal(i, handler) == SIG_IGN) signal(i, SIG_IGN);
    }
}

void put_json_string(FILE *out, const char *text) {
    fputc('"', out);
    const char *end = text + strlen(text);
    for (const char *s = text; s < end;) {
        int bytes = utf8_bytes(s, end);
        if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else if (!bytes) fputs("\\ufffd", out); // not UTF-8
        else if ((unsigned char)*s < ' ') fprintf(out, "\\u%04x", *s);
        else fwrite(s, 1, bytes, out);
        s += bytes ? bytes : 1;
    }
    fputc('"', out);
}

static void put_metadata(FILE *out, const char *key, const char *value) {
    if (!value) return;
    fprintf(out, ",\"%s\":", key);
    put_json_string(out, value);
}

static void put_tensor(FILE *out, const Tensor *t, size_t *offset) {
    fprintf(out, ",");
    put_json_string(out, t->name);
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[t->dtype].name);
    for (int i = 0; i < t->n_dims; i++) fprintf(out, i ? ",%lld" : "%lld", (long long)t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%zu,%zu]}", *offset, *offset + t->bytes);
    *offset += t->bytes;
}

static void write_at(const Writer *w, int file, const void *data, size_t bytes, size_t offset) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(w->fds[file], (const char *)data + done, bytes - done, offset + done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("%s: cannot be written: %s", w->path, strerror(n ? errno : ENOSPC));
        done += n;
    }
}

/* Holds all signals back; returns the mask before. */
static sigset_t block_signals(void) {
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    return before;
}

/* What is to be made or replaced: a link is followed, and its target must be there. */
static char *target_of(const char *path, bool directory) {
    struct stat st, own;
    bool there = !stat(path, &st);
    if (there && !(directory ? S_ISDIR(st.st_mode) : S_ISREG(st.st_mode)))
        die("%s: cannot be written: not a %s", path, directory ? "directory" : "regular file");
    for (int fd = STDOUT_FILENO; there && fd <= STDERR_FILENO; fd++)
        if (!fstat(fd, &own) && own.st_dev == st.st_dev && own.st_ino == st.st_ino)
            die("%s: cannot be written: stdout or stderr goes there", path);
    if (lstat(path, &st) || S_ISREG(st.st_mode)) return format_text("%s", path);
    char *target = realpath(path, NULL); // also of "name/.", beside which nothing can be made
    if (!target) die("%s: cannot be written: a link to no file", path);
    return target;
}

/* Creates a file, or the directory, that die() and signals will remove. Takes over `path`. */
static void create(Writer *w, char *path, bool directory) {
    if (n_temporaries == sizeof temporaries / sizeof *temporaries)
        die("%s: more than %d files", w->path, n_temporaries);
    sigset_t before = block_signals();
    int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
    int fd = directory ? mkdir(path, 0777) : open(path, flags, 0666), error = errno;
    if (fd >= 0) temporaries[n_temporaries++] = path; // from now on a signal removes it
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (fd < 0) die("%s: cannot be written: %s", w->path, strerror(error));
    if (directory) return;
    w->fds = realloc(w->fds, (w->n_files + 1) * sizeof *w->fds);
    if (!w->fds) die("out of memory");
    w->fds[w->n_files++] = fd;
}

static Writer *writer_new(const char *path, bool directory) {
    static bool registered;
    if (!registered) registered = !atexit(remove_temporaries); // libgomp exits without memory
    signal(SIGXFSZ, SIG_IGN); // a file size limit then fails like a full disk
    catch_signals(on_signal);
    Writer *w = allocate(1, sizeof *w);
    w->path = target_of(path, directory);
    char *name = NULL;
    struct stat st;
    for (int id = getpid(); !name || !lstat(name, &st); id++) { // of an earlier process of this id
        free(name);
        name = format_text("%s.%d.tmp", w->path, id);
    }
    create(w, name, directory);
    return w;
}

/* The header of the newest file, and the place in it of each tensor; metadata is a JSON object. */
static void put_header(Writer *w, const char *metadata, const Tensor *tensors, int n) {
    char *header;
    size_t length, data_bytes = 0;
    FILE *out = open_memstream(&header, &length);
    if (!out) die("out of memory");
    fprintf(out, "{\"__metadata__\":%s", metadata);
    for (int i = 0; i < n; i++) put_tensor(out, &tensors[i], &data_bytes);
    fprintf(out, "}");
    while ((8 + ftell(out)) % 4096 && fputc(' ', out) == ' ') {
    }
    if (ferror(out) || fclose(out) || !header) die("out of memory");
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint64_t)length >> 8 * i;
    write_at(w, w->n_files - 1, prefix, 8, 0);
    write_at(w, w->n_files - 1, header, length, 8);
    free(header);
    w->slots = realloc(w->slots, (w->n + n + 1) * sizeof *w->slots);
    if (!w->slots) die("out of memory");
    size_t offset = 8 + length;
    for (int i = 0; i < n; i++) {
        w->slots[w->n++] = (struct Slot){format_text("%s", tensors[i].name), w->n_files - 1, offset,
                                         tensors[i].bytes, false};
        offset += tensors[i].bytes;
    }
    qsort(w->slots, w->n, sizeof *w->slots, by_slot_name);
    w->bytes += offset;
}

/* Where a tensor stands in its file: whole multiples of 256 bytes first, which keep each other
 * aligned; then the small rest by size of element, for the same reason; texts last. */
static int place_of(const Tensor *t) {
    if (t->dtype == U8 && t->n_dims == 1) return 5;
    if (t->bytes % 256 == 0) return 0;
    size_t size = dtype_size(t->dtype);
    return size == 8 ? 1 : size == 4 ? 2 : size == 2 ? 3 : 4;
}

static Tensor *in_place(const Tensor *tensors, int n) {
    Tensor *ordered = allocate(n + 1, sizeof *ordered);
    for (int place = 0, m = 0; place <= 5; place++)
        for (int i = 0; i < n; i++)
            if (place_of(&tensors[i]) == place) ordered[m++] = tensors[i];
    return ordered;
}

int checkpoint_texts(const Checkpoint *c, Tensor texts[1 + N_CHAT_FILES]) {
    int n = 0;
    if (c->tokenizer) texts[n++] = text_tensor("tokenizer.json", c->tokenizer, c->tokenizer_bytes);
    for (int i = 0; i < N_CHAT_FILES; i++)
        if (c->chat_files[i].data) texts[n++] = c->chat_files[i];
    return n;
}

Writer *writer_open(const char *path, const Checkpoint *c, const char *quantization,
                    const Tensor *tensors, int n) {
    Tensor texts[1 + N_CHAT_FILES], *all = in_place(tensors, n);
    int n_texts = checkpoint_texts(c, texts);
    all = realloc(all, (n + n_texts + 1) * sizeof *all);
    if (!all) die("out of memory");
    memcpy(all + n, texts, n_texts * sizeof *all);
    char *metadata;
    size_t bytes;
    FILE *out = open_memstream(&metadata, &bytes);
    if (!out) die("out of memory");
    fprintf(out, "{\"format\":\"qqq\",\"version\":\"1\"");
    put_metadata(out, "quantization", quantization);
    put_metadata(out, "config", c->config);
    put_metadata(out, "generation_config", c->generation_config);
    fprintf(out, "}");
    if (ferror(out) || fclose(out) || !metadata) die("out of memory");

    Writer *w = writer_new(path, false);
    put_header(w, metadata, all, n + n_texts);
    for (int i = 0; i < n_texts; i++) writer_put(w, texts[i].name, texts[i].data, texts[i].bytes);
    free(metadata);
    free(all);
    return w;
}

Writer *writer_open_text(const char *path) {
    return writer_new(path, false);
}

Writer *writer_open_directory(const char *path, size_t shard_bytes, const Tensor *tensors, int n) {
    // Shard s has tensors first[s] .. first[s + 1] - 1.
    int *first = allocate(n + 2, sizeof *first), n_shards = 0;
    size_t bytes = 0, total = 0;
    for (int i = 0; i < n; i++) {
        if (i == 0 || bytes + tensors[i].bytes > shard_bytes) first[n_shards++] = i, bytes = 0;
        bytes += tensors[i].bytes;
        total += tensors[i].bytes;
    }
    first[n_shards] = n;

    Writer *w = writer_new(path, true);
    char *index;
    size_t index_bytes;
    FILE *out = open_memstream(&index, &index_bytes);
    if (!out) die("out of memory");
    fprintf(out, "{\n  \"metadata\": {\"total_size\": %zu},\n  \"weight_map\": {\n", total);
    for (int s = 0; s < n_shards; s++) {
        char name[64] = "model.safetensors";
        if (n_shards > 1)
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, n_shards);
        create(w, format_text("%s/%s", temporaries[0], name), false);
        Tensor *shard = in_place(tensors + first[s], first[s + 1] - first[s]);
        put_header(w, "{\"format\":\"pt\"}", shard, first[s + 1] - first[s]);
        free(shard);
        for (int i = first[s]; i < first[s + 1]; i++)
            fprintf(out, "    \"%s\": \"%s\"%s\n", tensors[i].name, name, i < n - 1 ? "," : "");
    }
    fprintf(out, "  }\n}\n");
    if (ferror(out) || fclose(out) || !index) die("out of memory");
    if (n_shards > 1) writer_text(w, "model.safetensors.index.json", index, index_bytes);
    free(index);
    free(first);
    return w;
}

void writer_text(Writer *w, const char *name, const char *text, size_t bytes) {
    if (name) create(w, format_text("%s/%s", temporaries[0], name), false);
    write_at(w, w->n_files - 1, text, bytes, 0);
    w->bytes += bytes;
}

void writer_put(Writer *w, const char *name, const void *data, size_t bytes) {
    const struct Slot key = {.name = (char *)name};
    struct Slot *slot = bsearch(&key, w->slots, w->n, sizeof key, by_slot_name);
    if (!slot || slot->written || slot->bytes != bytes)
        die("%s: tensor %s with %zu bytes was not announced", w->path, name, bytes);
    write_at(w, slot->file, data, bytes, slot->offset);
    slot->written = true;
}

size_t writer_close(Writer *w) {
    for (int i = 0; i < w->n; i++) {
        if (!w->slots[i].written) die("%s: tensor %s is missing", w->path, w->slots[i].name);
        free(w->slots[i].name);
    }
    for (int i = 0; i < w->n_files; i++)
        if (fsync(w->fds[i]) || close(w->fds[i]))
            die("%s: cannot be written: %s", w->path, strerror(errno));
    sigset_t before = block_signals(); // one comes before the renaming, with a message, or after
    if (rename(temporaries[0], w->path)) die("%s: cannot be written: %s", w->path, strerror(errno));
    while (n_temporaries) free(temporaries[--n_temporaries]);
    catch_signals(SIG_DFL);
    sigprocmask(SIG_SETMASK, &before, NULL);
    size_t bytes = w->bytes;
    free(w->slots);
    free(w->fds);
    free(w->path);
    free(w);
    return bytes;
}
