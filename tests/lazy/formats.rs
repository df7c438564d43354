//! Every format that is fetched while it is read: layers that are one blob with a hash tree, and chunks.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mosfs::internals::convert::puzzlefs::{Limits, pack};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::layer::Place as BlockPlace;
use mosfs::internals::image::oci::{
    CONFIG, Descriptor, LayerDescriptor, Manifest, OciImage, SQUASHFS_ZSTD, Trust,
};
use mosfs::internals::image::overlay::{Merged, ROOT};
use mosfs::internals::image::verity;
use mosfs::internals::image::{Attr, FileType};
use mosfs::internals::mount::{MountPlan, Verification, open_tree};
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;
use mosfs::internals::store::lazy::{LazyImage, LazyOptions};
use mosfs::internals::transport::{Blob, OciDir, RangeAsk, Transport, TransportError};
use tempfile::TempDir;

use crate::fixture::{FILES, Lazy, content, name, wait_until};
use crate::place::{noise, text};
use crate::server::Fault;
use crate::unmount::unmount;

const EIO: i32 = 5;
const EROFS: &str = "application/vnd.stacker.image.layer.erofs";

/// A place whose bytes are those of a layout, but for one.
struct Flipping {
    inner: OciDir,
    blob: Digest,
    at: u64,
}

impl Flipping {
    fn flip(&self, blob: &Descriptor, offset: u64, buffer: &mut [u8]) {
        let place = self.at.checked_sub(offset).filter(|_| blob.digest == self.blob);
        if let Some(byte) = place.and_then(|place| buffer.get_mut(place as usize)) {
            *byte ^= 1;
        }
    }
}

impl Transport for Flipping {
    fn location(&self) -> String {
        "a registry that lies".into()
    }
    fn entries(&self) -> Result<Vec<Descriptor>, TransportError> {
        self.inner.entries()
    }
    fn lookup(&self, name: &str) -> Result<Vec<Descriptor>, TransportError> {
        self.inner.lookup(name)
    }
    fn fetch(&self, blob: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, TransportError> {
        self.inner.fetch(blob, max_bytes)
    }
    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Blob, TransportError> {
        let mut bytes = Vec::new();
        self.inner.open(blob, offset)?.read_to_end(&mut bytes).expect("a blob");
        self.flip(blob, offset, &mut bytes);
        Ok(Blob::Stream(Box::new(std::io::Cursor::new(bytes))))
    }
    fn read_range(
        &self,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        _: &RangeAsk,
    ) -> Result<(), TransportError> {
        let (file, _) = self.inner.open_blob(&blob.digest)?;
        file.read_exact_at(buffer, offset).expect("within the blob");
        self.flip(blob, offset, buffer);
        Ok(())
    }
    fn referrers(&self, _: &Digest, _: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        Ok(Vec::new())
    }
    fn tags(&self, _: &str) -> Result<Vec<String>, TransportError> {
        Ok(Vec::new())
    }
    fn within(&self, _: &str) -> Result<Box<dyn Transport>, TransportError> {
        unreachable!("an image is read from its own repository")
    }
}

/// A tree with one of each structure: long and short files, tails, links of both kinds, folders of several sizes,
/// attributes, holes, devices.
fn tree(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("a/b")).expect("a folder");
    for number in 0..60 {
        let bytes = noise(40 + number * 13, number as u64 + 1);
        fs::write(tree.join(format!("a/b/file-{number}")), bytes).expect("a file");
    }
    fs::write(tree.join("long"), noise(120_000, 77)).expect("a file");
    fs::write(tree.join("text"), "the same words again and again ".repeat(9000)).expect("a file");
    let holes = File::create(tree.join("holes")).expect("a file");
    holes.set_len(600_000).expect("a length");
    holes.write_all_at(b"here", 500_000).expect("bytes");
    symlink("a/b/file-3", tree.join("link")).expect("a link");
    symlink("n".repeat(300), tree.join("long-link")).expect("a link");
    fs::hard_link(tree.join("long"), tree.join("a/same")).expect("a link");
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).status().expect("it runs");
        assert!(done.success(), "{program} {args:?}");
    };
    run("setfattr", &["-n", "user.one", "-v", "value", tree.join("long").to_str().expect("UTF-8")]);
    let long = "v".repeat(400);
    run("setfattr", &["-n", "user.two", "-v", &long, tree.join("a/b/file-1").to_str().expect("UTF-8")]);
    run("mknod", &[tree.join("device").to_str().expect("UTF-8"), "c", "1", "3"]);
    tree
}

