/* Tests of kernels.cu on the GPU: test_kernels [quick]. `quick` runs the small shapes only, for
 * compute-sanitizer. Prints "ok   name" or "FAIL name" for each test and "N passed, N failed". */
#include "../files.h"

#include <algorithm>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

static int n_passed, n_failed, n_problems;
static std::string running;

static void test_end() {
    if (running.empty()) return;
    printf("%s %s\n", n_problems ? "FAIL" : "ok  ", running.c_str());
    fflush(stdout);
    n_problems ? n_failed++ : n_passed++;
}

static void test_begin(const char *name) {
    test_end();
    running = name;
    n_problems = 0;
}

static void check(bool ok, const char *format, ...) {
    if (ok || n_problems++ > 10) return;
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static void gpu(cudaError_t status) {
    if (status != cudaSuccess) die("CUDA: %s", cudaGetErrorString(status));
}

template <typename T> static T *device(size_t n) {
    T *p;
    gpu(cudaMalloc(&p, n * sizeof(T)));
    return p;
}

template <typename T> static T *upload(const std::vector<T> &v) {
    T *p = device<T>(v.size());
    gpu(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <typename T> static std::vector<T> download(const T *p, size_t n) {
    std::vector<T> v(n);
    gpu(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}

static uint64_t seed = 1;

static uint64_t random_bits() { // splitmix64
    uint64_t z = seed += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void fill_random(void *p, size_t bytes) {
    uint8_t *to = (uint8_t *)p;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t bits = random_bits();
        memcpy(to + i, &bits, bytes - i < 8 ? bytes - i : 8);
    }
}

/* ---- a quantized linear in the file's layout ------------------------------------------------ */

enum Kind { RANDOM, LOWEST, HIGHEST, N_KINDS };

struct Weights {
    int N, K;
    std::vector<uint8_t> qweight, s_group;
    std::vector<float> s_channel;
};

static Weights make_weights(int N, int K, bool groups, Kind kind) {
    Weights w = {N, K, std::vector<uint8_t>((size_t)N * K / 2), {}, std::vector<float>(N)};
    if (groups) w.s_group.resize((size_t)N * (K / GROUP));
    fill_random(w.qweight.data(), w.qweight.size());
    fill_random(w.s_group.data(), w.s_group.size());
    for (uint8_t &s : w.s_group) s = kind == RANDOM ? s % 15 + 1 : 15;
    for (uint8_t &q : w.qweight) {
        if (kind == LOWEST) q = groups ? 0x00 : 0x11;
        if (kind == HIGHEST) q = 0xff;
        if (!groups && (q & 0x0f) == 0) q |= 0x08; // per channel no code is 0
        if (!groups && (q & 0xf0) == 0) q |= 0x80;
    }
    for (float &s : w.s_channel) s = (random_bits() % 1000 + 1) * 2e-6f;
    return w;
}

static Linear linear(const Weights &w) {
    Linear l = {};
    l.N = w.N;
    l.K = w.K;
    l.dtype = U8;
    l.qweight = (uint8_t *)w.qweight.data();
    l.s_channel = (float *)w.s_channel.data();
    l.s_group = w.s_group.empty() ? NULL : (uint8_t *)w.s_group.data();
    return l;
}

static GpuLinear create(const Weights &w) {
    Linear l = linear(w);
    return gpu_linear_create(&l, 1);
}

/* The plain-C twin: acc [M][N] = a [M][K] . w8 [N][K]. */
static void reference_c(const Weights &w, const int8_t *a, int M, int *acc) {
    std::vector<int8_t> q(w.K);
    for (int n = 0; n < w.N; n++) {
        for (int k = 0; k < w.K; k++) {
            int u = w.qweight[((size_t)n * w.K + k) / 2] >> 4 * (k % 2) & 15;
            int s = w.s_group.empty() ? 1 : w.s_group[(size_t)n * (w.K / GROUP) + k / GROUP];
            q[k] = (u - 8) * s;
        }
        for (int m = 0; m < M; m++) {
            int sum = 0;
            for (int k = 0; k < w.K; k++) sum += a[(size_t)m * w.K + k] * q[k];
            acc[(size_t)m * w.N + n] = sum;
        }
    }
}

/* The same as a kernel without any trick, for shapes that would take the CPU hours. */
__global__ void reference_kernel(const uint8_t *qweight, const uint8_t *s_group, const int8_t *a,
                                 int M, int N, int K, int *acc) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    int m = blockIdx.y * blockDim.y + threadIdx.y;
    if (m >= M || n >= N) return;
    int sum = 0;
    for (int k = 0; k < K; k += 2) {
        int byte = qweight[((size_t)n * K + k) / 2];
        int s = s_group ? s_group[(size_t)n * (K / GROUP) + k / GROUP] : 1;
        sum += a[(size_t)m * K + k] * ((byte & 15) - 8) * s;
        sum += a[(size_t)m * K + k + 1] * ((byte >> 4) - 8) * s;
    }
    acc[(size_t)m * N + n] = sum;
}

/* ---- one linear, its input and what must come out ------------------------------------------- */

__device__ int half_order(half h) { // consecutive halves have consecutive numbers
    int bits = __half_as_ushort(h);
    return bits & 0x8000 ? 0x8000 - bits : bits;
}

/* errors[0]: outputs more than one ulp off, [1]: outputs not equal, [2]: writes past row M. */
__global__ void compare_kernel(const int *want, const float *s_a, const float *s_channel, int M,
                               int N, int guard, const half *y, int *errors) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)(M + guard) * N) return;
    int m = i / N;
    int n = i % N;
    if (m >= M) {
        if (__half_as_ushort(y[i]) != 0xffff) atomicAdd(errors + 2, 1);
        return;
    }
    half right = __float2half_rn(((float)want[i] * s_a[m]) * s_channel[n]);
    int ulps = __half_as_ushort(y[i]) == 0xffff ? 99 : abs(half_order(y[i]) - half_order(right));
    if (ulps > 1) atomicAdd(errors, 1);
    if (ulps > 0) atomicAdd(errors + 1, 1);
}

