//! Kills in the middle of a pull, an install, an update and a push: the next run finishes, and nothing that an
//! earlier run has kept is fetched again.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::store::Store;

use crate::place::{Place, display, layers_of, load, text};
use crate::server::{Fault, Options, Server};

pub fn is_long() -> bool {
    std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long")
}

const SIGKILL: i32 = 9;

/// A registry with version 200 of several layers.
pub fn served(layers: &[usize]) -> (Place, Server, Vec<Descriptor>) {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, layers);
    let store = place.publisher.store();
    load(&store, 200, "p", &server);
    let layers = layers_of(&store, 200);
    (place, server, layers)
}

/// The blobs that are complete in a store.
fn complete(store: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(store.join("blobs/sha256")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// How much of a blob an interrupted run has left.
fn part(store: &Path, digest: &Digest) -> u64 {
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

/// How many bytes of each layer a store has.
fn kept(store: &Path, layers: &[Descriptor]) -> Vec<u64> {
    let complete = complete(store);
    let bytes_of = |layer: &Descriptor| match complete.contains(&layer.digest.hex()) {
        true => layer.size,
        false => part(store, &layer.digest),
    };
    layers.iter().map(bytes_of).collect()
}

/// No layer that was complete is asked for, and of one that was here in part only the rest.
fn assert_nothing_twice(server: &Server, layers: &[Descriptor], before: &[u64]) {
    let log = server.take_log();
    for (layer, kept) in layers.iter().zip(before) {
        let asked: Vec<_> = log.iter().filter(|seen| seen.gets(&layer.digest)).collect();
        let rest = (*kept > 0).then(|| format!("bytes={kept}-"));
        assert!(asked.len() <= usize::from(*kept < layer.size), "{kept} of {}: {asked:?}", layer.size);
        assert!(asked.iter().all(|seen| seen.header("range") == rest.as_deref()), "{kept}: {asked:?}");
    }
}

pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

/// Kills a command again and again, at other moments, and goes on with what the killed runs have left. After each kill,
/// a run on a copy of that finishes, and is sent exactly the bytes that the killed ones have not kept. `folder` is what
/// the command writes, and `store` is the store in it.
fn kill_again_and_again(
    place: &Place,
    server: &Server,
    layers: &[Descriptor],
    folder: &str,
    store: &str,
    command: &dyn Fn(&Path) -> Command,
) {
    let wanted = if is_long() { 50 } else { 3 };
    let (folder, spare, next) = (place.path(folder), place.path("spare"), place.path("next"));
    if folder.exists() {
        copy(&folder, &spare);
    }
    let begin_again = || match spare.exists() {
        true => copy(&spare, &folder),
        false => fs::remove_dir_all(&folder).unwrap(),
    };
    let all: u64 = layers.iter().map(|layer| layer.size).sum();
    let sent = || layers.iter().map(|layer| server.sent(&layer.digest)).collect::<Vec<_>>();
    let (mut kills, mut runs, mut complete_at_kill, mut to_the_end) = (0, 0, 0, 0);
    while kills < wanted {
        // So slow that a run takes half a second.
        server.script(|seen, _| seen.path.contains("/blobs/").then_some(Fault::Slow(3_000_000)));
        if kept(&folder.join(store), layers).iter().sum::<u64>() == all {
            begin_again();
        }
        let before = kept(&folder.join(store), layers);
        server.settle();
        server.take_log();
        let mut child =
            command(&folder).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("mosfs runs");
        // After another part of the rest each time, and now and then after all of it.
        let rest: u64 = layers.iter().zip(&before).map(|(layer, kept)| layer.size - kept).sum();
        let begin: u64 = sent().iter().sum();
        while sent().iter().sum::<u64>() - begin < rest * (runs * 37 % 105) / 100
            && child.try_wait().unwrap().is_none()
        {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(runs * 13 % 40));
        runs += 1;
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        server.settle();
        assert_nothing_twice(server, layers, &before);
        if output.status.signal() != Some(SIGKILL) {
            // It was faster: from the start again.
            assert!(output.status.success(), "{}", text(&output.stderr));
            begin_again();
            continue;
        }
        kills += 1;
        server.heal();
        match folder.exists() {
            true => copy(&folder, &next),
            false => drop(fs::remove_dir_all(&next)),
        }
        let (before, sent_before) = (kept(&next.join(store), layers), sent());
        complete_at_kill += before.iter().zip(layers).filter(|(kept, layer)| **kept == layer.size).count();
        let output = command(&next).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        server.settle();
        assert_nothing_twice(server, layers, &before);
        for (at, layer) in layers.iter().enumerate() {
            let now = server.sent(&layer.digest) - sent_before[at];
            assert_eq!(now, layer.size - before[at], "{} of {} were kept", before[at], layer.size);
            to_the_end += now;
        }
        place.ok(&["verify", &format!("oci:{}", display(&next.join(store)))]);
        assert!(kept(&next.join(store), layers).iter().zip(layers).all(|(kept, layer)| *kept == layer.size));
    }
    println!(
        "{kills} kills in {runs} runs, which left {complete_at_kill} of {} layers complete; the runs after them were \
         sent {to_the_end} of {} bytes, the rest was here",
        kills * layers.len(),
        all * kills as u64
    );
}

/// Real kills at any moment: a few always, a hundred of both commands in a campaign.
#[test]
fn pulls_that_are_killed_at_any_moment_finish_on_the_next_run() {
    let (place, server, layers) = served(&[1_500_000, 1_000_000, 500_000, 250_000]);
    let source = server.source("p");
    kill_again_and_again(&place, &server, &layers, "copy", "", &|folder| {
        place.command(&["pull", &source, "--store", &display(folder)])
    });
}

#[test]
fn updates_that_are_killed_at_any_moment_finish_on_the_next_run() {
    let (place, server, layers) = served(&[1_500_000, 1_000_000, 500_000, 250_000]);
    // A device that runs a version before it.
    place.publish(199, &[1000]);
    load(&place.publisher.store(), 199, "old", &server);
    place.install(&server.source("old"));
    let source = server.source("p");
    kill_again_and_again(&place, &server, &layers, "system", "store", &|folder| {
        let mut command = place.command(&["update", &source]);
        command.env("MOSFS_SYSTEM", folder);
        command
    });
}
