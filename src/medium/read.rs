//! Reads an image of a medium that nobody vouches for, and compares it with what [`Image::new`] makes of the same files.
//!
//! Only names and sizes are taken from the folders, with bounds. Then the image is laid out anew: every byte that is not
//! content must be the one that is written there, and what lies between must be zero. So whatever this reader does not
//! look at, such as a date or a place, is compared all the same, and there is no room for anything else.

use std::collections::BTreeMap;
use std::io;

use super::iso9660::{DESCRIPTORS_AT, Extent, IS_CONTINUED, Image, MAX_DEPTH, MAX_ENTRIES, SECTOR};
use super::layout::{LABEL, MAX_MEDIUM_FILE, MEDIUM_FILE, Medium, MediumFileError};
use crate::error::{Class, Classified};
use crate::image::bytes::ReadAt;
use crate::image::fields::{u32_at, u64_at};

/// Most bytes of all folders together.
const MAX_FOLDERS: u64 = 128 << 20;
/// How much is read at a time to find that it is zero, in bytes.
const CHUNK: u64 = 64 << 10;
/// Where the entry of the EFI system partition is, in bytes: the second one of the partition table.
const ESP_ENTRY: u64 = 1024 + 128;

/// Why bytes are not the image of a medium as `mosfs iso` writes it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It begins like no medium.
    #[error("it is no install medium: {0}")]
    NotAMedium(&'static str),
    /// A folder cannot be read.
    #[error("ISO 9660: {what} at byte {at}")]
    Folder {
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes.
        at: u64,
    },
    /// It ends before something that it must have.
    #[error("it has {size} bytes, and ends before {what} at byte {at} does")]
    Ends {
        /// Its size in bytes.
        size: u64,
        /// What is missing.
        what: &'static str,
        /// Where that would begin, in bytes.
        at: u64,
    },
    /// The file that says which system is on the medium.
    #[error(transparent)]
    MediumFile(#[from] MediumFileError),
    /// A file that every medium has.
    #[error("it has no /{0}")]
    Missing(String),
    /// A name or a size that no medium has.
    #[error("{0}")]
    Layout(io::Error),
    /// It ends too early, or goes on.
    #[error("it has {found} bytes, expected {expected}")]
    Size {
        /// Its size in bytes.
        found: u64,
        /// The size of a medium with these files.
        expected: u64,
    },
    /// The EFI system partition has another size than its files make.
    #[error("the EFI system partition has {found} bytes, expected {expected}")]
    Esp {
        /// Its size in bytes.
        found: u64,
        /// The size of a file system with these files.
        expected: u64,
    },
    /// A byte that is not content is not the one that belongs there.
    #[error("byte {at} ({object}) is not as mosfs writes it")]
    Differs {
        /// Where, in bytes.
        at: u64,
        /// What is there.
        object: &'static str,
    },
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
}

impl Classified for ReadError {
    fn class(&self) -> Class {
        match self {
            Self::Io(_) => Class::Failure,
            _ => Class::Verification,
        }
    }
}

/// Reads the layout of a medium. A device may be larger than the image that was written to it.
///
/// # Errors
/// [`ReadError`].
pub fn read(from: &(impl ReadAt + ?Sized), is_device: bool) -> Result<(Medium, Image), ReadError> {
    let size = from.len()?;
    let reader = Reader { from, size };
    let volume = reader.bytes(DESCRIPTORS_AT * SECTOR, SECTOR, "the volume descriptor")?;
    let mut label = LABEL.as_bytes().to_vec();
    label.resize(32, b' ');
    if volume.get(..7) != Some(b"\x01CD001\x01") || volume.get(40..72) != Some(&label) {
        return Err(ReadError::NotAMedium("there is no ISO 9660 volume labelled MOSFS-INSTALL"));
    }
    let files = reader.tree(&volume)?;
    let sizes = files.iter().map(|(path, extent)| (path.clone(), extent.size)).collect();
    let found = files.get(MEDIUM_FILE).ok_or_else(|| ReadError::Missing(MEDIUM_FILE.into()))?;
    if found.size > MAX_MEDIUM_FILE as u64 {
        return Err(MediumFileError::TooLong { found: found.size as usize }.into());
    }
    let medium = Medium::parse(&reader.bytes(found.at, found.size, MEDIUM_FILE)?)?;
    let entry = reader.bytes(ESP_ENTRY, 128, "the partition table")?;
    let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
    let esp_bytes = last.checked_sub(first).and_then(|sectors| sectors.checked_add(1)?.checked_mul(512));
    let esp_bytes = esp_bytes.filter(|bytes| *bytes <= size).unwrap_or(0);
    let image = Image::new(&sizes, esp_bytes, &medium).map_err(ReadError::Layout)?;
    if image.size > size || (image.size < size && !is_device) {
        return Err(ReadError::Size { found: size, expected: image.size });
    }
    reader.compare(&image)?;
    Ok((medium, image))
}

struct Reader<'a, R: ReadAt + ?Sized> {
    from: &'a R,
    size: u64,
}

