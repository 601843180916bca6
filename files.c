/* Plumbing: what a first reader of QQQ may skip. From top to bottom:
 *
 *   1  errors, options, progress, files that are written
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
#include <utf8proc.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "files.h"

/* ---- 1 errors, options, progress, files that are written ---- */

/* A name from a file may hold anything; it stays on its line. */
static void make_printable(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f) *text = '?';
}

static void remove_unfinished(void);

static void end_with(int status, const char *format, va_list args) {
    static char text[8192]; // there may be no memory to allocate
    vsnprintf(text, sizeof text, format, args);
    make_printable(text);
    fprintf(stderr, "error: %s\n", text);
    remove_unfinished();
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

void show_progress(const char *what, int done, int total, double seconds_left) {
    static double said; // when the newest line was; 0: nothing is at work
    char left[64] = "";
    if (seconds_left >= 0) snprintf(left, sizeof left, ", %.0f s left", seconds_left);
    // 1. On a terminal: a bar, drawn over the one before.
    if (isatty(STDERR_FILENO)) {
        int width = 40 * done / total;
        fprintf(stderr, "\r[%.*s%*s] %d of %d %s%s\033[K%s", width,
                "########################################", 40 - width, "", done, total, what, left,
                done == total ? "\n" : "");
        return;
    }
    // 2. In a pipe: the first line, the last, and between them one every 5 s.
    bool first = !said, last = done == total;
    if (!first && !last && seconds() - said < 5) return;
    fprintf(stderr, "%d of %d %s%s\n", done, total, what, left);
    said = last ? 0 : seconds();
}

void show_windows(int done, int total) {
    show_progress("windows", done, total, -1);
}

/* What is being written. Its files have no name (O_TMPFILE) until they are complete, so that
 * whatever ends the program leaves nothing. Where the file system or the lack of /proc forbids
 * that, they have their temporary names from the start, and die() removes them. */
struct Output {
    char *path;      // where it will appear
    char *temporary; // beside it: the name just before
    bool directory;
    bool named; // the files have names, under `temporary`
    int n;
    struct {
        int fd;
        char *name; // under which it is complete: `temporary`, or of a directory a file in it
    } * files;      // [n]
};

static Output *unfinished;

static void remove_unfinished(void) {
    if (!unfinished || !unfinished->named) return;
    for (int i = 0; i < unfinished->n; i++) unlink(unfinished->files[i].name);
    if (unfinished->directory) rmdir(unfinished->temporary);
}

static void die_unwritten(const Output *o) {
    die("%s: cannot be written: %s", o->path, strerror(errno));
}

/* The path that is made or replaced: a link is followed, and its target must be there. Refused are
 * what is no regular file, or no directory, and a file that stdout or stderr goes to. */
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

/* A file without a name in the directory that `path` is in, or -1. */
static int open_nameless(const char *path) {
    const char *slash = strrchr(path, '/');
    int bytes = slash ? slash - path + 1 : 0;
    char *directory = format_text("%.*s.", bytes, path); // "." is the current one
    bool can = !access("/proc/self/fd", X_OK);           // where name_file() finds it
    int fd = can ? open(directory, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666) : -1;
    free(directory);
    return fd;
}

Output *output_open(const char *path, bool directory) {
    signal(SIGXFSZ, SIG_IGN); // a file size limit then fails like a full disk
    Output *o = allocate(1, sizeof *o);
    *o = (Output){.path = target_of(path, directory), .directory = directory};
    struct stat st; // a name that no other process has left
    for (int id = getpid(); !o->temporary || !lstat(o->temporary, &st); id++) {
        free(o->temporary);
        o->temporary = format_text("%s.%d.tmp", o->path, id);
    }
    int fd = open_nameless(o->path);
    o->named = fd < 0;
    if (fd >= 0) close(fd);
    if (directory && o->named && mkdir(o->temporary, 0777)) die_unwritten(o);
    unfinished = o;
    if (!directory) output_add(o, NULL);
    return o;
}

int output_add(Output *o, const char *name) {
    o->files = realloc(o->files, (o->n + 1) * sizeof *o->files);
    if (!o->files) die("out of memory");
    char *full = format_text(name ? "%s/%s" : "%s", o->temporary, name);
    int fd = o->named ? open(full, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)
                      : open_nameless(o->path);
    if (fd < 0) die_unwritten(o);
    o->files[o->n].fd = fd;
    o->files[o->n].name = full;
    return o->n++;
}

void output_write(const Output *o, int file, const void *data, size_t bytes, size_t offset) {
    for (size_t done = 0; done < bytes;) {
        int fd = o->files[file].fd;
        ssize_t n = pwrite(fd, (const char *)data + done, bytes - done, offset + done);
        if (n == 0) errno = ENOSPC;
        if (n <= 0) die_unwritten(o);
        done += n;
    }
}

/* Gives a file without a name its name. */
static bool name_file(int fd, const char *name) {
    char nameless[32];
    snprintf(nameless, sizeof nameless, "/proc/self/fd/%d", fd);
    return !linkat(AT_FDCWD, nameless, AT_FDCWD, name, AT_SYMLINK_FOLLOW);
}

void output_close(Output *o) {
    // 1. All bytes reach the disk.
    for (int i = 0; i < o->n; i++)
        if (fsync(o->files[i].fd)) die_unwritten(o);
    // 2. What has no name gets the temporary one.
    bool nameless = !o->named;
    if (nameless && o->directory && mkdir(o->temporary, 0777)) die_unwritten(o);
    o->named = true; // from here on die() removes it
    for (int i = 0; i < o->n; i++) {
        if (nameless && !name_file(o->files[i].fd, o->files[i].name)) die_unwritten(o);
        if (close(o->files[i].fd)) die_unwritten(o);
    }
    // 3. In one step it replaces what was there before.
    if (rename(o->temporary, o->path)) die_unwritten(o);
    unfinished = NULL;
    for (int i = 0; i < o->n; i++) free(o->files[i].name);
    free(o->files);
    free(o->temporary);
    free(o->path);
    free(o);
}

/* ---- 2 JSON ---- */

struct Json {
    const char *name, *text;
    jsmntok_t *tokens; // [n] in the order of the text; a key is the parent of its value
    int n;
};

enum { MAX_JSON = 100000000, MAX_DEPTH = 127 }; // the safetensors library's limits

/* jsmn is lenient, so each text is checked before jsmn splits it: it must be JSON as RFC 8259 and
 * the safetensors library define it. Strings are UTF-8 without half surrogate pairs. */
typedef struct {
    const char *at, *end; // `at` moves on, and stops where the text is wrong
} Cursor;

/* Passes over white space. Returns the byte after it, 0 at the end. */
static char next_char(Cursor *c) {
    while (c->at < c->end && *c->at && strchr(" \t\n\r", *c->at)) c->at++;
    return c->at < c->end ? *c->at : 0;
}

/* Passes over the word, if the text goes on with it. */
static bool skip(Cursor *c, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, word, n)) return false;
    return c->at += n;
}

