//! How cost grows: synthetic trees of ten and a hundred times as many files, one folder of a million,
//! a file of 100 GB that is one hole, and very many layers. `compare --scale`.
//!
//! The trees are written as tar streams into sqfstar, so that no file system has to hold them; but for the
//! one folder.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use mosfs::internals::convert::{Effort, LowerEntry, Packing, TarLayer, convert_tar};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::format::Compression;
use mosfs::internals::image::verity::BLOCK_BYTES;
use mosfs::internals::progress::Progress;
use serde_json::{Value, json};

use crate::Result;
use crate::fixture::{new_layout, once, shell};
use crate::peers;
use crate::stats::Random;

/// A tree to be made.
struct Case {
    id: &'static str,
    title: &'static str,
    shape: Shape,
}

/// What a tree looks like.
#[derive(Clone, Copy)]
enum Shape {
    /// This many files of 64 bytes, 100 in a folder, 100 folders in a folder.
    Tree(u64),
    /// This many empty files in one folder.
    Folder(u64),
    /// One file of this many bytes, all hole but for its end.
    Sparse(u64),
    /// This many layers, each with ten files in a folder that all have and one in its own.
    Layers(u64),
}

const CASES: &[Case] = &[
    Case { id: "tree-20k", title: "20,000 files", shape: Shape::Tree(20_000) },
    Case { id: "tree-200k", title: "200,000 files", shape: Shape::Tree(200_000) },
    Case { id: "tree-2m", title: "2,000,000 files", shape: Shape::Tree(2_000_000) },
    Case { id: "folder-1m", title: "one folder of 1,000,000", shape: Shape::Folder(1_000_000) },
    Case { id: "sparse-100g", title: "a hole of 100 GB", shape: Shape::Sparse(100_000_000_000) },
    Case { id: "layers-100", title: "100 layers", shape: Shape::Layers(100) },
    Case { id: "layers-1000", title: "1,000 layers", shape: Shape::Layers(1000) },
];

/// Names looked up one by one, at the most.
const LOOKUPS: u64 = 10_000;
/// No more look-ups after this many seconds: in a folder of a million the kernel takes 0.1 s for one.
const LOOKUP_SECONDS: f64 = 20.0;
/// A walk is stopped after this many seconds: find looks each name up.
const WALK_SECONDS: u32 = 60;
/// What timeout(1) ends with when it had to stop the command.
const STOPPED: i32 = 124;

/// Bytes read of the file that is a hole.
const SPARSE_READ: u64 = 1 << 30;

/// Measures all cases, or those named; prints a table and writes `scale.json` into `output`.
pub fn run(dir: &Path, output: &Path, mosfs: &Path, only: &[String]) -> Result<()> {
    let scale = dir.join("scale");
    fs::create_dir_all(&scale)?;
    let scale = scale.canonicalize()?;
    let mnt = scale.join("mnt");
    fs::create_dir_all(&mnt)?;
    println!(
        "{:<26}{:<8}{:>10}{:>11}{:>11}{:>12}{:>13}{:>12}",
        "", "", "entries", "mount ms", "find s", "µs an entry", "µs a lookup", "anon. MB"
    );
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|case| only.is_empty() || only.iter().any(|id| id == case.id)) {
        let layout = scale.join(case.id);
        once(&layout, |to| make(case.shape, to))?;
        let ours = vec![
            mosfs.display().to_string(),
            "mount".into(),
            "--backend".into(),
            "fuse".into(),
            format!("oci:{}:t", layout.display()),
            mnt.display().to_string(),
        ];
        rows.push(one(case, "mosfs", &ours, &mnt)?);
        // The kernel has no merged view of its own to compare layers with.
        if !matches!(case.shape, Shape::Layers(_)) {
            let image = largest(&layout.join("blobs/sha256"))?;
            let kernel: Vec<String> = ["mount", "-t", "squashfs", "-o", "ro,loop"].map(String::from).to_vec();
            let kernel = [kernel, vec![image.display().to_string(), mnt.display().to_string()]].concat();
            rows.push(one(case, "kernel", &kernel, &mnt)?);
        }
    }
    let report = json!({"version": 1, "machine": crate::machine::describe(), "rows": rows});
    fs::write(output.join("scale.json"), format!("{report:#}\n"))?;
    Ok(())
}

