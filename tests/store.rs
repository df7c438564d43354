//! The store and the layouts that it reads: made by skopeo and umoci, damaged, raced for, killed.

#[path = "common/tools.rs"]
mod tools;

use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use mosfs::internals::digest::Digest;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::index::Index;
use mosfs::internals::image::oci::{Descriptor, INDEX, MANIFEST, Manifest, Platform};
use mosfs::internals::progress::{Progress, Task};
use mosfs::internals::store::{Store, StoreError, fsck};
use mosfs::internals::transport::{Access, OciDir, SourceRef, Transport, TransportError};
use tempfile::TempDir;
use tools::{run, sh};

fn quiet() -> Task {
    Progress::silent().task("", "", None)
}

fn two() -> NonZeroUsize {
    NonZeroUsize::new(2).unwrap()
}

/// An image of one small layer in a layout that umoci made, under the names `v1` and `v2`.
fn umoci_layout(dir: &Path) {
    sh(
        dir,
        "mkdir -p tree/etc; echo content > tree/etc/file; tar -C tree -cf layer.tar .
         umoci init --layout umoci; umoci new --image umoci:v1
         umoci raw add-layer --image umoci:v1 layer.tar; umoci tag --image umoci:v1 v2",
    );
}

fn transport(dir: &Path) -> Box<dyn Transport> {
    SourceRef::oci(dir, None).open(&Access::default()).unwrap()
}

/// Brings an image as it is from a layout into a store, under a name.
fn bring(from: &dyn Transport, store: &Store, name: &str, to: &str) -> Descriptor {
    let found = from.find_image(Some(name), &Platform::this_machine()).unwrap();
    let manifest = from.manifest(&found).unwrap();
    let writer = store.writer().unwrap();
    for blob in manifest.layers.iter().chain([&manifest.config, &found]) {
        writer.fetch(from, blob, &quiet()).unwrap();
    }
    writer.set_name(to, &found).unwrap();
    found
}

#[test]
fn layouts_of_umoci_and_skopeo_are_read_and_ours_by_them() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path();
    umoci_layout(dir);
    sh(dir, "skopeo --insecure-policy copy -q oci:umoci:v1 oci:skopeo:some/name:tag");
    for (layout, name) in [("umoci", "v1"), ("umoci", "v2"), ("skopeo", "some/name:tag")] {
        let from = transport(&dir.join(layout));
        let store = Store::create(&dir.join(format!("store-{}", name.len()))).unwrap();
        let found = bring(&*from, &store, name, "mos/images/hostfs:sha256/00");
        assert!(fsck::check(&store, two(), &Progress::silent()).unwrap().is_good());
        let path = format!("oci:{}:mos/images/hostfs:sha256/00", store.dir().display());
        let shown = run(Command::new("skopeo").args(["inspect", &path]));
        assert!(shown.contains(&found.digest.to_string()), "{shown}");
        let listed = run(Command::new("umoci").args(["ls", "--layout"]).arg(store.dir()));
        assert_eq!(listed.trim(), "mos/images/hostfs:sha256/00");
        // umoci's own garbage collection keeps what we named.
        run(Command::new("umoci").args(["gc", "--layout"]).arg(store.dir()));
        assert!(fsck::check(&store, two(), &Progress::silent()).unwrap().is_good());
    }
    // Blobs are nobody's to change.
    let blob = fs::read_dir(dir.join("store-2/blobs/sha256")).unwrap().next().unwrap().unwrap();
    assert_eq!(blob.metadata().unwrap().permissions().mode() & 0o777, 0o444);
}

#[test]
fn a_blob_shares_no_file_with_its_source() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let from = transport(&folder.path().join("umoci"));
    let store = Store::create(&folder.path().join("store")).unwrap();
    let found = bring(&*from, &store, "v1", "x");
    let theirs = folder.path().join("umoci/blobs/sha256").join(found.digest.hex());
    let ours = store.blob_path(&found.digest);
    assert_ne!(theirs.metadata().unwrap().ino(), ours.metadata().unwrap().ino());
    assert_eq!(ours.metadata().unwrap().nlink(), 1);
    fs::OpenOptions::new().append(true).open(theirs).unwrap().write_all(b"!").unwrap();
    store.get(&found.digest, 10_000).unwrap();
}

