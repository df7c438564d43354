//! The peers, as `benches/peers.conf` lists them, and how they are mounted and unmounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Result;

/// A file system to compare.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Peer {
    /// Its name in the report.
    pub name: String,
    /// The command that mounts, as program and arguments.
    mount: Vec<String>,
    unmount: Vec<String>,
    /// Where the tree is below the mount point.
    root: PathBuf,
    /// The only rows that it takes part in.
    pub rows: Option<Vec<String>>,
    /// The most runs that are made of it.
    pub runs: Option<usize>,
    /// Whether an ordinary user mounts it and reads it.
    pub as_user: bool,
}

/// A line that cannot be used on this machine, and why.
pub struct Unusable {
    /// The peer's name.
    pub name: String,
    /// Why it is left out.
    pub why: String,
}

/// Reads the configuration; `word` returns the value of what stands in braces, or None where it means nothing. It is asked
/// only for the words of peers that are wanted.
///
/// `user_mnt` is `{mnt}` for peers of a user. A peer is tried once: one that does not mount, or does not show the tree, is
/// left out with the reason that `attempt` has found.
pub fn load(
    path: &Path,
    word: &dyn Fn(&str) -> Result<Option<String>>,
    user_mnt: &Path,
    wanted: impl Fn(&str, &Option<Vec<String>>) -> bool,
    attempt: impl Fn(&Peer) -> Result<()>,
) -> Result<(Vec<Peer>, Vec<Unusable>)> {
    let text = fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let (mut peers, mut unusable) = (Vec::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = || format!("{}:{}", path.display(), number + 1);
        // `||` inside of a command is not a border between columns.
        let line = line.replace("||", "\u{1}");
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let (name, mount, unmount, options) = match columns[..] {
            [name, mount, unmount] => (name, mount, unmount, ""),
            [name, mount, unmount, options] => (name, mount, unmount, options),
            _ => return Err(format!("{}: expected NAME | MOUNT | UNMOUNT [| OPTIONS]", at()).into()),
        };
        let (mut root, mut rows, mut runs, mut as_user) = (PathBuf::new(), None, None, false);
        for option in options.split_whitespace() {
            match option.split_once('=') {
                Some(("root", value)) => root = value.into(),
                Some(("rows", value)) => rows = Some(value.split(',').map(String::from).collect()),
                Some(("runs", value)) => {
                    runs = Some(value.parse().map_err(|_| format!("{}: runs={value}", at()))?)
                }
                Some(("as", "user")) => as_user = true,
                _ => return Err(format!("{}: unknown option '{option}'", at()).into()),
            }
        }
        if !wanted(name, &rows) {
            continue;
        }
        let value = |name: &str| match name {
            "mnt" if as_user => Ok(Some(user_mnt.display().to_string())),
            _ => word(name),
        };
        let command = |text: &str| -> Result<Vec<String>> {
            text.split_whitespace()
                .map(|word| fill(word, &value).map_err(|e| format!("{}: {e}", at()).into()))
                .collect()
        };
        let alternatives: Vec<Vec<String>> = mount.split('\u{1}').map(command).collect::<Result<_>>()?;
        let unmount = command(unmount)?;
        let mut why = String::from("no command");
        let mut usable = None;
        for mount in alternatives {
            let peer = Peer {
                name: name.into(),
                mount,
                unmount: unmount.clone(),
                root: root.clone(),
                rows: rows.clone(),
                runs,
                as_user,
            };
            // What takes long is not tried just for that.
            if peer.runs == Some(1) {
                usable = Some(peer);
                break;
            }
            match attempt(&peer) {
                Ok(()) => {
                    usable = Some(peer);
                    break;
                }
                Err(error) => why = error.to_string(),
            }
        }
        match usable {
            Some(peer) => peers.push(peer),
            None => unusable.push(Unusable { name: name.into(), why }),
        }
    }
    Ok((peers, unusable))
}

/// Puts values in the place of `{words}`.
fn fill(text: &str, value: &dyn Fn(&str) -> Result<Option<String>>) -> Result<String> {
    let (mut filled, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('{') {
        let unknown = || format!("nothing is known for '{text}'");
        let (name, after) = after.split_once('}').ok_or_else(unknown)?;
        filled += before;
        filled += &value(name)?.ok_or_else(unknown)?;
        rest = after;
    }
    Ok(filled + rest)
}

impl Peer {
    /// Mounts; the tree is then at [`Peer::tree`].
    pub fn mount(&self, mnt: &Path) -> Result<()> {
        run(&self.mount).map_err(|e| format!("{} on {}: {e}", self.name, mnt.display()).into())
    }

    /// Unmounts; waits for a moment where something still holds it.
    pub fn unmount(&self, _mnt: &Path) -> Result<()> {
        let mut last = None;
        for wait in [0, 20, 100, 500, 2000] {
            thread::sleep(Duration::from_millis(wait));
            match run(&self.unmount) {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| "no try was made".into()))
    }

    /// For whom its figures hold: who mounts and reads it, and whether mosfs keeps cores awake for it.
    pub fn holds_for(&self) -> String {
        let spin = self.mount.iter().find(|word| word.starts_with("--spin"));
        match spin {
            _ if self.as_user => "user".into(),
            Some(spin) => format!("root, {spin}"),
            None if self.name.starts_with("mosfs") => "root, --spin=auto".into(),
            None => "root".into(),
        }
    }

    /// Where the tree is while it is mounted.
    pub fn tree(&self, mnt: &Path) -> PathBuf {
        if self.root.as_os_str().is_empty() { mnt.to_path_buf() } else { mnt.join(&self.root) }
    }
}

/// Runs a command to its end; its error holds what it wrote to stderr.
///
/// stderr goes to a file: a daemon that keeps a pipe open would never let a reader of it end.
pub fn run(command: &[String]) -> Result<()> {
    let (program, args) = command.split_first().ok_or("an empty command")?;
    let said = std::env::temp_dir().join(format!("mosfs-bench-{}.stderr", std::process::id()));
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said)?)
        .status()
        .map_err(|e| format!("cannot run {program}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    let text = fs::read_to_string(&said).unwrap_or_default();
    Err(format!("'{}' {status}: {}", command.join(" "), text.lines().next().unwrap_or("it said nothing"))
        .into())
}

/// Processes that serve a FUSE mount now (they hold /dev/fuse open).
pub fn fuse_servers() -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
                fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/fuse")))
            })
        })
        .collect()
}

/// CPU seconds, user and system, that a process has used so far.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything; the numbers begin after the last bracket (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    // Fields 14 and 15, utime and stime, in ticks of 1/100 s on every Linux that Debian builds.
    Some((ticks(11)? + ticks(12)?) as f64 / 100.0)
}

/// Anonymous memory of a process, in bytes.
pub fn anonymous_bytes(pid: u32) -> Option<u64> {
    field_bytes(&format!("/proc/{pid}/status"), "RssAnon:")
}

/// The most memory that a process has had, in bytes.
pub fn most_bytes(pid: u32) -> Option<u64> {
    field_bytes(&format!("/proc/{pid}/status"), "VmHWM:")
}

/// Anonymous memory, where pages that processes share since a fork are divided among them.
pub fn anonymous_part_bytes(pid: u32) -> Option<u64> {
    field_bytes(&format!("/proc/{pid}/smaps_rollup"), "Pss_Anon:")
}

/// A field of a file of /proc that is in KiB.
fn field_bytes(path: &str, field: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
