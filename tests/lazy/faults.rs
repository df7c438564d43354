//! What goes wrong on the way, and what a reader sees of it: the right bytes, late, or an error; never others.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use mosfs::internals::digest::Digest;
use serde_json::Value;

use crate::fixture::{FILES, Lazy, is_mounted, wait_until};
use crate::place::text;
use crate::server::{Fault, Options, Seen, Server};
use crate::unmount::unmount;

const EIO: i32 = 5;
/// A file whose blocks are not among those that are fetched to mount: in the middle of the upper layer.
const AWAY: usize = 17;
/// A file whose blocks are: at the end of the upper layer.
const HERE: usize = FILES - 1;

/// The range that a request asks for: first and last byte.
fn range(seen: &Seen) -> Option<(u64, u64)> {
    let (first, last) = seen.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Which requests fail: every third one, but none for bytes that a failed one has asked for. So what is asked for again
/// comes, however the requests of readers and of the background mix.
#[derive(Default)]
struct EveryThird(Mutex<(usize, Vec<(String, u64, u64)>)>);

impl EveryThird {
    fn fails(&self, seen: &Seen) -> bool {
        let Some((first, last)) = range(seen) else { return false };
        let mut state = self.0.lock().unwrap();
        let (count, failed) = &mut *state;
        if failed.iter().any(|(path, from, to)| *path == seen.path && first <= *to && *from <= last) {
            return false;
        }
        *count += 1;
        let fails = *count % 3 == 2;
        if fails {
            failed.push((seen.path.clone(), first, last));
        }
        fails
    }
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

#[test]
fn a_registry_that_sends_wrong_bytes_now_and_then_is_asked_again() {
    let lazy = Lazy::new();
    // Every third part has one wrong byte.
    let third = EveryThird::default();
    lazy.server.script(move |seen, _| {
        let (first, last) = range(seen)?;
        third.fails(seen).then_some(Fault::Flip((last - first) / 2))
    });
    let mount = lazy.mount("m");
    mount.read_all();
    assert!(mount.log().contains("do not verify; fetching them again"), "{}", mount.log());
    assert_eq!(mount.status()["daemon"]["errors"]["verity"], 0);
}

#[test]
fn a_registry_that_always_lies_about_a_block_gets_its_readers_an_error_and_no_wrong_byte() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    let wrong = lazy.layers[0].size / 2;
    let layer = lazy.layers[0].digest;
    lazy.server.script(move |seen, _| {
        let (first, last) = range(seen).filter(|_| seen.gets(&layer))?;
        (first..=last).contains(&wrong).then(|| Fault::Flip(wrong - first))
    });
    let outcomes: Vec<_> = (0..FILES).map(|number| mount.read(number)).collect();
    let failed = outcomes.iter().filter(|outcome| **outcome == Err(EIO)).count();
    assert_eq!(failed, 1, "one file has that block: {outcomes:?}");
    assert!(mount.log().contains("verity: block"), "{}", mount.log());
    let asked = lazy.parts(&lazy.server.take_log()).len();
    // A bounded number of times: further reads fail without asking.
    for _ in 0..3 {
        let again: Vec<_> = (0..FILES).map(|number| mount.read(number)).collect();
        assert_eq!(again, outcomes);
    }
    assert!(lazy.parts(&lazy.server.take_log()).len() <= asked);
    assert_eq!(mount.status()["health"], "errors");
}

/// One wrong byte somewhere in each piece of each layer, superblocks, tables and trees among them.
#[test]
fn wherever_a_byte_is_wrong_a_reader_gets_the_right_ones_or_an_error() {
    let lazy = Lazy::new();
    let steps = if std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long") { 400 } else { 12 };
    for layer in &lazy.layers {
        let digest = layer.digest;
        for step in 0..steps {
            // Both ends too.
            let wrong = (layer.size - 1) * step / (steps - 1);
            lazy.server.script(move |seen, _| {
                let (first, last) = range(seen).filter(|_| seen.gets(&digest))?;
                (first..=last).contains(&wrong).then(|| Fault::Flip(wrong - first))
            });
            let _ = fs::remove_dir_all(lazy.cache());
            let output =
                lazy.command(&lazy.source(), "m", &["--no-fill", "--net-timeout", "2"]).output().unwrap();
            if !output.status.success() {
                // The parts that are read to mount at all.
                assert_eq!(output.status.code(), Some(3), "at {wrong}: {}", text(&output.stderr));
                continue;
            }
            // `read` compares what it gets.
            let at = lazy.place.path("m").canonicalize().unwrap();
            for number in 0..FILES {
                if let Ok(bytes) = fs::read(at.join(format!("d{}/f{number}", number % 4))) {
                    assert!(bytes == crate::fixture::content(number).as_bytes(), "at {wrong}: file {number}");
                }
            }
            unmount(Command::new("umount").arg(&at));
            wait_until("it is unmounted", || !is_mounted(&at));
        }
    }
}

#[test]
fn a_mirror_that_lies_is_passed_over() {
    let lazy = Lazy::new();
    let mirror = Server::start(Options::default());
    crate::place::load(&lazy.place.publisher.store(), 200, "p", &mirror);
    mirror.script(|seen, _| range(seen).map(|(first, last)| Fault::Flip((last - first) / 2)));
    let conf = format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        lazy.server.host(),
        mirror.host()
    );
    fs::write(lazy.place.path("registries.conf"), conf).unwrap();
    let mount = lazy.mount("m");
    mount.read_all();
    assert!(!lazy.parts(&mirror.take_log()).is_empty(), "the mirror is asked first");
    assert!(!lazy.parts(&lazy.server.take_log()).is_empty(), "the registry itself is asked again");
}

