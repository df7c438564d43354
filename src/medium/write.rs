//! Writes the image of a medium to a file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::content::{self, Content, INDEX_FILE, OCI_LAYOUT, OCI_LAYOUT_FILE};
use super::error::MediumError;
use super::fat;
use super::iso9660::{Extent, Image};
use super::layout::{ANSWERS, ENROLL, ENROLL_FILES, MEDIUM_FILE, Medium};
use crate::deploy::offer::find_whole;
use crate::digest::{Digest, Hasher};
use crate::error::{IoContext, IoError};
use crate::progress::{Progress, Task};
use crate::store::Store;
use crate::sys::atomic;
use crate::sys::failpoint;
use crate::sys::file::{self, Links};
use crate::trust::pem;

/// How much is copied at a time, in bytes.
const CHUNK: usize = 1 << 20;
/// Largest file with a key to enroll, in bytes.
const MAX_KEY_FILE: u64 = 1 << 20;
/// Largest file of answers, in bytes.
const MAX_ANSWERS: u64 = 1 << 20;

/// What a medium has besides its system.
#[derive(Debug, Default)]
pub struct Extras {
    answers: Option<Vec<u8>>,
    keys: BTreeMap<String, Vec<u8>>,
}

impl Extras {
    /// Reads a file of answers, and a folder with the keys to enroll: `PK.auth`, `KEK.auth`, `db.auth`.
    ///
    /// Nothing else of the folder is read: the private keys may lie beside them.
    ///
    /// # Errors
    /// [`MediumError::Enroll`], [`MediumError::Secret`], [`MediumError::Io`].
    pub fn load(answers: Option<&Path>, enroll: Option<&Path>) -> Result<Self, MediumError> {
        let mut extras = Self::default();
        if let Some(path) = answers {
            let bytes = file::read_named(path, MAX_ANSWERS)?;
            // Rule: no private key is ever on an install medium.
            pem::public_only(&bytes, path)?;
            extras.answers = Some(bytes);
        }
        for name in enroll.iter().flat_map(|_| ENROLL_FILES) {
            let path = enroll.unwrap_or(Path::new("")).join(name);
            let wrong = |why: String| MediumError::Enroll { path: path.clone(), why };
            let found = file::find_regular(&path, Links::Followed, MAX_KEY_FILE)?;
            let bytes =
                found.ok_or_else(|| wrong(format!("no such file; expected {}", ENROLL_FILES.join(", "))))?;
            pem::public_only(&bytes, &path)?;
            check_auth(&bytes).map_err(|why| wrong(why.into()))?;
            extras.keys.insert(name.to_string(), bytes);
        }
        Ok(extras)
    }

    /// The text of the answers.
    pub fn answers(&self) -> Option<&[u8]> {
        self.answers.as_deref()
    }
}

/// Rule (UEFI 2.10, section 8.2.2): a signed update of a variable begins with a time, and a certificate of the type
/// `WIN_CERT_TYPE_EFI_GUID` with a PKCS #7 signature.
fn check_auth(bytes: &[u8]) -> Result<(), &'static str> {
    const REVISION_AND_TYPE: [u8; 4] = [0x00, 0x02, 0xf1, 0x0e];
    const PKCS7: uuid::Uuid = uuid::Uuid::from_u128(0x4aaf_d29d_68df_49ee_8aa9_347d_3756_65a7);
    let length =
        bytes.get(16..20).and_then(|part| part.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
    let is_auth = bytes.get(20..24) == Some(&REVISION_AND_TYPE)
        && bytes.get(24..40) == Some(&PKCS7.to_bytes_le())
        && length > 24
        && 16 + length < bytes.len();
    if is_auth {
        Ok(())
    } else {
        Err("expected a signed update of a UEFI variable, as sign-efi-sig-list writes it")
    }
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// What the medium says about itself.
    pub medium: Medium,
    /// The size of the image in bytes.
    pub size_bytes: u64,
    /// How many of them are blobs of the system.
    pub blobs_bytes: u64,
}

/// Refuses an output that a rename would replace although it is no file: a disk, above all.
///
/// # Errors
/// [`MediumError::Output`].
pub fn check_output(path: &Path) -> Result<(), MediumError> {
    let kind = match fs::metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(IoError::new("stat", path, error).into()),
    };
    let found = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_block_device() => "a block device",
        () => "a special file",
    };
    Err(MediumError::Output { path: path.to_path_buf(), found })
}

