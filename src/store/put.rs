//! Writes to a store: temporary file, hash, sync, rename, sync of the folder; names last.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Store, StoreError, files};
use crate::digest::{Digest, Hasher};
use crate::error::{IoContext, IoError};
use crate::image::oci::{Descriptor, Manifest, REF_NAME};
use crate::progress::Task;
use crate::sys::atomic;
use crate::sys::failpoint;
use crate::sys::file::{self, Links, reflink, sync_file_system};
use crate::sys::flock::Lock;
use crate::transport::{Blob, Transport, TransportError};

/// How much is read, hashed and written at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// A writer to a store. What it stores is safe from garbage collection while it lives; what should stay must
/// have a name, or be reached by one, before it is dropped.
pub struct Writer<'a> {
    store: &'a Store,
    /// Locked, shared, until it is closed.
    _lock: Lock,
}

impl<'a> Writer<'a> {
    pub(super) fn new(store: &'a Store) -> Result<Self, StoreError> {
        let path = store.lock_path("lock")?;
        // Removes what dead writers left, unless another writer is alive.
        if let Some(_alone) = Lock::try_exclusive(&path).on("lock", &path)? {
            sweep(&store.private("tmp"));
        }
        // Garbage collection holds it for seconds: wait.
        Ok(Self { store, _lock: Lock::shared(&path).on("lock", &path)? })
    }

