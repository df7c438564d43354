//! `mosfs store`: what a store holds.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Global, device, output};
use crate::error::AnyError;
use crate::sorting;
use crate::store::Store;

/// Examine a store.
#[derive(Debug, Args)]
pub(super) struct StoreCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Stats(StatsArgs),
}

/// Show how many bytes each target uses, and how many it shares with its other versions and other targets.
///
/// Each blob counts once: a layer of squashfs or erofs, or a chunk of PuzzleFS.
#[derive(Debug, Args)]
struct StatsArgs {
    /// Look at this store instead of the deployed system's.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

/// Runs `mosfs store`.
pub(super) fn run(args: &StoreCommand, global: &Global) -> Result<(), AnyError> {
    match &args.action {
        Action::Stats(args) => stats(args, global),
    }
}

fn stats(args: &StatsArgs, global: &Global) -> Result<(), AnyError> {
    let store = match &args.store {
        Some(dir) => Store::open(dir)?,
        None => Store::open(&device::system(global).store_dir())?,
    };
    let stats = store.stats()?;
    if global.json {
        return output::json(&serde_json::json!(stats));
    }
    for target in &stats.targets {
        let formats = sorting::set(target.images.iter().flat_map(|image| image.formats.iter().copied()));
        let formats: Vec<_> = formats.into_iter().collect();
        output::line(format_args!(
            "{}: {} images ({}): {} bytes, stored in {}; versions share {}, other targets {}",
            target.target,
            target.images.len(),
            formats.join(", "),
            target.sum_bytes,
            target.stored_bytes,
            target.saved_bytes,
            target.shared_with_targets_bytes,
        ))?;
    }
    output::line(format_args!(
        "{} images: {} bytes, stored in {}; sharing saves {}; {} bytes belong to no image",
        stats.images, stats.sum_bytes, stats.stored_bytes, stats.saved_bytes, stats.other_bytes
    ))
}
