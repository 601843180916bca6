# make help lists the targets. CPPFLAGS and LDFLAGS may name other places for jsmn and utf8proc.

CC ?= cc
NVCC ?= $(shell command -v nvcc 2>/dev/null)
CFLAGS ?= -O3 -march=native
OPENMP ?= -fopenmp

# -ffp-contract=fast: fused multiply-adds, which ISO C leaves out unless asked.
override CFLAGS += -std=c11 -ffp-contract=fast $(OPENMP) -Wall -Wextra -Werror
LDLIBS = -lutf8proc -lm

TESTS = $(wildcard test/test*.c)
OBJECTS = build/qqq.o build/tokenizer.o

all: run quantize

run: build/run.o $(OBJECTS)
	$(CC) $(CFLAGS) $(LDFLAGS) $^ -o $@ $(LDLIBS)

quantize: build/quantize.o $(OBJECTS)
	$(CC) $(CFLAGS) $(LDFLAGS) $^ -o $@ $(LDLIBS)

build/test: $(TESTS:%.c=build/%.o) $(OBJECTS)
	$(CC) $(CFLAGS) $(LDFLAGS) $^ -o $@ $(LDLIBS)

build/synthetic: build/test/synthetic.o $(OBJECTS)
	$(CC) $(CFLAGS) $(LDFLAGS) $^ -o $@ $(LDLIBS)

build/%.o: %.c qqq.h Makefile
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -c $< -o $@

clean:
	rm -rf build run quantize
