//! FUSE daemons as units of systemd, each one of its own.
//!
//! ```text
//! mosfs-fuse@PATH.service     transient (systemd-run(1)); PATH is the mount point, escaped as systemd does
//! mosfs-fuse@PATH--N.service  the same for a successor, while an earlier daemon still serves copies of its mount
//!   ExecCondition  mosfs umount --vacant PATH                     nothing of ours is mounted there: see below
//!   ExecStart      mosfs mount --foreground --backend fuse …      ready when it is mounted (Type=notify)
//!   ExecStopPost   mosfs umount --dead PATH                       a mount whose daemon died leaves the tree
//!   Restart        on-failure                                     and is mounted again
//!   KillMode       process                                        nothing but the daemon is killed
//! ```
//!
//! A daemon that was forked lives in the unit or the session of the caller of `mosfs`, ends when
//! that is stopped, and nobody starts it again when it dies. In a unit of its own it does neither.
//! A plain `umount` ends the daemon with success, which ends the unit.
//!
//! **Successors.** What somebody uses of a mount that was replaced (a container's root, a bind mount) is served by its
//! old daemon until the last user is gone. The new daemon does not wait for that, so it cannot have the old one's
//! name. An old daemon that is killed then must not be started again: it would mount the old image on top
//! of the new one. The condition sees to that; a unit that it stops is not restarted.
//!
//! **Properties** are those that systemd 252 reads back. systemd writes a transient unit to a file and reads it
//! at each daemon-reload; `ExecStopPost=:…` is written as `ExecStopPostEx=`, which it does not know itself.
//!
//! The unit has no default dependencies: a line of fstab is mounted before sysinit.target, and a
//! unit that waits for that would wait for ever. At shutdown the mount goes before its daemon: the unit is
//! ordered before the mount's own unit, and before mosfs-activate.service.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use super::MountError;
use super::backend::by_name;
use super::table;
use super::unmount::check_vacant;
use crate::sys;

/// Who keeps the daemon of a FUSE mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keeper {
    /// A unit of its own where systemd runs this machine, else nobody.
    #[default]
    Auto,
    /// A unit of its own.
    Unit,
    /// Nobody: it is forked from the process that mounts.
    Nobody,
}

impl Keeper {
    /// The names that `--daemon` takes.
    pub const NAMES: [(&'static str, Keeper); 3] =
        [("auto", Keeper::Auto), ("unit", Keeper::Unit), ("fork", Keeper::Nobody)];
}

impl FromStr for Keeper {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name(&Self::NAMES, text, "is no way to keep a daemon")
    }
}

/// A daemon that is to run as a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// What is mounted, for people.
    pub source: String,
    /// Where it is mounted: absolute and without links.
    pub target: PathBuf,
    /// Folders that must be mounted before, and stay as long.
    pub needs: Vec<PathBuf>,
    /// The arguments of `mosfs` that mount in the foreground.
    pub arguments: Vec<OsString>,
}

/// Whether systemd runs this machine (sd_booted(3)).
pub fn is_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether systemd can keep our daemons; why not, where it cannot.
///
/// It must be the one that runs this machine, and see the same mounts as this process: what a unit
/// mounts shows in the mount namespace of process 1.
pub fn available() -> Result<(), String> {
    if sys::daemon::effective_ids().0 != 0 {
        return Err("it takes root".into());
    }
    if !is_booted() {
        return Err("systemd does not run this machine".into());
    }
    // There it would be left behind when the root is switched.
    if Path::new("/etc/initrd-release").exists() {
        return Err("this is an initramfs".into());
    }
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let root =
        |process: &str| fs::metadata(format!("/proc/{process}/root/")).map(|m| (m.dev(), m.ino())).ok();
    if namespace("self").is_none() || namespace("self") != namespace("1") || root("self") != root("1") {
        return Err("this process sees other mounts than systemd".into());
    }
    Ok(())
}

/// Whether a daemon is to be kept by a unit.
///
/// # Errors
/// [`MountError::NoUnit`] where that was asked for and cannot be.
pub fn wanted(keeper: Keeper) -> Result<bool, MountError> {
    if keeper == Keeper::Nobody {
        return Ok(false);
    }
    match (keeper, available()) {
        (_, Ok(())) => Ok(true),
        (Keeper::Unit, Err(why)) => Err(MountError::NoUnit { why }),
        (Keeper::Nobody | Keeper::Auto, Err(_)) => Ok(false),
    }
}

