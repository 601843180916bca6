/* The ladder: the W4A8 GEMM in eight steps, from twenty lines to wgmma, each with its time.
 *
 *     y[m][n] = (sum_k a[m][k] q[n][k]) * s_a[m] * s_channel[n]       per channel, the sum in int32
 *
 * Each rung is a kernel of its own and says what it adds and why that should be faster; read them
 * in order. The last row is what kernels.cu takes, which stands on most of them. Each rung's sums
 * are compared with the first one's, all of them, and the first one's with the C code's.
 *
 * A rung is as short as can be, so it may be slower than its idea: N must be a multiple of 256, K
 * of 128, and 128 tokens take 128 KB of shared memory (A100, H100). */
#include "../../files.h"

#include <algorithm>
#include <cooperative_groups.h>
#include <cublas_v2.h>
#include <unistd.h>
#include <vector>

struct Gemm {
    int M, N, K;
    const uint8_t *qweight; // [N][K/2] as in the file
    const uint4 *w;         // [N/16][K/64][32] in fragment order, from rung 3 on
    const float *s_channel; // [N]
    const int8_t *a;        // [M][K]
    const float *s_a;       // [M]
    half *y;                // [M][N]
    int *acc;               // [M][N] the sums; NULL where only time counts
    int4 *partial;          // [blocks][2] tiles of sums, for rung 6
    int *arrived;           // [tiles] zeros: chunks of K whose sums are in `partial`
};

__device__ half output(const Gemm &p, int m, int n, int sum) {
    if (p.acc) p.acc[(size_t)m * p.N + n] = sum;
    return __float2half_rn(
        __fmul_rn(__fmul_rn((float)sum, __ldg(p.s_a + m)), __ldg(p.s_channel + n)));
}

/* ================================================================================================
 * 1  Naive
 *
 * One thread an output. It reads its row of weights byte by byte, far from its neighbours' rows, so
 * most of each line that comes from memory waits in the cache; and it multiplies one by one.
 * ============================================================================================== */

__global__ void naive_kernel(const Gemm p) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y;
    int sum = 0;
    for (int i = 0; i < p.K / 2; i++) {
        int codes = p.qweight[(size_t)n * (p.K / 2) + i]; // u = q + 8, two a byte
        const int8_t *a = p.a + (size_t)m * p.K + 2 * i;
        sum += ((codes & 15) - 8) * a[0] + ((codes >> 4) - 8) * a[1];
    }
    p.y[(size_t)m * p.N + n] = output(p, m, n, sum);
}

/* ================================================================================================
 * 2  mma.sync, one tile a block
 *
 * The tensor cores multiply 16 channels x 32 k by 32 k x 8 tokens in one instruction of a warp. A
 * warp takes 32 channels and all tokens of the tile, so each weight is read and unpacked once for
 * 8, 64 or 128 tokens. It computes y^T: then few tokens waste little of the instruction.
 *
 * Lane l holds, of the left operand (weights), rows l / 4 and l / 4 + 8, k = l % 4 * 4 .. + 3 and
 * the same 16 further on; of the right one (activations) token l / 4 and the same k; of the sums
 * rows l / 4 and l / 4 + 8, tokens l % 4 * 2 and + 1. As rows r and r + 8 it takes channels 2r and
 * 2r + 1, which are neighbours in y.
 * ============================================================================================== */

__device__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A warp's 32 channels from n0, all tokens of the tile from m0. */
template <int TOKENS>
__device__ void write_tile(const Gemm &p, const int (&c)[2][TOKENS / 8][4], int m0, int n0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            int m = m0 + i / 2 * 8 + lane % 4 * 2 + i % 2, n = n0 + t * 16 + lane / 4 * 2;
            if (m >= p.M) continue;
            half2 pair = {output(p, m, n, c[t][i / 2][i % 2]),
                          output(p, m, n + 1, c[t][i / 2][2 + i % 2])};
            *(half2 *)(p.y + (size_t)m * p.N + n) = pair;
        }
    }
}

/* Four int8 q from four codes u = q + 8. */
__device__ uint32_t unpack(uint32_t codes) {
    codes = (codes | codes << 8) & 0x00ff00ff;
    codes = (codes | codes << 4) & 0x0f0f0f0f;
    return __vsub4(codes, 0x08080808);
}

