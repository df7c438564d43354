//! OpenSSL's certificates: read from PEM, and named in messages.

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::x509::{X509, X509NameRef};

use crate::manifest::rules;

/// Maximum number of certificates in a file, and of links in a chain.
pub(super) const MAX_CERTIFICATES: usize = 8;

/// Reads all certificates of a PEM file, at least one.
pub(super) fn read_pem(pem: &[u8]) -> Result<Vec<X509>, String> {
    let certificates = X509::stack_from_pem(pem).map_err(|error| reason(&error))?;
    if certificates.is_empty() {
        let begun = pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----");
        return Err(if begun { "it is cut short" } else { "there is no PEM certificate in it" }.into());
    }
    if certificates.len() > MAX_CERTIFICATES {
        return Err(format!(
            "it holds {} certificates, at most {MAX_CERTIFICATES} are allowed",
            certificates.len()
        ));
    }
    Ok(certificates)
}

/// When the last of these certificates becomes valid, in seconds since 1970; 0 if there are none.
pub(super) fn valid_from<'a>(certificates: impl Iterator<Item = &'a X509>) -> Result<i64, ErrorStack> {
    let zero = Asn1Time::from_unix(0)?;
    let mut latest = 0;
    for certificate in certificates {
        let since = zero.diff(certificate.not_before())?;
        latest = latest.max(i64::from(since.days) * 86_400 + i64::from(since.secs));
    }
    Ok(latest)
}

/// The last reason of an OpenSSL error, in words.
pub(super) fn reason(error: &ErrorStack) -> String {
    let reason = error.errors().last().and_then(|error| error.reason());
    reason.unwrap_or("OpenSSL gives no reason").to_string()
}

/// Formats a name roughly as in RFC 4514, with control characters escaped; only for messages.
pub(super) fn name_text(name: &X509NameRef) -> String {
    let entry = |entry: &openssl::x509::X509NameEntryRef| {
        let kind = entry.object().nid().short_name().unwrap_or("?");
        let value = entry.data().to_string().unwrap_or_else(|_| "?".into());
        format!("{kind}={}", rules::printable(&value, 128))
    };
    name.entries().map(entry).collect::<Vec<_>>().join(", ")
}