    /// The store.
    pub fn store(&self) -> &'a Store {
        self.store
    }

    /// Creates a file to write a blob to. It is removed unless passed to [`Writer::commit`].
    pub fn temp(&self) -> Result<TempBlob, StoreError> {
        Ok(TempBlob::new(&self.store.private("tmp"))?)
    }

    /// Makes a finished temporary file the blob `digest`.
    ///
    /// The caller has hashed what it wrote; no one else can have written to the file.
    pub fn commit(&self, temp: TempBlob, digest: &Digest) -> Result<(), StoreError> {
        temp.file.set_permissions(Permissions::from_mode(0o444)).on("change the mode of", &temp.path)?;
        failpoint::hit("store.blob.written");
        temp.file.sync_all().on("sync", &temp.path)?;
        let path = self.store.blob_path(digest);
        failpoint::hit("store.blob.synced");
        // If the blob already exists, the new file replaces it: the same bytes, or a repaired copy.
        atomic::publish(&temp.path, &path, "store.blob").on("rename to", &path)?;
        temp.keep();
        Ok(())
    }

    /// Stores bytes from memory.
    pub fn put_bytes(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, StoreError> {
        let descriptor = Descriptor::of(media_type, bytes);
        // Small enough to compare the content rather than rely on the size.
        if self.store.has(&descriptor) && self.store.get(&descriptor.digest, descriptor.size).is_ok() {
            return Ok(descriptor);
        }
        let mut temp = self.temp()?;
        temp.file.write_all(bytes).on("write", &temp.path)?;
        self.commit(temp, &descriptor.digest)?;
        Ok(descriptor)
    }

    /// Begins to put many small blobs, which are synced together.
    pub fn batch(&self) -> Batch<'_> {
        Batch { store: self.store, written: Vec::new(), bytes: 0 }
    }

    /// Fetches a blob into a temporary file, checked against digest and size: for a blob that will be changed
    /// before it is stored.
    ///
    /// # Errors
    /// [`TransportError::SizeMismatch`] or [`TransportError::DigestMismatch`].
    pub fn receive(
        &self,
        from: &dyn Transport,
        blob: &Descriptor,
        task: &Task,
    ) -> Result<TempBlob, StoreError> {
        let object = format!("{} in {}", blob.digest, from.location());
        let mut temp = self.temp()?;
        let (found, size) = temp.fill(from.open(blob, 0)?, blob.size, task)?;
        if size != blob.size {
            return Err(TransportError::SizeMismatch { object, expected: blob.size, found: size }.into());
        }
        if found != blob.digest {
            return Err(TransportError::DigestMismatch { object, expected: blob.digest, found }.into());
        }
        Ok(temp)
    }

    /// Stores an artifact: its content, the empty config, and its manifest.
    ///
    /// The layer's media type is the artifact type. The manifest has no name yet.
    pub fn put_artifact(
        &self,
        artifact_type: &str,
        content: &[u8],
        subject: Option<&Descriptor>,
    ) -> Result<Descriptor, StoreError> {
        use crate::image::oci::{EMPTY, EMPTY_BYTES, MANIFEST};
        let layer = self.put_bytes(artifact_type, content)?;
        self.put_bytes(EMPTY, EMPTY_BYTES)?;
        // A subject is identified by type, digest and size alone (image-spec, manifest.md, `subject`).
        let subject = subject.map(|about| Descriptor::new(&about.media_type, about.digest, about.size));
        let manifest = Manifest::artifact(artifact_type, layer, subject).to_bytes();
        let mut descriptor = self.put_bytes(MANIFEST, &manifest)?;
        descriptor.artifact_type = Some(artifact_type.into());
        Ok(descriptor)
    }

    /// Changes `index.json` in one step: `entries` with a name replace the entry of that name, entries
    /// without a name are added once.
    ///
    /// Every blob that they reach must be in the store.
    pub fn set_entries(&self, entries: &[(Option<&str>, &Descriptor)]) -> Result<(), StoreError> {
        self.replace_entries(&[], entries, &[])
    }

    /// Does the same, and removes the entries without a name that have one of the digests in `remove`.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], and nothing changes, if a name of `fixed` stands for something else.
    pub fn replace_entries(
        &self,
        remove: &[Digest],
        entries: &[(Option<&str>, &Descriptor)],
        fixed: &[&str],
    ) -> Result<(), StoreError> {
        self.change_index(|index| {
            for (name, new) in entries.iter().filter_map(|(name, new)| Some(((*name)?, *new))) {
                let old = index.iter().find(|old| old.ref_name() == Some(name) && old.digest != new.digest);
                if let (Some(old), true) = (old, fixed.contains(&name)) {
                    return Err(StoreError::NameTaken {
                        name: name.into(),
                        found: old.digest,
                        expected: new.digest,
                    });
                }
            }
            index.retain(|old| old.ref_name().is_some() || !remove.contains(&old.digest));
            for (name, descriptor) in entries {
                let mut entry = (*descriptor).clone();
                entry.annotations.remove(REF_NAME);
                match name {
                    Some(name) => {
                        entry.annotations.insert(REF_NAME.into(), (*name).into());
                        // In the same position, so that an unchanged entry changes nothing.
                        let place = index.iter().position(|old| old.ref_name() == Some(*name));
                        let mut taken = place.is_none();
                        index.retain(|old| {
                            old.ref_name() != Some(*name) || !std::mem::replace(&mut taken, true)
                        });
                        match place.and_then(|place| index.get_mut(place)) {
                            Some(old) => *old = entry,
                            None => index.push(entry),
                        }
                    }
                    None => {
                        if !index.iter().any(|old| old.digest == entry.digest && old.ref_name().is_none()) {
                            index.push(entry);
                        }
                    }
                }
            }
            Ok(())
        })
    }

    /// Names a manifest; the previous holder of the name loses it.
    pub fn set_name(&self, name: &str, manifest: &Descriptor) -> Result<(), StoreError> {
        self.set_entries(&[(Some(name), manifest)])
    }

    /// Removes names; missing ones are ignored.
    pub fn remove_names(&self, names: &[&str]) -> Result<(), StoreError> {
        self.change_index(|index| {
            index.retain(|entry| entry.ref_name().is_none_or(|name| !names.contains(&name)));
            Ok(())
        })
    }

    /// Recreates `index.json` if it cannot be read; returns whether it did. The names in it are lost.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn mend_index(&self) -> Result<bool, StoreError> {
        let path = self.store.lock_path("index.lock")?;
        let _lock = Lock::exclusive(&path).on("lock", &path)?;
        if self.store.layout.index().is_ok() {
            return Ok(false);
        }
        replace_file(self.store.dir(), "index.json", &crate::image::index::Index::empty().to_bytes())?;
        Ok(true)
    }

    fn change_index(
        &self,
        change: impl FnOnce(&mut Vec<Descriptor>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        change_index(self.store, change)
    }
}

/// Small blobs that are put into a store together: written, synced at once, then given their names.
///
/// A sync costs about the same for one file and for a thousand, and a disk does few of them a second. What is
/// not finished when the batch is dropped leaves nothing.
pub struct Batch<'a> {
    store: &'a Store,
    /// Written, not synced, each with the blob that it becomes.
    written: Vec<(TempBlob, Digest)>,
    /// How many bytes they have.
    bytes: u64,
}

