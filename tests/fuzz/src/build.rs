//! Builds squashfs images from the decoded bytes of their tables, so that a fuzzer (or a test) sets the bytes of one
//! table while all that leads there is right. Nothing is compressed.

/// No fragment, no xattrs, no such table.
pub const NONE: u32 = u32::MAX;

/// Size of a full metadata block, in bytes.
const METADATA_BYTES: usize = 8192;

/// The decoded parts of an image.
#[derive(Clone)]
pub struct Parts {
    /// Number of the compressor, 1 to 6.
    pub compressor: u16,
    /// Binary logarithm of the size of a block.
    pub block_log: u16,
    pub flags: u16,
    /// Number of inodes that the superblock states.
    pub inode_count: u32,
    /// Reference of the root inode.
    pub root: u64,
    /// What is at 96 in the image: data blocks.
    pub data: Vec<u8>,
    pub inodes: Vec<u8>,
    pub listings: Vec<u8>,
    /// Entries of 16 bytes.
    pub fragments: Vec<u8>,
    /// Entries of 8 bytes.
    pub export: Option<Vec<u8>>,
    /// Entries of 4 bytes.
    pub ids: Vec<u8>,
    /// Names and values, and sets of 16 bytes.
    pub xattrs: Option<(Vec<u8>, Vec<u8>)>,
}

/// An image, and where in it things are.
pub struct Built {
    pub bytes: Vec<u8>,
    pub inode_table: usize,
    pub directory_table: usize,
    /// Where pointers begin.
    pub fragment_table: usize,
    pub export_table: usize,
    pub id_table: usize,
    /// Where names and values begin, and the header.
    pub xattr_start: usize,
    pub xattr_table: usize,
}

/// Appends metadata blocks with that content, each stored as it is; the answer is where they begin.
pub fn metadata(image: &mut Vec<u8>, content: &[u8]) -> Vec<u64> {
    let mut starts = Vec::new();
    for block in content.chunks(METADATA_BYTES) {
        starts.push(image.len() as u64);
        image.extend_from_slice(&(block.len() as u16 | 0x8000).to_le_bytes());
        image.extend_from_slice(block);
    }
    starts
}

fn table(image: &mut Vec<u8>, content: &[u8]) -> usize {
    let starts = metadata(image, content);
    let at = image.len();
    image.extend(starts.iter().flat_map(|start| start.to_le_bytes()));
    at
}

impl Parts {
    pub fn build(&self) -> Built {
        let mut image = vec![0; 96];
        image.extend_from_slice(&self.data);
        let inode_table = image.len();
        metadata(&mut image, &self.inodes);
        let directory_table = image.len();
        metadata(&mut image, &self.listings);
        let fragment_table = table(&mut image, &self.fragments);
        let export_table = self.export.as_ref().map_or(usize::MAX, |export| table(&mut image, export));
        let id_table = table(&mut image, &self.ids);
        let xattr_start = image.len();
        let xattr_table = match &self.xattrs {
            None => usize::MAX,
            Some((values, sets)) => {
                metadata(&mut image, values);
                let starts = metadata(&mut image, sets);
                let at = image.len();
                image.extend_from_slice(&(xattr_start as u64).to_le_bytes());
                image.extend_from_slice(&(sets.len() as u32 / 16).to_le_bytes());
                image.extend_from_slice(&0u32.to_le_bytes());
                image.extend(starts.iter().flat_map(|start| start.to_le_bytes()));
                at
            }
        };
        let used = image.len();
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"hsqs");
        put(4, &self.inode_count.to_le_bytes());
        put(12, &1u32.checked_shl(self.block_log.into()).unwrap_or_default().to_le_bytes());
        put(16, &(self.fragments.len() as u32 / 16).to_le_bytes());
        put(20, &self.compressor.to_le_bytes());
        put(22, &self.block_log.to_le_bytes());
        put(24, &self.flags.to_le_bytes());
        put(26, &(self.ids.len() as u16 / 4).to_le_bytes());
        put(28, &4u16.to_le_bytes());
        put(32, &self.root.to_le_bytes());
        put(40, &(used as u64).to_le_bytes());
        put(48, &(id_table as u64).to_le_bytes());
        put(56, &(xattr_table as u64).to_le_bytes());
        put(64, &(inode_table as u64).to_le_bytes());
        put(72, &(directory_table as u64).to_le_bytes());
        put(80, &(fragment_table as u64).to_le_bytes());
        put(88, &(export_table as u64).to_le_bytes());
        Built {
            bytes: image,
            inode_table,
            directory_table,
            fragment_table,
            export_table,
            id_table,
            xattr_start,
            xattr_table,
        }
    }
}

/// Appends fields, little-endian.
#[macro_export]
macro_rules! fields {
    ($($value:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$value.to_le_bytes());)*
        bytes
    }};
}

/// The 16 bytes that inodes begin with; owner and group are entry 0 of the id table.
pub fn common(kind: u16, number: u32) -> Vec<u8> {
    fields![kind, 0o644u16, 0u16, 0u16, 1_000u32 + number, number]
}

