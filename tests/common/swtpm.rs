//! A TPM simulator of its own for a test: started on free ports, stopped when the guard is dropped.

#[path = "listening.rs"]
mod listening;

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mosfs::internals::sys::tpm::Tcti;
use tempfile::TempDir;

use listening::listens;

/// A running swtpm.
pub struct Swtpm {
    child: Child,
    port: u16,
    state: PathBuf,
    _own_state: Option<TempDir>,
}

/// Runs a tool to its end; a missing one fails the test and names the Debian package that has it.
pub fn run_tool(command: &mut Command, package: &str) -> Output {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {name}: {error}; install the Debian package `{package}`"))
}

impl Swtpm {
    /// A new TPM.
    pub fn start() -> Self {
        let state = tempfile::tempdir().expect("a temporary folder");
        let mut swtpm = Self::start_in(state.path());
        swtpm._own_state = Some(state);
        swtpm
    }

    /// The TPM whose state is in this folder: the same chip after a power cycle.
    pub fn start_in(state: &Path) -> Self {
        for _ in 0..200 {
            let Some(port) = free_pair() else { continue };
            let mut child = Command::new("swtpm")
                .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
                .arg("--tpmstate")
                .arg(format!("dir={}", state.display()))
                .arg("--server")
                .arg(format!("type=tcp,port={port},bindaddr=127.0.0.1"))
                .arg("--ctrl")
                .arg(format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| {
                    panic!("cannot run swtpm: {error}; install the Debian package `swtpm`")
                });
            let deadline = Instant::now() + Duration::from_secs(300);
            while Instant::now() < deadline {
                if [port, port + 1].iter().all(|port| listens(child.id(), *port)) {
                    return Self { child, port, state: state.to_path_buf(), _own_state: None };
                }
                // Another process took one of the ports meanwhile.
                if child.try_wait().expect("a child to ask for").is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(3));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("swtpm does not start; is the Debian package `swtpm` whole?");
    }

    /// The data channel's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How mosfs reaches it.
    pub fn tcti(&self) -> Tcti {
        Tcti::Tcp { host: "127.0.0.1".into(), port: self.port }
    }

    /// The same in words, for `--tpm`.
    pub fn tcti_text(&self) -> String {
        self.tcti().to_string()
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Power off, power on.
    pub fn restart(&mut self) {
        self.kill();
        let mut next = Self::start_in(&self.state);
        std::mem::swap(&mut self.child, &mut next.child);
        self.port = next.port;
        // `next` now holds the old child, which has ended.
    }

    /// Runs one of tpm2-tools against it.
    pub fn tool(&self, name: &str, arguments: &[impl AsRef<OsStr>]) -> Output {
        run_tool(
            Command::new(name)
                .args(arguments)
                .env("TPM2TOOLS_TCTI", format!("swtpm:host=127.0.0.1,port={}", self.port)),
            "tpm2-tools",
        )
    }

    /// The same, where it must succeed; gives its stdout.
    pub fn tool_ok(&self, name: &str, arguments: &[impl AsRef<OsStr>]) -> Vec<u8> {
        let output = self.tool(name, arguments);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// The handles of a kind that exist: `handles-transient`, `handles-loaded-session`, `handles-nv-index`.
    pub fn handles(&self, kind: &str) -> Vec<String> {
        let text = self.tool_ok("tpm2_getcap", &[kind]);
        String::from_utf8(text).expect("text").lines().map(|line| line.trim().to_string()).collect()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that is free together with the next one, for the moment.
///
/// None is given twice by one process, and none is among those that the kernel gives to connections: a test would
/// talk to another test's TPM.
fn free_pair() -> Option<u16> {
    const FIRST: u32 = 15_000;
    const PAIRS: u32 = 8_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(97);
    let pair = begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % PAIRS;
    let port = u16::try_from(FIRST + 2 * pair).ok()?;
    for port in [port, port + 1] {
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
    }
    Some(port)
}

/// Writes a private key as its owner alone may read it.
pub fn write_private(path: &Path, content: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, content).expect("a key to write");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("a mode to set");
}
