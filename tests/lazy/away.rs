//! A registry that dies and comes back under a mount, and credentials that such a mount has.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use openssl::base64::encode_block;

use crate::debian::{Config, Debian};
use crate::fixture::{FILES, Lazy, wait_until};
use crate::place::{display, in_core_dumps, text};
use crate::server::{Fault, Options};

const EIO: i32 = 5;

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropped");
}

/// Set when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Debian's registry is killed and started again, twice. What is here is read throughout, from the disk and not from the
/// kernel's page cache.
#[test]
fn a_registry_that_is_killed_and_comes_back_disturbs_no_reader_of_what_is_here() {
    let lazy = Lazy::new();
    let mut registry = Debian::start(&Config::default());
    lazy.place.push(&registry.source("p"));
    let source = registry.source(&format!("p/mos/images/hostfs:{}", lazy.image.hex()));
    let mount = lazy.mount_of(&source, "m", &["--no-fill", "--net-timeout", "2"]);
    let here = [3, FILES - 1];
    for number in here {
        assert_eq!(mount.read(number), Ok(()), "{}", mount.log());
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // However this ends, so does the reader.
        let _end = Ends(&over);
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !over.load(Ordering::SeqCst) {
                drop_caches();
                for number in here {
                    assert_eq!(mount.read(number), Ok(()), "it is here");
                    reads += 1;
                }
            }
            reads
        });
        // In the middle of the upper layer, and of the lower one.
        for away in [17, 5] {
            registry.kill();
            assert_eq!(mount.read(away), Err(EIO));
            // It fails at once from now on.
            for _ in 0..3 {
                assert_eq!(mount.read(away), Err(EIO));
            }
            registry.start_again();
            wait_until("it recovers", || mount.read(away) == Ok(()));
        }
        over.store(true, Ordering::SeqCst);
        let reads = reader.join().expect("a reader");
        assert!(reads > 0);
        println!("{reads} reads of what was here");
    });
    mount.read_all();
    assert!(mount.log().contains("answers again"), "{}", mount.log());
}

/// A mount asks for new tokens all its life. None of them, nor the password, is in its log, its records below /run, its
/// cache, its core dumps, or what `mosfs status` prints.
#[test]
fn a_mount_keeps_no_password_and_no_token() {
    let options = Options { tokens: Some(("u:hunter2".into(), None)), ..Options::default() };
    let lazy = Lazy::served_by(options);
    let auth = encode_block(b"u:hunter2");
    let file = lazy.place.path("auth.json");
    fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, lazy.server.host())).unwrap();
    let options =
        ["-vv", "--authfile", &display(&file), "--no-fill", "--net-timeout", "2", "--progress-fd", "1"];
    let output = lazy.command(&lazy.source(), "m", &options).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut said = text(&output.stderr) + &text(&output.stdout);
    let mount = lazy.mounted("m");
    for number in 0..FILES / 2 {
        lazy.server.expire_tokens();
        assert_eq!(mount.read(number), Ok(()), "{}", mount.log());
    }
    let secrets = ["hunter2", "sesame", &auth];
    let dumped = in_core_dumps(&lazy.place, mount.pid(), &secrets);
    assert!(dumped.iter().all(|(shown, _)| *shown == 0), "{dumped:?}");
    assert!(dumped.iter().any(|(_, held)| *held > 0), "they are in its memory: {dumped:?}");
    // And what fails is written to the log.
    lazy.server.script(|seen, _| seen.header("range").map(|_| Fault::Answer(403, Vec::new(), Vec::new())));
    assert_eq!(mount.read(17), Err(EIO));
    assert!(mount.log().contains("403"), "{}", mount.log());
    said += &mount.log();
    said += &mount.status().to_string();
    said += &lazy.place.ok(&["status", "-vv", "--floor", "file"]);
    let tokens = lazy.server.take_log();
    assert!(tokens.iter().filter(|seen| seen.path.starts_with("/token")).count() >= 3);
    for secret in secrets {
        assert!(!said.contains(secret), "{secret} is shown: {said}");
        for folder in ["run", "cache"] {
            let found =
                Command::new("grep").args(["-rl", secret]).arg(lazy.place.path(folder)).output().unwrap();
            assert!(found.stdout.is_empty(), "{secret} is kept: {}", text(&found.stdout));
        }
    }
}
