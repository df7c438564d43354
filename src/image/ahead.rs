//! What opening an image begins with, read while its manifest is.
//!
//! A layer of many blobs is opened from its metadata, and to hash that takes as long as to read a manifest that lists
//! thousands of chunks. Neither depends on the other once the manifest has its digest.
//!
//! Nothing is trusted earlier than without it: what is read ahead has the checks of [`Blobs::read`], and only who asks for
//! that digest and size gets it.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::blobs::{Blob, BlobError, BlobProgress, Blobs};
use super::chunked::MAX_METADATA_BYTES;
use super::format::LayerFormat;
use super::oci::{Descriptor, OciError, OciImage};
use crate::digest::Digest;
use crate::sys::locks;

/// Less, in bytes, is read before a thread has started.
const FEW_BYTES: u64 = 512 << 10;

/// Reads a manifest, whose digest has just been checked, of an image that is opened next. Returns the blobs to open it
/// from; `blobs` has them all.
///
/// From here on a thread opens descriptors that are the image's. Whoever starts a daemon that closes those of others
/// lists them before.
///
/// # Errors
/// Those of [`OciImage::parse`].
pub fn parse(
    manifest: &[u8],
    digest: Digest,
    blobs: Arc<dyn Blobs>,
) -> Result<(OciImage, Arc<dyn Blobs>), OciError> {
    let metadata = first_layer(manifest).filter(|layer| is_worth_it(layer) && !blobs.is_remote());
    let ahead = metadata.and_then(|metadata| Ahead::start(&metadata, &blobs));
    let image = OciImage::of(manifest, digest)?;
    let blobs = match ahead {
        Some(ahead) if image.layers.iter().any(|layer| ahead.is(&layer.digest, layer.size)) => {
            Arc::new(ahead)
        }
        _ => blobs,
    };
    Ok((image, blobs))
}

/// Returns the first layer of a manifest as it is mostly written. It may be another one, of something within the
/// manifest.
fn first_layer(manifest: &[u8]) -> Option<Descriptor> {
    const BEFORE: &[u8] = br#""layers":["#;
    let at = manifest.windows(BEFORE.len()).position(|bytes| bytes == BEFORE)?;
    serde_json::Deserializer::from_slice(&manifest[at + BEFORE.len()..]).into_iter().next()?.ok()
}

fn is_worth_it(layer: &Descriptor) -> bool {
    let is_chunked = LayerFormat::of(&layer.media_type).is_some_and(LayerFormat::is_chunked);
    is_chunked && (FEW_BYTES..=MAX_METADATA_BYTES).contains(&layer.size)
}

/// Blobs, one of which has been asked for.
#[derive(Debug)]
struct Ahead {
    blobs: Arc<dyn Blobs>,
    digest: Digest,
    size: u64,
    /// What reads it, until somebody has got it.
    thread: Mutex<Option<JoinHandle<Result<Vec<u8>, BlobError>>>>,
}

impl Ahead {
    /// Starts to read a blob. Where there may be no other thread, it is read when it is asked for.
    fn start(blob: &Descriptor, blobs: &Arc<dyn Blobs>) -> Option<Self> {
        let (digest, size) = (blob.digest, blob.size);
        let read = {
            let blobs = Arc::clone(blobs);
            move || {
                let mut bytes = Vec::new();
                blobs.read(&digest, size, &mut bytes).map(|()| bytes)
            }
        };
        let thread = thread::Builder::new().name("read-ahead".into()).spawn(read).ok()?;
        Some(Self { blobs: Arc::clone(blobs), digest, size, thread: Mutex::new(Some(thread)) })
    }

    /// Whether that is the blob.
    fn is(&self, digest: &Digest, stored_bytes: u64) -> bool {
        (digest, stored_bytes) == (&self.digest, self.size)
    }

    /// Waits for the blob, and returns it once.
    fn take(&self) -> Option<Result<Vec<u8>, BlobError>> {
        let thread = locks::lock(&self.thread).take()?;
        thread.join().ok()
    }
}

/// A process with a thread that nobody waits for could not fork.
impl Drop for Ahead {
    fn drop(&mut self) {
        self.take();
    }
}

impl Blobs for Ahead {
    fn blob(&self, digest: &Digest, stored_bytes: u64) -> Blob {
        self.blobs.blob(digest, stored_bytes)
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        if self.is(digest, stored_bytes)
            && let Some(read) = self.take()
        {
            bytes.clear();
            *bytes = read?;
            return Ok(());
        }
        self.blobs.read(digest, stored_bytes, bytes)
    }

    fn is_remote(&self) -> bool {
        self.blobs.is_remote()
    }

