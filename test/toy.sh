#!/bin/sh
# toy.sh DIRECTORY [TOOL...]: runs what ./run and ./quantize of DIRECTORY can do, on models of two
# layers, under a tool that would take too long for the tests. Stops at the first that fails.
set -eu
bin=$1
shift
text=$bin/toy.txt
for i in 1 2 3 4 5; do echo "a b c abc xyz, it's number $i."; done >"$text"
items=$bin/toy.jsonl
echo '{"context": "a b c", "choices": ["abc xyz", "c", "xyz a"], "gold": 0}' >"$items"

make_toy() { # NAME DIM
    "$bin/build/synthetic" "$bin/$1" --dim "$2" --hidden "$2" --layers 2 --heads 2 --kv-heads 1 \
        --vocab 266 --tokenizer test/corpus/tokenizer/chat
    sed -i s/131072/32/ "$bin/$1/config.json"
}

try() {
    echo "$@"
    "$@" >"$bin/toy.log" 2>&1 || { cat "$bin/toy.log" && exit 1; }
}

try_quantize() { # NAME OPTIONS
    name=$1
    shift
    try $tool "$bin/quantize" "$bin/$name" "$bin/$name.bin" -c "$text" -n 1 -l 8 "$@"
}

tool=$*
make_toy toy 16
make_toy groups 128
try $tool "$bin/quantize" "$bin/toy" "$bin/toy-f.bin" -f
try_quantize toy -g -1 -b rtn -e "$text"
try_quantize toy -g -1 -r 0
try_quantize toy -g -1
try_quantize groups -b rtn -a 0 -m 0 -q 8
for format in vllm qqq; do
    rm -rf "$bin/groups-$format"
    try $tool "$bin/quantize" "$bin/groups.bin" "$bin/groups-$format" -x $format
done
try $tool "$bin/quantize" "$bin/groups-qqq" "$bin/groups.bin"
for model in toy toy-f.bin toy.bin groups.bin; do
    try $tool "$bin/run" "$bin/$model" -i 'a b c' -n 9 -s 1
    try $tool "$bin/run" "$bin/$model" -m chat -i 'a' -n 5 -s 1
    try $tool "$bin/run" "$bin/$model" -e "$text"
    try $tool "$bin/run" "$bin/$model" -e "$text" -k 8
    try $tool "$bin/run" "$bin/$model" -x "$text"
    try $tool "$bin/run" "$bin/$model" -z "$items"
done
