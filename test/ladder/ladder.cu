/* The ladder: the W4A8 GEMM in ten steps, from twenty lines to Hopper's kernel, each with its time.
 *
 *     y[m][n] = (sum_k a[m][k] q[n][k]) * s_a[m] * s_channel[n]       per channel, the sum in int32
 *
 *     1 naive                a thread per output
 *     2 mma.sync             tensor cores
 *     3 fragment order       weights in the order in which the tensor cores want them
 *     4 pipeline             copies run ahead, through shared memory
 *     5 teams                warps side by side along K      (few tokens)
 *     6 stream-K             the last round of tiles is shared out
 *     7 clusters             blocks share K                  (instead of 5 and 6)
 *     8 wgmma                4 with Hopper's tensor core instruction
 *     9 TMA                  8 with copies by one thread
 *    10 producer warps       9 with warps that only copy
 *
 * Read them in order: each is a kernel that says what it adds and why. Rungs 4 to 7 also use the
 * functions of the rungs before them, rungs 8 to 10 share one product. The last row is kernels.cu.
 *
 * All sums of each rung are compared with the naive kernel's, and those with plain C. The
 * percentage beside a time is that of the limit: the time in which the GPU could read and write
 * each byte once, or multiply at its highest rate, whichever is longer.
 *
 * The kernels are short, so they accept few shapes: N a multiple of 256, K of 128. They need 130 KB
 * of shared memory per block (A100), on Hopper 192 KB. */
#include "../../qqq.h"

#include <algorithm>
#include <cmath>
#include <cooperative_groups.h>
#include <cublas_v2.h>
#include <cudaTypedefs.h>
#include <unistd.h>
#include <vector>

struct Gemm {
    int M, N, K;
    const uint8_t *qweight; // [N][K/2] as in the file, for rungs 1 and 2
    const uint4 *w;         // [N/32][K/64][2][32] fragments, from rung 3 on
    const float *s_channel; // [N]
    const int8_t *a;        // [M][K]
    const float *s_a;       // [M]
    half *y;                // [M][N]
    int *acc;               // [M][N] the sums; NULL where only time counts
    int4 *partial;          // [blocks][2] tiles of sums, for rung 6
    int *arrived;           // [tiles] zeros: chunks of K whose sums are in `partial`
};

__device__ half scaled(const Gemm &p, int m, int n, int sum) {
    float y = __fmul_rn(__fmul_rn((float)sum, __ldg(p.s_a + m)), __ldg(p.s_channel + n));
    return __float2half_rn(y);
}

/* ================================================================================================
 * 1  Naive
 *
 * A thread per output. Each thread reads its row of weights byte by byte, far from the rows of its
 * neighbours. So a warp needs 32 lines of memory for 32 bytes, and the rest of each line waits in
 * the cache. Each product is an instruction of its own.
 * ============================================================================================== */

__global__ void naive_kernel(const Gemm p) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y;
    const uint8_t *w = p.qweight + (size_t)n * (p.K / 2);
    const int8_t *a = p.a + (size_t)m * p.K;
    int sum = 0;
    for (int i = 0; i < p.K / 2; i++) { // a byte has two codes u = q + 8
        sum += ((w[i] & 15) - 8) * a[2 * i] + ((w[i] >> 4) - 8) * a[2 * i + 1];
    }
    if (p.acc) p.acc[(size_t)m * p.N + n] = sum;
    p.y[(size_t)m * p.N + n] = scaled(p, m, n, sum);
}

/* ================================================================================================
 * 2  mma.sync, one tile per block
 *
 * Adds the tensor cores: one instruction of a warp multiplies 16 channels x 32 k by 32 k x 8
 * tokens. A block of 8 warps computes a tile of 256 channels x TOKENS tokens. A warp has 32
 * channels, two m16 tiles, and all tokens of the tile, so it reads and unpacks a weight once for 8
 * to 128 tokens. The weights are the left operand, that is, the kernel computes y^T: its right side
 * is only 8 wide, so few tokens waste little.
 *
 * A lane's part of the operands, l the lane:
 *
 *     left     register 0   row l / 4,      k = l % 4 * 4 .. + 3
 *              register 1   row l / 4 + 8,  the same k
 *              registers 2 and 3            the same rows, 16 k further
 *     right    registers 0 and 1            token l / 4, the same k
 *     sums     0 and 1      row l / 4,      tokens l % 4 * 2 and + 1
 *              2 and 3      row l / 4 + 8,  the same tokens
 *
 * Which channel is which row is free. With channel = row % 8 * 4 + tile * 2 + row / 8 a lane has
 * four neighbours of y for a token, and writes them at once.
 * ============================================================================================== */

__device__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four int8 q from four codes u = q + 8, two per byte. */
__device__ uint32_t unpack(uint32_t codes) {
    codes = (codes | codes << 8) & 0x00ff00ff;
    codes = (codes | codes << 4) & 0x0f0f0f0f;
    return __vsub4(codes, 0x08080808);
}

/* The sums of channels n .. n + 3 of token m. */
__device__ void write_four(const Gemm &p, int m, int n, int4 sum) {
    if (m >= p.M) return;
    const size_t at = (size_t)m * p.N + n;
    half2 y[2] = {{scaled(p, m, n, sum.x), scaled(p, m, n + 1, sum.y)},
                  {scaled(p, m, n + 2, sum.z), scaled(p, m, n + 3, sum.w)}};
    *(uint2 *)(p.y + at) = *(uint2 *)y;
    if (p.acc) *(int4 *)(p.acc + at) = sum;
}

/* The sums that a lane has of token i (0, 1) of an n8 tile: four neighbouring channels. */
template <int N_TILES> __device__ int4 four_sums(const int (&c)[2][N_TILES][4], int tile, int i) {
    return {c[0][tile][i], c[0][tile][2 + i], c[1][tile][i], c[1][tile][2 + i]};
}

__device__ int4 operator>>(int4 x, int bits) {
    return {x.x >> bits, x.y >> bits, x.z >> bits, x.w >> bits};
}

/* A warp's sums c of 32 channels from n0, all tokens of the tile from m0. They are 2^bits times as
 * large as those of q. */
template <int N_TILES>
__device__ void write_tile(const Gemm &p, const int (&c)[2][N_TILES][4], int m0, int n0, int bits) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < N_TILES * 2; j++) {
        int m = m0 + j / 2 * 8 + lane % 4 * 2 + j % 2;
        write_four(p, m, n0 + lane / 4 * 4, four_sums(c, j / 2, j % 2) >> bits);
    }
}

template <int TOKENS> __global__ void __launch_bounds__(256) tile_kernel(const Gemm p) {
    const int lane = threadIdx.x % 32;
    const int n0 = blockIdx.x * 256 + threadIdx.x / 32 * 32, m0 = blockIdx.y * TOKENS;
    int c[2][TOKENS / 8][4] = {};
    for (int k = lane % 4 * 4; k < p.K; k += 32) {
        // 1. unpack the left operands of two m16 tiles: i / 4 is the tile, i % 4 the register
        uint32_t a[2][4];
        for (int i = 0; i < 8; i++) {
            int n = n0 + lane / 4 * 4 + i / 4 * 2 + i % 2;
            size_t at = (size_t)n * (p.K / 2) + (k + i % 4 / 2 * 16) / 2;
            a[i / 4][i % 4] = unpack(*(const uint16_t *)(p.qweight + at));
        }

        // 2. multiply them by 8 tokens at a time; past the last token comes the last one again
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            int m = min(m0 + j * 8 + lane / 4, p.M - 1);
            const uint32_t *b = (const uint32_t *)(p.a + (size_t)m * p.K + k);
            for (int t = 0; t < 2; t++) mma(c[t][j], a[t], b[0], b[4]);
        }
    }
    write_tile(p, c, m0, n0, 0);
}