fn run(program: &str, package: &str, args: &[&str], paths: &[&Path]) {
    let made = Command::new(program).args(args).args(paths).output().unwrap_or_else(|error| {
        panic!("cannot run {program}: {error}; install the Debian package `{package}`")
    });
    assert!(made.status.success(), "{program}: {}", text(&made.stderr));
}

/// Puts an image with a hash tree into a store.
fn seal(store: &Store, image: &Path, media_type: &str, bytes: u64) -> Descriptor {
    let writer = store.writer().expect("a writer");
    let mut temp = writer.temp().expect("a file");
    let mut made = File::open(image).expect("the image");
    made.rewind().expect("the start");
    std::io::copy(&mut made, &mut temp.file).expect("a copy");
    let sealed = verity::seal(&temp.file, bytes, NonZeroUsize::MIN, &Progress::silent()).expect("sealing");
    writer.commit(temp, &sealed.digest).expect("a blob");
    let trust = Trust::RootHash(sealed.root_hash);
    LayerDescriptor::new(media_type, sealed.digest, sealed.size_bytes, trust).to_descriptor()
}

/// An image of a tree in one format, in a store of its own.
struct Image {
    store: Store,
    image: OciImage,
    dir: TempDir,
}

impl Image {
    fn new(format: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let tree = tree(dir.path());
        let store = Store::create(&dir.path().join("store")).expect("a store");
        let made = dir.path().join("image");
        let squashfs = |options: &[&str]| {
            let _ = fs::remove_file(&made);
            run(
                "mksquashfs",
                "squashfs-tools",
                &[],
                &[&tree, &made, Path::new("-noappend"), Path::new("-quiet"), Path::new("-no-progress")]
                    .into_iter()
                    .chain(options.iter().map(Path::new))
                    .collect::<Vec<_>>(),
            );
            let mut head = [0; 96];
            File::open(&made).expect("the image").read_exact(&mut head).expect("a superblock");
            // squashfs 4.0, superblock: bytes_used is the 64-bit word at 40.
            u64::from_le_bytes(head[40..48].try_into().expect("8 bytes"))
        };
        let layers = match format {
            "squashfs" => {
                let bytes = squashfs(&["-comp", "zstd", "-b", "16K"]);
                vec![seal(&store, &made, SQUASHFS_ZSTD, bytes)]
            }
            "erofs" | "erofs-lz4" => {
                let options: &[&str] =
                    if format == "erofs" { &["--quiet"] } else { &["--quiet", "-zlz4hc", "-C16384"] };
                run("mkfs.erofs", "erofs-utils", options, &[&made, &tree]);
                let bytes = fs::metadata(&made).expect("the image").len();
                vec![seal(&store, &made, EROFS, bytes)]
            }
            _ => {
                let bytes = squashfs(&["-comp", "zstd"]);
                let layer = seal(&store, &made, SQUASHFS_ZSTD, bytes);
                let view = open(&store, &put_image(&store, vec![layer])).expect("the tree");
                let writer = store.writer().expect("a writer");
                let packed = pack(&view, &writer, Limits::default(), NonZeroUsize::MIN, &Progress::silent());
                packed.expect("packing").layers
            }
        };
        let image = put_image(&store, layers);
        Self { store, image, dir }
    }

    /// What is read of the image through a place that sends one wrong byte.
    fn read_flipped(&self, blob: Digest, at: u64) -> (BTreeMap<Vec<u8>, Seen>, usize) {
        let cache = tempfile::tempdir_in(self.dir.path()).expect("a folder");
        let cache = Store::create(cache.path()).expect("a store");
        let inner = OciDir::open(self.store.dir()).expect("a layout");
        let from = Box::new(Flipping { inner, blob, at });
        let options =
            LazyOptions { patience: Duration::from_secs(60), fill: false, list: None, complete: None };
        let lazy = LazyImage::open(&cache, from, &self.image, options).expect("it opens");
        let blobs: Arc<dyn mosfs::internals::image::blobs::Blobs> = Arc::new(lazy);
        let plan = MountPlan::new("image", &self.image, &blobs, Verification::default()).expect("a plan");
        match open_tree(&plan) {
            Ok(tree) => read(&tree),
            Err(_) => (BTreeMap::new(), 1),
        }
    }
}

fn put_image(store: &Store, layers: Vec<Descriptor>) -> OciImage {
    let writer = store.writer().expect("a writer");
    let text = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let config = writer.put_bytes(CONFIG, text.as_bytes()).expect("a config");
    let json = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    let manifest = Manifest::parse(json.to_string().as_bytes()).expect("a manifest").to_bytes();
    OciImage::parse(&manifest).expect("an image")
}

