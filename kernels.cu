/* QQQ on the GPU. Each kernel has a plain-C twin in qqq.c.
 *
 *   1 W4A8 GEMM with mma.sync (and wgmma), per channel and per group, and the activation quantizer
 */
#include "qqq.h"

static void cuda_check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) die("%s: %s", what, cudaGetErrorString(status));
}

static void *device_alloc(size_t bytes) {
    void *p;
    cuda_check(cudaMalloc(&p, bytes), "GPU memory");
    return p;
}

/* An attribute of the GPU in use, which is taken to stay the same. */
static int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

static int multiprocessors() {
    static const int count = device_attribute(cudaDevAttrMultiProcessorCount);
    return count;
}

static int compute_capability() { // 8 Ampere, 9 Hopper
    static const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
    return major;
}

/* ================================================================================================
 * 1. W4A8 GEMM
 *
 *     y[m][n] = (sum_k a[m][k] * w8[n][k]) * s_a[m] * s_channel[n]        the sum in int32, exact
 *     w8 = q (per channel) or q * s_group (per group of 128)              q: 4 bits
 *
 * QQQ, arXiv 2406.09904, section 3.3. With few tokens the time is that of reading the weights once,
 * with many it is that of the tensor cores; one kernel serves both. It computes y^T = w8 a^T: the
 * *weights* are the left operand of the tensor cores' instruction mma.m16n8k32, whose right side is
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
 *       a chunk for one team of warps (TEAMS = 1: all 8):     a unit, one load of one warp:
 *
 *                 unit 0   unit 1   unit 2   unit 3                    64 k
 *                +--------+--------+--------+--------+            +------------+
 *         warp 0 |        |        |        |        |            | m16 tile 0 |  16 channels
 *                +--------+--------+--------+--------+  strip of  +------------+
 *         warp 1 |        |        |        |        |  32        | m16 tile 1 |  16 channels
 *                +--------+--------+--------+--------+  channels  +------------+
 *           ...  |        |        |        |        |            16 bytes a lane and m16 tile
 *
 * A weight is read by one warp, once, from global memory straight into that warp's registers, four
 * units ahead of its use. It never sees shared memory: nobody would share it. The activations,
 * which all warps of a team read, go through shared memory, one chunk ahead. When tokens are few,
 * the warps do better side by side along K than along N: the 8 warps then form TEAMS teams that
 * take turns at pairs of units, each with its own pipeline, and add their sums at the end.
 *
 * The idea of laying weights out in the order of the fragments, and much else, is Marlin's (arXiv
 * 2408.11743); stream-K is arXiv 2301.03598; the integer dequantization is LiquidGEMM's (arXiv
 * 2509.01229).
 * ============================================================================================== */

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int STRIP = 32; // channels of a warp: two m16 tiles
constexpr int UNIT = 64;  // k of one load: two k32 steps
constexpr int DEPTH = 4;  // units that a warp has in flight, and in a chunk
constexpr int BAND = 8;   // tiles of tokens that are worked on together

/* ---- the layout of the weights -------------------------------------------------------------- */

/* Where channel n stands in its strip: which m16 tile, which half of it, which row of the half.
 *
 * Any order is right, as long as the output is written in the same. In this one the four 8x8
 * matrices that a warp holds for 8 tokens (two m16 tiles of two halves), transposed, put into one
 * lane 8 *consecutive* channels of a token, 16 bytes of y (see write_tile()):
 *
 *     channel in the strip:  0 1  2 3  4 5  6 7 | 8 9 ...    of lanes with lane % 4 = 0 | 1 ...
 *     tile, half:            0,0  0,1  1,0  1,1 | 0,0 ...
 *     row:                   0 1  0 1  0 1  0 1 | 2 3 ... */
struct ChannelPlace {
    int tile, half, row;
};

__device__ static ChannelPlace channel_place(int n) {
    int c = n % STRIP;
    return {c % 8 / 4, c % 4 / 2, c / 8 * 2 + c % 2};
}

/* The 32-bit word that holds channel n's codes for k .. k+3 (in the low nibbles of its bytes) and
 * k+32 .. k+35 (in the high ones); k % 64 < 32, k % 4 = 0.
 *
 * mma.m16n8k32 wants of its left operand, in lane l, four registers of four int8:
 *
 *                  k 0..15      k 16..31
 *     rows 0..7   register 0   register 2     each: row l / 4, k = l % 4 * 4 .. + 3
 *     rows 8..15  register 1   register 3
 *
 * A unit is two such steps; word r is register r of both. So a lane's 16 bytes are its left operand
 * for 16 channels and 64 k, and a warp reads 512 bytes in a row. */
__device__ static size_t fragment_word(int n, int k, int K) {
    ChannelPlace c = channel_place(n);
    size_t unit = (size_t)(n / STRIP) * (K / UNIT) + k / UNIT;
    int lane = c.row * 4 + k % 16 / 4;
    int word = k % 32 / 16 * 2 + c.half;
    return ((unit * 2 + c.tile) * 32 + lane) * 4 + word;
}

