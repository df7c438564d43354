//! The signer's certificate: its chain to the manifest CA, its dates, and the product in its CN.
//!
//! `cert.pem` holds the signer's certificate first; certificates that lead from it to the CA may follow in
//! any order. OpenSSL builds and checks the chain (signatures, basic constraints, key usage, path length,
//! critical extensions, security level 2, which is 112 bits: no RSA below 2048, no SHA-1). Rules that OpenSSL
//! does not check are checked here.

use std::time::{SystemTime, UNIX_EPOCH};

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Public};
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509ExtendedKeyUsage, X509KeyUsage, X509Ref, X509StoreContext};
use uuid::Uuid;

use super::x509::{MAX_CERTIFICATES, name_text, read_pem, reason, valid_from};
use super::{Anchor, Dates, SigningKey, TrustError, der};
use crate::manifest::rules;

/// OpenSSL's name for 112 bits of security (SSL_CTX_set_security_level(3)).
const SECURITY_LEVEL: i32 = 2;

/// The signer's certificate and those supplied with it, not yet verified.
pub struct Certificate {
    leaf: X509,
    others: Vec<X509>,
}

/// The CN of a signer's certificate: `manifest NAME:UUID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The product's name, for people.
    pub name: String,
    /// The product.
    pub product: Uuid,
}

