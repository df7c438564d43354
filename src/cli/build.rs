//! `mosfs build`: an import manifest into a signed system in a store.

use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Global, output, progress};
use crate::convert::{DEFAULT_LEVEL, Effort};
use crate::error::{AnyError, IoContext, IoError};
use crate::floor;
use crate::manifest::{ImportManifest, yaml};
use crate::publish::build::{Signer, build};
use crate::store::Store;
use crate::trust::{self, Dates, PrivateKey};

/// Fetches and converts the images of an import manifest, and signs the system that they make.
///
/// Prints the digest of the system manifest. The same input gives the same digest.
#[derive(Debug, Args)]
pub struct Build {
    /// The import manifest.
    file: PathBuf,
    /// The store; it is made where there is none.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The signer's private key.
    #[arg(long)]
    key: PathBuf,
    /// The signer's certificate, with those that lead from it to the CA.
    #[arg(long)]
    cert: PathBuf,
    /// The floor key: signs the version, so that devices can raise their floor to it.
    #[arg(long, value_name = "KEY")]
    floor_key: Option<PathBuf>,
    /// An earlier version, or another name of the store: prints how much of each target it has already.
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    /// How many threads work at a time; without it, one for each processor.
    #[arg(long, short, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// How hard to compress, as zstd counts: another level gives another digest.
    #[arg(long, value_name = "1-22", default_value_t = DEFAULT_LEVEL, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
}

/// Runs `mosfs build`.
pub fn run(args: &Build, global: &Global) -> Result<(), AnyError> {
    let import = ImportManifest::parse(&args.file, &read(&args.file, yaml::MAX_BYTES)?)?;
    let key = PrivateKey::load(&args.key)?;
    let certificate = read(&args.cert, trust::MAX_CERTIFICATE_BYTES)?;
    let floor_key = args.floor_key.as_deref().map(floor::PrivateKey::read).transpose()?;
    let store = Store::create(&args.store)?;
    let signer = Signer {
        key: &key,
        certificate: &certificate,
        dates: Dates::check_now(),
        floor_key: floor_key.as_ref(),
    };
    let effort = Effort { threads: args.jobs.unwrap_or_else(threads), level: args.level };
    let built = build(&import, &store, &signer, effort, args.base.as_deref(), &progress::of(global)?)?;
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
        return output::json(&json!({
            "digest": built.digest.to_string(), "version": built.manifest.version,
            "product": built.manifest.product, "targets": targets,
        }));
    }
    output::line(format_args!("{}", built.digest))
}

/// One thread for each processor that this process may use.
pub fn threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Reads a file, or one byte more than a reader of it would take.
fn read(path: &std::path::Path, max: usize) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::new();
    let file = File::open(path).on("open", path)?;
    file.take(max as u64 + 1).read_to_end(&mut bytes).on("read", path)?;
    Ok(bytes)
}
