#!/usr/bin/env bash
# Runs test programs inside a virtual machine of scripts/test-kernels.sh, as its process 1, and powers it off. Lines that
# begin with @@ are for that script.
#
# usage: scripts/kernels/guest.sh FILE PART[,PART]...    FILE lists the programs, one a line; PARTs are of tests' names
set -uo pipefail

ip link set lo up
# Its device file exists only after this.
modprobe tun
# Kernels before 5.11 charge BPF maps to this limit.
ulimit -l unlimited
export ORACLE_CASES=${ORACLE_CASES:-5000} RUST_BACKTRACE=0

IFS=, read -ra only <<<"$2"
failed=0
while read -r program; do
    name=$(basename "$program")
    started=$SECONDS
    # Includes the tests that normal runs ignore because most kernels lack what they need.
    if "$program" --test-threads=1 --include-ignored "${only[@]}"; then
        echo "@@say ${name%-*} ok, $((SECONDS - started)) s"
    else
        echo "@@say ${name%-*} FAILED"
        failed=1
    fi
done <"$1"
echo "@@status=$failed"
busybox poweroff -f
