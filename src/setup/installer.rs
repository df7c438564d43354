//! What a machine does that was started from an install medium, in place of a boot.
//!
//! ```text
//! mount      the medium at /run/mosfs/medium
//! settle     wait for slower disks and media
//! answers    of the medium labelled MOSFS-ANSWERS, or of the install medium; without them, the console is asked
//! clock      not before the certificates that the kernel trusts
//! setup      `mosfs setup` as a process of its own, with the provisioning key where there is one; its last line is the
//!            verdict. Where the key is elsewhere, the nonce is carried to the second medium, and the signature from it
//! after      restart, power off, or wait for Enter
//! ```
//!
//! Nothing loops: where the system was installed already, the machine waits rather than restarts, and where an
//! installation without questions failed, it is switched off after a minute.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use super::answers::{After, Answers, FloorWay};
use super::console::Consoles;
use super::courier::Courier;
use super::media::{self, Medium};
use super::verdict;
use crate::error::{AnyError, Class, IoContext};
use crate::image::boot::CLOCK_FILE;
use crate::manifest::yaml;
use crate::medium::layout;
use crate::sys::atomic;
use crate::sys::file::{self, Links};
use crate::sys::init::{self as calls, End};
use crate::trust;
use crate::trust::config::FLOOR_KEY_FILE;

/// Where the medium is mounted.
const MOUNTED_AT: &str = "/run/mosfs/medium";
/// Where the answers, the key and the report of the setup are.
const WORK: &str = "/run/mosfs/installer";
/// The device of the TPM, which a module may still be making.
const TPM: &str = "/dev/tpmrm0";
const TPM_WITHIN: Duration = Duration::from_secs(10);
/// How long the machine stays on after an installation that failed.
const STAY: Duration = Duration::from_secs(60);
/// How often input and processes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The answers, for the setup, in [`WORK`].
const ANSWERS: &str = "answers.yaml";
/// Longest provisioning key and its authorization, report, and time, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Where the installer finds what it runs and trusts.
#[derive(Debug, Clone, Copy)]
pub struct Installer<'a> {
    /// The program with the command `setup`.
    pub program: &'a Path,
    /// What the new system is verified against.
    pub config: &'a Path,
}

/// What a setup reported.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Report {
    #[serde(default)]
    already: bool,
    #[serde(default)]
    version: u64,
}

/// How a setup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The system is on the disk.
    Installed,
    /// It was there already: this version.
    Already(u64),
    /// It failed, with this exit code.
    Failed(u8),
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// The machine ends.
    End(End),
    /// It waits until somebody presses Enter, or takes the medium out, and then restarts.
    Wait(String),
    /// The setup runs again when somebody presses Enter; the machine is switched off after this time, if there is one.
    Again(Option<Duration>),
    /// The machine is switched off after a while.
    Stay,
}

/// What is to be done.
#[derive(Debug, Clone)]
struct Task {
    answers: Answers,
    /// Whether the medium is a disk.
    is_disk: bool,
}

impl Task {
    /// Rule: no installation begins again by itself.
    fn next(&self, ended: Ended) -> Next {
        let remove = if self.is_disk { "Remove the medium, or press Enter" } else { "Press Enter" };
        let restart = format!("{remove} to restart this machine.");
        match (ended, self.answers.after) {
            (Ended::Failed(code), _) => {
                let waits = self.answers.floor != FloorWay::Key && code == Class::Tpm.exit_code();
                if waits {
                    Next::Again(None)
                } else if self.answers.disk.is_none() {
                    Next::Again(Some(STAY))
                } else {
                    Next::Stay
                }
            }
            (_, Some(After::PowerOff)) => Next::End(End::PowerOff),
            // With the medium in, the firmware may start it again, for ever.
            (Ended::Already(version), _) => Next::Wait(format!(
                "Version {version} was on the disk already. If this machine starts from the medium again, change the \
                 order of its boot devices. {restart}"
            )),
            (Ended::Installed, Some(After::Wait)) => Next::Wait(restart),
            (Ended::Installed, None) if self.is_disk => Next::Wait(restart),
            (Ended::Installed, _) => Next::End(End::Restart),
        }
    }
}