impl<R: ReadAt + ?Sized> Reader<'_, R> {
    fn bytes(&self, at: u64, len: u64, what: &'static str) -> Result<Vec<u8>, ReadError> {
        if at.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(ReadError::Ends { size: self.size, what, at });
        }
        let mut bytes = vec![0; len as usize];
        self.from.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// The files, by their paths. Of a file in several sections, the place is that of the first.
    fn tree(&self, volume: &[u8]) -> Result<BTreeMap<String, Extent>, ReadError> {
        let mut files: BTreeMap<String, Extent> = BTreeMap::new();
        let root = volume.get(156..190).unwrap_or_default();
        let mut todo =
            vec![(String::new(), u64::from(u32_at(root, 2)) * SECTOR, u64::from(u32_at(root, 10)), 1)];
        let (mut entries, mut total) = (0_usize, 0_u64);
        while let Some((folder, at, size, depth)) = todo.pop() {
            let wrong = |what| ReadError::Folder { what, at };
            total = total.saturating_add(size);
            if total > MAX_FOLDERS || depth > MAX_DEPTH {
                return Err(wrong("more folders than a medium has"));
            }
            let bytes = self.bytes(at, size, "a folder")?;
            let mut continued = false;
            let mut place = 0;
            while let Some(length) = bytes.get(place).copied().map(usize::from) {
                if length == 0 {
                    // Records end with their sector.
                    place = (place + 1).next_multiple_of(SECTOR as usize);
                    continue;
                }
                let record =
                    bytes.get(place..place + length).ok_or_else(|| wrong("a record beyond the end"))?;
                place += length;
                let identifier = record.get(32).copied().map_or(0, usize::from);
                // The folder itself, and the one above it.
                if identifier == 1 && matches!(record.get(33), Some(0 | 1)) {
                    continue;
                }
                entries += 1;
                if entries > MAX_ENTRIES {
                    return Err(wrong("more files than a medium has"));
                }
                let fields = record.get((33 + identifier).next_multiple_of(2)..).unwrap_or_default();
                let name = name(fields).ok_or_else(|| wrong("a record without a name"))?;
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                let (at, size) = (u64::from(u32_at(record, 2)) * SECTOR, u64::from(u32_at(record, 10)));
                let flags = record.get(25).copied().unwrap_or(0);
                if flags & 2 != 0 {
                    todo.push((path, at, size, depth + 1));
                    continue;
                }
                match files.get_mut(&path) {
                    Some(file) if continued => file.size = file.size.saturating_add(size),
                    Some(_) => return Err(wrong("two files of one name")),
                    None => drop(files.insert(path, Extent { at, size })),
                }
                continued = flags & IS_CONTINUED != 0;
            }
        }
        Ok(files)
    }

    fn compare(&self, image: &Image) -> Result<(), ReadError> {
        let mut regions: Vec<(u64, u64, Option<&[u8]>)> = image
            .pieces
            .iter()
            .map(|(at, bytes)| (*at, bytes.len() as u64, Some(bytes.as_slice())))
            .collect();
        regions.extend(image.files.values().chain([&image.esp]).map(|extent| (extent.at, extent.size, None)));
        compare(self.from, 0, image.size, regions, |at| match at {
            0..512 => "MBR",
            512..0x8000 => "partition table",
            0x8000..0x8800 => "volume descriptor",
            0x8800..0x9000 => "boot record",
            _ if at >= image.size - 33 * 512 => "backup of the partition table",
            _ => "ISO 9660",
        })
    }
}

