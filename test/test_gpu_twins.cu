/* The parts of kernels.cu 5, quantization, against their twins in qqq.c, on the same inputs; and
 * lm_head in 8 bits and attention, with its cache in 16 and 8, against sums in double. They are
 * no public functions: hence the #include. Prints as test_kernels does. */
#include "../kernels.cu"

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

template <typename T> static std::vector<T> download(GpuQuantizer *q, const T *p, size_t n) {
    std::vector<T> v(n);
    to_host(q, v.data(), p, n);
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

enum { DIM = 256, HIDDEN = 896, TOKENS = 1024 }; // data/tiny's

static GpuQuantizer *new_quantizer(int group_size) {
    Config c = {};
    c.dim = DIM;
    c.hidden_dim = HIDDEN;
    c.n_layers = 1;
    c.n_heads = 4;
    c.n_kv_heads = 1;
    c.head_dim = 64;
    c.vocab_size = 16;
    c.norm_eps = 1e-5f;
    c.rope_theta = 10000;
    Floats embedding = random_floats(16 * DIM, 1);
    Linear e = {};
    e.N = 16;
    e.K = DIM;
    e.dtype = F32;
    e.w = embedding.data();
    std::vector<int> tokens(TOKENS, 3);
    std::vector<int8_t> signs(DIM);
    random_signs(7, DIM, signs.data());
    Method method = {group_size, true, true, true, true, signs.data(), NULL};
    return gpu_quantizer_new(&c, &method, &e, tokens.data(), 2, TOKENS / 2, 0);
}

static void test_rotation() {
    test_begin("rotation: the same floats");
    GpuQuantizer *q = new_quantizer(-1);
    std::vector<int8_t> signs = download(q, q->signs, DIM);
    for (int outputs = 0; outputs < 2; outputs++)
        for (int n = 64; n <= DIM; n *= 4) {
            const int8_t *s = n == DIM ? signs.data() : NULL, *gpu_s = s ? q->signs : NULL;
            Floats w = random_floats(DIM * DIM, 1);
            to_gpu(q, q->w, w.data(), w.size());
            if (outputs) {
                rotate_outputs(w.data(), DIM, DIM, n, s);
                rotate_outputs(q, q->w, DIM, DIM, n, gpu_s);
            } else {
                rotate_inputs(w.data(), DIM, DIM, n, s);
                rotate_inputs(q, q->w, DIM, DIM, n, gpu_s);
            }
            check(download(q, q->w, w.size()) == w, "%s, by %d", outputs ? "outputs" : "inputs", n);
        }
    const int n = 192; // 3 x 64: its cosines may differ in the last bit
    Floats w = random_floats(n * n, 1);
    to_gpu(q, q->w, w.data(), w.size());
    rotate_inputs(w.data(), n, n, n, NULL);
    rotate_inputs(q, q->w, n, n, n, (const int8_t *)NULL);
    const Floats gpu_w = download(q, q->w, w.size());
    float worst = 0;
    for (size_t i = 0; i < w.size(); i++) worst = fmaxf(worst, fabsf(gpu_w[i] - w[i]));
    check(worst < 1e-6f, "inputs, by %d: off by %g", n, worst);
    gpu_quantizer_free(q);
}

/* sum_k importance_k (w_k - q_k scale)^2 of a row, in double. */
static double row_error(const Linear *l, int n, const float *w, const float *importance) {
    Floats row(l->K);
    dequantize_row(l, n, row.data());
    double sum = 0;
    for (int k = 0; k < l->K; k++) sum += importance[k] * pow((double)row[k] - w[k], 2);
    return sum;
}

/* What is in q->qweight, s_channel and s_group. */
static Linear download_linear(GpuQuantizer *q, int N, int K) {
    Linear l = quantized_new(N, K, q->method.group_size);
    to_host(q, (uint16_t *)l.qweight, q->qweight, (size_t)N * K / 4);
    to_host(q, (float *)l.s_channel, q->s_channel, N);
    if (l.s_group) to_host(q, (uint8_t *)l.s_group, q->s_group, (size_t)N * K / GROUP);
    return l;
}

static void test_ranges(int group_size, bool search) {
    char name[100];
    snprintf(name, sizeof name, "ranges %s, %s, and rounding", search ? "searched" : "max|w|",
             group_size > 0 ? "g128" : "per channel");
    test_begin(name);
    const int N = DIM, K = HIDDEN;
    GpuQuantizer *q = new_quantizer(group_size);
    Floats w = random_floats((size_t)N * K, 0.02f), importance = random_floats(K, 1);
    for (float &x : importance) x = 0.01f + x * x;
    for (int k = 0; k < K; k++) {
        w[k] = 0;
        w[K + k] *= 1e-38f;     // too small for a scale
        w[2 * K + k] *= 1e-30f; // whose squares vanish
        w[3 * K + k] *= 1e30f;
        if (k / GROUP == 1) w[4 * K + k] = 0;
    }
    to_gpu(q, q->w, w.data(), w.size());
    to_gpu(q, q->importance, importance.data(), K);
    round_to_nearest(q, q->w, NULL, search ? q->importance : NULL, N, K);
    Linear gpu = download_linear(q, N, K);
    Linear c = round_to_nearest(w.data(), search ? importance.data() : NULL, N, K, group_size);
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
    gpu_quantizer_free(q);
}

/* Inputs X of down with a few large channels, and F near to them. */
static Floats activations(int K) {
    Floats x = random_floats((size_t)TOKENS * K, 1);
    for (size_t i = 0; i < x.size(); i++) x[i] *= i % K % 100 == 5 ? 20 : i % K % 7 == 0 ? 3 : 1;
    for (size_t t = 0; t < TOKENS; t++) {
        for (int k = 1; k < K; k++) x[t * K + k] += 0.4f * x[t * K + k - 1];
        x[t * K + 11] = 0; // dead
    }
    return x;
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
    begin("moments");
    GpuQuantizer *q = new_quantizer(group_size);
    Floats x = activations(K), d = random_floats((size_t)TOKENS * DIM, 0.3f);
    std::vector<double> H((size_t)K * K), C(K * K), R((size_t)DIM * K);
    Floats f = x;
    for (float &v : f) v *= 0.02f * random_float();
    to_gpu(q, q->x, x.data(), x.size());
    zero(q, q->H, (size_t)K * K * sizeof(float));
    zero(q, q->M, (size_t)DIM * K * sizeof(float));
    for (int half = 0; half < 2; half++)
        add_hessian(q, q->x + (size_t)half * TOKENS / 2 * K, K, TOKENS / 2);
    for_each(q, (size_t)K * K, mirror_kernel, q->H, K);
    add_moments(H.data(), x.data(), K, x.data(), K, TOKENS);
    Floats h = download(q, q->H, (size_t)K * K);
    double off = distance(h.data(), H.data(), h.size());
    check(off <= 2e-3, "H off by %g", off);
    printf("     H off by %.2g (Frobenius)", off);
    // M = W C + R, both ways: (D + F W^T)^T X
    Floats w = random_floats((size_t)N * K, 0.05f);
    if (N == DIM) {
        add_moments(C.data(), f.data(), K, x.data(), K, TOKENS);
        add_moments(R.data(), d.data(), DIM, x.data(), K, TOKENS);
        std::vector<double> M(R);
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K; k++)
                for (int j = 0; j < K; j++) M[n * K + j] += (double)w[n * K + k] * C[k * K + j];
        to_gpu(q, q->f, f.data(), f.size());
        to_gpu(q, q->lacking, d.data(), d.size());
        to_gpu(q, q->w, w.data(), w.size());
        add_linear(q, q->w, K, q->f, TOKENS, q->lacking);
        add_moments(q, q->lacking, DIM, q->x, K, TOKENS);
        Floats m = download(q, q->M, (size_t)N * K);
        off = distance(m.data(), M.data(), m.size());
        check(off <= 2e-3, "M off by %g", off);
        printf(", M by %.2g", off);
    }
    printf("\n");

    begin("the inverse of H");
    for (size_t i = 0; i < H.size(); i++) H[i] = h[i];
    Inverse inverse = hessian_inverse(H.data(), K, true);
    std::vector<double> diagonal(K);
    Floats importance(K);
    for (int k = 0; k < K; k++) {
        diagonal[k] = H[k * (K + 1)];
        importance[k] = diagonal[k] > 0 ? diagonal[k] : 1;
    }
    hessian_inverse(q, diagonal.data(), K);
    std::vector<double> U = download(q, q->U, (size_t)K * K);
    check(!memcmp(download(q, q->order, K).data(), inverse.order, K * sizeof(int)), "other order");
    off = distance(U.data(), inverse.U, U.size());
    check(off <= 1e-10, "off by %g", off);
    printf("     U off by %.2g\n", off);

    begin("the importance of columns in GPTQ");
    to_gpu(q, q->importance, importance.data(), K);
    for_each(q, K, compensated_importance_kernel, q->U, q->order, (size_t)K, q->importance);
    compensated_importance(&inverse, importance.data());
    off = distance(download(q, q->importance, K).data(), importance.data(), K);
    check(off <= 1e-6, "off by %g", off);

    begin("the corrected target");
    Floats m(R.begin(), R.end()), target((size_t)N * K);
    m.resize((size_t)N * K);
    std::vector<double> zeros(C.size()), M(m.begin(), m.end());
    to_gpu(q, q->w, w.data(), w.size());
    to_gpu(q, q->product, m.data(), m.size());
    corrected_target(w.data(), N, &inverse, zeros.data(), M.data(), target.data());
    corrected_target(q, q->w, q->product, N, K);
    Floats gpu_target = download(q, q->target, (size_t)N * K);
    off = distance(gpu_target.data(), target.data(), target.size());
    check(off <= 1e-6, "off by %g", off);

    begin("GPTQ");
    to_gpu(q, q->importance, importance.data(), K);
    to_gpu(q, q->target, target.data(), target.size());
    for (int search = 0; search < 2; search++) {
        gptq(q, q->target, search ? q->importance : NULL, N, K);
        Linear gpu = download_linear(q, N, K);
        Linear c = gptq(target.data(), N, &inverse, search ? importance.data() : NULL, group_size);
        size_t same = 0, all = (size_t)N * K / 2;
        for (size_t i = 0; i < all; i++) same += gpu.qweight[i] == c.qweight[i];
        double total = squared_output(q, q->w, N, K);
        double e = relative_error(q, q->w, total, N, K),
               of_c = relative_error(w.data(), &c, H.data());
        printf("     %s: %.4f %% equal pairs of codes; error %.5f, %.5f in C\n",
               search ? "ranges searched" : "max|w|", 100.0 * same / all, e, of_c);
        check(search ? fabs(e / of_c - 1) < 1e-3 : same >= all * 0.9999, "too far apart");
        linear_free(&gpu);
        linear_free(&c);
    }
    inverse_free(&inverse);
    gpu_quantizer_free(q);
}

