# make help lists the targets. CPPFLAGS and LDFLAGS may name other places for jsmn and utf8proc.

CC ?= cc
CFLAGS ?= -O3 -march=native
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
# sm_80 stands for all from Ampere on; sm_90a adds Hopper's own instructions.
ARCH ?= -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a
NVCCFLAGS ?= -O3 -std=c++17
BUILD ?= build
BIN ?= .

# -ffp-contract=fast: fused multiply-adds, which gcc leaves out under -std=c11 unless asked. The
# other two keep all results: nobody reads errno or exception flags, for which loops stay scalar.
FLAGS = -std=c11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -Wmissing-prototypes $(WERROR) $(CPPFLAGS) $(CFLAGS)
LIBS = $(LDFLAGS) -lutf8proc -lm
OBJECTS = $(BUILD)/qqq.o $(BUILD)/files.o $(BUILD)/tokenizer.o
TESTS = $(patsubst %.c,$(BUILD)/%.o,$(sort $(wildcard test/test*.c)))
SOURCES = $(wildcard *.h *.c *.cu test/*.h test/*.c test/*.cu)

.PHONY: all demo test test-san test-faults test-valgrind test-tsan test-slow test-gpu coverage bench ladder \
	compare plots lint format fuzz clean help
.DELETE_ON_ERROR:

all: $(BIN)/run $(BIN)/quantize

help:
	@echo 'make            build ./run and ./quantize'
	@echo 'make demo       quantize the embedded model, measure it, let it tell a story'
	@echo 'make test       all quick tests'
	@echo 'make test-san   the same under ASan and UBSan, without perplexity of the whole text'
	@echo 'make test-slow  test-faults (memory, disk, signals), test-valgrind, test-tsan; then, for an'
	@echo '                hour, quality on the whole evaluation text and models in ../shared, if there'
	@echo 'make coverage   lines of the C files that make test does not reach'
	@echo 'make test-gpu   the GPU against plain C (needs nvcc and a GPU)'
	@echo 'make bench      speed of the kernels against cuBLAS (needs nvcc and a GPU)'
	@echo 'make ladder     the GEMM in eight steps, from naive to wgmma, each with its time'
	@echo 'make compare    QQQ beside other methods: perplexity of COMPARE (data/tiny), a CSV'
	@echo 'make plots      of PLOTS (data/tiny), and of what make bench found: SVG in $(BUILD)'
	@echo 'make lint       clang-format, gcc, clang, gcc -fanalyzer, clang-tidy, cppcheck: no findings'
	@echo 'make format     clang-format everything'
	@echo 'make fuzz       libFuzzer on files, texts and command lines, FUZZ_SECONDS (10) each'
	@echo 'make clean      remove what was built'

$(BUILD)/%.o: %.c qqq.h files.h test/test.h Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -c $< -o $@

# With nvcc the programs are linked with the GPU's part, which loads cuBLAS if there is a GPU. CUDA=
# on make's command line leaves it out.
CUDA ?= $(NVCC)
GPU_LIBS = -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcudart_static -ldl -lrt -lpthread -lstdc++
CUDA_LIB = $(abspath $(dir $(NVCC))../lib64)

$(BUILD)/tests: $(TESTS) $(BUILD)/test/variant.o
$(BUILD)/test/test_neighbours.o: test/neighbours.c
$(BUILD)/test/test_chat.o: run.c
$(BUILD)/test/variant.o $(BUILD)/test/test_neighbours.o $(BUILD)/test/neighbours.o: test/variant.h
$(BIN)/run: $(BUILD)/run.o
$(BIN)/quantize: $(BUILD)/quantize.o
$(BIN)/run $(BIN)/quantize $(BUILD)/tests: $(OBJECTS) $(if $(CUDA),$(BUILD)/kernels.cu.o)
	$(CC) $(FLAGS) $^ -o $@ $(LIBS) $(if $(CUDA),$(GPU_LIBS))

$(BUILD)/synthetic: $(BUILD)/test/synthetic.o $(OBJECTS)
	$(CC) $(FLAGS) $^ -o $@ $(LIBS)

$(BUILD)/neighbours: $(BUILD)/test/neighbours.o $(BUILD)/test/variant.o $(OBJECTS)
	$(CC) $(FLAGS) $^ -o $@ $(LIBS)

$(BUILD)/plots: test/plots.c Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ -lm

$(BUILD)/fault.so: test/fault.c Makefile
	@mkdir -p $(@D)
	$(CC) -std=c11 -O1 -Wall -Wextra -Wmissing-prototypes $(WERROR) -shared -fPIC $< -o $@ -ldl

DEMO = $(BUILD)/tiny-w4a8.bin
demo: all
	./quantize data/tiny $(DEMO) -n 16 -l 1024 -e data/eval.txt
	./run $(DEMO) -s 1 -n 120 -i 'Once upon a time there lived a king who'

# Without it idle threads spin, which slows everything down where cores are shared.
compare plots demo test test-san test-faults test-valgrind test-tsan test-slow coverage: \
	export OMP_WAIT_POLICY = passive

# About a quarter of an hour. COMPARE_OPTIONS='-a' adds the rows left out for time, -h lists more.
COMPARE ?= data/tiny
compare: all $(BUILD)/neighbours
	$(BUILD)/neighbours $(COMPARE) $(COMPARE_OPTIONS) | tee $(BUILD)/compare.csv

# Minutes: it quantizes the model first.
PLOTS ?= data/tiny
plots: all $(BUILD)/neighbours $(BUILD)/plots
	$(BUILD)/neighbours $(PLOTS) -n 1 -v $(BUILD)/analysis -r 'qqq W4A8 g128 to nearest' \
		-r 'qqq W4A8 g128 +GPTQ +ranges +smoothing'
	$(BUILD)/plots $(BUILD)

test: all $(BUILD)/tests $(BUILD)/synthetic
	$(BUILD)/tests

test-slow: all $(BUILD)/tests $(BUILD)/synthetic test-faults test-valgrind test-tsan
	$(BUILD)/tests slow

# Every allocation, every write fails in turn; SIGKILL at random moments. Without CUDA, whose own
# library does not survive this; in a directory of their own, as the tests run the programs there.
FAULTS = $(BUILD)/faults
test-faults:
	$(MAKE) CUDA= BUILD=$(FAULTS)/build BIN=$(FAULTS) $(FAULTS)/run $(FAULTS)/quantize \
		$(FAULTS)/build/tests $(FAULTS)/build/synthetic $(FAULTS)/build/fault.so
	ln -sfn $(CURDIR)/data $(FAULTS)/data
	ln -sfn $(CURDIR)/test $(FAULTS)/test
	cd $(FAULTS) && build/tests faults

# The programs built otherwise, in a directory of their own, on a toy model. valgrind knows no AVX-512.
TOY_PROGRAMS = $(@:test-%=$(BUILD)/%/run) $(@:test-%=$(BUILD)/%/quantize) $(@:test-%=$(BUILD)/%/synthetic)
TOY_BUILD = $(MAKE) CUDA= BUILD=$(@:test-%=$(BUILD)/%) BIN=$(@:test-%=$(BUILD)/%)
test-valgrind:
	$(TOY_BUILD) CFLAGS='-O1 -g' $(TOY_PROGRAMS)
	OMP_NUM_THREADS=1 test/toy.sh $(BUILD)/valgrind valgrind -q --error-exitcode=9 \
		--leak-check=full --errors-for-leak-kinds=definite

# clang's OpenMP tells TSan through archer what waits for what; gcc's does not.
test-tsan:
	$(TOY_BUILD) CC=clang CFLAGS='-O1 -g -march=native -fsanitize=thread' $(TOY_PROGRAMS)
	OMP_NUM_THREADS=4 OMP_TOOL_LIBRARIES=libarcher.so \
		TSAN_OPTIONS='ignore_noninstrumented_modules=1 exitcode=9' test/toy.sh $(BUILD)/tsan

$(BUILD)/%.cu.o: %.cu qqq.h files.h Makefile
	@mkdir -p $(@D)
	$(if $(NVCC),,$(error nvcc was not found; NVCC=... names it))
	$(NVCC) $(NVCCFLAGS) $(ARCH) $(CPPFLAGS) -Xcompiler -Wall,-Wextra -c $< -o $@

# test_gpu_twins includes kernels.cu.
$(BUILD)/test/test_gpu_twins.cu.o: kernels.cu
$(BUILD)/test_kernels $(BUILD)/bench_gemm $(BUILD)/ladder: $(BUILD)/kernels.cu.o
$(BUILD)/test_kernels $(BUILD)/test_gpu_twins $(BUILD)/bench_gemm $(BUILD)/ladder: $(BUILD)/%: $(BUILD)/test/%.cu.o $(OBJECTS)
	$(NVCC) $^ -o $@ $(LIBS) -lgomp -lcublas

test-gpu: all $(BUILD)/test_kernels $(BUILD)/test_gpu_twins $(BUILD)/tests $(BUILD)/synthetic
	$(BUILD)/test_kernels
	$(BUILD)/test_gpu_twins
	$(BUILD)/tests gpu
	$(BUILD)/tests gpu-quantize

bench: $(BUILD)/bench_gemm
	$(BUILD)/bench_gemm $(BUILD)/bench_gemm.csv

ladder: $(BUILD)/ladder
	$(BUILD)/ladder

# -fanalyzer: Off is what it sees wrongly: that die() leaks, and that loops over rows may be empty.
# cppcheck: NULL is a pointer here; a realloc that fails ends the program; exp() sums are above 0;
# and it misreads arrays of function pointers.
C_FILES = qqq.c files.c tokenizer.c run.c quantize.c
lint:
	clang-format --dry-run -Werror $(SOURCES)
	for cc in gcc clang; do $(MAKE) -B CC=$$cc WERROR=-Werror BUILD=$(BUILD)/lint-$$cc \
		BIN=$(BUILD)/lint-$$cc all $(BUILD)/lint-$$cc/tests $(BUILD)/lint-$$cc/synthetic || exit 1; done
	for file in $(C_FILES); do gcc -std=c11 -fopenmp -O1 -Werror -fanalyzer \
		-Wno-analyzer-malloc-leak -Wno-analyzer-use-of-uninitialized-value $(CPPFLAGS) -c $$file \
		-o /dev/null || exit 1; done
	clang-tidy --quiet $(C_FILES) -- -std=c11 -fopenmp $(CPPFLAGS)
	cppcheck --quiet --std=c11 --enable=warning,performance,portability --error-exitcode=1 \
		--suppress=missingIncludeSystem --suppress=varFuncNullUB --suppress=memleakOnRealloc \
		--suppress=invalidFunctionArg --suppress=CastIntegerToAddressAtReturn \
		--suppress=legacyUninitvar:qqq.c $(C_FILES) $(wildcard test/*.c)

format:
	clang-format -i $(SOURCES)

# build/san is a root directory of its own: the tests there run the programs built there.
SAN = $(BUILD)/san
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover
test-san:
	$(MAKE) CUDA= BUILD=$(SAN)/build BIN=$(SAN) CFLAGS='-O2 -g -march=native $(SANITIZE)' \
		$(SAN)/run $(SAN)/quantize $(SAN)/build/tests $(SAN)/build/synthetic
	ln -sfn $(CURDIR)/data $(SAN)/data
	ln -sfn $(CURDIR)/test $(SAN)/test
	cd $(SAN) && ASAN_OPTIONS=detect_leaks=0 build/tests

# The programs that the tests run count too; in one thread, as threads fight for the counters. What
# _exit() or a signal ends does not write its counts.
COVERAGE = $(BUILD)/coverage
coverage:
	$(MAKE) CUDA= BUILD=$(COVERAGE)/build BIN=$(COVERAGE) CFLAGS='-O1 -g -march=native --coverage' \
		$(COVERAGE)/run $(COVERAGE)/quantize $(COVERAGE)/build/tests $(COVERAGE)/build/synthetic
	ln -sfn $(CURDIR)/data $(COVERAGE)/data
	ln -sfn $(CURDIR)/test $(COVERAGE)/test
	find $(COVERAGE) -name '*.gcda' -delete
	cd $(COVERAGE) && OMP_NUM_THREADS=1 build/tests
	for file in $(C_FILES); do gcov -o $(COVERAGE)/build $$file | grep -A1 "^File '$$file'"; done
	mv *.gcov $(COVERAGE)

# One program per target. FUZZ_SECONDS is the time of each; what they find is left in $(FUZZ). The
# corpus in the tree is only read: new inputs go to $(FUZZ)/corpus.
FUZZ = $(BUILD)/fuzz
FUZZ_TARGETS = safetensors config tokenizer text run quantize
FUZZ_SECONDS ?= 10
FUZZ_FLAGS = -std=c11 -O1 -g -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas \
	$(SANITIZE) -fsanitize=fuzzer $(CPPFLAGS)
WRAPPED = _exit exit mmap munmap
fuzz: $(FUZZ_TARGETS:%=fuzz-%)
fuzz-%: $(FUZZ)/%
	@mkdir -p $(FUZZ)/corpus/$*
	ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=0 $< $(FUZZ)/corpus/$* test/corpus/$* \
		-max_total_time=$(FUZZ_SECONDS) -max_len=16384 -timeout=10 -rss_limit_mb=2048 \
		-close_fd_mask=3 -detect_leaks=0 -print_final_stats=1 -artifact_prefix=$(FUZZ)/

$(FUZZ)/%: test/fuzz.c qqq.c files.c tokenizer.c run.c quantize.c qqq.h files.h Makefile
	@mkdir -p $(@D)
	clang $(FUZZ_FLAGS) -DPROGRAM='"../$(if $(filter quantize,$*),quantize,run).c"' \
		-DTARGET=$(if $(filter run quantize,$*),options,$*) test/fuzz.c qqq.c files.c tokenizer.c -o $@ \
		$(WRAPPED:%=-Wl,--wrap=%) $(LIBS) -lgomp

clean:
	rm -rf $(BUILD) run quantize
