#!/usr/bin/env bash
# Checks that everything a task needs is installed, and installs what is missing.
#
# usage: scripts/deps.sh GROUP...        groups: build run test fuzz lint package bench kernels
#
# On Debian and Ubuntu it installs the missing packages, and only those: as root, or through sudo. Elsewhere it lists
# what is missing. It never installs the Rust toolchain, only checks it. It is quick if nothing is missing.
# scripts/tools.sh installs tools that Debian does not package.
set -euo pipefail
cd "$(dirname "$0")/.."

# group | Debian package | how to tell without dpkg | what it is for
readonly NEEDS='
build | clang          | command:clang        | compiles the kernel program, bpf/fanout.bpf.c
build | gcc            | command:cc           | compiles the bundled libbpf and links Rust programs
build | libc6-dev      | header:stdio.h       | headers of the C library, for both
build | make           | command:make         | builds the bundled libbpf
build | pkg-config     | command:pkg-config   | finds libelf and zlib for the bundled libbpf
build | libelf-dev     | library:libelf.a     | libelf, linked statically, which libbpf needs
build | zlib1g-dev     | library:libz.a       | zlib, linked statically, which libelf needs
run   | iproute2       | command:ip           | ip and tc: namespaces and networks of the demo and the tests
run   | bpftool        | command:bpftool      | shows what the kernel has loaded; make vmlinux
test  | ethtool        | command:ethtool      | switches checksum offload in network tests
test  | nftables       | command:nft          | firewalls in network tests
test  | faketime       | command:faketime     | a clock that jumps, in tests of faults
test  | strace         | command:strace       | has system calls fail, and ends the daemon at one, in tests of faults
test  | nfdump         | command:nfcapd       | collects NetFlow in tests with real programs
test  | softflowd      | command:softflowd    | exports NetFlow in tests with real programs
test  | unbound        | command:unbound      | answers DNS in tests with real programs; its service need not run
test  | dnsperf        | command:dnsperf      | asks in those tests
kernels | qemu-system-x86 | command:qemu-system-x86_64 | emulates the machines of make test-kernels
kernels | busybox-static | command:busybox    | their first program
kernels | wireguard-tools | command:wg        | makes tunnels in those tests that need such kernels
kernels | cpio           | command:cpio       | packs their first file system
kernels | kmod           | command:modprobe   | finds the modules for it
kernels | xz-utils       | command:xz         | unpacks those
test  | dpkg-dev       | command:dpkg-shlibdeps | makes the Debian package that is tested
test  | lintian        | command:lintian      | checks the Debian package that is tested
test  | systemd        | command:systemd-analyze | checks the systemd unit; need not run
package | dpkg-dev     | command:dpkg-shlibdeps | finds what packages the binary needs
package | binutils     | command:strip        | takes the debugging information out of it
test  | python3        | command:python3      | runs the tools of scripts/tools.sh
test  | python3-venv   | python:ensurepip     | installs them
lint  | python3        | command:python3      | runs the tools of scripts/tools.sh
lint  | python3-venv   | python:ensurepip     | installs them
fuzz  | g++            | command:c++          | compiles libFuzzer
bench | dnsdist        | command:dnsdist      | a baseline of the benchmarks
bench | iptables       | command:iptables-nft-restore | a baseline of the benchmarks
bench | nftables       | command:nft          | a baseline of the benchmarks
bench | rsyslog        | command:rsyslogd     | a baseline of the benchmarks
bench | socat          | command:socat        | a baseline of the benchmarks
bench | ethtool        | command:ethtool      | switches offloads of the network that it runs in
bench | nginx          | command:nginx        | a baseline of the benchmarks
bench | libnginx-mod-stream | file:/usr/lib/nginx/modules/ngx_stream_module.so | its module for UDP
lint  | clang-format   | command:clang-format | format of bpf/
lint  | shellcheck     | command:shellcheck   | lints shell scripts
lint  | yamllint       | command:yamllint     | lints YAML
'

