#!/bin/sh
# toy.sh DIRECTORY [TOOL...]: runs what ./run and ./quantize of DIRECTORY can do, on a model of two
# layers, under a tool that would take too long for the tests. Stops at the first that fails.
set -eu
bin=$1
shift
toy=$bin/toy text=$bin/toy.txt
"$bin/synthetic" "$toy" --dim 128 --hidden 128 --layers 2 --heads 2 --kv-heads 1 --vocab 266 \
    --tokenizer test/corpus/tokenizer/chat
sed -i s/131072/64/ "$toy/config.json"
for i in 1 2 3 4 5 6 7 8 9; do echo "a b c abc xyz, it's number $i."; done >"$text"

try() {
    echo "$@"
    "$@" >"$bin/toy.log" 2>&1 || { cat "$bin/toy.log" && exit 1; }
}
try "$@" "$bin/quantize" "$toy" "$bin/toy-f.bin" -f
for options in '' '-g -1 -r 1' '-a 2 -n 1' '-b rtn -a 0 -m 0' '-g -1 -o 0 -m 0'; do
    # shellcheck disable=SC2086
    try "$@" "$bin/quantize" "$toy" "$bin/toy.bin" -c "$text" -l 16 -e "$text" $options
done
for model in "$toy" "$bin/toy-f.bin" "$bin/toy.bin"; do
    try "$@" "$bin/run" "$model" -i 'a b c' -n 20 -s 1
    try "$@" "$bin/run" "$model" -m chat -i 'a b c' -n 5 -s 1
    try "$@" "$bin/run" "$model" -e "$text" -l 32
    try "$@" "$bin/run" "$model" -x "$text"
done
