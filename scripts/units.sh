#!/usr/bin/env bash
# Checks the systemd units for errors, and their exposure. Needs systemd's programs, but neither a running systemd nor an
# installed daemon.
set -euo pipefail
cd "$(dirname "$0")/.."

# The highest exposure that `systemd-analyze security` may report, in tenths of its points.
readonly MOST_EXPOSURE=20

directory=$(mktemp --directory)
trap 'rm --recursive --force "$directory"' EXIT
failed=0

for unit in systemd/*.service; do
    copy=$directory/${unit##*/}
    sed 's,^\(ExecStart[A-Za-z]*\|ExecReload\)=[^ ]*,\1=/bin/true,' "$unit" >"$copy"
    # systemd-analyze succeeds even if it finds faults; every line that it prints is one.
    complaints=$(systemd-analyze --man=no verify "$copy" 2>&1) || complaints+=" ($unit)"
    if [[ -n $complaints ]]; then
        echo "$complaints"
        failed=1
    fi
    # systemd before version 250 cannot analyze a unit that is not loaded.
    systemd-analyze --help | grep --quiet -e --offline || continue
    if ! exposure=$(systemd-analyze security --no-pager --offline=true --threshold=$MOST_EXPOSURE "$copy"); then
        grep --invert-match '✓' <<<"$exposure"
        echo "$unit: more exposed than $((MOST_EXPOSURE / 10)).$((MOST_EXPOSURE % 10))"
        failed=1
    fi
done
exit $failed
