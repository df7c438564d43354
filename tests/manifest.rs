//! Manifests: the example of the design byte for byte, every rule of the import manifest, and
//! the strictness of the system manifest's reader.

use std::collections::BTreeMap;
use std::path::Path;

use mosfs::internals::digest::Digest;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::manifest::rules;
use mosfs::internals::manifest::workload::{Health, Ready, Resources, Restart, Run, Workload, Writable};
use mosfs::internals::manifest::{
    ImportErrors, ImportManifest, MAX_INTEGER, Mount, Network, Port, ProblemKind, Protocol, Resolved,
    ServiceType, StorageType, SystemError, SystemManifest, Target, TargetName,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use uuid::Uuid;

/// The example of docs/MANIFESTS.md with `ran-http` beside `hostfs`.
const EXAMPLE: &str = r#"version: 200                     # required, 1 .. 2^53-1, the version of the whole system
mediatype: application/vnd.mos.import.manifest.v1    # optional until there is a v2
image_type: iso                  # optional
product: de6c82c5-2e01-4c92-949b-a6545d30fc06        # required, a UUID
storage_type: atomfs             # atomfs (default: squashfs + verity layers) | puzzlefs
targets:                         # required; a mapping, so that no name comes twice
  hostfs:
    url: "docker://some.url/puzzlefs/hostfs:latest"  # required; see docs/MANIFESTS.md for forms
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

/// A manifest that is right, to break in one place at a time.
const GOOD: &str = "\
version: 7
product: de6c82c5-2e01-4c92-949b-a6545d30fc06
targets:
  app:
    url: docker://h.example:5000/a/b:1
    version: 1.10
    service_type: container
    network:
      type: simple
      ipv4: 10.0.3.99/24
      ipv6: fd00::99/64
      ports: [{host: 80, container: 5000}, {host: 53, container: 53, protocol: udp}]
    nsgroup: app
    mounts:
      - destination: /data
        source: /srv/dätä
        type: bind
        options: [rbind, ro]
    digest: sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
    size: 3993
";

fn parse(yaml: &[u8]) -> Result<ImportManifest, ImportErrors> {
    ImportManifest::parse(Path::new("m.yaml"), yaml)
}

/// What is wrong with a manifest: line, column, field, kind.
fn problems(yaml: &[u8]) -> Vec<(usize, usize, String, ProblemKind)> {
    let errors = parse(yaml).expect_err("the manifest should be refused");
    assert_eq!(errors.class(), Class::Input);
    assert!(errors.0.iter().all(|error| error.file == Path::new("m.yaml")));
    let all = errors.0.into_iter().map(|error| error.problem);
    all.map(|problem| (problem.at.line, problem.at.column, problem.field, problem.kind)).collect()
}

/// The one problem of [`GOOD`] with `from` replaced by `to`.
fn broken(from: &str, to: &str) -> (usize, usize, String, ProblemKind) {
    assert_eq!(GOOD.matches(from).count(), 1, "`{from}` should come once");
    let mut all = problems(GOOD.replace(from, to).as_bytes());
    assert_eq!(all.len(), 1, "{from} -> {to}: {all:?}");
    all.remove(0)
}

#[test]
fn what_a_publisher_writes_is_what_comes_out() {
    let manifest = parse(GOOD.as_bytes()).unwrap();
    let app = &manifest.targets["app"];
    // As it is written, not as the number 1.1.
    assert_eq!(app.version, "1.10");
    let ports = vec![
        Port { host: 80, container: 5000, protocol: None, address: None },
        Port { host: 53, container: 53, protocol: Some(Protocol::Udp), address: None },
    ];
    let (ipv4, ipv6) = (Some("10.0.3.99/24".to_string()), Some("fd00::99/64".to_string()));
    assert_eq!(app.network, Network::Simple { ipv4, ipv6, ports: Some(ports) });
    let mount = &app.mounts.as_ref().unwrap()[0];
    assert_eq!((mount.source.as_deref(), mount.kind.as_deref()), (Some("/srv/dätä"), Some("bind")));
    assert_eq!(app.digest.unwrap().value, Digest::of(b""));
    assert_eq!(manifest.storage_type(), StorageType::Atomfs);
    // Reproducible JSON of the import manifest: the same fields, sorted, less what was not written.
    let json = String::from_utf8(manifest.canonical()).unwrap();
    assert!(
        json.starts_with(r#"{"product":"de6c82c5-2e01-4c92-949b-a6545d30fc06","targets":{"app":{"digest":"#),
        "{json}"
    );
    assert!(
        json.ends_with(r#""url":"docker://h.example:5000/a/b:1","version":"1.10"}},"version":7}"#),
        "{json}"
    );
}

#[test]
fn each_rule_of_the_import_manifest_names_its_place() {
    use ProblemKind::*;
    let uuid = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
    let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let long_name = "a".repeat(64);
    let long_target = format!("  {long_name}:\n    url");
    let at = |line, column, field: &str, kind| (line, column, field.to_string(), kind);
    let mut wrong = Vec::new();
    for (from, to, expected) in [
        // The version of the system: an integer from 1 to 2^53-1.
        ("version: 7", "version: 0", at(1, 10, "version", BadValue)),
        ("version: 7", "version: -7", at(1, 10, "version", BadValue)),
        ("version: 7", "version: 007", at(1, 10, "version", BadValue)),
        ("version: 7", "version: +7", at(1, 10, "version", BadValue)),
        ("version: 7", "version: 9007199254740992", at(1, 10, "version", BadValue)),
        ("version: 7", "version: 7.0", at(1, 10, "version", WrongType)),
        ("version: 7", "version: 7e0", at(1, 10, "version", WrongType)),
        ("version: 7", "version: 0x7", at(1, 10, "version", WrongType)),
        ("version: 7", "version: 7_000", at(1, 10, "version", WrongType)),
        ("version: 7", "version: '7'", at(1, 10, "version", WrongType)),
        ("version: 7", "version: seven", at(1, 10, "version", WrongType)),
        ("version: 7", "version: [7]", at(1, 10, "version", WrongType)),
        ("version: 7", "version:", at(1, 8, "version", WrongType)),
        ("version: 7\n", "", at(1, 1, "version", MissingField)),
        // Product, and the words of the optional fields.
        (uuid, "default", at(2, 10, "product", BadValue)),
        (uuid, &uuid.replace('-', ""), at(2, 10, "product", BadValue)),
        (uuid, "~", at(2, 10, "product", WrongType)),
        (
            "version: 7",
            "version: 7\nmediatype: application/vnd.mos.import.manifest.v2",
            at(2, 12, "mediatype", BadValue),
        ),
        ("version: 7", "version: 7\nimage_type: ISO", at(2, 13, "image_type", BadValue)),
        ("version: 7", "version: 7\nstorage_type: erofs", at(2, 15, "storage_type", BadValue)),
        ("version: 7", "version: 7\nversion: 7", at(2, 1, "version", DuplicateKey)),
        ("version: 7", "version: 7\nversoin: 7", at(2, 1, "versoin", UnknownField)),
        ("version: 7", "version: 7\n<<: {}", at(2, 1, "<<", UnknownField)),
        // Names of targets.
        ("  app:\n    url", "  App:\n    url", at(4, 3, "targets.App", BadValue)),
        ("  app:\n    url", "  a..b:\n    url", at(4, 3, "targets.a..b", BadValue)),
        ("  app:\n    url", "  -a:\n    url", at(4, 3, "targets.-a", BadValue)),
        ("  app:\n    url", "  a/b:\n    url", at(4, 3, "targets.a/b", BadValue)),
        ("  app:\n    url", "  '':\n    url", at(4, 3, "targets.", BadValue)),
        ("  app:\n    url", &long_target, at(4, 3, &format!("targets.{long_name}"), BadValue)),
        // Fields of a target.
        ("docker://h.example:5000/a/b:1", "http://h/a", at(5, 10, "targets.app.url", BadValue)),
        (
            "docker://h.example:5000/a/b:1",
            &format!("docker://h/a:1@{digest}"),
            at(5, 10, "targets.app.url", BadValue),
        ),
        ("    url: docker://h.example:5000/a/b:1\n", "", at(4, 3, "targets.app.url", MissingField)),
        ("version: 1.10", "version: a b", at(6, 14, "targets.app.version", BadValue)),
        ("version: 1.10", "version: null", at(6, 14, "targets.app.version", WrongType)),
        ("version: 1.10", "version: {a: 1}", at(6, 14, "targets.app.version", WrongType)),
        (
            "service_type: container",
            "service_type: Container",
            at(7, 19, "targets.app.service_type", BadValue),
        ),
        ("nsgroup: app", "nsgroup: no way", at(13, 14, "targets.app.nsgroup", BadValue)),
        ("nsgroup: app", "nsgroup:", at(13, 12, "targets.app.nsgroup", WrongType)),
        ("nsgroup: app", "nsgruop: app", at(13, 5, "targets.app.nsgruop", UnknownField)),
        (digest, &digest.to_uppercase(), at(19, 13, "targets.app.digest", BadValue)),
        (digest, &digest[..70], at(19, 13, "targets.app.digest", BadValue)),
        ("size: 3993", "size: 0", at(20, 11, "targets.app.size", BadValue)),
        ("size: 3993", "size: 4 KiB", at(20, 11, "targets.app.size", WrongType)),
        // Network.
        ("type: simple", "type: bridge", at(9, 13, "targets.app.network.type", BadValue)),
        ("      type: simple\n", "", at(9, 7, "targets.app.network.type", MissingField)),
        ("10.0.3.99/24", "10.0.3.999/24", at(10, 13, "targets.app.network.ipv4", BadValue)),
        ("10.0.3.99/24", "10.0.3.99/33", at(10, 13, "targets.app.network.ipv4", BadValue)),
        ("10.0.3.99/24", "10.0.3.99/024", at(10, 13, "targets.app.network.ipv4", BadValue)),
        ("10.0.3.99/24", "010.0.3.99", at(10, 13, "targets.app.network.ipv4", BadValue)),
        ("fd00::99/64", "10.0.0.1", at(11, 13, "targets.app.network.ipv6", BadValue)),
        ("fd00::99/64", "fe80::1%eth0", at(11, 13, "targets.app.network.ipv6", BadValue)),
        ("host: 80", "host: 0", at(12, 22, "targets.app.network.ports[0].host", BadValue)),
        ("host: 80", "host: 65536", at(12, 22, "targets.app.network.ports[0].host", BadValue)),
        ("protocol: udp", "protocol: sctp", at(12, 80, "targets.app.network.ports[1].protocol", BadValue)),
        (", container: 5000}", "}", at(12, 15, "targets.app.network.ports[0].container", MissingField)),
        // Mounts.
        (
            "destination: /data",
            "destination: data",
            at(15, 22, "targets.app.mounts[0].destination", BadValue),
        ),
        (
            "destination: /data",
            "destination: /data/../..",
            at(15, 22, "targets.app.mounts[0].destination", BadValue),
        ),
        (
            "destination: /data",
            "destination: \"/da\\nta\"",
            at(15, 22, "targets.app.mounts[0].destination", BadValue),
        ),
        ("source: /srv/dätä", "source: ''", at(16, 17, "targets.app.mounts[0].source", BadValue)),
        ("type: bind", "type: b/i", at(17, 15, "targets.app.mounts[0].type", BadValue)),
        (
            "options: [rbind, ro]",
            "options: [rbind, '']",
            at(18, 26, "targets.app.mounts[0].options[1]", BadValue),
        ),
        ("options: [rbind, ro]", "options: rbind", at(18, 18, "targets.app.mounts[0].options", WrongType)),
        // What YAML has and manifests have not.
        ("version: 7", "version: &v 7", at(1, 10, "", Unsupported)),
        ("version: 7", "version: !!int 7", at(1, 10, "", Unsupported)),
        ("nsgroup: app", "nsgroup: *x", at(13, 14, "", Syntax)),
        ("    size: 3993\n", "    size: 3993\n---\nversion: 8\n", at(21, 1, "", Unsupported)),
        ("nsgroup: app", "nsgroup: [app", at(14, 11, "", Syntax)),
    ] {
        let found = broken(from, to);
        if found != expected {
            wrong.push(format!("`{from}` -> `{to}`:\n  expected {expected:?}\n  found    {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    let yaml = "\
version: 0
produkt: de6c82c5-2e01-4c92-949b-a6545d30fc06
targets:
  hostfs: {url: 'oci:', version: 1, service_type: hostfs, network: {type: none, ipv4: 10.0.0.1}}
  Other:
    url: oci:/d
    service_type: hostfs
    network: {typ: host}
    mounts: [{destination: a, optoins: []}, 7]
";
    let text = parse(yaml.as_bytes()).unwrap_err().to_string();
    assert_eq!(
        text,
        "\
the import manifest has 13 errors
m.yaml:1:1: product: found nothing; allowed: the UUID of the product (required)
m.yaml:1:10: version: found `0`; allowed: an integer from 1 to 9007199254740991
m.yaml:2:1: produkt: found the unknown field `produkt`; allowed: version, mediatype, image_type, product, storage_type, targets
m.yaml:4:17: targets.hostfs.url: found \"oci:\"; allowed: oci:PATH[:REF] with a PATH that is not empty
m.yaml:4:81: targets.hostfs.network.ipv4: found `ipv4` with type none; allowed: only with type simple
m.yaml:5:3: targets.Other.version: found nothing; allowed: the version of the target (required)
m.yaml:5:3: targets.Other: found the name `Other`; allowed: [a-z0-9]+([._-][a-z0-9]+)*, at most 63 characters
m.yaml:7:19: targets.Other.service_type: found a second hostfs (the first is targets.hostfs); allowed: one target with service_type hostfs
m.yaml:8:14: targets.Other.network.type: found nothing; allowed: host, none, simple (required)
m.yaml:8:15: targets.Other.network.typ: found the unknown field `typ`; allowed: type, ipv4, ipv6, ports
m.yaml:9:28: targets.Other.mounts[0].destination: found `a`; allowed: an absolute path without `..` or control characters, at most 4096 bytes
m.yaml:9:31: targets.Other.mounts[0].optoins: found the unknown field `optoins`; allowed: destination, source, type, options
m.yaml:9:45: targets.Other.mounts[1]: found `7`; allowed: a mapping with destination, source, type, options"
    );
}

#[test]
fn targets_have_to_be_there_and_each_once() {
    use ProblemKind::*;
    let head = "version: 7\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\ntargets:";
    let kind = |targets: &str| problems(format!("{head}{targets}\n").as_bytes()).remove(0).3;
    for none in [" {}", " []", "", " ~"] {
        assert_eq!(kind(none), NoTargets, "{none:?}");
    }
    assert_eq!(kind(" [{name: a}]"), WrongType);
    assert_eq!(kind(" 7"), WrongType);
    let one = "\n  a: {url: 'oci:d', version: 1, service_type: fs-only, network: {type: host}}";
    assert!(parse(format!("{head}{one}\n").as_bytes()).is_ok());
    let twice = problems(format!("{head}{one}{one}\n").as_bytes());
    assert_eq!(twice, [(5, 3, "targets.a".to_string(), DuplicateKey)]);
}

#[test]
fn hostile_files_are_bounded() {
    use ProblemKind::*;
    let kind = |yaml: &[u8]| problems(yaml).remove(0).3;
    assert_eq!(kind(b""), Syntax);
    assert_eq!(kind(b"\xff"), Encoding);
    assert_eq!(kind(b"# only a comment\n"), Syntax);
    assert_eq!(kind(&vec![b'#'; (1 << 20) + 1]), TooLarge);
    assert_eq!(kind(&b"- ".repeat(100_000)), TooDeep);
    // The parser has a bound of its own for brackets.
    assert!(matches!(kind(&b"[".repeat(100_000)), TooDeep | Syntax));
    assert!(matches!(kind(&b"{a: ".repeat(100_000)), TooDeep | Syntax));
    let many = format!("[{}]", "0,".repeat(100_000));
    assert_eq!(kind(many.as_bytes()), TooLarge);
    // Each alias of the "billion laughs" doubles the tree; here the first is refused.
    let laughs = "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
    assert!(problems(laughs.as_bytes()).iter().any(|(_, _, _, kind)| *kind == Unsupported));
    // What is printed of a file cannot steer a terminal.
    let text = parse("version: \"\\e[2J\"\n".as_bytes()).unwrap_err().to_string();
    assert!(!text.contains('\u{1b}'), "{text:?}");
}

#[test]
fn a_pin_that_does_not_match_is_reported_where_it_stands() {
    let manifest = parse(GOOD.as_bytes()).unwrap();
    let app = "app".parse().unwrap();
    let right = Resolved { digest: Digest::of(b""), size: 3993 };
    assert_eq!(manifest.check_pins(&app, &right), Ok(()));
    let errors =
        manifest.check_pins(&app, &Resolved { digest: Digest::of(b"other"), size: 3994 }).unwrap_err();
    // Digests that do not match are a failed verification, whoever wrote them down.
    assert_eq!(errors.class(), Class::Verification);
    let [digest, size] = &errors.0[..] else { panic!("two problems: {errors}") };
    assert_eq!(
        (digest.problem.kind, digest.problem.at.line, digest.problem.at.column),
        (ProblemKind::PinMismatch, 19, 13)
    );
    assert_eq!(
        size.to_string(),
        "m.yaml:20:11: targets.app.size: found 3994 at docker://h.example:5000/a/b:1; allowed: the pinned 3993"
    );
}

#[test]
fn a_system_manifest_needs_all_images() {
    let errors = parse(GOOD.as_bytes()).unwrap().to_system(&BTreeMap::new()).unwrap_err();
    assert_eq!(errors.0[0].problem.field, "targets.app.url");
}

/// What the reader says about a canonical manifest with `from` replaced by `to`.
fn system(from: &str, to: &str) -> SystemError {
    let good = String::from_utf8(example_system().canonical()).unwrap();
    assert!(good.contains(from), "{from}");
    SystemManifest::parse(good.replacen(from, to, 1).as_bytes()).expect_err(to)
}

#[test]
fn the_reader_of_system_manifests_takes_one_form() {
    use ProblemKind::*;
    let good = String::from_utf8(example_system().canonical()).unwrap();
    let start_of = |text: &str| good.find(text).unwrap();
    let byte_and_kind = |error: SystemError| match error {
        SystemError::Json(problem) => (problem.at.offset, problem.kind),
        SystemError::Fields(problems) => (problems[0].at.offset, problems[0].kind),
        _ => panic!("{error}"),
    };
    let mut wrong = Vec::new();
    // Not JSON, or JSON that two readers could read differently. Bytes are counted from the change.
    for (from, to, byte, kind) in [
        ("{\"mediatype", "", 3, Syntax),
        ("\"version\":200}", "\"version\":200", 13, Syntax),
        ("\"version\":200}", "\"version\":200}}", 14, Syntax),
        ("\"version\":200}", "\"version\":200,}", 14, Syntax),
        ("\"version\":200}", "\"version\":2e2}", 10, BadValue),
        ("\"version\":200}", "\"version\":200.0}", 10, BadValue),
        ("\"version\":200}", "\"version\":0200}", 10, BadValue),
        ("\"version\":200}", "\"version\":9007199254740992}", 10, BadValue),
        ("\"version\":200}", "\"version\":-0}", 10, BadValue),
        ("\"version\":200}", "\"version\":NaN}", 10, Syntax),
        ("\"version\":200}", "\"version\":200,\"version\":200}", 14, DuplicateKey),
        ("\"mounts\":[]", "\"mounts\":[],\"digest\":\"\"", 12, DuplicateKey),
        ("\"nsgroup\":\"\"", "\"nsgroup\":\"\\ud800\"", 13, Encoding),
        ("\"nsgroup\":\"\"", "\"nsgroup\":\"a\\nb\"", 11, Unsupported),
        ("\"nsgroup\":\"\"", "\"nsgröup\":\"\"", 0, Unsupported),
        // Fields.
        (
            "\"application/vnd.mos.system.manifest.v1\"",
            "\"application/vnd.mos.system.manifest.v2\"",
            0,
            BadValue,
        ),
        ("\"version\":200}", "\"version\":0}", 10, BadValue),
        ("\"version\":200}", "\"version\":-1}", 10, BadValue),
        ("\"version\":200}", "\"version\":\"200\"}", 10, WrongType),
        ("\"version\":200}", "\"version\":null}", 10, WrongType),
        ("\"version\":200}", "\"version\":200,\"x\":1}", 14, UnknownField),
        ("\"nsgroup\":\"\"", "\"nsgroup\":7", 10, WrongType),
        ("\"nsgroup\":\"\"", "\"url\":\"oci:d\"", 0, UnknownField),
        ("\"version\":\"2.9.2\"", "\"version\":2", 10, WrongType),
        ("\"service_type\":\"container\"", "\"service_type\":\"hostfs\"", 15, SecondHostfs),
    ] {
        let (found, start) = (byte_and_kind(system(from, to)), start_of(from));
        if found != (start + byte, kind) {
            wrong.push(format!("`{from}` -> `{to}`: expected {:?}, found {found:?}", (start + byte, kind)));
        }
    }
    // The same manifest in other bytes.
    for (from, to, byte) in [
        (",\"version\":200}", ", \"version\":200}", 1),
        ("200}", "200}\n", 4),
        ("\"nsgroup\":\"\",\"service_type\":\"hostfs\"", "\"service_type\":\"hostfs\",\"nsgroup\":\"\"", 1),
        ("de6c82c5", "DE6C82C5", 0),
        ("\"0.0.1\"", "\"0\\u002e0.1\"", 2),
        ("\"hostfs\":{", "\"host\\u0066s\":{", 5),
    ] {
        match system(from, to) {
            SystemError::NotCanonical { at, .. } if at.offset == start_of(from) + byte => {}
            error => wrong
                .push(format!("`{from}` -> `{to}`: expected another form {byte} bytes on, found {error}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(byte_and_kind(system(",\"version\":200}", "}")), (0, MissingField));
    let empty = r#"{"mediatype":"application/vnd.mos.system.manifest.v1","product":"de6c82c5-2e01-4c92-949b-a6545d30fc06","targets":{},"version":1}"#;
    assert_eq!(byte_and_kind(SystemManifest::parse(empty.as_bytes()).unwrap_err()).1, NoTargets);
    assert_eq!(byte_and_kind(SystemManifest::parse(&[b' '; (4 << 20) + 1]).unwrap_err()).1, TooLarge);
    assert_eq!(byte_and_kind(SystemManifest::parse(&b"[".repeat(100_000)).unwrap_err()).1, TooDeep);
    assert_eq!(byte_and_kind(SystemManifest::parse(&b"{\"a\":".repeat(100_000)).unwrap_err()).1, TooDeep);
    let many = format!("[{}0]", "0,".repeat(300_000));
    assert_eq!(byte_and_kind(SystemManifest::parse(many.as_bytes()).unwrap_err()).1, TooLarge);
}

/// Any target name, and any manifest.
fn any_name() -> impl Strategy<Value = String> {
    "[a-z0-9]{1,8}([._-][a-z0-9]{1,8}){0,3}"
}

/// Any fields of a container.
fn any_workload() -> impl Strategy<Value = Workload> {
    let texts = || vec("[^\\p{Cc}]{1,12}", 1..3);
    let time =
        || option::of("[1-9][0-9]?[smh]".prop_filter("at most a day", |text| rules::time(text).is_ok()));
    let health = (texts(), time(), time(), option::of(1..=1000u64), time()).prop_map(
        |(command, interval, timeout, retries, start)| Health { command, interval, timeout, retries, start },
    );
    let writable =
        prop_oneof![Just(Writable::No), Just(Writable::Yes), "[1-9][0-9]?[KMG]?".prop_map(Writable::Size),];
    let restart = prop_oneof![Just(Restart::Always), Just(Restart::OnFailure), Just(Restart::No)];
    let run = (
        option::of(texts()),
        option::of(btree_map("[A-Z_][A-Z0-9_]{0,5}", "[^\\p{Cc}]{0,9}", 0..3)),
        option::of(any::<bool>()),
        option::of(1..=3600u64),
        option::of(restart),
        option::of(writable),
    )
        .prop_map(|(command, environment, init, stop_seconds, restart, writable)| Run {
            command,
            environment,
            init,
            stop_seconds,
            restart,
            writable,
        });
    let resources =
        (option::of("[1-9][0-9]?[KMGT]?"), option::of(1..=MAX_INTEGER), option::of("[1-9][0-9]{0,2}%"))
            .prop_map(|(memory, tasks, cpu)| Resources { memory, tasks, cpu });
    let needs = vec(any_name().prop_map(|name| name.parse::<TargetName>().unwrap()), 0..3);
    let capabilities = vec(prop_oneof![Just("NET_ADMIN".to_string()), Just("SYS_TIME".to_string())], 0..3);
    (
        option::of(needs),
        option::of(health),
        option::of(run),
        option::of(resources),
        option::of(capabilities),
        option::of(vec("/dev/[a-z]{1,5}", 0..2)),
        option::of(vec(any_name(), 0..2)),
    )
        .prop_map(|(needs, health, run, resources, capabilities, devices, secrets)| Workload {
            needs,
            // One of the two.
            ready: if health.is_none() { Some(Ready::Notify) } else { None },
            health,
            run,
            resources,
            capabilities,
            devices,
            secrets,
        })
}

fn any_manifest() -> impl Strategy<Value = SystemManifest> {
    let text = || "[^\\p{Cc}]{1,12}";
    let address = || prop_oneof![Just(String::new()), Just("10.0.0.1".into()), Just("192.168.1.9/24".into())];
    let protocol = prop_oneof![Just(None), Just(Some(Protocol::Tcp)), Just(Some(Protocol::Udp))];
    let port_address = option::of(Just("192.0.2.7".to_string()));
    let port = (1..=u16::MAX, 1..=u16::MAX, protocol, port_address)
        .prop_map(|(host, container, protocol, address)| Port { host, container, protocol, address });
    let ports = option::of(vec(port, 0..3));
    let network = prop_oneof![
        Just(Network::Host),
        Just(Network::None),
        (option::of(address()), option::of(Just("::1/128".to_string())), ports)
            .prop_map(|(ipv4, ipv6, ports)| Network::Simple { ipv4, ipv6, ports }),
    ];
    let mount =
        ("/[^/.\\p{Cc}]{0,12}", option::of(text()), option::of("[a-z.]{1,8}"), option::of(vec(text(), 0..3)))
            .prop_map(|(destination, source, kind, options)| Mount { destination, source, kind, options });
    let service_type = prop_oneof![Just(ServiceType::Container), Just(ServiceType::FsOnly)];
    let target = (
        any::<[u8; 32]>(),
        1..=MAX_INTEGER,
        "[A-Za-z0-9][A-Za-z0-9._+~-]{0,12}",
        service_type,
        network,
        option::of(prop_oneof![Just(String::new()), any_name()]),
        option::of(vec(mount, 0..3)),
        any_workload(),
    )
        .prop_map(|(digest, size, version, service_type, network, nsgroup, mounts, workload)| Target {
            digest: Digest::from_bytes(digest),
            size,
            version,
            service_type,
            network,
            nsgroup,
            mounts,
            workload: if service_type == ServiceType::Container { workload } else { Workload::default() },
        });
    let name = any_name().prop_map(|name| name.parse::<TargetName>().unwrap());
    (1..=MAX_INTEGER, any::<u128>(), btree_map(name, target, 1..5)).prop_map(|(version, product, targets)| {
        SystemManifest { version, product: Uuid::from_u128(product), targets }
    })
}

/// Puts a space somewhere into JSON where it changes nothing, and turns keys around.
fn reordered(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Object(map) => {
            let entries: Vec<_> =
                map.iter().rev().map(|(k, v)| format!("{k:?} : {}", reordered(v))).collect();
            format!("{{ {} }}", entries.join(" , "))
        }
        serde_json::Value::Array(items) => {
            format!("[{}\n]", items.iter().map(reordered).collect::<Vec<_>>().join(",\t"))
        }
        other => other.to_string(),
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back_to_the_byte(manifest in any_manifest()) {
        let bytes = manifest.canonical();
        let back = SystemManifest::parse(&bytes).unwrap();
        prop_assert_eq!(back.canonical(), bytes.clone());
        prop_assert_eq!(back, manifest.clone());
        // Another implementation reads the same from it, and its sorted form is the same bytes.
        let other: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(serde_json::to_vec(&other).unwrap(), bytes.clone());
        // The same content in another order and with spaces is loosely the same, and strictly refused.
        let loose = reordered(&other);
        prop_assert_eq!(SystemManifest::parse_loose(loose.as_bytes()).unwrap(), manifest);
        prop_assert!(SystemManifest::parse(loose.as_bytes()).is_err());
    }

    #[test]
    fn no_other_bytes_are_read_as_the_same_manifest(manifest in any_manifest(), at in any::<Index>(), xor in 1..=255u8) {
        let mut bytes = manifest.canonical();
        let at = at.index(bytes.len());
        bytes[at] ^= xor;
        if let Ok(other) = SystemManifest::parse(&bytes) {
            prop_assert_ne!(&other, &manifest);
            prop_assert_eq!(other.canonical(), bytes);
        }
    }

    #[test]
    fn readers_take_any_bytes(bytes in vec(any::<u8>(), 0..200), text in "[\\[\\]{}:,\"'a-c0-9 \n#&*!|>%@-]{0,80}") {
        let _ = SystemManifest::parse(&bytes);
        let _ = SystemManifest::parse(text.as_bytes());
        let _ = parse(&bytes);
        let _ = parse(text.as_bytes());
    }
}

/// Runs `mosfs manifest` in a folder that holds `good.yaml`, `bad.yaml` and `m.json`.
fn command(words: &[&str]) -> (Option<i32>, String, String) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("good.yaml"), EXAMPLE).unwrap();
    std::fs::write(dir.path().join("bad.yaml"), EXAMPLE.replace("200 ", "0 ").replace("iso ", "raw "))
        .unwrap();
    std::fs::write(dir.path().join("m.json"), example_system().canonical()).unwrap();
    let import = ImportManifest::parse(Path::new("good.yaml"), EXAMPLE.as_bytes()).unwrap().canonical();
    std::fs::write(dir.path().join("import.json"), &import).unwrap();
    let unquoted =
        String::from_utf8(import).unwrap().replace(['"'], "").replace(':', ": ").replace(": //", "://");
    let unquoted = unquoted
        .replace("oci: ", "oci:")
        .replace("layout: ran", "layout:ran")
        .replace("hostfs: latest", "hostfs:latest");
    std::fs::write(dir.path().join("flow.yaml"), unquoted.replace("nsgroup: ,", "nsgroup: '',")).unwrap();
    let pretty: serde_json::Value = serde_json::from_slice(&example_system().canonical()).unwrap();
    std::fs::write(dir.path().join("pretty.json"), format!("\n{pretty:#}\n")).unwrap();
    std::fs::write(dir.path().join("float.json"), r#"{"b":[1.5],"a":"\u00e9"}"#).unwrap();
    std::fs::write(dir.path().join("any.json"), r#"{"b": [true, null, -7], "a": "\u00e9\/\"\\"}"#).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_mosfs"))
        .arg("manifest")
        .args(words)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_checks_and_says_where() {
    let (code, stdout, stderr) = command(&["check", "good.yaml"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(
        stdout,
        "good.yaml: import manifest, version 200, product de6c82c5-2e01-4c92-949b-a6545d30fc06, 2 targets\n"
    );
    let (code, stdout, _) = command(&["check", "m.json"]);
    assert_eq!((code, stdout.starts_with("m.json: system manifest, version 200")), (Some(0), true));
    // JSON is YAML, and so are braces without quotes: both are import manifests still.
    for file in ["import.json", "flow.yaml"] {
        let (code, stdout, stderr) = command(&["check", file]);
        assert_eq!((code, stdout.contains("import manifest, version 200")), (Some(0), true), "{stderr}");
    }
    let (code, stdout, stderr) = command(&["check", "bad.yaml"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(
        stderr.starts_with("mosfs: the import manifest has 2 errors\nbad.yaml:1:10: version: found `0`"),
        "{stderr}"
    );
    assert!(stderr.contains("\nbad.yaml:3:13: image_type: found `raw`; allowed: iso\n"), "{stderr}");
    let (code, stdout, _) = command(&["check", "bad.yaml", "--json"]);
    let answer: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (code, &answer["errors"][1]["line"], &answer["errors"][1]["field"]),
        (Some(2), &3.into(), &"image_type".into())
    );
    let (code, _, stderr) = command(&["check", "pretty.json"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("not in canonical form at byte 0"), "{stderr}");
    assert!(stderr.contains("mosfs manifest canonical"), "{stderr}");
    let (code, _, stderr) = command(&["check", "absent.yaml"]);
    assert_eq!((code, stderr.contains("cannot open absent.yaml")), (Some(1), true), "{stderr}");
}

#[test]
fn the_command_prints_reproducible_json() {
    let canonical = String::from_utf8(example_system().canonical()).unwrap();
    for file in ["m.json", "pretty.json"] {
        assert_eq!(command(&["canonical", file]), (Some(0), canonical.clone(), String::new()));
    }
    let (code, stdout, _) = command(&["canonical", "any.json"]);
    assert_eq!((code, stdout.as_str()), (Some(0), r#"{"a":"é/\"\\","b":[true,null,-7]}"#));
    let (code, stdout, stderr) = command(&["canonical", "float.json"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("float.json") && stderr.contains("byte 6") && stderr.contains("1.5"), "{stderr}");
    let (code, stdout, _) = command(&["canonical", "good.yaml"]);
    assert_eq!(code, Some(0));
    assert!(
        stdout.starts_with(r#"{"image_type":"iso","mediatype":"application/vnd.mos.import.manifest.v1","#),
        "{stdout}"
    );
    assert!(!stdout.ends_with('\n'));
}
