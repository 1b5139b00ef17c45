"""Speed of a plain PyTorch GPT-2 that only scores (no adaptation): what one runs instead of
Ponder's skip path. One chunk of 512 tokens, mean next-token loss, f32 and bf16. The loss is
compared with the one that Ponder's parity tests use, so that both compute the same thing.
Prints one JSON object.

    /usr/bin/python3 tests/bench/torch_skip.py --threads 2

Debian's build multiplies f32 matrices with whatever libblas.so.3 the system has: a fair number
needs OpenBLAS (libopenblas0-openmp), not the reference BLAS. "blas" in the output tells.
"""
import argparse
import glob
import json
import math
import os
import re
import statistics
import struct
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[start + begin:start + end]
        if entry["dtype"] == "BF16":  # the upper half of a float
            array = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = np.frombuffer(raw, {"F32": "<f4", "I32": "<i4"}[entry["dtype"]]).copy()
        tensors[name] = torch.from_numpy(array.reshape(entry["shape"]))
    return tensors


class Gpt2:
    def __init__(self, folder, dtype):
        with open(os.path.join(folder, "config.json")) as file:
            self.config = json.load(file)
        self.weights = {
            name.removeprefix("transformer."): tensor.to(dtype)
            for path in sorted(glob.glob(os.path.join(folder, "*.safetensors")))
            for name, tensor in read_safetensors(path).items()
        }

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"],
                            self.weights[name + ".bias"], self.config["layer_norm_epsilon"])

    def linear(self, x, name):
        return torch.addmm(self.weights[name + ".bias"], x, self.weights[name + ".weight"])

    def attention(self, x, name):
        tokens, width = x.shape
        heads = self.config["n_head"]
        q, k, v = (part.view(tokens, heads, width // heads).transpose(0, 1)
                   for part in self.linear(x, name + ".c_attn").split(width, dim=1))
        if hasattr(F, "scaled_dot_product_attention"):
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        else:
            scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(width // heads)
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            y = torch.bmm(scores.masked_fill(future, float("-inf")).softmax(-1), v)
        return self.linear(y.transpose(0, 1).reshape(tokens, width), name + ".c_proj")

    def gelu(self, x):
        return F.gelu(x, approximate="tanh")

    def loss(self, ids):
        x = self.weights["wte.weight"][ids] + self.weights["wpe.weight"][:len(ids)]
        for layer in range(self.config["n_layer"]):
            h = f"h.{layer}"
            x = x + self.attention(self.norm(x, h + ".ln_1"), h + ".attn")
            inner = self.gelu(self.linear(self.norm(x, h + ".ln_2"), h + ".mlp.c_fc"))
            x = x + self.linear(inner, h + ".mlp.c_proj")
        logits = self.norm(x, "ln_f")[:-1] @ self.weights["wte.weight"].t()
        return F.cross_entropy(logits.float(), ids[1:])


def median_seconds(function, runs, warm_up):
    times = []
    for i in range(warm_up + runs):
        start = time.perf_counter()
        function()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def blas_in_use():
    """File names of the BLAS libraries in this process; empty where it is linked into torch."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if re.search(r"blas|mkl_", line)}
    except OSError:
        return []
    return sorted(os.path.basename(os.path.realpath(path)) for path in paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, "tools", "models", "code-10m"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--dtype", choices=["f32", "bf16", "both"], default="both")
    parser.add_argument("--compile", action="store_true", help="torch.compile (2.0 and later)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    fixture = read_safetensors(os.path.join(ROOT, "tests", "data", "lora_ttt_code10m.safetensors"))
    ids = fixture["input_ids"][0].long()
    expected = float(fixture["skip_loss"][0])

    result = {"torch": torch.__version__, "dtype": arguments.dtype, "threads": arguments.threads,
              "compiled": arguments.compile, "blas": blas_in_use(), "tokens": len(ids), "expected_loss": expected}
    # bf16 has 8 bits of mantissa; f32 sums in another order.
    for name, dtype, tolerance in (("f32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 6e-2)):
        if arguments.dtype not in (name, "both"):
            continue
        score = Gpt2(arguments.model, dtype).loss
        if arguments.compile:
            score = torch.compile(score)
        with torch.inference_mode():
            loss = float(score(ids))
            if not abs(loss - expected) <= tolerance:
                sys.exit(f"{name}: loss {loss}, expected {expected}: not the same computation")
            seconds = median_seconds(lambda: score(ids), arguments.runs, arguments.warm_up)
        result["loss" if name == "f32" else "loss_bf16"] = loss
        result["tok_per_s_" + name] = round(len(ids) / seconds, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
