/* The operations of quantization: kernels.cu 5 against qqq.c 3, on the same inputs; and
 * lm_head in 8 bits and attention, with its cache in 16 and 8, against sums in double. They are
 * no public functions: hence the #include. Prints as test_kernels does. */
#include "../kernels.cu"

#include <algorithm>
#include <stdarg.h>
#include <string.h>
#include <string>
#include <vector>

typedef std::vector<float> Floats;

static int n_passed, n_failed;
static bool failed;
static std::string running;

static void test_end() {
    if (running.empty()) return;
    printf("%s %s\n", failed ? "FAIL" : "ok  ", running.c_str());
    fflush(stdout);
    failed ? n_failed++ : n_passed++;
}

static void test_begin(const char *name) {
    test_end();
    running = name;
    failed = false;
}

static void check(bool ok, const char *format, ...) {
    if (ok) return;
    failed = true;
    va_list args;
    va_start(args, format);
    printf("     ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

static uint64_t seed = 1;

static float random_float() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int32_t)(seed >> 32) * 0x1p-31f;
}

/* Nearly normal. */
static Floats random_floats(size_t n, float scale) {
    Floats v(n);
    for (float &x : v)
        x = scale * (random_float() + random_float() + random_float() + random_float());
    return v;
}

/* |a - b| / |b| over all elements. */
template <typename A, typename B> static double distance(const A *a, const B *b, size_t n) {
    double d = 0, total = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        total += (double)b[i] * b[i];
    }
    return sqrt(d / total);
}

/* ---- the operations of quantization ---------------------------------------------------------- */

enum { DIM = 256, HIDDEN = 896, TOKENS = 1024, WINDOW = TOKENS / 2 }; // data/tiny's

/* Both machines, started for the same work. */
struct Twins {
    const Operations *c = &cpu_operations, *g = gpu_operations();
    Machine *cpu, *gpu;
    Config config = {};
    int group_size;

    explicit Twins(int group_size) : group_size(group_size) {
        config.dim = DIM;
        config.hidden_dim = HIDDEN;
        config.n_layers = 1;
        config.n_heads = 4;
        config.n_kv_heads = 1;
        config.head_dim = 64;
        config.vocab_size = 16;
        config.norm_eps = 1e-5f;
        config.rope_theta = 10000;
        const Workload work = {config, group_size, WINDOW, TOKENS, TOKENS};
        cpu = c->start(&work);
        gpu = g->start(&work);
    }
    ~Twins() {
        c->stop(cpu);
        g->stop(gpu);
    }
    template <typename T> T *make(size_t n) { return (T *)g->array(gpu, n * sizeof(T), false); }
    template <typename T> T *up(const std::vector<T> &v) {
        T *p = make<T>(v.size());
        g->copy(gpu, p, v.data(), v.size() * sizeof(T));
        return p;
    }
    template <typename T> std::vector<T> down(const T *p, size_t n) {
        std::vector<T> v(n);
        g->copy(gpu, v.data(), p, n * sizeof(T));
        return v;
    }
    /* A quantized linear of the GPU, to be set. */
    Linear make_linear(int N, int K) {
        Linear l = {};
        l.N = N;
        l.K = K;
        l.dtype = U8;
        l.qweight = make<uint8_t>((size_t)N * K / 2);
        l.s_channel = make<float>(N);
        if (group_size > 0) l.s_group = make<uint8_t>((size_t)N * K / GROUP);
        return l;
    }
    /* The same in host memory. */
    Linear down(const Linear &l) {
        Linear host = quantized_new(l.N, l.K, group_size);
        const size_t n = (size_t)l.N * l.K;
        g->copy(gpu, host.qweight, l.qweight, n / 2);
        g->copy(gpu, host.s_channel, l.s_channel, l.N * sizeof(float));
        if (l.s_group) g->copy(gpu, host.s_group, l.s_group, n / GROUP);
        return host;
    }
};

static Linear float_linear(int N, int K, float *w) {
    Linear l = {};
    l.N = N;
    l.K = K;
    l.dtype = F32;
    l.w = w;
    return l;
}

/* Inputs with a few large channels, which depend on each other. */
static Floats activations(int K) {
    Floats x = random_floats((size_t)TOKENS * K, 1);
    for (size_t i = 0; i < x.size(); i++) x[i] *= i % K % 100 == 5 ? 20 : i % K % 7 == 0 ? 3 : 1;
    for (size_t t = 0; t < TOKENS; t++) {
        for (int k = 1; k < K; k++) x[t * K + k] += 0.4f * x[t * K + k - 1];
        x[t * K + 11] = 0; // dead
    }
    return x;
}

