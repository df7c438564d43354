//! Generates a set of keys and certificates for development.
//!
//! ```text
//! ca.pem ca.key               the manifest CA
//! signer.pem signer.key       signs manifests; CN `manifest NAME:UUID`, issued by the CA
//! floor.key floor.pub         signs floors (crate::floor)
//! provision.key provision.pub provisions floors
//! ```
//!
//! Certificates and public keys are PEM, private keys PKCS#8 in PEM, mode 0600.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, PKeyRef, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Name, X509Ref};
use uuid::Uuid;

use crate::error::{Class, Classified, IoError};
use crate::floor::{self, FloorError};
use crate::manifest::rules;
use crate::sys::atomic::{self, NewFile};
use crate::sys::failpoint;
use crate::trust::KeyError;
use crate::trust::p256::{P256PrivateKey, P256PublicKey};

/// Maximum length of a CN, in characters (RFC 5280, appendix A.1, ub-common-name).
const MAX_COMMON_NAME: usize = 64;
/// Size of generated RSA keys.
const RSA_BITS: u32 = 3072;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates are valid from a day ago, to allow for clock differences.
const BACKDATED: Duration = DAY;
const CA_VALIDITY: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
const SIGNER_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Why keys cannot be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The file already exists: keys are never overwritten.
    #[error("{} exists; keys are never overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A name that does not fit into the CN.
    #[error(
        "the product name `{found}` cannot be used; allowed: 1 to {max} characters, no control characters"
    )]
    BadName {
        /// The name.
        found: String,
        /// How many characters fit in addition to `manifest ` and the UUID.
        max: usize,
    },
    /// The floor key cannot authorize the provisioning key.
    #[error("cannot authorize the provisioning key: {0}")]
    Authorize(#[source] Box<FloorError>),
    /// A file that cannot be written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// OpenSSL failed.
    #[error("OpenSSL cannot {operation}: {source}")]
    Openssl {
        /// The operation.
        operation: &'static str,
        /// What it says.
        source: ErrorStack,
    },
}

impl From<FloorError> for GenerateError {
    fn from(error: FloorError) -> Self {
        GenerateError::Authorize(Box::new(error))
    }
}

impl From<KeyError> for GenerateError {
    fn from(error: KeyError) -> Self {
        FloorError::from(error).into()
    }
}

impl Classified for GenerateError {
    fn class(&self) -> Class {
        match self {
            GenerateError::Io(_) | GenerateError::Openssl { .. } => Class::Failure,
            _ => Class::Input,
        }
    }
}

fn openssl(operation: &'static str) -> impl Fn(ErrorStack) -> GenerateError {
    move |source| GenerateError::Openssl { operation, source }
}

/// Options for generating keys.
#[derive(Debug, Clone)]
pub struct Request {
    /// The product that the signer signs for.
    pub product: Uuid,
    /// The product's name in the signer's CN.
    pub name: String,
    /// Generate an RSA key for the signer instead of ECDSA P-256.
    pub rsa_signer: bool,
}

/// Generates a manifest CA, a signer, a floor key and a provisioning key for development, and returns the
/// files that it wrote.
///
/// # Errors
/// [`GenerateError::Exists`] if any of the files exists: then nothing is written.
pub fn generate(dir: &Path, request: &Request) -> Result<Vec<PathBuf>, GenerateError> {
    let common_name = format!("manifest {}:{}", request.name, request.product);
    let length = common_name.chars().count();
    if request.name.is_empty() || rules::has_control(&request.name) || length > MAX_COMMON_NAME {
        let max = MAX_COMMON_NAME - format!("manifest :{}", request.product).len();
        return Err(GenerateError::BadName { found: request.name.escape_debug().to_string(), max });
    }
    const NAMES: [&str; 8] = [
        "ca.pem",
        "ca.key",
        "signer.pem",
        "signer.key",
        "floor.key",
        "floor.pub",
        "provision.key",
        "provision.pub",
    ];
    // Check before generating keys, which takes a while; `create` does not overwrite either.
    for name in NAMES {
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            return Err(GenerateError::Exists { path });
        }
    }
    let mut files = make(request, &common_name).map_err(openssl("make keys"))?;
    authorize(&mut files, &request.product)?;
    let outcome = atomic::create(dir, &files, |_| failpoint::hit("keys.file.linked"));
    outcome.map_err(|error| match error.source.kind() {
        std::io::ErrorKind::AlreadyExists => GenerateError::Exists { path: error.path },
        _ => GenerateError::Io(error),
    })?;
    Ok(files.iter().map(|file| dir.join(file.name)).collect())
}