/// Installs from a medium. Returns how the machine is to end; `None` if it is no install medium after all.
pub fn run(medium: &Medium, installer: &Installer<'_>, say: &dyn Fn(&str)) -> Option<End> {
    let (device, file) = (medium.device.display(), layout::MEDIUM_FILE);
    let description = match medium.mount(Path::new(MOUNTED_AT)) {
        Ok(None) => {
            say(&format!(
                "{device} is labelled {}, but has no /{file}: it is no install medium",
                layout::LABEL
            ));
            return None;
        }
        Ok(Some(bytes)) => layout::Medium::parse(&bytes).map_err(AnyError::from),
        Err(error) => Err(error.into()),
    };
    // The installer speaks to a person. What the kernel has to say of devices stays in its log.
    let _ = fs::write("/proc/sys/kernel/printk", "4");
    media::settle();
    let prepared = description.and_then(|description| Ok((description, find_answers()?)));
    let more = prepared.as_ref().ok().and_then(|(_, answers)| answers.console.clone());
    let consoles = Consoles::open(more.as_deref());
    let end = match prepared {
        Ok((layout::Medium { product, version, .. }, answers)) => {
            consoles
                .say(&format!("mosfs: version {version} for product {product} is on the medium {device}"));
            match set_clock(installer.config) {
                Ok(None) => {}
                Ok(Some(said)) => consoles.say(&format!("mosfs: {said}")),
                Err(error) => consoles.say(&format!("mosfs: the clock is not set: {error}")),
            }
            let task = Task { answers, is_disk: medium.is_disk };
            install(medium, installer, &task, &consoles)
        }
        Err(error) => {
            consoles.say(&verdict(error.class().exit_code(), &error.to_string()));
            stay(&consoles)
        }
    };
    consoles.drain();
    Some(end)
}

/// Runs the setup until there is nothing more to try.
fn install(medium: &Medium, installer: &Installer<'_>, task: &Task, consoles: &Consoles) -> End {
    loop {
        let ended = set_up(installer, task.answers.floor, consoles).unwrap_or_else(|error| {
            consoles.say(&verdict(error.class().exit_code(), &error.to_string()));
            Ended::Failed(error.class().exit_code())
        });
        match task.next(ended) {
            Next::End(end) => {
                consoles.say(match end {
                    End::Restart => "This machine restarts.",
                    End::Halt | End::PowerOff => "This machine is switched off.",
                });
                return end;
            }
            Next::Wait(text) => {
                consoles.say(&text);
                consoles.forget();
                while consoles.line(LOOK_EVERY).is_none() && !media::is_gone(medium) {}
                return End::Restart;
            }
            Next::Again(within) => {
                let limit = within.map(|within| {
                    format!(" This machine is switched off in {} seconds otherwise.", within.as_secs())
                });
                consoles.say(&format!("Press Enter to try again.{}", limit.unwrap_or_default()));
                consoles.forget();
                let end = within.map(|within| Instant::now() + within);
                while consoles.line(LOOK_EVERY).is_none() {
                    if end.is_some_and(|end| Instant::now() >= end) {
                        return End::PowerOff;
                    }
                }
            }
            Next::Stay => return stay(consoles),
        }
    }
}

fn stay(consoles: &Consoles) -> End {
    consoles.say(&format!("This machine is switched off in {} seconds.", STAY.as_secs()));
    thread::sleep(STAY);
    End::PowerOff
}

fn work(name: &str) -> PathBuf {
    Path::new(WORK).join(name)
}

