#!/usr/bin/env bash
# Cargo's runner for `make test` by an ordinary user: a test program through sudo, with the variables tests look at.
set -euo pipefail

keep=(PATH="$PATH")
for name in CARGO_MANIFEST_DIR CARGO_PKG_NAME CI LD_LIBRARY_PATH RUST_BACKTRACE TMPDIR; do
    [[ -z ${!name+set} ]] || keep+=("$name=${!name}")
done
for name in "${!PROPTEST_@}" "${!UDP_FANOUT_@}"; do
    keep+=("$name=${!name}")
done
exec sudo env "${keep[@]}" "$@"
