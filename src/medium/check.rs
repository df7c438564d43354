//! Checks the image of a medium: that it is what `mosfs iso` writes of a system, and that the system is signed.
//!
//! 1. every byte that is no content is as it must be ([`super::read`]); no files but those of a medium
//! 2. the signature, against the CA and the product that are given; the floor signatures, where the floor key is known
//! 3. `/store` has this system, all of it, and nothing else; every blob has its digest, and every layer its root hash
//! 4. the EFI system partition is made anew of the target `boot`, and compared byte for byte
//! 5. the kernel id is computed again from the kernel and its initramfs
//!
//! Nothing is read before it is bounded by the size of the image or by what is signed, and nothing is unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::content::{self, BLOBS, Content, INDEX_FILE, OCI_LAYOUT, OCI_LAYOUT_FILE};
use super::error::MediumError;
use super::fat;
use super::iso9660::Image;
use super::layout::{ANSWERS, ENROLL, ENROLL_FILES, MEDIUM_FILE, Medium};
use super::read::{self, ReadError};
use super::view::MediumStore;
use crate::deploy::offer::{Judge, find, find_whole};
use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::image::bytes::ReadAt;
use crate::image::check::content as check_content;
use crate::image::format::{ChunkedLayer, Content as LayerContent};
use crate::image::index::{Index, MAX_INDEX_BYTES};
use crate::image::oci::{MAX_MANIFEST_BYTES, OciImage};
use crate::image::verified::VerifiedSource;
use crate::manifest::ServiceType;
use crate::progress::Progress;
use crate::publish::boot::inspect;
use crate::store::fsck;
use crate::sys::file::open_image;
use crate::transport::Transport;

/// Largest file besides blobs, in bytes.
const MAX_SMALL: u64 = 1 << 20;
/// Most entries of the index: images, and what is said of the system.
const MAX_DOCUMENTS: usize = 4096;

/// A medium that is as it must be.
#[derive(Debug, Clone)]
pub struct Checked {
    /// What it says about itself.
    pub medium: Medium,
    /// The size of the image in bytes.
    pub size_bytes: u64,
    /// How many blobs it has.
    pub blobs: usize,
    /// The kernel id.
    pub kernel_id: Digest,
    /// The answers on it. They are not signed.
    pub answers: Option<Vec<u8>>,
    /// Whether it has keys to enroll. They are not signed by the system's signer.
    pub enrolls: bool,
}

/// What is wrong with a medium.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub(super) struct NotAsWritten {
    /// The image.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: Problem,
}

/// The same, without the image.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    /// The image itself.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file that no medium has.
    #[error("/{0} does not belong on an install medium")]
    Extra(String),
    /// A file with other content than it must have.
    #[error("/{path} {why}")]
    Other {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// A blob that no part of the system reaches.
    #[error("blob {0} is not part of the system")]
    ExtraBlob(Digest),
    /// A blob is wrong.
    #[error("blob {digest}: {why}")]
    Blob {
        /// The blob.
        digest: Digest,
        /// What is wrong with it.
        why: String,
    },
    /// A layer does not have its root hash.
    #[error("target `{target}`: layer {layer}: {why}")]
    Layer {
        /// The target.
        target: String,
        /// The layer.
        layer: Digest,
        /// What is wrong with it.
        why: String,
    },
    /// The system has no hostfs to compare the kernel with.
    #[error("the system has no hostfs, which its kernel was made of")]
    NoHostfs,
    /// The kernel is not what its target says.
    #[error("target `boot`: its kernel id is {expected}, computed: {found}")]
    KernelId {
        /// What the annotation says.
        expected: Digest,
        /// What was computed.
        found: Digest,
    },
    /// What cannot be read of it, or does not verify.
    #[error(transparent)]
    Inner(AnyError),
}

impl Classified for NotAsWritten {
    fn class(&self) -> Class {
        match &self.problem {
            Problem::Read(error) => error.class(),
            Problem::Inner(error) => match error.class() {
                // Whatever is wrong with the documents of a medium, also that they name what is not on it: it does not
                // verify. Only a medium that cannot be read fails otherwise.
                Class::Input => Class::Verification,
                Class::Failure if !is_io(error.inner()) => Class::Verification,
                class => class,
            },
            _ => Class::Verification,
        }
    }
}

/// Whether an error comes from reading.
fn is_io(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<io::Error>())
}

fn inner(error: impl Into<AnyError>) -> Problem {
    Problem::Inner(error.into())
}

/// Checks an image, or the device that it was written to.
///
/// # Errors
/// [`NotAsWritten`]; [`crate::error::IoError`] if there is no such file.
pub fn check(
    path: &Path,
    judge: &Judge<'_>,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Checked, AnyError> {
    let file = open_image(path)?;
    let is_device = !file.metadata().on("stat", path)?.is_file();
    let check = Check { path, file: Arc::new(file), threads, progress };
    check.run(judge, is_device).map_err(|problem| NotAsWritten { path: path.to_path_buf(), problem }.into())
}

