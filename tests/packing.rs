//! Layers by choice: each codec and block size, beside the kernel and unsquashfs, and `mosfs build` with each option.

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mosfs::internals::convert::{Codec, Converted, Effort, LowerEntry, Packing, TarLayer, convert_tar};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::format::Compression;
use mosfs::internals::image::oci::{SQUASHFS_LZ4, SQUASHFS_ZSTD};
use mosfs::internals::image::source::MemorySource;
use mosfs::internals::image::squashfs::{Event, Squashfs};
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;
use mounted::{Mounted, unmount};
use tarball::Tarball;
use tempfile::TempDir;
use tools::{assert_same_tree, need_root, run, run_any, sh, snapshot};

const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
const SIZES: [(&str, u32); 7] = [
    ("16K", 16 << 10),
    ("32K", 32 << 10),
    ("64K", 64 << 10),
    ("128K", 128 << 10),
    ("256K", 256 << 10),
    ("512K", 512 << 10),
    ("1M", 1 << 20),
];

/// What the small layer of `the_bytes_are_those_of_the_last_version` becomes in lz4 with blocks of 32 KiB.
const GOLDEN: (u64, &str) =
    (40960, "sha256:d47451def571759aa4f5ee55f7ee804df6ba9f9454ef53a724017b3e4b09c2b4");

/// A tree with files around each block size: text, noise, holes, empty ones, and many small ones.
fn tree(dir: &Path) {
    need_root();
    sh(
        dir,
        r#"
        mkdir tree; cd tree; chmod 1751 .; chown 12:34 .
        for size in 16384 32768 65536 131072 262144 524288 1048576; do
            for near in $((size - 1)) $size $((size + 1)); do
                seq 1000000 | head -c $near > text-$near
            done
        done
        head -c 300001 /dev/urandom > noise; seq 300000 > long; head -c 3000017 /dev/zero > zeros; truncate -s 5M sparse
        printf middle | dd of=sparse bs=1 seek=2500000 conv=notrunc status=none
        : > empty; ln long hard; ln -s long soft; mkfifo pipe; mknod null c 1 3
        mkdir many; i=0; while [ $i -lt 300 ]; do seq $i $((i * 3)) > many/file-with-a-long-enough-name-$i; i=$((i+1)); done
        setfattr -n user.text -v value long; touch -d @1234567890 long many .
        "#,
    );
}

fn convert(tar: &[u8], to: &Path, packing: Packing, threads: usize) -> Converted {
    let layer = TarLayer {
        digest: Digest::of(tar),
        size: tar.len() as u64,
        compression: Compression::None,
        diff_id: None,
    };
    let file = File::options().read(true).write(true).create(true).truncate(true).open(to).unwrap();
    let effort = Effort { threads: NonZeroUsize::new(threads).unwrap(), packing };
    convert_tar(tar, &layer, &file, effort, &mut |_| Ok(LowerEntry::Nothing), &Progress::silent()).unwrap()
}

