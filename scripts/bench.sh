#!/usr/bin/env bash
# Runs the benchmarks: cargo builds them as you, and they run as root, which network namespaces and BPF programs need.
#
# usage: scripts/bench.sh [--quick] [ARGUMENT OF cargo bench]...
#
# --quick, first, takes a few minutes and leaves the project's documents alone.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
# Debian keeps ip, tc, nft and nginx in sbin, which the $PATH of an ordinary user lacks.
export PATH=$PATH:/usr/sbin:/sbin

if [[ $EUID -ne 0 ]]; then
    if ! command -v sudo >/dev/null; then
        echo "The benchmarks make network namespaces and load BPF programs, and there is no sudo: run them as root." >&2
        exit 1
    fi
    triple=$(rustc --version --verbose | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    # Cargo itself must not run as root, or it would leave files behind that you cannot remove.
    export "CARGO_TARGET_${triple}_RUNNER=$PWD/scripts/run-test.sh"
    echo "The benchmarks run through sudo: they make network namespaces and load BPF programs."
fi

case ${1-} in
    # Not the library's unit tests, which do not know the argument.
    --quick) exec "$cargo" bench --locked --bench '*' "${@:2}" -- --quick ;;
    '') exec "$cargo" bench --locked --bench '*' ;;
    *) exec "$cargo" bench --locked "$@" ;;
esac
