//! What the squashfs reader says of images that are broken in one place: the exact error for each.

#[path = "fuzz/src/build.rs"]
#[allow(dead_code)]
mod build;

use std::ops::ControlFlow;
use std::sync::Arc;

use build::{Built, NONE, Parts, Places, common, entry, file, folder, run, sample};
use mosfs::internals::image::layer::{Layer, NodeId, Place};
use mosfs::internals::image::squashfs::{Event, Squashfs};
use mosfs::internals::image::{LayerError, MemorySource, ReadError};

fn open_bytes(bytes: Vec<u8>) -> Result<Squashfs, LayerError> {
    Squashfs::open(Arc::new(MemorySource(bytes)))
}

fn open(parts: &Parts) -> Squashfs {
    open_bytes(parts.build().bytes).unwrap()
}

/// Checks all three parts of the error.
#[track_caller]
fn expect<T>(result: Result<T, LayerError>, table: &str, offset: usize, why: &str) {
    match result {
        Ok(_) => panic!("no error, expected in {table} at {offset}: {why}"),
        Err(LayerError::Corrupt { table: t, offset: o, why: w }) => {
            assert_eq!((t, o, w.as_str()), (table, offset as u64, why));
        }
        Err(other) => panic!("{other}, expected in {table} at {offset}: {why}"),
    }
}

/// The sample with a table changed.
fn changed(change: impl FnOnce(&mut Parts, &Places)) -> (Squashfs, Built, Places) {
    let (mut parts, places) = sample();
    change(&mut parts, &places);
    let built = parts.build();
    (open_bytes(built.bytes.clone()).unwrap(), built, places)
}

#[test]
fn the_sample_is_right() {
    let (parts, places) = sample();
    let image = open(&parts);
    let mut seen = Vec::new();
    let flow = image.check_all(&mut |event| {
        match event {
            Event::Node { path, node, .. } => seen.push((String::from_utf8(path.to_vec()).unwrap(), node.0)),
            Event::Problem { path, error } => panic!("{}: {error}", String::from_utf8_lossy(path)),
            Event::Content(_) => {}
        }
        ControlFlow::Continue(())
    });
    assert!(flow.is_continue());
    let names: Vec<_> = seen.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(
        names,
        ["/", "/device", "/fifo", "/file", "/folder", "/folder/a", "/folder/b", "/link", "/small"]
    );
    assert_eq!(seen[3].1, places.file);
    assert_eq!(image.node_by_number(5).unwrap(), Some(NodeId(places.folder)));
    let xattrs = image.xattrs(NodeId(places.link)).unwrap();
    assert_eq!(xattrs, [(b"user.x".to_vec(), b"yz".to_vec()), (b"trusted.long".to_vec(), b"value".to_vec())]);
}

#[test]
fn superblock() {
    let Built { bytes, inode_table, directory_table, id_table, fragment_table, .. } = sample().0.build();
    let with = |at: usize, field: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        open_bytes(bytes)
    };
    let size = bytes.len();
    let expect = |at: usize, field: &[u8], why: &str| expect(with(at, field), "superblock", at, why);
    expect(0, b"sqsh", "magic is 0x68737173, expected 0x73717368 (squashfs)");
    expect(4, &[0; 4], "there are no inodes, expected at least the root folder");
    expect(12, &3000u32.to_le_bytes(), "block size is 3000, expected a power of two from 4096 to 1048576");
    expect(12, &2048u32.to_le_bytes(), "block size is 2048, expected a power of two from 4096 to 1048576");
    expect(
        12,
        &(2u32 << 20).to_le_bytes(),
        "block size is 2097152, expected a power of two from 4096 to 1048576",
    );
    expect(20, &[0], "compressor is 0, expected 1 to 6");
    expect(20, &[7], "compressor is 7, expected 1 to 6");
    expect(22, &[13], "block log is 13, expected 12 for blocks of 4096");
    expect(26, &[0, 0], "the id table has no entries, expected at least 1");
    expect(28, &[3], "version is 3.0, expected 4.0");
    let why = "root inode reference is 0x2000, expected a block below 2^32 and an offset below 8192";
    expect(32, &0x2000u64.to_le_bytes(), why);
    let why = format!("{} bytes used, expected 96 to the {size} that there are", size + 1);
    expect(40, &(size as u64 + 1).to_le_bytes(), &why);
    expect(40, &[0; 8], &format!("0 bytes used, expected 96 to the {size} that there are"));
    let why = "inode table starts at 95, expected at least 96, the end of the superblock";
    expect(64, &95u64.to_le_bytes(), why);
    let why =
        format!("directory table starts at {inode_table}, as the inode table does, expected room for inodes");
    expect(72, &(inode_table as u64).to_le_bytes(), &why);
    let why = format!(
        "fragment table starts at 5, expected at least {directory_table}, the end of the directory table"
    );
    expect(80, &5u64.to_le_bytes(), &why);
    let why = format!(
        "export table takes 8 bytes at {}, expected an end within the {size} bytes used",
        u64::MAX - 1
    );
    expect(88, &(u64::MAX - 1).to_le_bytes(), &why);
    let why = format!("id table takes 8 bytes at {}, expected an end within the {size} bytes used", size - 7);
    expect(48, &(size as u64 - 7).to_le_bytes(), &why);
    let why = format!(
        "xattr table starts at {id_table}, expected at least {}, the end of the id table",
        id_table + 8
    );
    expect(56, &(id_table as u64).to_le_bytes(), &why);
    // A fragment count that needs more pointers than there is room for.
    let why = format!(
        "fragment table takes 67108864 bytes at {fragment_table}, expected an end within the {size} bytes used"
    );
    match with(16, &u32::MAX.to_le_bytes()) {
        Err(LayerError::Corrupt { table: "superblock", offset: 80, why: found }) => assert_eq!(found, why),
        other => panic!("{:?}", other.err()),
    }
    let short = open_bytes(bytes[..95].to_vec());
    self::expect(short, "superblock", 0, "the image has 95 bytes, expected at least 96");
}

