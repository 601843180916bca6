/* The test harness: each test prints "ok   name", "FAIL name" or "skip name: why"; test_end()
 * prints "N passed, N failed, N skipped" last. Tests run from the repository's root. */
#ifndef TEST_H
#define TEST_H

#include "../files.h"

/* Starts a test; the one before it ends here. */
void test_begin(const char *name);

/* A check that does not hold prints the message and fails the running test. Returns `ok`. */
bool check(bool ok, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The running test is skipped, and the line says why. */
void test_skip(const char *why);

/* Counts a case of bad input of this class; test_end() prints how many each has. */
void count_bad_input(const char *class);

/* Ends the last test and prints the count. Returns the exit status: 1 if a test failed. */
int test_end(void);

/* A whole file, malloc'ed, with a NUL behind; NULL if it cannot be read. */
char *read_file(const char *path, size_t *bytes);

/* Writes a whole file; a test's own files go under build/test/. */
void write_file(const char *path, const void *data, size_t bytes);

/* Runs a command line through sh; out [out_size] gets stdout and stderr, cut to fit, with a NUL.
 * Returns the exit status, 128 + the signal's number if one ended it. */
int run_command(const char *command, char *out, size_t out_size);

/* The same for a formatted command line, in which $QUANTIZE and $RUN stand for the programs; what
 * it prints is in `output`. */
extern char output[1 << 16];
int shell(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Calls f(arg) in a process of its own. True if it ended with status 1 or 2 and exactly one line on
 * stderr, which is copied to message [size]. */
bool dies(void (*f)(void *), void *arg, char *message, size_t size);

/* A file is there. */
bool exists(const char *path);

/* Perplexity of tokens [n] on the CPU, as perplexity(); windows may be NULL. */
double model_perplexity(const Model *m, const int *tokens, int n, int length, int max_windows,
                        int *windows, void (*progress)(int done, int total));

/* A reproducible random number in [-1, 1). */
float random_float(uint64_t *seed);

/* The suites, each in the file of its name. */
void test_tokenizer(void);
void test_files(void);
void test_forward(void);
void test_quantize(void);
void test_export(void);
void test_run(void);
void test_neighbours(void);
void test_zeroshot(void);
void test_chat_program(void);
void test_zeroshot_slow(void);
void test_faults(void);
void test_slow(void);
void test_quantize_slow(void);
void test_gpu(void);
void test_gpu_quantize(void);

#endif
