#!/usr/bin/env bash
# Fuzzes every target of fuzz/ with inputs that libFuzzer generates, guided by code coverage, for FUZZ_SECONDS=60 each. Ends
# with an error if a target fails, names the failing input, and says how to replay it.
#
# usage: scripts/fuzz.sh [TARGET]...          targets: the programs of fuzz/fuzz_targets; all of them if none is named
#
# The corpus is kept in fuzz/corpus for the next run. No nightly toolchain is needed: every rustc's LLVM can instrument the
# code, and libFuzzer itself is compiled from the sources in its crate.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
seconds=${FUZZ_SECONDS:-60}
out=${CARGO_TARGET_DIR:-target}/fuzz
# Seconds that one input may take: much more than any needs, even on a busy machine.
readonly PATIENCE=60
# Longest input, in bytes.
readonly LONGEST=4096

all=(fuzz/fuzz_targets/*.rs)
all=("${all[@]##*/}")
all=("${all[@]%.rs}")
targets=("$@")
[[ $# -gt 0 ]] || targets=("${all[@]}")
for target in "${targets[@]}"; do
    if [[ ! -e fuzz/fuzz_targets/$target.rs ]]; then
        echo "fuzz: no target $target; there are: ${all[*]}" >&2
        exit 1
    fi
done
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
    echo "fuzz: FUZZ_SECONDS=$seconds is not a whole number of seconds: use one such as 60" >&2
    exit 1
fi

host=$(rustc --version --verbose | sed -n 's/^host: //p')
# libFuzzer needs counters at every edge and the operands of comparisons. With --target, Cargo builds the programs that run
# only during the build without them; they could not be linked otherwise.
flags=(
    --cfg fuzzing
    -C passes=sancov-module
    -C llvm-args=-sanitizer-coverage-level=4
    -C llvm-args=-sanitizer-coverage-inline-8bit-counters
    -C llvm-args=-sanitizer-coverage-pc-table
    -C llvm-args=-sanitizer-coverage-trace-compares
)
RUSTFLAGS="${RUSTFLAGS:-} ${flags[*]}" "$cargo" build --locked --manifest-path fuzz/Cargo.toml --bins \
    --target "$host" --target-dir "$out"

# The words of the configuration, which libFuzzer combines.
dictionary=$out/words
sed 's/^# *//' config/reference.toml | grep --only-matching --extended-regexp '^\[+[a-z_.]+\]+|^[a-z_]+ =.*|^[a-z_]+' |
    grep --invert-match '[\\]' | sort --unique | sed 's/"/\\"/g; s/^.*$/"&"/' >"$dictionary"

# Reads what libFuzzer prints and reports progress from time to time.
progress() {
    local target=$1 next=$((SECONDS + 5)) started=$SECONDS line
    while IFS= read -r line; do
        if ((SECONDS >= next)) && [[ $line == '#'*cov:* ]]; then
            next=$((SECONDS + 10))
            say "$target" "$((SECONDS - started))" "$line"
        fi
    done
}

# One line of libFuzzer's: "#4096 pulse cov: 805 ft: 2113 corp: 214/31Kb lim: 4096 exec/s: 1365 rss: 61Mb".
say() {
    local words
    words=$(sed --regexp-extended 's/^#([0-9]+).* cov: ([0-9]+).* corp: ([0-9]+).*$/\1 inputs, \2 places reached, \3 kept/' <<<"$3")
    printf '%-8s %4d of %s s: %s\n' "$1" "$2" "$seconds" "$words"
}

failed=()
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target" "fuzz/regressions/$target"
    log=$out/$target.log
    runner=()
    if [[ $target == @(kernel|user) && $EUID -ne 0 ]]; then
        runner=(scripts/as-root.sh 'make fuzz (targets kernel and user)')
    fi
    options=("-max_total_time=$seconds" "-max_len=$LONGEST" "-timeout=$PATIENCE" "-report_slow_units=$PATIENCE"
        -artifact_prefix="fuzz/regressions/$target/")
    [[ $target != config ]] || options+=(-dict="$dictionary")
    status=0
    "${runner[@]}" "$out/$host/debug/$target" "${options[@]}" \
        "fuzz/corpus/$target" "fuzz/seeds/$target" "fuzz/regressions/$target" 2>&1 |
        tee "$log" | progress "$target" || status=$?
    if [[ ${#runner[@]} -gt 0 ]]; then
        scripts/as-root.sh 'fuzz' chown --recursive --reference=fuzz "fuzz/corpus/$target" "fuzz/regressions/$target" >/dev/null
    fi
    # Git keeps no empty directories; remove them here too.
    rmdir --ignore-fail-on-non-empty "fuzz/regressions/$target"
    if [[ $status -eq 0 ]]; then
        say "$target" "$seconds" "$(grep '^#[0-9].* cov:' "$log" | tail -1)"
        continue
    fi
    failed+=("$target")
    echo "$target FAILED; from $log:"
    { grep --after-context=4 --max-count=1 --extended-regexp 'panicked|ERROR: libFuzzer' "$log" ||
        tail -5 "$log"; } | cut --characters=-2000
    sed -n 's/^.*Test unit written to /the input: /p' "$log" | tail -1
done
rmdir --ignore-fail-on-non-empty fuzz/regressions 2>/dev/null || true

if [[ ${#failed[@]} -gt 0 ]]; then
    {
        echo "fuzz: failed: ${failed[*]}"
        echo "Failing inputs are kept in fuzz/regressions. Every run of the tests replays them:"
        echo "    make test ARGS='--test fuzz'"
    } >&2
    exit 1
fi
