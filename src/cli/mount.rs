//! `mosfs mount`: mounts an image, verified.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;

use super::lazy::{Found, LazyArgs, Wanted};
use super::{Global, RegistryArgs, device, lazy, notify, output};
use crate::deploy::booted;
use crate::deploy::target;
use crate::digest::Digest;
use crate::error::{AnyError, IoContext};
use crate::image::oci::Platform;
use crate::mount::fuse::{FuseOptions, Spin};
use crate::mount::kernel::overlay::Upper;
use crate::mount::units::{self, Keeper, Unit};
use crate::mount::{Backend, Daemon, MountFlags, MountPlan, Request, Verification};
use crate::sys;
use crate::transport::{SourceRef, Transport};
use crate::trust::Anchor;

/// Mount a target of the current deployment, or any image of an OCI layout or a registry.
///
/// An image of a registry is mounted at once. What is read is fetched, verified and kept; the rest is fetched in the
/// background. It takes the FUSE backend.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// A target's name, `oci:DIR[:NAME]`, or `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`.
    #[arg(value_name = "TARGET|SOURCE")]
    source: String,
    /// The folder to mount at.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// Require this root hash; once for each layer, bottom layer first.
    #[arg(long, value_name = "HEX", value_parser = root_hash)]
    root_hash: Vec<Digest>,
    /// The backend of the mount: auto, dm-verity or fuse.
    #[arg(long, default_value = "auto", value_name = "NAME")]
    backend: Backend,
    /// Make the mount writable: changes to a deployed target are kept in SYSTEM/scratch/TARGET, changes to another
    /// image in memory.
    #[arg(long)]
    writable: bool,
    /// Make the mount writable, and keep the changes in this folder.
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// How to run the daemon of a FUSE mount: fork (in the background), unit (in a systemd unit, which mounts again if
    /// the daemon dies), or auto (a unit if systemd is running).
    #[arg(long, default_value = "fork", value_name = "HOW", conflicts_with = "foreground")]
    daemon: Keeper,
    /// Stay in the foreground and write the log to stderr.
    #[arg(long, short)]
    foreground: bool,
    /// Mount options as for mount(8): nosuid, nodev, noexec, allow_other and so on. For an unsigned image, nosuid and
    /// nodev are the default; suid and dev turn them off. notify_pipe=PATH writes `s` to a named pipe when the mount is
    /// ready, or `f` if it failed.
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Number of FUSE worker threads [default: 2 to 4, depending on the number of cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,
    /// Size limit of the FUSE backend's cache of decoded blocks, in MiB [default: 6].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    cache_mib: Option<u32>,
    /// Keep idle cores awake while requests come in quick succession: small files are read faster, more power is used.
    /// Requires root. auto: only in virtual machines that hand idle cores back to the host at once; always; never.
    #[arg(long, value_name = "WHEN", default_value = "auto", default_missing_value = "always")]
    #[arg(num_args = 0..=1, require_equals = true)]
    spin: Spin,
    /// Mount without verification, even layers without a root hash.
    #[arg(long)]
    unsafe_no_verity: bool,
    #[command(flatten)]
    lazy: LazyArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// A root hash as 64 hex digits, with or without `sha256:`.
fn root_hash(text: &str) -> Result<Digest, String> {
    Digest::from_hex(text.strip_prefix("sha256:").unwrap_or(text)).map_err(|error| error.to_string())
}

impl MountArgs {
    /// Whether it is an image, and not a target of a deployed system, that is to be mounted.
    pub(super) fn is_of_image(&self) -> bool {
        // A source has a scheme; a target's name cannot hold a colon.
        self.source.contains(':')
    }

    /// Whether its blobs are on another machine.
    pub(super) fn is_of_registry(&self) -> bool {
        self.source.parse().is_ok_and(|source: SourceRef| source.is_registry())
    }
}

/// Runs `mosfs mount`.
pub(super) fn run(args: &MountArgs, global: &Global) -> Result<(), AnyError> {
    if args.is_of_registry() {
        let MountArgs { source, root_hash, backend, unsafe_no_verity, lazy, registry, .. } = args;
        let wanted = Wanted {
            source,
            root_hashes: root_hash,
            backend: *backend,
            unsafe_no_verity: *unsafe_no_verity,
            lazy,
            registry,
        };
        return mount(args, global, || lazy::open(&wanted));
    }
    if args.is_of_image() {
        return run_image(args, global);
    }
    mount(args, global, || image_of_target(&args.source, global))
}

/// The image of a target of the deployment that runs.
pub(super) fn image_of_target(target: &str, global: &Global) -> Result<Found, AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let system = device::system(global);
    let booted = booted::deployment()?;
    let (store, image) = target::image(&system, booted, &anchor, target)?;
    let folder = system.scratch_dir(target);
    let scratch = Upper::Folder { upper: folder.join("upper"), work: folder.join("work") };
    Ok(Found { blobs: store.blobs(), image, scratch, pinned: None })
}

