//! A publisher for tests: signed systems of small images, made through the library in milliseconds.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Seek};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use mosfs::internals::digest::Digest;
use mosfs::internals::floor;
use mosfs::internals::image::oci::{self, Descriptor, LayerDescriptor, Manifest, Trust};
use mosfs::internals::image::verity;
use mosfs::internals::manifest::import::ImportManifest;
use mosfs::internals::manifest::system::{SystemManifest, Target};
use mosfs::internals::progress::Progress;
use mosfs::internals::publish::keys::{self, Request};
use mosfs::internals::store::{Store, image_name, system_name, version_name};
use mosfs::internals::trust::keys::SigningKey;
use mosfs::internals::trust::p256::P256PrivateKey;
use mosfs::internals::trust::{CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, Signed};
use uuid::Uuid;

/// The product that the tests publish for.
pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";

/// Someone with keys and a store.
pub struct Publisher {
    dir: PathBuf,
    product: Uuid,
    /// By target: the fields of its import manifest besides the usual ones, and the configuration of its image.
    containers: Mutex<BTreeMap<String, (String, String)>>,
}

impl Publisher {
    /// A publisher with new keys in `dir/keys` and an empty store in `dir/store`.
    pub fn new(dir: &Path) -> Self {
        Self::of_product(dir, PRODUCT)
    }

    /// The same for another product.
    pub fn of_product(dir: &Path, product: &str) -> Self {
        let product = product.parse().expect("a UUID");
        let request = Request { product, name: "test".into(), rsa_signer: false };
        keys::generate(&dir.join("keys"), &request).expect("keys");
        Store::create(&dir.join("store")).expect("a store");
        Self { dir: dir.to_path_buf(), product, containers: Mutex::default() }
    }

    /// A publisher that was made in this folder before.
    pub fn again(dir: &Path) -> Self {
        let product = PRODUCT.parse().expect("a UUID");
        Self { dir: dir.to_path_buf(), product, containers: Mutex::default() }
    }

