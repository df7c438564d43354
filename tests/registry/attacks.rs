//! A registry, or someone between it and us, that lies. Each test names the rule that it breaks; the names
//! are those of docs/attackers.md.

use std::fs;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::{CONFIG, Descriptor, INDEX, MANIFEST, Manifest, SQUASHFS_ZSTD};
use mosfs::internals::store::{Store, version_name};

use crate::faults::served;
use crate::place::{Place, display, load, refused, text};
use crate::server::{Fault, Options, Server};

/// A pull that may not take more than 400 MB of address space.
pub fn pull_bounded(place: &Place, source: &str) -> Output {
    let command = place.command(&["pull", source, "--store", &display(&place.path("bad"))]);
    let mut bounded = Command::new("sh");
    bounded
        .arg("-c")
        .arg("ulimit -v 400000; exec \"$0\" \"$@\"")
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    bounded.output().expect("sh")
}

fn nothing_kept(place: &Place) {
    let store = Store::open(&place.path("bad")).unwrap();
    assert_eq!(store.names().unwrap(), []);
    let parts = fs::read_dir(place.path("bad/.mosfs/partial")).map_or(0, Iterator::count);
    assert_eq!(parts, 0, "what failed its digest is not kept");
}

#[test]
fn blobs_of_other_bytes_or_length_are_refused() {
    let (place, server, layer) = served(Options::default(), 300_000);
    let digest = layer.digest;
    for (fault, words) in [
        (Fault::Flip(0), "the content has digest sha256:"),
        (Fault::Flip(layer.size - 1), "the content has digest sha256:"),
        (Fault::Longer(1), "the content has"),
        (Fault::Longer(u64::MAX), "the content has"),
        (Fault::Shorter(1), "the content has"),
        (Fault::Header("Content-Length", "12".into()), "the content has 12 bytes"),
        (Fault::Header("Content-Length", u64::MAX.to_string()), "the content has"),
    ] {
        server.script(move |seen, _| {
            // The rest of a blob that is short is not there either.
            let rest = Fault::Answer(416, Vec::new(), Vec::new());
            seen.gets(&digest).then(|| if seen.header("range").is_none() { fault.clone() } else { rest })
        });
        let output = pull_bounded(&place, &server.source("p"));
        refused(&output, 3, &[words, &layer.digest.to_string()]);
        nothing_kept(&place);
    }
}

#[test]
fn documents_and_headers_without_end_are_refused_while_they_are_read() {
    let (place, server, layer) = served(Options::default(), 50_000);
    let digest = layer.digest;
    let cases: [(&'static str, Fault, &str); 6] = [
        ("/manifests/", Fault::Longer(u64::MAX), "longer than the 4194304 bytes allowed for a manifest"),
        ("/manifests/", Fault::Header("Content-Length", "9999999999".into()), "allowed for a manifest"),
        ("/tags/list", Fault::Longer(u64::MAX), "allowed for a list of tags"),
        ("/tags/list", Fault::RawForever(b"X: y\r\n".to_vec()), "tags/list"),
        (
            "/tags/list",
            Fault::Raw(format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "y".repeat(1 << 20)).into_bytes()),
            "tags/list",
        ),
        ("/tags/list", Fault::Answer(500, Vec::new(), vec![b'<'; 1 << 22]), "the server answers 500: <<<"),
    ];
    for (path, fault, words) in cases {
        server.script(move |seen, _| seen.path.contains(path).then(|| fault.clone()));
        let output = pull_bounded(&place, &server.source("p"));
        let said = refused(&output, 1, &[words]);
        assert!(said.len() < 2000, "a server's words are short: {}", said.len());
    }
    server.script(move |seen, _| {
        seen.gets(&digest).then(|| Fault::RawForever(b"HTTP/1.1 200 OK\r\nX: y\r\n".to_vec()))
    });
    refused(&pull_bounded(&place, &server.source("p")), 1, &["blobs"]);
}

