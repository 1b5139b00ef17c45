#!/bin/sh
# Builds Ponder on Debian 12: installs the packages that are missing, configures build/ as an
# optimised build and compiles it. With --tests also what the tests need.
#
#     sh tools/setup.sh && build/tools/ponder run
set -eu
cd "$(dirname "$0")/.."

packages="g++ meson ninja-build pkg-config libpcre2-dev nlohmann-json3-dev libcli11-dev
    liblzma-dev zlib1g-dev"
tests=false
if [ "${1-}" = --tests ]; then
    tests=true
    packages="$packages libgtest-dev clang python3 binutils"
fi

# Nothing is downloaded, and no root is needed, where all of them are there.
missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    root=
    [ "$(id -u)" = 0 ] || root=sudo
    $root apt-get update
    # shellcheck disable=SC2086  # a list of words
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
fi

# Tests can be switched on later in the same folder: only what is new gets compiled.
if [ ! -f build/build.ninja ]; then
    meson setup build --buildtype=release "-Dtests=$tests"
elif $tests; then
    meson configure build -Dtests=true
fi
ninja -C build