#[test]
fn each_codec_and_block_size_shows_the_same_tree() {
    let dir = TempDir::new().unwrap();
    tree(dir.path());
    let tar = run_any(
        Command::new("tar")
            .args([
                "--sort=name",
                "--xattrs",
                "--xattrs-include=*",
                "--format=posix",
                "-C",
                "tree",
                "-cf",
                "-",
                ".",
            ])
            .current_dir(dir.path()),
    );
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    let expected = snapshot(&dir.path().join("tree"));
    let image = dir.path().join("image");
    let mut digests = BTreeMap::new();
    for (codec, level) in [(Codec::Zstd, 1), (Codec::Lz4, 3)] {
        for (word, bytes) in SIZES {
            let packing = Packing::new(codec, Some(level), bytes).unwrap();
            let what = format!("{} {word}", codec.name());
            let done = convert(&tar.stdout, &image, packing, 2);
            assert_eq!(done.notes, [] as [String; 0], "{what}");

            // The kernel's reader, which checks the options of lz4, and mosfs' own.
            let mounted = Mounted::of("squashfs", &image, dir.path().join("mnt"));
            assert_same_tree(&expected, &snapshot(&mounted.0));
            drop(mounted);
            let opened = Squashfs::open(Arc::new(MemorySource(fs::read(&image).unwrap()))).unwrap();
            assert_eq!(opened.superblock().block_bytes, bytes, "{what}");
            assert_eq!(opened.superblock().compressor.name(), codec.name(), "{what}");
            let mut problems = Vec::new();
            let _ = opened.check_all(&mut |event| {
                if let Event::Problem { path, error } = event {
                    problems.push(format!("{}: {error}", String::from_utf8_lossy(path)));
                }
                ControlFlow::Continue(())
            });
            assert_eq!(problems, [""; 0], "{what}");

            let said = run(Command::new("unsquashfs").arg("-s").arg(&image));
            assert!(said.contains(&format!("Compression {}", codec.name())), "{what}: {said}");
            assert!(said.contains(&format!("Block size {bytes}")), "{what}: {said}");
            if codec == Codec::Lz4 {
                assert!(said.contains("High Compression option specified"), "{what}: {said}");
            }
            if word == "64K" {
                let out = dir.path().join("unsquashed");
                run(Command::new("unsquashfs")
                    .args(["-quiet", "-no-progress", "-strict-errors", "-d"])
                    .arg(&out)
                    .arg(&image));
                assert_same_tree(&expected, &snapshot(&out));
                fs::remove_dir_all(out).unwrap();
                // Bytes depend on the choice and the input, never on the threads.
                let again = convert(&tar.stdout, &dir.path().join("again"), packing, 7);
                assert_eq!(again.sealed.digest, done.sealed.digest, "{what}");
            }
            assert_eq!(digests.insert(done.sealed.digest, what.clone()), None, "{what}");
        }
    }
}

/// An image in lz4 whose bytes never change: a change of the writer or of liblz4 must be seen, as it changes the digest
/// of every system that is built again.
#[test]
fn the_bytes_are_those_of_the_last_version() {
    let mut tar = Tarball::default();
    tar.dir("etc").file("etc/hostname", b"mosfs\n").file("zeros", &[0; 300_000]);
    let text: Vec<u8> =
        (0..40_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_string().into_bytes()).collect();
    tar.file("x", &[b'x'; 200_000]).file("text", &text[..40_000]);
    let dir = TempDir::new().unwrap();
    let packing = Packing::new(Codec::Lz4, None, 32 << 10).unwrap();
    let sealed = convert(&tar.end(), &dir.path().join("image"), packing, 2).sealed;
    assert_eq!((sealed.size_bytes, sealed.digest.to_string().as_str()), GOLDEN);
}

/// A folder with keys and an image of one tar layer.
struct Publisher(TempDir);

impl Publisher {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let this = Self(TempDir::new().unwrap());
        run(this.mosfs().args(["keys", "generate", "keys", "--product", PRODUCT]));
        let mut tar = Tarball::default();
        let text: Vec<u8> = (0..100_000u32).flat_map(|n| format!("{n}\n").into_bytes()).collect();
        tar.dir("etc").file("etc/hostname", b"mosfs\n").file("data", &text).dir("boot");
        for (name, content) in files {
            tar.file(name, content);
        }
        fs::write(this.dir().join("layer.tar"), tar.end()).unwrap();
        sh(
            this.dir(),
            "umoci init --layout images; umoci new --image images:v1; umoci raw add-layer --image images:v1 layer.tar",
        );
        this
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn mosfs(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command.current_dir(self.dir()).env_remove("MOSFS_FAILPOINT");
        command
    }

    /// Writes the import manifest; each target comes with a field of its own.
    fn import(&self, head: &str, targets: &[(&str, &str)]) {
        let mut text = format!("version: 200\nproduct: {PRODUCT}\n{head}targets:\n");
        for (name, more) in targets {
            text += &format!(
                "  {name}:\n    url: oci:images:v1\n    version: 0.0.1\n    service_type: fs-only\n    \
                 network: {{type: none}}\n"
            );
            if !more.is_empty() {
                text += &format!("    {more}\n");
            }
        }
        fs::write(self.dir().join("import.yaml"), text).unwrap();
    }

