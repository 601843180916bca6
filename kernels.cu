/* QQQ on the GPU.
 *
 *   1 W4A8 GEMM with mma.sync, per channel and per group, and the activation quantizer
 */
#include "qqq.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* ---- public declarations, to move into qqq.h's part for kernels.cu ------------------------- */

#ifdef __CUDACC__

/* A quantized linear on the GPU, y = x W^T; or several with the same input, rows one below the
 * other. The arrays are device memory, laid out for the kernel: see fragment_word(). */
typedef struct {
    int N, K;
    uint32_t *w;      // [N/32][K/64][2][32][4] 4-bit codes in the order of mma's fragments
    uint8_t *s_group; // [N/32][K/128][8][4], NULL per channel
    float *s_channel; // [N], per channel divided by 16
} GpuLinear;

/* Uploads n_parts quantized linears of one K and one group size, stacked: [q; k; v] become one
 * GEMM. N must be a multiple of 64, K of 64, with groups of 128. The parts may lie in a mapped file
 * at any alignment and are not needed afterwards. gpu_linear_free() releases the result. */
GpuLinear gpu_linear_create(const Linear *parts, int n_parts);
void gpu_linear_free(GpuLinear *l);

/* The inverse, into host memory: qweight [N][K/2], s_channel [N] and, unless NULL, s_group
 * [N][K/128], as the file had them. */
void gpu_linear_restore(const GpuLinear *l, uint8_t *qweight, float *s_channel, uint8_t *s_group);

/* Device memory in which blocks that share an output tile add up their sums; all zero between
 * calls. One per stream; cudaFree() releases it. */
int *gpu_gemm_workspace();

/* y [M][N] = (a [M][K] . w8 [N][K]) * s_a [M] * s_channel [N] for M >= 1. All pointers are device
 * memory; a and y are 16-byte aligned. `acc`, unless NULL, receives the integer sums [M][N]. Only
 * launches a kernel on `stream`: may be captured into a graph. */
void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y, int *acc,
                   int *workspace, cudaStream_t stream);

/* Set by tests and benchmarks: mma.sync at every M, also where the GPU has wgmma. */
extern bool gpu_gemm_portable;

/* quantize_row() for each row of x [M][K]: a [M][K], s_a [M]. K is a multiple of 8; x and a are
 * 16-byte aligned. */
void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream);

#endif

/* -------------------------------------------------------------------------------------------- */

static void cuda_check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) die("%s: %s", what, cudaGetErrorString(status));
}

/* ---- 1: W4A8 GEMM -------------------------------------------------------------------------- */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAVE_WGMMA = true;
#else
constexpr bool HAVE_WGMMA = false;
#endif

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int BAND = 8;
constexpr int STRIP = 32; // channels of a warp's tile: two m16 tiles of mma.m16n8k32
constexpr int UNIT = 64;  // k of the 32 x 64 weights that a warp loads at once, 32 bytes a lane

struct ChannelRow {
    int tile, half, row;
};

__host__ __device__ ChannelRow channel_row(int n) {
    int c = n % STRIP;
    int pair = c % 8 / 2;
    return {pair / 2, pair % 2, c / 8 * 2 + c % 2};
}

__host__ __device__ size_t fragment_word(int n, int k, int K) {
    ChannelRow r = channel_row(n);
    size_t unit = (size_t)(n / STRIP) * (K / UNIT) + k / UNIT;
    int lane = r.row * 4 + k % 16 / 4;
    int reg = r.half + k % 32 / 16 * 2;
    return ((unit * 2 + r.tile) * 32 + lane) * 4 + reg;
}

__host__ __device__ size_t fragment_scale(int n, int k, int K) {
    ChannelRow r = channel_row(n);
    size_t unit = (size_t)(n / STRIP) * (K / GROUP) + k / GROUP;
    return (unit * 8 + r.row) * 4 + r.tile * 2 + r.half;
}

