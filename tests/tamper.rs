//! A changed byte never shows: whoever flips one byte of a stored layer makes reads fail with EIO
//! and a line in the log, or makes no difference. Wrong content, sizes, names, owners: never.
//!
//! Most flips go through the library, which is the whole way of a mount but the kernel's part: plan, verified
//! source, squashfs reader, merged view, engine. Some go through a real mount. `MOSFS_CAMPAIGN=long` makes it
//! thousands of flips, and takes the Debian image too.

#[path = "common/whole/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::commands::{command, join, mosfs, need_root, output, run};
use common::debian::{self, noise};
use common::layers::{self, layer};
use common::scan::{self, Scan};
use common::system::{Mounted, build, image_name, import_manifest, keys, scratch, source};
use common::unmount::unmount;
use mosfs::internals::digest::{Digest, Hasher};
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::blobs::{Blob, BlobFolder};
use mosfs::internals::image::layer::{Attr, FileType, Xattrs};
use mosfs::internals::image::oci::{LayerDescriptor, SQUASHFS_ZSTD, Trust};
use mosfs::internals::image::overlay::ROOT;
use mosfs::internals::image::verity;
use mosfs::internals::mount::engine::{Engine, EngineError};
use mosfs::internals::mount::fuse::{FuseOptions, prepare};
use mosfs::internals::mount::{LayerBytes, MountPlan, PlannedLayer, Verification};
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;
use mosfs::internals::sys::file::Links;

/// Random flips in a campaign.
fn campaign(short: usize, long: usize) -> usize {
    if std::env::var_os("MOSFS_CAMPAIGN").is_some_and(|kind| kind == "long") { long } else { short }
}

/// xorshift64, so that a failure can be had again.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What the engine says of one path; each answer may fail on its own.
#[derive(Debug, PartialEq)]
struct Seen {
    attr: Result<Attr, EngineError>,
    xattrs: Result<Xattrs, EngineError>,
    target: Option<Result<Vec<u8>, EngineError>>,
    content: Option<Result<Digest, EngineError>>,
    listing: Option<Result<(), EngineError>>,
}

/// Asks for everything that a mount can be asked for.
fn walk(engine: &Engine) -> BTreeMap<Vec<u8>, Seen> {
    let view = engine.view();
    let mut all = BTreeMap::new();
    let mut todo = vec![(Vec::new(), ROOT, FileType::Directory)];
    while let Some((path, ino, kind)) = todo.pop() {
        let failed = |error| engine.failed(ino, &error);
        let attr = engine.attr(ino);
        let listing = (kind == FileType::Directory).then(|| {
            view.read_dir(ino, 0, &mut |entry| {
                let path = [&path, b"/".as_slice(), &entry.name].concat();
                todo.push((path, entry.ino, entry.kind));
                true
            })
            .map_err(failed)
        });
        let content = match (&attr, kind) {
            (Ok(attr), FileType::Regular) => Some(content(engine, ino, attr.size_bytes)),
            (Err(_), FileType::Regular) => Some(Err(EngineError::Io)),
            _ => None,
        };
        let target = (kind == FileType::Symlink).then(|| view.read_link(ino).map_err(failed));
        let xattrs = view.xattrs(ino).map_err(failed);
        all.insert(path, Seen { attr, xattrs, target, content, listing });
    }
    all
}

fn content(engine: &Engine, ino: u64, size: u64) -> Result<Digest, EngineError> {
    let mut hasher = Hasher::new();
    while hasher.bytes() < size {
        let before = hasher.bytes();
        engine.read(ino, before, 128 << 10, &mut |bytes| hasher.update(bytes))?;
        assert!(hasher.bytes() > before, "a read of a file that goes on gave nothing");
    }
    Ok(hasher.finish())
}

