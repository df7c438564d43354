//! Private keys: made for development, loaded with care.
//!
//! ```text
//! ca.pem ca.key               the manifest CA
//! signer.pem signer.key       signs manifests; CN `manifest NAME:UUID`, issued by the CA
//! floor.key floor.pub         signs floors (FLOOR.md)
//! provision.key provision.pub provisions floors (FLOOR.md)
//! ```
//!
//! Certificates and public keys are PEM, private keys PKCS#8 in PEM, mode 0600.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
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
use openssl::sign::Signer;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Name, X509Ref};
use uuid::Uuid;

use super::floor::{self, FloorError};
use super::signature::Algorithm;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::failpoint;
use crate::manifest::rules;
use crate::sys::atomic::{self, NewFile};
use crate::sys::file::read_at_most;

/// Most bytes of a key file.
const MAX_KEY_BYTES: usize = 64 << 10;
/// Most characters of a CN (RFC 5280, appendix A.1, ub-common-name).
const MAX_COMMON_NAME: usize = 64;
/// Size of the RSA keys that are made.
const RSA_BITS: u32 = 3072;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates are valid from a day ago, so that clocks may differ.
const BACKDATED: Duration = DAY;
const CA_VALIDITY: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
const SIGNER_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Why a key cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A private key that others can read or write.
    #[error("the private key {} has mode {mode:04o}: others than its owner may use it", path.display())]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Not a private key in PEM.
    #[error("{} is not a private key in PEM: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What OpenSSL says.
        reason: String,
    },
    /// A key of a kind that no device accepts signatures of.
    #[error("the key {} is {found}; expected RSA of 2048 bits or more, or ECDSA on P-256", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// A file that is there already: keys are never overwritten.
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
        /// How many characters fit beside `manifest ` and the UUID.
        max: usize,
    },
    /// The floor key cannot authorize the provisioning key.
    #[error("cannot authorize the provisioning key: {0}")]
    Authorize(#[source] Box<FloorError>),
    /// A file that cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// OpenSSL failed.
    #[error("OpenSSL cannot {operation}: {source}")]
    Openssl {
        /// What it was asked to do.
        operation: &'static str,
        /// What it says.
        source: ErrorStack,
    },
}

impl From<FloorError> for KeyError {
    fn from(error: FloorError) -> Self {
        KeyError::Authorize(Box::new(error))
    }
}

impl From<floor::KeyError> for KeyError {
    fn from(error: floor::KeyError) -> Self {
        FloorError::from(error).into()
    }
}

impl Classified for KeyError {
    fn class(&self) -> Class {
        match self {
            KeyError::Io(_) | KeyError::Openssl { .. } => Class::Failure,
            _ => Class::Input,
        }
    }
}

/// A private key of an accepted kind.
pub struct PrivateKey {
    key: PKey<Private>,
    algorithm: Algorithm,
}

impl PrivateKey {
    /// Loads a PEM file that its owner alone can use.
    ///
    /// # Errors
    /// [`KeyError::OpenToOthers`], [`KeyError::Unreadable`], [`KeyError::Unsupported`].
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let file = File::open(path).on("open", path)?;
        // Of the open file, not of the path, which could lead elsewhere by now.
        let mode = file.metadata().on("stat", path)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::OpenToOthers { path: path.to_path_buf(), mode });
        }
        let pem = read_at_most(file, path, MAX_KEY_BYTES as u64)?;
        let unreadable = |reason: String| KeyError::Unreadable { path: path.to_path_buf(), reason };
        // Without a callback OpenSSL would ask on the terminal for the passphrase.
        let mut encrypted = false;
        let key = PKey::private_key_from_pem_callback(&pem, |_| {
            encrypted = true;
            Err(ErrorStack::get())
        });
        let key = key.map_err(|error| {
            unreadable(if encrypted {
                "it is encrypted, which is not supported".into()
            } else {
                super::certificate::reason(&error)
            })
        })?;
        let algorithm =
            Algorithm::of(&key).map_err(|found| KeyError::Unsupported { path: path.to_path_buf(), found })?;
        Ok(Self { key, algorithm })
    }

    /// Which signatures it makes.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// OpenSSL's form of the key, for signatures that are not over manifests.
    pub fn pkey(&self) -> &PKeyRef<Private> {
        &self.key
    }

    /// Signs bytes as `openssl dgst -sha256 -sign` does.
    ///
    /// # Errors
    /// [`KeyError::Openssl`].
    pub fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut signer = Signer::new(MessageDigest::sha256(), &self.key).map_err(openssl("sign"))?;
        signer.sign_oneshot_to_vec(bytes).map_err(openssl("sign"))
    }
}

fn openssl(operation: &'static str) -> impl Fn(ErrorStack) -> KeyError {
    move |source| KeyError::Openssl { operation, source }
}

/// What keys to make.
#[derive(Debug, Clone)]
pub struct Request {
    /// The product that the signer signs for.
    pub product: Uuid,
    /// The product's name in the signer's CN.
    pub name: String,
    /// Makes the signer's key RSA instead of ECDSA P-256.
    pub rsa_signer: bool,
}

/// Makes a manifest CA, a signer, a floor key and a provisioning key for development, and returns
/// the files that it wrote.
///
/// # Errors
/// [`KeyError::Exists`] if any of the files is there: then nothing is written.
pub fn generate(dir: &Path, request: &Request) -> Result<Vec<PathBuf>, KeyError> {
    let common_name = format!("manifest {}:{}", request.name, request.product);
    let length = common_name.chars().count();
    if request.name.is_empty() || rules::has_control(&request.name) || length > MAX_COMMON_NAME {
        let max = MAX_COMMON_NAME - format!("manifest :{}", request.product).len();
        return Err(KeyError::BadName { found: request.name.escape_debug().to_string(), max });
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
    // Before the keys are made, which takes a while; `create` does not overwrite either.
    for name in NAMES {
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            return Err(KeyError::Exists { path });
        }
    }
    let mut files = make(request, &common_name).map_err(openssl("make keys"))?;
    authorize(&mut files, &request.product)?;
    let outcome = atomic::create(dir, &files, |_| failpoint::hit("keys.file.linked"));
    outcome.map_err(|error| match error.source.kind() {
        std::io::ErrorKind::AlreadyExists => KeyError::Exists { path: error.path },
        _ => KeyError::Io(error),
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

/// Appends the floor key's authorization of the provisioning key to both of its files: without it
/// no device takes that key's word (FLOOR.md, first write).
fn authorize(files: &mut [NewFile], product: &Uuid) -> Result<(), KeyError> {
    let pem = |name: &str| {
        files.iter().find(|file| file.name == name).map(|file| file.bytes.clone()).unwrap_or_default()
    };
    let floor_key = floor::PrivateKey::from_pem(&pem("floor.key"), Path::new("floor.key"))?;
    let provision = floor::PublicKey::from_pem(&pem("provision.pub"), Path::new("provision.pub"))?;
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

/// A certificate: of a CA that issues itself, or of a signer that `issuer` issues.
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
    // Version 3 is written as 2.
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
