//! Debian's `docker-registry`, on a port of its own.

// tests/help.rs has this server and a TPM, and each of them brings it.
#[allow(clippy::duplicate_mod)]
#[path = "../common/listening.rs"]
mod listening;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use listening::listens;

/// A running registry; it ends when it is dropped.
pub struct Debian {
    child: Child,
    pub port: u16,
    dir: TempDir,
}

/// More of the configuration file, beside storage and address.
#[derive(Default)]
pub struct Config<'a> {
    /// A file of htpasswd.
    pub htpasswd: Option<&'a Path>,
    /// Certificate and key.
    pub tls: Option<(&'a Path, &'a Path)>,
    /// The registry that this one is a cache of.
    pub proxy_of: Option<String>,
}

impl Debian {
    pub fn start(config: &Config<'_>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("config.yml");
        let (child, port) = on_a_port("the Debian package `docker-registry`", |port| {
            let mut yaml = format!(
                "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n",
                dir.path().join("data").display()
            );
            yaml += &format!("http:\n  addr: 127.0.0.1:{port}\n  secret: s\n");
            if let Some((certificate, key)) = config.tls {
                yaml +=
                    &format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
            }
            if let Some(file) = config.htpasswd {
                yaml += &format!("auth:\n  htpasswd: {{realm: r, path: {}}}\n", file.display());
            }
            if let Some(origin) = &config.proxy_of {
                yaml += &format!("proxy: {{remoteurl: \"{origin}\"}}\n");
            }
            fs::write(&file, yaml).expect("a file");
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(&file);
            command
        });
        Self { child, port, dir }
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after [`Debian::kill`], at the same address and with what it had.
    #[allow(dead_code, reason = "the tests of lazy mounts use it")]
    pub fn start_again(&mut self) {
        self.child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.config())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry runs");
        assert!(is_up(&mut self.child, self.port), "docker-registry does not start again");
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `docker://127.0.0.1:PORT/` and what follows.
    pub fn source(&self, rest: &str) -> String {
        format!("docker://{}/{rest}", self.host())
    }

    /// The configuration file, for its garbage collection.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.yml")
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a server on a port of its own: `command` is for a port, and `package` has the program.
pub fn on_a_port(package: &str, command: impl Fn(u16) -> Command) -> (Child, u16) {
    // Another process may take the port between its choice and its use: then choose again.
    for _ in 0..10 {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let mut command = command(port);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap_or_else(|error| {
            panic!("cannot run {:?}: {error}; install {package}", command.get_program())
        });
        if is_up(&mut child, port) {
            return (child, port);
        }
    }
    panic!("the server does not start ({package})");
}

/// Waits until a process listens on a port; whether it does, or has ended.
fn is_up(child: &mut Child, port: u16) -> bool {
    loop {
        if let Ok(Some(_)) = child.try_wait() {
            return false;
        }
        if listens(child.id(), port) {
            return true;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
