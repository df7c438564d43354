//! A publisher whose hostfs has a real kernel and boots, install media of it, and a machine to install on.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::fixture::{MOSFS, Publisher};
use super::machine::{Cut, Ended, Machine, script, script_path, tool};
use super::tools::{run, sh};

/// The kernel command line of a system that a test does not try others with.
pub const CMDLINE: &str = "console=ttyS0 no_timer_check quiet";

/// There is no udev: the link that it would make is made here.
const INIT: &str = r#"#!/bin/busybox sh
read -r up idle </proc/uptime
export PATH=/usr/bin:/bin MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/run/mosfs/config
end() { sync; echo "MOSFS-VM-VERDICT: $1"; poweroff -f; }
esp() { mount -t vfat -o ro /dev/vda1 /tmp && ls /tmp/EFI/Linux | sed 's/^/vm: on the ESP: /'; umount /tmp; }
secure() {
    cd /sys/firmware/efi/efivars
    for name in SecureBoot SetupMode; do tail -c 1 $name-8be4df61-* | od -An -tu1 | tr -d ' ' >/run/$name; done
    echo "vm: SecureBoot $(cat /run/SecureBoot), SetupMode $(cat /run/SetupMode)"
}
if [ -e /sys/firmware/efi ]; then
    mount -t efivarfs efivarfs /sys/firmware/efi/efivars || end 20
    cat /sys/firmware/efi/efivars/LoaderDevicePartUUID-* >/run/variable || end 21
    mkdir -p /dev/disk/by-partuuid
    ln -s ../../vda1 /dev/disk/by-partuuid/$(tail -c +5 /run/variable | tr -d '\0' | tr A-F a-f)
fi
echo "vm: version $(cat /version)"
. /action
end 0
"#;

/// Copies a program and its libraries into the root.
fn put_program(publisher: &Publisher, program: &Path, to: &str) {
    publisher.put(to, fs::read(program).unwrap());
    executable(&publisher.path("root").join(to));
    for line in sh(Path::new("/"), &format!("ldd {} || true", program.display())).lines() {
        let mut words = line.split_whitespace().filter(|word| word.starts_with('/'));
        if let Some(library) = words.next() {
            let name = Path::new(library).file_name().unwrap().to_str().unwrap();
            let folder = if name.starts_with("ld-") { "usr/lib64" } else { "usr/lib/x86_64-linux-gnu" };
            let to = format!("{folder}/{name}");
            publisher.put(&to, fs::read(library).unwrap());
            // The dynamic loader is executed.
            executable(&publisher.path("root").join(to));
        }
    }
}

