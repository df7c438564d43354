//! Rows about mounts as such: many of them, mounts that nobody uses, and mounts beside other load.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use crate::Result;
use crate::fixture::Fixture;
use crate::peers;
use crate::rows::{Files, KERNEL, OURS, Row, SQUASHFUSE, Unit, Who, at_most, beside, row};
use crate::work;

/// Mounts of the rows about idle mounts.
const IDLE: usize = 100;
/// Mounts that are read at once.
const AT_ONCE: usize = 64;
/// Small files that each of these readers takes.
const FILES_EACH: usize = 250;
/// How long idle mounts are watched.
const WATCHED: Duration = Duration::from_secs(5);
/// How often the small files are read beside the hogs, each time of a new mount.
const BESIDE_HOGS: usize = 3;
/// How often a program's files are dropped from the page cache, while others use them.
const DROPS: usize = 50;

const fn program(base: Row) -> Row {
    Row { who: Who::Programs, ..base }
}

/// The rows of this module.
pub const ROWS: &[Row] = &[
    Row {
        times: 4,
        ..program(row(
            "coldstart",
            "Start, the program itself cold",
            &[beside(KERNEL, 1.2)],
            "As start to first read, with the mount program and its libraries dropped from the page cache. The image stays in it.",
        ))
    },
    program(row(
        "idletime",
        "100 mounts, one by one",
        &[at_most(0.8)],
        "The same image mounted a hundred times, one after the other, and nothing read.",
    )),
    Row {
        unit: Unit::CpuSeconds,
        ..program(row(
            "idlecpu",
            "100 idle mounts, CPU",
            &[at_most(0.0)],
            "CPU time of all their processes over five seconds in which nobody uses them, in steps of 10 ms for each process.",
        ))
    },
    Row {
        unit: Unit::Megabytes,
        ..program(row(
            "idlemem",
            "100 idle mounts, memory each",
            &[at_most(0.4)],
            "Anonymous memory of their processes, for each mount.",
        ))
    },
    Row {
        unit: Unit::Count,
        ..program(row(
            "idlethreads",
            "100 idle mounts, threads each",
            &[],
            "Threads of their processes, for each mount.",
        ))
    },
    program(row(
        "mounts64",
        "64 mounts at once, all read",
        &[],
        "Sixty-four mount commands at once, then 64 readers, each of 250 small files of its own mount; the time of both.",
    )),
    program(row(
        "hogtime",
        "Small files beside CPU hogs",
        &[],
        "As many busy loops as there are cores run beside the reader and the file system: small files, three fresh mounts.",
    )),
    Row {
        unit: Unit::Percent,
        ..program(row(
            "hogshare",
            "What the CPU hogs get",
            &[beside(KERNEL, 0.66)],
            "The part of all cores that the busy loops got meanwhile; more is better. With the kernel's squashfs one reader runs \
             beside them, with FUSE a reader and a process that serves it.",
        ))
    },
];

/// Whether a row is one of these.
pub fn has(row: &Row) -> bool {
    ROWS.iter().any(|own| own.id == row.id)
}

/// Who takes part in it.
pub fn programs(row: &Row) -> &'static [&'static str] {
    match row.id {
        "idlecpu" | "idlemem" | "idlethreads" => &[SQUASHFUSE, OURS],
        _ => &[KERNEL, SQUASHFUSE, OURS],
    }
}

/// One run.
pub fn run(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    let mount = mount_command(name, fixture, mosfs)?;
    let mut mounts = Mounts::new(fixture, mount);
    let value = match row.id {
        "coldstart" => cold_start(&mut mounts)?,
        "mounts64" => at_once(&mut mounts, fixture)?,
        "hogtime" | "hogshare" => {
            let (time, share) = beside_hogs(&mut mounts, fixture)?;
            if row.id == "hogtime" { time } else { share * 100.0 }
        }
        id => idle(id, &mut mounts)?,
    };
    mounts.end()?;
    Ok(Some(value))
}