template <int TOKENS> __global__ void __launch_bounds__(256) tile_kernel(const Gemm p) {
    const int lane = threadIdx.x % 32;
    const int n0 = blockIdx.x * 256 + threadIdx.x / 32 * 32, m0 = blockIdx.y * TOKENS;
    int c[2][TOKENS / 8][4] = {};
    for (int k = lane % 4 * 4; k < p.K; k += 32) {
        uint32_t a[2][4];
        for (int i = 0; i < 8; i++) { // register 0: row l / 4; 1: 8 rows below; 2, 3: 16 k further
            int n = n0 + i / 4 * 16 + lane / 4 * 2 + i % 2;
            size_t at = (size_t)n * (p.K / 2) + (k + i % 4 / 2 * 16) / 2;
            a[i / 4][i % 4] = unpack(*(const uint16_t *)(p.qweight + at));
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            int m = min(m0 + j * 8 + lane / 4, p.M - 1);
            const uint32_t *b = (const uint32_t *)(p.a + (size_t)m * p.K + k);
            for (int t = 0; t < 2; t++) mma(c[t][j], a[t], b[0], b[4]);
        }
    }
    write_tile<TOKENS>(p, c, m0, n0);
}

/* ================================================================================================
 * 3  Weights in fragment order
 *
 * Rung 2 fetches two bytes a lane from eight rows. Laid out beforehand in the order of the mma's
 * operand (Marlin, arXiv 2408.11743), 64 k of 16 channels are 512 bytes in a row, 16 a lane. The
 * codes of k and k + 32 share a byte, as two's complement: in the high half of its byte a code *is*
 * 16 q, so one AND (and a shift, for the low half) unpacks four. The sums are 16 times as large.
 * ============================================================================================== */

/* One thread a 32-bit word: w [N/16][K/64][lane][register]. */
__global__ void fragment_kernel(const uint8_t *qweight, int N, int K, uint32_t *w) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * K / 8) return;
    int reg = i % 4, lane = i / 4 % 32;
    int k = i / 128 % (K / 64) * 64 + reg / 2 * 16 + lane % 4 * 4;
    int n = i / 128 / (K / 64) * 16 + lane / 4 * 2 + reg % 2;
    uint32_t word = 0;
    for (int j = 0; j < 8; j++) { // byte j % 4, its low half for k, its high one for k + 32
        int at = k + j % 4 + j / 4 * 32;
        uint32_t code = qweight[((size_t)n * K + at) / 2] >> at % 2 * 4 & 15;
        word |= (code ^ 8) << (j % 4 * 8 + j / 4 * 4);
    }
    w[i] = word;
}

/* Left operands of k32 step 0 or 1 from 16 bytes of fragments. */
__device__ void dequantize(uint32_t (&a)[4], uint4 w, int step) {
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
    for (int r = 0; r < 4; r++) a[r] = (step ? words[r] : words[r] << 4) & 0xf0f0f0f0;
}

/* The sums are of 16 q: divided, exactly. */
template <int TOKENS> __device__ void divide_by_16(int (&c)[2][TOKENS / 8][4]) {
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) c[t][i / 4][i % 4] >>= 4;
    }
}

template <int TOKENS> __global__ void __launch_bounds__(256) fragment_order_kernel(const Gemm p) {
    const int lane = threadIdx.x % 32;
    const int n0 = blockIdx.x * 256 + threadIdx.x / 32 * 32, m0 = blockIdx.y * TOKENS;
    int c[2][TOKENS / 8][4] = {};
    for (int k = 0; k < p.K; k += 64) {
        uint4 w[2];
        for (int t = 0; t < 2; t++) {
            w[t] = p.w[((size_t)(n0 / 16 + t) * (p.K / 64) + k / 64) * 32 + lane];
        }
        for (int step = 0; step < 2; step++) {
            uint32_t a[2][4];
            for (int t = 0; t < 2; t++) dequantize(a[t], w[t], step);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
                int m = min(m0 + j * 8 + lane / 4, p.M - 1);
                const int8_t *row = p.a + (size_t)m * p.K + k + step * 32;
                const uint32_t *b = (const uint32_t *)row + lane % 4;
                for (int t = 0; t < 2; t++) mma(c[t][j], a[t], b[0], b[4]);
            }
        }
    }
    divide_by_16<TOKENS>(c);
    write_tile<TOKENS>(p, c, m0, n0);
}