static void test_rotation() {
    test_begin("rotate: the same floats");
    Twins t(-1);
    std::vector<int8_t> signs(DIM);
    random_signs(7, DIM, signs.data());
    const int8_t *gpu_signs = t.up(signs);
    for (int outputs = 0; outputs < 2; outputs++)
        for (int n = 64; n <= DIM; n *= 4) {
            const int8_t *s = n == DIM ? signs.data() : NULL, *gpu_s = s ? gpu_signs : NULL;
            Floats w = random_floats(DIM * DIM, 1);
            float *gpu_w = t.up(w);
            t.c->rotate(t.cpu, DIM, DIM, n, outputs, s, w.data());
            t.g->rotate(t.gpu, DIM, DIM, n, outputs, gpu_s, gpu_w);
            check(t.down(gpu_w, w.size()) == w, "%s, by %d", outputs ? "outputs" : "inputs", n);
        }
    const int n = 192; // 3 x 64: its cosines may differ in the last bit
    Floats w = random_floats(n * n, 1);
    float *gpu_w = t.up(w), worst = 0;
    t.c->rotate(t.cpu, n, n, n, false, NULL, w.data());
    t.g->rotate(t.gpu, n, n, n, false, NULL, gpu_w);
    const Floats got = t.down(gpu_w, w.size());
    for (size_t i = 0; i < w.size(); i++) worst = fmaxf(worst, fabsf(got[i] - w[i]));
    check(worst < 1e-6f, "inputs, by %d: off by %g", n, worst);
}

static void test_elements() {
    test_begin("scale, subtract, zero, copies by way of the host: the same floats");
    Twins t(-1);
    Floats w = random_floats(DIM * HIDDEN, 1), columns = random_floats(HIDDEN, 3);
    Floats rows = random_floats(DIM, 3), other = random_floats(w.size(), 1);
    float *gpu_w = t.up(w), *gpu_columns = t.up(columns), *gpu_rows = t.up(rows);
    for (int i = 1; i < 4; i++) { // columns, rows, both
        t.c->scale(t.cpu, DIM, HIDDEN, i & 1 ? columns.data() : NULL, i & 2 ? rows.data() : NULL,
                   w.data());
        t.g->scale(t.gpu, DIM, HIDDEN, i & 1 ? gpu_columns : NULL, i & 2 ? gpu_rows : NULL, gpu_w);
        check(t.down(gpu_w, w.size()) == w, "scale, case %d", i);
    }
    t.c->subtract(t.cpu, w.data(), other.data(), w.size(), w.data());
    t.g->subtract(t.gpu, gpu_w, t.up(other), w.size(), gpu_w);
    check(t.down(gpu_w, w.size()) == w, "subtract");
    const size_t bytes = w.size() * sizeof(float);
    float *pinned = (float *)t.g->array(t.gpu, bytes, true);
    t.g->copy(t.gpu, pinned, gpu_w, bytes);
    check(!memcmp(pinned, w.data(), bytes), "copy to the host");
    t.g->zero(t.gpu, gpu_w, bytes);
    check(t.down(gpu_w, w.size()) == Floats(w.size()), "zero");
    t.g->copy(t.gpu, gpu_w, pinned, bytes);
    check(t.down(gpu_w, w.size()) == w, "copy from the host");

    test_begin("read: the same floats of every dtype; NaN and infinity");
    const size_t n = 1000;
    std::vector<uint16_t> halves(n);
    for (DType dtype : {F32, F16, BF16})
        for (int broken = 0; broken < 3; broken++) {
            Floats x = random_floats(n, 1), got(n);
            for (size_t i = 0; i < n; i++) {
                const half h = __float2half_rn(x[i]);
                const __nv_bfloat16 b = __float2bfloat16_rn(x[i]);
                memcpy(&halves[i], dtype == F16 ? (const void *)&h : &b, 2);
            }
            const uint16_t bad = dtype == F16 ? 0x7c00 : 0x7f80;
            if (broken) x[n / 2] = broken == 1 ? INFINITY : NAN;
            if (broken) halves[n / 2] = bad + (broken == 2);
            Linear l = float_linear(10, 100, x.data());
            l.dtype = dtype;
            if (dtype != F32) l.w = halves.data();
            float *gpu_x = t.make<float>(n);
            const bool ok = t.g->read(t.gpu, &l, gpu_x);
            check(ok == !broken && t.c->read(t.cpu, &l, got.data()) == ok, "dtype %d, case %d",
                  dtype, broken);
            check(broken || t.down(gpu_x, n) == got, "dtype %d: other floats", dtype);
        }
}

