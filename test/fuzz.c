/* Fuzz targets for libFuzzer, which calls LLVMFuzzerTestOneInput() with one input after the other.
 * -DTARGET= one of the functions below makes a program of it; `make fuzz` builds and runs them all.
 *
 * A refused input ends the program through die(). Here it must not: the Makefile has the linker
 * put __wrap__exit() in the place of _exit(), and so on, and a refusal jumps back to the start of
 * the input, where what it left behind is released. An input that is taken must release all. */
#ifndef PROGRAM
#define PROGRAM "../run.c"
#endif
#define main program_main
int program_main(int argc, char **argv);
#include PROGRAM
#undef main

#include <fcntl.h>
#include <sanitizer/allocator_interface.h>
#include <setjmp.h>
#include <sys/mman.h>

/* What does not hold is a find. */
static void require(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "fuzz: it does not hold that %s\n", what);
    abort();
}

/* ---- inputs end here, not the program -------------------------------------------------------- */

static jmp_buf refused;
// Per thread: libFuzzer has a thread of its own, whose memory is none of an input.
static _Thread_local bool running; // an input is being read

// What it has allocated and mapped, in order; NULL where that is released.
static const volatile void *blocks[1 << 20];
static struct {
    void *data;
    size_t bytes;
} maps[1 << 10];
static int n_blocks, n_maps;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((noreturn));
void __real_exit(int status) __attribute__((noreturn));
void __wrap_exit(int status) __attribute__((noreturn));
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *data, size_t bytes);
int __wrap_munmap(void *data, size_t bytes);

void __wrap__exit(int status) {
    if (running) longjmp(refused, 1);
    __real__exit(status);
}

void __wrap_exit(int status) {
    if (running) longjmp(refused, 1);
    __real_exit(status);
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *data = __real_mmap(at, bytes, protection, flags, fd, offset);
    if (running && data != MAP_FAILED) {
        require(n_maps < (int)(sizeof maps / sizeof *maps), "an input maps few files");
        maps[n_maps].data = data;
        maps[n_maps++].bytes = bytes;
    }
    return data;
}

int __wrap_munmap(void *data, size_t bytes) {
    for (int i = 0; i < n_maps; i++)
        if (maps[i].data == data) maps[i] = maps[--n_maps];
    return __real_munmap(data, bytes);
}

static void allocated(const volatile void *block, size_t bytes) {
    (void)bytes;
    if (!running || !block) return;
    if (n_blocks == sizeof blocks / sizeof *blocks) abort();
    blocks[n_blocks++] = block;
}

static void released(const volatile void *block) {
    if (!running) return;
    for (int i = n_blocks; i-- > 0;)
        if (blocks[i] == block) {
            blocks[i] = NULL;
            break;
        }
    while (n_blocks > 0 && !blocks[n_blocks - 1]) n_blocks--;
}

/* ---- files ---------------------------------------------------------------------------------- */

static char directory[] = "/dev/shm/fuzz-XXXXXX"; // of this process
static char *file_path(const char *name) {
    static char path[4][64];
    static int i;
    i = (i + 1) % 4;
    snprintf(path[i], sizeof path[i], "%s/%s", directory, name);
    return path[i];
}

