//! What is measured: one Debian tree, and images of it for each peer. Made once, kept in a folder.
//!
//! ```text
//! DIR/tree.tar            from Debian's packages, by mmdebstrap
//! DIR/tree/               the same, unpacked: what every mount must show
//! DIR/squashfs.img        zstd, 128 KiB blocks: the kernel's and squashfuse_ll's
//! DIR/erofs-16k.img       lz4hc, clusters of 16 KiB
//! DIR/erofs-16k-layers/   layout with the erofs image + verity: tag erofs
//! DIR/layers/             layout with squashfs + verity layers: tags one, three, twenty
//! DIR/lz4-layers/         the same in lz4hc: tag three
//! DIR/puzzlefs/           layout with the three tar layers as one PuzzleFS image, zstd: tag tree
//! DIR/tars/               layout with tar layers: tag three; and the tars beside it
//! ```
//!
//! The tree is always made; an image, when a row first asks for it. Each is made under another name and renamed when it is
//! whole.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mosfs::internals::digest::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Result;

/// Packages on top of Debian's minimal base: compilers, headers, Python. 500 MB and 20,000 files, or more.
const PACKAGES: &str = "build-essential,python3-dev,python3-setuptools,git,cmake,gdb,libssl-dev,libboost-dev,perl,openssl,ca-certificates";

/// The product of every system.
pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";

/// The file of the squashfs image of the whole tree.
const SQUASHFS_IMAGE: &str = "squashfs.img";

/// Options of every squashfs image, as mosfs makes them.
const SQUASHFS: &[&str] = &["-comp", "zstd", "-b", "131072", "-noappend", "-no-progress", "-quiet"];

/// A path of the tree.
#[derive(Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Its path below the root of the tree.
    pub path: PathBuf,
    /// Whether it is a regular file.
    pub is_file: bool,
    /// Its size in bytes.
    pub size: u64,
    /// Whether whoever measures may read it: true of all of them for root.
    pub readable: bool,
    mode: u32,
    dev_inode: (u64, u64),
    links: u64,
}

/// The tree and its images.
pub struct Fixture {
    dir: PathBuf,
    /// The mosfs command, which makes the PuzzleFS image.
    mosfs: PathBuf,
    /// All paths of the tree, in the order of their names.
    pub entries: Vec<Entry>,
    /// The images that a row has asked for.
    used: RefCell<BTreeSet<PathBuf>>,
}

impl Fixture {
    /// Makes the tree in `dir` where it is missing.
    pub fn make(dir: &Path, mosfs: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let dir = dir.canonicalize()?;
        once(&dir.join("tree.tar"), |to| {
            let suite = suite();
            shell(&format!(
                "mmdebstrap --quiet --variant=minbase --include={PACKAGES} --format=tar {suite} '{}'",
                to.display()
            ))
        })?;
        once(&dir.join("tree"), |to| {
            fs::create_dir_all(to)?;
            let tar = dir.join("tree.tar");
            shell(&format!(
                "tar --xattrs --xattrs-include='*' --numeric-owner -C '{}' -xpf '{}'",
                to.display(),
                tar.display()
            ))
        })?;
        let mut fixture = Self { dir, mosfs: mosfs.into(), entries: Vec::new(), used: RefCell::default() };
        walk(&fixture.tree(), Path::new(""), &mut fixture.entries)?;
        fixture.entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(fixture)
    }

    /// Makes all images that are missing.
    pub fn make_images(&self) -> Result<()> {
        self.squashfs()?;
        self.erofs_layers()?;
        self.layers()?;
        self.lz4_layers()?;
        self.puzzlefs()?;
        Ok(())
    }

    /// Reads the images that rows have asked for into memory.
    pub fn warm(&self) -> Result<()> {
        self.used.borrow().iter().try_for_each(|path| warm(path))
    }

    /// A file or a layout of this name, made where it is missing. It is in memory from the first call on.
    fn image(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        once(&path, make)?;
        if self.used.borrow_mut().insert(path.clone()) {
            warm(&path)?;
        }
        Ok(path)
    }

