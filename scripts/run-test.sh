#!/usr/bin/env bash
# Cargo's runner for `make test`: a test program as root, with the variables that tests look at, and with a BPF file system at
# /sys/fs/bpf. A machine that has none there gets one that only the test program sees, in a mount namespace.
#
# usage: scripts/run-test.sh PROGRAM [ARGUMENT]...
set -euo pipefail

command=("$@")
if [[ $(stat --file-system --format=%T /sys/fs/bpf 2>/dev/null) != bpf_fs ]]; then
    # shellcheck disable=SC2016 # the inner shell expands it
    command=(unshare --mount --propagation private
        sh -c 'mount -t bpf -o mode=0700 bpf /sys/fs/bpf && exec "$@"' sh "$@")
fi
if [[ $EUID -eq 0 ]]; then
    exec "${command[@]}"
fi
keep=(PATH="$PATH")
for name in CARGO_MANIFEST_DIR CARGO_PKG_NAME CI LD_LIBRARY_PATH RUST_BACKTRACE TMPDIR; do
    [[ -z ${!name+set} ]] || keep+=("$name=${!name}")
done
for name in "${!PROPTEST_@}" "${!UDP_FANOUT_@}"; do
    keep+=("$name=${!name}")
done
exec sudo env "${keep[@]}" "${command[@]}"
