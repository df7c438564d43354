//! Rows about whole systems: activating many targets that share a layer, and an update that changes 5 % of a system.
//!
//! ```text
//! DIR/targets/        keys/, store/, device/ with 50 targets installed, images/ with the same as tar layers (umoci)
//! DIR/update/         keys/, store/ with versions 1 and 2, device/ with version 1, images/ with tags v1 and v2,
//!                     v1/ a layout with v1 alone
//! ```
//!
//! Every target of the first has the same base and a layer of its own. The second has twenty layers of equal size; in
//! version 2 each file of one of them has changed.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::fixture::{Fixture, PRODUCT, build, once, shell};
use crate::peers;
use crate::rows::{Row, Unit, Who, row};

/// Targets of the system.
const TARGETS: usize = 50;
/// Size of the system that is updated, before compression.
const UPDATE_BYTES: u64 = 500_000_000;
/// Its layers, of which one changes.
const UPDATE_LAYERS: usize = 20;

const ACTIVATE: &str = "mosfs activate";
const BY_HAND: &str = "mount(8), a script";
const DISSECT: &str = "systemd-dissect, a script";
const UMOCI: &str = "umoci unpack";
const UPDATE: &str = "mosfs update";
const SKOPEO: &str = "skopeo copy";
const SKOPEO_UMOCI: &str = "skopeo, umoci unpack";

const fn program(ours: &'static str, base: Row) -> Row {
    Row { ours, who: Who::Programs, ..base }
}

/// The rows of this module.
pub const ROWS: &[Row] = &[
    program(ACTIVATE, row("activate1", "Activate 1 target", &[], ACTIVATED)),
    program(ACTIVATE, row("activate10", "Activate 10 targets", &[], ACTIVATED)),
    program(ACTIVATE, row("activate50", "Activate 50 targets", &[], ACTIVATED)),
    Row {
        unit: Unit::Megabytes,
        ..program(
            "50 targets",
            row(
                "activatemem",
                "Active targets, memory",
                &[],
                "Anonymous memory of all processes that serve the targets after mosfs activate over FUSE, with pages that they \
                 share counted once; the last bar is for one of 50.",
            ),
        )
    },
    Row {
        unit: Unit::Count,
        ..program(
            "50 targets",
            row(
                "activateproc",
                "Active targets, processes",
                &[],
                "Processes that serve the targets after mosfs activate over FUSE.",
            ),
        )
    },
    program(
        UPDATE,
        row(
            "update",
            "Update, 5\u{202f}% changed",
            &[],
            "A system of 500 MB in twenty layers, all of one of them changed, from a local layout: mosfs update (copied, every digest \
             and signature checked, ready for the next boot), skopeo copy (copied), and skopeo copy with umoci unpack (usable files).",
        ),
    ),
    Row {
        unit: Unit::Megabytes,
        ..program(
            UPDATE,
            row(
                "updatebytes",
                "Update, 5\u{202f}% changed, bytes",
                &[],
                "What that update adds on the disk of the device.",
            ),
        )
    },
];

const ACTIVATED: &str = "Targets that share a base layer. mosfs verifies the signature, compares the floor and mounts over FUSE; the scripts \
     mount each squashfs once and an overlay for each target, and verify nothing; umoci unpacks the same images from tar layers.";

/// Whether a row is one of these.
pub fn has(row: &Row) -> bool {
    ROWS.iter().any(|own| own.id == row.id)
}

/// Who takes part in it.
pub fn programs(row: &Row) -> &'static [&'static str] {
    match row.id {
        "activate50" => &[BY_HAND, DISSECT, ACTIVATE],
        "activatemem" => &["1 target", "10 targets", "50 targets", "each of 50"],
        "activateproc" => &["1 target", "10 targets", "50 targets"],
        "update" | "updatebytes" => &[SKOPEO, SKOPEO_UMOCI, UPDATE],
        _ => &[BY_HAND, DISSECT, UMOCI, ACTIVATE],
    }
}