impl Certificate {
    /// Reads a PEM file.
    ///
    /// # Errors
    /// [`TrustError::UnreadableCertificate`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, TrustError> {
        let mut all = read_pem(pem).map_err(|reason| TrustError::UnreadableCertificate { reason })?;
        let leaf = all.remove(0);
        Ok(Self { leaf, others: all })
    }

    /// Returns its subject, for messages.
    pub fn subject(&self) -> String {
        name_text(self.leaf.subject_name())
    }

    /// Returns its public key.
    pub(super) fn key(&self) -> Result<PKey<Public>, TrustError> {
        self.leaf.public_key().map_err(|error| TrustError::UnsupportedKey { found: reason(&error) })
    }

    /// Returns whether it is the certificate of a private key.
    pub(super) fn has_key(&self, key: &SigningKey) -> bool {
        self.leaf.public_key().is_ok_and(|public| key.pkey().public_eq(&public))
    }

    /// Parses its CN.
    ///
    /// # Errors
    /// [`TrustError::NoProduct`] unless there is exactly one CN, `manifest NAME:UUID`.
    pub fn binding(&self) -> Result<Binding, TrustError> {
        let no_product = || TrustError::NoProduct { certificate: self.subject() };
        let mut names = self.leaf.subject_name().entries_by_nid(Nid::COMMONNAME);
        // Exactly one: with two, one reader could take the first and another the last.
        let (Some(name), None) = (names.next(), names.next()) else { return Err(no_product()) };
        // `to_string` keeps NUL bytes, which `has_control` then refuses.
        let name = name.data().to_string().map_err(|_| no_product())?;
        parse_binding(&name).ok_or_else(no_product)
    }

    /// Requires that the chain reaches the CA of the device.
    ///
    /// # Errors
    /// The first link that fails.
    pub fn check_chain(&self, anchor: &Anchor, dates: Dates) -> Result<(), TrustError> {
        let openssl = |operation| move |source| TrustError::Openssl { operation, source };
        let outcome = self.build_chain(anchor).map_err(openssl("build a certificate chain"))?;
        let chain = outcome.map_err(|failure| self.name_failure(failure, anchor))?;
        // An anchor may itself be an intermediate of a larger hierarchy, so that a chain may end
        // at a certificate that is not self-signed; but the signer is never its own anchor.
        if chain.len() < 2 {
            return Err(TrustError::SelfSigned { certificate: self.subject(), ca: anchor.ca_name() });
        }
        // RFC 5280, section 6.1.4 (k): basicConstraints present, "and that cA is set to TRUE". OpenSSL also
        // accepts keyUsage or Netscape's type instead, if they are alone.
        let last = chain.len() - 1;
        for issuer in &chain[1..last] {
            if !issuer.to_der().is_ok_and(|der| der::is_marked_ca(&der)) {
                return Err(TrustError::NotACa { certificate: name_text(issuer.subject_name()) });
            }
            check_extended_usage(issuer)?;
        }
        for link in chain.windows(2) {
            if let [certificate, issuer] = link {
                anchor.crls().check(certificate, issuer)?;
            }
        }
        self.check_usage()?;
        chain.iter().try_for_each(|link| check_dates(link, dates))
    }

    /// Requires that the certificate is for signing, if it restricts its uses.
    pub(super) fn check_usage(&self) -> Result<(), TrustError> {
        // RFC 5280, section 4.2.1.3: digitalSignature "is asserted when the subject public key is used
        // for verifying digital signatures, other than signatures on certificates".
        if self.leaf.key_usage().is_some_and(|usage| !usage.contains(X509KeyUsage::DIGITAL_SIGNATURE)) {
            return Err(TrustError::WrongUsage {
                certificate: self.subject(),
                extension: "keyUsage",
                lacks: "digitalSignature",
            });
        }
        check_extended_usage(&self.leaf)
    }

    /// Returns only the certificates, in PEM, in the order of the file.
    ///
    /// # Errors
    /// [`TrustError::Openssl`].
    pub fn to_pem(&self) -> Result<Vec<u8>, TrustError> {
        let all = std::iter::once(&self.leaf).chain(&self.others);
        all.map(|one| one.to_pem())
            .collect::<Result<Vec<_>, _>>()
            .map(|all| all.concat())
            .map_err(|source| TrustError::Openssl { operation: "write a certificate", source })
    }

    /// Returns when the last of its certificates becomes valid, in seconds since 1970.
    ///
    /// # Errors
    /// [`TrustError::Openssl`] if a date makes no sense.
    pub fn valid_from(&self) -> Result<i64, TrustError> {
        valid_from(std::iter::once(&self.leaf).chain(&self.others))
            .map_err(|source| TrustError::Openssl { operation: "read a date", source })
    }

    /// Compares which of two expires later; incomparable ones count as equal.
    pub(super) fn compare_end(&self, other: &Self) -> std::cmp::Ordering {
        self.leaf.not_after().compare(other.leaf.not_after()).unwrap_or(std::cmp::Ordering::Equal)
    }

    /// Checks the dates of only the signer's certificate.
    pub(super) fn check_dates(&self, dates: Dates) -> Result<(), TrustError> {
        check_dates(&self.leaf, dates)
    }

    /// Returns the chain from the signer to the anchor, or where it fails.
    fn build_chain(&self, anchor: &Anchor) -> Result<Result<Vec<X509>, Failure>, ErrorStack> {
        let mut store = X509StoreBuilder::new()?;
        for ca in anchor.ca() {
            store.add_cert(ca.clone())?;
        }
        let mut parameters = X509VerifyParam::new()?;
        // Dates are checked below, for all links and with errors that name them; a chain may end at
        // any anchor.
        parameters.set_flags(X509VerifyFlags::NO_CHECK_TIME | X509VerifyFlags::PARTIAL_CHAIN)?;
        parameters.set_auth_level(SECURITY_LEVEL);
        parameters.set_depth(MAX_CERTIFICATES as i32);
        store.set_param(&parameters)?;
        let store = store.build();
        let mut others = Stack::new()?;
        for other in &self.others {
            others.push(other.clone())?;
        }
        X509StoreContext::new()?.init(&store, &self.leaf, &others, |context| {
            if context.verify_cert()? {
                let chain = context.chain().map(|chain| chain.iter().map(X509Ref::to_owned).collect());
                return Ok(Ok(chain.unwrap_or_default()));
            }
            let error = context.error();
            Ok(Err(Failure {
                code: error.as_raw(),
                reason: error.error_string(),
                certificate: context.current_cert().map(X509Ref::to_owned),
            }))
        })
    }

    fn name_failure(&self, failure: Failure, anchor: &Anchor) -> TrustError {
        let link = failure.certificate.as_ref().unwrap_or(&self.leaf);
        let (certificate, issuer) = (name_text(link.subject_name()), name_text(link.issuer_name()));
        let ca = anchor.ca_name();
        let reason = failure.reason.to_string();
        // Numbers of openssl/x509_vfy.h, X509_V_ERR_*.
        match failure.code {
            // DEPTH_ZERO_SELF_SIGNED_CERT
            18 => TrustError::SelfSigned { certificate, ca },
            // CERT_SIGNATURE_FAILURE, SELF_SIGNED_CERT_IN_CHAIN
            7 | 19 => TrustError::UntrustedCertificate { certificate, issuer, ca },
            // UNABLE_TO_GET_ISSUER_CERT, …_LOCALLY, UNABLE_TO_VERIFY_LEAF_SIGNATURE
            2 | 20 | 21 => {
                let namesake =
                    |ca: &X509| ca.subject_name().try_cmp(link.issuer_name()).is_ok_and(|o| o.is_eq());
                if anchor.ca().iter().any(namesake) {
                    TrustError::UntrustedCertificate { certificate, issuer, ca }
                } else {
                    TrustError::IncompleteChain { certificate, issuer, ca }
                }
            }
            // INVALID_CA; KEYUSAGE_NO_CERTSIGN
            79 | 32 => TrustError::NotACa { certificate },
            // EE_KEY_TOO_SMALL, CA_KEY_TOO_SMALL, CA_MD_TOO_WEAK
            66..=68 => TrustError::WeakCertificate { certificate, reason },
            _ => TrustError::BadChain { certificate, reason },
        }
    }
}