    /// Builds into a store. Returns the exit code, the digest, and what is said.
    fn build(&self, store: &str, more: &[&str]) -> (Option<i32>, String, String) {
        let mut command = self.mosfs();
        command.args(["build", "import.yaml", "--store", store, "--key", "keys/signer.key"]);
        let output = run_any(command.args(["--cert", "keys/signer.pem"]).args(more));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn built(&self, store: &str, more: &[&str]) -> (String, String) {
        let (code, digest, said) = self.build(store, more);
        assert_eq!(code, Some(0), "{said}");
        (digest, said)
    }

    /// Media type, codec and block size of a target's one layer.
    fn layer(&self, store: &str, target: &str) -> (String, String, u32) {
        let store = Store::open(&self.dir().join(store)).unwrap();
        let names = store.names().unwrap();
        let wanted = format!("mos/images/{target}:sha256/");
        let (_, found) = names.iter().find(|(name, _)| name.starts_with(&wanted)).unwrap();
        let image = store.image(&found.digest).unwrap();
        let layer = &image.layers[0];
        let bytes = fs::read(store.blob_path(&layer.digest)).unwrap();
        let superblock = Squashfs::read_superblock(&MemorySource(bytes)).unwrap();
        (layer.media_type().to_string(), superblock.compressor.name().into(), superblock.block_bytes)
    }
}

#[test]
fn the_choice_is_part_of_the_digest_and_a_targets_own_comes_first() {
    let publisher = Publisher::new(&[]);
    publisher.import("", &[("app", "")]);
    let zstd = (SQUASHFS_ZSTD.to_string(), "zstd".to_string());
    let lz4 = (SQUASHFS_LZ4.to_string(), "lz4".to_string());
    let is = |store: &str, target: &str, (media_type, codec): &(String, String), bytes: u32| {
        assert_eq!(
            publisher.layer(store, target),
            (media_type.clone(), codec.clone(), bytes),
            "{store} {target}"
        );
    };

    let (default, said) = publisher.built("default", &[]);
    assert_eq!(said, "");
    is("default", "app", &zstd, 128 << 10);
    let (same, _) =
        publisher.built("same", &["--compression", "zstd", "--block-size", "128K", "--level", "15"]);
    assert_eq!(same, default);
    let mut digests = vec![default];
    for (store, more, kind, bytes) in [
        ("small", &["--block-size", "16K"][..], &zstd, 16 << 10),
        ("large", &["--block-size", "1M"], &zstd, 1 << 20),
        ("level", &["--level", "1"], &zstd, 128 << 10),
        ("lz4", &["--compression", "lz4"], &lz4, 128 << 10),
        ("lz4-low", &["--compression", "lz4", "--level", "1"], &lz4, 128 << 10),
        ("lz4-small", &["--compression", "lz4", "--block-size", "32K"], &lz4, 32 << 10),
    ] {
        let (digest, _) = publisher.built(store, more);
        is(store, "app", kind, bytes);
        assert!(!digests.contains(&digest), "{store}");
        digests.push(digest);
        run(publisher.mosfs().arg("verify").arg(format!("oci:{store}")));
    }

    // What a target says comes before the command line, and what it leaves out comes from there.
    publisher.import(
        "",
        &[
            ("app", ""),
            ("both", "layer: {compression: lz4, block_size: 16K}"),
            ("codec", "layer: {compression: lz4}"),
            ("size", "layer: {block_size: 64K}"),
        ],
    );
    let canonical = run(publisher.mosfs().args(["manifest", "canonical", "import.yaml"]));
    assert!(canonical.contains(r#""layer":{"block_size":"16K","compression":"lz4"}"#), "{canonical}");
    publisher.built("mixed", &["--block-size", "256K", "--level", "19"]);
    is("mixed", "app", &zstd, 256 << 10);
    is("mixed", "both", &lz4, 16 << 10);
    is("mixed", "codec", &lz4, 256 << 10);
    is("mixed", "size", &zstd, 64 << 10);

    // FUSE shows the same tree for each, as root or not.
    need_root();
    let unpacked = publisher.dir().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    run(Command::new("tar").args(["-xpf", "layer.tar", "-C"]).arg(&unpacked).current_dir(publisher.dir()));
    let store = Store::open(&publisher.dir().join("mixed")).unwrap();
    for (name, _) in store.names().unwrap().iter().filter(|(name, _)| name.starts_with("mos/images/")) {
        let mnt = publisher.dir().join("mnt");
        fs::create_dir_all(&mnt).unwrap();
        run(publisher
            .mosfs()
            .args(["mount", "--backend", "fuse"])
            .arg(format!("oci:mixed:{name}"))
            .arg(&mnt));
        let found = snapshot(&mnt);
        unmount(publisher.mosfs().arg("umount").arg(&mnt));
        let data = |tree: &BTreeMap<PathBuf, String>| tree.get(Path::new("data")).cloned();
        assert!(data(&found).is_some());
        assert_eq!(data(&found), data(&snapshot(&unpacked)), "{name}");
    }
}

#[test]
fn what_contradicts_is_refused() {
    let publisher = Publisher::new(&[]);
    publisher.import("", &[("app", "")]);
    for (more, word) in [
        (&["--compression", "lz4", "--level", "13"][..], "lz4 has the levels 1 to 12"),
        (&["--compression", "xz"], "zstd, lz4"),
        (&["--block-size", "4K"], "16K, 32K, 64K, 128K, 256K, 512K, 1M"),
        (&["--block-size", "131072"], "16K, 32K"),
        (&["--block-size", "2M"], "16K, 32K"),
        (&["--level", "0"], "1..=22"),
        (&["--level", "23"], "1..=22"),
    ] {
        let (code, _, said) = publisher.build("store", more);
        assert_eq!(code, Some(2), "{more:?}: {said}");
        assert!(said.contains(word), "{more:?}: {said}");
    }
    for (layer, place, allowed) in [
        ("layer: {compression: gzip}", "9:26: targets.app.layer.compression", "zstd, lz4"),
        (
            "layer: {block_size: 100K}",
            "9:25: targets.app.layer.block_size",
            "16K, 32K, 64K, 128K, 256K, 512K, 1M",
        ),
        ("layer: {level: 3}", "9:13: targets.app.layer.level", "compression, block_size"),
        ("layer: lz4", "9:12: targets.app.layer", "a mapping with format, compression, block_size"),
    ] {
        publisher.import("", &[("app", layer)]);
        let (code, _, said) = publisher.build("store", &[]);
        assert_eq!(code, Some(2), "{layer}: {said}");
        assert!(said.contains(place) && said.contains(allowed), "{layer}: {said}");
    }

    // PuzzleFS has a packing of its own.
    publisher.import("storage_type: puzzlefs\n", &[("app", "layer: {compression: lz4}")]);
    let (code, _, said) = publisher.build("store", &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("only with storage_type atomfs"), "{said}");
    publisher.import("storage_type: puzzlefs\n", &[("app", "")]);
    for more in [["--compression", "lz4"], ["--block-size", "64K"]] {
        let (code, _, said) = publisher.build("store", &more);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("storage_type: puzzlefs"), "{said}");
    }
    assert!(!publisher.dir().join("store").join("index.json").exists());
}

/// Layers of a codec that not every kernel has: the kernels of the system are looked at.
#[test]
fn a_kernel_without_lz4_is_named() {
    for (config, expected) in [
        (None, Some("no image of the system contains a kernel configuration")),
        (Some("CONFIG_SQUASHFS=m\nCONFIG_SQUASHFS_LZ4=y\n"), None),
        (
            Some("CONFIG_SQUASHFS=m\n# CONFIG_SQUASHFS_LZ4 is not set\n"),
            Some("6.1.0-13-amd64 of target `app`"),
        ),
    ] {
        let files: Vec<_> =
            config.iter().map(|text: &&str| ("boot/config-6.1.0-13-amd64", text.as_bytes())).collect();
        let publisher = Publisher::new(&files);
        publisher.import("", &[("app", "")]);
        let (_, said) = publisher.built("zstd", &["--level", "1"]);
        assert_eq!(said, "", "every kernel that mounts squashfs layers has zstd");
        let (_, said) = publisher.built("lz4", &["--compression", "lz4"]);
        match expected {
            Some(word) => {
                assert!(said.contains("target `app`") && said.contains("CONFIG_SQUASHFS_LZ4"), "{said}");
                assert!(said.contains(word), "{said}");
            }
            None => assert_eq!(said, ""),
        }
    }
}

/// A layer that is squashfs already is not packed again, and `build` says so where another packing was chosen.
#[test]
fn images_stay_as_they_are() {
    let publisher = Publisher::new(&[]);
    publisher.import("", &[("app", "")]);
    publisher.built("source", &["--block-size", "64K"]);
    let name = {
        let store = Store::open(&publisher.dir().join("source")).unwrap();
        let names = store.names().unwrap();
        names.into_iter().map(|(name, _)| name).find(|name| name.starts_with("mos/images/app")).unwrap()
    };
    let text = fs::read_to_string(publisher.dir().join("import.yaml")).unwrap();
    let text = text.replace("url: oci:images:v1", &format!("url: \"oci:source:{name}\""));
    fs::write(publisher.dir().join("import.yaml"), text).unwrap();
    let (_, said) = publisher.built("kept", &["--compression", "lz4"]);
    assert!(said.contains("is already squashfs with zstd and blocks of 64 KiB"), "{said}");
    assert_eq!(publisher.layer("kept", "app"), (SQUASHFS_ZSTD.into(), "zstd".into(), 64 << 10));
    let (_, said) = publisher.built("kept-too", &["--block-size", "64K"]);
    assert_eq!(said, "");
}

/// The kernel's squashfs refuses lz4 without its options, so `build` does too.
#[test]
fn an_lz4_image_without_options_is_refused() {
    let publisher = Publisher::new(&[]);
    sh(
        publisher.dir(),
        "mkdir tree; seq 10000 > tree/file; mksquashfs tree image -comp lz4 -Xhc -all-root -noappend -quiet -no-progress",
    );
    let image = publisher.dir().join("image");
    let good = fs::read(&image).unwrap();
    for (break_it, code) in [(false, Some(0)), (true, Some(2))] {
        let mut bytes = good.clone();
        if break_it {
            // The superblock's flags (at 24): bit 10, "there are options".
            bytes[25] &= !4;
        }
        fs::write(&image, &bytes).unwrap();
        let mounts = run_any(
            Command::new("mount")
                .args(["-t", "squashfs", "-o", "loop,ro"])
                .arg(&image)
                .arg(publisher.dir().join("tree")),
        );
        assert_eq!(mounts.status.success(), !break_it);
        if mounts.status.success() {
            unmount(Command::new("umount").arg(publisher.dir().join("tree")));
        }
        let layout = if break_it { "broken" } else { "good" };
        layout_of(publisher.dir(), layout, &bytes);
        publisher.import("", &[("app", "")]);
        let text = fs::read_to_string(publisher.dir().join("import.yaml")).unwrap();
        fs::write(
            publisher.dir().join("import.yaml"),
            text.replace("oci:images:v1", &format!("oci:{layout}:v1")),
        )
        .unwrap();
        let (found, _, said) = publisher.build(&format!("store-{layout}"), &[]);
        assert_eq!(found, code, "{said}");
        assert_eq!(said.contains("no options of lz4's format 1"), break_it, "{said}");
    }
}

/// A layout with an image `v1` of one squashfs layer without a hash tree.
fn layout_of(dir: &Path, name: &str, squashfs: &[u8]) {
    let store = Store::create(&dir.join(name)).unwrap();
    let writer = store.writer().unwrap();
    let layer = writer.put_bytes(SQUASHFS_LZ4, squashfs).unwrap();
    let config = writer
        .put_bytes(mosfs::internals::image::oci::EMPTY, mosfs::internals::image::oci::EMPTY_BYTES)
        .unwrap();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": mosfs::internals::image::oci::MANIFEST, "config": config, "layers": [layer],
    });
    let manifest =
        writer.put_bytes(mosfs::internals::image::oci::MANIFEST, manifest.to_string().as_bytes()).unwrap();
    writer.set_entries(&[(Some("v1"), &manifest)]).unwrap();
}