/// Runs `mosfs mount` of an image, for which nobody's signature is asked.
pub(super) fn run_image(args: &MountArgs, global: &Global) -> Result<(), AnyError> {
    mount(args, global, || image_of_layout(&args.source.parse()?))
}

/// An image of a layout.
pub(super) fn image_of_layout(source: &SourceRef) -> Result<Found, AnyError> {
    // Not `SourceRef::open`: the start program must not hold the client of registries.
    let layout = source.layout()?;
    let transport: &dyn Transport = &layout;
    let found = transport.find_image(source.name.as_deref(), &Platform::this_machine())?;
    let image = transport.image(&found)?;
    Ok(Found { blobs: layout.blobs(), image, scratch: Upper::Memory, pinned: None })
}

fn mount(
    args: &MountArgs,
    global: &Global,
    find: impl FnOnce() -> Result<Found, AnyError>,
) -> Result<(), AnyError> {
    let pipe = notify::Pipe::of(&args.options)?;
    let done = try_mount(args, global, find, &pipe);
    // In the foreground it was said when the mount was ready.
    match &done {
        Ok(()) => pipe.say_in_background(notify::SUCCESS),
        Err(_) => pipe.say(notify::FAILURE),
    }
    done
}

fn try_mount(
    args: &MountArgs,
    global: &Global,
    find: impl FnOnce() -> Result<Found, AnyError>,
    pipe: &notify::Pipe,
) -> Result<(), AnyError> {
    // Rule (docs/mounts.md, setuid and devices): what nobody signed gets neither, unless it is asked for.
    let is_signed = !args.is_of_image() && !args.unsafe_no_verity;
    let mut flags = if is_signed { MountFlags::default() } else { MountFlags::untrusted() };
    for option in args.options.iter().filter(|option| !notify::is_option(option)) {
        flags.apply(option)?;
    }
    // Whatever is opened for an image of a registry is its daemon's.
    let foreign = args.is_of_registry().then(sys::daemon::open_descriptors);
    let Found { blobs, image, scratch, pinned } = find()?;
    let verification = Verification { root_hashes: &args.root_hash, unsafe_no_verity: args.unsafe_no_verity };
    let plan = MountPlan::new(&args.source, &image, &blobs, verification)?;
    let upper = upper(args, scratch)?;
    let mut ready = || {
        if let Err(error) = sys::notify::service_is_ready() {
            output::note(format_args!("the service manager was not told: {error}"));
        }
        pipe.say_from_thread(notify::SUCCESS);
    };
    let daemon = if args.foreground {
        Daemon::Foreground { terminal: output::log(), ready: &mut ready }
    } else if upper.is_none() && units::wanted(args.daemon)? {
        Daemon::Unit(unit(args, global, &flags, pinned)?)
    } else {
        Daemon::Forked
    };
    let fuse = FuseOptions {
        threads: args.threads.map_or(0, usize::from),
        cache_mib: args.cache_mib.map(|mib| mib as usize),
        spin: args.spin,
    };
    let (target, backend) = (args.target.as_path(), args.backend);
    Request { plan: &plan, target, backend, flags, upper: upper.as_ref(), fuse, daemon, foreign }.run()?;
    Ok(())
}

