//! A registry that breaks: cuts, silence, statuses, ranges that are not kept. Each ends in what was asked for,
//! or in an error that names it; nothing half-fetched has a name.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::{Descriptor, MANIFEST};
use mosfs::internals::store::{Store, version_name};

use crate::place::{Place, display, layers_of, load, refused};
use crate::server::{Fault, Options, Seen, Server};

/// A registry with version 200, of one layer.
pub fn served(options: Options, layer_bytes: usize) -> (Place, Server, Descriptor) {
    let (place, server) = (Place::new(), Server::start(options));
    place.publish(200, &[layer_bytes]);
    let store = place.publisher.store();
    load(&store, 200, "p", &server);
    let layer = layers_of(&store, 200)[0].clone();
    (place, server, layer)
}

/// What was asked of a blob.
pub fn asked<'a>(log: &'a [Seen], digest: &Digest) -> Vec<&'a Seen> {
    log.iter().filter(|seen| seen.gets(digest)).collect()
}

pub fn whole(place: &Place, name: &str) {
    let store = Store::open(&place.path(name)).unwrap();
    store.resolve(&version_name(200)).unwrap();
    place.ok(&["verify", &format!("oci:{}", display(&place.path(name)))]);
    assert_eq!(leftovers(place, name), 0);
}

fn leftovers(place: &Place, name: &str) -> usize {
    let folder = place.path(name).join(".mosfs/partial");
    fs::read_dir(folder).map_or(0, Iterator::count)
}

/// A pull that fails leaves no name.
fn fails(place: &Place, server: &Server, code: i32, words: &[&str]) -> String {
    let said =
        place.refused(&["pull", &server.source("p"), "--store", &display(&place.path("bad"))], code, words);
    let store = Store::open(&place.path("bad")).unwrap();
    assert_eq!(store.names().unwrap(), [], "nothing half-fetched has a name");
    said
}

#[test]
fn a_blob_that_is_cut_at_each_tenth_goes_on_there() {
    let (place, server, layer) = served(Options::default(), 1_500_000);
    for tenth in 0..10 {
        let (at, digest) = (layer.size * tenth / 10, layer.digest);
        server.script(move |seen, _| {
            (seen.gets(&digest) && seen.header("range").is_none()).then_some(Fault::Cut(at))
        });
        let name = format!("tenth-{tenth}");
        // A cut at 0 is cut again each time that the whole is asked for: heal after the first.
        if tenth == 0 {
            let first = AtomicUsize::new(0);
            server.script(move |seen, _| {
                (seen.gets(&digest) && first.fetch_add(1, Ordering::SeqCst) == 0).then_some(Fault::Cut(0))
            });
        }
        place.pull(&server.source("p"), &name);
        let log = server.take_log();
        let requests = asked(&log, &layer.digest);
        assert_eq!(requests.len(), 2, "{requests:?}");
        assert_eq!(
            requests.iter().map(|seen| seen.sent).sum::<u64>(),
            layer.size,
            "no byte twice: {requests:?}"
        );
        if tenth > 0 {
            assert_eq!(requests[1].header("range"), Some(format!("bytes={at}-").as_str()));
            assert_eq!(requests[1].header("if-range"), Some(format!("\"{}\"", layer.digest).as_str()));
        }
        whole(&place, &name);
    }
}

#[test]
fn a_server_that_cuts_for_ever_is_given_up_and_the_next_run_goes_on() {
    let (place, server, layer) = served(Options::default(), 1_000_000);
    let digest = layer.digest;
    server.script(move |seen, _| {
        (seen.gets(&digest)).then_some(if seen.header("range").is_none() {
            Fault::Cut(700_000)
        } else {
            Fault::Cut(0)
        })
    });
    fails(&place, &server, 1, &["after 700000 of"]);
    let first = server.take_log();
    assert_eq!(asked(&first, &layer.digest).len(), 6, "a bounded number of tries");
    assert_eq!(leftovers(&place, "bad"), 1);

    server.heal();
    place.pull(&server.source("p"), "bad");
    let log = server.take_log();
    let requests = asked(&log, &layer.digest);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].header("range"), Some("bytes=700000-"));
    whole(&place, "bad");
}