/// Reads everything small that the index names, so that the error is about the blob which is damaged: whoever looks for a
/// system passes over what cannot be read.
fn documents(from: &dyn Transport) -> Result<(), Problem> {
    let entries = from.entries().map_err(inner)?;
    if entries.len() > MAX_DOCUMENTS {
        let why = format!("has {} entries, expected at most {MAX_DOCUMENTS}", entries.len());
        return Err(Problem::Other { path: INDEX_FILE.into(), why });
    }
    let mut seen = BTreeSet::new();
    for entry in entries {
        if !seen.insert(entry.digest) {
            continue;
        }
        let manifest = from.manifest(&entry).map_err(inner)?;
        let layers = manifest.layers.iter().filter(|_| entry.artifact_type.is_some());
        for blob in layers.filter(|blob| seen.insert(blob.digest)) {
            from.fetch(blob, MAX_MANIFEST_BYTES).map_err(inner)?;
        }
    }
    Ok(())
}

struct Check<'a> {
    path: &'a Path,
    file: Arc<File>,
    threads: NonZeroUsize,
    progress: &'a Progress,
}

impl Check<'_> {
    fn run(&self, judge: &Judge<'_>, is_device: bool) -> Result<Checked, Problem> {
        let (medium, image) = read::read(&*self.file, is_device)?;
        let store = self.store(&image)?;
        let from: &dyn Transport = &store;
        documents(from)?;
        let accepted = find(from, None, judge).map_err(inner)?.taken;
        let content = Content::of(from, &find_whole(from, None).map_err(inner)?).map_err(inner)?;
        let other = |path: &str, why: &str| Problem::Other { path: path.into(), why: why.into() };
        // The one that was verified is the only one.
        if accepted.verified.digest() != content.medium.system {
            return Err(other(INDEX_FILE, "names another system besides the one that verifies"));
        }
        if medium != content.medium {
            return Err(other(MEDIUM_FILE, "names another system than the one in /store"));
        }
        if self.small(&image, INDEX_FILE, MAX_INDEX_BYTES)? != content.index {
            return Err(other(INDEX_FILE, "is not that of this system alone"));
        }
        self.blobs(&image, &store, &content)?;
        for (name, descriptor) in &content.images {
            let read = from.image(descriptor).map_err(inner)?;
            self.layers(&store, name, &read)?;
        }
        let kernel_id = self.boot(&image, &store, &content)?;
        let answers = match image.files.contains_key(ANSWERS) {
            true => Some(self.small(&image, ANSWERS, MAX_SMALL)?),
            false => None,
        };
        let enrolls = image.files.keys().any(|path| path.starts_with(ENROLL));
        let blobs = content.blobs.len();
        Ok(Checked { medium, size_bytes: image.size, blobs, kernel_id, answers, enrolls })
    }

    /// Returns the layout on the medium. Rule: a medium has no other files.
    fn store(&self, image: &Image) -> Result<MediumStore, Problem> {
        let mut blobs = BTreeMap::new();
        for (path, extent) in &image.files {
            let below = |folder: &str| path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
            let known = [MEDIUM_FILE, ANSWERS, INDEX_FILE, OCI_LAYOUT_FILE].contains(&path.as_str())
                || below(ENROLL).is_some_and(|name| ENROLL_FILES.contains(&name));
            match below(BLOBS).and_then(|name| Digest::from_hex(name).ok()) {
                Some(digest) => drop(blobs.insert(digest, *extent)),
                None if known => {}
                None => return Err(Problem::Extra(path.clone())),
            }
        }
        if self.small(image, OCI_LAYOUT_FILE, MAX_SMALL)? != OCI_LAYOUT {
            return Err(Problem::Other {
                path: OCI_LAYOUT_FILE.into(),
                why: "is not as mosfs writes it".into(),
            });
        }
        let index = self.small(image, INDEX_FILE, MAX_INDEX_BYTES)?;
        let index = Index::parse(&index, MAX_INDEX_BYTES)
            .map_err(|error| Problem::Other { path: INDEX_FILE.into(), why: error.to_string() })?;
        let location = format!("{}/store", self.path.display());
        Ok(MediumStore::new(location, Arc::clone(&self.file), blobs, index))
    }

    fn small(&self, image: &Image, path: &str, max: u64) -> Result<Vec<u8>, Problem> {
        let extent = image.files.get(path).ok_or_else(|| ReadError::Missing(path.to_string()))?;
        if extent.size > max {
            let why = format!("has {} bytes, expected at most {max}", extent.size);
            return Err(Problem::Other { path: path.into(), why });
        }
        let mut bytes = vec![0; extent.size as usize];
        ReadAt::read_exact_at(&*self.file, &mut bytes, extent.at).map_err(ReadError::from)?;
        Ok(bytes)
    }

    /// Hashes every blob. Rule: those of the system are there, with their sizes, and no others.
    fn blobs(&self, image: &Image, store: &MediumStore, content: &Content) -> Result<(), Problem> {
        let wrong = |digest: &Digest, why: String| Problem::Blob { digest: *digest, why };
        for (digest, size) in &content.blobs {
            let extent = image.files.get(&Content::blob_path(digest));
            let extent = extent.ok_or_else(|| wrong(digest, "it is missing".into()))?;
            if extent.size != *size {
                return Err(wrong(digest, format!("it has {} bytes, expected {size}", extent.size)));
            }
        }
        let here = image.files.keys().filter_map(|path| path.strip_prefix(BLOBS)?.strip_prefix('/'));
        let extra = here
            .filter_map(|name| Digest::from_hex(name).ok())
            .find(|digest| !content.blobs.contains_key(digest));
        if let Some(digest) = extra {
            return Err(Problem::ExtraBlob(digest));
        }
        let total = content.blobs.values().sum();
        let task = self.progress.task("verify", &self.path.display().to_string(), Some(total));
        let blobs: Vec<_> = content.blobs.iter().map(|(digest, size)| (*digest, *size)).collect();
        let bad = fsck::other_content(&blobs, self.threads, |digest| {
            let part = store.part(digest).ok_or(io::ErrorKind::NotFound)?;
            fsck::hash(part.reader(0), &task)
        });
        match bad.into_iter().next() {
            None => Ok(()),
            Some((digest, Ok(found))) => Err(wrong(&digest, format!("its content has digest {found}"))),
            Some((_, Err(error))) => Err(ReadError::from(error).into()),
        }
    }

    /// Reads every layer through its verity tree, and decodes every layer of many blobs.
    fn layers(&self, store: &MediumStore, target: &str, image: &OciImage) -> Result<(), Problem> {
        for layer in &image.layers {
            let wrong = |why: String| Problem::Layer { target: target.into(), layer: layer.digest, why };
            let format = layer.format().map_err(|error| wrong(error.to_string()))?;
            match format.content() {
                LayerContent::Image(_) => {
                    let part = store.part(&layer.digest).ok_or_else(|| wrong("it is missing".into()))?;
                    let Some(root_hash) = layer.trust.root_hash() else {
                        return Err(wrong("it has no root hash".into()));
                    };
                    let source =
                        VerifiedSource::open(part, root_hash).map_err(|error| wrong(error.to_string()))?;
                    if let Some(bad) = source.verify_all(self.threads, self.progress).bad.first() {
                        return Err(wrong(bad.to_string()));
                    }
                }
                LayerContent::Chunked(format) => {
                    let Some(open) = format.open else {
                        return Err(wrong("there is no reader for it".into()));
                    };
                    let blobs = Arc::new(store.clone());
                    let chunks = Arc::clone(&image.chunks);
                    let chunked = ChunkedLayer { digest: layer.digest, size: layer.size, chunks, blobs };
                    let opened = open(&chunked).map_err(|error| wrong(error.to_string()))?;
                    if let Some(bad) = check_content(&*opened, self.threads, self.progress).first() {
                        return Err(wrong(bad.to_string()));
                    }
                }
                // It was hashed whole.
                LayerContent::Tar(_) => {}
            }
        }
        Ok(())
    }

    /// Compares the EFI system partition with the one that the target `boot` makes, and computes the kernel id.
    fn boot(&self, image: &Image, store: &MediumStore, content: &Content) -> Result<Digest, Problem> {
        let from: &dyn Transport = store;
        let files = |image: &OciImage| store.files(image).map_err(|error| inner(MediumError::from(error)));
        let boot_image = from.image(&content.boot).map_err(inner)?;
        let (uki, loader) =
            content::programs(&files(&boot_image)?, content.manifest.version).map_err(inner)?;
        let hostfs =
            content.manifest.targets.iter().find(|(_, target)| target.service_type == ServiceType::Hostfs);
        let hostfs = hostfs.ok_or(Problem::NoHostfs)?.0.as_str();
        let hostfs = content.images.iter().find(|(name, _)| name == hostfs).ok_or(Problem::NoHostfs)?;
        let found = inspect(&uki, &loader, &files(&from.image(&hostfs.1).map_err(inner)?)?).map_err(inner)?;
        let expected = content.kernel_id;
        if found != expected {
            return Err(Problem::KernelId { expected, found });
        }

        let mut keys = BTreeMap::new();
        for name in ENROLL_FILES {
            let path = format!("{ENROLL}/{name}");
            if image.files.contains_key(&path) {
                keys.insert(name.to_string(), self.small(image, &path, MAX_SMALL)?);
            }
        }
        if !keys.is_empty() && keys.len() < ENROLL_FILES.len() {
            return Err(Problem::Other {
                path: ENROLL.into(),
                why: "has some of the keys, expected all".into(),
            });
        }
        let esp = content::esp_files(uki, loader, &keys);
        let volume = content::esp_volume(&esp, &content.medium);
        if volume.size_bytes != image.esp.size {
            let (found, expected) = (image.esp.size, volume.size_bytes);
            return Err(ReadError::Esp { found, expected }.into());
        }
        let pieces = fat::pieces(volume, &esp).map_err(ReadError::Layout)?;
        let regions =
            pieces.iter().map(|(at, bytes)| (*at, bytes.len() as u64, Some(bytes.as_slice()))).collect();
        read::compare(&*self.file, image.esp.at, image.esp.size, regions, |_| "EFI system partition")?;
        Ok(found)
    }
}
