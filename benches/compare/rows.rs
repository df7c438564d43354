//! The rows of the comparison: what is done, what it means, and what mosfs wants to reach.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Instant;

use mosfs::internals::image::verity::{Geometry, Tree};
use mosfs::internals::progress::Progress;

use crate::Result;
use crate::fixture::{Entry, Fixture, shell};
use crate::peers::{self, Peer};
use crate::work;

/// What the numbers of a row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Wall time; less is better.
    Seconds,
    /// CPU time of the reader and of the file system's own process; less is better.
    CpuSeconds,
    /// Reads a second; more is better.
    PerSecond,
    /// Megabytes (10^6) of memory or of files; less is better.
    Megabytes,
    /// How many; less is better.
    Count,
    /// A part of a hundred; more is better.
    Percent,
}

impl Unit {
    /// Whether more is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::Percent)
    }
}

/// How the goal of a row is put.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    /// Whose figure it is about; none for the row's own.
    pub of: Option<&'static str>,
    /// The peer that it is measured by; none for an absolute limit.
    pub against: Option<&'static str>,
    /// The ratio to that peer, or the absolute value: at most this, or at least where more is better.
    pub limit: f64,
}

/// Who takes part in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// All peers whose line does not name rows, and those that name this one.
    All,
    /// Only those that name this row.
    Named,
    /// Only those that name this row, and mosfs itself.
    NamedAndOurs,
    /// Commands that are no file systems, and are known here.
    Programs,
}

/// A row of the comparison.
pub struct Row {
    /// Its name on the command line.
    pub id: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// What is measured, for a reader of the report.
    pub text: &'static str,
    /// The unit.
    pub unit: Unit,
    /// Whose figure the goals are about.
    pub ours: &'static str,
    /// The goals.
    pub goals: &'static [Goal],
    /// Who takes part.
    pub who: Who,
    /// Runs for each one that the user asks for: more where a run is short.
    pub times: usize,
}

/// The peer that is the product.
pub const OURS: &str = "mosfs";
/// The peer that the ratios are to.
pub const KERNEL: &str = "kernel squashfs";
/// The peer that layers in lz4 are measured by.
pub const KERNEL_EROFS: &str = "kernel erofs";
/// The other peers that goals speak of.
pub const SQUASHFUSE: &str = "squashfuse_ll";
/// The second reader of erofs in user space.
pub const EROFSFUSE: &str = "erofsfuse";
/// The product without privilege.
pub const USER: &str = "mosfs, user";
const SQUASHFUSE_USER: &str = "squashfuse_ll, user";
const EROFSFUSE_USER: &str = "erofsfuse, user";

/// A goal for the row's own figure beside another peer.
pub const fn beside(peer: &'static str, limit: f64) -> Goal {
    Goal { of: None, against: Some(peer), limit }
}

/// A limit that depends on no peer.
pub const fn at_most(limit: f64) -> Goal {
    Goal { of: None, against: None, limit }
}

/// The row that is bound to one core.
pub const ONE_CORE: &str = "onecore";

const fn kernel(limit: f64) -> Goal {
    beside(KERNEL, limit)
}

const fn user(limit: f64) -> Goal {
    Goal { of: Some(USER), against: Some(KERNEL), limit }
}

/// The goals beside the readers in user space, for root and for a user: half and 0.6 of their time.
const fn fuse(which: usize) -> Goal {
    [
        beside(SQUASHFUSE, 0.5),
        beside(EROFSFUSE, 0.5),
        Goal { of: Some(USER), against: Some(SQUASHFUSE_USER), limit: 0.6 },
        Goal { of: Some(USER), against: Some(EROFSFUSE_USER), limit: 0.6 },
    ][which]
}

/// A goal for layers in lz4, beside the kernel's erofs.
const fn lz4(limit: f64) -> Goal {
    Goal { of: Some("mosfs lz4"), against: Some(KERNEL_EROFS), limit }
}

/// The same as reads per second: twice theirs, and 1/0.6.
const fn fuse_rate(which: usize) -> Goal {
    let Goal { of, against, limit } = fuse(which);
    Goal { of, against, limit: 1.0 / limit }
}

/// A row of wall time in which all peers take part.
pub const fn row(id: &'static str, title: &'static str, goals: &'static [Goal], text: &'static str) -> Row {
    Row { id, title, text, unit: Unit::Seconds, ours: OURS, goals, who: Who::All, times: 1 }
}

