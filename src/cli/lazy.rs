//! Images whose blobs are fetched while they are mounted: `mosfs mount docker://…`, `--lazy`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::RegistryArgs;
use crate::digest::Digest;
use crate::error::{AnyError, IoContext};
use crate::image::blobs::Blobs;
use crate::image::oci::{CONFIG, Descriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage, Platform};
use crate::mount::kernel::overlay::Upper;
use crate::mount::{Backend, MountError, MountPlan, Verification, backend};
use crate::store::Store;
use crate::store::lazy::{LIST_TYPE, LazyImage, LazyOptions, MAX_LIST_BYTES, ReadList};
use crate::sys;
use crate::sys::file;
use crate::transport::{Access, SourceRef, Transport, TransportError};

/// Options of mounts whose image is fetched while it is used.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Images of a registry")]
pub(super) struct LazyArgs {
    /// Keep what is fetched in this store [default: /var/cache/mosfs; for users, ~/.cache/mosfs].
    #[arg(long, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    /// Fetch only what is read, and not the rest in the background.
    #[arg(long)]
    pub(super) no_fill: bool,
    /// Fetch first what this list names, which `mosfs trace` has recorded [default: the registry's, if it has one].
    #[arg(long, value_name = "FILE")]
    pub(super) list: Option<PathBuf>,
}

/// What is to be mounted.
pub(super) struct OpenedImage {
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) image: OciImage,
    /// Where the writes go for `--writable`.
    pub(super) scratch: Upper,
    /// The image of a registry by its digest, for a daemon that mounts it again.
    pub(super) pinned: Option<String>,
}

/// An image of a registry that is to be mounted.
pub(super) struct RequestedImage<'a> {
    pub(super) source: &'a str,
    /// The root hashes that are required, one for each layer, or none.
    pub(super) root_hashes: &'a [Digest],
    pub(super) backend: Backend,
    pub(super) unsafe_no_verity: bool,
    pub(super) lazy: &'a LazyArgs,
    pub(super) registry: &'a RegistryArgs,
}

/// A server that is silent for this part of the time that a reader waits is asked again.
const SILENCE: u32 = 6;

/// How a registry is reached for a reader that waits: a silent server is asked again, several times, before the
/// reader's time is over.
pub(super) fn access(access: &Access) -> Access {
    let silence = (access.patience / SILENCE).max(Duration::from_secs(1));
    Access { patience: silence.min(access.patience), ..access.clone() }
}

