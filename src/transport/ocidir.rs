//! An OCI image layout in a folder (image-spec, image-layout.md), as skopeo, umoci and stacker make it.
//!
//! ```text
//! DIR/oci-layout          {"imageLayoutVersion":"1.0.0"}
//! DIR/index.json          an image index; its entries are named by org.opencontainers.image.ref.name
//! DIR/blobs/sha256/HEX    the blobs
//! ```
//!
//! Nothing in the folder is believed: every document is hashed before it is parsed, no file is
//! read beyond its promised size, and what is not a regular file is not opened as one. Links are
//! followed, since what they lead to is checked all the same.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{Blob, Place, Transport, TransportError, names_of};
use crate::digest::Digest;
use crate::error::{IoContext, IoError};
use crate::image::blobs::{BlobFolder, Blobs};
use crate::image::oci::{Descriptor, Index, MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, Manifest};

/// An OCI image layout in a folder, to read from.
#[derive(Debug, Clone)]
pub struct OciDir {
    dir: PathBuf,
}

/// The content of `oci-layout`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutFile {
    image_layout_version: String,
}

/// Splits `DIR[:NAME]`; the folder ends at the first `:` (docs/design.md, source words).
pub(super) fn split(rest: &str) -> Option<Place> {
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let (dir, name) = match rest.split_once(':') {
        Some((_, "")) => return None,
        Some((dir, name)) => (dir, Some(name.to_string())),
        None => (rest, None),
    };
    (!dir.is_empty()).then(|| (dir.to_string(), name))
}

impl OciDir {
    /// Opens a layout.
    ///
    /// # Errors
    /// [`TransportError::NotALayout`].
    pub fn open(dir: &Path) -> Result<Self, TransportError> {
        let not = |why: String| TransportError::NotALayout { dir: dir.to_path_buf(), why };
        let bytes = match read_file(&dir.join("oci-layout"), 4096) {
            Ok(bytes) => bytes,
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                let what = if dir.is_dir() { "it has no file oci-layout" } else { "there is no such folder" };
                return Err(not(what.into()));
            }
            Err(error) => return Err(error.into()),
        };
        let layout: LayoutFile =
            serde_json::from_slice(&bytes).map_err(|error| not(format!("oci-layout: {error}")))?;
        if !layout.image_layout_version.starts_with("1.") {
            return Err(not(format!("its version is `{}`, expected 1.x", layout.image_layout_version)));
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a blob lies, or would lie.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        BlobFolder::of_layout(&self.dir).path(digest)
    }

    /// The blobs, for whoever mounts an image of this layout.
    pub fn blobs(&self) -> Arc<dyn Blobs> {
        Arc::new(BlobFolder::of_layout(&self.dir))
    }

    /// Reads `index.json`. A layout without one has no images.
    pub fn index(&self) -> Result<Index, TransportError> {
        let path = self.dir.join("index.json");
        let bytes = match read_file(&path, MAX_INDEX_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(Index::empty()),
            Err(error) => return Err(error.into()),
        };
        Index::parse(&bytes, MAX_INDEX_BYTES)
            .map_err(|source| TransportError::Document { object: path.display().to_string(), source })
    }

    /// Opens a blob's file and tells its size in bytes.
    ///
    /// # Errors
    /// [`TransportError::BlobMissing`].
    pub fn open_blob(&self, digest: &Digest) -> Result<(File, u64), TransportError> {
        let path = self.blob_path(digest);
        match open_regular(&path) {
            Ok(opened) => Ok(opened),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                Err(TransportError::BlobMissing { location: self.location(), digest: *digest })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a blob whole, checked against its digest; its size is only bounded.
    pub fn get(&self, digest: &Digest, max_bytes: u64) -> Result<Vec<u8>, TransportError> {
        let (_, size) = self.open_blob(digest)?;
        self.fetch(&Descriptor::new("", *digest, size), max_bytes)
    }
}

impl Transport for OciDir {
    fn location(&self) -> String {
        format!("oci:{}", self.dir.display())
    }

    fn entries(&self) -> Result<Vec<Descriptor>, TransportError> {
        Ok(self.index()?.manifests)
    }

    fn lookup(&self, name: &str) -> Result<Vec<Descriptor>, TransportError> {
        let entries = self.entries()?;
        let found: Vec<_> = entries.iter().filter(|one| one.ref_name() == Some(name)).cloned().collect();
        if found.is_empty() {
            let (location, available) = (self.location(), names_of(&entries));
            return Err(TransportError::NameMissing { location, name: name.into(), available });
        }
        Ok(found)
    }

    fn fetch(&self, blob: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, TransportError> {
        if blob.size > max_bytes {
            return Err(TransportError::TooBig { digest: blob.digest, size: blob.size, max: max_bytes });
        }
        let (file, size) = self.open_blob(&blob.digest)?;
        let path = self.blob_path(&blob.digest);
        let wrong_size = |found| TransportError::SizeMismatch {
            object: path.display().to_string(),
            expected: blob.size,
            found,
        };
        if size != blob.size {
            return Err(wrong_size(size));
        }
        let mut bytes = Vec::new();
        // One byte more than promised, so that a file that grows meanwhile is seen.
        file.take(blob.size + 1).read_to_end(&mut bytes).on("read", &path)?;
        if bytes.len() as u64 != blob.size {
            return Err(wrong_size(bytes.len() as u64));
        }
        let found = Digest::of(&bytes);
        if found != blob.digest {
            let object = path.display().to_string();
            return Err(TransportError::DigestMismatch { object, expected: blob.digest, found });
        }
        Ok(bytes)
    }

    fn open(&self, blob: &Digest) -> Result<Blob, TransportError> {
        Ok(Blob::File(self.open_blob(blob)?.0))
    }

    fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, TransportError> {
        let mut found = Vec::new();
        for entry in self.entries()? {
            // Every writer of referrers in a layout puts them in index.json, most with their type.
            let told = entry.artifact_type.as_deref();
            let other_type = told.is_some() && artifact_type.is_some() && told != artifact_type;
            if other_type || !entry.is_manifest() || entry.size > MAX_MANIFEST_BYTES {
                continue;
            }
            // One broken neighbour must not hide the others: `verify` names it.
            let Ok(bytes) = self.fetch(&entry, MAX_MANIFEST_BYTES) else { continue };
            let Ok(manifest) = Manifest::parse(&bytes) else { continue };
            let ours = manifest.subject.as_ref().is_some_and(|about| about.digest == *subject);
            if ours && artifact_type.is_none_or(|wanted| manifest.kind() == wanted) {
                found.push(entry);
            }
        }
        Ok(found)
    }
}

/// Opens a regular file for reading, with its size in bytes; a pipe or device is an error.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), IoError> {
    // O_NONBLOCK: opening a pipe that nobody writes to must not hang. It means nothing for files.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).on("open", path)?;
    let data = file.metadata().on("stat", path)?;
    if !data.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file");
        return Err(IoError { operation: "read", path: path.to_path_buf(), source });
    }
    Ok((file, data.len()))
}

/// Reads a small file whole.
pub(crate) fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>, IoError> {
    let (file, _) = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).on("read", path)?;
    if bytes.len() as u64 > max_bytes {
        let source =
            io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {max_bytes} bytes"));
        return Err(IoError { operation: "read", path: path.to_path_buf(), source });
    }
    Ok(bytes)
}
