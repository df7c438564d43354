//! Kills in the middle of a pull, an install, an update and a push: the next run finishes, and no blob that
//! was complete is fetched again. Then many devices through one cache.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::store::Store;

use crate::debian::{Config, Debian};
use crate::place::{Place, display, layers_of, load, text};
use crate::server::{Options, Server};

fn is_long() -> bool {
    std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long")
}

const SIGKILL: i32 = 9;

/// A registry with version 200 of several layers.
fn served(layers: &[usize]) -> (Place, Server, Vec<Descriptor>) {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, layers);
    let store = place.publisher.store();
    load(&store, 200, "p", &server);
    let layers = layers_of(&store, 200);
    (place, server, layers)
}

/// The blobs that are complete in a store.
fn complete(store: &std::path::Path) -> BTreeSet<String> {
    let entries = fs::read_dir(store.join("blobs/sha256")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// How much of a blob an interrupted run has left.
fn part(store: &std::path::Path, digest: &Digest) -> u64 {
    fs::metadata(store.join(".mosfs/partial").join(digest.hex())).map_or(0, |data| data.len())
}

/// Runs a command that is killed at a failpoint; whether it was.
fn killed_at(command: &mut Command, point: &str) -> bool {
    let output = command.env("MOSFS_FAILPOINT", point).output().unwrap();
    let killed = output.status.signal() == Some(SIGKILL);
    assert!(killed || output.status.success(), "{point}: {}", text(&output.stderr));
    killed
}

#[test]
fn a_pull_that_is_killed_again_and_again_finishes() {
    let (place, server, layers) = served(&[900_000, 700_000, 500_000, 300_000, 100_000]);
    let (store, source) = (place.path("copy"), server.source("p"));
    let args = ["pull", &source, "--store", &display(&store)];
    let mut before = BTreeSet::new();
    let mut kills = 0;
    loop {
        let parts: Vec<_> = layers.iter().map(|layer| (layer.digest, part(&store, &layer.digest))).collect();
        server.take_log();
        // Each run gets a little further: three pieces, then a kill.
        let killed = killed_at(&mut place.command(&args), "store.partial.written:3");
        let log = server.take_log();
        for layer in layers.iter().filter(|layer| before.contains(&layer.digest.hex())) {
            assert!(!log.iter().any(|seen| seen.gets(&layer.digest)), "a complete blob is asked for again");
        }
        for (digest, bytes) in parts.iter().filter(|(_, bytes)| *bytes > 0) {
            let asked: Vec<_> = log.iter().filter(|seen| seen.gets(digest)).collect();
            assert!(
                asked.iter().all(|seen| seen.header("range") == Some(&format!("bytes={bytes}-"))),
                "{asked:?}"
            );
        }
        if !killed {
            break;
        }
        kills += 1;
        assert!(kills < 500, "it does not get on");
        // Nothing has a name before all of it is there.
        assert_eq!(Store::open(&store).unwrap().names().unwrap(), []);
        place.ok(&["verify", &format!("oci:{}", display(&store))]);
        before = complete(&store);
    }
    assert!(kills >= 5, "{kills}");
    place.ok(&["verify", &format!("oci:{}", display(&store))]);
    assert!(layers.iter().all(|layer| Store::open(&store).unwrap().has(layer)));
}

#[test]
fn installs_and_updates_that_are_killed_finish_on_the_next_run() {
    let (place, server, _) = served(&[400_000, 200_000]);
    let source = server.source("p");
    let install = place.install_args(&source);
    let install: Vec<&str> = install.iter().map(String::as_str).collect();
    let store = place.path("system/store");
    let update = ["update", &source];
    let mut kills = 0;
    for (version, args) in [(200, &install[..]), (201, &update[..])] {
        if version == 201 {
            place.publish(201, &[500_000, 300_000]);
            load(&place.publisher.store(), 201, "p", &server);
        }
        for point in [
            "store.partial.written:1",
            "store.partial.written:4",
            "store.blob.synced:1",
            "store.blob.renamed:2",
            "store.blob.fetched:2",
            "deploy.blobs.fetched",
            "deploy.names.set",
            "deploy.folder.written",
            "deploy.folder.renamed",
        ] {
            let before = complete(&store);
            server.take_log();
            kills += u32::from(killed_at(&mut place.command(args), point));
            for seen in server.take_log() {
                let layers = layers_of(&place.publisher.store(), version);
                let again = layers
                    .iter()
                    .any(|layer| seen.gets(&layer.digest) && before.contains(&layer.digest.hex()));
                assert!(!again, "{point}: {seen:?}");
            }
        }
        let finished = place.command(args).output().unwrap();
        assert!(finished.status.success(), "{}", text(&finished.stderr));
    }
    assert!(kills >= 12, "{kills} of 18");
    let said = place.ok(&["update", "--check", &source]);
    assert!(said.contains("version 201 is pending"), "{said}");
}

#[test]
fn a_push_that_is_killed_is_invisible_and_the_next_one_finishes() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, &[200_000, 100_000]);
    let (store, to) = (display(&place.store()), server.source("p"));
    let args = ["push", "--store", &store, &to];
    for point in ["push.image.pushed", "push.system.pushed", "push.referrers.pushed"] {
        assert!(killed_at(&mut place.command(&args), point), "{point}");
        assert!(!server.names("p/mos/system/system").contains(&"200".to_string()), "{point}");
    }
    let said = place.push(&to);
    assert!(said.contains("0 blobs sent"), "all of it was there: {said}");
    place.pull(&to, "copy");
}