/* ================================================================================================
 * 4  Asynchronous pipeline
 *
 * A warp of rung 3 waits for what it has just asked for. cp.async copies into shared memory in the
 * background, three chunks of 128 k ahead of the one in work. And the activations, which all eight
 * warps need, come from memory once a block instead of once a warp.
 * ============================================================================================== */

constexpr int STAGES = 4;  // chunks in shared memory
constexpr int CHUNK = 128; // k

/* The team of warps that shares a chunk, 32 channels each; until rung 5 that is the block. */
template <int TOKENS, int TEAMS> struct Shape {
    static constexpr int THREADS = 256 / TEAMS;    // of a team
    static constexpr int CHANNELS = THREADS;       // of a tile: 32 a warp
    static constexpr int WEIGHTS = TOKENS * CHUNK; // where they begin in a stage, bytes
    static constexpr int STAGE = WEIGHTS + CHANNELS * CHUNK / 2;
    static constexpr int ROW = CHANNELS + 4; // of the sums in shared memory, from rung 5
    static constexpr int SHARED = std::max(TEAMS * STAGES * STAGE, TOKENS *ROW * 4);
};

extern __shared__ __align__(1024) uint8_t shared[];

__device__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

/* What this thread has asked for since the last call becomes one group. */
__device__ void copies_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/* Until at most PENDING of this thread's groups are still on their way. */
template <int PENDING> __device__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

/* A stage: activations [TOKENS][128 bytes], each 16-byte piece XORed with its row, so that a column
 * of 8 rows lies in different banks; then weights [warp][64 k][m16 tile][lane][16 bytes]. Tokens
 * past the end repeat the last one: nobody looks at their sums. */
template <int TOKENS, int TEAMS>
__device__ void load_stage(const Gemm &p, int m0, int n0, int k, uint8_t *stage) {
    using S = Shape<TOKENS, TEAMS>;
    const int thread = threadIdx.x % S::THREADS, lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int i = thread; i < TOKENS * 8; i += S::THREADS) {
        int row = i / 8, piece = i % 8, m = min(m0 + row, p.M - 1);
        copy_async(stage + row * 128 + (piece ^ row % 8) * 16,
                   p.a + (size_t)m * p.K + k + piece * 16);
    }
    for (int i = 0; i < 4; i++) {
        size_t tile = n0 / 16 + warp * 2 + i % 2, unit = k / 64 + i / 2;
        copy_async(stage + S::WEIGHTS + (warp * 4 + i) * 512 + lane * 16,
                   p.w + (tile * (p.K / 64) + unit) * 32 + lane);
    }
}

/* Four 8 x 16-byte matrices: lanes 8i .. 8i + 7 name the rows of matrix i, lane l receives of each
 * row l / 4, bytes l % 4 * 4 .. + 3: the right operand of mma. */
__device__ void load_matrices(uint32_t (&b)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(row)));
}

__device__ uint4 stage_weights(const uint8_t *weights, int unit, int tile) {
    const int lane = threadIdx.x % 32;
    return *(const uint4 *)(weights + (unit * 2 + tile) * 512 + lane * 16);
}

/* c += a warp's weights times the activations, 128 k. One ldmatrix reads 8 tokens x 64 k. */
template <int TOKENS>
__device__ void multiply_stage(int (&c)[2][TOKENS / 8][4], const uint8_t *stage,
                               const uint8_t *weights) {
    const int lane = threadIdx.x % 32;
    for (int u = 0; u < 2; u++) {
        uint32_t a[2][2][4]; // [step][m16 tile][register]
        for (int i = 0; i < 4; i++)
            dequantize(a[i / 2][i % 2], stage_weights(weights, u, i % 2), i / 2);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            uint32_t b[4];
            load_matrices(b,
                          stage + (j * 8 + lane % 8) * 128 + ((u * 4 + lane / 8) ^ lane % 8) * 16);
            for (int i = 0; i < 4; i++)
                mma(c[i % 2][j], a[i / 2][i % 2], b[i / 2 * 2], b[i / 2 * 2 + 1]);
        }
    }
}

