#!/usr/bin/env python3
"""int8 weights beside floats: size, memory, speed and loss. Prints the README's table.

  int8.py --out results.json [--ponder build/tools/ponder] [--model tools/models/code-10m]
          [--part loss --streams DIR [--max-chunks 16]]
          [--part size] [--part speed --bench build/tests/generate_bench]
          [--part products --ops-bench build/tests/cpu_ops_bench]
  int8.py --table results.json

loss:  `ponder eval` in bf16 on DIR/{python,javascript,java,go}.test.jsonl.xz, frozen and always
       adapted with the model's adapter, each chunk of 512 attending to itself.
size:  bytes on disk after `ponder convert`; of a session in bf16, frozen, what the model holds
       (weights, and packed copies for the products) and the process's largest resident set.
speed: generate_bench, which also makes the GPT-2 124M with random weights that `size` takes.
products: cpu_ops_bench, all products of a token or more with the weights; CPU time of one thread.
Results are added to --out; what is there already is not measured again.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

LANGUAGES = ["python", "javascript", "java", "go"]
WEIGHTS = ["float", "int8"]
LARGE = os.path.join(tempfile.gettempdir(), "ponder-generate-bench")


def run(command):
    """Standard output as JSON, and the process's largest resident set."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    return json.loads(out), usage.ru_maxrss * 1024


class Results:
    def __init__(self, path):
        self.path = path
        self.all = json.load(open(path)) if os.path.exists(path) else {}

    def measure(self, keys, work):
        """The value under these keys, measured if it is not there."""
        at = self.all
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        if keys[-1] in at:
            return
        at[keys[-1]] = work()
        print(*keys, at[keys[-1]] if len(str(at[keys[-1]])) < 200 else "", file=sys.stderr)
        with open(self.path + ".part", "w") as out:
            json.dump(self.all, out, indent=1)
        os.replace(self.path + ".part", self.path)


def losses(a, results):
    adapters = {"frozen": ["--adapter", "none"],
                "adapted": ["--adapter", os.path.join(a.model, "adapter"), "--policy", "always"]}
    for language in LANGUAGES:
        for how, arguments in adapters.items():
            for weights in WEIGHTS:
                def work():
                    found, _ = run([a.ponder, "eval", "--json", "-q", "--model", a.model,
                                    "--stream", f"{a.streams}/{language}.test.jsonl.xz",
                                    "--dtype", "bf16", "--weights", weights, "--max-chunks",
                                    str(a.max_chunks)] + arguments)
                    return {key: found[key] for key in
                            ["loss", "predictions", "chunks", "steps", "rollbacks", "isa", "model"]}
                results.measure(["loss", how, language, weights], work)


def file_bytes(folder):
    return sum(entry.stat().st_size for entry in os.scandir(folder)
               if entry.name.endswith(".safetensors"))


def size(a, folder, weights):
    plan, _ = run([a.ponder, "info", "--json", "--plan-only", "--model", folder, "--dtype", "bf16",
                   "--adapter", "none", "--context", "512"])
    _, resident = run([a.ponder, "bench", "--json", "-q", "--model", folder, "--dtype", "bf16",
                       "--adapter", "none", "--chunks", "1", "--repeats", "1"])
    return {"disk": file_bytes(folder), "resident": resident,
            **{key: plan["memory_plan"][key] for key in
               ["weights", "packed_weights", "activations", "workspace"]}}


def sizes(a, results):
    for name, folder in [("code-10m", a.model), ("gpt2-124m", LARGE)]:
        if not os.path.exists(os.path.join(folder, "config.json")):
            print(f"no {folder}: run --part speed first", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as there:
            copy = os.path.join(there, "int8")
            results.measure(["size", name, "float"], lambda: size(a, folder, "float"))
            subprocess.run([a.ponder, "convert", folder, copy, "--weights", "int8", "-q"],
                           check=True)
            results.measure(["size", name, "int8"], lambda: size(a, copy, "int8"))


def speeds(a, results):
    for weights in WEIGHTS:
        results.measure(["speed", weights], lambda: run(
            [a.bench, "speed", "--threads", "2", "--dtype", "bf16", "--weights", weights])[0])


def products(a, results):
    def work():
        out = subprocess.run([a.ops_bench, "--decode", "--large"], stdout=subprocess.PIPE, text=True,
                             check=True).stdout
        rows = [json.loads(line) for line in out.splitlines()]
        return {"read_gb_s": [row for row in rows if "read_gb_s_1" in row],
                "runs": [row for row in rows if row.get("act") == "bf16"]}
    results.measure(["products"], work)


def table(results):
    lines = []
    row = lambda *cells: lines.append("| " + " | ".join(cells) + " |")
    mib = lambda value: f"{value / 2**20:.1f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"
    row("", "bf16", "int8", "")
    row("---", "---", "---", "---")
    both = lambda kinds: all(w in kinds for w in WEIGHTS)
    for name, kinds in results.get("size", {}).items():
        if not both(kinds):
            continue
        for key, words in [("disk", "weights on disk"), ("weights", "weights in memory"),
                           ("packed_weights", "packed for the products"),
                           ("resident", "largest resident set")]:
            f, i = (kinds[w][key] for w in WEIGHTS)
            row(f"{name}: {words}", mib(f), mib(i), f"{i / f:.2f}")
    speed = results.get("speed", {})
    for index, model in enumerate(speed["float"]["models"] if both(speed) else []):
        other = speed["int8"]["models"][index]
        for one, two in zip(model["runs"], other["runs"]):
            words = f"{model['model']}, {one['adapter']}, sessions: {one['sessions']}"
            for key, what in [("prefill_tokens_per_second", f"prefill of {one['prompt']}"),
                              ("decode_tokens_per_second", "decode")]:
                row(f"{words}: {what}", f"{one[key]:,.0f} tok/s", f"{two[key]:,.0f} tok/s",
                    f"{two[key] / one[key]:.2f}x")
    runs = {(r["model"], r["rows"], r["weights"]): r["ms_1"]
            for r in results.get("products", {}).get("runs", [])}
    for (model, count, weights), ms in runs.items():
        if weights == "int8":
            f = runs[model, count, "bf16"]
            row(f"{model}, products of {count} rows, one thread", f"{f:.2f} ms", f"{ms:.2f} ms",
                f"{f / ms:.2f}x")
    for how, words in [("frozen", "SKIP"), ("adapted", "always adapted")]:
        for language, kinds in results.get("loss", {}).get(how, {}).items():
            if not both(kinds):
                continue
            f, i = (kinds[w]["loss"] for w in WEIGHTS)
            row(f"loss, {language} test, {words}", f"{f:.4f}", f"{i:.4f}", f"{i - f:+.4f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ponder", default="build/tools/ponder")
    parser.add_argument("--bench", default="build/tests/generate_bench")
    parser.add_argument("--ops-bench", default="build/tests/cpu_ops_bench")
    parser.add_argument("--model", default="tools/models/code-10m")
    parser.add_argument("--streams")
    parser.add_argument("--max-chunks", type=int, default=16)
    parser.add_argument("--part", action="append", choices=["loss", "size", "speed", "products"], default=[])
    parser.add_argument("--out")
    parser.add_argument("--table")
    a = parser.parse_args()
    if a.table:
        print(table(json.load(open(a.table))))
        return
    if not a.out:
        parser.error("--out or --table")
    results = Results(a.out)
    for part in a.part:
        if part == "loss" and not a.streams:
            parser.error("--part loss needs --streams")
        {"loss": losses, "size": sizes, "speed": speeds, "products": products}[part](a, results)
    print(table(results.all))


if __name__ == "__main__":
    main()
