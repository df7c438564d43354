//! nginx as a cache before a registry, as docs/registries.md has it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use tempfile::TempDir;

use crate::debian::on_a_port;

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
        let dir = tempfile::tempdir().expect("a folder");
        let (at, file) = (dir.path().display(), dir.path().join("nginx.conf"));
        let (child, port) = on_a_port("the Debian package `nginx`", |port| {
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
            // Only another process on the port makes it end.
            let log = fs::read_to_string(dir.path().join("error.log")).unwrap_or_default();
            assert!(log.is_empty() || log.contains("Address already in use"), "nginx: {log}");
            let mut command = Command::new("nginx");
            command.arg("-c").arg(&file).arg("-e").arg(dir.path().join("error.log"));
            command
        });
        Self { child, port, _dir: dir }
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