template <int TOKENS> __global__ void __launch_bounds__(256) pipeline_kernel(const Gemm p) {
    using S = Shape<TOKENS, 1>;
    const int n0 = blockIdx.x * 256, m0 = blockIdx.y * TOKENS, warp = threadIdx.x / 32;
    auto load = [&](int i) {
        if (i * CHUNK < p.K)
            load_stage<TOKENS, 1>(p, m0, n0, i * CHUNK, shared + i % STAGES * S::STAGE);
        copies_commit();
    };
    int c[2][TOKENS / 8][4] = {};
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int i = 0; i < p.K / CHUNK; i++) {
        copies_wait<STAGES - 2>(); // this thread's part of chunk i is there;
        __syncthreads();           // everyone's is, and chunk i - 1 is no longer needed
        load(i + STAGES - 1);      // in its place
        const uint8_t *stage = shared + i % STAGES * S::STAGE;
        multiply_stage<TOKENS>(c, stage, stage + S::WEIGHTS + warp * 2048);
    }
    divide_by_16<TOKENS>(c);
    write_tile<TOKENS>(p, c, m0, n0 + warp * 32);
}

/* ================================================================================================
 * 5  Teams along K
 *
 * With 256 channels a tile, 8192 channels and few tokens keep 32 of 132 multiprocessors busy. So
 * the eight warps form teams: a tile becomes as narrow as one team, there are more tiles, and the
 * teams take turns at the chunks of K. At the end their sums are added up in shared memory.
 * ============================================================================================== */

template <int THREADS> __device__ void team_barrier(int team) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(team + 1), "n"(THREADS) : "memory");
}

template <int TOKENS, int TEAMS> __device__ void add_teams(int (&c)[2][TOKENS / 8][4], int team) {
    using S = Shape<TOKENS, TEAMS>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % S::THREADS / 32;
    int *sums = (int *)shared + lane % 4 * 2 * S::ROW + warp * 32 + lane / 4 * 2;
    divide_by_16<TOKENS>(c);
    for (int turn = 0; turn < 2; turn++) { // the first team writes, then the others add
        __syncthreads();
        if ((team > 0) != turn) continue;
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) {
                int *to = sums + (i / 2 * 8 + i % 2) * S::ROW + t * 16;
                int2 pair = {c[t][i / 2][i % 2], c[t][i / 2][2 + i % 2]};
                if (team == 0) {
                    *(int2 *)to = pair;
                } else {
                    atomicAdd(to, pair.x);
                    atomicAdd(to + 1, pair.y);
                }
            }
        }
    }
    __syncthreads();
}

template <int TOKENS>
__device__ void multiply_stage_wgmma(int (&c)[2][TOKENS / 8][4], const uint8_t *stage,
                                     const uint8_t *weights); // rung 8

template <bool WGMMA> __device__ void wgmma_fence_shared();
template <bool WGMMA> __device__ void wgmma_finish();

/* The sums of a tile over the chunks `first` to `end` of K, in shared memory as [TOKENS][ROW]. */
template <int TOKENS, int TEAMS, bool WGMMA>
__device__ void tile_sums(const Gemm &p, int m0, int n0, int first, int end) {
    using S = Shape<TOKENS, TEAMS>;
    // wgmma may still read the chunk before the one that is multiplied.
    constexpr int AHEAD = WGMMA ? STAGES - 2 : STAGES - 1;
    const int team = threadIdx.x / S::THREADS, warp = threadIdx.x % S::THREADS / 32;
    uint8_t *stages = shared + team * STAGES * S::STAGE;
    auto load = [&](int i) { // the team's i-th chunk
        int k = (first + i * TEAMS + team) * CHUNK;
        if (k < end * CHUNK)
            load_stage<TOKENS, TEAMS>(p, m0, n0, k, stages + i % STAGES * S::STAGE);
        copies_commit();
    };
    int c[2][TOKENS / 8][4] = {};
    __syncthreads(); // the sums of the tile before have been read
    for (int i = 0; i < AHEAD; i++) load(i);
    const int chunks = (end - first - team + TEAMS - 1) / TEAMS;
    for (int i = 0; i < chunks; i++) {
        copies_wait<AHEAD - 1>();
        wgmma_fence_shared<WGMMA>();
        team_barrier<S::THREADS>(team);
        load(i + AHEAD);
        const uint8_t *stage = stages + i % STAGES * S::STAGE;
        const uint8_t *weights = stage + S::WEIGHTS + warp * 2048;
        if constexpr (WGMMA) {
            multiply_stage_wgmma<TOKENS>(c, stage, weights);
        } else {
            multiply_stage<TOKENS>(c, stage, weights);
        }
    }
    wgmma_finish<WGMMA>();
    add_teams<TOKENS, TEAMS>(c, team);
}

