#!/bin/busybox sh
# First process of a test guest: mounts, modules, then a shell that reads commands from the console.
export PATH=/bin HOME=/root
# Programs that the test brought come first: --install does not replace what is there.
/bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
while read -r module; do
    insmod "$module" || echo "init: $module could not be loaded"
done < /modules/list
# Kernel messages stay in dmesg, out of the output of commands.
dmesg -n 1
stty raw -echo < /dev/ttyS0
cd /root
echo
echo vfiod-guest-ready
# Read as a script, the console gets neither echo nor prompt.
sh /dev/ttyS0 > /dev/ttyS0 2>&1
poweroff -f
