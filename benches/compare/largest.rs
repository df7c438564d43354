//! Rows about the largest PuzzleFS image: one whose manifest lists as many chunks as 4 MiB hold.
//!
//! ```text
//! DIR/largest/   layout with that image: tag largest. It has no chunks, of which none is read.
//! ```
//!
//! The image is opened in a process of its own, as a mount opens it, so that the most memory that the process ever had is that
//! of the one image.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::ahead;
use mosfs::internals::image::blobs::BlobFolder;
use mosfs::internals::image::format::ChunkedLayer;
use mosfs::internals::image::layer::Layer;
use mosfs::internals::image::oci::MAX_MANIFEST_BYTES;
use mosfs::internals::image::puzzlefs::Puzzlefs;
use mosfs::internals::sys::daemon::lean_allocator;
use mosfs::internals::sys::file::Links;
use mosfs::{Access, Platform, SourceRef};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Result;
use crate::fixture::{self, Fixture};
use crate::peers;
use crate::rows::{Row, Unit, Who, at_most, row};

#[allow(dead_code)]
#[path = "../../tests/puzzlefs/message.rs"]
mod message;

/// Stored size of each chunk, in bytes: what 64 KiB may take compressed.
const STORED_BYTES: u64 = 40_000;
/// Files of each chunk.
const FILES_A_CHUNK: u64 = 4;

const OPENED: &str = "mosfs, opened";
const MOUNTED: &str = "mosfs mount";

/// The rows of this module.
pub const ROWS: &[Row] = &[
    Row {
        times: 2,
        ..program(row(
            "largest",
            "The largest PuzzleFS image",
            &[at_most(0.050)],
            "An image whose manifest lists as many chunks as 4 MiB hold, with four files of 16 KiB in each of them. Opened: from the \
             index of its layout until its files can be read, manifest and metadata checked against their digests. mosfs mount: \
             until the command returns.",
        ))
    },
    Row {
        unit: Unit::Megabytes,
        ..program(row(
            "largestmem",
            "The largest PuzzleFS image, memory",
            &[at_most(64.0 * 1.048_576)],
            "Opened: the most memory that the process ever had, its program included (VmHWM); 67.1 MB are 64 MiB. mosfs mount: the \
             anonymous memory of the daemon once the image is mounted.",
        ))
    },
];

const fn program(base: Row) -> Row {
    Row { ours: OPENED, who: Who::Programs, ..base }
}

/// Whether a row is one of these.
pub fn has(row: &Row) -> bool {
    ROWS.iter().any(|own| own.id == row.id)
}

/// Who takes part in it.
pub fn programs(_: &Row) -> &'static [&'static str] {
    &[MOUNTED, OPENED]
}

/// What the process that opens the image prints.
#[derive(Debug, Serialize, Deserialize)]
struct Opened {
    seconds: f64,
    bytes: u64,
    chunks: u64,
    files: u64,
}

/// One run.
pub fn run(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    let layout = fixture.scratch().with_file_name("largest");
    fixture::once(&layout, make)?;
    let (seconds, bytes) = match name {
        MOUNTED => mount(&layout, &fixture.scratch().with_file_name("mnt"), mosfs)?,
        _ => {
            let said = Command::new(std::env::current_exe()?)
                .arg("--open")
                .arg(&layout)
                .stderr(Stdio::inherit())
                .output()?;
            if !said.status.success() {
                return Err(format!("the process that opens {} {}", layout.display(), said.status).into());
            }
            let opened: Opened = serde_json::from_slice(&said.stdout)?;
            // It opened what it was to open.
            let expected = manifest_of(&layout)?.2;
            if (opened.chunks, opened.files) != (expected, inodes(expected)) {
                return Err(format!(
                    "expected {expected} chunks and {} inodes: {opened:?}",
                    inodes(expected)
                )
                .into());
            }
            (opened.seconds, opened.bytes)
        }
    };
    Ok(Some(if row.id == "largest" { seconds } else { bytes as f64 / 1e6 }))
}

/// Inodes of the image: the root, folders of a hundred files, files.
fn inodes(chunks: u64) -> u64 {
    1 + chunks.div_ceil(25) + chunks * FILES_A_CHUNK
}