#[test]
fn compressed_answers_are_refused() {
    let (place, server, _) = served(Options::default(), 50_000);
    for path in ["/manifests/", "/blobs/"] {
        server.script(move |seen, _| {
            assert_eq!(seen.header("accept-encoding"), Some("identity"), "{}", seen.path);
            seen.path.contains(path).then(|| Fault::Header("Content-Encoding", "gzip".into()))
        });
        refused(&pull_bounded(&place, &server.source("p")), 1, &["the answer is compressed"]);
    }
}

#[test]
fn the_digest_that_a_server_claims_does_not_count() {
    let (place, server, _) = served(Options::default(), 50_000);
    server.script(|seen, _| {
        let lie = Digest::of(b"lie").to_string();
        seen.path.contains("/manifests/").then_some(Fault::Header("Docker-Content-Digest", lie))
    });
    place.pull(&server.source("p"), "copy");
    // A manifest by digest whose bytes are others.
    server.script(|seen, _| seen.path.contains("/manifests/sha256:").then_some(Fault::Flip(20)));
    refused(&pull_bounded(&place, &server.source("p")), 3, &["has digest"]);
}

#[test]
fn an_older_system_under_a_newer_tag_is_a_rollback() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    for version in [100, 200] {
        place.publish(version, &[60_000]);
        load(&place.publisher.store(), version, "p", &server);
    }
    place.install(&server.source("p:200"));
    let store = place.publisher.store();
    let old = store.resolve(&version_name(100)).unwrap();
    server.put_manifest("p/mos/system/system", "300", MANIFEST, &store.get(&old.digest, 1 << 20).unwrap());
    server.take_log();
    // A name that the user gives must tell the truth; one that is found is passed over.
    place.refused(&["update", &server.source("p:300")], 3, &["system:300", "version 100"]);
    place.refused(&["update", &server.source("p:100")], 4, &["100", "200"]);
    let log = server.take_log();
    assert!(log.iter().all(|seen| !seen.path.contains("/mos/images/")), "before a blob moves: {log:?}");
    let said = place.run(&["update", &server.source("p")]);
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(text(&said.stderr).contains("system:300 is passed over"), "{}", text(&said.stderr));
}

#[test]
fn a_redirect_carries_the_blob_and_not_the_token() {
    let options = Options { tokens: Some((String::new(), None)), ..Options::default() };
    let (place, registry, layer) = served(options, 200_000);
    let store = Server::start(Options::default());
    store.put_blob("elsewhere", &place.publisher.store().get(&layer.digest, 1 << 20).unwrap());
    let digest = layer.digest;
    // Another port, and another name of this machine.
    for host in [store.host(), store.host().replace("127.0.0.1", "localhost")] {
        let location = format!("http://{host}/v2/elsewhere/blobs/{digest}?X-Signature=hunter2");
        let expired = std::sync::Arc::new(AtomicUsize::new(0));
        registry.script(move |seen, _| {
            let there = seen.gets(&digest) && seen.header("authorization").is_some();
            there.then(|| Fault::Answer(307, vec![("Location", location.clone())], Vec::new()))
        });
        // The link has ended: the registry is asked for a new one, once.
        let count = expired.clone();
        store.script(move |_, _| {
            (count.fetch_add(1, Ordering::SeqCst) == 0)
                .then(|| Fault::Answer(403, Vec::new(), b"Request has expired".to_vec()))
        });
        let name = format!("copy-{}", host.replace([':', '.'], "-"));
        let said =
            place.run(&["pull", "-vv", &registry.source("p"), "--store", &display(&place.path(&name))]);
        assert!(said.status.success(), "{}", text(&said.stderr));
        assert!(!text(&said.stderr).contains("hunter2"), "{}", text(&said.stderr));
        let log = store.take_log();
        assert_eq!(log.len(), 2, "{log:?}");
        assert!(log.iter().all(|seen| seen.header("authorization").is_none()), "{log:?}");
    }
    // A target that never lets anyone in, and a message without the signature.
    store.script(|_, _| Some(Fault::Answer(403, Vec::new(), Vec::new())));
    let output = place.run(&["pull", "-vv", &registry.source("p"), "--store", &display(&place.path("bad"))]);
    let said = refused(&output, 1, &["access denied (403)", "at the server that the registry leads to"]);
    assert!(!said.contains("hunter2") && !said.contains("sesame"), "{said}");
}

