/* QQQ on the GPU. Each kernel has a plain-C twin in qqq.c.
 *
 *   1 the forward pass: a layer, a prompt, a decode step as one graph
 *   2 the W4A8 GEMM with mma.sync, per channel and per group
 *   3 the small kernels around the linears: RMSNorm, SwiGLU, the activation quantizer, 16-bit
 *     linears, lm_head in 8 bits, the choice of a token
 *   4 attention and the KV cache: of a prompt, and of one token per sequence
 *   5 quantization: rotation, ranges, smoothing, moments, Cholesky, GPTQ, layer by layer
 *   6 weights, buffers, the engine: a first reader may skip it
 *   7 Hopper: the W4A8 GEMM with wgmma. It can be deleted: see gpu_gemm_choose()
 */
#include "qqq.h"

#include <cublas_v2.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string>
#include <type_traits>
#include <vector>

/* ================================================================================================
 * 1. The forward pass
 *
 *     x <- x + o(attention(rope(q(h)), rope(k(h)), v(h))),   h = rmsnorm(x)
 *     x <- x + down(silu(gate(h)) * up(h)),                  h = rmsnorm(x)
 *
 * as in qqq.c, section 1. q, k, v are one product; so are gate and up. A layer is eight kernels:
 *
 *     rmsnorm+quantize  qkv  attention+quantize  o+add  rmsnorm+quantize  gate,up
 *     swiglu+quantize  down+add              (prompts: cache, attention, quantize one by one)
 *
 * W4A8 linears are section 2's. Linears in 16 bits, and lm_head unless it is in 8, are cuBLAS's.
 * ============================================================================================== */

/* One linear, or several that share their input, stacked. */
struct Matrix {
    int N, K;
    GpuLinear w4a8;   // or
    half *w;          // [N][K] in 16 bits, or
    int8_t *bytes;    // [N][K] in 8 bits (lm_head), w = q s_channel
    float *s_channel; // [N]
};

struct GpuLayer {
    float *attention_norm, *ffn_norm; // [dim]
    Matrix qkv, o, gate_up, down;
};

struct GpuModel {
    Config config;
    bool quantized;
    half *embedding; // [vocab_size][dim]
    Matrix lm_head;  // lm_head.w may be the embedding
    float *norm;     // [dim]
    GpuLayer *layers;
    size_t bytes;
};

/* A candidate for the likeliest token as one number, so that the maximum is the choice: the logit
 * in the upper half, ~token in the lower one, which prefers the smaller of two equal tokens.
 * 0: none yet. All ones: a logit was not finite. */
typedef unsigned long long Choice;

/* Keys and values of one layer: rows of head_dim numbers of 16 or 8 bits, one per token and KV
 * head. */
struct GpuCache {
    int bits;
    uint8_t *keys, *values;    // [n_sequences][n_kv_heads][context][head_dim * bits / 8]
    half *k_scales, *v_scales; // [n_sequences][n_kv_heads][context] for 8 bits
    int n_kv_heads, context;
    __device__ size_t row(int sequence, int kv_head) const {
        return ((size_t)sequence * n_kv_heads + kv_head) * context;
    }
};

struct GpuState {
    const GpuModel *model;
    int n_sequences, context, max_T;
    cudaStream_t stream;
    cublasHandle_t cublas;
    cudaGraphExec_t step; // decode_step(), captured the first time
    uint8_t *memory;      // [bytes] of all arrays that follow, up to cublas_workspace
    size_t bytes;
    int *tokens;        // [max_T] of a prompt
    int *positions;     // [n_sequences] of the next token
    Choice *chosen;     // [n_sequences] the next token
    float *x;           // [max_T][dim] the residual stream
    int8_t *a;          // [max_T][K] a linear's input, int8 or
    half *h;            // [max_T][K] 16 bits; after the last layer: normed, ready for lm_head
    float *scale;       // [max_T] of a or h
    half *qkv;          // [max_T][q_dim + 2 kv_dim]
    half *att;          // [max_T][q_dim]
    half *gate_up;      // [max_T][2][hidden_dim]
    float *y;           // [max_T][dim] down's output before it is scaled (16-bit models)
    GpuCache cache;     // of all layers, one after the other: layer_cache()
    GpuCache in_halves; // of one sequence and layer, in 16 bits: see read_cache_kernel
    float4 *rope;       // [context][head_dim / 4] cos and sin of two angles
    float *logits;      // [max(LOGIT_ROWS, n_sequences)][vocab_size]
    Score *scores;      // [LOGIT_ROWS]
    int splits;         // blocks that share the positions of a sequence: attention_decode_kernel
    float *partial;     // [n_sequences][decode_rows()][splits][HEADS * (head_dim + 2)]
    int *arrived;       // [n_sequences][decode_rows() + 1]
    uint8_t *cublas_workspace;
    float *host_logits; // [n_sequences][vocab_size] pinned
    int *host_chosen;   // [n_sequences]
    int n_logits;       // rows of logits that the last call wrote
};

/* The T tokens that go through the layers together: consecutive ones of a sequence from position
 * `pos` on; or, if sequence is -1, the next token of each sequence. */
struct Batch {
    int T;
    int sequence, pos;
};

/* ---- a layer --------------------------------------------------------------------------------- */

/* A linear's input in the form that the model's linears want. */
static LinearInput linear_input(const GpuState *s) {
    if (s->model->quantized) return {s->a, NULL, s->scale};
    return {NULL, s->h, s->scale};
}

static void embed(GpuState *s, const int *tokens, int T);
static void linear(GpuState *s, const Matrix *w, int T, half *y);
static void add_linear(GpuState *s, const Matrix *w, int T, const half *in, const float *scale);
static void attend(GpuState *s, int l, const Batch &batch);
static void lm_head(GpuState *s, int first, int n);
static void choose(GpuState *s, int sequence, int n);

static void layer(GpuState *s, int l, const Batch &batch) {
    const Config *c = &s->model->config;
    const GpuLayer *w = &s->model->layers[l];
    const LinearInput input = linear_input(s);
    const int T = batch.T;

    // attention
    gpu_rmsnorm(s->x, w->attention_norm, T, c->dim, c->norm_eps, input, s->stream);
    linear(s, &w->qkv, T, s->qkv);
    attend(s, l, batch);
    add_linear(s, &w->o, T, s->att, NULL);

    // FFN
    gpu_rmsnorm(s->x, w->ffn_norm, T, c->dim, c->norm_eps, input, s->stream);
    linear(s, &w->gate_up, T, s->gate_up);
    gpu_swiglu(s->gate_up, T, c->hidden_dim, input, s->stream);
    add_linear(s, &w->down, T, s->h, s->scale);
}

/* All layers and the final norm: from x to h [T][dim], in 16 bits. */
static void layers(GpuState *s, const Batch &batch) {
    const Config *c = &s->model->config;
    for (int l = 0; l < c->n_layers; l++) layer(s, l, batch);
    gpu_rmsnorm(s->x, s->model->norm, batch.T, c->dim, c->norm_eps, {NULL, s->h, NULL}, s->stream);
}

/* ---- a prompt, a step ------------------------------------------------------------------------ */

/* T <= max_T tokens of one sequence, which are in s->tokens. */
static void prompt(GpuState *s, const Batch &batch) {
    embed(s, s->tokens, batch.T);
    layers(s, batch);
}

/* One token more for each sequence: the one in s->chosen, at the position in s->positions. */
static void decode_step(GpuState *s) {
    embed(s, NULL, s->n_sequences);
    layers(s, {s->n_sequences, -1, 0});
    lm_head(s, 0, s->n_sequences);
    choose(s, 0, s->n_sequences);
}

/* ---- checks and launches --------------------------------------------------------------------- */

constexpr int THREADS = 256; // of nearly every block
constexpr int WARPS = THREADS / 32;

static void cuda_check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) die("%s: %s", what, cudaGetErrorString(status));
}

static void *device_alloc(size_t bytes) {
    void *p;
    if (cudaMalloc(&p, bytes) != cudaSuccess) die("no GPU memory for %.3f GB", bytes / 1e9);
    return p;
}

template <typename... Arrays> static void device_free(Arrays... arrays) {
    (cuda_check(cudaFree(arrays), "cudaFree"), ...);
}

template <typename A, typename B> static constexpr __host__ __device__ auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

/* Numbers [n] to the GPU and back, on the stream of a state or a quantizer. */
template <typename S, typename T> static void to_gpu(S *s, T *to, const T *from, size_t n) {
    cuda_check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, s->stream),
               "upload");
}

template <typename S, typename T> static void to_host(S *s, T *to, const T *from, size_t n) {
    cuda_check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToHost, s->stream),
               "download");
    cuda_check(cudaStreamSynchronize(s->stream), "work on the GPU");
}

/* Of the GPU in use, which must stay the same. */
static const cudaDeviceProp &gpu_properties() {
    static cudaDeviceProp p;
    int device;
    if (p.major) return p;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaGetDeviceProperties(&p, device), "GPU");
    return p;
}

static int multiprocessors() {
    return gpu_properties().multiProcessorCount;
}

__global__ void empty_kernel() {}

/* 80 or 90: the code that runs. A GPU that is newer than all compiled code runs the PTX of sm_80.
 */
static int code_version() {
    static const int version = [] {
        cudaFuncAttributes attributes;
        cuda_check(cudaFuncGetAttributes(&attributes, empty_kernel), "cudaFuncGetAttributes");
        return attributes.ptxVersion;
    }();
    return version;
}

struct LaunchShape {
    dim3 grid;
    int threads;
    size_t shared = 0; // bytes of dynamic shared memory
    int carveout = -1; // percent of L1 that is to be shared memory; -1: as the driver likes
    bool overlap = true;
};

/* For kernels that read memory straight into registers, as data on the way needs room in L1. A
 * multiprocessor that changes the carveout must first finish its blocks. So neighbours on the
 * stream do best with the same value. */
constexpr int CARVEOUT = 50;

/* A launch, which may `overlap` the end of the kernel before: see launch_dependents(). A kernel
 * that was launched so must call wait_for_previous_kernel(), as the kernel after it relies on that.
 */
template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                   Arguments... arguments) {
    // 1. the overlap, which came with Hopper
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    // 2. the shape
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = shape.overlap && code_version() >= 90;
    // 3. leave to use so much shared memory
    auto set = [&](cudaFuncAttribute attribute, int value) {
        cuda_check(cudaFuncSetAttribute(kernel, attribute, value), "shared memory");
    };
    set(cudaFuncAttributePreferredSharedMemoryCarveout, shape.carveout);
    if (shape.shared > 0) set(cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
    cuda_check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

template <typename F> __global__ void for_each_kernel(size_t n, F f) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) f(i);
}

/* f(i) for each i < n, in a thread each. */
template <typename F> static void for_each(cudaStream_t stream, size_t n, F f) {
    if (n == 0) return;
    for_each_kernel<<<(unsigned)ceil_div(n, THREADS), THREADS, 0, stream>>>(n, f);
    cuda_check(cudaGetLastError(), "launch");
}

/* The next kernel on the stream may start as soon as all blocks of this one have called this and
 * there is room. It then waits below. So its launch and its first reads cost no time. */
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

/* Until the kernel ahead on the stream has finished and its writes can be seen. */
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/* ================================================================================================
 * 2. W4A8 GEMM
 *
 *     y[m][n] = (sum_k a[m][k] * w8[n][k]) * s_a[m] * s_channel[n]        the sum in int32, exact
 *     w8 = q (per channel) or q * s_group (per group of 128)              q: 4 bits
 *
 * QQQ, arXiv 2406.09904, section 3.3. With few tokens the time is that of reading the weights once;
 * with many tokens it is that of the tensor cores. One layout of the weights serves both. A kernel
 * computes y^T = w8 a^T: the *weights* are the left operand of mma.m16n8k32, whose right side is
 * only 8 wide, so that 8 tokens or fewer waste nothing.
 *
 *                        K                                  TOKENS
 *          +---------------------------+                  +--------+
 *          |                           |                  |        |
 *          |=========chunk=====        | CHANNELS         |  tile  |   one block, 8 warps
 *          |===================        |                  |        |
 *          |          weights          |                  +--------+
 *       N  |                           |               N  |  y^T   |
 *          +---------------------------+                  +--------+
 *
 *       a chunk for one team of warps (TEAMS = 1: all 8):     a unit, two loads of one warp:
 *
 *                 unit 0   unit 1   unit 2   unit 3                    64 k
 *                +--------+--------+--------+--------+            +------------+
 *         warp 0 |        |        |        |        |            | m16 tile 0 |  16 channels
 *                +--------+--------+--------+--------+  strip of  +------------+
 *         warp 1 |        |        |        |        |  32        | m16 tile 1 |  16 channels
 *                +--------+--------+--------+--------+  channels  +------------+
 *           ...  |        |        |        |        |            16 bytes per lane and m16 tile
 *
 * The words for sizes:
 *
 *     word    channels  tokens  k           bytes         owner
 *     tile    CHANNELS  TOKENS  all         -             a block, one tile after the other
 *     strip   32        TOKENS  all         -             a warp: its part of a tile
 *     unit    32        -       64          1024          a warp, in registers; 4 in flight
 *     chunk   CHANNELS  TOKENS  256 TEAMS   -             a block: one pass of the main loop
 *     panel   -         TOKENS  128         128 TOKENS    a team, in shared memory: [TOKENS][128]
 *     stage   -         TOKENS  2 x 128     256 TOKENS    a team: its two panels of a chunk
 *     team    8 / TEAMS warps side by side along N; every team has its own part of each chunk
 *
 * How a weight reaches the tensor cores: for each tile of tokens one warp reads it from global
 * memory straight into registers, four units before it is needed. It never enters shared memory, as
 * no other warp would read it there. The activations are read by all warps of a team: they go
 * through shared memory, one chunk ahead. With few tokens the warps do better side by side along K
 * than along N. The 8 warps then form TEAMS teams with a pipeline each, and add up their sums at
 * the end.
 *
 * Loops with constant bounds are unrolled by the compiler, which keeps arrays like `acc` in
 * registers; it is told to in the few places where it would not.
 *
 * Sources: weights in the order of the fragments, and much else, is Marlin's (arXiv 2408.11743);
 * the integer dequantization is LiquidGEMM's (arXiv 2509.01229).
 * ============================================================================================== */

constexpr int STRIP = 32;               // channels
constexpr int UNIT = 64;                // k: two k32 steps of mma
constexpr int CHUNK_UNITS = 4;          // units of a chunk that one team has
constexpr int CHUNK = CHUNK_UNITS * 64; // k of a chunk that one team has

/* ---- instructions that C++ has no name for --------------------------------------------------- */

/* Reads 16 bytes that are needed once, so they need not stay in the L1 cache. If not `valid`, `to`
 * keeps its value: a predicate, unlike a branch, leaves the compiler one straight run of code. */
__device__ __forceinline__ void load_16(uint4 &to, const uint4 *from, bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }\n"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "l"(from), "r"((int)valid));
}

__device__ __forceinline__ void load_4(uint32_t &to, const uint32_t *from, bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0;\n"
                 "@p ld.global.nc.u32 %0, [%1]; }\n"
                 : "+r"(to)
                 : "l"(from), "r"((int)valid));
}

/* Brings a line into the L2 cache, without waiting for it and without a register to hold it. */
__device__ __forceinline__ void prefetch(const void *from, bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0;\n"
                 "@p prefetch.global.L2 [%0]; }\n" ::"l"(from),
                 "r"((int)valid));
}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Copies 16 bytes into shared memory in the background, or writes zeros. */
__device__ __forceinline__ void copy_async_16(uint32_t to, const void *from, bool nonzero,
                                              bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0;\n"
                 "@p cp.async.cg.shared.global [%0], [%1], 16, %2; }\n" ::"r"(to),
                 "l"(from), "r"(nonzero ? 16 : 0), "r"((int)valid)
                 : "memory");
}

__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
}

/* Two or four 8 x 16-byte matrices from shared memory, in the layout of mma's right operand: lanes
 * 8i .. 8i+7 hold the addresses of matrix i's rows; lane l gets, of each matrix, row l / 4, bytes
 * l % 4 * 4 to + 3. */
__device__ __forceinline__ void load_matrices(uint32_t (&b)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address));
}

/* c [16][8] += a [16][32] . b [8][32] over a warp. Lane l holds c[0], c[1] of row l / 4, columns
 * l % 4 * 2 and + 1; c[2], c[3] are eight rows below. */
__device__ __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Waits for `threads` threads that name the same barrier; __syncthreads() is barrier 0. */
__device__ __forceinline__ void named_barrier(int name, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    half2 pair = __floats2half2_rn(low, high);
    return *(uint32_t *)&pair;
}

/* ---- the layout of the weights --------------------------------------------------------------- */

/* The row of a strip that channel n is: which m16 tile, which half of it, which row of the half.
 *
 * Any order is right, as long as the output is written in the same. With this one a lane's sums of
 * one token (row lane / 4 of both halves of both m16 tiles) belong to four consecutive channels,
 * which it writes at once: see write_rows(). */
struct StripRow {
    int tile, half, row;
};

__device__ static StripRow strip_row(int n) {
    return {n % 4 / 2, n % 2, n % STRIP / 4};
}

/* The index of the 32-bit word that holds channel n's codes for k .. k+3 (in the low nibbles of its
 * bytes) and k+32 .. k+35 (in the high nibbles); k % 64 < 32, k % 4 = 0.
 *
 * mma.m16n8k32 wants its left operand as four registers of four int8, in lane l:
 *
 *                  k 0..15      k 16..31
 *     rows 0..7   register 0   register 2     each: row l / 4, k = l % 4 * 4 .. + 3
 *     rows 8..15  register 1   register 3
 *
 * A unit is two such steps; word r is register r of both. So 16 bytes per lane are the left operand
 * for 16 channels and 64 k, and a warp reads 512 consecutive bytes. */
__device__ static size_t fragment_word(int n, int k, int K) {
    StripRow c = strip_row(n);
    size_t unit = (size_t)(n / STRIP) * (K / UNIT) + k / UNIT;
    int lane = c.row * 4 + k % 16 / 4;
    int word = k % 32 / 16 * 2 + c.half;
    return ((unit * 2 + c.tile) * 32 + lane) * 4 + word;
}

/* The index of the byte that holds the scale of channel n and k's group: the four scales that a
 * lane needs, of rows lane / 4 of both halves of both m16 tiles, are one 32-bit word. */
__device__ static size_t fragment_scale(int n, int k, int K) {
    StripRow c = strip_row(n);
    size_t group = (size_t)(n / STRIP) * (K / GROUP) + k / GROUP;
    return (group * 8 + c.row) * 4 + c.tile * 2 + c.half;
}

/* Per channel the codes are stored as two's complement, q = u ^ 8: in the high nibble of a byte
 * that is 16 q without further work. With groups they stay u = q + 8. */
constexpr uint32_t TWOS_COMPLEMENT = 0x88888888;

/* N rows as in the file: qweight [N][K/2], s_group and s_channel, become rows first .. first + N -
 * 1 of l. All in device memory. One thread per word. */
static void layout_weights(const GpuLinear l, int first, int N, const uint16_t *qweight,
                           const uint8_t *s_group, const float *s_channel, cudaStream_t stream) {
    for_each(stream, (size_t)N * (l.K / 8), [=] __device__(size_t i) {
        const int K = l.K, words = K / 8, n = i / words, word_of_row = i % words;
        // 1. eight codes into their word
        const int k = word_of_row / 8 * UNIT + word_of_row % 8 * 4;
        uint32_t word = 0;
        for (int high = 0; high < 2; high++) {
            uint32_t codes = qweight[(size_t)n * (K / 4) + (k + high * 32) / 4];
            for (int b = 0; b < 4; b++) word |= (codes >> 4 * b & 15) << (8 * b + 4 * high);
        }
        l.w[fragment_word(first + n, k, K)] = l.s_group ? word : word ^ TWOS_COMPLEMENT;
        // 2. the scale of the group
        if (l.s_group && k % GROUP == 0) {
            const size_t group = (size_t)n * (K / GROUP) + k / GROUP;
            l.s_group[fragment_scale(first + n, k, K)] = s_group[group];
        }
        // 3. per channel the sums are of 16 q, and a power of two divides out exactly
        if (k == 0) l.s_channel[first + n] = l.s_group ? s_channel[n] : s_channel[n] / 16;
    });
}

/* ---- tiles, and the way through them --------------------------------------------------------- */

/* The arguments of every kernel of the GEMM. */
struct GemmArgs {
    int M, N, K;
    const uint4 *w;          // [N/32][K/64][2][32]
    const uint32_t *s_group; // [N/32][K/128][8], NULL per channel
    const float *s_channel;  // [N]
    const int8_t *a;         // [M][K]
    const float *s_a;        // [M]
    half *y;                 // [M][N], unless there is a residual
    float *residual;         // [M][N] or NULL
};

/* TOKENS of a tile and TEAMS of a block decide the rest. */
template <int TOKENS, int TEAMS> struct Shape {
    static constexpr int TEAM_WARPS = WARPS / TEAMS;
    static constexpr int TEAM_THREADS = TEAM_WARPS * 32;
    static constexpr int CHANNELS = TEAM_WARPS * STRIP;
    static constexpr int STAGE = TOKENS * CHUNK;                     // bytes
    static constexpr int SUMS = (TEAMS - 1) * CHANNELS * TOKENS * 4; // bytes: add_teams()
    static constexpr int SHARED = TEAMS * 2 * STAGE + SUMS;          // bytes
    static constexpr int BLOCKS = TOKENS <= 16 ? 2 : 1;              // of a multiprocessor
};

/* How the output is cut. */
struct Tiling {
    int m, n;   // tiles of tokens, of channels
    int tiles;  // m * n
    int chunks; // of K
};

static Tiling make_tiling(const GemmArgs &p, int channels, int tokens, int chunk) {
    const int m = ceil_div(p.M, tokens), n = ceil_div(p.N, channels);
    return {m, n, m * n, ceil_div(p.K, chunk)};
}

/* A tile: number m of the tiles of tokens, number n of the tiles of channels. */
struct Tile {
    int m, n;
};

/* Blocks work on consecutive tiles at the same time. So consecutive tiles form a square: they go
 * along the channels in bands of 8 tiles of tokens. Then much of their input is in the L2 cache
 * already. */
__device__ __forceinline__ Tile tile_number(int i, const Tiling &tiling) {
    constexpr int BAND = 8;
    if (tiling.m == 1) return {0, i}; // divisions are slow
    // the band, and the number of the tile in the band; the last band may have fewer rows
    int band = i / (BAND * tiling.n);
    int rows = min(BAND, tiling.m - band * BAND);
    int in_band = i - band * BAND * tiling.n;
    return {band * BAND + in_band % rows, in_band / rows};
}

/* The next chunk of a block. Its tiles are blockIdx.x, blockIdx.x + gridDim.x, ... */
struct Position {
    int i;     // number of the tile; all tiles are done if it is tiling.tiles or more
    int chunk; // of the tile
    Tile tile;
    __device__ __forceinline__ Position(const Tiling &tiling)
        : i(blockIdx.x), chunk(0), tile(tile_number(i, tiling)) {}
    __device__ __forceinline__ void advance(const Tiling &tiling) {
        if (++chunk < tiling.chunks) return;
        // the first chunk of the next tile
        chunk = 0;
        i += gridDim.x;
        tile = tile_number(i, tiling);
    }
};

/* ---- weights: from global memory to registers ------------------------------------------------ */

/* A warp's units on their way. Teams get units in pairs: the 128 k of a pair share a panel of
 * activations and a group's scale. A team's pairs are `teams` pairs apart. */
template <int UNITS, bool GROUPS> struct UnitsInFlight {
    uint4 w[UNITS][2] = {}; // [unit][m16 tile]
    uint32_t s_group[UNITS / 2] = {};
    const uint4 *from;            // the first unit
    const uint32_t *from_s_group; // and the scale of its group
    int valid;                    // units from there to the end of K

    __device__ __forceinline__ void aim(const GemmArgs &p, int strip, int unit, bool exists) {
        const int units = p.K / UNIT, lane = threadIdx.x % 32;
        from = p.w + ((size_t)strip * units + unit) * 64 + lane;
        from_s_group = p.s_group;
        if (GROUPS) from_s_group += ((size_t)strip * (units / 2) + unit / 2) * 8 + lane / 4;
        valid = exists ? units - unit : 0;
    }
    __device__ __forceinline__ static int offset(int u, int teams) {
        return u / 2 * 2 * teams + u % 2;
    }
    __device__ __forceinline__ void load(int u, int teams) {
        // both m16 tiles, and with the second unit of a pair the scales of the group
        const int unit = offset(u, teams);
        load_16(w[u][0], from + unit * 64, unit < valid);
        load_16(w[u][1], from + unit * 64 + 32, unit < valid);
        if (GROUPS && u % 2 == 1) load_4(s_group[u / 2], from_s_group + unit / 2 * 8, unit < valid);
    }
    /* To the units that follow the ones in flight. */
    __device__ __forceinline__ void advance(int teams) {
        from += UNITS * teams * 64;
        from_s_group += UNITS / 2 * teams * 8;
        valid -= UNITS * teams;
    }
};

/* Four int8 weights from one nibble of each byte of a word, low nibbles for step 0, high ones for
 * step 1.
 *
 * Per channel the result is 16 q: a high nibble is just that with the low one masked away, a low
 * one needs a shift more. The 16 is divided out of s_channel.
 *
 * With groups, u = q + 8 times the scale s (1 to 15), plus 128 - 8 s, is q s + 128, in 8 .. 233: it
 * fits its byte, so one multiply-add does four weights and nothing carries over. Flipping the top
 * bit subtracts the 128. */
template <bool GROUPS>
__device__ __forceinline__ uint32_t dequantize(uint32_t word, int step, uint32_t s) {
    // per channel: 16 q
    if (!GROUPS) return (step ? word : word << 4) & 0xf0f0f0f0;
    // per group: q s
    uint32_t u = (step ? word >> 4 : word) & 0x0f0f0f0f;
    return (u * s + (0x80808080 - s * 0x08080808)) ^ 0x80808080;
}

/* mma's left operands of one step of a unit: two m16 tiles. ORDERED: the compiler must dequantize
 * before the registers of w are loaded anew. Otherwise it may do so afterwards, from a copy, which
 * is faster with 128 tokens only. */
