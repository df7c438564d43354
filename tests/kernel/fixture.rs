//! Hostfs images with a kernel that is made up, and a publisher who builds systems of them.
//!
//! The kernel is a header that says its release, the modules are a few bytes each, and the program is one that needs
//! the C library alone. The stub and the boot loader are systemd's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use super::tools::{run, run_any, sh};

pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
pub const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs-full");
/// The release of the kernel that is made up.
pub const RELEASE: &str = "6.12.1-test";
/// systemd's stub and boot loader.
const EFI: &str = "/usr/lib/systemd/boot/efi";

/// A bzImage as far as its header goes (Documentation/arch/x86/boot.rst of Linux).
pub fn kernel(release: &str, content: &str) -> Vec<u8> {
    let mut kernel = vec![0; 0x300];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    kernel.extend_from_slice(format!("{release} (nobody@nowhere) #1\0{content}").as_bytes());
    kernel
}

/// Makes a folder of keys of the product.
pub fn generate_keys(dir: &Path, name: &str) {
    run(Command::new(MOSFS).current_dir(dir).args(["keys", "generate", name, "--product", PRODUCT]));
}

/// Who builds systems: keys, an image, a store.
pub struct Publisher {
    dir: TempDir,
}

impl Publisher {
    /// A publisher whose hostfs has one kernel.
    pub fn new() -> Self {
        let this = Self { dir: TempDir::new().unwrap() };
        generate_keys(this.dir(), "keys");
        this.put_root();
        this.image();
        this
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file of this publisher.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Writes a file of the hostfs; [`Publisher::image`] makes an image of them.
    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path("root").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Puts another kernel into the hostfs, of the same release.
    pub fn put_kernel(&self, content: &str) {
        self.put(&format!("boot/vmlinuz-{RELEASE}"), kernel(RELEASE, content));
        self.image();
    }

    fn put_root(&self) {
        self.put(&format!("boot/vmlinuz-{RELEASE}"), kernel(RELEASE, "one"));
        let modules = format!("usr/lib/modules/{RELEASE}");
        let names =
            ["drivers/block/loop", "drivers/md/dm-mod", "drivers/md/dm-verity", "fs/squashfs/squashfs"];
        let mut list = String::new();
        for name in names {
            self.put(&format!("{modules}/kernel/{name}.ko"), format!("module {name}"));
            let needs = if name.ends_with("dm-verity") { " kernel/drivers/md/dm-mod.ko" } else { "" };
            list += &format!("kernel/{name}.ko:{needs}\n");
        }
        self.put(&format!("{modules}/modules.dep"), list);
        self.put(&format!("{modules}/modules.builtin"), "kernel/fs/overlayfs/overlay.ko\n");
        for program in ["linuxx64.efi.stub", "systemd-bootx64.efi"] {
            let bytes = fs::read(Path::new(EFI).join(program)).unwrap_or_else(|error| {
                panic!("{program}: {error}; install the Debian package systemd-boot-efi")
            });
            self.put(&format!("usr/lib/systemd/boot/efi/{program}"), bytes);
        }
        // A program with a loader and one library, and the libraries that it would load.
        self.put("usr/libexec/mosfs/mosfs-full", fs::read("/bin/true").unwrap());
        let libraries = sh(Path::new("/"), "ldd /bin/true | sed -n 's/.*=> \\([^ ]*\\) .*/\\1/p'");
        let libc = libraries.lines().find(|path| path.contains("libc.so.6")).expect("the C library");
        self.put("usr/lib/x86_64-linux-gnu/libc.so.6", fs::read(libc).unwrap());
        self.put("usr/lib64/ld-linux-x86-64.so.2", fs::read("/lib64/ld-linux-x86-64.so.2").unwrap());
        for name in ["libblkid.so.1", "libtss2-esys.so.0", "libtss2-sys.so.1", "libtss2-mu.so.0"] {
            // A library of another name; only its own needs are looked at.
            self.put(&format!("usr/lib/x86_64-linux-gnu/{name}"), fs::read(libc).unwrap());
        }
        for name in ["lib", "lib64", "bin"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), self.path("root").join(name)).unwrap();
        }
    }

    /// Makes the image `oci:images:v1` of the hostfs.
    pub fn image(&self) {
        sh(
            self.dir(),
            "rm -rf images layer.tar && tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C root -cf layer.tar . \
             && umoci init --layout images && umoci new --image images:v1 \
             && umoci raw add-layer --image images:v1 layer.tar",
        );
    }

    /// Writes the import manifest of a version.
    pub fn import(&self, version: u64, more: &str) {
        let text = format!(
            "version: {version}\nproduct: {PRODUCT}\ntargets:\n  hostfs:\n    url: \"oci:images:v1\"\n    \
             version: 0.0.1\n    service_type: hostfs\n    network: {{type: host}}\n{more}"
        );
        fs::write(self.path("import.yaml"), text).unwrap();
    }

    /// `mosfs build` of the import manifest, with a kernel.
    pub fn command(&self, store: &str, more: &[&str]) -> Command {
        let mut command = self.signed_by("keys", store);
        command.args(["--floor-key", "keys/floor.key", "--ca", "keys/ca.pem"]).args(more);
        command
    }

    /// `mosfs build` of the import manifest, signed with the keys in a folder. Says nothing of the kernel.
    pub fn signed_by(&self, keys: &str, store: &str) -> Command {
        let mut command = Command::new(MOSFS);
        command.current_dir(self.dir()).env_remove("MOSFS_FAILPOINT");
        command.args(["build", "import.yaml", "--store", store, "--level", "1"]);
        command.args(["--key", &format!("{keys}/signer.key"), "--cert", &format!("{keys}/signer.pem")]);
        command
    }

    /// Builds a version into a store, and returns its digest.
    pub fn build(&self, version: u64, store: &str, more: &[&str]) -> String {
        self.import(version, "");
        run(&mut self.command(store, more)).trim().to_string()
    }

    /// What `mosfs build` says when it refuses, with this exit code.
    pub fn refused(&self, code: i32, more: &[&str]) -> String {
        self.import(200, "");
        refused(&mut self.command("refused", more), code)
    }

    /// The system manifest of a version.
    pub fn manifest(&self, store: &str, version: u64) -> serde_json::Value {
        let source = format!("oci:{store}:mos/system/system:{version}");
        let text = run(Command::new(MOSFS).current_dir(self.dir()).args(["manifest", "show", &source]));
        serde_json::from_str(&text).unwrap()
    }

    /// The OCI manifest of the target `boot` of a version.
    pub fn boot(&self, store: &str, version: u64) -> serde_json::Value {
        let manifest = self.manifest(store, version);
        let digest = manifest["targets"]["boot"]["digest"].as_str().unwrap().trim_start_matches("sha256:");
        let blob = self.path(store).join("blobs/sha256").join(digest);
        serde_json::from_slice(&fs::read(blob).unwrap()).unwrap()
    }

    /// The kernel id of a version.
    pub fn kernel_id(&self, store: &str, version: u64) -> String {
        let id = self.boot(store, version)["annotations"]["vnd.mos.boot.kernel-id"].clone();
        id.as_str().unwrap().trim_start_matches("sha256:").to_string()
    }

    /// Unpacks the image of the target `boot` of a version, with squashfs-tools, and returns where: a new folder each time,
    /// as tests share a publisher.
    pub fn unpack(&self, store: &str, version: u64) -> PathBuf {
        let layer = self.boot(store, version)["layers"][0]["digest"].as_str().unwrap().to_string();
        let blob = format!("{store}/blobs/sha256/{}", layer.trim_start_matches("sha256:"));
        let to =
            tempfile::Builder::new().prefix("boot-").tempdir_in(self.dir()).unwrap().keep().join("files");
        sh(self.dir(), &format!("unsquashfs -q -n -d {} {blob}", to.display()));
        to
    }
}

/// Runs a command that must fail with this exit code, and returns what it says.
pub fn refused(command: &mut Command, code: i32) -> String {
    let output: Output = run_any(command);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}