#[test]
fn while_the_network_stalls_what_is_here_is_read_and_the_rest_fails_in_time_and_recovers() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    assert_eq!(mount.read(HERE), Ok(()));
    lazy.server.script(|seen, _| range(seen).map(|_| Fault::Stall(10)));
    thread::scope(|scope| {
        // More readers than the daemon has threads for requests.
        let readers: Vec<_> = [AWAY, 1, 4, 5, 8, 13, 16, 20]
            .into_iter()
            .map(|number| {
                let mount = &mount;
                scope.spawn(move || mount.read(number))
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        drop_caches();
        // Answered while the others wait.
        assert_eq!(mount.read(HERE), Ok(()));
        let listed = Command::new("ls").arg("-lR").arg(&mount.at).output().unwrap();
        assert!(listed.status.success());
        for reader in readers {
            assert_eq!(reader.join().unwrap(), Err(EIO));
        }
    });
    let log = mount.log();
    assert!(log.contains("reads of what is not here fail until docker://"), "{log}");
    assert!(log.contains("silent"), "{log}");
    let layers = mount.status()["lazy"].clone();
    wait_until("status says that the source does not answer", || {
        mount.status()["lazy"].as_array().unwrap().iter().any(|layer| layer["state"] == "offline")
    });
    assert!(layers.to_string().contains("partial") || layers.to_string().contains("offline"), "{layers}");
    lazy.server.heal();
    wait_until("it recovers", || mount.read(AWAY) == Ok(()));
    mount.read_all();
    assert!(mount.log().contains("answers again"), "{}", mount.log());
}

#[test]
fn a_server_that_goes_away_and_comes_back() {
    let lazy = Lazy::new();
    let mount = lazy.mount_with("m", &[]);
    lazy.server.script(|_, _| Some(Fault::Cut(0)));
    // Whatever came before stays; nothing is wrong.
    let outcomes: Vec<_> = (0..FILES).map(|number| mount.read(number)).collect();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(EIO))));
    lazy.server.heal();
    // Without a reader: the background finds out.
    wait_until("the image is whole", || lazy.is_whole(0) && lazy.is_whole(1));
    mount.read_all();
}