#[test]
fn what_a_damaged_disk_kept_is_fetched_again_once() {
    let (place, server, layer) = served(Options::default(), 400_000);
    let part = place.path("copy/.mosfs/partial");
    for damage in [100_000, layer.size as usize, layer.size as usize + 10] {
        let _ = fs::remove_dir_all(place.path("copy"));
        Store::create(&place.path("copy")).unwrap();
        fs::create_dir_all(&part).unwrap();
        fs::write(part.join(layer.digest.hex()), vec![7; damage]).unwrap();
        place.pull(&server.source("p"), "copy");
        whole(&place, "copy");
        let log = server.take_log();
        let full = asked(&log, &layer.digest).into_iter().filter(|seen| seen.sent == layer.size).count();
        assert_eq!(full, 1, "{damage}: {log:?}");
    }
}

#[test]
fn statuses_end_as_they_should() {
    let (place, server, layer) = served(Options::default(), 50_000);
    let digest = layer.digest;
    let always = |status: u16, headers: Vec<(&'static str, String)>| {
        let body = br#"{"errors":[{"code":"WHY","message":"be\u001b[31mcause"}]}"#.to_vec();
        server.script(move |seen, _| {
            seen.gets(&digest).then(|| Fault::Answer(status, headers.clone(), body.clone()))
        });
    };
    for (status, words) in [
        (404, vec!["does not have the blob"]),
        (403, vec!["access denied (403: WHY: be\\u{1b}[31mcause)"]),
        (401, vec!["access denied (401", "no way to log in"]),
        (416, vec!["the content has 0 bytes"]),
        (410, vec!["the server answers 410: WHY"]),
    ] {
        always(status, Vec::new());
        let code = if status == 416 { 3 } else { 1 };
        fails(&place, &server, code, &words);
        assert_eq!(asked(&server.take_log(), &digest).len(), 1, "{status} is not asked again");
    }
    for status in [429, 500, 502, 503, 504, 408] {
        // Bounded: six times.
        always(status, Vec::new());
        fails(&place, &server, 1, &[&format!("the server answers {status}: WHY")]);
        assert_eq!(asked(&server.take_log(), &digest).len(), 6, "{status}");
        // And it passes.
        let count = AtomicUsize::new(0);
        server.script(move |seen, _| {
            let first = seen.gets(&digest) && count.fetch_add(1, Ordering::SeqCst) < 2;
            first.then(|| Fault::Answer(status, vec![("Retry-After", "0".into())], Vec::new()))
        });
        let name = format!("after-{status}");
        place.pull(&server.source("p"), &name);
        server.take_log();
    }
}

#[test]
fn a_server_without_ranges_still_delivers() {
    let (place, server, layer) = served(Options::default(), 600_000);
    let digest = layer.digest;
    server.script(move |seen, _| {
        seen.gets(&digest)
            .then(|| if seen.header("range").is_none() { Fault::Cut(300_000) } else { Fault::NoRange })
    });
    place.pull(&server.source("p"), "copy");
    whole(&place, "copy");
    let log = server.take_log();
    assert_eq!(asked(&log, &digest).iter().map(|seen| seen.status).collect::<Vec<_>>(), [200, 200]);
}