/* ================================================================================================
 * 3  Weights in fragment order
 *
 * Rung 2 loads two bytes per lane from eight rows. Rung 3 lays the weights out beforehand in the
 * order of mma's left operand (Marlin, arXiv 2408.11743), as kernels.cu does: 64 k of 32 channels
 * are 1024 bytes in a row, 16 per lane and m16 tile. The codes of k and k + 32 share a byte, as
 * two's complement. So the high half of a byte *is* 16 q: one AND unpacks four weights, for the low
 * half after one shift. The sums are 16 times as large.
 *
 * With one token that is a sixth faster on an H200. From 64 tokens on it is slower than rung 2, at
 * 1024 half as fast. The likely reason, from the machine code and not from a profile: in both rungs
 * a load of activations touches eight rows, for which the L1 cache needs some eight clocks, and
 * these loads are most of the time.
 * In rung 2 all loads of 32 k go out together, before the first mma. In rung 3 the compiler spreads
 * the loads of 64 k over seven groups between the mma, and each group waits anew; and the weights
 * come from memory each time, while rung 2 finds seven of eight in the L1 cache. Only 32 of 132
 * multiprocessors have work, eight warps each, too few to hide that. Rung 4 ends both.
 * ============================================================================================== */

/* qweight [N][K/2] becomes w [N/32][K/64][2 tiles][32 lanes][4 registers]. A thread per word. */
__global__ void fragment_kernel(const uint8_t *qweight, int N, int K, uint32_t *w) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * K / 8) return;
    int reg = i % 4, lane = i / 4 % 32, tile = i / 128 % 2;
    int unit = i / 256 % (K / 64), strip = i / 256 / (K / 64);
    int k = unit * 64 + reg / 2 * 16 + lane % 4 * 4;
    int n = strip * 32 + lane / 4 * 4 + tile * 2 + reg % 2;
    uint32_t word = 0;
    for (int j = 0; j < 8; j++) { // byte j % 4, the low half for k, the high half for k + 32
        int at = k + j % 4 + j / 4 * 32;
        uint32_t code = qweight[((size_t)n * K + at) / 2] >> at % 2 * 4 & 15;
        word |= (code ^ 8) << (j % 4 * 8 + j / 4 * 4);
    }
    w[i] = word;
}

/* The left operand of k32 step 0 or 1 from 16 bytes of fragments. */
__device__ void dequantize(uint32_t (&a)[4], uint4 w, int step) {
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int r = 0; r < 4; r++) a[r] = (step ? words[r] : words[r] << 4) & 0xf0f0f0f0;
}

template <int TOKENS> __global__ void __launch_bounds__(256) fragment_order_kernel(const Gemm p) {
    const int lane = threadIdx.x % 32;
    const int n0 = blockIdx.x * 256 + threadIdx.x / 32 * 32, m0 = blockIdx.y * TOKENS;
    const uint4 *w = p.w + (size_t)(n0 / 32) * (p.K / 64) * 64 + lane; // the warp's strip
    int c[2][TOKENS / 8][4] = {};
    for (int k = 0; k < p.K; k += 64, w += 64) {
        // 1. load 64 k of two m16 tiles
        const uint4 words[2] = {w[0], w[32]};

        // 2. multiply, 32 k at a time
        for (int step = 0; step < 2; step++) {
            uint32_t a[2][4];
            for (int t = 0; t < 2; t++) dequantize(a[t], words[t], step);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
                int m = min(m0 + j * 8 + lane / 4, p.M - 1);
                const int8_t *row = p.a + (size_t)m * p.K + k + step * 32;
                const uint32_t *b = (const uint32_t *)row + lane % 4;
                for (int t = 0; t < 2; t++) mma(c[t][j], a[t], b[0], b[4]);
            }
        }
    }
    write_tile(p, c, m0, n0, 4);
}

/* ================================================================================================
 * 4  Asynchronous pipeline
 *
 * A warp of rung 3 asks for data, then waits for them. Here cp.async copies into shared memory in
 * the background, three chunks of 128 k ahead of the chunk that is multiplied, so that the memory
 * is always busy. And the activations, which all eight warps need, are read once per block instead
 * of once per warp.
 * ============================================================================================== */

constexpr int STAGES = 4;             // chunks in shared memory
constexpr int CHUNK = 128;            // k
constexpr int STRIP = 32 * CHUNK / 2; // bytes of a chunk of weights for one warp

extern __shared__ __align__(1024) uint8_t shared[];

__device__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

/* The copies of this thread since the last call become one group. */
__device__ void copies_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/* Waits until at most PENDING of this thread's groups are still on their way. */
template <int PENDING> __device__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

/* Four 8 x 16-byte matrices: lanes 8i .. 8i + 7 name the rows of matrix i. Lane l receives bytes
 * l % 4 * 4 .. + 3 of row l / 4 of each: mma's right operand. */
__device__ void load_matrices(uint32_t (&b)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(row)));
}

/* THREADS threads, 32 channels from n0 for each of their warps, copy a chunk into a stage:
 *
 *     activations [TOKENS][128]    each 16-byte piece XORed with its row, so that ldmatrix finds
 *                                  a column of 8 rows in different banks
 *     weights [warps][STRIP]
 */
template <int TOKENS, int THREADS>
__device__ void load_chunk(const Gemm &p, int m0, int n0, int k, uint8_t *stage) {
    const int thread = threadIdx.x % THREADS, warp = thread / 32, lane = thread % 32;

    // 1. activations; past the last token comes the last one again: its sums are not written
#pragma unroll
    for (int i = thread; i < TOKENS * 8; i += THREADS) {
        int row = i / 8, piece = i % 8, m = min(m0 + row, p.M - 1);
        const int8_t *from = p.a + (size_t)m * p.K + k + piece * 16;
        copy_async(stage + row * 128 + (piece ^ row % 8) * 16, from);
    }

    // 2. weights: each warp copies what it multiplies itself
    const size_t strip = n0 / 32 + warp, unit = k / 64;
    const uint4 *from = p.w + (strip * (p.K / 64) + unit) * 64 + lane;
    uint8_t *to = stage + TOKENS * CHUNK + warp * STRIP + lane * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) copy_async(to + i * 512, from + i * 32);
}

