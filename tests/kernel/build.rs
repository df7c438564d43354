//! What `mosfs build` makes of the kernel in a hostfs image, and what it refuses.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::fixture::{MOSFS, Publisher, RELEASE, generate_keys, kernel, refused};
use super::tools::{run, sh};

/// The sections of a unified kernel image, as objcopy of binutils reads them.
pub fn section(program: &Path, name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("section");
    let only = format!("{name}={}", out.display());
    run(Command::new("objcopy")
        .args(["-O", "binary", "--dump-section", &only])
        .arg(program)
        .arg(dir.path().join("x")));
    fs::read(out).unwrap()
}

/// The files of an initramfs, as zstd and GNU cpio read it: mode and content, or the target of a link.
pub fn unpack_initrd(bytes: &[u8]) -> (tempfile::TempDir, BTreeMap<String, String>) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("initrd"), bytes).unwrap();
    sh(
        dir.path(),
        "mkdir files && zstd -q -d -c initrd | (cd files && cpio -i --quiet --no-absolute-filenames)",
    );
    let files = dir.path().join("files");
    let list = sh(&files, "find . -mindepth 1 -printf '%P\\t%M %l\\n' | LC_ALL=C sort");
    let list = list.lines().map(|line| line.split_once('\t').unwrap());
    let list = list.map(|(path, mode)| (path.to_string(), mode.trim().to_string())).collect();
    (dir, list)
}

#[test]
fn a_kernel_image_holds_the_kernel_its_modules_and_what_the_boot_trusts() {
    let publisher = Publisher::new();
    publisher.build(200, "store", &["--cmdline", "console=ttyS0 quiet"]);
    let manifest = publisher.manifest("store", 200);
    let target = &manifest["targets"]["boot"];
    assert_eq!(target["service_type"], "fs-only");
    assert_eq!(target["version"], RELEASE);
    let files = publisher.unpack("store", 200);
    let (uki, loader) = (files.join("mosfs.efi"), files.join("loader.efi"));
    assert_eq!(fs::read_dir(&files).unwrap().count(), 2);
    assert_eq!(fs::read(loader).unwrap(), fs::read("/usr/lib/systemd/boot/efi/systemd-bootx64.efi").unwrap());
    assert_eq!(section(&uki, ".cmdline"), b"root=mosfs panic=-1 console=ttyS0 quiet");
    assert_eq!(section(&uki, ".uname"), RELEASE.as_bytes());
    assert_eq!(section(&uki, ".linux"), kernel(RELEASE, "one"));
    assert_eq!(
        section(&uki, ".osrel"),
        format!("ID=mosfs\nPRETTY_NAME=\"mosfs, Linux {RELEASE}\"\n").as_bytes()
    );
    let (dir, list) = unpack_initrd(&section(&uki, ".initrd"));
    let read = |path: &str| fs::read_to_string(dir.path().join("files").join(path)).unwrap();
    assert_eq!(list["init"], "lrwxrwxrwx usr/bin/mosfs");
    assert_eq!(list["lib"], "lrwxrwxrwx usr/lib");
    for path in ["usr/bin/mosfs", "usr/lib/x86_64-linux-gnu/libc.so.6", "usr/lib64/ld-linux-x86-64.so.2"] {
        assert_eq!(list[path], "-rwxr-xr-x", "{path}");
    }
    for folder in ["dev", "proc", "run", "sys", "sysroot", "tmp"] {
        assert_eq!(list[folder], "drwxr-xr-x", "{folder}");
    }
    // dm-mod before dm-verity, which needs it.
    let order = read("usr/lib/mosfs/modules/order");
    assert_eq!(order, "loop.ko\ndm-mod.ko\ndm-verity.ko\nsquashfs.ko\n");
    assert_eq!(read("usr/lib/mosfs/modules/dm-verity.ko"), "module drivers/md/dm-verity");
    assert_eq!(read("etc/mosfs/product"), format!("{}\n", super::fixture::PRODUCT));
    assert_eq!(read("etc/mosfs/floor.pub"), fs::read_to_string(publisher.path("keys/floor.pub")).unwrap());
    assert_eq!(read("etc/mosfs/kernel"), format!("sha256:{}\n", publisher.kernel_id("store", 200)));
    assert!(read("etc/mosfs/manifestCA.pem").starts_with("-----BEGIN CERTIFICATE-----"));
    let clock = sh(
        publisher.dir(),
        "for file in keys/ca.pem keys/signer.pem; do
             date -d \"$(openssl x509 -noout -startdate -in $file | cut -d= -f2)\" +%s
         done | sort -n | tail -n 1",
    );
    assert_eq!(read("etc/mosfs/clock"), clock);
    assert_eq!(list.keys().filter(|path| path.starts_with("etc/mosfs/")).count(), 5);
    // This image has no mke2fs, so the kernel installs nothing.
    assert!(!list.contains_key("usr/sbin/mke2fs"));
    assert!(publisher.boot("store", 200)["annotations"].get("vnd.mos.boot.installs").is_none());
    // A device takes it as any other target.
    let verified = run(Command::new(MOSFS).current_dir(publisher.dir()).args(["verify", "oci:store"]));
    assert!(!verified.is_empty());
}