/* Tokens first to end of a tile to y; sums(token, channel) are those of 4 channels. */
template <int TOKENS, int TEAMS, typename Sums>
__device__ void write_sums(const Gemm &p, int m0, int n0, int first, int end, Sums sums) {
    using S = Shape<TOKENS, TEAMS>;
    for (int i = first * S::CHANNELS + threadIdx.x * 4; i < end * S::CHANNELS; i += 256 * 4) {
        int row = i / S::CHANNELS, column = i % S::CHANNELS, m = m0 + row, n = n0 + column;
        if (m >= p.M) break;
        int4 sum = sums(row, column);
        half2 out[2] = {{output(p, m, n, sum.x), output(p, m, n + 1, sum.y)},
                        {output(p, m, n + 2, sum.z), output(p, m, n + 3, sum.w)}};
        *(uint2 *)(p.y + (size_t)m * p.N + n) = *(uint2 *)out;
    }
}

template <int TOKENS, int TEAMS> __device__ void write_sums(const Gemm &p, int m0, int n0) {
    write_sums<TOKENS, TEAMS>(p, m0, n0, 0, TOKENS, [](int row, int column) {
        return ((int4 *)shared)[(row * Shape<TOKENS, TEAMS>::ROW + column) / 4];
    });
}

template <int TOKENS, int TEAMS>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) teams_kernel(const Gemm p) {
    const int n0 = blockIdx.x * Shape<TOKENS, TEAMS>::CHANNELS, m0 = blockIdx.y * TOKENS;
    tile_sums<TOKENS, TEAMS, false>(p, m0, n0, 0, p.K / CHUNK);
    write_sums<TOKENS, TEAMS>(p, m0, n0);
}

/* ================================================================================================
 * 6  Stream-K
 *
 * 192 tiles on 132 multiprocessors are two rounds, the second half empty. Stream-K (arXiv
 * 2301.03598) starts as many blocks as run at once; the tiles of an incomplete round are cut into
 * chunks of K and shared out evenly. Blocks that meet in a tile add their sums in global memory;
 * the one that completes them writes y. Integers add up to the same in any order.
 * ============================================================================================== */

__device__ int4 operator+(int4 x, int4 y) {
    return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

/* The chunks of K of all tiles that are shared, one after the other; block b's begin at start(b).
 */
struct Shares {
    int total, blocks;
    __device__ int start(int b) const { return (int)((long long)total * b / blocks); }
    __device__ int owner(int chunk) const { // the b with start(b) <= chunk < start(b + 1)
        return (int)(((long long)(chunk + 1) * blocks - 1) / total);
    }
};

/* Leaves the chunks from `first` to `end` of a tile's sums in `partial`; true for the block that
 * completes the tile, which then has them all. `at` is where the tile begins in the shares. A block
 * meets at most two tiles, the second from its first chunk on: these are its places. */
template <int TOKENS, int TEAMS>
__device__ bool add_blocks(const Gemm &p, const Shares &shares, int at, int first, int end) {
    constexpr int SIZE = TOKENS * Shape<TOKENS, TEAMS>::ROW / 4;
    __shared__ bool last;
    const int chunks = p.K / CHUNK, tile = at / chunks;
    int4 *sums = (int4 *)shared, *mine = p.partial + (size_t)(blockIdx.x * 2 + (first == 0)) * SIZE;
#pragma unroll 8
    for (int i = threadIdx.x; i < SIZE; i += 256) mine[i] = sums[i];
    __threadfence(); // the sums before the count
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(p.arrived + tile, end - first) + end - first == chunks;
        if (last) p.arrived[tile] = 0; // for the next launch
        __threadfence();
    }
    __syncthreads();
    if (!last) return false;
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

template <int TOKENS, int TEAMS, bool WGMMA>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) stream_k_kernel(const Gemm p) {
    using S = Shape<TOKENS, TEAMS>;
    const int blocks = gridDim.x, chunks = p.K / CHUNK;
    const int tiles_m = (p.M + TOKENS - 1) / TOKENS, tiles = tiles_m * (p.N / S::CHANNELS);
    // A last round that is nearly full is left whole: adding up costs, too.
    const int rest = tiles % blocks, whole = rest * 10 > blocks * 9 ? tiles : tiles - rest;
    const Shares shares = {(tiles - whole) * chunks, blocks};
    int next = shares.start(blockIdx.x), stop = shares.start(blockIdx.x + 1);
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
        tile_sums<TOKENS, TEAMS, WGMMA>(p, m0, n0, first, end);
        bool mine = end - first == chunks;
        if (mine || add_blocks<TOKENS, TEAMS>(p, shares, at, first, end)) {
            write_sums<TOKENS, TEAMS>(p, m0, n0);
        }
    }
}