/// Finds the answers and puts them where the setup reads them: those of a second medium, or those of this one.
fn find_answers() -> Result<Answers, AnyError> {
    file::create_folder(Path::new(WORK), 0o700)?;
    let other = media::read(layout::ANSWERS_LABEL, layout::OTHER_ANSWERS, yaml::MAX_BYTES as u64)?;
    let own = || {
        let path = Path::new(MOUNTED_AT).join(layout::ANSWERS);
        file::find_regular(&path, Links::Refused, yaml::MAX_BYTES as u64)
    };
    let (bytes, name) = match other {
        Some(bytes) => (Some(bytes), format!("{}/{}", layout::ANSWERS_LABEL, layout::OTHER_ANSWERS)),
        None => (own()?, layout::ANSWERS.to_string()),
    };
    let Some(bytes) = bytes else { return Ok(Answers::default()) };
    let answers = Answers::parse(&bytes, &name)?;
    let path = work(ANSWERS);
    atomic::replace(&path, &bytes, 0o600, "installer.answers").on("write", &path)?;
    Ok(answers)
}

/// Sets the clock if it is behind the certificates of the system: a new board's may be at any time, and the setup checks
/// their dates. Returns what was done.
fn set_clock(config: &Path) -> Result<Option<String>, AnyError> {
    let path = config.join(CLOCK_FILE);
    let Some(bytes) = file::find_regular(&path, Links::Refused, MAX_FILE)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let bad = |_| io::Error::new(io::ErrorKind::InvalidData, "expected seconds since 1970");
    let past: i64 = text.trim().parse().map_err(bad).on("read", &path)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    if now >= past {
        return Ok(None);
    }
    calls::set_clock(past).on("set the clock to", &path)?;
    let (now, past) = (trust::date(now), trust::date(past));
    Ok(Some(format!(
        "the clock said {now}, before the system's certificates were valid; it is set to {past}"
    )))
}

/// Runs `mosfs setup` to its end. What it says is on the consoles, and what is typed there goes to it.
fn set_up(installer: &Installer<'_>, floor: FloorWay, consoles: &Consoles) -> Result<Ended, AnyError> {
    if installer.config.join(FLOOR_KEY_FILE).exists() {
        let end = Instant::now() + TPM_WITHIN;
        while !Path::new(TPM).exists() && Instant::now() < end {
            thread::sleep(LOOK_EVERY);
        }
    }
    let report = work("report.json");
    let _ = fs::remove_file(&report);
    let mut command = Command::new(installer.program);
    command.arg0("mosfs").arg("setup").arg(format!("oci:{MOUNTED_AT}/{}", layout::STORE)).arg("--ask");
    command.arg("--config").arg(installer.config).arg("--report").arg(&report);
    if work(ANSWERS).exists() {
        command.arg("--answers").arg(work(ANSWERS));
    }
    let (option, name) = match floor {
        FloorWay::Remote => ("--provision-pub", layout::PROVISION_PUB),
        FloorWay::Key | FloorWay::Ask => ("--provision-key", layout::PROVISION_KEY),
    };
    let mut courier = None;
    if let Some(key) = media::read(layout::PROVISION_LABEL, name, MAX_FILE)? {
        let path = work(name);
        atomic::replace(&path, &key, 0o600, "installer.key").on("write", &path)?;
        command.arg(option).arg(&path);
        if floor == FloorWay::Remote {
            courier = Some(Courier::new(Path::new(WORK), &mut command)?);
        }
    }
    let (said, says) = io::pipe().on("open", "a pipe")?;
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::piped());
    command.stdout(says.try_clone().on("open", "a pipe")?).stderr(says);
    let child = command.spawn().on("run", installer.program);
    // Its ends of the pipe.
    drop(command);
    let code = child.and_then(|mut child| {
        relay(&mut child, said, consoles, &mut || {
            if let Some(courier) = &mut courier {
                courier.go(&|text| consoles.say(text));
            }
        })
        .on("wait for", installer.program)
    });
    let _ = fs::remove_file(work(name));
    match code? {
        0 => {
            let bytes = file::read_regular(&report, Links::Refused, MAX_FILE)?;
            let read: Report =
                serde_json::from_slice(&bytes).map_err(io::Error::other).on("read", &report)?;
            Ok(if read.already { Ended::Already(read.version) } else { Ended::Installed })
        }
        code => Ok(Ended::Failed(code)),
    }
}

