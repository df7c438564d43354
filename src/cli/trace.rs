//! `mosfs trace`: records what a program reads of an image.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex};

use clap::Args;

use super::lazy::{LazyArgs, OpenedImage, RequestedImage};
use super::{Global, RegistryArgs, lazy, mount, output};
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::image::oci::{Descriptor, MANIFEST};
use crate::mount::fuse::FuseOptions;
use crate::mount::{self as mounts, Backend, Daemon, MountFlags, MountPlan, Request, Verification};
use crate::progress::Progress;
use crate::store::Store;
use crate::store::lazy::{LIST_TYPE, ReadList, Recorder};
use crate::sys::{self, file, locks, process};
use crate::transport::registry::Registry;
use crate::transport::{SourceRef, Transport, TransportError};

/// Record what a program reads of an image.
///
/// Mounts the image at a folder of its own, runs COMMAND there, and writes a list of what was read, in order. `mosfs mount
/// docker://…` fetches first what such a list names. A list is a hint: it is not signed and need not be.
#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// A target's name, `oci:DIR[:NAME]`, or `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`.
    #[arg(value_name = "TARGET|SOURCE")]
    source: String,
    /// Write the list to this file [default: stdout].
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Push the list to the image's registry, where `mosfs mount` finds it.
    #[arg(long)]
    push: bool,
    /// Run COMMAND with the image as its root folder, rather than as its working folder; takes root.
    #[arg(long)]
    chroot: bool,
    /// Keep what is fetched in this store [default: /var/cache/mosfs; for users, ~/.cache/mosfs].
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    #[command(flatten)]
    registry: RegistryArgs,
    /// The program to run, and its arguments.
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<OsString>,
}

/// Why nothing was recorded.
#[derive(Debug, thiserror::Error)]
enum TraceError {
    #[error("cannot run {}: {source}", program.to_string_lossy())]
    Run { program: OsString, source: std::io::Error },
    #[error("{} ended with {status}; no list is written", program.to_string_lossy())]
    Failed { program: OsString, status: ExitStatus },
}

impl Classified for TraceError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

/// Runs `mosfs trace`.
pub(super) fn run(args: &TraceArgs, global: &Global) -> Result<(), AnyError> {
    let source: Option<SourceRef> = args.source.contains(':').then(|| args.source.parse()).transpose()?;
    let registry = source.as_ref().filter(|source| source.is_registry());
    if args.push && registry.is_none() {
        let why = "expected the image of a registry, docker://HOST[:PORT]/NAME[:TAG], to push its list to";
        return Err(TransportError::BadSource { found: args.source.clone(), why }.into());
    }
    let OpenedImage { blobs, image, .. } = match &source {
        Some(source) if source.is_registry() => {
            let lazy = LazyArgs { store: args.store.clone(), no_fill: true, list: None };
            lazy::open(&RequestedImage {
                source: &args.source,
                root_hashes: &[],
                backend: Backend::Fuse,
                unsafe_no_verity: false,
                lazy: &lazy,
                registry: &args.registry,
            })?
        }
        Some(source) => mount::image_of_layout(source)?,
        None => mount::image_of_target(&args.source, global)?,
    };
    let recorder = Arc::new(Recorder::new(blobs));
    let plan = MountPlan::new(&args.source, &image, &(Arc::clone(&recorder) as _), Verification::default())?;
    run_in_mount(args, &plan)?;
    let list = recorder.list();
    match &args.output {
        Some(path) => sys::atomic::replace(path, &list.to_bytes(), 0o644, "trace.list").on("write", path)?,
        None if args.push => {}
        None => output::line(String::from_utf8_lossy(&list.to_bytes()))?,
    }
    if let (true, Some(source)) = (args.push, registry) {
        let subject = Descriptor::new(
            image.manifest.media_type.as_deref().unwrap_or(MANIFEST),
            image.digest,
            image.size,
        );
        push(args, source, &subject, &list)?;
    }
    output::note(format_args!("{} reads of {} bytes in all", list.reads().count(), list.bytes()));
    Ok(())
}

/// Mounts the plan, runs the command in it, and unmounts it.
fn run_in_mount(args: &TraceArgs, plan: &MountPlan) -> Result<(), AnyError> {
    let at = std::env::temp_dir().join(format!("mosfs-trace-{}", std::process::id()));
    file::create_folder(&at, 0o700)?;
    let at = at.canonicalize().on("find", &at)?;
    let program = args.command.first().cloned().unwrap_or_default();
    let ended: Arc<Mutex<Option<std::io::Result<ExitStatus>>>> = Arc::default();
    let mut ready = || {
        let mut command = match args.chroot {
            true => {
                let mut command = Command::new("chroot");
                command.arg(&at).args(&args.command);
                command
            }
            false => {
                let mut command = Command::new(&program);
                command.args(args.command.iter().skip(1)).current_dir(&at);
                command
            }
        };
        // What the program prints is not the list.
        command.stdout(output::of_child());
        process::with_whole_dumps(&mut command);
        let (ended, at) = (Arc::clone(&ended), at.clone());
        std::thread::spawn(move || {
            let status = command.status();
            *locks::lock(&ended) = Some(status);
            if mounts::unmount(&at, false).is_err()
                && let Err(error) = mounts::unmount(&at, true)
            {
                log::error!("{error}");
            }
        });
    };
    let request = Request {
        backend: Backend::Fuse,
        flags: MountFlags::untrusted(),
        fuse: FuseOptions::default(),
        daemon: Daemon::Foreground { terminal: output::log(), ready: &mut ready },
        ..Request::new(plan, &at)
    };
    let done = request.run();
    let _ = fs::remove_dir(&at);
    done?;
    match locks::lock(&ended).take() {
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => Err(TraceError::Failed { program, status }.into()),
        Some(Err(source)) => Err(TraceError::Run { program, source }.into()),
        // Somebody else has unmounted it, and what was read until then is the list.
        None => Ok(()),
    }
}

/// Puts a list into the repository of its image, as an artifact about it.
fn push(args: &TraceArgs, source: &SourceRef, subject: &Descriptor, list: &ReadList) -> Result<(), AnyError> {
    let to = Registry::open(&source.location, &args.registry.quiet_access())?;
    let store = Store::create(&args.store.clone().unwrap_or_else(lazy::default_store))?;
    let writer = store.writer()?;
    let artifact = writer.put_artifact(LIST_TYPE, &list.to_bytes(), Some(subject))?;
    let transport: &dyn Transport = store.transport();
    let manifest = transport.manifest(&artifact)?;
    let quiet = Progress::silent().task("push", "", None);
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let (file, _) = store.transport().open_blob(&blob.digest)?;
        to.put_blob(blob, &file, None, &quiet)?;
    }
    let bytes = manifest.to_bytes();
    let understood = to.put_document(&artifact.digest.to_string(), MANIFEST, &bytes)?;
    // A tag of its own: a registry's garbage collection does not know the list of referrers.
    to.put_document(&format!("{}.list", subject.digest.hex()), MANIFEST, &bytes)?;
    if !understood {
        to.put_referrers(&subject.digest, std::slice::from_ref(&artifact))?;
    }
    Ok(())
}