/* The byte that holds the scale of channel n and k's group: a lane's four, for the rows lane / 4 of
 * both halves of both m16 tiles, are one 32-bit word. */
__device__ static size_t fragment_scale(int n, int k, int K) {
    ChannelPlace c = channel_place(n);
    size_t group = (size_t)(n / STRIP) * (K / GROUP) + k / GROUP;
    return (group * 8 + c.row) * 4 + c.tile * 2 + c.half;
}

/* Per channel the codes are stored as two's complement, q = u ^ 8: in the high nibble of a byte
 * that is 16 q without further ado. With groups they stay u = q + 8. */
constexpr uint32_t TWOS_COMPLEMENT = 0x88888888;

/* qweight [N][K/2] as in the file becomes rows first .. first + N - 1 of w. One thread a word. */
__global__ void layout_weights_kernel(const uint16_t *qweight, const uint8_t *s_group, int N, int K,
                                      int first, uint32_t *w, uint8_t *scales) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * (K / 8)) return;
    int n = i / (K / 8);
    int word_of_row = i % (K / 8);
    int k = word_of_row / 8 * UNIT + word_of_row % 8 * 4;
    uint32_t word = 0;
    for (int high = 0; high < 2; high++) {
        uint32_t codes = qweight[(size_t)n * (K / 4) + (k + high * 32) / 4];
        for (int b = 0; b < 4; b++) word |= (codes >> 4 * b & 15) << (8 * b + 4 * high);
    }
    w[fragment_word(first + n, k, K)] = scales ? word : word ^ TWOS_COMPLEMENT;
    if (scales && k % GROUP == 0) {
        scales[fragment_scale(first + n, k, K)] = s_group[(size_t)n * (K / GROUP) + k / GROUP];
    }
}

/* The inverse. One thread for four columns. */
__global__ void restore_weights_kernel(const uint32_t *w, const uint8_t *scales, int N, int K,
                                       uint16_t *qweight, uint8_t *s_group) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * (K / 4)) return;
    int n = i / (K / 4);
    int k = i % (K / 4) * 4;
    uint32_t word = w[fragment_word(n, k, K)];
    if (!scales) word ^= TWOS_COMPLEMENT;
    if (k % UNIT >= 32) word >>= 4;
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

GpuLinear gpu_linear_create(const Linear *parts, int n_parts) {
    GpuLinear l = {};
    l.K = parts[0].K;
    bool groups = parts[0].s_group != NULL;
    int multiple = groups ? GROUP : UNIT;
    if (l.K % multiple) die("a linear with K = %d: it must be a multiple of %d", l.K, multiple);
    size_t largest = 0;
    for (int i = 0; i < n_parts; i++) {
        const Linear *part = &parts[i];
        if (part->N % 64) die("a linear with N = %d: it must be a multiple of 64", part->N);
        if (part->K != l.K || (part->s_group != NULL) != groups) {
            die("linears of different K or kinds of scales cannot be stacked");
        }
        l.N += part->N;
        if ((size_t)part->N > largest) largest = part->N;
    }
    l.w = (uint32_t *)device_alloc((size_t)l.N * l.K / 2);
    l.s_channel = (float *)device_alloc(l.N * sizeof(float));
    if (groups) l.s_group = (uint8_t *)device_alloc((size_t)l.N * (l.K / GROUP));

    uint16_t *qweight = (uint16_t *)device_alloc(largest * l.K / 2); // one part as in the file
    uint8_t *s_group = groups ? (uint8_t *)device_alloc(largest * (l.K / GROUP)) : NULL;
    int first = 0;
    for (int i = 0; i < n_parts; i++) {
        size_t N = parts[i].N;
        cuda_check(cudaMemcpy(qweight, parts[i].qweight, N * l.K / 2, cudaMemcpyHostToDevice),
                   "upload of qweight");
        cuda_check(cudaMemcpy(l.s_channel + first, parts[i].s_channel, N * sizeof(float),
                              cudaMemcpyHostToDevice),
                   "upload of s_channel");
        if (groups) {
            cuda_check(
                cudaMemcpy(s_group, parts[i].s_group, N * (l.K / GROUP), cudaMemcpyHostToDevice),
                "upload of s_group");
        }
        size_t words = N * (l.K / 8);
        layout_weights_kernel<<<(words + 255) / 256, 256>>>(qweight, s_group, N, l.K, first, l.w,
                                                            l.s_group);
        cuda_check(cudaGetLastError(), "layout_weights_kernel");
        first += N;
    }
    if (!groups) { // the kernel's sums are of 16 q; a power of two divides out exactly
        scale_kernel<<<(l.N + 255) / 256, 256>>>(l.s_channel, l.N, 1.0f / 16);
        cuda_check(cudaGetLastError(), "scale_kernel");
    }
    cuda_check(cudaDeviceSynchronize(), "layout of weights");
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
    cuda_check(cudaGetLastError(), "restore_weights_kernel");
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

/* ---- instructions that C++ has no name for --------------------------------------------------- */

/* The kernel that follows on the stream may start, as soon as all blocks of this one have said so
 * and there is room; it then waits below. So its launch, and its first reads, cost nothing. */
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

/* Reads 16 bytes that are needed once: they need not stay in the L1 cache. If not `valid`, `to`
 * stays as it is; a predicate, unlike a branch, leaves the compiler one straight run of code. */
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
 * 8i .. 8i+7 hold the addresses of matrix i's rows; lane l gets of each row l / 4, bytes l % 4 * 4
 * to + 3. */
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

/* c [16][8] += a [16][32] . b [8][32] over a warp. Lane l holds of c: c[0], c[1] in row l / 4,
 * columns l % 4 * 2 and + 1; c[2], c[3] eight rows below. */
__device__ __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* An 8x8 matrix of 16-bit numbers, two a lane, becomes its transpose. */
__device__ __forceinline__ uint32_t transpose_8x8(half2 x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(*(uint32_t *)&x));
    return y;
}