/* sum_k importance_k (w_k - q_k scale)^2 of a row, in double. */
static double row_error(const Linear *l, int n, const float *w, const float *importance) {
    Floats row(l->K);
    dequantize_row(l, n, row.data());
    double sum = 0;
    for (int k = 0; k < l->K; k++) sum += importance[k] * pow((double)row[k] - w[k], 2);
    return sum;
}

static void test_ranges(int group_size, bool search) {
    char name[100];
    snprintf(name, sizeof name, "round_to_nearest, ranges %s, %s", search ? "searched" : "max|w|",
             group_size > 0 ? "g128" : "per channel");
    test_begin(name);
    const int N = DIM, K = HIDDEN;
    Twins t(group_size);
    Floats w = random_floats((size_t)N * K, 0.02f), importance = random_floats(K, 1);
    for (float &x : importance) x = 0.01f + x * x;
    for (int k = 0; k < K; k++) {
        w[k] = 0;
        w[K + k] *= 1e-38f;     // too small for a scale
        w[2 * K + k] *= 1e-30f; // whose squares vanish
        w[3 * K + k] *= 1e30f;
        if (k / GROUP == 1) w[4 * K + k] = 0;
    }
    Linear on_gpu = t.make_linear(N, K), c = quantized_new(N, K, group_size);
    t.g->round_to_nearest(t.gpu, t.up(w), search ? t.up(importance) : NULL, &on_gpu);
    t.c->round_to_nearest(t.cpu, w.data(), search ? importance.data() : NULL, &c);
    Linear gpu = t.down(on_gpu);
    int same_scales = 0, same_codes = 0;
    for (int n = 0; n < N; n++) {
        const size_t groups = K / GROUP;
        bool same =
            gpu.s_channel[n] == c.s_channel[n] &&
            (!c.s_group || !memcmp(gpu.s_group + n * groups, c.s_group + n * groups, groups));
        same_scales += same;
        same_codes += same && !memcmp(gpu.qweight + n * K / 2, c.qweight + n * K / 2, K / 2);
        double e = row_error(&gpu, n, &w[(size_t)n * K], importance.data());
        double expected = row_error(&c, n, &w[(size_t)n * K], importance.data());
        check(e <= expected * 1.0001, "row %d: error %g, expected %g", n, e, expected);
    }
    printf("     %d of %d rows have the same scales, %d the same codes\n", same_scales, N,
           same_codes);
    check(same_scales >= (search ? N * 9 / 10 : N), "too few");
    check(same_codes == same_scales, "other codes");
    linear_free(&gpu);
    linear_free(&c);
}

