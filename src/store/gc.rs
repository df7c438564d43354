//! Garbage collection: what no name reaches goes.
//!
//! Marked are `index.json`'s entries, with or without a name, and what they reach: manifests of
//! nested indexes, config, layers, subject; and the digests that the caller gives. An entry without a
//! name whose subject is gone goes too: it says something about nothing. Then blobs without a mark and
//! temporary files are removed, names first, so that a crash leaves garbage and never a name without its blobs.
//!
//! What is marked but missing or damaged does not stop the collection: that is for `mosfs verify`
//! to tell. But a manifest that cannot be read hides what it reaches, so then nothing is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Store, StoreError, put};
use crate::digest::Digest;
use crate::error::{IoContext, IoError};
use crate::failpoint;
use crate::image::oci::{Descriptor, Index, MAX_MANIFEST_BYTES, Manifest};
use crate::sys::atomic::sync_folder;
use crate::sys::flock::Lock;
use crate::transport::{Transport, TransportError};

/// What a collection removes, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// Names, which the caller gave.
    pub names: Vec<String>,
    /// Entries of `index.json` without a name, whose subject goes.
    pub referrers: Vec<Digest>,
    /// Blobs that nothing reaches.
    pub blobs: Vec<Digest>,
    /// Files that were being written when their writer died, and files that are no blobs.
    pub files: Vec<PathBuf>,
    /// What is freed, in bytes.
    pub bytes: u64,
}

impl Removal {
    /// Whether there is nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.referrers.is_empty() && self.blobs.is_empty() && self.files.is_empty()
    }
}

/// Someone who collects garbage: holds the store's lock, exclusive.
pub struct Collector<'a> {
    store: &'a Store,
    _lock: Lock,
}

impl Store {
    /// Begins to collect garbage.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while anyone writes to the store.
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
    /// Looks what can go: everything that neither a name (but those in `drop_names`) nor one of
    /// `roots` reaches. Changes nothing.
    ///
    /// # Errors
    /// A manifest that is reached but cannot be read.
    pub fn plan(&self, drop_names: &[String], roots: &[Digest]) -> Result<Removal, StoreError> {
        let mut removal = Removal::default();
        let Index { manifests: entries, unread, .. } = self.store.transport().index()?;
        if let Some(entry) = unread.first() {
            // Nobody can say which blobs it needs.
            let name = entry.ref_name().unwrap_or("an entry without a name");
            let object = format!("{}: {name}", self.store.transport().location());
            return Err(TransportError::UnreadableEntry { object, why: entry.why() }.into());
        }
        let mut marked: BTreeSet<Digest> = roots.iter().copied().collect();
        let mut unnamed = Vec::new();
        for entry in entries {
            match entry.ref_name() {
                Some(name) if drop_names.iter().any(|dropped| dropped == name) => {
                    removal.names.push(name.to_string());
                }
                Some(_) => self.mark(&entry, &mut marked)?,
                None => unnamed.push(entry),
            }
        }
        for root in roots {
            // What kind of document a root is, is not said: it is read as a manifest if it is one.
            if let Ok(bytes) = self.store.get(root, MAX_MANIFEST_BYTES)
                && let Ok(manifest) = Manifest::parse(&bytes)
            {
                self.mark_manifest(&manifest, &mut marked)?;
            }
        }
        // A referrer may be about a referrer: until nothing changes.
        let mut left: Vec<(Descriptor, Option<Digest>)> = Vec::new();
        for entry in unnamed {
            let subject = match entry.is_manifest() {
                true => {
                    self.manifest(&entry)?.and_then(|manifest| manifest.subject).map(|about| about.digest)
                }
                false => None,
            };
            left.push((entry, subject));
        }
        loop {
            let before = left.len();
            let mut keep = Vec::new();
            left.retain(|(entry, subject)| {
                let stays = subject.is_none_or(|about| marked.contains(&about));
                if stays {
                    keep.push(entry.clone());
                }
                !stays
            });
            for entry in &keep {
                self.mark(entry, &mut marked)?;
            }
            if left.len() == before {
                break;
            }
        }
        removal.referrers = left.into_iter().map(|(entry, _)| entry.digest).collect();

        for (path, size) in files(&self.store.dir().join("blobs/sha256"))? {
            let digest = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok());
            match digest {
                Some(digest) if marked.contains(&digest) => continue,
                Some(digest) => removal.blobs.push(digest),
                None => removal.files.push(path),
            }
            removal.bytes += size;
        }
        for (path, size) in files(&self.store.private("tmp"))? {
            removal.files.push(path);
            removal.bytes += size;
        }
        removal.blobs.sort();
        removal.files.sort();
        Ok(removal)
    }

    /// Removes what [`Collector::plan`] found under this same lock.
    pub fn apply(&self, removal: &Removal) -> Result<(), StoreError> {
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
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(IoError { operation: "remove", path, source: error }.into());
                }
                _ => failpoint::hit("store.gc.blob"),
            }
        }
        for folder in [self.store.dir().join("blobs/sha256"), self.store.private("tmp")] {
            if folder.exists() {
                sync_folder(&folder).on("sync", &folder)?;
            }
        }
        Ok(())
    }

    /// Marks a descriptor and all that it reaches. Not recursive: what is left is in a list.
    fn mark(&self, from: &Descriptor, marked: &mut BTreeSet<Digest>) -> Result<(), StoreError> {
        let mut todo = vec![from.clone()];
        let mut seen = BTreeMap::new();
        while let Some(entry) = todo.pop() {
            marked.insert(entry.digest);
            if seen.insert(entry.digest, ()).is_some() {
                continue;
            }
            if entry.is_index() {
                if let Some(bytes) = self.bytes(&entry)? {
                    let index = Index::parse(&bytes, MAX_MANIFEST_BYTES)?;
                    todo.extend(index.manifests);
                }
            } else if entry.is_manifest()
                && let Some(manifest) = self.manifest(&entry)?
            {
                self.mark_manifest(&manifest, marked)?;
                todo.extend(manifest.subject);
            }
        }
        Ok(())
    }

    fn mark_manifest(&self, manifest: &Manifest, marked: &mut BTreeSet<Digest>) -> Result<(), StoreError> {
        marked.insert(manifest.config.digest);
        marked.extend(manifest.layers.iter().map(|layer| layer.digest));
        Ok(())
    }

    fn manifest(&self, entry: &Descriptor) -> Result<Option<Manifest>, StoreError> {
        match self.bytes(entry)? {
            Some(bytes) => Ok(Some(Manifest::parse(&bytes)?)),
            None => Ok(None),
        }
    }

    /// A document; `None` where it is not there at all, as of a platform that was not copied.
    fn bytes(&self, entry: &Descriptor) -> Result<Option<Vec<u8>>, StoreError> {
        match self.store.transport().fetch(entry, MAX_MANIFEST_BYTES) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(TransportError::BlobMissing { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The files in a folder, with their sizes in bytes. Folders are not ours and stay.
pub(super) fn files(dir: &Path) -> Result<Vec<(PathBuf, u64)>, StoreError> {
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