/* ---- Hopper's own: wgmma, only in code for sm_90a ---------------------------------------------
 *
 * mma.sync reaches 65% of what Hopper's tensor cores can do. wgmma reaches the rest: four warps
 * issue it together, it runs in the background and reads its right operand from shared memory by
 * itself. Its left operand may be registers, and their layout is, warp for warp, that of mma.sync;
 * so is that of its sums. So the same kernel, with the inner product exchanged, does. */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAVE_WGMMA = true;
#else
constexpr bool HAVE_WGMMA = false;
#endif

/* Registers that other instructions wrote may be read by the wgmma that follow. */
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

/* What was issued since the last commit becomes a group. */
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/* Until at most PENDING groups still run. */
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

/* What this thread wrote to shared memory can be seen by wgmma, after the next barrier. */
__device__ __forceinline__ void wgmma_fence_shared() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/* Rows of 128 bytes in shared memory, 8 of them (1024 bytes) a block, swizzled as
 * activation_place() does it: the descriptor of such a matrix. */
__device__ __forceinline__ uint64_t wgmma_matrix(uint32_t address) {
    const uint64_t swizzle_128_bytes = 1, block_stride = 1024 >> 4, unused_stride = 1;
    return swizzle_128_bytes << 62 | block_stride << 32 | unused_stride << 16 | address >> 4;
}

