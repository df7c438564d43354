#!/bin/sh
# systemd generator (systemd.generator(7)): makes sysroot.mount for root=mosfs, and takes the root shells away.
#
# systemd's own generator takes `mosfs` for the name of a device; a unit in the early folder ($2) has
# precedence over what it makes, and over the units of the initramfs.

ours=
# shellcheck disable=SC2013
for word in $(cat /proc/cmdline); do
    case "$word" in
        root=mosfs | root=mosfs:*) ours=yes ;;
        root=*) ours= ;;
    esac
done
[ -n "$ours" ] || exit 0

cat > "$2/sysroot.mount" << 'UNIT'
[Unit]
Description=Root of the signed system
Documentation=man:mosfs(1)
DefaultDependencies=no
After=systemd-udevd.service dracut-pre-mount.service
Before=initrd-root-fs.target
Conflicts=umount.target

[Mount]
What=mosfs
Where=/sysroot
Type=mosfsroot
TimeoutSec=300
UNIT
mkdir -p "$2/initrd-root-fs.target.requires"
ln -sf ../sysroot.mount "$2/initrd-root-fs.target.requires/sysroot.mount"

# All that gives a root shell in an initramfs of dracut: after a failure, for rd.break, for a target that the command
# line names. The kernel command line is anybody's.
if ! /sbin/mosfs-stop --allows-shell; then
    for unit in emergency rescue dracut-emergency; do
        cat > "$2/$unit.service" << 'UNIT'
[Unit]
Description=Stop this machine, since no system is booted
Documentation=man:mosfs(1)
DefaultDependencies=no

[Service]
Type=oneshot
ExecStart=/sbin/mosfs-stop
StandardInput=null
UNIT
    done
    ln -sf /dev/null "$2/debug-shell.service"
fi