/* The forward steps: a layer of random weights, float and W4A8, on both machines. */
static void test_half_layers(int group_size) {
    char name[100];
    auto begin = [&](const char *what) {
        snprintf(name, sizeof name, "%s, %s", what, group_size > 0 ? "g128" : "per channel");
        test_begin(name);
    };
    Twins t(group_size);
    Layer layers[2][2] = {}; // [CPU, GPU][float, W4A8]
    std::vector<Floats> weights(N_LINEARS);
    Floats norms = random_floats(DIM, 0.1f);
    for (float &x : norms) x += 1;
    for (int i = 0; i < 2; i++) {
        layers[0][i].attention_norm = layers[0][i].ffn_norm = norms.data();
        layers[1][i].attention_norm = layers[1][i].ffn_norm = t.up(norms);
    }

    // Linears in the order of a layer, one behind the other.
    size_t total = 0, rows = 0;
    for (int k = 0, N, K; k < N_LINEARS; k++) {
        linear_shape(&t.config, k, &N, &K);
        total += (size_t)N * K;
        rows += N;
    }
    uint8_t *codes = t.make<uint8_t>(total / 2), *s_group = t.make<uint8_t>(total / GROUP);
    float *s_channel = t.make<float>(rows);
    for (int k = 0, N, K; k < N_LINEARS; k++) {
        linear_shape(&t.config, k, &N, &K);
        const size_t n = (size_t)N * K;
        weights[k] = random_floats(n, 1.0f / sqrtf(K));
        layers[0][0].linears[k] = float_linear(N, K, weights[k].data());
        layers[1][0].linears[k] = float_linear(N, K, t.up(weights[k]));
        Linear *c = &layers[0][1].linears[k], *g = &layers[1][1].linears[k];
        *c = quantized_new(N, K, group_size);
        t.c->round_to_nearest(t.cpu, weights[k].data(), NULL, c);
        *g = t.make_linear(N, K);
        t.g->round_to_nearest(t.gpu, (float *)layers[1][0].linears[k].w, NULL, g);
        Linear as_in_file = *g;
        g->qweight = codes;
        g->s_channel = s_channel;
        if (g->s_group) g->s_group = s_group;
        t.g->arrange(t.gpu, &as_in_file, g);
        codes += n / 2;
        s_group += n / GROUP;
        s_channel += N;
    }

    Floats x = random_floats((size_t)TOKENS * DIM, 1), y(x.size());
    const float *gpu_x = t.up(x);
    float *gpu_y = t.make<float>((size_t)TOKENS * HIDDEN);
    auto compare = [&](const char *what, const Floats &want, double tolerance) {
        const Floats got = t.down(gpu_y, want.size());
        double off = distance(got.data(), want.data(), want.size());
        printf("     %s: off by %.2g\n", what, off);
        check(off <= tolerance, "%s: off by %g", what, off);
    };
    begin("norm, in float and in int8");
    for (int int8 = 0; int8 < 2; int8++) {
        t.c->norm(t.cpu, x.data(), norms.data(), TOKENS, int8, y.data());
        t.g->norm(t.gpu, gpu_x, layers[1][0].attention_norm, TOKENS, int8, gpu_y);
        compare(int8 ? "int8" : "float", y, int8 ? 1e-3 : 1e-6);
    }

    begin("inside, of attention and FFN, float and W4A8");
    for (int w4a8 = 0; w4a8 < 2; w4a8++)
        for (int ffn = 0; ffn < 2; ffn++) {
            Floats inner((size_t)TOKENS * (ffn ? HIDDEN : DIM));
            t.c->inside(t.cpu, &layers[0][w4a8], ffn, x.data(), TOKENS, inner.data());
            t.g->inside(t.gpu, &layers[1][w4a8], ffn, gpu_x, TOKENS, gpu_y);
            compare(ffn ? "FFN" : "attention", inner, w4a8 ? 2e-2 : 5e-3);
        }

    begin("arrange, add_linear: float near, W4A8 the same bits");
    for (int w4a8 = 0; w4a8 < 2; w4a8++)
        for (int k = 0; k < N_LINEARS; k++) {
            const Linear *w = &layers[0][w4a8].linears[k];
            const size_t n = (size_t)TOKENS * w->N;
            const Floats in = activations(w->K);
            Floats out(n);
            t.g->zero(t.gpu, gpu_y, n * sizeof(float));
            t.c->add_linear(t.cpu, w, in.data(), TOKENS, out.data());
            t.g->add_linear(t.gpu, &layers[1][w4a8].linears[k], t.up(in), TOKENS, gpu_y);
            if (w4a8) check(t.down(gpu_y, n) == out, "%s: other bits", linear_names[k]);
            else compare(linear_names[k], out, 2e-3);
        }
    for (Linear &l : layers[0][1].linears) linear_free(&l);
}