/* c [64][128] += a [64][32] . b [128][32] over four warps, each with 16 of the 64 rows. */
__device__ __forceinline__ void wgmma(int (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#define SUMS(j) "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
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
#undef SUMS
}

/* ---- who does what: tiles, and shares of tiles ----------------------------------------------- */

/* TOKENS of a tile and TEAMS of a block decide the rest. */
template <int TOKENS, int TEAMS> struct Shape {
    static constexpr int TEAM_WARPS = WARPS / TEAMS;
    static constexpr int TEAM_THREADS = TEAM_WARPS * 32;
    static constexpr int CHANNELS = TEAM_WARPS * STRIP;      // of a tile
    static constexpr int TILE = CHANNELS * TOKENS;           // outputs of a tile
    static constexpr int CHUNK = TEAMS * DEPTH;              // units of a chunk
    static constexpr int STAGE = TOKENS * DEPTH * UNIT;      // bytes: a team's part of a chunk of a
    static constexpr int TEAM_SUMS = (TEAMS - 1) * TILE * 4; // bytes: for adding up the teams
};

struct GemmArgs {
    int M, N, K;
    const uint4 *w;          // [N/32][K/64][2][32]
    const uint32_t *s_group; // [N/32][K/128][8], NULL per channel
    const float *s_channel;  // [N]
    const int8_t *a;         // [M][K]
    const float *s_a;        // [M]
    half *y;                 // [M][N]
    int *acc;                // [M][N] or NULL
    int4 *partial;           // [gridDim.x][2][TILE / 4] sums of blocks that share a tile
    int *arrived;            // [split_tiles] chunks whose sums are in `partial`; zero in between
    int tiles_m, tiles_n;    // tiles of tokens, of channels
    int tiles;               // their product
    int units;               // of K
    int chunks;              // of K
    int split_tiles;         // the first so many tiles are shared out evenly, by chunks
    int share, longer;       // each block gets `share` chunks of them, the first `longer` one more
};

/* The next chunk of a block's list: a share of the split tiles, then whole tiles, one in gridDim.x.
 * With whole tiles alone the last round would leave most multiprocessors idle; with shares alone
 * ("stream-K") no two blocks would read the same weights at the same time. */
struct Work {
    int tile;       // tiles or more: the list is at its end
    int chunk, end; // of this tile: the next, and where this block's part ends
    int m, n;       // the tile's place among the tiles of tokens and of channels
};

/* Tiles go through bands of BAND tiles of tokens, along the channels, so that those in work at the
 * same time form a square and share much of what they read through the L2 cache. */
__device__ __forceinline__ void place_tile(Work &work, const GemmArgs &p) {
    work.m = 0;
    work.n = work.tile;
    if (p.tiles_m == 1) return; // divisions are slow
    int band = work.tile / (BAND * p.tiles_n);
    int rows = min(BAND, p.tiles_m - band * BAND);
    int in_band = work.tile - band * BAND * p.tiles_n;
    work.m = band * BAND + in_band % rows;
    work.n = in_band / rows;
}

/* The first chunk of a block's share, counting through all split tiles; and whose share a chunk is
 * in. */
__device__ __forceinline__ int share_start(const GemmArgs &p, int block) {
    return block * p.share + min(block, p.longer);
}

__device__ __forceinline__ int share_owner(const GemmArgs &p, int chunk) {
    int in_longer = p.longer * (p.share + 1);
    return chunk < in_longer ? chunk / (p.share + 1) : p.longer + (chunk - in_longer) / p.share;
}

__device__ __forceinline__ Work first_work(const GemmArgs &p) {
    Work work = {p.split_tiles + (int)blockIdx.x, 0, p.chunks, 0, 0};
    int start = share_start(p, blockIdx.x);
    int stop = share_start(p, blockIdx.x + 1);
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

/* ---- activations: from global to shared memory ----------------------------------------------- */

/* The place of 16 bytes in a team's stage: `row` is the token, `column` counts along k. Panels of
 * 128 k, each [TOKENS][8] 16-byte pieces. The piece is XORed with the row so that 8 rows of one
 * column, which ldmatrix reads at once, lie in different banks. */
template <int TOKENS> __device__ __forceinline__ uint32_t activation_place(int row, int column) {
    return (column / 8 * TOKENS + row) * 128 + (column % 8 ^ row % 8) * 16;
}

/* Half of a team's activations of one chunk; k past the end becomes zero, which makes whatever
 * weights it meets harmless. Tokens past the end are left out: nobody looks at their sums. */
template <int TOKENS, int TEAMS>
__device__ __forceinline__ void load_activations(const GemmArgs &p, const Work &work, int team,
                                                 uint32_t stage, int half_of_rows) {
    using S = Shape<TOKENS, TEAMS>;
    constexpr int PIECES = DEPTH * UNIT / 16; // of a row
    constexpr int ROWS = S::TEAM_THREADS / PIECES;
    int column = threadIdx.x % PIECES;
    int k = (work.chunk * S::CHUNK + (column / 8 * TEAMS + team) * 2) * UNIT + column % 8 * 16;
    int row = half_of_rows * TOKENS / 2 + threadIdx.x % S::TEAM_THREADS / PIECES;
    int rows = min((half_of_rows + 1) * TOKENS / 2, p.M - work.m * TOKENS);
    if (work.tile >= p.tiles) rows = 0;
    const int8_t *from = p.a + (size_t)(work.m * TOKENS + row) * p.K + k;
#pragma unroll(TOKENS <= 16 ? 1 : 8)
    for (int i = 0; i < (TOKENS / 2 + ROWS - 1) / ROWS; i++) {
        uint32_t to = stage + activation_place<TOKENS>(row, column);
        copy_async_16(to, from, k < p.K, row < rows);
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
        asm volatile("bar.sync %0, %1;\n" ::"r"(team + 1), "n"(TEAM_WARPS * 32) : "memory");
    }
}

/* ---- the inner product ----------------------------------------------------------------------- */

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
    if (!GROUPS) return (step ? word : word << 4) & 0xf0f0f0f0;
    uint32_t u = (step ? word >> 4 : word) & 0x0f0f0f0f;
    return (u * s + (0x80808080 - s * 0x08080808)) ^ 0x80808080;
}

/* acc [2 m16 tiles][N_TILES n8 tiles] += weights a . activations at `from`, k32. One ldmatrix reads
 * the right operands of two n8 tiles, four mma use them. */
template <int N_TILES>
__device__ __forceinline__ void multiply(int (&acc)[2][N_TILES][4], const uint32_t (&a)[2][4],
                                         uint32_t from) {
    constexpr int PAIR = N_TILES == 1 ? 1 : 2;
#pragma unroll
    for (int j = 0; j < N_TILES; j += PAIR) {
        uint32_t b[2 * PAIR];
        load_matrices(b, from + j * 8 * 128);
#pragma unroll
        for (int t = 0; t < PAIR; t++) {
            mma(acc[0][j + t], a[0], b[2 * t], b[2 * t + 1]);
            mma(acc[1][j + t], a[1], b[2 * t], b[2 * t + 1]);
        }
    }
}

/* ---- sums of teams and of blocks, and the output --------------------------------------------- */

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
    sums += threadIdx.x % STRIDE;
    __syncthreads(); // team 0 is through with the tile before
    if (team > 0) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            sums[(i * (TEAMS - 1) + team - 1) * STRIDE] = as_int4(acc[i % 2][i / 2]);
        }
    }
    __syncthreads();
    if (team > 0) return;
    for (int t = 0; t < TEAMS - 1; t++) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            add(acc[i % 2][i / 2], sums[(i * (TEAMS - 1) + t) * STRIDE]);
        }
    }
}