__global__ void layout_weights_kernel(const uint16_t *qweight, const uint8_t *s_group, int N,
                                      int K, int first, uint32_t *w, uint8_t *scales) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * (K / 8)) return;
    int n = i / (K / 8);
    int j = i % (K / 8);
    int k = j / 8 * UNIT + j % 8 * 4;
    const uint16_t *row = qweight + (size_t)n * (K / 4);
    uint32_t word = 0;
    for (int half = 0; half < 2; half++) {
        uint32_t codes = row[(k + half * 32) / 4];
        for (int b = 0; b < 4; b++) word |= (codes >> 4 * b & 15) << (8 * b + 4 * half);
    }
    w[fragment_word(first + n, k, K)] = scales ? word : word ^ 0x88888888;
    if (scales && k % GROUP == 0) {
        scales[fragment_scale(first + n, k, K)] = s_group[(size_t)n * (K / GROUP) + k / GROUP];
    }
}

__global__ void restore_weights_kernel(const uint32_t *w, const uint8_t *scales, int N, int K,
                                       uint16_t *qweight, uint8_t *s_group) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * (K / 4)) return;
    int n = i / (K / 4);
    int k = i % (K / 4) * 4;
    uint32_t word = w[fragment_word(n, k, K)];
    if (!scales) word ^= 0x88888888;
    if (k % 64 >= 32) word >>= 4;
    uint32_t codes = 0;
    for (int b = 0; b < 4; b++) codes |= (word >> 8 * b & 15) << 4 * b;
    qweight[i] = codes;
    if (scales && k % GROUP == 0) {
        s_group[(size_t)n * (K / GROUP) + k / GROUP] = scales[fragment_scale(n, k, K)];
    }
}

__global__ void scale_kernel(float *x, int n, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factor;
}

struct GemmArgs {
    int M, N, K;
    const uint4 *w;
    const uint32_t *s_group;
    const float *s_channel;
    const int8_t *a;
    const float *s_a;
    half *y;
    int *acc;
    int *partial;
    int *arrived;
    int tiles_m, tiles_n, tiles;
    int units;
    int chunks;
    int split_tiles;
    int share, longer;
};

/* Where a block is in its list of work. */
struct Work {
    int tile, chunk, end;
    int m, n;
};

__device__ __forceinline__ void place_tile(Work &work, const GemmArgs &p) {
    work.m = 0;
    work.n = work.tile;
    if (p.tiles_m == 1) return;
    int band = work.tile / (BAND * p.tiles_n);
    int rows = min(BAND, p.tiles_m - band * BAND);
    int local = work.tile - band * BAND * p.tiles_n;
    work.m = band * BAND + local % rows;
    work.n = local / rows;
}

__device__ __forceinline__ int share_start(const GemmArgs &p, int block) {
    return block * p.share + min(block, p.longer);
}

__device__ __forceinline__ int share_owner(const GemmArgs &p, int chunk) {
    int in_longer = p.longer * (p.share + 1);
    return chunk < in_longer ? chunk / (p.share + 1) : p.longer + (chunk - in_longer) / p.share;
}

__device__ __forceinline__ Work first_work(const GemmArgs &p) {
    int start = share_start(p, blockIdx.x);
    int stop = share_start(p, blockIdx.x + 1);
    Work work = {p.split_tiles + (int)blockIdx.x, 0, p.chunks, 0, 0};
    if (start < stop) {
        work.tile = start / p.chunks;
        work.chunk = start - work.tile * p.chunks;
        work.end = min(p.chunks, stop - work.tile * p.chunks);
    }
    place_tile(work, p);
    return work;
}

__device__ __forceinline__ void next_work(Work &work, const GemmArgs &p) {
    if (++work.chunk < work.end) return;
    int stop = share_start(p, blockIdx.x + 1);
    work.chunk = 0;
    work.end = p.chunks;
    if (work.tile >= p.split_tiles) {
        work.tile += gridDim.x;
    } else if ((work.tile + 1) * p.chunks < stop) {
        work.tile++;
        work.end = min(p.chunks, stop - work.tile * p.chunks);
    } else {
        work.tile = p.split_tiles + blockIdx.x;
    }
    place_tile(work, p);
}

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

