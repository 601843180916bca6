#!/bin/sh
# steps.sh BUILD: the perplexity after each step of the method, as a table. The model is data/tiny
# with outliers planted (plant.c): smoothing has nothing to do without them. Weights per channel, 16
# windows of 1024 tokens to calibrate, perplexity of data/eval.txt. It needs about a minute and a half
# on two cores.
set -eu
build=$1
model=$build/outliers
log=$build/steps.txt

quietly() { # COMMAND: its output is shown only if it fails
    "$@" >"$log" 2>&1 || { cat "$log" >&2 && exit 1; }
}

row() { # STEP OPTIONS MODEL
    quietly ./run "$3" -d cpu -e data/eval.txt
    perplexity=$(sed -n 's/^perplexity \([0-9.]*\) .*/\1/p' "$log")
    printf '| %-29s | %-24s | %10s |\n' "$1" "$2" "$perplexity"
}

step() { # STEP OPTIONS: quantizes the model with these options
    quietly ./quantize "$model" "$build/steps.bin" -d cpu -g -1 -n 16 -l 1024 $2
    row "$1" "$2" "$build/steps.bin"
}

quietly "$build/plant" data/tiny "$model"
printf '| %-29s | %-24s | %s |\n' step 'options of ./quantize' perplexity
echo '|---|---|---|'
row 'float' '' "$model"
step 'to nearest' '-r 0 -a 0 -m 0 -b rtn'
step '+ adaptive smoothing (step 2)' '-r 0 -m 0 -b rtn'
step '+ ranges (step 3)' '-r 0 -b rtn'
step '+ GPTQ (steps 4 and 5)' '-r 0'
step '+ rotation (step 1)' ''
