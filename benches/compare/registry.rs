//! Rows about images of a registry: how soon a program runs whose image is not here yet, and what a mount that fetched
//! its image costs once all of it is here.
//!
//! ```text
//! DIR/registry/           the storage of a docker-registry: bench/plain and bench/listed, the three layers that mosfs
//!                         mounts; bench/tar, the same as tar layers
//! DIR/scratch/            a store and a folder to mount at, for each run anew
//! ```
//!
//! `bench/listed` has the list of what the program reads, as `mosfs trace --push` puts it there. The registry is behind
//! a link of 100 Mbit/s and 20 ms where a row is about the network ([`crate::link`]).

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::fixture::{Entry, Fixture, once, shell, warm_file};
use crate::link::Link;
use crate::peers;
use crate::rows::{Goal, Row, Unit, Who, beside, row};
use crate::work;

const LISTED: &str = "mosfs mount, with a list";
const PLAIN: &str = "mosfs mount";
const PULLED: &str = "mosfs pull, then mount";
const SKOPEO: &str = "skopeo copy, umoci unpack";
const LINK: &str = "the link alone";
const ORDINARY: &str = "an ordinary mount";
const COMPLETED: &str = "the mount that fetched it";
const AGAIN: &str = "mounted anew";

/// What the rows about the network run.
const PYTHON: &str = "import json; print(1)";
/// How long anything here may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(600);

const fn limit(of: &'static str, limit: f64) -> Goal {
    Goal { of: Some(of), against: None, limit }
}

/// The rows of this module.
pub const ROWS: &[Row] = &[
    Row {
        ours: PLAIN,
        who: Who::Programs,
        ..row(
            "registry",
            "Registry to first line of Python",
            &[
                limit(LISTED, 1.0),
                limit(PLAIN, 2.6),
                Goal { of: Some(PULLED), against: Some(LINK), limit: 1.05 },
            ],
            "From an empty store until chroot, python3 -c 'import json; print(1)' has printed, with the image in a registry behind \
             100 Mbit/s and 20 ms. The link alone is the time of one plain download of the same layers.",
        )
    },
    Row {
        unit: Unit::Megabytes,
        ours: PLAIN,
        who: Who::Programs,
        ..row(
            "registrybytes",
            "Registry to first line, bytes",
            &[limit(LISTED, 8.0), limit(PLAIN, 16.0)],
            "What the registry has sent until then.",
        )
    },
    Row {
        ours: COMPLETED,
        who: Who::Programs,
        times: 2,
        ..row(
            "lazyread",
            "Read everything, fetched image",
            &[beside(ORDINARY, 1.03), Goal { of: Some(AGAIN), against: Some(ORDINARY), limit: 1.03 }],
            "Every regular file once, by one reader, once all of the image is here: through the mount that has fetched it, through a \
             new mount of the same reference, and through an ordinary mount of the same blobs.",
        )
    },
];

/// Whether a row is one of these.
pub fn has(row: &Row) -> bool {
    ROWS.iter().any(|own| own.id == row.id)
}

/// Who takes part in it.
pub fn programs(row: &Row) -> &'static [&'static str] {
    match row.id {
        "registry" => &[LISTED, PLAIN, PULLED, LINK, SKOPEO],
        "registrybytes" => &[LISTED, PLAIN, PULLED, SKOPEO],
        _ => &[ORDINARY, COMPLETED, AGAIN],
    }
}

/// What runs of the first row have sent, which the second one reports.
static SENT: Mutex<Vec<(String, f64)>> = Mutex::new(Vec::new());

/// One run.
pub fn run(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    let home = fixture.scratch().with_file_name("registry");
    once(&home, |to| make(to, fixture, mosfs))?;
    if row.id == "lazyread" {
        return read_all(name, &home, fixture, mosfs).map(Some);
    }
    if row.id == "registrybytes" {
        let mut sent = SENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = sent.iter().position(|(known, _)| known == name) {
            return Ok(Some(sent.remove(at).1));
        }
    }
    let (seconds, megabytes) = first_line(name, &home, fixture, mosfs)?;
    if row.id == "registrybytes" {
        return Ok(Some(megabytes));
    }
    SENT.lock().unwrap_or_else(PoisonError::into_inner).push((name.into(), megabytes));
    Ok(Some(seconds))
}

/// docker-registry on a folder; it ends when it is dropped.
struct Registry {
    child: Child,
    address: SocketAddr,
}

