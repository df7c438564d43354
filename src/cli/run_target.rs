//! `mosfs run-target`: a container in the place of this process.

use std::process::{Command, Stdio};

use clap::Args;

use super::{Global, device, output, shifted_unit};
use crate::deploy::{booted, target};
use crate::error::{AnyError, Class, IoContext};
use crate::manifest::TargetName;
use crate::mount::units as daemons;
use crate::run::given::Given;
use crate::run::leftovers::{self, Ended};
use crate::run::places::Places;
use crate::run::start;
use crate::run::{self, Container, RunError, health, network, root, shifted, units};
use crate::sys;
use crate::trust::Anchor;

/// Run a container target of the running deployment in the foreground.
///
/// `mosfs activate` starts each container target this way, in a unit of systemd. The target's image must be mounted at
/// /run/mosfs/targets/NAME. The exit code is that of the container.
#[derive(Debug, Args)]
pub(super) struct RunTargetArgs {
    /// The target.
    #[arg(value_name = "NAME")]
    target: String,
    /// Only print the configuration of the runtime (config.json); start nothing.
    #[arg(long)]
    print: bool,
    /// Wait until the running container is healthy. For its unit.
    #[arg(long, hide = true, conflicts_with = "print")]
    wait_healthy: bool,
    /// Repeat the health command of a container as long as its unit runs. For its unit.
    #[arg(long, hide = true, conflicts_with_all = ["print", "wait_healthy"])]
    watch_health: bool,
    /// Mount the trees of a container whose ids the kernel cannot map. For a start without its unit.
    #[arg(long, hide = true, conflicts_with_all = ["print", "wait_healthy", "watch_health"])]
    mount_shifted: bool,
    /// Connect the network of a container that is being made. For the runtime.
    #[arg(long, hide = true, value_name = "ADDRESS,GATEWAY", conflicts_with_all = ["print", "wait_healthy"])]
    connect: Option<String>,
    /// Remove what a container has left that has ended. For its unit.
    #[arg(long, hide = true, conflicts_with_all = ["print", "wait_healthy"])]
    clean: bool,
}

/// Runs `mosfs run-target`.
pub(super) fn run(args: &RunTargetArgs, global: &Global) -> Result<(), AnyError> {
    let places = places(global)?;
    let name = args.target.parse::<TargetName>();
    let name = name.map_err(|source| RunError::Name { name: args.target.clone(), source })?;
    if let Some(addresses) = &args.connect {
        let done = network::connect(name.as_str(), addresses, &mut std::io::stdin().lock());
        if let Err(error) = &done {
            // The runtime says only that its hook has failed.
            units::note_error(&places, name.as_str(), &error.to_string());
        }
        return Ok(done?);
    }
    if args.clean {
        super::log::show(global);
        // Also for a target that the deployment no longer has.
        leftovers::clean(&places, name.as_str(), &Ended::from_environment());
        return Ok(());
    }
    if args.print {
        return output::json(&start::print(&container(&args.target, global)?, &places)?);
    }
    let done = start(args, global, &places);
    if let Err(error) = &done
        // The reason is not one of the container, which runs or starts.
        && !matches!(error.inner().downcast_ref(), Some(RunError::Running { .. } | RunError::Starting { .. }))
        // Where the start itself has failed, it has noted the reason; that nothing runs is what follows from it.
        && !(args.wait_healthy && units::last_error(&places, &args.target).is_some())
    {
        units::note_error(&places, &args.target, &error.chain());
    }
    done
}

/// Starts the target in the place of this process, or waits until it is healthy.
fn start(args: &RunTargetArgs, global: &Global, places: &Places) -> Result<(), AnyError> {
    let container = container(&args.target, global)?;
    // The process of the runtime, as the unit knows it.
    let main = std::env::var("MAINPID").ok().and_then(|text| text.parse().ok());
    if args.watch_health {
        super::log::show(global);
        health::watch(&container, places, main);
        return Ok(());
    }
    if args.wait_healthy {
        health::wait(&container, places, main)?;
        if container.target.workload.health.is_some() && std::env::var_os("NOTIFY_SOCKET").is_some() {
            start_watch(&container, places, global)?;
        }
        return Ok(());
    }
    if args.mount_shifted {
        let unit = shifted_unit::of(daemons::available().is_ok(), global)?;
        return Ok(shifted::ensure(&container, places, &unit)?);
    }
    let mount_shifted = || {
        let mut mount = again(places, global, "--mount-shifted", &args.target);
        // It notes why it fails, and this process says it. Of the last start nothing is noted any more.
        let why = match mount.stdout(Stdio::null()).stderr(Stdio::null()).status() {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => match units::last_error(places, &args.target) {
                Some(why) => {
                    return Err(RunError::Noted { why, class: Class::of_exit_code(status.code()) });
                }
                None => status.to_string(),
            },
            Err(error) => error.to_string(),
        };
        Err(root::step(&args.target, "mount its image with the ids of its group")(why))
    };
    note_ports(&container);
    Err(start::exec(&container, places, &mount_shifted).into())
}

/// Notes which of a container's published ports a program of the host listens on: nobody would look there for the reason why
/// that program is not reached any more.
pub(super) fn note_ports(container: &Container) {
    for taken in network::taken(container) {
        output::note(taken);
    }
}

/// This command with another option.
fn again(places: &Places, global: &Global, option: &str, target: &str) -> Command {
    let mut command = Command::new(sys::process::program());
    command.arg("--system").arg(&places.system).arg("--config").arg(&global.config);
    command.args(["run-target", option, target]).stdin(Stdio::null());
    command
}

/// Starts the process of a unit that repeats its health command.
fn start_watch(container: &Container, places: &Places, global: &Global) -> Result<(), AnyError> {
    let target = container.name.as_str();
    let mut watch = again(places, global, "--watch-health", target);
    // It stays in the unit's control group, and ends with it.
    watch.spawn().map_err(root::step(target, "start the watch of its health"))?;
    Ok(())
}

/// The folders of this device, absolute.
pub(super) fn places(global: &Global) -> Result<Places, AnyError> {
    let run = booted::run_dir();
    Ok(Places {
        run: std::path::absolute(&run).on("find", &run)?,
        system: std::path::absolute(&global.system).on("find", &global.system)?,
    })
}

/// The container of a target of the running deployment, which is verified again.
pub(super) fn container(name: &str, global: &Global) -> Result<Container, AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let system = device::system(global);
    let (id, verified) = target::running(&system, booted::deployment()?, &anchor)?;
    target::find(&id, &verified, name)?;
    let store = system.store()?;
    let manifest = verified.manifest();
    let known = manifest.targets.keys().find(|known| known.as_str() == name);
    let name = known.ok_or_else(|| RunError::Unit { target: name.into(), why: "no such target".into() })?;
    Ok(run::container(&store, manifest, name, &Given::load(&places(global)?))?)
}
