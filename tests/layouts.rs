//! Layouts as other tools leave them, and images that must not become part of a system: through `mosfs build`.

#[path = "common/whole/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::commands::{command, mosfs, need_root, output, refused, run};
use common::layers::{image, layer};
use common::scan::scan;
use common::system::{Mounted, build, image_name, import_manifest, keys, scratch, source};
use mosfs::internals::digest::Digest;
use serde_json::{Value, json};

/// A publisher with keys, and a layout with the image `one`.
struct Publisher {
    dir: tempfile::TempDir,
    keys: PathBuf,
    layout: PathBuf,
}

impl Publisher {
    fn new() -> Self {
        need_root();
        let dir = scratch();
        let (keys, layout) = (keys(dir.path()), dir.path().join("layout"));
        image(&layout, "one", vec![layer().dir("./").file("a", "one")]);
        Self { dir, keys, layout }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// The command that builds from a source, into an empty store.
    fn build(&self, url: &str) -> std::process::Command {
        let _ = fs::remove_dir_all(self.store());
        let manifest = self.dir.path().join("import.yaml");
        import_manifest(&manifest, url.as_ref());
        build(&manifest, &self.store(), &self.keys)
    }

    fn url(&self, rest: &str) -> String {
        format!("oci:{}{rest}", self.layout.display())
    }

    fn index(&self) -> Value {
        serde_json::from_slice(&fs::read(self.layout.join("index.json")).unwrap()).unwrap()
    }

    fn write_index(&self, index: &Value) {
        fs::write(self.layout.join("index.json"), serde_json::to_vec(index).unwrap()).unwrap();
    }

    fn put(&self, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({ "digest": digest.to_string(), "size": bytes.len() })
    }

    /// Names a manifest of these layers.
    fn name_image(&self, name: &str, layers: &[Value]) {
        let mut config = self.put(b"{}");
        config["mediaType"] = "application/vnd.oci.empty.v1+json".into();
        let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers });
        let mut entry = self.put(&serde_json::to_vec(&manifest).unwrap());
        entry["mediaType"] = manifest["mediaType"].clone();
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let mut index = self.index();
        index["manifests"].as_array_mut().unwrap().push(entry);
        self.write_index(&index);
    }
}

#[test]
fn the_only_image_needs_no_name_and_any_has_a_digest() {
    let publisher = Publisher::new();
    let mut index = publisher.index();
    let digest = index["manifests"][0]["digest"].as_str().unwrap().to_string();
    index["manifests"][0].as_object_mut().unwrap().remove("annotations");
    publisher.write_index(&index);
    run(&mut publisher.build(&publisher.url("")));
    // A second one, and a digest is needed; one that no entry has counts too.
    image(&publisher.dir.path().join("other"), "two", vec![layer().file("b", "two")]);
    for blob in fs::read_dir(publisher.dir.path().join("other/blobs/sha256")).unwrap() {
        let blob = blob.unwrap();
        fs::copy(blob.path(), publisher.layout.join("blobs/sha256").join(blob.file_name())).unwrap();
    }
    let other: Value =
        serde_json::from_slice(&fs::read(publisher.dir.path().join("other/index.json")).unwrap()).unwrap();
    let mut two = other["manifests"][0].clone();
    two.as_object_mut().unwrap().remove("annotations");
    index["manifests"].as_array_mut().unwrap().push(two.clone());
    publisher.write_index(&index);
    let said = refused(&mut publisher.build(&publisher.url("")), 2);
    assert!(said.contains("holds 2 images") && said.contains("@sha256:"), "{said}");
    run(&mut publisher.build(&publisher.url(&format!("@{digest}"))));
    index["manifests"].as_array_mut().unwrap().pop();
    publisher.write_index(&index);
    let two = two["digest"].as_str().unwrap();
    run(&mut publisher.build(&publisher.url(&format!("@{two}"))));
    let store = publisher.store();
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &publisher.dir.path().join("mnt"));
    assert!(scan(mounted.dir()).contains_key(b"b".as_slice()));
    mounted.unmount();
}