/* The bytes of the UTF-8 character at s, below 1 if there is none. */
static int utf8_bytes(const char *s, const char *end) {
    utf8proc_int32_t code;
    return utf8proc_iterate((const uint8_t *)s, end - s, &code);
}

/* The code unit of the escape \uXXXX at s, -1 if there is none. */
static int unicode_escape(const char *s, const char *end) {
    char digits[5] = {0};
    if (end - s < 6 || s[0] != '\\' || s[1] != 'u') return -1;
    memcpy(digits, s + 2, 4);
    bool hexadecimal = strspn(digits, "0123456789abcdefABCDEF") == 4;
    return hexadecimal ? (int)strtol(digits, NULL, 16) : -1;
}

/* The bytes of the escape at s: 2 of \n, 6 of \u0041, 12 of a surrogate pair; 0 if it is none. */
static int escape_bytes(const char *s, const char *end) {
    if (end - s > 1 && s[1] && strchr("\"\\/bfnrt", s[1])) return 2;
    int unit = unicode_escape(s, end);
    if (unit < 0xd800 || unit > 0xdfff) return unit < 0 ? 0 : 6;
    int second = unicode_escape(s + 6, end);
    return unit < 0xdc00 && second >= 0xdc00 && second <= 0xdfff ? 12 : 0;
}

