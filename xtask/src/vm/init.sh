#!/bin/busybox sh
# First program of the dev VM: makes the host's tree its root, writable in memory only, and hands over
# to xtask itself (kernel parameter nutshell.init=PATH).

bb=/bin/busybox
fail() { echo "dev VM: $*"; $bb sleep 1; $bb poweroff -f; }

$bb mkdir -p /proc /sys /dev /lower /memory /root
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs dev /dev

while read -r module; do
    $bb insmod "/modules/$module" || fail "cannot load $module"
done < /modules/order

$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro hostroot /lower ||
    fail "cannot mount the host's root"
$bb mount -t tmpfs -o size=80% memory /memory
$bb mkdir /memory/upper /memory/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work overlay /root ||
    fail "cannot mount the overlay"

for parameter in $($bb cat /proc/cmdline); do
    case $parameter in
        nutshell.init=*) init=${parameter#*=} ;;
        nutshell.out=1) out=1 ;;
    esac
done

$bb mount --move /proc /root/proc
$bb mount --move /sys /root/sys
$bb mount --move /dev /root/dev
$bb mkdir -p /root/dev/pts /root/dev/shm /root/dev/mqueue
$bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
$bb mount -t tmpfs shm /root/dev/shm
$bb mount -t mqueue mqueue /root/dev/mqueue
$bb mount -t cgroup2 -o nsdelegate cgroup2 /root/sys/fs/cgroup
$bb mount -t bpf bpf /root/sys/fs/bpf 2>/dev/null
# Unix sockets and overlay upper layers need a real file system below them.
$bb mount -t tmpfs -o mode=755 run /root/run
$bb mkdir -p /root/run/lock /root/var/lib/containerd
$bb mount -t tmpfs -o mode=711 containerd /root/var/lib/containerd
if [ -n "$out" ]; then
    $bb mkdir -p /root/out
    $bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out /root/out || fail "cannot mount /out"
fi
for fd in 0 1 2; do
    $bb ln -sf "/proc/self/fd/$fd" "/root/dev/$(echo "stdin stdout stderr" | $bb cut -d' ' -f$((fd + 1)))"
done
$bb ln -sf /proc/self/fd /root/dev/fd
$bb ip link set lo up
$bb hostname devvm

exec $bb switch_root /root "$init" vm-init
fail "cannot start $init"