/* c += a warp's weights [2 units][2 tiles][512 bytes] times the activations, 128 k. */
template <int TOKENS>
__device__ void multiply_chunk(int (&c)[2][TOKENS / 8][4], const uint8_t *activations,
                               const uint8_t *weights) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
        // 1. the left operands of 64 k
        uint32_t a[2][2][4]; // [step][m16 tile][register]
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint8_t *from = weights + (unit * 2 + i % 2) * 512 + lane * 16;
            dequantize(a[i / 2][i % 2], *(const uint4 *)from, i / 2);
        }

        // 2. one ldmatrix reads 8 tokens x 64 k, four mma use them
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            uint32_t b[4];
            int row = j * 8 + lane % 8, piece = unit * 4 + lane / 8;
            load_matrices(b, activations + row * 128 + (piece ^ row % 8) * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma(c[i % 2][j], a[i / 2][i % 2], b[i / 2 * 2], b[i / 2 * 2 + 1]);
            }
        }
    }
}

template <int TOKENS> __global__ void __launch_bounds__(256) pipeline_kernel(const Gemm p) {
    constexpr int STAGE = TOKENS * CHUNK + 8 * STRIP;
    const int n0 = blockIdx.x * 256, m0 = blockIdx.y * TOKENS, warp = threadIdx.x / 32;
    auto load = [&](int i) {
        uint8_t *stage = shared + i % STAGES * STAGE;
        if (i * CHUNK < p.K) load_chunk<TOKENS, 256>(p, m0, n0, i * CHUNK, stage);
        copies_commit();
    };
    int c[2][TOKENS / 8][4] = {};
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int i = 0; i < p.K / CHUNK; i++) {
        // 1. chunk i is there: this thread's part by the wait, everyone's by the barrier
        copies_wait<STAGES - 2>();
        __syncthreads();

        // 2. chunk i - 1 is no longer needed: ask for chunk i + 3 in its stage
        load(i + STAGES - 1);

        // 3. multiply chunk i
        const uint8_t *stage = shared + i % STAGES * STAGE;
        multiply_chunk<TOKENS>(c, stage, stage + TOKENS * CHUNK + warp * STRIP);
    }
    write_tile(p, c, m0, n0 + warp * 32, 4);
}

/* ================================================================================================
 * 5  Teams along K
 *
 * With few tokens and tiles of 256 channels, 8192 channels keep 32 of 132 multiprocessors busy. So
 * the eight warps form teams, and a tile becomes as narrow as one team: there are TEAMS times as
 * many tiles. The teams take turns at the chunks of K, each with its own pipeline, and add their
 * sums in shared memory at the end.
 * ============================================================================================== */

/* THREADS and CHANNELS are those of a team: 32 channels per warp. */
template <int TOKENS, int TEAMS> struct Shape {
    static constexpr int THREADS = 256 / TEAMS, CHANNELS = THREADS;
    static constexpr int STAGE = TOKENS * CHUNK + CHANNELS * CHUNK / 2;
    static constexpr int ROW = CHANNELS + 4; // of the sums, apart by 4 banks
    static constexpr int SHARED = std::max(TEAMS * STAGES * STAGE, TOKENS *ROW * 4);
};

template <int THREADS> __device__ void team_barrier(int team) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(team + 1), "n"(THREADS) : "memory");
}

__device__ int4 operator+(int4 x, int4 y) {
    return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

/* The sums of a tile over the chunks `first` to `end` of K, in shared memory as [TOKENS][ROW]. */
template <int TOKENS, int TEAMS>
__device__ void tile_sums(const Gemm &p, int m0, int n0, int first, int end) {
    using S = Shape<TOKENS, TEAMS>;
    const int team = threadIdx.x / S::THREADS, warp = threadIdx.x % S::THREADS / 32;
    const int lane = threadIdx.x % 32;
    uint8_t *stages = shared + team * STAGES * S::STAGE;
    auto load = [&](int i) { // the team's i-th chunk
        const int chunk = first + i * TEAMS + team;
        uint8_t *stage = stages + i % STAGES * S::STAGE;
        if (chunk < end) load_chunk<TOKENS, S::THREADS>(p, m0, n0, chunk * CHUNK, stage);
        copies_commit();
    };

    // 1. the pipeline of rung 4, for one team
    int c[2][TOKENS / 8][4] = {};
    __syncthreads(); // the sums of the tile before have been read
    for (int i = 0; i < STAGES - 1; i++) load(i);
    const int chunks = (end - first - team + TEAMS - 1) / TEAMS;
    for (int i = 0; i < chunks; i++) {
        copies_wait<STAGES - 2>();
        team_barrier<S::THREADS>(team);
        load(i + STAGES - 1);
        const uint8_t *stage = stages + i % STAGES * S::STAGE;
        multiply_chunk<TOKENS>(c, stage, stage + TOKENS * CHUNK + warp * STRIP);
    }

    // 2. one team after the other adds its sums
    int *sums = (int *)shared + lane % 4 * 2 * S::ROW + warp * 32 + lane / 4 * 4;
    for (int adding = 0; adding < TEAMS; adding++) {
        __syncthreads();
        if (adding != team) continue;
#pragma unroll
        for (int j = 0; j < TOKENS / 4; j++) {
            int4 *to = (int4 *)(sums + (j / 2 * 8 + j % 2) * S::ROW);
            int4 mine = four_sums(c, j / 2, j % 2);
            *to = team > 0 ? *to + mine : mine;
        }
    }
    __syncthreads();
}

/* Writes y of a tile from sums(token, channel), which returns the sums of 4 channels of a token;
 * of the tokens first .. end - 1. */
template <int TOKENS, int TEAMS, typename Sums>
__device__ void write_sums(const Gemm &p, int m0, int n0, int first, int end, Sums sums) {
    constexpr int CHANNELS = Shape<TOKENS, TEAMS>::CHANNELS;
    for (int i = first * CHANNELS + threadIdx.x * 4; i < end * CHANNELS; i += 256 * 4) {
        int row = i / CHANNELS, column = i % CHANNELS;
        write_four(p, m0 + row, n0 + column, sums(row, column) >> 4);
    }
}

/* The same for all tokens, from this block's shared memory. */
template <int TOKENS, int TEAMS> __device__ void write_sums(const Gemm &p, int m0, int n0) {
    constexpr int ROW = Shape<TOKENS, TEAMS>::ROW;
    auto sums = [](int row, int column) { return ((int4 *)shared)[(row * ROW + column) / 4]; };
    write_sums<TOKENS, TEAMS>(p, m0, n0, 0, TOKENS, sums);
}

template <int TOKENS, int TEAMS>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) teams_kernel(const Gemm p) {
    const int n0 = blockIdx.x * Shape<TOKENS, TEAMS>::CHANNELS, m0 = blockIdx.y * TOKENS;
    tile_sums<TOKENS, TEAMS>(p, m0, n0, 0, p.K / CHUNK);
    write_sums<TOKENS, TEAMS>(p, m0, n0);
}

/* ================================================================================================
 * 6  Stream-K
 *
 * 192 tiles on 132 multiprocessors are two rounds, the second half empty. Stream-K (arXiv
 * 2301.03598) starts as many blocks as run at once. They compute whole tiles as long as those fill
 * rounds. The tiles of the incomplete round are cut into chunks of K, and each block gets an equal
 * share of the chunks. Blocks that meet in a tile add their sums in global memory; the last of them
 * writes y. Integers add up to the same in any order.
 *
 * It pays only where the last round is rather empty: adding costs traffic and a wait.
 * ============================================================================================== */