#[test]
fn a_missing_name_tells_those_that_there_are() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let from = transport(&folder.path().join("umoci"));
    let error = from.find_image(Some("v3"), &Platform::this_machine()).unwrap_err();
    assert!(
        matches!(&error, TransportError::NameMissing { available, .. } if *available == ["v1", "v2"]),
        "{error}"
    );
    assert_eq!(error.class(), Class::Input);
    // Both names stand for one image, so none is needed.
    let only = from.find_image(None, &Platform::this_machine()).unwrap();
    assert_eq!(only.digest, from.find_image(Some("v1"), &Platform::this_machine()).unwrap().digest);
    sh(folder.path(), "umoci new --image umoci:other");
    let error = from.find_image(None, &Platform::this_machine()).unwrap_err();
    assert!(matches!(error, TransportError::NameNeeded { .. }), "{error}");
}

/// Puts an index of platforms around a manifest, under the name `multi`.
fn with_platforms(store: &Store, platforms: &[(&str, Option<&str>, &Descriptor)]) {
    let writer = store.writer().unwrap();
    let mut index = Index::empty();
    for (architecture, variant, manifest) in platforms {
        let mut entry = (*manifest).clone();
        entry.annotations.clear();
        entry.platform = Some(Box::new(Platform {
            architecture: (*architecture).into(),
            os: "linux".into(),
            variant: variant.map(Into::into),
            extra: Default::default(),
        }));
        index.manifests.push(entry);
    }
    let inner = writer.put_bytes(INDEX, &index.to_bytes()).unwrap();
    // An index in an index, as some registries' copies are.
    let outer = Index { manifests: vec![inner], ..Index::empty() };
    let outer = writer.put_bytes(INDEX, &outer.to_bytes()).unwrap();
    writer.set_name("multi", &outer).unwrap();
}

#[test]
fn of_several_platforms_this_machines_is_taken() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let from = transport(&folder.path().join("umoci"));
    let store = Store::create(&folder.path().join("store")).unwrap();
    let ours = bring(&*from, &store, "v1", "ours");
    sh(folder.path(), "umoci new --image umoci:other");
    let other = bring(&*from, &store, "other", "other");
    let here = Platform::this_machine();
    let arch = here.architecture.as_str();

    with_platforms(&store, &[("mips", None, &other), (arch, Some("v99"), &other), (arch, None, &ours)]);
    let layout: &dyn Transport = store.transport();
    assert_eq!(layout.find_image(Some("multi"), &here).unwrap().digest, ours.digest);

    with_platforms(&store, &[("mips", None, &other), ("s390x", None, &other)]);
    let error = layout.find_image(Some("multi"), &here).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, TransportError::WrongPlatform { .. }));
    assert!(
        text.contains(&format!("expected linux/{arch}")) && text.contains("linux/mips, linux/s390x"),
        "{text}"
    );

    with_platforms(&store, &[(arch, None, &other), (arch, None, &ours)]);
    let error = layout.find_image(Some("multi"), &here).unwrap_err();
    assert!(matches!(error, TransportError::Ambiguous { .. }), "{error}");
    assert!(fsck::check(&store, two(), &Progress::silent()).unwrap().is_good());
}

#[test]
fn indexes_without_end_are_refused() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let writer = store.writer().unwrap();
    let mut inner = writer.put_bytes(MANIFEST, b"{}").unwrap();
    for _ in 0..12 {
        let index = Index { manifests: vec![inner], ..Index::empty() };
        inner = writer.put_bytes(INDEX, &index.to_bytes()).unwrap();
    }
    writer.set_name("deep", &inner).unwrap();
    let layout: &dyn Transport = store.transport();
    let error = layout.find_image(Some("deep"), &Platform::this_machine()).unwrap_err();
    assert!(matches!(error, TransportError::TooDeep { .. }), "{error}");
}