template <bool GROUPS, bool ORDERED>
__device__ __forceinline__ void dequantize_step(const uint4 (&w)[2], uint32_t s_group, int step,
                                                uint32_t (&left)[2][4]) {
    for (int i = 0; i < 2; i++) {
        const uint32_t words[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
        for (int r = 0; r < 4; r++) {
            // odd registers are the lower rows of the tile, which have a scale of their own
            uint32_t s = __byte_perm(s_group, 0, 0x4440 + 2 * i + r % 2);
            left[i][r] = dequantize<GROUPS>(words[r], step, s);
            if (ORDERED) asm volatile("" : "+r"(left[i][r]));
        }
    }
}

/* ---- activations: from global to shared memory ----------------------------------------------- */

/* The offset of 16 bytes in panels of 128 k, each [rows][8] 16-byte pieces: `row` is the token,
 * `column` counts pieces along k. A piece is XORed with its row, so that 8 rows of one column,
 * which ldmatrix reads at once, lie in different banks. */
__device__ __forceinline__ uint32_t swizzled(int row, int column, int rows) {
    return (column / 8 * rows + row) * 128 + (column % 8 ^ row % 8) * 16;
}

/* Starts the copy of half a stage: of half of the tokens. k past the end becomes zero, so that any
 * weight is harmless there. Tokens past the end are left out: nobody looks at their sums. */
template <int TOKENS, int TEAMS>
__device__ __forceinline__ void load_activations(const GemmArgs &p, const Tiling &tiling,
                                                 const Position &at, int team, uint32_t stage,
                                                 int half_of_tokens) {
    constexpr int PIECES = CHUNK / 16; // of a row
    constexpr int ROWS = Shape<TOKENS, TEAMS>::TEAM_THREADS / PIECES;
    // 1. this thread's piece of a row: a team has every TEAMS-th panel of the chunk
    const int column = threadIdx.x % PIECES, panel = column / 8 * TEAMS + team;
    const int k = at.chunk * TEAMS * CHUNK + panel * 128 + column % 8 * 16;
    // 2. its rows, ROWS apart
    int row = half_of_tokens * TOKENS / 2 + threadIdx.x % (ROWS * PIECES) / PIECES;
    int rows = min((half_of_tokens + 1) * TOKENS / 2, p.M - at.tile.m * TOKENS);
    if (at.i >= tiling.tiles) rows = 0;
    const int8_t *from = p.a + (size_t)(at.tile.m * TOKENS + row) * p.K + k;
#pragma unroll(TOKENS <= 16 ? 1 : 8)
    for (int i = 0; i < ceil_div(TOKENS / 2, ROWS); i++) {
        copy_async_16(stage + swizzled(row, column, TOKENS), from, k < p.K, row < rows);
        row += ROWS;
        from += ROWS * p.K;
    }
}

/* Waits for the warps of a team; the teams need not wait for each other. */
template <int TEAM_WARPS> __device__ __forceinline__ void team_barrier(int team) {
    if (TEAM_WARPS == 1) {
        __syncwarp();
    } else if (TEAM_WARPS == WARPS) {
        __syncthreads();
    } else {
        named_barrier(team + 1, TEAM_WARPS * 32);
    }
}

/* acc [2 m16 tiles][N_TILES n8 tiles] += weights a . activations at `from`, k32. One ldmatrix reads
 * the right operands of two n8 tiles, and four mma use them; with one n8 tile two do. */
template <int N_TILES>
__device__ __forceinline__ void multiply_step(int (&acc)[2][N_TILES][4], const uint32_t (&a)[2][4],
                                              uint32_t from) {
    constexpr int PAIR = N_TILES == 1 ? 1 : 2;
    for (int j = 0; j < N_TILES; j += PAIR) {
        uint32_t b[2 * PAIR];
        // the right operands, which both m16 tiles use
        load_matrices(b, from + j * 8 * 128);
        for (int t = 0; t < PAIR; t++) {
            mma(acc[0][j + t], a[0], b[2 * t], b[2 * t + 1]);
            mma(acc[1][j + t], a[1], b[2 * t], b[2 * t + 1]);
        }
    }
}

/* ---- sums: of the teams, and to the output --------------------------------------------------- */

__device__ __forceinline__ void add(int (&c)[4], int4 x) {
    c[0] += x.x;
    c[1] += x.y;
    c[2] += x.z;
    c[3] += x.w;
}

__device__ __forceinline__ int4 as_int4(const int (&c)[4]) {
    return make_int4(c[0], c[1], c[2], c[3]);
}

/* Team 0 gets the sums of all teams, through shared memory: sums [2 N_TILES][TEAMS - 1][threads of
 * a team]. */
template <int TOKENS, int TEAMS>
__device__ __forceinline__ void add_teams(int (&acc)[2][TOKENS / 8][4], int4 *sums, int team) {
    constexpr int STRIDE = Shape<TOKENS, TEAMS>::TEAM_THREADS;
    // 1. the other teams leave their sums, once team 0 has read the ones of the tile before
    sums += threadIdx.x % STRIDE;
    __syncthreads();
    if (team > 0) {
        for (int i = 0; i < TOKENS / 4; i++) {
            sums[(i * (TEAMS - 1) + team - 1) * STRIDE] = as_int4(acc[i % 2][i / 2]);
        }
    }
    __syncthreads();
    if (team > 0) return;
    // 2. team 0 adds them to its own
    for (int t = 0; t < TEAMS - 1; t++) {
        for (int i = 0; i < TOKENS / 4; i++) {
            add(acc[i % 2][i / 2], sums[(i * (TEAMS - 1) + t) * STRIDE]);
        }
    }
}

/* The factors that turn a lane's sums into outputs, for M_TILES m16 tiles and two tokens: 2 M_TILES
 * consecutive channels of each token. */
template <int M_TILES> struct Scales {
    using Floats = std::conditional_t<M_TILES == 2, float4, float2>;
    Floats s_channel;
    float s_a[2];
    Floats x[2]; // the residual stream so far
};

/* For the channels from n0, with s_channel, and the first 8 of the `tokens` from m0, with s_a. */
template <int M_TILES>
__device__ __forceinline__ void load_scales(const GemmArgs &p, const float *s_channel,
                                            const float *s_a, int m0, int tokens, int n0,
                                            Scales<M_TILES> &s) {
    using Floats = typename Scales<M_TILES>::Floats;
    const int lane = threadIdx.x % 32, channel = lane / 4 * 4, first = lane % 4 * 2;
    // per channel, then per token with its residual
    s.s_channel = *(const Floats *)(s_channel + channel);
    for (int t = 0; t < 2; t++) {
        const float *x = p.residual + (size_t)(m0 + first + t) * p.N + n0 + channel;
        s.s_a[t] = first + t < tokens ? s_a[first + t] : 0;
        if (first + t < tokens && p.residual) s.x[t] = *(const Floats *)x;
    }
}

/* Scales a lane's sums and writes them: to y (Out: half) or onto the residual stream (float). The
 * registers hold y^T, but strip_row() has put a lane's channels side by side. `to` is the output of
 * the lane's first token and channel; s has the scales of the tokens of the first n8 tile. */
template <int M_TILES, int N_TILES, typename Out>
__device__ __forceinline__ void write_rows(Out *to, int N, const int (&acc)[M_TILES][N_TILES][4],
                                           Scales<M_TILES> s, const float *s_a, int tokens) {
    using Floats = typename Scales<M_TILES>::Floats;
    using Halves = std::conditional_t<M_TILES == 2, uint2, uint32_t>;
    constexpr bool ADD = std::is_same_v<Out, float>;
    constexpr bool AHEAD = N_TILES > 4; // scales are read one n8 tile ahead, if registers are left
    const int first = threadIdx.x % 4 * 2;
    auto load = [&](int i, const Out *from) {
        const int token = first + i / 2 * 8 + i % 2;
        if (i >= 2 * N_TILES || token >= tokens) return;
        s.s_a[i % 2] = s_a[token];
        if constexpr (ADD) s.x[i % 2] = *(const Floats *)from;
    };
#pragma unroll
    for (int i = 0; i < 2 * N_TILES; i++) { // tokens of the lane
        const int j = i / 2, t = i % 2;
        float y[2 * M_TILES];
        uint32_t halves[M_TILES];
        if (!AHEAD && j > 0) load(i, to);
        // 1. scale, and add to the residual stream or round to halves
        for (int c = 0; c < 2 * M_TILES; c++) {
            float sum = acc[c / 2][j][c % 2 * 2 + t];
            y[c] = __fmul_rn(__fmul_rn(sum, s.s_a[t]), (&s.s_channel.x)[c]);
            if (ADD) y[c] = __fadd_rn((&s.x[t].x)[c], y[c]);
            else if (c % 2) halves[c / 2] = pack(y[c - 1], y[c]);
        }
        // 2. write in one piece, which plain stores may not be
        if (first + j * 8 + t < tokens) {
            if constexpr (ADD) __stcg((Floats *)to, *(const Floats *)y);
            else __stcg((Halves *)to, *(const Halves *)halves);
        }
        // 3. on to the next token: the neighbour, or 7 further
        if (AHEAD) load(i + 2, to + 8 * (size_t)N);
        to += (t ? 7 : 1) * (size_t)N;
    }
}

/* A warp's sums, M_TILES m16 tiles from channel n0 and `tokens` <= 8 N_TILES tokens from m0. */
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void write_tile(const GemmArgs &p, const int (&acc)[M_TILES][N_TILES][4],
                                           const Scales<M_TILES> &s, const float *s_a, int m0,
                                           int tokens, int n0) {
    const int lane = threadIdx.x % 32;
    const size_t at = (size_t)(m0 + lane % 4 * 2) * p.N + n0 + lane / 4 * 4;
    if (p.residual) write_rows(p.residual + at, p.N, acc, s, s_a, tokens);
    else write_rows(p.y + at, p.N, acc, s, s_a, tokens);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* With 16 tokens two blocks fit on a multiprocessor: while one waits the other reads, and blocks of
 * the next kernel find room before all of this one are gone. */
template <int TOKENS, int TEAMS, bool GROUPS>
__global__ void __launch_bounds__(THREADS, Shape<TOKENS, TEAMS>::BLOCKS)
    gemm_w4a8_kernel(const __grid_constant__ GemmArgs p, const __grid_constant__ Tiling tiling) {
    using S = Shape<TOKENS, TEAMS>;
    constexpr bool ORDERED = TOKENS <= 64;
    extern __shared__ __align__(1024) uint8_t shared[]; // [TEAMS][2][STAGE], sums of the teams
    const int team = threadIdx.x / S::TEAM_THREADS;
    const int warp = threadIdx.x / 32 % S::TEAM_WARPS; // of the team
    const uint32_t stages = shared_address(shared) + team * 2 * S::STAGE;
    // A lane's row for ldmatrix, in bytes from the start of a panel: n8 tile lane / 16 of two,
    // token lane % 8, 16-byte column lane / 8 % 2. XORed with a step's column it is the step's
    // address.
    const int lane = threadIdx.x % 32;
    const uint32_t b_row = swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2, 0);

    UnitsInFlight<CHUNK_UNITS, GROUPS> weights;
    auto aim_weights = [&](const Position &at) {
        const int strip = at.tile.n * S::TEAM_WARPS + warp;
        const bool exists = at.i < tiling.tiles && strip < p.N / STRIP;
        weights.aim(p, strip, at.chunk * TEAMS * CHUNK_UNITS + team * 2, exists);
    };
    auto load_weights = [&](int u) {
        weights.load(u, TEAMS);
        // With 128 tokens no register is left to look farther ahead, but the L2 cache can.
        const int unit = TEAMS * CHUNK_UNITS + weights.offset(u, TEAMS);
        if (TOKENS == 128) prefetch(weights.from + unit * 64, unit < weights.valid);
    };
    auto load_half_stage = [&](const Position &at, uint32_t stage, int half) {
        load_activations<TOKENS, TEAMS>(p, tiling, at, team, stage, half);
    };

    // 1. Start to read weights: no kernel ahead on the stream that may still run writes them.
    Position next(tiling);
    aim_weights(next);
    for (int u = 0; u < CHUNK_UNITS; u++) load_weights(u);
    prefetch(p.s_channel + (next.tile.n * S::TEAM_WARPS + warp) * STRIP, weights.valid > 0);
    launch_dependents();
    // 2. Start to copy activations, which the kernel before has written.
    wait_for_previous_kernel();
    load_half_stage(next, stages, 0);
    load_half_stage(next, stages, 1);

    uint32_t filling = stages; // the stage that is being copied to
    while (next.i < tiling.tiles) {
        const int i = next.i;
        int acc[2][TOKENS / 8][4] = {};
        for (int chunk = 0; chunk < tiling.chunks; chunk++) {
            // 3. This chunk has arrived in `current`; the other stage is free for the next chunk.
            next.advance(tiling);
            aim_weights(next);
            copy_async_wait();
            team_barrier<S::TEAM_WARPS>(team);
            const uint32_t current = filling;
            filling += S::STAGE;
            if (filling == stages + 2 * S::STAGE) filling = stages;

#pragma unroll
            // 4. Multiply this chunk and load the next. There is no barrier, and from 32 tokens on
            // no branch, so the compiler can start loads and dequantize while the products before
            // them run.
            for (int u = 0; u < CHUNK_UNITS; u++) {
                if (u < 2) load_half_stage(next, filling, u);
                for (int step = 0; step < 2; step++) {
                    uint32_t left[2][4]; // [m16 tile][register]
                    dequantize_step<GROUPS, ORDERED>(weights.w[u], weights.s_group[u / 2], step,
                                                     left);
                    // A dequantized unit makes room for the same one of the next chunk.
                    if (step == 1) load_weights(u);
                    const uint32_t panel = current + u / 2 * TOKENS * 128;
                    const int column = (u % 2 * 2 + step) * 32; // bytes
                    multiply_step<TOKENS / 8>(acc, left, panel + (b_row ^ column));
                }
            }
        }

        // 5. The scales are on their way while the teams add up their sums. The tile's position is
        // computed again rather than kept in registers.
        Scales<2> s;
        auto output = [&](auto work) {
            const Tile tile = tile_number(i, tiling);
            const int m0 = tile.m * TOKENS, n0 = (tile.n * S::TEAM_WARPS + warp) * STRIP;
            if (team == 0 && n0 < p.N) work(m0, p.M - m0, n0);
        };
        output([&](int m0, int tokens, int n0) {
            load_scales(p, p.s_channel + n0, p.s_a + m0, m0, tokens, n0, s);
        });
        int4 *sums = (int4 *)(shared + TEAMS * 2 * S::STAGE);
        if constexpr (TEAMS > 1) add_teams<TOKENS, TEAMS>(acc, sums, team);
        // 6. Scale and write.
        output([&](int m0, int tokens, int n0) {
            write_tile<2, TOKENS / 8>(p, acc, s, p.s_a + m0, m0, tokens, n0);
        });
    }
}

/* ---- few tokens --------------------------------------------------------------------------------
 *
 *     y^T [N][M] = w8 a^T,      M <= 8
 *
 * Up to 8 tokens the time is that of reading the weights, if memory never rests. A block has one
 * tile: strips side by side, each shared by teams of one warp. A warp has eight units in flight
 * before it waits for the kernel ahead; blocks of the next kernel do the same wherever there is
 * room beside this one. All K of the activations are in shared memory, so no barrier stops a warp
 * until the end. */

constexpr int FEW = 8;                 // tokens of a tile
constexpr int FEW_UNITS = 8;           // that a warp has in flight
constexpr int FEW_CACHED = 4;          // units more, on their way to the L2 cache
constexpr size_t FEW_SHARED = 1 << 16; // bytes of activations; above, gemm_w4a8_kernel replaces it

template <bool GROUPS>
__global__ void __launch_bounds__(THREADS, 2)
    gemm_few_kernel(const __grid_constant__ GemmArgs p, int teams) {
    extern __shared__ __align__(1024) uint8_t shared[]; // panels of a
    __shared__ int4 sums[WARPS][2][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, strips = WARPS / teams;
    const int team = warp / strips, strip = blockIdx.x * strips + warp % strips;
    const int m0 = blockIdx.y * FEW, rows = min(FEW, p.M - m0);
    const int units = p.K / UNIT, pairs = ceil_div(units, 2); // a pair: one panel

    // 1. Weights are on their way before the kernel ahead has finished: into registers, and behind
    // them into the L2 cache.
    UnitsInFlight<FEW_UNITS, GROUPS> weights;
    const bool exists = strip < p.N / STRIP;
    weights.aim(p, strip, team * 2, exists);
    for (int u = 0; u < FEW_UNITS; u++) weights.load(u, teams);
    prefetch(p.s_channel + strip * STRIP, exists);
    launch_dependents();
    const uint8_t *strip_w = (const uint8_t *)(p.w + (size_t)strip * units * 64);
    const int first = FEW_UNITS * teams, cached = min(units, first + FEW_CACHED * teams);
    for (int line = first * 8 + team * 32 + lane; line < cached * 8; line += teams * 32) {
        prefetch(strip_w + line * 128, exists);
    }

    // 2. Copy the activations; past the end of K zeros, which make any weight harmless.
    wait_for_previous_kernel();
    for (int row = 0; row < rows; row++) {
        const int8_t *from = p.a + (size_t)(m0 + row) * p.K;
        for (int i = threadIdx.x; i < pairs * 8; i += THREADS) {
            bool inside = i * 16 < p.K;
            copy_async_16(shared_address(shared) + swizzled(row, i, rows),
                          inside ? from + i * 16 : from, inside, true);
        }
    }
    copy_async_wait();
    __syncthreads();

    // 3. Multiply, as in gemm_w4a8_kernel; past the last row lanes read copies of it.
    const int b = min(lane / 16 * 8 + lane % 8, rows - 1);
    const uint32_t b_row = swizzled(b, lane / 8 % 2, rows);
    int acc[2][1][4] = {};
    for (int pair = team; pair < pairs; pair += FEW_UNITS / 2 * teams) {
        weights.advance(teams);
        for (int u = 0; u < FEW_UNITS; u++) {
            const int now = pair + u / 2 * teams;
            if (u % 2 == 0 && now >= pairs) break;
            for (int step = 0; step < 2; step++) {
                uint32_t left[2][4]; // [m16 tile][register]
                dequantize_step<GROUPS, true>(weights.w[u], weights.s_group[u / 2], step, left);
                // a dequantized unit makes room for one FEW_UNITS on
                if (step == 1) weights.load(u, teams);
                const uint32_t panel = shared_address(shared) + now * rows * 128;
                multiply_step<1>(acc, left, panel + (b_row ^ (u % 2 * 2 + step) * 32));
            }
        }
    }

    // 4. One warp per strip adds up the teams' sums and writes.
    for (int i = 0; i < 2; i++) sums[warp][i][lane] = as_int4(acc[i][0]);
    const int n0 = (blockIdx.x * strips + warp) * STRIP;
    const bool writes = warp < strips && n0 < p.N;
    Scales<2> s;
    if (writes) load_scales(p, p.s_channel + n0, p.s_a + m0, m0, rows, n0, s);
    __syncthreads();
    if (!writes) return;
    for (int i = 0; i < 2; i++) {
        for (int &x : acc[i][0]) x = 0;
        for (int t = 0; t < teams; t++) add(acc[i][0], sums[t * strips + warp][i][lane]);
    }
    write_tile<2, 1>(p, acc, s, p.s_a + m0, m0, rows, n0);
}

/* ---- the choice of a kernel, and launches ---------------------------------------------------- */

template <int TOKENS, int TEAMS, bool GROUPS>
static void launch_gemm(const GemmArgs &p, cudaStream_t stream) {
    using S = Shape<TOKENS, TEAMS>;
    // 1. small tiles where these need more shared memory than a block may have
    const size_t limit = gpu_properties().sharedMemPerBlockOptin;
    if (S::SHARED > limit) return launch_gemm<16, 8, GROUPS>(p, stream);
    // 2. all blocks have as many tiles, or one less
    const Tiling tiling = make_tiling(p, S::CHANNELS, TOKENS, TEAMS * CHUNK);
    const int rounds = ceil_div(tiling.tiles, multiprocessors() * S::BLOCKS); // tiles of a block
    constexpr auto kernel = gemm_w4a8_kernel<TOKENS, TEAMS, GROUPS>;
    launch(kernel, {dim3(ceil_div(tiling.tiles, rounds)), THREADS, S::SHARED}, stream, p, tiling);
}

/* Only as many teams as keep the multiprocessors busy: each team is one more sum to add. */
template <bool GROUPS> static void launch_few(const GemmArgs &p, cudaStream_t stream) {
    // 1. all activations must fit in shared memory
    const size_t shared = (size_t)min(FEW, p.M) * ceil_div(p.K, 128) * 128;
    if (shared > FEW_SHARED) return launch_gemm<16, 8, GROUPS>(p, stream);

    const int strips = p.N / STRIP;
    // 2. fewer teams, as long as the blocks fill the multiprocessors 1.4 times
    int teams = WARPS;
    while (teams > 1 && strips * teams / 2 * 5 >= WARPS * multiprocessors() * 7) teams /= 2;
    // 3. a block for each eight pairs of a strip and a team
    const dim3 grid(ceil_div(strips * teams, WARPS), ceil_div(p.M, FEW));
    launch(gemm_few_kernel<GROUPS>, {grid, THREADS, shared, CARVEOUT}, stream, p, teams);
}

template <bool GROUPS>
static void launch_mma(GemmKernel kernel, const GemmArgs &p, cudaStream_t stream) {
    switch (kernel) {
    case GEMM_FEW:
        return launch_few<GROUPS>(p, stream);
    case GEMM_16X8:
        return launch_gemm<16, 8, GROUPS>(p, stream);
    case GEMM_64X4:
        return launch_gemm<64, 4, GROUPS>(p, stream);
    case GEMM_64X2:
        return launch_gemm<64, 2, GROUPS>(p, stream);
    default:
        // and where Hopper's cannot run
        return launch_gemm<128, 1, GROUPS>(p, stream);
    }
}

/* Section 7. To do without it, delete the section, these two lines and the two that call them. */
static bool choose_hopper(const GpuLinear *l, int M, GemmKernel *kernel);
static bool launch_hopper(GemmKernel kernel, const GemmArgs &p, cudaStream_t stream);

/* The largest tile of mma.sync that leaves at most half of the multiprocessors idle; a rule of
 * thumb, not fitted to one GPU. The choice for Hopper was measured: see hopper_kernels. */
GemmKernel gpu_gemm_choose(const GpuLinear *l, int M, bool portable) {
    const int sms = multiprocessors();
    // 1. few tokens: the time is that of the weights
    if (M <= FEW) return GEMM_FEW;
    if (M <= 16) return GEMM_16X8;
    // 2. wgmma
    if (GemmKernel k = GEMM_128X1; !portable && choose_hopper(l, M, &k)) return k;
    // 3. mma.sync
    if (M <= 128 && ceil_div(M, 64) * ceil_div(l->N, 64) <= sms) return GEMM_64X4;
    if (M > 64 && ceil_div(M, 128) * ceil_div(l->N, 256) >= sms) return GEMM_128X1;
    return 2 * ceil_div(M, 64) * ceil_div(l->N, 128) >= sms ? GEMM_64X2 : GEMM_16X8;
}

void gpu_gemm_run(GemmKernel kernel, const GpuLinear *l, const int8_t *a, const float *s_a, int M,
                  half *y, float *residual, cudaStream_t stream) {
    // 1. section 7 runs its own kernels
    const GemmArgs p = {
        M,   l->N, l->K,    (const uint4 *)l->w, (const uint32_t *)l->s_group, l->s_channel, a,
        s_a, y,    residual};
    if (launch_hopper(kernel, p, stream)) return;
    // 2. else mma.sync
    if (l->s_group) launch_mma<true>(kernel, p, stream);
    else launch_mma<false>(kernel, p, stream);
}

void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y,
                   float *residual, cudaStream_t stream) {
    gpu_gemm_run(gpu_gemm_choose(l, M, false), l, a, s_a, M, y, residual, stream);
}

/* ================================================================================================
 * 3. The small kernels around the linears
 *
 *     h = x / sqrt(mean(x^2) + eps) * weight          RMSNorm, arXiv 1910.07467
 *     h = silu(gate) * up                             SwiGLU, arXiv 2002.05202
 *     s_a = max|h| / 127,  a = rint(h / s_a)          at the end of either, in the same pass
 *
 * Which numbers have which precision, and why no value can overflow:
 *   - the residual stream x is float32: in LLaMA 3.1 8B it reaches thousands, and grows by sums;
 *   - q, k, v, gate and up are halves: linears of a normed row, so that |y_n| <= |w_n| |h|, far
 *     below 65504; attention's output is a mean of v's;
 *   - the product silu(gate) * up could pass 65504. It stays float32 until it is divided by the
 *     scale of its row: s_a for int8; a power of two, nearly always 1, for halves;
 *   - o and down add their float32 sums to x.
 *
 * A block has one row, which stays in shared memory between the passes over it.
 * ============================================================================================== */

/* ---- eight numbers, and their int8 ----------------------------------------------------------- */

/* Eight consecutive values, which one thread handles: 16 bytes of halves, 8 of int8. */
struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight from_halves(uint4 bits) {
    const half2 *pairs = (const half2 *)&bits;
    Eight e;
    for (int i = 0; i < 4; i++) {
        float2 f = __half22float2(pairs[i]);
        e.v[2 * i] = f.x;
        e.v[2 * i + 1] = f.y;
    }
    return e;
}

__device__ __forceinline__ uint4 to_halves(const Eight &e) {
    uint4 bits;
    half2 *pairs = (half2 *)&bits;
    for (int i = 0; i < 4; i++) pairs[i] = __floats2half2_rn(e.v[2 * i], e.v[2 * i + 1]);
    return bits;
}

__device__ __forceinline__ Eight from_floats(const float4 *p) {
    float4 a = p[0], b = p[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

/* The largest |x| as the bits of a float: integers of the same order. NaN and infinity are above
 * all numbers. */
__device__ __forceinline__ uint32_t magnitude(const Eight &e) {
    uint32_t largest = 0;
    for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(e.v[i]) & 0x7fffffff);
    return largest;
}

constexpr uint32_t INFINITE = 0x7f800000;

/* s_a of a row whose largest magnitude() is `largest`; NaN if that is not finite. */
__device__ __forceinline__ float activation_scale(uint32_t largest) {
    return __fdiv_rn(__uint_as_float(largest >= INFINITE ? 0x7fc00000 : largest), 127.0f);
}

__device__ __forceinline__ int quantize_one(float x, float s_a) {
    float r = s_a > 0 ? rintf(__fdiv_rn(x, s_a)) : 0;
    return (int)fminf(fmaxf(r, -128.0f), 127.0f);
}

__device__ __forceinline__ uint32_t lowest_bytes(const uint32_t (&r)[4]) {
    return __byte_perm(__byte_perm(r[0], r[1], 0x0040), __byte_perm(r[2], r[3], 0x0040), 0x5410);
}

/* quantize_one() of eight numbers that are at most 127 s_a, without a division for each. */
__device__ __forceinline__ uint2 quantize_eight(const Eight &e, float s_a) {
    // 1. Multiply with a little less than 1 / s_a, and with a little more. If both products round
    // to the same integer, so does the quotient between them. The lowest byte of 1.5 * 2^23 + r is
    // r in two's complement.
    constexpr float SHIFT = 12582912, LITTLE = 0x1p-20f;
    const float inverse = __fdiv_rn(1, s_a);
    uint32_t a[2];
    bool sure = s_a >= 0x1p-126f; // the inverse is finite
    for (int i = 0; i < 2; i++) {
        auto rounded = [&](float by) {
            uint32_t r[4];
            for (int j = 0; j < 4; j++) {
                r[j] = __float_as_uint(__fmaf_rn(e.v[4 * i + j], by, SHIFT));
            }
            return lowest_bytes(r);
        };
        a[i] = rounded(__fmul_rn(inverse, 1 - LITTLE));
        sure &= a[i] == rounded(__fmul_rn(inverse, 1 + LITTLE));
    }
    // 2. Else a quotient is near a tie: divide.
    for (int i = 0; i < 2 && !sure; i++) {
        uint32_t r[4];
        for (int j = 0; j < 4; j++) r[j] = quantize_one(e.v[4 * i + j], s_a);
        a[i] = lowest_bytes(r);
    }
    return make_uint2(a[0], a[1]);
}

/* ---- RMSNorm, SwiGLU, the quantizer ---------------------------------------------------------- */

/* silu(gate) * up, silu(x) = x / (1 + e^-x). __fdividef() gives 0 where the divisor is above 2^126,
 * as good as right. */
__device__ __forceinline__ float swiglu(float gate, float up) {
    return __fmul_rn(__fdividef(gate, __fadd_rn(1, expf(-gate))), up);
}

/* A row of floats in shared memory, the i-th Eight in two halves so that no two threads of a
 * quarter warp meet in a bank. */
struct SharedRow {
    float4 *p;
    int eights;
    __device__ void put(int i, const Eight &e) {
        p[i] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
        p[eights + i] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    }
    __device__ Eight get(int i) const {
        float4 a = p[i], b = p[eights + i];
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
};

/* Over all threads of a block, each of which gets the result. */
__device__ static float block_sum(float x) {
    // within each warp, then each warp adds up the sums of all
    __shared__ float sums[32];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0;
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

__device__ static uint32_t block_max(uint32_t x) {
    // as block_sum()
    __shared__ uint32_t maxima[32];
    x = __reduce_max_sync(~0u, x);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? maxima[threadIdx.x % 32] : 0;
    return __reduce_max_sync(~0u, x);
}

/* The end of both kernels: row blockIdx.x, of K values whose largest magnitude() is `largest`. */
__device__ static void write_row(const SharedRow &row, int K, uint32_t largest,
                                 const LinearInput &out) {
    // 1. the scale of the row
    float s = 1;
    if (out.a) {
        s = activation_scale(largest);
    } else if (out.scale && largest < INFINITE) {
        // the least 2^e with max|h| / 2^e < 2^15; the bits of 2^e are the exponent + 127 alone
        int exponent = (int)(largest >> 23) - 127;
        if (exponent > 14) s = __int_as_float((exponent - 14 + 127) << 23);
    }
    if (out.scale && threadIdx.x == 0) out.scale[blockIdx.x] = s;
    // 2. the row itself, as int8 or as halves
    const size_t start = (size_t)blockIdx.x * (K / 8);
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) {
        Eight e = row.get(i);
        if (out.a) {
            ((uint2 *)out.a)[start + i] = quantize_eight(e, s);
        } else {
            for (int j = 0; j < 8; j++) e.v[j] /= s;
            ((uint4 *)out.h)[start + i] = to_halves(e);
        }
    }
}

/* Twin: rmsnorm(), quantize_row(). */
__global__ void rmsnorm_kernel(const float *x, const float *weight, int dim, float eps,
                               LinearInput out) {
    extern __shared__ float4 shared_row[];
    SharedRow row = {shared_row, dim / 8};
    // 1. No kernel writes the weights: they are on their way while the one before is still at work.
    launch_dependents();
    Eight w = {};
    if (threadIdx.x < dim / 8) w = from_floats((const float4 *)weight + 2 * threadIdx.x);
    wait_for_previous_kernel();
    // 2. the mean square
    const float4 *x_row = (const float4 *)(x + (size_t)blockIdx.x * dim);
    float squares = 0;
    for (int i = threadIdx.x; i < dim / 8; i += blockDim.x) {
        Eight e = from_floats(x_row + 2 * i);
        for (int j = 0; j < 8; j++) squares += e.v[j] * e.v[j];
        row.put(i, e);
    }
    const float scale = rsqrtf(block_sum(squares) / dim + eps);
    // 3. scale the row, and find the largest magnitude
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < dim / 8; i += blockDim.x) {
        Eight e = row.get(i);
        if (i >= blockDim.x) w = from_floats((const float4 *)weight + 2 * i);
        for (int j = 0; j < 8; j++) e.v[j] *= w.v[j] * scale;
        largest = max(largest, magnitude(e));
        row.put(i, e);
    }
    write_row(row, dim, block_max(largest), out);
}

/* gate_up [T][2][hidden_dim]. Twin: swiglu(), quantize_row(). */
__global__ void swiglu_kernel(const half *gate_up, int hidden_dim, LinearInput out) {
    extern __shared__ float4 shared_row[];
    SharedRow row = {shared_row, hidden_dim / 8};
    launch_dependents();
    wait_for_previous_kernel();
    // the product stays float32 in shared memory, until the scale of the row is known
    const uint4 *gate = (const uint4 *)(gate_up + (size_t)blockIdx.x * 2 * hidden_dim);
    const uint4 *up = gate + hidden_dim / 8;
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < hidden_dim / 8; i += blockDim.x) {
        Eight e = from_halves(gate[i]), u = from_halves(up[i]);
        for (int j = 0; j < 8; j++) e.v[j] = swiglu(e.v[j], u.v[j]);
        largest = max(largest, magnitude(e));
        row.put(i, e);
    }
    write_row(row, hidden_dim, block_max(largest), out);
}

/* Threads of a block for a row of K: few rows should be done soon, many go side by side. */
static int row_threads(int T, int K) {
    int threads = min(1024, (K / 8 + 31) / 32 * 32);
    return T <= 2 * multiprocessors() ? threads : min(threads, 256);
}

void gpu_rmsnorm(const float *x, const float *weight, int T, int dim, float eps, LinearInput out,
                 cudaStream_t stream) {
    size_t shared = dim * sizeof(float);
    launch(rmsnorm_kernel, {dim3(T), row_threads(T, dim), shared}, stream, x, weight, dim, eps,
           out);
}

void gpu_swiglu(const half *gate_up, int T, int hidden_dim, LinearInput out, cudaStream_t stream) {
    size_t shared = hidden_dim * sizeof(float);
    launch(swiglu_kernel, {dim3(T), row_threads(T, hidden_dim), shared}, stream, gate_up,
           hidden_dim, out);
}

/* Quantizes a row of halves, `eights` times 8, into a and *s_a. Twin: quantize_row(). */
__device__ __forceinline__ void quantize_halves(const uint4 *row, int eights, uint2 *a,
                                                float *s_a) {
    // 1. the largest magnitude; a thread keeps its first eights in registers for the second pass
    constexpr int KEPT = 4;
    uint4 kept[KEPT] = {};
    uint32_t largest = 0;
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * blockDim.x;
        if (i < eights) kept[j] = __ldcg(row + i);
    }
    for (int j = 0; j < KEPT; j++) largest = max(largest, magnitude(from_halves(kept[j])));
    for (int i = threadIdx.x + KEPT * blockDim.x; i < eights; i += blockDim.x) {
        largest = max(largest, magnitude(from_halves(__ldcg(row + i))));
    }
    const float s = activation_scale(block_max(largest));
    if (threadIdx.x == 0) *s_a = s;
    // 2. the codes
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * blockDim.x;
        if (i < eights) a[i] = quantize_eight(from_halves(kept[j]), s);
    }
    for (int i = threadIdx.x + KEPT * blockDim.x; i < eights; i += blockDim.x) {
        a[i] = quantize_eight(from_halves(__ldcg(row + i)), s);
    }
}