/* The chunks of all shared tiles, one tile after the other. Block b has those from start(b) on. */
struct Shares {
    int total, blocks;
    __device__ int start(int b) const { return (int)((long long)total * b / blocks); }
    __device__ int owner(int chunk) const { // the b with start(b) <= chunk < start(b + 1)
        return (int)(((long long)(chunk + 1) * blocks - 1) / total);
    }
};

/* Adds this block's sums of the chunks first .. end - 1 of a tile, whose first chunk is `at` among
 * the shares, to those of other blocks. True for the block that completes the tile: it then has all
 * sums in shared memory. A block meets at most two tiles: the end of one and the start of another.
 * These are its two places in p.partial. */
template <int TOKENS, int TEAMS>
__device__ bool add_blocks(const Gemm &p, const Shares &shares, int at, int first, int end) {
    constexpr int SIZE = TOKENS * Shape<TOKENS, TEAMS>::ROW / 4;
    __shared__ bool last;
    const int chunks = p.K / CHUNK, tile = at / chunks;
    int4 *sums = (int4 *)shared, *mine = p.partial + (size_t)(blockIdx.x * 2 + (first == 0)) * SIZE;

    // 1. leave the sums where the others can read them
#pragma unroll 8
    for (int i = threadIdx.x; i < SIZE; i += 256) mine[i] = sums[i];
    __threadfence(); // the sums before the count
    __syncthreads();

    // 2. count the chunks that are done; the block that makes them complete goes on
    if (threadIdx.x == 0) {
        last = atomicAdd(p.arrived + tile, end - first) + end - first == chunks;
        if (last) p.arrived[tile] = 0; // for the next launch
        __threadfence();
    }
    __syncthreads();
    if (!last) return false;

    // 3. add the sums of the others
    const int first_block = shares.owner(at), last_block = shares.owner(at + chunks - 1);
    for (int b = first_block; b <= last_block; b++) {
        if (b == (int)blockIdx.x) continue;
        const int4 *theirs = p.partial + (size_t)(b * 2 + (b == first_block)) * SIZE;
#pragma unroll 8
        for (int i = threadIdx.x; i < SIZE; i += 256) sums[i] = sums[i] + __ldcg(theirs + i);
    }
    __syncthreads();
    return true;
}

template <int TOKENS, int TEAMS>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) stream_k_kernel(const Gemm p) {
    using S = Shape<TOKENS, TEAMS>;
    const int blocks = gridDim.x, chunks = p.K / CHUNK;
    const int tiles_m = (p.M + TOKENS - 1) / TOKENS, tiles = tiles_m * (p.N / S::CHANNELS);

    // 1. which tiles are whole; a last round that is nearly full stays whole, as adding costs, too
    const int rest = tiles % blocks, whole = rest * 10 > blocks * 9 ? tiles : tiles - rest;
    const Shares shares = {(tiles - whole) * chunks, blocks};
    int next = shares.start(blockIdx.x), stop = shares.start(blockIdx.x + 1);

    // 2. whole tiles first, then this block's share
    for (int i = blockIdx.x; i < whole || next < stop; i += blocks) {
        int tile = i, first = 0, end = chunks, at = 0;
        if (i >= whole) {
            tile = whole + next / chunks;
            at = (tile - whole) * chunks;
            first = next - at;
            end = min(chunks, stop - at);
            next = at + end;
        }
        // Tiles of the same weights are neighbours, so the L2 cache serves them together.
        const int m0 = tile % tiles_m * TOKENS, n0 = tile / tiles_m * S::CHANNELS;
        tile_sums<TOKENS, TEAMS>(p, m0, n0, first, end);
        bool complete = end - first == chunks;
        if (!complete) complete = add_blocks<TOKENS, TEAMS>(p, shares, at, first, end);
        if (complete) write_sums<TOKENS, TEAMS>(p, m0, n0);
    }
}

/* ================================================================================================
 * 7  Clusters
 *
 * Another way to share K, in place of teams and stream-K: on Hopper the blocks of a cluster read
 * each other's shared memory. Each block computes a part of K of one large tile. Then each adds up
 * some tokens of the tile, straight from its neighbours, without a detour through global memory.
 * ============================================================================================== */

template <int TOKENS>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) cluster_kernel(const Gemm p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    namespace cg = cooperative_groups;
    using S = Shape<TOKENS, 1>;
    const int n0 = blockIdx.x * S::CHANNELS, m0 = blockIdx.z * TOKENS;
    const int blocks = gridDim.y, block = blockIdx.y, chunks = p.K / CHUNK;

    // 1. this block's part of K
    tile_sums<TOKENS, 1>(p, m0, n0, block * chunks / blocks, (block + 1) * chunks / blocks);
    cg::this_cluster().sync();

    // 2. this block's tokens, from the shared memory of all
    auto sums = [&](int row, int column) {
        int4 *mine = (int4 *)shared + (row * S::ROW + column) / 4, sum = {};
        for (int b = 0; b < blocks; b++) sum = sum + *cg::this_cluster().map_shared_rank(mine, b);
        return sum;
    };
    write_sums<TOKENS, 1>(p, m0, n0, block * TOKENS / blocks, (block + 1) * TOKENS / blocks, sums);
    cg::this_cluster().sync(); // no block ends while another reads its sums
#endif
}

/* ================================================================================================
 * 8  wgmma
 *
 * Rung 4 with Hopper's own instruction: mma.sync reaches about two thirds of what Hopper's tensor
 * cores can do. Four warps issue one wgmma of 64 channels x 128 tokens. It runs in the background
 * and reads the activations from shared memory by itself, so ldmatrix is gone, and the warps unpack
 * the next weights meanwhile. A warp's part of the operand and of the sums has the layout of
 * mma.sync: nothing else changes.
 *
 * Up to two steps of 32 k are in flight. So the chunk before the current one may still be read, and
 * copies run two chunks ahead instead of three.
 * ============================================================================================== */

constexpr int WIDE = 128;                       // tokens of a tile, from here on
constexpr int STAGE = WIDE * CHUNK + 8 * STRIP; // 256 channels

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int AHEAD = STAGES - 2; // chunks that copies are ahead

/* Waits until at most PENDING groups of wgmma still run. */
template <int PENDING> __device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

/* c [64][128] += a [64][32] . b [128][32]. b is in shared memory: rows of 128 bytes, 1024 bytes per
 * 8 rows, 16-byte pieces XORed with the row. */
__device__ void wgmma(int (&c)[16][4], const uint32_t (&a)[4], const uint8_t *b) {
    const uint64_t swizzle_128_bytes = 1, block_stride = 1024 >> 4, unused = 1;
    uint64_t matrix =
        swizzle_128_bytes << 62 | block_stride << 32 | unused << 16 | shared_address(b) >> 4;
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
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix));
#undef SUMS
}

/* Waits for all wgmma. The compiler does not know that they run in the background: the empty asm
 * keeps it from moving work on the sums up before the wait. */
__device__ __forceinline__ void wgmma_finish(int (&c)[2][WIDE / 8][4]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < WIDE; i++) asm volatile("" : "+r"(c[i / 64][i / 4 % 16][i % 4]));
}