/// One run. None where the program is not installed.
pub fn run(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    if row.id.starts_with("update") {
        let system = fixture.scratch().with_file_name("update");
        once(&system, |to| make_update(to, fixture, mosfs))?;
        let (seconds, bytes) = update(name, &system, &fixture.scratch(), mosfs)?;
        return Ok(Some(if row.id == "update" { seconds } else { bytes as f64 / 1e6 }));
    }
    let system = fixture.scratch().with_file_name("targets");
    once(&system, |to| make_targets(to, fixture, mosfs))?;
    let count = match (row.id, name) {
        ("activate1", _) | (_, "1 target") => 1,
        ("activate10", _) | (_, "10 targets") => 10,
        _ => TARGETS,
    };
    match name {
        BY_HAND => by_hand(&system, count, "mount -t squashfs -o ro,loop").map(Some),
        DISSECT if shell("command -v systemd-dissect").is_err() => Ok(None),
        DISSECT => by_hand(&system, count, "systemd-dissect --mount").map(Some),
        UMOCI => unpack(&system, count, &fixture.scratch()).map(Some),
        _ => {
            let active = activate(&system, count, mosfs)?;
            Ok(Some(match (row.id, name) {
                ("activatemem", "each of 50") => active.anonymous / 1e6 / count as f64,
                ("activatemem", _) => active.anonymous / 1e6,
                ("activateproc", _) => active.processes as f64,
                _ => active.seconds,
            }))
        }
    }
}

/// A command of mosfs on the device of a folder.
pub fn on_device(mosfs: &Path, system: &Path, device: &Path, args: &[String]) -> Result<()> {
    let output = Command::new(mosfs)
        .args(args)
        .env("MOSFS_SYSTEM", device.join("system"))
        .env("MOSFS_CONFIG", device.join("config"))
        .env("MOSFS_RUN", system.join("run"))
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("mosfs {args:?} {}: {}", output.status, said.trim()).into())
}

/// Words of a command.
pub fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| word.to_string()).collect()
}

fn target(number: usize) -> String {
    format!("t{number:02}")
}

/// Installs what was built there on the device there.
pub fn install(to: &Path, mosfs: &Path) -> Result<()> {
    let source = format!("oci:{}", to.join("store").display());
    let ca = to.join("keys/ca.pem").display().to_string();
    let args = words(&["install", &source, "--ca", &ca, "--product", PRODUCT, "--floor", "file"]);
    on_device(mosfs, to, &to.join("device"), &args)
}

fn make_targets(to: &Path, fixture: &Fixture, mosfs: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let dir = to.display();
    shell(&format!(
        "cd '{}' && tar -cf '{dir}/base.tar' usr/lib/python3*/asyncio usr/lib/python3*/email usr/lib/python3*/json",
        fixture.tree().display()
    ))?;
    shell(&format!("umoci init --layout '{dir}/images' && umoci new --image '{dir}/images:base'"))?;
    shell(&format!("umoci raw add-layer --image '{dir}/images:base' '{dir}/base.tar'"))?;
    let mut targets = String::new();
    for number in 1..=TARGETS {
        let name = target(number);
        let own = to.join("own").join(&name);
        fs::create_dir_all(&own)?;
        for file in 0..20 {
            fs::write(own.join(format!("file-{file}")), format!("{name} {file}\n"))?;
        }
        shell(&format!(
            "tar -cf '{dir}/own.tar' -C '{dir}/own' {name} && umoci tag --image '{dir}/images:base' {name} && \
             umoci raw add-layer --image '{dir}/images:{name}' '{dir}/own.tar'"
        ))?;
        writeln!(
            targets,
            "  {name}: {{url: \"oci:{dir}/images:{name}\", version: 1.0.0, service_type: fs-only, network: {{type: none}}}}"
        )?;
    }
    build(to, mosfs, 1, "", &targets)?;
    install(to, mosfs)
}

/// What an activation took.
struct Active {
    seconds: f64,
    anonymous: f64,
    processes: usize,
}