/// What is wrong with a blob, and the error that fetching it gives. Rule: every blob is verified against digest and size.
#[test]
fn a_blob_that_is_not_what_it_should_be_is_not_stored() {
    let folder = TempDir::new().unwrap();
    let source = Store::create(&folder.path().join("source")).unwrap();
    let blob = source.writer().unwrap().put_bytes("x", &[7; 10_000]).unwrap();
    let path = source.blob_path(&blob.digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let from: &dyn Transport = source.transport();
    let refused = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        let writer = store.writer().unwrap();
        let error = writer.fetch(from, &blob, &quiet()).unwrap_err();
        assert_eq!(error.class(), Class::Verification);
        assert!(!store.blob_path(&blob.digest).exists());
        assert_eq!(
            fs::read_dir(store.dir().join(".mosfs/tmp")).unwrap().count(),
            0,
            "a temporary file stays"
        );
        let small = from.fetch(&blob, 1 << 20).unwrap_err();
        assert_eq!(small.class(), Class::Verification);
        error
    };
    let mut flipped = vec![7; 10_000];
    flipped[9_999] = 8;
    let error = refused(&flipped);
    assert!(
        matches!(error, StoreError::Transport(TransportError::DigestMismatch { expected, .. }) if expected == blob.digest)
    );
    for content in [&[7; 9_999][..], &[7; 10_001]] {
        let error = refused(content);
        assert!(
            matches!(error, StoreError::Transport(TransportError::SizeMismatch { expected: 10_000, .. })),
            "{error}"
        );
    }
    fs::remove_file(&path).unwrap();
    let error = store.writer().unwrap().fetch(from, &blob, &quiet()).unwrap_err();
    assert!(matches!(error, StoreError::Transport(TransportError::BlobMissing { .. })), "{error}");
    // Not a file: no hang.
    run(Command::new("mkfifo").arg(&path));
    assert!(store.writer().unwrap().fetch(from, &blob, &quiet()).is_err());
}

#[test]
fn a_store_is_not_made_among_other_things() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("precious"), b"").unwrap();
    let error = Store::create(folder.path()).unwrap_err();
    assert!(matches!(&error, StoreError::NotEmpty { found, .. } if found == "precious"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let error = Store::open(&folder.path().join("none")).unwrap_err();
    assert!(matches!(error, StoreError::Transport(TransportError::NotALayout { .. })), "{error}");
}

#[test]
fn names_set_by_many_at_once_are_all_there() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for number in 0..5 {
                    let writer = store.writer().unwrap();
                    let artifact =
                        writer.put_artifact("test/x", format!("{thread}{number}").as_bytes(), None).unwrap();
                    writer.set_name(&format!("name-{thread}-{number}"), &artifact).unwrap();
                }
            });
        }
    });
    assert_eq!(store.names().unwrap().len(), 20);
    assert!(fsck::check(&store, two(), &Progress::silent()).unwrap().is_good());
}

#[test]
fn unknown_parts_of_an_index_survive() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let path = folder.path().join("umoci/index.json");
    let text = fs::read_to_string(&path).unwrap().replacen(
        "{\"schemaVersion\"",
        "{\"theirs\":[1],\"schemaVersion\"",
        1,
    );
    fs::write(&path, text).unwrap();
    let store = Store::open(&folder.path().join("umoci")).unwrap();
    let writer = store.writer().unwrap();
    let artifact = writer.put_artifact("test/x", b"x", None).unwrap();
    writer.set_name("new", &artifact).unwrap();
    assert!(fs::read_to_string(&path).unwrap().contains("\"theirs\":[1]"));
    let listed = run(Command::new("umoci").args(["ls", "--layout"]).arg(folder.path().join("umoci")));
    assert_eq!(listed.split_whitespace().count(), 3, "{listed}");
}