/// Writes a medium with a system of a layout: the one named, or that of the highest version. Every blob is checked
/// against its digest on the way. The file appears whole, or not at all.
///
/// # Errors
/// [`MediumError`].
pub fn write(
    store: &Store,
    name: Option<&str>,
    extras: &Extras,
    output: &Path,
    progress: &Progress,
) -> Result<Written, MediumError> {
    check_output(output)?;
    let from = store.transport();
    let content = Content::of(from, &find_whole(from, name)?)?;
    let files = store.files(&store.image(&content.boot.digest)?)?;
    let (uki, loader) = content::programs(&files, content.manifest.version)?;
    let esp_files = content::esp_files(uki, loader, &extras.keys);
    let volume = content::esp_volume(&esp_files, &content.medium);

    let mut small = BTreeMap::from([
        (MEDIUM_FILE.to_string(), content.medium.to_bytes()),
        (INDEX_FILE.to_string(), content.index.clone()),
        (OCI_LAYOUT_FILE.to_string(), OCI_LAYOUT.to_vec()),
    ]);
    if let Some(answers) = &extras.answers {
        small.insert(ANSWERS.to_string(), answers.clone());
    }
    for (name, key) in &extras.keys {
        small.insert(format!("{ENROLL}/{name}"), key.clone());
    }
    let mut sizes: BTreeMap<String, u64> =
        small.iter().map(|(path, content)| (path.clone(), content.len() as u64)).collect();
    sizes.extend(content.blobs.iter().map(|(digest, size)| (Content::blob_path(digest), *size)));
    let image = Image::new(&sizes, volume.size_bytes, &content.medium).on("lay out", output)?;

    let temporary = Temporary::create(output)?;
    let (to, path) = (&temporary.file, &temporary.path);
    let task = progress.task("write", &output.display().to_string(), Some(content.blobs.values().sum()));
    let put = |at: u64, bytes: &[u8]| to.write_all_at(bytes, at).on("write", path);
    to.set_len(image.size).on("write", path)?;
    image.pieces.iter().try_for_each(|(at, bytes)| put(*at, bytes))?;
    for (at, bytes) in fat::pieces(volume, &esp_files).on("lay out", output)? {
        put(image.esp.at + at, &bytes)?;
    }
    for (name, extent) in &image.files {
        if let Some(bytes) = small.get(name) {
            put(extent.at, bytes)?;
        }
    }
    for digest in content.blobs.keys() {
        let extent = image.files[&Content::blob_path(digest)];
        copy(store, digest, extent, to, path, &task)?;
    }
    temporary.publish(output)?;
    let blobs_bytes = content.blobs.values().sum();
    Ok(Written { medium: content.medium, size_bytes: image.size, blobs_bytes })
}

/// Copies a blob, and checks that it is the one.
fn copy(
    store: &Store,
    digest: &Digest,
    extent: Extent,
    to: &File,
    path: &Path,
    task: &Task,
) -> Result<(), MediumError> {
    let wrong = |why: String| MediumError::Blob { digest: *digest, why };
    let (mut blob, found) = store.transport().open_blob(digest)?;
    if found != extent.size {
        return Err(wrong(format!("found {found} bytes, expected {}", extent.size)));
    }
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; CHUNK.min(extent.size as usize).max(1)];
    let (mut at, end) = (extent.at, extent.at + extent.size);
    // What the file has beyond its size is not read: it would be written over what follows.
    while at < end {
        let length = buffer.len().min((end - at) as usize);
        let read = blob.read(&mut buffer[..length]).on("read", store.blob_path(digest))?;
        if read == 0 {
            return Err(wrong(format!("it ends after {} bytes, expected {}", at - extent.at, extent.size)));
        }
        hasher.update(&buffer[..read]);
        to.write_all_at(&buffer[..read], at).on("write", path)?;
        task.advance(read as u64);
        at += read as u64;
    }
    let found = hasher.finish();
    if found != *digest {
        return Err(wrong(format!("its content has digest {found}")));
    }
    Ok(())
}

/// The image under way, beside its output. It is removed if it does not become that.
struct Temporary {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Temporary {
    fn create(output: &Path) -> Result<Self, MediumError> {
        let name = output.file_name().ok_or_else(|| MediumError::Output {
            path: output.to_path_buf(),
            found: "a path without a file name",
        })?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}.new", std::process::id()));
        let path = output.with_file_name(temporary);
        // A file of an earlier process with this number that was killed.
        let _ = fs::remove_file(&path);
        let file = file::create_file(&path, 0o644)?;
        Ok(Self { file, path, published: false })
    }

    fn publish(mut self, output: &Path) -> Result<(), MediumError> {
        failpoint::hit("medium.image.written");
        self.file.sync_all().on("sync", &self.path)?;
        atomic::publish(&self.path, output, "medium.image").on("rename to", output)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_file(&self.path);
        }
    }
}