static void put_file(const char *name, const void *data, size_t bytes) {
    int fd = open(file_path(name), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool ok = fd >= 0 && write(fd, data, bytes) == (ssize_t)bytes;
    require(ok && close(fd) == 0, "a scratch file can be written");
}

/* A safetensors file of this header and 4 KB of data. */
static void put_safetensors(const char *name, const void *header, size_t bytes) {
    char *file = calloc(8 + bytes + 4096, 1);
    for (int i = 0; i < 8; i++) file[i] = (char)((uint64_t)bytes >> 8 * i);
    memcpy(file + 8, header, bytes);
    put_file(name, file, 8 + bytes + 4096);
    free(file);
}

static void remove_files(void) {
    static const char *const names[] = {"model.bin",         "config.json",
                                        "model.safetensors", "model.safetensors.index.json",
                                        "1.safetensors",     "2.safetensors"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(file_path(names[i]));
    rmdir(directory);
}

/* ---- targets -------------------------------------------------------------------------------- */

static const char small_config[] =
    "{\"model_type\":\"llama\",\"hidden_act\":\"silu\",\"hidden_size\":4,\"intermediate_size\":2,"
    "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"vocab_size\":4,\"rope_theta\":1e4,"
    "\"max_position_embeddings\":8,\"rms_norm_eps\":1e-5}";

static Tokenizer *tiny; // of target `text`

/* The first byte says what the rest is: 0 a whole model.bin, 1 the header of one, 2 that of a
 * directory's model.safetensors, 3 the index of a directory of two shards. */
static void safetensors(const uint8_t *data, size_t bytes) {
    static const char *const shards[] = {
        "{\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
        "{\"lm_head.weight\":{\"dtype\":\"BF16\",\"shape\":[4,4],\"data_offsets\":[0,32]}}"};
    if (bytes-- == 0) return;
    int kind = *data++ & 3;
    unlink(file_path("model.safetensors.index.json"));
    if (kind == 0) put_file("model.bin", data, bytes);
    if (kind == 1) put_safetensors("model.bin", data, bytes);
    if (kind == 2) put_safetensors("model.safetensors", data, bytes);
    if (kind == 3) put_file("model.safetensors.index.json", data, bytes);
    for (int i = 0; kind == 3 && i < 2; i++)
        put_safetensors(i ? "2.safetensors" : "1.safetensors", shards[i], strlen(shards[i]));
    Checkpoint *c = checkpoint_open(kind < 2 ? file_path("model.bin") : directory);
    for (int i = 0; i < c->n_tensors; i++) {
        const Tensor *t = &c->tensors[i];
        require(checkpoint_find(c, t->name) == t, "each tensor is found by its name");
        uint8_t sum = 0; // every byte can be read
        for (size_t k = 0; k < t->bytes; k++) sum += ((const uint8_t *)t->data)[k];
        require(sum <= UINT8_MAX, "a byte is a byte");
    }
    model_free(model_load(c));
    checkpoint_close(c);
}

/* config.json and, behind a NUL, generation_config.json. */
static void config(const uint8_t *data, size_t bytes) {
    char *text = calloc(bytes + 2, 1);
    memcpy(text, data, bytes);
    size_t first = strlen(text);
    Config c = config_parse("fuzz", text, first < bytes ? text + first + 1 : NULL);
    require(c.dim > 0 && c.hidden_dim > 0 && c.n_layers > 0 && c.vocab_size > 0 &&
                c.max_context > 0 && c.n_kv_heads > 0 && c.n_heads % c.n_kv_heads == 0,
            "sizes are above 0");
    require(c.head_dim > 1 && c.head_dim % 2 == 0 && c.n_heads * c.head_dim <= 1 << 16,
            "heads have an even, moderate size");
    require(c.norm_eps > 0 && isfinite(c.norm_eps) && c.rope_theta > 0, "constants are above 0");
    require(c.bos >= -1 && c.n_eos <= 16, "token ids are in range");
    free(text);
}

/* Encodes text with tokenizer t and decodes it again, all but special tokens. */
static void there_and_back(const Tokenizer *t, const char *text, size_t n) {
    for (int special = 0; special < 2; special++) {
        int count, *ids = tokenizer_encode(t, text, n, special, &count);
        char *out;
        size_t n_out, n_token;
        FILE *f = open_memstream(&out, &n_out);
        Utf8Stream stream = {0};
        for (int i = 0; i < count; i++) {
            require(ids[i] >= 0 && ids[i] < tokenizer_size(t), "each id is one of the tokenizer's");
            const char *token = tokenizer_decode(t, ids[i], &n_token);
            utf8_write(&stream, token, n_token, false, f);
        }
        utf8_write(&stream, "", 0, true, f);
        fclose(f);
        require(special ? n_out <= n : n_out == n && !memcmp(out, text, n),
                "decoding gives the text back");
        free(out);
        free(ids);
    }
}

static void tokenizer(const uint8_t *data, size_t bytes) {
    Tokenizer *t = tokenizer_load("fuzz", (const char *)data, bytes);
    static const char sample[] = "a b abc xyz <x>, it's 1234 \xc3\xa9\xff\n\n  end <y>";
    for (int i = 0; i < tokenizer_size(t); i++) {
        size_t n;
        const char *token = tokenizer_decode(t, i, &n);
        require(token || n == 0, "each id has a text");
    }
    there_and_back(t, sample, sizeof sample - 1);
    tokenizer_free(t);
}

static void text(const uint8_t *data, size_t bytes) {
    char *copy = malloc(bytes + !bytes); // so that a read behind the end is seen
    memcpy(copy, data, bytes);
    there_and_back(tiny, copy, bytes);
    free(copy);
}

/* The command line of PROGRAM, an argument a line. */
static void options(const uint8_t *data, size_t bytes) {
    char *lines = calloc(bytes + 1, 1), *argv[64] = {"program"};
    memcpy(lines, data, bytes);
    int argc = 1;
    for (char *line = lines; line && argc < 63; argc++) {
        argv[argc] = line;
        if ((line = strchr(line, '\n'))) *line++ = 0;
    }
    Options o = parse_options(argc, argv);
    require(o.model != NULL, "there is a MODEL");
    running = false; // the program keeps its options until it ends
    longjmp(refused, 1);
}

/* ---- libFuzzer's two ------------------------------------------------------------------------ */

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    static char buffer[1 << 12];
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    require(mkdtemp(directory) != NULL, "a directory can be made");
    atexit(remove_files);
    put_file("config.json", small_config, sizeof small_config - 1);
    size_t n;
    char *json = read_text("data/tiny/tokenizer.json", &n);
    tiny = tokenizer_load("tiny", json, n);
    free(json);
    __sanitizer_install_malloc_and_free_hooks(allocated, released);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    int lowest = dup(STDIN_FILENO); // files that a refusal leaves open come after it
    n_blocks = n_maps = 0;
    bool done = false;
    if (!setjmp(refused)) {
        running = true;
        TARGET(data, bytes);
        done = true;
    }
    running = false;
    require(!done || (n_blocks == 0 && n_maps == 0), "an input that is taken leaves nothing");
    for (int i = 0; i < n_blocks; i++) free((void *)blocks[i]);
    for (int i = 0; i < n_maps; i++) __real_munmap(maps[i].data, maps[i].bytes);
    for (int fd = lowest; fd < lowest + 8; fd++) close(fd);
    return 0;
}