/* Adds to a counter and returns what it was. Writes of this block from before its last barrier are
 * seen by every block that finds the counter raised: half a fence before, half a fence after. */
__device__ __forceinline__ int add_in_order(int *counter, int n) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;\n"
                 : "=r"(before)
                 : "l"(counter), "r"(n)
                 : "memory");
    return before;
}

/* For a tile that several blocks share: each leaves its sums in `partial` and counts its chunks;
 * the one that completes the count adds up the others' and returns true. Nobody waits for anybody,
 * and integers give the same sum in whatever order.
 *
 * A block shares at most two tiles: its share ends within one (which it has from the first chunk
 * on) and starts within another. These are its two places in `partial`. */
template <int TOKENS, int TEAMS>
__device__ __forceinline__ bool add_blocks(const GemmArgs &p, int (&acc)[2][TOKENS / 8][4],
                                           const Work &now, int team) {
    using S = Shape<TOKENS, TEAMS>;
    __shared__ bool last;
    auto place = [&](int block, bool from_first_chunk) {
        return p.partial + (size_t)(2 * block + from_first_chunk) * (S::TILE / 4) + threadIdx.x;
    };
    if (team == 0) {
        int4 *to = place(blockIdx.x, now.chunk == 0);
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            __stcg(to + i * S::TEAM_THREADS, as_int4(acc[i % 2][i / 2]));
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int mine = now.end - now.chunk;
        last = add_in_order(p.arrived + now.tile, mine) + mine == p.chunks;
        if (last) p.arrived[now.tile] = 0; // as the next launch wants it
    }
    __syncthreads();
    if (!last) return false;
    if (team == 0) {
        int first = share_owner(p, now.tile * p.chunks);
        int final = share_owner(p, (now.tile + 1) * p.chunks - 1);
        for (int block = first; block <= final; block++) {
            if (block == (int)blockIdx.x) continue;
            const int4 *from = place(block, block == first);
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) {
                add(acc[i % 2][i / 2], __ldcg(from + i * S::TEAM_THREADS));
            }
        }
    }
    return true;
}

/* Scales a warp's sums, 32 channels from n0 and TOKENS tokens from m0, and writes them to y: they
 * are y^T in the registers, so 8x8 matrices of halves are transposed, after which (channel_place())
 * a lane has 8 consecutive channels of one token. */
template <int N_TILES, bool GROUPS>
__device__ __forceinline__ void write_tile(const GemmArgs &p, const int (&acc)[2][N_TILES][4],
                                           int m0, int n0) {
    const int lane = threadIdx.x % 32;
    float s_channel[4]; // of (m16 tile, half) 0,0 0,1 1,0 1,1
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s_channel[i] = p.s_channel[n0 + lane / 8 * 8 + 2 * i + lane / 4 % 2];
    }
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
        int token = m0 + j * 8 + lane % 4 * 2;
        float s_a[2];
        for (int i = 0; i < 2; i++) s_a[i] = token + i < p.M ? p.s_a[token + i] : 0;
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int *c = acc[i / 2][j] + i % 2 * 2;
            out[i] = transpose_8x8(__floats2half2_rn(((float)c[0] * s_a[0]) * s_channel[i],
                                                     ((float)c[1] * s_a[1]) * s_channel[i]));
        }
        int row = m0 + j * 8 + lane / 4;
        if (row < p.M) {
            *(uint4 *)(p.y + (size_t)row * p.N + n0 + lane % 4 * 8) =
                make_uint4(out[0], out[1], out[2], out[3]);
        }
        if (p.acc) {
            int *to = p.acc + (size_t)token * p.N + n0 + lane / 8 * 8 + lane / 4 % 2;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int sum = acc[i / 4][j][i % 4];
                if (token + i % 2 < p.M) to[i % 2 * p.N + i / 2 * 2] = GROUPS ? sum : sum / 16;
            }
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Up to 32 tokens two blocks fit on a multiprocessor: while one waits, the other reads, and the
 * next kernel's blocks find room before this one's are gone. */
