/* The harness of test.h and the list of tests. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

static char running[200];   // the test that is on, empty before the first
static const char *skipped; // why it is skipped, or NULL
static bool failed;
static int n_passed, n_failed, n_skipped;

static struct {
    const char *name;
    int n;
} classes[32]; // [n_classes] of bad input
static int n_classes;

static void finish(void) {
    if (!*running) return;
    if (failed) n_failed++, printf("FAIL %s\n", running);
    else if (skipped) n_skipped++, printf("skip %s: %s\n", running, skipped);
    else n_passed++, printf("ok   %s\n", running);
    fflush(stdout);
    *running = 0;
}

void test_begin(const char *name) {
    finish();
    snprintf(running, sizeof running, "%s", name);
    skipped = NULL;
    failed = false;
}

bool check(bool ok, const char *format, ...) {
    if (ok) return true;
    va_list args;
    va_start(args, format);
    printf("     ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    failed = true;
    return false;
}

void test_skip(const char *why) {
    skipped = why;
}

void count_bad_input(const char *class) {
    int i = 0;
    while (i < n_classes && strcmp(classes[i].name, class)) i++;
    if (i == n_classes && n_classes++ == sizeof classes / sizeof *classes) die("too many classes");
    classes[i].name = class;
    classes[i].n++;
}

int test_end(void) {
    finish();
    int n_bad = 0;
    for (int i = 0; i < n_classes; i++) {
        printf("bad input, %s: %d\n", classes[i].name, classes[i].n);
        n_bad += classes[i].n;
    }
    if (n_bad) printf("bad input, all classes: %d\n", n_bad);
    printf("%d passed, %d failed", n_passed, n_failed);
    if (n_skipped) printf(", %d skipped", n_skipped);
    printf("\n");
    return n_failed > 0;
}

char *read_file(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *bytes = ftell(f);
    rewind(f);
    char *data = allocate(*bytes + 1, 1);
    size_t got = fread(data, 1, *bytes, f);
    fclose(f);
    if (got != *bytes) die("%s: could not be read", path);
    return data;
}

void write_file(const char *path, const void *data, size_t bytes) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f)) die("%s: not written", path);
}

bool exists(const char *path) {
    return access(path, F_OK) == 0;
}

int run_command(const char *command, char *out, size_t out_size) {
    char *line;
    if (asprintf(&line, "{ %s\n} 2>&1 </dev/null", command) < 0) die("out of memory");
    FILE *f = popen(line, "r");
    if (!f) die("sh could not be run");
    size_t n = fread(out, 1, out_size - 1, f);
    out[n] = 0;
    char rest[4096];
    while (fread(rest, 1, sizeof rest, f)) {
    }
    int status = pclose(f);
    free(line);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

char output[1 << 16];

int shell(const char *format, ...) {
    char *line, *command;
    va_list args;
    va_start(args, format);
    if (vasprintf(&line, format, args) < 0 ||
        asprintf(&command, "QUANTIZE=./quantize RUN=./run\n%s", line) < 0)
        die("out of memory");
    va_end(args);
    int status = run_command(command, output, sizeof output);
    free(line);
    free(command);
    return status;
}

bool dies(void (*f)(void *), void *arg, char *message, size_t size) {
    int ends[2];
    if (pipe(ends)) die("no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("no fork");
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        f(arg);
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    ssize_t got;
    char rest[4096];
    while ((got = n + 1 < size ? read(ends[0], message + n, size - 1 - n)
                               : read(ends[0], rest, sizeof rest)) > 0)
        if (n + 1 < size) n += got;
    message[n] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    const char *newline = strchr(message, '\n');
    return WIFEXITED(status) && (WEXITSTATUS(status) == 1 || WEXITSTATUS(status) == 2) && newline &&
           !newline[1];
}

double model_perplexity(const Model *m, const int *tokens, int n, int length, int max_windows,
                        int *windows, void (*progress)(int done, int total)) {
    Engine *e = engine_new(m, false, 16);
    Perplexity p = perplexity(e, tokens, n, length, max_windows, progress);
    e->free(e);
    if (windows) *windows = p.windows;
    return p.mean;
}

float random_float(uint64_t *seed) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (int32_t)(*seed >> 32) * 0x1p-31f;
}

/* Without arguments all quick suites; a name runs that suite alone. */
int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
        bool quick;
    } suites[] = {{"tokenizer", test_tokenizer, true},
                  {"files", test_files, true},
                  {"forward", test_forward, true},
                  {"quantize", test_quantize, true},
                  {"export", test_export, true},
                  {"run", test_run, true},
                  {"zeroshot", test_zeroshot, true},
                  {"chat", test_chat_program, true},
                  {"neighbours", test_neighbours, true},
                  {"faults", test_faults, false},
                  {"slow", test_slow, false},
                  {"slow", test_quantize_slow, false},
                  {"slow", test_zeroshot_slow, false},
                  {"gpu", test_gpu, false},
                  {"gpu-quantize", test_gpu_quantize, false}};
    if (system("mkdir -p build/test")) die("build/test: cannot be made");
    for (int i = 1; i < NSIG; i++) signal(i, SIG_DFL); // nohup and background jobs ignore some
    for (size_t i = 0; i < sizeof suites / sizeof *suites; i++)
        if (argc > 1 ? !strcmp(argv[1], suites[i].name) : suites[i].quick) suites[i].run();
    return test_end();
}
