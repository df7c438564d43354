#!/bin/sh
# Mounts the root with `mosfs boot`, once: each call may spend a try of a pending system.

case "$root" in
    mosfs | mosfs:*)
        if [ ! -e /run/mosfs.tried ]; then
            : > /run/mosfs.tried
            modprobe -q -a loop dm_verity squashfs overlay 2> /dev/null
            # Words of the kernel command line that nobody knows become environment variables of
            # init, so mosfs gets none of them.
            env -i PATH=/usr/bin:/bin mosfs boot --system /run/mosfs/system --config /etc/mosfs \
                --sysroot "$NEWROOT" > /dev/console 2>&1
            mosfs_code=$?
            if [ "$mosfs_code" -ne 0 ]; then
                echo "mosfs: no system is booted (exit code $mosfs_code); the reason is above" > /dev/console
                die "mosfs: no system is booted (exit code $mosfs_code)"
            fi
        fi
        ;;
esac