template <int TOKENS, int TEAMS, bool GROUPS, bool HOPPER>
__global__ void __launch_bounds__(THREADS, TOKENS <= 32 ? 2 : 1)
    gemm_w4a8_kernel(const __grid_constant__ GemmArgs p) {
    using S = Shape<TOKENS, TEAMS>;
    constexpr bool WGMMA = HOPPER && HAVE_WGMMA;
    // wgmma still reads the chunk before when the copy of the next one starts, hence a third stage.
    constexpr int STAGES = HOPPER ? 3 : 2;
    // A weight is to be dequantized before its registers are loaded anew: left to itself the
    // compiler may do it afterwards, from a copy. Only mma.sync with 128 tokens is faster that way.
    constexpr bool ORDERED = TOKENS <= 64 || HOPPER;
    extern __shared__ __align__(1024) uint8_t shared[]; // [TEAMS][STAGES][STAGE], team sums

    const int lane = threadIdx.x % 32;
    const int team = threadIdx.x / S::TEAM_THREADS;
    const int warp = threadIdx.x / 32 % S::TEAM_WARPS; // of the team
    const uint32_t stages = (uint32_t)__cvta_generic_to_shared(shared) + team * STAGES * S::STAGE;
    // A lane's row for ldmatrix: n8 tile lane / 16 of two, token lane % 8, 16-byte column lane / 8
    // % 2. A step's column is then a matter of one XOR.
    const uint32_t b_row = lane / 16 * 8 * 128 + activation_place<TOKENS>(lane % 8, lane / 8 % 2);

    // The weights of the next four units, on their way. Pairs of units go to the teams in turn: the
    // 128 k of a pair share a line of activations and a group's scale.
    uint4 w[DEPTH][2] = {};
    uint32_t s_group[DEPTH / 2] = {};
    const uint4 *from_w = p.w;
    const uint32_t *from_s_group = p.s_group;
    int valid = 0; // units from there to the end
    auto aim = [&](const Work &work) {
        int strip = work.n * S::TEAM_WARPS + warp;
        int unit = work.chunk * S::CHUNK + team * 2;
        from_w = p.w + ((size_t)strip * p.units + unit) * 64 + lane;
        if (GROUPS) {
            from_s_group = p.s_group + ((size_t)strip * (p.units / 2) + unit / 2) * 8 + lane / 4;
        }
        valid = work.tile < p.tiles && strip < p.N / STRIP ? p.units - unit : 0;
    };
    auto load_weights = [&](int u) {
        const int unit = u / 2 * TEAMS * 2 + u % 2;
        load_16(w[u][0], from_w + unit * 64, unit < valid);
        load_16(w[u][1], from_w + unit * 64 + 32, unit < valid);
        if (GROUPS && u % 2 == 1) {
            load_4(s_group[u / 2], from_s_group + u / 2 * TEAMS * 8, unit < valid);
        }
        // With 128 tokens no register is left to look farther ahead, but the L2 cache can.
        if (TOKENS == 128) {
            prefetch(from_w + (S::CHUNK + unit) * 64 + lane, S::CHUNK + unit < valid);
        }
    };

    // Weights are nobody's output: they may be read while the kernel before is still at work.
    Work next = first_work(p);
    aim(next);
#pragma unroll
    for (int u = 0; u < DEPTH; u++) load_weights(u);
    launch_dependents();
    wait_for_previous_kernel();
    load_activations<TOKENS, TEAMS>(p, next, team, stages, 0);
    load_activations<TOKENS, TEAMS>(p, next, team, stages, 1);

    uint32_t filling = stages; // the stage that is being copied to
    while (next.tile < p.tiles) {
        Work now = next; // this block's part of one tile
        int acc[2][TOKENS / 8][4] = {};
        uint32_t a[2][2][4]; // [step, for wgmma][m16 tile][register]
        for (int chunk = now.chunk; chunk < now.end; chunk++) {
            next_work(next, p);
            aim(next);
            copy_async_wait();
            if constexpr (WGMMA) wgmma_fence_shared();
            team_barrier<S::TEAM_WARPS>(team); // all copies are there, and the next stage is free
            // From here to the end of the chunk there is no branch and no barrier, so that the
            // compiler can start loads and dequantize under the products before them.
            const uint32_t current = filling;
            filling += S::STAGE;
            if (filling == stages + STAGES * S::STAGE) filling = stages;

#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                if (!WGMMA && u < 2) load_activations<TOKENS, TEAMS>(p, next, team, filling, u);
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    uint32_t(&left)[2][4] = a[WGMMA ? step : 0];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t words[4] = {w[u][i].x, w[u][i].y, w[u][i].z, w[u][i].w};
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            uint32_t s = __byte_perm(s_group[u / 2], 0, 0x4440 + 2 * i + r % 2);
                            left[i][r] = dequantize<GROUPS>(words[r], step, s);
                            if (ORDERED) asm volatile("" : "+r"(left[i][r]));
                        }
                    }
                    // A unit that is dequantized makes room for the same one of the next chunk.
                    if (step == 1) load_weights(u);
                    const uint32_t panel = current + u / 2 * TOKENS * 128;
                    const int column = (u % 2 * 2 + step) * 32; // bytes
                    if constexpr (WGMMA) {
                        wgmma_fence();
                        wgmma(acc[0], left[0], wgmma_matrix(panel + column));
                        wgmma(acc[1], left[1], wgmma_matrix(panel + column));
                        wgmma_commit();
                        if (step == 0 && u < 2) {
                            load_activations<TOKENS, TEAMS>(p, next, team, filling, u);
                        }
                        wgmma_wait<1>(); // the step before is through: its `left` is free
                    } else {
                        multiply<TOKENS / 8>(acc, left, panel + (b_row ^ column));
                    }
                }
            }
        }
        if constexpr (WGMMA) wgmma_wait<0>();

        if (TEAMS > 1) {
            add_teams<TOKENS, TEAMS>(acc, (int4 *)(shared + TEAMS * STAGES * S::STAGE), team);
        }
        bool whole = now.end - now.chunk == p.chunks;
        if (!whole && !add_blocks<TOKENS, TEAMS>(p, acc, now, team)) continue;
        place_tile(now, p); // again, rather than keep it in registers
        int n0 = (now.n * S::TEAM_WARPS + warp) * STRIP;
        if (team == 0 && n0 < p.N) write_tile<TOKENS / 8, GROUPS>(p, acc, now.m * TOKENS, n0);
    }
}