__device__ __forceinline__ void prefetch(const void *from, bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0;\n"
                 "@p prefetch.global.L2 [%0]; }\n" ::"l"(from),
                 "r"((int)valid));
}

__device__ __forceinline__ void copy_async_16(uint32_t to, const void *from, bool nonzero,
                                              bool valid) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0;\n"
                 "@p cp.async.cg.shared.global [%0], [%1], 16, %2; }\n" ::"r"(to), "l"(from),
                 "r"(nonzero ? 16 : 0), "r"((int)valid)
                 : "memory");
}

__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices(uint32_t (&b)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(address));
}

__device__ __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void wgmma(int (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#define C4(j) "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p; }\n"
                 : C4(0), C4(1), C4(2), C4(3), C4(4), C4(5), C4(6), C4(7), C4(8), C4(9), C4(10),
                   C4(11), C4(12), C4(13), C4(14), C4(15)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#undef C4
}

/* Four int8 weights of register `reg` for k-step `step` (0 or 1). */
template <bool GROUPS>
__device__ __forceinline__ uint32_t dequantize(uint32_t word, int step, uint32_t scale,
                                               uint32_t offset) {
    if (!GROUPS) return (step ? word : word << 4) & 0xf0f0f0f0;
    uint32_t u = (step ? word >> 4 : word) & 0x0f0f0f0f;
    return (u * scale + offset) ^ 0x80808080;
}

template <int N_TILES>
__device__ __forceinline__ void multiply(int (&acc)[2][N_TILES][4], const uint32_t (&a)[2][4],
                                         uint32_t from) {
    constexpr int PAIR = N_TILES == 1 ? 1 : 2;
#pragma unroll
    for (int j = 0; j < N_TILES; j += PAIR) {
        uint32_t b[2 * PAIR];
        load_matrices(b, from + j * 1024);
#pragma unroll
        for (int t = 0; t < PAIR; t++) {
            mma(acc[0][j + t], a[0], b[2 * t], b[2 * t + 1]);
            mma(acc[1][j + t], a[1], b[2 * t], b[2 * t + 1]);
        }
    }
}

/* Waits for the warps of one team. */
template <int TEAM_WARPS> __device__ __forceinline__ void team_barrier(int team) {
    if (TEAM_WARPS == 1) {
        __syncwarp();
    } else if (TEAM_WARPS == WARPS) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;\n" ::"r"(team + 1), "n"(TEAM_WARPS * 32) : "memory");
    }
}

__device__ __forceinline__ void add4(int (&c)[4], int4 x) {
    c[0] += x.x;
    c[1] += x.y;
    c[2] += x.z;
    c[3] += x.w;
}

template <int TOKENS, int TEAMS, int DEPTH> struct Shape {
    static constexpr int TEAM_WARPS = WARPS / TEAMS;
    static constexpr int CHANNELS = TEAM_WARPS * STRIP;
    static constexpr int CHUNK = TEAMS * DEPTH; // units
    static constexpr int TEAM_STAGE = TOKENS * DEPTH * UNIT; // bytes of activations
    static constexpr int SUMS = (WARPS - TEAM_WARPS) * 32 * TOKENS; // int32
    static constexpr int TILE = CHANNELS * TOKENS;
};