/* The residual stream before a product is added to it; after row M it must stay so. */
__device__ float residual_before(size_t i) {
    return (float)(i * 2654435761 % 4001) - 2000;
}

__global__ void fill_residual_kernel(float *x, size_t n, float factor) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = residual_before(i) * factor;
}

/* errors[0]: sums that are not those of plain C, bit for bit, [1]: writes past row M. */
__global__ void compare_residual_kernel(const int *want, const float *s_a, const float *s_channel,
                                        int M, int N, int guard, const float *x, float factor,
                                        int *errors) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)(M + guard) * N) return;
    float right = residual_before(i) * factor;
    if (i < (size_t)M * N) {
        float y = __fmul_rn(__fmul_rn((float)want[i], s_a[i / N]), s_channel[i % N]);
        right = __fadd_rn(right, y);
    }
    if (x[i] != right) atomicAdd(errors + (i < (size_t)M * N ? 0 : 1), 1);
}

constexpr int GUARD = 8; // rows after the output that must stay as they were

struct Case {
    int N, K, max_M;
    GpuLinear l;
    int8_t *a;                  // [max_M][K]
    float *s_a;                 // [max_M]
    float *s_channel;           // [N]
    float *ones;                // [max(max_M, N)] scales of one
    float *unit;                // [N] the same for l.s_channel, whose sums may be 16 times as large
    uint8_t *qweight, *s_group; // the file's
    int *want;                  // [max_M][N]
    half *y;                    // [max_M + GUARD][N]
    float *x;                   // [max_M + GUARD][N]
    int *errors;                // [3]
};

