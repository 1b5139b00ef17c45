#!/bin/sh
# Checks and times the CUDA backend in one call, on a machine with a GPU:
#     sh tests/bench/cuda.sh BUILD OUT [STREAMS]
# BUILD is a build folder with the module, the tests, tests/cuda_bench and the tool; where it is
# missing it is made here. Prints a table, leaves OUT/cuda.json and a log of each part. STREAMS: a
# folder with python.train.jsonl.xz and python.valid.jsonl.xz. With it the numbers of `ponder eval`
# on GPU and CPU are compared, a backbone is trained as PyTorch trains it (where there is PyTorch)
# and by two processes (where there are two GPUs). ONLY="part part" runs these parts alone.
build=${1:?build folder} out=${2:?folder for results} streams=$3
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
if [ ! -e "$build/build.ninja" ] && [ ! -e "$build/tests/cuda" ]; then
    meson setup "$build" "$here" --buildtype=release -Dcuda=enabled || exit 1
fi
[ -e "$build/tests/cuda" ] || ninja -C "$build" || exit 1
ponder=$build/tools/ponder
export PONDER_BACKEND_PATH="$build/backends" PONDER_CUDA_MODULE="$build/backends/cuda/ponder-cuda.so"
# Libraries in Python wheels, where the toolkit's folder has none.
for lib in $(find /usr/local /opt /usr/lib \( -name 'libcublasLt.so.1[23]' -o -name libnccl.so.2 \) 2>/dev/null); do
    LD_LIBRARY_PATH="$(dirname "$lib"):$LD_LIBRARY_PATH"
done
export LD_LIBRARY_PATH="$build/src/api:$LD_LIBRARY_PATH"
python="env -u LD_LIBRARY_PATH python3" # PyTorch brings its own libraries

failed=0
wanted() { case " ${ONLY:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }
part() { # name, seconds, command...; what it prints goes to OUT/name.log
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    echo "== $name: exit $status, $(($(date +%s) - start)) s"
    [ $status -eq 0 ] || { failed=1; tail -n 12 "$out/$name.log"; }
}

gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt" | wc -l)
cat "$out/machine.txt"
part backends 30 "$ponder" backends
cat "$out/backends.log"
if wanted checks; then
    part ops 240 env PONDER_CPU_MODULE="$PONDER_CUDA_MODULE" "$build/tests/cpu_ops" --gtest_filter='*device*' --gtest_brief=1
    part sessions 200 "$build/tests/cuda" --gtest_brief=1
fi
if wanted eval && [ -n "$streams" ]; then
    for dtype in f32 bf16; do
        for backend in cpu cuda; do
            part "eval-$backend-$dtype" 120 "$ponder" eval --backend $backend --dtype $dtype --max-chunks 16 --json -q --stream "$streams/python.valid.jsonl.xz"
        done
    done
    for log in "$out"/eval-*.log; do
        echo "$(basename "$log" .log): $(head -c 600 "$log" | tr '\n' ' ')"
    done
fi

# code-10m's shape from nothing, 26 M tokens, a batch in one piece. --new makes the tokenizer and the
# first weights; every other run starts from the same ones and reads the same cache.
shape="--set model.layers=10 --set model.width=256 --set model.heads=4 --set model.context=1024"
first="$out/runs/ours/initial"
train() { # name, seconds, arguments
    name=$1 limit=$2
    shift 2
    # shellcheck disable=SC2086  # a list of words
    part "train-$name$RANK" "$limit" "$ponder" train backbone "$@" --data "$streams/python.train.jsonl.xz" \
        --cache "$out/runs/cache" --out "$out/runs/$name" --dtype bf16 --backend cuda --batch 128 \
        --valid-every 0 --checkpoint-every 100000 --quiet --json --set train.lr=3e-3 --set train.micro=128
}
measure() { # name
    part "valid-$1" 60 "$ponder" eval --model "$out/runs/$1" --adapter none --policy skip --quiet --dtype bf16 \
        --backend cuda --stream "$streams/python.valid.jsonl.xz" --json --set context=1024 --set chunk=1024
}
losses() { grep -o '"loss": [-0-9.e+]*' "$out/runs/$1/log.jsonl" | cut -d ' ' -f 2 > "$out/losses-$1.txt"; }
number() { # of a JSON file: its first member of that name
    grep -o "\"$2\": [-0-9.e+]*" "$1" | head -n 1 | cut -d ' ' -f 2
}
if wanted parity && [ -n "$streams" ] && $python -c 'import torch' 2> /dev/null; then
    rm -rf "$out/runs"
    # shellcheck disable=SC2086
    train ours 120 --new --vocab 8192 $shape --steps "${STEPS:-200}"
    part train-torch 200 $python "$here/tests/bench/torch_train.py" --initial "$first" \
        --tokens "$(ls "$out"/runs/cache/*.tokens)" --out "$out/runs/torch" --log "$out/runs/ours/log.jsonl" \
        --steps "${STEPS:-200}" --batch 128 --micro 128 --lr 3e-3 --compile
    for by in ours torch; do
        measure $by
        echo "$by: valid $(number "$out/valid-$by.log" loss), $(number "$out/train-$by.log" tokens_per_second) tokens/s"
    done
    part torch-attention 60 $python "$here/tests/bench/torch_attention.py"
    cat "$out/torch-attention.log"
fi
if wanted group && [ -n "$streams" ] && [ "$gpus" -gt 1 ]; then
    # shellcheck disable=SC2086
    [ -e "$first" ] || train ours 120 --new --vocab 8192 $shape --steps 1
    rm -rf "$out/runs/alone" "$out/runs/together"
    (export CUDA_VISIBLE_DEVICES=0; train alone 90 --model "$first" --steps "${STEPS:-40}"; exit $failed) || failed=1
    export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 NCCL_DEBUG=VERSION
    (export RANK=1 LOCAL_RANK=1; train together 90 --model "$first" --steps "${STEPS:-40}"; exit $failed) &
    second=$!
    (export RANK=0 LOCAL_RANK=0; train together 90 --model "$first" --steps "${STEPS:-40}"; exit $failed) || failed=1
    wait $second || failed=1
    unset WORLD_SIZE
    losses alone
    losses together
    paste "$out/losses-alone.txt" "$out/losses-together.txt" | awk '
        { d = $1 < $2 ? $2 - $1 : $1 - $2; if (NR <= 5 && d > five) five = d; if (d > all) all = d }
        END { print "losses of two processes and of one, apart: 5 steps " five ", " NR " steps " all }'
    for by in alone together0; do
        echo "$by: loss $(number "$out/train-$by.log" loss), $(number "$out/train-$by.log" tokens_per_second) tokens/s of the first process"
    done
fi
if wanted sanitizer && command -v compute-sanitizer > /dev/null; then
    part sanitizer 150 compute-sanitizer --error-exitcode 3 "$build/tests/cuda" --gtest_brief=1 \
        --gtest_filter='Cuda.MemoryThatRunsOut*:Cuda.SnapshotsMove*'
    tail -n 2 "$out/sanitizer.log"
fi
case " $ONLY " in *" generate "*) # among `times` otherwise
    part generate 120 "$build/tests/cuda_bench" --only generate --json "$out/generate.json"
    cat "$out/generate.log" ;;
esac
if wanted times; then
    part times 300 "$build/tests/cuda_bench" --json "$out/cuda.json"
    cat "$out/times.log"
fi
exit $failed
