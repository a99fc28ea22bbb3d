#!/bin/busybox sh
# shellcheck shell=dash
# The first process of a virtual machine of scripts/test-kernels.sh. It mounts the host's files, with a layer in memory
# over them, as the root file system, runs the tests there and powers off.
b=/bin/busybox

$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module"
done
$b mount -t virtiofs -o ro root /lower
$b mount -t tmpfs layer /upper
$b mkdir /upper/changes /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work overlay /root
for place in proc sys dev; do
    $b mount --move "/$place" "/root/$place"
done
r=/root
$b mount -t tmpfs run $r/run
$b mkdir -p $r/run/netns $r/usr/lib/modules

# Prints the value of a parameter of the kernel's command line.
word() {
    $b sed -n "s/.*$1=\([^ ]*\).*/\1/p" $r/proc/cmdline
}
[ -e $r/lib/modules ] || $b ln -s /usr/lib/modules $r/lib/modules
$b mount --bind "/lower$(word udp_fanout.modules)" $r/usr/lib/modules
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
guest="$(word udp_fanout.guest) $(word udp_fanout.programs) $(word udp_fanout.only)"
# Process 1 itself changes its root: the kernel looks for modprobe from there.
if [ "$(word udp_fanout.init)" = systemd ]; then
    # systemd mounts the rest itself, unless it takes this for a container, where policy would forbid starting services.
    # It would empty /tmp, where the sources may be.
    $b rm -f $r/.dockerenv $r/usr/sbin/policy-rc.d
    $b mkdir -p $r/run/systemd/system
    for needless in tmpfiles-setup tmpfiles-setup-dev timesyncd update-utmp binfmt; do
        $b ln -s /dev/null "$r/run/systemd/system/systemd-$needless.service"
    done
    $b cat >$r/run/systemd/system/udp-fanout-tests.service <<EOF
[Unit]
Description=Tests of udp-fanout
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=HOME=/tmp
ExecStart=/bin/bash $guest
StandardOutput=tty
TTYPath=/dev/console
EOF
    # A real root mount, which mount namespaces need.
    exec $b switch_root $r /lib/systemd/systemd --unit=udp-fanout-tests.service
fi
$b mount -t bpf bpf $r/sys/fs/bpf
$b mount -t cgroup2 cgroup $r/sys/fs/cgroup
# shellcheck disable=SC2086 # three words
exec $b chroot $r /bin/bash $guest