static void reference(const Case &c, int M) {
    reference_kernel<<<dim3((c.N + 31) / 32, (M + 7) / 8), dim3(32, 8)>>>(c.qweight, c.s_group, c.a,
                                                                          M, c.N, c.K, c.want);
    gpu(cudaGetLastError());
}

static Case make_case(const Weights &w, int max_M, Kind kind) {
    Case c = {};
    c.N = w.N;
    c.K = w.K;
    c.max_M = max_M;
    c.l = create(w);
    std::vector<int8_t> a((size_t)max_M * w.K);
    fill_random(a.data(), a.size());
    if (kind != RANDOM) memset(a.data(), -128, a.size());
    std::vector<float> s_a(max_M);
    for (float &s : s_a) s = (random_bits() % 1000 + 1) * 1e-5f;
    c.a = upload(a);
    c.s_a = upload(s_a);
    c.s_channel = upload(w.s_channel);
    c.qweight = upload(w.qweight);
    c.s_group = w.s_group.empty() ? NULL : upload(w.s_group);
    c.want = device<int>((size_t)max_M * w.N);
    c.ones = upload(std::vector<float>(std::max(max_M, w.N), 1.0f));
    c.unit = upload(std::vector<float>(w.N, w.s_group.empty() ? 1.0f / 16 : 1.0f));
    c.y = device<half>((size_t)(max_M + GUARD) * w.N);
    c.x = device<float>((size_t)(max_M + GUARD) * w.N);
    c.errors = device<int>(3);
    reference(c, max_M);
    return c;
}

static void free_case(Case &c) {
    gpu_linear_free(&c.l);
    void *all[] = {c.a,       c.s_a,  c.s_channel, c.ones, c.unit,  c.qweight,
                   c.s_group, c.want, c.y,         c.x,    c.errors};
    for (void *p : all) gpu(cudaFree(p));
}

static void poison(const Case &c, int M) {
    gpu(cudaMemset(c.y, 0xff, (size_t)(M + GUARD) * c.N * sizeof(half)));
}

static void compare(const Case &c, int M, GemmKernel kernel) {
    gpu(cudaMemset(c.errors, 0, 3 * sizeof(int)));
    size_t n = (size_t)(M + GUARD) * c.N;
    compare_kernel<<<(n + 255) / 256, 256>>>(c.want, c.s_a, c.s_channel, M, c.N, GUARD, c.y,
                                             c.errors);
    gpu(cudaGetLastError());
    std::vector<int> e = download(c.errors, 3);
    check(!e[0] && !e[1] && !e[2],
          "M=%d N=%d K=%d %s, kernel %d: %d outputs off, %d not equal, %d past the end", M, c.N,
          c.K, c.s_group ? "g128" : "channel", kernel, e[0], e[1], e[2]);
}

/* The product added to a residual stream of residual_before() * factor, equal bit for bit. */
static void run_residual(const Case &c, int M, GemmKernel kernel, const GpuLinear &l,
                         const float *s_a, const float *s_channel, float factor) {
    size_t n = (size_t)(M + GUARD) * c.N;
    fill_residual_kernel<<<(n + 255) / 256, 256>>>(c.x, n, factor);
    gpu(cudaMemset(c.errors, 0, 2 * sizeof(int)));
    gpu_gemm_run(kernel, &l, c.a, s_a, M, NULL, c.x, 0);
    compare_residual_kernel<<<(n + 255) / 256, 256>>>(c.want, s_a, s_channel, M, c.N, GUARD, c.x,
                                                      factor, c.errors);
    gpu(cudaGetLastError());
    std::vector<int> e = download(c.errors, 2);
    check(!e[0] && !e[1], "M=%d N=%d K=%d, kernel %d, %s: %d not equal, %d past the end", M, c.N,
          c.K, kernel, factor ? "residuals" : "sums", e[0], e[1]);
}

/* A kernel's output as halves; added to a residual stream; and its integer sums, which scales of
 * one and a stream of zeros let through. */