#[test]
fn a_cut_a_drip_and_a_busy_server_are_waited_out() {
    let lazy = Lazy::new();
    let count = Arc::new(AtomicUsize::new(0));
    lazy.server.script(move |seen, _| {
        let (first, last) = range(seen)?;
        match count.fetch_add(1, Ordering::SeqCst) % 5 {
            0 => Some(Fault::Cut((last - first) / 3)),
            1 => Some(Fault::Answer(503, vec![("Retry-After", "1000000000".into())], Vec::new())),
            2 => Some(Fault::Answer(429, Vec::new(), Vec::new())),
            _ => None,
        }
    });
    let mount = lazy.mount_with("m", &["--no-fill", "--net-timeout", "20"]);
    mount.read_all();
    // One byte a second would take days.
    lazy.server.script(|seen, _| range(seen).map(|_| Fault::Drip(100, Duration::from_millis(400))));
    fs::remove_dir_all(lazy.cache()).unwrap();
    drop(mount);
    let begun = Instant::now();
    let output = lazy.command(&lazy.source(), "m2", &["--net-timeout", "2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(begun.elapsed() < Duration::from_secs(120));
}

#[test]
fn answers_that_are_not_what_was_asked_for_are_refused() {
    for fault in [
        Fault::Header("Content-Range", "bytes 0-1/2".into()),
        Fault::Header("Content-Range", "bytes */*".into()),
        Fault::Header("Content-Encoding", "gzip".into()),
        Fault::Answer(206, Vec::new(), vec![0; 10]),
        Fault::Answer(416, Vec::new(), Vec::new()),
        Fault::Answer(404, Vec::new(), Vec::new()),
        Fault::Shorter(7),
        Fault::Longer(u64::MAX),
    ] {
        let lazy = Lazy::new();
        let mount = lazy.mount("m");
        let bad = fault.clone();
        lazy.server.script(move |seen, _| range(seen).map(|_| bad.clone()));
        let last = mount.read(AWAY);
        // More than was asked for is not read.
        let expected = if matches!(fault, Fault::Longer(_)) { Ok(()) } else { Err(EIO) };
        assert_eq!(last, expected, "{}", mount.log());
        lazy.server.heal();
        wait_until("it recovers", || mount.read(AWAY) == Ok(()));
    }
}

#[test]
fn a_server_without_ranges_sends_all_and_it_is_said() {
    let lazy = Lazy::new();
    lazy.server.script(|seen, _| range(seen).map(|_| Fault::NoRange));
    let mount = lazy.mount("m");
    mount.read_all();
    assert_eq!(mount.status()["lazy"][0]["have"], lazy.layers[0].size);
    wait_until("they are blobs", || lazy.is_whole(0) && lazy.is_whole(1));
}

#[test]
fn a_token_that_ends_is_renewed() {
    let tokens = Options { tokens: Some((String::new(), None)), ..Options::default() };
    let lazy = Lazy::served_by(tokens);
    let mount = lazy.mount("m");
    for number in 0..FILES {
        lazy.server.expire_tokens();
        assert_eq!(mount.read(number), Ok(()), "{}", mount.log());
    }
}

#[test]
fn what_the_background_is_refused_refuses_no_reader() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    // What is read ahead, and the rest: more than a reader waits for at a time.
    let refused = Arc::new(AtomicUsize::new(0));
    let count = refused.clone();
    lazy.server.script(move |seen, _| {
        let (first, last) = range(seen)?;
        let is_background = last - first >= 160 << 10;
        is_background.then(|| {
            count.fetch_add(1, Ordering::SeqCst);
            Fault::Answer(404, Vec::new(), Vec::new())
        })
    });
    mount.read_all();
    assert!(refused.load(Ordering::SeqCst) > 0);
    // It is tried again.
    lazy.server.heal();
    wait_until("they are blobs", || lazy.is_whole(0) && lazy.is_whole(1));
}

#[test]
fn a_redirect_is_followed_and_one_that_has_ended_is_asked_for_again() {
    let lazy = Lazy::new();
    let other = Server::start(Options::default());
    crate::place::load(&lazy.place.publisher.store(), 200, "p", &other);
    let to = other.url();
    lazy.server.script(move |seen, _| {
        range(seen)?;
        Some(Fault::Answer(307, vec![("Location", format!("{to}{}", seen.path))], Vec::new()))
    });
    // Signed links end: every third is refused.
    let third = EveryThird::default();
    other.script(move |seen, _| third.fails(seen).then(|| Fault::Answer(403, Vec::new(), Vec::new())));
    let mount = lazy.mount("m");
    mount.read_all();
    assert!(other.take_log().iter().all(|seen| seen.header("authorization").is_none()));
}

#[test]
fn a_daemon_that_is_killed_loses_nothing_that_was_fetched() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    for number in 0..FILES / 2 {
        assert_eq!(mount.read(number), Ok(()));
    }
    mount.kill("-KILL");
    drop(mount);
    lazy.server.take_log();
    let again = lazy.mount("m");
    for number in 0..FILES / 2 {
        assert_eq!(again.read(number), Ok(()));
    }
    let log = lazy.server.take_log();
    // What of the last window was still on its way may come again.
    assert!(lazy.fetched(&log) < lazy.size() / 4, "{} bytes came again", lazy.fetched(&log));
    again.read_all();
}