#[test]
fn a_range_must_be_the_one_that_was_asked_for() {
    let (place, server, layer) = served(Options::default(), 600_000);
    let (digest, size) = (layer.digest, layer.size);
    for lie in [
        format!("bytes 0-{}/{size}", size - 1),
        format!("bytes 300000-{}/{size}", size - 2),
        format!("bytes 300000-{}/{}", size - 1, size + 1),
        format!("bytes 300000-{}/*", size - 1),
        "bytes */1".to_string(),
        "x".repeat(2000),
    ] {
        let _ = fs::remove_dir_all(place.path("bad"));
        let header = lie.clone();
        server.script(move |seen, _| {
            let first = seen.header("range").is_none();
            seen.gets(&digest).then(|| {
                if first { Fault::Cut(300_000) } else { Fault::Header("Content-Range", header.clone()) }
            })
        });
        let said = fails(&place, &server, 1, &["asked for bytes 300000-"]);
        assert!(said.len() < 1000, "{said}");
    }
}

#[test]
fn silence_and_drip_are_cut_and_the_rest_is_fetched() {
    let (place, server, layer) = served(Options::default(), 600_000);
    let digest = layer.digest;
    for (name, fault) in
        [("stall", Fault::Stall(200_000)), ("drip", Fault::Drip(200_000, Duration::from_millis(100)))]
    {
        let count = Arc::new(AtomicUsize::new(0));
        server.script(move |seen, _| {
            (seen.gets(&digest) && count.fetch_add(1, Ordering::SeqCst) == 0).then(|| fault.clone())
        });
        place.pull(&server.source("p"), name);
        whole(&place, name);
        let log = server.take_log();
        let requests = asked(&log, &digest);
        assert_eq!(requests.len(), 2, "{name}: {requests:?}");
        assert!(
            requests[1].header("range").is_some_and(|range| range.starts_with("bytes=200")),
            "{requests:?}"
        );
    }
    // Headers that drip or never come.
    for fault in [Fault::Raw(b"HTTP/1.1 200".to_vec()), Fault::Stall(0)] {
        server.script(move |seen, _| seen.path.contains("/tags/list").then(|| fault.clone()));
        fails(&place, &server, 1, &["tags/list"]);
        server.take_log();
    }
}

#[test]
fn a_token_that_expires_in_the_middle_is_renewed() {
    let options = Options { tokens: Some((String::new(), None)), ..Options::default() };
    let (place, server, layer) = served(options, 800_000);
    let (server, digest) = (Arc::new(server), layer.digest);
    let (expiring, count) = (server.clone(), AtomicUsize::new(0));
    server.script(move |seen, _| {
        if !seen.gets(&digest) {
            return None;
        }
        if seen.header("range").is_none() {
            return Some(Fault::Cut(500_000));
        }
        // What the client was let in with ends before it asks for the rest.
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            expiring.expire_tokens();
        }
        None
    });
    place.pull(&server.source("p"), "copy");
    whole(&place, "copy");
    let log = server.take_log();
    let resumed: Vec<_> =
        asked(&log, &digest).into_iter().filter(|seen| seen.header("range").is_some()).collect();
    assert_eq!(resumed.iter().map(|seen| seen.status).collect::<Vec<_>>(), [401, 206], "{resumed:?}");
    server.heal();
}

#[test]
fn a_tag_that_moves_is_resolved_once() {
    let (place, server, _) = served(Options::default(), 50_000);
    let other = Place::new();
    other.publish(200, &[70_000]);
    let theirs = other.publisher.store();
    let artifact = theirs.resolve(&version_name(200)).unwrap();
    let moved = theirs.get(&artifact.digest, 1 << 20).unwrap();
    load(&theirs, 200, "other", &server);
    let seen_first = AtomicUsize::new(0);
    server.script(move |seen, _| {
        let tag = seen.method == "GET" && seen.path.ends_with("/manifests/200");
        (tag && seen_first.fetch_add(1, Ordering::SeqCst) > 0)
            .then(|| Fault::Answer(200, vec![("Content-Type", MANIFEST.into())], moved.clone()))
    });
    place.pull(&server.source("p"), "copy");
    let log = server.take_log();
    assert_eq!(log.iter().filter(|seen| seen.path.ends_with("/manifests/200")).count(), 1);
    whole(&place, "copy");
    let ours = place.publisher.store().resolve(&version_name(200)).unwrap();
    assert_eq!(
        Store::open(&place.path("copy")).unwrap().resolve(&version_name(200)).unwrap().digest,
        ours.digest
    );
}