/* From the moments to the codes, for a [N][K] linear. */
static void test_gptq(int group_size, int N, int K) {
    char name[100];
    snprintf(name, sizeof name, "%s, %d x %d: ", group_size > 0 ? "g128" : "per channel", N, K);
    const size_t at = strlen(name);
    auto begin = [&](const char *what) {
        snprintf(name + at, sizeof name - at, "%s", what);
        test_begin(name);
    };
    begin("add_moments, complete");
    Twins t(group_size);
    Floats x = activations(K), d = random_floats((size_t)TOKENS * N, 0.3f);
    const size_t kk = (size_t)K * K, nk = (size_t)N * K;
    std::vector<double> H(kk), M(nk), diagonal(K), gpu_diagonal(K);
    float *gpu_x = t.up(x), *gpu_d = t.up(d), *gpu_H = t.make<float>(kk);
    float *gpu_M = t.make<float>(nk);
    for (size_t first = 0; first < TOKENS; first += WINDOW) {
        t.c->add_moments(t.cpu, &x[first * K], K, &d[first * N], N, WINDOW, (Sums *)H.data(),
                         (Sums *)M.data());
        t.g->add_moments(t.gpu, gpu_x + first * K, K, gpu_d + first * N, N, WINDOW, (Sums *)gpu_H,
                         (Sums *)gpu_M);
    }
    t.c->complete(t.cpu, K, (Sums *)H.data(), diagonal.data());
    t.g->complete(t.gpu, K, (Sums *)gpu_H, gpu_diagonal.data());
    const Floats h = t.down(gpu_H, kk);
    double off_h = distance(h.data(), H.data(), kk);
    double off_m = distance(t.down(gpu_M, nk).data(), M.data(), nk);
    printf("     H off by %.2g (Frobenius), M by %.2g\n", off_h, off_m);
    check(off_h <= 2e-3 && off_m <= 2e-3, "H off by %g, M by %g", off_h, off_m);
    for (int k = 0; k < K; k++)
        check(gpu_diagonal[k] == h[k * (K + 1)] && diagonal[k] == H[k * (K + 1)], "H_%d", k);

    Floats w = random_floats(nk, 0.05f);
    float *gpu_w = t.up(w);

    begin("invert"); // the same H from here on
    for (size_t i = 0; i < kk; i++) H[i] = h[i];
    std::vector<int> order(K);
    std::vector<double> U(kk);
    Floats importance(K), gpu_importance(K);
    for (int k = 0; k < K; k++)
        importance[k] = gpu_importance[k] = gpu_diagonal[k] > 0 ? gpu_diagonal[k] : 1;
    Inverse inverse = {K, order.data(), U.data()}, on_gpu = {K, t.make<int>(K), t.make<double>(kk)};
    invert_hessian(t.c, t.cpu, (Sums *)H.data(), gpu_diagonal.data(), true, &inverse,
                   importance.data());
    invert_hessian(t.g, t.gpu, (Sums *)gpu_H, gpu_diagonal.data(), true, &on_gpu,
                   gpu_importance.data());
    check(t.down(on_gpu.order, K) == order, "other order");
    double off = distance(t.down(on_gpu.U, kk).data(), U.data(), kk);
    printf("     U off by %.2g\n", off);
    check(off <= 1e-10, "off by %g", off);
    off = distance(gpu_importance.data(), importance.data(), K);
    check(off <= 1e-6, "the importance of columns off by %g", off);
    gpu_H = t.up(h);
    const float zero = 0, minus = -1;
    double unused[HIDDEN];
    t.g->copy(t.gpu, gpu_H + 3 * (K + 1), &minus, sizeof minus);
    check(!t.g->invert(t.gpu, (Sums *)gpu_H, 1, 0, &on_gpu, unused),
          "inverted what is not positive");
    t.g->copy(t.gpu, gpu_H + 3 * (K + 1), &h[3 * (K + 1)], sizeof zero);
    invert_hessian(t.g, t.gpu, (Sums *)gpu_H, gpu_diagonal.data(), true, &on_gpu, NULL);

    begin("correct, with M and with C");
    const Floats m = t.down(gpu_M, nk);
    for (size_t i = 0; i < nk; i++) M[i] = m[i];
    Floats target(nk);
    float *gpu_target = t.make<float>(nk);
    // H is as good a C as any. Of w and C eight bits are left, so that TF32 rounds nothing.
    auto coarse = [](Floats x) {
        for (float &v : x)
            v = __builtin_ldexpf(rintf(__builtin_ldexpf(v, 7 - ilogbf(v))), ilogbf(v) - 7);
        return x;
    };
    const Floats w_8 = coarse(w), c_8 = coarse(h);
    const std::vector<double> C(c_8.begin(), c_8.end());
    float *gpu_w_8 = t.up(w_8), *gpu_c = t.up(c_8);
    for (int with_c = 1; with_c >= 0; with_c--) {
        t.c->correct(t.cpu, w_8.data(), N, with_c ? (Sums *)C.data() : NULL,
                     with_c ? NULL : (Sums *)M.data(), &inverse, target.data());
        t.g->correct(t.gpu, gpu_w_8, N, with_c ? (Sums *)gpu_c : NULL,
                     with_c ? NULL : (Sums *)gpu_M, &on_gpu, gpu_target);
        off = distance(t.down(gpu_target, nk).data(), target.data(), nk);
        printf("     %s: off by %.2g\n", with_c ? "C" : "M", off);
        check(off <= (with_c ? 1e-4 : 1e-6), "%s: off by %g", with_c ? "C" : "M", off);
    }

    begin("gptq, relative_error");
    gpu_target = t.up(target);
    float *weighting = t.up(importance);
    for (int search = 0; search < 2; search++) {
        Linear codes = t.make_linear(N, K), c = quantized_new(N, K, group_size);
        t.g->gptq(t.gpu, gpu_target, &on_gpu, search ? weighting : NULL, &codes);
        t.c->gptq(t.cpu, target.data(), &inverse, search ? importance.data() : NULL, &c);
        Linear gpu = t.down(codes);
        size_t same = 0, all = nk / 2;
        for (size_t i = 0; i < all; i++) same += gpu.qweight[i] == c.qweight[i];
        double e = t.g->relative_error(t.gpu, gpu_w, &codes, (Sums *)gpu_H);
        double same_codes = t.c->relative_error(t.cpu, w.data(), &gpu, (Sums *)H.data());
        double of_c = t.c->relative_error(t.cpu, w.data(), &c, (Sums *)H.data());
        printf("     %s: %.4f %% equal pairs of codes; error %.5f, %.5f in C\n",
               search ? "ranges searched" : "max|w|", 100.0 * same / all, e, of_c);
        check(search ? fabs(e / of_c - 1) < 1e-3 : same >= all * 0.9999, "too far apart");
        check(fabs(e / same_codes - 1) < 1e-3, "error %g, of the same codes in C %g", e,
              same_codes);
        linear_free(&gpu);
        linear_free(&c);
    }
}