/* One block per row. */
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(const half *x, int K, int8_t *a, float *s_a) {
    launch_dependents();
    wait_for_previous_kernel();
    const size_t start = (size_t)blockIdx.x * (K / 8);
    quantize_halves((const uint4 *)x + start, K / 8, (uint2 *)a + start, s_a + blockIdx.x);
}

void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream) {
    launch(quantize_kernel, {dim3(M), THREADS}, stream, x, K, a, s_a);
}

/* ---- 16-bit linears -------------------------------------------------------------------------- */

/* A function of cuBLAS, which is loaded only now: linked, it would cost every start 0.1 s. */
template <typename F> static F *load_cublas(const char *name) {
    static const std::string file = "libcublas.so." + std::to_string(CUBLAS_VER_MAJOR);
    static void *library = dlopen(file.c_str(), RTLD_NOW);
    F *f = library ? (F *)dlsym(library, name) : NULL;
    if (!f) die("cuBLAS: %s", dlerror());
    return f;
}

#define CUBLAS(f) load_cublas<decltype(f)>(#f)

static void cublas_check(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    die("cuBLAS: %s", CUBLAS(cublasGetStatusString)(status));
}

/* x [T][dim] += y * scale [T] */
__global__ void add_scaled_kernel(const float *y, const float *scale, int dim, float *x) {
    launch_dependents();
    wait_for_previous_kernel();
    size_t row = (size_t)blockIdx.x * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x)
        x[row + i] += y[row + i] * scale[blockIdx.x];
}

/* y [T][N] = in [T][K] W^T + beta y, of a type. cuBLAS's matrices are column-major: y^T = W in^T.
 */
static void linear_halves(GpuState *s, const Matrix *w, const half *in, int T, void *y,
                          cudaDataType type, float beta) {
    const float one = 1;
    cublas_check(CUBLAS(cublasGemmEx_64)(s->cublas, CUBLAS_OP_T, CUBLAS_OP_N, w->N, T, w->K, &one,
                                         w->w, CUDA_R_16F, w->K, in, CUDA_R_16F, w->K, &beta, y,
                                         type, w->N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

/* ---- lm_head in 8 bits -------------------------------------------------------------------------
 *
 *     y[t][n] = (sum_k x[t][k] q[n][k]) * s_channel[n]      x halves, q int8, the sum in float32
 *
 * The time is that of reading q once, from global memory straight into registers, in the order of
 * the file. The order of k in a sum does not matter: so 16 consecutive bytes of a row are a lane's
 * part of four steps of mma, and x is read in the same order. Bytes become halves in registers,
 * exactly. A token is a column of the product: its sums do not depend on its neighbours. */

/* c [16][8] += a [16][16] . b [8][16] over a warp, halves; the layout is that of the int8 mma
 * with pairs of halves for the four bytes. */
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int LM_STRIP = 32;  // channels of a warp: two m16 tiles
constexpr int LM_CHUNK = 128; // k between two barriers, and of the weights in flight

/* Two int8 of a word as halves: bytes 0 and 1, or with `upper` 2 and 3. `biased` holds q + 128 = u;
 * 0x6400 + u are the bits of 1024 + u. */
__device__ __forceinline__ uint32_t bytes_to_halves(uint32_t biased, bool upper) {
    uint32_t x = __byte_perm(biased, 0x64646464, upper ? 0x4342 : 0x4140);
    uint32_t y = 0x64806480; // 1024 + 128
    half2 z = __hsub2(*(half2 *)&x, *(half2 *)&y);
    return *(uint32_t *)&z;
}

/* sum [m16 tile][n8 tile] += 64 k of a warp's weights w [channel g, + 8, + 16, + 24] times x, which
 * is in shared memory at `x`, rows of `row` bytes. */
template <int N_TILES>
__device__ __forceinline__ void multiply_bytes(const uint4 (&w)[4], const uint8_t *x, int row,
                                               float (&sum)[2][N_TILES][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t *words = (const uint32_t *)w; // [channel][4]
    for (int i = 0; i < 4; i += 2) {             // two words of each channel are two steps of mma
        // left operands: [step][m16 tile]
        uint32_t left[2][2][4];
        for (int j = 0; j < 16; j++) { // step, tile, half of k, half of the tile
            const int step = j / 8, tile = j / 4 % 2, late = j / 2 % 2, lower = j % 2;
            const uint32_t word = words[(tile * 2 + lower) * 4 + i + step];
            left[step][tile][late * 2 + lower] = bytes_to_halves(word ^ 0x80808080, late);
        }
        for (int j = 0; j < N_TILES; j++) {
            // right operand: 16 bytes of x are the two steps of this lane
            const uint8_t *from = x + (j * 8 + g) * row + (t * 16 + i * 4) * sizeof(half);
            const uint4 b = *(const uint4 *)from;
            for (int tile = 0; tile < 2; tile++) {
                mma(sum[tile][j], left[0][tile], b.x, b.y);
                mma(sum[tile][j], left[1][tile], b.z, b.w);
            }
        }
    }
}

/* y [T][N], T <= TOKENS; K a multiple of 16. A block has 256 channels. */
template <int TOKENS>
__global__ void __launch_bounds__(THREADS, TOKENS <= 16 ? 2 : 1)
    linear_bytes_kernel(const int8_t *q, const float *s_channel, int N, int K, const half *x, int T,
                        float *y) {
    constexpr int ROW = LM_CHUNK * sizeof(half) + 16; // bytes; + 16: other banks
    __shared__ __align__(16) uint8_t shared[2][TOKENS * ROW];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n0 = (blockIdx.x * WARPS + threadIdx.x / 32) * LM_STRIP + g; // and 8, 16, 24 on
    const int8_t *from = q + (size_t)n0 * K + t * 16;
    // how weights and x are read: zeros past the end, which make any partner harmless
    uint4 w[2][4] = {}; // [64 k][channel]
    auto load_weights = [&](uint4(&to)[4], int k) {
        for (int r = 0; r < 4; r++) {
            load_16(to[r], (const uint4 *)(from + (size_t)r * 8 * K + k),
                    k + t * 16 < K && n0 + r * 8 < N);
        }
    };
    auto load_x = [&](int k, int stage) {
        constexpr int PIECES = LM_CHUNK / 8;
        for (int i = threadIdx.x; i < TOKENS * PIECES; i += THREADS) {
            int row = i / PIECES, column = k + i % PIECES * 8;
            bool exists = row < T && column < K;
            copy_async_16(shared_address(shared[stage] + row * ROW + i % PIECES * 16),
                          exists ? x + (size_t)row * K + column : x, exists, true);
        }
    };
    // 1. the first weights, then x, which the kernel before has written
    for (int c = 0; c < 2; c++) load_weights(w[c], c * 64);
    launch_dependents();
    wait_for_previous_kernel();
    load_x(0, 0);

    // 2. multiply a chunk while the next one is on its way
    float sum[2][TOKENS / 8][4] = {};
    int stage = 0;
    for (int k = 0; k < K; k += LM_CHUNK, stage = 1 - stage) {
        copy_async_wait();
        // the chunk of x has arrived, and the other stage is free
        __syncthreads();
        load_x(k + LM_CHUNK, 1 - stage);
        for (int c = 0; c < 2; c++) {
            multiply_bytes(w[c], shared[stage] + c * 64 * sizeof(half), ROW, sum);
            load_weights(w[c], k + LM_CHUNK + c * 64);
        }
    }
    // 3. scale and write
    for (int r = 0; r < 4; r++) { // channels of the lane
        const int n = n0 + r * 8;
        if (n >= N) continue;
        const float s = s_channel[n];
        for (int j = 0; j < TOKENS / 8; j++) {
            for (int i = 0; i < 2; i++) {
                const int token = j * 8 + t * 2 + i;
                if (token < T) y[(size_t)token * N + n] = sum[r / 2][j][r % 2 * 2 + i] * s;
            }
        }
    }
}

/* y [T][N] = x [T][K] W^T for a W in 8 bits. */
static void linear_bytes(GpuState *s, const Matrix *w, const half *x, int T, float *y) {
    // the smallest kernel that holds the tokens, 64 at a time
    for (int t = 0; t < T; t += 64) {
        const int n = min(64, T - t);
        auto *kernel = n <= 8    ? linear_bytes_kernel<8>
                       : n <= 16 ? linear_bytes_kernel<16>
                       : n <= 32 ? linear_bytes_kernel<32>
                                 : linear_bytes_kernel<64>;
        const int channels = WARPS * LM_STRIP;
        launch(kernel, {dim3(ceil_div(w->N, channels)), THREADS, 0, CARVEOUT}, s->stream, w->bytes,
               w->s_channel, w->N, w->K, x + (size_t)t * w->K, n, y + (size_t)t * w->N);
    }
}

/* ---- the linears of section 1 ---------------------------------------------------------------- */

/* y [T][N] = W applied to linear_input(). */
static void linear(GpuState *s, const Matrix *w, int T, half *y) {
    if (w->w) linear_halves(s, w, s->h, T, y, CUDA_R_16F, 0);
    else gpu_gemm_w4a8(&w->w4a8, s->a, s->scale, T, y, NULL, s->stream);
}

/* x [T][N] += W applied to linear_input(), or in 16 bits to in [T][K] * scale [T]. */
static void add_linear(GpuState *s, const Matrix *w, int T, const half *in, const float *scale) {
    if (!w->w) return gpu_gemm_w4a8(&w->w4a8, s->a, s->scale, T, NULL, s->x, s->stream);
    if (!scale) return linear_halves(s, w, in, T, s->x, CUDA_R_32F, 1);
    // cuBLAS cannot scale rows
    linear_halves(s, w, in, T, s->y, CUDA_R_32F, 0);
    launch(add_scaled_kernel, {dim3(T), THREADS}, s->stream, s->y, scale, w->N, s->x);
}

/* logits [n][vocab_size] of tokens first .. first + n - 1 of the last layers(). */
static void lm_head(GpuState *s, int first, int n) {
    const half *h = s->h + (size_t)first * s->model->config.dim;
    const Matrix *w = &s->model->lm_head;
    if (w->bytes) linear_bytes(s, w, h, n, s->logits);
    else linear_halves(s, w, h, n, s->logits, CUDA_R_32F, 0);
    s->n_logits = n;
}

/* ---- tokens: embedding, the likeliest one, scores -------------------------------------------- */

static __host__ __device__ int chosen_token(Choice choice) {
    return choice == ~0ull ? -1 : (int)~(uint32_t)choice;
}

/* The bits of a float as an integer of the same order. */
__device__ __forceinline__ uint32_t ordered_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

/* Row blockIdx.y of logits, shared by gridDim.x blocks, into chosen; and the position of the
 * sequence moves on. Twin: argmax(). */
__global__ void choose_kernel(const float *logits, int vocab_size, Choice *chosen, int *positions) {
    launch_dependents();
    wait_for_previous_kernel();
    // 1. this thread's part of the row
    const float *row = logits + (size_t)blockIdx.y * vocab_size;
    Choice best = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab_size;
         i += gridDim.x * blockDim.x) {
        const Choice choice = (Choice)ordered_bits(row[i]) << 32 | (uint32_t)~i;
        best = max(best, isfinite(row[i]) ? choice : ~0ull);
    }
    // 2. the warp, and all blocks of the row
    for (int i = 16; i > 0; i /= 2) best = max(best, __shfl_xor_sync(~0u, best, i));
    if (threadIdx.x % 32 == 0) atomicMax(chosen + blockIdx.y, best);
    if (blockIdx.x == 0 && threadIdx.x == 0) positions[blockIdx.y]++;
}

static void choose(GpuState *s, int sequence, int n) {
    launch(choose_kernel, {dim3(max(8, 128 / n), n), THREADS}, s->stream, s->logits,
           s->model->config.vocab_size, s->chosen + sequence, s->positions + sequence);
}

/* Row blockIdx.x of x [T][dim] = the embedding of a prompt's token. Without tokens: of the token
 * that the sequence has chosen, and the choice is free for the next. */
__global__ void embed_kernel(const half *embedding, const int *tokens, Choice *chosen, int dim,
                             float *x) {
    // 1. In this order: no kernel of a step starts before the step before has finished. So they may
    // read its positions and cache without waiting for each other.
    wait_for_previous_kernel();
    launch_dependents();
    // 2. the token; a choice of -1 is reported by the host
    const int token = tokens ? tokens[blockIdx.x] : max(0, chosen_token(chosen[blockIdx.x]));
    __syncthreads();
    if (!tokens && threadIdx.x == 0) chosen[blockIdx.x] = 0;
    // 3. its row
    const uint4 *from = (const uint4 *)(embedding + (size_t)token * dim);
    float4 *to = (float4 *)(x + (size_t)blockIdx.x * dim);
    for (int i = threadIdx.x; i < dim / 8; i += blockDim.x) {
        Eight e = from_halves(from[i]);
        to[2 * i] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
        to[2 * i + 1] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    }
}

static void embed(GpuState *s, const int *tokens, int T) {
    const int dim = s->model->config.dim;
    launch(embed_kernel, {dim3(T), row_threads(T, dim)}, s->stream, s->model->embedding, tokens,
           s->chosen, dim, s->x);
}

/* In double, of a block of THREADS threads; only thread 0 gets the result. */
__device__ static double block_sum(double x) {
    __shared__ double sums[WARPS];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 1; i < WARPS; i++) x += sums[i];
    return x;
}

/* The negative log-likelihood of each row's target; one block per row. Twin: score(). */
__global__ void score_kernel(const float *logits, int vocab_size, const int *targets,
                             Score *scores) {
    launch_dependents();
    wait_for_previous_kernel();
    const float *row = logits + (size_t)blockIdx.x * vocab_size;
    // 1. the largest logit
    float largest = -INFINITY;
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) largest = fmaxf(largest, row[i]);
    const uint32_t bits = block_max(ordered_bits(largest));
    largest = __uint_as_float(bits >> 31 ? bits & 0x7fffffff : ~bits);
    // 2. the sum of the exponentials
    double sum = 0;
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) sum += expf(row[i] - largest);
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    // 3. the target
    const float target = row[targets[blockIdx.x]];
    scores[blockIdx.x] = {log(sum) + largest - target, target == largest};
}

/* ================================================================================================
 * 4. Attention
 *
 *     out = softmax(q k^T / sqrt(d)) v,   causal;   query head h reads KV head h / group
 *
 * without ever holding a row of the softmax: keys come in tiles, and with each tile the maximum m,
 * the sum l and the output o of the ones before are corrected (FlashAttention, arXiv 2205.14135):
 *
 *     m' = max(m, max s),   l' = l e^(m - m') + sum e^(s - m'),   o' = o e^(m - m') + e^(s - m') v
 *
 * A prompt is bound by arithmetic: many queries share a tile of keys in shared memory. A decoded
 * token is bound by reading the cache: the positions of each KV head are spread over warps and
 * blocks, whose m, l, o are joined at the end by the same rule (arXiv 2311.01282). Keys and values
 * go from global memory straight into the registers in which mma wants them.
 *
 * In both the query heads of one KV head share the loads: they are rows of the same products.
 * Twin: attention() and rope() in qqq.c. head_dim is 64 or 128.
 *
 * The sums c0 .. c3 of a product that a lane 4 g + t holds, in mma's layout for halves:
 *
 *     prompt: rows are queries                   token: rows are positions, columns query heads
 *
 *       s [16 rows][64 keys] = q k^T               s^T [16 positions][8 heads] = k q^T
 *
 *            keys 2t  2t+1  .. of 8 tiles               heads 2t  2t+1
 *          row g   c0  c1                          position g   c0  c1
 *          row g+8 c2  c3                          position g+8 c2  c3
 *
 *       o [16][head_dim] += p v                    o^T [head_dim][8 heads] += v^T p^T
 *
 *     mma's left operand wants rows g, g + 8 and   v^T as a left operand: dimensions g, g + 8 and
 *     keys 2t, 2t+1, 2t+8, 2t+9: exactly c0 .. c3  positions 2t, 2t+1, 2t+8, 2t+9, straight from
 *     of two neighbouring tiles of s. So p = e^s   the cache; p^T as a right operand: c0 .. c3
 *     moves from one product to the next within    transposed, 8 x 8 at a time.
 *     a lane.
 * ============================================================================================== */

/* As load_matrices(), each 8x8 matrix transposed. */
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address));
}

/* An 8x8 matrix of 16-bit numbers, two per lane, becomes its transpose. */
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
    return y;
}

/* Rotates the pair of halves (first, second), head_dim / 2 apart, by an angle: twice, for the two
 * dimensions that a register holds. angles: cos, sin, cos, sin. */
__device__ __forceinline__ void rotate_pairs(uint32_t &first, uint32_t &second, float4 angles) {
    float2 a = __half22float2(*(half2 *)&first), b = __half22float2(*(half2 *)&second);
    first = pack(a.x * angles.x - b.x * angles.y, a.y * angles.z - b.y * angles.w);
    second = pack(b.x * angles.x + a.x * angles.y, b.y * angles.z + a.y * angles.w);
}

/* Softmax scores are kept in units of log 2, for exp2. */
__device__ __forceinline__ float score_scale(int head_dim) {
    return 1.44269504f / sqrtf(head_dim);
}

/* m and l of one row. */
struct Softmax {
    float m = -INFINITY, l = 0;
    /* For scores up to `largest`; returns the factor by which earlier sums shrink. */
    __device__ __forceinline__ float raise(float largest) {
        largest = fmaxf(m, largest);
        const float shrink = exp2f(m - largest);
        m = largest;
        l *= shrink;
        return shrink;
    }
    /* The weight of a score, counted in l. */
    __device__ __forceinline__ float weight(float s) {
        const float p = exp2f(s - m);
        l += p;
        return p;
    }
};

