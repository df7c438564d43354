//! Finds the users of a mount: processes with a file, folder, program or mapping in it, and mounts below it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::table;
use crate::sorting;

/// A process that keeps a mount busy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Its process ID.
    pub pid: u32,
    /// Its name, truncated by the kernel to 15 bytes.
    pub command: String,
    /// How it uses the mount: `cwd`, `root`, `exe`, `fd N`, or `mapping`.
    pub what: String,
    /// The file or folder in the mount.
    pub path: PathBuf,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {}, {} {})", self.command, self.pid, self.what, self.path.display())
    }
}

/// Everything that keeps a mount busy, as far as this user can see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Users {
    /// Processes, by process ID, one entry each.
    pub processes: Vec<Holder>,
    /// Mount points below the mount.
    pub mounts: Vec<PathBuf>,
}

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let processes = self.processes.iter().map(ToString::to_string);
        let mounts = self.mounts.iter().map(|path| format!("the mount at {}", path.display()));
        let all: Vec<String> = processes.chain(mounts).collect();
        f.write_str(if all.is_empty() { "a process that cannot be seen from here" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}

/// Finds everything that uses a path at or below `target`.
///
/// Processes that end meanwhile, or that this user may not inspect, are skipped. Other mount namespaces use
/// other paths, so the result is only a hint: umount(2) decides whether a mount is in use.
pub fn of(target: &Path) -> Users {
    let mut processes: Vec<Holder> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let (what, path) = held(&entry.path(), target)?;
            let command = fs::read(entry.path().join("comm")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).trim_end().to_string();
            Some(Holder { pid, command, what, path })
        })
        .collect();
    sorting::sort_by_key(&mut processes, |holder| holder.pid);
    let below = |path: &Path| path.starts_with(target) && path != target;
    let mounts = table::mounted().unwrap_or_default();
    let mounts = mounts.into_iter().map(|one| one.target).filter(|path| below(path)).collect();
    Users { processes, mounts }
}

/// The first use of the mount by a process: its kind, and the path.
fn held(process: &Path, target: &Path) -> Option<(String, PathBuf)> {
    // A removed file appears as `PATH (deleted)`, which is still below the target.
    let inside = |link: &Path| fs::read_link(link).ok().filter(|path| path.starts_with(target));
    for name in ["cwd", "root", "exe"] {
        if let Some(path) = inside(&process.join(name)) {
            return Some((name.to_string(), path));
        }
    }
    for (folder, is_fd) in [("fd", true), ("map_files", false)] {
        let found = fs::read_dir(process.join(folder)).into_iter().flatten().find_map(|entry| {
            let entry = entry.ok()?.path();
            Some((inside(&entry)?, entry))
        });
        if let Some((path, entry)) = found {
            let number = entry.file_name().unwrap_or_default().display().to_string();
            return Some((if is_fd { format!("fd {number}") } else { "mapping".into() }, path));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_and_a_working_folder_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(of(&path), Users::default());
        let file = fs::File::create(path.join("x")).unwrap();
        let found = of(&path).processes;
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, std::process::id());
        assert!(found[0].what.starts_with("fd "), "{}", found[0].what);
        assert_eq!(found[0].path, path.join("x"));
        drop(file);
        let mut child = std::process::Command::new("sleep").arg("60").current_dir(&path).spawn().unwrap();
        let found = of(&path);
        child.kill().unwrap();
        child.wait().unwrap();
        let expected = Holder { pid: child.id(), command: "sleep".into(), what: "cwd".into(), path };
        assert_eq!(found.processes, [expected]);
        assert!(found.to_string().starts_with("sleep (pid "), "{found}");
    }
}