/// Fails where anything was answered otherwise than before; says how many answers were errors.
fn nothing_wrong(before: &BTreeMap<Vec<u8>, Seen>, after: &BTreeMap<Vec<u8>, Seen>, what: &str) -> usize {
    let mut errors = 0;
    for (path, now) in after {
        let name = scan::show(path);
        let then = before.get(path).unwrap_or_else(|| panic!("{what}: {name} came from nowhere"));
        // A link count is counted over all layers; where one cannot be read it may stay too high.
        let attr = |seen: &Seen| seen.attr.as_ref().ok().map(|attr| Attr { nlink: 0, ..*attr });
        if let (Ok(now), Ok(then)) = (&now.attr, &then.attr) {
            assert!(now.nlink >= then.nlink, "{what}: links of {name}: {}, were {}", now.nlink, then.nlink);
        }
        assert!(now.attr.is_err() || attr(now) == attr(then), "{what}: {name}: {now:?}, was {then:?}");
        assert!(now.xattrs.is_err() || now.xattrs == then.xattrs, "{what}: {name}: {now:?}, was {then:?}");
        let wrong =
            |now: &Option<Result<Vec<u8>, EngineError>>, then| matches!(now, Some(Ok(_))) && now != then;
        assert!(!wrong(&now.target, &then.target), "{what}: {name}: {now:?}, was {then:?}");
        let differs = matches!(now.content, Some(Ok(_))) && now.content != then.content;
        assert!(!differs, "{what}: content of {name}");
        errors += usize::from(now.attr.is_err()) + usize::from(now.xattrs.is_err());
        errors += [matches!(now.target, Some(Err(_))), matches!(now.content, Some(Err(_)))]
            .iter()
            .filter(|x| **x)
            .count();
        errors += usize::from(matches!(now.listing, Some(Err(_))));
    }
    // A name may be missing only below a folder that could not be listed.
    for path in before.keys().filter(|path| !after.contains_key(*path)) {
        let unlisted = (0..path.len())
            .rev()
            .filter(|end| path[*end] == b'/')
            .any(|end| after.get(&path[..end]).is_some_and(|parent| matches!(parent.listing, Some(Err(_)))));
        assert!(unlisted, "{what}: {} is gone, and nobody says why", scan::show(path));
    }
    errors
}

/// A stack of layers in files of our own.
struct Stack {
    plan: MountPlan,
    before: BTreeMap<Vec<u8>, Seen>,
}

/// What became of a flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Nothing can be mounted.
    Refused,
    /// Some answers are errors.
    Errors,
    /// Every answer is as before.
    Same,
}

impl Stack {
    fn of_files(layers: Vec<(PathBuf, Digest)>) -> Self {
        let planned = |(path, root_hash): (PathBuf, Digest)| {
            let digest = Digest::of(path.as_os_str().as_encoded_bytes());
            let size = fs::metadata(&path).expect("stat a layer").len();
            let descriptor = LayerDescriptor::new(SQUASHFS_ZSTD, digest, size, Trust::RootHash(root_hash));
            PlannedLayer { descriptor, bytes: LayerBytes::One(Blob::File(path)) }
        };
        let layers = layers.into_iter().map(planned).collect();
        let blobs = Arc::new(BlobFolder::of_layout(Path::new("/"), Links::Refused));
        Self::new(MountPlan::of_layers("a test", None, layers, blobs))
    }

    /// The only image of a store, in place.
    fn of_store(store: &Path) -> Self {
        let name = image_name(store);
        let digest = Digest::from_hex(name.rsplit('/').next().expect("a digest")).expect("a digest");
        let store = Store::open(store).expect("open the store");
        let image = store.image(&digest).expect("read the image's manifest");
        let plan = MountPlan::new("a test", &image, &store.blobs(), Verification::default());
        Self::new(plan.expect("plan a mount"))
    }