/// Where `mosfs mount docker://…` keeps what it fetches.
pub(super) fn default_store() -> PathBuf {
    if sys::daemon::effective_ids().0 == 0 {
        return "/var/cache/mosfs".into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    cache.or_else(home).unwrap_or_else(|| "/tmp".into()).join("mosfs")
}

/// Opens an image of a registry. What its registry said of a digest before is not asked again.
pub(super) fn open(args: &RequestedImage<'_>) -> Result<OpenedImage, AnyError> {
    let source: SourceRef = args.source.parse()?;
    let patience = args.registry.quiet_access();
    let from = source.open(&access(&patience))?;
    // Absolute: the daemon leaves this working folder.
    let folder = args.lazy.store.clone().unwrap_or_else(default_store);
    let store = Store::create(&std::path::absolute(&folder).on("find", &folder)?)?;
    let (found, image) = find(&store, from.as_ref(), &source)?;
    // What cannot be verified is refused before any of it is fetched. Rule (docs/design.md, unverified mounts): a
    // server's word is never enough, so `--unsafe-no-verity` does not reach here.
    if args.unsafe_no_verity {
        let why = "an image is verified while it is fetched; pull it first to mount it without".into();
        return Err(MountError::NoBackend { backend: backend::FUSE, why }.into());
    }
    let verification = Verification { root_hashes: args.root_hashes, unsafe_no_verity: false };
    MountPlan::new(args.source, &image, &store.blobs(), verification)?;
    let lacking = image.manifest.layers.iter().find(|layer| !store.has(layer));
    if let (Backend::DmVerity, Some(layer)) = (args.backend, lacking) {
        let why = format!("layer {} is fetched while it is read, which takes the fuse backend", layer.digest);
        return Err(MountError::NoBackend { backend: backend::DM_VERITY, why }.into());
    }
    let list = list(args, &store, from.as_ref(), &image)?;
    let name = source.image_name();
    let complete = {
        let (store, found) = (store.clone(), found.clone());
        move || {
            let named = store.writer().and_then(|writer| writer.set_name(&name, &found));
            match named {
                Ok(()) => log::info!("all of {} is in {}", found.digest, store.dir().display()),
                Err(error) => log::warn!("{} has no name in its store: {error}", found.digest),
            }
        }
    };
    let options = LazyOptions {
        patience: patience.patience,
        fill: !args.lazy.no_fill,
        list,
        complete: Some(Box::new(complete)),
    };
    let lazy = LazyImage::open(&store, from, &image, options)?;
    lazy.warm();
    let digest = found.digest;
    let blobs: Arc<dyn Blobs> = Arc::new(lazy);
    Ok(OpenedImage { blobs, image, scratch: Upper::Memory, pinned: Some(pinned(&source, &digest)) })
}

/// The same image by its digest: what a tag stands for may change.
fn pinned(source: &SourceRef, digest: &Digest) -> String {
    format!("docker://{}@{digest}", source.location)
}

/// The manifest of an image, with what it describes: from the store, if it is there and the user named its digest.
fn find(store: &Store, from: &dyn Transport, source: &SourceRef) -> Result<(Descriptor, OciImage), AnyError> {
    let pin = source.name.as_deref().and_then(|name| name.trim_start_matches('@').parse::<Digest>().ok());
    if let Some(digest) = pin
        && let Ok(bytes) = store.get(&digest, MAX_MANIFEST_BYTES)
        && let Ok(image) = OciImage::parse(&bytes)
    {
        let media_type = image.manifest.media_type.clone().unwrap_or_else(|| MANIFEST.into());
        return Ok((Descriptor::new(&media_type, digest, bytes.len() as u64), image));
    }
    let found = from.find_image(source.name.as_deref(), &Platform::this_machine())?;
    let bytes = from.fetch(&found, MAX_MANIFEST_BYTES)?;
    let image = OciImage::parse(&bytes).map_err(|error| TransportError::Document {
        object: format!("{}@{}", from.location(), found.digest),
        source: error,
    })?;
    let writer = store.writer()?;
    writer.put_bytes(&found.media_type, &bytes)?;
    let config = &image.manifest.config;
    if !store.has(config) {
        writer.put_bytes(CONFIG, &from.fetch(config, MAX_MANIFEST_BYTES)?)?;
    }
    Ok((found, image))
}

/// What to fetch first: the list that the user named, else one that the registry has for the image.
///
/// One of a registry that cannot be read is left out: it is a hint.
fn list(
    args: &RequestedImage<'_>,
    store: &Store,
    from: &dyn Transport,
    image: &OciImage,
) -> Result<Option<ReadList>, AnyError> {
    if let Some(path) = &args.lazy.list {
        return Ok(Some(read_list(path)?));
    }
    let is_here = image.manifest.layers.iter().all(|layer| store.has(layer));
    Ok(if is_here { None } else { find_list(from, &image.digest) })
}

/// A list that a user named.
pub(super) fn read_list(path: &Path) -> Result<ReadList, AnyError> {
    let bytes = file::read_named(path, MAX_LIST_BYTES)?;
    let parsed = ReadList::parse(&bytes).map_err(std::io::Error::other);
    Ok(parsed.on("read", path)?)
}

/// The newest list of an image that its registry has.
pub(super) fn find_list(from: &dyn Transport, image: &Digest) -> Option<ReadList> {
    let found = from.referrers(image, Some(LIST_TYPE)).ok()?.into_iter().next()?;
    let artifact = from.manifest(&found).ok()?;
    let layer = artifact.layers.first()?;
    let bytes = from.fetch(layer, MAX_LIST_BYTES).ok()?;
    ReadList::parse(&bytes).inspect_err(|error| log::info!("{}: {error}", found.digest)).ok()
}
