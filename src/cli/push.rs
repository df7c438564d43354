//! `mosfs push`: a signed system from a store to a registry. `mosfs pull`: the other way.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Args;
use serde_json::json;

use super::{Global, RegistryArgs, output, progress};
use crate::deploy::{pull, push};
use crate::error::AnyError;
use crate::image::oci::Platform;
use crate::store::Store;
use crate::sys::daemon::Signals;
use crate::sys::process;
use crate::transport::registry::Registry;
use crate::transport::{SourceRef, TransportError};

/// Push a signed system, with its images, to a registry.
///
/// Uploads only what the registry lacks. The version becomes visible after everything else is there.
#[derive(Debug, Args)]
pub(super) struct PushArgs {
    /// The store that holds the system.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The destination, `docker://HOST[:PORT]/PREFIX[:VERSION]`; without a version, the highest in the store.
    #[arg(value_name = "DESTINATION")]
    to: SourceRef,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Pull a signed system, with its images, into a store.
///
/// Downloads only what the store lacks, and resumes an interrupted pull.
#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// The source, `docker://HOST[:PORT]/PREFIX[:VERSION]` or `oci:DIR[:NAME]`; without a version or name, the highest
    /// version there.
    source: SourceRef,
    /// The store; created if it does not exist.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Pull the single, unsigned image `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`.
    #[arg(long)]
    image: bool,
    /// Name of the image in the store [default: NAME:TAG].
    #[arg(long, value_name = "NAME", requires = "image")]
    name: Option<String>,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Runs `mosfs push`.
pub(super) fn push(args: &PushArgs, global: &Global) -> Result<(), AnyError> {
    if !args.to.is_registry() {
        return Err(TransportError::BadSource {
            found: args.to.to_string(),
            why: "expected a registry, docker://HOST[:PORT]/PREFIX[:VERSION]",
        }
        .into());
    }
    let store = Store::open(&args.store)?;
    // Before anything starts a thread. Without it, the registry clears up after an interrupted push in its own time.
    let signals = Signals::block_not_ignored();
    let to = Arc::new(Registry::open(&args.to.location, &args.registry.access(global))?);
    let ending = Arc::new(AtomicBool::new(false));
    if let Ok(signals) = signals {
        cancel_when_ended(signals, Arc::clone(&to), Arc::clone(&ending));
    }
    let pushed = push::system(&store, args.to.name.as_deref(), &to, &progress::of(global)?);
    // What fails because it was cancelled is no failure of its own: the signal ends the command.
    while pushed.is_err() && ending.load(Ordering::SeqCst) {
        thread::park();
    }
    let pushed = pushed?;
    output::answer(
        global,
        || {
            json!({
                "version": pushed.version, "digest": pushed.digest, "sent": pushed.sent,
                "mounted": pushed.mounted, "present": pushed.present,
            })
        },
        || {
            format!(
                "pushed version {} ({}): {} blobs sent, {} mounted, {} were there",
                pushed.version, pushed.digest, pushed.sent, pushed.mounted, pushed.present
            )
        },
    )
}

/// On a signal that ends the command, cancels the uploads that are under way first; on a second one, ends at once.
fn cancel_when_ended(signals: Signals, to: Arc<Registry>, ending: Arc<AtomicBool>) {
    thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        ending.store(true, Ordering::SeqCst);
        thread::spawn(move || {
            to.cancel_uploads();
            process::end_by(signal);
        });
        if let Ok(signal) = signals.wait() {
            process::end_by(signal);
        }
    });
}

/// Runs `mosfs pull`.
pub(super) fn pull(args: &PullArgs, global: &Global) -> Result<(), AnyError> {
    let from = args.source.open(&args.registry.access(global))?;
    let store = Store::create(&args.store)?;
    let progress = progress::of(global)?;
    let name = args.source.name.as_deref();
    let pulled = match args.image {
        true => {
            let as_name = args.name.clone().unwrap_or_else(|| args.source.image_name());
            pull::image(from.as_ref(), name, &Platform::this_machine(), &as_name, &store, &progress)?
        }
        false => pull::system(from.as_ref(), name, &store, &progress)?,
    };
    output::answer(
        global,
        || json!({ "digest": pulled.digest, "names": pulled.names, "fetched": pulled.fetched }),
        || format!("pulled {}: {} blobs fetched", pulled.digest, pulled.fetched),
    )
}