impl Registry {
    fn start(storage: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = storage.join("config.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: \"{}\"}}\n\
                 http:\n  addr: {address}\n  secret: s\n",
                storage.join("data").display()
            ),
        )?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot run docker-registry: {e}"))?;
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            if child.try_wait()?.is_some() || Instant::now() > deadline {
                return Err("docker-registry does not start".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { child, address })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Puts the images and the list into a registry.
fn make(to: &Path, fixture: &Fixture, mosfs: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let registry = Registry::start(to)?;
    let copy = |from: &Path, name: &str| {
        shell(&format!(
            "skopeo copy --insecure-policy --dest-tls-verify=false 'oci:{}:three' 'docker://{}/bench/{name}:three'",
            from.display(),
            registry.address
        ))
    };
    copy(&fixture.layers()?, "plain")?;
    copy(&fixture.layers()?, "listed")?;
    copy(&fixture.tar_layout()?, "tar")?;
    shell(&format!(
        "'{}' trace 'docker://{}/bench/listed:three' --store '{}' --output '{}' --push --chroot -- /usr/bin/python3 -c '{PYTHON}'",
        mosfs.display(),
        registry.address,
        to.join("trace-store").display(),
        to.join("list").display()
    ))?;
    fs::remove_dir_all(to.join("trace-store"))?;
    Ok(())
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| word.to_string()).collect()
}

/// A mount of mosfs that is undone when it is dropped, whatever else has failed. Its process has ended then: it
/// writes to the store as long as it lives.
struct Mounted<'a> {
    mosfs: &'a Path,
    at: &'a Path,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let pid = status(self.mosfs, self.at).ok().and_then(|own| own["daemon"]["pid"].as_u64());
        let _ = shell(&format!("umount '{0}' || umount -l '{0}'", self.at.display()));
        let deadline = Instant::now() + PATIENCE;
        while pid.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()) && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Empty folders: a store, and one to mount at.
fn fresh(fixture: &Fixture) -> Result<(PathBuf, PathBuf)> {
    let scratch = fixture.scratch();
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    let (store, mnt) = (scratch.join("store"), scratch.join("mnt"));
    fs::create_dir_all(&mnt)?;
    Ok((store, mnt))
}

/// The command that mounts an image of a registry, with what it fetches in `store`.
fn mount(mosfs: &Path, store: &Path, source: &str, mnt: &Path) -> Vec<String> {
    let (mosfs, store, mnt) = (mosfs.to_string_lossy(), store.to_string_lossy(), mnt.to_string_lossy());
    words(&[&mosfs, "mount", "--backend", "fuse", "--store", &store, source, &mnt])
}

/// From an empty store to the first line that the program prints: seconds, and megabytes that came.
fn first_line(name: &str, home: &Path, fixture: &Fixture, mosfs: &Path) -> Result<(f64, f64)> {
    let (store, mnt) = fresh(fixture)?;
    let registry = Registry::start(home)?;
    let link = Link::to(registry.address)?;
    let source = |image: &str| format!("docker://{}/bench/{image}:three", link.address());
    let image = format!("oci:{}:bench/plain:three", store.display());
    let mosfs_is = mosfs.display().to_string();
    let mut root = mnt.clone();
    let mut mounted = None;
    let layers = layers(fixture)?;
    let began = Instant::now();
    match name {
        LISTED | PLAIN => {
            let from = source(if name == LISTED { "listed" } else { "plain" });
            peers::run(&mount(mosfs, &store, &from, &mnt))?;
            mounted = Some(Mounted { mosfs, at: &mnt });
        }
        PULLED => {
            let into = store.display().to_string();
            peers::run(&words(&[&mosfs_is, "pull", "--image", &source("plain"), "--store", &into]))?;
            peers::run(&words(&[
                &mosfs_is,
                "mount",
                "--backend",
                "fuse",
                &image,
                &mnt.display().to_string(),
            ]))?;
            mounted = Some(Mounted { mosfs, at: &mnt });
        }
        SKOPEO => {
            let layout = format!("{}:three", store.display());
            peers::run(&words(&[
                "skopeo",
                "copy",
                "--insecure-policy",
                "--src-tls-verify=false",
                &source("tar"),
                &format!("oci:{layout}"),
            ]))?;
            let to = mnt.join("bundle");
            peers::run(&words(&["umoci", "unpack", "--image", &layout, &to.display().to_string()]))?;
            root = to.join("rootfs");
        }
        LINK => {
            for blob in &layers {
                download(link.address(), blob)?;
            }
            return Ok((began.elapsed().as_secs_f64(), link.sent() as f64 / 1e6));
        }
        other => return Err(format!("nothing is known of '{other}'").into()),
    }
    let mut python = print_one(&root)?;
    let result = (began.elapsed().as_secs_f64(), link.sent() as f64 / 1e6);
    python.wait()?;
    drop(mounted);
    Ok(result)
}