/* ---- launching ------------------------------------------------------------------------------- */

/* A launch that may overlap the end of the kernel before: see launch_dependents(). A kernel
 * launched so must wait_for_previous_kernel(), whatever it does: the one after it relies on that.
 */
template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), int grid, int shared, cudaStream_t stream,
                   Arguments... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = compute_capability() >= 9;
    cuda_check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

/* What the largest kernels need of `partial`: two tiles of 256 x 128 for each multiprocessor (or of
 * half that size for each of two blocks). Split tiles are fewer than twice the blocks. */
static size_t partial_ints() {
    return (size_t)multiprocessors() * 2 * 256 * 128;
}

int *gpu_gemm_workspace(void) {
    size_t bytes = (partial_ints() + 4 * multiprocessors()) * sizeof(int);
    int *workspace = (int *)device_alloc(bytes);
    cuda_check(cudaMemset(workspace, 0, bytes), "GEMM workspace");
    return workspace;
}

/* Splits the work over `blocks` blocks. Unless told to `split`, every tile is one block's, and each
 * block gets the same number of tiles. */
template <int TOKENS, int TEAMS, bool GROUPS, bool HOPPER>
static void launch_gemm(GemmArgs p, int blocks, bool split, cudaStream_t stream) {
    using S = Shape<TOKENS, TEAMS>;
    p.tiles_m = (p.M + TOKENS - 1) / TOKENS;
    p.tiles_n = (p.N + S::CHANNELS - 1) / S::CHANNELS;
    p.tiles = p.tiles_m * p.tiles_n;
    p.units = p.K / UNIT;
    p.chunks = (p.units + S::CHUNK - 1) / S::CHUNK;
    if (split) {
        // Whole tiles, if that keeps the blocks busy for 13/14 of the time. Else the tiles of the
        // last, incomplete round are split. Very few would be split very finely, with more to add
        // than to multiply: then one round more.
        int rounds = (p.tiles + blocks - 1) / blocks;
        int rest = p.tiles % blocks;
        if (p.tiles * 14 < rounds * blocks * 13) {
            p.split_tiles = rest * 2 < blocks && rounds > 1 ? rest + blocks : rest;
        }
        blocks = min(blocks, p.tiles * p.chunks);
    } else {
        int each = (p.tiles + blocks - 1) / blocks;
        blocks = (p.tiles + each - 1) / each;
    }
    p.share = p.split_tiles * p.chunks / blocks;
    p.longer = p.split_tiles * p.chunks % blocks;

    auto kernel = gemm_w4a8_kernel<TOKENS, TEAMS, GROUPS, HOPPER>;
    constexpr int shared = TEAMS * (HOPPER ? 3 : 2) * S::STAGE + S::TEAM_SUMS;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    cuda_check(allowed, "shared memory");
    launch(kernel, blocks, shared, stream, p);
}

