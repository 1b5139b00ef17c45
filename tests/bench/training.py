#!/usr/bin/env python3
"""Trains what the README's training table shows, measures it, and prints the table.

  training.py --streams DIR --work DIR --out results.json [--ponder build/tools/ponder]
              [--backend cpu] [--threads 2] [--recipe NAME,...] [--row NAME,...] [--max-chunks 48]
  training.py --table results.json

Recipes are `ponder train` commands; what one has written in --work is not trained again. Rows are
`ponder eval` on the four test streams; rows in --out are not run again. DIR holds
{python.train,{python,javascript,java,go}.test}.jsonl.xz. Only python.train is trained on.
"""
import argparse
import json
import os
import subprocess
import sys

LANGUAGES = ["python", "javascript", "java", "go"]
INNER = ["--set", "inner.lr=5e-3", "--set", "inner.beta1=0.5"]
LORA = ["--adapter", "lora", "--set", "lora.layers=last:5"] + INNER
PONDER = ["--adapter", "ttt-linear", "--set", "ttt.form=ponder"]
COMMON = ["--dtype", "bf16", "--set", "context=512", "--valid-every", "0"]

# Steps of 16 streams of up to 24 chunks: 17 M, 139 M and 486 M tokens.
SHORT = ["--steps", "100", "--batch", "16", "--chunks", "24", "--set", "train.warmup=8", "--set",
         "train.lr=3e-3"]
LONG = ["--steps", "800", "--batch", "16", "--chunks", "24", "--set", "train.warmup=16", "--set",
        "train.lr=3e-3"]
LONGEST = ["--steps", "2800"] + LONG[2:]
STATIC = ["--set", "train.inner=0"]  # no permuted ids: nothing could be learned of them

# name: arguments of `ponder train`
RECIPES = {
    # The one that is shipped.
    "adapter": ["adapter", "--seed", "0", "--set", "train.permute=0.25"] + LONG + LORA,
    "longest": ["adapter", "--seed", "0", "--set", "train.permute=0.25"] + LONGEST + LORA,
    "short-0": ["adapter", "--seed", "0", "--set", "train.permute=0.12"] + SHORT + LORA,
    "short-1": ["adapter", "--seed", "1", "--set", "train.permute=0.12"] + SHORT + LORA,
    "short-2": ["adapter", "--seed", "2", "--set", "train.permute=0.12"] + SHORT + LORA,
    "static": ["adapter", "--seed", "0"] + SHORT + STATIC + LORA,
    "ponder": ["adapter", "--seed", "0"] + SHORT + PONDER,
    "ponder-static": ["adapter", "--seed", "0"] + SHORT + STATIC + PONDER,
}

# name: words, recipe whose folder is --adapter (None: as the arguments say), arguments
ROWS = {
    "skip": ("SKIP", None, ["--policy", "skip"]),
    "skip-1024": ("SKIP, context 1,024", None, ["--policy", "skip", "--set", "context=1024"]),
    "untrained": ("LoRA untrained, always", None, ["--set", "lora.layers=last:5"]),
    "untrained-tuned": ("LoRA untrained, lr 5e-3, beta1 0.5, always", None, LORA[2:]),
    "static": ("static adapter", "static", ["--policy", "skip"]),
    "initial": ("trained adapter, never updated", "adapter", ["--policy", "skip"]),
    "always": ("trained adapter, always", "adapter", ["--policy", "always"]),
    "longest": ("486 M tokens, always", "longest", ["--policy", "always"]),
    "short-0": ("17 M tokens, always", "short-0", ["--policy", "always"]),
    "short-1": ("the same, another seed", "short-1", ["--policy", "always"]),
    "short-2": ("the same, a third seed", "short-2", ["--policy", "always"]),
    "short-1024": ("17 M tokens, always, context 1,024", "short-0",
                   ["--policy", "always", "--set", "context=1024"]),
    "policy": ("trained adapter, its gate at 0.5", "adapter",
               ["--policy", "adapter", "--set", "policy.target_rate=0.5"]),
    "policy-0.33": ("trained adapter, its gate at 0.33", "adapter",
                    ["--policy", "adapter", "--set", "policy.target_rate=0.33"]),
    "every2": ("trained adapter, `every:2`", "adapter", ["--policy", "every:2"]),
    "first-half": ("trained adapter, `first:0.5`", "adapter", ["--policy", "first:0.5"]),
    "random-half": ("trained adapter, `random:0.5`", "adapter", ["--policy", "random:0.5"]),
    "oracle": ("17 M tokens, greedy oracle at 0.5 (reads ahead)", "short-0",
               ["--policy", "oracle:0.5"]),
    "ponder-static": ("PonderTTT's layer, static: steps of size zero", "ponder-static",
                      ["--policy", "always"]),
    "ponder-skip": ("PonderTTT's layer, never updated", "ponder", ["--policy", "skip"]),
    "ponder": ("PonderTTT's layer, always", "ponder", ["--policy", "always"]),
    "ponder-gate": ("PonderTTT's layer, its reconstruction gate", "ponder",
                    ["--policy", "ema:reconstruction:0.5"]),
}


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(" ".join(command) + "\n" + done.stderr)
    return json.loads(done.stdout)


