//! Garbage collection: removes what no name reaches.
//!
//! Marked are `index.json`'s entries, with or without a name, and what they reach: manifests of nested
//! indexes, config, layers, subject; and the digests that the caller passes. An entry without a name whose
//! subject is gone is removed too, as it refers to nothing. Then blobs without a mark and temporary files are
//! removed, names first, so that a crash leaves garbage but never a name without its blobs.
//!
//! Marked objects that are missing or damaged do not stop the collection: a disk must not fill up because one
//! document on it is corrupt. They are reported, and `mosfs repair` or the next update repairs them; until
//! then nothing can be started from them, so objects that only they reach are not needed. All blobs stay only
//! if the disk fails, or if the document may still be intact.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use serde::Serialize;

use super::{Store, StoreError, files, lazy, partial, put};
use crate::digest::Digest;
use crate::error::IoContext;
use crate::image::index::Index;
use crate::image::oci::{Descriptor, MAX_MANIFEST_BYTES, Manifest};
use crate::sorting;
use crate::sys::atomic::sync_folder;
use crate::sys::failpoint;
use crate::sys::file;
use crate::sys::flock::Lock;
use crate::transport::{Transport, TransportError};

/// The objects that a collection removes, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// Names given by the caller.
    pub names: Vec<String>,
    /// Entries of `index.json` without a name whose subject is removed.
    pub referrers: Vec<Digest>,
    /// Unreferenced blobs.
    pub blobs: Vec<Digest>,
    /// Files left by writers that died, and files that are not blobs.
    pub files: Vec<PathBuf>,
    /// The space freed, in bytes.
    pub bytes: u64,
    /// Referenced but damaged objects, which are skipped; a sentence each.
    pub damaged: Vec<String>,
}

impl Removal {
    /// Returns whether there is nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.referrers.is_empty() && self.blobs.is_empty() && self.files.is_empty()
    }
}

/// A garbage collector; holds the store's lock, exclusive.
pub struct Collector<'a> {
    store: &'a Store,
    _lock: Lock,
}

impl Store {
    /// Begins a garbage collection.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while another process writes to the store.
    pub fn collector(&self) -> Result<Collector<'_>, StoreError> {
        let path = self.lock_path("lock")?;
        match Lock::try_exclusive(&path).on("lock", &path)? {
            Some(lock) => Ok(Collector { store: self, _lock: lock }),
            None => Err(StoreError::Busy {
                dir: self.dir().to_path_buf(),
                holder: "someone is writing to it or collecting its garbage",
            }),
        }
    }
}

