//! `mosfs build`: an import manifest into a signed system in a store.

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::kernel::KernelArgs;
use super::{Global, RegistryArgs, iso, output, progress};
use crate::convert::{Codec, Effort, ImageKind, Packing};
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::image::boot;
use crate::image::oci::Platform;
use crate::manifest::{ImportManifest, StorageType, SystemManifest, json as reproducible, rules, yaml};
use crate::medium::{self, Written};
use crate::progress::Progress;
use crate::publish::base::Base;
use crate::publish::build::{Built, Signer, Sources, build, check_medium, refuse_ipv6};
use crate::publish::halves::{self, ExternalSignatures};
use crate::store::Store;
use crate::sys::atomic;
use crate::sys::file::read_named;
use crate::trust::p256::{P256PrivateKey, P256PublicKey};
use crate::trust::{self, Dates, SigningKey};

/// Most bytes of a floor signature file: DER has 72 at the most.
const MAX_FLOOR_SIGNATURE: usize = 1 << 10;

/// Fetch and convert the images of an import manifest, and sign the resulting system.
///
/// Prints the digest of the system manifest. The same input produces the same digest.
///
/// If the keys are on another machine, build in two steps. First, --to-sign writes the file to sign; sign it there with
/// `openssl dgst -sha256 -sign`. Then run build again with --signature, --cert and --floor-signature. In this step,
/// FILE is either the import manifest or the file that --to-sign wrote.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("signing").required(true).args(["key", "to_sign", "signature"]))]
pub(super) struct Build {
    /// The import manifest; in the second step, also the file that --to-sign wrote.
    file: PathBuf,
    /// The store; created if it does not exist.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The signer's private key (PEM).
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The signer's certificate and the intermediate certificates up to the CA. A file that also holds a private key is
    /// refused.
    #[arg(long, value_name = "FILE", required_unless_present = "to_sign")]
    cert: Option<PathBuf>,
    /// Build for another platform: from multi-platform images, take the image for OS/ARCH[/VARIANT], for example
    /// linux/arm64.
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<Platform>,
    /// The floor key. It signs the version, so that devices can raise their floor to it. Give it twice while you
    /// replace one floor key with another.
    #[arg(long, value_name = "FILE", requires = "key")]
    floor_key: Vec<PathBuf>,
    /// First step: put the images into the store, and write the file that the signer must sign.
    #[arg(long, value_name = "FILE", help_heading = "Keys on another machine")]
    to_sign: Option<PathBuf>,
    /// First step: write the file that the floor key must sign for this version, with `openssl dgst -sha256 -sign`.
    #[arg(
        long,
        value_name = "FILE",
        requires = "to_sign",
        requires = "floor_pub",
        help_heading = "Keys on another machine"
    )]
    floor_to_sign: Option<PathBuf>,
    /// Second step: the signature over the file that --to-sign wrote.
    #[arg(long, value_name = "FILE", help_heading = "Keys on another machine")]
    signature: Option<PathBuf>,
    /// Second step: the floor key's signature, from `mosfs floor sign` or over the file that --floor-to-sign wrote.
    /// Give it twice while you replace one floor key with another.
    #[arg(long, value_name = "FILE", requires = "signature", help_heading = "Keys on another machine")]
    floor_signature: Vec<PathBuf>,
    /// The public floor key, to check --floor-signature.
    #[arg(long, value_name = "FILE", help_heading = "Keys on another machine")]
    floor_pub: Vec<PathBuf>,
    /// An earlier version or another name in the store: report how much of each target it already holds.
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    /// Also write an install medium of the system, as `mosfs iso` does. It requires --ca.
    #[arg(long, value_name = "FILE", conflicts_with = "to_sign")]
    iso: Option<PathBuf>,
    /// Number of worker threads [default: one for each processor].
    #[arg(long, short, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Pack new layers as squashfs (default) or erofs, which requires mkfs.erofs 1.8 or newer. A target's `layer` in the
    /// import manifest overrides this, --compression and --block-size. Each choice produces another digest.
    #[arg(long, value_name = "NAME", value_enum, hide_possible_values = true, help_heading = "Layers")]
    layer_format: Option<Format>,
    /// Compress new layers with zstd (smaller, the default of squashfs) or lz4 (faster to read, the default of erofs).
    #[arg(long, value_name = "NAME", value_enum, hide_possible_values = true, help_heading = "Layers")]
    compression: Option<Compression>,
    /// Size of the blocks of new squashfs layers, or of the clusters of erofs: 16K, 32K, 64K (default of erofs), 128K
    /// (default of squashfs), 256K, 512K or 1M. Small ones are faster to read at random, large ones take less space.
    #[arg(long, value_name = "SIZE", value_parser = rules::block_size, help_heading = "Layers")]
    block_size: Option<u32>,
    /// Compression level: 1 to 22 for zstd (default 15, of erofs 3), 1 to 12 for lz4 (default 12, of erofs 9). A target
    /// whose `layer` names another format or compression uses its default level.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=22), help_heading = "Layers")]
    level: Option<i32>,
    #[command(flatten)]
    kernel: KernelArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// The format of new layers.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Squashfs,
    Erofs,
}

