//! `mosfs setup`: an empty disk into one that starts a system.

use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::floor::ProvisionKeyArgs;
use super::{FloorArgs, Global, RegistryArgs, offered, output, progress};
use crate::error::{AnyError, IoContext};
use crate::floor;
use crate::setup::answers::Answers;
use crate::setup::disk::{self, Choice, Disk};
use crate::setup::floor::FloorPlan;
use crate::setup::{Outcome, Request, SetupError, Wipe, prepare, verdict};
use crate::sys::atomic;
use crate::transport::SourceRef;
use crate::trust::Anchor;
use crate::trust::config::CaFile;

/// Longest line that a user types, in bytes.
const MAX_ANSWER: u64 = 1 << 10;

/// Set up a disk: partition it, install the system and its kernel, and verify both.
///
/// The disk must be empty, or be named with --wipe. Everything that can be refused is refused before the first write.
/// If a setup was interrupted, run it again.
///
/// If the TPM has no floor, it gets one with the provisioning key, whose file also has the floor key's authorization. With
/// --provision-pub, --nonce-out and --signature-in the key may be on another machine: the command writes the nonce, waits
/// for the signature, and then writes the disk.
///
/// The last line is `MOSFS-INSTALL-VERDICT: CODE REASON`, with the exit code.
#[derive(Debug, Args)]
pub(super) struct SetupArgs {
    /// The signed system, `oci:DIR[:NAME]` or `docker://HOST[:PORT]/PREFIX[:VERSION]`; without a name or version, the
    /// highest version there that verifies.
    source: SourceRef,
    /// The disk: the path of its device, serial:S, wwn:W, or only-empty for the only disk that is empty. Without it,
    /// the command lists the disks and asks.
    #[arg(long, value_name = "DISK")]
    disk: Option<Choice>,
    /// Erase this disk. It must be the one to set up.
    #[arg(long, value_name = "DEVICE")]
    wipe: Option<PathBuf>,
    /// Take the answers from this file (YAML: disk, wipe, and what an install medium asks). Options override it.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// The manifest CA of the system [default: that of CONFIG].
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The product [default: that of CONFIG].
    #[arg(long, value_name = "UUID")]
    product: Option<Uuid>,
    #[command(flatten)]
    key: ProvisionKeyArgs,
    /// If no disk is named, ask on standard input even if it is not a terminal.
    #[arg(long)]
    ask: bool,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also write the answer to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Runs `mosfs setup`.
pub(super) fn run(args: &SetupArgs, global: &Global) -> Result<(), AnyError> {
    let result = set_up(args, global);
    let (code, reason) = match &result {
        Ok(outcome) => (0, sentence(outcome, args.dry_run)),
        Err(error) => (error.class().exit_code(), error.chain()),
    };
    let answer = || match &result {
        Ok(outcome) => json!({
            "disk": outcome.disk, "version": outcome.id.version, "deployment": outcome.id,
            "already": outcome.already, "exit_code": code, "reason": reason,
        }),
        Err(_) => json!({ "exit_code": code, "reason": reason }),
    };
    if let Some(path) = &args.report {
        let text = format!("{}\n", answer());
        atomic::replace(path, text.as_bytes(), 0o644, "setup.report").on("write", path)?;
    }
    output::answer(global, answer, || verdict(code, &reason))?;
    result.map(|_| ())
}

fn sentence(outcome: &Outcome, dry_run: bool) -> String {
    let (version, disk) = (outcome.id.version, outcome.disk.display());
    match (outcome.already, dry_run) {
        (true, _) => format!("version {version} is installed already on {disk}: nothing was written"),
        (_, true) => format!("would install version {version} on {disk}"),
        _ => format!("installed version {version} on {disk}"),
    }
}

fn set_up(args: &SetupArgs, global: &Global) -> Result<Outcome, AnyError> {
    let answers = args.answers.as_deref().map(Answers::load).transpose()?.unwrap_or_default();
    let ca = args.ca.as_deref().map(CaFile::load).transpose()?;
    // CONFIG is not written: what the new machine trusts is in its kernel.
    let trust = Anchor::plan(&global.config, ca, args.product)?;
    let anchor = trust.anchor();
    let progress = progress::of(global)?;
    let from = args.source.open(&args.registry.access(global))?;
    let layout = args.source.layout().ok();
    // Rule: the disk that the medium is on is never taken.
    let medium = layout.as_ref().and_then(|layout| disk::of_folder(layout.dir()));
    let policy = floor::find_policy(&global.config)?;
    if policy.is_none() {
        output::warning(
            "the configuration has no floor key: nothing stops an older version from being put back before \
             `mosfs floor provision` has run",
        );
    }
    let offer = offered::find(&args.source, from.as_ref(), anchor, global)?;
    let wipe = match (&args.wipe, answers.wipe) {
        (Some(disk), _) => Wipe::Disk(disk.clone()),
        (None, true) => Wipe::Chosen,
        (None, false) => Wipe::No,
    };
    let (choice, wipe) = match (args.disk.clone().or(answers.disk), wipe) {
        (Some(choice), wipe) => (choice, wipe),
        (None, wipe) => ask(args, medium.as_deref(), wipe)?,
    };
    let floor =
        FloorPlan::new(policy, args.floor.place(global), args.key.for_setup(global.json)?, &offer.verified)?;
    let say = |step: &str, text: &str| {
        if !global.json {
            // The verdict at the end reports a stdout that cannot be written.
            let _ = output::line(format_args!("{step}: {text}"));
        }
    };
    let layout = layout.as_ref();
    let request = Request {
        from: from.as_ref(),
        layout,
        offer,
        anchor,
        floor,
        choice,
        wipe,
        medium,
        progress: &progress,
    };
    let prepared = prepare(request, &say)?;
    if args.dry_run {
        return Ok(prepared.planned());
    }
    prepared.run(&say)
}

/// Lists the disks and asks for one; one that is not empty must be named again.
fn ask(args: &SetupArgs, medium: Option<&str>, wipe: Wipe) -> Result<(Choice, Wipe), AnyError> {
    if !args.ask && !io::stdin().is_terminal() {
        return Err(SetupError::NotNamed.into());
    }
    dialogue(&disk::list(medium)?, wipe, &mut io::stdin().lock(), &|text| output::message(text))
}

/// The questions, and what the answers mean.
fn dialogue(
    disks: &[Disk],
    wipe: Wipe,
    input: &mut dyn BufRead,
    say: &dyn Fn(&str),
) -> Result<(Choice, Wipe), AnyError> {
    let mut answer = || -> Result<String, AnyError> {
        let mut line = String::new();
        (&mut *input).take(MAX_ANSWER).read_line(&mut line).on("read", "stdin")?;
        Ok(line.trim().to_string())
    };
    let usable: Vec<&Disk> =
        disks.iter().filter(|disk| !disk.is_medium && disk.used_by.is_none() && !disk.read_only).collect();
    if usable.is_empty() {
        let disks = disks.iter().map(ToString::to_string).collect();
        return Err(SetupError::NoMatch { choice: "a disk that can be written".into(), disks }.into());
    }
    say("the disks that the system can be installed on:");
    for (number, disk) in (1..).zip(&usable) {
        say(&format!("  {number}  {disk}"));
    }
    say("type the number of the disk, or nothing to stop:");
    let chosen =
        answer()?.parse::<usize>().ok().and_then(|number| usable.get(number.checked_sub(1)?).copied());
    let disk = chosen.ok_or(SetupError::NotChosen)?;
    let choice = Choice::Path(disk.path.clone());
    let Some(holds) = disk.holds.as_ref().filter(|_| wipe == Wipe::No) else { return Ok((choice, wipe)) };
    let word = if disk.serial.is_empty() { disk.name.as_str() } else { disk.serial.as_str() };
    say(&format!("{} holds {holds}. To erase all of it, type {word}:", disk.path.display()));
    if answer()? != word {
        return Err(SetupError::NotChosen.into());
    }
    Ok((choice, Wipe::Disk(disk.path.clone())))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn disk(name: &str, serial: &str, holds: Option<&str>) -> Disk {
        Disk {
            name: name.into(),
            path: format!("/dev/{name}").into(),
            size_bytes: 8 << 30,
            model: String::new(),
            serial: serial.into(),
            wwn: String::new(),
            holds: holds.map(Into::into),
            used_by: None,
            read_only: false,
            is_medium: false,
        }
    }

    fn talk(typed: &str) -> (Result<(Choice, Wipe), String>, Vec<String>) {
        let disks = [
            disk("sda", "A1", Some("ext4")),
            Disk { is_medium: true, ..disk("sdb", "B1", Some("iso9660")) },
            disk("sdc", "", None),
            Disk { used_by: Some("/dev/sdd1 is mounted at /".into()), ..disk("sdd", "", None) },
            disk("sde", "", Some("a GPT partition table")),
        ];
        let said = RefCell::new(Vec::new());
        let result =
            dialogue(&disks, Wipe::No, &mut typed.as_bytes(), &|text| said.borrow_mut().push(text.into()));
        (result.map_err(|error| error.to_string()), said.into_inner())
    }

    #[test]
    fn the_list_has_neither_the_medium_nor_what_is_in_use() {
        let (result, said) = talk("2\n");
        assert_eq!(result.unwrap(), (Choice::Path("/dev/sdc".into()), Wipe::No));
        assert_eq!(
            said[1..4],
            [
                "  1  /dev/sda (8 GiB, serial A1, ext4)",
                "  2  /dev/sdc (8 GiB, empty)",
                "  3  /dev/sde (8 GiB, a GPT partition table)"
            ]
        );
    }

    #[test]
    fn a_disk_that_is_not_empty_must_be_named_again() {
        let erase = |path: &str| (Choice::Path(path.into()), Wipe::Disk(path.into()));
        assert_eq!(talk("1\nA1\n").0.unwrap(), erase("/dev/sda"));
        assert_eq!(talk("3\nsde\n").0.unwrap(), erase("/dev/sde"));
        assert_eq!(talk("1\nA1\n").1.last().unwrap(), "/dev/sda holds ext4. To erase all of it, type A1:");
        for typed in ["1\n\n", "1\nyes\n", "1\na1\n", "1\n", "", "0\n", "4\n", "x\n", "-1\n"] {
            let stopped = "no disk was chosen; nothing was written";
            assert_eq!(talk(typed).0.unwrap_err(), stopped, "{typed:?}");
        }
    }
}
