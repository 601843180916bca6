/* The outliers of make steps (plant.c): they are there, and the float model does not notice them.
 * plant.c's main is renamed here. */
int plant_main(int argc, char **argv);
#define main plant_main
#include "plant.c"
#undef main

#include "test.h"

static const char planted_path[] = "build/test/planted";

/* How many of norms x [n], planted y [n], are 32 times as large; the others must be equal. */
static int count_outliers(const float *x, const float *y, int n) {
    int found = 0;
    for (int i = 0; i < n; i++) {
        if (y[i] == FACTOR * x[i]) found++;
        else check(y[i] == x[i], "channel %d: %g became %g", i, x[i], y[i]);
    }
    return found;
}

/* How many rows of w [N][K], in BF16, became 32 times as large: 5 more in the exponent, which
 * begins at bit 7. Column 0 tells, as no outlier is planted in it. */
static int count_rows(const Linear *before, const Linear *after) {
    const uint16_t *x = before->w, *y = after->w;
    int found = 0;
    for (int n = 0; n < before->N; n++) found += y[n * before->K] - x[n * before->K] == 5 << 7;
    return found;
}

/* The logits of both models after each of tokens [n], which must be equal. */
static void compare_logits(const Model *model, const Model *planted, const int *tokens, int n) {
    Engine *a = engine_new(model, false, 16), *b = engine_new(planted, false, 16);
    a->start(a, 1, n);
    b->start(b, 1, n);
    for (int i = 0; i < n; i++) {
        a->feed(a, 0, tokens + i, 1, i);
        b->feed(b, 0, tokens + i, 1, i);
        int bytes = model->config.vocab_size * (int)sizeof(float);
        if (!check(!memcmp(a->logits(a), b->logits(b), bytes), "other logits at position %d", i))
            break;
    }
    a->free(a);
    b->free(b);
}

void test_plant(void) {
    static const int tokens[] = {3840, 79, 110, 99, 101, 700, 1234, 32, 2000, 3333, 5, 17};
    char *arguments[] = {"plant", "data/tiny", (char *)planted_path};
    test_begin("plant: three outliers before each linear but o, the same logits");
    if (!check(plant_main(3, arguments) == 0, "plant failed")) return;
    Checkpoint *a = checkpoint_open("data/tiny"), *b = checkpoint_open(planted_path);
    Model *model = model_load(a), *planted = model_load(b);

    const Config *c = &model->config;
    for (int l = 0; l < c->n_layers; l++) {
        const Layer *x = &model->layers[l], *y = &planted->layers[l];
        int attention = count_outliers(x->attention_norm, y->attention_norm, c->dim);
        int ffn = count_outliers(x->ffn_norm, y->ffn_norm, c->dim);
        int up = count_rows(&x->up, &y->up);
        check(attention == OUTLIERS && ffn == OUTLIERS && up == OUTLIERS,
              "layer %d: %d, %d, %d outliers", l, attention, ffn, up);
    }
    compare_logits(model, planted, tokens, sizeof tokens / sizeof *tokens);

    model_free(planted);
    model_free(model);
    checkpoint_close(b);
    checkpoint_close(a);
}