#[test]
fn an_upload_that_breaks_is_sent_again() {
    for options in [Options::default(), Options { referrers: true, ..Options::default() }] {
        let knows = options.referrers;
        let (place, server) = (Place::new(), Server::start(options));
        place.publish(200, &[400_000]);
        let count = AtomicUsize::new(0);
        server.script(move |seen, _| {
            (is_long_upload(seen) && count.fetch_add(1, Ordering::SeqCst) < 3)
                .then_some(Fault::CutRequest(100))
        });
        place.push(&server.source("p"));
        assert_eq!((cancelled(&server), server.open_uploads()), (vec![204; 3], 0));
        server.heal();
        server.take_log();
        place.pull(&server.source("p"), "copy");
        whole(&place, "copy");
        let fallback = server.names("p/mos/system/system").iter().any(|name| name.starts_with("sha256-"));
        assert_eq!(fallback, !knows, "the fallback tag is written where the registry has no lists");
    }
}

/// Whether this sends a blob that can be cut.
fn is_long_upload(seen: &Seen) -> bool {
    let length = seen.header("content-length").and_then(|length| length.parse().ok());
    seen.method == "PUT" && seen.path.contains("/blobs/uploads/") && length > Some(1000)
}

/// The answers to requests that cancel an upload.
fn cancelled(server: &Server) -> Vec<u16> {
    let log = server.take_log();
    let cancels = log.iter().filter(|seen| seen.method == "DELETE" && seen.path.contains("/blobs/uploads/"));
    cancels.map(|seen| seen.status).collect()
}

#[test]
fn an_upload_that_is_given_up_is_cancelled_if_the_registry_may_hear_of_it() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, &[400_000]);
    let store = display(&place.store());
    let args = ["push", "--store", &store, &server.source("p")];
    // Refused by the registry: cancelled. The other blobs are sent at the same time and end in the same way.
    server.script(move |seen, _| is_long_upload(seen).then(|| Fault::Answer(413, Vec::new(), Vec::new())));
    refused(&place.run(&args), 1, &["the server answers 413"]);
    let answers = cancelled(&server);
    assert!(!answers.is_empty() && answers.iter().all(|status| *status == 204), "{answers:?}");
    assert_eq!(server.open_uploads(), 0);
    // Who may not write may not cancel; what is silent is not asked again.
    for fault in [Fault::Answer(403, Vec::new(), Vec::new()), Fault::DripHead(Duration::from_millis(50))] {
        let count = AtomicUsize::new(0);
        server.script(move |seen, _| {
            let first = is_long_upload(seen) && count.fetch_add(1, Ordering::SeqCst) == 0;
            first.then(|| fault.clone())
        });
        place.run(&["push", "--net-timeout", "1", "--store", &store, &server.source("q")]);
        assert_eq!(cancelled(&server), [0; 0]);
    }
    // A registry that takes no DELETE is one all the same.
    let count = AtomicUsize::new(0);
    server.script(move |seen, _| match seen.method.as_str() {
        "DELETE" => Some(Fault::Answer(405, Vec::new(), Vec::new())),
        "PUT" if is_long_upload(seen) && count.fetch_add(1, Ordering::SeqCst) == 0 => {
            Some(Fault::CutRequest(100))
        }
        _ => None,
    });
    place.push(&server.source("p"));
    assert_eq!(cancelled(&server), [405]);
}

/// Starts `mosfs push`. Whoever runs the tests may ignore signals, as a shell does for what it starts in the background.
fn begin_push(place: &Place, server: &Server, patience: &str, disposition: &str) -> Child {
    let store = display(&place.store());
    let args = ["push", "--net-timeout", patience, "--store", &store, &server.source("p")];
    let (mosfs, mut command) = (place.command(&args), Command::new("env"));
    command.arg(disposition).arg(mosfs.get_program()).args(mosfs.get_args());
    for (name, value) in mosfs.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("env (Debian package coreutils) runs")
}