/* ---- the cache ---------------------------------------------------------------------------------
 *
 * In 8 bits each row has a scale, itself a half:
 *
 *     x ~ q s,      s = max|x| / 127,      q = rint(x / s) */

/* A head's vector over a warp. Lane l has dimensions 2j, 2j + 1 and, head_dim / 2 on, their
 * partners of RoPE, j = l % (head_dim / 4). */
template <int HEAD_DIM> struct HeadVector {
    static constexpr int QUARTER = HEAD_DIM / 4;
    float x[4];

    __device__ __forceinline__ static int j() { return threadIdx.x % QUARTER; }
    __device__ __forceinline__ void set(uint32_t first, uint32_t second) {
        float2 a = __half22float2(*(half2 *)&first), b = __half22float2(*(half2 *)&second);
        x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
    }
    __device__ __forceinline__ void load(const half *from) {
        const uint32_t *pairs = (const uint32_t *)from;
        set(__ldcg(pairs + j()), __ldcg(pairs + j() + QUARTER));
    }
    __device__ __forceinline__ uint2 halves() const {
        return make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
    }
    __device__ __forceinline__ void store(half *to) const {
        if (threadIdx.x % 32 >= QUARTER) return;
        uint2 h = halves();
        ((uint32_t *)to)[j()] = h.x;
        ((uint32_t *)to)[j() + QUARTER] = h.y;
    }
    /* RoPE; in 16 bits between the two, as a linear's output is. */
    __device__ __forceinline__ void rotate(const float4 *angles) {
        uint2 h = halves();
        rotate_pairs(h.x, h.y, angles[j()]);
        set(h.x, h.y);
    }
    __device__ __forceinline__ float largest() const {
        float y = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
        for (int i = 1; i < QUARTER; i *= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, i));
        return y;
    }
};

/* Row `row` of keys or values = x. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void store_row(const HeadVector<HEAD_DIM> &x, uint8_t *rows,
                                          half *scales, size_t row) {
    uint8_t *to = rows + row * (HEAD_DIM * BITS / 8);
    if constexpr (BITS == 16) return x.store((half *)to);
    // 1. the scale, rounded to a half before it divides
    const half s = __float2half_rn(__fdiv_rn(x.largest(), 127.0f));
    const float scale = __half2float(s);
    if (threadIdx.x % 32 == 0) scales[row] = s;
    // 2. two neighbours at a time: of the lower half of the dimensions, of the upper half
    for (int i = 0; i < 2; i++) {
        uint32_t q[2];
        for (int j = 0; j < 2; j++) {
            const float r = scale > 0 ? rintf(__fdiv_rn(x.x[2 * i + j], scale)) : 0;
            q[j] = (int)fminf(fmaxf(r, -127.0f), 127.0f);
        }
        if (threadIdx.x % 32 >= x.QUARTER) continue;
        ((uint16_t *)to)[x.j() + i * x.QUARTER] = (q[0] & 0xff) | (q[1] & 0xff) << 8;
    }
}

/* The key (after RoPE) or the value of the token at `pos`, into a row of the cache. One warp. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void store_token(const GpuCache &cache, size_t row, int pos, bool is_key,
                                            const half *qkv, const float4 *rope) {
    HeadVector<HEAD_DIM> x;
    x.load(qkv);
    if (is_key) x.rotate(rope + (size_t)pos * (HEAD_DIM / 4));
    store_row<HEAD_DIM, BITS>(x, is_key ? cache.keys : cache.values,
                              is_key ? cache.k_scales : cache.v_scales, row);
}

/* Keys and values of a prompt's tokens into the cache. qkv [T][qkv_dim]: all query heads, then k,
 * then v. One block per token. */
template <int HEAD_DIM, int BITS>
__global__ void write_cache_kernel(const half *qkv, int q_dim, Batch batch, const float4 *rope,
                                   GpuCache cache) {
    launch_dependents();
    wait_for_previous_kernel();
    // a warp per key or value: first all keys, then all values
    const int heads = cache.n_kv_heads, pos = batch.pos + blockIdx.x;
    const half *row = qkv + (size_t)blockIdx.x * (q_dim + 2 * heads * HEAD_DIM) + q_dim;
    for (int i = threadIdx.x / 32; i < 2 * heads; i += blockDim.x / 32) {
        store_token<HEAD_DIM, BITS>(cache, cache.row(batch.sequence, i % heads) + pos, pos,
                                    i < heads, row + i * HEAD_DIM, rope);
    }
}

/* Positions 0 .. gridDim.x - 1 of a cache in 8 bits, in 16 bits, as sequence 0 of `to`: a prompt
 * reads them so. */
template <int HEAD_DIM>
__global__ void read_cache_kernel(GpuCache cache, int sequence, GpuCache to) {
    launch_dependents();
    wait_for_previous_kernel();
    const int heads = cache.n_kv_heads, pos = blockIdx.x;
    for (int i = threadIdx.x / 32; i < 2 * heads; i += blockDim.x / 32) {
        const bool is_key = i < heads;
        const size_t row = cache.row(sequence, i % heads) + pos;
        // q s, two neighbours of each half of the dimensions
        const char2 *from = (const char2 *)((is_key ? cache.keys : cache.values) + row * HEAD_DIM);
        const float s = __half2float((is_key ? cache.k_scales : cache.v_scales)[row]);
        HeadVector<HEAD_DIM> x;
        for (int k = 0; k < 2; k++) {
            const char2 q = from[x.j() + k * x.QUARTER];
            x.x[2 * k] = (signed char)q.x * s;
            x.x[2 * k + 1] = (signed char)q.y * s;
        }
        store_row<HEAD_DIM, 16>(x, is_key ? to.keys : to.values, NULL, to.row(0, i % heads) + pos);
    }
}

/* ---- a prompt -------------------------------------------------------------------------------- */

constexpr int KEYS = 64; // of a tile

/* Tokens of a block. */
static __host__ __device__ int prompt_tokens(int group) {
    return 16 * WARPS / group;
}

/* A lane's rows of queries, g and g + 8 of the warp's 16. Row r of a block is token r / group, head
 * r % group. */
template <int HEAD_DIM> struct QueryRows {
    static constexpr int STEPS = HEAD_DIM / 16;
    uint32_t q[STEPS][4] = {}; // mma's left operand
    int position[2];           // of the two rows, in the cache; -1: there is none
    size_t offset[2];          // of the two rows, in a [T][q_dim]

    /* From token t0 on. RoPE is applied: dimension i and its partner i + HEAD_DIM / 2 are STEPS / 2
     * steps apart in the same lane. */
    __device__ __forceinline__ void load(const half *qkv, const Batch &batch, int t0, int tokens,
                                         int group, int n_kv_heads, const float4 *rope) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int q_dim = n_kv_heads * group * HEAD_DIM, kv_dim = n_kv_heads * HEAD_DIM;
        for (int i = 0; i < 2; i++) {
            // 1. which token and head the row is
            const int row = warp * 16 + lane / 4 + 8 * i, t = t0 + row / group;
            const bool exists = row < tokens * group && t < batch.T;
            position[i] = exists ? batch.pos + t : -1;
            offset[i] = (size_t)t * q_dim + (blockIdx.x * group + row % group) * HEAD_DIM;
            if (!exists) continue;
            // 2. all of it, as left operands of STEPS steps
            const uint32_t *from = (const uint32_t *)(qkv + offset[i] + (size_t)t * 2 * kv_dim);
            const float4 *angles = rope + (size_t)position[i] * (HEAD_DIM / 4);
            for (int s = 0; s < STEPS; s++) {
                for (int j = 0; j < 2; j++) q[s][i + 2 * j] = from[s * 8 + j * 4 + lane % 4];
            }
            // 3. RoPE
            for (int s = 0; s < STEPS / 2; s++) {
                for (int j = 0; j < 2; j++) {
                    rotate_pairs(q[s][i + 2 * j], q[s + STEPS / 2][i + 2 * j],
                                 angles[s * 8 + j * 4 + lane % 4]);
                }
            }
        }
    }
};

/* s [16 rows][KEYS] += q k^T, from a tile of keys in shared memory. One ldmatrix reads 8 keys x 32
 * dimensions, or two steps. */
template <int HEAD_DIM>
__device__ __forceinline__ void score_tile(const QueryRows<HEAD_DIM> &rows, uint32_t k_tile,
                                           float (&s)[KEYS / 8][4]) {
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < KEYS / 8; j++) {
        // s of 8 keys: over all dimensions, two steps at a time
        for (int step = 0; step < rows.STEPS; step += 2) {
            uint32_t b[4];
            load_matrices(b, k_tile + swizzled(j * 8 + lane % 8, step * 2 + lane / 8, KEYS));
            mma(s[j], rows.q[step], b[0], b[1]);
            mma(s[j], rows.q[step + 1], b[2], b[3]);
        }
    }
}

/* Scores of keys first .. first + KEYS - 1 become weights; the sums so far shrink. */
template <int HEAD_DIM>
__device__ __forceinline__ void softmax_tile(const QueryRows<HEAD_DIM> &rows, int first,
                                             Softmax (&softmax)[2], float (&s)[KEYS / 8][4],
                                             float (&o)[HEAD_DIM / 8][4]) {
    const int t = threadIdx.x % 4;
    const float scale = score_scale(HEAD_DIM);
    for (int i = 0; i < 2; i++) { // the lane's two rows
        // 1. hide the future, and find the largest score of the row, which four lanes share
        float largest = -INFINITY;
        for (int j = 0; j < KEYS / 8; j++) {
            for (int e = 0; e < 2; e++) {
                float &x = s[j][2 * i + e];
                const bool seen = first + j * 8 + t * 2 + e <= rows.position[i];
                x = seen ? x * scale : -INFINITY;
                largest = fmaxf(largest, x);
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        // 2. weights
        const float shrink = softmax[i].raise(largest);
        for (int j = 0; j < KEYS / 8; j++) {
            for (int e = 0; e < 2; e++) s[j][2 * i + e] = softmax[i].weight(s[j][2 * i + e]);
        }
        // 3. the correction of o
        for (int j = 0; j < HEAD_DIM / 8; j++) {
            for (int e = 0; e < 2; e++) o[j][2 * i + e] *= shrink;
        }
    }
}

/* o += p v, from a tile of values in shared memory. */
template <int HEAD_DIM>
__device__ __forceinline__ void add_values(const float (&p)[KEYS / 8][4], uint32_t v_tile,
                                           float (&o)[HEAD_DIM / 8][4]) {
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < KEYS / 8; j += 2) {
        // the sums of two n8 tiles of s are the left operand for 16 keys
        const uint32_t left[4] = {pack(p[j][0], p[j][1]), pack(p[j][2], p[j][3]),
                                  pack(p[j + 1][0], p[j + 1][1]), pack(p[j + 1][2], p[j + 1][3])};
        // over all dimensions of the output, two tiles at a time
        for (int d = 0; d < HEAD_DIM / 8; d += 2) {
            uint32_t b[4]; // 16 keys x 16 dimensions
            load_matrices_transposed(b, v_tile + swizzled(j * 8 + lane % 16, d + lane / 16, KEYS));
            mma(o[d], left, b[0], b[1]);
            mma(o[d + 1], left, b[2], b[3]);
        }
    }
}

/* One block is one KV head and up to 128 rows of queries, 16 per warp. */
template <int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_prompt_kernel(const half *qkv, Batch batch, int group, const float4 *rope,
                            GpuCache cache, half *out) {
    constexpr int PIECES = HEAD_DIM / 8, TILE = KEYS * HEAD_DIM * 2;
    extern __shared__ __align__(1024) uint8_t shared[]; // [2][keys, values] tiles
    // this block's tokens, and the keys that the last of them sees
    const uint32_t tiles = shared_address(shared);
    const int tokens = prompt_tokens(group);                  // of this block
    const int t0 = (gridDim.y - 1 - blockIdx.y) * tokens;     // the longest first
    const int n_keys = batch.pos + min(t0 + tokens, batch.T); // of the last token
    const size_t row = cache.row(batch.sequence, blockIdx.x) * HEAD_DIM;
    const half *keys = (half *)cache.keys + row, *values = (half *)cache.values + row;
    // KEYS positions of keys and values into a stage, zeros past the end
    auto load_tile = [&](int first, int stage) {
        for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
            const int row = i / PIECES, column = i % PIECES;
            const uint32_t to = tiles + stage * 2 * TILE + swizzled(row, column, KEYS);
            const bool exists = first + row < n_keys;
            const size_t from = (size_t)(exists ? first + row : 0) * HEAD_DIM + column * 8;
            copy_async_16(to, keys + from, exists, true);
            copy_async_16(to + TILE, values + from, exists, true);
        }
    };
    // 1. the first tile of keys and values, and the queries
    launch_dependents();
    wait_for_previous_kernel();
    load_tile(0, 0);
    QueryRows<HEAD_DIM> rows;
    rows.load(qkv, batch, t0, tokens, group, cache.n_kv_heads, rope);

    // 2. tile after tile, the next one on its way
    float o[HEAD_DIM / 8][4] = {};
    Softmax softmax[2];
    for (int first = 0, stage = 0; first < n_keys; first += KEYS, stage ^= 1) {
        copy_async_wait();
        __syncthreads(); // the tile has arrived, and the other one is free
        if (first + KEYS < n_keys) load_tile(first + KEYS, stage ^ 1);
        const uint32_t k_tile = tiles + stage * 2 * TILE;
        float s[KEYS / 8][4] = {};
        score_tile(rows, k_tile, s);
        softmax_tile(rows, first, softmax, s, o);
        add_values<HEAD_DIM>(s, k_tile + TILE, o);
    }

    // 3. divide by the sum of the weights, of which four lanes have parts, and write
    for (int i = 0; i < 2; i++) {
        float l = softmax[i].l;
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        if (rows.position[i] < 0) continue;
        uint32_t *to = (uint32_t *)(out + rows.offset[i]);
        for (int d = 0; d < HEAD_DIM / 8; d++) {
            to[d * 4 + threadIdx.x % 4] = pack(o[d][2 * i] / l, o[d][2 * i + 1] / l);
        }
    }
}

/* ---- a decoded token ---------------------------------------------------------------------------
 *
 * Attention of one new token for each sequence, with RoPE and the write to the cache. Block (split,
 * heads, sequence): one of gridDim.x parts of the positions of a sequence, for up to 8 query heads
 * of one KV head. A warp has every eighth tile of 16 positions of the part.
 *
 * The order of dimensions in a sum does not matter, and the order of rows of o^T is ours to choose.
 * So every operand of mma is part of a 16-byte load, or in 8 bits of all that a lane has of a row.
 * Lane 4 g + t reads
 *
 *     of k, positions g and g + 8:            in 16 bits dimensions 32 j + 8 t .. + 7, two steps
 *     of v, positions 2t, 2t+1, 2t+8, 2t+9:   dimensions 64 i + 8 g .. + 7, four tiles of o^T
 *
 * Scales are left out of the products: s_k is applied to scores, s_v to p. */

constexpr int MAX_SPLITS = 16; // blocks that share a sequence's positions: half a warp's lanes
constexpr int HEADS = 8;       // query heads of a block: mma's right side is 8 wide

struct DecodeArgs {
    const half *qkv;      // [sequences][q_dim + 2 kv_dim]
    int group;            // query heads to a KV head
    const int *positions; // [sequences]
    const float4 *rope;
    GpuCache cache;
    half *out;             // [sequences][q_dim]
    LinearInput quantized; // the same as o's input, in int8
    float *partial;        // [sequences][rows of blocks][gridDim.x][HEADS * (HEAD_DIM + 2)] o, m, l
    int *arrived;          // [sequences][rows of blocks + 1] blocks that are through
};

/* The work of one block. */
struct DecodeBlock {
    int kv_head, head0, n_heads; // of the query heads the first, and how many: at most HEADS
    int q_dim, kv_dim, pos;
    int tiles, tile0, tile1; // of the sequence; of this block
    size_t cache_row;        // of position 0
    const half *row;         // of qkv
};

template <int HEAD_DIM> __device__ __forceinline__ DecodeBlock decode_block(const DecodeArgs &p) {
    DecodeBlock b;
    // 1. the heads
    const int eights = ceil_div(p.group, HEADS); // of query heads, to a KV head
    b.kv_head = blockIdx.y / eights;
    b.head0 = b.kv_head * p.group + blockIdx.y % eights * HEADS;
    b.n_heads = min(HEADS, (b.kv_head + 1) * p.group - b.head0);
    b.q_dim = p.cache.n_kv_heads * p.group * HEAD_DIM;
    b.kv_dim = p.cache.n_kv_heads * HEAD_DIM;
    // 2. the positions
    b.pos = p.positions[blockIdx.z];
    b.tiles = b.pos / 16 + 1;
    b.tile0 = (int)((long long)b.tiles * blockIdx.x / gridDim.x);
    b.tile1 = (int)((long long)b.tiles * (blockIdx.x + 1) / gridDim.x);
    // 3. where they are
    b.cache_row = p.cache.row(blockIdx.z, b.kv_head);
    b.row = p.qkv + (size_t)blockIdx.z * (b.q_dim + 2 * b.kv_dim);
    return b;
}

/* The part of a cached row that one of LANES lanes reads: eights of dimensions, in loads of 16
 * bytes if the part is that large. RUN dimensions are consecutive. */
template <int HEAD_DIM, int BITS, int LANES> struct RowPart {
    static constexpr int RUN = 128 / BITS < HEAD_DIM / LANES ? 128 / BITS : HEAD_DIM / LANES;
    static constexpr int WORDS = HEAD_DIM / LANES * BITS / 32, LOAD = RUN * BITS / 32;
    uint32_t words[WORDS]; // the i-th eight dimensions from i * BITS / 4 on
    /* The first of the i-th eight dimensions. */
    __device__ static constexpr int dimension(int i, int lane) {
        return i * 8 / RUN * LANES * RUN + lane * RUN + i * 8 % RUN;
    }
    __device__ __forceinline__ void load(const uint8_t *row, int lane) {
        for (int i = 0; i < WORDS; i += LOAD) {
            const uint8_t *from = row + dimension(i * 4 / BITS, lane) * BITS / 8;
            if constexpr (LOAD == 4) *(uint4 *)(words + i) = __ldcg((const uint4 *)from);
            else *(uint2 *)(words + i) = __ldcg((const uint2 *)from);
        }
    }
};

/* Eight dimensions of one row, two to a register. */
template <int BITS>
__device__ __forceinline__ void row_to_halves(const uint32_t *words, uint32_t (&h)[4]) {
    for (int e = 0; e < 4; e++) {
        if (BITS == 16) h[e] = words[e];
        else h[e] = bytes_to_halves(words[e / 2] ^ 0x80808080, e % 2);
    }
}

/* Dimensions 2e and 2e + 1 of eight, of two rows: two rows to a register. */
template <int BITS>
__device__ __forceinline__ void rows_to_halves(const uint32_t *a, const uint32_t *b, int e,
                                               uint32_t (&h)[2]) {
    if (BITS == 16) {
        // dimension 2e of both rows, then 2e + 1
        h[0] = __byte_perm(a[e], b[e], 0x5410);
        h[1] = __byte_perm(a[e], b[e], 0x7632);
    } else {
        // the four bytes side by side, then two halves at a time
        uint32_t bytes = __byte_perm(a[e / 2], b[e / 2], e % 2 ? 0x7362 : 0x5140) ^ 0x80808080;
        h[0] = bytes_to_halves(bytes, false);
        h[1] = bytes_to_halves(bytes, true);
    }
}

/* A warp's tile of the cache in registers. The cache has room for whole tiles, and past the end old
 * numbers, whose weight will be 0. */
template <int HEAD_DIM, int BITS> struct CacheTile {
    static constexpr int ROW = HEAD_DIM * BITS / 8; // bytes
    RowPart<HEAD_DIM, BITS, 4> k[2];                // positions g, g + 8
    RowPart<HEAD_DIM, BITS, 8> v[4];                // positions 2t, 2t + 1, 2t + 8, 2t + 9
    half k_scale[2], v_scale[2];                    // of positions g and g + 8, in 8 bits

    /* Of all 16 positions from `row` on, or of position row + `only`. */
    __device__ __forceinline__ void load_keys(const GpuCache &cache, size_t row, int only = -1) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (int i = 0; i < 2; i++) {
            if (only >= 0 && only != g + 8 * i) continue;
            k[i].load(cache.keys + (row + g + 8 * i) * ROW, t);
            if (BITS < 16) k_scale[i] = __ldcg(cache.k_scales + row + g + 8 * i);
        }
    }
    __device__ __forceinline__ void load_values(const GpuCache &cache, size_t row, int only = -1) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (int i = 0; i < 4; i++) {
            const int at = 2 * t + i / 2 * 8 + i % 2, scaled = g + 8 * i;
            if (only < 0 || only == at) v[i].load(cache.values + (row + at) * ROW, g);
            if (BITS == 16 || i >= 2 || (only >= 0 && only != scaled)) continue;
            v_scale[i] = __ldcg(cache.v_scales + row + scaled);
        }
    }
};

/* The queries of a block as mma's right operand, the same for every warp: [eight dimensions of a
 * lane's keys][4 head + t]. */
template <int HEAD_DIM> struct Queries { uint4 q[HEAD_DIM / 32][32]; };

/* One warp per head. RoPE is applied. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void load_queries(const DecodeArgs &p, const DecodeBlock &b,
                                             Queries<HEAD_DIM> &queries) {
    constexpr int RUN = RowPart<HEAD_DIM, BITS, 4>::RUN;
    // 1. a head's query after RoPE; zeros for a head that does not exist
    const int head = threadIdx.x / 32;
    HeadVector<HEAD_DIM> x = {};
    if (head < b.n_heads) {
        x.load(b.row + (size_t)(b.head0 + head) * HEAD_DIM);
        x.rotate(p.rope + (size_t)b.pos * (HEAD_DIM / 4));
    }
    // 2. in the order in which lanes hold the dimensions of keys
    const uint2 h = x.halves();
    for (int i = 0; i < 2; i++) {
        const int d = 2 * x.j() + i * HEAD_DIM / 2; // the dimension, and the t that has it
        const int t = d % (4 * RUN) / RUN, eight = d / (4 * RUN) * (RUN / 8) + d % RUN / 8;
        ((uint32_t *)&queries.q[eight][head * 4 + t])[d % 8 / 2] = i ? h.y : h.x;
    }
}

/* m, l and o of a warp's part of the positions, for heads 2t, 2t + 1. */
template <int HEAD_DIM> struct Attended {
    Softmax softmax[2];
    float o[HEAD_DIM / 64][4][4] = {}; // [eight dimensions of a lane's values][two of them]
};

/* s^T = k q^T of a tile. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void score_positions(const Queries<HEAD_DIM> &queries,
                                                const CacheTile<HEAD_DIM, BITS> &kv,
                                                float (&s)[4]) {
    float odd[4] = {}; // two chains of mma, half the wait
    for (int j = 0; j < HEAD_DIM / 32; j++) {
        uint32_t a[4], b[4]; // positions g, g + 8
        row_to_halves<BITS>(kv.k[0].words + j * BITS / 4, a);
        row_to_halves<BITS>(kv.k[1].words + j * BITS / 4, b);
        // left operands: the first and the second four of eight dimensions
        const uint32_t even_k[4] = {a[0], b[0], a[1], b[1]}, odd_k[4] = {a[2], b[2], a[3], b[3]};
        const uint4 q = queries.q[j][threadIdx.x % 32];
        mma(s, even_k, q.x, q.y);
        mma(odd, odd_k, q.z, q.w);
    }
    for (int i = 0; i < 4; i++) s[i] += odd[i];
}

/* Scores of the tile at position `first` become weights, times s_v; the sums so far shrink.
 */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void softmax_positions(int pos, int first, const half (&k_scale)[2],
                                                  const half (&v_scale)[2], float (&s)[4],
                                                  Attended<HEAD_DIM> &a) {
    const int g = threadIdx.x % 32 / 4;
    const float scale = score_scale(HEAD_DIM);
    float shrink[2];
    for (int h = 0; h < 2; h++) { // the lane's two heads
        // 1. hide positions past the end, and find the largest score of the tile
        float largest = -INFINITY;
        for (int i = 0; i < 2; i++) {
            float &x = s[2 * i + h];
            if (BITS < 16) x *= __half2float(k_scale[i]);
            x = first + g + 8 * i <= pos ? x * scale : -INFINITY;
            largest = fmaxf(largest, x);
        }
        for (int i = 4; i < 32; i *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
        }
        // 2. weights
        shrink[h] = a.softmax[h].raise(largest);
        for (int i = 0; i < 2; i++) {
            float &x = s[2 * i + h];
            x = a.softmax[h].weight(x);
            if (BITS < 16) x *= __half2float(v_scale[i]);
        }
    }
    // 3. the correction of o
    for (int i = 0; i < HEAD_DIM / 16 * 4; i++) a.o[i / 16][i / 4 % 4][i % 4] *= shrink[i % 2];
}

/* o^T += v^T p^T of a tile. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void
add_positions(const float (&p)[4], const CacheTile<HEAD_DIM, BITS> &kv, Attended<HEAD_DIM> &a) {
    // p^T as right operand
    const uint32_t b0 = transpose_8x8(pack(p[0], p[1]));
    const uint32_t b1 = transpose_8x8(pack(p[2], p[3]));
    for (int i = 0; i < HEAD_DIM / 64; i++) {
        const int at = i * BITS / 4;
        for (int e = 0; e < 4; e++) {
            // v^T as left operand, from rows of v
            uint32_t low[2], high[2]; // of positions 2t, 2t + 1; of 2t + 8, 2t + 9
            rows_to_halves<BITS>(kv.v[0].words + at, kv.v[1].words + at, e, low);
            rows_to_halves<BITS>(kv.v[2].words + at, kv.v[3].words + at, e, high);
            const uint32_t v[4] = {low[0], low[1], high[0], high[1]};
            mma(a.o[i][e], v, b0, b1);
        }
    }
}

/* A warp's tiles: `tile`, which is in `kv`, and every eighth after it. */
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void
attend_tiles(const DecodeBlock &b, const GpuCache &cache, CacheTile<HEAD_DIM, BITS> &kv, int tile,
             const Queries<HEAD_DIM> &queries, Attended<HEAD_DIM> &a) {
    for (; tile < b.tile1; tile += WARPS) {
        const size_t next = b.cache_row + (tile + WARPS) * 16;
        const bool more = tile + WARPS < b.tile1;
        // 1. scores
        float s[4] = {};
        score_positions(queries, kv, s);
        const half k_scale[2] = {kv.k_scale[0], kv.k_scale[1]};
        // 2. used keys make room for the next tile
        if (more) kv.load_keys(cache, next);
        // 3. weights, and the sum of weighted values
        softmax_positions<HEAD_DIM, BITS>(b.pos, tile * 16, k_scale, kv.v_scale, s, a);
        add_positions(s, kv, a);
        // 4. The next values. Loaded any earlier, they would find no register free: spills.
        __syncwarp();
        if (more) kv.load_values(cache, next);
    }
}

