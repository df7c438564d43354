//! An OCI image layout in a folder (image-spec, image-layout.md), as skopeo, umoci and stacker make it.
//!
//! ```text
//! DIR/oci-layout          {"imageLayoutVersion":"1.0.0"}
//! DIR/index.json          an image index; its entries are named by org.opencontainers.image.ref.name
//! DIR/blobs/sha256/HEX    the blobs
//! ```
//!
//! Nothing in the folder is believed: every document is hashed before it is parsed, no file is
//! read beyond its promised size, and what is not a regular file is not opened. Links to regular
//! files are followed, because some tools make blobs so and what they lead to is checked all the
//! same; in the store of a device, where mosfs makes none, they are refused.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{Blob, NamedLocation, Transport, TransportError, names_of};
use crate::digest::{Digest, split_pin};
use crate::error::{IoContext, IoError};
use crate::image::blobs::{BlobError, BlobFolder, Blobs, read_whole};
use crate::image::index::{Index, MAX_INDEX_BYTES};
use crate::image::oci::{Descriptor, INDEX, MANIFEST, MAX_MANIFEST_BYTES, Manifest};
use crate::sys::file::{self, Links};

/// An OCI image layout in a folder, to read from.
#[derive(Debug, Clone)]
pub struct OciDir {
    dir: PathBuf,
    links: Links,
}

/// The content of `oci-layout`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutFile {
    image_layout_version: String,
}

/// Splits `DIR[:NAME]` or `DIR@sha256:HEX`; the folder ends at the first `:` (docs/design.md, source words), or at
/// the `@` before a digest. The name by digest is `@sha256:HEX`.
pub(super) fn split(rest: &str) -> Result<NamedLocation, &'static str> {
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    if let Some((dir, digest)) = split_pin(rest)
        && !dir.contains(':')
    {
        return match dir {
            "" => Err("the folder is empty"),
            _ => Ok((dir.to_string(), Some(format!("@{digest}")))),
        };
    }
    let (dir, name) = match rest.split_once(':') {
        Some((_, "")) => return Err("the name after the colon is empty"),
        // It would be written like a digest.
        Some((_, name)) if name.starts_with('@') => return Err("a name does not begin with `@`"),
        Some((dir, name)) => (dir, Some(name.to_string())),
        None => (rest, None),
    };
    if dir.is_empty() { Err("the folder is empty") } else { Ok((dir.to_string(), name)) }
}

impl OciDir {
    /// Opens a layout.
    ///
    /// # Errors
    /// [`TransportError::NotALayout`].
    pub fn open(dir: &Path) -> Result<Self, TransportError> {
        Self::open_with(dir, Links::Followed)
    }

    /// Opens a layout whose files may or may not be links.
    ///
    /// # Errors
    /// [`TransportError::NotALayout`].
    pub(crate) fn open_with(dir: &Path, links: Links) -> Result<Self, TransportError> {
        let not = |why: String| TransportError::NotALayout { dir: dir.to_path_buf(), why };
        if dir.is_file() {
            let file = dir.display();
            return Err(not(format!(
                "it is a file; `skopeo copy oci-archive:{file} oci:DIR:NAME` unpacks an archive of a layout, \
                 `skopeo copy docker-archive:{file} oci:DIR:NAME` one of docker save"
            )));
        }
        let Some(bytes) = file::find_regular(&dir.join("oci-layout"), links, 4096)? else {
            return Err(not(match dir.is_dir() {
                false => "there is no such folder".into(),
                // What skopeo's transport `dir:` writes.
                true if dir.join("version").exists() && dir.join("manifest.json").exists() => format!(
                    "it has no file oci-layout; `skopeo copy dir:{} oci:DIR:NAME` makes a layout of it",
                    dir.display()
                ),
                true => "it has no file oci-layout".into(),
            }));
        };
        let layout: LayoutFile =
            serde_json::from_slice(&bytes).map_err(|error| not(format!("oci-layout: {error}")))?;
        if !layout.image_layout_version.starts_with("1.") {
            return Err(not(format!("its version is `{}`, expected 1.x", layout.image_layout_version)));
        }
        Ok(Self { dir: dir.to_path_buf(), links })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a blob lies, or would lie.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blob_folder().path(digest)
    }