/// Debian's own are those in the medium's kernel, with the libraries that they name.
#[test]
fn an_image_with_mke2fs_has_a_kernel_that_sets_up_disks() {
    let publisher = Publisher::new();
    let program = fs::read("/sbin/mke2fs").unwrap();
    let check = fs::read("/sbin/e2fsck").unwrap();
    publisher.put("usr/sbin/mke2fs", &program);
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(text.contains(", which /usr/sbin/mke2fs needs"), "{text}");
    // Each is found where the image has it.
    publisher.put("usr/bin/e2fsck", &check);
    let libraries =
        sh(Path::new("/"), "ldd /sbin/mke2fs /sbin/e2fsck | sed -n 's/.*=> \\([^ ]*\\) .*/\\1/p' | sort -u");
    for library in libraries.lines() {
        let name = library.rsplit('/').next().unwrap();
        publisher.put(&format!("usr/lib/x86_64-linux-gnu/{name}"), fs::read(library).unwrap());
    }
    publisher.image();
    publisher.build(200, "store", &[]);
    assert_eq!(publisher.boot("store", 200)["annotations"]["vnd.mos.boot.installs"], "ext4");
    let uki = publisher.unpack("store", 200).join("mosfs.efi");
    let (dir, list) = unpack_initrd(&section(&uki, ".initrd"));
    assert_eq!(list["usr/sbin/mke2fs"], "-rwxr-xr-x");
    for (name, content) in [("mke2fs", program), ("e2fsck", check)] {
        assert_eq!(fs::read(dir.path().join("files/usr/sbin").join(name)).unwrap(), content, "{name}");
    }
    let names: Vec<_> = libraries.lines().filter_map(|path| path.rsplit('/').next()).collect();
    assert!(names.contains(&"libext2fs.so.2"), "{names:?}");
    for name in names {
        assert!(list.contains_key(&format!("usr/lib/x86_64-linux-gnu/{name}")), "{name}");
    }
}

#[test]
fn the_same_input_is_the_same_digest_and_another_kernel_another_id() {
    let publisher = Publisher::new();
    let one = publisher.build(200, "store", &[]);
    let id = publisher.kernel_id("store", 200);
    assert_eq!(publisher.build(200, "other-store", &[]), one);
    assert_eq!(publisher.kernel_id("other-store", 200), id);
    // Another version of the same system keeps its kernel.
    publisher.build(201, "store", &[]);
    assert_eq!(
        publisher.manifest("store", 201)["targets"]["boot"],
        publisher.manifest("store", 200)["targets"]["boot"]
    );
    publisher.build(202, "store", &["--cmdline", "quiet"]);
    assert_ne!(publisher.kernel_id("store", 202), id);
    publisher.put_kernel("two");
    publisher.build(203, "store", &[]);
    assert_ne!(publisher.kernel_id("store", 203), id);
    // A file that is not in the initramfs changes nothing.
    publisher.put("usr/share/doc", "text");
    publisher.put_kernel("one");
    publisher.build(204, "store", &[]);
    assert_eq!(publisher.kernel_id("store", 204), id);
    // Neither does an ordinary build.
    publisher.import(205, "");
    let mut command = Command::new(MOSFS);
    command.current_dir(publisher.dir()).args(["build", "import.yaml", "--store", "store", "--level", "1"]);
    run(command.args(["--key", "keys/signer.key", "--cert", "keys/signer.pem"]));
    assert!(publisher.manifest("store", 205)["targets"].get("boot").is_none());
}

/// Makes a key and a certificate for Secure Boot.
fn secure_boot_key(publisher: &Publisher, name: &str) {
    let line = format!(
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN={name} -days 30 -keyout {name}.key -out {name}.pem 2>/dev/null"
    );
    sh(publisher.dir(), &line);
}