#[test]
fn redirects_end() {
    let (place, server, layer) = served(Options::default(), 50_000);
    let digest = layer.digest;
    // It leads to itself, by a relative path; then by a URL; then to what is no URL.
    server.script(move |seen, _| {
        seen.gets(&digest).then(|| Fault::Answer(302, vec![("Location", digest.to_string())], Vec::new()))
    });
    refused(&pull_bounded(&place, &server.source("p")), 1, &["the redirects do not end"]);
    let looping = server.url();
    server.script(move |seen, _| {
        let location = format!("{looping}{}", seen.path);
        seen.path.contains("/blobs/").then(|| Fault::Answer(302, vec![("Location", location)], Vec::new()))
    });
    refused(&pull_bounded(&place, &server.source("p")), 1, &["the redirects do not end"]);
    assert!(server.take_log().len() < 40);
    for (location, words) in
        [("ftp://h/x", "not an http or https URL"), ("http://user:pw@h/x", "user or password")]
    {
        server.script(move |seen, _| {
            seen.path
                .contains("/blobs/")
                .then(|| Fault::Answer(302, vec![("Location", location.into())], Vec::new()))
        });
        let said = refused(&pull_bounded(&place, &server.source("p")), 1, &[words]);
        assert!(said.len() < 1000, "{said}");
    }
}

/// A portal that answers for every server: it is named, and so is what led there.
#[test]
fn what_is_no_registry_is_named() {
    let (place, server, _) = served(Options::default(), 20_000);
    let page = || b"<html>log in</html>".to_vec();
    server.script(move |_, _| Some(Fault::Answer(200, vec![("Content-Type", "text/html".into())], page())));
    let words = ["tags/list: expected a list of tags in JSON, found the media type `text/html`"];
    refused(&pull_bounded(&place, &server.source("p")), 1, &words);
    // A port that nobody listens on.
    let portal = "http://127.0.0.1:1/login".to_string();
    server.script(move |_, _| Some(Fault::Answer(302, vec![("Location", portal.clone())], Vec::new())));
    let from = format!("Connection refused (os error 111) (redirected from {}/v2/p/", server.url());
    refused(&pull_bounded(&place, &server.source("p")), 1, &["GET http://127.0.0.1:1/login: ", &from]);
}

#[test]
fn pages_of_a_list_end_and_stay_on_their_server() {
    let (place, server, _) = served(Options::default(), 50_000);
    let other = Server::start(Options::default());
    server.script(|seen, _| {
        let next = "</v2/p/mos/system/system/tags/list?n=1&last=x>; rel=\"next\"";
        seen.path.contains("/tags/list").then(|| Fault::Header("Link", next.into()))
    });
    place.pull(&server.source("p"), "copy");
    assert_eq!(server.take_log().iter().filter(|seen| seen.path.contains("/tags/list")).count(), 100);
    let elsewhere = format!("<{}/v2/x/tags/list>; rel=\"next\"", other.url());
    server.script(move |seen, _| {
        seen.path.contains("/tags/list").then(|| Fault::Header("Link", elsewhere.clone()))
    });
    refused(&pull_bounded(&place, &server.source("p")), 1, &["must be of the same server"]);
    assert!(other.take_log().is_empty());
}

/// Puts an image of one layer into a test's registry; the layer's descriptor is changed by `change`.
fn put_image(server: &Server, name: &str, change: impl FnOnce(&mut Descriptor)) -> Descriptor {
    let config = b"{\"architecture\":\"amd64\",\"os\":\"linux\"}";
    server.put_blob(name, config);
    let mut layer = Descriptor::of(SQUASHFS_ZSTD, b"not there");
    change(&mut layer);
    let mut manifest = Manifest::artifact("x", layer.clone(), None);
    manifest.artifact_type = None;
    manifest.config = Descriptor::of(CONFIG, config);
    server.put_manifest(name, "1", MANIFEST, &manifest.to_bytes());
    layer
}