    fn new(plan: MountPlan) -> Self {
        let engine = prepare(&plan, &FuseOptions::default()).expect("open the layers");
        let before = walk(&engine);
        assert_eq!(engine.troubles().total(), 0, "the stack is whole at first");
        assert_eq!(nothing_wrong(&before, &before, "itself"), 0);
        Self { plan, before }
    }

    fn file(&self, layer: usize) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.plan.layers()[layer].file().expect("a file"))
            .expect("open a layer")
    }

    /// Flips bits of one byte, looks at everything, and flips them back.
    fn flip(&self, layer: usize, offset: u64, mask: u8) -> Outcome {
        let file = self.file(layer);
        let what = format!("layer {layer}, byte {offset}, mask {mask:#04x}");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("read a byte");
        file.write_all_at(&[byte[0] ^ mask], offset).expect("flip a byte");
        let outcome = match prepare(&self.plan, &FuseOptions::default()) {
            Err(error) => {
                assert_eq!(error.class(), Class::Verification, "{what}: {error}");
                Outcome::Refused
            }
            Ok(engine) => {
                let after = walk(&engine);
                let errors = nothing_wrong(&self.before, &after, &what);
                let counts = engine.troubles().counts();
                // Every error is told, and is the hash tree's: no byte got as far as a parser.
                assert_eq!(errors > 0, counts.verity > 0, "{what}: {errors} errors, {counts:?}");
                assert_eq!((counts.io, counts.corrupt), (0, 0), "{what}: {counts:?}");
                if errors > 0 { Outcome::Errors } else { Outcome::Same }
            }
        };
        file.write_all_at(&byte, offset).expect("flip it back");
        outcome
    }
}

/// Seals an image in place.
fn seal(image: &Path) -> Digest {
    let file = OpenOptions::new().read(true).write(true).open(image).expect("open an image");
    let bytes_used = word(&file, 40);
    verity::seal(&file, bytes_used, NonZeroUsize::MIN, &Progress::default()).expect("seal an image").root_hash
}

/// A 64-bit word of a squashfs superblock (linux/squashfs_fs.h, struct squashfs_super_block).
fn word(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).expect("read a superblock");
    u64::from_le_bytes(bytes)
}

/// Three layers by mksquashfs, with each table that the format has.
fn stack_by_mksquashfs(dir: &Path) -> Stack {
    need_root();
    let mut layers = Vec::new();
    for layer in 0..3_u64 {
        let root = dir.join(format!("root-{layer}"));
        for folder in ["data", "shared/deep/er", "text"] {
            fs::create_dir_all(root.join(folder)).expect("mkdir");
        }
        for number in 0..24_u64 {
            let name = format!("{layer}-{number}");
            let size = (number * number * 700) as usize;
            fs::write(root.join("data").join(&name), noise(size, number + 1)).expect("write");
            fs::write(root.join("shared").join(format!("{number}")), name.repeat(number as usize * 30))
                .expect("write");
            fs::write(root.join("text").join(&name), name.repeat(9000 * (number as usize % 3)))
                .expect("write");
        }
        fs::write(root.join("shared/deep/er/file"), format!("of layer {layer}")).expect("write");
        fs::hard_link(
            root.join("data").join(format!("{layer}-5")),
            root.join("data").join(format!("link-{layer}")),
        )
        .expect("link");
        fs::hard_link(root.join("shared/7"), root.join("shared/seven")).expect("link");
        symlink(format!("{layer}/elsewhere"), root.join("shared/link")).expect("symlink");
        let attribute = |path: &str, name: &str, value: &[u8]| {
            rustix::fs::lsetxattr(root.join(path), name, value, rustix::fs::XattrFlags::empty())
                .expect("setxattr");
        };
        attribute("shared/deep", "user.layer", layer.to_string().as_bytes());
        attribute("shared/1", "user.long", &noise(2000, 5));
        attribute("shared/2", "user.long", &noise(2000, 5));
        if layer == 1 {
            attribute("shared/deep/er", "trusted.overlay.opaque", b"y");
            run(command("mknod").arg(root.join("data/0-3")).args(["c", "0", "0"]));
        }
        let image = dir.join(format!("layer-{layer}"));
        run(command("mksquashfs").arg(&root).arg(&image).args([
            "-quiet",
            "-no-progress",
            "-comp",
            "zstd",
            "-Xcompression-level",
            "3",
        ]));
        let root_hash = seal(&image);
        fs::remove_dir_all(&root).expect("remove");
        layers.push((image, root_hash));
    }
    Stack::of_files(layers)
}

