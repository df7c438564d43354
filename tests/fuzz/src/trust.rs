//! Certificates of strangers, against a fixed CA.

use std::path::Path;
use std::sync::OnceLock;

use mosfs::internals::trust::config::CaFile;
use mosfs::internals::trust::{Anchor, Certificate, Dates};

/// Any bytes as the DER of a certificate, alone and with a CA's behind it: only what the CA issued is accepted,
/// and that needs its signature, which a fuzzer does not find. The seeds are such certificates, so that all of the
/// way is walked.
pub fn certificate(bytes: &[u8]) {
    static ANCHOR: OnceLock<Anchor> = OnceLock::new();
    let anchor = ANCHOR.get_or_init(|| {
        let ca = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/src/ca.pem");
        // The manifest is that of the fuzz package or that of mosfs.
        let ca = if ca.exists() { ca } else { Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ca.pem") };
        let product = "de6c82c5-2e01-4c92-949b-a6545d30fc06".parse().expect("a UUID");
        Anchor::new(CaFile::load(&ca).expect("the CA of the fuzz target"), product)
    });
    // Two bytes of length, the first certificate, and what is left is the second.
    let Some((&length, rest)) = bytes.split_first_chunk() else { return };
    let (first, second) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(length))));
    let pem = format!("{}{}", pem(first), if second.is_empty() { String::new() } else { pem(second) });
    if let Ok(certificate) = Certificate::from_pem(pem.as_bytes()) {
        assert!(!certificate.subject().chars().any(char::is_control));
        let _ = certificate.binding();
        let _ = certificate.check_chain(anchor, Dates::LogOnly);
    }
    let _ = Certificate::from_pem(bytes);
}

/// Bytes in PEM (RFC 7468).
fn pem(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----");
    for (index, chunk) in der.chunks(3).enumerate() {
        if index % 16 == 0 {
            text.push('\n');
        }
        let group =
            chunk.iter().chain([0, 0].iter()).take(3).fold(0u32, |sum, &byte| sum << 8 | u32::from(byte));
        for digit in 0..4 {
            let padding = digit > chunk.len();
            let index = (group >> (18 - 6 * digit) & 63) as usize;
            text.push(if padding { '=' } else { char::from(DIGITS[index]) });
        }
    }
    text + "\n-----END CERTIFICATE-----\n"
}