static void run_kernel(const Case &c, int M, GemmKernel kernel) {
    poison(c, M);
    gpu_gemm_run(kernel, &c.l, c.a, c.s_a, M, c.y, NULL, 0);
    compare(c, M, kernel);
    run_residual(c, M, kernel, c.l, c.s_a, c.s_channel, 1);
    GpuLinear unit = c.l;
    unit.s_channel = c.unit;
    run_residual(c, M, kernel, unit, c.ones, c.ones, 0);
}

/* What gpu_gemm_w4a8() chooses for M tokens, or every kernel. */
static void run_case(const Case &c, int M, bool every_kernel) {
    if (every_kernel) {
        for (int i = 0; i < N_GEMM_KERNELS; i++) run_kernel(c, M, (GemmKernel)i);
    } else {
        run_kernel(c, M, gpu_gemm_choose(&c.l, M, true));
    }
    poison(c, M);
    gpu_gemm_w4a8(&c.l, c.a, c.s_a, M, c.y, NULL, 0);
    compare(c, M, gpu_gemm_choose(&c.l, M, false));
}

/* ---- the tests ------------------------------------------------------------------------------ */

static void test_reference(bool groups) {
    Weights w = make_weights(64, 256, groups, RANDOM);
    Case c = make_case(w, 9, RANDOM);
    std::vector<int> want(9 * 64);
    reference_c(w, download(c.a, 9 * 256).data(), 9, want.data());
    check(download(c.want, 9 * 64) == want, "the reference kernel differs from plain C");
    run_case(c, 9, true);
    free_case(c);
}

static void test_stacked(bool groups) {
    Weights w[3] = {make_weights(128, 384, groups, RANDOM), make_weights(64, 384, groups, RANDOM),
                    make_weights(192, 384, groups, RANDOM)};
    Linear parts[3];
    Weights all = {};
    all.K = 384;
    for (int i = 0; i < 3; i++) {
        parts[i] = linear(w[i]);
        all.N += w[i].N;
        all.qweight.insert(all.qweight.end(), w[i].qweight.begin(), w[i].qweight.end());
        all.s_group.insert(all.s_group.end(), w[i].s_group.begin(), w[i].s_group.end());
        all.s_channel.insert(all.s_channel.end(), w[i].s_channel.begin(), w[i].s_channel.end());
    }
    Case c = make_case(all, 5, RANDOM);
    gpu_linear_free(&c.l);
    c.l = gpu_linear_create(parts, 3);
    check(c.l.N == all.N && c.l.K == all.K, "stacked shape");
    run_case(c, 5, true);
    free_case(c);
}

static void test_shape(int N, int K, bool groups, Kind kind, bool every_kernel) {
    Case c = make_case(make_weights(N, K, groups, kind), every_kernel ? 3000 : 1000, kind);
    for (int M = 1; M <= 40; M++) run_case(c, M, every_kernel);
    for (int M : {48, 63, 64, 65, 96, 127, 128, 129, 200, 256, 384, 768, 1000, 1536, 3000}) {
        if (M <= c.max_M) run_case(c, M, true);
    }
    free_case(c);
}

static void test_quick(bool groups) {
    for (int K : {128, 1152}) {
        Case c = make_case(make_weights(320, K, groups, RANDOM), 150, RANDOM);
        for (int M : {1, 19, 150}) run_case(c, M, true);
        free_case(c);
    }
}

/* More tiles than blocks, so that a block does several. */
static void test_many_tiles(bool groups, int M) {
    Case c = make_case(make_weights(17088, 128, groups, RANDOM), M, RANDOM);
    run_case(c, M, true);
    free_case(c);
}

