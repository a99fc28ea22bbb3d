#!/usr/bin/env bash
# Runs every check that needs no running program, and fails if any of them found something.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
failed=()

# check NAME COMMAND...: runs the command and records whether it failed.
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

# Files that git tracks or would track, by pattern; ignored and built files are not linted.
ours() {
    git ls-files --cached --others --exclude-standard -- "$@"
}

shell_scripts() {
    ours '*.sh'
    ours .ci scripts deploy/debian | xargs grep --files-with-matches --no-messages '^#!.*sh$' || true
}

mapfile -t sh < <(shell_scripts | sort --unique)
# The chart's templates are not YAML until they are rendered; tests check the rendered files.
mapfile -t yaml < <(ours '*.yaml' '*.yml' .yamllint .clang-format | grep --invert-match '^deploy/helm/.*/templates/')
mapfile -t c < <(ours 'bpf/*.c' 'bpf/*.h' 'benches/*.c' 'lab/*.c')

check rustfmt "$cargo" fmt --all --check
# Its programs call testkit/src/fuzz/, which clippy checks with the workspace.
check 'rustfmt of fuzz/' "$cargo" fmt --manifest-path fuzz/Cargo.toml --check
check clippy "$cargo" clippy --workspace --all-targets --locked -- -D warnings
[[ ${#c[@]} -eq 0 ]] || check clang-format clang-format --dry-run -Werror "${c[@]}"
check shellcheck shellcheck "${sh[@]}"
check hadolint "$(scripts/tools.sh --bin hadolint)/hadolint" Dockerfile
check yamllint yamllint --strict "${yaml[@]}"
if command -v systemd-analyze >/dev/null; then
    check 'systemd units' scripts/units.sh
fi
if "$cargo" deny --version >/dev/null 2>&1; then
    check cargo-deny "$cargo" deny --locked check --hide-inclusion-graph bans licenses sources
    check 'cargo-deny of fuzz/' "$cargo" deny --manifest-path fuzz/Cargo.toml --locked check \
        --hide-inclusion-graph bans licenses sources
else
    echo "== cargo-deny: not installed; skipping the check of the dependencies' licences"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'lint: failed:' >&2
    printf ' %s' "${failed[@]}" >&2
    echo >&2
    exit 1
fi