    /// The blobs, to mount an image of this layout.
    pub fn blobs(&self) -> Arc<dyn Blobs> {
        Arc::new(self.blob_folder())
    }

    pub(crate) fn blob_folder(&self) -> BlobFolder {
        BlobFolder::of_layout(&self.dir, self.links)
    }

    /// Reads `index.json`. A layout without one has no images.
    pub fn index(&self) -> Result<Index, TransportError> {
        let path = self.dir.join("index.json");
        let Some(bytes) = file::find_regular(&path, self.links, MAX_INDEX_BYTES)? else {
            return Ok(Index::empty());
        };
        Index::parse(&bytes, MAX_INDEX_BYTES)
            .map_err(|source| TransportError::Document { object: path.display().to_string(), source })
    }

    /// Opens a blob's file and returns it with its size in bytes.
    ///
    /// # Errors
    /// [`TransportError::BlobMissing`].
    pub fn open_blob(&self, digest: &Digest) -> Result<(File, u64), TransportError> {
        let path = self.blob_path(digest);
        match file::open_regular(&path, self.links) {
            Ok(opened) => Ok(opened),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                Err(TransportError::BlobMissing { location: self.location(), digest: *digest })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What a digest names: an entry of `index.json`, or any manifest or index that is there as a blob.
    fn by_digest(&self, entries: Vec<Descriptor>, digest: &Digest) -> Result<Descriptor, TransportError> {
        if let Some(entry) = entries.into_iter().find(|entry| entry.digest == *digest) {
            // Whoever names it so has chosen already.
            return Ok(Descriptor { platform: None, ..entry });
        }
        let bytes = self.get(digest, MAX_MANIFEST_BYTES)?;
        let media_type =
            if Index::parse(&bytes, MAX_MANIFEST_BYTES).is_ok_and(|index| !index.manifests.is_empty()) {
                INDEX
            } else {
                MANIFEST
            };
        Ok(Descriptor::new(media_type, *digest, bytes.len() as u64))
    }

    /// Whether links to files are followed.
    pub(crate) fn links(&self) -> Links {
        self.links
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
        let Index { manifests: entries, unread, .. } = self.index()?;
        if let Some(("", digest)) = split_pin(name) {
            return Ok(vec![self.by_digest(entries, &digest)?]);
        }
        let found: Vec<_> = entries.iter().filter(|one| one.ref_name() == Some(name)).cloned().collect();
        if found.is_empty() {
            if let Some(entry) = unread.iter().find(|entry| entry.ref_name() == Some(name)) {
                let (object, why) = (format!("{}:{name}", self.location()), entry.why());
                return Err(TransportError::UnreadableEntry { object, why });
            }
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
        read_whole(file, &blob.digest, blob.size, &mut bytes).map_err(|error| match error {
            BlobError::Io { source, .. } => IoError::new("read", &path, source).into(),
            BlobError::Size { found, .. } => wrong_size(found),
            BlobError::Content { expected, found } => {
                TransportError::DigestMismatch { object: path.display().to_string(), expected, found }
            }
        })?;
        Ok(bytes)
    }

    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Blob, TransportError> {
        let (mut file, _) = self.open_blob(&blob.digest)?;
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).on("seek in", self.blob_path(&blob.digest))?;
        }
        Ok(Blob::File(file))
    }

    fn tags(&self, repository: &str) -> Result<Vec<String>, TransportError> {
        let entries = self.entries()?;
        Ok(entries.iter().filter_map(|entry| entry.tag_in(repository)).collect())
    }

    fn within(&self, _repository: &str) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(self.clone()))
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
            if manifest.refers_to(subject, artifact_type) {
                found.push(entry);
            }
        }
        Ok(found)
    }
}
