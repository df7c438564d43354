//! Layers that several targets of a system have: each is converted once for a build, and comes out as it does alone.

#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/tar_images.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod tar_images;
#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::Platform;
use mosfs::internals::transport::{OciDir, Transport};
use serde_json::Value;
use tar_images::Fixture;
use tarball::{Header, Tarball};
use tools::{run, run_any};

/// The images, and their layers. `above` has a layer of `one` above another one, where it is converted to other bytes.
const IMAGES: [(&str, [&str; 2]); 3] =
    [("one", ["closed", "one"]), ("two", ["closed", "two"]), ("above", ["open", "one"])];

/// A target: its name, its service type, its image, and more lines.
type Target = (&'static str, &'static str, &'static str, &'static str);

/// The targets, each with its image. Two have the same image, one packs its layers otherwise.
const TARGETS: [Target; 5] = [
    ("hostfs", "hostfs", "one", ""),
    ("again", "fs-only", "one", ""),
    ("two", "fs-only", "two", ""),
    ("above", "fs-only", "above", ""),
    ("otherwise", "fs-only", "two", "    layer: {compression: lz4}\n"),
];

/// A base with a folder of its owner alone, the same folder of everybody, and layers that only imply it.
fn layers() -> [(&'static str, Tarball); 4] {
    let folder = |mode: u64| {
        let mut header = Header::new(b'5', b"srv/", 0);
        header.octal(100, 8, mode);
        let mut tar = Tarball::default();
        tar.raw(header, b"").file("etc/text", &b"text, again and again. ".repeat(5000));
        tar
    };
    let file = |content: &[u8]| {
        let mut tar = Tarball::default();
        tar.file("srv/file", content);
        tar
    };
    [("closed", folder(0o700)), ("open", folder(0o755)), ("one", file(b"one")), ("two", file(b"two"))]
}

fn fixture() -> (Fixture, BTreeMap<&'static str, Digest>) {
    let fixture = Fixture::new();
    let layers: BTreeMap<_, _> = layers().into();
    let image = |name: &str, of: &[&str]| {
        fixture.image_of_layers(name, &of.iter().map(|layer| layers[layer].clone()).collect::<Vec<_>>());
    };
    IMAGES.iter().for_each(|(name, of)| image(name, of));
    let mut digests = BTreeMap::new();
    let images: Box<dyn Transport> = Box::new(OciDir::open(&fixture.path("images")).unwrap());
    for (image, of) in IMAGES {
        let found = images.find_image(Some(image), &Platform::this_machine()).unwrap();
        for (layer, name) in images.image(&found).unwrap().layers.iter().zip(of) {
            assert_eq!(*digests.entry(name).or_insert(layer.digest), layer.digest);
        }
    }
    (fixture, digests)
}

/// Builds targets into a store; how often each layer was converted, as the progress says.
fn build(fixture: &Fixture, store: &str, head: &str, targets: &[Target]) -> BTreeMap<String, u32> {
    fixture.import(200, head, targets);
    let mut command = fixture.build_into(store);
    let output = run_any(command.args(["--progress-fd", "1", "--json"]).stdin(Stdio::null()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let mut conversions = BTreeMap::new();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_default();
        if event["event"] == "start" && event["step"] == "convert" {
            *conversions.entry(event["object"].as_str().unwrap().to_string()).or_insert(0) += 1;
        }
    }
    conversions
}

fn check(head: &str, targets: &[Target], expected: &[(&str, u32)]) {
    let (fixture, layers) = fixture();
    let found = build(&fixture, "store", head, targets);
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(layer, times)| (layers[layer].to_string(), *times)).collect();
    assert_eq!(found, expected);
    for (at, target) in targets.iter().enumerate() {
        // Alone, and so converted for this target.
        let store = format!("alone-{at}");
        let (_, _, image, more) = *target;
        assert_eq!(
            build(&fixture, &store, head, &[("hostfs", "hostfs", image, more)]).values().sum::<u32>(),
            2
        );
        let (alone, shared) = (fixture.image_in(&store, "hostfs"), fixture.image_in("store", target.0));
        assert_eq!(alone.digest, shared.digest, "{}", target.0);
    }
    assert_ne!(fixture.image_in("store", "hostfs").digest, fixture.image_in("store", "above").digest);
    let store = fixture.path("store");
    run(Command::new(env!("CARGO_BIN_EXE_mosfs")).arg("verify").arg(format!("oci:{}", store.display())));
}

#[test]
fn a_layer_of_several_targets_is_converted_once() {
    // `one` is above two bases; `closed` and `two` are packed in two ways.
    check("", &TARGETS, &[("closed", 2), ("open", 1), ("one", 2), ("two", 2)]);
}

#[test]
fn a_layer_of_several_puzzlefs_images_is_converted_once() {
    // Their chunks are packed in one way.
    check("storage_type: puzzlefs\n", &TARGETS[..4], &[("closed", 1), ("open", 1), ("one", 2), ("two", 1)]);
}
