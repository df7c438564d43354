//! Where the files of containers are (the module's page lists them).

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, IoError};
use crate::sys::{atomic, file};

/// Where a container is started from.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/run/mosfs`.
    pub run: PathBuf,
    /// SYSTEM.
    pub system: PathBuf,
}

impl Places {
    /// The folder of what runs.
    pub fn containers(&self) -> PathBuf {
        self.run.join("containers")
    }

    /// The folder of what is known of containers. Not that of their work folders: `web.key` may be a target too.
    fn notes(&self) -> PathBuf {
        self.run.join("notes")
    }

    /// Makes the folder of what is known of containers.
    ///
    /// # Errors
    /// [`IoError`] of mkdir(2).
    pub fn make_notes(&self) -> Result<(), IoError> {
        file::create_folders(&self.notes())
    }

    /// The work folder of a container, which is empty outside of its mount namespace.
    pub fn work(&self, name: &str) -> PathBuf {
        self.containers().join(name)
    }

    /// The file with the run key that a container was started with.
    pub fn key(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.key"))
    }

    /// The file that says why the last start of a container failed.
    pub fn error(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.error"))
    }

    /// The file that says why the start before the last one failed.
    pub fn error_before(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.before"))
    }

    /// The file that says why the last attempt at the health of a container failed.
    pub fn unhealthy(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.unhealthy"))
    }

    /// The file where the runtime says why it cannot run a container.
    pub fn runtime_log(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.runtime"))
    }

    /// What is known of the last runs of a container.
    pub fn last_runs(&self, name: &str) -> [PathBuf; 4] {
        [self.error_before(name), self.error(name), self.unhealthy(name), self.runtime_log(name)]
    }

    /// The file that marks that a container uses the bridge.
    pub fn network(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.network"))
    }

    /// The file of the ids and addresses that containers were given (given.rs).
    pub fn given(&self) -> PathBuf {
        self.run.join("given.json")
    }

    /// The hosts file of a container, which its mount namespace has at /etc/hosts.
    pub fn hosts(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.hosts"))
    }

    /// The lock of a container that starts or runs.
    pub fn lock(&self, name: &str) -> PathBuf {
        self.notes().join(format!("{name}.lock"))
    }

    /// The state of the runtime.
    pub fn runtime(&self) -> PathBuf {
        self.run.join("crun")
    }
}

/// Writes a file that is known of a container: a full file system leaves the old one or none, and never a part.
///
/// # Errors
/// [`IoError`] with the path of the file.
pub fn write_note(path: &Path, text: &str) -> Result<(), IoError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    atomic::write_new(&temporary, text.as_bytes(), 0o644).on("write", path)?;
    fs::rename(&temporary, path).on("write", path)
}