/// An extended folder with no xattrs.
pub fn folder(number: u32, parent: u32, block: u32, offset: u16, listing_bytes: u32, index: u16) -> Vec<u8> {
    [common(8, number), fields![2u32, listing_bytes + 3, block, parent, index, offset, NONE]].concat()
}

/// An extended file with no xattrs.
pub fn file(number: u32, start: u64, size: u64, fragment: (u32, u32), words: &[u32]) -> Vec<u8> {
    let mut inode = common(9, number);
    inode.extend(fields![start, size, 0u64, 1u32, fragment.0, fragment.1, NONE]);
    inode.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    inode
}

/// The header of a run of entries.
pub fn run(entries: u32, block: u32, number: u32) -> Vec<u8> {
    fields![entries - 1, block, number]
}

/// An entry of a listing.
pub fn entry(offset: u16, delta: i16, kind: u16, name: &[u8]) -> Vec<u8> {
    [fields![offset, delta, kind, name.len() as u16 - 1], name.to_vec()].concat()
}

/// Where things are in [`sample`], as offsets in the decoded inode table (the node ids are the same numbers).
pub struct Places {
    pub root: u64,
    pub device: u64,
    pub fifo: u64,
    pub file: u64,
    pub folder: u64,
    pub link: u64,
    pub small: u64,
}

/// A small image with something in each table.
///
/// ```text
/// /device  /fifo  /file (a stored block, a hole, a tail)  /folder/a /folder/b (an index)  /link (xattrs)  /small (a tail)
/// ```
pub fn sample() -> (Parts, Places) {
    let stored = 1u32 << 24;
    // At 96 a block of 4096 bytes, after it a fragment block of 100 bytes.
    let mut data: Vec<u8> = (0..4096u32).map(|number| ((number * 7) >> 3) as u8).collect();
    data.extend((0..100).map(|number| b'A' + number % 26));
    let names: [(&[u8], u16); 6] =
        [(b"device", 5), (b"fifo", 6), (b"file", 2), (b"folder", 1), (b"link", 3), (b"small", 2)];
    let inner = [run(2, 0, 7), entry(0, 0, 6, b"a"), entry(0, 1, 6, b"b")].concat();
    let listing_bytes = 12 + names.iter().map(|(name, _)| 8 + name.len() as u32).sum::<u32>();

    let mut inodes = Vec::new();
    let mut starts = Vec::new();
    let mut add = |inode: Vec<u8>| {
        starts.push(inodes.len() as u64);
        inodes.extend(inode);
    };
    add([common(5, 2), fields![1u32, 0x0103u32]].concat());
    add([common(6, 3), fields![1u32]].concat());
    add(file(4, 96, 8192 + 60, (0, 30), &[stored | 4096, 0]));
    let index = [fields![0u32, 0u32, 0u32], b"a".to_vec()].concat();
    add([folder(5, 1, 0, listing_bytes as u16, inner.len() as u32, 1), index].concat());
    add([common(10, 6), fields![1u32, 4u32], b"file".to_vec(), fields![0u32]].concat());
    add(file(9, 0, 30, (0, 0), &[]));
    add(folder(1, 10, 0, 0, listing_bytes, 0));
    add([common(6, 7), fields![1u32]].concat());
    add([common(6, 8), fields![1u32]].concat());
    let [device, fifo, file, folder, link, small, root, a, b] = starts[..] else { unreachable!() };

    let mut listings = run(6, 0, 5);
    for ((name, kind), (at, number)) in
        names.into_iter().zip([(device, 2), (fifo, 3), (file, 4), (folder, 5), (link, 6), (small, 9)])
    {
        listings.extend(entry(at as u16, number - 5, kind, name));
    }
    listings.extend([run(2, 0, 7), entry(a as u16, 0, 6, b"a"), entry(b as u16, 1, 6, b"b")].concat());

    let elsewhere = [fields![5u32], b"value".to_vec()].concat();
    let list = [
        fields![0u16, 1u16],
        b"x".to_vec(),
        fields![2u32],
        b"yz".to_vec(),
        fields![0x101u16, 4u16],
        b"long".to_vec(),
        fields![8u32, 0u64],
    ]
    .concat();
    let parts = Parts {
        compressor: 6,
        block_log: 12,
        flags: 0,
        inode_count: 9,
        root,
        data,
        inodes,
        listings,
        fragments: fields![96u64 + 4096, stored | 100, 0u32],
        export: Some(
            [root, device, fifo, file, folder, link, a, b, small]
                .iter()
                .flat_map(|at| at.to_le_bytes())
                .collect(),
        ),
        ids: fields![1000u32, 0u32],
        xattrs: Some(([elsewhere.clone(), list].concat(), fields![elsewhere.len() as u64, 2u32, 30u32])),
    };
    (parts, Places { root, device, fifo, file, folder, link, small })
}