#[test]
fn root_is_a_folder() {
    let (mut parts, places) = sample();
    parts.root = places.fifo;
    let built = parts.build();
    let why = "the root inode is of type Fifo, expected Directory";
    expect(open_bytes(built.bytes), "inode table", built.inode_table, why);
}

#[test]
fn metadata_blocks() {
    let built = sample().0.build();
    let at = built.inode_table;
    let with = |header: u16| {
        let mut bytes = built.bytes.clone();
        bytes[at..at + 2].copy_from_slice(&header.to_le_bytes());
        open_bytes(bytes)
    };
    let room = built.directory_table - at - 2;
    let why = |size: u16| format!("a metadata block of {size} bytes, expected 1 to {room}");
    expect(with(0x8000), "inode table", at, &why(0));
    expect(with(0), "inode table", at, &why(0));
    expect(with(0x9000), "inode table", at, &why(0x1000));
    expect(with(0xffff), "inode table", at, &why(0x7fff));
    // The root is behind the end of a block of 10 bytes.
    expect(with(0x800a), "inode table", at, "offset 249 in a metadata block of 10 bytes");
    // The header says that the block is compressed, and it is not.
    let Err(LayerError::Corrupt { table: "inode table", offset, why }) = with(room as u16) else { panic!() };
    assert_eq!((offset, why.starts_with("zstd: ")), (at as u64, true), "{why}");

    let (image, built, _) = changed(|_, _| ());
    let beyond = NodeId((built.directory_table as u64) << 16);
    let start = built.inode_table + built.directory_table;
    let why = format!(
        "a metadata block at {start} to {}, expected within {at} to {}",
        start + 3,
        built.directory_table
    );
    expect(image.attr(beyond), "inode table", start, &why);
    assert!(matches!(image.attr(NodeId(u64::MAX)), Err(LayerError::Corrupt { table: "inode table", .. })));
}

/// An inode that begins in a block that is not full has no next block.
#[test]
fn a_structure_does_not_cross_a_short_block() {
    let (mut parts, _) = sample();
    let root = folder(1, 10, 0, 0, 0, 0);
    parts.inodes = root.clone();
    let cut = build::common(9, 2)[..10].to_vec();
    parts.inodes.extend(cut);
    parts.root = 0;
    let mut built = parts.build();
    let image = open_bytes(std::mem::take(&mut built.bytes)).unwrap();
    let why = "a structure goes on after a metadata block of 50 bytes, expected 8192 in any but the last";
    expect(image.attr(NodeId(root.len() as u64)), "inode table", built.inode_table, why);
}