template <int TOKENS, int TEAMS, int DEPTH, bool GROUPS, bool HOPPER>
__global__ void __launch_bounds__(THREADS, TOKENS <= 8 ? 3 : TOKENS <= 32 ? 2 : 1)
    gemm_w4a8_kernel(const __grid_constant__ GemmArgs p) {
    using S = Shape<TOKENS, TEAMS, DEPTH>;
    constexpr bool WGMMA = HOPPER && HAVE_WGMMA;
    constexpr int STAGES = HOPPER ? 3 : 2;
    constexpr int N_TILES = TOKENS / 8;
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ bool last;

    const int lane = threadIdx.x % 32;
    const int team = threadIdx.x / 32 / S::TEAM_WARPS;
    const int warp = threadIdx.x / 32 % S::TEAM_WARPS;
    const uint32_t stage0 =
        (uint32_t)__cvta_generic_to_shared(smem) + team * STAGES * S::TEAM_STAGE;

    uint4 w[DEPTH][2] = {};
    uint32_t sg[DEPTH / 2] = {};
    const uint4 *from_w = p.w;
    const uint32_t *from_sg = p.s_group;
    int valid = 0;
    auto aim = [&](const Work &work) {
        int strip = work.n * S::TEAM_WARPS + warp;
        int unit = work.chunk * S::CHUNK + team * 2;
        from_w = p.w + ((size_t)strip * p.units + unit) * 64 + lane;
        if (GROUPS) {
            from_sg = p.s_group + ((size_t)strip * (p.units / 2) + unit / 2) * 8 + lane / 4;
        }
        valid = work.tile < p.tiles && strip < p.N / STRIP ? p.units - unit : 0;
    };
    auto load_weights = [&](int u) {
        const int unit = u / 2 * TEAMS * 2 + u % 2;
        load_16(w[u][0], from_w + unit * 64, unit < valid);
        load_16(w[u][1], from_w + unit * 64 + 32, unit < valid);
        if (GROUPS && u % 2 == 1) load_4(sg[u / 2], from_sg + u / 2 * TEAMS * 8, unit < valid);
        if (TOKENS == 128) {
            prefetch(from_w + (S::CHUNK + unit) * 64 + lane, S::CHUNK + unit < valid);
        }
    };
    auto load_activations = [&](const Work &work, uint32_t stage, int part) {
        constexpr int PIECES = DEPTH * UNIT / 16;
        constexpr int ROWS = S::TEAM_WARPS * 32 / PIECES;
        int thread = threadIdx.x % (S::TEAM_WARPS * 32);
        int column = thread % PIECES;
        int k = (work.chunk * S::CHUNK + (column / 8 * TEAMS + team) * 2) * UNIT + column % 8 * 16;
        int rows = work.tile < p.tiles ? min((part + 1) * TOKENS / 2, p.M - work.m * TOKENS) : 0;
        int row = part * TOKENS / 2 + thread / PIECES;
        const int8_t *from = p.a + (size_t)(work.m * TOKENS + row) * p.K + k;
#pragma unroll(TOKENS <= 32 ? 1 : 8)
        for (int i = 0; i < (TOKENS / 2 + ROWS - 1) / ROWS; i++) {
            uint32_t to = (column / 8 * TOKENS + row) * 128 + (column % 8 ^ row % 8) * 16;
            copy_async_16(stage + to, from, k < p.K, row < rows);
            row += ROWS;
            from += ROWS * p.K;
        }
    };

    Work next = first_work(p);
    aim(next);
#pragma unroll
    for (int u = 0; u < DEPTH; u++) load_weights(u);
    launch_dependents();
    wait_for_previous_kernel();
    load_activations(next, stage0, 0);
    load_activations(next, stage0, 1);

    uint32_t stage = stage0;
    const uint32_t b_row = lane / 16 * 1024 + lane % 8 * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
    while (next.tile < p.tiles) {
        Work now = next;
        int acc[2][N_TILES][4] = {};
        uint32_t a[2][2][4];
        for (int chunk = now.chunk; chunk < now.end; chunk++) {
            next_work(next, p);
            aim(next);
            copy_async_wait();
            if (WGMMA) asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
            team_barrier<S::TEAM_WARPS>(team);
            const uint32_t current = stage;
            stage += S::TEAM_STAGE;
            if (stage == stage0 + STAGES * S::TEAM_STAGE) stage = stage0;

#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                if (!WGMMA && u < 2) load_activations(next, stage, u);
                const uint32_t scales = sg[u / 2];
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    const int buffer = WGMMA ? step : 0;
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t words[4] = {w[u][i].x, w[u][i].y, w[u][i].z, w[u][i].w};
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            uint32_t s = __byte_perm(scales, 0, 0x4440 + 2 * i + r % 2);
                            a[buffer][i][r] = dequantize<GROUPS>(words[r], step, s,
                                                                 0x80808080 - s * 0x08080808);
                            asm volatile("" : "+r"(a[buffer][i][r]));
                        }
                    }
                    if (step == 1) load_weights(u);
                    const uint32_t from = current + u / 2 * TOKENS * 128;
                    const int column = (u % 2 * 2 + step) * 32;
                    if constexpr (WGMMA) {
                        uint64_t b = (uint64_t)1 << 62 | (uint64_t)64 << 32 | (uint64_t)1 << 16 |
                                     (from + column) >> 4;
                        wgmma_fence();
                        wgmma(acc[0], a[buffer][0], b);
                        wgmma(acc[1], a[buffer][1], b);
                        wgmma_commit();
                        if (step == 0 && u < 2) load_activations(next, stage, u);
                        wgmma_wait<1>();
                    } else {
                        multiply<N_TILES>(acc, a[buffer], from + (b_row ^ column));
                    }
                }
            }
        }
        if constexpr (WGMMA) wgmma_wait<0>();

        if (TEAMS > 1) {
            int4 *sums = (int4 *)(smem + TEAMS * STAGES * S::TEAM_STAGE) + threadIdx.x;
            constexpr int STRIDE = S::TEAM_WARPS * 32;
            sums -= STRIDE;
            if (team > 0) {
#pragma unroll
                for (int i = 0; i < 2 * N_TILES; i++) {
                    const int *c = acc[i % 2][i / 2];
                    sums[i * (TEAMS - 1) * STRIDE] = make_int4(c[0], c[1], c[2], c[3]);
                }
            }
            __syncthreads();
            if (team == 0) {
                for (int t = 1; t < TEAMS; t++) {
#pragma unroll
                    for (int i = 0; i < 2 * N_TILES; i++) {
                        add4(acc[i % 2][i / 2], sums[(i * (TEAMS - 1) + t) * STRIDE]);
                    }
                }
            }
        }
        int done = now.end - now.chunk;
        if (done < p.chunks) {
            auto slot = [&](int block, bool starts_tile) {
                return (int4 *)p.partial + (size_t)(2 * block + starts_tile) * S::TILE / 4 +
                       threadIdx.x;
            };
            constexpr int STRIDE = S::TEAM_WARPS * 32;
            if (team == 0) {
                int4 *to = slot(blockIdx.x, now.chunk == 0);
#pragma unroll
                for (int i = 0; i < 2 * N_TILES; i++) {
                    const int *c = acc[i % 2][i / 2];
                    __stcg(to + i * STRIDE, make_int4(c[0], c[1], c[2], c[3]));
                }
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                last = atomicAdd(p.arrived + now.tile, done) + done == p.chunks;
                if (last) p.arrived[now.tile] = 0;
                __threadfence();
            }
            __syncthreads();
            if (!last) continue;
            if (team == 0) {
                int first = share_owner(p, now.tile * p.chunks);
                int final = share_owner(p, (now.tile + 1) * p.chunks - 1);
                for (int block = first; block <= final; block++) {
                    if (block == (int)blockIdx.x) continue;
                    const int4 *from = slot(block, block == first);
#pragma unroll
                    for (int i = 0; i < 2 * N_TILES; i++) {
                        add4(acc[i % 2][i / 2], __ldcg(from + i * STRIDE));
                    }
                }
            }
        }
        place_tile(now, p);
        int n0 = (now.n * S::TEAM_WARPS + warp) * STRIP;
        if (team > 0 || n0 >= p.N) continue;
        float s_n[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s_n[i] = p.s_channel[n0 + lane / 8 * 8 + 2 * i + lane / 4 % 2];
        }
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
            int token = now.m * TOKENS + j * 8;
            int t0 = token + lane % 4 * 2;
            float s_a0 = t0 < p.M ? p.s_a[t0] : 0;
            float s_a1 = t0 + 1 < p.M ? p.s_a[t0 + 1] : 0;
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int *c = acc[i / 2][j] + i % 2 * 2;
                half2 pair = __floats2half2_rn(((float)c[0] * s_a0) * s_n[i],
                                               ((float)c[1] * s_a1) * s_n[i]);
                v[i] = transpose_8x8(*(uint32_t *)&pair);
            }
            token += lane / 4;
            if (token < p.M) {
                *(uint4 *)(p.y + (size_t)token * p.N + n0 + lane % 4 * 8) =
                    make_uint4(v[0], v[1], v[2], v[3]);
            }
            if (p.acc) {
                int *out = p.acc + (size_t)t0 * p.N + n0 + lane / 8 * 8 + lane / 4 % 2;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int value = acc[i / 4][j][i % 4];
                    if (t0 + i % 2 < p.M) out[i % 2 * p.N + i / 2 * 2] = GROUPS ? value : value / 16;
                }
            }
        }
    }
}

