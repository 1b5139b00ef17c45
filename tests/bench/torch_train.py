#!/usr/bin/env python3
"""Trains a backbone with PyTorch as `ponder train backbone` does: the same first weights, the same
windows in the same order, schedule, optimizer and clipping; bf16 under autocast with f32 master
weights, or f32. Writes a model folder that `ponder eval` reads, and prints one JSON object. With
--log of a run of `ponder train`, that object also says how far the losses of each step are apart.

    ponder train backbone --new ... --out P --cache CACHE
    torch_train.py --initial P/initial --tokens CACHE/FILE --out T --log P/log.jsonl --steps N \\
                   --batch B --lr 3e-3 --compile
"""
import argparse
import json
import math
import os
import shutil
import struct
import time

import numpy as np
import torch
import torch.nn.functional as F

from torch_skip import read_safetensors

HEADER = 88  # bytes, see tools/ponder/token_cache.cpp


def read_tokens(path):
    with open(path, "rb") as file:
        magic, width, _, tokens = struct.unpack("<8sIIQ", file.read(24))
    if magic != b"ponderT1":
        raise SystemExit(path + ": no token cache")
    ids = np.fromfile(path, {2: "<u2", 4: "<u4"}[width], tokens, offset=HEADER)
    return torch.from_numpy(ids.astype("<i8"))


def mersenne_twister(seed):
    """std::mt19937_64 (Nishimura 2000, "Tables of 64-bit Mersenne twisters")"""
    mask = 2**64 - 1
    state = [seed & mask]
    for i in range(1, 312):
        state.append(6364136223846793005 * (state[-1] ^ state[-1] >> 62) + i & mask)
    while True:
        for i in range(312):
            x = state[i] & 0xffffffff80000000 | state[(i + 1) % 312] & 0x7fffffff
            state[i] = state[(i + 156) % 312] ^ x >> 1 ^ (0xb5026f5aa96619e9 if x & 1 else 0)
        for x in state:
            x ^= x >> 29 & 0x5555555555555555
            x ^= x << 17 & 0x71d67fffeda60000
            x ^= x << 37 & 0xfff7eee000000000
            yield x ^ x >> 43


def windows_in_order(count, seed):
    """Endless, see Order in tools/ponder/training_data.cpp."""
    passes = 0
    while True:
        row, random = list(range(count)), mersenne_twister(seed * 0x9e3779b97f4a7c15 + passes)
        for i in range(count, 1, -1):
            j = next(random) % i
            row[i - 1], row[j] = row[j], row[i - 1]
        yield from row
        passes += 1


class Gpt2(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        with open(os.path.join(folder, "config.json")) as file:
            self.config = json.load(file)
        self.names = {}
        for name, tensor in read_safetensors(os.path.join(folder, "model.safetensors")).items():
            self.names[name] = name.replace(".", "_")
            self.register_parameter(self.names[name], torch.nn.Parameter(tensor.float()))
        self.front = "transformer." if "transformer.wte.weight" in self.names else ""

    def get(self, name):
        return getattr(self, self.names[self.front + name])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.get(name + ".weight"), self.get(name + ".bias"),
                            self.config["layer_norm_epsilon"])

    def linear(self, x, name):
        return F.linear(x, self.get(name + ".weight").t(), self.get(name + ".bias"))

    def forward(self, ids, targets):
        heads, width = self.config["n_head"], self.config["n_embd"]
        streams, tokens = ids.shape
        x = self.get("wte.weight")[ids] + self.get("wpe.weight")[:tokens]
        for layer in range(self.config["n_layer"]):
            h = f"h.{layer}"
            q, k, v = (part.view(streams, tokens, heads, width // heads).transpose(1, 2)
                       for part in self.linear(self.norm(x, h + ".ln_1"), h + ".attn.c_attn")
                       .split(width, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.linear(y.transpose(1, 2).reshape(streams, tokens, width),
                                h + ".attn.c_proj")
            inner = F.gelu(self.linear(self.norm(x, h + ".ln_2"), h + ".mlp.c_fc"),
                           approximate="tanh")
            x = x + self.linear(inner, h + ".mlp.c_proj")
        logits = F.linear(self.norm(x, "ln_f"), self.get("wte.weight"))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def write_model(model, source, out):
    os.makedirs(out, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(os.path.join(source, name), os.path.join(out, name))
    header, data = {}, b""
    for name, attribute in model.names.items():
        array = getattr(model, attribute).detach().float().cpu().numpy()
        header[name] = {"dtype": "F32", "shape": list(array.shape),
                        "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(out, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--f32", action="store_true")
    parser.add_argument("--log")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest" if arguments.f32 else "high")
    ids = read_tokens(arguments.tokens).to(device)
    model = Gpt2(arguments.initial).to(device)
    window = model.config["n_positions"]
    order = windows_in_order((len(ids) - 1) // window, arguments.seed)
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), eps=1e-8,
                                  **({"fused": True} if device == "cuda" else {}))
    forward = torch.compile(model) if arguments.compile else model

    def rate(step):  # of steps 1, 2, ...
        if step <= arguments.warmup:
            return arguments.lr * step / (arguments.warmup + 1)
        share = min(1, (step - arguments.warmup) / (arguments.steps - arguments.warmup))
        return arguments.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))

    losses, times = [], []
    offsets = torch.arange(window + 1, device=device)
    for step in range(1, arguments.steps + 1):
        begin = time.perf_counter()
        chosen = torch.tensor([next(order) for _ in range(arguments.batch)], device=device)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        total = 0
        for some in chosen.split(arguments.micro):
            batch = ids[some[:, None] * window + offsets]
            with torch.autocast(device, torch.bfloat16, enabled=not arguments.f32):
                loss = forward(batch[:, :-1], batch[:, 1:])
            share = len(some) / arguments.batch
            (loss * share).backward()
            total += float(loss.detach()) * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        losses.append(total)
        times.append(time.perf_counter() - begin)
    write_model(model, arguments.initial, arguments.out)
    times.sort()
    apart = {}
    if arguments.log:
        with open(arguments.log) as file:
            theirs = [json.loads(line)["loss"] for line in file if '"loss"' in line]
        differences = [abs(a - b) for a, b in zip(losses, theirs)]
        apart = {"apart_first_10": max(differences[:10]),
                 "apart_mean": sum(differences) / len(differences)}
    print(json.dumps({
        "torch": torch.__version__, "compiled": arguments.compile, "steps": arguments.steps,
        "tokens": arguments.steps * arguments.batch * window,
        "loss": sum(losses[-5:]) / len(losses[-5:]),
        "tokens_per_second": arguments.batch * window / times[len(times) // 2], **apart}))


if __name__ == "__main__":
    main()
