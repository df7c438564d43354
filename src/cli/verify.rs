//! `mosfs verify`: read and check everything.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::build::threads;
use super::{Global, device, output, progress};
use crate::deploy::booted::{self, BootRecord};
use crate::deploy::target;
use crate::error::AnyError;
use crate::image::oci::{Descriptor, MANIFEST, Platform};
use crate::store::Store;
use crate::store::fsck::{self, Report};
use crate::transport::{OciDir, SourceRef};
use crate::trust::Anchor;

/// Reads and checks everything: every blob against its digest, every layer against its verity
/// tree, every name against what it stands for. Lists all that is wrong.
///
/// Without an argument, the store of the deployed system.
#[derive(Debug, Args)]
pub struct Verify {
    /// A layout (`oci:DIR`), an image of one (`oci:DIR:NAME`), or a target of the current deployment.
    #[arg(value_name = "SOURCE|TARGET")]
    what: Option<String>,
}

/// Runs `mosfs verify`.
pub fn run(args: &Verify, global: &Global) -> Result<(), AnyError> {
    let progress = progress::of(global)?;
    let (object, report) = match args.what.as_deref() {
        None => {
            let store = Store::open(&device::system(global).store_dir())?;
            (store.dir().display().to_string(), fsck::check(&store, threads(), &progress)?)
        }
        // A source has a scheme; a target's name cannot hold a colon.
        Some(text) if text.contains(':') => {
            let source: SourceRef = text.parse()?;
            let transport = source.open()?;
            let dir = Path::new(&source.location);
            let report = match &source.name {
                None => fsck::check(&Store::open(dir)?, threads(), &progress)?,
                Some(name) => {
                    let found = transport.find_image(Some(name), &Platform::this_machine())?;
                    fsck::check_image(&OciDir::open(dir)?, &found, text, threads(), &progress)?
                }
            };
            (text.to_string(), report)
        }
        Some(name) => {
            let anchor = Anchor::load(&global.config)?;
            let booted = BootRecord::load(&booted::path())?.map(|record| record.deployment);
            let (store, image) = target::image(&device::system(global), booted, &anchor, name)?;
            let manifest = Descriptor::new(MANIFEST, image.digest, image.size);
            let report = fsck::check_image(store.transport(), &manifest, name, threads(), &progress)?;
            (name.to_string(), report)
        }
    };
    print(&object, &report, global)?;
    Ok(report.verdict(&object)?)
}

fn print(object: &str, report: &Report, global: &Global) -> Result<(), AnyError> {
    let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    if global.json {
        return output::json(&json!({
            "object": object,
            "good": report.is_good(),
            "problems": problems,
            "names": report.names,
            "blobs": report.blobs,
            "bytes": report.bytes,
            "layers": report.layers,
            "unreachable": report.unreachable.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "extra_files": report.extra_files.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>(),
        }));
    }
    problems.iter().try_for_each(output::line)?;
    let extra = report.unreachable.len() + report.extra_files.len();
    if extra > 0 {
        output::note(format_args!(
            "{object}: {extra} blobs and files that nothing needs; `mosfs gc` removes them"
        ));
    }
    let Report { names, blobs, bytes, layers, .. } = report;
    if report.is_good() {
        output::line(format_args!(
            "{object}: good: {names} names, {blobs} blobs with {bytes} bytes, {layers} layers read"
        ))?;
    }
    Ok(())
}