static int multiprocessors() {
    static int count = 0;
    if (!count) {
        int device;
        cuda_check(cudaGetDevice(&device), "cudaGetDevice");
        cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                   "cudaDeviceGetAttribute");
    }
    return count;
}

constexpr int TILE_MAX = 256 * 128; // outputs of the largest tile

int *gpu_gemm_workspace() {
    int *workspace;
    size_t bytes = (size_t)2 * multiprocessors() * (TILE_MAX + 2) * sizeof(int);
    cuda_check(cudaMalloc(&workspace, bytes), "GEMM workspace");
    cuda_check(cudaMemset(workspace, 0, bytes), "GEMM workspace");
    return workspace;
}

template <typename... Parameters, typename... Arguments>
static void launch_overlapped(void (*kernel)(Parameters...), int grid, int shared,
                              cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    cuda_check(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

/* resident > 0: whole tiles only, at most `resident` blocks. resident < 0: stream-K over -resident
 * blocks. */
template <int TOKENS, int TEAMS, int DEPTH, bool GROUPS, bool WGMMA>
static void launch_gemm(GemmArgs p, int resident, cudaStream_t stream) {
    using S = Shape<TOKENS, TEAMS, DEPTH>;
    auto kernel = gemm_w4a8_kernel<TOKENS, TEAMS, DEPTH, GROUPS, WGMMA>;
    const int shared = TEAMS * (WGMMA ? 3 : 2) * S::TEAM_STAGE + S::SUMS * 4;
    static bool ready = false;
    if (!ready) {
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared),
                   "cudaFuncSetAttribute");
        ready = true;
    }
    p.tiles_m = (p.M + TOKENS - 1) / TOKENS;
    p.tiles_n = (p.N + S::CHANNELS - 1) / S::CHANNELS;
    p.chunks = (p.K / UNIT + S::CHUNK - 1) / S::CHUNK;
    p.tiles = p.tiles_m * p.tiles_n;
    p.units = p.K / UNIT;
    int tiles = p.tiles;
    int grid;
    if (resident > 0) {
        int each = (tiles + resident - 1) / resident;
        grid = (tiles + each - 1) / each;
        p.split_tiles = 0;
    } else {
        grid = -resident;
        int rest = tiles % grid;
        p.split_tiles = rest * 10 >= grid * 9 ? 0
                        : rest * 2 >= grid || tiles < grid || rest == 0 ? rest : rest + grid;
        if (grid > tiles * p.chunks) grid = tiles * p.chunks;
    }
    p.share = p.split_tiles * p.chunks / grid;
    p.longer = p.split_tiles * p.chunks % grid;
    launch_overlapped(kernel, grid, shared, stream, p);
}