/// Runs the program in a root folder until it has printed its line.
fn print_one(root: &Path) -> Result<Child> {
    let mut child = Command::new("chroot")
        .arg(root)
        .args(["/usr/bin/python3", "-c", PYTHON])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().ok_or("python3 has no output")?;
    BufReader::new(stdout).read_line(&mut line)?;
    match line.as_str() {
        "1\n" => Ok(child),
        _ => Err(format!("python3 {} and printed '{line}'", child.wait()?).into()),
    }
}

/// Path and size of the image's layers in the registry.
fn layers(fixture: &Fixture) -> Result<Vec<(String, u64)>> {
    let layout = fixture.layers()?;
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let index = json(layout.join("index.json"))?;
    let named = |manifest: &&Value| {
        manifest["annotations"]["org.opencontainers.image.ref.name"].as_str() == Some("three")
    };
    let image = index["manifests"].as_array().into_iter().flatten().find(named).ok_or("no image `three`")?;
    let hex = image["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).ok_or("no digest")?;
    let manifest = json(layout.join("blobs/sha256").join(hex))?;
    let layer = |layer: &Value| -> Result<(String, u64)> {
        let digest = layer["digest"].as_str().ok_or("no digest")?;
        Ok((format!("/v2/bench/plain/blobs/{digest}"), layer["size"].as_u64().ok_or("no size")?))
    };
    manifest["layers"].as_array().into_iter().flatten().map(layer).collect()
}

/// One plain request for a blob, whose bytes are thrown away.
fn download(address: SocketAddr, (path, size): &(String, u64)) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let (mut buffer, mut bytes) = (vec![0; 64 << 10], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => bytes += count as u64,
        }
    }
    // The head of the answer comes too.
    if bytes < *size { Err(format!("{path}: {bytes} bytes of {size}").into()) } else { Ok(()) }
}

/// Reads everything once all of the image is here.
fn read_all(name: &str, home: &Path, fixture: &Fixture, mosfs: &Path) -> Result<f64> {
    let (store, mnt) = fresh(fixture)?;
    let registry = Registry::start(home)?;
    let reference = format!("docker://{}/bench/plain:three", registry.address);
    peers::run(&mount(mosfs, &store, &reference, &mnt))?;
    let mut mounted = Some(Mounted { mosfs, at: &mnt });
    // Whole as a blob, and known to be so by the daemon: its state is in `mosfs status`.
    let deadline = Instant::now() + PATIENCE;
    while !is_complete(mosfs, &mnt)? {
        if Instant::now() > deadline {
            return Err("the image does not become complete".into());
        }
        thread::sleep(Duration::from_millis(50));
    }
    if name != COMPLETED {
        mounted.take();
        let source = match name {
            AGAIN => reference,
            _ => format!("oci:{}:bench/plain:three", store.display()),
        };
        let command = match name {
            AGAIN => mount(mosfs, &store, &source, &mnt),
            _ => words(&[
                &mosfs.to_string_lossy(),
                "mount",
                "--backend",
                "fuse",
                &source,
                &mnt.to_string_lossy(),
            ]),
        };
        peers::run(&command)?;
        mounted = Some(Mounted { mosfs, at: &mnt });
    }
    for blob in fs::read_dir(store.join("blobs/sha256"))? {
        warm_file(&blob?.path())?;
    }
    let files: Vec<&Entry> = fixture.entries.iter().filter(|entry| entry.is_file).collect();
    let began = Instant::now();
    work::read(&mnt, &files, 1)?;
    let seconds = began.elapsed().as_secs_f64();
    drop(mounted);
    Ok(seconds)
}

/// What `mosfs status` says of a mount.
fn status(mosfs: &Path, mnt: &Path) -> Result<Value> {
    let output = Command::new(mosfs).args(["status", "--json", "--floor", "file"]).output()?;
    let all: Value = serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("mosfs status: {e}: {}", String::from_utf8_lossy(&output.stderr)))?;
    let mounts = all["mounts"].as_array().cloned().unwrap_or_default();
    let own = mounts.into_iter().find(|one| one["target"].as_str().map(Path::new) == Some(mnt));
    own.ok_or_else(|| format!("mosfs status does not know {}", mnt.display()).into())
}

/// Whether every layer of a mount is a blob of its store now.
fn is_complete(mosfs: &Path, mnt: &Path) -> Result<bool> {
    let own = status(mosfs, mnt)?;
    let layers = own["lazy"].as_array().ok_or("mosfs status shows no layers of a mount that fetches")?;
    Ok(!layers.is_empty() && layers.iter().all(|layer| layer["state"] == "complete"))
}
