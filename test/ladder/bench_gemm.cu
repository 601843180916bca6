/* Benchmark of the W4A8 GEMM against cuBLAS FP16: bench_gemm [CSV].
 *
 * Back-to-back launches on one stream over weights that rotate through at least 300 MB, so that
 * none is in the L2 cache when its turn comes; CUDA events around them; the median of 5. Then the
 * same in a CUDA graph. Ceilings are measured first: a device copy, and mma.sync without memory. */
#include "../../files.h"

#include <algorithm>
#include <cublas_v2.h>

#include <unistd.h>
#include <vector>

static const struct {
    const char *name;
    int N, K;
} shapes[] = {{"paper", 8192, 21760},
              {"qkv", 6144, 4096},
              {"o", 4096, 4096},
              {"gate_up", 28672, 4096},
              {"down", 4096, 14336}};
static const int tokens[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};

constexpr int MAX_M = 4096;
constexpr size_t ROTATED = 300 << 20; // bytes of weights that a benchmark goes through
constexpr size_t POOL = 900 << 20;    // holds them, rounded up to whole matrices

static void gpu(cudaError_t status) {
    if (status != cudaSuccess) die("CUDA: %s", cudaGetErrorString(status));
}

static void *device(size_t bytes) {
    void *p;
    gpu(cudaMalloc(&p, bytes));
    return p;
}

/* Random bytes, `mask` of each 8 and then `add`. */
__global__ void fill_kernel(uint64_t *p, size_t n, uint64_t mask, uint64_t add) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        uint64_t z = (i + 1) * 0x9e3779b97f4a7c15; // splitmix64
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        p[i] = ((z ^ z >> 31) & mask) + add;
    }
}

static void fill(void *p, size_t bytes, uint64_t mask, uint64_t add) {
    fill_kernel<<<1024, 256>>>((uint64_t *)p, bytes / 8, mask, add);
    gpu(cudaGetLastError());
}

static cudaStream_t stream;
static cudaEvent_t start, stop;

// Before a long measurement, so that no kernel pays for the heat of another: right after cuBLAS,
// which takes all the power that the GPU may, the same kernel runs at up to a fifth less.
static int pause_us;

/* Microseconds of one launch(i), the median of 5 rounds of `count`, in a graph or not. */
template <typename Launch> static double time_us(int count, bool in_graph, Launch launch) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    if (in_graph) {
        gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < count; i++) launch(i);
        gpu(cudaStreamEndCapture(stream, &graph));
        gpu(cudaGraphInstantiate(&exec, graph, 0));
    }
    std::vector<float> rounds;
    usleep(pause_us);
    for (int round = -1; round < 5; round++) { // the first warms up
        gpu(cudaEventRecord(start, stream));
        if (in_graph) {
            gpu(cudaGraphLaunch(exec, stream));
        } else {
            for (int i = 0; i < count; i++) launch(i);
        }
        gpu(cudaEventRecord(stop, stream));
        gpu(cudaEventSynchronize(stop));
        float ms;
        gpu(cudaEventElapsedTime(&ms, start, stop));
        if (round >= 0) rounds.push_back(ms);
    }
    if (in_graph) {
        gpu(cudaGraphExecDestroy(exec));
        gpu(cudaGraphDestroy(graph));
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[2] * 1000.0 / count;
}

/* Nothing but mma.sync: 8 independent sums a warp. */
__global__ void mma_kernel(int rounds, int *out) {
    int c[8][4] = {};
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++) a[i] = threadIdx.x * 0x9e3779b9 + i;
    for (int i = 0; i < 2; i++) b[i] = threadIdx.x * 0x85ebca6b + i;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                         "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                         : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    int sum = 0;
    for (int i = 0; i < 32; i++) sum ^= c[i / 4][i % 4];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