/// A path as part of a unit's name (systemd.unit(5), "String Escaping for Inclusion in Unit Names").
pub fn escape(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let parts: Vec<&[u8]> = bytes.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return "-".into();
    }
    let mut name = Vec::with_capacity(bytes.len());
    for (number, byte) in parts.join(&b'/').into_iter().enumerate() {
        match byte {
            b'/' => name.push(b'-'),
            b'.' if number == 0 => name.extend_from_slice(b"\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => name.push(byte),
            other => name.extend_from_slice(format!("\\x{other:02x}").as_bytes()),
        }
    }
    OsString::from_vec(name)
}

/// How many daemons of one place may live at once: the one that is mounted there, and earlier ones that still serve
/// copies of their mounts.
const MOST_AT_ONE_PLACE: u32 = 16;

/// The name of the unit that keeps the daemon of the mount at `target`.
pub fn name(target: &Path) -> OsString {
    successor(target, 0)
}

/// The name of the unit for the daemon of the mount at `target` while so many others have a name.
fn successor(target: &Path, number: u32) -> OsString {
    // An escaped path never has two `-` in a row.
    let end = if number == 0 { ".service".to_string() } else { format!("--{number}.service") };
    join(&["mosfs-fuse@".as_ref(), &escape(target), end.as_ref()])
}

fn names(target: &Path) -> impl Iterator<Item = OsString> {
    (0..MOST_AT_ONE_PLACE).map(|number| successor(target, number))
}

fn join(parts: &[&OsStr]) -> OsString {
    parts.iter().fold(OsString::new(), |mut all, part| {
        all.push(part);
        all
    })
}

/// The unit of the mount at `target` that keeps this process, if one does.
pub fn keeper_of(target: &Path, pid: u32) -> Option<OsString> {
    // cgroups(7): `0::/system.slice/…/UNIT` in the one hierarchy that systemd makes.
    let groups = fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    names(target).find(|name| {
        groups
            .split(|&byte| byte == b'\n')
            .any(|line| line.rsplit(|&byte| byte == b'/').next() == Some(name.as_bytes()))
    })
}

/// A word of a property, quoted as systemd reads it (systemd.syntax(7), "Quoting").
fn quoted(word: &OsStr) -> OsString {
    let mut out = vec![b'"'];
    for &byte in word.as_bytes() {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0x20..=0x7e | 0x80.. => out.push(byte),
            other => out.extend_from_slice(format!("\\x{other:02x}").as_bytes()),
        }
    }
    out.push(b'"');
    OsString::from_vec(out)
}

/// An argument as systemd reads it, which puts variables of the environment into arguments: `$$` is a dollar.
fn dollars_doubled(argument: &OsStr) -> OsString {
    let doubled = argument.as_bytes().iter().flat_map(|&byte| match byte {
        b'$' => vec![b'$', b'$'],
        other => vec![other],
    });
    OsString::from_vec(doubled.collect())
}

impl Unit {
    /// The command that starts the unit of this name and waits until the mount is ready. `program` is mosfs.
    fn command(&self, name: &OsStr, program: &Path) -> Command {
        let mut command = Command::new("systemd-run");
        command.args(["--quiet", "--collect", "--no-ask-password", "--service-type=notify"]);
        command.arg(join(&["--unit=".as_ref(), name]));
        let shown = format!("{} at {} (mosfs, FUSE)", self.source, self.target.display());
        command.arg(format!("--description={shown}"));
        let mount_unit = join(&[&escape(&self.target), ".mount".as_ref()]);
        let before = join(&["shutdown.target mosfs-activate.service ".as_ref(), &quoted(&mount_unit)]);
        let umount = |prefix: &str, option: &str| {
            let program = quoted(&dollars_doubled(program.as_os_str()));
            let target = quoted(&dollars_doubled(self.target.as_os_str()));
            join(&[prefix.as_ref(), &program, " umount ".as_ref(), option.as_ref(), " -- ".as_ref(), &target])
        };
        let mut properties: Vec<(&str, OsString)> = vec![
            ("DefaultDependencies", "no".into()),
            ("Conflicts", "shutdown.target".into()),
            ("Before", before),
            ("KillMode", "process".into()),
            ("Restart", "on-failure".into()),
            ("RestartSec", "200ms".into()),
            ("ExecCondition", umount("", "--vacant")),
            // `-` takes a failure for no failure of the unit.
            ("ExecStopPost", umount("-", "--dead")),
            ("TimeoutStartSec", "60".into()),
            // A mount in use is served until its last user is gone: asked to end, never killed for it.
            ("TimeoutStopSec", "10".into()),
            ("SendSIGKILL", "no".into()),
            // Killed last when memory runs out: what is read through it would fail.
            ("OOMScoreAdjust", "-900".into()),
        ];
        properties.extend(self.needs.iter().map(|path| ("RequiresMountsFor", quoted(path.as_os_str()))));
        for (key, value) in properties {
            command.arg("-p").arg(join(&[key.as_ref(), "=".as_ref(), &value]));
        }
        if let Some(run) = std::env::var_os("MOSFS_RUN") {
            command.arg(join(&["--setenv=MOSFS_RUN=".as_ref(), &run]));
        }
        command.arg("--").arg(program);
        command.args(self.arguments.iter().map(|argument| dollars_doubled(argument)));
        command
    }

