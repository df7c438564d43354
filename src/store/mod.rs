//! The store: an OCI image layout that mosfs writes, and that skopeo and umoci read.
//!
//! ```text
//! DIR/oci-layout               written when the store is made, never changed
//! DIR/index.json               the names, and the referrers; changed by atomic replace only
//! DIR/blobs/sha256/HEX         the blobs, mode 0444, never changed once they exist
//! DIR/.mosfs/lock              flock(2): held by writers and by garbage collection
//! DIR/.mosfs/index.lock        flock(2): held while index.json is replaced
//! DIR/.mosfs/tmp/*             files that are being written
//! DIR/.mosfs/partial/HEX       the first bytes of blobs that are being received ([`partial`])
//! DIR/.mosfs/lazy/HEX          blobs that are here in parts and are read already ([`lazy`])
//! ```
//!
//! Names (`org.opencontainers.image.ref.name` in `index.json`):
//!
//! ```text
//! mos/images/TARGET:sha256/HEX     a target's OCI manifest, by its digest
//! mos/system/system:sha256/HEX     a system manifest (an artifact), by the digest of its JSON
//! mos/system/system:VERSION        the same, by version
//! (without a name)                 artifacts that have a subject: signature, certificate …
//! ```
//!
//! Invariants, which `mosfs verify` ([`fsck`]) checks:
//! 1. The content of a file in `blobs/sha256` matches its name. The file is written to `tmp`, hashed on the
//!    way, synced, renamed, and its folder is synced.
//! 2. Everything that `index.json` reaches exists: blobs are written first, the name last.
//!
//! So a crash at any point leaves a store that verifies, plus files in `tmp` and blobs that no
//! name reaches, which `mosfs gc` ([`gc`]) removes.
//!
//! Locks. Readers take none: `index.json` is replaced atomically, blobs do not change, and an open blob stays
//! readable after it is removed. A [`Writer`] holds `lock` shared from before it puts its first blob until
//! after it has set the name that keeps it. Garbage collection holds `lock` exclusive, so it never sees a
//! blob that is about to be named; it does not wait for a writer but returns [`StoreError::Busy`].
//! `index.lock` is held, exclusive, for one read-change-replace of `index.json`, always taken after `lock`.
//! Tools that do not know these locks (skopeo, umoci) must not write to the store while mosfs does.
//!
//! Blobs are added by reflink if the file system supports it, else by copying; never by hard link, even
//! between two stores: anyone who can write to the other name of the file could change a blob after it was
//! checked. The hash is computed over the store's own copy.

mod fetch;
pub mod fsck;
pub mod gc;
pub mod lazy;
mod partial;
mod put;
pub mod stats;
pub mod view;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use fetch::FetchJob;
pub use put::{TempBlob, Writer};

use crate::digest::Digest;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::image::blobs::Blobs;
use crate::image::oci::{Descriptor, OciError, OciImage};
use crate::sorting;
use crate::sys::atomic::sync_folder;
use crate::sys::file::{self, Links};
use crate::sys::flock::Lock;
use crate::transport::{OciDir, Transport, TransportError};

/// The prefix of the names of system manifests; a version or `sha256/HEX` follows.
pub const SYSTEM_PREFIX: &str = "mos/system/system:";
/// Names of images begin so, up to the target; what follows is `TARGET:sha256/HEX`.
pub const IMAGES: &str = "mos/images";

/// The repository of a target's images.
pub fn image_repository(target: &str) -> String {
    format!("{IMAGES}/{target}")
}

/// Returns the name of a target's image.
pub fn image_name(target: &str, digest: &Digest) -> String {
    format!("{}:sha256/{}", image_repository(target), digest.hex())
}

/// Returns the name of a system manifest by the digest of its JSON.
pub fn system_name(digest: &Digest) -> String {
    format!("{SYSTEM_PREFIX}sha256/{}", digest.hex())
}

/// Returns the name of a system manifest by its version.
pub fn version_name(version: u64) -> String {
    format!("{SYSTEM_PREFIX}{version}")
}