/// Carries what a process says to the consoles, and what is typed to it, until it ends; returns its exit code.
/// `meanwhile` is called all the time.
fn relay(
    child: &mut Child,
    mut said: io::PipeReader,
    consoles: &Consoles,
    meanwhile: &mut dyn FnMut(),
) -> io::Result<u8> {
    let mut input = child.stdin.take();
    let screens = consoles.screens();
    thread::scope(|scope| {
        let copying = scope.spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = said.read(&mut bytes) {
                screens.write(&bytes[..count]);
            }
        });
        // What was typed before it asked is no answer.
        consoles.forget();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if let Some(line) = consoles.line(LOOK_EVERY)
                && let Some(pipe) = &mut input
                && writeln!(pipe, "{line}").is_err()
            {
                input = None;
            }
            meanwhile();
        };
        let _ = copying.join();
        if let Some(signal) = status.signal() {
            consoles.say(&verdict(Class::Failure.exit_code(), &format!("signal {signal} ended mosfs setup")));
        }
        Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(Class::Failure.exit_code()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(answers: &str, is_disk: bool, ended: Ended) -> Next {
        let answers = Answers::parse(format!("wipe: no\n{answers}").as_bytes(), "a").unwrap();
        Task { answers, is_disk }.next(ended)
    }

    #[test]
    fn what_follows_an_installation() {
        for (answers, is_disk, end) in [
            ("", false, Some(End::Restart)),
            ("", true, None),
            ("after: reboot", true, Some(End::Restart)),
            ("after: poweroff", false, Some(End::PowerOff)),
            ("after: wait", false, None),
        ] {
            match (next(answers, is_disk, Ended::Installed), end) {
                (Next::End(found), Some(end)) => assert_eq!(found, end, "{answers}"),
                (Next::Wait(text), None) => {
                    let word = if is_disk { "Remove the medium" } else { "Press Enter" };
                    assert!(text.starts_with(word), "{text}");
                }
                other => panic!("{answers}: {other:?}"),
            }
        }
    }

    /// Rule: no installation begins again by itself.
    #[test]
    fn a_medium_that_stays_in_makes_no_loop() {
        for answers in ["", "after: reboot", "after: wait"] {
            for is_disk in [false, true] {
                let Next::Wait(text) = next(answers, is_disk, Ended::Already(200)) else {
                    panic!("{answers} {is_disk}");
                };
                assert!(text.starts_with("Version 200 was on the disk already. "), "{text}");
            }
        }
        assert_eq!(next("after: poweroff", true, Ended::Already(200)), Next::End(End::PowerOff));
    }

    #[test]
    fn what_follows_a_failure() {
        for code in 1..=5 {
            let ended = Ended::Failed(code);
            assert_eq!(next("disk: only-empty", true, ended), Next::Stay);
            assert_eq!(next("disk: only-empty\nafter: reboot", false, ended), Next::Stay);
            // Somebody is there, and may try again.
            assert_eq!(next("after: reboot", false, ended), Next::Again(Some(STAY)));
            let asked = next("disk: only-empty\nfloor: ask", false, ended);
            assert_eq!(asked, if code == 5 { Next::Again(None) } else { Next::Stay });
            assert_eq!(next("disk: only-empty\nfloor: remote", false, ended), asked);
        }
    }

    #[test]
    fn a_clock_that_is_right_stays() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(set_clock(dir.path()).unwrap(), None, "a kernel without a time");
        fs::write(dir.path().join(CLOCK_FILE), "1700000000\n").unwrap();
        assert_eq!(set_clock(dir.path()).unwrap(), None);
        fs::write(dir.path().join(CLOCK_FILE), "yesterday\n").unwrap();
        assert!(set_clock(dir.path()).unwrap_err().to_string().contains("expected seconds since 1970"));
    }

    #[test]
    fn a_process_speaks_and_is_spoken_to() {
        let consoles = Consoles::none();
        for (script, code) in [("echo said; exit 3", 3), ("kill -9 $$", 1), ("exec true", 0)] {
            let (said, says) = io::pipe().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(says);
            let mut child = command.spawn().unwrap();
            drop(command);
            assert_eq!(relay(&mut child, said, &consoles, &mut || {}).unwrap(), code, "{script}");
        }
    }
}
