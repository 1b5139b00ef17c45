#!/bin/sh
# The CUDA module on the emulator: builds it and runs the op tests on it. No GPU, but the toolkit's
# headers. Takes minutes: every thread of every block is a fiber.
#     sh tests/emulator/module.sh BUILD [gtest filter]
# BUILD has tests/cpu_ops. Without a filter all ops run.
set -eu
build=$(cd "${1:?build folder}" && pwd) filter=${2:-*}
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
cuda=${CUDA_HOME:-/usr/local/cuda}
work=$build/emulated-module
mkdir -p "$work/cub/device"
python3 "$here/module.py" "$root/backends/cuda" "$work"
cp "$here/emulated.hpp" "$here/emulated.cpp" "$work"
cp "$here/device_radix_sort.cuh" "$work/cub/device"
cp "$root/backends/cuda/blas.hpp" "$root/backends/cuda/ttt_scan.hpp" "$work"
cd "$work"
for file in *.cu emulated.cpp module.cpp product.cpp scan.cpp; do
    echo "$file"
done | xargs -P "$(nproc)" -I{} g++ -std=c++20 -O1 -w -fPIC -x c++ -include emulated.hpp -I . \
    -I "$root/include" -I "$cuda/include" '-DPONDER_CUDA_VERSION="0"' -c {} -o {}.o
g++ -shared -o ponder-cuda-emulated.so ./*.o -Wl,--version-script,"$root/backends/cuda/cuda.map"
PONDER_CPU_MODULE=$work/ponder-cuda-emulated.so "$build/tests/cpu_ops" \
    --gtest_filter="$filter/device" --gtest_brief=1