static void test_smoothing(int group_size) {
    char name[100];
    snprintf(name, sizeof name, "the search for smoothing, %s",
             group_size > 0 ? "g128" : "per channel");
    test_begin(name);
    GpuQuantizer *q = new_quantizer(group_size);
    const int first[3] = {0, 4, 6}, counts[3] = {3, 2, 1};
    GpuLinear *to[3] = {&q->qkv, &q->gate_up, &q->down};
    for (int i = 0; i < 3; i++) {
        const int K = to[i]->K, N = to[i]->N;
        Floats x = activations(K), max(K), s(K), gpu_s(K), w = random_floats((size_t)N * K, 0.05f);
        for (size_t j = 0; j < x.size(); j++) max[j % K] = fmaxf(max[j % K], fabsf(x[j]));
        to_gpu(q, q->sample[i], x.data(), x.size());
        to_gpu(q, float_weights(q, first[i]), w.data(), w.size());
        Linear linears[3] = {};
        float *from = w.data();
        for (int j = 0; j < counts[i]; j++) {
            Linear *l = &linears[j];
            linear_shape(&q->config, first[i] + j, &l->N, &l->K);
            l->dtype = F32;
            l->w = from;
            from += (size_t)l->N * K;
        }
        float t = search_smoothing(linears, counts[i], x.data(), TOKENS, max.data(), group_size,
                                   s.data());
        float gpu_t = search_smoothing(q, first[i], counts[i], to[i], q->sample[i], TOKENS,
                                       max.data(), gpu_s.data());
        printf("     t %g, %g in C\n", gpu_t, t);
        check(t == gpu_t && s == gpu_s, "not the same");
    }
    gpu_quantizer_free(q);
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
    for (int group_size : {-1, 128}) {
        test_ranges(group_size, false);
        test_ranges(group_size, true);
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
