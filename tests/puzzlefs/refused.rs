//! What is refused when an image is opened or a chunk is decoded, each with the error's words.

use std::sync::Arc;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::layer::{BlockId, Layer, Place};
use mosfs::internals::image::overlay::Merged;
use mosfs::internals::image::puzzlefs::{MAX_CHUNK_BYTES, MAX_METADATA_BYTES, Puzzlefs};
use mosfs::internals::image::{LayerError, NodeId, ReadError};

use crate::message::{
    Inode, Memory, Part, Ptr, dir, encode, file, frame, inode, layer, link, one, open, rootfs, with_xattr,
};

/// Metadata of such a size, in bytes, is read by two threads.
const LARGE_BYTES: usize = 1 << 20;

/// The error of an image that must not open.
fn refused(metadata: &[u8]) -> String {
    match open(metadata, &[b"a chunk"]) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn assert_refused_as_it_is(metadata: &[u8], words: &str) -> String {
    let said = refused(metadata);
    assert!(said.starts_with("corrupt puzzlefs metadata at "), "{said}");
    assert!(said.contains(words), "{said}\ndoes not say: {words}");
    said
}

#[track_caller]
fn assert_refused(metadata: &[u8], words: &str) {
    let said = assert_refused_as_it_is(metadata, words);
    // Two threads read a large message. Nothing leads to what lies behind its segments.
    let mut large = metadata.to_vec();
    large.resize(metadata.len().max(LARGE_BYTES), 0);
    assert_eq!(refused(&large), said);
}

/// A root with one more inode, number 2, under the name `x`.
fn with(second: Inode) -> Vec<u8> {
    one(vec![dir(1, &[(b"x", 2)]), second])
}

fn named(name: &[u8]) -> Vec<u8> {
    one(vec![dir(1, &[(name, 2)]), inode(2, 1, Ptr::Null, Ptr::Null)])
}

#[test]
fn the_smallest_images_open() {
    assert!(open(&one(vec![dir(1, &[])]), &[]).is_ok());
    assert!(open(&one(vec![inode(1, 3, Ptr::Null, Ptr::Null)]), &[]).is_ok());
    let image = open(&with(link(2, b"target")), &[]).unwrap();
    assert_eq!(image.read_link(NodeId(2)).unwrap(), b"target");
    let image = open(&with(inode(2, 2, Ptr::Struct(vec![4095, 1_048_575], vec![]), Ptr::Null)), &[]).unwrap();
    assert_eq!(image.attr(NodeId(2)).unwrap().rdev, libc::makedev(4095, 1_048_575) as u32);
    let chunk = b"a chunk";
    let digest = Digest::of(chunk);
    let image = open(&with(file(2, &[(digest.as_bytes(), 2, 5, false)])), &[chunk]).unwrap();
    assert_eq!(crate::dump::content(&image, NodeId(2), 5).unwrap(), b"chunk");
}

#[test]
fn the_version_must_be_3() {
    for version in [0, 2, 4, u64::MAX] {
        let metadata = encode(&rootfs(version, vec![vec![dir(1, &[])]]));
        assert_refused(&metadata, &format!("manifestVersion is {version}, expected 3"));
    }
}

#[test]
fn look_below_is_refused() {
    let below = inode(1, 3, Ptr::Struct(vec![1], vec![Ptr::Null]), Ptr::Null);
    assert_refused(&one(vec![below]), "a folder has lookBelow set");
}

#[test]
fn tags_are_1_to_8() {
    for tag in [0, 9, 65_535] {
        assert_refused(
            &with(inode(2, tag, Ptr::Null, Ptr::Null)),
            &format!("has tag {tag}, expected 1 to 8"),
        );
    }
}

#[test]
fn folders_make_a_tree() {
    let twice = one(vec![dir(1, &[(b"a", 2), (b"b", 2)]), dir(2, &[])]);
    assert_refused(&twice, "folder 2 has two names, or is within itself");
    let root = one(vec![dir(1, &[(b"a", 1)])]);
    assert_refused(&root, "folder 1 has two names, or is within itself");
    let circle = one(vec![dir(1, &[(b"a", 2)]), dir(2, &[(b"b", 3)]), dir(3, &[(b"c", 2)])]);
    assert_refused(&circle, "folder 2 has two names, or is within itself");
    assert_refused(&one(vec![]), "there is no inode 1");
    assert_refused(&one(vec![file(1, &[])]), "inode 1, the root, is not a folder");
    assert_refused(&one(vec![dir(1, &[(b"x", 7)])]), "there is no inode 7 for a name");
}

#[test]
fn names_are_names() {
    assert_refused(&named(b""), "the name `` of a file is empty");
    assert_refused(&named(b"."), "the name `.` of a file is not a name");
    assert_refused(&named(b".."), "the name `..` of a file is not a name");
    assert_refused(&named(b"a/b"), "the name `a/b` of a file has a `/` or a NUL in it");
    assert_refused(&named(b"a\0b"), "the name `a\\x00b` of a file has a `/` or a NUL in it");
    assert_refused(&named(&[b'n'; 256]), "of a file is longer than 255 bytes");
    assert!(open(&named(&[b'n'; 255]), &[]).is_ok());
    let twice = one(vec![dir(1, &[(b"x", 2), (b"w", 2), (b"x", 3)]), file(2, &[]), file(3, &[])]);
    assert_refused(&twice, "a folder has the name `x` twice");
    // Also where one of the two does not exist.
    let whiteout = inode(3, 8, Ptr::Null, Ptr::Null);
    let twice = one(vec![dir(1, &[(b"x", 2), (b"x", 3)]), file(2, &[]), whiteout]);
    assert_refused(&twice, "a folder has the name `x` twice");
}

#[test]
fn inode_numbers_fit_and_ascend() {
    assert_refused(&one(vec![inode(0, 1, Ptr::Null, Ptr::Null), dir(1, &[])]), "inode number 0, expected 1");
    let large = vec![dir(1, &[]), inode(1 << 48, 1, Ptr::Null, Ptr::Null)];
    assert_refused(&one(large), "inode number 281474976710656, expected 1 to 281474976710655");
    let order = vec![dir(1, &[]), file(3, &[]), file(2, &[])];
    assert_refused(&one(order), "inode 2 is not in the order of numbers");
}

#[test]
fn parts_of_files_fit_their_chunks() {
    let digest = Digest::of(b"a chunk");
    let digest = digest.as_bytes();
    let refuse = |part: Part<'_>, words: &str| assert_refused(&with(file(2, &[part])), words);
    refuse((&digest[..31], 0, 1, false), "a digest has 31 bytes, expected 32");
    refuse((&[], 0, 1, false), "a digest has 0 bytes, expected 32");
    let max = u64::from(MAX_CHUNK_BYTES);
    refuse((digest, 1, max, false), "expected an end of at most 1048576");
    refuse((digest, max + 1, 0, false), "expected an end of at most 1048576");
    refuse((digest, u64::MAX, 1, false), "expected an end of at most 1048576");
    refuse((digest, 1, u64::MAX, true), "expected an end of at most 1048576");
    let no_blob = inode(2, 5, Ptr::List(vec![(vec![1], vec![Ptr::Null])]), Ptr::Null);
    assert_refused(&with(no_blob), "a part of a file has no chunk");
    let unlisted = Digest::of(b"another");
    refuse(
        (unlisted.as_bytes(), 0, 1, false),
        &format!("chunk {unlisted} is used, but the manifest does not list it"),
    );
}

#[test]
fn devices_have_the_kernels_bits() {
    for (major, minor) in [(4096, 0), (0, 1_048_576), (u64::MAX, 0)] {
        for tag in [2, 4] {
            let device = inode(2, tag, Ptr::Struct(vec![major, minor], vec![]), Ptr::Null);
            assert_refused(&with(device), &format!("device number {major}:{minor}, expected at most 4095"));
        }
    }
}

#[test]
fn links_and_attributes_have_bounds() {
    let words = "has a target of 0 bytes, expected 1 to 4095 without NUL";
    assert_refused(&with(link(2, b"")), words);
    assert_refused(&with(inode(2, 6, Ptr::Null, Ptr::Null)), words);
    assert_refused(&with(link(2, b"a\0b")), "has a target of 3 bytes");
    assert_refused(&with(link(2, &[b'x'; 4096])), "has a target of 4096 bytes");
    for name in [&b""[..], b"user.\0", &[b'x'; 256]] {
        let words = format!("an extended attribute has a name of {}", name.len());
        assert_refused(&with(with_xattr(2, name, b"1")), &words);
    }
    assert_refused(&with(with_xattr(2, b"user.x", &[0; 65_537])), "a value of 65537 bytes");
}

/// What a mount asks before it starts: whether the kernel is to enforce ACLs, and which answers hold for every file.
#[test]
fn it_is_known_which_attributes_there_are() {
    let attributes: [(u64, &[u8], &[u8]); 3] = [
        (2, b"system.posix_acl_access", b"\x02\0\0\0"),
        (3, b"user.same", b"one"),
        (4, b"user.same", b"other"),
    ];
    let mut inodes = vec![dir(1, &[(b"a", 2), (b"b", 3), (b"c", 4)])];
    inodes.extend(attributes.map(|(ino, name, value)| with_xattr(ino, name, value)));
    let image = open(&one(inodes), &[]).unwrap();
    for (name, (_, key, value)) in [b"a", b"b", b"c"].into_iter().zip(attributes) {
        let node = image.lookup(image.root(), name).unwrap().unwrap().node;
        assert_eq!(image.xattrs(node).unwrap(), [(key.to_vec(), value.to_vec())]);
    }
    let view = Merged::new(vec![Arc::new(image)]).unwrap();
    for (name, expected) in [
        ("system.posix_acl_access", true),
        ("user.same", true),
        ("system.posix_acl_default", false),
        ("security.selinux", false),
        // Attributes of other names are shown by such names.
        ("trusted.overlay.opaque", true),
    ] {
        assert_eq!(view.may_have_xattr(name.as_bytes()), expected, "{name}");
    }
}

#[test]
fn messages_are_bounded() {
    assert_refused_as_it_is(&[], "the table of segments is cut off");
    assert_refused_as_it_is(&511u32.to_le_bytes(), "the table of segments is cut off");
    assert_refused_as_it_is(&512u32.to_le_bytes(), "513 segments, expected at most 512");
    assert_refused_as_it_is(&u32::MAX.to_le_bytes(), "segments, expected at most 512");
    assert_refused_as_it_is(&[0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "segment 0 ends at 80");
    assert_refused(&frame(&[vec![]]), "the first segment is empty");
    assert_refused(&frame(&[vec![0]]), "no root struct");
    let pointer = |word: u64| frame(&[vec![word]]);
    assert_refused(&pointer(3), "a pointer of an unknown kind");
    assert_refused(&pointer(1 | 7 << 32), "expected a struct, found a list");
    assert_refused(&pointer(1 << 32), "1 words are not within segment 0");
    assert_refused(&pointer(0x7fff_fffc), "0 words are not within segment 0");
    assert_refused(&pointer(0xffff_fff0), "a pointer leads out of its segment");
    // Far pointers: to no segment, to themselves, to nothing.
    assert_refused(&pointer(2 | 1 << 32), "there is no segment 1");
    assert_refused(&pointer(2), "a far pointer leads to no struct or list");
    assert_refused(&pointer(2 | 1 << 3), "1 words are not within segment 0");
    assert_refused(&frame(&[vec![6], vec![]]), "2 words are not within segment 0");
    assert_refused(&frame(&[vec![6, 1]]), "a double far pointer does not lead to a far pointer");
    let metadata = encode(&Ptr::Struct(vec![3], vec![Ptr::Struct(vec![], vec![]), Ptr::Null]));
    assert_refused(&metadata, "expected a list, found a struct");
    let metadata = encode(&Ptr::Struct(vec![3], vec![Ptr::Bytes(vec![1]), Ptr::Null]));
    assert_refused(&metadata, "expected a list of structs");
    let name = vec![(vec![2], vec![Ptr::List(vec![(vec![1], vec![])])])];
    let folder = inode(1, 3, Ptr::Struct(vec![0], vec![Ptr::List(name)]), Ptr::Null);
    assert_refused(&one(vec![folder]), "expected a list of bytes");
}

#[test]
fn far_pointers_are_followed() {
    // Root in segment 1 by a far pointer, its list in segment 3 by a double far pointer through segment 2.
    let folder = encode(&rootfs(3, vec![vec![dir(1, &[(b"x", 2)]), link(2, b"y")]]));
    let words: Vec<u64> =
        folder[8..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    // words[0] leads to the root struct at words[1..4]; words[2] leads to the list of lists at words[4..].
    let list = words[2];
    let segments = vec![
        vec![2 | 1 << 32],
        vec![words[0] & 0xffff_ffff_0000_0000, 3, 6 | 2 << 32, 0],
        vec![2 | 3 << 32, list & 0xffff_ffff_0000_0003],
        words[4..].to_vec(),
    ];
    let image = open(&frame(&segments), &[]).unwrap();
    assert_eq!(image.read_link(NodeId(2)).unwrap(), b"y");
}

#[test]
fn no_bytes_are_read_twice() {
    let words = |message: &[u8]| -> Vec<u64> {
        message[8..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    };
    // Fifty folders, or files, that all lead to one list: larger when read than it is.
    let root: Vec<_> = (3..53).map(|ino| (format!("d{ino}"), ino)).collect();
    let root: Vec<_> = root.iter().map(|(name, ino)| (name.as_bytes(), *ino)).collect();
    let assert_shared_is_refused = |list: Ptr, tag: u64, to_it: &dyn Fn(Ptr) -> Ptr| {
        let mut inodes = vec![dir(1, &root), inode(2, 1, Ptr::Null, Ptr::Null)];
        // A far pointer to the list's own pointer, the first word of segment 1.
        let far = || to_it(Ptr::Raw(2 | 1 << 32));
        inodes.extend((3..53).map(|ino| inode(ino, tag, far(), Ptr::Null)));
        let message = frame(&[words(&one(inodes)), words(&encode(&list))]);
        assert_refused_as_it_is(&message, "several pointers lead to the same bytes");
        message.len()
    };
    for (count, is_large) in [(1000, false), (45_000, true)] {
        let names = (0..count).map(|n| (vec![2], vec![Ptr::Bytes(format!("{n:08}").into())])).collect();
        let folder = |names| Ptr::Struct(vec![0], vec![names]);
        assert_eq!(assert_shared_is_refused(Ptr::List(names), 3, &folder) >= LARGE_BYTES, is_large);
        let digest = || Ptr::Bytes(Digest::of(b"a chunk").as_bytes().to_vec());
        let part = || (vec![7], vec![Ptr::Struct(vec![0, 0], vec![digest()])]);
        let parts = (0..count).map(|_| part()).collect();
        assert_eq!(assert_shared_is_refused(Ptr::List(parts), 5, &|parts| parts) >= LARGE_BYTES, is_large);
    }
    // Elements without words are paid for all the same.
    let many = Ptr::Struct(vec![3], vec![Ptr::Raw(1 | 1 << 2 | 7 << 32), Ptr::Null]);
    let mut metadata = encode(&many);
    metadata.extend((0x3fff_ffffu64 << 2).to_le_bytes());
    metadata[4..8].copy_from_slice(&5u32.to_le_bytes());
    assert_refused(&metadata, "several pointers lead to the same bytes");
}

#[test]
fn parts_of_files_count_as_read_beside_attributes() {
    // The value of the attribute is the 64 KiB after its own pointer: the parts of the file.
    let value = Ptr::Raw(1 | 2 << 32 | 65_536 << 35);
    let pair = (vec![], vec![Ptr::Bytes(b"user.x".to_vec()), value]);
    let additional = Ptr::Struct(vec![], vec![Ptr::List(vec![pair]), Ptr::Null]);
    let digest = Digest::of(b"a chunk");
    let parts: Vec<Part<'_>> = vec![(digest.as_bytes(), 0, 7, false); 1000];
    let names: [(&[u8], u64); 2] = [(b"x", 2), (b"y", 3)];
    let metadata = one(vec![dir(1, &names), inode(2, 1, Ptr::Null, additional), file(3, &parts)]);
    assert_refused_as_it_is(&metadata, "several pointers lead to the same bytes");
}

#[test]
fn the_inode_that_a_search_meets_first_counts() {
    let digest = Digest::of(b"a chunk");
    let part = |offset| file(2, &[(digest.as_bytes(), offset, 2, false)]);
    let names: [(&[u8], u64); 2] = [(b"x", 2), (b"y", 3)];
    let last = || file(3, &[(digest.as_bytes(), 5, 2, false)]);
    for (inodes, content) in [
        // Of four elements the second is met first, of five the third.
        (vec![dir(1, &names), part(0), part(2), last()], b"a "),
        (vec![dir(1, &names), part(0), part(2), part(4), last()], b"ch"),
    ] {
        let image = open(&one(inodes), &[b"a chunk"]).unwrap();
        assert_eq!(crate::dump::content(&image, NodeId(2), 2).unwrap(), content);
        assert_eq!(crate::dump::content(&image, NodeId(3), 2).unwrap(), b"nk");
    }
}

#[test]
fn metadata_has_a_largest_size() {
    let blobs = Arc::new(Memory::default());
    let (digest, _) = blobs.put(&one(vec![dir(1, &[])]));
    let error = Puzzlefs::open(&layer(blobs, (digest, MAX_METADATA_BYTES + 1), &[])).err().unwrap();
    assert!(error.to_string().contains("268435457 bytes, expected at most 268435456"), "{error}");
}

#[test]
fn metadata_must_have_its_digest_and_its_size() {
    let blobs = Arc::new(Memory::default());
    let rootfs = blobs.put(&one(vec![dir(1, &[])]));
    let longer = layer(blobs.clone(), (rootfs.0, rootfs.1 - 1), &[]);
    let error = Puzzlefs::open(&longer).err().unwrap();
    assert!(matches!(error, LayerError::Read(ReadError::Length { blob, .. }) if blob == rootfs.0), "{error}");
    blobs.0.lock().unwrap().get_mut(&rootfs.0).unwrap()[9] ^= 1;
    let error = Puzzlefs::open(&layer(blobs, rootfs, &[])).err().unwrap();
    assert!(matches!(error, LayerError::Read(ReadError::Verity { expected, .. }) if expected == rootfs.0));
}

/// An image of one file, `size` bytes of a chunk that is stored as `stored`, with the size in the manifest.
fn one_chunk(
    stored: &[u8],
    size: u64,
    compressed: bool,
    listed: u64,
) -> (Arc<Memory>, Result<Puzzlefs, LayerError>) {
    let blobs = Arc::new(Memory::default());
    let (chunk, _) = blobs.put(stored);
    let rootfs = blobs.put(&with(file(2, &[(chunk.as_bytes(), 0, size, compressed)])));
    let opened = Puzzlefs::open(&layer(blobs.clone(), rootfs, &[(chunk, listed)]));
    (blobs, opened)
}

fn block(image: &Puzzlefs) -> BlockId {
    match image.extent(NodeId(2), 0).unwrap().place {
        Place::Block(block) | Place::Shared { block, .. } => block,
        Place::Hole => panic!("a hole"),
    }
}

fn decoded(image: &Puzzlefs) -> Result<Vec<u8>, String> {
    let mut out = vec![1, 2, 3];
    let block = block(image);
    let result = image.decode(block, &mut out);
    assert!(out.len() <= block.decoded_max as usize);
    match result {
        Ok(()) => Ok(out),
        Err(error) => {
            assert_eq!(out, b"", "nothing is left of what is wrong");
            Err(error.to_string())
        }
    }
}

#[test]
fn chunks_decode_to_what_is_needed() {
    let text = b"some text that is repeated, some text that is repeated, some text that is repeated";
    let size = text.len() as u64;
    let packed = zstd::bulk::compress(text, 3).unwrap();
    let image =
        |stored: &[u8], size, compressed| one_chunk(stored, size, compressed, stored.len() as u64).1.unwrap();
    assert_eq!(decoded(&image(text, size, false)).unwrap(), text);
    assert_eq!(decoded(&image(&packed, size, true)).unwrap(), text);
    // Several frames, and one that is skipped.
    let mut frames = zstd::bulk::compress(&text[..40], 3).unwrap();
    frames.extend(zstd::bulk::compress(&text[40..], 3).unwrap());
    frames.extend([0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    assert_eq!(decoded(&image(&frames, size, true)).unwrap(), text);

    let said = decoded(&image(text, size - 1, false)).unwrap_err();
    assert!(said.contains(&format!("it holds {size} bytes, expected {}", size - 1)), "{said}");
    let said = decoded(&image(text, size + 1, false)).unwrap_err();
    assert!(said.contains(&format!("it holds {size} bytes, expected {}", size + 1)), "{said}");
    let said = decoded(&image(&packed, size - 1, true)).unwrap_err();
    assert!(
        said.contains("zstd: ") && said.contains(&format!("expected {} decoded bytes", size - 1)),
        "{said}"
    );
    let said = decoded(&image(&packed, size + 1, true)).unwrap_err();
    assert!(said.contains(&format!("it decodes to {size} bytes, expected {}", size + 1)), "{said}");
    let said = decoded(&image(text, size, true)).unwrap_err();
    assert!(said.contains("zstd: "), "{said}");
}

#[test]
fn chunks_are_checked_at_each_decode() {
    let (blobs, image) = one_chunk(b"content", 7, false, 7);
    let image = image.unwrap();
    assert_eq!(decoded(&image).unwrap(), b"content");
    let digest = Digest::of(b"content");
    blobs.0.lock().unwrap().insert(digest, b"Content".to_vec());
    let said = decoded(&image).unwrap_err();
    let found = Digest::of(b"Content");
    assert_eq!(said, format!("verity: block 0 (chunk) has hash {found}, expected {digest}"));
    blobs.0.lock().unwrap().insert(digest, b"conten".to_vec());
    assert_eq!(decoded(&image).unwrap_err(), format!("blob {digest} has 6 bytes, expected 7"));
    blobs.0.lock().unwrap().insert(digest, b"contents".to_vec());
    assert_eq!(decoded(&image).unwrap_err(), format!("blob {digest} has 8 bytes, expected 7"));
    blobs.0.lock().unwrap().remove(&digest);
    assert!(decoded(&image).unwrap_err().starts_with("cannot read 7 bytes"));
    blobs.put(b"content");
    assert_eq!(decoded(&image).unwrap(), b"content");
}

#[test]
fn a_block_of_another_image_is_refused() {
    let image = one_chunk(b"content", 7, false, 7).1.unwrap();
    let good = block(&image);
    for bad in [
        BlockId { start: 1, ..good },
        BlockId { start: u64::MAX, ..good },
        BlockId { size_word: 1, ..good },
        BlockId { decoded_max: 6, ..good },
    ] {
        let error = image.decode(bad, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("is not a chunk of this image"), "{error}");
    }
}

#[test]
fn sizes_before_compression_are_refused_by_name() {
    let text = [b'x'; 5000];
    let packed = zstd::bulk::compress(&text, 3).unwrap();
    let error = one_chunk(&packed, 5000, true, 5000).1.err().unwrap().to_string();
    assert!(error.contains("which is its size before compression"), "{error}");
    assert!(error.contains("puzzlefs 0.2.0 wrote such manifests"), "{error}");
    // Any other wrong size is found when the chunk is read.
    let image = one_chunk(&packed, 5000, true, 4999).1.unwrap();
    assert!(decoded(&image).unwrap_err().contains("expected 4999"));
    for size in [0, u64::from(MAX_CHUNK_BYTES) + 1, u64::MAX] {
        let error = one_chunk(&packed, 5000, true, size).1.err().unwrap().to_string();
        assert!(error.contains(&format!("has {size} bytes, expected 1 to 1048576")), "{error}");
    }
}
