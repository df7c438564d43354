//! FUSE daemons as units of systemd, each one of its own.
//!
//! ```text
//! mosfs-fuse@PATH.service     transient (systemd-run(1)); PATH is the mount point, escaped as systemd does
//!   ExecStart      mosfs mount --foreground --backend fuse …      ready when it is mounted (Type=notify)
//!   ExecStopPost   mosfs umount --dead PATH                       a mount whose daemon died leaves the tree
//!   Restart        on-failure                                     and is mounted again
//!   KillMode       process                                        nothing but the daemon is killed
//! ```
//!
//! A daemon that was forked lives in the unit or the session of whoever called `mosfs`, ends when
//! that is stopped, and nobody starts it again when it dies. In a unit of its own it does neither.
//! A plain `umount` ends the daemon with success, which ends the unit.
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

/// Whether systemd can keep our daemons; why not, where it cannot.
///
/// It must be the one that runs this machine, and see the same mounts as this process: what a unit
/// mounts shows in the mount namespace of process 1.
pub fn available() -> Result<(), String> {
    if sys::daemon::effective_ids().0 != 0 {
        return Err("it takes root".into());
    }
    // sd_booted(3).
    if !Path::new("/run/systemd/system").is_dir() {
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
    match (keeper, available()) {
        (Keeper::Nobody, _) | (Keeper::Auto, Err(_)) => Ok(false),
        (_, Ok(())) => Ok(true),
        (Keeper::Unit, Err(why)) => Err(MountError::NoUnit { why }),
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

/// The name of the unit that keeps the daemon of the mount at `target`.
pub fn name(target: &Path) -> OsString {
    join(&["mosfs-fuse@".as_ref(), &escape(target), ".service".as_ref()])
}

fn join(parts: &[&OsStr]) -> OsString {
    parts.iter().fold(OsString::new(), |mut all, part| {
        all.push(part);
        all
    })
}

/// Whether the unit of the mount at `target` keeps this process.
pub fn keeps(target: &Path, pid: u32) -> bool {
    // cgroups(7): `0::/system.slice/…/UNIT` in the one hierarchy that systemd makes.
    let groups = fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let name = name(target);
    groups
        .split(|&byte| byte == b'\n')
        .any(|line| line.rsplit(|&byte| byte == b'/').next() == Some(name.as_bytes()))
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

impl Unit {
    /// The command that starts the unit and waits until the mount is ready. `program` is mosfs.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("systemd-run");
        command.args(["--quiet", "--collect", "--no-ask-password", "--service-type=notify"]);
        command.arg(join(&["--unit=".as_ref(), &name(&self.target)]));
        let shown = format!("{} at {} (mosfs, FUSE)", self.source, self.target.display());
        command.arg(format!("--description={shown}"));
        let mount_unit = join(&[&escape(&self.target), ".mount".as_ref()]);
        let before = join(&["shutdown.target mosfs-activate.service ".as_ref(), &quoted(&mount_unit)]);
        // `:` keeps `$` as it is, `-` takes a failure for no failure of the unit.
        let stop = join(&[
            ":-".as_ref(),
            &quoted(program.as_os_str()),
            " umount --dead -- ".as_ref(),
            &quoted(self.target.as_os_str()),
        ]);
        let mut properties: Vec<(&str, OsString)> = vec![
            ("DefaultDependencies", "no".into()),
            ("Conflicts", "shutdown.target".into()),
            ("Before", before),
            ("KillMode", "process".into()),
            ("Restart", "on-failure".into()),
            ("RestartSec", "200ms".into()),
            ("ExecStopPost", stop),
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
        // systemd puts variables of the environment into arguments; `$$` is a dollar.
        for argument in &self.arguments {
            let doubled = argument.as_bytes().iter().flat_map(|&byte| match byte {
                b'$' => vec![b'$', b'$'],
                other => vec![other],
            });
            command.arg(OsString::from_vec(doubled.collect()));
        }
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
        // One of an earlier mount here may still be ending.
        stop(&self.target);
        let output = self
            .command(&program)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| MountError::System { operation: "run systemd-run", source })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().next().unwrap_or("it ended without a word").trim().to_string();
        Err(MountError::Unit { unit: name(&self.target).to_string_lossy().into_owned(), why })
    }
}

/// Ends the unit of the mount at `target`, if there is one, and waits for its end.
///
/// Also where no systemd runs: then there is none.
pub fn stop(target: &Path) {
    if available().is_err() {
        return;
    }
    // A unit that is not there is no matter, and anything else shows when the next one is started.
    let mut command = Command::new("systemctl");
    command.args(["--quiet", "stop", "--"]).arg(name(target));
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
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
        let command = unit.command(Path::new("/usr/bin/mosfs"));
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        for expected in [
            r#"--unit=mosfs-fuse@mnt-a\x22b\x20\x24x\x2dy.service"#,
            r#"ExecStopPost=:-"/usr/bin/mosfs" umount --dead -- "/mnt/a\"b $x-y""#,
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
}
