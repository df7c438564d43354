//! What `install` and `update` share: what a source offers, the plan to install it, and what is said of that.

use serde_json::json;

use super::esp::{ESP_PATIENCE, EspArgs};
use super::{FloorArgs, Global, device, output, progress};
use crate::deploy::offer::{self, Accepted, FoundSystem, Judge};
use crate::deploy::plan::{self, Plan, PlanOptions, Verdict};
use crate::deploy::state::TRIES;
use crate::deploy::{DeployError, State, System};
use crate::error::AnyError;
use crate::floor;
use crate::transport::{SourceRef, Transport};
use crate::trust::{Anchor, Dates};

/// An update that is asked for.
pub(super) struct UpdateRequest<'a> {
    /// Where from.
    pub(super) source: &'a SourceRef,
    /// Whether a version that failed is tried again.
    pub(super) again: bool,
    /// Whether the blobs of the store are read. That there is an update can be said without.
    pub(super) read_blobs: bool,
    /// Where the floor is.
    pub(super) floor: &'a FloorArgs,
    /// Where the kernels are.
    pub(super) esp: &'a EspArgs,
}

/// The registry of a source, without a version, as the state file notes it.
pub(super) fn registry_of(source: &SourceRef) -> Option<String> {
    let mut all = source.clone();
    all.name = None;
    source.is_registry().then(|| all.to_string())
}

/// Finds what is offered; says what was passed over on the way.
pub(super) fn find(
    source: &SourceRef,
    from: &dyn Transport,
    anchor: &Anchor,
    global: &Global,
) -> Result<Accepted, AnyError> {
    let policy = floor::find_policy(&global.config)?;
    let judge = Judge { anchor, dates: Dates::check_now(), policy: policy.as_ref() };
    let FoundSystem { taken, passed_over } = offer::find(from, source.name.as_deref(), &judge)?;
    const SHOWN: usize = 10;
    for one in passed_over.iter().take(SHOWN) {
        output::note(format_args!("{} is passed over: {}", one.object, one.why));
    }
    if passed_over.len() > SHOWN {
        output::note(format_args!("{} more are passed over", passed_over.len() - SHOWN));
    }
    Ok(taken)
}

/// Plans an update to what a source offers, and hands the plan on.
pub(super) fn plan_update(
    asked: &UpdateRequest<'_>,
    global: &Global,
    system: &System,
    from: &dyn Transport,
    then: impl FnOnce(&Plan) -> Result<(), AnyError>,
) -> Result<(), AnyError> {
    let state: State = system.state()?;
    if state.current.is_none() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }.into());
    }
    let anchor = Anchor::load(&global.config)?;
    let offer = find(asked.source, from, &anchor, global)?;
    let progress = progress::of(global)?;
    let registry = registry_of(asked.source);
    let place = asked.esp.find(global, ESP_PATIENCE)?;
    device::with_gate(asked.floor, global, false, |gate| {
        let options = PlanOptions {
            again: asked.again,
            read_blobs: asked.read_blobs,
            source: registry.as_deref(),
            esp: place.esp.as_ref(),
            kernel: place.kernel,
            progress: &progress,
        };
        then(&plan::plan(system, &state, from, offer, &anchor, gate, &options)?)
    })
}

pub(super) fn failed_before(version: u64) -> String {
    format!(
        "version {version} was started {TRIES} times and never proved healthy: it is not tried again; \
         another version replaces it, and `mosfs update --again` tries it once more"
    )
}

/// What is mended of a system that is installed already, as the end of a sentence; nothing where nothing is.
fn mended(plan: &Plan) -> String {
    let mut parts = Vec::new();
    if !plan.renew.is_empty() {
        parts.push(format!("{} replaced", plan.renew.join(", ")));
    }
    match plan.fetch.len() {
        0 => {}
        1 => parts.push("1 blob fetched again".to_string()),
        n => parts.push(format!("{n} blobs fetched again")),
    }
    parts.join("; ")
}

pub(super) fn print_plan(plan: &Plan, global: &Global) -> Result<(), AnyError> {
    let blobs = || {
        plan.fetch
            .iter()
            .map(|fetch| json!({ "target": fetch.target, "digest": fetch.blob.digest, "bytes": fetch.blob.size }))
            .collect::<Vec<_>>()
    };
    output::answer(
        global,
        || {
            json!({
                "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict,
                "fetch": blobs(), "renew": plan.renew, "needed_bytes": plan.needed_bytes,
            })
        },
        || {
            let version = plan.id.version;
            let mut lines = vec![match plan.verdict {
                Verdict::UpToDate | Verdict::AlreadyPending => {
                    let state = if plan.verdict == Verdict::UpToDate { "installed" } else { "pending" };
                    match plan.renew.is_empty() && plan.fetch.is_empty() {
                        true => format!("version {version} is {state}: nothing to do"),
                        false => format!("version {version} is {state}, and would be mended"),
                    }
                }
                Verdict::FailedBefore => failed_before(version),
                Verdict::Install => format!("would install version {version}"),
                Verdict::Update => {
                    format!("would install version {version}, to be tried at the next boot")
                }
            }];
            lines.extend(plan.renew.iter().map(|file| format!("would replace {file}")));
            for fetch in &plan.fetch {
                lines.push(format!(
                    "would fetch {} ({} bytes) for {}",
                    fetch.blob.digest, fetch.blob.size, fetch.target
                ));
            }
            lines
        },
    )
}

pub(super) fn say(plan: &Plan, global: &Global) -> Result<(), AnyError> {
    let mended = mended(plan);
    output::answer(
        global,
        || {
            json!({
                "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict,
                "renewed": plan.renew, "fetched": plan.fetch.len(),
            })
        },
        || {
            let version = plan.id.version;
            match plan.verdict {
                Verdict::UpToDate if mended.is_empty() => {
                    format!("version {version} is installed already: nothing to do")
                }
                Verdict::UpToDate => format!("version {version} is installed already, and mended: {mended}"),
                Verdict::AlreadyPending if mended.is_empty() => {
                    format!("version {version} is pending already: it is tried at the next boot")
                }
                Verdict::AlreadyPending => {
                    format!(
                        "version {version} is pending already, and mended: {mended}; it is tried at the next boot"
                    )
                }
                Verdict::FailedBefore => failed_before(version),
                Verdict::Install => format!("installed version {version} ({})", plan.id.digest),
                Verdict::Update => {
                    format!("version {version} ({}) is pending: it is tried at the next boot", plan.id.digest)
                }
            }
        },
    )
}
