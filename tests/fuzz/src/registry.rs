//! The readers of what registries send: headers, documents, and the names that lead to them.

use mosfs::internals::image::index::Index;
use mosfs::internals::image::oci::{MAX_MANIFEST_BYTES, Manifest, OciImage};
use mosfs::internals::store::lazy::ReadList;
use mosfs::internals::transport::SourceRef;
use mosfs::internals::transport::registry::read_headers;

/// Any text as the headers of an answer: challenges, links, redirects, ranges.
pub fn headers(bytes: &[u8]) {
    read_headers(&String::from_utf8_lossy(bytes));
}

/// Any bytes as a manifest, an index or a list of reads. What is accepted is written in a form that reads the same.
pub fn documents(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let again = Manifest::parse(&manifest.to_bytes()).expect("what is written can be read");
        assert_eq!(again.to_bytes(), manifest.to_bytes());
    }
    if let Ok(index) = Index::parse(bytes, MAX_MANIFEST_BYTES) {
        let again = Index::parse(&index.to_bytes(), MAX_MANIFEST_BYTES).expect("what is written can be read");
        assert_eq!(again.to_bytes(), index.to_bytes());
    }
    if let Ok(image) = OciImage::parse(bytes) {
        assert_eq!(image.size, bytes.len() as u64);
    }
    if let Ok(list) = ReadList::parse(bytes) {
        let fetched: u64 = list.reads().map(|read| read.len).sum();
        assert!(fetched <= 256 << 20, "{fetched} bytes for a hint");
        assert_eq!(ReadList::parse(&list.to_bytes()).expect("what is written can be read"), list);
    }
}

/// Any text as the name of a source; what is accepted is written in a form that leads to the same.
pub fn source(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match text.parse::<SourceRef>() {
        Ok(source) => {
            let again: SourceRef = source.to_string().parse().expect("what is written can be read");
            assert_eq!(again.to_string(), source.to_string());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