static bool valid_string(Cursor *c) {
    if (next_char(c) != '"') return false;
    for (c->at++; c->at < c->end && *c->at != '"';) {
        bool escape = *c->at == '\\', control = (unsigned char)*c->at < ' ';
        int bytes = escape ? escape_bytes(c->at, c->end) : utf8_bytes(c->at, c->end);
        if (bytes < 1 || control) return false;
        c->at += bytes;
    }
    return skip(c, "\"");
}

static bool valid_digits(Cursor *c) {
    const char *first = c->at;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9') c->at++;
    return c->at > first;
}

static bool valid_number(Cursor *c) {
    skip(c, "-");
    const char *first = c->at;
    if (!valid_digits(c) || (*first == '0' && c->at - first > 1)) return false;
    if (skip(c, ".") && !valid_digits(c)) return false;
    if (!skip(c, "e") && !skip(c, "E")) return true;
    if (!skip(c, "+")) skip(c, "-");
    return valid_digits(c);
}

static bool valid_value(Cursor *c, int depth) {
    char open = next_char(c), close = open == '{' ? '}' : ']';
    if (open == '"') return valid_string(c);
    if (skip(c, "true") || skip(c, "false") || skip(c, "null")) return true;
    if (open != '{' && open != '[') return valid_number(c);
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
    static const char types[] = {
        [JSMN_OBJECT] = '{', [JSMN_ARRAY] = '[', [JSMN_STRING] = '"', [JSMN_PRIMITIVE] = 'p'};
    return node < 0 ? 0 : types[j->tokens[node].type];
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
    if (json_type(j, node) != '{') return -1;
    for (int i = json_first(j, node); i >= 0; i = json_next(j, node, i))
        if (json_is(j, i, key)) return i + 1;
    return -1;
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
            // A byte that means itself.
            *o++ = *s++;
        } else if (s[1] != 'u') {
            // A short escape.
            const char *from = "bfnrt", *to = "\b\f\n\r\t", *found = strchr(from, s[1]);
            *o++ = found ? to[found - from] : s[1];
            s += 2;
        } else {
            // \uXXXX, or two that are one character: json_parse() has checked that.
            uint32_t c = unicode_escape(s, end);
            s += 6;
            if (c >= 0xd800 && c < 0xdc00) {
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

/* Opens a regular file of at least one byte. An absent file is an error, or -1 if it is optional.
 * O_NONBLOCK: a FIFO is refused, not waited for. */
static int open_file(const char *path, bool optional, size_t *bytes) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && optional && errno == ENOENT) return -1;
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: not a regular file", path);
    if (st.st_size == 0) die("%s: the file is empty", path);
    *bytes = st.st_size;
    return fd;
}

/* Maps a file read-only; takes over `path`. An absent file is an error, or {0} if it is optional.
 */
static Mapping map_file(char *path, bool optional) {
    size_t bytes;
    int fd = open_file(path, optional, &bytes);
    if (fd < 0) return free(path), (Mapping){0};
    void *data = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    return (Mapping){path, data, bytes};
}

/* Reads a file, malloc'ed with a NUL behind. An absent one is an error, or NULL if optional. */
static char *read_file(const char *path, bool optional, size_t *bytes) {
    int fd = open_file(path, optional, bytes);
    if (fd < 0) return NULL;
    char *text = allocate(*bytes + 1, 1);
    for (size_t done = 0; done < *bytes;) {
        ssize_t n = read(fd, text + done, *bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) die("%s: %s", path, strerror(errno));
        if (n == 0) die("%s: it was cut while it was read", path);
        done += n;
    }
    close(fd);
    return text;
}

