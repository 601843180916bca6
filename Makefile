# make help lists the targets. CPPFLAGS and LDFLAGS may name other places for jsmn and utf8proc.

CC ?= cc
CFLAGS ?= -O3 -march=native
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
# sm_80 runs on every GPU from Ampere on; sm_90a adds Hopper's own instructions.
ARCH ?= -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a
NVCCFLAGS ?= -O3 -std=c++17
# With nvcc the programs get the GPU's part. It loads cuBLAS if there is a GPU. make CUDA= leaves it out.
CUDA ?= $(NVCC)
BUILD ?= build
BIN ?= .

# -ffp-contract=fast: fused multiply-adds, which gcc leaves out under -std=c11 unless asked. The
# other two keep all results: nobody reads errno or exception flags, and loops vectorize.
FLAGS = -std=c11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp \
	-Wall -Wextra -Wmissing-prototypes $(WERROR) $(CPPFLAGS) $(CFLAGS)
LIBS = $(LDFLAGS) -lutf8proc -lm
CUDA_LIB = $(abspath $(dir $(NVCC))../lib64)
GPU_LIBS = -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcudart_static -ldl -lrt -lpthread -lstdc++

C_FILES = qqq.c tokenizer.c run.c quantize.c
HEADERS = qqq.h
OBJECTS = $(BUILD)/qqq.o $(BUILD)/tokenizer.o
GPU_OBJECTS = $(if $(CUDA),$(BUILD)/kernels.cu.o)

.PHONY: all demo steps help clean
.DELETE_ON_ERROR:

all: $(BIN)/run $(BIN)/quantize

$(BIN)/run: $(BUILD)/run.o
$(BIN)/quantize: $(BUILD)/quantize.o
$(BIN)/run $(BIN)/quantize: $(OBJECTS) $(GPU_OBJECTS)
	$(CC) $(FLAGS) $^ -o $@ $(LIBS) $(if $(CUDA),$(GPU_LIBS))

$(BUILD)/%.o: %.c $(HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -c $< -o $@

$(BUILD)/%.cu.o: %.cu $(HEADERS) Makefile
	@mkdir -p $(@D)
	$(if $(NVCC),,$(error nvcc was not found; NVCC=... names it))
	$(NVCC) $(NVCCFLAGS) --extended-lambda $(ARCH) $(CPPFLAGS) -Xcompiler -Wall,-Wextra -c $< -o $@

# Idle threads sleep: spinning slows everything down where cores are shared.
demo steps: export OMP_WAIT_POLICY = passive

DEMO = $(BUILD)/tiny-w4a8.bin
demo: all
	./quantize data/tiny $(DEMO) -n 16 -l 1024 -e data/eval.txt
	./run $(DEMO) -s 1 -n 120 -i 'Once upon a time there lived a king who'

# What each step of the method is worth: a row and a perplexity each, in a minute or two.
steps: all $(BUILD)/plant
	test/steps.sh $(BUILD)

include test/Makefile

help:
	@echo 'make            build ./run and ./quantize'
	@echo 'make demo       quantize the embedded model, measure it, let it tell a story'
	@echo 'make steps      what each step of the method is worth: a row and a perplexity each'
	@echo 'make test       all quick tests'
	@echo 'make test-gpu   the GPU against plain C (needs nvcc and a GPU)'
	@echo 'make ladder     the GEMM in steps, from naive to Hopper, each with its time (nvcc and a GPU)'
	@echo 'make bench      speed of the kernels against cuBLAS (nvcc and a GPU)'
	@echo 'make help-test  what else test/Makefile does: lint, fuzz, sanitizers, comparisons'
	@echo 'make clean      remove what was built'

clean:
	rm -rf $(BUILD) run quantize