fn open(store: &Store, image: &OciImage) -> Option<Merged> {
    let plan = MountPlan::new("image", image, &store.blobs(), Verification::default()).expect("a plan");
    open_tree(&plan).ok()
}

/// What is read of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    attr: Attr,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    target: Vec<u8>,
    content: Vec<u8>,
}

/// Everything that can be read, and how often something could not.
fn read(tree: &Merged) -> (BTreeMap<Vec<u8>, Seen>, usize) {
    let (mut all, mut errors) = (BTreeMap::new(), 0);
    let mut todo = vec![(Vec::new(), ROOT)];
    while let Some((path, ino)) = todo.pop() {
        let seen = (|| {
            let attr = tree.attr(ino).ok()?;
            let target = if attr.kind == FileType::Symlink { tree.read_link(ino).ok()? } else { Vec::new() };
            let content = if attr.kind == FileType::Regular { whole(tree, ino, attr)? } else { Vec::new() };
            Some(Seen { attr, xattrs: tree.xattrs(ino).ok()?, target, content })
        })();
        match seen {
            Some(seen) => {
                if seen.attr.kind == FileType::Directory {
                    let listed = tree.read_dir(ino, 0, &mut |entry| {
                        if entry.name != b"." && entry.name != b".." {
                            todo.push(([&path[..], b"/", &entry.name].concat(), entry.ino));
                        }
                        true
                    });
                    errors += usize::from(listed.is_err());
                }
                all.insert(path, seen);
            }
            None => errors += 1,
        }
    }
    (all, errors)
}

fn whole(tree: &Merged, ino: u64, attr: Attr) -> Option<Vec<u8>> {
    let (mut content, mut block) = (Vec::new(), Vec::new());
    while (content.len() as u64) < attr.size_bytes {
        let (layer, extent) = tree.extent(ino, content.len() as u64).ok()?;
        let len = extent.len as usize;
        let (id, from) = match extent.place {
            BlockPlace::Hole => {
                content.resize(content.len() + len, 0);
                continue;
            }
            BlockPlace::Block(id) => (id, 0),
            BlockPlace::Shared { block, offset } => (block, offset as usize),
        };
        tree.layers()[layer].decode(id, &mut block).ok()?;
        content.extend_from_slice(&block[from..from + len]);
    }
    Some(content)
}

/// One wrong byte in each 4 KiB block of each blob of the image, at a place in it that differs from block to block; in a
/// campaign, at each 211th byte, so that each structure of the format is hit many times.
fn flip_everywhere(format: &str) {
    let image = Image::new(format);
    let (right, errors) = read(&open(&image.store, &image.image).expect("the tree"));
    assert!(right.len() == 70 && errors == 0, "{format}: {} files, {errors} errors", right.len());
    let is_long = std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long");
    let (mut flips, mut noticed) = (0, 0);
    for blob in &image.image.manifest.layers {
        let places: Vec<u64> = match is_long {
            true => (0..blob.size).step_by(211).collect(),
            false => (0..blob.size.div_ceil(4096))
                .map(|block| (block * 4096 + block * 1117 % 4096).min(blob.size - 1))
                .collect(),
        };
        for at in places {
            let (found, errors) = image.read_flipped(blob.digest, at);
            flips += 1;
            noticed += usize::from(errors > 0);
            for (path, seen) in &found {
                let shown = String::from_utf8_lossy(path);
                assert!(right.get(path) == Some(seen), "{format}: byte {at} of {}: {shown}", blob.digest);
            }
            // Nothing is missing without an error.
            assert!(errors > 0 || found.len() == right.len(), "{format}: byte {at} of {}", blob.digest);
        }
    }
    // A byte that no reader uses (padding between structures, the UUID) harms nobody; all others are noticed.
    assert!(noticed * 10 >= flips * 9, "{format}: {noticed} of {flips}");
    println!("{format}: {flips} flips, {noticed} ended in an error, none in a wrong byte");
}

#[test]
fn a_wrong_byte_anywhere_in_squashfs_is_an_error_or_the_right_bytes() {
    flip_everywhere("squashfs");
}

#[test]
fn a_wrong_byte_anywhere_in_erofs_is_an_error_or_the_right_bytes() {
    flip_everywhere("erofs");
    flip_everywhere("erofs-lz4");
}

#[test]
fn a_wrong_byte_anywhere_in_puzzlefs_is_an_error_or_the_right_bytes() {
    flip_everywhere("puzzlefs");
}

