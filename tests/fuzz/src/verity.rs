//! dm-verity data: the superblock, and reads through a tree.

use std::fs::File;
use std::io::Write;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::verified::VerifiedSource;
use mosfs::internals::image::verity::{BLOCK_BYTES, Geometry, Superblock, data_bytes};
use mosfs::internals::image::{ReadError, Source};

/// A superblock of any bytes: what is accepted is written back as it was read.
pub fn superblock(data: &[u8]) {
    let mut block = [0; BLOCK_BYTES];
    let len = data.len().min(BLOCK_BYTES);
    block[..len].copy_from_slice(&data[..len]);
    if let Ok(superblock) = Superblock::parse(&block) {
        assert_eq!(superblock.to_block()[..], block[..], "an accepted superblock has one form");
        let _ = Geometry::new(superblock.data_blocks.saturating_mul(BLOCK_BYTES as u64));
    }
    let _ = data_bytes(data);
}

/// A file of any bytes as an image with a tree: it opens only with the right root hash, and
/// whatever is read then is what the tree promises.
///
/// Layout of the input: one byte, the number of data blocks less one (at most 8); the rest is the file. The
/// root hash is made to fit the top hash block, so that the tree below it is reached.
pub fn tree(data: &[u8]) {
    let Some((&blocks, rest)) = data.split_first() else { return };
    let data_bytes = (u64::from(blocks % 8) + 1) * BLOCK_BYTES as u64;
    let Ok(mut file) = temporary() else { return };
    // The file ends with the tree, as every file that is opened does.
    let whole = Geometry::new(data_bytes).map_or(0, |geometry| geometry.file_bytes());
    let rest = &rest[..rest.len().min(usize::try_from(whole).unwrap_or(usize::MAX))];
    if file.write_all(rest).is_err() {
        return;
    }
    // The superblock is behind the data, the top hash block behind it (one level, up to 128 blocks).
    let at = |index: u64| {
        let start = usize::try_from(data_bytes + index * BLOCK_BYTES as u64).ok()?;
        rest.get(start..start + BLOCK_BYTES)
    };
    let top = if data_bytes == BLOCK_BYTES as u64 { rest.get(..BLOCK_BYTES) } else { at(1) };
    let root = match (at(0).map(<&[u8; BLOCK_BYTES]>::try_from), top) {
        (Some(Ok(block)), Some(top)) => match Superblock::parse(block) {
            Ok(superblock) => Digest::of(&[&superblock.salt[..], top].concat()),
            Err(_) => Digest::of(rest),
        },
        _ => Digest::of(rest),
    };
    let Ok(source) = VerifiedSource::open_sized(file, data_bytes, root, 1 << 16) else { return };
    let mut scratch = Vec::new();
    for index in 0..data_bytes / BLOCK_BYTES as u64 {
        let offset = index * BLOCK_BYTES as u64;
        match source.read(offset, BLOCK_BYTES, &mut scratch) {
            Ok(read) => assert_eq!(read, &rest[offset as usize..][..BLOCK_BYTES]),
            Err(ReadError::Verity { expected, found, .. }) => assert_ne!(expected, found),
            Err(_) => {}
        }
    }
}

/// An unnamed file.
fn temporary() -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!(
        "mosfs-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