    /// From now on, target `name` has these fields in the import manifest (a flow mapping without its braces) in place
    /// of network host, and its image this `config`.
    pub fn container(&self, name: &str, fields: &str, config: &serde_json::Value) {
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": [] },
        });
        self.containers.lock().unwrap().insert(name.into(), (fields.into(), config.to_string()));
    }

    /// Where everything of this publisher is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of `mosfs keys generate`.
    pub fn key(&self, name: &str) -> PathBuf {
        self.dir.join("keys").join(name)
    }

    /// The store as a SOURCE.
    pub fn source(&self) -> String {
        format!("oci:{}", self.dir.join("store").display())
    }

    /// One version in the store as a SOURCE.
    pub fn source_of(&self, version: u64) -> String {
        format!("{}:{}", self.source(), version_name(version))
    }

    /// The store itself.
    pub fn store(&self) -> Store {
        Store::open(&self.dir.join("store")).expect("a store")
    }

    /// Publishes a version whose hostfs has one file, `content`; signed for the floor.
    pub fn publish(&self, version: u64, content: &str) -> Digest {
        self.publish_with(version, content, true)
    }

    /// The same, with or without a floor signature.
    pub fn publish_with(&self, version: u64, content: &str, for_floor: bool) -> Digest {
        let layer = self.layer(&self.store().writer().expect("a writer"), content);
        self.publish_layers(version, vec![layer], for_floor)
    }

    /// Puts a squashfs image into the store, with a verity tree.
    pub fn add_image(&self, image: &Path) -> Descriptor {
        seal(&self.store().writer().expect("a writer"), image)
    }

    /// Publishes a version whose hostfs has these layers, the bottom one first.
    pub fn publish_layers(&self, version: u64, layers: Vec<Descriptor>, for_floor: bool) -> Digest {
        self.publish_targets(version, &[("hostfs", "hostfs", layers)], for_floor)
    }

    /// Puts a sealed layer into the store as it is.
    pub fn add_sealed(&self, layer: &Path, media_type: &str, root_hash: Digest) -> Descriptor {
        let store = self.store();
        let writer = store.writer().expect("a writer");
        let bytes = fs::read(layer).expect("the layer");
        let digest = Digest::of(&bytes);
        let mut temp = writer.temp().expect("a file");
        io::Write::write_all(&mut temp.file, &bytes).expect("a copy");
        writer.commit(temp, &digest).expect("a blob");
        LayerDescriptor::new(media_type, digest, bytes.len() as u64, Trust::RootHash(root_hash))
            .to_descriptor()
    }

    /// Publishes a version of these targets: name, service type, and layers, the bottom one first.
    pub fn publish_targets(
        &self,
        version: u64,
        targets: &[(&str, &str, Vec<Descriptor>)],
        for_floor: bool,
    ) -> Digest {
        let store = self.store();
        let writer = store.writer().expect("a writer");
        let image = |name: &str, layers: &[Descriptor]| {
            // An image of its own for each version of a hostfs; others stay as long as their layers do.
            let containers = self.containers.lock().unwrap();
            let own = containers.get(name).map(|(_, config)| config.clone());
            let text = own.unwrap_or_else(|| config(if name == "hostfs" { version } else { 0 }));
            let config = writer.put_bytes(oci::CONFIG, text.as_bytes()).expect("put");
            let image = Manifest { layers: layers.to_vec(), ..image_manifest(config) }.to_bytes();
            writer.put_bytes(oci::MANIFEST, &image).expect("put")
        };
        let images: Vec<(&str, &str, Descriptor)> =
            targets.iter().map(|(name, service, layers)| (*name, *service, image(name, layers))).collect();
        let manifest = self.system(version, &images);
        let key = SigningKey::load(&self.key("signer.key")).expect("the signer's key");
        let certificate = fs::read(self.key("signer.pem")).expect("the certificate");
        let signed = Signed::create(&manifest, &key, &certificate, Dates::check_now()).expect("signing");
        let system = writer
            .put_artifact(mosfs::internals::manifest::SYSTEM_MEDIA_TYPE, &signed.manifest, None)
            .expect("put");
        let mut referrers = vec![
            writer.put_artifact(SIGNATURE_TYPE, &signed.signature, Some(&system)).expect("put"),
            writer.put_artifact(CERTIFICATE_TYPE, &signed.certificate, Some(&system)).expect("put"),
        ];
        if for_floor {
            let key = P256PrivateKey::read(&self.key("floor.key")).expect("the floor key");
            let signature = floor::sign_version(&key, &self.product, version).expect("signing");
            referrers
                .push(writer.put_artifact(FLOOR_SIGNATURE_TYPE, &signature, Some(&system)).expect("put"));
        }
        let digest = Digest::of(&signed.manifest);
        let (system_name, version_name) = (system_name(&digest), version_name(version));
        let names: Vec<String> =
            images.iter().map(|(name, _, image)| image_name(name, &image.digest)).collect();
        let mut entries: Vec<_> =
            names.iter().zip(&images).map(|(name, (.., image))| (Some(name.as_str()), image)).collect();
        entries.extend([(Some(system_name.as_str()), &system), (Some(version_name.as_str()), &system)]);
        entries.extend(referrers.iter().map(|one| (None, one)));
        writer.set_entries(&entries).expect("names");
        digest
    }

    fn system(&self, version: u64, images: &[(&str, &str, Descriptor)]) -> SystemManifest {
        let mut yaml = format!("version: {version}\nproduct: {}\ntargets:\n", self.product);
        for (name, service, _) in images {
            let containers = self.containers.lock().unwrap();
            let fields = containers.get(*name).map_or("network: {type: host}", |(fields, _)| fields);
            yaml += &format!(
                "  {name}: {{url: 'oci:/unused:x', version: 1.0.0, service_type: {service}, {fields}}}\n"
            );
        }
        let import =
            ImportManifest::parse(Path::new("import.yaml"), yaml.as_bytes()).expect("an import manifest");
        let targets = import
            .targets
            .iter()
            .map(|(name, target)| {
                let (.., image) = images.iter().find(|(one, ..)| *one == name.as_str()).expect("an image");
                let target = Target {
                    digest: image.digest,
                    size: image.size,
                    version: target.version.clone(),
                    service_type: target.service_type,
                    network: target.network.clone(),
                    nsgroup: target.nsgroup.clone(),
                    mounts: target.mounts.clone(),
                    workload: target.workload.clone(),
                };
                (name.clone(), target)
            })
            .collect();
        SystemManifest { version, product: self.product, targets }
    }

    /// Puts a layer into the store that has one file, `content`.
    pub fn add_layer(&self, content: &str) -> Descriptor {
        self.layer(&self.store().writer().expect("a writer"), content)
    }

    /// Puts a squashfs layer with a verity tree into the store. It has one file, `content`.
    pub fn layer(&self, writer: &mosfs::internals::store::Writer<'_>, content: &str) -> Descriptor {
        let work = tempfile::tempdir_in(&self.dir).expect("a folder");
        let (tree, image) = (work.path().join("tree"), work.path().join("image"));
        fs::create_dir(&tree).expect("a folder");
        fs::write(tree.join("content"), content).expect("a file");
        let made = Command::new("mksquashfs")
            .args([&tree, &image])
            .args(["-comp", "zstd", "-noappend", "-quiet", "-no-progress", "-all-root", "-processors", "1"])
            // The same content is the same layer.
            .args(["-mkfs-time", "0", "-all-time", "0"])
            .output()
            .unwrap_or_else(|error| {
                panic!("cannot run mksquashfs: {error}; install the Debian package `squashfs-tools`")
            });
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        seal(writer, &image)
    }
}

/// Puts a squashfs image into a store, with a verity tree.
fn seal(writer: &mosfs::internals::store::Writer<'_>, image: &Path) -> Descriptor {
    let mut temp = writer.temp().expect("a file");
    let mut made = fs::File::open(image).expect("the image");
    let mut head = [0; 96];
    io::Read::read_exact(&mut made, &mut head).expect("a superblock");
    // squashfs 4.0, superblock: bytes_used is the 64-bit word at 40.
    let bytes_used = u64::from_le_bytes(head[40..48].try_into().expect("8 bytes"));
    made.rewind().expect("rewind");
    io::copy(&mut made, &mut temp.file).expect("a copy");
    let sealed =
        verity::seal(&temp.file, bytes_used, NonZeroUsize::MIN, &Progress::silent()).expect("sealing");
    writer.commit(temp, &sealed.digest).expect("a blob");
    let trust = Trust::RootHash(sealed.root_hash);
    LayerDescriptor::new(oci::SQUASHFS_ZSTD, sealed.digest, sealed.size_bytes, trust).to_descriptor()
}

fn config(version: u64) -> String {
    format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"author":"{version}"}}"#
    )
}

/// An image manifest without layers.
fn image_manifest(config: Descriptor) -> Manifest {
    let text = serde_json::json!({
        "schemaVersion": 2, "mediaType": oci::MANIFEST, "config": config, "layers": [],
    });
    Manifest::parse(text.to_string().as_bytes()).expect("a manifest")
}