/// The unit that keeps the daemon of this mount.
fn unit(
    args: &MountArgs,
    global: &Global,
    flags: &MountFlags,
    pinned: Option<String>,
) -> Result<Unit, AnyError> {
    let absolute = |path: &Path| std::path::absolute(path).on("find", path);
    let target = args.target.canonicalize().on("find", &args.target)?;
    let (system, config) = (absolute(&global.system)?, absolute(&global.config)?);
    let (source, layout) = if let Some(pinned) = pinned {
        (pinned, absolute(&args.lazy.store.clone().unwrap_or_else(lazy::default_store))?)
    } else if args.is_of_image() {
        let source: SourceRef = args.source.parse()?;
        let layout = absolute(Path::new(&source.location))?;
        (SourceRef::oci(&layout, source.name.as_deref()).to_string(), layout)
    } else {
        (args.source.clone(), system.clone())
    };
    let mut arguments = foreground_arguments(&source, &target, &system, &config, flags);
    // Before the source and the folder, which stand behind `--`.
    let mut option = |name: &str, value: Option<String>| {
        arguments.insert(1, value.map_or(name.into(), |value| format!("{name}={value}").into()));
    };
    args.root_hash.iter().rev().for_each(|hash| option("--root-hash", Some(hash.hex())));
    args.threads.iter().for_each(|threads| option("--threads", Some(threads.to_string())));
    args.cache_mib.iter().for_each(|mib| option("--cache-mib", Some(mib.to_string())));
    option("--spin", Some(args.spin.name().to_string()));
    if args.unsafe_no_verity {
        option("--unsafe-no-verity", None);
    }
    if args.is_of_registry() {
        option("--store", Some(layout.display().to_string()));
        args.registry.arguments().into_iter().for_each(|(name, value)| option(name, value));
        if args.lazy.no_fill {
            option("--no-fill", None);
        }
    }
    Ok(Unit { source, target, needs: vec![layout], arguments })
}

/// The arguments of `mosfs` that mount through FUSE in the foreground. All paths are absolute.
pub(super) fn foreground_arguments(
    source: &str,
    target: &Path,
    system: &Path,
    config: &Path,
    flags: &MountFlags,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["mount".into(), "--foreground".into(), "--backend=fuse".into()];
    for (name, path) in [("--system", system), ("--config", config)] {
        arguments.push(name.into());
        arguments.push(path.into());
    }
    // Written out, as what is not said depends on who signed it.
    for (is_set, yes, no) in
        [(flags.nosuid, "nosuid", "suid"), (flags.nodev, "nodev", "dev"), (flags.noexec, "noexec", "exec")]
    {
        arguments.push(format!("-o{}", if is_set { yes } else { no }).into());
    }
    if flags.allow_other {
        arguments.push("-oallow_other".into());
    }
    arguments.extend(["--".into(), source.into(), target.into()]);
    arguments
}

/// Where the writes go, if there are to be any.
fn upper(args: &MountArgs, scratch: Upper) -> Result<Option<Upper>, AnyError> {
    let Some(upper) = &args.upper else { return Ok(args.writable.then_some(scratch)) };
    // overlayfs wants its working folder on the same file system, and not inside.
    let upper = std::path::absolute(upper).on("find", upper)?;
    let mut work = OsString::from(".");
    work.push(upper.file_name().unwrap_or_default());
    work.push(".mosfs-work");
    let work = upper.with_file_name(work);
    Ok(Some(Upper::Folder { upper, work }))
}