/// Where and why OpenSSL refuses a chain.
struct Failure {
    code: i32,
    reason: &'static str,
    certificate: Option<X509>,
}

/// Requires that a certificate is for signing, if it has an extended key usage. This applies to the signer
/// and to the intermediates above it, which may issue certificates only for their own uses.
fn check_extended_usage(certificate: &X509Ref) -> Result<(), TrustError> {
    // RFC 5280, section 4.2.1.12: "the certificate MUST only be used for one of the purposes indicated".
    let signing = X509ExtendedKeyUsage::CODE_SIGN | X509ExtendedKeyUsage::ANYEKU;
    match certificate.extended_key_usage() {
        Some(usage) if !usage.intersects(signing) => Err(TrustError::WrongUsage {
            certificate: name_text(certificate.subject_name()),
            extension: "extendedKeyUsage",
            lacks: "codeSigning",
        }),
        _ => Ok(()),
    }
}

/// Reads `manifest NAME:UUID`.
fn parse_binding(name: &str) -> Option<Binding> {
    let (name, product) = name.strip_prefix("manifest ")?.rsplit_once(':')?;
    if name.is_empty() || rules::has_control(name) {
        return None;
    }
    Some(Binding { name: name.to_string(), product: rules::uuid(product).ok()? })
}

/// Rule (docs/design.md, dates): `build`, `install` and `update` enforce the dates and name the date in the
/// error; `boot` only logs them.
fn check_dates(certificate: &X509Ref, dates: Dates) -> Result<(), TrustError> {
    let now = match dates {
        Dates::Check(now) => now,
        Dates::LogOnly => SystemTime::now(),
    };
    let outcome = compare_dates(certificate, now);
    match (outcome, dates) {
        (Err(error), Dates::LogOnly) => {
            log::warn!("{error}; dates are not enforced here");
            Ok(())
        }
        (outcome, _) => outcome,
    }
}

fn compare_dates(certificate: &X509Ref, now: SystemTime) -> Result<(), TrustError> {
    let name = || name_text(certificate.subject_name());
    let bad = |error: ErrorStack| TrustError::BadChain { certificate: name(), reason: reason(&error) };
    // A clock before 1970 was never set.
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let now = Asn1Time::from_unix(i64::try_from(seconds).unwrap_or(i64::MAX)).map_err(bad)?;
    if certificate.not_after().compare(&now).map_err(bad)?.is_lt() {
        let not_after = certificate.not_after().to_string();
        return Err(TrustError::Expired { certificate: name(), not_after });
    }
    if certificate.not_before().compare(&now).map_err(bad)?.is_gt() {
        let not_before = certificate.not_before().to_string();
        return Err(TrustError::NotYetValid { certificate: name(), not_before });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cn_of_a_signer_has_one_form() {
        let uuid = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
        let binding =
            |name: &str| parse_binding(name).map(|binding| (binding.name, binding.product.to_string()));
        let good = |name: &str| Some((name.to_string(), uuid.to_string()));
        assert_eq!(binding(&format!("manifest default:{uuid}")), good("default"));
        assert_eq!(binding(&format!("manifest Ran Box:{}", uuid.to_uppercase())), good("Ran Box"));
        assert_eq!(binding(&format!("manifest a:b:{uuid}")), good("a:b"));
        for bad in [
            format!("manifest :{uuid}"),
            format!("manifest{uuid}"),
            format!("manifest default:{uuid} "),
            format!("Manifest default:{uuid}"),
            format!(" manifest default:{uuid}"),
            format!("manifest default:{}", uuid.replace('-', "")),
            format!("manifest default:{{{uuid}}}"),
            format!("manifest a\0b:{uuid}"),
            "manifest default".into(),
            String::new(),
        ] {
            assert_eq!(binding(&bad), None, "{bad:?}");
        }
    }
}
