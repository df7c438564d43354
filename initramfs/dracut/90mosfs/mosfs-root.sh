#!/bin/sh
# Mounts the root with `mosfs boot`, once: each call may spend a try of a pending system.
#
# Called as mount.mosfsroot by mount(8) for sysroot.mount (SOURCE DIR ...), or by the mount hook of
# a dracut without systemd.

sysroot=${2:-/sysroot}
[ ! -e /run/mosfs.tried ] || exit 1
: > /run/mosfs.tried
modprobe -q -a loop dm_verity squashfs overlay fuse 2> /dev/null
# Words of the kernel command line that nobody knows become environment variables of init, so mosfs
# gets none of them.
code=0
env -i PATH=/usr/bin:/bin mosfs boot --system /run/mosfs/system --config /etc/mosfs \
    --sysroot "$sysroot" > /dev/console 2>&1 || code=$?
if [ "$code" -ne 0 ]; then
    echo "mosfs: no system is booted (exit code $code), the reason is above" > /dev/console
    /sbin/mosfs-stop --allows-shell || exec /sbin/mosfs-stop
    exit 1
fi