#[test]
fn what_a_crash_has_left_wrong_is_fetched_again() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    mount.read_all();
    mount.unmount();
    // Blocks that the disk lost: zeros, where the file has data. And a file that is too long.
    for layer in 0..2 {
        let path = lazy.part(layer);
        let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
        for at in (0..lazy.layers[layer].size).step_by(100_000) {
            file.write_all_at(&[0; 5000], at).unwrap();
        }
        file.set_len(lazy.layers[layer].size + 5).unwrap();
    }
    lazy.server.take_log();
    let mount = lazy.mount_with("m", &[]);
    mount.read_all();
    wait_until("the image is whole", || lazy.is_whole(0) && lazy.is_whole(1));
    lazy.place.ok(&["verify", &format!("oci:{}", lazy.cache().display())]);
}

#[test]
fn two_mounts_share_what_is_fetched_and_one_completes_it() {
    let lazy = Lazy::new();
    let one = lazy.mount("one");
    one.read_all();
    lazy.server.take_log();
    let other = lazy.mount("other");
    other.read_all();
    assert_eq!(lazy.fetched(&lazy.server.take_log()), 0);
    // Both complete it at the same time: the cache has what a mount reads itself, and nothing else comes before both are
    // mounted.
    drop((one, other));
    fs::remove_dir_all(lazy.cache()).unwrap();
    drop(lazy.mount("one"));
    lazy.server.script(|seen, _| range(seen).map(|_| Fault::Stall(10)));
    let (one, other) = (lazy.mount_with("one", &[]), lazy.mount_with("other", &[]));
    lazy.server.heal();
    thread::scope(|scope| {
        scope.spawn(|| one.read_all());
        scope.spawn(|| other.read_all());
    });
    wait_until("the image is whole", || lazy.is_whole(0) && lazy.is_whole(1));
    for mount in [&one, &other] {
        drop_caches();
        mount.read_all();
        wait_until("both know", || {
            mount.status()["lazy"].as_array().unwrap().iter().all(|layer| layer["state"] == "complete")
        });
    }
    lazy.place.ok(&["verify", &format!("oci:{}", lazy.cache().display())]);
}

#[test]
fn a_full_disk_keeps_nothing_and_stops_no_reader() {
    let lazy = Lazy::new();
    let cache = lazy.cache();
    fs::create_dir_all(&cache).unwrap();
    let made = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&cache).status();
    assert!(made.unwrap().success());
    {
        let mount = lazy.mount_with("m", &[]);
        mount.read_all();
        drop_caches();
        mount.read_all();
        assert!(mount.log().contains("cannot be kept"), "{}", mount.log());
        assert!(!lazy.is_whole(0) && !lazy.is_whole(1));
        mount.unmount();
    }
    wait_until("the daemon has left it", || {
        Command::new("umount").arg(&cache).stderr(Stdio::null()).status().unwrap().success()
    });
}

#[test]
fn an_unmount_while_readers_wait_ends_the_daemon_in_time() {
    let lazy = Lazy::new();
    for how in ["umount -l", "-TERM"] {
        let mount = lazy.mount("m");
        let pid = mount.pid();
        lazy.server.script(|seen, _| range(seen).map(|_| Fault::Stall(10)));
        let mut reader = Command::new("cat")
            .arg(mount.file(AWAY))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(300));
        match how {
            "-TERM" => mount.kill("-TERM"),
            _ => assert!(Command::new("umount").arg("-l").arg(&mount.at).status().unwrap().success()),
        }
        wait_until("it is gone", || !is_mounted(&mount.at));
        assert!(!reader.wait().unwrap().success(), "{how}");
        wait_until("the daemon has ended", || mosfs::internals::sys::process::started_at(pid).is_none());
        lazy.server.heal();
    }
}