#[test]
fn a_push_that_is_ended_by_a_signal_cancels_what_it_has_begun() {
    let (place, server) = (Place::new(), Arc::new(Server::start(Options::default())));
    place.publish(200, &[400_000]);
    for (name, signal) in [("TERM", Some(15)), ("INT", Some(2)), ("HUP", Some(1)), ("HUP", None)] {
        let begun = Arc::new(AtomicUsize::new(0));
        let (seen_put, ended) = (Arc::clone(&begun), Arc::new(AtomicUsize::new(0)));
        let until = Arc::clone(&ended);
        server.script(move |seen, _| {
            if seen.method == "PUT" {
                seen_put.fetch_add(1, Ordering::SeqCst);
                while until.load(Ordering::SeqCst) == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            None
        });
        let mut child = begin_push(
            &place,
            &server,
            "60",
            &match signal {
                Some(_) => format!("--default-signal={name}"),
                None => format!("--ignore-signal={name}"),
            },
        );
        while begun.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
        if signal.is_none() {
            // nohup(1): it goes on.
            ended.store(1, Ordering::SeqCst);
            assert!(child.wait().unwrap().success());
            continue;
        }
        let status = child.wait().unwrap();
        ended.store(1, Ordering::SeqCst);
        server.settle();
        assert_eq!(status.signal(), signal, "{status:?}");
        assert!(!cancelled(&server).is_empty());
        assert_eq!(server.open_uploads(), 0, "{name}");
    }
    server.heal();
    place.push(&server.source("p"));
}

#[test]
fn an_upload_whose_beginning_is_answered_after_the_signal_is_cancelled_too() {
    let (place, server) = (Place::new(), Arc::new(Server::start(Options::default())));
    place.publish(200, &[400_000]);
    // The first upload begins, and is filled until the command has ended. The registry answers the requests for all others
    // after it was asked to cancel the first one: or not at all.
    for answered in [true, false] {
        let [posts, puts, deletes, ended] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
        let until = |count: &AtomicUsize| {
            while count.load(Ordering::SeqCst) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        };
        let (seen_posts, seen_puts, gone) = (Arc::clone(&posts), Arc::clone(&puts), Arc::clone(&ended));
        server.script(move |seen, _| {
            let first = |count: &AtomicUsize| count.fetch_add(1, Ordering::SeqCst) == 0;
            match seen.method.as_str() {
                "POST" if !first(&seen_posts) => {
                    until(if answered { &deletes } else { &gone });
                    // A command that did not wait for this would have ended when the first one was cancelled.
                    thread::sleep(Duration::from_millis(300));
                }
                "PUT" => {
                    first(&seen_puts);
                    until(&gone);
                }
                "DELETE" => {
                    first(&deletes);
                }
                _ => {}
            }
            None
        });
        let mut child =
            begin_push(&place, &server, if answered { "60" } else { "3" }, "--default-signal=TERM");
        while posts.load(Ordering::SeqCst) < 2 || puts.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(
            Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success()
        );
        let status = child.wait().unwrap();
        ended.store(1, Ordering::SeqCst);
        server.settle();
        assert_eq!(status.signal(), Some(15), "{status:?}");
        let answers = cancelled(&server);
        assert!(answers.iter().all(|status| *status == 204), "{answers:?}");
        if answered {
            assert!(answers.len() > 1, "{answers:?}");
            assert_eq!(server.open_uploads(), 0);
        }
    }
}

#[test]
fn the_version_is_the_last_thing_that_a_push_makes_visible() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, &[100_000]);
    // Each request that writes fails once, from the last to the first: the version is never there.
    place.push(&server.source("whole"));
    let writes = server.take_log().iter().filter(|seen| seen.method == "PUT").count();
    assert!(writes > 8, "{writes}");
    for at in 0..writes {
        let prefix = format!("cut-{at}");
        let count = AtomicUsize::new(0);
        server.script(move |seen, _| {
            let stop = seen.method == "PUT" && count.fetch_add(1, Ordering::SeqCst) >= at;
            stop.then(|| Fault::Answer(400, Vec::new(), Vec::new()))
        });
        let store = display(&place.store());
        let output = place.run(&["push", "--store", &store, &server.source(&prefix)]);
        refused(&output, 1, &["the server answers 400"]);
        let names = server.names(&format!("{prefix}/mos/system/system"));
        assert!(!names.contains(&"200".to_string()), "{at}: {names:?}");
    }
    server.heal();
    place.push(&server.source("cut-3"));
    place.pull(&server.source("cut-3"), "copy");
}

