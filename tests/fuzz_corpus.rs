//! Runs each fuzz target over its corpus (tests/fuzz/corpus/TARGET): seeds, and what once was a finding.

use std::fs;
use std::path::Path;

#[path = "fuzz/src/lib.rs"]
#[allow(dead_code)]
mod targets;

#[test]
fn every_target_runs_over_its_corpus() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for (name, entry) in targets::TARGETS {
        let folder = corpora.join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut count = 0;
        for file in files {
            let path = file.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            // What a panic says does not name the input.
            let result = std::panic::catch_unwind(|| entry(&bytes));
            assert!(result.is_ok(), "{name} panics on {}", path.display());
            count += 1;
        }
        assert!(count > 0, "{} holds no seeds", folder.display());
    }
    let mut expected: Vec<_> = targets::TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    expected.sort();
    let mut found: Vec<_> = fs::read_dir(&corpora)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, expected, "folders of {}", corpora.display());
}
