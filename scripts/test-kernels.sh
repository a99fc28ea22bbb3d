#!/usr/bin/env bash
# Runs the BPF tier and the network tier of the tests under Debian's kernels, each booted in a virtual machine that sees
# this machine's files read-only and nothing of its network.
#
# usage: scripts/test-kernels.sh build               builds the tests; then, as root:
#        scripts/test-kernels.sh run [VERSION]...    default: 5.10 6.1 6.12 6.18 and 7, the newest of each
#
# The machine is emulated in software (no /dev/kvm needed) and slow: nothing here measures speed. Of the network tier,
# one test of each kind runs, because each takes minutes there. KERNEL_TESTS names other test programs (root, netns), KERNEL_ONLY
# other parts of names, separated by commas: KERNEL_ONLY=delivery::,policies:: runs two modules of netns.
# KERNEL_INIT=systemd has systemd as the first process, and the tests as a unit of it (make test-systemd).
# Kernels are kept in target/kernels. The exit code is 0 if every kernel passed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly CACHE=${KERNELS_DIR:-$PWD/target/kernels}
readonly SECONDS_A_KERNEL=${KERNEL_TIMEOUT:-1800}
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# Loaded before the root file system is mounted; the kernel loads other modules on demand.
readonly BOOT_MODULES=(virtio_pci virtiofs overlay)
# The test programs to run in the machine, as cargo names them, and parts of the names of the tests.
read -ra PROGRAMS <<<"${KERNEL_TESTS:-root netns}"
readonly ONLY=${KERNEL_ONLY:-root_,netns_receivers_in_all_places_at_once,netns_receivers_in_all_places_over_ipv6,netns_an_interface_that_comes_back,netns_checksums_arrive_right,netns_everyone_everywhere,netns_both_modes_hash_each_sender,netns_datagrams_in_fragments_arrive_whole_and,netns_datagrams_in_a_vlan,netns_datagrams_out_of_a_wireguard,netns_what_comes_without_a_frame_is_copied}