/* ================================================================================================
 * 7  Clusters
 *
 * Another way to share K, in place of teams and stream-K: on Hopper the blocks of a cluster read
 * each other's shared memory. Each takes a part of K for one large tile; then each adds up some
 * tokens of it, straight from its neighbours, without a detour through global memory.
 * ============================================================================================== */

template <int TOKENS>
__global__ void __launch_bounds__(256, TOKENS <= 16 ? 2 : 1) cluster_kernel(const Gemm p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    namespace cg = cooperative_groups;
    using S = Shape<TOKENS, 1>;
    const int n0 = blockIdx.x * S::CHANNELS, m0 = blockIdx.z * TOKENS;
    const int blocks = gridDim.y, block = blockIdx.y, chunks = p.K / CHUNK;
    tile_sums<TOKENS, 1, false>(p, m0, n0, block * chunks / blocks, (block + 1) * chunks / blocks);
    cg::this_cluster().sync();
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
 * mma.sync reaches two thirds of what Hopper's tensor cores can do. wgmma reaches the rest: four
 * warps issue one product of 64 channels x 128 tokens, which runs in the background and reads the
 * activations from shared memory by itself, while the warps unpack the next weights. Everything
 * else is rung 6: a warp's fragments and sums are laid out as those of mma.sync.
 * ============================================================================================== */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int PENDING> __device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

/* c [64][128] += a [64][32] . b [128][32]; b: its rows of 128 bytes, swizzled, 1024 bytes a block
 * of 8. */
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
#endif

template <int TOKENS>
__device__ void multiply_stage_wgmma(int (&c)[2][TOKENS / 8][4], const uint8_t *stage,
                                     const uint8_t *weights) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    uint32_t a[2][2][4]; // [step][m16 tile][register]
#pragma unroll
    for (int i = 0; i < 4; i++) { // k32 steps
        for (int t = 0; t < 2; t++)
            dequantize(a[i % 2][t], stage_weights(weights, i / 2, t), i % 2);
        asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
        for (int t = 0; t < 2; t++) wgmma(c[t], a[i % 2][t], stage + i * 32);
        asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
        wgmma_wait<1>(); // the step before is through: its registers are free
    }
#endif
}

/* What this thread copied to shared memory can be seen by wgmma, after the next barrier. */
template <bool WGMMA> __device__ void wgmma_fence_shared() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (WGMMA) asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

template <bool WGMMA> __device__ void wgmma_finish() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (WGMMA) wgmma_wait<0>();
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
    p.M <= 8 ? teams<8, 8>(p) : p.M <= 64 ? teams<64, 4>(p) : pipeline<128>(p);
}

template <int TOKENS, int TEAMS, bool WGMMA> static void stream_k(const Gemm &p) {
    const int blocks = multiprocessors * (TOKENS <= 16 ? 2 : 1);
    launch(stream_k_kernel<TOKENS, TEAMS, WGMMA>, dim3(blocks), Shape<TOKENS, TEAMS>::SHARED, p);
}

static void stream_k(const Gemm &p) {
    p.M <= 8    ? stream_k<8, 8, false>(p)
    : p.M <= 64 ? stream_k<64, 4, false>(p)
                : stream_k<128, 1, false>(p);
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
    stream_k<128, 1, true>(p);
}

