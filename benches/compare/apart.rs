//! Runs in a process of their own: as an ordinary user, or bound to some cores.
//!
//! The benchmark runs itself again below setpriv(1) or taskset(1). That process gets a [`Task`] as JSON on stdin, mounts,
//! works and unmounts, and prints the figure as JSON. So a user's mount is read by that user, and needs no
//! `allow_other`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::fixture::Entry;
use crate::peers::Peer;
use crate::rows::{self, Files};
use crate::{table, work};

/// What such a process does.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    peer: Peer,
    /// The row; none to check the tree.
    row: Option<String>,
    mnt: PathBuf,
    /// The file with the entries of the tree, as JSON.
    entries: PathBuf,
}

/// How processes are run apart.
pub struct Apart {
    /// The command in front, such as `taskset -c 0`.
    before: Vec<String>,
    home: PathBuf,
    mnt: PathBuf,
    entries: PathBuf,
}

impl Apart {
    /// As an ordinary user: the one who called sudo, or else nobody. `dir` gets what belongs to that user.
    pub fn as_user(dir: &Path, entries: &[Entry]) -> Result<Self> {
        let id = |variable: &str| -> Option<u32> {
            std::env::var(variable).ok()?.parse().ok().filter(|&id| id != 0)
        };
        let (uid, gid) = id("SUDO_UID").zip(id("SUDO_GID")).unwrap_or((NOBODY, NOBODY));
        let before = ["setpriv", &format!("--reuid={uid}"), &format!("--regid={gid}"), "--clear-groups"]
            .map(String::from)
            .to_vec();
        let apart = Self::new(dir, "user", before, entries)?;
        for own in [&apart.home, &apart.mnt] {
            chown(own, Some(uid), Some(gid))?;
        }
        Ok(apart)
    }

    /// Bound to one core, with all that it starts; `mnt` is where the peers mount.
    pub fn on_one_core(dir: &Path, mnt: &Path, entries: &[Entry]) -> Result<Self> {
        let apart = Self::new(dir, "core", ["taskset", "-c", "0"].map(String::from).to_vec(), entries)?;
        Ok(Self { mnt: mnt.into(), ..apart })
    }

    fn new(dir: &Path, name: &str, before: Vec<String>, entries: &[Entry]) -> Result<Self> {
        let home = dir.join(format!("{name}-home"));
        let mnt = dir.join(format!("{name}-mnt"));
        fs::create_dir_all(&home)?;
        fs::create_dir_all(&mnt)?;
        let list = dir.join(format!("{name}-entries.json"));
        fs::write(&list, serde_json::to_vec(entries)?)?;
        Ok(Self { before, home, mnt, entries: list })
    }

    /// Where it mounts.
    pub fn mnt(&self) -> &Path {
        &self.mnt
    }

    /// Mounts, checks that the tree is the right one, and unmounts.
    pub fn check(&self, peer: &Peer) -> Result<()> {
        self.run(peer, None).map(|_| ())
    }

    /// One run of a row.
    pub fn measure(&self, row: &str, peer: &Peer) -> Result<Option<f64>> {
        self.run(peer, Some(row.into()))
    }

    fn run(&self, peer: &Peer, row: Option<String>) -> Result<Option<f64>> {
        let task = Task { peer: peer.clone(), row, mnt: self.mnt.clone(), entries: self.entries.clone() };
        let (program, args) = self.before.split_first().ok_or("an empty command")?;
        let mut child = Command::new(program)
            .args(args)
            .arg(std::env::current_exe()?)
            .arg("--apart")
            .env("HOME", &self.home)
            .env_remove("XDG_RUNTIME_DIR")
            .env_remove("XDG_CACHE_HOME")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot run {program}: {e}"))?;
        child.stdin.take().ok_or("no pipe")?.write_all(&serde_json::to_vec(&task)?)?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("{} {}", self.before.join(" "), output.status).into());
        }
        let answer: std::result::Result<Option<f64>, String> = serde_json::from_slice(&output.stdout)?;
        Ok(answer?)
    }
}

/// The user and the group that own nothing, on Debian.
const NOBODY: u32 = 65534;

/// The other side: reads a task from stdin, and prints what came of it.
pub fn answer() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let answer = perform(&serde_json::from_str(&text)?).map_err(|e| e.to_string());
    println!("{}", serde_json::to_string(&answer)?);
    Ok(())
}

fn perform(task: &Task) -> Result<Option<f64>> {
    let entries: Vec<Entry> = serde_json::from_slice(&fs::read(&task.entries)?)?;
    match &task.row {
        None => check(&task.peer, &task.mnt, &entries).map(|()| None),
        Some(id) => {
            let row = table::all().find(|row| row.id == *id).ok_or("no such row")?;
            rows::measure(row, &task.peer, &task.mnt, &Files::of(&entries))
        }
    }
}

/// Mounts a peer, and checks that it shows the tree.
pub fn check(peer: &Peer, mnt: &Path, entries: &[Entry]) -> Result<()> {
    peer.mount(mnt)?;
    let right = work::check(&peer.tree(mnt), entries);
    peer.unmount(mnt)?;
    right.map_err(|e| format!("{} does not show the tree: {e}", peer.name).into())
}