#[test]
fn a_name_that_is_fixed_is_not_moved() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let writer = store.writer().unwrap();
    let one = writer.put_artifact("test/x", b"1", None).unwrap();
    let two = writer.put_artifact("test/x", b"2", None).unwrap();
    writer.set_name("v", &one).unwrap();
    writer.replace_entries(&[], &[(Some("v"), &one)], &["v"]).unwrap();
    let error = writer.replace_entries(&[], &[(Some("w"), &two), (Some("v"), &two)], &["v"]).unwrap_err();
    assert!(matches!(&error, StoreError::NameTaken { name, .. } if name == "v"), "{error}");
    assert_eq!(store.resolve("v").unwrap().digest, one.digest);
    assert!(store.resolve("w").is_err());
}

#[test]
fn referrers_are_found_by_subject_and_type() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let writer = store.writer().unwrap();
    let subject = writer.put_artifact("test/system", b"{}", None).unwrap();
    let other = writer.put_artifact("test/system", b"[]", None).unwrap();
    let sign = |kind, bytes: &[u8], about| writer.put_artifact(kind, bytes, Some(about)).unwrap();
    let (a, b, c) =
        (sign("t/sig", b"a", &subject), sign("t/cert", b"b", &subject), sign("t/sig", b"c", &other));
    writer
        .set_entries(&[(Some("s"), &subject), (Some("o"), &other), (None, &a), (None, &b), (None, &c)])
        .unwrap();
    let digests = |kind| -> Vec<Digest> {
        store.referrers(&subject.digest, kind).unwrap().iter().map(|one| one.digest).collect()
    };
    assert_eq!(digests(None), [a.digest, b.digest]);
    assert_eq!(digests(Some("t/sig")), [a.digest]);
    assert_eq!(digests(Some("t/none")), []);
}

#[test]
fn garbage_goes_and_all_else_stays() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let from = transport(&folder.path().join("umoci"));
    let store = Store::create(&folder.path().join("store")).unwrap();
    let image = bring(&*from, &store, "v1", "mos/images/x:1");
    let writer = store.writer().unwrap();
    let system = writer.put_artifact("test/system", b"kept", None).unwrap();
    let signature = writer.put_artifact("t/sig", b"kept too", Some(&system)).unwrap();
    let old = writer.put_artifact("test/system", b"old", None).unwrap();
    let old_signature = writer.put_artifact("t/sig", b"old signature", Some(&old)).unwrap();
    let about_old_signature = writer.put_artifact("t/note", b"old note", Some(&old_signature)).unwrap();
    let loose = writer.put_bytes("x", b"loose").unwrap();
    let entries = [
        (Some("new"), &system),
        (None, &signature),
        (Some("old"), &old),
        (None, &old_signature),
        (None, &about_old_signature),
    ];
    writer.set_entries(&entries).unwrap();
    fs::write(store.dir().join(".mosfs/tmp/12345-0"), b"left over").unwrap();

    // Whoever writes keeps the collection away.
    assert!(matches!(store.collector(), Err(StoreError::Busy { .. })));
    drop(writer);
    let report = fsck::check(&store, two(), &Progress::silent()).unwrap();
    assert!(report.is_good());
    assert_eq!((report.unreachable, report.extra_files.len()), (vec![loose.digest], 1));

    let collector = store.collector().unwrap();
    let plan = collector.plan(&[], &[loose.digest]).unwrap();
    assert_eq!((plan.blobs.len(), plan.files.len()), (0, 1), "a root of the caller's is kept");
    let plan = collector.plan(&["old".into()], &[]).unwrap();
    let before = fs::read_dir(store.dir().join("blobs/sha256")).unwrap().count();
    // A dry run changes nothing.
    assert_eq!(plan, collector.plan(&["old".into()], &[]).unwrap());
    assert_eq!(plan.names, ["old"]);
    let mut gone = vec![old_signature.digest, about_old_signature.digest];
    gone.sort();
    let mut referrers = plan.referrers.clone();
    referrers.sort();
    assert_eq!(referrers, gone);
    // loose, and of each of three artifacts manifest and layer; the empty config is still needed.
    assert_eq!(plan.blobs.len(), 7);
    collector.apply(&plan).unwrap();
    assert!(collector.plan(&[], &[]).unwrap().is_empty());
    drop(collector);
    assert_eq!(fs::read_dir(store.dir().join("blobs/sha256")).unwrap().count(), before - 7);
    assert_eq!(fs::read_dir(store.dir().join(".mosfs/tmp")).unwrap().count(), 0);
    let report = fsck::check(&store, two(), &Progress::silent()).unwrap();
    assert!(report.is_good() && report.unreachable.is_empty(), "{:?}", report.problems);
    assert_eq!(store.resolve("mos/images/x:1").unwrap().digest, image.digest);
    assert_eq!(store.referrers(&system.digest, None).unwrap().len(), 1);
}

