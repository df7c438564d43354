//! A device for tests: its folders, and the command on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mosfs::internals::deploy::booted::BootRecord;
use mosfs::internals::deploy::choice::{Booted, Role, choose};
use mosfs::internals::deploy::{DeployError, DeploymentId, State, System, check_images};
use mosfs::internals::floor::{self, Floor, FloorLocation, Tcti};
use mosfs::internals::manifest::ServiceType;
use mosfs::internals::manifest::system::Target;
use mosfs::internals::trust::Anchor;
use tempfile::TempDir;

use crate::publish::{PRODUCT, Publisher};
use crate::swtpm::Swtpm;

/// A device with folders of its own.
pub struct Device {
    /// Everything of this device.
    pub dir: PathBuf,
    _own: Option<TempDir>,
    floor: Vec<String>,
}

impl Device {
    /// A device whose floor is the development file.
    pub fn with_file_floor() -> Self {
        let own = tempfile::tempdir().expect("a folder");
        let dir = own.path().to_path_buf();
        Self { dir, _own: Some(own), floor: vec!["--floor".into(), "file".into()] }
    }

    /// A device with this TPM.
    pub fn with_tpm(tpm: &Swtpm) -> Self {
        let own = tempfile::tempdir().expect("a folder");
        let dir = own.path().to_path_buf();
        Self { dir, _own: Some(own), floor: vec!["--tpm".into(), tpm.tcti_text()] }
    }

    /// A device that was told of no floor: the default TPM, which this machine does not have.
    pub fn without_tpm() -> Self {
        let own = tempfile::tempdir().expect("a folder");
        let dir = own.path().to_path_buf();
        Self { dir, _own: Some(own), floor: vec!["--tpm".into(), "device:/dev/no-such-tpm".into()] }
    }

    /// The system folder.
    pub fn system(&self) -> PathBuf {
        self.dir.join("system")
    }

    /// The configuration folder.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    /// The state as it is on disk.
    pub fn state(&self) -> State {
        System::at(self.system()).state().expect("a state")
    }

    /// `mosfs` on this device.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command.args(args);
        if ["install", "update", "commit", "status", "floor", "activate", "gc", "repair"].contains(&args[0]) {
            command.args(&self.floor);
        }
        command
            .env("MOSFS_SYSTEM", self.system())
            .env("MOSFS_CONFIG", self.config())
            .env("MOSFS_RUN", self.dir.join("run"))
            .env_remove("MOSFS_FAILPOINT");
        command
    }

    /// Runs `mosfs`.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("mosfs runs")
    }

    /// Runs `mosfs`, which must succeed; what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "mosfs {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs `mosfs`, which must fail with this exit code and say all of these words.
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        let output = self.run(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "mosfs {args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "mosfs {args:?} does not say `{word}`: {said}");
        }
        said
    }

    /// Installs a version of a publisher.
    pub fn install(&self, publisher: &Publisher, version: u64) {
        let ca = publisher.key("ca.pem");
        self.ok(&[
            "install",
            &publisher.source_of(version),
            "--ca",
            ca.to_str().expect("UTF-8"),
            "--product",
            PRODUCT,
        ]);
    }

    /// Provisions the floor of a device with a TPM.
    pub fn provision(&self, publisher: &Publisher) {
        let (key, public) = (publisher.key("provision.key"), publisher.key("floor.pub"));
        let (key, public) = (key.to_str().expect("UTF-8"), public.to_str().expect("UTF-8"));
        let args =
            ["floor", "provision", "--provision-key", key, "--floor-pub", public, "--product", PRODUCT];
        self.ok(&args);
    }

    fn open_floor(&self) -> Box<dyn Floor> {
        let place = match self.floor.as_slice() {
            [flag, tcti] if flag == "--tpm" => {
                let tcti: Tcti = tcti.parse().expect("a TCTI");
                FloorLocation::Tpm(tcti, std::time::Duration::from_secs(30))
            }
            _ => FloorLocation::File(self.system().join("floor")),
        };
        floor::open(&place, &self.config()).expect("a floor")
    }

    /// What the initramfs would do: the version that boots, in which role, and the content of
    /// its one file's layer is not looked at. `start` may refuse versions.
    /// Its record is left where the system would find it.
    pub fn boot_if(&self, good: impl Fn(u64) -> bool) -> Result<Booted<()>, DeployError> {
        let anchor = Anchor::load(&self.config()).expect("an anchor");
        let mut floor = self.open_floor();
        let _ = fs::remove_file(self.boot_record());
        let system = System::at(self.system());
        let booted = choose(&system, &anchor, floor.as_mut(), None, |verified, _| {
            let is_root = |target: &Target| target.service_type == ServiceType::Hostfs;
            check_images(&system, verified, is_root)?;
            if good(verified.manifest().version) {
                Ok(())
            } else {
                Err(DeployError::NothingInstalled { path: "its root cannot be mounted".into() }.into())
            }
        })?;
        self.record_boot(booted.deployment);
        Ok(booted)
    }

    /// Where the record of the boot is that runs.
    pub fn boot_record(&self) -> PathBuf {
        self.dir.join("run/boot.json")
    }

    /// Records that this deployment runs.
    pub fn record_boot(&self, deployment: DeploymentId) {
        let record = BootRecord { deployment, backend: "fuse".into(), phases_ms: Vec::new() };
        record.save(&self.boot_record()).expect("a record");
    }

    /// What boots when everything that verifies can be mounted.
    pub fn boot(&self) -> (u64, Role) {
        let booted = self.boot_if(|_| true).expect("something boots");
        (booted.deployment.version, booted.role)
    }

    /// The versions of the deployments on the disk, sorted.
    pub fn versions(&self) -> Vec<u64> {
        let mut versions: Vec<u64> = fs::read_dir(self.system().join("deployments"))
            .expect("a folder")
            .map(|entry| text(entry.expect("an entry").file_name().as_encoded_bytes()))
            .filter_map(|name| name.split_once('-')?.0.parse().ok())
            .collect();
        versions.sort_unstable();
        versions
    }

    /// Everything on the device's disk, by path and content.
    pub fn snapshot(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        collect(&self.dir, &mut files);
        files.sort();
        files
    }

    /// Puts a copy of the system folder aside, as somebody who can read the disk would.
    pub fn copy_disk(&self, to: &Path) {
        copy(&self.system(), to);
    }

    /// Puts an old copy of the system folder back.
    pub fn restore_disk(&self, from: &Path) {
        fs::remove_dir_all(self.system()).expect("removing");
        copy(from, &self.system());
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().expect("cp runs");
    assert!(copied.success());
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.push((path.clone(), Vec::new()));
            collect(&path, files);
        } else {
            files.push((path.clone(), fs::read(&path).expect("a file")));
        }
    }
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
