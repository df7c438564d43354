//! Who uses a mount: processes with a file, a folder or a program in it.

use std::fs;
use std::path::{Path, PathBuf};

/// A process that keeps a mount busy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name, as the kernel cuts it (15 bytes).
    pub name: String,
    /// What of it is in the mount: `cwd`, `root`, `exe`, or `fd N`.
    pub what: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {}, {})", self.name, self.pid, self.what)
    }
}

/// The processes that use something at or below `target`, one entry each, by number.
///
/// Processes that end meanwhile, or that this user may not look at, are passed over. Other mount
/// namespaces name their files otherwise, so it is a help and not a proof.
pub fn of(target: &Path) -> Vec<Holder> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut holders: Vec<Holder> = processes
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let what = held(&entry.path(), target)?;
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            Some(Holder { pid, name: name.trim_end().to_string(), what })
        })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

fn held(process: &Path, target: &Path) -> Option<String> {
    let inside = |link: PathBuf| fs::read_link(link).is_ok_and(|path| path.starts_with(target));
    for name in ["cwd", "root", "exe"] {
        if inside(process.join(name)) {
            return Some(name.to_string());
        }
    }
    let descriptors = fs::read_dir(process.join("fd")).ok()?;
    descriptors
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| inside(path.clone()))
        .and_then(|path| Some(format!("fd {}", path.file_name()?.to_str()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_and_a_working_folder_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(of(&path), []);
        let file = fs::File::create(path.join("x")).unwrap();
        let found = of(&path);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, std::process::id());
        assert!(found[0].what.starts_with("fd "), "{}", found[0].what);
        drop(file);
        let mut child = std::process::Command::new("sleep").arg("60").current_dir(&path).spawn().unwrap();
        let found = of(&path);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].pid, found[0].what.as_str()), (child.id(), "cwd"));
    }
}
