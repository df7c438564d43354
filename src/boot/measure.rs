//! What a boot is measured as, into PCR 15.
//!
//! A boot that is handed over extends the PCR once; a boot that fails extends it once with something
//! else, so that an attacker who gets at the machine afterwards cannot reach the value of a good boot.
//!
//! ```text
//! event of a boot    {"boot":"mosfs-v1","config":C,"manifest":"sha256:H3","overlay":"tmpfs",
//!                     "program":"0.1.0","target":"hostfs"}
//!                    without white space and line breaks, keys in this order, nothing behind it
//! event of a refusal mosfs-v1 refused
//! C                  "sha256:" and the SHA-256 of a list of CONFIG's files
//! list               for each regular file, sorted by its name as bytes:
//!                    64 hex digits, the SHA-256 of its content; two blanks; its name; a line feed
//! digest in a bank   the hash of the event in the bank's algorithm; every bank that has PCR 15 gets its own
//! ```
//!
//! The list is what `sha256sum *` prints in CONFIG (with `LC_ALL=C`), for names that need no escaping.
//! Strings are escaped as JSON does; neither of those in an event needs it. Any change of this form takes
//! another `boot` word than `mosfs-v1`. docs/boot.md has an example with a shell's means.

use std::fs;
use std::path::Path;
use std::time::Duration;

use openssl::hash::MessageDigest;

use super::cmdline::Overlay;
use super::event_log;
use crate::digest::Digest;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::sorting;
use crate::sys::file::{self, Links};
use crate::sys::tpm::{BankAlgorithm, BankDigest, Tcti, Tpm, TpmError};

/// The PCR that a boot extends: the "system identity" of the Linux TPM PCR registry.
pub const PCR: u32 = 15;

/// The event of a boot that failed.
pub const REFUSED: &str = "mosfs-v1 refused";

/// The longest file of CONFIG that is measured, in bytes: all that mosfs reads from there is far below.
const MAX_CONFIG_FILE: u64 = 16 << 20;

/// Why a boot was not measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A file of CONFIG cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// No bank of the TPM has the PCR.
    #[error("the TPM at {tcti} has no active bank with PCR {PCR}: nothing can be measured")]
    NoBank {
        /// Where the TPM is.
        tcti: Tcti,
    },
    /// OpenSSL lacks the algorithm of an active bank.
    #[error("the TPM has an active {algorithm} bank, and OpenSSL cannot compute {algorithm}")]
    NoAlgorithm {
        /// The algorithm's name.
        algorithm: &'static str,
    },
    /// The TPM did not take it.
    #[error("cannot extend PCR {PCR}: {source}")]
    Tpm {
        /// The TPM's answer.
        #[from]
        source: TpmError,
    },
}

impl Classified for MeasureError {
    fn class(&self) -> Class {
        match self {
            Self::Io(error) => error.class(),
            Self::NoBank { .. } | Self::NoAlgorithm { .. } | Self::Tpm { .. } => Class::Tpm,
        }
    }
}

/// All that makes a boot this boot and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity<'a> {
    /// The digest of the system manifest.
    pub manifest: Digest,
    /// The target that is the root.
    pub target: &'a str,
    /// Where writes to the root go.
    pub overlay: Overlay,
    /// The digest of CONFIG ([`config_digest`]).
    pub config: Digest,
}

impl Identity<'_> {
    /// The event: the text that is hashed.
    pub fn event(&self) -> String {
        // serde_json sorts the keys of an object by byte.
        serde_json::json!({
            "boot": "mosfs-v1",
            "config": self.config,
            "manifest": self.manifest,
            "overlay": self.overlay.name(),
            "program": env!("CARGO_PKG_VERSION"),
            "target": self.target,
        })
        .to_string()
    }
}

/// The digest of what CONFIG holds: every regular file by name and content. Links are followed, as
/// whatever reads CONFIG does; folders are not looked into, as nothing reads them.
pub fn config_digest(config: &Path) -> Result<Digest, IoError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(config).on("list", config)? {
        let path = entry.on("list", config)?.path();
        // A link that leads nowhere is as good as no file to whoever reads CONFIG.
        if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        let name = path.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        let content = file::read_regular(&path, Links::Followed, MAX_CONFIG_FILE)?;
        files.push((name, Digest::of(&content)));
    }
    sorting::sort(&mut files);
    let mut list = Vec::new();
    for (name, digest) in files {
        list.extend_from_slice(digest.hex().as_bytes());
        list.extend_from_slice(b"  ");
        list.extend_from_slice(&name);
        list.push(b'\n');
    }
    Ok(Digest::of(&list))
}

