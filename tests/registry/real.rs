//! Against Debian's docker-registry, with skopeo as the other client.

use std::fs;
use std::process::Command;

use mosfs::internals::image::oci::SYSTEM_REPOSITORY;
use mosfs::internals::store::{Store, version_name};

use crate::debian::{Config, Debian};
use crate::place::{Place, display, layers_of, system_of, text};

pub fn skopeo(args: &[&str]) -> String {
    let output = Command::new("skopeo")
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run skopeo: {error}; install the Debian package `skopeo`"));
    assert!(output.status.success(), "skopeo {args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The body of an answer, by curl-less means: skopeo's own view of a reference.
fn digest_there(reference: &str) -> String {
    skopeo(&["inspect", "--tls-verify=false", "--raw", &format!("docker://{reference}")])
}

#[test]
fn what_is_pushed_is_pulled_byte_for_byte() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    place.publish(200, &[300_000, 20_000]);
    let pushed = place.push(&registry.source("team/a"));
    assert!(pushed.contains("pushed version 200"), "{pushed}");
    place.pull(&registry.source("team/a"), "copy");

    let (ours, copy) = (place.publisher.store(), Store::open(&place.path("copy")).unwrap());
    let names = |store: &Store| {
        store.names().unwrap().into_iter().map(|(name, entry)| (name, entry.digest)).collect::<Vec<_>>()
    };
    assert_eq!(names(&ours), names(&copy));
    let system = ours.resolve(&version_name(200)).unwrap();
    let digests = |store: &Store| {
        let mut found: Vec<_> =
            store.referrers(&system.digest, None).unwrap().iter().map(|one| one.digest).collect();
        found.sort();
        found
    };
    assert_eq!(digests(&ours).len(), 3);
    assert_eq!(digests(&ours), digests(&copy));
    place.ok(&["verify", &format!("oci:{}", display(&place.path("copy")))]);

    // Again: nothing is sent, nothing is fetched.
    assert!(place.push(&registry.source("team/a")).contains("0 blobs sent, 0 mounted"));
    assert!(place.pull(&registry.source("team/a"), "copy").contains(": 0 blobs fetched"));
    // The signed manifest and its signature are what was pushed.
    let show = |source: &str| place.run(&["manifest", "show", source]).stdout;
    assert_eq!(show(&place.publisher.source()), show(&registry.source("team/a:200")));
}

#[test]
fn skopeo_reads_what_mosfs_pushed_and_the_other_way_round() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    place.publish(200, &[100_000]);
    place.push(&registry.source("p"));
    let ours = place.publisher.store();
    let (_, images) = system_of(&ours, 200);
    let digest = images[0].1.digest;

    // skopeo copies the image to a layout, with the same manifest.
    let layout = place.path("skopeo");
    let from = format!("docker://{}/p/mos/images/hostfs:{}", registry.host(), digest.hex());
    skopeo(&["copy", "-q", "--src-tls-verify=false", &from, &format!("oci:{}:x", display(&layout))]);
    assert_eq!(Store::open(&layout).unwrap().resolve("x").unwrap().digest, digest);

    // skopeo pushes it elsewhere, with a tag of its own; mosfs pulls it, by tag and by digest.
    let to = format!("docker://{}/by/skopeo:1.2", registry.host());
    skopeo(&["copy", "-q", "--dest-tls-verify=false", &format!("oci:{}:x", display(&layout)), &to]);
    let store = display(&place.path("pulled"));
    place.ok(&["pull", "--image", &registry.source("by/skopeo:1.2"), "--store", &store]);
    place.ok(&[
        "pull",
        "--image",
        &registry.source(&format!("by/skopeo@{digest}")),
        "--store",
        &store,
        "--name",
        "pinned",
    ]);
    let pulled = Store::open(&place.path("pulled")).unwrap();
    for name in ["by/skopeo:1.2", "pinned"] {
        assert_eq!(pulled.resolve(name).unwrap().digest, digest, "{name}");
    }
    place.ok(&["verify", &format!("oci:{store}")]);
    // What was only tagged by the version is listed by its names.
    let said = place.refused(
        &["pull", "--image", &registry.source("by/skopeo:9"), "--store", &store],
        2,
        &["has no image named `9`", "`1.2`"],
    );
    assert!(said.contains("docker://127.0.0.1"), "{said}");
}

#[test]
fn the_registry_holds_the_names_that_are_promised() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    place.publish(200, &[50_000]);
    place.push(&registry.source("p:200"));
    let ours = place.publisher.store();
    let (manifest, images) = system_of(&ours, 200);
    let hex = manifest.digest().hex();
    let system = ours.resolve(&version_name(200)).unwrap();
    let host = registry.host();
    let at = |name: &str| digest_there(&format!("{host}/p/{name}"));
    let expected = text(&ours.get(&system.digest, 1 << 20).unwrap());
    for tag in ["200".to_string(), hex.clone()] {
        assert_eq!(at(&format!("{SYSTEM_REPOSITORY}:{tag}")), expected, "{tag}");
    }
    let image = text(&ours.get(&images[0].1.digest, 1 << 20).unwrap());
    assert_eq!(at(&format!("mos/images/hostfs:{}", images[0].1.digest.hex())), image);
    // Who leaves the tag out reads what there is.
    let (unnamed, store) = (registry.source("p/mos/images/hostfs"), display(&place.path("image")));
    let words = ["has no image named `latest`; it has", &images[0].1.digest.hex()];
    place.refused(&["pull", "--image", &unnamed, "--store", &store], 2, &words);
    // The registry keeps no list of referrers: the fallback index has all three, with their types.
    let index: serde_json::Value =
        serde_json::from_str(&at(&format!("{SYSTEM_REPOSITORY}:sha256-{}", system.digest.hex()))).unwrap();
    let entries = index["manifests"].as_array().unwrap();
    let kinds: Vec<_> = entries.iter().map(|one| one["artifactType"].as_str().unwrap()).collect();
    assert_eq!(kinds.len(), 3, "{index}");
    for kind in ["signature", "certificate", "floor-signature"] {
        assert!(kinds.contains(&format!("application/vnd.mos.system.{kind}.v1").as_str()), "{kinds:?}");
    }
    // Each has a tag of its own, so that garbage collection of untagged manifests leaves it.
    for tag in ["sig", "cert", "floor"] {
        at(&format!("{SYSTEM_REPOSITORY}:{hex}.{tag}"));
    }
    let output = Command::new("docker-registry")
        .args(["garbage-collect", "--delete-untagged"])
        .arg(registry.config())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    place.pull(&registry.source("p"), "after-collection");
}