/* Where the warps of a block put their parts together. */
template <int HEAD_DIM> struct Joined {
    float o[WARPS][HEADS][HEAD_DIM + 1]; // + 1: other banks
    float m[WARPS][HEADS], l[WARPS][HEADS];
    float factor[WARPS][HEADS]; // e^(m - block_m), by which a warp's part is scaled
    float block_m[HEADS], block_l[HEADS];
};

template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void join_warps(const DecodeBlock &b, Attended<HEAD_DIM> &a,
                                           Joined<HEAD_DIM> &all) {
    // 1. each warp's m, l and o; lanes of one t have parts of l
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int h = 0; h < 2; h++) {
        float l = a.softmax[h].l;
        for (int i = 4; i < 32; i *= 2) l += __shfl_xor_sync(~0u, l, i);
        const int head = 2 * t + h;
        if (head >= b.n_heads) continue;
        if (g == 0) {
            all.m[warp][head] = a.softmax[h].m;
            all.l[warp][head] = l;
        }
        for (int i = 0; i < HEAD_DIM / 64; i++) {
            float *to = all.o[warp][head] + RowPart<HEAD_DIM, BITS, 8>::dimension(i, g);
            for (int e = 0; e < 8; e++) to[e] = a.o[i][e / 2][e % 2 * 2 + h];
        }
    }
    __syncthreads();
    // 2. the block's m and l, and the factor of each warp
    if (threadIdx.x < HEADS) {
        const int head = threadIdx.x;
        float largest = -INFINITY, total = 0;
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, all.m[w][head]);
        for (int w = 0; w < WARPS; w++) {
            // a warp without a tile counts nothing
            const float m = all.m[w][head], factor = m == -INFINITY ? 0 : exp2f(m - largest);
            total += all.l[w][head] * factor;
            all.factor[w][head] = factor;
        }
        all.block_m[head] = largest;
        all.block_l[head] = total;
    }
    __syncthreads();
}

/* True in the last of n blocks that call it with this counter: it sees everything that they
 * have written before. The counter is 0 again afterwards, as the next launch wants it. */
__device__ __forceinline__ bool is_last(int *counter, int n) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // one thread counts for the block
        int before; // acquire and release: half a fence before, half a fence after
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;\n"
                     : "=r"(before)
                     : "l"(counter)
                     : "memory");
        last = before + 1 == n;
        if (last) *counter = 0;
    }
    __syncthreads();
    return last;
}

/* Joins the parts [blocks] of a row of blocks into out [n_heads][HEAD_DIM]. */
template <int HEAD_DIM>
__device__ __forceinline__ void join_blocks(const float *parts, int n_heads, uint2 *out) {
    constexpr int PART = HEADS * (HEAD_DIM + 2); // floats: o, m, l
    const int n = n_heads * HEAD_DIM / 4, blocks = gridDim.x;
    for (int i = threadIdx.x; i < (n + 31) / 32 * 32; i += blockDim.x) {
        // 1. four dimensions of every part, all on their way at once
        float4 x[MAX_SPLITS];
        for (int b = 0; b < MAX_SPLITS; b++) {
            if (b < blocks) x[b] = __ldcg((const float4 *)(parts + b * PART) + min(i, n - 1));
        }
        // 2. the factor of each part and the sum of the weights: lanes b and b + 16 know part b,
        // each for the head of its own half warp, if that is 64 wide
        const int head = min(i, n - 1) / (HEAD_DIM / 4), own = threadIdx.x % MAX_SPLITS;
        const float *part = parts + min(own, blocks - 1) * PART + HEADS * HEAD_DIM + head;
        float m = __ldcg(part), total = __ldcg(part + HEADS), largest = m;
        for (int j = 8; j > 0; j /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, j));
        const float factor = m == -INFINITY || own >= blocks ? 0 : exp2f(m - largest);
        total *= factor;
        for (int j = 8; j > 0; j /= 2) total += __shfl_xor_sync(~0u, total, j);
        // 3. the weighted sum
        float4 sum = make_float4(0, 0, 0, 0);
        for (int b = 0; b < MAX_SPLITS; b++) {
            float f = __shfl_sync(~0u, factor, b, MAX_SPLITS);
            if (b >= blocks) break;
            sum.x += x[b].x * f;
            sum.y += x[b].y * f;
            sum.z += x[b].z * f;
            sum.w += x[b].w * f;
        }
        if (i >= n) continue;
        out[i] = make_uint2(pack(sum.x / total, sum.y / total), pack(sum.z / total, sum.w / total));
    }
}

template <int HEAD_DIM, int BITS>
__global__ void __launch_bounds__(THREADS, 2)
    attention_decode_kernel(const __grid_constant__ DecodeArgs p) {
    __shared__ Queries<HEAD_DIM> queries;
    __shared__ Joined<HEAD_DIM> all;
    launch_dependents();
    const DecodeBlock b = decode_block<HEAD_DIM>(p);

    // 1. Older tokens have been in the cache since earlier steps, see embed_kernel: a warp's
    // first tile is on its way before qkv is ready.
    CacheTile<HEAD_DIM, BITS> kv;
    const int warp = threadIdx.x / 32, tile = b.tile0 + warp;
    auto load_first = [&](int only) {
        kv.load_keys(p.cache, b.cache_row + tile * 16, only);
        kv.load_values(p.cache, b.cache_row + tile * 16, only);
    };
    if (tile < b.tile1) load_first(-1);
    // 2. The queries; and in the block that has the end of the sequence two warps write the new
    // token's key and value.
    wait_for_previous_kernel();
    load_queries<HEAD_DIM, BITS>(p, b, queries);
    if (b.tile1 == b.tiles && warp >= WARPS - 2) {
        const int is_value = warp - (WARPS - 2);
        const half *row = b.row + b.q_dim + is_value * b.kv_dim + b.kv_head * HEAD_DIM;
        store_token<HEAD_DIM, BITS>(p.cache, b.cache_row + b.pos, b.pos, !is_value, row, p.rope);
    }
    __syncthreads();
    // The warp whose tile has the new token reads that row again.
    if (tile < b.tile1 && tile == b.pos / 16) load_first(b.pos % 16);
    // 3. This block's part of the positions.
    Attended<HEAD_DIM> a;
    attend_tiles(b, p.cache, kv, tile, queries, a);
    join_warps<HEAD_DIM, BITS>(b, a, all);

    // 4. Write it; the last of the blocks that share the positions joins their parts.
    constexpr int PART = HEADS * (HEAD_DIM + 2);
    float *parts = p.partial + (size_t)(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * PART;
    float *part = parts + blockIdx.x * PART;
    half *out = p.out + (size_t)blockIdx.z * b.q_dim + b.head0 * HEAD_DIM;
    for (int i = threadIdx.x; i < b.n_heads * HEAD_DIM; i += blockDim.x) {
        const int head = i / HEAD_DIM;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += all.o[w][head][i % HEAD_DIM] * all.factor[w][head];
        if (gridDim.x > 1) part[i] = sum;
        else out[i] = __float2half(sum / all.block_l[head]);
    }
    int *counters = p.arrived + blockIdx.z * (gridDim.y + 1);
    if (gridDim.x > 1) {
        if (threadIdx.x < HEADS) {
            part[HEADS * HEAD_DIM + threadIdx.x] = all.block_m[threadIdx.x];
            part[HEADS * (HEAD_DIM + 1) + threadIdx.x] = all.block_l[threadIdx.x];
        }
        if (!is_last(counters + blockIdx.y, gridDim.x)) return;
        join_blocks<HEAD_DIM>(parts, b.n_heads, (uint2 *)out);
    }

    // 5. The last block of a sequence quantizes its row for o.
    if (!p.quantized.a || !is_last(counters + gridDim.y, gridDim.y)) return;
    const size_t start = (size_t)blockIdx.z * b.q_dim / 8;
    quantize_halves((const uint4 *)p.out + start, b.q_dim / 8, (uint2 *)p.quantized.a + start,
                    p.quantized.scale + blockIdx.z);
}

/* ---- launches -------------------------------------------------------------------------------- */

/* Blocks that attention_decode_kernel has for each part of a sequence's positions. */
static int decode_rows(const Config *c) {
    return c->n_kv_heads * ceil_div(c->n_heads / c->n_kv_heads, HEADS);
}

/* The kernels for a head_dim and so many bits of the cache. */
struct AttentionKernels {
    void (*write)(const half *, int, Batch, const float4 *, GpuCache);
    void (*read)(GpuCache, int, GpuCache); // of 8 bits
    void (*prompt)(const half *, Batch, int, const float4 *, GpuCache, half *);
    void (*decode)(DecodeArgs);
};

template <int HEAD_DIM, int BITS>
static constexpr AttentionKernels kernels_for = {
    write_cache_kernel<HEAD_DIM, BITS>, read_cache_kernel<HEAD_DIM>,
    attention_prompt_kernel<HEAD_DIM>, attention_decode_kernel<HEAD_DIM, BITS>};

static AttentionKernels attention_kernels(int head_dim, int bits) {
    if (head_dim == 64) return bits == 16 ? kernels_for<64, 16> : kernels_for<64, 8>;
    return bits == 16 ? kernels_for<128, 16> : kernels_for<128, 8>;
}

/* att [T][q_dim] of tokens of a sequence, by way of the cache; one in 8 bits is read back into
 * `in_halves`. */
static void attend_prompt(const Config *c, const half *qkv, Batch batch, const float4 *rope,
                          GpuCache cache, const GpuCache &in_halves, half *att,
                          cudaStream_t stream) {
    const AttentionKernels kernels = attention_kernels(c->head_dim, cache.bits);
    const int group = c->n_heads / c->n_kv_heads, q_dim = c->n_heads * c->head_dim;
    // 1. the new keys and values into the cache
    launch(kernels.write, {dim3(batch.T), THREADS}, stream, qkv, q_dim, batch, rope, cache);
    // 2. all of it back in 16 bits
    if (cache.bits < 16) {
        launch(kernels.read, {dim3(batch.pos + batch.T), THREADS}, stream, cache, batch.sequence,
               in_halves);
        batch.sequence = 0;
        cache = in_halves;
    }
    // 3. attention
    const size_t shared = 2 * 2 * KEYS * c->head_dim * sizeof(half);
    const dim3 grid(c->n_kv_heads, ceil_div(batch.T, prompt_tokens(group)));
    launch(kernels.prompt, {grid, THREADS, shared}, stream, qkv, batch, group, rope, cache, att);
}

/* Layer l's cache. */
static GpuCache layer_cache(const GpuState *s, int l) {
    const Config *c = &s->model->config;
    GpuCache cache = s->cache;
    const size_t rows = (size_t)l * s->n_sequences * c->n_kv_heads * cache.context;
    cache.keys += rows * c->head_dim * cache.bits / 8;
    cache.values += rows * c->head_dim * cache.bits / 8;
    cache.k_scales += rows;
    cache.v_scales += rows;
    return cache;
}

/* Attention of layer l: from s->qkv to linear_input(), in 16 bits s->att. */
static void attend(GpuState *s, int l, const Batch &batch) {
    const Config *c = &s->model->config;
    const GpuCache cache = layer_cache(s, l);
    // a step: one kernel, which quantizes as well
    if (batch.sequence < 0) {
        const DecodeArgs args = {s->qkv,          c->n_heads / c->n_kv_heads,
                                 s->positions,    s->rope,
                                 cache,           s->att,
                                 linear_input(s), s->partial,
                                 s->arrived};
        launch(attention_kernels(c->head_dim, cache.bits).decode,
               {dim3(s->splits, decode_rows(c), batch.T), THREADS, 0, CARVEOUT}, s->stream, args);
        return;
    }
    // a prompt
    attend_prompt(c, s->qkv, batch, s->rope, cache, s->in_halves, s->att, s->stream);
    if (s->model->quantized) {
        gpu_quantize(s->att, batch.T, c->n_heads * c->head_dim, s->a, s->scale, s->stream);
    }
}

/* ================================================================================================
 * 5. Quantization
 *
 *     H = X^T X,   H^-1 = U^T U (damped, U upper),   M = (D + (F - X) W^T)^T X
 *     target = W + 1/2 M H^-1,   column by column:  e = (w_i - q_i) / U_ii,   w_j -= e U_ij, j > i
 *
 * The table of Operations on a GPU: qqq.h says what each does, section 3 of qqq.c how they follow
 * each other and why. Each has a twin there, a loop on the CPU.
 *
 * Weights, activations and sums are float32. The products over tokens are cuBLAS's on TF32 tensor
 * cores: sums in float32 of factors of 11 bits; H is off by less than 1e-4. Behind H, where errors
 * would grow by the condition of H, all is double: the same H gives the codes of qqq.c.
 * ============================================================================================== */

struct Machine {
    Workload work;
    cudaStream_t stream;
    cublasHandle_t cublas;
    std::vector<void *> arrays, host_arrays;
    float4 *rope;     // [length][head_dim / 4]
    double *sums;     // [SUM_BLOCKS]
    int *flag;        // something is not finite or not positive
    uint8_t *scratch; // [scratch_bytes] for the arrays of one operation; the next overwrites them
    size_t scratch_bytes;
};

/* Arrays of one operation, one behind the other in m->scratch. */
struct Scratch {
    uint8_t *next, *end;
    Scratch(Machine *m) : next(m->scratch), end(m->scratch + m->scratch_bytes) {}
    template <typename T> T *array(size_t n) {
        T *p = (T *)next;
        next += ceil_div(n * sizeof(T), 256) * 256;
        if (next > end) die("an operation needs more scratch memory than was planned");
        return p;
    }
};

/* A kernel with so many blocks: one for each row, mostly. */
template <typename... Parameters, typename... Arguments>
static void for_blocks(Machine *m, dim3 blocks, size_t shared, void (*kernel)(Parameters...),
                       Arguments... arguments) {
    launch(kernel, {blocks, THREADS, shared, -1, false}, m->stream, arguments...);
}

static void zero(Machine *m, void *array, size_t bytes) {
    cuda_check(cudaMemsetAsync(array, 0, bytes, m->stream), "cudaMemset");
}

/* A row-major matrix, or its transposed. */
template <typename T> struct Operand {
    const T *p;
    int columns; // as it lies in memory
    bool transposed = false;
};

/* y [M][N] = alpha a b + beta y, a [M][K], b [K][N]; floats on TF32 tensor cores. What is row-major
 * here is transposed to cuBLAS, which so is asked for y^T = b^T a^T. */
template <typename T>
static void product(Machine *m, int M, int N, int K, T alpha, Operand<T> a, Operand<T> b, T beta,
                    T *y, int columns) {
    constexpr bool is_float = sizeof(T) == sizeof(float);
    constexpr cudaDataType type = is_float ? CUDA_R_32F : CUDA_R_64F;
    cublas_check(CUBLAS(cublasGemmEx_64)(
        m->cublas, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
        a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &alpha, b.p, type, b.columns, a.p, type,
        a.columns, &beta, y, type, columns,
        is_float ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT));
}

constexpr int SUM_BLOCKS = 512;

__global__ void sum_kernel(const float *x, const float *y, size_t n, bool distance, double *sums) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (size_t)gridDim.x * THREADS) {
        double difference = (double)x[i] - y[i];
        sum += distance ? difference * difference : (double)x[i] * y[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/* sum_i x_i y_i, or with `distance` sum_i (x_i - y_i)^2; in double and in a fixed order. */
static double sum(Machine *m, const float *x, const float *y, size_t n, bool distance) {
    double sums[SUM_BLOCKS], sum = 0;
    for_blocks(m, SUM_BLOCKS, 0, sum_kernel, x, y, n, distance, m->sums);
    to_host(m, sums, m->sums, SUM_BLOCKS);
    for (double s : sums) sum += s;
    return sum;
}

/* A quantized linear; or several of one K that lie one behind the other, as arrange() left them. */
static GpuLinear gpu_linear(const Linear *l, int count) {
    GpuLinear all = {0, l->K, (uint32_t *)l->qweight, l->s_group, l->s_channel};
    for (int i = 0; i < count; i++) all.N += l[i].N;
    return all;
}

static void arrange(Machine *m, const Linear *l, Linear *to) {
    layout_weights(gpu_linear(to, 1), 0, l->N, (const uint16_t *)l->qweight, l->s_group,
                   l->s_channel, m->stream);
}

/* ---- rotation -------------------------------------------------------------------------------- */

/* Vectors of n = m 2^k numbers, m odd, `stride` apart, each x <- x diag(signs) H_n / sqrt(n) by the
 * fast Hadamard transform in double, and Hartley's of m. One block a vector; with a stride they are
 * the columns of [n][stride] matrices. Twin: rotate_vector(). */
__global__ void rotate_kernel(float *w, int n, int stride, const int8_t *signs) {
    extern __shared__ double rotated[]; // [n], and [m] cosines plus sines
    const int m = n / (n & -n);
    double *cas = rotated + n;
    // 1. the vector, with its signs; the Hartley matrix of m
    w += (size_t)(blockIdx.x / stride) * n * stride + blockIdx.x % stride;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        rotated[i] = (signs ? signs[i] : 1) * (double)w[(size_t)i * stride];
    for (int i = threadIdx.x; i < m; i += blockDim.x)
        cas[i] = cospi(2.0 * i / m) + sinpi(2.0 * i / m);
    // 2. sums and differences, in k passes
    for (int span = m; span < n; span *= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < n / 2; pair += blockDim.x) {
            int i = pair / span * 2 * span + pair % span;
            double a = rotated[i], b = rotated[i + span];
            rotated[i] = a + b;
            rotated[i + span] = a - b;
        }
    }
    __syncthreads();
    // 3. times the Hartley matrix, in blocks of m
    const double scale = 1 / sqrt((double)n);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        double sum = 0;
        for (int j = 0; j < m; j++) sum += rotated[i - i % m + j] * cas[i % m * j % m];
        w[(size_t)i * stride] = sum * scale;
    }
}

static void rotate(Machine *m, int N, int K, int n, bool outputs, const int8_t *signs, float *w) {
    const size_t shared = (n + n / (n & -n)) * sizeof(double);
    for_blocks(m, (size_t)N * K / n, shared, rotate_kernel, w, n, outputs ? K : 1, signs);
}

/* scaled [N][K] = diag(rows)^-1 w diag(columns), NULL for ones. */
static void scale_weights(Machine *m, int N, int K, const float *w, const float *columns,
                          const float *rows, float *scaled) {
    for_each(m->stream, (size_t)N * K, [=] __device__(size_t i) {
        const float x = columns ? w[i] * columns[i % K] : w[i];
        scaled[i] = rows ? x / rows[i / K] : x;
    });
}

static void scale(Machine *m, int N, int K, const float *columns, const float *rows, float *w) {
    scale_weights(m, N, K, w, columns, rows, w);
}

/* ---- the choice of scales, and rounding ------------------------------------------------------ */

constexpr int RANGES = 24;         // candidates of s_channel with groups
constexpr int CHANNEL_RANGES = 80; // and without

__device__ __forceinline__ float nearest_code(float w, float scale, float low) {
    return fminf(fmaxf(rintf(w / scale), low), 7.0f);
}

/* importance (w - q scale)^2. The search multiplies by 1 / scale, which decides ties of rounding
 * another way than a division, and adds a large number to round: half the instructions. */
__device__ __forceinline__ float rounding_error(float w, float importance, float scale,
                                                float inverse, float low) {
    const float round = 12582912; // 1.5 * 2^23: its last bit is worth 1
    float q = __fadd_rn(__fmaf_rn(w, inverse, round), -round);
    float e = w - fminf(fmaxf(q, low), 7.0f) * scale;
    return e * e * importance;
}

/* s_channel of a row: of 80 ranges the one of least error. A warp tries ten. */
__device__ static float search_channel_scale(const float *row, const float *importance, int K,
                                             float max, float unit) {
    __shared__ float errors[CHANNEL_RANGES];
    constexpr int EACH = CHANNEL_RANGES / WARPS;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * EACH;
    float error[EACH] = {}, scale[EACH], inverse[EACH];
    auto range = [=](int i) { return (1.0f - i / 100.0f) * max / 7; };
    // 1. the warp's ten scales
    for (int i = 0; i < EACH; i++) {
        scale[i] = range(first + i) * unit;
        inverse[i] = 1 / scale[i];
    }
    // 2. their errors, of a lane's columns; of the warp's
    for (int k = lane; k < K; k += 32) {
        float w = row[k] * unit, weight = importance[k];
        for (int i = 0; i < EACH; i++)
            error[i] += rounding_error(w, weight, scale[i], inverse[i], -7);
    }
    for (int i = 0; i < EACH; i++) {
        for (int j = 16; j > 0; j /= 2) error[i] += __shfl_xor_sync(~0u, error[i], j);
        if (lane == 0) errors[first + i] = error[i];
    }
    __syncthreads();
    // 3. the best of all
    int best = 0;
    for (int i = 1; i < CHANNEL_RANGES; i++)
        if (errors[i] < errors[best]) best = i;
    return range(best);
}

/* The same with groups, s_group [K/128] included. A warp works on one group: its lanes try the 15
 * values of s_group under two ranges at once. */
