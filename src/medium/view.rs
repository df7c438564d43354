//! The store of a medium, read from its image without unpacking it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::iso9660::Extent;
use crate::digest::Digest;
use crate::error::IoError;
use crate::image::blobs::{Blob as LayerBlob, BlobError, Blobs, read_whole};
use crate::image::bytes::ReadAt;
use crate::image::files::Files;
use crate::image::index::Index;
use crate::image::oci::{Descriptor, MAX_MANIFEST_BYTES, Manifest, OciImage};
use crate::store::view::{self, ViewError};
use crate::transport::{Blob, Transport, TransportError, names_of};

/// A part of an image.
#[derive(Debug, Clone)]
pub(super) struct Part {
    file: Arc<File>,
    extent: Extent,
}

impl Part {
    /// Its bytes, from `offset` on.
    pub(super) fn reader(self, offset: u64) -> impl Read + Send {
        PartReader { at: offset.min(self.extent.size), part: self }
    }
}

impl ReadAt for Part {
    fn len(&self) -> io::Result<u64> {
        Ok(self.extent.size)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.extent.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        ReadAt::read_exact_at(&*self.file, buffer, self.extent.at + offset)
    }
}

struct PartReader {
    part: Part,
    at: u64,
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.part.extent.size - self.at;
        let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.part.read_exact_at(&mut buffer[..length], self.at)?;
        self.at += length as u64;
        Ok(length)
    }
}

/// The layout on a medium.
#[derive(Debug, Clone)]
pub(super) struct MediumStore {
    /// The image, as a user writes it.
    location: String,
    file: Arc<File>,
    blobs: Arc<BTreeMap<Digest, Extent>>,
    index: Arc<Index>,
}

impl MediumStore {
    pub(super) fn new(
        location: String,
        file: Arc<File>,
        blobs: BTreeMap<Digest, Extent>,
        index: Index,
    ) -> Self {
        Self { location, file, blobs: Arc::new(blobs), index: Arc::new(index) }
    }

    pub(super) fn part(&self, digest: &Digest) -> Option<Part> {
        let extent = *self.blobs.get(digest)?;
        Some(Part { file: Arc::clone(&self.file), extent })
    }

    fn blob_of(&self, digest: &Digest) -> Result<Part, TransportError> {
        let missing = || TransportError::BlobMissing { location: self.location.clone(), digest: *digest };
        self.part(digest).ok_or_else(missing)
    }

    /// The files of an image. Every block is verified when it is read.
    ///
    /// # Errors
    /// [`ViewError`].
    pub(super) fn files(&self, image: &OciImage) -> Result<Files, ViewError> {
        let missing = || IoError::new("open", &self.location, io::ErrorKind::NotFound.into());
        let open = |digest: &Digest| Ok(self.part(digest).ok_or_else(missing)?);
        view::files(image, open, || Arc::new(self.clone()))
    }
}

impl Transport for MediumStore {
    fn location(&self) -> String {
        self.location.clone()
    }

    fn entries(&self) -> Result<Vec<Descriptor>, TransportError> {
        Ok(self.index.manifests.clone())
    }

    fn lookup(&self, name: &str) -> Result<Vec<Descriptor>, TransportError> {
        let all = &self.index.manifests;
        let found: Vec<_> = all.iter().filter(|one| one.ref_name() == Some(name)).cloned().collect();
        if found.is_empty() {
            let (location, available) = (self.location(), names_of(all));
            return Err(TransportError::NameMissing { location, name: name.into(), available });
        }
        Ok(found)
    }

    fn fetch(&self, blob: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, TransportError> {
        if blob.size > max_bytes {
            return Err(TransportError::TooBig { digest: blob.digest, size: blob.size, max: max_bytes });
        }
        let part = self.blob_of(&blob.digest)?;
        let object = format!("{} in {}", blob.digest, self.location);
        if part.extent.size != blob.size {
            let (expected, found) = (blob.size, part.extent.size);
            return Err(TransportError::SizeMismatch { object, expected, found });
        }
        let mut bytes = vec![0; blob.size as usize];
        part.read_exact_at(&mut bytes, 0).map_err(|source| IoError::new("read", &self.location, source))?;
        let found = Digest::of(&bytes);
        if found != blob.digest {
            return Err(TransportError::DigestMismatch { object, expected: blob.digest, found });
        }
        Ok(bytes)
    }

    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Blob, TransportError> {
        Ok(Blob::Stream(Box::new(self.blob_of(&blob.digest)?.reader(offset))))
    }

    fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, TransportError> {
        let mut found = Vec::new();
        for entry in &self.index.manifests {
            if !entry.is_manifest() || entry.size > MAX_MANIFEST_BYTES {
                continue;
            }
            let manifest = Manifest::parse(&self.fetch(entry, MAX_MANIFEST_BYTES)?).map_err(|source| {
                TransportError::Document { object: format!("{} in {}", entry.digest, self.location), source }
            })?;
            if manifest.refers_to(subject, artifact_type) {
                found.push(entry.clone());
            }
        }
        Ok(found)
    }

    fn tags(&self, repository: &str) -> Result<Vec<String>, TransportError> {
        Ok(self.index.manifests.iter().filter_map(|entry| entry.tag_in(repository)).collect())
    }

    fn within(&self, _repository: &str) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(self.clone()))
    }
}

impl Blobs for MediumStore {
    fn blob(&self, digest: &Digest, _stored_bytes: u64) -> LayerBlob {
        let none = Part { file: Arc::clone(&self.file), extent: Extent { at: 0, size: 0 } };
        let bytes = Arc::new(self.part(digest).unwrap_or(none));
        LayerBlob::Remote { place: format!("{digest} in {}", self.location), bytes }
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        bytes.clear();
        let missing = || BlobError::Io { digest: *digest, source: io::ErrorKind::NotFound.into() };
        let part = self.part(digest).ok_or_else(missing)?;
        if part.extent.size != stored_bytes {
            return Err(BlobError::Size { digest: *digest, expected: stored_bytes, found: part.extent.size });
        }
        read_whole(part.reader(0), digest, stored_bytes, bytes)
    }
}