fn make(request: &Request, common_name: &str) -> Result<Vec<NewFile>, ErrorStack> {
    let ca_key = new_p256()?;
    let ca = certificate(&format!("{} manifest CA", request.name), &ca_key, None, CA_VALIDITY)?;
    let signer_key = if request.rsa_signer { PKey::from_rsa(Rsa::generate(RSA_BITS)?)? } else { new_p256()? };
    let signer = certificate(common_name, &signer_key, Some((&ca, &ca_key)), SIGNER_VALIDITY)?;
    let (floor, provision) = (new_p256()?, new_p256()?);
    let public = |name, bytes| NewFile { name, bytes, mode: 0o644 };
    let private = |name, key: &PKey<Private>| {
        Ok::<_, ErrorStack>(NewFile { name, bytes: key.private_key_to_pem_pkcs8()?, mode: 0o600 })
    };
    Ok(vec![
        public("ca.pem", ca.to_pem()?),
        private("ca.key", &ca_key)?,
        public("signer.pem", signer.to_pem()?),
        private("signer.key", &signer_key)?,
        private("floor.key", &floor)?,
        public("floor.pub", floor.public_key_to_pem()?),
        private("provision.key", &provision)?,
        public("provision.pub", provision.public_key_to_pem()?),
    ])
}

/// Appends the floor key's authorization of the provisioning key to both of its files: without it no device
/// accepts that key (crate::floor).
fn authorize(files: &mut [NewFile], product: &Uuid) -> Result<(), GenerateError> {
    let pem = |name: &str| {
        files.iter().find(|file| file.name == name).map(|file| file.bytes.clone()).unwrap_or_default()
    };
    let floor_key = P256PrivateKey::from_pem(&pem("floor.key"), Path::new("floor.key"))?;
    let provision = P256PublicKey::from_pem(&pem("provision.pub"), Path::new("provision.pub"))?;
    let authorization = floor::signature::authorize(&floor_key, product, &provision)?;
    let block = floor::signature::authorization_block(&authorization);
    for file in files.iter_mut().filter(|file| file.name.starts_with("provision.")) {
        file.bytes.extend_from_slice(block.as_bytes());
    }
    Ok(())
}

fn new_p256() -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}

/// Creates a certificate: of a self-signed CA, or of a signer issued by `issuer`.
fn certificate(
    common_name: &str,
    key: &PKeyRef<Private>,
    issuer: Option<(&X509Ref, &PKeyRef<Private>)>,
    validity: Duration,
) -> Result<X509, ErrorStack> {
    let mut name = X509Name::builder()?;
    name.append_entry_by_nid(Nid::COMMONNAME, common_name)?;
    let name = name.build();
    let mut serial = BigNum::new()?;
    // RFC 5280, section 4.1.2.2: positive, at most 20 octets.
    serial.rand(127, MsbOption::ONE, false)?;
    let mut builder = X509Builder::new()?;
    // Version 3 is encoded as 2.
    builder.set_version(2)?;
    builder.set_serial_number(&*serial.to_asn1_integer()?)?;
    builder.set_subject_name(&name)?;
    builder.set_issuer_name(issuer.map_or(&*name, |(issuer, _)| issuer.subject_name()))?;
    builder.set_pubkey(key)?;
    let now = SystemTime::now();
    builder.set_not_before(&*asn1_time(now - BACKDATED)?)?;
    builder.set_not_after(&*asn1_time(now + validity)?)?;
    if issuer.is_none() {
        builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    } else {
        builder.append_extension(BasicConstraints::new().critical().build()?)?;
        builder.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
        builder.append_extension(ExtendedKeyUsage::new().code_signing().build()?)?;
    }
    let subject_id = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
    builder.append_extension(subject_id)?;
    if let Some((issuer, _)) = issuer {
        let context = builder.x509v3_context(Some(issuer), None);
        let issuer_id = AuthorityKeyIdentifier::new().keyid(true).build(&context)?;
        builder.append_extension(issuer_id)?;
    }
    builder.sign(issuer.map_or(key, |(_, key)| key), MessageDigest::sha256())?;
    Ok(builder.build())
}

fn asn1_time(time: SystemTime) -> Result<Asn1Time, ErrorStack> {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Asn1Time::from_unix(i64::try_from(seconds).unwrap_or(i64::MAX))
}