#[test]
fn kernel_and_loader_are_signed_once() {
    let publisher = Publisher::new();
    secure_boot_key(&publisher, "db");
    secure_boot_key(&publisher, "other");
    let keys = ["--sb-key", "db.key", "--sb-cert", "db.pem"];
    let one = publisher.build(200, "store", &keys);
    let files = publisher.unpack("store", 200);
    for program in ["mosfs.efi", "loader.efi"] {
        let program = files.join(program);
        sh(publisher.dir(), &format!("sbverify --cert db.pem {} 2>&1", program.display()));
        refused(
            Command::new("sbverify").current_dir(publisher.dir()).args(["--cert", "other.pem"]).arg(&program),
            1,
        );
    }
    // A signature has the time in it; the second build takes the first one's.
    assert_eq!(publisher.build(200, "store", &keys), one);
    let unsigned = publisher.path("unsigned");
    publisher.build(200, unsigned.to_str().unwrap(), &[]);
    assert_eq!(
        publisher.kernel_id("unsigned", 200),
        publisher.kernel_id("store", 200),
        "the id is that of the input"
    );
    // Another key signs anew.
    publisher.build(201, "store", &["--sb-key", "other.key", "--sb-cert", "other.pem"]);
    let files = publisher.unpack("store", 201);
    sh(publisher.dir(), &format!("sbverify --cert other.pem {}/mosfs.efi 2>&1", files.display()));
}

#[test]
fn a_command_signs_and_can_do_nothing_else() {
    let publisher = Publisher::new();
    secure_boot_key(&publisher, "db");
    let script = "f() { sbsign --key db.key --cert db.pem --output \"$2\" \"$1\" 2>/dev/null; }; f";
    publisher.build(200, "store", &["--sb-sign", script]);
    let files = publisher.unpack("store", 200);
    sh(publisher.dir(), &format!("sbverify --cert db.pem {}/mosfs.efi 2>&1", files.display()));
    let text = publisher.refused(1, &["--sb-sign", "echo the token is locked >&2; false"]);
    assert!(
        text.contains("`echo the token is locked >&2; false` failed (exit status: 1): the token is locked"),
        "{text}"
    );
    for other in [
        "cp",
        "f() { sbsign --key db.key --cert db.pem --output \"$2\" /usr/lib/systemd/boot/efi/systemd-bootx64.efi 2>/dev/null; }; f",
    ] {
        let text = publisher.refused(3, &["--sb-sign", other]);
        assert!(text.contains("did not return the program with a signature added"), "{text}");
    }
    let text = publisher.refused(1, &["--sb-key", "none.key", "--sb-cert", "db.pem"]);
    assert!(text.contains("target `boot`: sbsign failed (exit status: 1)"), "{text}");
}

#[test]
fn an_image_without_exactly_one_kernel_and_its_modules_is_refused() {
    let publisher = Publisher::new();
    let root = publisher.path("root");
    publisher.put("boot/vmlinuz-6.1.0", kernel("6.1.0", ""));
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(text.contains(&format!("target `boot`: the image has 2 kernels: 6.1.0, {RELEASE}\n")), "{text}");
    assert!(text.contains("hint: `--kernel RELEASE` selects one"), "{text}");
    publisher.build(200, "store", &["--kernel", RELEASE]);
    let text = publisher.refused(2, &["--kernel", "5.0"]);
    assert!(text.contains(&format!("the image has no kernel 5.0; it has 6.1.0, {RELEASE}")), "{text}");
    let text = publisher.refused(2, &["--kernel", "6.1.0"]);
    let expected =
        format!("the image has the kernel 6.1.0, but no /usr/lib/modules/6.1.0; it has modules of {RELEASE}");
    assert!(text.contains(&expected), "{text}");

    fs::remove_file(root.join("boot/vmlinuz-6.1.0")).unwrap();
    publisher.put(&format!("boot/vmlinuz-{RELEASE}"), kernel("6.12.2-test", ""));
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(
        text.contains(&format!("/boot/vmlinuz-{RELEASE} is the kernel 6.12.2-test, expected {RELEASE}")),
        "{text}"
    );
    publisher.put(&format!("boot/vmlinuz-{RELEASE}"), "#!/bin/sh\n");
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(text.contains("is not a Linux kernel for x86-64 (a bzImage)"), "{text}");
    fs::remove_file(root.join(format!("boot/vmlinuz-{RELEASE}"))).unwrap();
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(text.contains("the image has no kernel; looked for /boot/vmlinuz-RELEASE"), "{text}");
    // The other place of a kernel.
    publisher.put(&format!("usr/lib/modules/{RELEASE}/vmlinuz"), kernel(RELEASE, ""));
    publisher.image();
    publisher.build(201, "store", &[]);
}