#[test]
fn entries_that_cannot_be_read_are_passed_over_unless_asked_for() {
    let publisher = Publisher::new();
    let mut index = publisher.index();
    let entries = index["manifests"].as_array_mut().unwrap();
    let mut other = entries[0].clone();
    other["digest"] = format!("sha512:{}", "0".repeat(128)).into();
    other["annotations"]["org.opencontainers.image.ref.name"] = "other".into();
    let mut chart = entries[0].clone();
    chart["mediaType"] = "application/vnd.example.chart".into();
    chart["annotations"]["org.opencontainers.image.ref.name"] = "chart".into();
    entries.extend([other, chart, json!({ "digest": 7 })]);
    publisher.write_index(&index);
    for rest in ["", ":one"] {
        run(&mut publisher.build(&publisher.url(rest)));
    }
    let said = refused(&mut publisher.build(&publisher.url(":other")), 2);
    assert!(said.contains(":other cannot be read") && said.contains("sha512:"), "{said}");
    let said = refused(&mut publisher.build(&publisher.url(":chart")), 2);
    assert!(said.contains("application/vnd.example.chart"), "{said}");
    // The layout is checked as far as it can be read.
    let checked = output(mosfs().arg("verify").arg(publisher.url("")));
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && said.contains("not checked: the entry `other`"), "{said}");
}

#[test]
fn a_system_is_built_for_another_machine() {
    let publisher = Publisher::new();
    let mut index = publisher.index();
    let mut inner = index["manifests"][0].clone();
    inner.as_object_mut().unwrap().remove("annotations");
    inner["platform"] = json!({ "architecture": "riscv64", "os": "linux" });
    let media_type = "application/vnd.oci.image.index.v1+json";
    let nested = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": [inner] });
    let mut entry = publisher.put(&serde_json::to_vec(&nested).unwrap());
    entry["mediaType"] = media_type.into();
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "multi" });
    index["manifests"].as_array_mut().unwrap().push(entry);
    publisher.write_index(&index);
    let said = refused(&mut publisher.build(&publisher.url(":multi")), 2);
    assert!(said.contains("linux/riscv64") && said.contains("--platform OS/ARCH"), "{said}");
    let built = output(publisher.build(&publisher.url(":multi")).args(["--platform", "linux/riscv64"]));
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
    assert!(said.contains("the system is built for linux/riscv64"), "{said}");
    let said = refused(publisher.build(&publisher.url(":multi")).args(["--platform", "riscv64"]), 2);
    assert!(said.contains("expected OS/ARCH"), "{said}");
}

#[test]
fn archives_are_refused_with_the_command_that_unpacks_them() {
    let publisher = Publisher::new();
    let archive = publisher.dir.path().join("archive.tar");
    let mut from = std::ffi::OsString::from("oci-archive:");
    from.push(&archive);
    let skopeo = ["--insecure-policy", "copy", "-q"];
    run(command("skopeo").args(skopeo).arg(publisher.url(":one")).arg(&from));
    let path = archive.display();
    for (url, words) in [
        (format!("oci-archive:{path}"), "skopeo copy".to_string()),
        (format!("docker-archive:{path}"), "skopeo copy".to_string()),
        (format!("oci:{path}"), format!("skopeo copy oci-archive:{path} oci:DIR:NAME")),
    ] {
        let said = refused(&mut publisher.build(&url), 2);
        assert!(said.contains(&words), "{url}: {said}");
    }
    let said = refused(mosfs().arg("mount").arg(&from).arg(publisher.dir.path()), 2);
    assert!(said.contains(&format!("`skopeo copy oci-archive:{path} oci:DIR:NAME`")), "{said}");
}

/// A squashfs image of three files whose tables are not compressed, so that they can be changed.
fn plain_squashfs(dir: &Path, options: &[&str]) -> Vec<u8> {
    let (tree, to) = (dir.join("tree"), dir.join("image.squashfs"));
    let (_, _) = (fs::remove_dir_all(&tree), fs::remove_file(&to));
    fs::create_dir_all(&tree).unwrap();
    for name in ["aa-first", "mm-middle", "zz-last"] {
        fs::write(tree.join(name), name.to_uppercase()).unwrap();
    }
    let plain = ["-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet"];
    run(command("mksquashfs").arg(&tree).arg(&to).args(options).args(plain));
    fs::read(to).unwrap()
}