#[test]
fn inodes() {
    let case = |inode: Vec<u8>, why: &str| {
        let mut node = NodeId(0);
        let (image, built, _) = changed(|parts, _| {
            node = NodeId(parts.inodes.len() as u64);
            parts.inodes.extend(inode);
            // Room for the rest of an inode that says more than it has.
            parts.inodes.extend([0; 64]);
        });
        expect(image.attr(node), "inode table", built.inode_table, why);
    };
    let at = sample().0.inodes.len();
    for kind in [0, 15, 0xffff] {
        case(
            common(kind, 1),
            &format!("inode type is {kind}, expected 1 to 14 (byte {at} of the metadata block)"),
        );
    }
    let link = [common(3, 1), fields![1u32, 4097u32]].concat();
    case(
        link,
        &format!(
            "a link with a target of 4097 bytes, expected at most 4096 (byte {at} of the metadata block)"
        ),
    );
    let size = 1u64 << 63;
    let why =
        format!("a file of {size} bytes, expected at most {} (byte {at} of the metadata block)", i64::MAX);
    case(file(1, 96, size, (NONE, 0), &[]), &why);
    let why = format!(
        "a listing at offset 8192 of a metadata block, expected below 8192 (byte {at} of the metadata block)"
    );
    case(folder(1, 1, 0, 8192, 0, 0), &why);

    let (image, built, places) = changed(|parts, places| parts.inodes[places.fifo as usize + 4] = 2);
    let why = "entry 2 is asked for, expected below 2";
    expect(image.attr(NodeId(places.fifo)), "id table", built.id_table, why);
}

#[test]
fn links() {
    let (image, built, places) = changed(|parts, places| parts.inodes[places.link as usize + 25] = 0);
    let end = places.link + 28;
    let why = format!("the target of a link has a NUL byte in it (byte {end} of the metadata block)");
    expect(image.read_link(NodeId(places.link)), "inode table", built.inode_table, &why);
    assert!(matches!(image.read_link(NodeId(places.fifo)), Err(LayerError::WrongType { .. })));
}

#[test]
fn listings() {
    let case = |listing: Vec<u8>, why: &str| {
        let mut root = NodeId(0);
        let (image, built, _) = changed(|parts, _| {
            root = NodeId(parts.inodes.len() as u64);
            parts.inodes.extend(folder(9, 1, 0, 0, listing.len() as u32, 0));
            parts.listings = listing;
            parts.listings.extend([0; 300]);
        });
        let result = image.read_dir(root, 0, &mut |_| true);
        expect(result, "directory table", built.directory_table, why);
        assert!(image.lookup(root, b"\xff").is_err());
    };
    let at = |at: usize| format!("(byte {at} of the metadata block)");
    case(fields![256u32, 0u32, 1u32], &format!("a run of 257 entries, expected at most 256 {}", at(12)));
    case(
        fields![u32::MAX, 0u32, 1u32],
        &format!("a run of 4294967295 entries, expected at most 256 {}", at(12)),
    );
    case(vec![0; 11], &format!("12 bytes at the end of a listing, expected at most 11 {}", at(0)));
    case(run(1, 0, 1), &format!("8 bytes at the end of a listing, expected at most 0 {}", at(12)));
    let cut = [run(1, 0, 1), entry(0, 0, 6, b"abc")[..10].to_vec()].concat();
    case(cut, &format!("3 bytes at the end of a listing, expected at most 2 {}", at(20)));
    let one = |entry: Vec<u8>| [run(1, 0, 1), entry].concat();
    let why = format!("an inode at offset 8192 of a metadata block, expected below 8192 {}", at(20));
    case(one(entry(8192, 0, 6, b"a")), &why);
    for kind in [0, 8, 9, 0xffff] {
        let why = format!("type of an entry is {kind}, expected 1 to 7 {}", at(20));
        case(one(entry(0, 0, kind, b"a")), &why);
    }
    case(one(entry(0, 0, 6, &[b'n'; 256])), &format!("a name of 256 bytes, expected at most 255 {}", at(20)));
    for (name, shown) in [(".", "."), ("..", ".."), ("a/b", "a/b"), ("a\0", "a\\0")] {
        let why = format!("the name \"{shown}\" is not allowed {}", at(20 + name.len()));
        case(one(entry(0, 0, 6, name.as_bytes())), &why);
    }
    for (first, second) in [("b", "a"), ("a", "a"), ("ab", "a")] {
        let entries =
            [run(2, 0, 1), entry(0, 0, 6, first.as_bytes()), entry(0, 0, 6, second.as_bytes())].concat();
        let why = format!("the name {second:?} after {first:?}, expected rising order {}", at(entries.len()));
        case(entries, &why);
        // Also where a new run begins between the two.
        let runs = [one(entry(0, 0, 6, first.as_bytes())), one(entry(0, 0, 6, second.as_bytes()))].concat();
        let why = format!("the name {second:?} after {first:?}, expected rising order {}", at(runs.len()));
        case(runs, &why);
    }
}