/// Rock Ridge's name of a record.
fn name(fields: &[u8]) -> Option<String> {
    let mut rest = fields;
    while let [a, b, length, ..] = rest {
        let field = rest.get(..usize::from(*length)).filter(|field| field.len() >= 4)?;
        if [*a, *b] == *b"NM" {
            let name = std::str::from_utf8(field.get(5..)?).ok()?;
            let plain = !name.is_empty() && name.bytes().all(|c| c.is_ascii_graphic() && c != b'/');
            return plain.then(|| name.to_string());
        }
        rest = &rest[field.len()..];
    }
    None
}

/// Whether a part of a medium has these bytes in these regions, and zeros between them. Regions without bytes are not
/// looked at. `object` names what is at a place, for the error.
///
/// # Errors
/// [`ReadError::Differs`], [`ReadError::Io`].
pub(super) fn compare(
    from: &(impl ReadAt + ?Sized),
    begin: u64,
    size: u64,
    mut regions: Vec<(u64, u64, Option<&[u8]>)>,
    object: impl Fn(u64) -> &'static str,
) -> Result<(), ReadError> {
    regions.sort_by_key(|(at, size, _)| (*at, *size));
    regions.push((size, 0, None));
    let mut done = 0;
    let mut buffer = vec![0; CHUNK as usize];
    let mut differ = |mut at: u64, len: u64, expected: Option<&[u8]>| -> Result<(), ReadError> {
        let start = at;
        while at < start + len {
            let take = CHUNK.min(start + len - at) as usize;
            let found = &mut buffer[..take];
            from.read_exact_at(found, begin + at)?;
            let expected = expected.and_then(|bytes| bytes.get((at - start) as usize..));
            let other = found.iter().enumerate().position(|(index, byte)| {
                *byte != expected.and_then(|bytes| bytes.get(index)).copied().unwrap_or(0)
            });
            if let Some(index) = other {
                let at = at + index as u64;
                return Err(ReadError::Differs { at: begin + at, object: object(at) });
            }
            at += take as u64;
        }
        Ok(())
    };
    for (at, len, bytes) in regions {
        if at > done {
            differ(done, at - done, None)?;
        }
        if let Some(bytes) = bytes {
            differ(at, len, Some(bytes))?;
        }
        done = done.max(at + len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;
    use crate::digest::Digest;

    const ESP: u64 = 6 << 20;

    fn medium() -> Medium {
        let product = "de6c82c5-2e01-4c92-949b-a6545d30fc06".parse().unwrap();
        Medium { product, version: 200, system: Digest::of(b"system") }
    }

    /// A medium whose files are zeros, but for the one that says what it is.
    fn write(more: &[(String, u64)]) -> (tempfile::NamedTempFile, Image) {
        let text = medium().to_bytes();
        let mut files: BTreeMap<String, u64> = more.iter().cloned().collect();
        files.insert(MEDIUM_FILE.into(), text.len() as u64);
        let image = Image::new(&files, ESP, &medium()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(image.size).unwrap();
        image.pieces.iter().for_each(|(at, bytes)| file.as_file().write_all_at(bytes, *at).unwrap());
        file.as_file().write_all_at(&text, image.files[MEDIUM_FILE].at).unwrap();
        (file, image)
    }

    fn flip(file: &File, at: u64) {
        let mut byte = [0];
        ReadAt::read_exact_at(file, &mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    #[test]
    fn what_is_written_is_read_back() {
        let blob = |number: u32| format!("store/blobs/sha256/{}", Digest::of(&number.to_le_bytes()).hex());
        let mut files: Vec<_> =
            (0..3000).map(|number| (blob(number), u64::from(number % 5) * 1000)).collect();
        // More than 32 bits can say: in two sections, the first as long as it can be.
        files.push((blob(3000), (5 << 30) + 7));
        files.push(("store/index.json".into(), 12));
        let (file, image) = write(&files);
        let (found, read) = read(file.as_file(), false).unwrap();
        assert_eq!(found, medium());
        assert_eq!(read.files, image.files);
        assert_eq!(read.esp, image.esp);
        let large = image.files[&blob(3000)];
        assert_eq!(large.size, (5 << 30) + 7);
        let output = Command::new("xorriso")
            .args(["-indev"])
            .arg(file.path())
            .args(["-find", &format!("/{}", blob(3000)), "-exec", "lsdl"])
            .output()
            .expect("install xorriso");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains(" 5368709127 "), "{said}");
        let count =
            Command::new("xorriso").arg("-indev").arg(file.path()).args(["-find", "/store/blobs"]).output();
        let said = String::from_utf8_lossy(&count.unwrap().stdout).into_owned();
        assert_eq!(said.lines().filter(|line| line.starts_with("'/store/blobs/sha256/")).count(), 3001);
    }

    /// Every bit of what is not content.
    #[test]
    fn each_byte_that_is_no_content_is_looked_at() {
        let (file, image) = write(&[("store/index.json".into(), 5000), ("store/oci-layout".into(), 3)]);
        let file = file.as_file();
        read(file, false).unwrap();
        let content = |at: u64| {
            let in_it = |extent: &Extent| (extent.at..extent.at + extent.size).contains(&at);
            image.files.values().any(in_it) || in_it(&image.esp)
        };
        // Of what is not zero, every seventh byte; of what is, some of each part.
        let told = image.pieces.iter().flat_map(|(at, bytes)| (*at..).zip(bytes));
        let told = told.filter(|(_, byte)| **byte != 0).map(|(at, _)| at).step_by(7);
        let zeros = (0..40 << 10).chain(image.size - (20 << 10)..image.size).step_by(499);
        for at in told.chain(zeros).chain([image.esp.at - 1, image.esp.at + image.esp.size]) {
            if content(at) {
                continue;
            }
            flip(file, at);
            let error = read(file, false).expect_err(&format!("byte {at}"));
            assert_eq!(error.class(), Class::Verification, "byte {at}: {error}");
            flip(file, at);
        }
        read(file, false).unwrap();
    }

    #[test]
    fn a_hostile_image_ends_in_an_error() {
        let (file, image) = write(&[("store/index.json".into(), 5000)]);
        let file = file.as_file();
        let root =
            image.pieces.iter().find(|(at, _)| *at == DESCRIPTORS_AT * SECTOR).unwrap().1[158..162].to_vec();
        let root = u64::from(u32::from_le_bytes(root.try_into().unwrap())) * SECTOR;
        let mut folder = vec![0; SECTOR as usize];
        ReadAt::read_exact_at(file, &mut folder, root).unwrap();
        let place = folder.windows(5).position(|window| window == b"STORE").unwrap() - 33;
        let with = |at: u64, bytes: &[u8]| {
            let mut before = vec![0; bytes.len()];
            ReadAt::read_exact_at(file, &mut before, at).unwrap();
            file.write_all_at(bytes, at).unwrap();
            let error = read(file, false).unwrap_err();
            file.write_all_at(&before, at).unwrap();
            assert_eq!(error.class(), Class::Verification, "{error}");
            error.to_string()
        };
        // A folder that is in itself; one beyond the end; one of 4 GiB.
        let itself = ((root / SECTOR) as u32).to_le_bytes();
        assert!(with(root + place as u64 + 2, &itself).contains("more folders than a medium has"));
        assert!(with(root + place as u64 + 2, &[0xff; 4]).contains("and ends before a folder at byte "));
        assert!(with(root + place as u64 + 10, &[0xff; 4]).contains("more folders than a medium has"));
        // Records that are cut, or have no name, or the name of another.
        assert!(with(root + place as u64, &[7]).contains("without a name"));
        assert!(with(root + place as u64 + 32, &[0xff]).contains("without a name"));
        // A partition table with an EFI system partition of all there is, and more.
        with(ESP_ENTRY + 40, &[0xff; 8]);
        with(ESP_ENTRY + 32, &[0; 8]);
        for length in [0, 1, 40_000, 70_000, image.size - 1] {
            let cut = tempfile::tempfile().unwrap();
            cut.set_len(length).unwrap();
            let mut bytes = vec![0; length as usize];
            ReadAt::read_exact_at(file, &mut bytes, 0).unwrap();
            cut.write_all_at(&bytes, 0).unwrap();
            assert_eq!(read(&cut, false).unwrap_err().class(), Class::Verification, "{length} bytes");
        }
    }

    #[test]
    fn a_device_may_be_larger_and_a_file_may_not() {
        let (file, image) = write(&[]);
        file.as_file().set_len(image.size + 4096).unwrap();
        read(file.as_file(), true).unwrap();
        let error = read(file.as_file(), false).unwrap_err().to_string();
        assert_eq!(error, format!("it has {} bytes, expected {}", image.size + 4096, image.size));
    }
}