/// Each byte of both superblocks, and each table.
#[test]
fn structures_do_not_lie() {
    let dir = scratch();
    let stack = stack_by_mksquashfs(dir.path());
    let masks = [1, 0x80, 0xff];
    for layer in 0..3 {
        let file = stack.file(layer);
        let used = word(&file, 40);
        let data = used.next_multiple_of(4096);
        // The squashfs superblock: all of it is under the root hash, so nothing can be mounted.
        for offset in 0..96 {
            let outcome = stack.flip(layer, offset, masks[offset as usize % 3]);
            assert_eq!(
                outcome,
                Outcome::Refused,
                "byte {offset} of the squashfs superblock of layer {layer}"
            );
        }
        // Each table, first its index. All of them are read by the walk or when the image is opened.
        for (table, pointer) in
            [("id", 48), ("xattr", 56), ("inode", 64), ("directory", 72), ("fragment", 80), ("export", 88)]
        {
            let start = word(&file, pointer);
            assert!(start < used, "there is no {table} table");
            for offset in [start, start + 1, start + 2, start + 7] {
                let outcome = stack.flip(layer, offset, masks[offset as usize % 3]);
                assert_ne!(outcome, Outcome::Same, "byte {offset}, {table} table of layer {layer}");
            }
        }
        // The padding behind the image shares its block with the last table.
        if data > used {
            assert_ne!(stack.flip(layer, data - 1, 1), Outcome::Same, "padding of layer {layer}");
        }
        // The verity superblock. It is not under the root hash; a change is refused or is without effect.
        for offset in (data..data + 512).step_by(if campaign(0, 1) == 1 { 1 } else { 3 }) {
            stack.flip(layer, offset, masks[offset as usize % 3]);
        }
        // The tree: the file ends with it.
        let end = file.metadata().expect("stat").len();
        assert!(end > data + 4096, "layer {layer} has a tree");
        for offset in [data + 4096, data + 4096 + 31, data + 4096 + 32, end - 4096, end - 1] {
            stack.flip(layer, offset, 1);
        }
    }
}

/// Flips random bytes of all layers; at least `seen` of a hundred must have been noticed.
fn random_flips(stack: &Stack, count: usize, seen: usize) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut same = 0;
    for _ in 0..count {
        let layer = random.below(stack.plan.layers().len() as u64) as usize;
        let size = fs::metadata(stack.plan.layers()[layer].file().expect("a file")).expect("stat").len();
        let outcome = stack.flip(layer, random.below(size), 1 << random.below(8));
        same += usize::from(outcome == Outcome::Same);
    }
    println!("{same} of {count} flips were without effect");
    assert!((count - same) * 100 >= count * seen, "{same} of {count} flips were without effect");
}

#[test]
fn random_flips_in_layers_of_mksquashfs_never_show() {
    let dir = scratch();
    // What an upper layer hides is never read.
    random_flips(&stack_by_mksquashfs(dir.path()), campaign(150, 6000), 60);
}