/// A store. Cheap to clone; holds nothing open.
///
/// ```
/// use mosfs::{Progress, Store, Transport, check_store};
///
/// let folder = tempfile::tempdir()?;
/// let store = Store::create(folder.path())?;
///
/// // A blob first, then the name that keeps it.
/// let writer = store.writer()?;
/// let artifact = writer.put_artifact("application/vnd.example.greeting", b"hello", None)?;
/// writer.set_name("greeting", &artifact)?;
/// drop(writer);
///
/// assert_eq!(store.resolve("greeting")?.digest, artifact.digest);
/// let content = &(store.transport() as &dyn Transport).manifest(&artifact)?.layers[0];
/// assert_eq!(store.get(&content.digest, 1024)?, b"hello");
/// let report = check_store(&store, std::num::NonZeroUsize::MIN, &Progress::silent())?;
/// assert!(report.problems.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Store {
    layout: OciDir,
}

impl Store {
    /// Opens a store, or any other OCI layout.
    ///
    /// # Errors
    /// [`TransportError::NotALayout`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, Links::Followed)
    }

    /// Opens a store whose files may or may not be links.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(crate) fn open_with(dir: &Path, links: Links) -> Result<Self, StoreError> {
        Ok(Self { layout: OciDir::open_with(dir, links)? })
    }

    /// Opens a store, and creates it first if there is none.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`] if the folder holds other files.
    pub fn create(dir: &Path) -> Result<Self, StoreError> {
        if !dir.join("oci-layout").exists() {
            match fs::read_dir(dir) {
                Ok(entries) => {
                    // Files that an interrupted or concurrent creation, or mkfs, may have left.
                    let ours = ["blobs", ".mosfs", "index.json", "oci-layout", "lost+found"];
                    for entry in entries {
                        let name = entry.on("list", dir)?.file_name();
                        if !ours.iter().any(|known| name == *known) {
                            return Err(StoreError::NotEmpty {
                                dir: dir.to_path_buf(),
                                found: name.to_string_lossy().into_owned(),
                            });
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(IoError { operation: "list", path: dir.to_path_buf(), source }.into());
                }
            }
        }
        for folder in ["blobs/sha256", ".mosfs/tmp"] {
            let folder = dir.join(folder);
            file::create_folders(&folder)?;
        }
        for folder in [&dir.join("blobs"), dir] {
            sync_folder(folder).on("sync", folder)?;
        }
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_folder(parent).on("sync", parent)?;
        }
        let lock = dir.join(".mosfs/index.lock");
        let _lock = Lock::exclusive(&lock).on("lock", &lock)?;
        // index.json before oci-layout: a folder with the latter is a complete layout.
        for (name, content) in [
            ("index.json", crate::image::index::Index::empty().to_bytes()),
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ] {
            if !dir.join(name).exists() {
                put::replace_file(dir, name, &content)?;
            }
        }
        Self::open_with(dir, Links::Refused)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.layout.dir()
    }

    /// The store as a place to fetch from.
    pub fn transport(&self) -> &OciDir {
        &self.layout
    }

    /// Returns the path where a blob is, or would be. The code that opens it must verify what it reads.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.layout.blob_path(digest)
    }

    /// Returns the blobs, for mounting an image of this store.
    pub fn blobs(&self) -> Arc<dyn Blobs> {
        self.layout.blobs()
    }

    /// Returns whether a blob exists with the right size. Its content was checked when it was written;
    /// [`check_store`](crate::check_store) checks it again.
    pub fn has(&self, blob: &Descriptor) -> bool {
        let path = self.blob_path(&blob.digest);
        let found = match self.layout.links() {
            Links::Refused => fs::symlink_metadata(path),
            Links::Followed => fs::metadata(path),
        };
        found.is_ok_and(|data| data.is_file() && data.len() == blob.size)
    }

    /// Returns how many bytes of a blob are here, in the store or received so far.
    pub(crate) fn have_bytes(&self, blob: &Descriptor) -> u64 {
        if self.has(blob) {
            return blob.size;
        }
        let of = |folder| fs::symlink_metadata(self.private(folder).join(blob.digest.hex())).ok();
        // A file of the one kind has no holes; those of the other are what is not here.
        let received = of(partial::FOLDER).map_or(0, |data| data.len());
        let read = of(lazy::FOLDER).map_or(0, |data| data.blocks().saturating_mul(512));
        received.max(read).min(blob.size)
    }

    /// Reads a small blob whole, checked against its digest.
    ///
    /// # Errors
    /// [`TransportError::BlobMissing`], [`TransportError::TooBig`], [`TransportError::DigestMismatch`].
    pub fn get(&self, digest: &Digest, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        Ok(self.layout.get(digest, max_bytes)?)
    }

    /// Reads the image of a manifest in the store, checked against its digest.
    pub fn image(&self, manifest: &Digest) -> Result<OciImage, StoreError> {
        let bytes = self.get(manifest, crate::image::oci::MAX_MANIFEST_BYTES)?;
        // `get` has compared its digest.
        OciImage::of(&bytes, *manifest).map_err(|source| {
            TransportError::Document { object: self.blob_path(manifest).display().to_string(), source }.into()
        })
    }

    /// Returns all names, sorted, with their descriptors.
    pub fn names(&self) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let entries = self.layout.entries()?;
        let mut names: Vec<_> =
            entries.into_iter().filter_map(|one| Some((one.ref_name()?.to_string(), one))).collect();
        sorting::sort_by(&mut names, |a, b| a.0.cmp(&b.0));
        Ok(names)
    }

    /// Returns the descriptor of a name.
    ///
    /// # Errors
    /// [`TransportError::NameMissing`] with the existing names; [`TransportError::Ambiguous`] if another tool
    /// set the name twice.
    pub fn resolve(&self, name: &str) -> Result<Descriptor, StoreError> {
        let mut found = self.layout.lookup(name)?.into_iter();
        let location = self.layout.location();
        let Some(first) = found.next() else {
            return Err(
                TransportError::NameMissing { location, name: name.into(), available: Vec::new() }.into()
            );
        };
        match found.find(|other| other.digest != first.digest) {
            Some(other) => {
                let digests = [first.digest, other.digest];
                Err(TransportError::Ambiguous { object: format!("{location}:{name}"), digests }.into())
            }
            None => Ok(first),
        }
    }

    /// Returns the manifests whose `subject` is `subject`, all of them or of one artifact type.
    pub fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, StoreError> {
        Ok(self.layout.referrers(subject, artifact_type)?)
    }

    /// Begins writing: takes the store's lock, shared.
    pub fn writer(&self) -> Result<Writer<'_>, StoreError> {
        Writer::new(self)
    }

    /// Prevents garbage collection as long as the returned value lives; changes nothing.
    fn hold(&self) -> Result<Lock, StoreError> {
        let path = self.private("lock");
        Ok(Lock::shared(&path).on("lock", &path)?)
    }

    pub(crate) fn private(&self, name: &str) -> PathBuf {
        self.dir().join(".mosfs").join(name)
    }

    /// Returns the path of one of the lock files, which may not exist yet.
    fn lock_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        // A layout made by another tool has no private folder yet.
        let tmp = self.private("tmp");
        if !tmp.is_dir() {
            file::create_folders(&tmp)?;
        }
        Ok(self.private(name))
    }
}

