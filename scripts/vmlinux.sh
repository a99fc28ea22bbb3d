#!/usr/bin/env bash
# Writes the C declarations of a kernel's types, which the kernel program includes.
#
# usage: scripts/vmlinux.sh BTF HEADER          BTF is usually /sys/kernel/btf/vmlinux
#
# The program is relocated to the types of the kernel it is loaded on (CO-RE), so any recent kernel's types work.
# Regenerate only when the program needs a type that the pinned header lacks.
set -euo pipefail

btf=$1
header=$2
PATH=$PATH:/usr/sbin:/sbin

if [[ ! -r $btf ]]; then
    echo "cannot read $btf: the kernel was built without CONFIG_DEBUG_INFO_BTF, or BTF= names no file" >&2
    exit 1
fi
temporary=$(mktemp "$header.XXXXXX")
trap 'rm --force "$temporary"' EXIT
bpftool btf dump file "$btf" format c >"$temporary"
chmod 644 "$temporary"
mv "$temporary" "$header"
echo "$header: $(wc --lines <"$header") lines from $btf"