static GpuLinear product_linear; // its copy in use
static int *product_workspace;

static void product(const Gemm &p) {
    gpu_gemm_run(gpu_gemm_choose(&product_linear, p.M, false), &product_linear, p.a, p.s_a, p.M,
                 p.y, NULL, p.acc, product_workspace, stream);
}

static const struct Rung {
    const char *name;
    void (*launch)(const Gemm &);
    bool hopper; // only there
    int min_M;   // worth its while from so many tokens on
} rungs[] = {{"1 naive", naive, false, 1},
             {"2 mma.sync, one tile", tile, false, 1},
             {"3 fragment order", fragment_order, false, 1},
             {"4 asynchronous pipeline", pipeline, false, 1},
             {"5 teams along K", teams, false, 1},
             {"6 stream-K", stream_k, false, 1},
             {"7 clusters", clusters, true, 1},
             {"8 wgmma", wgmma, true, 128},
             {"kernels.cu", product, false, 1}};
constexpr int N_RUNGS = sizeof rungs / sizeof *rungs;

/* ================================================================================================
 * Check and time
 * ============================================================================================== */

constexpr size_t ROTATED = 300 << 20; // bytes of weights to go through: far beyond the L2 cache

/* What is allocated is there until the end. */
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

/* The same numbers in FP16, for cuBLAS. */
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
    launch(0); // the first may have to load or to choose its code
    double us = once([&] { launch(0); });
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

/* Naive's sums acc [M][N] against C: up to 8 tokens, first and last among them. */
static void check_naive(int M, const Linear &l, const std::vector<int8_t> &a,
                        const std::vector<int> &acc) {
    const int T = std::min(M, 8);
    const char *plain_c;
    std::vector<int> expected(l.N);
    for (int t = 0; t < T; t++) {
        const size_t m = T > 1 ? (size_t)t * (M - 1) / (T - 1) : 0;
        accumulators(&l, a.data() + m * l.K, 1, dot_u4_kernel(0, &plain_c), expected.data());
        if (!std::equal(expected.begin(), expected.end(), acc.begin() + m * l.N)) {
            die("naive: token %zu of %d is not what the C code computes", m, M);
        }
    }
}

static const int tokens[] = {1, 64, 1024, 4096};
constexpr int N_TOKENS = sizeof tokens / sizeof *tokens, MAX_M = 4096;