impl Collector<'_> {
    /// Finds what can be removed: everything that neither a name (except those in `drop_names`) nor one of
    /// `roots` reaches. Changes nothing. Referenced but damaged objects are skipped and reported in
    /// [`Removal::damaged`].
    ///
    /// # Errors
    /// An index that cannot be read.
    pub fn plan(&self, drop_names: &[String], roots: &[Digest]) -> Result<Removal, StoreError> {
        let mut removal = Removal::default();
        let Index { manifests: entries, unread, .. } = self.store.transport().index()?;
        if let Some(entry) = unread.first() {
            // Nobody can say which blobs it needs.
            let name = entry.ref_name().unwrap_or("an entry without a name");
            let object = format!("{}: {name}", self.store.transport().location());
            return Err(TransportError::UnreadableEntry { object, why: entry.why() }.into());
        }
        let mut marking =
            MarkedObjects { marked: roots.iter().copied().collect(), ..MarkedObjects::default() };
        let mut unnamed = Vec::new();
        for entry in entries {
            match entry.ref_name() {
                Some(name) if drop_names.iter().any(|dropped| dropped == name) => {
                    removal.names.push(name.to_string());
                }
                Some(_) => self.mark(&entry, &mut marking),
                None => unnamed.push(entry),
            }
        }
        for root in roots {
            // The kind of document of a root is unknown: it is read as a manifest if it is one.
            if let Ok(bytes) = self.store.get(root, MAX_MANIFEST_BYTES)
                && let Ok(manifest) = Manifest::parse(&bytes)
            {
                marking.manifest(&manifest);
            }
        }
        // A referrer may refer to another referrer: repeat until nothing changes.
        let mut left: Vec<(Descriptor, Option<Digest>)> = Vec::new();
        for entry in unnamed {
            let subject = match entry.is_manifest() {
                true => match self.manifest(&entry, &mut marking) {
                    Some(manifest) => manifest.subject.map(|about| about.digest),
                    // Its subject is no longer known, so it cannot be used.
                    None if marking.whole => continue,
                    None => None,
                },
                false => None,
            };
            left.push((entry, subject));
        }
        loop {
            let before = left.len();
            let mut keep = Vec::new();
            left.retain(|(entry, subject)| {
                let stays = subject.is_none_or(|about| marking.marked.contains(&about));
                if stays {
                    keep.push(entry.clone());
                }
                !stays
            });
            for entry in &keep {
                self.mark(entry, &mut marking);
            }
            if left.len() == before {
                break;
            }
        }
        removal.referrers = left.into_iter().map(|(entry, _)| entry.digest).collect();

        for (path, size) in files(&self.store.dir().join("blobs/sha256"))? {
            let digest = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok());
            match digest {
                Some(digest) if marking.marked.contains(&digest) => continue,
                // The disk failed: the unread document may need any blob.
                Some(_) if !marking.whole => continue,
                Some(digest) => removal.blobs.push(digest),
                None => removal.files.push(path),
            }
            removal.bytes += size;
        }
        for folder in ["tmp", partial::FOLDER] {
            for (path, size) in files(&self.store.private(folder))? {
                // The first bytes of a blob that something needs are kept for the next run.
                let begins = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok());
                let is_needed = |digest: &Digest| {
                    folder == partial::FOLDER
                        && marking.marked.contains(digest)
                        && !self.store.blob_path(digest).exists()
                };
                if begins.as_ref().is_some_and(is_needed) {
                    continue;
                }
                removal.files.push(path);
                removal.bytes += size;
            }
        }
        // A blob that is here in parts stays while it is read, and while something needs the blob.
        for (path, size) in lazy::unneeded(self.store, &|digest| marking.marked.contains(digest))? {
            removal.files.push(path);
            removal.bytes += size;
        }
        sorting::sort(&mut removal.blobs);
        sorting::sort(&mut removal.files);
        removal.damaged = marking.damaged.into_iter().collect();
        Ok(removal)
    }

    /// Removes what [`Collector::plan`] found under this same lock; returns what could not be removed, a
    /// sentence each.
    ///
    /// # Errors
    /// If the index cannot be written; then nothing is removed.
    pub fn apply(&self, removal: &Removal) -> Result<Vec<String>, StoreError> {
        let mut problems = Vec::new();
        put::change_index(self.store, |index| {
            index.retain(|entry| match entry.ref_name() {
                Some(name) => !removal.names.iter().any(|dropped| dropped == name),
                None => !removal.referrers.contains(&entry.digest),
            });
            Ok(())
        })?;
        failpoint::hit("store.gc.names");
        let blobs = removal.blobs.iter().map(|digest| self.store.blob_path(digest));
        for path in blobs.chain(removal.files.iter().cloned()) {
            match file::remove_if_there(&path) {
                Err(error) => problems.push(error.to_string()),
                Ok(()) => failpoint::hit("store.gc.blob"),
            }
        }
        let private = ["tmp", partial::FOLDER, lazy::FOLDER].map(|name| self.store.private(name));
        for folder in [self.store.dir().join("blobs/sha256")].into_iter().chain(private) {
            if folder.exists() {
                sync_folder(&folder).on("sync", &folder)?;
            }
        }
        Ok(problems)
    }

    /// Marks a descriptor and all that it reaches. Not recursive: pending descriptors are in a list.
    fn mark(&self, from: &Descriptor, marking: &mut MarkedObjects) {
        let mut todo = vec![from.clone()];
        let mut seen = BTreeSet::new();
        while let Some(entry) = todo.pop() {
            marking.marked.insert(entry.digest);
            if !seen.insert(entry.digest) {
                continue;
            }
            if entry.is_index() {
                let parsed =
                    self.bytes(&entry, marking).map(|bytes| Index::parse(&bytes, MAX_MANIFEST_BYTES));
                match parsed {
                    Some(Ok(index)) => todo.extend(index.manifests),
                    Some(Err(error)) => marking.damage(&entry, &error),
                    None => {}
                }
            } else if entry.is_manifest()
                && let Some(manifest) = self.manifest(&entry, marking)
            {
                marking.manifest(&manifest);
                todo.extend(manifest.subject);
            }
        }
    }

    fn manifest(&self, entry: &Descriptor, marking: &mut MarkedObjects) -> Option<Manifest> {
        let bytes = self.bytes(entry, marking)?;
        Manifest::parse(&bytes).inspect_err(|error| marking.damage(entry, error)).ok()
    }

    /// Returns a document; `None` if it is missing, such as that of a platform that was not copied, or if it
    /// is damaged.
    fn bytes(&self, entry: &Descriptor, marking: &mut MarkedObjects) -> Option<Vec<u8>> {
        match self.store.transport().fetch(entry, MAX_MANIFEST_BYTES) {
            Ok(bytes) => Some(bytes),
            Err(TransportError::BlobMissing { .. }) => None,
            Err(error) => {
                // Anything but a file counts as damaged; other errors of the disk may be temporary.
                if let TransportError::Io(io) = &error
                    && io.source.kind() != io::ErrorKind::InvalidData
                {
                    marking.whole = false;
                }
                marking.damage(entry, &error);
                None
            }
        }
    }
}

/// The objects reached so far.
struct MarkedObjects {
    marked: BTreeSet<Digest>,
    /// Referenced objects that cannot be read.
    damaged: BTreeSet<String>,
    /// Whether everything that could not be read is lost permanently.
    whole: bool,
}

impl Default for MarkedObjects {
    fn default() -> Self {
        Self { marked: BTreeSet::new(), damaged: BTreeSet::new(), whole: true }
    }
}

impl MarkedObjects {
    fn manifest(&mut self, manifest: &Manifest) {
        self.marked.insert(manifest.config.digest);
        self.marked.extend(manifest.layers.iter().map(|layer| layer.digest));
    }

    fn damage(&mut self, entry: &Descriptor, why: &dyn std::fmt::Display) {
        let name = entry.ref_name().map_or_else(|| entry.digest.to_string(), |name| format!("`{name}`"));
        self.damaged.insert(format!("{name}: {why}"));
    }
}
