//! How fast manifests are written, read and verified.
//!
//! `cargo bench --bench manifest`; quote ratios of one run, not figures of two machines.

use std::collections::BTreeMap;
use std::path::Path;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mosfs::internals::digest::Digest;
use mosfs::internals::manifest::{ImportManifest, Mount, Network, ServiceType, SystemManifest, Target};
use mosfs::internals::publish::keys;
use mosfs::internals::trust::config::CaFile;
use mosfs::internals::trust::{Anchor, Dates, Signed, SigningKey};
use uuid::Uuid;

fn main() {
    divan::main();
}

/// A system of so many targets.
fn system(targets: usize) -> SystemManifest {
    let mount = Mount {
        destination: "/data".into(),
        source: Some("/srv/data".into()),
        kind: Some("bind".into()),
        options: Some(vec!["rbind".into(), "ro".into()]),
    };
    let target = |index: usize| Target {
        digest: Digest::of(&index.to_le_bytes()),
        size: 3993,
        version: "1.2.3".into(),
        service_type: ServiceType::Container,
        network: Network::Host,
        workload: Default::default(),
        nsgroup: Some("ran".into()),
        mounts: Some(vec![mount.clone()]),
    };
    let targets: BTreeMap<_, _> =
        (0..targets).map(|index| (format!("target-{index}").parse().unwrap(), target(index))).collect();
    SystemManifest { version: 20_261_123, product: Uuid::from_u128(7), targets }
}

#[divan::bench(args = [2, 1000])]
fn write_canonical(bencher: Bencher<'_, '_>, targets: usize) {
    let system = system(targets);
    bencher.counter(BytesCount::of_slice(&system.canonical())).bench_local(|| black_box(&system).canonical());
}

/// With the proof that the bytes are canonical.
#[divan::bench(args = [2, 1000])]
fn read_strictly(bencher: Bencher<'_, '_>, targets: usize) {
    let bytes = system(targets).canonical();
    bencher
        .counter(BytesCount::of_slice(&bytes))
        .bench_local(|| SystemManifest::parse(black_box(&bytes)).unwrap());
}

/// The yardstick: a general reader and writer, that checks none of it.
#[divan::bench(args = [2, 1000])]
fn serde_json_read_and_write(bencher: Bencher<'_, '_>, targets: usize) {
    let bytes = system(targets).canonical();
    bencher.counter(BytesCount::of_slice(&bytes)).bench_local(|| {
        let value: serde_json::Value = serde_json::from_slice(black_box(&bytes)).unwrap();
        serde_json::to_vec(&value).unwrap()
    });
}

#[divan::bench(args = [2, 1000])]
fn read_import(bencher: Bencher<'_, '_>, targets: usize) {
    let mut yaml = "version: 7\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\ntargets:\n".to_string();
    for index in 0..targets {
        yaml +=
            &format!("  t{index}:\n    url: oci:/d:t{index}\n    version: 1\n    service_type: fs-only\n");
        yaml += "    network: {type: host}\n    mounts: [{destination: /data, options: [ro]}]\n";
    }
    bencher
        .counter(BytesCount::of_str(&yaml))
        .bench_local(|| ImportManifest::parse(Path::new("m.yaml"), black_box(yaml.as_bytes())).unwrap());
}

/// Chain, signature and manifest, with OpenSSL initialised already.
#[divan::bench(args = ["ecdsa", "rsa"])]
fn verify(bencher: Bencher<'_, '_>, kind: &str) {
    let (dir, system) = (tempfile::tempdir().unwrap(), system(2));
    let product = system.product;
    let request = keys::Request { product, name: "bench".into(), rsa_signer: kind == "rsa" };
    keys::generate(dir.path(), &request).unwrap();
    let key = SigningKey::load(&dir.path().join("signer.key")).unwrap();
    let certificate = std::fs::read(dir.path().join("signer.pem")).unwrap();
    let signed = Signed::create(&system, &key, &certificate, Dates::LogOnly).unwrap();
    let anchor = Anchor::new(CaFile::load(&dir.path().join("ca.pem")).unwrap(), product);
    bencher
        .with_inputs(|| signed.clone())
        .bench_local_values(|signed| signed.verify(&anchor, Dates::LogOnly).unwrap());
}