/// An order that breaks where a run begins is seen by who reads on from there as well, before and after others read.
#[test]
fn an_order_that_breaks_between_runs_of_a_large_folder() {
    let mut root = NodeId(0);
    let (image, built, _) = changed(|parts, _| {
        root = NodeId(parts.inodes.len() as u64);
        parts.listings.clear();
        for number in (0..200u32).chain(100..300) {
            parts.listings.extend([run(1, 0, 1), entry(0, 0, 6, format!("{number:05}").as_bytes())].concat());
        }
        parts.inodes.extend(folder(9, 1, 0, 0, parts.listings.len() as u32, 0));
    });
    let at = 201 * 25;
    let why = format!(
        "the name \"00100\" after \"00199\", expected rising order (byte {at} of the metadata block)"
    );
    for cookie in [200 * 25, 0, 200 * 25, 100 * 25, 200 * 25 - 1, 300 * 25] {
        let result = image.read_dir(root, cookie, &mut |_| true);
        expect(result, "directory table", built.directory_table, &why);
    }
}

/// A listing that claims to be longer than the table ends where the table does.
#[test]
fn a_listing_ends_with_its_table() {
    let mut root = NodeId(0);
    let (image, built, _) = changed(|parts, _| {
        root = NodeId(parts.inodes.len() as u64);
        parts.inodes.extend(folder(9, 1, 0, 0, u32::MAX - 3, 0));
        parts.listings.clear();
        for number in 0..400u32 {
            parts.listings.extend([run(1, 0, 1), entry(0, 0, 6, format!("{number:05}").as_bytes())].concat());
        }
    });
    let mut names = 0;
    let result = image.read_dir(root, 0, &mut |_| {
        names += 1;
        true
    });
    assert_eq!(names, 400);
    let at = built.directory_table + 8194;
    let why = "a structure goes on after a metadata block of 1808 bytes, expected 8192 in any but the last";
    expect(result, "directory table", at, why);
}

#[test]
fn indexes() {
    let case = |index: Vec<u8>, name: &[u8], why: &str| {
        let (mut root, listing) = (NodeId(0), [run(1, 0, 1), entry(0, 0, 6, b"m")].concat());
        let (image, built, _) = changed(|parts, _| {
            root = NodeId(parts.inodes.len() as u64);
            parts
                .inodes
                .extend([folder(9, 1, 0, 0, listing.len() as u32, 1), index.clone(), vec![0; 300]].concat());
            parts.listings = listing;
        });
        expect(image.lookup(root, name), "inode table", built.inode_table, why);
    };
    let at = sample().0.inodes.len() + 40;
    let beyond = [fields![21u32, 0u32, 0u32], b"a".to_vec()].concat();
    let why = format!(
        "the index of a folder names offset 21, expected below 21 (byte {} of the metadata block)",
        at + 13
    );
    case(beyond, b"m", &why);
    let long = fields![0u32, 0u32, 255u32];
    let why = format!(
        "a name of 256 bytes in the index of a folder, expected at most 255 (byte {} of the metadata block)",
        at + 12
    );
    case(long, b"m", &why);
}