    /// The entries that a user sees who owns none of them, and which of these are readable for that user.
    pub fn for_others(&self) -> Vec<Entry> {
        let closed = |entry: &Entry| match entry.mode & 0o170_000 {
            0o040_000 => entry.mode & 0o005 != 0o005,
            0o100_000 => entry.mode & 0o004 == 0,
            _ => false,
        };
        let folders: HashSet<&Path> =
            self.entries.iter().filter(|e| !e.is_file && closed(e)).map(|e| e.path.as_path()).collect();
        let hidden = |entry: &Entry| entry.path.ancestors().skip(1).any(|path| folders.contains(path));
        let seen = self.entries.iter().filter(|entry| !hidden(entry));
        seen.map(|entry| Entry { readable: !closed(entry), ..entry.clone() }).collect()
    }

    /// The tree as plain files.
    pub fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// The squashfs image of the whole tree.
    pub fn squashfs(&self) -> Result<PathBuf> {
        self.image(SQUASHFS_IMAGE, |to| {
            let tree = self.tree();
            shell(&format!("mksquashfs '{}' '{}' {}", tree.display(), to.display(), SQUASHFS.join(" ")))
        })
    }

    /// The erofs image of the whole tree.
    pub fn erofs(&self) -> Result<PathBuf> {
        self.image("erofs-16k.img", |to| {
            let tree = self.tree();
            shell(&format!("mkfs.erofs --quiet -zlz4hc -C16384 '{}' '{}'", to.display(), tree.display()))
        })
    }

    /// The layout with an erofs + verity layer.
    pub fn erofs_layers(&self) -> Result<PathBuf> {
        let whole = self.erofs()?;
        self.image("erofs-16k-layers", |to| {
            let image = to.join("erofs.img");
            fs::create_dir_all(to)?;
            fs::copy(whole, &image)?;
            new_layout(to, &[("erofs", vec![image])])
        })
    }

    /// The layout with squashfs + verity layers.
    pub fn layers(&self) -> Result<PathBuf> {
        let whole = self.squashfs()?;
        self.image("layers", |to| {
            fs::copy(whole, one_image(to)?)?;
            self.make_layers(to, "zstd", &[("three", 3), ("twenty", 20)])
        })
    }

    /// The layout with layers in lz4hc, tag `three`.
    pub fn lz4_layers(&self) -> Result<PathBuf> {
        self.image("lz4-layers", |to| self.make_layers(to, "lz4 -Xhc", &[("three", 3)]))
    }

    /// The layout with a PuzzleFS image, tag `tree`.
    pub fn puzzlefs(&self) -> Result<PathBuf> {
        self.image("puzzlefs", |to| make_puzzlefs(to, self, &self.mosfs))
    }

    /// The layout with tar layers, tag `three`.
    pub fn tar_layout(&self) -> Result<PathBuf> {
        let tars = self.dir.join("tars");
        once(&tars, |to| self.make_tars(to))?;
        Ok(tars.join("layout"))
    }

