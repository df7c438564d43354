//! Servers that stop, drip, never end or ask to be waited for: each has its limit in time and in bytes. And what of ours
//! must not reach another server.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::attacks::pull_bounded;
use crate::faults::{asked, served, whole};
use crate::place::{display, load, refused};
use crate::server::{Fault, Options, Server};

#[test]
fn a_stall_at_each_tenth_of_a_blob_ends_and_the_rest_is_fetched() {
    let (place, _, layer) = served(Options::default(), 1_000_000);
    thread::scope(|scope| {
        for tenth in 0..10 {
            let (place, layer) = (&place, &layer);
            scope.spawn(move || {
                let server = Server::start(Options::default());
                load(&place.publisher.store(), 200, "p", &server);
                let (at, digest, first) = (layer.size * tenth / 10, layer.digest, AtomicUsize::new(0));
                server.script(move |seen, _| {
                    (seen.gets(&digest) && first.fetch_add(1, Ordering::SeqCst) == 0)
                        .then_some(Fault::Stall(at))
                });
                let name = format!("tenth-{tenth}");
                place.pull(&server.source("p"), &name);
                server.settle();
                assert_eq!(server.sent(&digest), layer.size, "no byte twice, tenth {tenth}");
                let log = server.take_log();
                let requests = asked(&log, &digest);
                assert_eq!(requests.len(), 2, "{requests:?}");
                let rest = (at > 0).then(|| format!("bytes={at}-"));
                assert_eq!(requests[1].header("range"), rest.as_deref(), "{requests:?}");
                whole(place, &name);
            });
        }
    });
}

/// Headers that come byte by byte are in time for every read, and have a time of their own.
#[test]
fn headers_that_drip_are_given_up() {
    let (place, server, _) = served(Options::default(), 20_000);
    server.script(|seen, _| {
        seen.path.contains("/tags/list").then_some(Fault::DripHead(Duration::from_millis(50)))
    });
    let begun = Instant::now();
    refused(&pull_bounded(&place, &server.source("p")), 1, &["tags/list"]);
    let tries = server.take_log().iter().filter(|seen| seen.path.contains("/tags/list")).count();
    assert_eq!(tries, 6, "after {:?}", begun.elapsed());
}

#[test]
fn answers_of_token_services_and_lists_of_referrers_end() {
    let tokens = Options { tokens: Some((String::new(), None)), ..Options::default() };
    let (place, server, _) = served(tokens, 20_000);
    for fault in [Fault::Longer(u64::MAX), Fault::Header("Content-Length", "99999999".into())] {
        server.script(move |seen, _| seen.path.starts_with("/token").then(|| fault.clone()));
        refused(&pull_bounded(&place, &server.source("p")), 1, &["longer than the 65536 bytes allowed for"]);
    }
    server.script(|seen, _| {
        seen.path
            .starts_with("/token")
            .then(|| Fault::Answer(200, Vec::new(), b"{\"token\":\"a b\"}".to_vec()))
    });
    refused(
        &pull_bounded(&place, &server.source("p")),
        1,
        &["its token holds characters that no header has"],
    );
    // A list of the registry's own, then an index under the fallback tag.
    for (referrers, path) in [(true, "/referrers/"), (false, "/manifests/sha256-")] {
        let (place, server, _) = served(Options { referrers, ..Options::default() }, 20_000);
        server.script(move |seen, _| seen.path.contains(path).then_some(Fault::Longer(u64::MAX)));
        refused(
            &pull_bounded(&place, &server.source("p")),
            1,
            &["longer than the 4194304 bytes allowed for"],
        );
    }
}

/// A server may ask to be left alone for years: that is a minute at most, and less with less patience.
#[test]
fn the_wait_that_a_server_asks_for_is_bounded() {
    let (place, server, layer) = served(Options::default(), 20_000);
    let digest = layer.digest;
    for asks in ["1000000000", "3600", "-1", "Fri, 31 Dec 9999 23:59:59 GMT"] {
        let first = AtomicUsize::new(0);
        server.script(move |seen, _| {
            let busy = seen.gets(&digest) && first.fetch_add(1, Ordering::SeqCst) == 0;
            busy.then(|| Fault::Answer(429, vec![("Retry-After", asks.into())], Vec::new()))
        });
        let name = format!("after-{}", asks.len());
        place.pull(&server.source("p"), &name);
        whole(&place, &name);
        assert_eq!(asked(&server.take_log(), &digest).len(), 2, "{asks}");
    }
}

/// An answer in several parts has no `Content-Range` of its own.
#[test]
fn a_range_in_several_parts_is_refused() {
    let (place, server, layer) = served(Options::default(), 200_000);
    let digest = layer.digest;
    server.script(move |seen, _| {
        seen.gets(&digest).then(|| match seen.header("range") {
            None => Fault::Cut(100_000),
            Some(_) => {
                let kind = ("Content-Type", "multipart/byteranges; boundary=b".to_string());
                Fault::Answer(
                    206,
                    vec![kind],
                    b"--b\r\nContent-Range: bytes 100000-100009/200000\r\n".to_vec(),
                )
            }
        })
    });
    refused(&pull_bounded(&place, &server.source("p")), 1, &["asked for bytes 100000-"]);
}

/// Object stores receive uploads and send blobs for a registry. They get the bytes, and nothing that lets anyone in.
#[test]
fn an_upload_elsewhere_carries_the_bytes_and_not_the_token() {
    for status in [202, 307] {
        let tokens = Options { tokens: Some((String::new(), None)), ..Options::default() };
        let (place, _, layer) = served(Options::default(), 50_000);
        let (registry, elsewhere) = (Server::start(tokens), Server::start(Options::default()));
        let location = format!("{}/bucket/upload?X-Signature=hunter2", elsewhere.url());
        registry.script(move |seen, _| {
            let moves = match status {
                202 => seen.method == "POST" && seen.path.contains("/blobs/uploads/"),
                _ => seen.method == "PUT" && seen.path.contains("/blobs/uploads/"),
            };
            let let_in = seen.header("authorization").is_some();
            (moves && let_in).then(|| Fault::Answer(status, vec![("Location", location.clone())], Vec::new()))
        });
        elsewhere.script(|_, _| Some(Fault::Answer(201, Vec::new(), Vec::new())));
        let store = display(&place.store());
        // The registry never learns of the blob, and refuses the manifest.
        let output = place.run(&["push", "-vv", "--store", &store, &registry.source("new")]);
        let said = refused(&output, 1, &["MANIFEST_BLOB_UNKNOWN"]);
        assert!(!said.contains("hunter2") && !said.contains("sesame"), "{said}");
        let log = elsewhere.take_log();
        let length = layer.size.to_string();
        assert!(log.iter().any(|seen| seen.header("content-length") == Some(&length)), "{log:?}");
        for seen in log {
            assert_eq!((seen.method.as_str(), seen.header("authorization")), ("PUT", None), "{seen:?}");
            // The place of an upload gets the digest; a redirect leads to where it says.
            let end = if status == 202 { "X-Signature=hunter2&digest=sha256" } else { "X-Signature=hunter2" };
            assert!(seen.path.contains(end), "{seen:?}");
        }
        assert!(registry.take_log().iter().any(|seen| seen.header("authorization").is_some()));
    }
}