__device__ static float search_group_scales(const float *row, const float *importance, int K,
                                            float max, float unit, uint8_t *s_group) {
    extern __shared__ float least[]; // [RANGES][groups] of the best s_group, which come behind
    __shared__ float2 group[WARPS][GROUP]; // weights and their importance
    __shared__ float totals[RANGES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = K / GROUP;
    uint8_t *best = (uint8_t *)(least + RANGES * groups);
    auto range = [=](int i) { return (1.0f - i / 40.0f) * max / 225 * 2; };
    for (int g = warp; g < groups; g += WARPS) {
        // 1. the group's weights in shared memory
        for (int k = lane; k < GROUP; k += 32)
            group[warp][k] = make_float2(row[g * GROUP + k] * unit, importance[g * GROUP + k]);
        __syncwarp();
        for (int i = lane / 16; i < RANGES; i += 2) {
            // 2. the error of this lane's s_group under range i
            int s = lane % 16 + 1;
            float scale = s * range(i) * unit, inverse = 1 / scale, error = 0;
            const float4 *pairs = (const float4 *)group[warp];
            for (int k = 0; k < GROUP / 2; k++) {
                float4 pair = pairs[k];
                error += rounding_error(pair.x, pair.y, scale, inverse, -8);
                error += rounding_error(pair.z, pair.w, scale, inverse, -8);
            }
            if (s == 16) error = INFINITY; // no scale: 15 is the largest

            // 3. the best s_group of 16 lanes; of equals the smaller
            for (int j = 1; j < 16; j *= 2) {
                float other = __shfl_xor_sync(~0u, error, j);
                int other_s = __shfl_xor_sync(~0u, s, j);
                if (other < error || (other == error && other_s < s)) error = other, s = other_s;
            }
            if (lane % 16 > 0) continue;
            least[i * groups + g] = error;
            best[i * groups + g] = s;
        }
        __syncwarp();
    }
    __syncthreads();
    // 4. the range of least total error
    if (threadIdx.x < RANGES) {
        float total = 0;
        for (int g = 0; g < groups; g++) total += least[threadIdx.x * groups + g];
        totals[threadIdx.x] = total;
    }
    __syncthreads();
    int winner = 0;
    for (int i = 1; i < RANGES; i++)
        if (totals[i] < totals[winner]) winner = i;
    for (int g = threadIdx.x; g < groups; g += THREADS) s_group[g] = best[winner * groups + g];
    return range(winner);
}

/* s_group of a row under the plain choice; each warp works on one group at a time. */
__device__ static float plain_group_scales(const float *row, int K, float max, uint8_t *s_group) {
    const float scale = max / 225 * 2;
    for (int g = threadIdx.x / 32; g < K / GROUP; g += WARPS) {
        // the largest weight of the group; s_group is the nearest multiple of the row's scale
        uint32_t largest = 0;
        for (int k = threadIdx.x % 32; k < GROUP; k += 32)
            largest = ::max(largest, __float_as_uint(fabsf(row[g * GROUP + k])));
        float group_max = __uint_as_float(__reduce_max_sync(~0u, largest));
        s_group[g] = fminf(fmaxf(rintf(group_max / 15 * 2 / scale), 1), 15);
    }
    return scale;
}

/* choose_scales() of each row of w [N][K]. One block a row. */
__global__ void __launch_bounds__(THREADS)
    choose_scales_kernel(const float *w, const float *importance, int K, float *s_channel,
                         uint8_t *s_group) {
    const float *row = w + (size_t)blockIdx.x * K;
    if (s_group) s_group += (size_t)blockIdx.x * (K / GROUP);
    // 1. the largest weight of the row
    uint32_t largest = 0;
    for (int k = threadIdx.x; k < K; k += THREADS)
        largest = ::max(largest, __float_as_uint(fabsf(row[k])));
    const float max = __uint_as_float(block_max(largest));
    // 2. the scales: ones for zeros, or searched, or plain
    float scale = 1;
    if (max < 1.17549435e-38f) { // zeros, or so near to it that a scale would underflow
        for (int g = threadIdx.x; s_group && g < K / GROUP; g += THREADS) s_group[g] = 1;
    } else if (importance) {
        float unit = ldexpf(1.0f, -ilogbf(max)); // so that squares neither over- nor underflow
        scale = s_group ? search_group_scales(row, importance, K, max, unit, s_group)
                        : search_channel_scale(row, importance, K, max, unit);
    } else {
        scale = s_group ? plain_group_scales(row, K, max, s_group) : max / 7;
    }
    if (threadIdx.x == 0) s_channel[blockIdx.x] = scale;
}

static void choose_scales(Machine *m, const float *w, const float *importance, Linear *l) {
    const int groups = l->s_group ? l->K / GROUP : 0;
    for_blocks(m, l->N, RANGES * groups * (sizeof(float) + 1), choose_scales_kernel, w, importance,
               l->K, l->s_channel, l->s_group);
}

static void round_to_nearest(Machine *m, const float *w, const float *importance, Linear *l) {
    choose_scales(m, w, importance, l);
    // the codes under these scales; a thread packs four
    const Linear to = *l;
    for_each(m->stream, (size_t)l->N * (l->K / 4), [=] __device__(size_t i) {
        const float s_group = to.s_group ? to.s_group[i / (GROUP / 4)] : 1;
        const float scale = to.s_channel[i / (to.K / 4)] * s_group, low = to.s_group ? -8 : -7;
        uint32_t packed = 0;
        for (int j = 0; j < 4; j++)
            packed |= ((int)nearest_code(w[4 * i + j], scale, low) + 8) << 4 * j;
        ((uint16_t *)to.qweight)[i] = packed;
    });
}

/* ---- the forward passes ---------------------------------------------------------------------- */

/* rmsnorm() in float32. One block a row. */
__global__ void norm_kernel(const float *x, const float *weight, int dim, float eps, float *y) {
    x += (size_t)blockIdx.x * dim;
    y += (size_t)blockIdx.x * dim;
    // 1. the mean square
    float sum = 0;
    for (int i = threadIdx.x; i < dim; i += THREADS) sum += x[i] * x[i];
    const float scale = 1.0f / sqrtf(block_sum(sum) / dim + eps);
    // 2. the row
    for (int i = threadIdx.x; i < dim; i += THREADS) y[i] = x[i] * scale * weight[i];
}

/* y [T][K] = a s_a. */
static void dequantize_input(Machine *m, const LinearInput &in, int T, int K, float *y) {
    const int8_t *a = in.a;
    const float *s_a = in.scale;
    for_each(m->stream, (size_t)T * K, [=] __device__(size_t i) { y[i] = a[i] * s_a[i / K]; });
}

/* quantize_row() of each row of x [T][K], or of x / s. One block a row. */
__global__ void quantize_floats_kernel(const float *x, const float *s, int K, int8_t *a,
                                       float *s_a) {
    x += (size_t)blockIdx.x * K;
    a += (size_t)blockIdx.x * K;
    auto value = [=](int k) { return s ? x[k] / s[k] : x[k]; };
    // 1. the scale of the row
    uint32_t largest = 0;
    for (int k = threadIdx.x; k < K; k += THREADS)
        largest = max(largest, __float_as_uint(fabsf(value(k))));
    const float scale = activation_scale(block_max(largest));
    if (threadIdx.x == 0) s_a[blockIdx.x] = scale;
    // 2. the codes
    for (int k = threadIdx.x; k < K; k += THREADS) a[k] = quantize_one(value(k), scale);
}

static void subtract(Machine *m, const float *a, const float *b, size_t n, float *difference) {
    for_each(m->stream, n, [=] __device__(size_t i) { difference[i] = a[i] - b[i]; });
}

static LinearInput int8_input(Scratch &s, size_t T, int K) {
    return {s.array<int8_t>(T * K), NULL, s.array<float>(T)};
}

static void norm(Machine *m, const float *x, const float *weight, int T, bool int8, float *y) {
    const int dim = m->work.config.dim;
    const float eps = m->work.config.norm_eps;
    if (!int8) {
        for_blocks(m, T, 0, norm_kernel, x, weight, dim, eps, y);
        return;
    }
    // as the kernels of the forward pass do: quantized, and back in float32
    Scratch s(m);
    const LinearInput in = int8_input(s, T, dim);
    gpu_rmsnorm(x, weight, T, dim, eps, in, m->stream);
    dequantize_input(m, in, T, dim, y);
}

/* y [T][N] += W applied to x [T][K], or to x / s, in W4A8. */
static void add_w4a8(Machine *m, Scratch s, const Linear *w, const float *x, const float *smoothing,
                     int T, float *y) {
    const LinearInput in = int8_input(s, T, w->K);
    const GpuLinear g = gpu_linear(w, 1);
    for_blocks(m, T, 0, quantize_floats_kernel, x, smoothing, w->K, in.a, in.scale);
    gpu_gemm_w4a8(&g, in.a, in.scale, T, NULL, y, m->stream);
}

static void add_linear(Machine *m, const Linear *w, const float *in, int T, float *x) {
    if (w->dtype == U8) return add_w4a8(m, Scratch(m), w, in, NULL, T, x);
    product(m, T, w->N, w->K, 1.0f, {in, w->K}, {(const float *)w->w, w->K, true}, 1.0f, x, w->N);
}

/* Of a window's keys, or values, [n_kv_heads][length][head_dim] in halves. */
static size_t window_bytes(const Workload *work) {
    const Config *c = &work->config;
    return (size_t)work->length * c->n_kv_heads * c->head_dim * sizeof(half);
}

/* att [T][q_dim] = attention of the windows in qkv [T][N]. */
static void attend_windows(Machine *m, Scratch &s, const half *qkv, int N, int T, half *att) {
    const Config *c = &m->work.config;
    const int length = m->work.length;
    // 1. a cache of one window, which every window uses
    GpuCache cache = {};
    cache.bits = 16;
    cache.keys = s.array<uint8_t>(window_bytes(&m->work));
    cache.values = s.array<uint8_t>(window_bytes(&m->work));
    cache.n_kv_heads = c->n_kv_heads;
    cache.context = length;
    // 2. one window after the other
    for (size_t t = 0; t < (size_t)T; t += length)
        attend_prompt(c, qkv + t * N, {length, 0, 0}, m->rope, cache, {},
                      att + t * c->n_heads * c->head_dim, m->stream);
}

/* Linears first .. first + count - 1 of a layer are inside of this half. */
struct Inside {
    const Linear *first;
    int count, N, K; // their rows together; K of the linear outside
    const float *norm;
};

static Inside inside_of(const Layer *layer, bool ffn) {
    Inside h = {&layer->linears[ffn ? 4 : 0], ffn ? 2 : 3, 0, layer->linears[ffn ? 6 : 3].K,
                ffn ? layer->ffn_norm : layer->attention_norm};
    for (int i = 0; i < h.count; i++) h.N += h.first[i].N;
    return h;
}

/* In float32, attention in 16 bits. */
static void float_inside(Machine *m, const Inside &h, bool ffn, const float *x, int T, float *y) {
    const int dim = m->work.config.dim;
    Scratch s(m);

    // 1. norm, and the linears side by side in `wide`
    float *normed = s.array<float>((size_t)T * dim), *wide = s.array<float>((size_t)T * h.N);
    norm(m, x, h.norm, T, false, normed);
    for (int i = 0, row = 0; i < h.count; row += h.first[i++].N)
        product(m, T, h.first[i].N, dim, 1.0f, {normed, dim},
                {(const float *)h.first[i].w, dim, true}, 0.0f, wide + row, h.N);

    // 2. SwiGLU, or attention
    const size_t n = (size_t)T * h.K;
    if (ffn) {
        const int hidden_dim = h.K;
        for_each(m->stream, n, [=] __device__(size_t i) {
            const float *gate = wide + i / hidden_dim * 2 * hidden_dim + i % hidden_dim;
            y[i] = *gate / (1.0f + expf(-*gate)) * gate[hidden_dim];
        });
        return;
    }
    half *qkv = s.array<half>((size_t)T * h.N), *att = s.array<half>(n);
    for_each(m->stream, (size_t)T * h.N, [=] __device__(size_t i) { qkv[i] = wide[i]; });
    attend_windows(m, s, qkv, h.N, T, att);
    for_each(m->stream, n, [=] __device__(size_t i) { y[i] = att[i]; });
}

/* With the kernels of the forward pass. */
static void w4a8_inside(Machine *m, const Inside &h, bool ffn, const float *x, int T, float *y) {
    const Config *c = &m->work.config;
    Scratch s(m);

    // 1. norm, and the linears side by side
    const LinearInput in = int8_input(s, T, max(c->dim, h.K));
    const GpuLinear linears = gpu_linear(h.first, h.count);
    half *wide = s.array<half>((size_t)T * h.N);
    gpu_rmsnorm(x, h.norm, T, c->dim, c->norm_eps, in, m->stream);
    gpu_gemm_w4a8(&linears, in.a, in.scale, T, wide, NULL, m->stream);

    // 2. SwiGLU, or attention; then int8
    if (ffn) {
        gpu_swiglu(wide, T, h.K, in, m->stream);
    } else {
        half *att = s.array<half>((size_t)T * h.K);
        attend_windows(m, s, wide, h.N, T, att);
        gpu_quantize(att, T, h.K, in.a, in.scale, m->stream);
    }
    dequantize_input(m, in, T, h.K, y);
}

static void inside(Machine *m, const Layer *layer, bool ffn, const float *x, int T, float *y) {
    const Inside h = inside_of(layer, ffn);
    if (h.first->dtype == U8) w4a8_inside(m, h, ffn, x, T, y);
    else float_inside(m, h, ffn, x, T, y);
}

/* ---- moments --------------------------------------------------------------------------------- */

/* Rounded to TF32's 11 bits; the tensor cores would cut them off, always towards 0. */
static const float *to_tf32(Machine *m, Scratch &s, const float *x, size_t n) {
    float *y = s.array<float>(n);
    for_each(m->stream, n, [=] __device__(size_t i) {
        uint32_t bits;
        asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x[i]));
        y[i] = __uint_as_float(bits);
    });
    return y;
}

static void add_moments(Machine *m, const float *x, int K, const float *d, int N, int T, Sums *H,
                        Sums *M) {
    Scratch s(m);
    const float *x_tf32 = to_tf32(m, s, x, (size_t)T * K);

    // 1. H above the diagonal, in strips that begin there
    const int rows = 2048;
    for (int i = 0; i < K; i += rows)
        product(m, min(rows, K - i), K - i, T, 1.0f, {x_tf32 + i, K, true}, {x_tf32 + i, K}, 1.0f,
                (float *)H + (size_t)i * (K + 1), K);
    if (!M) return;

    // 2. M
    const float *d_tf32 = to_tf32(m, s, d, (size_t)T * N);
    product(m, N, K, T, 1.0f, {d_tf32, N, true}, {x_tf32, K}, 1.0f, (float *)M, K);
}

/* The diagonal of a matrix [K][K], to the host. */
template <typename T> static void download_diagonal(Machine *m, const T *H, int K, double *to) {
    double *diagonal = Scratch(m).array<double>(K);
    for_each(m->stream, K, [=] __device__(size_t i) { diagonal[i] = H[i * (K + 1)]; });
    to_host(m, to, diagonal, K);
}

static void complete(Machine *m, int K, Sums *sums, double *diagonal) {
    // the part of H below the diagonal
    float *H = (float *)sums;
    for_each(m->stream, (size_t)K * K, [=] __device__(size_t at) {
        const size_t i = at / K, j = at % K;
        if (j < i) H[at] = H[j * K + i];
    });
    download_diagonal(m, H, K, diagonal);
}

/* ---- the inverse of H ------------------------------------------------------------------------ */

constexpr int LEAF = 64;

/* V [n][n], n <= LEAF, rows `columns` apart: its upper triangle A, A = V V^T, becomes V^-1. One
 * block. Twins: factor(), invert(). */
__global__ void invert_leaf_kernel(double *V, int n, size_t columns, int *failed) {
    __shared__ double v[LEAF][LEAF + 1]; // V above the diagonal; later its inverse^T below
    __shared__ double root[LEAF];        // V's diagonal
    // 1. A
    for (int at = threadIdx.x; at < n * n; at += THREADS)
        v[at / n][at % n] = V[at / n * columns + at % n];
    const int t = threadIdx.x;
    // 2. V, from the last column: divide by the pivot, subtract from the rest
    for (int i = n - 1; i >= 0; i--) {
        __syncthreads();
        double pivot = v[i][i];
        if (!(pivot > 0 && pivot < INFINITY)) *failed = 1;
        if (t == 0) root[i] = sqrt(pivot);
        if (t < i) v[t][i] /= sqrt(pivot);
        __syncthreads();
        for (int at = t; at < i * i; at += THREADS) {
            int j = at / i, k = at % i;
            if (k >= j) v[j][k] -= v[j][i] * v[k][i];
        }
    }
    __syncthreads();
    // 3. U_ij = -(sum_(i<k<=j) V_ik U_kj) / V_ii; thread j has column j, in row j of v

    const double last = t < n ? 1 / root[t] : 0;
    for (int i = n - 2; i >= 0; i--) {
        if (t <= i || t >= n) continue;
        double sum = v[i][t] * last;
        for (int k = i + 1; k < t; k++) sum += v[i][k] * v[t][k];
        v[t][i] = -sum / root[i];
    }
    __syncthreads();
    // 4. back to where A was
    for (int at = t; at < n * n; at += THREADS) {
        int i = at / n, j = at % n;
        if (i <= j) V[i * columns + j] = i == j ? 1 / root[i] : v[j][i];
    }
}

/* Replaces A [n][n], symmetric, its part below the diagonal zero, by U, upper triangular, with
 * A^-1 = U^T U: U = V^-1, A = V V^T, by halves, from the lower right; half [n/2][n/2]:
 *
 *     V22 V22^T = A22,  V12 = A12 U22^T,  V11 V11^T = A11 - V12 V12^T,  U12 = -U11 V12 U22    */
static void invert_matrix(Machine *m, double *A, int n, int columns, double *half) {
    if (n <= LEAF) {
        for_blocks(m, 1, 0, invert_leaf_kernel, A, n, columns, m->flag);
        return;
    }
    const int n1 = ceil_div(n / 2, LEAF) * LEAF, n2 = n - n1;
    double *A12 = A + n1, *A22 = A12 + (size_t)n1 * columns;
    // 1. U22, V12
    invert_matrix(m, A22, n2, columns, half);
    product(m, n1, n2, n2, 1.0, {A12, columns}, {A22, columns, true}, 0.0, half, n2);
    cuda_check(cudaMemcpy2DAsync(A12, columns * sizeof *A, half, n2 * sizeof *A, n2 * sizeof *A, n1,
                                 cudaMemcpyDeviceToDevice, m->stream),
               "copy");
    // 2. A11 - V12 V12^T, U11
    const double one = 1, minus = -1; // the upper part of a row-major matrix is cuBLAS's lower
    cublas_check(CUBLAS(cublasDsyrk_v2)(m->cublas, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T, n1, n2,
                                        &minus, A12, columns, &one, A, columns));
    invert_matrix(m, A, n1, columns, half);
    // 3. U12
    product(m, n1, n2, n2, 1.0, {A12, columns}, {A22, columns}, 0.0, half, n2);
    product(m, n1, n2, n1, -1.0, {A, columns}, {half, n2}, 0.0, A12, columns);
}

static bool invert(Machine *m, const Sums *sums, double dead, double damping, Inverse *inverse,
                   double *diagonal) {
    const size_t K = inverse->K;
    const float *H = (const float *)sums;
    const int *order = inverse->order;
    double *U = inverse->U;
    int failed;
    // 1. the damped H in the order of the columns, zeros below the diagonal
    for_each(m->stream, K * K, [=] __device__(size_t at) {
        const size_t i = at / K, j = at % K;
        double h = j < i ? 0 : H[order[i] * K + order[j]];
        if (i == j) h = (h == 0 ? dead : h) + damping;
        U[at] = h;
    });
    // 2. its inverse, and whether there is one
    zero(m, m->flag, sizeof *m->flag);
    invert_matrix(m, U, K, K, Scratch(m).array<double>((K / 2 + LEAF) * (K / 2 + LEAF)));
    to_host(m, &failed, m->flag, 1);
    download_diagonal(m, U, K, diagonal);
    return !failed;
}

/* ---- GPTQ ------------------------------------------------------------------------------------ */

constexpr int GPTQ_COLUMNS = 128; // of a block; a lane has four
constexpr int GPTQ_ROWS = 4;      // of a warp

/* to [N][K] = from, the columns in order. */
static void permute(Machine *m, const float *from, const int *order, int N, int K, double *to) {
    for_each(m->stream, (size_t)N * K,
             [=] __device__(size_t i) { to[i] = from[i / K * K + order[i % K]]; });
}

/* Columns first .. first + 127 of w [N][K], in the order of U: each is rounded and its error spread
 * over those behind it in the block. The codes go to their own columns; e [N][128] are the errors,
 * by which the columns behind the block are corrected afterwards. A warp has four rows, which do
 * not depend on each other; a lane the columns lane + 32 c. Twin: gptq_columns(). */
__global__ void __launch_bounds__(THREADS)
    gptq_kernel(const double *w, const double *U, const int *order, int N, int K, int first,
                const float *s_channel, const uint8_t *s_group, int8_t *codes, double *e) {
    const int lane = threadIdx.x % 32;
    const int row0 = (blockIdx.x * WARPS + threadIdx.x / 32) * GPTQ_ROWS;
    const int columns = min(GPTQ_COLUMNS, K - first);
    constexpr int EACH = GPTQ_COLUMNS / 32;
    double value[GPTQ_ROWS][EACH];
    float scale[GPTQ_ROWS][EACH];
    int to[EACH];
    // 1. the lane's weights and their scales
    for (int c = 0; c < EACH; c++) {
        int j = lane + 32 * c;
        to[c] = j < columns ? order[first + j] : 0;
        for (int r = 0; r < GPTQ_ROWS; r++) {
            size_t n = min(row0 + r, N - 1);
            value[r][c] = j < columns ? w[n * K + first + j] : 0;
            scale[r][c] = s_channel[n] * (s_group ? s_group[n * (K / GROUP) + to[c] / GROUP] : 1);
        }
    }
    const float low = s_group ? -8 : -7;
#pragma unroll
    for (int c = 0; c < EACH; c++) {
        for (int i = 0; i < 32; i++) {
            if (c * 32 + i >= columns) break;
            // 2. row c * 32 + i of U, in the block
            const double *row = U + (size_t)(first + c * 32 + i) * K + first;
            double u[EACH];
            for (int d = c; d < EACH; d++) u[d] = lane + 32 * d < columns ? row[lane + 32 * d] : 0;
            const double u_ii = __shfl_sync(~0u, u[c], i);
            for (int r = 0; r < GPTQ_ROWS; r++) {
                // 3. round the column, of which lane i has the weight
                double w_i = __shfl_sync(~0u, value[r][c], i);
                float s = __shfl_sync(~0u, scale[r][c], i);
                float code = nearest_code(w_i, s, low);
                double error = (w_i - (double)code * s) / u_ii;

                // 4. the columns behind it make up for the error
                for (int d = c; d < EACH; d++) {
                    if (lane + 32 * d > c * 32 + i) value[r][d] -= error * u[d];
                }
                if (lane == i) { // the weight is rounded: its register keeps the error
                    value[r][c] = error;
                    if (row0 + r < N) codes[(size_t)(row0 + r) * K + to[c]] = code;
                }
            }
        }
    }
    // 5. the errors, for the columns behind the block
    for (int c = 0; c < EACH; c++) {
        for (int r = 0; r < GPTQ_ROWS; r++) {
            if (row0 + r < N) e[(size_t)(row0 + r) * GPTQ_COLUMNS + lane + 32 * c] = value[r][c];
        }
    }
}

static void correct(Machine *m, const float *w, int N, const Sums *C, const Sums *M,
                    const Inverse *inverse, float *target) {
    const int K = inverse->K;
    const size_t n = (size_t)N * K;
    Scratch s(m);
    double *p = s.array<double>(n), *t = s.array<double>(n);
    // 1. M, which may be w C, where t will be
    if (C) {
        product(m, N, K, K, 1.0f, {w, K}, {(const float *)C, K}, 0.0f, (float *)t, K);
        M = (const Sums *)t;
    }
    permute(m, (const float *)M, inverse->order, N, K, p);
    // 2. times H^-1 = U^T U
    product(m, N, K, K, 1.0, {p, K}, {inverse->U, K, true}, 0.0, t, K);
    product(m, N, K, K, 1.0, {t, K}, {inverse->U, K}, 0.0, p, K);
    // 3. the target, whose columns are in their own order again
    const int *order = inverse->order;
    const double step = CORRECTION;
    for_each(m->stream, n, [=] __device__(size_t i) {
        const size_t to = i / K * K + order[i % K];
        target[to] = w[to] + step * p[i];
    });
}

static void gptq(Machine *m, const float *w, const Inverse *inverse, const float *importance,
                 Linear *l) {
    const int N = l->N, K = l->K;
    const size_t n = (size_t)N * K;
    Scratch s(m);
    double *p = s.array<double>(n), *e = s.array<double>((size_t)N * GPTQ_COLUMNS);
    int8_t *codes = s.array<int8_t>(n);
    choose_scales(m, w, importance, l);
    permute(m, w, inverse->order, N, K, p);
    for (int i = 0; i < K; i += GPTQ_COLUMNS) {
        // 1. a block of columns, one by one
        const int end = min(i + GPTQ_COLUMNS, K);
        for_blocks(m, ceil_div(N, WARPS * GPTQ_ROWS), 0, gptq_kernel, p, inverse->U, inverse->order,
                   N, K, i, l->s_channel, l->s_group, codes, e);
        if (end == K) break;

        // 2. the columns behind the block make up for its errors
        product(m, N, K - end, GPTQ_COLUMNS, -1.0, {e, GPTQ_COLUMNS},
                {inverse->U + (size_t)i * K + end, K}, 1.0, p + end, K);
    }
    // 3. four codes to a word
    uint16_t *qweight = (uint16_t *)l->qweight;
    for_each(m->stream, n / 4, [=] __device__(size_t i) {
        uint32_t packed = 0;
        for (int j = 0; j < 4; j++) packed |= (codes[4 * i + j] + 8) << 4 * j;
        qweight[i] = packed;
    });
}

static double relative_error(Machine *m, const float *w, const Linear *l, const Sums *H) {
    const int N = l->N, K = l->K;
    const size_t n = (size_t)N * K;
    Scratch s(m);
    float *e = s.array<float>(n), *times_h = s.array<float>(n);
    // 1. the quantized minus the float weights
    const Linear q = *l;
    for_each(m->stream, n, [=] __device__(size_t i) {
        const int code = (((const uint16_t *)q.qweight)[i / 4] >> i % 4 * 4 & 15) - 8;
        const int scale = q.s_group ? q.s_group[i / GROUP] : 1;
        e[i] = (float)(code * scale) * q.s_channel[i / K] - w[i];
    });
    // 2. what both add to the output
    auto squared_output = [&](const float *a) { // tr(A H A^T)
        product(m, N, K, K, 1.0f, {a, K}, {(const float *)H, K}, 0.0f, times_h, K);
        return sum(m, a, times_h, n, false);
    };
    const double total = squared_output(w), error = squared_output(e);
    return total > 0 && error > 0 ? sqrt(error / total) : 0; // rounding may leave less than 0
}

/* ---- smoothing ------------------------------------------------------------------------------- */

/* Tokens that start a window are left out. */
__global__ void column_max_kernel(const float *x, int T, int K, int first, int length,
                                  uint32_t *max_bits) {
    int k = blockIdx.x * THREADS + threadIdx.x;
    if (k >= K) return;
    uint32_t largest = 0;
    for (int t = blockIdx.y; t < T; t += gridDim.y)
        if ((first + t) % length)
            largest = max(largest, __float_as_uint(fabsf(x[(size_t)t * K + k])));
    atomicMax(max_bits + k, largest);
}

/* One block a token. */
__global__ void sample_kernel(const float *x, int K, int first, Sampling s, float *rows) {
    const int token = first + blockIdx.x, i = token - token / s.length - 1;
    if (token % s.length == 0 || i % s.stride || i / s.stride >= s.n) return;
    for (int k = threadIdx.x; k < K; k += THREADS)
        rows[(size_t)(i / s.stride) * K + k] = x[(size_t)blockIdx.x * K + k];
}

static void observe(Machine *m, const float *x, int T, int K, int first, Sampling sampling,
                    float *max, float *rows) {
    for_blocks(m, dim3(ceil_div(K, THREADS), 64), 0, column_max_kernel, x, T, K, first,
               sampling.length, (uint32_t *)max);
    for_blocks(m, T, 0, sample_kernel, x, K, first, sampling, rows);
}