    /// Starts the unit; returns when the mount is ready.
    ///
    /// # Errors
    /// [`MountError::Unit`] with what systemd said. What is wrong with an image is better found out
    /// before: the daemon says it to the journal.
    pub fn start(&self) -> Result<(), MountError> {
        let failed = |source| MountError::System { operation: "find this program's own file", source };
        let program = std::env::current_exe().map_err(failed)?;
        let run = |name: &OsStr| {
            let mut command = self.command(name, &program);
            command
                .stdin(Stdio::null())
                .output()
                .map_err(|source| MountError::System { operation: "run systemd-run", source })
        };
        // What a unit has mounted here is replaced.
        let record = table::mounts()?.into_iter().find(|record| record.target == self.target);
        stop(&self.target, record.and_then(|record| record.daemon).map(|daemon| daemon.pid));
        check_vacant(&self.target)?;
        let mut why = "all names for its unit are in use".to_string();
        for name in names(&self.target) {
            let output = run(&name)?;
            let said = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                why = said.lines().next().unwrap_or("it ended without a word").trim().to_string();
                // An earlier one of this name still serves others.
                if is_name_taken(&said) {
                    continue;
                }
            } else if table::mounted_at(&self.target)?.is_some_and(|found| found.is_ours()) {
                // The first look at the root, before an overlay is made of it, and by another process than the daemon.
                let _ = fs::metadata(&self.target);
                return Ok(());
            } else {
                why = "nothing is mounted, though the unit was started".into();
            }
            return Err(MountError::Unit { unit: name.to_string_lossy().into_owned(), why });
        }
        Err(MountError::Unit { unit: name(&self.target).to_string_lossy().into_owned(), why })
    }
}

/// Whether systemd-run failed because a unit of the name is there (BUS_ERROR_UNIT_EXISTS).
fn is_name_taken(said: &str) -> bool {
    said.contains("was already loaded or has a fragment file") || said.contains("already exists")
}