/// Mounts, walks, looks up, and looks at the memory.
fn one(case: &Case, who: &str, mount: &[String], mnt: &Path) -> Result<Value> {
    let before = peers::fuse_servers();
    let began = Instant::now();
    if let Err(error) = peers::run(mount) {
        println!("{:<26}{who:<8}  refused: {error}", case.title);
        return Ok(json!({"case": case.id, "who": who, "refused": error.to_string()}));
    }
    let mounted = began.elapsed();
    let servers: Vec<u32> = peers::fuse_servers().into_iter().filter(|pid| !before.contains(pid)).collect();
    let result = work(case.shape, mnt);
    let anonymous: u64 = servers.iter().copied().filter_map(peers::anonymous_bytes).sum();
    shell(&format!("umount '{}'", mnt.display()))?;
    let (entries, find, lookup) = result.map_err(|e| format!("{}, {who}: {e}", case.id))?;
    println!(
        "{:<26}{who:<8}{entries:>10}{:>11.2}{:>11.3}{:>12.2}{:>13.2}{:>12.1}",
        case.title,
        mounted.as_secs_f64() * 1e3,
        find,
        find * 1e6 / entries as f64,
        lookup * 1e6,
        anonymous as f64 / 1e6
    );
    Ok(json!({
        "case": case.id, "who": who, "entries": entries, "mount_seconds": mounted.as_secs_f64(),
        "find_seconds": find, "lookup_seconds": lookup, "anonymous_bytes": anonymous,
    }))
}

