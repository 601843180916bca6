/* ./quantize on the GPU against ./quantize on the CPU: the perplexity of what they make. The parts
 * are compared in test_gpu_twins.cu. Run by `make test-gpu`. */
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

static const char made[] = "build/test/gpu_quantized.bin";

/* Perplexity of W4A8 files, on the GPU, on the first 8 windows of the evaluation text. */
static double measure(const char *path) {
    Checkpoint *c = checkpoint_open(path);
    Model *m = model_load(c);
    Engine *g = engine_new(m, true, 16);
    int n, *tokens = text_tokens(c, m->config.bos, "data/eval.txt", &n);
    double ppl = perplexity(g, tokens, n, 2048, 8, NULL).mean;
    free(tokens);
    g->free(g);
    model_free(m);
    checkpoint_close(c);
    return ppl;
}

static double quantized(const char *model, const char *options, const char *device) {
    char command[500], out[9000];
    snprintf(command, sizeof command, "./quantize %s %s %s -d %s", model, made, options, device);
    int status = run_command(command, out, sizeof out);
    return check(status == 0, "%s: %s", command, out) ? measure(made) : NAN;
}

/* The model with its embedding off by a millionth, at random: what rounding errors can do. */
static void perturb(const char *model, const char *out, uint64_t seed) {
    Checkpoint *c = checkpoint_open(model);
    Tensor *tensors = allocate(c->n_tensors, sizeof *tensors);
    int n = 0;
    for (int i = 0; i < c->n_tensors; i++)
        if (strcmp(c->tensors[i].name, "tokenizer.json")) tensors[n++] = c->tensors[i];
    float *embedding = NULL;
    for (int i = 0; i < n; i++) {
        Tensor *t = &tensors[i];
        if (strcmp(t->name, "model.embed_tokens.weight")) continue;
        size_t count = t->bytes / dtype_size(t->dtype);
        embedding = allocate(count, sizeof *embedding);
        floats(t->data, t->dtype, 0, count, embedding);
        for (size_t k = 0; k < count; k++) embedding[k] *= 1 + 1e-6f * random_float(&seed);
        t->dtype = F32;
        t->data = embedding;
        t->bytes = count * sizeof *embedding;
    }
    write_model(out, c, NULL, tensors, n);
    free(embedding);
    free(tensors);
    checkpoint_close(c);
}

/* Within 0.1 % of the CPU's; or else, as each rounding error leads to other codes, the mean of four
 * runs, three of them with a perturbed model, within what such runs on the CPU differ by. */
static void test_same(const char *name, const char *model, const char *options) {
    char title[200];
    snprintf(title, sizeof title, "GPU: quantized as on the CPU: %s %s", name, options);
    test_begin(title);
    if (!exists(model)) {
        test_skip("the model is not there");
        return;
    }
    double gpu = quantized(model, options, "cuda"), cpu = quantized(model, options, "cpu");
    printf("     CPU %.4f, GPU %.4f: %+.3f %%\n", cpu, gpu, 100 * (gpu / cpu - 1));
    if (fabs(gpu / cpu - 1) <= 1e-3) return;
    double least = cpu, most = cpu;
    for (int i = 1; i <= 3; i++) {
        const char *path = "build/test/gpu_perturbed.bin";
        perturb(model, path, i);
        double ppl = quantized(path, options, "cpu"), ppl_gpu = quantized(path, options, "cuda");
        printf("     perturbed: CPU %.4f, GPU %.4f\n", ppl, ppl_gpu);
        least = fmin(least, ppl);
        most = fmax(most, ppl);
        cpu += ppl;
        gpu += ppl_gpu;
    }
    check(fabs(gpu - cpu) / 4 <= most - least, "means %.4f and %.4f, the CPU's runs differ by %.4f",
          cpu / 4, gpu / 4, most - least);
}

static void test_failures(void) {
    char out[9000];
    test_begin("GPU: ./quantize says how much memory it needs");
    remove(made);
    check(
        run_command("./quantize data/tiny build/test/gpu_quantized.bin -n 16 -l 512 -d cuda -M 0.1",
                    out, sizeof out) == 1 &&
            strstr(out, "GB of GPU memory, -M allows 0.10 GB") && !exists(made),
        "%s", out);
    const char *needs = strstr(out, " needs ");
    double least = needs ? atof(needs + 7) : NAN;

    test_begin("GPU: ./quantize with little memory, streams on the host");
    const char *options = "-n 16 -l 512";
    char two[200];
    double all = quantized("data/tiny", options, "cuda");
    snprintf(two, sizeof two, "%s -M %.2f", options, least + 0.01);
    double little = quantized("data/tiny", two, "cuda");
    check(fabs(little / all - 1) < 1e-3, "perplexity %.4f, %.4f with all memory", little, all);
    snprintf(two, sizeof two, "./quantize data/tiny %s %s -d cuda -M %.2f", made, options,
             least + 0.01);
    check(run_command(two, out, sizeof out) == 0 && strstr(out, "calibration in host memory"), "%s",
          out);

    test_begin("GPU: ./quantize, a full disk at several places");
    // Blocks of 512 or of 1024 bytes, as the shell has it; the file has 7.2 MB.
    static const int blocks[] = {0, 100, 1000, 3000, 6000};
    for (int i = 0; i < 5; i++) {
        snprintf(two, sizeof two,
                 "rm -rf build/test/full && mkdir build/test/full && ulimit -f %d\n"
                 "./quantize data/tiny build/test/full/x.bin -d cuda -n 2 -l 512",
                 blocks[i]);
        int status = run_command(two, out, sizeof out);
        check(status == 1 && strstr(out, "cannot be written: File too large"),
              "%d blocks: status %d: %s", blocks[i], status, out);
        run_command("ls -A build/test/full", out, sizeof out);
        check(!*out, "%d blocks: left behind: %s", blocks[i], out);
    }

    test_begin("GPU: ./quantize, killed in the middle, leaves nothing behind");
    int status = run_command("rm -rf build/test/killed && mkdir build/test/killed\n"
                             "./quantize data/tiny build/test/killed/x.bin -d cuda -n 64 -l 2048 "
                             ">build/test/killed.log 2>&1 & "
                             "while kill -0 $! && ! grep -q '^    2' build/test/killed.log; "
                             "do sleep 0.02; done; kill $!; wait $!",
                             out, sizeof out);
    check(status == 128 + SIGTERM, "status %d: %s", status, out);
    run_command("ls -A build/test/killed", out, sizeof out);
    check(!*out, "%s", out);
}

void test_gpu_quantize(void) {
    char why[300] = "built without CUDA";
    Config any = {.head_dim = 64, .n_heads = 1, .n_kv_heads = 1};
    if (!gpu_can_run || !gpu_can_run(&any, false, why, sizeof why)) {
        test_begin("GPU: ./quantize");
        test_skip(why);
        return;
    }
    test_failures();
    static const char *const switches[] = {"",     "-g -1",  "-a 0",        "-m 0",
                                           "-o 0", "-b rtn", "-b rtn -m 0", "-b rtn -a 0 -m 0"};
    for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) {
        char options[100];
        snprintf(options, sizeof options, "-n 32 -r 0 %s", switches[i]);
        test_same("tiny", "data/tiny", options);
    }
    test_same("tiny", "data/tiny", "-n 32");
    test_same("tiny", "data/tiny", "-n 32 -g -1");
    test_same("tiny-outliers", "../shared/models/tiny-outliers", "-n 32 -r 0");
    test_same("small", "../shared/models/small", "-n 32 -r 0");
}