    /// A folder for what a row makes and throws away.
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }

    /// A line on what the tree is.
    pub fn describe(&self) -> String {
        let files = self.entries.iter().filter(|e| e.is_file).count();
        let bytes: u64 = self.entries.iter().filter(|e| e.is_file).map(|e| e.size).sum();
        let image = fs::metadata(self.dir.join(SQUASHFS_IMAGE));
        let image =
            image.map_or(String::new(), |m| format!("; squashfs zstd 128K {} MB", m.len() / 1_000_000));
        format!(
            "Debian {} with compilers and Python: {} entries, {files} files, {} MB{image}",
            suite(),
            self.entries.len(),
            bytes / 1_000_000,
        )
    }

    /// Which of `count` layers each path belongs to. Hard links stay together.
    fn split(&self, count: usize) -> Vec<Vec<&Entry>> {
        let mut layers: Vec<Vec<&Entry>> = (0..count).map(|_| Vec::new()).collect();
        let mut linked = std::collections::BTreeMap::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let own = if count == 3 {
                // As images are made: a base, tools on top of it, a language on top of that.
                let path = entry.path.to_string_lossy();
                let starts = |list: &[&str]| list.iter().any(|start| path.starts_with(start));
                if starts(&["usr/lib/python3", "usr/share/python3"]) {
                    2
                } else if starts(&[
                    "usr/include",
                    "usr/lib/gcc",
                    "usr/share/cmake",
                    "usr/lib/git-core",
                    "usr/share/gdb",
                ]) {
                    1
                } else {
                    0
                }
            } else {
                // The worst case: every folder has something in every layer.
                number % count
            };
            let own = if entry.is_file && entry.links > 1 {
                *linked.entry(entry.dev_inode).or_insert(own)
            } else {
                own
            };
            layers[own].push(entry);
        }
        layers
    }

    /// Writes `count` tars `layer-N.tar` into `to`. Where there are three, the lowest has a folder that the
    /// highest deletes (with `whiteout`, whatever form that has).
    fn write_tars(
        &self,
        to: &Path,
        count: usize,
        whiteout: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<Vec<PathBuf>> {
        let mut tars = Vec::new();
        for (number, layer) in self.split(count).iter().enumerate() {
            let tar = to.join(format!("layer-{number}.tar"));
            // A layer has all folders on the way to what it holds.
            let mut paths: Vec<&Path> =
                layer.iter().flat_map(|e| e.path.ancestors()).filter(|p| !p.as_os_str().is_empty()).collect();
            paths.sort();
            paths.dedup();
            let list = to.join("list");
            let mut out = BufWriter::new(File::create(&list)?);
            out.write_all(b"./\0")?;
            for path in paths {
                out.write_all(b"./")?;
                out.write_all(path.as_os_str().as_bytes())?;
                out.write_all(b"\0")?;
            }
            out.flush()?;
            let mut extra = String::new();
            if count == 3 && number == 0 {
                let gone = to.join("extra/opt/gone");
                fs::create_dir_all(&gone)?;
                for file in 0..200 {
                    fs::write(
                        gone.join(format!("file-{file}")),
                        format!("deleted by a later layer: {file}\n"),
                    )?;
                }
                extra = "./opt/gone".into();
            } else if count == 3 && number == 2 {
                fs::create_dir_all(to.join("extra/opt"))?;
                extra = whiteout(&to.join("extra/opt"))?;
            }
            let extra_dir = to.join("extra");
            let extra = if extra.is_empty() {
                extra
            } else {
                format!("-C '{}' --recursion {extra}", extra_dir.display())
            };
            shell(&format!(
                "tar --sort=name --xattrs --xattrs-include='*' --numeric-owner --no-recursion -cf '{}' -C '{}' --null -T '{}' {extra}",
                tar.display(),
                self.tree().display(),
                list.display()
            ))?;
            fs::remove_file(&list)?;
            if extra_dir.exists() {
                fs::remove_dir_all(&extra_dir)?;
            }
            tars.push(tar);
        }
        Ok(tars)
    }

    /// A layout for mosfs: the image of all as one layer where it is there, and the tree in as many layers as each tag
    /// has. `codec` is what sqfstar gets after `-comp`.
    fn make_layers(&self, to: &Path, codec: &str, cuts: &[(&'static str, usize)]) -> Result<()> {
        fs::create_dir_all(to)?;
        let one = one_image(to)?;
        let mut tags = if one.exists() { vec![("one", vec![one])] } else { Vec::new() };
        for &(name, count) in cuts {
            let work = to.join(name);
            fs::create_dir_all(&work)?;
            // A whiteout of an image layer is a character device 0:0.
            let tars = self.write_tars(&work, count, &|dir| {
                shell(&format!("mknod '{}' c 0 0", dir.join("gone").display()))?;
                Ok("./opt/gone".into())
            })?;
            let mut images = Vec::new();
            for (number, tar) in tars.iter().enumerate() {
                let image = to.join(format!("{name}-{number}.img"));
                shell(&format!(
                    "sqfstar -comp {codec} {SQUASHFS_TAR} '{}' <'{}'",
                    image.display(),
                    tar.display()
                ))?;
                images.push(image);
            }
            fs::remove_dir_all(&work)?;
            tags.push((name, images));
        }
        new_layout(to, &tags)
    }

    /// The layout for umoci, and the tars that `mosfs build` and sqfstar are compared on.
    fn make_tars(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        let tars = self.write_tars(to, 3, &|dir| {
            fs::write(dir.join(".wh.gone"), "")?;
            Ok("./opt/.wh.gone".into())
        })?;
        let layout = to.join("layout");
        let layout = layout.display();
        shell(&format!("umoci init --layout '{layout}'"))?;
        shell(&format!("umoci new --image '{layout}:three'"))?;
        for tar in tars {
            shell(&format!("umoci raw add-layer --image '{layout}:three' '{}'", tar.display()))?;
        }
        Ok(())
    }
}

/// The image of the whole tree, in a folder that is to become a layout.
fn one_image(layout: &Path) -> Result<PathBuf> {
    fs::create_dir_all(layout)?;
    Ok(layout.join("one.img"))
}

/// [`SQUASHFS`] without the codec, for sqfstar, which knows no `-noappend`.
const SQUASHFS_TAR: &str = "-b 131072 -no-progress -quiet";

/// Makes an OCI layout of squashfs images in `layout`, which become verity layers and are moved there.
/// Each tag has its images, lowest layer first.
pub fn new_layout(layout: &Path, tags: &[(&str, Vec<PathBuf>)]) -> Result<()> {
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let manifests: Vec<Value> =
        tags.iter().map(|(tag, images)| image(layout, tag, images)).collect::<Result<_>>()?;
    write_layout(layout, &manifests)
}

/// Makes a folder that has blobs a layout with these images.
fn write_layout(layout: &Path, manifests: &[Value]) -> Result<()> {
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(())
}

/// Turns squashfs images, and `erofs.img`, into verity layers of a layout; returns the descriptor for its index.
fn image(layout: &Path, tag: &str, images: &[PathBuf]) -> Result<Value> {
    let mut layers = Vec::new();
    for file in images {
        let length = fs::metadata(file)?.len();
        let hash_offset = length.div_ceil(4096) * 4096;
        File::options().write(true).open(file)?.set_len(hash_offset)?;
        let said = Command::new("veritysetup")
            .args(["format", "--data-block-size=4096", "--hash-block-size=4096"])
            .arg(format!("--data-blocks={}", hash_offset / 4096))
            .arg(format!("--hash-offset={hash_offset}"))
            .args([file, file])
            .output()?;
        let text = String::from_utf8_lossy(&said.stdout);
        let root = text
            .lines()
            .find_map(|line| line.strip_prefix("Root hash:"))
            .ok_or_else(|| {
                format!("veritysetup gave no root hash: {}", String::from_utf8_lossy(&said.stderr))
            })?
            .trim()
            .to_string();
        let format = if file.ends_with("erofs.img") { "erofs+lz4hc" } else { "squashfs+zstd" };
        let mut layer = add(layout, file, &format!("application/vnd.stacker.image.layer.{format}"))?;
        layer["annotations"] = json!({"io.stackeroci.stacker.atomfs_verity_root_hash": root});
        layers.push(layer);
    }
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let platform = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config =
        json!({"architecture": platform, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config =
        add_bytes(layout, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json")?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": layers,
    });
    let mut manifest =
        add_bytes(layout, manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json")?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
    Ok(manifest)
}

fn add(layout: &Path, file: &Path, media_type: &str) -> Result<Value> {
    let said = Command::new("sha256sum").arg(file).output()?;
    let hex = String::from_utf8_lossy(&said.stdout).split_whitespace().next().unwrap_or("").to_string();
    let size = fs::metadata(file)?.len();
    fs::rename(file, layout.join("blobs/sha256").join(&hex))?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": size}))
}

fn add_bytes(layout: &Path, bytes: &[u8], media_type: &str) -> Result<Value> {
    let digest = Digest::of(bytes).to_string();
    let hex = digest.strip_prefix("sha256:").unwrap_or(&digest);
    fs::write(layout.join("blobs/sha256").join(hex), bytes)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len()}))
}

/// Makes `to` by writing it under another name first; does nothing where it is there.
pub fn once(to: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    eprintln!("making {} (once)", to.display());
    let mut name = to.as_os_str().to_owned();
    name.push(".part");
    let part = PathBuf::from(name);
    if part.is_dir() {
        fs::remove_dir_all(&part)?;
    } else if part.exists() {
        fs::remove_file(&part)?;
    }
    make(&part)?;
    fs::rename(&part, to)?;
    Ok(())
}

/// Builds a system of `targets` into `store` in `to`, with new keys where there are none. `options` are more lines of the
/// import manifest.
pub fn build(to: &Path, mosfs: &Path, version: u64, options: &str, targets: &str) -> Result<()> {
    let (mosfs, dir) = (mosfs.display(), to.display());
    fs::write(
        to.join("import.yaml"),
        format!("version: {version}\nproduct: {PRODUCT}\n{options}targets:\n{targets}"),
    )?;
    if !to.join("keys").exists() {
        shell(&format!("'{mosfs}' keys generate '{dir}/keys' --product {PRODUCT}"))?;
    }
    shell(&format!(
        "'{mosfs}' build '{dir}/import.yaml' --store '{dir}/store' --key '{dir}/keys/signer.key' --cert '{dir}/keys/signer.pem' \
         --floor-key '{dir}/keys/floor.key'"
    ))
}

/// Makes the layout with the tree as one PuzzleFS image. It has nothing else, which the puzzlefs tool expects.
fn make_puzzlefs(to: &Path, fixture: &Fixture, mosfs: &Path) -> Result<()> {
    let work = fixture.scratch().with_file_name("puzzlefs-work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir(&work)?;
    let tree = format!(
        "  tree: {{url: \"oci:{}:three\", version: 1.0.0, service_type: fs-only, network: {{type: none}}}}\n",
        fixture.tar_layout()?.display()
    );
    build(&work, mosfs, 1, "storage_type: puzzlefs\n", &tree)?;
    let store = work.join("store");
    let index: Value = serde_json::from_slice(&fs::read(store.join("index.json"))?)?;
    let named = |one: &&Value| {
        let name = &one["annotations"]["org.opencontainers.image.ref.name"];
        name.as_str().is_some_and(|name| name.starts_with("mos/images/tree:"))
    };
    let mut image = index["manifests"]
        .as_array()
        .into_iter()
        .flatten()
        .find(named)
        .ok_or("the store has no image")?
        .clone();
    image["annotations"]["org.opencontainers.image.ref.name"] = "tree".into();
    // Not with skopeo, to which some thousand chunks are layers of which it looks at each other one: that takes minutes.
    let blobs = |layout: &Path| layout.join("blobs/sha256");
    fs::create_dir_all(blobs(to))?;
    let copy = |blob: &Value| -> Result<PathBuf> {
        let hex =
            blob["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:")).ok_or("no digest")?;
        let path = blobs(to).join(hex);
        fs::copy(blobs(&store).join(hex), &path)?;
        Ok(path)
    };
    let manifest: Value = serde_json::from_slice(&fs::read(copy(&image)?)?)?;
    copy(&manifest["config"])?;
    for layer in manifest["layers"].as_array().into_iter().flatten() {
        copy(layer)?;
    }
    write_layout(to, &[image])?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// Brings a file into the page cache.
pub fn warm_file(path: &Path) -> Result<()> {
    io::copy(&mut File::open(path)?, &mut io::sink())?;
    Ok(())
}

/// Reads a file, or all blobs of a layout, into memory.
fn warm(path: &Path) -> Result<()> {
    if path.is_file() {
        return warm_file(path);
    }
    for blob in fs::read_dir(path.join("blobs/sha256"))? {
        warm_file(&blob?.path())?;
    }
    Ok(())
}

fn walk(root: &Path, below: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let path = below.join(entry.file_name());
        if meta.is_dir() {
            walk(root, &path, entries)?;
        }
        entries.push(Entry {
            path,
            is_file: meta.is_file(),
            size: meta.len(),
            readable: true,
            mode: meta.mode(),
            dev_inode: (meta.dev(), meta.ino()),
            links: meta.nlink(),
        });
    }
    Ok(())
}

/// The Debian release of this machine; the stable one elsewhere.
fn suite() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)).map(|v| v.trim_matches('"').to_string())
    };
    match (field("ID="), field("VERSION_CODENAME=")) {
        (Some(id), Some(name)) if id == "debian" => name,
        _ => "trixie".into(),
    }
}

/// Runs a line of shell; its error is what it wrote to stderr.
pub fn shell(line: &str) -> Result<()> {
    let mut child = Command::new("bash")
        .args(["-o", "pipefail", "-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    if let Some(stderr) = child.stderr.as_mut() {
        stderr.read_to_string(&mut said)?;
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("'{line}' {status}: {}", said.trim()).into()) }
}