impl Batch<'_> {
    /// How many files are written before they are synced; each is open until then.
    const FILES: usize = 256;
    /// How many bytes are written before they are synced.
    const BYTES: u64 = 64 << 20;

    /// Puts bytes that the caller has hashed: `digest` is theirs. Returns whether they were written: a blob
    /// that is there with these bytes stays as it is.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put(&mut self, digest: &Digest, bytes: &[u8]) -> Result<bool, StoreError> {
        // Small enough to compare the content rather than rely on the size.
        let held = file::read_regular(&self.store.blob_path(digest), Links::Refused, bytes.len() as u64);
        if held.is_ok_and(|held| held == bytes) {
            return Ok(false);
        }
        let mut temp = TempBlob::new(&self.store.private("tmp"))?;
        temp.file.write_all(bytes).on("write", &temp.path)?;
        temp.file.set_permissions(Permissions::from_mode(0o444)).on("change the mode of", &temp.path)?;
        self.written.push((temp, *digest));
        self.bytes += bytes.len() as u64;
        if self.written.len() >= Self::FILES || self.bytes >= Self::BYTES {
            self.publish()?;
        }
        Ok(true)
    }

    /// Puts what is left.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn finish(mut self) -> Result<(), StoreError> {
        self.publish()
    }

    fn publish(&mut self) -> Result<(), StoreError> {
        let Some((first, _)) = self.written.first() else { return Ok(()) };
        failpoint::hit("store.batch.written");
        sync_file_system(&first.file).on("sync", &first.path)?;
        failpoint::hit("store.batch.synced");
        let folder = self.store.dir().join("blobs/sha256");
        for (temp, digest) in self.written.drain(..) {
            let path = self.store.blob_path(&digest);
            fs::rename(&temp.path, &path).on("rename to", &path)?;
            temp.keep();
            failpoint::hit("store.batch.renamed");
        }
        self.bytes = 0;
        atomic::sync_folder(&folder).on("sync", &folder)?;
        Ok(())
    }
}

/// Removes the temporary files of writers that died. The caller holds the store's lock, exclusive.
fn sweep(folder: &Path) {
    for (path, _) in files(folder).unwrap_or_default() {
        match fs::remove_file(&path) {
            Err(error) => log::warn!("{} stays: {error}", path.display()),
            Ok(()) => failpoint::hit("store.tmp.removed"),
        }
    }
}

/// Replaces `index.json` under its lock. The caller holds the store's lock, shared or exclusive.
pub(super) fn change_index(
    store: &Store,
    change: impl FnOnce(&mut Vec<Descriptor>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let path = store.lock_path("index.lock")?;
    let _lock = Lock::exclusive(&path).on("lock", &path)?;
    let mut index = store.layout.index()?;
    let before = index.manifests.clone();
    change(&mut index.manifests)?;
    if index.manifests != before {
        replace_file(store.dir(), "index.json", &index.to_bytes())?;
    }
    Ok(())
}

/// Atomically replaces a file at the top of the store. The caller holds `index.lock`.
pub(super) fn replace_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), IoError> {
    let (temporary, path) = (dir.join(".mosfs/tmp").join(name), dir.join(name));
    atomic::replace_through(&temporary, &path, bytes, 0o644, "store.index").on("replace", &path)
}

/// A file that is being written. Unlinked when dropped, unless it became a blob.
pub struct TempBlob {
    /// The file, empty at first, open for reading and writing.
    pub file: File,
    path: PathBuf,
    kept: bool,
}

impl TempBlob {
    fn new(folder: &Path) -> Result<Self, IoError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{}-{number}", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => return Ok(Self { file, path, kept: false }),
                // Left by a process with the same id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(IoError { operation: "create", path, source }),
            }
        }
    }

    /// A file that has its content already, such as one that was received in parts.
    pub(super) fn of(file: File, path: PathBuf) -> Self {
        Self { file, path, kept: false }
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn keep(mut self) {
        self.kept = true;
    }

    /// Fills the file from a blob, up to one byte beyond `size`; returns digest and size of the bytes read.
    fn fill(&mut self, blob: Blob, size: u64, task: &Task) -> Result<(Digest, u64), IoError> {
        let from = match &blob {
            Blob::File(file) if reflink(file, &self.file).is_ok() => {
                // Hash the clone: the original may change meanwhile.
                self.file.rewind().on("rewind", &self.path)?;
                let mine = self.file.try_clone().on("open", &self.path)?;
                return copy_hashing(mine, None, size, task, &self.path);
            }
            _ => blob,
        };
        copy_hashing(from, Some(&mut self.file), size, task, &self.path)
    }
}

impl Drop for TempBlob {
    fn drop(&mut self) {
        if !self.kept {
            // Garbage collection removes the file if this fails.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Reads to the end or one byte beyond `size`, hashes, and writes to `to`.
fn copy_hashing(
    from: impl Read,
    mut to: Option<&mut File>,
    size: u64,
    task: &Task,
    path: &Path,
) -> Result<(Digest, u64), IoError> {
    let mut from = from.take(size.saturating_add(1));
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; CHUNK_BYTES.min(size.saturating_add(1) as usize)];
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(IoError { operation: "fetch into", path: path.to_path_buf(), source }),
        };
        let bytes = buffer.get(..got).unwrap_or_default();
        hasher.update(bytes);
        if let Some(to) = &mut to {
            to.write_all(bytes).on("write", path)?;
        }
        task.advance(got as u64);
    }
    let bytes = hasher.bytes();
    Ok((hasher.finish(), bytes))
}