/// Whether a request asks for one of the image's blobs that begin at this place of its list.
fn blobs_asked(lazy: &Lazy) -> Vec<Digest> {
    let log = lazy.server.take_log();
    let layers = lazy.layers.iter().map(|layer| layer.digest);
    layers.filter(|digest| log.iter().any(|seen| seen.gets(digest))).collect()
}

#[test]
fn chunks_are_fetched_when_they_are_read_and_each_once() {
    let lazy = Lazy::chunked();
    let mount = lazy.mount("m");
    let first = blobs_asked(&lazy);
    // The metadata, and at most what the kernel reads ahead when something looks at the new mount.
    assert!(first[0] == lazy.layers[0].digest && first.len() <= 3, "{first:?} of {}", lazy.layers.len());
    assert_eq!(mount.read(3), Ok(()), "{}", mount.log());
    let log = lazy.server.take_log();
    let parts = lazy.parts(&log).len();
    assert!(parts > 0 && parts < lazy.layers.len() / 2, "{parts} of {}", lazy.layers.len());
    mount.read_all();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropped");
    mount.read_all();
    let log = lazy.server.take_log();
    for layer in &lazy.layers {
        let times = log.iter().filter(|seen| seen.gets(&layer.digest)).count();
        assert!(times <= 1, "{} is asked for {times} times", layer.digest);
    }
    // The daemon writes down what it has a moment later.
    wait_until("status shows all of it in one row", || {
        let rows = mount.status()["lazy"].as_array().expect("rows").clone();
        rows.len() == 1 && rows[0]["state"] == "complete"
    });
}

#[test]
fn a_chunk_with_other_bytes_is_an_error_and_never_stored() {
    let lazy = Lazy::chunked();
    let mount = lazy.mount("m");
    let chunk = lazy.layers[lazy.layers.len() / 2].clone();
    let digest = chunk.digest;
    lazy.server.script(move |seen, _| seen.gets(&digest).then_some(Fault::Flip(chunk.size / 2)));
    let outcomes: Vec<_> = (0..FILES).map(|number| mount.read(number)).collect();
    let failed = outcomes.iter().filter(|outcome| **outcome == Err(EIO)).count();
    // A chunk may hold the end of one file and the beginning of the next.
    assert!((1..=3).contains(&failed), "{outcomes:?}");
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), FILES - failed);
    assert!(!lazy.blob(&digest).exists());
    assert!(mount.log().contains("sends other bytes"), "{}", mount.log());
    // The registry mends it: the next read gets the right bytes.
    lazy.server.heal();
    mount.read_all();
    assert!(lazy.blob(&digest).exists());
}

#[test]
fn chunks_that_are_here_are_read_while_the_server_is_away() {
    let lazy = Lazy::chunked();
    let mount = lazy.mount("m");
    assert_eq!(mount.read(3), Ok(()));
    let away = Arc::new(AtomicBool::new(true));
    let is_away = Arc::clone(&away);
    lazy.server.script(move |_, _| is_away.load(Ordering::SeqCst).then_some(Fault::Cut(0)));
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropped");
    for _ in 0..3 {
        assert_eq!(mount.read(3), Ok(()), "it is here");
    }
    assert_eq!(mount.read(FILES - 2), Err(EIO));
    assert_eq!(mount.read(3), Ok(()), "and stays readable");
    away.store(false, Ordering::SeqCst);
    wait_until("it recovers", || mount.read(FILES - 2) == Ok(()));
    // A daemon that is killed loses nothing: mounted again without the network.
    mount.kill("-9");
    mount.unmount();
    away.store(true, Ordering::SeqCst);
    let output =
        lazy.command(&lazy.pinned(), "m", &["--no-fill", "--net-timeout", "2"]).output().expect("mosfs");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let at = lazy.place.path("m");
    for number in [3, FILES - 2] {
        assert!(fs::read(at.join(name(number))).expect("a file") == content(number).as_bytes());
    }
    unmount(Command::new("umount").arg(&at));
}

#[test]
fn the_rest_of_the_chunks_comes_in_the_background() {
    let lazy = Lazy::chunked();
    let mount = lazy.mount_with("m", &[]);
    let store = || Store::open(&lazy.cache());
    let image = format!("p/mos/images/hostfs:{}", lazy.image.hex());
    wait_until("the image has a name", || store().is_ok_and(|store| store.resolve(&image).is_ok()));
    lazy.place.ok(&["verify", &format!("oci:{}", lazy.cache().display())]);
    lazy.server.script(|_, _| Some(Fault::Cut(0)));
    mount.read_all();
}