/// What compresses new layers.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Compression {
    Zstd,
    Lz4,
}

/// Options that the import manifest contradicts.
#[derive(Debug, thiserror::Error)]
#[error(
    "--layer-format, --compression and --block-size apply to squashfs and erofs layers; the import manifest has \
     storage_type: puzzlefs"
)]
struct NoLayers;

impl Classified for NoLayers {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// A medium of a system that nothing starts.
#[derive(Debug, thiserror::Error)]
#[error(
    "--iso requires a system with a kernel of its own; --ca and a floor key make one of the kernel in the hostfs"
)]
struct NoKernel;

impl Classified for NoKernel {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// A key that is named by a URI.
#[derive(Debug, thiserror::Error)]
#[error("{}: keys in a token are not used directly; `--to-sign` writes what they have to sign", key.display())]
struct KeyInToken {
    key: PathBuf,
}

impl Classified for KeyInToken {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// Runs `mosfs build`.
pub(super) fn run(args: &Build, global: &Global) -> Result<(), AnyError> {
    if let Some(key) =
        args.key.iter().chain(&args.floor_key).find(|key| key.as_os_str().as_bytes().starts_with(b"pkcs11:"))
    {
        return Err(KeyInToken { key: key.clone() }.into());
    }
    let certificate =
        args.cert.as_deref().map(|path| read_file(path, trust::MAX_CERTIFICATE_BYTES)).transpose()?;
    let floor_pub: Vec<_> =
        args.floor_pub.iter().map(|path| P256PublicKey::read(path)).collect::<Result<_, _>>()?;
    if let Some(file) = &args.iso {
        medium::check_output(file)?;
    }
    let effort = effort(args)?;
    let progress = progress::of(global)?;
    let access = args.registry.access(global);
    let platform = args.platform.clone().unwrap_or_else(Platform::this_machine);
    let sources = Sources { access: &access, platform: &platform, boot: None };
    let base = match &args.base {
        Some(name) => Some(Base::of(&Store::open(&args.store)?, name)?),
        None => None,
    };
    let mut built = match (&args.key, &args.to_sign, &args.signature) {
        (Some(key), ..) => {
            whole(args, key, &certificate.unwrap_or_default(), &floor_pub, effort, &sources, &progress)?
        }
        (_, Some(to), _) => {
            first_half(args, to, certificate.as_deref(), &floor_pub, effort, &sources, &progress)?
        }
        (.., signature) => {
            let signature = signature.as_deref().unwrap_or(Path::new(""));
            second_half(
                args,
                signature,
                &certificate.unwrap_or_default(),
                &floor_pub,
                effort,
                &sources,
                &progress,
            )?
        }
    };
    if let Some(base) = base {
        let store = Store::open(&args.store)?;
        for (name, target) in &mut built.targets {
            if let Some(image) = built.manifest.targets.get(name) {
                target.notes.push(base.note(&store.image(&image.digest)?.manifest.layers));
            }
        }
    }
    let written = match &args.iso {
        Some(file) => Some((iso::write_built(&args.store, built.manifest.version, file, &progress)?, file)),
        None => None,
    };
    let medium = written.as_ref().map(|(written, file)| (written, file.as_path()));
    print(&built, medium, global)
}

fn effort(args: &Build) -> Result<Effort, AnyError> {
    let codec = args.compression.map(|compression| match compression {
        Compression::Zstd => Codec::Zstd,
        Compression::Lz4 => Codec::Lz4,
    });
    let kind = match args.layer_format {
        None | Some(Format::Squashfs) => ImageKind::Squashfs,
        Some(Format::Erofs) => ImageKind::Erofs,
    };
    let packing = Packing::of(kind, codec, args.level, args.block_size)?;
    Ok(Effort { threads: args.jobs.unwrap_or_else(threads), packing })
}

fn import(args: &Build) -> Result<ImportManifest, AnyError> {
    parse_import(args, &read_file(&args.file, yaml::MAX_BYTES)?)
}

fn parse_import(args: &Build, bytes: &[u8]) -> Result<ImportManifest, AnyError> {
    let import = ImportManifest::parse(&args.file, bytes)?;
    // The first half of a build signs nothing yet, so nothing can start.
    check_medium(&import, args.iso.is_some() || args.to_sign.is_some())?;
    refuse_ipv6(&import)?;
    if import.storage_type() == StorageType::Puzzlefs
        && (args.layer_format.is_some() || args.compression.is_some() || args.block_size.is_some())
    {
        return Err(NoLayers.into());
    }
    Ok(import)
}

/// With both keys at hand.
fn whole(
    args: &Build,
    key: &Path,
    certificate: &[u8],
    floor_pub: &[P256PublicKey],
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, AnyError> {
    let import = import(args)?;
    let key = SigningKey::load(key)?;
    let floor_keys: Vec<_> =
        args.floor_key.iter().map(|path| P256PrivateKey::read(path)).collect::<Result<_, _>>()?;
    let boot = args.kernel.spec(import.product, Some(certificate), &floor_keys, floor_pub)?;
    if args.iso.is_some()
        && boot.is_none()
        && !import.targets.keys().any(|name| name.as_str() == boot::TARGET)
    {
        return Err(NoKernel.into());
    }
    let sources = &Sources { boot: boot.as_ref(), ..*sources };
    let store = Store::create(&args.store)?;
    let signer = Signer { key: &key, certificate, dates: Dates::check_now(), floor_keys: &floor_keys };
    Ok(build(&import, &store, &signer, effort, sources, progress)?)
}

fn first_half(
    args: &Build,
    to: &Path,
    certificate: Option<&[u8]>,
    floor_pub: &[P256PublicKey],
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, AnyError> {
    let import = import(args)?;
    let boot = args.kernel.spec(import.product, certificate, &[], floor_pub)?;
    let sources = &Sources { boot: boot.as_ref(), ..*sources };
    let store = Store::create(&args.store)?;
    let built = halves::prepare(&import, &store, certificate, Dates::check_now(), effort, sources, progress)?;
    atomic::replace(to, &built.manifest.canonical(), 0o644, "build.message").on("write", to)?;
    if let (Some(to), Some(key)) = (&args.floor_to_sign, floor_pub.first()) {
        let message = halves::floor_message(&built.manifest, key)?;
        atomic::replace(to, &message, 0o644, "build.message").on("write", to)?;
    }
    Ok(built)
}

fn second_half(
    args: &Build,
    signature: &Path,
    certificate: &[u8],
    floor_keys: &[P256PublicKey],
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, AnyError> {
    let signature = read_file(signature, trust::MAX_SIGNATURE_BYTES)?;
    let mut floor_signatures = Vec::new();
    for path in &args.floor_signature {
        floor_signatures.push((path.clone(), read_file(path, MAX_FLOOR_SIGNATURE)?));
    }
    let made = ExternalSignatures {
        signature: &signature,
        certificate,
        dates: Dates::check_now(),
        floor_signatures: &floor_signatures,
        floor_keys,
    };
    let bytes = read_file(&args.file, reproducible::MAX_BYTES.max(yaml::MAX_BYTES))?;
    // What the first half wrote is a system manifest in its one form, and nothing else is.
    if let Ok(manifest) = SystemManifest::parse(&bytes) {
        return Ok(halves::finish_prepared(manifest, &Store::open(&args.store)?, &made)?);
    }
    let import = parse_import(args, &bytes)?;
    Ok(halves::finish(&import, &Store::create(&args.store)?, &made, effort, sources, progress)?)
}

fn print(built: &Built, medium: Option<(&Written, &Path)>, global: &Global) -> Result<(), AnyError> {
    for (name, target) in &built.targets {
        target.notes.iter().for_each(|note| output::note(format_args!("target `{name}`: {note}")));
    }
    if global.json {
        let targets: serde_json::Map<_, _> = built
            .targets
            .iter()
            .map(|(name, target)| {
                let digest = built.manifest.targets.get(name).map(|target| target.digest.to_string());
                let value = json!({ "digest": digest, "untouched": target.untouched, "notes": target.notes });
                (name.to_string(), value)
            })
            .collect();
        let mut answer = json!({
            "digest": built.digest.to_string(), "version": built.manifest.version,
            "product": built.manifest.product, "targets": targets,
        });
        if let Some((written, file)) = medium {
            answer["medium"] = iso::to_json(written, file);
        }
        return output::json(&answer);
    }
    if let Some((written, file)) = medium {
        output::note(iso::to_text(written, file));
    }
    output::line(format_args!("{}", built.digest))
}

/// One thread for each processor that this process may use.
pub(super) fn threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Reads a file that the publisher names, or one byte more than a reader of it would take.
fn read_file(path: &Path, max: usize) -> Result<Vec<u8>, AnyError> {
    Ok(read_named(path, max as u64)?)
}