/* multiply_chunk() by wgmma. The last step may still run when it returns. */
__device__ __forceinline__ void multiply_wgmma(int (&c)[2][WIDE / 8][4], const uint8_t *activations,
                                               const uint8_t *weights) {
    const int lane = threadIdx.x % 32;
    uint32_t a[2][2][4]; // [step % 2][m16 tile][register]: one half is read, one is made
#pragma unroll
    for (int step = 0; step < 4; step++) {
        // 1. the left operands of 32 k
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const uint8_t *from = weights + (step / 2 * 2 + t) * 512 + lane * 16;
            dequantize(a[step % 2][t], *(const uint4 *)from, step % 2);
        }

        // 2. start the products; the fence is for the registers that were just written
        asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
        for (int t = 0; t < 2; t++) wgmma(c[t], a[step % 2][t], activations + step * 32);
        asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");

        // 3. wait for the step before: its registers are free then
        wgmma_wait<1>();
    }
}
#endif

__global__ void __launch_bounds__(256) wgmma_kernel(const Gemm p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const int n0 = blockIdx.x * 256, m0 = blockIdx.y * WIDE, warp = threadIdx.x / 32;
    auto load = [&](int i) {
        uint8_t *stage = shared + i % STAGES * STAGE;
        if (i * CHUNK < p.K) load_chunk<WIDE, 256>(p, m0, n0, i * CHUNK, stage);
        copies_commit();
    };
    int c[2][WIDE / 8][4] = {};
    for (int i = 0; i < AHEAD; i++) load(i);
    for (int i = 0; i < p.K / CHUNK; i++) {
        // 1. chunk i is there, and wgmma sees what threads have copied
        copies_wait<AHEAD - 1>();
        asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
        __syncthreads();

        // 2. chunk i - 2 is no longer needed: ask for chunk i + 2 in its stage
        load(i + AHEAD);

        // 3. multiply chunk i
        const uint8_t *stage = shared + i % STAGES * STAGE;
        multiply_wgmma(c, stage, stage + WIDE * CHUNK + warp * STRIP);
    }
    wgmma_finish(c);
    write_tile(p, c, m0, n0 + warp * 32, 4);
#endif
}

/* ================================================================================================
 * 9  + TMA
 *
 * In rung 8 each thread computes addresses and issues 8 copies per chunk. The tensor memory
 * accelerator copies a whole box of a matrix for one instruction of one thread, and swizzles it on
 * the way. A barrier in shared memory counts the bytes: who waits for it sees the data.
 * ============================================================================================== */

/* What the TMA copies: activations [M][K] in boxes of [WIDE][CHUNK], weights [N/32][K * 16 bytes]
 * in boxes of [8][STRIP]. */
struct Maps {
    CUtensorMap activations, weights;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* A phase of a barrier ends when `count` threads have arrived and as many bytes have come as they
 * have announced. Phases have parity 0, 1, 0, ..; to wait for parity 1 before the first ends is no
 * wait. */
__device__ void barrier_init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count)
                 : "memory");
}

__device__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void barrier_arrive_and_expect(uint64_t *barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ void barrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{ .reg .pred over;\n"
                 "again_%=: mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n"
                 "@!over bra again_%=; }\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Barriers that were initialized can be seen by the TMA. */
__device__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

/* The box at column x (in 8 bytes) and row y. */
__device__ void copy_box(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
                 : "memory");
}

/* One thread has both boxes of a chunk copied to a stage. */
__device__ void copy_chunk(const Maps &maps, int m0, int n0, int chunk, uint8_t *stage,
                           uint64_t *full) {
    barrier_arrive_and_expect(full, STAGE);
    copy_box(stage, &maps.activations, chunk * CHUNK / 8, m0, full);
    copy_box(stage + WIDE * CHUNK, &maps.weights, chunk * STRIP / 8, n0 / 32, full);
}
#endif

__global__ void __launch_bounds__(256)
    tma_kernel(const __grid_constant__ Gemm p, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ uint64_t full[STAGES]; // a stage's data has come
    const int n0 = blockIdx.x * 256, m0 = blockIdx.y * WIDE, warp = threadIdx.x / 32;
    const int chunks = p.K / CHUNK;
    auto load = [&](int i) {
        uint8_t *stage = shared + i % STAGES * STAGE;
        if (i < chunks) copy_chunk(maps, m0, n0, i, stage, full + i % STAGES);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + i, 1);
        barriers_ready();
        for (int i = 0; i < AHEAD; i++) load(i);
    }
    __syncthreads(); // nobody waits for a barrier before it is one

    int c[2][WIDE / 8][4] = {};
    for (int i = 0; i < chunks; i++) {
        // 1. chunk i is there
        barrier_wait(full + i % STAGES, i / STAGES % 2);

        // 2. all warps are through with chunk i - 2: ask for chunk i + 2 in its stage
        __syncthreads();
        if (threadIdx.x == 0) load(i + AHEAD);

        // 3. multiply chunk i
        const uint8_t *stage = shared + i % STAGES * STAGE;
        multiply_wgmma(c, stage, stage + WIDE * CHUNK + warp * STRIP);
    }
    wgmma_finish(c);
    write_tile(p, c, m0, n0 + warp * 32, 4);
#endif
}

/* ================================================================================================
 * 10  + producer warps
 *
 * In rung 9 all warps meet at a barrier per chunk, as the thread that asks for copies multiplies,
 * too. Here a third group of warps, the producer, does nothing but ask. A second barrier per stage
 * tells it that the stage is free, so it runs ahead as far as there is memory, and the multiplying
 * warps never wait for each other. Blocks stay for several tiles: while the sums of one are written
 * the first chunks of the next are on their way. The producer gives its registers to the others.
 *
 * kernels.cu goes on from here: other sizes of tiles, chosen by a cost model, four wgmma at a time,
 * scales of groups, and teams for few tokens.
 * ============================================================================================== */

constexpr int DEEP = 6; // stages

__global__ void __launch_bounds__(384, 1)
    producer_kernel(const __grid_constant__ Gemm p, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ uint64_t full[DEEP], empty[DEEP]; // a stage's data has come; has been used
    const int chunks = p.K / CHUNK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles_m = (p.M + WIDE - 1) / WIDE, tiles = tiles_m * (p.N / 256);
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEEP; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 8); // warps
        }
        barriers_ready();
    }
    __syncthreads();

    // 1. the producer: chunk after chunk of all tiles of this block; i counts them
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n");
        if (threadIdx.x != 256) return;
        int i = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int m0 = tile % tiles_m * WIDE, n0 = tile / tiles_m * 256;
            for (int chunk = 0; chunk < chunks; chunk++, i++) {
                barrier_wait(empty + i % DEEP, i / DEEP % 2 ^ 1);
                copy_chunk(maps, m0, n0, chunk, shared + i % DEEP * STAGE, full + i % DEEP);
            }
        }
        return;
    }

    // 2. the others multiply them, in the same order
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
    int i = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int m0 = tile % tiles_m * WIDE, n0 = tile / tiles_m * 256;
        int c[2][WIDE / 8][4] = {};
        for (int chunk = 0; chunk < chunks; chunk++, i++) {
            barrier_wait(full + i % DEEP, i / DEEP % 2);
            const uint8_t *stage = shared + i % DEEP * STAGE;
            multiply_wgmma(c, stage, stage + WIDE * CHUNK + warp * STRIP);
            // the chunk before is through
            if (chunk > 0 && lane == 0) barrier_arrive(empty + (i - 1) % DEEP);
        }
        wgmma_finish(c);
        if (lane == 0) barrier_arrive(empty + (i - 1) % DEEP);
        write_tile(p, c, m0, n0 + warp * 32, 4);
    }
