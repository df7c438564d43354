//! `mosfs verify`: read and check everything.

use clap::Args;
use serde_json::json;

use super::build::threads;
use super::{Global, device, output, progress};
use crate::deploy::System;
use crate::deploy::booted;
use crate::deploy::check::{self, Checked};
use crate::deploy::target;
use crate::error::AnyError;
use crate::floor::{self, Policy};
use crate::image::oci::{Descriptor, MANIFEST, Platform};
use crate::store::Store;
use crate::store::fsck::{self, NotWhole, Report};
use crate::transport::{SourceRef, Transport};
use crate::trust::Anchor;

/// Read and check everything, and list all problems.
///
/// Checks each blob against its digest, each layer against its verity tree, and each name against the system it refers
/// to. Without an argument, checks the deployed system: its state file, its deployments from the certificate down, and
/// its store.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// A layout (`oci:DIR`), one image of a layout (`oci:DIR:NAME`), or a target of the current deployment.
    #[arg(value_name = "SOURCE|TARGET")]
    what: Option<String>,
}

/// Runs `mosfs verify`.
pub(super) fn run(args: &Verify, global: &Global) -> Result<(), AnyError> {
    let progress = progress::of(global)?;
    let mut deployments = Checked::default();
    let (object, report) = match args.what.as_deref() {
        None => {
            let system = device::system(global);
            deployments = check_deployments(&system, global);
            let store = system.store()?;
            (store.dir().display().to_string(), fsck::check(&store, threads(), &progress)?)
        }
        // A source has a scheme; a target's name cannot hold a colon.
        Some(text) if text.contains(':') => {
            let source: SourceRef = text.parse()?;
            let layout = source.layout()?;
            let transport: &dyn Transport = &layout;
            let report = match &source.name {
                None => fsck::check(&Store::open(layout.dir())?, threads(), &progress)?,
                Some(name) => {
                    let found = transport.find_image(Some(name), &Platform::this_machine())?;
                    fsck::check_image(&layout, &found, text, threads(), &progress)?
                }
            };
            (text.to_string(), report)
        }
        Some(name) => {
            let anchor = Anchor::load(&global.config)?;
            let booted = booted::deployment()?;
            let (store, image) = target::image(&device::system(global), booted, &anchor, name)?;
            let manifest = Descriptor::new(MANIFEST, image.digest, image.size);
            let report = fsck::check_image(store.transport(), &manifest, name, threads(), &progress)?;
            (name.to_string(), report)
        }
    };
    print(&object, &deployments, &report, global)?;
    match deployments.problems.first() {
        None => Ok(report.verdict(&object)?),
        Some(first) => {
            let count = deployments.problems.len() + report.problems.len();
            Err(NotWhole { object, count, first: first.clone() }.into())
        }
    }
}

/// Checks what the state file names. On a device without a trust anchor nothing can be checked, which is reported as a problem.
fn check_deployments(system: &System, global: &Global) -> Checked {
    let trust = || -> Result<(Anchor, Option<Policy>), AnyError> {
        Ok((Anchor::load(&global.config)?, floor::find_policy(&global.config)?))
    };
    match trust() {
        Ok((anchor, policy)) => check::check(system, &anchor, policy.as_ref()),
        // A store alone, without a device around it.
        Err(_) if !system.state_path().exists() => Checked::default(),
        Err(error) => Checked { deployments: 0, problems: vec![error.chain()] },
    }
}

fn print(object: &str, deployments: &Checked, report: &Report, global: &Global) -> Result<(), AnyError> {
    let of_store = report.problems.iter().map(ToString::to_string);
    let problems: Vec<String> = deployments.problems.iter().cloned().chain(of_store).collect();
    if global.json {
        return output::json(&json!({
            "object": object,
            "good": problems.is_empty(),
            "deployments": deployments.deployments,
            "problems": problems,
            "names": report.names,
            "blobs": report.blobs,
            "bytes": report.bytes,
            "layers": report.layers,
            "unread": report.unread,
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
    for entry in &report.unread {
        output::note(format_args!("{object}: not checked: the entry {entry}"));
    }
    let Report { names, blobs, bytes, layers, .. } = report;
    if problems.is_empty() {
        let checked = match deployments.deployments {
            0 => String::new(),
            n => format!(", {n} deployments"),
        };
        output::line(format_args!(
            "{object}: good: {names} names, {blobs} blobs with {bytes} bytes, {layers} layers read{checked}"
        ))?;
    }
    Ok(())
}