#[test]
fn block_lists() {
    let case = |inode: Vec<u8>, offset: u64| {
        let mut node = NodeId(0);
        let (image, built, _) = changed(|parts, _| {
            node = NodeId(parts.inodes.len() as u64);
            parts.inodes.extend(inode);
        });
        (image.extent(node, offset), built)
    };
    let at = sample().0.inodes.len() + 56;
    let stored = 1 << 24;
    // Bits that have no meaning.
    let (result, built) = case(file(9, 96, 4096, (NONE, 0), &[1 << 25]), 0);
    let why = format!(
        "size word of block 0 is 0x2000000, expected bits 25 to 31 clear (byte {} of the metadata block)",
        at + 4
    );
    expect(result, "inode table", built.inode_table, &why);
    let (result, built) = case(file(9, 96, 8192, (NONE, 0), &[1 << 31, 10]), 5000);
    let why = format!(
        "size word of block 0 is 0x80000000, expected bits 25 to 31 clear (byte {at} of the metadata block)"
    );
    expect(result, "inode table", built.inode_table, &why);
    // Sizes.
    let (result, _) = case(file(9, 96, 4096, (NONE, 0), &[stored]), 0);
    expect(result, "data block", 96, "takes 0 bytes (size word 0x1000000), expected 1 to 4096");
    let (result, _) = case(file(9, 96, 100, (NONE, 0), &[stored | 101]), 0);
    expect(result, "data block", 96, "takes 101 bytes (size word 0x1000065), expected 1 to 100");
    let (result, built) = case(file(9, 96, 4096, (NONE, 0), &[5000]), 0);
    let why = format!(
        "5000 bytes at 96, expected within 96 to {}, where the inode table starts",
        built.inode_table
    );
    expect(result, "data block", 96, &why);
    // Places.
    let (result, built) = case(file(9, 95, 4096, (NONE, 0), &[10]), 0);
    let why =
        format!("10 bytes at 95, expected within 96 to {}, where the inode table starts", built.inode_table);
    expect(result, "data block", 95, &why);
    let (result, built) = case(file(9, u64::MAX - 5, 8192, (NONE, 0), &[10, 10]), 4096);
    let why = format!(
        "the blocks of a file end beyond 2^64, expected within the image (byte {} of the metadata block)",
        at + 4
    );
    expect(result, "inode table", built.inode_table, &why);
    // More blocks than there can be words for in the table.
    let size = 1u64 << 62;
    let (result, built) = case(file(9, 96, size, (NONE, 0), &[]), size - 1);
    let most = ((built.directory_table - built.inode_table) / 3 + 1) * 2048;
    let why = format!(
        "a file of {size} bytes has {} blocks, expected at most the {most} that fit in the table (byte {at} of the metadata block)",
        size >> 12
    );
    expect(result, "inode table", built.inode_table, &why);
    // A list that ends with the table.
    let (result, built) = case(file(9, 96, 4096 * 5000, (NONE, 0), &[0; 100]), 4096 * 4999);
    let len = sample().0.inodes.len() + 456;
    let why = format!(
        "a structure goes on after a metadata block of {len} bytes, expected 8192 in any but the last"
    );
    expect(result, "inode table", built.inode_table, &why);

    let (image, _, places) = changed(|_, _| ());
    let beyond = image.extent(NodeId(places.small), 30);
    assert!(matches!(beyond, Err(LayerError::Read(ReadError::OutOfRange { offset: 30, len: 1, size: 30 }))));
    assert!(matches!(image.extent(NodeId(places.fifo), 0), Err(LayerError::WrongType { .. })));
}

#[test]
fn fragments() {
    let (image, built, places) = changed(|parts, places| parts.inodes[places.small as usize + 44] = 1);
    let why = "entry 1 is asked for, expected below 1";
    expect(image.extent(NodeId(places.small), 0), "fragment table", built.fragment_table, why);
    // The file's bytes are beyond the block.
    let (image, built, places) = changed(|parts, places| {
        parts.inodes[places.small as usize + 48..][..4].copy_from_slice(&4090u32.to_le_bytes());
    });
    let why = "30 bytes at 4090 of fragment block 0, expected within 4096 bytes";
    expect(image.extent(NodeId(places.small), 0), "inode table", built.inode_table, why);
    let entry = |start: u64, word: u32| {
        let (image, built, places) = changed(|parts, _| parts.fragments = fields![start, word, 0u32]);
        (image.extent(NodeId(places.small), 0), built)
    };
    let (result, built) = entry(96, 1 << 26);
    let why = "size word of fragment block 0 is 0x4000000, expected bits 25 to 31 clear";
    expect(result, "fragment table", built.fragment_table, why);
    let (result, _) = entry(96, 0);
    expect(result, "fragment block", 96, "takes 0 bytes (size word 0x0), expected 1 to 4096");
    let (result, _) = entry(96, 4097);
    expect(result, "fragment block", 96, "takes 4097 bytes (size word 0x1001), expected 1 to 4096");
    let (result, built) = entry(built.inode_table as u64, 1);
    let start = built.inode_table;
    let why = format!("1 bytes at {start}, expected within 96 to {start}, where the inode table starts");
    expect(result, "fragment block", start, &why);
}