bool gpu_gemm_portable = false;

template <bool GROUPS> static void choose_gemm(const GemmArgs &p, cudaStream_t stream) {
    int sms = multiprocessors();
    int tiles_64 = (p.N + 63) / 64 * ((p.M + 63) / 64);
    int chunks_128 = (p.N + 255) / 256 * ((p.M + 127) / 128) * ((p.K + 255) / 256);
    if (p.M <= 8) {
        launch_gemm<8, 8, 4, GROUPS, false>(p, 2 * sms, stream);
    } else if (p.M <= 16) {
        launch_gemm<16, 8, 4, GROUPS, false>(p, 2 * sms, stream);
    } else if (p.M <= 32) {
        launch_gemm<32, 2, 4, GROUPS, false>(p, -2 * sms, stream);
    } else if (p.M <= 64 || chunks_128 < 7 * sms) {
        if (tiles_64 <= sms) {
            launch_gemm<64, 4, 4, GROUPS, false>(p, -sms, stream);
        } else {
            launch_gemm<64, 2, 4, GROUPS, false>(p, -sms, stream);
        }
    } else if (gpu_gemm_portable) {
        launch_gemm<128, 1, 4, GROUPS, false>(p, -sms, stream);
    } else {
        launch_gemm<128, 1, 4, GROUPS, true>(p, -sms, stream);
    }
}

