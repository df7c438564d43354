//! `mosfs build`: from an import manifest to a signed system, by the command, as a publisher runs it.

#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use mosfs::internals::image::oci::{OciImage, Platform, ROOT_HASH, SQUASHFS_ZSTD};
use mosfs::internals::store::Store;
use mosfs::internals::transport::Transport;
use tarball::Tarball;
use tempfile::TempDir;
use tools::{assert_same_tree, need_root, run, run_any, sh, snapshot};

const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";

fn mosfs(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
    command.current_dir(dir).env_remove("MOSFS_FAILPOINT");
    command
}

/// A folder with keys and a manifest of one target, whose image is a small tar layer of umoci.
struct Publisher(TempDir);

impl Publisher {
    fn new() -> Self {
        let this = Self(TempDir::new().unwrap());
        run(mosfs(this.dir()).args(["keys", "generate", "keys", "--product", PRODUCT]));
        let mut tar = Tarball::default();
        tar.dir("etc")
            .file("etc/hostname", b"mosfs\n")
            .file("data", &b"some text, again and again. ".repeat(20_000));
        fs::write(this.dir().join("layer.tar"), tar.end()).unwrap();
        sh(
            this.dir(),
            "umoci init --layout images; umoci new --image images:v1; umoci raw add-layer --image images:v1 layer.tar",
        );
        this.import(200, "oci:images:v1", "");
        this
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    /// Writes the import manifest; `more` is indented into the target.
    fn import(&self, version: u64, url: &str, more: &str) {
        let text = format!(
            "version: {version}\nproduct: {PRODUCT}\ntargets:\n  hostfs:\n    url: \"{url}\"\n    version: 0.0.1\n    \
             service_type: hostfs\n    network: {{type: host}}\n{more}"
        );
        fs::write(self.dir().join("import.yaml"), text).unwrap();
    }

    fn command(&self, store: &str, more: &[&str]) -> Command {
        let mut command = mosfs(self.dir());
        command.args([
            "build",
            "import.yaml",
            "--store",
            store,
            "--key",
            "keys/signer.key",
            "--cert",
            "keys/signer.pem",
        ]);
        command.args(["--level", "3"]).args(more);
        command
    }

    /// Builds, and gives the digest.
    fn build(&self, store: &str, more: &[&str]) -> String {
        run(&mut self.command(store, more)).trim().to_string()
    }

    fn refused(&self, store: &str, more: &[&str], code: i32) -> String {
        let output = run_any(&mut self.command(store, more));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        text
    }

    fn store(&self, name: &str) -> Store {
        Store::open(&self.dir().join(name)).unwrap()
    }

    fn verify(&self, store: &str) -> Output {
        run_any(mosfs(self.dir()).arg("verify").arg(format!("oci:{store}")))
    }

    fn image(&self, store: &str) -> OciImage {
        let store = self.store(store);
        let names = store.names().unwrap();
        let (_, found) =
            names.iter().find(|(name, _)| name.starts_with("mos/images/hostfs:sha256/")).unwrap();
        store.image(&found.digest).unwrap()
    }
}

#[test]
fn a_system_is_built_signed_and_named() {
    let publisher = Publisher::new();
    let digest = publisher.build("store", &["--floor-key", "keys/floor.key"]);
    let hex = digest.strip_prefix("sha256:").unwrap();
    let image = publisher.image("store");
    let listed = run(mosfs(publisher.dir()).args(["manifest", "show", "oci:store"]));
    assert_eq!(mosfs::internals::digest::Digest::of(listed.as_bytes()).to_string(), digest);
    assert_eq!(
        listed,
        format!(
            r#"{{"mediatype":"application/vnd.mos.system.manifest.v1","product":"{PRODUCT}","targets":{{"hostfs":{{"digest":"{}","network":{{"type":"host"}},"service_type":"hostfs","size":{},"version":"0.0.1"}}}},"version":200}}"#,
            image.digest, image.size
        )
    );
    let names = run(Command::new("umoci").args(["ls", "--layout", "store"]).current_dir(publisher.dir()));
    let mut names: Vec<_> = names.lines().map(str::to_string).collect();
    names.sort();
    let image_name = format!("mos/images/hostfs:sha256/{}", image.digest.hex());
    assert_eq!(
        names,
        [image_name.clone(), "mos/system/system:200".into(), format!("mos/system/system:sha256/{hex}")]
    );
    run(Command::new("skopeo")
        .args(["inspect", &format!("oci:store:{image_name}")])
        .current_dir(publisher.dir()));

    // The artifacts are what openssl says they are.
    let store = publisher.store("store");
    let artifact = store.resolve("mos/system/system:200").unwrap();
    let content = |kind: &str| -> Vec<u8> {
        let found = store.referrers(&artifact.digest, Some(kind)).unwrap();
        assert_eq!(found.len(), 1, "{kind}");
        let layout: &dyn Transport = store.transport();
        let manifest = layout.manifest(&found[0]).unwrap();
        assert_eq!(manifest.layers.len(), 1);
        layout.fetch(&manifest.layers[0], 1 << 20).unwrap()
    };
    fs::write(publisher.dir().join("manifest"), &listed).unwrap();
    fs::write(publisher.dir().join("sig"), content("application/vnd.mos.system.signature.v1")).unwrap();
    fs::write(publisher.dir().join("cert"), content("application/vnd.mos.system.certificate.v1")).unwrap();
    assert_eq!(content("application/vnd.mos.system.floor-signature.v1").len(), 64);
    sh(
        publisher.dir(),
        "openssl x509 -in cert -noout -pubkey > pub; openssl dgst -sha256 -verify pub -signature sig manifest",
    );
    let verified =
        ["manifest", "verify", "manifest", "--sig", "sig", "--cert", "cert", "--ca", "keys/ca.pem"];
    run(mosfs(publisher.dir()).args(verified));
    assert!(publisher.verify("store").status.success());
}

#[test]
fn two_builds_of_the_same_input_give_the_same_digest() {
    let publisher = Publisher::new();
    let first = publisher.build("first", &["--jobs", "1"]);
    assert_eq!(first, publisher.build("second", &["--jobs", "8"]));
    // Another day, another time zone, another user's words, and files that were touched.
    sh(publisher.dir(), "find images -exec touch -d '2001-01-01' {} +");
    let mut other = publisher.command("third", &[]);
    other.envs([
        ("SOURCE_DATE_EPOCH", "12345"),
        ("TZ", "Asia/Tokyo"),
        ("LC_ALL", "C"),
        ("HOME", "/nonexistent"),
    ]);
    assert_eq!(first, run(&mut other).trim());
    let blobs = |store: &str| -> Vec<_> {
        let image = publisher.image(store);
        image
            .layers
            .iter()
            .map(|layer| fs::read(publisher.store(store).blob_path(&layer.digest)).unwrap())
            .collect()
    };
    assert_eq!(blobs("first"), blobs("second"));
    // Again into the same store: nothing new is named, and the signatures do not pile up.
    assert_eq!(first, publisher.build("first", &[]));
    let store = publisher.store("first");
    assert_eq!(store.names().unwrap().len(), 3);
    let artifact = store.resolve("mos/system/system:200").unwrap();
    assert_eq!(store.referrers(&artifact.digest, None).unwrap().len(), 2);
}

#[test]
fn a_version_stands_for_one_system() {
    let publisher = Publisher::new();
    let first = publisher.build("store", &[]);
    sh(publisher.dir(), "sed -i 's/0.0.1/0.0.2/' import.yaml");
    let text = publisher.refused("store", &[], 2);
    assert!(text.contains("version 200 is another system"), "{text}");
    let shown = run(mosfs(publisher.dir()).args(["manifest", "show", "oci:store"]));
    assert_eq!(mosfs::internals::digest::Digest::of(shown.as_bytes()).to_string(), first);
    publisher.import(201, "oci:images:v1", "");
    assert_ne!(first, publisher.build("store", &[]));
    assert!(run(mosfs(publisher.dir()).args(["manifest", "show", "oci:store"])).contains("\"version\":201"));
    assert!(
        run(mosfs(publisher.dir()).args(["manifest", "show", "oci:store:200"])).contains("\"version\":200")
    );
}

#[test]
fn what_cannot_be_built_is_refused_before_anything_is_stored() {
    let publisher = Publisher::new();
    let blobs = || fs::read_dir(publisher.dir().join("store/blobs/sha256")).unwrap().count();
    let refused = |more: &[&str], code, words: &str| {
        let text = publisher.refused("store", more, code);
        assert!(text.contains(words), "{words}: {text}");
        assert_eq!(blobs(), 0, "{words}");
    };
    publisher.import(200, "oci:images:v9", "");
    refused(&[], 2, "no image named `v9`; it has `v1`");
    publisher.import(200, "oci:nowhere:v1", "");
    refused(&[], 2, "there is no such folder");
    // Nothing listens at port 1.
    publisher.import(200, "docker://127.0.0.1:1/x:1", "");
    refused(&["--net-timeout", "1"], 1, "127.0.0.1:1");
    let wrong = format!("    digest: sha256:{}\n", "0".repeat(64));
    publisher.import(200, "oci:images:v1", &wrong);
    refused(&[], 3, "digest");
    publisher.import(200, "oci:images:v1", "    size: 1\n");
    refused(&[], 3, "size");
    publisher.import(200, "oci:images:v1", "");
    // Key and certificate: not a pair, of another product, out of date.
    run(mosfs(publisher.dir()).args(["keys", "generate", "others", "--product", PRODUCT]));
    refused(&["--key", "others/signer.key"], 2, "");
}

#[test]
fn the_key_the_certificate_and_the_product_must_fit() {
    let publisher = Publisher::new();
    let other = "11111111-2222-4333-8444-555555555555";
    run(mosfs(publisher.dir()).args(["keys", "generate", "other-key", "--product", PRODUCT]));
    run(mosfs(publisher.dir()).args(["keys", "generate", "other-product", "--product", other]));
    let build = |key: &str, cert: &str| {
        let mut command = mosfs(publisher.dir());
        run_any(command.args(["build", "import.yaml", "--store", "store", "--key", key, "--cert", cert]))
    };
    let output = build("other-key/signer.key", "keys/signer.pem");
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let output = build("other-product/signer.key", "other-product/signer.pem");
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A build in two halves: what is to be signed goes to openssl, which stands for the token or the other machine.
#[test]
fn keys_elsewhere_sign_what_the_first_half_wrote() {
    let publisher = Publisher::new();
    let dir = publisher.dir();
    let build = |more: &[&str]| {
        let mut command = mosfs(dir);
        command.args(["build", "--level", "3"]).args(more);
        run_any(&mut command)
    };
    let ok = |more: &[&str]| {
        let output = build(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let refused = |more: &[&str], code: i32, word: &str| {
        let output = build(more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{more:?}: {said}");
        assert!(said.contains(word), "{more:?}: {said}");
    };
    let whole = ok(&[
        "import.yaml",
        "--store",
        "whole",
        "--key",
        "keys/signer.key",
        "--cert",
        "keys/signer.pem",
        "--floor-key",
        "keys/floor.key",
    ]);
    let first = ok(&[
        "import.yaml",
        "--store",
        "s",
        "--cert",
        "keys/signer.pem",
        "--to-sign",
        "m.json",
        "--floor-to-sign",
        "m.floor",
        "--floor-pub",
        "keys/floor.pub",
    ]);
    assert_eq!(first, whole, "the same digest, whoever signs it");
    let names = |store: &str| {
        let names = Store::open(&dir.join(store)).unwrap().names().unwrap();
        names.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert!(names("s").iter().all(|name| name.starts_with("mos/images/")), "{:?}", names("s"));
    run(mosfs(dir).args(["gc", "--store", "s"]));
    sh(dir, "openssl dgst -sha256 -sign keys/signer.key -out m.sig m.json");
    sh(dir, "openssl dgst -sha256 -sign keys/floor.key -out floor.der m.floor");
    let second = |file: &str, store: &str, more: &[&str]| {
        let words = [file, "--store", store, "--signature", "m.sig", "--cert", "keys/signer.pem"];
        ok(&[&words, more].concat())
    };
    // From what the first half wrote, and from the import manifest; the floor signature in DER and raw.
    let floor_pub = ["--floor-pub", "keys/floor.pub"];
    let floor = [&["--floor-signature", "floor.der"], &floor_pub[..]].concat();
    assert_eq!(second("m.json", "s", &floor), whole);
    assert_eq!(names("s"), names("whole"));
    run(mosfs(dir).args(["verify", "oci:s"]));
    let raw = [
        "floor",
        "sign",
        "--version",
        "200",
        "--key",
        "keys/floor.key",
        "--product",
        PRODUCT,
        "-o",
        "floor.raw",
    ];
    run(mosfs(dir).args(raw));
    assert_eq!(second("import.yaml", "other", &["--floor-signature", "floor.raw"]), whole);
    // A device takes both, with a floor.
    for store in ["s", "other"] {
        let folders = ["--system", &format!("{store}.system"), "--config", &format!("{store}.config")]
            .map(String::from);
        let source = format!("oci:{store}");
        let install = ["install", &source, "--ca", "keys/ca.pem", "--product", PRODUCT, "--floor", "file"];
        fs::create_dir(dir.join(format!("{store}.config"))).unwrap();
        fs::copy(dir.join("keys/floor.pub"), dir.join(format!("{store}.config/floor.pub"))).unwrap();
        run(mosfs(dir).args(install).args(&folders));
        run(mosfs(dir).args(["commit", "--floor", "file"]).args(&folders));
    }

    // What no device would take is refused, and nothing gets a name.
    sh(dir, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out stranger.key");
    sh(dir, "openssl dgst -sha256 -sign stranger.key -out stranger.sig m.json; head -c 20 m.sig > cut.sig");
    sh(
        dir,
        "openssl dgst -sha256 -sign stranger.key -out stranger.floor m.floor; cat keys/signer.* > both.pem",
    );
    ok(&["import.yaml", "--store", "fresh", "--to-sign", "m2.json"]);
    let half = |sig: &str, cert: &str, more: &[&str]| {
        let words = ["m.json", "--store", "fresh", "--signature", sig, "--cert", cert];
        [&words, more].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let refused_half = |words: Vec<String>, code: i32, word: &str| {
        refused(&words.iter().map(String::as_str).collect::<Vec<_>>(), code, word);
    };
    refused_half(half("stranger.sig", "keys/signer.pem", &[]), 3, "the signature does not match");
    refused_half(half("cut.sig", "keys/signer.pem", &[]), 3, "the signature is cut short");
    refused_half(half("m.sig", "both.pem", &[]), 2, "holds a private key");
    refused_half(half("m.sig", "keys/ca.pem", &[]), 2, "is not for signing");
    let stranger = [&["--floor-signature", "stranger.floor"], &floor_pub[..]].concat();
    refused_half(
        half("m.sig", "keys/signer.pem", &stranger),
        3,
        "stranger.floor: the floor signature is not",
    );
    refused_half(
        half("m.sig", "keys/signer.pem", &["--floor-signature", "m.json"]),
        3,
        "m.json: the floor signature",
    );
    assert!(names("fresh").iter().all(|name| name.starts_with("mos/images/")), "{:?}", names("fresh"));
    // The second half of a store that has not seen the first.
    run(mosfs(dir).args(["build", "import.yaml", "--store", "empty", "--to-sign", "m3.json"]));
    sh(dir, "rm -r empty/blobs/sha256/*");
    refused(
        &["m.json", "--store", "empty", "--signature", "m.sig", "--cert", "keys/signer.pem"],
        2,
        "is not in the store",
    );
    // Usage: one way to sign, and no more.
    refused(&["import.yaml", "--store", "s", "--cert", "keys/signer.pem"], 2, "--to-sign");
    refused(
        &["import.yaml", "--store", "s", "--key", "keys/signer.key", "--to-sign", "x"],
        2,
        "cannot be used with",
    );
    let token = ["import.yaml", "--store", "s", "--key", "pkcs11:token=x", "--cert", "keys/signer.pem"];
    refused(&token, 2, "keys in a token are not used directly; `--to-sign`");
}

#[test]
fn a_damaged_blob_is_named() {
    let publisher = Publisher::new();
    let layer = sh(publisher.dir(), "ls -S images/blobs/sha256 | head -1");
    let path = publisher.dir().join("images/blobs/sha256").join(layer.trim());
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let text = publisher.refused("store", &[], 3);
    assert!(text.contains(layer.trim()) && text.contains("target `hostfs`"), "{text}");
    assert!(publisher.verify("store").status.success());
}

/// Rule (docs/design.md, crash): "a crash at any point leaves a store that `mosfs verify` accepts,
/// plus temporary files that `mosfs gc` removes".
#[test]
fn a_kill_at_any_commit_point_leaves_a_store_that_verifies() {
    let publisher = Publisher::new();
    let expected = publisher.build("whole", &[]);
    let count = fs::read_dir(publisher.dir().join("whole/blobs/sha256")).unwrap().count();
    let points = [
        "store.blob.written",
        "store.blob.synced",
        "store.blob.renamed",
        "store.blob.renamed:3",
        "store.index.written",
        "store.index.written:3",
        "store.index.renamed",
        "store.index.renamed:2",
        "store.index.renamed:3",
        "build.layer.stored",
        "build.image.stored",
        "build.system.signed",
        "build.system.named",
    ];
    for (number, point) in points.into_iter().enumerate() {
        let store = format!("store-{number}");
        let output = run_any(publisher.command(&store, &[]).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point} was not reached");
        if publisher.dir().join(&store).join("oci-layout").exists() {
            let output = publisher.verify(&store);
            assert!(output.status.success(), "{point}: {}", String::from_utf8_lossy(&output.stdout));
        }
        // The next run finishes, and what is left over goes.
        assert_eq!(publisher.build(&store, &[]), expected, "{point}");
        run(mosfs(publisher.dir()).args(["gc", "--store", &store]));
        assert!(publisher.verify(&store).status.success(), "{point}");
        assert_eq!(
            fs::read_dir(publisher.dir().join(&store).join("blobs/sha256")).unwrap().count(),
            count,
            "{point}"
        );
        assert_eq!(
            fs::read_dir(publisher.dir().join(&store).join(".mosfs/tmp")).unwrap().count(),
            0,
            "{point}"
        );
    }
    // Killed while it collects.
    for point in ["store.gc.names", "store.gc.blob"] {
        let store = publisher.dir().join("whole");
        let writer = Store::open(&store).unwrap();
        writer.writer().unwrap().put_bytes("x", point.as_bytes()).unwrap();
        let output =
            run_any(mosfs(publisher.dir()).args(["gc", "--store", "whole"]).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point} was not reached");
        assert!(publisher.verify("whole").status.success(), "{point}");
        run(mosfs(publisher.dir()).args(["gc", "--store", "whole"]));
        assert_eq!(fs::read_dir(store.join("blobs/sha256")).unwrap().count(), count, "{point}");
    }
}

#[test]
fn builds_and_collections_at_the_same_time_do_not_hurt() {
    let publisher = Publisher::new();
    let expected = publisher.build("alone", &[]);
    let mut children: Vec<_> = (0..3)
        .map(|_| publisher.command("store", &[]).stdout(std::process::Stdio::piped()).spawn().unwrap())
        .collect();
    // Collections come in between; busy is a fine answer (1), and so is a store that is not there yet (2).
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        let output = run_any(mosfs(publisher.dir()).args(["gc", "--store", "store"]));
        assert!(matches!(output.status.code(), Some(0..=2)), "{}", String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_millis(5));
    }
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
    }
    assert!(publisher.verify("store").status.success());
}

/// Squashfs layers: with a tree they stay as they are; without one they get one; half of it is refused.
#[test]
fn images_of_file_systems() {
    let publisher = Publisher::new();
    let dir = publisher.dir();
    publisher.build("first", &[]);
    let converted = publisher.image("first");
    let name = format!("mos/images/hostfs:sha256/{}", converted.digest.hex());

    // What was converted once is untouched from then on: same manifest, same layer.
    publisher.import(201, &format!("oci:first:{name}"), "");
    publisher.build("second", &[]);
    assert_eq!(publisher.image("second").digest, converted.digest);
    let json = run(publisher.command("second", &[]).arg("--json"));
    assert!(json.replace(' ', "").contains("\"untouched\":true"), "{json}");

    // The same image without its tree: it gets one, and it is the same tree.
    let source = Store::open(&dir.join("first")).unwrap();
    let layer = &converted.layers[0];
    assert_eq!(layer.media_type(), SQUASHFS_ZSTD);
    let whole = fs::read(source.blob_path(&layer.digest)).unwrap();
    let used = u64::from_le_bytes(whole[40..48].try_into().unwrap());
    let put = |name: &str, bytes: &[u8], annotation: Option<&str>| {
        let writer = source.writer().unwrap();
        let mut layer = writer.put_bytes(SQUASHFS_ZSTD, bytes).unwrap();
        if let Some(hash) = annotation {
            layer.annotations.insert(ROOT_HASH.into(), hash.into());
        }
        let mut manifest = converted.manifest.clone();
        let mut config: serde_json::Value =
            serde_json::from_slice(&source.get(&manifest.config.digest, 1 << 20).unwrap()).unwrap();
        config["rootfs"]["diff_ids"][0] = layer.digest.to_string().into();
        manifest.config =
            writer.put_bytes(&manifest.config.media_type, config.to_string().as_bytes()).unwrap();
        manifest.layers = vec![layer];
        let manifest =
            writer.put_bytes(mosfs::internals::image::oci::MANIFEST, &manifest.to_bytes()).unwrap();
        writer.set_name(name, &manifest).unwrap();
    };
    put("bare", &whole[..used as usize], None);
    publisher.import(202, "oci:first:bare", "");
    publisher.build("third", &[]);
    assert_eq!(publisher.image("third").layers, converted.layers);

    // Rule (docs/design.md, both or neither).
    let hash = layer.trust.root_hash().unwrap().hex();
    put("no-hash", &whole, None);
    put("no-tree", &whole[..used as usize], Some(&hash));
    put("other-hash", &whole, Some(&"0".repeat(64)));
    let mut damaged = whole.clone();
    damaged[5000] ^= 1;
    put("damaged", &damaged, Some(&hash));
    // Rule (docs/design.md, verity location): the file ends with the tree, since no hash covers what lies behind it.
    let longer = [&whole[..], b"extra"].concat();
    put("longer", &longer, Some(&hash));
    put("longer-no-hash", &longer, None);
    let length = format!(
        "the image file has {} bytes, expected {} (data, verity superblock and tree)",
        longer.len(),
        whole.len()
    );
    for (version, name, words) in [
        (203, "no-hash", "it has a verity tree but no root hash"),
        (204, "no-tree", "(data, verity superblock and tree)"),
        (205, "other-hash", "expected sha256:0000"),
        (206, "damaged", "verity superblock: padding"),
        (207, "longer", &length),
        (208, "longer-no-hash", &length),
    ] {
        publisher.import(version, &format!("oci:first:{name}"), "");
        let text = publisher.refused("fourth", &[], 3);
        assert!(text.contains("target `hostfs`") && text.contains(words), "{name}: {text}");
        // What is refused here is not verified there either, and is not mounted.
        let source = format!("oci:{}:{name}", dir.join("first").display());
        let verify = mosfs(dir).args(["verify", &source]).output().unwrap();
        let said = String::from_utf8_lossy(&verify.stdout).into_owned();
        assert_eq!(verify.status.code(), Some(3), "{name}: {said}");
        assert!(said.contains(words), "{name}: {said}");
    }
}

/// The layers of an image, mounted by the kernel: squashfs through loop devices, below overlayfs.
struct Stack(Vec<PathBuf>);

impl Stack {
    fn new(store: &Store, image: &OciImage, base: &Path) -> (Self, PathBuf) {
        need_root();
        let mut mounted = Vec::new();
        for (number, layer) in image.layers.iter().enumerate() {
            let at = base.join(format!("layer-{number}"));
            fs::create_dir_all(&at).unwrap();
            let blob = store.blob_path(&layer.digest);
            run(Command::new("mount").args(["-t", "squashfs", "-o", "loop,ro"]).arg(blob).arg(&at));
            mounted.push(at);
        }
        let lower: Vec<_> = mounted.iter().rev().map(|path| path.display().to_string()).collect();
        let merged = base.join("merged");
        fs::create_dir_all(&merged).unwrap();
        let options = format!("lowerdir={}", lower.join(":"));
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&merged));
        mounted.push(merged.clone());
        (Self(mounted), merged)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = Command::new("umount").arg(path).status();
        }
    }
}

/// Three layers with deletes, folders made again, hard links, devices and attributes, and a fourth
/// whose tar has no entries for the folders that its file is in: what overlayfs shows of the
/// converted layers is what `umoci unpack` gives.
#[test]
fn an_image_of_several_layers_is_what_umoci_unpacks() {
    need_root();
    let publisher = Publisher::new();
    let dir = publisher.dir();
    sh(
        dir,
        r#"
        umoci new --image images:full
        umoci unpack --image images:full bundle; cd bundle/rootfs
        mkdir -p etc opt/app/sub usr/lib gone again; echo one > etc/a; echo two > etc/b; ln etc/a etc/a-link
        echo old > opt/app/old; echo sub > opt/app/sub/file; chmod 2770 usr/lib; chown 7:8 usr usr/lib
        setfattr -n user.kept -v yes usr/lib; echo lib > usr/lib/one; echo x > gone/x; echo x > again/x
        mknod null c 1 3; mkfifo pipe; ln -s etc/a soft; truncate -s 3M sparse; echo becomes > file-dir; mkdir dir-file; touch dir-file/x
        printf bytes > "$(printf 'bad\377name')"; touch -d @1000000000 usr/lib
        cd ../..; umoci repack --refresh-bundle --image images:full bundle
        cd bundle/rootfs
        rm -r gone etc/b opt/app again; mkdir again opt/app; echo new > again/y; echo new > opt/app/new
        rm file-dir; mkdir file-dir; echo in > file-dir/in; rm -r dir-file; echo file > dir-file; ln opt/app/new opt/new-link
        cd ../..; umoci repack --refresh-bundle --image images:full bundle
        cd bundle/rootfs
        mkdir gone; echo back > gone/z; rm -r again; chmod 700 etc; rm file-dir/in; chown 9:9 null
        cd ../..; umoci repack --refresh-bundle --image images:full bundle
        "#,
    );
    // Like tools that insert one file: the folders have no entries, and keep what they are below.
    let mut tar = Tarball::default();
    tar.file("usr/lib/inserted", b"inserted");
    fs::write(dir.join("insert.tar"), tar.end()).unwrap();
    sh(dir, "umoci raw add-layer --image images:full insert.tar; umoci unpack --image images:full expected");
    publisher.import(300, "oci:images:full", "");
    publisher.build("store", &[]);
    let (store, image) = (publisher.store("store"), publisher.image("store"));
    assert_eq!(image.layers.len(), 4);
    let (stack, merged) = Stack::new(&store, &image, dir);
    let mut expected = snapshot(&dir.join("expected/rootfs"));
    let mut found = snapshot(&merged);
    // umoci gives the root folder of the last unpacking its own time.
    for tree in [&mut expected, &mut found] {
        tree.remove(Path::new(""));
    }
    assert_same_tree(&expected, &found);
    drop(stack);
    // The platform that umoci wrote is this machine's, so the image is found as any other.
    let layout: &dyn Transport = store.transport();
    layout.find_image(Some("mos/system/system:300"), &Platform::this_machine()).unwrap();
}

#[test]
fn progress_goes_to_a_file_descriptor() {
    let publisher = Publisher::new();
    let script = format!(
        "{} --progress-fd 3 build import.yaml --store store --key keys/signer.key --cert keys/signer.pem 3> progress 2> errors",
        env!("CARGO_BIN_EXE_mosfs")
    );
    sh(publisher.dir(), &script);
    assert_eq!(fs::read_to_string(publisher.dir().join("errors")).unwrap(), "", "stderr is no terminal");
    let text = fs::read_to_string(publisher.dir().join("progress")).unwrap();
    let events: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| events.iter().filter(|event| event["event"] == kind).count();
    assert!(events.iter().any(|event| event["step"] == "convert" && event["total_bytes"].is_u64()), "{text}");
    assert!(of("start") > 0 && of("start") == of("done"), "{text}");
}

#[test]
fn an_ipv6_address_that_no_device_would_use_is_an_error() {
    let publisher = Publisher::new();
    let file = publisher.dir().join("import.yaml");
    let text = fs::read_to_string(&file).unwrap();
    let target = "  six: {url: 'oci:layout:x', version: '1', service_type: container, \
                  network: {type: simple, ipv6: 'fd00::9/64'}}\n";
    fs::write(&file, format!("{text}{target}")).unwrap();
    let expected = "mosfs: import.yaml: target `six`: `ipv6` of network simple, which containers do not support yet\n\
                    hint: remove `ipv6` from the target, or use `network: {type: host}` to have the host's addresses\n";
    assert_eq!(publisher.refused("store", &[], 2), expected);
    assert!(!publisher.dir().join("store").exists(), "nothing is written");
}

#[test]
fn an_install_medium_without_a_file_to_write_it_to_is_an_error() {
    let publisher = Publisher::new();
    let file = publisher.dir().join("import.yaml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("image_type: iso\n{text}")).unwrap();
    let expected = "mosfs: import.yaml: image_type: `iso` requires an install medium, and there is no file to write it \
                    to\nhint: name the file with `--iso`, or remove `image_type` to build the system alone\n";
    assert_eq!(publisher.refused("store", &[], 2), expected);
    assert!(!publisher.dir().join("store").exists(), "nothing is written");
    // The file itself is valid: other commands take it.
    run(mosfs(publisher.dir()).args(["manifest", "check", "import.yaml"]));
}