#[test]
fn stored_blocks() {
    // A zstd frame of 10 bytes where a whole block should be.
    let frame = zstd::bulk::compress(b"ten bytes!", 1).unwrap();
    let mut node = NodeId(0);
    let (image, ..) = changed(|parts, _| {
        node = NodeId(parts.inodes.len() as u64);
        parts.inodes.extend(file(9, 96, 4096, (NONE, 0), &[frame.len() as u32]));
        parts.data[..frame.len()].copy_from_slice(&frame);
    });
    let Place::Block(block) = image.extent(node, 0).unwrap().place else { panic!() };
    let mut out = b"old".to_vec();
    expect(image.decode(block, &mut out), "data block", 96, "decodes to 10 bytes, expected 4096");
    assert!(out.is_empty());

    // A bomb: it decodes to 4 MiB.
    for (compressor, name, frame) in [
        (6, "zstd", zstd::bulk::compress(&vec![0; 4 << 20], 1).unwrap()),
        (1, "gzip", {
            use std::io::Write;
            let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
            zlib.write_all(&[0; 1 << 20]).unwrap();
            zlib.finish().unwrap()
        }),
        (5, "lz4", lz4_flex::block::compress(&[0; 1 << 19])),
    ] {
        let (image, ..) = changed(|parts, _| {
            node = NodeId(parts.inodes.len() as u64);
            parts.compressor = compressor;
            parts.inodes.extend(file(9, 96, 4096, (NONE, 0), &[frame.len() as u32]));
            parts.data[..frame.len()].copy_from_slice(&frame);
        });
        let Place::Block(block) = image.extent(node, 0).unwrap().place else { panic!() };
        let mut out = Vec::new();
        let error = image.decode(block, &mut out).unwrap_err();
        let LayerError::Corrupt { table: "data block", offset: 96, why } = error else { panic!("{error}") };
        assert!(why.starts_with(&format!("{name}: ")), "{why}");
        assert!(out.is_empty() && out.capacity() <= 8192, "{}", out.capacity());
    }
}

#[test]
fn export_table() {
    let (image, built, _) = changed(|parts, _| {
        let export = parts.export.as_mut().unwrap();
        export[8..16].copy_from_slice(&0x1_0000_2000u64.to_le_bytes());
        export[16..24].copy_from_slice(&(1u64 << 48).to_le_bytes());
    });
    let at = built.export_table;
    let why = "inode 2 is at 0x100002000, expected a block below 2^32 and an offset below 8192";
    expect(image.node_by_number(2), "export table", at, why);
    let why = "inode 3 is at 0x1000000000000, expected a block below 2^32 and an offset below 8192";
    expect(image.node_by_number(3), "export table", at, why);
    expect(image.node_by_number(0), "export table", at, "inode 0 is asked for, expected 1 or more");
    expect(image.node_by_number(10), "export table", at, "entry 9 is asked for, expected below 9");
    let (image, ..) = changed(|parts, _| parts.export = None);
    assert_eq!(image.node_by_number(2).unwrap(), None);
}

#[test]
fn pointers_stay_in_their_table() {
    let (built, places) = (sample().0.build(), sample().1);
    for pointer in [0, 96, built.id_table as u64, u64::MAX] {
        let mut bytes = built.bytes.clone();
        bytes[built.id_table..built.id_table + 8].copy_from_slice(&pointer.to_le_bytes());
        let image = open_bytes(bytes).unwrap();
        let why = format!(
            "a metadata block at {pointer} to {}, expected within {} to {}",
            pointer.saturating_add(3),
            built.directory_table,
            built.id_table
        );
        expect(image.attr(NodeId(places.fifo)), "id table", pointer as usize, &why);
    }
}