static void test_repeated(bool groups) {
    Case c = make_case(make_weights(1536, 4096, groups, RANDOM), 200, RANDOM);
    for (int M : {1, 16, 32, 64, 200}) {
        for (int kernel = 0; kernel < N_GEMM_KERNELS; kernel++) {
            poison(c, M);
            for (int i = 0; i < 20; i++) {
                gpu_gemm_run((GemmKernel)kernel, &c.l, c.a, c.s_a, M, c.y, NULL, 0);
            }
            compare(c, M, (GemmKernel)kernel);
        }
    }
    free_case(c);
}

/* A graph of the quantizer and a GEMM fed by it, several times over: replays must give what plain
 * launches give, with every kernel's start overlapping the end of the one before. */
static void test_graph(bool groups) {
    const int N = 1536, K = 4096, max_M = 200;
    Case c = make_case(make_weights(N, K, groups, RANDOM), max_M, RANDOM);
    std::vector<half> x((size_t)max_M * K);
    for (half &h : x) h = __float2half((float)(random_bits() % 255) - 127);
    half *x_gpu = upload(x);
    cudaStream_t stream;
    gpu(cudaStreamCreate(&stream));
    for (int M : {1, 16, 32, 64, 200}) {
        // The quantizer's output becomes the case's input, and the reference is taken again.
        gpu_quantize(x_gpu, M, K, c.a, c.s_a, 0);
        reference(c, M);
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < 5; i++) {
            gpu_quantize(x_gpu, M, K, c.a, c.s_a, stream);
            gpu_gemm_w4a8(&c.l, c.a, c.s_a, M, c.y, NULL, stream);
        }
        gpu(cudaStreamEndCapture(stream, &graph));
        gpu(cudaGraphInstantiate(&exec, graph, 0));
        poison(c, M);
        gpu(cudaMemset(c.a, 0, (size_t)M * K));
        gpu(cudaMemset(c.s_a, 0, M * sizeof(float)));
        gpu(cudaDeviceSynchronize());
        for (int i = 0; i < 5; i++) gpu(cudaGraphLaunch(exec, stream));
        gpu(cudaStreamSynchronize(stream));
        compare(c, M, gpu_gemm_choose(&c.l, M, false));
        gpu(cudaGraphExecDestroy(exec));
        gpu(cudaGraphDestroy(graph));
    }
    gpu(cudaStreamDestroy(stream));
    gpu(cudaFree(x_gpu));
    free_case(c);
}

/* quantize_row() of qqq.c on the same values. */
static void test_quantize() {
    for (int K : {64, 448, 4096, 14336, 21760}) {
        const int M = 12;
        std::vector<half> x((size_t)M * K);
        for (int m = 0; m < M; m++) {
            float scale = exp2f((float)m * 3 - 24);
            for (int k = 0; k < K; k++) {
                float f = ((float)(random_bits() % 2001) / 1000 - 1) * scale;
                x[(size_t)m * K + k] = __float2half(m == 0 ? 0 : m == 1 ? 6e-8f * (k % 3) : f);
            }
            // x / s_a is 63.5 there, but x (1 / s_a) is beside it for some m.
            if (m > 1) x[(size_t)m * K + 31] = __float2half(scale * (1 + (m - 5) / 512.0f));
            if (m > 1) x[(size_t)m * K + 62] = __float2half(scale * (1 + (m - 5) / 512.0f) / 2);
        }
        // x / s_a rounds to 63.5 exactly, a tie; x times 1 / s_a does not.
        x[(size_t)8 * K + 1] = __float2half(1.001953125f); // the largest
        x[(size_t)8 * K + 2] = __float2half(0.5009765625f);
        x[(size_t)9 * K + 17] = __ushort_as_half(0x7e00);   // NaN
        x[(size_t)10 * K + 5] = __ushort_as_half(0xfc00);   // -infinity
        x[(size_t)11 * K + K - 1] = __float2half(65504.0f); // the largest half
        half *x_gpu = upload(x);
        int8_t *a = device<int8_t>((size_t)M * K);
        float *s_a = device<float>(M);
        gpu(cudaMemset(a, 0x55, (size_t)M * K));
        gpu_quantize(x_gpu, M, K, a, s_a, 0);
        std::vector<int8_t> got = download(a, (size_t)M * K);
        std::vector<float> got_s = download(s_a, M);
        std::vector<float> row(K);
        std::vector<int8_t> want(K);
        for (int m = 0; m < M; m++) {
            for (int k = 0; k < K; k++) row[k] = __half2float(x[(size_t)m * K + k]);
            float s = quantize_row(row.data(), K, want.data());
            check(isnan(s) ? isnan(got_s[m]) : s == got_s[m], "K=%d row %d: s_a %g, want %g", K, m,
                  got_s[m], s);
            check(memcmp(want.data(), &got[(size_t)m * K], K) == 0, "K=%d row %d: a differs", K, m);
        }
        gpu(cudaFree(x_gpu));
        gpu(cudaFree(a));
        gpu(cudaFree(s_a));
    }
}