#[test]
fn a_reader_that_is_killed_leaves_at_once() {
    let lazy = Lazy::new();
    let mount = lazy.mount_with("m", &["--no-fill", "--net-timeout", "60"]);
    lazy.server.script(|seen, _| range(seen).map(|_| Fault::Stall(10)));
    let mut reader = Command::new("cat").arg(mount.file(AWAY)).stdout(Stdio::null()).spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    reader.kill().unwrap();
    reader.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(50), "it waited for the network");
    // Nor does the mount hang now.
    lazy.server.heal();
    assert_eq!(mount.read(HERE), Ok(()));
}

#[test]
fn dm_verity_needs_the_whole_image_and_says_so() {
    let lazy = Lazy::new();
    let output = lazy.command(&lazy.source(), "m", &["--backend", "dm-verity"]).output().unwrap();
    crate::place::refused(
        &output,
        1,
        &["backend dm-verity is not available", "is fetched while it is read, which takes the fuse backend"],
    );
    let output = lazy.command(&lazy.source(), "m", &["--unsafe-no-verity"]).output().unwrap();
    crate::place::refused(&output, 1, &["an image is verified while it is fetched; pull it first"]);
    assert_eq!(lazy.parts(&lazy.server.take_log()).len(), 0);
}

#[test]
fn an_image_that_nothing_verifies_is_refused_before_any_of_it_comes() {
    let lazy = Lazy::new();
    let manifest = lazy.place.publisher.store().get(&lazy.image, 1 << 20).unwrap();
    let mut plain: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for layer in plain["layers"].as_array_mut().unwrap() {
        layer.as_object_mut().unwrap().remove("annotations");
    }
    let bytes = serde_json::to_vec(&plain).unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    lazy.server.put_manifest("p/mos/images/hostfs", "plain", media_type, &bytes);
    let source = lazy.server.source("p/mos/images/hostfs:plain");
    let output = lazy.command(&source, "m", &[]).output().unwrap();
    crate::place::refused(&output, 3, &["has no root hash: it cannot be verified"]);
    assert_eq!(lazy.parts(&lazy.server.take_log()).len(), 0);
}

/// Mounts what a manifest of the registry's describes. No size of it is anybody's promise.
#[test]
fn sizes_that_a_registry_makes_up_are_refused_before_memory_is_taken_for_them() {
    let lazy = Lazy::new();
    let repository = "p/mos/images/hostfs";
    let good = lazy.server.manifest(repository, &lazy.image.to_string()).expect("the manifest");
    let mut large: Value = serde_json::from_slice(&good).unwrap();
    let digest = lazy.layers[1].digest;
    let layers = large["layers"].as_array_mut().unwrap();
    let layer = layers.iter_mut().find(|one| one["digest"] == digest.to_string()).expect("the layer");
    // Every number that a manifest may have.
    layer["size"] = ((1_u64 << 53) - 1).into();
    let chunked = |metadata: u64, chunk: u64| {
        let mut manifest: Value = serde_json::from_slice(&good).unwrap();
        let listed = |kind: &str, size: u64| {
            let digest = Digest::of(kind.as_bytes());
            serde_json::json!({
                "mediaType": format!("application/vnd.puzzlefs.image.{kind}.v1"), "digest": digest, "size": size,
            })
        };
        manifest["layers"] = vec![listed("rootfs", metadata), listed("filedata", chunk)].into();
        manifest
    };
    let rootfs = Digest::of(b"rootfs");
    let filedata = Digest::of(b"filedata");
    let huge = (1_u64 << 53) - 1;
    let cases = [
        (large, format!("{digest} has {huge} bytes, more than the 1099511627776 allowed")),
        (chunked(huge, 9), format!("{rootfs} has {huge} bytes, more than the 268435456 allowed")),
        (chunked(9, huge), format!("{filedata} has {huge} bytes, more than the 1048576 allowed")),
    ];
    for (manifest, expected) in cases {
        let bytes = serde_json::to_vec(&manifest).unwrap();
        lazy.server.put_manifest(repository, "large", "application/vnd.oci.image.manifest.v1+json", &bytes);
        let source = lazy.server.source(&format!("{repository}:large"));
        let output = lazy.command(&source, "m", &["--net-timeout", "2"]).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&expected), "expected {expected:?}: {said}");
        assert!(!is_mounted(&lazy.place.path("m")));
    }
}
