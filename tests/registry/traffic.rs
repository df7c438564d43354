//! What is asked of a registry when nothing goes wrong, how it is reported, and what a client of the distribution-spec
//! owes to one.
//!
//! What the distribution-spec (1.1) requires of a client, and where it is tested:
//!
//! | requirement | test |
//! | --- | --- |
//! | `Accept` names the manifests that are understood | every test: the server answers 404 without it |
//! | the bytes of a digest are compared with it, whatever `Docker-Content-Digest` says | `attacks::the_digest_that_a_server_claims_does_not_count` |
//! | `Location` of an upload is used as it is, absolute or relative, with or without a query | `real` (absolute, with one), all others (relative, without) |
//! | an upload that is given up is cancelled by `DELETE` on its location | `faults::an_upload_that_is_given_up_is_cancelled_if_the_registry_may_hear_of_it`, `faults::a_push_that_is_ended_by_a_signal_cancels_what_it_has_begun` |
//! | a mount that the registry answers with 202 goes on as an upload | `a_mount_that_is_not_made_becomes_an_upload` |
//! | `Content-Type` of a manifest is its `mediaType` | `the_type_of_a_manifest_is_its_own` |
//! | without `OCI-Subject` the fallback tag is read, added to and written | `faults::an_upload_that_breaks_is_sent_again`, `faults::a_list_of_referrers_that_someone_else_overwrites_is_written_again` |
//! | without `/referrers/` the fallback tag is read; what is no index counts as none | `faults::some_registries_answer_the_fallback_tag_with_the_subject` |
//! | referrers of other types that come all the same are left out | `referrers_of_other_types_are_left_out` |
//! | lists go on at `Link` | `attacks::pages_of_a_list_end_and_stay_on_their_server` |
//! | redirects are followed, without `Authorization` on another server | `attacks::a_redirect_carries_the_blob_and_not_the_token` |
//! | `Warning` is reported once, and nothing follows from it | `warnings_are_reported_once` |

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mosfs::internals::image::oci::MANIFEST;
use serde_json::Value;

use crate::kills::served;
use crate::place::{Place, display, text};
use crate::server::{Fault, Options, Seen, Server};

/// The requests of a log, less the headers.
fn requests(log: &[Seen]) -> Vec<(&str, &str)> {
    log.iter().map(|seen| (seen.method.as_str(), seen.path.as_str())).collect()
}

#[test]
fn a_check_without_news_is_one_head_and_moves_kilobytes_otherwise() {
    let (place, server, _) = served(&[300_000]);
    let source = server.source("p");
    place.install(&source);
    server.take_log();
    // By its version: one request, without a body.
    let named = format!("{source}:200");
    assert!(place.ok(&["update", "--check", &named]).contains("version 200 is installed"));
    server.settle();
    let log = server.take_log();
    assert_eq!(requests(&log), [("HEAD", "/v2/p/mos/system/system/manifests/200")]);
    // Without a version, the list of them comes first.
    place.ok(&["update", "--check", &source]);
    let log = server.take_log();
    assert_eq!(log.iter().map(|seen| seen.method.as_str()).collect::<Vec<_>>(), ["GET", "HEAD"], "{log:?}");
    assert!(log[0].path.starts_with("/v2/p/mos/system/system/tags/list"), "{log:?}");
    // News: manifests and signatures, and no layer.
    place.publish(201, &[400_000]);
    crate::place::load(&place.publisher.store(), 201, "p", &server);
    assert!(place.ok(&["update", "--check", &source]).contains("version 201 would be installed"));
    server.settle();
    let log = server.take_log();
    let bytes: u64 = log.iter().map(|seen| seen.sent).sum();
    assert!(bytes < 64 << 10, "{bytes} bytes in {} requests", log.len());
    println!("a check with news: {} requests, {bytes} bytes", log.len());
}

