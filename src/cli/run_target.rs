//! `mosfs run-target`: a container in the place of this process.

use clap::Args;

use super::{Global, device, output};
use crate::deploy::{booted, target};
use crate::error::{AnyError, IoContext};
use crate::manifest::TargetName;
use crate::run::start::{self, Places};
use crate::run::{self, Container, RunError, health, network, units};
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
        return Ok(network::connect(name.as_str(), addresses, &mut std::io::stdin().lock())?);
    }
    if args.clean {
        // Also for a target that the deployment no longer has.
        let result = std::env::var("SERVICE_RESULT").unwrap_or_default();
        return Ok(units::clean(&places, name.as_str(), &result)?);
    }
    if args.print {
        return output::json(&start::print(&container(&args.target, global)?, &places)?);
    }
    let done = start(args, global, &places);
    if let Err(error) = &done {
        units::note_error(&places, &args.target, &error.chain());
    }
    done
}

/// Starts the target in the place of this process, or waits until it is healthy.
fn start(args: &RunTargetArgs, global: &Global, places: &Places) -> Result<(), AnyError> {
    let container = container(&args.target, global)?;
    if args.wait_healthy {
        let main = std::env::var("MAINPID").ok().and_then(|text| text.parse().ok());
        return Ok(health::wait(&container, places, main)?);
    }
    Err(start::exec(&container, places).into())
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
    Ok(run::container(&store, manifest, name)?)
}