#endif
}

/* ================================================================================================
 * Launches
 * ============================================================================================== */

static cudaStream_t stream;
static int multiprocessors;

static void gpu(cudaError_t status) {
    if (status != cudaSuccess) die("CUDA: %s", cudaGetErrorString(status));
}

static int ceil_div(int x, int y) {
    return (x + y - 1) / y;
}

/* `shared` bytes of shared memory; the blocks of a cluster lie along y. */
static cudaLaunchConfig_t configure(void (*kernel)(Gemm), dim3 grid, int shared, int cluster) {
    static cudaLaunchAttribute attribute;
    gpu(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, (unsigned)cluster, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    return config;
}

static void launch(void (*kernel)(Gemm), dim3 grid, int shared, const Gemm &p, int cluster = 1) {
    cudaLaunchConfig_t config = configure(kernel, grid, shared, cluster);
    gpu(cudaLaunchKernelEx(&config, kernel, p));
}

static void naive(const Gemm &p) {
    launch(naive_kernel, dim3(p.N / 256, p.M), 0, p);
}

/* One block per tile. */
template <int TOKENS> static dim3 tiles(const Gemm &p, int channels) {
    return dim3(p.N / channels, ceil_div(p.M, TOKENS));
}

static void tile(const Gemm &p) {
    if (p.M <= 8) launch(tile_kernel<8>, tiles<8>(p, 256), 0, p);
    else if (p.M <= 64) launch(tile_kernel<64>, tiles<64>(p, 256), 0, p);
    else launch(tile_kernel<128>, tiles<128>(p, 256), 0, p);
}

static void fragment_order(const Gemm &p) {
    if (p.M <= 8) launch(fragment_order_kernel<8>, tiles<8>(p, 256), 0, p);
    else if (p.M <= 64) launch(fragment_order_kernel<64>, tiles<64>(p, 256), 0, p);
    else launch(fragment_order_kernel<128>, tiles<128>(p, 256), 0, p);
}

template <int TOKENS> static void pipeline(const Gemm &p) {
    launch(pipeline_kernel<TOKENS>, tiles<TOKENS>(p, 256), Shape<TOKENS, 1>::SHARED, p);
}

static void pipeline(const Gemm &p) {
    p.M <= 8 ? pipeline<8>(p) : p.M <= 64 ? pipeline<64>(p) : pipeline<128>(p);
}

template <int TOKENS, int TEAMS> static void teams(const Gemm &p) {
    using S = Shape<TOKENS, TEAMS>;
    launch(teams_kernel<TOKENS, TEAMS>, tiles<TOKENS>(p, S::CHANNELS), S::SHARED, p);
}

static void teams(const Gemm &p) {
    p.M <= 8 ? teams<8, 8>(p) : p.M <= 64 ? teams<64, 4>(p) : teams<128, 1>(p);
}

template <int TOKENS, int TEAMS> static void stream_k(const Gemm &p) {
    const int blocks = multiprocessors * (TOKENS <= 16 ? 2 : 1);
    launch(stream_k_kernel<TOKENS, TEAMS>, dim3(blocks), Shape<TOKENS, TEAMS>::SHARED, p);
}

static void stream_k(const Gemm &p) {
    p.M <= 8 ? stream_k<8, 8>(p) : p.M <= 64 ? stream_k<64, 4>(p) : stream_k<128, 1>(p);
}

/* As many blocks share a tile as all run at once, at most 8. */
template <int TOKENS> static void clusters(const Gemm &p) {
    constexpr int SHARED = Shape<TOKENS, 1>::SHARED;
    const int tiles_n = p.N / 256, tiles_m = ceil_div(p.M, TOKENS);
    int cluster = 8;
    for (; cluster > 1; cluster--) {
        int at_once;
        auto config =
            configure(cluster_kernel<TOKENS>, dim3(tiles_n, cluster, tiles_m), SHARED, cluster);
        gpu(cudaOccupancyMaxActiveClusters(&at_once, cluster_kernel<TOKENS>, &config));
        if (tiles_n * tiles_m <= at_once) break;
    }
    launch(cluster_kernel<TOKENS>, dim3(tiles_n, cluster, tiles_m), SHARED, p, cluster);
}

static void clusters(const Gemm &p) {
    p.M <= 8 ? clusters<8>(p) : p.M <= 64 ? clusters<64>(p) : clusters<128>(p);
}

static void wgmma(const Gemm &p) {
    launch(wgmma_kernel, tiles<WIDE>(p, 256), STAGES * STAGE, p);
}

/* A matrix [rows][bytes] for the TMA, in boxes [box_rows][box_bytes]. A box beyond the matrix is
 * filled with zeros. Its elements are 8 bytes, as a box has at most 256 of them in a row. */
static CUtensorMap tensor_map(const void *at, size_t rows, size_t bytes, unsigned box_rows,
                              unsigned box_bytes, CUtensorMapSwizzle swizzle) {
    void *encode = NULL;
    cudaDriverEntryPointQueryResult found;
    gpu(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                         cudaEnableDefault, &found));
    const cuuint64_t size[2] = {bytes / 8, rows}, stride[1] = {bytes};
    const cuuint32_t box[2] = {box_bytes / 8, box_rows}, step[2] = {1, 1};
    CUtensorMap map;
    CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 2, (void *)at, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) die("cuTensorMapEncodeTiled: error %d", result);
    return map;
}