char *read_text(const char *path, size_t *bytes) {
    return read_file(path, false, bytes);
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

/* A text of MODEL's directory. */
static char *text_in(const char *directory, const char *name, bool optional) {
    size_t bytes;
    char *path = format_text("%s/%s", directory, name), *text = read_file(path, true, &bytes);
    if (!text && !optional) die_missing(directory, name);
    free(path);
    return text;
}

const char *const chat_file_names[N_CHAT_FILES] = {"tokenizer_config.json", "chat_template.jinja",
                                                   "special_tokens_map.json"};

static Tensor text_tensor(const char *name, const char *data, size_t bytes) {
    return (Tensor){(char *)name, U8, 1, {bytes}, data, bytes, NULL};
}

static void open_qqq(Checkpoint *c);

static void open_directory(Checkpoint *c) {
    c->config = text_in(c->path, "config.json", false);
    c->generation_config = text_in(c->path, "generation_config.json", true);
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
    Mapping index = map_file(format_text("%s/model.safetensors.index.json", c->path), true);
    if (index.data) {
        add_shards(c, *add_mapping(c, index));
    } else {
        Mapping single = map_file(format_text("%s/model.safetensors", c->path), true);
        if (!single.data) die_missing(c->path, "model.safetensors");
        json_free(add_safetensors(c, *add_mapping(c, single)));
        sort_tensors(c);
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
    char *config = format_text("%s/config.json", path), *ref = format_text("%s/refs/main", path);
    char *folder = format_text("%s/snapshots", path), *revision = NULL;
    DIR *snapshots = access(config, F_OK) ? opendir(folder) : NULL;
    size_t bytes;
    if (snapshots) revision = read_file(ref, true, &bytes);
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
    free(ref);
    free(folder);
    return found;
}

Checkpoint *checkpoint_open(const char *path) {
    Checkpoint *c = allocate(1, sizeof *c);
    c->path = model_path(path);
    if (is_directory(c->path)) open_directory(c);
    else open_model_bin(c);
    return c;
}

void checkpoint_close(Checkpoint *c) {
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

Config config_parse(const char *path, const char *config, const char *generation_config) {
    char *name = format_text("%s: config.json", path);
    Json *j = json_parse(name, config, strlen(config));
    config_expect(j, 0, "model_type", "llama");
    int quantization = json_get(j, 0, "quantization_config");
    if (!json_absent(j, quantization))
        die("%s: quantization_config, quant_method %s: the weights are quantized already, and not "
            "by this program",
            name, shown(j, json_get(j, quantization, "quant_method")));
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

    // transformers 5 moved rope_theta and rope_scaling's content into rope_parameters.
    int rope = json_get(j, 0, "rope_parameters");
    bool parameters = !json_absent(j, rope);
    if (!parameters) rope = json_get(j, 0, "rope_scaling");
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
    if (c.bos >= c.vocab_size)
        die("%s: bos_token_id %d is outside the vocabulary of %d", name, c.bos, c.vocab_size);
    add_all_eos(&c, j);
    json_free(j);
    free(name);
    if (generation_config) {
        name = format_text("%s: generation_config.json", path);
        j = json_parse(name, generation_config, strlen(generation_config));
        if (json_type(j, 0) != '{') die("%s: no JSON object", name);
        add_all_eos(&c, j);
        json_free(j);
        free(name);
    }
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
} Loading;

/* One tensor of a model from its file. */
static void load_tensor(void *to, const Parameter *p) {
    const Loading *loading = to;
    const Tensor *t = need(loading->checkpoint, p);
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

Model *model_load(const Checkpoint *checkpoint) {
    Config c = config_parse(checkpoint->path, checkpoint->config, checkpoint->generation_config);
    // A tied lm_head that rotation or its 8 bits untied stands in the file all the same.
    const Tensor *head = checkpoint_find(checkpoint, "lm_head.weight");
    if (head) c.tied = false;
    Model *m = model_new(&c, quantization_group_size(checkpoint));
    if (head && head->dtype == I8 && m->group_size) m->lm_head.dtype = I8;
    check_group_size(checkpoint->path, &c, m->group_size);
    Loading loading = {checkpoint, m->group_size};
    for_each_tensor(m, -1, c.n_layers, load_tensor, &loading);
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
    if (!checkpoint->quantization) return;
    char *made = format_text("%s", checkpoint->quantization);
    make_printable(made);
    fprintf(stderr, "made with %s\n", made);
    free(made);
}

Tokenizer *checkpoint_tokenizer(const Checkpoint *c, int vocab_size) {
    if (!c->tokenizer) die("%s: it has no tokenizer.json", c->path);
    char *name = format_text("%s: tokenizer.json", c->path);
    Tokenizer *t = tokenizer_load(name, c->tokenizer, c->tokenizer_bytes);
    if (tokenizer_size(t) > vocab_size)
        die("%s: its tokenizer has %d tokens, its embedding only %d rows", c->path,
            tokenizer_size(t), vocab_size);
    free(name);
    return t;
}

int *text_tokens(const Checkpoint *c, int bos, const char *path, int *n) {
    Tokenizer *tokenizer = checkpoint_tokenizer(c, INT_MAX);
    size_t bytes;
    char *text = read_text(path, &bytes);
    int *ids = tokenizer_encode(tokenizer, text, bytes, true, n);
    if (bos >= 0) {
        ids = realloc(ids, (*n + 1) * sizeof *ids);
        if (!ids) die("out of memory");
        memmove(ids + 1, ids, (*n)++ * sizeof *ids);
        ids[0] = bos;
    }
    free(text);
    tokenizer_free(tokenizer);
    return ids;
}

void print_perplexity(const Checkpoint *c, Engine *e, const char *where, const char *label,
                      const char *path, int length) {
    const Config *config = &e->model->config;
    if (!length) length = config->max_context < 2048 ? config->max_context : 2048;
    int n, *tokens = text_tokens(c, config->bos, path, &n);
    if (n < length) die("%s: it has %d tokens, a window needs %d (-l sets it)", path, n, length);
    if (where) describe_model(c, e->model, where);
    Perplexity p = perplexity(e, tokens, n, length, 0, show_windows);
    free(tokens);
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
 *   NAME.s_group   F16 [K/128][N]   permuted; per channel [0]
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
    bool groups = l->s_group != NULL;
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
        s_channel[i] = groups ? l->s_channel[n] : l->s_channel[n] / 16;
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

/* The inverse: B [K/16][2 N] and the scales beside it become the tensors of a model.bin, but for
 * their names, in memory of their own. */
static void qqq_unpack(Checkpoint *c, Tensor *B, bool groups) {
    char *name = format_text("%.*s", (int)strlen(B->name) - 2, B->name);
    size_t K = 16 * B->shape[0], N = B->shape[1] / 2;
    if (B->dtype != I32 || B->n_dims != 2 || N % 64 || K % (groups ? GROUP : 64) || N > 1 << 24 ||
        K > 1 << 24)
        die("%s: tensor %s is no I32 [K / 16][2 N] with N a multiple of 64, K of %d", B->path,
            B->name, groups ? GROUP : 64);
    Tensor *channel = find_part(c, name, ".s_channel", F32, 1, N), *group = NULL;
    if (groups) group = find_part(c, name, ".s_group", F16, K / GROUP, N);
    free(name);
    size_t bytes = N * K / 2 + N * sizeof(float) + (groups ? N * K / GROUP : 0);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("out of memory: %zu bytes were asked for", bytes);
    add_mapping(c, (Mapping){format_text("%s", B->path), memory, bytes});
    uint8_t *qweight = memory, *s_group = qweight + N * K / 2 + N * sizeof(float);
    float *s_channel = (void *)(qweight + N * K / 2);

    QqqOrder order = qqq_order(groups);
    const uint8_t *codes = B->data;
    int lowest = 15;
#pragma omp parallel for reduction(min : lowest)
    for (size_t run = 0; run < N * K / 1024; run++) // no two share a byte of qweight
        for (size_t i = 0; i < 1024; i++) {
            size_t n = run % (N / 64) * 64 + order.n[i], k = run / (N / 64) * 16 + order.k[i];
            int code = codes[run * 512 + i / 2] >> 4 * (i % 2) & 15, u = groups ? code : code ^ 8;
            qweight[n * (K / 2) + k / 2] |= u << 4 * (k % 2);
            lowest = u < lowest ? u : lowest;
        }
    if (!groups && lowest == 0)
        die("%s: tensor %s holds the code -8, per channel -7 to 7 are expected", B->path, B->name);
    for (size_t i = 0; i < N; i++) {
        float scale;
        floats(channel->data, F32, i, 1, &scale);
        s_channel[i / 32 * 32 + order.s_channel[i % 32]] = groups ? scale : scale * 16;
    }
    for (size_t i = 0; groups && i < N * K / GROUP; i++) {
        float scale;
        floats(group->data, F16, i, 1, &scale);
        if (!(scale >= 1 && scale <= 15 && scale == rintf(scale)))
            die("%s: tensor %s holds the scale %g; a model.bin's are whole numbers, 1 to 15",
                group->path, group->name, scale);
        size_t n = i % N / 64 * 64 + order.s_group[i % 64];
        s_group[n * (K / GROUP) + i / N] = scale;
    }
    *B = (Tensor){B->name, U8, 2, {N, K / 2}, qweight, N * K / 2, B->path};
    *channel = (Tensor){channel->name, F32, 1, {N}, s_channel, N * sizeof(float), channel->path};
    if (groups)
        *group = (Tensor){group->name, U8, 2, {N, K / GROUP}, s_group, N * K / GROUP, group->path};
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
        for (int i = 0; i < c->n_tensors; i++) {
            char *suffix = strrchr(c->tensors[i].name, '.');
            if (suffix && !strcmp(suffix, ".B")) qqq_unpack(c, &c->tensors[i], group_size > 0);
        }
        for (int i = 0; i < c->n_tensors; i++) { // once no name is searched for any more
            Tensor *t = &c->tensors[i];
            char *suffix = strrchr(t->name, '.');
            if (!suffix || strcmp(suffix, ".B")) continue;
            char *renamed = format_text("%.*s.qweight", (int)(suffix - t->name), t->name);
            free(t->name);
            t->name = renamed;
        }
        sort_tensors(c);
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
    Output *out;
    int n;
    struct Slot {
        char *name;
        int file;             // of `out`
        size_t offset, bytes; // in the file
        bool written;
    } * slots; // [n] sorted by name
    size_t bytes;
};

static int by_slot_name(const void *a, const void *b) {
    return strcmp(((const struct Slot *)a)->name, ((const struct Slot *)b)->name);
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

void put_json_string(FILE *out, const char *text) {
    fputc('"', out);
    const char *end = text + strlen(text);
    for (const char *s = text; s < end;) {
        int bytes = utf8_bytes(s, end);
        if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else if (bytes < 1) fputs("\\ufffd", out); // not UTF-8
        else if ((unsigned char)*s < ' ') fprintf(out, "\\u%04x", *s);
        else fwrite(s, 1, bytes, out);
        s += bytes < 1 ? 1 : bytes;
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

/* Writes the header of a file, and notes the place of each of the tensors [n] in it; `metadata` is
 * a JSON object. */
static void put_header(Writer *w, int file, const char *metadata, const Tensor *tensors, int n) {
    char *header;
    size_t length, data_bytes = 0;
    FILE *out = open_memstream(&header, &length);
    if (!out) die("out of memory");
    // 1. The entries, then spaces until the data starts at a multiple of 4096 bytes.
    fprintf(out, "{\"__metadata__\":%s", metadata);
    for (int i = 0; i < n; i++) put_tensor(out, &tensors[i], &data_bytes);
    fprintf(out, "}");
    while ((8 + ftell(out)) % 4096 && fputc(' ', out) == ' ') {
    }
    if (ferror(out) || fclose(out) || !header) die("out of memory");
    // 2. The length, little-endian, and the header behind it.
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint64_t)length >> 8 * i;
    output_write(w->out, file, prefix, 8, 0);
    output_write(w->out, file, header, length, 8);
    free(header);
    // 3. The places.
    w->slots = realloc(w->slots, (w->n + n + 1) * sizeof *w->slots);
    if (!w->slots) die("out of memory");
    size_t offset = 8 + length;
    for (int i = 0; i < n; i++) {
        const Tensor *t = &tensors[i];
        w->slots[w->n++] = (struct Slot){format_text("%s", t->name), file, offset, t->bytes, false};
        offset += t->bytes;
    }
    qsort(w->slots, w->n, sizeof *w->slots, by_slot_name);
    w->bytes += offset;
}

/* The order of the tensors in their file: whole multiples of 256 bytes first, which keep each other
 * aligned; then the small rest by size of element, for the same reason; texts last. */
static int rank(const Tensor *t) {
    if (t->dtype == U8 && t->n_dims == 1) return 5;
    if (t->bytes % 256 == 0) return 0;
    size_t size = dtype_size(t->dtype);
    return size == 8 ? 1 : size == 4 ? 2 : size == 2 ? 3 : 4;
}

static Tensor *in_file_order(const Tensor *tensors, int n) {
    Tensor *ordered = allocate(n + 1, sizeof *ordered);
    for (int r = 0, m = 0; r <= 5; r++)
        for (int i = 0; i < n; i++)
            if (rank(&tensors[i]) == r) ordered[m++] = tensors[i];
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
    // 1. The texts of the model come behind the tensors.
    Tensor texts[1 + N_CHAT_FILES], *all = in_file_order(tensors, n);
    int n_texts = checkpoint_texts(c, texts);
    all = realloc(all, (n + n_texts + 1) * sizeof *all);
    if (!all) die("out of memory");
    memcpy(all + n, texts, n_texts * sizeof *all);
    // 2. The metadata says what the file is.
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
    // 3. The header and the texts are written, the tensors follow by writer_put().
    Writer *w = allocate(1, sizeof *w);
    w->out = output_open(path, false);
    put_header(w, 0, metadata, all, n + n_texts);
    for (int i = 0; i < n_texts; i++) writer_put(w, texts[i].name, texts[i].data, texts[i].bytes);
    free(metadata);
    free(all);
    return w;
}

/* Cuts tensors [n] into shards of at most `bytes`, or one tensor that has more: shard s has tensors
 * first[s] .. first[s + 1] - 1. Returns how many there are; first [n + 2] is malloc'ed. */
static int cut_shards(size_t bytes, const Tensor *tensors, int n, int **first) {
    int n_shards = 0;
    size_t full = 0;
    *first = allocate(n + 2, sizeof **first);
    for (int i = 0; i < n; i++) {
        bool fits = i > 0 && full + tensors[i].bytes <= bytes;
        if (!fits) (*first)[n_shards++] = i, full = 0;
        full += tensors[i].bytes;
    }
    (*first)[n_shards] = n;
    return n_shards;
}

Writer *writer_open_directory(const char *path, size_t shard_bytes, const Tensor *tensors, int n) {
    int *first, n_shards = cut_shards(shard_bytes, tensors, n, &first);
    size_t total = 0, index_bytes;
    for (int i = 0; i < n; i++) total += tensors[i].bytes;
    Writer *w = allocate(1, sizeof *w);
    w->out = output_open(path, true);
    char *index;
    FILE *out = open_memstream(&index, &index_bytes);
    if (!out) die("out of memory");
    fprintf(out, "{\n  \"metadata\": {\"total_size\": %zu},\n  \"weight_map\": {\n", total);
    for (int s = 0; s < n_shards; s++) {
        // 1. A file with the header of one shard.
        char name[64] = "model.safetensors";
        if (n_shards > 1)
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, n_shards);
        int n_here = first[s + 1] - first[s];
        Tensor *shard = in_file_order(tensors + first[s], n_here);
        put_header(w, output_add(w->out, name), "{\"format\":\"pt\"}", shard, n_here);
        free(shard);
        // 2. The index says which tensors are in it.
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
    output_write(w->out, output_add(w->out, name), text, bytes, 0);
    w->bytes += bytes;
}

void writer_put(Writer *w, const char *name, const void *data, size_t bytes) {
    const struct Slot key = {.name = (char *)name};
    struct Slot *slot = w->n ? bsearch(&key, w->slots, w->n, sizeof key, by_slot_name) : NULL;
    if (!slot || slot->written || slot->bytes != bytes)
        die("tensor %s with %zu bytes was not announced", name, bytes);
    output_write(w->out, slot->file, data, bytes, slot->offset);
    slot->written = true;
}

size_t writer_close(Writer *w) {
    for (int i = 0; i < w->n; i++) {
        if (!w->slots[i].written) die("tensor %s is missing", w->slots[i].name);
        free(w->slots[i].name);
    }
    output_close(w->out);
    size_t bytes = w->bytes;
    free(w->slots);
    free(w);
    return bytes;
}