main() {
    [[ $# -gt 0 ]] || die "usage: $0 build|run|test|fuzz|lint|package|bench|kernels ..."
    local missing=() group package probe purpose
    local installed=''
    if is_debian; then
        installed=$(installed_packages)
    fi
    # Debian keeps ip, tc and bpftool in sbin, which the $PATH of an ordinary user lacks.
    PATH=$PATH:/usr/sbin:/sbin
    while IFS='|' read -r group package probe purpose; do
        group=${group// /} package=${package// /} probe=${probe// /}
        [[ -n $package && " $* " == *" $group "* ]] || continue
        [[ " ${missing[*]-} " != *" $package|"* ]] || continue
        present "$package" "$probe" "$installed" || missing+=("$package|${purpose# }")
    done <<<"$NEEDS"
    if [[ ${#missing[@]} -gt 0 ]]; then
        provide "${missing[@]}"
    fi
    case " $* " in
        *' build '*) check_rust ;;
    esac
    case " $* " in
        *' lint '*) check_rust_lints ;;
    esac
    scripts/tools.sh "$@"
}

die() {
    printf 'deps: %s\n' "$@" >&2
    exit 1
}

is_debian() {
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null
}

# Prints the installed packages of the table, one a line.
installed_packages() {
    local packages
    packages=$(awk -F ' *[|] *' 'NF == 4 { print $2 }' <<<"$NEEDS")
    # dpkg-query fails if it does not know one of them, which is no error here.
    # shellcheck disable=SC2086 # one word for each package
    dpkg-query --show --showformat '${db:Status-Abbrev}${Package}\n' $packages 2>/dev/null | sed -n 's/^ii *//p' || true
}

# Succeeds if a package is installed, or its tool by other means.
present() {
    local package=$1 probe=$2 installed=$3
    if grep --quiet --line-regexp --fixed-strings "$package" <<<"$installed"; then
        return 0
    fi
    case $probe in
        command:*) command -v "${probe#*:}" >/dev/null ;;
        python:*) python3 -c "import venv, ${probe#*:}" 2>/dev/null ;;
        library:*) command -v cc >/dev/null && [[ $(cc -print-file-name="${probe#*:}") == /* ]] ;;
        file:*) [[ -e ${probe#*:} ]] ;;
        header:*) command -v cc >/dev/null && cc -E -include "${probe#*:}" -x c /dev/null >/dev/null 2>&1 ;;
    esac
}

# Installs the missing packages, each given as "package|purpose", or says what to do.
provide() {
    local entry names=()
    for entry in "$@"; do
        names+=("${entry%%|*}")
    done
    echo "Missing on this machine:"
    for entry in "$@"; do
        printf '  %-14s %s\n' "${entry%%|*}" "${entry#*|}"
    done
    if ! is_debian; then
        die "this is not Debian or Ubuntu: please install the above (the names are Debian's), then run it again"
    fi
    local sudo=()
    if [[ $EUID -ne 0 ]]; then
        command -v sudo >/dev/null || die "installing needs root and there is no sudo: run as root: apt-get install ${names[*]}"
        sudo=(sudo)
    fi
    echo "Installing with apt-get${sudo[0]:+ through sudo}: ${names[*]}"
    "${sudo[@]}" apt-get -q update </dev/null || die \
        "apt-get update failed: is this machine online, and are its package sources right (/etc/apt/sources.list)?"
    refuse_unknown "${names[@]}"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install --yes --no-install-recommends "${names[@]}" \
        </dev/null || die "apt-get could not install: ${names[*]} (its reason is above)"
}

# Stops with the names of the packages that the package sources do not have.
refuse_unknown() {
    local name unknown=()
    for name in "$@"; do
        apt-cache show --no-all-versions "$name" >/dev/null 2>&1 && continue
        case $name in
            bpftool) unknown+=("no package bpftool: on Ubuntu, apt-get install linux-tools-common linux-tools-$(uname -r)") ;;
            *) unknown+=("no package $name in this machine's package sources: Debian 12's main section has it") ;;
        esac
    done
    [[ ${#unknown[@]} -eq 0 ]] || die "${unknown[@]}"
}

check_rust() {
    local cargo=${CARGO:-cargo} wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
    command -v "$cargo" >/dev/null || die "no Rust toolchain: Rust $wanted or newer is needed" \
        "install it: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    found=$("$cargo" --version | awk '{ print $2 }')
    printf '%s\n%s\n' "$wanted" "${found%%-*}" | sort --version-sort --check=quiet || die \
        "Rust $found is too old: $wanted or newer is needed" "with rustup: rustup update stable"
}

check_rust_lints() {
    local cargo=${CARGO:-cargo}
    "$cargo" fmt --version >/dev/null 2>&1 || die "rustfmt is missing: rustup component add rustfmt"
    "$cargo" clippy --version >/dev/null 2>&1 || die "clippy is missing: rustup component add clippy"
}

main "$@"
