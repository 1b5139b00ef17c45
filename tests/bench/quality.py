#!/usr/bin/env python3
"""Runs `ponder eval` for every row of the README's quality table and prints the table.

  quality.py --ponder build/tools/ponder --streams DIR [--dtype f32] [--jobs 1] [--threads 2]
             [--only NAME,...] [--languages NAME,...] [--seed 0] [--max-chunks 48]
             [--out results.json]
  quality.py --table results.json

DIR holds {python,javascript,java,go}.test.jsonl.xz. Each eval is one process with --threads
threads; --jobs of them run at once. Results are added to --out as they come, and rows that are
there already are not run again.
"""
import argparse
import concurrent.futures
import json
import os
import subprocess
import sys

LANGUAGES = ["python", "javascript", "java", "go"]

# name: (words for the table, arguments, the bar per language, None = no bar)
ROWS = {
    "skip": ("SKIP (frozen)", ["--policy", "skip"], "2.190 2.907 2.890 2.954 +-0.005"),
    "skip-1024": ("SKIP, context 1,024", ["--policy", "skip", "--context", "1024"],
                  "1.925 2.451 2.375 2.386 +-0.005"),
    "lora-all": ("LoRA, all layers, always", ["--set", "lora.layers=all"],
                 "1.995 2.32 2.355 2.335"),
    "lora-last5": ("LoRA, last 5 layers, always", ["--set", "lora.layers=last:5"],
                   "1.97 2.35 2.34 2.37"),
    "lora-last5-2": ("LoRA, last 5 layers, two steps",
                     ["--set", "lora.layers=last:5", "--steps", "2"], "1.985 2.27 2.27 2.28"),
    "every2": ("LoRA, all layers, every:2",
               ["--set", "lora.layers=all", "--policy", "every:2"], "2.04 2.49 2.51 2.52"),
    "first-half": ("LoRA, all layers, first:0.5",
                   ["--set", "lora.layers=all", "--policy", "first:0.5"], None),
    "random-half": ("LoRA, all layers, random:0.5",
                    ["--set", "lora.layers=all", "--policy", "random:0.5"], None),
    "ema-half": ("LoRA, all layers, ema:loss:0.5",
                 ["--set", "lora.layers=all", "--policy", "ema:loss:0.5"], None),
    "lora-all-1024": ("LoRA, all layers, context 1,024",
                      ["--set", "lora.layers=all", "--context", "1024"],
                      "1.81 2.085 2.04 2.025"),
    "ttt-linear": ("TTT-Linear, untrained, always", ["--adapter", "ttt-linear"], None),
}


def evaluate(arguments, name, language):
    command = [arguments.ponder, "eval", "--json", "--model", arguments.model, "--stream",
               os.path.join(arguments.streams, language + ".test.jsonl.xz"), "--dtype",
               arguments.dtype, "--threads", str(arguments.threads), "--max-chunks",
               str(arguments.max_chunks), "--seed", str(arguments.seed)] + ROWS[name][1]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(" ".join(command) + "\n" + done.stderr)
    return json.loads(done.stdout)


def table(results):
    skip = {l: results["rows"]["skip"][l] for l in LANGUAGES if l in results["rows"].get("skip", {})}
    lines = ["| | Python | JavaScript | Java | Go | cost | FLOPs / SKIP |",
             "|---|---|---|---|---|---|---|"]
    for name, (words, _, bar) in ROWS.items():
        row = results["rows"].get(name)
        if not row:
            continue
        cells = []
        for i, language in enumerate(LANGUAGES):
            one = row.get(language)
            cells.append("-" if one is None else "%.3f" % one["loss"])
            if one and bar:
                goal = float(bar.split()[i])
                exact = "+-" in bar
                good = abs(one["loss"] - goal) <= 0.005 if exact else one["loss"] <= goal
                if not good:
                    cells[-1] += " (bar %s)" % bar.split()[i]
        some = list(row.values())
        cost = sum(r["steps"] for r in some) / sum(r["chunks"] for r in some)
        flops = sum(r["flops"] for r in some)
        base = sum(skip[l]["flops"] for l in row if l in skip)
        ratio = "%.2f" % (flops / base) if base else "-"
        lines.append("| %s | %s | %.2f | %s |" % (words, " | ".join(cells), cost, ratio))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ponder", default="build/tools/ponder")
    parser.add_argument("--model", default="tools/models/code-10m")
    parser.add_argument("--streams")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--max-chunks", type=int, default=48)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--out")
    parser.add_argument("--table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.load(open(arguments.table))))
        return
    results = {"dtype": arguments.dtype, "max_chunks": arguments.max_chunks,
               "seed": arguments.seed, "rows": {}}
    if arguments.out and os.path.exists(arguments.out):
        results = json.load(open(arguments.out))
    jobs = [(n, l) for n in arguments.only.split(",")
            for l in arguments.languages.split(",")
            if l not in results["rows"].get(n, {})]
    failed = False
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(evaluate, arguments, n, l): (n, l) for n, l in jobs}
        for future in concurrent.futures.as_completed(running):
            name, language = running[future]
            try:
                result = future.result()
            except RuntimeError as error:
                failed = True
                print(error, file=sys.stderr)
                continue
            result.pop("packages", None)
            results["rows"].setdefault(name, {})[language] = result
            print("%-14s %-10s %.4f" % (name, language, result["loss"]), file=sys.stderr, flush=True)
            if arguments.out:
                with open(arguments.out + ".part", "w") as out:
                    json.dump(results, out, indent=1)
                os.replace(arguments.out + ".part", arguments.out)
    print(table(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()
