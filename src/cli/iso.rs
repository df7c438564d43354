//! `mosfs iso`: a signed system as an install medium.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::{Global, RegistryArgs, output, progress};
use crate::deploy::offer::Judge;
use crate::deploy::pull;
use crate::error::{AnyError, Class, Classified};
use crate::floor;
use crate::medium::layout::ANSWERS;
use crate::medium::{self, Extras, MediumError, Written};
use crate::progress::Progress;
use crate::setup::SetupError;
use crate::setup::answers::Answers;
use crate::store::Store;
use crate::transport::SourceRef;
use crate::trust::config::CaFile;
use crate::trust::{Anchor, Dates};

/// Write an install medium: an ISO image of a signed system, which starts from a CD or a USB stick and sets up a disk.
///
/// The system must have a kernel of its own (`mosfs build --ca`). The same input produces the same bytes.
#[derive(Debug, Args)]
pub(super) struct IsoArgs {
    /// The signed system, `oci:DIR[:NAME]` or `docker://HOST[:PORT]/PREFIX[:VERSION]`; without a name or version, the
    /// highest version there.
    #[arg(required_unless_present = "verify")]
    source: Option<SourceRef>,
    /// The file to write.
    #[arg(long, short, value_name = "FILE", required_unless_present = "verify")]
    output: Option<PathBuf>,
    #[command(flatten)]
    extras: ExtrasArgs,
    #[command(flatten)]
    verify: VerifyArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// What a medium has besides its system.
#[derive(Debug, Args)]
struct ExtrasArgs {
    /// Put these answers onto the medium (YAML), so that `mosfs setup` does not ask.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Enroll the Secure Boot keys PK.auth, KEK.auth and db.auth of this folder, where the firmware is in setup mode
    /// and a virtual machine's; elsewhere, the medium's boot menu offers it.
    #[arg(long, value_name = "DIR")]
    enroll: Option<PathBuf>,
}

/// Check a medium instead.
#[derive(Debug, Args)]
#[command(next_help_heading = "Check a medium")]
struct VerifyArgs {
    /// Check this image, or the device that it was written to: signature, every block, the kernel, and that nothing else
    /// is on it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["source", "output", "answers", "enroll"])]
    verify: Option<PathBuf>,
    /// The manifest CA of the system [default: that of CONFIG].
    #[arg(long, value_name = "FILE", requires = "verify")]
    ca: Option<PathBuf>,
    /// The product [default: that of CONFIG].
    #[arg(long, value_name = "UUID", requires = "verify", value_parser = output::uuid)]
    product: Option<Uuid>,
}

/// Runs `mosfs iso`.
pub(super) fn run(args: &IsoArgs, global: &Global) -> Result<(), AnyError> {
    if let Some(file) = &args.verify.verify {
        return verify(file, &args.verify, global);
    }
    // clap requires both.
    let (Some(source), Some(output)) = (&args.source, &args.output) else { return Ok(()) };
    // Once: a pipe has nothing to read a second time.
    let extras = Extras::load(args.extras.answers.as_deref(), args.extras.enroll.as_deref())?;
    if let (Some(path), Some(answers)) = (&args.extras.answers, extras.answers()) {
        // What makes no sense is an error now, not in front of the machine.
        Answers::parse(answers, &path.display().to_string())?;
    }
    medium::check_output(output)?;
    let progress = progress::of(global)?;
    let written = if source.is_registry() {
        let from = source.open(&args.registry.access(global))?;
        let copy = Copy::new(output);
        let store = Store::create(&copy.0)?;
        pull::system(from.as_ref(), source.name.as_deref(), &store, &progress)?;
        medium::write(&store, None, &extras, output, &progress)?
    } else {
        let store = Store::open(source.layout()?.dir())?;
        medium::write(&store, source.name.as_deref(), &extras, output, &progress)?
    };
    output::answer(global, || to_json(&written, output), || to_text(&written, output))
}

fn verify(file: &Path, args: &VerifyArgs, global: &Global) -> Result<(), AnyError> {
    let ca = args.ca.as_deref().map(CaFile::load).transpose()?;
    // CONFIG is not written.
    let trust = Anchor::plan(&global.config, ca, args.product)?;
    let policy = floor::find_policy(&global.config)?;
    let judge = Judge { anchor: trust.anchor(), dates: Dates::check_now(), policy: policy.as_ref() };
    let progress = progress::of(global)?;
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let checked = medium::check(file, &judge, threads, &progress)?;
    if let Some(answers) = &checked.answers {
        let name = format!("{}/{ANSWERS}", file.display());
        Answers::parse(answers, &name).map_err(BadAnswers)?;
    }
    let medium = &checked.medium;
    output::answer(
        global,
        || {
            json!({
                "file": file, "good": true, "bytes": checked.size_bytes, "blobs": checked.blobs,
                "version": medium.version, "product": medium.product, "digest": medium.system.to_string(),
                "kernel_id": checked.kernel_id.to_string(), "answers": checked.answers.is_some(),
                "enroll": checked.enrolls,
            })
        },
        || {
            let (version, digest, blobs) = (medium.version, medium.system, checked.blobs);
            let mut unsigned = String::new();
            for (there, text) in [(checked.answers.is_some(), "answers"), (checked.enrolls, "keys to enroll")]
            {
                if there {
                    unsigned.push_str(&format!(", {text} (not signed)"));
                }
            }
            let file = file.display();
            format!(
                "{file}: good: version {version} ({digest}), {blobs} blobs, kernel id {}{unsigned}",
                checked.kernel_id
            )
        },
    )
}

/// Answers on a medium that no setup would take.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct BadAnswers(SetupError);

impl Classified for BadAnswers {
    fn class(&self) -> Class {
        Class::Verification
    }
}

/// Writes the medium of a system that was just built.
pub(super) fn write_built(
    store: &Path,
    version: u64,
    output: &Path,
    progress: &Progress,
) -> Result<Written, MediumError> {
    medium::write(&Store::open(store)?, Some(&version.to_string()), &Extras::default(), output, progress)
}

/// What `--json` says of a medium.
pub(super) fn to_json(written: &Written, output: &Path) -> serde_json::Value {
    json!({
        "file": output, "bytes": written.size_bytes, "blob_bytes": written.blobs_bytes,
        "version": written.medium.version, "product": written.medium.product,
        "digest": written.medium.system.to_string(),
    })
}

/// The same as a sentence.
pub(super) fn to_text(written: &Written, output: &Path) -> String {
    let (file, medium) = (output.display(), &written.medium);
    format!("{file}: version {} ({}), {} bytes", medium.version, medium.system, written.size_bytes)
}

/// A folder beside the output for what a registry sends. It is removed in the end.
struct Copy(PathBuf);

impl Copy {
    fn new(output: &Path) -> Self {
        let mut name = std::ffi::OsString::from(".");
        name.push(output.file_name().unwrap_or_default());
        name.push(format!(".{}.store", std::process::id()));
        let folder = output.with_file_name(name);
        let copy = Self(folder);
        copy.remove();
        copy
    }

    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.remove();
    }
}
