//! Certificate revocation lists: how a publisher revokes trust in a key (RFC 5280, section 5).
//!
//! ```text
//! CONFIG/crl.pem   one or more lists, each a block `X509 CRL`; comments between them are ignored
//! ```
//!
//! A certificate that a list of its issuer names is refused wherever a certificate is checked, including at
//! boot. A list counts only if its issuer's key signed it. Revocation is permanent, whatever the clock says:
//! the list's dates are logged and never enforced, because a device that cannot obtain the next list must
//! still boot, and an attacker must not be able to disable a list by changing the clock.

use std::path::Path;
use std::sync::Arc;

use openssl::asn1::Asn1Time;
use openssl::x509::{CrlStatus, X509, X509Crl};

use super::TrustError;
use super::config::ConfigError;
use super::pem::public_only;
use super::x509::{name_text, reason};
use crate::sys::file::{self, Links};

/// Name of the lists' file in CONFIG.
pub const CRL_FILE: &str = "crl.pem";
/// Maximum size of the file, in bytes: some ten thousand revoked certificates.
pub const MAX_CRL_BYTES: usize = 1 << 20;
/// Maximum number of lists in a file.
const MAX_LISTS: usize = 32;

const BEGIN: &str = "-----BEGIN X509 CRL-----";
const END: &str = "-----END X509 CRL-----";

/// The revocation lists of a device.
#[derive(Clone, Default)]
pub struct Crls(Arc<Vec<X509Crl>>);

impl Crls {
    /// Reads the lists of a device; none if CONFIG has no such file.
    ///
    /// # Errors
    /// [`ConfigError::BadCrl`] if the file does not consist of lists, or if a list that names a CA of `cas`
    /// was not signed by it: an untrusted list must not silently revoke nothing.
    pub(super) fn find(config: &Path, cas: &[X509]) -> Result<Self, ConfigError> {
        let path = config.join(CRL_FILE);
        match file::find_regular(&path, Links::Followed, MAX_CRL_BYTES as u64)? {
            None => Ok(Self::default()),
            Some(bytes) => Self::read(&bytes, &path, cas),
        }
    }

    /// Reads the lists of a file.
    ///
    /// # Errors
    /// As [`Crls::find`].
    pub fn load(path: &Path, cas: &[X509]) -> Result<Self, ConfigError> {
        Self::read(&file::read_named(path, MAX_CRL_BYTES as u64)?, path, cas)
    }

    fn read(bytes: &[u8], path: &Path, cas: &[X509]) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::BadCrl { path: path.to_path_buf(), reason };
        if bytes.len() > MAX_CRL_BYTES {
            return Err(bad(format!("it has more than {MAX_CRL_BYTES} bytes")));
        }
        public_only(bytes, path)?;
        let lists = parse(bytes).map_err(bad)?;
        for list in &lists {
            let issuer = name_text(list.issuer_name());
            let mut namesakes =
                cas.iter().filter(|ca| is_name(ca.subject_name(), list.issuer_name())).peekable();
            if namesakes.peek().is_some() && !namesakes.any(|ca| signed_by(list, ca)) {
                return Err(bad(format!("the list of `{issuer}` is not signed by that CA")));
            }
            log_age(list, &issuer);
        }
        Ok(Self(Arc::new(lists)))
    }

    /// Refuses a certificate that its issuer has revoked.
    ///
    /// # Errors
    /// [`TrustError::Revoked`].
    pub(super) fn check(&self, certificate: &X509, issuer: &X509) -> Result<(), TrustError> {
        // RFC 5280, section 6.3.3: the list is that of the certificate's issuer, and its signature verifies
        // with the issuer's key. Two CAs may have the same name while one replaces the other.
        for list in self.0.iter().filter(|list| is_name(issuer.subject_name(), list.issuer_name())) {
            if let CrlStatus::Revoked(entry) = list.get_by_cert(certificate)
                && signed_by(list, issuer)
            {
                return Err(TrustError::Revoked {
                    certificate: name_text(certificate.subject_name()),
                    issuer: name_text(issuer.subject_name()),
                    since: entry.revocation_date().to_string(),
                });
            }
        }
        Ok(())
    }
}

/// Reads every list of a PEM text, at least one.
fn parse(bytes: &[u8]) -> Result<Vec<X509Crl>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text in PEM".to_string())?;
    let mut lists = Vec::new();
    for block in text.split(BEGIN).skip(1) {
        let Some((body, _)) = block.split_once(END) else { return Err("it is cut short".into()) };
        if lists.len() == MAX_LISTS {
            return Err(format!("it holds more than {MAX_LISTS} lists"));
        }
        let block = format!("{BEGIN}{body}{END}\n");
        lists.push(X509Crl::from_pem(block.as_bytes()).map_err(|error| reason(&error))?);
    }
    if lists.is_empty() {
        return Err("there is no PEM block `X509 CRL` in it".into());
    }
    Ok(lists)
}

fn is_name(one: &openssl::x509::X509NameRef, other: &openssl::x509::X509NameRef) -> bool {
    one.try_cmp(other).is_ok_and(|order| order.is_eq())
}

fn signed_by(list: &X509Crl, issuer: &X509) -> bool {
    issuer.public_key().is_ok_and(|key| list.verify(&key).unwrap_or(false))
}

/// Rule (docs/keys.md): the dates of a list are logged, not enforced.
fn log_age(list: &X509Crl, issuer: &str) {
    let Ok(now) = Asn1Time::days_from_now(0) else { return };
    if let Some(next) = list.next_update()
        && next.compare(&now).is_ok_and(|order| order.is_lt())
    {
        log::warn!("the revocation list of `{issuer}` was to be renewed at {next}; it counts all the same");
    }
    if list.last_update().compare(&now).is_ok_and(|order| order.is_gt()) {
        log::warn!(
            "the revocation list of `{issuer}` is of {}, which this machine's clock has not reached; it counts all the same",
            list.last_update()
        );
    }
}
