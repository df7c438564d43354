//! The log of what user space measured: `/run/log/systemd/tpm2-measure.log`, which systemd began.
//!
//! ```text
//! 0x1e { "pcr": 15,
//!        "digests": [{"hashAlg": "sha256", "digest": HEX}, …],      one for each bank
//!        "content_type": "systemd",
//!        "content": {"string": TEXT, "bootId": HEX, "timestamp": MICROSECONDS since the boot} } 0x0a
//! ```
//!
//! Records follow each other (RFC 7464, JSON text sequences; `jq --seq` reads them). The format is that
//! of systemd's own records ("TPM2 PCR Measurements Made by systemd"; a subset of the TCG's canonical event log
//! in JSON), so that its tools replay ours with theirs. `content.string` is what was hashed.
//!
//! Locks: flock(2) on the file, exclusive, from before the PCR is extended until the record is written, so that
//! the order of records is that of extensions. Invariant, also systemd's: the file has the sticky bit
//! while a record is due; where it is there already, an extension has gone unrecorded, the log is
//! of no use any more, and nothing is added.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::digest::hex;
use crate::error::{IoContext, IoError};
use crate::sys::file;
use crate::sys::tpm::BankDigest;

/// Where systemd has it.
pub const PATH: &str = "/run/log/systemd/tpm2-measure.log";
/// systemd's variable for another place.
pub const PATH_VARIABLE: &str = "SYSTEMD_MEASURE_LOG_USERSPACE";

/// For root alone: who can open the file can lock it.
const MODE: u32 = 0o600;
/// `S_ISVTX`: a record is due.
const DUE: u32 = 0o1000;

/// Where the log is: [`PATH`], or what [`PATH_VARIABLE`] names.
pub fn path() -> PathBuf {
    std::env::var_os(PATH_VARIABLE).map_or_else(|| PathBuf::from(PATH), PathBuf::from)
}

/// The log, locked, with a record due.
#[derive(Debug)]
pub struct Due {
    file: File,
    path: PathBuf,
}

impl Due {
    /// Opens the log and locks it, before a PCR is extended.
    ///
    /// # Errors
    /// Where it is no regular file, or an earlier extension is missing in it.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        if let Some(folder) = path.parent() {
            file::create_folders(folder)?;
        }
        let flags = libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_NONBLOCK;
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(MODE).custom_flags(flags).open(path);
        let file = file.on("open", path)?;
        file.lock().on("lock", path)?;
        let metadata = file.metadata().on("look at", path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no regular file")).on("write", path);
        }
        if metadata.mode() & DUE != 0 {
            return Err(io::Error::other("an earlier measurement is missing in it")).on("write", path);
        }
        file.set_permissions(Permissions::from_mode(MODE | DUE)).on("mark", path)?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    /// Writes the record of an extension that has been made.
    pub fn record(mut self, pcr: u32, digests: &[BankDigest], text: &str) -> Result<(), IoError> {
        let line = record(pcr, digests, text, &boot_id(), microseconds_since_boot());
        self.file.write_all(line.as_bytes()).on("write", &self.path)?;
        self.unmark()
    }

    /// Takes the mark off where the PCR was not extended.
    pub fn give_up(self) -> Result<(), IoError> {
        self.unmark()
    }

    fn unmark(&self) -> Result<(), IoError> {
        self.file.set_permissions(Permissions::from_mode(MODE)).on("mark", &self.path)
    }
}

/// One record: pure.
fn record(pcr: u32, digests: &[BankDigest], text: &str, boot_id: &str, timestamp: u64) -> String {
    let digests: Vec<_> = digests
        .iter()
        .map(|one| json!({"hashAlg": one.algorithm.name(), "digest": hex(&one.digest)}))
        .collect();
    let record = json!({
        "pcr": pcr,
        "digests": digests,
        "content_type": "systemd",
        "content": {"string": text, "bootId": boot_id, "timestamp": timestamp},
    });
    format!("\u{1e}{record}\n")
}

/// The kernel's number for this boot, 32 hex digits as systemd writes it.
fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().replace('-', "")
}

/// `CLOCK_BOOTTIME`, as /proc/uptime has it.
fn microseconds_since_boot() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1e6) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::tpm::BankAlgorithm;

    fn digests() -> Vec<BankDigest> {
        vec![BankDigest { algorithm: BankAlgorithm::Sha1, digest: vec![0xab; 20] }]
    }

    #[test]
    fn a_record_is_one_of_systemds() {
        let line = record(15, &digests(), "what \"was\" hashed", "00ff", 12);
        let expected = format!(
            "\u{1e}{{\"content\":{{\"bootId\":\"00ff\",\"string\":\"what \\\"was\\\" hashed\",\"timestamp\":12}},\
             \"content_type\":\"systemd\",\"digests\":[{{\"digest\":\"{}\",\"hashAlg\":\"sha1\"}}],\"pcr\":15}}\n",
            "ab".repeat(20)
        );
        assert_eq!(line, expected);
    }

    #[test]
    fn records_follow_each_other_and_the_file_is_for_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log/systemd/tpm2-measure.log");
        for text in ["one", "two"] {
            Due::open(&path).unwrap().record(15, &digests(), text).unwrap();
        }
        Due::open(&path).unwrap().give_up().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let parsed: Vec<serde_json::Value> = text
            .split('\u{1e}')
            .skip(1)
            .map(|record| serde_json::from_str(record.strip_suffix('\n').unwrap()).unwrap())
            .collect();
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[1]["content"]["string"], "two");
        assert_eq!(parsed[1]["content"]["bootId"].as_str().unwrap().len(), 32);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_log_that_lacks_a_record_gets_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        // Whoever extended the PCR died before the record was written.
        drop(Due::open(&path).unwrap());
        let error = Due::open(&path).unwrap_err();
        assert_eq!(error.source.to_string(), "an earlier measurement is missing in it");
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("elsewhere", dir.path().join("log")).unwrap();
        assert!(Due::open(&dir.path().join("log")).is_err());
        assert!(!dir.path().join("elsewhere").exists());
    }
}
