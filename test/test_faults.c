/* Faults: whatever allocation fails, whatever write, whenever the program is stopped, OUT is whole
 * or as it was, and nothing else is left; what fails ends it with status 1 and one line. On a model
 * of two layers; build/fault.so lets calls fail. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

#define SCRATCH "build/test/faults"
#define OUT SCRATCH "/out/model.bin"
#define TOY SCRATCH "/toy"
#define BLOCKS SCRATCH "/blocks" // of shapes that -x qqq can have
#define QQQ SCRATCH "/qqq"       // made of it

/* The number of errors in `output`, of the program or of libgomp. */
static int count_errors(void) {
    int n = 0;
    for (char *line = output; *line; line = strchrnul(line, '\n'), line += *line == '\n')
        n += !strncmp(line, "error: ", 7) || !strncmp(line, "libgomp: ", 9);
    return n;
}

/* OUT is what `expected` is, a file or directory, or absent if that is NULL; nothing is beside it.
 */
static bool out_is(const char *expected) {
    if (!expected) return shell("test -z \"$(ls " SCRATCH "/out)\"") == 0;
    return shell("diff -r " OUT " %s && test \"$(ls " SCRATCH "/out)\" = model.bin", expected) == 0;
}

typedef enum { NOTHING, A_FILE, A_DIRECTORY } Target;

/* Runs the command, which makes of OUT what it says, with each call in turn failing. */
static void each_fault(const char *name, const char *kind, const char *command, Target writes) {
    test_begin(name);
    shell("rm -rf " SCRATCH "/out && mkdir -p " SCRATCH "/out");
    const char *fault = "OMP_NUM_THREADS=1 FAULT_KIND=%s FAULT_COUNT=" SCRATCH
                        "/count FAULT_AT=%d LD_PRELOAD=build/fault.so %s";
    if (!check(shell(fault, kind, 0, command) == 0, "%s: %s", command, output)) return;
    if (writes) shell("rm -rf " SCRATCH "/good.bin && mv " OUT " " SCRATCH "/good.bin");
    size_t bytes;
    char *text = read_file(SCRATCH "/count", &bytes);
    int n = text ? atoi(text) : 0, refused = 0;
    free(text);
    check(n > 2, "only %d calls", n);
    for (int i = 1; i <= n; i++) {
        bool old = writes == A_FILE && i % 2;
        if (old) shell("cp " SCRATCH "/old " OUT);
        int status = shell(fault, kind, i, command), errors = count_errors();
        bool clean = status == 1 ? errors == 1 : status == 0 && errors == 0;
        check(clean, "%s, call %d of %d: status %d: %s", command, i, n, status, output);
        refused += status == 1;
        if (writes) {
            bool good = out_is(SCRATCH "/good.bin"); // also if what comes after it has failed
            check(good || (status && out_is(old ? SCRATCH "/old" : NULL)),
                  "%s, call %d of %d, status %d: OUT is not as it should be: %s", command, i, n,
                  status, output);
            shell("rm -rf " SCRATCH "/out/*");
        }
    }
    printf("     %d calls, %d of them ended the program, %d it could do without\n", n, refused,
           n - refused);
    check(refused > n / 2, "only %d of %d calls ended the program", refused, n);
}

#define GPTQ "./quantize " TOY " " OUT " -g -1 -c " SCRATCH "/text -n 2 -l 16"

#define EXPORT "./quantize " BLOCKS " " OUT " -g -1 -b rtn -a 0 -m 0 -x "

static void test_memory(void) {
    each_fault("out of memory at each allocation: run", "memory",
               "./run " TOY " -i 'a b c' -n 3 -s 1 >/dev/null", NOTHING);
    each_fault("out of memory at each allocation: run, a chat", "memory",
               "./run " TOY " -m chat -i 'a b c' -n 3 -s 1 >/dev/null", NOTHING);
    each_fault("out of memory at each allocation: run -e", "memory",
               "./run " TOY " -l 16 -e " SCRATCH "/text >/dev/null", NOTHING);
    each_fault("out of memory at each allocation: run -x", "memory",
               "./run " TOY " -x " SCRATCH "/text >/dev/null", NOTHING);
    each_fault("out of memory at each allocation: quantize", "memory", GPTQ, A_FILE);
    each_fault("out of memory at each allocation: quantize -b rtn -e", "memory",
               GPTQ " -b rtn -e " SCRATCH "/text", A_FILE);
    each_fault("out of memory at each allocation: quantize -f", "memory",
               "./quantize -f " TOY " " OUT, A_FILE);
    each_fault("out of memory at each allocation: quantize -x vllm", "memory", EXPORT "vllm",
               A_DIRECTORY);
    each_fault("out of memory at each allocation: quantize -x qqq", "memory", EXPORT "qqq",
               A_DIRECTORY);
    each_fault("out of memory at each allocation: quantize, of a QQQ directory", "memory",
               "./quantize " QQQ " " OUT, A_FILE);
}

