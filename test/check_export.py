"""An export for vLLM, seen by transformers, against the model.bin that it was made from.

    pip install torch transformers compressed-tensors==0.17.0
    ./quantize MODEL.bin DIR -x vllm
    python test/check_export.py MODEL.bin DIR TEXT PERPLEXITY [PLAIN]

PERPLEXITY is what ./run MODEL.bin -l 2048 -e TEXT prints. The weights that compressed-tensors unpacks
must be exactly (half)(s_channel s_group) q, all other tensors those of model.bin as halves; and the
perplexity, with activations quantized by the engine, must agree within 0.3 %: its scale of a token is
max|x| / 127.5, ours max|x| / 127. Where outliers make a model chaotic each rounding that falls otherwise
grows: there PLAIN, a new directory with the same weights as float32, tells whether all else is equal, by
its perplexity in ./run PLAIN -l 2048 -e TEXT and here, with activations as they are. Not part of make
test, which needs no Python.
"""
import json
import os
import shutil
import sys

import compressed_tensors
import torch
import transformers
from safetensors.torch import load_file, save_file

MODEL, DIR, TEXT, PERPLEXITY = sys.argv[1:5]


def expected():
    """NAME -> the weights of NAME.weight [N, K] as model.bin has them, with halves for scales."""
    tensors = load_file(MODEL)
    for name, t in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "qweight":
            q = torch.stack([t & 15, t >> 4], dim=-1).flatten(1).float() - 8
            scale = tensors[base + ".s_channel"][:, None]
            if base + ".s_group" in tensors:
                scale = (scale * tensors[base + ".s_group"]).repeat_interleave(128, dim=1)
            yield base, scale.half().float() * q
        elif kind == "weight" and t.dtype == torch.int8:  # an 8-bit lm_head
            yield base, (t.float() * tensors[base + ".s_channel"][:, None]).half().float()
        elif kind == "weight":
            yield base, t.half().float()


model = transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.float32)
print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"compressed-tensors {compressed_tensors.__version__}")
ids = transformers.AutoTokenizer.from_pretrained(DIR).encode(open(TEXT).read(), add_special_tokens=False)
windows = torch.tensor([model.config.bos_token_id] + ids)[: (len(ids) + 1) // 2048 * 2048].view(-1, 2048)


def perplexity_of_model():
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]) for w in windows]
    return torch.stack(losses).mean().exp().item()


perplexity = perplexity_of_model()
off = perplexity / float(PERPLEXITY) - 1
print(f"perplexity {perplexity:.4f} in {len(windows)} windows of 2048, {PERPLEXITY} by ./run: {off:+.2%}")
modules, equal, total, linears = dict(model.named_modules()), 0, 0, 0
for name, want in expected():
    found = modules[name].weight.float()  # what was packed, the first forward() has unpacked
    equal += (found == want).sum().item()
    total += want.numel()
    linears += getattr(modules[name], "quantization_scheme", None) is not None
print(f"weights equal: {equal:,} of {total:,}, in {linears} quantized linears and all other tensors")
if len(sys.argv) > 5:
    PLAIN = sys.argv[5]
    os.makedirs(PLAIN)
    save_file({name + ".weight": modules[name].weight.detach().float().contiguous() for name, _ in expected()},
              PLAIN + "/model.safetensors", metadata={"format": "pt"})
    config = json.load(open(DIR + "/config.json"))
    del config["quantization_config"]
    json.dump(config, open(PLAIN + "/config.json", "w"))
    shutil.copy(DIR + "/tokenizer.json", PLAIN)
    for module in model.modules():
        module.quantization_enabled = False
    print(f"perplexity {perplexity_of_model():.4f} with activations as they are, to be that of ./run {PLAIN}")
sys.exit(equal != total or linears == 0 or abs(off) >= 0.003)
