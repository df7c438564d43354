//! mosfs in an administrator's chroot: a folder that is no mount point, on a mount that is shared with others.

#[path = "common/whole/mod.rs"]
mod common;

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use common::commands::{join, need_root, run};
use common::layers::{self, layer};
use common::system::{build, image_name, import_manifest, keys, scratch, source};

/// Makes the chroot `$root` on a mount that is shared.
const CHROOT: &str = r#"
set -eu
mount -t tmpfs outer "$T/outer"
mount --make-shared "$T/outer"
root=$T/outer/root
mkdir -p "$root/usr" "$root/etc" "$root/dev" "$root/proc" "$root/run" "$root/tmp" "$root/m" "$root/work" "$root/program"
for link in bin sbin lib lib64; do ln -s "usr/$link" "$root/$link"; done
mount --rbind /usr "$root/usr"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$T/work" "$root/work"
mount --bind "$PROGRAM" "$root/program"
"#;

/// Mounts with an upper layer, which is where mosfs makes mounts of its own on the way. All are in the chroot, so
/// `$MOUNTS` is what its surroundings see of them.
const WRITABLE: &str = r#"
mount --bind /etc "$root/etc"
mounts() { awk -v outer="$T/outer" 'index($5, outer) == 1 { print substr($5, length(outer) + 1), $(NF - 2) }' /proc/self/mountinfo; }
mounts >"$T/before"
chroot "$root" /program/mosfs mount --backend fuse --upper /work/changes "$SOURCE" /m
mounts >"$T/mounted"
chroot "$root" sh -ec 'cat /m/file; echo changed >/m/file; cat /m/file; /program/mosfs umount /m; cat /work/changes/file'
mounts >"$T/after"
echo "-- new"
diff "$T/before" "$T/mounted" | grep '^[<>]' || true
echo "-- left"
diff "$T/before" "$T/after" || true
"#;

/// Mounts and unmounts as an ordinary user, where /etc has a name for that user, and nothing else.
const USER: &str = r#"
echo 'nobody:x:65534:65534:nobody:/:/bin/sh' >"$root/etc/passwd"
chmod 1777 "$root/tmp"
chown 65534 "$root/m"
chroot "$root" setpriv --reuid 65534 --regid 65534 --clear-groups sh -ec '
	/program/mosfs mount --backend fuse "$SOURCE" /m
	cat /m/file
	/program/mosfs umount /m
	ls -A /m'
"#;

#[test]
fn a_writable_mount_in_a_chroot_whose_root_is_no_mount_point() {
    // Nothing but the mount itself came out of it, and nothing stayed.
    assert_eq!(in_chroot(WRITABLE), "as it was\nchanged\nchanged\n-- new\n> /root/m overlay\n-- left\n");
}

/// A minimal chroot has no /etc/mtab, without which fusermount3 does not unmount.
#[test]
fn a_user_unmounts_in_a_chroot_without_mtab() {
    assert_eq!(in_chroot(USER), "as it was\n");
}

/// Builds an image with one file, and runs a script that begins with [`CHROOT`]. Returns what it printed.
fn in_chroot(script: &str) -> String {
    need_root();
    let dir = scratch();
    let work = dir.path().join("work");
    for folder in [&work, &dir.path().join("outer")] {
        std::fs::create_dir(folder).expect("make a folder");
    }
    let layout = work.join("layout");
    layers::image(&layout, "app", vec![layer().dir("./").file("file", "as it was\n")]);
    let mut url = OsString::from("oci:");
    url.push(join(&layout, ":", "app"));
    let (manifest, store) = (work.join("import.yaml"), work.join("store"));
    import_manifest(&manifest, &url);
    run(&mut build(&manifest, &store, &keys(&work)));

    let program = Path::new(env!("CARGO_BIN_EXE_mosfs")).parent().expect("a folder");
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/private-mounts"));
    command.args(["bash", "-c", &format!("{CHROOT}{script}")]).env("T", dir.path()).env("PROGRAM", program);
    command.env("SOURCE", source(Path::new("/work/store"), &image_name(&store)));
    for name in ["MOSFS_SYSTEM", "MOSFS_CONFIG", "MOSFS_FAILPOINT", "MOSFS_RUN"] {
        command.env_remove(name);
    }
    run(&mut command)
}