/// The command without the mount point.
fn mount_command(name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Vec<String>> {
    let squashfs = fixture.squashfs()?.display().to_string();
    let three = format!("oci:{}:three", fixture.layers()?.display());
    let words = match name {
        KERNEL => vec!["mount", "-t", "squashfs", "-o", "ro,loop", &squashfs],
        SQUASHFUSE => vec!["squashfuse_ll", &squashfs],
        OURS => vec![mosfs.to_str().ok_or("a path that is not UTF-8")?, "mount", "--backend", "fuse", &three],
        other => return Err(format!("nothing is known of '{other}'").into()),
    };
    Ok(words.into_iter().map(String::from).collect())
}

/// Mounts of one image, which are gone when this is.
struct Mounts {
    command: Vec<String>,
    dir: PathBuf,
    mounted: Vec<PathBuf>,
    others: Vec<u32>,
}

impl Mounts {
    fn new(fixture: &Fixture, command: Vec<String>) -> Self {
        let dir = fixture.scratch().with_file_name("mounts");
        Self { command, dir, mounted: Vec::new(), others: peers::fuse_servers() }
    }

    /// A folder to mount at, and the command that does it.
    fn prepare(&mut self) -> Result<Vec<String>> {
        let to = self.dir.join(self.mounted.len().to_string());
        fs::create_dir_all(&to)?;
        let command = [self.command.clone(), vec![to.display().to_string()]].concat();
        self.mounted.push(to);
        Ok(command)
    }

    fn mount(&mut self) -> Result<&Path> {
        let command = self.prepare()?;
        peers::run(&command)?;
        Ok(self.mounted.last().ok_or("nothing is mounted")?)
    }

    /// The processes that serve them.
    fn servers(&self) -> Vec<u32> {
        peers::fuse_servers().into_iter().filter(|pid| !self.others.contains(pid)).collect()
    }

    /// Unmounts all, and waits until their processes have ended.
    fn end(&mut self) -> Result<()> {
        let servers = self.servers();
        for point in self.mounted.drain(..) {
            peers::run(&["umount".into(), point.display().to_string()])?;
            fs::remove_dir(&point)?;
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while servers.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
            if Instant::now() > deadline {
                return Err("a file system's process has not ended 30 s after its mount".into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for point in &self.mounted {
            let _ = peers::run(&["umount".into(), "-l".into(), point.display().to_string()]);
        }
    }
}

/// What a hundred mounts take that nobody uses.
fn idle(id: &str, mounts: &mut Mounts) -> Result<f64> {
    let began = Instant::now();
    for _ in 0..IDLE {
        mounts.mount()?;
    }
    let seconds = began.elapsed().as_secs_f64();
    if id == "idletime" {
        return Ok(seconds);
    }
    let servers = mounts.servers();
    if servers.is_empty() {
        return Err("no process serves these mounts".into());
    }
    let sum = |figure: fn(u32) -> Option<f64>| servers.iter().copied().filter_map(figure).sum::<f64>();
    // What starts has its time to come to rest.
    thread::sleep(Duration::from_secs(1));
    match id {
        "idlecpu" => {
            let before = sum(peers::cpu_seconds);
            thread::sleep(WATCHED);
            Ok(sum(peers::cpu_seconds) - before)
        }
        "idlemem" => Ok(sum(|pid| peers::anonymous_bytes(pid).map(|bytes| bytes as f64 / 1e6)) / IDLE as f64),
        "idlethreads" => {
            Ok(sum(|pid| Some(fs::read_dir(format!("/proc/{pid}/task")).ok()?.count() as f64)) / IDLE as f64)
        }
        other => Err(format!("nothing is known of row '{other}'").into()),
    }
}

/// Many mount commands at once, then a reader of each.
fn at_once(mounts: &mut Mounts, fixture: &Fixture) -> Result<f64> {
    let commands: Vec<Vec<String>> = (0..AT_ONCE).map(|_| mounts.prepare()).collect::<Result<_>>()?;
    let files = Files::of(&fixture.entries);
    let files = &files.small()[..files.small().len().min(FILES_EACH)];
    let began = Instant::now();
    let mut children = Vec::new();
    for command in &commands {
        children.push(
            Command::new(&command[0])
                .args(&command[1..])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?,
        );
    }
    for (child, command) in children.iter_mut().zip(&commands) {
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("'{}' {status}", command.join(" ")).into());
        }
    }
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let readers: Vec<_> =
            mounts.mounted.iter().map(|point| scope.spawn(move || work::read(point, files, 1))).collect();
        readers.into_iter().map(|reader| reader.join().expect("a reader panicked")).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(began.elapsed().as_secs_f64())
}

/// Busy loops that end when this is dropped.
struct Hogs(Vec<Child>);

impl Hogs {
    fn start() -> Result<Self> {
        let mut hogs = Self(Vec::new());
        for _ in 0..thread::available_parallelism()?.get() {
            hogs.0.push(Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn()?);
        }
        Ok(hogs)
    }

    fn cpu_seconds(&self) -> f64 {
        self.0.iter().filter_map(|hog| peers::cpu_seconds(hog.id())).sum()
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

/// Reads small files beside busy loops: the seconds of the reader, and the part of the cores that the loops got.
fn beside_hogs(mounts: &mut Mounts, fixture: &Fixture) -> Result<(f64, f64)> {
    let files = Files::of(&fixture.entries);
    let hogs = Hogs::start()?;
    let (mut reading, mut got) = (0.0, 0.0);
    for _ in 0..BESIDE_HOGS {
        let point = mounts.mount()?;
        let (began, before) = (Instant::now(), hogs.cpu_seconds());
        work::read(point, files.small(), 1)?;
        reading += began.elapsed().as_secs_f64();
        got += hogs.cpu_seconds() - before;
    }
    let cores = hogs.0.len() as f64;
    drop(hogs);
    Ok((reading, got / (reading * cores)))
}

/// From the mount command to the first read, where the command has to come from the disk.
fn cold_start(mounts: &mut Mounts) -> Result<f64> {
    let files = files_of(&mounts.command[0])?;
    let command = mounts.prepare()?;
    drop_from_cache(&files)?;
    let began = Instant::now();
    peers::run(&command)?;
    work::first_read(&mounts.mounted[0].join("usr/bin/env"))?;
    Ok(began.elapsed().as_secs_f64())
}

/// A program and the libraries that it is linked with; the program first.
fn files_of(program: &str) -> Result<Vec<PathBuf>> {
    let path = if program.contains('/') {
        PathBuf::from(program)
    } else {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders)
            .map(|folder| folder.join(program))
            .find(|path| path.exists())
            .ok_or_else(|| format!("no {program} on PATH"))?
    };
    // It fails for a static program, which has none.
    let said = Command::new("ldd").arg(&path).output()?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    Ok([path].into_iter().chain(libraries).collect())
}

/// Drops files from the page cache. Of the first one nothing may stay; libraries that others have mapped do.
fn drop_from_cache(files: &[PathBuf]) -> Result<()> {
    let program = files.first().ok_or("no file")?;
    for path in files {
        // The kernel keeps what is not yet on the disk.
        File::open(path)?.sync_all()?;
    }
    for _ in 0..DROPS {
        for path in files {
            fadvise(File::open(path)?, 0, None, Advice::DontNeed)?;
        }
        let left = Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .arg(program)
            .output()?;
        if String::from_utf8_lossy(&left.stdout).trim() == "0" {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err(format!("{} stays in the page cache: somebody runs it", program.display()).into())
}