#[test]
fn a_damaged_manifest_does_not_stop_the_collection_and_is_said() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let writer = store.writer().unwrap();
    let artifact = writer.put_artifact("test/x", b"x", None).unwrap();
    writer.set_name("x", &artifact).unwrap();
    let loose = writer.put_bytes("x", b"loose").unwrap();
    drop(writer);
    let path = store.blob_path(&artifact.digest);
    fs::remove_file(&path).unwrap();
    fs::write(&path, vec![b' '; artifact.size as usize]).unwrap();
    let collector = store.collector().unwrap();
    let plan = collector.plan(&[], &[]).unwrap();
    assert!(plan.damaged.len() == 1 && plan.damaged[0].starts_with("`x`: "), "{:?}", plan.damaged);
    assert_eq!(collector.apply(&plan).unwrap(), [] as [String; 0]);
    assert!(!store.has(&loose));
    assert_eq!(store.resolve("x").unwrap().digest, artifact.digest, "its name stays, to be mended");
    // What a folder in its place hides cannot be told from damage either.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(collector.plan(&[], &[]).unwrap().damaged.len(), 1);
}

#[test]
fn verify_lists_every_bad_object() {
    let folder = TempDir::new().unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let writer = store.writer().unwrap();
    let mut artifacts = Vec::new();
    for number in 0..4 {
        let artifact = writer.put_artifact("test/x", format!("content {number}").as_bytes(), None).unwrap();
        writer.set_name(&format!("name-{number}"), &artifact).unwrap();
        artifacts.push(artifact);
    }
    drop(writer);
    let layer = |number: usize| {
        let bytes = store.get(&artifacts[number].digest, 10_000).unwrap();
        Manifest::parse(&bytes).unwrap().layers[0].clone()
    };
    let (changed, missing, shorter) = (layer(0), layer(1), layer(2));
    let rewrite = |digest: &Digest, content: &[u8]| {
        fs::remove_file(store.blob_path(digest)).unwrap();
        fs::write(store.blob_path(digest), content).unwrap();
    };
    rewrite(&changed.digest, b"content X");
    fs::remove_file(store.blob_path(&missing.digest)).unwrap();
    rewrite(&shorter.digest, b"content");
    rewrite(&artifacts[3].digest, &vec![b'{'; artifacts[3].size as usize]);
    let report = fsck::check(&store, two(), &Progress::silent()).unwrap();
    let texts: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    let all = texts.join("\n");
    for digest in [changed.digest, missing.digest, shorter.digest, artifacts[3].digest] {
        assert!(all.contains(&digest.to_string()), "{digest} is not named in\n{all}");
    }
    assert!(all.contains("`name-1`: blob") && all.contains("is missing"), "{all}");
    assert!(all.contains("has 7 bytes, expected 9"), "{all}");
    assert_eq!(report.verdict("store").unwrap_err().class(), Class::Verification);
    let output = tools::run_any(
        Command::new(env!("CARGO_BIN_EXE_mosfs")).arg("verify").arg(format!("oci:{}", store.dir().display())),
    );
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), all);
}

#[test]
fn an_ordinary_layout_of_others_verifies() {
    let folder = TempDir::new().unwrap();
    umoci_layout(folder.path());
    let store = Store::open(&folder.path().join("umoci")).unwrap();
    let report = fsck::check(&store, two(), &Progress::silent()).unwrap();
    assert!(report.is_good(), "{:?}", report.problems);
    assert!(!folder.path().join("umoci/.mosfs").exists(), "verify wrote to a layout that is not ours");
    OciDir::open(store.dir()).unwrap();
}