/* mean_square [K] of x / s, x [T][K]. A block has 32 columns, a warp every eighth row. */
__global__ void mean_square_kernel(const float *x, const float *s, int T, int K,
                                   float *mean_square) {
    __shared__ float sums[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = blockIdx.x * 32 + lane;
    // 1. every warp sums up its rows
    float sum = 0;
    for (int t = warp; k < K && t < T; t += WARPS) {
        float value = x[(size_t)t * K + k] / s[k];
        sum += value * value / T;
    }
    sums[warp][lane] = sum;
    __syncthreads();
    // 2. the first warp adds up all sums
    if (warp > 0 || k >= K) return;
    for (int i = 1; i < WARPS; i++) sum += sums[i][lane];
    mean_square[k] = sum;
}

/* A linear of this shape in scratch memory. */
static Linear scratch_linear(Scratch &s, const Linear *like, int group_size) {
    const size_t n = (size_t)like->N * like->K;
    Linear l = {};
    l.N = like->N;
    l.K = like->K;
    l.dtype = U8;
    // codes and scales
    l.qweight = s.array<uint8_t>(n / 2);
    l.s_channel = s.array<float>(l.N);
    if (group_size > 0) l.s_group = s.array<uint8_t>(n / GROUP);
    return l;
}

static double smoothed_distance(Machine *m, const Linear *w, const float *x, int T, const float *s,
                                const float *y) {
    const int N = w->N, K = w->K;
    Scratch scratch(m);

    // 1. W diag(s), rounded under ranges that the mean squares of X diag(s)^-1 weigh
    const size_t n = (size_t)N * K;
    Linear codes = scratch_linear(scratch, w, m->work.group_size);
    Linear candidate = scratch_linear(scratch, w, m->work.group_size);
    float *importance = scratch.array<float>(K), *weights = scratch.array<float>(n);
    for_blocks(m, ceil_div(K, 32), 0, mean_square_kernel, x, s, T, K, importance);
    scale_weights(m, N, K, (const float *)w->w, s, NULL, weights);
    round_to_nearest(m, weights, importance, &codes);
    arrange(m, &codes, &candidate);

    // 2. its output
    float *output = scratch.array<float>((size_t)T * N);
    zero(m, output, (size_t)T * N * sizeof *output);
    add_w4a8(m, scratch, &candidate, x, s, T, output);
    return sum(m, output, y, (size_t)T * N, true);
}

/* ================================================================================================
 * 6. Weights, buffers, the engine. A first reader may skip it.
 *
 * 16-bit weights are halves: BF16 ones become halves exactly from 2^-14 to 65504, below that to
 * 2^-25.
 * ============================================================================================== */

/* ---- weights --------------------------------------------------------------------------------- */

/* Elements [n] become To; *not_finite is set if one of them is NaN or infinite. */
template <typename From, typename To>
static void convert(const void *from, size_t n, To *to, int *not_finite) {
    for_each(0, n, [=] __device__(size_t i) {
        to[i] = (float)((const From *)from)[i];
        if (!isfinite((float)to[i])) *not_finite = 1;
    });
}

template <typename T> static void copy_to_gpu(T *to, const void *from, size_t n) {
    cuda_check(cudaMemcpy(to, from, n * sizeof(T), cudaMemcpyHostToDevice), "upload of weights");
}

template <typename T> static T *upload_array(const void *x, size_t n) {
    T *p = (T *)device_alloc(n * sizeof(T));
    copy_to_gpu(p, x, n);
    return p;
}

constexpr size_t UPLOAD = 64 << 20; // bytes at a time

/* Uploads float weights as To, by way of `buffer` [UPLOAD + 4 bytes]: the file's pages are read
 * once and not copied on the host. False if one is NaN or infinite. */
template <typename To> static bool upload_weights(const Linear *l, To *to, uint8_t *buffer) {
    const size_t count = (size_t)l->N * l->K, size = dtype_size(l->dtype), at_once = UPLOAD / size;
    auto *convert_to = l->dtype == F32   ? convert<float, To>
                       : l->dtype == F16 ? convert<half, To>
                                         : convert<__nv_bfloat16, To>;
    // 1. piece by piece, converted on the GPU
    int *not_finite = (int *)(buffer + UPLOAD), found;
    cuda_check(cudaMemset(not_finite, 0, sizeof(int)), "cudaMemset");
    for (size_t i = 0; i < count; i += at_once) {
        const size_t n = min(at_once, count - i);
        copy_to_gpu(buffer, (const uint8_t *)l->w + i * size, n * size);
        convert_to(buffer, n, to + i, not_finite);
    }
    // 2. what the kernels have found
    cuda_check(cudaMemcpy(&found, not_finite, sizeof found, cudaMemcpyDeviceToHost),
               "upload of weights");
    return !found;
}

static void upload_halves(const Linear *l, const char *name, half *to) {
    uint8_t *buffer = (uint8_t *)device_alloc(UPLOAD + sizeof(int));
    if (!upload_weights(l, to, buffer))
        die("%s: a weight is NaN, infinite or beyond the range of FP16", name);
    device_free(buffer);
}

GpuLinear gpu_linear_create(const Linear *parts, int n_parts) {
    // 1. check the parts and add up their rows
    GpuLinear l = {};
    l.K = parts[0].K;
    const bool groups = parts[0].s_group;
    const int multiple = groups ? GROUP : UNIT;
    if (l.K % multiple) die("a linear with K = %d: it must be a multiple of %d", l.K, multiple);
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].N % 64) die("a linear with N = %d: it must be a multiple of 64", parts[i].N);
        if (parts[i].K != l.K || (parts[i].s_group != NULL) != groups)
            die("linears of different K or kinds of scales cannot be stacked");
        l.N += parts[i].N;
    }
    // 2. memory
    l.w = (uint32_t *)device_alloc((size_t)l.N * l.K / 2);
    l.s_channel = (float *)device_alloc(l.N * sizeof(float));
    if (groups) l.s_group = (uint8_t *)device_alloc((size_t)l.N * (l.K / GROUP));

    // 3. one part after the other: to the GPU as in the file, and there into the kernel's order
    for (int i = 0, first = 0; i < n_parts; first += parts[i++].N) {
        const size_t n = (size_t)parts[i].N * l.K;
        uint8_t *qweight = upload_array<uint8_t>(parts[i].qweight, n / 2);
        uint8_t *s_group = groups ? upload_array<uint8_t>(parts[i].s_group, n / GROUP) : NULL;
        float *s_channel = upload_array<float>(parts[i].s_channel, parts[i].N);
        layout_weights(l, first, parts[i].N, (uint16_t *)qweight, s_group, s_channel, 0);
        cuda_check(cudaDeviceSynchronize(), "layout of weights");
        device_free(qweight, s_group, s_channel);
    }
    return l;
}

void gpu_linear_free(GpuLinear *l) {
    device_free(l->w, l->s_group, l->s_channel);
    *l = {};
}

/* The linears first .. first + n - 1 of a layer, stacked. */
static Matrix upload_matrix(const Layer *layer, int index, int first, int n) {
    Matrix m = {};
    const Linear *parts = &layer->linears[first];
    m.K = parts[0].K;
    for (int i = 0; i < n; i++) m.N += parts[i].N;
    // W4A8, or one float matrix after the other as halves
    if (parts[0].qweight) {
        m.w4a8 = gpu_linear_create(parts, n);
        return m;
    }
    half *to = m.w = (half *)device_alloc((size_t)m.N * m.K * sizeof *m.w);
    for (int i = 0; i < n; i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", index, linear_names[first + i]);
        upload_halves(&parts[i], name, to);
        to += (size_t)parts[i].N * m.K;
    }
    return m;
}

static void free_matrix(Matrix *m) {
    device_free(m->w, m->bytes, m->s_channel);
    gpu_linear_free(&m->w4a8);
}

/* ---- the model ------------------------------------------------------------------------------- */

static size_t gpu_free_memory(void) {
    size_t free, total;
    cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
}

bool gpu_can_run(const Config *c, bool w4a8, char *what, size_t size) {
    // 1. the GPU
    int count = 0;
    const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    auto no = [&](const char *format, auto... numbers) {
        snprintf(what, size, format, numbers...);
        return false;
    };
    // 2. the needs of the kernels
    const int group = c->n_heads / c->n_kv_heads;
    if (!found || gpu_properties().major < 8)
        return no("found no GPU of compute capability %d.0 or newer", 8);
    if (c->head_dim != 64 && c->head_dim != 128)
        return no("heads of %d, on the GPU 64 or 128", c->head_dim);
    if (group > 16 * WARPS)
        return no("%d query heads share a KV head, on the GPU at most %d", group, 16 * WARPS);
    if (c->dim % 8 || c->hidden_dim % 8)
        return no("dim %d and ffn %d, on the GPU multiples of 8", c->dim, c->hidden_dim);
    for (int k = 0, N, K; w4a8 && k < N_LINEARS; k++) {
        linear_shape(c, k, &N, &K);
        if (N % 64 || K % UNIT)
            return no("%s is %d x %d, on the GPU multiples of 64", linear_names[k], N, K);
    }
    snprintf(what, size, "%s", gpu_properties().name);
    return true;
}

/* Bytes of a model on the GPU. All layers are alike. */
static size_t gpu_model_bytes(const Model *m) {
    const Config *c = &m->config;
    // 1. a layer
    size_t layer = 2 * c->dim * sizeof(float);
    for (const Linear &l : m->layers[0].linears) {
        const size_t weights = (size_t)l.N * l.K;
        if (!l.qweight) layer += weights * sizeof(half);
        else layer += weights / 2 + l.N * sizeof(float) + (l.s_group ? weights / GROUP : 0);
    }
    // 2. the embedding, and lm_head if it is a table of its own
    const size_t table = (size_t)c->vocab_size * c->dim * sizeof(half);
    size_t head = m->lm_head.w == m->embedding.w ? 0 : table;
    if (m->lm_head.dtype == I8) head = table / 2 + c->vocab_size * sizeof(float);
    return c->n_layers * layer + table + head + c->dim * sizeof(float);
}

/* Uploads a model straight from the mapped file: W4A8 as section 2 wants it, all else as halves.
 * Too little GPU memory ends the program with how much is needed. */
static GpuModel *gpu_model_load(const Model *m) {
    // 1. is there room?
    GpuModel *g = (GpuModel *)allocate(1, sizeof *g);
    const Config *c = &g->config;
    g->config = m->config;
    g->quantized = m->group_size != 0;
    g->bytes = gpu_model_bytes(m);
    if (g->bytes > gpu_free_memory()) {
        die("the model needs %.2f GB of GPU memory, only %.2f GB are free", g->bytes / 1e9,
            gpu_free_memory() / 1e9);
    }
    // 2. the embedding and lm_head, which may be the same table
    const size_t table = (size_t)c->vocab_size * c->dim;
    g->embedding = (half *)device_alloc(table * sizeof(half));
    upload_halves(&m->embedding, "model.embed_tokens", g->embedding);
    g->lm_head.N = c->vocab_size;
    g->lm_head.K = c->dim;
    // in 8 bits as in the file, the same table, or halves of its own
    if (m->lm_head.dtype == I8) {
        if (c->dim % 16)
            die("an lm_head in 8 bits with dim %d: it must be a multiple of 16", c->dim);
        g->lm_head.bytes = upload_array<int8_t>(m->lm_head.w, table);
        g->lm_head.s_channel = upload_array<float>(m->lm_head.s_channel, c->vocab_size);
    } else if (m->lm_head.w == m->embedding.w) {
        g->lm_head.w = g->embedding;
    } else {
        g->lm_head.w = (half *)device_alloc(table * sizeof(half));
        upload_halves(&m->lm_head, "lm_head", g->lm_head.w);
    }
    // 3. the norms and the layers
    g->norm = upload_array<float>(m->norm, c->dim);
    g->layers = (GpuLayer *)allocate(c->n_layers, sizeof *g->layers);
    for (int i = 0; i < c->n_layers; i++) {
        const Layer *l = &m->layers[i];
        g->layers[i] = {upload_array<float>(l->attention_norm, c->dim),
                        upload_array<float>(l->ffn_norm, c->dim),
                        upload_matrix(l, i, 0, 3),
                        upload_matrix(l, i, 3, 1),
                        upload_matrix(l, i, 4, 2),
                        upload_matrix(l, i, 6, 1)};
    }
    return g;
}

static void gpu_model_free(GpuModel *g) {
    for (int i = 0; i < g->config.n_layers; i++) {
        GpuLayer *l = &g->layers[i];
        for (Matrix *m : {&l->qkv, &l->o, &l->gate_up, &l->down}) free_matrix(m);
        device_free(l->attention_norm, l->ffn_norm);
    }
    // lm_head may be the same table as the embedding
    if (g->lm_head.w != g->embedding) free_matrix(&g->lm_head);
    device_free(g->embedding, g->norm);
    free(g->layers);
    free(g);
}

/* Bytes per second that large copies within GPU memory read and write. */
static double gpu_copy_bandwidth(void) {
    const int copies = 8;
    const size_t bytes = min(gpu_free_memory() / 4, (size_t)1 << 30);
    uint8_t *buffer = (uint8_t *)device_alloc(2 * bytes);
    double best = INFINITY;
    for (int pass = 0; pass < 3; pass++) {
        // several copies, so that starting them does not count; the best pass of three
        const double start = seconds();
        for (int i = 0; i < copies; i++) {
            cuda_check(cudaMemcpyAsync(buffer, buffer + bytes, bytes, cudaMemcpyDeviceToDevice),
                       "copy");
        }
        cuda_check(cudaDeviceSynchronize(), "copy");
        best = min(best, (seconds() - start) / copies);
    }
    device_free(buffer);
    return 2 * bytes / best;
}

/* ---- the state ------------------------------------------------------------------------------- */

constexpr int CHUNK_TOKENS = 1024;            // of a prompt, which go through the layers together
constexpr size_t CUBLAS_WORKSPACE = 32 << 20; // bytes, as NVIDIA recommends for Hopper

/* Lays the arrays of a state out in s->memory, one behind the other. Returns their size, which
 * needs no memory. */
static size_t lay_out_arrays(GpuState *s) {
    const Config *c = &s->model->config;
    const size_t T = s->max_T, B = s->n_sequences;
    const size_t q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;
    const size_t widest = max((size_t)max(c->dim, c->hidden_dim), q_dim);
    const bool q = s->model->quantized;
    size_t used = 0;
    auto take = [&](auto *&p, size_t n) {
        p = (std::remove_reference_t<decltype(p)>)(s->memory + used);
        used += ceil_div(n * sizeof *p, 256) * 256;
    };
    // 1. of T tokens
    take(s->tokens, T);
    take(s->x, T * c->dim);
    take(s->a, q ? T * widest : 0);
    take(s->h, T * (q ? c->dim : widest));
    take(s->scale, T);
    take(s->qkv, T * (q_dim + 2 * kv_dim));
    take(s->att, T * q_dim);
    take(s->gate_up, T * 2 * c->hidden_dim);
    take(s->y, q ? 0 : T * c->dim);
    // 2. the cache of all layers, and in 16 bits the cache of one layer and sequence
    GpuCache *k = &s->cache, *h = &s->in_halves;
    const size_t rows = c->n_layers * B * c->n_kv_heads * k->context;
    const size_t halves = k->bits < 16 ? h->context * kv_dim * sizeof(half) : 0;
    take(k->keys, rows * c->head_dim * k->bits / 8);
    take(k->values, rows * c->head_dim * k->bits / 8);
    take(k->k_scales, k->bits < 16 ? rows : 0);
    take(k->v_scales, k->bits < 16 ? rows : 0);
    take(h->keys, halves);
    take(h->values, halves);
    take(s->rope, (size_t)s->context * (c->head_dim / 4));
    take(s->partial, B * decode_rows(c) * s->splits * HEADS * (c->head_dim + 2));
    take(s->arrived, B * (decode_rows(c) + 1));
    // 3. the results of B sequences
    take(s->positions, B);
    take(s->chosen, B);
    take(s->logits, max((size_t)LOGIT_ROWS, B) * c->vocab_size);
    take(s->scores, LOGIT_ROWS);
    take(s->cublas_workspace, CUBLAS_WORKSPACE);
    return used;
}

/* The sizes of a state, before its memory is there. */
static GpuState plan_state(const GpuModel *g, int n_sequences, int context, int kv_bits) {
    GpuState s = {};
    s.model = g;
    s.n_sequences = n_sequences;
    s.context = context;
    s.max_T = max(min(context, CHUNK_TOKENS), n_sequences);
    for (GpuCache *cache : {&s.cache, &s.in_halves}) {
        cache->bits = cache == &s.cache ? kv_bits : 16;
        cache->n_kv_heads = g->config.n_kv_heads;
        // Whole tiles of attention_decode_kernel; an odd number, as heads that are a power of two
        // apart are read more slowly.
        cache->context = (ceil_div(context, 16) | 1) * 16;
    }
    // Enough blocks to fill the GPU, two of 8 warps per multiprocessor; about a tile per warp.
    int rows = decode_rows(&g->config) * n_sequences, parts = max(2, (context + 64) / (8 * 16));
    s.splits = max(1, min(min(MAX_SPLITS, parts), 2 * multiprocessors() / rows));
    s.bytes = lay_out_arrays(&s);
    return s;
}

static void upload_rope(const Config *c, int context, float4 *to) {
    const size_t n = (size_t)context * c->head_dim;
    float *rope = (float *)allocate(n, sizeof *rope);
    for (int pos = 0; pos < context; pos++) rope_angles(c, pos, rope + (size_t)pos * c->head_dim);
    copy_to_gpu((float *)to, rope, n);
    free(rope);
}

static GpuState *gpu_state_new(const GpuModel *g, int n_sequences, int context, int kv_bits) {
    const Config *c = &g->config;
    GpuState *s = (GpuState *)allocate(1, sizeof *s);
    // 1. memory of the GPU
    *s = plan_state(g, n_sequences, context, kv_bits);
    s->memory = (uint8_t *)device_alloc(s->bytes);
    lay_out_arrays(s);
    // zeros: counters, and the cache, where numbers not yet written must at least be finite.
    cuda_check(cudaMemset(s->memory, 0, s->bytes), "cudaMemset");
    upload_rope(c, context, s->rope);
    // 2. memory of the host
    cuda_check(cudaMallocHost(&s->host_logits, (size_t)n_sequences * c->vocab_size * sizeof(float)),
               "pinned memory");
    s->host_chosen = (int *)allocate(n_sequences, sizeof *s->host_chosen);
    // 3. the stream, and cuBLAS on it
    cuda_check(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    cublas_check(CUBLAS(cublasCreate_v2)(&s->cublas));
    cublas_check(CUBLAS(cublasSetStream_v2)(s->cublas, s->stream));
    cublas_check(CUBLAS(cublasSetWorkspace_v2)(s->cublas, s->cublas_workspace, CUBLAS_WORKSPACE));
    return s;
}

static void gpu_state_free(GpuState *s) {
    if (!s) return;
    cuda_check(cudaStreamSynchronize(s->stream), "forward pass");
    // the graph and the handles first, then the memory that they use
    if (s->step) cuda_check(cudaGraphExecDestroy(s->step), "cudaGraphExecDestroy");
    cublas_check(CUBLAS(cublasDestroy_v2)(s->cublas));
    cuda_check(cudaStreamDestroy(s->stream), "cudaStreamDestroy");
    cuda_check(cudaFreeHost(s->host_logits), "cudaFreeHost");
    device_free(s->memory);
    free(s->host_chosen);
    free(s);
}

/* ---- the engine ------------------------------------------------------------------------------ */

struct GpuEngine : Engine {
    GpuModel *weights;
    GpuState *state; // NULL before start()
};

static GpuState *state_of(Engine *e) {
    return static_cast<GpuEngine *>(e)->state;
}

static bool engine_fits(Engine *engine, int n_sequences, int context) {
    GpuEngine *e = static_cast<GpuEngine *>(engine);
    gpu_state_free(e->state);
    e->state = NULL;
    e->state_bytes = plan_state(e->weights, n_sequences, context, e->kv_bits).bytes;
    return e->state_bytes <= gpu_free_memory();
}

static void engine_start(Engine *engine, int n_sequences, int context) {
    GpuEngine *e = static_cast<GpuEngine *>(engine);
    if (!engine_fits(e, n_sequences, context)) {
        die("%d sequences of %d tokens need %.2f GB of GPU memory, only %.2f GB are free",
            n_sequences, context, e->state_bytes / 1e9, gpu_free_memory() / 1e9);
    }
    e->state = gpu_state_new(e->weights, n_sequences, context, e->kv_bits);
    e->n_sequences = n_sequences;
    e->context = context;
}

static void check_tokens(const GpuState *s, const int *tokens, int T, int pos) {
    if (T < 1 || pos < 0 || pos > s->context - T)
        die("%d tokens at position %d do not fit a context of %d", T, pos, s->context);
    for (int t = 0; t < T; t++) {
        if (tokens[t] < 0 || tokens[t] >= s->model->config.vocab_size)
            die("token %d is outside the vocabulary of %d", tokens[t], s->model->config.vocab_size);
    }
}

/* Runs tokens [n] of one sequence through all layers, in chunks; calls after_chunk(first, T) after
 * each. */
template <typename F>
static void feed_chunks(GpuState *s, int sequence, const int *tokens, int n, int pos,
                        F after_chunk) {
    check_tokens(s, tokens, n, pos);
    for (int first = 0; first < n; first += s->max_T) {
        // the tokens replace the ones of the chunk before, on the same stream
        const int T = min(n - first, s->max_T);
        to_gpu(s, s->tokens, tokens + first, T);
        prompt(s, {T, sequence, pos + first});
        after_chunk(first, T);
    }
}

/* One graph launch: see decode_step(). */
static void engine_step(Engine *e, const int *tokens, const int *positions) {
    GpuState *s = state_of(e);
    // 1. given tokens replace the chosen ones
    for (int i = 0; tokens && i < s->n_sequences; i++) {
        check_tokens(s, tokens + i, 1, positions[i]);
        const Choice given = (uint32_t)~tokens[i];
        to_gpu(s, s->chosen + i, &given, 1);
        to_gpu(s, s->positions + i, positions + i, 1);
    }
    // 2. the first step is captured: a graph of its kernels starts faster than one after the other
    if (!s->step) {
        cudaGraph_t graph;
        cuda_check(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal), "capture");
        decode_step(s);
        cuda_check(cudaStreamEndCapture(s->stream, &graph), "capture");
        cuda_check(cudaGraphInstantiate(&s->step, graph, 0), "cudaGraphInstantiate");
        cuda_check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    }
    cuda_check(cudaGraphLaunch(s->step, s->stream), "cudaGraphLaunch");
    s->n_logits = s->n_sequences;
}

static void engine_feed(Engine *e, int sequence, const int *tokens, int n, int pos) {
    GpuState *s = state_of(e);
    if (n == 1 && s->n_sequences == 1) return engine_step(e, tokens, &pos);
    // 1. all tokens, and the logits of the last one
    int last = 0; // token of the last chunk
    feed_chunks(s, sequence, tokens, n, pos, [&](int, int T) { last = T - 1; });
    lm_head(s, last, 1);
    // 2. the likeliest next token; choose() moves the position on
    const int end = pos + n - 1;
    const Choice none = 0;
    to_gpu(s, s->positions + sequence, &end, 1);
    to_gpu(s, s->chosen + sequence, &none, 1);
    choose(s, sequence, 1);
}

static const int *engine_chosen(Engine *e) {
    GpuState *s = state_of(e);
    Choice *chosen = (Choice *)s->host_logits; // pinned, and not in use
    to_host(s, chosen, s->chosen, s->n_sequences);
    for (int i = 0; i < s->n_sequences; i++) s->host_chosen[i] = chosen_token(chosen[i]);
    return s->host_chosen;
}

static const float *engine_logits(Engine *e) {
    GpuState *s = state_of(e);
    to_host(s, s->host_logits, s->logits, (size_t)s->n_logits * e->model->config.vocab_size);
    return s->host_logits;
}

static void engine_score(Engine *e, int sequence, const int *tokens, const int *targets, int n,
                         int pos, Score *scores) {
    GpuState *s = state_of(e);
    feed_chunks(s, sequence, tokens, n, pos, [&](int first, int T) {
        to_gpu(s, s->tokens, targets + first, T);
        // LOGIT_ROWS rows of logits at a time
        for (int t = 0; t < T; t += LOGIT_ROWS) {
            const int rows = min(LOGIT_ROWS, T - t);
            lm_head(s, t, rows);
            launch(score_kernel, {dim3(rows), THREADS}, s->stream, s->logits,
                   e->model->config.vocab_size, s->tokens + t, s->scores);
            to_host(s, scores + first + t, s->scores, rows);
        }
    });
}

static void engine_free(Engine *engine) {
    GpuEngine *e = static_cast<GpuEngine *>(engine);
    gpu_state_free(e->state);
    gpu_model_free(e->weights);
    free(e);
}

Engine *gpu_engine(const Model *m, int kv_bits) {
    if (kv_bits != 16 && kv_bits != 8)
        die("-k %d: on the GPU the KV cache has 16 or 8 bits", kv_bits);
    const Config *c = &m->config;
    GpuEngine *e = (GpuEngine *)allocate(1, sizeof *e);
    e->weights = gpu_model_load(m);
    e->model = m;
    e->on_gpu = true;
    e->kv_bits = kv_bits;
    // 1. sizes; a step reads all weights, but only a row of an embedding that is not lm_head as
    // well
    const size_t row = c->head_dim * kv_bits / 8 + (kv_bits < 16 ? sizeof(half) : 0);
    e->position_bytes = 2 * row * c->n_layers * c->n_kv_heads;
    e->step_bytes = e->weight_bytes = e->weights->bytes;
    if (e->weights->lm_head.w != e->weights->embedding)
        e->step_bytes -= (size_t)c->vocab_size * c->dim * sizeof(half);
    // 2. functions
    e->start = engine_start;
    e->fits = engine_fits;
    e->feed = engine_feed;
    e->step = engine_step;
    e->chosen = engine_chosen;
    e->logits = engine_logits;
    e->score = engine_score;
    e->bandwidth = gpu_copy_bandwidth;
    e->free = engine_free;
    return e;
}

/* ---- the quantizer's memory ------------------------------------------------------------------ */

/* The largest need of an operation. */
static size_t scratch_bytes(const Workload *work) {
    const Config *c = &work->config;
    const size_t q_dim = (size_t)c->n_heads * c->head_dim, T = work->T, searched = work->searched;
    const size_t qkv = q_dim + 2 * (size_t)c->n_kv_heads * c->head_dim;
    const size_t dim = c->dim, K = max(max(dim, (size_t)c->hidden_dim), q_dim);
    const size_t N = max(K, qkv), wide = max(2 * (size_t)c->hidden_dim, qkv);
    // 1. the largest linear
    size_t weights = 0;
    for (int k = 0; k < N_LINEARS; k++) {
        int rows, columns;
        linear_shape(c, k, &rows, &columns);
        weights = max(weights, (size_t)rows * columns);
    }
    // 2. each operation: forward passes, add_moments(), correct() and gptq(), invert(),
    // smoothed_distance()
    const size_t pass = T * ((dim + wide + 1) * sizeof(float) + (qkv + q_dim) * sizeof(half) + K) +
                        2 * window_bytes(work);
    const size_t moments = T * (K + dim) * sizeof(float);
    const size_t linear = weights * (2 * sizeof(double) + 1) + N * GPTQ_COLUMNS * sizeof(double);
    const size_t inverse = (K / 2 + LEAF) * (K / 2 + LEAF) * sizeof(double);
    const size_t search = searched * ((N + 1) * sizeof(float) + K) + weights * (sizeof(float) + 2) +
                          K * sizeof(float);
    // 3. the largest of all; without tokens only weights are uploaded
    size_t bytes = UPLOAD + sizeof(int);
    if (T) bytes = max(max(bytes, max(pass, moments)), max(max(linear, inverse), search));
    return bytes + 16 * 256; // arrays are aligned
}

static size_t rope_bytes(const Workload *work) {
    return (size_t)work->length * work->config.head_dim * sizeof(float);
}

static size_t free_bytes() {
    const size_t later = 256 << 20, free = gpu_free_memory(); // CUDA's, when it loads kernels
    return free > later ? free - later : 0;
}