fn activate(system: &Path, count: usize, mosfs: &Path) -> Result<Active> {
    let names: Vec<String> = (1..=count).map(target).collect();
    let others = peers::fuse_servers();
    let mut args = words(&["activate", "--backend", "fuse", "--daemon", "fork", "--floor", "file"]);
    args.extend(names.iter().cloned());
    let began = Instant::now();
    let activated = on_device(mosfs, system, &system.join("device"), &args);
    let seconds = began.elapsed().as_secs_f64();
    let servers: Vec<u32> = peers::fuse_servers().into_iter().filter(|pid| !others.contains(pid)).collect();
    let anonymous = servers.iter().copied().filter_map(peers::anonymous_part_bytes).sum::<u64>() as f64;
    let folder = system.join("run/targets");
    let right = activated.and_then(|()| look(&folder, "", &names));
    for name in &names {
        let point = folder.join(name).display().to_string();
        let unmounted = peers::run(&[mosfs.display().to_string(), "umount".into(), point]);
        // What was not mounted says more by its own error.
        if right.is_ok() {
            unmounted?;
        }
    }
    right?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while servers.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
        if Instant::now() > deadline {
            return Err("a target's process has not ended 30 s after its mount".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(Active { seconds, anonymous, processes: servers.len() })
}

/// Reads a file of each target's own layer; a target is at `folder/NAME/below`.
fn look(folder: &Path, below: &str, names: &[String]) -> Result<()> {
    for name in names {
        let path = folder.join(name).join(below).join(name).join("file-7");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if text != format!("{name} 7\n") {
            return Err(format!("{} holds '{text}'", path.display()).into());
        }
    }
    Ok(())
}

/// The layers of a target in the store, bottom first, by their digests in hexadecimal.
fn layers(system: &Path, name: &str) -> Result<Vec<String>> {
    let store = system.join("store");
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let hex = |value: &Value| -> Result<String> {
        Ok(value["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).ok_or("no digest")?.to_string())
    };
    let index = json(store.join("index.json"))?;
    let begin = format!("mos/images/{name}:");
    let image = index["manifests"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|m| {
            m["annotations"]["org.opencontainers.image.ref.name"]
                .as_str()
                .is_some_and(|n| n.starts_with(&begin))
        })
        .ok_or_else(|| format!("no image of {name} in {}", store.display()))?;
    let manifest = json(store.join("blobs/sha256").join(hex(image)?))?;
    manifest["layers"].as_array().into_iter().flatten().map(hex).collect()
}

/// What somebody would write who mounts the same layers: each once, and an overlay for each target.
fn by_hand(system: &Path, count: usize, mount: &str) -> Result<f64> {
    let folder = system.join("by-hand");
    let blobs = system.join("device/system/store/blobs/sha256");
    let names: Vec<String> = (1..=count).map(target).collect();
    let (mut script, mut undo, mut mounted) = (String::from("set -e\n"), String::new(), Vec::new());
    for name in &names {
        let mut lower = Vec::new();
        for layer in layers(system, name)? {
            let at = folder.join(&layer);
            let at = at.display();
            if !mounted.contains(&layer) {
                writeln!(script, "mkdir -p '{at}'\n{mount} '{}' '{at}'", blobs.join(&layer).display())?;
                writeln!(undo, "umount '{at}'")?;
                mounted.push(layer);
            }
            lower.insert(0, at.to_string());
        }
        let at = folder.join(name);
        let at = at.display();
        writeln!(
            script,
            "mkdir -p '{at}'\nmount -t overlay -o 'ro,lowerdir={}' overlay '{at}'",
            lower.join(":")
        )?;
        undo.insert_str(0, &format!("umount '{at}'\n"));
    }
    let began = Instant::now();
    let done = shell(&script);
    let seconds = began.elapsed().as_secs_f64();
    let right = done.and_then(|()| look(&folder, "", &names));
    let undone = shell(&undo);
    right?;
    undone?;
    fs::remove_dir_all(&folder)?;
    Ok(seconds)
}

fn unpack(system: &Path, count: usize, scratch: &Path) -> Result<f64> {
    fresh(scratch)?;
    let names: Vec<String> = (1..=count).map(target).collect();
    let began = Instant::now();
    for name in &names {
        let image = format!("{}:{name}", system.join("images").display());
        peers::run(&words(&[
            "umoci",
            "unpack",
            "--image",
            &image,
            &scratch.join(name).display().to_string(),
        ]))?;
    }
    let seconds = began.elapsed().as_secs_f64();
    look(scratch, "rootfs", &names)?;
    fs::remove_dir_all(scratch)?;
    Ok(seconds)
}

fn fresh(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    Ok(fs::create_dir_all(dir)?)
}

/// Two versions of a system in twenty layers, and a device with the first.
fn make_update(to: &Path, fixture: &Fixture, mosfs: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let dir = to.display();
    let files: Vec<_> = fixture.entries.iter().filter(|e| e.is_file && e.size > 0).collect();
    let total = files.iter().map(|e| e.size).sum::<u64>().min(UPDATE_BYTES);
    let mut parts: Vec<Vec<&Path>> = vec![Vec::new(); UPDATE_LAYERS];
    let mut bytes = 0;
    for file in files {
        let part = (bytes * UPDATE_LAYERS as u64 / total) as usize;
        let Some(part) = parts.get_mut(part) else { break };
        part.push(&file.path);
        bytes += file.size;
    }
    shell(&format!("umoci init --layout '{dir}/images' && umoci new --image '{dir}/images:v1'"))?;
    for (number, part) in parts.iter().enumerate() {
        // The last layer is the one that changes; version 2 has all the others as they are.
        if number + 1 == UPDATE_LAYERS {
            shell(&format!("umoci tag --image '{dir}/images:v1' v2"))?;
        }
        let list: Vec<u8> = part
            .iter()
            .flat_map(|path| {
                use std::os::unix::ffi::OsStrExt;
                [path.as_os_str().as_bytes(), b"\0"].concat()
            })
            .collect();
        fs::write(to.join("list"), list)?;
        let tree = fixture.tree();
        shell(&format!("tar -cf '{dir}/layer.tar' -C '{}' --null -T '{dir}/list'", tree.display()))?;
        shell(&format!("umoci raw add-layer --image '{dir}/images:v1' '{dir}/layer.tar'"))?;
    }
    shell(&format!(
        "mkdir '{dir}/changed' && tar -C '{dir}/changed' -xf '{dir}/layer.tar' && \
         find '{dir}/changed' -type f -exec sh -c 'for f; do echo changed >>\"$f\"; done' sh {{}} + && \
         tar -cf '{dir}/layer.tar' -C '{dir}/changed' . && rm -r '{dir}/changed' && \
         umoci raw add-layer --image '{dir}/images:v2' '{dir}/layer.tar' && rm '{dir}/layer.tar' '{dir}/list'"
    ))?;
    shell(&format!("skopeo copy --insecure-policy 'oci:{dir}/images:v1' 'oci:{dir}/v1:v1'"))?;
    for version in [1, 2] {
        let target = format!(
            "  os: {{url: \"oci:{dir}/images:v{version}\", version: 1.0.{version}, service_type: fs-only, network: {{type: none}}}}\n"
        );
        build(to, mosfs, version, "", &target)?;
        if version == 1 {
            install(to, mosfs)?;
        }
    }
    Ok(())
}

/// Brings version 2 to a copy of the device with version 1: seconds, and bytes that its disk has more.
fn update(name: &str, system: &Path, scratch: &Path, mosfs: &Path) -> Result<(f64, u64)> {
    fresh(scratch)?;
    let device = scratch.join("device");
    let from = if name == UPDATE { system.join("device") } else { system.join("v1") };
    shell(&format!("cp -a '{}' '{}' && sync", from.display(), device.display()))?;
    let before = bytes_below(scratch)?;
    let began = Instant::now();
    if name == UPDATE {
        let source = format!("oci:{}", system.join("store").display());
        on_device(mosfs, system, &device, &words(&["update", &source, "--floor", "file"]))?;
    } else {
        let source = format!("oci:{}:v2", system.join("images").display());
        let image = format!("{}:v2", device.display());
        peers::run(&words(&["skopeo", "copy", "--insecure-policy", &source, &format!("oci:{image}")]))?;
        if name == SKOPEO_UMOCI {
            let to = scratch.join("unpacked").display().to_string();
            peers::run(&words(&["umoci", "unpack", "--image", &image, &to]))?;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let bytes = bytes_below(scratch)?.saturating_sub(before);
    fs::remove_dir_all(scratch)?;
    Ok((seconds, bytes))
}

/// The sizes of all files below a folder.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let (entry, meta) = entry.and_then(|entry| entry.metadata().map(|meta| (entry, meta)))?;
        bytes += if meta.is_dir() { bytes_below(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}
