//! `mosfs status`: what is installed, what runs, and how it is.

use clap::Args;
use serde_json::{Value, json};

use super::containers::Containers;
use super::{FloorArgs, Global, device, output};
use crate::deploy::state::TRIES;
use crate::deploy::status::{self, DeploymentStatus, Installed};
use crate::error::AnyError;
use crate::image::blobs::BlobProgress;
use crate::mount;
use crate::mount::table::{DaemonRecord, Health, MountRecord};
use crate::mount::units;

/// Show deployments, versions, floor, mounts and containers, and their health.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    floor: FloorArgs,
}

/// Runs `mosfs status`.
///
/// It reports what it can: a floor that cannot be read, or a deployment that does not verify, is one line of the output and
/// does not end it.
pub(super) fn run(args: &StatusArgs, global: &Global) -> Result<(), AnyError> {
    let installed = status::installed(&device::system(global))?;
    let floor = floor(args, global);
    let mounts = mount::table::mounts()?;
    // Without a deployment, there are none.
    let containers =
        installed.current.as_ref().or(installed.pending.as_ref()).map(|_| Containers::of(global));
    output::answer(
        global,
        || {
            json!({
                "system": global.system, "current": installed.current, "pending": installed.pending,
                "previous": installed.previous, "unused": installed.unused, "fetching": installed.fetching,
                "last_boot": installed.last_boot, "last_update": installed.last_update,
                "floor": floor, "mounts": mounts.iter().map(mount_json).collect::<Vec<_>>(),
                "containers": containers_json(containers.as_ref()),
            })
        },
        || {
            let mut lines = text(&installed, &floor, &mounts, global);
            lines.extend(containers_text(containers.as_ref()));
            lines
        },
    )
}

/// The containers as the answer shows them: a list, or `{"error":…,"exit_code":…}`.
fn containers_json(containers: Option<&Result<Containers, AnyError>>) -> Value {
    match containers {
        None => json!([]),
        Some(Ok(containers)) => containers.json(),
        Some(Err(error)) => json!({ "error": error.chain(), "exit_code": error.class().exit_code() }),
    }
}

/// No line where the deployment has no containers.
fn containers_text(containers: Option<&Result<Containers, AnyError>>) -> Vec<String> {
    match containers {
        None => Vec::new(),
        Some(Ok(containers)) => {
            let each = containers.lines();
            let count = (!each.is_empty()).then(|| format!("containers {}", each.len()));
            count.into_iter().chain(each.into_iter().map(|line| format!("          {line}"))).collect()
        }
        Some(Err(error)) => vec![format!("containers unknown: {}", error.chain())],
    }
}

/// The floor as the answer shows it: `{"version":N,"place":…}` or `{"error":…,"exit_code":…}`.
fn floor(args: &StatusArgs, global: &Global) -> Value {
    let read = || -> Result<Value, AnyError> {
        let mut floor = args.floor.open_quietly(global)?;
        let version = floor.read()?;
        Ok(json!({ "version": version, "place": floor.place() }))
    };
    read().unwrap_or_else(|error| json!({ "error": error.chain(), "exit_code": error.class().exit_code() }))
}