/* One row of a linear's input against `want` [K], in both forms. float rounding may differ in its
 * last bits: then s_a does too, and an a that was near a half may be one off. */
static void check_input(const char *what, int row, const std::vector<float> &want, const int8_t *a,
                        float s_a, const half *h, float scale) {
    const int K = want.size();
    std::vector<int8_t> right(K);
    float s = quantize_row(want.data(), K, right.data());
    check(fabsf(s_a - s) <= 2e-6f * s, "%s, row %d: s_a %g, want %g", what, row, s_a, s);
    int off = 0, far = 0, unequal = 0;
    for (int k = 0; k < K; k++) {
        off += a[k] != right[k];
        far += abs(a[k] - right[k]) > 1;
        float f = __half2float(h[k]) * scale, smallest = 6e-8f * scale;
        unequal += !(fabsf(f - want[k]) <= fabsf(want[k]) * 0.0005f + smallest);
    }
    check(far == 0 && off <= 1 + K / 500, "%s, row %d: %d of %d a differ, %d by more than one",
          what, row, off, K, far);
    check(unequal == 0, "%s, row %d: %d halves differ", what, row, unequal);
    int exponent;
    check(frexpf(scale, &exponent) == 0.5f && exponent >= 1, "%s: scale %g", what, scale);
}

/* A kernel's output in both forms, K values a row, against want [T][K]. */
template <typename Launch>
static void check_inputs(const char *what, int T, int K,
                         const std::vector<std::vector<float>> &want, Launch launch) {
    int8_t *a = device<int8_t>((size_t)T * K);
    half *h = device<half>((size_t)T * K);
    float *s_a = device<float>(T), *scale = device<float>(T);
    gpu(cudaMemset(a, 0x55, (size_t)T * K));
    gpu(cudaMemset(h, 0xff, (size_t)T * K * sizeof(half)));
    launch(LinearInput{a, NULL, s_a});
    launch(LinearInput{NULL, h, scale});
    std::vector<int8_t> got_a = download(a, (size_t)T * K);
    std::vector<half> got_h = download(h, (size_t)T * K);
    std::vector<float> got_s = download(s_a, T), got_scale = download(scale, T);
    for (int t = 0; t < T; t++) {
        check_input(what, t, want[t], &got_a[(size_t)t * K], got_s[t], &got_h[(size_t)t * K],
                    got_scale[t]);
    }
    void *all[] = {a, h, s_a, scale};
    for (void *p : all) gpu(cudaFree(p));
}

static float random_normal() {
    float sum = -6;
    for (int i = 0; i < 12; i++) sum += (float)(random_bits() % 65536) / 65536;
    return sum;
}