static void test_smoothing(int group_size) {
    char name[100];
    snprintf(name, sizeof name, "observe, smoothed_distance, the search, %s",
             group_size > 0 ? "g128" : "per channel");
    test_begin(name);
    Twins t(group_size);
    const int shapes[][3] = {{DIM, 64, DIM}, {HIDDEN, HIDDEN, DIM}, {DIM, 0, HIDDEN}}; // N, N, K
    for (const int *shape : shapes) {
        const int K = shape[2], N = shape[0] + shape[1], n = shape[1] ? 2 : 1;
        // 1. maxima and a sample: every third of the tokens that are not first, by two chunks
        const Sampling sampling = {WINDOW, 3, (TOKENS - 2) / 3};
        Floats x = activations(K), max(K), rows((size_t)sampling.n * K);
        float *gpu_x = t.up(x), *gpu_max = t.make<float>(K), *gpu_rows = t.make<float>(rows.size());
        for (int first = 0; first < TOKENS; first += WINDOW) {
            const size_t from = (size_t)first * K;
            t.c->observe(t.cpu, &x[from], WINDOW, K, first, sampling, max.data(), rows.data());
            t.g->observe(t.gpu, gpu_x + from, WINDOW, K, first, sampling, gpu_max, gpu_rows);
        }
        check(t.down(gpu_max, K) == max && t.down(gpu_rows, rows.size()) == rows,
              "K %d: other maxima or samples", K);

        // 2. a candidate of smoothing
        const int T = sampling.n;
        Floats w = random_floats((size_t)N * K, 0.05f), s(K), y((size_t)T * N);
        float *gpu_w = t.up(w), *gpu_s = t.make<float>(K), *gpu_y = t.make<float>(y.size());
        Linear linears[2], gpu_linears[2];
        for (int i = 0, row = 0; i < 2; row += shape[i++]) {
            linears[i] = float_linear(shape[i], K, w.data() + (size_t)row * K);
            gpu_linears[i] = float_linear(shape[i], K, gpu_w + (size_t)row * K);
        }
        float largest = *std::max_element(max.begin(), max.end());
        smoothing_scales(max.data(), K, largest / 3, s.data());
        t.c->add_linear(t.cpu, linears, rows.data(), T, y.data());
        double want = t.c->smoothed_distance(t.cpu, linears, rows.data(), T, s.data(), y.data());
        double got = t.g->smoothed_distance(t.gpu, gpu_linears, gpu_rows, T, t.up(s), t.up(y));
        check(fabs(got / want - 1) < 1e-3, "distance %g, %g in C", got, want);

        // 3. the search, which the driver has once
        float at = search_smoothing(t.c, t.cpu, linears, n, rows.data(), T, max.data(), y.data(),
                                    s.data());
        float gpu_at =
            search_smoothing(t.g, t.gpu, gpu_linears, n, gpu_rows, T, max.data(), gpu_y, gpu_s);
        printf("     distance %g, %g in C; t %g, %g in C\n", got, want, gpu_at, at);
        check(at == gpu_at && t.down(gpu_s, K) == s, "not the same");
    }
}

/* ---- lm_head in 8 bits, the KV cache in 16 and 8 bits ---------------------------------------- */

/* Random halves, as floats. */
static Floats random_halves(size_t n, float scale) {
    Floats v = random_floats(n, scale);
    for (float &x : v) x = __half2float(__float2half_rn(x));
    return v;
}

static half *halves_on_gpu(const Floats &v) {
    std::vector<half> h(v.size());
    for (size_t i = 0; i < v.size(); i++) h[i] = __float2half_rn(v[i]);
    return upload_array<half>(h.data(), h.size());
}