fn executable(path: &Path) {
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// A publisher whose hostfs boots with Debian's kernel for virtual machines, and does this then.
pub fn publisher(action: &str) -> Publisher {
    publisher_with("cloud", action)
}

/// The same with Debian's kernel for real machines, nearly all of whose drivers are modules.
pub fn full_publisher(action: &str) -> Publisher {
    publisher_with("full", action)
}

fn publisher_with(flavour: &str, action: &str) -> Publisher {
    let publisher = Publisher::new();
    let root = publisher.path("root");
    for made_up in ["boot", "usr/lib/modules", "usr/lib/x86_64-linux-gnu", "usr/lib64"] {
        fs::remove_dir_all(root.join(made_up)).unwrap();
    }
    let kernel = script_path(script("kernel").args(["6.12", flavour]));
    // What no initramfs takes would make the image large.
    let copy = format!(
        "cp -r boot/vmlinuz-* {0}/boot/ && cp -rL lib/modules {0}/usr/lib/ && cd {0}/usr/lib/modules/*/kernel \
         && rm -rf sound net drivers/net drivers/gpu drivers/media drivers/infiniband",
        root.display()
    );
    fs::create_dir_all(root.join("boot")).unwrap();
    sh(&kernel, &copy);
    put_program(&publisher, Path::new(MOSFS), "usr/libexec/mosfs/mosfs-full");
    tool("binutils", Command::new("strip").arg(root.join("usr/libexec/mosfs/mosfs-full")));
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    symlink("../libexec/mosfs/mosfs-full", root.join("usr/bin/mosfs")).unwrap();
    // What mosfs loads when it runs.
    for name in ["libblkid.so.1", "libtss2-esys.so.0", "libtss2-sys.so.1", "libtss2-mu.so.0"] {
        let library = sh(Path::new("/"), &format!("ls /usr/lib/*/{name} | head -n 1"));
        put_program(&publisher, Path::new(library.trim()), &format!("usr/lib/x86_64-linux-gnu/{name}"));
    }
    for name in ["mke2fs", "e2fsck"] {
        put_program(&publisher, &Path::new("/sbin").join(name), &format!("usr/sbin/{name}"));
    }
    put_program(&publisher, Path::new("/bin/busybox"), "usr/bin/busybox");
    for applet in [
        "sh", "mount", "umount", "ln", "mkdir", "cat", "ls", "sed", "sync", "poweroff", "reboot", "grep",
        "tail", "tr", "date", "od", "sleep", "watchdog",
    ] {
        symlink("busybox", root.join("usr/bin").join(applet)).unwrap();
    }
    publisher.put("usr/sbin/init", INIT);
    executable(&root.join("usr/sbin/init"));
    publisher.put("action", action);
    symlink("usr/sbin", root.join("sbin")).unwrap();
    for folder in ["proc", "sys", "dev", "run", "tmp", "etc/mosfs", "var/lib/mosfs"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    publisher
}

/// A system in a store of its own.
pub struct System {
    pub store: String,
}

/// Builds a version into a store of its own.
pub fn build(publisher: &Publisher, version: u64, more: &[&str]) -> System {
    publisher.put("version", format!("{version}\n"));
    publisher.image();
    let store = format!("store-{version}");
    publisher.build(version, &store, more);
    System { store }
}

/// Makes an install medium of a system, a file of this name, with answers.
pub fn medium(publisher: &Publisher, system: &System, name: &str, answers: Option<&str>) -> PathBuf {
    medium_with(publisher, system, name, answers, &[])
}

/// The same with answers, and with the keys of a folder of the publisher's to enroll.
pub fn enrolling(publisher: &Publisher, system: &System, answers: &str, keys: &str) -> PathBuf {
    medium_with(publisher, system, "enroll", Some(answers), &["--enroll", keys])
}

fn medium_with(
    publisher: &Publisher,
    system: &System,
    name: &str,
    answers: Option<&str>,
    more: &[&str],
) -> PathBuf {
    let image = publisher.path(&format!("{name}.iso"));
    let mut command = Command::new(MOSFS);
    command
        .current_dir(publisher.dir())
        .arg("iso")
        .arg(format!("oci:{}", system.store))
        .arg("-o")
        .arg(&image)
        .args(more);
    if let Some(answers) = answers {
        let file = publisher.path(&format!("{name}.yaml"));
        fs::write(&file, answers).unwrap();
        command.arg("--answers").arg(file);
    }
    run(&mut command);
    image
}

/// A machine with an empty disk, a TPM without a floor, and the firmware's variables; beside it the medium with the
/// provisioning key.
pub struct Device {
    dir: tempfile::TempDir,
}

impl Device {
    pub fn new(publisher: &Publisher) -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(this.path("tpm")).unwrap();
        sh(this.dir.path(), "qemu-img create -q -f qcow2 disk.qcow2 1G");
        let key = fs::read_to_string(publisher.path("keys/provision.key")).unwrap();
        fat(&this.path("provision.img"), "MOSFS-PROVI", "provision.key", &key);
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The machine with a medium in it, attached as `cd`, `disk` or `usb`.
    pub fn machine(&self, medium: &Path, kind: &'static str) -> Machine {
        let mut machine = Machine::new(Path::new("/dev/null"));
        machine.disk = Some(self.path("disk.qcow2"));
        machine.tpm = Some(self.path("tpm"));
        machine.uefi = Some(self.path("vars.fd"));
        machine.second = vec![self.path("provision.img")];
        machine.medium = Some((medium.into(), kind));
        machine.memory = 1024;
        machine
    }

    /// What is on the disk, as a digest.
    pub fn disk(&self) -> String {
        sh(self.dir.path(), "qemu-img convert -O raw disk.qcow2 disk.raw; sha256sum <disk.raw; rm disk.raw")
    }
}

/// Makes a small FAT file system with this label and one file.
pub fn fat(image: &Path, label: &str, name: &str, content: &str) {
    let text = image.with_extension("txt");
    fs::write(&text, content).unwrap();
    let (image, text) = (image.display(), text.display());
    let script = format!(
        "truncate -s 4M {image}; mkfs.vfat -n {label} {image} >/dev/null; mcopy -i {image} {text} ::{name}"
    );
    sh(Path::new("/"), &script);
}

/// Runs a machine until its console shows a text.
pub fn run_until(machine: &Machine, text: &str) -> Ended {
    let cut = Cut::After(text.into(), std::time::Duration::from_secs(1));
    let ended = Machine { cut: Some(cut), ..machine.clone() }.run();
    ended.expect(137, &[text]);
    ended
}

/// The lines of a console that begin so, in order and without what is before.
pub fn steps<'a>(console: &'a str, words: &[&str]) -> Vec<&'a str> {
    let find = |line: &'a str| words.iter().find_map(|word| line.find(word).map(|at| line[at..].trim_end()));
    console.lines().filter_map(find).collect()
}