def folder_of(arguments, recipe):
    if recipe == "adapter" and not os.path.isdir(os.path.join(arguments.work, recipe)):
        return os.path.join(arguments.model, "adapter")  # the one that is shipped
    return os.path.join(arguments.work, recipe)


def train(arguments, name):
    out = os.path.join(arguments.work, name)
    if os.path.exists(os.path.join(out, "ponder.json")):
        return
    resume = ["--resume"] if os.path.isdir(out) else []
    print("training", name, file=sys.stderr, flush=True)
    run([arguments.ponder, "train"] + RECIPES[name] + COMMON + resume +
        ["--model", arguments.model, "--data",
         os.path.join(arguments.streams, "python.train.jsonl.xz"), "--threads",
         str(arguments.threads), "--backend", arguments.backend, "--out", out, "--json",
         "--quiet"])


def evaluate(arguments, name, language):
    _, recipe, flags = ROWS[name]
    adapter = ["--adapter", folder_of(arguments, recipe)] if recipe else []
    context = [] if any(f.startswith("context=") for f in flags) else ["--set", "context=512"]
    result = run([arguments.ponder, "eval", "--json", "--quiet", "--model", arguments.model,
                  "--dtype", "bf16", "--backend", arguments.backend, "--threads", str(arguments.threads), "--max-chunks",
                  str(arguments.max_chunks), "--stream",
                  os.path.join(arguments.streams, language + ".test.jsonl.xz")] +
                 context + adapter + flags)
    keep = ["loss", "chunks", "steps", "updates", "cost", "flops", "seconds", "isa"]
    return {k: result[k] for k in keep}


def table(results):
    rows = results["rows"]

    def total(name, key):
        return sum(r[key] for r in rows[name].values())

    lines = ["| bf16, context 512 | Python | JavaScript | Java | Go | cost | FLOPs / SKIP |",
             "|---|---|---|---|---|---|---|"]
    for name, (words, _, _) in ROWS.items():
        if set(rows.get(name, {})) != set(LANGUAGES):
            continue
        cells = ["%.3f" % rows[name][l]["loss"] for l in LANGUAGES]
        lines.append("| %s | %s | %.2f | %.2f |" % (
            words, " | ".join(cells), total(name, "steps") / total(name, "chunks"),
            total(name, "flops") / total("skip", "flops")))
    if "always" in rows and "skip" in rows:
        lines += ["", "| share of the always-update's gain that is kept | Python | JavaScript | "
                  "Java | Go | cost |", "|---|---|---|---|---|---|"]
        for name in ["policy", "policy-0.33", "every2", "first-half", "random-half", "oracle"]:
            whole = "short-0" if name == "oracle" else "always"
            if any(set(rows.get(n, {})) != set(LANGUAGES) for n in (name, whole)):
                continue
            kept = [(rows["skip"][l]["loss"] - rows[name][l]["loss"]) /
                    (rows["skip"][l]["loss"] - rows[whole][l]["loss"]) for l in LANGUAGES]
            lines.append("| %s | %s | %.2f |" % (
                ROWS[name][0], " | ".join("%.0f %%" % (100 * k) for k in kept),
                total(name, "steps") / total(name, "chunks")))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ponder", default="build/tools/ponder")
    parser.add_argument("--model", default="tools/models/code-10m")
    parser.add_argument("--streams")
    parser.add_argument("--work")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--max-chunks", type=int, default=48)
    parser.add_argument("--recipe", default=",".join(RECIPES), help="'' = none")
    parser.add_argument("--row", default=",".join(ROWS))
    parser.add_argument("--out")
    parser.add_argument("--table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.load(open(arguments.table))))
        return
    os.makedirs(arguments.work, exist_ok=True)
    for name in filter(None, arguments.recipe.split(",")):
        train(arguments, name)
    results = {"max_chunks": arguments.max_chunks, "rows": {}}
    if os.path.exists(arguments.out):
        results = json.load(open(arguments.out))
    for name in arguments.row.split(","):
        for language in LANGUAGES:
            if language in results["rows"].get(name, {}):
                continue
            one = evaluate(arguments, name, language)
            results["rows"].setdefault(name, {})[language] = one
            print("%-16s %-10s %.4f cost %.2f, %.0f s" % (name, language, one["loss"],
                                                         one["cost"], one["seconds"]),
                  file=sys.stderr, flush=True)
            with open(arguments.out + ".part", "w") as out:
                json.dump(results, out, indent=1)
            os.replace(arguments.out + ".part", arguments.out)
    print(table(results))


if __name__ == "__main__":
    main()