/* Sums are float32; a token's logits are the same bits in any company. */
static void test_head(int N, int K) {
    char name[100];
    snprintf(name, sizeof name, "lm_head in 8 bits, %d x %d", N, K);
    test_begin(name);
    const int most = 70;
    Floats x = random_halves((size_t)most * K, 2), s_channel = random_floats(N, 1);
    std::vector<int8_t> q((size_t)N * K);
    for (int8_t &v : q) v = (int8_t)(random_float() * 127.99f);
    GpuState s = {};
    Matrix w = {};
    w.N = N;
    w.K = K;
    w.bytes = upload_array<int8_t>(q.data(), q.size());
    w.s_channel = upload_array<float>(s_channel.data(), N);
    half *x_gpu = halves_on_gpu(x);
    float *y = (float *)device_alloc((size_t)most * N * sizeof(float));
    Floats alone((size_t)most * N);
    for (int T : {1, 7, 16, 31, 64, 70}) {
        cuda_check(cudaMemset(y, 0xff, (size_t)most * N * sizeof(float)), "memset");
        if (T == 1) {
            for (int t = 0; t < most; t++)
                linear_bytes(&s, &w, x_gpu + (size_t)t * K, 1, y + (size_t)t * N);
        } else {
            linear_bytes(&s, &w, x_gpu, T, y);
        }
        Floats got((size_t)most * N);
        cuda_check(cudaMemcpy(got.data(), y, got.size() * sizeof(float), cudaMemcpyDeviceToHost),
                   "y");
        if (T == 1) alone = got;
        check(!memcmp(got.data(), alone.data(), (size_t)T * N * sizeof(float)),
              "%d tokens: others than one by one", T);
        check(T >= most || T == 1 || isnan(got[(size_t)T * N]), "%d tokens: written past the end",
              T);
    }
    double off = 0;
    for (int t = 0; t < most; t++)
        for (int n = 0; n < N; n++) {
            double sum = 0, size = 0;
            for (int k = 0; k < K; k++) {
                double p = (double)x[(size_t)t * K + k] * q[(size_t)n * K + k];
                sum += p;
                size += p * p;
            }
            off = fmax(off, fabs(alone[(size_t)t * N + n] - sum * s_channel[n]) /
                                (sqrt(size) * fabs(s_channel[n])));
        }
    printf("     off by %.2g of the product's size\n", off);
    check(off < 1e-5, "too much");
    for (void *p : {(void *)w.bytes, (void *)w.s_channel, (void *)x_gpu, (void *)y}) cudaFree(p);
}

/* What a row of a cache in 8 bits is read back as: section 4's formula. */
static void through_cache(float *x, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    const float s = __half2float(__float2half_rn(largest / 127));
    for (int i = 0; i < n; i++) x[i] = s > 0 ? fminf(fmaxf(rintf(x[i] / s), -127), 127) * s : 0;
}

/* Two sequences, prompts in two parts and then tokens decoded, against attention in double over
 * what the cache keeps. */
