#!/usr/bin/env python3
"""Trains a backbone with PyTorch as `ponder train backbone` does: the same first weights, windows of
the same tokens (in an order of its own), schedule, optimizer and clipping, bf16 under autocast with
f32 master weights. Writes a model folder that `ponder eval` reads, and prints one JSON object.

    ponder train backbone --new ... --out P --cache CACHE
    torch_train.py --initial P/initial --tokens CACHE/FILE --out T --steps N --batch B --lr 3e-3 \\
                   --warmup 20 --compile
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
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    ids = read_tokens(arguments.tokens).to(device)
    model = Gpt2(arguments.initial).to(device)
    window = model.config["n_positions"]
    windows = (len(ids) - 1) // window
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

    order, losses, times = torch.empty(0, dtype=torch.long), [], []
    offsets = torch.arange(window + 1, device=device)
    for step in range(1, arguments.steps + 1):
        begin = time.perf_counter()
        while len(order) < arguments.batch:
            order = torch.cat([order, torch.randperm(windows)])
        chosen, order = order[:arguments.batch].to(device), order[arguments.batch:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        total = 0
        for some in chosen.split(arguments.micro):
            batch = ids[some[:, None] * window + offsets]
            with torch.autocast(device, torch.bfloat16):
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
    print(json.dumps({
        "torch": torch.__version__, "compiled": arguments.compile, "steps": arguments.steps,
        "tokens": arguments.steps * arguments.batch * window,
        "loss": sum(losses[-5:]) / len(losses[-5:]),
        "tokens_per_second": arguments.batch * window / times[len(times) // 2]}))


if __name__ == "__main__":
    main()
