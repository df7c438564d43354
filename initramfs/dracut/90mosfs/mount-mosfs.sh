#!/bin/sh
# Mount hook: only for a dracut without systemd; else sysroot.mount has done it (mosfs-generator.sh).

case "$root" in
    mosfs | mosfs:*)
        if [ -z "$DRACUT_SYSTEMD" ] && [ ! -e /run/mosfs.tried ]; then
            # Where there may be a shell, it returns.
            /sbin/mount.mosfsroot mosfs "$NEWROOT" || die "mosfs: no system is booted"
        fi
        ;;
esac