main() {
    local step=${1:-} version failed=()
    [[ $(uname -m) == x86_64 ]] || die "this needs an x86-64 machine, not $(uname -m)"
    mkdir -p "$CACHE"/{lists/partial,archives/partial,packages,boot}
    case $step in
        build) build_tests ;;
        run)
            [[ $EUID -eq 0 ]] || die "booting kernels on this machine's files needs root: run it as root"
            shift
            [[ $# -gt 0 ]] || set -- 5.10 6.1 6.12 6.18 7
            update_package_lists
            for version in "$@"; do
                try_kernel "$version" || failed+=("$version")
            done
            [[ ${#failed[@]} -eq 0 ]] || die "failed: ${failed[*]}"
            ;;
        *) die "usage: $0 build | run [VERSION]..." ;;
    esac
}

die() {
    printf 'test-kernels: %s\n' "$@" >&2
    exit 1
}

# apt-get or apt-cache with separate package sources; this machine's are neither used nor changed.
apt_tool() {
    local tool=$1
    shift
    "$tool" -o Dir::Etc::sourcelist="$CACHE/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$CACHE/lists" \
        -o Dir::Cache="$CACHE" -o Dir::Cache::archives="$CACHE/archives" -o APT::Sandbox::User=root -q "$@"
}

# The mirror that this machine uses, or Debian's own.
mirror() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        grep --only-matching --extended-regexp 'https?://[^ ]+/debian/?( |$)' | head -1 | sed 's,/debian/* *$,,' || true
}

update_package_lists() {
    local mirror
    [[ -r $KEYRING ]] || die "$KEYRING is missing: this needs Debian's package sources (package debian-archive-keyring)"
    mirror=$(mirror)
    : "${mirror:=http://deb.debian.org}"
    {
        echo "deb [signed-by=$KEYRING] $mirror/debian-security bullseye-security main"
        echo "deb [signed-by=$KEYRING] $mirror/debian-security bookworm-security main"
        echo "deb [signed-by=$KEYRING] $mirror/debian bookworm-backports main"
        echo "deb [signed-by=$KEYRING] $mirror/debian trixie-backports main"
    } >"$CACHE/sources.list"
    echo "Looking up Debian's kernels at $mirror"
    apt_tool apt-get update -q >"$CACHE/update.log" 2>&1 || {
        cat "$CACHE/update.log" >&2
        die "apt-get update failed: is this machine online?"
    }
}

# Builds the test programs here; $CACHE/programs lists them for the guest.
build_tests() {
    local cargo=${CARGO:-cargo} program selected=()
    for program in "${PROGRAMS[@]}"; do
        selected+=(--test "$program")
    done
    "$cargo" test --locked --no-run "${selected[@]}" 2>&1 | tee "$CACHE/build.log" | grep --extended-regexp '^error|warning' || true
    sed -n 's/^ *Executable [^(]*(\(.*\))$/\1/p' "$CACHE/build.log" | sed "s,^\([^/]\),$PWD/\1," >"$CACHE/programs"
    [[ $(wc -l <"$CACHE/programs") -eq ${#PROGRAMS[@]} ]] || die "the tests did not build: $CACHE/build.log"
}

try_kernel() {
    local wanted=$1 package release started=$SECONDS
    package=$(newest_package "$wanted")
    if [[ -z $package ]]; then
        echo "$wanted: Debian has no such kernel"
        return 1
    fi
    release=${package#linux-image-}
    echo "$release: starting"
    unpack_kernel "$package" "$release"
    make_initramfs "$release"
    boot "$release"
    local status
    status=$(tr -d '\r' <"$CACHE/$release.log" | sed -n 's/^.*@@status=//p' | tail -1)
    tr -d '\r' <"$CACHE/$release.log" | sed -n 's/^.*@@say //p' | sed "s/^/$release: /"
    if [[ $status != 0 ]]; then
        echo "$release: FAILED after $((SECONDS - started)) s; the end of $CACHE/$release.log:"
        tail -60 "$CACHE/$release.log"
        return 1
    fi
    echo "$release: passed in $((SECONDS - started)) s"
}

# The newest kernel of a series: 6.1 → linux-image-6.1.0-39-cloud-amd64.
newest_package() {
    apt_tool apt-cache pkgnames "linux-image-$1" |
        grep --extended-regexp "^linux-image-${1//./\\.}[.].*-cloud-amd64$" | sort --version-sort | tail -1 || true
}

unpack_kernel() {
    local package=$1 release=$2 tree=$CACHE/$2 part
    [[ ! -e $tree/complete ]] || return 0
    rm -rf "$tree"
    # From 7.0 on the image is split in three.
    mapfile -t parts < <(
        echo "$package"
        apt_tool apt-cache pkgnames "linux-" | grep --extended-regexp --line-regexp "linux-(binary|modules)-${release//+/\\+}" || true
    )
    (cd "$CACHE/packages" && apt_tool apt-get download "${parts[@]}" >/dev/null)
    for part in "${parts[@]}"; do
        dpkg-deb --extract "$(find "$CACHE/packages" -name "${part}_*.deb" | head -1)" "$tree"
    done
    # modprobe always looks below /lib, whether it is merged with /usr/lib or not.
    [[ -d $tree/lib/modules ]] || {
        mkdir -p "$tree/lib"
        ln -s ../usr/lib/modules "$tree/lib/modules"
    }
    [[ -s $tree/lib/modules/$release/modules.dep ]] || depmod -b "$tree" "$release" 2>"$CACHE/depmod.log"
    rm -f "$CACHE/packages/"*.deb
    touch "$tree/complete"
}

# busybox, the modules that the root file system needs, and init.
make_initramfs() {
    local release=$1 root module name
    root=$(mktemp -d "$CACHE/initramfs.XXXXXX")
    mkdir -p "$root"/{bin,dev,proc,sys,modules,lower,upper,root}
    cp "$(command -v busybox)" "$root/bin/busybox"
    for module in "${BOOT_MODULES[@]}"; do
        modprobe -d "$CACHE/$release" -S "$release" --show-depends "$module" 2>/dev/null | sed -n 's/^insmod *\([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r module; do
        name=$(basename "$module" .xz)
        case $module in
            *.xz) xz --decompress --stdout "$module" ;;
            *) cat "$module" ;;
        esac >"$root/modules/$name"
        echo "$name" >>"$root/modules/order"
    done
    cp scripts/kernels/init.sh "$root/init"
    chmod +x "$root/init"
    (cd "$root" && find . | cpio --create --format=newc --quiet) | gzip --fast >"$CACHE/boot/$release.img"
    rm -rf "$root"
}

virtiofsd_program() {
    local candidate
    for candidate in /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd; do
        [[ ! -x $candidate ]] || {
            echo "$candidate"
            return 0
        }
    done
    die "virtiofsd is missing: make deps"
}

# Boots the kernel; the machine powers itself off after the tests.
boot() {
    local release=$1 socket=$CACHE/boot/files.$$ server kernel
    kernel=$(find "$CACHE/$release/" -name 'vmlinuz*' | head -1)
    "$(virtiofsd_program)" --socket-path="$socket" -o source=/ -o cache=always -o sandbox=chroot >"$CACHE/files.log" 2>&1 &
    server=$!
    until [[ -S $socket ]] || ! kill -0 "$server" 2>/dev/null; do
        sleep 0.05
    done
    timeout --kill-after=5 "$SECONDS_A_KERNEL" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
        -accel tcg,thread=multi -cpu max -smp 2 -m 2048 \
        -object memory-backend-memfd,id=memory,size=2048M,share=on -numa node,memdev=memory \
        -chardev socket,id=files,path="$socket" -device vhost-user-fs-pci,chardev=files,tag=root \
        -kernel "$kernel" -initrd "$CACHE/boot/$release.img" -serial stdio \
        -append "console=ttyS0 quiet panic=-1 udp_fanout.modules=$CACHE/$release/lib/modules udp_fanout.guest=$PWD/scripts/kernels/guest.sh udp_fanout.programs=$CACHE/programs udp_fanout.only=$ONLY udp_fanout.init=${KERNEL_INIT:-none}" \
        </dev/null >"$CACHE/$release.log" 2>&1 || echo "the machine did not power off by itself" >>"$CACHE/$release.log"
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    rm -f "$socket"
}

main "$@"
