#!/bin/sh
# Checks and times the CUDA backend in one call, on a machine with a GPU:
#     sh tests/bench/cuda.sh BUILD OUT [STREAM]
# BUILD is a build folder with the module, the tests, tests/cuda_bench and the tool; where it is
# missing it is made here. Prints a table, leaves OUT/cuda.json and a log of each part. STREAM: a
# stream file for `ponder eval`, whose numbers on GPU and CPU are compared.
build=${1:?build folder} out=${2:?folder for results} stream=$3
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
if [ ! -e "$build/build.ninja" ] && [ ! -e "$build/tests/cuda" ]; then
    meson setup "$build" "$here" --buildtype=release -Dcuda=enabled || exit 1
fi
[ -e "$build/tests/cuda" ] || ninja -C "$build" || exit 1
export PONDER_BACKEND_PATH="$build/backends" PONDER_CUDA_MODULE="$build/backends/cuda/ponder-cuda.so"
# Libraries in Python wheels, where the toolkit's folder has none.
for lib in $(find /usr/local /opt /usr/lib -name 'libcublasLt.so.1[23]' 2>/dev/null); do
    LD_LIBRARY_PATH="$(dirname "$lib"):$LD_LIBRARY_PATH"
done
export LD_LIBRARY_PATH="$build/src/api:$LD_LIBRARY_PATH"

failed=0
part() { # name, seconds, command...
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    echo "== $name: exit $status, $(($(date +%s) - start)) s"
    [ $status -eq 0 ] || { failed=1; tail -n 12 "$out/$name.log"; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
part backends 30 "$build/tools/ponder" backends
cat "$out/backends.log"
part ops 240 env PONDER_CPU_MODULE="$PONDER_CUDA_MODULE" "$build/tests/cpu_ops" --gtest_filter='*device*' --gtest_brief=1
part sessions 200 "$build/tests/cuda" --gtest_brief=1
if [ -n "$stream" ]; then
    for dtype in f32 bf16; do
        for backend in cpu cuda; do
            part "eval-$backend-$dtype" 120 "$build/tools/ponder" eval --backend $backend --dtype $dtype --max-chunks 16 --json -q --stream "$stream"
        done
    done
    for log in "$out"/eval-*.log; do
        echo "$(basename "$log" .log): $(head -c 600 "$log" | tr '\n' ' ')"
    done
fi
if [ -z "$NO_SANITIZER" ] && command -v compute-sanitizer > /dev/null; then
    part sanitizer 150 compute-sanitizer --error-exitcode 3 "$build/tests/cuda" --gtest_brief=1 \
        --gtest_filter='Cuda.MemoryThatRunsOut*:Cuda.SnapshotsMove*'
    tail -n 2 "$out/sanitizer.log"
fi
part times 240 "$build/tests/cuda_bench" --json "$out/cuda.json"
cat "$out/times.log"
exit $failed
