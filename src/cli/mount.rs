//! `mosfs mount`: mounts an image, verified.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Args;

use super::lazy::{LazyArgs, OpenedImage, RequestedImage};
use super::lazy_target::LazyTargets;
use super::plain::{self, FileArgs, FileOptions, MountSource};
use super::{Global, RegistryArgs, device, lazy, notify, output};
use crate::deploy::booted;
use crate::deploy::target;
use crate::digest::Digest;
use crate::error::{AnyError, IoContext};
use crate::image::oci::Platform;
use crate::image::plain::PlainFile;
use crate::mount::fuse::{CACHE_MIB, CHUNKS_CACHE_MIB, FuseOptions, Spin, THREADS};
use crate::mount::kernel::overlay::Upper;
use crate::mount::units::{self, Keeper, Unit};
use crate::mount::{Backend, Daemon, IdShift, MountFlags, MountPlan, Request, Verification};
use crate::sys;
use crate::transport::{SourceRef, Transport, TransportError};
use crate::trust::Anchor;

/// Mount a target of the current deployment, an image of an OCI layout or a registry, or a file system image in a file.
///
/// An image of a registry is mounted at once. What is read is fetched, verified and kept; the rest is fetched in the
/// background. It takes the FUSE backend.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// A target's name, `oci:DIR[:NAME]`, `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`, or the path of a squashfs or erofs
    /// image.
    #[arg(value_name = "TARGET|SOURCE|FILE")]
    source: OsString,
    /// The folder to mount at.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// Require this root hash; once for each layer, bottom layer first.
    #[arg(long, value_name = "HEX", value_parser = root_hash)]
    root_hash: Vec<Digest>,
    #[command(flatten)]
    file: FileArgs,
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
    /// ready, or `f` if it failed. For a plain file also uid=N and gid=N (the owner and group of all files), subdir=PATH
    /// (the root of the mount) and timeout=SECONDS (unmount when idle).
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    #[arg(help = format!("Number of FUSE worker threads [default: {} to {}, depending on the number of cores]", THREADS.start(), THREADS.end()))]
    threads: Option<u16>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    #[arg(help = format!("Size limit of the FUSE backend's cache of decoded blocks, in MiB [default: {CACHE_MIB}; of PuzzleFS {CHUNKS_CACHE_MIB}]"))]
    cache_mib: Option<u32>,
    /// Show user and group ids 0 to COUNT-1 as FIRST to FIRST+COUNT-1, for a user namespace with that range; files of other
    /// ids belong to nobody. Uses the FUSE backend.
    #[arg(long, value_name = "FIRST:COUNT")]
    shift_ids: Option<IdShift>,
    /// Keep idle cores awake while requests come in quick succession: small files are read faster, more power is used.
    /// Requires root. auto: only in virtual machines that hand idle cores back to the host at once; always; never.
    #[arg(long, value_name = "WHEN", default_value = "auto", default_missing_value = "always")]
    #[arg(num_args = 0..=1, require_equals = true)]
    spin: Spin,
    /// Mount without verification, even layers without a root hash.
    #[arg(long)]
    unsafe_no_verity: bool,
    /// Fetch what is missing of a target while it is read, from the registry that its system was installed from. An
    /// image of a registry is always mounted in this way.
    #[arg(long = "lazy")]
    lazy_target: bool,
    /// The registry for `--lazy`, `docker://HOST[:PORT]/PREFIX`, if the target's system came from elsewhere.
    #[arg(long, value_name = "SOURCE", requires = "lazy_target")]
    from: Option<SourceRef>,
    #[command(flatten)]
    lazy: LazyArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// A root hash as 64 hex digits, in either case, with or without `sha256:`.
pub(super) fn root_hash(text: &str) -> Result<Digest, String> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    Digest::from_hex(&hex.to_ascii_lowercase()).map_err(|_| {
        let digits = hex.bytes().take_while(u8::is_ascii_hexdigit).count();
        let more = if digits == hex.len() { "" } else { " and more" };
        format!("expected 64 hex digits (SHA-256), found {digits}{more}")
    })
}

impl MountArgs {
    /// What is to be mounted.
    pub(super) fn asked(&self) -> MountSource<'_> {
        self.file.asked(&self.source, !self.root_hash.is_empty() || self.unsafe_no_verity)
    }

    /// The options of `-o`, each where it belongs.
    fn options(&self, flags: &mut MountFlags) -> Result<FileOptions, AnyError> {
        let mut of_file = FileOptions::default();
        for option in self.options.iter().filter(|option| !notify::is_option(option)) {
            if !of_file.take(option)? {
                flags.apply(option)?;
            }
        }
        Ok(of_file)
    }
}

