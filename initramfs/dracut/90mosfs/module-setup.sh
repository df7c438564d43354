#!/bin/bash
# dracut module: what `mosfs boot` needs in the initramfs (see README of dracut, "module-setup.sh").
#
# CONFIG, which is what the boot trusts, is taken from /etc/mosfs at the time that the initramfs is made. It ends
# dracut where the new initramfs could not boot, so that the one before it stays.

check() {
    require_binaries mosfs || return 1
    [[ -e ${dracutsysrootdir-}/etc/mosfs/manifestCA.pem && -e ${dracutsysrootdir-}/etc/mosfs/product ]] || return 1
    return 0
}

depends() {
    echo base udev-rules
}

installkernel() {
    # Not only what this host uses: the image may be of another kind, and the disk another one. A TPM may be
    # behind SPI or I2C, or in firmware.
    hostonly='' instmods loop dm_mod dm_verity squashfs erofs overlay fuse virtio_pci virtio_blk \
        ext4 xfs btrfs crc32c_generic crc32c_intel sha256_ssse3 tpm_crb tpm_tis \
        "=drivers/char/tpm" "=drivers/tee" "=drivers/spi" "=drivers/i2c/busses"
}

# dracut passes over a module that fails, so that only its end keeps a bad initramfs from being made.
mosfs_fail() {
    dfatal "mosfs: $1: no initramfs is made"
    exit 1
}

install() {
    local file mosfs full code
    # The full program; the one in PATH only mounts images by itself.
    mosfs=$(find_binary mosfs)
    # /bin may be a link to /usr/bin, and come first in PATH.
    for full in "${mosfs%/bin/mosfs}/libexec/mosfs/mosfs-full" /usr/libexec/mosfs/mosfs-full "$mosfs"; do
        [[ ! -x ${dracutsysrootdir-}$full ]] || break
    done
    inst_binary "$full" /usr/bin/mosfs || mosfs_fail "cannot copy $full"
    inst_multiple env modprobe mount
    # A boot checks the system partition before it mounts it.
    inst_multiple -o e2fsck
    # Loaded with dlopen when they are first used, so nothing that lists libraries sees them.
    inst_libdir_file "libtss2-esys.so.0*" "libtss2-sys.so.1*" "libtss2-mu.so.0*" "libblkid.so.1*"
    for file in manifestCA.pem product floor.pub overlay crl.pem root-target on-failure; do
        [[ ! -e ${dracutsysrootdir-}/etc/mosfs/$file ]] || inst_simple "/etc/mosfs/$file"
    done
    inst_hook cmdline 90 "$moddir/parse-mosfs.sh"
    inst_hook mount 90 "$moddir/mount-mosfs.sh"
    inst_script "$moddir/mosfs-root.sh" /sbin/mount.mosfsroot
    inst_script "$moddir/mosfs-stop.sh" /sbin/mosfs-stop
    if dracut_module_included "systemd"; then
        inst_script "$moddir/mosfs-generator.sh" "${systemdutildir:-/usr/lib/systemd}/system-generators/mosfs-generator"
    fi
    dracut_need_initqueue

    for file in libtss2-esys.so.0 libblkid.so.1; do
        [[ -n $(find "$initdir" -name "$file*" -print -quit) ]] || mosfs_fail "$file is missing"
    done
    if [[ ! -e ${dracutsysrootdir-}/etc/mosfs/floor.pub ]]; then
        dwarn "mosfs: /etc/mosfs has no floor.pub: after 'mosfs floor provision', run dracut again"
        return 0
    fi
    # Another machine's program cannot be run here.
    [[ -z ${dracutsysrootdir-} ]] || return 0
    # Could it boot? Not asked in the initramfs: dracut copies the libraries of programs at the end.
    code=0
    "$full" boot --check --config "$initdir/etc/mosfs" > /dev/null || code=$?
    [[ $code == 0 ]] || mosfs_fail "it could not boot (mosfs boot --check: exit code $code)"
}
