//! nginx as a cache before a registry, as docs/registries.md has it.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::debian::listens;

/// A running cache; it ends when it is dropped.
pub struct Nginx {
    child: Child,
    port: u16,
    _dir: TempDir,
}

impl Nginx {
    /// A cache of the registry at `origin`, `http://HOST:PORT`.
    pub fn before(origin: &str) -> Self {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/registries.md");
        let page = fs::read_to_string(page).expect("the page");
        let (_, server) = page.split_once("```nginx\n").expect("a configuration");
        let (server, _) = server.split_once("```").expect("its end");
        for _ in 0..10 {
            let dir = tempfile::tempdir().expect("a folder");
            let port =
                TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
            let (at, file) = (dir.path().display(), dir.path().join("nginx.conf"));
            let mut text = server.to_string();
            // Its places and names in the page, and those of this test.
            for (from, to) in [
                ("/var/cache/nginx/registry", format!("{at}/cache")),
                ("https://registry.example.org", origin.to_string()),
                ("listen 5000;", format!("listen 127.0.0.1:{port};")),
            ] {
                assert!(text.contains(from), "{from}: {text}");
                text = text.replace(from, &to);
            }
            let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|name| format!("{name}_temp_path {at}/{name};\n"))
                .concat();
            let all = format!(
                "daemon off;\nuser root;\npid {at}/pid;\nerror_log {at}/error.log;\nevents {{}}\n\
                 http {{\naccess_log off;\n{temporary}{text}}}\n"
            );
            fs::write(&file, all).expect("a file");
            let mut child = Command::new("nginx")
                .arg("-c")
                .arg(&file)
                .arg("-e")
                .arg(dir.path().join("error.log"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| {
                    panic!("cannot run nginx: {error}; install the Debian package `nginx`")
                });
            loop {
                if let Ok(Some(status)) = child.try_wait() {
                    let log = fs::read_to_string(dir.path().join("error.log")).unwrap_or_default();
                    // Another process may have taken the port.
                    assert!(log.contains("Address already in use"), "nginx {status}: {log}");
                    break;
                }
                if listens(child.id(), port) {
                    return Self { child, port, _dir: dir };
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        panic!("nginx does not start");
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers end with it, which they do not after SIGKILL.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}