/// Runs `mosfs mount`.
pub(super) fn run(args: &MountArgs, global: &Global) -> Result<(), AnyError> {
    match args.asked() {
        MountSource::Target(name) => mount(args, global, |verification, options| {
            args.file.refuse(options)?;
            let found = match args.lazy_target {
                true => lazy_image_of_target(args, name, global),
                false => image_of_target(name, global),
            };
            ToMount::image(name, found.map_err(|error| plain::target_or_file(name, error))?, verification)
        }),
        MountSource::Registry(source) => mount(args, global, |verification, options| {
            args.file.refuse(options)?;
            let wanted = RequestedImage {
                source,
                root_hashes: &args.root_hash,
                backend: args.backend,
                unsafe_no_verity: args.unsafe_no_verity,
                lazy: &args.lazy,
                registry: &args.registry,
            };
            ToMount::image(source, lazy::open(&wanted)?, verification)
        }),
        MountSource::Image(source) => mount_image(args, source, global),
        MountSource::File(path) => mount_file(args, path, global),
    }
}

/// The image of a target of the deployment that runs.
pub(super) fn image_of_target(target: &str, global: &Global) -> Result<OpenedImage, AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let system = device::system(global);
    let booted = booted::deployment()?;
    let (store, image) = target::image(&system, booted, &anchor, target)?;
    let folder = system.scratch_dir(target);
    let scratch = Upper::Folder { upper: folder.join("upper"), work: folder.join("work") };
    Ok(OpenedImage { blobs: store.blobs(), image, scratch, pinned: None })
}

/// The same, for a target whose blobs are not all in the store.
fn lazy_image_of_target(args: &MountArgs, name: &str, global: &Global) -> Result<OpenedImage, AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let system = device::system(global);
    let (id, verified) = target::running(&system, booted::deployment()?, &anchor)?;
    let signed = target::find(&id, &verified, name)?;
    let store = system.store()?;
    let root = std::path::absolute(system.root()).on("find", system.root())?;
    let targets = LazyTargets::new(&root, args.from.as_ref(), &args.registry);
    let image = targets.image(&store, &id, name, signed)?;
    let blobs = targets.blobs(&id, name, &image, args.backend, !args.lazy.no_fill)?;
    let folder = system.scratch_dir(name);
    let scratch = Upper::Folder { upper: folder.join("upper"), work: folder.join("work") };
    Ok(OpenedImage { blobs: blobs.unwrap_or_else(|| store.blobs()), image, scratch, pinned: None })
}

/// Rule: what was asked for is used or refused. All of such an image or file is here.
fn refuse_lazy(args: &MountArgs) -> Result<(), TransportError> {
    let why = "expected a target, or an image of a registry, for --lazy";
    match args.lazy_target {
        true => Err(TransportError::BadSource { found: args.source.to_string_lossy().into_owned(), why }),
        false => Ok(()),
    }
}

/// Runs `mosfs mount` of an image of a layout, which requires no signature.
pub(super) fn mount_image(args: &MountArgs, source: &str, global: &Global) -> Result<(), AnyError> {
    refuse_lazy(args)?;
    mount(args, global, |verification, options| {
        args.file.refuse(options)?;
        ToMount::image(source, image_of_layout(&source.parse()?)?, verification)
    })
}

/// Runs `mosfs mount` of a plain file.
pub(super) fn mount_file(args: &MountArgs, path: &Path, global: &Global) -> Result<(), AnyError> {
    refuse_lazy(args)?;
    mount(args, global, |_, options| {
        let file = args.file.file(path, &args.root_hash, args.unsafe_no_verity)?;
        // Records and lists of mounts outlive this working folder.
        let absolute = std::path::absolute(path).on("find", path)?;
        let plan = MountPlan::of_file(PlainFile { path: absolute, ..file }, options.shown.clone());
        Ok(ToMount { plan, scratch: Upper::Memory, pinned: None })
    })
}

/// An image of a layout.
pub(super) fn image_of_layout(source: &SourceRef) -> Result<OpenedImage, AnyError> {
    // Not `SourceRef::open`: the start program must not hold the client of registries.
    let layout = source.layout()?;
    let transport: &dyn Transport = &layout;
    let found = transport.find_image(source.name.as_deref(), &Platform::this_machine())?;
    let (image, blobs) = transport.image_to_open(&found, layout.blobs())?;
    Ok(OpenedImage { blobs, image, scratch: Upper::Memory, pinned: None })
}

/// What is to be mounted.
struct ToMount {
    plan: MountPlan,
    /// Where the writes go for `--writable`.
    scratch: Upper,
    /// The image of a registry by its digest, for a daemon that mounts it again.
    pinned: Option<String>,
}

impl ToMount {
    fn image(source: &str, found: OpenedImage, verification: Verification<'_>) -> Result<Self, AnyError> {
        let OpenedImage { blobs, image, scratch, pinned } = found;
        let plan = MountPlan::new(source, &image, &blobs, verification)?;
        Ok(Self { plan, scratch, pinned })
    }
}

