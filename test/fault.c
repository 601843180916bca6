/* A shared object for LD_PRELOAD that lets one call fail, for the tests of test_faults.c:
 *
 *   FAULT_KIND=memory|disk   allocations and mappings, or what writes, syncs, links and renames
 * files FAULT_AT=N               the N-th call of that kind fails; 0: none FAULT_COUNT=FILE gets
 * the number of calls, if the program ends by itself FAULT_NAMED=1            no file can be opened
 * without a name, as on some file systems
 *
 * It needs glibc, whose own allocator has names beside malloc's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t bytes);

static int n_calls;

/* Whether this call is the one; 'm' for memory, 'd' for disk. */
static bool fails(char kind) {
    const char *wanted = getenv("FAULT_KIND"), *at = getenv("FAULT_AT");
    if (!wanted || *wanted != kind) return false;
    int n = __atomic_add_fetch(&n_calls, 1, __ATOMIC_RELAXED);
    errno = kind == 'm' ? ENOMEM : ENOSPC;
    return at && n == atoi(at);
}

__attribute__((destructor)) static void write_count(void) {
    const char *path = getenv("FAULT_COUNT");
    char text[16];
    int n = n_calls, fd = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666) : -1;
    n = snprintf(text, sizeof text, "%d\n", n);
    if (fd >= 0 && write(fd, text, n) != n) abort();
}

void *malloc(size_t bytes) {
    return fails('m') ? NULL : __libc_malloc(bytes);
}

void *calloc(size_t count, size_t size) {
    return fails('m') ? NULL : __libc_calloc(count, size);
}

void *realloc(void *block, size_t bytes) {
    return fails('m') ? NULL : __libc_realloc(block, bytes);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    return fails('m') ? MAP_FAILED : real(at, bytes, protection, flags, fd, offset);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
    return fails('d') ? -1 : real(fd, data, bytes, offset);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return fails('d') ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return fails('d') ? -1 : real(from, to);
}

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags) {
    int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
    return fails('d') ? -1 : real(from_directory, from, to_directory, to, flags);
}

int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    return fails('d') ? -1 : real(path, mode);
}

int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
    va_end(args);
    bool nameless = (flags & O_TMPFILE) == O_TMPFILE;
    if (nameless && getenv("FAULT_NAMED")) return errno = EOPNOTSUPP, -1;
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    return (nameless || flags & O_CREAT) && fails('d') ? -1 : real(path, flags, mode);
}