#[test]
fn an_image_that_lacks_what_a_boot_needs_is_refused() {
    let publisher = Publisher::new();
    let root = publisher.path("root");
    let without = |name: &str| {
        let (path, kept) = (root.join(name), publisher.path("kept"));
        fs::rename(&path, &kept).unwrap();
        publisher.image();
        let text = publisher.refused(2, &[]);
        fs::rename(&kept, &path).unwrap();
        text
    };
    let text = without("usr/libexec/mosfs/mosfs-full");
    assert!(text.contains("target `boot`: the image has no /usr/libexec/mosfs/mosfs-full"), "{text}");
    let text = without("usr/lib/systemd/boot/efi/linuxx64.efi.stub");
    assert!(text.contains("the image has no /usr/lib/systemd/boot/efi/linuxx64.efi.stub"), "{text}");
    let text = without("usr/lib/x86_64-linux-gnu/libc.so.6");
    assert!(text.contains("the image has no libc.so.6, which /usr/libexec/mosfs/mosfs-full needs"), "{text}");
    let text = without("usr/lib/x86_64-linux-gnu/libblkid.so.1");
    assert!(text.contains("the image has no libblkid.so.1"), "{text}");
    let text = without(&format!("usr/lib/modules/{RELEASE}/kernel/fs/squashfs/squashfs.ko"));
    assert!(text.contains("kernel/fs/squashfs/squashfs.ko is missing"), "{text}");
    // Links lead nowhere but into the image.
    fs::remove_file(root.join("usr/libexec/mosfs/mosfs-full")).unwrap();
    std::os::unix::fs::symlink("/../../bin/true", root.join("usr/libexec/mosfs/mosfs-full")).unwrap();
    publisher.image();
    let text = publisher.refused(2, &[]);
    assert!(text.contains("the image has no /usr/libexec/mosfs/mosfs-full"), "{text}");
}

#[test]
fn a_kernel_that_could_never_boot_its_system_is_not_made() {
    let publisher = Publisher::new();
    let text = publisher.refused(2, &["--cmdline", "mosfs.overlay=everywhere"]);
    assert!(text.contains("--cmdline: kernel command line: mosfs.overlay=everywhere"), "{text}");
    let text = publisher.refused(2, &["--cmdline", "root=/dev/sda1"]);
    assert!(text.contains("--cmdline: `root=` names another root than mosfs"), "{text}");
    fs::create_dir(publisher.path("config")).unwrap();
    fs::write(publisher.path("config/on-failure"), "shell\n").unwrap();
    let text = publisher.refused(2, &["--boot-config", "config"]);
    assert!(text.contains("config/on-failure: `shell` is not possible"), "{text}");
    fs::write(publisher.path("config/on-failure"), "halt\n").unwrap();
    fs::write(publisher.path("config/watchdog"), "60\n").unwrap();
    let text = publisher.refused(2, &["--boot-config", "config"]);
    assert!(text.contains("config/watchdog: the watchdog would restart a machine that halts"), "{text}");
    fs::remove_file(publisher.path("config/watchdog")).unwrap();
    publisher.build(200, "store", &["--boot-config", "config"]);
    let files = publisher.unpack("store", 200);
    let (dir, _) = unpack_initrd(&section(&files.join("mosfs.efi"), ".initrd"));
    assert_eq!(fs::read(dir.path().join("files/etc/mosfs/on-failure")).unwrap(), b"halt\n");
    // A signer whom the kernel would not trust.
    generate_keys(publisher.dir(), "others");
    publisher.import(201, "");
    let mut command = publisher.command("store", &["--ca", "others/ca.pem"]);
    let text = refused(&mut command, 2);
    assert!(text.contains("--ca"), "{text}");
    let mut command = publisher.signed_by("keys", "store");
    let text = refused(command.args(["--floor-key", "keys/floor.key", "--ca", "others/ca.pem"]), 2);
    assert!(text.contains("than the manifest CA"), "{text}");
    // Without the floor key a boot is refused.
    let mut command = publisher.signed_by("keys", "store");
    let text = refused(command.args(["--ca", "keys/ca.pem"]), 2);
    assert!(text.contains("the kernel needs the floor key to check the floor; found none"), "{text}");
    // A target of that name is the publisher's own.
    publisher.import(202, "  boot:\n    url: \"oci:images:v1\"\n    version: 0.0.1\n    service_type: fs-only\n    network: {type: none}\n");
    let text = refused(&mut publisher.command("store", &[]), 2);
    assert!(text.contains("the import manifest already has a target `boot`"), "{text}");
}

#[test]
fn a_system_is_signed_elsewhere_with_its_kernel() {
    let publisher = Publisher::new();
    publisher.import(200, "");
    let line = format!(
        "{MOSFS} build import.yaml --store store --level 1 --to-sign message --floor-pub keys/floor.pub --ca keys/ca.pem \
         && openssl dgst -sha256 -sign keys/signer.key -out signature message \
         && {MOSFS} build message --store store --signature signature --cert keys/signer.pem"
    );
    let digest = sh(publisher.dir(), &line);
    let whole = publisher.build(200, "whole", &[]);
    assert!(digest.lines().all(|line| line == whole), "{digest} {whole}");
    assert_eq!(publisher.kernel_id("store", 200), publisher.kernel_id("whole", 200));
}
