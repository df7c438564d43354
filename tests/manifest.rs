//! Manifests: the example of the design byte for byte, every rule of the import manifest, and
//! the strictness of the system manifest's reader.

use std::collections::BTreeMap;
use std::path::Path;

use mosfs::digest::Digest;
use mosfs::manifest::{ImportManifest, Resolved, SystemManifest};

/// The example of DESIGN.md, section 2, with `ran-http` beside `hostfs`.
const EXAMPLE: &str = r#"version: 200                     # required, 1 .. 2^53-1, the version of the whole system
mediatype: application/vnd.mos.import.manifest.v1    # optional until there is a v2
image_type: iso                  # optional
product: de6c82c5-2e01-4c92-949b-a6545d30fc06        # required, a UUID
storage_type: atomfs             # atomfs (default: squashfs + verity layers) | puzzlefs
targets:                         # required; a mapping, so that no name comes twice
  hostfs:
    url: "docker://some.url/puzzlefs/hostfs:latest"  # required; see INTEROP.md for forms
    version: 0.0.1               # required
    service_type: hostfs         # required: hostfs | container | fs-only
    network: {type: host}        # required: type host | none | simple (ipv4, ipv6, ports)
    nsgroup: ""                  # optional
    mounts: []                   # optional; OCI runtime-spec fields: destination, source, type, options
  ran-http:
    url: oci:/srv/layout:ran-http
    version: 2.9.2
    service_type: container
    network: {type: host}
"#;

fn resolved(name: &str, size: u64) -> Resolved {
    Resolved { digest: Digest::of(name.as_bytes()), size }
}

fn example_system() -> SystemManifest {
    let import = ImportManifest::parse(Path::new("import.yaml"), EXAMPLE.as_bytes()).unwrap();
    let stored = BTreeMap::from([
        ("hostfs".parse().unwrap(), resolved("H1", 3993)),
        ("ran-http".parse().unwrap(), resolved("H2", 2038)),
    ]);
    import.to_system(&stored).unwrap()
}

#[test]
fn the_example_of_the_design_byte_for_byte() {
    let golden = r#"{"mediatype":"application/vnd.mos.system.manifest.v1","product":"de6c82c5-2e01-4c92-949b-a6545d30fc06","targets":{"hostfs":{"digest":"sha256:H1","mounts":[],"network":{"type":"host"},"nsgroup":"","service_type":"hostfs","size":3993,"version":"0.0.1"},"ran-http":{"digest":"sha256:H2","network":{"type":"host"},"service_type":"container","size":2038,"version":"2.9.2"}},"version":200}"#;
    let golden = golden.replace("H1", &Digest::of(b"H1").hex()).replace("H2", &Digest::of(b"H2").hex());
    let system = example_system();
    assert_eq!(String::from_utf8(system.canonical()).unwrap(), golden);
    assert_eq!(SystemManifest::parse(golden.as_bytes()).unwrap(), system);
}
