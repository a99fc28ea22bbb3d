#!/usr/bin/env bash
# Runs a command as root: directly, or through sudo.
#
# usage: scripts/as-root.sh WHAT COMMAND [ARGUMENT]...       WHAT is named in the error message
set -euo pipefail

what=$1
shift
PATH=$PATH:/usr/sbin:/sbin
if [[ $EUID -eq 0 ]]; then
    exec "$@"
fi
if ! command -v sudo >/dev/null; then
    echo "$what needs root, for network namespaces and BPF, and there is no sudo: run it as root" >&2
    exit 1
fi
echo "$what needs root, for network namespaces and BPF: using sudo"
exec sudo "$@"
