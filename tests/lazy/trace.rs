//! Lists of what a program reads, recorded and used.

use std::fs;
use std::process::Command;

use crate::fixture::Lazy;
use crate::place::{display, refused, text};
use crate::server::Options;
use crate::unmount::unmount;

/// The file that the traced program reads: in the middle of the upper layer.
const READ: usize = 17;

fn trace(lazy: &Lazy, source: &str, options: &[&str]) -> std::process::Output {
    let store = display(&lazy.place.path("trace-store"));
    let mut args = vec!["trace", source, "--store", &store];
    args.extend(options);
    let file = format!("d{}/f{READ}", READ % 4);
    args.extend(["--", "cat", &file]);
    lazy.place.command(&args).output().unwrap()
}

#[test]
fn a_recorded_list_is_found_in_the_registry_and_fetched_first() {
    for referrers in [true, false] {
        let lazy = Lazy::served_by(Options { referrers, ..Options::default() });
        let list = lazy.place.path("list");
        let output = trace(&lazy, &lazy.source(), &["--output", &display(&list), "--push"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let bytes = fs::read(&list).unwrap();
        let recorded: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let listed: u64 =
            recorded["reads"].as_array().unwrap().iter().map(|read| read[2].as_u64().unwrap()).sum();
        assert!(listed > 100_000 && listed < lazy.size() / 2, "{listed} of {}", lazy.size());

        // Everything that the program reads is here when the mount is.
        lazy.server.take_log();
        let mount = lazy.mount("m");
        assert_eq!(mount.read(READ), Ok(()));
        let fetched = lazy.fetched(&lazy.server.take_log());
        assert!(fetched >= listed, "{fetched} of {listed}: the list is not used");
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(mount.read(READ), Ok(()));
        assert_eq!(lazy.parts(&lazy.server.take_log()).len(), 0);
        mount.read_all();
    }
}

#[test]
fn a_list_is_a_hint_and_never_trusted() {
    let lazy = Lazy::new();
    let file = lazy.place.path("list");
    let digest = lazy.layers[0].digest;
    for (list, is_read) in [
        (
            format!(
                r#"{{"format":1,"blobs":["{digest}"],"reads":[[0,18446744073709551000,18446744073709551615]]}}"#
            ),
            true,
        ),
        (format!(r#"{{"format":1,"blobs":["{digest}"],"reads":[[5,0,1],[0,0,0],[0,99999999999,5]]}}"#), true),
        (r#"{"format":1,"blobs":[],"reads":[]}"#.to_string(), true),
        (r#"{"format":7,"blobs":[],"reads":[]}"#.to_string(), false),
        ("nonsense".to_string(), false),
    ] {
        fs::write(&file, &list).unwrap();
        let output = lazy
            .command(&lazy.source(), "m", &["--no-fill", "--net-timeout", "2", "--list", &display(&file)])
            .output()
            .unwrap();
        if is_read {
            assert!(output.status.success(), "{list}: {}", text(&output.stderr));
            let at = lazy.place.path("m");
            let bytes = fs::read(at.join(format!("d{}/f{}", READ % 4, READ))).unwrap();
            assert!(bytes == crate::fixture::content(READ).as_bytes());
            unmount(Command::new("umount").arg(&at));
        } else {
            refused(&output, 1, &["list", "not a list of reads"]);
        }
    }
}

#[test]
fn images_of_a_layout_are_traced_and_a_command_that_fails_gives_no_list() {
    let lazy = Lazy::new();
    let name = format!("mos/images/hostfs:sha256/{}", lazy.image.hex());
    let source = format!("oci:{}:{name}", display(&lazy.place.store()));
    let output = trace(&lazy, &source, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let recorded: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!recorded["reads"].as_array().unwrap().is_empty());
    refused(&trace(&lazy, &source, &["--push"]), 2, &["expected the image of a registry"]);
    let failed = lazy.place.command(&["trace", &source, "--", "false"]).output().unwrap();
    refused(&failed, 1, &["false ended with exit status: 1; no list is written"]);
    assert!(failed.stdout.is_empty());
    let missing = lazy.place.command(&["trace", &source, "--", "/no/such/program"]).output().unwrap();
    refused(&missing, 1, &["cannot run /no/such/program"]);
    // Core dumps of mosfs have no memory in them once it talks to a registry, and those of the command are its own.
    let filter = "/proc/self/coredump_filter";
    let output = lazy.place.command(&["trace", &lazy.source(), "--", "cat", filter]).output().unwrap();
    assert!(
        text(&output.stderr).contains(&std::fs::read_to_string(filter).unwrap()),
        "{}",
        text(&output.stderr)
    );
}