fn text(installed: &Installed, floor: &Value, mounts: &[MountRecord], global: &Global) -> Vec<String> {
    let mut lines = vec![format!("system    {}", global.system.display())];
    let row = |name: &str, deployment: &Option<DeploymentStatus>| match deployment {
        None => format!("{name:<9} none"),
        Some(one) => {
            let tries = match one.tries_left {
                None => String::new(),
                Some(0) => format!(", no tries left: it was started {TRIES} times and never committed"),
                Some(1) => ", 1 try left".to_string(),
                Some(n) => format!(", {n} tries left"),
            };
            format!("{name:<9} version {} ({}){tries}", one.version, one.digest)
        }
    };
    lines.push(row("current", &installed.current));
    lines.push(row("pending", &installed.pending));
    if !installed.fetching.is_empty() {
        lines.push(
            "          it is tried once all of it is here; `mosfs update --finish` fetches the rest".into(),
        );
        lines.extend(installed.fetching.iter().map(|layer| format!("          {}", layer_line(layer))));
    }
    lines.push(row("previous", &installed.previous));
    if !installed.unused.is_empty() {
        lines.push(format!("unused    {} deployments (`mosfs gc` removes them)", installed.unused.len()));
    }
    if let Some(error) = &installed.state_error {
        lines.push(format!(
            "state     the state file cannot be read ({error}); the next command that changes the system rewrites it"
        ));
    }
    lines.push(match (&floor["version"], floor["error"].as_str()) {
        (_, Some(error)) => format!("floor     unknown: {error}"),
        (version, _) => format!("floor     version {version}, in {}", floor["place"].as_str().unwrap_or("?")),
    });
    if let Some(boot) = &installed.last_boot {
        match &boot.chosen {
            Some(id) => lines.push(format!("last boot version {} was started", id.version)),
            None => lines.push("last boot found no deployment to start".to_string()),
        }
        for refusal in &boot.refused {
            lines.push(format!(
                "          version {} was refused: {}",
                refusal.deployment.version, refusal.why
            ));
        }
    }
    if let Some(error) = installed.last_update.as_ref().and_then(|update| update.error.as_ref()) {
        lines.push(format!("last update failed: {error}"));
    }
    lines.push(match mounts.len() {
        0 => "mounts    none".to_string(),
        n => format!("mounts    {n}"),
    });
    for mount in mounts {
        lines.push(format!("          {}", mount_line(mount)));
        lines.extend(mount.lazy.iter().map(|layer| format!("            {}", layer_line(layer))));
    }
    lines
}

/// How much is here of a layer that is fetched while it is read.
fn layer_line(layer: &BlobProgress) -> String {
    let BlobProgress { digest, size, have, state, error } = layer;
    let percent = (u128::from(*have) * 100).checked_div(u128::from(*size)).unwrap_or(100);
    let state = match state.as_str() {
        "complete" => "in the store",
        "offline" => "its source does not answer",
        "disk-full" => "the disk is full: what is read is not kept",
        "fetching" => "being fetched",
        "differs" => "whole, but with another digest: not stored",
        _ => "fetched as it is read",
    };
    let error = error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
    format!("{digest}: {percent} % of {} MiB here, {state}{error}", size.div_ceil(1 << 20))
}

fn mount_json(mount: &MountRecord) -> Value {
    // A record is plain data; what cannot be said is null rather than a failed status.
    let mut value = serde_json::to_value(mount).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert("health".into(), json!(mount.health()));
    }
    value
}

fn mount_line(mount: &MountRecord) -> String {
    let health = match mount.health() {
        Health::Good if mount.verified => "verified".to_string(),
        Health::Good => "NOT VERIFIED".to_string(),
        Health::Errors => match &mount.daemon {
            Some(DaemonRecord { log: Some(log), .. }) => format!("some reads failed, see {}", log.display()),
            Some(daemon) => match units::keeper_of(&mount.target, daemon.pid) {
                Some(unit) => format!("some reads failed, see `journalctl -u '{}'`", unit.display()),
                None => "some reads failed".to_string(),
            },
            None => "some reads failed".to_string(),
        },
        Health::DaemonDead if super::activate::is_target(&mount.target) => {
            "its daemon is gone, nothing can be read: `mosfs activate` mounts it again".to_string()
        }
        Health::Corrupt => format!(
            "CORRUPT: {} has status C; `mosfs verify` lists the blocks",
            mount.corrupt_device().unwrap_or_default()
        ),
        Health::DaemonDead => "its daemon is gone: unmount it and mount it again".to_string(),
    };
    format!("{} at {} ({}): {health}", mount.source, mount.target.display(), mount.backend)
}