#[test]
fn a_list_of_referrers_that_someone_else_overwrites_is_written_again() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, &[20_000]);
    let count = AtomicUsize::new(0);
    server.script(move |seen, _| {
        let read = seen.method == "GET" && seen.path.contains("/manifests/sha256-");
        // The first reading finds none, the second what another writer has put over ours.
        (read && count.fetch_add(1, Ordering::SeqCst) == 1).then(|| {
            let empty = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
            let kind = "application/vnd.oci.image.index.v1+json".to_string();
            Fault::Answer(200, vec![("Content-Type", kind)], empty.to_vec())
        })
    });
    place.push(&server.source("p"));
    let log = server.take_log();
    let written =
        log.iter().filter(|seen| seen.method == "PUT" && seen.path.contains("/manifests/sha256-")).count();
    assert_eq!(written, 2);
    server.heal();
    place.pull(&server.source("p"), "copy");
}

#[test]
fn some_registries_answer_the_fallback_tag_with_the_subject() {
    let (place, server, _) = served(Options::default(), 20_000);
    let store = place.publisher.store();
    let artifact = store.resolve(&version_name(200)).unwrap();
    let bytes = store.get(&artifact.digest, 1 << 20).unwrap();
    server.script(move |seen, _| {
        let tag = seen.method == "GET" && seen.path.contains("/manifests/sha256-");
        tag.then(|| Fault::Answer(200, vec![("Content-Type", MANIFEST.into())], bytes.clone()))
    });
    fails(&place, &server, 3, &["comes without a signature"]);
}

#[test]
fn mirrors_are_tried_in_order() {
    let (place, origin, layer) = served(Options::default(), 100_000);
    let mirror = Server::start(Options::default());
    load(&place.publisher.store(), 200, "cache/p", &mirror);
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let conf = format!(
        "[[registry]]\nlocation = \"{0}\"\n[[registry.mirror]]\nlocation = \"127.0.0.1:{unused}\"\n\
         [[registry.mirror]]\nlocation = \"{1}/cache\"\n",
        origin.host(),
        mirror.host()
    );
    fs::write(place.path("registries.conf"), conf).unwrap();
    place.pull(&origin.source("p"), "one");
    whole(&place, "one");
    // The list of referrers is on the origin only, in this test.
    assert!(asked(&origin.take_log(), &layer.digest).is_empty());
    assert_eq!(asked(&mirror.take_log(), &layer.digest).len(), 1);

    // A mirror that dies in the middle of a blob: the origin goes on where it was.
    let digest = layer.digest;
    mirror.script(move |seen, _| {
        seen.gets(&digest).then_some(if seen.header("range").is_none() {
            Fault::Cut(50_000)
        } else {
            Fault::Answer(404, Vec::new(), Vec::new())
        })
    });
    place.pull(&origin.source("p"), "two");
    whole(&place, "two");
    assert_eq!(asked(&origin.take_log(), &layer.digest)[0].header("range"), Some("bytes=50000-"));
}