/// A store with an image of three converted layers.
fn built_store(dir: &Path) -> PathBuf {
    need_root();
    let (layout, store, manifest) = (dir.join("layout"), dir.join("store"), dir.join("import.yaml"));
    let mut all = Vec::new();
    for number in 0..3_u64 {
        let mut one = layer().dir("./").dir("data").dir("shared").dir("shared/deep");
        for file in 0..24_u64 {
            let size = (file * file * 900) as usize;
            one = one
                .content(&format!("data/{number}-{file}"), &noise(size, file + 1))
                .content(&format!("shared/{file}"), &b"much the same\n".repeat(size / 20))
                .hard(&format!("data/link-{number}-{file}"), &format!("data/{number}-{file}"))
                .symlink(&format!("shared/link-{file}"), "deep")
                .pax(&[
                    ("SCHILY.xattr.user.file", &file.to_le_bytes()),
                    ("SCHILY.xattr.user.long", &noise(900, file % 3)),
                ])
                .file(&format!("shared/deep/{number}-{file}"), "small");
        }
        if number == 1 {
            one = one.file("data/.wh.0-7", "").file("shared/deep/.wh..wh..opq", "");
        }
        all.push(one);
    }
    layers::image(&layout, "flips", all);
    let mut url = OsString::from("oci:");
    url.push(join(&layout, ":", "flips"));
    import_manifest(&manifest, &url);
    run(&mut build(&manifest, &store, &keys(dir)));
    store
}

#[test]
fn random_flips_in_a_built_store_never_show() {
    let dir = scratch();
    random_flips(&Stack::of_store(&built_store(dir.path())), campaign(150, 6000), 60);
}

/// The Debian image, once it has been built for it: only in the campaign.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn random_flips_in_a_debian_root_never_show() {
    let dir = scratch();
    let (store, manifest) = (dir.path().join("store"), dir.path().join("import.yaml"));
    let mut url = OsString::from("oci:");
    url.push(join(&debian::image().layout, ":", "debian"));
    import_manifest(&manifest, &url);
    run(&mut build(&manifest, &store, &keys(dir.path())));
    random_flips(&Stack::of_store(&store), 300, 50);
}

/// Fails where a scan shows anything but what was there before or an input/output error.
fn nothing_wrong_in_mount(before: &Scan, after: &Scan, what: &str) -> usize {
    const EIO: i32 = 5;
    for (path, error) in &after.errors {
        assert_eq!(*error, EIO, "{what}: /{}", scan::show(path));
    }
    let mut errors = after.errors.len();
    for (path, now) in &after.tree {
        let name = scan::show(path);
        let then = before.tree.get(path).unwrap_or_else(|| panic!("{what}: /{name} came from nowhere"));
        let mut expected = then.clone();
        if now.content == Some(Err(EIO)) {
            expected.content = now.content;
            errors += 1;
        }
        assert!(now.nlink >= then.nlink, "{what}: links of /{name}");
        (expected.nlink, expected.same_as) = (now.nlink, now.same_as.clone());
        assert_eq!(now, &expected, "{what}: /{name}");
    }
    for path in before.tree.keys().filter(|path| !after.tree.contains_key(*path)) {
        let parents = (0..path.len()).filter(|end| path[*end] == b'/').map(|end| &path[..end]);
        let told = parents.chain([path.as_slice(), b""]).any(|path| after.errors.contains_key(path));
        assert!(told, "{what}: /{} is gone, and nobody says why", scan::show(path));
    }
    errors
}

/// The log of the mount at a folder.
fn log_of(dir: &Path) -> String {
    let record = mosfs::internals::mount::mounts()
        .expect("read the register")
        .into_iter()
        .find(|record| record.target == dir);
    let daemon = record.and_then(|record| record.daemon).expect("a mount with a daemon");
    fs::read_to_string(daemon.log.expect("a log")).unwrap_or_default()
}