#[test]
fn urls_in_a_descriptor_are_never_followed() {
    let (place, server, other) =
        (Place::new(), Server::start(Options::default()), Server::start(Options::default()));
    put_image(&server, "x", |layer| {
        layer.extra.insert("urls".into(), vec![format!("{}/evil", other.url())].into());
    });
    let store = display(&place.path("store2"));
    place.refused(
        &["pull", "--image", &server.source("x:1"), "--store", &store],
        1,
        &["does not have the blob"],
    );
    assert!(other.take_log().is_empty());
}

#[test]
fn a_layer_that_does_not_fit_is_refused_before_it_is_fetched() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    let layer = put_image(&server, "x", |layer| layer.size = 1 << 50);
    let store = display(&place.path("store2"));
    place.refused(&["pull", "--image", &server.source("x:1"), "--store", &store], 1, &["bytes", "are free"]);
    assert!(server.take_log().iter().all(|seen| !seen.gets(&layer.digest)));
}

#[test]
fn indexes_lead_to_one_manifest_of_this_platform_or_end() {
    let (place, server) = (Place::new(), Server::start(Options::default()));
    let store = display(&place.path("store2"));
    // An index of this machine's platform and another one.
    put_image(&server, "x", |_| {});
    let manifest = server.manifest("x", "1").unwrap();
    let entry = |architecture: &str| {
        serde_json::json!({
            "mediaType": MANIFEST, "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let index = |entries: Vec<serde_json::Value>| {
        serde_json::json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries })
            .to_string()
            .into_bytes()
    };
    server.put_manifest("x", "other", INDEX, &index(vec![entry("s390x"), entry("mips")]));
    let args = |tag: &str| {
        [
            "pull".to_string(),
            "--image".into(),
            server.source(&format!("x:{tag}")),
            "--store".into(),
            store.clone(),
        ]
    };
    let run = |tag: &str| place.run(&args(tag).iter().map(String::as_str).collect::<Vec<_>>());
    refused(&run("other"), 2, &["is not for this machine", "linux/s390x"]);
    // Indexes of indexes.
    let mut inner = index(vec![entry("amd64")]);
    for depth in 0..6 {
        let digest = server.put_manifest("x", &format!("deep-{depth}"), INDEX, &inner);
        let entry =
            serde_json::json!({ "mediaType": INDEX, "digest": digest.to_string(), "size": inner.len() });
        inner = index(vec![entry]);
    }
    refused(&run("deep-5"), 1, &["nest deeper"]);
    // A document of another kind.
    server.put_manifest(
        "x",
        "v1",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        b"{\"schemaVersion\":1}",
    );
    refused(&run("v1"), 2, &["no image named `v1`"]);
    server.script(|seen, _| {
        let html = "text/html; charset=utf-8".to_string();
        seen.path
            .contains("/manifests/html")
            .then(|| Fault::Answer(200, vec![("Content-Type", html)], b"<html>".to_vec()))
    });
    refused(&run("html"), 1, &["expected a manifest or index", "text/html"]);
}

#[test]
fn names_that_are_none_are_refused_before_anything_is_asked() {
    let place = Place::new();
    let store = display(&place.path("store2"));
    let long = format!("docker://127.0.0.1:1/{}", "a".repeat(256));
    for bad in [
        "docker://127.0.0.1:1/../x",
        "docker://127.0.0.1:1/a%2e%2e/x",
        "docker://127.0.0.1:1/a:b\r\nHost: evil",
        "docker://user:pw@127.0.0.1:1/a",
        "docker://127.0.0.1:1/A",
        "docker://127.0.0.1:0/a",
        "docker://127.0.0.1:1/a:t@sha256:00",
        &long,
    ] {
        let output = place.run(&["pull", bad, "--store", &store]);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}", text(&output.stderr));
    }
}