static size_t start_bytes(const Workload *work) {
    return scratch_bytes(work) + rope_bytes(work) + CUBLAS_WORKSPACE + SUM_BLOCKS * sizeof(double);
}

static bool read_weights(Machine *m, const Linear *from, float *w) {
    cuda_check(cudaStreamSynchronize(m->stream), "quantization");
    return upload_weights(from, w, m->scratch);
}

static void *array(Machine *m, size_t bytes, bool on_host) {
    void *p;
    if (on_host) {
        cuda_check(cudaMallocHost(&p, bytes), "pinned memory");
        m->host_arrays.push_back(p);
        return p;
    }
    // arrays of the GPU begin as zeros
    p = device_alloc(bytes);
    m->arrays.push_back(p);
    zero(m, p, bytes);
    return p;
}

static void copy(Machine *m, void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, m->stream), "copy");
    cuda_check(cudaStreamSynchronize(m->stream), "quantization");
}

static Machine *start(const Workload *work) {
    Machine *m = new Machine();
    m->work = *work;
    // 1. the stream, and cuBLAS on it
    cuda_check(cudaStreamCreate(&m->stream), "cudaStreamCreate");
    cublas_check(CUBLAS(cublasCreate_v2)(&m->cublas));
    cublas_check(CUBLAS(cublasSetStream_v2)(m->cublas, m->stream));
    cublas_check(CUBLAS(cublasSetWorkspace_v2)(m->cublas, array(m, CUBLAS_WORKSPACE, false),
                                               CUBLAS_WORKSPACE));
    // 2. memory
    m->sums = (double *)array(m, SUM_BLOCKS * sizeof(double), false);
    m->flag = (int *)array(m, sizeof(int), false);
    m->scratch_bytes = scratch_bytes(work);
    m->scratch = (uint8_t *)array(m, m->scratch_bytes, false);
    // 3. what only the forward passes need
    if (!work->T) return m;
    m->rope = (float4 *)array(m, rope_bytes(work), false);
    upload_rope(&work->config, work->length, m->rope);
    return m;
}

static void stop(Machine *m) {
    cuda_check(cudaStreamSynchronize(m->stream), "quantization");
    for (void *p : m->host_arrays) cuda_check(cudaFreeHost(p), "cudaFreeHost");
    for (void *p : m->arrays) device_free(p);
    cublas_check(CUBLAS(cublasDestroy_v2)(m->cublas));
    cuda_check(cudaStreamDestroy(m->stream), "cudaStreamDestroy");
    delete m;
}

const Operations *gpu_operations(void) {
    // in the order of qqq.h: the machine and its memory, then the steps of the method
    static const Operations o = {.memory = "GPU memory",
                                 .sum_bytes = sizeof(float),
                                 .chunk_tokens = 8192,
                                 .free_bytes = free_bytes,
                                 .start_bytes = start_bytes,
                                 .start = start,
                                 .stop = stop,
                                 .array = array,
                                 .copy = copy,
                                 .zero = zero,
                                 .read = read_weights,
                                 .rotate = rotate,
                                 .scale = scale,
                                 .norm = norm,
                                 .inside = inside,
                                 .add_linear = add_linear,
                                 .subtract = subtract,
                                 .observe = observe,
                                 .smoothed_distance = smoothed_distance,
                                 .add_moments = add_moments,
                                 .complete = complete,
                                 .invert = invert,
                                 .round_to_nearest = round_to_nearest,
                                 .correct = correct,
                                 .gptq = gptq,
                                 .relative_error = relative_error,
                                 .arrange = arrange};
    return &o;
}

/* ================================================================================================
 * 7. Hopper: the W4A8 GEMM with wgmma, fed by the TMA
 *
 * The equation, the layout of the weights and their dequantization are section 2's. mma.sync
 * reaches 65% of the speed of Hopper's tensor cores; wgmma reaches the rest. A warpgroup, four
 * warps, issues it together. It runs in the background and reads its right operand, the
 * activations, from shared memory by itself. The left operand may be registers. Their layout and
 * the layout of the sums are, warp for warp, the same as with mma.sync.
 *
 *      global memory               shared memory: a ring of STAGES            registers
 *
 *      weights      --TMA-->  |weights, scales, activations| stage 0
 *      group scales --TMA-->  |weights, scales, activations| stage 1 --> dequantize --> left
 *      activations  --TMA-->  |weights, scales, activations| ...                         |
 *                                                  |                                     v
 *       1. feed                                    +------------------------> wgmma --> acc --> y
 *       (warpgroup 2: one thread per input)           2. dequantize  3. multiply  4. write
 *                                                     (warpgroups 0 and 1)
 *
 * Each stage has two barriers. `full`: its copies have arrived. `empty`: the warps that used it are
 * through. One part of a stage is dequantized while the tensor cores multiply the part before.
 *
 * How the two warpgroups share a tile of CHANNELS x TOKENS:
 *
 *     CHANNELS  256: each has 128 of the channels, as two m64 products side by side
 *               128: each has  64
 *                64: both have all: teams that take every other stage and add up their sums
 *
 * A panel is 128 k of a tile's inputs, one after the other in shared memory:
 *     activations [TOKENS][128], swizzled() by the TMA
 *     weights     [strips][2 units][2 m16 tiles][32 lanes][16]
 *     scales      [strips][32]
 * A stage is one panel, or two if a warpgroup has one m64 tile.
 * ============================================================================================== */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAVE_WGMMA = true;
#else
constexpr bool HAVE_WGMMA = false;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "Hopper's own instructions need sm_90a, not sm_90"
#endif
#endif

/* ---- instructions ---------------------------------------------------------------------------- */

/* The wgmma that follow may read registers that other instructions wrote before. */
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

/* All wgmma since the last commit become a group. */
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/* Until at most PENDING groups still run. */
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

/* The descriptor of a matrix in shared memory: rows of 128 bytes, swizzled(), in blocks of 8 rows
 * (1024 bytes). */
__device__ __forceinline__ uint64_t wgmma_matrix(uint32_t address) {
    const uint64_t swizzle_128_bytes = 1, block_stride = 1024 >> 4, unused_stride = 1;
    return swizzle_128_bytes << 62 | block_stride << 32 | unused_stride << 16 | address >> 4;
}

/* c [64][N] += a [64][32] . b [N][32] over four warps, each with 16 of the rows; N = 64, 96, 128.
 */
#define SUMS(j) "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
__device__ __forceinline__ void wgmma(int (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, add; }\n"
                 : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(int (&c)[12][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
                 "{%48, %49, %50, %51}, %52, add; }\n"
                 : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7), SUMS(8),
                   SUMS(9), SUMS(10), SUMS(11)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(int (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, add; }\n"
                 : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7), SUMS(8),
                   SUMS(9), SUMS(10), SUMS(11), SUMS(12), SUMS(13), SUMS(14), SUMS(15)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SUMS

/* A phase of an mbarrier is over when `count` threads have arrived, and as many bytes as they have
 * announced. A thread waits for the end of the phase of a parity; the phase before the first has
 * parity 1. */
__device__ __forceinline__ void barrier_init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_and_expect(uint64_t *barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{ .reg .pred over;\n"
                 "again_%=: mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n"
                 "@!over bra again_%=; }\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Copies the map's box at (x, y), x in units of eight bytes, to shared memory, and counts the bytes
 * at the barrier. */
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int x, int y,
                                         uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t to, const void *from, bool nonzero) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from),
                 "r"(nonzero ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void load_shared_16(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t from) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(x) : "r"(from));
    return x;
}

/* ---- sizes ----------------------------------------------------------------------------------- */

constexpr int WARPGROUP = 128; // threads

enum GemmInput { ACTIVATIONS, WEIGHTS, GROUP_SCALES, N_GEMM_INPUTS };

struct TensorMaps {
    CUtensorMap of[N_GEMM_INPUTS];
};

/* A copy of the TMA. */
struct Box {
    int rows, row_bytes; // of a matrix
    int offset;          // in a panel
};

template <int CHANNELS, int TOKENS, bool GROUPS> struct HopperShape {
    static constexpr int M_TILES = CHANNELS == 256 ? 2 : 1; // m64 tiles of a warpgroup
    static constexpr int CHANNELS_EACH = 64 * M_TILES;      // of a warpgroup
    static constexpr int TEAMS = CHANNELS == 64 ? 2 : 1;
    static constexpr int STRIPS = CHANNELS / STRIP;
    static constexpr int INPUTS = GROUPS ? N_GEMM_INPUTS : N_GEMM_INPUTS - 1;
    static constexpr Box ACTIVATION_BOX = {TOKENS, GROUP, 0};
    static constexpr Box WEIGHT_BOX = {STRIPS, 2 * 1024, TOKENS *GROUP};
    static constexpr Box SCALE_BOX = {STRIPS, 32, TOKENS *GROUP + STRIPS * 2 * 1024};
    static constexpr int PANEL = SCALE_BOX.offset + (GROUPS ? 1024 : 0); // a multiple of 1024
    static constexpr int PANELS = 2 / M_TILES;                           // of a stage
    static constexpr int PART_UNITS = 2 / M_TILES; // of a part, half a stage: four wgmma
    static constexpr int STAGE = PANELS * PANEL;
    static constexpr int SUMS = (TEAMS - 1) * CHANNELS * TOKENS * 4; // bytes
    static constexpr int STAGES = (224 * 1024 - SUMS) / STAGE;
    static constexpr int SHARED = STAGES * STAGE + SUMS; // bytes
};

/* The barriers of the ring. A block counts its stages through all tiles: stage i is in slot
 * i % STAGES, for the (i / STAGES)-th time. */
template <typename T> struct Ring { __align__(8) uint64_t full[T::STAGES], empty[T::STAGES]; };

/* ---- phase 1: feed --------------------------------------------------------------------------- */

/* Has one input copied, stage after stage. One thread. */
template <typename T, GemmInput INPUT>
__device__ __forceinline__ void feed(const Tiling &tiling, int tokens, const TensorMaps &maps,
                                     uint32_t shared, Ring<T> &ring) {
    constexpr Box box = INPUT == ACTIVATIONS ? T::ACTIVATION_BOX
                        : INPUT == WEIGHTS   ? T::WEIGHT_BOX
                                             : T::SCALE_BOX;
    const int rows = INPUT == ACTIVATIONS ? tokens : box.rows;
    if (INPUT == ACTIVATIONS) wait_for_previous_kernel(); // which writes no weights
    int i = 0;
    for (int t = blockIdx.x; t < tiling.tiles; t += gridDim.x) {
        const Tile tile = tile_number(t, tiling);
        const int row = (INPUT == ACTIVATIONS ? tile.m : tile.n) * rows;
        for (int panel = 0; panel < tiling.chunks * T::PANELS; i++) {
            // wait until the slot is empty, say how many bytes will come, and ask for them
            const int slot = i % T::STAGES;
            barrier_wait(&ring.empty[slot], i / T::STAGES % 2 ^ 1);
            barrier_arrive_and_expect(&ring.full[slot], T::PANELS * rows * box.row_bytes);
            for (int j = 0; j < T::PANELS; j++, panel++) {
                copy_box(shared + slot * T::STAGE + j * T::PANEL + box.offset, &maps.of[INPUT],
                         panel * (box.row_bytes / 8), row, &ring.full[slot]);
            }
        }
    }
}

/* ---- phases 2 and 3: dequantize, multiply ---------------------------------------------------- */

/* The channels of a warp: 16 of an m64 tile. They are one m16 tile of a strip, or with two m64
 * tiles both m16 tiles of a strip. */
template <typename T> struct WarpChannels {
    int channel;     // the warpgroup's first, in the tile
    int strip, tile; // the warp's
    __device__ __forceinline__ WarpChannels(int warpgroup, int warp) {
        channel = T::TEAMS > 1 ? 0 : warpgroup * T::CHANNELS_EACH;
        const int first = channel / 16 + T::M_TILES * warp;
        strip = first / 2, tile = first % 2;
    }
};

/* Left operands of a part of a stage: [unit][step][m64 tile][register]. */
template <typename T> using Left = uint32_t[T::PART_UNITS][2][T::M_TILES][4];

template <typename T, bool GROUPS>
__device__ __forceinline__ void dequantize_part(uint32_t panels, int part, WarpChannels<T> at,
                                                uint32_t &s_group, Left<T> &left) {
    const int lane = threadIdx.x % 32;
    const uint32_t at_w = T::WEIGHT_BOX.offset + at.strip * 2048 + at.tile * 512 + lane * 16;
    const uint32_t at_s = T::SCALE_BOX.offset + at.strip * 32 + lane / 4 * 4;
    for (int i = 0; i < T::PART_UNITS; i++) {
        // 1. this lane's words of unit u, and the scales of the panel's group
        const int u = part * T::PART_UNITS + i;
        const uint32_t panel = panels + u / 2 * T::PANEL;
        uint32_t words[T::M_TILES][4];
        for (int j = 0; j < T::M_TILES; j++) {
            load_shared_16(words[j], panel + at_w + u % 2 * 1024 + j * 512);
        }
        if (GROUPS && u % 2 == 0) s_group = load_shared_4(panel + at_s);
        // 2. both steps
        for (int n = 0; n < 8 * T::M_TILES; n++) {
            const int step = n / (4 * T::M_TILES), j = n / 4 % T::M_TILES, r = n % 4;
            uint32_t s = __byte_perm(s_group, 0, 0x4440 + 2 * (at.tile + j) + r % 2);
            left[i][step][j][r] = dequantize<GROUPS>(words[j][r], step, s);
        }
    }
}

/* Issues the wgmma of a part, as one group. */
template <typename T, int N_TILES>
__device__ __forceinline__ void multiply_part(uint32_t panels, int part, const Left<T> &left,
                                              int (&acc)[T::M_TILES][N_TILES][4]) {
    constexpr int STEPS = 2 * T::PART_UNITS;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int step = part * STEPS + i; // of the stage: k32
        // 128 bytes of a row are four steps
        const uint32_t right = panels + step / 4 * T::PANEL + step % 4 * 32;
        for (int j = 0; j < T::M_TILES; j++) {
            wgmma(acc[j], left[i / 2][i % 2][j], wgmma_matrix(right));
        }
    }
    wgmma_commit();
}

/* ---- phase 4: write -------------------------------------------------------------------------- */

/* Starts to copy the scales of a tile: s_a of its tokens and s_channel of the warpgroup's channels.
 */
template <typename T, int TOKENS>
__device__ __forceinline__ void copy_scales(const GemmArgs &p, int m0, int tokens, int n0,
                                            float *s_a, float *s_channel) {
    const int i = threadIdx.x % WARPGROUP;
    if (i < TOKENS) copy_async_4(shared_address(s_a + i), p.s_a + m0 + i, i < tokens);
    if (i < T::CHANNELS_EACH) {
        copy_async_4(shared_address(s_channel + i), p.s_channel + n0 + i, n0 + i < p.N);
    }
}

/* Team 0 gets the sums of both teams, through shared memory. */
template <int N_TILES>
__device__ __forceinline__ void add_warpgroups(int (&acc)[1][N_TILES][4], int4 *sums, int team) {
    // team 1 leaves its sums, team 0 adds them to its own
    sums += threadIdx.x % WARPGROUP;
    named_barrier(3, 2 * WARPGROUP); // the sums of the tile before are read
    for (int j = 0; j < N_TILES && team == 1; j++) sums[j * WARPGROUP] = as_int4(acc[0][j]);
    named_barrier(3, 2 * WARPGROUP);
    if (team == 1) return;
    for (int j = 0; j < N_TILES; j++) add(acc[0][j], sums[j * WARPGROUP]);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Phases 2 to 4 of all tiles of a block, by one of the two warpgroups. scales [TOKENS +
 * CHANNELS_EACH] is the warpgroup's own. */
template <int CHANNELS, int TOKENS, bool GROUPS>
__device__ __forceinline__ void multiply_tiles(const GemmArgs &p, const Tiling &tiling,
                                               int tile_tokens, uint8_t *shared,
                                               Ring<HopperShape<CHANNELS, TOKENS, GROUPS>> &ring,
                                               float *scales, int warpgroup, int warp) {
    using T = HopperShape<CHANNELS, TOKENS, GROUPS>;
    const int lane = threadIdx.x % 32, team = T::TEAMS > 1 ? warpgroup : 0;
    const WarpChannels<T> at(warpgroup, warp);
    float *s_a = scales, *s_channel = scales + TOKENS;
    int i0 = 0; // the tile's first stage
    wait_for_previous_kernel();
    for (int t = blockIdx.x; t < tiling.tiles; t += gridDim.x, i0 += tiling.chunks) {
        // 1. Ask for the scales, once the ones of the tile before are read.
        const Tile tile = tile_number(t, tiling);
        const int m0 = tile.m * tile_tokens, tokens = min(tile_tokens, p.M - m0);
        named_barrier(1 + warpgroup, WARPGROUP);
        copy_scales<T, TOKENS>(p, m0, tokens, tile.n * CHANNELS + at.channel, s_a, s_channel);

        // 2. All stages, each in two parts. A part is dequantized while wgmma reads the other half
        // of `left`. Once the first part of a stage is issued, the stage before is read.
        int acc[T::M_TILES][TOKENS / 8][4] = {};
        Left<T> left[2];
        int used = -1; // slot of the stage before
        for (int i = i0 + team; i < i0 + tiling.chunks; i += T::TEAMS) {
            const int slot = i % T::STAGES;
            const uint32_t panels = shared_address(shared) + slot * T::STAGE;
            uint32_t s_group = 0;
            barrier_wait(&ring.full[slot], i / T::STAGES % 2);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                dequantize_part<T, GROUPS>(panels, part, at, s_group, left[part]);
                multiply_part<T>(panels, part, left[part], acc);
                wgmma_wait<1>(); // the part before is multiplied
                if (part == 0 && used >= 0 && lane == 0) barrier_arrive(&ring.empty[used]);
            }
            used = slot;
        }
        // 3. The last stage is read.
        wgmma_wait<0>();
        for (auto &tile : acc)
            for (auto &sums : tile)
                for (int &sum : sums)
                    asm volatile("" : "+r"(sum)); // no use of acc moves before the wait
        if (used >= 0 && lane == 0) barrier_arrive(&ring.empty[used]);
        copy_async_wait();

        // 4. Add up the teams, scale and write.
        if constexpr (T::TEAMS > 1) {
            add_warpgroups(acc, (int4 *)(shared + T::STAGES * T::STAGE), team);
            if (team == 1) continue;
        }
        named_barrier(1 + warpgroup, WARPGROUP); // the scales have arrived
        const int n = at.strip * STRIP + at.tile * 2, n0 = tile.n * CHANNELS + n;
        if (n0 >= p.N) continue;
        Scales<T::M_TILES> s;
        load_scales(p, s_channel + n - at.channel, s_a, m0, tokens, n0, s);
        write_tile<T::M_TILES, TOKENS / 8>(p, acc, s, s_a, m0, tokens, n0);
    }
}

/* A tile [CHANNELS][TOKENS] is one block's. tiling.chunks: stages of K. tile_tokens <= TOKENS: all
 * tiles are equally full. */
template <int CHANNELS, int TOKENS, bool GROUPS>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    gemm_w4a8_hopper_kernel(const __grid_constant__ GemmArgs p,
                            const __grid_constant__ Tiling tiling, int tile_tokens,
                            const __grid_constant__ TensorMaps maps) {
    if constexpr (HAVE_WGMMA) {
        using T = HopperShape<CHANNELS, TOKENS, GROUPS>;
        extern __shared__ __align__(1024) uint8_t shared[]; // [STAGES][STAGE], sums of a team
        __shared__ Ring<T> ring;
        __shared__ __align__(16) float scales[2][TOKENS + T::CHANNELS_EACH]; // [warpgroup]
        // __shfl_sync: so that the compiler knows that they are the same for a whole warp.
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
        const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
        // 1. the barriers of the ring
        if (threadIdx.x == 0) {
            for (int i = 0; i < T::STAGES; i++) {
                barrier_init(&ring.full[i], T::INPUTS);
                barrier_init(&ring.empty[i], 8 / T::TEAMS); // warps
            }
            asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
        }
        __syncthreads();
        launch_dependents();
        // 2. one warpgroup feeds, two multiply
        if (warpgroup == 2) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n"); // registers, for the others
            if (threadIdx.x % 32 > 0) return;
            const uint32_t to = shared_address(shared);
            if (warp == 0) feed<T, ACTIVATIONS>(tiling, tile_tokens, maps, to, ring);
            if (warp == 1) feed<T, WEIGHTS>(tiling, tile_tokens, maps, to, ring);
            if (warp == 2 && GROUPS) feed<T, GROUP_SCALES>(tiling, tile_tokens, maps, to, ring);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
            multiply_tiles<CHANNELS, TOKENS, GROUPS>(p, tiling, tile_tokens, shared, ring,
                                                     scales[warpgroup], warpgroup, warp);
        }
    }
}

/* ---- the choice of a kernel, and launches ---------------------------------------------------- */

/* A matrix [rows][bytes] for the TMA, to be copied in boxes. Beyond the matrix a box has zeros:
 * products with them vanish, and outputs from them are not written. */
static CUtensorMap tensor_map(const void *matrix, size_t rows, size_t bytes, Box box,
                              CUtensorMapSwizzle swizzle) {
    // 1. A function of the driver, which is not linked.
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
        void *f = NULL;
        cudaDriverEntryPointQueryResult found;
        cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                    cudaEnableDefault, &found),
                   "cuTensorMapEncodeTiled");
        return (PFN_cuTensorMapEncodeTiled_v12000)f;
    }();
    // 2. Elements are eight bytes, as a box may have at most 256 elements per row.
    const cuuint64_t size[2] = {bytes / 8, rows}, stride[1] = {bytes};
    const cuuint32_t copied[2] = {box.row_bytes / 8u, (cuuint32_t)box.rows}, step[2] = {1, 1};
    CUtensorMap map;
    CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 2, (void *)matrix, size, stride,
                             copied, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) die("cuTensorMapEncodeTiled: error %d", result);
    return map;
}

template <int CHANNELS, int TOKENS, bool GROUPS>
static void launch_shape(const GemmArgs &p, cudaStream_t stream) {
    using T = HopperShape<CHANNELS, TOKENS, GROUPS>;
    const Tiling tiling = make_tiling(p, CHANNELS, TOKENS, T::PANELS * GROUP);
    const int tokens = ceil_div(p.M, tiling.m); // the TMA is slow with rows that are not there
    // 1. the maps of the inputs
    const size_t strips = p.N / STRIP, K = p.K;
    const Box activations = {tokens, T::ACTIVATION_BOX.row_bytes, 0};
    const CUtensorMapSwizzle none = CU_TENSOR_MAP_SWIZZLE_NONE;
    TensorMaps maps = {};
    maps.of[ACTIVATIONS] = tensor_map(p.a, p.M, K, activations, CU_TENSOR_MAP_SWIZZLE_128B);
    maps.of[WEIGHTS] = tensor_map(p.w, strips, K * STRIP / 2, T::WEIGHT_BOX, none);
    if (GROUPS) {
        maps.of[GROUP_SCALES] =
            tensor_map(p.s_group, strips, K / GROUP * STRIP, T::SCALE_BOX, none);
    }
    // 2. as many tiles for each block
    const int blocks = ceil_div(tiling.tiles, ceil_div(tiling.tiles, multiprocessors()));
    constexpr auto kernel = gemm_w4a8_hopper_kernel<CHANNELS, TOKENS, GROUPS>;
    launch(kernel, {dim3(blocks), 3 * WARPGROUP, T::SHARED}, stream, p, tiling, tokens, maps);
}

template <int CHANNELS, int TOKENS>
static void launch_wgmma(const GemmArgs &p, cudaStream_t stream) {
    if (p.s_group) launch_shape<CHANNELS, TOKENS, true>(p, stream);
    else launch_shape<CHANNELS, TOKENS, false>(p, stream);
}

/* The kernels, in the order of GemmKernel, with costs per channel and per group. A round of tiles,
 * one on each multiprocessor, costs so many microseconds, and so many more per 1024 k: a fit to 10
 * shapes on an H100. Of equal tiles 128 x 64 reads least through the L2 cache, as a weight
 * is half a byte; 96 tokens are for shapes that leave a round of 128 half empty. */
static const struct HopperKernel {
    int channels, tokens;
    float round[2], round_per_1024[2];
    void (*launch)(const GemmArgs &, cudaStream_t);
} hopper_kernels[] = {
    {64, 64, {1.4f, 1.6f}, {0.98f, 1.20f}, launch_wgmma<64, 64>},
    {128, 64, {1.4f, 1.7f}, {1.65f, 2.19f}, launch_wgmma<128, 64>},
    {128, 96, {1.7f, 1.8f}, {2.01f, 2.51f}, launch_wgmma<128, 96>},
    {128, 128, {2.4f, 2.2f}, {2.49f, 2.77f}, launch_wgmma<128, 128>},
    {256, 96, {3.0f, 2.8f}, {3.42f, 4.38f}, launch_wgmma<256, 96>},
    {256, 128, {3.6f, 3.3f}, {4.65f, 5.19f}, launch_wgmma<256, 128>},
};

/* False where wgmma cannot run: unlike the rest of Hopper it is in no GPU that came later. */
static bool choose_hopper(const GpuLinear *l, int M, GemmKernel *kernel) {
    if (code_version() != 90) return false;
    const bool groups = l->s_group != NULL;
    float least = INFINITY;
    // the kernel of least cost: rounds of tiles, times the cost of a round
    for (const HopperKernel &k : hopper_kernels) {
        const int tiles = ceil_div(l->N, k.channels) * ceil_div(M, k.tokens);
        const int rounds = ceil_div(tiles, multiprocessors());
        const float cost = rounds * (k.round[groups] + k.round_per_1024[groups] * l->K / 1024);
        if (cost >= least) continue;
        least = cost;
        *kernel = (GemmKernel)(GEMM_HOPPER_64X64 + (&k - hopper_kernels));
    }
    return true;
}

/* False for kernels of section 2, and where these cannot run. */
static bool launch_hopper(GemmKernel kernel, const GemmArgs &p, cudaStream_t stream) {
    if (kernel < GEMM_HOPPER_64X64 || code_version() != 90) return false;
    hopper_kernels[kernel - GEMM_HOPPER_64X64].launch(p, stream);
    return true;
}
