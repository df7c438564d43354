//! What is done on a mounted tree. Each piece of work checks that it saw all that it should have seen.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::Result;
use crate::fixture::Entry;
use crate::stats::Random;

/// Bytes of one read(2), as tar and cp do.
const READ: usize = 128 * 1024;

/// `find -printf` over the tree.
pub fn find(tree: &Path) -> Result<()> {
    quiet(Command::new("find").arg(tree).args(["-printf", "%p %y %m %s %T@ %U %G\\n"]))
}

/// `ls -lR` over the tree.
pub fn ls(tree: &Path) -> Result<()> {
    quiet(Command::new("ls").args(["-lR", "--color=never"]).arg(tree))
}

/// Python with a few modules, from inside of the tree.
pub fn python(tree: &Path) -> Result<()> {
    quiet(Command::new("chroot").arg(tree).args(["/usr/bin/python3", "-c", "import json,ssl,asyncio,email"]))
}

/// `tar` of the tree into a pipe; `at_least` bytes must come through.
pub fn tar(tree: &Path, at_least: u64) -> Result<()> {
    let mut child = Command::new("tar")
        .arg("-C")
        .arg(tree)
        .args(["-cf", "-", "."])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
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
    if !status.success() || bytes < at_least {
        return Err(format!("tar {status} after {bytes} bytes of at least {at_least}").into());
    }
    Ok(())
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

/// Brings a file into the page cache.
pub fn warm(path: &Path) -> io::Result<()> {
    io::copy(&mut File::open(path)?, &mut io::sink()).map(|_| ())
}

/// Checks that a mounted tree has exactly the entries it should have: paths, sizes of files.
pub fn check(tree: &Path, entries: &[Entry]) -> Result<()> {
    fn count(dir: &Path) -> io::Result<usize> {
        let mut entries = 0;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            entries += 1;
            if entry.file_type()?.is_dir() {
                entries += count(&entry.path())?;
            }
        }
        Ok(entries)
    }
    for entry in entries {
        let path = tree.join(&entry.path);
        let meta = fs::symlink_metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if meta.is_file() != entry.is_file || (entry.is_file && meta.len() != entry.size) {
            return Err(format!("{} is not what it should be: {meta:?}", path.display()).into());
        }
    }
    let found = count(tree)?;
    if found == entries.len() {
        Ok(())
    } else {
        Err(format!("{found} entries, expected {}", entries.len()).into())
    }
}

fn quiet(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?} {}: {}", output.status, said.lines().next().unwrap_or("")).into())
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
