//! `mosfs boot`: from the initramfs, choose, verify, check the floor, mount the root.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::floor::FloorArgs;
use super::{Global, output};
use crate::boot::cmdline;
use crate::boot::{self, BootError, Setup};
use crate::error::{AnyError, Class, Classified};
use crate::floor::FloorError;
use crate::sys::file::read_named;
use crate::sys::tpm::TpmError;

/// From the initramfs: choose a deployment, verify it, check the floor, mount its root.
#[derive(Debug, Args)]
pub(super) struct BootArgs {
    /// Where to mount the root.
    #[arg(long, value_name = "DIR", required_unless_present = "check")]
    sysroot: Option<PathBuf>,
    /// Only check whether an initramfs with this CONFIG and these libraries could boot.
    #[arg(long, conflicts_with_all = ["sysroot", "cmdline", "wait", "watchdog"])]
    check: bool,
    /// The kernel command line.
    #[arg(long, value_name = "FILE", default_value = "/proc/cmdline")]
    cmdline: PathBuf,
    /// How long to wait for the TPM and the system partition, in seconds.
    #[arg(long, value_name = "S", default_value_t = 30)]
    wait: u64,
    /// The watchdog that was started. It is fed while a file system is checked.
    #[arg(long, value_name = "DEVICE")]
    watchdog: Option<PathBuf>,
    #[command(flatten)]
    floor: FloorArgs,
}

/// No kernel command line is longer, in bytes (COMMAND_LINE_SIZE is 2,048 to 4,096).
const MAX_CMDLINE_BYTES: u64 = 1 << 16;

/// Why `mosfs boot` does not begin.
#[derive(Debug, thiserror::Error)]
enum RefusedError {
    /// `root=` names something else.
    #[error("{}: the kernel command line has no root=mosfs", path.display())]
    NotOurs {
        /// The file with the command line.
        path: PathBuf,
    },
    /// The kernel puts words of its command line into the environment of the first process.
    #[error(
        "{name} is set in the environment, which the kernel command line can do: start mosfs boot with env -i"
    )]
    Environment {
        /// The variable.
        name: String,
    },
    /// A word of ours makes no sense.
    #[error(transparent)]
    Cmdline(#[from] cmdline::CmdlineError),
}

impl Classified for RefusedError {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// Starts this program again with a name that begins with `@`, unless it has one.
///
/// systemd in an initramfs ends all processes before it switches the root, but for those of root
/// whose `argv[0]` begins so (systemd, "Storage Daemons for the Root File System"). The daemon of a FUSE
/// root is forked from this process and has its name.
fn protect_from_switch_root() {
    let mut arguments = std::env::args_os();
    if arguments.next().is_some_and(|name| name.as_encoded_bytes().starts_with(b"@")) {
        return;
    }
    // It returns only where it fails; a boot through dm-verity needs no such name.
    let error = Command::new("/proc/self/exe").arg0("@mosfs").args(arguments).exec();
    log::warn!("the name that survives switch_root cannot be had: {error}");
}

/// Has the kernel spare this process when memory runs out, and with it the daemon of a FUSE root that it forks:
/// without that daemon there is no system.
fn protect_from_the_oom_killer() {
    // Lower values than the own one take CAP_SYS_RESOURCE; a boot is root's.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("the OOM killer may end the root's daemon: {error}");
    }
}

/// Runs `mosfs boot`.
pub(super) fn run(args: &BootArgs, global: &Global) -> Result<(), AnyError> {
    if args.check {
        boot::check::check(&global.config, !args.floor.in_file())?;
        return output::line("a boot with this configuration finds what it needs in an initramfs");
    }
    attempt(args, global).inspect_err(|error| {
        // Rule: every failing exit extends PCR 15 with the refused value. A TPM that was waited for in vain has
        // no PCR.
        let no_tpm = matches!(
            error.inner().downcast_ref(),
            Some(BootError::Floor(FloorError::Tpm(TpmError::Absent { .. })))
        );
        let patience = Duration::from_secs(args.wait);
        if !no_tpm && let Err(error) = boot::refuse(&args.floor.place(global), patience) {
            output::note(format!("PCR {} is not closed: {error}", boot::measure::PCR));
        }
    })
}

fn attempt(args: &BootArgs, global: &Global) -> Result<(), AnyError> {
    let real = args.cmdline.as_os_str() == "/proc/cmdline";
    // Rule (docs/design.md, kernel command line): nothing on it can turn a check off. A
    // word like MOSFS_CONFIG=/tmp on it becomes an environment variable of init.
    if let Some((name, _)) = std::env::vars_os()
        .find(|(name, _)| real && name.as_encoded_bytes().starts_with(b"MOSFS_") && name != "MOSFS_FAILPOINT")
    {
        return Err(RefusedError::Environment { name: name.to_string_lossy().into_owned() }.into());
    }
    if real {
        protect_from_switch_root();
    }
    protect_from_the_oom_killer();
    let text = read_named(&args.cmdline, MAX_CMDLINE_BYTES)?;
    let options = cmdline::parse(&String::from_utf8_lossy(&text))
        .map_err(RefusedError::Cmdline)?
        .ok_or_else(|| RefusedError::NotOurs { path: args.cmdline.clone() })?;
    let setup = Setup {
        system: global.system.clone(),
        config: global.config.clone(),
        sysroot: args.sysroot.clone().unwrap_or_default(),
        run_dir: crate::sys::run_dir(),
        floor: args.floor.place(global),
        patience: Duration::from_secs(args.wait),
        watchdog: args.watchdog.clone(),
    };
    let report = boot::boot(&setup, &options, &|text| output::note(text))?;
    for refused in &report.refused {
        output::message(format_args!("deployment {} was not booted: {}", refused.deployment, refused.why));
    }
    let ms = |time: &Duration| time.as_secs_f64() * 1e3;
    let said = output::answer(
        global,
        || {
            let phases: Vec<_> =
                report.phases.iter().map(|(name, time)| json!({"phase": name, "ms": ms(time)})).collect();
            json!({
                "deployment": report.deployment, "version": report.deployment.version,
                "target": report.target, "backend": report.backend, "overlay": report.overlay.name(),
                "phases": phases,
            })
        },
        || {
            let phases: Vec<_> =
                report.phases.iter().map(|(name, time)| format!("{name} {:.1} ms", ms(time))).collect();
            format!(
                "booting version {} ({}), {} through {}, writes go to {}: {}",
                report.deployment.version,
                report.deployment,
                report.target,
                report.backend,
                report.overlay.name(),
                phases.join(", ")
            )
        },
    );
    if let Err(error) = said {
        // The system is mounted and measured: a console that takes no more words does not end that.
        log::warn!("the answer is not printed: {error}");
    }
    Ok(())
}
