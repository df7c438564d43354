//! Tar headers of all dialects, generated at random, against what GNU tar makes of them.

#[allow(dead_code)]
#[path = "common/whole/scan.rs"]
mod scan;
#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;
#[path = "common/unmount.rs"]
mod unmount;

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Command;

use mosfs::internals::convert::{
    Codec, ConvertError, Converted, Effort, LowerEntry, Packing, TarLayer, convert_tar,
};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::format::Compression;
use mosfs::internals::progress::Progress;
use scan::{Tree, scan};
use tarball::{Header, Tarball, record};
use tempfile::TempDir;
use tools::{need_root, run, run_any};
use unmount::unmount;

/// How many archives are generated.
const ARCHIVES: u64 = 500;

/// A small generator of random numbers (xorshift64*), the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next(from.len() as u64) as usize]
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.next(count) == 0
    }
}

/// Who would write such a header.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
    Pax,
}

const DIALECTS: [Dialect; 5] = [Dialect::V7, Dialect::Ustar, Dialect::Star, Dialect::Gnu, Dialect::Pax];

/// Writes a number into a field in one of the ways that are in use, and now and then in one that is in none.
fn number(random: &mut Random, len: usize, value: u64) -> Vec<u8> {
    let digits = format!("{value:o}").into_bytes();
    let fits = |room: usize| digits.len() <= room;
    let padded = |width: usize| format!("{value:0width$o}").into_bytes();
    let base_256 = || {
        let mut bytes = vec![0; len];
        bytes[len - 8..].copy_from_slice(&value.to_be_bytes());
        bytes[0] |= 0x80;
        bytes
    };
    let mut field = match random.next(13) {
        // As POSIX has it; to the last byte; ended by a blank, or by both.
        0 | 1 if fits(len - 1) => padded(len - 1),
        2 if fits(len) => padded(len),
        3 if fits(len - 1) => [padded(len - 1), b" ".to_vec()].concat(),
        4 if fits(len - 2) => [padded(len - 2), b" \0".to_vec()].concat(),
        // Blanks before it, of more kinds than one.
        5 if fits(len - 3) => [b" \t".to_vec(), digits.clone()].concat(),
        // A NUL before it, one only.
        6 if fits(len - 2) => [b"\0".to_vec(), padded(len - 2)].concat(),
        7 if fits(len - 4) => [b"\0  ".to_vec(), digits.clone()].concat(),
        // What is behind its end does not count.
        8 if fits(len - 3) => [digits.clone(), b"\x00xyz9".to_vec()].concat(),
        9 if fits(len - 3) => [digits.clone(), b" 7?".to_vec()].concat(),
        10 if len == 12 || value < 1 << 55 => base_256(),
        11 if random.one_in(4) => match random.next(4) {
            0 => [digits.clone(), b"x".to_vec()].concat(),
            1 => b"9".to_vec(),
            2 => b"0x1".to_vec(),
            _ => [vec![0x81], vec![0; len - 1]].concat(),
        },
        _ if fits(len - 1) => padded(len - 1),
        _ => base_256(),
    };
    field.resize(len, 0);
    field
}

/// Fills in the checksum in one of the ways that are in use.
fn seal(random: &mut Random, header: &mut Header) {
    header.set(148, b"        ");
    let unsigned: u64 = header.0.iter().map(|byte| u64::from(*byte)).sum();
    let signed: i64 = header.0.iter().map(|byte| i64::from(*byte as i8)).sum();
    let sum = match random.next(4) {
        0 if signed > 0 => signed as u64,
        1 if random.one_in(10) => unsigned + 1,
        _ => unsigned,
    };
    let text = match random.next(4) {
        0 => format!("{sum:06o}\0 "),
        1 => format!("{sum:06o} \0"),
        2 => format!("{sum:07o}\0"),
        _ => format!("{sum:>6o}\0 "),
    };
    header.set(148, text.as_bytes());
}

