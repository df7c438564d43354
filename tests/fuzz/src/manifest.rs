//! The readers of manifests: any bytes, and what has to hold for them.

use std::path::Path;

use mosfs::internals::manifest::{ImportManifest, SystemManifest, json};

/// Any bytes are an import manifest, or errors that all have a place; what is accepted can be written in
/// reproducible form.
pub fn import(bytes: &[u8]) {
    match ImportManifest::parse(Path::new("fuzz"), bytes) {
        Ok(manifest) => {
            let canonical = manifest.canonical();
            let tree = json::read(&canonical).expect("reproducible JSON");
            assert_eq!(json::write(&tree), canonical);
            // JSON is YAML: what was written is read back to the same, but for places and the file's name.
            let again = ImportManifest::parse(Path::new("fuzz"), &canonical).expect("the same manifest");
            assert_eq!(again.canonical(), canonical);
        }
        Err(errors) => {
            assert!(!errors.0.is_empty());
            assert!(errors.0.iter().all(|error| error.problem.at.line > 0 && error.problem.at.column > 0));
            assert!(!errors.to_string().chars().any(|c| c.is_control() && c != '\n'));
        }
    }
}

/// Any bytes are the canonical form of a system manifest, or an error.
pub fn system(bytes: &[u8]) {
    match SystemManifest::parse(bytes) {
        Ok(manifest) => assert_eq!(manifest.canonical(), bytes),
        Err(error) => assert!(!error.to_string().chars().any(char::is_control)),
    }
    // What the reader takes is written in a form that it reads to the same tree.
    if let Ok(tree) = json::read(bytes) {
        let written = json::write(&tree);
        let again = json::read(&written).expect("what is written can be read");
        assert_eq!(json::write(&again), written);
    }
}