static void test_disk(void) {
    for (int named = 0; named < 2; named++) { // files without names until they are whole, or with
        if (named) setenv("FAULT_NAMED", "1", 1);
        each_fault(named ? "a full disk, files with names: quantize" : "a full disk: quantize",
                   "disk", GPTQ, A_FILE);
        each_fault(named ? "a full disk, files with names: quantize -f"
                         : "a full disk: quantize -f",
                   "disk", "./quantize -f " TOY " " OUT, A_FILE);
        each_fault(named ? "a full disk, files with names: quantize -x qqq"
                         : "a full disk: quantize -x qqq",
                   "disk", EXPORT "qqq", A_DIRECTORY);
    }
    unsetenv("FAULT_NAMED");
    shell("rm -rf " QQQ " && cp -r " SCRATCH "/good.bin " QQQ);
    test_begin("quantize: a full disk behind stdout");
    check(shell(GPTQ " >/dev/full") == 1 && count_errors() == 1 &&
              strstr(output, "error: stdout: No space left on device"),
          "it says: %s", output);
    check(shell("./quantize -f " TOY " " OUT " >/dev/full") == 1, "-f: it says: %s", output);
    shell("rm -f " SCRATCH "/out/*");
}

/* A child that quantizes to OUT; its messages go to SCRATCH/stderr. */
static pid_t start(void) {
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("no fork");
    if (child) return child;
    int errors = open(SCRATCH "/stderr", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(errors, STDERR_FILENO);
    dup2(errors, STDOUT_FILENO);
    execl("./quantize", "./quantize", TOY, OUT, "-g", "-1", "-c", SCRATCH "/text", "-n", "2", "-l",
          "16", (char *)NULL);
    _exit(127);
}

/* A signal at random moments. Whichever comes first, the signal or the end, OUT is whole or as it
 * was, and nothing is beside it. */
static void test_signal(int number, int tries) {
    char title[100];
    snprintf(title, sizeof title, "quantize: %s at random moments", strsignal(number));
    test_begin(title);
    // 1. How long a run takes, and what it makes.
    uint64_t seed = number;
    shell("rm -f " SCRATCH "/out/*");
    double begin = seconds();
    int status, stopped = 0, finished = 0;
    waitpid(start(), &status, 0);
    check(status == 0, "status %x", status);
    double whole = seconds() - begin;
    shell("mv " OUT " " SCRATCH "/good.bin");
    for (int i = 0; i < tries; i++) {
        // 2. The signal comes at a moment of the run or after it.
        bool old = i % 2;
        if (old) shell("cp " SCRATCH "/old " OUT);
        double moment = seconds() + (1 + random_float(&seed)) / 2 * whole * 1.5;
        pid_t child = start();
        while (seconds() < moment) usleep(200);
        kill(child, number);
        waitpid(child, &status, 0);
        // 3. OUT is the new file or what it was.
        bool killed = WIFSIGNALED(status) && WTERMSIG(status) == number;
        check(killed || status == 0, "try %d: status %x", i, status);
        bool good = out_is(SCRATCH "/good.bin");
        check(good || (killed && out_is(old ? SCRATCH "/old" : NULL)),
              "try %d, status %x: OUT is not as it should be: %s", i, status, output);
        stopped += !good;
        finished += good;
        shell("rm -f " SCRATCH "/out/*");
    }
    printf("     %d stopped, %d had written OUT\n", stopped, finished);
    check(stopped > 0 && finished > 0, "the moments were not spread over the run");
}

/* What the programs write, whichever of the descriptors 0 to 2 are closed. */
static void test_closed(void) {
    static const char *const commands[] = {GPTQ,
                                           "./quantize -f " TOY " " OUT,
                                           EXPORT "vllm",
                                           EXPORT "qqq",
                                           "./run " TOY " -z " SCRATCH "/items -o " OUT,
                                           "./run " TOY " -i a -n 3 -s 1"};
    static const char *const how[] = {"<&-", ">&-", "2>&-"};
    test_begin("each of the descriptors 0 to 2 closed");
    shell("printf '{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0}' >" SCRATCH
          "/items");
    int n = 0;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        for (int closed = 0; closed < 8; closed++, n++) {
            char redirections[32] = "";
            for (int fd = 0; fd < 3; fd++)
                if (closed >> fd & 1) strcat(strcat(redirections, " "), how[fd]);
            int status = shell("rm -rf " SCRATCH "/out/*; { %s; } >" SCRATCH "/stdout 2>" SCRATCH
                               "/stderr %s",
                               commands[i], redirections);
            check(status == 0, "%s%s: status %d", commands[i], redirections, status);
            if (i == 5) continue; // it writes no file
            if (closed)
                check(out_is(SCRATCH "/good.bin"), "%s%s: another OUT", commands[i], redirections);
            else shell("rm -rf " SCRATCH "/good.bin; mv " OUT " " SCRATCH "/good.bin");
        }
    printf("     %d runs\n", n);
    shell("rm -rf " SCRATCH "/out/*");
}

void test_faults(void) {
    shell("rm -rf " SCRATCH " && mkdir -p " SCRATCH "/out");
    write_file(SCRATCH "/old", "old", 3);
    shell("for i in 1 2 3 4 5 6 7 8 9; do echo a b c abc xyz, it is number $i.; done >" SCRATCH
          "/text");
    if (shell("build/synthetic " TOY " --dim 16 --hidden 32 --layers 2 --heads 2 --kv-heads 1 "
              "--vocab 266 --tokenizer test/corpus/tokenizer/chat"))
        die("no model to test with: %s", output);
    shell("sed -i s/131072/64/ " TOY "/config.json"); // short windows for -e
    if (shell("build/synthetic " BLOCKS " --dim 128 --hidden 128 --layers 1 --heads 1 --kv-heads 1 "
              "--vocab 266 --tokenizer test/corpus/tokenizer/chat"))
        die("no model to test with: %s", output);
    test_closed();
    test_signal(SIGINT, 60);
    test_signal(SIGTERM, 60);
    test_signal(SIGKILL, 120);
    test_disk();
    test_memory();
}