/// Extends the PCR with an event, in every active bank, and records it in the event log.
///
/// Returns why it is not in the log, if it is not: the PCR counts, the log only explains it.
///
/// # Errors
/// Where not every active bank took it.
pub fn extend(tcti: &Tcti, budget: Duration, event: &str) -> Result<Option<IoError>, MeasureError> {
    let tpm = Tpm::open(tcti, budget)?;
    let banks = tpm.pcr_banks(PCR)?;
    // Rule (TCG PC Client Platform Firmware Profile, 3.3.1): a measurement is extended "into all allocated banks".
    // One that is left at zero can be extended by anybody later, with the digest that he would like to show.
    if banks.is_empty() {
        return Err(MeasureError::NoBank { tcti: tcti.clone() });
    }
    let digests = banks.into_iter().map(|bank| digest(bank, event)).collect::<Result<Vec<_>, _>>()?;
    let log = event_log::Due::open(&event_log::path());
    if let Err(error) = tpm.pcr_extend(PCR, &digests) {
        // Refused by the TPM, nothing was extended; after anything else nobody knows, and the mark stays.
        if let (Ok(log), Some(_)) = (log, error.code()) {
            let _ = log.give_up();
        }
        return Err(error.into());
    }
    Ok(log.and_then(|log| log.record(PCR, &digests, event)).err())
}

/// The digest of an event in a bank's algorithm.
fn digest(algorithm: BankAlgorithm, event: &str) -> Result<BankDigest, MeasureError> {
    let lacking = || MeasureError::NoAlgorithm { algorithm: algorithm.name() };
    let kind = MessageDigest::from_name(algorithm.name()).ok_or_else(lacking)?;
    let digest = openssl::hash::hash(kind, event.as_bytes()).map_err(|_| lacking())?.to_vec();
    // A digest of another size would be cut or filled up without a word.
    if digest.len() != algorithm.digest_bytes() {
        return Err(lacking());
    }
    Ok(BankDigest { algorithm, digest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    /// What a shell makes of a text.
    fn shell(script: &str, dir: &Path) -> String {
        let output =
            Command::new("sh").args(["-c", script]).current_dir(dir).env("LC_ALL", "C").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    }

    #[test]
    fn config_is_what_sha256sum_prints_of_it() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("product", "x\n"), ("manifestCA.pem", "ca"), ("Z", ""), ("crl.pem", "c")] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let expected = shell("sha256sum * | sha256sum | cut -d' ' -f1", dir.path());
        let before = config_digest(dir.path()).unwrap();
        assert_eq!(before.hex(), expected);
        // Folders and links that lead nowhere are not what anybody reads.
        fs::create_dir(dir.path().join("folder")).unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        assert_eq!(config_digest(dir.path()).unwrap(), before);
        // A link to a file is, and so are a name and a byte.
        symlink("product", dir.path().join("overlay")).unwrap();
        let linked = config_digest(dir.path()).unwrap();
        assert_ne!(linked, before);
        fs::remove_file(dir.path().join("overlay")).unwrap();
        fs::write(dir.path().join("crl.pem"), "C").unwrap();
        assert_ne!(config_digest(dir.path()).unwrap(), before);
        fs::rename(dir.path().join("crl.pem"), dir.path().join("crl.pen")).unwrap();
        assert_ne!(config_digest(dir.path()).unwrap(), before);
    }

    #[test]
    fn the_event_is_stable_and_each_part_changes_it() {
        let identity = Identity {
            manifest: Digest::of(b"manifest"),
            target: "hostfs",
            overlay: Overlay::Tmpfs,
            config: Digest::of(b"config"),
        };
        let expected = format!(
            "{{\"boot\":\"mosfs-v1\",\"config\":\"{}\",\"manifest\":\"{}\",\"overlay\":\"tmpfs\",\
             \"program\":\"{}\",\"target\":\"hostfs\"}}",
            Digest::of(b"config"),
            Digest::of(b"manifest"),
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(identity.event(), expected);
        for other in [
            Identity { manifest: Digest::of(b""), ..identity.clone() },
            Identity { target: "other", ..identity.clone() },
            Identity { overlay: Overlay::Scratch, ..identity.clone() },
            Identity { config: Digest::of(b""), ..identity.clone() },
        ] {
            assert_ne!(other.event(), expected);
        }
        assert_ne!(REFUSED, expected);
    }

    #[test]
    fn digests_are_those_of_openssls_command() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("event"), REFUSED).unwrap();
        for bank in [
            BankAlgorithm::Sha1,
            BankAlgorithm::Sha256,
            BankAlgorithm::Sha384,
            BankAlgorithm::Sha512,
            BankAlgorithm::Sm3,
        ] {
            let script = format!("openssl dgst -{} -r event | cut -d' ' -f1", bank.name());
            let found = digest(bank, REFUSED).unwrap();
            assert_eq!(crate::digest::hex(&found.digest), shell(&script, dir.path()), "{bank:?}");
        }
    }
}