#[test]
fn flips_under_a_real_mount_are_input_output_errors_with_a_line_in_the_log() {
    let dir = scratch();
    let store = built_store(dir.path());
    let from = source(&store, &image_name(&store));
    let mnt = dir.path().canonicalize().expect("a path").join("mnt");
    let mounted = Mounted::new(&from, &mnt);
    let before = scan::try_scan(&mnt);
    assert!(before.errors.is_empty() && before.tree.len() > 200);
    mounted.unmount();

    let stack = Stack::of_store(&store);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut places = Vec::new();
    for layer in 0..3 {
        let file = stack.file(layer);
        let data = word(&file, 40).next_multiple_of(4096);
        // Superblock, data blocks, inodes, the tree.
        places.extend(
            [8, data * 3 / 10, data * 6 / 10, word(&file, 64) + 40, data + 4096 + 40].map(|at| (layer, at)),
        );
        for _ in 0..campaign(1, 60) {
            places.push((layer, random.below(file.metadata().expect("stat").len())));
        }
    }
    let mut with_errors = 0;
    for (layer, offset) in places {
        let what = format!("layer {layer}, byte {offset}");
        let file = stack.file(layer);
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("read a byte");
        file.write_all_at(&[byte[0] ^ 4], offset).expect("flip a byte");
        let mount = output(mosfs().args(["mount", "--backend", "fuse", &from]).arg(&mnt));
        if mount.status.success() {
            let after = scan::try_scan(&mnt);
            let log = log_of(&mnt);
            // However it ends, it must not stay mounted.
            unmount(mosfs().arg("umount").arg(&mnt));
            let errors = nothing_wrong_in_mount(&before, &after, &what);
            let told =
                log.lines().any(|line| line.contains("verity: block") && line.contains("expected sha256:"));
            assert_eq!(errors > 0, told, "{what}: {errors} errors, and the log is:\n{log}");
            with_errors += usize::from(errors > 0);
        } else {
            let text = String::from_utf8_lossy(&mount.stderr);
            assert_eq!(mount.status.code(), Some(3), "{what}: {text}");
        }
        file.write_all_at(&byte, offset).expect("flip it back");
    }
    assert!(with_errors >= 6, "{with_errors} flips gave errors");
}

/// An image large enough for a tree of three levels: a flip in each of them.
#[test]
fn each_level_of_the_tree_is_checked() {
    need_root();
    let dir = scratch();
    let root = dir.path().join("root");
    fs::create_dir(&root).expect("mkdir");
    fs::write(root.join("large"), noise(70 << 20, 11)).expect("write");
    fs::write(root.join("small"), "a small file").expect("write");
    let image = dir.path().join("layer");
    run(command("mksquashfs").arg(&root).arg(&image).args([
        "-quiet",
        "-no-progress",
        "-noD",
        "-noF",
        "-comp",
        "zstd",
    ]));
    let root_hash = seal(&image);
    let stack = Stack::of_files(vec![(image.clone(), root_hash)]);
    let file = stack.file(0);
    let data = word(&file, 40).next_multiple_of(4096);
    // Top first: 1 block, 2 blocks, and the hashes of the data, 128 in a block.
    let bottom_blocks = (data / 4096).div_ceil(128);
    assert!(bottom_blocks > 128, "three levels");
    let top = data + 4096;
    let (middle, bottom) = (top + 4096, top + 3 * 4096);
    assert_eq!(bottom + bottom_blocks * 4096, file.metadata().expect("stat").len());
    assert_eq!(stack.flip(0, top, 1), Outcome::Refused);
    // The first block of each level leads to the superblock, the second of the middle to the tables.
    for offset in [middle, middle + 32 * 77, middle + 4096, bottom] {
        assert_eq!(stack.flip(0, offset, 0x10), Outcome::Refused, "byte {offset}");
    }
    for offset in [bottom + 32 * 1000 + 5, bottom + 4096 * 70, data / 2, data / 3] {
        assert_eq!(stack.flip(0, offset, 0x10), Outcome::Errors, "byte {offset}");
    }
    // Behind the last hash of a level the block is padded; the padding is hashed as well.
    let outcome = stack.flip(0, bottom + bottom_blocks * 4096 - 1, 1);
    assert_ne!(outcome, Outcome::Same, "padding of the lowest level");
}