/// Lists the files in a folder, with their sizes in bytes. Subfolders are not mosfs' and stay.
fn files(dir: &Path) -> Result<Vec<(PathBuf, u64)>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(IoError { operation: "list", path: dir.to_path_buf(), source }.into()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.on("list", dir)?.path();
        let data = fs::symlink_metadata(&path).on("stat", &path)?;
        if !data.is_dir() {
            found.push((path, data.len()));
        }
    }
    Ok(found)
}

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A store cannot be created in a folder with other files.
    #[error("{} is not an OCI image layout and not empty (it has `{found}`)", dir.display())]
    NotEmpty {
        /// The folder.
        dir: PathBuf,
        /// One of the files in it.
        found: String,
    },
    /// Another process is writing, so nothing can be collected; or the reverse.
    #[error("the store {} is in use: {holder}", dir.display())]
    Busy {
        /// The store.
        dir: PathBuf,
        /// Who holds the lock.
        holder: &'static str,
    },
    /// A name that must not change would stand for something else.
    #[error("`{name}` already stands for {found}, and would stand for {expected}")]
    NameTaken {
        /// The name.
        name: String,
        /// What it stands for now.
        found: Digest,
        /// What it would stand for.
        expected: Digest,
    },
    /// A layout cannot be read, or a blob in it has the wrong content.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A document cannot be read.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// An error of the operating system.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for StoreError {
    fn class(&self) -> Class {
        match self {
            Self::NotEmpty { .. } | Self::NameTaken { .. } => Class::Input,
            Self::Busy { .. } | Self::Io(_) => Class::Failure,
            Self::Transport(error) => error.class(),
            Self::Oci(error) => error.class(),
        }
    }
}
