//! The hooks of both generators: an initramfs that could boot nothing is not made.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::device::{Device, MOSFS, SMALL};
use super::machine::{script, source_file};
use super::{DRACUT, INITRAMFS_TOOLS, KERNEL};

/// Runs the real generator in a Debian root.
fn make(device: &Device, generator: &str) -> (bool, String) {
    let out = device.path("made");
    fs::write(&out, "the one before").expect("a file");
    let mut command = script("make-initrd");
    command
        .arg(generator)
        .arg(&out)
        .args(["--mosfs", MOSFS, "--kernel", KERNEL, "--config"])
        .arg(device.config());
    let output = command.output().expect("tests/vm/make-initrd");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_made = fs::read(&out).expect("a file") != b"the one before";
    assert_eq!(output.status.success(), is_made, "{said}");
    (is_made, said)
}

#[test]
fn each_generator_fails_where_its_initramfs_could_not_boot() {
    for generator in [INITRAMFS_TOOLS, DRACUT] {
        let device = Device::with(SMALL);
        let (is_made, said) = make(&device, generator);
        assert!(is_made, "{generator}: {said}");
        fs::write(device.config().join("on-failure"), "perhaps\n").unwrap();
        let (is_made, said) = make(&device, generator);
        assert!(!is_made, "{generator}");
        assert!(said.contains("no initramfs is made"), "{generator}: {said}");
        fs::remove_file(device.config().join("on-failure")).unwrap();
        // Before the floor is provisioned there is nothing that it could boot, and nothing that it could replace.
        fs::remove_file(device.config().join("floor.pub")).unwrap();
        let (is_made, said) = make(&device, generator);
        assert!(is_made, "{generator}: {said}");
        assert!(said.contains("has no floor.pub"), "{generator}: {said}");
    }
}

/// Runs the hook of initramfs-tools with its helpers replaced by nothing, and an ldconfig that does not know `missing`.
fn hook(dir: &Path, config: &Path, missing: &str) -> (Option<i32>, String) {
    let bin = dir.join("bin");
    let _ = fs::remove_dir_all(&bin);
    fs::create_dir_all(&bin).unwrap();
    let ldconfig = format!("#!/bin/sh\n/sbin/ldconfig \"$@\" | grep -v '{missing}'\n");
    fs::write(bin.join("ldconfig"), ldconfig).unwrap();
    fs::set_permissions(bin.join("ldconfig"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink(MOSFS, bin.join("mosfs")).unwrap();
    let text = fs::read_to_string(source_file("initramfs/initramfs-tools/hooks/mosfs")).unwrap();
    let text = text.replace("config=/etc/mosfs", &format!("config={}", config.display())).replace(
        ". /usr/share/initramfs-tools/hook-functions",
        "copy_exec() { :; }\nmanual_add_modules() { :; }\ncopy_modules_dir() { :; }",
    );
    fs::write(dir.join("hook"), text).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.arg(dir.join("hook")).env("DESTDIR", dir.join("dest")).env("PATH", path);
    let output = command.output().expect("sh");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_library_that_is_missing_ends_the_hook() {
    let device = Device::with(SMALL);
    let dir = tempfile::tempdir().unwrap();
    let (code, said) = hook(dir.path(), device.config(), "nothing-of-the-kind");
    assert_eq!(code, Some(0), "{said}");
    for library in ["libtss2-esys", "libblkid"] {
        let (code, said) = hook(dir.path(), device.config(), library);
        assert_eq!(code, Some(1), "{library}: {said}");
        assert!(said.contains(library) && said.contains("no initramfs is made"), "{said}");
    }
    for (file, text) in [("product", "not a uuid\n"), ("overlay", "rw\n"), ("manifestCA.pem", "x")] {
        let path = device.config().join(file);
        let before = fs::read(&path).ok();
        fs::write(&path, text).unwrap();
        let (code, said) = hook(dir.path(), device.config(), "nothing-of-the-kind");
        assert_eq!(code, Some(1), "{file}: {said}");
        assert!(said.contains("it could not boot"), "{file}: {said}");
        before.map_or_else(|| fs::remove_file(&path), |bytes| fs::write(&path, bytes)).unwrap();
    }
    // A host that is no device of mosfs' makes its initramfs as ever.
    fs::remove_file(device.config().join("product")).unwrap();
    assert_eq!(hook(dir.path(), device.config(), "libtss2-esys").0, Some(0));
}