#[test]
fn xattrs() {
    let case = |values: Vec<u8>, sets: Vec<u8>| {
        let (image, built, places) = changed(|parts, _| parts.xattrs = Some((values, sets)));
        (image.xattrs(NodeId(places.link)), built)
    };
    let set = |reference: u64, entries: u32| fields![reference, entries, 0u32];
    let name = |kind: u16, name: &[u8]| [fields![kind, name.len() as u16], name.to_vec()].concat();
    let table = "xattr table";

    let (result, built) = case(name(0, b""), set(0, 1));
    let why = "a name of 5 bytes with its prefix, expected at most 255 and a name after the prefix (byte 4 of the metadata block)";
    expect(result, table, built.xattr_start, why);
    let (result, built) = case(name(1, &[b'n'; 248]), set(0, 1));
    let why = "a name of 256 bytes with its prefix, expected at most 255 and a name after the prefix (byte 4 of the metadata block)";
    expect(result, table, built.xattr_start, why);
    let (result, built) = case([name(0, b"a\0b"), fields![0u32]].concat(), set(0, 1));
    expect(result, table, built.xattr_start, "a name with a NUL byte in it (byte 7 of the metadata block)");
    let (result, built) = case([name(0, b"a"), fields![65_537u32]].concat(), set(0, 1));
    let why = "a value of 65537 bytes (65537 for the file), expected at most 65536 (4194304) (byte 9 of the metadata block)";
    expect(result, table, built.xattr_start, why);
    let (result, built) = case([name(0x100, b"a"), fields![7u32, 0u64]].concat(), set(0, 1));
    let why = "a reference to a value has 7 bytes, expected 8 (byte 9 of the metadata block)";
    expect(result, table, built.xattr_start, why);
    let (result, built) = case([name(0x100, b"a"), fields![8u32, 8192u64]].concat(), set(0, 1));
    let why = "a reference to offset 8192 of a metadata block, expected below 8192";
    expect(result, table, built.xattr_start, why);
    let (result, built) = case(name(0, b"a"), set(1 << 40, 1));
    let start = built.xattr_start + (1 << 24);
    let (from, to) = (built.xattr_start, built.xattr_table);
    expect(
        result,
        table,
        start,
        &format!("a metadata block at {start} to {}, expected within {from} to {to}", start + 3),
    );
    let (result, built) = case(name(0, b"a"), Vec::new());
    expect(result, table, built.xattr_table + 16, "entry 0 is asked for, expected below 0");
    // A type that no one knows is left out.
    let (result, _) = case([name(7, b"a"), fields![1u32, 9u8]].concat(), set(0, 1));
    assert_eq!(result.unwrap(), []);

    // 70 names that all refer to one value of 64 KiB: 4.4 MiB from a table of 66 KiB.
    let mut values = [fields![65_536u32], vec![b'v'; 65_536]].concat();
    let list = values.len() as u64;
    for number in 0..70 {
        values.extend([name(0x100, format!("{number}").as_bytes()), fields![8u32, 0u64]].concat());
    }
    let (result, built) = case(values, set(((list / 8192 * 8194) << 16) | (list % 8192), 70));
    let why = "a value of 65536 bytes (4259840 for the file), expected at most 65536 (4194304) (byte 4 of the metadata block)";
    expect(result, table, built.xattr_start, why);
    // Names of 64 KiB and more.
    let long = [name(0, &[b'n'; 250]), fields![0u32]].concat();
    let (result, built) = case(long.repeat(300), set(0, 300));
    let Err(LayerError::Corrupt { table: "xattr table", offset, why }) = result else { panic!() };
    assert!(why.starts_with("names of one file take 65792 bytes, expected at most 65536"), "{why}");
    assert_eq!(offset, built.xattr_start as u64 + 8 * 8194);

    let mut bytes = built.bytes;
    let places = sample().1;
    bytes[built.xattr_table..built.xattr_table + 8].copy_from_slice(&5u64.to_le_bytes());
    let image = open_bytes(bytes.clone()).unwrap();
    let why = format!(
        "names and values start at 5, expected {} (the id table) to {} (the header)",
        built.id_table, built.xattr_table
    );
    expect(image.xattrs(NodeId(places.link)), table, built.xattr_table, &why);
    bytes[built.xattr_table..built.xattr_table + 8]
        .copy_from_slice(&(built.xattr_start as u64).to_le_bytes());
    bytes[built.xattr_table + 8..built.xattr_table + 12].copy_from_slice(&1000u32.to_le_bytes());
    let image = open_bytes(bytes.clone()).unwrap();
    let why = format!("1000 sets take 16 bytes of pointers, expected to end within {} bytes", bytes.len());
    expect(image.xattrs(NodeId(places.link)), table, built.xattr_table, &why);
}

/// What a check of everything tells of an image, as `path: error`.
fn problems(parts: &Parts) -> Vec<String> {
    let mut found = Vec::new();
    let flow = open(parts).check_all(&mut |event| {
        if let Event::Problem { path, error } = event {
            found.push(format!("{}: {error}", String::from_utf8_lossy(path)));
        }
        ControlFlow::Continue(())
    });
    assert!(flow.is_continue());
    found
}

