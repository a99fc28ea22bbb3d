#!/usr/bin/env bash
# Runs every test: cargo builds them as you, and they run as root, which the tiers root_* (BPF programs) and
# netns_* (network namespaces) need. A tier that cannot run is a failure, not a skip.
#
# usage: scripts/test.sh [ARGUMENT OF cargo test]...
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
# Debian keeps ip, tc and bpftool in sbin, which the $PATH of an ordinary user lacks.
export PATH=$PATH:/usr/sbin:/sbin
# Root has another cache directory than you.
UDP_FANOUT_TOOLS=$(scripts/tools.sh --directory)
export UDP_FANOUT_TOOLS

if [[ $EUID -ne 0 ]]; then
    if ! command -v sudo >/dev/null; then
        echo "The tests root_* (BPF programs) and netns_* (network namespaces) need root, and there is no sudo." >&2
        echo "Run it as root; or, for the other tests: cargo test -- --skip root_ --skip netns_" >&2
        exit 1
    fi
    # Cargo itself must not run as root, or it would leave files behind that you cannot remove.
    echo "The test programs run through sudo: they make network namespaces and load BPF programs."
fi
triple=$(rustc --version --verbose | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${triple}_RUNNER=$PWD/scripts/run-test.sh"

exec "$cargo" test --locked --no-fail-fast "$@"