void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y, int *acc,
                   int *workspace, cudaStream_t stream) {
    GemmArgs p = {};
    p.M = M;
    p.N = l->N;
    p.K = l->K;
    p.w = (const uint4 *)l->w;
    p.s_group = (const uint32_t *)l->s_group;
    p.s_channel = l->s_channel;
    p.a = a;
    p.s_a = s_a;
    p.y = y;
    p.acc = acc;
    p.partial = workspace;
    p.arrived = workspace + (size_t)2 * multiprocessors() * TILE_MAX;
    if (l->s_group) {
        choose_gemm<true>(p, stream);
    } else {
        choose_gemm<false>(p, stream);
    }
}

static void *device_alloc(size_t bytes) {
    void *p;
    cuda_check(cudaMalloc(&p, bytes), "GPU memory");
    return p;
}

GpuLinear gpu_linear_create(const Linear *parts, int n_parts) {
    GpuLinear l = {};
    l.K = parts[0].K;
    bool groups = parts[0].s_group;
    size_t largest = 0;
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].K != l.K || (parts[i].s_group != NULL) != groups) {
            die("linears of different K or group size cannot be stacked");
        }
        l.N += parts[i].N;
        if (parts[i].N % 64) die("N = %d is no multiple of 64", parts[i].N);
        if ((size_t)parts[i].N > largest) largest = parts[i].N;
    }
    if (l.K % (groups ? GROUP : UNIT)) die("K = %d is no multiple of %d", l.K, groups ? GROUP : UNIT);
    l.w = (uint32_t *)device_alloc((size_t)l.N * l.K / 2);
    l.s_channel = (float *)device_alloc(l.N * sizeof(float));
    if (groups) l.s_group = (uint8_t *)device_alloc((size_t)l.N * (l.K / GROUP));

    uint16_t *qweight = (uint16_t *)device_alloc(largest * l.K / 2);
    uint8_t *s_group = groups ? (uint8_t *)device_alloc(largest * (l.K / GROUP)) : NULL;
    int first = 0;
    for (int i = 0; i < n_parts; i++) {
        int N = parts[i].N;
        cuda_check(cudaMemcpy(qweight, parts[i].qweight, (size_t)N * l.K / 2,
                              cudaMemcpyHostToDevice), "upload of qweight");
        if (groups) {
            cuda_check(cudaMemcpy(s_group, parts[i].s_group, (size_t)N * (l.K / GROUP),
                                  cudaMemcpyHostToDevice), "upload of s_group");
        }
        cuda_check(cudaMemcpy(l.s_channel + first, parts[i].s_channel, N * sizeof(float),
                              cudaMemcpyHostToDevice), "upload of s_channel");
        size_t words = (size_t)N * (l.K / 8);
        layout_weights_kernel<<<(words + 255) / 256, 256>>>(qweight, s_group, N, l.K, first, l.w,
                                                            l.s_group);
        cuda_check(cudaGetLastError(), "layout_weights");
        first += N;
    }
    if (!groups) {
        scale_kernel<<<(l.N + 255) / 256, 256>>>(l.s_channel, l.N, 1.0f / 16);
        cuda_check(cudaGetLastError(), "scale");
    }
    cuda_check(cudaDeviceSynchronize(), "layout_weights");
    cuda_check(cudaFree(qweight), "cudaFree");
    cuda_check(cudaFree(s_group), "cudaFree");
    return l;
}