/* rmsnorm() of qqq.c; residual values in the thousands, as LLaMA's are. */
static void test_rmsnorm() {
    for (int dim : {256, 1032, 4096, 16384}) {
        for (int T : {1, 5, 300}) {
            std::vector<float> x((size_t)T * dim), weight(dim), row(dim);
            for (size_t i = 0; i < x.size(); i++) x[i] = random_normal() * (i % 97 ? 1 : 3000);
            for (float &w : weight) w = 1 + 0.3f * random_normal();
            std::vector<std::vector<float>> want(T, row);
            for (int t = 0; t < T; t++) {
                rmsnorm(&x[(size_t)t * dim], weight.data(), 1, dim, 1e-5f, want[t].data());
            }
            float *x_gpu = upload(x), *weight_gpu = upload(weight);
            check_inputs("rmsnorm", T, dim, want, [&](LinearInput out) {
                gpu_rmsnorm(x_gpu, weight_gpu, T, dim, 1e-5f, out, 0);
            });
            gpu(cudaFree(x_gpu));
            gpu(cudaFree(weight_gpu));
        }
    }
}

/* silu(gate) * up, also where the product is beyond the largest half. */
static void test_swiglu() {
    for (int hidden : {896, 1800, 14336, 28672}) {
        for (int T : {1, 7, 300}) {
            std::vector<half> in((size_t)T * 2 * hidden);
            std::vector<std::vector<float>> want(T, std::vector<float>(hidden));
            for (int t = 0; t < T; t++) {
                half *gate = &in[(size_t)t * 2 * hidden], *up = gate + hidden;
                for (int k = 0; k < hidden; k++) {
                    float factor = t % 3 == 1 && k == 77 ? 700 : 1;
                    gate[k] = __float2half(random_normal() * factor);
                    up[k] = __float2half(random_normal() * factor);
                    float g = __half2float(gate[k]);
                    want[t][k] = g / (1 + expf(-g)) * __half2float(up[k]);
                }
            }
            half *in_gpu = upload(in);
            check_inputs("swiglu", T, hidden, want,
                         [&](LinearInput out) { gpu_swiglu(in_gpu, T, hidden, out, 0); });
            gpu(cudaFree(in_gpu));
        }
    }
}

int main(int argc, char **argv) {
    bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    test_begin("quantizer equals plain C");
    test_quantize();
    test_begin("RMSNorm equals plain C");
    test_rmsnorm();
    test_begin("SwiGLU equals plain C");
    test_swiglu();
    for (bool groups : {false, true}) {
        const char *kind = groups ? "g128" : "channel";
        static char names[64][80];
        static int n_names;
        auto begin = [&](const char *format, int N, int K) {
            char *name = names[n_names++];
            int n = snprintf(name, 80, format, N, K);
            snprintf(name + n, 80 - n, ", %s", kind);
            test_begin(name);
        };
        begin("reference kernel equals plain C", 0, 0);
        test_reference(groups);
        begin("three parts stacked", 0, 0);
        test_stacked(groups);
        begin("more tiles than blocks", 0, 0);
        test_many_tiles(groups, quick ? 3 : 150);
        if (quick) {
            begin("random, small shapes", 0, 0);
            test_quick(groups);
            continue;
        }
        for (int N : {64, 192}) {
            for (int K : {64, 128, 448, 21760}) {
                if (groups && K % GROUP) continue;
                begin("random, N=%d K=%d", N, K);
                test_shape(N, K, groups, RANDOM, true);
            }
        }
        begin("lowest weights, N=%d K=%d", 192, 21760);
        test_shape(192, 21760, groups, LOWEST, false);
        begin("highest weights, N=%d K=%d", 192, 21760);
        test_shape(192, 21760, groups, HIGHEST, false);
        begin("repeated runs", 0, 0);
        test_repeated(groups);
        begin("in a CUDA graph", 0, 0);
        test_graph(groups);
        const int shapes[5][2] = {
            {8192, 21760}, {6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}};
        for (const int *s : shapes) {
            begin("random, N=%d K=%d", s[0], s[1]);
            test_shape(s[0], s[1], groups, RANDOM, false);
        }
    }
    test_end();
    gpu(cudaDeviceSynchronize());
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