static void climb(const char *name, int N, int K, bool hopper, cublasHandle_t cublas) {
    const size_t bytes = (size_t)N * K / 2, outputs = (size_t)MAX_M * N;
    const int copies = ROTATED / bytes + 1, half_copies = ROTATED / (bytes * 4) + 1;

    // The same weights three times over: as in the file, in the ladder's order, in the product's.
    std::vector<uint8_t> qweight(bytes);
    for (uint8_t &codes : qweight) { // no code 0 per channel
        uint64_t r = random64();
        codes = (1 + r % 15) | (1 + (r >> 32) % 15) << 4;
    }
    std::vector<float> s_channel(N), s_a(MAX_M);
    for (float &s : s_channel) s = (1 + random64() % 1000) * 1e-5f;
    for (float &s : s_a) s = (1 + random64() % 1000) * 1e-5f;
    std::vector<int8_t> a((size_t)MAX_M * K);
    for (int8_t &x : a) x = (int8_t)random64();

    Gemm p = {};
    p.N = N;
    p.K = K;
    p.a = upload(a);
    p.s_a = upload(s_a);
    p.s_channel = upload(s_channel);
    uint8_t *file = device<uint8_t>(copies * bytes), *w = device<uint8_t>(copies * bytes);
    uint8_t *product_w = device<uint8_t>(copies * bytes);
    gpu(cudaMemcpy(file, qweight.data(), bytes, cudaMemcpyHostToDevice));
    fragment_kernel<<<ceil_div(bytes / 4, 256), 256>>>(file, N, K, (uint32_t *)w);
    gpu(cudaGetLastError());
    Linear l = {};
    l.N = N;
    l.K = K;
    l.dtype = U8;
    l.qweight = qweight.data();
    l.s_channel = s_channel.data();
    GpuLinear created = gpu_linear_create(&l, 1);
    gpu(cudaMemcpy(product_w, created.w, bytes, cudaMemcpyDeviceToDevice));
    for (uint8_t *pool : {file, w, product_w}) {
        for (int i = 1; i < copies; i++) {
            gpu(cudaMemcpy(pool + i * bytes, pool, bytes, cudaMemcpyDeviceToDevice));
        }
    }
    auto use = [&](int copy) {
        p.qweight = file + copy % copies * bytes;
        p.w = (const uint4 *)(w + copy % copies * bytes);
        product_linear = created;
        product_linear.w = (uint32_t *)(product_w + copy % copies * bytes);
    };
    half *x16 = device<half>(a.size()), *w16 = device<half>(half_copies * bytes * 2);
    halves_kernel<<<ceil_div(a.size(), 256), 256>>>(p.a, NULL, a.size(), x16);
    for (int i = 0; i < half_copies; i++) {
        halves_kernel<<<ceil_div(bytes * 2, 256), 256>>>(NULL, file, bytes * 2,
                                                         w16 + i * bytes * 2);
    }
    gpu(cudaGetLastError());

    p.y = device<half>(outputs);
    int *acc = device<int>(outputs);
    p.partial = device<int4>((size_t)multiprocessors * 2 * Shape<128, 1>::SHARED / 16);
    p.arrived = device<int>(2 * multiprocessors); // shared tiles are fewer than blocks
    gpu(cudaMemset(p.arrived, 0, 2 * multiprocessors * sizeof(int)));

    double us[N_RUNGS][N_TOKENS] = {}, cublas_us[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++) {
        p.M = tokens[i];
        const size_t n = (size_t)p.M * N;
        std::vector<int> first_sums;
        std::vector<uint16_t> first_y;
        for (int r = 0; r < N_RUNGS; r++) {
            if ((rungs[r].hopper && !hopper) || p.M < rungs[r].min_M) continue;
            use(0);
            p.acc = acc;
            gpu(cudaMemset(p.y, 0xff, n * sizeof(half)));
            gpu(cudaMemset(p.acc, 0xff, n * sizeof(int)));
            rungs[r].launch(p);
            gpu(cudaStreamSynchronize(stream));
            auto sums = download(acc, n);
            auto y = download((uint16_t *)p.y, n);
            if (r == 0) {
                check_naive(p.M, l, a, sums);
                first_sums = sums;
                first_y = y;
            } else if (sums != first_sums || y != first_y) {
                die("%s, M = %d: not what rung 1 computes", rungs[r].name, p.M);
            }
            p.acc = NULL;
            us[r][i] = time_us(std::max(copies, 10), [&](int copy) {
                use(copy);
                rungs[r].launch(p);
            });
        }
        cublas_us[i] = time_us(std::max(half_copies, 10), [&](int copy) {
            float one = 1, zero = 0;
            if (cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, N, p.M, K, &one,
                             w16 + copy % half_copies * bytes * 2, CUDA_R_16F, K, x16, CUDA_R_16F,
                             K, &zero, p.y, CUDA_R_16F, N, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT)) {
                die("cublasGemmEx failed");
            }
        });
    }

    printf("\n%s, N=%d K=%d, per channel: microseconds (times faster than cuBLAS FP16)\n%-24s",
           name, N, K, "");
    for (int M : tokens) printf("%18s", ("M = " + std::to_string(M)).c_str());
    printf("\n%-24s", "cuBLAS FP16");
    for (double t : cublas_us) printf("%10.1f        ", t);
    for (int r = 0; r < N_RUNGS; r++) {
        printf("\n%-24s", rungs[r].name);
        for (int i = 0; i < N_TOKENS; i++) {
            if (us[r][i] > 0) printf("%10.1f (%5.2f)", us[r][i], cublas_us[i] / us[r][i]);
            else printf("%10s        ", "-");
        }
    }
    printf("\n");
    fflush(stdout);
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
    product_workspace = gpu_gemm_workspace();
    printf("%s, all sums equal\n", properties.name);
    const bool hopper = properties.major == 9;
    climb("paper", 8192, 21760, hopper, cublas);
    climb("8B qkv", 6144, 4096, hopper, cublas);
    cublasDestroy(cublas);
    return 0;
}