/// Four blobs are asked for before the first of them has come, and a fifth only then.
#[test]
fn blobs_come_four_at_a_time() {
    let sizes: Vec<usize> = (0..8).map(|at| 30_000 + at * 1000).collect();
    let (place, server, layers) = served(&sizes);
    let (arrived, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counter, found) = (arrived.clone(), most.clone());
    let digests: Vec<_> = layers.iter().map(|layer| layer.digest).collect();
    server.script(move |seen, _| {
        if digests.iter().any(|digest| seen.gets(digest)) {
            match counter.fetch_add(1, Ordering::SeqCst) + 1 {
                // The fourth holds all of them for a while, in which a fifth might come.
                4 => {
                    thread::sleep(Duration::from_millis(300));
                    found.store(counter.load(Ordering::SeqCst), Ordering::SeqCst);
                }
                // Less than the client's patience: with fewer at a time it fails here, and does not hang.
                1..4 => {
                    let begun = Instant::now();
                    while found.load(Ordering::SeqCst) == 0 && begun.elapsed() < Duration::from_secs(15) {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
                _ => {}
            }
        }
        None
    });
    place.pull(&server.source("p"), "copy");
    assert_eq!(most.load(Ordering::SeqCst), 4);
    assert_eq!(arrived.load(Ordering::SeqCst), layers.len());
}

/// `--progress-fd`: an object a line; bytes of each blob and of all, rates while they are known, and an end for each.
#[test]
fn progress_is_reported_for_each_blob_and_in_total() {
    let (place, server, layers) = served(&[400_000, 300_000]);
    server.script(|seen, _| seen.path.contains("/blobs/").then_some(Fault::Slow(600_000)));
    let file = File::create(place.path("progress")).unwrap();
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let (number, store) = (file.as_raw_fd().to_string(), display(&place.path("copy")));
    place.ok(&["pull", &server.source("p"), "--store", &store, "--progress-fd", &number]);
    let lines: Vec<Value> = fs::read_to_string(place.path("progress"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).cloned().collect::<Vec<_>>();
    let starts = of("start");
    let objects: Vec<&str> = starts.iter().map(|line| line["object"].as_str().unwrap()).collect();
    assert!(objects.contains(&"all"), "{objects:?}");
    for layer in &layers {
        let digest = layer.digest.to_string();
        let names = |line: &&Value| line["object"].as_str().is_some_and(|object| object.contains(&digest));
        let start = starts.iter().find(names).unwrap_or_else(|| panic!("{digest}: {objects:?}"));
        assert_eq!(start["total_bytes"].as_u64(), Some(layer.size));
        let own: Vec<_> = of("advance").into_iter().filter(|line| line["id"] == start["id"]).collect();
        let bytes: Vec<u64> = own.iter().map(|line| line["bytes"].as_u64().unwrap()).collect();
        assert!(!bytes.is_empty() && bytes.is_sorted(), "{bytes:?}");
        assert!(bytes.iter().all(|bytes| *bytes <= layer.size), "{bytes:?}");
    }
    let all = starts.iter().find(|line| line["object"] == "all").unwrap();
    let total = all["total_bytes"].as_u64().unwrap();
    assert!(total >= layers.iter().map(|layer| layer.size).sum(), "{all}");
    let rates = of("advance").into_iter().filter(|line| line["id"] == all["id"]);
    assert!(
        rates.filter(|line| line["bytes_per_second"].is_u64() && line["seconds_left"].is_u64()).count() > 0
    );
    assert_eq!(of("done").len(), starts.len(), "{lines:?}");
}

#[test]
fn a_mount_that_is_not_made_becomes_an_upload() {
    let (place, server) = (Place::new(), Server::start(Options { no_mount: true, ..Options::default() }));
    let shared = place.publisher.add_layer(&crate::place::noise(60_000, 1));
    let targets = [("hostfs", "hostfs", vec![shared.clone()]), ("web", "container", vec![shared.clone()])];
    place.publisher.publish_targets(200, &targets, true);
    let said = place.push(&server.source("p"));
    assert!(said.contains("0 mounted"), "{said}");
    let log = server.take_log();
    // One upload for each repository, and the one that the mount has begun is used.
    let begun = log.iter().filter(|seen| seen.method == "POST" && seen.path.contains("mount=")).count();
    assert!(begun > 0, "{log:?}");
    let ended = format!("digest={}", shared.digest.to_string().replace(':', "%3A"));
    let is_end = |seen: &&Seen| {
        seen.method == "PUT" && (seen.path.contains(&ended) || seen.path.contains(&ended.replace("%3A", ":")))
    };
    assert_eq!(log.iter().filter(is_end).count(), 2, "{log:?}");
    place.pull(&server.source("p"), "copy");
}

#[test]
fn the_type_of_a_manifest_is_its_own() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    place.publish(200, &[20_000]);
    place.push(&server.source("p"));
    let log = server.take_log();
    let written: Vec<_> =
        log.iter().filter(|seen| seen.method == "PUT" && seen.path.contains("/manifests/")).collect();
    assert!(written.len() > 5, "{written:?}");
    for seen in written {
        let (repository, name) = seen.path.strip_prefix("/v2/").unwrap().split_once("/manifests/").unwrap();
        let stored: Value = serde_json::from_slice(&server.manifest(repository, name).unwrap()).unwrap();
        assert_eq!(seen.header("content-type"), stored["mediaType"].as_str(), "{}", seen.path);
    }
}

/// A registry need not filter by `artifactType`.
#[test]
fn referrers_of_other_types_are_left_out() {
    let (place, server) = (Place::new(), Server::start(Options { referrers: true, ..Options::default() }));
    place.publish(200, &[20_000]);
    place.push(&server.source("p"));
    // Other tools add their own about the same system.
    let repository = "p/mos/system/system";
    let system = mosfs::internals::digest::Digest::of(&server.manifest(repository, "200").unwrap());
    let empty = server.put_blob(repository, b"{}");
    for number in 0..20 {
        let other = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": format!("application/vnd.example.{number}"),
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2},
            "layers": [],
            "subject": {"mediaType": MANIFEST, "digest": system, "size": server.manifest(repository, "200").unwrap().len()},
        });
        server.put_manifest(repository, &format!("other-{number}"), MANIFEST, other.to_string().as_bytes());
    }
    place.pull(&server.source("p"), "copy");
    let copy = mosfs::internals::store::Store::open(&place.path("copy")).unwrap();
    assert_eq!(copy.referrers(&system, None).unwrap().len(), 3);
}

#[test]
fn warnings_are_reported_once() {
    let (place, server, _) = served(&[20_000]);
    server.script(|seen, _| {
        let text = match seen.path.contains("/manifests/") {
            true => "299 - \"this endpoint is \\\"old\\\"\"",
            false => "111 - \"for caches\"",
        };
        Some(Fault::Header("Warning", text.into()))
    });
    let output = place.run(&["pull", &server.source("p"), "--store", &display(&place.path("copy"))]);
    assert!(output.status.success());
    let said = text(&output.stderr);
    let host = server.host();
    assert_eq!(said.matches("warns").count(), 1, "{said}");
    assert!(said.contains(&format!("http://{host} warns: this endpoint is \"old\"")), "{said}");
    // However many they are.
    let number = AtomicUsize::new(0);
    server.script(move |_, _| {
        let number = number.fetch_add(1, Ordering::SeqCst);
        Some(Fault::Header("Warning", format!("299 - \"warning {number}\"")))
    });
    let output = place.run(&["pull", &server.source("p"), "--store", &display(&place.path("again"))]);
    assert!(output.status.success());
    assert_eq!(text(&output.stderr).matches("warns").count(), 8, "{}", text(&output.stderr));
}
