//! `mosfs manifest`: work on manifests alone.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use uuid::Uuid;

use super::{Global, RegistryArgs, output};
use crate::deploy::offer::find_unverified;
use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoContext, IoError};
use crate::manifest::{
    ImportErrors, ImportManifest, SystemError, SystemManifest, json as reproducible, yaml,
};
use crate::sys::file;
use crate::transport::SourceRef;
use crate::trust::config::CaFile;
use crate::trust::pem::public_only;
use crate::trust::{self, Anchor, Certificate, Dates, Signed, SigningKey};

/// Check, print, sign and verify manifests.
#[derive(Debug, Args)]
pub(super) struct Manifest {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check an import manifest or a system manifest, and report all errors in it.
    Check {
        /// The manifest: YAML, or JSON for a system manifest.
        file: PathBuf,
    },
    /// Print a manifest as reproducible JSON: sorted keys, no white space, no newline.
    Canonical {
        /// The manifest: an import manifest in YAML, or any JSON of that subset.
        file: PathBuf,
    },
    /// Print the system manifest of a source as it is stored, without verifying it.
    Show {
        /// The source: `oci:DIR[:VERSION]`, `oci:DIR:sha256:HEX`, or `docker://HOST[:PORT]/PREFIX[:VERSION]`;
        /// without a name or version, the highest version there.
        source: String,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Sign a system manifest, as `openssl dgst -sha256 -sign KEY` does.
    Sign {
        /// The system manifest.
        file: PathBuf,
        /// The signer's private key.
        #[arg(long)]
        key: PathBuf,
        /// Where to write the signature instead of FILE.sig.
        #[arg(short, long, value_name = "SIG")]
        output: Option<PathBuf>,
    },
    /// Verify a system manifest as a device would: chain, dates, product, signature, form.
    Verify {
        /// The system manifest.
        file: PathBuf,
        /// Its signature.
        #[arg(long)]
        sig: PathBuf,
        /// The signer's certificate and the intermediate certificates up to the CA.
        #[arg(long)]
        cert: PathBuf,
        /// The manifest CA.
        #[arg(long)]
        ca: PathBuf,
        /// The CA's certificate revocation list.
        #[arg(long, value_name = "FILE")]
        crl: Option<PathBuf>,
        /// The product of the device; without it, the product that the certificate names.
        #[arg(long, value_name = "UUID", value_parser = output::uuid)]
        product: Option<Uuid>,
    },
}

/// Runs `mosfs manifest`.
pub(super) fn run(args: &Manifest, global: &Global) -> Result<(), AnyError> {
    match &args.command {
        Command::Check { file } => check(file, global),
        Command::Canonical { file } => canonical(file),
        Command::Show { source, registry } => show(source, registry, global),
        Command::Sign { file, key, output } => sign(file, key, output.as_deref(), global),
        Command::Verify { file, sig, cert, ca, crl, product } => {
            verify(file, [sig.as_path(), cert, ca], crl.as_deref(), *product, global)
        }
    }
}

/// A file that is no manifest, by name.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
struct BadFile {
    path: PathBuf,
    source: SystemError,
}

impl Classified for BadFile {
    fn class(&self) -> Class {
        self.source.class()
    }
}

fn read(path: &Path, max: usize) -> Result<Vec<u8>, IoError> {
    file::read_named(path, max as u64)
}

/// Whether a file is JSON rather than YAML: a mapping in braces whose first key has quotes.
fn is_json(bytes: &[u8]) -> bool {
    let mut marks = bytes.iter().filter(|byte| !byte.is_ascii_whitespace());
    marks.next() == Some(&b'{') && matches!(marks.next(), Some(b'"' | b'}'))
}

/// Whether a file is a system manifest: JSON, and not an import manifest, which may be written
/// so as well, as JSON is YAML. Only system manifests lack the field `url`.
fn is_system(bytes: &[u8]) -> bool {
    is_json(bytes) && !bytes.windows(5).any(|window| window == b"\"url\"")
}

fn check(file: &Path, global: &Global) -> Result<(), AnyError> {
    let bytes = read(file, reproducible::MAX_BYTES.max(yaml::MAX_BYTES))?;
    let (kind, version, product, targets) = if is_system(&bytes) {
        let manifest =
            SystemManifest::parse(&bytes).map_err(|source| BadFile { path: file.to_path_buf(), source })?;
        ("system", manifest.version, manifest.product, manifest.targets.len())
    } else {
        let manifest = match ImportManifest::parse(file, &bytes) {
            Ok(manifest) => manifest,
            Err(errors) if global.json => {
                output::json(&json!({ "file": file.to_string_lossy(), "errors": import_errors(&errors) }))?;
                return Err(errors.into());
            }
            Err(errors) => return Err(errors.into()),
        };
        ("import", manifest.version, manifest.product, manifest.targets.len())
    };
    if global.json {
        let file = file.to_string_lossy();
        return output::json(&json!({
            "file": file, "errors": [], "kind": kind, "version": version, "product": product, "targets": targets,
        }));
    }
    let plural = if targets == 1 { "" } else { "s" };
    output::line(format_args!(
        "{}: {kind} manifest, version {version}, product {product}, {targets} target{plural}",
        file.display()
    ))
}

fn import_errors(errors: &ImportErrors) -> Vec<serde_json::Value> {
    let one = |error: &crate::manifest::ImportError| {
        let problem = &error.problem;
        json!({
            "line": problem.at.line, "column": problem.at.column, "field": problem.field,
            "found": problem.found, "allowed": problem.allowed,
        })
    };
    errors.0.iter().map(one).collect()
}

fn canonical(file: &Path) -> Result<(), AnyError> {
    let bytes = read(file, reproducible::MAX_BYTES.max(yaml::MAX_BYTES))?;
    let out = if is_json(&bytes) {
        let bad = |problem| BadFile { path: file.to_path_buf(), source: SystemError::Json(problem) };
        reproducible::write(&reproducible::read(&bytes).map_err(bad)?)
    } else {
        ImportManifest::parse(file, &bytes)?.canonical()
    };
    output::document(&out)
}

fn show(source: &str, registry: &RegistryArgs, global: &Global) -> Result<(), AnyError> {
    let source: SourceRef = source.parse()?;
    let transport = source.open(&registry.access(global))?;
    let manifest = find_unverified(&*transport, source.name.as_deref())?;
    SystemManifest::parse(&manifest)
        .map_err(|error| BadFile { path: source.to_string().into(), source: error })?;
    // Byte for byte, so that a pipe gets what was signed; a person gets lines.
    output::document(&manifest)
}

fn sign(file: &Path, key: &Path, to: Option<&Path>, global: &Global) -> Result<(), AnyError> {
    let bytes = read(file, reproducible::MAX_BYTES)?;
    // What no device would accept is not signed.
    SystemManifest::parse(&bytes).map_err(|source| BadFile { path: file.to_path_buf(), source })?;
    let signature = SigningKey::load(key)?.sign(&bytes)?;
    let to = match to {
        Some(path) => path.to_path_buf(),
        None => {
            let mut name = file.as_os_str().to_owned();
            name.push(".sig");
            PathBuf::from(name)
        }
    };
    let mut out = File::create(&to).on("create", &to)?;
    out.write_all(&signature).and_then(|()| out.sync_all()).on("write", &to)?;
    let digest = Digest::of(&bytes);
    if global.json {
        return output::json(&json!({ "manifest": digest.to_string(), "signature": to.to_string_lossy() }));
    }
    output::line(format_args!("{}: signature of {digest}", to.display()))
}

fn verify(
    file: &Path,
    [sig, cert, ca]: [&Path; 3],
    crl: Option<&Path>,
    product: Option<Uuid>,
    global: &Global,
) -> Result<(), AnyError> {
    let signed = Signed {
        manifest: read(file, reproducible::MAX_BYTES)?,
        signature: read(sig, trust::MAX_SIGNATURE_BYTES)?,
        certificate: read(cert, trust::MAX_CERTIFICATE_BYTES)?,
        floor_signature: None,
    };
    public_only(&signed.certificate, cert)?;
    let ca = CaFile::load(ca)?;
    let product = match product {
        Some(product) => product,
        // Believed only after the chain was checked, like the rest of the certificate.
        None => Certificate::from_pem(&signed.certificate)?.binding()?.product,
    };
    let anchor = Anchor::new(ca, product);
    let anchor = match crl {
        Some(crl) => anchor.with_crls(crl)?,
        None => anchor,
    };
    let verified = signed.verify(&anchor, Dates::check_now())?;
    let (digest, signer) = (verified.digest(), verified.signer());
    let version = verified.manifest().version;
    if global.json {
        return output::json(&json!({
            "digest": digest.to_string(), "version": version, "product": signer.product, "signer": signer.name,
        }));
    }
    output::line(format_args!(
        "{digest}: version {version}, product {}, signed for {}",
        signer.product, signer.name
    ))
}
