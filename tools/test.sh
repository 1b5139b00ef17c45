#!/bin/sh
# Builds and runs the tests; the last line is `N passed, N failed`, of single test cases.
#
#     sh tools/test.sh            everything, in build/
#     sh tools/test.sh --sanitize what reads foreign bytes or shares memory, in build-sanitize/,
#                                 under AddressSanitizer and UndefinedBehaviorSanitizer
set -eu
cd "$(dirname "$0")/.."

build_failed() {
    echo "0 passed, 1 failed"
    exit 1
}

sh tools/setup.sh --tests || build_failed
build=build
suites=
if [ "${1-}" = --sanitize ]; then
    build=build-sanitize
    # They start in this order: none of the long ones is waited for at the end.
    suites="gate session train generate api tokenizer hostile_files formats"
    # -O0 but for what is hot, -g1, one of four instruction sets: compiling takes most of the time,
    # line numbers are enough, and the sets share their source. What is found ends the program: else
    # undefined behaviour would be a message among the output of a test that has passed.
    [ -f $build/build.ninja ] || meson setup $build -Doptimization=0 -Ddebug=false \
        "-Dcpp_args=-g1 -fno-sanitize-recover=undefined" -Db_sanitize=address,undefined \
        -Db_lundef=false -Dtools=false -Dcuda=disabled -Dcpu_isas=avx2 || build_failed
fi

# A log of an earlier run must not be counted.
rm -f $build/meson-logs/testlog.json
status=0
# shellcheck disable=SC2086  # a list of words; what these suites need is built first
meson test -C $build --print-errorlogs $suites </dev/null || status=$?
[ -f $build/meson-logs/testlog.json ] || build_failed

python3 - $build/meson-logs/testlog.json <<'END' || status=1
import json
import re
import sys

passed = failed = 0
with open(sys.argv[1]) as log:
    tests = [json.loads(line) for line in log]
for test in tests:
    output = test["stdout"] + test.get("stderr", "")
    good = len(re.findall(r"^\[       OK \] ", output, flags=re.M))
    bad = len(re.findall(r"^\[  FAILED  \] .*\(\d+ ms\)$", output, flags=re.M))
    for ran in re.findall(r"^Ran (\d+) tests?", output, flags=re.M):
        without = {what: sum(map(int, re.findall(rf"^(?:OK|FAILED).*\b{what}=(\d+)", output, flags=re.M)))
                   for what in ("failures", "errors", "skipped")}
        bad += without["failures"] + without["errors"]
        good += int(ran) - sum(without.values())
    ok = test["result"] in ("OK", "EXPECTEDFAIL")
    if not good and not bad and test["result"] != "SKIP":
        good = int(ok)
    if not ok and not bad:
        bad = 1  # crashed or timed out: no case says so itself
    passed += good
    failed += bad
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0 or passed == 0)
END
exit $status
