//! What is done on a mounted tree. Each piece of work checks that it saw all that it should have seen.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::Result;
use crate::fixture::Entry;
use crate::stats::Random;

/// Bytes of one read(2), as tar and cp do.
const READ: usize = 128 * 1024;

/// `find -printf` over the tree, in which no more than `denied` folders may be closed to the reader.
pub fn find(tree: &Path, denied: usize) -> Result<()> {
    quiet(Command::new("find").arg(tree).args(["-printf", "%p %y %m %s %T@ %U %G\\n"]), denied)
}

/// `ls -lR` over the tree; `denied` as for [`find`].
pub fn ls(tree: &Path, denied: usize) -> Result<()> {
    quiet(Command::new("ls").args(["-lR", "--color=never"]).arg(tree), denied)
}

/// Python with a few modules, from inside of the tree. A user changes the root in a user namespace.
pub fn python(tree: &Path) -> Result<()> {
    let mut command = if is_root() {
        Command::new("chroot")
    } else {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "chroot"]);
        unshare
    };
    quiet(command.arg(tree).args(["/usr/bin/python3", "-c", "import json,ssl,asyncio,email"]), 0)
}

/// Whether this process runs as root.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// `tar` of the tree into a pipe; `at_least` bytes must come through, and no more than `denied` files and folders
/// may be closed to the reader.
pub fn tar(tree: &Path, at_least: u64, denied: usize) -> Result<()> {
    let said = tempfile::tempfile()?;
    let mut child = Command::new("tar")
        .arg("-C")
        .arg(tree)
        .args(["-cf", "-", "."])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(said.try_clone()?)
        .env("LC_ALL", "C")
        .spawn()?;
    let mut out = child.stdout.take().ok_or("tar has no output")?;
    let (mut buffer, mut bytes) = (vec![0; READ], 0);
    loop {
        match out.read(&mut buffer)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    let status = child.wait()?;
    if bytes < at_least {
        return Err(format!("tar {status} after {bytes} bytes of at least {at_least}").into());
    }
    let mut text = String::new();
    (&said).seek(SeekFrom::Start(0))?;
    (&said).read_to_string(&mut text)?;
    ended(
        status.success(),
        &text.replace("tar: Exiting with failure status due to previous errors\n", ""),
        denied,
    )
    .map_err(|line| format!("tar {status}: {line}").into())
}

/// Reads files from begin to end, in their order, with `readers` threads that take the next one each.
pub fn read(tree: &Path, files: &[&Entry], readers: usize) -> Result<()> {
    let next = AtomicUsize::new(0);
    let reader = || -> io::Result<u64> {
        let (mut buffer, mut bytes) = (vec![0; READ], 0);
        while let Some(entry) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut file = File::open(tree.join(&entry.path))?;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    n => bytes += n as u64,
                }
            }
        }
        Ok(bytes)
    };
    let results = in_threads(readers, |_| reader());
    let mut bytes = 0;
    for result in results {
        bytes += result?;
    }
    let expected: u64 = files.iter().map(|e| e.size).sum();
    if bytes == expected { Ok(()) } else { Err(format!("read {bytes} bytes of {expected}").into()) }
}

/// Reads 4 KiB at random places of files, `count` times in all, with `jobs` threads.
pub fn random(tree: &Path, files: &[&Entry], jobs: usize, count: usize) -> Result<()> {
    let open: Vec<(File, u64)> = files
        .iter()
        .map(|entry| Ok((File::open(tree.join(&entry.path))?, entry.size / 4096)))
        .collect::<io::Result<_>>()?;
    // A file is as likely as it is large.
    let mut ends = Vec::with_capacity(open.len());
    let mut blocks = 0;
    for (_, own) in &open {
        blocks += own;
        ends.push(blocks);
    }
    let results = in_threads(jobs, |job| -> Result<()> {
        let mut random = Random::new(7 + job as u64);
        let mut buffer = [0; 4096];
        for _ in 0..count / jobs {
            let block = random.below(blocks);
            let index = ends.partition_point(|&end| end <= block);
            let (file, own) = &open[index];
            let within = block - (ends[index] - own);
            file.read_exact_at(&mut buffer, within * 4096)?;
        }
        Ok(())
    });
    results.into_iter().collect()
}

/// Opens one file and reads its first bytes.
pub fn first_read(path: &Path) -> Result<()> {
    let mut buffer = [0; 4096];
    match File::open(path)?.read(&mut buffer)? {
        0 => Err(format!("{} is empty", path.display()).into()),
        _ => Ok(()),
    }
}

/// Checks that a mounted tree has exactly the entries it should have: paths, sizes of files. Folders that are closed
/// to the reader are not looked into.
pub fn check(tree: &Path, entries: &[Entry]) -> Result<()> {
    fn count(dir: &Path, closed: &HashSet<PathBuf>) -> io::Result<usize> {
        let mut entries = 0;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            entries += 1;
            if entry.file_type()?.is_dir() && !closed.contains(&entry.path()) {
                entries += count(&entry.path(), closed)?;
            }
        }
        Ok(entries)
    }
    let closed = entries.iter().filter(|e| !e.readable).map(|e| tree.join(&e.path)).collect();
    for entry in entries {
        let path = tree.join(&entry.path);
        let meta = fs::symlink_metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if meta.is_file() != entry.is_file || (entry.is_file && meta.len() != entry.size) {
            return Err(format!("{} is not what it should be: {meta:?}", path.display()).into());
        }
    }
    let found = count(tree, &closed)?;
    if found == entries.len() {
        Ok(())
    } else {
        Err(format!("{found} entries, expected {}", entries.len()).into())
    }
}

/// Runs a command, which may be refused `denied` files and folders.
fn quiet(command: &mut Command, denied: usize) -> Result<()> {
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    ended(output.status.success(), &String::from_utf8_lossy(&output.stderr), denied)
        .map_err(|line| format!("{command:?} {}: {line}", output.status).into())
}

/// Whether a command did its work: it succeeded, or all that it complains about are files and folders that the
/// reader may not read, of which the tree has `denied`. Returns the line that says otherwise.
fn ended(success: bool, said: &str, denied: usize) -> std::result::Result<(), String> {
    let other = said.lines().find(|line| !line.ends_with(": Permission denied"));
    match other {
        _ if success => Ok(()),
        Some(line) => Err(line.into()),
        None if (1..=denied).contains(&said.lines().count()) => Ok(()),
        None => Err(format!("{} permissions denied, expected at most {denied}", said.lines().count())),
    }
}

fn in_threads<T: Send>(threads: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if threads == 1 {
        return vec![work(0)];
    }
    thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|n| {
                let work = &work;
                scope.spawn(move || work(n))
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().expect("a reader panicked")).collect()
    })
}