fn block(random: &mut Random, bytes: &mut Vec<u8>, mut header: Header, content: &[u8]) {
    seal(random, &mut header);
    bytes.extend_from_slice(&header.0);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

/// A piece of a sparse file's map.
fn piece(offset: u64, len: u64) -> Vec<u8> {
    format!("{offset:011o}\0{len:011o}\0").into_bytes()
}

/// Adds a random entry, with what goes before it.
fn entry(random: &mut Random, bytes: &mut Vec<u8>, names: &mut Vec<Vec<u8>>) {
    let dialect = random.pick(&DIALECTS);
    let kind = random.pick(b"00000\x007522211346DSSQaV");
    let mut short = format!("n{}", random.next(1 << 40)).into_bytes();
    match random.next(8) {
        0 => short = [b"./", &short[..]].concat(),
        1 => short = [b"/", &short[..]].concat(),
        2 => short.resize(100, b'l'),
        3 => short.extend_from_slice(b"\xff\xc3\xbc odd\n'\\"),
        _ => {}
    }
    if random.one_in(8) && short.len() < 90 && matches!(kind, b'0' | 0 | b'7' | b'5' | b'D') {
        short.push(b'/');
    }
    let mut name = short.clone();
    let content: Vec<u8> =
        (0..random.pick(&[0, 1, 511, 512, 513, 3000])).map(|_| random.next(256) as u8).collect();
    let is_unknown = matches!(kind, b'Q' | b'a');
    let is_file = is_unknown || matches!(kind, b'0' | 0 | b'7') && !name.ends_with(b"/");
    let mut stored: Vec<u8> = if is_file { content.clone() } else { Vec::new() };
    let mut records: Vec<u8> = Vec::new();
    let mut header = Header([0; 512]);
    match dialect {
        Dialect::V7 => drop(header.set(500, b"v7")),
        Dialect::Ustar | Dialect::Pax => drop(header.set(257, b"ustar\x0000")),
        Dialect::Star => {
            header.set(257, b"ustar\x0000").set(476, b"07346545000 07346545000 ");
            if random.one_in(2) {
                header.set(508, b"tar\0");
            }
        }
        Dialect::Gnu => drop(header.set(257, b"ustar  \0")),
    }
    // The prefix of POSIX, in a place where the other dialects have something else.
    if random.one_in(3) && kind != b'S' {
        header.set(345, b"pre");
        if matches!(dialect, Dialect::Ustar | Dialect::Star | Dialect::Pax) {
            name = [b"pre/", &name[..]].concat();
        }
    }
    header.set(0, &short).set(156, &[kind]);
    for (at, len, value) in [
        (100, 8, random.pick(&[0o644, 0o755, 0o4711, 0o2750, 0o1777, 0o100_600, 0, 0o7777])),
        (108, 8, random.pick(&[0, 1000, 65534, 2_097_151, 3_000_000_000])),
        (116, 8, random.pick(&[0, 12, 2_097_152, 4_000_000_000])),
        (136, 12, random.pick(&[0, 1, 1_000_000_000, 4_000_000_000, 8_589_934_591])),
    ] {
        let field = number(random, len, value);
        header.set(at, &field);
    }
    if random.one_in(12) {
        // Before 1970, in base 256.
        header.set(136, &[&[0xff; 8][..], &(-5_000i32).to_be_bytes()[..]].concat());
    }
    match kind {
        b'1' => {
            let target = names[random.next(names.len() as u64) as usize].clone();
            if target.len() <= 100 && random.one_in(2) {
                header.set(157, &target);
            } else {
                let link = [&target[..], &b"\0"[..]].concat();
                let mut long = Header::new(b'K', b"././@LongLink", link.len() as u64);
                long.set(257, b"ustar  \0");
                block(random, bytes, long, &link);
            }
        }
        b'2' => match random.next(3) {
            0 if dialect == Dialect::Pax => records.extend(record(b"linkpath", &vec![b't'; 300])),
            1 => drop(header.set(157, &[b'x'; 100])),
            _ => drop(header.set(157, b"some/where")),
        },
        b'3' | b'4' => {
            for (at, value) in [(329, random.pick(&[1, 8, 259])), (337, random.pick(&[0, 3, 300, 70_000]))] {
                let field = number(random, 8, value);
                header.set(at, &field);
            }
        }
        b'D' if dialect == Dialect::Gnu => stored = b"Yname\0\0".to_vec(),
        b'V' => {}
        b'S' if matches!(dialect, Dialect::Gnu | Dialect::Star) => {
            // More pieces than the header has room for, or few; the last one may be a hole's end.
            let count = random.pick(&[1, 3, 4, 5, 30]);
            let mut pieces: Vec<Vec<u8>> = (0..count).map(|n| piece(512 * (2 * n + 1), 512)).collect();
            let size = 1024 * count + random.pick(&[0, 0, 700]);
            pieces.push(piece(size, 0));
            let here: Vec<u8> = pieces.iter().take(4).flatten().copied().collect();
            let more: Vec<_> = pieces.iter().skip(4).cloned().collect();
            let (map, flag, real) = if dialect == Dialect::Gnu { (386, 482, 483) } else { (356, 355, 452) };
            header.set(map, &here).set(real, format!("{size:011o}\0").as_bytes());
            if dialect == Dialect::Star {
                header.set(345, &[0; 10]);
            }
            header.0[flag] = u8::from(!more.is_empty());
            let blocks = more.chunks(21).count();
            for (index, chunk) in more.chunks(21).enumerate() {
                let mut extension: Vec<u8> = chunk.concat();
                extension.resize(512, 0);
                extension[504] = u8::from(index + 1 < blocks);
                stored.extend(extension);
            }
            let data: Vec<u8> = (0..512 * count).map(|_| random.next(256) as u8 | 1).collect();
            // The size counts the content alone.
            let field = format!("{:011o}\0", data.len());
            header.set(124, field.as_bytes());
            stored.extend(data);
        }
        b'S' => stored.clone_from(&content),
        _ => {}
    }
    if !(kind == b'S' && matches!(dialect, Dialect::Gnu | Dialect::Star)) {
        // What a hard link says of its size is of the file that it links to.
        let size = if kind == b'1' && random.one_in(2) { 12345 } else { stored.len() as u64 };
        let field = number(random, 12, size);
        header.set(124, &field);
    }
    // A long name of GNU, which counts for any dialect.
    if random.one_in(8) {
        name = [format!("long{}", random.next(1 << 40)).as_bytes(), &[b'g'; 150]].concat();
        let mut long = Header::new(b'L', b"././@LongLink", name.len() as u64 + 1);
        long.set(257, b"ustar  \0");
        let terminated = [&name[..], b"\0"].concat();
        block(random, bytes, long, &terminated);
    }
    if dialect == Dialect::Pax {
        pax(random, &mut records, &mut name, is_file, stored.len());
        let letter = random.pick(b"xxX");
        // NULs may pad the records.
        records.extend(vec![0; random.next(3) as usize]);
        block(random, bytes, Header::new(letter, b"pax", records.len() as u64), &records);
    }
    block(random, bytes, header, &stored);
    if is_file && !name.ends_with(b"/") {
        names.push(name);
    }
}

/// Random records of an extended header.
fn pax(random: &mut Random, records: &mut Vec<u8>, name: &mut Vec<u8>, is_file: bool, size: usize) {
    if random.one_in(3) {
        *name =
            [format!("pax{}", random.next(1 << 40)).as_bytes(), &[b'p'; 120], b"/", &[b'q'; 120]].concat();
        records.extend(record(b"path", name));
    }
    let mut some = |key: &[u8], values: &[&[u8]]| {
        if random.one_in(4) {
            records.extend(record(key, random.pick(values)));
        }
    };
    some(b"uid", &[b"0", b"3000000000", b"007", b"4294967296", b"x"]);
    some(b"gid", &[b"12", b"4000000000", b"-1"]);
    some(b"mtime", &[b"0", b"1.5", b"-5.5", b"-5", b"1234567890.123456789", b"4000000000", b"5.", b"soon"]);
    some(b"atime", &[b"7.25"]);
    some(b"uname", &[b"root", b"nobody"]);
    some(b"comment", &[b"words", b""]);
    some(b"VENDOR.key", &[b"a=b", b"\x01\xff", b"line\nbreak"]);
    some(b"SCHILY.dev", &[b"5"]);
    some(b"hdrcharset", &[b"BINARY"]);
    if is_file {
        some(b"SCHILY.xattr.user.a", &[b"value", b"\x00\x01=\n\xff"]);
        some(b"SCHILY.xattr.user.x%3Dy%25z", &[b"escaped"]);
        some(b"LIBARCHIVE.xattr.user.only", &[b"dmFsdWU"]);
        some(b"size", &[size.to_string().as_bytes()]);
    }
}

/// A random archive.
fn archive(random: &mut Random) -> Vec<u8> {
    let mut names = vec![b"d/base".to_vec()];
    let mut tar = Tarball::default();
    tar.dir("d/").file("d/base", b"base").dir("pre/").dir("pre/pre/");
    let mut bytes = tar.bytes;
    if random.one_in(8) {
        let mut records = Vec::new();
        for (key, value) in
            [(&b"foo"[..], &b"bar"[..]), (b"mtime", b"1000.5"), (b"uid", b"77"), (b"comment", b"all")]
        {
            if random.one_in(2) {
                records.extend(record(key, value));
            }
        }
        block(random, &mut bytes, Header::new(b'g', b"global", records.len() as u64), &records);
    }
    for _ in 0..1 + random.next(3) {
        entry(random, &mut bytes, &mut names);
    }
    match random.next(8) {
        // No end, or half of one with more behind it.
        0 => {}
        1 => {
            bytes.extend([0; 512]);
            entry(random, &mut bytes, &mut names);
        }
        _ => bytes.extend([0; 1024]),
    }
    bytes
}

fn convert(bytes: &[u8], to: &Path) -> Result<Converted, ConvertError> {
    let layer = TarLayer {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        compression: Compression::None,
        diff_id: None,
    };
    let file = File::options().read(true).write(true).create(true).truncate(true).open(to).unwrap();
    let effort = Effort {
        threads: NonZeroUsize::MIN,
        packing: Packing::new(Codec::Zstd, Some(1), 128 << 10).unwrap(),
    };
    convert_tar(bytes, &layer, &file, effort, &mut |_| Ok(LowerEntry::Nothing), &Progress::silent())
}

/// What the kernel shows of an image.
fn mounted(image: &Path, at: &Path) -> Tree {
    need_root();
    fs::create_dir_all(at).unwrap();
    run(Command::new("mount").args(["-t", "squashfs", "-o", "loop,ro"]).arg(image).arg(at));
    let tree = scan(at);
    unmount(Command::new("umount").arg(at));
    tree
}

/// What is compared of a tree: squashfs has times of 1970 to 2106; folders without an entry have none of their own.
fn comparable(mut tree: Tree, implied: &dyn Fn(&[u8]) -> bool) -> Tree {
    for (path, node) in &mut tree {
        node.mtime = node.mtime.clamp(0, i64::from(u32::MAX));
        if implied(path) {
            (node.mtime, node.mode) = (0, 0);
        }
    }
    tree
}

#[test]
fn generated_headers_are_read_as_gnu_tar_reads_them() {
    need_root();
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (mut read, mut refused, mut wrong) = (0, 0, Vec::new());
    for seed in 1..=ARCHIVES {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bytes = archive(&mut random);
        fs::write(at("tar"), &bytes).unwrap();
        let out = at("out");
        fs::create_dir(&out).unwrap();
        let gnu = run_any(
            Command::new("tar")
                .args(["--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*", "-pxf"])
                .arg(at("tar"))
                .arg("-C")
                .arg(&out)
                .env("LC_ALL", "C"),
        );
        let said = String::from_utf8_lossy(&gnu.stderr);
        let ours = convert(&bytes, &at("image"));
        let keep = || {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tar-dialects-{seed}.tar"));
            fs::write(&kept, &bytes).unwrap();
            kept
        };
        match (gnu.status.success(), ours) {
            (true, Ok(_)) => {
                // GNU tar sets the times of a folder when it leaves it, and comes back to these; what stands before
                // the slash of a long name has no entry.
                let implied = |path: &[u8]| {
                    matches!(path, b"" | b"d" | b"pre" | b"pre/pre")
                        || path.starts_with(b"pax") && !path.contains(&b'/')
                };
                let (expected, found) = (scan(&out), mounted(&at("image"), &at("mnt")));
                // A device 0:0 is a whiteout in a layer; below nothing it is not stored.
                let (expected, found) = (comparable(expected, &implied), comparable(found, &implied));
                let differences: Vec<_> =
                    scan::differences(&expected, &found).iter().take(5).map(ToString::to_string).collect();
                if !differences.is_empty() {
                    wrong.push(format!("seed {seed}, {:?}: {said}\n{}", keep(), differences.join("\n")));
                }
                read += 1;
            }
            (false, Err(_)) => refused += 1,
            (true, Err(error)) => {
                wrong.push(format!("seed {seed}: GNU tar reads {:?}: {said}\nmosfs: {error}", keep()));
            }
            (false, Ok(_)) => {
                wrong.push(format!("seed {seed}: mosfs reads {:?}, GNU tar does not: {said}", keep()))
            }
        }
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(wrong.is_empty(), "{} of {ARCHIVES} archives:\n{}", wrong.len(), wrong.join("\n"));
    assert!(read > ARCHIVES / 2 && refused > ARCHIVES / 20, "{read} read, {refused} refused");
}

#[test]
fn numbers_beyond_octal() {
    let mut tar = Tarball::default();
    let big = |header: &mut Header, at: usize, len: usize, value: i64| {
        let bytes = (i128::from(value) & ((1 << (len * 8 - 1)) - 1) | 1 << (len * 8 - 1)).to_be_bytes();
        header.set(at, &bytes[16 - len..]);
    };
    let mut header = Header::new(b'0', b"base256", 0);
    big(&mut header, 108, 8, 4_000_000_000);
    big(&mut header, 136, 12, 4_000_000_000);
    tar.raw(header, b"");
    tar.pax(&[(b"uid", b"3000000000"), (b"gid", b"2097152"), (b"mtime", b"1.999999999")]).file("pax", b"");
    tar.pax(&[(b"mtime", b"-5.5")])
        .file("before-1970", b"")
        .pax(&[(b"mtime", b"99999999999")])
        .file("far", b"");
    tar.pax(&[
        (b"SCHILY.xattr.system.posix_acl_access", b"\x02"),
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/x"),
    ]);
    tar.file("dropped", b"");
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let notes = convert(&tar.end(), &image).unwrap().notes;
    assert_eq!(notes.len(), 4, "{notes:?}");
    for text in ["-6", "99999999999", "posix_acl", "overlay.redirect"] {
        assert!(notes.iter().any(|note| note.contains(text)), "{text}: {notes:?}");
    }
    let tree = mounted(&image, &folder.path().join("mnt"));
    let data = |name: &str| &tree[name.as_bytes()];
    assert_eq!((data("base256").uid, data("base256").mtime), (4_000_000_000, 4_000_000_000));
    assert_eq!((data("pax").uid, data("pax").gid, data("pax").mtime), (3_000_000_000, 2_097_152, 1));
    assert_eq!((data("before-1970").mtime, data("far").mtime), (0, i64::from(u32::MAX)));
}

/// Any damage to a good stream gives an image or an error, never a panic or a hang.
#[test]
fn damaged_streams_never_panic() {
    let mut tar = Tarball::default();
    tar.dir("d").pax(&[(b"SCHILY.xattr.user.a", b"b"), (b"mtime", b"1.5")]).file("d/f", b"content");
    tar.link(b'1', "h", "d/f").link(b'2', "s", "d").file("s/.wh.x", b"").file("d/.wh..wh..opq", b"");
    tar.pax(&[
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"70000"),
        (b"GNU.sparse.name", b"sp"),
    ]);
    let mut map = b"1\n65536\n5\n".to_vec();
    map.resize(512, 0);
    tar.file("x", &[&map[..], b"hello"].concat());
    let good = tar.end();
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    convert(&good, &image).unwrap();
    let (mut state, mut refused) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    for _ in 0..1500 {
        let mut bytes = good.clone();
        for _ in 0..1 + state % 3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 20) as usize % bytes.len();
            bytes[at] ^= (state >> 8) as u8 | 1;
            // Repair the checksum, or nearly every change would be refused by it.
            let start = at / 512 * 512;
            let mut header: [u8; 512] = bytes[start..start + 512].try_into().unwrap();
            header[148..156].copy_from_slice(b"        ");
            let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
            bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        refused += usize::from(convert(&bytes, &image).is_err());
    }
    assert!(refused > 100, "{refused}");
}