static double copy_gb_s(uint8_t *pool) {
    size_t bytes = POOL / 2;
    double us = time_us(4, false, [&](int) {
        gpu(cudaMemcpyAsync(pool + bytes, pool, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    return 2 * bytes / us / 1e3;
}

static double mma_tops(int *out) {
    int blocks;
    gpu(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
    const int rounds = 4000, warps = 8;
    double us = time_us(20, false,
                        [&](int) { mma_kernel<<<blocks, warps * 32, 0, stream>>>(rounds, out); });
    return 2.0 * 16 * 8 * 32 * 8 * rounds * warps * blocks / us / 1e6;
}

int main(int argc, char **argv) {
    FILE *csv = argc > 1 ? fopen(argv[1], "w") : NULL;
    if (argc > 1 && !csv) die("%s: cannot write", argv[1]);
    gpu(cudaStreamCreate(&stream));
    gpu(cudaEventCreate(&start));
    gpu(cudaEventCreate(&stop));
    cublasHandle_t cublas;
    if (cublasCreate(&cublas) != CUBLAS_STATUS_SUCCESS) die("cublasCreate failed");
    cublasSetStream(cublas, stream);
    cublasSetWorkspace(cublas, device(64 << 20), 64 << 20);

    uint8_t *pool = (uint8_t *)device(POOL);             // weights of either kind
    uint8_t *scales = (uint8_t *)device(POOL / 64);      // s_group
    int8_t *a = (int8_t *)device((size_t)MAX_M * 21760); // int8 activations
    half *x = (half *)device((size_t)MAX_M * 21760 * 2); // the same as fp16
    half *y = (half *)device((size_t)MAX_M * 28672 * 2);
    float *s_a = (float *)device(MAX_M * sizeof(float));
    float *s_channel = (float *)device(28672 * sizeof(float));
    // Masks: fp16 of magnitude below 2; scales of 1 to 8; floats of magnitude below 2^-12.
    fill(a, (size_t)MAX_M * 21760, ~0ull, 0);
    fill(x, (size_t)MAX_M * 21760 * 2, 0xbfffbfffbfffbfff, 0);
    fill(scales, POOL / 64, 0x0707070707070707, 0x0101010101010101);
    fill(s_a, MAX_M * sizeof(float), 0x39ffffff39ffffff, 0);
    fill(s_channel, 28672 * sizeof(float), 0x39ffffff39ffffff, 0);
    fill(pool, POOL, 0xbfffbfffbfffbfff, 0);

    double copy = copy_gb_s(pool), peak = mma_tops((int *)y);
    printf("device copy %.0f GB/s (read + write); mma.sync m16n8k32 s8 %.0f TOPS\n", copy, peak);
    if (csv) {
        fprintf(csv, "# device copy %.0f GB/s, mma.sync %.0f TOPS\n", copy, peak);
        fprintf(csv, "shape,N,K,M,graph,cublas_f16_us,channel_us,g128_us,channel_portable_us,"
                     "g128_portable_us\n");
    }
    for (bool in_graph : {false, true}) {
        for (const auto &s : shapes) {
            printf("\n%s, N=%d K=%d%s\n", s.name, s.N, s.K, in_graph ? ", in a CUDA graph" : "");
            printf(
                "    M  cuBLAS f16   channel      g128   ratio       GB/s   %%copy   TOPS   %%mma"
                "   portable us     ratio\n");
            for (int M : tokens) {
                auto count = [&](size_t bytes) {
                    return (int)std::max(ROTATED / bytes + 1, (size_t)(M > 512 ? 5 : 20));
                };
                pause_us = M >= 1024 ? 100000 : M >= 128 ? 20000 : 0;
                size_t half_bytes = (size_t)s.N * s.K * 2, bytes = (size_t)s.N * s.K / 2;
                int half_copies = POOL / half_bytes, copies = POOL / bytes;
                float one = 1, zero = 0;
                double f16 = time_us(count(half_bytes), in_graph, [&](int i) {
                    cublasStatus_t status = cublasGemmEx(
                        cublas, CUBLAS_OP_T, CUBLAS_OP_N, s.N, M, s.K, &one,
                        pool + i % half_copies * half_bytes, CUDA_R_16F, s.K, x, CUDA_R_16F, s.K,
                        &zero, y, CUDA_R_16F, s.N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
                    if (status != CUBLAS_STATUS_SUCCESS) die("cublasGemmEx failed");
                });
                double us[2][2]; // [portable][groups]
                for (bool portable : {false, true}) {
                    for (bool groups : {false, true}) {
                        us[portable][groups] = time_us(count(bytes), in_graph, [&](int i) {
                            int copy = i % copies;
                            GpuLinear l = {s.N, s.K, (uint32_t *)(pool + copy * bytes),
                                           groups ? scales + copy * (bytes / 64) : NULL, s_channel};
                            gpu_gemm_run(gpu_gemm_choose(&l, M, portable), &l, a, s_a, M, y, NULL,
                                         stream);
                        });
                    }
                }
                double t = us[0][0], moved = (double)bytes + (double)M * (s.K + 2.0 * s.N);
                double gb_s = moved / t / 1e3, tops = 2.0 * M * s.N * s.K / t / 1e6;
                printf("%5d %11.1f %9.1f %9.1f %5.2f %4.2f %6.0f %6.1f%% %6.0f %5.1f%%"
                       " %7.1f %7.1f %5.2f %4.2f\n",
                       M, f16, t, us[0][1], f16 / t, f16 / us[0][1], gb_s, 100 * gb_s / copy, tops,
                       100 * tops / peak, us[1][0], us[1][1], f16 / us[1][0], f16 / us[1][1]);
                fflush(stdout);
                if (csv) {
                    fprintf(csv, "%s,%d,%d,%d,%d,%.2f,%.2f,%.2f,%.2f,%.2f\n", s.name, s.N, s.K, M,
                            in_graph, f16, t, us[0][1], us[1][0], us[1][1]);
                }
            }
        }
    }
    if (csv) fclose(csv);
    gpu(cudaDeviceSynchronize());
    cublasDestroy(cublas);
    return 0;
}