static void launch(void (*kernel)(Gemm, Maps), dim3 grid, int threads, int shared, const Gemm &p) {
    Maps maps;
    maps.activations = tensor_map(p.a, p.M, p.K, WIDE, CHUNK, CU_TENSOR_MAP_SWIZZLE_128B);
    maps.weights =
        tensor_map(p.w, p.N / 32, (size_t)p.K * 16, 256 / 32, STRIP, CU_TENSOR_MAP_SWIZZLE_NONE);
    gpu(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<grid, threads, shared, stream>>>(p, maps);
    gpu(cudaGetLastError());
}

static void tma(const Gemm &p) {
    launch(tma_kernel, tiles<WIDE>(p, 256), 256, STAGES * STAGE, p);
}

static void producers(const Gemm &p) {
    int tiles = p.N / 256 * ceil_div(p.M, WIDE);
    launch(producer_kernel, dim3(std::min(tiles, multiprocessors)), 384, DEEP * STAGE, p);
}

static GpuLinear product_linear; // the copy of the weights in use

static void product(const Gemm &p) {
    gpu_gemm_w4a8(&product_linear, p.a, p.s_a, p.M, p.y, NULL, stream);
}

static const struct Rung {
    const char *name;
    void (*launch)(const Gemm &);
    bool hopper; // Hopper only
    int min_M;   // fewer tokens would waste most of a tile
} rungs[] = {{"1 naive", naive, false, 1},
             {"2 mma.sync", tile, false, 1},
             {"3 fragment order", fragment_order, false, 1},
             {"4 pipeline", pipeline, false, 1},
             {"5 teams along K", teams, false, 1},
             {"6 stream-K", stream_k, false, 1},
             {"7 clusters", clusters, true, 1},
             {"8 wgmma", wgmma, true, 128},
             {"9 + TMA", tma, true, 128},
             {"10 + producer warps", producers, true, 128},
             {"kernels.cu", product, false, 1}};
constexpr int N_RUNGS = sizeof rungs / sizeof *rungs;

static const int tokens[] = {1, 64, 1024, 4096};
constexpr int N_TOKENS = sizeof tokens / sizeof *tokens, MAX_M = 4096;

/* ================================================================================================
 * The limit
 * ============================================================================================== */

static int attribute(cudaDeviceAttr which) {
    int value;
    gpu(cudaDeviceGetAttribute(&value, which, 0));
    return value;
}

/* int8 multiply-adds per multiprocessor and clock, dense; 0 if not known. */
static int int8_rate() {
    switch (attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
            attribute(cudaDevAttrComputeCapabilityMinor)) {
    case 80:
        return 2048; // A100
    case 86:
    case 89:
        return 1024;
    case 90:
        return 4096; // H100, H200
    default:
        return 0;
    }
}

/* Microseconds: weights and activations read and y written once at the memory's rate, or all
 * products at the tensor cores' rate at the highest clock, whichever takes longer. */
static double limit_us(int M, int N, int K) {
    const double bytes = (double)N * K / 2 + (double)M * K + 2.0 * M * N;
    const double kilohertz = attribute(cudaDevAttrMemoryClockRate);
    const double bytes_per_us = 2e-3 * kilohertz * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
    const double products = (double)M * N * K;
    const double products_per_us =
        1e-3 * attribute(cudaDevAttrClockRate) * multiprocessors * int8_rate();
    if (products_per_us == 0) return NAN;
    return std::max(bytes / bytes_per_us, products / products_per_us);
}

/* ================================================================================================
 * Check and time
 * ============================================================================================== */

constexpr size_t ROTATED = 300 << 20; // bytes of weights to go through: far beyond the L2 cache

/* Device memory, there until the end. */
template <typename T> static T *device(size_t n) {
    void *p;
    gpu(cudaMalloc(&p, n * sizeof(T)));
    return (T *)p;
}

static uint64_t random64() { // splitmix64
    static uint64_t state;
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

template <typename T> static T *upload(const std::vector<T> &x) {
    T *to = device<T>(x.size());
    gpu(cudaMemcpy(to, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
}

template <typename T> static std::vector<T> download(const T *from, size_t n) {
    std::vector<T> x(n);
    gpu(cudaMemcpy(x.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
}

/* The same numbers in FP16, for cuBLAS: activations a or codes qweight. */
__global__ void halves_kernel(const int8_t *a, const uint8_t *qweight, size_t n, half *to) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = a ? a[i] : (qweight[i / 2] >> i % 2 * 4 & 15) - 8;
}

/* Microseconds of one launch(i): the median of 5 graphs of `count`; if slow, of one launch. */
template <typename Launch> static double time_us(int count, Launch launch) {
    cudaEvent_t start, stop;
    gpu(cudaEventCreate(&start));
    gpu(cudaEventCreate(&stop));
    auto once = [&](auto body) {
        float ms;
        gpu(cudaEventRecord(start, stream));
        body();
        gpu(cudaEventRecord(stop, stream));
        gpu(cudaEventSynchronize(stop));
        gpu(cudaEventElapsedTime(&ms, start, stop));
        return ms * 1000.0;
    };

    // 1. the first launch may have to load code or to choose it
    launch(0);
    double us = once([&] { launch(0); });

    // 2. a graph has no gaps between launches
    if (us < 20000) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < count; i++) launch(i);
        gpu(cudaStreamEndCapture(stream, &graph));
        gpu(cudaGraphInstantiate(&exec, graph, 0));
        std::vector<double> rounds;
        usleep(20000); // so that no kernel pays for the heat of the one before
        for (int i = 0; i < 6; i++) {
            double t = once([&] { gpu(cudaGraphLaunch(exec, stream)); });
            if (i > 0) rounds.push_back(t / count);
        }
        std::sort(rounds.begin(), rounds.end());
        us = rounds[2];
        gpu(cudaGraphExecDestroy(exec));
        gpu(cudaGraphDestroy(graph));
    }
    gpu(cudaEventDestroy(start));
    gpu(cudaEventDestroy(stop));
    return us;
}

/* One product y = W a and its data. */
struct Problem {
    const char *name;
    int N, K;
    size_t bytes; // of the weights
    std::vector<uint8_t> qweight;
    std::vector<float> s_channel, s_a;
    std::vector<int8_t> a;
    Gemm gemm;            // on the GPU
    GpuLinear linear;     // for kernels.cu
    int copies, copies16; // of the weights, so that none stays in a cache
    uint8_t *file, *w;    // [copies][bytes] as in the file; as fragments
    half *x16, *w16;      // activations; [copies16] of the weights
    int *acc;             // [MAX_M][N]
};

/* Random weights, activations and scales. */
static Problem make_problem(const char *name, int N, int K) {
    Problem p = {};
    p.name = name;
    p.N = N;
    p.K = K;
    p.bytes = (size_t)N * K / 2;
    p.qweight.resize(p.bytes);
    p.s_channel.resize(N);
    p.s_a.resize(MAX_M);
    p.a.resize((size_t)MAX_M * K);
    for (uint8_t &codes : p.qweight) { // no code 0 per channel
        uint64_t r = random64();
        codes = (1 + r % 15) | (1 + (r >> 32) % 15) << 4;
    }
    for (float &s : p.s_channel) s = (1 + random64() % 1000) * 1e-5f;
    for (float &s : p.s_a) s = (1 + random64() % 1000) * 1e-5f;
    for (int8_t &x : p.a) x = (int8_t)random64();
    return p;
}

/* All that the kernels read, with copies of the weights in each form. */
static void upload_problem(Problem &p) {
    const size_t words = p.bytes / 4;
    p.copies = ROTATED / p.bytes + 1;
    p.copies16 = ROTATED / (p.bytes * 4) + 1;
    p.file = device<uint8_t>(p.copies * p.bytes);
    p.w = device<uint8_t>(p.copies * p.bytes);
    p.x16 = device<half>(p.a.size());
    p.w16 = device<half>(p.copies16 * p.bytes * 2);

    // 1. the weights as in the file, and in fragment order, which must be that of kernels.cu
    gpu(cudaMemcpy(p.file, p.qweight.data(), p.bytes, cudaMemcpyHostToDevice));
    fragment_kernel<<<ceil_div(words, 256), 256>>>(p.file, p.N, p.K, (uint32_t *)p.w);
    gpu(cudaGetLastError());
    Linear l = {};
    l.N = p.N;
    l.K = p.K;
    l.dtype = U8;
    l.qweight = p.qweight.data();
    l.s_channel = p.s_channel.data();
    p.linear = gpu_linear_create(&l, 1);
    if (download((uint32_t *)p.w, words) != download(p.linear.w, words)) {
        die("the fragments of rung 3 are not those of kernels.cu");
    }

    // 2. copies
    for (int i = 1; i < p.copies; i++) {
        gpu(cudaMemcpy(p.file + i * p.bytes, p.file, p.bytes, cudaMemcpyDeviceToDevice));
        gpu(cudaMemcpy(p.w + i * p.bytes, p.w, p.bytes, cudaMemcpyDeviceToDevice));
    }

    // 3. the rest
    Gemm &g = p.gemm;
    g = {};
    g.N = p.N;
    g.K = p.K;
    g.a = upload(p.a);
    g.s_a = upload(p.s_a);
    g.s_channel = upload(p.s_channel);
    g.y = device<half>((size_t)MAX_M * p.N);
    g.partial = device<int4>((size_t)multiprocessors * 2 * Shape<128, 1>::SHARED / 16);
    g.arrived = device<int>(2 * multiprocessors); // shared tiles are fewer than blocks
    gpu(cudaMemset(g.arrived, 0, 2 * multiprocessors * sizeof(int)));
    p.acc = device<int>((size_t)MAX_M * p.N);

    // 4. in FP16
    halves_kernel<<<ceil_div(p.a.size(), 256), 256>>>(g.a, NULL, p.a.size(), p.x16);
    for (int i = 0; i < p.copies16; i++) {
        half *to = p.w16 + i * p.bytes * 2;
        halves_kernel<<<ceil_div(p.bytes * 2, 256), 256>>>(NULL, p.file, p.bytes * 2, to);
    }
    gpu(cudaGetLastError());
}

/* Uses this copy of the weights from now on. */
static void use(Problem &p, int copy) {
    const size_t at = copy % p.copies * p.bytes;
    p.gemm.qweight = p.file + at;
    p.gemm.w = (const uint4 *)(p.w + at);
    product_linear = p.linear;
    product_linear.w = (uint32_t *)(p.w + at);
}

/* Sums acc [M][N] against the definition: four tokens, first and last among them. */
static void check_plain(const Problem &p, int M, const std::vector<int> &acc) {
    for (int t = 0; t < std::min(M, 4); t++) {
        const size_t m = M > 1 ? (size_t)t * (M - 1) / (std::min(M, 4) - 1) : 0;
        const int8_t *a = p.a.data() + m * p.K;
        for (int n = 0; n < p.N; n++) {
            const uint8_t *codes = p.qweight.data() + (size_t)n * (p.K / 2);
            int sum = 0;
            for (int i = 0; i < p.K / 2; i++) {
                sum += ((codes[i] & 15) - 8) * a[2 * i] + ((codes[i] >> 4) - 8) * a[2 * i + 1];
            }
            if (sum != acc[m * p.N + n]) die("naive: y[%zu][%d] of M = %d is wrong", m, n, M);
        }
    }
}

/* What the naive kernel computed. */
struct Result {
    std::vector<int> sums;
    std::vector<uint16_t> y;
};

/* Runs a rung once: the first one's sums are checked in C, later ones must equal them. kernels.cu
 * leaves no sums: there y must be equal. */
static void check_rung(Problem &p, const Rung &rung, Result &first) {
    const size_t n = (size_t)p.gemm.M * p.N;
    Gemm g = p.gemm;
    g.acc = p.acc;
    gpu(cudaMemset(g.y, 0xff, n * sizeof(half)));
    gpu(cudaMemset(g.acc, 0xff, n * sizeof(int)));
    rung.launch(g);
    gpu(cudaStreamSynchronize(stream));
    auto sums = download(p.acc, n);
    auto y = download((uint16_t *)g.y, n);
    if (rung.launch == naive) {
        check_plain(p, g.M, sums);
        first = {sums, y};
    } else if (y != first.y || (rung.launch != product && sums != first.sums)) {
        die("%s, M = %d: not what rung 1 computes", rung.name, g.M);
    }
}

static double time_cublas(Problem &p, cublasHandle_t cublas) {
    return time_us(std::max(p.copies16, 10), [&](int copy) {
        const half *w = p.w16 + copy % p.copies16 * p.bytes * 2;
        float one = 1, zero = 0;
        if (cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, p.N, p.gemm.M, p.K, &one, w, CUDA_R_16F,
                         p.K, p.x16, CUDA_R_16F, p.K, &zero, p.gemm.y, CUDA_R_16F, p.N,
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)) {
            die("cublasGemmEx failed");
        }
    });
}

static void print_table(const Problem &p, const double (&us)[N_RUNGS][N_TOKENS],
                        const double (&cublas)[N_TOKENS]) {
    printf("\n%s, N=%d K=%d, per channel: microseconds, times faster than cuBLAS FP16, %% of the "
           "limit\n%-20s",
           p.name, p.N, p.K, "");
    for (int M : tokens) printf("%23s", ("M = " + std::to_string(M)).c_str());
    printf("\n%-20s", "limit");
    for (int M : tokens) printf("%11.1f            ", limit_us(M, p.N, p.K));
    printf("\n%-20s", "cuBLAS FP16");
    for (double t : cublas) printf("%11.1f            ", t);
    for (int r = 0; r < N_RUNGS; r++) {
        printf("\n%-20s", rungs[r].name);
        for (int i = 0; i < N_TOKENS; i++) {
            const double t = us[r][i], limit = limit_us(tokens[i], p.N, p.K);
            if (t > 0) printf("%11.1f%6.2f%5.1f%%", t, cublas[i] / t, 100 * limit / t);
            else printf("%11s            ", "-");
        }
    }
    printf("\n");
    fflush(stdout);
}

static void climb(const char *name, int N, int K, bool hopper, cublasHandle_t cublas) {
    Problem p = make_problem(name, N, K);
    upload_problem(p);
    double us[N_RUNGS][N_TOKENS] = {}, cublas_us[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++) {
        p.gemm.M = tokens[i];
        Result first;
        for (int r = 0; r < N_RUNGS; r++) {
            if ((rungs[r].hopper && !hopper) || tokens[i] < rungs[r].min_M) continue;
            use(p, 0);
            check_rung(p, rungs[r], first);
            us[r][i] = time_us(std::max(p.copies, 10), [&](int copy) {
                use(p, copy);
                rungs[r].launch(p.gemm);
            });
        }
        cublas_us[i] = time_cublas(p, cublas);
    }
    print_table(p, us, cublas_us);
}

int main() {
    cudaDeviceProp properties;
    gpu(cudaGetDeviceProperties(&properties, 0));
    multiprocessors = properties.multiProcessorCount;
    gpu(cudaStreamCreate(&stream));
    cublasHandle_t cublas;
    if (cublasCreate(&cublas)) die("cublasCreate failed");
    cublasSetStream(cublas, stream);
    cublasSetWorkspace(cublas, device<uint8_t>(64 << 20), 64 << 20);
    printf("%s, all sums equal\n", properties.name);
    const bool hopper = properties.major == 9;
    climb("paper", 8192, 21760, hopper, cublas);
    climb("8B qkv", 6144, 4096, hopper, cublas);
    cublasDestroy(cublas);
    return 0;
}