static void test_attention(int head_dim, int group, int bits) {
    char name[100];
    snprintf(name, sizeof name, "attention, heads of %d, %d to a KV head, cache in %d bits",
             head_dim, group, bits);
    test_begin(name);
    enum { KV = 2, B = 2, CONTEXT = 512, DECODED = 60, LONGEST = 400 };
    const int prompts[B] = {300, 120}, q_dim = KV * group * head_dim,
              width = q_dim + 2 * KV * head_dim;
    GpuModel g = {};
    Config *c = &g.config;
    c->dim = q_dim;
    c->hidden_dim = 64;
    c->n_layers = 2;
    c->n_heads = KV * group;
    c->n_kv_heads = KV;
    c->head_dim = head_dim;
    c->vocab_size = 64;
    c->rope_theta = 10000;
    g.quantized = true;
    GpuState *s = gpu_state_new(&g, B, CONTEXT, bits);
    Floats qkv[B], out[B];
    for (int b = 0; b < B; b++) {
        qkv[b] = random_halves((size_t)LONGEST * width, 1);
        for (size_t i = 0; i < qkv[b].size(); i++) // a few large dimensions of k
            if ((int)(i % width) >= q_dim && i % 37 == 3) qkv[b][i] *= 4;
        out[b].resize((size_t)LONGEST * q_dim);
    }
    auto run = [&](const Batch &batch, const half *from, int b, int at) {
        cuda_check(cudaMemcpy(s->qkv, from, (size_t)batch.T * width * sizeof(half),
                              cudaMemcpyDeviceToDevice),
                   "qkv");
        cuda_check(cudaDeviceSynchronize(), "attention");
        attend(s, 1, batch);
        cuda_check(cudaStreamSynchronize(s->stream), "attention");
        std::vector<half> h((size_t)batch.T * q_dim);
        cuda_check(cudaMemcpy(h.data(), s->att, h.size() * sizeof(half), cudaMemcpyDeviceToHost),
                   "out");
        for (size_t i = 0; i < h.size(); i++) {
            const int sequence = b < 0 ? (int)(i / q_dim) : b;
            const size_t to = b < 0 ? (size_t)(prompts[sequence] + at) * q_dim + i % q_dim
                                    : (size_t)at * q_dim + i;
            out[sequence][to] = __half2float(h[i]);
        }
    };
    half *all[B];
    for (int b = 0; b < B; b++) {
        all[b] = halves_on_gpu(qkv[b]);
        for (int t = 0, n; t < prompts[b]; t += n) {
            n = t == 0 ? 100 : prompts[b] - t;
            run({n, b, t}, all[b] + (size_t)t * width, b, t);
        }
    }
    half *rows = (half *)device_alloc(B * width * sizeof(half));
    for (int i = 0; i < DECODED; i++) {
        int positions[B];
        for (int b = 0; b < B; b++) {
            positions[b] = prompts[b] + i;
            cuda_check(cudaMemcpy(rows + b * width, all[b] + (size_t)positions[b] * width,
                                  width * sizeof(half), cudaMemcpyDeviceToDevice),
                       "row");
        }
        cuda_check(cudaMemcpy(s->positions, positions, sizeof positions, cudaMemcpyHostToDevice),
                   "positions");
        run({B, -1, 0}, rows, -1, i);
    }
    Floats angles(head_dim);
    double worst = 0;
    for (int b = 0; b < B; b++) {
        const int T = prompts[b] + DECODED;
        Floats turned((size_t)T * width), kept; // RoPE applied; through the cache
        for (int t = 0; t < T; t++) {
            rope_angles(c, t, angles.data());
            for (int i = 0; i < width; i++) {
                const float *x = &qkv[b][(size_t)t * width + i / head_dim * head_dim];
                const int d = i % head_dim, j = d % (head_dim / 2);
                const float cos = angles[2 * j], sin = angles[2 * j + 1], a = x[j],
                            z = x[j + head_dim / 2];
                float y = i >= q_dim + KV * head_dim ? x[d]
                          : d < head_dim / 2         ? a * cos - z * sin
                                                     : z * cos + a * sin;
                turned[(size_t)t * width + i] = __half2float(__float2half_rn(y));
            }
        }
        kept = turned;
        for (int t = 0; t < T && bits < 16; t++)
            for (int h = 0; h < 2 * KV; h++) {
                float *x = &kept[(size_t)t * width + q_dim + h * head_dim];
                through_cache(x, head_dim);
            }
        double error = 0, size = 0;
        for (int t = 0; t < T; t++)
            for (int h = 0; h < c->n_heads; h++) {
                const float *q = &turned[(size_t)t * width + h * head_dim];
                std::vector<double> p(t + 1), o(head_dim);
                double most = -INFINITY, total = 0;
                auto row = [&](int i, int v) {
                    return &kept[(size_t)i * width + q_dim + (v * KV + h / group) * head_dim];
                };
                for (int i = 0; i <= t; i++) {
                    for (int d = 0; d < head_dim; d++) p[i] += q[d] * row(i, 0)[d] / sqrt(head_dim);
                    most = fmax(most, p[i]);
                }
                for (int i = 0; i <= t; i++) total += p[i] = exp(p[i] - most);
                for (int i = 0; i <= t; i++)
                    for (int d = 0; d < head_dim; d++) o[d] += p[i] / total * row(i, 1)[d];
                for (int d = 0; d < head_dim; d++) {
                    double e = out[b][(size_t)t * q_dim + h * head_dim + d] - o[d];
                    error += e * e;
                    size += o[d] * o[d];
                    worst = fmax(worst, fabs(e));
                }
            }
        printf("     sequence %d: off by %.2g, one number at most by %.2g\n", b, sqrt(error / size),
               worst);
        check(sqrt(error / size) < 2e-3, "too much");
        cudaFree(all[b]);
    }
    cudaFree(rows);
    gpu_state_free(s);
}

int main() {
    char why[300];
    Config any = {};
    any.head_dim = 64;
    any.n_heads = any.n_kv_heads = 1;
    if (!gpu_can_run(&any, false, why, sizeof why)) {
        printf("skip the twins of quantization: %s\n", why);
        return 0;
    }
    test_rotation();
    test_elements();
    for (int group_size : {-1, 128}) {
        test_ranges(group_size, false);
        test_ranges(group_size, true);
        test_half_layers(group_size);
        test_gptq(group_size, DIM, HIDDEN);
        test_gptq(group_size, HIDDEN, DIM);
        test_smoothing(group_size);
    }
    test_head(1000, 256);
    test_head(2056, 1040);
    for (int bits : {16, 8}) {
        test_attention(64, 4, bits);
        test_attention(128, 3, bits);
        test_attention(128, 9, bits);
    }
    test_end();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