template <bool GROUPS>
static void launch_kernel(GemmKernel kernel, const GemmArgs &p, cudaStream_t stream) {
    const int sms = multiprocessors();
    switch (kernel) {
    case GEMM_8X8:
        launch_gemm<8, 8, GROUPS, false>(p, 2 * sms, false, stream);
        break;
    case GEMM_16X8:
        launch_gemm<16, 8, GROUPS, false>(p, 2 * sms, false, stream);
        break;
    case GEMM_32X4:
        launch_gemm<32, 4, GROUPS, false>(p, 2 * sms, true, stream);
        break;
    case GEMM_64X4:
        launch_gemm<64, 4, GROUPS, false>(p, sms, true, stream);
        break;
    case GEMM_64X2:
        launch_gemm<64, 2, GROUPS, false>(p, sms, true, stream);
        break;
    case GEMM_128:
        launch_gemm<128, 1, GROUPS, false>(p, sms, true, stream);
        break;
    case GEMM_WGMMA:
        launch_gemm<128, 1, GROUPS, true>(p, sms, true, stream);
        break;
    default:
        die("no such GEMM kernel: %d", kernel);
    }
}

/* Measured, not derived: build and run `make bench` before changing a number. */
GemmKernel gpu_gemm_choose(const GpuLinear *l, int M, bool portable) {
    static const int largest_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const bool wgmma = compute_capability() == 9 && !portable;
    const int sms = multiprocessors();
    auto tiles = [](int x, int tile) { return (x + tile - 1) / tile; };
    if (M <= 8) return GEMM_8X8;
    if (M <= 16) return GEMM_16X8;
    if (M <= 32) return GEMM_32X4;
    // Large tiles pay if a block gets some chunks for each time that it adds up with others.
    int chunks = tiles(M, 128) * tiles(l->N, 256) * tiles(l->K, DEPTH * UNIT);
    if (M > 64 && chunks >= 7 * sms) return wgmma ? GEMM_WGMMA : GEMM_128;
    bool fits = largest_shared >= 8 * Shape<64, 4>::STAGE + Shape<64, 4>::TEAM_SUMS;
    return fits && tiles(M, 64) * tiles(l->N, 64) <= sms ? GEMM_64X4 : GEMM_64X2;
}

void gpu_gemm_run(GemmKernel kernel, const GpuLinear *l, const int8_t *a, const float *s_a, int M,
                  half *y, int *acc, int *workspace, cudaStream_t stream) {
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
    p.partial = (int4 *)workspace;
    p.arrived = workspace + partial_ints();
    if (l->s_group) {
        launch_kernel<true>(kernel, p, stream);
    } else {
        launch_kernel<false>(kernel, p, stream);
    }
}

void gpu_gemm_w4a8(const GpuLinear *l, const int8_t *a, const float *s_a, int M, half *y,
                   int *workspace, cudaStream_t stream) {
    gpu_gemm_run(gpu_gemm_choose(l, M, false), l, a, s_a, M, y, NULL, workspace, stream);
}

/* ---- the activation quantizer ---------------------------------------------------------------- */

/* s_a = max|x| / 127, a = rint(x / s_a); quantize_row() in qqq.c is the twin. One block a row. */
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(const half *x, int K, int8_t *a, float *s_a) {
    __shared__ uint32_t maxima[WARPS];
    launch_dependents();
    wait_for_previous_kernel();
    const uint4 *row = (const uint4 *)(x + (size_t)blockIdx.x * K); // [K / 8]
    uint2 *out = (uint2 *)(a + (size_t)blockIdx.x * K);             // [K / 8]

    // Without its sign bit a half orders as an integer; NaN and infinity are above all others.
    const uint32_t magnitude = 0x7fff7fff;
    uint32_t pair = 0;
    for (int i = threadIdx.x; i < K / 8; i += THREADS) {
        uint4 v = row[i];
        pair = __vmaxu2(pair, __vmaxu2(v.x & magnitude, v.y & magnitude));
        pair = __vmaxu2(pair, __vmaxu2(v.z & magnitude, v.w & magnitude));
    }
    uint32_t most = max(pair >> 16, pair & 0xffff);
    for (int i = 16; i > 0; i /= 2) most = max(most, __shfl_xor_sync(~0u, most, i));
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) most = max(most, maxima[i]);
    const uint32_t infinity = 0x7c00;
    float s = __fdiv_rn(__half2float(__ushort_as_half(most)), 127.0f);
    if (most >= infinity) s = __int_as_float(0x7fc00000); // NaN
    if (threadIdx.x == 0) s_a[blockIdx.x] = s;

    for (int i = threadIdx.x; i < K / 8; i += THREADS) {
        uint4 v = row[i];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
        uint32_t bytes[2] = {};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float f = __half2float(__ushort_as_half(pairs[j / 2] >> j % 2 * 16 & 0xffff));
            float r = s > 0 ? rintf(__fdiv_rn(f, s)) : 0;
            int q = (int)fminf(fmaxf(r, -128.0f), 127.0f);
            bytes[j / 4] |= (q & 0xff) << j % 4 * 8;
        }
        out[i] = make_uint2(bytes[0], bytes[1]);
    }
}

void gpu_quantize(const half *x, int M, int K, int8_t *a, float *s_a, cudaStream_t stream) {
    launch(quantize_kernel, M, 0, stream, x, K, a, s_a);
}