    fn start(&self) -> io::Result<()> {
        self.blobs.start()
    }

    fn progress(&self) -> Vec<BlobProgress> {
        self.blobs.progress()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::image::blobs::BlobFolder;
    use crate::image::puzzlefs::ROOTFS;
    use crate::sys::file::Links;

    fn folder(dir: &Path) -> Arc<dyn Blobs> {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        Arc::new(BlobFolder::of_layout(dir, Links::Refused))
    }

    fn manifest(before: &str, layer: &Descriptor) -> Vec<u8> {
        let layer = serde_json::to_string(layer).unwrap();
        let config = serde_json::to_string(&Descriptor::of("c", b"")).unwrap();
        format!(r#"{{"schemaVersion":2,{before}"config":{config},"layers":[{layer}]}}"#).into_bytes()
    }

    fn parse(manifest: &[u8], blobs: &Arc<dyn Blobs>) -> (OciImage, Arc<dyn Blobs>) {
        super::parse(manifest, Digest::of(manifest), Arc::clone(blobs)).unwrap()
    }

    #[test]
    fn metadata_is_read_once_and_then_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let plain = folder(dir.path());
        let content = vec![7; FEW_BYTES as usize];
        let layer = Descriptor::of(ROOTFS, &content);
        let path = plain.blob(&layer.digest, 0).file().unwrap().to_path_buf();
        fs::write(&path, &content).unwrap();

        let (image, blobs) = parse(&manifest("", &layer), &plain);
        assert_eq!(image.layers[0].digest, layer.digest);
        let mut bytes = b"what was there".to_vec();
        blobs.read(&layer.digest, layer.size, &mut bytes).unwrap();
        assert!(bytes == content);
        // What it is now, and not what it was.
        fs::write(&path, b"other").unwrap();
        let error = blobs.read(&layer.digest, layer.size, &mut bytes).unwrap_err();
        assert!(matches!(error, BlobError::Size { found: 5, .. }), "{error}");
        assert!(bytes.is_empty());
    }

    #[test]
    fn metadata_that_is_wrong_is_the_error_of_who_asks_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let plain = folder(dir.path());
        let mut content = vec![7; FEW_BYTES as usize];
        let layer = Descriptor::of(ROOTFS, &content);
        let path = plain.blob(&layer.digest, 0).file().unwrap().to_path_buf();
        content[1000] ^= 1;
        fs::write(&path, &content).unwrap();

        let (_, blobs) = parse(&manifest("", &layer), &plain);
        let mut bytes = b"what was there".to_vec();
        // It would not get another blob's, nor one of another size.
        let other = Digest::of(b"other");
        assert!(matches!(blobs.read(&other, layer.size, &mut bytes), Err(BlobError::Io { .. })));
        let shorter = blobs.read(&layer.digest, layer.size - 1, &mut bytes);
        assert!(matches!(shorter, Err(BlobError::Size { .. })));
        let error = blobs.read(&layer.digest, layer.size, &mut bytes).unwrap_err();
        assert!(matches!(error, BlobError::Content { expected, .. } if expected == layer.digest), "{error}");
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_manifest_decides_what_its_layer_is() {
        let dir = tempfile::tempdir().unwrap();
        let plain = folder(dir.path());
        let content = vec![7; FEW_BYTES as usize];
        let (layer, small) = (Descriptor::of(ROOTFS, &content), Descriptor::of(ROOTFS, b"small"));
        for (bytes, path) in [(&content[..], &layer), (b"small", &small)] {
            fs::write(plain.blob(&path.digest, 0).file().unwrap(), bytes).unwrap();
        }
        // Other layers stand before those of the image.
        let decoy = serde_json::to_string(&layer).unwrap();
        let manifest = manifest(&format!(r#""other":{{"layers":[{decoy}]}},"#), &small);
        let (image, blobs) = parse(&manifest, &plain);
        assert_eq!((image.layers.len(), image.layers[0].digest), (1, small.digest));
        let mut bytes = Vec::new();
        blobs.read(&small.digest, small.size, &mut bytes).unwrap();
        assert_eq!(bytes, b"small");
        // What was read for nothing is not kept.
        fs::write(plain.blob(&layer.digest, 0).file().unwrap(), b"other").unwrap();
        let error = blobs.read(&layer.digest, layer.size, &mut bytes).unwrap_err();
        assert!(matches!(error, BlobError::Size { found: 5, .. }), "{error}");

        for no_image in [&b""[..], br#"{"layers":["#, br#"{"layers":[7]}"#, b"\xff"] {
            assert!(super::parse(no_image, Digest::of(no_image), Arc::clone(&plain)).is_err());
        }
    }
}
