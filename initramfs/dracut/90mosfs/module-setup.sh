#!/bin/bash
# dracut module: what `mosfs boot` needs in the initramfs (see README of dracut, "module-setup.sh").
#
# CONFIG, which is what the boot trusts, is taken from /etc/mosfs (manifestCA.pem, crl.pem, product,
# floor.pub, overlay) at the time that the initramfs is made.

check() {
    require_binaries mosfs || return 1
    [[ -e ${dracutsysrootdir-}/etc/mosfs/manifestCA.pem && -e ${dracutsysrootdir-}/etc/mosfs/product ]] || return 1
    return 0
}

depends() {
    echo base udev-rules
}

installkernel() {
    # Not only what this host uses: the image may be of another kind, and the disk another one.
    hostonly='' instmods loop dm_mod dm_verity squashfs erofs overlay fuse virtio_pci virtio_blk \
        ext4 xfs btrfs crc32c_generic crc32c_intel sha256_ssse3 tpm_crb tpm_tis
}

install() {
    local file mosfs full
    # The full program; the one in PATH only mounts images by itself.
    mosfs=$(find_binary mosfs)
    # /bin may be a link to /usr/bin, and come first in PATH.
    for full in "${mosfs%/bin/mosfs}/libexec/mosfs/mosfs-full" /usr/libexec/mosfs/mosfs-full "$mosfs"; do
        [[ ! -x ${dracutsysrootdir-}$full ]] || break
    done
    inst_binary "$full" /usr/bin/mosfs
    inst_multiple env modprobe mount
    # Loaded with dlopen when the TPM is asked, so nothing that lists libraries sees it.
    inst_libdir_file "libtss2-esys.so.0*" "libtss2-sys.so.1*" "libtss2-mu.so.0*"
    for file in manifestCA.pem crl.pem product floor.pub overlay; do
        [[ ! -e ${dracutsysrootdir-}/etc/mosfs/$file ]] || inst_simple "/etc/mosfs/$file"
    done
    inst_hook cmdline 90 "$moddir/parse-mosfs.sh"
    inst_hook mount 90 "$moddir/mount-mosfs.sh"
    inst_script "$moddir/mosfs-root.sh" /sbin/mount.mosfsroot
    if dracut_module_included "systemd"; then
        inst_script "$moddir/mosfs-generator.sh" "${systemdutildir:-/usr/lib/systemd}/system-generators/mosfs-generator"
    fi
    dracut_need_initqueue
}
