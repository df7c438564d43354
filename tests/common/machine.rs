//! Virtual machines for tests: what tests/vm offers, from Rust.

#![allow(dead_code)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
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
    IMAGE.get_or_init(|| debian_image_of(&mut script("debian-root")))
}

/// The same of Debian 13, whatever this machine runs.
pub fn debian_13_image() -> PathBuf {
    debian_image_of(script("debian-root").env("MOSFS_VM_SUITE", "trixie"))
}

fn debian_image_of(debian_root: &mut Command) -> PathBuf {
    // On Debian 13, both are the same.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let root = script_path(debian_root.arg("hostfs"));
    let image = root.with_extension("squashfs");
    if !image.exists() {
        let part = image.with_extension("part");
        let _ = fs::remove_file(&part);
        squashfs(&root, &part, &[]);
        fs::rename(&part, &image).expect("rename");
    }
    image
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

/// Makes the initramfs of a real generator for one of Debian's kernels, which trusts what `config` says.
pub fn make_initrd(out: &Path, generator: &str, kernel: &str, config: &Path) {
    let mut command = script("make-initrd");
    command.arg(generator).arg(out).args(["--mosfs", env!("CARGO_BIN_EXE_mosfs-full"), "--kernel", kernel]);
    tool("", command.arg("--config").arg(config));
}

/// The one in the middle.
pub fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
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
    /// The variables of UEFI firmware, which starts what is on the disk in place of the initramfs.
    pub uefi: Option<PathBuf>,
    /// Whether that firmware enforces Secure Boot.
    pub secure_boot: bool,
    /// An install medium, and how it is attached: `cd`, `disk` or `usb`.
    pub medium: Option<(PathBuf, &'static str)>,
    /// Whether the firmware tries the medium before the disk.
    pub medium_first: bool,
    /// More disks, whose changes are lost.
    pub second: Vec<PathBuf>,
    /// More disks, whose changes are kept.
    pub kept: Vec<PathBuf>,
    /// Whether it has a watchdog, which restarts it.
    pub watchdog: bool,
    /// What the firmware says is its UUID.
    pub uuid: Option<&'static str>,
    /// What is run on the host: after which text on the console, and which command.
    pub host: Vec<(&'static str, String)>,
    /// What is typed on the console: after which text, and which line.
    pub typed: Vec<(&'static str, &'static str)>,
    /// What the machine's clock says at its start.
    pub rtc: Option<&'static str>,
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
            uefi: None,
            secure_boot: false,
            medium: None,
            medium_first: false,
            second: Vec::new(),
            kept: Vec::new(),
            watchdog: false,
            uuid: None,
            host: Vec::new(),
            typed: Vec::new(),
            rtc: None,
            kernel: "6.12",
            cmdline: String::new(),
            timeout: Duration::from_secs(1800),
            memory: 512,
            cut: None,
        }
    }

    /// Runs it to its end. One more runs at a time than there are processors: each has one, and some wait for a disk.
    ///
    /// A machine that its emulator let down (see [`Ended::let_down`]) is put back to what it was before and started again,
    /// some times, and says so. One whose power is cut, or whose disk is not a file, is not: its test knows more.
    pub fn run(&self) -> Ended {
        if self.cut.is_some() || self.nbd.is_some() {
            return self.run_once();
        }
        let before = Before::new(self.tpm.as_deref(), self.disk.as_deref());
        for restart in 1.. {
            let ended = self.run_once();
            let Some(reason) = ended.let_down().filter(|_| restart <= RESTARTS) else { return ended };
            say_restart(reason, restart);
            before.put_back();
        }
        unreachable!("it returns after the last restart")
    }

    /// Runs it to its end, whatever its Linux says of the TPM.
    pub fn run_once(&self) -> Ended {
        self.watch(|_| {})
    }

    /// The same; hands over each line of its console as it comes.
    pub fn watch(&self, mut see: impl FnMut(&str)) -> Ended {
        let slot = Slot::take();
        let mut command = self.command();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tests/vm/run");
        let mut console = String::new();
        for line in BufReader::new(child.stdout.take().expect("the console")).split(b'\n') {
            let line = String::from_utf8_lossy(&line.expect("a line")).replace('\r', "");
            see(&line);
            console += &line;
            console.push('\n');
        }
        let output = child.wait_with_output().expect("tests/vm/run");
        drop(slot);
        println!("{console}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Ended { verdict: output.status.code().unwrap_or(-1), console }
    }

    fn command(&self) -> Command {
        let mut command = script("run");
        command.arg("--initrd").arg(&self.initrd).args(["--kernel", self.kernel, "--cmdline", &self.cmdline]);
        command.args(["--memory", &self.memory.to_string()]);
        command.args(["--timeout", &self.timeout.as_secs().to_string()]);
        let paths = [
            ("--system", &self.system),
            ("--disk", &self.disk),
            ("--nbd", &self.nbd),
            ("--tpm-state", &self.tpm),
            ("--uefi", &self.uefi),
        ];
        if self.secure_boot {
            command.args(["--secure-boot", "yes"]);
        }
        if let Some((path, kind)) = &self.medium {
            command.arg("--medium").arg(path).args(["--medium-as", kind]);
        }
        for disk in &self.second {
            command.arg("--second").arg(disk);
        }
        for disk in &self.kept {
            command.arg("--kept").arg(disk);
        }
        if self.watchdog {
            command.args(["--watchdog", "yes"]);
        }
        if let Some(uuid) = self.uuid {
            command.args(["--uuid", uuid]);
        }
        for (after, script) in &self.host {
            command.args(["--run-after", after, "--run", script]);
        }
        for (after, line) in &self.typed {
            command.args(["--type-after", after, "--type", line]);
        }
        if self.medium_first {
            command.args(["--medium-first", "yes"]);
        }
        if let Some(rtc) = self.rtc {
            command.args(["--rtc", rtc]);
        }
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
        command
    }

    /// Runs it, and wants this verdict and these words on the console.
    pub fn expect(&self, verdict: i32, words: &[&str]) -> Ended {
        let ended = self.run();
        ended.expect(verdict, words);
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

/// The exit code of tests/vm/run for a machine that stopped without a verdict.
const NO_VERDICT: i32 = 125;

/// How often a machine that its emulator let down is started again.
pub const RESTARTS: u32 = 5;

/// Says why a machine starts again, and how often any has in this program.
pub fn say_restart(reason: &str, restart: u32) {
    static ALL: AtomicU32 = AtomicU32::new(0);
    let all = 1 + ALL.fetch_add(1, Ordering::Relaxed);
    println!("FIGURE {reason}: this machine starts again ({restart}), {all} restarts in all");
}

/// What a machine changes and keeps, as it was before it ran.
pub struct Before {
    tpm: Option<PathBuf>,
    state: Vec<(PathBuf, Vec<u8>)>,
    disk: Option<(PathBuf, Option<PathBuf>)>,
}

impl Before {
    /// Remembers the state of a TPM, and a disk, which there may not be yet.
    pub fn new(tpm: Option<&Path>, disk: Option<&Path>) -> Self {
        let list = tpm.and_then(|tpm| fs::read_dir(tpm).ok());
        let files = list.map(|list| list.map(|entry| entry.expect("an entry").path()));
        let state = files.into_iter().flatten().filter(|path| path.is_file());
        let state = state.map(|path| (path.clone(), fs::read(path).expect("the state of the TPM"))).collect();
        let disk = disk.map(|disk| {
            let copy = disk.exists().then(|| disk.with_extension("before"));
            if let Some(copy) = &copy {
                copy_disk(disk, copy);
            }
            (disk.to_path_buf(), copy)
        });
        Self { tpm: tpm.map(Path::to_path_buf), state, disk }
    }

    /// Puts all of it back.
    pub fn put_back(&self) {
        for entry in self.tpm.iter().flat_map(|tpm| fs::read_dir(tpm).expect("the TPM's folder")) {
            fs::remove_file(entry.expect("an entry").path()).expect("remove the state of the TPM");
        }
        for (path, bytes) in &self.state {
            fs::write(path, bytes).expect("write the state of the TPM");
        }
        match &self.disk {
            None => {}
            Some((disk, Some(copy))) => copy_disk(copy, disk),
            Some((disk, None)) => drop(fs::remove_file(disk)),
        }
    }
}

fn copy_disk(from: &Path, to: &Path) {
    tool("coreutils", Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to));
}

impl Drop for Before {
    fn drop(&mut self) {
        if let Some((_, Some(copy))) = &self.disk {
            let _ = fs::remove_file(copy);
        }
    }
}

impl Ended {
    /// What the emulator did to this machine, if that is why it ended so.
    pub fn let_down(&self) -> Option<&'static str> {
        if self.gave_up_on_the_tpm() {
            return Some("Linux gave up on the TPM");
        }
        if self.lost_its_tpm_before_it_ran() {
            return Some("QEMU lost its connection to the TPM");
        }
        self.crashed_at_its_start().then_some("Linux crashed before it ran a program")
    }

    /// Whether QEMU ended before it ran anything, as swtpm had closed their connection.
    ///
    /// Seen once with swtpm 0.7 beside much other work, before it had answered which commands it knows.
    fn lost_its_tpm_before_it_ran(&self) -> bool {
        self.verdict == NO_VERDICT && self.console.starts_with("\nqemu-system-x86_64: -tpmdev emulator,")
    }

    /// Whether Linux panicked in the function that starts it, before the first program: nothing of mosfs had a part in that.
    ///
    /// Seen once with QEMU 7.2 beside much other work, while Linux replaced an instruction (a static key).
    /// A machine that started a second time had run before.
    fn crashed_at_its_start(&self) -> bool {
        let starts = |line: &str| self.console.matches(line).count();
        self.verdict == NO_VERDICT
            && self.console.contains("Kernel panic - not syncing")
            && self.console.contains(" start_kernel+0x")
            && starts("] Linux version ") <= 1
            && starts("BdsDxe: starting ") <= 1
    }

    /// Whether Linux stopped waiting for an answer of the TPM.
    ///
    /// It allows 750 ms for TPM2_GetCapability, TPM2_PCR_Extend and TPM2_Startup, and 2 s for TPM2_NV_Read
    /// (drivers/char/tpm/tpm2-cmd.c), in 6.1 and in 6.12, and no parameter of tpm_crb or tpm_tis changes that. An
    /// emulated machine reaches these when the host stops it for that long, even where the answer is there by then.
    fn gave_up_on_the_tpm(&self) -> bool {
        self.console.lines().any(|line| line.ends_with("tpm tpm0: Operation Timed out"))
    }

    /// Wants this verdict and these words on the console.
    pub fn expect(&self, verdict: i32, words: &[&str]) {
        assert_eq!(self.verdict, verdict, "the verdict\n{}", self.console);
        for word in words {
            assert!(self.console.contains(word), "expected `{word}` on the console\n{}", self.console);
        }
    }

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
        let most = std::thread::available_parallelism().map_or(1, usize::from) + 1;
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

#[test]
fn a_machine_that_was_let_down_is_put_back() {
    let reason = |verdict, console: &str| Ended { verdict, console: console.into() }.let_down();
    let tpm = Some("Linux gave up on the TPM");
    assert_eq!(reason(5, "a\n[    7.840498] tpm tpm0: Operation Timed out\nb"), tpm);
    assert_eq!(reason(5, "tpm tpm0: Operation Canceled\nmosfs: Operation Timed out\n"), None);
    let panic = "[    0.904271] Kernel panic - not syncing: Attempted to kill";
    let trace =
        |function: &str| format!("[    0.904271] Call Trace:\n[    0.904271]  ? {function}+0x5f4/0x8d0\n");
    let crash = Some("Linux crashed before it ran a program");
    assert_eq!(reason(125, &format!("{}{panic} the idle task!\n", trace("start_kernel"))), crash);
    // One that crashed later, one whose init ended, one that went on, and those that started before.
    assert_eq!(reason(125, &format!("{}{panic} init!\n", trace("do_exit"))), None);
    assert_eq!(reason(125, &format!("{panic} init! exitcode=0x00000100\n")), None);
    assert_eq!(reason(0, &trace("start_kernel")), None);
    for start in ["[    0.000000] Linux version 6.12\n", "BdsDxe: starting Boot0001\n"] {
        let twice = format!("{start}{start}{}{panic} the idle task!\n", trace("start_kernel"));
        assert_eq!(reason(125, &twice), None);
        assert_eq!(reason(125, twice.strip_prefix(start).expect("the first start")), crash);
    }

    let lost = "\nqemu-system-x86_64: -tpmdev emulator,id=tpm0,chardev=chrtpm: 'chrtpm' is not emulating TPM device.\n";
    assert_eq!(reason(125, lost), Some("QEMU lost its connection to the TPM"));
    assert_eq!(reason(125, &format!("[    0.000000] Linux version 6.12\n{lost}")), None);

    let dir = tempfile::tempdir().expect("a folder");
    let (tpm, disk) = (dir.path().join("tpm"), dir.path().join("disk.qcow2"));
    fs::create_dir(&tpm).expect("a folder");
    fs::write(tpm.join("state"), "before").expect("a file");
    let new = Before::new(Some(&tpm), Some(&disk));
    fs::write(&disk, "made by the machine").expect("a file");
    let kept = Before::new(Some(&tpm), Some(&disk));
    for name in ["state", "another"] {
        fs::write(tpm.join(name), "after").expect("a file");
    }
    fs::write(&disk, "changed by the machine").expect("a file");
    kept.put_back();
    assert_eq!(fs::read_to_string(&disk).expect("the disk"), "made by the machine");
    assert_eq!(fs::read_to_string(tpm.join("state")).expect("the state"), "before");
    assert!(!tpm.join("another").exists());
    drop(kept);
    new.put_back();
    assert!(!disk.exists());
    drop(new);
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1, "no copy stays");
}
