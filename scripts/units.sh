#!/usr/bin/env bash
# Is there anything wrong with the systemd units, and are they confined well enough? Needs systemd's programs, but neither
# systemd running nor the daemon installed.
set -euo pipefail
cd "$(dirname "$0")/.."

# The most that `systemd-analyze security` may find, in tenths of its points.
readonly MOST_EXPOSURE=20

directory=$(mktemp --directory)
trap 'rm --recursive --force "$directory"' EXIT
failed=0

for unit in systemd/*.service; do
    copy=$directory/${unit##*/}
    sed 's,^\(ExecStart[A-Za-z]*\|ExecReload\)=[^ ]*,\1=/bin/true,' "$unit" >"$copy"
    # It succeeds even if it finds fault: anything it prints is one.
    complaints=$(systemd-analyze --man=no verify "$copy" 2>&1) || complaints+=" ($unit)"
    if [[ -n $complaints ]]; then
        echo "$complaints"
        failed=1
    fi
    # systemd before version 250 cannot tell for a unit that is not loaded.
    systemd-analyze --help | grep --quiet -e --offline || continue
    if ! exposure=$(systemd-analyze security --no-pager --offline=true --threshold=$MOST_EXPOSURE "$copy"); then
        grep --invert-match '✓' <<<"$exposure"
        echo "$unit: more exposed than $((MOST_EXPOSURE / 10)).$((MOST_EXPOSURE % 10))"
        failed=1
    fi
done
exit $failed
