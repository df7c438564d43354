//! Garbage collection: what no name reaches goes.
//!
//! Marked are `index.json`'s entries, with or without a name, and what they reach: manifests of
//! nested indexes, config, layers, subject; and the digests that the caller gives. An entry without a
//! name whose subject is gone goes too: it says something about nothing. Then blobs without a mark and
//! temporary files are removed, names first, so that a crash leaves garbage and never a name without its blobs.
//!
//! What is marked but missing or damaged does not stop the collection: a disk must not fill up because one
//! document on it has rotted. It is said, and `mosfs repair` or the next update mends it; until then nothing can
//! be started from it, so that what it alone reaches is of no use. Only where the disk does not answer, or
//! the document may still be whole, does every blob stay.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde::Serialize;

use super::{Store, StoreError, files, put};
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
    /// What is reached and damaged, each as a sentence: it is passed over.
    pub damaged: Vec<String>,
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
    /// What is reached but damaged is passed over, and told in [`Removal::damaged`].
    ///
    /// # Errors
    /// An index that cannot be read.
    pub fn plan(&self, drop_names: &[String], roots: &[Digest]) -> Result<Removal, StoreError> {
        let mut removal = Removal::default();
        let entries = self.store.transport().entries()?;
        let mut marking = Marking { marked: roots.iter().copied().collect(), ..Marking::default() };
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
            // What kind of document a root is, is not said: it is read as a manifest if it is one.
            if let Ok(bytes) = self.store.get(root, MAX_MANIFEST_BYTES)
                && let Ok(manifest) = Manifest::parse(&bytes)
            {
                marking.manifest(&manifest);
            }
        }
        // A referrer may be about a referrer: until nothing changes.
        let mut left: Vec<(Descriptor, Option<Digest>)> = Vec::new();
        for entry in unnamed {
            let subject = match entry.is_manifest() {
                true => match self.manifest(&entry, &mut marking) {
                    Some(manifest) => manifest.subject.map(|about| about.digest),
                    // What it was about is not known any more, and nobody can believe it.
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
                // The disk does not answer: what is behind it may need any blob.
                Some(_) if !marking.whole => continue,
                Some(digest) => removal.blobs.push(digest),
                None => removal.files.push(path),
            }
            removal.bytes += size;
        }
        for folder in ["tmp", "partial"] {
            for (path, size) in files(&self.store.private(folder))? {
                removal.files.push(path);
                removal.bytes += size;
            }
        }
        removal.blobs.sort();
        removal.files.sort();
        removal.damaged = marking.damaged.into_iter().collect();
        Ok(removal)
    }

    /// Removes what [`Collector::plan`] found under this same lock; what could not be removed is returned, each as a
    /// sentence.
    ///
    /// # Errors
    /// Where the index cannot be written: then nothing is removed.
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
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    problems.push(IoError { operation: "remove", path, source: error }.to_string());
                }
                _ => failpoint::hit("store.gc.blob"),
            }
        }
        for folder in
            [self.store.dir().join("blobs/sha256"), self.store.private("tmp"), self.store.private("partial")]
        {
            if folder.exists() {
                sync_folder(&folder).on("sync", &folder)?;
            }
        }
        Ok(problems)
    }

    /// Marks a descriptor and all that it reaches. Not recursive: what is left is in a list.
    fn mark(&self, from: &Descriptor, marking: &mut Marking) {
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

    fn manifest(&self, entry: &Descriptor, marking: &mut Marking) -> Option<Manifest> {
        let bytes = self.bytes(entry, marking)?;
        Manifest::parse(&bytes).inspect_err(|error| marking.damage(entry, error)).ok()
    }

    /// A document; `None` where it is not there at all, as of a platform that was not copied, and where it is damaged.
    fn bytes(&self, entry: &Descriptor, marking: &mut Marking) -> Option<Vec<u8>> {
        match self.store.transport().fetch(entry, MAX_MANIFEST_BYTES) {
            Ok(bytes) => Some(bytes),
            Err(TransportError::BlobMissing { .. }) => None,
            Err(error) => {
                // What is no file is damaged like any other; all else the disk may answer another time.
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

/// What is reached so far.
struct Marking {
    marked: BTreeSet<Digest>,
    /// What is reached and cannot be read.
    damaged: BTreeSet<String>,
    /// Whether whatever could not be read is gone for good.
    whole: bool,
}

impl Default for Marking {
    fn default() -> Self {
        Self { marked: BTreeSet::new(), damaged: BTreeSet::new(), whole: true }
    }
}

impl Marking {
    fn manifest(&mut self, manifest: &Manifest) {
        self.marked.insert(manifest.config.digest);
        self.marked.extend(manifest.layers.iter().map(|layer| layer.digest));
    }

    fn damage(&mut self, entry: &Descriptor, why: &dyn std::fmt::Display) {
        let name = entry.ref_name().map_or_else(|| entry.digest.to_string(), |name| format!("`{name}`"));
        self.damaged.insert(format!("{name}: {why}"));
    }
}