/// Finds what is to be mounted.
type Find<'a> = &'a dyn Fn(Verification<'_>, &FileOptions) -> Result<ToMount, AnyError>;

fn mount(
    args: &MountArgs,
    global: &Global,
    find: impl Fn(Verification<'_>, &FileOptions) -> Result<ToMount, AnyError>,
) -> Result<(), AnyError> {
    let pipe = notify::Pipe::of(&args.options)?;
    let done = try_mount(args, global, &find, &pipe);
    // In the foreground it was said when the mount was ready.
    match &done {
        Ok(()) => pipe.say_in_background(notify::SUCCESS),
        Err(_) => pipe.say(notify::FAILURE),
    }
    done
}

fn try_mount(args: &MountArgs, global: &Global, find: Find<'_>, pipe: &notify::Pipe) -> Result<(), AnyError> {
    // Rule (docs/mounts.md, setuid and devices): what nobody signed gets neither, unless it is asked for.
    let is_signed = matches!(args.asked(), MountSource::Target(_)) && !args.unsafe_no_verity;
    let mut flags = if is_signed { MountFlags::default() } else { MountFlags::untrusted() };
    let options = args.options(&mut flags)?;
    // Whatever is opened for the image, now or by a thread that reads ahead, is its daemon's.
    let foreign = Some(sys::daemon::open_descriptors());
    // Before that thread, which would otherwise have an arena of its own.
    sys::daemon::lean_allocator();
    let verification = Verification { root_hashes: &args.root_hash, unsafe_no_verity: args.unsafe_no_verity };
    let ToMount { plan, scratch, pinned } = find(verification, &options)?;
    let upper = upper(args, scratch)?;
    options.check_with_upper(upper.is_some())?;
    let mut ready = || {
        if let Err(error) = sys::notify::service_is_ready() {
            output::note(format_args!("the service manager was not notified: {error}"));
        }
        pipe.say_from_thread(notify::SUCCESS);
    };
    let daemon = if args.foreground {
        Daemon::Foreground { terminal: output::log(), ready: &mut ready }
    } else if upper.is_none() && units::wanted(args.daemon)? {
        Daemon::Unit(unit(args, global, &flags, &options, pinned)?)
    } else {
        Daemon::Forked
    };
    let fuse = FuseOptions {
        threads: args.threads.map_or(0, usize::from),
        cache_mib: args.cache_mib.map(|mib| mib as usize),
        spin: args.spin,
        shift: args.shift_ids,
        idle: options.idle,
        ..FuseOptions::default()
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
    options: &FileOptions,
    pinned: Option<String>,
) -> Result<Unit, AnyError> {
    let absolute = |path: &Path| std::path::absolute(path).on("find", path);
    let target = args.target.canonicalize().on("find", &args.target)?;
    let (system, config) = (absolute(&global.system)?, absolute(&global.config)?);
    let store = absolute(&args.lazy.store.clone().unwrap_or_else(lazy::default_store))?;
    let folder = |file: &Path| file.parent().unwrap_or(Path::new("/")).to_path_buf();
    let (source, needs): (OsString, _) = match args.asked() {
        MountSource::Target(name) => (name.into(), vec![system.clone()]),
        MountSource::Image(text) => {
            let source: SourceRef = text.parse()?;
            let layout = absolute(Path::new(&source.location))?;
            (SourceRef::oci(&layout, source.name.as_deref()).to_string().into(), vec![layout])
        }
        MountSource::Registry(text) => (pinned.unwrap_or_else(|| text.into()).into(), vec![store.clone()]),
        MountSource::File(path) => {
            let path = absolute(path)?;
            let hash_file = args.file.hash_file.as_deref().map(absolute).transpose()?;
            let needs = [folder(&path)].into_iter().chain(hash_file.as_deref().map(folder)).collect();
            (path.into(), needs)
        }
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
    args.shift_ids.iter().for_each(|shift| option("--shift-ids", Some(shift.to_string())));
    if args.unsafe_no_verity {
        option("--unsafe-no-verity", None);
    }
    if args.lazy_target {
        let lazy = LazyTargets::new(&global.system, args.from.as_ref(), &args.registry);
        lazy.arguments().into_iter().rev().for_each(|word| arguments.insert(1, word));
    } else if matches!(args.asked(), MountSource::Registry(_)) {
        option("--store", Some(store.display().to_string()));
        args.registry.arguments().into_iter().for_each(|(name, value)| option(name, value));
        if args.lazy.no_fill {
            option("--no-fill", None);
        }
    }
    let of_file =
        args.file.to_arguments().on("find", &args.source)?.into_iter().chain(options.to_arguments());
    arguments.splice(1..1, of_file);
    Ok(Unit { source: source.to_string_lossy().into_owned(), target, needs, arguments })
}

/// The arguments of `mosfs` that mount through FUSE in the foreground. All paths are absolute.
pub(super) fn foreground_arguments(
    source: &OsStr,
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
    // overlayfs requires its working folder on the same file system, and outside of the upper folder.
    let upper = std::path::absolute(upper).on("find", upper)?;
    let mut work = OsString::from(".");
    work.push(upper.file_name().unwrap_or_default());
    work.push(".mosfs-work");
    let work = upper.with_file_name(work);
    Ok(Some(Upper::Folder { upper, work }))
}
