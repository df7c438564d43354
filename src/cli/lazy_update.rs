//! `mosfs update --lazy`, which makes a version pending before its blobs are here, and `--finish`, which fetches them.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use super::esp::EspArgs;
use super::offered::{UpdateRequest, plan_update, say};
use super::{FloorArgs, Global, RegistryArgs, device, output, progress};
use crate::deploy::plan::Plan;
use crate::deploy::{DeployError, DeploymentId, System, SystemLock, apply, fetching};
use crate::error::{AnyError, IoContext};
use crate::mount::units;
use crate::sys;
use crate::transport::{SourceRef, Transport, TransportError};

/// The unit that fetches the rest where systemd runs.
const UNIT: &str = "mosfs-update-lazy.service";

/// The options of `mosfs update` that the process in the background gets too.
pub(super) struct Options<'a> {
    /// How registries are reached.
    pub(super) registry: &'a RegistryArgs,
    /// Where the floor is.
    pub(super) floor: &'a FloorArgs,
    /// Where the kernels are.
    pub(super) esp: &'a EspArgs,
}

/// Makes the version of a plan pending, and starts the process that fetches its blobs.
pub(super) fn begin(
    options: &Options<'_>,
    global: &Global,
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
) -> Result<(), AnyError> {
    fetching::begin(system, lock, from, plan, &progress::of(global)?)?;
    if let Err(error) = start(options, global) {
        output::warning(format_args!(
            "the rest is not fetched yet: {error}; `mosfs update --finish` fetches it"
        ));
    }
    let bytes: u64 = plan.fetch.iter().map(|fetch| fetch.blob.size).sum();
    output::answer(
        global,
        || {
            json!({
                "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict,
                "fetching": true, "blobs": plan.fetch.len(), "bytes": bytes,
            })
        },
        || {
            format!(
                "version {} ({}) is pending: {} MiB of it are fetched in the background, and it is tried at the first \
                 boot after that",
                plan.id.version,
                plan.id.digest,
                bytes.div_ceil(1 << 20)
            )
        },
    )
}

/// Starts `mosfs update --finish`: as a unit where systemd runs, so that it outlives this session and is started again
/// when it fails; else as a process of its own.
fn start(options: &Options<'_>, global: &Global) -> Result<(), AnyError> {
    let program = sys::process::program();
    let absolute = |path: &Path| std::path::absolute(path).on("find", path);
    let mut words: Vec<OsString> = ["update", "--finish", "--system"].map(Into::into).to_vec();
    words.push(absolute(&global.system)?.into());
    words.push("--config".into());
    words.push(absolute(&global.config)?.into());
    if let Some(folder) = options.esp.folder() {
        words.extend(["--esp".into(), absolute(folder)?.into()]);
    }
    for (name, value) in options.registry.arguments().into_iter().chain(options.floor.arguments()) {
        words.push(value.map_or(name.into(), |value| format!("{name}={value}").into()));
    }
    if units::available().is_ok() {
        let mut unit = Command::new("systemd-run");
        unit.args(["--quiet", "--collect", "--no-ask-password"]).arg(format!("--unit={UNIT}"));
        for property in [
            "Restart=on-failure",
            "RestartSec=1min",
            "RestartPreventExitStatus=2 3 4 5",
            "Nice=10",
            "IOSchedulingClass=idle",
        ] {
            unit.arg(format!("--property={property}"));
        }
        unit.arg("--").arg(&program).args(&words).stdin(Stdio::null()).stdout(Stdio::null());
        if unit.status().is_ok_and(|status| status.success()) {
            return Ok(());
        }
        // Such a unit may run already: it fetches what is pending now.
        log::info!("systemd-run does not start {UNIT}");
    }
    let mut child = Command::new(&program);
    child.args(&words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    child.spawn().map(drop).on("run", &program)?;
    Ok(())
}

/// Runs `mosfs update --finish`.
pub(super) fn finish(options: &Options<'_>, global: &Global, system: &System) -> Result<(), AnyError> {
    let access = options.registry.access(global);
    let nothing = |said: &str| output::answer(global, || json!({ "fetching": false }), || said.to_string());
    if system.state()?.fetching().is_none() {
        return nothing("nothing is left to fetch");
    }
    let Some(_task) = fetching::try_task(system)? else {
        return nothing("another process fetches the rest");
    };
    // Another process may have finished, or begun with another version.
    let state = system.state()?;
    let Some(id) = state.fetching() else { return nothing("nothing is left to fetch") };
    let open = || -> Result<_, AnyError> {
        let noted = state.sources.get(&id).ok_or(DeployError::NoSource { id })?;
        let mut source: SourceRef = noted.parse()?;
        if !source.is_registry() {
            let why = "expected a registry, docker://HOST[:PORT]/PREFIX";
            return Err(TransportError::BadSource { found: noted.clone(), why }.into());
        }
        // Another system of that version is refused: one version, one system.
        source.name = Some(id.version.to_string());
        let from = source.open(&access)?;
        Ok((source, from))
    };
    let outcome = open().and_then(|(source, from)| {
        let asked = UpdateRequest {
            source: &source,
            again: false,
            read_blobs: true,
            floor: options.floor,
            esp: options.esp,
        };
        rest(&asked, global, system, id, from.as_ref())
    });
    if let Err(error) = &outcome {
        let _lock = system.lock(device::waiting(global))?;
        apply::record_failure(system, &error.chain());
    }
    outcome
}

/// Fetches the blobs of a deployment, then does what an ordinary update does, which finds nothing missing.
fn rest(
    asked: &UpdateRequest<'_>,
    global: &Global,
    system: &System,
    id: DeploymentId,
    from: &dyn Transport,
) -> Result<(), AnyError> {
    let by_size = UpdateRequest { read_blobs: false, ..*asked };
    plan_update(&by_size, global, system, from, |plan| {
        Ok(fetching::fetch(system, from, plan, &progress::of(global)?)?)
    })?;
    let lock = system.lock(device::waiting(global))?;
    let found = system.state()?.fetching();
    if found != Some(id) {
        let said = format!("version {} is no longer pending", id.version);
        return output::answer(global, || json!({ "fetching": found.is_some() }), || said);
    }
    plan_update(asked, global, system, from, |plan| {
        apply::apply(system, &lock, from, plan, &progress::of(global)?)?;
        say(plan, global)
    })
}
