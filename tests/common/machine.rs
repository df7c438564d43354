//! Virtual machines for tests: what tests/vm offers, from Rust.

#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Runs a program that must be there and must succeed.
pub fn tool(package: &str, command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| {
        panic!("cannot run {:?}: {error}; install the Debian package {package}", command.get_program())
    });
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A file of the source.
pub fn source_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A script of tests/vm; it says itself which package it lacks.
pub fn script(name: &str) -> Command {
    Command::new(source_file("tests/vm").join(name))
}

/// Runs a script of tests/vm that prints a path.
pub fn script_path(command: &mut Command) -> PathBuf {
    String::from_utf8(tool("", command).stdout).expect("a path in UTF-8").trim().into()
}

/// Packs a folder as a quickly made squashfs image.
pub fn squashfs(dir: &Path, image: &Path, options: &[&str]) {
    tool(
        "squashfs-tools",
        Command::new("mksquashfs")
            .args([dir, image])
            .args(["-comp", "zstd", "-Xcompression-level", "1", "-noappend", "-quiet", "-no-progress"])
            .args(options),
    );
}

/// The squashfs of a Debian root with systemd, made once. Beside it, without the ending, is the root itself.
pub fn debian_image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let root = script_path(script("debian-root").arg("hostfs"));
        let image = root.with_extension("squashfs");
        if !image.exists() {
            let part = image.with_extension("part");
            let _ = fs::remove_file(&part);
            squashfs(&root, &part, &[]);
            fs::rename(&part, &image).expect("rename");
        }
        image
    })
}

/// Bytes that do not compress, the same every time.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Packs a small initramfs (tests/vm/mini-initrd) for one of Debian's kernels.
pub fn mini_initrd(
    out: &Path,
    kernel: &str,
    init: &str,
    programs: &[(&Path, &str)],
    files: &[(&Path, &str)],
) {
    let script_file = out.with_extension("init");
    fs::write(&script_file, init).expect("the init script");
    let mut command = script("mini-initrd");
    command.arg(out).arg("--kernel-dir").arg(script_path(script("kernel").arg(kernel)));
    command.arg("--init").arg(&script_file);
    for (option, pairs) in [("--program", programs), ("--file", files)] {
        for (from, to) in pairs {
            command.arg(option).arg(format!("{}:{to}", from.display()));
        }
    }
    tool("busybox-static", &mut command);
}

/// When the power goes.
#[derive(Debug, Clone)]
pub enum Cut {
    /// Some time after the console has shown a text.
    After(String, Duration),
    /// When a file appears.
    File(PathBuf),
}

/// A machine to run (tests/vm/run).
#[derive(Debug, Clone)]
pub struct Machine {
    /// The initramfs.
    pub initrd: PathBuf,
    /// A folder that becomes the system partition.
    pub system: Option<PathBuf>,
    /// The disk that is kept.
    pub disk: Option<PathBuf>,
    /// The socket of an NBD server in place of both.
    pub nbd: Option<PathBuf>,
    /// The state of the TPM.
    pub tpm: Option<PathBuf>,
    /// The series of the kernel.
    pub kernel: &'static str,
    /// More words for the kernel.
    pub cmdline: String,
    /// How long it may run; generous, as the machine that emulates it may have other work.
    pub timeout: Duration,
    /// Its memory, in MiB.
    pub memory: u32,
    /// When the power goes.
    pub cut: Option<Cut>,
}

impl Machine {
    /// A machine with nothing but an initramfs.
    pub fn new(initrd: &Path) -> Self {
        Self {
            initrd: initrd.into(),
            system: None,
            disk: None,
            nbd: None,
            tpm: None,
            kernel: "6.12",
            cmdline: String::new(),
            timeout: Duration::from_secs(600),
            memory: 512,
            cut: None,
        }
    }

    /// Runs it to its end. As many run at a time as there are processors, for each has one.
    pub fn run(&self) -> Ended {
        let mut command = script("run");
        command.arg("--initrd").arg(&self.initrd).args(["--kernel", self.kernel, "--cmdline", &self.cmdline]);
        command.args(["--memory", &self.memory.to_string()]);
        command.args(["--timeout", &self.timeout.as_secs().to_string()]);
        let paths = [
            ("--system", &self.system),
            ("--disk", &self.disk),
            ("--nbd", &self.nbd),
            ("--tpm-state", &self.tpm),
        ];
        for (option, path) in paths {
            if let Some(path) = path {
                command.arg(option).arg(path);
            }
        }
        match &self.cut {
            None => {}
            Some(Cut::After(text, delay)) => {
                let delay = format!("{:.3}", delay.as_secs_f64());
                command.args(["--power-cut", text, "--power-cut-after", &delay]);
            }
            Some(Cut::File(path)) => {
                command.arg("--power-cut-file").arg(path);
            }
        }
        let slot = Slot::take();
        let output = command.output().expect("tests/vm/run");
        drop(slot);
        let console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        println!("{console}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Ended { verdict: output.status.code().unwrap_or(-1), console }
    }

    /// Runs it, and wants this verdict and these words on the console.
    pub fn expect(&self, verdict: i32, words: &[&str]) -> Ended {
        let ended = self.run();
        assert_eq!(ended.verdict, verdict, "the verdict\n{}", ended.console);
        for word in words {
            assert!(ended.console.contains(word), "expected `{word}` on the console\n{}", ended.console);
        }
        ended
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code of tests/vm/run: the guest's verdict, or its own.
    pub verdict: i32,
    /// What the serial console showed.
    pub console: String,
}

impl Ended {
    /// Wants none of these words on the console.
    pub fn without(&self, words: &[&str]) {
        for word in words {
            assert!(!self.console.contains(word), "unexpected `{word}` on the console\n{}", self.console);
        }
    }

    /// What follows a word on the lines of the console that have it.
    pub fn after<'a>(&'a self, word: &str) -> Vec<&'a str> {
        self.console.lines().filter_map(|line| Some(line.split_once(word)?.1.trim())).collect()
    }
}

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// One of the machines that may run at a time.
struct Slot;

impl Slot {
    fn take() -> Self {
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        while *running >= most {
            running = ENDED.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        *running += 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}