#[test]
fn a_device_installs_and_updates_from_a_registry() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    place.publish(200, &[200_000, 30_000]);
    place.push(&registry.source("fleet/x"));
    let source = registry.source("fleet/x");
    assert!(place.install(&source).contains("installed version 200"));
    assert!(place.ok(&["update", "--check", &source]).contains("version 200 is installed"));

    // A second version that keeps a layer: only what is new is fetched.
    let kept = layers_of(&place.publisher.store(), 200)[0].clone();
    let new = place.publisher.add_layer(&crate::place::noise(40_000, 7));
    place.publisher.publish_layers(201, vec![kept.clone(), new.clone()], true);
    let pushed = place.push(&source);
    assert!(pushed.contains("pushed version 201"), "{pushed}");
    assert!(place.ok(&["update", "--check", &source]).contains("version 201 would be installed"));
    let plan = place.ok(&["update", "--dry-run", &source]);
    assert!(plan.contains(&new.digest.to_string()) && !plan.contains(&kept.digest.to_string()), "{plan}");
    place.ok(&["update", &source]);
    assert!(place.ok(&["update", "--check", &source]).contains("version 201 is pending"));
    // An older one by its version: refused before anything moves, exit code 4.
    place.refused(
        &["update", &registry.source("fleet/x:199")],
        2,
        &["has no image named `199`", "`200`", "`201`"],
    );
    let store = Store::open(&place.path("system/store")).unwrap();
    assert!(layers_of(&store, 201).iter().all(|layer| store.has(layer)));
    assert_eq!(fs::read_dir(place.path("system/store/.mosfs/partial")).unwrap().count(), 0);
}

#[test]
fn a_layer_of_two_targets_is_sent_once() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    let shared = place.publisher.add_layer(&crate::place::noise(100_000, 1));
    let targets = [("hostfs", "hostfs", vec![shared.clone()]), ("web", "container", vec![shared])];
    place.publisher.publish_targets(200, &targets, true);
    let pushed = place.push(&registry.source("p"));
    // The layer and the empty config of each target's image differ in nothing but the config.
    assert!(pushed.contains(" 1 mounted"), "{pushed}");
    place.pull(&registry.source("p"), "copy");
}

#[test]
fn a_version_stands_for_one_system_in_a_registry_too() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    place.publish(200, &[10_000]);
    place.push(&registry.source("p"));
    let other = Place::new();
    other.publish(200, &[20_000]);
    let store = display(&other.store());
    other.refused(
        &["push", "--store", &store, &registry.source("p")],
        2,
        &["has another system of version 200", "mos/system/system"],
    );
}

#[test]
fn a_build_fetches_its_images_from_a_registry() {
    let (place, registry) = (Place::new(), Debian::start(&Config::default()));
    // An image of tar layers, as other tools make them.
    let root = place.path("image");
    let script = format!(
        "umoci init --layout {0} && umoci new --image {0}:v && mkdir -p {0}/tree && echo hello > {0}/tree/hello && \
         umoci insert --image {0}:v {0}/tree / && rm -r {0}/tree && \
         skopeo copy -q --dest-tls-verify=false oci:{0}:v docker://{1}/base/image:1.0",
        display(&root),
        registry.host()
    );
    let output = Command::new("sh").args(["-ec", &script]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let import = |url: &str| {
        let path = place.path("import.yaml");
        let yaml = format!(
            "version: 300\nproduct: {}\ntargets:\n  hostfs:\n    url: \"{url}\"\n    version: 1.0.0\n    \
             service_type: hostfs\n    network: {{type: host}}\n",
            crate::publish::PRODUCT
        );
        fs::write(&path, yaml).unwrap();
        display(&path)
    };
    let build = |url: &str, store: &str| {
        let key = |name: &str| display(&place.publisher.key(name));
        let (file, store) = (import(url), display(&place.path(store)));
        place.run(&[
            "build",
            &file,
            "--store",
            &store,
            "--key",
            &key("signer.key"),
            "--cert",
            &key("signer.pem"),
        ])
    };
    let by_tag = build(&registry.source("base/image:1.0"), "one");
    assert!(by_tag.status.success(), "{}", text(&by_tag.stderr));
    let local = build(&format!("oci:{}:v", display(&root)), "two");
    assert_eq!(text(&by_tag.stdout), text(&local.stdout), "the same image gives the same system");
    let missing = build(&registry.source("base/image"), "three");
    crate::place::refused(&missing, 2, &["target `hostfs`", "no image named `latest`", "`1.0`"]);
    place.ok(&["verify", &format!("oci:{}", display(&place.path("one")))]);
}
