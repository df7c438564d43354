//! Signing a system again: what a publisher does when a key, a certificate or a CA is replaced.

use std::fs;
use std::path::Path;

use mosfs::internals::digest::Digest;
use mosfs::internals::floor;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::manifest::SystemManifest;
use mosfs::internals::store::{Store, version_name};
use mosfs::internals::transport::Transport;
use mosfs::internals::trust::p256::P256PrivateKey;
use mosfs::internals::trust::{
    CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, Signed, SigningKey,
};

use crate::publish::Publisher;

/// The artifact of a published version.
pub fn artifact(store: &Store, version: u64) -> Descriptor {
    store.resolve(&version_name(version)).expect("a published version")
}

/// The system manifest of a published version.
pub fn manifest(store: &Store, version: u64) -> SystemManifest {
    let layers = (store.transport() as &dyn Transport).manifest(&artifact(store, version)).unwrap().layers;
    SystemManifest::parse(&store.get(&layers[0].digest, 4 << 20).unwrap()).unwrap()
}

/// Takes away what was said about a version, all of it or of one type.
pub fn forget(publisher: &Publisher, version: u64, kinds: &[&str]) {
    let store = publisher.store();
    let about = artifact(&store, version).digest;
    let mut gone: Vec<Digest> = Vec::new();
    for kind in kinds {
        gone.extend(store.referrers(&about, Some(kind)).unwrap().iter().map(|one| one.digest));
    }
    store.writer().unwrap().replace_entries(&gone, &[], &[]).unwrap();
}

/// Puts a document of this type beside a version.
pub fn add(publisher: &Publisher, version: u64, kind: &str, content: &[u8]) {
    let store = publisher.store();
    let writer = store.writer().unwrap();
    let entry = writer.put_artifact(kind, content, Some(&artifact(&store, version))).unwrap();
    writer.set_entries(&[(None, &entry)]).unwrap();
}

/// Signs a published version again with this key and certificate, in place of the signature that it has.
pub fn sign_again(publisher: &Publisher, version: u64, key: &Path, certificate: &Path) {
    let key = SigningKey::load(key).expect("the signer's key");
    let certificate = fs::read(certificate).expect("the certificate");
    let manifest = manifest(&publisher.store(), version);
    let signed = Signed::create(&manifest, &key, &certificate, Dates::check_now()).expect("signing");
    forget(publisher, version, &[SIGNATURE_TYPE, CERTIFICATE_TYPE]);
    add(publisher, version, SIGNATURE_TYPE, &signed.signature);
    add(publisher, version, CERTIFICATE_TYPE, &signed.certificate);
}

/// Adds a floor signature by another floor key.
pub fn sign_floor(publisher: &Publisher, version: u64, key: &Path) {
    let key = P256PrivateKey::read(key).expect("the floor key");
    let product = manifest(&publisher.store(), version).product;
    let signature = floor::sign_version(&key, &product, version).expect("signing");
    add(publisher, version, FLOOR_SIGNATURE_TYPE, &signature);
}
