//! Files in PEM that are, or will be, public.
//!
//! Many servers keep a certificate and its private key in one file. Such a file must never be published:
//! mosfs parses and rewrites what it publishes, and a private key in a public file is an error.

use std::path::{Path, PathBuf};

use crate::error::{Class, Classified};

/// The beginning of a PEM block (RFC 7468, section 2).
const BEGIN: &[u8] = b"-----BEGIN ";
/// The end of the label of every kind of private key: PKCS#8, encrypted or not, RSA, EC, OpenSSH, TPM.
const SECRET: &[u8] = b"PRIVATE KEY";
/// Maximum length of a label, in bytes.
const MAX_LABEL: usize = 64;

/// A private key in a file that is public, or is about to be.
#[derive(Debug, thiserror::Error)]
#[error("{} holds a private key (`{label}`) beside what is public", path.display())]
pub struct SecretInPublic {
    /// The file.
    pub path: PathBuf,
    /// The label of the PEM block.
    pub label: String,
}

impl Classified for SecretInPublic {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// Returns the label of the first private key among the PEM blocks of a text. A truncated block counts too.
pub fn private_key(text: &[u8]) -> Option<String> {
    let mut rest = text;
    while let Some(at) = rest.windows(BEGIN.len()).position(|window| window == BEGIN) {
        rest = rest.get(at + BEGIN.len()..).unwrap_or_default();
        let line = rest.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
        let label = line.get(..line.len().min(MAX_LABEL)).unwrap_or_default();
        if label.windows(SECRET.len()).any(|window| window == SECRET) {
            let label = String::from_utf8_lossy(label);
            return Some(label.trim_end_matches('-').escape_default().to_string());
        }
    }
    None
}

/// Refuses a public file that holds a private key.
///
/// # Errors
/// [`SecretInPublic`].
pub fn public_only(text: &[u8], path: &Path) -> Result<(), SecretInPublic> {
    match private_key(text) {
        None => Ok(()),
        Some(label) => Err(SecretInPublic { path: path.to_path_buf(), label }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_private_key_is_seen_wherever_it_stands() {
        let certificate = "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n";
        for label in [
            "PRIVATE KEY",
            "ENCRYPTED PRIVATE KEY",
            "RSA PRIVATE KEY",
            "EC PRIVATE KEY",
            "OPENSSH PRIVATE KEY",
            "TSS2 PRIVATE KEY",
        ] {
            let key = format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n");
            for text in [
                format!("{certificate}{key}"),
                format!("{key}{certificate}"),
                format!("{certificate}some words {key}"),
                format!("{certificate}-----BEGIN {label}"),
                format!("{certificate}{}", key.replace('\n', "\r\n")),
            ] {
                assert_eq!(private_key(text.as_bytes()).as_deref(), Some(label), "{text}");
            }
        }
        let error = public_only(b"-----BEGIN RSA PRIVATE KEY-----", Path::new("cert.pem")).unwrap_err();
        assert_eq!(error.class(), Class::Input);
        assert_eq!(
            error.to_string(),
            "cert.pem holds a private key (`RSA PRIVATE KEY`) beside what is public"
        );
    }

    #[test]
    fn public_blocks_and_words_are_no_private_key() {
        for text in [
            "",
            "-----BEGIN ",
            "a note about the PRIVATE KEY of this certificate",
            "-----BEGIN CERTIFICATE-----\nPRIVATE KEY\n",
            "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
            "-----BEGIN MOSFS FIRST WRITE AUTHORIZATION-----\n",
        ] {
            assert_eq!(private_key(text.as_bytes()), None, "{text}");
        }
    }
}