/// Returns entries found (fewer than there are, where the walk was stopped), seconds of the walk, and seconds of one lookup (or of reading a GiB of a hole).
fn work(shape: Shape, mnt: &Path) -> Result<(u64, f64, f64)> {
    let began = Instant::now();
    let mut walk = Command::new("timeout");
    walk.arg(WALK_SECONDS.to_string()).arg("find").arg(mnt).args(["-printf", "%i %s %m\\n"]);
    let output = walk.stdin(Stdio::null()).output()?;
    let find = began.elapsed().as_secs_f64();
    let stopped = output.status.code() == Some(STOPPED);
    if !output.status.success() && !stopped {
        return Err(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("find failed").into());
    }
    let entries = output.stdout.iter().filter(|&&byte| byte == b'\n').count() as u64;
    let expected = match shape {
        Shape::Tree(files) => 1 + files + files / 100 + files.div_ceil(10_000),
        Shape::Folder(files) => 2 + files,
        Shape::Sparse(_) => 2,
        Shape::Layers(layers) => 2 + layers * 12,
    };
    if entries != expected && !stopped {
        return Err(format!("{entries} entries, expected {expected}").into());
    }
    let mut random = Random::new(11);
    let began = Instant::now();
    let each = match shape {
        Shape::Sparse(_) => {
            let mut file = fs::File::open(mnt.join("hole"))?;
            let read = io::copy(&mut io::Read::take(&mut file, SPARSE_READ), &mut io::sink())?;
            return if read == SPARSE_READ {
                Ok((entries, find, began.elapsed().as_secs_f64()))
            } else {
                Err(format!("{read} bytes of the hole, expected {SPARSE_READ}").into())
            };
        }
        Shape::Tree(files) | Shape::Folder(files) => files,
        Shape::Layers(layers) => layers,
    };
    let mut done = 0;
    while done < LOOKUPS && began.elapsed().as_secs_f64() < LOOKUP_SECONDS {
        done += 1;
        let n = random.below(each);
        let path = match shape {
            Shape::Tree(_) => tree_name(n),
            Shape::Folder(_) => folder_name(n),
            _ => PathBuf::from(format!("own-{n}/file")),
        };
        fs::symlink_metadata(mnt.join(&path)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok((entries, find, began.elapsed().as_secs_f64() / done as f64))
}

fn tree_name(n: u64) -> PathBuf {
    format!("d{:03}/d{:02}/file-{n}", n / 10_000, n / 100 % 100).into()
}

fn folder_name(n: u64) -> PathBuf {
    format!("all/file-{n:07}").into()
}

/// Makes a layout with the tag `t`.
fn make(shape: Shape, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let image = to.join("image");
    let images = match shape {
        Shape::Tree(files) => {
            sqfstar(&image, |tar| {
                for n in 0..files {
                    if n % 10_000 == 0 {
                        folder(tar, &format!("d{:03}", n / 10_000))?;
                    }
                    if n % 100 == 0 {
                        folder(tar, &format!("d{:03}/d{:02}", n / 10_000, n / 100 % 100))?;
                    }
                    file(tar, &tree_name(n), format!("{n:063}\n").as_bytes())?;
                }
                Ok(())
            })?;
            vec![image]
        }
        Shape::Folder(files) => {
            // From a real folder: sqfstar takes the square of the number of names for one folder.
            let dir = to.join("dir");
            fs::create_dir_all(dir.join("all"))?;
            for n in 0..files {
                fs::File::create(dir.join(folder_name(n)))?;
            }
            shell(&format!("mksquashfs '{}' '{}' {OPTIONS}", dir.display(), image.display()))?;
            fs::remove_dir_all(&dir)?;
            vec![image]
        }
        Shape::Sparse(bytes) => {
            let dir = to.join("dir");
            fs::create_dir(&dir)?;
            shell(&format!("truncate -s {} '{1}/hole' && echo end >>'{1}/hole'", bytes - 4, dir.display()))?;
            // Converted by mosfs: mksquashfs and sqfstar read all the zeros, which takes minutes.
            let tar = to.join("tar");
            shell(&format!("tar --sparse -C '{}' -cf '{}' .", dir.display(), tar.display()))?;
            convert(&tar, &image)?;
            fs::remove_dir_all(&dir)?;
            fs::remove_file(&tar)?;
            vec![image]
        }
        Shape::Layers(layers) => (0..layers)
            .map(|n| {
                let image = to.join(format!("image-{n}"));
                sqfstar(&image, |tar| {
                    folder(tar, "all")?;
                    for i in 0..10 {
                        file(tar, Path::new(&format!("all/file-{n}-{i}")), b"shared\n")?;
                    }
                    folder(tar, &format!("own-{n}"))?;
                    file(tar, Path::new(&format!("own-{n}/file")), b"own\n")
                })?;
                Ok(image)
            })
            .collect::<Result<_>>()?,
    };
    new_layout(to, &[("t", images)])
}

/// As in the comparison, but without the search for equal files, which takes the square of their number. (sqfstar
/// 4.5 does not read the number behind -Xcompression-level.)
const OPTIONS: &str = "-comp zstd -b 131072 -no-duplicates -no-progress -quiet";

fn sqfstar(
    image: &Path,
    write: impl FnOnce(&mut tar::Builder<BufWriter<std::process::ChildStdin>>) -> io::Result<()>,
) -> Result<()> {
    let mut child = Command::new("sqfstar")
        .args(OPTIONS.split(' '))
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut tar = tar::Builder::new(BufWriter::with_capacity(1 << 20, child.stdin.take().ok_or("no pipe")?));
    let written = write(&mut tar).and_then(|()| tar.into_inner()?.flush());
    let status = child.wait()?;
    written?;
    if status.success() { Ok(()) } else { Err(format!("sqfstar {status}").into()) }
}

fn convert(tar: &Path, image: &Path) -> Result<()> {
    let bytes = fs::read(tar)?;
    let layer = TarLayer {
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
        compression: Compression::None,
        diff_id: None,
    };
    let effort = Effort { threads: std::thread::available_parallelism()?, packing: Packing::default() };
    let file = fs::File::options().read(true).write(true).create_new(true).open(image)?;
    let made =
        convert_tar(&*bytes, &layer, &file, effort, &mut |_| Ok(LowerEntry::Nothing), &Progress::silent())?;
    // Without its hash tree: the layout's images are all sealed in one way.
    file.set_len(made.sealed.superblock.data_blocks * BLOCK_BYTES as u64)?;
    Ok(())
}

fn folder(tar: &mut tar::Builder<impl Write>, name: &str) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, name, io::empty())
}

fn file(tar: &mut tar::Builder<impl Write>, name: &Path, data: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(data.len() as u64);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, name, data)
}

fn largest(dir: &Path) -> Result<PathBuf> {
    let mut found: Option<(u64, PathBuf)> = None;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let size = entry.metadata()?.len();
        if found.as_ref().is_none_or(|(most, _)| size > *most) {
            found = Some((size, entry.path()));
        }
    }
    Ok(found.ok_or("an empty layout")?.1)
}