/// Real kills at any moment: a few always, a hundred in a campaign.
#[test]
fn kills_at_any_moment() {
    let (place, server, layers) = served(&[1_500_000, 1_000_000, 500_000, 250_000]);
    let (source, store) = (server.source("p"), place.path("copy"));
    let wanted = if is_long() { 100 } else { 5 };
    // So slow that a run takes half a second.
    server.script(|seen, _| seen.path.contains("/blobs/").then_some(crate::server::Fault::Slow(3_000_000)));
    let (mut kills, mut round) = (0u64, 0u64);
    while kills < wanted {
        let before = complete(&store);
        server.take_log();
        let mut child = place
            .command(&["pull", &source, "--store", &display(&store)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A different moment each time; how many kills there are does not depend on it.
        thread::sleep(Duration::from_millis(20 + round * 37 % 400));
        round += 1;
        let running = child.try_wait().unwrap().is_none();
        let _ = child.kill();
        child.wait().unwrap();
        for seen in server.take_log() {
            let again =
                layers.iter().any(|layer| seen.gets(&layer.digest) && before.contains(&layer.digest.hex()));
            assert!(!again, "a complete blob is asked for again: {seen:?}");
        }
        if running {
            kills += 1;
        } else {
            place.ok(&["verify", &format!("oci:{}", display(&store))]);
            fs::remove_dir_all(&store).unwrap();
        }
    }
    server.heal();
    place.pull(&source, "copy");
    place.ok(&["verify", &format!("oci:{}", display(&store))]);
}

/// Debian's registry as a cache: once it has a blob, the origin does not send it again, however many
/// devices update.
#[test]
fn many_devices_through_one_cache() {
    let devices = if is_long() { 50 } else { 6 };
    let (place, origin, layers) = served(&[300_000, 200_000]);
    let cache = Debian::start(&Config { proxy_of: Some(origin.url()), ..Config::default() });
    let conf = format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        origin.host(),
        cache.host()
    );
    fs::write(place.path("registries.conf"), conf).unwrap();
    let source = origin.source("p");
    let sent = |log: &[crate::server::Seen]| {
        log.iter().filter(|seen| layers.iter().any(|layer| seen.gets(&layer.digest))).count()
    };
    // Devices come until the cache has everything. For its first client it fetches a blob twice: once to
    // send it on, and once for itself, which it finishes later.
    let mut warm = 0;
    loop {
        place.pull(&source, &format!("warm-{warm}"));
        warm += 1;
        if sent(&origin.take_log()) == 0 {
            break;
        }
        assert!(warm < 50, "the cache does not fill");
        thread::sleep(Duration::from_millis(100));
    }
    let install = place.install_args(&source);
    let children: Vec<_> = (0..devices)
        .map(|at| {
            let mut command = place.command(&install.iter().map(String::as_str).collect::<Vec<_>>());
            let folder = place.path(&format!("device-{at}"));
            command.env("MOSFS_SYSTEM", folder.join("system")).env("MOSFS_CONFIG", folder.join("config"));
            command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert_eq!(sent(&origin.take_log()), 0, "the cache sends what it has");
    for at in 0..devices {
        let store = Store::open(&place.path(&format!("device-{at}/system/store"))).unwrap();
        assert!(layers.iter().all(|layer| store.has(layer)));
    }
}