#[test]
fn a_check_names_every_file_that_is_hit() {
    let at = sample().0.build().inode_table;
    let case = |change: &dyn Fn(&mut Parts, &Places), expected: &[String]| {
        let (mut parts, places) = sample();
        change(&mut parts, &places);
        assert_eq!(problems(&parts), expected);
    };
    // The type in a listing: byte 16 of the first entry is its type.
    case(
        &|parts, _| parts.listings[16] = 4,
        &[format!(
            "/device: corrupt inode table at {at}: is of type CharDevice, the folder says BlockDevice"
        )],
    );
    case(
        &|parts, _| parts.listings[14..16].copy_from_slice(&[9, 0]),
        &[format!("/device: corrupt inode table at {at}: has inode number 2, the folder says 14")],
    );
    case(
        &|parts, places| parts.inodes[places.folder as usize + 28] = 3,
        &[format!("/folder: corrupt inode table at {at}: the folder above has inode number 3, expected 1")],
    );
    case(
        &|parts, _| parts.inode_count = 8,
        &[format!("/small: corrupt inode table at {at}: inode number is 9, expected 1 to 8")],
    );
    case(
        &|parts, places| parts.export.as_mut().unwrap()[8] = places.fifo as u8,
        &[format!(
            "/device: corrupt inode table at {at}: the export table has inode 2 at 0x18, found it at 0x0"
        )],
    );
    // A fragment block that is shorter than one of its two files needs.
    case(
        &|parts, _| parts.fragments = fields![96u64 + 4096, 1u32 << 24 | 50, 0u32],
        &["/file: corrupt fragment block at 4192: decodes to 50 bytes, expected at least 90 for this file"
            .into()],
    );
    // A folder within itself, and the name of the run in the index.
    let folder_in_folder = |parts: &mut Parts, places: &Places| {
        let inner = parts.listings.len() - 18;
        parts.listings[inner..inner + 2].copy_from_slice(&(places.folder as u16).to_le_bytes());
        parts.listings[inner + 2..inner + 4].copy_from_slice(&(-2i16).to_le_bytes());
        parts.listings[inner + 4] = 1;
    };
    case(
        &folder_in_folder,
        &[
            format!(
                "/folder/a: corrupt inode table at {at}: the folder above has inode number 1, expected 5"
            ),
            format!("/folder/a: corrupt inode table at {at}: a folder with two names, or within itself"),
        ],
    );
    case(
        &|parts, places| parts.inodes[places.folder as usize + 52] = b'b',
        &[format!(
            "/folder: corrupt inode table at {at}: the index of a folder names block 0 and \"b\" at offset 0, found 0 and \"a\""
        )],
    );
    case(
        &|parts, places| parts.inodes[places.folder as usize + 40] = 5,
        &[format!(
            "/folder: corrupt inode table at {at}: the index of a folder names offset 5, where no run begins"
        )],
    );
    case(
        &|parts, _| parts.flags = 1 << 10,
        &["/: corrupt compressor options at 96: a metadata block of 0 bytes, expected 1 to 4194".into()],
    );
}

/// A file of 100 GiB with 26 million blocks: any byte is found, and what is kept is bounded.
#[test]
fn block_list_of_100_gib() {
    const BLOCKS: u64 = 100 << 30 >> 12;
    let (mut parts, _) = sample();
    let root = folder(1, 10, 0, 0, 0, 0);
    // Every 1000th block is stored, with one byte; the others are holes.
    let mut words = vec![0; BLOCKS as usize];
    for word in words.iter_mut().step_by(1000) {
        *word = 1;
    }
    parts.inodes = [root.clone(), file(2, 96, BLOCKS << 12, (NONE, 0), &words)].concat();
    parts.root = 0;
    parts.data = (0..BLOCKS / 1000 + 1).map(|number| number as u8).collect();
    let image = open(&parts);
    let node = NodeId(root.len() as u64);
    for number in [BLOCKS - 1, 0, 25_000_000, 12_345_000, 999, 12_345_001, 26_214_000 - 1, 1] {
        let extent = image.extent(node, (number << 12) + 5).unwrap();
        assert_eq!(extent.file_offset, number << 12);
        match extent.place {
            Place::Hole => {
                assert!(!number.is_multiple_of(1000), "{number}");
                // As far as the next stored block, if that is in the same block of the table.
                assert!(extent.len >> 12 >= 1 && u64::from(extent.len >> 12) < 1000);
            }
            Place::Block(block) => {
                assert_eq!((number % 1000, block.start), (0, 96 + number / 1000));
            }
            Place::Shared { .. } => panic!(),
        }
    }
    assert!(image.metadata_cache_bytes() <= 4 << 20);
}