/// Ends the units of the mount at `target` that have no daemon that serves, such as one that is about to start it
/// again, and the one whose daemon is `pid`; waits for their end. Others serve copies of earlier mounts.
///
/// Also where no systemd runs: then there is none.
pub fn stop(target: &Path, pid: Option<u32>) {
    if available().is_err() {
        return;
    }
    let mut command = Command::new("systemctl");
    command.args(["show", "--property=MainPID", "--property=ActiveState", "--"]).args(names(target));
    let Ok(output) = command.stdin(Stdio::null()).stderr(Stdio::null()).output() else { return };
    let shown = String::from_utf8_lossy(&output.stdout);
    // Blocks of properties in the order of the names, with empty lines between them.
    let ending = names(target).zip(shown.split("\n\n")).filter(|(_, block)| is_to_stop(block, pid));
    let ending: Vec<OsString> = ending.map(|(name, _)| name).collect();
    if ending.is_empty() {
        return;
    }
    // A unit that is gone meanwhile is no matter, and anything else shows when the next one is started.
    let mut command = Command::new("systemctl");
    command.args(["--quiet", "stop", "--"]).args(ending);
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Whether a unit with these properties is one that [`stop`] ends.
fn is_to_stop(properties: &str, pid: Option<u32>) -> bool {
    let value = |name: &str| {
        properties.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
    };
    match value("ActiveState") {
        "active" => pid.is_some_and(|pid| value("MainPID") == pid.to_string()),
        "inactive" | "" => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_systemd_escape() {
        for (path, expected) in [
            ("/run/mosfs/targets/ran-http", "run-mosfs-targets-ran\\x2dhttp"),
            ("/mnt//a b/", "mnt-a\\x20b"),
            ("/.hidden", "\\x2ehidden"),
            ("/", "-"),
        ] {
            assert_eq!(escape(Path::new(path)), expected);
            let output = Command::new("systemd-escape").arg("--path").arg(path).output();
            let output = output.expect("systemd-escape (Debian package systemd) runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
        }
        assert_eq!(name(Path::new("/mnt")), "mosfs-fuse@mnt.service");
    }

    #[test]
    fn the_command_says_all_that_the_unit_needs() {
        let unit = Unit {
            source: "app".into(),
            target: "/mnt/a\"b $x-y".into(),
            needs: vec!["/var/lib/mosfs".into()],
            arguments: vec!["mount".into(), "$HOME".into()],
        };
        let command = unit.command(&successor(&unit.target, 0), Path::new("/usr/bin/mosfs"));
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        for expected in [
            r#"--unit=mosfs-fuse@mnt-a\x22b\x20\x24x\x2dy.service"#,
            r#"ExecCondition="/usr/bin/mosfs" umount --vacant -- "/mnt/a\"b $$x-y""#,
            r#"ExecStopPost=-"/usr/bin/mosfs" umount --dead -- "/mnt/a\"b $$x-y""#,
            r#"Before=shutdown.target mosfs-activate.service "mnt-a\\x22b\\x20\\x24x\\x2dy.mount""#,
            "KillMode=process",
            "Restart=on-failure",
            r#"RequiresMountsFor="/var/lib/mosfs""#,
            "$$HOME",
        ] {
            assert!(words.iter().any(|word| word == expected), "{expected} is not in {words:#?}");
        }
        let end = words.iter().position(|word| word == "--").unwrap();
        assert_eq!(words[end + 1..], ["/usr/bin/mosfs", "mount", "$$HOME"]);
    }

    #[test]
    fn successors_have_names_of_their_own_that_no_path_has() {
        let all: Vec<_> = names(Path::new("/run/a-b")).collect();
        assert_eq!(all[0], "mosfs-fuse@run-a\\x2db.service");
        assert_eq!(all[1], "mosfs-fuse@run-a\\x2db--1.service");
        for path in ["/run/a-b/-1", "/run/a-b//1", "/run/a-b--1", "/run/a-b/1"] {
            assert!(!all.contains(&name(Path::new(path))), "{path}");
        }
    }

    #[test]
    fn the_unit_reads_back_as_systemd_writes_it() {
        // What systemd-run is passed is what ends up in the unit's file, but for prefixes of commands: with `:` among
        // them systemd writes `ExecStopPostEx=` (load-fragment of 252 does not know that key).
        let unit = Unit {
            source: "app".into(),
            target: "/mnt/a-b".into(),
            needs: vec!["/var/lib/mosfs".into()],
            arguments: vec!["mount".into()],
        };
        let command = unit.command(&name(&unit.target), Path::new("/bin/true"));
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        let mut file = ["[Unit]".to_string(), "[Service]".into(), "Type=notify\nExecStart=/bin/true".into()];
        for property in words.windows(2).filter(|pair| pair[0] == "-p").map(|pair| &pair[1]) {
            let (key, value) = property.split_once('=').unwrap();
            assert!(!key.starts_with("Exec") || !value.contains(':'), "{property}");
            // systemd-run unescapes names of units; in a file they stand as they are.
            let value = if key == "Before" {
                value.replace("\\\\", "\\").replace('"', "")
            } else {
                value.to_string()
            };
            let is_of_unit =
                ["DefaultDependencies", "Conflicts", "Before", "RequiresMountsFor"].contains(&key);
            let part = &mut file[if is_of_unit { 0 } else { 2 }];
            part.push_str(&format!("\n{key}={}", value.replace('%', "%%")));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mosfs-fuse@x.service");
        fs::write(&path, file.join("\n")).unwrap();
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output();
        let output = output.expect("systemd-analyze (Debian package systemd) runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let own: Vec<_> = said.lines().filter(|line| line.contains("mosfs-fuse@x")).collect();
        assert!(own.is_empty(), "{own:#?}");
    }

    #[test]
    fn a_unit_that_serves_others_is_not_stopped() {
        let is = |state: &str, pid| is_to_stop(&format!("MainPID=7\nActiveState={state}"), pid);
        assert!(is("active", Some(7)) && !is("active", Some(8)) && !is("active", None));
        assert!(is("activating", None) && is("failed", None) && is("deactivating", None));
        assert!(!is("inactive", Some(7)) && !is_to_stop("", None));
    }
}