/// Mounts the image: the seconds until the command returns, and the anonymous memory of what serves it.
fn mount(layout: &Path, mnt: &Path, mosfs: &Path) -> Result<(f64, u64)> {
    fs::create_dir_all(mnt)?;
    let before = peers::fuse_servers();
    let image = format!("oci:{}:largest", layout.display());
    let words =
        [&mosfs.display().to_string(), "mount", "--backend", "fuse", &image, &mnt.display().to_string()];
    let began = Instant::now();
    peers::run(&words.map(String::from))?;
    let seconds = began.elapsed().as_secs_f64();
    let own = peers::fuse_servers().into_iter().filter(|pid| !before.contains(pid));
    let bytes = own.filter_map(peers::anonymous_bytes).sum();
    let files = fs::read_dir(mnt)?.count() as u64;
    peers::run(&["umount".into(), mnt.display().to_string()])?;
    let expected = manifest_of(layout)?.2.div_ceil(25);
    if files != expected || bytes == 0 {
        return Err(
            format!("{files} folders in the mount, expected {expected}; {bytes} bytes of memory").into()
        );
    }
    Ok((seconds, bytes))
}

/// Opens the image of a layout, and prints what that took. Runs in a process that does nothing else.
pub fn open(layout: &Path) -> Result<()> {
    let began = Instant::now();
    // All of it as a mount does.
    lean_allocator();
    let source: SourceRef = format!("oci:{}:largest", layout.display()).parse()?;
    let place = source.open(&Access::default())?;
    let found = place.find_image(source.name.as_deref(), &Platform::this_machine())?;
    let blobs = Arc::new(BlobFolder::of_layout(layout, Links::Refused));
    let (image, blobs) = ahead::parse(&place.fetch(&found, MAX_MANIFEST_BYTES)?, found.digest, blobs)?;
    let rootfs = image.layers.first().ok_or("the image has no layer")?;
    let (digest, size, chunks) = (rootfs.digest, rootfs.size, Arc::clone(&image.chunks));
    let layer = ChunkedLayer { digest, size, chunks, blobs };
    let opened = Puzzlefs::open(&layer)?;
    let seconds = began.elapsed().as_secs_f64();
    let opened = Opened {
        seconds,
        bytes: peers::most_bytes(std::process::id()).ok_or("no VmHWM")?,
        chunks: opened.chunk_count() as u64,
        files: opened.stat_fs().files,
    };
    println!("{}", serde_json::to_string(&opened)?);
    Ok(())
}

/// Digest and size of the manifest of the layout's only image, and its number of chunks.
fn manifest_of(layout: &Path) -> Result<(Digest, u64, u64)> {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let one = &index["manifests"][0];
    let text = |value: &serde_json::Value| value.as_str().map(String::from).ok_or("no text");
    let size = one["size"].as_u64().ok_or("no size")?;
    Ok((text(&one["digest"])?.parse()?, size, text(&one["annotations"]["chunks"])?.parse()?))
}

/// Makes the layout.
fn make(to: &Path) -> Result<()> {
    // An entry has always the same length, and so has the rest but for the digits of the metadata's size.
    let length = |chunks: u64| message::large_manifest(&[0; 10_000_000], chunks, STORED_BYTES).len() as u64;
    let entry = length(2) - length(1);
    let chunks = (MAX_MANIFEST_BYTES - (length(1) - entry) - 8) / entry;
    let metadata = message::large(chunks);
    let manifest = message::large_manifest(&metadata, chunks, STORED_BYTES);
    let room = MAX_MANIFEST_BYTES.checked_sub(manifest.len() as u64).ok_or("the manifest is too large")?;
    if room > 2 * entry {
        return Err(format!("{room} bytes are left in the manifest, of which {entry} make an entry").into());
    }
    let blobs = to.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    for blob in [&metadata[..], &manifest, b"{}"] {
        fs::write(blobs.join(Digest::of(blob).hex()), blob)?;
    }
    fs::write(to.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": Digest::of(&manifest).to_string(),
        "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "largest", "chunks": chunks.to_string()},
    }]});
    fs::write(to.join("index.json"), index.to_string())?;
    Ok(())
}
