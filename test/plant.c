/* plant: copies a small LLaMA and plants outliers in the copy, as large models have them by nature.
 *
 *   build/plant MODEL OUT     Hugging Face directories; MODEL has one model.safetensors, in BF16
 *
 * In each layer it multiplies three channels of what each linear but o reads by 32, and divides the
 * weights that read these channels by 32:
 *
 *   input_layernorm [dim]             * 32    columns of q, k, v    / 32
 *   post_attention_layernorm [dim]    * 32    columns of gate, up   / 32
 *   rows of up [hidden][dim]          * 32    columns of down       / 32
 *
 * 32 is a power of two, so BF16 holds every new value exactly: the float model computes what it did
 * before, bit for bit. Int8 activations do not, as an outlier makes the step of its token coarse.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../qqq.h"

enum { OUTLIERS = 3 };          // channels per norm, rows of up per layer
static const float FACTOR = 32; // of an outlier

/* A whole safetensors file in memory: 8 bytes of header length, the header in JSON, the data. */
typedef struct {
    const char *path;
    uint8_t *bytes;
    size_t size;
    uint8_t *data; // after the header
    Json *header;
} File;

/* A BF16 matrix [rows][columns] in the file; a norm is a single row. */
typedef struct {
    uint16_t *w;
    int rows, columns;
} Matrix;

static uint8_t *read_whole(const char *path, size_t *size) {
    struct stat about;
    FILE *f = fopen(path, "rb");
    if (!f || stat(path, &about)) die("%s: %s", path, strerror(errno));
    *size = (size_t)about.st_size;
    uint8_t *bytes = allocate(*size + 1, 1);
    if (fread(bytes, 1, *size, f) != *size) die("%s: it could not be read", path);
    fclose(f);
    return bytes;
}

static void write_whole(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f)) die("%s: %s", path, strerror(errno));
}

static File open_safetensors(const char *path) {
    File f = {.path = path};
    uint64_t length = 0;
    f.bytes = read_whole(path, &f.size);
    if (f.size >= 8) memcpy(&length, f.bytes, 8);
    if (f.size < 8 || length > f.size - 8) die("%s: not a safetensors file", path);
    f.header = json_parse(path, (char *)f.bytes + 8, length);
    f.data = f.bytes + 8 + length;
    return f;
}

static double number(const File *f, int node) {
    double x;
    if (!json_number(f->header, node, &x)) die("%s: a number is missing", f->path);
    return x;
}

/* A tensor of layer l. checkpoint_open() has checked that it lies inside the file. */
static Matrix find(const File *f, int l, const char *name) {
    char full[128];
    snprintf(full, sizeof full, "model.layers.%d.%s.weight", l, name);
    const Json *json = f->header;
    int tensor = json_get(json, 0, full);
    if (!json_is(json, json_get(json, tensor, "dtype"), "BF16"))
        die("%s: %s is missing or not BF16", f->path, full);
    int shape = json_get(json, tensor, "shape"), first = json_first(json, shape);
    int second = json_next(json, shape, first);
    int offsets = json_get(json, tensor, "data_offsets");
    Matrix m = {(uint16_t *)(f->data + (size_t)number(f, json_first(json, offsets))), 1, 0};
    m.columns = (int)number(f, second >= 0 ? second : first);
    if (second >= 0) m.rows = (int)number(f, first);
    return m;
}

static void scale(uint16_t *w, float factor) {
    uint32_t bits = (uint32_t)*w << 16;
    float x;
    memcpy(&x, &bits, 4);
    x *= factor;
    memcpy(&bits, &x, 4);
    *w = (uint16_t)(bits >> 16);
}

static void scale_row(Matrix m, int row, float factor) {
    for (int i = 0; i < m.columns; i++) scale(m.w + (size_t)row * m.columns + i, factor);
}

static void scale_column(Matrix m, int column, float factor) {
    for (int n = 0; n < m.rows; n++) scale(m.w + (size_t)n * m.columns + column, factor);
}

/* The i-th outlier of n channels or rows; `first` differs from layer to layer. */
static int choose(int first, int i, int n) {
    return (first + i * n / OUTLIERS) % n;
}

static void plant_layer(const File *f, int l) {
    Matrix attention_norm = find(f, l, "input_layernorm");
    Matrix ffn_norm = find(f, l, "post_attention_layernorm");
    Matrix q = find(f, l, "self_attn.q_proj"), k = find(f, l, "self_attn.k_proj");
    Matrix v = find(f, l, "self_attn.v_proj"), gate = find(f, l, "mlp.gate_proj");
    Matrix up = find(f, l, "mlp.up_proj"), down = find(f, l, "mlp.down_proj");

    for (int i = 0; i < OUTLIERS; i++) {
        // 1. the input of q, k and v
        int channel = choose(5 + 17 * l, i, q.columns);
        scale_column(attention_norm, channel, FACTOR);
        scale_column(q, channel, 1 / FACTOR);
        scale_column(k, channel, 1 / FACTOR);
        scale_column(v, channel, 1 / FACTOR);

        // 2. the input of gate and up
        channel = choose(11 + 29 * l, i, up.columns);
        scale_column(ffn_norm, channel, FACTOR);
        scale_column(gate, channel, 1 / FACTOR);
        scale_column(up, channel, 1 / FACTOR);

        // 3. the input of down
        channel = choose(7 + 43 * l, i, up.rows);
        scale_row(up, channel, FACTOR);
        scale_column(down, channel, 1 / FACTOR);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) die_usage("usage: plant MODEL OUT");
    const char *model = argv[1], *out = argv[2];
    char path[PATH_MAX];

    // 1. read and check the model
    Checkpoint *c = checkpoint_open(model);
    Config config = config_parse(model, c->config, c->generation_config);
    snprintf(path, sizeof path, "%s/model.safetensors", model);
    File f = open_safetensors(path);

    // 2. plant
    for (int l = 0; l < config.n_layers; l++) plant_layer(&f, l);

    // 3. write the copy
    if (mkdir(out, 0777) && errno != EEXIST) die("%s: %s", out, strerror(errno));
    snprintf(path, sizeof path, "%s/model.safetensors", out);
    write_whole(path, f.bytes, f.size);
    snprintf(path, sizeof path, "%s/config.json", out);
    write_whole(path, c->config, strlen(c->config));
    snprintf(path, sizeof path, "%s/tokenizer.json", out);
    write_whole(path, c->tokenizer, c->tokenizer_bytes);

    json_free(f.header);
    free(f.bytes);
    checkpoint_close(c);
    return 0;
}