#[test]
fn an_image_that_cannot_be_read_or_mounted_is_not_built() {
    let publisher = Publisher::new();
    let squashfs = |bytes: &[u8]| {
        let mut layer = publisher.put(bytes);
        layer["mediaType"] = "application/vnd.stacker.image.layer.squashfs".into();
        layer
    };
    let good = plain_squashfs(publisher.dir.path(), &[]);
    publisher.name_image("good", &[squashfs(&good)]);
    run(&mut publisher.build(&publisher.url(":good")));

    // A folder out of order: unsquashfs calls the like corrupt.
    let mut unsorted = good.clone();
    let at = unsorted.windows(8).position(|bytes| bytes == b"aa-first").unwrap();
    unsorted[at..at + 2].copy_from_slice(b"zz");
    let bad = squashfs(&unsorted);
    publisher.name_image("unsorted", &[squashfs(&good), bad.clone()]);
    let said = refused(&mut publisher.build(&publisher.url(":unsorted")), 2);
    let digest = bad["digest"].as_str().unwrap();
    for words in ["layer 2 of 2", digest, "layer.squashfs", "`/`", "target `hostfs`"] {
        assert!(said.contains(words), "{words}: {said}");
    }

    // The kernel has no decoder for this one.
    let lzma = plain_squashfs(publisher.dir.path(), &["-comp", "lzma"]);
    publisher.name_image("lzma", &[squashfs(&lzma)]);
    let said = refused(&mut publisher.build(&publisher.url(":lzma")), 2);
    assert!(said.contains("lzma"), "{said}");

    publisher.name_image("empty", &[]);
    let said = refused(&mut publisher.build(&publisher.url(":empty")), 2);
    assert!(said.contains("has no layers"), "{said}");

    let many: Vec<Value> = (0..500)
        .map(|number| {
            let mut layer = publisher.put(format!("{number}").as_bytes());
            layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
            layer
        })
        .collect();
    publisher.name_image("many", &many);
    let said = refused(&mut publisher.build(&publisher.url(":many")), 2);
    assert!(said.contains("500 different layers, more than the 499"), "{said}");
}

#[test]
fn a_layer_that_is_there_twice_is_mounted_once() {
    let publisher = Publisher::new();
    let repeated = || layer().dir("./").file("a", "of the repeated").dir("d").file("d/x", "x");
    let between = layer().dir("./").file("a", "of the middle").file("d/y", "y").file("b", "b");
    let layers = vec![repeated(), layer().file("d/.wh.x", ""), between, repeated()];
    image(&publisher.layout, "twice", layers);
    run(&mut publisher.build(&publisher.url(":twice")));
    let store = publisher.store();
    let at = publisher.dir.path().join("mnt");
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &at);
    let tree = scan(mounted.dir());
    let names: Vec<_> = tree.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(names, ["", "a", "b", "d", "d/x", "d/y"]);
    assert_eq!(fs::read_to_string(at.join("a")).unwrap(), "of the repeated");
    let record = mosfs::internals::mount::mounts()
        .unwrap()
        .into_iter()
        .find(|one| one.target == at.canonicalize().unwrap());
    assert_eq!(record.unwrap().layers.len(), 3);
    mounted.unmount();
}

#[test]
fn a_wrong_media_type_is_named_with_what_the_blob_is() {
    let publisher = Publisher::new();
    let tar = tempfile::NamedTempFile::new().unwrap();
    run(command("tar").args(["-cf"]).arg(tar.path()).arg("-C").arg(publisher.layout.join("blobs")).arg("."));
    let tar = fs::read(tar.path()).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for (media, blob, words) in [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &zstd,
            "the content is zstd, its media type says gzip",
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            &tar,
            "the content is an uncompressed tar, its media type says zstd",
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar",
            &zstd,
            "the content is zstd, its media type says an uncompressed tar",
        ),
    ] {
        let mut layer = publisher.put(blob);
        layer["mediaType"] = media.into();
        publisher.name_image("wrong", &[layer]);
        let mut index = publisher.index();
        let said = refused(&mut publisher.build(&publisher.url(":wrong")), 2);
        assert!(said.contains(words) && said.contains(media) && said.contains("layer 1 of 1"), "{said}");
        index["manifests"].as_array_mut().unwrap().pop();
        publisher.write_index(&index);
    }
}