/// The rows of this module, in the order of the report.
pub const ROWS: &[Row] = &[
    Row {
        times: 4,
        ..row(
            "start",
            "Start to first read",
            &[kernel(0.85)],
            "From the start of the mount command (mount(8) for the kernel's) until the first bytes of a file were read.",
        )
    },
    row(
        "find",
        "find",
        &[kernel(0.40), user(0.52), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "find -printf with size, mode, owner and time of every entry. Fresh mount, image in the page cache, as in all rows.",
    ),
    row(
        "ls",
        "ls -lR",
        &[kernel(0.65), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "ls -lR, which also asks for extended attributes.",
    ),
    row(
        "read1",
        "Read everything, 1 reader",
        &[kernel(0.40), user(0.70), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "Every regular file from begin to end, in the order of their paths.",
    ),
    row(
        "read2",
        "Read everything, 2 readers",
        &[kernel(0.65), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "The same with two threads, each taking the next file.",
    ),
    row(
        "read64",
        "Read everything, 64 readers",
        &[],
        "The same with 64 threads: more readers than cores and than threads of the file system.",
    ),
    row(
        ONE_CORE,
        "Read everything, on 1 core",
        &[],
        "One reader, with the mount, its process and the reader bound to one core (taskset).",
    ),
    row(
        "large1",
        "Large files, 1 reader",
        &[kernel(0.52), user(0.52), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "Every file of 1 MiB or more.",
    ),
    row(
        "large2",
        "Large files, 2 readers",
        &[kernel(0.60), user(0.60), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "The same with two threads.",
    ),
    row(
        "findtar",
        "find, then tar",
        &[kernel(0.30), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "find as above, then tar of the whole tree into a pipe; the time of both.",
    ),
    row(
        "small",
        "Small files in open order",
        &[kernel(0.62), user(0.95), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "8,000 files of at most 32 KiB: open, read, close, one after the other.",
    ),
    Row {
        unit: Unit::PerSecond,
        ..row(
            "rand1",
            "Random 4 KiB reads, 1 job",
            &[kernel(1.5), user(1.4), fuse_rate(0), fuse_rate(1), fuse_rate(2), fuse_rate(3), lz4(1.5)],
            "8,192 reads at random places of the large files; more is better.",
        )
    },
    Row {
        unit: Unit::PerSecond,
        ..row(
            "rand4",
            "Random 4 KiB reads, 4 jobs",
            &[kernel(1.5), user(1.4), fuse_rate(0), fuse_rate(1), fuse_rate(2), fuse_rate(3), lz4(0.8)],
            "The same reads by four threads; more is better.",
        )
    },
    row(
        "warmsmall",
        "Read again, small files",
        &[kernel(1.2), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.2)],
        "The small files once more, with their data in the page cache.",
    ),
    row(
        "warmlarge",
        "Read again, large files",
        &[kernel(1.0), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.2)],
        "The large files once more, with their data in the page cache.",
    ),
    row(
        "python",
        "Python starts in a chroot",
        &[kernel(0.72), user(0.85), fuse(0), fuse(1), fuse(2), fuse(3), lz4(1.0)],
        "chroot, python3 -c 'import json,ssl,asyncio,email'.",
    ),
    Row {
        unit: Unit::CpuSeconds,
        ..row(
            "cpu",
            "CPU, read everything",
            &[kernel(1.0), user(1.1)],
            "CPU time of a reader of everything and of the file system's process. What kernel threads do for a loop device is not counted.",
        )
    },
    Row {
        ours: "mosfs, 20 layers",
        who: Who::Named,
        ..row(
            "layers",
            "20 layers against 1, find",
            &[beside("mosfs, 1 layer", 1.4)],
            "The same tree cut into twenty layers, each with files in every folder, against one layer.",
        )
    },
    Row {
        unit: Unit::CpuSeconds,
        who: Who::NamedAndOurs,
        // The difference of two sums that are nearly the same.
        times: 4,
        ..row(
            "verifycpu",
            "CPU for verification",
            &[beside("mosfs unverified", 1.0 / (1.0 - 0.08))],
            "CPU time of a cold read of everything, with verification and without; at most 8\u{202f}% of it may be verification.",
        )
    },
    Row {
        unit: Unit::Megabytes,
        ..row(
            "rss",
            "Anonymous memory",
            &[at_most(16.0)],
            "Of the file system's process after find, ls, a read of everything and random reads. The kernel's own have none.",
        )
    },
    Row {
        unit: Unit::Megabytes,
        who: Who::Programs,
        ..row(
            "bytes",
            "Bytes",
            &[lz4(0.85)],
            "What the images take: one image for the others, three layers with their hash trees for mosfs.",
        )
    },
    Row {
        ours: "mosfs build",
        who: Who::Programs,
        ..row(
            "build",
            "Build three layers",
            &[beside("sqfstar", 1.15)],
            "Three tar layers (gzip) to squashfs, by sqfstar alone, and by mosfs build with verity, digests, store and signature.",
        )
    },
    Row {
        ours: "mosfs verity tree",
        who: Who::Programs,
        times: 2,
        ..row(
            "tree",
            "Hash tree",
            &[beside("veritysetup format", 1.0 / 1.5)],
            "The dm-verity tree of the squashfs image; its bytes are the same.",
        )
    },
];

/// The programs of the rows that compare no file systems.
pub fn programs(row: &Row) -> &'static [&'static str] {
    match row.id {
        "build" => &["sqfstar", "mosfs build"],
        "bytes" => &[KERNEL, KERNEL_EROFS, OURS, "mosfs lz4"],
        "tree" => &["veritysetup format", "mosfs verity tree"],
        _ => &[],
    }
}

/// The tree's files as the rows want them.
pub struct Files<'a> {
    all: Vec<&'a Entry>,
    large: Vec<&'a Entry>,
    small: Vec<&'a Entry>,
    bytes: u64,
    denied: usize,
}

impl<'a> Files<'a> {
    /// Sorts the entries of the tree; those that the reader may not read are left out.
    pub fn of(entries: &'a [Entry]) -> Self {
        let all: Vec<&Entry> = entries.iter().filter(|e| e.is_file && e.readable).collect();
        let large = all.iter().copied().filter(|e| e.size >= 1 << 20).collect();
        let small = all.iter().copied().filter(|e| (1..=32 * 1024).contains(&e.size)).take(8000).collect();
        let bytes = all.iter().map(|e| e.size).sum();
        let denied = entries.iter().filter(|e| !e.readable).count();
        Self { all, large, small, bytes, denied }
    }
}

impl<'a> Files<'a> {
    /// The small files of the row about them.
    pub fn small(&self) -> &[&'a Entry] {
        &self.small
    }
}

/// Reads of the random rows, over all jobs.
const RANDOM_READS: usize = 8192;

/// One run of a row on a peer, which is mounted for it alone. None where the row does not apply.
pub fn measure(row: &Row, peer: &Peer, mnt: &Path, files: &Files) -> Result<Option<f64>> {
    let before = peers::fuse_servers();
    let began = Instant::now();
    peer.mount(mnt)?;
    let tree = peer.tree(mnt);
    let result = if row.id == "start" {
        work::first_read(&tree.join("usr/bin/env")).map(|()| Some(began.elapsed().as_secs_f64()))
    } else {
        let own: Vec<u32> = peers::fuse_servers().into_iter().filter(|pid| !before.contains(pid)).collect();
        on_mount(row, &tree, files, &own)
    };
    // Unmounted in any case; the first error is the one to tell.
    let unmounted = peer.unmount(mnt);
    let value = result.map_err(|e| format!("{}, {}: {e}", row.id, peer.name))?;
    unmounted?;
    Ok(value)
}

fn on_mount(row: &Row, tree: &Path, files: &Files, servers: &[u32]) -> Result<Option<f64>> {
    let began = Instant::now();
    match row.id {
        "find" | "layers" => work::find(tree, files.denied)?,
        "ls" => work::ls(tree, files.denied)?,
        "read1" | ONE_CORE => work::read(tree, &files.all, 1)?,
        "read2" => work::read(tree, &files.all, 2)?,
        "read64" => work::read(tree, &files.all, 64)?,
        "large1" => work::read(tree, &files.large, 1)?,
        "large2" => work::read(tree, &files.large, 2)?,
        "findtar" => {
            work::find(tree, files.denied)?;
            work::tar(tree, files.bytes, files.denied)?;
        }
        "small" => work::read(tree, &files.small, 1)?,
        "rand1" | "rand4" => {
            let jobs = if row.id == "rand1" { 1 } else { 4 };
            work::random(tree, &files.large, jobs, RANDOM_READS)?;
            return Ok(Some(RANDOM_READS as f64 / began.elapsed().as_secs_f64()));
        }
        "warmsmall" | "warmlarge" => {
            let list = if row.id == "warmsmall" { &files.small } else { &files.large };
            work::read(tree, list, 1)?;
            let again = Instant::now();
            work::read(tree, list, 1)?;
            return Ok(Some(again.elapsed().as_secs_f64()));
        }
        "python" => work::python(tree)?,
        "cpu" | "verifycpu" => {
            let cpu = || {
                servers
                    .iter()
                    .copied()
                    .chain([std::process::id()])
                    .filter_map(peers::cpu_seconds)
                    .sum::<f64>()
            };
            let before = cpu();
            work::read(tree, &files.all, 1)?;
            return Ok(Some(cpu() - before));
        }
        "rss" => {
            if servers.is_empty() {
                return Ok(None);
            }
            work::find(tree, files.denied)?;
            work::ls(tree, files.denied)?;
            work::read(tree, &files.all, 2)?;
            work::random(tree, &files.large, 4, RANDOM_READS)?;
            let bytes: u64 = servers.iter().copied().filter_map(peers::anonymous_bytes).sum();
            return Ok(Some(bytes as f64 / 1e6));
        }
        other => return Err(format!("nothing is known of row '{other}'").into()),
    }
    Ok(Some(began.elapsed().as_secs_f64()))
}

/// The size of a peer's image, in megabytes.
fn image_size(name: &str, fixture: &Fixture) -> Result<f64> {
    let (layout, tag) = match name {
        KERNEL => return Ok(fs::metadata(fixture.squashfs()?)?.len() as f64 / 1e6),
        KERNEL_EROFS => return Ok(fs::metadata(fixture.erofs()?)?.len() as f64 / 1e6),
        OURS => (fixture.layers()?, "three"),
        _ => (fixture.lz4_layers()?, "three"),
    };
    let index = json_file(&layout.join("index.json"))?;
    let named = |m: &&serde_json::Value| m["annotations"]["org.opencontainers.image.ref.name"] == tag;
    let image = index["manifests"].as_array().into_iter().flatten().find(named).ok_or("no such tag")?;
    let manifest = json_file(&blob(&layout, &image["digest"])?)?;
    let sizes =
        manifest["layers"].as_array().into_iter().flatten().filter_map(|layer| layer["size"].as_u64());
    Ok(sizes.sum::<u64>() as f64 / 1e6)
}

/// One run of a program of a row that compares no file systems.
pub fn run_program(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    if row.id == "bytes" {
        return image_size(name, fixture).map(Some);
    }
    let scratch = fixture.scratch();
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    fs::create_dir_all(&scratch)?;
    let dir = scratch.display();
    let seconds = match name {
        "sqfstar" => {
            // The layers of the image as they are, gzip and all, which is what mosfs build gets.
            let tars = fixture.tar_layout()?;
            let index: serde_json::Value = json_file(&tars.join("index.json"))?;
            let manifest = blob(&tars, &index["manifests"][0]["digest"])?;
            let manifest: serde_json::Value = json_file(&manifest)?;
            let mut line = String::from("true");
            for (number, layer) in manifest["layers"].as_array().into_iter().flatten().enumerate() {
                let layer = blob(&tars, &layer["digest"])?;
                line += &format!(
                    " && gzip -dc '{}' | sqfstar -comp zstd -b 131072 -no-progress -quiet '{dir}/{number}.img'",
                    layer.display()
                );
            }
            let began = Instant::now();
            shell(&line)?;
            began.elapsed()
        }
        "mosfs build" => {
            let product = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
            let manifest = format!(
                "version: 1\nproduct: {product}\ntargets:\n  bench:\n    url: \"oci:{}:three\"\n    version: 1.0.0\n    service_type: hostfs\n    network: {{type: host}}\n",
                fixture.tar_layout()?.display()
            );
            fs::write(scratch.join("import.yaml"), manifest)?;
            let mosfs = mosfs.display();
            shell(&format!("'{mosfs}' keys generate '{dir}/keys' --product {product}"))?;
            let began = Instant::now();
            shell(&format!(
                "'{mosfs}' build '{dir}/import.yaml' --store '{dir}/store' --key '{dir}/keys/signer.key' --cert '{dir}/keys/signer.pem'"
            ))?;
            began.elapsed()
        }
        "veritysetup format" => {
            let image = fixture.squashfs()?;
            let began = Instant::now();
            shell(&format!(
                "veritysetup format '{}' '{dir}/tree' --salt={}",
                image.display(),
                "00".repeat(32)
            ))?;
            began.elapsed()
        }
        "mosfs verity tree" => {
            let image = File::open(fixture.squashfs()?)?;
            let geometry = Geometry::new(image.metadata()?.len())?;
            let threads = thread::available_parallelism()?;
            let began = Instant::now();
            let tree = Tree::build(
                &image,
                &geometry,
                &[0; 32],
                threads,
                &Progress::silent().task("hash", "image", None),
            )?;
            // Where veritysetup writes it, this writes it too.
            fs::write(scratch.join("tree"), &tree.bytes)?;
            began.elapsed()
        }
        other => return Err(format!("nothing is known of the program '{other}'").into()),
    };
    fs::remove_dir_all(&scratch)?;
    Ok(Some(seconds.as_secs_f64()))
}

fn json_file(path: &Path) -> Result<serde_json::Value> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn blob(layout: &Path, digest: &serde_json::Value) -> Result<std::path::PathBuf> {
    let hex =
        digest.as_str().and_then(|d| d.strip_prefix("sha256:")).ok_or("a descriptor without a digest")?;
    Ok(layout.join("blobs/sha256").join(hex))
}