void gpu_linear_free(GpuLinear *l) {
    cuda_check(cudaFree(l->w), "cudaFree");
    cuda_check(cudaFree(l->s_group), "cudaFree");
    cuda_check(cudaFree(l->s_channel), "cudaFree");
    *l = {};
}

void gpu_linear_restore(const GpuLinear *l, uint8_t *qweight, float *s_channel, uint8_t *s_group) {
    size_t bytes = (size_t)l->N * l->K / 2;
    size_t groups = l->s_group ? (size_t)l->N * (l->K / GROUP) : 0;
    uint16_t *q = (uint16_t *)device_alloc(bytes);
    uint8_t *s = groups ? (uint8_t *)device_alloc(groups) : NULL;
    restore_weights_kernel<<<(bytes / 2 + 255) / 256, 256>>>(l->w, l->s_group, l->N, l->K, q, s);
    cuda_check(cudaGetLastError(), "restore_weights");
    cuda_check(cudaMemcpy(qweight, q, bytes, cudaMemcpyDeviceToHost), "download of qweight");
    cuda_check(cudaMemcpy(s_channel, l->s_channel, l->N * sizeof(float), cudaMemcpyDeviceToHost),
               "download of s_channel");
    if (groups) {
        cuda_check(cudaMemcpy(s_group, s, groups, cudaMemcpyDeviceToHost), "download of s_group");
    } else {
        for (int n = 0; n < l->N; n++) s_channel[n] *= 16;
    }
    cuda_check(cudaFree(q), "cudaFree");
    cuda_check(cudaFree(s), "cudaFree");
}

/* One block per row. */
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(const half *x, int K, int8_t *a, float *s_a) {
    __shared__ uint32_t maxima[WARPS];
    launch_dependents();
    wait_for_previous_kernel();
    const uint4 *row = (const uint4 *)(x + (size_t)blockIdx.x * K);
    // Without its sign bit a half orders as an integer; NaN and infinity are above all others.
    uint32_t max2 = 0;
    for (int i = threadIdx.x; i < K / 8; i += THREADS) {
        uint4 v = row[i];
        max2 = __vmaxu2(max2, __vmaxu2(__vmaxu2(v.x & 0x7fff7fff, v.y & 0x7fff7fff),
                                       __vmaxu2(v.z & 0x7fff7fff, v.w & 0x7fff7fff)));
    }
    uint32_t max = max2 >> 16 > (max2 & 0xffff) ? max2 >> 16 : max2 & 0xffff;
    for (int i = 16; i > 0; i /= 2) {
        uint32_t other = __shfl_xor_sync(~0u, max, i);
        max = other > max ? other : max;
    }
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = max;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) max = maxima[i] > max ? maxima[i] : max;
    float scale = __fdiv_rn(__half2float(__ushort_as_half(max)), 127.0f);
    if (max >= 0x7c00) scale = __int_as_float(0x7fc00000);
    if (threadIdx.x == 0) s_a[blockIdx.x] = scale;

    for (int i = threadIdx.x; i < K / 8; i += THREADS) {
        uint4 v = row[i];
        const half2 pairs[4] = {*(half2 *)&v.x, *(half2 *)&v.y, *(half2 *)&v.z, *(half2 *)&v.w};
        uint32_t out[2] = {};
        for (int j = 0; j < 8; j++) {
            float f = j % 2 ? __high2float(pairs[j / 2]) : __low2float(pairs[j / 2]);
            int q = 0;
            if (scale > 0) q = (int)fminf(fmaxf(rintf(__fdiv_rn(f, scale)), -128.0f), 127.0f);
            out[j / 4] |= (uint32_t)(q & 0xff) << (j % 4 * 8);
        }
        *(uint2 *)(a + (size_t)blockIdx.x * K + i * 8) = make_uint2(out[0], out[1]);
    }
}

void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream) {
    launch_overlapped(quantize_kernel, M, 0, stream, x, K, a, s_a);
}
